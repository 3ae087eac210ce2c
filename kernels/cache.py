"""Attention with a cache of keys and values, contiguous or in pages, and the writing of new tokens to it.

The query heads that share a key head are rows of one tile, so that keys and values are read once for all of them:
row r of a key head is query r // group and query head r % group of its group. Keys are visited in tiles of BLOCK_N
counted from the row's first key, and split over programs at multiples of SPLIT keys (Flash-Decoding, Dao et al.
2023). Partial results are merged in ascending order. So the order of all sums depends on the row alone.

Pages are an address translation where keys are loaded. Grids follow from capacities, never from lengths, which
stay on the device.

Scales of a quantised cache multiply the scores of a key and the weights of a value, so that what is stored is only
converted. Numbers become fp8 (e4m3) by integer arithmetic, and fp8 becomes numbers so where a target has no
instructions for it, as sm_80: the bits are the same everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .attention.problem import empty_heads, products
from .attention.scores import cap, finish_scores, score_factor, scores_of
from .launch.cache import (
    CACHE_APPEND,
    CACHE_FEW_ROWS,
    CACHE_ROWS,
    QUANTISED_FEW_ROWS,
    QUANTISED_ROWS,
    SPLIT,
    SPLIT_ROWS,
)
from .launch.rows import INTERPRETER
from .tile import Tile, tile_of
from .tiles import (
    LN_2,
    LOG2_E,
    Matrix,
    Shape,
    Tensor3,
    Tensor4,
    head_of,
    load_row_values,
    load_tile,
    matrix,
    online_softmax_update,
    store_tile,
    tensor3,
    tensor4,
)

# The least scale, float32's smallest normal number; and what stands for NaN in int8 beside the scale of a page.
LEAST_SCALE: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
NO_NUMBER: tl.constexpr = tl.constexpr(-128)
# Of a float32: the sign, and the seven bits that fp8's exponent and mantissa have there.
SIGN_AND_FP8: tl.constexpr = tl.constexpr(0x87F00000 - 2**32)
TWO_TO_120: tl.constexpr = tl.constexpr(2.0**120)
# Numbers whose neighbours in float32 are 1 away, and 2^-9, as fp8's subnormal numbers are; and their bits.
INTEGERS: tl.constexpr = tl.constexpr(1.5 * 2**23)
INTEGERS_BITS: tl.constexpr = tl.constexpr(0x4B400000)
FP8_SUBNORMALS: tl.constexpr = tl.constexpr(2.0**14)
FP8_SUBNORMALS_BITS: tl.constexpr = tl.constexpr(0x46800000)


class Cache(NamedTuple):
    """Keys (page, head, place, width), values or None where they are columns of the keys, the scales of quantised
    ones (page, head, place), the table (row, page), and how many pages there are. Without a table every row is a
    page."""

    k: Tensor4
    v: Tensor4 | None
    k_scale: Tensor3 | None
    v_scale: Tensor3 | None
    table: Matrix | None
    pages: int
    last: None = None  # a tuple of tuples must end in a constant


class Tree(NamedTuple):
    """Which of a row's last keys each query sees: bytes (batch, query, column), and how many columns."""

    pointer: torch.Tensor
    batch: int
    row: int
    column: int
    columns: int


class Rows(NamedTuple):
    """The rows of the batch: sizes, how many keys each has and may have, which of them are seen, and over how many
    programs they are split (None: one). `aligned` is the Shape of scores whose diagonal is given as queries."""

    queries: int
    group: int
    key_heads: int
    batches: int
    capacity: int
    lengths: torch.Tensor
    starts: torch.Tensor | None
    tree: Tree | None
    left: int | None
    right: int | None
    splits: int | None
    aligned: Shape
    last: None = None


@triton.jit
def length_of(rows, batch):
    """How many keys a row has, within its capacity, and whether the number given was."""
    given = tl.load(rows.lengths + batch)
    return tl.minimum(tl.maximum(given, 0), rows.capacity), (given >= 0) & (given <= rows.capacity)


