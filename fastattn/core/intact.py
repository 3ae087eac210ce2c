"""Whether a module is still exactly what it was built as, so that its weights may be read without calling it.

A fused function takes the weights of several modules at once and calls none of them. That is right only while
a call would do no more than their class says. Adapters (LoRA), hooks, pruning, parametrizations, quantised and
offloaded layers all do more. So code that reads a module's weights without calling it asks `alteration` first, in
every call. If there is an alteration, it calls the module and computes the rest around it.

How to use it, in a forward that has `x`:

    if alteration(self.up, nn.Linear, x) or alteration(self.down, nn.Linear, x):
        return self.down(activation(self.up(x)))
    return mlp(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

# The last two stand for a plain tensor while a compiler or an exporter traces.
PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
# The original forward of a class, because some tools replace it on the class itself. Of a class that is not listed
# it is the one that the first question about it met: `patch` asks before a module is swapped.
FORWARDS: dict[Any, Any] = {
    kind: kind.forward
    for kind in (
        nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.ReLU, nn.SiLU, nn.GELU,
        nn.MultiheadAttention, nn.TransformerEncoderLayer,
    )
}  # fmt: skip


def alteration(
    part: Any, kinds: type[nn.Module] | tuple[type[nn.Module], ...], like: Tensor | None = None
) -> str | None:
    """How `part` differs from a module of that class as it was built; None if its weights may be read uncalled.

    Args:
        part: a module, or what a user has put in its place.
        kinds: the class it must have, or several of which it must have one. A subclass is an alteration: it may
            compute more.
        like: the input it would be called with. If given, these are alterations, too: an input that is no plain
            tensor (torch.fx traces with proxies), and parameters on another device or of another dtype (under
            autocast, which converts, only another device).

    Returns:
        A reason to put after the part's name, "has a forward hook"; None if there is none.

    It takes about two microseconds if there is none. torch.compile traces through it.
    """
    kind = type(part)
    if not (kind in kinds if isinstance(kinds, tuple) else kind is kinds):
        return f"is of class {kind.__name__}"
    # Reading part.forward first makes torch.compile notice a later replacement; the dictionary alone does not.
    if (part.forward and "forward" in part.__dict__) or is_replaced(kind):
        return "has another forward than it was built with"
    if part._forward_hooks or part._forward_pre_hooks:
        return "has a forward hook"
    if part._backward_hooks or part._backward_pre_hooks:
        return "has a backward hook"
    if not torch.compiler.is_compiling() and nn.modules.module._has_any_global_hook():
        return "is called with the hooks that are set on all modules"
    if like is not None and type(like) not in PLAIN:
        return f"is called with a {type(like).__name__}"
    for name in ("weight", "bias"):
        weight = getattr(part, name, None)
        if weight is not None and (reason := _weight_alteration(weight, like)):
            return f"has a {name} {reason}"
    return None


def is_replaced(kind: Any) -> bool:
    """Whether somebody has replaced the forward of this class on the class itself."""
    if (original := FORWARDS.get(kind)) is None:
        original = kind.forward
        if not torch.compiler.is_compiling():
            FORWARDS[kind] = original
    return original is not kind.forward


def _weight_alteration(weight: Any, like: Tensor | None) -> str | None:
    if type(weight) not in PLAIN:
        return f"of type {type(weight).__name__}"
    if weight.layout is not torch.strided:
        return f"with layout {weight.layout}"
    if like is None:
        return None
    if weight.device != like.device:
        return f"on {weight.device}, where the input is on {like.device}"
    if weight.dtype != like.dtype and not _converts(like.device.type):
        return f"of {weight.dtype}, where the input is of {like.dtype}"
    return None


def _converts(device: str) -> bool:
    """Whether autocast is on for a kind of device; there is none for "meta"."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
