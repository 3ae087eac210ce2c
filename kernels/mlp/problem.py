"""What an MLP's kernels take: a layer as a call gives it, and tensors as kernel arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl

from ..tiles import Matrix, matrix

# int8: so many neighbours in a row share a scale.
SCALED: tl.constexpr = tl.constexpr(128)


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


def as_operand(dy: torch.Tensor) -> torch.Tensor:
    """The upstream gradient in a layout that products take: contiguous rows or columns. An expanded one (the
    gradient of a sum) is copied once, instead of at each of its three uses."""
    return dy if 1 in dy.stride() else dy.contiguous()
