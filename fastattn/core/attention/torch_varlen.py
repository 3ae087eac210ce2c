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
    """

    cu_queries: Tensor
    cu_keys: Tensor
    longest: tuple[int, int]
    causal: bool
    left: int = -1

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
        _flash(*heads, at.cu_queries, at.cu_keys, *at.longest, 0.0, False, False, scale=spec.scale, **at.window)
        for at in _calls(q, k, spec, tensors)
    )
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
    dq, dk, dv = (functools.reduce(Tensor.add_, parts) for parts in zip(*results, strict=True))
    return Gradients(_unpacked(dq, q), _unpacked(dk, k), _unpacked(dv, v))


def _packed(t: Tensor) -> Tensor:
    """(B, H, L, D) as (B * L, H, D), without a copy where heads lie last."""
    return unit_stride(t).transpose(1, 2).flatten(0, 1)


def _unpacked(t: Tensor, like: Tensor) -> Tensor:
    return t.view(like.shape[0], like.shape[2], *t.shape[1:]).transpose(1, 2)


# ---- where sequences lie ----


def _calls(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> list[Sequences]:
    """The sequences of each call of the operator; the results of all are summed."""
    if tensors.intervals is not None:
        found = _documents(q, k, tensors.intervals)
        assert found is not None
        return [found]
    counts = tensors.key_lengths
    assert counts is not None
    batch, *longest = q.shape[0], q.shape[2], k.shape[2]
    if spec.right is None:
        cu_queries, begins, odd = _by_entry(batch, *longest, q.device)
        return [Sequences(cu_queries, begins.index_add(0, odd, counts), (longest[0], longest[1]), False)]
    # How many keys lie before the last query's own, at the first query's.
    before = k.shape[2] - q.shape[2] + spec.right
    cu_queries, cu_keys, at, at_each = _by_diagonal(batch, *longest, before, q.device)
    cu_queries = cu_queries.index_add(0, at, counts.clamp(before, before + q.shape[2]))
    causal, full = cu_keys.index_add(0, at_each, counts.repeat(3)).view(2, -1)
    sizes = longest[0], longest[1]
    return [Sequences(cu_queries, causal, sizes, True), Sequences(cu_queries, full, sizes, False)]


@kept(32)
def _by_entry(batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences for each batch entry: first the keys that are there, and then those behind, without queries.
    Their cu_seqlens, of keys without the key lengths; and where these are to be added."""
    entry = torch.arange(2 * batch + 1, dtype=torch.int32, device=device)
    return (entry + 1) // 2 * queries, entry // 2 * keys, torch.arange(1, 2 * batch, 2, device=device)


@kept(32)
def _by_diagonal(batch: int, queries: int, keys: int, before: int, device: torch.device) -> tuple[Tensor, ...]:
    """Three sequences for each batch entry: queries up to the last key that is there, those behind it, and the
    keys behind the key length, without queries. The first has keys in the causal call, the second in the full one.

    cu_queries without the key lengths, from `before` to `before` + queries; cu_keys of both calls, one behind the
    other, without the key lengths; and where these are to be added to the first and to the second.
    """
    entry = torch.arange(batch, dtype=torch.int32, device=device)[:, None]

    def ends(*shares: tuple[int, int]) -> Tensor:
        """Where the three sequences of each entry end: so many times the entry's number and the size, and more."""
        return F.pad(torch.cat([entry * size + more for size, more in shares], 1).flatten(), (1, 0))

    cu_queries = ends((queries, -before), (queries, queries), (queries, queries))
    of_a_call = ends((keys, 0), (keys, 0), (keys, keys))
    first = torch.arange(1, 3 * batch, 3, device=device)
    in_the_full_one = first + 1 + len(of_a_call)
    return cu_queries, of_a_call.repeat(2), first, torch.cat((first, first + 1, in_the_full_one))


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
