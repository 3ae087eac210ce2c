"""The backward of `invariant`: the gradients of a sequence have the same bits alone, packed and padded.

  dk/dv  one program a tile of keys, counted from the sequence's first, loops over the packed rows that see it (see
         `invariant`): all query heads of the group, in ascending order
  dq     one program a tile of packed rows loops over the tiles of keys that it sees, in ascending order
  sums   of sinks and scales of heads: one program a head adds up the rows of a batch entry in ascending order
The formulas are those of `attention.backward`. A tile is of one sequence. A tile that is left out, since nobody
sees it, would add zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import launch
from .attention.backward import next_tile
from .attention.problem import empty_heads
from .attention.row_values import RowValues, attention_delta_kernel
from .attention.scores import cap, finish_scores, load_score_terms, softmax_weights
from .cache import load_tokens, row_pointers
from .invariant import (
    FAR,
    bounds_of,
    columns_of,
    is_between,
    most_tiles,
    ranges_of,
    rows_again,
    rows_at,
    scores_for,
    sequence_at,
    sequences_of,
    table_of,
    terms_of_rows,
    tile_for,
    tiling_for,
)
from .launch.invariant import INVARIANT_DKDV, INVARIANT_DQ, SUM_ROWS
from .tile import tile_of
from .tiles import LARGEST_TILE, LOG2_E, head_of, in_units, load_tile, shape_of, store_tile, tensor3, tensor4


@triton.jit
def load_row_terms(row_values, entry, head, place, exists, sequences):
    """The log-sum-exps, in log2 units, and the deltas of packed rows; rows that do not exist weigh nothing."""
    flat_head = entry.to(tl.int64) * (sequences.key_heads * sequences.group) + head
    pointers = row_values.pointer + flat_head * row_values.head + place
    lse = tl.load(pointers, mask=exists, other=float("inf"))
    return lse, tl.load(pointers + row_values.rows, mask=exists, other=0.0)


@triton.jit
def row_of(tensor, batch, head, row):
    """Pointer to a row of a head."""
    return head_of(tensor, batch, head) + row.to(tl.int64) * in_units(tensor.row, tensor.unit)


@triton.jit
def dkdv_step(
    state,
    operands,
    score_terms,
    cursor,
    start,
    key_start,
    bounds,
    position,
    scores,
    sequences,
    tile: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what one head's queries from `start` on give to (dk, dv); scores stand transposed, keys down."""
    dk, dv = state
    k_tile, v_tile, q, dout, padded_rows = operands
    _, _, q_pointer, dout_pointer, row_values = cursor
    queries, shift = position
    query = start + tl.arange(0, tile.BLOCK_M)
    q_tile = load_tile(q_pointer, q, start, queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, MASKED)
    dout_tile = load_tile(
        dout_pointer, dout, start, queries, tile.VALUE_DIM, tile.BLOCK_M, tile.VALUE_WIDTH, MASKED
    )
    products = tl.dot(k_tile, tl.trans(q_tile), input_precision=tile.PRECISION)
    dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision=tile.PRECISION)
    keys = key_start + tl.arange(0, tile.BLOCK_N)
    capped = cap(products, scores, score_terms)
    values = finish_scores(capped, scores, score_terms, (query + shift)[None, :], keys[:, None], sequences.aligned)
    if MASKED:
        # What lies behind the last query is another sequence's, or nobody's.
        exists = query < queries
        lse = tl.load(row_values + query, mask=exists, other=float("inf"))
        delta = tl.load(row_values + padded_rows + query, mask=exists, other=0.0)
    else:
        lse = tl.load(row_values + query)
        delta = tl.load(row_values + padded_rows + query)
    weights = softmax_weights(values, scores, lse[None, :], 0.0)
    if MASKED:
        first, stop = bounds
        # Counted from the tile's first query: fewer registers.
        columns = tl.arange(0, tile.BLOCK_M)[None, :]
        seen = (columns >= (first - start)[:, None]) & (columns < (stop - start)[:, None])
        weights = tl.where(seen, weights, 0.0)
    dscores = weights * (dweights - delta[None, :])
    if scores.softcap is not None:
        dscores *= 1.0 - capped * capped
    if scores.head_scale is not None:
        dscores *= score_terms[7]
    dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision=tile.PRECISION)
    dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision=tile.PRECISION)
    return dk, dv


