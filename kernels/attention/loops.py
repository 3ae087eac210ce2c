"""Which scores a program loops over, and which of them are seen: windows, intervals, lists of granules, splits.

A mask is numbers (a window around the diagonal, key lengths), intervals (each query sees the keys from one to
before another) or lists of granules. A program owns a tile of queries and loops over the keys they see, or the
other way round. Where loops are long and programs few, several programs split one loop, see splits.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..tiles import heavy_first

# Lists say for each granule, 64 x 64 scores, who is seen.
GRANULE: tl.constexpr = tl.constexpr(64)


class Window(NamedTuple):
    """Which keys a query sees: up to `left` before its diagonal and `right` after it, those before its batch
    entry's length, and those of an interval. Intervals int32 (batch, 2, queries + keys) are first and stop: of
    keys for each query, then of queries for each key. What is None is absent at compile time."""

    left: int | None
    right: int | None
    key_lengths: torch.Tensor | None
    intervals: torch.Tensor | None
    interval_batch: int | None  # the stride of intervals


class Lists(NamedTuple):
    """Which granules each row (or column) of granules has, as the mask's BlockLists have it: the full ones, the
    partial ones and their bit tiles, how often their keys count, and the pattern of each batch entry and head.
    Each item (row, split, number of splits, slot) is the work of one program, the heaviest first; without items
    each row is one program's.

    Without lists all is None: Triton 3.6 cannot compare a tuple that holds None with None."""

    full_offsets: torch.Tensor | None = None
    full: torch.Tensor | None = None
    partial_offsets: torch.Tensor | None = None
    partial: torch.Tensor | None = None
    partial_tiles: torch.Tensor | None = None
    full_counts: torch.Tensor | None = None
    partial_counts: torch.Tensor | None = None
    tiles: torch.Tensor | None = None
    pattern: torch.Tensor | None = None
    batches: int | None = None
    heads: int | None = None
    length: int | None = None
    items: torch.Tensor | None = None
    item_count: int | None = None


NO_LISTS = Lists()


def window_of(
    left: int | None,
    right: int | None,
    causal: bool,
    key_lengths: torch.Tensor | None,
    intervals: torch.Tensor | None = None,
) -> Window:
    """A window as a kernel argument. Causal is a `right` of 0 that is known at compile time. Lengths are copied if
    they are expanded, intervals if more of them than the batch is."""
    nothing_to_the_right = causal or right == 0
    if intervals is not None and not intervals[:1].is_contiguous():
        intervals = intervals.contiguous()
    return Window(
        left,
        tl.constexpr(0) if nothing_to_the_right else right,
        None if key_lengths is None else key_lengths.contiguous(),
        intervals,
        None if intervals is None else intervals.stride(0),
    )


def rows_of(lists, split: bool = True) -> Lists:
    """The lists by rows, of a BlockLists, as a kernel argument; `split` says that programs may split a row."""
    if lists is None:
        return NO_LISTS
    items = lists.row_items if split else None
    return Lists(
        *lists[:4], lists.partial_tiles, *lists[5:7], *_patterns(lists), *_lengths(lists.full_offsets, items)
    )


def columns_of(lists, split: bool = True) -> Lists:
    """The lists by columns, of a BlockLists, as a kernel argument; `split`: programs may split a column."""
    if lists is None:
        return NO_LISTS
    items = lists.column_items if split else None
    return Lists(*lists[7:14], *_patterns(lists), *_lengths(lists.column_full_offsets, items))


def _patterns(lists) -> tuple:
    return lists.bit_tiles, lists.pattern, *lists.pattern.shape


def _lengths(offsets: torch.Tensor, items: torch.Tensor | None) -> tuple:
    """How many rows there are and one more, and the items."""
    return offsets.shape[1], items, 0 if items is None else items.shape[0]


# ---- which program this is ----


@triton.jit
def position_of(length, heads, problem, DESCENDING: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tile of `length` rows: its first row, batch entry and head, and, where loops are split, its
    split: its index, the number of splits, and the slot of its partial result (-1 if there is only this split).

    DESCENDING: the last tile comes first, for tiles that grow heavier. The heaviest program should start first."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    index, count, slot = 0, 1, -1
    lists, splits = problem.lists, problem.splits
    if splits is not None:
        index, count, slot = program % splits, splits, program % splits
        program, programs = program // splits, programs // splits
    tiles = tl.cdiv(length, BLOCK)
    pieces: tl.constexpr = GRANULE // BLOCK
    if lists.items is not None:
        tiles = lists.item_count * pieces
    tile_number, flat_head = heavy_first(program, tiles, programs // tiles, problem.heads_per_section, DESCENDING)
    start = tile_number * BLOCK
    if lists.items is not None:
        item = lists.items + tile_number // pieces * 4
        start = tl.load(item) * GRANULE + tile_number % pieces * BLOCK
        index, count, slot = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    return start, flat_head // heads, flat_head % heads, (index, count, slot)


@triton.jit
def part_of_range(begin, end, split, splits):
    """The part of a range that falls to this split; `splits` is None where nothing is split."""
    if splits is None:
        return begin, end
    else:
        index, count = split[0], split[1]
        return begin + (end - begin) * index // count, begin + (end - begin) * (index + 1) // count


# ---- windows and intervals ----


@triton.jit
def key_count_of(batch, problem):
    """How many keys this batch entry has."""
    if problem.window.key_lengths is not None:
        return tl.minimum(tl.load(problem.window.key_lengths + batch), problem.shape.keys)
    else:
        return problem.shape.keys


@triton.jit
def interval_of(batch, index, problem):
    """First and stop of the interval at each index: queries, then keys."""
    window, shape = problem.window, problem.shape
    pointers = window.intervals + batch.to(tl.int64) * window.interval_batch + index
    return tl.load(pointers), tl.load(pointers + shape.queries + shape.keys)


@triton.jit
def key_bounds(queries, batch, key_count, problem):
    """The keys each query may see: from the first to before the second. Without a left bound the first is 0 for
    all. By intervals, queries that do not exist see what the last one sees."""
    window, shape = problem.window, problem.shape
    if window.intervals is not None:
        first, stop = interval_of(batch, tl.minimum(queries, shape.queries - 1), problem)
        return first, tl.minimum(stop, key_count)
    else:
        diagonal = queries + (shape.keys - shape.queries)
        first = tl.zeros_like(queries)
        if window.left is not None:
            first = diagonal - window.left
        if window.right is not None:
            return first, tl.minimum(queries + (shape.keys - shape.queries + window.right + 1), key_count)
        else:
            return first, tl.zeros_like(queries) + key_count


@triton.jit
def has_first(window):
    """Whether keys may be hidden because they come too early."""
    return (window.left is not None) or (window.intervals is not None)


@triton.jit
def key_ranges(start, bounds, key_count, problem, tile: tl.constexpr):
    """For the query tile at `start`: where keys begin to be seen by any of its rows, by all of them, where they
    cease to be seen by all and by any; the first three on tile boundaries."""
    window, shape = problem.window, problem.shape
    diagonal = start + shape.keys - shape.queries
    begin = 0
    full_begin = 0
    full_end = key_count
    end = key_count
    if window.intervals is not None:
        begin = tl.min(bounds[0]) // tile.BLOCK_N * tile.BLOCK_N
        full_begin = tl.cdiv(tl.max(bounds[0]), tile.BLOCK_N) * tile.BLOCK_N
        full_end = tl.min(bounds[1])
        end = tl.max(bounds[1])
    if window.left is not None:
        begin = tl.maximum(diagonal - window.left, 0) // tile.BLOCK_N * tile.BLOCK_N
        full_begin = tl.cdiv(tl.maximum(diagonal + tile.BLOCK_M - 1 - window.left, 0), tile.BLOCK_N) * tile.BLOCK_N
    if window.right is not None:
        full_end = tl.minimum(full_end, tl.maximum(diagonal + window.right + 1, 0))
        end = tl.minimum(end, tl.maximum(diagonal + window.right + tile.BLOCK_M, 0))
    full_end = full_end // tile.BLOCK_N * tile.BLOCK_N
    if has_first(window):
        full_end = tl.maximum(full_begin, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def split_ranges(ranges, split, tile: tl.constexpr):
    """The part of such ranges that falls to one split. All splits have equally many tiles."""
    begin, full_begin, full_end, end = ranges
    steps = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), tile.BLOCK_N), split[1])
    low = begin + split[0] * steps * tile.BLOCK_N
    high = tl.minimum(end, low + steps * tile.BLOCK_N)
    full_begin = tl.minimum(tl.maximum(full_begin, low), high)
    return low, full_begin, tl.minimum(tl.maximum(full_end, full_begin), high), high


@triton.jit
def query_bounds(keys, batch, problem):
    """With intervals: the queries that see each key, from the first to before the second."""
    if problem.window.intervals is not None:
        return interval_of(batch, problem.shape.queries + tl.minimum(keys, problem.shape.keys - 1), problem)
    else:
        return 0, 0


@triton.jit
def query_tiles(start, bounds, key_count, problem, tile: tl.constexpr):
    """For the key tile at `start`, numbers of query tiles: the first that sees any of it; the first that sees all
    of it; the next that does not see all of it, or has rows that do not exist; the one after the last that sees
    any."""
    window, shape = problem.window, problem.shape
    tiles = tl.cdiv(shape.queries, tile.BLOCK_M)
    diagonal = start - (shape.keys - shape.queries)
    first = 0
    full = 0
    whole = shape.queries // tile.BLOCK_M
    stop = tiles
    if window.intervals is not None:
        first = tl.min(bounds[0]) // tile.BLOCK_M
        full = tl.cdiv(tl.max(bounds[0]), tile.BLOCK_M)
        whole = tl.min(bounds[1]) // tile.BLOCK_M
        stop = tl.cdiv(tl.max(bounds[1]), tile.BLOCK_M)
    if window.right is not None:
        earliest = diagonal - window.right
        first = tl.minimum(tl.maximum(earliest, 0) // tile.BLOCK_M, tiles)
        full = tl.minimum(tl.cdiv(tl.maximum(earliest + tile.BLOCK_N - 1, 0), tile.BLOCK_M), tiles)
    if window.left is not None:
        latest = diagonal + window.left + 1
        whole = tl.minimum(whole, tl.maximum(latest, 0) // tile.BLOCK_M)
        stop = tl.minimum(stop, tl.cdiv(tl.maximum(latest + tile.BLOCK_N - 1, 0), tile.BLOCK_M))
    if window.key_lengths is not None:
        # Nobody sees a tile of keys beyond the length.
        stop = tl.where(start < key_count, stop, 0)
        first = tl.minimum(first, stop)
        full = tl.minimum(full, stop)
        whole = tl.minimum(whole, stop)
    return first, full, tl.maximum(whole, full), tl.maximum(stop, full)


@triton.jit
def is_bit_set(words, bits):
    """Whether these bits, below 64, of the words are set; in 32-bit halves, each tested by one instruction."""
    half = tl.where(bits < 32, words.to(tl.int32), (words >> 32).to(tl.int32))
    return ((half >> (bits % 32)) & 1) != 0


@triton.jit
def is_visible(start, bounds, problem, tile: tl.constexpr):
    """Which of the keys from `start` on lie inside each query's bounds: (M, BLOCK_N). With lists the first bound
    is a word for each query, whose bits say which keys of a granule it sees, the second is the keys' number."""
    window = problem.window
    columns = tl.arange(0, tile.BLOCK_N)[None, :]
    first, stop = bounds
    if problem.lists.full is not None:
        visible = is_bit_set((first >> (start % GRANULE))[:, None], columns)
        if window.key_lengths is not None:
            visible = visible & (start + columns < stop)
    # Two forms of the same comparison. Which one takes fewer instructions or registers depends on the kernel, see
    # launch.MASKED_FIRST.
    elif tile.RELATIVE:
        visible = columns < (stop - start)[:, None]
        if has_first(window):
            visible = visible & (columns >= (first - start)[:, None])
    else:
        visible = start + columns < stop[:, None]
        if has_first(window):
            visible = visible & (start + columns >= first[:, None])
    return visible


