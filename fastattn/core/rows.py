"""Products with weights a fixed number of rows at a time, so that a row's bits do not depend on the others.

Libraries choose how to compute a product by its sizes, and a matrix times a vector in another way than a matrix
times a matrix. So under `fastattn.invariant` every product has the same number of rows. What is missing is zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core import invariance
from fastattn.ground.checks import check_input

# On a GPU, so many rows take as long to compute as to read the weights. On a CPU few rows make single tokens
# cheap, and long prompts still come near to the full speed.
ROWS, ROWS_ON_CPU = 256, 32
# A loss reads all of its classes for each group of rows.
ROWS_OF_LOSS = 256
# A CPU's library of products takes rows that begin on no multiple of so many bytes in another order of sums.
ALIGNED = 16
# PyTorch computes functions of each element by vectors, on a CPU: so many elements at a time at most. What remains
# at the end of a thread's part it computes without, and has other last bits. Fewer elements than these are one
# thread's.
VECTORS, ONE_THREAD = 64, 32768


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x); under `fastattn.invariant` a fixed number of rows of x at a time.

    For layers that are not fastattn's, as torch.nn.Linear: the bits of a row then do not depend on how many rows
    there are. fastattn.nn does so by itself.

    Args:
        function: from (n, d) to (n, out), each row for itself: a layer, or several without anything that joins
            rows. Under `fastattn.invariant` it is called several times, the last time with zeros behind x's rows.
        x: (..., d).

    Returns:
        (..., out), differentiable as `function` is.

    Raises:
        TypeError, ValueError: function cannot be called; x is no tensor of floats, or has no dimensions.

    Example:
        >>> layer, x = torch.nn.Linear(64, 100), torch.randn(2, 300, 64)
        >>> with fastattn.invariant():
        ...     every, one = fastattn.by_rows(layer, x), fastattn.by_rows(layer, x[1, 7])
        >>> torch.equal(every[1, 7], one)
        True
    """
    if not callable(function):
        raise TypeError(f"function must be a function or a module, got {type(function).__name__}")
    check_input(x)
    return rows_of_layers(function, x)


def rows_of_layers(function: Callable[[Tensor], Tensor], x: Tensor, hidden: int = VECTORS) -> Tensor:
    """`by_rows` of x (..., d); between its layers are functions of each of `hidden` neurons."""
    if not invariance.wanted():
        return function(x)
    if x.is_nested:
        raise ValueError("invariant must be False for a nested tensor, which has no fixed number of rows")
    if not x.numel():
        return function(x)
    count = rows_at_once(x, hidden)
    y = in_rows(lambda rows: function(*rows), (x.reshape(math.prod(x.shape[:-1]), x.shape[-1]),), count)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, by rows."""
    return rows_of_layers(lambda rows: F.linear(rows, weight, bias), x)


def rows_at_once(x: Tensor, hidden: int = VECTORS) -> int:
    """How many rows of x a layer takes that has `hidden` neurons. On a CPU a row must have the same bits in every
    place; where it would not, rows are taken one by one."""
    if x.device.type != "cpu":
        return ROWS
    if x.element_size() > 2 and any(width * x.element_size() % ALIGNED for width in (x.shape[-1], hidden)):
        return 1
    return next((n for n in range(ROWS_ON_CPU, 1024, ROWS_ON_CPU) if _has_no_remainder(n, hidden)), 1)


def _has_no_remainder(rows: int, hidden: int) -> bool:
    """Whether functions of each element of (rows, hidden) leave no thread of a CPU a remainder of its vectors."""
    elements = rows * hidden
    if elements <= ONE_THREAD or torch.get_num_threads() == 1:
        return elements % VECTORS == 0
    threads = min(torch.get_num_threads(), -(-elements // ONE_THREAD))
    return hidden % VECTORS == 0 and -(-elements // threads) % VECTORS == 0


def in_rows(function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor], count: int) -> Tensor:
    """`function` of `count` rows of each of these tensors (T, ...) at a time, one result (T, ...). It gets copies,
    and the gradients of its results are copies, too: all of one layout, whatever the caller's is."""
    rows = len(tensors[0])
    if count == 1 and rows > 1:
        # Each in memory of its own, so that all are aligned alike.
        return torch.cat([in_rows(function, each, 1) for each in zip(*(t.split(1) for t in tensors), strict=True)])
    missing = -rows % count
    padded = [F.pad(t, (0, 0) * (t.dim() - 1) + (0, missing)) if missing else _copy(t) for t in tensors]
    with invariance.invariant(False):
        parts = [function(part) for part in zip(*(t.split(count) for t in padded), strict=True)]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if torch.is_grad_enabled():
        # Its gradient is new and contiguous, whatever the layout of what comes from above.
        return whole.index_select(0, torch.arange(rows, device=whole.device))
    return whole[:rows]


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)
