"""Statistics of attention: sums and maxima over the weights P = exp(S - lse), in three sweeps, none with atomics.

  queries   one program a tile of queries loops over the keys it sees, as the forward does: what each query sees
  keys      one program a tile of keys and query head loops over the queries that see it: what each key receives
  lags      one program a diagonal of tiles: the sum along each diagonal of P

The scores are the forward's, by the same loops and the same score step. What a call does not ask for is absent at
compile time. A query whose log-sum-exp is +inf or -inf weighs nothing. A remainder is what a huge log-sum-exp lost
by rounding (row_values.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .. import launch
from ..tiles import LN_2, LOG2_E, head_of, load_row_values, load_tile, tensor3, tensor4
from .bias import add_diagonal, store_diagonals
from .loops import (
    columns_of,
    is_visible,
    key_count_of,
    later_are_heavier,
    loop_over_keys,
    loop_over_queries,
    position_of,
    rows_of,
)
from .problem import Call
from .scores import cap, finish_scores, load_score_terms, log2_weights, nats_factor, score_unit


class Labels(NamedTuple):
    """Which keys match a query: those with its label, int32 (kinds, batch, length), that stand at least `before`
    keys, int32 (kinds,), before its diagonal."""

    queries: torch.Tensor
    keys: torch.Tensor
    before: torch.Tensor


@triton.jit
def weights_of_tile(
    q_tile, k_tile, row_terms, start, queries, bounds, score_terms, problem, tile: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of scores as `finish_scores` returns them and of the weights' base-2 logarithms, both -inf where
    hidden, and of the weights; queries down."""
    scores = problem.scores
    row_lse, remainder = row_terms
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=tile.PRECISION)
    keys = start + tl.arange(0, tile.BLOCK_N)[None, :]
    capped = cap(products, scores, score_terms)
    values = finish_scores(capped, scores, score_terms, queries[:, None], keys, problem.shape)
    logs = log2_weights(values, scores, row_lse[:, None], remainder[:, None])
    if MASKED:
        visible = is_visible(start, bounds, problem, tile)
        values, logs = tl.where(visible, values, float("-inf")), tl.where(visible, logs, float("-inf"))
    return values, logs, tl.exp2(logs)


@triton.jit
def load_row_terms(lse, remainder, batch, head, queries, problem):
    """Log-sum-exps in the units of the scores, +inf for queries that saw nothing or do not exist: they weigh
    nothing. And their remainders in log2 units."""
    count = problem.shape.queries
    row_lse = load_row_values(head_of(lse, batch, head), lse, queries, count, float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * score_unit(problem.scores))
    row_remainder = tl.zeros_like(row_lse)
    if remainder is not None:
        row_remainder = load_row_values(head_of(remainder, batch, head), remainder, queries, count, 0.0) * LOG2_E
    return row_lse, row_remainder


