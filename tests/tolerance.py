"""The one rule for every numerical test: be as exact as eager PyTorch.

Against float64, the error may be at most twice the error the eager computation makes in the same dtype, on the
maximum and on the mean, plus one unit in the last place of the largest and of the mean value (eager can be
exact by luck) and a few fp32 roundings of terms of order one (delta = rowsum(dout * out) and dout v^T are summed
apart, and cancel); gradients also keep their direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What cancels is a sum over the head width of products of unit normals, up to 32, where fp32 rounds to 2e-6; it is
# then multiplied by keys or queries of about 2.
TINY = 4e-6


def assert_as_exact_as_eager(
    actual: Tensor,
    exact: Tensor,
    eager: Tensor,
    *,
    gradient: bool = False,
    tiny: float = TINY,
    dtype: torch.dtype | None = None,
) -> None:
    """`actual` and `eager` in the dtype under test, `exact` the same quantity in float64. `dtype` says what the
    inputs were rounded to, if that is coarser than the result."""
    assert exact.dtype == torch.float64, "the oracle is float64"
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"dtype {actual.dtype}, eager gives {eager.dtype}"
    if actual.numel() == 0:
        return
    infinite = torch.isinf(exact)
    assert torch.equal(actual.double()[infinite], exact[infinite]), "infinities differ"
    # Any NaN left in `actual` fails the comparisons below: NaN is not <= anything.
    error = (actual.double() - exact).masked_fill(infinite, 0.0).abs()
    eager_error = (eager.double() - exact).masked_fill(infinite, 0.0).abs()
    if actual.dtype == torch.float64:
        # Nothing more exact to measure against: a few dozen roundings of the oracle's own size.
        assert error.max() <= 1e-14 * max(1.0, exact.masked_fill(infinite, 0.0).abs().max()), (
            f"error {error.max():.3e}"
        )
        return
    size = exact.masked_fill(infinite, 0.0).abs()
    for name, statistic in (("maximum", torch.max), ("mean", torch.mean)):
        ours, theirs = statistic(error), statistic(eager_error)
        unit = torch.finfo(dtype or actual.dtype).eps * statistic(size)
        bound = 2 * theirs + unit + tiny
        assert ours <= bound, f"{name} error {ours:.3e} > {bound:.3e} (eager {theirs:.3e}, unit {unit:.1e})"
    if gradient and exact.abs().max() > max(1e3 * TINY, 50 * tiny):
        cosine = torch.cosine_similarity(actual.double().flatten(), exact.flatten(), dim=0)
        assert cosine > 1 - 1e-3, f"cosine similarity {cosine:.6f} of the gradient"
