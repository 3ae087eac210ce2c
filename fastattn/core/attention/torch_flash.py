"""PyTorch's own fused attention on a CPU, for the calls in which it computes the same thing. See torch_routes for
GPUs.

The aten operators behind F.scaled_dot_product_attention are called directly, because the public function does
not return the log-sum-exp that the backward and merge_states need.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention.spec import NO_TENSORS, AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.tiles import KEY_TILE, QUERY_TILE, adds_floats, key_counts
from fastattn.core.layout import empty_heads, heads_last
from fastattn.ground.checks import lse_dtype

# The same operator as in torch.ops.aten, but calling it there takes a third longer.
_flash_on_cpu = torch._scaled_dot_product_flash_attention_for_cpu
_flash_backward_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_HIDDEN = float("-inf")
# Rows of a square at the diagonal.
ROWS = 64
# From how many to how many rows two calls that are merged take less time than one, if heads share keys or not. On
# one thread, float32, of the operator's time (torch 2.13): 9 heads on 3 of 64 columns .84 at 384 rows, .84 at 512,
# .88 at 1024, .92 at 2048; 8 heads of 64 .82, .78, .90 and 1.03. In a batch of 4 they gain nothing beyond 512.
FEWEST_IN_PARTS, MOST_GROUPED_IN_PARTS, MOST_IN_PARTS = 384, 2048, 1024


def serves(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Whether PyTorch's flash attention for CPUs computes this call: one head width, and nothing done to the
    scores but its own causal mask, which is aligned top-left, and masks no larger than what the caller gave."""
    if q.device.type != "cpu" or spec.softcap or q.shape[3] != v.shape[3] or q.numel() * k.numel() == 0:
        return False
    return (
        _is_added(tensors)
        and not _skips(k, spec)
        and _is_small(q, k, spec, tensors)
        and not _reaches_earlier_rows(q, k, spec, tensors)
    )


def serves_backward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Whether it computes the gradients, too: all but those in float16, where it takes two to five times as long
    as tiles in float32 (torch 2.13, without float16 instructions)."""
    return serves(q, k, v, spec, tensors) and q.dtype != torch.float16


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors = NO_TENSORS
) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    causal = is_causal(q, k, spec)
    if _entries_differ(k, tensors):
        return _by_entry(forward, (q, k, v), spec, tensors)
    seen = _keys_seen(q, k, spec, tensors)
    if seen.start == seen.stop:
        return torch.zeros_like(q), q.new_full(q.shape[:3], _HIDDEN, dtype=lse_dtype(q.dtype))
    mask = _mask(q, k, spec, tensors, seen)
    if causal and mask is None and seen == slice(0, k.shape[2]) and is_faster_in_parts(q, k):
        return causal_in_parts(q, k, v, spec.scale)
    out, lse = _flash_on_cpu(q, k[:, :, seen], v[:, :, seen], 0.0, causal, attn_mask=mask, scale=spec.scale)
    # The operator gives rows that see nothing a log-sum-exp of 0. Few others have it: the mask need not be read.
    if mask is not None and bool((lse == 0).any()):
        empty = empty_rows(mask, causal, q.shape[2])
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, _HIDDEN)
    return out, lse.contiguous()


def backward(
    dout: Tensor, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors = NO_TENSORS, _: Wanted | None = None
) -> Gradients:
    dout, q, k, v, out = (unit_stride(t) for t in (dout, *saved[:4]))
    lse = saved.lse
    if _entries_differ(k, tensors):
        return Gradients(*_by_entry(_backward_of, (dout, *saved), spec, tensors))
    seen = _keys_seen(q, k, spec, tensors)
    if seen.start == seen.stop:
        return Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    dq, dk, dv = _flash_backward_on_cpu(
        dout, q, k[:, :, seen], v[:, :, seen], out, finite(lse), 0.0, is_causal(q, k, spec),
        attn_mask=_mask(q, k, spec, tensors, seen), scale=spec.scale,
    )  # fmt: skip
    unseen = (0, 0, seen.start, k.shape[2] - seen.stop)
    return Gradients(dq, *(F.pad(t, unseen) if any(unseen) else t for t in (dk, dv)))


class Plain(NamedTuple):
    """PyTorch's operator on a CPU, where it takes the tensors as they are, without a mask."""

    causal: bool
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out, and the log-sum-exp, which is not contiguous."""
        if self.causal and is_faster_in_parts(q, k):
            return causal_in_parts(q, k, v, self.scale)
        out, lse = _flash_on_cpu(q, k, v, 0.0, self.causal, scale=self.scale)
        return heads_last(out), lse

    def of_one_query(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` of one query in each head: where there is no second one, out lies as `heads_last` lays it."""
        found: tuple[Tensor, Tensor] = _flash_on_cpu(q, k, v, 0.0, self.causal, scale=self.scale)
        return found

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        dq, dk, dv = _flash_backward_on_cpu(
            unit_stride(dout), q, k, v, unit_stride(out), finite(lse), 0.0, self.causal, scale=self.scale
        )
        return heads_last(dq), heads_last(dk), heads_last(dv)


