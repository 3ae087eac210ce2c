"""The MLP, y = act(x W1^T + b1) W2^T + b2, and its gated form, y = (act(x Wg^T + bg) * (x Wu^T + bu)) Wd^T + bd.

x is (T, d): T tokens of width d; the hidden layer has width h. Weights are (out, in), biases may be None.

Saved for the backward, beside x: the pre-activation `pre` (T, h), or if gated gate and up side by side (T, 2h), in
the input's dtype. ReLU saves only its output, whose sign is the mask, so it writes no more than in inference,
where nothing is saved. The backward computes the hidden layer again, with the same function from the same values:
`pre` is rounded to the dtype before the activation, as eager PyTorch rounds it. So the hidden layer has the same
bits in both directions.

    forward    hidden_kernel            pre = x W1^T + b1, activated in the epilogue   -> hidden [, pre]
               library                  y = hidden W2^T + b2
    backward   hidden_gradient_kernel   dh = dy W2; hidden = act(pre), dpre = dh act'(pre) in the epilogue
                                        -> hidden, dpre, sums of dpre over each tile's rows
               library                  dx = dpre W1, dW1 = dpre^T x, dW2 = dy^T hidden

Beyond the widths in launch.MLP_FUSED_UP_TO the library's GEMM saves more time than one more pass over the hidden
layer costs. There the first product of each direction goes to the library, too, followed by `activation_kernel` or
`activation_gradient_kernel`, which share their epilogues with the fused kernels. Bias gradients are float32 sums
of each tile, added up in a fixed order: no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .tiles import Matrix, matrix, tile_pointers

INVERSE_SQRT_2_PI: tl.constexpr = tl.constexpr(0.3989422804014327)
MINUS_HALF_LOG2_E: tl.constexpr = tl.constexpr(-0.7213475204444817)
# The tanh form of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): u = sqrt(2 / pi) (x + 0.044715 x^3).
TWO_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(1.5957691216057308)
GELU_CUBIC: tl.constexpr = tl.constexpr(0.044715)

# Rows of tiles whose columns are computed one after the other, so that the programs that run at a time read few
# rows of x and few weights, which stay in the L2 cache.
GROUP: tl.constexpr = tl.constexpr(8)


class Linear(NamedTuple):
    """A linear layer: its weight as a product's right-hand side (in, out), and its bias (out,) or None."""

    weight: Matrix
    bias: torch.Tensor | None


class Size(NamedTuple):
    """The sizes of a product: T tokens, the width that is summed over, and the width of the hidden layer."""

    tokens: int
    inner: int
    hidden: int


