"""Statistics in plain PyTorch: one sweep over tiles of the scores, from which all that is asked is summed.

The tiles and the scores on them are attention's own (fastattn.core.attention.tiles). A sum over keys is the
product of a tile's weights P and a column (of positions, for the distance); a sum over queries is that of a row
and P. A tile has as many heads as fit in the cache, and all tiles use the same memory.

Logarithms of weights have base 2: exp2 takes 0.4 of the time of exp on a CPU. Scores and log-sum-exps have base e,
as attention's own: each is rounded by itself, and of huge ones only the difference of equal roundings is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastattn.core.attention import tiles
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors
from fastattn.core.attention.tiles import KEY_TILE, LISTED_QUERY_TILE, QUERY_TILE, Scores, Tile, grouped, ungrouped
from fastattn.core.statistics.spec import StatisticsSpec, StatisticsTensors, WeightsAsked, empty_results
from fastattn.core.workspace import Workspace
from fastattn.masks.lists import GRANULE

# Scores of a tile over all of its heads: 1 MiB in fp32.
ELEMENTS = 2**18
LOG2E = math.log2(math.e)
# The logarithm of a hidden weight. exp2 of it is 0, and 0 times it is 0, where 0 times -inf is NaN.
HIDDEN = -1e30
# Keys that the largest weights are picked from at once, and of a group, of which the largest is looked at first.
PICKED, GROUP = 2048, 16


def sweep(
    q: Tensor, k: Tensor, lse: Tensor, spec: StatisticsSpec, asked: StatisticsTensors, tensors: ScoreTensors
) -> dict[str, Tensor]:
    """Each of `spec.want`, over all tiles that any query sees, in a fixed order."""
    results = empty_results(spec, q, k)
    if q.numel() * k.numel() == 0:
        return results
    every = Scores(q, k, spec.attention, tensors)
    workspace = _Workspace(lse.dtype, lse.device)
    with tiles.product_precision(q, spec.attention):
        for batch, key_heads in _parts(every):
            heads = slice(key_heads.start * every.group, key_heads.stop * every.group)
            part = _Sweep(every.part(batch, key_heads), spec, _part_of(asked, batch, heads), workspace)
            there = {
                name: (t[:, batch, heads] if name == "match_mass" else t[batch, heads])
                for name, t in results.items()
            }
            part.run(q[batch, heads], k[batch, key_heads], lse[batch, heads], there)
    return results


def gather(
    q: Tensor, k: Tensor, lse: Tensor, pairs: WeightsAsked, spec: AttentionSpec, tensors: ScoreTensors
) -> Tensor:
    """The weights of the pairs (rows[n], columns[n]), (B, Hq, n): of every tile that has one, 64 keys wide."""
    rows, columns, remainder = pairs
    found = q.new_zeros(*q.shape[:2], len(rows), dtype=lse.dtype)
    if not found.numel():
        return found
    scores = Scores(q, k, spec, tensors)
    height = LISTED_QUERY_TILE
    place = (rows // height) * (-(-k.shape[2] // GRANULE)) + columns // GRANULE
    order = place.argsort(stable=True)
    _, sizes = torch.unique_consecutive(place[order], return_counts=True)
    with tiles.product_precision(q, spec):
        for near in order.split(sizes.tolist()):
            first, start = int(rows[near[0]]) // height * height, int(columns[near[0]]) // GRANULE * GRANULE
            tile = Tile(
                scores,
                slice(first, min(first + height, q.shape[2])),
                slice(start, min(start + GRANULE, k.shape[2])),
                True,
            )
            queries = _Rows(tile.scores, tile.rows, q, lse, remainder)
            logs = ungrouped(queries.log_weights(tile, k, _Workspace(lse.dtype, lse.device)), q.shape[1])
            found[:, :, near] = torch.exp2(logs[:, :, rows[near] - first, columns[near] - start])
    return found


def _parts(scores: Scores) -> Iterator[tuple[slice, slice]]:
    """Batch elements and key heads whose tiles fit in the cache: several of both, or one."""
    one = scores.group * min(scores.queries, _height(scores)) * min(scores.keys, KEY_TILE)
    heads_at_once = min(scores.key_heads, max(1, ELEMENTS // one))
    batch_at_once = min(scores.batch, max(1, ELEMENTS // (one * scores.key_heads)))
    for b in _spans(0, scores.batch, batch_at_once):
        for h in _spans(0, scores.key_heads, heads_at_once):
            yield b, h


def _height(scores: Scores) -> int:
    """The queries of a tile. Fewer leave out more of what lies behind the diagonal, or outside of a mask of
    lists."""
    return QUERY_TILE if scores.lists is None and scores.spec.right is None else LISTED_QUERY_TILE


def _part_of(asked: StatisticsTensors, batch: slice, heads: slice) -> StatisticsTensors:
    """The part of these tensors that belongs to some batch elements and heads."""
    by_head = (asked.query_weights, asked.value_norms, asked.remainder)
    weights, norms, remainder = (None if t is None else t[batch, heads] for t in by_head)
    own, others = (None if t is None else t[:, batch] for t in (asked.query_labels, asked.key_labels))
    return StatisticsTensors(weights, norms, own, others, asked.row_bins, remainder)


class _Workspace(Workspace):
    """A workspace that also holds tiles whose diagonals are summed."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self._skewed: dict[tuple[int, ...], Tensor] = {}

    def skewed(self, shape: tuple[int, ...]) -> Tensor:
        """For tiles (B, H, M, N): rows of N elements with M - 1 zeros before them and more behind. Read with one
        element more from row to row, diagonals stand below one another."""
        if shape not in self._skewed:
            if len(self._skewed) > 3:
                self._skewed.clear()
            height, width = shape[2:]
            size = (*shape[:2], height, 2 * height + width)
            self._skewed[shape] = torch.zeros(size, dtype=self.dtype, device=self.device)
        return self._skewed[shape]


