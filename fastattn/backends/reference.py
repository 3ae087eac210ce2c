"""The definition as a backend, for debugging: N x N memory, plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import reference
from fastattn.backends.layout import heads_last
from fastattn.head_spec import HeadsSpec, HeadTensors
from fastattn.norm_spec import NormSpec
from fastattn.spec import AttentionSpec, Gradients, MLPSpec, MLPWeights, ScoreTensors, Tangents, Wanted


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor]:
    out, lse = reference.attention(q, k, v, spec, tensors)
    return heads_last(out), lse


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
    of = reference.attention_backward(dout, q, k, v, out, lse, dlse, spec, tensors, wanted)
    return of._replace(q=heads_last(of.q), k=heads_last(of.k), v=heads_last(of.v))


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
    dout, dlse = reference.attention_tangent(q, k, v, out, lse, tangents, spec, tensors)
    return heads_last(dout), dlse


def mlp_forward(x: Tensor, weights: MLPWeights, spec: MLPSpec, save: bool) -> tuple[Tensor, Tensor]:
    y = reference.mlp(x, weights, spec)
    if not save:
        return y, x.new_empty(0)
    saved = F.linear(x, weights.w_in, weights.b_in)
    if weights.w_up is not None:
        saved = torch.cat((saved, F.linear(x, weights.w_up, weights.b_up)), 1)
    return y, saved


def mlp_backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, saved: Tensor, wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    gradients = reference.mlp_backward(dy, x, weights, spec)
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


def prepare_heads(x: Tensor, spec: HeadsSpec, tensors: HeadTensors) -> Tensor:
    return heads_last(reference.prepare_heads(x, spec, tensors))


def prepare_heads_backward(
    dy: Tensor, x: Tensor, spec: HeadsSpec, tensors: HeadTensors
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dx, dweight, dscale = reference.prepare_heads_backward(dy, x, spec, tensors)
    return heads_last(dx), dweight, dscale


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    y, total, mean, inverse = reference.norm(x, residual, weight, bias, spec)
    return y.contiguous(), None if total is None else total.contiguous(), mean, inverse


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
    dx, dweight, dbias = reference.norm_backward(dy, dtotal, x, weight, spec)
    return dx.contiguous(), dweight if wanted[0] else None, dbias if wanted[1] else None
