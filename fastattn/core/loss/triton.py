"""The way from a spec to the loss kernels' launchers, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.core.loss.definition import counted, gradient_of_rows, loss_of_rows
from fastattn.core.loss.spec import LossSpec, LossTensors
from fastattn.kernels import loss as _loss


def forward(tensors: LossTensors, spec: LossSpec) -> Tensor:
    column = _column(tensors, spec)
    found = _loss.loss_rows(tensors.x, tensors.w, tensors.b, column, _of(tensors, spec))
    log_total, own, spread, largest, entropy = found
    share = _share(tensors, column, spec)
    picked = spread + torch.where(share == 0, 0.0, share * own)
    rows = torch.stack([log_total, picked, largest, *([] if entropy is None else [entropy])])
    return torch.where(counted(tensors.target, spec), rows, 0.0)


def backward(
    drows: Tensor, tensors: LossTensors, rows: Tensor, wanted: Sequence[bool], spec: LossSpec
) -> tuple[Tensor | None, ...]:
    column, count = _column(tensors, spec), counted(tensors.target, spec)
    drows = torch.where(count, drows, 0.0)
    # Probabilities of a token that does not count are 0, too: infinite ones would make NaN of the gradient 0.
    numbers = torch.finfo(torch.float32)
    pivot = torch.where(count, rows[2].clamp(min=numbers.min), numbers.max)
    values = [pivot, rows[0].clamp(min=numbers.min), drows[0], drows[1], _share(tensors, column, spec)]
    values += [rows[3], drows[3]] if spec.entropy else []
    x, w, b, *_ = tensors
    which = wanted[0], wanted[1], wanted[2]
    return _loss.loss_gradients(x, w, b, column, torch.stack(values), _of(tensors, spec), which)


def reduced(
    tensors: LossTensors, coefficients: Tensor, wanted: Sequence[bool], spec: LossSpec
) -> tuple[Tensor | None, ...]:
    rows = forward(tensors, spec)
    loss = loss_of_rows(rows, coefficients)
    if not any(wanted):
        return loss, None, None, None
    return loss, *backward(gradient_of_rows(rows, coefficients), tensors, rows, wanted, spec)


def _of(tensors: LossTensors, spec: LossSpec) -> _loss.Loss:
    target = tensors.target if tensors.target.is_floating_point() else None
    weight = None if tensors.class_weight is None else tensors.class_weight.float().contiguous()
    options = spec.softcap, spec.temperature, spec.smoothing, spec.classes, spec.entropy
    return _loss.Loss(*options, target, weight, spec.filter)


def _column(tensors: LossTensors, spec: LossSpec) -> Tensor | None:
    if tensors.target.is_floating_point():
        return None
    return _loss.own_columns(tensors.target, spec.first, tensors.w.shape[0])


def _share(tensors: LossTensors, column: Tensor | None, spec: LossSpec) -> Tensor:
    """The weight in the loss of each token's own class (T,), but for what smoothing spreads; 0 where it is not
    here."""
    if column is None:
        return tensors.x.new_zeros(len(tensors.x), dtype=torch.float32)
    share = (column >= 0).float() * (1 - spec.smoothing)
    return share if tensors.class_weight is None else share * tensors.class_weight[column.clamp(min=0)].float()
