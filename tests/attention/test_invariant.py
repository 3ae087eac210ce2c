"""Under `invariant` the bits of a row depend on that row alone: in whatever company, and however it is computed.

Each sequence is computed alone, by `attention`. Every other way must give the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hardware import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_alone import rows_alone
from tolerance import assert_as_exact_as_eager
from torch import Tensor

import fastattn
from fastattn import attention, attention_varlen, attention_with_cache, masks
from fastattn.core import invariance, plans
from fastattn.core.attention import definition, invariant, invariant_flash
from fastattn.core.attention.functional import scores_asked
from fastattn.core.attention.spec import AttentionSpec
from fastattn.kernels import invariant as kernels
from fastattn.kernels import invariant_backward as backward
from fastattn.kernels import launch

NAN = float("nan")
PAGE = 16


@dataclass(frozen=True)
class Problem:
    """Sequences of these lengths, self-attention."""

    lengths: tuple[int, ...] = (37, 1, 300, 256)
    heads: int = 4
    key_heads: int = 2
    width: int = 24
    value_width: int = 16
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    seed: int = 0
    backend: str = "portable"

    def sequences(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q, k and v of each, (1, heads, length, width)."""
        generator = torch.Generator().manual_seed(self.seed)

        def drawn(heads: int, length: int, width: int) -> Tensor:
            t = torch.randn(1, heads, length, width, generator=generator)
            return t.to(DEVICE, self.dtype)

        sizes = (self.heads, self.width), (self.key_heads, self.width), (self.key_heads, self.value_width)
        return [tuple(drawn(h, n, w) for h, w in sizes) for n in self.lengths]  # type: ignore[misc]

    @property
    def options(self) -> dict[str, Any]:
        by_head = torch.linspace(0.1, 0.9, self.heads, device=DEVICE)
        return {
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "alibi_slopes": by_head if self.alibi else None,
            "sinks": by_head if self.sinks else None,
            "return_lse": True,
            "invariant": True,
            "backend": self.backend,
        }

    def alone(self) -> list[tuple[Tensor, Tensor]]:
        return [attention(*sequence, **self.options) for sequence in self.sequences()]

    @property
    def starts(self) -> Tensor:
        return torch.tensor((0, *self.lengths), device=DEVICE).cumsum(0)


