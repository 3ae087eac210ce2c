"""What the kernels share: tensors as kernel arguments, tiles, the online softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# The unit of strides that Triton knows enough of, see `unit_of`. Not None: Triton 3.6 cannot compare a tuple that
# holds None with None.
ANY: tl.constexpr = tl.constexpr(1)


class Tensor4(NamedTuple):
    """A (batch, head, row, column) tensor: its pointer and strides in elements; `unit` see `unit_of`."""

    pointer: torch.Tensor
    batch: int
    head: int
    row: int
    column: int
    unit: tl.constexpr = ANY


class Tensor3(NamedTuple):
    """A (batch, head, row) tensor: its pointer and strides in elements."""

    pointer: torch.Tensor
    batch: int
    head: int
    row: int
    unit: tl.constexpr = ANY


class Tensor2(NamedTuple):
    """A (batch, head) tensor: its pointer and strides in elements."""

    pointer: torch.Tensor
    batch: int
    head: int
    unit: tl.constexpr = ANY


class Matrix(NamedTuple):
    """A (row, column) tensor: its pointer and strides in elements."""

    pointer: torch.Tensor
    row: int
    column: int
    unit: tl.constexpr = ANY


class Shape(NamedTuple):
    """The sizes that a kernel needs: query heads, query heads per key head, rows and columns of the scores, and
    batch entries."""

    heads: int
    group: int
    queries: int
    keys: int
    batches: int


# No tile has more rows than the first, nor more columns than the second; offsets within a tile are 32-bit.
LARGEST_TILE = 256
WIDEST_TILE = 512


def coalesced(t: torch.Tensor) -> torch.Tensor:
    """`t` with neighbouring columns side by side in memory; copied if they are not.

    For upstream gradients. The gradient of a sum is one number, expanded. A kernel that reads it like that is
    compiled again for it and loads value by value, several times; the copy is written once.
    """
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def near(t: torch.Tensor, inner: int, extent: int | None = WIDEST_TILE) -> torch.Tensor:
    """`t`, for a kernel that adds up 32-bit offsets in its last `inner` dimensions, over `extent` elements of each
    (None: all). It is copied first if offsets would exceed 32 bits; expanded dimensions stay expanded.

    Every tensor that a kernel takes with strides must go through here.
    """
    sizes, strides = t.shape[-inner:], t.stride()[-inner:]
    reach = (size if extent is None else min(size, extent) for size in sizes)
    if sum((size - 1) * stride for size, stride in zip(reach, strides, strict=True)) < 2**31:
        return t
    once = t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]
    return once.contiguous().expand(t.shape)


def unit_of(batch: int, head: int, row: int) -> tl.constexpr:
    """The largest power of two that divides these strides, if it is 2, 4 or 8; else ANY.

    Triton tells its compiler of an integer that it is a multiple of 16, or nothing. A kernel loads eight numbers
    of two bytes at once only where it knows that rows begin at multiples of eight. With heads of 72, say, it knows
    that by their unit.
    """
    strides = batch | head | row
    unit = strides & -strides
    return tl.constexpr(unit) if 1 < unit < 16 else ANY


def tensor4(t: torch.Tensor) -> Tensor4:
    """`t` as a kernel argument."""
    t = near(t, 2)
    batch, head, row, column = t.stride()
    return Tensor4(t, batch, head, row, column, unit_of(batch, head, row))


def tensor3(t: torch.Tensor) -> Tensor3:
    """`t` as a kernel argument."""
    t = near(t, 1, None)
    return Tensor3(t, *t.stride())


def tensor2(t: torch.Tensor | None) -> Tensor2 | None:
    """`t` as a kernel argument, if it is there; its offsets are 64-bit."""
    return None if t is None else Tensor2(t, *t.stride())


def matrix(t: torch.Tensor) -> Matrix:
    """`t` as a kernel argument."""
    t = near(t, 2)
    return Matrix(t, *t.stride())


def shape_of(q: torch.Tensor, k: torch.Tensor) -> Shape:
    return Shape(q.shape[1], q.shape[1] // max(k.shape[1], 1), q.shape[2], k.shape[2], q.shape[0])


@triton.jit
def in_units(stride, unit):
    """`stride`, of which the compiler now knows that it is a multiple of `unit`. Triton 3.6 may take a constant of
    a tuple for a number until functions are inlined, so nothing asks here whether it is 1."""
    return stride // unit * unit


@triton.jit
def head_of(tensor, batch, head):
    """Pointer to the beginning of one head of one batch entry; 64-bit, since tensors may pass 2**31 elements."""
    batch_stride, head_stride = in_units(tensor.batch, tensor.unit), in_units(tensor.head, tensor.unit)
    return tensor.pointer + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def tile_pointers(pointer, tensor, start, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to ROWS x WIDTH elements from row `start` on."""
    row_stride = in_units(tensor.row, tensor.unit)
    rows = tl.arange(0, ROWS)[:, None] * row_stride
    columns = tl.arange(0, WIDTH)[None, :] * tensor.column
    return pointer + tl.cast(start, tl.int64) * row_stride + (rows + columns)


