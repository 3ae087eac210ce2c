"""Classes made on the way: an instance becomes fused by its class alone.

The new class derives from a form, which computes, and from the module's own class, so that its parameters, hooks
and state dict stay the same objects.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

from torch import nn


class Fused(nn.Module):
    """A module one of whose methods is fused; what it derives from beside its form is `own`."""

    form: type[Fused]
    own: type[nn.Module]
    names: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made on the way cannot be looked up by name; what they are made of can.
        made: Any = super().__reduce_ex__(protocol)
        return _blank, (self.form, self.own, self.names), *made[2:]


_made: dict[tuple[Any, ...], type[nn.Module]] = {}


def fused_class(form: type[Fused], own: type[nn.Module], names: Any) -> type[nn.Module]:
    """The class of modules of class `own` that are fused in this form, which finds their parts by `names`; always
    the same one."""
    key = (form, own, names)
    if key not in _made:
        members = {"form": form, "own": own, "names": names, "__module__": __name__, "__doc__": own.__doc__}
        if getattr(form, "method", "forward") == "forward":
            members["forward"] = _called_like(own.forward, form.forward)
        _made[key] = type(f"Fused{own.__name__}", (form, own), members)
    return _made[key]


def _called_like(own: Any, method: Any) -> Any:
    """The method, with the other's signature for who asks for it: torch.fx makes its inputs after it."""
    named = FunctionType(
        method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__
    )
    return functools.update_wrapper(named, own)


def _blank(form: type[Fused], own: type[nn.Module], names: Any) -> nn.Module:
    made = fused_class(form, own, names)
    return made.__new__(made)
