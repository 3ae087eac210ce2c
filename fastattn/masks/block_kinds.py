"""Masks made of square blocks of tokens: any grid of blocks, and BigBird."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.ground.modes import kept
from fastattn.masks import random_blocks
from fastattn.masks.algebra import Mask, Values
from fastattn.masks.kinds import check_grid, four_dimensional, pick, state, varies_by_shape
from fastattn.masks.lists import GRANULE, Shape
from fastattn.masks.lowering import EMPTY, PARTIAL, Positions, Slab, words_of_intervals

Index = int | Tensor
MOST_LISTED = 2**23  # granules; a longer list than these 64 MiB is not made


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

    def anywhere(self, shape: Shape, unit: int) -> Tensor:
        """Whether any key is seen in each square of unit x unit tokens, or may be: bool (1 or B, 1 or H, R, C)."""
        raise NotImplementedError

    def visited(self, slab: Slab) -> Tensor:
        states, cells = torch.broadcast_tensors(self.states(slab), slab.cells)
        return cells[states != EMPTY]  # of a granule that is not EMPTY, a block is seen

    def states(self, slab: Slab) -> Tensor:
        if slab.unit > max(GRANULE, self.block):
            seen = _anywhere(self, slab.shape, slab.unit)
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
def _anywhere(mask: _Cells, shape: Shape, unit: int) -> Tensor:
    return mask.anywhere(shape, unit)


def _blocks_of(length: int, unit: int, block: int) -> tuple[Tensor, Tensor]:
    """The first and the last block of `block` tokens in each `unit` of tokens."""
    begin = torch.arange(0, length, unit)
    return begin // block, ((begin + unit).clamp(max=length) - 1) // block


def _squares_of(blocks: Tensor, length: int, unit: int, block: int) -> Tensor:
    """The squares of `unit` tokens, along one side, into which each of these blocks reaches: (blocks, at most so
    many); the last is repeated where there are fewer."""
    last = (((blocks + 1) * block).clamp(max=length) - 1) // unit
    return torch.minimum(blocks[:, None] * block // unit + torch.arange((block - 1) // unit + 2), last[:, None])


class _SparseCells(_Cells):
    """BigBird: a window of blocks, global blocks and random blocks."""

    def sides(self, shape: Shape) -> tuple[int, int, int]:
        """How many blocks beside its own a block sees; the blocks before the second number and from the third one
        on see all, and are seen by all."""
        raise NotImplementedError

    def drawn(self, shape: Shape) -> Tensor:
        """The random blocks of each row of blocks, (1 or H, blocks, random); -1 for none."""
        raise NotImplementedError

    def anywhere(self, shape: Shape, unit: int) -> Tensor:
        count = -(-shape.keys // unit)
        seen = torch.zeros(self.drawn(shape).shape[0], count * count, dtype=torch.bool)
        for head in range(len(seen)):
            seen[head, self._squares(shape, head, unit)] = True
        return seen.view(1, -1, count, count)

    def listed(self, shape: Shape, head: int) -> Tensor | None:
        window, first, last = self.sides(shape)
        blocks = -(-shape.keys // self.block)
        # A block reaches into so many granules of a row; global ones are rows and columns of granules.
        each, global_squares = (self.block - 1) // GRANULE + 2, first + max(0, blocks - last) + 2
        drawn = self.drawn(shape).shape[2] * blocks * each**2
        if drawn + shape.rows * (each * (2 * window + 3) + 2 * global_squares * each) > MOST_LISTED:
            return None
        return self._squares(shape, head, GRANULE).to(shape.device)

    def _squares(self, shape: Shape, head: int, unit: int) -> Tensor:
        """The squares of unit x unit tokens in which a head sees any key: row * count + column, ascending."""
        length, block, (window, first, last) = shape.keys, self.block, self.sides(shape)
        low, high = _blocks_of(length, unit, block)
        count, number = len(low), torch.arange(len(low))
        sees_all = (low < first) | (high >= last)
        begin = torch.where(sees_all, 0, (low - window).clamp(min=0) * block // unit)
        end = torch.where(sees_all, count, (((high + window + 1) * block).clamp(max=length) - 1) // unit + 1)
        row = torch.repeat_interleave(end - begin)
        column = torch.arange(len(row)) - ((end - begin).cumsum(0) - end)[row]
        of_globals = number[:, None] * count + sees_all.nonzero()[:, 0]
        drawn = self.drawn(shape)
        drawn = drawn[pick(drawn.shape[0], head)]
        block_row, which = (drawn >= 0).nonzero().unbind(1)
        down, across = (_squares_of(t, length, unit, block) for t in (block_row, drawn[block_row, which]))
        of_random = down[:, :, None] * count + across[:, None]
        return torch.cat((row * count + column, of_globals.flatten(), of_random.flatten())).unique()


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

    def anywhere(self, shape: Shape, unit: int) -> Tensor:
        seen = four_dimensional(self.grid.tensor) > 0
        for dim, length in ((2, shape.queries), (3, shape.keys)):
            first, last = _blocks_of(length, unit, self.block)
            each = torch.minimum(first[:, None] + torch.arange(int((last - first).max()) + 1), last[:, None])
            found = seen.index_select(dim, each.flatten().to(seen.device))
            seen = found.unflatten(dim, each.shape).any(dim + 1)
        return seen

    def varies(self, shape: Shape) -> tuple[bool, bool]:
        return varies_by_shape(self.grid)

    def check(self, shape: Shape) -> None:
        expected = (shape.batch, shape.heads, -(-shape.queries // self.block), -(-shape.keys // self.block))
        check_grid("blocks", self.grid, expected)

    def __repr__(self) -> str:
        return f"blocks({self.grid}, {self.block})"


@dataclass(frozen=True, repr=False)
class BigBird(_SparseCells):
    """The union of a window, global and random blocks (Zaheer et al. 2020, section 2)."""

    block: int
    random: int
    global_blocks: int
    window_blocks: int
    seed: int
    per_head: bool

    def cells(self, shape: Shape, batch: Index, head: Index, row: Tensor, column: Tensor) -> Tensor:
        window, first, last = self.sides(shape)
        drawn = self.drawn(shape).to(row.device)
        drawn = drawn[pick(drawn.shape[0], head), row]
        seen = ((row - column).abs() <= window) | (drawn == column[..., None]).any(-1)
        for block in (row, column):
            seen = seen | (block < first) | (block >= last)
        return seen

    def sides(self, shape: Shape) -> tuple[int, int, int]:
        last = -(-shape.keys // self.block) - self.global_blocks
        return self.window_blocks // 2, self.global_blocks, last

    def drawn(self, shape: Shape) -> Tensor:
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
class HuggingFaceBigBird(_SparseCells):
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
        if self._sees_all(shape):
            return torch.ones_like(row + column)
        count = shape.keys // self.block
        drawn = self.drawn(shape).to(row.device)
        drawn = drawn[pick(drawn.shape[0], head), row]
        edge = (row == 0) | (row == count - 1)
        seen = edge | (column == 0) | (column == count - 1) | ((row - column).abs() <= 1)
        return seen + torch.where(edge, 0, (drawn == column[..., None]).sum(-1))

    def sides(self, shape: Shape) -> tuple[int, int, int]:
        count = shape.keys // self.block
        return 1, count if self._sees_all(shape) else 1, count - 1

    def _sees_all(self, shape: Shape) -> bool:
        """`transformers` uses full attention for so few blocks."""
        return shape.keys // self.block <= 5 + 2 * self.random

    def drawn(self, shape: Shape) -> Tensor:
        if self._sees_all(shape):
            return torch.zeros(1, shape.keys // self.block, 0, dtype=torch.int64)
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
