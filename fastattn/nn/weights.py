"""Attention weights as a result. The fused pass does not store them; they are computed again from the log-sum-exp.

The mean over heads takes one head at a time, forward and backward: there is never a tensor (batch, heads, L, S).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.core import spread
from fastattn.core.attention.definition import visible
from fastattn.core.attention.dropout import dropout_mask, keep_mask
from fastattn.core.attention.spec import AttentionSpec, check_dropout
from fastattn.core.function import Function, saves_for_forward
from fastattn.ground.checks import lse_dtype
from fastattn.masks import Lowered, Mask, decode


class Weighting(NamedTuple):
    """How the weights follow from q, k, the log-sum-exp and the bias.

    scale: the multiplier of q k^T.
    causal: query i sees keys up to key i.
    dropout_p, dropout_state: the arguments of `fastattn.attention`; no dropout if the state is None.
    """

    scale: float
    causal: bool = False
    dropout_p: float = 0.0
    dropout_state: Tensor | None = None


def head_weights(q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, weighting: Weighting) -> Tensor:
    """The weights of every head after dropout (B, H, L, S) in the log-sum-exp's dtype; differentiable.

    q (B, H, L, D), k (B, H, S, D), lse (B, H, L) as `fastattn.attention` returned it, bias the one it was
    called with. A row that sees no key has weights 0.
    """
    spread.refuse("attention weights")
    weights = _weights(q, k, lse, bias, weighting)
    if weighting.dropout_state is None:
        return weights
    dropout_p = check_dropout(weighting.dropout_p)
    return weights * dropout_mask(weighting.dropout_state, dropout_p, *weights.shape[1:]) / (1.0 - dropout_p)


def mean_weights(q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, weighting: Weighting) -> Tensor:
    """The mean of `head_weights` over the heads, (B, L, S)."""
    spread.refuse("attention weights")
    # torch.compile cannot trace a Function that has a jvp.
    function = _MeanWeights if torch.compiler.is_compiling() else _DualMeanWeights
    return function.apply(
        q, k, lse, bias, weighting.dropout_state, weighting.scale, weighting.causal, weighting.dropout_p
    )


class _MeanWeights(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, lse, bias, dropout_state, scale, causal, dropout_p):
        weighting = Weighting(scale, causal, dropout_p, dropout_state)
        total = None
        for h in range(q.shape[1]):
            weights = _weights(*_head(h, q, k, lse, bias), weighting) * _keep(h, q, k, weighting)
            total = weights if total is None else total.add_(weights)
        return total / q.shape[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, lse, bias, dropout_state, *ctx.options = inputs
        ctx.save_for_backward(q, k, lse, bias, dropout_state)

    @staticmethod
    def backward(ctx, upstream):
        q, k, lse, bias, dropout_state = ctx.saved_tensors
        weighting = Weighting(*ctx.options, dropout_state)
        upstream = upstream / q.shape[1]
        dq, dk, dlse, dbias = [], [], [], []
        for h in range(q.shape[1]):
            head = _head(h, q, k, lse, bias)
            dscores = _weights(*head, weighting) * _keep(h, q, k, weighting) * upstream
            dlse.append(-dscores.sum(-1))
            dq.append(dscores @ head[1].to(dscores.dtype) * weighting.scale)
            dk.append(dscores.mT @ head[0].to(dscores.dtype) * weighting.scale)
            if ctx.needs_input_grad[3]:
                dbias.append(dscores.sum_to_size(head[3].shape))
        bias_gradient = None
        if dbias:
            bias_gradient = torch.stack(dbias, 1) if bias.shape[1] > 1 else sum(dbias)[:, None]
            bias_gradient = bias_gradient.to(bias.dtype)
        dq, dk = torch.stack(dq, 1).to(q.dtype), torch.stack(dk, 1).to(k.dtype)
        return dq, dk, torch.stack(dlse, 1), bias_gradient, None, None, None, None


@saves_for_forward(5)
class _DualMeanWeights(_MeanWeights):
    """_MeanWeights, with forward mode."""

    @staticmethod
    def jvp(ctx, *tangents):
        q, k, lse, bias, dropout_state = ctx.saved_tensors
        weighting = Weighting(*ctx.options, dropout_state)
        if bias is None or tangents[3] is None:
            tangents = (*tangents[:3], None)
        total = 0.0
        for h in range(q.shape[1]):
            head = _head(h, q, k, lse, bias)
            dq, dk, dlse, dbias = _head(h, *tangents[:4])
            dproducts = dq.to(lse.dtype) @ head[1].to(lse.dtype).mT + head[0].to(lse.dtype) @ dk.to(lse.dtype).mT
            dscores = dproducts * weighting.scale - dlse[..., None]
            if dbias is not None:
                dscores = dscores + dbias.to(lse.dtype)
            total = total + _weights(*head, weighting) * _keep(h, q, k, weighting) * dscores
        return total / q.shape[1]


def _head(
    h: int, q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The part of each tensor that belongs to head h."""
    if bias is not None:
        bias = bias[:, h if bias.shape[1] > 1 else 0]
    return q[:, h], k[:, h], lse[:, h], bias


