"""The definition: plain PyTorch on the whole pattern, any dtype up to float64, N x N memory.

In float64 it is the oracle of the tests; as a backend, `sweep` and `gather` return what the others do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.core.attention.definition import keys_there, scores_of
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors
from fastattn.core.statistics.spec import StatisticsSpec, StatisticsTensors, WeightsAsked


def logs_of(
    q: Tensor, k: Tensor, lse: Tensor, remainder: Tensor | None, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor]:
    """The logarithms s - lse of the pattern, and the scores s, -inf where hidden: (B, Hq, Lq, Lk) in lse's dtype.
    A row whose lse is -inf saw nothing: its weights are 0. `remainder` is what lse lost by rounding."""
    scores = scores_of(q, keys_there(k, tensors.key_lengths), spec, tensors).to(lse.dtype)
    logs = scores - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None]
    return logs if remainder is None else logs - remainder[..., None], scores


def sweep(
    q: Tensor, k: Tensor, lse: Tensor, spec: StatisticsSpec, asked: StatisticsTensors, tensors: ScoreTensors
) -> dict[str, Tensor]:
    """Each of `spec.want`, as its line says."""
    logs, scores = logs_of(q, k, lse, asked.remainder, spec.attention, tensors)
    weights = torch.exp(logs)
    queries, keys = weights.shape[2:]
    diagonal = torch.arange(queries, device=q.device)[:, None] + (keys - queries)
    key = torch.arange(keys, device=q.device)
    found: dict[str, Tensor] = {}
    for name in spec.want:
        if name == "mass":
            found[name] = weights.sum(-1)
        elif name == "entropy":
            found[name] = -(weights * logs).masked_fill(weights == 0, 0.0).sum(-1)
        elif name == "max_logit":
            found[name] = scores.amax(-1) if keys else torch.full_like(lse, float("-inf"))
        elif name == "sum_of_squares":
            found[name] = weights.square().sum(-1)
        elif name == "mean_distance":
            found[name] = (weights * (diagonal - key)).sum(-1)
        elif name == "value_norm":
            assert asked.value_norms is not None
            found[name] = (weights @ asked.value_norms[..., None])[..., 0]
        elif name == "match_mass":
            found[name] = _match_mass(weights, diagonal, key, spec, asked)
        elif name == "top_keys":
            found |= _top_keys(weights, spec.top)
        elif name == "received":
            found[name] = weights.sum(2)
        elif name == "max_received":
            found[name] = weights.amax(2) if queries else weights.sum(2)
        elif name == "weighted_received":
            assert asked.query_weights is not None
            found[name] = (asked.query_weights[:, :, None] @ weights)[:, :, 0]
        elif name == "lag_profile":
            found[name] = _lag_profile(weights)
        else:
            found[name] = _thumbnail(weights, spec, asked)
    return found


def gather(
    q: Tensor, k: Tensor, lse: Tensor, pairs: WeightsAsked, spec: AttentionSpec, tensors: ScoreTensors
) -> Tensor:
    """The weights of the pairs (rows[n], columns[n]): (B, Hq, n)."""
    logs, _ = logs_of(q, k, lse, pairs.remainder, spec, tensors)
    return torch.exp(logs[:, :, pairs.rows, pairs.columns])


def _match_mass(
    weights: Tensor, diagonal: Tensor, key: Tensor, spec: StatisticsSpec, asked: StatisticsTensors
) -> Tensor:
    """(kinds, B, Hq, Lq): weight on the keys whose label is the query's, at least so far before it."""
    assert asked.query_labels is not None and asked.key_labels is not None
    masses = []
    for before, own, others in zip(spec.before, asked.query_labels, asked.key_labels, strict=True):
        matches = (own[:, :, None] == others[:, None]) & (diagonal - key >= before)
        masses.append((weights * matches[:, None]).sum(-1))
    return torch.stack(masses)


def _top_keys(weights: Tensor, top: int) -> dict[str, Tensor]:
    values, numbers = weights.sort(dim=-1, descending=True, stable=True)
    values, numbers = values[..., :top], numbers[..., :top]
    missing = top - values.shape[-1]
    values = torch.nn.functional.pad(values, (0, missing))
    numbers = torch.nn.functional.pad(numbers, (0, missing), value=-1).masked_fill(values == 0, -1)
    return {"top_keys": values, "top_key_numbers": numbers}


def _lag_profile(weights: Tensor) -> Tensor:
    """(B, Hq, Lq + Lk - 1): the sum along each diagonal, lag -(Lq - 1) first."""
    queries, keys = weights.shape[2:]
    # Lag l stands on the diagonal `keys - queries - l` of the matrix.
    sums = [torch.diagonal(weights, keys - queries - lag, 2, 3).sum(-1) for lag in range(1 - queries, keys)]
    return torch.stack(sums, -1) if sums else weights.new_zeros(*weights.shape[:2], 0)


def _thumbnail(weights: Tensor, spec: StatisticsSpec, asked: StatisticsTensors) -> Tensor:
    """(B, Hq, rows, columns): the weight of each query of a row on the keys of a column, summed."""
    assert asked.row_bins is not None
    rows, columns = spec.thumbnail
    keys = weights.shape[3]
    column = torch.arange(keys, device=weights.device) * columns // max(keys, 1)
    by_column = weights.new_zeros(*weights.shape[:3], columns).index_add_(3, column, weights)
    return by_column.new_zeros(*weights.shape[:2], rows, columns).index_add_(2, asked.row_bins.long(), by_column)
