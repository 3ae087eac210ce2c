"""The definition of attention: plain PyTorch, differentiable by autograd, any dtype up to float64, N x N memory.

Every backend computes what stands here. In float64 it is the oracle of the tests. In the dtype of the inputs it is
the eager computation whose rounding error the tests measure by. `forward`, `backward` and `tangent` are the
reference backend.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention.dropout import dropout_mask
from fastattn.core.attention.spec import (
    NO_TENSORS,
    AttentionSpec,
    Gradients,
    Saved,
    ScoreTensors,
    Tangents,
    Wanted,
)
from fastattn.core.layout import heads_last
from fastattn.ground.checks import lse_dtype
from fastattn.masks.lists import decode, unpacked

# Beyond it, either way, float32 rounds a log-sum-exp by more than 2**-11.
LARGEST_EXACT = 2.0**13


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
    scores = scores_of(q, k, spec, tensors)
    if tensors.sinks is not None:
        # One more key, whose value is zero.
        sink = tensors.sinks.to(scores.dtype)[:, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    lse = torch.logsumexp(scores.to(lse_dtype(q.dtype)), -1)
    weights = torch.softmax(scores, -1).masked_fill((lse == float("-inf"))[..., None], 0.0)[..., : k.shape[2]]
    return _dropped(weights.to(q.dtype), spec, tensors) @ _every_head(v, q), lse


def attention_backward(
    dout: Tensor, dlse: Tensor | None, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted
) -> Gradients:
    """The gradients of `attention` from what it returned, written out, so that they can be differentiated again.

    A row that sees no key has lse -inf whatever the inputs: its weights and its gradients are 0.
    """
    q, k, v, out, lse = saved
    k, v = (keys_there(t, tensors.key_lengths) for t in (k, v))
    empty = (lse == float("-inf"))[..., None]
    scores = scores_of(q, k, spec, tensors)
    safe_lse = lse[..., None].masked_fill(empty, float("inf"))
    weights, sink_weights = _weights(scores, safe_lse, tensors)
    weights = weights.to(q.dtype)
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
        dsinks = -(sink_weights * delta).sum((2, 3)).to(tensors.sinks.dtype)
    if spec.softcap:
        dscores = dscores * _cap_slope(q, k, spec, tensors)
    dscale = None
    if tensors.head_scale is not None:
        dscale = (dscores * _products(q, k, spec)).sum((2, 3)).to(tensors.head_scale.dtype)
    dscores = (_scaled(dscores, tensors) * spec.scale).to(q.dtype)
    dq = dscores @ _every_head(k, q)
    dk = _sum_of_group(dscores.transpose(2, 3) @ q, k)
    dv = _sum_of_group(_dropped(weights, spec, tensors).transpose(2, 3) @ dout, v)
    return Gradients(dq, dk, dv, dbias, drelative, dsinks, dscale)


def attention_tangent(
    saved: Saved, tangents: Tangents, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor]:
    """The tangents of what `attention` returned, from those of what it was given; written out, as the backward."""
    q, k, v, out, lse = saved
    k, v = (keys_there(t, tensors.key_lengths) for t in (k, v))
    dk, dv = (None if t is None else keys_there(t, tensors.key_lengths) for t in (tangents.k, tangents.v))
    safe_lse = lse[..., None].masked_fill((lse == float("-inf"))[..., None], float("inf"))
    scores = scores_of(q, k, spec, tensors)
    weights, sink_weights = _weights(scores, safe_lse, tensors)
    weights = weights.to(q.dtype)
    dscores = torch.zeros_like(weights)
    if tangents.q is not None:
        dscores = dscores + _products(tangents.q, k, spec)
    if dk is not None:
        dscores = dscores + _products(q, dk, spec)
    dscores = _scaled(dscores, tensors)
    if tangents.head_scale is not None:
        dscores = dscores + tangents.head_scale[:, :, None, None] * _products(q, k, spec)
    if spec.softcap:
        dscores = dscores * _cap_slope(q, k, spec, tensors)
    if tangents.bias is not None:
        dscores = dscores + tangents.bias.to(dscores.dtype)
    if tangents.relative_bias is not None:
        dscores = dscores + _by_distance(tangents.relative_bias, q.shape[2], k.shape[2]).to(dscores.dtype)
    # The tangent of a bias may be anything where it is hidden.
    dweights = weights * dscores.masked_fill(scores == float("-inf"), 0.0)
    dlse = dweights.sum(-1, dtype=lse.dtype)
    if tangents.sinks is not None and tensors.sinks is not None:
        dlse = dlse + (sink_weights[..., 0] * tangents.sinks[:, :, None]).to(lse.dtype)
    dout = _dropped(dweights.to(q.dtype), spec, tensors) @ _every_head(v, q) - dlse[..., None].to(out.dtype) * out
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


def is_rounded(lse: Tensor) -> Tensor:
    """Which log-sum-exps are so huge that rounding changes the weights made of them, as where all keys of a row
    have a bias of -1e9."""
    return (lse.abs() > LARGEST_EXACT) & lse.isfinite()


def any_rounded(lse: Tensor) -> tuple[bool, bool]:
    """Whether any is, and whether all are finite: in one step where they are, else in two more."""
    largest = torch.linalg.vector_norm(lse, math.inf).item()
    if largest < math.inf:
        return largest > LARGEST_EXACT, True
    return torch.linalg.vector_norm(lse.nan_to_num(0.0, 0.0, 0.0), math.inf).item() > LARGEST_EXACT, False


def _weights(scores: Tensor, lse: Tensor, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    """The weights exp(score - lse) of the keys (B, Hq, Lq, Lk) and of the sinks (B, Hq, Lq, 1; zeros without);
    those of rows whose log-sum-exps are rounded are made to add up to 1."""
    weights = torch.exp(scores - lse)
    sink_weights = torch.zeros_like(lse)
    if tensors.sinks is not None:
        sink_weights = torch.exp(tensors.sinks[:, :, None, None] - lse)
    sums = (weights.sum(-1, keepdim=True) + sink_weights).masked_fill(~is_rounded(lse), 1.0)
    return weights / sums, sink_weights / sums


def _dropped(weights: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Tensor:
    """What is kept of the weights (B, Hq, Lq, Lk), and their gradients, under dropout."""
    if tensors.dropout_state is None:
        return weights
    keep = dropout_mask(tensors.dropout_state, spec.dropout, *weights.shape[1:])
    return (weights * keep) / (1.0 - spec.dropout)


def scores_of(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Tensor:
    """The scores, -inf where hidden."""
    queries, keys = q.shape[2], k.shape[2]
    scores = _scaled(_products(q, k, spec), tensors)
    if tensors.relative_bias is not None or (tensors.bias is not None and tensors.bias.dtype != torch.bool):
        # As precise as the bias may be: float32's lowest number would be -inf in half precision.
        scores = scores.to(lse_dtype(q.dtype))
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


def _products(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    return q @ _every_head(k, q).transpose(2, 3) * spec.scale


def _scaled(products: Tensor, tensors: ScoreTensors) -> Tensor:
    """Times the scale of each head, in its precision."""
    return products if tensors.head_scale is None else products * tensors.head_scale[:, :, None, None]


def _cap_slope(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Tensor:
    """By what the soft cap multiplies the derivative of the scores."""
    return 1.0 - torch.tanh(_scaled(_products(q, k, spec), tensors) / spec.softcap).square()


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
    each diagonal. The key of column j stands `shift` + j - i behind the diagonal of row i."""
    rows, columns = dscores.shape[2:]
    if rows * columns == 0:
        return torch.zeros_like(relative_bias)
    sums = diagonal_sums(dscores, relative_bias.dtype)
    return of_distances(sums, shift - rows + 1, relative_bias.shape[2] // 2)


def diagonal_sums(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums (..., rows + columns - 1) along the diagonals of (..., rows, columns), from the lower left corner
    to the upper right. No atomics: every row is shifted by one against the one below, and columns are summed."""
    rows, columns = scores.shape[-2:]
    skewed = F.pad(scores.flip(-2), (0, rows)).flatten(-2)[..., :-rows]
    return skewed.unflatten(-1, (rows, columns + rows - 1)).sum(-2, dtype=dtype)


def of_distances(sums: Tensor, nearest: int, radius: int) -> Tensor:
    """The gradient of a relative bias (B, H, 2 R + 1) from the sums (B, H, distances) of what each distance gets,
    the first being `nearest`. Those of R and more, either way, go to the ends."""
    farthest = nearest + sums.shape[2] - 1
    missing = max(0, nearest + radius), max(0, radius - farthest)
    sums = F.pad(sums, missing) if any(missing) else sums
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


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors, maxima: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if maxima is not None and maxima.numel() * k.shape[2]:
        maxima.copy_(scores_of(q, keys_there(k, tensors.key_lengths), spec, tensors).amax(-1))
    out, lse = attention(q, k, v, spec, tensors)
    return heads_last(out), lse


def backward(
    dout: Tensor, dlse: Tensor | None, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted
) -> Gradients:
    of = attention_backward(dout, dlse, saved, spec, tensors, wanted)
    return of._replace(q=heads_last(of.q), k=heads_last(of.k), v=heads_last(of.v))


def tangent(saved: Saved, tangents: Tangents, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    dout, dlse = attention_tangent(saved, tangents, spec, tensors)
    return heads_last(dout), dlse
