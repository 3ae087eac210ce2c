"""Caches of keys and values hold what plain lists of tokens hold, whatever is done to them in whatever order."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hardware import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn.core.cache.definition import dequantised, scale_of
from fastattn.core.cache.definition import quantised as quantise
from fastattn.core.cache.spec import LARGEST
from fastattn.kv_cache import KVCache, OutOfPages, PagedKVCache

HEADS, WIDTH, VALUE_WIDTH, LAYERS = 2, 8, 4, 2


def paged(pages: int = 12, page: int = 3, **options: Any) -> PagedKVCache:
    given = {"layers": LAYERS, "value_width": VALUE_WIDTH, "device": DEVICE} | options
    return PagedKVCache(pages, page, HEADS, WIDTH, **given)


def contiguous(rows: int = 3, capacity: int = 9) -> KVCache:
    return KVCache(rows, capacity, HEADS, WIDTH, layers=LAYERS, value_width=VALUE_WIDTH, device=DEVICE)


def new_tokens(count: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, HEADS, count, WIDTH), torch.zeros(1, HEADS, count, VALUE_WIDTH)


def quantised(dtype: torch.dtype, by_page: bool) -> Any:
    """As `paged`; in a page, scales of its own are those of the largest number that is drawn."""

    def make(**options: Any) -> PagedKVCache:
        scales = {name: 6.0 / LARGEST[dtype] for name in ("k_scale", "v_scale")} if by_page else {}
        return paged(dtype=dtype, **scales, **options)

    return make


class Model:
    """A cache beside the tokens that it must hold, a list of layers of (key, value) for each sequence: as they are
    written, or for a quantised cache as it must have them."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.tokens: dict[int, list[list[tuple[Tensor, Tensor]]]] = {}

    def append(self, sequences: list[int], count: int) -> None:
        free, lengths = self.cache.free_pages, {s: self.cache.length(s) for s in self.tokens}
        try:
            self.cache.extend(sequences, count)
        except (OutOfPages, ValueError):
            assert self.cache.free_pages == free and lengths == {s: self.cache.length(s) for s in self.tokens}
            return
        for layer in range(LAYERS):
            k = torch.randn(len(sequences), HEADS, count, WIDTH, device=DEVICE)
            v = torch.randn(len(sequences), HEADS, count, VALUE_WIDTH, device=DEVICE)
            self.cache.write(sequences, k, v, layer=layer)
            k, v = self.as_stored(k), self.as_stored(v)
            for row, sequence in enumerate(sequences):
                self.tokens[sequence][layer] += [(k[row, :, t], v[row, :, t]) for t in range(count)]

    def as_stored(self, x: Tensor) -> Tensor:
        dtype, scales = self.cache.keys[0].dtype, self.cache.k_scales[0]
        if scales is None:
            return x
        scale = scale_of(x, dtype) if scales.dim() == 3 else scales[0, 0].expand(x.shape[:3])
        return dequantised(quantise(x, scale, dtype), scale, x.dtype)

    def do(self, step: tuple[int, int, int]) -> None:
        """One of: a new sequence, tokens for one, tokens for all, a fork, a truncation, the end of one."""
        what, which, size = step
        there = list(self.tokens)
        one = there[which % len(there)] if there else None
        if what == 0 or one is None:
            (new,) = self.cache.add()
            self.tokens[new] = [[] for _ in range(LAYERS)]
        elif what == 1:
            self.append([one], size)
        elif what == 2:
            self.append(there[::-1], size % 3)
        elif what == 3:
            for new in self.cache.fork(one, size % 3):
                self.tokens[new] = [list(layer) for layer in self.tokens[one]]
        elif what == 4:
            length = min(size, self.cache.length(one))
            self.cache.truncate(one, length)
            self.tokens[one] = [layer[:length] for layer in self.tokens[one]]
        else:
            self.cache.free(one)
            del self.tokens[one]

    def check(self) -> None:
        cache = self.cache
        assert cache.sequences == list(self.tokens)
        owned = Counter(page for s in self.tokens for page in cache._pages[s])
        assert owned == cache._owners and len(owned) + cache.free_pages == len(cache.keys[0])
        for sequence, layers in self.tokens.items():
            assert cache.length(sequence) == len(layers[0])
            # No page too many.
            assert len(cache._pages[sequence]) == -(-len(layers[0]) // cache.page)
        for layer in range(LAYERS):
            self.check_attention(layer)

    def check_attention(self, layer: int) -> None:
        there = list(self.tokens)
        q = torch.randn(len(there), 4, 1, WIDTH, device=DEVICE)
        out = self.cache.attention(q, there, layer=layer)
        for row, sequence in enumerate(there):
            tokens = self.tokens[sequence][layer]
            k, v = (torch.stack([t[i] for t in tokens], 1)[None] if tokens else
                    torch.zeros(1, HEADS, 0, (WIDTH, VALUE_WIDTH)[i], device=DEVICE) for i in (0, 1))  # fmt: skip
            expected = fastattn.attention(q[row : row + 1], k, v)
            torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-5, atol=1e-5)


STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 7)), max_size=14)


@settings(max_examples=60)
@given(
    STEPS,
    st.sampled_from([paged, contiguous, quantised(torch.int8, False), quantised(torch.float8_e4m3fn, True)]),
    st.integers(1, 4),
)
def test_any_order_of_steps_keeps_every_token(steps: list, make: Any, page: int) -> None:
    torch.manual_seed(0)
    model = Model(make() if make is contiguous else make(page=page))
    for step in steps:
        model.do(step)
    model.check()


def test_a_fork_shares_pages_until_it_writes() -> None:
    model = Model(paged(pages=5))
    model.do((0, 0, 0))
    model.append([0], 8)  # three pages, the last of them with two tokens
    model.do((3, 0, 2))
    assert model.cache.free_pages == 2 and model.cache._pages[0] == model.cache._pages[2]
    model.append([1, 2], 1)
    assert model.cache.free_pages == 0
    # The last owner of the page writes to it as it is.
    model.append([0], 1)
    model.check()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("scales", [{}, {"k_scale": 0.05, "v_scale": torch.tensor([0.02, 0.03])}])
def test_tokens_that_are_written_again_after_a_truncation_or_a_copy_give_the_same_bits(
    dtype: torch.dtype, scales: dict
) -> None:
    cache = paged(layers=1, dtype=dtype, **scales)
    (one,) = cache.add()
    k, v = torch.randn(1, HEADS, 8, WIDTH), torch.randn(1, HEADS, 8, VALUE_WIDTH)
    k, v, q = k.to(DEVICE), v.to(DEVICE), torch.randn(1, 4, 8, WIDTH, device=DEVICE)
    cache.append([one], k, v)
    expected = cache.attention(q, [one])
    kept = copy.deepcopy(cache)
    cache.truncate(one, 4)
    (other,) = cache.fork(one)
    for sequence in (other, one):
        cache.append([sequence], k[:, :, 4:], v[:, :, 4:])
    assert all(torch.equal(c.attention(q, [s]), expected) for c, s in ((cache, one), (cache, other), (kept, one)))
    sizes = {t.element_size() for t in (*cache.keys, *cache.values)}
    assert sizes == {1} and cache.k_scales[0].dim() == (2 if scales else 3)


def test_out_of_pages_loses_nothing_and_says_what_is_needed() -> None:
    model = Model(paged(pages=3))
    model.do((0, 0, 0))
    model.do((0, 0, 0))
    model.append([0, 1], 3)
    with pytest.raises(OutOfPages, match="the cache has 1 free pages, but 2 are needed"):
        model.cache.extend([0, 1], 1)
    model.check()
    model.cache.extend([1], 3)


def test_append_of_a_cache_of_one_layer_takes_back_what_could_not_be_written() -> None:
    cache = paged(layers=1)
    (one,) = cache.add()
    k, v = torch.randn(1, HEADS, 4, WIDTH), torch.randn(1, HEADS, 4, VALUE_WIDTH)
    cache.append([one], k, v)
    with pytest.raises(TypeError, match="v must have v_cache's dtype"):
        cache.append([one], k, v.double())
    assert cache.length(one) == 4 and cache.free_pages == 10
    with pytest.raises(ValueError, match="append is for a cache of one layer"):
        paged().append([], k, v)


