"""The norm of x as a factor of each row of the first product."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import launch
from ..norm import Moments, load_rows, merged, moments_of, norm_forward, rows_of
from ..norm import Size as NormSize
from .problem import Layer


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
