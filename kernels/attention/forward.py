"""Attention, forward: one program computes BLOCK_M rows of softmax(scale q k^T) v and their log-sum-exp.

The online softmax of FlashAttention-2 (Dao 2023, algorithm 1). Which keys a tile visits says loops.py; where
several programs split a loop, splits.py makes one result of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from .. import launch
from ..tiles import LN_2, LOG2_E, head_of, load_tile, online_softmax_update, tensor3, tensor4
from .loops import (
    is_visible,
    later_are_heavier,
    loop_over_keys,
    loop_over_keys_ahead,
    position_of,
    rows_of,
)
from .problem import Call, empty_heads
from .scores import cap, finish_scores, is_in_nats, keep_mask, load_score_terms, score_factor, score_unit
from .splits import argument, merge, partials_of, splits_of, store_partial_values, store_result, store_row_values


@triton.jit
def forward_products(operands, start, key_count, tile: tl.constexpr, EDGE: tl.constexpr):
    """q k^T of the keys from `start` on. Columns behind tile.WIDTH are a tile of their own."""
    q_tile, q_rest, k_pointer, _, k, _ = operands
    k_tile = load_tile(k_pointer, k, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, EDGE)
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=tile.PRECISION)
    if tile.REST > 0:
        pointer = k_pointer + tl.cast(k.column, tl.int64) * tile.WIDTH
        k_rest = load_tile(pointer, k, start, key_count, tile.REST_DIM, tile.BLOCK_N, tile.REST, EDGE)
        products = tl.dot(q_rest, tl.trans(k_rest), products, input_precision=tile.PRECISION)
    return products


@triton.jit
def forward_step(
    state,
    operands,
    score_terms,
    start,
    queries,
    bounds,
    key_count,
    problem,
    tile: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold the keys from `start` on into (accumulator, running maximum, running sum)."""
    products = forward_products(operands, start, key_count, tile, MASKED)
    return fold_products(
        state, products, operands, score_terms, start, queries, bounds, key_count, problem, tile, MASKED
    )


