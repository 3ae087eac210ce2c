"""The second product of an MLP, and what follows it in a residual branch: residual + dropout(hidden W2^T + b2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import launch
from ..attention.scores import keep_mask
from ..tiles import matrix
from .problem import Dropout, Size, linear_argument
from .products import (
    block,
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
