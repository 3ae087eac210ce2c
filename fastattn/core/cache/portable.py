"""Attention with a cache in plain PyTorch: each row reads its own keys, and no others.

Neighbouring rows of equal length are one call, unless calls are invariant. Where a copy is needed, out of pages or
of dequantised numbers, it is made of a part at a time: of some keys of a row if there is one query, else of some
heads. Invariant calls copy a row.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.core.attention import portable
from fastattn.core.attention.spec import NO_TENSORS, AttentionSpec
from fastattn.core.cache import definition
from fastattn.core.cache.definition import bounds, keys_and_values, of_rows
from fastattn.core.cache.spec import CacheSpec, CacheTensors, Storage
from fastattn.core.layout import zero_heads
from fastattn.ground.checks import lse_dtype

# Elements of keys that are copied at a time: beside as many of values, a processor's cache holds them.
COPIED = 2**18

__all__ = ["append", "forward"]


def append(storage: Storage, k: Tensor, v: Tensor | None, tensors: CacheTensors) -> None:
    """Rows of one length without pages get their tokens by one copy."""
    ends = tensors.lengths.tolist()
    if tensors.block_table is not None or storage.is_quantised or ends.count(ends[0]) < len(ends):
        definition.append(storage, k, v, tensors)
        return
    places = slice(ends[0] - k.shape[2], ends[0])
    storage.keys[:, :, places].copy_(k)
    if v is not None and storage.values is not None:
        storage.values[:, :, places].copy_(v)


def forward(q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors) -> tuple[Tensor, Tensor]:
    if spec.attention.invariant:
        return _row_by_row(q, storage, spec, tensors)
    shaped = any(t is not None for t in (tensors.alibi_slopes, tensors.sinks, tensors.tree_mask))
    if q.shape[2] == 1 and not shaped:
        return _of_one_query(q, storage, spec, tensors)
    out = zero_heads((*q.shape[:3], spec.value_width), q, q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    for rows, first, stop in _spans(spec.attention, storage, tensors, q.shape[2]):
        keys = stop - first
        every, attention = of_rows(tensors, rows, keys), spec.attention.at(q.shape[2], keys)
        for key_heads, heads in _head_groups(q, storage, keys):
            k, v = keys_and_values(storage.of_heads(key_heads), tensors, rows, first, stop, q.dtype)
            slopes, sinks = (None if t is None else t[:, heads] for t in (every.alibi_slopes, every.sinks))
            scores = every._replace(alibi_slopes=slopes, sinks=sinks)
            # Values that are columns of the keys come with all of these: at one width PyTorch's own kernel serves.
            found, lse[rows, heads] = portable.forward(q[rows, heads], k, v, attention, scores)
            out[rows, heads] = found[..., : spec.value_width]
    return out, lse


def _row_by_row(q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors) -> tuple[Tensor, Tensor]:
    """Each row as `fastattn.attention` computes it, from its first key that is not hidden on."""
    out = zero_heads((*q.shape[:3], spec.value_width), q, q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    for b, (first, stop) in enumerate(bounds(tensors)):
        rows = slice(b, b + 1)
        k, v = keys_and_values(storage, tensors, rows, first, stop, q.dtype)
        beside, v = of_rows(tensors, rows, stop - first), v[..., : spec.value_width]
        out[rows], lse[rows] = portable.forward(q[rows], k, v, spec.attention, beside)
    return out, lse


def _head_groups(q: Tensor, storage: Storage, keys: int) -> Iterator[tuple[slice, slice]]:
    """Key heads and their query heads, as many at a time as are dequantised at once; all, if none is."""
    key_heads, width = storage.keys.shape[1], storage.keys.shape[3]
    group = q.shape[1] // max(key_heads, 1)
    step = max(1, COPIED // max(1, keys * width)) if storage.is_quantised else max(key_heads, 1)
    for first in range(0, key_heads, step):
        yield slice(first, first + step), slice(first * group, (first + step) * group)


class OneToken(NamedTuple):
    """A call with one query a row, no pages and nothing that shapes scores. Where rows are of one length, it is
    one operator of PyTorch's, which at short lengths takes less time than finding that out."""

    key_heads: int
    group: int
    capacity: int
    left: int | None
    operator: Any  # what `portable.straight` returns
    of_one_query: Any  # its shorter way on a CPU where each query head has a key head of its own, or None

    @classmethod
    def of(cls, q: Tensor, storage: Storage, spec: CacheSpec) -> OneToken | None:
        """For calls without CacheTensors beside lengths; None if they need more."""
        keys, values = storage.keys, storage.values
        if q.shape[2] != 1 or values is None or storage.is_quantised or q.numel() == 0:
            return None
        heads = keys.shape[1], q.shape[1] // keys.shape[1]
        operator = portable.straight(
            q.reshape(len(q), *heads, -1), keys, values, _seeing_every_key(spec.attention), False
        )
        if operator is None:
            return None
        of_one_query = getattr(operator, "of_one_query", None) if heads[1] == 1 else None
        return cls(*heads, keys.shape[2], spec.attention.left, operator, of_one_query)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Any) -> tuple[Tensor, Tensor] | None:
        """None if rows differ in length, see no key or are longer than the cache."""
        stop = lengths
        if isinstance(lengths, Tensor):
            stop = lengths.tolist()
            if type(stop) is list and stop.count(stop[0]) == len(stop):
                stop = stop[0]
        if type(stop) is not int or not 0 < stop <= self.capacity:
            return None
        first = 0 if self.left is None else max(0, stop - 1 - self.left)
        if stop - first < self.capacity:
            k, v = k[:, :, first:stop], v[:, :, first:stop]
        if self.of_one_query is not None:
            found: tuple[Tensor, Tensor] = self.of_one_query(q, k, v)
            return found
        batch, heads = q.shape[:2]
        out, lse = self.operator.forward(q.reshape(batch, self.key_heads, self.group, -1), k, v)
        return out.reshape(batch, heads, 1, -1), lse.reshape(batch, heads, 1)


