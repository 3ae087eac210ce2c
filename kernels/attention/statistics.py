"""Statistics of attention: sums and maxima over the weights P = exp(S - lse), in three sweeps, none with atomics.

  queries   one program a tile of queries loops over the keys it sees, as the forward does: what each query sees
  keys      one program a tile of keys and query head loops over the queries that see it: what each key receives
  lags      one program a diagonal of tiles: the sum along each diagonal of P

The scores are the forward's, by the same loops and the same score step. What a call does not ask for is absent at
compile time. A query whose log-sum-exp is +inf or -inf weighs nothing.
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
from .scores import cap, finish_scores, load_score_terms, log2_factor


class Labels(NamedTuple):
    """Labels int32 (kinds, batch, length) of queries and of keys, which match where they are equal, and how many
    keys before its diagonal the match of a query stands at least: int32 (kinds,)."""

    queries: torch.Tensor
    keys: torch.Tensor
    before: torch.Tensor


@triton.jit
def weights_of_tile(
    q_tile, k_tile, row_lse, start, queries, bounds, score_terms, problem, tile: tl.constexpr, MASKED: tl.constexpr
):
    """A tile of scores in log2 units, -inf where hidden, and of weights; queries down."""
    scores = problem.scores
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=tile.PRECISION)
    keys = start + tl.arange(0, tile.BLOCK_N)[None, :]
    capped = cap(products, scores, score_terms)
    values = finish_scores(capped, scores, score_terms, queries[:, None], keys, problem.shape)
    values = values * log2_factor(scores)
    if MASKED:
        values = tl.where(is_visible(start, bounds, problem, tile), values, float("-inf"))
    return values, tl.exp2(values - row_lse[:, None])


@triton.jit
def load_lse(lse, batch, head, queries, shape):
    """Log-sum-exps in log2 units; +inf for queries that saw nothing or do not exist: they weigh nothing."""
    row_lse = load_row_values(head_of(lse, batch, head), lse, queries, shape.queries, float("-inf"))
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)


@triton.jit
def query_step(
    state, operands, score_terms, start, queries, bounds, key_count, problem, tile: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `start` on give to each query."""
    q_tile, row_lse, k_pointer, k, norms_pointer, norms, labels, batch = operands
    mass, entropy, most, squares, distance, value_norm, matched, small = state
    shape = problem.shape
    k_tile = load_tile(k_pointer, k, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, MASKED)
    values, weights = weights_of_tile(
        q_tile, k_tile, row_lse, start, queries, bounds, score_terms, problem, tile, MASKED
    )
    keys = start + tl.arange(0, tile.BLOCK_N)
    ahead = (queries + (shape.keys - shape.queries))[:, None] - keys[None, :]
    mass += tl.sum(weights, 1)
    if tile.MAX_LOGIT:
        most = tl.maximum(most, tl.max(values, 1))
    if tile.ENTROPY:
        # 0 times -inf is NaN.
        entropy -= tl.sum(tl.where(weights > 0.0, weights * (values - row_lse[:, None]), 0.0), 1)
    if tile.SUM_OF_SQUARES:
        squares += tl.sum(weights * weights, 1)
    if tile.MEAN_DISTANCE:
        distance += tl.sum(weights * ahead.to(tl.float32), 1)
    if tile.VALUE_NORM:
        of_keys = tl.load(norms_pointer + keys.to(tl.int64) * norms.row, mask=keys < shape.keys, other=0.0)
        value_norm += tl.sum(weights * of_keys[None, :], 1)
    if tile.KINDS > 0:
        for kind in tl.static_range(tile.KINDS):
            entry = kind * shape.batches + batch
            own = tl.load(labels[0] + entry * shape.queries + queries, mask=queries < shape.queries, other=0)
            others = tl.load(labels[1] + entry * shape.keys + keys, mask=keys < shape.keys, other=0)
            matches = (own[:, None] == others[None, :]) & (ahead >= tl.load(labels[2] + kind))
            found = tl.sum(tl.where(matches, weights, 0.0), 1)
            matched += tl.where(tl.arange(0, tile.KIND_WIDTH)[None, :] == kind, found[:, None], 0.0)
    if tile.COLUMNS > 0:
        column = keys.to(tl.int64) * tile.COLUMNS // shape.keys
        belongs = column[:, None] == tl.arange(0, tile.COLUMN_WIDTH)[None, :]
        small = tl.dot(weights, belongs.to(tl.float32), small, input_precision="ieee")
    return mass, entropy, most, squares, distance, value_norm, matched, small