def plain(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, differentiable: bool) -> Plain | None:
    """The operator for a call without ScoreTensors; None if the call needs more than it. differentiable: whether
    it shall compute the gradients, too."""
    if q.device.type != "cpu" or hides_by_window(q, k, spec) or any(t.stride(-1) != 1 for t in (q, k, v)):
        return None
    served = (serves_backward if differentiable else serves)(q, k, v, spec, NO_TENSORS)
    return Plain(is_causal(q, k, spec), spec.scale) if served else None


def is_faster_in_parts(q: Tensor, k: Tensor) -> bool:
    """Whether `causal_in_parts` takes less time than the operator's causal mask, under which it also computes
    pairs after the diagonal. A part has little work to share among threads: they were measured on one."""
    batch, heads, length, _ = q.shape
    most = MOST_IN_PARTS if heads == k.shape[1] else MOST_GROUPED_IN_PARTS
    if not FEWEST_IN_PARTS <= length <= most or batch > 1 or q.dtype != torch.float32:
        return False
    return torch.get_num_threads() == 1


def causal_in_parts(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The operator under its causal mask, in two parts that are merged: squares of ROWS rows at the diagonal, and
    for each of them all keys before. All of its rows see these, so that those of the query heads that share a key
    head are the rows of one head."""
    (batch, heads, length, _), key_heads = q.shape, k.shape[1]
    group = heads // key_heads
    first = length % ROWS or ROWS  # These rows see no other square.
    out, lse = empty_heads(q.shape, q), q.new_empty(q.shape[:3])
    q_, k_, v_ = (t[:, :, :first] for t in (q, k, v))
    out[:, :, :first], lse[:, :, :first] = _flash_on_cpu(q_, k_, v_, 0.0, True, scale=scale)
    q_, k_, v_ = (t[:, :, first:].unflatten(2, (-1, ROWS)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    squares = _flash_on_cpu(q_, k_, v_, 0.0, True, scale=scale)
    near, near_lse = (t.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3) for t in squares)
    for start in range(first, length, ROWS):
        rows = q[:, :, start : start + ROWS].unflatten(1, (key_heads, group)).flatten(2, 3)
        parts = _flash_on_cpu(rows, k[:, :, :start], v[:, :, :start], 0.0, False, scale=scale)
        for all_rows, part in zip((out, lse), parts, strict=True):
            all_rows[:, :, start : start + ROWS] = part.unflatten(2, (group, ROWS)).flatten(1, 2)
    far, far_lse = out[:, :, first:], lse[:, :, first:]
    if bool((near_lse == 0).any() | (far_lse == 0).any()):
        # It may be the log-sum-exp of scores that all are -inf.
        out, lse = _flash_on_cpu(q, k, v, 0.0, True, scale=scale)
        return heads_last(out), lse
    far.lerp_(near, torch.sigmoid(near_lse - far_lse)[..., None])
    torch.logaddexp(near_lse, far_lse, out=far_lse)
    return out, lse


def finite(lse: Tensor) -> Tensor:
    """The log-sum-exp for the backward. In rows whose scores are all -inf, any finite one makes exp(score - lse)
    zero; -inf would make it NaN."""
    return lse.nan_to_num(math.nan, math.inf, 0.0)


def _backward_of(dout: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`backward`, with the fields of Saved one by one, as `_by_entry` cuts them."""
    return backward(dout, Saved(*rest[:5]), *rest[5:])[:3]


# ---- lengths, one for each batch entry ----


def _entries_differ(k: Tensor, tensors: ScoreTensors) -> bool:
    """Whether batch entries have different lengths. Then each is a call of its own, which reads only its own
    keys."""
    shortest, longest = key_counts(tensors.key_lengths, k.shape[2])
    return shortest != longest


def _by_entry(function: Callable, inputs: tuple[Tensor, ...], spec: AttentionSpec, tensors: ScoreTensors) -> Any:
    """The results of `function`, called for one batch entry at a time."""
    batch = inputs[0].shape[0]

    def entry(t: Tensor | None, b: int) -> Tensor | None:
        return t if t is None or t.shape[0] != batch else t[b : b + 1]

    results = (
        function(*(t[b : b + 1] for t in inputs), spec, ScoreTensors(*(entry(t, b) for t in tensors)))
        for b in range(batch)
    )
    return tuple(torch.cat(column) for column in zip(*results, strict=True))


# ---- the mask of the CPU's operator ----


def _is_added(tensors: ScoreTensors) -> bool:
    """Whether everything that is done to the scores can be written as one mask. Slopes beside a bias of floats
    could, but where the bias is huge, their sum rounds otherwise than if they are added one by one."""
    there = {name for name, t in tensors._asdict().items() if t is not None}
    both = tensors.alibi_slopes is not None and adds_floats(tensors)
    return there <= {"key_lengths", "alibi_slopes", "bias"} and not both


def _reaches_earlier_rows(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Whether a bias of each key holds NaN or +inf beside the operator's own causal mask. That adds -inf to it,
    which gives NaN in earlier rows, too, which do not see the key."""
    bias = tensors.bias
    if bias is None or bias.dtype == torch.bool or not is_causal(q, k, spec):
        return False
    return bias.shape[2] == 1 < bias.shape[3] and not bool((bias < math.inf).all())


def _skips(k: Tensor, spec: AttentionSpec) -> bool:
    """Whether tiles would skip more than half of the keys. The operator skips none."""
    if spec.left is None or spec.right is None:
        return False
    return QUERY_TILE + spec.left + spec.right < k.shape[2] // 2


def _is_small(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Whether the mask has no more elements than a bias or key lengths have anyway, or than a tile of scores."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    existing = [] if tensors.bias is None else [tuple(unexpanded(tensors.bias).shape)]
    made = [(1, 1, queries, keys)] if hides_by_window(q, k, spec) else []
    made += [] if tensors.alibi_slopes is None else [(*unexpanded(tensors.alibi_slopes).shape, queries, keys)]
    if not existing + made:
        return True
    whole = math.prod(map(max, *existing, *made, (1, 1, 1, 1)))
    return whole <= max(batch * heads * QUERY_TILE * KEY_TILE, *map(math.prod, existing), 0)


def is_causal(q: Tensor, k: Tensor, spec: AttentionSpec) -> bool:
    """Whether the operator's own causal mask, aligned top-left, hides what is after the diagonal."""
    return spec.right == 0 and q.shape[2] == k.shape[2]


def hides_by_window(q: Tensor, k: Tensor, spec: AttentionSpec) -> bool:
    """Whether the window hides more than the operator's own causal mask does."""
    return spec.left is not None or (spec.right is not None and not is_causal(q, k, spec))


def _keys_seen(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> slice:
    """The keys that any query may see. Keys outside of them are not read."""
    queries, keys = q.shape[2], k.shape[2]
    start = 0 if spec.left is None else max(0, keys - queries - spec.left)
    _, stop = key_counts(tensors.key_lengths, keys)
    return slice(start, max(stop, start))


def _mask(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors, keys: slice) -> Tensor | None:
    """What is added to the scores of these keys, broadcasting to (B, Hq, Lq, keys): -inf hides."""
    seen: list[Tensor] = []
    added: list[Tensor] = []
    positions = torch.arange(keys.start, keys.stop, device=q.device)
    if tensors.bias is not None:
        bias = unexpanded(tensors.bias)
        bias = bias[..., keys] if bias.shape[-1] > 1 else bias
        (seen if bias.dtype == torch.bool else added).append(bias)
    # The bias may be NaN where the operator's own causal mask hides a key, and NaN added to -inf is NaN.
    if added and min(added[0].shape[-2:]) > 1 and is_causal(q, k, spec):
        seen.append(_distance(q, k, positions) <= 0)
    if hides_by_window(q, k, spec):
        seen += [] if spec.left is None else [_distance(q, k, positions) >= -spec.left]
        seen += [] if spec.right is None else [_distance(q, k, positions) <= spec.right]
    if tensors.alibi_slopes is not None:
        added.append(-unexpanded(tensors.alibi_slopes)[..., None, None] * _distance(q, k, positions).abs())
    if not seen and not added:
        return None
    # The operator takes the heads' dtype or float32.
    dtype = q.dtype if all(t.dtype == q.dtype for t in added) else lse_dtype(q.dtype)
    mask = functools.reduce(torch.add, (t.to(dtype) for t in added)) if added else q.new_zeros((), dtype=dtype)
    mask = torch.where(functools.reduce(torch.logical_and, seen), mask, _HIDDEN) if seen else mask
    return mask[(None,) * (4 - mask.dim())]


def _distance(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """(Lq, keys): how many keys after its query's diagonal each key is."""
    return positions - torch.arange(q.shape[2], device=q.device)[:, None] - (k.shape[2] - q.shape[2])


def empty_rows(mask: Tensor, causal: bool, queries: int) -> Tensor:
    """Which rows see nothing; broadcasts to (B, Hq, Lq)."""
    if not causal:
        return mask.amax(-1) == _HIDDEN
    some, first = (mask != _HIDDEN).view(torch.uint8).max(-1)
    return (some == 0) | (first > torch.arange(queries, device=mask.device))


def unexpanded(t: Tensor) -> Tensor:
    """The tensor with size 1 in dimensions that only repeat it (stride 0)."""
    for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        t = t.narrow(dim, 0, 1) if size > 1 and stride == 0 else t
    return t


def unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