@triton.jit
def queries_that_see(keys, entry, first_query, queries, first_key, shift, sequences, keys_of_entry):
    """The queries of its sequence that see each key: from the first to before the second."""
    first, stop = tl.zeros_like(keys), tl.zeros_like(keys) + queries
    if sequences.right is not None:
        first = tl.maximum(first, keys - shift - sequences.right)
    if sequences.left is not None:
        stop = tl.minimum(stop, keys - shift + (sequences.left + 1))
    if sequences.intervals is not None:
        place = sequences.queries + tl.minimum(first_key + keys, keys_of_entry - 1)
        pointers = sequences.intervals + entry.to(tl.int64) * sequences.interval_batch + place
        first = tl.maximum(first, tl.load(pointers) - first_query)
        stop = tl.minimum(stop, tl.load(pointers + sequences.interval_length) - first_query)
    return tl.minimum(first, queries), stop


@triton.jit
def query_tiles(bounds, exist, queries, tile: tl.constexpr):
    """Numbers of query tiles, counted from the sequence's first: the first that sees any of the keys; the first
    that sees all of them; the next that does not see all, or has rows that do not exist; the one after the last
    that sees any."""
    first, stop = bounds
    earliest = tl.min(tl.where(exist, first, FAR), 0) // tile.BLOCK_M
    full = tl.cdiv(tl.max(tl.where(exist, first, 0), 0), tile.BLOCK_M)
    whole = tl.min(tl.where(exist, stop, FAR), 0) // tile.BLOCK_M
    end = tl.cdiv(tl.max(tl.where(exist, stop, 0), 0), tile.BLOCK_M)
    return earliest, full, tl.maximum(whole, full), tl.maximum(end, full)


@triton.jit
def invariant_dkdv_kernel(q, k, v, dout, dk, dv, row_values, sequences, scores, keys_of_entry, tile: tl.constexpr):
    """One program: BLOCK_N keys of a sequence and a key head, and all rows that see them: of one query head of the
    group after the other, first those that need a mask, then, again of each head, the others."""
    program = tl.program_id(0)
    # The first tiles of a sequence are seen by the most rows. They come first.
    number, key_head = program // sequences.key_heads, program % sequences.key_heads
    found = sequence_at(number, sequences)
    entry, first_query, queries = tl.load(found), tl.load(found + 1), tl.load(found + 2)
    first_key, key_count, shift = tl.load(found + 3), tl.load(found + 4), tl.load(found + 5)
    start = (number - tl.load(found + 6)) * tile.BLOCK_N
    # The number of tiles is a bound: some may be of no sequence.
    if start >= key_count:
        return
    keys = start + tl.arange(0, tile.BLOCK_N)
    bounds = queries_that_see(keys, entry, first_query, queries, first_key, shift, sequences, keys_of_entry)
    first, full, whole, stop = query_tiles(bounds, keys < key_count, queries, tile)

    k_pointer, v_pointer = head_of(k, entry, key_head), head_of(v, entry, key_head)
    stop_key = first_key + key_count
    k_tile = load_tile(k_pointer, k, first_key + start, stop_key, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, True)
    v_tile = load_tile(
        v_pointer, v, first_key + start, stop_key, tile.VALUE_DIM, tile.BLOCK_N, tile.VALUE_WIDTH, True
    )
    head = key_head * sequences.group
    flat_head = entry.to(tl.int64) * (sequences.key_heads * sequences.group) + head
    beginning = (
        0,
        0,
        row_of(q, entry, head, first_query),
        row_of(dout, entry, head, first_query),
        row_values.pointer + flat_head * row_values.head + first_query,
    )
    operands, position = (k_tile, v_tile, q, dout, row_values.rows), (queries, shift)
    state = (
        tl.zeros([tile.BLOCK_N, tile.WIDTH], tl.float32),
        tl.zeros([tile.BLOCK_N, tile.VALUE_WIDTH], tl.float32),
    )
    # As in `attention.backward`: one loop over the tiles of all heads of the group keeps the loads coming.
    diagonal = full - first
    masked = diagonal + stop - whole
    cursor = beginning
    for _ in tl.range(0, sequences.group * masked):
        row = (cursor[0] + tl.where(cursor[0] < diagonal, first, whole - diagonal)) * tile.BLOCK_M
        score_terms = load_score_terms(scores, None, entry, head + cursor[1])
        state = dkdv_step(
            state, operands, score_terms, cursor, row, start, bounds, position, scores, sequences, tile, True
        )
        cursor = next_tile(cursor, masked, q, dout, row_values)
    cursor = beginning
    for _ in tl.range(0, sequences.group * (whole - full)):
        row = (full + cursor[0]) * tile.BLOCK_M
        score_terms = load_score_terms(scores, None, entry, head + cursor[1])
        state = dkdv_step(
            state, operands, score_terms, cursor, row, start, (0, 0), position, scores, sequences, tile, False
        )
        cursor = next_tile(cursor, whole - full, q, dout, row_values)
    # Read again, since registers are full while rows are visited.
    entry, first_key = tl.load(found, volatile=True), tl.load(found + 3, volatile=True)
    stop_key = first_key + tl.load(found + 4, volatile=True)
    start = (number - tl.load(found + 6, volatile=True)) * tile.BLOCK_N
    dk_tile = state[0] * tl.cast(scores.scale, tl.float32)
    dk_pointer, dv_pointer = head_of(dk, entry, key_head), head_of(dv, entry, key_head)
    store_tile(dk_pointer, dk, first_key + start, stop_key, tile.HEAD_DIM, dk_tile, tile.BLOCK_N, tile.WIDTH)
    store_tile(
        dv_pointer, dv, first_key + start, stop_key, tile.VALUE_DIM, state[1], tile.BLOCK_N, tile.VALUE_WIDTH
    )


