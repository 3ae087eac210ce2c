"""Statistics of some queries alone: which, and how values for them and for all queries turn into one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.ground import arguments
from fastattn.ground.checks import shape_of


class Queries:
    """Those of `length` queries that are asked for: a slice, or int64 indices, each once."""

    def __init__(self, chosen: slice | Tensor, length: int) -> None:
        self.chosen, self.length = chosen, length

    @property
    def count(self) -> int:
        return len(self.chosen) if isinstance(self.chosen, Tensor) else self.chosen.stop - self.chosen.start

    @property
    def rows(self) -> tuple[int, int]:
        """The first query that is asked for, and the one after the last."""
        if isinstance(self.chosen, slice):
            return self.chosen.start, self.chosen.stop
        return (int(self.chosen.min()), int(self.chosen.max()) + 1) if len(self.chosen) else (0, 0)

    def of(self, t: Tensor, dim: int = -1) -> Tensor:
        """From values for all queries to values for those asked for, in the order in which they were given."""
        if isinstance(self.chosen, Tensor):
            return t.index_select(dim, self.chosen.to(t.device))
        if (self.chosen.start, self.chosen.stop) == (0, self.length):
            return t
        return t.narrow(dim, self.chosen.start, self.count)

    def spread(self, values: Tensor, other: float) -> Tensor:
        """From values (..., queries asked for) to values (..., all queries); the other queries get `other`."""
        every = values.new_full((*values.shape[:-1], self.length), other)
        if isinstance(self.chosen, Tensor):
            return every.index_copy_(-1, self.chosen.to(values.device), values)
        every[..., self.chosen] = values
        return every

    def only(self, lse: Tensor) -> Tensor:
        """The log-sum-exps, +inf for queries that are not asked for: then all of their weights are 0."""
        if self.count == self.length:
            return lse
        return self.spread(self.of(lse), float("inf"))


def check_queries(queries: slice | Tensor | Sequence[int] | None, length: int) -> slice | Tensor:
    """Which queries: a slice of positive step 1 within the length, or int64 indices on the CPU, each once."""
    if queries is None:
        return slice(0, length)
    if isinstance(queries, slice):
        start, stop, step = queries.indices(length)
        if step == 1:
            return slice(start, max(start, stop))
        return torch.arange(length)[queries] if step > 0 else torch.tensor(range(start, stop, step))
    what = "queries must be a slice or integers (n,)"
    indices = arguments.integers("queries", queries)
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{what}, got a tensor of shape {shape_of(indices)}, {indices.dtype}")
    indices = indices.to("cpu", torch.int64)
    if len(indices) and not -length <= int(indices.min()) <= int(indices.max()) < length:
        raise ValueError(f"queries must be from {-length} to {length - 1}, got {_range(indices)}")
    indices = indices % max(length, 1)
    if len(indices.unique()) < len(indices):
        raise ValueError("queries must be each there once, got some of them twice")
    return indices


def _range(indices: Tensor) -> str:
    return f"{int(indices.min())} to {int(indices.max())}"
