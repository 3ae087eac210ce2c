"""A call of one of PyTorch's kernels, and around it what none of them does: heads of any width, sinks, the
gradient of the log-sum-exp.

Heads are padded with zeros to the width that the kernel takes: zeros change no product.

The kernels' backwards take no gradient of the log-sum-exp. With P the weights, they compute dS = P * (dout v^T -
delta), where delta is the sum of dout * out in each row. The log-sum-exp adds P * dlse to dS. So a second
backward, whose values are zero and whose dout * out adds up to -dlse, gives the rest of the gradients. (To widen
the heads by a column for dlse takes one backward, but that of the next width, and copies of all tensors.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fastattn.core.attention import torch_efficient, torch_fused
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.torch_fused import COARSE, HIDDEN
from fastattn.core.attention.torch_trial import agrees
from fastattn.core.layout import padded
from fastattn.ground.modes import kept

Widths = tuple[int, int]  # of queries and keys, and of values


def forward(
    module: ModuleType,
    widths: Widths,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    tensors: ScoreTensors,
) -> tuple[Tensor, Tensor]:
    """By the kernel's module, with heads of these widths. A sink takes its share of the weights afterwards: the
    keys keep exp(lse) of exp(lse) + exp(sink), which is sigmoid(lse - sink)."""
    heads = padded(q, widths[0]), padded(k, widths[0]), padded(v, widths[1])
    out, lse = module.forward(*heads, spec, without_sinks(tensors))
    out = out[..., : v.shape[3]]
    if tensors.sinks is None:
        return out, lse
    share, lse = torch_fused.run(torch_fused.SHARE, lse, tensors.sinks[..., None])
    return out.mul_(share[..., None]), lse


def backward(
    module: ModuleType,
    widths: Widths,
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    wanted: Wanted,
    finite: bool = False,
) -> Gradients:
    """By the kernel's module: its weights are exp(score - lse), and lse has the sink in it. finite: whether the
    caller knows that every log-sum-exp is."""
    q, k, v, out, lse = saved
    wide_q, wide_k = (padded(t, widths[0]) for t in (q, k))
    wide_v, wide_out, wide_dout = (padded(t, widths[1]) for t in (v, out, dout))
    heads = Saved(wide_q, wide_k, wide_v, wide_out, lse)
    by_kernel = functools.partial(torch_efficient.backward, finite=finite) if module is torch_efficient else None
    gradients = with_lse(
        by_kernel or module.backward, wide_dout, dlse, heads, spec, without_sinks(tensors), wanted
    )
    dq, dk, dv = (g[..., : t.shape[3]] for g, t in zip(gradients[:3], saved[:3], strict=True))
    gradients = gradients._replace(q=dq, k=dk, v=dv)
    return (
        gradients if tensors.sinks is None else gradients._replace(sinks=_of_sinks(dout, dlse, out, lse, tensors))
    )


def _of_sinks(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, tensors: ScoreTensors) -> Tensor:
    """The gradient of sinks (B, Hq): minus the sum over rows of weight * (dout * out - dlse)."""
    assert tensors.sinks is not None
    sinks = tensors.sinks[..., None]
    if torch_fused.serves(torch_fused.SINK_GRADIENT, out.device):
        first = row((0.0 if dlse is None else 1.0,), out.shape[3], lse.dtype, lse.device)
        rows = (t[..., None] for t in (lse, sinks, lse if dlse is None else dlse))
        return torch_fused.run(torch_fused.SINK_GRADIENT, dout, out, *rows, first)[0].sum((2, 3))
    weights = torch.exp(sinks - lse).nan_to_num_(0.0, 0.0)
    delta = torch.linalg.vecdot(dout.to(lse.dtype), out.to(lse.dtype))
    # What comes from above for a row that sees nothing may be anything.
    delta = delta if dlse is None else delta - dlse.masked_fill(lse == HIDDEN, 0.0)
    return -torch.linalg.vecdot(weights, delta)


Backward = Callable[[Tensor, Saved, AttentionSpec, ScoreTensors, Wanted], Gradients]


def with_lse(
    backward: Backward,
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    wanted: Wanted,
) -> Gradients:
    """The gradients by a kernel's backward, once more for a gradient of the log-sum-exp."""
    of_out = backward(dout, saved, spec, tensors, wanted)
    if dlse is None:
        return of_out
    v, (out, dout) = saved.v, _parts(dlse, saved)
    alone = saved._replace(v=row((), v.shape[3], v.dtype, v.device).expand_as(v), out=out)
    of_lse = backward(dout, alone, spec, tensors, wanted)
    # Values have no part in the log-sum-exp.
    pairs = [(a, b) for name, a, b in zip(Gradients._fields, of_out, of_lse, strict=True) if name != "v"]
    totals, parts = zip(*[(a, b) for a, b in pairs if a is not None], strict=True)
    torch._foreach_add_(totals, parts)
    return of_out


def _parts(dlse: Tensor, saved: Saved) -> tuple[Tensor, Tensor]:
    """What stands for out and for its gradient; their product adds up to -dlse in each row, and to 0 in rows that
    see nothing: what comes from above for these may be anything."""
    out, lse, dtype = saved.out, saved.lse, saved.out.dtype
    minus = row(torch_fused.minus(dtype), out.shape[3], dtype, out.device)
    if _lies_in_words(out) and torch_fused.serves(torch_fused.PARTS[dtype], out.device):
        words = (out.view(torch.float32), dlse[..., None], lse[..., None], minus.view(torch.float32))
        parts, dout = torch_fused.run(torch_fused.PARTS[dtype], *words)
        return parts.view(dtype), dout.view(dtype)
    dlse = dlse.masked_fill(lse == HIDDEN, 0.0)
    parts = torch.zeros_like(out)
    if dtype == torch.float32:
        parts[..., 0] = dlse
    else:
        high = torch.div(dlse, COARSE, out=parts[..., 0])
        torch.sub(dlse, high, alpha=COARSE, out=parts[..., 1])
    return parts, torch.empty_like(out).copy_(minus)


def _lies_in_words(t: Tensor) -> bool:
    """Whether each row begins at a multiple of 4 bytes and takes as many."""
    step = 4 // t.element_size()
    return t.stride(3) == 1 and all(n % step == 0 for n in (*t.stride()[:3], t.shape[3], t.storage_offset()))


@kept(8)
def row(first: tuple[float, ...], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers, and then zeros: (width,)."""
    return torch.tensor((first + (0.0,) * width)[:width], dtype=dtype, device=device)


def takes_lse_gradient(
    module: ModuleType, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> bool:
    """Whether the module's backward computes it with this dout and this out."""
    heads = torch_efficient.like(q, k, v, spec, tensors) if module is torch_efficient else (q, k, v)
    return agrees(module.LSE_GRADIENT, *heads, module.forward, functools.partial(with_lse, module.backward))


def without_sinks(tensors: ScoreTensors) -> ScoreTensors:
    return tensors if tensors.sinks is None else tensors._replace(sinks=None)


def wide(t: Tensor, width: int) -> Tensor:
    """A tensor of this width that takes no memory, to ask whether a kernel takes such heads."""
    return t if t.shape[3] == width else t[..., :1].expand(*t.shape[:3], width)
