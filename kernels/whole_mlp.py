"""A whole MLP in one kernel, for narrow layers: the hidden layer never leaves the chip.

    y = act(x W1^T + b1) W2^T + b2, or gated y = (act(x Wg^T + bg) * (x Wu^T + bu)) W2^T + b2

x is (T, d), y (T, out), the hidden layer h wide. d and out are at most 128, because a program holds whole rows.
Nothing is kept for the backward but x. It computes the hidden layer again from the same numbers in the same order,
one product over all of d, so it has the forward's bits. Each step rounds where `mlp/forward.py` rounds.

    forward    whole_mlp_kernel                a tile of tokens; goes over the hidden layer, adds up y
    backward   whole_mlp_input_kernel          a tile of tokens; goes over the hidden layer, adds up dx
               whole_mlp_weights_kernel        a slice of the hidden layer and a segment of the tokens; goes over
                                               these tokens, adds up the gradients of its rows of the weights

Segments write float32 partial sums, which are added in order: no atomics. A product of all tokens is 2 T d h flop.
The forward takes two, gated three, as any MLP does. The backward takes seven, gated eleven (or thirteen, see
`passes`): it computes the hidden layer and its gradient in each kernel. An MLP that stores them takes five, gated
eight, and moves some 14 bytes a token for each hidden element. See launch/whole_mlp.py for where that pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .launch.whole_mlp import GATED_AT_ONCE, TABLES, WHOLE_MLP_UP_TO, segment_programs
from .mlp.activations import activate, activate_derivative
from .mlp.problem import Layer, linear_argument, pair
from .mlp.products import block
from .tiles import matrix

# The fewest steps of a segment. It writes its float32 sums once, which takes about as long as two steps.
LEAST_STEPS = 8


class Rows(NamedTuple):
    """The rows of a segment's part of the first weights' gradient: how many there are, and where gate's begin and
    up's."""

    count: int
    gate: int
    up: int


class Tokens(NamedTuple):
    """Tokens, the width of the hidden layer, and how many tokens a segment has."""

    count: int
    hidden: int
    segment: int


