"""Attention under a mask of lists, or of intervals, entry by entry, in plain PyTorch.

Every entry of the lists is 64 queries that meet 64 keys. A batch of entries, from any rows, heads and patterns, is
computed by a few batched products of one shape. Results of one row are summed in a fixed order. A row may continue
in the next batch: the online softmax carries its state. The same holds for a column's dk and dv. So rows and
columns may have any number of entries, and the memory beside inputs and results is the workspace of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention.definition import diagonal_sums, of_distances, relative_index
from fastattn.core.attention.dropout import keep_mask_of_groups
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.tiles import exp_, key_counts, row_terms, tanh_of_half_
from fastattn.core.layout import heads_last
from fastattn.core.workspace import Workspace
from fastattn.ground.checks import lse_dtype
from fastattn.masks.lists import GRANULE, by_row, of_heads, rows_of_intervals, unpack, unpacked

# Elements of an intermediate result of a batch, of which there are four and a sum: up to a quarter of the queries,
# but neither so few that launching takes longer than computing, nor more than a cache holds.
FEWEST_ELEMENTS, MOST_ELEMENTS = 2**17, 2**19
# On a GPU computing takes longer than launching from here on.
GPU_ELEMENTS = 2**23
# Entries that are looked up in the lists at once, for the batches to come.
LOOKED_UP = 2**12


def serves(spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """A mask of lists or intervals, beside which there is no window."""
    return (tensors.mask is not None or tensors.intervals is not None) and (spec.left, spec.right) == (None, None)


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    call, workspace = Call(q, k, v, spec, tensors), GranuleWorkspace(lse_dtype(q.dtype), q.device)
    queries, keys, values = Granules(q), Granules(k, tensors.key_lengths), Granules(v, tensors.key_lengths)
    row_max, row_sum = call.beginning()
    total = row_max.new_zeros(*row_max.shape, v.shape[3])
    for entries in call.batches():
        rows = EntryGroups(entries.rows)
        logits, _ = call.logits(entries, queries, keys, workspace)
        before = row_max[rows.which]
        highest = torch.maximum(before, rows.reduce(logits.amax(-1), "max"))
        # A row that has seen only hidden keys has maximum -inf. Use 0 as its pivot: -inf minus -inf is NaN.
        pivot = highest.masked_fill(highest == -math.inf, 0.0)
        rescale = exp_(before - pivot)
        weights = exp_(logits.sub_(rows.of_entries(pivot)[..., None]))
        row_max[rows.which] = highest
        row_sum[rows.which] = row_sum[rows.which] * rescale + rows.reduce(weights.sum(-1))
        if (keep := call.keep_mask(entries)) is not None:
            weights.mul_(keep)
        products = workspace.product("left", weights, workspace.gather("right", values, entries.columns))
        total[rows.which] = total[rows.which] * rescale[..., None] + rows.reduce(products)
    total /= row_sum.masked_fill(row_sum == 0, 1.0).mul_(1.0 - spec.dropout)[..., None]
    lse = row_max + row_sum.log()
    return joined(total, q, q.dtype), joined(lse[..., None], q, lse.dtype)[..., 0].contiguous()


def backward(
    dout: Tensor, dlse: Tensor | None, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted
) -> Gradients:
    """With P = exp(S - lse), dP = dout v^T and delta = rowsum(dout * out) - dlse, dS = P * (dP - delta)."""
    q, k, v, out, lse = saved
    lse, delta = row_terms(dout, dlse, out, lse)
    call = Call(q, k, v, spec, tensors)
    dbias = BiasGradient(call, tensors.bias) if wanted.bias and tensors.bias is not None else None
    drelative = None
    if wanted.relative_bias and tensors.relative_bias is not None:
        drelative = RelativeBiasGradient(call, tensors.relative_bias)
    beside = [gradient for gradient in (dbias, drelative) if gradient is not None]
    dq, dk, dv = _gradients(call, dout, saved, lse, delta, beside)
    dsinks = None
    if tensors.sinks is not None:
        dsinks = -(torch.exp(tensors.sinks[..., None] - lse) * delta).sum(-1)
    # Convert one gradient at a time, so that only one exists in both layouts.
    dq = joined(dq, q, q.dtype)
    dk = joined(dk, k, k.dtype)
    dv = joined(dv, v, v.dtype)
    results = [None if gradient is None else gradient.result() for gradient in (dbias, drelative)]
    return Gradients(dq, dk, dv, results[0], results[1], dsinks)


def _gradients(
    call: Call,
    dout: Tensor,
    saved: Saved,
    lse: Tensor,
    delta: Tensor,
    beside: Sequence[BiasGradient | RelativeBiasGradient],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in granules; those of `beside` are given the gradient of every batch of scores."""
    workspace = GranuleWorkspace(lse.dtype, lse.device)
    lengths = call.tensors.key_lengths
    queries, upstream = Granules(saved.q), Granules(dout)
    keys, values = Granules(saved.k, lengths), Granules(saved.v, lengths)
    lse_rows, delta_rows = (rows_of(t)[..., None] for t in (lse, delta))
    dq, dk, dv = (t.zeros(workspace.dtype) for t in (queries, keys, values))
    for entries in call.batches():
        rows, columns = EntryGroups(entries.rows), EntryGroups(entries.columns)
        logits, slope = call.logits(entries, queries, keys, workspace)
        weights = exp_(logits.sub_(lse_rows[entries.rows]))
        dout_tiles = workspace.gather("left", upstream, entries.rows).mul_(1.0 / (1.0 - call.spec.dropout))
        v_tiles = workspace.gather("right", values, entries.columns)
        dscores, keep = workspace.product("dscores", dout_tiles, v_tiles.mT), call.keep_mask(entries)
        if keep is not None:
            dscores.mul_(keep)
        dscores.sub_(delta_rows[entries.rows]).mul_(weights)
        if keep is not None:
            weights.mul_(keep)
        columns.add_to(dv, workspace.product("right", weights.mT, dout_tiles))
        for gradient in beside:
            gradient.add(entries, dscores)
        if slope is not None:
            dscores.mul_(slope)
        # Queries and keys are gathered once more: it takes little, and to keep them would take workspace.
        q_tiles = workspace.gather("left", queries, entries.rows)
        columns.add_to(dk, workspace.product("right", dscores.mT, q_tiles))
        k_tiles = workspace.gather("right", keys, entries.columns)
        rows.add_to(dq, workspace.product("left", dscores, k_tiles))
    return dq.mul_(call.spec.scale), dk.mul_(call.spec.scale), dv


