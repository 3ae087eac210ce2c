"""Another class for a module, on the instance alone, that remembers the one it had."""

from __future__ import annotations

from torch import nn

# What a module was: its class, or what else restores it.
WAS = "_fastattn_was"


def swap(module: nn.Module, new: type[nn.Module]) -> None:
    """Make the module one of class `new`, which must differ from its own in code alone."""
    kind = module.__dict__.setdefault(WAS, type(module))
    if isinstance(kind, type) and kind.__module__.startswith("torch.nn.") and not issubclass(kind, nn.Sequential):
        # torch.fx does not look into modules of torch's own; it asks each where it is from.
        module.__dict__["__module__"] = kind.__module__
    module.__class__ = new


def restore_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make the module again one of the class it had."""
    module.__dict__.pop("__module__", None)
    module.__class__ = kind
