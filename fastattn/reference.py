"""The definition: plain PyTorch, differentiable by autograd, any dtype up to float64, N x N memory.

Every backend computes what stands here. In float64 it is the oracle of the tests; in the dtype of the inputs
it is the eager computation whose rounding error the tests measure by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.dropout import dropout_mask
from fastattn.head_spec import HeadsSpec, HeadTensors
from fastattn.masks.lists import decode, unpacked
from fastattn.norm_spec import NormSpec
from fastattn.spec import (
    NO_TENSORS,
    AttentionSpec,
    Gradients,
    MLPSpec,
    MLPWeights,
    ScoreTensors,
    Tangents,
    Wanted,
    lse_dtype,
)

# Below it float32 rounds a log-sum-exp by more than 1e-3: where all keys of a row have a bias of -1e9, say.
LOWEST_EXACT = -(2.0**13)


def visible(
    queries: int,
    keys: int,
    spec: AttentionSpec,
    device: torch.device | None = None,
    key_lengths: Tensor | None = None,
    intervals: Tensor | None = None,
) -> Tensor:
    """May query i see key j? bool (Lq, Lk), or (B, 1, Lq, Lk) with key_lengths (B,) or intervals."""
    distance = _distance(queries, keys, device)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if spec.left is not None:
        seen &= distance >= -spec.left
    if spec.right is not None:
        seen &= distance <= spec.right
    key = torch.arange(keys, device=device)
    if key_lengths is not None:
        seen = seen & (key < key_lengths[:, None, None, None])
    if intervals is not None:
        start, stop = intervals[:, None, :, :queries, None].unbind(2)
        seen = seen & (start <= key) & (key < stop)
    return seen


def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors = NO_TENSORS
) -> tuple[Tensor, Tensor]:
    """softmax of the scores over the visible keys, times v, and the log-sum-exp of the scores in nats.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv); query head h reads key head h // (Hq / Hkv).
    Returns out (B, Hq, Lq, Dv) and lse (B, Hq, Lq). A row that sees no key and has no sink gives 0 and -inf.
    """
    k, v = (keys_there(t, tensors.key_lengths) for t in (k, v))
    scores = _scores(q, k, spec, tensors)
    if tensors.sinks is not None:
        # One more key, whose value is zero.
        sink = tensors.sinks.to(scores.dtype)[:, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    lse = torch.logsumexp(scores.to(lse_dtype(q.dtype)), -1)
    weights = torch.softmax(scores, -1).masked_fill((lse == float("-inf"))[..., None], 0.0)[..., : k.shape[2]]
    return _dropped(weights, spec, tensors) @ _every_head(v, q), lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    spec: AttentionSpec,
    tensors: ScoreTensors = NO_TENSORS,
    wanted: Wanted = Wanted(),  # noqa: B008 (immutable)
) -> Gradients:
    """The gradients of `attention` from what it returned, written out, so that they can be differentiated again.

    A row that sees no key has lse -inf whatever the inputs: its weights and its gradients are 0.
    """
    k, v = (keys_there(t, tensors.key_lengths) for t in (k, v))
    empty = (lse == float("-inf"))[..., None]
    scores = _scores(q, k, spec, tensors)
    safe_lse = lse[..., None].masked_fill(empty, float("inf"))
    weights = torch.exp(scores - safe_lse)
    # Scores so low that their log-sum-exp rounds to their maximum: weights add up to more than 1.
    low = (safe_lse < LOWEST_EXACT) & ~empty
    weights = (weights / weights.sum(-1, keepdim=True).masked_fill(~low, 1.0)).to(q.dtype)
    delta = (dout * out).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    delta = delta.masked_fill(empty, 0.0)
    dweights = _dropped(dout @ _every_head(v, q).transpose(2, 3), spec, tensors)
    dscores = weights * (dweights - delta)
    dbias = drelative = dsinks = None
    if wanted.bias and tensors.bias is not None:
        hidden = scores == float("-inf")
        dbias = dscores.masked_fill(hidden, 0.0).sum_to_size(tensors.bias.shape).to(tensors.bias.dtype)
    if wanted.relative_bias and tensors.relative_bias is not None:
        drelative = sum_by_distance(dscores, tensors.relative_bias, q.shape[2] - k.shape[2])
    if tensors.sinks is not None:
        sink_weights = torch.exp(tensors.sinks[:, :, None, None] - safe_lse)
        dsinks = -(sink_weights * delta).sum((2, 3)).to(tensors.sinks.dtype)
    dscores = dscores * spec.scale
    if spec.softcap:
        products = q @ _every_head(k, q).transpose(2, 3) * spec.scale
        dscores = dscores * (1.0 - torch.tanh(products / spec.softcap).square())
    dscores = dscores.to(q.dtype)
    dq = dscores @ _every_head(k, q)
    dk = _sum_of_group(dscores.transpose(2, 3) @ q, k)
    dv = _sum_of_group(_dropped(weights, spec, tensors).transpose(2, 3) @ dout, v)
    return Gradients(dq, dk, dv, dbias, drelative, dsinks)


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tangents: Tangents,
    spec: AttentionSpec,
    tensors: ScoreTensors = NO_TENSORS,
) -> tuple[Tensor, Tensor]:
    """The tangents of what `attention` returned, from those of what it was given; written out, as the backward."""
    k, v = (keys_there(t, tensors.key_lengths) for t in (k, v))
    dk, dv = (None if t is None else keys_there(t, tensors.key_lengths) for t in (tangents.k, tangents.v))
    safe_lse = lse[..., None].masked_fill((lse == float("-inf"))[..., None], float("inf"))
    scores = _scores(q, k, spec, tensors)
    weights = torch.exp(scores - safe_lse).to(q.dtype)
    dscores = torch.zeros_like(weights)
    if tangents.q is not None:
        dscores = dscores + tangents.q @ _every_head(k, q).transpose(2, 3) * spec.scale
    if dk is not None:
        dscores = dscores + q @ _every_head(dk, q).transpose(2, 3) * spec.scale
    if spec.softcap:
        products = q @ _every_head(k, q).transpose(2, 3) * spec.scale
        dscores = dscores * (1.0 - torch.tanh(products / spec.softcap).square())
    if tangents.bias is not None:
        dscores = dscores + tangents.bias.to(dscores.dtype)
    if tangents.relative_bias is not None:
        dscores = dscores + _by_distance(tangents.relative_bias, q.shape[2], k.shape[2]).to(dscores.dtype)
    # The tangent of a bias may be anything where it is hidden.
    dweights = weights * dscores.masked_fill(scores == float("-inf"), 0.0)
    dlse = dweights.sum(-1, dtype=lse.dtype)
    if tangents.sinks is not None and tensors.sinks is not None:
        sink_weights = torch.exp(tensors.sinks[:, :, None] - safe_lse[..., 0])
        dlse = dlse + (sink_weights * tangents.sinks[:, :, None]).to(lse.dtype)
    dout = _dropped(dweights, spec, tensors) @ _every_head(v, q) - dlse[..., None].to(out.dtype) * out
    if dv is not None:
        dout = dout + _dropped(weights, spec, tensors) @ _every_head(dv, q)
    return dout, dlse


def keys_there(t: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Keys, values or their like (B, H, Lk, W), zeros from each batch entry's length on: what lies there may be
    anything, and 0 x NaN is NaN."""
    if key_lengths is None:
        return t
    there = torch.arange(t.shape[2], device=t.device) < key_lengths[:, None]
    return torch.where(there[:, None, :, None], t, 0.0)