class Entries(NamedTuple):
    """Some entries of the lists, ordered by head and row.

    rows, columns: int64 (E,), granules of queries and of keys, by the numbers that `Granules` gives them.
    tiles: int32 (E,), which bit tile says who sees whom; None where all do.
    counts: (E,), the logarithm of the multiplicity; None where all keys count once.
    """

    rows: Tensor
    columns: Tensor
    tiles: Tensor | None
    counts: Tensor | None

    def split(self, size: int) -> Iterator[Entries]:
        for start in range(0, len(self.rows), size):
            yield Entries._make(None if t is None else t[start : start + size] for t in self)


class Call:
    """What a call asks for: its entries, batch by batch, and their scores."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> None:
        self.spec, self.tensors = spec, tensors
        if tensors.intervals is not None:
            self.lists = rows_of_intervals(tensors.intervals, q.shape[2])
        else:
            assert tensors.mask is not None and spec.mask is not None
            self.lists = by_row(unpacked(tensors.mask, spec.mask))
        self.batch, self.heads, self.group = q.shape[0], q.shape[1], q.shape[1] // max(1, k.shape[1])
        self.rows, self.columns = (-(-t.shape[2] // GRANULE) for t in (q, k))
        self.shift = k.shape[2] - q.shape[2]
        self.dtype, self.device = lse_dtype(q.dtype), q.device
        self._of_octets = unpack(torch.arange(256, device=q.device))[:, :8].to(self.dtype).log()
        elements = min(max(q.numel() // 4, FEWEST_ELEMENTS), MOST_ELEMENTS)
        elements = elements if q.device.type == "cpu" else GPU_ELEMENTS
        self.size = max(1, elements // (GRANULE * max(GRANULE, q.shape[3], v.shape[3])))

    def batches(self) -> Iterator[Entries]:
        """All entries, first the full ones, on which the mask costs nothing."""
        of = self.lists
        yield from self._batches(of.full_offsets, of.full_columns, None, of.full_counts)
        yield from self._batches(of.partial_offsets, of.partial_columns, of.partial_tiles, of.partial_counts)

    def _batches(
        self, offsets: Tensor, columns: Tensor, tiles: Tensor | None, counts: Tensor | None
    ) -> Iterator[Entries]:
        first, last = self._of_heads(offsets[:, 0].long()), self._of_heads(offsets[:, -1].long())
        # The heads' lists are put one after the other, head h's from head_ends[h - 1] to before head_ends[h].
        head_ends, row_ends = (last - first).cumsum(0), offsets[:, 1:].flatten().contiguous()
        total = int(head_ends[-1]) if len(head_ends) else 0
        for start in range(0, total, LOOKED_UP):
            place = torch.arange(start, min(start + LOOKED_UP, total), device=self.device)
            head = torch.searchsorted(head_ends, place, right=True)
            entry = last[head] - head_ends[head] + place
            row = torch.searchsorted(row_ends, entry, right=True) % self.rows
            yield from Entries(
                head * self.rows + row,
                head // self.group * self.columns + columns[entry],
                None if tiles is None else tiles[entry],
                None if counts is None else counts[entry],
            ).split(self.size)

    def _of_heads(self, values: Tensor) -> Tensor:
        """What belongs to each pattern, for each query head of all batch elements."""
        return of_heads(self.lists, values, self.batch, self.heads).expand(self.batch, self.heads).flatten()

    def beginning(self) -> tuple[Tensor, Tensor]:
        """The running maximum and sum (granules, 64) before the first key: nothing, or the sink."""
        heads = self.batch * self.heads
        row_max = torch.full((heads, self.rows * GRANULE), -math.inf, dtype=self.dtype, device=self.device)
        if self.tensors.sinks is not None:
            row_max.copy_(self.tensors.sinks.reshape(heads, 1))
        row_sum = torch.full_like(row_max, float(self.tensors.sinks is not None))
        return row_max.view(-1, GRANULE), row_sum.view(-1, GRANULE)

    def logits(
        self, entries: Entries, queries: Granules, keys: Granules, workspace: GranuleWorkspace
    ) -> tuple[Tensor, Tensor | None]:
        """Their scores (E, 64, 64), -inf where hidden; and by what a soft cap multiplies their derivative."""
        q_tiles, k_tiles = (
            workspace.gather("left", queries, entries.rows),
            workspace.gather("right", keys, entries.columns),
        )
        logits, slope = workspace.empty("logits", len(q_tiles), GRANULE, GRANULE), None
        scale, cap = self.spec.scale, self.spec.softcap
        logits.baddbmm_(q_tiles, k_tiles.mT, beta=0, alpha=2.0 * scale / cap if cap else scale)
        if cap:
            slope = 1.0 - tanh_of_half_(logits).square()
            logits.mul_(cap)
        for added in self._added(entries):
            logits.add_(added)
        self._hide(logits, entries, workspace)
        return logits, slope

    def _added(self, entries: Entries) -> Iterator[Tensor]:
        """What multiplicity, slopes and biases add to the scores; each broadcasts to (E, 64, 64)."""
        if entries.counts is not None:
            yield entries.counts.to(self.dtype)[:, None, None]
        if self.tensors.alibi_slopes is not None:
            queries = self._positions(entries.rows, self.rows) + self.shift
            distance = (self._positions(entries.columns, self.columns)[:, None] - queries[..., None]).abs()
            slopes = self.tensors.alibi_slopes.flatten()[entries.rows // self.rows]
            yield distance * -slopes[:, None, None]
        if self.tensors.bias is not None:
            yield self._bias(self.tensors.bias, entries)
        if self.tensors.relative_bias is not None:
            yield self._relative_bias(self.tensors.relative_bias, entries)

    def _hide(self, logits: Tensor, entries: Entries, workspace: GranuleWorkspace) -> None:
        """-inf where bits or key lengths hide; last, because a bias may be anything there."""
        if entries.tiles is not None:
            hidden = self._hidden(entries.tiles, workspace)
            if self.tensors.bias is None:
                logits.add_(hidden)
            else:
                logits.masked_fill_(hidden < 0, -math.inf)
        if self.tensors.key_lengths is not None:
            ends = self.tensors.key_lengths[entries.rows // (self.rows * self.heads)]
            unseen = self._positions(entries.columns, self.columns) >= ends[:, None]
            logits.masked_fill_(unseen[:, None], -math.inf)

    def _bias(self, bias: Tensor, entries: Entries) -> Tensor:
        """What falls on the entries, (E, 64 or 1, 64 or 1): a dimension of size 1 stays. Hidden is -inf."""
        batch, head = self.head_of(entries)
        batch, head = (n if size > 1 else n * 0 for n, size in zip((batch, head), bias.shape[:2], strict=True))
        # What is beyond the end is hidden, and the last position stands in for it.
        i, j = (
            self._positions(numbers, of_a_head).clamp_(max=size - 1) if size > 1 else batch.new_zeros(1, 1)
            for numbers, of_a_head, size in zip(
                entries[:2], (self.rows, self.columns), bias.shape[2:], strict=True
            )
        )
        found = bias[batch[:, None, None], head[:, None, None], i[:, :, None], j[:, None]]
        return torch.where(found, 0.0, -math.inf) if bias.dtype == torch.bool else found.to(self.dtype)

    def _relative_bias(self, relative_bias: Tensor, entries: Entries) -> Tensor:
        """(E, 64, 64). A granule has 127 distances, of which each query reads 64 in a row."""
        first = (self.diagonal_of(entries) * GRANULE - self.shift)[:, None]
        distance = first + torch.arange(1 - GRANULE, GRANULE, device=self.device)
        index = relative_index(distance, relative_bias.shape[2] // 2)
        found = relative_bias.flatten(0, 1).to(self.dtype)[(entries.rows // self.rows)[:, None], index]
        return found.unfold(1, GRANULE, 1).flip(1)

    def head_of(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """The batch element and the query head of each entry."""
        number = entries.rows // self.rows
        return number // self.heads, number % self.heads

    def diagonal_of(self, entries: Entries) -> Tensor:
        """How many granules each entry's column is after its row."""
        return entries.columns % self.columns - entries.rows % self.rows

    def keep_mask(self, entries: Entries) -> Tensor | None:
        """1 for weights that dropout keeps, else 0: (E, 64, 64); None without dropout."""
        if self.tensors.dropout_state is None:
            return None
        batch, head = self.head_of(entries)
        groups = (entries.columns % self.columns * (GRANULE // 8))[:, None] + torch.arange(
            GRANULE // 8, device=self.device
        )
        queries = self._positions(entries.rows, self.rows)[..., None]
        state = self.tensors.dropout_state[batch][:, None, None]
        return keep_mask_of_groups(
            groups[:, None], state, head[:, None, None], queries, self.spec.dropout, self.dtype
        )

    def _positions(self, numbers: Tensor, of_a_head: int) -> Tensor:
        """Where the queries or keys of granules stand: (E, 64)."""
        return (numbers % of_a_head * GRANULE)[:, None] + torch.arange(GRANULE, device=self.device)

    def _hidden(self, tiles: Tensor, workspace: GranuleWorkspace) -> Tensor:
        """0 where a bit is set, else -inf, found byte by byte in a table: (E, 64, 64)."""
        octets = self.lists.bit_tiles[tiles].view(torch.uint8).flatten().int()
        found = torch.index_select(self._of_octets, 0, octets, out=workspace.empty("hidden", len(octets), 8))
        return found.view(len(tiles), GRANULE, GRANULE)


class BiasGradient:
    """The gradient of a bias, in granules of 64, or of 1 where the bias has size 1. Pairs without an
    entry get 0."""

    def __init__(self, call: Call, bias: Tensor) -> None:
        self.call, self.bias = call, bias
        sizes = (call.rows, call.columns)
        self.counts = tuple(count if size > 1 else 1 for count, size in zip(sizes, bias.shape[2:], strict=True))
        self.tile = tuple(GRANULE if size > 1 else 1 for size in bias.shape[2:])
        number = bias.shape[0] * bias.shape[1] * math.prod(self.counts)
        self.total = torch.zeros(number, *self.tile, dtype=call.dtype, device=call.device)

    def add(self, entries: Entries, dscores: Tensor) -> None:
        batch, head = self.call.head_of(entries)
        place = (batch, head, entries.rows % self.call.rows, entries.columns % self.call.columns)
        sizes = (*self.bias.shape[:2], *self.counts)
        owner = torch.zeros_like(batch)
        for number, size in zip(place, sizes, strict=True):
            owner = owner * size + (number if size > 1 else 0)
        alone = [dim + 1 for dim, size in enumerate(self.tile) if size == 1]
        EntryGroups(owner).add_to(self.total, dscores.sum(alone, keepdim=True) if alone else dscores)

    def result(self) -> Tensor:
        whole = self.total.view(*self.bias.shape[:2], *self.counts, *self.tile).transpose(3, 4)
        whole = whole.reshape(*self.bias.shape[:2], *(c * t for c, t in zip(self.counts, self.tile, strict=True)))
        return whole[:, :, : self.bias.shape[2], : self.bias.shape[3]].to(self.bias.dtype).contiguous()


class RelativeBiasGradient:
    """The gradient of a relative bias: sums along the 127 diagonals of granules, for each diagonal of granules."""

    def __init__(self, call: Call, relative_bias: Tensor) -> None:
        self.call, self.like = call, relative_bias
        self.diagonals = call.rows + call.columns - 1
        number = call.batch * call.heads * max(0, self.diagonals)
        self.total = torch.zeros(number, 2 * GRANULE - 1, dtype=call.dtype, device=call.device)

    def add(self, entries: Entries, dscores: Tensor) -> None:
        sums = diagonal_sums(dscores, dscores.dtype)
        diagonal = self.call.diagonal_of(entries) + self.call.rows - 1
        EntryGroups(entries.rows // self.call.rows * self.diagonals + diagonal).add_to(self.total, sums)

    def result(self) -> Tensor:
        if not self.total.numel():
            return torch.zeros_like(self.like)
        total = self.total.view(*self.like.shape[:2], self.diagonals, 2 * GRANULE - 1)
        # Neighbouring diagonals of granules overlap: the upper 63 distances of one are the lower of the next.
        lower, upper = total[..., :GRANULE].flatten(2), F.pad(total[..., GRANULE:], (0, 1)).flatten(2)
        sums = F.pad(lower, (0, GRANULE)) + F.pad(upper, (GRANULE, 0))
        nearest = 1 - self.call.rows * GRANULE - self.call.shift
        return of_distances(sums, nearest, self.like.shape[2] // 2).to(self.like.dtype)


class Granules:
    """The granules (64, W) of a tensor (B, H, L, W), numbered by batch element, head and position. In the last one
    of a head, the last position stands in for those beyond the end; beyond the length of a batch element, if there
    are lengths, rows are zeros, whatever lies there."""

    def __init__(self, t: Tensor, lengths: Tensor | None = None) -> None:
        batch, heads, length, self.width = t.shape
        if t.stride(3) != 1 or any(stride % self.width for stride in t.stride()[:3]):
            t = t.contiguous()
        # Whatever the layout, rows in memory, which are gathered one by one: nothing is copied beforehand.
        numbers = [torch.arange(size, device=t.device) for size in (batch, heads, length + -length % GRANULE)]
        numbers[2].clamp_(max=length - 1)
        b, h, i = (number * (step // self.width) for number, step in zip(numbers, t.stride()[:3], strict=True))
        self.places = (b[:, None, None] + h[:, None] + i).view(-1, GRANULE)
        last = sum(
            (size - 1) * (step // self.width) for size, step in zip(t.shape[:3], t.stride()[:3], strict=True)
        )
        extent = last + 1 if t.numel() else 0
        self.memory = t.as_strided((extent, self.width), (self.width, 1))
        self.unseen = None
        if lengths is not None and key_counts(lengths, length)[0] < length:
            self.unseen = (numbers[2] >= lengths[:, None]).repeat_interleave(heads, 0).view(-1, GRANULE)

    def zeros(self, dtype: torch.dtype) -> Tensor:
        return self.memory.new_zeros(len(self.places), GRANULE, self.width, dtype=dtype)


class EntryGroups:
    """Entries grouped by their owner, which is a row (or a column) of granules.

    Values of one owner are reduced in the order of its entries, so that the same inputs give the same bits.
    """

    def __init__(self, owners: Tensor) -> None:
        self.order = owners.argsort(stable=True)
        self.which, self._of_ordered, sizes = torch.unique_consecutive(
            owners[self.order], return_inverse=True, return_counts=True
        )
        self.begins = sizes.cumsum(0) - sizes

    def of_entries(self, values: Tensor) -> Tensor:
        """(owners, ...) -> (E, ...)."""
        index = torch.empty_like(self.order).scatter_(0, self.order, self._of_ordered)
        return values[index]

    def reduce(self, values: Tensor, mode: str = "sum") -> Tensor:
        """(E, ...) -> (owners, ...)."""
        return F.embedding_bag(self.order, values.flatten(1), self.begins, mode=mode).unflatten(
            1, values.shape[1:]
        )

    def add_to(self, total: Tensor, values: Tensor) -> None:
        # Each owner occurs once, so the order of the additions does not matter, on a GPU either.
        total.index_add_(0, self.which, self.reduce(values))


class GranuleWorkspace(Workspace):
    """Also memory for the granules of a batch of entries."""

    def gather(self, name: str, granules: Granules, numbers: Tensor) -> Tensor:
        """These granules (E, 64, W)."""
        places = granules.places.index_select(0, numbers).flatten()
        rows = self.empty(name, len(places), granules.width)
        if granules.memory.dtype == self.dtype:
            torch.index_select(granules.memory, 0, places, out=rows)
        else:
            rounded = self.empty("rounded", *rows.shape, dtype=granules.memory.dtype)
            rows.copy_(torch.index_select(granules.memory, 0, places, out=rounded))
        if granules.unseen is not None:
            rows.masked_fill_(granules.unseen.index_select(0, numbers).view(-1, 1), 0.0)
        return rows.view(len(numbers), GRANULE, granules.width)


def rows_of(t: Tensor) -> Tensor:
    """(B, H, L) -> (granules, 64)."""
    return F.pad(t, (0, -t.shape[2] % GRANULE)).reshape(-1, GRANULE)


def joined(granules: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(granules, 64, W) -> (B, H, L, W) for the batch, heads and length of `like`."""
    batch, heads, length, _ = like.shape
    t = granules.view(batch, heads, length + -length % GRANULE, granules.shape[2])[:, :, :length]
    return heads_last(t.to(dtype))
