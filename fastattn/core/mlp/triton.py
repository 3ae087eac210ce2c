"""The way from a spec to the MLP kernels' launchers, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.core.mlp.spec import MLPSpec, MLPWeights
from fastattn.kernels import mlp as _mlp


def forward(x: Tensor, weights: MLPWeights, spec: MLPSpec, save: bool) -> tuple[Tensor, Tensor]:
    w_in, b_in, w_up, b_up, w_out, b_out = weights
    if w_up is None:
        return _mlp.mlp_forward(x, w_in, b_in, w_out, b_out, spec.activation, save)
    return _mlp.gated_mlp_forward(x, w_in, b_in, w_up, b_up, w_out, b_out, spec.activation, save)


def backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, saved: Tensor, wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    w_in, _, w_up, _, w_out, _ = weights
    if w_up is None:
        return _mlp.mlp_backward(dy, x, w_in, w_out, saved, spec.activation, wanted)
    return _mlp.gated_mlp_backward(dy, x, w_in, w_up, w_out, saved, spec.activation, wanted)
