"""What is done to the scores between the products: scale, soft cap, biases, sinks, dropout; and their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..tiles import LN_2, LOG2_E, Tensor2, Tensor3, Tensor4, head_of, near, tensor2, tensor3
from .loops import is_visible


class Scores(NamedTuple):
    """What makes scores of q k^T: the scale and, where they are not None, a soft cap, ALiBi slopes (batch, head),
    a bias (floats are added, bytes say which keys are seen), a bias by distance (batch, head, 2 radius + 1), sinks
    and a scale for each head, (batch, head), of any sign."""

    scale: float
    softcap: float | None
    slopes: Tensor2 | None
    bias: Tensor4 | None
    relative: Tensor3 | None
    radius: int | None
    sinks: Tensor2 | None
    head_scale: Tensor2 | None
    # The last: where a tuple of tuples does not end in a constant, None or 1, Triton 3.6 loses strides of 1 in it.
    multiplicity: int | None


class Dropout(NamedTuple):
    """Weights whose 16 random bits are below the threshold are dropped, the others are multiplied by `growth`.

    `state` holds seed and offset of each batch entry, int64; or five numbers as uint64, so that a kernel knows at
    compile time that there are more: beside these two, at which head, query and eight keys the tensors begin."""

    state: torch.Tensor
    threshold: int
    growth: float


def scores_of(
    scale: float,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
    relative_bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    multiplicity: bool = False,
    head_scale: torch.Tensor | None = None,
) -> Scores:
    """`Scores` as a kernel argument. The bias (B or 1, H or 1, Lq or 1, Lk or 1) repeats itself where it has
    size 1."""
    if bias is not None:
        bias = near(bias.view(torch.uint8) if bias.dtype == torch.bool else bias, 2)
        strides = (0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))
    relative, radius = None, None
    if relative_bias is not None:
        relative, radius = tensor3(relative_bias), relative_bias.shape[2] // 2
    return Scores(
        scale,
        softcap,
        tensor2(alibi_slopes),
        None if bias is None else Tensor4(bias, *strides),
        relative,
        radius,
        tensor2(sinks),
        tensor2(head_scale),
        1 if multiplicity else None,
    )


def dropout_of(state: torch.Tensor | None, dropout: float) -> Dropout | None:
    """Dropout as a kernel argument, if there is any."""
    if state is None:
        return None
    state = state.contiguous() if state.shape[1] == 2 else state.contiguous().view(torch.uint64)
    return Dropout(state, round(dropout * 2**16), 1.0 / (1.0 - dropout))


@triton.jit
def tanh(x):
    """tanh to fp32's rounding, small arguments too: a series below 0.3, powers of two above."""
    square = x * x
    series = square * (62.0 / 2835.0) - 17.0 / 315.0
    series = (series * square + 2.0 / 15.0) * square - 1.0 / 3.0
    series = x + x * (series * square)
    power = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - power) / (1.0 + power)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0.0, -large, large))


@triton.jit
def is_plain(scores):
    """Whether the scores are q k^T times the scale, nothing else."""
    return (
        scores.softcap is None
        and scores.slopes is None
        and scores.bias is None
        and scores.relative is None
        and scores.multiplicity is None
        and scores.head_scale is None
    )


@triton.jit
def scale_of(scores, score_terms):
    """The factor of q k^T."""
    if scores.head_scale is not None:
        return tl.cast(scores.scale, tl.float32) * score_terms[7]
    else:
        return tl.cast(scores.scale, tl.float32)


@triton.jit
def is_in_nats(scores):
    """Whether `finish_scores` returns nats: where floats are added. The lowest finite number, by which masks hide,
    would become -inf in log2 units."""
    if scores.relative is None and scores.bias is not None:
        return scores.bias.pointer.dtype.element_ty != tl.uint8
    else:
        return scores.relative is not None


@triton.jit
def score_unit(scores):
    """The factor from nats to the units of scores: 1 if they are in nats, else LOG2_E."""
    if is_in_nats(scores):
        return 1.0
    else:
        return LOG2_E


