"""Attention in plain PyTorch on whole rows of scores, for as many heads at once as a cache holds.

PyTorch's fused attention has no soft cap or sinks, on a CPU no dropout, and no gradient of a bias. Tiles of all
heads at once would go through memory at every step. Here a row's scores are there at once, so that there is no
online softmax, and every step but the products is done in place. On a GPU blocks are so large that computing takes
longer than launching, and what lies between two products or sums is one launch (torch_fused) where that serves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.core.attention import torch_fused
from fastattn.core.attention.definition import diagonal_sums, of_distances, relative_index
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.tiles import exp_, grouped, row_terms, tanh_of_half_
from fastattn.core.attention.torch_dropout import FusedKeepMasks, KeepMasks, masks_of
from fastattn.core.attention.torch_efficient import converted
from fastattn.core.attention.torch_fused import OF_BLOCKS, RESULTS, SCORE, SCORE_GRADIENT, WEIGHT
from fastattn.core.layout import empty_heads, zero_heads
from fastattn.core.workspace import Workspace
from fastattn.ground.checks import lse_dtype
from fastattn.ground.modes import kept

# Scores of a block: as many as a cache holds; more only for more rows, up to ROWS, since every block reads all
# keys and adds to all of their gradients.
ELEMENTS, MOST_ELEMENTS, ROWS = 2**18, 2**20, 256
# The same on a GPU: 64 MiB of scores in float32, which take ten times as long to go through as to launch a kernel.
GPU_ELEMENTS, GPU_ROWS = 2**24, 1024
# Rows of a block under a causal mask: the fewer, the fewer pairs after the diagonal are computed.
CAUSAL_ROWS, GPU_CAUSAL_ROWS = 128, 512
# Between rows of scores. Rows as long as a power of 2 fall on the same few lines of a cache, and the products that
# read scores by columns take 1.4 times as long.
PADDING = 8
# Fewer scores of a batch element than that are not worth a block of their own.
FEWEST = 2**12


def serves(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Everything but lists and intervals, if no row is longer than a block."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    if q.device.type not in ("cpu", "cuda") or q.numel() * k.numel() == 0 or keys > _limits(q)[1] // 32:
        return False
    if batch > 1 and tensors.key_lengths is not None and heads * queries * keys < FEWEST:
        return False
    return tensors.mask is None and tensors.intervals is None


def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    blocks = list(_blocks(q, k, spec, tensors))
    workspace = _workspace(blocks, q, spec, tensors, 1)
    out = zero_heads((*q.shape[:3], v.shape[3]), q, q.dtype)
    # A row that sees no key has the score of its sink.
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=workspace.dtype)
    if tensors.sinks is not None:
        lse.copy_(tensors.sinks[..., None])
    masks = _keep_masks(q, k, spec, tensors, workspace)
    for block in blocks:
        part = Part(block, q, k, spec, tensors, workspace)
        weights, _ = part.scores()
        pivot = weights.amax(-1, keepdim=True)
        sinks = None if tensors.sinks is None else block.of_heads(tensors.sinks)[..., None, None]
        if part.fused and sinks is None:
            (weights,) = torch_fused.run(WEIGHT, weights, pivot)
            row_sum = weights.sum(-1, keepdim=True)
            if masks is not None:
                weights.mul_(masks.of(*block.place))
            total = part.product("total", weights, part.copied("v", v, "columns"))
            ours, sums = torch_fused.run(RESULTS, total, pivot, row_sum, _numbers(q.device, 1.0 - spec.dropout))
            block.of(out, "rows").copy_(ours)
            block.of(lse, "rows").copy_(sums[..., 0])
            continue
        if sinks is not None:
            pivot = torch.maximum(pivot, sinks)
        # A row that sees nothing has maximum -inf. Use 0 as its pivot: -inf minus -inf is NaN.
        pivot.masked_fill_(pivot == float("-inf"), 0.0)
        row_sum = exp_(weights.sub_(pivot)).sum(-1, keepdim=True)
        if sinks is not None:
            row_sum += exp_(sinks - pivot)
        block.of(lse, "rows").copy_((pivot + row_sum.log())[..., 0])
        if masks is not None:
            weights.mul_(masks.of(*block.place))
        total = part.product("total", weights, part.copied("v", v, "columns"))
        total /= row_sum.masked_fill_(row_sum == 0, 1.0).mul_(1.0 - spec.dropout)
        block.of(out, "rows").copy_(total)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted
) -> Gradients:
    """With P = exp(S - lse), dP = dout v^T and delta = rowsum(dout * out) - dlse, dS = P * (dP - delta)."""
    q, k, _, out, lse = saved
    lse, delta = row_terms(dout, dlse, out, lse)
    dbias = drelative = dsinks = None
    if wanted.bias and tensors.bias is not None:
        dbias = BiasGradient(tensors.bias, lse.dtype)
    if wanted.relative_bias and tensors.relative_bias is not None:
        drelative = RelativeBiasGradient(tensors.relative_bias, q, k)
    beside = [gradient for gradient in (dbias, drelative) if gradient is not None]
    dq, dk, dv = _gradients(dout, saved._replace(lse=lse), delta, spec, tensors, beside)
    if tensors.sinks is not None:
        dsinks = -(torch.exp(tensors.sinks[..., None] - lse) * delta).sum(-1)
    results = [None if gradient is None else gradient.result() for gradient in (dbias, drelative)]
    dq, dk, dv = converted(q.dtype, dq, dk, dv)
    return Gradients(dq, dk, dv, results[0], results[1], dsinks)


def _gradients(
    dout: Tensor,
    saved: Saved,
    delta: Tensor,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    beside: Sequence[BiasGradient | RelativeBiasGradient],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; those of `beside` are given the gradient of every block of scores."""
    q, k, v, _, lse = saved
    blocks = list(_blocks(q, k, spec, tensors))
    workspace = _workspace(blocks, q, spec, tensors, 2)
    # If each block has all rows and columns of its heads, no gradient is a sum over blocks.
    alone = (
        sum(block.matrices for block in blocks if block.sizes == (q.shape[2], k.shape[2]))
        == q.shape[0] * q.shape[1]
    )
    dq, dk, dv = ((empty_heads if alone else zero_heads)(t.shape, t, lse.dtype) for t in (q, k, v))
    masks = _keep_masks(q, k, spec, tensors, workspace)
    for block in blocks:
        part = Part(block, q, k, spec, tensors, workspace)
        weights, bent = part.scores()
        pivot = block.of(lse, "rows")[..., None]
        weights = torch_fused.run(WEIGHT, weights, pivot)[0] if part.fused else exp_(weights.sub_(pivot))
        dout_rows, values = part.copied("dout", dout, "rows"), part.copied("v", v, "columns")
        keep = None if masks is None else masks.of(*block.place)
        if keep is not None:
            dout_rows.mul_(1.0 / (1.0 - spec.dropout))
        dscores = part.product("dscores", dout_rows, values.mT)
        if keep is not None:
            dscores.mul_(keep)
        delta_rows = block.of(delta, "rows")[..., None]
        if part.fused:
            product = weights if bent is None else bent
            cap = _numbers(q.device, 0.0 if bent is None or beside else spec.softcap)
            (dscores,) = torch_fused.run(SCORE_GRADIENT, weights, dscores, delta_rows, product, cap)
        else:
            dscores.sub_(delta_rows).mul_(weights)
        if keep is not None:
            weights.mul_(keep)
        _put(block.of(dv, "columns"), part.transposed_product("columns", weights, dout_rows), alone)
        for gradient in beside:
            gradient.add(block, dscores)
        if part.fused:
            if bent is not None and beside:
                dscores.addcmul_(dscores, torch.tanh(bent / spec.softcap).square_(), value=-1.0)
            _put(block.of(dq, "rows"), part.product("rows", dscores, part.keys, spec.scale), alone)
            found = part.transposed_product("columns", dscores, part.queries, spec.scale)
            _put(block.of(dk, "columns"), found, alone)
            continue
        if bent is not None:
            dscores.addcmul_(dscores, bent.square_(), value=-1.0)
        _put(block.of(dq, "rows"), part.product("rows", dscores, part.keys).mul_(spec.scale), alone)
        # The queries are scaled already; under a soft cap, by twice as much as the products, over the cap.
        found = part.transposed_product("columns", dscores, part.queries)
        _put(block.of(dk, "columns"), found.mul_(spec.softcap / 2.0) if spec.softcap else found, alone)
    return dq, dk, dv


