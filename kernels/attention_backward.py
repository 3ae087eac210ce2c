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
from .attention_forward import counts_keys, empty_heads, key_ranges, kind_of, later_are_heavier, products, widths
from .tiles import (
    GRANULE,
    LARGEST_TILE,
    LOG2_E,
    bend,
    columns_of,
    counting,
    dropout_of,
    head_of,
    heavy_first,
    kept,
    key_bounds,
    key_count_of,
    list_of,
    load_row_values,
    load_tile,
    rows_of,
    score_factor,
    score_gradient,
    scores_of,
    shape_of,
    shape_scores,
    store_tile,
    tensor3,
    tensor4,
    terms_of,
    window_of,
    words_of,
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
    flat_head = tl.program_id(1)
    batch, head = flat_head // shape.heads, flat_head % shape.heads
    start = tl.program_id(0) * BLOCK_M
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
def query_tiles(start, key_count, shape, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For the key tile at `start`, query tiles by number: the first that sees any of it, the first of those that
    see all of it, the first of those after them that do not or do not exist whole, and where all end."""
    tiles = tl.cdiv(shape.queries, BLOCK_M)
    diagonal = start - (shape.keys - shape.queries)
    first = 0
    full = 0
    whole = shape.queries // BLOCK_M
    stop = tiles
    if window.right is not None:
        earliest = diagonal - window.right
        first = tl.minimum(tl.maximum(earliest, 0) // BLOCK_M, tiles)
        full = tl.minimum(tl.cdiv(tl.maximum(earliest + BLOCK_N - 1, 0), BLOCK_M), tiles)
    if window.left is not None:
        latest = diagonal + window.left + 1
        whole = tl.minimum(whole, tl.maximum(latest, 0) // BLOCK_M)
        stop = tl.minimum(stop, tl.cdiv(tl.maximum(latest + BLOCK_N - 1, 0), BLOCK_M))
    if window.key_lengths is not None:
        # Nobody sees a tile of keys beyond the length.
        stop = tl.where(start < key_count, stop, 0)
        first = tl.minimum(first, stop)
        full = tl.minimum(full, stop)
        whole = tl.minimum(whole, stop)
    return first, full, tl.maximum(whole, full), tl.maximum(stop, full)


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
    words,
    shape,
    window,
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
    if MASKED and window is None:
        key_bits = (keys % GRANULE)[:, None]
        weights = tl.where(((words[None, :] >> key_bits) & 1) != 0, weights, 0.0)
    elif MASKED:
        # Key lengths need no mask here: what a key beyond them gets is not stored.
        offset = (keys - (shape.keys - shape.queries) - start)[:, None]
        columns = tl.arange(0, BLOCK_M)[None, :]
        if window.right is not None:
            weights = tl.where(columns >= offset - window.right, weights, 0.0)
        if window.left is not None:
            weights = tl.where(columns <= offset + window.left, weights, 0.0)
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
    """Add what the granules of one head's list give to (dk, dv) of the keys from `start` on."""
    parts: tl.constexpr = GRANULE // BLOCK_M
    values = row_values + (batch * shape.heads + head).to(tl.int64) * 2 * padded_rows
    place = (0, 0, head_of(q, batch, head), head_of(dout, batch, head), values)
    terms = terms_of(scores, dropout, batch, head)
    offsets = list_of(lists, batch, head, start)
    partial = lists.partial_offsets + offsets
    for step in tl.range(tl.load(partial) * parts, tl.load(partial + 1) * parts):
        entry = step // parts
        query_start = tl.load(lists.partial + entry) * GRANULE + (step - entry * parts) * BLOCK_M
        words = words_of(lists, entry, query_start + tl.arange(0, BLOCK_M))
        state = dkdv_step(
            state, k_tile, v_tile, place, q, dout, padded_rows, query_start, start, words, shape, window, scores,
            dropout, counting(terms, lists.partial_counts, entry),
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, True, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    full = lists.full_offsets + offsets
    for step in tl.range(tl.load(full) * parts, tl.load(full + 1) * parts):
        entry = step // parts
        query_start = tl.load(lists.full + entry) * GRANULE + (step - entry * parts) * BLOCK_M
        state = dkdv_step(
            state, k_tile, v_tile, place, q, dout, padded_rows, query_start, start, 0, shape, window, scores,
            dropout, counting(terms, lists.full_counts, entry),
            HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, False, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    return state


@triton.jit
def attention_dkdv_kernel(
    q,
    k,
    v,
    dout,
    dk,
    dv,
    row_values,
    shape,
    padded_rows,
    window,
    lists,
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
    key_tiles = tl.cdiv(shape.keys, BLOCK_N)
    all_heads = tl.num_programs(0) // key_tiles
    # The first key tiles are seen by the most rows: ascending order is heavy first.
    key_tile, flat_head = heavy_first(tl.program_id(0), key_tiles, all_heads, heads_per_section, False)
    key_heads = shape.heads // shape.group
    batch, key_head = flat_head // key_heads, flat_head % key_heads
    start = key_tile * BLOCK_N
    keys = start + tl.arange(0, BLOCK_N)

    k_tile = load_tile(head_of(k, batch, key_head), k, start, shape.keys, HEAD_DIM, BLOCK_N, WIDTH, True)
    v_tile = load_tile(head_of(v, batch, key_head), v, start, shape.keys, VALUE_DIM, BLOCK_N, VALUE_WIDTH, True)
    state = (tl.zeros([BLOCK_N, WIDTH], tl.float32), tl.zeros([BLOCK_N, VALUE_WIDTH], tl.float32))
    head = key_head * shape.group
    if lists is None:
        key_count = key_count_of(batch, shape, window)
        first, full, whole, stop = query_tiles(start, key_count, shape, window, BLOCK_M, BLOCK_N)
        # One loop runs over the tiles of all query heads of the group: short ones keep the pipeline of loads full.
        values = row_values + (batch * shape.heads + head).to(tl.int64) * 2 * padded_rows
        beginning = (0, 0, head_of(q, batch, head), head_of(dout, batch, head), values)
        # Masked are the tiles on the diagonal, first to full, and those on the window's other side or the last
        # one, if only part of it exists.
        diagonal = full - first
        masked = diagonal + stop - whole
        place = beginning
        for _ in tl.range(0, shape.group * masked):
            tile = place[0] + tl.where(place[0] < diagonal, first, whole - diagonal)
            state = dkdv_step(
                state, k_tile, v_tile, place, q, dout, padded_rows, tile * BLOCK_M, start, 0, shape, window,
                scores, dropout, terms_of(scores, dropout, batch, head + place[1]),
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, True, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
            place = next_tile(place, masked, q, dout, padded_rows)
        place = beginning
        for _ in tl.range(0, shape.group * (whole - full)):
            tile = full + place[0]
            state = dkdv_step(
                state, k_tile, v_tile, place, q, dout, padded_rows, tile * BLOCK_M, start, 0, shape, window,
                scores, dropout, terms_of(scores, dropout, batch, head + place[1]),
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, False, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
            place = next_tile(place, whole - full, q, dout, padded_rows)
    else:
        for member in tl.range(0, shape.group):
            state = dkdv_listed(
                state, k_tile, v_tile, q, dout, row_values, batch, head + member, start, shape, padded_rows,
                window, lists, scores, dropout,
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
    dk_tile, dv_tile = state
    dk_tile *= tl.cast(scores.scale, tl.float32)
    if dropout is not None:
        dv_tile *= tl.cast(dropout.growth, tl.float32)
    if lists is None and window.key_lengths is not None:
        exists = (keys < key_count_of(batch, shape, window))[:, None]
        dk_tile = tl.where(exists, dk_tile, 0.0)
        dv_tile = tl.where(exists, dv_tile, 0.0)
    store_tile(head_of(dk, batch, key_head), dk, start, shape.keys, HEAD_DIM, dk_tile, BLOCK_N, WIDTH)
    store_tile(head_of(dv, batch, key_head), dv, start, shape.keys, VALUE_DIM, dv_tile, BLOCK_N, VALUE_WIDTH)


@triton.jit
def dq_step(
    dq,
    q_tile,
    dout_tile,
    lse,
    delta,
    k_pointer,
    v_pointer,
    k,
    v,
    start,
    queries,
    bounds,
    shape,
    window,
    scores,
    dropout,
    terms,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    MASKED_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the keys from `start` on give to dq."""
    k_tile = load_tile(k_pointer, k, start, shape.keys, HEAD_DIM, BLOCK_N, WIDTH, MASKED)
    v_tile = load_tile(v_pointer, v, start, shape.keys, VALUE_DIM, BLOCK_N, VALUE_WIDTH, MASKED)
    dscores, bent = score_gradient(
        q_tile, dout_tile, lse, delta, k_tile, v_tile, start, queries, bounds, shape, window, scores, dropout,
        terms, MASKED, MASKED_FIRST, BLOCK_N, PRECISION,
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
    row_values,
    shape,
    padded_rows,
    window,
    lists,
    scores,
    dropout,
    heads_per_section,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MASKED_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(shape.queries, BLOCK_M)
    all_heads = tl.num_programs(0) // tiles
    tile, flat_head = heavy_first(tl.program_id(0), tiles, all_heads, heads_per_section, later_are_heavier(window))
    batch, head = flat_head // shape.heads, flat_head % shape.heads
    start = tile * BLOCK_M
    queries = start + tl.arange(0, BLOCK_M)

    q_tile = load_tile(head_of(q, batch, head), q, start, shape.queries, HEAD_DIM, BLOCK_M, WIDTH, True)
    dout_tile = load_tile(
        head_of(dout, batch, head), dout, start, shape.queries, VALUE_DIM, BLOCK_M, VALUE_WIDTH, True
    )
    values = row_values + flat_head.to(tl.int64) * 2 * padded_rows + queries
    lse, delta = tl.load(values), tl.load(values + padded_rows)
    k_pointer = head_of(k, batch, head // shape.group)
    v_pointer = head_of(v, batch, head // shape.group)

    terms = terms_of(scores, dropout, batch, head)

    dq_tile = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if lists is None:
        key_count = key_count_of(batch, shape, window)
        bounds = key_bounds(queries, key_count, shape, window)
        begin, full_begin, full_end, end = key_ranges(start, key_count, shape, window, BLOCK_M, BLOCK_N)
        if window.left is not None:
            for key_start in tl.range(begin, tl.minimum(full_begin, end), BLOCK_N):
                dq_tile = dq_step(
                    dq_tile, q_tile, dout_tile, lse, delta, k_pointer, v_pointer, k, v, key_start, queries, bounds,
                    shape, window, scores, dropout, terms, HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, True,
                    MASKED_FIRST, BLOCK_N, PRECISION,
                )  # fmt: skip
        for part in tl.static_range(2):
            for key_start in tl.range(
                full_end if (part == 0) == MASKED_FIRST else full_begin,
                end if (part == 0) == MASKED_FIRST else full_end,
                BLOCK_N,
            ):
                dq_tile = dq_step(
                    dq_tile, q_tile, dout_tile, lse, delta, k_pointer, v_pointer, k, v, key_start, queries, bounds,
                    shape, window, scores, dropout, terms, HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH,
                    (part == 0) == MASKED_FIRST, MASKED_FIRST, BLOCK_N, PRECISION,
                )  # fmt: skip
    else:
        parts: tl.constexpr = GRANULE // BLOCK_N
        place = list_of(lists, batch, head, start)
        partial = lists.partial_offsets + place
        for step in tl.range(tl.load(partial) * parts, tl.load(partial + 1) * parts):
            entry = step // parts
            key_start = tl.load(lists.partial + entry) * GRANULE + (step - entry * parts) * BLOCK_N
            words = words_of(lists, entry, queries)
            dq_tile = dq_step(
                dq_tile, q_tile, dout_tile, lse, delta, k_pointer, v_pointer, k, v, key_start, queries,
                (words, words), shape, window, scores, dropout, counting(terms, lists.partial_counts, entry),
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, True, MASKED_FIRST, BLOCK_N, PRECISION,
            )  # fmt: skip
        full = lists.full_offsets + place
        for step in tl.range(tl.load(full) * parts, tl.load(full + 1) * parts):
            entry = step // parts
            key_start = tl.load(lists.full + entry) * GRANULE + (step - entry * parts) * BLOCK_N
            dq_tile = dq_step(
                dq_tile, q_tile, dout_tile, lse, delta, k_pointer, v_pointer, k, v, key_start, queries, 0,
                shape, window, scores, dropout, counting(terms, lists.full_counts, entry),
                HEAD_DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, False, MASKED_FIRST, BLOCK_N, PRECISION,
            )  # fmt: skip
    dq_tile *= tl.cast(scores.scale, tl.float32)
    store_tile(head_of(dq, batch, head), dq, start, shape.queries, HEAD_DIM, dq_tile, BLOCK_M, WIDTH)


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
    shape = shape_of(q, k)
    padded_rows = triton.cdiv(queries, LARGEST_TILE) * LARGEST_TILE
    row_values = torch.empty((batch, heads, 2, padded_rows), dtype=torch.float32, device=q.device)
    width = widths(q, v)
    widest = max(width["WIDTH"], width["VALUE_WIDTH"])
    precision = products(precision, q.element_size(), widest)
    q_, k_, v_, dout_ = tensor4(q), tensor4(k), tensor4(v), tensor4(dout)
    beside = (
        row_values,
        shape,
        padded_rows,
        None if lists is not None else window_of(left, right, causal, key_lengths),
    )
    scores = scores_of(scale, softcap, alibi_slopes, bias, relative_bias, None, counts_keys(lists))
    weights = (scores, dropout_of(dropout_state, dropout))
    dbias = drelative = None
    with launch.on_device(q):
        family = launch.family(attention_dq_kernel, q.device)
        ask = (
            family,
            q.element_size(),
            widest,
            kind_of(precision, (bias, relative_bias, dropout_state), (left, softcap, alibi_slopes), lists),
        )
        fit = (lambda tiling: tiling) if lists is None else launch.within_granules
        if row_values.numel():
            attention_delta_kernel[(padded_rows // 64, batch * heads)](
                tensor4(out),
                dout_,
                tensor3(lse),
                None if dlse is None else tensor3(dlse),
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
            attention_dkdv_kernel[(triton.cdiv(keys, tiling.block_n) * batch * key_heads,)](
                q_, k_, v_, dout_, tensor4(dk), tensor4(dv), *beside, None if lists is None else columns_of(lists),
                *weights,
                launch.heads_per_section(q, dout, batch * key_heads), **common, **tiling.options(),
            )  # fmt: skip
        if dq.numel():
            tiling = fit(launch.look_up(launch.ATTENTION_DQ, *ask))
            attention_dq_kernel[(triton.cdiv(queries, tiling.block_m) * batch * heads,)](
                q_, k_, v_, dout_, tensor4(dq), *beside, None if lists is None else rows_of(lists), *weights,
                launch.heads_per_section(k, v, batch * heads), **common, **tiling.options(),
                MASKED_FIRST=family in launch.MASKED_FIRST,
            )  # fmt: skip
        tiling = launch.look_up(launch.ATTENTION_BIAS, *ask)
        given = (q, k, (q_, k_, v_, dout_), (*beside, *weights), {**common, **tiling.options()})
        if want_bias and bias is not None:
            dbias = bias_gradient(bias, *given)
        if want_relative_bias and relative_bias is not None:
            drelative = relative_bias_gradient(relative_bias, *given)
    dsinks = None if sinks is None else sink_gradient(sinks, row_values)
    return Gradients(dq, dk, dv, dbias, drelative, dsinks)


def sink_gradient(sinks: torch.Tensor, row_values: torch.Tensor) -> torch.Tensor:
    """dsinks (B, Hq): a sink's weight times what its value, zero, lacks to the row's mean: -delta."""
    lse, delta = row_values.unbind(2)
    return -(torch.exp2(sinks[..., None] * LOG2_E.value - lse) * delta).sum(-1)
