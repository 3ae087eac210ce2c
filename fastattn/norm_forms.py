"""Norms in other people's modules, known by what they compute, computed by the fused functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.fused_classes import Fused, fused_class
from fastattn.norm import layer_norm, rms_norm
from fastattn.spec import FLOATING


@dataclass(frozen=True)
class NormNames:
    """Which norm a kind of module computes, and where it has its epsilon; weight and bias are called so, if it has
    them."""

    eps: str
    centred: bool
    weight_offset: float


class FusedNorm(Fused):
    """A module that is a norm over the last dimension. What it computes is rounded once, at the end; its own code
    may round before the weight, and decides what becomes of several dtypes."""

    names: NormNames

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        weight, bias = _parameters(self)
        known = isinstance(x, Tensor) and not x.is_nested and x.dtype in FLOATING
        if args or kwargs or not known or any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
            return super().forward(x, *args, **kwargs)
        eps, offset = getattr(self, self.names.eps), self.names.weight_offset
        # Autocast has no part in these modules' own code.
        with torch.autocast(x.device.type, enabled=False):
            if self.names.centred:
                return layer_norm(x, weight, bias, eps=eps)
            return rms_norm(x, weight, eps=eps, weight_offset=offset)


def _parameters(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return getattr(module, "weight", None), getattr(module, "bias", None)


def names_of(module: nn.Module) -> NormNames | None:
    """What this module computes, found out by trying; None if it is no norm that is known."""
    weight, bias = _parameters(module)
    parameters = [t for t in (weight, bias) if t is not None]
    if any(t.dim() != 1 for t in parameters) or len(list(module.parameters())) != len(parameters):
        return None
    names = (
        NormNames(eps, centred, offset)
        for eps in ("variance_epsilon", "eps", "epsilon")
        if isinstance(getattr(module, eps, None), float)
        for centred, offset in ((False, 0.0), (False, 1.0), (True, 0.0))
        if centred or bias is None
    )
    return next((found for found in names if _is_this_norm(module, found)), None)


@torch.no_grad()
def _is_this_norm(module: nn.Module, names: NormNames) -> bool:
    """Whether its own code computes what the fused one would, on rows of any size, in training and eval mode."""
    own, made, was = type(module), fused_class(FusedNorm, type(module), names), module.training
    weight, _ = _parameters(module)
    like = torch.empty(8) if weight is None else weight
    x = torch.randn(2, 3, len(like), generator=torch.Generator().manual_seed(0)) + 0.5
    # Small rows tell one epsilon from another.
    x = (x * torch.tensor([1.0, 1e-3, 30.0])[:, None]).to(device=like.device, dtype=like.dtype)
    try:
        for training in (True, False):
            module.training = training
            expected = own.forward(module, x)
            module.__class__ = made
            actual = module.forward(x)
            module.__class__ = own
            if not _agree(actual, expected):
                return False
    except Exception:
        # Whatever it computes, it is not called like a norm.
        return False
    finally:
        module.__class__, module.training = own, was
    return True


def _agree(actual: Tensor, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    size = expected.abs().amax(-1, keepdim=True)
    return bool(((actual - expected).abs() <= 8 * torch.finfo(expected.dtype).eps * size).all())
