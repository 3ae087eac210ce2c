"""Norms with their scale frozen: then they are linear, and a sum that they are given stays a sum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ground.checks import lse_dtype


class FrozenNorm(NamedTuple):
    """norm(x) = gain * (x - mean(x) if centred else x) / scale(x) + bias, read from what the norm computes.

    gain, bias: (d,), fp32 (fp64 for a norm in fp64). inverse_scale of an x is (...), 1 / scale(x).
    """

    gain: Tensor
    bias: Tensor
    centred: bool

    @classmethod
    def of(cls, norm: Any, like: Tensor) -> FrozenNorm:
        """The gain, bias and centring of a norm for inputs like this one (..., d), found by calling it.

        A row of zeros gives the bias. A row of +1 and -1, large beside any epsilon, gives the gain; the same row
        moved by a constant gives the same if the norm subtracts the mean.
        """
        size = 100.0 if like.dtype == torch.float16 else 1e6
        signs = torch.ones_like(like.reshape(-1, like.shape[-1])[0])
        signs[1::2] = -1
        with torch.no_grad():
            zero, high, moved = norm(torch.stack([0 * signs, size * signs, size * (signs + 1)]))
        wide = lse_dtype(like.dtype)
        bias, high, moved, signs = (t.to(wide) for t in (zero, high, moved, signs))
        high, moved = high - bias, moved - bias
        centred = bool((high - moved).norm() < 0.1 * high.norm())
        unit = signs - signs.mean() if centred else signs
        return cls(high / (unit / unit.square().mean().sqrt()), bias, centred)

    def inverse_scale(self, x: Tensor, normed: Tensor) -> Tensor:
        """1 / scale (...) of inputs x (..., d), from what the norm made of them.

        Raises:
            ValueError: `normed` is nothing that a layer norm or an RMS norm makes.
        """
        core, made = self.gain * self.centre(x.to(self.gain.dtype)), normed.to(self.gain.dtype) - self.bias
        length = core.square().sum(-1)
        inverse = (made * core).sum(-1) / length.masked_fill(length == 0, 1.0)
        tolerance = max(1e-4, 16 * torch.finfo(normed.dtype).eps)
        if (
            (made - inverse[..., None] * core).norm(dim=-1) > tolerance * (made.norm(dim=-1) + self.bias.norm())
        ).any():
            raise ValueError(
                "a norm must be a layer norm or an RMS norm to be taken apart, and this one is neither"
            )
        return inverse

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def before(self, direction: Tensor) -> Tensor:
        """The direction (..., d) that reads before the norm what this one reads after it, but for 1 / scale."""
        return self.centre(direction * self.gain)

    def after(self, x: Tensor) -> Tensor:
        """What the norm makes of x (..., d), but for 1 / scale and the bias."""
        return self.centre(x) * self.gain
