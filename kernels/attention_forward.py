"""Attention, forward: one program computes BLOCK_M rows of softmax(scale q k^T) v and their log-sum-exp.

The online softmax of FlashAttention-2 (Dao 2023, algorithm 1). Which keys a tile walks says kernels/walk.py; where
several programs share a walk, kernels/merge.py makes one result of theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .merge import argument, leave_tile, leave_values, merge, parts_of, sharing_of
from .scores import bend, dropout_of, kept, score_factor, scores_of, shape_scores, terms_of
from .tiles import LN_2, LOG2_E, head_of, load_tile, online_softmax_update, shape_of, tensor3, tensor4
from .walk import later_are_heavier, rows_of, walk_keys, window_of, within, work_of


@triton.jit
def forward_step(
    state,
    given,
    terms,
    start,
    queries,
    bounds,
    key_count,
    shape,
    window,
    lists,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    RELATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the keys from `start` on into (accumulator, running maximum, running sum)."""
    q_tile, k_pointer, v_pointer, k, v, scores, dropout = given
    accumulator, row_max, row_sum = state
    k_tile = load_tile(k_pointer, k, start, key_count, HEAD_DIM, BLOCK_N, WIDTH, MASKED)
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    keys = start + tl.arange(0, BLOCK_N)[None, :]
    values = shape_scores(bend(products, scores), scores, terms, queries[:, None], keys, shape)
    if MASKED:
        values = tl.where(within(start, bounds, window, lists, BLOCK_N, RELATIVE), values, float("-inf"))
    weights, shrink, row_max, row_sum = online_softmax_update(
        values, score_factor(scores), row_max, row_sum, MASKED or scores.bias is not None
    )
    if dropout is not None:
        weights = tl.where(kept(dropout, terms, queries, start, BLOCK_N, False), weights, 0.0)
    v_tile = load_tile(v_pointer, v, start, key_count, VALUE_DIM, BLOCK_N, VALUE_WIDTH, MASKED)
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
    parts,
    lse_parts,
    shape,
    window,
    lists,
    splits,
    scores,
    dropout,
    heads_per_section,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MASKED_FIRST: tl.constexpr,
    RELATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start, batch, head, work = work_of(
        shape.queries, shape.heads, lists, splits, heads_per_section, later_are_heavier(window, lists), BLOCK_M
    )
    k_pointer = head_of(k, batch, head // shape.group)
    v_pointer = head_of(v, batch, head // shape.group)
    q_tile = load_tile(head_of(q, batch, head), q, start, shape.queries, HEAD_DIM, BLOCK_M, WIDTH, True)
    terms = terms_of(scores, dropout, batch, head)

    accumulator = tl.zeros([BLOCK_M, VALUE_WIDTH], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if scores.sinks is not None:
        # One more key, seen by all, whose value is zero; of several shares the first has it.
        sink = tl.load(head_of(scores.sinks, batch, head)) * LOG2_E
        row_max = tl.zeros([BLOCK_M], tl.float32) + tl.where(work[0] == 0, sink, float("-inf"))
        row_sum += tl.where(work[0] == 0, 1.0, 0.0)
    accumulator, row_max, row_sum = walk_keys(
        forward_step, (accumulator, row_max, row_sum), (q_tile, k_pointer, v_pointer, k, v, scores, dropout),
        terms, start, batch, head, work, shape, window, lists, splits,
        HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, MASKED_FIRST, RELATIVE, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip

    # A row that saw nothing has sum 0: output 0, lse -inf.
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    row_lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    growth = 1.0
    if dropout is not None:
        growth = tl.cast(dropout.growth, tl.float32)
    accumulator = accumulator * (growth / row_sum)[:, None]
    leave_tile(
        out, parts, accumulator, batch, head, start, shape.queries, work, shape, lists, VALUE_DIM, BLOCK_M,
        VALUE_WIDTH,
    )  # fmt: skip
    leave_values(lse, lse_parts, row_lse, batch, head, start, shape.queries, work, shape, lists, BLOCK_M)


def empty_heads(batch: int, heads: int, rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """An empty (batch, heads, rows, width) tensor laid out (batch, rows, heads, width), so that merging the
    heads for the next linear layer costs no copy."""
    return torch.empty((batch, rows, heads, width), dtype=like.dtype, device=like.device).transpose(1, 2)


def kind_of(
    precision: str,
    heavy: tuple[object, ...],
    shaped: tuple[object, ...],
    intervals: torch.Tensor | None,
    lists: tuple | None,
) -> str:
    """Which of a table's rows a launch needs, see `launch.look_up`; what is None is not asked for."""
    if precision != "ieee":
        return precision
    if any(feature is not None for feature in heavy):
        return "heavy"
    if lists is not None:
        return "listed"
    if intervals is not None:
        return "intervals"
    return "plain" if all(feature is None for feature in shaped) else "shaped"


def counts_keys(lists: tuple | None) -> bool:
    """Whether the entries of these BlockLists say how often their keys count."""
    return lists is not None and lists.full_counts is not None


def products(precision: str, element_size: int, width: int) -> str:
    """tl.dot's input precision. IEEE where the fragments of tf32x3's three products do not fit in registers."""
    return "ieee" if element_size < 4 or (precision == "tf32x3" and width > 128) else precision


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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    left: int | None = None,
    right: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    precision: str = "ieee",
    key_lengths: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    relative_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_state: torch.Tensor | None = None,
    intervals: torch.Tensor | None = None,
    lists: tuple | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v and its row-wise log-sum-exp.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv), any strides, one dtype of fp16, bf16, fp32;
    scale > 0. `left` and `right` bound the keys before and after the diagonal, causal is right = 0; softcap > 0;
    key_lengths (B,) int32 in [0, Lk]; alibi_slopes and sinks (B, Hq) fp32; bias (B, Hq, Lq, Lk), any of them 1,
    float or bool; relative_bias (B, Hq, 2 R + 1) fp32; dropout a multiple of 2**-16 with dropout_state (B, 2)
    int64; precision of fp32 products as tl.dot has it; intervals (B, 2, Lq + Lk) int32, see walk.Window, in place
    of left and right; lists, by rows and columns, see walk.Lists, in place of left, right and intervals. Returns
    out (B, Hq, Lq, Dv) in the inputs' dtype and lse (B, Hq, Lq) in nats, fp32.
    """
    batch, heads, queries, _ = q.shape
    out = empty_heads(batch, heads, queries, v.shape[3], q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    width = widths(q, v)
    widest = max(width["WIDTH"], width["VALUE_WIDTH"])
    precision = products(precision, q.element_size(), widest)
    with launch.on_device(q):
        family = launch.family(attention_forward_kernel, q.device)
        tiling = launch.look_up(
            launch.ATTENTION_FORWARD,
            family,
            q.element_size(),
            widest,
            kind_of(
                precision, (bias, relative_bias, dropout_state), (left, softcap, alibi_slopes), intervals, lists
            ),
        )
        if lists is not None:
            tiling = launch.within_granules(tiling)
        rows = rows_of(lists)
        sharing = sharing_of(
            rows, None if lists is None else lists.row_merges, queries, tiling.block_m, batch * heads,
            triton.cdiv(k.shape[2], tiling.block_n), launch.processors(family, q.device),
        )  # fmt: skip
        parts, lse_parts = parts_of(sharing, out), parts_of(sharing, lse)
        attention_forward_kernel[(sharing.programs * batch * heads,)](
            tensor4(q),
            tensor4(k),
            tensor4(v),
            tensor4(out),
            tensor3(lse),
            argument(parts),
            argument(lse_parts),
            shape_of(q, k),
            window_of(left, right, causal, key_lengths, intervals),
            rows,
            sharing.splits,
            scores_of(scale, softcap, alibi_slopes, bias, relative_bias, sinks, counts_keys(lists)),
            dropout_of(dropout_state, dropout),
            launch.heads_per_section(k, v, batch * heads),
            **width,
            MASKED_FIRST=family in launch.MASKED_FIRST,
            RELATIVE=family in launch.MASKED_FIRST,
            PRECISION=precision,
            **tiling.options(),
        )
        merge(sharing, parts, out, lse_parts, lse)
    return out, lse
