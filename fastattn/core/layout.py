"""How results lie in memory, the same for every backend.

Anything shaped (batch, heads, length, width) is laid out (batch, length, heads, width), so that merging the
heads for the next linear layer costs no copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_heads(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of this shape, with the device of `like`, and its dtype if none is given."""
    batch, heads, length, width = shape
    return like.new_empty((batch, length, heads, width), dtype=dtype or like.dtype).transpose(1, 2)


def zero_heads(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    batch, heads, length, width = shape
    return like.new_zeros((batch, length, heads, width), dtype=dtype).transpose(1, 2)


def heads_last(t: Tensor) -> Tensor:
    """`t` in that layout; itself where it already is."""
    by_length = t.transpose(1, 2)
    return t if by_length.is_contiguous() else by_length.contiguous().transpose(1, 2)
