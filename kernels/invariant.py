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
from .attention.scores import cap, finish_scores, score_factor, scores_of
from .cache import Tree, load_tokens, places_of, row_pointers, store_rows, token_pointers
from .launch.invariant import INVARIANT, SPLIT, SPLIT_ROWS, merge_warps
from .tile import Tile, tile_of
from .tiles import (
    LN_2,
    LOG2_E,
    Matrix,
    Shape,
    Tensor4,
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
def invariant_step(
    state, operands, start, bounds, position, keys, sequences, scores, tile: tl.constexpr, MASKED: tl.constexpr
):
    """Fold the keys from `start` on into (accumulator, running maximum, running sum)."""
    accumulator, row_max, row_sum = state
    q_tile, score_terms, query, diagonal = operands
    entry, key_head, first_key, key_count = position
    columns = start + tl.arange(0, tile.BLOCK_N)
    pages, places, exists = places_of(keys, entry, first_key + columns, columns < key_count, tile.PAGE)
    tokens = token_pointers(keys.k, key_head, pages, places)
    k_tile = load_tokens(keys.k, tokens, exists, 0, tile.HEAD_DIM, tile.WIDTH, MASKED)
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=tile.PRECISION)
    values = cap(products, scores, score_terms)
    values = finish_scores(values, scores, score_terms, diagonal[:, None], columns[None, :], sequences.aligned)
    if MASKED:
        first, stop = bounds
        seen = (columns[None, :] >= first[:, None]) & (columns[None, :] < stop[:, None])
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
    tokens = token_pointers(keys.v, key_head, pages, places)
    v_tile = load_tokens(keys.v, tokens, exists, 0, tile.VALUE_DIM, tile.VALUE_WIDTH, MASKED)
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
    """The state of the merge before the first split: nothing, or the sink, one more key whose value is zero."""
    row_max = tl.full([tile.BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([tile.BLOCK_M], tl.float32)
    if scores.sinks is not None:
        pointers = scores.sinks.pointer + batch.to(tl.int64) * scores.sinks.batch + head * scores.sinks.head
        row_max = tl.load(pointers, mask=exists, other=0.0) * LOG2_E
        row_sum += 1.0
    return tl.zeros([tile.BLOCK_M, tile.VALUE_WIDTH], tl.float32), row_max, row_sum


@triton.jit
def merge_split(state, part, part_lse):
    """Merge what a split gives. Multiply-adds are written out: the same rounding in every kernel."""
    accumulator, row_max, row_sum = state
    new_max = tl.maximum(row_max, part_lse)
    # A row that saw nothing so far pivots on 0: -inf minus -inf never happens.
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale, weight = tl.exp2(row_max - pivot), tl.exp2(part_lse - pivot)
    weights = tl.broadcast_to(weight[:, None], part.shape)
    return tl.fma(part, weights, accumulator * rescale[:, None]), new_max, tl.fma(row_sum, rescale, weight)


@triton.jit
def place_of_tile(split, number, key_head, sequences):
    """Where partial results of a tile lie, as a number of tiles."""
    return (split * sequences.tiles + number).to(tl.int64) * sequences.key_heads + key_head


@triton.jit
def part_pointers(partials, place, tile: tl.constexpr):
    """Pointers to a whole tile, one after the other in memory: offsets within it are 32-bit."""
    offsets = tl.arange(0, tile.BLOCK_M)[:, None] * tile.VALUE_WIDTH + tl.arange(0, tile.VALUE_WIDTH)[None, :]
    return partials + place * (tile.BLOCK_M * tile.VALUE_WIDTH) + offsets


@triton.jit
def store_merged(out, lse, state, entry, head, query, exists, is_known, tile: tl.constexpr):
    """Store a tile of the result."""
    accumulator, row_max, row_sum = state
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    row_lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    # A length that a cache does not have cannot be refused here: its row is not a number.
    accumulator = tl.where(is_known, accumulator / row_sum[:, None], float("nan"))
    row_lse = tl.where(is_known, row_lse, float("nan"))
    store_rows(out, lse, accumulator, row_lse, entry, head, query, exists, tile.VALUE_DIM, tile.VALUE_WIDTH)


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
    is_known = tl.load(found + 7) != 0
    # The number of tiles is a bound: some may be of no sequence. Nor need a split have keys.
    if (row_start >= queries * sequences.group) | ((split > 0) & (split * tile.SPLIT >= key_count)):
        return
    exists, query, head = rows_at(row_start, key_head, queries, sequences, tile.BLOCK_M)
    diagonal = query + shift
    bounds = bounds_of(query, diagonal, entry, first_query, first_key, key_count, sequences)
    begin = tl.min(tl.where(exists, bounds[0], FAR), 0)
    full_begin = tl.cdiv(tl.max(tl.where(exists, bounds[0], 0), 0), tile.BLOCK_N) * tile.BLOCK_N
    full_end = tl.min(tl.where(exists, bounds[1], FAR), 0)
    if sequences.tree is not None:
        full_end = tl.minimum(full_end, key_count - sequences.tree.columns)
    full_end = tl.maximum(full_end, 0) // tile.BLOCK_N * tile.BLOCK_N
    end = tl.max(tl.where(exists, bounds[1], 0), 0)
    begin = tl.minimum(begin, end) // tile.BLOCK_N * tile.BLOCK_N
    ranges = (begin, full_begin, full_end, end)

    rows = first_query + query
    q_tile = load_tokens(q, row_pointers(q, entry, head, rows), exists, 0, tile.HEAD_DIM, tile.WIDTH, True)
    slopes, head_scales = tl.zeros([tile.BLOCK_M], tl.float32), tl.zeros([tile.BLOCK_M], tl.float32)
    if scores.slopes is not None:
        pointers = scores.slopes.pointer + entry.to(tl.int64) * scores.slopes.batch + head * scores.slopes.head
        slopes = tl.load(pointers, mask=exists, other=0.0)
    if scores.head_scale is not None:
        pointers = scores.head_scale.pointer + entry.to(tl.int64) * scores.head_scale.batch
        head_scales = tl.load(pointers + head * scores.head_scale.head, mask=exists, other=0.0)
    score_terms = (slopes[:, None], 0, 0, 0, 0, 0, 0.0, head_scales[:, None])
    operands = (q_tile, score_terms, query, diagonal)
    position = (entry, key_head, first_key, key_count)
    if sequences.splits is None:
        # What is merged so far waits in memory, since registers are full while keys are visited.
        _, row_max, row_sum = before_all_splits(entry, head, exists, scores, tile)
        before = begin // tile.SPLIT
        last = tl.maximum(tl.cdiv(end, tile.SPLIT) - 1, before)
        for each in tl.range(before, last + 1):
            part, part_lse = split_result(each, ranges, operands, bounds, position, keys, sequences, scores, tile)
            waiting = part_pointers(partials, place_of_tile(split, number, key_head, sequences), tile)
            so_far = tl.zeros([tile.BLOCK_M, tile.VALUE_WIDTH], tl.float32)
            if each > before:
                so_far = tl.load(waiting)
            merged = merge_split((so_far, row_max, row_sum), part, part_lse)
            row_max, row_sum = merged[1], merged[2]
            if each < last:
                tl.store(waiting, merged[0])
                tl.debug_barrier()
            else:
                store_merged(out, lse, merged, entry, head, rows, exists, is_known, tile)
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
    state = before_all_splits(entry, head, exists, scores, tile)
    for split in tl.range(0, tl.maximum(tl.cdiv(key_count, tile.SPLIT), 1)):
        place = place_of_tile(split, number, key_head, sequences)
        part_lse = tl.load(lse_partials + place * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M))
        state = merge_split(state, tl.load(part_pointers(partials, place, tile)), part_lse)
    store_merged(out, lse, state, entry, head, rows, exists, is_known, tile)


def table_of(columns: list[torch.Tensor | int], group: int, block: int) -> torch.Tensor:
    """The table of sequences, from all of its columns but the number of the first tile: int32 (n, COLUMNS)."""
    count, device = next((len(t), t.device) for t in columns if isinstance(t, torch.Tensor))
    entry, first_query, queries, first_key, keys, shift, is_known = (
        t.int() if isinstance(t, torch.Tensor) else torch.full((count,), t, dtype=torch.int32, device=device)
        for t in columns
    )
    tiles = (queries * group + (block - 1)) // block
    first_tile = tiles.cumsum(0).int() - tiles
    return torch.stack((entry, first_query, queries, first_key, keys, shift, first_tile, is_known), 1)


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
        PRECISION=products(spec.precision, q.element_size(), max(width, value_width)),
    )


