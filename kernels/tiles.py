"""The shared vocabulary of the kernels: tensors as kernels see them, tiles, the online softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


class Tensor4(NamedTuple):
    """A (batch, head, row, column) tensor: its pointer and strides in elements."""

    pointer: torch.Tensor
    batch: int
    head: int
    row: int
    column: int


class Tensor3(NamedTuple):
    """A (batch, head, row) tensor: its pointer and strides in elements."""

    pointer: torch.Tensor
    batch: int
    head: int
    row: int


class Tensor2(NamedTuple):
    """A (batch, head) tensor: its pointer and strides in elements."""

    pointer: torch.Tensor
    batch: int
    head: int


class Shape(NamedTuple):
    """The numbers a kernel needs: query heads, query heads per key head, rows and columns of the scores."""

    heads: int
    group: int
    queries: int
    keys: int


class Window(NamedTuple):
    """Which keys are seen: so many before and after the diagonal, and in each batch entry those before its length.
    A bound that is None is absent at compile time."""

    left: int | None
    right: int | None
    key_lengths: torch.Tensor | None


class Scores(NamedTuple):
    """What is done to q k^T: the scale, and what is not None of a soft cap, ALiBi slopes (batch, head), a bias
    (floats are added, bytes say which keys are seen), a bias by distance (batch, head, 2 radius + 1) and sinks."""

    scale: float
    softcap: float | None
    slopes: Tensor2 | None
    bias: Tensor4 | None
    relative: Tensor3 | None
    radius: int | None
    sinks: Tensor2 | None
    counted: int | None


class Lists(NamedTuple):
    """Which granules, 64 x 64 scores, each row (or column) of granules has, as the mask's BlockLists have it:
    the full ones, the partial ones and their bit tiles, how often their keys count, and the pattern of each batch
    entry and head."""

    full_offsets: torch.Tensor
    full: torch.Tensor
    partial_offsets: torch.Tensor
    partial: torch.Tensor
    partial_tiles: torch.Tensor
    full_counts: torch.Tensor | None
    partial_counts: torch.Tensor | None
    tiles: torch.Tensor
    pattern: torch.Tensor
    batches: int
    heads: int
    length: int


class Dropout(NamedTuple):
    """Weights whose 16 random bits are below the threshold are dropped, the others grow by `growth`; `state` holds
    seed and offset of each batch entry."""

    state: torch.Tensor
    threshold: int
    growth: float


GRANULE: tl.constexpr = tl.constexpr(64)

# No tile has more rows or columns than this; offsets within a tile are 32-bit.
LARGEST_TILE = 256


def tensor4(t: torch.Tensor) -> Tensor4:
    """`t` as a kernel argument; copied first if offsets within one tile would pass 32 bits."""
    if (abs(t.stride(2)) + abs(t.stride(3))) * LARGEST_TILE >= 2**31:
        t = t.contiguous()
    return Tensor4(t, *t.stride())


def tensor3(t: torch.Tensor) -> Tensor3:
    """`t` as a kernel argument; copied first if offsets within one tile would pass 32 bits."""
    if abs(t.stride(2)) * LARGEST_TILE >= 2**31:
        t = t.contiguous()
    return Tensor3(t, *t.stride())


def tensor2(t: torch.Tensor | None) -> Tensor2 | None:
    """`t` as a kernel argument, if it is there."""
    return None if t is None else Tensor2(t, *t.stride())


def scores_of(
    scale: float,
    softcap: float | None,
    alibi_slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
    relative_bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    counted: bool = False,
) -> Scores:
    """What is done to the scores as a kernel argument. The bias (B or 1, H or 1, Lq or 1, Lk or 1) repeats itself
    where it has size 1."""
    if bias is not None:
        bias = bias.view(torch.uint8) if bias.dtype == torch.bool else bias
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
        1 if counted else None,
    )


def dropout_of(state: torch.Tensor | None, dropout: float) -> Dropout | None:
    """Dropout as a kernel argument, if there is any."""
    if state is None:
        return None
    return Dropout(state.contiguous(), round(dropout * 2**16), 1.0 / (1.0 - dropout))


def rows_of(lists) -> Lists:
    """The lists by rows, of a BlockLists, as a kernel argument."""
    return Lists(*lists[:4], lists.partial_tiles, *lists[5:7], *_patterns(lists), lists.full_offsets.shape[1])


def columns_of(lists) -> Lists:
    """The lists by columns, of a BlockLists, as a kernel argument."""
    return Lists(*lists[7:14], *_patterns(lists), lists.column_full_offsets.shape[1])


def _patterns(lists) -> tuple:
    return lists.bit_tiles, lists.pattern, *lists.pattern.shape


def window_of(left: int | None, right: int | None, causal: bool, key_lengths: torch.Tensor | None) -> Window:
    """A window as a kernel argument; causal is nothing to the right. Lengths are copied if expanded."""
    return Window(left, 0 if causal else right, None if key_lengths is None else key_lengths.contiguous())


def shape_of(q: torch.Tensor, k: torch.Tensor) -> Shape:
    return Shape(q.shape[1], q.shape[1] // max(k.shape[1], 1), q.shape[2], k.shape[2])


@triton.jit
def head_of(tensor, batch, head):
    """Pointer to what belongs to one head of one batch entry; 64-bit, tensors may pass 2**31 elements."""
    return tensor.pointer + batch.to(tl.int64) * tensor.batch + head.to(tl.int64) * tensor.head


@triton.jit
def tile_pointers(pointer, tensor, start, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to ROWS x WIDTH elements from row `start` on."""
    rows = tl.arange(0, ROWS)[:, None] * tensor.row
    columns = tl.arange(0, WIDTH)[None, :] * tensor.column
    return pointer + tl.cast(start, tl.int64) * tensor.row + (rows + columns)


