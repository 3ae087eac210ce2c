"""Attention, backward: deterministic, three passes, no atomics.

Saved from the forward: q, k, v, out and lse. Recomputed: the weights P = exp(S - lse).
  delta  one program a tile of rows: delta = rowsum(dout * out) - dlse, see row_values.py
  dk/dv  one program a tile of keys loops over the query tiles that see it, of all query heads of its group
  dq     one program a tile of queries loops over the keys it sees, as the forward does
With dS = P * (dP - delta) and dP = dout v^T: dq = scale dS k, dk = scale dS^T q, dv = P^T dout
(Dao 2023, algorithm 2; the dlse term is d lse_i / d S_ij = P_ij). Where each head has a scale s of its own:
dq = s scale dS k, and ds is the sum of q * (scale dS k).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import launch
from ..tiles import LOG2_E, coalesced, head_of, in_units, load_tile, tensor3, tensor4
from .bias import bias_gradient, relative_bias_gradient
from .loops import (
    GRANULE,
    columns_of,
    is_bit_set,
    key_count_of,
    later_are_heavier,
    list_of,
    loop_over_keys,
    loop_over_keys_ahead,
    part_of_range,
    position_of,
    query_bounds,
    query_tiles,
    rows_of,
    with_multiplicity,
    words_of,
)
from .problem import Call, empty_heads
from .row_values import RowValues, load_remainder, load_rows, row_values_of
from .row_values import row_values as row_values_for
from .scores import (
    cap,
    finish_scores,
    keep_mask,
    load_score_terms,
    score_gradient,
    score_gradient_of,
    softmax_weights,
)
from .splits import argument, merge, partials_of, splits_of, store_result, store_row_values


@triton.jit
def next_tile(cursor, tiles, q, dout, row_values):
    """Where to read next: the next of `tiles` query tiles, or the first one of the next head. A cursor is the
    tile's number, the head's within its group, and where its q, dout and row values begin. Counting is cheaper
    than dividing."""
    number, member, q_pointer, dout_pointer, values = cursor
    last = number + 1 == tiles
    return (
        tl.where(last, 0, number + 1),
        member + tl.where(last, 1, 0),
        q_pointer + tl.where(last, in_units(q.head, q.unit), 0),
        dout_pointer + tl.where(last, in_units(dout.head, dout.unit), 0),
        values + tl.where(last, row_values.head, 0),
    )


@triton.jit
def tile_at(number, tiles, beginning, q, dout, row_values):
    """The cursor that `next_tile` comes to after `number` times."""
    _, _, q_pointer, dout_pointer, values = beginning
    member = (number // tl.maximum(tiles, 1)).to(tl.int64)
    return (
        number % tl.maximum(tiles, 1),
        number // tl.maximum(tiles, 1),
        q_pointer + member * in_units(q.head, q.unit),
        dout_pointer + member * in_units(dout.head, dout.unit),
        values + member * row_values.head,
    )


@triton.jit
def dkdv_step(
    state,
    operands,
    score_terms,
    cursor,
    start,
    key_start,
    bounds,
    problem,
    tile: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what one head's queries from `start` on give to (dk, dv); scores stand transposed, keys down, so that
    both products take them as they are."""
    dk, dv = state
    k_tile, v_tile, q, dout, padded_rows = operands
    _, _, q_pointer, dout_pointer, row_values = cursor
    shape, window, scores = problem.shape, problem.window, problem.scores
    queries = start + tl.arange(0, tile.BLOCK_M)
    q_tile = load_tile(q_pointer, q, start, shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, MASKED)
    dout_tile = load_tile(
        dout_pointer, dout, start, shape.queries, tile.VALUE_DIM, tile.BLOCK_M, tile.VALUE_WIDTH, MASKED
    )
    products = tl.dot(k_tile, tl.trans(q_tile), input_precision=tile.PRECISION)
    # If row values are loaded before the second product, the exponentials can run beside it. Masked tiles have no
    # registers left for that.
    if tile.AHEAD and not MASKED:
        lse = tl.load(row_values + queries)
        remainder = load_remainder(row_values + queries, padded_rows, scores)
    dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision=tile.PRECISION)
    keys = key_start + tl.arange(0, tile.BLOCK_N)
    capped = cap(products, scores, score_terms)
    values = finish_scores(capped, scores, score_terms, queries[None, :], keys[:, None], shape)
    if MASKED or not tile.AHEAD:
        lse = tl.load(row_values + queries)
        remainder = load_remainder(row_values + queries, padded_rows, scores)
    weights = softmax_weights(values, scores, lse[None, :], remainder[None, :])
    if MASKED and problem.lists.full is not None:
        # The bounds are a word for each query, whose bits say which keys of the granule it sees.
        weights = tl.where(is_bit_set(bounds[None, :], (keys % GRANULE)[:, None]), weights, 0.0)
    elif MASKED:
        # Key lengths need no mask here: what a key beyond them gets is not stored.
        offset = (keys - (shape.keys - shape.queries) - start)[:, None]
        columns = tl.arange(0, tile.BLOCK_M)[None, :]
        if window.right is not None:
            weights = tl.where(columns >= offset - window.right, weights, 0.0)
        if window.left is not None:
            weights = tl.where(columns <= offset + window.left, weights, 0.0)
        if window.intervals is not None:
            seen = (columns >= (bounds[0] - start)[:, None]) & (columns < (bounds[1] - start)[:, None])
            weights = tl.where(seen, weights, 0.0)
    delta = tl.load(row_values + padded_rows + queries)
    kept_weights = weights
    if problem.dropout is not None:
        keep = keep_mask(problem.dropout, score_terms, queries, key_start, tile.BLOCK_N, True)
        kept_weights = tl.where(keep, weights, 0.0)
        dweights = tl.where(keep, dweights * tl.cast(problem.dropout.growth, tl.float32), 0.0)
    dscores = weights * (dweights - delta[None, :])
    if scores.softcap is not None:
        dscores *= 1.0 - capped * capped
    if scores.head_scale is not None:
        # The heads of a group have scales of their own.
        dscores *= score_terms[7]
    dv = tl.dot(kept_weights.to(dout_tile.dtype), dout_tile, dv, input_precision=tile.PRECISION)
    dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision=tile.PRECISION)
    return dk, dv


