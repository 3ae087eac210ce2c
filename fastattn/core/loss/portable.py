"""The loss in plain PyTorch, tile by tile: a tile is all tokens times a few classes. Logits never exist whole.

One pass over the classes gives the log-sum-exp of each token. The gradients need a second pass, in which the
logits of a tile are computed again: four products as large as x W^T in all, where eager PyTorch has three and
keeps the logits. Where a loss is one number, `reduced` saves most of the fourth: it computes the gradients at
once, and the first pass leaves exp(logit - maximum) of the first tokens in the memory that the weight's gradient
is written to in the second pass. In float32 that memory holds the logits of d tokens. Each tile is read just
before its gradient overwrites it.

Tokens that do not count (ignore_index) are left out before anything is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.core.loss.definition import gradient_of_rows, loss_of_rows
from fastattn.core.loss.spec import LossSpec, LossTensors
from fastattn.ground.checks import lse_dtype

# Bytes of a tile of logits: about what a level 2 cache holds on a CPU, and enough work for a launch on a GPU. A
# tile has at least LEAST_CLASSES classes, and an even number of them: so its memory in a gradient of two-byte
# elements is aligned.
TILE_ON_CPU, TILE_ELSEWHERE = 2**21, 2**26
LEAST_CLASSES = 64
# Without a gradient of the weight, at least this many tokens are computed at a time, whose logits are kept from
# the first pass to the second.
KEPT_TOKENS = 64


class Tile(NamedTuple):
    """Some classes: which, their rows of the weight (in fp32 at least), biases, and weights in the loss. Tokens
    whose own class is among them, and its column in the tile; None where the target is probabilities."""

    classes: slice
    w: Tensor
    b: Tensor | None
    class_weight: Tensor | None
    own: tuple[Tensor, Tensor] | None


def forward(tensors: LossTensors, spec: LossSpec) -> Tensor:
    counted = _Counted.of(tensors, spec)
    return counted.spread(_first_pass(counted.tensors, spec, width_of_tiles(counted.tensors, spec.tokens)), 1)


def backward(
    drows: Tensor, tensors: LossTensors, rows: Tensor, wanted: Sequence[bool], spec: LossSpec
) -> tuple[Tensor | None, ...]:
    counted = _Counted.of(tensors, spec)
    tensors, drows, rows = counted.tensors, counted.select(drows), counted.select(rows)
    dw = _weight_gradient(tensors, wanted)
    dx, db = _second_pass(drows, tensors, rows, _Kept.nothing(tensors, spec.tokens), dw, wanted, spec)
    return None if dx is None else counted.spread(dx, 0), dw, db


def reduced(
    tensors: LossTensors, coefficients: Tensor, wanted: Sequence[bool], spec: LossSpec
) -> tuple[Tensor | None, ...]:
    counted = _Counted.of(tensors, spec)
    tensors, coefficients = counted.tensors, counted.select(coefficients)
    dw = _weight_gradient(tensors, wanted)
    # The derivative of the cap needs the logits themselves.
    if spec.softcap or not any(wanted):
        kept = _Kept.nothing(tensors)
    elif dw is None:
        kept = _Kept.apart(tensors)
    else:
        kept = _Kept.within(dw, tensors)
    step = len(tensors.x) if dw is not None else max(1, kept.tokens)
    parts = []
    for start in range(0, max(1, len(tensors.x)), max(1, step)):
        some = slice(start, start + step)
        part = tensors._replace(x=tensors.x[some], target=tensors.target[some])
        parts.append(_reduced(part, coefficients[:, some], kept.for_tokens(len(part.x)), dw, wanted, spec))
    losses, dxs, dbs = zip(*parts, strict=True)
    dx = counted.spread(torch.cat(dxs), 0) if wanted[0] else None
    return sum(losses[1:], losses[0]), dx, dw, sum(dbs[1:], dbs[0]) if wanted[2] else None


def _reduced(
    tensors: LossTensors,
    coefficients: Tensor,
    kept: _Kept,
    dw: Tensor | None,
    wanted: Sequence[bool],
    spec: LossSpec,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    groups = slice(kept.tokens), slice(kept.tokens, None)
    first, rest = (tensors._replace(x=tensors.x[some], target=tensors.target[some]) for some in groups)
    found = [_first_pass(first, spec, kept.width, kept)] if kept.tokens else []
    found += [_first_pass(rest, spec, kept.width)] if len(rest.x) or not found else []
    rows = torch.cat(found, 1)
    loss = loss_of_rows(rows, coefficients)
    if not any(wanted):
        return loss, None, None
    return loss, *_second_pass(gradient_of_rows(rows, coefficients), tensors, rows, kept, dw, wanted, spec)


class _Counted(NamedTuple):
    """The tokens that count. which: their numbers; None for all."""

    tensors: LossTensors
    which: Tensor | None
    tokens: int

    @classmethod
    def of(cls, tensors: LossTensors, spec: LossSpec) -> _Counted:
        tokens = len(tensors.x)
        if tensors.target.is_floating_point():
            return cls(tensors, None, tokens)
        count = tensors.target != spec.ignore_index
        if count.all():
            return cls(tensors, None, tokens)
        index = count.nonzero()[:, 0]
        return cls(tensors._replace(x=tensors.x[index], target=tensors.target[index]), index, tokens)

    def select(self, t: Tensor) -> Tensor:
        """Of values of all tokens (n, T), those of the tokens that count."""
        return t if self.which is None else t[:, self.which]

    def spread(self, t: Tensor, dim: int) -> Tensor:
        """Values of the tokens that count among those of all tokens; zeros for the others."""
        if self.which is None:
            return t
        shape = (*t.shape[:dim], self.tokens, *t.shape[dim + 1 :])
        return t.new_zeros(shape).index_copy_(dim, self.which, t)


class _Kept(NamedTuple):
    """What the first pass leaves for the second: exp(logit - pivot) of the first `tokens` tokens in `memory`
    (1-D), and the pivots (tokens, 1) of each tile. The memory of a tile begins at the `stride` elements of its
    first class.

    width: how many classes a tile has in both passes.
    """

    memory: Tensor
    stride: int
    tokens: int
    width: int
    pivots: list[Tensor]

    @classmethod
    def nothing(cls, tensors: LossTensors, tokens: int = 0) -> _Kept:
        return cls(tensors.x.new_empty(0), 0, 0, width_of_tiles(tensors, tokens), [])

    @classmethod
    def within(cls, dw: Tensor, tensors: LossTensors) -> _Kept:
        """In the memory of the weight's gradient (V, d)."""
        stride = dw.shape[1]
        room = stride * dw.element_size() // lse_dtype(dw.dtype).itemsize
        return cls(dw.view(-1), stride, min(room, len(tensors.x)), width_of_tiles(tensors), [])

    @classmethod
    def apart(cls, tensors: LossTensors) -> _Kept:
        """In memory of its own, about as large as x, or that of KEPT_TOKENS tokens."""
        classes = len(tensors.w)
        tokens = min(max(KEPT_TOKENS, tensors.x.numel() // classes), len(tensors.x))
        memory = tensors.x.new_empty(classes * tokens, dtype=lse_dtype(tensors.x.dtype))
        return cls(memory, tokens, tokens, width_of_tiles(tensors._replace(x=tensors.x[:tokens])), [])

    def for_tokens(self, tokens: int) -> _Kept:
        """The same memory, for no more than these tokens."""
        return self._replace(tokens=min(self.tokens, tokens), pivots=[])

    def of(self, classes: slice) -> Tensor:
        """A tile's part of the memory (tokens, classes)."""
        count, dtype = classes.stop - classes.start, lse_dtype(self.memory.dtype)
        first = classes.start * self.stride
        size = self.tokens * count * dtype.itemsize // self.memory.element_size()
        return self.memory[first : first + size].view(dtype).view(self.tokens, count)


def width_of_tiles(tensors: LossTensors, tokens: int = 0) -> int:
    """How many classes a tile has of these tokens, or of so many: an even number, or all."""
    bytes = TILE_ON_CPU if tensors.x.device.type == "cpu" else TILE_ELSEWHERE
    width = bytes // max(1, max(len(tensors.x), tokens) * lse_dtype(tensors.x.dtype).itemsize)
    return min(max(LEAST_CLASSES, width - width % 2), len(tensors.w))


class _Pass:
    """One pass over the classes, with x in fp32 at least."""

    def __init__(self, tensors: LossTensors, spec: LossSpec, width: int) -> None:
        self.tensors, self.spec, self.width = tensors, spec, width
        self.x = tensors.x.to(lse_dtype(tensors.x.dtype))

    def tiles(self) -> Iterator[Tile]:
        _, w, b, target, class_weight = self.tensors
        own: Iterator = itertools.repeat(None) if target.is_floating_point() else self._tokens_of_tiles()
        for start, tokens in zip(range(0, len(w), self.width), own):  # noqa: B905
            some = slice(start, min(start + self.width, len(w)))
            bias, weight = (None if t is None else t[some].to(self.x.dtype) for t in (b, class_weight))
            yield Tile(some, w[some].to(self.x.dtype), bias, weight, tokens)

    def _tokens_of_tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each tile the tokens whose class it holds, and the columns of these classes."""
        column, order = (self.tensors.target - self.spec.first).sort()
        starts = torch.arange(0, len(self.tensors.w) + self.width, self.width, device=order.device)
        starts[-1] = len(self.tensors.w)
        bounds = torch.searchsorted(column, starts).tolist()
        for i, (first, stop) in enumerate(itertools.pairwise(bounds)):
            yield order[first:stop], column[first:stop] - i * self.width

    def share(self) -> Tensor:
        """The weight in the loss of each token's own class (T, 1), but for what smoothing spreads. 0 where this
        process does not hold the class, or where the target is probabilities."""
        _, w, _, target, class_weight = self.tensors
        if target.is_floating_point():
            return self.x.new_zeros(len(self.x), 1)
        column = (target - self.spec.first)[:, None]
        held = (column >= 0) & (column < len(w))
        share = held.to(self.x.dtype) * (1 - self.spec.smoothing)
        return share if class_weight is None else share * class_weight[torch.where(held, column, 0)]

    def picked(self, own: Tensor) -> Tensor:
        """The logits of the tokens' own classes (T, 1), each with its weight in the loss."""
        share = self.share()
        return torch.where(share == 0, 0.0, share * own)

    def logits(self, tile: Tile, out: Tensor) -> Tensor:
        """The logits in this tile of the last len(out) tokens, written to `out`."""
        torch.mm(self.x[len(self.x) - len(out) :], tile.w.t(), out=out)
        if tile.b is not None:
            out.add_(tile.b)
        if self.spec.softcap:
            out.div_(self.spec.softcap).tanh_().mul_(self.spec.softcap)
        return out if self.spec.temperature == 1 else out.div_(self.spec.temperature)

    def even(self, tile: Tile) -> Tensor:
        """The weight of each class in the loss (classes,), by smoothing."""
        part = self.spec.smoothing / self.spec.classes
        return self.x.new_full((len(tile.w),), part) if tile.class_weight is None else tile.class_weight * part

    def distribution(self, tile: Tile) -> Tensor:
        """The weight of each logit in the loss (T, classes), where the target is probabilities."""
        p = self.tensors.target[:, tile.classes].to(self.x.dtype)
        if self.spec.smoothing:
            p = p * (1 - self.spec.smoothing) + self.spec.smoothing / self.spec.classes
        return p if tile.class_weight is None else p * tile.class_weight

    def spread_logits(self, z: Tensor, tile: Tile) -> tuple[Tensor, Tensor] | None:
        """The sum of the tile's logits weighted by what smoothing or probabilities spread over the classes, and
        the sum of these weights (T, 1); None without either."""
        if tile.own is None:
            q = self.distribution(tile)
            return torch.where(q == 0, 0.0, q * z).sum(1, keepdim=True), q.sum(1, keepdim=True)
        if not self.spec.smoothing:
            return None
        even = self.even(tile)
        return torch.mv(z, even)[:, None], even.sum().expand(len(z), 1)

    def add_picked_gradient(self, dz: Tensor, dpicked: Tensor, tile: Tile, share: Tensor) -> None:
        """Add the gradient of `picked` to dz. dpicked (T, 1)."""
        if tile.own is None:
            dz.addcmul_(self.distribution(tile), dpicked)
            return
        token, column = tile.own
        if len(token):
            dz[token, column] += (dpicked * share)[token, 0]
        if self.spec.smoothing:
            dz.addr_(dpicked[:, 0], self.even(tile))


def _first_pass(tensors: LossTensors, spec: LossSpec, width: int, kept: _Kept | None = None) -> Tensor:
    """The rows, by an online softmax. kept: of all tokens."""
    this = _Pass(tensors, spec, width)
    tokens, lowest = len(this.x), torch.finfo(this.x.dtype).min
    memory = this.x.new_empty(tokens * width if kept is None else 0)
    largest = this.x.new_full((tokens, 1), float("-inf"))
    total, moment, spread, spread_weight = (torch.zeros_like(largest) for _ in range(4))
    own = this.x.new_zeros(tokens)
    for tile in this.tiles():
        out = _part(memory, tokens, len(tile.w)) if kept is None else kept.of(tile.classes)
        z = this.logits(tile, out)
        if tile.own is not None and len(tile.own[0]):
            own[tile.own[0]] = z[tile.own]
        before, largest = largest, torch.maximum(largest, z.amax(1, keepdim=True))
        # A row that has seen only -inf (a bias may be) has maximum -inf. Its pivot is finite: -inf minus -inf is
        # NaN.
        pivot = largest.clamp(min=lowest)
        lowered = before.clamp(min=lowest) - pivot
        rescale = torch.exp(lowered)
        z.sub_(pivot)
        more = this.spread_logits(z, tile)
        if more is not None:
            spread = spread + torch.where(spread_weight == 0, 0.0, spread_weight * lowered) + more[0]
            spread_weight = spread_weight + more[1]
        if spec.entropy:
            # moment: the sum of exp(z - pivot) (z - pivot).
            moment = rescale * (moment + torch.where(total == 0, 0.0, total * lowered))
            moment += torch.where(z == float("-inf"), 0.0, z.exp() * z).sum(1, keepdim=True)
        total = total * rescale + z.exp_().sum(1, keepdim=True)
        if kept is not None:
            kept.pivots.append(pivot)
    rows = [total.log(), this.picked(own[:, None] - largest) + spread, largest]
    if spec.entropy:
        rows.append(torch.where(total == 0, 0.0, total.log() - moment / total))
    return torch.cat(rows, 1).t().contiguous()


def _second_pass(
    drows: Tensor,
    tensors: LossTensors,
    rows: Tensor,
    kept: _Kept,
    dw: Tensor | None,
    wanted: Sequence[bool],
    spec: LossSpec,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and b, and that of w in `dw`, where they are wanted; from the gradients of the rows."""
    this = _Pass(tensors, spec, kept.width)
    memory = this.x.new_empty(len(this.x) * kept.width)
    dx = torch.zeros_like(this.x, memory_format=torch.contiguous_format) if wanted[0] else None
    db = torch.zeros_like(tensors.w[:, 0]) if wanted[2] else None
    drows, rows, share = drows[..., None], rows[..., None], this.share()
    # Of a token whose logits here are all -inf, both are -inf; the probabilities are to be 0, not NaN.
    log_total, pivot = (t.clamp(min=torch.finfo(t.dtype).min) for t in (rows[0], rows[2]))
    for i, tile in enumerate(this.tiles()):
        z = _part(memory, len(this.x), len(tile.w))
        rest = z[kept.tokens :]
        factor, slope = _derivatives(this, this.logits(tile, rest), drows, rows)
        rest.sub_(pivot[kept.tokens :]).sub_(log_total[kept.tokens :]).exp_()
        if kept.tokens:
            rescale = (kept.pivots[i] - pivot[: kept.tokens] - log_total[: kept.tokens]).exp_()
            torch.mul(kept.of(tile.classes), rescale, out=z[: kept.tokens])
        if spec.filter and _left_out(z, tile, spec):
            if dw is not None:
                dw[tile.classes] = 0
            continue
        z.mul_(factor)
        this.add_picked_gradient(z, drows[1], tile, share)
        if slope is not None:
            z.mul_(slope)
        if spec.temperature != 1:
            z.div_(spec.temperature)
        if dx is not None:
            dx.addmm_(z, tile.w)
        if db is not None:
            db[tile.classes] = z.sum(0)
        if dw is not None and dw.dtype == z.dtype:
            torch.mm(z.t(), this.x, out=dw[tile.classes])
        elif dw is not None:
            dw[tile.classes] = z.t() @ this.x
    return None if dx is None else dx.to(tensors.x.dtype), db


def _derivatives(this: _Pass, z: Tensor, drows: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a tile's probabilities are multiplied by, and then its gradients, if logits are capped. Both need the
    logits of all tokens, unless there is neither an entropy nor a cap."""
    spec, factor, slope = this.spec, drows[0], None
    if spec.entropy:
        log_total, _, largest, entropy = rows
        # -inf has probability 0 and may not make it NaN.
        centred = torch.where(z == float("-inf"), 0.0, z - largest - (log_total - entropy))
        factor = factor - drows[3] * centred
    if spec.softcap:
        slope = 1 - (z * (spec.temperature / spec.softcap)).square_()
    return factor, slope


def _left_out(p: Tensor, tile: Tile, spec: LossSpec) -> bool:
    """Whether the filter leaves this tile out of the gradients: all tokens given, and some classes. In a tile that
    stays for the sake of a token's own class, the probabilities become 0."""
    if p.numel() and p.amax() >= spec.filter:
        return False
    p.zero_()
    return not spec.smoothing and tile.own is not None and not len(tile.own[0])


def _part(memory: Tensor, tokens: int, classes: int) -> Tensor:
    return memory[: tokens * classes].view(tokens, classes)


def _weight_gradient(tensors: LossTensors, wanted: Sequence[bool]) -> Tensor | None:
    """Memory for the gradient of w, if it is wanted."""
    return torch.empty_like(tensors.w, memory_format=torch.contiguous_format) if wanted[1] else None
