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
from fastattn.core.cache.definition import bounds, keys_and_values, of_rows, page_numbers, pages_of
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
    for rows, first, stop in _spans(spec.attention, _Copied.of(storage, tensors), tensors, q.shape[2]):
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
    """A call with one query a row and nothing that shapes scores. Where rows are of one length and without pages,
    it is one operator of PyTorch's, which at short lengths takes less time than finding that out."""

    key_heads: int
    group: int
    capacity: int
    spec: CacheSpec
    operator: Any  # what `portable.straight` returns
    of_one_query: Any  # its shorter way on a CPU where each query head has a key head of its own, or None

    @classmethod
    def of(cls, q: Tensor, storage: Storage, spec: CacheSpec) -> OneToken | None:
        """For calls without CacheTensors beside lengths and a table; None if they need more."""
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
        return cls(*heads, keys.shape[2], spec, operator, of_one_query)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Any, table: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """None if rows differ in length, see no key or are longer than the cache."""
        if table is not None:
            return self._of_pages(q, Storage(k, v), lengths, table)
        stop, left = lengths, self.spec.attention.left
        if isinstance(lengths, Tensor):
            stop = lengths.tolist()
            if type(stop) is list and stop.count(stop[0]) == len(stop):
                stop = stop[0]
        if type(stop) is not int or not 0 < stop <= self.capacity:
            return None
        first = 0 if left is None else max(0, stop - 1 - left)
        if stop - first < self.capacity:
            k, v = k[:, :, first:stop], v[:, :, first:stop]
        if self.of_one_query is not None:
            found: tuple[Tensor, Tensor] = self.of_one_query(q, k, v)
            return found
        batch, heads = q.shape[:2]
        out, lse = self.operator.forward(q.reshape(batch, self.key_heads, self.group, -1), k, v)
        return out.reshape(batch, heads, 1, -1), lse.reshape(batch, heads, 1)

    def _of_pages(self, q: Tensor, storage: Storage, lengths: Any, table: Tensor) -> tuple[Tensor, Tensor] | None:
        """None if lengths or pages are not what a check would let pass, or lengths are no tensor."""
        stops = lengths.tolist() if isinstance(lengths, Tensor) else None
        if type(stops) is not list or not 0 <= min(stops) <= max(stops) <= self.capacity * table.shape[1]:
            return None
        try:
            return _of_one_query(q, storage, self.spec, CacheTensors(lengths, None, table), self.operator)
        except IndexError:  # there is no such page: the check names it
            return None


