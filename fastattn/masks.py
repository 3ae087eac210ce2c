"""Which keys each query sees, as small immutable values that combine with & | ~.

>>> mask = causal() & window(512) | global_tokens([0])
>>> mask
causal & window(512) | global_tokens([0])
>>> seen = mask.dense(1, 1, 1024, 1024)

A mask is a rule, not a tensor: it holds for any length, unless a part of it lists positions. Query i stands on
the diagonal at key i + Lk - Lq (bottom-right alignment). Every mask is said once, as a predicate over positions
(`sees`); what makes it cheap is the second way it is said, granule by granule (`states`). `lower` turns it into
what the kernels read: see `fastattn.mask_lowering`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn import bigbird_blocks, mask_pictures
from fastattn.mask_lowering import (
    FULL,
    GRANULE,
    PARTIAL,
    Lowered,
    Positions,
    Shape,
    Slab,
    build_lists,
    the_device,
)
from fastattn.spec import check_window, window_that_hides

INTEGERS = (torch.int32, torch.int64)
COMPARED_BY_VALUE = 4096  # elements; larger tensors are equal if they are the same tensor
CACHED = 32  # lowered masks kept


class Values:
    """A tensor in a mask. Small ones on the CPU are copied and equal by value; others are equal if they are the
    same tensor, unchanged."""

    def __init__(self, tensor: Tensor) -> None:
        small = tensor.device.type == "cpu" and tensor.numel() <= COMPARED_BY_VALUE
        own = small or tensor.is_inference()  # an inference tensor does not count its changes
        self.tensor = tensor.detach().clone() if own else tensor
        self._value = (tuple(tensor.shape), tuple(tensor.flatten().tolist())) if small else None

    @property
    def _key(self) -> tuple:
        version = 0 if self.tensor.is_inference() else self.tensor._version
        return self._value or (id(self.tensor), version)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        if self.tensor.numel() <= 8 and self.tensor.device.type == "cpu":
            return str(self.tensor.tolist())
        return f"<{' x '.join(map(str, self.tensor.shape))}>"

    def on(self, device: torch.device) -> Tensor:
        return self.tensor.to(device)


class ClosedForm(NamedTuple):
    """A window around the diagonal and the lengths that bound the keys: the least of them holds."""

    left: int | None = None
    right: int | None = None
    lengths: tuple[Values, ...] = ()


class Mask:
    """Which keys each query sees. Combine masks with & (both), | (either) and ~ (not)."""

    def sees(self, at: Positions) -> Tensor:
        """The definition: may the queries see the keys? Bool, broadcast over the positions it depends on."""
        raise NotImplementedError

    def states(self, slab: Slab) -> Tensor:
        """int8, broadcasts to (rows, columns) of the slab: EMPTY or FULL where no existing pair, or every one, is
        seen; PARTIAL says nothing."""
        return torch.full((1, 1), PARTIAL, dtype=torch.int8, device=slab.shape.device)

    def counts(self, at: Positions) -> Tensor:
        """How often the keys count in the softmax where they are seen, integers. Alike all over a FULL granule."""
        return torch.ones((), dtype=torch.int64, device=at.key.device)

    @property
    def repeats(self) -> bool:
        """Whether any key may count more than once."""
        return False

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        """Whether the mask depends on the batch element and on the head."""
        return False, False

    def check(self, shape: Shape) -> None:
        """The shape rule: a ValueError if the mask is not one for this shape and device."""

    def closed_form(self) -> ClosedForm | None:
        """The whole mask in numbers, where that is possible."""
        return None

    def needs_device(self) -> bool:
        """Whether it must be evaluated on the target device; else lists are built on the CPU and moved."""
        return False

    def dense(self, batch: int, heads: int, queries: int, keys: int, device: torch.device | str = "cpu") -> Tensor:
        """The mask itself, bool (1 or B, 1 or H, Lq, Lk), True where a query may see a key: the definition."""
        shape = self._shape(batch, heads, queries, keys, device)
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
        """The mask as the kernels read it; the last few are kept, by the mask's value.

        Conjunctions of causal, window, prefix and key_lengths become numbers, unless `closed_forms` is False;
        everything else becomes block lists.

        Raises:
            ValueError: if the mask is one for another batch size, head count, length or device.
        """
        return _lower(self, self._shape(batch, heads, queries, keys, device), closed_forms)

    def density(
        self, batch: int, heads: int, queries: int, keys: int, device: torch.device | str = "cpu"
    ) -> float:
        """The share of the (query, key) pairs that is seen, from 0 to 1; 0 where there are none."""
        total = batch * heads * queries * keys
        return self.lower(batch, heads, queries, keys, device).visible / total if total else 0.0

    def flops(
        self,
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        backward: bool = False,
        device: torch.device | str = "cpu",
    ) -> int:
        """Multiplications and additions of the products over the seen pairs: two in the forward, five backward."""
        value_dim = head_dim if value_dim is None else value_dim
        widths = 3 * head_dim + 2 * value_dim if backward else head_dim + value_dim
        return 2 * self.lower(batch, heads, queries, keys, device).visible * widths

    def draw(
        self,
        queries: int,
        keys: int | None = None,
        *,
        batch: int = 1,
        heads: int = 1,
        at: tuple[int, int] = (0, 0),
        width: int = 64,
    ) -> str:
        """A block picture in text, of batch element and head `at`: full, partial and empty granules, density.

        Granules are drawn as `width` columns at most: where several share a character, it is full or empty only if
        all of them are.
        """
        keys = queries if keys is None else keys
        lowered = self.lower(batch, heads, queries, keys, closed_forms=False)
        return mask_pictures.text(repr(self), lowered, at, width)

    def save_png(
        self,
        path: str | Path,
        queries: int,
        keys: int | None = None,
        *,
        batch: int = 1,
        heads: int = 1,
        at: tuple[int, int] = (0, 0),
    ) -> None:
        """The same picture as a PNG. Needs matplotlib (`pip install fastattn[lens]`)."""
        keys = queries if keys is None else keys
        lowered = self.lower(batch, heads, queries, keys, closed_forms=False)
        mask_pictures.png(path, repr(self), lowered, at)

    def _shape(self, batch: int, heads: int, queries: int, keys: int, device: torch.device | str) -> Shape:
        for name, value in (("batch", batch), ("heads", heads), ("queries", queries), ("keys", keys)):
            check_integer(name, value, least=0)
        shape = Shape(batch, heads, queries, keys, the_device(device))
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


@lru_cache(maxsize=CACHED)
def _lower(mask: Mask, shape: Shape, closed_forms: bool) -> Lowered:
    form = mask.closed_form() if closed_forms else None
    if form is not None:
        left, right = window_that_hides((form.left, form.right), shape.queries, shape.keys)
        return Lowered(shape, left, right, _least(form.lengths, shape))
    home = shape.device if mask.needs_device() else torch.device("cpu")
    return Lowered(shape, lists=build_lists(mask, shape._replace(device=home)).to(shape.device))


def _least(lengths: tuple[Values, ...], shape: Shape) -> Tensor | None:
    """The smallest length of each batch element, int32 (B,)."""
    least = None
    for values in lengths:
        here = values.on(shape.device).clamp(0, shape.keys).to(torch.int32).expand(shape.batch)
        least = here if least is None else torch.minimum(least, here)
    return None if least is None else least.contiguous()


# ------------------------------------------------------------------------------------------------ combining


@dataclass(frozen=True, repr=False)
class _Pair(Mask):
    first: Mask
    second: Mask

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        (b1, h1), (b2, h2) = self.first.varies(shape), self.second.varies(shape)
        return b1 or b2, h1 or h2

    def check(self, shape: Shape) -> None:
        self.first.check(shape)
        self.second.check(shape)

    def needs_device(self) -> bool:
        return self.first.needs_device() or self.second.needs_device()


class And(_Pair):
    """Both see it. A key's multiplicities multiply."""

    def sees(self, at: Positions) -> Tensor:
        return self.first.sees(at) & self.second.sees(at)

    def states(self, slab: Slab) -> Tensor:
        return torch.minimum(self.first.states(slab), self.second.states(slab))

    @property
    def repeats(self) -> bool:
        return self.first.repeats or self.second.repeats

    def counts(self, at: Positions) -> Tensor:
        return self.first.counts(at) * self.second.counts(at)

    def closed_form(self) -> ClosedForm | None:
        first, second = self.first.closed_form(), self.second.closed_form()
        if first is None or second is None:
            return None
        left, right = _smaller(first.left, second.left), _smaller(first.right, second.right)
        return ClosedForm(left, right, first.lengths + second.lengths)

    def __repr__(self) -> str:
        return " & ".join(
            f"({part!r})" if isinstance(part, Or) else repr(part) for part in (self.first, self.second)
        )


