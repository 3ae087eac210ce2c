"""The one rule for every numerical test and every proof: be as exact as eager PyTorch.

Against float64, the error may be at most twice the error the eager computation makes in the same dtype, on the
maximum and on the mean, plus one unit in the last place of the largest and of the mean value (eager can be
exact by luck) and a few fp32 roundings of terms of order one (delta = rowsum(dout * out) and dout v^T are summed
apart, and cancel); gradients also keep their direction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# What cancels is a sum over the head width of products of unit normals, up to 32, where fp32 rounds to 2e-6; it is
# then multiplied by keys or queries of about 2.
TINY = 4e-6
# A cosine of gradients that is further from 1 than this is another direction.
DIRECTION = 1e-3


class Judgement(NamedTuple):
    """The largest error, the largest that the rule allows, and what is wrong in words; "" if the rule is kept."""

    error: float
    allowed: float
    wrong: str


def judge(
    actual: Tensor,
    exact: Tensor,
    eager: Tensor,
    *,
    gradient: bool = False,
    tiny: float = TINY,
    dtype: torch.dtype | None = None,
) -> Judgement:
    """Compare `actual` with float64.

    Args:
        actual, eager: in the dtype under test.
        exact: the same quantity in float64.
        gradient: whether the direction counts, too.
        tiny: the absolute error that is always allowed.
        dtype: what the inputs were rounded to, if that is coarser than the result.
    """
    nan = float("nan")
    if exact.dtype != torch.float64:
        return Judgement(nan, nan, f"the oracle must be float64, got {exact.dtype}")
    if actual.shape != exact.shape:
        return Judgement(nan, nan, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    if actual.dtype != eager.dtype:
        return Judgement(nan, nan, f"dtype {actual.dtype}, eager gives {eager.dtype}")
    if actual.numel() == 0:
        return Judgement(0.0, tiny, "")
    infinite = torch.isinf(exact)
    if not torch.equal(actual.double()[infinite], exact[infinite]):
        return Judgement(nan, nan, "infinities differ")
    error = (actual.double() - exact).masked_fill(infinite, 0.0).abs()
    size = exact.masked_fill(infinite, 0.0).abs()
    largest = float(error.max())
    # Comparisons are written so that NaN fails them: NaN is not <= anything.
    if actual.dtype == torch.float64:
        # Nothing more exact to measure against: a few dozen roundings of the oracle's own size.
        allowed = 1e-14 * max(1.0, float(size.max()))
        return Judgement(largest, allowed, "" if largest <= allowed else f"error {largest:.3e}")
    eager_error = (eager.double() - exact).masked_fill(infinite, 0.0).abs()
    wrong, bounds = "", []
    for name, statistic in (("maximum", torch.max), ("mean", torch.mean)):
        ours, theirs = statistic(error), statistic(eager_error)
        unit = torch.finfo(dtype or actual.dtype).eps * statistic(size)
        bounds.append(float(2 * theirs + unit + tiny))
        if not wrong and not ours <= bounds[-1]:
            wrong = f"{name} error {ours:.3e} > {bounds[-1]:.3e} (eager {theirs:.3e}, unit {unit:.1e})"
    if not wrong and gradient and size.max() > max(1e3 * TINY, 50 * tiny):
        cosine = torch.cosine_similarity(actual.double().flatten(), exact.flatten(), dim=0)
        wrong = "" if cosine > 1 - DIRECTION else f"cosine similarity {cosine:.6f} of the gradient"
    return Judgement(largest, bounds[0], wrong)
