"""Queries and keys a little wider than a tile, as in DeepSeek's absorbed form: the kernels compute the forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_problems import Problem, without_plans
from hardware import DEVICE, ON_GPU
from tolerance import assert_as_exact_as_eager
from torch import Tensor

import fastattn
from fastattn.core import capabilities
from fastattn.core.attention import definition
from fastattn.core.attention.spec import AttentionSpec
from fastattn.core.capabilities import BACKWARD, FORWARD, Request

ABSORBED = Problem(heads=2, key_heads=1, queries=35, keys=40, width=576, value_width=512, causal=True)
SMALL = replace(ABSORBED, width=520, value_width=24)
PROBLEMS = {
    "values of 512, in two passes": ABSORBED,
    "one column more than a tile, strided": replace(SMALL, width=513, layout="strided"),
    "the widest": replace(SMALL, width=640, causal=False),
    "float16": replace(SMALL, dtype=torch.float16, layout="blhd"),
    "one query, whose keys are split": replace(SMALL, queries=1, keys=700, heads=1),
    "everything": replace(
        SMALL, window=(20, 9), causal=False, lengths=True, alibi=True, sinks=True, bias=(0, 0, 0, 0), radius=9,
        softcap=2.0, dropout=0.3,
    ),
    "block lists": replace(SMALL, lists="random", causal=False),
    "sequences": replace(SMALL, intervals=True, causal=False, queries=70, keys=70),
}  # fmt: skip


@pytest.mark.parametrize("about", PROBLEMS)
def test_the_forward_is_exact(about: str) -> None:
    problem = PROBLEMS[about]
    torch.manual_seed(0)
    inputs, tensors = problem.inputs(), problem.score_tensors()

    def defined(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return definition.attention(*inputs, problem.spec, tensors)

    ours = fastattn.attention(*inputs, **problem.arguments(tensors), return_lse=True, backend="triton")
    for a, exact, eager in zip(ours, defined(*(t.double() for t in inputs)), defined(*inputs), strict=True):
        assert_as_exact_as_eager(a, exact, eager.to(a.dtype))


def test_values_may_be_a_view_of_the_keys() -> None:
    q, k, _ = SMALL.inputs()
    view, copied = (
        fastattn.attention(q, k, v, causal=True, backend="triton") for v in (k[..., :24], k[..., :24].clone())
    )
    assert torch.equal(view, copied)


@pytest.mark.parametrize(("width", "value_width"), [(641, 64), (576, 513), (576, 7)])
def test_other_widths_are_refused_in_words(width: int, value_width: int) -> None:
    q, _, v = replace(SMALL, width=width, value_width=value_width, key_heads=2).inputs()
    with pytest.raises(ValueError, match=r"backend 'triton' cannot compute .*\(forward\): no head widths below 8"):
        fastattn.attention(q, q, v[:, :, : q.shape[2]], backend="triton")


def test_gradients_are_portable_s_and_the_kernels_refuse_them_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (t.requires_grad_() for t in SMALL.inputs())
    out = fastattn.attention(q, k, v, causal=True, backend="triton")
    with pytest.raises(ValueError, match=r"\(backward\): no queries and keys of 513 to 640 columns"):
        out.sum().backward()
    monkeypatch.setattr(capabilities.backends, "proven", lambda *_: True)
    monkeypatch.setattr(capabilities.backends, "proven_for", lambda *_: True)
    request = Request("attention", AttentionSpec(causal=True), (q, k, v))
    assert capabilities.choose(request, BACKWARD) == "portable"
    assert capabilities.choose(request, FORWARD) == "triton"
    # So the kernels' forward meets the portable backward.
    with without_plans():
        ours = torch.autograd.grad(fastattn.attention(q, k, v, causal=True).sum(), (q, k, v))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(
        definition.attention(*exact, AttentionSpec(causal=True, scale=520**-0.5))[0].sum(), exact
    )
    for a, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiles_of_the_gpu(dtype: torch.dtype) -> None:
    assert ON_GPU and DEVICE == "cuda"
    problem = replace(ABSORBED, heads=16, queries=1023, keys=1024, dtype=dtype)
    inputs = problem.inputs()
    ours, _ = fastattn.attention(*inputs, causal=True, return_lse=True, backend="triton")
    exact, eager = (
        definition.attention(*(t.to(d) for t in inputs), problem.spec)[0] for d in (torch.float64, dtype)
    )
    assert_as_exact_as_eager(ours, exact, eager)
