"""The way from a spec to the statistics kernels' launchers, and nothing else.

Single weights have no kernel: they are few, and the portable tiles that have one are computed on the same device.
"""

from __future__ import annotations

from torch import Tensor

from fastattn.core.attention.spec import ScoreTensors
from fastattn.core.layout import in_eights
from fastattn.core.statistics.portable import gather  # noqa: F401
from fastattn.core.statistics.spec import StatisticsSpec, StatisticsTensors, empty_results
from fastattn.kernels.attention import statistics as _statistics
from fastattn.masks.lists import unpacked


def sweep(
    q: Tensor, k: Tensor, lse: Tensor, spec: StatisticsSpec, asked: StatisticsTensors, tensors: ScoreTensors
) -> dict[str, Tensor]:
    results = empty_results(spec, q, k)
    layout = spec.attention.mask
    lists = None if tensors.mask is None or layout is None else unpacked(tensors.mask, layout)
    _statistics.attention_statistics(in_eights(q), in_eights(k), lse, spec, asked, tensors, lists, results)
    return results
