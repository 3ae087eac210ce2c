"""Attention, forward mode: the tangents of out and lse, given those of what goes in, in one pass.

Saved from the forward: q, k, v, out and lse. One program a tile of queries loops over the keys it sees, as the
forward does, and recomputes the weights P = exp(S - lse). With S' = scale (q' k^T + q k'^T), times the soft cap's
slope, plus bias'; or, with a scale s of each head, scale (s (q' k^T + q k'^T) + s' q k^T):
  lse' = rowsum(P * S'), a sink's weight times its tangent included
  out' = (P * S') v + P v' - lse' out
(the product rule on out = P v, with P' = P * (S' - lse')). Tangents that are None are absent at compile time. They
are arguments of their own: Triton 3.6 cannot compare a field of a tuple that also holds None with None.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .. import launch
from ..tiles import head_of, load_tile, store_tile, tensor4
from .loops import is_visible, later_are_heavier, loop_over_keys, position_of, rows_of
from .problem import Call, empty_heads
from .row_values import is_rounded
from .scores import (
    cap,
    finish_scores,
    is_in_nats,
    keep_mask,
    load_score_terms,
    nats_factor,
    score_unit,
    scores_of,
    sink_weights_of,
    softmax_weights,
)


@triton.jit
def tangent_step(
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
    """Add what the keys from `start` on give to (out' + lse' out, lse')."""
    q_tile, q_tangent_tile, lse, pointers, k, v, tangents, score_tangents, tangent_terms, scale_tangent = operands
    q_tangent, k_tangent, v_tangent = tangents
    k_pointer, v_pointer, k_tangent_pointer, v_tangent_pointer = pointers
    scores, shape = problem.scores, problem.shape
    accumulator, dlse, row_sum = state
    k_tile = load_tile(k_pointer, k, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, MASKED)
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=tile.PRECISION)
    dproducts = tl.zeros([tile.BLOCK_M, tile.BLOCK_N], tl.float32)
    if q_tangent is not None:
        dproducts = tl.dot(q_tangent_tile, tl.trans(k_tile), dproducts, input_precision=tile.PRECISION)
    if k_tangent is not None:
        k_tangent_tile = load_tile(
            k_tangent_pointer, k_tangent, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, MASKED
        )
        dproducts = tl.dot(q_tile, tl.trans(k_tangent_tile), dproducts, input_precision=tile.PRECISION)
    keys = start + tl.arange(0, tile.BLOCK_N)[None, :]
    capped = cap(products, scores, score_terms)
    values = finish_scores(capped, scores, score_terms, queries[:, None], keys, shape)
    weights = softmax_weights(values, scores, lse[:, None], 0.0)
    if MASKED:
        weights = tl.where(is_visible(start, bounds, problem, tile), weights, 0.0)
    if is_in_nats(scores):
        row_sum += tl.sum(weights, 1)
    if scores.head_scale is not None:
        dproducts = dproducts * score_terms[7] + products * scale_tangent
    if scores.softcap is not None:
        dproducts *= 1.0 - capped * capped
    dscores = finish_scores(dproducts, score_tangents, tangent_terms, queries[:, None], keys, shape)
    dweights = weights * (dscores * nats_factor(score_tangents))
    if MASKED and (score_tangents.bias is not None or score_tangents.relative is not None):
        # The tangent of a bias may be anything, NaN included, where the key is hidden.
        dweights = tl.where(weights == 0.0, 0.0, dweights)
    dlse += tl.sum(dweights, 1)
    if problem.dropout is not None:
        keep = keep_mask(problem.dropout, score_terms, queries, start, tile.BLOCK_N, False)
        weights, dweights = tl.where(keep, weights, 0.0), tl.where(keep, dweights, 0.0)
    v_tile = load_tile(v_pointer, v, start, key_count, tile.VALUE_DIM, tile.BLOCK_N, tile.VALUE_WIDTH, MASKED)
    accumulator = tl.dot(dweights.to(v_tile.dtype), v_tile, accumulator, input_precision=tile.PRECISION)
    if v_tangent is not None:
        v_tangent_tile = load_tile(
            v_tangent_pointer, v_tangent, start, key_count, tile.VALUE_DIM, tile.BLOCK_N, tile.VALUE_WIDTH, MASKED
        )
        accumulator = tl.dot(weights.to(v_tile.dtype), v_tangent_tile, accumulator, input_precision=tile.PRECISION)
    return accumulator, dlse, row_sum


