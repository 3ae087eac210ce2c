"""Activations and their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl

INVERSE_SQRT_2_PI: tl.constexpr = tl.constexpr(0.3989422804014327)
MINUS_HALF_LOG2_E: tl.constexpr = tl.constexpr(-0.7213475204444817)

# The tanh form of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): u = sqrt(2 / pi) (x + 0.044715 x^3).
TWO_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(1.5957691216057308)
GELU_CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def normal_cdf(x):
    """P(Z <= x) of a standard normal, to 9e-8, and to five digits of its left tail; half the steps of erf.

    The tail's logarithm is smooth: log2 P(Z > a) is this polynomial in a, our own minimax fit on [0, 6], in which
    the highest power takes the tail to zero from there on.
    """
    a = tl.abs(x)
    log2_tail = 7.216240760e-07 - 2.324146919e-08 * a
    log2_tail = log2_tail * a - 9.567306734e-06
    log2_tail = log2_tail * a + 6.874158862e-05
    log2_tail = log2_tail * a - 2.546761534e-04
    log2_tail = log2_tail * a - 4.853718201e-05
    log2_tail = log2_tail * a + 7.002310362e-03
    log2_tail = log2_tail * a - 5.247625336e-02
    log2_tail = log2_tail * a - 4.592100680e-01
    log2_tail = log2_tail * a - 1.151105404
    tail = tl.exp2(log2_tail * a - 1.0)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def tanh_cdf(x):
    """The tanh form's stand-in for the normal CDF, (1 + tanh u) / 2, which is sigmoid(2 u)."""
    return tl.sigmoid(x * TWO_SQRT_2_OVER_PI * (1.0 + GELU_CUBIC * x * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) in float32. ReLUs let NaN through, as torch's do."""
    if ACTIVATION == "gelu":
        return x * normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        return x * tanh_cdf(x)
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "relu_squared":
        return tl.where(x < 0.0, 0.0, x * x)
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        return tl.where(x < 0.0, 0.0, x)


@triton.jit
def activate_derivative(x, ACTIVATION: tl.constexpr):
    """act'(x) in float32. For the ReLUs x may be clamped at 0, which does not change the result."""
    if ACTIVATION == "gelu":
        return normal_cdf(x) + x * INVERSE_SQRT_2_PI * tl.exp2(x * x * MINUS_HALF_LOG2_E)
    elif ACTIVATION == "gelu_tanh":
        p = tanh_cdf(x)
        # Beyond |x| = 16, where p (1 - p) is 0, the square may overflow: 0 times infinity.
        slope = TWO_SQRT_2_OVER_PI * (1.0 + 3.0 * GELU_CUBIC * tl.minimum(x * x, 256.0))
        return p + x * p * (1.0 - p) * slope
    elif ACTIVATION == "silu":
        p = tl.sigmoid(x)
        return p * (1.0 + x * (1.0 - p))
    elif ACTIVATION == "relu_squared":
        return tl.where(x > 0.0, 2.0 * x, 0.0)
    else:
        return tl.where(x > 0.0, 1.0, 0.0)
