"""The hidden layer of an MLP, hidden = act(x W1^T + b1), or gated, hidden = act(x Wg^T + bg) * (x Wu^T + bu).

x is (T, d): T tokens of width d; the hidden layer has width h. Weights are (out, in), biases may be None. The
products around the hidden layer are PyTorch's.

Kept for the backward, beside x: the pre-activation `pre` (T, h), or if gated gate and up side by side (T, 2h), in
the input's dtype or in int8 with a scale for each 128 numbers of a row; or nothing. ReLU keeps only its output,
whose sign is the mask, and squared ReLU the output of the ReLU. The backward computes the hidden layer again,
with the same function from the same values: `pre` is rounded to the dtype before the activation, as eager PyTorch
rounds it. So the hidden layer has the same bits in both directions, but for int8.

    forward    hidden_kernel            pre = x W1^T + b1, activated in the epilogue   -> hidden [, pre]
    backward   hidden_gradient_kernel   dh = dy W2; hidden = act(pre), dpre = dh act'(pre) in the epilogue
                                        -> hidden, dpre, sums of dpre over each tile's rows

In a residual branch, y = residual + dropout(hidden W2^T + b2) of the norm of x:

    output_kernel    the second product, with dropout and the residual in its epilogue; the dropout of dy is
                     `output_pass_kernel`, its epilogue alone
    hidden_kernel    takes the norm as a factor of each row: W1 times the norm's weight is made before the launch
                     (a layer norm's bias goes into b1), `moments_kernel` finds each row's 1 / deviation (and
                     mean), and the epilogue multiplies: ((x - mean) / deviation * w) W^T
                     = (x (w W)^T - mean * sum(w W)) / deviation. The norm of x is never written. In
                     bfloat16: see FOLDED.

Beyond the widths in launch.MLP_FUSED_UP_TO the library's GEMM saves more time than one more pass over the hidden
layer costs. There the first product of each direction goes to the library, too, followed by `activation_kernel` or
`activation_gradient_kernel`, which share their epilogues with the fused kernels. int8 always goes that way
forward: the fused kernel would need a pass of its own to quantise, and both move seven bytes for each 16-bit
number. Bias gradients are float32 sums of each tile, added up in a fixed order: no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .attention.scores import keep_mask
from .launch.mlp import MLP_QUANTISE
from .norm import Moments, load_rows, merged, moments_of, norm_forward, rows_of
from .norm import Size as NormSize
from .tiles import Matrix, matrix, tile_pointers

INVERSE_SQRT_2_PI: tl.constexpr = tl.constexpr(0.3989422804014327)
MINUS_HALF_LOG2_E: tl.constexpr = tl.constexpr(-0.7213475204444817)
# The tanh form of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): u = sqrt(2 / pi) (x + 0.044715 x^3).
TWO_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(1.5957691216057308)
GELU_CUBIC: tl.constexpr = tl.constexpr(0.044715)

# int8: so many neighbours in a row share a scale.
SCALED: tl.constexpr = tl.constexpr(128)

# Rows of tiles whose columns are computed one after the other, so that the programs that run at a time read few
# rows of x and few weights, which stay in the L2 cache.
GROUP: tl.constexpr = tl.constexpr(8)


class Linear(NamedTuple):
    """A linear layer: its weight as a product's right-hand side (in, out), and its bias (out,) or None. Of a layer
    norm before it, `level` (out,): what a row with the mean 1 and no deviation would give."""

    weight: Matrix
    bias: torch.Tensor | None
    level: torch.Tensor | None = None
    last: None = None  # Triton 3.6: a tuple of tuples must end in a constant


class Pair(NamedTuple):
    """What there is of gate and of up: pre-activations, gradients, sums or scales. Without a gate, `gate` is that
    of the only first layer, and `up` is None. Both have gate's strides, so that a kernel computes offsets once."""

    gate: Matrix
    up: torch.Tensor | None
    last: None = None  # as in `Linear`


class Dropout(NamedTuple):
    """Elements whose 16 random bits are below the threshold are dropped, the others are multiplied by `growth`.
    `state` holds seed and offset; the first row is the token `first`."""

    state: torch.Tensor
    threshold: int
    growth: float
    first: int


class Size(NamedTuple):
    """The sizes of a product: T tokens, the width that is summed over, and the width of the hidden layer."""

    tokens: int
    inner: int
    hidden: int


def linear_argument(weight: torch.Tensor, bias: torch.Tensor | None, level: torch.Tensor | None = None) -> Linear:
    """A torch.nn.Linear's weight (out, in) and bias as a kernel argument."""
    return Linear(matrix(weight.t()), None if bias is None else bias.contiguous(), level)