@triton.jit
def dq_step(dq, operands, start, bounds, position, sequences, scores, tile: tl.constexpr, MASKED: tl.constexpr):
    """Add what the keys from `start` on give to dq."""
    q_tile, dout_tile, lse, delta, score_terms, diagonal, k_pointer, v_pointer, k, v = operands
    first_key, key_count = position
    stop_key = first_key + key_count
    k_tile = load_tile(k_pointer, k, first_key + start, stop_key, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, MASKED)
    v_tile = load_tile(
        v_pointer, v, first_key + start, stop_key, tile.VALUE_DIM, tile.BLOCK_N, tile.VALUE_WIDTH, MASKED
    )
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=tile.PRECISION)
    dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision=tile.PRECISION)
    columns = start + tl.arange(0, tile.BLOCK_N)
    capped = cap(products, scores, score_terms)
    values = finish_scores(capped, scores, score_terms, diagonal[:, None], columns[None, :], sequences.aligned)
    weights = softmax_weights(values, scores, lse[:, None], 0.0)
    if MASKED:
        first, stop = bounds
        if tile.BY_BITS:
            seen = is_between(first - start, stop - start, tile)
        else:
            # Counted from the sequence's first key: fewer registers here.
            seen = (columns[None, :] >= first[:, None]) & (columns[None, :] < stop[:, None])
        weights = tl.where(seen, weights, 0.0)
    dscores = weights * (dweights - delta[:, None])
    if scores.softcap is not None:
        dscores *= 1.0 - capped * capped
    return tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision=tile.PRECISION)


