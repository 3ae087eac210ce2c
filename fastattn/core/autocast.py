"""Autocast of the tensors of a call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, floating tensors in its dtype, as torch does for its own attention; fp64 stays."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    # torch has no autocast for the meta device, and raises if asked about it.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in eligible else t for t in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Within, torch computes in the dtypes of its tensors: for sums that need float32."""
    # torch has no autocast for the meta device, and raises if asked about it.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
