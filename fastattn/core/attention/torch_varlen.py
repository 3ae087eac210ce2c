"""PyTorch's flash attention of sequences that lie one after another, on CUDA: key lengths and documents.

The operator takes where each sequence begins, in queries and in keys, and computes nothing outside of them. Keys
that no query sees, such as those behind a key length, are a sequence without queries: they are not read, and get
zeros as gradients. So neither a mask nor a copy of keys is made.
"""

from __future__ import annotations

import math
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


LENGTHS = Trial("flash attention of sequences", _lengths_of_trial)
DOCUMENTS = Trial("flash attention of causal sequences", _documents_of_trial)
WINDOWS = Trial("flash attention of sequences with a window", _windows_of_trial)


def ready(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Documents only where each query sees all keys of its sequence, or those up to its own place, or as many of
    these as its window shows."""
    trial = LENGTHS
    if tensors.intervals is not None:
        found = _documents(q, k, tensors.intervals)
        if found is None:
            return False
        trial = WINDOWS if found.left >= 0 else DOCUMENTS if found.causal else LENGTHS
    return agrees(trial, q, k, v, forward, backward)


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    at = _sequences(q, k, tensors)
    out, lse, *_ = _flash(
        *(_packed(t) for t in (q, k, v)), at.cu_queries, at.cu_keys, *at.longest, 0.0, False, False,
        scale=spec.scale, **at.window,
    )  # fmt: skip
    # (H, B * L) in its own order. The operator gives rows that see nothing +inf.
    found = lse.view(q.shape[1], q.shape[0], q.shape[2]).transpose(0, 1)
    lse = torch.nan_to_num(found, math.nan, -math.inf, -math.inf, out=lse.new_empty(q.shape[:3]))
    return _unpacked(out, q), lse


def backward(
    dout: Tensor, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, _: Wanted | None = None
) -> Gradients:
    q, k, v, out, lse = saved
    at = _sequences(q, k, tensors)
    there = lse.transpose(0, 1)
    lse = torch.nan_to_num(there, math.nan, math.inf, math.inf, out=lse.new_empty(there.shape)).flatten(1)
    # Without dropout: a random state that is not read.
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    dq, dk, dv = _flash_backward(
        *(_packed(t) for t in (dout, q, k, v, out)), lse, at.cu_queries, at.cu_keys, *at.longest, 0.0, False,
        unused, unused, scale=spec.scale, **at.window,
    )  # fmt: skip
    return Gradients(_unpacked(dq, q), _unpacked(dk, k), _unpacked(dv, v))


def _packed(t: Tensor) -> Tensor:
    """(B, H, L, D) as (B * L, H, D), without a copy where heads lie last."""
    return unit_stride(t).transpose(1, 2).flatten(0, 1)


def _unpacked(t: Tensor, like: Tensor) -> Tensor:
    return t.view(like.shape[0], like.shape[2], *t.shape[1:]).transpose(1, 2)


# ---- where sequences lie ----


def _sequences(q: Tensor, k: Tensor, tensors: ScoreTensors) -> Sequences:
    if tensors.intervals is not None:
        found = _documents(q, k, tensors.intervals)
        assert found is not None
        return found
    assert tensors.key_lengths is not None
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    cu_queries, begins, odd = _by_entry(batch, queries, keys, q.device)
    return Sequences(cu_queries, begins.index_add(0, odd, tensors.key_lengths), (queries, keys), False)


@kept(32)
def _by_entry(batch: int, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences for each batch entry: first the keys that are there, and then those behind, without queries.
    Their cu_seqlens, of keys without the key lengths; and where these are to be added."""
    entry = torch.arange(2 * batch + 1, dtype=torch.int32, device=device)
    return (entry + 1) // 2 * queries, entry // 2 * keys, torch.arange(1, 2 * batch, 2, device=device)


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