LENGTHS = st.sampled_from((1, 2, 5, 15, 16, 17, 33, 70, 255, 256, 257, 300))
PROBLEMS = st.builds(
    Problem,
    lengths=st.lists(LENGTHS, min_size=1, max_size=4).map(tuple),
    key_heads=st.sampled_from((1, 2, 4)),
    width=st.sampled_from((8, 24, 64)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    causal=st.booleans(),
    window=st.sampled_from((None, (0, 0), (7, None), (40, 3), (200, None))),
    softcap=st.sampled_from((0.0, 0.0, 2.0)),
    alibi=st.booleans(),
    sinks=st.booleans(),
    seed=st.integers(0, 100),
)


# In the interpreter: few programs, sequences of a few tiles of 16 keys, and splits of 32 keys instead of 1024.
IN_KERNELS = (
    Problem((33, 2, 40), heads=2, key_heads=1, backend="triton"),
    Problem((40, 17), heads=2, key_heads=2, window=(20, 3), dtype=torch.float16, sinks=True, backend="triton"),
    Problem((17, 40), heads=1, key_heads=1, causal=False, softcap=2.0, alibi=True, backend="triton"),
)


@pytest.fixture(autouse=True, scope="module")
def _short_splits() -> Iterator[None]:
    with mock.patch.object(kernels, "SPLIT", kernels.SPLIT if DEVICE == "cuda" else 32):
        yield


@pytest.fixture(autouse=True, scope="module")
def _rows_alone() -> Iterator[None]:
    with rows_alone():
        yield


def assert_same(found: tuple[Tensor, Tensor], alone: tuple[Tensor, Tensor], what: str) -> None:
    for name, a, b in zip(("out", "lse"), found, alone, strict=True):
        assert torch.equal(a, b), f"{what}: {name} differs by {(a - b).abs().max()}"


def packed(sequences: list[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """q, k and v one after another, (1, heads, tokens, width)."""
    return (torch.cat(parts, 2) for parts in zip(*sequences, strict=True))


def padded(sequences: list[tuple[Tensor, ...]], fill: float, left: bool = False) -> Iterator[Tensor]:
    """q, k and v as a batch, with `fill` behind them, or before."""
    longest = max(q.shape[2] for q, *_ in sequences)
    for parts in zip(*sequences, strict=True):
        rows = []
        for t in parts:
            beside = t.new_full((*t.shape[:2], longest - t.shape[2], t.shape[3]), fill)
            rows.append(torch.cat((beside, t) if left else (t, beside), 2))
        yield torch.cat(rows)


def paged(t: Tensor, order: Tensor) -> Tensor:
    """Keys (1, Hkv, length, width) as pages (pages, Hkv, PAGE, width); page i lies at order[i]."""
    pages = torch.full((len(order), t.shape[1], PAGE, t.shape[3]), NAN, dtype=t.dtype, device=t.device)
    for i, part in enumerate(t[0].split(PAGE, 1)):
        pages[order[i], :, : part.shape[1]] = part
    return pages


@settings(max_examples=10)
@given(PROBLEMS)
def test_a_packed_sequence_has_the_bits_of_one_alone(p: Problem) -> None:
    q, k, v = packed(p.sequences())
    options = {**p.options, "alibi_slopes": None}
    alone = replace(p, alibi=False).alone()
    varlen = attention_varlen(*(t[0].transpose(0, 1) for t in (q, k, v)), p.starts, p.starts, **options)
    ids = torch.arange(len(p.lengths)).repeat_interleave(torch.tensor(p.lengths)).to(DEVICE)
    documents = attention(q, k, v, mask=masks.documents(ids), **options)
    for i, expected in enumerate(alone):
        here = slice(int(p.starts[i]), int(p.starts[i + 1]))
        assert_same((varlen[0][here].transpose(0, 1)[None], varlen[1][None, :, here]), expected, "varlen")
        assert_same((documents[0][:, :, here], documents[1][:, :, here]), expected, "documents")


@pytest.mark.parametrize("p", IN_KERNELS, ids=("plain", "window", "shaped"))
def test_a_packed_sequence_in_kernels_has_the_bits_of_one_alone(p: Problem) -> None:
    test_a_packed_sequence_has_the_bits_of_one_alone.hypothesis.inner_test(p)


@settings(max_examples=8)
@given(PROBLEMS)
def test_a_padded_sequence_has_the_bits_of_one_alone(p: Problem) -> None:
    sequences = p.sequences()
    lengths = torch.tensor(p.lengths, device=DEVICE)
    right = attention(*padded(sequences, 3.0), key_lengths=lengths, **p.options)
    q, k, v = padded(sequences, NAN, left=True)
    longest = q.shape[2]
    left = attention_with_cache(q, k, v, cache_lengths=longest, cache_starts=longest - lengths, **p.options)
    for i, expected in enumerate(p.alone()):
        n = p.lengths[i]
        assert_same((right[0][i, None, :, :n], right[1][i, None, :, :n]), expected, "right")
        assert_same((left[0][i, None, :, -n:], left[1][i, None, :, -n:]), expected, "left")


@pytest.mark.parametrize("p", IN_KERNELS, ids=("plain", "window", "shaped"))
def test_a_padded_sequence_in_kernels_has_the_bits_of_one_alone(p: Problem) -> None:
    test_a_padded_sequence_has_the_bits_of_one_alone.hypothesis.inner_test(p)


@settings(max_examples=8)
@given(PROBLEMS, st.sampled_from((1, 3, 16, 100)), st.data())
def test_chunks_and_single_tokens_from_a_cache_have_the_bits_of_the_whole(
    p: Problem, size: int, data: st.DataObject
) -> None:
    check_chunks(p, size, [data.draw(st.integers(1, length)) for length in p.lengths])


@pytest.mark.parametrize("p", IN_KERNELS[:2], ids=("plain", "window"))
def test_chunks_and_single_tokens_in_kernels_have_the_bits_of_the_whole(p: Problem) -> None:
    check_chunks(replace(p, lengths=(70,)), 1, [70])
    check_chunks(replace(p, lengths=(70,)), 3, [35])


def check_chunks(p: Problem, size: int, ends: list[int]) -> None:
    """In pages or not, and in the company of other rows."""
    p = replace(p, window=None if p.window is None else (p.window[0], None), causal=True)
    sequences, alone = p.sequences(), p.alone()
    for (q, k, v), (out, lse), last in zip(sequences, alone, ends, strict=True):
        first = max(0, last - size)
        chunk = q[:, :, first:last]
        here = out[:, :, first:last], lse[:, :, first:last]
        assert_same(attention(chunk, k[:, :, :last], v[:, :, :last], **p.options), here, "a chunk")
        rows = [t.repeat(2, 1, 1, 1) for t in (chunk, k, v)]
        rows[1][1, :, max(0, last - 3) :] = 9.0
        lengths = torch.tensor((last, max(last - 3, 0)), device=DEVICE)
        found = attention_with_cache(*rows, cache_lengths=lengths, **p.options)
        assert_same((found[0][:1], found[1][:1]), here, "a cache")
        order = torch.randperm(-(-q.shape[2] // PAGE) + 1)
        pages = (paged(t, order) for t in (k, v))
        table = order[None].to(DEVICE)
        found = attention_with_cache(chunk, *pages, cache_lengths=last, block_table=table, **p.options)
        assert_same(found, here, "pages")


@pytest.mark.parametrize("key_heads", [1, 4])
def test_many_keys_read_where_they_lie_have_the_bits_of_the_whole(key_heads: int) -> None:
    """Few queries take several tiles of keys at a time: 16, 4 and 1. Keys of a cache, and packed ones, are no
    copies."""
    p = Problem((5500,), heads=4, key_heads=key_heads, width=16)
    q, k, v = p.sequences()[0]
    last = q[:, :, -40:]
    expected = attention(last, k, v, **p.options)
    first = attention(last, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)), **p.options)
    assert_same(first, expected, "heads beside each other")
    wide = torch.randn(1, key_heads, 5600, 17, device=DEVICE)
    wide[:, :, :5500, 1:] = k
    assert_same(attention(last, wide[:, :, :5500, 1:], v, **p.options), expected, "between multiples of 64 bytes")
    for i, n in ((40, 5500), (39, 5499), (7, 5467)):
        here = expected[0][:, :, i - 1 : i], expected[1][:, :, i - 1 : i]
        found = attention_with_cache(last[:, :, i - 1 : i], k, v, cache_lengths=n, **p.options)
        assert_same(found, here, f"one of {n} keys")
        found = attention_with_cache(last[:, :, i - 3 : i], k, v, cache_lengths=n, **p.options)
        assert_same((found[0][:, :, 2:], found[1][:, :, 2:]), here, f"the last of three, {n} keys")


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU always takes one size")
@pytest.mark.parametrize("threads", [1, 2, 3, 5, 6, 24])
@pytest.mark.parametrize("heads", [4, 10, 12])
def test_no_thread_is_left_a_remainder_of_its_vectors_in_any_tile(heads: int, threads: int) -> None:
    """PyTorch computes it with other last bits."""
    for size in invariant._possible_sizes(heads, 2, threads)[::2]:
        for tiles in size.tiles:
            elements = heads * size.queries * tiles * invariant.KEY_TILE
            each = -(-elements // min(threads, max(1, elements // 32768)))
            assert all(min(each, elements - begin) % 64 == 0 for begin in range(0, elements, each))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU always takes one size")
def test_where_sizes_do_not_agree_all_queries_take_tiles_of_one_size() -> None:
    q = torch.randn(1, 4, 200, 16)
    assert len({invariant._sizes(q, q, q, n) for n in (1, 17, 200)}) == 3
    with mock.patch.object(invariant, "_agree", lambda *_: False):
        assert {invariant._sizes(q, q, q, n) for n in (1, 17, 200)} == {invariant.ONE_SIZE}


@pytest.mark.parametrize("right", [None, 0, 3])
@pytest.mark.parametrize("left", [None, 0, 5, 300])
def test_queries_that_see_the_first_key_are_run_by_the_tiles_that_they_see(
    left: int | None, right: int | None
) -> None:
    for queries, keys, shift in itertools.product(
        (1, 7, 256, 600), (0, 1, 255, 256, 257, 700), (-300, 0, 1, 255, 500)
    ):
        diagonal = torch.arange(queries) + shift
        start = (diagonal - left if left is not None else torch.zeros_like(diagonal)).clamp(0, keys)
        stop = (diagonal + right + 1 if right is not None else torch.full_like(diagonal, keys)).clamp(0, keys)
        expected = [
            None if first > 0 else (last - 1) // invariant_flash.TILE
            for first, last in zip(start.tolist(), stop.tolist(), strict=True)
        ]
        spec = AttentionSpec(window=(left, right), causal=False)
        for runs in (
            invariant_flash.runs(queries, keys, shift, spec),
            invariant_flash.runs_of(torch.stack((start, stop))),
        ):
            runs = list(runs)
            assert [run.rows.start for run in runs] == [0, *(run.rows.stop for run in runs)][:-1]
            found = [run.tiles for run in runs for _ in range(run.rows.start, run.rows.stop)]
            # Where nothing is seen, it does not matter why.
            assert [f for f, a, b in zip(found, start, stop, strict=True) if a < b] == [
                e for e, a, b in zip(expected, start, stop, strict=True) if a < b
            ]
            assert len(found) == queries


@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_that_hides_the_last_keys_has_the_bits_of_their_absence(causal: bool) -> None:
    """One that hides others, too, has the same bits in the rows that do not reach them."""
    p = Problem((300,), causal=causal, value_width=24)
    q, k, v = p.sequences()[0]
    seen = torch.arange(300, device=DEVICE) < 270
    options = {**p.options, "causal": False}
    expected = attention(q, k[:, :, :270], v[:, :, :270], **options)
    for bias in (seen.expand(1, 1, 300, 300), seen.expand(1, 4, 1, 300)):
        assert_same(attention(q, k, v, bias=bias, **options), expected, "a bias")
    whole = attention(q, k, v, **p.options)
    holes = torch.rand(300, 300, device=DEVICE).tril_() < 0.9
    holes[:280] = True
    found = attention(q, k, v, bias=holes[None, None].expand(1, 4, -1, -1), **p.options)
    assert_same((found[0][:, :, :280], found[1][:, :, :280]), (whole[0][:, :, :280], whole[1][:, :, :280]), "rows")
    exact = attention(
        q.double(), k.double(), v.double(), bias=holes[None, None], **{**p.options, "invariant": False}
    )
    torch.testing.assert_close(found[0].double(), exact[0], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="PyTorch's flash attention for CPUs")
def test_where_rows_do_not_agree_pytorch_s_operator_computes_none() -> None:
    q, k, v = Problem((300,)).sequences()[0]
    k = torch.cat((k, v), 3)[..., :16]
    q, (mine, flash) = q[..., :16], (invariant_flash._agrees, invariant_flash._flash)

    def of_few_rows_differs(q: Tensor, *rest: Any, **options: Any) -> Any:
        out, lse = flash(q, *rest, **options)
        return out * (1 + 1e-6 * (q.shape[2] < 8)), lse

    whole = attention(q, k, v, causal=True, invariant=True)
    assert mine(16, torch.float32, 1, "highest")
    with mock.patch.object(invariant_flash, "_flash", of_few_rows_differs):
        assert not mine.__wrapped__(16, torch.float32, 1, "highest")
    with mock.patch.object(invariant_flash, "_agrees", lambda *_: False):
        in_tiles = attention(q, k, v, causal=True, invariant=True)
        assert torch.equal(attention(q[:, :, 290:], k, v, causal=True, invariant=True), in_tiles[:, :, 290:])
    assert not torch.equal(whole, in_tiles) and torch.allclose(whole, in_tiles, atol=1e-5)


@settings(max_examples=6)
@given(PROBLEMS)
def test_gradients_of_a_packed_sequence_have_the_bits_of_those_of_one_alone(p: Problem) -> None:
    check_gradients(replace(p, alibi=False))


@pytest.mark.parametrize("p", IN_KERNELS, ids=("plain", "window", "shaped"))
def test_gradients_in_kernels_have_the_bits_of_those_of_one_alone(p: Problem) -> None:
    # The second one has a tile of queries that sees a tile of keys whole.
    check_gradients(replace(p, lengths=(9, 70), alibi=False))


@pytest.mark.skipif(DEVICE == "cuda", reason="which masks a GPU takes is in the launch table")
@pytest.mark.parametrize("window", [None, (70, 3)])
def test_masks_of_bits_show_what_comparisons_show(window: tuple[int, int] | None) -> None:
    p = Problem((130,), heads=1, key_heads=1, causal=window is None, window=window, backend="triton")

    def results() -> tuple[Tensor, ...]:
        (sequence,) = [tuple(t.requires_grad_() for t in parts) for parts in p.sequences()]
        out, lse = attention(*sequence, **p.options)
        return out, lse, *torch.autograd.grad(out.sum() + lse.sum(), sequence)

    # Two words for a tile's columns.
    wide = {launch.INTERPRETER: (launch.Row(8, 256, launch.Tiling(32, 64, 4, 1)),)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels, "SPLIT", 128))
        stack.enter_context(mock.patch.dict(kernels.INVARIANT, wide))
        stack.enter_context(mock.patch.dict(backward.INVARIANT_DQ, wide))
        expected = results()
        stack.enter_context(mock.patch.object(kernels, "MASKS_OF_BITS", {launch.INTERPRETER}))
        for found, same in zip(results(), expected, strict=True):
            assert torch.equal(found, same)


def check_gradients(p: Problem) -> None:
    """Of a sequence alone, packed and padded."""
    sequences = [tuple(t.requires_grad_() for t in parts) for parts in p.sequences()]
    upstream = [(torch.randn_like(out), torch.randn_like(lse)) for out, lse in p.alone()]
    everything = [t.detach().requires_grad_() for t in packed(sequences)]
    out, lse = attention_varlen(*(t[0].transpose(0, 1) for t in everything), p.starts, p.starts, **p.options)
    dout, dlse = (torch.cat(parts, 2) for parts in zip(*upstream, strict=True))
    together = torch.autograd.grad((out, lse), everything, (dout[0].transpose(0, 1), dlse[0]))
    batch = [t.detach().requires_grad_() for t in padded(sequences, 0.0)]
    lengths = torch.tensor(p.lengths, device=DEVICE)
    beside = attention(*batch, key_lengths=lengths, **p.options)
    upward = padded([(dout, dlse[..., None]) for dout, dlse in upstream], 0.0)
    dout, dlse = next(upward), next(upward)[..., 0]
    in_a_batch = torch.autograd.grad(beside, batch, (dout, dlse))
    for i, sequence in enumerate(sequences):
        expected = torch.autograd.grad(attention(*sequence, **p.options), sequence, upstream[i])
        here = slice(int(p.starts[i]), int(p.starts[i + 1]))
        for name, a, b, c in zip("qkv", together, in_a_batch, expected, strict=True):
            assert torch.equal(a[:, :, here], c), f"d{name} of sequence {i}, packed"
            assert torch.equal(b[i, None, :, : p.lengths[i]], c), f"d{name} of sequence {i}, padded"


@settings(max_examples=8)
@given(PROBLEMS, st.sampled_from("qkv"), st.data())
def test_nan_in_one_sequence_reaches_no_other_forward_or_backward(
    p: Problem, where: str, data: st.DataObject
) -> None:
    p = replace(p, lengths=(*p.lengths, 9), alibi=False)
    sequences = p.sequences()
    sick = data.draw(st.integers(0, len(sequences) - 1))
    place = data.draw(st.integers(0, p.lengths[sick] - 1))
    sequences[sick]["qkv".index(where)][:, :, place] = NAN
    inputs = [t.requires_grad_() for t in packed(sequences)]
    out, lse = attention_varlen(*(t[0].transpose(0, 1) for t in inputs), p.starts, p.starts, **p.options)
    healthy = torch.ones(len(out), dtype=torch.bool, device=DEVICE)
    healthy[int(p.starts[sick]) : int(p.starts[sick + 1])] = False
    assert out[~healthy].isnan().any()
    assert out[healthy].isfinite().all() and lse[:, healthy].isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert gradient[:, :, healthy].isfinite().all()


@settings(max_examples=10)
@given(PROBLEMS)
def test_it_computes_what_attention_computes(p: Problem) -> None:
    q, k, v = padded(p.sequences(), 0.0)
    options = {**p.options, "key_lengths": torch.tensor(p.lengths, device=DEVICE)}
    found = attention(q, k, v, **options)
    asked = {name: value for name, value in options.items() if name not in ("return_lse", "invariant", "backend")}
    scaled, spec, tensors = scores_asked(q, k, **asked)
    exact = [t.double() if t.is_floating_point() else t for t in (scaled, k, v)]
    in_double = type(tensors)(*(t.double() if t is not None and t.is_floating_point() else t for t in tensors))
    eager, double = (
        definition.attention(scaled, k, v, spec, tensors),
        definition.attention(*exact, spec, in_double),
    )
    for actual, precise, rounded in zip(found, double, eager, strict=True):
        seen = double[1].isfinite()
        assert torch.equal(actual[~seen], rounded[~seen])
        assert_as_exact_as_eager(actual[seen], precise[seen], rounded[seen])


@pytest.mark.parametrize("p", IN_KERNELS, ids=("plain", "window", "shaped"))
def test_kernels_compute_what_attention_computes(p: Problem) -> None:
    test_it_computes_what_attention_computes.hypothesis.inner_test(p)


@pytest.mark.parametrize("kind", ["float", "bool", "relative", "scale of heads"])
def test_biases_and_scales_of_heads_keep_the_bits_in_a_batch(kind: str) -> None:
    p = Problem((70, 33, 50))
    q, k, v = (t.requires_grad_() for t in padded(p.sequences(), 0.0))
    rows = q.shape[2]
    full = torch.randn(3, 4, rows, rows, device=DEVICE)
    beside = {
        "float": {"bias": full},
        "bool": {"bias": full > 0},
        "relative": {"relative_bias": torch.randn(3, 4, 21, device=DEVICE)},
        "scale of heads": {"scale": torch.randn(3, 4, device=DEVICE)},
    }[kind]
    name, value = next(iter(beside.items()))
    learned = [value.requires_grad_()] if value.is_floating_point() else []
    out, _ = attention(q, k, v, **p.options, **beside)
    together = torch.autograd.grad(out.sum(), [q, k, v, *learned])
    for b in range(3):
        mine = [t[b : b + 1].detach().requires_grad_() for t in (q, k, v)]
        own = value[b : b + 1].detach().requires_grad_(bool(learned))
        alone, _ = attention(*mine, **p.options, **{name: own})
        assert torch.equal(alone, out[b : b + 1])
        expected = torch.autograd.grad(alone.sum(), [*mine, *([own] if learned else [])])
        assert all(torch.equal(t[b : b + 1], e) for t, e in zip(together, expected, strict=True))


def test_latent_attention_from_a_cache_has_the_bits_of_the_whole() -> None:
    q, k = torch.randn(1, 4, 40, 48, device=DEVICE), torch.randn(1, 1, 40, 48, device=DEVICE)
    with fastattn.invariant():
        whole = attention(q, k, k[..., :32], causal=True)
        for n in (1, 17, 40):
            found = attention_with_cache(q[:, :, n - 1 : n], k, None, cache_lengths=n, value_width=32)
            assert torch.equal(found, whole[:, :, n - 1 : n])


def test_without_it_a_packed_sequence_has_other_bits() -> None:
    """So that the tests above see something."""
    p = Problem()
    q, k, v = (t[0].transpose(0, 1) for t in packed(p.sequences()))
    options = {**p.options, "invariant": False, "return_lse": False}
    found = attention_varlen(q, k, v, p.starts, p.starts, **options)
    alone = [attention(*sequence, **options)[0].transpose(0, 1) for sequence in p.sequences()]
    assert not torch.equal(found, torch.cat(alone))


def test_the_context_asks_for_it_and_the_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans, too, are kept apart."""
    called = []
    forward = invariant.forward

    def counted(*given: Any, **of_a_trial: Any) -> Any:
        called.extend([1] * (not of_a_trial))
        return forward(*given, **of_a_trial)

    monkeypatch.setattr(invariant, "forward", counted)
    q = torch.randn(1, 2, 8, 16, device=DEVICE)

    def asks(**argument: Any) -> bool:
        called.clear()
        attention(q, q, q, backend="portable", **argument)
        attention(q, q, q, backend="portable", **argument)
        return len(called) == 2

    assert not asks()
    with fastattn.invariant():
        assert asks()
        assert not asks(invariant=False)
        with fastattn.invariant(False):
            assert not asks()
        assert asks()
    assert not asks() and asks(invariant=True)


def test_a_thread_of_autograd_inherits_it_after_contexts_of_its_own() -> None:
    found = []

    def inherits() -> None:
        torch._C._stash_obj_in_tls(invariance._KEY, True)  # as torch does for a thread of autograd
        found.append(invariance.wanted())
        with fastattn.invariant(False):
            found.append(invariance.wanted())
        found.append(invariance.wanted())

    with fastattn.invariant():
        pass  # it is looked for once somebody has entered a context
    thread = threading.Thread(target=inherits)
    thread.start()
    thread.join()
    assert found == [True, False, True]


@pytest.mark.parametrize(
    "options", [{"invariant": True}, {"invariant": True, "softcap": 20.0}, {"return_max": True}]
)
def test_sums_keep_float32_under_autocast(options: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 70, 32, device=DEVICE, dtype=torch.bfloat16)
    call = functools.partial(attention, q, q, q, causal=True, return_lse=True, backend="portable", **options)
    expected = call()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True))


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_without_keys_rows_are_zero_and_sinks_have_their_gradient(backend: str) -> None:
    q, k = torch.randn(1, 2, 5, 16, device=DEVICE), torch.randn(1, 2, 0, 16, device=DEVICE)
    sinks = torch.zeros(2, device=DEVICE, requires_grad=True)
    out, lse = attention(q, k, k, sinks=sinks, return_lse=True, invariant=True, backend=backend)
    assert not out.any() and not lse.any()
    (out.sum() + lse.sum()).backward()
    assert torch.equal(sinks.grad, torch.full_like(sinks, 5.0))


def test_the_environment_variable_asks_for_it() -> None:
    code = "from fastattn.core import invariance; print(invariance.wanted())"
    environment = {**os.environ, "FASTATTN_INVARIANT": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "True", found.stderr
    assert not invariance.wanted()


def test_what_cannot_hold_is_refused() -> None:
    q = torch.randn(1, 2, 8, 16, device=DEVICE)
    with fastattn.invariant():
        with pytest.raises(ValueError, match=r"dropout_p must be 0 where a call is invariant, got 0\.5"):
            attention(q, q, q, dropout_p=0.5)
        with pytest.raises(ValueError, match="becomes block lists; give it as a bool bias"):
            attention(q, q, q, mask=masks.dilated(2))
        with pytest.raises(ValueError, match="backend 'reference' cannot compute this call"):
            attention(q, q, q, backend="reference")
        with pytest.raises(
            ValueError, match="return_max is not computed by backend 'triton' in an invariant call"
        ):
            attention(q, q, q, backend="triton", return_max=True)
        prefix = torch.randn(2, 3, 16, device=DEVICE)
        with pytest.raises(ValueError, match="attention_with_shared_prefix is not invariant"):
            fastattn.attention_with_shared_prefix(q, prefix, prefix, q, q, cache_lengths=8)
    with pytest.raises(TypeError, match="invariant must be a bool, got int"):
        attention(q, q, q, invariant=1)  # type: ignore[call-overload]


def test_compiled_and_mapped_calls_keep_the_bits() -> None:
    p = Problem((70,))
    q, k, v = p.sequences()[0]
    lowered = masks.documents(torch.tensor([0] * 30 + [1] * 40)).lower(1, 4, 70, 70, DEVICE)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with fastattn.invariant():
            return attention(q, k, v, mask=lowered)

    eager = call(q, k, v)
    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(q, k, v), eager)
    assert torch.equal(torch.func.vmap(call)(*(t[None].repeat(2, 1, 1, 1, 1) for t in (q, k, v)))[1], eager)


def test_a_repeated_call_of_kernels_follows_the_values_of_its_tensors() -> None:
    """The third call of a plan repeats what was recorded: the table of sequences is made anew in it."""
    with mock.patch.object(plans, "_is_interpreted", lambda *_: False):
        for lengths in ((20, 13), (5, 20), (9, 1), (1, 20)):
            p = Problem((20, 20), heads=1, key_heads=1, seed=lengths[0], backend="triton", causal=False)
            q, k, v = packed(p.sequences())
            q, k, v = (t.unflatten(2, (2, 20)).transpose(1, 2)[0].contiguous() for t in (q, k, v))
            out, lse = attention(q, k, v, key_lengths=torch.tensor(lengths, device=DEVICE), **p.options)
            for b, n in enumerate(lengths):
                mine = [t[b : b + 1, :, :n] for t in (q, k, v)]
                alone = attention(q[b : b + 1], *mine[1:], **p.options)
                assert_same((out[b : b + 1], lse[b : b + 1]), alone, f"row {b} of lengths {lengths}")
    plans.forget()


@pytest.mark.parametrize("backend", ["portable", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_and_heads_always_have_the_bits_of_one_row(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(17, 96, device=DEVICE).to(dtype)
    weight, dy = torch.rand(96, device=DEVICE).to(dtype), torch.randn_like(x)
    angles = torch.rand(64, 4, device=DEVICE)

    def of(x: Tensor, dy: Tensor, first: int) -> tuple[Tensor, ...]:
        x = x.clone().requires_grad_()
        heads = x.view(1, len(x), 4, 24).transpose(1, 2)
        turned = fastattn.prepare_heads(
            heads, cos=angles.cos(), sin=angles.sin(), norm=True, offsets=first, backend=backend
        ).transpose(1, 2).reshape(x.shape)  # fmt: skip
        parts = (
            fastattn.rms_norm(x, weight, backend=backend),
            fastattn.layer_norm(x, weight, backend=backend),
            turned,
        )
        return *parts, *(torch.autograd.grad(part, x, dy)[0] for part in parts)

    together = of(x, dy, 0)
    for first, stop in ((0, 1), (5, 12)):
        alone = of(x[first:stop], dy[first:stop], first)
        assert all(torch.equal(t[first:stop], a) for t, a in zip(together, alone, strict=True))


def test_a_repeated_decoding_step_keeps_the_bits() -> None:
    """A call that was seen before takes a shorter way."""
    q, k, v = Problem((100,)).sequences()[0]
    with fastattn.invariant():
        whole = attention(q, k, v, causal=True)
        for n in (100, 60, 100, 3):
            found = attention_with_cache(q[:, :, n - 1 : n], k, v, cache_lengths=n)
            assert torch.equal(found, whole[:, :, n - 1 : n])
