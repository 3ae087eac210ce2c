"""Which scores a program visits, and which of them are seen: windows, intervals, lists of granules, shares.

A mask is numbers (a window around the diagonal, key lengths), intervals (each query sees the keys from one to
before another) or lists of granules. A program owns a tile of queries and walks the keys they see, or the other
way round; where walks are long and programs few, several share one, see merge.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import LOG2_E, heavy_first

# Lists say for each granule, 64 x 64 scores, who is seen.
GRANULE: tl.constexpr = tl.constexpr(64)


class Window(NamedTuple):
    """Which keys are seen: so many before and after the diagonal; in each batch entry those before its length; and
    by intervals (batch, first or stop, queries and then keys): of keys for each query, of queries for each key.
    What is None is absent at compile time."""

    left: int | None
    right: int | None
    key_lengths: torch.Tensor | None
    intervals: torch.Tensor | None
    interval_batch: int | None  # the stride of intervals


class Lists(NamedTuple):
    """Which granules each row (or column) of granules has, as the mask's BlockLists have it: the full ones, the
    partial ones and their bit tiles, how often their keys count, and the pattern of each batch entry and head.
    Items (row, share, of how many, slot) are what programs do, the heaviest first; None is one for each row.

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
    """A window as a kernel argument; causal is nothing to the right, known at compile time. Lengths are copied if
    expanded, intervals if more than their batch is."""
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


def rows_of(lists, shared: bool = True) -> Lists:
    """The lists by rows, of a BlockLists, as a kernel argument; `shared` says that programs may share a row."""
    if lists is None:
        return NO_LISTS
    items = lists.row_items if shared else None
    return Lists(
        *lists[:4], lists.partial_tiles, *lists[5:7], *_patterns(lists), *_lengths(lists.full_offsets, items)
    )


def columns_of(lists) -> Lists:
    """The lists by columns, of a BlockLists, as a kernel argument."""
    if lists is None:
        return NO_LISTS
    return Lists(*lists[7:14], *_patterns(lists), *_lengths(lists.column_full_offsets, lists.column_items))


def _patterns(lists) -> tuple:
    return lists.bit_tiles, lists.pattern, *lists.pattern.shape


def _lengths(offsets: torch.Tensor, items: torch.Tensor | None) -> tuple:
    """How many rows there are and one more, and the items."""
    return offsets.shape[1], items, 0 if items is None else items.shape[0]


# ---- what a program does ----


