"""The definition as a backend, for debugging: N x N memory, plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fastattn import reference
from fastattn.backends.layout import heads_last
from fastattn.spec import AttentionSpec


def attention_forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    out, lse = reference.attention(q, k, v, spec)
    return heads_last(out), lse


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
    dq, dk, dv = reference.attention_backward(dout, q, k, v, out, lse, dlse, spec)
    return heads_last(dq), heads_last(dk), heads_last(dv)
