"""Norms over the last dimension as functions of tensors: arguments are checked here once and become a spec."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core import capabilities, plans, spread
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

    Computed in fp32 (fp64 for fp64 x) and rounded once, as torch.nn.functional.rms_norm is. Models that round
    before they multiply by the weight, such as Llama, differ by that rounding in half precision. For the backward
    x, or x + residual, and one number for each row are kept.

    Args:
        x: (..., W), any strides.
        weight: (W,), any floating dtype; None for 1. With gradient.
        eps: at least 1.2e-38; None for the epsilon of float32 (of float64 for fp64 x), as in torch.
        weight_offset: added to the weight; 1.0 for models that store the weight minus one, such as Gemma.
        residual: of x's shape and dtype. x + residual is normalised, and also returned: it is the next residual.
            Gradients flow back through both results.
        backend: as `attention`'s.

    Returns:
        y (..., W), contiguous, in x's dtype; with `residual`, (y, x + residual). Under autocast in float32, as
        torch's norms, except on the CPU.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything runs.

    Example:
        >>> x, stream, weight = torch.randn(2, 5, 64), torch.randn(2, 5, 64), torch.ones(64)
        >>> y, stream = rms_norm(x, weight, eps=1e-6, residual=stream)
        >>> y.shape
        torch.Size([2, 5, 64])

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), equation 4.
    """
    key = plans.key((x, weight, residual), (eps, weight_offset, backend))
    call = RMS_PLANS.find(key)
    if call is not None:
        return call(x, weight, None, residual)
    if spread.is_dtensor(x):
        options: dict[str, Any] = {"eps": eps, "weight_offset": weight_offset, "backend": backend}
        return spread.of_dtensors["norm"]("rms_norm", x, {"weight": weight}, residual, options)
    backend = capabilities.check_backend(backend)
    x, weight, residual = _autocast(x, weight, residual)
    spec = norm_spec(x, weight, None, residual, centred=False, eps=eps, weight_offset=weight_offset)
    return _norm(x, weight, None, residual, spec, backend, key, RMS_PLANS)


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
        x, weight, eps, residual, backend: as `rms_norm`'s. For the backward two numbers for each row are kept.

    Returns, Raises: as `rms_norm`.

    Source: Ba, Kiros and Hinton, Layer Normalization (2016), equation 4.
    """
    key = plans.key((x, weight, bias, residual), (eps, backend))
    call = LAYER_PLANS.find(key)
    if call is not None:
        return call(x, weight, bias, residual)
    if spread.is_dtensor(x):
        options: dict[str, Any] = {"eps": eps, "backend": backend}
        return spread.of_dtensors["norm"]("layer_norm", x, {"weight": weight, "bias": bias}, residual, options)
    backend = capabilities.check_backend(backend)
    x, weight, bias, residual = _autocast(x, weight, bias, residual)
    spec = norm_spec(x, weight, bias, residual, centred=True, eps=eps)
    return _norm(x, weight, bias, residual, spec, backend, key, LAYER_PLANS)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    spec: NormSpec,
    backend: str | None,
    key: plans.Key | None,
    kept: plans.Plans[PlannedCall],
) -> Tensor | tuple[Tensor, Tensor]:
    """The norm by a new plan, which is kept; without a key by torch's own function or by our operator."""
    if key is not None:
        call = PlannedCall.of(x, weight, bias, residual, spec, backend)
        kept.keep(key, call)
        return call(x, weight, bias, residual)
    if residual is None and backend is None and _torch_is_shorter(x, weight, bias, spec):
        return _by_torch(x, weight, bias, spec)
    y, total, *_ = norm_ops.norm(*_rows(x, weight, bias, residual), *spec.options, backend)
    return y.view(x.shape) if residual is None else (y.view(x.shape), total.view(x.shape))


class PlannedCall(NamedTuple):
    """A norm that was checked before, of other tensors. plan: None where torch's own function serves."""

    spec: NormSpec
    plan: norm_ops.NormPlan | None

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        spec: NormSpec,
        backend: str | None,
    ) -> PlannedCall:
        if residual is None and backend is None and _torch_is_shorter(x, weight, bias, spec):
            return cls(spec, None)
        return cls(spec, norm_ops.NormPlan.of(_rows(x, weight, bias, residual), spec, backend))

    def __call__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.plan is None:
            return _by_torch(x, weight, bias, self.spec)
        y, *total = plans.run(self.plan, *_rows(x, weight, bias, residual))
        return (y.view(x.shape), total[0].view(x.shape)) if total else y.view(x.shape)


RMS_PLANS: plans.Plans[PlannedCall] = plans.Plans("rms_norm")
LAYER_PLANS: plans.Plans[PlannedCall] = plans.Plans("layer_norm")


def _by_torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    if spec.centred:
        return F.layer_norm(x, x.shape[-1:], weight, bias, spec.eps)
    weight = weight if weight is None or spec.weight_offset == 0 else weight + spec.weight_offset
    return F.rms_norm(x, x.shape[-1:], weight, spec.eps)


def _rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x and residual as rows (1, R, W), then the weight and the bias for all of them, (1, W)."""
    rows = (1, math.prod(x.shape[:-1]), x.shape[-1])
    weight, bias = (None if t is None else t[None] for t in (weight, bias))
    return x.reshape(rows), None if residual is None else residual.reshape(rows), weight, bias


# On a CPU a call of our operator has more overhead than torch's RMS norm, which is several operators there. From
# this number of elements on ours is faster all the same (benchmarks/test_norm_speed.py).
_REPAID_ON_CPU = 2**19


def _serving(device: str, index: int | None) -> str:
    """The backend of a call that names none. Constant for torch.compile, which cannot trace questions to a GPU."""
    named = torch.device(device if index is None else f"{device}:{index}")
    return os.environ.get("FASTATTN_BACKEND") or capabilities.default_backend(named, "norm")


# What torch.compiler.assume_constant_result does; calling that would import all of dynamo with fastattn.
_serving._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _torch_is_shorter(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> bool:
    """Whether torch's own function computes the same as the portable backend would for this call, with less
    overhead."""
    if _serving(x.device.type, x.device.index) != "portable":
        return False
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        return False
    if x.device.type != "cpu":
        return spec.weight_offset == 0 or x.dtype == lse_dtype(x.dtype)
    # In half precision torch's norms on the CPU round more than once.
    return x.dtype == lse_dtype(x.dtype) and (spec.centred or x.numel() < _REPAID_ON_CPU)


def _autocast(*tensors: Tensor | None) -> tuple:
    """Under autocast, floating tensors in float32 where torch casts what its own norms take; fp64 stays."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device in ("cpu", "meta") or not torch.is_autocast_enabled(device):
        return tensors
    halves = (torch.float16, torch.bfloat16)
    return tuple(t.float() if isinstance(t, Tensor) and t.dtype in halves else t for t in tensors)
