"""Masks as the kernels read them: lists of 64 x 64 granules by row and by column, and bit tiles.

The score matrix is cut into granules. A granule nobody sees in is in no list; a full one (all of its 4096 pairs
exist and are seen) costs the kernel no mask work; a partial one points to a bit tile of 64 words of 64 bits. Equal
tiles, and equal lists of different heads or batch elements, are stored once.

A mask is lowered slab by slab (a few rows of granules at a time): it first says of each granule whether it is
empty, full or undecided, and only the undecided ones are looked at pair by pair. So memory stays in O(N), beside
the lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

GRANULE = 64
PAIRS = GRANULE * GRANULE
EMPTY, PARTIAL, FULL = 0, 1, 2  # & is the minimum, | the maximum, ~ the reflection; PARTIAL means undecided

SLAB = 2**18  # granules classified at once: 256 KiB a byte
LOOK = 512  # granules looked at pair by pair at once: 2 MiB a byte


class Shape(NamedTuple):
    """What a mask is asked for: B, H, Lq, Lk and where the answer shall be."""

    batch: int
    heads: int
    queries: int
    keys: int
    device: torch.device

    @property
    def rows(self) -> int:
        return -(-self.queries // GRANULE)

    @property
    def columns(self) -> int:
        return -(-self.keys // GRANULE)

    @property
    def offset(self) -> int:
        """Query i stands on the diagonal at key i + offset."""
        return self.keys - self.queries

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, heads {self.heads}, {self.queries} queries, {self.keys} keys on {self.device}"
        )


class Positions(NamedTuple):
    """Pairs to be judged: int64 tensors that broadcast against each other."""

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
    """Granules to be classified: rows of granules `first` to `stop` of one batch element and head."""

    shape: Shape
    batch: int
    head: int
    first: int
    stop: int

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        """The first and the last query of each row, (rows, 1)."""
        low = torch.arange(self.first, self.stop, device=self.shape.device)[:, None] * GRANULE
        return low, (low + GRANULE - 1).clamp(max=self.shape.queries - 1)

    @property
    def keys(self) -> tuple[Tensor, Tensor]:
        """The first and the last key of each column, (1, columns)."""
        low = torch.arange(self.shape.columns, device=self.shape.device)[None] * GRANULE
        return low, (low + GRANULE - 1).clamp(max=self.shape.keys - 1)


class Lowerable(Protocol):
    """What lowering asks of a mask; `fastattn.masks.Mask` says each at its definition."""

    @property
    def repeats(self) -> bool: ...
    def sees(self, at: Positions) -> Tensor: ...
    def states(self, slab: Slab) -> Tensor: ...
    def counts(self, at: Positions) -> Tensor: ...
    def varies(self, shape: Shape) -> tuple[bool, bool]: ...


class BlockLists(NamedTuple):
    """A mask of P distinct patterns over R x C granules, as the kernels read it. Tensors of one device.

    The full entries of row r of pattern p are `full_columns[full_offsets[p, r] : full_offsets[p, r + 1]]`, columns
    ascending; likewise the partial ones, and by column the rows. A row without an entry sees nothing. A granule
    has several entries only if its pairs differ in multiplicity.

    full_offsets, partial_offsets: int32 (P, R + 1), absolute.
    full_columns (E1,), partial_columns (E2,): int32.
    partial_tiles: int32 (E2,), indices into bit_tiles.
    full_counts (E1,), partial_counts (E2,): fp32 logarithm of how often the entry's keys count; None if all once.
    column_...: the same lists by column, offsets (P, C + 1), for the gradients of keys and values.
    bit_tiles: int64 (T, 64), all different; bit j of word i says whether query i of the granule sees its key j.
        Bits of queries and keys that do not exist are 0.
    pattern: int32 (B or 1, H or 1), the pattern of each batch element and head.
    """

    full_offsets: Tensor
    full_columns: Tensor
    partial_offsets: Tensor
    partial_columns: Tensor
    partial_tiles: Tensor
    full_counts: Tensor | None
    partial_counts: Tensor | None
    column_full_offsets: Tensor
    column_full_rows: Tensor
    column_partial_offsets: Tensor
    column_partial_rows: Tensor
    column_partial_tiles: Tensor
    column_full_counts: Tensor | None
    column_partial_counts: Tensor | None
    bit_tiles: Tensor
    pattern: Tensor

    def to(self, device: torch.device | str) -> BlockLists:
        return BlockLists._make(None if t is None else t.to(device) for t in self)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self if t is not None)


@dataclass(frozen=True, eq=False)
class Lowered:
    """A mask for one shape and device: closed forms as numbers, or block lists.

    left, right: how many keys before and after the diagonal are seen; None for all. Causal is right = 0.
    key_lengths: int32 (B,), between 0 and Lk; keys from there on are not seen.
    lists: if not None, they are the whole mask, and the closed forms are None.
    """

    shape: Shape
    left: int | None = None
    right: int | None = None
    key_lengths: Tensor | None = None
    lists: BlockLists | None = None

    def to(self, device: torch.device | str) -> Lowered:
        """The same mask on another device; itself if it is there already."""
        device = the_device(device)
        if device == self.shape.device:
            return self
        return replace(
            self,
            shape=self.shape._replace(device=device),
            key_lengths=None if self.key_lengths is None else self.key_lengths.to(device),
            lists=None if self.lists is None else self.lists.to(device),
        )

    def check(self, batch: int, heads: int, queries: int, keys: int, device: torch.device | str) -> None:
        """A ValueError if this is the mask of another batch, head count, length or device."""
        wanted = Shape(batch, heads, queries, keys, the_device(device))
        if wanted != self.shape:
            raise ValueError(f"mask was lowered for {self.shape}, expected one for {wanted}")

    @property
    def visible(self) -> int:
        """How many (query, key) pairs are seen, over batch and heads; a key that counts twice is one pair."""
        if self.lists is None:
            start, stop = self._interval(1)
            return int((stop - start).clamp(min=0).sum()) * self._repetitions
        entries, (full, partial) = _popcount(self.lists.bit_tiles), self._entries
        tiles = entries[self.lists.partial_tiles.long()]
        return sum(
            int(times) * (PAIRS * int(full[p]) + int(tiles[partial[p][0] : partial[p][1]].sum()))
            for p, times in enumerate(self._uses)
        )

    @property
    def visited_granules(self) -> int:
        """How many granules the kernels visit, over batch and heads."""
        if self.lists is None:
            start, stop = self._interval(GRANULE)
            visited = torch.where(stop > start, -(-stop // GRANULE) - start // GRANULE, 0)
            return int(visited.sum()) * self._repetitions
        full, partial = self._entries
        return sum(
            int(times) * (int(full[p]) + partial[p][1] - partial[p][0]) for p, times in enumerate(self._uses)
        )

    @property
    def ideal_granules(self) -> float:
        """The seen pairs, in granules: what would be visited if no granule were partial."""
        return self.visible / PAIRS

    @property
    def _uses(self) -> list[int]:
        """How many (batch element, head) pairs have each pattern."""
        assert self.lists is not None
        pattern = self.lists.pattern.expand(self.shape.batch, self.shape.heads).flatten()
        return torch.bincount(pattern, minlength=self.lists.full_offsets.shape[0]).tolist()

    @property
    def _entries(self) -> tuple[list[int], list[list[int]]]:
        """For each pattern the number of full entries, and where the partial ones begin and end."""
        assert self.lists is not None
        full, partial = self.lists.full_offsets, self.lists.partial_offsets
        return (full[:, -1] - full[:, 0]).tolist(), partial[:, [0, -1]].tolist()

    @property
    def _repetitions(self) -> int:
        return self.shape.heads * (self.shape.batch if self.key_lengths is None else 1)

    def _interval(self, step: int) -> tuple[Tensor, Tensor]:
        """The keys that each `step` queries see, from start to before stop: (1 or B, Lq / step)."""
        low = torch.arange(0, self.shape.queries, step, device=self.shape.device)[None]
        high = (low + step - 1).clamp(max=self.shape.queries - 1)
        keys, offset = self.shape.keys, self.shape.offset
        start = torch.zeros_like(low) if self.left is None else (low + offset - self.left).clamp(0, keys)
        stop = (
            torch.full_like(low, keys) if self.right is None else (high + offset + self.right + 1).clamp(0, keys)
        )
        return start, stop if self.key_lengths is None else torch.minimum(stop, self.key_lengths[:, None])


def the_device(device: torch.device | str) -> torch.device:
    """With its index, as tensors name it."""
    return torch.empty(0, device=device).device


class _Entries(NamedTuple):
    """Granules of one kind, by rows: `cells` are p * R * C + row * C + column; tiles point into a common list."""

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
    by_row = _by_row(full, len(distinct), shape), _by_row(partial, len(distinct), shape)
    by_column = _by_column(full, len(distinct), shape), _by_column(partial, len(distinct), shape)
    (full_offsets, full_columns, _, full_counts), (offsets, columns, tile_numbers, counts) = by_row
    (column_full, full_rows, _, column_full_counts), (column_partial, rows, column_tiles, column_counts) = (
        by_column
    )
    keep = mask.repeats
    return BlockLists(
        full_offsets,
        full_columns,
        offsets,
        columns,
        tile_numbers,
        full_counts if keep else None,
        counts if keep else None,
        column_full,
        full_rows,
        column_partial,
        rows,
        column_tiles,
        column_full_counts if keep else None,
        column_counts if keep else None,
        bit_tiles,
        torch.tensor(pattern, dtype=torch.int32, device=shape.device).view(batch, heads),
    )


def _granules(mask: Lowerable, shape: Shape, batch: int, head: int, tiles: _Tiles) -> tuple[_Entries, _Entries]:
    """The full and the partial entries of one batch element and head, by rows."""
    full, partial = [], []
    height = max(1, SLAB // max(1, shape.columns))
    for first in range(0, shape.rows if shape.columns else 0, height):
        slab = Slab(shape, batch, head, first, min(first + height, shape.rows))
        states = _whole(mask.states(slab), slab).flatten()
        start = first * shape.columns
        cells = (states == FULL).nonzero()[:, 0] + start
        full.append(_Entries(cells, cells, _counts_of_full(mask, slab, cells)))
        undecided = (states == PARTIAL).nonzero()[:, 0] + start
        for cells in undecided.split(LOOK):
            for words, counts in _layers(mask, slab, cells):
                is_full, is_partial = (words == -1).all(1), (words != 0).any(1) & (words != -1).any(1)
                full.append(_Entries(cells[is_full], cells[is_full], counts[is_full]))
                partial.append(_Entries(cells[is_partial], tiles.add(words[is_partial]), counts[is_partial]))
    return _sorted(full, shape.device), _sorted(partial, shape.device)


def _whole(states: Tensor, slab: Slab) -> Tensor:
    """For every granule of the slab; those with queries or keys that do not exist are not full."""
    shape = slab.shape
    states = states.expand(slab.stop - slab.first, shape.columns).contiguous()
    if shape.keys % GRANULE:
        states[:, -1].clamp_(max=PARTIAL)
    if shape.queries % GRANULE and slab.stop == shape.rows:
        states[-1].clamp_(max=PARTIAL)
    return states


def _counts_of_full(mask: Lowerable, slab: Slab, cells: Tensor) -> Tensor:
    """Full granules count alike all over: their first pair stands for all."""
    if not mask.repeats:
        return cells.new_zeros(len(cells), dtype=torch.float32)
    first = _positions(slab, cells, 1)
    return mask.counts(first).expand(len(cells), 1, 1).flatten().float().log()


def _layers(mask: Lowerable, slab: Slab, cells: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Look at granules pair by pair: words (G, 64) and log-counts (G,), once for each count that occurs."""
    shape = slab.shape
    at = _positions(slab, cells, GRANULE)
    exists_query, exists_key = at.query < shape.queries, at.key < shape.keys
    at = at._replace(query=at.query.clamp(max=shape.queries - 1), key=at.key.clamp(max=shape.keys - 1))
    seen = mask.sees(at)
    if shape.queries % GRANULE or shape.keys % GRANULE:
        seen = seen & exists_query & exists_key
    if not mask.repeats:
        yield pack(seen.expand(len(cells), GRANULE, GRANULE)), cells.new_zeros(len(cells), dtype=torch.float32)
        return
    counts = mask.counts(at)
    for count in counts.unique().tolist():
        words = pack((seen & (counts == count)).expand(len(cells), GRANULE, GRANULE))
        yield words, torch.full((len(cells),), count, dtype=torch.float32, device=cells.device).log()


