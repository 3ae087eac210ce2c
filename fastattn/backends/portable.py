"""The kernels' algorithm in plain PyTorch: tiled, O(N) memory, any device, fp64 too.

Where PyTorch's own flash attention computes the same thing, it does the work. The rest runs here: tiles of
scores, an online softmax forward, recomputed weights backward, in fp32 for half-precision inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import reference
from fastattn.backends import torch_flash
from fastattn.backends.layout import heads_last, zero_heads
from fastattn.spec import AttentionSpec, MLPSpec, MLPWeights, lse_dtype

QUERY_TILE, KEY_TILE = 256, 512


def attention_forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    if torch_flash.serves(q, k, v, spec):
        out, lse = torch_flash.forward(q, k, v, spec)
        return heads_last(out), lse
    return _tiled_forward(q, k, v, spec)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    if dlse is None and torch_flash.serves(q, k, v, spec):
        dq, dk, dv = torch_flash.backward(dout, q, k, v, out, lse, spec)
        return heads_last(dq), heads_last(dk), heads_last(dv)
    return _tiled_backward(dout, q, k, v, out, lse, dlse, spec)


def _tiled_forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    work = lse_dtype(q.dtype)
    out = zero_heads((batch, heads, queries, v.shape[3]), q, q.dtype)
    lse = q.new_full((batch, heads, queries), float("-inf"), dtype=work)
    for rows in _spans(0, queries, QUERY_TILE):
        q_tile = _grouped(q[:, :, rows], k.shape[1]).to(work)
        row_max = q_tile.new_full((*q_tile.shape[:3], 1), float("-inf"))
        row_sum = torch.zeros_like(row_max)
        total = q_tile.new_zeros((*q_tile.shape[:3], v.shape[3]))
        for columns in _spans(0, _key_end(rows, q, k, spec), KEY_TILE):
            scores = _scores(q_tile, k[:, :, columns].to(work), rows, columns, q, k, spec)
            new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
            pivot = new_max.masked_fill(new_max == float("-inf"), 0.0)
            weights = torch.exp(scores - pivot)
            shrink = torch.exp(row_max - pivot)
            row_sum = row_sum * shrink + weights.sum(-1, keepdim=True)
            total = total * shrink + weights @ v[:, :, columns].to(work)
            row_max = new_max
        out[:, :, rows] = _ungrouped(total / row_sum.masked_fill(row_sum == 0, 1.0), heads).to(q.dtype)
        lse[:, :, rows] = _ungrouped(row_max + torch.log(row_sum), heads)[..., 0]
    return out, lse


def _tiled_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    work, key_heads = lse_dtype(q.dtype), k.shape[1]
    dq, dk, dv = (zero_heads(t.shape, t, work) for t in (q, k, v))
    delta = (dout.to(work) * out.to(work)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    # Rows that saw nothing: exp(-inf - inf) is 0 and so is everything that follows.
    empty = lse == float("-inf")
    lse, delta = lse.masked_fill(empty, float("inf"))[..., None], delta.masked_fill(empty, 0.0)[..., None]
    for rows in _spans(0, q.shape[2], QUERY_TILE):
        q_tile, dout_tile, lse_tile, delta_tile = (
            _grouped(t[:, :, rows].to(work), key_heads) for t in (q, dout, lse, delta)
        )
        for columns in _spans(0, _key_end(rows, q, k, spec), KEY_TILE):
            k_tile, v_tile = k[:, :, columns].to(work), v[:, :, columns].to(work)
            weights = torch.exp(_scores(q_tile, k_tile, rows, columns, q, k, spec) - lse_tile)
            dv[:, :, columns] += weights.mT @ dout_tile
            dscores = weights * (dout_tile @ v_tile.mT - delta_tile) * spec.scale
            dq[:, :, rows] += _ungrouped(dscores @ k_tile, q.shape[1])
            dk[:, :, columns] += dscores.mT @ q_tile
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _scores(
    q_tile: Tensor, k_tile: Tensor, rows: slice, columns: slice, q: Tensor, k: Tensor, spec: AttentionSpec
) -> Tensor:
    """Scaled scores of one tile, -inf where the query may not see the key."""
    scores = q_tile @ k_tile.mT * spec.scale
    shift = k.shape[2] - q.shape[2]
    if spec.causal and columns.stop - 1 > rows.start + shift:
        queries = torch.arange(rows.start, rows.stop, device=q.device).repeat(q.shape[1] // k.shape[1])
        keys = torch.arange(columns.start, columns.stop, device=q.device)
        scores = scores.masked_fill(keys[None, :] > queries[:, None] + shift, float("-inf"))
    return scores


def _key_end(rows: slice, q: Tensor, k: Tensor, spec: AttentionSpec) -> int:
    """How many keys the last of these rows may see."""
    keys = k.shape[2]
    return max(0, min(keys, rows.stop + keys - q.shape[2])) if spec.causal else keys


def _spans(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _grouped(t: Tensor, key_heads: int) -> Tensor:
    """(B, Hq, L, W) -> (B, Hkv, group * L, W): the queries that read one key head, one below the other."""
    batch, heads, length, width = t.shape
    return t.reshape(batch, key_heads, heads // key_heads * length, width)


def _ungrouped(t: Tensor, heads: int) -> Tensor:
    batch, key_heads, rows, width = t.shape
    return t.reshape(batch, heads, rows * key_heads // heads, width)


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


def _column_sum(t: Tensor) -> Tensor:
    """The sum over rows, in fp32 at least."""
    return t.sum(0, dtype=lse_dtype(t.dtype)).to(t.dtype)