@triton.jit
def places_of(cache, batch, positions, exists, PAGE: tl.constexpr):
    """The page of each position of a row, its place in the page, and whether there is such a page. Positions that
    do not exist, and those in a page that does not, get page 0, which can be read."""
    if cache.table is None:
        return tl.zeros_like(positions) + batch, positions, exists
    else:
        entries = cache.table.pointer + batch.to(tl.int64) * cache.table.row
        pages = tl.load(entries + (positions // PAGE) * cache.table.column, mask=exists, other=0)
        known = (pages >= 0) & (pages < cache.pages)
        return tl.where(known, pages, 0), positions % PAGE, exists & known


@triton.jit
def token_pointers(tensor, head, pages, places):
    """Pointers to the beginnings of tokens of a head."""
    pointer = tensor.pointer + head.to(tl.int64) * tensor.head
    return pointer + pages.to(tl.int64) * tensor.batch + places.to(tl.int64) * tensor.row


@triton.jit
def load_tokens(
    tensor, tokens, exists, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, EDGE: tl.constexpr
):
    """Columns FIRST to FIRST + COUNT of tokens; zeros beside them and, if EDGE, where tokens do not exist."""
    columns = tl.arange(0, WIDTH)
    pointers = tokens[:, None] + (columns + FIRST)[None, :] * tensor.column
    if EDGE:
        return tl.load(pointers, mask=exists[:, None] & (columns < COUNT)[None, :], other=0.0)
    elif COUNT != WIDTH:
        inside = tl.broadcast_to((columns < COUNT)[None, :], (tokens.shape[0], WIDTH))
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def numbers_of(stored, tile: tl.constexpr, dtype: tl.constexpr):
    """What a cache stores, as numbers of `dtype`, which still lack their scale. The exponent of "fp8 bits" goes to
    the place of float32's, whose bias is greater by 120; subnormal numbers come out right, too."""
    if tile.STORED == "int8":
        numbers = stored.to(tl.float32)
        if tile.BY_PAGE:
            numbers = tl.where(stored == NO_NUMBER, float("nan"), numbers)
        return numbers.to(dtype)
    elif tile.STORED == "fp8":
        # Instructions of the GPU: half as many.
        return stored.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif tile.STORED == "fp8 bits":
        bits = stored.to(tl.int32)
        numbers = ((bits << 20) & SIGN_AND_FP8).to(tl.float32, bitcast=True) * TWO_TO_120
        if tile.BY_PAGE:
            numbers = tl.where((bits & 0x7F) == 0x7F, float("nan"), numbers)
        return numbers.to(dtype)
    else:
        return stored.to(dtype)


@triton.jit
def scale_of(values, tile: tl.constexpr):
    """The scale of each row of new numbers: their largest magnitude becomes the largest that the cache stores."""
    scale = tl.math.div_rn(tl.max(tl.abs(values), 1), tile.LARGEST * 1.0)
    has_nan = tl.max((values != values).to(tl.int32), 1) > 0
    return tl.where(has_nan, float("nan"), tl.maximum(scale, LEAST_SCALE))


@triton.jit
def quantised(values, scale, tile: tl.constexpr):
    """Numbers over the scales of their rows, rounded to nearest, ties to even, as what a cache stores in 8 bits.
    What is added makes a float32 whose last bit is the last one that is kept."""
    scale = tl.where(scale > 0.0, scale, float("nan"))
    values = tl.math.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    is_number = values == values
    values = tl.minimum(tl.maximum(values, -tile.LARGEST), tile.LARGEST * 1.0)
    if tile.STORED == "int8":
        codes = (values + INTEGERS).to(tl.int32, bitcast=True) - INTEGERS_BITS
        return tl.where(is_number, codes, NO_NUMBER)
    else:
        size = tl.abs(values)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = (size + FP8_SUBNORMALS).to(tl.int32, bitcast=True) - FP8_SUBNORMALS_BITS
        codes = tl.where(size < 0.015625, subnormal, normal)
        codes = tl.where(values.to(tl.int32, bitcast=True) < 0, codes | 0x80, codes)
        return tl.where(is_number, codes, 0x7F)


@triton.jit
def is_seen(keys, bounds, query, length, batch, rows):
    """Which keys each row sees: (M, BLOCK_N)."""
    first, stop = bounds
    seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < stop[:, None])
    if rows.tree is not None:
        columns = keys - (length - rows.tree.columns)
        inside = (columns >= 0) & (columns < rows.tree.columns)
        tree = rows.tree.pointer + batch.to(tl.int64) * rows.tree.batch
        offsets = query.to(tl.int64)[:, None] * rows.tree.row + columns[None, :] * rows.tree.column
        loaded = (query < rows.queries)[:, None] & inside[None, :]
        seen = seen & (tl.load(tree + offsets, mask=loaded, other=1) != 0)
    return seen


@triton.jit
def cache_step(
    state, operands, start, end, bounds, position, cache, rows, scores, tile: tl.constexpr, MASKED: tl.constexpr
):
    """Fold the keys from `start` on into (accumulator, running maximum, running sum)."""
    accumulator, row_max, row_sum = state
    q_tile, q_rest, score_terms = operands
    batch, head, query, length = position
    keys = start + tl.arange(0, tile.BLOCK_N)
    pages, places, exists = places_of(cache, batch, keys, keys < end, tile.PAGE)
    tokens = token_pointers(cache.k, head, pages, places)
    k_tile = load_tokens(cache.k, tokens, exists, 0, tile.MAIN_DIM, tile.WIDTH, MASKED)
    k_tile = numbers_of(k_tile, tile, q_tile.dtype)
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=tile.PRECISION)
    if tile.REST > 0:
        k_rest = load_tokens(cache.k, tokens, exists, tile.MAIN_DIM, tile.REST_DIM, tile.REST, MASKED)
        k_rest = numbers_of(k_rest, tile, q_tile.dtype)
        products += tl.dot(q_rest, tl.trans(k_rest), input_precision=tile.PRECISION)
    if cache.k_scale is not None:
        factors = tl.load(token_pointers(cache.k_scale, head, pages, places), mask=exists, other=0.0)
        products *= factors[None, :]
    diagonal = query + (length - rows.queries)
    values = cap(products, scores, score_terms)
    values = finish_scores(values, scores, score_terms, diagonal[:, None], keys[None, :], rows.aligned)
    if MASKED:
        values = tl.where(is_seen(keys, bounds, query, length, batch, rows), values, float("-inf"))
    if cache.table is not None:
        # What a page that does not exist holds is not a number, so that nobody takes it for one.
        values = tl.where(((keys < end) & (exists == 0))[None, :], float("nan"), values)
    weights, rescale, row_max, row_sum = online_softmax_update(
        values, score_factor(scores), row_max, row_sum, MASKED
    )
    if cache.v is None:
        v_tile = k_tile
    else:
        tokens = token_pointers(cache.v, head, pages, places)
        v_tile = load_tokens(cache.v, tokens, exists, 0, tile.VALUE_DIM, tile.VALUE_WIDTH, MASKED)
        v_tile = numbers_of(v_tile, tile, q_tile.dtype)
        if cache.v_scale is not None:
            factors = tl.load(token_pointers(cache.v_scale, head, pages, places), mask=exists, other=0.0)
    if cache.k_scale is not None:
        if q_tile.dtype == tl.float16:
            # A weight times a small scale would be less than float16's smallest number.
            v_tile = (v_tile.to(tl.float32) * factors[:, None]).to(tl.float16)
        else:
            weights *= factors[None, :]
    accumulator *= rescale[:, None]
    accumulator = tl.dot(weights.to(q_tile.dtype), v_tile, accumulator, input_precision=tile.PRECISION)
    return accumulator, row_max, row_sum


