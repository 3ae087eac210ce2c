"""PyTorch's memory-efficient attention on CUDA, for masks and biases, in half precision and in float32.

Its operator adds one tensor to the scores, which may be expanded from a small one. If the dtype of q cannot hold
that tensor as exactly as the definition has it (a relative bias, a bias in float32), all is computed in float32.
The aten operators are called directly, because the public function does not return the log-sum-exp. Rows that see
nothing, of which they may make anything, are put right here.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention import definition
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.torch_flash import empty_rows, hides_by_window, is_causal, unexpanded
from fastattn.core.attention.torch_flash import finite as finite_lse
from fastattn.core.attention.torch_trial import Trial, agrees
from fastattn.ground.modes import capturing, kept, lasts
from fastattn.masks.algebra import Values
from fastattn.masks.lists import decode, entries_of, unpacked

_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
_HIDDEN = float("-inf")
# The operator reads rows of the tensor, and of the log-sum-exp, in pieces of so many elements.
ALIGNED, LSE_ALIGNED = 16, 32
# Pairs of queries and keys whose distances are kept from call to call, at most: 32 or 64 MiB.
MOST_KEPT = 2**24


def _plain_of_trial(q: Tensor, k: Tensor) -> tuple[AttentionSpec, ScoreTensors]:
    return AttentionSpec(causal=True, scale=q.shape[3] ** -0.5), ScoreTensors()


def _added_of_trial(q: Tensor, k: Tensor) -> tuple[AttentionSpec, ScoreTensors]:
    """Causal, with an empty entry, with rows that see nothing, and with a bias that all batch entries share."""
    heads, tokens, width = q.shape[1:]
    lengths = torch.tensor([tokens - 9, 0], dtype=torch.int32, device=q.device)
    place = torch.arange(tokens, device=q.device)
    bias = ((place * 0.7).sin() - (place[:, None] * 1.1).cos()).to(q.dtype).repeat(1, heads, 1, 1)
    hidden = (place[:, None] % 7 == 3) | (place < 2)
    spec = AttentionSpec(causal=True, scale=width**-0.5)
    return spec, ScoreTensors(key_lengths=lengths, bias=bias.masked_fill(hidden, _HIDDEN))


PLAIN = Trial("memory-efficient attention", _plain_of_trial)
LSE_GRADIENT = Trial(
    "memory-efficient attention with a gradient of the log-sum-exp", _plain_of_trial, lse_gradient=True
)
ADDED = Trial("memory-efficient attention with a bias", _added_of_trial)
# Whether the operator itself gives rows that see nothing 0 and -inf.
EMPTY = Trial("memory-efficient attention of rows that see nothing", _added_of_trial, decides=False)


def ready(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    # To make a tensor of lists waits for the device, which a graph cannot.
    if tensors.mask is not None and (not lasts(tensors.mask) or capturing()):
        return False
    trial = ADDED if _adds(q, k, spec, tensors) else PLAIN
    return agrees(trial, *like(q, k, v, spec, tensors), forward, backward)


def like(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of the dtype of the computation."""
    dtype = dtype_of(q.dtype, spec, tensors)
    if q.dtype == dtype:
        return q, k, v
    q, k, v = (t.new_empty((1, t.shape[1], 1, t.shape[3]), dtype=dtype) for t in (q, k, v))
    return q, k, v


def dtype_of(dtype: torch.dtype, spec: AttentionSpec, tensors: ScoreTensors) -> torch.dtype:
    """The dtype in which it is computed. The definition adds ALiBi's slopes to scores in the dtype of q, but all
    else in float32; so it does with several biases."""
    bias = tensors.bias
    if tensors.relative_bias is not None:
        return torch.float32
    if bias is not None and bias.dtype != torch.bool and (bias.dtype != dtype or tensors.alibi_slopes is not None):
        return torch.float32
    return dtype


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    out, lse, added = _computed(q, k, v, spec, tensors)
    if added is None or not _may_be_empty(q, k, spec, tensors):
        return out, lse
    if agrees(EMPTY, *like(q, k, v, spec, tensors), _as_it_is, backward):
        return out, lse
    empty = empty_rows(added, is_causal(q, k, spec), q.shape[2])
    return out.masked_fill_(empty[..., None], 0.0), lse.masked_fill_(empty, _HIDDEN)


