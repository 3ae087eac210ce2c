"""Attention, backward: deterministic, three passes, no atomics.

Saved from the forward: q, k, v, out and lse. Recomputed: the weights P = exp(S - lse).
  delta  one program a tile of rows: delta = rowsum(dout * out) - dlse, and lse in log2 units
  dk/dv  one program a tile of keys walks the query tiles that see it, over all query heads of its group
  dq     one program a tile of queries walks the keys it sees, as the forward does
With dS = P * (dP - delta) and dP = dout v^T: dq = scale dS k, dk = scale dS^T q, dv = P^T dout
(Dao 2023, algorithm 2; the dlse term is d lse_i / d S_ij = P_ij).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .attention_bias import bias_gradient, relative_bias_gradient
from .attention_forward import counts_keys, empty_heads, kind_of, products, widths
from .merge import argument, leave_tile, merge, parts_of, sharing_of
from .scores import bend, dropout_of, kept, score_factor, score_gradient, scores_of, shape_scores, terms_of
from .tiles import LARGEST_TILE, LOG2_E, coalesced, head_of, load_row_values, load_tile, shape_of, tensor3, tensor4
from .walk import (
    GRANULE,
    columns_of,
    counting,
    key_count_of,
    later_are_heavier,
    list_of,
    query_bounds,
    query_tiles,
    rows_of,
    sees_bit,
    share_of,
    walk_keys,
    window_of,
    words_of,
    work_of,
)


@triton.jit
def attention_delta_kernel(
    out,
    dout,
    lse,
    dlse,
    row_values,
    shape,
    padded_rows,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Per row: its lse in log2 units and its delta. Rows that saw nothing, and the padding up to a whole
    number of the largest tiles, get +inf and 0: their weights come out as exp2(-inf) = 0 with no mask."""
    tiles = padded_rows // BLOCK_M
    flat_head = tl.program_id(0) // tiles
    batch, head = flat_head // shape.heads, flat_head % shape.heads
    start = tl.program_id(0) % tiles * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    row_lse = load_row_values(head_of(lse, batch, head), lse, rows, shape.queries, float("-inf"))
    out_tile = load_tile(
        head_of(out, batch, head), out, start, shape.queries, VALUE_DIM, BLOCK_M, VALUE_WIDTH, True
    )
    dout_tile = load_tile(
        head_of(dout, batch, head), dout, start, shape.queries, VALUE_DIM, BLOCK_M, VALUE_WIDTH, True
    )
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        delta -= load_row_values(head_of(dlse, batch, head), dlse, rows, shape.queries, 0.0)
    empty = row_lse == float("-inf")
    values = row_values + flat_head.to(tl.int64) * 2 * padded_rows + rows
    tl.store(values, tl.where(empty, float("inf"), row_lse * LOG2_E))
    tl.store(values + padded_rows, tl.where(empty, 0.0, delta))


@triton.jit
def next_tile(place, tiles, q, dout, padded_rows):
    """Where to read next: the next of `tiles` query tiles, or the first one of the next head. A place is the
    tile's number, the head's within its group, and where its q, dout and row values begin. Counting is cheaper
    than dividing."""
    tile, member, q_pointer, dout_pointer, values = place
    last = tile + 1 == tiles
    return (
        tl.where(last, 0, tile + 1),
        member + tl.where(last, 1, 0),
        q_pointer + tl.where(last, q.head, 0),
        dout_pointer + tl.where(last, dout.head, 0),
        values + tl.where(last, 2 * padded_rows, 0),
    )


