"""The Triton kernels as a backend: nothing but the way from a spec to a launcher."""

from __future__ import annotations

from torch import Tensor

from fastattn.kernels import attention_backward as _backward
from fastattn.kernels import attention_forward as _forward
from fastattn.spec import AttentionSpec


def attention_forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    return _forward.attention_forward(q, k, v, causal=spec.causal, scale=spec.scale)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward.attention_backward(dout, q, k, v, out, lse, dlse, causal=spec.causal, scale=spec.scale)
