"""The kinds of masks: each is a predicate over positions, and answers for whole granules at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.ground.checks import window_that_hides
from fastattn.ground.modes import kept, lasts
from fastattn.masks.algebra import ClosedForm, Intervals, Mask, Values
from fastattn.masks.lists import GRANULE, Shape, pack
from fastattn.masks.lowering import FULL, Positions, Slab


@dataclass(frozen=True, repr=False)
class Window(Mask):
    """Keys from `left` before the diagonal to `right` after it; None is unbounded.

    top_left: whether query i stands at key i, rather than the last query at the last key.
    """

    left: int | None
    right: int | None
    top_left: bool = False

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
            states = torch.minimum(states, state(some=most >= -left, all=least >= -left))
        if right is not None:
            states = torch.minimum(states, state(some=least <= right, all=most <= right))
        return states

    def closed_form(self, shape: Shape) -> ClosedForm | None:
        left, right = self._bounds(shape)
        # Kernels count the sides from the bottom-right diagonal, and neither may be negative.
        return None if min(left or 0, right or 0) < 0 else ClosedForm(left, right)

    def intervals(self, shape: Shape) -> Intervals:
        diagonal = torch.arange(shape.queries, device=shape.device)[None] + shape.offset
        left, right = self._bounds(shape)
        start = torch.zeros_like(diagonal) if left is None else diagonal - left
        return Intervals(start, torch.full_like(diagonal, shape.keys) if right is None else diagonal + right + 1)

    def of_distance(self) -> bool:
        return True

    def _bounds(self, shape: Shape) -> tuple[int | None, int | None]:
        """The sides, counted from the bottom-right diagonal; negative if the window ends before reaching it."""
        left, right = self.left, self.right
        if self.top_left:
            left = None if left is None else left + shape.offset
            right = None if right is None else right - shape.offset
        return window_that_hides((left, right), shape.queries, shape.keys)

    def __repr__(self) -> str:
        if (self.left, self.right) == (None, 0):
            return "causal(align='top-left')" if self.top_left else "causal"
        sides = [self.left, self.right] if self.right is not None else [self.left]
        words = [] if sides == [None] else [str(side) for side in sides]
        words += ["align='top-left'"] if self.top_left else []
        return f"window({', '.join(words)})"


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
        return state(some=key < length, all=last_key < length)

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return self.lengths.tensor.numel() != 1, False

    def check(self, shape: Shape) -> None:
        _check_batch(self.name, self.lengths.tensor.numel(), shape)

    def closed_form(self, shape: Shape) -> ClosedForm:
        return ClosedForm()

    def key_ends(self, device: torch.device) -> Tensor:
        return self.lengths.on(device)

    def intervals(self, shape: Shape) -> Intervals:
        stop = self.lengths.on(shape.device).long()[:, None].expand(-1, shape.queries)
        return Intervals(torch.zeros_like(stop), stop)

    def __repr__(self) -> str:
        single = self.lengths.tensor.numel() == 1 and self.lengths.tensor.device.type == "cpu"
        return f"{self.name}({self.lengths.tensor.item() if single else self.lengths})"


@dataclass(frozen=True, repr=False)
class Documents(Mask):
    """Keys of the query's own document. `values` are cu_seqlens if `boundaries`, else ids."""

    values: Values
    boundaries: bool

    def sees(self, at: Positions) -> Tensor:
        ids = _document_ids(self.values, self.boundaries).to(at.key.device)
        batch = pick(ids.shape[0], at.batch)
        return ids[batch, at.diagonal] == ids[batch, at.key]

    def states(self, slab: Slab) -> Tensor:
        low, high = _of_blocks(_document_ranges(self, 0, slab.unit), slab.batch, slab.columns)
        own = _document_ranges(self, slab.shape.offset, slab.unit)
        own_low, own_high = _of_blocks(own, slab.batch, slab.rows)
        return state(some=(own_low <= high) & (low <= own_high), all=(own_low == high) & (low == own_high))

    def intervals(self, shape: Shape) -> Intervals | None:
        """None if the tokens of some document are not contiguous."""
        ids = _document_ids(self.values, self.boundaries).to(shape.device)
        begins = F.pad(ids.diff() != 0, (1, 0), value=True)
        if not self.boundaries and not torch.equal(begins.sum(1), (ids.sort()[0].diff() != 0).sum(1) + 1):
            return None
        token = torch.arange(ids.shape[1], device=ids.device)
        start = torch.where(begins, token, 0).cummax(1)[0]
        ends = F.pad(begins[:, 1:], (0, 1), value=True)
        stop = torch.where(ends, token + 1, ids.shape[1]).flip(1).cummin(1)[0].flip(1)
        return Intervals(start[:, shape.offset :], stop[:, shape.offset :])

    def sequences(self, shape: Shape) -> Tensor:
        ids = _document_ids(self.values, self.boundaries).to(shape.device)
        begins = F.pad(ids.diff() != 0, (1, 0), value=True)
        each = [F.pad(row.nonzero()[:, 0], (0, 1), value=ids.shape[1]) for row in begins]
        # Rows with fewer documents than others have empty ones behind.
        keys = torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=ids.shape[1])
        queries = (keys - shape.offset).clamp(min=0)
        return torch.stack((queries[:, :-1], queries.diff(), keys[:, :-1], keys.diff()), 2).int()

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return self._rows != 1, False

    def check(self, shape: Shape) -> None:
        _check_batch("documents", self._rows, shape)
        length = _document_ids(self.values, self.boundaries).shape[1]
        if length != shape.keys:
            raise ValueError(f"documents hold {length} tokens, expected {shape.keys}, one for each key")
        if shape.queries > shape.keys:
            raise ValueError(
                f"documents need a key for each query, got {shape.queries} queries and {shape.keys} keys"
            )

    @property
    def _rows(self) -> int:
        tensor = self.values.tensor
        return tensor.shape[0] if tensor.dim() == 2 else 1

    def __repr__(self) -> str:
        return f"documents({'cu_seqlens=' if self.boundaries else ''}{self.values})"