@triton.jit
def normal_cdf(x):
    """P(Z <= x) of a standard normal, to 9e-8, and to five digits of its left tail; half the steps of erf.

    The tail's logarithm is smooth: log2 P(Z > a) is this polynomial in a, our own minimax fit on [0, 6], in which
    the highest power takes the tail to zero from there on.
    """
    a = tl.abs(x)
    log2_tail = 7.216240760e-07 - 2.324146919e-08 * a
    log2_tail = log2_tail * a - 9.567306734e-06
    log2_tail = log2_tail * a + 6.874158862e-05
    log2_tail = log2_tail * a - 2.546761534e-04
    log2_tail = log2_tail * a - 4.853718201e-05
    log2_tail = log2_tail * a + 7.002310362e-03
    log2_tail = log2_tail * a - 5.247625336e-02
    log2_tail = log2_tail * a - 4.592100680e-01
    log2_tail = log2_tail * a - 1.151105404
    tail = tl.exp2(log2_tail * a - 1.0)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def tanh_cdf(x):
    """The tanh form's stand-in for the normal CDF, (1 + tanh u) / 2, which is sigmoid(2 u)."""
    return tl.sigmoid(x * TWO_SQRT_2_OVER_PI * (1.0 + GELU_CUBIC * x * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) in float32. ReLUs let NaN through, as torch's do."""
    if ACTIVATION == "gelu":
        return x * normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        return x * tanh_cdf(x)
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "relu_squared":
        return tl.where(x < 0.0, 0.0, x * x)
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        return tl.where(x < 0.0, 0.0, x)


@triton.jit
def activate_derivative(x, ACTIVATION: tl.constexpr):
    """act'(x) in float32. For the ReLUs x may be clamped at 0, which does not change the result."""
    if ACTIVATION == "gelu":
        return normal_cdf(x) + x * INVERSE_SQRT_2_PI * tl.exp2(x * x * MINUS_HALF_LOG2_E)
    elif ACTIVATION == "gelu_tanh":
        p = tanh_cdf(x)
        # Beyond |x| = 16, where p (1 - p) is 0, the square may overflow: 0 times infinity.
        slope = TWO_SQRT_2_OVER_PI * (1.0 + 3.0 * GELU_CUBIC * tl.minimum(x * x, 256.0))
        return p + x * p * (1.0 - p) * slope
    elif ACTIVATION == "silu":
        p = tl.sigmoid(x)
        return p * (1.0 + x * (1.0 - p))
    elif ACTIVATION == "relu_squared":
        return tl.where(x > 0.0, 2.0 * x, 0.0)
    else:
        return tl.where(x > 0.0, 1.0, 0.0)


@triton.jit
def grouped_tile(program, row_tiles, column_tiles):
    """Program number -> (row, column) of its tile: down the columns of GROUP rows of tiles at a time."""
    first_row = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first_row, GROUP)
    within = program - first_row * column_tiles
    return first_row + within % height, within // height