@triton.jit
def query_statistics_kernel(q, k, lse, norms, labels, rows, outs, problem, tile: tl.constexpr):
    """`rows` are the first query that is asked for and the one after the last. `outs` are where the results go, in
    the order of the state, each contiguous: (B, Hq, Lq), of matches (kinds, B, Hq, Lq), of a thumbnail
    (B, Hq, Lq, columns). Those that are not asked for are not written."""
    shape = problem.shape
    position = position_of(shape.queries, shape.heads, problem, later_are_heavier(problem), tile.BLOCK_M)
    start, batch, head, _split = position
    if (start < rows[1]) & (start + tile.BLOCK_M > rows[0]):
        queries = start + tl.arange(0, tile.BLOCK_M)
        q_tile = load_tile(
            head_of(q, batch, head), q, start, shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, True
        )
        row_lse = load_lse(lse, batch, head, queries, shape)
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
            q_tile, row_lse, head_of(k, batch, head // shape.group), k, norms_pointer, norms, labels, batch,
        )  # fmt: skip
        score_terms = load_score_terms(problem.scores, problem.dropout, batch, head)
        mass, entropy, most, squares, distance, value_norm, matched, small = loop_over_keys(
            query_step, state, operands, score_terms, position, problem, tile
        )
        exists = queries < shape.queries
        flat_head = (batch * shape.heads + head).to(tl.int64)
        place = flat_head * shape.queries + queries
        tl.store(outs[0] + place, mass, mask=exists)
        if tile.ENTROPY:
            tl.store(outs[1] + place, entropy * LN_2, mask=exists)
        if tile.MAX_LOGIT:
            tl.store(outs[2] + place, most * LN_2, mask=exists)
        if tile.SUM_OF_SQUARES:
            tl.store(outs[3] + place, squares, mask=exists)
        if tile.MEAN_DISTANCE:
            tl.store(outs[4] + place, distance, mask=exists)
        if tile.VALUE_NORM:
            tl.store(outs[5] + place, value_norm, mask=exists)
        if tile.KINDS > 0:
            kinds = tl.arange(0, tile.KIND_WIDTH)[None, :]
            size = shape.batches * shape.heads * shape.queries.to(tl.int64)
            tl.store(
                outs[6] + (kinds * size + place[:, None]), matched, mask=exists[:, None] & (kinds < tile.KINDS)
            )
        if tile.COLUMNS > 0:
            columns = tl.arange(0, tile.COLUMN_WIDTH)[None, :]
            places = outs[7] + (place[:, None] * tile.COLUMNS + columns)
            tl.store(places, small, mask=exists[:, None] & (columns < tile.COLUMNS))


@triton.jit
def key_step(
    state, operands, score_terms, start, key_start, bounds, problem, tile: tl.constexpr, MASKED: tl.constexpr
):
    """Add what the queries from `start` on give to each key."""
    received, most, weighted = state
    q_pointer, q, k_tile, lse, query_weights, batch, head = operands
    queries = start + tl.arange(0, tile.BLOCK_M)
    q_tile = load_tile(q_pointer, q, start, problem.shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, MASKED)
    row_lse = load_lse(lse, batch, head, queries, problem.shape)
    _values, weights = weights_of_tile(
        q_tile, k_tile, row_lse, key_start, queries, bounds, score_terms, problem, tile, MASKED
    )
    if tile.RECEIVED:
        received += tl.sum(weights, 0)
    if tile.MAX_RECEIVED:
        most = tl.maximum(most, tl.max(weights, 0))
    if tile.WEIGHTED_RECEIVED:
        pointer = head_of(query_weights, batch, head)
        of_queries = load_row_values(pointer, query_weights, queries, problem.shape.queries, 0.0)
        weighted += tl.sum(weights * of_queries[:, None], 0)
    return received, most, weighted


