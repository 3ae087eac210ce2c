"""Attention in plain PyTorch whose bits depend on each row alone: sequence by sequence, in tiles of one size.

The queries and keys of a sequence are padded to whole tiles, cut where the sequence's own positions are multiples
of the tile's sides. So every product and every sum has one shape, a row has one place in it, and tiles follow one
another in one order, whatever else is in the batch, and whether all queries of the sequence are there or a few.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention import invariant_flash, tiles
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.tiles import GRADIENT_INPUTS, Learned, Scores, Tile
from fastattn.core.autocast import without_autocast
from fastattn.core.layout import zero_heads
from fastattn.core.rows import has_no_remainder
from fastattn.ground.checks import lse_dtype
from fastattn.ground.modes import outside_modes

# A single query is computed as a whole tile of them, and a single key as a tile of keys.
QUERY_TILE, KEY_TILE = 16, 256
# The fewest rows, queries times heads that share a key head, in which a CPU's products have the order of sums that
# they have with more.
FEWEST_ROWS = 4
# Where a CPU gives a row the same bits in tiles of all sizes (see `_agree`): few queries take the smallest, up to
# FEW_QUERIES take QUERY_TILE, and more take up to LARGE_TILE.
FEW_QUERIES, LARGE_TILE = 48, 128
# For few queries the scores of so many tiles of keys are computed at a time, as long as there are so many. Keys
# that are converted first take no more than the second, so that a cache holds them.
SPANS = (16, 4, 1)
# A tensor's rows are read where they lie if they begin on multiples of so many bytes.
ALIGNED = 64
# The backward has no single queries.
BACKWARD_QUERY_TILE = 128


class Sequence(NamedTuple):
    """Some queries and keys of a batch entry. Query i stands on the diagonal at key i + shift. Of the queries, all
    but `missing` ones at the beginning are there: the last one belongs to the last key."""

    entry: int
    queries: slice
    keys: slice
    shift: int
    missing: int

    @property
    def key_count(self) -> int:
        return self.keys.stop - self.keys.start

    @property
    def query_count(self) -> int:
        return self.queries.stop - self.queries.start

    def of(self, t: Tensor, falls: str) -> Tensor:
        """A view of what of a tensor falls on the sequence; dimensions of a bias of size 1 stay."""
        t = t[self.entry : self.entry + 1] if t.shape[0] > 1 else t
        if falls == "scores":
            t = t[:, :, self.queries] if t.shape[2] > 1 else t
            return t[..., self.keys] if t.shape[3] > 1 else t
        return t if falls == "whole" else t[:, :, self.queries if falls == "rows" else self.keys]


def sequences_of(q: Tensor, k: Tensor, tensors: ScoreTensors) -> Iterator[Sequence]:
    """The sequences of a batch; without a packed mask each batch entry is one. Reads values: on a GPU it waits."""
    (batch, _, queries, _), keys = q.shape, k.shape[2]
    lengths = [keys] * batch if tensors.key_lengths is None else tensors.key_lengths.tolist()
    found = [[(0, queries, 0, keys)]] * batch if tensors.sequences is None else tensors.sequences.tolist()
    for entry, (length, spans) in enumerate(zip(lengths, found, strict=True)):
        for first, count, start, size in spans:
            stop = max(start, min(start + size, length))
            if count:
                shift = first + keys - queries - start
                yield Sequence(entry, slice(first, first + count), slice(start, stop), shift, size - count)


class FixedTiles(Scores):
    """The scores of one sequence. Its queries have `front` rows of zeros before them, so that they lie in tiles as
    their positions on the diagonal say."""

    def __init__(
        self, q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors, at: Sequence, query_tile: int
    ) -> None:
        self.front = at.missing % query_tile
        self.back = -(self.front + at.query_count) % query_tile
        self.more_keys = -at.key_count % KEY_TILE
        self.at, self.query_tile = at, query_tile
        self.in_place = False  # whether keys that lie as in a copy are read where they lie
        self.kept: dict[tuple[int, int], Tensor] | None = None
        fixed = {name: None if t is None else at.of(t, "whole") for name, t in tensors._asdict().items()}
        fixed |= {"key_lengths": None, "sequences": None, "intervals": None}
        if tensors.bias is not None:  # a mask
            fixed["bias"] = self.padded(tensors.bias, "scores", tensors.bias.dtype)
        super().__init__(q[:1], k[:1], spec, ScoreTensors(**fixed))
        self.queries = self.front + at.query_count + self.back
        self.keys = at.key_count + self.more_keys
        self.shift = at.shift - self.front
        self.shortest = self.longest = at.key_count
        if tensors.intervals is not None:
            own = at.of(tensors.intervals, "whole")[:, :, at.queries] - at.keys.start
            self.bounds = F.pad(own, (self.front, self.back)).clamp(0, at.key_count)

    def padded(self, t: Tensor, falls: str, dtype: torch.dtype, beside: float = 0.0) -> Tensor:
        """What of a tensor falls on the sequence, in whole tiles with zeros, or another value, beside it."""
        t = self.at.of(t, falls)
        if falls == "whole":
            return t.to(dtype)
        rows, columns = (self.front, self.back), (0, self.more_keys)
        if falls == "scores":
            sides = *(columns if t.shape[3] > 1 else (0, 0)), *(rows if t.shape[2] > 1 else (0, 0))
        else:
            sides = *((0, 0) if t.dim() == 4 else ()), *(rows if falls == "rows" else columns)
        return F.pad(t.to(dtype), sides, value=beside)

    def part_of(self, t: Tensor, falls: str, tile: Tile) -> Tensor:
        if falls != "columns":
            return tiles.part_of(t, falls, tile).contiguous()
        if self.in_place and tile.columns.stop <= t.shape[2] and self._is_aligned(t):
            return tiles.part_of(t, "columns", tile)
        if self.kept is None:
            return self._whole_tile(t, tile)
        place = id(t), tile.columns.start
        if place not in self.kept:
            self.kept[place] = self._whole_tile(t, tile)
        return self.kept[place]

    def _is_aligned(self, t: Tensor) -> bool:
        """Whether keys lie as in a copy, but for the distance between them."""
        size = t.element_size()
        distances = (stride * size % ALIGNED for stride in t.stride()[1:3])
        return t.dtype == self.dtype and t.stride(3) == 1 and t.data_ptr() % ALIGNED == 0 and not any(distances)

    def _whole_tile(self, t: Tensor, tile: Tile) -> Tensor:
        """A copy of a tile's keys or values, with zeros behind the last: laid out and aligned as every other."""
        part = tiles.part_of(t, "columns", tile).to(self.dtype)
        missing = tile.columns.stop - tile.columns.start - part.shape[2]
        return F.pad(part, (0, 0, 0, missing)) if missing else part.clone(memory_format=torch.contiguous_format)

    def rows(self) -> Iterator[slice]:
        for first in range(0, self.queries, self.query_tile):
            yield slice(first, first + self.query_tile)

    def tiles_of(self, rows: slice) -> Iterator[Tile]:
        begin, stop = self._tiled_keys(rows)
        spans = [slice(n, n + KEY_TILE) for n in range(begin, stop, KEY_TILE)] or [slice(0, 0)]
        return (Tile(self, rows, columns, columns is spans[0]) for columns in spans)

    def spans_of(self, rows: slice, sizes: tuple[int, ...]) -> Iterator[Tile]:
        """The tiles of these rows, so many neighbouring ones at a time as long as there are as many without a key
        that is missing; none if the rows see no key."""
        begin, stop = self._tiled_keys(rows)
        while begin < stop:
            there = (min(stop, self.longest) - begin) // KEY_TILE
            end = begin + next((n for n in sizes if n <= there), 1) * KEY_TILE
            yield Tile(self, rows, slice(begin, end), False)
            begin = end

    def _sees_all(self, tile: Tile) -> bool:
        """Whether all rows of a tile see all of its keys, for calls with nothing but a window beside lengths."""
        first, last = tile.rows.start + self.shift, tile.rows.stop - 1 + self.shift
        left, right = self.spec.left, self.spec.right
        return (
            self.bounds is None
            and self.tensors.bias is None
            and tile.columns.stop <= self.longest
            and (left is None or tile.columns.start >= last - left)
            and (right is None or tile.columns.stop - 1 <= first + right)
        )

    def _tiled_keys(self, rows: slice) -> tuple[int, int]:
        """From the first key of the first tile that any of these rows sees to the one after the last seen."""
        start, stop = self._keys_seen_by(rows)
        return (start // KEY_TILE * KEY_TILE if start < stop else stop), stop

    def hidden(self, tile: Tile, device: torch.device) -> Iterator[Tensor]:
        if self._sees_all(tile):
            return
        yield from super().hidden(tile, device)
        keys = torch.arange(tile.columns.start, tile.columns.stop, device=device)
        if tile.columns.stop > self.longest:
            yield keys >= self.longest
        if self.bounds is not None:
            start, stop = self.bounds[:, None, :, tile.rows, None].repeat(1, 1, 1, self.group, 1).unbind(2)
            yield (keys < start) | (keys >= stop)


class Sizes(NamedTuple):
    """How many queries and tiles of keys are computed at a time, and whether keys may be read where they lie."""

    queries: int
    tiles: tuple[int, ...] = (1,)
    in_place: bool = False


# What is sure to have one order of sums, since every product is of one size and layout.
ONE_SIZE = Sizes(QUERY_TILE)


def _sizes(q: Tensor, k: Tensor, v: Tensor, queries: int) -> Sizes:
    """Those for so many queries of a sequence."""
    if q.device.type != "cpu":
        return ONE_SIZE
    threads = torch.get_num_threads(), torch.get_float32_matmul_precision()
    possible = _possible_sizes(q.shape[1], k.shape[1], threads[0])
    if not _agree(possible, q.shape[1], k.shape[1], q.shape[3], v.shape[3], lse_dtype(q.dtype), *threads):
        return ONE_SIZE
    few, some, many = possible
    if q.dtype != lse_dtype(q.dtype):
        few = few._replace(tiles=few.tiles[-2:])
    return few if queries <= few.queries else some if queries <= FEW_QUERIES else many


@functools.lru_cache(maxsize=256)
def _possible_sizes(heads: int, key_heads: int, threads: int) -> tuple[Sizes, Sizes, Sizes]:
    """For few, some and many queries. None leaves a thread a remainder of its vectors (see `rows`)."""
    few = -(-FEWEST_ROWS * key_heads // heads)
    spans = tuple(n for n in SPANS if n == 1 or has_no_remainder(heads * few, n * KEY_TILE, threads))
    large = (n for n in range(LARGE_TILE, 0, -8) if has_no_remainder(heads * n, KEY_TILE, threads))
    one = (1,)
    return Sizes(few, spans, True), Sizes(QUERY_TILE, one, True), Sizes(next(large, QUERY_TILE), one, True)


@functools.lru_cache(maxsize=256)
def _agree(
    possible: tuple[Sizes, ...],
    heads: int,
    key_heads: int,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    threads: int,
    precision: str,
) -> bool:
    """Whether products of this CPU, with so many threads and at this precision of torch's, give a row the same
    bits in tiles of every size, from keys that were copied or lie with those of other heads between them: tried
    once with random numbers, since the order of their sums depends on sizes alone."""
    generator = torch.Generator().manual_seed(0)
    few, some, many = possible
    with outside_modes(), torch.no_grad(), without_autocast(torch.device("cpu")):
        for tried, queries, tiles in ((few, few.queries, sum(few.tiles)), (some, 128, 2), (many, 128, 2)):
            sizes = (queries, heads, width), *((tiles * KEY_TILE, key_heads, w) for w in (width, value_width))
            q, k, v = (torch.randn(1, *size, generator=generator, dtype=dtype).transpose(1, 2) for size in sizes)
            asked = AttentionSpec(), ScoreTensors()
            expected = forward(q, k, v, *asked, sizes=ONE_SIZE)[0]
            for keys, values in ((k, v), (k.contiguous(), v.contiguous())):
                if not torch.equal(forward(q, keys, values, *asked, sizes=tried)[0], expected):
                    return False
    return True


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    maxima: Tensor | None = None,
    sizes: Sizes | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, sequence by sequence, of rows that see the first key of theirs by PyTorch's flash attention where
    that serves (see fastattn.core.attention.invariant_flash). sizes: all in tiles, so much at a time."""
    work = lse_dtype(q.dtype)
    out = zero_heads((*q.shape[:3], v.shape[3]), q, q.dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=work)
    fixed, learned = tiles.learned(tensors)
    if learned.sinks is not None:
        lse.copy_(learned.sinks[..., None])
    sequences: Iterable[Sequence] = sequences_of(q, k, tensors) if q.numel() else ()
    if sizes is None and q.numel() and invariant_flash.serves(q, k, v, spec, tensors):
        if maxima is not None:  # which come from tiles
            forward(q, k, v, spec, tensors, maxima, _sizes(q, k, v, q.shape[2]))
            maxima = None
        sequences = itertools.chain.from_iterable(
            _by_flash(q, k, v, spec, tensors, at, out, lse) for at in sequences
        )
    for at in sequences:
        size = _sizes(q, k, v, at.query_count) if sizes is None else sizes
        scores = FixedTiles(q, k, spec, fixed, at, size.queries)
        scores.in_place = size.in_place
        rows = scores.padded(q, "rows", work)
        keys, values = at.of(k, "columns"), at.of(v, "columns")
        if scores.queries > size.queries:
            scores.kept = {}
        largest = None if maxima is None else scores.padded(maxima, "rows", work).fill_(float("-inf"))
        found, found_lse = _of_sequence(
            scores, rows, keys, values, _learned(scores, learned, work), largest, size.tiles
        )
        here = slice(scores.front, scores.front + at.query_count)
        at.of(out, "rows").copy_(found[:, :, here])
        at.of(lse, "rows").copy_(found_lse[:, :, here])
        if maxima is not None and largest is not None:
            at.of(maxima, "rows").copy_(largest[:, :, here])
    return out, lse


def _by_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    at: Sequence,
    out: Tensor,
    lse: Tensor,
) -> Iterator[Sequence]:
    """Write the results of the queries of a sequence that see its first key; the others are left to tiles."""
    if not at.query_count:
        return
    bounds = _bounds(at, spec, tensors)
    runs = invariant_flash.runs(at.query_count, at.key_count, at.shift, spec)
    rows, keys, values = at.of(q, "rows"), at.of(k, "columns"), at.of(v, "columns")
    found, found_lse = at.of(out, "rows"), at.of(lse, "rows")
    ready = False
    for here, before in runs if bounds is None else invariant_flash.runs_of(bounds):
        if before is None:
            first = at.queries.start
            yield at._replace(
                queries=slice(first + here.start, first + here.stop),
                shift=at.shift + here.start,
                missing=at.missing + here.start,
            )
        elif before >= 0:
            if not ready:
                keys, values, ready = *map(invariant_flash.aligned, (keys, values)), True
            stops = _stops(here, at, spec) if bounds is None else bounds[1, here]
            part = invariant_flash.of_run(rows[:, :, here], keys, values, before, stops, spec.scale)
            found[:, :, here], found_lse[:, :, here] = part


def _bounds(at: Sequence, spec: AttentionSpec, tensors: ScoreTensors) -> Tensor | None:
    """Which keys of a sequence each of its queries sees, from the first to before the last (2, queries), where
    intervals or a bool bias say so; the window counts, too. Where a bias hides keys between others, it says no
    more than that the first key is not seen."""
    if tensors.intervals is None and tensors.bias is None:
        return None
    start, stop = torch.zeros(2, at.query_count, dtype=torch.int64).unbind()
    stop = stop + at.key_count
    if tensors.intervals is not None:
        own = at.of(tensors.intervals, "whole")[0, :, at.queries] - at.keys.start
        start, stop = own.clamp(0, at.key_count)
    diagonal = torch.arange(at.query_count) + at.shift
    if spec.left is not None:
        start = torch.maximum(start, diagonal - spec.left)
    if spec.right is not None:
        stop = torch.minimum(stop, diagonal + (spec.right + 1))
    if tensors.bias is not None and at.key_count:
        hidden, seen_again = _first_hidden(at.of(tensors.bias, "scores")[0].expand(-1, -1, at.key_count))
        stops = torch.minimum(stop, hidden)
        between = (stop > seen_again).any(0) | (stops.amin(0) != stops.amax(0))
        start, stop = start.masked_fill(between, 1), stops[0].masked_fill(between, at.key_count + 2)
    return torch.stack((start, stop))


def _first_hidden(bias: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of a bool bias (..., keys) the first key that it hides, and the first behind that which it does
    not hide; the number of keys if there is none."""
    keys = torch.arange(bias.shape[-1])
    hidden = torch.where(bias.all(-1), bias.shape[-1], (~bias).byte().argmax(-1))
    again = bias & (keys > hidden[..., None])
    return hidden, torch.where(again.any(-1), again.byte().argmax(-1), bias.shape[-1])


def _stops(rows: slice, at: Sequence, spec: AttentionSpec) -> Tensor | int:
    """Before which key of a sequence these of its queries see all; one number if it is the same for all."""
    if spec.right is None:
        return at.key_count
    first = rows.start + at.shift + spec.right + 1
    if rows.stop - rows.start == 1 or first >= at.key_count:
        return min(first, at.key_count)
    return torch.arange(first, first + rows.stop - rows.start).clamp_(max=at.key_count)


def _of_sequence(
    scores: FixedTiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Learned,
    maxima: Tensor | None,
    spans: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """out and lse by the online softmax over tiles of keys in ascending order, some of them at a time: then each
    tile still has the maximum, the sums and the product of its own. Scores are changed in place, since on a CPU
    new memory takes longer than what is computed in it. As `fastattn.core.attention.tiles.forward`, whose orders
    of sums are not fixed."""
    key_heads, heads = scores.key_heads, scores.heads
    out, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3])
    memory: dict[tuple[int, ...], Tensor] = {}
    for rows in scores.rows():
        q_rows = scores.scaled(tiles.grouped(q[:, :, rows], key_heads), given.head_scale)
        row_max, row_sum = tiles.beginning(scores, given.sinks, q_rows)
        total = q.new_zeros((key_heads, q_rows.shape[2], v.shape[3]))
        for span in scores.spans_of(rows, spans):
            values = _scores_of(scores, span, q_rows, k, given, memory)
            v_span = scores.part_of(v, "columns", span)[0]
            if maxima is not None:
                seen = tiles.ungrouped(values.amax(-1, keepdim=True), heads)[..., 0]
                torch.maximum(maxima[:, :, rows], seen, out=maxima[:, :, rows])
            row_max, steps = _weights_of_tiles(values, row_max, v_span)
            for rescale, weights_sum, weights, v_tile in steps:
                row_sum.mul_(rescale).add_(weights_sum)
                total.mul_(rescale[0]).baddbmm_(weights, v_tile)
        found = total[None].div_(row_sum.masked_fill(row_sum == 0, 1.0))
        out[:, :, rows] = tiles.ungrouped(found, heads)
        lse[:, :, rows] = tiles.ungrouped(row_max + torch.log(row_sum), heads)[..., 0]
    return out, lse


def _weights_of_tiles(values: Tensor, row_max: Tensor, v: Tensor) -> tuple[Tensor, Iterable[tuple[Tensor, ...]]]:
    """Scores become weights, in place. The new maxima of the rows, and for each tile: by what the sums so far are
    multiplied, the sums of its weights, its weights and its values."""
    lowest = torch.finfo(values.dtype).min  # in place of -inf, since -inf minus -inf is NaN
    if values.shape[-1] == KEY_TILE:
        largest = torch.maximum(row_max, values.amax(-1, keepdim=True))
        pivots = largest.clamp(min=lowest)
        tiles.exp_(values.sub_(pivots))
        return largest, [(torch.exp(row_max - pivots), values.sum(-1, keepdim=True), values[0], v)]
    by_tile = values.unflatten(-1, (-1, KEY_TILE))
    running = torch.cat((row_max, by_tile.amax(-1)), -1).cummax(-1).values
    pivots = running[..., 1:].clamp(min=lowest)
    tiles.exp_(by_tile.sub_(pivots[..., None]))
    rescale = torch.exp(running[..., :-1] - pivots)
    by_row = (t.movedim(-1, 0)[..., None].unbind(0) for t in (rescale, by_tile.sum(-1)))
    return running[..., -1:], zip(*by_row, values[0].split(KEY_TILE, -1), v.split(KEY_TILE, 1), strict=True)


def _scores_of(
    scores: FixedTiles, span: Tile, q: Tensor, k: Tensor, given: Learned, memory: dict[tuple[int, ...], Tensor]
) -> Tensor:
    """The scores of a span; in this memory, by its shape, if nothing is done to them but to scale and to hide."""
    k = scores.part_of(k, "columns", span)
    if not scores.is_plain or given.bias is not None or given.relative_bias is not None:
        bias = None if given.bias is None else tiles.part_of(given.bias, "scores", span)
        return scores.of(span, q, k, bias, given.relative_bias)[0]
    shape = (*q.shape[:3], k.shape[2])
    values = memory.get(shape)
    if values is None:
        values = memory[shape] = q.new_empty(shape)
    torch.baddbmm(values[0], q[0], k[0].mT, beta=0, alpha=scores.spec.scale, out=values[0])
    for hidden in scores.hidden(span, q.device):
        values.masked_fill_(hidden, float("-inf"))
    return values


def _learned(scores: FixedTiles, learned: Learned, work: torch.dtype) -> Learned:
    """What of the tensors with a gradient falls on a sequence, in whole tiles."""
    falls = {"bias": "scores"}
    return Learned(
        *(
            None if t is None else scores.padded(t, falls.get(name, "whole"), work)
            for name, t in learned._asdict().items()
        )
    )


def backward(
    dout: Tensor, dlse: Tensor | None, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted
) -> Gradients:
    """As `fastattn.core.attention.tiles.gradients`, sequence by sequence."""
    q, k = saved.q, saved.k
    work = lse_dtype(q.dtype)
    fixed, learned = tiles.learned(tensors)
    function = tiles.gradients(spec, wanted, learned.sinks is not None, learned.head_scale is not None)
    inputs = (dout, *saved, dlse, *learned)
    likes = {i: t for i in function.outputs if (t := inputs[i]) is not None}
    sums = {i: tiles.zeros_of(t, work) for i, t in likes.items()}
    for at in sequences_of(q, k, tensors) if q.numel() else ():
        scores = FixedTiles(q, k, spec, fixed, at, BACKWARD_QUERY_TILE)
        # Rows that are padded see nothing.
        parts = [
            None if t is None else scores.padded(t, falls, work, float("-inf") if name == "lse" else 0.0)
            for name, t, falls in zip(GRADIENT_INPUTS, inputs, function.falls, strict=True)
        ]
        own = function.sums(scores, parts)
        for i, total in zip(likes, own, strict=True):
            _add(sums[i], total, function.falls[i], scores)
    found = iter(sums[i].to(t.dtype) for i, t in likes.items())
    dq, dk, dv = next(found), next(found), next(found)
    dbias = next(found) if wanted.bias else None
    drelative_bias = next(found) if wanted.relative_bias else None
    dsinks = next(found) if learned.sinks is not None else None
    return Gradients(dq, dk, dv, dbias, drelative_bias, dsinks, next(found, None))


def _add(total: Tensor, part: Tensor, falls: str, scores: FixedTiles) -> None:
    """Add what a sequence gives to a gradient, without the rows and columns that were padded."""
    rows = slice(scores.front, scores.front + scores.at.query_count)
    columns = slice(0, scores.at.key_count)
    if falls == "rows":
        part = part[:, :, rows]
    elif falls == "columns":
        part = part[:, :, columns]
    elif falls == "scores":
        part = part[:, :, rows] if part.shape[2] > 1 else part
        part = part[..., columns] if part.shape[3] > 1 else part
    scores.at.of(total, falls).add_(part)