class Block(NamedTuple):
    """Some batch elements, query heads and the key heads they read, rows, and the columns that these see. Row i
    stands on the diagonal at column i + shift."""

    batch: slice
    heads: slice
    heads_of_keys: slice
    rows: slice
    columns: slice
    shift: int

    @property
    def key_heads(self) -> int:
        return self.heads_of_keys.stop - self.heads_of_keys.start

    @property
    def sizes(self) -> tuple[int, int]:
        """How many rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def of(self, t: Tensor, falls: str) -> Tensor:
        """A view of what of a tensor falls on the block; of one that falls on "scores", dimensions of size 1
        stay."""
        if falls == "rows":
            return t[self.batch, self.heads, self.rows]
        if falls == "columns":
            return t[self.batch, self.heads_of_keys, self.columns]
        return t[tuple(part if n > 1 else slice(None) for part, n in zip(self.place, t.shape, strict=True))]

    def of_heads(self, t: Tensor) -> Tensor:
        """What of a tensor (B, Hq, ...) falls on the block; its first batch element alone if all share it."""
        return t[:1, self.heads] if t.stride(0) == 0 else t[self.batch, self.heads]

    @property
    def matrices(self) -> int:
        """Its heads, of all of its batch elements."""
        return (self.batch.stop - self.batch.start) * (self.heads.stop - self.heads.start)

    @property
    def elements(self) -> int:
        """Its scores, as they lie in a workspace."""
        rows, columns = self.sizes
        return self.matrices * rows * (columns + PADDING)

    @property
    def place(self) -> tuple[slice, slice, slice, slice]:
        """Where it lies in (B, Hq, Lq, Lk)."""
        return self.batch, self.heads, self.rows, self.columns

    @property
    def diagonal(self) -> int:
        """The column of the block, by its number there, at which its first row stands."""
        return self.rows.start + self.shift - self.columns.start

    def distances(self, device: torch.device) -> Tensor:
        """(rows + columns - 1,): how far behind the diagonal columns stand, from the nearest to the farthest."""
        rows, columns = self.sizes
        first = 1 - rows - self.diagonal
        return torch.arange(first, first + rows + columns - 1, device=device)

    def by_distance(self, values: Tensor) -> Tensor:
        """(..., rows, columns) of the values of each of the `distances`."""
        return values.unfold(-1, self.sizes[1], 1).flip(-2)


class Part:
    """The scores of a block, and what is done with them in a workspace."""

    def __init__(
        self, block: Block, q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors, workspace: Workspace
    ) -> None:
        self.block, self.spec, self.tensors, self.workspace = block, spec, tensors, workspace
        # Whether steps between products are fused. They compute in float32.
        single = workspace.dtype == torch.float32
        self.fused = single and all(torch_fused.serves(step, q.device) for step in OF_BLOCKS)
        self.queries, self.keys = self.copied("q", q, "rows"), self.copied("k", k, "columns")

    def copied(self, name: str, t: Tensor, falls: str) -> Tensor:
        """What of a tensor falls on the block, one element after the other and in the dtype of sums."""
        part = self.block.of(t, falls)
        return self.workspace.empty(name, *part.shape).copy_(part)

    def product(self, name: str, rows: Tensor, columns: Tensor, scale: float = 1.0) -> Tensor:
        """(B, Hq, L, M) @ (B, Hkv, M, N), each key head for the query heads that read it: (B, Hq, L, N); times a
        scale."""
        a, b = grouped(rows, columns.shape[1]).flatten(0, 1), columns.flatten(0, 1)
        found = self.workspace.empty(name, len(a), a.shape[1], b.shape[2] + PADDING)[..., : b.shape[2]]
        return _product(a, b, found, scale).view(*rows.shape[:3], columns.shape[3])

    def transposed_product(self, name: str, scores: Tensor, rows: Tensor, scale: float = 1.0) -> Tensor:
        """(B, Hq, L, N)^T @ (B, Hq, L, M), the sum over the query heads that read a key head: (B, Hkv, N, M);
        times a scale."""
        left, right = (grouped(t, self.block.key_heads).flatten(0, 1) for t in (scores, rows))
        found = self.workspace.empty(name, len(left), left.shape[2], right.shape[2])
        return _product(left.mT, right, found, scale).unflatten(0, (-1, self.block.key_heads))

    def scores(self) -> tuple[Tensor, Tensor | None]:
        """(batch, heads, rows, columns), -inf where hidden; and, under a soft cap, the tanh of what it is applied
        to, or that itself where steps are fused."""
        tensors, block, device = self.tensors, self.block, self.queries.device
        scale, cap = self.spec.scale, self.spec.softcap
        bent = None
        adds = any(t is not None for t in (tensors.alibi_slopes, tensors.bias, tensors.relative_bias))
        if self.fused:
            products = self.product("bent" if cap else "scores", self.queries, self.keys.mT, scale)
            scores, bent = self._fused_scores(products, hides=not adds), products if cap else None
            if not adds:
                return scores, bent
        elif not cap:
            scores = self.product("scores", self.queries.mul_(scale), self.keys.mT)
        else:
            bent = self.product("bent", self.queries.mul_(2.0 * scale / cap), self.keys.mT)
            scores = self.workspace.empty("scores", *bent.shape[:3], bent.shape[3] + PADDING)[..., : bent.shape[3]]
            tanh_of_half_(bent, scores)
            torch.mul(bent, cap, out=scores)
        if tensors.alibi_slopes is not None:
            slopes = block.of_heads(tensors.alibi_slopes)[..., None]
            scores.sub_(block.by_distance(slopes * block.distances(device).abs()))
        if tensors.bias is not None:
            bias = block.of(tensors.bias, "scores")
            if bias.dtype == torch.bool:
                # inf where seen, -inf where hidden. On a CPU it takes a tenth of the time of masked_fill.
                torch.minimum(scores, bias.to(scores.dtype).sub_(0.5).mul_(float("inf")), out=scores)
            else:
                scores.add_(bias)
        if tensors.relative_bias is not None:
            index = relative_index(block.distances(device), tensors.relative_bias.shape[2] // 2)
            scores.add_(block.by_distance(block.of_heads(tensors.relative_bias)[..., index]))
        self._hide(scores)
        return scores, bent

    def _fused_scores(self, products: Tensor, hides: bool) -> Tensor:
        """The scores of scaled products; those that the window hides are -inf if it `hides`."""
        _, _, rows, columns = self.block.place
        left, right = (self.spec.left, self.spec.right) if hides else (None, None)
        if not self.spec.softcap and left is None and right is None:
            return products
        places = _places(max(rows.stop, columns.stop), products.device)
        first = -math.inf if left is None else float(self.block.shift - left)
        last = math.inf if right is None else float(self.block.shift + right)
        numbers = _numbers(products.device, self.spec.softcap, first, last).unbind()
        return torch_fused.run(SCORE, products, places[columns], places[rows, None], *numbers)[0]

    def _hide(self, scores: Tensor) -> None:
        """-inf where the window hides; last, because what is added may be anything there. tril_ clears it first:
        NaN would stay NaN. On a CPU both take a fifth of the time of masked_fill."""
        (rows, columns), diagonal = self.block.sizes, self.block.diagonal
        left, right = self.spec.left, self.spec.right
        if right is not None and diagonal + right < columns - 1:
            first = max(0, diagonal + right + 1)
            part, last = scores[..., first:], diagonal + right - first
            part.tril_(last).add_(_hidden(part).triu_(last + 1))
        if left is not None and rows - 1 + diagonal - left > 0:
            first = diagonal - left
            part = scores[..., : rows - 1 + first]
            part.triu_(first).add_(_hidden(part).tril_(first - 1))


class BiasGradient:
    """The gradient of a bias, block by block."""

    def __init__(self, bias: Tensor, dtype: torch.dtype) -> None:
        self.bias, self.total = bias, torch.zeros_like(bias, dtype=dtype)
        self.alone = [dim for dim, size in enumerate(bias.shape) if size == 1]

    def add(self, block: Block, dscores: Tensor) -> None:
        part = block.of(self.total, "scores")
        part.add_(dscores.sum(self.alone, keepdim=True) if self.alone else dscores)

    def result(self) -> Tensor:
        return self.total.to(self.bias.dtype)


class RelativeBiasGradient:
    """The gradient of a relative bias: sums along the diagonals of the scores."""

    def __init__(self, relative_bias: Tensor, q: Tensor, k: Tensor) -> None:
        self.like, self.queries, self.keys = relative_bias, q.shape[2], k.shape[2]
        self.total = relative_bias.new_zeros(*relative_bias.shape[:2], self.queries + self.keys - 1)

    def add(self, block: Block, dscores: Tensor) -> None:
        first = block.columns.start + self.queries - block.rows.stop
        part = self.total[block.batch, block.heads, first : first + sum(block.sizes) - 1]
        part.add_(diagonal_sums(dscores, self.total.dtype))

    def result(self) -> Tensor:
        return of_distances(self.total, 1 - self.keys, self.like.shape[2] // 2)


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float) -> Tensor:
    return torch.bmm(a, b, out=out) if scale == 1.0 else torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


@kept(8)
def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.float32, device=device)


@kept(16)
def _numbers(device: torch.device, *numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _hidden(part: Tensor) -> Tensor:
    """-inf for all rows and columns of scores."""
    return part.new_full(part.shape[-2:], float("-inf"))


def _workspace(
    blocks: Sequence[Block], q: Tensor, spec: AttentionSpec, tensors: ScoreTensors, results: int
) -> Workspace:
    """With room for so many results of the size of the largest block, and what cap and dropout need beside."""
    dtype = lse_dtype(q.dtype)
    beside_a_mask = 0 if tensors.dropout_state is None else masks_of(q.device).BYTES
    of_dropout = dtype.itemsize + beside_a_mask if beside_a_mask else 0
    bytes_a_score = (results + bool(spec.softcap)) * dtype.itemsize + of_dropout
    return Workspace(dtype, q.device, bytes_a_score * max((block.elements for block in blocks), default=0))


def _keep_masks(
    q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors, workspace: Workspace
) -> KeepMasks | FusedKeepMasks | None:
    if tensors.dropout_state is None:
        return None
    return masks_of(q.device)(tensors.dropout_state, (q.shape[1], q.shape[2], k.shape[2]), spec.dropout, workspace)


def _put(total: Tensor, part: Tensor, alone: bool) -> None:
    """A block's part of a gradient, alone or beside others."""
    total.copy_(part) if alone else total.add_(part)