@triton.jit
def key_statistics_kernel(q, k, lse, query_weights, rows, outs, problem, tile: tl.constexpr):
    """`rows` as above; `outs` are received, max_received and weighted_received, each (B, Hq, Lk), contiguous."""
    shape = problem.shape
    # The first key tiles are seen by the most queries.
    position = position_of(shape.keys, shape.heads, problem, False, tile.BLOCK_N)
    start, batch, head, _split = position
    key_count = key_count_of(batch, problem)
    k_pointer = head_of(k, batch, head // shape.group)
    k_tile = load_tile(k_pointer, k, start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, True)
    zeros = tl.zeros([tile.BLOCK_N], tl.float32)
    operands = (head_of(q, batch, head), q, k_tile, lse, query_weights, batch, head)
    score_terms = load_score_terms(problem.scores, problem.dropout, batch, head)
    received, most, weighted = loop_over_queries(
        key_step, (zeros, zeros, zeros), operands, score_terms, position, rows, problem, tile
    )
    keys = start + tl.arange(0, tile.BLOCK_N)
    place = (batch * shape.heads + head).to(tl.int64) * shape.keys + keys
    # What a key beyond the batch entry's length got is not its own.
    there = keys < key_count
    exists = keys < shape.keys
    if tile.RECEIVED:
        tl.store(outs[0] + place, tl.where(there, received, 0.0), mask=exists)
    if tile.MAX_RECEIVED:
        tl.store(outs[1] + place, tl.where(there, most, 0.0), mask=exists)
    if tile.WEIGHTED_RECEIVED:
        tl.store(outs[2] + place, tl.where(there, weighted, 0.0), mask=exists)


@triton.jit
def tile_weights(total, operands, batch, head, start, key_start, bounds, score_terms, problem, tile: tl.constexpr):
    """Add to `total` one head's weights that `bounds` show."""
    q, k, lse = operands
    shape = problem.shape
    queries = start + tl.arange(0, tile.BLOCK_M)
    k_pointer, key_count = head_of(k, batch, head // shape.group), key_count_of(batch, problem)
    q_tile = load_tile(
        head_of(q, batch, head), q, start, shape.queries, tile.HEAD_DIM, tile.BLOCK_M, tile.WIDTH, True
    )
    k_tile = load_tile(k_pointer, k, key_start, key_count, tile.HEAD_DIM, tile.BLOCK_N, tile.WIDTH, True)
    row_lse = load_lse(lse, batch, head, queries, shape)
    _values, weights = weights_of_tile(
        q_tile, k_tile, row_lse, key_start, queries, bounds, score_terms, problem, tile, True
    )
    return total + weights


@triton.jit
def lag_profile_kernel(q, k, lse, sums, problem, tile: tl.constexpr):
    """One program a head and diagonal of square tiles."""
    total = add_diagonal(tile_weights, (q, k, lse), problem, tile)
    store_diagonals(total, sums, tile)


def attention_statistics(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, spec: Any, asked: Any, tensors: Any, lists: Any,
    results: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    """Fill the results, named as `spec.want`, which hold what they are where nothing is seen.

    q, k, tensors and lists are as attention_forward's; lse (B, Hq, Lq) fp32, +inf for queries that are not asked
    for; `spec` has the attention's options, `want`, `rows`, `thumbnail` and `before`; `asked` the tensors
    query_weights (B, Hq, Lq), value_norms (B, Hq, Lk), query_labels and key_labels (kinds, B, length) int32, and
    row_bins (Lq,) int32.
    """
    if q.numel() * k.numel() == 0 or spec.rows[0] >= spec.rows[1]:
        return
    with launch.on_device(q):
        call = Call(query_statistics_kernel, q, k, k, spec.attention, tensors, lists)
        operands = (tensor4(q), tensor4(k), tensor3(lse))
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
    small = mass
    if columns:
        small = torch.zeros((batch, heads, queries, columns), dtype=torch.float32, device=call.q.device)
    # What is not asked for has no place of its own: any address will do.
    outs = (mass, *(results.get(name, mass) for name in (*_BY_QUERY[1:], "match_mass")), small)
    tiling = call.tiling(launch.ATTENTION_STATISTICS)
    options = {name.upper(): name in spec.want for name in _BY_QUERY}
    tile = call.tile(
        tiling, KINDS=kinds, KIND_WIDTH=triton.next_power_of_2(max(kinds, 1)), COLUMNS=columns,
        COLUMN_WIDTH=launch.tile_width(columns) if columns else 1, **options,
    )  # fmt: skip
    query_statistics_kernel[(triton.cdiv(queries, tiling.block_m) * batch * heads,)](
        *operands,
        norms,
        labels,
        spec.rows,
        outs,
        call.problem(
            rows_of(call.lists, split=False), None, launch.heads_per_section(call.k, call.k, batch * heads)
        ),
        tile=tile,
        **tiling.compiler_options(),
    )
    if columns:
        # Rows of queries to rows of the picture: a product, so that it is the same every time.
        row = torch.arange(rows, device=small.device)[:, None]
        results["thumbnail"].copy_((row == asked.row_bins).to(small) @ small)


def _by_key(call: Call, operands: tuple, spec: Any, asked: Any, results: dict[str, torch.Tensor]) -> None:
    (batch, heads, _, _), keys = call.q.shape, call.k.shape[2]
    outs = [results.get(name) for name in _BY_KEY]
    there = next(out for out in outs if out is not None)
    weights = tensor3(asked.query_weights) if "weighted_received" in spec.want else None
    tiling = call.tiling(launch.ATTENTION_STATISTICS)
    section = launch.heads_per_section(call.q, call.q, batch * heads)
    key_statistics_kernel[(triton.cdiv(keys, tiling.block_n) * batch * heads,)](
        *operands,
        weights,
        spec.rows,
        tuple(there if out is None else out for out in outs),
        call.problem(columns_of(call.lists, split=False), None, section),
        tile=call.tile(tiling, **{name.upper(): name in spec.want for name in _BY_KEY}),
        **tiling.compiler_options(),
    )


def _by_lag(call: Call, operands: tuple, profile: torch.Tensor) -> None:
    """The sum along each diagonal; lag -(Lq - 1) first."""
    (batch, heads, queries, _), keys = call.q.shape, call.k.shape[2]
    tiling = call.tiling(launch.ATTENTION_BIAS)
    block = tiling.block_m
    row_tiles = triton.cdiv(queries, block)
    diagonals = row_tiles + triton.cdiv(keys, block) - 1
    sums = torch.empty((batch, heads, diagonals, 2 * block), dtype=torch.float32, device=call.q.device)
    lag_profile_kernel[(diagonals * batch * heads,)](
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
