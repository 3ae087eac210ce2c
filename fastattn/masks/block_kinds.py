"""Masks made of square blocks of tokens: any grid of blocks, and BigBird."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.ground.modes import kept
from fastattn.masks import random_blocks
from fastattn.masks.algebra import Mask, Values
from fastattn.masks.kinds import check_grid, four_dimensional, pick, state, varies_by_shape
from fastattn.masks.lists import GRANULE, Shape
from fastattn.masks.lowering import PARTIAL, Positions, Slab, words_of_intervals

Index = int | Tensor


class _Cells(Mask):
    """Masks made of square blocks of tokens: `cells` says how often the keys of a block count, 0 for not seen."""

    block: int

    def cells(self, shape: Shape, batch: Index, head: Index, row: Tensor, column: Tensor) -> Tensor:
        raise NotImplementedError

    def sees(self, at: Positions) -> Tensor:
        return self.cells(at.shape, at.batch, at.head, at.query // self.block, at.key // self.block) > 0

    def counts(self, at: Positions) -> Tensor:
        if not self.repeats:
            return super().counts(at)
        return self.cells(at.shape, at.batch, at.head, at.query // self.block, at.key // self.block)

    def anywhere(self, shape: Shape, size: int) -> Tensor:
        """Whether any key is seen in each square of size x size blocks, or may be: bool (1 or B, 1 or H, R, C)."""
        raise NotImplementedError

    def states(self, slab: Slab) -> Tensor:
        if slab.unit > max(GRANULE, self.block):
            if slab.unit % self.block:
                return super().states(slab)
            seen = _anywhere(self, slab.shape, slab.unit // self.block)
            seen = seen[pick(seen.shape[0], slab.batch), pick(seen.shape[1], slab.head)]
            return seen.to(slab.shape.device)[slab.rows, slab.columns].to(torch.int8)  # PARTIAL, or EMPTY
        there, cells = self._within(slab)
        hits, area = (there & (cells > 0)).sum((-2, -1)), there.sum((-2, -1))
        states = state(some=hits > 0, all=hits == area)
        if self.repeats:
            # The blocks of a granule may count differently. It is FULL only if it has one block, or all count
            # once.
            same = (area == 1) | ((there * cells).sum((-2, -1)) == area)
            states = torch.where(same, states, states.clamp(max=PARTIAL))
        return states

    def words(self, slab: Slab) -> Tensor:
        (there, cells), block = self._within(slab), self.block
        left, top = slab.columns * GRANULE // block, slab.rows * GRANULE // block
        begin = (left[:, None] + torch.arange(there.shape[2], device=left.device)) * block
        begin = begin - slab.columns[:, None] * GRANULE
        # The blocks of a row have no bits in common.
        of_rows = torch.where(there & (cells > 0), words_of_intervals(begin, begin + block)[:, None], 0).sum(2)
        query = slab.rows[:, None] * GRANULE + torch.arange(GRANULE, device=left.device)
        return of_rows.gather(1, (query // block - top[:, None]).clamp(max=there.shape[1] - 1))

    def _within(self, slab: Slab) -> tuple[Tensor, Tensor]:
        """The blocks in each part of a slab, down and across: whether there is one, and its cell."""
        sides = []
        for first, last in (slab.queries, slab.keys):
            first, last = first // self.block, last // self.block
            most = int((last - first).max()) + 1 if first.numel() else 1
            blocks = first[..., None] + torch.arange(most, device=first.device)
            sides.append((blocks <= last[..., None], torch.minimum(blocks, last[..., None])))
        (down, rows), (across, columns) = sides
        cells = self.cells(slab.shape, slab.batch, slab.head, rows[..., None], columns[..., None, :])
        return torch.broadcast_tensors(down[..., None] & across[..., None, :], cells)  # type: ignore[return-value]


@kept(8)
def _anywhere(mask: _Cells, shape: Shape, size: int) -> Tensor:
    return mask.anywhere(shape, size)


def _listed(drawn: Tensor, size: int, window: int, first: int, last: int) -> Tensor:
    """Where BigBird sees anything, in squares of size x size blocks: bool (1, 1 or H, R, R).

    drawn: its random blocks, (1 or H, blocks, random). window: how many blocks beside its own a block sees. first,
    last: the blocks before `first` and from `last` on see all, and are seen by all.
    """
    count = -(-drawn.shape[1] // size)
    number = torch.arange(count, device=drawn.device)
    # Two squares are as near as the end of one and the begin of the other.
    seen = (number[:, None] - number).abs() * size - (size - 1) <= window
    for side in (number[:, None], number):
        seen = seen | (side * size < first) | ((side + 1) * size > last)
    seen = seen.expand(drawn.shape[0], count, count).clone()
    head, row, which = (drawn >= 0).nonzero().unbind(1)
    seen[head, row // size, drawn[head, row, which] // size] = True
    return seen[None]


@dataclass(frozen=True, repr=False)
class Blocks(_Cells):
    """Blocks of `block` tokens by a grid (R, C), (H, R, C) or (B, H, R, C), B and H possibly 1."""

    grid: Values
    block: int
    repeated: bool

    @property
    def repeats(self) -> bool:
        return self.repeated

    def cells(self, shape: Shape, batch: Index, head: Index, row: Tensor, column: Tensor) -> Tensor:
        grid = four_dimensional(self.grid.tensor)
        where = (pick(grid.shape[0], batch), pick(grid.shape[1], head), row, column)
        home = grid.device
        return grid[tuple(t.to(home) if isinstance(t, Tensor) else t for t in where)].to(row.device)

    def anywhere(self, shape: Shape, size: int) -> Tensor:
        seen = four_dimensional(self.grid.tensor) > 0
        seen = F.pad(seen, (0, -seen.shape[3] % size, 0, -seen.shape[2] % size))
        return seen.unflatten(3, (-1, size)).any(4).unflatten(2, (-1, size)).any(3)

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return varies_by_shape(self.grid)

    def check(self, shape: Shape) -> None:
        expected = (shape.batch, shape.heads, -(-shape.queries // self.block), -(-shape.keys // self.block))
        check_grid("blocks", self.grid, expected)

    def __repr__(self) -> str:
        return f"blocks({self.grid}, {self.block})"


@dataclass(frozen=True, repr=False)
class BigBird(_Cells):
    """The union of a window, global and random blocks (Zaheer et al. 2020, section 2)."""

    block: int
    random: int
    global_blocks: int
    window_blocks: int
    seed: int
    per_head: bool

    def cells(self, shape: Shape, batch: Index, head: Index, row: Tensor, column: Tensor) -> Tensor:
        last = -(-shape.keys // self.block) - self.global_blocks
        drawn = self._drawn(shape).to(row.device)
        drawn = drawn[pick(drawn.shape[0], head), row]
        seen = ((row - column).abs() <= self.window_blocks // 2) | (drawn == column[..., None]).any(-1)
        for block in (row, column):
            seen = seen | (block < self.global_blocks) | (block >= last)
        return seen

    def anywhere(self, shape: Shape, size: int) -> Tensor:
        drawn, last = self._drawn(shape), -(-shape.keys // self.block) - self.global_blocks
        return _listed(drawn, size, self.window_blocks // 2, self.global_blocks, last)

    def _drawn(self, shape: Shape) -> Tensor:
        """The random blocks of each row of blocks, (1 or H, blocks, random)."""
        return random_blocks.paper_blocks(
            -(-shape.keys // self.block),
            shape.heads if self.per_head else 1,
            self.random,
            self.global_blocks,
            self.window_blocks // 2,
            self.seed,
        )

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return False, self.per_head and shape.heads > 1

    def check(self, shape: Shape) -> None:
        if shape.queries != shape.keys:
            raise ValueError(
                f"bigbird must have as many keys as queries, got {shape.queries} queries and {shape.keys} keys"
            )

    def __repr__(self) -> str:
        usual = {"global_blocks": 1, "window_blocks": 3, "seed": 0, "per_head": False}
        options = (f", {name}={getattr(self, name)}" for name in usual if getattr(self, name) != usual[name])
        return f"bigbird({self.block}, {self.random}{''.join(options)})"


@dataclass(frozen=True, repr=False)
class HuggingFaceBigBird(_Cells):
    """What `transformers`' block-sparse BigBird attention computes, multiplicities included."""

    block: int
    random: int
    seed: int
    training: bool
    max_positions: int

    @property
    def repeats(self) -> bool:
        return True

    def cells(self, shape: Shape, batch: Index, head: Index, row: Tensor, column: Tensor) -> Tensor:
        count = shape.keys // self.block
        if count <= 5 + 2 * self.random:  # `transformers` uses full attention for so few blocks
            return torch.ones_like(row + column)
        drawn = self._drawn(shape).to(row.device)
        drawn = drawn[pick(drawn.shape[0], head), row]
        edge = (row == 0) | (row == count - 1)
        seen = edge | (column == 0) | (column == count - 1) | ((row - column).abs() <= 1)
        return seen + torch.where(edge, 0, (drawn == column[..., None]).sum(-1))

    def anywhere(self, shape: Shape, size: int) -> Tensor:
        count = shape.keys // self.block
        if count <= 5 + 2 * self.random:
            return torch.ones(1, 1, -(-count // size), -(-count // size), dtype=torch.bool)
        return _listed(self._drawn(shape), size, 1, 1, count - 1)

    def _drawn(self, shape: Shape) -> Tensor:
        """The random blocks of each row of blocks, (1 or H, blocks, random)."""
        return random_blocks.huggingface_blocks(
            shape.keys // self.block, self.block, shape.heads, self.random, self.seed if self.training else None,
            self.max_positions,
        )  # fmt: skip

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return False, self.training and shape.heads > 1

    def check(self, shape: Shape) -> None:
        if shape.queries != shape.keys or shape.keys % self.block:
            raise ValueError(
                "bigbird in the style of huggingface must have as many keys as queries, a multiple of "
                f"{self.block}; got {shape.queries} queries and {shape.keys} keys"
            )

    def __repr__(self) -> str:
        training = f", seed={self.seed}, training=True" if self.training else ""
        return f"bigbird({self.block}, {self.random}, style='huggingface'{training})"
