"""The operators of statistics, as torch knows them: opaque, with fake kernels and vmap; without gradient.

`fastattn::attention_statistics` returns a tensor for each of the sums asked for, in the order of
`fastattn.core.statistics.spec.results`; `fastattn::attention_weights` single weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from fastattn.core import backends, capabilities
from fastattn.core.attention.spec import SCORES, AttentionSpec, ScoreTensors, put_together
from fastattn.core.capabilities import FORWARD, Request
from fastattn.core.mapped import one_by_one
from fastattn.core.statistics.spec import StatisticsSpec, StatisticsTensors, WeightsAsked, empty_results, results

_operators = library.Library("fastattn", "FRAGMENT")
_ASKED = ", ".join(f"Tensor? {name}" for name in StatisticsTensors._fields)
_operators.define(
    f"attention_statistics(Tensor q, Tensor k, Tensor lse, {_ASKED}, str[] want, SymInt[] sizes, {SCORES}) "
    "-> Tensor[]"
)
_operators.define(
    "attention_weights(Tensor q, Tensor k, Tensor lse, Tensor rows, Tensor columns, Tensor? remainder, "
    f"{SCORES}) -> Tensor"
)
_STATISTICS, _WEIGHTS = "fastattn::attention_statistics", "fastattn::attention_weights"


def _statistics(q, k, lse, *rest) -> list[Tensor]:
    asked, spec, tensors, backend = _taken_apart(rest, q, k)
    request = Request("statistics", spec, (q, k, k), score_tensors=tensors)
    chosen = capabilities.choose(request, FORWARD, backend)
    found = backends.load("statistics", chosen).sweep(q, k, lse, spec, asked, tensors)
    # The schema promises tensors of their own, in one order.
    return [found[name].contiguous() for name in results(spec, q, k)]


def _weights(q, k, lse, rows, columns, remainder, *rest) -> Tensor:
    tensors, attention, backend = put_together(rest)
    attention = attention.at(q.shape[2], k.shape[2])
    request = Request(
        "statistics", StatisticsSpec(attention, ("gather",), (0, 0)), (q, k, k), score_tensors=tensors
    )
    chosen = capabilities.choose(request, FORWARD, backend)
    pairs = WeightsAsked(rows, columns, remainder)
    return backends.load("statistics", chosen).gather(q, k, lse, pairs, attention, tensors)


def _taken_apart(
    rest: Sequence, q: Tensor, k: Tensor
) -> tuple[StatisticsTensors, StatisticsSpec, ScoreTensors, str | None]:
    """What the operator takes from query_weights on, as the backends take it."""
    count = len(StatisticsTensors._fields)
    want, (first, stop, top, height, width, *before) = rest[count : count + 2]
    tensors, attention, backend = put_together(rest[count + 2 :])
    attention = attention.at(q.shape[2], k.shape[2])
    spec = StatisticsSpec(attention, tuple(want), (first, stop), top, (height, width), tuple(before))
    return StatisticsTensors(*rest[:count]), spec, tensors, backend


_operators.impl("attention_statistics", _statistics, "CompositeExplicitAutograd")
_operators.impl("attention_weights", _weights, "CompositeExplicitAutograd")


@library.register_fake(_STATISTICS, lib=_operators)
def _statistics_fake(q, k, lse, *rest):
    _, spec, _, _ = _taken_apart(rest, q, k)
    return list(empty_results(spec, q, k).values())


@library.register_fake(_WEIGHTS, lib=_operators)
def _weights_fake(q, k, lse, rows, *_):
    return lse.new_empty((*q.shape[:2], rows.shape[0]))


def statistics(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    asked: StatisticsTensors,
    spec: StatisticsSpec,
    tensors: ScoreTensors,
    backend: str | None,
) -> dict[str, Tensor]:
    """The results by name."""
    found = torch.ops.fastattn.attention_statistics(
        q, k, lse, *asked, *spec.options, *tensors, *spec.attention.options, backend
    )
    return dict(zip(results(spec, q, k), found, strict=True))


def weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    pairs: WeightsAsked,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    backend: str | None,
) -> Tensor:
    """The weights of the pairs (rows[n], columns[n]): (B, Hq, n)."""
    return torch.ops.fastattn.attention_weights(q, k, lse, *pairs, *tensors, *spec.options, backend)


@library.register_vmap(_STATISTICS, lib=_operators)
def _statistics_vmap(info: Any, in_dims: tuple, *arguments):
    found, dims = one_by_one(torch.ops.fastattn.attention_statistics, info.batch_size, in_dims, arguments)
    return list(found), list(dims)


@library.register_vmap(_WEIGHTS, lib=_operators)
def _weights_vmap(info: Any, in_dims: tuple, *arguments):
    def operator(*chosen):
        return (torch.ops.fastattn.attention_weights(*chosen),)

    found, dims = one_by_one(operator, info.batch_size, in_dims, arguments)
    return found[0], dims[0]