# ---- lists ----


@triton.jit
def list_of(lists, batch, head, start):
    """The index into the lists' offsets for the row (or column) of granules in which `start` lies."""
    pattern = tl.load(lists.pattern + (batch % lists.batches) * lists.heads + head % lists.heads)
    return pattern * lists.length + start // GRANULE


@triton.jit
def with_multiplicity(score_terms, counts, entry):
    """The score terms, with the logarithm of how often an entry's keys count."""
    slope, bias, relative, head, seed, begin, _, head_scale = score_terms
    count = 0.0
    if counts is not None:
        count = tl.load(counts + entry)
    return slope, bias, relative, head, seed, begin, count, head_scale


@triton.jit
def words_of(lists, entry, queries):
    """Which keys of a partial entry's granule each of these queries, all of one granule, sees: a bit a key."""
    bit_tile = tl.load(lists.partial_tiles + entry).to(tl.int64)
    return tl.load(lists.tiles + bit_tile * GRANULE + queries % GRANULE)


@triton.jit
def first_at(granules, begin, end, granule):
    """The first entry from `begin` to `end` whose granule is not before this one, by binary search: entries are
    ascending."""
    while begin < end:
        middle = (begin + end) // 2
        before = tl.load(granules + middle) < granule
        begin = tl.where(before, middle + 1, begin)
        end = tl.where(before, end, middle)
    return begin


