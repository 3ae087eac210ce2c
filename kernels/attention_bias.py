"""Attention, backward: what a bias, or a bias by distance, is to blame for.

The gradient of the scores, dS = P * (dP - delta), summed over all that shares one element of the bias. Each
program owns its elements, or its share of what they add up, and walks the tiles in a fixed order: no atomics, and
nothing larger than the bias is stored but the parts of a small one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import launch
from .scores import score_gradient, terms_of
from .tiles import head_of, load_tile, tensor4
from .walk import GRANULE, counting, first_at, key_bounds, key_count_of, key_ranges, list_of, words_of


@triton.jit
def tile_gradient(
    total,
    batch,
    head,
    start,
    key_start,
    bounds,
    terms,
    q,
    k,
    v,
    dout,
    row_values,
    shape,
    padded_rows,
    window,
    lists,
    scores,
    dropout,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to `total` the gradient of one head's scores that `bounds` show."""
    queries = start + tl.arange(0, BLOCK_M)
    q_tile = load_tile(head_of(q, batch, head), q, start, shape.queries, HEAD_DIM, BLOCK_M, WIDTH, True)
    dout_tile = load_tile(
        head_of(dout, batch, head), dout, start, shape.queries, VALUE_DIM, BLOCK_M, VALUE_WIDTH, True
    )
    key_head = head // shape.group
    key_count = key_count_of(batch, shape, window)
    k_tile = load_tile(head_of(k, batch, key_head), k, key_start, key_count, HEAD_DIM, BLOCK_N, WIDTH, True)
    v_tile = load_tile(head_of(v, batch, key_head), v, key_start, key_count, VALUE_DIM, BLOCK_N, VALUE_WIDTH, True)
    values = row_values + (batch * shape.heads + head).to(tl.int64) * 2 * padded_rows + queries
    lse, delta = tl.load(values), tl.load(values + padded_rows)
    dscores, _bent = score_gradient(
        q_tile, dout_tile, lse, delta, k_tile, v_tile, key_start, queries, bounds, shape, window, lists, scores,
        dropout, terms, True, True, BLOCK_N, PRECISION,
    )  # fmt: skip
    return total + dscores


