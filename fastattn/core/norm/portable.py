"""Norms in plain PyTorch: torch's own operators where they compute the same, else the definition."""

from __future__ import annotations

from torch import Tensor

from fastattn.core.norm import definition
from fastattn.core.norm import torch_norm as torch_norms
from fastattn.core.norm.spec import NormSpec


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    if not torch_norms.serve(x, weight, bias, spec):
        return definition.forward(x, residual, weight, bias, spec)
    total = None if residual is None else (x + residual).contiguous()
    y, mean, inverse = torch_norms.forward(x if total is None else total, weight, bias, spec)
    return y, total, mean, inverse


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    inverse: Tensor,
    spec: NormSpec,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not torch_norms.serve(x, weight, None, spec):
        return definition.backward(dy, dtotal, x, weight, mean, inverse, spec, wanted)
    dx, dweight, dbias = torch_norms.backward(dy, x, weight, mean, inverse, spec, wanted)
    return dx if dtotal is None else dx + dtotal, dweight, dbias
