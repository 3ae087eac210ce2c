"""Walks that several programs share: into how many shares, where each leaves its part, and how parts become one.

Where a launch has fewer programs than the GPU has multiprocessors, as with few queries and many keys, each walk is
split. Where a mask of lists has rows much longer than the others (a global token's), its items split those. Parts
are float32; they are merged by their log-sum-exps (forward) or added up (backward), in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .tiles import (
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
from .walk import GRANULE, Lists

ROWS = 16  # of a program that merges


class Sharing(NamedTuple):
    """How a launch shares its walks: programs for each head, shares of every walk (None: as the items say), slots
    for parts, and where the parts of an item's row are (merges of a BlockLists; None: each row has all slots).

    Part `slot` of batch entry b is entry slot x batches + b of a tensor of parts."""

    programs: int
    splits: int | None
    slots: int
    merges: torch.Tensor | None


def sharing_of(
    listed: Lists,
    merges: torch.Tensor | None,
    length: int,
    block: int,
    heads: int,
    steps: int,
    processors: int,
) -> Sharing:
    """For tiles of `block` of `length` rows, over `heads` heads, each walking up to `steps` tiles."""
    if merges is not None:
        rows = listed.length - 1
        slots = listed.item_count - rows + len(merges)
        return Sharing(listed.item_count * (GRANULE.value // block), None, slots, merges)
    tiles = triton.cdiv(length, block)
    splits = launch.splits(tiles * heads, steps, processors)
    return Sharing(tiles * splits, None, 0, None) if splits == 1 else Sharing(tiles * splits, splits, splits, None)


def parts_of(sharing: Sharing, result: torch.Tensor) -> torch.Tensor | None:
    """Room for the parts of `result` (batch, heads, rows[, width]); None if nothing is shared.

    A mask of lists always has it, if only for none, so that all masks run the same kernel."""
    if sharing.splits is None and sharing.merges is None:
        return None
    batch, heads, rows, *width = result.shape
    rows = rows if sharing.merges is None else GRANULE.value
    return torch.empty((sharing.slots * batch, heads, rows, *width), dtype=torch.float32, device=result.device)


def argument(parts: torch.Tensor | None) -> Tensor4 | Tensor3 | None:
    """Parts as a kernel argument."""
    return None if parts is None else tensor4(parts) if parts.dim() == 4 else tensor3(parts)


@triton.jit
def leave_tile(
    out, parts, tile, batch, head, start, length, work, shape, lists,
    DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store a result, or its part where others share the walk."""
    if parts is None:
        store_tile(head_of(out, batch, head), out, start, length, DIM, tile, BLOCK, WIDTH)
    else:
        pointer = head_of(parts, shape.batches * work[2] + batch, head)
        if lists.full is None:
            store_tile(pointer, parts, start, length, DIM, tile, BLOCK, WIDTH)
        elif work[2] < 0:
            store_tile(head_of(out, batch, head), out, start, length, DIM, tile, BLOCK, WIDTH)
        else:
            store_tile(pointer, parts, start % GRANULE, GRANULE, DIM, tile, BLOCK, WIDTH)


@triton.jit
def leave_values(out, parts, values, batch, head, start, length, work, shape, lists, BLOCK: tl.constexpr):
    """Store a value a row, or its part."""
    rows = start + tl.arange(0, BLOCK)
    pointers = head_of(out, batch, head) + rows.to(tl.int64) * out.row
    if parts is None:
        tl.store(pointers, values, mask=rows < length)
    else:
        pointer = head_of(parts, shape.batches * work[2] + batch, head)
        if lists.full is None:
            tl.store(pointer + rows, values, mask=rows < length)
        elif work[2] < 0:
            tl.store(pointers, values, mask=rows < length)
        else:
            tl.store(pointer + rows % GRANULE, values)


@triton.jit
def merge_kernel(
    parts, value_parts, out, values, merges, slots, length, heads, batches,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program merges BLOCK rows of one head: by the parts' log-sum-exps, if there are any, else adds them."""
    tiles = tl.num_programs(0) // (batches * heads)
    place, flat_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head = flat_head // heads, flat_head % heads
    start = place * BLOCK
    slot, row, rows = 0, start, length
    if merges is not None:
        pieces: tl.constexpr = GRANULE // BLOCK
        merge = merges + place // pieces * 3
        row, rows = place % pieces * BLOCK, GRANULE
        start = tl.load(merge) * GRANULE + row
        slot, slots = tl.load(merge + 1), tl.load(merge + 2)
    offsets = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if values is not None:
        for number in tl.range(0, slots):
            place = batches * (slot + number) + batch
            part = load_row_values(
                head_of(value_parts, place, head), value_parts, row + offsets, rows, float("-inf")
            )
            new_most = tl.maximum(most, part)
            # A row that saw nothing so far pivots on 0: -inf minus -inf never happens.
            pivot = tl.where(new_most == float("-inf"), 0.0, new_most) * LOG2_E
            total = total * tl.exp2(most * LOG2_E - pivot) + tl.exp2(part * LOG2_E - pivot)
            most = new_most
        empty = total == 0.0
        total = tl.where(empty, float("-inf"), most + tl.log2(tl.where(empty, 1.0, total)) * LN_2)
        exists = start + offsets < length
        tl.store(head_of(values, batch, head) + (start + offsets).to(tl.int64) * values.row, total, mask=exists)
        total = tl.where(total == float("-inf"), 0.0, total)
    accumulator = tl.zeros([BLOCK, WIDTH], tl.float32)
    for number in tl.range(0, slots):
        place = batches * (slot + number) + batch
        tile = load_tile(head_of(parts, place, head), parts, row, rows, DIM, BLOCK, WIDTH, True)
        if values is not None:
            part = load_row_values(
                head_of(value_parts, place, head), value_parts, row + offsets, rows, float("-inf")
            )
            tile *= tl.exp2((part - total) * LOG2_E)[:, None]
        accumulator += tile
    store_tile(head_of(out, batch, head), out, start, length, DIM, accumulator, BLOCK, WIDTH)


def merge(
    sharing: Sharing,
    parts: torch.Tensor | None,
    out: torch.Tensor,
    value_parts: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
) -> None:
    """Make `out` (batch, heads, rows, width) of its parts, where there are any, and the values (batch, heads,
    rows) of theirs: log-sum-exps, which weigh the parts of `out`."""
    if sharing.slots == 0:
        return
    batch, heads, rows, width = out.shape
    shared_rows = rows if sharing.merges is None else len(sharing.merges) * GRANULE.value
    merge_kernel[(triton.cdiv(shared_rows, ROWS) * batch * heads,)](
        argument(parts),
        argument(value_parts),
        tensor4(out),
        None if values is None else tensor3(values),
        sharing.merges,
        sharing.slots,
        rows,
        heads,
        batch,
        DIM=width,
        WIDTH=launch.tile_width(width),
        BLOCK=ROWS,
        num_warps=4,
        **launch.COMPILER_OPTIONS,
    )