class Or(_Pair):
    """Either sees it."""

    def __post_init__(self) -> None:
        _refuse_repeats("|", self.first, self.second)

    def sees(self, at: Positions) -> Tensor:
        return self.first.sees(at) | self.second.sees(at)

    def states(self, slab: Slab) -> Tensor:
        return torch.maximum(self.first.states(slab), self.second.states(slab))

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

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return self.mask.varies(shape)

    def check(self, shape: Shape) -> None:
        self.mask.check(shape)

    def needs_device(self) -> bool:
        return self.mask.needs_device()

    def __invert__(self) -> Mask:
        return self.mask

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, _Pair) else f"~{self.mask!r}"


def _smaller(first: int | None, second: int | None) -> int | None:
    return second if first is None else first if second is None else min(first, second)


def _refuse_repeats(operator: str, *masks: Mask) -> None:
    for mask in masks:
        if mask.repeats:
            raise ValueError(
                f"a mask whose keys count several times combines with & only, got {operator} of {mask!r}"
            )


# ------------------------------------------------------------------------------------------------ the masks


@dataclass(frozen=True, repr=False)
class Window(Mask):
    """Keys from `left` before the diagonal to `right` after it; None is unbounded."""

    left: int | None
    right: int | None

    def sees(self, at: Positions) -> Tensor:
        distance = at.key - at.diagonal
        left, right = self._bounds(at.shape)
        seen = torch.ones_like(distance, dtype=torch.bool) if left is None else distance >= -left
        return seen if right is None else seen & (distance <= right)

    def states(self, slab: Slab) -> Tensor:
        (query, last_query), (key, last_key), offset = slab.queries, slab.keys, slab.shape.offset
        least, most = key - (last_query + offset), last_key - (query + offset)
        left, right = self._bounds(slab.shape)
        states = torch.full_like(least, FULL, dtype=torch.int8)
        if left is not None:
            states = torch.minimum(states, _state(some=most >= -left, all=least >= -left))
        if right is not None:
            states = torch.minimum(states, _state(some=least <= right, all=most <= right))
        return states

    def closed_form(self) -> ClosedForm:
        return ClosedForm(self.left, self.right)

    def _bounds(self, shape: Shape) -> tuple[int | None, int | None]:
        return window_that_hides((self.left, self.right), shape.queries, shape.keys)

    def __repr__(self) -> str:
        if (self.left, self.right) == (None, 0):
            return "causal"
        sides = () if self.left is None and self.right is None else (self.left, self.right)
        return f"window({', '.join(str(side) for side in (sides if self.right is not None else sides[:1]))})"