@triton.jit
def key_bounds(query, length, start, rows):
    """The keys that each row may see: from the first to before the second."""
    diagonal = query + (length - rows.queries)
    first = tl.zeros_like(query) + start
    stop = tl.zeros_like(query) + length
    if rows.left is not None:
        first = tl.maximum(first, diagonal - rows.left)
    if rows.right is not None:
        stop = tl.minimum(stop, diagonal + (rows.right + 1))
    return first, stop


@triton.jit
def key_ranges(first_query, last_query, length, start, split, rows, tile: tl.constexpr):
    """For a tile of rows and this split: where keys begin to be seen by any row, by all of them, cease to be seen
    by all and by any; all but the last on tile boundaries."""
    before = length - rows.queries
    begin, full_begin, full_end, end = start, start, length, length
    if rows.left is not None:
        begin = tl.maximum(begin, first_query + before - rows.left)
        full_begin = tl.maximum(full_begin, last_query + before - rows.left)
    if rows.right is not None:
        full_end = tl.minimum(full_end, first_query + before + rows.right + 1)
        end = tl.minimum(end, last_query + before + rows.right + 1)
    if rows.tree is not None:
        full_end = tl.minimum(full_end, length - rows.tree.columns)
    low = begin // tile.BLOCK_N * tile.BLOCK_N
    high = tl.maximum(end, 0)
    if rows.splits is not None:
        low = tl.maximum(low, split * tile.SPLIT)
        high = tl.minimum(high, (split + 1) * tile.SPLIT)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(full_begin, tile.BLOCK_N) * tile.BLOCK_N, low), high)
    full_end = tl.maximum(full_end, 0) // tile.BLOCK_N * tile.BLOCK_N
    return low, full_begin, tl.minimum(tl.maximum(full_end, full_begin), high), high


