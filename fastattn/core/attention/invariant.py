"""Attention in plain PyTorch whose bits depend on each row alone: sequence by sequence, in tiles of one size.

The queries and keys of a sequence are padded to whole tiles, cut where the sequence's own positions are multiples
of the tile's sides. So every product and every sum has one shape, a row has one place in it, and tiles follow one
another in one order, whatever else is in the batch, and whether all queries of the sequence are there or a few.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention import tiles
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.tiles import GRADIENT_INPUTS, Learned, Scores, Tile
from fastattn.core.autocast import without_autocast
from fastattn.core.layout import zero_heads
from fastattn.ground.checks import lse_dtype
from fastattn.ground.modes import outside_modes

# A single query is computed as a whole tile of them, and a single key as a tile of keys.
QUERY_TILE, KEY_TILE = 16, 256
# Where a CPU gives a row the same bits in tiles of these sizes (see `_agree`), up to as many queries take them.
TILES = {4: 4, 16: 48, 128: 2**63}
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
        if self.kept is None:
            return self._whole_tile(t, tile)
        place = id(t), tile.columns.start
        if place not in self.kept:
            self.kept[place] = self._whole_tile(t, tile)
        return self.kept[place]

    def _whole_tile(self, t: Tensor, tile: Tile) -> Tensor:
        """A copy of a tile's keys or values, with zeros behind the last: laid out and aligned as every other."""
        part = tiles.part_of(t, "columns", tile).to(self.dtype)
        missing = tile.columns.stop - tile.columns.start - part.shape[2]
        return F.pad(part, (0, 0, 0, missing)) if missing else part.clone(memory_format=torch.contiguous_format)

    def rows(self) -> Iterator[slice]:
        for first in range(0, self.queries, self.query_tile):
            yield slice(first, first + self.query_tile)

    def tiles_of(self, rows: slice) -> Iterator[Tile]:
        start, stop = self._keys_seen_by(rows)
        begin = start // KEY_TILE * KEY_TILE if start < stop else stop
        spans = [slice(n, n + KEY_TILE) for n in range(begin, stop, KEY_TILE)] or [slice(0, 0)]
        return (Tile(self, rows, columns, columns is spans[0]) for columns in spans)

    def hidden(self, tile: Tile, device: torch.device) -> Iterator[Tensor]:
        yield from super().hidden(tile, device)
        keys = torch.arange(tile.columns.start, tile.columns.stop, device=device)
        if tile.columns.stop > self.longest:
            yield keys >= self.longest
        if self.bounds is not None:
            start, stop = self.bounds[:, None, :, tile.rows, None].repeat(1, 1, 1, self.group, 1).unbind(2)
            yield (keys < start) | (keys >= stop)


def _query_tile(q: Tensor, k: Tensor, v: Tensor, queries: int) -> int:
    """How many queries of a sequence to compute at a time."""
    if q.device.type != "cpu":
        return QUERY_TILE
    heads, key_heads, widths = q.shape[1], k.shape[1], (q.shape[3], v.shape[3])
    settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
    if not _agree(heads, key_heads, *widths, lse_dtype(q.dtype), *settings):
        return QUERY_TILE
    return next(tile for tile, most in TILES.items() if queries <= most)


@functools.lru_cache(maxsize=256)
def _agree(
    heads: int,
    key_heads: int,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    threads: int,
    precision: str,
) -> bool:
    """Whether products of this CPU, with so many threads and at this precision of torch's, give a row the same
    bits in tiles of every size: tried once with random numbers, since the order of their sums depends on sizes
    alone."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, 128, width), (key_heads, 2 * KEY_TILE, width), (key_heads, 2 * KEY_TILE, value_width)
    with outside_modes(), torch.no_grad(), without_autocast(torch.device("cpu")):
        q, k, v = (torch.randn(1, *size, generator=generator, dtype=dtype, device="cpu") for size in sizes)
        found = [forward(q, k, v, AttentionSpec(), ScoreTensors(), query_tile=tile)[0] for tile in TILES]
    return all(torch.equal(out, found[0]) for out in found)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    maxima: Tensor | None = None,
    query_tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, sequence by sequence. query_tile: how many queries at a time; None chooses."""
    work = lse_dtype(q.dtype)
    out = zero_heads((*q.shape[:3], v.shape[3]), q, q.dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=work)
    fixed, learned = tiles.learned(tensors)
    if learned.sinks is not None:
        lse.copy_(learned.sinks[..., None])
    for at in sequences_of(q, k, tensors) if q.numel() else ():
        tile = _query_tile(q, k, v, at.query_count) if query_tile is None else query_tile
        scores = FixedTiles(q, k, spec, fixed, at, tile)
        rows = scores.padded(q, "rows", work)
        keys, values = at.of(k, "columns"), at.of(v, "columns")
        if scores.queries > tile:
            scores.kept = {}
        largest = None if maxima is None else scores.padded(maxima, "rows", work).fill_(float("-inf"))
        found, found_lse = tiles.forward(scores, rows, keys, values, _learned(scores, learned, work), largest)
        here = slice(scores.front, scores.front + at.query_count)
        at.of(out, "rows").copy_(found[:, :, here])
        at.of(lse, "rows").copy_(found_lse[:, :, here])
        if maxima is not None and largest is not None:
            at.of(maxima, "rows").copy_(largest[:, :, here])
    return out, lse


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
