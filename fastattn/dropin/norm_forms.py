"""Norms in other people's modules, recognised by their results and computed by the fused functions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastattn.core.intact import PLAIN
from fastattn.core.norm.functional import layer_norm, rms_norm
from fastattn.dropin.fused_classes import Call, Fused, agree, fused_class
from fastattn.ground.checks import FLOATING
from fastattn.ground.modes import without_autocast


@dataclass(frozen=True)
class NormNames:
    """Which norm a class of module computes, and the names of its epsilon, weight and bias. If the epsilon is
    written in its code, it is the number."""

    eps: str | float
    centred: bool
    weight_offset: float
    weight: str = "weight"
    bias: str = "bias"


# Epsilons that are tried if no attribute holds one. Not torch.finfo(float32).eps: code that computes with that
# takes another one for other dtypes.
EPSILONS = (1e-6, 1e-5, 1e-8, 1e-12)

UNITS = 8  # of rounding, by which the results of two ways to compute a norm may differ


class FusedNorm(Fused):
    """A module that is a norm over the last dimension. Its result is rounded once, at the end; the module's own
    code may round before the weight. Calls with several dtypes are left to that code."""

    names: NormNames

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else None
        known = len(args) == 1 and not kwargs and type(x) in PLAIN and not x.is_nested and x.dtype in FLOATING
        known = known and not self.is_outdated()
        # torch.fx records every weight that is read: read them only once the input is known to be a tensor.
        weight, bias, eps = values_of(self, self.names) if known else (None, None, 0.0)
        if not known or any(t is not None and not fits(t, x) for t in (weight, bias)):
            return super().forward(*args, **kwargs)
        offset = self.names.weight_offset
        # Autocast does not change what these modules' own code computes.
        with without_autocast(x.device):
            if self.names.centred:
                return layer_norm(x, weight, bias, eps=eps)
            return rms_norm(x, weight, eps=eps, weight_offset=offset)


def fits(weight: Any, x: Tensor) -> bool:
    """Whether a weight or bias is a plain tensor of x's dtype and device."""
    return type(weight) in PLAIN and weight.dtype == x.dtype and weight.device == x.device


def values_of(module: nn.Module, names: NormNames) -> tuple[Any, Any, Any]:
    """A norm's weight, bias and epsilon; None for a weight or bias that it does not have."""
    eps = getattr(module, names.eps) if isinstance(names.eps, str) else names.eps
    return getattr(module, names.weight, None), getattr(module, names.bias, None), eps


def names_of(module: nn.Module) -> NormNames | None:
    """Which norm this module computes, found by trying; None if it is no known norm."""
    parameters = {key: value for key, value in module._parameters.items() if value is not None}
    if len(parameters) > 2 or any(t.dim() != 1 for t in parameters.values()):
        return None
    numbers: list[str | float] = [
        key for key, value in vars(module).items() if type(value) is float and 0 < value < 0.1
    ]
    for weight, bias in permutations((*parameters, *["weight", "bias"][len(parameters) :])):
        names = (
            NormNames(eps, centred, offset, weight, bias)
            for eps in (*numbers, *EPSILONS)
            for centred, offset in ((False, 0.0), (False, 1.0), (True, 0.0))
            if centred or bias not in parameters
        )
        if found := next((found for found in names if _is_this_norm(module, found)), None):
            return found
    return None


@torch.no_grad()
def _is_this_norm(module: nn.Module, names: NormNames) -> bool:
    """Whether its own code computes the same as the fused norm, on rows of any size, in training and eval mode.
    The weights are random: with ones an offset would not show, with zeros nothing."""
    own, made, was = type(module), fused_class(FusedNorm, type(module), names), dict(vars(module))
    width = next((len(t) for t in module._parameters.values() if t is not None), 8)
    device = next((t.device for t in module._parameters.values() if t is not None), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    state = {
        f"inner.{key}": torch.randn(width, generator=generator).to(device)
        for key, value in module._parameters.items()
        if value is not None
    }
    # Small rows tell one epsilon from another, down to 1e-12.
    sizes = torch.tensor([1.0, 30.0, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6])
    x = (torch.randn(2, 9, width, generator=generator) + 0.5) * sizes[:, None]
    x = x.to(device)
    try:
        for training in (True, False):
            module.training = training
            expected = functional_call(Call(module, own, own.forward), state, (x.clone(),))
            actual = functional_call(Call(module, made, made.forward), state, (x.clone(),))
            if not agree(actual, expected, UNITS) or set(vars(module)) != set(was):
                return False
    except Exception:
        # It cannot be called like a norm.
        return False
    finally:
        for key in set(vars(module)) - set(was):
            del vars(module)[key]
        vars(module).update(was)
    return True