def _weights(q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, weighting: Weighting) -> Tensor:
    """The weights before dropout, (B, H, L, S) of all heads or (B, L, S) of one."""
    dtype = lse_dtype(q.dtype)
    scores = q.to(dtype) @ k.to(dtype).mT * weighting.scale
    if weighting.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if bias is not None:
        hides = bias.dtype == torch.bool
        scores = scores.masked_fill(~bias, float("-inf")) if hides else scores + bias.to(dtype)
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None])


def _keep(h: int, q: Tensor, k: Tensor, weighting: Weighting) -> Tensor | float:
    """The factor by which dropout multiplies the weights of head h: 0, or 1 / (1 - dropout_p)."""
    if weighting.dropout_state is None:
        return 1.0
    dropout_p = check_dropout(weighting.dropout_p)
    head = torch.full((), h, device=q.device)
    query = torch.arange(q.shape[2], device=q.device)[:, None]
    keep = keep_mask(weighting.dropout_state[:, None, None], head, query, 0, k.shape[2], dropout_p)
    return keep * (1.0 / (1.0 - dropout_p))


def mask_as_bias(mask: Mask | Lowered, q: Tensor, k: Tensor) -> Tensor:
    """A mask as a bias of `fastattn.attention`, (1 or B, 1 or H, L, S): bool, True where a key is seen; or, if
    keys may count several times, the logarithm of how often, which is added to their scores."""
    shape = (*q.shape[:3], k.shape[2], q.device)
    lowered = mask.lower(*shape) if isinstance(mask, Mask) else mask
    lowered.check(*shape)
    if lowered.lists is None:
        spec = AttentionSpec(window=(lowered.left, lowered.right))
        seen = visible(q.shape[2], k.shape[2], spec, q.device, lowered.key_lengths, lowered.intervals)
        return seen[(None,) * (4 - seen.dim())]
    # Only as many batch entries and heads as have patterns of their own.
    batch, heads = lowered.lists.pattern.shape
    seen, added = decode(lowered.lists, batch, heads, q.shape[2], k.shape[2])
    return seen if lowered.lists.full_counts is None else added


def joined(bias: Tensor | None, other: Tensor) -> Tensor:
    """Two biases of `fastattn.attention` as one: keys that both show, with the sum of what both add."""
    if bias is None:
        return other
    if bias.dtype == torch.bool and other.dtype == torch.bool:
        return bias & other
    if bias.dtype != torch.bool and other.dtype != torch.bool:
        return bias + other
    seen, added = (bias, other) if bias.dtype == torch.bool else (other, bias)
    return torch.where(seen, added, float("-inf"))
