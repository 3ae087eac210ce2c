"""The way from a spec to the MLP kernels' launchers, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.core.mlp.spec import MLPSpec, MLPWeights
from fastattn.kernels import mlp as _mlp
from fastattn.kernels.launch.recording import record as record


def forward(x: Tensor, weights: MLPWeights, spec: MLPSpec, save: bool) -> tuple[Tensor, Tensor]:
    w_in, b_in, w_up, b_up, w_out, b_out = weights
    linears = [(w_in, b_in)] if w_up is None else [(w_in, b_in), (w_up, b_up)]
    return _mlp.mlp_forward(x, linears, w_out, b_out, spec.activation, save)


def backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, saved: Tensor, wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    first = [weights.w_in] if weights.w_up is None else [weights.w_in, weights.w_up]
    return _mlp.mlp_backward(dy, x, first, weights.w_out, saved, spec.activation, wanted)
