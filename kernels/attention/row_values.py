"""Attention, backward: what it needs of each row before the loops, its log-sum-exp, delta and remainder.

delta      rowsum(dout * out) - dlse
remainder  what the log-sum-exp lost by rounding. Where a bias puts all keys of a row at -1e9 or at the lowest
           finite number, float32 rounds the log-sum-exp to the maximum, and the weights exp(S - lse) of n equal
           scores add up to n instead of 1. Only calls whose scores are in nats have it (scores.is_in_nats).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import launch
from ..tiles import (
    LARGEST_TILE,
    LOG2_E,
    Tensor4,
    head_of,
    load_row_values,
    load_tile,
    tensor3,
    tensor4,
)
from .loops import is_visible, later_are_heavier, loop_over_keys, position_of, rows_of
from .problem import Call
from .scores import cap, finish_scores, is_in_nats, load_score_terms, sink_weights_of, softmax_weights

# Beyond it, either way, float32 rounds a log-sum-exp by more than 2**-11.
LARGEST_EXACT: tl.constexpr = tl.constexpr(8192.0)


class RowValues(NamedTuple):
    """A row's log-sum-exp in the units of its scores, its delta and, for scores in nats, its remainder in log2
    units: float32 (batch, heads, 2 or 3, rows padded to whole tiles). `head` is the stride of the heads."""

    pointer: torch.Tensor
    rows: int
    head: int


@triton.jit
def row_values_of(row_values, batch, head, shape):
    """Pointer to one head's log-sum-exps; its deltas are `row_values.rows` further."""
    return row_values.pointer + (batch * shape.heads + head).to(tl.int64) * row_values.head


@triton.jit
def load_remainder(values, padded_rows, scores):
    """The remainders of the rows whose log-sum-exps are at `values`."""
    if is_in_nats(scores):
        return tl.load(values + 2 * padded_rows)
    else:
        return tl.zeros(values.shape, tl.float32)


@triton.jit
def load_rows(values, padded_rows, scores):
    """Log-sum-exps, deltas and remainders of the rows whose log-sum-exps are at `values`."""
    return tl.load(values), tl.load(values + padded_rows), load_remainder(values, padded_rows, scores)


@triton.jit
def is_rounded(lse):
    """Which rows may have a remainder."""
    return (tl.abs(lse) > LARGEST_EXACT) & (tl.abs(lse) < float("inf"))


@triton.jit
def attention_delta_kernel(out, dout, lse, dlse, row_values, shape, tile: tl.constexpr, IN_NATS: tl.constexpr):
    """Per row: its lse in the units of its scores and its delta. Rows that saw nothing, and the padding up to a
    whole number of the largest tiles, get +inf and 0: their weights come out as exp2(-inf) = 0 with no mask."""
    tiles = row_values.rows // tile.BLOCK_M
    flat_head = tl.program_id(0) // tiles
    batch, head = flat_head // shape.heads, flat_head % shape.heads
    start = tl.program_id(0) % tiles * tile.BLOCK_M
    rows = start + tl.arange(0, tile.BLOCK_M)
    row_lse = load_row_values(head_of(lse, batch, head), lse, rows, shape.queries, float("-inf"))
    out_pointer, dout_pointer = head_of(out, batch, head), head_of(dout, batch, head)
    out_tile = load_tile(
        out_pointer, out, start, shape.queries, tile.VALUE_DIM, tile.BLOCK_M, tile.VALUE_WIDTH, True
    )
    dout_tile = load_tile(
        dout_pointer, dout, start, shape.queries, tile.VALUE_DIM, tile.BLOCK_M, tile.VALUE_WIDTH, True
    )
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        delta -= load_row_values(head_of(dlse, batch, head), dlse, rows, shape.queries, 0.0)
    empty = row_lse == float("-inf")
    if not IN_NATS:
        row_lse *= LOG2_E
    values = row_values.pointer + flat_head.to(tl.int64) * row_values.head + rows
    tl.store(values, tl.where(empty, float("inf"), row_lse))
    tl.store(values + row_values.rows, tl.where(empty, 0.0, delta))