@triton.jit
def block(matrix, row, column, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to ROWS x WIDTH elements of a matrix, from (row, column) on."""
    return tile_pointers(matrix.pointer + tl.cast(column, tl.int64) * matrix.column, matrix, row, ROWS, WIDTH)


@triton.jit
def block_of_up(pair, row, column, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The same of the second matrix of a Pair."""
    pointer = pair.up + tl.cast(column, tl.int64) * pair.gate.column
    return tile_pointers(pointer, pair.gate, row, ROWS, WIDTH)


@triton.jit
def load_operand(pointers, outside, inside, WHOLE: tl.constexpr):
    """A tile of an operand, zeros beyond the matrix. WHOLE: the summed dimension needs no mask."""
    if WHOLE:
        return tl.load(pointers, mask=outside, other=0.0)
    else:
        return tl.load(pointers, mask=outside & inside, other=0.0)


@triton.jit
def products(
    a,
    first,
    second,
    row,
    column,
    size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of a @ first and of a @ second, from (row, column) on, in float32.

    `a` (tokens, inner) is read once for both. If `second` is None, the second result has no meaning.
    """
    rows = (row + tl.arange(0, BLOCK_M) < size.tokens)[:, None]
    columns = (column + tl.arange(0, BLOCK_N) < size.hidden)[None, :]
    steps = tl.arange(0, BLOCK_K)
    a_pointers = block(a, row, 0, BLOCK_M, BLOCK_K)
    first_pointers = block(first, 0, column, BLOCK_K, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second_total = total
    if second is not None:
        second_pointers = block(second, 0, column, BLOCK_K, BLOCK_N)
    for start in range(0, size.inner, BLOCK_K):
        inside = steps < size.inner - start
        left = load_operand(a_pointers, rows, inside[None, :], WHOLE)
        right = load_operand(first_pointers, columns, inside[:, None], WHOLE)
        total = tl.dot(left, right, total, input_precision="ieee")
        a_pointers += BLOCK_K * a.column
        first_pointers += BLOCK_K * first.row
        if second is not None:
            right = load_operand(second_pointers, columns, inside[:, None], WHOLE)
            second_total = tl.dot(left, right, second_total, input_precision="ieee")
            second_pointers += BLOCK_K * second.row
    return total, second_total


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns. No data moves between threads."""
    pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def quarters(tile):
    """A tile's columns in four parts, left to right. An epilogue that handles one part at a time keeps only a
    quarter of its intermediate values in registers; for the whole tile at once, the gradients' would spill."""
    left, right = halves(tile)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@triton.jit
def plus_bias(total, bias, columns, inside):
    """Add a bias, if there is one, to every row."""
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def store_hidden(pre, up, hidden, row, column, mask, ACTIVATION: tl.constexpr):
    """hidden = act(pre), times `up` in gated form: every step rounded to the dtype, as eager rounds it."""
    value = activate(pre.to(tl.float32), ACTIVATION).to(hidden.pointer.dtype.element_ty)
    if up is not None:
        value = (value.to(tl.float32) * up.to(tl.float32)).to(value.dtype)
    tl.store(block(hidden, row, column, pre.shape[0], pre.shape[1]), value, mask=mask)


@triton.jit
def standardised(total, layer, moments, row, columns, inside, size, tile: tl.constexpr):
    """From a tile of x W^T to that of the standardised rows of x, if there is a norm."""
    if tile.NORM != "":
        rows = row + tl.arange(0, total.shape[0])
        exist = rows < size.tokens
        if tile.NORM == "layer":
            mean = tl.load(moments.mean + rows, mask=exist, other=0.0)
            total -= mean[:, None] * tl.load(layer.level + columns, mask=inside, other=0.0)[None, :]
        total *= tl.load(moments.inverse + rows, mask=exist, other=0.0)[:, None]
    return total


@triton.jit
def finish(total, up, first, second, moments, kept, hidden, row, column, size, tile: tl.constexpr):
    """From a tile of x @ first, and of x @ second in gated form: norm, bias, rounding, activation, stores."""
    rows: tl.constexpr = total.shape[0]
    width: tl.constexpr = total.shape[1]
    dtype: tl.constexpr = hidden.pointer.dtype.element_ty
    columns = column + tl.arange(0, width)
    inside = columns < size.hidden
    mask = (row + tl.arange(0, rows) < size.tokens)[:, None] & inside[None, :]
    total = standardised(total, first, moments, row, columns, inside, size, tile)
    pre = plus_bias(total, first.bias, columns, inside).to(dtype)
    if tile.CLAMPED:
        pre = tl.where(pre < 0.0, 0.0, pre).to(dtype)
    if tile.KEEP:
        tl.store(block(kept.gate, row, column, rows, width), pre, mask=mask)
    if tile.GATED:
        up = standardised(up, second, moments, row, columns, inside, size, tile)
        up = plus_bias(up, second.bias, columns, inside).to(dtype)
        if tile.KEEP:
            tl.store(block_of_up(kept, row, column, rows, width), up, mask=mask)
        store_hidden(pre, up, hidden, row, column, mask, tile.ACTIVATION)
    else:
        store_hidden(pre, None, hidden, row, column, mask, tile.ACTIVATION)


@triton.jit
def hidden_kernel(x, first, second, moments, kept, hidden, size, tile: tl.constexpr):
    """hidden = act(x @ first), or if GATED act(x @ first) * (x @ second). If KEEP, the pre-activations are stored
    in `kept`. If NORM is "rms" or "layer", the rows of x are standardised by their moments. GATED and KEEP are
    flags because Triton 3.6 cannot compare a tuple that holds None with None."""
    tile_row, tile_column = grouped_tile(
        tl.program_id(0), tl.cdiv(size.tokens, tile.BLOCK_M), tl.cdiv(size.hidden, tile.BLOCK_N)
    )
    row = tile_row * tile.BLOCK_M
    column = tile_column * tile.BLOCK_N
    second_weight = second.weight if tile.GATED else None
    total, up = products(
        x, first.weight, second_weight, row, column, size, tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.WHOLE
    )
    totals = quarters(total)
    ups = quarters(up)
    for part in tl.static_range(4):
        start = column + part * (tile.BLOCK_N // 4)
        finish(totals[part], ups[part], first, second, moments, kept, hidden, row, start, size, tile)


@triton.jit
def moments_kernel(x, moments, size, eps, tile: tl.constexpr):
    """The moments of BLOCK_M rows, as `norm_kernel` computes them."""
    rows = tl.program_id(0) * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    exists = rows < size.rows
    columns = tl.arange(0, tile.BLOCK_N)
    mean, squares = moments_of(
        load_rows(x, 0, rows, exists, columns, tile.WIDTH), 0, columns, tile.WIDTH, tile.CENTRED
    )
    for start in range(tile.BLOCK_N, tile.WIDTH, tile.BLOCK_N):
        stream = load_rows(x, 0, rows, exists, start + columns, tile.WIDTH)
        more_mean, more_squares = moments_of(stream, start, start + columns, tile.WIDTH, tile.CENTRED)
        more = tl.minimum(tile.BLOCK_N, tile.WIDTH - start)
        mean, squares = merged(mean, squares, more_mean, more_squares, start, more)
    inverse = tl.rsqrt(squares * (1.0 / tile.WIDTH) + tl.cast(eps, tl.float32))
    line = rows.to(tl.int64)[:, None]
    if moments.mean is not None:
        tl.store(moments.mean + line, mean, mask=exists[:, None])
    tl.store(moments.inverse + line, inverse, mask=exists[:, None])


@triton.jit
def write_output(value, residual, dropout, y, row, column, size, tile: tl.constexpr):
    """Store a tile of the output: dropped out, then added to the residual. If tile.ROUND, every step is rounded to
    the dtype, as eager rounds it."""
    rows: tl.constexpr = value.shape[0]
    width: tl.constexpr = value.shape[1]
    dtype: tl.constexpr = y.pointer.dtype.element_ty
    inside = column + tl.arange(0, width) < size.hidden
    mask = (row + tl.arange(0, rows) < size.tokens)[:, None] & inside[None, :]
    value = value.to(dtype).to(tl.float32) if tile.ROUND else value
    if dropout is not None:
        tokens = dropout.first + row + tl.arange(0, rows)
        score_terms = (0, 0, 0, 0, tl.load(dropout.state), (tl.load(dropout.state + 1), 0, 0))
        keep = keep_mask(dropout, score_terms, tokens, column, width, False)
        value = tl.where(keep, value * tl.cast(dropout.growth, tl.float32), 0.0)
        value = value.to(dtype).to(tl.float32) if tile.ROUND else value
    if residual is not None:
        value += tl.load(block(residual, row, column, rows, width), mask=mask, other=0.0).to(tl.float32)
    tl.store(block(y, row, column, rows, width), value.to(dtype), mask=mask)


@triton.jit
def output_kernel(hidden, layer, residual, dropout, y, size, tile: tl.constexpr):
    """y = residual + dropout(hidden @ layer); the residual and the dropout may be None."""
    tile_row, tile_column = grouped_tile(
        tl.program_id(0), tl.cdiv(size.tokens, tile.BLOCK_M), tl.cdiv(size.hidden, tile.BLOCK_N)
    )
    row = tile_row * tile.BLOCK_M
    column = tile_column * tile.BLOCK_N
    total, _ = products(
        hidden, layer.weight, None, row, column, size, tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.WHOLE
    )
    parts = quarters(total)
    for part in tl.static_range(4):
        start = column + part * (tile.BLOCK_N // 4)
        columns = start + tl.arange(0, tile.BLOCK_N // 4)
        value = plus_bias(parts[part], layer.bias, columns, columns < size.hidden)
        write_output(value, residual, dropout, y, row, start, size, tile)


@triton.jit
def output_pass_kernel(product, residual, dropout, y, size, tile: tl.constexpr):
    """The epilogue of `output_kernel`, for a product from the library or for dy. May work in place."""
    _, row, column, mask = tile_in_hidden(size, tile)
    value = tl.load(block(product, row, column, tile.BLOCK_M, tile.BLOCK_N), mask=mask, other=0.0)
    write_output(value.to(tl.float32), residual, dropout, y, row, column, size, tile)


@triton.jit
def store_partial(gradient, pointer, sums, tile_row, column, inside):
    """The tile's part of a bias gradient: its sum over rows. At `pointer`, gate's or up's, `sums` has one line for
    each row of tiles."""
    pointers = pointer + tl.cast(tile_row, tl.int64) * sums.gate.row + column + tl.arange(0, gradient.shape[1])
    tl.store(pointers, tl.sum(gradient, 0), mask=inside)


@triton.jit
def scales_of(pointer, scales, row, column, tokens, ROWS: tl.constexpr):
    """Pointers to the scales of a tile's rows, and which of them exist. The tile's columns lie in one block."""
    rows = row + tl.arange(0, ROWS)
    places = rows.to(tl.int64) * scales.gate.row + column // SCALED * scales.gate.column
    return pointer + places, rows < tokens


@triton.jit
def differentiate(dh, kept, scales, hidden, gradients, sums, tile_row, column, size, tile: tl.constexpr):
    """From a tile of dh: the hidden layer again, the gradient of the pre-activations, and its sums over rows.

    Rows beyond the last have dh = 0, so they add nothing to the sums. `hidden` may be None. `gradients` must not
    lie where `kept` lies. If tile.ROUND, every step is rounded to the dtype, as eager rounds it.
    """
    rows: tl.constexpr = dh.shape[0]
    width: tl.constexpr = dh.shape[1]
    row = tile_row * rows
    inside = column + tl.arange(0, width) < size.hidden
    mask = (row + tl.arange(0, rows) < size.tokens)[:, None] & inside[None, :]
    dtype: tl.constexpr = gradients.gate.pointer.dtype.element_ty
    dh = dh.to(dtype).to(tl.float32) if tile.ROUND else dh

    pre = tl.load(block(kept.gate, row, column, rows, width), mask=mask, other=0.0)
    if tile.INT8:
        pointers, exist = scales_of(scales.gate.pointer, scales, row, column, size.tokens, rows)
        pre = (pre.to(tl.float32) * tl.load(pointers, mask=exist, other=0.0)[:, None]).to(dtype)
    up = None
    if tile.GATED:
        dup = dh * activate(pre.to(tl.float32), tile.ACTIVATION).to(dtype).to(tl.float32)
        tl.store(block_of_up(gradients, row, column, rows, width), dup.to(dtype), mask=mask)
        if tile.SUMS:
            dup = dup.to(dtype).to(tl.float32) if tile.ROUND else dup
            store_partial(dup, sums.up, sums, tile_row, column, inside)
        # Loaded only now: registers are scarce.
        up = tl.load(block_of_up(kept, row, column, rows, width), mask=mask, other=0.0)
        if tile.INT8:
            pointers, exist = scales_of(scales.up, scales, row, column, size.tokens, rows)
            up = (up.to(tl.float32) * tl.load(pointers, mask=exist, other=0.0)[:, None]).to(dtype)
        dh = dh * up.to(tl.float32)
        dh = dh.to(dtype).to(tl.float32) if tile.ROUND else dh
    if hidden is not None:
        store_hidden(pre, up, hidden, row, column, mask, tile.ACTIVATION)
    dgate = dh * activate_derivative(pre.to(tl.float32), tile.ACTIVATION)
    tl.store(block(gradients.gate, row, column, rows, width), dgate.to(dtype), mask=mask)
    if tile.SUMS:
        dgate = dgate.to(dtype).to(tl.float32) if tile.ROUND else dgate
        store_partial(dgate, sums.gate.pointer, sums, tile_row, column, inside)


@triton.jit
def hidden_gradient_kernel(dy, weight, kept, scales, hidden, gradients, sums, size, tile: tl.constexpr):
    """dh = dy @ weight, and in the epilogue all elementwise work on dh."""
    tile_row, tile_column = grouped_tile(
        tl.program_id(0), tl.cdiv(size.tokens, tile.BLOCK_M), tl.cdiv(size.hidden, tile.BLOCK_N)
    )
    column = tile_column * tile.BLOCK_N
    dh, _ = products(
        dy,
        weight,
        None,
        tile_row * tile.BLOCK_M,
        column,
        size,
        tile.BLOCK_M,
        tile.BLOCK_N,
        tile.BLOCK_K,
        tile.WHOLE,
    )
    parts = quarters(dh)
    for part in tl.static_range(4):
        start = column + part * (tile.BLOCK_N // 4)
        differentiate(parts[part], kept, scales, hidden, gradients, sums, tile_row, start, size, tile)


@triton.jit
def tile_in_hidden(size, tile: tl.constexpr):
    """The program's tile of the hidden layer: its row of tiles, its first row and column, and which of its
    elements exist."""
    tile_row, tile_column = grouped_tile(
        tl.program_id(0), tl.cdiv(size.tokens, tile.BLOCK_M), tl.cdiv(size.hidden, tile.BLOCK_N)
    )
    row = tile_row * tile.BLOCK_M
    column = tile_column * tile.BLOCK_N
    rows = (row + tl.arange(0, tile.BLOCK_M) < size.tokens)[:, None]
    return tile_row, row, column, rows & (column + tl.arange(0, tile.BLOCK_N) < size.hidden)[None, :]


@triton.jit
def quantise(values, codes, scales, exist, mask, KEEP_SIGN: tl.constexpr):
    """Store a tile of 128 columns as int8 at `codes`, with a scale for each row that exists at `scales`.

    The largest number of a row gets the code 127 or -127. KEEP_SIGN: a positive number gets at least the code 1,
    because a ReLU's derivative depends on it. A row with an infinity or a NaN becomes NaN: 0 times infinity.
    """
    sizes = tl.abs(values)
    largest = tl.max(tl.where(sizes < float("inf"), sizes, float("inf")), 1)
    scale = largest / 127.0
    # A scale whose inverse overflows, or is 0, belongs to numbers that are 0 but for 1e-35.
    inverse = 1.0 / tl.where((scale > 1e-37) & (scale < float("inf")), scale, 1.0)
    code = tl.floor(values * inverse[:, None] + 0.5)
    code = tl.where((scale < float("inf"))[:, None], tl.minimum(tl.maximum(code, -127.0), 127.0), 0.0)
    if KEEP_SIGN:
        code = tl.where(values > 0.0, tl.maximum(code, 1.0), code)
    tl.store(codes, code.to(tl.int8), mask=mask)
    tl.store(scales, scale, mask=exist)


@triton.jit
def activation_kernel(kept, codes, scales, hidden, size, tile: tl.constexpr):
    """hidden = act(gate), or if GATED act(gate) * up, from what the library's products are, in `kept`; may work in
    place. If CLAMPED, the output of the ReLU replaces `kept`. If INT8, codes and scales of `kept` are stored."""
    _, row, column, mask = tile_in_hidden(size, tile)
    dtype: tl.constexpr = hidden.pointer.dtype.element_ty
    pre = tl.load(block(kept.gate, row, column, tile.BLOCK_M, tile.BLOCK_N), mask=mask, other=0.0)
    up = None
    if tile.CLAMPED:
        pre = tl.where(pre < 0.0, 0.0, pre).to(dtype)
        if tile.KEEP:
            tl.store(block(kept.gate, row, column, tile.BLOCK_M, tile.BLOCK_N), pre, mask=mask)
    if tile.INT8:
        to = block(codes.gate, row, column, tile.BLOCK_M, tile.BLOCK_N)
        pointers, exist = scales_of(scales.gate.pointer, scales, row, column, size.tokens, tile.BLOCK_M)
        quantise(pre.to(tl.float32), to, pointers, exist, mask, tile.KEEP_SIGN)
    if tile.GATED:
        up = tl.load(block_of_up(kept, row, column, tile.BLOCK_M, tile.BLOCK_N), mask=mask, other=0.0)
        if tile.INT8:
            to = block_of_up(codes, row, column, tile.BLOCK_M, tile.BLOCK_N)
            pointers, exist = scales_of(scales.up, scales, row, column, size.tokens, tile.BLOCK_M)
            quantise(up.to(tl.float32), to, pointers, exist, mask, False)
    store_hidden(pre, up, hidden, row, column, mask, tile.ACTIVATION)


@triton.jit
def activation_gradient_kernel(dh, kept, scales, hidden, gradients, sums, size, tile: tl.constexpr):
    """The epilogue of `hidden_gradient_kernel`, for dh from the library. May work in place."""
    tile_row, row, column, mask = tile_in_hidden(size, tile)
    dh_tile = tl.load(block(dh, row, column, tile.BLOCK_M, tile.BLOCK_N), mask=mask, other=0.0).to(tl.float32)
    differentiate(dh_tile, kept, scales, hidden, gradients, sums, tile_row, column, size, tile)


def as_operand(dy: torch.Tensor) -> torch.Tensor:
    """The upstream gradient in a layout that products take: contiguous rows or columns. An expanded one (the
    gradient of a sum) is copied once, instead of at each of its three uses."""
    return dy if 1 in dy.stride() else dy.contiguous()


def inner_tile(dtype: torch.dtype) -> int:
    """BLOCK_K: 128 bytes of a row, the widest swizzle of shared memory."""
    return 128 // dtype.itemsize


def is_fused(kernel: object, size: Size, operands: Sequence[torch.Tensor], fused: bool | None) -> bool:
    """Whether a product runs in our kernel and not in the library's; `fused` decides if it is not None.

    Otherwise launch.MLP_FUSED_UP_TO decides, if the lines of all operands start at multiples of 16 elements.
    Operands with other lines go to the library: our kernel would load them value by value, not asynchronously, and
    spill registers.
    """
    if fused is not None:
        return fused
    family = launch.family(kernel, operands[0].device)
    limits = launch.MLP_FUSED_UP_TO.get(family, launch.MLP_FUSED_UP_TO["sm_80"])
    if size.inner > limits.get(operands[0].element_size(), -1):
        return False
    return family == launch.INTERPRETER or (size.hidden % 16 == 0 and all(aligned(t) for t in operands))


def aligned(t: torch.Tensor) -> bool:
    """Whether the lines of a matrix start at multiples of 16 elements, for which Triton specialises a kernel."""
    unit = 1 in t.stride() and all(stride == 1 or stride % 16 == 0 for stride in t.stride())
    return unit and t.shape[1] % 16 == 0 and t.storage_offset() % 16 == 0


def tiling(table: dict, kernel: object, operand: torch.Tensor, size: Size) -> launch.Tiling:
    """The table's row for this family, dtype and number of hidden elements."""
    family = launch.family(kernel, operand.device)
    return launch.look_up(table, family, operand.element_size(), size.tokens * size.hidden)


def tile_count(size: Size, tile: launch.Tiling) -> int:
    """How many programs cover the hidden layer, one for each tile."""
    return triton.cdiv(size.tokens, tile.block_m) * triton.cdiv(size.hidden, tile.block_n)


class Layer(NamedTuple):
    """The first layer as a call gives it.

    linears: one (weight, bias), or gate's and up's. packed: "gate_up" or "up_gate" if the one weight (2h, d) holds
    both in this order, else "". activation: its name. hidden: the width h.
    """

    linears: Sequence[tuple[torch.Tensor, torch.Tensor | None]]
    packed: str
    activation: str
    hidden: int

    @property
    def gated(self) -> bool:
        return bool(self.packed) or len(self.linears) == 2

    @property
    def width(self) -> int:
        """Of the pre-activations."""
        return 2 * self.hidden if self.gated else self.hidden

    def halves(self, t: torch.Tensor | None, dim: int) -> tuple:
        """Gate's part and up's of a tensor that holds both; (t, None) without a gate."""
        if not self.gated or t is None:
            return t, None
        first, second = t.tensor_split(2, dim)
        return (second, first) if self.packed == "up_gate" else (first, second)

    def separate(self) -> Sequence[tuple[torch.Tensor, torch.Tensor | None]]:
        """(weight, bias) of gate and of up, as views of a packed weight."""
        if not self.packed:
            return self.linears
        ((weight, bias),) = self.linears
        return list(zip(self.halves(weight, 0), self.halves(bias, 0), strict=True))

    @property
    def keeps_hidden(self) -> bool:
        """Whether the hidden layer itself is kept: the backward of ReLU needs only its sign."""
        return self.activation == "relu" and not self.gated

    @property
    def clamped(self) -> bool:
        """Whether the output of the ReLU is kept, and squared again in the backward."""
        return self.activation == "relu_squared" and not self.gated

    def choices(self, **more: object) -> dict[str, object]:
        """Compile-time choices of every kernel of this layer."""
        return {"ACTIVATION": self.activation, "GATED": self.gated, **more}


def pair(layer: Layer, t: torch.Tensor | None) -> Pair | None:
    """A tensor that holds gate's and up's columns, as a kernel argument."""
    return paired(*layer.halves(t, 1))


def paired(gate: torch.Tensor | None, up: torch.Tensor | None) -> Pair | None:
    """Gate's tensor and up's, or the only one, as a kernel argument."""
    if gate is None:
        return None
    if up is not None and up.stride() != gate.stride():
        gate, up = gate.contiguous(), up.contiguous()
    whole = matrix(gate)
    if up is not None and whole.pointer is not gate:  # copied, because its offsets are large
        up = up.contiguous()
    return Pair(whole, up)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The library's x W^T + b, the bias added before the one rounding."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def column_sum(t: torch.Tensor) -> torch.Tensor:
    """The sum over rows, in float32 and in a fixed order."""
    return t.sum(0, dtype=torch.float32)


class Norm(NamedTuple):
    """The norm of x before the first layer, over d columns: weight and bias (d,) or None; whether it is a layer
    norm; its epsilon."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    centred: bool
    eps: float

    def of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The norm of x (T, d), and the moments of its rows (1, T)."""
        lines = (None if t is None else t[None] for t in (self.weight, self.bias))
        y, _, mean, inverse = norm_forward(x[None], None, *lines, centred=self.centred, eps=self.eps)
        return y[0], mean, inverse

    def moments(self, x: torch.Tensor) -> Moments:
        """The moments of the rows of x (T, d) alone."""
        tokens, width = x.shape
        moments = Moments(*(x.new_empty(tokens, dtype=torch.float32) if t else None for t in (self.centred, True)))
        family = launch.family(moments_kernel, x.device)
        tile = launch.look_up(launch.NORM_FORWARD, family, x.element_size(), width)
        launch.start(
            moments_kernel,
            (triton.cdiv(tokens, tile.block_m),),
            rows_of(x[None]),
            moments,
            NormSize(tokens, 0, 0),
            self.eps,
            tile=tile.tile(CENTRED=self.centred, WIDTH=width),
            **tile.compiler_options(),
        )
        return moments

    def folded(self, layer: Layer) -> list[tuple]:
        """Weight, bias and level (see `Linear`) of each first layer, with this norm's weight and bias in them, so
        that they take standardised rows."""
        found = []
        for weight, bias in layer.separate():
            scaled = weight if self.weight is None else (weight * self.weight).to(weight.dtype)
            if self.bias is not None:
                shift = torch.mv(weight, self.bias.to(weight.dtype))
                bias = shift if bias is None else shift.float() + bias
            found.append((scaled, bias, scaled.sum(1, dtype=torch.float32) if self.centred else None))
        return found


# In these dtypes a norm's weight is multiplied into the layer's. Products in float32 are the library's, by
# launch.MLP_FUSED_UP_TO: it takes no factor for each row, and to write the norm of x costs less than a percent of
# them. float16 has few digits below 6e-5 and nothing above 65504: the product of two small weights would lose
# digits, and counts where x is large; that of two large ones would be infinite. One scale for all of them does not
# help where the norm's weight goes from 1e-2 to 1e2.
FOLDED = (torch.bfloat16,)


def folds(x: torch.Tensor, layer: Layer, norm: Norm) -> bool:
    """Whether the norm goes into the first product. That saves writing the norm of x, 2 bytes for each of T x d
    elements. It costs reading and writing each weight once, and of a layer norm reading it twice more."""
    bytes_a_weight = 8 if norm.centred else 4
    return x.dtype in FOLDED and 2 * x.shape[0] >= bytes_a_weight * layer.width


def fused_hidden(x, layer: Layer, norm: Norm | None, hidden, kept, size) -> None:
    """Launch hidden_kernel: fill `hidden`, and `kept` if it is not None. `norm`: of x, to be folded in."""
    linears = [(*linear, None) for linear in layer.separate()] if norm is None else norm.folded(layer)
    table = launch.MLP_GATED_FORWARD if layer.gated else launch.MLP_FORWARD
    tile = tiling(table, hidden_kernel, x, size)
    step = inner_tile(x.dtype)
    first, *rest = [linear_argument(*linear) for linear in linears]
    keep = kept is not None
    choices = layer.choices(
        KEEP=keep,
        CLAMPED=keep and layer.clamped,
        WHOLE=size.inner % step == 0,
        BLOCK_K=step,
        NORM="" if norm is None else "layer" if norm.centred else "rms",
    )
    launch.start(
        hidden_kernel,
        (tile_count(size, tile),),
        matrix(x),
        first,
        rest[0] if rest else None,
        None if norm is None else norm.moments(x),
        pair(layer, kept),
        matrix(hidden),
        size,
        tile=tile.tile(**choices),
        **tile.compiler_options(),
    )


def library_hidden(x, layer: Layer, hidden, pre, quantised: tuple, keep: bool, size) -> None:
    """The library's products into `pre`, then activation_kernel from there to `hidden`, and to the codes and
    scales in `quantised` if they are not None. keep: whether `pre` is for the backward."""
    for (weight, bias), part in zip(layer.linears, pre.chunk(len(layer.linears), 1), strict=True):
        linear(x, weight, bias, out=part)
    codes, scales = quantised
    int8 = codes is not None
    table = MLP_QUANTISE if int8 else launch.MLP_ELEMENTWISE
    tile = tiling(table, activation_kernel, x, size)
    choices = layer.choices(
        INT8=int8,
        KEEP=keep,
        CLAMPED=layer.clamped or layer.keeps_hidden,
        KEEP_SIGN=layer.activation in ("relu", "relu_squared"),
    )
    launch.start(
        activation_kernel,
        (tile_count(size, tile),),
        pair(layer, pre),
        pair(layer, codes),
        pair(layer, scales),
        matrix(hidden),
        size,
        tile=tile.tile(**choices),
        **tile.compiler_options(),
    )


def hidden_forward(
    x: torch.Tensor,
    layer: Layer,
    keep: str,
    fused: bool | None = None,
    norm: Norm | None = None,
    normalised: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The hidden layer (T, h), and what the backward needs of it: the pre-activations (T, h) or (T, 2h) if `keep`
    is "preactivation", codes and scales if it is "int8", () if it is "nothing".

    x (T, d), weights (h, d) or packed (2h, d), of one dtype: float16, bfloat16 or float32. `fused` overrides the
    table that chooses between our kernel and the library's product with an elementwise kernel. With a norm, the
    layer takes the norm of x: `normalised`, if somebody has computed it.
    """
    size = Size(*x.shape, layer.hidden)
    hidden = x.new_empty(size.tokens, size.hidden)
    keeps_hidden = layer.keeps_hidden and keep == "preactivation"
    kept = (hidden,) if keeps_hidden else kept_empty(x, layer, keep)
    if hidden.numel() == 0:
        return hidden, kept
    keeps_pre = keep == "preactivation" and not keeps_hidden
    with launch.on_device(x):
        ours = keep != "int8" and is_fused(
            hidden_kernel, size, (x, *(weight for weight, _ in layer.linears)), fused
        )
        if norm is not None and not (ours and folds(x, layer, norm)):
            x, norm = norm.of(x)[0] if normalised is None else normalised, None
        if ours:
            fused_hidden(x, layer, norm, hidden, kept[0] if keeps_pre else None, size)
        else:
            beside = x.new_empty(size.tokens, layer.width) if layer.gated and not keeps_pre else hidden
            pre = kept[0] if keeps_pre else beside
            library_hidden(x, layer, hidden, pre, kept if keep == "int8" else (None, None), keeps_pre, size)
    return hidden, kept


def kept_empty(x: torch.Tensor, layer: Layer, keep: str) -> tuple[torch.Tensor, ...]:
    """Tensors like those that are kept for the backward, without values."""
    if keep == "nothing":
        return ()
    if keep != "int8":
        return (x.new_empty(x.shape[0], layer.width),)
    scales = triton.cdiv(layer.hidden, SCALED.value) * (2 if layer.gated else 1)
    codes = x.new_empty(x.shape[0], layer.width, dtype=torch.int8)
    return codes, x.new_empty(x.shape[0], scales, dtype=torch.float32)


class After(NamedTuple):
    """What follows the second product: the residual (T, out) or None; dropout or None; whether every step is
    rounded to the dtype, as eager does."""

    residual: torch.Tensor | None = None
    dropout: Dropout | None = None
    round: bool = False


def output_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    after: After,
    out: torch.Tensor | None = None,
    fused: bool | None = None,
) -> torch.Tensor:
    """residual + dropout(hidden W^T + b): (T, out), in `out` if it is given. hidden (T, h), weight (out, h)."""
    size = Size(*hidden.shape, weight.shape[0])
    plain = (after.residual is None and after.dropout is None) or size.tokens * size.hidden == 0
    if plain and out is None:
        return torch.nn.functional.linear(hidden, weight, bias)
    y = hidden.new_empty(size.tokens, size.hidden) if out is None else out
    if plain:
        return linear(hidden, weight, bias, out=y)
    with launch.on_device(hidden):
        if not is_fused(output_kernel, size, (hidden, weight), fused):
            return output_pass(linear(hidden, weight, bias, out=y), after, y)
        tile, step = tiling(launch.MLP_FORWARD, output_kernel, hidden, size), inner_tile(hidden.dtype)
        launch.start(
            output_kernel,
            (tile_count(size, tile),),
            matrix(hidden),
            linear_argument(weight, bias),
            None if after.residual is None else matrix(after.residual),
            after.dropout,
            matrix(y),
            size,
            tile=tile.tile(WHOLE=size.inner % step == 0, BLOCK_K=step, ROUND=after.round),
            **tile.compiler_options(),
        )
    return y


def output_pass(product: torch.Tensor, after: After, out: torch.Tensor | None = None) -> torch.Tensor:
    """residual + dropout(product): (T, out), in `out` if it is given, which may be the product."""
    y = torch.empty_like(product, memory_format=torch.contiguous_format) if out is None else out
    if y.numel() == 0:
        return y
    size = Size(product.shape[0], 0, product.shape[1])
    with launch.on_device(product):
        tile = tiling(launch.MLP_ELEMENTWISE, output_pass_kernel, product, size)
        launch.start(
            output_pass_kernel,
            (tile_count(size, tile),),
            matrix(product),
            None if after.residual is None else matrix(after.residual),
            after.dropout,
            matrix(y),
            size,
            tile=tile.tile(ROUND=after.round),
            **tile.compiler_options(),
        )
    return y


class GradientTask(NamedTuple):
    """What `hidden_backward` is to do beside the gradient of the pre-activations.

    hidden: compute the hidden layer again. bias: sum the gradient over tokens. round: round every step to the
    dtype, as eager does.
    """

    hidden: bool = True
    bias: bool = True
    round: bool = False


def hidden_backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    kept: tuple[torch.Tensor | None, ...],
    layer: Layer,
    task: GradientTask,
    fused: bool | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """From dy (T, out) and the second weight (out, h): the hidden layer or None; the gradient of the
    pre-activations (T, h), or (T, 2h) if gated; and its float32 sum over tokens or None.

    kept: gate's pre-activation, up's or None; then if these are int8 codes their scales, else None twice.
    """
    gate, up, *scales = kept
    assert gate is not None
    size = Size(*dy.shape, weight.shape[1])
    dpre = dy.new_empty(size.tokens, layer.width)
    hidden = gate if task.hidden and layer.keeps_hidden and scales[0] is None else None
    if dpre.numel() == 0:
        return dpre[:, : size.hidden] if task.hidden else None, dpre, column_sum(dpre) if task.bias else None
    again = dy.new_empty(size.tokens, size.hidden) if task.hidden and hidden is None else None
    arguments = (
        paired(gate, up),
        paired(*scales),
        None if again is None else matrix(again),
        pair(layer, dpre),
    )
    choices = layer.choices(INT8=scales[0] is not None, SUMS=task.bias, ROUND=task.round)
    with launch.on_device(dy):
        run = fused_gradient if is_fused(hidden_gradient_kernel, size, (dy, weight), fused) else library_gradient
        sums = run(dy, weight, layer, dpre, arguments, size, choices)
    return again if hidden is None else hidden, dpre, None if sums is None else column_sum(sums)


def fused_gradient(dy, weight, layer: Layer, dpre, arguments: tuple, size, choices) -> torch.Tensor | None:
    """Launch hidden_gradient_kernel; the partial bias gradients, or None."""
    tile = tiling(launch.MLP_BACKWARD, hidden_gradient_kernel, dy, size)
    step = inner_tile(dy.dtype)
    sums = new_sums(dpre, size, tile) if choices["SUMS"] else None
    launch.start(
        hidden_gradient_kernel,
        (tile_count(size, tile),),
        matrix(dy),
        matrix(weight),
        *arguments,
        pair(layer, sums),
        size,
        tile=tile.tile(**choices, WHOLE=size.inner % step == 0, BLOCK_K=step),
        **tile.compiler_options(),
    )
    return sums


def library_gradient(dy, weight, layer: Layer, dpre, arguments: tuple, size, choices) -> torch.Tensor | None:
    """The library's dh = dy W, then activation_gradient_kernel; the partial bias gradients, or None."""
    dh = torch.mm(dy, weight, out=None if layer.gated else dpre)
    tile = tiling(launch.MLP_ELEMENTWISE, activation_gradient_kernel, dy, size)
    sums = new_sums(dpre, size, tile) if choices["SUMS"] else None
    launch.start(
        activation_gradient_kernel,
        (tile_count(size, tile),),
        matrix(dh),
        *arguments,
        pair(layer, sums),
        size,
        tile=tile.tile(**choices),
        **tile.compiler_options(),
    )
    return sums


def new_sums(dpre: torch.Tensor, size: Size, tile: launch.Tiling) -> torch.Tensor:
    """Empty float32 sums, one for each column of dpre and each row of tiles."""
    return dpre.new_empty(triton.cdiv(size.tokens, tile.block_m), dpre.shape[1], dtype=torch.float32)