@triton.jit
def score_factor(scores):
    """The factor from what `finish_scores` returns to log2 units; 1 for scores in nats, which stay so."""
    if is_plain(scores):
        return tl.cast(scores.scale, tl.float32) * LOG2_E
    else:
        return 1.0


@triton.jit
def nats_factor(scores):
    """The factor from what `finish_scores` returns to nats."""
    if is_plain(scores):
        return tl.cast(scores.scale, tl.float32)
    elif is_in_nats(scores):
        return 1.0
    else:
        return LN_2


@triton.jit
def log2_weights(values, scores, lse, remainder):
    """The base-2 logarithm of exp(score - lse), of what `finish_scores` returned; `lse` is in the same units. For
    scores in nats, `remainder` is what the log-sum-exp lost by rounding, in log2 units. There the difference comes
    first: it is small where both are huge."""
    if is_in_nats(scores):
        return (values - lse) * LOG2_E - remainder
    else:
        return values * score_factor(scores) - lse


@triton.jit
def softmax_weights(values, scores, lse, remainder):
    """exp(score - lse); arguments as `log2_weights`'."""
    return tl.exp2(log2_weights(values, scores, lse, remainder))


@triton.jit
def sink_weights_of(scores, lse, batch, head):
    """The weight that a head's sink takes in each row; `lse` is in the units of the scores."""
    sink = tl.load(head_of(scores.sinks, batch, head))
    if is_in_nats(scores):
        return tl.exp2((sink - lse) * LOG2_E)
    else:
        return tl.exp2(sink * LOG2_E - lse)


@triton.jit
def cap(products, scores, score_terms):
    """The tanh of a soft cap, from q k^T; without a cap the products as they are."""
    if scores.softcap is not None:
        return tanh(products * (scale_of(scores, score_terms) / tl.cast(scores.softcap, tl.float32)))
    else:
        return products


@triton.jit
def finish_scores(capped, scores, score_terms, queries, keys, shape):
    """From what `cap` returns to scores: in nats where floats are added (`is_in_nats`), else in log2 units, up to
    `score_factor`.

    Without cap and biases they are the products as they are, so that maximum and exponential take the scale in
    their own multiply-adds. `queries` and `keys` broadcast to the tile; those that do not exist read the last
    one's bias.
    """
    slope, bias, relative = score_terms[0], score_terms[1], score_terms[2]
    if scores.softcap is not None:
        capped = capped * (tl.cast(scores.softcap, tl.float32) * score_unit(scores))
    elif not is_plain(scores):
        capped = capped * (scale_of(scores, score_terms) * score_unit(scores))
    if scores.multiplicity is not None:
        capped += score_terms[6] * score_unit(scores)
    if scores.slopes is not None:
        capped -= (slope * score_unit(scores)) * tl.abs(keys - queries - (shape.keys - shape.queries)).to(
            tl.float32
        )
    if scores.relative is not None:
        distance = keys - queries - (shape.keys - shape.queries)
        column = tl.minimum(tl.maximum(distance, -scores.radius), scores.radius) + scores.radius
        capped += tl.load(relative + column * scores.relative.row)
    if scores.bias is not None:
        # 32-bit offsets from the tile's first row and column: half the registers.
        first_row, first_column = tl.min(queries), tl.min(keys)
        rows = (tl.minimum(queries, shape.queries - 1) - first_row) * scores.bias.row
        columns = (tl.minimum(keys, shape.keys - 1) - first_column) * scores.bias.column
        bias += first_row.to(tl.int64) * scores.bias.row + first_column.to(tl.int64) * scores.bias.column
        values = tl.load(bias + (rows + columns))
        if scores.bias.pointer.dtype.element_ty == tl.uint8:
            capped = tl.where(values != 0, capped, float("-inf"))
        else:
            capped += values.to(tl.float32)
    return capped


