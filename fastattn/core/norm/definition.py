"""The definition of norms in plain PyTorch: the oracle of the tests, and the reference backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.core.norm.spec import NormSpec, Saved
from fastattn.ground.checks import lse_dtype


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y, x + residual (None without), and of each row the mean (None unless centred) and the inverse deviation.

    x and residual (B, R, W), weight and bias (B, W); in fp32 at least, rounded once.
    """
    total = x if residual is None else x + residual
    y, mean, inverse = _standardised(total, spec)
    if weight is not None:
        y = y * _multiplier(weight, y, spec)
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None]
    mean = None if mean is None else mean[..., 0]
    return y.to(x.dtype), None if residual is None else total, mean, inverse[..., 0]


def norm_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `norm`, written out so that they can be differentiated again: of x, what was normalised,
    and of weight and bias (B, W), in fp32 at least. dtotal, the gradient of the result x + residual, is added to
    dx."""
    normalised, _, inverse = _standardised(x, spec)
    gradient = dy.to(normalised.dtype)
    dweight, dbias = (gradient * normalised).sum(1), gradient.sum(1)
    if weight is not None:
        gradient = gradient * _multiplier(weight, gradient, spec)
    dx = gradient - normalised * (gradient * normalised).mean(-1, keepdim=True)
    if spec.centred:
        dx = dx - gradient.mean(-1, keepdim=True)
    dx = inverse * dx
    return (dx if dtotal is None else dx + dtotal).to(x.dtype), dweight, dbias


def _standardised(x: Tensor, spec: NormSpec) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x - mean) / deviation, in fp32 at least; the mean, or None where it counts as 0; and 1 / deviation. The
    last two are (B, R, 1)."""
    x, mean = x.to(lse_dtype(x.dtype)), None
    if spec.centred:
        mean = x.mean(-1, keepdim=True)
        x = x - mean
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps)
    return x * inverse, mean, inverse


def _multiplier(weight: Tensor, like: Tensor, spec: NormSpec) -> Tensor:
    """The factor of normalised rows: (B, 1, W)."""
    return weight.to(like.dtype)[:, None] + spec.weight_offset


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    y, total, mean, inverse = norm(x, residual, weight, bias, spec)
    return y.contiguous(), None if total is None else total.contiguous(), mean, inverse


def backward(
    dy: Tensor, dtotal: Tensor | None, saved: Saved, spec: NormSpec, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dx, dweight, dbias = norm_backward(dy, dtotal, saved.x, saved.weight, spec)
    return dx.contiguous(), dweight if wanted[0] else None, dbias if wanted[1] else None
