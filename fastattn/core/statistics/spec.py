"""What is asked of a pattern of attention: validated once, then frozen.

The pattern of a head is P_ij = exp(s_ij - lse_i), where the scores s and their log-sum-exps are attention's. All
statistics are sums or maxima over it, so they are made tile by tile and P is never stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.core.attention.spec import AttentionSpec
from fastattn.ground import arguments
from fastattn.ground.checks import check_beside, check_floating, lse_dtype, shape_of

# What a user may want, by what it has a value for.
BY_QUERY = (
    "entropy",
    "max_logit",
    "max_weight",
    "sum_of_squares",
    "mean_distance",
    "top_keys",
    "mass",
    "value_norm",
    "match_mass",
)
BY_KEY = ("received", "max_received", "weighted_received", "received_value_norm")
WHOLE = ("lag_profile", "thumbnail")
NAMES = (*BY_QUERY, *BY_KEY, *WHOLE)

# What the backends sum up, from which the rest follows without looking at the scores again.
SUMS_BY_QUERY = ("mass", "entropy", "max_logit", "sum_of_squares", "mean_distance", "value_norm", "match_mass")
SUMS_BY_KEY = ("received", "max_received", "weighted_received")
SUMS = (*SUMS_BY_QUERY, "top_keys", *SUMS_BY_KEY, *WHOLE)


@dataclass(frozen=True)
class StatisticsSpec:
    """Which statistics of which attention.

    attention: the scores; without dropout.
    want: names among SUMS, in their order.
    rows: from which query to before which one; queries outside of it have the log-sum-exp +inf, so weigh nothing.
    top: how many keys of each query top_keys are.
    thumbnail: rows and columns.
    before: of each kind of match, how many keys before the query's diagonal a key stands at least.
    """

    attention: AttentionSpec
    want: tuple[str, ...]
    rows: tuple[int, int]
    top: int = 0
    thumbnail: tuple[int, int] = (0, 0)
    before: tuple[int, ...] = ()

    @property
    def options(self) -> tuple[list[str], list[int]]:
        """As an operator takes them, before those of attention."""
        return list(self.want), [*self.rows, self.top, *self.thumbnail, *self.before]


class StatisticsTensors(NamedTuple):
    """What statistics take beside q, k, lse and what shapes the scores; None where it is not asked for.

    query_weights: (B, Hq, Lq) in lse's dtype; what each query counts in weighted_received.
    value_norms: (B, Hq, Lk) in lse's dtype.
    query_labels, key_labels: int32 (kinds, B, Lq) and (kinds, B, Lk); they match where they are equal.
    row_bins: int32 (Lq,), the row of the thumbnail that each query belongs to.
    remainder: (B, Hq, Lq) in lse's dtype; what the log-sum-exps lost by rounding, in nats, 0 unless they are huge.
        Only where floats are added to the scores.
    """

    query_weights: Tensor | None = None
    value_norms: Tensor | None = None
    query_labels: Tensor | None = None
    key_labels: Tensor | None = None
    row_bins: Tensor | None = None
    remainder: Tensor | None = None


class WeightsAsked(NamedTuple):
    """The pairs of a query and a key whose weights are asked for, int64 (n,) each, and the remainder as above."""

    rows: Tensor
    columns: Tensor
    remainder: Tensor | None = None


class TopKeys(NamedTuple):
    """The keys with the largest weights, descending: keys int64 and weights (B, Hq, Lq, top). Where a query sees
    fewer, keys are -1 and weights 0."""

    keys: Tensor
    weights: Tensor


class Matches(NamedTuple):
    """Weight on the keys whose labels match: mass (B, Hq, Lq), and whether any key does, bool (B, Lq)."""

    mass: Tensor
    possible: Tensor


class Result(NamedTuple):
    """The layout of one of SUMS: whether it has a value for each of the "rows" or "columns" of the scores, or is
    of the "whole"; its shape; and its value before anything is added."""

    falls: str
    shape: tuple[int, ...]
    start: float = 0.0
    integers: bool = False


def results(spec: StatisticsSpec, q: Tensor, k: Tensor) -> dict[str, Result]:
    """What the backends return, by name; top_keys are two, the weights and then the keys."""
    batch, heads, queries = q.shape[:3]
    keys, rows, columns = k.shape[2], (batch, heads, queries), (batch, heads, k.shape[2])
    every = {name: Result("rows", rows) for name in SUMS_BY_QUERY}
    every["max_logit"] = Result("rows", rows, float("-inf"))
    every["match_mass"] = Result("rows", (len(spec.before), *rows))
    every["top_keys"] = Result("rows", (*rows, spec.top))
    every["top_key_numbers"] = Result("rows", (*rows, spec.top), -1, integers=True)
    every |= {name: Result("columns", columns) for name in SUMS_BY_KEY}
    # Lags from -(Lq - 1) to Lk - 1.
    every["lag_profile"] = Result("whole", (batch, heads, max(queries + keys - 1, 0)))
    every["thumbnail"] = Result("whole", (batch, heads, *spec.thumbnail))
    names = [n for name in spec.want for n in ((name, "top_key_numbers") if name == "top_keys" else (name,))]
    return {name: every[name] for name in names}


def empty_results(spec: StatisticsSpec, q: Tensor, k: Tensor) -> dict[str, Tensor]:
    """Tensors for the results, with the values that they start from."""
    work = lse_dtype(q.dtype)
    return {
        name: q.new_full(r.shape, r.start, dtype=torch.int64 if r.integers else work)
        for name, r in results(spec, q, k).items()
    }


# ---- checks of what users pass ----


def check_want(want: str | Iterable[str]) -> tuple[str, ...]:
    """The names, in the order given, each once."""
    if isinstance(want, str):
        want = (want,)
    if not isinstance(want, Iterable):
        raise TypeError(f"want must be names of statistics, got {type(want).__name__}")
    names = tuple(want)
    for name in names:
        if not isinstance(name, str) or name not in NAMES:
            raise ValueError(f"want must be names among {', '.join(NAMES)}; got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"want must be one or more names, each once; got {list(names)}")
    return names


def check_lse(lse: Tensor, q: Tensor) -> None:
    arguments.tensor("lse", lse)
    if lse.dtype != lse_dtype(q.dtype):
        raise TypeError(f"lse must be {lse_dtype(q.dtype)} for q of {q.dtype}, got {lse.dtype}")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must have shape {tuple(q.shape[:3])}, got {shape_of(lse)}")
    if lse.device != q.device:
        raise ValueError(f"lse must be on q's device {q.device}, got {lse.device}")


def check_query_weights(weights: Tensor, q: Tensor, count: int) -> Tensor:
    """Weights that broadcast to (B, Hq, queries)."""
    check_beside("query_weights", weights, q, None)
    check_floating("query_weights", weights)
    full = (*q.shape[:2], count)
    if weights.dim() > 3 or any(w not in (1, f) for w, f in zip(weights.shape[::-1], full[::-1], strict=False)):
        raise ValueError(
            f"query_weights must broadcast to (batch, heads, queries) = {full}, got {shape_of(weights)}"
        )
    return weights.detach().to(lse_dtype(q.dtype)).expand(full)


def check_thumbnail(size: Any) -> tuple[int, int]:
    """Rows and columns; one number stands for both."""
    if isinstance(size, int):
        size = (size, size)
    rows, columns = arguments.pair("thumbnail", size)
    return arguments.integer("thumbnail", rows, least=1), arguments.integer("thumbnail", columns, least=1)
