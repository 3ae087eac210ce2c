"""The step x + dropout(mlp(norm(x))) of a transformer layer: one call of the fused MLP where that pays.

One call pays where the Triton kernels compute it, and where `save` asks for little memory, because the result of
the norm is not kept. On a CPU PyTorch's own functions for each step are faster, and a compiler joins the steps by
itself. The steps are separate, too, where somebody has changed a module or looks at it (see
fastattn.core.intact), and under autocast, which treats each in its own way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.core import capabilities, invariance
from fastattn.core.capabilities import FORWARD, Request
from fastattn.core.heads.spec import SMALLEST_EPS
from fastattn.core.intact import alteration, is_replaced
from fastattn.core.mlp.spec import MLPSpec
from fastattn.nn.mlp import MLP, GatedMLP
from fastattn.nn.norm import NORMS, torch_class

KINDS = (*NORMS, *NORMS.values())
# (norm, x, backend) -> the arguments of `fastattn.mlp` for this norm; None if the module must be called.
NormReader = Callable[[nn.Module, Tensor, str | None], dict[str, Any] | None]


def residual_step(x: Tensor, norm: nn.Module, mlp: nn.Module, dropout: nn.Module) -> Tensor:
    """x + dropout(mlp(norm(x))) of x (..., embed_dim)."""
    if isinstance(mlp, MLP | GatedMLP):
        branch = branch_of(x, mlp._spec, norm=norm, dropout=dropout, backend=mlp.backend)
        if branch is not None and not alteration(mlp, (MLP, GatedMLP), x) and not mlp._is_altered(x):
            return mlp._fused(x, **branch)
    return x + dropout(mlp(norm(x)))


def read_norm(norm: nn.Module, x: Tensor, backend: str | None) -> dict[str, Any] | None:
    """The arguments of `fastattn.mlp` for a norm of torch.nn or fastattn.nn; None if the module must be called."""
    if alteration(norm, KINDS, x):
        return None
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    if is_replaced(torch_class(norm)):
        return None
    fits = tuple(norm.normalized_shape) == tuple(x.shape[-1:]) and (norm.eps is None or norm.eps >= SMALLEST_EPS)
    if not fits or getattr(norm, "backend", None) not in (None, backend):
        return None
    if isinstance(norm, nn.RMSNorm):
        return {"norm": "rms", "norm_weight": norm.weight, "norm_eps": norm.eps}
    return {"norm": "layer", "norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}


def branch_of(
    x: Tensor,
    spec: MLPSpec,
    *,
    norm: nn.Module | None = None,
    dropout: nn.Module | None = None,
    reader: NormReader = read_norm,
    backend: str | None = None,
) -> dict[str, Any] | None:
    """The arguments of `fastattn.mlp` that make it x + dropout(mlp(norm(x))); None if the steps must be separate.

    Args:
        spec: of the MLP alone.
        norm, dropout: modules; None where there is none.
        reader: reads the norm.
    """
    by_kernels = not torch.compiler.is_compiling() and may_be_kernels(x, backend)
    if (spec.save == "auto" and not by_kernels) or type(x) is not Tensor or x.is_nested:
        return None
    dropout_p, of_norm = _dropout(dropout, x), {} if norm is None else reader(norm, x, backend)
    if dropout_p is None or of_norm is None or _is_autocast(x) or (dropout_p and invariance.wanted()):
        return None
    # On a GPU PyTorch's dropout is one kernel, the portable backend's are many.
    without_kernels = spec.save != "auto" and not (dropout_p and x.is_cuda)
    if not without_kernels and not (by_kernels and _are_kernels(x, spec, of_norm, dropout_p, backend)):
        return None
    return {**of_norm, "residual": x, "dropout_p": dropout_p}


def may_be_kernels(x: Tensor, backend: str | None = None) -> bool:
    """Whether the Triton kernels may compute a call, as far as that is quickly told."""
    named = backend or os.environ.get("FASTATTN_BACKEND")
    return named == "triton" if named else x.is_cuda


def _are_kernels(x: Tensor, spec: MLPSpec, of_norm: dict[str, Any], dropout_p: float, backend: str | None) -> bool:
    asked = MLPSpec(
        spec.activation, spec.gated, save=spec.save, norm=of_norm.get("norm", ""), dropout=dropout_p, residual="x"
    )
    return capabilities.choose(Request("mlp", asked, (x,)), FORWARD, backend) == "triton"


def _is_autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _dropout(dropout: nn.Module | None, x: Tensor) -> float | None:
    """The probability of dropping at present; None if the module must be called."""
    if dropout is None:
        return 0.0
    if alteration(dropout, nn.Dropout, x):
        return None
    assert isinstance(dropout, nn.Dropout)
    dropout_p = float(dropout.p) if dropout.training else 0.0
    return dropout_p if dropout_p < 1 else None
