"""Attention whose bits depend on each row alone, of keys in tensors or in a cache, contiguous or in pages.

One kernel serves a single query and thousands. A tile holds rows of one sequence: row r of a key head is query
r // group and query head r % group of its group. Keys are visited in tiles of BLOCK_N, counted from the sequence's
first key. The softmax begins anew at every multiple of SPLIT keys, and what a split gives is merged with those
before it. One program does so for all splits; or, where rows are few, each split is a program of its own, and
`invariant_merge_kernel` merges them in the same order, by the same function.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .attention.problem import empty_heads, products
from .attention.scores import Scores, cap, finish_scores, score_factor, scores_of
from .cache import Tree, load_tokens, places_of, row_pointers, token_pointers
from .launch.invariant import INVARIANT, MASKS_OF_BITS, SPLIT, SPLIT_ROWS, merge_warps
from .tile import Tile, tile_of
from .tiles import (
    LN_2,
    LOG2_E,
    Matrix,
    Shape,
    Tensor4,
    head_of,
    load_tile,
    matrix,
    online_softmax_update,
    tensor3,
    tensor4,
)

# No position is greater.
FAR: tl.constexpr = tl.constexpr(2**31 - 1)
# What the table of sequences holds of each: its batch entry, first query, queries, first key, keys, at which key
# its first query stands, the number of its first tile, and whether its length is one that the cache may have.
COLUMNS: tl.constexpr = tl.constexpr(8)


class Keys(NamedTuple):
    """Keys and values (page, head, place, width), the table (entry, page), and how many pages there are. Without a
    table every batch entry is a page."""

    k: Tensor4
    v: Tensor4
    table: Matrix | None
    pages: int
    last: None = None  # a tuple of tuples must end in a constant


class Sequences(NamedTuple):
    """The sequences of a launch: their table int32 (count, COLUMNS), key heads, query heads that share one, batch
    entries, tiles at most, over how many programs each is split (None: one); which keys they see: up to `left`
    before the diagonal and `right` after it, and those of an interval int32 (batch, 2, queries + keys), see
    attention.loops.Window; how many queries a batch entry has; which of the last keys a tree shows. `aligned` is
    the Shape of scores whose diagonal is given as queries."""

    table: torch.Tensor
    count: int
    key_heads: int
    group: int
    batches: int
    tiles: int
    splits: int | None
    left: int | None
    right: int | None
    intervals: torch.Tensor | None
    interval_batch: int | None
    interval_length: int | None
    queries: int
    tree: Tree | None
    aligned: Shape
    last: None = None


@triton.jit
def sequence_at(number, sequences):
    """Pointer to the table's entry of the sequence that the tile of this number belongs to, by binary search."""
    low, high = 0, sequences.count
    while low + 1 < high:
        middle = (low + high) // 2
        before = tl.load(sequences.table + middle * COLUMNS + 6) <= number
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return sequences.table + low * COLUMNS


@triton.jit
def rows_at(start, key_head, queries, sequences, BLOCK: tl.constexpr):
    """Of the packed rows from `start` on: whether they exist, their queries and their query heads."""
    row = start + tl.arange(0, BLOCK)
    query = row // sequences.group
    return row < queries * sequences.group, query, key_head * sequences.group + (row - query * sequences.group)


@triton.jit
def bounds_of(query, diagonal, entry, first_query, first_key, key_count, sequences):
    """The keys of its sequence that each row sees: from the first to before the second."""
    first = tl.zeros_like(query)
    stop = tl.zeros_like(query) + key_count
    if sequences.left is not None:
        first = tl.maximum(first, diagonal - sequences.left)
    if sequences.right is not None:
        stop = tl.minimum(stop, diagonal + (sequences.right + 1))
    if sequences.intervals is not None:
        place = tl.minimum(first_query + query, sequences.queries - 1)
        pointers = sequences.intervals + entry.to(tl.int64) * sequences.interval_batch + place
        first = tl.maximum(first, tl.load(pointers) - first_key)
        stop = tl.minimum(stop, tl.load(pointers + sequences.interval_length) - first_key)
    return first, stop