@triton.jit
def invariant_dq_kernel(q, k, v, dout, dq, dscale, row_values, sequences, scores, tile: tl.constexpr):
    """One program: BLOCK_M packed rows of a sequence and a key head, and all of their keys. `dscale` is what each
    row gives to the gradient of its head's scale; None without such scales."""
    program = tl.program_id(0)
    # The last tiles of a sequence see the most keys. They come first.
    number, key_head = sequences.tiles - 1 - program // sequences.key_heads, program % sequences.key_heads
    found = sequence_at(number, sequences)
    entry, first_query, queries = tl.load(found), tl.load(found + 1), tl.load(found + 2)
    first_key, key_count, shift = tl.load(found + 3), tl.load(found + 4), tl.load(found + 5)
    row_start = (number - tl.load(found + 6)) * tile.BLOCK_M
    if row_start >= queries * sequences.group:
        return
    exists, query, head = rows_at(row_start, key_head, queries, sequences, tile.BLOCK_M)
    diagonal, rows = query + shift, first_query + query
    bounds = bounds_of(query, diagonal, entry, first_query, first_key, key_count, sequences)
    begin, full_begin, full_end, end = ranges_of(bounds, exists, key_count, sequences, tile)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.maximum(end, begin))
    full_end = tl.maximum(full_end, full_begin)

    q_tile = load_tokens(q, row_pointers(q, entry, head, rows), exists, 0, tile.HEAD_DIM, tile.WIDTH, True)
    tokens = row_pointers(dout, entry, head, rows)
    dout_tile = load_tokens(dout, tokens, exists, 0, tile.VALUE_DIM, tile.VALUE_WIDTH, True)
    lse, delta = load_row_terms(row_values, entry, head, rows, exists, sequences)
    slopes, head_scales = terms_of_rows(entry, head, exists, scores, tile.BLOCK_M)
    score_terms = (slopes[:, None], 0, 0, 0, 0, 0, 0.0, head_scales[:, None])
    pointers = head_of(k, entry, key_head), head_of(v, entry, key_head)
    operands = (q_tile, dout_tile, lse, delta, score_terms, diagonal, pointers[0], pointers[1], k, v)
    position = (first_key, key_count)
    total = tl.zeros([tile.BLOCK_M, tile.WIDTH], tl.float32)
    for start in tl.range(begin, full_begin, tile.BLOCK_N):
        total = dq_step(total, operands, start, bounds, position, sequences, scores, tile, True)
    for start in tl.range(full_begin, full_end, tile.BLOCK_N):
        total = dq_step(total, operands, start, bounds, position, sequences, scores, tile, False)
    for start in tl.range(full_end, end, tile.BLOCK_N):
        total = dq_step(total, operands, start, bounds, position, sequences, scores, tile, True)
    total *= tl.cast(scores.scale, tl.float32)
    row, exists, _ = rows_again(found, number, key_head, sequences, tile)
    if dscale is not None:
        row_sums = tl.sum(total * q_tile.to(tl.float32), 1)
        tl.store(row_pointers(dscale, row[0], row[1], row[2]), row_sums, mask=exists)
        total *= head_scales[:, None]
    columns = tl.arange(0, tile.WIDTH)
    pointers = row_pointers(dq, row[0], row[1], row[2])[:, None] + columns[None, :] * dq.column
    mask = exists[:, None] & (columns < tile.HEAD_DIM)[None, :]
    tl.store(pointers, total.to(dq.pointer.dtype.element_ty), mask=mask)


@triton.jit
def row_sum_kernel(values, sums, rows, tile: tl.constexpr):
    """One program adds up the `rows` values of a head of a batch entry, a tile after the other."""
    program = tl.program_id(0)
    total = tl.zeros([1], tl.float32)
    for start in tl.range(0, rows, tile.BLOCK_M):
        row = start + tl.arange(0, tile.BLOCK_M)
        part = tl.load(values + program.to(tl.int64) * rows + row, mask=row < rows, other=0.0)
        total += tl.sum(part, 0)
    tl.store(sums + program + tl.arange(0, 1), total)


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """(batch, heads) from (batch, heads, rows): zeros behind the last row change no bit."""
    values = values.contiguous()
    batch, heads, rows = values.shape
    sums = values.new_zeros(batch, heads)
    if values.numel():
        tile = tile_of(BLOCK_M=SUM_ROWS)
        options = {"num_warps": 4, "num_stages": 1, **launch.COMPILER_OPTIONS}
        launch.start(row_sum_kernel, (batch * heads,), values, sums, rows, tile=tile, **options)
    return sums


def _as_results(t: torch.Tensor) -> torch.Tensor:
    """A copy laid out as results are, unless `t` is. Delta is a sum within a row, whose order the compiler takes
    from strides and alignment."""
    like = empty_heads(*t.shape, t)
    return t if t.stride() == like.stride() and t.data_ptr() % 16 == 0 else like.copy_(t)


