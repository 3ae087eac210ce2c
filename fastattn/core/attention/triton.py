"""The way from a spec to the attention kernels' launchers: what they get has widths that are multiples of 8."""

from __future__ import annotations

from torch import Tensor

from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Tangents, Wanted
from fastattn.core.attention.tilings import chosen
from fastattn.core.layout import in_eights, without_padding
from fastattn.kernels import invariant as _invariant
from fastattn.kernels import invariant_backward as _invariant_backward
from fastattn.kernels.attention import backward as _backward
from fastattn.kernels.attention import forward as _forward
from fastattn.kernels.attention import tangent as _tangent
from fastattn.kernels.launch.recording import record as record
from fastattn.masks import BlockLists
from fastattn.masks.lists import unpacked


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors, maxima: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    value_width = v.shape[3]
    q, k, v = in_eights(q), in_eights(k), in_eights(v)
    if spec.invariant:
        if maxima is not None:
            raise ValueError(
                "return_max is not computed by backend 'triton' in an invariant call, only by 'portable'"
            )
        out, lse = _invariant.invariant_attention(q, k, v, spec, tensors)
    else:
        tilings = chosen(q, k, v, spec, tensors, "forward")
        out, lse = _forward.attention_forward(q, k, v, spec, tensors, _lists(spec, tensors), maxima, tilings)
    return without_padding(out, value_width), lse


def backward(
    dout: Tensor, dlse: Tensor | None, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted
) -> Gradients:
    width, value_width = saved.q.shape[3], saved.v.shape[3]
    dout, saved = in_eights(dout), _saved_in_eights(saved)
    if spec.invariant:
        dq, dk, dv, dsinks, dscale = _invariant_backward.invariant_backward(dout, dlse, saved, spec, tensors)
        gradients = Gradients(dq, dk, dv, None, None, dsinks, dscale)
    else:
        lists = _lists(spec, tensors)
        tilings = chosen(saved.q, saved.k, saved.v, spec, tensors, "backward")
        gradients = Gradients(
            *_backward.attention_backward(dout, dlse, saved, spec, tensors, wanted, lists, tilings)
        )
    return gradients._replace(
        q=without_padding(gradients.q, width),
        k=without_padding(gradients.k, width),
        v=without_padding(gradients.v, value_width),
    )


def tangent(saved: Saved, tangents: Tangents, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    value_width = saved.v.shape[3]
    tangents = tangents._replace(
        **{name: in_eights(t) for name, t in zip("qkv", tangents[:3], strict=True) if t is not None}
    )
    out_tangent, lse_tangent = _tangent.attention_tangent(
        _saved_in_eights(saved), tangents, spec, tensors, _lists(spec, tensors)
    )
    return without_padding(out_tangent, value_width), lse_tangent


def _saved_in_eights(saved: Saved) -> Saved:
    q, k, v, out, lse = saved
    return Saved(in_eights(q), in_eights(k), in_eights(v), in_eights(out), lse)


def _lists(spec: AttentionSpec, tensors: ScoreTensors) -> BlockLists | None:
    """The mask's block lists, if it has any."""
    if tensors.mask is None or spec.mask is None:
        return None
    return unpacked(tensors.mask, spec.mask)
