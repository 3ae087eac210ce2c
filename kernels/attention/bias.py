"""Attention, backward: the gradient of a bias, and of a bias by distance.

The gradient of the scores, dS = P * (dP - delta), summed over all scores that share one element of the bias. Each
program owns some elements, or a split of their sums, and loops over the tiles in a fixed order: no atomics.
Nothing larger than the bias is stored but the partial results of a small one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .. import launch
from ..tiles import head_of, load_tile, product_in_parts, tensor4
from .loops import (
    GRANULE,
    first_at,
    key_bounds,
    key_count_of,
    key_ranges,
    list_of,
    rows_of,
    with_multiplicity,
    words_of,
)
from .problem import Call
from .row_values import load_rows, row_values_of
from .scores import load_score_terms, score_gradient, score_gradient_of


@triton.jit
def tile_gradient(
    total, operands, batch, head, start, key_start, bounds, score_terms, problem, tile: tl.constexpr
):
    """Add to `total` the gradient of one head's scores within `bounds`. Operands are q, k, v, dout and the row
    values of the backward."""
    q, k, v, dout, row_values = operands
    shape = problem.shape
    queries = start + tl.arange(0, tile.BLOCK_M)
    key_head = head // shape.group
    q_pointer, dout_pointer = head_of(q, batch, head), head_of(dout, batch, head)
    k_pointer, v_pointer = head_of(k, batch, key_head), head_of(v, batch, key_head)
    key_count = key_count_of(batch, problem)
    values = row_values_of(row_values, batch, head, shape) + queries
    if tile.WIDTH > 256 or tile.VALUE_WIDTH > 256:
        products = product_in_parts(
            (q_pointer, q, start, shape.queries), (k_pointer, k, key_start, key_count),
            tile.HEAD_DIM, tile.BLOCK_M, tile.BLOCK_N, tile.PRECISION,
        )  # fmt: skip
        dweights = product_in_parts(
            (dout_pointer, dout, start, shape.queries), (v_pointer, v, key_start, key_count),
            tile.VALUE_DIM, tile.BLOCK_M, tile.BLOCK_N, tile.PRECISION,
        )  # fmt: skip
        row_terms = load_rows(values, row_values.rows, problem.scores)
        dscores, _capped = score_gradient_of(
            products, dweights, row_terms, key_start, queries, bounds, score_terms, problem, tile, True
        )
    else:
        q_tile = load_tile(q_pointer, q, start, shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, True)
        dout_tile = load_tile(
            dout_pointer, dout, start, shape.queries, tile.VALUE_DIM, tile.BLOCK_M, tile.VALUE_WIDTH, True
        )
        k_tile = load_tile(k_pointer, k, key_start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, True)
        v_tile = load_tile(
            v_pointer, v, key_start, key_count, tile.VALUE_DIM, tile.BLOCK_N, tile.VALUE_WIDTH, True
        )
        rows = (q_tile, dout_tile, load_rows(values, row_values.rows, problem.scores))
        dscores, _capped = score_gradient(
            rows, k_tile, v_tile, key_start, queries, bounds, score_terms, problem, tile, True
        )
    return total + dscores


@triton.jit
def add_tile(function: tl.constexpr, total, operands, batch, head, start, key_start, problem, tile: tl.constexpr):
    """Add to `total` what `function` makes of one head's tile, such as the gradient of its scores: queries from
    `start` on, keys from `key_start` on, as far as they are seen."""
    lists = problem.lists
    key_count = key_count_of(batch, problem)
    queries = start + tl.arange(0, tile.BLOCK_M)
    if lists.full is None:
        bounds = key_bounds(queries, batch, key_count, problem)
        begin, _full_begin, _full_end, end = key_ranges(start, bounds, key_count, problem, tile)
        if (key_start < end) & (key_start + tile.BLOCK_N > begin):
            # Compute the bounds again: kept across the branch, they cost 4 percent more instructions (sm_90,
            # D = 128).
            bounds = key_bounds(queries, batch, key_count, problem)
            score_terms = load_score_terms(problem.scores, problem.dropout, batch, head)
            total = function(total, operands, batch, head, start, key_start, bounds, score_terms, problem, tile)
    else:
        score_terms = load_score_terms(problem.scores, problem.dropout, batch, head)
        # A granule has an entry in the row's lists for each multiplicity of its keys.
        row = list_of(lists, batch, head, start)
        granule = key_start // GRANULE
        end = tl.load(lists.partial_offsets + row + 1)
        for entry in tl.range(
            first_at(lists.partial, tl.load(lists.partial_offsets + row), end, granule),
            first_at(lists.partial, tl.load(lists.partial_offsets + row), end, granule + 1),
        ):
            bounds = words_of(lists, entry, queries), key_count
            entry_terms = with_multiplicity(score_terms, lists.partial_counts, entry)
            total = function(total, operands, batch, head, start, key_start, bounds, entry_terms, problem, tile)
        end = tl.load(lists.full_offsets + row + 1)
        for entry in tl.range(
            first_at(lists.full, tl.load(lists.full_offsets + row), end, granule),
            first_at(lists.full, tl.load(lists.full_offsets + row), end, granule + 1),
        ):
            bounds = tl.full([tile.BLOCK_M], -1, tl.int64), key_count
            entry_terms = with_multiplicity(score_terms, lists.full_counts, entry)
            total = function(total, operands, batch, head, start, key_start, bounds, entry_terms, problem, tile)
    return total


@triton.jit
def bias_gradient_kernel(
    q, k, v, dout, dbias, row_values, counts, problem, tile: tl.constexpr,
    SHARED_ROWS: tl.constexpr, SHARED_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of the bias. Several batch entries and heads use the tile and, where SHARED, all
    tiles of rows or columns: they are its members. Each of `splits` programs adds up some members in a fixed
    order. It stores its partial result at batch entry split x `bias_batches` + the bias's.

    `counts` are the batch entries and heads of the bias, how many of q's use each, and the splits."""
    shape = problem.shape
    bias_batches, bias_heads, batches, heads, splits = counts
    row_tiles, column_tiles = tl.cdiv(shape.queries, tile.BLOCK_M), tl.cdiv(shape.keys, tile.BLOCK_N)
    own_rows, own_columns, shared_rows, shared_columns = row_tiles, column_tiles, 1, 1
    if SHARED_ROWS:
        own_rows, shared_rows = 1, row_tiles
    if SHARED_COLUMNS:
        own_columns, shared_columns = 1, column_tiles
    split, program = tl.program_id(0) % splits, tl.program_id(0) // splits
    column, row = program % own_columns, program // own_columns % own_rows
    bias_head = program // (own_columns * own_rows) % bias_heads
    bias_batch = program // (own_columns * own_rows) // bias_heads

    operands = (q, k, v, dout, row_values)
    total = tl.zeros([tile.BLOCK_M, tile.BLOCK_N], tl.float32)
    members = batches * heads * shared_rows * shared_columns
    per_split = tl.cdiv(members, splits)
    for member in tl.range(split * per_split, tl.minimum((split + 1) * per_split, members)):
        member_column, member_row = member % shared_columns, member // shared_columns % shared_rows
        flat_head = member // (shared_columns * shared_rows)
        head, batch = flat_head % heads, flat_head // heads
        total = add_tile(
            tile_gradient, total, operands, bias_batch + batch, bias_head + head,
            (row + member_row) * tile.BLOCK_M, (column + member_column) * tile.BLOCK_N, problem, tile,
        )  # fmt: skip

    pointer = head_of(dbias, split * bias_batches + bias_batch, bias_head)
    i = row * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    j = column * tile.BLOCK_N + tl.arange(0, tile.BLOCK_N)
    row_offsets, column_offsets = i.to(tl.int64) * dbias.row, j.to(tl.int64) * dbias.column
    if SHARED_ROWS and SHARED_COLUMNS:
        tl.store(pointer, tl.sum(tl.sum(total, 1), 0).to(pointer.dtype.element_ty))
    elif SHARED_ROWS:
        tl.store(pointer + column_offsets, tl.sum(total, 0).to(pointer.dtype.element_ty), mask=j < shape.keys)
    elif SHARED_COLUMNS:
        tl.store(pointer + row_offsets, tl.sum(total, 1).to(pointer.dtype.element_ty), mask=i < shape.queries)
    else:
        pointers = pointer + (row_offsets[:, None] + column_offsets[None, :])
        exists = (i < shape.queries)[:, None] & (j < shape.keys)[None, :]
        tl.store(pointers, total.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def add_diagonal(function: tl.constexpr, operands, problem, tile: tl.constexpr):
    """The sum of what `function` makes of each tile on this program's diagonal of square tiles. An element of a
    tile stands for the same distance in all of them."""
    tl.static_assert(tile.BLOCK_M == tile.BLOCK_N, "tiles must be square")
    shape = problem.shape
    row_tiles, column_tiles = tl.cdiv(shape.queries, tile.BLOCK_M), tl.cdiv(shape.keys, tile.BLOCK_N)
    diagonals = row_tiles + column_tiles - 1
    ahead = tl.program_id(0) % diagonals - (row_tiles - 1)
    flat_head = tl.program_id(0) // diagonals
    batch, head = flat_head // shape.heads, flat_head % shape.heads
    total = tl.zeros([tile.BLOCK_M, tile.BLOCK_N], tl.float32)
    for number in tl.range(tl.maximum(0, -ahead), tl.minimum(row_tiles, column_tiles - ahead)):
        start, key_start = number * tile.BLOCK_M, (number + ahead) * tile.BLOCK_N
        total = add_tile(function, total, operands, batch, head, start, key_start, problem, tile)
    return total


@triton.jit
def store_diagonals(total, sums, tile: tl.constexpr):
    """Store the sum of each diagonal of `total`, this program's sum of tiles, the lowest distance first."""
    pointers = sums + tl.program_id(0).to(tl.int64) * 2 * tile.BLOCK_M
    distance = tl.arange(0, tile.BLOCK_N)[None, :] - tl.arange(0, tile.BLOCK_M)[:, None] + (tile.BLOCK_M - 1)
    for diagonal in tl.range(0, 2 * tile.BLOCK_M):
        tl.store(pointers + diagonal, tl.sum(tl.sum(tl.where(distance == diagonal, total, 0.0), 1), 0))


@triton.jit
def diagonal_sums_kernel(q, k, v, dout, sums, row_values, problem, tile: tl.constexpr):
    """One program a head and diagonal of square tiles: it sums the tiles, then each diagonal of the sum."""
    total = add_diagonal(tile_gradient, (q, k, v, dout, row_values), problem, tile)
    store_diagonals(total, sums, tile)


def bias_gradient(call: Call, operands: tuple, row_values: tuple) -> torch.Tensor:
    """The gradient of the call's bias (B or 1, Hq or 1, Lq or 1, Lk or 1), in its shape and dtype.

    `operands` are q, k, v and dout as kernels take them. A bias that broadcasts has few elements, each a sum of
    many gradients. Then several programs split a tile's loop, as many as keep the multiprocessors busy, and a
    second pass adds up their float32 results.
    """
    bias = call.tensors.bias
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    batch, heads, queries, keys = *call.q.shape[:3], call.k.shape[2]
    if batch * heads * queries * keys == 0:
        return dbias.zero_()
    tiling = call.tiling(launch.ATTENTION_BIAS)
    # A dimension of size 1 is one tile, whether rows (or columns) share it or there is only one.
    rows = 1 if bias.shape[2] == 1 else triton.cdiv(queries, tiling.block_m)
    columns = 1 if bias.shape[3] == 1 else triton.cdiv(keys, tiling.block_n)
    tiles = rows * columns * bias.shape[0] * bias.shape[1]
    all_tiles = triton.cdiv(queries, tiling.block_m) * triton.cdiv(keys, tiling.block_n) * batch * heads
    splits = launch.splits(tiles, all_tiles // tiles, call.processors)
    partials = dbias
    if splits > 1:
        partials = torch.empty((splits * bias.shape[0], *bias.shape[1:]), dtype=torch.float32, device=bias.device)
    launch.start(
        bias_gradient_kernel,
        (tiles * splits,),
        *operands,
        tensor4(partials),
        row_values,
        (*bias.shape[:2], batch // bias.shape[0], heads // bias.shape[1], splits),
        call.problem(rows_of(call.lists, split=False)),
        tile=call.tile(tiling, relative=True),
        SHARED_ROWS=bias.shape[2] == 1,
        SHARED_COLUMNS=bias.shape[3] == 1,
        **tiling.compiler_options(),
    )
    return dbias if splits == 1 else dbias.copy_(partials.view(splits, *bias.shape).sum(0))


def relative_bias_gradient(call: Call, operands: tuple, row_values: tuple) -> torch.Tensor:
    """The gradient of the call's relative_bias (B, Hq, 2 R + 1), fp32; arguments as `bias_gradient`'s."""
    relative_bias = call.tensors.relative_bias
    batch, heads, queries, keys = *call.q.shape[:3], call.k.shape[2]
    if batch * heads * queries * keys == 0:
        return torch.zeros_like(relative_bias)
    tiling = call.tiling(launch.ATTENTION_BIAS)
    block = tiling.block_m
    row_tiles = triton.cdiv(queries, block)
    diagonals = row_tiles + triton.cdiv(keys, block) - 1
    sums = torch.empty((batch, heads, diagonals, 2 * block), dtype=torch.float32, device=call.q.device)
    launch.start(
        diagonal_sums_kernel,
        (diagonals * batch * heads,),
        *operands,
        sums,
        row_values,
        call.problem(rows_of(call.lists, split=False)),
        tile=call.tile(tiling, relative=True),
        **tiling.compiler_options(),
    )
    # Neighbouring diagonals of tiles share distances: the second half of one is the first of the next.
    first, second = sums[..., :block].flatten(2), sums[..., block:].flatten(2)
    by_distance = F.pad(first, (0, block)) + F.pad(second, (block, 0))
    return ends_gathered(by_distance, 1 - row_tiles * block - (keys - queries), relative_bias.shape[2] // 2)


def ends_gathered(sums: torch.Tensor, first: int, radius: int) -> torch.Tensor:
    """From sums for the distances from `first` on, those from -radius to radius; the first and the last include
    all farther ones."""
    sums = F.pad(sums, (max(0, first + radius), max(0, radius + 1 - first - sums.shape[-1])))
    if radius == 0:
        return sums.sum(-1, keepdim=True)
    before = 1 - radius - min(first, -radius)
    low, middle, high = sums.tensor_split((before, before + 2 * radius - 1), -1)
    return torch.cat((low.sum(-1, keepdim=True), middle, high.sum(-1, keepdim=True)), -1)
