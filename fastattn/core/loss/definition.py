"""The definition of the loss in plain PyTorch: the oracle of the tests, and the reference backend.

A row holds, of each token's logits z with their largest, m, subtracted:
    log_total   log sum exp(z - m), so that m + log_total is the log-sum-exp
    picked      the sum of q (z - m), where q is the target, smoothed, times the classes' weights
    largest     m, which counts as constant in derivatives
    entropy     of the softmax, if it is asked for
Every loss is a sum of these. A loss of huge logits is exact, because no huge numbers are subtracted from each
other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.loss.spec import LossSpec, LossTensors
from fastattn.ground.checks import lse_dtype


def counted(target: Tensor, spec: LossSpec) -> Tensor:
    """Which tokens count: (T,). With probabilities, all."""
    if target.is_floating_point():
        return torch.ones_like(target[:, 0], dtype=torch.bool)
    return target != spec.ignore_index


def target_distribution(z: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec) -> Tensor:
    """The weight of each logit in the loss, (T, V): the target, smoothed, times the classes' weights."""
    if target.is_floating_point():
        p = target.to(z.dtype)
    else:
        p = (target[:, None] - spec.first == torch.arange(z.shape[1], device=z.device)).to(z.dtype)
    p = p * (1 - spec.smoothing) + spec.smoothing / spec.classes
    return p if class_weight is None else p * class_weight.to(z.dtype)


def rows_of_logits(z: Tensor, target: Tensor, class_weight: Tensor | None, spec: LossSpec) -> Tensor:
    """(3, T), or (4, T) with the entropy; of raw logits. Zeros for tokens that do not count."""
    z = z.to(lse_dtype(z.dtype))
    if spec.softcap:
        z = spec.softcap * torch.tanh(z / spec.softcap)
    z = z / spec.temperature
    largest = z.detach().amax(1, keepdim=True)
    # Of -inf minus -inf, NaN, the pivot 0 makes -inf. A token may have no other logits among some of the classes.
    nothing = largest == float("-inf")
    z = z - largest.masked_fill(nothing, 0.0)
    log_total = torch.logsumexp(z.masked_fill(nothing, 0.0), 1, keepdim=True).masked_fill(nothing, float("-inf"))
    q = target_distribution(z, target, class_weight, spec)
    found = [log_total[:, 0], torch.where(q == 0, 0.0, q * z).sum(1), largest[:, 0]]
    if spec.entropy:
        gone = z == float("-inf")
        log_p = (z - log_total.masked_fill(nothing, 0.0)).masked_fill(gone, 0.0)
        found.append(-(log_p.exp().masked_fill(gone, 0.0) * log_p).sum(1))
    return torch.where(counted(target, spec), torch.stack(found), 0.0)


def rows(tensors: LossTensors, spec: LossSpec) -> Tensor:
    return rows_of_logits(F.linear(tensors.x, tensors.w, tensors.b), tensors.target, tensors.class_weight, spec)


def row_gradients(drows: Tensor, tensors: LossTensors, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `rows`, differentiable again: of x, w and b. A bias that is None counts as zeros, so that
    its gradient exists."""
    b = tensors.w.new_zeros(tensors.w.shape[0]) if tensors.b is None else tensors.b

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return rows(tensors._replace(x=x, w=w, b=b), spec)

    return torch.func.vjp(function, tensors.x, tensors.w, b)[1](drows)


def log_sum_exp(rows: Tensor) -> Tensor:
    return rows[0] + rows[2]


def losses_of_rows(rows: Tensor, coefficients: Tensor) -> Tensor:
    """a log_total - s picked + z (log-sum-exp)^2 of each token. `coefficients` (3, T): a, s and z."""
    linear, share, square = coefficients
    return linear * rows[0] - share * rows[1] + square * log_sum_exp(rows).square()


def loss_of_rows(rows: Tensor, coefficients: Tensor) -> Tensor:
    return losses_of_rows(rows, coefficients).sum()


def gradient_of_rows(rows: Tensor, coefficients: Tensor) -> Tensor:
    """The gradient of `loss_of_rows` (3, T)."""
    linear, share, square = coefficients
    return torch.stack((linear + 2 * square * log_sum_exp(rows), -share, torch.zeros_like(share)))


def forward(tensors: LossTensors, spec: LossSpec) -> Tensor:
    return rows(tensors, spec)


def backward(
    drows: Tensor, tensors: LossTensors, rows: Tensor, wanted: Sequence[bool], spec: LossSpec
) -> tuple[Tensor | None, ...]:
    gradients = row_gradients(drows, tensors, spec)
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


def reduced(
    tensors: LossTensors, coefficients: Tensor, wanted: Sequence[bool], spec: LossSpec
) -> tuple[Tensor | None, ...]:
    found = rows(tensors, spec)
    gradients = backward(gradient_of_rows(found, coefficients), tensors, found, wanted, spec)
    return loss_of_rows(found, coefficients), *gradients
