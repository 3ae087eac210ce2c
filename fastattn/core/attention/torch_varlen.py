"""PyTorch's flash attention of sequences that lie one after another, on CUDA: key lengths and documents.

The operator takes where each sequence begins, in queries and in keys, and computes nothing outside of them. Keys
that no query sees, such as those behind a key length, are a sequence without queries: they are not read, and get
zeros as gradients. So neither a mask nor a copy of keys is made.

Key lengths beside a causal mask take two calls. Queries up to the last key that is there are causal sequences, in
which that key is the last query's own. The queries behind it see all keys that are there: full sequences. In each
call the queries of the other one are a sequence without keys, which gives zeros.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.torch_flash import unit_stride
from fastattn.core.attention.torch_trial import Trial, agrees
from fastattn.ground.modes import capturing, kept, lasts
from fastattn.masks.algebra import Values

FULL, CAUSAL, WINDOWED = "full", "causal", "windowed"
# Programs of the operator are numbered by sequence in 16 bits.
MOST_SEQUENCES = 2**16 - 1
_flash, _flash_backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward


class Sequences(NamedTuple):
    """Where sequences lie in all batch entries, one behind the other.

    cu_queries, cu_keys: int32 (sequences + 1,), the first token of each and the end.
    longest: the most queries and the most keys of one.
    causal: whether they are, each with its last query at its last key.
    left: how many keys before its own a query sees if they are causal; -1 for all.
    used: int32 (sequences,), so many keys of each are there, of those that cu_keys says; None for all.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    longest: tuple[int, int]
    causal: bool
    left: int = -1
    used: Tensor | None = None

    @property
    def window(self) -> dict[str, int]:
        """As the operators take it; -1 for a side without bound."""
        return {"window_size_left": self.left, "window_size_right": 0 if self.causal else -1}


def _lengths_of_trial(q: Tensor, k: Tensor) -> tuple[AttentionSpec, ScoreTensors]:
    """With an empty entry."""
    lengths = torch.tensor([k.shape[2] - 9, 0], dtype=torch.int32, device=q.device)
    return AttentionSpec(scale=q.shape[3] ** -0.5), ScoreTensors(key_lengths=lengths)


def _causal_lengths_of_trial(q: Tensor, k: Tensor) -> tuple[AttentionSpec, ScoreTensors]:
    spec, tensors = _lengths_of_trial(q, k)
    return replace(spec, window=(None, 2)), tensors


def _documents_of_trial(q: Tensor, k: Tensor) -> tuple[AttentionSpec, ScoreTensors]:
    """Causal, and between them keys that nobody sees and queries that see nothing."""
    place = torch.arange(q.shape[2], device=q.device)
    start, stop = torch.where(place < 31, 0, 40), torch.where(place < 31, place + 3, place)
    stop = torch.where((place >= 31) & (place < 45), start, stop)
    intervals = torch.stack((start, stop))[None].expand(len(q), -1, -1)
    # Those of the keys are not read here.
    intervals = F.pad(intervals, (0, k.shape[2])).int()
    return AttentionSpec(scale=q.shape[3] ** -0.5), ScoreTensors(intervals=intervals)


def _windows_of_trial(q: Tensor, k: Tensor) -> tuple[AttentionSpec, ScoreTensors]:
    """The same with a window."""
    spec, tensors = _documents_of_trial(q, k)
    assert tensors.intervals is not None
    start, stop = tensors.intervals.unbind(1)
    return spec, ScoreTensors(intervals=torch.stack((torch.maximum(start, stop - 7), stop), 1))


LSE_GRADIENT = Trial(
    "flash attention of sequences with a gradient of the log-sum-exp", _lengths_of_trial, lse_gradient=True
)
LENGTHS = Trial("flash attention of sequences", _lengths_of_trial)
# The first queries of the empty entry see nothing, by either mask.
CAUSAL_LENGTHS = Trial("flash attention of causal sequences by key lengths", _causal_lengths_of_trial, keys=61)
DOCUMENTS = Trial("flash attention of causal sequences", _documents_of_trial)
WINDOWS = Trial("flash attention of sequences with a window", _windows_of_trial)


