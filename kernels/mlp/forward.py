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

Beyond the widths in launch/mlp.py, MLP_FUSED_UP_TO and for the gradient MLP_GRADIENT_FUSED_UP_TO, the library's
GEMM saves more time than one more pass over the hidden layer costs. There the first product of each direction goes
to the library, too, followed by `activation_kernel` or `activation_gradient_kernel`, which share their epilogues
with the fused kernels. int8 always goes that way forward: the fused kernel would need a pass of its own to
quantise, and both move seven bytes for each 16-bit number. Bias gradients are float32 sums of each tile, added up
in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import launch
from ..launch.mlp import MLP_QUANTISE
from ..tiles import matrix
from .activations import activate
from .folded_norm import Norm, folds, standardised
from .problem import SCALED, Layer, Size, linear_argument, pair
from .products import (
    block,
    block_of_up,
    grouped_tile,
    inner_tile,
    is_fused,
    linear,
    plus_bias,
    products,
    quarters,
    tile_count,
    tile_in_hidden,
    tiling,
)


@triton.jit
def store_hidden(pre, up, hidden, row, column, mask, ACTIVATION: tl.constexpr):
    """hidden = act(pre), times `up` in gated form: every step rounded to the dtype, as eager rounds it."""
    value = activate(pre.to(tl.float32), ACTIVATION).to(hidden.pointer.dtype.element_ty)
    if up is not None:
        value = (value.to(tl.float32) * up.to(tl.float32)).to(value.dtype)
    tl.store(block(hidden, row, column, pre.shape[0], pre.shape[1]), value, mask=mask)


@triton.jit
def scales_of(pointer, scales, row, column, tokens, ROWS: tl.constexpr):
    """Pointers to the scales of a tile's rows, and which of them exist. The tile's columns lie in one block."""
    rows = row + tl.arange(0, ROWS)
    places = rows.to(tl.int64) * scales.gate.row + column // SCALED * scales.gate.column
    return pointer + places, rows < tokens


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
