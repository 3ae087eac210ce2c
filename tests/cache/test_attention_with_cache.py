"""Attention with a cache computes what attention computes of the same keys and values without one.

The tests keep each row's tokens in plain tensors beside the cache, and compare with `fastattn.attention`'s
definition of every row alone, in float64.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from comparing import check_or_refusal
from hardware import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_exact_as_eager
from torch import Tensor, library
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import attention_with_cache
from fastattn.core import plans
from fastattn.core.attention import definition
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors
from fastattn.core.cache import operators, portable
from fastattn.core.cache.functional import Given
from fastattn.core.cache.spec import CacheSpec, CacheTensors, Storage
from fastattn.kernels import cache as kernels

T = torch.tensor
BACKENDS = ("triton", "portable", "reference")


@dataclass(frozen=True)
class Problem:
    """A call: the lengths before it, sizes, and what else it asks for."""

    lengths: tuple[int, ...] = (5, 0, 37)
    new: int = 1
    heads: int = 4
    key_heads: int = 2
    width: int = 16
    value_width: int = 16
    capacity: int = 48
    page: int | None = None
    queries: int | None = None  # None: as many as new tokens
    layout: str = "heads first"  # or "tokens first"
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    tree: int = 0  # columns of the tree mask
    starts: tuple[int, ...] | None = None
    rotated: int = 0  # components
    interleaved: bool = False
    absorbed: bool = False  # values are columns of the keys

    @property
    def lq(self) -> int:
        return self.new if self.queries is None else self.queries


class Cache:
    """A cache, filled with NaN but for the rows' tokens, and beside it these tokens as plain tensors."""

    def __init__(self, problem: Problem) -> None:
        self.problem, batch = problem, len(problem.lengths)
        self.old, self.new = self.drawn(max(problem.lengths, default=0)), self.drawn(problem.new)
        self.q = torch.randn(batch, problem.heads, problem.lq, problem.width, dtype=problem.dtype, device=DEVICE)
        page = problem.page or problem.capacity
        per_row = -(-problem.capacity // page)
        count = batch * per_row + (3 if problem.page else 0)
        self.table = torch.randperm(count)[: batch * per_row].view(batch, per_row).to(DEVICE)
        if not problem.page:
            self.table = torch.arange(batch, device=DEVICE)[:, None]
        self.caches = [None if t is None else self.stored(t, count, page) for t in self.old]
        # Entries that no token needs may hold anything.
        ends = torch.tensor([n + problem.new for n in problem.lengths])
        unused = torch.arange(per_row) * page >= ends[:, None]
        self.given_table = self.table.int().masked_fill(unused.to(DEVICE), 10**9) if problem.page else None

    def drawn(self, tokens: int) -> list[Tensor | None]:
        p = self.problem
        shape = len(p.lengths), p.key_heads, tokens
        k = torch.randn(*shape, p.width, dtype=p.dtype, device=DEVICE)
        return [k, None if p.absorbed else torch.randn(*shape, p.value_width, dtype=p.dtype, device=DEVICE)]

    def stored(self, old: Tensor, count: int, page: int) -> Tensor:
        heads, width = old.shape[1], old.shape[3]
        cache = torch.full((count, heads, page, width), float("nan"), dtype=old.dtype, device=DEVICE)
        if self.problem.layout == "tokens first":
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        for row, length in enumerate(self.problem.lengths):
            for t in range(length):
                cache[self.table[row, t // page], :, t % page] = old[row, :, t]
        return cache

    def arguments(self) -> dict[str, Any]:
        p = self.problem
        given: dict[str, Any] = {
            "cache_lengths": torch.tensor(p.lengths, dtype=torch.int32, device=DEVICE),
            "block_table": self.given_table, "causal": p.causal, "window": p.window, "softcap": p.softcap,
            "scale": p.scale,
        }  # fmt: skip
        if p.new:
            given |= {"k": self.new[0], "v": self.new[1]}
        if p.absorbed:
            given["value_width"] = p.value_width
        if p.starts is not None:
            given["cache_starts"] = torch.tensor(p.starts, device=DEVICE)
        torch.manual_seed(1)
        if p.alibi:
            given["alibi_slopes"] = torch.rand(p.heads, device=DEVICE)
        if p.sinks:
            given["sinks"] = torch.randn(len(p.lengths), p.heads, device=DEVICE)
        if p.tree:
            given["tree_mask"] = torch.rand(len(p.lengths), p.lq, p.tree, device=DEVICE) < 0.6
        if p.rotated:
            angles = torch.rand(p.capacity, p.rotated // 2, device=DEVICE) * 6
            given |= {"cos": angles.cos(), "sin": angles.sin(), "interleaved": p.interleaved}
        return given

    def expected(self, dtype: torch.dtype, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Each row by the definition of attention, in this dtype."""
        rows = [self.expected_row(row, dtype, arguments) for row in range(len(self.problem.lengths))]
        return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])

    def tokens(self, row: int, arguments: dict[str, Any]) -> list[Tensor]:
        """All keys and values of a row after the call, the new ones rotated."""
        p, length = self.problem, self.problem.lengths[row]
        new = [None if t is None else t[row : row + 1] for t in self.new]
        new[0] = rotated(new[0], length, arguments)
        k, v = (None if o is None else torch.cat((o[row : row + 1, :, :length], n), 2)
                for o, n in zip(self.old, new, strict=True))  # fmt: skip
        return [k, k[..., : p.value_width] if v is None else v]

    def expected_row(self, row: int, dtype: torch.dtype, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        p = self.problem
        k, v = (t.to(dtype) for t in self.tokens(row, arguments))
        q = rotated(self.q[row : row + 1], k.shape[2] - p.lq, arguments).to(dtype)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        seen = torch.ones(p.lq, k.shape[2], dtype=torch.bool, device=DEVICE)
        if p.starts is not None:
            seen[:, : p.starts[row]] = False
        if p.tree:
            for i, j in itertools.product(range(p.lq), range(p.tree)):
                if k.shape[2] - p.tree + j >= 0:
                    seen[i, k.shape[2] - p.tree + j] &= arguments["tree_mask"][row, i, j]
        slopes, sinks = arguments.get("alibi_slopes"), arguments.get("sinks")
        tensors = ScoreTensors(
            alibi_slopes=None if slopes is None else slopes.to(work)[None],
            sinks=None if sinks is None else sinks[row : row + 1].to(work),
            bias=seen[None, None],
        )
        scale = p.width**-0.5 if p.scale is None else p.scale
        spec = AttentionSpec(p.causal, scale, p.window or (None, None), p.softcap)
        return definition.attention(q, k, v, spec, tensors)


def rotated(x: Tensor, position: int, arguments: dict[str, Any]) -> Tensor:
    """By single rows: x (1, H, L, D), its first row at this position."""
    if "cos" not in arguments:
        return x
    last = arguments["cos"].shape[0] - 1
    at = (position + torch.arange(x.shape[2], device=DEVICE)).clamp(0, last)
    cos, sin = arguments["cos"][at][None], arguments["sin"][at][None]
    return fastattn.prepare_heads(x, cos=cos, sin=sin, interleaved=arguments["interleaved"], backend="reference")


def check(problem: Problem, backend: str) -> None:
    torch.manual_seed(0)
    cache = Cache(problem)
    given = cache.arguments()
    out, lse = attention_with_cache(cache.q, *cache.caches, **given, return_lse=True, backend=backend)
    exact, eager = cache.expected(torch.float64, given), cache.expected(problem.dtype, given)
    for found, right, plain in zip((out, lse), exact, eager, strict=True):
        assert_as_exact_as_eager(found, right, plain)
    # The new tokens are in the cache, and nothing else was touched.
    page = problem.page or problem.capacity
    old = [None if t is None else cache.stored(t, len(cache.caches[0]), page) for t in cache.old]
    for row, length in enumerate(problem.lengths):
        for t, now, before in zip(cache.tokens(row, given), cache.caches, old, strict=True):
            if now is None or before is None:
                continue
            for at in range(length, length + problem.new):
                torch.testing.assert_close(now[cache.table[row, at // page], :, at % page], t[0, :, at])
                before[cache.table[row, at // page], :, at % page] = now[
                    cache.table[row, at // page], :, at % page
                ]
    for now, before in zip(cache.caches, old, strict=True):
        assert now is None or torch.equal(now.nan_to_num(9.0), before.nan_to_num(9.0))


PROBLEMS = {
    "one query": Problem(),
    "one query, every head its own keys": Problem(key_heads=4),
    "one query, pages": Problem(page=16),
    "pages of tokens first": Problem(page=16, layout="tokens first", new=3),
    "pages of three": Problem(page=3, new=5),
    "tokens first": Problem(layout="tokens first", new=2),
    "nothing new": Problem(new=0, queries=1, lengths=(5, 0, 48)),
    "several queries, nothing new": Problem(new=0, queries=4, lengths=(5, 2, 48)),
    "more queries than new tokens": Problem(new=1, queries=4, page=16),
    "a chunk": Problem(new=11, lengths=(5, 0, 37), page=16),
    "equal lengths": Problem(lengths=(17, 17), new=1),
    "equal lengths, a chunk": Problem(lengths=(17, 17), new=5),
    "not causal": Problem(new=3, causal=False),
    "window, one query": Problem(window=(7, None), page=16),
    "window of two sides": Problem(new=5, causal=False, window=(7, 2)),
    "window of nothing else": Problem(new=2, window=(0, None)),
    "soft cap, one query": Problem(softcap=2.0, page=16),
    "soft cap": Problem(softcap=2.0, new=3),
    "ALiBi, one query": Problem(alibi=True),
    "ALiBi and sinks": Problem(alibi=True, sinks=True, new=4, page=16, window=(9, None)),
    "sinks, one query": Problem(sinks=True, lengths=(5, 0, 30)),
    "a sink alone": Problem(sinks=True, lengths=(5, 0, 30), new=0, queries=1),
    "scale": Problem(scale=0.7),
    "negative scale": Problem(scale=-0.7, new=2),
    "scale of zero": Problem(scale=0.0, new=2),
    "tree": Problem(tree=6, new=6, page=16),
    "tree, one query": Problem(tree=3, new=1),
    "tree wider than a row": Problem(tree=9, new=2, lengths=(3, 0, 37), causal=False),
    "starts": Problem(starts=(2, 0, 40), new=2),
    "starts, one query, pages": Problem(starts=(2, 1, 30), page=16),
    "starts behind everything": Problem(starts=(6, 1, 38), new=1),
    "rotary": Problem(rotated=16, new=3, page=16),
    "rotary, interleaved and partial": Problem(rotated=8, interleaved=True),
    "rotary, more queries than new tokens": Problem(rotated=8, new=1, queries=3),
    "rotary, nothing new": Problem(rotated=8, new=0, queries=2, lengths=(5, 2, 37)),
    "absorbed": Problem(absorbed=True, key_heads=1, width=24, value_width=16, page=16),
    "absorbed, a chunk": Problem(absorbed=True, key_heads=1, width=24, value_width=16, new=4),
    "values of their own width": Problem(value_width=24, page=16),
    "half precision": Problem(dtype=torch.float16, page=16, new=2),
    "bfloat16": Problem(dtype=torch.bfloat16),
    "float64": Problem(dtype=torch.float64, new=2),
    "everything": Problem(
        alibi=True, sinks=True, new=4, page=16, window=(20, None), softcap=3.0, tree=4, starts=(1, 0, 5),
        rotated=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_attention_of_each_row_alone(name: str, backend: str) -> None:
    problem = PROBLEMS[name]
    check_or_refusal(check, problem, backend, "float64" if problem.dtype == torch.float64 else None)


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are split over programs every 16 keys."""
    monkeypatch.setattr(kernels, "SPLIT", 16)


@pytest.mark.parametrize(
    "name",
    ["one query", "one query, pages", "a chunk", "window, one query", "a sink alone", "everything",
     "starts behind everything", "absorbed", "tree", "half precision"],
)  # fmt: skip
def test_keys_that_are_split_over_programs_are_merged_exactly(name: str, short_splits: None) -> None:
    check(PROBLEMS[name], "triton")


@pytest.mark.parametrize("queries", [1, 3])
def test_the_bits_of_a_row_depend_on_that_row_alone_in_the_kernels(queries: int, short_splits: None) -> None:
    """Not on the other rows, on the capacity, or on whether keys are in pages."""
    lengths = torch.tensor([40, 3, 33], dtype=torch.int32, device=DEVICE)
    q = torch.randn(3, 4, queries, 16, device=DEVICE)
    cache = torch.randn(2, 3, 2, 48, 16, device=DEVICE)
    together = attention_with_cache(q, *cache, cache_lengths=lengths, return_lse=True, backend="triton")
    table = torch.randperm(9, device=DEVICE).view(3, 3)
    pages = torch.full((2, 9, 2, 16, 16), float("nan"), device=DEVICE)
    pages[:, table] = cache.unflatten(3, (3, 16)).transpose(2, 3)
    paged = attention_with_cache(
        q, *pages, cache_lengths=lengths, block_table=table, return_lse=True, backend="triton"
    )
    for b in range(3):
        alone = attention_with_cache(
            q[b : b + 1], *cache[:, b : b + 1, :, : int(lengths[b])], cache_lengths=lengths[b : b + 1],
            return_lse=True, backend="triton",
        )  # fmt: skip
        for one, every, of_pages in zip(alone, together, paged, strict=True):
            assert torch.equal(one[0], every[b]) and torch.equal(one[0], of_pages[b]), b


@pytest.mark.parametrize("split", [16, 512])
def test_what_a_gpu_cannot_refuse_is_not_a_number_and_writes_nothing(
    split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths and page numbers are on the device, where nobody waits for them."""
    monkeypatch.setattr(kernels, "SPLIT", split)
    table = torch.tensor(
        [[0, 1, 2], [3, 9, 4], [5, -1, 6], [7, 8, 7], [2, 8, 7]], dtype=torch.int32, device=DEVICE
    )
    lengths = torch.tensor([20, 20, 20, 49, -1], dtype=torch.int32, device=DEVICE)
    storage = Storage(*torch.randn(2, 9, 2, 16, 16, device=DEVICE))
    before = [storage.keys.clone(), storage.values.clone()]
    q, k = torch.randn(5, 4, 1, 16, device=DEVICE), torch.randn(5, 2, 5, 16, device=DEVICE)
    tensors = CacheTensors(lengths, block_table=table)
    kernels.cache_append(storage, k, k, tensors)
    for cache, old in zip(storage[:2], before, strict=True):
        changed = (cache != old).any(-1).any(1)
        # Row 0 writes its tokens 15 to 19, and rows 1 and 2 their token 15, which lies in a page that exists.
        expected = torch.zeros(9, 16, dtype=torch.bool, device=DEVICE)
        expected[0, 15] = expected[1, :4] = expected[3, 15] = expected[5, 15] = True
        assert torch.equal(changed, expected)
    out, lse = kernels.cache_attention(q, storage, CacheSpec(AttentionSpec(True, 0.3), 16), tensors)
    assert [bool(t.isnan().all()) for t in out] == [False, True, True, True, True]
    assert [bool(t.isnan().all()) for t in lse] == [False, True, True, True, True]
    assert not out[0].isnan().any() and not lse[0].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, heads, queries", [(0, 4, 1), (2, 0, 1), (2, 4, 0)])
def test_a_call_of_nothing_gives_nothing(batch: int, heads: int, queries: int, backend: str) -> None:
    cache = torch.zeros(2, batch, heads // 2, 8, 16, device=DEVICE)
    q, new = torch.randn(batch, heads, queries, 16), torch.randn(batch, heads // 2, queries, 16)
    out = attention_with_cache(q.to(DEVICE), *cache, k=new, v=new, cache_lengths=3, backend=backend)
    assert out.shape == (batch, heads, queries, 16)


def test_pages_that_are_copied_piece_by_piece_are_merged_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "COPIED", 16 * 2 * 16)
    for problem in (Problem(page=16), Problem(page=3, window=(20, None)), Problem(page=16, starts=(2, 0, 20))):
        check(problem, "portable")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    new = draw(st.integers(0, 5))
    capacity = draw(st.sampled_from([16, 40]))
    lengths = draw(st.lists(st.integers(0, capacity - new), min_size=1, max_size=4))
    key_heads = draw(st.sampled_from([1, 2]))
    side = st.one_of(st.none(), st.integers(0, 12))
    return Problem(
        lengths=tuple(lengths), new=new, queries=draw(st.sampled_from([None, 1, 3])) if new else 2,
        heads=key_heads * draw(st.sampled_from([1, 3])), key_heads=key_heads, width=draw(st.sampled_from([8, 20])),
        value_width=draw(st.sampled_from([8, 20])), capacity=capacity, page=draw(st.sampled_from([None, 5, 16])),
        layout=draw(st.sampled_from(["heads first", "tokens first"])), causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.tuples(side, side))), softcap=draw(st.sampled_from([0.0, 2.0])),
        alibi=draw(st.booleans()), sinks=draw(st.booleans()), tree=draw(st.sampled_from([0, 0, 4])),
        starts=draw(st.one_of(st.none(), st.tuples(*(st.integers(0, capacity) for _ in lengths)))),
    )  # fmt: skip


@given(problems())
def test_any_call_is_attention_of_each_row_alone(problem: Problem) -> None:
    check(problem, "portable")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 3])
def test_the_bits_of_a_row_do_not_depend_on_the_batch(queries: int, dtype: torch.dtype) -> None:
    """Beside rows of its own length or of others, alone or in a larger cache."""
    lengths = torch.tensor([700, 700, 3, 1100])
    q = torch.randn(4, 8, queries, 64, dtype=dtype)
    k_cache, v_cache = torch.randn(2, 4, 2, 1100, 64, dtype=dtype)
    together = attention_with_cache(q, k_cache, v_cache, cache_lengths=lengths)
    for b in range(4):
        alone = attention_with_cache(
            q[b : b + 1], k_cache[b : b + 1], v_cache[b : b + 1], cache_lengths=lengths[b : b + 1]
        )
        assert torch.equal(alone[0], together[b]), b


@pytest.mark.parametrize("options", [{}, {"window": (3, None)}, {"scale": 0.3, "causal": False}], ids=str)
@pytest.mark.parametrize("length", [7, 16, T([5, 5]), T(6), 1], ids=str)
@pytest.mark.parametrize("heads", [2, 6])
def test_the_short_way_of_one_token_gives_the_same_bits(options: dict, length: Any, heads: int) -> None:
    q, caches = (
        torch.randn(2, heads, 1, 8),
        torch.randn(2, 2, 2, 16, 8).transpose(2, 3).contiguous().transpose(2, 3),
    )
    asked = {"cache_lengths": length, "return_lse": True, "backend": "portable", **options}
    with mock.patch.object(Given, "converted", side_effect=AssertionError("the long way")):
        short = attention_with_cache(q, *caches, **asked)
    assert short[0].transpose(1, 2).is_contiguous() and short[1].is_contiguous()
    with mock.patch.object(plans, "key", return_value=None):
        assert all(map(torch.equal, short, attention_with_cache(q, *caches, **asked)))


def pages_of_one_token(lengths: list[int], layout: str = "heads first") -> tuple[Tensor, dict[str, Any]]:
    """The queries of a call without new tokens, and the rest of it; NaN in all that no row reads."""
    cache = Cache(Problem(tuple(lengths), new=0, queries=1, page=16, layout=layout))
    k_cache, v_cache = cache.caches
    asked = {"k_cache": k_cache, "v_cache": v_cache, "return_lse": True, "backend": "portable"}
    return cache.q, {**cache.arguments(), **asked}


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
@pytest.mark.parametrize("lengths", [[7, 40, 40], [0, 48, 17], [16, 16, 16]], ids=str)
@pytest.mark.parametrize("copied", [512, 2**18])
def test_the_short_way_of_one_token_in_pages_gives_the_same_bits(
    layout: str, lengths: list[int], copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portable, "COPIED", copied)
    q, asked = pages_of_one_token(lengths, layout)
    with mock.patch.object(Given, "converted", side_effect=AssertionError("the long way")):
        short = attention_with_cache(q, **asked)
    with mock.patch.object(plans, "key", return_value=None):
        assert all(map(torch.equal, short, attention_with_cache(q, **asked)))


@pytest.mark.parametrize("page", [-1, 12])
def test_the_short_way_of_pages_names_a_page_that_is_not_there(page: int) -> None:
    q, asked = pages_of_one_token([7, 40, 40])
    attention_with_cache(q, **asked)
    asked["block_table"][1, 1] = page
    with pytest.raises(ValueError, match=rf"block_table must list pages from 0 to 11 .*, got {page} at \[1, 1\]"):
        attention_with_cache(q, **asked)
    with pytest.raises(ValueError, match="cache_lengths must be at most 48, got 49"):
        attention_with_cache(q, **{**asked, "cache_lengths": T([7, 49, 40])})


def test_no_more_than_a_part_of_the_pages_is_copied_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if "index_select" in str(function) or "new_empty" in str(function):
                self.numel = max(self.numel, out.numel())
            return out

    monkeypatch.setattr(portable, "COPIED", 512)
    q, asked = pages_of_one_token([48, 48, 48])
    # Else the mode would see one operator, not what it calls.
    with mock.patch.object(plans, "watched", return_value=False), Largest() as largest:
        attention_with_cache(q, **asked)
    assert largest.numel == 2 * 512


@pytest.mark.parametrize("rotated", [False, True])
def test_a_step_with_a_new_token_goes_the_short_way_and_gives_the_same_bits(rotated: bool) -> None:
    q, k, caches = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 2, 16, 8)
    asked: dict[str, Any] = {"k": k, "v": k + 1, "cache_lengths": T([7, 7]), "backend": "portable"}
    asked |= {"cos": torch.rand(16, 4), "sin": torch.rand(16, 4)} if rotated else {}
    others = caches.clone()
    with mock.patch.object(operators, "attend", side_effect=AssertionError("the long way")):
        short = attention_with_cache(q, *caches, **asked)
    with mock.patch.object(plans, "key", return_value=None):
        assert torch.equal(short, attention_with_cache(q, *others, **asked)) and torch.equal(caches, others)


@pytest.mark.parametrize(
    "length, words", [(17, "at most 16, got 17"), (-1, "not be negative, got -1"), ([3], "shape")]
)
def test_the_short_way_of_one_token_refuses_what_the_long_one_does(length: Any, words: str) -> None:
    q, caches = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 2, 16, 8)
    attention_with_cache(q, *caches, cache_lengths=3)
    with pytest.raises(ValueError, match=words):
        attention_with_cache(q, *caches, cache_lengths=length)
    assert not attention_with_cache(q, *caches, cache_lengths=T([0, 3]))[0].any()


# ---- what is refused, before anything is written ----


def call(**changed: Any) -> Tensor:
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16)
    cache = torch.full((2, 6, 2, 16, 16), 7.0)
    given: dict[str, Any] = {
        "q": q, "k_cache": cache[0], "v_cache": cache[1], "k": k, "v": v, "cache_lengths": torch.tensor([1, 20]),
        "block_table": torch.tensor([[0, 5], [3, 1]]),
    }  # fmt: skip
    given |= changed
    try:
        return attention_with_cache(**given)
    except BaseException:
        assert bool((cache == 7.0).all()), "the cache was touched"
        raise


WRONG = (
    ({"cache_lengths": T([1, 30])}, ValueError, r"cache_lengths must be at most 29 with 3 new tokens, got 30"),
    ({"k": torch.ones(2, 2, 40, 16), "v": torch.ones(2, 2, 40, 16)}, ValueError,
     r"k must have at most the cache's capacity of 32 new tokens, got 40"),
    ({"k_cache": torch.zeros(1, 2, 16, 16).expand(6, -1, -1, -1)}, ValueError,
     r"k_cache must have a place of its own for each number .* expanded: its strides are \(0, 256"),
    ({"attn_mask": None}, TypeError, r"argument 'attn_mask'$"),
    ({"is_causal": True}, TypeError, r"argument 'is_causal'; it is called causal= here"),
    ({"cache_lengths": T([1, 33]), "k": None, "v": None}, ValueError, r"cache_lengths must be at most 32, got 33"),
    ({"cache_lengths": T([1, -1])}, ValueError, r"cache_lengths must not be negative, got -1"),
    ({"cache_lengths": -7}, ValueError, r"cache_lengths must not be negative, got -1"),
    ({"cache_lengths": T([1.0, 2.0])}, TypeError, r"cache_lengths must be int32 or int64, got torch.float32"),
    ({"cache_lengths": T([1, 2, 3])}, ValueError, r"cache_lengths must have shape \(2,\) or \(\), got \(3,\)"),
    ({"cache_lengths": [1, 2.5]}, TypeError, r"cache_lengths must be a tensor or a sequence of integers"),
    ({"cache_lengths": 1.5}, TypeError, r"cache_lengths must be an integer, a tensor or a sequence of integers"),
    ({"cache_starts": "two"}, TypeError, r"cache_starts must be"),
    ({"block_table": T([[0, 6], [3, 1]]), "cache_lengths": 20}, ValueError,
     r"block_table must list pages from 0 to 5 for all tokens of a row, got 6 at \[0, 1\]"),
    ({"block_table": T([[0, 5], [-1, 1]])}, ValueError, r"block_table .* got -1 at \[1, 0\]"),
    ({"block_table": T([[0, 5], [0, 5]]), "cache_lengths": 3, "check": True}, ValueError,
     r"block_table must not give two rows the same page to write to"),
    ({"block_table": T([[0, 5]])}, ValueError, r"block_table must have shape \(2, most pages\), got \(1, 2\)"),
    ({"block_table": T([[0.0, 5.0]])}, ValueError, r"block_table must have shape"),
    ({"block_table": T([[0, 5], [3, 1]]).short()}, TypeError, r"block_table must be int32 or int64, got torch"),
    ({"block_table": None}, ValueError, r"k_cache must have q's batch size 2, or a block_table .*; got 6"),
    ({"q": torch.randn(2, 3, 3, 16)}, ValueError, r"q's heads must be a multiple of k_cache's heads 2, got 3"),
    ({"q": torch.randn(2, 4, 3, 8)}, ValueError, r"q must have k_cache's head width 16, at least 1; got 8"),
    ({"q": torch.randn(2, 4, 16)}, ValueError, r"q must have shape \(batch, heads, length, width\), got"),
    ({"q": torch.randn(2, 4, 3, 16).half()}, TypeError, r"k_cache must have q's dtype torch.float16, got"),
    ({"k": torch.randn(2, 2, 3, 16).double()}, TypeError, r"k must have k_cache's dtype torch.float32, got"),
    ({"k": torch.randn(2, 1, 3, 16)}, ValueError, r"k must have shape \(2, 2, new tokens, 16\), got"),
    ({"v": None}, ValueError, r"k must come with v, got k alone"),
    ({"k": None}, ValueError, r"v must come with k, got v alone"),
    ({"v": torch.randn(2, 2, 4, 16)}, ValueError, r"v must have as many new tokens as k, 3; got 4"),
    ({"v_cache": None}, ValueError, r"v must be None where v_cache is None"),
    ({"v_cache": torch.randn(5, 2, 16, 16)}, ValueError, r"v_cache must have k_cache's shape"),
    ({"value_width": 8}, ValueError, r"value_width must be None unless v_cache is None"),
    ({"v_cache": None, "v": None, "value_width": 17}, ValueError, r"value_width must be at most k_cache's"),
    ({"tree_mask": torch.ones(3, 3)}, TypeError, r"tree_mask must be bool"),
    ({"tree_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"tree_mask must have shape \(3, M\) or"),
    ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(3,\)"),
    ({"sinks": torch.ones(4, dtype=torch.int64)}, TypeError, r"sinks must be float16"),
    ({"cos": torch.ones(40, 8)}, ValueError, r"cos and sin must come together, got cos alone"),
    ({"cos": torch.ones(22, 8), "sin": torch.ones(22, 8)}, ValueError,
     r"cos must have a row for every position, 23 for these lengths; got 22"),
    ({"cos": torch.ones(40, 9), "sin": torch.ones(40, 9)}, ValueError, r"cos must have shape \(positions"),
    ({"scale": float("inf")}, ValueError, r"scale must be finite"),
    ({"window": -1}, ValueError, r"window must not be negative"),
    ({"softcap": -1.0}, ValueError, r"softcap must be positive"),
    ({"causal": 1}, TypeError, r"causal must be a bool"),
    ({"check": "yes"}, TypeError, r"check must be a bool"),
    ({"softmax_scale": 1.0}, TypeError, r"unexpected keyword argument 'softmax_scale'; it is called scale= here"),
    ({"backend": "fast"}, ValueError, r"backend must be one of"),
)  # fmt: skip


@pytest.mark.parametrize("changed, kind, words", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_bad_input_is_refused_and_the_cache_is_not_touched(changed: dict, kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        call(**changed)


def test_the_call_that_the_refusals_change_is_right() -> None:
    assert call().shape == (2, 4, 3, 16)


def test_a_refused_call_is_refused_again_after_a_right_one() -> None:
    """A call that was seen before is not checked again, but for its values."""
    call()
    with pytest.raises(ValueError, match="cache_lengths must be at most 29"):
        call(cache_lengths=T([1, 30]))


@pytest.mark.parametrize("name", ["q", "k", "v", "k_cache", "sinks"])
def test_gradients_through_the_cache_are_refused(name: str) -> None:
    shape = {"q": (2, 4, 3, 16), "k_cache": (6, 2, 16, 16), "sinks": (4,)}.get(name, (2, 2, 3, 16))
    learned = torch.zeros(shape, requires_grad=True)
    with pytest.raises(ValueError, match="computes no gradients, but one is asked for"):
        call(**{name: learned})
    with torch.no_grad():
        call(**{name: learned})


def test_gradients_of_transforms_are_refused() -> None:
    q = torch.randn(2, 4, 3, 16)
    with pytest.raises(ValueError, match="computes no gradients"):
        torch.func.grad(lambda x: call(q=x).sum())(q)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="computes no gradients"):
        call(q=forward_ad.make_dual(q, q))
    with pytest.raises(ValueError, match="cannot be mapped"):
        torch.func.vmap(lambda x: call(q=x), randomness="same")(q[None])


def test_a_backward_through_the_operator_itself_is_refused() -> None:
    q, cache = torch.randn(1, 2, 1, 8, requires_grad=True), torch.randn(1, 2, 4, 8)
    out, _ = torch.ops.fastattn.cache_attention(
        q, cache, cache, None, None, T([3], dtype=torch.int32), None, None, None, None, None, 8, True, 1.0, None,
        None, 0.0, "ieee", False, False, "portable",
    )  # fmt: skip
    with pytest.raises(ValueError, match="computes no gradients"):
        out.sum().backward()


# ---- compilers ----


def test_the_operators_pass_pytorch_s_own_checks() -> None:
    cache = torch.randn(2, 5, 2, 16, 8)
    k, table, lengths = (
        torch.randn(2, 2, 3, 8),
        T([[0, 4], [2, 1]], dtype=torch.int32),
        T([4, 20], dtype=torch.int32),
    )
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    library.opcheck(
        torch.ops.fastattn.cache_append,
        (*cache, None, None, k, k, lengths, table, False, "portable"),
        test_utils=tests,
    )
    library.opcheck(
        torch.ops.fastattn.cache_append,
        (cache[0], None, None, None, k, None, lengths, table, False, "portable"),
        test_utils=tests,
    )
    library.opcheck(
        torch.ops.fastattn.cache_attention,
        (torch.randn(2, 4, 3, 8), *cache, None, None, lengths, None, table, None, None, None, 8, True, 0.3, None,
         None, 0.0, "ieee", False, False, "portable"), test_utils=tests,
    )  # fmt: skip


def test_a_compiled_decoding_step_writes_in_place_and_gives_the_same() -> None:
    table = T([[0, 4], [2, 1]], dtype=torch.int32)
    angles = torch.rand(32, 4)
    start = torch.randn(2, 5, 2, 16, 8)

    def step(q: Tensor, k: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out = attention_with_cache(
            q, k_cache, v_cache, k=k, v=k, cache_lengths=lengths, block_table=table, cos=angles.cos(),
            sin=angles.sin(), sinks=torch.ones(4),
        )  # fmt: skip
        return out, lengths + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    caches, others = start.clone(), start.clone()
    lengths = others_lengths = T([4, 20], dtype=torch.int32)
    with torch.no_grad():
        for _ in range(3):
            q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8)
            expected, lengths = step(q, k, *caches, lengths)
            out, others_lengths = compiled(q, k, *others, others_lengths)
            torch.testing.assert_close(out, expected)
    torch.testing.assert_close(others, caches)
    assert not torch.equal(others, start)


def test_a_compiled_loop_counts_its_tokens_with_an_int() -> None:
    q, cache = torch.randn(1, 2, 1, 16), torch.randn(2, 1, 2, 64, 16)
    graphs = CompileCounter()

    @functools.partial(torch.compile, fullgraph=True, backend=graphs)
    def step(q: Tensor, length: int) -> Tensor:
        return attention_with_cache(q, *cache, cache_lengths=length)

    for length in range(3, 9):
        torch.testing.assert_close(step(q, length), attention_with_cache(q, *cache, cache_lengths=length))
    assert graphs.frame_count <= 2


def test_keys_and_values_are_not_written_to_the_same_tensor() -> None:
    q, cache, new = torch.randn(1, 2, 1, 16), torch.zeros(2, 1, 2, 8, 16), torch.randn(1, 2, 1, 16)
    for again in (False, True):
        if again:  # The plan of a right call knows nothing of it.
            attention_with_cache(q, cache[0], cache[1].clone(), k=new, v=new, cache_lengths=3)
        with pytest.raises(ValueError, match="v_cache must be another tensor than k_cache where new tokens"):
            attention_with_cache(q, cache[1], cache[1], k=new, v=new, cache_lengths=3)
        assert not cache[1].any()


def test_a_compiled_call_refuses_lengths_beyond_the_capacity() -> None:
    compiled = torch.compile(lambda n: call(cache_lengths=n), fullgraph=False, backend="eager")
    with pytest.raises(ValueError, match="cache_lengths must be at most 29 with 3 new tokens, got 30"):
        compiled(T([1, 30]))


def test_under_autocast_queries_and_new_tokens_take_the_cache_s_dtype() -> None:
    cache = torch.zeros(2, 1, 2, 16, 16, dtype=torch.bfloat16)
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_with_cache(q, *cache, k=k, v=k, cache_lengths=3)
    assert out.dtype == torch.bfloat16 and torch.equal(cache[0, 0, :, 3], k[0, :, 0].bfloat16())
