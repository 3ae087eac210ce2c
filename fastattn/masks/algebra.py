"""The base class of all masks, and the operators & | ~."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ground.arguments import flag, integer
from fastattn.ground.checks import window_that_hides
from fastattn.ground.modes import fake_mode, kept, lasts, outside_modes, reading
from fastattn.masks import lowering, pictures
from fastattn.masks.lists import GRANULE, Lowered, Shape, the_device
from fastattn.masks.lowering import (
    FULL,
    PARTIAL,
    Positions,
    Slab,
    build_lists,
    seen_cells,
    words_of_intervals,
    words_of_pairs,
)

COMPARED_BY_VALUE = 4096  # elements; larger tensors are equal if they are the same tensor
KEPT = 32  # how many lowered masks are cached


class Values:
    """A tensor in a mask, hashable. Small tensors on the CPU are copied and compared by value. Others are equal if
    they are the same tensor and have not been changed in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.lasts = lasts(tensor)
        self.tensor, self._value = tensor, None
        small = self.lasts and tensor.device.type == "cpu" and tensor.numel() <= COMPARED_BY_VALUE
        if small or tensor.is_inference():  # inference tensors have no version counter
            with outside_modes():
                self.tensor = tensor.detach().clone()
                if small:
                    are_flags = tensor.dtype == torch.bool  # in Python True == 1, but flags are no positions
                    self._value = are_flags, tuple(tensor.shape), tuple(self.tensor.flatten().tolist())
        self._hash = hash(self._value)

    @property
    def _key(self) -> tuple:
        if self._value is not None:
            return self._value
        return id(self.tensor), self.tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key) if self._value is None else self._hash

    def __repr__(self) -> str:
        if self._value is not None and self.tensor.numel() <= 8:
            return str(self.tensor.tolist())
        return f"<{' x '.join(map(str, self.tensor.shape))}>"

    def on(self, device: torch.device) -> Tensor:
        return self.tensor.to(device)


class ClosedForm(NamedTuple):
    """A mask that is a window around the diagonal, cut off at the mask's `key_ends`."""

    left: int | None = None
    right: int | None = None


class Intervals(NamedTuple):
    """Query i sees the keys from start[i] to before stop[i], none if stop is not larger; int64 (1 or B, Lq)."""

    start: Tensor
    stop: Tensor