@triton.jit
def query_step(
    state, operands, score_terms, start, queries, bounds, key_count, problem, tile: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `start` on give to each query."""
    q_tile, row_terms, k_pointer, k, norms_pointer, norms, labels, batch = operands
    mass, entropy, max_logit, squares, distance, value_norm, matched, thumbnail = state
    shape = problem.shape
    k_tile = load_tile(k_pointer, k, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, MASKED)
    values, logs, weights = weights_of_tile(
        q_tile, k_tile, row_terms, start, queries, bounds, score_terms, problem, tile, MASKED
    )
    keys = start + tl.arange(0, tile.BLOCK_N)
    before_diagonal = (queries + (shape.keys - shape.queries))[:, None] - keys[None, :]
    mass += tl.sum(weights, 1)
    if tile.MAX_LOGIT:
        max_logit = tl.maximum(max_logit, tl.max(values, 1))
    if tile.ENTROPY:
        # 0 times -inf is NaN.
        entropy -= tl.sum(tl.where(weights > 0.0, weights * logs, 0.0), 1)
    if tile.SUM_OF_SQUARES:
        squares += tl.sum(weights * weights, 1)
    if tile.MEAN_DISTANCE:
        distance += tl.sum(weights * before_diagonal.to(tl.float32), 1)
    if tile.VALUE_NORM:
        key_norms = tl.load(norms_pointer + keys.to(tl.int64) * norms.row, mask=keys < shape.keys, other=0.0)
        value_norm += tl.sum(weights * key_norms[None, :], 1)
    if tile.KINDS > 0:
        for kind in tl.static_range(tile.KINDS):
            entry = kind * shape.batches + batch
            wanted = tl.load(labels[0] + entry * shape.queries + queries, mask=queries < shape.queries, other=0)
            offered = tl.load(labels[1] + entry * shape.keys + keys, mask=keys < shape.keys, other=0)
            matches = (wanted[:, None] == offered[None, :]) & (before_diagonal >= tl.load(labels[2] + kind))
            match_mass = tl.sum(tl.where(matches, weights, 0.0), 1)
            matched += tl.where(tl.arange(0, tile.KIND_WIDTH)[None, :] == kind, match_mass[:, None], 0.0)
    if tile.COLUMNS > 0:
        column = keys.to(tl.int64) * tile.COLUMNS // shape.keys
        is_in_column = column[:, None] == tl.arange(0, tile.COLUMN_WIDTH)[None, :]
        thumbnail = tl.dot(weights, is_in_column.to(tl.float32), thumbnail, input_precision="ieee")
    return mass, entropy, max_logit, squares, distance, value_norm, matched, thumbnail


@triton.jit
def query_statistics_kernel(q, k, lse, remainder, norms, labels, rows, results, problem, tile: tl.constexpr):
    """`rows` are the first query that is asked for and the one after the last. `results` are contiguous and in the
    order of the state: (B, Hq, Lq); of matches (kinds, B, Hq, Lq); of a thumbnail (B, Hq, Lq, columns). A result
    that is not asked for is not written."""
    shape = problem.shape
    position = position_of(shape.queries, shape.heads, problem, later_are_heavier(problem), tile.BLOCK_M)
    start, batch, head, _split = position
    if (start < rows[1]) & (start + tile.BLOCK_M > rows[0]):
        queries = start + tl.arange(0, tile.BLOCK_M)
        q_tile = load_tile(
            head_of(q, batch, head), q, start, shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, True
        )
        row_terms = load_row_terms(lse, remainder, batch, head, queries, problem)
        norms_pointer = 0
        if norms is not None:
            norms_pointer = head_of(norms, batch, head)
        zeros = tl.zeros([tile.BLOCK_M], tl.float32)
        state = (
            zeros,
            zeros,
            tl.full([tile.BLOCK_M], float("-inf"), tl.float32),
            zeros,
            zeros,
            zeros,
            tl.zeros([tile.BLOCK_M, tile.KIND_WIDTH], tl.float32),
            tl.zeros([tile.BLOCK_M, tile.COLUMN_WIDTH], tl.float32),
        )
        operands = (
            q_tile, row_terms, head_of(k, batch, head // shape.group), k, norms_pointer, norms, labels, batch,
        )  # fmt: skip
        score_terms = load_score_terms(problem.scores, problem.dropout, batch, head)
        mass, entropy, max_logit, squares, distance, value_norm, matched, thumbnail = loop_over_keys(
            query_step, state, operands, score_terms, position, problem, tile
        )
        exists = queries < shape.queries
        flat_head = (batch * shape.heads + head).to(tl.int64)
        index = flat_head * shape.queries + queries
        tl.store(results[0] + index, mass, mask=exists)
        if tile.ENTROPY:
            tl.store(results[1] + index, entropy * LN_2, mask=exists)
        if tile.MAX_LOGIT:
            # A scale may be 0, and 0 times -inf is NaN.
            in_nats = max_logit * nats_factor(problem.scores)
            max_logit = tl.where(max_logit == float("-inf"), max_logit, in_nats)
            tl.store(results[2] + index, max_logit, mask=exists)
        if tile.SUM_OF_SQUARES:
            tl.store(results[3] + index, squares, mask=exists)
        if tile.MEAN_DISTANCE:
            tl.store(results[4] + index, distance, mask=exists)
        if tile.VALUE_NORM:
            tl.store(results[5] + index, value_norm, mask=exists)
        if tile.KINDS > 0:
            kinds = tl.arange(0, tile.KIND_WIDTH)[None, :]
            size = shape.batches * shape.heads * shape.queries.to(tl.int64)
            tl.store(
                results[6] + (kinds * size + index[:, None]), matched, mask=exists[:, None] & (kinds < tile.KINDS)
            )
        if tile.COLUMNS > 0:
            columns = tl.arange(0, tile.COLUMN_WIDTH)[None, :]
            pointers = results[7] + (index[:, None] * tile.COLUMNS + columns)
            tl.store(pointers, thumbnail, mask=exists[:, None] & (columns < tile.COLUMNS))


@triton.jit
def key_step(
    state, operands, score_terms, start, key_start, bounds, problem, tile: tl.constexpr, MASKED: tl.constexpr
):
    """Add what the queries from `start` on give to each key."""
    received, max_received, weighted_received = state
    q_pointer, q, k_tile, lse, remainder, query_weights, batch, head = operands
    queries = start + tl.arange(0, tile.BLOCK_M)
    q_tile = load_tile(q_pointer, q, start, problem.shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, MASKED)
    row_terms = load_row_terms(lse, remainder, batch, head, queries, problem)
    _values, _logs, weights = weights_of_tile(
        q_tile, k_tile, row_terms, key_start, queries, bounds, score_terms, problem, tile, MASKED
    )
    if tile.RECEIVED:
        received += tl.sum(weights, 0)
    if tile.MAX_RECEIVED:
        max_received = tl.maximum(max_received, tl.max(weights, 0))
    if tile.WEIGHTED_RECEIVED:
        pointer = head_of(query_weights, batch, head)
        factors = load_row_values(pointer, query_weights, queries, problem.shape.queries, 0.0)
        weighted_received += tl.sum(weights * factors[:, None], 0)
    return received, max_received, weighted_received


@triton.jit
def key_statistics_kernel(q, k, lse, remainder, query_weights, rows, results, problem, tile: tl.constexpr):
    """`rows` as above; `results` are received, max_received and weighted_received, (B, Hq, Lk), contiguous."""
    shape = problem.shape
    # The first key tiles are seen by the most queries.
    position = position_of(shape.keys, shape.heads, problem, False, tile.BLOCK_N)
    start, batch, head, _split = position
    key_count = key_count_of(batch, problem)
    k_pointer = head_of(k, batch, head // shape.group)
    k_tile = load_tile(k_pointer, k, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, True)
    zeros = tl.zeros([tile.BLOCK_N], tl.float32)
    operands = (head_of(q, batch, head), q, k_tile, lse, remainder, query_weights, batch, head)
    score_terms = load_score_terms(problem.scores, problem.dropout, batch, head)
    received, max_received, weighted_received = loop_over_queries(
        key_step, (zeros, zeros, zeros), operands, score_terms, position, rows, problem, tile
    )
    keys = start + tl.arange(0, tile.BLOCK_N)
    index = (batch * shape.heads + head).to(tl.int64) * shape.keys + keys
    # Keys beyond the batch entry's length get 0.
    has_key = keys < key_count
    exists = keys < shape.keys
    if tile.RECEIVED:
        tl.store(results[0] + index, tl.where(has_key, received, 0.0), mask=exists)
    if tile.MAX_RECEIVED:
        tl.store(results[1] + index, tl.where(has_key, max_received, 0.0), mask=exists)
    if tile.WEIGHTED_RECEIVED:
        tl.store(results[2] + index, tl.where(has_key, weighted_received, 0.0), mask=exists)


@triton.jit
def tile_weights(total, operands, batch, head, start, key_start, bounds, score_terms, problem, tile: tl.constexpr):
    """Add to `total` one head's weights within `bounds`."""
    q, k, lse, remainder = operands
    shape = problem.shape
    queries = start + tl.arange(0, tile.BLOCK_M)
    k_pointer, key_count = head_of(k, batch, head // shape.group), key_count_of(batch, problem)
    q_tile = load_tile(
        head_of(q, batch, head), q, start, shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, True
    )
    k_tile = load_tile(k_pointer, k, key_start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, True)
    row_terms = load_row_terms(lse, remainder, batch, head, queries, problem)
    _values, _logs, weights = weights_of_tile(
        q_tile, k_tile, row_terms, key_start, queries, bounds, score_terms, problem, tile, True
    )
    return total + weights


@triton.jit
def lag_profile_kernel(q, k, lse, remainder, sums, problem, tile: tl.constexpr):
    """One program a head and diagonal of square tiles."""
    total = add_diagonal(tile_weights, (q, k, lse, remainder), problem, tile)
    store_diagonals(total, sums, tile)


def attention_statistics(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, spec: Any, asked: Any, tensors: Any, lists: Any,
    results: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    """Fill `results`, by the names in `spec.want`. They come with the values that they have where nothing is seen.

    q, k, tensors and lists are as attention_forward's; lse (B, Hq, Lq) fp32, +inf for queries that are not asked
    for; `spec` has the attention's options, `want`, `rows`, `thumbnail` and `before`; `asked` the tensors
    query_weights (B, Hq, Lq), value_norms (B, Hq, Lk), query_labels and key_labels (kinds, B, length) int32,
    row_bins (Lq,) int32, and remainder (B, Hq, Lq) fp32 in nats, for scores in nats; each may be None.
    """
    if q.numel() * k.numel() == 0 or spec.rows[0] >= spec.rows[1]:
        return
    with launch.on_device(q):
        call = Call(query_statistics_kernel, q, k, k, spec.attention, tensors, lists)
        remainder = None if asked.remainder is None else tensor3(asked.remainder)
        operands = (tensor4(q), tensor4(k), tensor3(lse), remainder)
        if set(spec.want) & {*_BY_QUERY, "match_mass", "thumbnail"}:
            _by_query(call, operands, spec, asked, results)
        if set(spec.want) & set(_BY_KEY):
            _by_key(call, operands, spec, asked, results)
        if "lag_profile" in spec.want:
            _by_lag(call, operands, results["lag_profile"])


_BY_QUERY = ("mass", "entropy", "max_logit", "sum_of_squares", "mean_distance", "value_norm")
_BY_KEY = ("received", "max_received", "weighted_received")


def _by_query(call: Call, operands: tuple, spec: Any, asked: Any, results: dict[str, torch.Tensor]) -> None:
    (batch, heads, queries, _), (rows, columns) = call.q.shape, spec.thumbnail
    columns = columns if "thumbnail" in spec.want else 0
    kinds, labels, norms = len(spec.before), None, None
    if kinds:
        before = torch.tensor(spec.before, dtype=torch.int32, device=call.q.device)
        labels = Labels(asked.query_labels.contiguous(), asked.key_labels.contiguous(), before)
    if "value_norm" in spec.want:
        norms = tensor3(asked.value_norms)
    mass = results.get("mass")
    if mass is None:
        mass = torch.empty((batch, heads, queries), dtype=torch.float32, device=call.q.device)
    thumbnail = mass
    if columns:
        thumbnail = torch.zeros((batch, heads, queries, columns), dtype=torch.float32, device=call.q.device)
    # A result that is not asked for is not written: any pointer will do.
    written = (mass, *(results.get(name, mass) for name in (*_BY_QUERY[1:], "match_mass")), thumbnail)
    tiling = call.tiling(launch.ATTENTION_STATISTICS)
    options = {name.upper(): name in spec.want for name in _BY_QUERY}
    tile = call.tile(
        tiling, KINDS=kinds, KIND_WIDTH=triton.next_power_of_2(max(kinds, 1)), COLUMNS=columns,
        COLUMN_WIDTH=launch.tile_width(columns) if columns else 1, **options,
    )  # fmt: skip
    launch.start(
        query_statistics_kernel,
        (triton.cdiv(queries, tiling.block_m) * batch * heads,),
        *operands,
        norms,
        labels,
        spec.rows,
        written,
        call.problem(
            rows_of(call.lists, split=False),
            None,
            launch.heads_per_section(call.k, call.k, batch * heads),
            batches=True,
        ),
        tile=tile,
        **tiling.compiler_options(),
    )
    if columns:
        # A product adds up the queries of each row of the thumbnail, in an order that is always the same.
        row = torch.arange(rows, device=thumbnail.device)[:, None]
        results["thumbnail"].copy_((row == asked.row_bins).to(thumbnail) @ thumbnail)


def _by_key(call: Call, operands: tuple, spec: Any, asked: Any, results: dict[str, torch.Tensor]) -> None:
    (batch, heads, _, _), keys = call.q.shape, call.k.shape[2]
    wanted = [results.get(name) for name in _BY_KEY]
    any_result = next(result for result in wanted if result is not None)
    weights = tensor3(asked.query_weights) if "weighted_received" in spec.want else None
    tiling = call.tiling(launch.ATTENTION_STATISTICS)
    section = launch.heads_per_section(call.q, call.q, batch * heads)
    launch.start(
        key_statistics_kernel,
        (triton.cdiv(keys, tiling.block_n) * batch * heads,),
        *operands,
        weights,
        spec.rows,
        tuple(any_result if result is None else result for result in wanted),
        call.problem(columns_of(call.lists, split=False), None, section),
        tile=call.tile(tiling, **{name.upper(): name in spec.want for name in _BY_KEY}),
        **tiling.compiler_options(),
    )


def _by_lag(call: Call, operands: tuple, profile: torch.Tensor) -> None:
    """The sum along each diagonal; lag -(Lq - 1) first."""
    (batch, heads, queries, _), keys = call.q.shape, call.k.shape[2]
    tiling = call.tiling(launch.ATTENTION_BIAS)
    if max(queries, keys) <= 32 or call.widest > 256:
        # One tile is enough. For one query and key Triton 3.6 compiles no larger one on a B200: with sizes of 1
        # the loop is unrolled to a single product, for which its pass over tensor memory finds no layout. And a
        # wide tile of 64 x 64 spills, since this kernel holds all its columns.
        tiling = tiling._replace(block_m=min(tiling.block_m, 32), block_n=min(tiling.block_n, 32))
    block = tiling.block_m
    row_tiles = triton.cdiv(queries, block)
    diagonals = row_tiles + triton.cdiv(keys, block) - 1
    sums = torch.empty((batch, heads, diagonals, 2 * block), dtype=torch.float32, device=call.q.device)
    launch.start(
        lag_profile_kernel,
        (diagonals * batch * heads,),
        *operands,
        sums,
        call.problem(rows_of(call.lists, split=False)),
        tile=call.tile(tiling, relative=True),
        **tiling.compiler_options(),
    )
    # Neighbouring diagonals of tiles share distances: the second half of one is the first of the next.
    first, second = sums[..., :block].flatten(2), sums[..., block:].flatten(2)
    by_distance = F.pad(first, (0, block)) + F.pad(second, (block, 0))
    # A key `distance` columns right of its query's row; the first of these is 1 - row_tiles * block.
    begin = row_tiles * block - queries
    profile.copy_(by_distance[..., begin : begin + queries + keys - 1].flip(-1))