@kept(8)
def _document_ids(values: Values, boundaries: bool) -> Tensor:
    """The document of each token, (1 or B, N)."""
    if not boundaries:
        return _rows(values.tensor)
    sizes = values.tensor.diff()
    return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)[None]


@kept(8)
def _document_ranges(documents: Documents, first: int, unit: int) -> tuple[Tensor, Tensor]:
    """The first and the last document of each block of tokens, from the token `first` on."""
    return _ranges(_document_ids(documents.values, documents.boundaries)[:, first:], unit)


@dataclass(frozen=True, repr=False)
class PackedSequences(Mask):
    """Keys of the query's own sequence, within a window around that sequence's own diagonal. `queries` and `keys`
    are cu_seqlens."""

    queries: Values
    keys: Values
    left: int | None
    right: int | None
    top_left: bool = False

    def sees(self, at: Positions) -> Tensor:
        start, stop = (t.to(at.key.device) for t in _intervals(self))
        return (start[at.query] <= at.key) & (at.key < stop[at.query])

    def states(self, slab: Slab) -> Tensor:
        key, last_key = slab.keys
        starts, stops = (_of_blocks(both, 0, slab.rows) for both in _interval_ranges(self, slab.unit))
        (first_start, last_start), (first_stop, last_stop) = starts, stops
        some = (first_start <= last_key) & (last_stop > key)
        return state(some=some, all=(last_start <= key) & (first_stop > last_key))

    def check(self, shape: Shape) -> None:
        for name, values, length in (("q", self.queries, shape.queries), ("k", self.keys, shape.keys)):
            if int(values.tensor[-1]) != length:
                raise ValueError(f"cu_seqlens_{name} ends with {int(values.tensor[-1])}, expected {length} tokens")

    def closed_form(self, shape: Shape) -> ClosedForm | None:
        return Window(self.left, self.right, self.top_left).closed_form(shape) if self.count == 1 else None

    def intervals(self, shape: Shape) -> Intervals:
        start, stop = _intervals(self)
        return Intervals(start[None].to(shape.device), stop[None].to(shape.device))

    def sequences(self, shape: Shape) -> Tensor:
        (queries, keys) = (values.on(shape.device) for values in (self.queries, self.keys))
        return torch.stack((queries[:-1], queries.diff(), keys[:-1], keys.diff()), 1)[None].int()

    @property
    def count(self) -> int:
        """How many sequences there are."""
        return self.queries.tensor.numel() - 1

    @property
    def shares_diagonal(self) -> bool:
        """Whether the diagonal of all queries and keys together is that of each sequence."""
        more = self.keys.tensor - self.queries.tensor
        return bool((more[1:] == more[-1]).all())

    def __repr__(self) -> str:
        causal = ", causal=True" if self.right == 0 else ""
        window = (self.left, None if causal else self.right)
        bounds = "" if window == (None, None) else f", window={window}"
        align = ", align='top-left'" if self.top_left else ""
        return f"packed_sequences({self.queries}, {self.keys}{causal}{bounds}{align})"


