"""Attention with a cache in plain PyTorch, row by row: the oracle of the tests and the reference backend.

A row's keys and values are taken out of the cache, and `fastattn.core.attention.definition` does the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.core.attention import definition
from fastattn.core.attention.spec import ScoreTensors
from fastattn.core.cache.spec import CacheSpec, CacheTensors, Storage, slots_of
from fastattn.core.layout import heads_last, zero_heads
from fastattn.ground.checks import lse_dtype


def append(storage: Storage, k: Tensor, v: Tensor | None, tensors: CacheTensors) -> None:
    """Write the new keys and values (B, Hkv, new, width) to the ends of their rows, whose lengths count them."""
    pages, places = slots_of(storage.keys, tensors, k.shape[2])
    for cache, new in ((storage.keys, k), (storage.values, v)):
        if cache is not None and new is not None:
            cache[pages, :, places] = new.transpose(1, 2)


def forward(q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Lq, Dv) and the log-sum-exp (B, Hq, Lq)."""
    out = zero_heads((*q.shape[:3], spec.value_width), q, q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    for b, (first, stop) in enumerate(bounds(tensors)):
        rows = slice(b, b + 1)
        k, v = keys_and_values(storage, tensors, rows, first, stop)
        scores = of_rows(tensors, rows, stop - first)
        v = v[..., : spec.value_width]
        out[rows], lse[rows] = definition.attention(q[rows], k, v, spec.attention, scores)
    return heads_last(out), lse


def bounds(tensors: CacheTensors) -> list[tuple[int, int]]:
    """From which key to before which one each row sees."""
    stops = tensors.lengths.tolist()
    if tensors.starts is None:
        return [(0, stop) for stop in stops]
    return [(min(max(start, 0), stop), stop) for start, stop in zip(tensors.starts.tolist(), stops, strict=True)]


def keys_and_values(
    storage: Storage, tensors: CacheTensors, rows: slice, first: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Tokens `first` to `stop` of some rows, (rows, Hkv, tokens, width); of one row if there is a table. Values
    that are columns of the keys come with all columns."""
    k = _tokens(storage.keys, tensors.block_table, rows, first, stop)
    return k, k if storage.values is None else _tokens(storage.values, tensors.block_table, rows, first, stop)


def _tokens(cache: Tensor, table: Tensor | None, rows: slice, first: int, stop: int) -> Tensor:
    """Only the pages that hold the tokens are read."""
    if table is None:
        return cache[rows, :, first:stop]
    page = cache.shape[2]
    before = first // page
    found = _pages(cache, table[rows.start, before : -(-stop // page)].long())
    return found[:, :, first - before * page : stop - before * page]


def _pages(cache: Tensor, pages: Tensor) -> Tensor:
    """These pages one after another: (1, Hkv, tokens, width). One copy, whether heads or tokens come first in
    memory."""
    _, heads, page, width = cache.shape
    if cache.is_contiguous():
        blocks = pages * heads + torch.arange(heads, device=pages.device)[:, None]
        return cache.view(-1, page * width).index_select(0, blocks.flatten()).view(1, heads, -1, width)
    return cache.transpose(1, 2).index_select(0, pages).flatten(0, 1).transpose(0, 1)[None]


def of_rows(tensors: CacheTensors, rows: slice, keys: int) -> ScoreTensors:
    """What shapes the scores of some rows' last keys."""
    slopes, sinks = (None if t is None else t[rows] for t in (tensors.alibi_slopes, tensors.sinks))
    return ScoreTensors(alibi_slopes=slopes, sinks=sinks, bias=_seen(tensors, rows, keys))


def _seen(tensors: CacheTensors, rows: slice, keys: int) -> Tensor | None:
    """bool (rows, 1, Lq, keys): which of the last keys the tree mask lets be seen; None for all. Its columns are
    the last keys; where there are fewer, its first columns belong to no key."""
    if tensors.tree_mask is None:
        return None
    tree = tensors.tree_mask[rows]
    tree = tree[:, :, max(0, tree.shape[2] - keys) :]
    return torch.cat((tree.new_ones(*tree.shape[:2], keys - tree.shape[2]), tree), 2)[:, None]
