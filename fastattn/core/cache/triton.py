"""The way from a spec to the launchers of the kernels, and nothing else."""

from __future__ import annotations

from torch import Tensor

from fastattn.core.cache.definition import append
from fastattn.core.cache.spec import CacheSpec, CacheTensors, Storage

__all__ = ["append", "forward"]


def forward(q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