class _Rows:
    """Some queries, prepared once for all of their tiles: grouped by key head, scaled, with their lse in nats."""

    def __init__(self, scores: Scores, rows: slice, q: Tensor, lse: Tensor, remainder: Tensor | None) -> None:
        self.scores, self.rows, work = scores, rows, lse.dtype
        self.q = scores.scaled(grouped(q[:, :, rows].to(work), scores.key_heads), scores.tensors.head_scale)
        # A row that saw nothing has lse -inf. Use +inf: its weights are 0.
        row_lse = lse[:, :, rows].masked_fill(lse[:, :, rows] == -math.inf, math.inf)
        self.lse = grouped(row_lse[..., None], scores.key_heads)
        self.remainder = None if remainder is None else grouped(remainder[:, :, rows, None], scores.key_heads)
        self.scaled_q = self.q * scores.spec.scale if scores.is_plain else None
        nobody = row_lse == math.inf
        self.nobody, self.whole = bool(nobody.all()), not bool(nobody.any())

    def log_weights(self, tile: Tile, k: Tensor, workspace: _Workspace) -> Tensor:
        """The logarithms of a tile's weights, of base 2, HIDDEN where hidden: (B, Hkv, group x rows, columns)."""
        scores, work = self.scores, self.lse.dtype
        k_tile = scores.part_of(k, "columns", tile).to(work)
        if self.scaled_q is not None:
            logs = workspace.empty("logs", *self.q.shape[:3], k_tile.shape[2])
            torch.bmm(self.scaled_q.flatten(0, 1), k_tile.flatten(0, 1).mT, out=logs.flatten(0, 1))
            logs.sub_(self.lse).mul_(LOG2E)
            for hidden in scores.hidden(tile, k.device):
                logs.masked_fill_(hidden, HIDDEN)
            return logs if self.whole else logs.clamp_(min=HIDDEN)
        _, (bias, relative_bias, *_) = tiles.learned(scores.tensors)
        part = None if bias is None else tiles.part_of(bias, "scores", tile).to(work)
        logs = scores.of(tile, self.q, k_tile, part, relative_bias)[0]
        # The difference comes first: it is small where both are huge.
        logs.sub_(self.lse)
        if self.remainder is not None:
            logs.sub_(self.remainder)
        return logs.mul_(LOG2E).clamp_(min=HIDDEN)


