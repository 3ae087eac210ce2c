"""The random blocks of BigBird: which ones a row of blocks draws.

Tables are int64 (H or 1, rows, random); -1 stands for no block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ground.modes import kept

OLD_PLAN_LENGTHS = (1024, 3072, 4096)  # tokens
OLD_PLAN_REACH = 1024  # tokens


@kept(16)
def paper_blocks(count: int, heads: int, random: int, edge: int, reach: int, seed: int) -> Tensor:
    """For each of `count` rows, `random` different blocks, neither among the first and last `edge` ones nor within
    `reach` of the row; all of them where fewer are left."""
    row = torch.arange(count, device="cpu")
    # The blocks that may be drawn form two intervals, one before and one after the window.
    before = (row - reach - edge).clamp(0, max(0, count - 2 * edge))
    resume = (row + reach + 1).clamp(min=edge)
    allowed = before + (count - edge - resume).clamp(min=0)
    generator = torch.Generator("cpu").manual_seed(seed)
    chance = torch.rand(heads, count, random, generator=generator, dtype=torch.float64, device="cpu")
    drawn = torch.full((heads, count, random), -1, device="cpu")
    # Floyd's sampling without repetition: a number that was drawn before is replaced by this turn's greatest.
    for turn in range(random):
        greatest = allowed - random + turn
        number = (chance[..., turn] * (greatest + 1)).long()
        number = torch.where((drawn == number[..., None]).any(-1), greatest, number)
        drawn[..., turn] = torch.where(greatest < 0, -1, number)
    column = torch.where(drawn < before[:, None], drawn + edge, drawn - before[:, None] + resume[:, None])
    return torch.where(drawn < 0, -1, column)


@kept(64)
def huggingface_blocks(
    count: int, block: int, heads: int, random: int, seed: int | None, max_positions: int
) -> Tensor:
    """As `transformers`' BigBird draws them, head by head; the first and the last row draw none.

    seed: NumPy's, the layer's index; None for eval mode, in which every draw is block 0, for all heads.
    """
    if seed is None:
        return torch.zeros(1, count, random, dtype=torch.int64, device="cpu")
    import numpy  # only these draws need it

    generator = numpy.random.RandomState(seed)
    table = torch.full((heads, count, random), -1, device="cpu")
    if count * block in OLD_PLAN_LENGTHS:
        _fill_by_old_plan(table, generator, max_positions // block, block)
    else:
        _fill_by_plan(table, generator)
    return table


def _fill_by_plan(table: Tensor, generator) -> None:
    """Every row draws among the first 2 random + 5 blocks, without those it sees there anyway."""
    heads, count, random = table.shape
    end = 2 * random + 5
    for row in range(1, count):  # the last row's draws are not used, and come last
        excluded = {row - 1, row, row + 1, 0, end - 1}
        excluded |= {end - 2} if row == 1 else {1} if row == end - 2 else set()
        for head in range(heads):
            order = generator.permutation(end).tolist()
            if row < count - 1:
                table[head, row] = torch.tensor([c for c in order if c not in excluded][:random], device="cpu")


def _fill_by_old_plan(table: Tensor, generator, planned: int, block: int) -> None:
    """Rows draw as if the sequence had `planned` blocks, among the first 1024 tokens; what they draw may be in
    their window or the last block, which then count twice."""
    heads, count, random = table.shape
    last = OLD_PLAN_REACH // block - 1 if 2 * block < OLD_PLAN_REACH else planned - 1
    middle = list(range(1, planned - 1))
    for head in range(heads):
        for row in range(1, planned - 1):
            choice = _old_choice(row, planned, last, middle)
            drawn = generator.permutation(choice)[:random]
            if len(drawn) < random:  # `transformers` fails there too
                tokens = count * block
                raise ValueError(f"random must be at most {len(drawn)} at {tokens} tokens, got {random}")
            if row < count - 1:
                table[head, row] = torch.from_numpy(drawn)


def _old_choice(row: int, planned: int, last: int, middle: list[int]) -> list[int]:
    if row <= 2:
        return middle[row + 1 : last]
    if row >= planned - 3:
        return middle[:last]
    if row - 2 > last:
        return middle[:last]
    if row + 1 == last:
        return middle[: row - 2]
    return middle[: row - 2] + middle[row + 1 : last]
