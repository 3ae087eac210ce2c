"""Rotary position embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastattn.core import spread
from fastattn.core.heads.functional import prepare_heads
from fastattn.ground import arguments
from fastattn.nn.checks import check_tensor


class Rotary(nn.Module):
    """Rotates queries and keys by angles proportional to position, so that scores depend on distances only.

    Half layout: components i and i + width / 2, for i < width / 2, form a pair. It is rotated by
    position * base ** (-2 i / width) radians. Components from `width` on stay as they are.

    The module holds no tensors. Angles are computed in float64 at every call: casting a model to half
    precision does not round them, and positions beyond 2**17 keep their exact angles.

    Args:
        width: how many leading components of each head are rotated; even.
        base: the slowest pair turns by about one radian in `base` positions.

    Raises:
        ValueError: width is odd or not positive, base not positive.

    Source: Su et al., RoFormer, 2021, section 3.4.
    """

    def __init__(self, width: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        width = arguments.integer("width", width, least=2)
        if width % 2:
            raise ValueError(f"width must be even, since components turn in pairs; got {width}")
        self.width = width
        self.base = check_base("base", base)

    def forward(self, x: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """Rotate x (B, H, L, D), D >= width. Row i stands at position `offset` + i. Same shape and dtype."""
        check_tensor("x", x)
        offset = arguments.integer("offset", offset)
        if x.dim() != 4 or x.shape[-1] < self.width:
            raise ValueError(
                f"x must have shape (batch, heads, length, at least {self.width}), got {tuple(x.shape)}"
            )
        cos, sin = self.tables(x, offset)
        return prepare_heads(x, cos=cos, sin=sin)

    def tables(
        self, x: torch.Tensor, offset: int = 0, length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (L, width / 2) for x (B, H, L, D), in float32, or float64 if x is. With `length`, of
        so many positions instead of L."""
        length = x.shape[2] if length is None else length
        # Apple's devices have no float64.
        precise = torch.float32 if x.device.type == "mps" else torch.float64
        pairs = torch.arange(0, self.width, 2, device=x.device, dtype=precise)
        positions = spread.positions(length, x.device).to(precise)
        positions = positions + offset if offset else positions
        angles = torch.outer(positions, self.base ** (-pairs / self.width))
        table_dtype = torch.promote_types(x.dtype, torch.float32)
        return angles.cos().to(table_dtype), angles.sin().to(table_dtype)

    def extra_repr(self) -> str:
        return f"width={self.width}, base={self.base:g}"


def check_base(name: str, value: Any) -> float:
    """The base of a rotation: finite and positive."""
    value = float(arguments.number(name, value))
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and positive, got {value}")
    return value
