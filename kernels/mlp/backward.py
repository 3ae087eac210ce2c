"""The gradient of the hidden layer: dh = dy W2, and in the epilogue all elementwise work on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import launch
from ..launch.mlp import MLP_GRADIENT_FUSED_UP_TO
from ..tiles import matrix
from .activations import activate, activate_derivative
from .forward import scales_of, store_hidden
from .problem import Layer, Size, pair, paired
from .products import (
    block,
    block_of_up,
    column_sum,
    grouped_tile,
    inner_tile,
    is_fused,
    products,
    quarters,
    tile_count,
    tile_in_hidden,
    tiling,
)


@triton.jit
def store_partial(gradient, pointer, sums, tile_row, column, inside):
    """The tile's part of a bias gradient: its sum over rows. At `pointer`, gate's or up's, `sums` has one line for
    each row of tiles."""
    pointers = pointer + tl.cast(tile_row, tl.int64) * sums.gate.row + column + tl.arange(0, gradient.shape[1])
    tl.store(pointers, tl.sum(gradient, 0), mask=inside)


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
def activation_gradient_kernel(dh, kept, scales, hidden, gradients, sums, size, tile: tl.constexpr):
    """The epilogue of `hidden_gradient_kernel`, for dh from the library. May work in place."""
    tile_row, row, column, mask = tile_in_hidden(size, tile)
    dh_tile = tl.load(block(dh, row, column, tile.BLOCK_M, tile.BLOCK_N), mask=mask, other=0.0).to(tl.float32)
    differentiate(dh_tile, kept, scales, hidden, gradients, sums, tile_row, column, size, tile)


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
        ours = is_fused(hidden_gradient_kernel, size, (dy, weight), fused, MLP_GRADIENT_FUSED_UP_TO)
        run = fused_gradient if ours else library_gradient
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
