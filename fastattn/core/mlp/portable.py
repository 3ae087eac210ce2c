"""The MLP in plain PyTorch: it saves what the kernels save, and recomputes the rest in the backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.mlp import definition
from fastattn.core.mlp.spec import MLPSpec, MLPWeights
from fastattn.ground.checks import lse_dtype


def forward(x: Tensor, weights: MLPWeights, spec: MLPSpec, save: bool) -> tuple[Tensor, Tensor | None]:
    saved = _pre_activations(x, weights)
    if spec.gated:
        width = weights.w_in.shape[0]
        hidden = definition.activate(saved[:, :width], spec.activation)
        hidden *= saved[:, width:]
    elif save:
        hidden = definition.activate(saved, spec.activation)
    else:
        hidden = _activate_in_place(saved, spec.activation)
    if spec.activation == "relu" and not spec.gated:
        saved = hidden  # the backward needs only its sign
    return F.linear(hidden, weights.w_out, weights.b_out), saved if save else None


def backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, saved: Tensor, wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    want_x, want_weight, want_bias, want_out, want_out_bias = wanted
    width = weights.w_in.shape[0]
    gate = saved[:, :width]
    hidden = definition.activate(gate, spec.activation)
    dhidden = dy @ weights.w_out
    if spec.gated:
        up = saved[:, width:]
        dpre = torch.cat((_activation_gradient(dhidden * up, gate, spec.activation), dhidden * hidden), 1)
        hidden *= up
    else:
        dpre = _activation_gradient(dhidden, gate, spec.activation)
    return (
        _input_gradient(dpre, weights) if want_x else None,
        dpre.t() @ x if want_weight else None,
        _column_sum(dpre) if want_bias else None,
        dy.t() @ hidden if want_out else None,
        _column_sum(dy) if want_out_bias else None,
    )


def _activate_in_place(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch._C._nn.gelu_(x)  # type: ignore[attr-defined]
    if activation == "gelu_tanh":
        return torch._C._nn.gelu_(x, approximate="tanh")  # type: ignore[attr-defined]
    if activation == "silu":
        return F.silu(x, inplace=True)
    return x.relu_().square_() if activation == "relu_squared" else x.relu_()


def _pre_activations(x: Tensor, weights: MLPWeights) -> Tensor:
    """x W_in^T + b_in, and x W_up^T + b_up beside it."""
    if weights.w_up is None:
        return F.linear(x, weights.w_in, weights.b_in)
    both = x.new_empty(x.shape[0], 2 * weights.w_in.shape[0])
    pairs = ((weights.w_in, weights.b_in), (weights.w_up, weights.b_up))
    for (weight, bias), half in zip(pairs, both.tensor_split(2, 1), strict=True):
        if bias is None:
            torch.mm(x, weight.t(), out=half)
        else:
            torch.addmm(bias, x, weight.t(), out=half)
    return both


def _activation_gradient(dhidden: Tensor, pre: Tensor, activation: str) -> Tensor:
    """dhidden act'(pre), by the functions of torch's own backward."""
    aten = torch.ops.aten
    if activation == "gelu":
        return aten.gelu_backward(dhidden, pre)
    if activation == "gelu_tanh":
        return aten.gelu_backward(dhidden, pre, approximate="tanh")
    if activation == "silu":
        return aten.silu_backward(dhidden, pre)
    if activation == "relu_squared":
        return dhidden * (2 * torch.relu(pre))
    return aten.threshold_backward(dhidden, pre, 0)


def _input_gradient(dpre: Tensor, weights: MLPWeights) -> Tensor:
    if weights.w_up is None:
        return dpre @ weights.w_in
    dgate, dup = dpre.tensor_split(2, 1)
    return torch.addmm(dgate @ weights.w_in, dup, weights.w_up)


def _column_sum(t: Tensor) -> Tensor:
    """The sum over rows, in fp32 at least."""
    return t.sum(0, dtype=lse_dtype(t.dtype)).to(t.dtype)