@triton.jit
def program_position(rows, tile: tl.constexpr):
    """This program's split, tile of rows, key head and batch entry."""
    program = tl.program_id(0)
    splits = 1
    if rows.splits is not None:
        splits = rows.splits
    tiles = tl.cdiv(rows.queries * rows.group, tile.BLOCK_M)
    split, flat = program % splits, program // splits
    number, flat_head = flat % tiles, flat // tiles
    return split, number * tile.BLOCK_M, flat_head % rows.key_heads, flat_head // rows.key_heads


@triton.jit
def packed_rows(start, key_head, rows, BLOCK: tl.constexpr):
    """Of the rows from `start` on: their numbers, whether they exist, their queries and their query heads."""
    row = start + tl.arange(0, BLOCK)
    query = row // rows.group
    return row, row < rows.queries * rows.group, query, key_head * rows.group + (row - query * rows.group)


@triton.jit
def row_pointers(tensor, batch, head, query):
    """Pointers to rows of a (batch, head, row) tensor, whose heads differ from row to row."""
    pointer = tensor.pointer + batch.to(tl.int64) * tensor.batch
    return pointer + head.to(tl.int64) * tensor.head + query.to(tl.int64) * tensor.row


@triton.jit
def store_rows(out, lse, accumulator, row_lse, batch, head, query, exists, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store packed rows of the result."""
    columns = tl.arange(0, WIDTH)
    pointers = row_pointers(out, batch, head, query)[:, None] + columns[None, :] * out.column
    mask = exists[:, None] & (columns < DIM)[None, :]
    tl.store(pointers, accumulator.to(out.pointer.dtype.element_ty), mask=mask)
    tl.store(row_pointers(lse, batch, head, query), row_lse, mask=exists)


@triton.jit
def cache_attention_kernel(q, out, lse, partials, lse_partials, cache, rows, scores, tile: tl.constexpr):
    """One program: BLOCK_M packed rows of a key head, and all of their keys or a split of them."""
    split, row_start, key_head, batch = program_position(rows, tile)
    length, is_known = length_of(rows, batch)
    if rows.splits is not None:  # noqa: SIM102
        # Grids follow from the capacity: splits behind the row's last key have nothing to do, and no result.
        if (split > 0) & (split * tile.SPLIT >= length):
            return
    row, exists, query, head = packed_rows(row_start, key_head, rows, tile.BLOCK_M)
    start = 0
    if rows.starts is not None:
        start = tl.maximum(tl.load(rows.starts + batch), 0)
    bounds = key_bounds(query, length, start, rows)
    last = tl.minimum(row_start + tile.BLOCK_M, rows.queries * rows.group) - 1
    ranges = key_ranges(row_start // rows.group, last // rows.group, length, start, split, rows, tile)
    low, full_begin, full_end, high = ranges

    q_rows = row_pointers(q, batch, head, query)
    q_tile = load_tokens(q, q_rows, exists, 0, tile.MAIN_DIM, tile.WIDTH, True)
    q_rest = q_tile
    if tile.REST > 0:
        q_rest = load_tokens(q, q_rows, exists, tile.MAIN_DIM, tile.REST_DIM, tile.REST, True)
    slopes = tl.zeros([tile.BLOCK_M], tl.float32)
    if scores.slopes is not None:
        pointers = scores.slopes.pointer + batch.to(tl.int64) * scores.slopes.batch + head * scores.slopes.head
        slopes = tl.load(pointers, mask=exists, other=0.0)
    score_terms = (slopes[:, None], 0, 0, 0, 0, 0, 0.0, 1.0)
    operands = (q_tile, q_rest, score_terms)
    position = (batch, key_head, query, length)

    accumulator = tl.zeros([tile.BLOCK_M, tile.VALUE_WIDTH], tl.float32)
    row_max = tl.full([tile.BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([tile.BLOCK_M], tl.float32)
    if scores.sinks is not None:
        # A sink is one more key, seen by all, whose value is zero. The first split has it.
        pointers = scores.sinks.pointer + batch.to(tl.int64) * scores.sinks.batch + head * scores.sinks.head
        sinks = tl.load(pointers, mask=exists, other=0.0) * LOG2_E
        row_max = tl.where(split == 0, sinks, float("-inf"))
        row_sum += tl.where(split == 0, 1.0, 0.0)
    state = (accumulator, row_max, row_sum)
    if (rows.left is not None) or (rows.starts is not None):
        for key_start in tl.range(low, full_begin, tile.BLOCK_N):
            state = cache_step(state, operands, key_start, high, bounds, position, cache, rows, scores, tile, True)
    for part in tl.static_range(2):
        for key_start in tl.range(
            full_begin if part == 0 else full_end, full_end if part == 0 else high, tile.BLOCK_N
        ):
            masked: tl.constexpr = part == 1
            state = cache_step(
                state, operands, key_start, high, bounds, position, cache, rows, scores, tile, masked
            )
    accumulator, row_max, row_sum = state

    # A row that saw nothing has sum 0: output 0, log-sum-exp -inf.
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    row_lse = tl.where(empty, float("-inf"), row_max + tl.log2(row_sum))
    accumulator = accumulator / row_sum[:, None]
    if rows.splits is None:
        # A length that the cache does not have cannot be refused here: its row is not a number.
        accumulator = tl.where(is_known, accumulator, float("nan"))
        row_lse = tl.where(is_known, row_lse * LN_2, float("nan"))
        store_rows(out, lse, accumulator, row_lse, batch, head, query, exists, tile.VALUE_DIM, tile.VALUE_WIDTH)
    else:
        entry = rows.batches * split + batch
        count = rows.queries * rows.group
        store_tile(
            head_of(partials, entry, key_head), partials, row_start, count, tile.VALUE_DIM, accumulator,
            tile.BLOCK_M, tile.VALUE_WIDTH,
        )  # fmt: skip
        tl.store(head_of(lse_partials, entry, key_head) + row, row_lse, mask=exists)


@triton.jit
def cache_merge_kernel(out, lse, partials, lse_partials, rows, tile: tl.constexpr):
    """One program merges BLOCK_M packed rows of a key head over the splits that their keys fill, in ascending
    order. Log-sum-exps of partial results are in log2 units."""
    program = tl.program_id(0)
    count = rows.queries * rows.group
    tiles = tl.cdiv(count, tile.BLOCK_M)
    row_start, flat_head = program % tiles * tile.BLOCK_M, program // tiles
    key_head, batch = flat_head % rows.key_heads, flat_head // rows.key_heads
    length, is_known = length_of(rows, batch)
    row, exists, query, head = packed_rows(row_start, key_head, rows, tile.BLOCK_M)
    accumulator = tl.zeros([tile.BLOCK_M, tile.VALUE_WIDTH], tl.float32)
    row_max = tl.full([tile.BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([tile.BLOCK_M], tl.float32)
    for split in tl.range(0, tl.maximum(tl.cdiv(length, tile.SPLIT), 1)):
        entry = rows.batches * split + batch
        part_lse = load_row_values(head_of(lse_partials, entry, key_head), lse_partials, row, count, float("-inf"))
        part = load_tile(
            head_of(partials, entry, key_head), partials, row_start, count, tile.VALUE_DIM, tile.BLOCK_M,
            tile.VALUE_WIDTH, True,
        )  # fmt: skip
        new_max = tl.maximum(row_max, part_lse)
        # A row that saw nothing so far pivots on 0: -inf minus -inf never happens.
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale, weight = tl.exp2(row_max - pivot), tl.exp2(part_lse - pivot)
        accumulator = accumulator * rescale[:, None] + part * weight[:, None]
        row_sum = row_sum * rescale + weight
        row_max = new_max
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    row_lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    accumulator = tl.where(is_known, accumulator / row_sum[:, None], float("nan"))
    row_lse = tl.where(is_known, row_lse, float("nan"))
    store_rows(out, lse, accumulator, row_lse, batch, head, query, exists, tile.VALUE_DIM, tile.VALUE_WIDTH)


@triton.jit
def store_new(
    new,
    target,
    scales,
    position,
    exists,
    pages,
    places,
    tile: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write one head's new tokens to their places, quantised where there are scales."""
    batch, head, token = position
    columns = tl.arange(0, WIDTH)
    mask = exists[:, None] & (columns < DIM)[None, :]
    source = head_of(new, batch, head) + token.to(tl.int64) * new.row
    values = tl.load(source[:, None] + columns[None, :] * new.column, mask=mask, other=0.0)
    if scales is not None:
        values = values.to(tl.float32)
        scale_pointers = token_pointers(scales, head, pages, places)
        if tile.BY_PAGE:
            scale = tl.load(scale_pointers, mask=exists, other=1.0)
        else:
            scale = scale_of(values, tile)
            tl.store(scale_pointers, scale, mask=exists)
        values = quantised(values, scale, tile)
    pointers = token_pointers(target, head, pages, places)[:, None] + columns[None, :] * target.column
    tl.store(pointers, values.to(target.pointer.dtype.element_ty), mask=mask)


@triton.jit
def cache_append_kernel(k, v, cache, rows, count, tile: tl.constexpr):
    """One program writes BLOCK_M of a row's `count` new tokens of one head. Those of a row whose length the cache
    does not have, and those for pages that do not exist, are not written."""
    program = tl.program_id(0)
    tiles = tl.cdiv(count, tile.BLOCK_M)
    token, flat_head = program % tiles * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M), program // tiles
    head, batch = flat_head % rows.key_heads, flat_head // rows.key_heads
    length, is_known = length_of(rows, batch)
    positions = length - count + token
    exists = (token < count) & is_known & (length >= count)
    pages, places, exists = places_of(cache, batch, tl.maximum(positions, 0), exists, tile.PAGE)
    position = (batch, head, token)
    store_new(k, cache.k, cache.k_scale, position, exists, pages, places, tile, tile.DIM, tile.WIDTH)
    if v is not None:
        store_new(
            v, cache.v, cache.v_scale, position, exists, pages, places, tile, tile.VALUE_DIM, tile.VALUE_WIDTH
        )  # fmt: skip