@triton.jit
def inside(start, row_count, column_count, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Which elements of the tile from row `start` on exist."""
    rows = start + tl.arange(0, ROWS)[:, None] < row_count
    return rows & (tl.arange(0, WIDTH)[None, :] < column_count)


@triton.jit
def load_tile(
    pointer,
    tensor,
    start,
    row_count,
    column_count: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
):
    """A ROWS x WIDTH tile from row `start` on; zeros beyond the tensor. EDGE: it may pass the last row."""
    pointers = tile_pointers(pointer, tensor, start, ROWS, WIDTH)
    if EDGE:
        return tl.load(pointers, mask=inside(start, row_count, column_count, ROWS, WIDTH), other=0.0)
    elif column_count != WIDTH:
        columns = tl.broadcast_to(tl.arange(0, WIDTH)[None, :] < column_count, (ROWS, WIDTH))
        return tl.load(pointers, mask=columns, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def product_in_parts(
    left, right, column_count: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr
):
    """left right^T of two tiles that nothing else uses, 64 columns at a time: whole wide ones would fill the
    registers. Each is (pointer, tensor, first row, number of rows)."""
    left_pointer, left_tensor, left_start, left_count = left
    right_pointer, right_tensor, right_start, right_count = right
    product = tl.zeros([ROWS, KEYS], tl.float32)
    for first in tl.static_range(0, column_count, 64):
        left_part = tl.load(
            tile_pointers(left_pointer + first * left_tensor.column, left_tensor, left_start, ROWS, 64),
            mask=inside(left_start, left_count, column_count - first, ROWS, 64),
            other=0.0,
        )
        right_part = tl.load(
            tile_pointers(right_pointer + first * right_tensor.column, right_tensor, right_start, KEYS, 64),
            mask=inside(right_start, right_count, column_count - first, KEYS, 64),
            other=0.0,
        )
        product = tl.dot(left_part, tl.trans(right_part), product, input_precision=PRECISION)
    return product


@triton.jit
def store_tile(
    pointer,
    tensor,
    start,
    row_count,
    column_count: tl.constexpr,
    tile,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the part of the tile that exists, in the tensor's dtype."""
    pointers = tile_pointers(pointer, tensor, start, ROWS, WIDTH)
    mask = inside(start, row_count, column_count, ROWS, WIDTH)
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_row_values(pointer, tensor, rows, row_count, other):
    """One value a row; `other` beyond the last."""
    return tl.load(pointer + rows.to(tl.int64) * tensor.row, mask=rows < row_count, other=other)


@triton.jit
def online_softmax_update(scores, scale, row_max, row_sum, MASKED: tl.constexpr, IN_NATS: tl.constexpr = False):
    """Fold one tile of raw scores into the running softmax, in powers of two.

    Returns the tile's weights, the factor that rescales what was accumulated before, and the new running
    maximum (scaled, in log2 units) and sum. Scores IN_NATS, and their maximum, stay so until it is subtracted:
    they may be as low as numbers go. Only a masked tile can leave a row without a maximum: it pivots
    on 0, so that -inf minus -inf never happens.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    if IN_NATS:
        weights = tl.exp2((scores * scale - pivot[:, None]) * LOG2_E)
        rescale = tl.exp2((row_max - pivot) * LOG2_E)
    else:
        weights = tl.exp2(scores * scale - pivot[:, None])
        rescale = tl.exp2(row_max - pivot)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def heavy_first(program, tiles, heads, heads_per_section, CAUSAL: tl.constexpr):
    """Program number -> (tile, head). The last tiles come first, because causal ones grow. Heads are taken section
    by section, so that the keys and values in use stay in the L2 cache."""
    section = program // (tiles * heads_per_section)
    first_head = section * heads_per_section
    width = tl.minimum(heads - first_head, heads_per_section)
    within = program - first_head * tiles
    tile = within // width
    if CAUSAL:
        tile = tiles - 1 - tile
    return tile, first_head + within % width