@dataclass(frozen=True, repr=False)
class Lengths(Mask):
    """The first keys of each batch element."""

    lengths: Values  # (1,) or (B,)
    name: str

    def sees(self, at: Positions) -> Tensor:
        return at.key < _of_batch(self.lengths.on(at.key.device), at.batch)

    def states(self, slab: Slab) -> Tensor:
        key, last_key = slab.keys
        length = _of_batch(self.lengths.on(slab.shape.device), slab.batch)
        return _state(some=key < length, all=last_key < length)

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return self.lengths.tensor.numel() != 1, False

    def check(self, shape: Shape) -> None:
        _check_device(self.name, self.lengths, shape)
        _check_batch(self.name, self.lengths.tensor.numel(), shape)

    def needs_device(self) -> bool:
        return _is_elsewhere(self.lengths)

    def closed_form(self) -> ClosedForm:
        return ClosedForm(lengths=(self.lengths,))

    def __repr__(self) -> str:
        single = self.lengths.tensor.numel() == 1 and self.lengths.tensor.device.type == "cpu"
        return f"{self.name}({self.lengths.tensor.item() if single else self.lengths})"


@dataclass(frozen=True, repr=False)
class Documents(Mask):
    """Keys of the query's own document. `boundaries` says whether `values` are cu_seqlens rather than ids."""

    values: Values
    boundaries: bool

    def sees(self, at: Positions) -> Tensor:
        ids = _document_ids(self.values, self.boundaries).to(at.key.device)
        batch = _pick(ids.shape[0], at.batch)
        return ids[batch, at.diagonal] == ids[batch, at.key]

    def states(self, slab: Slab) -> Tensor:
        ids = _document_ids(self.values, self.boundaries).to(slab.shape.device)
        ids = ids[_pick(ids.shape[0], slab.batch)]
        low, high = _ranges(ids)
        rows = slice(slab.first * GRANULE + slab.shape.offset, slab.stop * GRANULE + slab.shape.offset)
        own_low, own_high = (t[:, None] for t in _ranges(ids[rows]))
        return _state(
            some=(own_low <= high) & (low <= own_high),
            all=(own_low == high) & (low == own_high) & (low == high),
        )

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return self._rows != 1, False

    def check(self, shape: Shape) -> None:
        _check_device("documents", self.values, shape)
        _check_batch("documents", self._rows, shape)
        length = _document_ids(self.values, self.boundaries).shape[1]
        if length != shape.keys:
            raise ValueError(f"documents hold {length} tokens, expected {shape.keys}, one for each key")
        if shape.queries > shape.keys:
            raise ValueError(
                f"documents need a key for each query, got {shape.queries} queries and {shape.keys} keys"
            )

    def needs_device(self) -> bool:
        return _is_elsewhere(self.values)

    @property
    def _rows(self) -> int:
        tensor = self.values.tensor
        return tensor.shape[0] if tensor.dim() == 2 else 1

    def __repr__(self) -> str:
        return f"documents({'cu_seqlens=' if self.boundaries else ''}{self.values})"


