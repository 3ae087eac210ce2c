"""On a CPU PyTorch's own flash attention computes masked calls too, by our definition and in no more memory."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from attention_problems import Problem, check, implementation, strategies_of, without_plans
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn.core.attention import tiles, torch_flash
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors

HIDDEN = float("-inf")


@pytest.fixture(autouse=True)
def on_a_cpu() -> None:
    """Only on a CPU: CUDA's operator takes no mask."""
    if torch.empty(0).device.type != "cpu":
        pytest.skip("this is about the operator for CPUs")


def torch_computes(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """`serves`, which must say yes: else the test would test nothing."""
    served = serves(q, k, v, spec, tensors)
    assert served
    return served


serves = torch_flash.serves
masked_problems = st.builds(
    Problem,
    heads=st.just(4),
    key_heads=st.sampled_from([2, 4]),
    width=st.just(16),
    window=st.tuples(st.none() | st.integers(30, 40), st.none() | st.integers(0, 40)),
    masked=st.just(True),
    **strategies_of("batch", "queries", "keys", "causal", "dtype", "layout", "lengths", "alibi", "bias"),
)


@given(masked_problems)
@settings(max_examples=60)
def test_a_masked_call_is_computed_by_torchs_kernel_as_exactly_as_by_eager(problem: Problem) -> None:
    with without_plans(), mock.patch.object(torch_flash, "serves", torch_computes):
        check(problem, "portable")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.float32, torch.float64])
def test_a_bias_of_any_dtype_without_gradient_gives_what_the_tiles_give(
    bias_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    q, k, v = (t.requires_grad_() for t in Problem(batch=2, queries=33, keys=47, dtype=dtype).inputs())
    bias = torch.randn(47, 33).to(bias_dtype).t()
    results = []
    for name in ("portable", "tiled"):
        with implementation(name) as backend:
            out = fastattn.attention(q, k, v, bias=bias, backend=backend)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    tolerance = {torch.float16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    for ours, tiled in zip(*results, strict=True):
        torch.testing.assert_close(ours, tiled, rtol=0, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 40), (40, 40), (2, 2, 40, 40), (40, 1)])
def test_rows_that_see_nothing_are_told_from_rows_whose_log_sum_exp_is_zero(shape: tuple, causal: bool) -> None:
    q, k, v = (torch.zeros(2, 2, 40, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8))
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    # Scores are all zero: rows that see one key have a log-sum-exp of zero as well.
    seen = torch.zeros(shape, dtype=torch.bool)
    seen[..., -1:, 5 if shape[-1] > 1 else 0] = True
    whole = seen.expand(2, 2, 40, 40) & (torch.ones(40, 40).tril().bool() if causal else True)
    sees = whole.any(-1)
    out, lse = fastattn.attention(q, k, v, bias=seen, causal=causal, return_lse=True, backend="portable")
    expected = torch.where(sees, whole.sum(-1).double().log(), HIDDEN).float()
    torch.testing.assert_close(lse, expected, rtol=1e-6, atol=1e-6)
    assert not out[~sees].any() and out[sees].any(-1).all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in gradients) and not gradients[0][~sees].any()


def test_a_bias_that_is_merely_low_hides_nothing() -> None:
    q, k, v = Problem(queries=9, keys=9).inputs()
    low = torch.zeros(9, 9).masked_fill(torch.arange(9)[:, None] < 4, torch.finfo(torch.float32).min)
    out, lse = fastattn.attention(q, k, v, bias=low, return_lse=True, backend="portable")
    torch.testing.assert_close(out[:, :, :4], v.mean(2, keepdim=True).expand(-1, -1, 4, -1))
    assert torch.isfinite(lse).all()


def mask_of(keys: int, queries: int | None = None, batch: int = 1, **options) -> Tensor | None:
    """The mask that torch's kernel gets; False if that kernel is not called."""
    spec = AttentionSpec(window=options.pop("window", (None, None)), causal=options.pop("causal", False))
    q, k = torch.empty(batch, 2, queries or keys, 16), torch.empty(batch, 2, keys, 16)
    tensors = ScoreTensors(**options)
    if not serves(q, k, k, spec, tensors):
        return False
    return torch_flash._mask(q, k, spec, tensors, torch_flash._keys_seen(q, k, spec, tensors))


