"""The MLP in plain PyTorch.

By default it keeps what eager keeps: to compute an activation again takes a CPU a tenth of the forward and
backward. Asked to keep less, it keeps what the kernels keep, and computes the rest again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.mlp import chunks, definition, int8
from fastattn.core.mlp.chunks import Kept, Steps, column_sum, pre_activations, pre_count
from fastattn.core.mlp.spec import MLPSpec, MLPWeights
from fastattn.core.norm import portable as norm
from fastattn.core.norm.spec import Saved

RELUS = ("relu", "relu_squared")


def forward(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor, Kept]:
    return chunks.forward(STEPS, x, weights, spec)


def backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, kept: Kept, wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    return chunks.backward(STEPS, dy, x, weights, kept, wanted, spec)


def is_composed(x: Tensor, spec: MLPSpec) -> bool:
    """Whether the definition, differentiated by autograd, has the bits of this backend and keeps no more. It then
    takes less time, because autograd's backward is not in Python.

    Not of a squared ReLU, of which autograd keeps the hidden layer, too; nor on a GPU, where a product and a sum
    are one call here, and where half precision is rounded less often than autograd rounds it.
    """
    alone = not (spec.norm or spec.dropout or spec.residual or spec.chunk)
    keeps_more = spec.activation == "relu_squared" and not spec.gated
    return not x.is_cuda and alone and spec.save == "auto" and not keeps_more


def kept_empty(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> Kept:
    """Tensors like those that `forward` keeps, without values."""
    width = weights.w_out.shape[1]
    if spec.save == "nothing":
        return ()
    if spec.save == "int8":
        return int8.empty(x, width, 2 if spec.gated else 1)
    widths = [2 * width] if spec.packed else [width, width] if spec.gated else [width]
    if spec.save == "auto" and spec.gated:
        widths += [width, width]
    elif spec.save == "auto" and spec.activation not in RELUS:
        widths += [width]
    return tuple(x.new_empty(x.shape[0], w) for w in widths)


def _hidden(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor, Kept]:
    """The hidden layer, and what is kept of it."""
    pre = _products(_normalised(x, weights, spec)[0] if spec.norm else x, weights)
    gate, up = pre_activations(pre, spec)
    if spec.save == "nothing":
        hidden = _activate_in_place(gate, spec.activation)
        return (hidden if up is None else hidden.mul_(up)), ()
    if up is None and spec.activation in RELUS:
        # Its sign says where the derivative is zero, and the derivative of the square is twice this.
        gate.relu_()
        hidden = gate if spec.activation == "relu" else gate.square()
        return hidden, (gate,) if spec.save != "int8" else _quantised(gate, None, spec)
    active = definition.activate(gate, spec.activation)
    if spec.save == "auto":
        hidden = active if up is None else active * up
        return hidden, (*pre, hidden) if up is None else (*pre, active, hidden)
    hidden = active if up is None else active.mul_(up)
    return hidden, _quantised(gate, up, spec) if spec.save == "int8" else pre


def _output(
    hidden: Tensor, x: Tensor, weights: MLPWeights, spec: MLPSpec, first: int, out: Tensor | None
) -> Tensor:
    w_out, b_out = weights.w_out, weights.b_out
    if out is None:
        y = F.linear(hidden, w_out, b_out)
    elif b_out is None:
        y = torch.mm(hidden, w_out.t(), out=out)
    else:
        y = torch.addmm(b_out, hidden, w_out.t(), out=out)
    if spec.dropout:
        y.mul_(definition.keep_factors(y, weights.dropout_state, spec.dropout, first))
    residual = x if spec.residual == "x" else weights.residual
    return y if residual is None else y.add_(residual)


def _dropped(dy: Tensor, weights: MLPWeights, spec: MLPSpec, first: int) -> Tensor:
    return definition.dropped(dy, weights.dropout_state, spec.dropout, first)


def _normalised(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor, tuple]:
    weight, bias = (None if t is None else t[None] for t in (weights.norm_weight, weights.norm_bias))
    y, _, *moments = norm.forward(x[None], None, weight, bias, spec.norm_spec)
    return y[0], tuple(moments)


def _norm_gradient(
    dy: Tensor, dresidual: Tensor | None, saved: tuple, spec: MLPSpec, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    return norm.backward(dy, dresidual, Saved(*saved), spec.norm_spec, wanted)


def _recalled(
    x: Tensor, normalised: Tensor, weights: MLPWeights, kept: Kept, spec: MLPSpec
) -> tuple[Tensor, tuple]:
    """The hidden layer, and gate, up and act(gate) for its gradient. Gate comes without its negative numbers where
    the square of a ReLU is taken, and where it is the only one."""
    found = kept or _products(normalised, weights)
    gate, up = pre_activations(found, spec)
    if found[0].dtype == torch.int8:
        gate, up = _restored(gate, up, found[1], x.dtype, spec)
    if up is not None and spec.activation == "relu_squared":
        gate = gate.relu()
    if found[0].dtype != torch.int8 and (more := found[pre_count(found, spec) :]):
        return more[-1], (gate, up, more[0])
    if up is None and spec.activation in RELUS:
        gate = gate if kept else gate.relu_()
        return gate if spec.activation == "relu" else gate.square(), (gate, None, None)
    active = definition.activate(gate, spec.activation)
    return (active, (gate, None, None)) if up is None else (active * up, (gate, up, active))


def _gradient(
    dy: Tensor, state: tuple, weights: MLPWeights, want_hidden: bool, want_bias: bool, spec: MLPSpec
) -> tuple[list[Tensor], Tensor | None, None]:
    gate, up, active = state
    dhidden = dy @ weights.w_out
    if not spec.gated:
        dpres = [_activation_gradient(dhidden, gate, spec.activation)]
    elif spec.packed:
        dpre = dhidden.new_empty(len(dhidden), 2 * dhidden.shape[1])
        dgate, dup = spec.halves(dpre, 1)
        torch.mul(dhidden, active, out=dup)
        _activation_gradient(dhidden.mul_(up), gate, spec.activation, dgate)
        dpres = [dpre]
    else:
        dup = dhidden * active
        dpres = [_activation_gradient(dhidden.mul_(up), gate, spec.activation), dup]
    db = None
    if want_bias:
        sums = [column_sum(dpre, spec) for dpre in dpres]
        db = sums[0] if len(sums) == 1 else torch.cat(sums)
    return dpres, db, None


STEPS = Steps(_hidden, _output, _dropped, _normalised, _recalled, _gradient, _norm_gradient)


def _products(x: Tensor, weights: MLPWeights) -> Kept:
    """x W_in^T + b_in, and x W_up^T + b_up if there is one."""
    first = F.linear(x, weights.w_in, weights.b_in)
    return (first,) if weights.w_up is None else (first, F.linear(x, weights.w_up, weights.b_up))


def _quantised(gate: Tensor, up: Tensor | None, spec: MLPSpec) -> Kept:
    codes, scales = int8.empty(gate, gate.shape[1], 1 if up is None else 2)
    pairs = [(codes, scales)] if up is None else zip(spec.halves(codes, 1), spec.halves(scales, 1), strict=True)
    keep_sign = spec.activation in RELUS
    for t, pair, sign in zip((gate, up), pairs, (keep_sign, False), strict=False):
        assert t is not None
        int8.quantised(t, sign, *pair)
    return codes, scales


def _restored(gate: Tensor, up: Tensor | None, scales: Tensor, dtype: torch.dtype, spec: MLPSpec) -> tuple:
    if up is None:
        return int8.restored(gate, scales, dtype), None
    return tuple(int8.restored(*pair, dtype) for pair in zip((gate, up), spec.halves(scales, 1), strict=True))


def _activate_in_place(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch._C._nn.gelu_(x)  # type: ignore[attr-defined]
    if activation == "gelu_tanh":
        return torch._C._nn.gelu_(x, approximate="tanh")  # type: ignore[attr-defined]
    if activation == "silu":
        return F.silu(x, inplace=True)
    return x.relu_().square_() if activation == "relu_squared" else x.relu_()


def _activation_gradient(dhidden: Tensor, pre: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """dhidden act'(pre), by the functions of torch's own backward; in `out` if it is given."""
    aten = torch.ops.aten
    out = torch.empty_like(dhidden) if out is None else out
    if activation == "relu_squared":
        aten.threshold_backward.grad_input(dhidden, pre, 0, grad_input=out)
        return out.mul_(2).mul_(pre)
    if activation == "relu":
        return aten.threshold_backward.grad_input(dhidden, pre, 0, grad_input=out)
    if activation == "silu":
        return aten.silu_backward.grad_input(dhidden, pre, grad_input=out)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return aten.gelu_backward.grad_input(dhidden, pre, approximate=approximate, grad_input=out)
