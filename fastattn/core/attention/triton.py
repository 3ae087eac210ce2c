"""The way from a spec to the attention kernels' launchers, and nothing else."""

from __future__ import annotations

from torch import Tensor

from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Tangents, Wanted
from fastattn.core.attention.tilings import chosen
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
    if spec.invariant:
        if maxima is not None:
            raise ValueError(
                "return_max is not computed by backend 'triton' in an invariant call, only by 'portable'"
            )
        return _invariant.invariant_attention(q, k, v, spec, tensors)
    tilings = chosen(q, k, v, spec, tensors, "forward")
    return _forward.attention_forward(q, k, v, spec, tensors, _lists(spec, tensors), maxima, tilings)


def backward(
    dout: Tensor, dlse: Tensor | None, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted
) -> Gradients:
    if spec.invariant:
        dq, dk, dv, dsinks, dscale = _invariant_backward.invariant_backward(dout, dlse, saved, spec, tensors)
        return Gradients(dq, dk, dv, None, None, dsinks, dscale)
    lists = _lists(spec, tensors)
    tilings = chosen(saved.q, saved.k, saved.v, spec, tensors, "backward")
    return Gradients(*_backward.attention_backward(dout, dlse, saved, spec, tensors, wanted, lists, tilings))


def tangent(saved: Saved, tangents: Tangents, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    lists = _lists(spec, tensors)
    return _tangent.attention_tangent(saved, tangents, spec, tensors, lists)


def _lists(spec: AttentionSpec, tensors: ScoreTensors) -> BlockLists | None:
    """The mask's block lists, if it has any."""
    if tensors.mask is None or spec.mask is None:
        return None
    return unpacked(tensors.mask, spec.mask)
