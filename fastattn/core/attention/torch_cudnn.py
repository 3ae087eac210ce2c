"""cuDNN's attention on CUDA, for full and causal calls in half precision, where PyTorch itself would pick it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.core.attention.spec import NO_TENSORS, AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.torch_flash import is_causal, unit_stride
from fastattn.core.attention.torch_trial import Trial, agrees, causal_problem

_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
_choice = torch._fused_sdp_choice
CHOSEN = 3  # SDPBackend::cudnn_attention
# Dimensions of the log-sum-exp that the operator returns, and takes back: 4 in some versions. Set by each forward;
# a trial comes before the first backward.
_dimensions = [4]


TRIAL = Trial("cuDNN attention", causal_problem)
LSE_GRADIENT = Trial("cuDNN attention with a gradient of the log-sum-exp", causal_problem, lse_gradient=True)


def ready(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """PyTorch knows for which GPUs, versions and sizes cuDNN is faster than flash attention, and
    torch.nn.attention.sdpa_kernel may say otherwise."""
    grouped = q.shape[1] != k.shape[1]
    causal = is_causal(q, k, spec)
    chosen = _choice(q, k, v, None, 0.0, causal, scale=spec.scale, enable_gqa=grouped)
    return chosen == CHOSEN and agrees(TRIAL, q, k, v, forward, backward)


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors = NO_TENSORS
) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out, lse, *_ = _cudnn(q, k, v, None, True, 0.0, is_causal(q, k, spec), False, scale=spec.scale)
    _dimensions[0] = lse.dim()
    return out, lse.reshape(q.shape[:3])


def backward(
    dout: Tensor, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors = NO_TENSORS, _: Wanted | None = None
) -> Gradients:
    dout, q, k, v, out = (unit_stride(t) for t in (dout, *saved[:4]))
    lse = saved.lse[..., None] if _dimensions[0] == 4 else saved.lse
    # Without dropout: a random state that is not read.
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    return Gradients(
        *_cudnn_backward(
            dout, q, k, v, out, lse, unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0,
            is_causal(q, k, spec), scale=spec.scale,
        )
    )  # fmt: skip
