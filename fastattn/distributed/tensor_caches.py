"""`fastattn.attention_with_cache` of DTensors: rows or heads are shared out, see tensors.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastattn.core import spread
from fastattn.core.cache.functional import attention_with_cache
from fastattn.distributed.tensors import BATCH, HEADS, sharded_dim, split_of


def with_cache(given: Any, options: dict[str, Any]) -> Any:
    """Each rank writes to its part of the cache and reads it. given: a core.cache.functional.Given."""
    q, caches = given.q, _caches(given)
    kinds = [_shared(given, caches, dimension) for dimension in range(q.device_mesh.ndim)]
    split = split_of(q, kinds, {BATCH: 0, HEADS: 1}, ())
    if BATCH in kinds and given.block_table is not None:
        raise ValueError("block_table must be None if the batch is shared out, since each page may hold any row")
    _check_heads(given, kinds)
    own: dict[str, Any] = {name: t.to_local() for name, t in (("q", q), *caches.items())}
    of_rows = {"cache_lengths": 1, "cache_starts": 1, "tree_mask": 3, "cos": 3, "sin": 3}
    for name, t in given._asdict().items():
        if name in own or t is None:
            continue
        t, dims = torch.tensor(t, device=q.device) if isinstance(t, list | tuple) else t, {}
        if isinstance(t, Tensor) and t.dim() == of_rows.get(name):
            dims = {BATCH: 0}
        elif name in ("alibi_slopes", "sinks"):
            dims = {HEADS: -1, **({BATCH: 0} if t.dim() == 2 else {})}
        own[name] = split.local(name, t, dims)
    results = attention_with_cache(**{"v_cache": None, **own}, **options)
    out, *lse = results if isinstance(results, tuple) else (results,)
    dims = {BATCH: 0, HEADS: 1}
    whole = split.whole(out, (*q.shape[:3], out.shape[3]), dims)
    return (whole, split.whole(lse[0], q.shape[:3], dims)) if lse else whole


def _caches(given: Any) -> dict[str, Any]:
    """The caches, their scales and what is written. Dimensions 0 and 1 of all are batch and heads."""
    names = ("k_cache", "v_cache", "k_scale", "v_scale", "k", "v")
    found = {name: t for name in names if (t := getattr(given, name)) is not None}
    mesh = given.q.device_mesh
    for name, t in found.items():
        if not isinstance(t, DTensor) or t.device_mesh != mesh:
            raise TypeError(f"{name} must be a DTensor on q's mesh, since q is one; got {type(t).__name__}")
    return found


def _shared(given: Any, caches: dict[str, Any], dimension: int) -> str | None:
    """What a dimension of the mesh shares out."""
    placed = sharded_dim(given.q, dimension)
    others = {sharded_dim(t, dimension) for t in caches.values()}
    if placed in (0, 1, None) and others == {placed}:
        return {0: BATCH, 1: HEADS, None: None}[placed]
    if placed == 1 and others == {None} and given.k_cache.shape[1] == 1:
        return HEADS
    placements = ", ".join(f"{name} {t.placements}" for name, t in (("q", given.q), *caches.items()))
    raise ValueError(
        "q, the caches and the new keys and values must all be sharded by batch, all by heads, or all be "
        f"replicated; with one key head, q alone may be sharded by heads. Got {placements}"
    )


def _check_heads(given: Any, kinds: list[str | None]) -> None:
    ranks, heads, keys = 1, given.q.shape[1], given.k_cache.shape[1]
    for dimension, kind in enumerate(kinds):
        ranks *= given.q.device_mesh.size(dimension) if kind == HEADS else 1
    if heads % ranks or (keys % ranks and keys != 1):
        raise ValueError(
            f"{heads} query heads and {keys} key heads cannot be shared out over {ranks} ranks equally"
        )


spread.of_dtensors["attention_with_cache"] = with_cache
