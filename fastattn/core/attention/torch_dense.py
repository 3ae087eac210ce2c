"""PyTorch's flash and cuDNN attention on CUDA, of heads (B, H, L, D) in half precision.

The aten operators behind F.scaled_dot_product_attention are called directly, because the public function returns
no log-sum-exp and takes no window.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.core.attention.spec import NO_TENSORS, AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.torch_flash import hides_by_window, is_causal, unit_stride
from fastattn.core.attention.torch_trial import Trial, agrees, causal_problem

_flash = torch.ops.aten._scaled_dot_product_flash_attention
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
# Those of F.scaled_dot_product_attention take no window. q, k, v are (B, L, H, D) here.
_windowed, _windowed_backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward


def _window_of_trial(q: Tensor, k: Tensor) -> tuple[AttentionSpec, ScoreTensors]:
    return AttentionSpec(scale=q.shape[3] ** -0.5, window=(9, 4)), NO_TENSORS


LSE_GRADIENT = Trial("flash attention with a gradient of the log-sum-exp", causal_problem, lse_gradient=True)
WINDOW = Trial("flash attention with a window", _window_of_trial)
# The first rows see nothing.
ALIGNED = Trial("flash attention of other lengths for queries and keys", _window_of_trial, queries=90, keys=70)


def ready(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """What F.scaled_dot_product_attention asks of flash attention, too, needs no trial."""
    if not hides_by_window(q, k, spec):
        return True
    return agrees(WINDOW if q.shape[2] == k.shape[2] else ALIGNED, q, k, v, forward, backward)


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors = NO_TENSORS
) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    if not hides_by_window(q, k, spec):
        out, lse, *_ = _flash(q, k, v, 0.0, is_causal(q, k, spec), scale=spec.scale)
        return out, lse.contiguous()
    there = (t.transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = _windowed(*there, None, None, q.shape[2], k.shape[2], 0.0, False, False, **window_of(spec))
    return out.transpose(1, 2), _empty_rows_hidden(lse, q, k).contiguous()


def backward(
    dout: Tensor, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors = NO_TENSORS, _: Wanted | None = None
) -> Gradients:
    dout, q, k, v, out = (unit_stride(t) for t in (dout, *saved[:4]))
    # Without dropout: a random state that is not read.
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    lengths = q.shape[2], k.shape[2]
    if not hides_by_window(q, k, spec):
        causal = is_causal(q, k, spec)
        return Gradients(
            *_flash_backward(
                dout, q, k, v, out, saved.lse, None, None, *lengths, 0.0, causal, unused, unused, scale=spec.scale
            )
        )
    lse = saved.lse if q.shape[2] <= k.shape[2] else saved.lse.nan_to_num(math.nan, math.inf, math.inf)
    there = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    found = _windowed_backward(*there, lse, None, None, *lengths, 0.0, False, unused, unused, **window_of(spec))
    return Gradients(*(t.transpose(1, 2) for t in found))


def window_of(spec: AttentionSpec) -> dict[str, float | int]:
    """As the operators take it: -1 for a side without bound."""
    left, right = (-1 if side is None else side for side in (spec.left, spec.right))
    return {"scale": spec.scale, "window_size_left": left, "window_size_right": right}


def _empty_rows_hidden(lse: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The operator gives rows that see nothing a log-sum-exp of +inf. There are none unless queries are more than
    keys: a window holds its own diagonal."""
    return lse if q.shape[2] <= k.shape[2] else lse.nan_to_num(math.nan, -math.inf, -math.inf)
