"""Statistics in plain PyTorch: one sweep over tiles of the scores, from which all that is asked is summed.

The tiles and the scores on them are attention's own (fastattn.core.attention.tiles). What is linear in the weights
P is made by two thin products a tile: P by a few columns (one column of ones gives what each row sums to, one of
positions the distance, ...), and a few rows by P. A tile is of so many heads that it stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.core.attention import tiles
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors
from fastattn.core.attention.tiles import KEY_TILE, LISTED_QUERY_TILE, QUERY_TILE, Scores, Tile, grouped, ungrouped
from fastattn.core.statistics.spec import StatisticsSpec, StatisticsTensors, empty_results
from fastattn.ground.checks import lse_dtype
from fastattn.masks.lists import GRANULE

# Scores of a tile over all of its heads: 1 MiB in fp32.
ELEMENTS = 2**18
# exp of it is 0, and 0 times it is 0, where 0 times -inf is NaN.
LOWEST = -1e4


def sweep(
    q: Tensor, k: Tensor, lse: Tensor, spec: StatisticsSpec, asked: StatisticsTensors, tensors: ScoreTensors
) -> dict[str, Tensor]:
    """Each of `spec.want`, over all tiles that any query sees, in a fixed order."""
    results = empty_results(spec, q, k)
    if q.numel() * k.numel() == 0:
        return results
    every = Scores(q, k, spec.attention, tensors)
    with tiles.product_precision(q, spec.attention):
        for batch, key_heads in _parts(every):
            heads = slice(key_heads.start * every.group, key_heads.stop * every.group)
            part = _Sweep(every.part(batch, key_heads), spec, _part_of(asked, batch, heads))
            there = {
                name: (t[:, batch, heads] if name == "match_mass" else t[batch, heads])
                for name, t in results.items()
            }
            part.run(q[batch, heads], k[batch, key_heads], lse[batch, heads], there)
    return results


def gather(
    q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, columns: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> Tensor:
    """The weights of the pairs (rows[n], columns[n]), (B, Hq, n): of every tile that has one, 64 keys wide."""
    found = q.new_zeros(*q.shape[:2], len(rows), dtype=lse.dtype)
    if not found.numel():
        return found
    scores = Scores(q, k, spec, tensors)
    height = LISTED_QUERY_TILE
    place = (rows // height) * (-(-k.shape[2] // GRANULE)) + columns // GRANULE
    order = place.argsort(stable=True)
    _, sizes = torch.unique_consecutive(place[order], return_counts=True)
    with tiles.product_precision(q, spec):
        for pairs in order.split(sizes.tolist()):
            first, start = int(rows[pairs[0]]) // height * height, int(columns[pairs[0]]) // GRANULE * GRANULE
            tile = Tile(
                scores,
                slice(first, min(first + height, q.shape[2])),
                slice(start, min(start + GRANULE, k.shape[2])),
                True,
            )
            logs = ungrouped(_log_weights(tile, q, k, lse)[1], q.shape[1])
            found[:, :, pairs] = torch.exp(logs[:, :, rows[pairs] - first, columns[pairs] - start])
    return found


def _parts(scores: Scores) -> Iterator[tuple[slice, slice]]:
    """Batch elements and key heads whose tiles fit in the cache: several of both, or one."""
    one = scores.group * min(scores.queries, QUERY_TILE) * min(scores.keys, KEY_TILE)
    heads_at_once = min(scores.key_heads, max(1, ELEMENTS // one))
    batch_at_once = min(scores.batch, max(1, ELEMENTS // (one * scores.key_heads)))
    for b in _spans(0, scores.batch, batch_at_once):
        for h in _spans(0, scores.key_heads, heads_at_once):
            yield b, h


def _part_of(asked: StatisticsTensors, batch: slice, heads: slice) -> StatisticsTensors:
    """What of the tensors belongs to some batch elements and heads."""
    weights, norms = (None if t is None else t[batch, heads] for t in asked[:2])
    own, others = (None if t is None else t[:, batch] for t in asked[2:4])
    return StatisticsTensors(weights, norms, own, others, asked.row_bins)


def _log_weights(tile: Tile, q: Tensor, k: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of a tile and the logarithms of its weights, -inf where hidden: (B, Hkv, group x rows, columns)."""
    scores = tile.scores
    work = lse_dtype(q.dtype)
    _, (bias, relative_bias, _) = tiles.learned(scores.tensors)
    q_tile = grouped(q[:, :, tile.rows].to(work), scores.key_heads)
    k_tile = scores.part_of(k, "columns", tile).to(work)
    part = None if bias is None else tiles.part_of(bias, "scores", tile).to(work)
    values, _ = scores.of(tile, q_tile, k_tile, part, relative_bias)
    # A row that saw nothing has lse -inf. Use +inf: its weights are 0.
    row_lse = lse[:, :, tile.rows].masked_fill(lse[:, :, tile.rows] == float("-inf"), float("inf"))
    return values, values - grouped(row_lse[..., None], scores.key_heads)