@triton.jit
def dkdv_by_lists(state, operands, row_values, position, problem, tile: tl.constexpr):
    """Add what the granules of one head's list, or this program's split of them, give to (dk, dv) of the keys from
    the position's start on."""
    start, batch, head, split = position
    _, _, q, dout, _ = operands
    lists = problem.lists
    pieces: tl.constexpr = GRANULE // tile.BLOCK_M
    values = row_values_of(row_values, batch, head, problem.shape)
    cursor = (0, 0, head_of(q, batch, head), head_of(dout, batch, head), values)
    score_terms = load_score_terms(problem.scores, problem.dropout, batch, head)
    column = list_of(lists, batch, head, start)
    partial, full = lists.partial_offsets + column, lists.full_offsets + column
    low, high = part_of_range(tl.load(partial), tl.load(partial + 1), split, lists.items)
    for number in tl.range(low * pieces, high * pieces):
        entry = number // pieces
        query_start = tl.load(lists.partial + entry) * GRANULE + (number - entry * pieces) * tile.BLOCK_M
        words = words_of(lists, entry, query_start + tl.arange(0, tile.BLOCK_M))
        entry_terms = with_multiplicity(score_terms, lists.partial_counts, entry)
        state = dkdv_step(state, operands, entry_terms, cursor, query_start, start, words, problem, tile, True)
    low, high = part_of_range(tl.load(full), tl.load(full + 1), split, lists.items)
    for number in tl.range(low * pieces, high * pieces):
        entry = number // pieces
        query_start = tl.load(lists.full + entry) * GRANULE + (number - entry * pieces) * tile.BLOCK_M
        entry_terms = with_multiplicity(score_terms, lists.full_counts, entry)
        state = dkdv_step(state, operands, entry_terms, cursor, query_start, start, 0, problem, tile, False)
    return state


