"""Builds the lists of a mask, slab by slab.

A slab is some granules. The mask first says which of them are empty, full or undecided; only the undecided ones
are evaluated, if need be pair by pair. So memory is O(N), not counting the lists.

Of a long sequence nearly all granules are empty. There the mask first answers for larger blocks, and only the
parts of those that are not empty are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastattn.masks.lists import GRANULE, BlockLists, Shape, list_offsets, pack, shared_out

EMPTY, PARTIAL, FULL = 0, 1, 2  # & is the minimum, | the maximum, ~ the reflection; PARTIAL means undecided

SLAB = 2**18  # granules classified at once: 256 KiB for each byte per granule
ZOOM = 4  # how many times as long a larger block is as its parts
WORDS = 4096  # granules evaluated at once: 2 MiB of words
LOOK = 256  # granules evaluated pair by pair at once: 1 MiB for each byte per pair
SAMPLED = 8192  # granules of which a few pairs are evaluated at once: 1 MiB for each byte per pair


class Positions(NamedTuple):
    """Pairs of a query and a key to evaluate: int64 tensors that broadcast against each other."""

    shape: Shape
    batch: Tensor
    head: Tensor
    query: Tensor
    key: Tensor

    @property
    def diagonal(self) -> Tensor:
        """The key position of each query."""
        return self.query + self.shape.offset


class Slab(NamedTuple):
    """Square blocks of pairs to be classified, of one batch element and head.

    unit: tokens of a side, GRANULE or more.
    rows, columns: the numbers of the blocks, int64. They broadcast against each other.
    """

    shape: Shape
    batch: int
    head: int
    unit: int
    rows: Tensor
    columns: Tensor

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        """The first and the last query of each block, shaped as `rows`."""
        low = self.rows * self.unit
        return low, (low + self.unit - 1).clamp(max=self.shape.queries - 1)

    @property
    def keys(self) -> tuple[Tensor, Tensor]:
        """The first and the last key of each block, shaped as `columns`."""
        low = self.columns * self.unit
        return low, (low + self.unit - 1).clamp(max=self.shape.keys - 1)

    @property
    def cells(self) -> Tensor:
        """row * C + column of each granule."""
        return self.rows * self.shape.columns + self.columns

    def of(self, cells: Tensor) -> Slab:
        """Some of the granules."""
        columns = max(1, self.shape.columns)
        return self._replace(unit=GRANULE, rows=cells // columns, columns=cells % columns)


class Lowerable(Protocol):
    """What lowering uses of a mask; documented in `fastattn.masks.Mask`."""

    @property
    def repeats(self) -> bool: ...
    def sees(self, at: Positions) -> Tensor: ...
    def states(self, slab: Slab) -> Tensor: ...
    def words(self, slab: Slab) -> Tensor: ...
    def visited(self, slab: Slab) -> Tensor: ...
    def listed(self, shape: Shape, head: int) -> Tensor | None: ...
    def counts(self, at: Positions) -> Tensor: ...
    def varies(self, shape: Shape) -> tuple[bool, bool]: ...
    def of_distance(self) -> bool: ...


class _Entries(NamedTuple):
    """Granules of one kind, by rows. `cells` are p * R * C + row * C + column, `tiles` numbers of bit tiles."""

    cells: Tensor
    tiles: Tensor
    counts: Tensor


def build_lists(mask: Lowerable, shape: Shape) -> BlockLists:
    """Lower a mask pattern by pattern, slab by slab; see BlockLists."""
    by_batch, by_head = mask.varies(shape)
    batch, heads = shape.batch if by_batch else 1, shape.heads if by_head else 1
    tiles = _Tiles(shape.device)
    found = [_granules(mask, shape, b, h, tiles) for b in range(batch) for h in range(heads)]
    bit_tiles, renumbered = tiles.distinct()
    found = [(full, partial._replace(tiles=renumbered[partial.tiles])) for full, partial in found]
    distinct, pattern = _distinct_patterns(found)
    full = _joined([full for full, _ in distinct], shape)
    partial = _joined([partial for _, partial in distinct], shape)
    keep = mask.repeats and bool((full.counts != 0).any() or (partial.counts != 0).any())
    which = torch.tensor(pattern, dtype=torch.int32, device=shape.device).view(batch, heads)
    return _assembled(full, partial, bit_tiles, which, len(distinct), shape, keep)


def _assembled(
    full: _Entries, partial: _Entries, bit_tiles: Tensor, pattern: Tensor, patterns: int, shape: Shape, keep: bool
) -> BlockLists:
    """The lists of these entries. keep: whether to keep their counts."""
    full_rows, partial_rows = (_by_row(e, patterns, shape, keep) for e in (full, partial))
    full_columns, partial_columns = (_by_column(e, patterns, shape, keep) for e in (full, partial))
    by_row, by_column = _fields(full_rows, partial_rows), _fields(full_columns, partial_columns)
    row_work = shared_out(full_rows.offsets, partial_rows.offsets)
    column_work = shared_out(full_columns.offsets, partial_columns.offsets)
    return BlockLists._make((*by_row, *by_column, bit_tiles, pattern, *row_work, *column_work))


def cut(lists: BlockLists, rows: Tensor, columns: Tensor, shape: Shape) -> BlockLists:
    """The lists of some rows and columns of granules, as a mask of their own.

    Args:
        rows, columns: which of them remain, int64, ascending.
        shape: of the result. Only its last row and column may have fewer than 64 tokens.
    """
    new_row, new_column = torch.full((2, max(lists.rows, lists.columns)), -1, device=rows.device)
    new_row[rows] = torch.arange(len(rows), device=rows.device)
    new_column[columns] = torch.arange(len(columns), device=rows.device)
    return _moved(lists, new_row[: lists.rows], new_column[: lists.columns], shape)


def only(lists: BlockLists, rows: Tensor | None, columns: Tensor | None, shape: Shape) -> BlockLists:
    """The lists without the entries of other rows and columns of granules than these; None for all."""
    new_row, new_column = (
        torch.where(
            _among(chosen, count, lists.pattern.device), torch.arange(count, device=lists.pattern.device), -1
        )
        for chosen, count in ((rows, lists.rows), (columns, lists.columns))
    )
    return _moved(lists, new_row, new_column, shape)


def _among(chosen: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Which numbers below `count` are chosen, bool (count,)."""
    if chosen is None:
        return torch.ones(count, dtype=torch.bool, device=device)
    return torch.zeros(count, dtype=torch.bool, device=device).index_fill_(0, chosen, True)


