"""flash-attn 2's functions by name, arguments and layout: `from fastattn.flash_attn import flash_attn_func`.

Tensors are (batch, length, heads, width), or packed (tokens, heads, width). Causal masks and windows are aligned
bottom-right; a window of -1 is unbounded. Gradients are always deterministic.

With return_attn_probs they return (out, softmax_lse, None). The log-sum-exp is (batch, heads, queries), or (heads,
tokens) if packed, and has a gradient. The third result, which holds the dropped weights in flash-attn, is not
computed. Rows that see no key give 0 and a log-sum-exp of -inf, where flash-attn gives +inf. Functions of caches
and of keys in pages are for inference, and compute no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import masks
from fastattn.core.attention.functional import attention
from fastattn.core.attention.spec import check_scale
from fastattn.core.attention.varlen import attention_varlen
from fastattn.core.cache.functional import attention_with_cache
from fastattn.core.cache.spec import (
    LARGEST,
    Storage,
    check_new,
    check_positions,
    check_queries,
    check_rotation,
    check_row_numbers,
    row_numbers,
)
from fastattn.core.heads.functional import prepare_heads
from fastattn.ground import arguments
from fastattn.ground.checks import check_beside, check_floating, check_same

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
    seqused_k: Tensor | None = None,
    num_splits: int | None = None,
) -> Result:
    """`fastattn.attention_varlen` of packed q (total queries, Hq, D), k and v (total keys, Hkv, D or Dv).

    alibi_slopes: (Hq,) or (sequences, Hq).
    block_table: (sequences, most pages): k and v are pages (pages, page, Hkv, D or Dv); no gradient, no dropout.
    seqused_k, num_splits: as `fastattn.attention_varlen`'s.
    """
    return_attn_probs = _check_flags(deterministic, return_attn_probs)
    out, lse = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        **_options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        seqused_k=seqused_k, block_table=block_table, num_splits=num_splits, return_lse=True,
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


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastattn.attention_with_cache` of q (B, Lq, Hq, D): out (B, Lq, Hq, Dv), and with return_softmax_lse the
    log-sum-exp (B, Hq, Lq). Computes no gradients.

    k_cache, v_cache: (rows, capacity, Hkv, D or Dv), or pages (pages, page, Hkv, D or Dv) with a block_table.
    k, v: new tokens (B, new, Hkv, D or Dv), written to the cache from cache_seqlens on, in place.
    rotary_cos, rotary_sin: (positions, pairs). Turn k and q at the positions from cache_seqlens on; without causal
        and window, all of q at the position cache_seqlens.
    cache_seqlens: how many tokens are in the cache, (B,) or one number; None: it is full.
    cache_batch_idx: (B,), the row of the cache that each row of q uses.
    cache_leftpad: (B,), how many of a row's first keys are hidden.
    block_table: (B, most pages), with pages of any size.
    num_splits: without effect: keys are split at fixed places, whatever else is in the batch.
    k_descale, v_descale: (B, Hkv) float32, as flash-attn 3's: what the numbers of a cache of torch.float8_e4m3fn
        or torch.int8 are multiplied by. q, k and v are not quantised. Not with a block_table or cache_batch_idx:
        there rows may share a place, and `fastattn.attention_with_cache(k_scale=, v_scale=)` has scales of pages.
    """
    arguments.flag("rotary_interleaved", rotary_interleaved)
    return_softmax_lse = arguments.flag("return_softmax_lse", return_softmax_lse)
    arguments.integer("num_splits", num_splits, least=0)
    shape = "(batch, length, heads, width)"
    new = {name: t for name, t in (("k", k), ("v", v)) if t is not None}
    _check_shape(4, shape, q=q, **new)
    _check_caches(q, k_cache, v_cache, {"k_descale": k_descale, "v_descale": v_descale})
    if (k_descale is not None or v_descale is not None) and not (block_table is None and cache_batch_idx is None):
        raise ValueError(
            "k_descale and v_descale must be None beside a block_table or cache_batch_idx, by which rows may "
            "share a place in the cache: fastattn.attention_with_cache(k_scale=, v_scale=) takes scales of pages"
        )
    options = _options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    del options["dropout_p"]
    if cache_seqlens is None:
        if k is not None or block_table is not None:
            raise ValueError("cache_seqlens must be given where there are new tokens or pages, got None")
        cache_seqlens = k_cache.shape[1]
    if cache_batch_idx is not None:
        block_table = _rows_as_pages(q, k_cache, cache_batch_idx, block_table)
    q, k_cache, v_cache = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    k, v = (None if t is None else t.transpose(1, 2) for t in (k, v))
    try:
        if rotary_cos is not None or rotary_sin is not None:
            check_queries(q, Storage(k_cache, v_cache), None)
            check_new(q, Storage(k_cache, v_cache), k, v)
            tables = {"cos": rotary_cos, "sin": rotary_sin, "interleaved": rotary_interleaved}
            local = options["causal"] or options["window"] != (None, None)
            q, k = _rotated(q, k, cache_seqlens, local, tables)
        out, lse = attention_with_cache(
            q, k_cache, v_cache, k=k, v=v, cache_lengths=cache_seqlens, cache_starts=cache_leftpad,
            block_table=block_table, k_scale=k_descale, v_scale=v_descale, return_lse=True, **options,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        names = _THEIRS if cache_batch_idx is None else _THEIRS | {"block_table": "cache_batch_idx"}
        raise type(error)(arguments.in_other_words(str(error), names)) from None
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, descales: dict[str, Tensor | None]) -> None:
    """Caches of floating or quantised numbers, and a scale for each row and key head."""
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        arguments.tensor(name, t)
        if t.dtype not in LARGEST:
            check_floating(name, t)
        if t.dim() != 4:
            raise ValueError(f"{name} must have shape (batch, length, heads, width), got {tuple(t.shape)}")
    for name, scale in descales.items():
        if scale is not None:
            check_beside(name, scale, k_cache, ((q.shape[0], k_cache.shape[2]),))