@triton.jit
def load_block(
    matrix,
    row,
    column,
    row_count,
    column_count,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_EDGE: tl.constexpr,
    COLUMN_EDGE: tl.constexpr,
):
    """ROWS x COLUMNS elements from (row, column) on, zeros beyond the counts. An EDGE may be passed."""
    pointers = block(matrix, row, column, ROWS, COLUMNS)
    rows = (row + tl.arange(0, ROWS) < row_count)[:, None]
    columns = (column + tl.arange(0, COLUMNS) < column_count)[None, :]
    if ROW_EDGE and COLUMN_EDGE:
        return tl.load(pointers, mask=rows & columns, other=0.0)
    elif ROW_EDGE:
        return tl.load(pointers, mask=tl.broadcast_to(rows, (ROWS, COLUMNS)), other=0.0)
    elif COLUMN_EDGE:
        return tl.load(pointers, mask=tl.broadcast_to(columns, (ROWS, COLUMNS)), other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_tokens(matrix, row, tokens, width: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """A tile of whole rows of x or of dy."""
    return load_block(matrix, row, 0, tokens.count, width, ROWS, PADDED, True, width != PADDED)


@triton.jit
def load_first(linear, column, tokens, tile: tl.constexpr):
    """(d, BLOCK_N) of a first layer's weight, transposed: what makes the hidden elements from `column` on."""
    return load_block(
        linear.weight, 0, column, tile.WIDTH, tokens.hidden, tile.PADDED, tile.BLOCK_N, tile.WIDTH != tile.PADDED,
        not tile.WHOLE,
    )  # fmt: skip


@triton.jit
def load_last(linear, row, tokens, tile: tl.constexpr):
    """(BLOCK_N, out) of the last layer's weight, transposed: what becomes of the hidden elements from `row` on."""
    return load_block(
        linear.weight, row, 0, tokens.hidden, tile.OUT, tile.BLOCK_N, tile.OUT_PADDED, not tile.WHOLE,
        tile.OUT != tile.OUT_PADDED,
    )  # fmt: skip


@triton.jit
def plus_part(total, bias, places, count, HIDDEN_DOWN: tl.constexpr):
    """Add these places of a bias, if there is one: to rows if HIDDEN_DOWN, else to columns."""
    if bias is not None:  # no function returns None: Triton 3.6 does not compile it
        part = tl.load(bias + places, mask=places < count, other=0.0).to(tl.float32)
        total += part[:, None] if HIDDEN_DOWN else part[None, :]
    return total


@triton.jit
def product(left, right, bias, places, tokens, HIDDEN_DOWN: tl.constexpr):
    """left @ right and these places of the bias, in float32, then rounded as eager PyTorch rounds it. HIDDEN_DOWN:
    each row is one of the hidden layer, not each column."""
    total = tl.dot(left, right, input_precision="ieee")
    return plus_part(total, bias, places, tokens.hidden, HIDDEN_DOWN).to(left.dtype)


@triton.jit
def activated(gate, up, tile: tl.constexpr):
    """The hidden layer from its pre-activations; every step rounded to the dtype."""
    value = activate(gate.to(tl.float32), tile.ACTIVATION).to(gate.dtype)
    if tile.GATED:
        value = (value.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    return value


@triton.jit
def differentiated(dh, gate, up, tile: tl.constexpr):
    """The gradients of gate and up in float32, from that of the hidden layer; without a gate the second has no
    meaning."""
    dup = dh
    if tile.GATED:
        dup = dh * activate(gate.to(tl.float32), tile.ACTIVATION).to(gate.dtype).to(tl.float32)
        dh = dh * up.to(tl.float32)
    return dh * activate_derivative(gate.to(tl.float32), tile.ACTIVATION), dup


@triton.jit
def whole_mlp_kernel(x, first, second, last, y, tokens, tile: tl.constexpr):
    """y of a tile of tokens. `second` is up's layer; None without a gate."""
    row = tl.program_id(0) * tile.BLOCK_M
    dtype: tl.constexpr = x.pointer.dtype.element_ty
    x_tile = load_tokens(x, row, tokens, tile.WIDTH, tile.BLOCK_M, tile.PADDED)
    total = tl.zeros((tile.BLOCK_M, tile.OUT_PADDED), tl.float32)
    for column in range(0, tokens.hidden, tile.BLOCK_N):
        columns = column + tl.arange(0, tile.BLOCK_N)
        gate = product(x_tile, load_first(first, column, tokens, tile), first.bias, columns, tokens, False)
        up = gate
        if tile.GATED:
            up = product(x_tile, load_first(second, column, tokens, tile), second.bias, columns, tokens, False)
        hidden = activated(gate, up, tile)
        total = tl.dot(hidden, load_last(last, column, tokens, tile), total, input_precision="ieee")
    columns = tl.arange(0, tile.OUT_PADDED)
    total = plus_part(total, last.bias, columns, tile.OUT, False)
    mask = (row + tl.arange(0, tile.BLOCK_M) < tokens.count)[:, None] & (columns < tile.OUT)[None, :]
    tl.store(block(y, row, 0, tile.BLOCK_M, tile.OUT_PADDED), total.to(dtype), mask=mask)


@triton.jit
def whole_mlp_input_kernel(dy, x, first, second, last, dx, tokens, tile: tl.constexpr):
    """dx of a tile of tokens."""
    row = tl.program_id(0) * tile.BLOCK_M
    dtype: tl.constexpr = x.pointer.dtype.element_ty
    x_tile = load_tokens(x, row, tokens, tile.WIDTH, tile.BLOCK_M, tile.PADDED)
    dy_tile = load_tokens(dy, row, tokens, tile.OUT, tile.BLOCK_M, tile.OUT_PADDED)
    total = tl.zeros((tile.BLOCK_M, tile.PADDED), tl.float32)
    for column in range(0, tokens.hidden, tile.BLOCK_N):
        columns = column + tl.arange(0, tile.BLOCK_N)
        gate_weight = load_first(first, column, tokens, tile)
        gate = product(x_tile, gate_weight, first.bias, columns, tokens, False)
        up = gate
        if tile.GATED:
            up_weight = load_first(second, column, tokens, tile)
            up = product(x_tile, up_weight, second.bias, columns, tokens, False)
        dh = tl.dot(dy_tile, tl.trans(load_last(last, column, tokens, tile)), input_precision="ieee")
        dgate, dup = differentiated(dh, gate, up, tile)
        total = tl.dot(dgate.to(dtype), tl.trans(gate_weight), total, input_precision="ieee")
        if tile.GATED:
            total = tl.dot(dup.to(dtype), tl.trans(up_weight), total, input_precision="ieee")
    columns = tl.arange(0, tile.PADDED)
    mask = (row + tl.arange(0, tile.BLOCK_M) < tokens.count)[:, None] & (columns < tile.WIDTH)[None, :]
    tl.store(block(dx, row, 0, tile.BLOCK_M, tile.PADDED), total.to(dtype), mask=mask)


@triton.jit
def store_rows(gradient, matrix, first_row, row, column, tokens, width: tl.constexpr):
    """Store a slice of a weight's gradient, one row for each hidden element from `row` on, where the matrix has
    them, from (first_row, column) on."""
    rows = row + tl.arange(0, gradient.shape[0]) < tokens.hidden
    columns = tl.arange(0, gradient.shape[1]) < width
    pointers = block(matrix, first_row + row, column, gradient.shape[0], gradient.shape[1])
    tl.store(pointers, gradient.to(matrix.pointer.dtype.element_ty), mask=rows[:, None] & columns[None, :])


@triton.jit
def store_sums(gradient, pointer, matrix, segment, row, tokens):
    """Store a slice of a bias's gradient into the line of its segment."""
    rows = row + tl.arange(0, gradient.shape[0])
    tl.store(pointer + tl.cast(segment, tl.int64) * matrix.row + rows, gradient, mask=rows < tokens.hidden)


@triton.jit
def whole_mlp_weights_kernel(dy, x, first, second, last, dfirst, dlast, sums, places, tokens, tile: tl.constexpr):
    """The gradients of a slice of the hidden layer's weights over a segment of the tokens.

    Tiles of the hidden layer stand upright, one row for each hidden element, so that they are left operands as
    they are. INTO, LAST and SUMS say which gradients are computed: of the first layers' weights, of the last
    one's, of the first layers' biases. `places` says where those of gate and of up begin.
    """
    slices = tl.cdiv(tokens.hidden, tile.BLOCK_N)
    segment = tl.program_id(0) // slices
    row = tl.program_id(0) % slices * tile.BLOCK_N
    rows = row + tl.arange(0, tile.BLOCK_N)
    dtype: tl.constexpr = x.pointer.dtype.element_ty
    gate_weight = tl.trans(load_first(first, row, tokens, tile))
    last_weight = load_last(last, row, tokens, tile)
    dgate_weight = tl.zeros((tile.BLOCK_N, tile.PADDED), tl.float32)
    dlast_weight = tl.zeros((tile.BLOCK_N, tile.OUT_PADDED), tl.float32)
    dgate_sum = tl.zeros((tile.BLOCK_N,), tl.float32)
    if tile.GATED:
        up_weight = tl.trans(load_first(second, row, tokens, tile))
        dup_weight = dgate_weight
        dup_sum = dgate_sum
    end = tl.minimum(segment * tokens.segment + tokens.segment, tokens.count)
    for start in range(segment * tokens.segment, end, tile.BLOCK_M):
        x_tile = load_tokens(x, start, tokens, tile.WIDTH, tile.BLOCK_M, tile.PADDED)
        dy_tile = load_tokens(dy, start, tokens, tile.OUT, tile.BLOCK_M, tile.OUT_PADDED)
        gate = product(gate_weight, tl.trans(x_tile), first.bias, rows, tokens, True)
        up = gate
        if tile.GATED:
            up = product(up_weight, tl.trans(x_tile), second.bias, rows, tokens, True)
        if tile.LAST:
            hidden = activated(gate, up, tile)
            dlast_weight = tl.dot(hidden, dy_tile, dlast_weight, input_precision="ieee")
        if tile.INTO or tile.SUMS:
            dh = tl.dot(last_weight, tl.trans(dy_tile), input_precision="ieee")
            dgate, dup = differentiated(dh, gate, up, tile)
            if tile.INTO:
                dgate_weight = tl.dot(dgate.to(dtype), x_tile, dgate_weight, input_precision="ieee")
            if tile.SUMS:
                dgate_sum += tl.sum(dgate, 1)
            if tile.GATED:
                if tile.INTO:
                    dup_weight = tl.dot(dup.to(dtype), x_tile, dup_weight, input_precision="ieee")
                if tile.SUMS:
                    dup_sum += tl.sum(dup, 1)
    if tile.LAST:
        store_rows(dlast_weight, dlast, 0, row, segment * tile.OUT, tokens, tile.OUT)
    if tile.INTO:
        store_rows(dgate_weight, dfirst, segment * places.count + places.gate, row, 0, tokens, tile.WIDTH)
        if tile.GATED:
            store_rows(dup_weight, dfirst, segment * places.count + places.up, row, 0, tokens, tile.WIDTH)
    if tile.SUMS:
        store_sums(dgate_sum, sums.gate.pointer, sums.gate, segment, row, tokens)
        if tile.GATED:
            store_sums(dup_sum, sums.up, sums.gate, segment, row, tokens)


# ---- launches ----


def tiling_of(part: str, kernel: object, x: torch.Tensor, layer: Layer, out: int) -> launch.Tiling:
    """The table's row for this part: "forward", "input" or "weights"."""
    table = TABLES[f"gated {part}" if layer.gated else part]
    width = launch.tile_width(max(x.shape[1], out))
    return launch.look_up(table, launch.family(kernel, x.device), x.element_size(), width)


def choices_of(tile: launch.Tiling, x: torch.Tensor, layer: Layer, out: int, **more: bool):
    """The compile-time choices of a launch."""
    width = x.shape[1]
    return tile.tile(
        **layer.choices(**more),
        WIDTH=width,
        PADDED=launch.tile_width(width),
        OUT=out,
        OUT_PADDED=launch.tile_width(out),
        WHOLE=layer.hidden % tile.block_n == 0,
    )


def layers_of(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    """The first layer, up's or None, and the last one, as kernel arguments."""
    first, *rest = [linear_argument(*linear) for linear in layer.separate()]
    return first, rest[0] if rest else None, linear_argument(weight, bias)


def whole_forward(x: torch.Tensor, layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y (T, out) of x (T, d), with the last layer's weight (out, h) and bias (out,) or None."""
    out = weight.shape[0]
    y = x.new_empty(x.shape[0], out)
    tile = tiling_of("forward", whole_mlp_kernel, x, layer, out)
    with launch.on_device(x):
        launch.start(
            whole_mlp_kernel,
            (triton.cdiv(x.shape[0], tile.block_m),),
            matrix(x),
            *layers_of(layer, weight, bias),
            matrix(y),
            Tokens(x.shape[0], layer.hidden, 0),
            tile=choices_of(tile, x, layer, out),
            **tile.compiler_options(),
        )
    return y


def whole_input_gradient(dy: torch.Tensor, x: torch.Tensor, layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """dx (T, d) from dy (T, out)."""
    out = weight.shape[0]
    dx = x.new_empty(x.shape)
    tile = tiling_of("input", whole_mlp_input_kernel, x, layer, out)
    with launch.on_device(x):
        launch.start(
            whole_mlp_input_kernel,
            (triton.cdiv(x.shape[0], tile.block_m),),
            matrix(dy),
            matrix(x),
            *layers_of(layer, weight, None),
            matrix(dx),
            Tokens(x.shape[0], layer.hidden, 0),
            tile=choices_of(tile, x, layer, out),
            **tile.compiler_options(),
        )
    return dx


def whole_weight_gradients(
    dy: torch.Tensor, x: torch.Tensor, layer: Layer, weight: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the first weights (h, d) or (2h, d), of their biases, and of `weight` (out, h); None where
    not wanted."""
    tile = tiling_of("weights", whole_mlp_weights_kernel, x, layer, weight.shape[0])
    slices = triton.cdiv(layer.hidden, tile.block_n)
    family = launch.family(whole_mlp_weights_kernel, x.device)
    segment, segments = segments_of(x.shape[0], slices, tile.block_m, family)
    dtype = x.dtype if segments == 1 else torch.float32

    def parts(want: bool, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor | None:
        return x.new_empty(segments, *shape, dtype=dtype) if want else None

    found = (
        parts(wanted[0], layer.width, x.shape[1]),
        parts(wanted[1], layer.width, dtype=torch.float32),
        parts(wanted[2], *weight.shape),
    )
    tokens = Tokens(x.shape[0], layer.hidden, segment)
    for dfirst, sums, dlast in passes(found, layer, launch.tile_width(max(x.shape[1], weight.shape[0]))):
        choices = choices_of(
            tile, x, layer, weight.shape[0], INTO=dfirst is not None, SUMS=sums is not None, LAST=dlast is not None
        )
        with launch.on_device(x):
            launch.start(
                whole_mlp_weights_kernel,
                (slices * segments,),
                matrix(dy),
                matrix(x),
                *layers_of(layer, weight, None),
                None if dfirst is None else matrix(dfirst.flatten(0, 1)),
                None if dlast is None else matrix(dlast.flatten(0, 1).t()),
                pair(layer, sums),
                Rows(layer.width, *((layer.hidden, 0) if layer.packed == "up_gate" else (0, layer.hidden))),
                tokens,
                tile=choices,
                **tile.compiler_options(),
            )
    dfirst, sums, dlast = found
    return added(dfirst, x.dtype), added(sums, x.dtype), added(dlast, x.dtype)


def passes(found: tuple, layer: Layer, width: int) -> list[tuple]:
    """What each launch computes of (dfirst, sums, dlast). Three sums of a wide gated layer do not fit into the
    registers at a time: its last weight takes a launch of its own, which computes the hidden layer once more."""
    dfirst, sums, dlast = found
    if layer.gated and width > GATED_AT_ONCE and dlast is not None and (dfirst is not None or sums is not None):
        return [(dfirst, sums, None), (None, None, dlast)]
    return [found] if any(t is not None for t in found) else []


def segments_of(tokens: int, slices: int, step: int, family: str) -> tuple[int, int]:
    """How many tokens a segment has, and how many segments there are: so many that the programs fill the family's
    largest GPU. The same on all GPUs of a family, so that sums have one order."""
    steps = triton.cdiv(tokens, step)
    per_segment = triton.cdiv(steps, max(1, min(steps // LEAST_STEPS, segment_programs(family) // slices)))
    return per_segment * step, triton.cdiv(steps, per_segment)


def added(parts: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The segments' sums, in order, in `dtype`."""
    if parts is None:
        return None
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(dtype)


# ---- where it serves ----


def fits(x: torch.Tensor, layer: Layer, weight: torch.Tensor) -> bool:
    """Whether the kernels can compute this layer: there is a row for its dtype and widths, there is something to
    compute, and lines of all operands start at multiples of 16 elements. From others they would load value by
    value. (The interpreter takes these, too.)"""
    out = weight.shape[0]
    if min(*x.shape, layer.hidden, out) < 1:
        return False
    try:
        for part, kernel in PARTS.items():
            tiling_of(part, kernel, x, layer, out)
    except ValueError:
        return False
    operands = (x, weight, *(first for first, _ in layer.linears))
    return launch.interpreted(whole_mlp_kernel) or all(regular(t) for t in operands)


def regular(t: torch.Tensor) -> bool:
    """Whether a matrix has neighbours side by side and lines at multiples of 16 elements. Where its first element
    lies does not count: results must not depend on that."""
    return (
        1 in t.stride() and all(stride == 1 or stride % 16 == 0 for stride in t.stride()) and t.shape[1] % 16 == 0
    )


def pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether by counting they take less time than kernels that store the hidden layer, forward and backward."""
    family = launch.family(whole_mlp_kernel, x.device)
    limits = WHOLE_MLP_UP_TO.get(family, WHOLE_MLP_UP_TO["sm_80"])
    return max(x.shape[1], weight.shape[0]) <= limits.get(x.element_size(), -1)


PARTS = {
    "forward": whole_mlp_kernel,
    "input": whole_mlp_input_kernel,
    "weights": whole_mlp_weights_kernel,
}
