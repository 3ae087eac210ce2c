"""Attention, forward: one program computes BLOCK_M rows of softmax(scale q k^T) v and their log-sum-exp.

The online softmax of FlashAttention-2 (Dao 2023, algorithm 1). The keys that every row of the tile may see are
walked by a loop without mask code; the diagonal and the last, partial tile by a second one. Both run the same
step.
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
    head_of,
    heavy_first,
    load_tile,
    online_softmax_update,
    store_tile,
    tensor3,
    tensor4,
    visible_keys,
)


class Shape(NamedTuple):
    """The numbers a kernel needs: query heads, query heads per key head, rows and columns of the scores."""

    heads: int
    group: int
    queries: int
    keys: int


@triton.jit
def key_ranges(start, shape, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For the query tile at `start`: where its keys stop being visible to every row, and to any row."""
    end = shape.keys
    full = shape.keys
    if CAUSAL:
        diagonal = start + shape.keys - shape.queries + 1
        full = tl.minimum(full, tl.maximum(diagonal, 0))
        end = tl.minimum(end, tl.maximum(diagonal + BLOCK_M - 1, 0))
    return full // BLOCK_N * BLOCK_N, end


@triton.jit
def forward_step(
    state,
    q_tile,
    k_pointer,
    v_pointer,
    k,
    v,
    start,
    visible,
    shape,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    MASKED_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the keys from `start` on into (accumulator, running maximum, running sum)."""
    accumulator, row_max, row_sum = state
    k_tile = load_tile(k_pointer, k, start, shape.keys, HEAD_DIM, BLOCK_N, WIDTH, MASKED)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    if MASKED:
        # The same, said so that it takes fewer registers where the masked keys come first, or second.
        if MASKED_FIRST:
            inside = tl.arange(0, BLOCK_N)[None, :] < (visible - start)[:, None]
        else:
            inside = start + tl.arange(0, BLOCK_N)[None, :] < visible[:, None]
        scores = tl.where(inside, scores, float("-inf"))
    weights, shrink, row_max, row_sum = online_softmax_update(scores, scale, row_max, row_sum, MASKED)
    v_tile = load_tile(v_pointer, v, start, shape.keys, VALUE_DIM, BLOCK_N, VALUE_WIDTH, MASKED)
    accumulator *= shrink[:, None]
    accumulator = tl.dot(weights.to(v_tile.dtype), v_tile, accumulator, input_precision=PRECISION)
    return accumulator, row_max, row_sum


@triton.jit
def attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    shape,
    scale,
    heads_per_section,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(shape.queries, BLOCK_M)
    all_heads = tl.num_programs(0) // tiles
    tile, flat_head = heavy_first(tl.program_id(0), tiles, all_heads, heads_per_section, CAUSAL)
    batch, head = flat_head // shape.heads, flat_head % shape.heads
    start = tile * BLOCK_M
    queries = start + tl.arange(0, BLOCK_M)

    scale = tl.cast(scale, tl.float32) * LOG2_E
    k_pointer = head_of(k, batch, head // shape.group)
    v_pointer = head_of(v, batch, head // shape.group)
    q_tile = load_tile(head_of(q, batch, head), q, start, shape.queries, HEAD_DIM, BLOCK_M, WIDTH, True)

    accumulator = tl.zeros([BLOCK_M, VALUE_WIDTH], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    state = (accumulator, row_max, row_sum)
    visible = visible_keys(queries, shape.queries, shape.keys, CAUSAL)
    full_end, end = key_ranges(start, shape, CAUSAL, BLOCK_M, BLOCK_N)
    for part in tl.static_range(2):
        for key_start in tl.range(
            full_end if (part == 0) == MASKED_FIRST else 0,
            end if (part == 0) == MASKED_FIRST else full_end,
            BLOCK_N,
        ):
            state = forward_step(
                state, q_tile, k_pointer, v_pointer, k, v, key_start, visible, shape, scale,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, (part == 0) == MASKED_FIRST, MASKED_FIRST, BLOCK_N,
                PRECISION,
            )  # fmt: skip
    accumulator, row_max, row_sum = state

    # A row that saw nothing has sum 0: output 0, lse -inf.
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    row_lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    accumulator = accumulator * (1.0 / row_sum)[:, None]
    store_tile(head_of(out, batch, head), out, start, shape.queries, VALUE_DIM, accumulator, BLOCK_M, VALUE_WIDTH)
    tl.store(head_of(lse, batch, head) + queries.to(tl.int64) * lse.row, row_lse, mask=queries < shape.queries)


def empty_heads(batch: int, heads: int, rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """An empty (batch, heads, rows, width) tensor laid out (batch, rows, heads, width), so that merging the
    heads for the next linear layer costs no copy."""
    return torch.empty((batch, rows, heads, width), dtype=like.dtype, device=like.device).transpose(1, 2)


def shape_of(q: torch.Tensor, k: torch.Tensor) -> Shape:
    return Shape(q.shape[1], q.shape[1] // max(k.shape[1], 1), q.shape[2], k.shape[2])


def widths(q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    """The constexprs that say how wide q, k (HEAD_DIM) and v (VALUE_DIM) are, and their padded widths."""
    head_dim, value_dim = q.shape[3], v.shape[3]
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "WIDTH": launch.tile_width(head_dim),
        "VALUE_WIDTH": launch.tile_width(value_dim),
    }


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v and its row-wise log-sum-exp.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv), any strides, one dtype of fp16, bf16, fp32;
    scale > 0. Returns out (B, Hq, Lq, Dv) in that dtype and lse (B, Hq, Lq) in nats, fp32.
    """
    batch, heads, queries, _ = q.shape
    out = empty_heads(batch, heads, queries, v.shape[3], q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    width = widths(q, v)
    with launch.on_device(q):
        family = launch.family(attention_forward_kernel, q.device)
        tiling = launch.look_up(
            launch.ATTENTION_FORWARD, family, q.element_size(), max(width["WIDTH"], width["VALUE_WIDTH"])
        )
        attention_forward_kernel[(triton.cdiv(queries, tiling.block_m) * batch * heads,)](
            tensor4(q),
            tensor4(k),
            tensor4(v),
            tensor4(out),
            tensor3(lse),
            shape_of(q, k),
            scale,
            launch.heads_per_section(k, v, batch * heads),
            **width,
            CAUSAL=causal,
            MASKED_FIRST=family in launch.MASKED_FIRST,
            PRECISION="ieee",
            **tiling.options(),
        )
    return out, lse
