"""Norms in plain PyTorch: PyTorch's own norms where they compute the same, else the definition."""

from __future__ import annotations

from torch import Tensor

from fastattn.core.norm import definition, torch_norm
from fastattn.core.norm.spec import NormSpec, Saved


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    if not torch_norm.serves(x, weight, bias, spec):
        return definition.forward(x, residual, weight, bias, spec)
    total = None if residual is None else (x + residual).contiguous()
    y, mean, inverse = torch_norm.forward(x if total is None else total, weight, bias, spec)
    return y, total, mean, inverse


def backward(
    dy: Tensor, dtotal: Tensor | None, saved: Saved, spec: NormSpec, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not torch_norm.serves(saved.x, saved.weight, None, spec):
        return definition.backward(dy, dtotal, saved, spec, wanted)
    dx, dweight, dbias = torch_norm.backward(dy, saved, spec, wanted)
    return dx if dtotal is None else dx + dtotal, dweight, dbias
