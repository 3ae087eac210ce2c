"""The Triton kernels as a backend: nothing but the way from a spec to a launcher."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastattn.head_spec import HeadsSpec, HeadTensors
from fastattn.kernels import heads as _heads
from fastattn.kernels import mlp as _mlp
from fastattn.kernels import norm as _norm
from fastattn.kernels.attention import backward as _backward
from fastattn.kernels.attention import forward as _forward
from fastattn.kernels.attention import tangent as _tangent
from fastattn.masks import BlockLists
from fastattn.masks.lists import unpacked
from fastattn.norm_spec import NormSpec
from fastattn.spec import AttentionSpec, Gradients, MLPSpec, MLPWeights, ScoreTensors, Tangents, Wanted


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor]:
    return _forward.attention_forward(q, k, v, spec, tensors, _lists(spec, tensors))


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
    lists = _lists(spec, tensors)
    return Gradients(*_backward.attention_backward(dout, q, k, v, out, lse, dlse, spec, tensors, wanted, lists))


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
    lists = _lists(spec, tensors)
    return _tangent.attention_tangent(q, k, v, out, lse, tangents, spec, tensors, lists)


def _lists(spec: AttentionSpec, tensors: ScoreTensors) -> BlockLists | None:
    """The mask's block lists, if it has any."""
    if tensors.mask is None or spec.mask is None:
        return None
    return unpacked(tensors.mask, spec.mask)


def mlp_forward(x: Tensor, weights: MLPWeights, spec: MLPSpec, save: bool) -> tuple[Tensor, Tensor]:
    w_in, b_in, w_up, b_up, w_out, b_out = weights
    if w_up is None:
        return _mlp.mlp_forward(x, w_in, b_in, w_out, b_out, spec.activation, save)
    return _mlp.gated_mlp_forward(x, w_in, b_in, w_up, b_up, w_out, b_out, spec.activation, save)


def mlp_backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, saved: Tensor, wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    w_in, _, w_up, _, w_out, _ = weights
    if w_up is None:
        return _mlp.mlp_backward(dy, x, w_in, w_out, saved, spec.activation, wanted)
    return _mlp.gated_mlp_backward(dy, x, w_in, w_up, w_out, saved, spec.activation, wanted)


def prepare_heads(x: Tensor, spec: HeadsSpec, tensors: HeadTensors) -> Tensor:
    eps = spec.eps if spec.norm else None
    return _heads.prepare_heads(x, eps=eps, interleaved=spec.interleaved, **tensors._asdict())


def prepare_heads_backward(
    dy: Tensor, x: Tensor, spec: HeadsSpec, tensors: HeadTensors
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    eps = spec.eps if spec.norm else None
    return _heads.prepare_heads_backward(dy, x, eps=eps, interleaved=spec.interleaved, **tensors._asdict())


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    centred, eps, offset = spec.options
    return _norm.norm_forward(x, residual, weight, bias, centred=centred, eps=eps, offset=offset)


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
    want_weight, want_bias = wanted
    return _norm.norm_backward(
        dy, dtotal, x, weight, mean, inverse, offset=spec.weight_offset, want_weight=want_weight,
        want_bias=want_bias,
    )  # fmt: skip
