"""Heads on their way to attention: y = scale * rotate(norm(x) * weight), one pass forward and one backward.

x, y and their gradients are (B, H, L, D). Only x is saved: the backward computes a row's norm again.

A program takes BLOCK_M positions of one batch entry, and BLOCK_N heads one after the other, so that cosines and
sines are loaded once for all of them. Every component belongs to one pair, rotated or not: a tile is kept as two
tiles, of the first and of the second components of all pairs.

The gradients of weight and scale both follow from sums over rows of norm(x) times dy rotated back: a float32 line
(D,) for each head of a program. The lines are added up in a fixed order. No atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .tiles import ANY, coalesced, head_of, in_units, near, tensor2, tensor4


class Table(NamedTuple):
    """A (batch, head, column) tensor: its pointer and strides in elements."""

    pointer: torch.Tensor
    batch: int
    head: int
    column: int
    unit: tl.constexpr = ANY


class Rotation(NamedTuple):
    """Cosines and sines (batch, position, pair) and the strides of both; the position of row 0 of each batch
    entry, 0 without offsets. Without a rotation all fields are None: Triton 3.6 cannot compare a tuple that holds
    None with None, nor keep a stride of 1 two tuples deep."""

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    batch: int | None = None
    position: int | None = None
    pair: int | None = None
    offsets: torch.Tensor | None = None
    positions: int | None = None


class Size(NamedTuple):
    """The numbers of heads, of rows of a head, of tiles of rows and of groups of heads."""

    heads: int
    rows: int
    tiles: int
    groups: int


@triton.jit
def tile_position(size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program number -> batch entry, tile of rows, first head. Neighbouring programs read neighbouring heads."""
    program = tl.program_id(0)
    group = program % size.groups
    tile = program // size.groups % size.tiles
    return program // (size.groups * size.tiles), tile, group * BLOCK_N


@triton.jit
def pair_columns(WIDTH: tl.constexpr, TURNED: tl.constexpr, PAIRS: tl.constexpr):
    """The columns of each pair's first and second component in the half layout: i and i + TURNED / 2. Components
    that are not rotated are paired in the same way behind them. Third and fourth result: which of them exist."""
    half: tl.constexpr = TURNED // 2
    rest: tl.constexpr = (WIDTH - TURNED + 1) // 2
    pair = tl.arange(0, PAIRS)
    first = pair
    second = pair + half
    if rest > 0:
        first = tl.where(pair < half, first, pair + half)
        second = tl.where(pair < half, second, pair + (half + rest))
    return first, second, pair < half + rest, second < WIDTH