def _positions(slab: Slab, cells: Tensor, size: int) -> Positions:
    """The first `size` x `size` pairs of granules: queries (G, size, 1), keys (G, 1, size)."""
    shape, within = slab.shape, torch.arange(size, device=cells.device)
    rows, columns = cells // shape.columns, cells % shape.columns
    return Positions(
        shape,
        torch.full((1, 1, 1), slab.batch, device=cells.device),
        torch.full((1, 1, 1), slab.head, device=cells.device),
        rows[:, None, None] * GRANULE + within[:, None],
        columns[:, None, None] * GRANULE + within,
    )


def pack(seen: Tensor) -> Tensor:
    """Bools (..., 64) as 64-bit words (...): bit j is element j."""
    # Eight bools are eight bytes of 0 or 1; this product gathers their lowest bits, in order, in the top byte.
    octets = (seen.contiguous().view(torch.int64) * 0x0102040810204080) >> 56 & 0xFF
    return (octets << torch.arange(0, GRANULE, 8, device=seen.device)).sum(-1)


def unpack(words: Tensor) -> Tensor:
    """Words (...) as bools (..., 64)."""
    return (words[..., None] >> torch.arange(GRANULE, device=words.device) & 1).bool()


def _popcount(tiles: Tensor) -> Tensor:
    """The pairs seen in each tile, (T,)."""
    return (
        torch.cat([unpack(part).flatten(1).sum(1) for part in tiles.split(LOOK)])
        if len(tiles)
        else tiles.new_zeros(0)
    )