def _of_one_query(q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors) -> tuple[Tensor, Tensor]:
    """A single query is its row's last token, which sees all keys of its span. So there is no mask, and the query
    heads that share a key head become the queries of one head: keys are read once, not once for each of them."""
    (batch, heads), key_heads = q.shape[:2], storage.keys.shape[1]
    q = q[:, :, 0].unflatten(1, (key_heads, heads // max(key_heads, 1)))
    every = _seeing_every_key(spec.attention)
    spans = list(_spans(spec.attention, storage, tensors, 1))
    of_span = _OfSpan(q, storage, every, tensors)
    if len(spans) == 1 and spans[0][1] < spans[0][2]:
        out, lse = of_span(*spans[0])
        out = out[..., : spec.value_width].to(q.dtype)
    else:
        out = q.new_zeros((*q.shape[:3], spec.value_width))
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=lse_dtype(q.dtype))
        for rows, first, stop in spans:
            if first < stop:
                found, lse[rows] = of_span(rows, first, stop)
                out[rows] = found[..., : spec.value_width]
    return out.reshape(batch, 1, heads, spec.value_width).transpose(1, 2), lse.reshape(batch, heads, 1)


class _OfSpan:
    """Attention of some rows to all of their keys from `first` to before `stop`, of which there are some."""

    def __init__(self, q: Tensor, storage: Storage, every: AttentionSpec, tensors: CacheTensors) -> None:
        self.q, self.storage, self.every, self.tensors = q, storage, every, tensors
        self.straight: Any = None

    def __call__(self, rows: slice, first: int, stop: int) -> tuple[Tensor, Tensor]:
        q = self.q if rows.stop - rows.start == len(self.q) else self.q[rows]
        parts = (self._of_piece(q, rows, *piece) for piece in _pieces(self.storage, self.tensors, first, stop))
        return functools.reduce(lambda total, more: _merged(*total, *more), parts)

    def _of_piece(self, q: Tensor, rows: slice, begin: int, end: int) -> tuple[Tensor, Tensor]:
        k, v = keys_and_values(self.storage, self.tensors, rows, begin, end, q.dtype)
        if self.straight is None:
            # Neither rows nor the number of keys decide whether PyTorch's operator computes this.
            self.straight = portable.straight(q, k, v, self.every, False) or False
        if self.straight:
            out, lse = self.straight.forward(q, k, v)
            return out, lse
        return portable.forward(q, k, v, self.every, NO_TENSORS)


@functools.lru_cache(maxsize=64)
def _seeing_every_key(score_options: AttentionSpec) -> AttentionSpec:
    return replace(score_options, causal=False, window=(None, None))


def _pieces(storage: Storage, tensors: CacheTensors, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """The keys from `first` to before `stop`. Where they are copied, in pieces: of whole pages, if there are."""
    step = stop
    if tensors.block_table is not None or storage.is_quantised:
        page = 1 if tensors.block_table is None else storage.page
        step = page * max(1, COPIED // max(1, page * storage.keys.shape[1] * storage.keys.shape[3]))
    while first < stop:
        end = min(stop, first - first % step + step)
        yield first, end
        first = end


def _merged(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from the attention to each; summed in the log-sum-exp's dtype."""
    both = torch.logaddexp(lse, more_lse)
    # A row that sees nothing but scores of -inf pivots on 0: -inf minus -inf is NaN.
    pivot = both.masked_fill(both == float("-inf"), 0.0)
    return (lse - pivot).exp()[..., None] * out + (more_lse - pivot).exp()[..., None] * more, both


def _spans(
    spec: AttentionSpec, storage: Storage, tensors: CacheTensors, queries: int
) -> Iterator[tuple[slice, int, int]]:
    """Neighbouring rows that see the same keys, from the first to before the last. Where keys are copied, each row
    alone."""
    alone = tensors.block_table is not None or storage.is_quantised
    start = 0
    for (first, stop), group in itertools.groupby(bounds(tensors)):
        if spec.left is not None:
            first = min(max(first, stop - queries - spec.left), stop)
        last = start + len(list(group))
        step = 1 if alone else last - start
        for b in range(start, last, step):
            yield slice(b, b + step), first, stop
        start = last
