"""The definition: plain PyTorch, differentiable by autograd, any dtype up to float64, N x N memory.

Every backend computes what stands here. In float64 it is the oracle of the tests; in the dtype of the inputs
it is the eager computation whose rounding error the tests measure by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.spec import AttentionSpec, MLPSpec, MLPWeights, lse_dtype


def visible(queries: int, keys: int, spec: AttentionSpec, device: torch.device | None = None) -> Tensor:
    """(Lq, Lk) bool: may query i see key j?"""
    everything = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return everything.tril(keys - queries) if spec.causal else everything


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the visible keys, and the log-sum-exp of the scores in nats.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv); query head h reads key head h // (Hq / Hkv).
    Returns out (B, Hq, Lq, Dv) and lse (B, Hq, Lq). A row that sees no key gives 0 and -inf.
    """
    scores, hidden = _scores(q, k, spec)
    lse = torch.logsumexp(scores.to(lse_dtype(q.dtype)), -1)
    weights = torch.softmax(scores, -1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return weights @ _every_head(v, q), lse


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
    """The gradients of `attention` from what it returned, written out, so that they can be differentiated again.

    A row that sees no key has lse -inf whatever the inputs: its weights and its gradients are 0.
    """
    empty = (lse == float("-inf"))[..., None]
    scores, _ = _scores(q, k, spec)
    weights = torch.exp(scores - lse[..., None].masked_fill(empty, float("inf"))).to(q.dtype)
    delta = (dout * out).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    dweights = dout @ _every_head(v, q).transpose(2, 3)
    dscores = weights * (dweights - delta.masked_fill(empty, 0.0)) * spec.scale
    dscores = dscores.to(q.dtype)
    dq = dscores @ _every_head(k, q)
    dk = _sum_of_group(dscores.transpose(2, 3) @ q, k)
    dv = _sum_of_group(weights.transpose(2, 3) @ dout, v)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """The scores, -inf where hidden, and which are hidden."""
    hidden = ~visible(q.shape[2], k.shape[2], spec, q.device)
    scores = q @ _every_head(k, q).transpose(2, 3) * spec.scale
    return scores.masked_fill(hidden, float("-inf")), hidden


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
