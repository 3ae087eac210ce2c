"""Split loops: over how many programs, where each leaves its partial result, and how these become one.

Where a launch has fewer programs than the GPU has multiprocessors, as with few queries and many keys, each loop is
split over several programs (split-KV). Where a mask of lists has rows much longer than the others (a global
token's), its items split those. Partial results are float32. They are merged by their log-sum-exps (forward) or
added up (backward), in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import launch
from ..tile import tile_of
from ..tiles import (
    LN_2,
    LOG2_E,
    Tensor3,
    Tensor4,
    head_of,
    load_row_values,
    load_tile,
    store_tile,
    tensor3,
    tensor4,
)
from .loops import GRANULE, Lists

ROWS = 16  # that one program merges


class Splits(NamedTuple):
    """How a launch splits its loops: programs for each head, splits of every loop (None: as the items say), and
    slots for partial results. `merges` (of a BlockLists) says which slots each row has; None: each row has all.

    The partial result in `slot` of batch entry b is entry slot x batches + b of a tensor of them."""

    programs: int
    count: int | None
    slots: int
    merges: torch.Tensor | None


def splits_of(
    listed: Lists,
    merges: torch.Tensor | None,
    length: int,
    block: int,
    heads: int,
    steps: int,
    processors: int,
) -> Splits:
    """For tiles of `block` of `length` rows, over `heads` heads, each looping over up to `steps` tiles."""
    if merges is not None:
        rows = listed.length - 1
        slots = listed.item_count - rows + len(merges)
        return Splits(listed.item_count * (GRANULE.value // block), None, slots, merges)
    tiles = triton.cdiv(length, block)
    count = launch.splits(tiles * heads, steps, processors)
    return Splits(tiles * count, None, 0, None) if count == 1 else Splits(tiles * count, count, count, None)


def partials_of(splits: Splits, result: torch.Tensor) -> torch.Tensor | None:
    """An empty tensor for the partial results of `result` (batch, heads, rows[, width]); None if nothing is split.

    A mask of lists always has one, even if it has no slots, so that all masks run the same kernel."""
    if splits.count is None and splits.merges is None:
        return None
    batch, heads, rows, *width = result.shape
    rows = rows if splits.merges is None else GRANULE.value
    return torch.empty((splits.slots * batch, heads, rows, *width), dtype=torch.float32, device=result.device)


def argument(partials: torch.Tensor | None) -> Tensor4 | Tensor3 | None:
    """Partial results as a kernel argument."""
    return None if partials is None else tensor4(partials) if partials.dim() == 4 else tensor3(partials)


@triton.jit
def store_result(
    out, partials, values, position, length, problem, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """Store a tile of a result, or of this split's partial result."""
    start, batch, head, split = position
    if partials is None:
        store_tile(head_of(out, batch, head), out, start, length, DIM, values, BLOCK, WIDTH)
    else:
        pointer = head_of(partials, problem.shape.batches * split[2] + batch, head)
        if problem.lists.full is None:
            store_tile(pointer, partials, start, length, DIM, values, BLOCK, WIDTH)
        elif split[2] < 0:
            store_tile(head_of(out, batch, head), out, start, length, DIM, values, BLOCK, WIDTH)
        else:
            store_tile(pointer, partials, start % GRANULE, GRANULE, DIM, values, BLOCK, WIDTH)


@triton.jit
def store_row_values(out, partials, values, position, length, problem, BLOCK: tl.constexpr):
    """Store a value a row, or this split's part of it."""
    start, batch, head, split = position
    rows = start + tl.arange(0, BLOCK)
    pointers = head_of(out, batch, head) + rows.to(tl.int64) * out.row
    if partials is None:
        tl.store(pointers, values, mask=rows < length)
    else:
        if problem.lists.full is not None:
            tl.store(pointers, values, mask=(rows < length) & (split[2] < 0))
        store_partial_values(partials, values, position, length, problem, BLOCK)


@triton.jit
def store_partial_values(partials, values, position, length, problem, BLOCK: tl.constexpr):
    """Store this split's part of a value a row, if it is one of several splits."""
    start, batch, head, split = position
    rows = start + tl.arange(0, BLOCK)
    pointer = head_of(partials, problem.shape.batches * split[2] + batch, head)
    if problem.lists.full is None:
        tl.store(pointer + rows, values, mask=rows < length)
    elif split[2] >= 0:
        tl.store(pointer + rows % GRANULE, values)


