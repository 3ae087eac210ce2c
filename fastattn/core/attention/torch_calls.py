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
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention import torch_efficient
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.core.attention.torch_trial import agrees
from fastattn.ground.modes import kept

Widths = tuple[int, int]  # of queries and keys, and of values
# A gradient of the log-sum-exp is given to the kernel as COARSE * high + low, two numbers in the dtype of the
# heads: that rounds nothing of account, and in float16 passes numbers up to 2**28.
COARSE = 4096.0
_HIDDEN = float("-inf")


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
    sinks = tensors.sinks[..., None]
    # -inf minus -inf, of a row that sees nothing, is NaN.
    share = torch.sigmoid(lse - sinks).nan_to_num_(0.0)
    return out.mul_(share[..., None]), torch.logaddexp(lse, sinks)


def backward(
    module: ModuleType,
    widths: Widths,
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    wanted: Wanted,
) -> Gradients:
    """By the kernel's module: its weights are exp(score - lse), and lse has the sink in it."""
    q, k, v, out, lse = saved
    if dlse is not None:
        # What comes from above for a row that sees nothing may be anything.
        dlse = dlse.masked_fill(lse == _HIDDEN, 0.0)
    wide_q, wide_k = (padded(t, widths[0]) for t in (q, k))
    wide_v, wide_out, wide_dout = (padded(t, widths[1]) for t in (v, out, dout))
    heads = Saved(wide_q, wide_k, wide_v, wide_out, lse)
    gradients = with_lse(module, wide_dout, dlse, heads, spec, without_sinks(tensors), wanted)
    dq, dk, dv = (g[..., : t.shape[3]] for g, t in zip(gradients[:3], saved[:3], strict=True))
    gradients = gradients._replace(q=dq, k=dk, v=dv)
    if tensors.sinks is None:
        return gradients
    weights = torch.exp(tensors.sinks[..., None] - lse).nan_to_num_(0.0, 0.0)
    delta = torch.linalg.vecdot(dout.to(lse.dtype), out.to(lse.dtype))
    delta = delta if dlse is None else delta - dlse
    return gradients._replace(sinks=-torch.linalg.vecdot(weights, delta))


def with_lse(
    module: ModuleType,
    dout: Tensor,
    dlse: Tensor | None,
    saved: Saved,
    spec: AttentionSpec,
    tensors: ScoreTensors,
    wanted: Wanted,
) -> Gradients:
    """The gradients by the module's backward, once more for a gradient of the log-sum-exp."""
    of_out: Gradients = module.backward(dout, saved, spec, tensors, wanted)
    if dlse is None:
        return of_out
    out = torch.zeros_like(saved.out)
    high = torch.div(dlse, COARSE, out=out[..., 0])
    torch.sub(dlse, high, alpha=COARSE, out=out[..., 1])
    dout = torch.empty_like(out).copy_(_minus_parts(out.shape[3], out.dtype, out.device))
    alone = saved._replace(v=torch.zeros_like(saved.v), out=out)
    of_lse = module.backward(dout, alone, spec, tensors, wanted)
    # Values have no part in the log-sum-exp.
    pairs = zip(Gradients._fields, of_out, of_lse, strict=True)
    return of_out._replace(**{name: a.add_(b) for name, a, b in pairs if a is not None and name != "v"})


def takes_lse_gradient(
    module: ModuleType, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors
) -> bool:
    """Whether the module's backward computes it with this dout and this out."""
    heads = torch_efficient.like(q, k, v, spec, tensors) if module is torch_efficient else (q, k, v)
    return agrees(module.LSE_GRADIENT, *heads, module.forward, functools.partial(with_lse, module))


def without_sinks(tensors: ScoreTensors) -> ScoreTensors:
    return tensors if tensors.sinks is None else tensors._replace(sinks=None)


@kept(8)
def _minus_parts(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the two parts of a gradient of the log-sum-exp are multiplied by, and zeros: (width,)."""
    return torch.tensor([-COARSE, -1.0] + [0.0] * (width - 2), dtype=dtype, device=device)


def wide(t: Tensor, width: int) -> Tensor:
    """A tensor of this width that takes no memory, to ask whether a kernel takes such heads."""
    return t if t.shape[3] == width else t[..., :1].expand(*t.shape[:3], width)


def padded(t: Tensor, width: int) -> Tensor:
    """With zeros at the end of each row."""
    return t if t.shape[3] == width else F.pad(t, (0, width - t.shape[3]))
