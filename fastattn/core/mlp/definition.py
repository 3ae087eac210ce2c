"""The definition of the MLP in plain PyTorch: the oracle of the tests, and the reference backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention.dropout import keep_mask
from fastattn.core.mlp.spec import MLPSpec, MLPWeights
from fastattn.core.norm import definition as norm_definition


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

    x (T, d), w_in and w_up (h, d), w_out (out, h); returns (T, out). A packed w_in (2h, d) holds both. A residual
    branch: residual + dropout(that of the norm of x).
    """
    residual = x if spec.residual == "x" else weights.residual
    if spec.norm:
        x = normalised(x, weights, spec)
    first = F.linear(x, weights.w_in, weights.b_in)
    if spec.packed:
        gate, up = spec.halves(first, 1)
        hidden = activate(gate, spec.activation) * up
    else:
        hidden = activate(first, spec.activation)
        if weights.w_up is not None:
            hidden = hidden * F.linear(x, weights.w_up, weights.b_up)
    y = F.linear(hidden, weights.w_out, weights.b_out)
    if spec.dropout:
        y = dropped(y, weights.dropout_state, spec.dropout)
    return y if residual is None else residual + y


def normalised(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> Tensor:
    """The norm of x (T, d), rounded once."""
    weight, bias = (None if t is None else t[None] for t in (weights.norm_weight, weights.norm_bias))
    return norm_definition.norm(x[None], None, weight, bias, spec.norm_spec)[0][0]


def dropped(y: Tensor, state: Tensor | None, dropout_p: float, first: int = 0) -> Tensor:
    """y (T, out) after dropout; its rows are the tokens from `first` on. What is kept is
    `fastattn.dropout_mask(state, dropout_p, 1, tokens, out)`."""
    return y * keep_factors(y, state, dropout_p, first)


def keep_factors(y: Tensor, state: Tensor | None, dropout_p: float, first: int) -> Tensor:
    """What dropout multiplies y (T, out) by: 0 or 1 / (1 - dropout_p)."""
    assert state is not None
    tokens = torch.arange(first, first + y.shape[0], device=y.device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=y.device)
    return keep_mask(state, head, tokens, 0, y.shape[1], dropout_p, y.dtype).mul_(1 / (1 - dropout_p))


def mlp_backward(dy: Tensor, x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor | None, ...]:
    """The gradients of `mlp`, differentiable again: of x, of w_in above w_up, of b_in before b_up, of w_out and
    of b_out, of norm_weight and norm_bias. Biases that are None count as zeros, so that their gradients exist; the
    norm's have none then."""
    zeros = x.new_zeros(weights.w_in.shape[0])
    b_in, b_up = (zeros if b is None else b for b in (weights.b_in, weights.b_up))
    filled = weights._replace(b_in=b_in, b_up=None if weights.w_up is None else b_up)
    without = ("b_out", "residual", "dropout_state")
    present = [name for name, t in filled._asdict().items() if t is not None and name not in without]

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        given = dict(zip(present, tensors, strict=True))
        return mlp(x, filled._replace(**given, b_out=None, residual=None), spec)

    dx, *gradients = torch.func.vjp(function, x, *(getattr(filled, name) for name in present))[1](dy)
    by_name = dict(zip(present, gradients, strict=True))
    dw, db = by_name["w_in"], by_name["b_in"]
    if "w_up" in by_name:
        dw, db = torch.cat((dw, by_name["w_up"])), torch.cat((db, by_name["b_up"]))
    db_out = (dropped(dy, weights.dropout_state, spec.dropout) if spec.dropout else dy).sum(0)
    return dx, dw, db, by_name["w_out"], db_out, by_name.get("norm_weight"), by_name.get("norm_bias")


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
