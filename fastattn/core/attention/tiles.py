"""Attention tile by tile, in plain PyTorch: the scores of a tile, and sums over all of them.

What a tile gives to a gradient or to a tangent is a function of the rows and columns of the tensors that fall on
it, written here once; the whole is the sum over the tiles. So is, then, any derivative of the whole (see
fastattn.core.attention.derivatives), and none takes more memory than a tile of scores beside its results.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.core.attention import definition
from fastattn.core.attention.dropout import keep_mask
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors, Wanted
from fastattn.core.autocast import without_autocast
from fastattn.core.layout import zero_heads
from fastattn.ground.checks import lse_dtype
from fastattn.masks.lists import GRANULE, BlockLists, columns_seen, log_counts, of_heads, unpacked

# The ScoreTensors that have a gradient, a bias only if it is no mask; the last in Gradients and Tangents, too.
LEARNED = ("bias", "relative_bias", "sinks", "head_scale")
QUERY_TILE, KEY_TILE = 256, 512
LOG2E = math.log2(math.e)
# Smaller tiles leave out more of a mask of lists (BigBird of 4096 tokens, two heads, forward and backward on a
# CPU: 10 MiB and 0.8 s instead of 13 MiB and 0.9 s).
LISTED_QUERY_TILE, LISTED_KEY_TILE = 128, 256


@dataclass(frozen=True)
class Tile:
    """Some rows and columns of the scores; `first` is one tile of each row, for what is done once a row.
    `remainder` (B, Hq, rows) is what the rows' log-sum-exps lost by rounding, see `Scores.remainder`."""

    scores: Scores
    rows: slice
    columns: slice
    first: bool
    remainder: Tensor | None = None

    def weights(self, values: Tensor, lse: Tensor) -> Tensor:
        """exp(scores - lse), for scores and log-sum-exps (B, Hkv, group * rows, 1) of grouped rows."""
        # The difference of the two comes first, since it is small where both are huge.
        logs = values - lse
        if self.remainder is not None:
            logs = logs - grouped(self.remainder[..., None], self.scores.key_heads)
        return torch.exp(logs)

    def sink_weights(self, sinks: Tensor, lse: Tensor) -> Tensor:
        """The weights (B, Hq, rows) of sinks (B, Hq)."""
        logs = sinks[..., None] - lse
        return torch.exp(logs if self.remainder is None else logs - self.remainder)


