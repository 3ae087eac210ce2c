"""The way from a spec to the MLP kernels' launchers, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.core.mlp import chunks
from fastattn.core.mlp.chunks import Kept, Steps, pre_activations
from fastattn.core.mlp.spec import ALWAYS, MLPSpec, MLPWeights
from fastattn.kernels import whole_mlp
from fastattn.kernels.launch.recording import record as record
from fastattn.kernels.mlp import forward as first_product
from fastattn.kernels.mlp import output as second_product
from fastattn.kernels.mlp.backward import GradientTask, hidden_backward
from fastattn.kernels.mlp.folded_norm import Norm
from fastattn.kernels.mlp.output import After
from fastattn.kernels.mlp.problem import Dropout, Layer, as_operand
from fastattn.kernels.norm import norm_backward


def forward(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor, Kept]:
    if spec.whole == ALWAYS:
        return whole_mlp.whole_forward(x, _layer(weights, spec), weights.w_out, weights.b_out), ()
    return chunks.forward(STEPS, x, weights, spec)


def backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, kept: Kept, wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    dy = as_operand(dy)
    if spec.whole == ALWAYS and not kept:
        return _whole_backward(dy, x, weights, wanted, spec)
    return chunks.backward(STEPS, dy, x, weights, kept, wanted, spec)


def _whole_backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    want_x, *want_weights, want_out_bias, _, _ = wanted
    layer = _layer(weights, spec)
    dx = whole_mlp.whole_input_gradient(dy, x, layer, weights.w_out) if want_x else None
    found = whole_mlp.whole_weight_gradients(dy, x, layer, weights.w_out, want_weights)
    db_out = chunks.column_sum(dy, spec).to(x.dtype) if want_out_bias else None
    return dx, *found, db_out, None, None


def computes_whole(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> bool:
    """Whether one kernel can compute the whole layer, at its full speed."""
    return whole_mlp.fits(x, _layer(weights, spec), weights.w_out)


def gains_whole(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> bool:
    """Whether by counting it is then faster than the kernels that store the hidden layer."""
    return whole_mlp.pays(x, weights.w_out)


def kept_empty(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> Kept:
    """Tensors like those that `forward` keeps, without values."""
    if spec.whole == ALWAYS:
        return ()
    return first_product.kept_empty(x, _layer(weights, spec), spec.save)


def _layer(weights: MLPWeights, spec: MLPSpec) -> Layer:
    w_in, b_in, w_up, b_up, w_out, *_ = weights
    linears = [(w_in, b_in)] if w_up is None else [(w_in, b_in), (w_up, b_up)]
    return Layer(linears, spec.packed, spec.activation, w_out.shape[1])


def _norm(weights: MLPWeights, spec: MLPSpec) -> Norm | None:
    if not spec.norm:
        return None
    return Norm(weights.norm_weight, weights.norm_bias, spec.norm == "layer", spec.norm_eps)


def _hidden(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor, Kept]:
    keep = "preactivation" if spec.save == "auto" else spec.save
    return first_product.hidden_forward(x, _layer(weights, spec), keep, norm=_norm(weights, spec))


def _output(
    hidden: Tensor, x: Tensor, weights: MLPWeights, spec: MLPSpec, first: int, out: Tensor | None
) -> Tensor:
    residual = x if spec.residual == "x" else weights.residual
    after = After(residual, _dropout(weights, spec, first), spec.match_eager)
    return second_product.output_forward(hidden, weights.w_out, weights.b_out, after, out)


def _dropout(weights: MLPWeights, spec: MLPSpec, first: int) -> Dropout | None:
    if not spec.dropout:
        return None
    assert weights.dropout_state is not None
    threshold = round(spec.dropout * 2**16)
    return Dropout(weights.dropout_state.contiguous(), threshold, 1 / (1 - spec.dropout), first)


def _dropped(dy: Tensor, weights: MLPWeights, spec: MLPSpec, first: int) -> Tensor:
    return second_product.output_pass(dy, After(dropout=_dropout(weights, spec, first)))


def _normalised(x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor, tuple]:
    norm = _norm(weights, spec)
    assert norm is not None
    y, *moments = norm.of(x)
    return y, tuple(moments)


def _norm_gradient(
    dy: Tensor, dresidual: Tensor | None, saved: tuple, spec: MLPSpec, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    return norm_backward(dy, dresidual, saved, wanted=wanted)


def _recalled(
    x: Tensor, normalised: Tensor, weights: MLPWeights, kept: Kept, spec: MLPSpec
) -> tuple[Tensor | None, tuple]:
    """The hidden layer again if nothing was kept, and gate, up and their scales."""
    hidden = None
    if not kept:
        hidden, kept = first_product.hidden_forward(
            x, _layer(weights, spec), "preactivation", norm=_norm(weights, spec), normalised=normalised
        )
    gate, up = pre_activations(kept, spec)
    if kept[0].dtype.is_floating_point:
        return hidden, (gate, up, None, None)
    return hidden, (gate, up, *(spec.halves(kept[1], 1) if spec.gated else (kept[1], None)))


def _gradient(
    dy: Tensor, state: tuple, weights: MLPWeights, want_hidden: bool, want_bias: bool, spec: MLPSpec
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    task = GradientTask(want_hidden, want_bias, spec.match_eager)
    hidden, dpre, db = hidden_backward(dy, weights.w_out, state, _layer(weights, spec), task)
    return [dpre], db, hidden


STEPS = Steps(_hidden, _output, _dropped, _normalised, _recalled, _gradient, _norm_gradient)