@triton.jit
def load_part_lse(value_partials, remainders, entry, head, rows, row_count):
    """The log-sum-exps of a partial result, and what they lost by rounding."""
    part_lse = load_row_values(
        head_of(value_partials, entry, head), value_partials, rows, row_count, float("-inf")
    )
    if remainders is None:
        return part_lse, tl.zeros_like(part_lse)
    else:
        return part_lse, load_row_values(head_of(remainders, entry, head), remainders, rows, row_count, 0.0)


@triton.jit
def merge_kernel(
    partials, value_partials, remainders, out, values, merges, slots, length, heads, batches, tile: tl.constexpr
):  # fmt: skip
    """One program merges BLOCK_M rows of one head: by the log-sum-exps of the partial results, if there are any,
    else it adds them up. `remainders` are what the log-sum-exps lost by rounding; None is nothing."""
    tiles = tl.num_programs(0) // (batches * heads)
    tile_number, flat_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head = flat_head // heads, flat_head % heads
    start = tile_number * tile.BLOCK_M
    slot, row, rows = 0, start, length
    if merges is not None:
        pieces: tl.constexpr = GRANULE // tile.BLOCK_M
        merge = merges + tile_number // pieces * 3
        row, rows = tile_number % pieces * tile.BLOCK_M, GRANULE
        start = tl.load(merge) * GRANULE + row
        slot, slots = tl.load(merge + 1), tl.load(merge + 2)
    offsets = tl.arange(0, tile.BLOCK_M)
    row_max = tl.full([tile.BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([tile.BLOCK_M], tl.float32)
    if values is not None:
        for number in tl.range(0, slots):
            entry = batches * (slot + number) + batch
            part_lse, remainder = load_part_lse(value_partials, remainders, entry, head, row + offsets, rows)
            new_max = tl.maximum(row_max, part_lse)
            # A row that saw nothing so far pivots on 0: -inf minus -inf never happens.
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
            row_sum = row_sum * tl.exp2((row_max - pivot) * LOG2_E) + tl.exp2(
                ((part_lse - pivot) + remainder) * LOG2_E
            )
            row_max = new_max
        empty = row_sum == 0.0
        row_sum = tl.where(empty, 1.0, row_sum)
        lse = tl.where(empty, float("-inf"), row_max + tl.log2(row_sum) * LN_2)
        exists = start + offsets < length
        tl.store(head_of(values, batch, head) + (start + offsets).to(tl.int64) * values.row, lse, mask=exists)
        row_max = tl.where(empty, 0.0, row_max)
    accumulator = tl.zeros([tile.BLOCK_M, tile.WIDTH], tl.float32)
    for number in tl.range(0, slots):
        entry = batches * (slot + number) + batch
        part_tile = load_tile(
            head_of(partials, entry, head), partials, row, rows, tile.DIM, tile.BLOCK_M, tile.WIDTH, True
        )
        if values is not None:
            part_lse, remainder = load_part_lse(value_partials, remainders, entry, head, row + offsets, rows)
            # Not by the log-sum-exp: it may have lost the logarithm of the row_sum by rounding.
            part_tile *= (tl.exp2(((part_lse - row_max) + remainder) * LOG2_E) / row_sum)[:, None]
        accumulator += part_tile
    store_tile(head_of(out, batch, head), out, start, length, tile.DIM, accumulator, tile.BLOCK_M, tile.WIDTH)


def merge(
    splits: Splits,
    partials: torch.Tensor | None,
    out: torch.Tensor,
    value_partials: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    remainders: torch.Tensor | None = None,
) -> None:
    """Merge partial results, where there are any, into `out` (batch, heads, rows, width). `values` (batch, heads,
    rows) are log-sum-exps with partial results of their own, which weigh those of `out`; `remainders` are what
    these lost by rounding."""
    if splits.slots == 0:
        return
    batch, heads, rows, width = out.shape
    tile_width = launch.tile_width(width)
    shared_rows = rows if splits.merges is None else len(splits.merges) * GRANULE.value
    launch.start(
        merge_kernel,
        (triton.cdiv(shared_rows, ROWS) * batch * heads,),
        argument(partials),
        argument(value_partials),
        argument(remainders),
        tensor4(out),
        None if values is None else tensor3(values),
        splits.merges,
        splits.slots,
        rows,
        heads,
        batch,
        tile=tile_of(BLOCK_M=ROWS, DIM=width, WIDTH=tile_width),
        num_warps=2 if tile_width == 64 else 4,  # sums of 64 columns spill 2 registers with 4 on sm_100
        **launch.COMPILER_OPTIONS,
    )