# ---- the loop of a tile of queries ----


@triton.jit
def later_are_heavier(problem):
    """Whether later queries see more keys: the diagonal bounds them."""
    return (problem.lists.full is None) and (problem.window.right is not None)


@triton.jit
def loop_over_keys(step: tl.constexpr, state, operands, score_terms, position, problem, tile: tl.constexpr):
    """Let `step` fold into the state, tile by tile, the keys that the queries at `position` see.

    The keys that every row of the tile may see are visited by a loop without mask code; those on the edges (a
    window's left, the diagonal, the last, partial tile) by loops with masks.
    """
    start, batch, head, split = position
    lists = problem.lists
    queries = start + tl.arange(0, tile.BLOCK_M)
    key_count = key_count_of(batch, problem)
    if lists.full is None:
        bounds = key_bounds(queries, batch, key_count, problem)
        ranges = key_ranges(start, bounds, key_count, problem, tile)
        if problem.splits is not None:
            ranges = split_ranges(ranges, split, tile)
        begin, full_begin, full_end, end = ranges
        if has_first(problem.window):
            for key_start in tl.range(begin, tl.minimum(full_begin, end), tile.BLOCK_N):
                state = step(
                    state, operands, score_terms, key_start, queries, bounds, key_count, problem, tile, True
                )
        for part in tl.static_range(2):
            for key_start in tl.range(
                full_end if (part == 0) == tile.MASKED_FIRST else full_begin,
                end if (part == 0) == tile.MASKED_FIRST else full_end,
                tile.BLOCK_N,
            ):
                masked: tl.constexpr = (part == 0) == tile.MASKED_FIRST
                state = step(
                    state, operands, score_terms, key_start, queries, bounds, key_count, problem, tile, masked
                )
    else:
        # A granule is visited in pieces where it is wider than a tile.
        pieces: tl.constexpr = GRANULE // tile.BLOCK_N
        row = list_of(lists, batch, head, start)
        partial, full = lists.partial_offsets + row, lists.full_offsets + row
        low, high = part_of_range(tl.load(partial), tl.load(partial + 1), split, lists.items)
        for number in tl.range(low * pieces, high * pieces):
            entry = number // pieces
            key_start = tl.load(lists.partial + entry) * GRANULE + (number - entry * pieces) * tile.BLOCK_N
            bounds = words_of(lists, entry, queries), key_count
            entry_terms = with_multiplicity(score_terms, lists.partial_counts, entry)
            state = step(state, operands, entry_terms, key_start, queries, bounds, key_count, problem, tile, True)
        low, high = part_of_range(tl.load(full), tl.load(full + 1), split, lists.items)
        for number in tl.range(low * pieces, high * pieces):
            entry = number // pieces
            key_start = tl.load(lists.full + entry) * GRANULE + (number - entry * pieces) * tile.BLOCK_N
            bounds = tl.full([tile.BLOCK_M], -1, tl.int64), key_count
            entry_terms = with_multiplicity(score_terms, lists.full_counts, entry)
            # Key lengths may end within a full granule.
            masked: tl.constexpr = problem.window.key_lengths is not None
            state = step(
                state, operands, entry_terms, key_start, queries, bounds, key_count, problem, tile, masked
            )
    return state


