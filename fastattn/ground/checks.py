"""Checks that several families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn.ground import arguments

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The log-sum-exp is kept in fp32, or in fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(name: str, t: Tensor) -> None:
    if t.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")


def check_same(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors have the same dtype and device."""
    if t.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {t.dtype}")
    if t.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {t.device}")


def check_beside(
    name: str, t: Tensor, q: Tensor, shapes: tuple[tuple[int, ...], ...] | None, of: str = "q"
) -> None:
    """Raise unless `t` is a tensor on q's device, of one of these shapes (of any, if None). `of` is q's name in
    the error."""
    arguments.tensor(name, t)
    if shapes is not None and tuple(t.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {shape_of(t)}")
    if t.device != q.device:
        raise ValueError(f"{name} must be on {of}'s device {q.device}, got {t.device}")


def refuse_tangents(function: str, tensors: Mapping[str, Any]) -> None:
    """Raise ValueError if one of these tensors, by name, has a tangent of forward mode."""
    if forward_ad._current_level < 0:
        return
    for name, t in tensors.items():
        if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise ValueError(f"{name} must have no tangent, because {function} has no forward mode")


def check_input(x: Tensor) -> None:
    arguments.tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, (..., width), got ()")
    check_floating("x", x)


def check_linear(
    name: str, weight: Tensor, bias_name: str, bias: Tensor | None, x: Tensor, source: str, width: int
) -> None:
    """Raise unless these are a torch.nn.Linear's weight (out, `width`) and bias (out,) or None, of x's dtype and
    device."""
    arguments.tensor(name, weight)
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{name} must have shape (out, {width}) ({source}), got {shape_of(weight)}")
    check_same(name, weight, "x", x)
    if bias is None:
        return
    arguments.tensor(bias_name, bias, or_none=True)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{bias_name} must have shape {tuple(weight.shape[:1])} ({name}'s rows), got {shape_of(bias)}"
        )
    check_same(bias_name, bias, "x", x)


ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu_squared", "silu")


def check_activation(activation: str) -> None:
    arguments.choice("activation", activation, ACTIVATIONS)


# The argument `window`: how many keys on both sides of the diagonal, or on each side; None for all.
Window = int | Sequence[int | None] | Tensor | None


def check_window(window: Window) -> tuple[int | None, int | None]:
    """How many keys before and after the diagonal are seen; a single number stands for both sides."""
    if window is None or (not isinstance(window, tuple | list) and getattr(window, "shape", ()) == ()):
        side = check_side("window", window)
        return side, side
    left, right = arguments.pair("window", window)
    return check_side("window", left), check_side("window", right)


def check_side(name: str, side: Any) -> int | None:
    """One side of a window."""
    if side is None:
        return None
    side = arguments.integer(name, side, what="an integer or None" if name != "window" else _WINDOW)
    if side < 0:
        raise ValueError(f"{name} must not be negative, None is unbounded; got {side}")
    return side


_WINDOW = "an integer or None, or a pair (left, right) of them"


def window_that_hides(
    window: tuple[int | None, int | None], queries: int, keys: int
) -> tuple[int | None, int | None]:
    """The window, with None for bounds that hide no key: the last query stands at the last key, the first one
    `queries` - 1 keys before it. It also keeps sums of positions and bounds within the kernels' 32 bits."""
    left, right = window
    return (
        None if left is None or left >= keys - 1 else left,
        None if right is None or right >= queries - 1 else right,
    )


def shape_of(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)