class Scores:
    """The scores of a call, tile by tile; rows are queries grouped by key head (see `grouped`).

    Of the tensors it reads those without a gradient: key lengths, slopes, a bool bias, the dropout state. What has
    one comes with each tile.
    """

    def __init__(self, q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> None:
        self.spec, self.tensors, self.dtype = spec, tensors, lse_dtype(q.dtype)
        self.batch, self.queries, self.keys = q.shape[0], q.shape[2], k.shape[2]
        self.shift = self.keys - self.queries
        self.heads, self.key_heads, self.group = q.shape[1], k.shape[1], q.shape[1] // max(1, k.shape[1])
        self.exist = q.numel() > 0
        self.shortest, self.longest = key_counts(tensors.key_lengths, self.keys)
        # A tracer has nothing to read, and is shown every tile.
        intervals = tensors.intervals
        self.bounds = None if type(intervals) is not Tensor else intervals[:, :, : self.queries]
        self.lists = None if tensors.mask is None or spec.mask is None else unpacked(tensors.mask, spec.mask)

    def part(self, batch: slice, key_heads: slice) -> Scores:
        """The same scores of some batch elements and key heads alone; not for dropout, whose random numbers go by
        the head's number."""
        part = copy.copy(self)
        heads = slice(key_heads.start * self.group, key_heads.stop * self.group)

        def of(t: Tensor) -> Tensor:
            t = t[batch] if t.shape[0] > 1 else t
            return t[:, heads] if t.shape[1] > 1 else t

        names = ("alibi_slopes", *LEARNED)
        beside = {name: of(t) for name in names if (t := getattr(self.tensors, name)) is not None}
        lengths, intervals = (
            None if t is None else t[batch] for t in (self.tensors.key_lengths, self.tensors.intervals)
        )
        part.tensors = ScoreTensors(key_lengths=lengths, intervals=intervals, **beside)
        part.batch, part.heads = batch.stop - batch.start, heads.stop - heads.start
        part.key_heads = key_heads.stop - key_heads.start
        part.shortest, part.longest = key_counts(lengths, self.keys)
        part.bounds = None if self.bounds is None else self.bounds[batch]
        if self.lists is not None:
            every = torch.arange(len(self.lists.full_offsets), device=self.lists.pattern.device)
            used, pattern = of(of_heads(self.lists, every, self.batch, self.heads)).unique(return_inverse=True)
            full, partial = (t[used] for t in (self.lists.full_offsets, self.lists.partial_offsets))
            part.lists = self.lists._replace(full_offsets=full, partial_offsets=partial, pattern=pattern.int())
        return part

    def rows(self) -> Iterator[slice]:
        return _spans(0, self.queries, QUERY_TILE if self.lists is None else LISTED_QUERY_TILE)

    def tiles_of(self, rows: slice) -> Iterator[Tile]:
        """The tiles that any of these rows sees; one without columns if there is none."""
        start, stop = self._keys_seen_by(rows)
        spans = list(_spans(start, stop, KEY_TILE if self.lists is None else LISTED_KEY_TILE))
        if self.lists is not None:
            seen = {column * GRANULE // LISTED_KEY_TILE for column in columns_seen(self.lists, granules(rows))}
            spans = [span for span in spans if span.start // LISTED_KEY_TILE in seen]
        spans = spans or [slice(start, start)]
        return (Tile(self, rows, columns, columns is spans[0]) for columns in spans)

    def _keys_seen_by(self, rows: slice) -> tuple[int, int]:
        """From the first key that any of these rows may see to the one after the last."""
        if self.bounds is not None:
            begin, end = self.bounds[:, :, rows].unbind(1)
            first, last = torch.stack((begin.amin(), end.amax())).tolist() if begin.numel() else (0, 0)
            return first, max(first, min(last, self.longest))
        left, right = self.spec.left, self.spec.right
        start = 0 if left is None else max(0, rows.start + self.shift - left)
        stop = self.longest if right is None else min(self.longest, rows.stop + self.shift + right)
        return start, max(start, stop)

    def remainder(
        self,
        rows: slice,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        relative_bias: Tensor | None,
        sinks: Tensor | None,
        head_scale: Tensor | None = None,
    ) -> Tensor | None:
        """What the log-sum-exps of these rows lost by rounding (B, Hq, rows), 0 for all but huge ones; None if
        there is none of those. Where a bias puts all keys of a row at -1e9, say, float32 rounds the log-sum-exp to
        the maximum, and the weights exp(score - lse) of n equal scores add up to n."""
        if (bias is None and relative_bias is None) or not self.heads:
            return None
        rounded = definition.is_rounded(lse[:, :, rows])
        # A tracer has nothing to read.
        if type(lse) is Tensor and not bool(rounded.any()):
            return None
        lse = lse[:, :, rows].masked_fill(~rounded, float("inf"))
        sums = torch.zeros_like(lse) if sinks is None else torch.exp(sinks[..., None] - lse)
        q_rows = self.scaled(grouped(q[:, :, rows].to(self.dtype), self.key_heads), head_scale)
        for tile in self.tiles_of(rows):
            part = None if bias is None else part_of(bias, "scores", tile).to(self.dtype)
            k_tile = self.part_of(k, "columns", tile).to(self.dtype)
            values, _ = self.of(tile, q_rows, k_tile, part, relative_bias)
            weights = tile.weights(values, grouped(lse[..., None], self.key_heads))
            sums = sums + ungrouped(weights.sum(-1, keepdim=True), self.heads)[..., 0]
        return sums.masked_fill(~rounded | (sums == 0), 1.0).log()

    def part_of(self, t: Tensor, falls: str, tile: Tile) -> Tensor:
        """What of a tensor falls on a tile; zeros for the keys behind a batch entry's length."""
        part = part_of(t, falls, tile)
        lengths = self.tensors.key_lengths
        if falls != "columns" or lengths is None or tile.columns.stop <= self.shortest:
            return part
        return definition.keys_there(part, lengths - tile.columns.start)

    def of(
        self, tile: Tile, q: Tensor, k: Tensor, bias: Tensor | None, relative_bias: Tensor | None
    ) -> tuple[Tensor, Tensor | float]:
        """The scores of one tile, -inf where hidden, and their derivative by q k^T; from what of q, grouped, k and
        the bias falls on the tile."""
        scores: Tensor = q @ k.mT * self.spec.scale
        slope: Tensor | float = self.spec.scale
        if self.spec.softcap:
            bent = torch.tanh(scores / self.spec.softcap)
            scores, slope = self.spec.softcap * bent, self.spec.scale * (1.0 - bent.square())
        if self.tensors.alibi_slopes is not None:
            diagonal = self._diagonal(tile, q.device).repeat(self.group, 1)
            distance = (torch.arange(tile.columns.start, tile.columns.stop, device=q.device) - diagonal).abs()
            scores = scores - self.per_row(self.tensors.alibi_slopes, q.shape[2]) * distance
        for added in self.added(tile, bias, relative_bias):
            scores = scores + added
        if self.lists is not None:
            scores = scores + self._counts(self.lists, tile)
        for hidden in self.hidden(tile, q.device):
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores, slope

    def added(self, tile: Tile, bias: Tensor | None, relative_bias: Tensor | None) -> Iterator[Tensor]:
        """What a bias (the tile's part) and a relative bias add to the scores of one tile."""
        if bias is not None:
            yield self._every_head(bias, tile)
        if relative_bias is not None:
            columns = torch.arange(tile.columns.start, tile.columns.stop, device=relative_bias.device)
            distance = columns - self._diagonal(tile, relative_bias.device)
            index = definition.relative_index(distance, relative_bias.shape[2] // 2)
            yield grouped(relative_bias[:, :, index], self.key_heads)

    def keep_mask(self, tile: Tile) -> Tensor | None:
        """By what dropout multiplies the weights of one tile: 0 or 1 / (1 - p); None without dropout."""
        state = self.tensors.dropout_state
        if state is None:
            return None
        head = torch.arange(self.heads, device=state.device)[:, None, None]
        query = torch.arange(tile.rows.start, tile.rows.stop, device=state.device)[:, None]
        dropout = self.spec.dropout
        span = tile.columns.start, tile.columns.stop
        keep = keep_mask(state[:, None, None, None], head, query, *span, dropout, self.dtype)
        return grouped(keep.mul_(1.0 / (1.0 - dropout)), self.key_heads)

    def scaled(self, q: Tensor, head_scale: Tensor | None) -> Tensor:
        """Grouped rows of q, or the like, times the scales of their heads (B, Hq); in the dtype of sums, so that
        the scores are as exact as if they were scaled themselves."""
        return q if head_scale is None else q * self.per_row(head_scale, q.shape[2])

    def per_row(self, values: Tensor, rows: int) -> Tensor:
        """A value for each query head (B, Hq), for each of the grouped rows: (B, Hkv, rows, 1)."""
        every = values.unflatten(1, (self.key_heads, self.group)).repeat_interleave(rows // self.group, 2)
        return every[..., None]

    def _diagonal(self, tile: Tile, device: torch.device) -> Tensor:
        """(rows, 1): at which key each query stands."""
        return torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None] + self.shift

    def _every_head(self, bias: Tensor, tile: Tile) -> Tensor:
        """A tile's part of a bias, for every query head; its batch and columns may be 1."""
        return grouped(bias.expand(-1, self.heads, tile.rows.stop - tile.rows.start, -1), self.key_heads)

    def _counts(self, lists: BlockLists, tile: Tile) -> Tensor:
        """The logarithm of how often each pair of a tile counts, -inf where it is not seen; tiles begin on
        granules, since no window stands beside a mask of lists."""
        counts = log_counts(lists, granules(tile.rows), granules(tile.columns))
        counts = counts[:, : tile.rows.stop - tile.rows.start, : tile.columns.stop - tile.columns.start]
        every = of_heads(lists, counts, self.batch, self.heads).expand(-1, self.heads, -1, -1)
        return grouped(every, self.key_heads).to(self.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done to the products but to scale and to hide them."""
        tensors = self.tensors
        added = tensors.bias is not None and tensors.bias.dtype != torch.bool
        shaped = any(t is not None for t in (tensors.alibi_slopes, tensors.relative_bias, self.lists))
        return not (added or shaped or self.spec.softcap)

    def hidden(self, tile: Tile, device: torch.device) -> Iterator[Tensor]:
        """Where the window, a bool bias, the key lengths and intervals hide scores of a tile, one after the other,
        bool, broadcasting to the scores. What hides nothing is left out."""
        diagonal = self._diagonal(tile, device).repeat(self.group, 1)
        keys = torch.arange(tile.columns.start, tile.columns.stop, device=device)
        left, right = self.spec.left, self.spec.right
        if left is not None and tile.columns.start < tile.rows.stop - 1 + self.shift - left:
            yield keys < diagonal - left
        if right is not None and tile.columns.stop - 1 > tile.rows.start + self.shift + right:
            yield keys > diagonal + right
        if self.tensors.bias is not None and self.tensors.bias.dtype == torch.bool:
            yield ~self._every_head(part_of(self.tensors.bias, "scores", tile), tile)
        if self.tensors.key_lengths is not None and tile.columns.stop > self.shortest:
            yield keys >= self.tensors.key_lengths[:, None, None, None]
        if self.tensors.intervals is not None:
            start, stop = (
                self.tensors.intervals[:, None, :, tile.rows, None].repeat(1, 1, 1, self.group, 1).unbind(2)
            )
            yield (keys < start) | (keys >= stop)


@dataclass(frozen=True)
class TileSum:
    """A sum over the tiles of `function(tile, *parts)`, where the parts are what of each input falls on the tile.

    function: from a Tile and, in the dtype sums are made in, parts (or None) to one tensor for each output.
    names: what the first inputs are; GRADIENT_INPUTS or TANGENT_INPUTS.
    falls: how each input falls on tiles: "rows", "columns", "scores" (a bias, which may have size 1) or "whole".
    outputs: the inputs whose shape and dtype the results have.

    The first input that falls on rows has q's heads, the first that falls on columns k's.
    """

    function: Callable[..., Sequence[Tensor]]
    names: tuple[str, ...]
    falls: tuple[str, ...]
    outputs: tuple[int, ...]
    spec: AttentionSpec

    def __call__(self, tensors: ScoreTensors, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The results, each in the dtype of the input it is like. `tensors` are those that have no gradient."""
        q, k = (inputs[self.falls.index(falls)] for falls in ("rows", "columns"))
        assert q is not None and k is not None
        likes = [t for t in (inputs[i] for i in self.outputs) if t is not None]
        with product_precision(q, self.spec):
            sums = self.sums(Scores(q, k, self.spec, tensors), inputs)
        return tuple(total.to(t.dtype) for total, t in zip(sums, likes, strict=True))

    def sums(self, scores: Scores, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """The results in the dtype that sums are made in, over the tiles of these scores."""
        work = scores.dtype
        sums = [zeros_of(t, work) for t in (inputs[i] for i in self.outputs) if t is not None]
        for rows in scores.rows() if scores.exist else ():
            remainder = self._remainder(scores, rows, inputs)
            for tile in scores.tiles_of(rows):
                tile = tile if remainder is None else replace(tile, remainder=remainder)
                parts = (
                    None if t is None else scores.part_of(t, falls, tile).to(work)
                    for t, falls in zip(inputs, self.falls, strict=True)
                )
                given = self.function(tile, *parts)
                for total, i, g in zip(sums, self.outputs, given, strict=True):
                    part_of(total, self.falls[i], tile).add_(g)
        return sums

    def _remainder(self, scores: Scores, rows: slice, inputs: Sequence[Tensor | None]) -> Tensor | None:
        """Of these rows, see `Scores.remainder`; a constant to every derivative."""
        named = dict(zip(self.names, inputs, strict=False))
        q, k, lse = named["q"], named["k"], named["lse"]
        assert q is not None and k is not None and lse is not None
        return scores.remainder(rows, q, k, lse, *(named[name] for name in LEARNED))


def forward(
    scores: Scores, q: Tensor, k: Tensor, v: Tensor, given: Learned, maxima: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention's out and lse, by the online softmax over the tiles of these scores. maxima (B, Hq, Lq), -inf,
    gets the largest score of each row."""
    heads, dtype = scores.heads, scores.dtype
    out = zero_heads((*q.shape[:3], v.shape[3]), q, q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    for rows in scores.rows() if heads else ():
        q_tile = scores.scaled(grouped(q[:, :, rows].to(dtype), scores.key_heads), given.head_scale)
        row_max, row_sum = beginning(scores, given.sinks, q_tile)
        total = q_tile.new_zeros((*q_tile.shape[:3], v.shape[3]))
        for tile in scores.tiles_of(rows):
            if tile.columns.start == tile.columns.stop:
                continue
            k_tile, v_tile = (scores.part_of(t, "columns", tile).to(dtype) for t in (k, v))
            bias = None if given.bias is None else part_of(given.bias, "scores", tile).to(dtype)
            values, _ = scores.of(tile, q_tile, k_tile, bias, given.relative_bias)
            highest = values.amax(-1, keepdim=True)
            if maxima is not None:
                most = maxima[:, :, rows]
                torch.maximum(most, ungrouped(highest, heads)[..., 0], out=most)
            new_max = torch.maximum(row_max, highest)
            pivot = new_max.masked_fill(new_max == float("-inf"), 0.0)
            weights = torch.exp(values - pivot)
            rescale = torch.exp(row_max - pivot)
            row_sum = row_sum * rescale + weights.sum(-1, keepdim=True)
            total = total * rescale + times(weights, scores.keep_mask(tile)) @ v_tile
            row_max = new_max
        out[:, :, rows] = ungrouped(total / row_sum.masked_fill(row_sum == 0, 1.0), heads).to(q.dtype)
        lse[:, :, rows] = ungrouped(row_max + torch.log(row_sum), heads)[..., 0]
    return out, lse


def beginning(scores: Scores, sinks: Tensor | None, q_tile: Tensor) -> tuple[Tensor, Tensor]:
    """The running maximum and sum before the first key: nothing, or the sink."""
    row_max = q_tile.new_full((*q_tile.shape[:3], 1), float("-inf"))
    if sinks is None:
        return row_max, torch.zeros_like(row_max)
    return row_max.copy_(scores.per_row(sinks, q_tile.shape[2])), torch.ones_like(row_max)


# ---- the two sums that everything else derives from ----

# What they take beside ScoreTensors without gradient; None where it is not asked for.
GRADIENT_INPUTS = ("dout", "q", "k", "v", "out", "lse", "dlse", *LEARNED)
TANGENT_INPUTS = (
    "q",
    "k",
    "v",
    "out",
    "lse",
    *(f"{name}_tangent" for name in ("q", "k", "v", *LEARNED)),
    *LEARNED,
)
_FALLS = {
    **dict.fromkeys(("q", "dout", "out", "lse", "dlse", "q_tangent"), "rows"),
    **dict.fromkeys(("k", "v", "k_tangent", "v_tangent"), "columns"),
    **dict.fromkeys(("bias", "bias_tangent"), "scores"),
}


def gradients(spec: AttentionSpec, wanted: Wanted, sinks: bool, head_scale: bool) -> TileSum:
    """The gradients of attention, from GRADIENT_INPUTS: of q, k, v, and of what is wanted of LEARNED, in the order
    of `Gradients`."""
    there = {"q": True, "k": True, "v": True, **wanted._asdict(), "sinks": sinks, "head_scale": head_scale}
    names = tuple(name for name, is_there in there.items() if is_there)

    def function(tile: Tile, *parts: Tensor | None) -> Sequence[Tensor]:
        return _gradients_of_tile(tile, names, *parts)

    falls = tuple(_FALLS.get(name, "whole") for name in GRADIENT_INPUTS)
    outputs = tuple(GRADIENT_INPUTS.index(name) for name in names)
    return TileSum(function, GRADIENT_INPUTS, falls, outputs, spec)


def tangent(spec: AttentionSpec) -> TileSum:
    """The tangents of attention's out and lse, from TANGENT_INPUTS."""
    falls = tuple(_FALLS.get(name, "whole") for name in TANGENT_INPUTS)
    outputs = TANGENT_INPUTS.index("out"), TANGENT_INPUTS.index("lse")
    return TileSum(_tangent_of_tile, TANGENT_INPUTS, falls, outputs, spec)


def row_terms(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What the backward needs of each row: its log-sum-exp, and delta = rowsum(dout * out) - dlse. For rows that
    saw nothing +inf and 0: exp(-inf - inf) is 0, and so is everything that follows."""
    delta = (dout.to(lse.dtype) * out).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    empty = lse == float("-inf")
    return lse.masked_fill(empty, float("inf")), delta.masked_fill(empty, 0.0)


def _gradients_of_tile(tile: Tile, names, dout, q, k, v, out, lse, dlse, *learned) -> Sequence[Tensor]:
    """With P = exp(S - lse), dP = dout v^T and delta = rowsum(dout * out) - dlse, dS = P * (dP - delta)."""
    scores = tile.scores
    bias, relative_bias, sinks, head_scale = learned
    lse, delta = row_terms(dout, dlse, out, lse)
    q_rows, dout_rows, lse_rows, delta_rows = (
        grouped(t, scores.key_heads) for t in (q, dout, lse[..., None], delta[..., None])
    )
    scaled_q = scores.scaled(q_rows, head_scale)
    values, slope = scores.of(tile, scaled_q, k, bias, relative_bias)
    keep = scores.keep_mask(tile)
    weights = tile.weights(values, lse_rows)
    dscores = weights * (times(dout_rows @ v.mT, keep) - delta_rows)
    dproducts = dscores * slope
    dscaled_q = dproducts @ k
    results = [
        ungrouped(scores.scaled(dscaled_q, head_scale), scores.heads),
        dproducts.mT @ scaled_q,
        times(weights, keep).mT @ dout_rows,
    ]
    if "bias" in names:
        # What comes back to a bias, in a second derivative, may be anything where it is hidden.
        seen = dscores.masked_fill(values == float("-inf"), 0.0)
        results.append(ungrouped(seen, scores.heads).sum_to_size(bias.shape))
    if "relative_bias" in names:
        shift = tile.columns.start - tile.rows.start - scores.shift
        results.append(definition.sum_by_distance(ungrouped(dscores, scores.heads), relative_bias, shift))
    if "sinks" in names:
        dsinks = -(tile.sink_weights(sinks, lse) * delta).sum(2)
        results.append(dsinks if tile.first else torch.zeros_like(sinks))
    if "head_scale" in names:
        results.append(ungrouped(dscaled_q * q_rows, scores.heads).sum((2, 3)))
    return results


def _tangent_of_tile(
    tile: Tile,
    q,
    k,
    v,
    out,
    lse,
    dq,
    dk,
    dv,
    dbias,
    drelative_bias,
    dsinks,
    dhead_scale,
    bias,
    relative_bias,
    sinks,
    head_scale,
) -> Sequence[Tensor]:
    """With P = exp(S - lse): lse' = sum P S', out' = sum P S' v + sum P v' - lse' out. Here a d says tangent."""
    scores = tile.scores
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    q_rows = grouped(q, scores.key_heads)
    scaled_q = scores.scaled(q_rows, head_scale)
    values, slope = scores.of(tile, scaled_q, k, bias, relative_bias)
    keep = scores.keep_mask(tile)
    weights = tile.weights(values, grouped(lse[..., None], scores.key_heads))
    moved = list(scores.added(tile, dbias, drelative_bias))
    if dq is not None:
        moved.append(scores.scaled(grouped(dq, scores.key_heads), head_scale) @ k.mT * slope)
    if dk is not None:
        moved.append(scaled_q @ dk.mT * slope)
    if dhead_scale is not None:
        moved.append(scores.scaled(q_rows, dhead_scale) @ k.mT * slope)
    # The tangent of a bias may be anything where it is hidden.
    change = sum(moved, torch.zeros_like(values)).masked_fill(values == float("-inf"), 0.0)
    dweights = weights * change
    dlse = ungrouped(dweights.sum(-1, keepdim=True), scores.heads)
    dout = times(dweights, keep) @ v
    if dv is not None:
        dout = dout + times(weights, keep) @ dv
    if dsinks is not None and tile.first:
        dlse = dlse + (tile.sink_weights(sinks, lse) * dsinks[..., None])[..., None]
    return ungrouped(dout, scores.heads) - dlse * out, dlse[..., 0]


# ---- pieces ----


def key_counts(lengths: Tensor | None, keys: int) -> tuple[int, int]:
    """How many keys every batch entry has, and from which on none has any. Reading it waits for the device; this
    backend launches hundreds of products anyway. A tracer has nothing to read."""
    if lengths is None or not lengths.numel():
        return keys, keys
    if type(lengths) is not Tensor:
        return 0, keys
    shortest, longest = torch.stack(lengths.aminmax()).tolist()
    return shortest, longest


class Learned(NamedTuple):
    """The ScoreTensors that have a gradient, as LEARNED names them."""

    bias: Tensor | None
    relative_bias: Tensor | None
    sinks: Tensor | None
    head_scale: Tensor | None


def learned(tensors: ScoreTensors) -> tuple[ScoreTensors, Learned]:
    """The tensors without a gradient, and those with one."""
    is_mask = tensors.bias is not None and tensors.bias.dtype == torch.bool
    fixed = tensors._replace(
        bias=tensors.bias if is_mask else None, relative_bias=None, sinks=None, head_scale=None
    )
    bias = None if is_mask else tensors.bias
    return fixed, Learned(bias, tensors.relative_bias, tensors.sinks, tensors.head_scale)


def adds_floats(tensors: ScoreTensors) -> bool:
    """Whether a bias of floats, or one by distance, is added to the scores."""
    bias = tensors.bias
    return tensors.relative_bias is not None or (bias is not None and bias.dtype != torch.bool)


def part_of(t: Tensor, falls: str, tile: Tile) -> Tensor:
    """A view of what of a tensor falls on a tile."""
    if falls == "rows":
        return t[:, :, tile.rows]
    if falls == "columns":
        return t[:, :, tile.columns]
    if falls == "scores":
        # A bias; its dimensions of size 1 stay.
        t = t[:, :, tile.rows] if t.shape[2] > 1 else t
        return t[..., tile.columns] if t.shape[3] > 1 else t
    return t


@contextmanager
def product_precision(q: Tensor, spec: AttentionSpec) -> Iterator[None]:
    """PyTorch's own products, in the dtypes of their operands. Those of float32 on CUDA are as the spec asks for
    them; tf32x3 is given more than it asks for."""
    with without_autocast(q.device):
        if q.device.type != "cuda" or q.dtype != torch.float32:
            yield
            return
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = spec.precision == "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def granules(span: slice) -> range:
    """The rows or columns of granules that this span of queries or keys, from the beginning of one on, lies in."""
    return range(span.start // GRANULE, -(-span.stop // GRANULE))


def times(weights: Tensor, keep: Tensor | None) -> Tensor:
    return weights if keep is None else weights * keep


def exp_(t: Tensor) -> Tensor:
    """The exponential, in place: exp2 takes 0.4 of the time of exp on a CPU. Scores and log-sum-exps stay in nats.
    In units of log 2 they would be rounded once more; where they are huge, exp(score - lse) would be far off."""
    return t.mul_(LOG2E).exp2_()


def tanh_of_half_(t: Tensor, memory: Tensor | None = None) -> Tensor:
    """tanh(t / 2), in place, exact to three units in the last place; `memory` may be overwritten. By expm1 it
    takes 0.6 of the time of torch.tanh on a CPU."""
    # Beyond 40 it is 1 in float64, too. expm1 would become infinite, and infinity by infinity NaN.
    exponentials = t.clamp_(max=40.0).expm1_()
    return exponentials.div_(torch.add(exponentials, 2.0, out=memory))


def grouped(t: Tensor, key_heads: int) -> Tensor:
    """(B, Hq, L, W) -> (B, Hkv, group * L, W): the queries that read one key head, one below the other."""
    batch, heads, length, width = t.shape
    return t.reshape(batch, key_heads, heads // key_heads * length, width)


def ungrouped(t: Tensor, heads: int) -> Tensor:
    batch, key_heads, rows, width = t.shape
    return t.reshape(batch, heads, rows * key_heads // heads, width)


def zeros_of(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of this shape, laid out as results are."""
    return zero_heads(t.shape, t, dtype) if t.dim() == 4 else t.new_zeros(t.shape, dtype=dtype)


def _spans(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
