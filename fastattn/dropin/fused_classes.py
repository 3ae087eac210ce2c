"""Classes made at run time: a module becomes fused when its class is replaced by one of them.

The new class derives from a form, which computes the fused function, and from the module's own class. So the
parameters, hooks and state dict of the module stay the same objects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn


class Fused(nn.Module):
    """A module with one fused method. Its class derives from `form` and from `own`, the class it had before."""

    form: type[Fused]
    own: type[nn.Module]
    names: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle cannot look up a class made at run time by its name, but it can look up what it is made of.
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (self.form, self.own, self.names), *reduced[2:]


_made: dict[tuple[Any, ...], type[nn.Module]] = {}


def fused_class(form: type[Fused], own: type[nn.Module], names: Any) -> type[nn.Module]:
    """The class for modules of class `own` that are fused by `form`, which finds their parts by `names`. Called
    again with the same arguments, it returns the same class."""
    key = (form, own, names, own.forward)  # Somebody may have replaced the forward of a class since.
    if key not in _made:
        members = {"form": form, "own": own, "names": names, "__module__": __name__, "__doc__": own.__doc__}
        if own_forward := getattr(form, "own_forward", None):
            members["forward"] = own_forward(own, names)
        elif getattr(form, "method", "forward") == "forward":
            members["forward"] = _called_like(own.forward, form.forward)
        name = own.__name__ if getattr(form, "keeps_name", False) else f"Fused{own.__name__}"
        _made[key] = type(name, (form, own), members)
    return _made[key]


def _called_like(own: Any, method: Any) -> Any:
    """The method with the signature of `own`. torch.fx reads the signature to make its inputs."""
    named = FunctionType(
        method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__
    )
    return functools.update_wrapper(named, own)


def _blank(form: type[Fused], own: type[nn.Module], names: Any) -> nn.Module:
    made = fused_class(form, own, names)
    return made.__new__(made)


class Call(nn.Module):
    """One method of a module, for functional_call, with `kind` as the class of the module. Its hooks are not
    called."""

    kind: type[nn.Module]
    method: Callable

    def __init__(self, module: nn.Module, kind: type[nn.Module], method: Callable) -> None:
        super().__init__()
        self.inner = module
        self.kind, self.method = kind, method

    def forward(self, x: Tensor) -> Any:
        module: Any = self.inner
        was = type(module)
        module.__class__ = self.kind
        try:
            return self.method(module, x)
        finally:
            module.__class__ = was


def agree(actual: Any, expected: Any, units: int) -> bool:
    """Whether two results are equal up to so many units of rounding, relative to the size of each row."""
    if not isinstance(expected, Tensor) or expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    size = expected.abs().amax(-1, keepdim=True)
    return bool(((actual - expected).abs() <= units * torch.finfo(expected.dtype).eps * size).all())
