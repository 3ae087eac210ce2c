"""Products with weights, a tile at a time: ours, where our kernels compute them, and the library's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .. import launch
from ..tiles import tile_pointers
from .problem import Size

# Rows of tiles whose columns are computed one after the other, so that the programs that run at a time read few
# rows of x and few weights, which stay in the L2 cache.
GROUP: tl.constexpr = tl.constexpr(8)


@triton.jit
def grouped_tile(program, row_tiles, column_tiles):
    """Program number -> (row, column) of its tile: down the columns of GROUP rows of tiles at a time."""
    first_row = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first_row, GROUP)
    within = program - first_row * column_tiles
    return first_row + within % height, within // height


@triton.jit
def tile_in_hidden(size, tile: tl.constexpr):
    """The program's tile of the hidden layer: its row of tiles, its first row and column, and which of its
    elements exist."""
    tile_row, tile_column = grouped_tile(
        tl.program_id(0), tl.cdiv(size.tokens, tile.BLOCK_M), tl.cdiv(size.hidden, tile.BLOCK_N)
    )
    row = tile_row * tile.BLOCK_M
    column = tile_column * tile.BLOCK_N
    rows = (row + tl.arange(0, tile.BLOCK_M) < size.tokens)[:, None]
    return tile_row, row, column, rows & (column + tl.arange(0, tile.BLOCK_N) < size.hidden)[None, :]


@triton.jit
def block(matrix, row, column, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to ROWS x WIDTH elements of a matrix, from (row, column) on."""
    return tile_pointers(matrix.pointer + tl.cast(column, tl.int64) * matrix.column, matrix, row, ROWS, WIDTH)


@triton.jit
def block_of_up(pair, row, column, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The same of the second matrix of a Pair."""
    pointer = pair.up + tl.cast(column, tl.int64) * pair.gate.column
    return tile_pointers(pointer, pair.gate, row, ROWS, WIDTH)


@triton.jit
def load_operand(pointers, outside, inside, WHOLE: tl.constexpr):
    """A tile of an operand, zeros beyond the matrix. WHOLE: the summed dimension needs no mask."""
    if WHOLE:
        return tl.load(pointers, mask=outside, other=0.0)
    else:
        return tl.load(pointers, mask=outside & inside, other=0.0)


@triton.jit
def products(
    a,
    first,
    second,
    row,
    column,
    size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of a @ first and of a @ second, from (row, column) on, in float32.

    `a` (tokens, inner) is read once for both. If `second` is None, the second result has no meaning.
    """
    rows = (row + tl.arange(0, BLOCK_M) < size.tokens)[:, None]
    columns = (column + tl.arange(0, BLOCK_N) < size.hidden)[None, :]
    steps = tl.arange(0, BLOCK_K)
    a_pointers = block(a, row, 0, BLOCK_M, BLOCK_K)
    first_pointers = block(first, 0, column, BLOCK_K, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second_total = total
    if second is not None:
        second_pointers = block(second, 0, column, BLOCK_K, BLOCK_N)
    for start in range(0, size.inner, BLOCK_K):
        inside = steps < size.inner - start
        left = load_operand(a_pointers, rows, inside[None, :], WHOLE)
        right = load_operand(first_pointers, columns, inside[:, None], WHOLE)
        total = tl.dot(left, right, total, input_precision="ieee")
        a_pointers += BLOCK_K * a.column
        first_pointers += BLOCK_K * first.row
        if second is not None:
            right = load_operand(second_pointers, columns, inside[:, None], WHOLE)
            second_total = tl.dot(left, right, second_total, input_precision="ieee")
            second_pointers += BLOCK_K * second.row
    return total, second_total


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns. No data moves between threads."""
    pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def quarters(tile):
    """A tile's columns in four parts, left to right. An epilogue that handles one part at a time keeps only a
    quarter of its intermediate values in registers; for the whole tile at once, the gradients' would spill."""
    left, right = halves(tile)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@triton.jit
def plus_bias(total, bias, columns, inside):
    """Add a bias, if there is one, to every row."""
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total


def inner_tile(dtype: torch.dtype) -> int:
    """BLOCK_K: 128 bytes of a row, the widest swizzle of shared memory."""
    return 128 // dtype.itemsize


# By family of GPU and bytes of an element, up to which summed width.
Bounds = dict[str, dict[int, int]]


def is_fused(
    kernel: object, size: Size, operands: Sequence[torch.Tensor], fused: bool | None, bounds: Bounds | None = None
) -> bool:
    """Whether a product runs in our kernel and not in the library's; `fused` decides if it is not None.

    Otherwise launch.MLP_FUSED_UP_TO decides, if the lines of all operands start at multiples of 16 elements; and
    `bounds`, of the same form, where it has less.
    Operands with other lines go to the library: our kernel would load them value by value, not asynchronously, and
    spill registers.
    """
    if fused is not None:
        return fused
    family = launch.family(kernel, operands[0].device)
    limits = launch.MLP_FUSED_UP_TO.get(family, launch.MLP_FUSED_UP_TO["sm_80"])
    itemsize = operands[0].element_size()
    limit = limits.get(itemsize, -1)
    if size.inner > min(limit, (bounds or {}).get(family, {}).get(itemsize, limit)):
        return False
    return family == launch.INTERPRETER or (size.hidden % 16 == 0 and all(aligned(t) for t in operands))


def aligned(t: torch.Tensor) -> bool:
    """Whether the lines of a matrix start at multiples of 16 elements, for which Triton specialises a kernel."""
    unit = 1 in t.stride() and all(stride == 1 or stride % 16 == 0 for stride in t.stride())
    return unit and t.shape[1] % 16 == 0 and t.storage_offset() % 16 == 0


def tiling(table: dict, kernel: object, operand: torch.Tensor, size: Size) -> launch.Tiling:
    """The table's row for this family, dtype and number of hidden elements."""
    family = launch.family(kernel, operand.device)
    return launch.look_up(table, family, operand.element_size(), size.tokens * size.hidden)


def tile_count(size: Size, tile: launch.Tiling) -> int:
    """How many programs cover the hidden layer, one for each tile."""
    return triton.cdiv(size.tokens, tile.block_m) * triton.cdiv(size.hidden, tile.block_n)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The library's x W^T + b, the bias added before the one rounding."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def column_sum(t: torch.Tensor) -> torch.Tensor:
    """The sum over rows, in float32 and in a fixed order."""
    return t.sum(0, dtype=torch.float32)
