"""Memory for intermediate results that are computed again and again, batch by batch or tile by tile."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Memory by name, which every batch reuses: new memory for each batch would take as long as the computation on
    it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def empty(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if (name, shape) not in self._views:
            size = math.prod(shape)
            if name not in self._held or self._held[name].numel() < size:
                self._views.clear()  # views would keep the old memory alive
                self._held[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
            self._views[name, shape] = self._held[name][:size].view(shape)
        return self._views[name, shape]

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self.empty(name, len(a), a.shape[1], b.shape[2]))