@triton.jit
def inside(start, row_count, column_count, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Which elements of the tile from row `start` on exist."""
    rows = start + tl.arange(0, ROWS)[:, None] < row_count
    return rows & (tl.arange(0, WIDTH)[None, :] < column_count)


@triton.jit
def load_tile(
    pointer,
    tensor,
    start,
    row_count,
    column_count: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
):
    """A ROWS x WIDTH tile from row `start` on; zeros beyond the tensor. EDGE: it may pass the last row."""
    pointers = tile_pointers(pointer, tensor, start, ROWS, WIDTH)
    if EDGE:
        return tl.load(pointers, mask=inside(start, row_count, column_count, ROWS, WIDTH), other=0.0)
    elif column_count != WIDTH:
        columns = tl.broadcast_to(tl.arange(0, WIDTH)[None, :] < column_count, (ROWS, WIDTH))
        return tl.load(pointers, mask=columns, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(
    pointer,
    tensor,
    start,
    row_count,
    column_count: tl.constexpr,
    tile,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the part of the tile that exists, in the tensor's dtype."""
    pointers = tile_pointers(pointer, tensor, start, ROWS, WIDTH)
    mask = inside(start, row_count, column_count, ROWS, WIDTH)
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_row_values(pointer, tensor, rows, row_count, other):
    """One value a row; `other` beyond the last."""
    return tl.load(pointer + rows.to(tl.int64) * tensor.row, mask=rows < row_count, other=other)


@triton.jit
def key_count_of(batch, shape, window):
    """How many keys this batch entry has."""
    if window.key_lengths is not None:
        return tl.minimum(tl.load(window.key_lengths + batch), shape.keys)
    else:
        return shape.keys


@triton.jit
def key_bounds(queries, key_count, shape, window):
    """The keys each query may see: from the first to before the second. Without a window to the left the first
    is 0 for all."""
    diagonal = queries + (shape.keys - shape.queries)
    first = tl.zeros_like(queries)
    if window.left is not None:
        first = diagonal - window.left
    if window.right is not None:
        return first, tl.minimum(queries + (shape.keys - shape.queries + window.right + 1), key_count)
    else:
        return first, tl.zeros_like(queries) + key_count


@triton.jit
def within(start, bounds, window, BLOCK_N: tl.constexpr, MASKED_FIRST: tl.constexpr):
    """Which of the keys from `start` on lie inside each query's bounds: (M, BLOCK_N). Without a window the bounds
    are a word for each query, whose bits say which keys of a granule it sees."""
    columns = tl.arange(0, BLOCK_N)[None, :]
    first, stop = bounds
    # The same, said so that it takes fewer registers where the masked keys come first, or second.
    if window is None:
        inside = ((first[:, None] >> (start % GRANULE + columns)) & 1) != 0
    elif MASKED_FIRST:
        inside = columns < (stop - start)[:, None]
        if window.left is not None:
            inside = inside & (columns >= (first - start)[:, None])
    else:
        inside = start + columns < stop[:, None]
        if window.left is not None:
            inside = inside & (start + columns >= first[:, None])
    return inside


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
        and scores.counted is None
    )


