"""PyTorch's memory-efficient attention on CUDA, for key lengths, masks and biases in half precision.

Its operator adds one tensor to the scores, which may be expanded from a small one. What that tensor cannot hold
exactly in the dtype of q (slopes, relative positions, a bias in float32) is not given to it. The aten operators
are called directly, because the public function does not return the log-sum-exp. Rows that see nothing, of which
they may make anything, are put right here.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention import definition, torch_trial
from fastattn.core.attention.spec import AttentionSpec, Saved, ScoreTensors, Wanted
from fastattn.core.attention.tiles import adds_floats
from fastattn.core.attention.torch_flash import (
    _empty_rows,
    _finite,
    _hides_by_window,
    _is_causal,
    _unexpanded,
    runs_on_gpu,
)

_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
_HIDDEN = float("-inf")
# The operator reads rows of the tensor, and of the log-sum-exp, in pieces of so many elements.
ALIGNED, LSE_ALIGNED = 16, 32
# The gradient of a bias is made for every head and batch entry first: at most so many times the bias.
MOST_COPIES = 4


def serves(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Whether it computes this call: one head width, no window but its own causal one, and a tensor to add that
    holds everything exactly and is no larger than the inputs or the bias."""
    if not runs_on_gpu(q, v, spec) or _hides_by_window(q, k, spec):
        return False
    there = {name for name, t in tensors._asdict().items() if t is not None}
    if not there or not there <= {"key_lengths", "bias"}:
        return False
    if adds_floats(tensors) and tensors.bias.dtype != q.dtype:  # type: ignore[union-attr]
        return False
    given = 0 if tensors.bias is None else tensors.bias.numel()
    if math.prod(_shape(q, k, tensors)) > max(q.numel() + k.numel() + v.numel(), given):
        return False
    return torch_trial.agrees("memory-efficient attention", q, forward, backward, _problem)


def _problem(q: Tensor) -> tuple[AttentionSpec, ScoreTensors]:
    """Causal, with an empty entry, with rows that see nothing, and with a bias that all batch entries share."""
    _, heads, tokens, width = q.shape
    lengths = torch.tensor([tokens - 9, 0], dtype=torch.int32, device=q.device)
    place = torch.arange(tokens, device=q.device)
    bias = ((place * 0.7).sin() - (place[:, None] * 1.1).cos()).to(q.dtype).repeat(1, heads, 1, 1)
    hidden = (place[:, None] % 7 == 3) | (place < 2)
    spec = AttentionSpec(causal=True, scale=width**-0.5)
    return spec, ScoreTensors(key_lengths=lengths, bias=bias.masked_fill(hidden, _HIDDEN))


def serves_backward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted
) -> bool:
    """Whether it computes the gradients, too, without a much larger one of a bias that is shared."""
    if not serves(q, k, v, spec, tensors):
        return False
    whole = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return not wanted.bias or (tensors.bias is not None and whole <= MOST_COPIES * tensors.bias.numel())


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    added, empty = _added(q, k, spec, tensors)
    queries, (keys, values) = _aligned(q), _for_heads(q, k, v, tensors)
    out, lse, *_ = _efficient(queries, keys, values, added, True, 0.0, _is_causal(q, k, spec), scale=spec.scale)
    # Of rows that see nothing the operator may make anything.
    return out.masked_fill(empty[..., None], 0.0), lse[..., : q.shape[2]].masked_fill(empty, _HIDDEN)


def backward(
    dout: Tensor, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v, and of the bias if it is wanted."""
    q, k, v, out, lse = saved
    added, _ = _added(q, k, spec, tensors)
    keys, values = _for_heads(q, k, v, tensors)
    # With a finite log-sum-exp, exp(score - lse) is 0 in rows that see nothing. Behind the last row it is inf.
    lse = F.pad(_finite(lse), (0, -lse.shape[2] % LSE_ALIGNED), value=math.inf)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv, dbias = _efficient_backward(
        _aligned(dout), _aligned(q), keys, values, added, _aligned(out), lse, unused, unused, 0.0,
        [True, True, True, wanted.bias], _is_causal(q, k, spec), scale=spec.scale,
    )  # fmt: skip
    if wanted.bias:
        assert tensors.bias is not None
        dbias = dbias.sum_to_size(tensors.bias.shape)
    return dq, _of_key_heads(dk, k), _of_key_heads(dv, v), dbias if wanted.bias else None


def _shape(q: Tensor, k: Tensor, tensors: ScoreTensors) -> tuple[int, ...]:
    """Of the tensor that is added, before it is expanded. Its rows are as long as there are keys."""
    bias = (1, 1, 1, 1) if tensors.bias is None else tuple(_unexpanded(tensors.bias).shape)
    batch = bias[0] if tensors.key_lengths is None else q.shape[0]
    return batch, bias[1], bias[2], k.shape[2]


def _added(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    """What is added to the scores (B, Hq, Lq, Lk), -inf where hidden; and which rows see nothing, broadcasting to
    (B, Hq, Lq)."""
    seen: list[Tensor] = []
    mask = q.new_zeros(())
    if tensors.key_lengths is not None:
        seen.append(torch.arange(k.shape[2], device=q.device) < tensors.key_lengths[:, None, None, None])
    if tensors.bias is not None and tensors.bias.dtype == torch.bool:
        seen.append(_unexpanded(tensors.bias))
    elif tensors.bias is not None:
        mask = _unexpanded(tensors.bias)
    if seen:
        mask = torch.where(functools.reduce(torch.logical_and, seen), mask, _HIDDEN)
    if tensors.bias is None:
        assert tensors.key_lengths is not None
        empty = (tensors.key_lengths == 0)[:, None, None]  # with any key, every row sees the first one
    else:
        empty = _empty_rows(mask, _is_causal(q, k, spec), q.shape[2])
    return _in_aligned_rows(mask, k.shape[2]).expand(*q.shape[:3], k.shape[2]), empty


def _in_aligned_rows(mask: Tensor, keys: int) -> Tensor:
    """The same, its rows as long as there are keys, each beginning where the operator may begin to read."""
    if mask.shape[-1] != keys:
        mask = mask.expand(*mask.shape[:-1], keys)
    fits = all(stride % ALIGNED == 0 for stride in mask.stride()[:-1]) and mask.data_ptr() % 16 == 0
    if fits and mask.stride(-1) == 1:
        return mask
    return F.pad(mask, (0, -keys % ALIGNED)).contiguous()[..., :keys]


def _for_heads(q: Tensor, k: Tensor, v: Tensor, tensors: ScoreTensors) -> list[Tensor]:
    """Keys and values for every query head, zeros behind the key lengths: nothing there may reach a result."""
    found = []
    for t in (k, v):
        t = t if tensors.key_lengths is None else definition.keys_there(t, tensors.key_lengths)
        group = q.shape[1] // t.shape[1]
        found.append(_aligned(t if group == 1 else t.repeat_interleave(group, 1)))
    return found


def _of_key_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """The sum over the query heads that read a key head."""
    group = gradient.shape[1] // like.shape[1]
    return gradient if group == 1 else gradient.unflatten(1, (like.shape[1], group)).sum(2)


def _aligned(t: Tensor) -> Tensor:
    """The tensor as the operator reads it: rows of unit stride that begin at multiples of 16 bytes."""
    step = 16 // t.element_size()
    fits = t.stride(-1) == 1 and all(stride % step == 0 for stride in t.stride()[:-1])
    return t if fits and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)