@triton.jit
def add_tile(
    total,
    batch,
    head,
    start,
    key_start,
    q,
    k,
    v,
    dout,
    row_values,
    shape,
    padded_rows,
    window,
    lists,
    scores,
    dropout,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to `total` the gradient of one head's scores: queries from `start` on, keys from `key_start` on, as far
    as they are seen."""
    key_count = key_count_of(batch, shape, window)
    queries = start + tl.arange(0, BLOCK_M)
    if lists.full is None:
        bounds = key_bounds(queries, batch, key_count, shape, window)
        begin, _full_begin, _full_end, end = key_ranges(start, bounds, key_count, shape, window, BLOCK_M, BLOCK_N)
        if (key_start < end) & (key_start + BLOCK_N > begin):
            # Once more: kept over the branch they would cost 4 percent more instructions (sm_90, D = 128).
            bounds = key_bounds(queries, batch, key_count, shape, window)
            terms = terms_of(scores, dropout, batch, head)
            total = tile_gradient(
                total, batch, head, start, key_start, bounds, terms, q, k, v, dout, row_values, shape, padded_rows,
                window, lists, scores, dropout,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    else:
        terms = terms_of(scores, dropout, batch, head)
        # Its granule may be in the row's lists: once, or once for each number of times that its keys count.
        place = list_of(lists, batch, head, start)
        granule = key_start // GRANULE
        end = tl.load(lists.partial_offsets + place + 1)
        for entry in tl.range(
            first_at(lists.partial, tl.load(lists.partial_offsets + place), end, granule),
            first_at(lists.partial, tl.load(lists.partial_offsets + place), end, granule + 1),
        ):
            bounds = words_of(lists, entry, queries), key_count
            total = tile_gradient(
                total, batch, head, start, key_start, bounds, counting(terms, lists.partial_counts, entry),
                q, k, v, dout, row_values, shape, padded_rows, window, lists, scores, dropout,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
        end = tl.load(lists.full_offsets + place + 1)
        for entry in tl.range(
            first_at(lists.full, tl.load(lists.full_offsets + place), end, granule),
            first_at(lists.full, tl.load(lists.full_offsets + place), end, granule + 1),
        ):
            bounds = tl.full([BLOCK_M], -1, tl.int64), key_count
            total = tile_gradient(
                total, batch, head, start, key_start, bounds, counting(terms, lists.full_counts, entry),
                q, k, v, dout, row_values, shape, padded_rows, window, lists, scores, dropout,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    return total


@triton.jit
def bias_gradient_kernel(
    q,
    k,
    v,
    dout,
    dbias,
    row_values,
    shape,
    padded_rows,
    window,
    lists,
    scores,
    dropout,
    bias_batches,
    bias_heads,
    batches,
    heads,
    shares,
    SHARED_ROWS: tl.constexpr,
    SHARED_COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the bias, which `batches` batch entries, `heads` heads and, where they are SHARED, all tiles of
    rows and columns use: they are its members. Each of `shares` programs adds up some of them in a fixed order and
    stores its part at batch entry share x `bias_batches` + the bias's."""
    row_tiles, column_tiles = tl.cdiv(shape.queries, BLOCK_M), tl.cdiv(shape.keys, BLOCK_N)
    own_rows, own_columns, rows, columns = row_tiles, column_tiles, 1, 1
    if SHARED_ROWS:
        own_rows, rows = 1, row_tiles
    if SHARED_COLUMNS:
        own_columns, columns = 1, column_tiles
    share, program = tl.program_id(0) % shares, tl.program_id(0) // shares
    column, row = program % own_columns, program // own_columns % own_rows
    bias_head = program // (own_columns * own_rows) % bias_heads
    bias_batch = program // (own_columns * own_rows) // bias_heads

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    members = batches * heads * rows * columns
    most = tl.cdiv(members, shares)
    for member in tl.range(share * most, tl.minimum((share + 1) * most, members)):
        of_column, of_row = member % columns, member // columns % rows
        head, batch = member // (columns * rows) % heads, member // (columns * rows) // heads
        total = add_tile(
            total, bias_batch + batch, bias_head + head, (row + of_row) * BLOCK_M, (column + of_column) * BLOCK_N,
            q, k, v, dout, row_values, shape, padded_rows, window, lists, scores, dropout,
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip

    pointer = head_of(dbias, share * bias_batches + bias_batch, bias_head)
    i = row * BLOCK_M + tl.arange(0, BLOCK_M)
    j = column * BLOCK_N + tl.arange(0, BLOCK_N)
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
def diagonal_sums_kernel(
    q,
    k,
    v,
    dout,
    sums,
    row_values,
    shape,
    padded_rows,
    window,
    lists,
    scores,
    dropout,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program a head and diagonal of square tiles: sums the tiles, then the diagonals of what comes out; those
    hold the same distances in each."""
    tl.static_assert(BLOCK_M == BLOCK_N, "tiles must be square")
    row_tiles, column_tiles = tl.cdiv(shape.queries, BLOCK_M), tl.cdiv(shape.keys, BLOCK_N)
    diagonals = row_tiles + column_tiles - 1
    ahead = tl.program_id(0) % diagonals - (row_tiles - 1)
    flat_head = tl.program_id(0) // diagonals
    batch, head = flat_head // shape.heads, flat_head % shape.heads
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in tl.range(tl.maximum(0, -ahead), tl.minimum(row_tiles, column_tiles - ahead)):
        total = add_tile(
            total, batch, head, tile * BLOCK_M, (tile + ahead) * BLOCK_N,
            q, k, v, dout, row_values, shape, padded_rows, window, lists, scores, dropout,
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    places = sums + tl.program_id(0).to(tl.int64) * 2 * BLOCK_M
    distance = tl.arange(0, BLOCK_N)[None, :] - tl.arange(0, BLOCK_M)[:, None] + (BLOCK_M - 1)
    for diagonal in tl.range(0, 2 * BLOCK_M):
        tl.store(places + diagonal, tl.sum(tl.sum(tl.where(distance == diagonal, total, 0.0), 1), 0))


def bias_gradient(
    bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    operands: tuple,
    beside: tuple,
    options: dict,
    processors: int,
) -> torch.Tensor:
    """The gradient of `bias` (B or 1, Hq or 1, Lq or 1, Lk or 1), in its shape and dtype.

    `operands` are q, k, v and dout, `beside` what every backward kernel takes, `options` the constexprs. A bias
    that broadcasts has few elements and much to add up for each: then several programs share a tile, as many as
    keep `processors` multiprocessors busy, and their float32 parts are added in a second pass.
    """
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if batch * heads * queries * keys == 0:
        return dbias.zero_()
    # A dimension of size 1 belongs to the one program that has it, be it shared or all there is.
    rows = 1 if bias.shape[2] == 1 else triton.cdiv(queries, options["BLOCK_M"])
    columns = 1 if bias.shape[3] == 1 else triton.cdiv(keys, options["BLOCK_N"])
    tiles = rows * columns * bias.shape[0] * bias.shape[1]
    all_tiles = triton.cdiv(queries, options["BLOCK_M"]) * triton.cdiv(keys, options["BLOCK_N"]) * batch * heads
    shares = launch.splits(tiles, all_tiles // tiles, processors)
    parts = dbias
    if shares > 1:
        parts = torch.empty((shares * bias.shape[0], *bias.shape[1:]), dtype=torch.float32, device=bias.device)
    row_values, *rest = beside
    bias_gradient_kernel[(tiles * shares,)](
        *operands, tensor4(parts), row_values, *rest, *bias.shape[:2],
        batch // bias.shape[0], heads // bias.shape[1], shares,
        SHARED_ROWS=bias.shape[2] == 1, SHARED_COLUMNS=bias.shape[3] == 1, **options,
    )  # fmt: skip
    return dbias if shares == 1 else dbias.copy_(parts.view(shares, *bias.shape).sum(0))


def relative_bias_gradient(
    relative_bias: torch.Tensor, q: torch.Tensor, k: torch.Tensor, operands: tuple, beside: tuple, options: dict
) -> torch.Tensor:
    """The gradient of `relative_bias` (B, Hq, 2 R + 1), fp32; arguments as `bias_gradient`'s."""
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if batch * heads * queries * keys == 0:
        return torch.zeros_like(relative_bias)
    block = options["BLOCK_M"]
    row_tiles = triton.cdiv(queries, block)
    diagonals = row_tiles + triton.cdiv(keys, block) - 1
    sums = torch.empty((batch, heads, diagonals, 2 * block), dtype=torch.float32, device=q.device)
    diagonal_sums_kernel[(diagonals * batch * heads,)](*operands, sums, *beside, **options)
    # Neighbouring diagonals of tiles share distances: the second half of one is the first of the next.
    first, second = sums[..., :block].flatten(2), sums[..., block:].flatten(2)
    by_distance = F.pad(first, (0, block)) + F.pad(second, (block, 0))
    return ends_gathered(by_distance, 1 - row_tiles * block - (keys - queries), relative_bias.shape[2] // 2)


def ends_gathered(sums: torch.Tensor, first: int, radius: int) -> torch.Tensor:
    """Of sums for the distances from `first` on: those from -radius to radius, the ends with all beyond them."""
    sums = F.pad(sums, (max(0, first + radius), max(0, radius + 1 - first - sums.shape[-1])))
    if radius == 0:
        return sums.sum(-1, keepdim=True)
    before = 1 - radius - min(first, -radius)
    low, middle, high = sums.tensor_split((before, before + 2 * radius - 1), -1)
    return torch.cat((low.sum(-1, keepdim=True), middle, high.sum(-1, keepdim=True)), -1)