def _blocks(q: Tensor, k: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> Iterator[Block]:
    """The blocks that see anything. With key lengths, each is of one batch element and reads no key behind."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    lengths = None if tensors.key_lengths is None else tensors.key_lengths.cpu().tolist()
    group, shift = heads // k.shape[1], keys - queries
    elements, most, most_rows, causal_rows = _limits(q)
    rows_at_once = max(1, elements // (keys * group), min(most_rows, most // (keys * group)))
    rows_at_once = min(queries, rows_at_once)
    if spec.right is not None:
        rows_at_once = min(rows_at_once, causal_rows)
    key_heads_at_once = min(k.shape[1], max(1, elements // (keys * group * rows_at_once)))
    # On a GPU a few rows of all batch elements fill a block, on a CPU only where all rows of one leave room.
    whole = heads * keys * (queries if q.device.type == "cpu" else rows_at_once)
    batch_at_once = 1 if lengths is not None else min(batch, max(1, elements // whole))
    for b in _spans(batch, batch_at_once):
        stop = keys if lengths is None else lengths[b.start]
        for h in _spans(k.shape[1], key_heads_at_once):
            # From the last rows on, which see the most keys, so that the workspace need not grow.
            for rows in reversed(list(_spans(queries, rows_at_once))):
                first = 0 if spec.left is None else max(0, rows.start + shift - spec.left)
                last = stop if spec.right is None else min(stop, rows.stop + shift + spec.right)
                if first < last:
                    yield Block(b, slice(h.start * group, h.stop * group), h, rows, slice(first, last), shift)


def _limits(q: Tensor) -> tuple[int, int, int, int]:
    """ELEMENTS, MOST_ELEMENTS, ROWS and CAUSAL_ROWS of this device."""
    if q.device.type == "cpu":
        return ELEMENTS, MOST_ELEMENTS, ROWS, CAUSAL_ROWS
    return GPU_ELEMENTS, GPU_ELEMENTS, GPU_ROWS, GPU_CAUSAL_ROWS


def _spans(stop: int, step: int) -> Iterator[slice]:
    for first in range(0, stop, step):
        yield slice(first, min(first + step, stop))
