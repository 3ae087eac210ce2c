"""What happens to heads before attention, in plain PyTorch: the oracle of the tests and the reference backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.core.heads.spec import HeadsSpec, HeadTensors
from fastattn.core.layout import heads_last
from fastattn.ground.checks import lse_dtype


def prepare_heads(x: Tensor, spec: HeadsSpec, tensors: HeadTensors) -> Tensor:
    """head_scale * rotate(norm(x) * norm_weight), in fp32 at least, rounded once; x (B, H, L, D)."""
    y, _ = _normalised(x, spec)
    if tensors.norm_weight is not None:
        y = y * tensors.norm_weight[:, :, None]
    y = _turned(y, spec, tensors)
    if tensors.head_scale is not None:
        y = y * tensors.head_scale[:, :, None, None]
    return y.to(x.dtype)


def prepare_heads_backward(
    dy: Tensor, x: Tensor, spec: HeadsSpec, tensors: HeadTensors
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of `prepare_heads`, written out so that they can be differentiated again: dx, dnorm_weight
    (B, H, D) and dhead_scale (B, H), None if there is no norm_weight or head_scale."""
    normalised, inverse_size = _normalised(x, spec)
    gradient = _turned(dy.to(normalised.dtype), spec, tensors, back=True)
    weight, scale = tensors.norm_weight, tensors.head_scale
    dweight = dscale = None
    if weight is not None or scale is not None:
        total = (gradient * normalised).sum(2)
        if weight is not None:
            dweight = total if scale is None else total * scale[..., None]
        if scale is not None:
            dscale = (total if weight is None else total * weight).sum(-1)
    if weight is not None:
        gradient = gradient * weight[:, :, None]
    if scale is not None:
        gradient = gradient * scale[:, :, None, None]
    if spec.norm:
        gradient = inverse_size * (gradient - normalised * (gradient * normalised).mean(-1, keepdim=True))
    return gradient.to(x.dtype), dweight, dscale


def prepare_heads_tangent(
    x: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dscale: Tensor | None,
    spec: HeadsSpec,
    tensors: HeadTensors,
) -> Tensor:
    """The tangent of `prepare_heads` for the tangents dx, dweight and dscale of x, norm_weight and head_scale;
    None is 0."""
    normalised, inverse_size = _normalised(x, spec)
    weight, scale = tensors.norm_weight, tensors.head_scale
    tangent = torch.zeros_like(normalised)
    if dx is not None:
        tangent = dx.to(normalised.dtype)
        if spec.norm:
            tangent = inverse_size * (tangent - normalised * (tangent * normalised).mean(-1, keepdim=True))
    weighted = normalised
    if weight is not None:
        weighted, tangent = normalised * weight[:, :, None], tangent * weight[:, :, None]
        if dweight is not None:
            tangent = tangent + normalised * dweight[:, :, None]
    if scale is not None:
        tangent = tangent * scale[:, :, None, None]
        if dscale is not None:
            tangent = tangent + weighted * dscale[:, :, None, None]
    return _turned(tangent, spec, tensors).to(x.dtype)


def _normalised(x: Tensor, spec: HeadsSpec) -> tuple[Tensor, Tensor]:
    """x in fp32 at least, divided by its root mean square if `spec.norm`; and 1 / that (B, H, L, 1), or 1."""
    x = x.to(lse_dtype(x.dtype))
    if not spec.norm:
        return x, x.new_ones(())
    inverse_size = torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps)
    return x * inverse_size, inverse_size


def _turned(t: Tensor, spec: HeadsSpec, tensors: HeadTensors, back: bool = False) -> Tensor:
    """Pairs of components (a, b) become (a cos - b sin, b cos + a sin); `back` is the transpose of that."""
    if tensors.cos is None or tensors.sin is None:
        return t
    # (B, L, H, D), as results lie in memory.
    t = t.transpose(1, 2)
    cos, sin = (
        _rows_of_table(table, tensors.offsets, t.shape[1]).to(t.dtype)[:, :, None]
        for table in (tensors.cos, tensors.sin)
    )
    sign = -1 if back else 1
    pairs, rest = t[..., : spec.turned], t[..., spec.turned :]
    a, b = pairs.unflatten(-1, (-1, 2)).unbind(-1) if spec.interleaved else pairs.chunk(2, -1)
    turned = [torch.addcmul(a * cos, b, sin, value=-sign), torch.addcmul(b * cos, a, sin, value=sign)]
    if spec.interleaved:
        turned = [torch.stack(turned, -1).flatten(-2)]
    return torch.cat([*turned, rest], -1).transpose(1, 2)


def _rows_of_table(table: Tensor, offsets: Tensor | None, length: int) -> Tensor:
    """The rows (B, length, pairs) of a table (B, positions, pairs), from each offset on. Positions before the
    table take its first row, positions beyond it NaN."""
    if offsets is None:
        return table[:, :length]
    positions = offsets[:, None] + torch.arange(length, device=table.device)
    last = table.shape[1] - 1
    rows = torch.take_along_dim(table, positions.clamp(0, max(last, 0)).long()[..., None], 1)
    return rows.masked_fill((positions > last)[..., None], float("nan"))


def forward(x: Tensor, spec: HeadsSpec, tensors: HeadTensors) -> Tensor:
    return heads_last(prepare_heads(x, spec, tensors))


def backward(
    dy: Tensor, x: Tensor, spec: HeadsSpec, tensors: HeadTensors
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dx, dweight, dscale = prepare_heads_backward(dy, x, spec, tensors)
    return heads_last(dx), dweight, dscale