@triton.jit
def tile_at(number, tiles, beginning, q, dout, padded_rows):
    """The place that `next_tile` comes to after `number` times."""
    _, _, q_pointer, dout_pointer, values = beginning
    member = (number // tl.maximum(tiles, 1)).to(tl.int64)
    return (
        number % tl.maximum(tiles, 1),
        number // tl.maximum(tiles, 1),
        q_pointer + member * q.head,
        dout_pointer + member * dout.head,
        values + member * 2 * padded_rows,
    )


@triton.jit
def dkdv_step(
    state,
    k_tile,
    v_tile,
    place,
    q,
    dout,
    padded_rows,
    start,
    key_start,
    bounds,
    shape,
    window,
    lists,
    scores,
    dropout,
    terms,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what one head's queries from `start` on give to (dk, dv); scores stand transposed, keys down, so that
    both products take them as they are."""
    dk, dv = state
    _, _, q_pointer, dout_pointer, row_values = place
    queries = start + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q_pointer, q, start, shape.queries, HEAD_DIM, BLOCK_M, WIDTH, MASKED)
    dout_tile = load_tile(dout_pointer, dout, start, shape.queries, VALUE_DIM, BLOCK_M, VALUE_WIDTH, MASKED)
    # Both products first: the second one runs while the weights are made from the first.
    products = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
    dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
    keys = key_start + tl.arange(0, BLOCK_N)
    bent = bend(products, scores)
    values = shape_scores(bent, scores, terms, queries[None, :], keys[:, None], shape)
    lse = tl.load(row_values + queries)
    weights = tl.exp2(values * score_factor(scores) - lse[None, :])
    if MASKED and lists.full is not None:
        # The bounds are a word for each query, whose bits say which keys of the granule it sees.
        weights = tl.where(sees_bit(bounds[None, :], (keys % GRANULE)[:, None]), weights, 0.0)
    elif MASKED:
        # Key lengths need no mask here: what a key beyond them gets is not stored.
        offset = (keys - (shape.keys - shape.queries) - start)[:, None]
        columns = tl.arange(0, BLOCK_M)[None, :]
        if window.right is not None:
            weights = tl.where(columns >= offset - window.right, weights, 0.0)
        if window.left is not None:
            weights = tl.where(columns <= offset + window.left, weights, 0.0)
        if window.intervals is not None:
            seen = (columns >= (bounds[0] - start)[:, None]) & (columns < (bounds[1] - start)[:, None])
            weights = tl.where(seen, weights, 0.0)
    delta = tl.load(row_values + padded_rows + queries)
    kept_weights = weights
    if dropout is not None:
        keep = kept(dropout, terms, queries, key_start, BLOCK_N, True)
        kept_weights = tl.where(keep, weights, 0.0)
        dweights = tl.where(keep, dweights * tl.cast(dropout.growth, tl.float32), 0.0)
    dscores = weights * (dweights - delta[None, :])
    if scores.softcap is not None:
        dscores *= 1.0 - bent * bent
    dv = tl.dot(kept_weights.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
    dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkdv_listed(
    state,
    k_tile,
    v_tile,
    q,
    dout,
    row_values,
    batch,
    head,
    start,
    work,
    shape,
    padded_rows,
    window,
    lists,
    scores,
    dropout,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the granules of one head's list, or this program's share of them, give to (dk, dv) of the keys from
    `start` on."""
    parts: tl.constexpr = GRANULE // BLOCK_M
    values = row_values + (batch * shape.heads + head).to(tl.int64) * 2 * padded_rows
    place = (0, 0, head_of(q, batch, head), head_of(dout, batch, head), values)
    terms = terms_of(scores, dropout, batch, head)
    offsets = list_of(lists, batch, head, start)
    partial, full = lists.partial_offsets + offsets, lists.full_offsets + offsets
    low, high = share_of(tl.load(partial), tl.load(partial + 1), work, lists.items)
    for number in tl.range(low * parts, high * parts):
        entry = number // parts
        query_start = tl.load(lists.partial + entry) * GRANULE + (number - entry * parts) * BLOCK_M
        words = words_of(lists, entry, query_start + tl.arange(0, BLOCK_M))
        state = dkdv_step(
            state, k_tile, v_tile, place, q, dout, padded_rows, query_start, start, words, shape, window, lists,
            scores, dropout, counting(terms, lists.partial_counts, entry),
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, True, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    low, high = share_of(tl.load(full), tl.load(full + 1), work, lists.items)
    for number in tl.range(low * parts, high * parts):
        entry = number // parts
        query_start = tl.load(lists.full + entry) * GRANULE + (number - entry * parts) * BLOCK_M
        state = dkdv_step(
            state, k_tile, v_tile, place, q, dout, padded_rows, query_start, start, 0, shape, window, lists,
            scores, dropout, counting(terms, lists.full_counts, entry),
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, False, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    return state


@triton.jit
def dkdv_ranged(
    state,
    k_tile,
    v_tile,
    q,
    dout,
    row_values,
    batch,
    head,
    start,
    work,
    shape,
    padded_rows,
    window,
    lists,
    splits,
    scores,
    dropout,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the queries within bounds, or this program's share of them, give to (dk, dv) of the keys from
    `start` on; `head` is the first of the group's.

    One loop runs over the tiles of all query heads of the group: short ones keep the pipeline of loads full.
    """
    key_count = key_count_of(batch, shape, window)
    bounds = query_bounds(start + tl.arange(0, BLOCK_N), batch, shape, window)
    first, full, whole, stop = query_tiles(start, bounds, key_count, shape, window, BLOCK_M, BLOCK_N)
    values = row_values + (batch * shape.heads + head).to(tl.int64) * 2 * padded_rows
    beginning = (0, 0, head_of(q, batch, head), head_of(dout, batch, head), values)
    # Masked are the tiles on the diagonal, first to full, and those on the window's other side or the last one, if
    # only part of it exists.
    diagonal = full - first
    masked = diagonal + stop - whole
    place = beginning
    low, high = share_of(0, shape.group * masked, work, splits)
    if splits is not None:
        place = tile_at(low, masked, beginning, q, dout, padded_rows)
    for _ in tl.range(low, high):
        tile = place[0] + tl.where(place[0] < diagonal, first, whole - diagonal)
        state = dkdv_step(
            state, k_tile, v_tile, place, q, dout, padded_rows, tile * BLOCK_M, start, bounds, shape, window,
            lists, scores, dropout, terms_of(scores, dropout, batch, head + place[1]),
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, True, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        place = next_tile(place, masked, q, dout, padded_rows)
    place = beginning
    low, high = share_of(0, shape.group * (whole - full), work, splits)
    if splits is not None:
        place = tile_at(low, whole - full, beginning, q, dout, padded_rows)
    for _ in tl.range(low, high):
        tile = full + place[0]
        state = dkdv_step(
            state, k_tile, v_tile, place, q, dout, padded_rows, tile * BLOCK_M, start, bounds, shape, window,
            lists, scores, dropout, terms_of(scores, dropout, batch, head + place[1]),
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, False, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        place = next_tile(place, whole - full, q, dout, padded_rows)
    return state


@triton.jit
def attention_dkdv_kernel(
    q,
    k,
    v,
    dout,
    dk,
    dv,
    dk_parts,
    dv_parts,
    row_values,
    shape,
    padded_rows,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The first key tiles are seen by the most rows: ascending order is heavy first.
    start, batch, key_head, work = work_of(
        shape.keys, shape.heads // shape.group, lists, splits, heads_per_section, False, BLOCK_N
    )
    keys = start + tl.arange(0, BLOCK_N)
    key_count = key_count_of(batch, shape, window)
    k_tile = load_tile(head_of(k, batch, key_head), k, start, key_count, HEAD_DIM, BLOCK_N, WIDTH, True)
    v_tile = load_tile(head_of(v, batch, key_head), v, start, key_count, VALUE_DIM, BLOCK_N, VALUE_WIDTH, True)
    state = (tl.zeros([BLOCK_N, WIDTH], tl.float32), tl.zeros([BLOCK_N, VALUE_WIDTH], tl.float32))
    head = key_head * shape.group
    if lists.full is None:
        state = dkdv_ranged(
            state, k_tile, v_tile, q, dout, row_values, batch, head, start, work, shape, padded_rows, window,
            lists, splits, scores, dropout, HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    else:
        for member in tl.range(0, shape.group):
            state = dkdv_listed(
                state, k_tile, v_tile, q, dout, row_values, batch, head + member, start, work, shape, padded_rows,
                window, lists, scores, dropout,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    dk_tile, dv_tile = state
    dk_tile *= tl.cast(scores.scale, tl.float32)
    if dropout is not None:
        dv_tile *= tl.cast(dropout.growth, tl.float32)
    if window.key_lengths is not None:
        exists = (keys < key_count)[:, None]
        dk_tile = tl.where(exists, dk_tile, 0.0)
        dv_tile = tl.where(exists, dv_tile, 0.0)
    leave_tile(
        dk, dk_parts, dk_tile, batch, key_head, start, shape.keys, work, shape, lists, HEAD_DIM, BLOCK_N, WIDTH
    )
    leave_tile(
        dv, dv_parts, dv_tile, batch, key_head, start, shape.keys, work, shape, lists, VALUE_DIM, BLOCK_N,
        VALUE_WIDTH,
    )  # fmt: skip


@triton.jit
def dq_step(
    dq,
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
    """Add what the keys from `start` on give to dq."""
    q_tile, dout_tile, lse, delta, k_pointer, v_pointer, k, v, scores, dropout = given
    k_tile = load_tile(k_pointer, k, start, key_count, HEAD_DIM, BLOCK_N, WIDTH, MASKED)
    v_tile = load_tile(v_pointer, v, start, key_count, VALUE_DIM, BLOCK_N, VALUE_WIDTH, MASKED)
    dscores, bent = score_gradient(
        q_tile, dout_tile, lse, delta, k_tile, v_tile, start, queries, bounds, shape, window, lists, scores,
        dropout, terms, MASKED, RELATIVE, BLOCK_N, PRECISION,
    )  # fmt: skip
    if scores.softcap is not None:
        dscores *= 1.0 - bent * bent
    return tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)


@triton.jit
def attention_dq_kernel(
    q,
    k,
    v,
    dout,
    dq,
    parts,
    row_values,
    shape,
    padded_rows,
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
    q_tile = load_tile(head_of(q, batch, head), q, start, shape.queries, HEAD_DIM, BLOCK_M, WIDTH, True)
    dout_tile = load_tile(
        head_of(dout, batch, head), dout, start, shape.queries, VALUE_DIM, BLOCK_M, VALUE_WIDTH, True
    )
    values = (
        row_values + (batch * shape.heads + head).to(tl.int64) * 2 * padded_rows + start + tl.arange(0, BLOCK_M)
    )
    lse, delta = tl.load(values), tl.load(values + padded_rows)
    k_pointer = head_of(k, batch, head // shape.group)
    v_pointer = head_of(v, batch, head // shape.group)
    terms = terms_of(scores, dropout, batch, head)

    dq_tile = walk_keys(
        dq_step, tl.zeros([BLOCK_M, WIDTH], tl.float32),
        (q_tile, dout_tile, lse, delta, k_pointer, v_pointer, k, v, scores, dropout), terms,
        start, batch, head, work, shape, window, lists, splits,
        HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, MASKED_FIRST, RELATIVE, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq_tile *= tl.cast(scores.scale, tl.float32)
    leave_tile(dq, parts, dq_tile, batch, head, start, shape.queries, work, shape, lists, HEAD_DIM, BLOCK_M, WIDTH)


class Gradients(NamedTuple):
    """Of q, k and v in their shapes and dtype; of what was given and wanted of bias, relative bias and sinks."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    relative_bias: torch.Tensor | None
    sinks: torch.Tensor | None


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
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
    want_bias: bool = False,
    want_relative_bias: bool = False,
) -> Gradients:
    """Gradients of attention_forward's (out, lse) with respect to q, k, v, the biases if wanted, and the sinks.

    Arguments as there; dout like out, dlse like lse or None; any strides, zero included.
    """
    batch, heads, queries, head_dim = q.shape
    key_heads, keys, value_dim = v.shape[1], v.shape[2], v.shape[3]
    dq = empty_heads(batch, heads, queries, head_dim, q)
    dk = empty_heads(batch, key_heads, keys, head_dim, k)
    dv = empty_heads(batch, key_heads, keys, value_dim, v)
    dout = coalesced(dout)
    shape = shape_of(q, k)
    padded_rows = triton.cdiv(queries, LARGEST_TILE) * LARGEST_TILE
    row_values = torch.empty((batch, heads, 2, padded_rows), dtype=torch.float32, device=q.device)
    width = widths(q, v)
    widest = max(width["WIDTH"], width["VALUE_WIDTH"])
    precision = products(precision, q.element_size(), widest)
    q_, k_, v_, dout_ = tensor4(q), tensor4(k), tensor4(v), tensor4(dout)
    window = window_of(left, right, causal, key_lengths, intervals)
    weights = (
        scores_of(scale, softcap, alibi_slopes, bias, relative_bias, None, counts_keys(lists)),
        dropout_of(dropout_state, dropout),
    )
    dbias = drelative = None
    with launch.on_device(q):
        family = launch.family(attention_dq_kernel, q.device)
        processors = launch.processors(family, q.device)
        ask = (
            family,
            q.element_size(),
            widest,
            kind_of(
                precision, (bias, relative_bias, dropout_state), (left, softcap, alibi_slopes), intervals, lists
            ),
        )
        fit = (lambda tiling: tiling) if lists is None else launch.within_granules
        if row_values.numel():
            attention_delta_kernel[(padded_rows // 64 * batch * heads,)](
                tensor4(out),
                dout_,
                tensor3(lse),
                None if dlse is None else tensor3(dlse.contiguous()),
                row_values,
                shape,
                padded_rows,
                VALUE_DIM=width["VALUE_DIM"],
                VALUE_WIDTH=width["VALUE_WIDTH"],
                BLOCK_M=64,
                num_warps=8,
                **launch.COMPILER_OPTIONS,
            )
        common = {**width, "PRECISION": precision}
        if dv.numel():
            tiling = fit(launch.look_up(launch.ATTENTION_DKDV, *ask))
            listed = columns_of(lists)
            sharing = sharing_of(
                listed, None if lists is None else lists.column_merges, keys, tiling.block_n, batch * key_heads,
                triton.cdiv(queries, tiling.block_m) * (heads // key_heads), processors,
            )  # fmt: skip
            dk_parts, dv_parts = parts_of(sharing, dk), parts_of(sharing, dv)
            attention_dkdv_kernel[(sharing.programs * batch * key_heads,)](
                q_, k_, v_, dout_, tensor4(dk), tensor4(dv), argument(dk_parts), argument(dv_parts), row_values,
                shape, padded_rows, window, listed, sharing.splits, *weights,
                launch.heads_per_section(q, dout, batch * key_heads), **common, **tiling.options(),
            )  # fmt: skip
            merge(sharing, dk_parts, dk)
            merge(sharing, dv_parts, dv)
        if dq.numel():
            tiling = fit(launch.look_up(launch.ATTENTION_DQ, *ask))
            listed = rows_of(lists)
            sharing = sharing_of(
                listed, None if lists is None else lists.row_merges, queries, tiling.block_m, batch * heads,
                triton.cdiv(keys, tiling.block_n), processors,
            )  # fmt: skip
            parts = parts_of(sharing, dq)
            attention_dq_kernel[(sharing.programs * batch * heads,)](
                q_, k_, v_, dout_, tensor4(dq), argument(parts), row_values, shape, padded_rows, window, listed,
                sharing.splits, *weights,
                launch.heads_per_section(k, v, batch * heads), **common, **tiling.options(),
                MASKED_FIRST=family in launch.MASKED_FIRST,
                RELATIVE=family in (launch.PLAIN_DQ_RELATIVE if ask[-1] == "plain" else launch.MASKED_FIRST),
            )  # fmt: skip
            merge(sharing, parts, dq)
        tiling = fit(launch.look_up(launch.ATTENTION_BIAS, *ask))
        listed = rows_of(lists, shared=False)
        beside = (row_values, shape, padded_rows, window, listed, *weights)
        given = (q, k, (q_, k_, v_, dout_), beside, {**common, **tiling.options()})
        if want_bias and bias is not None:
            dbias = bias_gradient(bias, *given, processors)
        if want_relative_bias and relative_bias is not None:
            drelative = relative_bias_gradient(relative_bias, *given)
    dsinks = None if sinks is None else sink_gradient(sinks, row_values)
    return Gradients(dq, dk, dv, dbias, drelative, dsinks)


def sink_gradient(sinks: torch.Tensor, row_values: torch.Tensor) -> torch.Tensor:
    """dsinks (B, Hq): a sink's weight times what its value, zero, lacks to the row's mean: -delta."""
    lse, delta = row_values.unbind(2)
    return -(torch.exp2(sinks[..., None] * LOG2_E.value - lse) * delta).sum(-1)