def _dropped(weights: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Tensor:
    """What is kept of the weights (B, Hq, Lq, Lk), and their gradients, under dropout."""
    if tensors.dropout_state is None:
        return weights
    keep = dropout_mask(tensors.dropout_state, spec.dropout, *weights.shape[1:])
    return (weights * keep) / (1.0 - spec.dropout)


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Tensor:
    """The scores, -inf where hidden."""
    queries, keys = q.shape[2], k.shape[2]
    scores = q @ _every_head(k, q).transpose(2, 3) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if tensors.alibi_slopes is not None:
        distance = _distance(queries, keys, q.device).abs()
        scores = scores - (tensors.alibi_slopes[:, :, None, None] * distance).to(scores.dtype)
    if tensors.relative_bias is not None:
        scores = scores + _by_distance(tensors.relative_bias, queries, keys).to(scores.dtype)
    seen = visible(queries, keys, spec, q.device, tensors.key_lengths, tensors.intervals)
    if tensors.bias is not None:
        if tensors.bias.dtype == torch.bool:
            seen = seen & tensors.bias
        else:
            # Filled in below, so that no gradient comes of an infinity.
            seen = seen & (tensors.bias != float("-inf"))
            scores = scores + tensors.bias.to(scores.dtype)
    if tensors.mask is not None and spec.mask is not None:
        seen_here, counts = decode(unpacked(tensors.mask, spec.mask), q.shape[0], q.shape[1], queries, keys)
        seen = seen & seen_here
        scores = scores + counts.masked_fill(~seen_here, 0.0).to(scores.dtype)
    return scores.masked_fill(~seen, float("-inf"))


def _by_distance(relative_bias: Tensor, queries: int, keys: int) -> Tensor:
    """(B, Hq, Lq, Lk): the value for each distance."""
    distance = _distance(queries, keys, relative_bias.device)
    return relative_bias[:, :, relative_index(distance, relative_bias.shape[2] // 2)]


def relative_index(distance: Tensor, radius: int) -> Tensor:
    """Where in a relative bias of 2 radius + 1 values the one for a key so far behind the diagonal stands; farther
    ones take the first and the last."""
    return distance.clamp(-radius, radius) + radius


def sum_by_distance(dscores: Tensor, relative_bias: Tensor, shift: int) -> Tensor:
    """The gradient of a relative bias (B, H, 2 R + 1) from that of the scores (B, H, rows, columns): the sum along
    each diagonal. The key of column j stands `shift` + j - i behind the diagonal of row i. No atomics: every row
    is shifted by one against the one below, and the columns summed."""
    rows, columns = dscores.shape[2:]
    radius = relative_bias.shape[2] // 2
    if rows * columns == 0:
        return torch.zeros_like(relative_bias)
    skewed = F.pad(dscores.flip(2), (0, rows)).flatten(2)[..., :-rows]
    sums = skewed.unflatten(2, (rows, columns + rows - 1)).sum(2, dtype=relative_bias.dtype)
    return of_distances(sums, shift - rows + 1, radius)


def of_distances(sums: Tensor, nearest: int, radius: int) -> Tensor:
    """The gradient of a relative bias (B, H, 2 R + 1) from the sums (B, H, distances) of what each distance gets,
    the first being `nearest`. Those of R and more, either way, go to the ends."""
    farthest = nearest + sums.shape[2] - 1
    sums = F.pad(sums, (max(0, nearest + radius), max(0, radius - farthest)))
    if radius == 0:
        return sums.sum(2, keepdim=True)
    before = 1 - radius - min(nearest, -radius)
    ends = sums[..., :before].sum(2, keepdim=True), sums[..., before + 2 * radius - 1 :].sum(2, keepdim=True)
    return torch.cat((ends[0], sums[..., before : before + 2 * radius - 1], ends[1]), 2)


def _distance(queries: int, keys: int, device: torch.device | None) -> Tensor:
    """(Lq, Lk): how far key j stands after the diagonal of query i, which is at key i + Lk - Lq."""
    diagonal = torch.arange(queries, device=device)[:, None] + (keys - queries)
    return torch.arange(keys, device=device)[None, :] - diagonal


def _every_head(t: Tensor, q: Tensor) -> Tensor:
    """One key or value head for every query head."""
    return t.repeat_interleave(q.shape[1] // max(1, t.shape[1]), 1)


def _sum_of_group(gradient: Tensor, t: Tensor) -> Tensor:
    """The gradients of the query heads that share a key or value head, added up."""
    return gradient.unflatten(1, (t.shape[1], gradient.shape[1] // max(1, t.shape[1]))).sum(2)


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
    """hidden W_out^T + b_out, where hidden = act(x W_in^T + b_in), in gated form times (x W_up^T + b_up).

    x (T, d), w_in and w_up (h, d), w_out (out, h); returns (T, out).
    """
    hidden = activate(F.linear(x, weights.w_in, weights.b_in), spec.activation)
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
    of = dict(zip(present, gradients, strict=True))
    dw, db = of["w_in"], of["b_in"]
    if "w_up" in of:
        dw, db = torch.cat((dw, of["w_up"])), torch.cat((db, of["b_up"]))
    return dx, dw, db, of["w_out"], dy.sum(0)


def prepare_heads(x: Tensor, spec: HeadsSpec, tensors: HeadTensors) -> Tensor:
    """head_scale * rotate(norm(x) * norm_weight), in fp32 at least, rounded once; x (B, H, L, D)."""
    y, _ = _normalised(x, spec)
    if tensors.norm_weight is not None:
        y = y * tensors.norm_weight[:, :, None]
    y = _turned(y, spec, tensors)
    if tensors.head_scale is not None:
        y = y * tensors.head_scale[:, :, None, None]
    return y.to(x.dtype)


def prepare_heads_backward(
    dy: Tensor, x: Tensor, spec: HeadsSpec, tensors: HeadTensors
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of `prepare_heads`, written out, so that they can be differentiated again: dx, dnorm_weight
    (B, H, D) and dhead_scale (B, H), None for what is not there."""
    normalised, inverse_size = _normalised(x, spec)
    gradient = _turned(dy.to(normalised.dtype), spec, tensors, back=True)
    weight, scale = tensors.norm_weight, tensors.head_scale
    dweight = dscale = None
    if weight is not None or scale is not None:
        total = (gradient * normalised).sum(2)
        if weight is not None:
            dweight = total if scale is None else total * scale[..., None]
        if scale is not None:
            dscale = (total if weight is None else total * weight).sum(-1)
    if weight is not None:
        gradient = gradient * weight[:, :, None]
    if scale is not None:
        gradient = gradient * scale[:, :, None, None]
    if spec.norm:
        gradient = inverse_size * (gradient - normalised * (gradient * normalised).mean(-1, keepdim=True))
    return gradient.to(x.dtype), dweight, dscale


def prepare_heads_tangent(
    x: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dscale: Tensor | None,
    spec: HeadsSpec,
    tensors: HeadTensors,
) -> Tensor:
    """How `prepare_heads` moves when x, norm_weight and head_scale move by dx, dweight and dscale; None for 0."""
    normalised, inverse_size = _normalised(x, spec)
    weight, scale = tensors.norm_weight, tensors.head_scale
    move = torch.zeros_like(normalised)
    if dx is not None:
        move = dx.to(normalised.dtype)
        if spec.norm:
            move = inverse_size * (move - normalised * (move * normalised).mean(-1, keepdim=True))
    weighted = normalised
    if weight is not None:
        weighted, move = normalised * weight[:, :, None], move * weight[:, :, None]
        if dweight is not None:
            move = move + normalised * dweight[:, :, None]
    if scale is not None:
        move = move * scale[:, :, None, None]
        if dscale is not None:
            move = move + weighted * dscale[:, :, None, None]
    return _turned(move, spec, tensors).to(x.dtype)


def _normalised(x: Tensor, spec: HeadsSpec) -> tuple[Tensor, Tensor]:
    """x in fp32 at least, if asked for over its root mean square, and the inverse of that (B, H, L, 1), or 1."""
    x = x.to(lse_dtype(x.dtype))
    if not spec.norm:
        return x, x.new_ones(())
    inverse_size = torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps)
    return x * inverse_size, inverse_size


def _turned(t: Tensor, spec: HeadsSpec, tensors: HeadTensors, back: bool = False) -> Tensor:
    """Pairs of components (a, b) become (a cos - b sin, b cos + a sin); `back` is the transpose of that."""
    if tensors.cos is None or tensors.sin is None:
        return t
    # (B, L, H, D), as results lie in memory.
    t = t.transpose(1, 2)
    cos, sin = (
        _rows_of_table(table, tensors.offsets, t.shape[1]).to(t.dtype)[:, :, None]
        for table in (tensors.cos, tensors.sin)
    )
    sign = -1 if back else 1
    pairs, rest = t[..., : spec.turned], t[..., spec.turned :]
    a, b = pairs.unflatten(-1, (-1, 2)).unbind(-1) if spec.interleaved else pairs.chunk(2, -1)
    turned = [torch.addcmul(a * cos, b, sin, value=-sign), torch.addcmul(b * cos, a, sin, value=sign)]
    if spec.interleaved:
        turned = [torch.stack(turned, -1).flatten(-2)]
    return torch.cat([*turned, rest], -1).transpose(1, 2)


def _rows_of_table(table: Tensor, offsets: Tensor | None, length: int) -> Tensor:
    """(B, length, pairs) of a table (B, positions, pairs): from each offset on. Before the table its first row
    stands, beyond it NaN."""
    if offsets is None:
        return table[:, :length]
    positions = offsets[:, None] + torch.arange(length, device=table.device)
    last = table.shape[1] - 1
    rows = torch.take_along_dim(table, positions.clamp(0, max(last, 0)).long()[..., None], 1)
    return rows.masked_fill((positions > last)[..., None], float("nan"))


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y, x + residual (None without), and of each row the mean (None unless centred) and the inverse deviation.

    x and residual (B, R, W), weight and bias (B, W); in fp32 at least, rounded once.
    """
    total = x if residual is None else x + residual
    y, mean, inverse = _standardised(total, spec)
    if weight is not None:
        y = y * _multiplier(weight, y, spec)
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None]
    mean = None if mean is None else mean[..., 0]
    return y.to(x.dtype), None if residual is None else total, mean, inverse[..., 0]


def norm_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `norm`, written out, so that they can be differentiated again: of what was normalised, x,
    to which dtotal comes as a result; and of weight and bias (B, W), in fp32 at least."""
    normalised, _, inverse = _standardised(x, spec)
    gradient = dy.to(normalised.dtype)
    dweight, dbias = (gradient * normalised).sum(1), gradient.sum(1)
    if weight is not None:
        gradient = gradient * _multiplier(weight, gradient, spec)
    dx = gradient - normalised * (gradient * normalised).mean(-1, keepdim=True)
    if spec.centred:
        dx = dx - gradient.mean(-1, keepdim=True)
    dx = inverse * dx
    return (dx if dtotal is None else dx + dtotal).to(x.dtype), dweight, dbias


def _standardised(x: Tensor, spec: NormSpec) -> tuple[Tensor, Tensor | None, Tensor]:
    """x in fp32 at least, less its mean if centred, over its deviation; that mean, or None, and the inverse of the
    deviation, (B, R, 1)."""
    x, mean = x.to(lse_dtype(x.dtype)), None
    if spec.centred:
        mean = x.mean(-1, keepdim=True)
        x = x - mean
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps)
    return x * inverse, mean, inverse


def _multiplier(weight: Tensor, like: Tensor, spec: NormSpec) -> Tensor:
    """What normalised rows are multiplied by: (B, 1, W)."""
    return weight.to(like.dtype)[:, None] + spec.weight_offset
