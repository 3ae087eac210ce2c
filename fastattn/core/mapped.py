"""Rules for torch.func.vmap: the mapped dimension is merged into the batch dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def fold(size: int, dims: Sequence, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Merge the mapped dimension of each tensor into its batch dimension; a tensor that is not mapped is repeated.
    A mask's lists (1-D int64) have no batch dimension and stay as they are: they are repeated where they are
    read."""
    folded = []
    for dim, t in zip(dims, tensors, strict=True):
        if t is not None and not (t.dim() == 1 and t.dtype == torch.int64):
            t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            t = t.flatten(0, 1)
        folded.append(t)
    return folded


def unfold(size: int, results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.unflatten(0, (size, t.shape[0] // size)) for t in results)


def shares_batch(dims: Sequence, arguments: Sequence, q: int, biases: Sequence[int]) -> bool:
    """Whether a bias has batch size 1 in a batch of several: then samples cannot be merged into a larger batch."""

    def batch(i: int) -> int:
        return arguments[i].shape[0 if dims[i] is None or dims[i] > 0 else 1]

    return any(arguments[i] is not None and batch(i) != batch(q) for i in biases)


def one_by_one(
    operator: Callable, size: int, dims: Sequence, arguments: Sequence
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call for each index of the mapped dimension."""
    if not size:
        return of_none(operator, dims, arguments)
    results = []
    for i in range(size):
        chosen = (a.select(dim, i) if isinstance(dim, int) else a for dim, a in zip(dims, arguments, strict=True))
        results.append(operator(*chosen))
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])


def of_none(operator: Callable, dims: Sequence, arguments: Sequence) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Results of a mapped dimension of size 0: no results, each of the shape that one call gives."""
    one = (
        a.new_zeros((*a.shape[:dim], *a.shape[dim + 1 :])) if isinstance(dim, int) else a
        for dim, a in zip(dims, arguments, strict=True)
    )
    results = operator(*one)
    return tuple(t.new_empty((0, *t.shape)) for t in results), (0,) * len(results)