@triton.jit
def ranges_of(bounds, exists, key_count, sequences, tile: tl.constexpr):
    """Of a tile of rows: where keys begin to be seen by any of them, by all, cease to be seen by all and by any;
    all but the last on tile boundaries."""
    begin = tl.min(tl.where(exists, bounds[0], FAR), 0)
    full_begin = tl.cdiv(tl.max(tl.where(exists, bounds[0], 0), 0), tile.BLOCK_N) * tile.BLOCK_N
    full_end = tl.min(tl.where(exists, bounds[1], FAR), 0)
    if sequences.tree is not None:
        full_end = tl.minimum(full_end, key_count - sequences.tree.columns)
    full_end = tl.maximum(full_end, 0) // tile.BLOCK_N * tile.BLOCK_N
    end = tl.max(tl.where(exists, bounds[1], 0), 0)
    return tl.minimum(begin, end) // tile.BLOCK_N * tile.BLOCK_N, full_begin, full_end, end


@triton.jit
def terms_of_rows(entry, head, exists, scores, BLOCK: tl.constexpr):
    """The slope and the scale of each row's head."""
    slopes, head_scales = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if scores.slopes is not None:
        pointers = scores.slopes.pointer + entry.to(tl.int64) * scores.slopes.batch + head * scores.slopes.head
        slopes = tl.load(pointers, mask=exists, other=0.0)
    if scores.head_scale is not None:
        pointers = scores.head_scale.pointer + entry.to(tl.int64) * scores.head_scale.batch
        head_scales = tl.load(pointers + head * scores.head_scale.head, mask=exists, other=0.0)
    return slopes, head_scales


