"""What the queries of one rank see of the keys of another, from the mask of the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastattn.masks import GRANULE, Lowered, Mask
from fastattn.masks import key_lengths as lengths_mask
from fastattn.masks import window as window_mask
from fastattn.masks.algebra import Intervals, both_ways, smaller
from fastattn.masks.lists import Shape
from fastattn.masks.lowering import cut, only


def whole_mask(
    shape: tuple[int, int, int, int, Any],
    bounds: tuple[int | None, int | None],
    mask: Mask | Lowered | None,
    key_lengths: Tensor | Sequence[int] | None = None,
) -> Lowered:
    """The mask of the whole sequence on the CPU, a window of these bounds and key lengths included.

    shape: B, Hq, N, N and the device of the call.
    """
    joined = joined_mask(shape, bounds, mask, key_lengths)
    return (joined.lower(*shape) if isinstance(joined, Mask) else joined).to("cpu")


def joined_mask(
    shape: tuple[int, int, int, int, Any],
    bounds: tuple[int | None, int | None],
    mask: Mask | Lowered | None,
    key_lengths: Tensor | Sequence[int] | None = None,
) -> Mask | Lowered:
    """As `whole_mask`, lowered only if `mask` is, and then on its device."""
    if mask is not None and not isinstance(mask, Mask | Lowered):
        raise TypeError(f"mask must be a value of fastattn.masks, lowered or not, got {type(mask).__name__}")
    if isinstance(mask, Lowered):
        mask.check(*shape[:4], mask.shape.device)
        if mask.is_window:
            left, right = (smaller(a, b) for a, b in zip(bounds, (mask.left, mask.right), strict=True))
            return replace(mask, left=left, right=right)
        if not mask.is_within(*bounds):
            raise ValueError(
                "mask must lie within causal and window if it is lowered; combine them with & before you lower it"
            )
        return mask
    parts = [] if mask is None else [mask]
    parts += [] if bounds == (None, None) and parts else [window_mask(*bounds)]
    parts += [] if key_lengths is None else [lengths_mask(key_lengths)]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined & part
    return joined


@dataclass(frozen=True, eq=False)
class Part:
    """One call of attention: some queries of a rank on some keys of another.

    rows, columns: which of the rank's queries, and which of the keys, as positions in their shards.
    mask: what they see; None for all.
    shift: what is added to the distance of a key from the diagonal of this call to give its distance in the whole
        sequence, where both are contiguous; else None.
    first_query, first_key: positions of the first query and the first key in the whole sequence.
    key_positions: of the keys in the whole sequence, int64, on the mask's device.
    """

    rows: slice
    columns: slice
    mask: Lowered | None
    shift: int | None
    first_query: int
    first_key: int
    key_positions: Tensor


@dataclass(frozen=True, eq=False)
class Visibility:
    """The mask of a whole sequence of N queries and N keys, lowered on the CPU."""

    lowered: Lowered

    @property
    def shape(self) -> Shape:
        return self.lowered.shape

    @cached_property
    def intervals(self) -> tuple[Tensor, Tensor]:
        """The keys that each query sees, from start to before stop: int64 (1 or B, N), none of them moves back.
        Only if there are no lists."""
        assert self.lowered.lists is None
        length, left, right = self.shape.keys, self.lowered.left, self.lowered.right
        if self.lowered.intervals is not None:
            start, stop = self.lowered.intervals[:, :, :length].long().unbind(1)
            return start, stop
        query = torch.arange(length)[None]
        start = torch.zeros_like(query) if left is None else (query - left).clamp(min=0)
        return start, torch.full_like(query, length) if right is None else (query + right + 1).clamp(max=length)

    @cached_property
    def cells(self) -> tuple[Tensor, Tensor]:
        """The rows and the columns of the granules that the lists visit."""
        lists = self.lowered.lists
        assert lists is not None
        rows, columns = [], []
        for offsets, others in (
            (lists.full_offsets, lists.full_columns),
            (lists.partial_offsets, lists.partial_columns),
        ):
            rows.append(torch.repeat_interleave(offsets.diff().flatten().long()) % max(1, offsets.shape[1] - 1))
            columns.append(others.long())
        return torch.cat(rows), torch.cat(columns)

    def of_heads(self, heads: slice) -> Visibility:
        """The mask of some of the heads."""
        return Visibility(self.lowered.part(None, (heads.start, heads.stop - heads.start)))

    def only(self, *, queries: Tensor | None = None, keys: Tensor | None = None) -> Visibility:
        """The same for some queries and some keys, ascending positions as `part` takes them: it says what they see
        and need not say what others see. It is quicker to ask many times about these."""
        if self.lowered.lists is None:
            return self
        rows, columns = (None if t is None else granules_of(t) for t in (queries, keys))
        return Visibility(replace(self.lowered, lists=only(self.lowered.lists, rows, columns, self.shape)))

    def needs(self, owners: Tensor, ranks: int) -> Tensor:
        """Whether each rank sees any key of each other one: bool (ranks, ranks), queries by keys.

        owners: the rank that owns each granule of tokens.
        """
        if self.lowered.lists is not None:
            rows, columns = self.cells
            pairs = owners[rows] * ranks + owners[columns]
            return torch.bincount(pairs, minlength=ranks * ranks).view(ranks, ranks) > 0
        granules = len(owners)
        found = torch.zeros(ranks, ranks, dtype=torch.int32)
        rank = owners.repeat_interleave(GRANULE)[: self.shape.keys]
        for start, stop in zip(*self.intervals, strict=True):
            # Each query visits a range of granules: count where the ranges of a rank begin and end.
            sees, width = stop > start, granules + 1
            ends = torch.zeros(ranks * width, dtype=torch.int32)
            one = torch.ones(int(sees.sum()), dtype=torch.int32)
            ends.index_add_(0, (rank * width + start // GRANULE)[sees], one)
            ends.index_add_(0, (rank * width + (stop - 1) // GRANULE + 1)[sees], -one)
            visited = (ends.view(ranks, width).cumsum(1)[:, :granules] > 0).int()
            found.index_add_(1, owners, visited)
        return found > 0

    def part(self, queries: Tensor, keys: Tensor, device: torch.device | str = "cpu") -> Part | None:
        """What these queries see of these keys; None if nothing.

        Args:
            queries, keys: ascending positions, int64. Each granule of tokens is there as a whole or not at all,
                but for the ends.
        """
        bounds = self.bounds(queries, keys)
        if bounds is None:
            return None
        rows, columns = bounds
        queries, keys = queries[rows], keys[columns]
        mask = self._mask(queries, keys)
        contiguous = len(keys) == keys[-1] - keys[0] + 1 and len(queries) == queries[-1] - queries[0] + 1
        shift = int(keys[0] - queries[0]) + len(keys) - len(queries) if contiguous else None
        mask = None if mask is None else mask.to(device)
        return Part(rows, columns, mask, shift, int(queries[0]), int(keys[0]), keys.to(device))

    def bounds(self, queries: Tensor, keys: Tensor) -> tuple[slice, slice] | None:
        """The rows and the columns that hold all that is seen; None if nothing is. Columns begin at a multiple of
        8, because eight keys share a draw of dropout."""
        if not len(queries) or not len(keys):
            return None
        if self.lowered.lists is None:
            start, stop = self._local(queries, keys)
            sees = stop > start
            if not sees.any():
                return None
            seeing = sees.any(0).nonzero()[:, 0]
            columns = slice(int(start[sees].min()) // 8 * 8, int(stop[sees].max()))
            return slice(int(seeing[0]), int(seeing[-1]) + 1), columns
        own_rows, own_columns = granules_of(queries), granules_of(keys)
        of_rows, of_columns = self.cells
        row, column = (
            _places(own, of_all, -(-self.shape.keys // GRANULE))
            for own, of_all in ((own_rows, of_rows), (own_columns, of_columns))
        )
        here = (row >= 0) & (column >= 0)
        if not here.any():
            return None
        row, column = row[here], column[here]
        return tuple(  # type: ignore[return-value]
            slice(int(t.min()) * GRANULE, min((int(t.max()) + 1) * GRANULE, size))
            for t, size in ((row, len(queries)), (column, len(keys)))
        )

    def _local(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The intervals of these queries as positions among these keys. Keys ascend: intervals stay intervals."""
        start, stop = (torch.searchsorted(keys, t[:, queries].contiguous()) for t in self.intervals)
        return start, torch.maximum(start, stop)

    def _mask(self, queries: Tensor, keys: Tensor) -> Lowered | None:
        shape = self.shape._replace(queries=len(queries), keys=len(keys))
        ends = self.lowered.key_lengths
        lengths = None if ends is None else torch.searchsorted(keys, ends.long()).int()
        if self.lowered.lists is not None:
            lists = cut(self.lowered.lists, granules_of(queries), granules_of(keys), shape)
            return Lowered(shape, key_lengths=lengths, lists=lists)
        start, stop = self._local(queries, keys)
        window = _window(start, stop, shape)
        if window is None:
            return Lowered(shape, key_lengths=lengths, intervals=both_ways(Intervals(start, stop), shape))
        if lengths is None and window == (None, None):
            return None
        return Lowered(shape, *window, key_lengths=lengths)


def _places(own: Tensor, granules: Tensor, count: int) -> Tensor:
    """Where each of these granules stands among the own ones, -1 if it is none of them. count: of all granules."""
    place = torch.full((count,), -1)
    place[own] = torch.arange(len(own))
    return place[granules]


def granules_of(positions: Tensor) -> Tensor:
    """The granules that positions consist of."""
    return positions[positions % GRANULE == 0] // GRANULE


def _window(start: Tensor, stop: Tensor, shape: Shape) -> tuple[int | None, int | None] | None:
    """The intervals as a window around the diagonal, None for a side that hides nothing; None if they are none."""
    diagonal = torch.arange(shape.queries)[None] + shape.offset
    left, right = int((diagonal - start).max()), int((stop - 1 - diagonal).max())
    sees_all = bool((start == 0).all()), bool((stop == shape.keys).all())
    for all_seen, side, expected, actual in (
        (sees_all[0], left, (diagonal - left).clamp(min=0), start),
        (sees_all[1], right, (diagonal + right + 1).clamp(max=shape.keys), stop),
    ):
        if not all_seen and (side < 0 or not torch.equal(expected.expand_as(actual), actual)):
            return None
    return None if sees_all[0] else left, None if sees_all[1] else right
