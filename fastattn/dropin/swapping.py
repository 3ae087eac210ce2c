"""Changes the class of a module instance, and remembers the class that it had."""

from __future__ import annotations

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