@triton.jit
def load_score_terms(scores, dropout, batch, head):
    """One head's terms of scores and weights: its slope, pointers to its bias and its bias by distance, its
    number, the seed of its random numbers and where they begin (offset, query, eight keys), the logarithm of its
    keys' multiplicity, its scale. What is not asked for is 0; so is the multiplicity, until `with_multiplicity`
    fills it in."""
    slope, bias, relative, seed, begin, head_scale = 0.0, 0, 0, 0, 0, 1.0
    if scores.slopes is not None:
        slope = tl.load(head_of(scores.slopes, batch, head))
    if scores.bias is not None:
        bias = head_of(scores.bias, batch, head)
    if scores.relative is not None:
        relative = head_of(scores.relative, batch, head)
    if scores.head_scale is not None:
        head_scale = tl.load(head_of(scores.head_scale, batch, head))
    if dropout is not None:  # The last, since the head's number may be that of a whole from here on.
        if dropout.state.dtype.element_ty == tl.int64:
            seed, begin = tl.load(dropout.state + batch * 2), (tl.load(dropout.state + batch * 2 + 1), 0, 0)
        else:
            state = dropout.state + batch * 5
            seed, head = tl.load(state), head + tl.load(state + 2).to(tl.int32)
            begin = tl.load(state + 1), tl.load(state + 3).to(tl.int32), tl.load(state + 4).to(tl.int32)
    return slope, bias, relative, head, seed, begin, 0.0, head_scale


@triton.jit
def keep_mask(dropout, score_terms, queries, first_key, KEYS: tl.constexpr, KEYS_DOWN: tl.constexpr):
    """Which weights of a tile dropout keeps: (queries, KEYS), or (KEYS, queries) if KEYS_DOWN.

    Eight neighbouring keys share a call of Philox-4x32 with seven rounds (Salmon et al. 2011, table 2) for the
    counter (key // 8, query, head, offset): two 16-bit numbers a word.
    """
    head, seed, begin = score_terms[3], score_terms[4], score_terms[5]
    groups, queries = begin[2] + first_key // 8 + tl.arange(0, KEYS // 8), begin[1] + queries
    if KEYS_DOWN:
        group, query = groups[:, None] + 0 * queries[None, :], queries[None, :] + 0 * groups[:, None]
    else:
        group, query = groups[None, :] + 0 * queries[:, None], queries[:, None] + 0 * groups[None, :]
    a, b, c, d = tl.philox(seed, group, query, group * 0 + head, group * 0 + begin[0].to(tl.int32), n_rounds=7)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    if KEYS_DOWN:
        halves = tl.permute(halves, (0, 2, 3, 4, 1))
        return tl.reshape(halves, (KEYS, queries.shape[0])).to(tl.int32) >= dropout.threshold
    else:
        return tl.reshape(halves, (queries.shape[0], KEYS)).to(tl.int32) >= dropout.threshold


@triton.jit
def score_gradient(
    operands,
    k_tile,
    v_tile,
    start,
    queries,
    bounds,
    score_terms,
    problem,
    tile: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The gradient of a tile of scores, queries down, and what `cap` made of the products. Operands are the
    queries' q and dout, and their row values: log-sum-exps, deltas and remainders."""
    q_tile, dout_tile, row_values = operands
    # Both products first: the second one runs while the weights are made from the first.
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=tile.PRECISION)
    dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision=tile.PRECISION)
    return score_gradient_of(
        products, dweights, row_values, start, queries, bounds, score_terms, problem, tile, MASKED
    )


@triton.jit
def score_gradient_of(
    products, dweights, row_values, start, queries, bounds, score_terms, problem, tile: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """`score_gradient`, from the products q k^T and dout v^T."""
    lse, delta, remainder = row_values
    scores, dropout = problem.scores, problem.dropout
    keys = start + tl.arange(0, tile.BLOCK_N)[None, :]
    capped = cap(products, scores, score_terms)
    values = finish_scores(capped, scores, score_terms, queries[:, None], keys, problem.shape)
    weights = softmax_weights(values, scores, lse[:, None], remainder[:, None])
    if MASKED:
        weights = tl.where(is_visible(start, bounds, problem, tile), weights, 0.0)
    if dropout is not None:
        keep = keep_mask(dropout, score_terms, queries, start, tile.BLOCK_N, False)
        dweights = tl.where(keep, dweights * tl.cast(dropout.growth, tl.float32), 0.0)
    return weights * (dweights - delta[:, None]), capped
