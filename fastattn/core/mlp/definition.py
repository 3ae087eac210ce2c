"""The definition of the MLP in plain PyTorch: the oracle of the tests, and the reference backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.mlp.spec import MLPSpec, MLPWeights


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation, by torch's own functions."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    return F.relu(x).square() if activation == "relu_squared" else F.relu(x)


def mlp(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> Tensor:
    """hidden W_out^T + b_out, where hidden = act(x W_in^T + b_in); if gated, that times (x W_up^T + b_up).

    x (T, d), w_in and w_up (h, d), w_out (out, h); returns (T, out). A packed w_in (2h, d) holds both.
    """
    first = F.linear(x, weights.w_in, weights.b_in)
    if spec.packed:
        gate, up = spec.halves(first, 1)
        hidden = activate(gate, spec.activation) * up
    else:
        hidden = activate(first, spec.activation)
        if weights.w_up is not None:
            hidden = hidden * F.linear(x, weights.w_up, weights.b_up)
    return F.linear(hidden, weights.w_out, weights.b_out)


def mlp_backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, spec: MLPSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `mlp`, differentiable again: of x, of w_in above w_up, of b_in before b_up, of w_out and
    of b_out. Biases that are None count as zeros, so that their gradients exist."""
    zeros = x.new_zeros(weights.w_in.shape[0])
    b_in, b_up = (zeros if b is None else b for b in (weights.b_in, weights.b_up))
    filled = weights._replace(b_in=b_in, b_up=None if weights.w_up is None else b_up)
    present = [name for name, t in filled._asdict().items() if t is not None and name != "b_out"]

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        return mlp(x, filled._replace(**dict(zip(present, tensors, strict=True)), b_out=None), spec)

    dx, *gradients = torch.func.vjp(function, x, *(getattr(filled, name) for name in present))[1](dy)
    by_name = dict(zip(present, gradients, strict=True))
    dw, db = by_name["w_in"], by_name["b_in"]
    if "w_up" in by_name:
        dw, db = torch.cat((dw, by_name["w_up"])), torch.cat((db, by_name["b_up"]))
    return dx, dw, db, by_name["w_out"], dy.sum(0)


def forward(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor, tuple[Tensor, ...]]:
    return mlp(x, weights, spec), ()


def kept_empty(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor, ...]:
    """Tensors like those that `forward` keeps: none."""
    return ()


def backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, kept: Sequence[Tensor], wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    gradients = mlp_backward(dy, x, weights, spec)
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))
