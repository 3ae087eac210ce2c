"""The way from a spec to the MLP kernels' launchers, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.core.mlp import chunks
from fastattn.core.mlp.chunks import Kept, Steps, pre_activations
from fastattn.core.mlp.spec import MLPSpec, MLPWeights
from fastattn.kernels import mlp as _mlp
from fastattn.kernels.launch.recording import record as record
from fastattn.kernels.mlp import GradientTask, Layer


def forward(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor, Kept]:
    return chunks.forward(STEPS, x, weights, spec)


def backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, kept: Kept, wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    return chunks.backward(STEPS, _mlp.as_operand(dy), x, weights, kept, wanted, spec)


def kept_empty(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> Kept:
    """Tensors like those that `forward` keeps, without values."""
    return _mlp.kept_empty(x, _layer(weights, spec), spec.save)


def _layer(weights: MLPWeights, spec: MLPSpec) -> Layer:
    w_in, b_in, w_up, b_up, w_out, _ = weights
    linears = [(w_in, b_in)] if w_up is None else [(w_in, b_in), (w_up, b_up)]
    return Layer(linears, spec.packed, spec.activation, w_out.shape[1])


def _hidden(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor, Kept]:
    keep = "preactivation" if spec.save == "auto" else spec.save
    return _mlp.hidden_forward(x, _layer(weights, spec), keep)


def _recalled(x: Tensor, weights: MLPWeights, kept: Kept, spec: MLPSpec) -> tuple[Tensor | None, tuple]:
    """The hidden layer again if nothing was kept, and gate, up and their scales."""
    hidden = None
    if not kept:
        hidden, kept = _mlp.hidden_forward(x, _layer(weights, spec), "preactivation")
    gate, up = pre_activations(kept, spec)
    if kept[0].dtype.is_floating_point:
        return hidden, (gate, up, None, None)
    return hidden, (gate, up, *(spec.halves(kept[1], 1) if spec.gated else (kept[1], None)))


def _gradient(
    dy: Tensor, state: tuple, weights: MLPWeights, want_hidden: bool, want_bias: bool, spec: MLPSpec
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    task = GradientTask(want_hidden, want_bias, spec.match_eager)
    hidden, dpre, db = _mlp.hidden_backward(dy, weights.w_out, state, _layer(weights, spec), task)
    return [dpre], db, hidden


STEPS = Steps(_hidden, _recalled, _gradient)