def ready(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Documents only where each query sees all keys of its sequence, or those up to its own place, or as many of
    these as its window shows."""
    trial = LENGTHS if spec.right is None else CAUSAL_LENGTHS
    if tensors.intervals is not None:
        found = _documents(q, k, tensors.intervals)
        if found is None:
            return False
        trial = WINDOWS if found.left >= 0 else DOCUMENTS if found.causal else LENGTHS
    return agrees(trial, q, k, v, forward, backward)


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    heads = [_packed(t) for t in (q, k, v)]
    results = (
        _flash(
            *heads, at.cu_queries, at.cu_keys, *at.longest, 0.0, False, False, scale=spec.scale, seqused_k=at.used,
            **at.window,
        )
        for at in _calls(q, k, spec, tensors, reads_keys_only=True)
    )  # fmt: skip
    outs, sums, *_ = zip(*results, strict=True)
    out, lse = functools.reduce(Tensor.add_, outs), functools.reduce(torch.minimum, sums)
    # (H, B * L) in its own order. The operator gives rows that see nothing +inf.
    found = lse.view(q.shape[1], q.shape[0], q.shape[2]).transpose(0, 1)
    lse = torch.nan_to_num(found, math.nan, -math.inf, -math.inf, out=lse.new_empty(q.shape[:3]))
    return _unpacked(out, q), lse


def backward(
    dout: Tensor, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, _: Wanted | None = None
) -> Gradients:
    q, k, v, out, lse = saved
    there = lse.transpose(0, 1)
    lse = torch.nan_to_num(there, math.nan, math.inf, math.inf, out=lse.new_empty(there.shape)).flatten(1)
    # Without dropout: a random state that is not read.
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    heads = [_packed(t) for t in (dout, q, k, v, out)]
    results = (
        _flash_backward(
            *heads, lse, at.cu_queries, at.cu_keys, *at.longest, 0.0, False, unused, unused, scale=spec.scale,
            **at.window,
        )
        for at in _calls(q, k, spec, tensors)
    )  # fmt: skip
    (dq, dk, dv), *more = map(tuple, results)
    for parts in more:
        torch._foreach_add_((dq, dk, dv), parts)
    return Gradients(_unpacked(dq, q), _unpacked(dk, k), _unpacked(dv, v))


def _packed(t: Tensor) -> Tensor:
    """(B, H, L, D) as (B * L, H, D), without a copy where heads lie last."""
    return unit_stride(t).transpose(1, 2).flatten(0, 1)


def _unpacked(t: Tensor, like: Tensor) -> Tensor:
    return t.view(like.shape[0], like.shape[2], *t.shape[1:]).transpose(1, 2)


# ---- where sequences lie ----


def _calls(
    q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors, reads_keys_only: bool = False
) -> list[Sequences]:
    """The sequences of each call of the operator; the results of all are summed. reads_keys_only: whether keys
    that nobody sees may be of no sequence, since they get no gradients."""
    if tensors.intervals is not None:
        found = _documents(q, k, tensors.intervals)
        assert found is not None
        return [found]
    counts = tensors.key_lengths
    assert counts is not None
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    if spec.right is None:
        if reads_keys_only:
            cu_queries, cu_keys = _whole(batch, queries, keys, q.device)
            return [Sequences(cu_queries, cu_keys, (queries, keys), False, used=counts)]
        cu_queries, begins, adds = _by_entry(batch, queries, keys, q.device)
        return [Sequences(cu_queries, _ends_of(begins, adds, counts)[0], (queries, keys), False)]
    # How many keys lie before the last query's own, at the first query's.
    before = keys - queries + spec.right
    begins, adds = _by_diagonal(batch, queries, keys, before, q.device)
    if before == 0 and keys <= queries:
        cu_queries, causal, full = _ends_of(begins, adds, counts)
    else:
        (cu_queries,) = _ends_of(begins[:1], adds[:1], counts.clamp(before, before + queries))
        causal, full = _ends_of(begins[1:], adds[1:], counts)
    return [Sequences(cu_queries, cu_keys, (queries, keys), cu_keys is causal) for cu_keys in (causal, full)]


def _ends_of(begins: Tensor, adds: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """cu_seqlens, several of them, in one launch: what they are without the key lengths (kinds, B, ends), and
    those added where `adds` (kinds, 1, ends) is 1."""
    return torch.addcmul(begins, adds, counts[None, :, None]).flatten(1).unbind()


@kept(32)
def _whole(batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A sequence for each batch entry: cu_seqlens of queries and of keys."""
    entry = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return entry * queries, entry * keys


# Below, each batch entry begins with an end of its own, so that no 0 must be put before the first. Between two
# entries that makes a sequence of nothing.


@kept(32)
def _by_entry(batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences for each batch entry: first the keys that are there, and then those behind, without queries.
    cu_queries, and `begins` and `adds` of `_ends_of` for the keys."""
    ends = _ends_in_entries(batch, ((queries, (0, 1, 1)), (keys, (0, 0, 1))), device)
    return ends[0].flatten(), ends[1:], torch.tensor([[[0, 1, 0]]], dtype=torch.int32, device=device)


@kept(32)
def _by_diagonal(batch: int, queries: int, keys: int, before: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Three sequences for each batch entry: queries up to the last key that is there, those behind it, and the
    keys behind the key length, without queries. The first has keys in the causal call, the second in the full one.

    `begins` and `adds` of `_ends_of`: of cu_queries, to which the key lengths are added from `before` to `before`
    + queries, and of cu_keys in both calls.
    """
    kinds = (queries, (0, 0, 1, 1)), (keys, (0, 0, 0, 1)), (keys, (0, 0, 0, 1))
    begins = _ends_in_entries(batch, kinds, device)
    begins[0, :, 1] -= before
    adds = [[[0, 1, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 1, 0]]]
    return begins, torch.tensor(adds, dtype=torch.int32, device=device)


def _ends_in_entries(batch: int, kinds: tuple[tuple[int, tuple[int, ...]], ...], device: torch.device) -> Tensor:
    """Where sequences end in batch entries of a size, given as 0 or 1 of that size: (kinds, B, ends)."""
    entry = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    ends = [entry * size + size * torch.tensor(at, dtype=torch.int32, device=device) for size, at in kinds]
    return torch.stack(ends)


def _documents(q: Tensor, k: Tensor, intervals: Tensor) -> Sequences | None:
    """The sequences in which each query sees these intervals; None if there are none such. Reading them waits for
    the device, once for a mask: the result is cached. A graph would be captured with the sequences of this call,
    whatever later ones hold."""
    if not lasts(intervals) or capturing():
        return None
    # The functional expands a mask for the batch in every call; what it expands stays the same.
    base = intervals._base
    if base is not None and base.data_ptr() == intervals.data_ptr() and base.shape[1:] == intervals.shape[1:]:
        intervals = base if len(base) in (1, len(intervals)) else intervals
    found = _of_intervals if intervals.is_inference() else _kept_of_intervals
    return found(Values(intervals), q.shape[0], q.shape[2], k.shape[2])


def _of_intervals(intervals: Values, batch: int, queries: int, keys: int) -> Sequences | None:
    start, stop = intervals.tensor[:, :, :queries].cpu().long().expand(batch, -1, -1).unbind(1)
    device = intervals.tensor.device
    for kind in (FULL, CAUSAL, WINDOWED):
        ends = _ends(start, stop, keys, kind)
        if ends is not None and len(ends[0]) <= MOST_SEQUENCES:
            cu_queries, cu_keys = (t.int().to(device) for t in ends)
            longest = int(ends[0].diff().amax()), int(ends[1].diff().amax())
            left = int((stop - start).amax()) - 1 if kind == WINDOWED else -1
            return Sequences(cu_queries, cu_keys, longest, kind != FULL, left)
    return None


_kept_of_intervals = kept(8)(_of_intervals)


def _ends(start: Tensor, stop: Tensor, keys: int, kind: str) -> tuple[Tensor, Tensor] | None:
    """cu_seqlens of queries and of keys in which query i of batch entry b sees the keys from start[b, i] to before
    stop[b, i]; None if there are none of this kind."""
    (batch, queries), row = start.shape, torch.arange(start.shape[1])
    empty = stop <= start
    # Within a sequence the last key stays the same, seen from the diagonal if it is causal; and so does the first,
    # until a window moves it: then queries see one key more than the one before, up to the size of the window.
    counts = (stop - start).masked_fill(empty, 0)
    expected = (counts + 1).clamp(max=int(counts.amax())).masked_fill(empty, 0)[:, :-1]
    first_moves = counts[:, 1:] != expected if kind == WINDOWED else start.masked_fill(empty, -1).diff() != 0
    last = (stop if kind == FULL else stop - row).masked_fill(empty, -queries - 1)
    begins = F.pad(first_moves | (last.diff() != 0), (1, 0), value=True)
    entry, first = begins.nonzero(as_tuple=True)
    first_query = entry * queries + first
    stop_query = torch.cat((first_query[1:], torch.tensor([batch * queries])))
    nothing = empty[entry, first]
    first_key = start[entry, first] + entry * keys
    stop_key = (stop[entry, stop_query - 1 - entry * queries] + entry * keys).masked_fill(nothing, 0)
    before = F.pad(stop_key.cummax(0).values, (1, 0))[:-1]  # where the keys of those before end
    first_key, stop_key = torch.where(nothing, before, first_key), torch.where(nothing, before, stop_key)
    if bool((first_key < before).any()):
        return None
    cu_queries, cu_keys = (
        torch.cat((torch.tensor([0]), torch.stack(ends, 1).flatten(), torch.tensor([batch * count])))
        for ends, count in (((first_query, stop_query), queries), ((first_key, stop_key), keys))
    )
    # Between two sequences lie the keys that nobody sees: mostly none.
    there = F.pad((cu_queries.diff() > 0) | (cu_keys.diff() > 0), (1, 0), value=True)
    return cu_queries[there], cu_keys[there]
