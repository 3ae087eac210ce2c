"""What is asked of heads on their way to attention: validated once, then frozen. Tensors travel beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ground import arguments
from fastattn.ground.checks import check_beside, check_floating, lse_dtype

# Below it float32 has no normal numbers, and a row of zeros would be divided by zero.
SMALLEST_EPS = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class HeadsSpec:
    """Which preparation: y = head_scale * rotate(norm(x) * norm_weight); any of the steps may be left out.

    norm: divide each row by sqrt(its mean square + eps).
    turned: how many leading components are rotated, in pairs; 0 for none.
    interleaved: component 2i is paired with 2i + 1; otherwise i with i + turned / 2.
    scaled: whether there is a head_scale.
    """

    norm: bool = False
    eps: float = 1e-6
    turned: int = 0
    interleaved: bool = False
    scaled: bool = False

    @property
    def options(self) -> tuple[bool, float, bool]:
        """The arguments of an operator beside its tensors: norm, eps, interleaved."""
        return self.norm, self.eps, self.interleaved


class HeadTensors(NamedTuple):
    """Tensors beside x (B, H, L, D), each with a batch dimension; None for a step that is left out.

    norm_weight: (B, H, D), in fp32, or fp64 for fp64 inputs.
    cos, sin: (B, positions, turned / 2), any floating dtype; at least L positions if there are no offsets.
    offsets: (B,) int32, the position of row 0. Positions below 0 count as 0, those beyond the table give NaN.
    head_scale: (B, H), in norm_weight's dtype.
    """

    norm_weight: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    offsets: Tensor | None = None
    head_scale: Tensor | None = None


def heads_spec(
    x: Tensor,
    *,
    norm_weight: Tensor | None,
    norm: bool,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    offsets: int | Tensor,
    head_scale: Tensor | float | None,
) -> tuple[HeadsSpec, HeadTensors]:
    """Check the arguments of `prepare_heads` against x, and give every tensor a batch dimension."""
    _check_x(x)
    _, heads, _, width = x.shape
    norm, interleaved = arguments.flag("norm", norm), arguments.flag("interleaved", interleaved)
    eps = check_eps(eps)
    if norm_weight is not None:
        check_beside("norm_weight", norm_weight, x, ((width,), (heads, width)), "x")
        check_floating("norm_weight", norm_weight)
    offsets = _check_rotation(x, cos, sin, offsets)
    if isinstance(head_scale, Tensor):
        check_beside("head_scale", head_scale, x, ((), (heads,), tuple(x.shape[:2])), "x")
        check_floating("head_scale", head_scale)
    elif head_scale is not None:
        head_scale = arguments.number("head_scale", head_scale, what="a number or a torch.Tensor")
    turned = 0 if cos is None else 2 * cos.shape[-1]
    spec = HeadsSpec(norm or norm_weight is not None, eps, turned, interleaved, head_scale is not None)
    return spec, head_tensors(x, norm_weight, cos, sin, offsets, head_scale)


def head_tensors(
    x: Tensor,
    norm_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    offsets: int | Tensor,
    head_scale: Tensor | float | None,
) -> HeadTensors:
    """Checked arguments as HeadTensors describes them. If the offset is one number, the tables begin there."""
    batch, heads, length, width = x.shape
    dtype, starts = lse_dtype(x.dtype), None
    if norm_weight is not None:
        norm_weight = norm_weight.to(dtype).expand(batch, heads, width)
    if cos is not None and sin is not None:
        if cos.dim() == 2 and isinstance(offsets, Tensor):
            starts = offsets.clamp(-length, cos.shape[0]).to(torch.int32)
        elif cos.dim() == 2:
            cos, sin = (t[offsets : offsets + length] for t in (cos, sin))
        cos, sin = (t.expand(batch, *t.shape[-2:]) for t in (cos, sin))
    if head_scale is not None:
        scale = head_scale if isinstance(head_scale, Tensor) else x.new_full((1,), head_scale, dtype=dtype)
        head_scale = scale.to(dtype).expand(batch, heads)
    return HeadTensors(norm_weight, cos, sin, starts, head_scale)


def _check_x(x: Tensor) -> None:
    arguments.tensor("x", x)
    if x.dim() != 4 or x.shape[3] == 0:
        raise ValueError(f"x must have shape (batch, heads, length, width), width not 0; got {tuple(x.shape)}")
    check_floating("x", x)


def check_eps(eps: float, name: str = "eps") -> float:
    eps = float(arguments.number(name, eps))
    if not SMALLEST_EPS <= eps < math.inf:
        raise ValueError(f"{name} must be finite and at least {SMALLEST_EPS:.1e}, got {eps}")
    return eps


def _check_rotation(x: Tensor, cos: Tensor | None, sin: Tensor | None, offsets: int | Tensor) -> int | Tensor:
    """Check cos, sin and the offsets; the offsets as one number or as integers (B,)."""
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError(f"cos and sin must come together, got {'sin' if cos is None else 'cos'} alone")
        _check_no_offsets(offsets, "where there are no cos and sin")
        return 0
    length = x.shape[2]
    _check_tables(x, cos, sin)
    if cos.dim() == 3:
        _check_no_offsets(offsets, "where cos and sin have a row for every row of x")
        return 0
    if isinstance(offsets, Tensor) and offsets.dim() > 0:
        _check_starts(x, offsets, positions=cos.shape[0])
        return offsets
    offsets = arguments.integer("offsets", offsets, what="an int or a tensor of them")
    if not 0 <= offsets <= cos.shape[0] - length:
        raise ValueError(
            f"offsets must be between 0 and {cos.shape[0] - length}, for {length} rows of x "
            f"and {cos.shape[0]} of cos; got {offsets}"
        )
    return offsets


def _check_no_offsets(offsets: int | Tensor, where: str) -> None:
    several = isinstance(offsets, Tensor) and offsets.dim() > 0
    if several or arguments.integer("offsets", offsets, what="an int or a tensor of them") != 0:
        raise ValueError(f"offsets must be 0 {where}")


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    batch, _, length, width = x.shape
    for name, t in (("cos", cos), ("sin", sin)):
        arguments.tensor(name, t, or_none=True)
        check_floating(name, t)
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
        if t.requires_grad:
            raise ValueError(f"{name} must not require a gradient, because none is computed for it; detach it")
        fits = t.dim() == 2 or (t.dim() == 3 and t.shape[0] in (1, batch) and t.shape[1] == length)
        if not fits or not 1 <= t.shape[-1] <= width // 2:
            raise ValueError(
                f"{name} must have shape (positions, pairs) or ({batch}, {length}, pairs), with 1 to "
                f"{width // 2} pairs for x's width {width}; got {tuple(t.shape)}"
            )
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")


def _check_starts(x: Tensor, offsets: Tensor, positions: int) -> None:
    """Check offsets that are a tensor. Their values are checked only on the CPU in eager mode, where nothing
    waits for them."""
    check_beside("offsets", offsets, x, ((x.shape[0],),), "x")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, got {offsets.dtype}")
    length = x.shape[2]
    if positions == 0 and length > 0:
        raise ValueError("cos must hold at least one position, got none")
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if not traced and type(offsets) is Tensor and offsets.device.type == "cpu" and offsets.numel():
        last = int(offsets.max())
        if last > positions - length:
            raise ValueError(
                f"offsets must be at most {positions - length}, for {length} rows of x and {positions} of cos; "
                f"got {last}"
            )
