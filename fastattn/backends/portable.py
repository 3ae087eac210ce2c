"""The kernels' algorithm in plain PyTorch: tiled, O(N) memory, any device, fp64 too.

Where PyTorch's own flash attention computes the same thing, it does the work. The rest runs here: tiles of
scores, an online softmax forward, recomputed weights backward, in fp32 for half-precision inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import reference
from fastattn.backends import torch_flash
from fastattn.backends.layout import heads_last, zero_heads

# Of heads the definition itself is what is wanted: row by row, O(N) memory.
from fastattn.backends.reference import prepare_heads, prepare_heads_backward  # noqa: F401
from fastattn.dropout import kept
from fastattn.spec import AttentionSpec, Gradients, MLPSpec, MLPWeights, ScoreTensors, Wanted, lse_dtype

QUERY_TILE, KEY_TILE = 256, 512


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor]:
    with _product_precision(q, spec):
        if torch_flash.serves(q, k, v, spec, tensors):
            out, lse = torch_flash.forward(q, k, v, spec)
            return heads_last(out), lse
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
    with _product_precision(q, spec):
        if dlse is None and torch_flash.serves(q, k, v, spec, tensors):
            dq, dk, dv = torch_flash.backward(dout, q, k, v, out, lse, spec)
            return Gradients(heads_last(dq), heads_last(dk), heads_last(dv))
        return _tiled_backward(dout, q, k, v, out, lse, dlse, spec, tensors, wanted)


@contextmanager
def _product_precision(q: Tensor, spec: AttentionSpec) -> Iterator[None]:
    """PyTorch's own float32 products on CUDA, as the spec asks for them; tf32x3 is given more than it asks for."""
    if q.device.type != "cuda" or q.dtype != torch.float32:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = spec.precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    work = lse_dtype(q.dtype)
    scores = _Scores(q, k, spec, tensors)
    out = zero_heads((batch, heads, queries, v.shape[3]), q, q.dtype)
    lse = q.new_empty((batch, heads, queries), dtype=work)
    for rows in _spans(0, queries, QUERY_TILE):
        q_tile = _grouped(q[:, :, rows].to(work), k.shape[1])
        row_max, row_sum = scores.beginning(q_tile)
        total = q_tile.new_zeros((*q_tile.shape[:3], v.shape[3]))
        for columns in _spans(*scores.keys_seen_by(rows), KEY_TILE):
            tile, _ = scores.tile(q_tile, k[:, :, columns].to(work), rows, columns)
            keep = scores.kept(rows, columns)
            new_max = torch.maximum(row_max, tile.amax(-1, keepdim=True))
            pivot = new_max.masked_fill(new_max == float("-inf"), 0.0)
            weights = torch.exp(tile - pivot)
            shrink = torch.exp(row_max - pivot)
            row_sum = row_sum * shrink + weights.sum(-1, keepdim=True)
            total = total * shrink + _times(weights, keep) @ v[:, :, columns].to(work)
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
    tensors: ScoreTensors,
    wanted: Wanted,
) -> Gradients:
    work, key_heads, heads = lse_dtype(q.dtype), k.shape[1], q.shape[1]
    scores = _Scores(q, k, spec, tensors)
    dq, dk, dv = (zero_heads(t.shape, t, work) for t in (q, k, v))
    bias, relative = tensors.bias, tensors.relative_bias
    dbias = None if bias is None or not wanted.bias else bias.new_zeros(bias.shape, dtype=work)
    drelative = None if relative is None or not wanted.relative_bias else torch.zeros_like(relative)
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
        for columns in _spans(*scores.keys_seen_by(rows), KEY_TILE):
            k_tile, v_tile = k[:, :, columns].to(work), v[:, :, columns].to(work)
            tile, slope = scores.tile(q_tile, k_tile, rows, columns)
            keep = scores.kept(rows, columns)
            weights = torch.exp(tile - lse_tile)
            dv[:, :, columns] += _times(weights, keep).mT @ dout_tile
            dscores = weights * (_times(dout_tile @ v_tile.mT, keep) - delta_tile)
            if dbias is not None:
                part = _part(dbias, rows, columns)
                part += _ungrouped(dscores, heads).sum_to_size(part.shape)
            if drelative is not None:
                shift = columns.start - rows.start - scores.shift
                drelative += reference.sum_by_distance(_ungrouped(dscores, heads), drelative, shift)
            dscores *= slope
            dq[:, :, rows] += _ungrouped(dscores @ k_tile, heads)
            dk[:, :, columns] += dscores.mT @ q_tile
    dsinks = None
    if tensors.sinks is not None:
        dsinks = -(torch.exp(tensors.sinks[:, :, None, None] - lse) * delta).sum((2, 3))
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    return Gradients(dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dbias, drelative, dsinks)