def _of_one_query(
    q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors, straight: Any = None
) -> tuple[Tensor, Tensor]:
    """A single query is its row's last token, which sees all keys of its span. So there is no mask, and the query
    heads that share a key head become the queries of one head: keys are read once, not once for each of them.
    straight: what computes each part, if that is known."""
    (batch, heads), key_heads = q.shape[:2], storage.keys.shape[1]
    q = q[:, :, 0].unflatten(1, (key_heads, heads // max(key_heads, 1)))
    copied = _Copied.of(storage, tensors)
    spans = list(_spans(spec.attention, copied, tensors, 1))
    of_span = _OfSpan(q, storage, spec.attention, tensors, copied, spans, straight)
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
    """Attention of some rows to all of their keys from `first` to before `stop`, of which there are some. spans:
    all that it will be called for."""

    def __init__(
        self,
        q: Tensor,
        storage: Storage,
        spec: AttentionSpec,
        tensors: CacheTensors,
        copied: _Copied | None,
        spans: list[tuple[slice, int, int]],
        straight: Any,
    ) -> None:
        self.q, self.storage, self.tensors, self.copied = q, storage, tensors, copied
        self.every, self.straight, self.in_pages = _seeing_every_key(spec), straight, None
        if copied is not None and not storage.is_quantised:
            self.in_pages = _Pages(storage, tensors.block_table, copied, spans)

    def __call__(self, rows: slice, first: int, stop: int) -> tuple[Tensor, Tensor]:
        q = self.q if rows.stop - rows.start == len(self.q) else self.q[rows]
        pieces = [(first, stop)] if self.copied is None else self.copied.pieces(first, stop)
        return _merged([self._of_piece(q, rows, *piece) for piece in pieces])

    def _of_piece(self, q: Tensor, rows: slice, begin: int, end: int) -> tuple[Tensor, Tensor]:
        if self.in_pages is None:
            k, v = keys_and_values(self.storage, self.tensors, rows, begin, end, q.dtype)
        else:
            k, v = self.in_pages(rows, begin, end)
        if self.straight is None:
            # Neither rows nor the number of keys decide whether PyTorch's operator computes this.
            self.straight = portable.straight(q, k, v, self.every, False) or False
        if self.straight:
            out, lse = self.straight.forward(q, k, v)
            return out, lse
        return portable.forward(q, k, v, self.every, NO_TENSORS)


class _Pages:
    """Tokens out of pages, copied to memory that all parts of a call share: new memory for each would take longer
    than the copy."""

    def __init__(self, storage: Storage, table: Any, copied: _Copied, spans: list[tuple[slice, int, int]]) -> None:
        self.caches = [t for t in storage[:2] if t is not None]
        self.page = copied.page
        self.numbers = page_numbers(self.caches, table)
        counts = [
            (rows.stop - rows.start) * min(copied.most, copied.tokens(first, stop)) for rows, first, stop in spans
        ]
        tokens = max(counts, default=0)
        of_keys, *of_values = (t.shape[1] * t.shape[3] * tokens for t in self.caches)
        memory = storage.keys.new_empty(of_keys + sum(of_values))
        self.memory = memory, memory[of_keys:]

    def __call__(self, rows: slice, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """As `keys_and_values`."""
        before = first // self.page
        numbers = self.numbers[rows, :, before : -(-stop // self.page)].contiguous()
        found = [pages_of(t, numbers, memory) for t, memory in zip(self.caches, self.memory, strict=False)]
        first, stop = first - before * self.page, stop - before * self.page
        if first or stop < found[0].shape[2]:
            found = [t[:, :, first:stop] for t in found]
        return found[0], found[-1]


@functools.lru_cache(maxsize=64)
def _seeing_every_key(score_options: AttentionSpec) -> AttentionSpec:
    return replace(score_options, causal=False, window=(None, None))


class _Copied(NamedTuple):
    """How keys are copied that do not lie as they are read: whole pages of so many tokens, and how many tokens at
    most at a time."""

    page: int
    most: int

    @classmethod
    def of(cls, storage: Storage, tensors: CacheTensors) -> _Copied | None:
        """None if keys are read where they lie."""
        if tensors.block_table is None and not storage.is_quantised:
            return None
        page = 1 if tensors.block_table is None else storage.page
        elements = page * storage.keys.shape[1] * storage.keys.shape[3]
        return cls(page, page * max(1, COPIED // max(1, elements)))

    def tokens(self, first: int, stop: int) -> int:
        """How many tokens are copied for those of one row."""
        return (-(-stop // self.page) - first // self.page) * self.page

    def rows_at_once(self, first: int, stop: int) -> int:
        return max(1, self.most // max(1, self.tokens(first, stop)))

    def pieces(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The keys from `first` to before `stop`, in pieces that begin where those of every row do."""
        while first < stop:
            end = min(stop, first - first % self.most + self.most)
            yield first, end
            first = end


def _merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention to several sets of keys from the attention to each; summed in the log-sum-exp's dtype."""
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    by_part = torch.stack(lses, -1)
    lse = by_part.logsumexp(-1)
    # A row that sees nothing but scores of -inf pivots on 0: -inf minus -inf is NaN.
    weights = by_part.sub_(lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_()
    return functools.reduce(torch.add, map(torch.mul, outs, weights[..., None, :].unbind(-1))), lse


def _spans(
    spec: AttentionSpec, copied: _Copied | None, tensors: CacheTensors, queries: int
) -> Iterator[tuple[slice, int, int]]:
    """Neighbouring rows that see the same keys, from the first to before the last. Where keys are copied, as many
    rows as are copied at a time."""
    start = 0
    for (first, stop), group in itertools.groupby(bounds(tensors)):
        if spec.left is not None:
            first = min(max(first, stop - queries - spec.left), stop)
        last = start + len(list(group))
        step = last - start if copied is None else copied.rows_at_once(first, stop)
        for b in range(start, last, step):
            yield slice(b, min(b + step, last)), first, stop
        start = last
