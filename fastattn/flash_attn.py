"""flash-attn 2's functions by name, arguments and layout: `from fastattn.flash_attn import flash_attn_func`.

Tensors are (batch, length, heads, width), or packed (tokens, heads, width). Causal masks and windows are aligned
bottom-right; a window of -1 is unbounded. Gradients are always deterministic.

With return_attn_probs they return (out, softmax_lse, None). The log-sum-exp is (batch, heads, queries), or (heads,
tokens) if packed, and has a gradient. The third result, which holds the dropped weights in flash-attn, is not
computed. Rows that see no key give 0 and a log-sum-exp of -inf, where flash-attn gives +inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastattn import masks
from fastattn.core.attention.functional import attention
from fastattn.core.attention.spec import check_scale
from fastattn.core.attention.varlen import attention_varlen
from fastattn.ground import arguments
from fastattn.ground.checks import check_floating, check_same

Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`fastattn.attention` of q (B, Lq, Hq, D), k (B, Lk, Hkv, D) and v (B, Lk, Hkv, Dv): out (B, Lq, Hq, Dv).

    alibi_slopes: (Hq,) or (B, Hq).
    deterministic: without effect, since gradients always are.
    """
    return_attn_probs = _check_flags(deterministic, return_attn_probs)
    _check_shape(4, "(batch, length, heads, width)", q=q, k=k, v=v)
    out, lse = attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        **_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        return_lse=True,
    )
    return _result(out.transpose(1, 2), lse, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q (B, Lq, Hq, D) and keys and values in one tensor kv (B, Lk, 2, Hkv, D)."""
    _check_shape(4, "(batch, length, heads, width)", q=q)
    k, v = _unpacked("kv", kv, "(batch, length, 2, heads, width)")
    _check_packed_keys(q, kv)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of queries, keys and values in one tensor qkv (B, L, 3, H, D)."""
    q, k, v = _unpacked("qkv", qkv, "(batch, length, 3, heads, width)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`fastattn.attention_varlen` of packed q (total queries, Hq, D), k and v (total keys, Hkv, D or Dv).

    alibi_slopes: (Hq,) or (sequences, Hq).
    block_table: must be None; paged keys are not supported.
    """
    return_attn_probs = _check_flags(deterministic, return_attn_probs)
    if block_table is not None:
        raise ValueError("block_table must be None: keys and values in pages are not supported, got a table")
    out, lse = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        **_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        return_lse=True,
    )  # fmt: skip
    return _result(out, lse, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of packed q (total queries, Hq, D) and kv (total keys, 2, Hkv, D)."""
    _check_shape(3, "(tokens, heads, width)", q=q)
    k, v = _unpacked("kv", kv, "(tokens, 2, heads, width)")
    _check_packed_keys(q, kv)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of queries, keys and values in one packed tensor qkv (tokens, 3, H, D)."""
    q, k, v = _unpacked("qkv", qkv, "(tokens, 3, heads, width)")
    masks.check_cu_seqlens("cu_seqlens", cu_seqlens, tokens=len(qkv))
    if max_seqlen is not None:
        arguments.integer("max_seqlen", max_seqlen, least=0, what="an integer or None")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The options under the names that `fastattn.attention` has for them."""
    sides = [
        -1 if side is None else arguments.integer("window_size", side, what="a pair (left, right) of integers")
        for side in arguments.pair("window_size", window_size)
    ]
    if min(sides) < -1:
        raise ValueError(f"window_size must not be below -1, which is unbounded; got {window_size!r}")
    left, right = (None if side == -1 else side for side in sides)
    return {
        "dropout_p": dropout_p,
        "scale": None if softmax_scale is None else check_scale(softmax_scale, "softmax_scale"),
        "causal": causal,
        "window": (left, right),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }


def _result(out: Tensor, lse: Tensor, return_attn_probs: bool) -> Result:
    return (out, lse, None) if return_attn_probs else out


def _check_flags(deterministic: bool, return_attn_probs: bool) -> bool:
    """Check both flags, and return whether the log-sum-exp is wanted."""
    arguments.flag("deterministic", deterministic)
    return arguments.flag("return_attn_probs", return_attn_probs)


def _unpacked(name: str, t: Tensor, shape: str) -> tuple[Tensor, ...]:
    """Queries, keys and values from one tensor, as views."""
    parts, dimensions = len(name), shape.count(",") + 1
    _check_shape(dimensions, shape, **{name: t})
    if t.shape[-3] != parts:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    if t.shape[-1] == 0:
        raise ValueError(f"{name}'s head width must be at least 1, got 0")
    return t.unbind(-3)


def _check_packed_keys(q: Tensor, kv: Tensor) -> None:
    """Check kv here. `fastattn.attention` would name k and v in its errors, which the caller does not know."""
    check_same("kv", kv, "q", q)
    if kv.dim() == 5 and kv.shape[0] != q.shape[0]:
        raise ValueError(f"kv must have q's batch size {q.shape[0]}, got {kv.shape[0]}")
    if q.shape[-2] % kv.shape[-2] if kv.shape[-2] else q.shape[-2]:
        raise ValueError(f"q's heads must be a multiple of kv's heads {kv.shape[-2]}, got {q.shape[-2]}")
    if kv.shape[-1] != q.shape[-1]:
        raise ValueError(f"kv must have q's head width {q.shape[-1]}, got {kv.shape[-1]}")


def _check_shape(dimensions: int, shape: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        arguments.tensor(name, t)
        check_floating(name, t)
        if t.dim() != dimensions:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
