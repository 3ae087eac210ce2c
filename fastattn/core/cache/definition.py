"""Attention with a cache in plain PyTorch, row by row: the oracle of the tests and the reference backend.

A row's keys and values are taken out of the cache, and `fastattn.core.attention.definition` does the rest.

A number x is quantised to the number of the cache's dtype that is nearest to x / scale, ties to even; beyond the
dtype's largest number to that one. The scale of a token's head is its largest magnitude over the dtype's largest
number, so that none is beyond. A number moves by at most scale / 2 in int8; in fp8 by a sixteenth of itself, or
scale / 1024 where that is more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.core.attention import definition
from fastattn.core.attention.spec import ScoreTensors
from fastattn.core.cache.spec import INT8, LARGEST, CacheSpec, CacheTensors, Storage, slots_of
from fastattn.core.layout import heads_last, zero_heads
from fastattn.ground.checks import lse_dtype


def append(storage: Storage, k: Tensor, v: Tensor | None, tensors: CacheTensors) -> None:
    """Write the new keys and values (B, Hkv, new, width) to the ends of their rows, whose lengths count them."""
    pages, places = slots_of(storage.keys, tensors, k.shape[2])
    for cache, scales, new in ((storage.keys, storage.k_scale, k), (storage.values, storage.v_scale, v)):
        if cache is None or new is None:
            continue
        new = new.transpose(1, 2)
        if scales is not None:
            if scales.dim() == 3:
                scale = scales[pages, :, places] = scale_of(new, cache.dtype)
            else:
                scale = scales[pages]
            new = as_bytes(quantised(new, scale, cache.dtype))
        as_bytes(cache)[pages, :, places] = new


# The least scale: the smallest normal number of float32, so that a scale is never 0 and loses no digits.
LEAST = torch.finfo(torch.float32).tiny
# What stands for NaN in int8, where a page has a scale of its own. A token's scale is NaN itself.
NO_NUMBER = -128


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of each row of x (..., width), fp32 (...): the largest magnitude becomes the dtype's largest."""
    return (x.abs().amax(-1).float() / LARGEST[dtype]).clamp_min(LEAST)


def quantised(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., width) over scale (...), in the dtype of a cache. A scale that is not positive gives NaN."""
    scale = scale.where(scale > 0, float("nan"))
    x = (x.float() / scale[..., None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    return x.round().nan_to_num(nan=NO_NUMBER).to(dtype) if dtype == INT8 else x.to(dtype)


def dequantised(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What quantised x (..., width) stands for: times scale (...), computed in at least fp32."""
    work = lse_dtype(dtype)
    numbers = x.to(work)
    if x.dtype == INT8:
        numbers = numbers.masked_fill(x == NO_NUMBER, float("nan"))
    return numbers.mul_(scale.to(work)[..., None]).to(dtype)


def as_bytes(t: Tensor) -> Tensor:
    """fp8 as bytes, which every operator can move."""
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t


def forward(q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Lq, Dv) and the log-sum-exp (B, Hq, Lq)."""
    out = zero_heads((*q.shape[:3], spec.value_width), q, q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    for b, (first, stop) in enumerate(bounds(tensors)):
        rows = slice(b, b + 1)
        k, v = keys_and_values(storage, tensors, rows, first, stop, q.dtype)
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
    storage: Storage, tensors: CacheTensors, rows: slice, first: int, stop: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Tokens `first` to `stop` of some rows, (rows, Hkv, tokens, width). Values that are columns of the keys come
    with all columns. What is quantised comes in `dtype`."""

    def tokens(cache: Tensor, scales: Tensor | None) -> Tensor:
        found = _tokens(cache, tensors.block_table, rows, first, stop)
        if scales is None:
            return found
        scales = scales if scales.dim() == 3 else scales[:, :, None].expand(cache.shape[:3])
        return dequantised(
            found, _tokens(scales[..., None], tensors.block_table, rows, first, stop)[..., 0], dtype
        )

    k = tokens(storage.keys, storage.k_scale)
    return k, k if storage.values is None else tokens(storage.values, storage.v_scale)


def _tokens(cache: Tensor, table: Tensor | None, rows: slice, first: int, stop: int) -> Tensor:
    """Only the pages that hold the tokens are read."""
    if table is None:
        return cache[rows, :, first:stop]
    page = cache.shape[2]
    before = first // page
    found = pages_of(cache, page_numbers((cache,), table[rows, before : -(-stop // page)]))
    return found[:, :, first - before * page : stop - before * page]


def page_numbers(caches: Sequence[Tensor], table: Tensor) -> Tensor:
    """Pages (rows, n) as `pages_of` takes them. Where heads come first in memory, (rows, Hkv, n): the parts of
    each head. Else, in one of these caches, (rows, 1, n)."""
    table = table[:, None]
    if not all(cache.is_contiguous() for cache in caches):
        return table
    heads = caches[0].shape[1]
    return torch.add(torch.arange(heads, device=table.device)[:, None], table, alpha=heads)


def pages_of(cache: Tensor, numbers: Tensor, memory: Tensor | None = None) -> Tensor:
    """Some pages of each row one after another: (rows, Hkv, tokens, width). One copy, whether heads or tokens come
    first in memory. memory: (elements,), where the copy is put if given."""
    (rows, parts, _), (_, heads, page, width) = numbers.shape, cache.shape
    dtype, cache = cache.dtype, as_bytes(cache)
    by_head = parts == heads and cache.is_contiguous()
    every = cache.view(-1, page * width) if by_head else cache.transpose(1, 2)
    if memory is not None:
        shape = numbers.numel(), *every.shape[1:]
        memory = memory[: math.prod(shape)].view(shape)
    found = torch.index_select(every, 0, numbers.flatten(), out=memory).view(dtype)
    return found.view(rows, heads, -1, width) if by_head else found.view(rows, -1, heads, width).transpose(1, 2)


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