def cache_of(storage: Any, table: torch.Tensor | None) -> Cache:
    """A cache as a kernel argument. Pages may be anywhere in it; within a token offsets are 32-bit."""
    for name, t in (("k_cache", storage.keys), ("v_cache", storage.values)):
        if t is not None and (t.shape[3] - 1) * t.stride(3) >= 2**31:
            raise ValueError(f"{name}'s columns must lie within 2**31 elements, got strides {t.stride()}")
    keys, values = (None if t is None else Tensor4(_bytes(t), *t.stride()) for t in (storage.keys, storage.values))
    k_scale, v_scale = (
        # A page's scale is that of all its places.
        None if t is None else Tensor3(t, *t.stride(), *(0,) * (3 - t.dim()))
        for t in (storage.k_scale, storage.v_scale)
    )
    return Cache(keys, values, k_scale, v_scale, None if table is None else matrix(table), len(storage.keys))


def _bytes(t: torch.Tensor) -> torch.Tensor:
    """fp8 as bytes with a sign."""
    return t.view(torch.int8) if t.dtype.itemsize == 1 else t


STORED = {torch.int8: ("int8", 127), torch.float8_e4m3fn: ("fp8", 448)}
# Families with instructions that convert fp8: a third of the instructions for each number.
CONVERTS_FP8 = ("sm_90", "sm_100", "sm_120")