class _Sweep:
    """The sweep of some batch elements and heads."""

    def __init__(self, scores: Scores, spec: StatisticsSpec, asked: StatisticsTensors) -> None:
        self.scores, self.spec, self.asked, self.want = scores, spec, asked, set(spec.want)

    def run(self, q: Tensor, k: Tensor, lse: Tensor, results: dict[str, Tensor]) -> None:
        """Add to the results, which are those of the same batch elements and heads."""
        scores = self.scores
        first, stop = self.spec.rows
        for rows in _spans(first // GRANULE * GRANULE, stop, LISTED_QUERY_TILE if scores.lists else QUERY_TILE):
            if bool((lse[:, :, rows] == float("inf")).all()):
                continue  # nobody asked for these
            for tile in scores.tiles_of(rows):
                if tile.columns.start < tile.columns.stop:
                    values, logs = _log_weights(tile, q, k, lse)
                    values, logs = (ungrouped(t, scores.heads) for t in (values, logs))
                    self.add(tile, values, logs, results)

    def add(self, tile: Tile, values: Tensor, logs: Tensor, results: dict[str, Tensor]) -> None:
        """Add what one tile of scores and log weights (B, Hq, M, N) gives."""
        want, rows, columns = self.want, tile.rows, tile.columns
        if "max_logit" in want:
            most = results["max_logit"][:, :, rows]
            torch.maximum(most, values.amax(-1), out=most)
        if "max_received" in want:
            most = results["max_received"][:, :, columns]
            torch.maximum(most, logs.amax(2).exp(), out=most)
        weights = logs.exp()
        if "entropy" in want:
            results["entropy"][:, :, rows] -= (weights * logs.clamp(min=LOWEST)).sum(-1)
        if "sum_of_squares" in want:
            results["sum_of_squares"][:, :, rows] += weights.square().sum(-1)
        if "match_mass" in want:
            self._add_matches(tile, weights, results["match_mass"][:, :, :, rows])
        if "top_keys" in want:
            self._add_top(tile, weights, results)
        if "lag_profile" in want:
            self._add_lags(tile, weights, results["lag_profile"])
        self._add_products_by_columns(tile, weights, results)
        self._add_products_by_rows(tile, weights, results)

    def _add_products_by_columns(self, tile: Tile, weights: Tensor, results: dict[str, Tensor]) -> None:
        """What is a sum over keys: weights times columns."""
        rows, columns, want = tile.rows, tile.columns, self.want
        count = columns.stop - columns.start
        parts: list[Tensor] = []
        if "mean_distance" in want:
            # Counted from the tile's middle, so that neither of two sums is much larger than their difference.
            middle = columns.start + count // 2
            parts.append(
                (torch.arange(columns.start, columns.stop, device=weights.device) - middle).to(weights)[:, None]
            )
        first, bins = 0, 0
        if "thumbnail" in want:
            places = torch.arange(columns.start, columns.stop, device=weights.device)
            bin_of = places * self.spec.thumbnail[1] // self.scores.keys
            first = columns.start * self.spec.thumbnail[1] // self.scores.keys
            bins = (columns.stop - 1) * self.spec.thumbnail[1] // self.scores.keys + 1 - first
            parts.append((bin_of[:, None] == torch.arange(first, first + bins, device=weights.device)).to(weights))
        # torch.sum is more exact than a product, and distances grow its rounding.
        mass = weights.sum(-1)
        sums = weights @ torch.cat(parts, 1) if parts else mass
        if "mass" in want:
            results["mass"][:, :, rows] += mass
        if "mean_distance" in want:
            from_middle = torch.arange(rows.start, rows.stop, device=weights.device) + (self.scores.shift - middle)
            results["mean_distance"][:, :, rows] += from_middle * mass - sums[..., 0]
        if "value_norm" in want:
            assert self.asked.value_norms is not None
            norms = self.asked.value_norms[:, :, columns]
            results["value_norm"][:, :, rows] += (weights @ norms[..., None])[..., 0]
        if "thumbnail" in want:
            assert self.asked.row_bins is not None
            row = torch.arange(self.spec.thumbnail[0], device=weights.device)[:, None]
            by_row = (row == self.asked.row_bins[rows]).to(weights)
            results["thumbnail"][..., first : first + bins] += by_row @ sums[..., -bins:]

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
            masses[kind] += (weights * matches[:, None]).sum(-1)

    def _add_top(self, tile: Tile, weights: Tensor, results: dict[str, Tensor]) -> None:
        """Merge the largest of the tile into the running list."""
        best, numbers = (results[name][:, :, tile.rows] for name in ("top_keys", "top_key_numbers"))
        count = min(self.spec.top, weights.shape[-1])
        found, place = weights.topk(count)
        place = (place + tile.columns.start).masked_fill_(found == 0, -1)
        merged, order = torch.cat((best, found), -1).sort(dim=-1, descending=True, stable=True)
        numbers.copy_(torch.cat((numbers, place), -1).gather(-1, order)[..., : self.spec.top])
        best.copy_(merged[..., : self.spec.top])

    def _add_lags(self, tile: Tile, weights: Tensor, profile: Tensor) -> None:
        """Sums along diagonals: every row is shifted by one against the one below, and the columns are summed."""
        height, width = weights.shape[2:]
        skewed = torch.nn.functional.pad(weights.flip(3), (0, height)).flatten(2)[..., :-height]
        sums = skewed.unflatten(2, (height, width + height - 1)).sum(2)
        # Row 0 and the last column have the smallest lag.
        nearest = tile.rows.start + self.scores.shift - (tile.columns.stop - 1) + self.scores.queries - 1
        profile[..., nearest : nearest + width + height - 1] += sums


def _spans(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
