"""Masks as the kernels read them: lists of 64 x 64 granules by row and by column, and bit tiles.

The score matrix is cut into granules. An empty granule, in which no pair is seen, is in no list. A full granule
(all of its 4096 pairs exist and are seen) is computed without a mask. A partial granule points to a bit tile of 64
words of 64 bits. Equal tiles, and equal lists of different heads or batch elements, are stored once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ground import arguments
from fastattn.ground.modes import fake_mode, outside_modes, reading

GRANULE = 64
PAIRS = GRANULE * GRANULE


class Shape(NamedTuple):
    """What a mask is lowered for: B, H, Lq, Lk, and the device of the result."""

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
        return f"batch {self.batch}, heads {self.heads}, {self.queries} queries, {self.keys} keys on {self.device}"


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
    row_items, column_items: int32 (I, 4), the work of each program, see `shared_out`: the row (or column), which
        split of it, of how many, and the slot for the split's result, -1 if the row is not split.
    row_merges, column_merges: int32 (M, 3), the rows (or columns) that are split: which, first slot, how many
        splits.
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
    row_items: Tensor
    row_merges: Tensor
    column_items: Tensor
    column_merges: Tensor

    def each(self, function: Callable[[Tensor | None], Tensor | None]) -> BlockLists:
        return BlockLists._make(map(function, self))  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        """How many rows of granules there are."""
        return self.full_offsets.shape[1] - 1

    @property
    def columns(self) -> int:
        """How many columns of granules there are."""
        return self.column_full_offsets.shape[1] - 1

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self if t is not None)


class RowLists(NamedTuple):
    """The lists by row. Some of the bit tiles may be equal."""

    full_offsets: Tensor
    full_columns: Tensor
    full_counts: Tensor | None
    partial_offsets: Tensor
    partial_columns: Tensor
    partial_tiles: Tensor
    partial_counts: Tensor | None
    bit_tiles: Tensor
    pattern: Tensor


def by_row(lists: BlockLists) -> RowLists:
    return RowLists._make(getattr(lists, name) for name in RowLists._fields)


def rows_of_intervals(intervals: Tensor, queries: int) -> RowLists:
    """Intervals (B, 2, Lq + Lk), as in `Lowered`, as lists: one pattern for each batch element."""
    batch, rows, device = intervals.shape[0], -(-queries // GRANULE), intervals.device
    # Queries beyond the last one see nothing: they are padded with an interval that lowers no minimum.
    start, stop = (
        F.pad(t, (0, -queries % GRANULE), value=nowhere).view(batch * rows, GRANULE)
        for t, nowhere in zip(intervals[:, :, :queries].long().unbind(1), (2**31, 0), strict=True)
    )
    begin, size = start.amin(1) // GRANULE, -(-stop.amax(1) // GRANULE)
    size = (size - begin).clamp(min=0)
    row = torch.repeat_interleave(size)
    column = torch.arange(len(row), device=device) - (size.cumsum(0) - size - begin)[row]
    first = column[:, None] * GRANULE
    # In its granule, each query sees the keys from low to before high.
    low, high = (start[row] - first).clamp(0, GRANULE), (stop[row] - first).clamp(0, GRANULE)
    is_full = (low == 0).all(1) & (high == GRANULE).all(1)
    words = _below(high[~is_full]) & ~_below(low[~is_full])
    offsets = [list_offsets(row[which], batch, rows) for which in (is_full, ~is_full)]
    return RowLists(
        offsets[0], column[is_full], None, offsets[1], column[~is_full],
        torch.arange(len(words), device=device), None, words, torch.arange(batch, device=device)[:, None],
    )  # fmt: skip


def _below(count: Tensor) -> Tensor:
    """64-bit words whose lowest `count` bits are set."""
    return torch.where(count == GRANULE, -1, (1 << count.clamp(max=GRANULE - 1)) - 1)


def packed(lists: BlockLists) -> tuple[Tensor, tuple[int, ...]]:
    """The lists in one 1-D int64 tensor, and the sizes that `unpacked` needs: the form that operators take.

    Every list begins at a multiple of 16 bytes. Triton compiles a kernel anew for pointers of another alignment.
    """
    layout = (
        lists.full_offsets.shape[0], lists.full_offsets.shape[1] - 1, lists.column_full_offsets.shape[1] - 1,
        lists.full_columns.shape[0], lists.partial_columns.shape[0], lists.bit_tiles.shape[0],
        *lists.pattern.shape, int(lists.full_counts is not None), *(len(t) for t in lists[-4:]),
    )  # fmt: skip
    words = [lists.bit_tiles.flatten()]
    for t in lists:
        if t is not None and t.dtype != torch.int64:
            t = t.flatten().view(torch.int32)
            words.append(F.pad(t, (0, -len(t) % 4)).view(torch.int64))
    return torch.cat(words), layout


def unpacked(words: Tensor, layout: tuple[int, ...]) -> BlockLists:
    """The lists, as views of the tensor that `packed` made."""
    patterns, rows, columns, full, partial, tiles, batches, heads, counted, *shared = layout
    rest = words[tiles * GRANULE :].view(torch.int32)
    position = 0

    def take(*shape: int, there: bool = True, dtype: torch.dtype = torch.int32) -> Tensor | None:
        nonlocal position
        if not there:
            return None
        size = math.prod(shape)
        t = rest[position : position + size].view(dtype).view(shape)
        position += size + -size % 4
        return t

    def half(length: int) -> tuple[Tensor | None, ...]:
        return (
            take(patterns, length + 1), take(full), take(patterns, length + 1), take(partial), take(partial),
            take(full, there=bool(counted), dtype=torch.float32),
            take(partial, there=bool(counted), dtype=torch.float32),
        )  # fmt: skip

    fields = (*half(rows), *half(columns), words[: tiles * GRANULE].view(tiles, GRANULE), take(batches, heads))
    items = (take(size, width) for size, width in zip(shared, (4, 3, 4, 3), strict=True))
    return BlockLists(*fields, *items)  # type: ignore[arg-type]


def entries_of(layout: tuple[int, ...], batch: int) -> tuple[int, int]:
    """For how many batch entries and heads lists of this layout differ: 1 where all share them. See `of_heads`."""
    entries, heads = layout[6:8]
    return 1 if entries == 1 else batch, heads


def log_counts(lists: BlockLists, rows: range, columns: range) -> Tensor:
    """The logarithm of how often each pair counts, for some rows and columns of granules: fp32 (P, 64 rows,
    64 columns), -inf for pairs that are not seen."""
    patterns, device = lists.full_offsets.shape[0], lists.pattern.device
    counts = torch.zeros(patterns, len(rows), len(columns), GRANULE, GRANULE, device=device, dtype=torch.float32)
    for offsets, others, tiles, logs in (
        (lists.full_offsets, lists.full_columns, None, lists.full_counts),
        (lists.partial_offsets, lists.partial_columns, lists.partial_tiles, lists.partial_counts),
    ):
        sizes = offsets[:, rows.start : rows.stop + 1].long().diff()
        own = torch.repeat_interleave(torch.arange(sizes.numel(), device=device), sizes.flatten())
        firsts = offsets[:, rows.start : rows.stop].flatten().long()
        within = torch.arange(len(own), device=device) - (sizes.flatten().cumsum(0) - sizes.flatten())[own]
        entries = firsts[own] + within
        here = (others[entries] >= columns.start) & (others[entries] < columns.stop)
        entries, own = entries[here], own[here]
        cell = (own // len(rows), own % len(rows), others[entries].long() - columns.start)
        one = torch.ones((), device=device, dtype=torch.float32)
        times = one if logs is None else logs[entries].exp().round()[:, None, None]
        seen = one if tiles is None else unpack(lists.bit_tiles[tiles[entries].long()])
        counts.index_put_(cell, (seen * times).expand(len(own), GRANULE, GRANULE), accumulate=True)
    return counts.log().transpose(2, 3).reshape(patterns, len(rows) * GRANULE, len(columns) * GRANULE)


def columns_seen(lists: BlockLists, rows: range) -> list[int]:
    """The columns of granules in which any of these rows has an entry, ascending."""
    found = []
    for offsets, others in (
        (lists.full_offsets, lists.full_columns),
        (lists.partial_offsets, lists.partial_columns),
    ):
        for begin, end in offsets[:, [rows.start, rows.stop]].tolist():
            found.append(others[begin:end])
    return torch.cat(found).unique().tolist()


def of_heads(lists: BlockLists | RowLists, values: Tensor, batch: int, heads: int) -> Tensor:
    """Values of each pattern (P, ...), gathered for each batch entry and head: (batch or 1, heads or 1, ...).

    If the batch is a multiple of the mask's, the mask is repeated: torch.func.vmap joins its samples into one
    batch.
    """
    pattern = lists.pattern.long()
    if pattern.shape[0] not in (1, batch):
        pattern = pattern.repeat(batch // pattern.shape[0], 1)
    return values[pattern]


@dataclass(frozen=True, eq=False)
class Lowered:
    """A mask for one shape and device: closed forms as numbers or intervals, or block lists.

    left, right: how many keys before and after the diagonal are seen; None for all. Causal is right = 0.
    key_lengths: int32 (B,), between 0 and Lk; keys from there on are not seen, and not read.
    intervals: int32 (1 or B, 2, Lq + Lk); query i sees the keys from intervals[:, 0, i] to before [:, 1, i], and
        key j is seen by the queries from [:, 0, Lq + j] to before [:, 1, Lq + j]. If not None, they are the whole
        mask, except that keys from key_lengths on are hidden, too.
    lists: if not None, they are the whole mask, key lengths included.
    bounds: how many keys before and after the diagonal intervals and lists show at most; None where not known.
    sequences: int32 (1 or B, n, 4), sequences that the intervals keep apart: first query, queries, first key and
        keys of each; None where none are known.
    packed: the lists in the form that operators take.
    """

    shape: Shape
    left: int | None = None
    right: int | None = None
    key_lengths: Tensor | None = None
    intervals: Tensor | None = None
    lists: BlockLists | None = None
    bounds: tuple[int | None, int | None] = (None, None)
    sequences: Tensor | None = None
    packed: tuple[Tensor, tuple[int, ...]] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        # Packed now, not when first needed: a tensor made then would belong to the mode (fake, traced) of that
        # call.
        object.__setattr__(self, "packed", None if self.lists is None else packed(self.lists))

    def to(self, device: torch.device | str) -> Lowered:
        """The same mask on another device; itself if it is there already. Fake tensors within a FakeTensorMode."""
        device, mode = the_device(device), fake_mode()
        if device == self.shape.device and mode is None:
            return self

        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else (t if mode is None else mode.from_tensor(t)).to(device)

        with outside_modes():
            return replace(
                self,
                shape=self.shape._replace(device=device),
                key_lengths=moved(self.key_lengths),
                intervals=moved(self.intervals),
                sequences=moved(self.sequences),
                lists=None if self.lists is None else self.lists.each(moved),
            )

    def check(self, batch: int, heads: int, queries: int, keys: int, device: torch.device | str) -> None:
        """Raise ValueError if the mask was lowered for another batch size, head count, length or device."""
        wanted = Shape(batch, heads, queries, keys, the_device(device))
        if wanted != self.shape:
            raise ValueError(f"mask was lowered for {self.shape}, expected one for {wanted}")

    def part(self, batch: tuple[int, int] | None, heads: tuple[int, int] | None) -> Lowered:
        """The mask of some batch elements and heads: the first of them and their number; None for all."""
        shape, lists, intervals, lengths = self.shape, self.lists, self.intervals, self.key_lengths
        sequences = self.sequences
        if batch is not None:
            own = slice(batch[0], batch[0] + batch[1])
            shape = shape._replace(batch=batch[1])
            lengths = None if lengths is None else lengths[own]
            if intervals is not None and intervals.shape[0] != 1:
                intervals = intervals[own]
            if sequences is not None and sequences.shape[0] != 1:
                sequences = sequences[own]
            if lists is not None and lists.pattern.shape[0] != 1:
                lists = lists._replace(pattern=lists.pattern[own])
        if heads is not None:
            shape = shape._replace(heads=heads[1])
            if lists is not None and lists.pattern.shape[1] != 1:
                lists = lists._replace(pattern=lists.pattern[:, heads[0] : heads[0] + heads[1]])
        return replace(
            self, shape=shape, lists=lists, intervals=intervals, key_lengths=lengths, sequences=sequences
        )

    def is_within(self, left: int | None, right: int | None) -> bool:
        """Whether a window of these bounds is known to hide none of what intervals and lists show."""
        pairs = zip(self.bounds, (left, right), strict=True)
        return all(bound is None or (own is not None and own <= bound) for own, bound in pairs)

    @property
    def is_window(self) -> bool:
        """Whether the mask is only a window and key lengths."""
        return self.lists is None and self.intervals is None

    @property
    @reading
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
    @reading
    def visited_granules(self) -> int:
        """How many granules the kernels visit, over batch and heads."""
        return int(self.visited_by_row.sum())

    @property
    @reading
    def visited_by_row(self) -> Tensor:
        """How many granules the kernels visit for each row of granules, over batch and heads: int64 (R,)."""
        if self.lists is None:
            start, stop = self._interval(GRANULE)
            visited = torch.where(stop > start, -(-stop // GRANULE) - start // GRANULE, 0)
            return visited.sum(0) * self._repetitions
        visited = (self.lists.full_offsets.diff() + self.lists.partial_offsets.diff()).long()
        return (visited * torch.tensor(self._uses, device=visited.device)[:, None]).sum(0)

    @property
    def ideal_granules(self) -> float:
        """The seen pairs, in granules: what would be visited if no granule were partial."""
        return self.visible / PAIRS

    @property
    def _uses(self) -> list[int]:
        """How many (batch element, head) pairs use each pattern."""
        assert self.lists is not None
        pattern = self.lists.pattern.expand(self.shape.batch, self.shape.heads).flatten()
        return torch.bincount(pattern, minlength=self.lists.full_offsets.shape[0]).tolist()

    @property
    def _entries(self) -> tuple[list[int], list[list[int]]]:
        """For each pattern the number of full entries, and where its partial entries begin and end."""
        assert self.lists is not None
        full, partial = self.lists.full_offsets, self.lists.partial_offsets
        return (full[:, -1] - full[:, 0]).tolist(), partial[:, [0, -1]].tolist()

    @property
    def _repetitions(self) -> int:
        rows = self.key_lengths if self.intervals is None else self.intervals
        differ = rows is not None and rows.shape[0] == self.shape.batch
        return self.shape.heads * (1 if differ else self.shape.batch)

    def _interval(self, step: int) -> tuple[Tensor, Tensor]:
        """The keys that each group of `step` queries sees, from start to before stop: (1 or B, Lq / step)."""
        if self.intervals is not None:
            starts, stops = self.intervals[:, :, : self.shape.queries].long().unbind(1)
            # A query that sees nothing must not widen the interval of its group.
            starts = starts.masked_fill(starts >= stops, self.shape.keys)
            return -pooled(-starts, step), pooled(stops.masked_fill(starts >= stops, 0), step)
        low = torch.arange(0, self.shape.queries, step, device=self.shape.device)[None]
        high = (low + step - 1).clamp(max=self.shape.queries - 1)
        keys, offset = self.shape.keys, self.shape.offset
        start = torch.zeros_like(low) if self.left is None else (low + offset - self.left).clamp(0, keys)
        stop = (
            torch.full_like(low, keys) if self.right is None else (high + offset + self.right + 1).clamp(0, keys)
        )
        return start, stop if self.key_lengths is None else torch.minimum(stop, self.key_lengths[:, None])


def pooled(values: Tensor, step: int) -> Tensor:
    """The maximum of each `step` elements of the last dimension; the last group may be smaller."""
    missing = -values.shape[-1] % step
    if missing:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], -1)
    return values.unflatten(-1, (-1, step)).amax(-1)


def the_device(device: torch.device | str) -> torch.device:
    """The device with its index, as tensors name it: "cuda:0" for "cuda"."""
    return torch.empty(0, device=arguments.device("device", device)).device


def decode(
    lists: BlockLists, batch: int, heads: int, queries: int, keys: int, *, by: str = "rows"
) -> tuple[Tensor, Tensor]:
    """The lists as dense tensors, read by "rows" or by "columns": the definition of the format.

    Returns:
        Which pairs are seen, bool (B, H, Lq, Lk), and the logarithm of how often each counts, fp32 (B, H, Lq, Lk):
        -inf for pairs that are not seen. Added to the scores, it is the mask.
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
    counts = torch.zeros(
        patterns, rows, columns, GRANULE, GRANULE, device=lists.pattern.device, dtype=torch.float32
    )
    for offsets, others, tiles, logs in (full, partial):
        for p in range(patterns):
            sizes = offsets[p].diff().long()
            own = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
            entries = slice(int(offsets[p, 0]), int(offsets[p, -1]))
            cell = (own, others[entries].long()) if by == "rows" else (others[entries].long(), own)
            seen = (
                torch.ones_like(counts[p][cell])
                if tiles is None
                else unpack(lists.bit_tiles[tiles[entries].long()])
            )
            times = 1.0 if logs is None else logs[entries].exp().round()[:, None, None]
            # A bool times a Python number has torch's default dtype, which a user may have changed.
            counts[p].index_put_(cell, (seen * times).to(counts.dtype), accumulate=True)
    counts = counts.transpose(2, 3).reshape(patterns, rows * GRANULE, columns * GRANULE)[:, :queries, :keys]
    counts = of_heads(lists, counts, batch, heads).expand(batch, heads, queries, keys)
    return counts > 0, counts.log()


