"""How results lie in memory, the same for every backend.

Anything shaped (batch, heads, length, width) is laid out (batch, length, heads, width), so that merging the
heads for the next linear layer costs no copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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


def padded(t: Tensor, width: int) -> Tensor:
    """`t` with zeros as columns behind the last, so many that it has this width; `t` itself where it has it."""
    return t if t.shape[3] == width else F.pad(t, (0, width - t.shape[3]))


def in_eights(t: Tensor) -> Tensor:
    """`t`, `padded` to a multiple of 8: the widths of heads that attention's Triton kernels load 16 bytes at a
    time.

    Zeros change no product. Elsewhere loads would be of one number each, with registers for as many addresses. The
    copy reads and writes what a tensor holds once; attention's kernels read keys and values once for every tile of
    queries.
    """
    return padded(t, t.shape[3] + -t.shape[3] % 8)


def without_padding(t: Tensor, width: int) -> Tensor:
    """The first `width` columns of a result of padded tensors, laid out as any result."""
    return t if t.shape[3] == width else empty_heads((*t.shape[:3], width), t).copy_(t[..., :width])