class Mask:
    """Which keys each query sees. Combine masks with & (both), | (either) and ~ (not)."""

    def sees(self, at: Positions) -> Tensor:
        """The definition: may the queries see the keys? Bool, broadcast over the positions it depends on."""
        raise NotImplementedError

    def states(self, slab: Slab) -> Tensor:
        """For each block of the slab: EMPTY if none of its pairs is seen, FULL if all are, PARTIAL if unknown.
        int8, broadcasts against rows and columns of the slab."""
        return torch.full((), PARTIAL, dtype=torch.int8, device=slab.shape.device)

    def words(self, slab: Slab) -> Tensor:
        """Which keys each query of some granules sees: words (G, 64), bit j is the j-th key. Bits of queries and
        keys that do not exist say nothing."""
        intervals = _intervals(self, slab.shape)
        if intervals is not None:
            query = slab.rows[:, None] * GRANULE + torch.arange(GRANULE, device=slab.rows.device)
            query, first = query.clamp(max=slab.shape.queries - 1), slab.columns[:, None] * GRANULE
            start, stop = (t[slab.batch if len(t) > 1 else 0][query] - first for t in intervals)
            return words_of_intervals(start, stop)
        return words_of_pairs(self, slab)

    def visited(self, slab: Slab) -> Tensor:
        """The granules of a slab in which any pair is seen: row * C + column, (G,), in any order."""
        return seen_cells(self, slab)

    def listed(self, shape: Shape, head: int) -> Tensor | None:
        """Granules outside of which nothing is seen: row * C + column, (G,), ascending, all different. None if no
        short list of them is known."""
        return None

    def counts(self, at: Positions) -> Tensor:
        """How often each key that is seen counts in the softmax, integers. Constant within a FULL granule."""
        return torch.ones((), dtype=torch.int64, device=at.key.device)

    @property
    def repeats(self) -> bool:
        """Whether any key may count more than once."""
        return False

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        """Whether the mask depends on the batch element and on the head."""
        each = [part.varies(shape) for part in self.parts]
        return any(batch for batch, _ in each), any(head for _, head in each)

    def check(self, shape: Shape) -> None:
        """Raise ValueError if the mask does not fit this shape."""
        for part in self.parts:
            part.check(shape)

    def closed_form(self, shape: Shape) -> ClosedForm | None:
        """The whole mask as a window, if it is one; else None."""
        return None

    def key_ends(self, device: torch.device) -> Tensor | None:
        """Integers (1 or B,): no query sees a key from there on, wherever else the mask looks. They may be
        negative or beyond the last key. None if the mask has no such limit."""
        return None

    def intervals(self, shape: Shape) -> Intervals | None:
        """The keys that each query sees, if they form one interval for every query; else None."""
        return None

    def sequences(self, shape: Shape) -> Tensor | None:
        """Sequences that the mask keeps apart: no query sees a key of another one. int32 (1 or B, n, 4): first
        query, queries, first key and keys of each. None where none are known."""
        return None

    def bounds(self, shape: Shape) -> tuple[int | None, int | None]:
        """How many keys before and after the diagonal are seen at most; None where no bound is known."""
        form = self.closed_form(shape)
        return (None, None) if form is None else (form.left, form.right)

    def of_distance(self) -> bool:
        """Whether the mask depends on the key's distance from the diagonal and on nothing else."""
        return False

    @property
    def parts(self) -> tuple[Mask, ...]:
        """The masks that this one combines."""
        return tuple(value for value in vars(self).values() if isinstance(value, Mask))

    @property
    def held(self) -> tuple[Values, ...]:
        """The tensors it and its parts hold."""
        own = tuple(value for value in vars(self).values() if isinstance(value, Values))
        return own + tuple(values for part in self.parts for values in part.held)

    @property
    def lasts(self) -> bool:
        """Whether its tensors outlive the caller's mode: none is fake, traced, or in a torch.func transform."""
        return all(values.lasts for values in self.held)

    def lowers_on(self, device: torch.device) -> torch.device:
        """Where its lists are built: on `device` if it holds tensors or runs a function there, else on the CPU."""
        home = device if any(values.tensor.device == device for values in self.held) else torch.device("cpu")
        return next((d for d in (part.lowers_on(device) for part in self.parts) if d == device), home)

    def dense(self, batch: int, heads: int, queries: int, keys: int, device: torch.device | str = "cpu") -> Tensor:
        """The mask as a tensor, bool (1 or B, 1 or H, Lq, Lk), True where a query may see a key: the
        definition."""
        shape = self._shape(batch, heads, queries, keys, device)
        if 0 in shape[:4]:
            return torch.zeros(min(batch, 1), min(heads, 1), queries, keys, dtype=torch.bool, device=shape.device)
        indices = (torch.arange(n, device=shape.device) for n in shape[:4])
        at = Positions(shape, *(t.view([-1 if i == n else 1 for i in range(4)]) for n, t in enumerate(indices)))
        seen = self.sees(at)
        seen = seen.view([1] * (4 - seen.dim()) + list(seen.shape))
        return seen.expand(seen.shape[0], seen.shape[1], queries, keys)

    def lower(
        self,
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        device: torch.device | str = "cpu",
        *,
        closed_forms: bool = True,
    ) -> Lowered:
        """The mask as the kernels read it. The last few results are cached; equal masks share them.

        Conjunctions of causal, window, prefix and key_lengths become numbers. Other masks that show each query one
        interval of keys, where the intervals never move backward (documents, packed sequences, a causal mask with
        a prefix), become intervals. All others become block lists; with `closed_forms` False all masks do.

        Raises:
            ValueError: the mask is for another batch size, head count, length or device.
        """
        closed_forms = flag("closed_forms", closed_forms)
        shape = self._shape(batch, heads, queries, keys, device)
        if not self.lasts:
            return self._lower_here(shape, closed_forms)
        if fake_mode() is None:
            return _lower(self, shape, closed_forms)
        # Fake tensors have no values: build real lists, and make them fake at the end.
        return _lower(self, shape._replace(device=torch.device("cpu")), closed_forms).to(shape.device)

    def _lower_here(self, shape: Shape, closed_forms: bool) -> Lowered:
        """Lower a mask with tensors of the caller's mode, which fails if their values must be read."""
        try:
            return _lower(self, shape, closed_forms)
        except (RuntimeError, NotImplementedError) as problem:
            raise ValueError(
                f"{self!r} holds a tensor whose values cannot be read (it is fake, meta or in a torch.func "
                "transform); lower the mask outside of that mode"
            ) from problem

    @reading
    def density(
        self, batch: int, heads: int, queries: int, keys: int, device: torch.device | str = "cpu"
    ) -> float:
        """The share of the (query, key) pairs that is seen, from 0 to 1; 0 where there are none."""
        total = batch * heads * queries * keys
        return self.lower(batch, heads, queries, keys, device).visible / total if total else 0.0

    @reading
    def flops(
        self, batch: int, heads: int, queries: int, keys: int, head_dim: int, value_dim: int | None = None, *,
        backward: bool = False, device: torch.device | str = "cpu",
    ) -> int:  # fmt: skip
        """Multiplications and additions of the matrix products over the seen pairs: 2 forward, 5 backward."""
        value_dim = head_dim if value_dim is None else value_dim
        widths = 3 * head_dim + 2 * value_dim if backward else head_dim + value_dim
        return 2 * self.lower(batch, heads, queries, keys, device).visible * widths

    @reading
    def draw(
        self, queries: int, keys: int | None = None, *, batch: int = 1, heads: int = 1,
        at: tuple[int, int] = (0, 0), device: torch.device | str = "cpu", width: int = 64,
    ) -> str:  # fmt: skip
        """A block picture in text, of batch element and head `at`: full, partial and empty granules, density.

        The picture is at most `width` characters wide. Where several granules share a character, it is full or
        empty only if all of them are.
        """
        keys = queries if keys is None else keys
        lowered = self.lower(batch, heads, queries, keys, device, closed_forms=False)
        return pictures.text(repr(self), lowered, at, width)

    @reading
    def save_png(
        self, path: str | Path, queries: int, keys: int | None = None, *, batch: int = 1, heads: int = 1,
        at: tuple[int, int] = (0, 0), device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        """The same picture as a PNG. Needs matplotlib (`pip install fastattn[lens]`)."""
        keys = queries if keys is None else keys
        lowered = self.lower(batch, heads, queries, keys, device, closed_forms=False)
        pictures.png(path, repr(self), lowered, at)

    def _shape(self, batch: int, heads: int, queries: int, keys: int, device: torch.device | str) -> Shape:
        shape = Shape(
            integer("batch", batch, least=0),
            integer("heads", heads, least=0),
            integer("queries", queries, least=0),
            integer("keys", keys, least=0),
            the_device(device),
        )
        for values in self.held:
            if values.tensor.device.type != "cpu" and values.tensor.device != shape.device:
                raise ValueError(f"{self!r} must be on the CPU or on {shape.device}, got {values.tensor.device}")
        if self.lasts:
            with outside_modes():
                self.check(shape)
        return shape

    def __and__(self, other: Mask) -> Mask:
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: combine masks with & | ~, not with and, or, not")


@kept(KEPT)
def _lower(mask: Mask, shape: Shape, closed_forms: bool) -> Lowered:
    if 0 in shape[:4]:
        # There are no pairs.
        nothing = shape._replace(device=torch.device("cpu"))
        lists = None if closed_forms else build_lists(_Nothing(), nothing)
        return Lowered(nothing, lists=lists).to(shape.device)
    found = _without_lists(mask, shape) if closed_forms else None
    if found is not None:
        return found
    home = shape._replace(device=mask.lowers_on(shape.device))
    lowered = Lowered(
        home, key_lengths=_key_lengths(mask, home), lists=build_lists(mask, home), bounds=mask.bounds(home)
    )
    return lowered.to(shape.device)


def _without_lists(mask: Mask, shape: Shape) -> Lowered | None:
    """The mask as a window or as intervals; None if it is neither."""
    form = mask.closed_form(shape)
    if form is not None:
        left, right = window_that_hides((form.left, form.right), shape.queries, shape.keys)
        return Lowered(shape, left, right, _key_lengths(mask, shape))
    home = shape._replace(device=mask.lowers_on(shape.device))
    intervals = mask.intervals(home)
    two_ways = None if intervals is None else both_ways(intervals, home)
    if two_ways is None:
        return None
    lowered = Lowered(
        home, key_lengths=_key_lengths(mask, home), intervals=two_ways, bounds=mask.bounds(home),
        sequences=mask.sequences(home),
    )  # fmt: skip
    return lowered.to(shape.device)


def visited_by_row(mask: Mask, shape: Shape) -> Tensor:
    """How many granules the kernels visit for each row of granules, over batch and heads: int64 (R,), as
    `Lowered.visited_by_row` counts them. Lists are not made for it."""
    if not mask.lasts:
        return mask.lower(*shape).visited_by_row
    return _visited_by_row(mask, mask._shape(*shape))


@kept(KEPT)
def _visited_by_row(mask: Mask, shape: Shape) -> Tensor:
    if 0 in shape[:4] or mask.repeats:
        return _lower(mask, shape, True).visited_by_row
    lowered = _without_lists(mask, shape)
    if lowered is not None:
        return lowered.visited_by_row
    return lowering.visited_by_row(mask, shape._replace(device=mask.lowers_on(shape.device)))


@kept(8)
def _intervals(mask: Mask, shape: Shape) -> Intervals | None:
    return mask.intervals(shape)


def both_ways(intervals: Intervals, shape: Shape) -> Tensor | None:
    """The interval of keys for each query, then of queries for each key: int32 (1 or B, 2, Lq + Lk). None if the
    intervals move backward anywhere: then the queries that see a key may not form one interval."""
    start = intervals.start.clamp(0, shape.keys)
    stop = torch.maximum(intervals.stop.clamp(0, shape.keys), start)
    start, stop = torch.broadcast_tensors(start, stop)
    if (start.diff() < 0).any() or (stop.diff() < 0).any():
        return None
    key = torch.arange(shape.keys, device=start.device).expand(len(start), -1).contiguous()
    # The first query whose interval ends beyond the key, and the first one whose interval begins beyond it.
    first = torch.searchsorted(stop.contiguous(), key, right=True)
    last = torch.maximum(torch.searchsorted(start.contiguous(), key, right=True), first)
    return torch.stack((torch.cat((start, first), 1), torch.cat((stop, last), 1)), 1).int()


def _key_lengths(mask: Mask, shape: Shape) -> Tensor | None:
    """The key from which on no query sees any, for each batch element: int32 (B,)."""
    ends = mask.key_ends(shape.device)
    return None if ends is None else ends.clamp(0, shape.keys).to(torch.int32).expand(shape.batch).contiguous()


class _Nothing(Mask):
    """No key."""

    def sees(self, at: Positions) -> Tensor:
        return torch.zeros((), dtype=torch.bool, device=at.key.device)

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return False, False


@dataclass(frozen=True, repr=False)
class _Pair(Mask):
    first: Mask
    second: Mask

    def of_distance(self) -> bool:
        return self.first.of_distance() and self.second.of_distance()


@dataclass(frozen=True, repr=False)
class And(_Pair):
    """Keys that both masks show. How often a key counts is multiplied."""

    def sees(self, at: Positions) -> Tensor:
        return self.first.sees(at) & self.second.sees(at)

    def states(self, slab: Slab) -> Tensor:
        return torch.minimum(self.first.states(slab), self.second.states(slab))

    def words(self, slab: Slab) -> Tensor:
        return self.first.words(slab) & self.second.words(slab)

    @property
    def repeats(self) -> bool:
        return self.first.repeats or self.second.repeats

    def counts(self, at: Positions) -> Tensor:
        return self.first.counts(at) * self.second.counts(at)

    def closed_form(self, shape: Shape) -> ClosedForm | None:
        first, second = self.first.closed_form(shape), self.second.closed_form(shape)
        if first is None or second is None:
            return None
        return ClosedForm(smaller(first.left, second.left), smaller(first.right, second.right))

    def listed(self, shape: Shape, head: int) -> Tensor | None:
        found = [cells for part in self.parts if (cells := part.listed(shape, head)) is not None]
        return min(found, key=len, default=None)

    def key_ends(self, device: torch.device) -> Tensor | None:
        first, second = self.first.key_ends(device), self.second.key_ends(device)
        return second if first is None else first if second is None else torch.minimum(first, second)

    def bounds(self, shape: Shape) -> tuple[int | None, int | None]:
        (left, right), (other_left, other_right) = self.first.bounds(shape), self.second.bounds(shape)
        return smaller(left, other_left), smaller(right, other_right)

    def intervals(self, shape: Shape) -> Intervals | None:
        first, second = self.first.intervals(shape), self.second.intervals(shape)
        if first is None or second is None:
            return None
        return Intervals(torch.maximum(first.start, second.start), torch.minimum(first.stop, second.stop))

    def sequences(self, shape: Shape) -> Tensor | None:
        first = self.first.sequences(shape)
        return self.second.sequences(shape) if first is None else first

    def __repr__(self) -> str:
        return " & ".join(
            f"({part!r})" if isinstance(part, Or) else repr(part) for part in (self.first, self.second)
        )


@dataclass(frozen=True, repr=False)
class Or(_Pair):
    """Keys that either mask shows."""

    def __post_init__(self) -> None:
        _refuse_repeats("|", self.first, self.second)

    def sees(self, at: Positions) -> Tensor:
        return self.first.sees(at) | self.second.sees(at)

    def states(self, slab: Slab) -> Tensor:
        return torch.maximum(self.first.states(slab), self.second.states(slab))

    def words(self, slab: Slab) -> Tensor:
        return self.first.words(slab) | self.second.words(slab)

    def key_ends(self, device: torch.device) -> Tensor | None:
        first, second = self.first.key_ends(device), self.second.key_ends(device)
        return None if first is None or second is None else torch.maximum(first, second)

    def intervals(self, shape: Shape) -> Intervals | None:
        """The union of each query's two intervals, which must touch, unless one of them is empty."""
        first, second = self.first.intervals(shape), self.second.intervals(shape)
        if first is None or second is None:
            return None
        start, stop = torch.minimum(first.start, second.start), torch.maximum(first.stop, second.stop)
        no_first, no_second = first.start >= first.stop, second.start >= second.stop
        touch = torch.maximum(first.start, second.start) <= torch.minimum(first.stop, second.stop)
        if not (no_first | no_second | touch).all():
            return None
        start = torch.where(no_first, second.start, torch.where(no_second, first.start, start))
        return Intervals(start, torch.where(no_first, second.stop, torch.where(no_second, first.stop, stop)))

    def __repr__(self) -> str:
        return f"{self.first!r} | {self.second!r}"


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """What the other mask hides."""

    mask: Mask

    def __post_init__(self) -> None:
        _refuse_repeats("~", self.mask)

    def sees(self, at: Positions) -> Tensor:
        return ~self.mask.sees(at)

    def states(self, slab: Slab) -> Tensor:
        return FULL - self.mask.states(slab)

    def words(self, slab: Slab) -> Tensor:
        return ~self.mask.words(slab)

    def of_distance(self) -> bool:
        return self.mask.of_distance()

    def __invert__(self) -> Mask:
        return self.mask

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, _Pair) else f"~{self.mask!r}"


def smaller(first: int | None, second: int | None) -> int | None:
    return second if first is None else first if second is None else min(first, second)


def _refuse_repeats(operator: str, *masks: Mask) -> None:
    for mask in masks:
        if mask.repeats:
            raise ValueError(
                f"a mask whose keys count several times combines with & only, got {operator} of {mask!r}"
            )
