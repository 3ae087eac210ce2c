"""Norms in other people's modules, known by what they compute, computed by the fused functions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastattn.core.intact import PLAIN
from fastattn.core.norm.functional import layer_norm, rms_norm
from fastattn.dropin.fused_classes import Fused, fused_class
from fastattn.ground.checks import FLOATING
from fastattn.ground.modes import without_autocast


@dataclass(frozen=True)
class NormNames:
    """Which norm a kind of module computes, and where it has its epsilon, weight and bias. The epsilon is the
    number itself if it is written in its code."""

    eps: str | float
    centred: bool
    weight_offset: float
    weight: str = "weight"
    bias: str = "bias"


# What is written in code, where no attribute says it.
# Not float32's own: where that shows, other dtypes have theirs.
EPSILONS = (1e-6, 1e-5, 1e-8, 1e-12)


class FusedNorm(Fused):
    """A module that is a norm over the last dimension. What it computes is rounded once, at the end; its own code
    may round before the weight, and decides what becomes of several dtypes."""

    names: NormNames

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else None
        known = len(args) == 1 and not kwargs and type(x) in PLAIN and not x.is_nested and x.dtype in FLOATING
        # torch.fx notes every weight that is read, so none is before the input is known to be a tensor.
        weight, bias = _parameters(self, self.names) if known else (None, None)
        if not known or any(t is not None and not _fits(t, x) for t in (weight, bias)):
            return super().forward(*args, **kwargs)
        eps, offset = self.names.eps, self.names.weight_offset
        eps = getattr(self, eps) if isinstance(eps, str) else eps
        # Autocast has no part in these modules' own code.
        with without_autocast(x.device):
            if self.names.centred:
                return layer_norm(x, weight, bias, eps=eps)
            return rms_norm(x, weight, eps=eps, weight_offset=offset)


def _fits(weight: Any, x: Tensor) -> bool:
    return type(weight) in PLAIN and weight.dtype == x.dtype and weight.device == x.device


def _parameters(module: nn.Module, names: NormNames) -> tuple[Any, Any]:
    return getattr(module, names.weight, None), getattr(module, names.bias, None)


def names_of(module: nn.Module) -> NormNames | None:
    """What this module computes, found out by trying; None if it is no norm that is known."""
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
    """Whether its own code computes what the fused one would, on rows of any size, in training and eval mode, with
    random weights: ones would hide an offset, zeros everything."""
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
            expected = functional_call(_Call(module, own), state, (x.clone(),))
            actual = functional_call(_Call(module, made), state, (x.clone(),))
            if not _agree(actual, expected) or set(vars(module)) != set(was):
                return False
    except Exception:
        # Whatever it computes, it is not called like a norm.
        return False
    finally:
        for key in set(vars(module)) - set(was):
            del vars(module)[key]
        vars(module).update(was)
    return True


class _Call(nn.Module):
    """The forward of one of a module's classes, as functional_call can call it; hooks are not called."""

    kind: type[nn.Module]

    def __init__(self, module: nn.Module, kind: type[nn.Module]) -> None:
        super().__init__()
        self.inner = module
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        module: Any = self.inner
        was = type(module)
        module.__class__ = self.kind
        try:
            return module.forward(x)
        finally:
            module.__class__ = was


def _agree(actual: Tensor, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    size = expected.abs().amax(-1, keepdim=True)
    return bool(((actual - expected).abs() <= 8 * torch.finfo(expected.dtype).eps * size).all())
