"""Products with weights a fixed number of rows at a time, so that a row's bits do not depend on the others.

Libraries choose how to compute a product by its sizes, and a matrix times a vector in another way than a matrix
times a matrix. So under `fastattn.invariant` every product has the same number of rows. What is missing is zeros.
Where the products are known, and a trial shows that this CPU gives a row the same bits among fewer and among more
rows, a few rows are computed with fewer zeros, and many rows more at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core import invariance
from fastattn.core.autocast import without_autocast
from fastattn.ground.checks import check_input, lse_dtype
from fastattn.ground.modes import outside_modes

# On a GPU, so many rows take as long to compute as to read the weights. On a CPU few rows make single tokens
# cheap, and long prompts still come near to the full speed.
ROWS, ROWS_ON_CPU = 256, 32
# A CPU takes so many where `_same_bits` says that it may.
FEW_ROWS, MANY_ROWS = (4, 8, 16), 256
# Weights with more elements than these are not tried: it takes as much memory once more.
MOST_TRIED = 2**26
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


def rows_of_layers(
    function: Callable[[Tensor], Tensor], x: Tensor, hidden: int = VECTORS, weights: Sequence[Tensor] = ()
) -> Tensor:
    """`by_rows` of x (..., d); between its layers are functions of each of `hidden` neurons. weights: of all of
    its products, if they are known."""
    if not invariance.wanted():
        return function(x)
    if x.is_nested:
        raise ValueError("invariant must be False for a nested tensor, which has no fixed number of rows")
    if not x.numel():
        return function(x)
    if type(function) is torch.nn.Linear:
        weights = (function.weight,)
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    known = () if torch.is_autocast_enabled(x.device.type) else weights
    y = in_rows(lambda rows: function(*rows), (tokens,), sizes_of_parts(tokens, hidden, known))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, by rows."""
    return rows_of_layers(lambda rows: F.linear(rows, weight, bias), x, weights=(weight,))


def sizes_of_parts(x: Tensor, hidden: int, weights: Sequence[Tensor] = ()) -> list[int]:
    """How many rows of x (T, d) a layer that has `hidden` neurons takes at a time, the last ones with zeros behind
    them. weights: (out, in), of all of its products, in x's dtype, if they are known."""
    rows, count = len(x), rows_at_once(x, hidden)
    shapes = tuple((w.shape[0], w.shape[1]) for w in weights)
    plain = all(type(w) in (Tensor, torch.nn.Parameter) and w.is_contiguous() for w in weights)
    sizes: list[int] = []

    def may_take(other: int) -> bool:
        known = shapes and plain and count > 1 and x.device.type == "cpu"
        return bool(known) and _may_take(other, count, hidden, shapes, x.dtype)

    if rows >= MANY_ROWS and may_take(MANY_ROWS):
        sizes += [MANY_ROWS] * (rows // MANY_ROWS)
    whole, left = divmod(rows - sum(sizes), count)
    sizes += [count] * whole
    last = next((n for n in FEW_ROWS if left <= n and may_take(n)), count)
    return sizes + [last] * bool(left)


def few_rows_of_loss(x: Tensor, weight: Tensor, widths: Sequence[int]) -> int:
    """How many rows a loss may take where they are fewer than ROWS_OF_LOSS. widths: classes of its tiles.
    Functions of each row leave no remainder of vectors, and a trial shows equal bits."""
    if type(weight) not in (Tensor, torch.nn.Parameter) or not weight.is_contiguous() or x.device.type != "cpu":
        return ROWS_OF_LOSS
    agrees = all(
        _may_take(VECTORS, ROWS_OF_LOSS, width, ((width, x.shape[1]),), lse_dtype(x.dtype)) for width in widths
    )
    return VECTORS if agrees else ROWS_OF_LOSS


def _may_take(
    other: int, count: int, hidden: int, shapes: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> bool:
    """Whether a row has the same bits among so many others as among `count` rows."""
    threads = torch.get_num_threads()
    return has_no_remainder(other, hidden, threads) and all(
        _same_bits(other, count, *shape, dtype, threads, torch.get_float32_matmul_precision()) for shape in shapes
    )


_may_take._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def _same_bits(
    rows: int, others: int, out: int, width: int, dtype: torch.dtype, threads: int, precision: str
) -> bool:
    """Whether this CPU gives a row the same bits among so many rows and so many others, with so many threads and
    at this precision of torch's, in a layer and in the gradient of its input: tried once with random numbers,
    since the order of their sums depends on sizes alone."""
    if out * width > MOST_TRIED:
        return False
    more, fewer = max(rows, others), min(rows, others)
    given: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "dtype": dtype, "device": "cpu"}
    with outside_modes(), torch.no_grad(), without_autocast(torch.device("cpu")):
        weight, bias = torch.randn(out, width, **given), torch.randn(out, **given)
        x, dy = torch.randn(more, width, **given), torch.randn(more, out, **given)
        products: tuple[tuple[Tensor, Callable[[Tensor], Tensor]], ...] = (
            (x, lambda t: F.linear(t, weight)),
            (x, lambda t: F.linear(t, weight, bias)),
            (dy, lambda t: t @ weight),
        )
        for t, product in products:
            whole = product(t)
            for part in (slice(0, fewer), slice(more - fewer, more)):
                if not torch.equal(product(_copy(t[part])), whole[part]):
                    return False
    return True


def rows_at_once(x: Tensor, hidden: int = VECTORS) -> int:
    """How many rows of x a layer takes that has `hidden` neurons. On a CPU a row must have the same bits in every
    place; where it would not, rows are taken one by one."""
    if x.device.type != "cpu":
        return ROWS
    if x.element_size() > 2 and any(width * x.element_size() % ALIGNED for width in (x.shape[-1], hidden)):
        return 1
    return _rows_without_remainder(hidden)


def _rows_without_remainder(hidden: int) -> int:
    threads = torch.get_num_threads()
    return next((n for n in range(ROWS_ON_CPU, 1024, ROWS_ON_CPU) if has_no_remainder(n, hidden, threads)), 1)


# A compiler cannot trace the number of threads.
_rows_without_remainder._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_no_remainder(rows: int, hidden: int, threads: int) -> bool:
    """Whether functions of each element of (rows, hidden) leave none of these threads of a CPU a remainder of its
    vectors."""
    elements = rows * hidden
    if elements <= ONE_THREAD or threads == 1:
        return elements % VECTORS == 0
    threads = min(threads, -(-elements // ONE_THREAD))
    return hidden % VECTORS == 0 and -(-elements // threads) % VECTORS == 0


def in_rows(
    function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """`function` of so many rows of each of these tensors (T, ...) at a time, one result (T, ...). It gets copies,
    and the gradients of its results are copies, too: all of one layout, whatever the caller's is."""
    rows = len(tensors[0])
    if len(sizes) > 1 == max(sizes):
        # Each in memory of its own, so that all are aligned alike.
        return torch.cat(
            [in_rows(function, each, (1,)) for each in zip(*(t.split(1) for t in tensors), strict=True)]
        )
    missing = sum(sizes) - rows
    padded = [F.pad(t, (0, 0) * (t.dim() - 1) + (0, missing)) if missing else _copy(t) for t in tensors]
    with invariance.invariant(False):
        parts = [function(part) for part in zip(*(t.split(list(sizes)) for t in padded), strict=True)]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if torch.is_grad_enabled():
        # Its gradient is new and contiguous, whatever the layout of what comes from above.
        return whole.index_select(0, torch.arange(rows, device=whole.device))
    return whole[:rows]


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)
