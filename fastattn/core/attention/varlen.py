"""Attention of sequences of different lengths, packed one after another: no padding is stored or computed."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import masks
from fastattn.core.attention.functional import attention
from fastattn.ground.arguments import flag, integer, refuse_keywords, tensor
from fastattn.ground.checks import Window, check_beside, check_floating
from fastattn.ground.modes import outside_modes
from fastattn.masks.kinds import PackedSequences
from fastattn.masks.lists import Shape


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    causal: bool = ...,
    scale: float | Tensor | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    precision: str | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    causal: bool = ...,
    scale: float | Tensor | None = ...,
    window: Window = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    precision: str | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    scale: float | Tensor | None = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    precision: str | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each of several sequences. They lie one after another; each may have any number of
    queries and of keys, also none.

    Args:
        q: queries (total queries, Hq, D); any strides.
        k: keys (total keys, Hkv, D).
        v: values (total keys, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: the first token of each sequence, and the end: (sequences + 1,) int32 or int64,
            from 0 up to the total or less. Their values are read here; on a GPU that waits for the device. The
            intervals of keys that they define are cached for further layers. Tokens behind the last sequence may
            hold anything.
        max_seqlen_q, max_seqlen_k: the longest sequences; accepted for compatibility, and not used.
        causal, window: counted from each sequence's own diagonal: its last query stands at its last key.
        alibi_slopes: (Hq,) or (sequences, Hq). If sequences differ in their slopes, or in how many more keys than
            queries they have, each sequence is computed by a call of its own.
        scale, softcap, sinks, dropout_p, precision, backend: as `attention`'s. Sinks are (Hq,), a scale is a
            number or a tensor () or (Hq,).
        return_lse: also return the log-sum-exp of each row of scores.

    Returns:
        out (total queries, Hq, Dv) in the inputs' dtype; with `return_lse` also lse (Hq, total queries) in nats,
        fp32 (fp64 for fp64 inputs). Queries of a sequence without keys give 0 and -inf, or the sink's score; those
        behind the last sequence 0 and -inf.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything runs.

    Example:
        >>> q, k, v = (torch.randn(10, 4, 64) for _ in range(3))
        >>> cu_seqlens = torch.tensor([0, 3, 3, 10])
        >>> attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True).shape
        torch.Size([10, 4, 64])
    """
    if unknown:
        refuse_keywords("attention_varlen", unknown)
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is not None:
            integer(name, longest, least=0, what="an integer or None")
    return_lse = flag("return_lse", return_lse)
    mask = masks.packed_sequences(cu_seqlens_q, cu_seqlens_k, causal, window)
    q, k, v = (_heads_first(name, t) for name, t in (("q", q), ("k", k), ("v", v)))
    with outside_modes():
        # Tokens behind the last sequence are not read.
        ends = [min(int(cu.tensor[-1]), t.shape[2]) for cu, t in ((mask.queries, q), (mask.keys, k))]
    behind = q.shape[2] - ends[0]
    q, k, v = q[:, :, : ends[0]], k[:, :, : ends[1]], v[:, :, : ends[1]]
    with outside_modes():
        mask.check(Shape(1, q.shape[1], q.shape[2], k.shape[2], q.device))
    _check_per_head(q, scale, sinks, alibi_slopes, mask.sequences)
    options: dict[str, Any] = {
        "scale": scale, "softcap": softcap, "sinks": sinks, "dropout_p": dropout_p, "precision": precision,
        "backend": backend,
    }  # fmt: skip
    if not mask.sequences or alibi_slopes is None or (alibi_slopes.dim() == 1 and mask.shares_diagonal):
        slopes = alibi_slopes if mask.sequences else None
        out, lse = attention(q, k, v, mask=mask, alibi_slopes=slopes, return_lse=True, **options)
    else:
        window = mask.left, mask.right
        out, lse = _by_sequence(q, k, v, mask, alibi_slopes, window=window, **options)
    out, lse = out[0].transpose(0, 1), lse[0]
    if behind:
        out, lse = F.pad(out, (0, 0, 0, 0, 0, behind)), F.pad(lse, (0, behind), value=float("-inf"))
    return (out, lse) if return_lse else out


def _by_sequence(
    q: Tensor, k: Tensor, v: Tensor, mask: PackedSequences, alibi_slopes: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """A call for each sequence."""
    rows, columns = (cu_seqlens.tensor.diff().tolist() for cu_seqlens in (mask.queries, mask.keys))
    slopes = alibi_slopes.expand(mask.sequences, q.shape[1])
    parts = [
        attention(q_, k_, v_, alibi_slopes=own, return_lse=True, **options)
        for q_, k_, v_, own in zip(q.split(rows, 2), k.split(columns, 2), v.split(columns, 2), slopes, strict=True)
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _heads_first(name: str, t: Tensor) -> Tensor:
    """(tokens, heads, width) as (1, heads, tokens, width), which attention takes."""
    tensor(name, t)
    check_floating(name, t)
    if t.dim() != 3:
        raise ValueError(f"{name} must have 3 dimensions (tokens, heads, width), got {tuple(t.shape)}")
    return t.transpose(0, 1)[None]


def _check_per_head(
    q: Tensor, scale: float | Tensor | None, sinks: Tensor | None, alibi_slopes: Tensor | None, sequences: int
) -> None:
    heads = q.shape[1]
    if isinstance(scale, Tensor):
        check_beside("scale", scale, q, ((), (heads,)))
    if sinks is not None:
        check_beside("sinks", sinks, q, ((heads,),))
    if alibi_slopes is not None:
        check_beside("alibi_slopes", alibi_slopes, q, ((heads,), (sequences, heads)))
