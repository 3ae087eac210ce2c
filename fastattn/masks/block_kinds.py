"""Masks made of square blocks of tokens: any grid of blocks, and BigBird."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.masks import random_blocks
from fastattn.masks.algebra import Mask, Values
from fastattn.masks.kinds import check_grid, four_dimensional, pick, state, varies_by_shape
from fastattn.masks.lists import Shape
from fastattn.masks.lowering import PARTIAL, Positions, Slab

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

    def states(self, slab: Slab) -> Tensor:
        top, bottom = (t // self.block for t in slab.queries)
        left, right = (t // self.block for t in slab.keys)
        rows = torch.arange(int(top[0]), int(bottom[-1]) + 1, device=top.device)[:, None]
        columns = torch.arange(int(right[0, -1]) + 1, device=top.device)[None]
        cells = self.cells(slab.shape, slab.batch, slab.head, rows, columns).expand(len(rows), columns.shape[1])
        box = (top[:, 0] - top[0, 0], bottom[:, 0] - top[0, 0] + 1, left[0], right[0] + 1)
        hits, area = _box_sums(cells > 0, *box), (bottom - top + 1) * (right - left + 1)
        states = state(some=hits > 0, all=hits == area)
        if self.repeats:
            # The blocks of a granule may count differently. It is FULL only if it has one block, or all count
            # once.
            same = (area == 1) | (_box_sums(cells, *box) == area)
            states = torch.where(same, states, states.clamp(max=PARTIAL))
        return states


def _box_sums(cells: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Sums of cells over boxes (r, c): rows top[r] to before bottom[r], columns left[c] to before right[c]."""
    along = F.pad(cells.cumsum(1, dtype=torch.int32), (1, 0))
    down = F.pad((along[:, right] - along[:, left]).cumsum(0, dtype=torch.int32), (0, 0, 1, 0))
    return down[bottom] - down[top]


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
        count, last = -(-shape.keys // self.block), -(-shape.keys // self.block) - self.global_blocks
        drawn = random_blocks.paper_blocks(
            count,
            shape.heads if self.per_head else 1,
            self.random,
            self.global_blocks,
            self.window_blocks // 2,
            self.seed,
        ).to(row.device)
        drawn = drawn[pick(drawn.shape[0], head), row]
        seen = ((row - column).abs() <= self.window_blocks // 2) | (drawn == column[..., None]).any(-1)
        for block in (row, column):
            seen = seen | (block < self.global_blocks) | (block >= last)
        return seen

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
        drawn = random_blocks.huggingface_blocks(
            count, self.block, shape.heads, self.random, self.seed if self.training else None, self.max_positions
        ).to(row.device)
        drawn = drawn[pick(drawn.shape[0], head), row]
        edge = (row == 0) | (row == count - 1)
        seen = edge | (column == 0) | (column == count - 1) | ((row - column).abs() <= 1)
        return seen + torch.where(edge, 0, (drawn == column[..., None]).sum(-1))

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
