"""Checks of the arguments of modules. Each error names the argument, its value and what was expected."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastattn.core import spread
from fastattn.ground import arguments
from fastattn.ground.checks import check_floating


def check_not_negative(name: str, value: Any) -> float:
    """The argument as a finite float of at least 0."""
    value = float(arguments.number(name, value))
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return value


def check_dropout(value: Any) -> float:
    """The argument `dropout` as a float from 0 to below 1."""
    value = float(arguments.number("dropout", value))
    if not 0 <= value < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {value}")
    return value


def factory_options(device: Any, dtype: Any) -> dict[str, Any]:
    """The device and dtype of new parameters, checked, as keywords for torch's modules; None is torch's
    default."""
    return {
        "device": None if device is None else arguments.device("device", device),
        "dtype": None if dtype is None else arguments.floating_dtype("dtype", dtype),
    }


def check_stream(name: str, value: Any, width: int) -> None:
    """Raise unless `value` is a floating tensor (batch, length, `width`)."""
    check_tensor(name, value)
    if value.dim() != 3 or value.shape[-1] != width:
        raise ValueError(f"{name} must have shape (batch, length, {width}), got {tuple(value.shape)}")


def check_tokens(tokens: Any, longest: int | None) -> None:
    """Raise unless `tokens` is (batch, length) integers, at most `longest` long."""
    arguments.tensor("tokens", tokens)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}")
    if tokens.dim() != 2:
        raise ValueError(f"tokens must have shape (batch, length), got {tuple(tokens.shape)}")
    if longest is not None and spread.whole_length(tokens.shape[1]) > longest:
        raise ValueError(f"tokens must be at most max_length = {longest} long, got {tuple(tokens.shape)}")


def check_width(name: str, value: Any, width: int) -> None:
    """Raise unless `value` is a floating tensor (..., `width`)."""
    check_tensor(name, value)
    if value.dim() == 0 or value.shape[-1] != width:
        raise ValueError(f"{name} must have shape (..., {width}), got {tuple(value.shape)}")


def check_tensor(name: str, value: Any) -> None:
    """Raise unless `value` is a floating tensor."""
    arguments.tensor(name, value)
    check_floating(name, value)
