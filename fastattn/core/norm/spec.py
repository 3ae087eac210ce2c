"""What is asked of a norm: validated once, then frozen. Tensors travel beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.core.heads.spec import check_eps
from fastattn.ground import arguments
from fastattn.ground.checks import check_beside, check_floating, check_input, check_same, lse_dtype


class Saved(NamedTuple):
    """What the backward takes from a forward: x, what was normalised (B, R, W); the weight (B, W) or None; and for
    each row (B, R) the mean (None unless centred) and 1 / deviation."""

    x: Tensor
    weight: Tensor | None
    mean: Tensor | None
    inverse: Tensor


@dataclass(frozen=True)
class NormSpec:
    """Which norm: y = (x - mean) / deviation * (weight + weight_offset) + bias, over the last dimension.

    centred: whether there is a mean (layer norm) or it counts as 0 (RMS norm).
    eps: added to the mean square before the root is taken.
    weight_offset: added to the weight; 1 for models that store the weight minus one.
    added: whether a residual is added to x beforehand.
    """

    centred: bool = False
    eps: float = 1e-6
    weight_offset: float = 0.0
    added: bool = False

    @property
    def options(self) -> tuple[bool, float, float]:
        """The arguments of an operator beside its tensors: centred, eps, weight_offset."""
        return self.centred, self.eps, self.weight_offset


def norm_spec(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    centred: bool,
    eps: float | None,
    weight_offset: float = 0.0,
) -> NormSpec:
    """Check the arguments of `rms_norm` and `layer_norm` against x."""
    check_input(x)
    width = x.shape[-1]
    if width == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got {tuple(x.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_beside(name, t, x, None, "x")
            check_floating(name, t)
            # Numbers are compared, not tuples: torch.compile does not see that a symbol in a tuple equals a
            # number.
            if t.dim() != 1 or t.shape[0] != width:
                raise ValueError(f"{name} must have shape ({width},), got {tuple(t.shape)}")
    if residual is not None:
        check_beside("residual", residual, x, None, "x")
        check_same("residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    weight_offset = float(arguments.number("weight_offset", weight_offset))
    if not -math.inf < weight_offset < math.inf:
        raise ValueError(f"weight_offset must be finite, got {weight_offset}")
    eps = torch.finfo(lse_dtype(x.dtype)).eps if eps is None else check_eps(eps)
    return NormSpec(centred, eps, weight_offset, residual is not None)
