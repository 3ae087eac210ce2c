"""The way from a spec to the norm kernels' launchers, and nothing else."""

from __future__ import annotations

from torch import Tensor

from fastattn.core.norm.spec import NormSpec, Saved
from fastattn.kernels import norm as _norm
from fastattn.kernels.launch.recording import record as record


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    centred, eps, offset = spec.options
    return _norm.norm_forward(x, residual, weight, bias, centred=centred, eps=eps, offset=offset)


def backward(
    dy: Tensor, dtotal: Tensor | None, saved: Saved, spec: NormSpec, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return _norm.norm_backward(dy, dtotal, saved, offset=spec.weight_offset, wanted=wanted)