@triton.jit
def fold_products(
    state,
    products,
    operands,
    score_terms,
    start,
    queries,
    bounds,
    key_count,
    problem,
    tile: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`forward_step`, from the products q k^T."""
    _, _, _, v_pointer, _, v = operands
    scores = problem.scores
    accumulator, row_max, row_sum = state
    columns = start + tl.arange(0, tile.BLOCK_N)[None, :]
    capped = cap(products, scores, score_terms)
    values = finish_scores(capped, scores, score_terms, queries[:, None], columns, problem.shape)
    if MASKED:
        values = tl.where(is_visible(start, bounds, problem, tile), values, float("-inf"))
    # With a bias, scores may be -inf without a mask, too.
    weights, rescale, row_max, row_sum = online_softmax_update(
        values,
        score_factor(scores),
        row_max,
        row_sum,
        MASKED or scores.bias is not None or scores.relative is not None,
        is_in_nats(scores),
    )
    if problem.dropout is not None:
        keep = keep_mask(problem.dropout, score_terms, queries, start, tile.BLOCK_N, False)
        weights = tl.where(keep, weights, 0.0)
    v_tile = load_tile(v_pointer, v, start, key_count, tile.VALUE_DIM, tile.BLOCK_N, tile.VALUE_WIDTH, MASKED)
    accumulator *= rescale[:, None]
    accumulator = tl.dot(weights.to(v_tile.dtype), v_tile, accumulator, input_precision=tile.PRECISION)
    return accumulator, row_max, row_sum


@triton.jit
def lse_of(row_max, row_sum, scores):
    """The log-sum-exp in nats."""
    if is_in_nats(scores):
        return row_max + tl.log2(row_sum) * LN_2
    else:
        return (row_max + tl.log2(row_sum)) * LN_2


@triton.jit
def attention_forward_kernel(
    q, k, v, out, lse, maxima, partials, lse_partials, remainders, problem, tile: tl.constexpr
):
    """`remainders` are what the log-sum-exps of partial results lose by rounding; None for scores not in nats."""
    shape, scores = problem.shape, problem.scores
    position = position_of(shape.queries, shape.heads, problem, later_are_heavier(problem), tile.BLOCK_M)
    start, batch, head, split = position
    k_pointer = head_of(k, batch, head // shape.group)
    v_pointer = head_of(v, batch, head // shape.group)
    q_pointer = head_of(q, batch, head)
    q_tile = load_tile(q_pointer, q, start, shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, True)
    q_rest = q_tile
    if tile.REST > 0:
        pointer = q_pointer + tl.cast(q.column, tl.int64) * tile.WIDTH
        q_rest = load_tile(pointer, q, start, shape.queries, tile.REST_DIM, tile.BLOCK_M, tile.REST, True)
    score_terms = load_score_terms(scores, problem.dropout, batch, head)

    accumulator = tl.zeros([tile.BLOCK_M, tile.VALUE_WIDTH], tl.float32)
    row_max = tl.full([tile.BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([tile.BLOCK_M], tl.float32)
    if (scores.sinks is not None) and (maxima is None):
        # A sink is one more key, seen by all, whose value is zero. Of several splits the first has it.
        sink = tl.load(head_of(scores.sinks, batch, head)) * score_unit(scores)
        row_max = tl.zeros([tile.BLOCK_M], tl.float32) + tl.where(split[0] == 0, sink, float("-inf"))
        row_sum += tl.where(split[0] == 0, 1.0, 0.0)
    operands = (q_tile, q_rest, k_pointer, v_pointer, k, v)
    state = (accumulator, row_max, row_sum)
    if tile.AHEAD:
        state = loop_over_keys_ahead(
            forward_products, fold_products, state, operands, score_terms, position, problem, tile
        )
    else:
        state = loop_over_keys(forward_step, state, operands, score_terms, position, problem, tile)
    accumulator, row_max, row_sum = state

    if maxima is not None:
        # They are the largest scores of keys, so the sink is added after they are stored.
        queries = start + tl.arange(0, tile.BLOCK_M)
        pointers = head_of(maxima, batch, head) + queries.to(tl.int64) * maxima.row
        largest = row_max if is_in_nats(scores) else row_max * LN_2
        tl.store(pointers, largest, mask=queries < shape.queries)
        if scores.sinks is not None:
            sink = tl.load(head_of(scores.sinks, batch, head)) * score_unit(scores)
            new_max = tl.maximum(row_max, sink)
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
            # From the units of the scores to those of exp2.
            to_log2 = LOG2_E if is_in_nats(scores) else 1.0
            rescale = tl.exp2((row_max - pivot) * to_log2)
            row_sum = row_sum * rescale + tl.exp2((sink - pivot) * to_log2)
            accumulator *= rescale[:, None]
            row_max = new_max

    # A row that saw nothing has sum 0: output 0, lse -inf.
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    row_lse = tl.where(empty, float("-inf"), lse_of(row_max, row_sum, scores))
    growth = 1.0
    if problem.dropout is not None:
        growth = tl.cast(problem.dropout.growth, tl.float32)
    accumulator = accumulator * (growth / row_sum)[:, None]
    store_result(
        out,
        partials,
        accumulator,
        position,
        shape.queries,
        problem,
        tile.VALUE_DIM,
        tile.BLOCK_M,
        tile.VALUE_WIDTH,
    )
    if remainders is not None:
        remainder = tl.where(empty, 0.0, (row_max - row_lse) + tl.log2(row_sum) * LN_2)
        store_partial_values(remainders, remainder, position, shape.queries, problem, tile.BLOCK_M)
    store_row_values(lse, lse_partials, row_lse, position, shape.queries, problem, tile.BLOCK_M)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: Any,
    tensors: Any,
    lists: Any = None,
    maxima: torch.Tensor | None = None,
    tilings: Mapping[str, launch.Tiling] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v and its row-wise log-sum-exp.

    q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv), any strides, one dtype of fp16, bf16, fp32; the rest
    as `Call` says. Returns out (B, Hq, Lq, Dv) in the inputs' dtype and lse (B, Hq, Lq) in nats, fp32.
    `maxima` (B, Hq, Lq) fp32 gets the largest score of each row, -inf if it sees no key; then no loop is split.
    `tilings` as `Call` says.
    """
    batch, heads, queries, _ = q.shape
    out = empty_heads(batch, heads, queries, v.shape[3], q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    with launch.on_device(q):
        _forward(out, lse, q, k, v, spec, tensors, lists, maxima, tilings)
    return out, lse


def _forward(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: Any,
    tensors: Any,
    lists: Any,
    maxima: torch.Tensor | None,
    tilings: Mapping[str, launch.Tiling] | None,
) -> None:
    """Fill out, lse and maxima."""
    call = Call(attention_forward_kernel, q, k, v, spec, tensors, lists, tilings)
    tiling = call.tiling(launch.ATTENTION_FORWARD)
    if v.shape[3] > tiling.values:
        # Each pass computes the weights again, and writes the same log-sum-exps.
        for columns, result in zip(v.split(tiling.values, 3), out.split(tiling.values, 3), strict=True):
            _forward(result, lse, q, k, columns, spec, tensors, lists, maxima, tilings)
        return
    batch, heads, queries, _ = q.shape
    rows = rows_of(lists, split=maxima is None)
    whole = lists is None or maxima is not None
    splits = splits_of(
        rows, None if whole else lists.row_merges, queries, tiling.block_m, batch * heads,
        0 if maxima is not None else triton.cdiv(k.shape[2], tiling.block_n), call.processors,
    )  # fmt: skip
    partials, lse_partials = partials_of(splits, out), partials_of(splits, lse)
    remainders = partials_of(splits, lse) if call.in_nats else None
    launch.start(
        attention_forward_kernel,
        (splits.programs * batch * heads,),
        tensor4(q),
        tensor4(k),
        tensor4(v),
        tensor4(out),
        tensor3(lse),
        None if maxima is None else tensor3(maxima),
        argument(partials),
        argument(lse_partials),
        argument(remainders),
        call.problem(rows, splits.count, launch.heads_per_section(k, v, batch * heads), sinks=True),
        tile=call.tile(tiling, AHEAD=tiling.ahead, REST_DIM=call.rest, REST=call.rest_width),
        **tiling.compiler_options(),
    )
    merge(splits, partials, out, lse_partials, lse, remainders)
