"""Attention, forward mode: the tangents of out and lse, given those of what goes in, in one pass.

Saved from the forward: q, k, v, out and lse. One program a tile of queries walks the keys it sees, as the forward
does, and recomputes the weights P = exp(S - lse). With S' = scale (q' k^T + q k'^T), times the soft cap's slope,
plus bias':
  lse' = rowsum(P * S'), a sink's weight times its tangent included
  out' = (P * S') v + P v' - lse' out
(the product rule on out = P v, with P' = P * (S' - lse')). Tangents that are None are absent at compile time.
They are arguments of their own: of a tuple that also holds None, Triton 3.6 cannot compare a field with None.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .attention_forward import counts_keys, empty_heads, kind_of, products, widths
from .scores import bend, dropout_of, kept, score_factor, scores_of, shape_scores, terms_of
from .tiles import (
    LN_2,
    LOG2_E,
    head_of,
    load_row_values,
    load_tile,
    shape_of,
    store_tile,
    tensor2,
    tensor3,
    tensor4,
)
from .walk import later_are_heavier, rows_of, walk_keys, window_of, within, work_of


@triton.jit
def tangent_step(
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
    """Add what the keys from `start` on give to (out' + lse' out, lse')."""
    (
        q_tile,
        moved_q_tile,
        lse,
        pointers,
        k,
        v,
        moved_q,
        moved_k,
        moved_v,
        scores,
        moved_scores,
        dropout,
        moved_terms,
    ) = given
    accumulator, dlse = state
    k_pointer, v_pointer, moved_k_pointer, moved_v_pointer = pointers
    k_tile = load_tile(k_pointer, k, start, key_count, HEAD_DIM, BLOCK_N, WIDTH, MASKED)
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    dproducts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if moved_q is not None:
        dproducts = tl.dot(moved_q_tile, tl.trans(k_tile), dproducts, input_precision=PRECISION)
    if moved_k is not None:
        moved_k_tile = load_tile(moved_k_pointer, moved_k, start, key_count, HEAD_DIM, BLOCK_N, WIDTH, MASKED)
        dproducts = tl.dot(q_tile, tl.trans(moved_k_tile), dproducts, input_precision=PRECISION)
    keys = start + tl.arange(0, BLOCK_N)[None, :]
    bent = bend(products, scores)
    values = shape_scores(bent, scores, terms, queries[:, None], keys, shape)
    weights = tl.exp2(values * score_factor(scores) - lse[:, None])
    if MASKED:
        weights = tl.where(within(start, bounds, window, lists, BLOCK_N, RELATIVE), weights, 0.0)
    if scores.softcap is not None:
        dproducts *= 1.0 - bent * bent
    dscores = shape_scores(dproducts, moved_scores, moved_terms, queries[:, None], keys, shape)
    dweights = weights * (dscores * (score_factor(moved_scores) * LN_2))
    if MASKED and (moved_scores.bias is not None or moved_scores.relative is not None):
        # The tangent of a bias may be anything where it is hidden.
        dweights = tl.where(weights == 0.0, 0.0, dweights)
    dlse += tl.sum(dweights, 1)
    if dropout is not None:
        keep = kept(dropout, terms, queries, start, BLOCK_N, False)
        weights, dweights = tl.where(keep, weights, 0.0), tl.where(keep, dweights, 0.0)
    v_tile = load_tile(v_pointer, v, start, key_count, VALUE_DIM, BLOCK_N, VALUE_WIDTH, MASKED)
    accumulator = tl.dot(dweights.to(v_tile.dtype), v_tile, accumulator, input_precision=PRECISION)
    if moved_v is not None:
        moved_v_tile = load_tile(
            moved_v_pointer, moved_v, start, key_count, VALUE_DIM, BLOCK_N, VALUE_WIDTH, MASKED
        )
        accumulator = tl.dot(weights.to(v_tile.dtype), moved_v_tile, accumulator, input_precision=PRECISION)
    return accumulator, dlse


@triton.jit
def attention_tangent_kernel(
    q,
    k,
    v,
    out,
    lse,
    moved_q,
    moved_k,
    moved_v,
    moved_sinks,
    moved_out,
    moved_lse,
    shape,
    window,
    lists,
    scores,
    moved_scores,
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
        shape.queries, shape.heads, lists, None, heads_per_section, later_are_heavier(window, lists), BLOCK_M
    )
    key_head = head // shape.group
    queries = start + tl.arange(0, BLOCK_M)

    q_tile = load_tile(head_of(q, batch, head), q, start, shape.queries, HEAD_DIM, BLOCK_M, WIDTH, True)
    moved_q_tile, moved_k_pointer, moved_v_pointer = 0, 0, 0
    if moved_q is not None:
        moved_q_pointer = head_of(moved_q, batch, head)
        moved_q_tile = load_tile(moved_q_pointer, moved_q, start, shape.queries, HEAD_DIM, BLOCK_M, WIDTH, True)
    if moved_k is not None:
        moved_k_pointer = head_of(moved_k, batch, key_head)
    if moved_v is not None:
        moved_v_pointer = head_of(moved_v, batch, key_head)
    pointers = head_of(k, batch, key_head), head_of(v, batch, key_head), moved_k_pointer, moved_v_pointer
    terms = terms_of(scores, dropout, batch, head)
    moved_terms = terms_of(moved_scores, None, batch, head)
    # Rows that saw nothing, or do not exist: exp2(-inf) is 0, and so is everything that follows.
    row_lse = load_row_values(head_of(lse, batch, head), lse, queries, shape.queries, float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)

    dlse = tl.zeros([BLOCK_M], tl.float32)
    if moved_sinks is not None:
        sink = tl.load(head_of(scores.sinks, batch, head)) * LOG2_E
        dlse += tl.exp2(sink - row_lse) * tl.load(head_of(moved_sinks, batch, head))
    accumulator, dlse = walk_keys(
        tangent_step, (tl.zeros([BLOCK_M, VALUE_WIDTH], tl.float32), dlse),
        (q_tile, moved_q_tile, row_lse, pointers, k, v, moved_q, moved_k, moved_v, scores, moved_scores, dropout,
         moved_terms), terms,
        start, batch, head, work, shape, window, lists, None,
        HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, MASKED_FIRST, RELATIVE, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip

    if dropout is not None:
        accumulator *= tl.cast(dropout.growth, tl.float32)
    out_tile = load_tile(
        head_of(out, batch, head), out, start, shape.queries, VALUE_DIM, BLOCK_M, VALUE_WIDTH, True
    )
    accumulator -= dlse[:, None] * out_tile.to(tl.float32)
    moved_out_pointer = head_of(moved_out, batch, head)
    store_tile(moved_out_pointer, moved_out, start, shape.queries, VALUE_DIM, accumulator, BLOCK_M, VALUE_WIDTH)
    rows = head_of(moved_lse, batch, head) + queries.to(tl.int64) * moved_lse.row
    tl.store(rows, dlse, mask=queries < shape.queries)


def attention_tangent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    q_tangent: torch.Tensor | None = None,
    k_tangent: torch.Tensor | None = None,
    v_tangent: torch.Tensor | None = None,
    bias_tangent: torch.Tensor | None = None,
    relative_bias_tangent: torch.Tensor | None = None,
    sinks_tangent: torch.Tensor | None = None,
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
    """The tangents of attention_forward's out and lse, shaped like them.

    Arguments as there, with what it returned; each tangent in the shape and dtype of what it belongs to, None for
    zero; any strides, zero included.
    """
    batch, heads, queries, value_dim = out.shape
    moved_out = empty_heads(batch, heads, queries, value_dim, q)
    moved_lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if moved_lse.numel() == 0:
        return moved_out, moved_lse
    width = widths(q, v)
    widest = max(width["WIDTH"], width["VALUE_WIDTH"])
    precision = products(precision, q.element_size(), widest)
    moved = (None if t is None else tensor4(t) for t in (q_tangent, k_tangent, v_tangent))
    with launch.on_device(q):
        family = launch.family(attention_tangent_kernel, q.device)
        tiling = launch.look_up(
            launch.ATTENTION_TANGENT,
            family,
            q.element_size(),
            widest,
            kind_of(
                precision, (bias, relative_bias, dropout_state), (left, softcap, alibi_slopes), intervals, lists
            ),
        )
        if lists is not None:
            tiling = launch.within_granules(tiling)
        attention_tangent_kernel[(triton.cdiv(queries, tiling.block_m) * batch * heads,)](
            tensor4(q),
            tensor4(k),
            tensor4(v),
            tensor4(out),
            tensor3(lse),
            *moved,
            tensor2(sinks_tangent),
            tensor4(moved_out),
            tensor3(moved_lse),
            shape_of(q, k),
            window_of(left, right, causal, key_lengths, intervals),
            rows_of(lists, shared=False),
            scores_of(scale, softcap, alibi_slopes, bias, relative_bias, sinks, counts_keys(lists)),
            scores_of(scale, None, None, bias_tangent, relative_bias_tangent, None),
            dropout_of(dropout_state, dropout),
            launch.heads_per_section(k, v, batch * heads),
            **width,
            MASKED_FIRST=family in launch.MASKED_FIRST,
            RELATIVE=family in launch.MASKED_FIRST,
            PRECISION=precision,
            **tiling.options(),
        )
    return moved_out, moved_lse