@triton.jit
def work_of(length, heads, lists, splits, heads_per_section, DESCENDING: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tile of `length` rows: its first row, batch entry and head, and, where walks are shared, its
    share, of how many, and the slot its part goes to (-1: the share is the whole).

    Tiles that are DESCENDING grow heavier, and come in the other order."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    share, shares, slot = 0, 1, -1
    if splits is not None:
        share, shares, slot = program % splits, splits, program % splits
        program, programs = program // splits, programs // splits
    tiles = tl.cdiv(length, BLOCK)
    parts: tl.constexpr = GRANULE // BLOCK
    if lists.items is not None:
        tiles = lists.item_count * parts
    tile, flat_head = heavy_first(program, tiles, programs // tiles, heads_per_section, DESCENDING)
    start = tile * BLOCK
    if lists.items is not None:
        item = lists.items + tile // parts * 4
        start = tl.load(item) * GRANULE + tile % parts * BLOCK
        share, shares, slot = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    return start, flat_head // heads, flat_head % heads, (share, shares, slot)


@triton.jit
def share_of(begin, end, work, shared):
    """The part of a range that falls to this share."""
    if shared is None:
        return begin, end
    else:
        share, shares = work[0], work[1]
        return begin + (end - begin) * share // shares, begin + (end - begin) * (share + 1) // shares


# ---- windows and intervals ----


@triton.jit
def key_count_of(batch, shape, window):
    """How many keys this batch entry has."""
    if window.key_lengths is not None:
        return tl.minimum(tl.load(window.key_lengths + batch), shape.keys)
    else:
        return shape.keys


@triton.jit
def interval_of(window, batch, place, shape):
    """First and stop of the interval at each place: queries, then keys."""
    pointers = window.intervals + batch.to(tl.int64) * window.interval_batch + place
    return tl.load(pointers), tl.load(pointers + shape.queries + shape.keys)


@triton.jit
def key_bounds(queries, batch, key_count, shape, window):
    """The keys each query may see: from the first to before the second. Without a left bound the first is 0 for
    all. By intervals, queries that do not exist see what the last one sees."""
    if window.intervals is not None:
        first, stop = interval_of(window, batch, tl.minimum(queries, shape.queries - 1), shape)
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
def key_ranges(start, bounds, key_count, shape, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For the query tile at `start`: where keys begin to be seen by any of its rows, by all of them, where they
    cease to be seen by all and by any; the first three on tile boundaries."""
    diagonal = start + shape.keys - shape.queries
    begin = 0
    full_begin = 0
    full_end = key_count
    end = key_count
    if window.intervals is not None:
        begin = tl.min(bounds[0]) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.max(bounds[0]), BLOCK_N) * BLOCK_N
        full_end = tl.min(bounds[1])
        end = tl.max(bounds[1])
    if window.left is not None:
        begin = tl.maximum(diagonal - window.left, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(diagonal + BLOCK_M - 1 - window.left, 0), BLOCK_N) * BLOCK_N
    if window.right is not None:
        full_end = tl.minimum(full_end, tl.maximum(diagonal + window.right + 1, 0))
        end = tl.minimum(end, tl.maximum(diagonal + window.right + BLOCK_M, 0))
    full_end = full_end // BLOCK_N * BLOCK_N
    if has_first(window):
        full_end = tl.maximum(full_begin, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def shared_ranges(ranges, work, BLOCK_N: tl.constexpr):
    """What of such ranges falls to one share: equally many tiles each."""
    begin, full_begin, full_end, end = ranges
    steps = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), work[1])
    low = begin + work[0] * steps * BLOCK_N
    high = tl.minimum(end, low + steps * BLOCK_N)
    full_begin = tl.minimum(tl.maximum(full_begin, low), high)
    return low, full_begin, tl.minimum(tl.maximum(full_end, full_begin), high), high


@triton.jit
def query_bounds(keys, batch, shape, window):
    """With intervals: the queries that see each key, from the first to before the second."""
    if window.intervals is not None:
        return interval_of(window, batch, shape.queries + tl.minimum(keys, shape.keys - 1), shape)
    else:
        return 0, 0


@triton.jit
def query_tiles(start, bounds, key_count, shape, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For the key tile at `start`, query tiles by number: the first that sees any of it, the first of those that
    see all of it, the first of those after them that do not or do not exist whole, and where all end."""
    tiles = tl.cdiv(shape.queries, BLOCK_M)
    diagonal = start - (shape.keys - shape.queries)
    first = 0
    full = 0
    whole = shape.queries // BLOCK_M
    stop = tiles
    if window.intervals is not None:
        first = tl.min(bounds[0]) // BLOCK_M
        full = tl.cdiv(tl.max(bounds[0]), BLOCK_M)
        whole = tl.min(bounds[1]) // BLOCK_M
        stop = tl.cdiv(tl.max(bounds[1]), BLOCK_M)
    if window.right is not None:
        earliest = diagonal - window.right
        first = tl.minimum(tl.maximum(earliest, 0) // BLOCK_M, tiles)
        full = tl.minimum(tl.cdiv(tl.maximum(earliest + BLOCK_N - 1, 0), BLOCK_M), tiles)
    if window.left is not None:
        latest = diagonal + window.left + 1
        whole = tl.minimum(whole, tl.maximum(latest, 0) // BLOCK_M)
        stop = tl.minimum(stop, tl.cdiv(tl.maximum(latest + BLOCK_N - 1, 0), BLOCK_M))
    if window.key_lengths is not None:
        # Nobody sees a tile of keys beyond the length.
        stop = tl.where(start < key_count, stop, 0)
        first = tl.minimum(first, stop)
        full = tl.minimum(full, stop)
        whole = tl.minimum(whole, stop)
    return first, full, tl.maximum(whole, full), tl.maximum(stop, full)


@triton.jit
def sees_bit(words, bits):
    """Whether these bits, below 64, of the words are set; in 32-bit halves, each tested by one instruction."""
    half = tl.where(bits < 32, words.to(tl.int32), (words >> 32).to(tl.int32))
    return ((half >> (bits % 32)) & 1) != 0


@triton.jit
def within(start, bounds, window, lists, BLOCK_N: tl.constexpr, RELATIVE: tl.constexpr):
    """Which of the keys from `start` on lie inside each query's bounds: (M, BLOCK_N). With lists the first bound
    is a word for each query, whose bits say which keys of a granule it sees, the second is the keys' number."""
    columns = tl.arange(0, BLOCK_N)[None, :]
    first, stop = bounds
    if lists.full is not None:
        inside = sees_bit((first >> (start % GRANULE))[:, None], columns)
        if window.key_lengths is not None:
            inside = inside & (start + columns < stop)
    # The same, said in two ways: which takes fewer instructions, or registers, depends on the kernel, see launch.
    elif RELATIVE:
        inside = columns < (stop - start)[:, None]
        if has_first(window):
            inside = inside & (columns >= (first - start)[:, None])
    else:
        inside = start + columns < stop[:, None]
        if has_first(window):
            inside = inside & (start + columns >= first[:, None])
    return inside


# ---- lists ----


@triton.jit
def list_of(lists, batch, head, start):
    """Where the offsets of the row (or column) of granules in which `start` lies stand."""
    pattern = tl.load(lists.pattern + (batch % lists.batches) * lists.heads + head % lists.heads)
    return pattern * lists.length + start // GRANULE


@triton.jit
def counting(terms, counts, entry):
    """The terms, with how often an entry's keys count, in log2 units."""
    slope, bias, relative, head, seed, offset, _ = terms
    count = 0.0
    if counts is not None:
        count = tl.load(counts + entry) * LOG2_E
    return slope, bias, relative, head, seed, offset, count


@triton.jit
def words_of(lists, entry, queries):
    """Which keys of a partial entry's granule each of these queries, all of one granule, sees: a bit a key."""
    tile = tl.load(lists.partial_tiles + entry).to(tl.int64)
    return tl.load(lists.tiles + tile * GRANULE + queries % GRANULE)


@triton.jit
def first_at(others, begin, end, granule):
    """The first of the entries from `begin` to `end`, ascending, whose granule is not before this one."""
    while begin < end:
        middle = (begin + end) // 2
        before = tl.load(others + middle) < granule
        begin = tl.where(before, middle + 1, begin)
        end = tl.where(before, end, middle)
    return begin


# ---- the walk of a tile of queries ----


@triton.jit
def later_are_heavier(window, lists):
    """Whether later queries see more keys: the diagonal bounds them."""
    return (lists.full is None) and (window.right is not None)


@triton.jit
def walk_keys(
    step: tl.constexpr,
    state,
    given,
    terms,
    start,
    batch,
    head,
    work,
    shape,
    window,
    lists,
    splits,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MASKED_FIRST: tl.constexpr,
    RELATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Let `step` fold into the state, tile by tile, the keys that the queries from `start` on see.

    The keys that every row of the tile may see are walked by a loop without mask code; those on the edges (a
    window's left, the diagonal, the last, partial tile) by loops with masks.
    """
    queries = start + tl.arange(0, BLOCK_M)
    key_count = key_count_of(batch, shape, window)
    if lists.full is None:
        bounds = key_bounds(queries, batch, key_count, shape, window)
        ranges = key_ranges(start, bounds, key_count, shape, window, BLOCK_M, BLOCK_N)
        if splits is not None:
            ranges = shared_ranges(ranges, work, BLOCK_N)
        begin, full_begin, full_end, end = ranges
        if has_first(window):
            for key_start in tl.range(begin, tl.minimum(full_begin, end), BLOCK_N):
                state = step(
                    state, given, terms, key_start, queries, bounds, key_count, shape, window, lists,
                    HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, True, RELATIVE, BLOCK_M, BLOCK_N, PRECISION,
                )  # fmt: skip
        for part in tl.static_range(2):
            for key_start in tl.range(
                full_end if (part == 0) == MASKED_FIRST else full_begin,
                end if (part == 0) == MASKED_FIRST else full_end,
                BLOCK_N,
            ):
                state = step(
                    state, given, terms, key_start, queries, bounds, key_count, shape, window, lists,
                    HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, (part == 0) == MASKED_FIRST, RELATIVE, BLOCK_M,
                    BLOCK_N, PRECISION,
                )  # fmt: skip
    else:
        # A granule is walked in parts where it is wider than a tile.
        parts: tl.constexpr = GRANULE // BLOCK_N
        place = list_of(lists, batch, head, start)
        partial, full = lists.partial_offsets + place, lists.full_offsets + place
        low, high = share_of(tl.load(partial), tl.load(partial + 1), work, lists.items)
        for number in tl.range(low * parts, high * parts):
            entry = number // parts
            key_start = tl.load(lists.partial + entry) * GRANULE + (number - entry * parts) * BLOCK_N
            bounds = words_of(lists, entry, queries), key_count
            state = step(
                state, given, counting(terms, lists.partial_counts, entry), key_start, queries, bounds, key_count,
                shape, window, lists,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, True, RELATIVE, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
        low, high = share_of(tl.load(full), tl.load(full + 1), work, lists.items)
        for number in tl.range(low * parts, high * parts):
            entry = number // parts
            key_start = tl.load(lists.full + entry) * GRANULE + (number - entry * parts) * BLOCK_N
            # Key lengths may end within a full granule.
            bounds = tl.full([BLOCK_M], -1, tl.int64), key_count
            state = step(
                state, given, counting(terms, lists.full_counts, entry), key_start, queries, bounds, key_count,
                shape, window, lists,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, window.key_lengths is not None, RELATIVE, BLOCK_M,
                BLOCK_N, PRECISION,
            )  # fmt: skip
    return state