def linear_argument(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """A torch.nn.Linear's weight (out, in) and bias as a kernel argument."""
    return Linear(matrix(weight.t()), None if bias is None else bias.contiguous())


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
def finish(
    total,
    up,
    first_bias,
    second_bias,
    saved,
    hidden,
    row,
    column,
    size,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """From a tile of x @ first, and of x @ second in gated form: bias, rounding, activation, stores."""
    rows: tl.constexpr = total.shape[0]
    width: tl.constexpr = total.shape[1]
    dtype: tl.constexpr = hidden.pointer.dtype.element_ty
    columns = column + tl.arange(0, width)
    inside = columns < size.hidden
    mask = (row + tl.arange(0, rows) < size.tokens)[:, None] & inside[None, :]
    pre = plus_bias(total, first_bias, columns, inside).to(dtype)
    if saved is not None:
        tl.store(block(saved, row, column, rows, width), pre, mask=mask)
    if GATED:
        up = plus_bias(up, second_bias, columns, inside).to(dtype)
        if saved is not None:
            tl.store(block(saved, row, size.hidden + column, rows, width), up, mask=mask)
        store_hidden(pre, up, hidden, row, column, mask, ACTIVATION)
    else:
        store_hidden(pre, None, hidden, row, column, mask, ACTIVATION)


@triton.jit
def hidden_kernel(x, first, second, saved, hidden, size, tile: tl.constexpr):
    """hidden = act(x @ first), or if GATED act(x @ first) * (x @ second). The pre-activations are stored in
    `saved`, if it is not None. GATED says whether there is a `second`: Triton 3.6 cannot compare a Linear without
    bias with None."""
    tile_row, tile_column = grouped_tile(
        tl.program_id(0), tl.cdiv(size.tokens, tile.BLOCK_M), tl.cdiv(size.hidden, tile.BLOCK_N)
    )
    row = tile_row * tile.BLOCK_M
    column = tile_column * tile.BLOCK_N
    second_weight = second.weight if tile.GATED else None
    second_bias = second.bias if tile.GATED else None
    total, up = products(
        x, first.weight, second_weight, row, column, size, tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.WHOLE
    )
    totals = quarters(total)
    ups = quarters(up)
    for part in tl.static_range(4):
        start = column + part * (tile.BLOCK_N // 4)
        finish(
            totals[part],
            ups[part],
            first.bias,
            second_bias,
            saved,
            hidden,
            row,
            start,
            size,
            tile.ACTIVATION,
            tile.GATED,
        )


@triton.jit
def store_partial(gradient, partials, tile_row, column, inside, width):
    """The tile's part of a bias gradient: its sum over rows. `partials` has one line for each row of tiles."""
    if partials is not None:
        columns = column + tl.arange(0, gradient.shape[1])
        pointers = partials + tl.cast(tile_row, tl.int64) * width + columns
        tl.store(pointers, tl.sum(gradient, 0), mask=inside)


@triton.jit
def differentiate(
    dh, saved, hidden, dpre, partials, tile_row, column, size, ACTIVATION: tl.constexpr, GATED: tl.constexpr
):
    """From a tile of dh: the hidden layer again, the gradient of what was saved, and its sums over rows.

    Rows beyond the last have dh = 0, so they add nothing to the sums. `hidden` and `partials` may be None.
    """
    rows: tl.constexpr = dh.shape[0]
    width: tl.constexpr = dh.shape[1]
    row = tile_row * rows
    inside = column + tl.arange(0, width) < size.hidden
    mask = (row + tl.arange(0, rows) < size.tokens)[:, None] & inside[None, :]
    dtype: tl.constexpr = dpre.pointer.dtype.element_ty

    pre = tl.load(block(saved, row, column, rows, width), mask=mask, other=0.0)
    up = None
    saved_width = size.hidden
    if GATED:
        saved_width = 2 * size.hidden
        up_column = size.hidden + column
        up = tl.load(block(saved, row, up_column, rows, width), mask=mask, other=0.0)
        dup = dh * activate(pre.to(tl.float32), ACTIVATION).to(dtype).to(tl.float32)
        tl.store(block(dpre, row, up_column, rows, width), dup.to(dtype), mask=mask)
        store_partial(dup, partials, tile_row, up_column, inside, saved_width)
        dh = dh * up.to(tl.float32)
    if hidden is not None:
        store_hidden(pre, up, hidden, row, column, mask, ACTIVATION)
    dgate = dh * activate_derivative(pre.to(tl.float32), ACTIVATION)
    tl.store(block(dpre, row, column, rows, width), dgate.to(dtype), mask=mask)
    store_partial(dgate, partials, tile_row, column, inside, saved_width)


@triton.jit
def hidden_gradient_kernel(dy, weight, saved, hidden, dpre, partials, size, tile: tl.constexpr):
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
        differentiate(
            parts[part], saved, hidden, dpre, partials, tile_row, start, size, tile.ACTIVATION, tile.GATED
        )


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
def activation_kernel(saved, hidden, size, tile: tl.constexpr):
    """hidden = act(saved), or if GATED act(gate) * up, after the library's product. May work in place."""
    _, row, column, mask = tile_in_hidden(size, tile)
    pre = tl.load(block(saved, row, column, tile.BLOCK_M, tile.BLOCK_N), mask=mask, other=0.0)
    up = None
    if tile.GATED:
        up = tl.load(block(saved, row, size.hidden + column, tile.BLOCK_M, tile.BLOCK_N), mask=mask, other=0.0)
    store_hidden(pre, up, hidden, row, column, mask, tile.ACTIVATION)


@triton.jit
def activation_gradient_kernel(dh, saved, hidden, dpre, partials, size, tile: tl.constexpr):
    """The epilogue of `hidden_gradient_kernel`, for dh from the library. May work in place."""
    tile_row, row, column, mask = tile_in_hidden(size, tile)
    dh_tile = tl.load(block(dh, row, column, tile.BLOCK_M, tile.BLOCK_N), mask=mask, other=0.0).to(tl.float32)
    differentiate(dh_tile, saved, hidden, dpre, partials, tile_row, column, size, tile.ACTIVATION, tile.GATED)


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


def saves_hidden(activation: str, gated: bool) -> bool:
    """Whether the hidden layer itself is saved: the backward of ReLU needs only its sign."""
    return activation == "relu" and not gated


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The library's x W^T + b, the bias added before the one rounding."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def column_sum(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum over rows, in float32 and in a fixed order, rounded once to `dtype`."""
    return t.sum(0, dtype=torch.float32).to(dtype)


def fused_hidden(x, linears, hidden, saved, size, activation) -> None:
    """Launch hidden_kernel: fill `hidden`, and `saved` if it is not None."""
    table = launch.MLP_FORWARD if len(linears) == 1 else launch.MLP_GATED_FORWARD
    tile = tiling(table, hidden_kernel, x, size)
    step = inner_tile(x.dtype)
    first, *rest = [linear_argument(*pair) for pair in linears]
    launch.start(
        hidden_kernel,
        (tile_count(size, tile),),
        matrix(x),
        first,
        rest[0] if rest else None,
        None if saved is None else matrix(saved),
        matrix(hidden),
        size,
        tile=tile.tile(ACTIVATION=activation, GATED=bool(rest), WHOLE=size.inner % step == 0, BLOCK_K=step),
        **tile.compiler_options(),
    )


def library_hidden(x, linears, hidden, saved, size, activation) -> None:
    """The library's products into `saved`, then activation_kernel from there to `hidden`."""
    for (weight, bias), part in zip(linears, saved.chunk(len(linears), 1), strict=True):
        linear(x, weight, bias, out=part)
    tile = tiling(launch.MLP_ELEMENTWISE, activation_kernel, x, size)
    launch.start(
        activation_kernel,
        (tile_count(size, tile),),
        matrix(saved),
        matrix(hidden),
        size,
        tile=tile.tile(ACTIVATION=activation, GATED=len(linears) == 2),
        **tile.compiler_options(),
    )


def hidden_forward(
    x: torch.Tensor,
    linears: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    activation: str,
    save: bool,
    fused: bool | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden layer (T, h) and what the backward needs of it; an empty tensor if not `save`.

    `linears` is one (weight, bias), or gate's and up's.
    """
    gated = len(linears) == 2
    size = Size(*x.shape, linears[0][0].shape[0])
    hidden = x.new_empty(size.tokens, size.hidden)
    nothing = x.new_empty(0)
    if hidden.numel() == 0:
        return hidden, x.new_empty(size.tokens, len(linears) * size.hidden) if save else nothing
    with launch.on_device(x):
        if is_fused(hidden_kernel, size, (x, *(weight for weight, _ in linears)), fused):
            keeps = save and not saves_hidden(activation, gated)
            saved = x.new_empty(size.tokens, len(linears) * size.hidden) if keeps else None
            fused_hidden(x, linears, hidden, saved, size, activation)
        else:
            in_place = not gated and (not save or saves_hidden(activation, gated))
            saved = hidden if in_place else x.new_empty(size.tokens, len(linears) * size.hidden)
            library_hidden(x, linears, hidden, saved, size, activation)
    if not save:
        return hidden, nothing
    return hidden, hidden if saved is None else saved


def fused_gradient(dy, weight, saved, hidden, dpre, size, gated, bias, activation) -> torch.Tensor | None:
    """Launch hidden_gradient_kernel: fill `hidden` and `dpre`; the partial bias gradients, or None."""
    tile = tiling(launch.MLP_BACKWARD, hidden_gradient_kernel, dy, size)
    step = inner_tile(dy.dtype)
    partials = new_partials(dpre, size, tile) if bias else None
    launch.start(
        hidden_gradient_kernel,
        (tile_count(size, tile),),
        matrix(dy),
        matrix(weight),
        matrix(saved),
        None if hidden is None else matrix(hidden),
        matrix(dpre),
        partials,
        size,
        tile=tile.tile(ACTIVATION=activation, GATED=gated, WHOLE=size.inner % step == 0, BLOCK_K=step),
        **tile.compiler_options(),
    )
    return partials


def library_gradient(dy, weight, saved, hidden, dpre, size, gated, bias, activation) -> torch.Tensor | None:
    """The library's dh = dy W, then activation_gradient_kernel; the partial bias gradients, or None."""
    dh = torch.mm(dy, weight, out=None if gated else dpre)
    tile = tiling(launch.MLP_ELEMENTWISE, activation_gradient_kernel, dy, size)
    partials = new_partials(dpre, size, tile) if bias else None
    launch.start(
        activation_gradient_kernel,
        (tile_count(size, tile),),
        matrix(dh),
        matrix(saved),
        None if hidden is None else matrix(hidden),
        matrix(dpre),
        partials,
        size,
        tile=tile.tile(ACTIVATION=activation, GATED=gated),
        **tile.compiler_options(),
    )
    return partials


def new_partials(dpre: torch.Tensor, size: Size, tile: launch.Tiling) -> torch.Tensor:
    """Empty float32 sums, one for each column of dpre and each row of tiles."""
    return dpre.new_empty(triton.cdiv(size.tokens, tile.block_m), dpre.shape[1], dtype=torch.float32)


def hidden_backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    saved: torch.Tensor,
    gated: bool,
    activation: str,
    keep: bool,
    bias: bool,
    fused: bool | None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """From dy (T, out) and the second weight (out, h): the hidden layer if `keep`; the gradient of the
    pre-activations (T, h), or (T, 2h) if gated; and its sum over tokens if `bias`."""
    size = Size(*dy.shape, weight.shape[1])
    dpre = torch.empty_like(saved)
    if dpre.numel() == 0:
        hidden = dy.new_empty(size.tokens, size.hidden) if keep else None
        return hidden, dpre, column_sum(dpre, dpre.dtype) if bias else None
    again = keep and not saves_hidden(activation, gated)
    hidden = dy.new_empty(size.tokens, size.hidden) if again else None
    with launch.on_device(dy):
        run = fused_gradient if is_fused(hidden_gradient_kernel, size, (dy, weight), fused) else library_gradient
        partials = run(dy, weight, saved, hidden, dpre, size, gated, bias, activation)
    if keep and not again:
        hidden = saved
    return hidden, dpre, None if partials is None else column_sum(partials, dpre.dtype)


class Wanted(NamedTuple):
    """Which gradients to compute: of x, of the first weight (gated: gate and up), of its bias, of the second
    weight and of its bias."""

    x: bool = True
    first: bool = True
    first_bias: bool = True
    second: bool = True
    second_bias: bool = True


Gradients = tuple[torch.Tensor | None, ...]


def mlp_forward(
    x: torch.Tensor,
    linears: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    w_out: torch.Tensor,
    b_out: torch.Tensor | None,
    activation: str,
    save: bool,
    fused: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (T, out) = hidden W_out^T + b_out, and what the backward needs, empty if not `save`.

    `linears` is one (weight, bias), for hidden = act(x W^T + b), or gate's and up's, for hidden = act(x Wg^T + bg)
    * (x Wu^T + bu). x (T, d), weights (h, d), w_out (out, h), of one dtype: float16, bfloat16 or float32. `fused`
    overrides the table that chooses between our kernel and the library's product with an elementwise kernel.
    """
    hidden, saved = hidden_forward(x, linears, activation, save, fused)
    return linear(hidden, w_out, b_out), saved


def mlp_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    w_out: torch.Tensor,
    saved: torch.Tensor,
    activation: str,
    wanted: Sequence[bool] = Wanted(),
    fused: bool | None = None,
) -> Gradients:
    """dx, dw, db, dw_out, db_out of `mlp_forward`; None where not wanted (see Wanted).

    `weights` is one weight, or gate's and up's. Then dw (2h, d) and db (2h,) hold gate's gradient and then up's:
    one product computes both.
    """
    wanted, dy, gated = Wanted(*wanted), as_operand(dy), len(weights) == 2
    hidden, dpre, db = hidden_backward(
        dy, w_out, saved, gated, activation, wanted.second, wanted.first_bias, fused
    )
    dw_out = torch.mm(dy.t(), hidden) if wanted.second else None
    del hidden
    dw = torch.mm(dpre.t(), x) if wanted.first else None
    dx = input_gradient(dpre, *weights) if wanted.x else None
    return dx, dw, db, dw_out, column_sum(dy, dy.dtype) if wanted.second_bias else None


def input_gradient(dpre: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor | None = None) -> torch.Tensor:
    """dpre W, or dgate Wg + dup Wu: one product if these are the halves of one packed (2h, d) matrix."""
    packed = w_gate if w_up is None else packed_weight(w_gate, w_up)
    if packed is not None:
        return torch.mm(dpre, packed)
    dgate, dup = dpre.tensor_split(2, 1)
    return torch.addmm(torch.mm(dgate, w_gate), dup, w_up)


def packed_weight(w_gate: torch.Tensor, w_up: torch.Tensor) -> torch.Tensor | None:
    """The (2h, d) matrix whose halves these weights are, also in memory; None if they are not."""
    height, width = w_gate.shape
    follows = w_gate.storage_offset() + height * w_gate.stride(0) == w_up.storage_offset()
    same = w_gate.untyped_storage()._cdata == w_up.untyped_storage()._cdata
    if not (same and follows and w_gate.stride() == w_up.stride()):
        return None
    return w_gate.as_strided((2 * height, width), w_gate.stride())
