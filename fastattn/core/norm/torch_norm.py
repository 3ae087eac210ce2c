"""PyTorch's own norms, for the calls that they can compute: one pass over the rows, forward and backward.

PyTorch has no RMS norm for the CPU. There the forward is a vector norm and two products. The backward is the layer
norm's with a mean of 0; it subtracts the mean of the gradient from dx, which is added again here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.core.norm.spec import NormSpec, Saved
from fastattn.ground.checks import lse_dtype

ELEMENTS = 2**16  # that are multiplied at a time before they are summed along their rows


def serves(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> bool:
    """Whether PyTorch's norms compute this: all rows have one weight, which is exact in the dtype they take."""
    if x.device.type not in ("cpu", "cuda") or x.numel() == 0 or (bias is not None and not spec.centred):
        return False
    beside = [t for t in (weight, bias) if t is not None]
    taken = _taken(x)
    exact = taken == lse_dtype(x.dtype) or (spec.weight_offset == 0 and all(t.dtype == taken for t in beside))
    return exact and all(t.shape[0] == 1 for t in beside)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, mean (None unless centred) and inverse deviation of x (B, R, W)."""
    width, mean = x.shape[2], None
    rows, weight = _rows(x, x), _weight(x, weight, spec)
    if spec.centred:
        bias = None if bias is None else bias[0].to(rows.dtype)
        y, mean, inverse = torch.native_layer_norm(rows, [width], weight, bias, spec.eps)
        mean = mean.view(x.shape[:2])
    elif x.is_cuda:
        y, inverse = torch.ops.aten._fused_rms_norm(rows, [width], weight, spec.eps)
    else:
        size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        inverse = size.square_().div_(width).add_(spec.eps).rsqrt_()
        y = rows * inverse
        y = y if weight is None else y.mul_(weight)
    return y.to(x.dtype).view(x.shape), mean, inverse.view(x.shape[:2])


def backward(
    dy: Tensor, saved: Saved, spec: NormSpec, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, and dweight and dbias (1, W) where they are wanted."""
    x, weight, mean, inverse = saved
    width, weight = x.shape[2], _weight(x, weight, spec)
    dy, rows, inverse = _rows(dy, x), _rows(x, x), inverse.reshape(-1, 1)
    if mean is not None:
        dx, *beside = _layer_norm(dy, rows, weight, mean.reshape(-1, 1), inverse, wanted)
    elif x.is_cuda:
        mask = [True, wanted[0]]
        dx, *beside = torch.ops.aten._fused_rms_norm_backward(dy, rows, [width], inverse, weight, mask)
    else:
        dx, *beside = _layer_norm(dy, rows, weight, torch.zeros_like(inverse), inverse, wanted)
        level = dy.sum(1) if weight is None else _row_dots(dy, weight)
        dx.addcmul_(level[:, None], inverse, value=1 / width)
    dweight, dbias = (None if t is None else t.to(inverse.dtype)[None] for t in (*beside, None)[:2])
    return dx.to(x.dtype).view(x.shape), dweight, dbias


def _layer_norm(
    dy: Tensor, rows: Tensor, weight: Tensor | None, mean: Tensor, inverse: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    """Layer norm's backward, of rows (R, W)."""
    if weight is None and any(wanted):
        weight = torch.ones_like(rows[0])
    # Only the size of the bias is read.
    bias, mask = weight if wanted[1] else None, [True, *wanted]
    return torch.ops.aten.native_layer_norm_backward(dy, rows, [rows.shape[1]], mean, inverse, weight, bias, mask)


def _row_dots(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight, (R,). The bits of the product itself depend on how many rows there are; those of a sum along
    a row do not. Some rows at a time, so that what is summed stays in a cache."""
    at_once = max(1, ELEMENTS // rows.shape[1])
    products = torch.empty_like(rows[:at_once])
    parts = rows.split(at_once)
    return torch.cat([torch.mul(part, weight, out=products[: len(part)]).sum(1) for part in parts])


def _taken(x: Tensor) -> torch.dtype:
    """The dtype in which PyTorch's norms take rows and weights. On the CPU it is fp32 for half precision, in which
    they would round more than once."""
    return lse_dtype(x.dtype) if x.device.type == "cpu" else x.dtype


def _rows(t: Tensor, x: Tensor) -> Tensor:
    """The rows (R, W) of t, in the dtype that PyTorch's norms take."""
    return t.reshape(-1, x.shape[2]).to(_taken(x))


def _weight(x: Tensor, weight: Tensor | None, spec: NormSpec) -> Tensor | None:
    """The factor (W,) of normalised rows; None for 1."""
    if weight is None:
        return None
    weight = weight[0].to(_taken(x))
    return weight if spec.weight_offset == 0 else weight + spec.weight_offset
