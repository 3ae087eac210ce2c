"""Attention of sequences of different lengths, packed one after another: no padding is stored or computed."""

from __future__ import annotations

import itertools
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import masks
from fastattn.core.attention.functional import attention
from fastattn.core.cache.functional import attention_with_cache
from fastattn.ground.arguments import (
    flag,
    in_other_words,
    integer,
    integers,
    number,
    refuse_keywords,
    tensor,
)
from fastattn.ground.checks import Window, check_beside, check_floating, lse_dtype
from fastattn.ground.modes import outside_modes
from fastattn.masks.kinds import PackedSequences
from fastattn.masks.lists import Shape


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
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
    invariant: bool | None = ...,
    seqused_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    num_splits: int | None = ...,
    return_lse: Literal[False] = ...,
    return_aux: Any = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
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
    invariant: bool | None = ...,
    seqused_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    num_splits: int | None = ...,
    return_lse: Literal[True],
    return_aux: Any = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
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
    invariant: bool | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    return_aux: Any = None,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each of several sequences. They lie one after another; each may have any number of
    queries and of keys, also none.

    Args:
        q: queries (total queries, Hq, D); any strides.
        k: keys (total keys, Hkv, D); with a block_table pages (pages, page, Hkv, D).
        v: values (total keys, Hkv, Dv), or pages (pages, page, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: the first token of each sequence, and the end: (sequences + 1,) int32 or int64,
            from 0 up to the total or less. Their values are read here; on a GPU that waits for the device. The
            intervals of keys that they define are cached for further layers. Tokens behind the last sequence may
            hold anything. With a block_table cu_seqlens_k only tells the lengths; it may be None beside seqused_k.
        max_seqlen_q, max_seqlen_k: the longest sequences; accepted for compatibility, and not used.
        causal, window: counted from each sequence's own diagonal: its last query stands at its last key.
        alibi_slopes: (Hq,) or (sequences, Hq). If sequences differ in their slopes, or in how many more keys than
            queries they have, each sequence is computed by a call of its own.
        scale, softcap, sinks, dropout_p, precision, invariant, backend: as `attention`'s. Sinks are (Hq,), a scale
            is a number or a tensor () or (Hq,).
        seqused_k: (sequences,), how many keys of each sequence exist, if cu_seqlens_k reserves room for more.
        block_table: (sequences, most pages): token t of a sequence lies in page block_table[sequence, t // page].
            For inference: no gradient and no dropout. Sequences with as many queries are one call of
            `attention_with_cache`.
        num_splits: accepted for compatibility. Keys are split at fixed places, whatever else is in the batch.
        return_lse: also return the log-sum-exp of each row of scores.
        return_aux: torch's name for it: None, or an object whose `lse` says so.

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
        refuse_keywords("attention_varlen", unknown, takes=attention_varlen)
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is not None:
            integer(name, longest, least=0, what="an integer or None")
    if num_splits is not None:
        integer("num_splits", num_splits, least=0, what="an integer or None")
    return_lse = _wants_lse(return_lse, return_aux)
    if block_table is not None:
        paged: dict[str, Any] = {
            "causal": causal, "window": window, "scale": scale, "softcap": softcap, "precision": precision,
            "alibi_slopes": alibi_slopes, "sinks": sinks, "invariant": invariant, "backend": backend,
        }  # fmt: skip
        name = "cu_seqlens_k" if seqused_k is None else "seqused_k"
        pages = _Pages(k, v, _lengths(cu_seqlens_k, seqused_k), name, block_table)
        try:
            out, lse = _in_pages(q, cu_seqlens_q, pages, dropout_p, paged)
        except (TypeError, ValueError) as error:
            names = {"cache_lengths": f"lengths in {name}", "attention_with_cache": "attention_varlen"}
            raise type(error)(in_other_words(str(error), names)) from None
        return (out, lse) if return_lse else out
    if cu_seqlens_k is None:
        raise ValueError("cu_seqlens_k must be given, got None; it may be None only beside a block_table")
    if seqused_k is not None:
        k, v, cu_seqlens_k = _used(k, v, cu_seqlens_k, seqused_k)
    mask = masks.packed_sequences(cu_seqlens_q, cu_seqlens_k, causal, window)
    q, k, v = (_heads_first(name, t) for name, t in (("q", q), ("k", k), ("v", v)))
    with outside_modes():
        # Tokens behind the last sequence are not read.
        ends = [min(int(cu.tensor[-1]), t.shape[2]) for cu, t in ((mask.queries, q), (mask.keys, k))]
    behind = q.shape[2] - ends[0]
    q, k, v = q[:, :, : ends[0]], k[:, :, : ends[1]], v[:, :, : ends[1]]
    with outside_modes():
        mask.check(Shape(1, q.shape[1], q.shape[2], k.shape[2], q.device))
    _check_per_head(q, scale, sinks, alibi_slopes, mask.count)
    options: dict[str, Any] = {
        "scale": scale, "softcap": softcap, "sinks": sinks, "dropout_p": dropout_p, "precision": precision,
        "invariant": invariant, "backend": backend,
    }  # fmt: skip
    if not mask.count or alibi_slopes is None or (alibi_slopes.dim() == 1 and mask.shares_diagonal):
        slopes = alibi_slopes if mask.count else None
        out, lse = attention(q, k, v, mask=mask, alibi_slopes=slopes, return_lse=True, **options)
    else:
        window = mask.left, mask.right
        out, lse = _by_sequence(q, k, v, mask, alibi_slopes, window=window, **options)
    out, lse = out[0].transpose(0, 1), lse[0]
    if behind:
        out, lse = F.pad(out, (0, 0, 0, 0, 0, behind)), F.pad(lse, (0, behind), value=float("-inf"))
    return (out, lse) if return_lse else out


class _Pages(NamedTuple):
    """Keys and values in pages (pages, page, Hkv, width), how many keys each sequence has, the argument that says
    so, and where they lie."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    lengths_name: str
    table: Tensor


def _in_pages(
    q: Tensor, cu_seqlens_q: Tensor, pages: _Pages, dropout_p: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """One call for each number of queries that sequences have; mostly there is one."""
    if number("dropout_p", dropout_p) != 0:
        raise ValueError(f"dropout_p must be 0 beside block_table, which is for inference; got {dropout_p}")
    shapes = {"block_table": "(sequences, most pages)", "q": "(tokens, heads, width)"}
    shapes |= dict.fromkeys("kv", "(pages, page, heads, width)")
    for name, t in (("block_table", pages.table), ("q", q), ("k", pages.k), ("v", pages.v)):
        tensor(name, t)
        if t.dim() != shapes[name].count(",") + 1:
            raise ValueError(f"{name} must have shape {shapes[name]}, got {tuple(t.shape)}")
        if name == "block_table" and t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"block_table must be int32 or int64, got {t.dtype}")
    masks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, len(q))
    starts = integers("cu_seqlens_q", cu_seqlens_q).tolist()
    counts = [stop - start for start, stop in itertools.pairwise(starts)]
    k_cache, v_cache = (t.transpose(1, 2) for t in (pages.k, pages.v))
    slopes, table = options.pop("alibi_slopes"), pages.table
    for name, t in (("block_table", table), (pages.lengths_name, pages.lengths), ("alibi_slopes", slopes)):
        if t is not None and (name != "alibi_slopes" or t.dim() == 2) and len(t) != len(counts):
            raise ValueError(
                f"{name} must have a row for each of the {len(counts)} sequences, got {tuple(t.shape)}"
            )
    if counts and len(set(counts)) == 1 and (starts[0], starts[-1]) == (0, len(q)):
        # As in decoding: nothing is gathered or put in its place.
        rows_of_q = q.unflatten(0, (len(counts), counts[0])).transpose(1, 2)
        part, part_lse = attention_with_cache(
            rows_of_q, k_cache, v_cache, cache_lengths=pages.lengths, block_table=table, alibi_slopes=slopes,
            return_lse=True, **options,
        )  # fmt: skip
        return part.transpose(1, 2).flatten(0, 1), part_lse.transpose(0, 1).flatten(1).contiguous()
    out = q.new_zeros(*q.shape[:2], v_cache.shape[3])
    lse = q.new_full((q.shape[1], len(q)), float("-inf"), dtype=lse_dtype(q.dtype))
    for count in sorted(set(counts)):
        rows = torch.tensor([i for i, n in enumerate(counts) if n == count], device=q.device)
        places = torch.tensor([starts[i] for i in rows.tolist()], device=q.device)[:, None]
        places = places + torch.arange(count, device=q.device)
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[rows]
        part, part_lse = attention_with_cache(
            q[places].transpose(1, 2), k_cache, v_cache, cache_lengths=pages.lengths[rows],
            block_table=table[rows], alibi_slopes=own, return_lse=True, **options,
        )  # fmt: skip
        out[places], lse[:, places] = part.transpose(1, 2), part_lse.transpose(0, 1)
    return out, lse


def _lengths(cu_seqlens_k: Tensor | None, seqused_k: Tensor | None) -> Tensor:
    """How many keys each sequence has."""
    if seqused_k is not None:
        return _used_keys(seqused_k)
    if cu_seqlens_k is None:
        raise ValueError("cu_seqlens_k or seqused_k must tell how many keys each sequence has, got neither")
    return integers("cu_seqlens_k", cu_seqlens_k).diff()


def _used_keys(seqused_k: Tensor) -> Tensor:
    used = integers("seqused_k", seqused_k)
    if used.dim() != 1 or used.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"seqused_k must be integers (sequences,), got shape {tuple(used.shape)}, {used.dtype}")
    return used


def _used(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values that exist, without the room behind those of each sequence, and their cu_seqlens."""
    masks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, len(k))
    starts, used = integers("cu_seqlens_k", cu_seqlens_k).tolist(), _used_keys(seqused_k).tolist()
    room = [stop - start for start, stop in itertools.pairwise(starts)]
    if len(used) != len(room) or any(not 0 <= n <= r for n, r in zip(used, room, strict=True)):
        raise ValueError(
            f"seqused_k must have a length for each of the {len(room)} sequences, from 0 to the room that "
            f"cu_seqlens_k has for it; got {used}"
        )
    places = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, used, strict=False)] or [torch.arange(0)])
    places = places.to(k.device)
    ends = torch.tensor([0, *itertools.accumulate(used)], dtype=torch.int64, device=k.device)
    return k[places], v[places], ends


def _wants_lse(return_lse: bool, return_aux: Any) -> bool:
    if return_aux is None:
        return flag("return_lse", return_lse)
    if not hasattr(return_aux, "lse"):
        raise TypeError(f"return_aux must be None or have a field lse, got {type(return_aux).__name__}")
    return flag("return_lse", return_lse) or flag("return_aux.lse", return_aux.lse)


def _by_sequence(
    q: Tensor, k: Tensor, v: Tensor, mask: PackedSequences, alibi_slopes: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """A call for each sequence."""
    rows, columns = (cu_seqlens.tensor.diff().tolist() for cu_seqlens in (mask.queries, mask.keys))
    slopes = alibi_slopes.expand(mask.count, q.shape[1])
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
