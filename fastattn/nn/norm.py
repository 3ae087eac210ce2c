"""torch.nn's norms with the same arguments, parameters and results, computed by the fused functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.core.capabilities import check_backend
from fastattn.core.heads.spec import SMALLEST_EPS
from fastattn.core.intact import is_replaced
from fastattn.core.norm.functional import layer_norm, rms_norm
from fastattn.ground.checks import FLOATING


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm: the same arguments, parameters, state dict and results.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as torch's.
        backend: "triton", "portable", "reference", or None for the best that fits.
    """

    backend: str | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)  # type: ignore[arg-type]
        self.backend = check_backend(backend)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., *normalized_shape); same shape."""
        if not _serves(self, x):
            return super().forward(x)
        rows, weight = (_lines(t, len(self.normalized_shape)) for t in (x, self.weight))
        return rms_norm(rows, weight, eps=self.eps, backend=self.backend).view(x.shape)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm: the same arguments, parameters, state dict and results.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as torch's.
        backend: as `RMSNorm`'s.
    """

    backend: str | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)  # type: ignore[arg-type]
        self.backend = check_backend(backend)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., *normalized_shape); same shape."""
        if not _serves(self, x):
            return super().forward(x)
        rows, weight, bias = (_lines(t, len(self.normalized_shape)) for t in (x, self.weight, self.bias))
        return layer_norm(rows, weight, bias, eps=self.eps, backend=self.backend).view(x.shape)


NORMS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: LayerNorm, nn.RMSNorm: RMSNorm}


def torch_class(norm: nn.LayerNorm | nn.RMSNorm) -> type[nn.Module]:
    """torch's class of norm, whose forward somebody may have replaced."""
    return nn.RMSNorm if isinstance(norm, nn.RMSNorm) else nn.LayerNorm


def _serves(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> bool:
    """Whether the fused function can compute this call. torch's own forward takes the others: it computes nested
    tensors and an eps of 0, and raises for wrong shapes. So does another forward that its class has got."""
    shape = tuple(norm.normalized_shape)
    return (
        isinstance(x, Tensor)
        and not is_replaced(torch_class(norm))
        and not x.is_nested
        and x.dtype in FLOATING
        and (norm.eps is None or norm.eps >= SMALLEST_EPS)
        and len(shape) > 0
        and tuple(x.shape[-len(shape) :]) == shape
        and 0 not in shape
    )


def _lines(t: Any, dimensions: int) -> Any:
    """Flatten the last `dimensions` dimensions into one. None stays None."""
    return t if t is None or dimensions == 1 else t.flatten(-dimensions)
