"""Scales of heads in plain PyTorch: multiplied into q.

PyTorch's own kernels know one scale for all heads. In float32 and float64, q is multiplied by the scales of its
heads. In half precision that rounds once more than scaling the scores does, by as much as q was rounded when it
was made. PyTorch's fused kernels on CUDA take it so; elsewhere all is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.core.attention import torch_calls, torch_routes
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.layout import heads_last
from fastattn.ground.checks import lse_dtype


def forward(
    function: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    tensors: ScoreTensors,
) -> tuple[Tensor, Tensor]:
    """What attention returns, by `function`, which computes it without scales of heads."""
    rest = tensors._replace(head_scale=None)
    if _in_half(q, k, v, spec, rest):
        return function(_scaled(q, tensors, torch.empty_like(q)), k, v, spec, rest)
    scaled = _scaled(q, tensors)
    out, lse = function(scaled, k.to(scaled.dtype), v.to(scaled.dtype), spec, rest)
    return heads_last(out.to(q.dtype)), lse


def backward(
    function: Callable[..., Gradients],
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    wanted: Wanted,
) -> Gradients:
    """The gradients of `forward`, by `function`, which computes them without scales of heads."""
    q, k, v, out, lse = saved
    rest = tensors._replace(head_scale=None)
    if _in_half(q, k, v, spec, rest, wanted, dlse):
        inputs = saved._replace(q=_scaled(q, tensors, torch.empty_like(q)))
        of = function(dout, dlse, inputs, spec, rest, wanted)
        # Products of half precision in float32: torch.mul would round them first.
        dscale = torch.addcmul(torch_calls.row((), 1, lse.dtype, lse.device), of.q, q).sum((2, 3))
        return of._replace(q=_scaled(of.q, tensors, torch.empty_like(of.q)), head_scale=dscale)
    scaled = _scaled(q, tensors)
    k_there, v_there, out_there = (t.to(scaled.dtype) for t in (k, v, out))
    inputs = Saved(scaled, k_there, v_there, out_there, lse)
    of = function(dout.to(scaled.dtype), dlse, inputs, spec, rest, wanted)
    dscale = (of.q * q).sum((2, 3))
    dq = _scaled(of.q, tensors)
    # Convert one gradient at a time, so that only one exists in both dtypes.
    return of._replace(
        q=heads_last(dq.to(q.dtype)), k=heads_last(of.k.to(k.dtype)), v=heads_last(of.v.to(v.dtype)),
        head_scale=dscale,
    )  # fmt: skip


def _scaled(q: Tensor, tensors: ScoreTensors, out: Tensor | None = None) -> Tensor:
    """q (B, Hq, Lq, D), or its gradient, times the scales of its heads, in at least float32; in the dtype of `out`
    if that is given."""
    assert tensors.head_scale is not None
    scales = tensors.head_scale[..., None, None]
    return q.to(lse_dtype(q.dtype)) * scales if out is None else torch.mul(q, scales, out=out)


def _in_half(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    wanted: Wanted | None = None,
    dlse: Tensor | None = None,
) -> bool:
    """Whether PyTorch's fused kernel shall compute it in half precision. wanted, dlse: of a backward."""
    if q.device.type != "cuda" or q.dtype.itemsize != 2:
        return False
    return torch_routes.serving(q, k, v, spec, tensors, wanted, dlse) is not None