class _Scores:
    """The scores of a call, tile by tile; rows are queries grouped by key head (see `_grouped`)."""

    def __init__(self, q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> None:
        self.spec, self.tensors = spec, tensors
        self.keys, self.shift = k.shape[2], k.shape[2] - q.shape[2]
        self.key_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        lengths = tensors.key_lengths
        # Reading the longest waits for the device; this backend launches hundreds of products anyway.
        self.longest = self.keys if lengths is None or not lengths.numel() else int(lengths.max())

    def beginning(self, q_tile: Tensor) -> tuple[Tensor, Tensor]:
        """The running maximum and sum before the first key: nothing, or the sink."""
        row_max = q_tile.new_full((*q_tile.shape[:3], 1), float("-inf"))
        if self.tensors.sinks is None:
            return row_max, torch.zeros_like(row_max)
        return row_max.copy_(self._per_row(self.tensors.sinks, q_tile.shape[2])), torch.ones_like(row_max)

    def keys_seen_by(self, rows: slice) -> tuple[int, int]:
        """From the first key that any of these rows may see to the one after the last."""
        left, right = self.spec.left, self.spec.right
        start = 0 if left is None else max(0, rows.start + self.shift - left)
        stop = self.longest if right is None else min(self.longest, rows.stop + self.shift + right)
        return start, max(start, stop)

    def tile(self, q_tile: Tensor, k_tile: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor | float]:
        """The scores of one tile, -inf where hidden, and their derivative by q k^T."""
        scores: Tensor = q_tile @ k_tile.mT * self.spec.scale
        slope: Tensor | float = self.spec.scale
        if self.spec.softcap:
            bent = torch.tanh(scores / self.spec.softcap)
            scores, slope = self.spec.softcap * bent, self.spec.scale * (1.0 - bent.square())
        diagonal = (
            torch.arange(rows.start, rows.stop, device=q_tile.device).repeat(self.group)[:, None] + self.shift
        )
        keys = torch.arange(columns.start, columns.stop, device=q_tile.device)
        if self.tensors.alibi_slopes is not None:
            distance = (keys - diagonal).abs()
            scores = scores - self._per_row(self.tensors.alibi_slopes, q_tile.shape[2]) * distance
        if self.tensors.relative_bias is not None:
            scores = scores + self._relative(self.tensors.relative_bias, rows, columns)
        if self.tensors.bias is not None and self.tensors.bias.dtype != torch.bool:
            scores = scores + self._bias(self.tensors.bias, rows, columns)
        return self._hide(scores, diagonal, keys, rows, columns), slope

    def kept(self, rows: slice, columns: slice) -> Tensor | None:
        """By what dropout multiplies the weights of one tile: 0 or 1 / (1 - p); None without dropout."""
        state = self.tensors.dropout_state
        if state is None:
            return None
        head = torch.arange(self.key_heads * self.group, device=state.device)[:, None, None]
        query = torch.arange(rows.start, rows.stop, device=state.device)[:, None]
        dropout = self.spec.dropout
        keep = kept(state[:, None, None, None], head, query, columns.start, columns.stop, dropout)
        return _grouped(keep, self.key_heads) * (1.0 / (1.0 - dropout))

    def _relative(self, values: Tensor, rows: slice, columns: slice) -> Tensor:
        """The relative bias of one tile."""
        diagonal = torch.arange(rows.start, rows.stop, device=values.device)[:, None] + self.shift
        distance = torch.arange(columns.start, columns.stop, device=values.device) - diagonal
        return _grouped(values[:, :, reference.relative_index(distance, values.shape[2] // 2)], self.key_heads)

    def _bias(self, bias: Tensor, rows: slice, columns: slice) -> Tensor:
        """The bias of one tile, for every query head; its batch may be 1."""
        part = _part(bias, rows, columns)
        part = part.expand(-1, self.key_heads * self.group, rows.stop - rows.start, -1)
        return _grouped(part, self.key_heads)

    def _hide(self, scores: Tensor, diagonal: Tensor, keys: Tensor, rows: slice, columns: slice) -> Tensor:
        """-inf where the window or the key length hides; tiles that are seen whole are left alone."""
        left, right, hidden = self.spec.left, self.spec.right, float("-inf")
        if left is not None and columns.start < rows.stop - 1 + self.shift - left:
            scores = scores.masked_fill(keys < diagonal - left, hidden)
        if right is not None and columns.stop - 1 > rows.start + self.shift + right:
            scores = scores.masked_fill(keys > diagonal + right, hidden)
        if self.tensors.bias is not None and self.tensors.bias.dtype == torch.bool:
            scores = scores.masked_fill(~self._bias(self.tensors.bias, rows, columns), hidden)
        if self.tensors.key_lengths is not None:
            scores = scores.masked_fill(keys >= self.tensors.key_lengths[:, None, None, None], hidden)
        return scores

    def _per_row(self, values: Tensor, rows: int) -> Tensor:
        """A value for each query head (B, Hq), for each of the grouped rows: (B, Hkv, rows, 1)."""
        return values.unflatten(1, (self.key_heads, self.group)).repeat_interleave(rows // self.group, 2)[
            ..., None
        ]


def _spans(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _times(weights: Tensor, keep: Tensor | None) -> Tensor:
    return weights if keep is None else weights * keep


def _part(bias: Tensor, rows: slice, columns: slice) -> Tensor:
    """A view of what of the bias falls on a tile; dimensions of size 1 stay."""
    if bias.shape[2] > 1:
        bias = bias[:, :, rows]
    return bias[..., columns] if bias.shape[3] > 1 else bias


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