@triton.jit
def loop_over_keys_ahead(
    products_of: tl.constexpr,
    step: tl.constexpr,
    state,
    operands,
    score_terms,
    position,
    problem,
    tile: tl.constexpr,
):
    """`loop_over_keys` without lists, where the products of the next tile are issued before the step of this one,
    so that tensor cores work during its exponentials.

    A tile takes its products from the one before. The last tile computes products that nobody uses. Masked tiles
    come first: then tiles without mask code are followed by nothing else.
    """
    start, batch, _, split = position
    queries = start + tl.arange(0, tile.BLOCK_M)
    key_count = key_count_of(batch, problem)
    bounds = key_bounds(queries, batch, key_count, problem)
    ranges = key_ranges(start, bounds, key_count, problem, tile)
    if problem.splits is not None:
        ranges = split_ranges(ranges, split, tile)
    begin, full_begin, full_end, end = ranges
    # The tile that follows the first range: the first of the third range, which comes next, or of the second.
    second = tl.where(full_end < end, full_end, full_begin)
    first = second
    if has_first(problem.window):
        first = tl.where(begin < tl.minimum(full_begin, end), begin, second)
    products = products_of(operands, first, key_count, tile, True)
    # The loops copy the next keys to shared memory, from which other warps may still read these.
    tl.debug_barrier()
    if has_first(problem.window):
        for key_start in tl.range(begin, tl.minimum(full_begin, end), tile.BLOCK_N):
            following = key_start + tile.BLOCK_N
            following = tl.where(following < tl.minimum(full_begin, end), following, second)
            next_products = products_of(operands, following, key_count, tile, True)
            state = step(
                state, products, operands, score_terms, key_start, queries, bounds, key_count, problem, tile, True
            )
            products = next_products
    for key_start in tl.range(full_end, end, tile.BLOCK_N):
        following = key_start + tile.BLOCK_N
        following = tl.where(following < end, following, full_begin)
        next_products = products_of(operands, following, key_count, tile, True)
        state = step(
            state, products, operands, score_terms, key_start, queries, bounds, key_count, problem, tile, True
        )
        products = next_products
    for key_start in tl.range(full_begin, full_end, tile.BLOCK_N):
        following = tl.minimum(key_start + tile.BLOCK_N, full_end - tile.BLOCK_N)
        next_products = products_of(operands, following, key_count, tile, False)
        state = step(
            state, products, operands, score_terms, key_start, queries, bounds, key_count, problem, tile, False
        )
        products = next_products
    return state


