"""RMS norm and layer norm of rows: y = (x - mean) / deviation * (weight + offset) + bias.

x is (B, R, W). weight and bias, each of which may be missing, are (B, W): one for the R rows of a batch entry.
With a residual, x + residual is normalised, rounded to x's dtype, and is a second result. For the backward x, or
that sum, is kept, and for each row in float32 its mean (layer norm) and 1 / deviation.

Memory traffic, for elements of e bytes: the forward reads x (and residual) and writes y (and the sum), 2 e (4 e)
bytes for each element; the backward reads x and dy (and the sum's gradient) and writes dx, 3 e (4 e). That is the
minimum, and rows that fit in one tile need no more. Wider rows are read twice, the second time from a cache, and
the gradients of weight and bias take a pass of their own, 2 e more.

Gradients of weight and bias: each of a fixed number of programs adds up its rows in order and writes a float32
line (W,); the lines are added up in a fixed order. No atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .tiles import coalesced, near


class Rows(NamedTuple):
    """A (batch, row, column) tensor: its pointer and strides in elements."""

    pointer: torch.Tensor
    batch: int
    row: int
    column: int


class Line(NamedTuple):
    """A (batch, column) tensor: its pointer and strides in elements."""

    pointer: torch.Tensor
    batch: int
    column: int


class Moments(NamedTuple):
    """(B, R) in float32: the mean of each row, None for 0, and 1 / deviation."""

    mean: torch.Tensor | None
    inverse: torch.Tensor


class Size(NamedTuple):
    """Of a batch entry: the numbers of rows, of tiles of rows, and of programs for these tiles."""

    rows: int
    tiles: int
    programs: int


@triton.jit
def row_pointers(tensor, batch, rows):
    """Pointers to the beginnings of rows; 64-bit, since tensors may pass 2**31 elements."""
    return tensor.pointer + tl.cast(batch, tl.int64) * tensor.batch + rows.to(tl.int64) * tensor.row


@triton.jit
def load_rows(tensor, batch, rows, exists, columns, WIDTH: tl.constexpr):
    """A tile (M, N) in float32; zeros beyond the tensor."""
    pointers = row_pointers(tensor, batch, rows)[:, None] + columns[None, :] * tensor.column
    mask = exists[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(tensor, tile, batch, rows, exists, columns, WIDTH: tl.constexpr):
    """The inverse of `load_rows`, in the tensor's dtype."""
    pointers = row_pointers(tensor, batch, rows)[:, None] + columns[None, :] * tensor.column
    mask = exists[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, tile.to(tensor.pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_line(tensor, batch, columns, WIDTH: tl.constexpr):
    """(1, N) in float32."""
    pointers = tensor.pointer + tl.cast(batch, tl.int64) * tensor.batch + columns * tensor.column
    return tl.load(pointers, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_stream(x, residual, batch, rows, exists, columns, WIDTH: tl.constexpr):
    """What is normalised: x, or its sum with the residual, rounded to the dtype in which it is kept."""
    stream = load_rows(x, batch, rows, exists, columns, WIDTH)
    if residual is not None:
        stream += load_rows(residual, batch, rows, exists, columns, WIDTH)
        stream = stream.to(x.pointer.dtype.element_ty).to(tl.float32)
    return stream


@triton.jit
def weighted(tile, weight, offset, batch, columns, WIDTH: tl.constexpr):
    """tile * (weight + offset), if there is a weight."""
    if weight is not None:
        tile *= load_line(weight, batch, columns, WIDTH) + tl.cast(offset, tl.float32)
    return tile


@triton.jit
def moments_of(stream, start, columns, WIDTH: tl.constexpr, CENTRED: tl.constexpr):
    """The mean of a tile whose first column is `start` (0 unless CENTRED), over the columns that exist, and the
    sum of squares around it: (M, 1) each."""
    mean = tl.zeros((stream.shape[0], 1), tl.float32)
    if CENTRED:
        mean = tl.sum(stream, 1)[:, None] / tl.minimum(stream.shape[1], WIDTH - start)
        stream = tl.where((columns < WIDTH)[None, :], stream - mean, 0.0)
    return mean, tl.sum(stream * stream, 1)[:, None]


@triton.jit
def merged(mean, squares, more_mean, more_squares, start, more):
    """The moments of `start` columns merged with those of the next `more` (Chan, Golub and LeVeque 1979, section
    2)."""
    step = more_mean - mean
    share = more / (start + more)
    return mean + step * share, squares + more_squares + step * step * (share * start)


@triton.jit
def write_norm(stream, mean, inverse, affine, y, total, batch, rows, exists, columns, WIDTH: tl.constexpr):
    """Write one tile of the results. `affine`: weight, bias, and the offset that is added to the weight."""
    weight, bias, offset = affine
    if total is not None:
        store_rows(total, stream, batch, rows, exists, columns, WIDTH)
    tile = weighted((stream - mean) * inverse, weight, offset, batch, columns, WIDTH)
    if bias is not None:
        tile += load_line(bias, batch, columns, WIDTH)
    store_rows(y, tile, batch, rows, exists, columns, WIDTH)


@triton.jit
def norm_kernel(x, residual, weight, bias, y, total, moments, size, eps, offset, tile: tl.constexpr):
    """y of BLOCK_M rows, their sum with `residual` in `total`, and their moments.

    The first tile of columns stays in registers. Further ones, if there are any, are loaded twice.
    """
    program = tl.program_id(0)
    batch = program // size.tiles
    rows = program % size.tiles * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    exists = rows < size.rows
    columns = tl.arange(0, tile.BLOCK_N)
    first = load_stream(x, residual, batch, rows, exists, columns, tile.WIDTH)
    mean, squares = moments_of(first, 0, columns, tile.WIDTH, tile.CENTRED)
    for start in range(tile.BLOCK_N, tile.WIDTH, tile.BLOCK_N):
        stream = load_stream(x, residual, batch, rows, exists, start + columns, tile.WIDTH)
        more_mean, more_squares = moments_of(stream, start, start + columns, tile.WIDTH, tile.CENTRED)
        more = tl.minimum(tile.BLOCK_N, tile.WIDTH - start)
        mean, squares = merged(mean, squares, more_mean, more_squares, start, more)
    inverse = tl.rsqrt(squares * (1.0 / tile.WIDTH) + tl.cast(eps, tl.float32))
    line = tl.cast(batch, tl.int64) * size.rows + rows[:, None]
    if moments.mean is not None:
        tl.store(moments.mean + line, mean, mask=exists[:, None])
    tl.store(moments.inverse + line, inverse, mask=exists[:, None])
    affine = (weight, bias, offset)
    write_norm(first, mean, inverse, affine, y, total, batch, rows, exists, columns, tile.WIDTH)
    for start in range(tile.BLOCK_N, tile.WIDTH, tile.BLOCK_N):
        more = start + columns
        stream = load_stream(x, residual, batch, rows, exists, more, tile.WIDTH)
        write_norm(stream, mean, inverse, affine, y, total, batch, rows, exists, more, tile.WIDTH)


@triton.jit
def load_moments(moments, size, batch, rows, exists):
    """The mean of these rows, 0 if none is kept, and 1 / deviation: (M, 1) each."""
    line = tl.cast(batch, tl.int64) * size.rows + rows[:, None]
    mean = tl.zeros((rows.shape[0], 1), tl.float32)
    if moments.mean is not None:
        mean = tl.load(moments.mean + line, mask=exists[:, None], other=0.0)
    return mean, tl.load(moments.inverse + line, mask=exists[:, None], other=0.0)


@triton.jit
def load_pair(dy, x, mean, inverse, batch, rows, exists, columns, WIDTH: tl.constexpr):
    """A tile of dy, zeros beyond the tensor, and of normalised x."""
    normalised = (load_rows(x, batch, rows, exists, columns, WIDTH) - mean) * inverse
    return load_rows(dy, batch, rows, exists, columns, WIDTH), normalised


@triton.jit
def projections(gradient, normalised, WIDTH: tl.constexpr, CENTRED: tl.constexpr):
    """A tile's part of two means over each row (M, 1): of gradient * normalised, and if CENTRED of the
    gradient."""
    along = tl.sum(gradient * normalised, 1)[:, None] * (1.0 / WIDTH)
    level = tl.zeros((gradient.shape[0], 1), tl.float32)
    if CENTRED:
        level = tl.sum(gradient, 1)[:, None] * (1.0 / WIDTH)
    return along, level


@triton.jit
def write_gradient(
    gradient, normalised, along, level, inverse, dtotal, dx, batch, rows, exists, columns, WIDTH: tl.constexpr
):
    """Write one tile of dx: the gradient through the norm, plus that of the sum."""
    tile = (gradient - normalised * along - level) * inverse
    if dtotal is not None:
        tile += load_rows(dtotal, batch, rows, exists, columns, WIDTH)
    store_rows(dx, tile, batch, rows, exists, columns, WIDTH)


@triton.jit
def load_step(dy, x, moments, size, batch, tile_row, columns, tile: tl.constexpr):
    """One tile of rows: which rows, which of them exist, their moments, dy and normalised x."""
    rows = tile_row * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    exists = rows < size.rows
    mean, inverse = load_moments(moments, size, batch, rows, exists)
    gradient, normalised = load_pair(dy, x, mean, inverse, batch, rows, exists, columns, tile.WIDTH)
    return rows, exists, mean, inverse, gradient, normalised


@triton.jit
def add_to_sums(weight_sum, bias_sum, gradient, normalised, dweight, dbias):
    """Add the gradients of weight and bias from one tile, where they are wanted."""
    if dweight is not None:
        weight_sum += gradient * normalised
    if dbias is not None:
        bias_sum += gradient
    return weight_sum, bias_sum


@triton.jit
def store_sums(weight_sum, bias_sum, dweight, dbias, line, columns, WIDTH: tl.constexpr):
    """Write these columns of a program's line (W,): the sums over the rows of its tiles."""
    target = tl.cast(line, tl.int64) * WIDTH + columns
    if dweight is not None:
        tl.store(dweight + target, tl.sum(weight_sum, 0), mask=columns < WIDTH)
    if dbias is not None:
        tl.store(dbias + target, tl.sum(bias_sum, 0), mask=columns < WIDTH)


@triton.jit
def norm_gradient_kernel(dy, dtotal, x, weight, dx, dweight, dbias, moments, size, offset, tile: tl.constexpr):
    """dx of every size.programs-th tile of rows. `dtotal` is the gradient of the sum.

    dweight and dbias (B, programs, W) take the sums over these rows; they are None unless a row fits in one tile.
    Of wider rows the first tile stays in registers, the others are loaded twice.
    """
    line = tl.program_id(0)
    batch = line // size.programs
    program = line % size.programs
    columns = tl.arange(0, tile.BLOCK_N)
    weight_sum = tl.zeros((tile.BLOCK_M, tile.BLOCK_N), tl.float32)
    bias_sum = tl.zeros((tile.BLOCK_M, tile.BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(size.tiles - program, size.programs)):
        rows, exists, mean, inverse, first, normalised = load_step(
            dy, x, moments, size, batch, program + step * size.programs, columns, tile
        )
        weight_sum, bias_sum = add_to_sums(weight_sum, bias_sum, first, normalised, dweight, dbias)
        first = weighted(first, weight, offset, batch, columns, tile.WIDTH)
        along, level = projections(first, normalised, tile.WIDTH, tile.CENTRED)
        for start in range(tile.BLOCK_N, tile.WIDTH, tile.BLOCK_N):
            more = start + columns
            part, direction = load_pair(dy, x, mean, inverse, batch, rows, exists, more, tile.WIDTH)
            part = weighted(part, weight, offset, batch, more, tile.WIDTH)
            more_along, more_level = projections(part, direction, tile.WIDTH, tile.CENTRED)
            along += more_along
            level += more_level
        write_gradient(
            first, normalised, along, level, inverse, dtotal, dx, batch, rows, exists, columns, tile.WIDTH
        )
        for start in range(tile.BLOCK_N, tile.WIDTH, tile.BLOCK_N):
            more = start + columns
            part, direction = load_pair(dy, x, mean, inverse, batch, rows, exists, more, tile.WIDTH)
            part = weighted(part, weight, offset, batch, more, tile.WIDTH)
            write_gradient(
                part, direction, along, level, inverse, dtotal, dx, batch, rows, exists, more, tile.WIDTH
            )
    store_sums(weight_sum, bias_sum, dweight, dbias, line, columns, tile.WIDTH)


@triton.jit
def norm_sums_kernel(dy, x, dweight, dbias, moments, size, tile: tl.constexpr):
    """dweight and dbias (B, programs, W) of rows wider than a tile; one may be None. A program takes one tile of
    columns of every size.programs-th tile of rows."""
    column_tiles: tl.constexpr = (tile.WIDTH + tile.BLOCK_N - 1) // tile.BLOCK_N
    line = tl.program_id(0) // column_tiles
    batch = line // size.programs
    program = line % size.programs
    columns = tl.program_id(0) % column_tiles * tile.BLOCK_N + tl.arange(0, tile.BLOCK_N)
    weight_sum = tl.zeros((tile.BLOCK_M, tile.BLOCK_N), tl.float32)
    bias_sum = tl.zeros((tile.BLOCK_M, tile.BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(size.tiles - program, size.programs)):
        _, _, _, _, gradient, normalised = load_step(
            dy, x, moments, size, batch, program + step * size.programs, columns, tile
        )
        weight_sum, bias_sum = add_to_sums(weight_sum, bias_sum, gradient, normalised, dweight, dbias)
    store_sums(weight_sum, bias_sum, dweight, dbias, line, columns, tile.WIDTH)


def rows_of(t: torch.Tensor | None) -> Rows | None:
    """`t` (B, R, W) as a kernel argument, if it is there."""
    if t is None:
        return None
    t = near(t, 1, None)
    return Rows(t, *t.stride())


def line_of(t: torch.Tensor | None) -> Line | None:
    """`t` (B, W) as a kernel argument, if it is there."""
    if t is None:
        return None
    t = near(t, 1, None)
    return Line(t, *t.stride())


def size_of(x: torch.Tensor, tile: launch.Tiling, programs: int) -> Size:
    """The rows of x, split among at most `programs` programs in all, but at least one for each batch entry."""
    batch, rows, _ = x.shape
    tiles = triton.cdiv(rows, tile.block_m)
    return Size(rows, tiles, min(tiles, max(1, programs // batch)))


def norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    centred: bool,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """y, x + residual (None without one), and the moments (B, R): mean (None unless `centred`) and 1 / deviation.

    x and residual (B, R, W), weight and bias (B, W), of any strides and floating dtypes up to float32.
    """
    batch, rows, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(y)
    moments = Moments(
        x.new_empty((batch, rows), dtype=torch.float32) if centred else None,
        x.new_empty((batch, rows), dtype=torch.float32),
    )
    if x.numel() > 0:
        with launch.on_device(x):
            family = launch.family(norm_kernel, x.device)
            tile = launch.look_up(launch.NORM_FORWARD, family, x.element_size(), width)
            size = size_of(x, tile, 1)
            launch.start(
                norm_kernel,
                (batch * size.tiles,),
                rows_of(x),
                rows_of(residual),
                line_of(weight),
                line_of(bias),
                rows_of(y),
                rows_of(total),
                moments,
                size,
                eps,
                offset,
                tile=tile.tile(CENTRED=centred, WIDTH=width),
                **tile.compiler_options(),
            )
    return y, total, *moments


def norm_backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    saved: tuple,
    *,
    offset: float = 0.0,
    wanted: tuple[bool, bool] = (False, False),
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dx, which is the residual's gradient, too, and dweight and dbias (B, W) in float32 where they are wanted.

    `saved` is (x, weight, mean, inverse): x is what was normalised, mean and inverse are results of
    `norm_forward`. `dtotal` is the gradient of x + residual as a result, None for 0. `wanted`: whether dweight and
    dbias are.
    """
    x, weight, mean, inverse = saved
    batch, _, width = x.shape
    dy, dtotal = coalesced(dy), None if dtotal is None else coalesced(dtotal)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        nothing = x.new_zeros((batch, width), dtype=torch.float32)
        return dx, nothing if wanted[0] else None, nothing.clone() if wanted[1] else None
    family = launch.family(norm_gradient_kernel, x.device)
    tile = launch.look_up(launch.NORM_BACKWARD, family, x.element_size(), width)
    programs = launch.norm_programs(family, tile)
    within = width <= tile.block_n
    size, moments = size_of(x, tile, programs), Moments(mean, inverse)
    lines = size if within else size_of(x, tile, triton.cdiv(programs, triton.cdiv(width, tile.block_n)))
    dweight, dbias = (
        x.new_empty((batch, lines.programs, width), dtype=torch.float32) if want else None for want in wanted
    )
    with launch.on_device(x):
        launch.start(
            norm_gradient_kernel,
            (batch * size.programs,),
            rows_of(dy),
            rows_of(dtotal),
            rows_of(x),
            line_of(weight),
            rows_of(dx),
            dweight if within else None,
            dbias if within else None,
            moments,
            size,
            offset,
            tile=tile.tile(CENTRED=mean is not None, WIDTH=width),
            **tile.compiler_options(),
        )
        if not within and any(wanted):
            launch.start(
                norm_sums_kernel,
                (batch * lines.programs * triton.cdiv(width, tile.block_n),),
                rows_of(dy),
                rows_of(x),
                dweight,
                dbias,
                moments,
                lines,
                tile=tile.tile(WIDTH=width),
                **tile.compiler_options(),
            )
    return dx, *(None if partials is None else partials.sum(1) for partials in (dweight, dbias))