@kept(8)
def _intervals(packed: PackedSequences) -> tuple[Tensor, Tensor]:
    """The first key that each query sees, and the one after the last; not larger if it sees none."""
    starts, ends = packed.keys.tensor[:-1].long(), packed.keys.tensor[1:].long()
    sequence = torch.repeat_interleave(packed.queries.tensor.diff())
    # The last query of a sequence stands at its last key; aligned top-left, its first one at its first key.
    shift = starts - packed.queries.tensor[:-1] if packed.top_left else ends - packed.queries.tensor[1:]
    diagonal = torch.arange(len(sequence), device=starts.device) + shift[sequence]
    start, stop = starts[sequence], ends[sequence]
    longest = max(len(sequence), int(packed.keys.tensor[-1]))
    left, right = window_that_hides((packed.left, packed.right), longest + 1, longest + 1)
    if left is not None:
        start = torch.maximum(start, diagonal - left)
    if right is not None:
        stop = torch.minimum(stop, diagonal + right + 1)
    return start, stop


@kept(8)
def _interval_ranges(packed: PackedSequences, unit: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """The least and the largest start of each block of queries; and the same of stops."""
    return tuple(_ranges(t[None], unit) for t in _intervals(packed))


@dataclass(frozen=True, repr=False)
class GlobalTokens(Mask):
    """Pairs of which the query or the key is a global token. `values` are positions (n,), or flags (N,) or (B,
    N)."""

    values: Values

    def sees(self, at: Positions) -> Tensor:
        flags = self._flags(at.shape, at.key.device)
        batch = pick(flags.shape[0], at.batch)
        return flags[batch, at.key] | self._of_queries(flags, at.shape)[batch, at.query]

    def states(self, slab: Slab) -> Tensor:
        keys, queries = _flag_ranges(self, slab.shape, slab.unit)
        low, high = _of_blocks(keys, slab.batch, slab.columns)
        own_low, own_high = _of_blocks(queries, slab.batch, slab.rows)
        return torch.maximum(low + high, own_low + own_high)

    def words(self, slab: Slab) -> Tensor:
        keys, queries = _flag_words(self, slab.shape)
        words = keys[pick(len(keys), slab.batch)][slab.columns][:, None]
        return torch.where(queries[pick(len(queries), slab.batch)][slab.rows], -1, words)

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return self._are_flags and self.values.tensor.dim() == 2 and self.values.tensor.shape[0] != 1, False

    def check(self, shape: Shape) -> None:
        tensor = self.values.tensor
        if self._are_flags:
            _check_batch("global_tokens", tensor.shape[0] if tensor.dim() == 2 else 1, shape)
            if tensor.shape[-1] != shape.keys:
                raise ValueError(
                    f"global_tokens has {tensor.shape[-1]} flags, expected {shape.keys}, one for each key"
                )
        elif tensor.numel() and int(tensor.max()) >= shape.keys:
            raise ValueError(f"global_tokens has position {int(tensor.max())}, expected below {shape.keys} keys")

    @property
    def _are_flags(self) -> bool:
        return self.values.tensor.dtype == torch.bool

    def _flags(self, shape: Shape, device: torch.device) -> Tensor:
        """Whether each key is a global token, (1 or B, Lk)."""
        tensor = self.values.on(device)
        if self._are_flags:
            return _rows(tensor)
        return torch.zeros(1, shape.keys, dtype=torch.bool, device=device).index_fill_(1, tensor.long(), True)

    def _of_queries(self, flags: Tensor, shape: Shape) -> Tensor:
        """Whether the token of each query is a global one; queries before the first key are none."""
        if shape.offset < 0:
            return F.pad(flags, (-shape.offset, 0))
        return flags[:, shape.offset :]

    def __repr__(self) -> str:
        return f"global_tokens({self.values})"


@kept(8)
def _flag_ranges(tokens: GlobalTokens, shape: Shape, unit: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """The least and the largest flag of each block of keys; and of queries."""
    flags = tokens._flags(shape, shape.device).to(torch.int8)
    return _ranges(flags, unit), _ranges(tokens._of_queries(flags, shape), unit)


@kept(8)
def _flag_words(tokens: GlobalTokens, shape: Shape) -> tuple[Tensor, Tensor]:
    """The flags of each granule of keys as a word, (1 or B, C); and those of queries, (1 or B, R, 64)."""
    flags = tokens._flags(shape, shape.device)
    keys, queries = (
        F.pad(t, (0, -t.shape[1] % GRANULE)).unflatten(1, (-1, GRANULE))
        for t in (flags, tokens._of_queries(flags, shape))
    )
    return pack(keys), queries


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
        return state(some=multiples > 0, all=multiples == most - least + 1)

    def of_distance(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"dilated({self.step})"


@dataclass(frozen=True, repr=False)
class Dense(Mask):
    """A bool tensor (Lq, Lk), (H, Lq, Lk) or (B, H, Lq, Lk), B and H possibly 1."""

    seen: Values

    def sees(self, at: Positions) -> Tensor:
        seen = four_dimensional(self.seen.tensor)
        where = (pick(seen.shape[0], at.batch), pick(seen.shape[1], at.head), at.query, at.key)
        return seen[tuple(t.to(seen.device) if isinstance(t, Tensor) else t for t in where)].to(at.key.device)

    def states(self, slab: Slab) -> Tensor:
        shape = four_dimensional(self.seen.tensor).shape
        batch, head = pick(shape[0], slab.batch), pick(shape[1], slab.head)
        return _dense_states(self, batch, head, slab.unit).to(slab.shape.device)[slab.rows, slab.columns]

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return varies_by_shape(self.seen)

    def check(self, shape: Shape) -> None:
        check_grid("from_dense", self.seen, shape[:4])

    def __repr__(self) -> str:
        return f"from_dense(<{' x '.join(map(str, self.seen.tensor.shape))}>)"


@kept(8)
def _dense_states(dense: Dense, batch: int, head: int, unit: int) -> Tensor:
    """The states of all blocks of one batch element and head."""
    seen = four_dimensional(dense.seen.tensor)[batch, head].view(torch.uint8)
    low, high = (pooled.mT for pooled in _ranges(seen, unit))  # along the keys, then the queries
    return state(some=_ranges(high, unit)[1].mT > 0, all=_ranges(low, unit)[0].mT > 0)


@dataclass(frozen=True, repr=False)
class Function(Mask):
    """The mask that a function defines."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def sees(self, at: Positions) -> Tensor:
        whole = torch.broadcast_shapes(*(t.shape for t in at[1:]))
        if 0 in whole:
            return torch.zeros(whole, dtype=torch.bool, device=at.key.device)
        try:
            seen = self._of_each(at[1:], whole)
        except _WrongResult:
            raise
        except Exception as problem:
            seen = self._of_all(at[1:], whole, problem)
        if not lasts(seen):
            raise TypeError(f"{self!r} must return a plain tensor, got a {type(seen).__name__} of another mode")
        return seen

    def _of_each(self, pairs: Sequence[Tensor], whole: torch.Size) -> Tensor:
        """Call the function for each pair by torch.vmap, as flex_attention calls its mask_mods."""
        function, long = self._checked, [d for d, size in enumerate(whole) if size > 1]
        for d in reversed(long):
            function = torch.vmap(function, in_dims=tuple(0 if t.shape[d] > 1 else None for t in pairs))
        seen = function(*(t.reshape([size for size in t.shape if size > 1]) for t in pairs))
        if seen.shape != tuple(whole[d] for d in long):
            raise _WrongResult(
                f"{self!r} must return one bool for a pair, got shape {tuple(seen.shape[len(long) :])}"
            )
        return seen.reshape(whole)

    def _of_all(self, pairs: Sequence[Tensor], whole: torch.Size, problem: Exception) -> Tensor:
        """Call the function once for all pairs, because torch.vmap failed with `problem`. Raise instead if Python
        decided by a tensor's value: one decision for all pairs would be wrong for some of them."""
        failure = ValueError(f"{self!r} {_failure(problem)}")
        if any(words in str(problem) for words in _DECISIONS):
            raise failure from problem
        try:
            seen = self._checked(*pairs)
            return seen.expand(whole)
        except Exception:
            raise failure from problem

    def _checked(self, *pair: Tensor) -> Tensor:
        """Call the function, and raise unless it returns a bool tensor."""
        seen = self.function(*pair)
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            got = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
            raise _WrongResult(f"{self!r} must return a bool tensor, got {got}")
        return seen

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        """It does if its answer depends on the batch element, or on the head."""
        if 0 in shape[:4]:
            return False, False
        return self._depends_on(0, shape.batch, shape), self._depends_on(1, shape.heads, shape)

    def _depends_on(self, which: int, size: int, shape: Shape) -> bool:
        zero, depends = torch.zeros((), dtype=torch.int64, device=shape.device), True

        def asked(index: Tensor) -> Tensor:
            nonlocal depends
            seen = self._checked(*(index if i == which else zero for i in range(4)))
            depends = torch._C._functorch.is_batchedtensor(seen)
            return seen

        # If vmap fails, assume that the function depends on the index. `sees` raises what is wrong with it.
        with suppress(Exception):
            torch.vmap(asked)(torch.arange(size, device=shape.device))
        return depends and size > 1

    def lowers_on(self, device: torch.device) -> torch.device:
        # Tensors on the meta device have no values.
        return torch.device("cpu") if device.type == "meta" else device

    def __repr__(self) -> str:
        return f"from_function({getattr(self.function, '__qualname__', repr(self.function))})"


# Parts of torch's errors when Python decides by a tensor's value.
_DECISIONS = ("control flow", ".item()", "Boolean value of Tensor")


class _WrongResult(TypeError):
    """A mask function returned something else than a bool tensor."""


def _failure(problem: Exception) -> str:
    """What went wrong in a user's function, and what to do."""
    if any(words in str(problem) for words in _DECISIONS):
        return (
            "uses Python's and, or, not, if, numbers or a chain of comparisons on tensors: write & | ~, "
            "torch.where, and (a <= b) & (b <= c)"
        )
    return f"failed: {type(problem).__name__}: {problem}. It is called with (batch, head, query, key)"


def state(*, some: Tensor, all: Tensor) -> Tensor:
    """FULL where all pairs are seen, PARTIAL where some may be, else EMPTY."""
    return some.to(torch.int8) + (some & all).to(torch.int8)


def pick(size: int, index: int | Tensor) -> int | Tensor:
    """The index into a dimension of this size; 0 if the size is 1 and serves all."""
    return 0 if size == 1 else index


def _rows(t: Tensor) -> Tensor:
    """(N,) as (1, N); (B, N) as it is."""
    return t if t.dim() == 2 else t[None]


def _of_batch(values: Tensor, batch: int | Tensor) -> Tensor:
    return values[pick(values.numel(), batch)]


def _of_blocks(ranges: tuple[Tensor, Tensor], batch: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum and the maximum of these blocks, of (1 or B, all blocks)."""
    low, high = (t[pick(t.shape[0], batch)].to(blocks.device)[blocks] for t in ranges)
    return low, high


def _ranges(values: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """The minimum and the maximum of each block of `unit` elements along the last dimension."""
    missing = -values.shape[-1] % unit
    if missing:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], -1)
    values = values.unflatten(-1, (-1, unit))
    return values.amin(-1), values.amax(-1)


def four_dimensional(t: Tensor) -> Tensor:
    return t.view([1] * (4 - t.dim()) + list(t.shape)) if t.dim() < 4 else t


def varies_by_shape(values: Values) -> tuple[bool, bool]:
    shape = four_dimensional(values.tensor).shape
    return shape[0] != 1, shape[1] != 1


def _check_batch(name: str, rows: int, shape: Shape) -> None:
    if rows not in (1, shape.batch):
        raise ValueError(f"{name} is for a batch of {rows}, expected {shape.batch}")


def check_grid(name: str, values: Values, expected: tuple[int, ...]) -> None:
    got = tuple(four_dimensional(values.tensor).shape)
    fits = got[0] in (1, expected[0]) and got[1] in (1, expected[1]) and got[2:] == tuple(expected[2:])
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(values.tensor.shape)}, expected {tuple(expected)} or 1 in front"
        )
