"""Rows that begin with the same tokens get what they would get with these tokens in a cache of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hardware import DEVICE
from tolerance import assert_as_exact_as_eager
from torch import Tensor

import fastattn
from fastattn.core.attention import definition
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors

LENGTHS, PREFIX, NEW = (5, 0, 9), 11, 2


def given(dtype: torch.dtype = torch.float32, value_width: int = 8) -> dict[str, Any]:
    torch.manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    return {
        "q": randn(3, 4, NEW, 16), "k_prefix": randn(2, PREFIX, 16), "v_prefix": randn(2, PREFIX, value_width),
        "k_cache": randn(3, 2, 16, 16), "v_cache": randn(3, 2, 16, value_width), "k": randn(3, 2, NEW, 16),
        "v": randn(3, 2, NEW, value_width), "cache_lengths": torch.tensor(LENGTHS, device=DEVICE),
    }  # fmt: skip


def expected(t: dict[str, Any], dtype: torch.dtype, **options: Any) -> tuple[Tensor, ...]:
    """Each row with the prefix and its own keys together."""
    outs = []
    for b, length in enumerate(LENGTHS):
        k, v = (
            torch.cat((t[f"{name}_prefix"], t[f"{name}_cache"][b, :, :length], t[name][b]), 1)[None].to(dtype)
            for name in "kv"
        )
        sinks = options.get("sinks")
        work = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = ScoreTensors(sinks=None if sinks is None else sinks.to(work)[None])
        spec = AttentionSpec(True, options.get("scale", 0.25), softcap=options.get("softcap", 0.0))
        outs.append(definition.attention(t["q"][b : b + 1].to(dtype), k, v, spec, tensors))
    return tuple(torch.cat(parts) for parts in zip(*outs, strict=True))


OPTIONS = {
    "plain": {},
    "soft cap and scale": {"softcap": 2.0, "scale": 0.4},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 0.0, 2.0], device=DEVICE)},
}


@pytest.mark.parametrize("backend", ["triton", "portable", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_prefix_counts_once_for_every_row(name: str, backend: str) -> None:
    options = OPTIONS[name]
    for dtype in (torch.float32, torch.float16):
        t = given(dtype)
        found = fastattn.attention_with_shared_prefix(**t, **options, return_lse=True, backend=backend)
        t = given(dtype)
        exact, eager = expected(t, torch.float64, **options), expected(t, dtype, **options)
        for one, right, plain in zip(found, exact, eager, strict=True):
            assert_as_exact_as_eager(one, right, plain)


def test_own_tokens_may_lie_in_pages() -> None:
    table = torch.randperm(12, device=DEVICE).view(3, 4)
    whole, t = fastattn.attention_with_shared_prefix(**given()), given()
    for name in ("k_cache", "v_cache"):
        pages = torch.zeros(12, 2, 4, t[name].shape[3], device=DEVICE)
        pages[table] = t[name].unflatten(2, (4, 4)).transpose(1, 2)
        t[name] = pages
    torch.testing.assert_close(fastattn.attention_with_shared_prefix(**t, block_table=table), whole)


def test_own_tokens_may_be_quantised() -> None:
    t = given()
    t |= {f"{name}_cache": (t[f"{name}_cache"] * 40).to(torch.int8) for name in "kv"}
    scales = {f"{name}_scale": torch.rand(3, 2, 16, device=DEVICE) * 0.05 for name in "kv"}
    found = fastattn.attention_with_shared_prefix(**t, **scales)
    for name in "kv":
        t[f"{name}_cache"] = t[f"{name}_cache"] * scales[f"{name}_scale"][..., None]
        del t[name]
    t["cache_lengths"] = t["cache_lengths"] + NEW
    torch.testing.assert_close(found, fastattn.attention_with_shared_prefix(**t))


@pytest.mark.parametrize("of", ["tokens", "heads"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_prefix_may_be_quantised(dtype: torch.dtype, of: str) -> None:
    t = given()
    scales = {
        f"{name}_prefix_scale": torch.rand((2, PREFIX) if of == "tokens" else (2,), device=DEVICE) * 0.05
        for name in "kv"
    }
    t |= {f"{name}_prefix": (t[f"{name}_prefix"] * 40).to(dtype) for name in "kv"}
    found = fastattn.attention_with_shared_prefix(**t, **scales, return_lse=True)
    for name in "kv":
        scale = scales[f"{name}_prefix_scale"]
        t[f"{name}_prefix"] = t[f"{name}_prefix"].float() * (
            scale[..., None] if of == "tokens" else scale[:, None, None]
        )
    torch.testing.assert_close(found, fastattn.attention_with_shared_prefix(**t, return_lse=True))


def test_an_empty_prefix_changes_nothing() -> None:
    t, alone = given(), given()
    for name in ("k_prefix", "v_prefix"):
        t[name] = t[name][:, :0]
        del alone[name]
    torch.testing.assert_close(fastattn.attention_with_shared_prefix(**t), fastattn.attention_with_cache(**alone))


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"k_prefix": torch.zeros(2, 3, 8)}, r"k_prefix must have shape \(2, prefix, 16\), got \(2, 3, 8\)"),
        ({"v_prefix": torch.zeros(2, 3, 8)}, "v_prefix must have k_prefix's length 11, got 3"),
        ({"k_prefix": torch.zeros(2, 11, 16, dtype=torch.int8)}, "k_prefix_scale must be given for a k_prefix of"),
        ({"v_prefix_scale": torch.zeros(2)}, "v_prefix_scale must be None beside a v_prefix of torch.float32"),
        (
            {"k_prefix": torch.zeros(2, 11, 16, dtype=torch.int8), "k_prefix_scale": torch.zeros(2, 3)},
            r"k_prefix_scale must have shape \(2, 11\) or \(2,\), got \(2, 3\)",
        ),
        ({"v_cache": None}, "v_cache must be a tensor beside a prefix"),
        ({"cache_lengths": 15}, "cache_lengths must be at most 14"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"k_prefix": torch.zeros(2, 11, 16, requires_grad=True)}, "shared_prefix computes no gradients"),
    ],
)
def test_bad_input_is_named_and_the_cache_is_not_touched(changed: dict[str, Any], words: str) -> None:
    t = given()
    before = t["k_cache"].clone()
    with pytest.raises(ValueError, match=words):
        fastattn.attention_with_shared_prefix(**(t | changed))
    assert torch.equal(t["k_cache"], before)