@triton.jit
def score_factor(scores):
    """What makes `shape_scores` log2 units."""
    if is_plain(scores):
        return tl.cast(scores.scale, tl.float32) * LOG2_E
    else:
        return 1.0


@triton.jit
def bend(products, scores):
    """From q k^T to the tanh of a soft cap; without one the products as they are."""
    if scores.softcap is not None:
        return tanh(products * (tl.cast(scores.scale, tl.float32) / tl.cast(scores.softcap, tl.float32)))
    else:
        return products


@triton.jit
def shape_scores(bent, scores, terms, queries, keys, shape):
    """From what `bend` returns to scores, up to `score_factor`.

    Without cap and biases they are the products as they are, so that maximum and exponential take the scale in
    their own multiply-adds. `queries` and `keys` broadcast to the tile; those that do not exist read the last
    one's bias.
    """
    slope, bias, relative = terms[0], terms[1], terms[2]
    if scores.softcap is not None:
        bent = bent * (tl.cast(scores.softcap, tl.float32) * LOG2_E)
    elif not is_plain(scores):
        bent = bent * (tl.cast(scores.scale, tl.float32) * LOG2_E)
    if scores.counted is not None:
        bent += terms[6]
    if scores.slopes is not None:
        bent -= (slope * LOG2_E) * tl.abs(keys - queries - (shape.keys - shape.queries)).to(tl.float32)
    if scores.relative is not None:
        distance = keys - queries - (shape.keys - shape.queries)
        place = tl.minimum(tl.maximum(distance, -scores.radius), scores.radius) + scores.radius
        bent += tl.load(relative + place * scores.relative.row) * LOG2_E
    if scores.bias is not None:
        # 32-bit offsets from the tile's first row and column: half the registers.
        first_row, first_column = tl.min(queries), tl.min(keys)
        rows = (tl.minimum(queries, shape.queries - 1) - first_row) * scores.bias.row
        columns = (tl.minimum(keys, shape.keys - 1) - first_column) * scores.bias.column
        bias += first_row.to(tl.int64) * scores.bias.row + first_column.to(tl.int64) * scores.bias.column
        values = tl.load(bias + (rows + columns))
        if scores.bias.pointer.dtype.element_ty == tl.uint8:
            bent = tl.where(values != 0, bent, float("-inf"))
        else:
            bent += values.to(tl.float32) * LOG2_E
    return bent


@triton.jit
def terms_of(scores, dropout, batch, head):
    """What one head's scores and weights take from memory: its slope, where its biases begin, its number, and
    the seed and offset of its random numbers; 0 for what is not asked, and for how often keys count."""
    slope, bias, relative, seed, offset = 0.0, 0, 0, 0, 0
    if scores.slopes is not None:
        slope = tl.load(head_of(scores.slopes, batch, head))
    if scores.bias is not None:
        bias = head_of(scores.bias, batch, head)
    if scores.relative is not None:
        relative = head_of(scores.relative, batch, head)
    if dropout is not None:
        seed, offset = tl.load(dropout.state + batch * 2), tl.load(dropout.state + batch * 2 + 1)
    return slope, bias, relative, head, seed, offset, 0.0


@triton.jit
def list_of(lists, batch, head, start):
    """Where the offsets of the row (or column) of granules in which `start` lies stand."""
    pattern = tl.load(lists.pattern + (batch % lists.batches) * lists.heads + head % lists.heads)
    return pattern * lists.length + start // GRANULE


