"""fastattn.patch with norm=True: norms are known by what they compute, and nothing else is taken for one."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from patched_models import (
    COPIES,
    PackedWeight,
    anatomy,
    assert_same,
    batch,
    build,
    on_meta,
    replaced,
    report_of_nothing,
    step,
)
from tolerance import assert_as_exact_as_eager
from torch import Tensor, nn

import fastattn
from fastattn.core.norm.operators import NormPlan

# Norms. How many each model has; they compute alone, by the kernels.
NORMS = {"sequences": 1, "encoder": 4, "encoder and decoder": 12, "gpt2": 5, "llama": 5, "gemma3": 13, "bert": 5,
         "t5": 12}  # fmt: skip


def patch_norms(model: nn.Module, **options: Any) -> Any:
    return fastattn.patch(model, attention=False, mlp=False, norm=True, **options)


@pytest.mark.parametrize("name", NORMS)
def test_norms_compute_the_same_by_the_fused_functions_and_are_restored(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    before, expected = anatomy(model), step(model, batch())
    report = patch_norms(model, strict=True)
    assert [row.kind for row in report.swapped] == ["norm"] * NORMS[name]
    counted = []
    own = NormPlan.forward
    monkeypatch.setattr(NormPlan, "forward", lambda *a: counted.append(1) or own(*a))
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    assert_same(step(model, batch()), expected)
    assert len(counted) == NORMS[name]
    monkeypatch.setenv("FASTATTN_BACKEND", "")
    assert_same(step(model, batch()), expected)
    fastattn.unpatch(model)
    assert anatomy(model) == before


def norm_of(model: str, kind: str) -> nn.Module:
    norm = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), kind)(48)
    nn.init.normal_(norm.weight)
    return norm


KNOWN_NORMS = {
    ("llama", "LlamaRMSNorm"): (False, 0.0),
    ("mistral", "MistralRMSNorm"): (False, 0.0),
    ("qwen3", "Qwen3RMSNorm"): (False, 0.0),
    ("gpt_oss", "GptOssRMSNorm"): (False, 0.0),
    ("t5", "T5LayerNorm"): (False, 0.0),
    ("gemma2", "Gemma2RMSNorm"): (False, 1.0),
    ("gemma3", "Gemma3RMSNorm"): (False, 1.0),
    ("cohere", "CohereLayerNorm"): (True, 0.0),
}


@pytest.mark.parametrize("kind", KNOWN_NORMS, ids=lambda kind: kind[1])
def test_norms_of_hugging_face_are_known_by_what_they_compute(kind: tuple[str, str]) -> None:
    norm = norm_of(*kind)
    assert patch_norms(norm).rows[0].now == f"Fused{kind[1]}"
    assert (norm.names.centred, norm.names.weight_offset) == KNOWN_NORMS[kind]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KNOWN_NORMS, ids=lambda kind: kind[1])
def test_patched_norms_are_as_exact_in_half_precision_as_they_were(
    kind: tuple[str, str], dtype: torch.dtype
) -> None:
    norm, x, dy = norm_of(*kind).to(dtype), torch.randn(9, 48).to(dtype), torch.randn(9, 48).to(dtype)

    def run(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.detach().to(dtype).requires_grad_()
        out = module(leaf)
        assert out.dtype == dtype
        return [out.detach(), *torch.autograd.grad(out, [leaf, module.weight], dy.to(dtype))]

    eager = run(norm, dtype)
    precise = copy.deepcopy(norm).double()
    # They compute in float32 whatever they are given.
    patch_norms(precise), patch_norms(norm)
    exact = run(precise, torch.float64)
    for i, (a, x_, e) in enumerate(zip(run(norm, dtype), exact, eager, strict=True)):
        assert_as_exact_as_eager(a, x_, e, gradient=i > 0)


def test_a_norm_of_another_dtype_than_its_input_keeps_its_own_ways() -> None:
    norm, x = norm_of("llama", "LlamaRMSNorm"), torch.randn(3, 48, dtype=torch.bfloat16)
    expected = norm(x)
    patch_norms(norm)
    assert norm(x).dtype == torch.float32 and torch.equal(norm(x), expected)


class SquaredRMSNorm(nn.Module):
    """The name and the parts of an RMS norm, and another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class TimidRMSNorm(SquaredRMSNorm):
    """A norm, but not with the epsilon it names."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1.2 * self.eps).sqrt() * self.weight


class GatedRMSNorm(SquaredRMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return nn.functional.silu(gate) * super().forward(x)


class ClampedLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


def with_packed_norm() -> nn.Module:
    norm = nn.LayerNorm(8)
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(PackedWeight))
    return norm


LEFT_NORMS = {
    "patched before": (lambda: patch_norms(nn.LayerNorm(8)).model, "already patched"),
    "patched before, Hugging Face": (lambda: patch_norms(norm_of("t5", "T5LayerNorm")).model, "already patched"),
    "fastattn's own": (lambda: fastattn.nn.RMSNorm(8), "fastattn's own"),
    "meta": (lambda: on_meta(lambda: nn.RMSNorm(8)), "meta device"),
    "meta Hugging Face": (lambda: on_meta(lambda: norm_of("llama", "LlamaRMSNorm")), "meta device"),
    "subclass": (lambda: ClampedLayerNorm(8), "ClampedLayerNorm is a subclass with code of its own"),
    "parametrised": (
        lambda: nn.utils.parametrizations.weight_norm(nn.LayerNorm(8), dim=None),
        "ParametrizedLayerNorm is a subclass",
    ),
    "forward replaced": (lambda: replaced(nn.LayerNorm(8)), "forward was replaced"),
    "forward replaced, Hugging Face": (lambda: replaced(norm_of("t5", "T5LayerNorm")), "forward was replaced"),
    "packed weight": (with_packed_norm, "weights are of type PackedWeight"),
    "another formula": (SquaredRMSNorm, "its own code computes another norm"),
    "another epsilon": (TimidRMSNorm, "its own code computes another norm"),
    "another argument": (GatedRMSNorm, "its own code computes another norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_NORMS)
def test_norms_that_cannot_be_swapped_are_left_and_the_report_says_why(name: str) -> None:
    make, why = LEFT_NORMS[name]
    assert why in report_of_nothing(make(), patch_norms).left[0].why


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_patched_norms_unpatch_on_their_own(way: str) -> None:
    model = build("llama")
    before = [row[:3] for row in anatomy(model)]
    expected = step(model, batch())
    patch_norms(model)
    twin = COPIES[way](model)
    assert_same(step(twin, batch()), expected)
    fastattn.unpatch(twin)
    assert [row[:3] for row in anatomy(twin)] == before


@pytest.mark.parametrize("dynamic", [False, True])
def test_patched_norms_compile_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(norm_of("llama", "LlamaRMSNorm"), nn.LayerNorm(48))
    x = torch.randn(3, 48)
    expected = step(model, x)
    patch_norms(model, strict=True)
    assert_same(step(torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic), x), expected)
