"""Attention with dropout in plain PyTorch: whole rows of scores, for as many heads at once as a cache holds.

PyTorch's fused attention has no dropout on a CPU, and tiles of all heads at once would go through memory at every
step. Here a row's scores are there at once, so that there is no online softmax, and every step but the products is
done in place. Exponents have base 2: exp2 takes 0.4 of the time of exp on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.core.attention.dropout import keep_mask
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors
from fastattn.core.attention.tiles import adds_floats, grouped, ungrouped
from fastattn.core.layout import zero_heads
from fastattn.ground.checks import lse_dtype

LOG2E = math.log2(math.e)
# Scores of a block, if a single row is not more.
ELEMENTS = 2**18
# Fewer scores of a batch element than that are not worth a block of their own.
FEWEST = 2**12
_SERVED = {"dropout_state", "key_lengths", "bias"}


def serves(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Dropout, beside windows, key lengths and a bias without gradient, if no row is longer than a block."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    if tensors.dropout_state is None or spec.softcap or q.numel() * k.numel() == 0 or keys > ELEMENTS // 32:
        return False
    if batch > 1 and tensors.key_lengths is not None and heads * queries * keys < FEWEST:
        return False
    return all(t is None for name, t in tensors._asdict().items() if name not in _SERVED)


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    work = lse_dtype(q.dtype)
    out = zero_heads((*q.shape[:3], v.shape[3]), q, q.dtype)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=work)
    unit = _unit(tensors)
    for block in _blocks(q, k, spec, tensors):
        weights = block.scores(q, k, spec, tensors)
        pivot = weights.amax(-1, keepdim=True)
        # A row that sees nothing has maximum -inf. Use 0 as its pivot: -inf minus -inf is NaN.
        pivot.masked_fill_(pivot == float("-inf"), 0.0)
        row_sum = _powers_(weights.sub_(pivot), unit).sum(-1, keepdim=True)
        block.of(lse, "rows").copy_((pivot / unit + row_sum.log())[..., 0])
        weights.mul_(block.keep_mask(spec, tensors, work))
        total = _product(weights, block.of(v, "columns").to(work))
        total /= row_sum.masked_fill_(row_sum == 0, 1.0).mul_(1.0 - spec.dropout)
        block.of(out, "rows").copy_(total)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors
) -> Gradients:
    """With P = exp(S - lse), dP = dout v^T and delta = rowsum(dout * out) - dlse, dS = P * (dP - delta)."""
    q, k, v, out, lse = saved
    work = lse.dtype
    dq, dk, dv = (zero_heads(t.shape, t, work) for t in (q, k, v))
    unit = _unit(tensors)
    for block in _blocks(q, k, spec, tensors):
        dout_rows = block.of(dout, "rows").to(work)
        delta = (dout_rows * block.of(out, "rows")).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= block.of(dlse, "rows")[..., None]
        row_lse = block.of(lse, "rows")[..., None]
        # Rows that saw nothing: exp(-inf - inf) is 0, and so is everything that follows.
        empty = row_lse == float("-inf")
        delta.masked_fill_(empty, 0.0)
        row_lse = row_lse.masked_fill(empty, float("inf")).mul_(unit)
        weights = _powers_(block.scores(q, k, spec, tensors).sub_(row_lse), unit)
        dout_rows = dout_rows * (1.0 / (1.0 - spec.dropout))
        keys, values = (block.of(t, "columns").to(work) for t in (k, v))
        dscores = _product(dout_rows, values.mT)
        keep = block.keep_mask(spec, tensors, work)
        dscores.mul_(keep).sub_(delta).mul_(weights)
        weights.mul_(keep)
        block.of(dv, "columns").add_(grouped(weights, block.key_heads).mT @ grouped(dout_rows, block.key_heads))
        block.of(dq, "rows").add_(_product(dscores, keys), alpha=spec.scale)
        q_rows = grouped(block.of(q, "rows").to(work), block.key_heads)
        block.of(dk, "columns").add_(grouped(dscores, block.key_heads).mT @ q_rows, alpha=spec.scale)
    return Gradients(dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))


class Block(NamedTuple):
    """Some batch elements, query heads and the key heads they read, rows, and the columns that these see."""

    batch: slice
    heads: slice
    heads_of_keys: slice
    rows: slice
    columns: slice

    @property
    def key_heads(self) -> int:
        return self.heads_of_keys.stop - self.heads_of_keys.start

    def of(self, t: Tensor, falls: str) -> Tensor:
        """A view of what of a tensor falls on the block."""
        if falls == "rows":
            return t[self.batch, self.heads, self.rows]
        return t[self.batch, self.heads_of_keys, self.columns]

    def scores(self, q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Tensor:
        """(batch, heads, rows, columns), in `_unit`, -inf where hidden."""
        unit = _unit(tensors)
        work = lse_dtype(q.dtype)
        scores = _product(self.of(q, "rows").to(work) * (spec.scale * unit), self.of(k, "columns").to(work).mT)
        if tensors.bias is not None:
            slices = (self.batch, self.heads, self.rows, self.columns)
            sizes = zip(slices, tensors.bias.shape, strict=True)
            bias = tensors.bias[tuple(part if size > 1 else slice(None) for part, size in sizes)]
            if bias.dtype == torch.bool:
                scores.masked_fill_(~bias, float("-inf"))
            else:
                scores.add_(bias)
        shift = k.shape[2] - q.shape[2]
        keys = torch.arange(self.columns.start, self.columns.stop, device=q.device)
        diagonal = torch.arange(self.rows.start, self.rows.stop, device=q.device)[:, None] + shift
        if spec.left is not None and self.columns.start < self.rows.stop - 1 + shift - spec.left:
            scores.masked_fill_(keys < diagonal - spec.left, float("-inf"))
        if spec.right is not None and self.columns.stop - 1 > self.rows.start + shift + spec.right:
            scores.masked_fill_(keys > diagonal + spec.right, float("-inf"))
        return scores

    def keep_mask(self, spec: AttentionSpec, tensors: ScoreTensors, dtype: torch.dtype) -> Tensor:
        """1 for weights that dropout keeps, else 0: (batch, heads, rows, columns)."""
        state = tensors.dropout_state
        assert state is not None
        head = torch.arange(self.heads.start, self.heads.stop, device=state.device)[:, None, None]
        query = torch.arange(self.rows.start, self.rows.stop, device=state.device)[:, None]
        state = state[self.batch, None, None, None]
        return keep_mask(state, head, query, self.columns.start, self.columns.stop, spec.dropout, dtype)


def _unit(tensors: ScoreTensors) -> float:
    """The unit of scores: log 2, but nats where floats are added. The lowest finite number, by which masks hide,
    would become -inf in units of log 2."""
    return 1.0 if adds_floats(tensors) else LOG2E


def _powers_(differences: Tensor, unit: float) -> Tensor:
    """The exponentials of differences of scores, in place."""
    return (differences if unit == LOG2E else differences.mul_(LOG2E)).exp2_()


def _blocks(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Iterator[Block]:
    """The blocks that see anything. With key lengths, each is of one batch element and reads no key behind."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    lengths = None if tensors.key_lengths is None else tensors.key_lengths.tolist()
    group, shift = heads // k.shape[1], keys - queries
    rows_at_once = min(queries, max(1, ELEMENTS // (keys * group)))
    if spec.right is not None:
        rows_at_once = min(rows_at_once, 128)  # fewer pairs after the diagonal
    key_heads_at_once = min(k.shape[1], max(1, ELEMENTS // (keys * group * rows_at_once)))
    whole = heads * queries * keys
    batch_at_once = 1 if lengths is not None else min(batch, max(1, ELEMENTS // whole))
    for b in _spans(batch, batch_at_once):
        stop = keys if lengths is None else lengths[b.start]
        for h in _spans(k.shape[1], key_heads_at_once):
            for rows in _spans(queries, rows_at_once):
                first = 0 if spec.left is None else max(0, rows.start + shift - spec.left)
                last = stop if spec.right is None else min(stop, rows.stop + shift + spec.right)
                if first < last:
                    yield Block(b, slice(h.start * group, h.stop * group), h, rows, slice(first, last))


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """(B, Hq, L, M) @ (B, Hkv, M, N), each key head for the query heads that read it: (B, Hq, L, N)."""
    return ungrouped(grouped(rows, columns.shape[1]) @ columns, rows.shape[1])


def _spans(stop: int, step: int) -> Iterator[slice]:
    for first in range(0, stop, step):
        yield slice(first, min(first + step, stop))
