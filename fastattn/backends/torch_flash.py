"""PyTorch's own fused attention, for the calls in which it computes the same thing.

The aten operators behind F.scaled_dot_product_attention are called directly, because the public function does
not return the log-sum-exp that the backward and merge_states need.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.spec import AttentionSpec, ScoreTensors

_aten = torch.ops.aten


def serves(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Whether PyTorch's flash attention computes this: one head width, its causal mask aligned top-left, nothing
    else done to the scores."""
    if spec.left is not None or spec.right not in (None, 0) or spec.softcap or tensors != ScoreTensors():
        return False
    if q.shape[3] != v.shape[3] or (spec.right == 0 and q.shape[2] != k.shape[2]) or q.numel() * k.numel() == 0:
        return False
    if q.device.type == "cpu":
        return True
    if q.device.type != "cuda" or torch.version.cuda is None:
        return False
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and q.shape[3] % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, spec.right == 0, scale=spec.scale
        )
    else:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, spec.right == 0, scale=spec.scale)
    return out, lse.contiguous()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (_unit_stride(t) for t in (dout, q, k, v, out))
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, spec.right == 0, scale=spec.scale
        )
    # Dense and without dropout: no cumulative lengths, and a random state that is not read.
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    return _aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, spec.right == 0, unused, unused,
        scale=spec.scale,
    )  # fmt: skip


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