class _Tiles:
    """Bit tiles as they are found. Equal ones of one `add` are merged at once, all of them in `distinct`."""

    def __init__(self, device: torch.device) -> None:
        self.parts = [torch.zeros(0, GRANULE, dtype=torch.int64, device=device)]
        self.size = 0

    def add(self, words: Tensor) -> Tensor:
        """The number of each tile."""
        tiles, numbers = distinct_rows(words)
        self.parts.append(tiles)
        self.size += len(tiles)
        return numbers + (self.size - len(tiles))

    def distinct(self) -> tuple[Tensor, Tensor]:
        """All different tiles, and the new number of each old one."""
        return distinct_rows(torch.cat(self.parts))


def distinct_rows(words: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of (G, 64) in the order of their first appearance, and which of them each row is."""
    if not len(words):
        return words, words.new_zeros(0)
    # Sorting 64-bit hashes is much faster than sorting rows; rows that share a hash are compared.
    generator = torch.Generator().manual_seed(0)
    odd = (torch.randint(-(2**62), 2**62, (2, words.shape[1]), generator=generator) * 2 + 1).to(words.device)
    mixed = words * odd[0]
    hashes = ((mixed ^ mixed >> 31) * odd[1]).sum(1)
    unique, numbers = hashes.unique(return_inverse=True)
    first = torch.full_like(unique, len(words))
    first.scatter_reduce_(0, numbers, torch.arange(len(words), device=words.device), "amin")
    if not torch.equal(words[first[numbers]], words):
        return words.unique(dim=0, return_inverse=True)
    order = first.argsort()
    return words[first[order]], order.argsort()[numbers]


def _sorted(parts: list[_Entries], device: torch.device) -> _Entries:
    """One list, cells ascending; entries of one cell stay in their order."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    cells = torch.cat([none, *(part.cells for part in parts)])
    tiles = torch.cat([none, *(part.tiles for part in parts)])
    counts = torch.cat([none.float(), *(part.counts for part in parts)])
    cells, order = cells.sort(stable=True)
    return _Entries(cells, tiles[order], counts[order])


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
    return _sorted([e._replace(cells=e.cells + p * size) for p, e in enumerate(patterns)], shape.device)


def _by_row(entries: _Entries, patterns: int, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets (patterns, R + 1), columns, tiles and counts."""
    offsets = _offsets(entries.cells // max(1, shape.columns), patterns, shape.rows)
    return offsets, (entries.cells % max(1, shape.columns)).int(), entries.tiles.int(), entries.counts


def _by_column(entries: _Entries, patterns: int, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets (patterns, C + 1), rows, tiles and counts."""
    rows, columns = max(1, shape.rows), max(1, shape.columns)
    pattern, row = entries.cells // columns // rows, entries.cells // columns % rows
    lists = pattern * columns + entries.cells % columns
    order = lists.argsort(stable=True)
    offsets = _offsets(lists, patterns, shape.columns)
    return offsets, row[order].int(), entries.tiles[order].int(), entries.counts[order]


def _offsets(lists: Tensor, patterns: int, length: int) -> Tensor:
    """Where each of patterns x length lists begins and ends, given which list each entry is in."""
    sizes = torch.bincount(lists, minlength=patterns * length)
    ends = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    starts = torch.arange(patterns, device=lists.device)[:, None] * length
    return ends[starts + torch.arange(length + 1, device=lists.device)].int()


def decode(
    lists: BlockLists, batch: int, heads: int, queries: int, keys: int, *, by: str = "rows"
) -> tuple[Tensor, Tensor]:
    """What the lists say, densely, read by "rows" or by "columns": the definition of the format.

    Returns:
        Which pairs are seen, bool (B, H, Lq, Lk), and the logarithm of how often each counts, fp32 (B, H, Lq, Lk):
        -inf for pairs that are not seen, so that it is the bias that the mask amounts to.
    """
    if by == "rows":
        full = lists.full_offsets, lists.full_columns, None, lists.full_counts
        partial = lists.partial_offsets, lists.partial_columns, lists.partial_tiles, lists.partial_counts
    else:
        full = lists.column_full_offsets, lists.column_full_rows, None, lists.column_full_counts
        partial = (
            lists.column_partial_offsets,
            lists.column_partial_rows,
            lists.column_partial_tiles,
            lists.column_partial_counts,
        )
    patterns = lists.full_offsets.shape[0]
    rows, columns = -(-queries // GRANULE), -(-keys // GRANULE)
    counts = torch.zeros(patterns, rows, columns, GRANULE, GRANULE, device=lists.pattern.device)
    for offsets, others, tiles, logs in (full, partial):
        for p in range(patterns):
            sizes = offsets[p].diff().long()
            own = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
            entries = slice(int(offsets[p, 0]), int(offsets[p, -1]))
            place = (own, others[entries].long()) if by == "rows" else (others[entries].long(), own)
            seen = (
                torch.ones_like(counts[p][place])
                if tiles is None
                else unpack(lists.bit_tiles[tiles[entries].long()])
            )
            times = 1.0 if logs is None else logs[entries].exp().round()[:, None, None]
            counts[p].index_put_(place, seen * times, accumulate=True)
    counts = counts.transpose(2, 3).reshape(patterns, rows * GRANULE, columns * GRANULE)[:, :queries, :keys]
    counts = counts[lists.pattern.long()].expand(batch, heads, queries, keys)
    return counts > 0, counts.log()


class WorkItems(NamedTuple):
    """Rows (or columns) of granules cut into segments of similar size, the heaviest first within a pattern.

    Segment s of pattern p, offsets[p] <= s < offsets[p + 1], has the full entries full_begin[s] to before
    full_end[s] and the partial ones partial_begin[s] to before partial_end[s] of row rows[s]; it is number
    segments[s] of the segment_counts[s] of that row. A row without an entry has one segment. All int32.
    """

    offsets: Tensor
    rows: Tensor
    full_begin: Tensor
    full_end: Tensor
    partial_begin: Tensor
    partial_end: Tensor
    segments: Tensor
    segment_counts: Tensor


def work_items(lists: BlockLists, longest: int, *, by: str = "rows") -> WorkItems:
    """Cut the rows (or, by="columns", the columns) with more than `longest` entries into equal segments."""
    if longest < 1:
        raise ValueError(f"longest must be at least 1 entry, got {longest}")
    if by not in ("rows", "columns"):
        raise ValueError(f"by must be 'rows' or 'columns', got {by!r}")
    full = (lists.full_offsets if by == "rows" else lists.column_full_offsets).long()
    partial = (lists.partial_offsets if by == "rows" else lists.column_partial_offsets).long()
    patterns, rows = full.shape[0], full.shape[1] - 1
    full_first, partial_first = full[:, :-1].flatten(), partial[:, :-1].flatten()
    full_sizes, sizes = full.diff().flatten(), (full.diff() + partial.diff()).flatten()
    pieces = (-(-sizes // longest)).clamp(min=1)
    whose = torch.repeat_interleave(torch.arange(patterns * rows, device=full.device), pieces)
    segment = torch.arange(len(whose), device=full.device) - (pieces.cumsum(0) - pieces)[whose]
    begin, end = segment * sizes[whose] // pieces[whose], (segment + 1) * sizes[whose] // pieces[whose]
    pattern = whose // max(1, rows)
    order = (pattern * (int(sizes.max()) + 1 if len(sizes) else 1) - (end - begin)).argsort(stable=True)
    whose, segment, begin, end, pattern = (t[order] for t in (whose, segment, begin, end, pattern))
    counted = full_sizes[whose]
    fields = (
        whose % max(1, rows),
        full_first[whose] + torch.minimum(begin, counted),
        full_first[whose] + torch.minimum(end, counted),
        partial_first[whose] + (begin - counted).clamp(min=0),
        partial_first[whose] + (end - counted).clamp(min=0),
        segment,
        pieces[whose],
    )
    return WorkItems(_offsets(pattern, 1, patterns)[0], *(t.int() for t in fields))
