"""Attention under a mask of lists, entry by entry, in plain PyTorch.

Every entry of the lists is 64 queries that meet 64 keys. A batch of them, of whatever rows, heads and patterns, is a
few batched products of equal shape, and nothing else is computed. What the entries of one row give is summed, in a
fixed order, and a row that a batch cuts goes on in the next (online softmax); likewise what the entries of one
column give to dk and dv. So rows and columns may have any number of entries, all work is of one kind, and what it
needs beside inputs and results is the work space of one batch.

Exponents have base 2: exp2 takes 0.4 of the time of exp on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.backends.layout import heads_last
from fastattn.masks.lists import GRANULE, of_heads, unpacked
from fastattn.spec import AttentionSpec, Gradients, ScoreTensors, lse_dtype

LOG2E = math.log2(math.e)
# Elements of one intermediate result of a batch, 1 MiB in fp32, of which there are up to eight.
BATCH_ELEMENTS = 2**18


def serves(spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """A mask of lists, and beside it nothing that says something else of each pair."""
    if tensors.mask is None or (spec.left, spec.right) != (None, None):
        return False
    return tensors.bias is None and tensors.relative_bias is None and tensors.dropout_state is None


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor]:
    call = Call(q, k, v, spec, tensors)
    queries, keys, values = (cut(t, call.work) for t in (q, k, v))
    total = values.new_zeros(len(queries), GRANULE, v.shape[3])
    row_max, row_sum = call.beginning()
    for entries in call.entries():
        q_, k_ = call.gathered("q", queries, entries.rows), call.gathered("k", keys, entries.columns)
        logits, _ = call.logits(entries, q_, k_)
        rows = Bags(entries.rows)
        before = row_max[rows.owners]
        highest = torch.maximum(before, rows.reduced(logits.amax(-1), "max"))
        pivot = highest.masked_fill(highest == -math.inf, 0.0)
        shrink = torch.exp2(before - pivot)
        weights = logits.sub_(pivot[rows.owner_of][..., None]).exp2_()
        given = call.product("given", weights, call.gathered("v", values, entries.columns))
        row_max[rows.owners] = highest
        row_sum[rows.owners] = row_sum[rows.owners] * shrink + rows.reduced(weights.sum(-1))
        total[rows.owners] = total[rows.owners] * shrink[..., None] + rows.reduced(given)
    total /= row_sum.masked_fill(row_sum == 0, 1.0)[..., None]
    lse = (row_max + row_sum.log2()) / LOG2E
    return joined(total, q), joined(lse[..., None], q, lse.dtype)[..., 0].contiguous()


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    spec: AttentionSpec,
    tensors: ScoreTensors,
) -> Gradients:
    """With P = exp(S - lse), dP = dout v^T and delta = rowsum(dout * out) - dlse, dS = P * (dP - delta)."""
    call = Call(q, k, v, spec, tensors)
    queries, keys, values, upstream = (cut(t, call.work) for t in (q, k, v, dout))
    lse, delta = call.of_rows(dout, out, lse, dlse)
    lse_rows, delta_rows = (cut(t[..., None], call.work) for t in (lse * LOG2E, delta))
    dq, dk, dv = (torch.zeros_like(t) for t in (queries, keys, values))
    for entries in call.entries():
        rows, columns = Bags(entries.rows), Bags(entries.columns)
        q_, dout_ = call.gathered("q", queries, entries.rows), call.gathered("dout", upstream, entries.rows)
        k_, v_ = call.gathered("k", keys, entries.columns), call.gathered("v", values, entries.columns)
        logits, slope = call.logits(entries, q_, k_)
        weights = logits.sub_(lse_rows[entries.rows]).exp2_()
        columns.add_to(dv, call.product("given", weights.mT, dout_))
        dscores = call.product("dscores", dout_, v_.mT).sub_(delta_rows[entries.rows]).mul_(weights)
        if slope is not None:
            dscores.mul_(slope)
        columns.add_to(dk, call.product("given", dscores.mT, q_))
        rows.add_to(dq, call.product("given", dscores, k_))
    dq, dk = dq.mul_(spec.scale), dk.mul_(spec.scale)
    dsinks = None
    if tensors.sinks is not None:
        dsinks = -(torch.exp(tensors.sinks[..., None] - lse) * delta).sum(-1)
    return Gradients(joined(dq, q), joined(dk, k), joined(dv, v), sinks=dsinks)


class Entries(NamedTuple):
    """Some entries of the lists, ordered by batch element, head and row.

    heads: int64 (E,), which query head of all batch elements, b Hq + h.
    rows, columns: int64 (E,), which granule of queries and of keys, in the order that `cut` puts them in.
    bits: int64 (E, 64), who sees whom; None where all do.
    counts: (E,), the logarithm of the multiplicity; None where all keys count once.
    """

    heads: Tensor
    rows: Tensor
    columns: Tensor
    bits: Tensor | None
    counts: Tensor | None


class Call:
    """What a call asks for, its entries batch by batch, their scores, and the space they are computed in."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> None:
        assert tensors.mask is not None and spec.mask is not None
        self.spec, self.tensors, self.lists = spec, tensors, unpacked(tensors.mask, spec.mask)
        self.work, self.device = lse_dtype(q.dtype), q.device
        self.batch, self.heads, self.group = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
        self.shift = k.shape[2] - q.shape[2]
        self.rows, self.columns = (-(-t.shape[2] // GRANULE) for t in (q, k))
        self.size = max(1, BATCH_ELEMENTS // (GRANULE * max(GRANULE, q.shape[3], v.shape[3])))
        self._space: dict[str, Tensor] = {}

    # ---- entries ----

    def entries(self) -> Iterator[Entries]:
        """All of them, first the full ones, on which a mask costs nothing."""
        of = self.lists
        yield from self._entries(of.full_offsets, of.full_columns, None, of.full_counts)
        yield from self._entries(of.partial_offsets, of.partial_columns, of.partial_tiles, of.partial_counts)

    def _entries(
        self, offsets: Tensor, columns: Tensor, tiles: Tensor | None, counts: Tensor | None
    ) -> Iterator[Entries]:
        # The heads' lists one after the other: a place is in the head that ends beyond it.
        first, last = self._of_heads(offsets[:, 0].long()), self._of_heads(offsets[:, -1].long())
        head_ends, row_ends = (last - first).cumsum(0), offsets[:, 1:].flatten()
        total = int(head_ends[-1]) if len(head_ends) else 0
        for start in range(0, total, self.size):
            place = torch.arange(start, min(start + self.size, total), device=self.device)
            head = torch.searchsorted(head_ends, place, right=True)
            entry = last[head] - head_ends[head] + place
            row = torch.searchsorted(row_ends, entry, right=True) % self.rows
            yield Entries(
                head,
                head * self.rows + row,
                head // self.group * self.columns + columns[entry],
                None if tiles is None else self.lists.bit_tiles[tiles[entry]],
                None if counts is None else counts[entry],
            )

    def _of_heads(self, values: Tensor) -> Tensor:
        """What belongs to each pattern, for each head of all batch elements."""
        return of_heads(self.lists, values, self.batch, self.heads).expand(self.batch, self.heads).flatten()

    # ---- their scores ----

    def logits(self, entries: Entries, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scores (E, 64, 64) of entries with these queries and keys, in units of log 2, -inf where hidden; and
        by what a soft cap multiplies their derivative."""
        logits, slope = self.empty("logits", len(q), GRANULE, GRANULE), None
        scale, cap = self.spec.scale, self.spec.softcap
        logits.baddbmm_(q, k.mT, beta=0, alpha=scale / cap if cap else scale * LOG2E)
        if cap:
            logits.tanh_()
            slope = 1.0 - logits.square()
            logits.mul_(cap * LOG2E)
        for added in self._added(entries):
            logits.add_(added)
        return logits, slope

    def _added(self, entries: Entries) -> Iterator[Tensor]:
        """What multiplicity, slopes, bits and key lengths add to the scores; each broadcasts to (E, 64, 64)."""
        within = torch.arange(GRANULE, device=self.device)
        keys = (entries.columns % max(1, self.columns) * GRANULE)[:, None, None] + within
        if entries.counts is not None:
            yield entries.counts.to(self.work)[:, None, None] * LOG2E
        if self.tensors.alibi_slopes is not None:
            queries = (entries.rows % self.rows * GRANULE + self.shift)[:, None, None] + within[:, None]
            slopes = self.tensors.alibi_slopes.flatten()[entries.heads]
            yield (keys - queries).abs() * (slopes * -LOG2E)[:, None, None]
        if entries.bits is not None:
            yield self._hidden(entries.bits)
        if self.tensors.key_lengths is not None:
            ends = self.tensors.key_lengths[entries.heads // self.heads]
            yield torch.where(keys < ends[:, None, None], 0.0, -math.inf)

    def _hidden(self, bits: Tensor) -> Tensor:
        """0 where a bit is set, else -inf, byte by byte from a table: (E, 64, 64)."""
        byte = torch.arange(256, device=self.device)[:, None] >> torch.arange(8, device=self.device)
        table = torch.zeros(256, 8, dtype=self.work, device=self.device).masked_fill((byte & 1) == 0, -math.inf)
        found = self.gathered("hidden", table, bits.view(torch.uint8).flatten().int())
        return found.view(len(bits), GRANULE, GRANULE)

    # ---- rows ----

    def beginning(self) -> tuple[Tensor, Tensor]:
        """The running maximum and sum (B Hq R, 64) before the first key: nothing, or the sink."""
        shape = (self.batch, self.heads, self.rows, GRANULE)
        if self.tensors.sinks is None:
            row_max = torch.full(shape, -math.inf, dtype=self.work, device=self.device)
            return row_max.view(-1, GRANULE), torch.zeros_like(row_max).view(-1, GRANULE)
        sinks = (self.tensors.sinks * LOG2E)[..., None, None].expand(shape).reshape(-1, GRANULE)
        return sinks, torch.ones_like(sinks)

    def of_rows(self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
        """lse and delta. Rows that saw nothing: exp(-inf - inf) is 0 and so is everything that follows."""
        delta = (dout.to(self.work) * out).sum(-1)
        if dlse is not None:
            delta = delta - dlse
        empty = lse == -math.inf
        return lse.masked_fill(empty, math.inf), delta.masked_fill(empty, 0.0)

    # ---- space ----

    def empty(self, name: str, *shape: int) -> Tensor:
        """Space for a result of a batch, the same for every batch: fresh pages cost more than what is computed."""
        size = math.prod(shape)
        if name not in self._space or self._space[name].numel() < size:
            self._space[name] = torch.empty(size, dtype=self.work, device=self.device)
        return self._space[name][:size].view(shape)

    def gathered(self, name: str, t: Tensor, index: Tensor) -> Tensor:
        return torch.index_select(t, 0, index, out=self.empty(name, len(index), *t.shape[1:]))

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self.empty(name, len(a), a.shape[1], b.shape[2]))


class Bags:
    """Which entries have the same owner, a row or a column; what they give is reduced in their order."""

    def __init__(self, owners: Tensor) -> None:
        self.owners, self.owner_of, sizes = torch.unique(owners, return_inverse=True, return_counts=True)
        self.order, self.begins = self.owner_of.argsort(stable=True), sizes.cumsum(0) - sizes

    def reduced(self, given: Tensor, mode: str = "sum") -> Tensor:
        """(E, ...) -> (owners, ...)."""
        return F.embedding_bag(self.order, given.flatten(1), self.begins, mode=mode).unflatten(1, given.shape[1:])

    def add_to(self, total: Tensor, given: Tensor) -> None:
        # No owner is there twice, so neither order nor atomics matter.
        total.index_add_(0, self.owners, self.reduced(given))


def cut(t: Tensor, work: torch.dtype) -> Tensor:
    """(B, H, L, W) -> (B H L/64, 64, W), the last granule of each head filled up with zeros."""
    short = -t.shape[2] % GRANULE
    t = F.pad(t.to(work), (0, 0, 0, short)) if short else t.to(work)
    return t.reshape(-1, GRANULE, t.shape[3])


def joined(granules: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What `cut` cut again, for as many heads and positions as `like` has, in its dtype or another."""
    batch, heads, length, _ = like.shape
    t = granules.view(batch, heads, -(-length // GRANULE) * GRANULE, granules.shape[2])[:, :, :length]
    return heads_last(t.to(dtype or like.dtype))
