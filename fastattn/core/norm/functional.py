"""The front door of norms over the last dimension."""

from __future__ import annotations

import math
import os
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core import capabilities
from fastattn.core.norm import operators as norm_ops
from fastattn.core.norm.spec import NormSpec, norm_spec
from fastattn.ground.checks import lse_dtype


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    *,
    eps: float | None = ...,
    weight_offset: float = ...,
    residual: None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    *,
    eps: float | None = ...,
    weight_offset: float = ...,
    residual: Tensor,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float | None = None,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset), over the last dimension, in one pass each way.

    Computed in fp32 (fp64 for fp64 x) and rounded once, as torch.nn.functional.rms_norm is; models that round
    before they multiply by the weight, as Llama's, differ by that rounding in half precision. Kept for the
    backward: x, or its sum with the residual, and one number a row.

    Args:
        x: (..., W), any strides.
        weight: (W,), any floating dtype; None for 1. With gradient.
        eps: at least 1.2e-38; None for the epsilon of float32 (of float64 for x in it), as torch's.
        weight_offset: 1.0 for weights kept less one, as Gemma's.
        residual: x's shape and dtype; x + residual is what is normalised, and a second result: the next residual.
            Where it comes from gets a gradient from both.
        backend: as `attention`'s.

    Returns:
        y (..., W), contiguous, in x's dtype; with `residual`, (y, x + residual). Under autocast in float32 where
        torch's norms are, which is everywhere but on the CPU.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything runs.

    Example:
        >>> x, stream, weight = torch.randn(2, 5, 64), torch.randn(2, 5, 64), torch.ones(64)
        >>> y, stream = rms_norm(x, weight, eps=1e-6, residual=stream)
        >>> y.shape
        torch.Size([2, 5, 64])

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), equation 4.
    """
    backend = capabilities.check_backend(backend)
    x, weight, residual = _autocast(x, weight, residual)
    spec = norm_spec(x, weight, None, residual, centred=False, eps=eps, weight_offset=weight_offset)
    return _norm(x, weight, None, residual, spec, backend)


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    *,
    eps: float = ...,
    residual: Tensor,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the last dimension, in one pass each way.

    Args:
        bias: (W,), any floating dtype; None for 0. With gradient.
        x, weight, eps, residual, backend: as `rms_norm`'s; kept for the backward are two numbers a row.

    Returns, Raises: as `rms_norm`.

    Source: Ba, Kiros and Hinton, Layer Normalization (2016), equation 4.
    """
    backend = capabilities.check_backend(backend)
    x, weight, bias, residual = _autocast(x, weight, bias, residual)
    spec = norm_spec(x, weight, bias, residual, centred=True, eps=eps)
    return _norm(x, weight, bias, residual, spec, backend)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    spec: NormSpec,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x as the rows (1, R, W) of one weight."""
    if residual is None and backend is None and _torch_is_shorter(x, weight, bias, spec):
        if spec.centred:
            return F.layer_norm(x, x.shape[-1:], weight, bias, spec.eps)
        weight = weight if weight is None or spec.weight_offset == 0 else weight + spec.weight_offset
        return F.rms_norm(x, x.shape[-1:], weight, spec.eps)
    rows = (1, math.prod(x.shape[:-1]), x.shape[-1])
    weight, bias = (None if t is None else t[None] for t in (weight, bias))
    added = None if residual is None else residual.reshape(rows)
    y, total, *_ = norm_ops.norm(x.reshape(rows), added, weight, bias, *spec.options, backend)
    return y.view(x.shape) if residual is None else (y.view(x.shape), total.view(x.shape))


# So many elements repay, on a CPU, what an operator of ours costs beside torch's RMS norm, which is several
# operators there (benchmarks/test_norm_speed.py).
_REPAID_ON_CPU = 2**19


def _serving(device: str, index: int | None) -> str:
    """The backend that serves a call that asks for none; torch.compile cannot trace what is asked of a GPU."""
    place = torch.device(device if index is None else f"{device}:{index}")
    return os.environ.get("FASTATTN_BACKEND") or capabilities.default_backend(place)


# As torch.compiler.assume_constant_result does, which would import all of dynamo with us.
_serving._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _torch_is_shorter(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> bool:
    """Whether torch's own function computes what the portable backend would, where that serves, with less around
    it."""
    if _serving(x.device.type, x.device.index) != "portable":
        return False
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return False
    if x.device.type != "cpu":
        return spec.weight_offset == 0 or x.dtype == lse_dtype(x.dtype)
    # In half precision the CPU's round more than once.
    return x.dtype == lse_dtype(x.dtype) and (spec.centred or x.numel() < _REPAID_ON_CPU)


def _autocast(*tensors: Tensor | None) -> tuple:
    """Under autocast, floating tensors in float32 where torch casts what its own norms take; fp64 stays."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device in ("cpu", "meta") or not torch.is_autocast_enabled(device):
        return tensors
    halves = (torch.float16, torch.bfloat16)
    return tuple(t.float() if isinstance(t, Tensor) and t.dtype in halves else t for t in tensors)