def _moved(lists: BlockLists, new_row: Tensor, new_column: Tensor, shape: Shape) -> BlockLists:
    """The lists with these new numbers of rows and of columns; entries with a new number of -1 are dropped."""
    patterns = lists.full_offsets.shape[0]

    def those(offsets: Tensor, others: Tensor, tiles: Tensor | None, counts: Tensor | None) -> _Entries:
        own = torch.repeat_interleave(offsets.diff().flatten().long())
        row, column = new_row[own % len(new_row)], new_column[others.long()]
        cells = (own // len(new_row) * shape.rows + row) * shape.columns + column
        remain = (row >= 0) & (column >= 0)
        none = torch.zeros_like(cells)
        tiles, counts = none if tiles is None else tiles.long(), none.float() if counts is None else counts
        return _Entries(cells[remain], tiles[remain], counts[remain])

    full = those(lists.full_offsets, lists.full_columns, None, lists.full_counts)
    partial = those(lists.partial_offsets, lists.partial_columns, lists.partial_tiles, lists.partial_counts)
    used, numbers = partial.tiles.unique(return_inverse=True)
    partial = partial._replace(tiles=numbers)
    keep = lists.full_counts is not None
    return _assembled(full, partial, lists.bit_tiles[used], lists.pattern, patterns, shape, keep)


def _granules(mask: Lowerable, shape: Shape, batch: int, head: int, tiles: _Tiles) -> tuple[_Entries, _Entries]:
    """The full and the partial entries of one batch element and head, by rows."""
    full, partial = _Found(shape.device), _Found(shape.device)
    for slab in _slabs(mask, shape, batch, head):
        states, every = _whole(mask.states(slab), slab), slab.cells
        cells = every[states == FULL]
        full.add(cells, cells, _counts_of_full(mask, slab, cells))
        for cells, words, which, counts in _evaluated(mask, slab, every[states == PARTIAL]):
            is_full = (words == -1).all(1)
            is_partial = (words != 0).any(1) & ~is_full
            number = torch.zeros_like(words[:, 0]).masked_scatter_(is_partial, tiles.add(words[is_partial]))
            of_full, of_partial = is_full[which], is_partial[which]
            full.add(cells[of_full], cells[of_full], counts[of_full])
            partial.add(cells[of_partial], number[which][of_partial], counts[of_partial])
    return full.sorted(), partial.sorted()


def visited_by_row(mask: Lowerable, shape: Shape) -> Tensor:
    """How many entries the lists of each row of granules have, over batch and heads: int64 (R,). They are counted
    without making the lists. No key may count several times."""
    if mask.of_distance():
        return _visited_by_distance(mask, shape) * (shape.batch * shape.heads)
    by_batch, by_head = mask.varies(shape)
    batch, heads = shape.batch if by_batch else 1, shape.heads if by_head else 1
    visited = torch.zeros(shape.rows, dtype=torch.int64, device=shape.device)
    for b in range(batch):
        for h in range(heads):
            for slab in _slabs(mask, shape, b, h):
                rows = mask.visited(slab) // shape.columns
                visited += torch.bincount(rows, minlength=shape.rows)
    return visited * (shape.batch // batch) * (shape.heads // heads)


def _visited_by_distance(mask: Lowerable, shape: Shape) -> Tensor:
    """The same for one batch element and head, if the mask depends on distances alone. All whole granules on a
    diagonal are equal, so only the first of each is looked at."""
    slab = Slab(shape, 0, 0, GRANULE, *torch.zeros(2, 1, dtype=torch.int64, device=shape.device))
    visited = torch.zeros(shape.rows, dtype=torch.int64, device=shape.device)
    rows, columns = shape.queries // GRANULE, shape.keys // GRANULE
    if rows and columns:
        diagonal = torch.arange(1 - columns, rows, device=shape.device)
        firsts = slab._replace(rows=diagonal.clamp(min=0), columns=(-diagonal).clamp(min=0))
        seen = slab.of(mask.visited(firsts))
        until = torch.zeros(rows + columns, dtype=torch.int64, device=shape.device)
        until[seen.rows - seen.columns + columns] = 1
        until = until.cumsum(0)
        # Row r meets the diagonals from r - columns + 1 to r.
        visited[:rows] = until[columns:] - until[:rows]
    row, column = (torch.arange(size, device=shape.device) for size in (shape.rows, shape.columns))
    for own, other in ((row[rows:], column), (row[:rows], column[columns:])):
        cells = mask.visited(slab.of((own[:, None] * shape.columns + other).flatten()))
        visited += torch.bincount(cells // max(1, shape.columns), minlength=shape.rows)
    return visited


def seen_cells(mask: Lowerable, slab: Slab) -> Tensor:
    """The granules in which any pair is seen, (G,), in any order. Where `states` does not decide, a few pairs are
    evaluated, and all of them only if none of these is seen."""
    states, every = torch.broadcast_tensors(mask.states(slab), slab.cells)
    undecided = every[states == PARTIAL]
    decided = torch.cat([_sampled(mask, slab, cells) for cells in undecided.split(SAMPLED)])
    seen = [every[states == FULL], undecided[decided]]
    for cells, words, which, _ in _evaluated(mask, slab, undecided[~decided]):
        seen.append(cells[(words != 0).any(1)[which]])
    return torch.cat(seen)


def _sampled(mask: Lowerable, slab: Slab, cells: Tensor) -> Tensor:
    """Whether any pair on the two diagonals of these granules is seen, (G,). All corners are among them."""
    at, step = positions(slab.of(cells)), torch.arange(GRANULE, device=cells.device)
    query, key = at.query[:, :, 0].repeat(1, 2), at.key[:, 0][:, torch.cat((step, step.flip(0)))]
    pairs = at._replace(batch=at.batch[0], head=at.head[0], query=query, key=key)
    return mask.sees(pairs).expand(len(cells), 2 * GRANULE).any(1)


def _slabs(mask: Lowerable, shape: Shape, batch: int, head: int) -> Iterator[Slab]:
    """Blocks of granules. Granules that lie in none of them are empty."""
    listed = mask.listed(shape, head)
    if listed is not None:
        for cells in listed.split(SLAB):
            yield Slab(shape, batch, head, GRANULE, cells // shape.columns, cells % shape.columns)
        return
    unit = GRANULE
    while -(-shape.queries // unit) * -(-shape.keys // unit) > SLAB:
        unit *= ZOOM
    rows, columns = (torch.arange(-(-size // unit), device=shape.device) for size in shape[2:4])
    if len(rows) and len(columns):
        yield from _zoomed(mask, Slab(shape, batch, head, unit, rows[:, None], columns[None]))


def _zoomed(mask: Lowerable, slab: Slab) -> Iterator[Slab]:
    """The granules of the blocks of a slab."""
    if slab.unit == GRANULE:
        yield slab
        return
    states, part = mask.states(slab), slab.unit // ZOOM
    states, rows, columns = torch.broadcast_tensors(states, slab.rows, slab.columns)
    undecided = states != EMPTY
    within = torch.arange(ZOOM, device=rows.device)
    for some in torch.stack((rows[undecided], columns[undecided]), 1).split(max(1, SLAB // ZOOM**2)):
        down, across = some[:, :1] * ZOOM + within, some[:, 1:] * ZOOM + within
        down, across = torch.broadcast_tensors(down[:, :, None], across[:, None])
        there = (down * part < slab.shape.queries) & (across * part < slab.shape.keys)
        yield from _zoomed(mask, slab._replace(unit=part, rows=down[there], columns=across[there]))


def _whole(states: Tensor, slab: Slab) -> Tensor:
    """The states of all granules of the slab. One that reaches beyond the last query or key is not full."""
    shape, (states, rows, columns) = slab.shape, torch.broadcast_tensors(states, slab.rows, slab.columns)
    if shape.keys % GRANULE:
        states = torch.where(columns == shape.columns - 1, states.clamp(max=PARTIAL), states)
    if shape.queries % GRANULE:
        states = torch.where(rows == shape.rows - 1, states.clamp(max=PARTIAL), states)
    return states


def _existing(words: Tensor, cells: Tensor, shape: Shape) -> Tensor:
    """Bit tiles without the bits of queries and keys that do not exist."""
    if shape.queries % GRANULE == 0 and shape.keys % GRANULE == 0:
        return words
    rows, columns = cells // shape.columns, cells % shape.columns
    queries = rows[:, None] * GRANULE + torch.arange(GRANULE, device=cells.device) < shape.queries
    last = (1 << shape.keys % GRANULE) - 1 if shape.keys % GRANULE else -1
    keys = torch.where(columns == shape.columns - 1, last, -1)[:, None]
    return torch.where(queries, words & keys, 0)


def _counts_of_full(mask: Lowerable, slab: Slab, cells: Tensor) -> Tensor:
    """The log-counts of full granules, (G,): their first pair stands for all."""
    if not mask.repeats:
        return cells.new_zeros(len(cells), dtype=torch.float32)
    return mask.counts(positions(slab.of(cells), 1)).expand(len(cells), 1, 1).flatten().float().log()


def _evaluated(mask: Lowerable, slab: Slab, cells: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Evaluate undecided granules, some at a time: cells (G,), bit tiles (W, 64), the tile of each granule (G,),
    log-counts (G,)."""
    shape = slab.shape
    if mask.of_distance():
        # Whole granules on one diagonal are equal: only the first of each diagonal is evaluated.
        rows, columns = slab.of(cells)[-2:]
        whole = (rows < shape.queries // GRANULE) & (columns < shape.keys // GRANULE)
        alike, cells = cells[whole], cells[~whole]
        diagonal, which = (rows - columns)[whole].unique(return_inverse=True)
        firsts = slab._replace(unit=GRANULE, rows=diagonal.clamp(min=0), columns=(-diagonal).clamp(min=0))
        yield alike, mask.words(firsts), which, torch.zeros_like(alike, dtype=torch.float32)
    if not mask.repeats:
        for part in cells.split(WORDS):
            words, none = mask.words(slab.of(part)), torch.zeros_like(part, dtype=torch.float32)
            yield part, _existing(words, part, shape), torch.arange(len(part), device=part.device), none
        return
    for part in cells.split(LOOK):
        at, each = positions(slab.of(part)), torch.arange(len(part), device=part.device)
        seen, counts = mask.sees(at).expand(len(part), GRANULE, GRANULE), mask.counts(at)
        # Once for each count that occurs.
        for count in counts.unique().tolist():
            words = _existing(pack(seen & (counts == count)), part, shape)
            yield part, words, each, torch.full_like(part, count, dtype=torch.float32).log()


def words_of_pairs(mask: Lowerable, slab: Slab) -> Tensor:
    """Which keys of its granule each query sees, by evaluating each pair: words (G, 64). Bit j is the j-th key."""
    parts = zip(slab.rows.split(LOOK), slab.columns.split(LOOK), strict=True)
    slabs = [slab._replace(rows=rows, columns=columns) for rows, columns in parts]
    words = [pack(mask.sees(positions(part)).expand(len(part.rows), GRANULE, GRANULE)) for part in slabs]
    return torch.cat(words) if words else slab.rows.new_zeros(0, GRANULE)


def words_of_intervals(start: Tensor, stop: Tensor) -> Tensor:
    """The bits from start to before stop of a word, none if stop is not larger. Both are any integers."""
    return _lowest_bits(stop) & ~_lowest_bits(start)


def _lowest_bits(count: Tensor) -> Tensor:
    """So many of the lowest bits: none below 1, all from 64 on."""
    return torch.where(count >= GRANULE, -1, (1 << count.clamp(0, GRANULE - 1)) - 1)


def positions(slab: Slab, size: int = GRANULE) -> Positions:
    """The first `size` x `size` pairs of granules: queries (G, size, 1), keys (G, 1, size). Those that do not
    exist are the last one that does."""
    shape, within = slab.shape, torch.arange(size, device=slab.rows.device)
    queries, keys = (t[:, None] * GRANULE + within for t in (slab.rows, slab.columns))
    return Positions(
        shape,
        torch.full((1, 1, 1), slab.batch, device=within.device),
        torch.full((1, 1, 1), slab.head, device=within.device),
        queries.clamp(max=shape.queries - 1)[:, :, None],
        keys.clamp(max=shape.keys - 1)[:, None],
    )


class _Growing:
    """A tensor that grows at its end. Many small tensors instead would fragment the heap: they would lie between
    large temporary ones, whose memory could not be used again (gigabytes for megabytes of lists)."""

    def __init__(self, empty: Tensor) -> None:
        self.buffer, self.size = empty, 0

    def add(self, rows: Tensor) -> None:
        size, self.size = self.size, self.size + len(rows)
        if self.size > len(self.buffer):
            larger = self.buffer.new_empty(max(1024, 2 * self.size), *self.buffer.shape[1:])
            larger[:size] = self.buffer[:size]
            self.buffer = larger
        self.buffer[size : self.size] = rows

    @property
    def filled(self) -> Tensor:
        return self.buffer[: self.size]


class _Found:
    """Entries of one kind as they are found."""

    def __init__(self, device: torch.device) -> None:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        self.cells, self.tiles, self.counts = _Growing(none), _Growing(none), _Growing(none.float())

    def add(self, cells: Tensor, tiles: Tensor, counts: Tensor) -> None:
        self.cells.add(cells)
        self.tiles.add(tiles)
        self.counts.add(counts)

    def sorted(self) -> _Entries:
        """Cells ascending; entries of one cell stay in their order."""
        cells, order = self.cells.filled.sort(stable=True)
        return _Entries(cells, self.tiles.filled[order], self.counts.filled[order])


class _Tiles:
    """Bit tiles as they are found. `add` merges equal ones of one call, `distinct` those of all calls."""

    def __init__(self, device: torch.device) -> None:
        self.found = _Growing(torch.zeros(0, GRANULE, dtype=torch.int64, device=device))

    def add(self, words: Tensor) -> Tensor:
        """The number of each tile."""
        tiles, numbers = distinct_rows(words)
        self.found.add(tiles)
        return numbers + (self.found.size - len(tiles))

    def distinct(self) -> tuple[Tensor, Tensor]:
        """All different tiles, and the new number of each old one."""
        return distinct_rows(self.found.filled)


def distinct_rows(words: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of (G, 64) in the order of their first appearance, and which of them each row is."""
    if not len(words):
        return words, words.new_zeros(0)
    # Sorting 64-bit hashes is much faster than sorting rows; rows that share a hash are compared.
    generator = torch.Generator("cpu").manual_seed(0)
    odd = (torch.randint(-(2**62), 2**62, (2, words.shape[1]), generator=generator, device="cpu") * 2 + 1).to(
        words.device
    )
    mixed = words * odd[0]
    hashes = ((mixed ^ mixed >> 31) * odd[1]).sum(1)
    unique, numbers = hashes.unique(return_inverse=True)
    first = torch.full_like(unique, len(words))
    first.scatter_reduce_(0, numbers, torch.arange(len(words), device=words.device), "amin")
    if not torch.equal(words[first[numbers]], words):
        return words.unique(dim=0, return_inverse=True)
    order = first.argsort()
    return words[first[order]], order.argsort()[numbers]


def _distinct_patterns(
    found: list[tuple[_Entries, _Entries]],
) -> tuple[list[tuple[_Entries, _Entries]], list[int]]:
    """The different patterns, and which of them each is."""
    distinct: list[tuple[_Entries, _Entries]] = []
    alike: dict[tuple[int, ...], list[int]] = {}
    pattern = []
    for full, partial in found:
        summary = tuple(
            int((t * torch.arange(1, len(t) + 1, device=t.device)).sum()) for t in (full[0], *partial[:2])
        )
        candidates = alike.setdefault(summary, [])
        same = (i for i in candidates if _equal(distinct[i][0], full) and _equal(distinct[i][1], partial))
        index = next(same, len(distinct))
        if index == len(distinct):
            candidates.append(index)
            distinct.append((full, partial))
        pattern.append(index)
    return distinct, pattern


def _equal(left: _Entries, right: _Entries) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _joined(patterns: list[_Entries], shape: Shape) -> _Entries:
    """The entries of all patterns, in order."""
    size = shape.rows * shape.columns
    joined = _Found(shape.device)
    for p, entries in enumerate(patterns):
        joined.add(entries.cells + p * size, entries.tiles, entries.counts)
    return joined.sorted()


class _Lists(NamedTuple):
    """The lists of one kind of entries, by row or by column: `others` are columns or rows."""

    offsets: Tensor
    others: Tensor
    tiles: Tensor
    counts: Tensor | None


def _fields(full: _Lists, partial: _Lists) -> tuple[Any, ...]:
    """The fields of BlockLists for these lists, in its order: first by row, then by column."""
    return full.offsets, full.others, partial.offsets, partial.others, partial.tiles, full.counts, partial.counts


def _by_row(entries: _Entries, patterns: int, shape: Shape, keep: bool) -> _Lists:
    columns = max(1, shape.columns)
    offsets = list_offsets(entries.cells // columns, patterns, shape.rows)
    counts = entries.counts if keep else None
    return _Lists(offsets, (entries.cells % columns).int(), entries.tiles.int(), counts)


def _by_column(entries: _Entries, patterns: int, shape: Shape, keep: bool) -> _Lists:
    rows, columns = max(1, shape.rows), max(1, shape.columns)
    pattern, row = entries.cells // columns // rows, entries.cells // columns % rows
    lists = pattern * columns + entries.cells % columns
    order = lists.argsort(stable=True)
    offsets = list_offsets(lists, patterns, shape.columns)
    counts = entries.counts[order] if keep else None
    return _Lists(offsets, row[order].int(), entries.tiles[order].int(), counts)