def _rows_as_pages(q: Tensor, k_cache: Tensor, cache_batch_idx: Tensor, block_table: Tensor | None) -> Tensor:
    """A block table in which every row of the cache is a page."""
    if block_table is not None:
        raise ValueError("cache_batch_idx must be None beside a block_table, which says where rows lie")
    check_beside("cache_batch_idx", cache_batch_idx, q, ((q.shape[0],),))
    if cache_batch_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cache_batch_idx must be int32 or int64, got {cache_batch_idx.dtype}")
    return cache_batch_idx[:, None]


def _rotated(
    q: Tensor, k: Tensor | None, cache_seqlens: int | Tensor, local: bool, tables: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """q and k, turned. Positions count from cache_seqlens on; those of q only if keys are hidden by position."""
    check_rotation(q, None, tables["cos"], tables["sin"])
    if k is None:
        raise ValueError("cos must be None where there are no new tokens k")
    if tables["cos"].dim() != 2:
        raise ValueError(f"cos must have shape (positions, pairs), got {tuple(tables['cos'].shape)}")
    check_row_numbers("cache_lengths", cache_seqlens, q)
    first = row_numbers("cache_lengths", cache_seqlens, q)
    check_positions(tables["cos"], first + max(k.shape[2], q.shape[2] if local else 1))
    k = prepare_heads(k, offsets=first, **tables)
    if local:
        return prepare_heads(q, offsets=first, **tables), k
    (_, heads, queries, _), flat = q.shape, q.flatten(1, 2)[:, :, None]
    return prepare_heads(flat, offsets=first, **tables)[:, :, 0].unflatten(1, (heads, queries)), k


# What `attention_with_cache` calls the arguments of `flash_attn_with_kvcache`.
_THEIRS = {
    "cache_lengths": "cache_seqlens",
    "cache_starts": "cache_leftpad",
    "k_scale": "k_descale",
    "v_scale": "v_descale",
    "cos": "rotary_cos",
    "sin": "rotary_sin",
    "attention_with_cache": "flash_attn_with_kvcache",
}


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