def test_the_mask_has_no_more_elements_than_what_was_given_or_than_a_tile_of_scores() -> None:
    lengths = torch.tensor([5000, 9000], dtype=torch.int32)
    assert mask_of(9000, batch=2, causal=True) is None
    # Each batch entry is a call of its own, with its own keys.
    assert mask_of(9000, batch=2, causal=True, key_lengths=lengths) is None
    padding = (torch.arange(9000) < 7000)[None, None, None]
    assert mask_of(9000, bias=padding).shape == (1, 1, 1, 9000)
    assert mask_of(9000, bias=padding.expand(1, 2, 9000, 9000)).shape == (1, 1, 1, 9000)
    # The window alone would be 9000 x 9000.
    assert mask_of(9000, window=(6000, 6000)) is False
    assert mask_of(9000, window=(None, 0), queries=8000) is False
    assert mask_of(9000, batch=2, bias=torch.ones(1, 1, 9000, 1), key_lengths=lengths).shape == (1, 1, 9000, 1)
    assert mask_of(400, batch=4, alibi_slopes=torch.ones(4, 2)) is False
    most = tiles.QUERY_TILE * tiles.KEY_TILE * 2
    assert mask_of(512, window=(300, 300)).numel() <= most
    assert mask_of(256, alibi_slopes=torch.ones(1, 2)).numel() <= most


def test_windows_that_leave_out_most_tiles_are_left_to_the_tiles() -> None:
    assert mask_of(512, batch=4, causal=True, window=(31, None)) is not False
    assert mask_of(1024, batch=4, causal=True, window=(31, None)) is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_its_backward_computes_all_but_float16_and_what_has_a_gradient_beside(dtype: torch.dtype) -> None:
    q, k, v = (t.requires_grad_() for t in Problem(queries=33, keys=33, dtype=dtype).inputs())
    mask, bias = torch.rand(33, 33) < 0.5, torch.randn(33, 33, requires_grad=True)
    with without_plans(), mock.patch.object(torch_flash, "backward", wraps=torch_flash.backward) as backward:
        fastattn.attention(q, k, v, causal=True, backend="portable").sum().backward()
        fastattn.attention(q, k, v, bias=mask, backend="portable").sum().backward()
        assert backward.call_count == (0 if dtype == torch.float16 else 2)
        backward.reset_mock()
        fastattn.attention(q, k, v, bias=bias, backend="portable").sum().backward()
        assert not backward.called and bias.grad.any()


@pytest.mark.parametrize("heads, key_heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("length", [65, 128, 300])
@pytest.mark.parametrize("hidden", [slice(0, 0), slice(0, 64), slice(150, 200)], ids=str)
def test_two_calls_that_are_merged_are_the_causal_one(
    length: int, heads: int, key_heads: int, hidden: slice
) -> None:
    """Where the scores of all keys before a square, or of all within one, are -inf, its log-sum-exp is 0 there."""
    q = torch.rand(1, length, heads, 32).transpose(1, 2)
    k, v = torch.randn(1, key_heads, length, 32), torch.randn(1, key_heads, length, 32)
    k[:, :, hidden] = -3e38
    out, lse = torch_flash.causal_in_parts(q, k, v, 3.0)
    scores = 3.0 * q.double() @ k.double().repeat_interleave(heads // key_heads, 1).mT
    after = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(after | (scores < -3.4e38), HIDDEN)
    some = ~(scores == HIDDEN).all(-1)
    expected = scores.softmax(-1) @ v.repeat_interleave(heads // key_heads, 1).double()
    torch.testing.assert_close(out[some], expected[some].float())
    torch.testing.assert_close(lse[some], scores.logsumexp(-1)[some].float())


@pytest.mark.parametrize("gradient", [False, True])
def test_a_prompt_is_computed_in_two_parts_where_that_takes_less_time(gradient: bool) -> None:
    q = torch.randn(1, 8, 400, 16, requires_grad=gradient)
    k, v = torch.randn(2, 1, 4, 400, 16)
    with (
        without_plans(),
        mock.patch.object(torch, "get_num_threads", return_value=1),
        mock.patch.object(torch_flash, "causal_in_parts", wraps=torch_flash.causal_in_parts) as in_parts,
    ):
        out = fastattn.attention(q, k, v, causal=True)
        fastattn.attention(q.expand(2, -1, -1, -1), *(t.expand(2, -1, -1, -1) for t in (k, v)), causal=True)
        fastattn.attention(q[:, :, :200], k[:, :, :200], v[:, :, :200], causal=True)
        fastattn.attention(q, k, v)
    assert in_parts.call_count == 1
    torch.testing.assert_close(
        out, torch.nn.functional.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True)
    )