def _may_be_empty(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Whether rows may see nothing. A window alone holds its own diagonal, where there is a key."""
    hides = tensors.key_lengths, tensors.bias, tensors.relative_bias, tensors.intervals, tensors.mask
    return any(t is not None for t in hides) or (hides_by_window(q, k, spec) and q.shape[2] > k.shape[2])


def _as_it_is(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor]:
    return _computed(q, k, v, spec, tensors)[:2]


def _computed(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the operator returns, and what is added to the scores, before it is expanded."""
    queries, keys, values = _inputs(q, k, v, spec, tensors)
    added = _added(queries, k, spec, tensors)
    out, lse, *_ = _efficient(
        queries, keys, values, _every_row(added, q, k), True, 0.0, is_causal(q, k, spec), scale=spec.scale
    )
    return out.to(q.dtype), lse[..., : q.shape[2]].contiguous(), added


def backward(
    dout: Tensor, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted, finite: bool = False
) -> Gradients:
    """finite: whether the caller knows that every log-sum-exp is."""
    q, k, v, out, lse = saved
    queries, keys, values, dout, out = _inputs(q, k, v, spec, tensors, dout, out)
    added = _every_row(_added(queries, k, spec, tensors), q, k)
    lse = _lse_as_read(lse, not finite and _may_be_empty(q, k, spec, tensors))
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv, dadded = _efficient_backward(
        dout, queries, keys, values, added, out, lse, unused, unused, 0.0,
        [True, True, True, wanted.bias or wanted.relative_bias], is_causal(q, k, spec), scale=spec.scale,
    )  # fmt: skip
    dbias = drelative = None
    if wanted.bias:
        assert tensors.bias is not None
        dbias = dadded.sum_to_size(tensors.bias.shape).to(tensors.bias.dtype)
    if wanted.relative_bias:
        assert tensors.relative_bias is not None
        drelative = _sum_by_distance(dadded, tensors.relative_bias.shape[2] // 2)
    heads = converted(q.dtype, dq, _of_key_heads(dk, k), _of_key_heads(dv, v))
    return Gradients(heads[0], heads[1], heads[2], dbias, drelative)


def _sum_by_distance(dadded: Tensor, radius: int) -> Tensor:
    """The gradient (B, H, 2 R + 1) of a relative bias from that of what was added: sums along diagonals, without
    atomics. Behind Lq - 1 zeros in front of each row, a diagonal is a column of rows one number longer."""
    rows, columns = dadded.shape[2:]
    width = rows - 1 + columns
    padded = F.pad(dadded, (rows - 1, 0, 0, 1))
    strides = *padded.stride()[:2], width + 1, 1
    sums = padded.as_strided((*dadded.shape[:2], rows, width), strides).sum(2)
    return definition.of_distances(sums, 1 - columns, radius)


def _lse_as_read(lse: Tensor, may_be_empty: bool) -> Tensor:
    """As the operator reads it. With a finite log-sum-exp, exp(score - lse) is 0 in rows that see nothing. Behind
    the last row it is inf."""
    lse, behind = finite_lse(lse) if may_be_empty else lse, -lse.shape[2] % LSE_ALIGNED
    return F.pad(lse, (0, behind), value=math.inf) if behind else lse


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors, *of_queries: Tensor
) -> list[Tensor]:
    """q, k, v, and what else belongs to queries, as the operator takes them: in the dtype of the computation, keys
    and values for every query head, zeros behind the key lengths, since nothing there may reach a result."""
    if tensors.key_lengths is not None:
        there = _there(k, tensors.key_lengths).mT
        k, v = (torch.where(there, t, 0.0) for t in (k, v))
    q, k, v, *rest = converted(dtype_of(q.dtype, spec, tensors), q, k, v, *of_queries)
    group = q.shape[1] // k.shape[1]
    return [_aligned(t) for t in (q, _every_head(k, group), _every_head(v, group), *rest)]


def _every_head(t: Tensor, group: int) -> Tensor:
    """Each key head for the query heads that read it; all of them read the only one without a copy."""
    if group == 1:
        return t
    return t.expand(-1, group, -1, -1) if t.shape[1] == 1 else t.repeat_interleave(group, 1)


def converted(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Tensors of one dtype in another one, laid out alike, in one launch."""
    if tensors[0].dtype == dtype:
        return list(tensors)
    found = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(found, tensors)
    return found


def _there(k: Tensor, key_lengths: Tensor) -> Tensor:
    """Which keys are there: bool (B, 1, 1, Lk)."""
    return _places(k.shape[2], k.device) < key_lengths[:, None, None, None]


# ---- the tensor that is added ----


def _adds(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    return hides_by_window(q, k, spec) or any(t is not None for t in tensors)


def _added(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Tensor | None:
    """What is added to the scores, -inf where hidden; broadcasts to (B, Hq, Lq, Lk). None for nothing."""
    if not _adds(q, k, spec, tensors):
        return None
    bias = tensors.bias
    floats = None if bias is None or bias.dtype == torch.bool else unexpanded(bias).to(q.dtype)
    seen, diagonals = [], None
    if tensors.key_lengths is not None:
        seen.append(_there(k, tensors.key_lengths))
    if bias is not None and floats is None:
        seen.append(unexpanded(bias))
    if tensors.intervals is not None:
        start, stop = unexpanded(tensors.intervals)[:, None, :, : q.shape[2], None].unbind(2)
        keys = _places(k.shape[2], q.device)
        seen += [start <= keys, keys < stop]
    if hides_by_window(q, k, spec) and floats is not None:
        # A bias may be NaN where the window hides it, and NaN added to -inf is NaN.
        seen.append(_along_diagonals(_within(q, k, spec), q, k))
        spec = replace(spec, window=(None, None), causal=False)
    if hides_by_window(q, k, spec) or tensors.alibi_slopes is not None or tensors.relative_bias is not None:
        diagonals = _diagonals(q, k, spec, tensors)
    lists = None
    if tensors.mask is not None and spec.mask is not None:
        lists = _of_lists(Values(tensors.mask), spec.mask, q.shape[0], (q.shape[2], k.shape[2]), q.dtype)
    terms = [t for t in (floats, diagonals, lists) if t is not None]
    mask = functools.reduce(torch.add, terms) if terms else _nothing(q.dtype, q.device)
    return torch.where(functools.reduce(torch.logical_and, seen), mask, _HIDDEN) if seen else mask


@kept(2)
def _of_lists(
    words: Values, layout: tuple[int, ...], batch: int, lengths: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The logarithm of how often each pair counts, -inf where it is not seen: (B or 1, Hq or 1, Lq, Lk)."""
    seen, counts = decode(unpacked(words.tensor, layout), *entries_of(layout, batch), *lengths)
    return _in_aligned_rows(counts.masked_fill(~seen, _HIDDEN).to(dtype))


def _diagonals(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Tensor:
    """What slopes, a relative bias and the window add, (B or 1, Hq or 1, Lq, Lk); a single one in one launch."""
    slopes, table = tensors.alibi_slopes, tensors.relative_bias
    lengths, both = (q.shape[2], k.shape[2]), slopes is not None and table is not None
    if both or hides_by_window(q, k, spec) or lengths[0] * _row(lengths[1]) > MOST_KEPT:
        return _along_diagonals(_by_distance(q, k, spec, tensors), q, k)
    if slopes is not None:
        slopes = unexpanded(slopes)[..., None, None]
        away = _away_of_pairs(*lengths, q.device)
        return torch.mul(slopes, away, out=q.new_empty((*slopes.shape[:2], *away.shape)))[..., : k.shape[2]]
    assert table is not None
    table = unexpanded(table)
    index = _index_of_pairs(*lengths, table.shape[2] // 2, q.device)
    found = table.index_select(2, index).unflatten(2, (q.shape[2], _row(k.shape[2])))[..., : k.shape[2]]
    return found.to(q.dtype)


def _by_distance(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Tensor:
    """What slopes and a relative bias add for each of `_distances`, -inf where the window hides it: (B or 1, Hq or
    1, distances)."""
    terms = []
    lengths = q.shape[2], k.shape[2]
    if tensors.alibi_slopes is not None:
        terms.append(unexpanded(tensors.alibi_slopes)[..., None] * _away(*lengths, q.device))
    if tensors.relative_bias is not None:
        table = unexpanded(tensors.relative_bias)
        terms.append(table.index_select(2, _index(*lengths, table.shape[2] // 2, q.device)))
    if hides_by_window(q, k, spec):
        terms.append(torch.where(_within(q, k, spec), 0.0, _HIDDEN)[None, None])
    return functools.reduce(torch.add, terms).to(q.dtype)


def _within(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    """Which of `_distances` the window shows: bool (distances,)."""
    distances = _distances(q.shape[2], k.shape[2], q.device)
    sides = [] if spec.left is None else [distances >= -spec.left]
    sides += [] if spec.right is None else [distances <= spec.right]
    return functools.reduce(torch.logical_and, sides)


def _along_diagonals(values: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """(B, H, Lq, Lk) of values for each of `_distances` (..., distances), in rows as the operator reads them."""
    rows = values.unfold(-1, _row(k.shape[2]), 1).flip(-2)
    return rows[(None,) * (4 - rows.dim())][..., : k.shape[2]]


@kept(8)
def _distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """How many keys after its query's diagonal a key is: from the first key of the last query to the last key of
    the first query, and then some more, which fill the rows of `_along_diagonals`."""
    return torch.arange(1 - keys, queries + _row(keys) - keys, device=device)


@kept(8)
def _away(queries: int, keys: int, device: torch.device) -> Tensor:
    """How far from its query's diagonal a key is, negative."""
    return -_distances(queries, keys, device).abs().float()


@kept(2)
def _away_of_pairs(queries: int, keys: int, device: torch.device) -> Tensor:
    """The same of every query and key, in rows as the operator reads them: (Lq, Lk and more)."""
    away = _away(queries, keys, device).unfold(-1, _row(keys), 1).flip(-2)
    return away.to(torch.int16 if queries + _row(keys) < 2**15 else torch.int32)


@kept(2)
def _index_of_pairs(queries: int, keys: int, radius: int, device: torch.device) -> Tensor:
    """Where in a relative bias the values of every query and key stand, in rows as the operator reads them, one
    behind the other."""
    return _index(queries, keys, radius, device).unfold(-1, _row(keys), 1).flip(-2).int().flatten()


@kept(8)
def _index(queries: int, keys: int, radius: int, device: torch.device) -> Tensor:
    """Where in a relative bias the values of `_distances` stand."""
    return definition.relative_index(_distances(queries, keys, device), radius)


def _row(keys: int) -> int:
    """The length of a row in memory."""
    return keys + -keys % ALIGNED


@kept(8)
def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


@kept(8)
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _every_row(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The same for all batch entries, heads and rows, each row beginning where the operator may begin to read."""
    if mask is None:
        return None
    keys = k.shape[2]
    return _in_aligned_rows(mask.expand(*mask.shape[:-1], keys)).expand(*q.shape[:3], keys)


def _in_aligned_rows(mask: Tensor) -> Tensor:
    fits = all(stride % ALIGNED == 0 for stride in mask.stride()[:-1]) and mask.data_ptr() % 16 == 0
    if fits and mask.stride(-1) == 1:
        return mask
    keys = mask.shape[-1]
    return F.pad(mask, (0, -keys % ALIGNED)).contiguous()[..., :keys]


def _of_key_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """The sum over the query heads that read a key head."""
    group = gradient.shape[1] // like.shape[1]
    return gradient if group == 1 else gradient.unflatten(1, (like.shape[1], group)).sum(2)


def _aligned(t: Tensor) -> Tensor:
    """The tensor as the operator reads it: rows of unit stride that begin at multiples of 16 bytes."""
    step = 16 // t.element_size()
    fits = t.stride(-1) == 1 and all(stride % step == 0 for stride in t.stride()[:-1])
    return t if fits and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)