@triton.jit
def counting(terms, counts, entry):
    """The terms, with how often an entry's keys count, in log2 units."""
    slope, bias, relative, head, seed, offset, _ = terms
    count = 0.0
    if counts is not None:
        count = tl.load(counts + entry) * LOG2_E
    return slope, bias, relative, head, seed, offset, count


@triton.jit
def words_of(lists, entry, queries):
    """Which keys of a partial entry's granule each of these queries, all of one granule, sees: a bit a key."""
    tile = tl.load(lists.partial_tiles + entry).to(tl.int64)
    return tl.load(lists.tiles + tile * GRANULE + queries % GRANULE)


@triton.jit
def kept(dropout, terms, queries, first_key, KEYS: tl.constexpr, KEYS_DOWN: tl.constexpr):
    """Which weights of a tile dropout keeps: (queries, KEYS), or (KEYS, queries) if KEYS_DOWN.

    Eight neighbouring keys share a call of Philox-4x32 with seven rounds (Salmon et al. 2011, table 2) for the
    counter (key // 8, query, head, offset): two 16-bit numbers a word.
    """
    head, seed, offset = terms[3], terms[4], terms[5]
    groups = first_key // 8 + tl.arange(0, KEYS // 8)
    if KEYS_DOWN:
        group, query = groups[:, None] + 0 * queries[None, :], queries[None, :] + 0 * groups[:, None]
    else:
        group, query = groups[None, :] + 0 * queries[:, None], queries[:, None] + 0 * groups[None, :]
    a, b, c, d = tl.philox(seed, group, query, group * 0 + head, group * 0 + offset.to(tl.int32), n_rounds=7)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    if KEYS_DOWN:
        halves = tl.permute(halves, (0, 2, 3, 4, 1))
        return tl.reshape(halves, (KEYS, queries.shape[0])).to(tl.int32) >= dropout.threshold
    else:
        return tl.reshape(halves, (queries.shape[0], KEYS)).to(tl.int32) >= dropout.threshold


@triton.jit
def score_gradient(
    q_tile,
    dout_tile,
    lse,
    delta,
    k_tile,
    v_tile,
    start,
    queries,
    bounds,
    shape,
    window,
    scores,
    dropout,
    terms,
    MASKED: tl.constexpr,
    MASKED_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a tile of scores, queries down, and what `bend` made of the products."""
    # Both products first: the second one runs while the weights are made from the first.
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
    keys = start + tl.arange(0, BLOCK_N)[None, :]
    bent = bend(products, scores)
    values = shape_scores(bent, scores, terms, queries[:, None], keys, shape)
    weights = tl.exp2(values * score_factor(scores) - lse[:, None])
    if MASKED:
        weights = tl.where(within(start, bounds, window, BLOCK_N, MASKED_FIRST), weights, 0.0)
    if dropout is not None:
        keep = kept(dropout, terms, queries, start, BLOCK_N, False)
        dweights = tl.where(keep, dweights * tl.cast(dropout.growth, tl.float32), 0.0)
    return weights * (dweights - delta[:, None]), bent


@triton.jit
def online_softmax_update(scores, scale, row_max, row_sum, MASKED: tl.constexpr):
    """Fold one tile of raw scores into the running softmax, in powers of two.

    Returns the tile's weights, the factor by which what was accumulated before shrinks, and the new running
    maximum (scaled, in log2 units) and sum. Only a masked tile can leave a row without a maximum: it pivots
    on 0, so that -inf minus -inf never happens.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    weights = tl.exp2(scores * scale - pivot[:, None])
    shrink = tl.exp2(row_max - pivot)
    return weights, shrink, new_max, row_sum * shrink + tl.sum(weights, 1)


@triton.jit
def heavy_first(program, tiles, heads, heads_per_section, CAUSAL: tl.constexpr):
    """Program number -> (tile, head): the last tiles first, since causal ones grow; section by section of
    heads, so that the keys and values in flight stay in the L2 cache."""
    section = program // (tiles * heads_per_section)
    first_head = section * heads_per_section
    width = tl.minimum(heads - first_head, heads_per_section)
    within = program - first_head * tiles
    tile = within // width
    if CAUSAL:
        tile = tiles - 1 - tile
    return tile, first_head + within % width