@triton.jit
def load_keys(
    tensor, start, position, pages, places, exists, keys, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    tile: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of keys or values from `start` on. Without pages they lie one after another."""
    entry, key_head, first_key, key_count = position
    if keys.table is None:
        pointer = head_of(tensor, entry, key_head)
        stop = first_key + key_count
        return load_tile(pointer, tensor, first_key + start, stop, COUNT, tile.BLOCK_N, WIDTH, MASKED)
    else:
        tokens = token_pointers(tensor, key_head, pages, places)
        return load_tokens(tensor, tokens, exists, 0, COUNT, WIDTH, MASKED)


@triton.jit
def bits_below(count):
    """A word whose bits below `count`, of any size, are set."""
    return tl.where(count >= 32, -1, (1 << tl.minimum(tl.maximum(count, 0), 31)) - 1)


@triton.jit
def is_between(first, stop, tile: tl.constexpr):
    """Which of a tile's columns lie from `first` to before `stop`, a number for each row: (rows, BLOCK_N)."""
    columns = tl.arange(0, tile.BLOCK_N)[None, :]
    if tile.BY_BITS:
        # A word for 32 columns of each row. A thread's columns are neighbours, so each is tested by a constant. To
        # be compared as below, their numbers would wait in registers from one split to the next.
        words = (bits_below(stop) & ~bits_below(first))[:, None]
        for word in tl.static_range(1, tile.BLOCK_N // 32):
            bits = bits_below(stop - 32 * word) & ~bits_below(first - 32 * word)
            words = tl.where(columns >= 32 * word, bits[:, None], words)
        return ((words >> (columns % 32)) & 1) != 0
    else:
        return (columns >= first[:, None]) & (columns < stop[:, None])


@triton.jit
def invariant_step(
    state, operands, start, bounds, position, keys, sequences, scores, tile: tl.constexpr, MASKED: tl.constexpr
):
    """Fold the keys from `start` on into (accumulator, running maximum, running sum)."""
    accumulator, row_max, row_sum = state
    q_tile, score_terms, query, diagonal = operands
    entry, _, first_key, key_count = position
    columns = start + tl.arange(0, tile.BLOCK_N)
    pages, places, exists = places_of(keys, entry, first_key + columns, columns < key_count, tile.PAGE)
    k_tile = load_keys(
        keys.k, start, position, pages, places, exists, keys, tile.HEAD_DIM, tile.WIDTH, tile, MASKED
    )
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=tile.PRECISION)
    values = cap(products, scores, score_terms)
    values = finish_scores(values, scores, score_terms, diagonal[:, None], columns[None, :], sequences.aligned)
    if MASKED:
        seen = is_between(bounds[0] - start, bounds[1] - start, tile)
        if sequences.tree is not None:
            place = columns - (key_count - sequences.tree.columns)
            inside = (place >= 0) & (place < sequences.tree.columns)
            tree = sequences.tree.pointer + entry.to(tl.int64) * sequences.tree.batch
            offsets = query.to(tl.int64)[:, None] * sequences.tree.row + place[None, :] * sequences.tree.column
            loaded = (query < sequences.queries)[:, None] & inside[None, :]
            seen = seen & (tl.load(tree + offsets, mask=loaded, other=1) != 0)
        values = tl.where(seen, values, float("-inf"))
    if keys.table is not None:
        # What a page that does not exist holds is not a number.
        values = tl.where(((columns < key_count) & (exists == 0))[None, :], float("nan"), values)
    weights, rescale, row_max, row_sum = online_softmax_update(
        values, score_factor(scores), row_max, row_sum, MASKED
    )
    v_tile = load_keys(
        keys.v, start, position, pages, places, exists, keys, tile.VALUE_DIM, tile.VALUE_WIDTH, tile, MASKED
    )
    accumulator *= rescale[:, None]
    accumulator = tl.dot(weights.to(v_tile.dtype), v_tile, accumulator, input_precision=tile.PRECISION)
    return accumulator, row_max, row_sum


@triton.jit
def split_result(split, ranges, operands, bounds, position, keys, sequences, scores, tile: tl.constexpr):
    """Attention to the keys of one split: the result and its log-sum-exp in log2 units."""
    begin, full_begin, full_end, end = ranges
    low = tl.maximum(begin, split * tile.SPLIT)
    high = tl.minimum(end, (split + 1) * tile.SPLIT)
    full_begin = tl.minimum(tl.maximum(full_begin, low), high)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), high)
    state = (
        tl.zeros([tile.BLOCK_M, tile.VALUE_WIDTH], tl.float32),
        tl.full([tile.BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([tile.BLOCK_M], tl.float32),
    )
    if (sequences.left is not None) or (sequences.intervals is not None):
        for start in tl.range(low, full_begin, tile.BLOCK_N):
            state = invariant_step(state, operands, start, bounds, position, keys, sequences, scores, tile, True)
    for part in tl.static_range(2):
        for start in tl.range(
            full_begin if part == 0 else full_end, full_end if part == 0 else high, tile.BLOCK_N
        ):
            masked: tl.constexpr = part == 1
            state = invariant_step(state, operands, start, bounds, position, keys, sequences, scores, tile, masked)
    accumulator, row_max, row_sum = state
    # A row that saw nothing has sum 0: result 0, log-sum-exp -inf.
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    return accumulator / row_sum[:, None], tl.where(empty, float("-inf"), row_max + tl.log2(row_sum))


@triton.jit
def before_all_splits(batch, head, exists, scores, tile: tl.constexpr):
    """Maximum and sum before the first split: nothing, or the sink, one more key whose value is zero."""
    row_max = tl.full([tile.BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([tile.BLOCK_M], tl.float32)
    if scores.sinks is not None:
        pointers = scores.sinks.pointer + batch.to(tl.int64) * scores.sinks.batch + head * scores.sinks.head
        row_max = tl.load(pointers, mask=exists, other=0.0) * LOG2_E
        row_sum += 1.0
    return row_max, row_sum


@triton.jit
def merge_weights(row_max, row_sum, part_lse):
    """Merge the maxima and sums with what a split gives; the factors of what was merged so far and of the part.
    Multiply-adds are written out: the same rounding in every kernel."""
    new_max = tl.maximum(row_max, part_lse)
    # A row that saw nothing so far pivots on 0: -inf minus -inf never happens.
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale, weight = tl.exp2(row_max - pivot), tl.exp2(part_lse - pivot)
    return new_max, tl.fma(row_sum, rescale, weight), rescale, weight


@triton.jit
def merge_values(so_far, part, rescale, weight):
    """Merge what a split gives."""
    return tl.fma(part, tl.broadcast_to(weight[:, None], part.shape), so_far * rescale[:, None])


@triton.jit
def place_of_tile(split, number, key_head, sequences):
    """Where partial results of a tile lie, as a number of tiles."""
    return (split * sequences.tiles + number).to(tl.int64) * sequences.key_heads + key_head


@triton.jit
def part_pointers(partials, place, tile: tl.constexpr):
    """Pointers to a tile, whose rows lie one after the other: offsets within it are 32-bit."""
    columns = tl.arange(0, tile.VALUE_WIDTH)
    offsets = tl.arange(0, tile.BLOCK_M)[:, None] * tile.VALUE_WIDTH + columns[None, :]
    return partials + place * (tile.BLOCK_M * tile.VALUE_WIDTH) + offsets


@triton.jit
def merged_values(waiting, part, rescale, weight, has_waited, tile: tl.constexpr):
    """Merge what a split gives with what waits, if anything does."""
    so_far = tl.zeros([tile.BLOCK_M, tile.VALUE_WIDTH], tl.float32)
    if has_waited:
        so_far = tl.load(waiting)
    return merge_values(so_far, part, rescale, weight)


@triton.jit
def store_rows(out, values, row_sum, position, exists, is_known, tile: tl.constexpr):
    """Store rows of the result. A length that a cache does not have cannot be refused here: its row is not a
    number."""
    entry, head, query = position
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    values = tl.where(is_known, values / row_sum[:, None], float("nan"))
    columns = tl.arange(0, tile.VALUE_WIDTH)
    pointers = row_pointers(out, entry, head, query)[:, None] + columns[None, :] * out.column
    mask = exists[:, None] & (columns < tile.VALUE_DIM)[None, :]
    tl.store(pointers, values.to(out.pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_lse(lse, row_max, row_sum, position, exists, is_known):
    """Store the log-sum-exps of rows."""
    entry, head, query = position
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    row_lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    row_lse = tl.where(is_known, row_lse, float("nan"))
    tl.store(row_pointers(lse, entry, head, query), row_lse, mask=exists)


@triton.jit
def rows_again(found, number, key_head, sequences, tile: tl.constexpr):
    """The rows of a tile once more: (entry, heads, rows of tensors), whether they exist, and whether their
    sequence's length is one that the cache may have. What is read again takes no registers while keys are
    visited."""
    entry, first_query = tl.load(found, volatile=True), tl.load(found + 1, volatile=True)
    queries, first_tile = tl.load(found + 2, volatile=True), tl.load(found + 6, volatile=True)
    exists, query, head = rows_at((number - first_tile) * tile.BLOCK_M, key_head, queries, sequences, tile.BLOCK_M)
    return (entry, head, first_query + query), exists, tl.load(found + 7, volatile=True) != 0


@triton.jit
def invariant_attention_kernel(q, out, lse, partials, lse_partials, keys, sequences, scores, tile: tl.constexpr):
    """One program: BLOCK_M packed rows of a sequence and a key head, and all of their keys or a split of them."""
    program = tl.program_id(0)
    splits = 1
    if sequences.splits is not None:
        splits = sequences.splits
    split, program = program % splits, program // splits
    # The last tiles of a sequence see the most keys. They come first.
    number, key_head = sequences.tiles - 1 - program // sequences.key_heads, program % sequences.key_heads
    found = sequence_at(number, sequences)
    entry, first_query, queries = tl.load(found), tl.load(found + 1), tl.load(found + 2)
    first_key, key_count, shift = tl.load(found + 3), tl.load(found + 4), tl.load(found + 5)
    row_start = (number - tl.load(found + 6)) * tile.BLOCK_M
    # The number of tiles is a bound: some may be of no sequence. Nor need a split have keys.
    if (row_start >= queries * sequences.group) | ((split > 0) & (split * tile.SPLIT >= key_count)):
        return
    exists, query, head = rows_at(row_start, key_head, queries, sequences, tile.BLOCK_M)
    diagonal = query + shift
    bounds = bounds_of(query, diagonal, entry, first_query, first_key, key_count, sequences)
    ranges = ranges_of(bounds, exists, key_count, sequences, tile)
    begin, end = ranges[0], ranges[3]

    rows = first_query + query
    q_tile = load_tokens(q, row_pointers(q, entry, head, rows), exists, 0, tile.HEAD_DIM, tile.WIDTH, True)
    slopes, head_scales = terms_of_rows(entry, head, exists, scores, tile.BLOCK_M)
    score_terms = (slopes[:, None], 0, 0, 0, 0, 0, 0.0, head_scales[:, None])
    operands = (q_tile, score_terms, query, diagonal)
    position = (entry, key_head, first_key, key_count)
    if sequences.splits is None:
        # What is merged so far waits in memory, since registers are full while keys are visited.
        row_max, row_sum = before_all_splits(entry, head, exists, scores, tile)
        before = begin // tile.SPLIT
        last = tl.maximum(tl.cdiv(end, tile.SPLIT) - 1, before)
        for each in tl.range(before, last + 1):
            part, part_lse = split_result(each, ranges, operands, bounds, position, keys, sequences, scores, tile)
            row_max, row_sum, rescale, weight = merge_weights(row_max, row_sum, part_lse)
            # The tile's own number, so that pointers are computed here.
            again = tl.load(found + 6, volatile=True) + row_start // tile.BLOCK_M
            waiting = part_pointers(partials, place_of_tile(split, again, key_head, sequences), tile)
            if each < last:
                tl.store(waiting, merged_values(waiting, part, rescale, weight, each > before, tile))
            else:
                row, there, is_known = rows_again(found, number, key_head, sequences, tile)
                merged = merged_values(waiting, part, rescale, weight, each > before, tile)
                store_rows(out, merged, row_sum, row, there, is_known, tile)
            tl.debug_barrier()
        row, there, is_known = rows_again(found, number, key_head, sequences, tile)
        store_lse(lse, row_max, row_sum, row, there, is_known)
    else:
        part, part_lse = split_result(split, ranges, operands, bounds, position, keys, sequences, scores, tile)
        place = place_of_tile(split, number, key_head, sequences)
        tl.store(part_pointers(partials, place, tile), part)
        tl.store(lse_partials + place * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M), part_lse)


@triton.jit
def invariant_merge_kernel(out, lse, partials, lse_partials, sequences, scores, tile: tl.constexpr):
    """One program merges BLOCK_M packed rows over the splits that their keys fill, in ascending order."""
    program = tl.program_id(0)
    number, key_head = program // sequences.key_heads, program % sequences.key_heads
    found = sequence_at(number, sequences)
    entry, first_query, queries = tl.load(found), tl.load(found + 1), tl.load(found + 2)
    key_count = tl.load(found + 4)
    row_start = (number - tl.load(found + 6)) * tile.BLOCK_M
    is_known = tl.load(found + 7) != 0
    if row_start >= queries * sequences.group:
        return
    exists, query, head = rows_at(row_start, key_head, queries, sequences, tile.BLOCK_M)
    rows = first_query + query
    row_max, row_sum = before_all_splits(entry, head, exists, scores, tile)
    merged = tl.zeros([tile.BLOCK_M, tile.VALUE_WIDTH], tl.float32)
    for split in tl.range(0, tl.maximum(tl.cdiv(key_count, tile.SPLIT), 1)):
        place = place_of_tile(split, number, key_head, sequences)
        part_lse = tl.load(lse_partials + place * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M))
        row_max, row_sum, rescale, weight = merge_weights(row_max, row_sum, part_lse)
        part = tl.load(part_pointers(partials, place, tile))
        merged = merge_values(merged, part, rescale, weight)
    place = (entry, head, rows)
    store_rows(out, merged, row_sum, place, exists, is_known, tile)
    store_lse(lse, row_max, row_sum, place, exists, is_known)


def table_of(columns: list[torch.Tensor | int], block: int, group: int | None) -> torch.Tensor:
    """The table of sequences, from all of its columns but the number of the first tile: int32 (n, COLUMNS). Tiles
    are of `block` packed rows, `group` of them for each query, or of `block` keys if that is None."""
    count, device = next((len(t), t.device) for t in columns if isinstance(t, torch.Tensor))
    entry, first_query, queries, first_key, keys, shift, is_known = (
        t.int() if isinstance(t, torch.Tensor) else torch.full((count,), t, dtype=torch.int32, device=device)
        for t in columns
    )
    tiles = ((keys if group is None else queries * group) + (block - 1)) // block
    first_tile = tiles.cumsum(0).int() - tiles
    return torch.stack((entry, first_query, queries, first_key, keys, shift, first_tile, is_known), 1)


def most_tiles(table: torch.Tensor, batch: int, rows: int, block: int) -> int:
    """At most so many tiles have the sequences of a batch whose entries have `rows` rows, known without a look at
    their lengths."""
    return batch * triton.cdiv(rows, block) + len(table) - batch


def sequences_of(
    q: torch.Tensor, key_heads: int, spec: Any, tensors: Any, table: torch.Tensor, tiles: int,
    splits: int | None = None,
) -> Sequences:  # fmt: skip
    """`Sequences` as a kernel argument."""
    batch, heads, queries, _ = q.shape
    group, zero = heads // key_heads, tl.constexpr(0)
    intervals, tree = (getattr(tensors, name, None) for name in ("intervals", "tree_mask"))
    intervals = None if intervals is None else intervals.contiguous()
    if tree is not None:
        tree = tree.view(torch.uint8)
        tree = Tree(tree, *tree.stride(), tree.shape[2])
    return Sequences(
        table, len(table), key_heads, group, batch, tiles, splits, spec.left,
        zero if spec.right == 0 else spec.right, intervals,
        None if intervals is None else intervals.stride(0), None if intervals is None else intervals.shape[2],
        queries, tree, Shape(heads, group, zero, zero, batch),
    )  # fmt: skip


def scores_for(spec: Any, tensors: Any) -> Scores:
    """What is done to the scores, as a kernel argument."""
    return scores_of(
        spec.scale, spec.softcap or None, tensors.alibi_slopes, None, None, tensors.sinks,
        head_scale=getattr(tensors, "head_scale", None),
    )  # fmt: skip


def tile_for(q: torch.Tensor, v: torch.Tensor, page: int, spec: Any, tiling: launch.Tiling) -> Tile:
    """The compile-time choices of a launch."""
    width, value_width = launch.tile_width(q.shape[3]), launch.tile_width(v.shape[3])
    return tile_of(
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        HEAD_DIM=q.shape[3],
        WIDTH=width,
        VALUE_DIM=v.shape[3],
        VALUE_WIDTH=value_width,
        PAGE=page,
        SPLIT=SPLIT,
        BY_BITS=launch.family(invariant_attention_kernel, q.device) in MASKS_OF_BITS,
        PRECISION=products(spec.precision, q.element_size(), max(width, value_width)),
    )


def tiling_for(table: dict, q: torch.Tensor, v: torch.Tensor, spec: Any, tensors: Any) -> launch.Tiling:
    """The table's row: one for all calls of a layer, whatever their lengths, masks, windows and pages."""
    family = launch.family(invariant_attention_kernel, q.device)
    widest = launch.tile_width(max(q.shape[3], v.shape[3]))
    by_head = tensors.alibi_slopes, getattr(tensors, "head_scale", None)
    shaped = spec.softcap or any(t is not None for t in by_head)
    return launch.look_up(table, family, q.element_size(), widest, "shaped" if shaped else "plain")


def _start(
    q: torch.Tensor, keys: Keys, v: torch.Tensor, page: int, spec: Any, tensors: Any, columns: list, capacity: int,
    tiling: launch.Tiling,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch the kernel for sequences of up to `capacity` keys."""
    (batch, heads, queries, _), key_heads = q.shape, keys.k.pointer.shape[1]
    group = heads // key_heads
    out = empty_heads(batch, heads, queries, v.shape[3], q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if getattr(tensors, "sequences", None) is not None:
        # Queries of no sequence.
        out.zero_()
        lse.fill_(float("-inf"))
        if tensors.sinks is not None:
            lse.copy_(tensors.sinks[..., None])
    splits = max(triton.cdiv(capacity, SPLIT), 1) if queries * group <= SPLIT_ROWS else 1
    table = table_of(columns, tiling.block_m, group)
    tiles = most_tiles(table, batch, queries * group, tiling.block_m)
    sequences = sequences_of(q, key_heads, spec, tensors, table, tiles, splits if splits > 1 else None)
    scores = scores_for(spec, tensors)
    tile = tile_for(q, v, page, spec, tiling)
    whole = splits, tiles, key_heads, tiling.block_m
    partials = torch.empty((*whole, launch.tile_width(v.shape[3])), dtype=torch.float32, device=q.device)
    lse_partials = torch.empty(whole, dtype=torch.float32, device=q.device) if splits > 1 else None
    launch.start(
        invariant_attention_kernel,
        (tiles * key_heads * splits,),
        tensor4(q),
        tensor4(out),
        tensor3(lse),
        partials,
        lse_partials,
        keys,
        sequences,
        scores,
        tile=tile,
        **tiling.compiler_options(),
    )
    if splits > 1:
        launch.start(
            invariant_merge_kernel,
            (tiles * key_heads,),
            tensor4(out),
            tensor3(lse),
            partials,
            lse_partials,
            sequences,
            scores,
            tile=tile,
            **tiling._replace(warps=merge_warps(tiling)).compiler_options(),
        )
    return out, lse


def columns_of(q: torch.Tensor, k: torch.Tensor, tensors: Any) -> list[torch.Tensor | int]:
    """The table of the sequences of a call without a cache, column by column, see `table_of`."""
    (batch, _, queries, _), keys, lengths = q.shape, k.shape[2], tensors.key_lengths
    entry = torch.arange(batch, dtype=torch.int32, device=q.device)
    if tensors.sequences is None:
        count = keys if lengths is None else lengths
        return [entry, 0, queries, 0, count, keys - queries, 1]
    first_query, own, first_key, count = tensors.sequences.flatten(0, 1).unbind(1)
    entry = entry.repeat_interleave(tensors.sequences.shape[1])
    if lengths is not None:
        count = torch.minimum(count, (lengths[entry.long()] - first_key).clamp(min=0))
    return [entry, first_query, own, first_key, count, first_query - first_key + (keys - queries), 1]


def invariant_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Any, tensors: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v and its row-wise log-sum-exp; arguments and results as
    `attention.forward.attention_forward`'s. `tensors.sequences` (B, n, 4) are the first query, the queries, the
    first key and the keys of each sequence of a batch entry; None for one."""
    batch, keys = q.shape[0], k.shape[2]
    with launch.on_device(q):
        tiling = tiling_for(INVARIANT, q, v, spec, tensors)
        columns = columns_of(q, k, tensors)
        kept = Keys(tensor4(k), tensor4(v), None, batch)
        return _start(q, kept, v, 1, spec, tensors, columns, keys, tiling)


def invariant_cache_attention(
    q: torch.Tensor, storage: Any, spec: Any, tensors: Any, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of keys and values in a cache; arguments and results as `cache.cache_attention`'s. `capacity`: how
    many keys a row may have."""
    queries = q.shape[2]
    v = storage.keys[..., : spec.value_width] if storage.values is None else storage.values
    with launch.on_device(q):
        tiling = tiling_for(INVARIANT, q, v, spec.attention, tensors)
        lengths = tensors.lengths
        stop = lengths.clamp(0, capacity)
        first = 0 if tensors.starts is None else torch.minimum(tensors.starts.clamp(min=0), stop)
        entry = torch.arange(len(q), dtype=torch.int32, device=q.device)
        count = stop - first
        columns = [entry, 0, queries, first, count, count - queries, stop == lengths]
        keys, values = (
            tensor4(t) if tensors.block_table is None else Tensor4(t, *t.stride()) for t in (storage.keys, v)
        )
        table = None if tensors.block_table is None else matrix(tensors.block_table)
        kept = Keys(keys, values, table, len(storage.keys))
        page = 1 if table is None else storage.keys.shape[2]
        return _start(q, kept, v, page, spec.attention, tensors, columns, capacity, tiling)