def test_a_contiguous_cache_is_read_where_it_lies() -> None:
    cache = contiguous()
    rows = cache.add(3)
    cache.extend(rows, 2)
    assert cache._table_or_none(tuple(rows), cache.block_table(rows)) is None
    cache.free(rows[0])
    cache.extend(cache.add(), 1)
    assert cache._table_or_none(tuple(cache.sequences), cache.block_table(cache.sequences)) is not None


def test_shapes_do_not_change_from_step_to_step() -> None:
    cache = paged(capacity=9)
    rows = cache.add(2)
    shapes = set()
    for _ in range(9):
        cache.extend(rows, 1)
        shapes.add((cache.block_table(rows).shape, cache.lengths(rows).shape))
    assert shapes == {((2, 3), (2,))}
    with pytest.raises(ValueError, match="within the capacity of 9, got 1 more for one of 9"):
        cache.extend(rows, 1)


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (lambda c: c.extend([0, 0], 1), ValueError, r"sequences must not name one twice, got \[0, 0\]"),
        (lambda c: c.extend([7], 1), ValueError, r"sequence must be one of the cache's, \[0\]; got 7"),
        (lambda c: c.extend(0, 1), TypeError, "sequences must be a list of numbers of sequences, got int"),
        (lambda c: c.extend([0], -1), ValueError, "tokens must be at least 0, got -1"),
        (lambda c: c.truncate(0, 5), ValueError, "length must be at most the sequence's, 4; got 5"),
        (lambda c: c.length(3), ValueError, "sequence must be one of the cache's"),
        (lambda c: c.attention(torch.zeros(1, 4, 1, WIDTH), [0], layer=2), ValueError, "layer must be below 2"),
        (lambda c: c.attention(torch.zeros(1, 4, 1, WIDTH), [0], cache_lengths=3), TypeError, "takes no cache"),
        (lambda c: c.write([0], *new_tokens(5)), ValueError,
         "k must have at most as many tokens as each sequence, 4; got 5"),
        (lambda c: c.write(c.fork(0), *new_tokens(1)), ValueError, "others share the last 1 of sequence 1"),
        (lambda c: paged(pages=0), ValueError, "pages must be at least 1, got 0"),
        (lambda c: paged(dtype=torch.int32), TypeError, "dtype must be float16, .* float8_e4m3fn, got torch.i"),
        (lambda c: paged(k_scale=0.1, v_scale=0.1), ValueError, "k_scale must be None for a cache of torch.f"),
        (lambda c: paged(dtype=torch.int8, k_scale=0.1), ValueError, "k_scale and v_scale must come together"),
        (lambda c: paged(dtype=torch.int8, k_scale=0, v_scale=1), ValueError, "k_scale must be positive and f"),
        (lambda c: paged(dtype=torch.int8, k_scale=torch.inf, v_scale=1), ValueError, "positive and finite"),
        (lambda c: paged(dtype=torch.int8, k_scale="1", v_scale=1), TypeError, "k_scale must be pos"),
        (lambda c: c.attention(torch.zeros(1, 4, 1, WIDTH), [0], k=[0], v=[0]), TypeError, "k must be a torch.Te"),
        (lambda c: c.write([0], *(t.half() for t in new_tokens(1))), TypeError, "k must have the cache"),
        (lambda c: c.write([0], *new_tokens(1), layer=2), ValueError, "layer must be below 2, got 2"),
        (lambda c: c.attention(torch.zeros(1, 4, 1, WIDTH), [0], k_scale=None), TypeError, "takes no k_scale"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Any, kind: type, words: str) -> None:
    cache = paged()
    cache.extend(cache.add(), 4)
    with pytest.raises(kind, match=words):
        call(cache)


def test_numpy_s_integers_name_a_sequence() -> None:
    cache = paged()
    (first, second) = cache.add(2)
    cache.free(np.int64(first))
    assert cache.sequences == [second]
