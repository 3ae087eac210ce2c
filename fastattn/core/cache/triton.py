"""The way from a spec to the launchers of the kernels, and nothing else."""

from __future__ import annotations

from torch import Tensor

from fastattn.core.cache.spec import CacheSpec, CacheTensors, Storage, capacity_of
from fastattn.kernels import cache as _cache
from fastattn.kernels import invariant as _invariant


def append(storage: Storage, k: Tensor, v: Tensor | None, tensors: CacheTensors) -> None:
    _cache.cache_append(storage, k, v, tensors)


def forward(q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors) -> tuple[Tensor, Tensor]:
    if spec.attention.invariant:
        capacity = capacity_of(storage.keys, tensors.block_table) if len(storage.keys) else 0
        return _invariant.invariant_cache_attention(q, storage, spec, tensors, capacity)
    return _cache.cache_attention(q, storage, spec, tensors)
