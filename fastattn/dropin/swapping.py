"""Changes the class of a module instance, and remembers the class that it had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# The attribute that holds what a module was: its class, or another object that restores it.
WAS = "_fastattn_was"


def swap(module: nn.Module, new: type[nn.Module]) -> None:
    """Change the module's class to `new`, which must differ from its own class in code only."""
    kind = module.__dict__.setdefault(WAS, type(module))
    if isinstance(kind, type) and kind.__module__.startswith("torch.nn.") and not issubclass(kind, nn.Sequential):
        # torch.fx does not trace into torch's own modules. It recognises them by their __module__.
        module.__dict__["__module__"] = kind.__module__
    module.__class__ = new


def restore_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the module's class back to `kind`."""
    module.__dict__.pop("__module__", None)
    module.__class__ = kind


@dataclass(frozen=True)
class OwnClass:
    """What a module was whose class is changed beside something else: the class, and what it was before that."""

    kind: type[nn.Module]
    before: Any

    def restore(self, module: nn.Module) -> None:
        restore_class(module, self.kind)
        if self.before is not None:
            self.before.restore(module)


def swap_beside(module: nn.Module, new: type[nn.Module]) -> None:
    """`swap` of a module of which something else may be swapped, too, before or after."""
    module.__dict__[WAS] = OwnClass(type(module), module.__dict__.get(WAS))
    module.__class__ = new


def remember(module: nn.Module, was: Any) -> None:
    """Keep `was`, an object that restores something of the module, beside its class, if that was swapped."""
    present = module.__dict__.get(WAS)
    module.__dict__[WAS] = OwnClass(present.kind, was) if isinstance(present, OwnClass) else was


def has_more_than_a_class(module: nn.Module) -> bool:
    """Whether more than the class of this module was swapped."""
    present = module.__dict__.get(WAS)
    return present.before is not None if isinstance(present, OwnClass) else present is not None