@lru_cache(maxsize=8)
def _document_ids(values: Values, boundaries: bool) -> Tensor:
    """The document of each token, (1 or B, N)."""
    if not boundaries:
        return values.tensor.view(-1, values.tensor.shape[-1])
    sizes = values.tensor.diff()
    return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)[None]


@dataclass(frozen=True, repr=False)
class GlobalTokens(Mask):
    """Pairs of which either is a global token. `values` are positions (n,), or flags (N,) or (B, N)."""

    values: Values

    def sees(self, at: Positions) -> Tensor:
        flags = self._flags(at.shape, at.key.device)
        batch = _pick(flags.shape[0], at.batch)
        return flags[batch, at.key] | self._of_queries(flags, at.shape)[batch, at.query]

    def states(self, slab: Slab) -> Tensor:
        flags = self._flags(slab.shape, slab.shape.device)
        flags, batch = flags.to(torch.int8), _pick(flags.shape[0], slab.batch)
        low, high = _ranges(flags[batch])
        rows = slice(slab.first * GRANULE, slab.stop * GRANULE)
        own_low, own_high = (t[:, None] for t in _ranges(self._of_queries(flags, slab.shape)[batch, rows]))
        return torch.maximum(low + high, own_low + own_high)

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return self._are_flags and self.values.tensor.dim() == 2 and self.values.tensor.shape[0] != 1, False

    def check(self, shape: Shape) -> None:
        tensor = self.values.tensor
        _check_device("global_tokens", self.values, shape)
        if self._are_flags:
            _check_batch("global_tokens", tensor.shape[0] if tensor.dim() == 2 else 1, shape)
            if tensor.shape[-1] != shape.keys:
                raise ValueError(
                    f"global_tokens has {tensor.shape[-1]} flags, expected {shape.keys}, one for each key"
                )
        elif tensor.numel() and int(tensor.max()) >= shape.keys:
            raise ValueError(f"global_tokens has position {int(tensor.max())}, expected below {shape.keys} keys")

    def needs_device(self) -> bool:
        return _is_elsewhere(self.values)

    @property
    def _are_flags(self) -> bool:
        return self.values.tensor.dtype == torch.bool

    def _flags(self, shape: Shape, device: torch.device) -> Tensor:
        """Whether each key is a global token, (1 or B, Lk)."""
        tensor = self.values.on(device)
        if self._are_flags:
            return tensor.view(-1, tensor.shape[-1])
        return torch.zeros(1, shape.keys, dtype=torch.bool, device=device).index_fill_(1, tensor.long(), True)

    def _of_queries(self, flags: Tensor, shape: Shape) -> Tensor:
        """Whether the token of each query is a global one; queries before the first key are none."""
        if shape.offset < 0:
            return F.pad(flags, (-shape.offset, 0))
        return flags[:, shape.offset :]

    def __repr__(self) -> str:
        return f"global_tokens({self.values})"


@dataclass(frozen=True, repr=False)
class Dilated(Mask):
    """Keys at multiples of `step` from the diagonal."""

    step: int

    def sees(self, at: Positions) -> Tensor:
        return (at.key - at.diagonal) % self.step == 0

    def states(self, slab: Slab) -> Tensor:
        (query, last_query), (key, last_key), offset = slab.queries, slab.keys, slab.shape.offset
        least, most = key - (last_query + offset), last_key - (query + offset)
        multiples = most // self.step - (least - 1) // self.step
        return _state(some=multiples > 0, all=multiples == most - least + 1)

    def __repr__(self) -> str:
        return f"dilated({self.step})"


