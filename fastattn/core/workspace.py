"""Memory for intermediate results that a loop makes again and again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, a line of a cache


class Workspace:
    """Memory for the intermediate results of one turn of a loop, by name. Every turn reuses it: on a CPU, fetching
    new memory for each result takes as long as the computation on it.

    `reserved` bytes are fetched in one piece and shared out. The C library keeps such a piece for the next time;
    many pieces that add up to as much go back to the system.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, reserved: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self._reserved, self._used = torch.empty(reserved, dtype=torch.uint8, device=device), 0
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def empty(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        view = self._views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            if name not in self._held or self._held[name].numel() < size:
                self._views.clear()  # views would keep the old memory alive
                self._held[name] = self._fetched(size, dtype or self.dtype)
            view = self._views[name, shape] = self._held[name][:size].view(shape)
        return view

    def _fetched(self, size: int, dtype: torch.dtype) -> Tensor:
        first = -(-self._used // ALIGNMENT) * ALIGNMENT
        if (last := first + size * dtype.itemsize) > len(self._reserved):
            return torch.empty(size, dtype=dtype, device=self.device)
        self._used = last
        return self._reserved[first:last].view(dtype)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """(n, L, M) @ (n, M, N)."""
        return torch.bmm(a, b, out=self.empty(name, len(a), a.shape[1], b.shape[2]))