# ---- the loop of a tile of keys ----


@triton.jit
def loop_over_queries(
    step: tl.constexpr, state, operands, score_terms, position, rows, problem, tile: tl.constexpr
):
    """Let `step` fold into the state, tile by tile, the queries of one head that see a key at `position`.
    Tiles before query rows[0], and from query rows[1] on, are left out, except by lists.

    As in `loop_over_keys`, tiles that are seen whole are visited by a loop without mask code.
    """
    start, batch, head, split = position
    lists = problem.lists
    key_count = key_count_of(batch, problem)
    if lists.full is None:
        seen = query_bounds(start + tl.arange(0, tile.BLOCK_N), batch, problem)
        first, full, whole, stop = query_tiles(start, seen, key_count, problem, tile)
        begin, end = rows[0] // tile.BLOCK_M, tl.cdiv(rows[1], tile.BLOCK_M)
        for part in tl.static_range(3):
            low = first if part == 0 else full if part == 1 else whole
            high = full if part == 0 else whole if part == 1 else stop
            for number in tl.range(tl.maximum(low, begin), tl.minimum(high, end)):
                query_start = number * tile.BLOCK_M
                queries = query_start + tl.arange(0, tile.BLOCK_M)
                bounds = key_bounds(queries, batch, key_count, problem)
                masked: tl.constexpr = part != 1
                state = step(state, operands, score_terms, query_start, start, bounds, problem, tile, masked)
    else:
        pieces: tl.constexpr = GRANULE // tile.BLOCK_M
        column = list_of(lists, batch, head, start)
        partial, full_list = lists.partial_offsets + column, lists.full_offsets + column
        low, high = part_of_range(tl.load(partial), tl.load(partial + 1), split, lists.items)
        for number in tl.range(low * pieces, high * pieces):
            entry = number // pieces
            query_start = tl.load(lists.partial + entry) * GRANULE + (number - entry * pieces) * tile.BLOCK_M
            bounds = words_of(lists, entry, query_start + tl.arange(0, tile.BLOCK_M)), key_count
            entry_terms = with_multiplicity(score_terms, lists.partial_counts, entry)
            state = step(state, operands, entry_terms, query_start, start, bounds, problem, tile, True)
        low, high = part_of_range(tl.load(full_list), tl.load(full_list + 1), split, lists.items)
        for number in tl.range(low * pieces, high * pieces):
            entry = number // pieces
            query_start = tl.load(lists.full + entry) * GRANULE + (number - entry * pieces) * tile.BLOCK_M
            bounds = tl.full([tile.BLOCK_M], -1, tl.int64), key_count
            entry_terms = with_multiplicity(score_terms, lists.full_counts, entry)
            state = step(state, operands, entry_terms, query_start, start, bounds, problem, tile, False)
    return state