@triton.jit
def load_pairs(
    rows,
    exists,
    stride,
    WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """First and second components (M, PAIRS) in float32. `rows` (M,) points to the beginnings of the rows. Zeros
    where a row or a component does not exist."""
    if INTERLEAVED:
        # Pairs are neighbours in memory: load them together, and split them in registers.
        columns = tl.arange(0, 2 * PAIRS)
        mask = exists[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(rows[:, None] + columns[None, :] * stride, mask=mask, other=0.0)
        return tl.split(tl.reshape(tile.to(tl.float32), (rows.shape[0], PAIRS, 2)))
    else:
        first, second, in_first, in_second = pair_columns(WIDTH, TURNED, PAIRS)
        mask = exists[:, None] & in_first[None, :]
        firsts = tl.load(rows[:, None] + first[None, :] * stride, mask=mask, other=0.0)
        mask = exists[:, None] & in_second[None, :]
        seconds = tl.load(rows[:, None] + second[None, :] * stride, mask=mask, other=0.0)
        return firsts.to(tl.float32), seconds.to(tl.float32)


@triton.jit
def store_pairs(
    rows,
    exists,
    stride,
    firsts,
    seconds,
    WIDTH: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The inverse of `load_pairs`, in the pointers' dtype."""
    dtype: tl.constexpr = rows.dtype.element_ty
    if INTERLEAVED:
        columns = tl.arange(0, 2 * PAIRS)
        mask = exists[:, None] & (columns < WIDTH)[None, :]
        tile = tl.reshape(tl.join(firsts, seconds), (rows.shape[0], 2 * PAIRS))
        tl.store(rows[:, None] + columns[None, :] * stride, tile.to(dtype), mask=mask)
    else:
        first, second, in_first, in_second = pair_columns(WIDTH, TURNED, PAIRS)
        mask = exists[:, None] & in_first[None, :]
        tl.store(rows[:, None] + first[None, :] * stride, firsts.to(dtype), mask=mask)
        mask = exists[:, None] & in_second[None, :]
        tl.store(rows[:, None] + second[None, :] * stride, seconds.to(dtype), mask=mask)


@triton.jit
def row_pointers(tensor, batch, head, rows):
    """Pointers to the beginnings of these rows of a head."""
    return head_of(tensor, batch, head) + rows.to(tl.int64) * in_units(tensor.row, tensor.unit)


@triton.jit
def load_angles(rotation, batch, rows, exists, TURNED: tl.constexpr, PAIRS: tl.constexpr):
    """Cosines and sines (M, PAIRS) of these rows in float32; zeros for pairs that are not rotated."""
    positions = rows
    if rotation.offsets is not None:
        positions = tl.maximum(rows + tl.load(rotation.offsets + batch), 0)
    known = exists & (positions < rotation.positions)
    pair = tl.arange(0, PAIRS)
    mask = known[:, None] & (pair < TURNED // 2)[None, :]
    lines = batch.to(tl.int64) * rotation.batch + positions.to(tl.int64) * rotation.position
    entries = lines[:, None] + pair[None, :] * rotation.pair
    cos = tl.load(rotation.cos + entries, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(rotation.sin + entries, mask=mask, other=0.0).to(tl.float32)
    if rotation.offsets is not None:
        # The offsets cannot be checked on the host: positions beyond the table give NaN, not a plausible number.
        cos = tl.where((exists & (positions >= rotation.positions))[:, None], float("nan"), cos)
    return cos, sin


@triton.jit
def turn(firsts, seconds, cos, sin, WIDTH: tl.constexpr, TURNED: tl.constexpr):
    """(a, b) -> (a cos - b sin, b cos + a sin) in each pair that is rotated."""
    turned_firsts = firsts * cos - seconds * sin
    turned_seconds = seconds * cos + firsts * sin
    if TURNED != WIDTH:
        turns = (tl.arange(0, firsts.shape[1]) < TURNED // 2)[None, :]
        turned_firsts = tl.where(turns, turned_firsts, firsts)
        turned_seconds = tl.where(turns, turned_seconds, seconds)
    return turned_firsts, turned_seconds


@triton.jit
def row_mean(firsts, seconds, WIDTH: tl.constexpr):
    """The mean over the components of each row: (M, 1)."""
    return tl.sum(firsts + seconds, 1)[:, None] * (1.0 / WIDTH)


@triton.jit
def heads_kernel(x, y, weight, rotation, scale, size, eps, tile: tl.constexpr):
    """y = scale * rotate(norm(x) * weight). No norm if `eps` is None; weight, rotation and scale may be None."""
    batch, number, first_head = tile_position(size, tile.BLOCK_M, tile.BLOCK_N)
    rows = number * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    exists = rows < size.rows
    one = tl.zeros((1,), tl.int32)
    if rotation.cos is not None:
        cos, sin = load_angles(rotation, batch, rows, exists, tile.TURNED, tile.PAIRS)
    for step in range(0, tl.minimum(tile.BLOCK_N, size.heads - first_head)):
        head = first_head + step
        source = row_pointers(x, batch, head, rows)
        a, b = load_pairs(source, exists, x.column, tile.WIDTH, tile.TURNED, tile.INTERLEAVED, tile.PAIRS)
        if eps is not None:
            factor = tl.rsqrt(row_mean(a * a, b * b, tile.WIDTH) + tl.cast(eps, tl.float32))
            a *= factor
            b *= factor
        if weight is not None:
            line = head_of(weight, batch, head) + one
            weight_a, weight_b = load_pairs(
                line, one == 0, weight.column, tile.WIDTH, tile.TURNED, tile.INTERLEAVED, tile.PAIRS
            )
            a *= weight_a
            b *= weight_b
        if rotation.cos is not None:
            a, b = turn(a, b, cos, sin, tile.WIDTH, tile.TURNED)
        if scale is not None:
            factor = tl.load(head_of(scale, batch, head)).to(tl.float32)
            a *= factor
            b *= factor
        target = row_pointers(y, batch, head, rows)
        store_pairs(target, exists, y.column, a, b, tile.WIDTH, tile.TURNED, tile.INTERLEAVED, tile.PAIRS)


@triton.jit
def heads_gradient_kernel(dy, x, dx, partials, weight, rotation, scale, size, eps, tile: tl.constexpr):
    """dx, and in `partials` (B, tiles, H, D) the sums over a tile's rows of norm(x) times dy rotated back.

    `x` is not read if neither the norm nor the partials need it; then both are None.
    """
    batch, number, first_head = tile_position(size, tile.BLOCK_M, tile.BLOCK_N)
    rows = number * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    exists = rows < size.rows
    one = tl.zeros((1,), tl.int32)
    if rotation.cos is not None:
        cos, sin = load_angles(rotation, batch, rows, exists, tile.TURNED, tile.PAIRS)
    for step in range(0, tl.minimum(tile.BLOCK_N, size.heads - first_head)):
        head = first_head + step
        source = row_pointers(dy, batch, head, rows)
        da, db = load_pairs(source, exists, dy.column, tile.WIDTH, tile.TURNED, tile.INTERLEAVED, tile.PAIRS)
        if rotation.cos is not None:
            da, db = turn(da, db, cos, -sin, tile.WIDTH, tile.TURNED)
        if eps is not None or partials is not None:
            source = row_pointers(x, batch, head, rows)
            a, b = load_pairs(source, exists, x.column, tile.WIDTH, tile.TURNED, tile.INTERLEAVED, tile.PAIRS)
        if eps is not None:
            factor = tl.rsqrt(row_mean(a * a, b * b, tile.WIDTH) + tl.cast(eps, tl.float32))
            a *= factor
            b *= factor
        if partials is not None:
            line = (tl.cast(batch, tl.int64) * size.tiles + number) * size.heads + head
            target = partials + line * tile.WIDTH + one
            sum_a = tl.sum(da * a, 0)[None, :]
            sum_b = tl.sum(db * b, 0)[None, :]
            store_pairs(target, one == 0, 1, sum_a, sum_b, tile.WIDTH, tile.TURNED, tile.INTERLEAVED, tile.PAIRS)
        if weight is not None:
            line = head_of(weight, batch, head) + one
            weight_a, weight_b = load_pairs(
                line, one == 0, weight.column, tile.WIDTH, tile.TURNED, tile.INTERLEAVED, tile.PAIRS
            )
            da *= weight_a
            db *= weight_b
        if scale is not None:
            head_scale = tl.load(head_of(scale, batch, head)).to(tl.float32)
            da *= head_scale
            db *= head_scale
        if eps is not None:
            along = row_mean(da * a, db * b, tile.WIDTH)
            da = (da - a * along) * factor
            db = (db - b * along) * factor
        target = row_pointers(dx, batch, head, rows)
        store_pairs(target, exists, dx.column, da, db, tile.WIDTH, tile.TURNED, tile.INTERLEAVED, tile.PAIRS)


def table(t: torch.Tensor | None) -> Table | None:
    """`t` as a kernel argument, if it is there."""
    if t is None:
        return None
    t = near(t, 1)
    return Table(t, *t.stride())


def rotation_of(cos: torch.Tensor | None, sin: torch.Tensor | None, offsets: torch.Tensor | None) -> Rotation:
    """Tables (B, positions, pairs) and offsets as a kernel argument, if there are any. Expanded offsets are
    copied, and so are tables whose strides differ."""
    if cos is None or sin is None:
        return Rotation()
    cos, sin = near(cos, 1), near(sin, 1)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    return Rotation(cos, sin, *cos.stride(), offsets, cos.shape[1])


def tiling(kernel: object, x: torch.Tensor) -> launch.Tiling:
    """Rows by heads of a program, for this family and head width."""
    family = launch.family(kernel, x.device)
    return launch.look_up(launch.HEADS_ELEMENTWISE, family, x.element_size(), x.shape[3])


def size_of(x: torch.Tensor, tile: launch.Tiling) -> Size:
    _, heads, rows, _ = x.shape
    return Size(heads, rows, triton.cdiv(rows, tile.block_m), triton.cdiv(heads, tile.block_n))


def constants(x: torch.Tensor, cos: torch.Tensor | None, interleaved: bool) -> dict[str, object]:
    """What is known at compile time. Without a rotation the layout is interleaved, which loads faster."""
    width = x.shape[3]
    return {
        "WIDTH": width,
        "TURNED": 0 if cos is None else 2 * cos.shape[2],
        "INTERLEAVED": interleaved or cos is None,
        "PAIRS": triton.next_power_of_2(triton.cdiv(width, 2)),
    }


def empty_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, L, D), laid out (B, L, H, D)."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def prepare_heads(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    head_scale: torch.Tensor | None = None,
    *,
    eps: float | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """head_scale * rotate(norm(x) * norm_weight) of x (B, H, L, D), laid out (B, L, H, D).

    norm_weight (B, H, D), cos and sin (B, positions, pairs), offsets (B,), head_scale (B, H): each may be None.
    No norm if `eps` is None.
    """
    y = empty_heads(x)
    if x.numel() == 0:
        return y
    tile = tiling(heads_kernel, x)
    size = size_of(x, tile)
    with launch.on_device(x):
        launch.start(
            heads_kernel,
            (x.shape[0] * size.tiles * size.groups,),
            tensor4(x),
            tensor4(y),
            table(norm_weight),
            rotation_of(cos, sin, offsets),
            tensor2(head_scale),
            size,
            eps,
            tile=tile.tile(**constants(x, cos, interleaved)),
            **tile.compiler_options(),
        )
    return y


def prepare_heads_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    head_scale: torch.Tensor | None = None,
    *,
    eps: float | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dx, and dnorm_weight (B, H, D) and dhead_scale (B, H) if there are any, of `prepare_heads`."""
    dx, dy = empty_heads(x), coalesced(dy)
    tile = tiling(heads_gradient_kernel, x)
    size = size_of(x, tile)
    partials = None
    if norm_weight is not None or head_scale is not None:
        partials = x.new_empty(x.shape[0], size.tiles, size.heads, x.shape[3], dtype=torch.float32)
    if x.numel() > 0:
        with launch.on_device(x):
            launch.start(
                heads_gradient_kernel,
                (x.shape[0] * size.tiles * size.groups,),
                tensor4(dy),
                tensor4(x),
                tensor4(dx),
                partials,
                table(norm_weight),
                rotation_of(cos, sin, offsets),
                tensor2(head_scale),
                size,
                eps,
                tile=tile.tile(**constants(x, cos, interleaved)),
                **tile.compiler_options(),
            )
    return dx, *gradients_beside(partials, norm_weight, head_scale)


def gradients_beside(
    partials: torch.Tensor | None, norm_weight: torch.Tensor | None, head_scale: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of norm_weight and head_scale from the sums of each tile (B, tiles, H, D)."""
    if partials is None:
        return None, None
    total = partials.sum(1)
    dweight = dscale = None
    if norm_weight is not None:
        dweight = total if head_scale is None else total * head_scale[..., None]
    if head_scale is not None:
        dscale = (total if norm_weight is None else total * norm_weight).sum(-1)
    return dweight, dscale
