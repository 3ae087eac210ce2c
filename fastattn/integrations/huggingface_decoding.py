"""Attention of one query in each row, which is what generation asks for at every step.

A single query sees a span of keys, so no mask is made. The query heads that share a key head become the queries of
one head, so that keys are read once for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention.functional import attention
from fastattn.core.cache.functional import attention_with_cache
from fastattn.core.plans import backend_asked, needs_gradient, watched
from fastattn.integrations.huggingface_mask import Mask, added


def attention_of_one_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor,
    position_bias: Tensor | None,
    sinks: Tensor | None,
    **options: Any,
) -> Tensor:
    """(B, 1, Hq, Dv) for query (B, Hq, 1, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv).

    Args:
        mask: without documents; or a tensor (B, 1 or Hq, 1, Lk), bool or added to the scores.
        position_bias: (1 or B, 1 or Hq, 1, Lk), added to the scores.
        sinks: (Hq,).
        options: scale and softcap, as `attention`'s.
    """
    first, end, bias, lengths = 0, key.shape[2], position_bias, None
    if not isinstance(mask, Mask):
        bias = added(mask, position_bias)
    else:
        (first, end), hidden = mask.span, mask.hidden_first
        if hidden is not None and min(hidden) == max(hidden):
            first = max(first, min(hidden[0], end))
        elif hidden is not None and bias is None and _is_read_by_row(query, key, value):
            starts = torch.tensor(hidden, dtype=torch.int32).clamp(first, end)
            out = attention_with_cache(
                query, key, value, cache_lengths=end, cache_starts=starts, sinks=sinks, **options
            )
            return out.transpose(1, 2)
        else:
            bias = added(mask.bias, position_bias)
        lengths = None if mask.key_lengths is None else (mask.key_lengths - first).clamp(0, end - first)
    (batch, heads, _, width), key_heads = query.shape, key.shape[1]
    if end - first < key.shape[2]:
        key, value = key[:, :, first:end], value[:, :, first:end]
    q = query.reshape(batch, key_heads, -1, width)
    if bias is None and lengths is None and sinks is None and _is_plain(q, key, value, options):
        out = F.scaled_dot_product_attention(q, key, value, scale=options["scale"])
        return out.reshape(batch, 1, heads, -1)
    if bias is not None:
        bias = bias[..., first:end] if bias.shape[-1] > 1 else bias
        bias = bias[:, :, 0].unflatten(1, (key_heads, -1)) if bias.shape[1] == heads > 1 else bias
    out, lse = attention(q, key, value, bias=bias, key_lengths=lengths, return_lse=True, **options)
    if sinks is not None:
        out = with_sinks(out, lse, sinks.view(1, key_heads, -1, 1))
    return out.reshape(batch, 1, heads, -1)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The output with sinks for each query, (1 or B, H, Lq, 1), from the one without. A sink takes its share of
    the row's sum: of exp(lse) + exp(sink), exp(lse) remains."""
    return (out * torch.sigmoid(lse[..., None] - sinks.to(lse.dtype))).to(out.dtype)


def _is_read_by_row(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether rows that see different keys are better read one by one: on a CPU, where nothing looks on."""
    on_cpu = query.device.type == "cpu" and query.dtype == key.dtype == value.dtype
    return on_cpu and not watched() and not needs_gradient(query, key, value)


def _is_plain(q: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether PyTorch's own function computes the call as `attention` would, on a CPU: it costs the host less."""
    same = q.shape[3] == value.shape[3] and q.device.type == "cpu" and key.shape[2] > 0
    return same and options["softcap"] is None and backend_asked() is None