LEAST_SHARED = 8  # granules; a shorter list is not split


def shared_out(full_offsets: Tensor, partial_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (or columns) of granules as items of work for programs, the longest first. A row with more than twice
    the average number of entries, such as a global token's, is split among several programs.

    All patterns and heads have the same items: the longest list of a row decides into how many splits it is cut.
    Split `share` of `shares` has the entries from `size * share // shares` to before `size * (share + 1) //
    shares`.

    Returns:
        items (I, 4) and merges (M, 3), int32, as BlockLists has them.
    """
    every = (full_offsets.diff() + partial_offsets.diff()).long()
    sizes = every.amax(0) if len(every) else every.new_zeros(every.shape[1])
    seen = sizes[sizes > 0]
    longest = max(LEAST_SHARED, 2 * -(-int(seen.sum()) // len(seen))) if len(seen) else LEAST_SHARED
    shares = (-(-sizes // longest)).clamp(min=1)
    row = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), shares)
    share = torch.arange(len(row), device=row.device) - (shares.cumsum(0) - shares)[row]
    slots = torch.where(shares > 1, shares, 0)
    first_slot = slots.cumsum(0) - slots
    slot = torch.where(shares[row] > 1, first_slot[row] + share, -1)
    heaviest = (-sizes[row] / shares[row]).argsort(stable=True)
    items = torch.stack((row, share, shares[row], slot), 1)[heaviest]
    cut = (shares > 1).nonzero()[:, 0]
    return items.int(), torch.stack((cut, first_slot[cut], shares[cut]), 1).int()


def list_offsets(lists: Tensor, patterns: int, length: int) -> Tensor:
    """Where each of patterns x length lists begins and ends. `lists` says in which list each entry is."""
    sizes = torch.bincount(lists, minlength=patterns * length)
    ends = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    starts = torch.arange(patterns, device=lists.device)[:, None] * length
    return ends[starts + torch.arange(length + 1, device=lists.device)].int()


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
    parts = [unpack(part).flatten(1).sum(1) for part in tiles.split(1024)]
    return torch.cat(parts) if parts else tiles.new_zeros(0)