@triton.jit
def dkdv_by_ranges(state, operands, row_values, position, problem, tile: tl.constexpr):
    """Add what the queries within bounds, or this program's split of them, give to (dk, dv) of the keys from the
    position's start on; its head is the first of the group's.

    One loop runs over the tiles of all query heads of the group: short ones keep the pipeline of loads full.
    """
    start, batch, head, split = position
    _, _, q, dout, _ = operands
    shape, splits = problem.shape, problem.splits
    bounds = query_bounds(start + tl.arange(0, tile.BLOCK_N), batch, problem)
    first, full, whole, stop = query_tiles(start, bounds, key_count_of(batch, problem), problem, tile)
    values = row_values_of(row_values, batch, head, shape)
    beginning = (0, 0, head_of(q, batch, head), head_of(dout, batch, head), values)
    # Masked are the tiles on the diagonal, first to full, and those on the window's other side or the last one, if
    # only part of it exists.
    diagonal = full - first
    masked = diagonal + stop - whole
    cursor = beginning
    low, high = part_of_range(0, shape.group * masked, split, splits)
    if splits is not None:
        cursor = tile_at(low, masked, beginning, q, dout, row_values)
    for _ in tl.range(low, high):
        number = cursor[0] + tl.where(cursor[0] < diagonal, first, whole - diagonal)
        score_terms = load_score_terms(problem.scores, problem.dropout, batch, head + cursor[1])
        state = dkdv_step(
            state, operands, score_terms, cursor, number * tile.BLOCK_M, start, bounds, problem, tile, True
        )
        cursor = next_tile(cursor, masked, q, dout, row_values)
    cursor = beginning
    low, high = part_of_range(0, shape.group * (whole - full), split, splits)
    if splits is not None:
        cursor = tile_at(low, whole - full, beginning, q, dout, row_values)
    for _ in tl.range(low, high):
        number = full + cursor[0]
        score_terms = load_score_terms(problem.scores, problem.dropout, batch, head + cursor[1])
        state = dkdv_step(
            state, operands, score_terms, cursor, number * tile.BLOCK_M, start, bounds, problem, tile, False
        )
        cursor = next_tile(cursor, whole - full, q, dout, row_values)
    return state


@triton.jit
def attention_dkdv_kernel(
    q, k, v, dout, dk, dv, dk_partials, dv_partials, row_values, problem, tile: tl.constexpr
):
    shape = problem.shape
    # The first key tiles are seen by the most rows: ascending order is heavy first.
    position = position_of(shape.keys, shape.heads // shape.group, problem, False, tile.BLOCK_N)
    start, batch, key_head, split = position
    keys = start + tl.arange(0, tile.BLOCK_N)
    k_pointer, v_pointer = head_of(k, batch, key_head), head_of(v, batch, key_head)
    key_count = key_count_of(batch, problem)
    k_tile = load_tile(k_pointer, k, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, True)
    v_tile = load_tile(v_pointer, v, start, key_count, tile.VALUE_DIM, tile.BLOCK_N, tile.VALUE_WIDTH, True)
    state = (
        tl.zeros([tile.BLOCK_N, tile.WIDTH], tl.float32),
        tl.zeros([tile.BLOCK_N, tile.VALUE_WIDTH], tl.float32),
    )
    operands = (k_tile, v_tile, q, dout, row_values.rows)
    head = key_head * shape.group
    if problem.lists.full is None:
        state = dkdv_by_ranges(state, operands, row_values, (start, batch, head, split), problem, tile)
    else:
        for member in tl.range(0, shape.group):
            state = dkdv_by_lists(state, operands, row_values, (start, batch, head + member, split), problem, tile)
    dk_tile, dv_tile = state
    dk_tile *= tl.cast(problem.scores.scale, tl.float32)
    if problem.dropout is not None:
        dv_tile *= tl.cast(problem.dropout.growth, tl.float32)
    if problem.window.key_lengths is not None:
        exists = (keys < key_count)[:, None]
        dk_tile = tl.where(exists, dk_tile, 0.0)
        dv_tile = tl.where(exists, dv_tile, 0.0)
    store_result(dk, dk_partials, dk_tile, position, shape.keys, problem, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH)
    store_result(
        dv, dv_partials, dv_tile, position, shape.keys, problem, tile.VALUE_DIM, tile.BLOCK_N, tile.VALUE_WIDTH
    )


@triton.jit
def dq_step(
    dq, operands, score_terms, start, queries, bounds, key_count, problem, tile: tl.constexpr, MASKED: tl.constexpr
):
    """Add what the keys from `start` on give to dq."""
    rows, k_pointer, v_pointer, k, v = operands
    k_tile = load_tile(k_pointer, k, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, MASKED)
    v_tile = load_tile(v_pointer, v, start, key_count, tile.VALUE_DIM, tile.BLOCK_N, tile.VALUE_WIDTH, MASKED)
    dscores, capped = score_gradient(
        rows, k_tile, v_tile, start, queries, bounds, score_terms, problem, tile, MASKED
    )
    if problem.scores.softcap is not None:
        dscores *= 1.0 - capped * capped
    return tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision=tile.PRECISION)


