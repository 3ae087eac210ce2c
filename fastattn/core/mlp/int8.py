"""Activations kept as 8-bit integers: blocks of 128 neighbours in a row share one scale."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ground.checks import lse_dtype

BLOCK = 128
LARGEST = 127
# Numbers that are quantised at a time, so that their float32 copies stay small.
AT_A_TIME = 2**18


def blocks(width: int) -> int:
    """How many scales a row of so many numbers has."""
    return -(-width // BLOCK)


def quantised(t: Tensor, keep_sign: bool, codes: Tensor, scales: Tensor) -> None:
    """Fill codes (T, h), int8, and scales (T, blocks), so that codes * scales is close to t (T, h).

    The largest number of a block gets the code 127 or -127, so the error is at most 1/254 of it. keep_sign: a
    positive number gets at least the code 1. The derivative of a ReLU depends on that. A block with an infinity
    or a NaN gets the scale infinity, and becomes NaN.
    """
    rows, width = t.shape
    step = max(1, AT_A_TIME // max(1, width))
    for start in range(0, rows if width else 0, step):
        part = t[start : start + step].to(scales.dtype)
        part = F.pad(part, (0, -width % BLOCK)).view(len(part), -1, BLOCK)
        largest = part.abs().amax(-1, keepdim=True)
        scale = torch.where(largest < math.inf, largest / LARGEST, math.inf)
        code = (part / scale.where(scale > 0, 1.0)).round_().nan_to_num_(nan=0.0).clamp_(-LARGEST, LARGEST)
        if keep_sign:
            code = torch.where(part > 0, code.clamp(min=1), code)
        codes[start : start + step] = code.flatten(1)[:, :width]
        scales[start : start + step] = scale[..., 0]


def restored(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scales, in `dtype`."""
    rows, width = codes.shape
    numbers = codes.new_empty(codes.shape, dtype=dtype)
    step = max(1, AT_A_TIME // max(1, width))
    for start in range(0, rows if width else 0, step):
        part = F.pad(codes[start : start + step].to(scales.dtype), (0, -width % BLOCK))
        part = part.view(len(part), -1, BLOCK) * scales[start : start + step, :, None]
        numbers[start : start + step] = part.flatten(1)[:, :width]
    return numbers


def empty(t: Tensor, width: int, parts: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of `parts` matrices (T, width) side by side, empty, for as many rows as t has."""
    codes = t.new_empty(t.shape[0], parts * width, dtype=torch.int8)
    return codes, t.new_empty(t.shape[0], parts * blocks(width), dtype=lse_dtype(t.dtype))
