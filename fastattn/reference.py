"""The definition: plain PyTorch, differentiable by autograd, any dtype up to float64, N x N memory.

Every backend computes what stands here. In float64 it is the oracle of the tests; in the dtype of the inputs
it is the eager computation whose rounding error the tests measure by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.spec import NO_TENSORS, AttentionSpec, MLPSpec, MLPWeights, ScoreTensors, lse_dtype


def visible(
    queries: int,
    keys: int,
    spec: AttentionSpec,
    device: torch.device | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """May query i see key j? bool (Lq, Lk), or (B, 1, Lq, Lk) with key_lengths (B,)."""
    distance = _distance(queries, keys, device)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if spec.left is not None:
        seen &= distance >= -spec.left
    if spec.right is not None:
        seen &= distance <= spec.right
    if key_lengths is not None:
        seen = seen & (torch.arange(keys, device=device) < key_lengths[:, None, None, None])
    return seen


def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors = NO_TENSORS
) -> tuple[Tensor, Tensor]:
    """softmax of the scores over the visible keys, times v, and the log-sum-exp of the scores in nats.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv); query head h reads key head h // (Hq / Hkv).
    Returns out (B, Hq, Lq, Dv) and lse (B, Hq, Lq). A row that sees no key and has no sink gives 0 and -inf.
    """
    scores = _scores(q, k, spec, tensors)
    if tensors.sinks is not None:
        # One more key, whose value is zero.
        sink = tensors.sinks.to(scores.dtype)[:, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    lse = torch.logsumexp(scores.to(lse_dtype(q.dtype)), -1)
    weights = torch.softmax(scores, -1).masked_fill((lse == float("-inf"))[..., None], 0.0)
    return weights[..., : k.shape[2]] @ _every_head(v, q), lse


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `attention` from what it returned, written out, so that they can be differentiated again:
    dq, dk, dv and dsinks (B, Hq), None without sinks.

    A row that sees no key has lse -inf whatever the inputs: its weights and its gradients are 0.
    """
    empty = (lse == float("-inf"))[..., None]
    scores = _scores(q, k, spec, tensors)
    safe_lse = lse[..., None].masked_fill(empty, float("inf"))
    weights = torch.exp(scores - safe_lse).to(q.dtype)
    delta = (dout * out).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    delta = delta.masked_fill(empty, 0.0)
    dweights = dout @ _every_head(v, q).transpose(2, 3)
    dscores = weights * (dweights - delta) * spec.scale
    if spec.softcap:
        products = q @ _every_head(k, q).transpose(2, 3) * spec.scale
        dscores = dscores * (1.0 - torch.tanh(products / spec.softcap).square())
    dscores = dscores.to(q.dtype)
    dq = dscores @ _every_head(k, q)
    dk = _sum_of_group(dscores.transpose(2, 3) @ q, k)
    dv = _sum_of_group(weights.transpose(2, 3) @ dout, v)
    if tensors.sinks is None:
        return dq, dk, dv, None
    sink_weights = torch.exp(tensors.sinks[:, :, None, None] - safe_lse)
    return dq, dk, dv, -(sink_weights * delta).sum((2, 3)).to(tensors.sinks.dtype)


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Tensor:
    """The scores, -inf where hidden."""
    queries, keys = q.shape[2], k.shape[2]
    scores = q @ _every_head(k, q).transpose(2, 3) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if tensors.alibi_slopes is not None:
        distance = _distance(queries, keys, q.device).abs()
        scores = scores - (tensors.alibi_slopes[:, :, None, None] * distance).to(scores.dtype)
    seen = visible(queries, keys, spec, q.device, tensors.key_lengths)
    return scores.masked_fill(~seen, float("-inf"))


def _distance(queries: int, keys: int, device: torch.device | None) -> Tensor:
    """(Lq, Lk): how far key j stands after the diagonal of query i, which is at key i + Lk - Lq."""
    diagonal = torch.arange(queries, device=device)[:, None] + (keys - queries)
    return torch.arange(keys, device=device)[None, :] - diagonal


def _every_head(t: Tensor, q: Tensor) -> Tensor:
    """One key or value head for every query head."""
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _sum_of_group(gradient: Tensor, t: Tensor) -> Tensor:
    """The gradients of the query heads that share a key or value head, added up."""
    return gradient.unflatten(1, (t.shape[1], gradient.shape[1] // t.shape[1])).sum(2)


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