class _SideBySide:
    """The weights of some queries on the keys of several tiles, from which the largest are picked together: one
    call of torch.topk for four tiles takes less time than four calls."""

    def __init__(self, workspace: _Workspace) -> None:
        self.workspace = workspace
        self.spans: list[slice] = []
        self.width = 0

    def fits(self, tile: Tile) -> bool:
        """Whether there is room for one more tile."""
        return not self.spans or self.width + tile.columns.stop - tile.columns.start <= PICKED

    def room(self, tile: Tile, shape: Sequence[int]) -> Tensor:
        """Where the weights of one more tile are written."""
        self.held = self.workspace.empty("side by side", *shape[:3], PICKED)
        self.spans.append(tile.columns)
        self.width += shape[3]
        return self.held[..., self.width - shape[3] : self.width]

    def largest(self, top: int) -> tuple[Tensor, Tensor]:
        """The largest weights and their keys, (B, H, M, top or fewer). Then there is room for new tiles.

        The largest `top` weights lie in the `top` groups of keys whose largest weights are largest."""
        keys = [torch.arange(span.start, span.stop, device=self.held.device) for span in self.spans]
        groups = -(-self.width // GROUP)
        weights = self.held[..., : groups * GROUP]
        weights[..., self.width :] = 0.0
        if top < groups:
            # Every groups-th key is of one group.
            chosen = weights.unflatten(3, (GROUP, groups)).amax(3).topk(top).indices
            step = torch.arange(0, groups * GROUP, groups, device=weights.device)[:, None]
            candidates = (chosen[..., None, :] + step).flatten(3)
            found, order = weights.gather(3, candidates).topk(top)
            place = candidates.gather(3, order)
        else:
            found, place = weights.topk(min(top, weights.shape[3]))
        unused = place.new_full((groups * GROUP - self.width,), -1)
        self.spans, self.width = [], 0
        return found, torch.cat((*keys, unused))[place].masked_fill_(found == 0, -1)


class _Sweep:
    """The sweep of some batch elements and heads."""

    def __init__(
        self, scores: Scores, spec: StatisticsSpec, asked: StatisticsTensors, workspace: _Workspace
    ) -> None:
        self.scores, self.spec, self.asked, self.workspace = scores, spec, asked, workspace
        self.want = set(spec.want)
        self.beside = _SideBySide(workspace)

    def run(self, q: Tensor, k: Tensor, lse: Tensor, results: dict[str, Tensor]) -> None:
        """Add to the results, which are those of the same batch elements and heads."""
        scores = self.scores
        first, stop = self.spec.rows
        for rows in _spans(first // GRANULE * GRANULE, stop, _height(scores)):
            queries = _Rows(scores, rows, q, lse, self.asked.remainder)
            if queries.nobody:
                continue
            for tile in scores.tiles_of(rows):
                if tile.columns.start < tile.columns.stop:
                    logs = ungrouped(queries.log_weights(tile, k, self.workspace), scores.heads)
                    self.add(tile, logs, ungrouped(queries.lse, scores.heads)[..., 0], results)
            # A row with a sink, which has an lse, may see no key.
            if self.beside.spans:
                self._pick(rows, results)

    def add(self, tile: Tile, logs: Tensor, row_lse: Tensor, results: dict[str, Tensor]) -> None:
        """Add what one tile of logarithms of weights (B, Hq, M, N), of base 2, gives."""
        want, rows, columns, workspace = self.want, tile.rows, tile.columns, self.workspace
        if "max_logit" in want:
            highest = logs.amax(-1)
            highest = (highest / LOG2E + row_lse).masked_fill_(highest <= HIDDEN / 2, -math.inf)
            # Of a query that is not asked for, or saw nothing, the log-sum-exp is infinite.
            most = results["max_logit"][:, :, rows]
            torch.maximum(most, highest.masked_fill_(row_lse == math.inf, -math.inf), out=most)
        weights = self._room(tile, logs.shape, results)
        torch.exp2(logs, out=weights)
        if "max_received" in want:
            most = results["max_received"][:, :, columns]
            torch.maximum(most, weights.amax(2), out=most)
        if "entropy" in want:
            product = torch.mul(weights, logs, out=logs)
            results["entropy"][:, :, rows].sub_(product.sum(-1), alpha=1.0 / LOG2E)
        if "sum_of_squares" in want:
            results["sum_of_squares"][:, :, rows] += torch.linalg.vector_norm(weights, dim=-1).square_()
        if "match_mass" in want:
            self._add_matches(tile, weights, results["match_mass"][:, :, :, rows])
        if "lag_profile" in want:
            if "top_keys" in want:
                self._shifted(logs.shape).copy_(weights)
            self._add_lags(tile, workspace.skewed(tuple(logs.shape)), results["lag_profile"])
        self._add_products_by_columns(tile, weights, results)
        self._add_products_by_rows(tile, weights, results)

    def _add_products_by_columns(self, tile: Tile, weights: Tensor, results: dict[str, Tensor]) -> None:
        """What is a sum over keys: weights times columns."""
        rows, columns, want, shift = tile.rows, tile.columns, self.want, self.scores.shift
        place = torch.arange(columns.start, columns.stop, device=weights.device)
        parts: list[Tensor] = []
        middle = (columns.start + columns.stop) // 2
        if "mean_distance" in want:
            # Counted from the tile's middle, so that neither of two sums is much larger than their difference.
            parts.append((place - middle).to(weights)[:, None])
        if "thumbnail" in want:
            first, stop, belongs = _bins(place, columns, self.scores.keys, self.spec.thumbnail[1])
            parts.append(belongs.to(weights))
        # torch.sum is more exact than a product, and distances grow its rounding.
        mass = weights.sum(-1)
        sums = weights @ torch.cat(parts, 1) if parts else mass
        if "mass" in want:
            results["mass"][:, :, rows] += mass
        if "mean_distance" in want:
            from_middle = torch.arange(rows.start, rows.stop, device=weights.device) + (shift - middle)
            results["mean_distance"][:, :, rows] += from_middle * mass - sums[..., 0]
        if "value_norm" in want:
            assert self.asked.value_norms is not None
            norms = self.asked.value_norms[:, :, columns]
            results["value_norm"][:, :, rows] += (weights @ norms[..., None])[..., 0]
        if "thumbnail" in want:
            assert self.asked.row_bins is not None
            row = torch.arange(self.spec.thumbnail[0], device=weights.device)[:, None]
            by_row = (row == self.asked.row_bins[rows]).to(weights)
            results["thumbnail"][..., first:stop] += by_row @ sums[..., first - stop :]

    def _add_products_by_rows(self, tile: Tile, weights: Tensor, results: dict[str, Tensor]) -> None:
        """What is a sum over queries: rows times weights."""
        names = [name for name in ("received", "weighted_received") if name in self.want]
        if not names:
            return
        counts = {"received": weights.new_ones(()).expand(weights.shape[:3])}
        if self.asked.query_weights is not None:
            counts["weighted_received"] = self.asked.query_weights[:, :, tile.rows]
        sums = torch.stack([counts[name] for name in names], 2) @ weights
        for n, name in enumerate(names):
            results[name][:, :, tile.columns] += sums[:, :, n]

    def _add_matches(self, tile: Tile, weights: Tensor, masses: Tensor) -> None:
        """The weight on the keys that have the query's label, kind by kind."""
        own, others = self.asked.query_labels, self.asked.key_labels
        assert own is not None and others is not None
        key = torch.arange(tile.columns.start, tile.columns.stop, device=weights.device)
        diagonal = (
            torch.arange(tile.rows.start, tile.rows.stop, device=weights.device)[:, None] + self.scores.shift
        )
        for kind, before in enumerate(self.spec.before):
            matches = own[kind, :, tile.rows, None] == others[kind, :, None, tile.columns]
            if tile.columns.stop - 1 > tile.rows.start + self.scores.shift - before:
                matches = matches & (key <= diagonal - before)
            # The logarithms have been read: their memory is free.
            product = torch.mul(weights, matches[:, None], out=self.workspace.empty("logs", *weights.shape))
            masses[kind] += product.sum(-1)

    def _room(self, tile: Tile, shape: Sequence[int], results: dict[str, Tensor]) -> Tensor:
        """Where the weights of a tile are written."""
        if "top_keys" in self.want:
            if not self.beside.fits(tile):
                self._pick(tile.rows, results)
            return self.beside.room(tile, shape)
        if "lag_profile" in self.want:
            return self._shifted(shape)
        return self.workspace.empty("weights", *shape)

    def _shifted(self, shape: Sequence[int]) -> Tensor:
        """The place of a tile's weights among the zeros of `skewed`."""
        height, width = shape[2:]
        return self.workspace.skewed(tuple(shape))[..., height - 1 : height - 1 + width]

    def _pick(self, rows: slice, results: dict[str, Tensor]) -> None:
        """Merge the largest weights of the last tiles into the running list."""
        best, numbers = (results[name][:, :, rows] for name in ("top_keys", "top_key_numbers"))
        found, keys = self.beside.largest(self.spec.top)
        merged, order = torch.cat((best, found), -1).sort(dim=-1, descending=True, stable=True)
        numbers.copy_(torch.cat((numbers, keys), -1).gather(-1, order)[..., : self.spec.top])
        best.copy_(merged[..., : self.spec.top])

    def _add_lags(self, tile: Tile, skewed: Tensor, profile: Tensor) -> None:
        """Sums along diagonals, which stand below one another if rows are read with one element more."""
        height, width = skewed.shape[2], tile.columns.stop - tile.columns.start
        batch, head, row, column = skewed.stride()
        shape = (*skewed.shape[:3], height + width - 1)
        # From the lower left corner, which has the largest lag, to the upper right one.
        sums = skewed.as_strided(shape, (batch, head, row + column, column)).sum(2)
        nearest = tile.rows.start + self.scores.shift - (tile.columns.stop - 1) + self.scores.queries - 1
        profile[..., nearest : nearest + height + width - 1] += sums.flip(-1)


def _bins(place: Tensor, columns: slice, keys: int, number: int) -> tuple[int, int, Tensor]:
    """The columns of a thumbnail that these keys fall on, from the first to before the second, and which key falls
    on which."""
    first, stop = columns.start * number // keys, (columns.stop - 1) * number // keys + 1
    return first, stop, (place * number // keys)[:, None] == torch.arange(first, stop, device=place.device)


def _spans(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