@triton.jit
def dq_products(operands, start, key_count, tile: tl.constexpr, EDGE: tl.constexpr):
    """q k^T of the keys from `start` on."""
    rows, k_pointer, _, k, _ = operands
    k_tile = load_tile(k_pointer, k, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, EDGE)
    return tl.dot(rows[0], tl.trans(k_tile), input_precision=tile.PRECISION)


@triton.jit
def dq_from_products(
    dq,
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
    """`dq_step`, from the products q k^T."""
    rows, k_pointer, v_pointer, k, v = operands
    v_tile = load_tile(v_pointer, v, start, key_count, tile.VALUE_DIM, tile.BLOCK_N, tile.VALUE_WIDTH, MASKED)
    dweights = tl.dot(rows[1], tl.trans(v_tile), input_precision=tile.PRECISION)
    dscores, capped = score_gradient_of(
        products, dweights, rows[2], start, queries, bounds, score_terms, problem, tile, MASKED
    )
    if problem.scores.softcap is not None:
        dscores *= 1.0 - capped * capped
    # A second time: the copy for the products may be gone.
    k_tile = load_tile(k_pointer, k, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, MASKED)
    return tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision=tile.PRECISION)


@triton.jit
def attention_dq_kernel(
    q, k, v, dout, dq, partials, dscale, dscale_partials, row_values, problem, tile: tl.constexpr
):
    """`dscale` is what each row gives to the gradient of its head's scale; None without such scales."""
    shape = problem.shape
    position = position_of(shape.queries, shape.heads, problem, later_are_heavier(problem), tile.BLOCK_M)
    start, batch, head, _split = position
    q_pointer, dout_pointer = head_of(q, batch, head), head_of(dout, batch, head)
    q_tile = load_tile(q_pointer, q, start, shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, True)
    dout_tile = load_tile(
        dout_pointer, dout, start, shape.queries, tile.VALUE_DIM, tile.BLOCK_M, tile.VALUE_WIDTH, True
    )
    values = row_values_of(row_values, batch, head, shape) + start + tl.arange(0, tile.BLOCK_M)
    rows = (q_tile, dout_tile, load_rows(values, row_values.rows, problem.scores))
    k_pointer = head_of(k, batch, head // shape.group)
    v_pointer = head_of(v, batch, head // shape.group)
    score_terms = load_score_terms(problem.scores, problem.dropout, batch, head)

    dq_tile = tl.zeros([tile.BLOCK_M, tile.WIDTH], tl.float32)
    operands = (rows, k_pointer, v_pointer, k, v)
    if tile.AHEAD:
        dq_tile = loop_over_keys_ahead(
            dq_products, dq_from_products, dq_tile, operands, score_terms, position, problem, tile
        )
    else:
        dq_tile = loop_over_keys(dq_step, dq_tile, operands, score_terms, position, problem, tile)
    dq_tile *= tl.cast(problem.scores.scale, tl.float32)
    if dscale is not None:
        row_dscale = tl.sum(dq_tile * q_tile.to(tl.float32), 1)
        store_row_values(dscale, dscale_partials, row_dscale, position, shape.queries, problem, tile.BLOCK_M)
        dq_tile *= score_terms[7]
    store_result(dq, partials, dq_tile, position, shape.queries, problem, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH)


class Gradients(NamedTuple):
    """Of q, k and v in their shapes and dtype; of what was given and wanted of bias, relative bias, sinks and
    scales of heads."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    relative_bias: torch.Tensor | None
    sinks: torch.Tensor | None
    head_scale: torch.Tensor | None


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    saved: tuple,
    spec: Any,
    tensors: Any,
    wanted: Any,
    lists: Any = None,
    tilings: Mapping[str, launch.Tiling] | None = None,
) -> Gradients:
    """Gradients of attention_forward's (out, lse) with respect to q, k, v, the biases if wanted, sinks and scales.

    `saved` is (q, k, v, out, lse). dout is like out, dlse like lse or None; any strides, zero included. `wanted`
    says which of the gradients of bias and relative_bias to compute. `tilings` as `Call` says.
    """
    q, k, v, out, lse = saved
    dout = coalesced(dout)
    with launch.on_device(q):
        call = Call(attention_dq_kernel, q, k, v, spec, tensors, lists, tilings)
        operands = (tensor4(q), tensor4(k), tensor4(v), tensor4(dout))
        row_values = row_values_for(call, operands[:2], dout, out, lse, dlse)
        dk, dv = _dkdv(call, dout, operands, row_values)
        dq, dscale = _dq(call, operands, row_values)
        dbias = drelative = None
        if wanted.bias and tensors.bias is not None:
            dbias = bias_gradient(call, operands, row_values)
        if wanted.relative_bias and tensors.relative_bias is not None:
            drelative = relative_bias_gradient(call, operands, row_values)
    dsinks = None if tensors.sinks is None else _sink_gradient(call, tensors.sinks, row_values)
    return Gradients(dq, dk, dv, dbias, drelative, dsinks, dscale)


def _dkdv(call: Call, dout: torch.Tensor, operands: tuple, row_values: RowValues) -> tuple:
    batch, key_heads, keys, value_dim = call.v.shape
    queries, head_dim, group = call.q.shape[2], call.q.shape[3], call.shape.group
    dk = empty_heads(batch, key_heads, keys, head_dim, call.k)
    dv = empty_heads(batch, key_heads, keys, value_dim, call.v)
    if dv.numel():
        tiling, columns = call.tiling(launch.ATTENTION_DKDV), columns_of(call.lists)
        splits = splits_of(
            columns, None if call.lists is None else call.lists.column_merges, keys, tiling.block_n,
            batch * key_heads, triton.cdiv(queries, tiling.block_m) * group, call.processors,
        )  # fmt: skip
        dk_partials, dv_partials = partials_of(splits, dk), partials_of(splits, dv)
        launch.start(
            attention_dkdv_kernel,
            (splits.programs * batch * key_heads,),
            *operands,
            tensor4(dk),
            tensor4(dv),
            argument(dk_partials),
            argument(dv_partials),
            row_values,
            call.problem(columns, splits.count, launch.heads_per_section(call.q, dout, batch * key_heads)),
            tile=call.tile(tiling, AHEAD=tiling.ahead),
            **tiling.compiler_options(),
        )
        merge(splits, dk_partials, dk)
        merge(splits, dv_partials, dv)
    return dk, dv


def _dq(call: Call, operands: tuple, row_values: RowValues) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of q and of the scales of heads."""
    batch, heads, queries, head_dim = call.q.shape
    dq = empty_heads(batch, heads, queries, head_dim, call.q)
    dscale = dscale_partials = None
    if call.tensors.head_scale is not None:
        # Rows that are split are left out here, and are found among the partial results.
        dscale = torch.zeros((batch, heads, queries), dtype=torch.float32, device=dq.device)
    if dq.numel():
        tiling, rows = call.tiling(launch.ATTENTION_DQ), rows_of(call.lists)
        splits = splits_of(
            rows, None if call.lists is None else call.lists.row_merges, queries, tiling.block_m, batch * heads,
            triton.cdiv(call.k.shape[2], tiling.block_n), call.processors,
        )  # fmt: skip
        partials = partials_of(splits, dq)
        dscale_partials = None if dscale is None else partials_of(splits, dscale)
        relative = call.family in (launch.PLAIN_DQ_RELATIVE if call.kind == "plain" else launch.MASKED_FIRST)
        launch.start(
            attention_dq_kernel,
            (splits.programs * batch * heads,),
            *operands,
            tensor4(dq),
            argument(partials),
            None if dscale is None else tensor3(dscale),
            argument(dscale_partials),
            row_values,
            call.problem(rows, splits.count, launch.heads_per_section(call.k, call.v, batch * heads)),
            tile=call.tile(tiling, relative, AHEAD=tiling.ahead),
            **tiling.compiler_options(),
        )
        merge(splits, partials, dq)
    if dscale is None:
        return dq, None
    total = dscale.sum(-1)
    if dscale_partials is not None:
        total += dscale_partials.unflatten(0, (-1, batch)).sum((0, 3))
    return dq, total


def _sink_gradient(call: Call, sinks: torch.Tensor, row_values: RowValues) -> torch.Tensor:
    """dsinks (B, Hq): a sink's weight times what its value, zero, lacks to the row's mean: -delta."""
    lse, delta, *remainder = row_values.pointer.unbind(2)
    if not call.in_nats:
        return -(torch.exp2(sinks[..., None] * LOG2_E.value - lse) * delta).sum(-1)
    weights = torch.exp2((sinks[..., None] - lse) * LOG2_E.value - remainder[0])
    return -(weights * delta).sum(-1)
