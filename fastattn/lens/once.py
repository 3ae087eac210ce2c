"""Attention that is computed once for two who ask the same: the lens, and the model that it looks into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn.core.attention.operators  # noqa: F401  (defines the operator)

# Integers that are so few are compared by value: lengths are made anew from a list in every call.
FEW = 2**12


class Once(TorchDispatchMode):
    """Within the block the attention operator returns what it returned before for the same arguments.

    It can be entered again. Arguments are the same if they are the same memory, unchanged; so nothing is returned
    that the operator would not compute, bit by bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: list[tuple[tuple, tuple[int, ...], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.ops.fastattn.attention_forward.default:
            return function(*args, **(kwargs or {}))
        versions = tuple(map(_version, args))
        same = (found for known, then, found in self.known if versions == then and all(map(_same, known, args)))
        if (found := next(same, None)) is None:
            found = function(*args)
            self.known.append((args, versions, found))
        # Tensors of their own on the same memory: autograd writes into those that an operator returns.
        return tuple(t.detach() for t in found)


def _version(value: Any) -> int:
    """How often a tensor was changed in place, as far as PyTorch counts it."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other or (type(one) is type(other) and one == other)
    if one is other:
        return True
    if type(one) is not Tensor or type(other) is not Tensor or one.dtype != other.dtype:
        return False
    if one.shape != other.shape or one.stride() != other.stride() or one.device != other.device:
        return False
    if one.data_ptr() == other.data_ptr():
        return True
    return not one.is_floating_point() and one.numel() <= FEW and torch.equal(one, other)