@triton.jit
def row_sum_step(
    row_sum, operands, score_terms, start, queries, bounds, key_count, problem,
    tile: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add up the weights of the keys from `start` on."""
    q_tile, lse, k_pointer, k = operands
    scores = problem.scores
    k_tile = load_tile(k_pointer, k, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, MASKED)
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=tile.PRECISION)
    keys = start + tl.arange(0, tile.BLOCK_N)[None, :]
    capped = cap(products, scores, score_terms)
    values = finish_scores(capped, scores, score_terms, queries[:, None], keys, problem.shape)
    weights = softmax_weights(values, scores, lse[:, None], 0.0)
    if MASKED:
        weights = tl.where(is_visible(start, bounds, problem, tile), weights, 0.0)
    return row_sum + tl.sum(weights, 1)


@triton.jit
def attention_remainder_kernel(q, k, row_values, problem, tile: tl.constexpr):
    """Per row: its remainder, 0 unless its log-sum-exp is huge. Tiles without such a row compute nothing."""
    shape, scores = problem.shape, problem.scores
    position = position_of(row_values.rows, shape.heads, problem, later_are_heavier(problem), tile.BLOCK_M)
    start, batch, head, _split = position
    values = row_values_of(row_values, batch, head, shape) + start + tl.arange(0, tile.BLOCK_M)
    lse = tl.load(values)
    rounded = is_rounded(lse)
    row_sum = tl.zeros([tile.BLOCK_M], tl.float32)
    if tl.max(rounded.to(tl.int32), 0) > 0:
        q_pointer, k_pointer = head_of(q, batch, head), head_of(k, batch, head // shape.group)
        q_tile = load_tile(q_pointer, q, start, shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, True)
        score_terms = load_score_terms(scores, problem.dropout, batch, head)
        row_sum = loop_over_keys(
            row_sum_step, row_sum, (q_tile, lse, k_pointer, k), score_terms, position, problem, tile
        )
        if scores.sinks is not None:
            row_sum += sink_weights_of(scores, lse, batch, head)
    tl.store(values + 2 * row_values.rows, tl.log2(tl.where(rounded & (row_sum > 0.0), row_sum, 1.0)))


def row_values(
    call: Call,
    operands: tuple[Tensor4, Tensor4],
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
) -> RowValues:
    """The call's row values; `operands` are q and k as kernels take them."""
    batch, heads, queries, _ = call.q.shape
    rows = triton.cdiv(queries, LARGEST_TILE) * LARGEST_TILE
    kinds = 3 if call.in_nats else 2
    values = torch.empty((batch, heads, kinds, rows), dtype=torch.float32, device=lse.device)
    result = RowValues(values, rows, kinds * rows)
    if not values.numel():
        return result
    tiling = call.tiling(launch.ATTENTION_DELTA)
    launch.start(
        attention_delta_kernel,
        (rows // tiling.block_m * batch * heads,),
        tensor4(out),
        tensor4(dout),
        tensor3(lse),
        None if dlse is None else tensor3(dlse.contiguous()),
        result,
        call.shape,
        tile=call.tile(tiling),
        IN_NATS=call.in_nats,
        **tiling.compiler_options(),
    )
    if call.in_nats:
        tiling = call.tiling(launch.ATTENTION_FORWARD)
        section = launch.heads_per_section(call.k, call.k, batch * heads)
        launch.start(
            attention_remainder_kernel,
            (rows // tiling.block_m * batch * heads,),
            *operands,
            result,
            call.problem(rows_of(call.lists, split=False), heads_per_section=section, sinks=True),
            tile=call.tile(tiling),
            **tiling.compiler_options(),
        )
    return result