def stored_as(storage: Any, family: str) -> dict[str, Any]:
    """Compile-time choices: how numbers are stored ("" as they are), the largest one, and whether a scale is that
    of a page."""
    stored, largest = STORED.get(storage.keys.dtype, ("", 0))
    if stored == "fp8" and family not in CONVERTS_FP8:
        stored = "fp8 bits"
    return {
        "STORED": stored, "LARGEST": largest,
        "BY_PAGE": storage.k_scale is not None and storage.k_scale.dim() == 2,
    }  # fmt: skip


def capacity_of(storage: Any, tensors: Any) -> int:
    """How many keys a row may have; none in a cache without pages, so that none is read."""
    pages, _, page, _ = storage.keys.shape
    return 0 if pages == 0 else page * (1 if tensors.block_table is None else tensors.block_table.shape[1])


def rows_of(q: torch.Tensor, storage: Any, tensors: Any, spec: Any, splits: int | None) -> Rows:
    """The rows as a kernel argument."""
    tree = tensors.tree_mask
    if tree is not None:
        tree = tree.view(torch.uint8)
        tree = Tree(tree, *tree.stride(), tree.shape[2])
    heads, key_heads, zero = q.shape[1], storage.keys.shape[1], tl.constexpr(0)
    right = spec.attention.right
    return Rows(
        q.shape[2], heads // key_heads, key_heads, q.shape[0], capacity_of(storage, tensors),
        tensors.lengths.contiguous(),
        None if tensors.starts is None else tensors.starts.contiguous(), tree, spec.attention.left,
        zero if right == 0 else right, splits, Shape(heads, heads // key_heads, zero, zero, q.shape[0]),
    )  # fmt: skip


def kind_of(q: torch.Tensor, storage: Any, spec: Any, tensors: Any) -> str:
    """Which of a table's rows a call needs, see `launch.look_up`. float16 multiplies values by their scales, which
    needs as many registers as what shapes scores."""
    shaped = tensors.alibi_slopes, tensors.tree_mask, tensors.starts, spec.attention.left
    is_shaped = spec.attention.softcap or any(t is not None for t in shaped)
    return "shaped" if is_shaped or (storage.k_scale is not None and q.dtype == torch.float16) else "plain"


def tile_for(q: torch.Tensor, storage: Any, spec: Any, tiling: launch.Tiling, family: str) -> Tile:
    """The compile-time choices of a launch. Keys that hold the values are kept as these and the rest."""
    width, value_width = q.shape[3], spec.value_width
    main = value_width if storage.values is None else width
    rest = width - main
    return tile_of(
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        MAIN_DIM=main,
        WIDTH=launch.tile_width(main),
        REST_DIM=rest,
        REST=launch.tile_width(rest) if rest else 0,
        VALUE_DIM=value_width,
        VALUE_WIDTH=launch.tile_width(value_width),
        PAGE=storage.keys.shape[2],
        SPLIT=SPLIT,
        PRECISION=products(spec.attention.precision, q.element_size(), launch.tile_width(width)),
        **stored_as(storage, family),
    )


def cache_attention(q: torch.Tensor, storage: Any, spec: Any, tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax of the scores over each row's own keys, times its values, and the log-sum-exp.

    q (B, Hq, Lq, D); `storage` has keys (pages, Hkv, page, D) and values (pages, Hkv, page, Dv) or None, where
    they are the first Dv columns of the keys, and k_scale and v_scale of quantised ones, fp32 (pages, Hkv, page)
    or (pages, Hkv); `spec` the options of a call and value_width, `tensors` lengths (B,)
    int32, starts (B,) int32, block_table (B, most pages) int32, alibi_slopes and sinks (B, Hq) fp32, tree_mask (B,
    Lq, M) bool, None for what is not asked. Returns out (B, Hq, Lq, Dv) in q's dtype and lse (B, Hq, Lq) in nats,
    fp32. A row whose length is not between 0 and its capacity, or whose pages do not exist, is NaN.
    """
    batch, heads, queries, _ = q.shape
    out = empty_heads(batch, heads, queries, spec.value_width, q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    key_heads = storage.keys.shape[1]
    count = queries * (heads // key_heads)
    with launch.on_device(q):
        family = launch.family(cache_attention_kernel, q.device)
        few, many = (
            (CACHE_FEW_ROWS, CACHE_ROWS) if storage.k_scale is None else (QUANTISED_FEW_ROWS, QUANTISED_ROWS)
        )
        widest = launch.tile_width(max(spec.value_width, q.shape[3] if storage.values is not None else 0))
        tiling = launch.look_up(
            few if count <= 16 else many, family, q.element_size(), widest, kind_of(q, storage, spec, tensors)
        )
        rows = rows_of(q, storage, tensors, spec, None)
        splits = triton.cdiv(rows.capacity, SPLIT) if count <= SPLIT_ROWS else 1
        partials = lse_partials = None
        if splits > 1:
            rows = rows._replace(splits=splits)
            shape = splits * batch, key_heads, count
            partials = torch.empty((*shape, spec.value_width), dtype=torch.float32, device=q.device)
            lse_partials = torch.empty(shape, dtype=torch.float32, device=q.device)
        tile = tile_for(q, storage, spec, tiling, family)
        scores = scores_of(
            spec.attention.scale, spec.attention.softcap or None, tensors.alibi_slopes, None, None, tensors.sinks
        )
        programs = triton.cdiv(count, tiling.block_m) * key_heads * batch
        launch.start(
            cache_attention_kernel,
            (programs * splits,),
            tensor4(q),
            tensor4(out),
            tensor3(lse),
            None if partials is None else tensor4(partials),
            None if lse_partials is None else tensor3(lse_partials),
            cache_of(storage, tensors.block_table),
            rows,
            scores,
            tile=tile,
            **tiling.compiler_options(),
        )
        if splits > 1:
            launch.start(
                cache_merge_kernel,
                (triton.cdiv(count, CACHE_APPEND.block_m) * key_heads * batch,),
                tensor4(out),
                tensor3(lse),
                tensor4(partials),
                tensor3(lse_partials),
                rows,
                tile=tile_for(q, storage, spec, CACHE_APPEND, family),
                **CACHE_APPEND.compiler_options(),
            )
    return out, lse


def cache_append(storage: Any, k: torch.Tensor, v: torch.Tensor | None, tensors: Any) -> None:
    """Write new keys (B, Hkv, new, D) and values, or None, to the ends of their rows, whose lengths count them."""
    if k.numel() == 0:
        return
    with launch.on_device(k):
        tiling, width = CACHE_APPEND, k.shape[3]
        value_width = width if v is None else v.shape[3]
        rows = Rows(
            1, 1, k.shape[1], k.shape[0], capacity_of(storage, tensors), tensors.lengths.contiguous(), None, None,
            None, None, None, Shape(1, 1, tl.constexpr(0), tl.constexpr(0), 1),
        )  # fmt: skip
        launch.start(cache_append_kernel, (triton.cdiv(k.shape[2], tiling.block_m) * k.shape[1] * k.shape[0],),
            tensor4(k),
            None if v is None else tensor4(v),
            cache_of(storage, tensors.block_table),
            rows,
            k.shape[2],
            tile=tile_of(
                BLOCK_M=tiling.block_m, DIM=width, WIDTH=launch.tile_width(width), VALUE_DIM=value_width,
                VALUE_WIDTH=launch.tile_width(value_width), PAGE=storage.keys.shape[2],
                **stored_as(storage, INTERPRETER),
            ),
            **tiling.compiler_options(),
        )  # fmt: skip
