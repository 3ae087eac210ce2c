"""Scales of heads in plain PyTorch: multiplied into q, in a precision in which that rounds nothing of account.

PyTorch's own kernels know one scale for all heads. In float32 and float64, q is multiplied by the scales of its
heads. In half precision that would round once more than scaling the scores does, so all is computed in float32. On
CUDA only half precision has a fused kernel: there q times its scale is the sum of two numbers in half precision,
side by side, (high, low) (k, k)^T = (high + low) k^T.
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
    scaled, rest = _scaled(q, tensors), tensors._replace(head_scale=None)
    if _in_halves(q, k, v, spec, rest):
        out, lse = function(_halves(scaled, q.dtype), torch.cat((k, k), -1), _widened(v), spec, rest)
        return heads_last(out[..., : v.shape[3]]), lse
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
    scaled, rest = _scaled(q, tensors), tensors._replace(head_scale=None)
    if _in_halves(q, k, v, spec, rest, wanted, dlse):
        inputs = Saved(_halves(scaled, q.dtype), torch.cat((k, k), -1), _widened(v), _widened(out), lse)
        of = function(_widened(dout), dlse, inputs, spec, rest, wanted)
        dscaled, dk = of.q[..., : q.shape[3]].to(scaled.dtype), sum(of.k.split(k.shape[3], -1))
        of = of._replace(k=dk, v=of.v[..., : v.shape[3]])
    else:
        k_there, v_there, out_there = (t.to(scaled.dtype) for t in (k, v, out))
        inputs = Saved(scaled, k_there, v_there, out_there, lse)
        of = function(dout.to(scaled.dtype), dlse, inputs, spec, rest, wanted)
        dscaled = of.q
    dscale = (dscaled * q).sum((2, 3))
    dq = _scaled(dscaled, tensors)
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
    if q.device.type != "cuda" or q.dtype.itemsize != 2 or q.shape[3] != v.shape[3]:
        return False
    wide_q, wide_k, wide_v = (torch_calls.wide(t, 2 * t.shape[3]) for t in (q, k, v))
    return torch_routes.serving(wide_q, wide_k, wide_v, spec, tensors, wanted, dlse) is not None


def _widened(t: Tensor) -> Tensor:
    """Zeros beside each row."""
    return torch_calls.padded(t, 2 * t.shape[3])


def _halves(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """Two numbers in half precision for each, whose sum it is."""
    high = scaled.to(dtype)
    return torch.cat((high, (scaled - high).to(dtype)), -1)
