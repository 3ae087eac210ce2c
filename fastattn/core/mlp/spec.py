"""What is asked of an MLP: validated once, then frozen. Tensors travel beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fastattn.ground.checks import check_activation, check_input, check_linear, shape_of


@dataclass(frozen=True)
class MLPSpec:
    """Which MLP: y = hidden W_out^T + b_out, where hidden = act(x W_in^T + b_in), or in gated form
    act(x W_in^T + b_in) * (x W_up^T + b_up).

    activation: one of ACTIVATIONS.
    gated: whether the hidden layer has the second factor.
    """

    activation: str = "gelu"
    gated: bool = False


class MLPWeights(NamedTuple):
    """An MLP's tensors, laid out as torch.nn.Linear's: weights (out, in), biases (out,) or None.

    w_in (h, d), w_up (h, d) or None without a gate, w_out (out, h).
    """

    w_in: Tensor
    b_in: Tensor | None
    w_up: Tensor | None
    b_up: Tensor | None
    w_out: Tensor
    b_out: Tensor | None = None


def mlp_spec(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str
) -> MLPSpec:
    """Check x (..., d), w1 (h, d), b1 (h,), w2 (out, h), b2 (out,) and the activation against each other."""
    check_input(x)
    check_linear("w1", w1, "b1", b1, x, "x's width", x.shape[-1])
    check_linear("w2", w2, "b2", b2, x, "w1's rows", w1.shape[0])
    check_activation(activation)
    return MLPSpec(activation)


def gated_mlp_spec(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    activation: str,
) -> MLPSpec:
    """Check x (..., d), w_gate and w_up (h, d), w_down (out, h), their biases and the activation."""
    check_input(x)
    check_linear("w_gate", w_gate, "b_gate", b_gate, x, "x's width", x.shape[-1])
    check_linear("w_up", w_up, "b_up", b_up, x, "x's width", x.shape[-1])
    if w_up.shape[0] != w_gate.shape[0]:
        raise ValueError(f"w_up must have w_gate's shape {shape_of(w_gate)}, got {shape_of(w_up)}")
    check_linear("w_down", w_down, "b_down", b_down, x, "w_gate's rows", w_gate.shape[0])
    check_activation(activation)
    return MLPSpec(activation, gated=True)