def _row_values(saved: tuple, dout: torch.Tensor, dlse: torch.Tensor | None, width: int) -> RowValues:
    """As `attention.row_values.row_values`, by one kernel for all options of a call. dout lies as results do."""
    q, k, _, out, lse = saved
    batch, heads, queries, value_dim = out.shape
    rows = triton.cdiv(queries, LARGEST_TILE) * LARGEST_TILE
    values = torch.empty((batch, heads, 2, rows), dtype=torch.float32, device=q.device)
    result = RowValues(values, rows, 2 * rows)
    tiling = launch.look_up(
        launch.ATTENTION_DELTA, launch.family(attention_delta_kernel, q.device), q.element_size(), width
    )
    launch.start(
        attention_delta_kernel,
        (rows // tiling.block_m * batch * heads,),
        tensor4(_as_results(out)),
        tensor4(dout),
        tensor3(lse),
        None if dlse is None else tensor3(dlse.contiguous()),
        result,
        shape_of(q, k),
        tile=tile_of(BLOCK_M=tiling.block_m, VALUE_DIM=value_dim, VALUE_WIDTH=launch.tile_width(value_dim)),
        IN_NATS=False,
        **tiling.compiler_options(),
    )
    return result


def _products(
    dout: torch.Tensor, inputs: tuple, results: tuple, row_values: RowValues, spec: Any, tensors: Any
) -> None:
    """Fill dq, dk, dv and dscale, which may be None."""
    (q, k, v), (dq, dk, dv, dscale) = inputs, results
    (batch, heads, queries, _), (_, key_heads, keys, _) = q.shape, v.shape
    operands = tensor4(q), tensor4(k), tensor4(v), tensor4(dout)
    columns, scores = columns_of(q, k, tensors), scores_for(spec, tensors._replace(sinks=None))
    tiling = tiling_for(INVARIANT_DKDV, q, v, spec, tensors)
    table = table_of(columns, tiling.block_n, None)
    tiles = most_tiles(table, batch, keys, tiling.block_n)
    launch.start(
        invariant_dkdv_kernel,
        (tiles * key_heads,),
        *operands,
        tensor4(dk),
        tensor4(dv),
        row_values,
        sequences_of(q, key_heads, spec, tensors, table, tiles),
        scores,
        keys,
        tile=tile_for(q, v, 1, spec, tiling),
        **tiling.compiler_options(),
    )
    tiling = tiling_for(INVARIANT_DQ, q, v, spec, tensors)
    table = table_of(columns, tiling.block_m, heads // key_heads)
    tiles = most_tiles(table, batch, queries * (heads // key_heads), tiling.block_m)
    launch.start(
        invariant_dq_kernel,
        (tiles * key_heads,),
        *operands,
        tensor4(dq),
        None if dscale is None else tensor3(dscale),
        row_values,
        sequences_of(q, key_heads, spec, tensors, table, tiles),
        scores,
        tile=tile_for(q, v, 1, spec, tiling),
        **tiling.compiler_options(),
    )


def invariant_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, saved: tuple, spec: Any, tensors: Any
) -> tuple:
    """The gradients of `invariant.invariant_attention`'s (out, lse) with respect to q, k, v, sinks and scales of
    heads; arguments as `attention.backward.attention_backward`'s."""
    q, _, v = saved[:3]
    (batch, heads, queries, head_dim), (_, key_heads, keys, value_dim) = q.shape, v.shape
    dq = empty_heads(batch, heads, queries, head_dim, q)
    dk, dv = (empty_heads(batch, key_heads, keys, width, q) for width in (head_dim, value_dim))
    if tensors.sequences is not None:
        dq.zero_()  # of queries of no sequence
    if tensors.sequences is not None or tensors.key_lengths is not None:
        dk.zero_()
        dv.zero_()
    dscale = None
    if tensors.head_scale is not None:
        dscale = torch.zeros((batch, heads, queries), dtype=torch.float32, device=q.device)
    if not dq.numel():
        sums = [None if t is None else torch.zeros_like(t) for t in (tensors.sinks, tensors.head_scale)]
        return dq, dk.zero_(), dv.zero_(), *sums
    with launch.on_device(q):
        widest = launch.tile_width(max(head_dim, value_dim))
        dout = _as_results(dout)
        row_values = _row_values(saved, dout, dlse, widest)
        if dv.numel():
            _products(dout, saved[:3], (dq, dk, dv, dscale), row_values, spec, tensors)
        else:
            dq.zero_()
        dsinks = None
        if tensors.sinks is not None:
            lse, delta = row_values.pointer.unbind(2)
            dsinks = -_row_sums(torch.exp2(tensors.sinks[..., None] * LOG2_E.value - lse) * delta)
        return dq, dk, dv, dsinks, None if dscale is None else _row_sums(dscale)
