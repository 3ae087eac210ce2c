"""Checks of what users pass to modules: each error names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise unless `value` is an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_stream(name: str, value: Any, width: int) -> None:
    """Raise unless `value` is a tensor (batch, length, `width`)."""
    check_tensor(name, value)
    if value.dim() != 3 or value.shape[-1] != width:
        raise ValueError(f"{name} must have shape (batch, length, {width}), got {tuple(value.shape)}")


def check_width(name: str, value: Any, width: int) -> None:
    """Raise unless `value` is a tensor (..., `width`)."""
    check_tensor(name, value)
    if value.dim() == 0 or value.shape[-1] != width:
        raise ValueError(f"{name} must have shape (..., {width}), got {tuple(value.shape)}")


def check_tensor(name: str, value: Any) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
