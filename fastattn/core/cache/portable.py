"""Attention with a cache in plain PyTorch: each row reads its own keys, and no others.

Neighbouring rows of equal length are one call, unless calls are invariant.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastattn.core.attention import portable
from fastattn.core.attention.spec import NO_TENSORS, AttentionSpec
from fastattn.core.cache.definition import append, bounds, keys_and_values, of_rows
from fastattn.core.cache.spec import CacheSpec, CacheTensors, Storage
from fastattn.core.layout import zero_heads
from fastattn.ground.checks import lse_dtype

# Elements of keys that are copied out of pages at a time: beside as many of values, a cache holds them.
COPIED = 2**18

__all__ = ["append", "forward"]


def forward(q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors) -> tuple[Tensor, Tensor]:
    if spec.attention.invariant:
        return _row_by_row(q, storage, spec, tensors)
    shaped = any(t is not None for t in (tensors.alibi_slopes, tensors.sinks, tensors.tree_mask))
    if q.shape[2] == 1 and not shaped:
        return _of_one_query(q, storage, spec, tensors)
    out = zero_heads((*q.shape[:3], spec.value_width), q, q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    for rows, first, stop in _spans(spec.attention, tensors, q.shape[2]):
        k, v = keys_and_values(storage, tensors, rows, first, stop)
        keys = stop - first
        # Values that are columns of the keys come with all of these: at one width PyTorch's own kernel serves.
        scores, attention = of_rows(tensors, rows, keys), spec.attention.at(q.shape[2], keys)
        found, lse[rows] = portable.forward(q[rows], k, v, attention, scores)
        out[rows] = found[..., : spec.value_width]
    return out, lse


def _row_by_row(q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors) -> tuple[Tensor, Tensor]:
    """Each row as `fastattn.attention` computes it, from its first key that is not hidden on."""
    out = zero_heads((*q.shape[:3], spec.value_width), q, q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    for b, (first, stop) in enumerate(bounds(tensors)):
        rows = slice(b, b + 1)
        k, v = keys_and_values(storage, tensors, rows, first, stop)
        beside, v = of_rows(tensors, rows, stop - first), v[..., : spec.value_width]
        out[rows], lse[rows] = portable.forward(q[rows], k, v, spec.attention, beside)
    return out, lse


def _of_one_query(q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors) -> tuple[Tensor, Tensor]:
    """A single query is its row's last token, which sees all keys of its span. So there is no mask, and the query
    heads that share a key head become the queries of one head: keys are read once, not once for each of them."""
    (batch, heads), key_heads = q.shape[:2], storage.keys.shape[1]
    q = q[:, :, 0].unflatten(1, (key_heads, heads // max(key_heads, 1)))
    every = _seeing_every_key(spec.attention)
    spans = list(_spans(spec.attention, tensors, 1))
    if len(spans) == 1 and spans[0][1] < spans[0][2]:
        out, lse = _of_span(q, storage, every, tensors, *spans[0])
        out = out[..., : spec.value_width].to(q.dtype)
    else:
        out = q.new_zeros((*q.shape[:3], spec.value_width))
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=lse_dtype(q.dtype))
        for rows, first, stop in spans:
            if first < stop:
                found, lse[rows] = _of_span(q, storage, every, tensors, rows, first, stop)
                out[rows] = found[..., : spec.value_width]
    return out.reshape(batch, 1, heads, spec.value_width).transpose(1, 2), lse.reshape(batch, heads, 1)


def _of_span(
    q: Tensor, storage: Storage, every: AttentionSpec, tensors: CacheTensors, rows: slice, first: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Attention of some rows to all of their keys from `first` to before `stop`, of which there are some."""
    q = q if rows.stop - rows.start == len(q) else q[rows]

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        straight = None
        for begin, end in _pieces(storage, tensors, first, stop):
            k, v = keys_and_values(storage, tensors, rows, begin, end)
            # Whether PyTorch's operator computes this does not depend on the number of keys.
            straight = straight or portable.straight(q, k, v, every, False)
            yield portable.forward(q, k, v, every, NO_TENSORS) if straight is None else straight.forward(q, k, v)

    return functools.reduce(lambda total, more: _merged(*total, *more), parts())


@functools.lru_cache(maxsize=64)
def _seeing_every_key(score_options: AttentionSpec) -> AttentionSpec:
    return replace(score_options, causal=False, window=(None, None))


def _pieces(storage: Storage, tensors: CacheTensors, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """The keys from `first` to before `stop`. Where they are copied out of pages, in pieces of whole pages."""
    step = stop
    if tensors.block_table is not None:
        step = storage.page * max(1, COPIED // max(1, storage.keys[0].numel()))
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


def _spans(spec: AttentionSpec, tensors: CacheTensors, queries: int) -> Iterator[tuple[slice, int, int]]:
    """Neighbouring rows that see the same keys, from the first to before the last. With pages, each row alone."""
    start = 0
    for (first, stop), group in itertools.groupby(bounds(tensors)):
        if spec.left is not None:
            first = min(max(first, stop - queries - spec.left), stop)
        last = start + len(list(group))
        step = last - start if tensors.block_table is None else 1
        for b in range(start, last, step):
            yield slice(b, b + step), first, stop
        start = last
