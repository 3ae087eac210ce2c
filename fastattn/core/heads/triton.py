"""The way from a spec to the head kernels' launchers, and nothing else."""

from __future__ import annotations

from torch import Tensor

from fastattn.core.heads.spec import HeadsSpec, HeadTensors
from fastattn.kernels import heads as _heads
from fastattn.kernels.launch.recording import record as record


def forward(x: Tensor, spec: HeadsSpec, tensors: HeadTensors) -> Tensor:
    eps = spec.eps if spec.norm else None
    return _heads.prepare_heads(x, eps=eps, interleaved=spec.interleaved, **tensors._asdict())


def backward(
    dy: Tensor, x: Tensor, spec: HeadsSpec, tensors: HeadTensors
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    eps = spec.eps if spec.norm else None
    return _heads.prepare_heads_backward(dy, x, eps=eps, interleaved=spec.interleaved, **tensors._asdict())
