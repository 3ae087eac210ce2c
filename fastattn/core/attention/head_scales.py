"""Scales of heads in plain PyTorch: multiplied into q, in a precision in which that rounds nothing of account.

PyTorch's own kernels know one scale for all heads. In float32 and float64, q is multiplied by the scales of its
heads. In half precision that would round once more than scaling the scores does, so all is computed in float32. On
CUDA only half precision has a fused kernel: there q times its scale is the sum of two numbers in half precision,
side by side, and each number of k stands there twice: (high, low) (k, k)^T = (high + low) k^T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.core.attention import torch_calls, torch_fused, torch_routes
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.torch_flash import unit_stride
from fastattn.core.layout import empty_heads, heads_last
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
    if _in_halves(q, k, v, spec, rest):
        out, lse = function(_halves(q, tensors), _twice(k), v, spec, rest)
        return heads_last(out), lse
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
    if _in_halves(q, k, v, spec, rest, wanted, dlse):
        of = function(dout, dlse, saved._replace(q=_halves(q, tensors), k=_twice(k)), spec, rest, wanted)
        # Both halves of q have the same gradient.
        dscaled = of.q[..., ::2]
        # Products of half precision in float32: torch.mul would round them first.
        dscale = torch.addcmul(torch_calls.row((), 1, lse.dtype, lse.device), dscaled, q).sum((2, 3))
        assert tensors.head_scale is not None
        dq = torch.mul(dscaled, tensors.head_scale[..., None, None], out=empty_heads(q.shape, q))
        dk = torch.sum(of.k.unflatten(3, (-1, 2)), -1, out=empty_heads(k.shape, k))
        return of._replace(q=dq, k=dk, v=heads_last(of.v), head_scale=dscale)
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


def _scaled(q: Tensor, tensors: ScoreTensors) -> Tensor:
    """q (B, Hq, Lq, D), or its gradient, times the scales of its heads, in at least float32."""
    assert tensors.head_scale is not None
    return q.to(lse_dtype(q.dtype)) * tensors.head_scale[..., None, None]


def _in_halves(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    wanted: Wanted | None = None,
    dlse: Tensor | None = None,
) -> bool:
    """Whether PyTorch's fused kernel shall compute it, in half precision and twice as wide. wanted, dlse: of a
    backward."""
    if q.device.type != "cuda" or q.dtype.itemsize != 2:
        return False
    wide_q, wide_k = (torch_calls.wide(t, 2 * t.shape[3]) for t in (q, k))
    return torch_routes.serving(wide_q, wide_k, v, spec, tensors, wanted, dlse) is not None


def _halves(q: Tensor, tensors: ScoreTensors) -> Tensor:
    """Two numbers in half precision for each of q times its scale, whose sum it is: (B, Hq, Lq, 2 D)."""
    assert tensors.head_scale is not None
    step, scales = torch_fused.SCALED[q.dtype], tensors.head_scale[..., None, None]
    return torch_fused.run(step, unit_stride(q), scales)[0].view(q.dtype)


def _twice(k: Tensor) -> Tensor:
    """Each number beside itself."""
    return k[..., None].expand(*k.shape, 2).flatten(3)
