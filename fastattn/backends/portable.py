"""The kernels' algorithm in plain PyTorch: tiled, O(N) memory, any device, fp64 too.

Where PyTorch's own flash attention computes the same thing, it does the work. The rest runs here: tiles of
scores, an online softmax forward, recomputed weights backward, in fp32 for half-precision inputs. Under a mask of
lists the tiles are its granules, many at once (see fastattn.backends.granules).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import reference
from fastattn.backends import granules, tiles, torch_flash, torch_norms, whole_rows
from fastattn.backends import reference as definition
from fastattn.backends.layout import heads_last, zero_heads

# Of heads the definition itself is what is wanted: row by row, O(N) memory.
from fastattn.backends.reference import prepare_heads, prepare_heads_backward  # noqa: F401
from fastattn.backends.tiles import Scores, grouped, product_precision, times, ungrouped
from fastattn.norm_spec import NormSpec
from fastattn.spec import (
    AttentionSpec,
    Gradients,
    MLPSpec,
    MLPWeights,
    ScoreTensors,
    Tangents,
    Wanted,
    lse_dtype,
)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor]:
    with product_precision(q, spec):
        if torch_flash.serves(q, k, v, spec, tensors):
            out, lse = torch_flash.forward(q, k, v, spec, tensors)
            return heads_last(out), lse
        if granules.serves(spec, tensors):
            return granules.attention_forward(q, k, v, spec, tensors)
        if whole_rows.serves(q, k, spec, tensors):
            return whole_rows.attention_forward(q, k, v, spec, tensors)
        return _tiled_forward(q, k, v, spec, tensors)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    wanted: Wanted,
) -> Gradients:
    if (sums := _sums_of_low_rows(q, k, v, out, lse, spec, tensors)) is not None:
        # Gradients are linear in the weights of a row, and in what comes from above.
        dout = (dout / sums[..., None]).to(dout.dtype)
        dlse = None if dlse is None else dlse / sums
    with product_precision(q, spec):
        if dlse is None and not wanted.bias and torch_flash.serves_backward(q, k, v, spec, tensors):
            dq, dk, dv = torch_flash.backward(dout, q, k, v, out, lse, spec, tensors)
            return Gradients(heads_last(dq), heads_last(dk), heads_last(dv))
        if granules.serves(spec, tensors):
            return granules.attention_backward(dout, q, k, v, out, lse, dlse, spec, tensors, wanted)
        if not wanted.bias and whole_rows.serves(q, k, spec, tensors):
            return whole_rows.attention_backward(dout, q, k, v, out, lse, dlse, spec, tensors)
        return _tiled_backward(dout, q, k, v, out, lse, dlse, spec, tensors, wanted)


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tangents: Tangents,
    spec: AttentionSpec,
    tensors: ScoreTensors,
) -> tuple[Tensor, Tensor]:
    fixed, learned = tiles.learned(tensors)
    dout, dlse = tiles.tangent(spec)(fixed, (q, k, v, out, lse, *tangents, *learned))
    return dout, dlse


def _sums_of_low_rows(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> Tensor | None:
    """What the weights exp(score - lse) of each row (B, Hq, Lq) add up to, where that is not 1: where scores are
    so low that their log-sum-exp rounds to their maximum. None if there are no such rows.

    That sum is how the log-sum-exp moves when all scores do.
    """
    _, (bias, relative_bias, _) = tiles.learned(tensors)
    if bias is None and relative_bias is None:
        return None
    low = (lse < reference.LOWEST_EXACT) & (lse > float("-inf"))
    if not bool(low.any()):
        return None
    moved = {"bias": bias} if bias is not None else {"relative_bias": relative_bias}
    tangents = Tangents(**{name: torch.ones_like(t) for name, t in moved.items() if t is not None})
    _, sums = attention_tangent(q, k, v, out, lse, tangents, spec, tensors)
    return sums.masked_fill(~low, 1.0)


def _tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    work = lse_dtype(q.dtype)
    fixed, (bias, relative_bias, sinks) = tiles.learned(tensors)
    scores = Scores(q, k, spec, fixed)
    out = zero_heads((batch, heads, queries, v.shape[3]), q, q.dtype)
    lse = q.new_empty((batch, heads, queries), dtype=work)
    for rows in scores.rows() if heads else ():
        q_tile = grouped(q[:, :, rows].to(work), k.shape[1])
        row_max, row_sum = _beginning(scores, sinks, q_tile)
        total = q_tile.new_zeros((*q_tile.shape[:3], v.shape[3]))
        for tile in scores.tiles_of(rows):
            if tile.columns.start == tile.columns.stop:
                continue
            k_tile, v_tile = (scores.part_of(t, "columns", tile).to(work) for t in (k, v))
            part = None if bias is None else tiles.part_of(bias, "scores", tile).to(work)
            values, _ = scores.of(tile, q_tile, k_tile, part, relative_bias)
            new_max = torch.maximum(row_max, values.amax(-1, keepdim=True))
            pivot = new_max.masked_fill(new_max == float("-inf"), 0.0)
            weights = torch.exp(values - pivot)
            shrink = torch.exp(row_max - pivot)
            row_sum = row_sum * shrink + weights.sum(-1, keepdim=True)
            total = total * shrink + times(weights, scores.kept(tile)) @ v_tile
            row_max = new_max
        out[:, :, rows] = ungrouped(total / row_sum.masked_fill(row_sum == 0, 1.0), heads).to(q.dtype)
        lse[:, :, rows] = ungrouped(row_max + torch.log(row_sum), heads)[..., 0]
    return out, lse


def _beginning(scores: Scores, sinks: Tensor | None, q_tile: Tensor) -> tuple[Tensor, Tensor]:
    """The running maximum and sum before the first key: nothing, or the sink."""
    row_max = q_tile.new_full((*q_tile.shape[:3], 1), float("-inf"))
    if sinks is None:
        return row_max, torch.zeros_like(row_max)
    return row_max.copy_(scores.per_row(sinks, q_tile.shape[2])), torch.ones_like(row_max)


def _tiled_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    wanted: Wanted,
) -> Gradients:
    fixed, learned = tiles.learned(tensors)
    function = tiles.gradients(spec, wanted, tensors.sinks is not None)
    found = iter(function(fixed, (dout, q, k, v, out, lse, dlse, *learned)))
    dq, dk, dv = next(found), next(found), next(found)
    dbias = next(found) if wanted.bias else None
    drelative_bias = next(found) if wanted.relative_bias else None
    return Gradients(dq, dk, dv, dbias, drelative_bias, next(found, None))


def mlp_forward(x: Tensor, weights: MLPWeights, spec: MLPSpec, save: bool) -> tuple[Tensor, Tensor]:
    saved = _pre_activations(x, weights)
    gate = saved[:, : weights.w_in.shape[0]]
    hidden = reference.activate(gate, spec.activation)
    if spec.gated:
        hidden *= saved[:, weights.w_in.shape[0] :]
    elif spec.activation == "relu":
        saved = hidden  # its sign says all that the backward asks
    return F.linear(hidden, weights.w_out, weights.b_out), saved if save else x.new_empty(0)


def mlp_backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, saved: Tensor, wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    want_x, want_weight, want_bias, want_out, want_out_bias = wanted
    width = weights.w_in.shape[0]
    gate = saved[:, :width]
    hidden = reference.activate(gate, spec.activation)
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


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    if not torch_norms.serve(x, weight, bias, spec):
        return definition.norm_forward(x, residual, weight, bias, spec)
    total = None if residual is None else (x + residual).contiguous()
    y, mean, inverse = torch_norms.forward(x if total is None else total, weight, bias, spec)
    return y, total, mean, inverse


def norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    inverse: Tensor,
    spec: NormSpec,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not torch_norms.serve(x, weight, None, spec):
        return definition.norm_backward(dy, dtotal, x, weight, mean, inverse, spec, wanted)
    dx, dweight, dbias = torch_norms.backward(dy, x, weight, mean, inverse, spec, wanted)
    return dx if dtotal is None else dx + dtotal, dweight, dbias


def _column_sum(t: Tensor) -> Tensor:
    """The sum over rows, in fp32 at least."""
    return t.sum(0, dtype=lse_dtype(t.dtype)).to(t.dtype)