@triton.jit
def attention_tangent_kernel(
    q, k, v, out, values, q_tangent, k_tangent, v_tangent, out_tangent, score_tangents, problem,
    tile: tl.constexpr,
):  # fmt: skip
    """`values` are contiguous: log-sum-exps, where their tangents go, and the tangents of the heads' scales."""
    lse, lse_tangent, head_scale_tangent = values
    shape, scores = problem.shape, problem.scores
    position = position_of(shape.queries, shape.heads, problem, later_are_heavier(problem), tile.BLOCK_M)
    start, batch, head, _split = position
    key_head = head // shape.group
    queries = start + tl.arange(0, tile.BLOCK_M)

    q_pointer = head_of(q, batch, head)
    q_tile = load_tile(q_pointer, q, start, shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, True)
    q_tangent_tile, k_tangent_pointer, v_tangent_pointer = 0, 0, 0
    if q_tangent is not None:
        q_tangent_tile = load_tile(
            head_of(q_tangent, batch, head), q_tangent, start, shape.queries, tile.HEAD_DIM, tile.BLOCK_M,
            tile.WIDTH, True,
        )  # fmt: skip
    if k_tangent is not None:
        k_tangent_pointer = head_of(k_tangent, batch, key_head)
    if v_tangent is not None:
        v_tangent_pointer = head_of(v_tangent, batch, key_head)
    pointers = head_of(k, batch, key_head), head_of(v, batch, key_head), k_tangent_pointer, v_tangent_pointer
    score_terms = load_score_terms(scores, problem.dropout, batch, head)
    tangent_terms = load_score_terms(score_tangents, None, batch, head)
    # Rows that saw nothing, or do not exist: exp2(-inf) is 0, and so is everything that follows.
    row_index = (batch * shape.heads + head).to(tl.int64) * shape.queries + queries
    row_lse = tl.load(lse + row_index, mask=queries < shape.queries, other=float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * score_unit(scores))

    row_sum = tl.zeros([tile.BLOCK_M], tl.float32)
    dlse = tl.zeros([tile.BLOCK_M], tl.float32)
    if scores.sinks is not None:
        sink_weights = sink_weights_of(scores, row_lse, batch, head)
        row_sum += sink_weights
        if score_tangents.sinks is not None:
            dlse += sink_weights * tl.load(head_of(score_tangents.sinks, batch, head))
    scale_tangent = 0.0
    if head_scale_tangent is not None:
        scale_tangent = tl.load(head_scale_tangent + batch * shape.heads + head)
    tangents = q_tangent, k_tangent, v_tangent
    operands = (
        q_tile, q_tangent_tile, row_lse, pointers, k, v, tangents, score_tangents, tangent_terms, scale_tangent,
    )  # fmt: skip
    accumulator = tl.zeros([tile.BLOCK_M, tile.VALUE_WIDTH], tl.float32)
    accumulator, dlse, row_sum = loop_over_keys(
        tangent_step, (accumulator, dlse, row_sum), operands, score_terms, position, problem, tile
    )

    if is_in_nats(scores):
        # Where the log-sum-exp was rounded, weights do not add up to 1: divide by their sum.
        growth = 1.0 / tl.where(is_rounded(row_lse) & (row_sum > 0.0), row_sum, 1.0)
        accumulator *= growth[:, None]
        dlse *= growth
    if problem.dropout is not None:
        accumulator *= tl.cast(problem.dropout.growth, tl.float32)
    out_pointer = head_of(out, batch, head)
    out_tile = load_tile(
        out_pointer, out, start, shape.queries, tile.VALUE_DIM, tile.BLOCK_M, tile.VALUE_WIDTH, True
    )
    accumulator -= dlse[:, None] * out_tile.to(tl.float32)
    store_tile(
        head_of(out_tangent, batch, head), out_tangent, start, shape.queries, tile.VALUE_DIM, accumulator,
        tile.BLOCK_M, tile.VALUE_WIDTH,
    )  # fmt: skip
    tl.store(lse_tangent + row_index, dlse, mask=queries < shape.queries)


def attention_tangent(
    saved: tuple, tangents: Any, spec: Any, tensors: Any, lists: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tangents of attention_forward's out and lse, shaped like them.

    `saved` is (q, k, v, out, lse). `tangents` of q, k, v, bias, relative_bias, sinks and head_scale are each in
    the shape and dtype of what they belong to, None for zero; any strides, zero included.
    """
    q, k, v, out, lse = saved
    batch, heads, queries, value_dim = out.shape
    out_tangent = empty_heads(batch, heads, queries, value_dim, q)
    lse_tangent = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if lse_tangent.numel() == 0:
        return out_tangent, lse_tangent
    input_tangents = (None if t is None else tensor4(t) for t in (tangents.q, tangents.k, tangents.v))
    head_scale_tangent = None if tangents.head_scale is None else tangents.head_scale.contiguous()
    with launch.on_device(q):
        call = Call(attention_tangent_kernel, q, k, v, spec, tensors, lists)
        tiling = call.tiling(launch.ATTENTION_TANGENT)
        section = launch.heads_per_section(k, v, batch * heads)
        problem = call.problem(rows_of(lists, split=False), heads_per_section=section, sinks=True)
        launch.start(
            attention_tangent_kernel,
            (triton.cdiv(queries, tiling.block_m) * batch * heads,),
            tensor4(q),
            tensor4(k),
            tensor4(v),
            tensor4(out),
            (lse.contiguous(), lse_tangent, head_scale_tangent),
            *input_tangents,
            tensor4(out_tangent),
            scores_of(spec.scale, None, None, tangents.bias, tangents.relative_bias, tangents.sinks),
            problem,
            tile=call.tile(tiling),
            **tiling.compiler_options(),
        )
    return out_tangent, lse_tangent