class _Cells(Mask):
    """Masks made of square blocks of tokens: `cells` says how often the keys of a block count, 0 for not seen."""

    block: int

    def cells(self, shape: Shape, batch: int | Tensor, head: int | Tensor, row: Tensor, column: Tensor) -> Tensor:
        raise NotImplementedError

    def sees(self, at: Positions) -> Tensor:
        return self.cells(at.shape, at.batch, at.head, at.query // self.block, at.key // self.block) > 0

    def counts(self, at: Positions) -> Tensor:
        if not self.repeats:
            return super().counts(at)
        return self.cells(at.shape, at.batch, at.head, at.query // self.block, at.key // self.block)

    def states(self, slab: Slab) -> Tensor:
        top, bottom = (t // self.block for t in slab.queries)
        left, right = (t // self.block for t in slab.keys)
        rows = torch.arange(int(top[0]), int(bottom[-1]) + 1, device=top.device)[:, None]
        columns = torch.arange(int(right[0, -1]) + 1, device=top.device)[None]
        cells = self.cells(slab.shape, slab.batch, slab.head, rows, columns).expand(len(rows), columns.shape[1])
        box = (top[:, 0] - top[0, 0], bottom[:, 0] - top[0, 0] + 1, left[0], right[0] + 1)
        hits, area = _box_sums(cells > 0, *box), (bottom - top + 1) * (right - left + 1)
        states = _state(some=hits > 0, all=hits == area)
        if self.repeats:
            # Several blocks in a granule may count differently: only if all count once is that known here.
            same = (area == 1) | (_box_sums(cells, *box) == area)
            states = torch.where(same, states, states.clamp(max=PARTIAL))
        return states


def _box_sums(cells: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Sums over the boxes rows top to before bottom (r,) x columns left to before right (c,): (r, c)."""
    along = F.pad(cells.cumsum(1, dtype=torch.int32), (1, 0))
    down = F.pad((along[:, right] - along[:, left]).cumsum(0, dtype=torch.int32), (0, 0, 1, 0))
    return down[bottom] - down[top]


@dataclass(frozen=True, repr=False)
class Blocks(_Cells):
    """Blocks of `block` tokens as a grid says, (R, C), (H, R, C) or (B, H, R, C), B and H possibly 1."""

    grid: Values
    block: int
    repeated: bool

    @property
    def repeats(self) -> bool:
        return self.repeated

    def cells(self, shape: Shape, batch: int | Tensor, head: int | Tensor, row: Tensor, column: Tensor) -> Tensor:
        grid = _four_dimensional(self.grid.tensor)
        where = (_pick(grid.shape[0], batch), _pick(grid.shape[1], head), row, column)
        home = grid.device
        return grid[tuple(t.to(home) if isinstance(t, Tensor) else t for t in where)].to(row.device)

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return _varies_by_shape(self.grid)

    def check(self, shape: Shape) -> None:
        expected = (shape.batch, shape.heads, -(-shape.queries // self.block), -(-shape.keys // self.block))
        _check_grid("blocks", self.grid, expected, shape)

    def needs_device(self) -> bool:
        return _is_elsewhere(self.grid)

    def __repr__(self) -> str:
        return f"blocks({self.grid}, {self.block})"


@dataclass(frozen=True, repr=False)
class Dense(Mask):
    """A bool tensor (Lq, Lk), (H, Lq, Lk) or (B, H, Lq, Lk), B and H possibly 1."""

    seen: Values

    def sees(self, at: Positions) -> Tensor:
        seen = _four_dimensional(self.seen.tensor)
        where = (_pick(seen.shape[0], at.batch), _pick(seen.shape[1], at.head), at.query, at.key)
        return seen[tuple(t.to(seen.device) if isinstance(t, Tensor) else t for t in where)].to(at.key.device)

    def states(self, slab: Slab) -> Tensor:
        seen = _four_dimensional(self.seen.tensor)
        rows = slice(slab.first * GRANULE, slab.stop * GRANULE)
        seen = seen[_pick(seen.shape[0], slab.batch), _pick(seen.shape[1], slab.head), rows]
        # Pixels, first pooled along the contiguous keys.
        low, high = (t.transpose(0, 1) for t in _ranges(seen.to(torch.uint8)))
        low, high = _ranges(low)[0].transpose(0, 1), _ranges(high)[1].transpose(0, 1)
        return _state(some=high > 0, all=low > 0).to(slab.shape.device)

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return _varies_by_shape(self.seen)

    def check(self, shape: Shape) -> None:
        _check_grid("from_dense", self.seen, shape[:4], shape)

    def needs_device(self) -> bool:
        return _is_elsewhere(self.seen)

    def __repr__(self) -> str:
        return f"from_dense(<{' x '.join(map(str, self.seen.tensor.shape))}>)"


@dataclass(frozen=True, repr=False)
class Function(Mask):
    """What a function says."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def sees(self, at: Positions) -> Tensor:
        seen = self.function(at.batch, at.head, at.query, at.key)
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            got = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
            raise TypeError(f"{self!r} must return a bool tensor, got {got}")
        whole = torch.broadcast_shapes(*(t.shape for t in at[1:]))
        try:
            fits = torch.broadcast_shapes(seen.shape, whole) == whole
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"{self!r} must return what broadcasts to {tuple(whole)}, got {tuple(seen.shape)}")
        return seen

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        """It does if its answer to all batch elements and heads is more than one answer."""
        if 0 in shape[:4]:
            return False, False
        batch, head = (
            torch.arange(shape.batch, device=shape.device),
            torch.arange(shape.heads, device=shape.device),
        )
        zero = batch.new_zeros(1, 1, 1, 1)
        seen = self.sees(Positions(shape, batch.view(-1, 1, 1, 1), head.view(1, -1, 1, 1), zero, zero))
        batches, heads, _, _ = (1,) * (4 - seen.dim()) + tuple(seen.shape)
        return batches > 1, heads > 1

    def needs_device(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"from_function({getattr(self.function, '__qualname__', repr(self.function))})"


@dataclass(frozen=True, repr=False)
class BigBird(_Cells):
    """The union of a window, global and random blocks (Zaheer et al. 2020, section 2)."""

    block: int
    random: int
    global_blocks: int
    window_blocks: int
    seed: int
    per_head: bool

    def cells(self, shape: Shape, batch: int | Tensor, head: int | Tensor, row: Tensor, column: Tensor) -> Tensor:
        count, last = -(-shape.keys // self.block), -(-shape.keys // self.block) - self.global_blocks
        drawn = bigbird_blocks.paper_blocks(
            count,
            shape.heads if self.per_head else 1,
            self.random,
            self.global_blocks,
            self.window_blocks // 2,
            self.seed,
        ).to(row.device)
        drawn = drawn[_pick(drawn.shape[0], head), row]
        seen = ((row - column).abs() <= self.window_blocks // 2) | (drawn == column[..., None]).any(-1)
        for block in (row, column):
            seen = seen | (block < self.global_blocks) | (block >= last)
        return seen

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return False, self.per_head and shape.heads > 1

    def check(self, shape: Shape) -> None:
        if shape.queries != shape.keys:
            raise ValueError(f"bigbird is self-attention, got {shape.queries} queries and {shape.keys} keys")

    def __repr__(self) -> str:
        return (
            f"bigbird({self.block}, {self.random}, {self.global_blocks}, {self.window_blocks}, seed={self.seed})"
        )


@dataclass(frozen=True, repr=False)
class HuggingFaceBigBird(_Cells):
    """What `transformers`' block-sparse BigBird attention computes, multiplicities included."""

    block: int
    random: int
    seed: int
    training: bool
    max_positions: int

    @property
    def repeats(self) -> bool:
        return True

    def cells(self, shape: Shape, batch: int | Tensor, head: int | Tensor, row: Tensor, column: Tensor) -> Tensor:
        count = shape.keys // self.block
        if count <= 5 + 2 * self.random:  # such models switch to full attention
            return torch.ones_like(row + column)
        drawn = bigbird_blocks.huggingface_blocks(
            count, self.block, shape.heads, self.random, self.seed if self.training else None, self.max_positions
        ).to(row.device)
        drawn = drawn[_pick(drawn.shape[0], head), row]
        edge = (row == 0) | (row == count - 1)
        seen = edge | (column == 0) | (column == count - 1) | ((row - column).abs() <= 1)
        return seen + torch.where(edge, 0, (drawn == column[..., None]).sum(-1))

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return False, self.training and shape.heads > 1

    def check(self, shape: Shape) -> None:
        if shape.queries != shape.keys or shape.keys % self.block:
            raise ValueError(
                f"bigbird in the style of huggingface is self-attention over a multiple of {self.block} tokens, "
                f"got {shape.queries} queries and {shape.keys} keys"
            )

    def __repr__(self) -> str:
        mode = "training" if self.training else "eval"
        return f"bigbird({self.block}, {self.random}, seed={self.seed}, style='huggingface', {mode})"


# ------------------------------------------------------------------------------------------------ asking for them


def causal() -> Mask:
    """Keys up to the diagonal."""
    return Window(None, 0)


def window(left: int | None = None, right: int | None = None) -> Mask:
    """Keys from `left` before the diagonal to `right` after it, both included; None is unbounded.

    A causal sliding window of 512 keys before the query, and itself, is `causal() & window(512)`.
    """
    check_window((left, right))
    return Window(left, right)


def key_lengths(lengths: Tensor | Sequence[int]) -> Mask:
    """The first `lengths[b]` keys of batch element b: padding on the right is not seen.

    Args:
        lengths: (B,), int32 or int64. Lengths beyond Lk count as Lk, negative ones as 0.
    """
    return Lengths(_lengths("key_lengths", lengths), "key_lengths")


def prefix(lengths: int | Tensor | Sequence[int]) -> Mask:
    """The first keys, as `key_lengths`, or as many in every batch element.

    A prefix language model, which sees its prefix in both directions, is `causal() | prefix(lengths)`.
    """
    return Lengths(_lengths("prefix", [lengths] if isinstance(lengths, int) else lengths), "prefix")


def documents(
    ids: Tensor | Sequence[int] | None = None, *, cu_seqlens: Tensor | Sequence[int] | None = None
) -> Mask:
    """Keys of the same document as the query's: several documents in one sequence do not see each other.

    The queries are those of the last Lq tokens.

    Args:
        ids: which document each key is from, integers (Lk,) or (B, Lk), in any order (sorted is fastest).
        cu_seqlens: instead of ids, where documents begin, and the end: (documents + 1,), from 0 up to Lk.
    """
    if (ids is None) == (cu_seqlens is None):
        raise TypeError("documents takes either ids or cu_seqlens")
    if ids is not None:
        return Documents(Values(_integers("ids", ids, "(Lk,) or (B, Lk)", dims=(1, 2))), boundaries=False)
    starts = _integers("cu_seqlens", cu_seqlens, "(documents + 1,)", dims=(1,))
    if not len(starts) or int(starts[0]) != 0 or bool((starts.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must begin with 0 and be sorted, got {_shortened(starts)}")
    return Documents(Values(starts), boundaries=True)


def global_tokens(positions: Tensor | Iterable[int]) -> Mask:
    """Global tokens see all keys and all queries see them (Longformer, Beltagy et al. 2020, section 3.1).

    Args:
        positions: key positions (n,), integers; or flags, bool (Lk,) or (B, Lk). The queries are those of the last
            Lq tokens.
    """
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.dim() not in (1, 2):
            raise ValueError(f"positions must have shape (n,), (Lk,) or (B, Lk), got {tuple(positions.shape)}")
        return GlobalTokens(Values(positions))
    values = _integers("positions", positions, "(n,)", dims=(1,))
    if values.numel() and int(values.min()) < 0:
        raise ValueError(f"positions must not be negative, got {int(values.min())}")
    return GlobalTokens(Values(values))


def dilated(step: int) -> Mask:
    """Keys at multiples of `step` from the diagonal, before and after it."""
    check_integer("step", step, least=1)
    return Dilated(step)


def blocks(grid: Tensor, block: int = GRANULE) -> Mask:
    """Square blocks of `block` tokens.

    Args:
        grid: (Lq / block, Lk / block), rounded up, with or without (B, H) in front, each possibly 1. Bool; or
            integers, how often a block's keys count in the softmax: such a mask combines with & only.
    """
    check_integer("block", block, least=1)
    _check_tensor("grid", grid, (torch.bool, torch.uint8, *INTEGERS))
    if grid.dim() not in (2, 3, 4):
        raise ValueError(f"grid must have 2 to 4 dimensions ([[B,] H,] rows, columns), got {tuple(grid.shape)}")
    if grid.dtype == torch.bool:
        return Blocks(Values(grid), block, False)
    if grid.numel() and int(grid.min()) < 0:
        raise ValueError(f"grid must not be negative, got {int(grid.min())}")
    return Blocks(Values(grid), block, True)


def bigbird(
    block: int = GRANULE,
    random: int = 3,
    *,
    global_blocks: int = 1,
    window_blocks: int = 3,
    seed: int = 0,
    style: str = "paper",
    per_head: bool = False,
    training: bool = False,
    max_positions: int = 4096,
) -> Mask:
    """BigBird's sparse attention (Zaheer et al. 2020), self-attention only.

    Args:
        block: tokens a block.
        random: random blocks a row of blocks, drawn from those it does not see anyway.
        global_blocks: so many blocks at the beginning and at the end see all and are seen by all.
        window_blocks: blocks seen around the diagonal, odd.
        seed: of the random blocks. In the style of huggingface, the layer's index.
        style: "paper", or "huggingface": exactly what `transformers`' BigBird computes, in which a key may count
            several times in the softmax; window_blocks and global_blocks are 3 and 1 there, and random blocks
            differ by head. Such a mask combines with & only.
        per_head: in the style of the paper, whether heads draw their own random blocks.
        training: in the style of huggingface. In eval mode its random blocks are all block 0, which then counts
            1 + random times.
        max_positions: in the style of huggingface, the model's `max_position_embeddings`.
    """
    for name, value, least in (
        ("block", block, 1),
        ("random", random, 0),
        ("global_blocks", global_blocks, 0),
        ("window_blocks", window_blocks, 1),
        ("seed", seed, 0),
        ("max_positions", max_positions, 1),
    ):
        check_integer(name, value, least=least)
    if window_blocks % 2 == 0:
        raise ValueError(f"window_blocks must be odd, got {window_blocks}")
    if style == "paper":
        return BigBird(block, random, global_blocks, window_blocks, seed, per_head)
    if style != "huggingface":
        raise ValueError(f"style must be 'paper' or 'huggingface', got {style!r}")
    if (global_blocks, window_blocks) != (1, 3):
        raise ValueError(
            "in the style of huggingface, global_blocks must be 1 and window_blocks 3, "
            f"got {global_blocks} and {window_blocks}"
        )
    return HuggingFaceBigBird(block, random, seed, training, max_positions)


def longformer(window: int, global_positions: Tensor | Iterable[int] = ()) -> Mask:
    """A window of `window` / 2 keys on either side, and global tokens (Beltagy et al. 2020).

    Args:
        window: even, as a Longformer's `attention_window`.
        global_positions: as `global_tokens` takes them.
    """
    check_integer("window", window, least=0)
    if window % 2:
        raise ValueError(f"window must be even, got {window}")
    return Window(window // 2, window // 2) | global_tokens(global_positions)


def from_function(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Mask:
    """What a vectorised predicate says.

    Args:
        function: called with int64 tensors that broadcast against each other, (batch, head, query, key); returns a
            bool tensor that broadcasts to all of them. Only where its answer has more than one batch element or
            head is it looked at for each of them. It is evaluated on the device the mask is asked for, a few
            megabytes at a time. Masks from equal functions are equal, so keep the function to keep its lists.
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    return Function(function)


def from_dense(seen: Tensor) -> Mask:
    """What a tensor says.

    Args:
        seen: bool (Lq, Lk), (H, Lq, Lk) or (B, H, Lq, Lk), B and H possibly 1; True where a query may see a key.
    """
    _check_tensor("seen", seen, (torch.bool,))
    if seen.dim() not in (2, 3, 4):
        raise ValueError(f"seen must have 2 to 4 dimensions ([[B,] H,] Lq, Lk), got {tuple(seen.shape)}")
    return Dense(Values(seen))


# ------------------------------------------------------------------------------------------------ small tools


def _state(*, some: Tensor, all: Tensor) -> Tensor:
    """FULL where all pairs are seen, PARTIAL where some may be."""
    return some.to(torch.int8) + (some & all).to(torch.int8)


def _pick(size: int, index: int | Tensor) -> int | Tensor:
    """The index into a dimension that may be 1 for all."""
    return 0 if size == 1 else index


def _of_batch(values: Tensor, batch: int | Tensor) -> Tensor:
    return values[_pick(values.numel(), batch)]


def _ranges(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each granule of the last dimension."""
    missing = -values.shape[-1] % GRANULE
    if missing:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], -1)
    values = values.unflatten(-1, (-1, GRANULE))
    return values.amin(-1), values.amax(-1)


def _four_dimensional(t: Tensor) -> Tensor:
    return t.view([1] * (4 - t.dim()) + list(t.shape)) if t.dim() < 4 else t


def _varies_by_shape(values: Values) -> tuple[bool, bool]:
    shape = _four_dimensional(values.tensor).shape
    return shape[0] != 1, shape[1] != 1


def _is_elsewhere(values: Values) -> bool:
    return values.tensor.device.type != "cpu"


def _check_device(name: str, values: Values, shape: Shape) -> None:
    device = values.tensor.device
    if device.type != "cpu" and device != shape.device:
        raise ValueError(f"{name} must be on {shape.device} or on the CPU, got {device}")


def _check_batch(name: str, rows: int, shape: Shape) -> None:
    if rows not in (1, shape.batch):
        raise ValueError(f"{name} is for a batch of {rows}, expected {shape.batch}")


def _check_grid(name: str, values: Values, expected: tuple[int, ...], shape: Shape) -> None:
    _check_device(name, values, shape)
    got = tuple(_four_dimensional(values.tensor).shape)
    fits = got[0] in (1, expected[0]) and got[1] in (1, expected[1]) and got[2:] == tuple(expected[2:])
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(values.tensor.shape)}, expected {tuple(expected)} or 1 in front"
        )


def _check_tensor(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        raise TypeError(
            f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {t.dtype}"
        )


def check_integer(name: str, value: int, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _lengths(name: str, lengths: Tensor | Sequence[int]) -> Values:
    return Values(_integers(name, lengths, "(B,)", dims=(1,)))


def _integers(name: str, values: Tensor | Iterable[int] | None, shape: str, dims: tuple[int, ...]) -> Tensor:
    """An integer tensor of so many dimensions."""
    if not isinstance(values, Tensor):
        values = list(values) if isinstance(values, Iterable) else values
        if not isinstance(values, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise TypeError(f"{name} must be a tensor or a sequence of integers, got {values!r}")
        values = torch.tensor(values, dtype=torch.int64)
    _check_tensor(name, values, INTEGERS)
    if values.dim() not in dims:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}")
    return values


def _shortened(values: Tensor) -> str:
    shown = ", ".join(map(str, values[:8].tolist()))
    return f"[{shown}, ...]" if len(values) > 8 else f"[{shown}]"