def _tiling(q: torch.Tensor, v: torch.Tensor) -> launch.Tiling:
    """One for all lengths and options of a model's calls."""
    family = launch.family(invariant_attention_kernel, q.device)
    widest = launch.tile_width(max(q.shape[3], v.shape[3]))
    return launch.look_up(INVARIANT, family, q.element_size(), widest)


def _start(
    q: torch.Tensor, keys: Keys, v: torch.Tensor, page: int, spec: Any, tensors: Any, columns: list, capacity: int,
    tiling: launch.Tiling,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch the kernel for sequences of up to `capacity` keys."""
    (batch, heads, queries, _), key_heads = q.shape, keys.k.pointer.shape[1]
    group = heads // key_heads
    out = empty_heads(batch, heads, queries, v.shape[3], q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    intervals = getattr(tensors, "intervals", None)
    if getattr(tensors, "sequences", None) is not None:
        # Queries of no sequence.
        out.zero_()
        lse.fill_(float("-inf"))
        if tensors.sinks is not None:
            lse.copy_(tensors.sinks[..., None])
    table = table_of(columns, group, tiling.block_m)
    tiles = batch * triton.cdiv(queries * group, tiling.block_m) + len(table) - batch
    splits = triton.cdiv(capacity, SPLIT) if queries * group <= SPLIT_ROWS else 1
    zero = tl.constexpr(0)
    intervals = None if intervals is None else intervals.contiguous()
    tree = getattr(tensors, "tree_mask", None)
    if tree is not None:
        tree = tree.view(torch.uint8)
        tree = Tree(tree, *tree.stride(), tree.shape[2])
    sequences = Sequences(
        table, len(table), key_heads, group, batch, tiles, splits if splits > 1 else None, spec.left,
        zero if spec.right == 0 else spec.right, intervals,
        None if intervals is None else intervals.stride(0), None if intervals is None else intervals.shape[2],
        queries, tree, Shape(heads, group, zero, zero, batch),
    )  # fmt: skip
    scores = scores_of(
        spec.scale, spec.softcap or None, tensors.alibi_slopes, None, None, tensors.sinks,
        head_scale=getattr(tensors, "head_scale", None),
    )  # fmt: skip
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


def invariant_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Any, tensors: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v and its row-wise log-sum-exp; arguments and results as
    `attention.forward.attention_forward`'s. `tensors.sequences` (B, n, 4) are the first query, the queries, the
    first key and the keys of each sequence of a batch entry; None for one."""
    (batch, _, queries, _), keys = q.shape, k.shape[2]
    with launch.on_device(q):
        tiling = _tiling(q, v)
        lengths = tensors.key_lengths
        entry = torch.arange(batch, dtype=torch.int32, device=q.device)
        if tensors.sequences is None:
            count = keys if lengths is None else lengths
            columns = [entry, 0, queries, 0, count, keys - queries, 1]
        else:
            first_query, own, first_key, count = tensors.sequences.flatten(0, 1).unbind(1)
            entry = entry.repeat_interleave(tensors.sequences.shape[1])
            if lengths is not None:
                count = torch.minimum(count, (lengths[entry.long()] - first_key).clamp(min=0))
            columns = [entry, first_query, own, first_key, count, first_query - first_key + (keys - queries), 1]
        kept = Keys(tensor4(k), tensor4(v), None, batch)
        return _start(q, kept, v, max(keys, 1), spec, tensors, columns, keys, tiling)


def invariant_cache_attention(
    q: torch.Tensor, storage: Any, spec: Any, tensors: Any, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of keys and values in a cache; arguments and results as `cache.cache_attention`'s. `capacity`: how
    many keys a row may have."""
    queries = q.shape[2]
    v = storage.keys[..., : spec.value_width] if storage.values is None else storage.values
    with launch.on_device(q):
        tiling = _tiling(q, v)
        lengths = tensors.lengths
        stop = lengths.clamp(0, capacity)
        first = 0 if tensors.starts is None else torch.minimum(tensors.starts.clamp(min=0), stop)
        entry = torch.arange(len(q), dtype=torch.int32, device=q.device)
        count = stop - first
        columns = [entry, 0, queries, first, count, count - queries, stop == lengths]
        keys, values = (Tensor4(t, *t.stride()) for t in (storage.keys, v))
        table = None if tensors.block_table is None else matrix(tensors.block_table)
        kept = Keys(keys, values, table, len(storage.keys))
        return _start(q, kept, v, storage.keys.shape[2], spec.attention, tensors, columns, capacity, tiling)
