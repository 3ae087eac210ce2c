"""Whether operators of PyTorch's compute on this GPU what we take them to compute, tried once, on a small problem.

The operators below F.scaled_dot_product_attention have no documentation, and differ by GPU and by version of
PyTorch. One that gives something else than the definition, or raises, is not used in this process, and the log
says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.core.attention import definition
from fastattn.core.attention.spec import NO_TENSORS, AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.ground.modes import capturing, outside_modes

Forward = Callable[..., tuple[Tensor, Tensor]]  # of q, k, v, spec, tensors
Backward = Callable[..., Gradients]  # of dout, (dlse,) saved, spec, tensors, wanted
BATCH, HEADS = 2, 4
# Of the largest value: far above rounding, and far below what a wrong mask or unit makes; in float32 also below
# what products in tf32 make.
CLOSE = {torch.float16: 0.03, torch.bfloat16: 0.03, torch.float32: 5e-5}

log = logging.getLogger("fastattn")
_known: dict[tuple[Any, ...], bool] = {}


class Trial(NamedTuple):
    """A small problem.

    name: what is tried, in words.
    problem: makes the spec and the tensors beside q, k, v, for a q and a k.
    queries, keys: how many of them.
    decides: whether an operator that fails it is not used, which the log then says.
    lse_gradient: whether the backward takes a gradient of the log-sum-exp, too.
    """

    name: str
    problem: Callable[[Tensor, Tensor], tuple[AttentionSpec, ScoreTensors]]
    queries: int = 70
    keys: int = 70
    decides: bool = True
    lse_gradient: bool = False


class _Sizes(NamedTuple):
    key_heads: int
    width: int
    value_width: int


def causal_problem(q: Tensor, k: Tensor) -> tuple[AttentionSpec, ScoreTensors]:
    """Of a trial."""
    return AttentionSpec(causal=True, scale=q.shape[3] ** -0.5), NO_TENSORS


def agrees(trial: Trial, q: Tensor, k: Tensor, v: Tensor, forward: Forward, backward: Backward) -> bool:
    """Whether they compute the problem as the definition does, in the dtype, on the device and with the widths of
    these heads, grouped if these are."""
    sizes = _Sizes(HEADS if q.shape[1] == k.shape[1] else HEADS // 2, q.shape[3], v.shape[3])
    key = (trial.name, q.device, q.dtype, sizes, torch.are_deterministic_algorithms_enabled())
    if key not in _known:
        if capturing():
            return False  # the comparison would wait for the device, which a graph cannot
        _known[key] = _tried(trial, q, sizes, forward, backward)
    return _known[key]


def _tried(trial: Trial, like: Tensor, sizes: _Sizes, forward: Forward, backward: Backward) -> bool:
    with outside_modes(), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        try:
            wrong = _difference(trial, like, sizes, forward, backward)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    if wrong and trial.decides:
        log.warning("PyTorch's %s is not used on %s in %s: %s", trial.name, like.device, like.dtype, wrong)
    return not wrong


def _difference(trial: Trial, like: Tensor, sizes: _Sizes, forward: Forward, backward: Backward) -> str:
    """What differs from the definition in a higher precision; "" if nothing does."""
    heads, queries, keys = HEADS, trial.queries, trial.keys
    shapes = (
        (heads, queries, sizes.width),
        (sizes.key_heads, keys, sizes.width),
        (sizes.key_heads, keys, sizes.value_width),
        (heads, queries, sizes.value_width),
    )
    q, k, v, dout = (_values(n, like, BATCH, *shape) for n, shape in enumerate(shapes))
    spec, tensors = trial.problem(q, k)
    learns = tensors.bias is not None and tensors.bias.dtype != torch.bool
    wanted = Wanted(learns, tensors.relative_bias is not None)
    _leave_nan_behind(q, k, v, dout)
    out, lse = forward(q, k, v, spec, tensors)
    _leave_nan_behind(q, k, v)
    dlse = _values(len(shapes), lse, *lse.shape) if trial.lse_gradient else None
    above = (dout,) if dlse is None else (dout, dlse)
    ours = backward(*above, Saved(q, k, v, out, lse), spec, tensors, wanted)
    exact = _exact(dout, dlse, q, k, v, spec, tensors, wanted)
    names = ("out", "lse", "dq", "dk", "dv", "dbias", "drelative_bias")
    for name, a, b in zip(names, (out, lse, *ours), exact, strict=False):
        if b is not None and (a is None or not _close(a, b, CLOSE[like.dtype])):
            return f"its {name} differs from the definition"
    return ""


def _exact(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Any,
    tensors: ScoreTensors,
    wanted: Wanted,
) -> tuple:
    """The results by the definition, in float64 for float32, else in float32."""
    dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
    q, k, v, dout = (t.to(dtype) for t in (q, k, v, dout))
    bias = tensors.bias
    tensors = tensors._replace(bias=bias.to(dtype) if wanted.bias and bias is not None else bias)
    out, lse = definition.attention(q, k, v, spec, tensors)
    gradients: Gradients = definition.attention_backward(
        dout, None if dlse is None else dlse.to(dtype), Saved(q, k, v, out, lse), spec, tensors, wanted
    )
    return out, lse, *gradients[:5]


def _leave_nan_behind(*like: Tensor) -> None:
    """Give memory full of NaN back to the allocator, which hands it out next: what an operator does not write must
    not pass for the zeros that new memory often holds."""
    spoiled = [torch.full_like(t, float("nan")) for t in like]
    del spoiled


def _values(seed: int, like: Tensor, *shape: int) -> Tensor:
    """Numbers that look random, without the caller's generator."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device=like.device)
    return ((count * (1.3 + 0.17 * seed)).sin() * 2).view(shape).to(like.dtype)


def _close(found: Tensor, exact: Tensor, most: float) -> bool:
    infinite = torch.isinf(exact)
    if found.shape != exact.shape or not torch.equal(torch.isinf(found), infinite):
        return False
    found, exact = found.to(exact.dtype).masked_fill(infinite, 0.0), exact.masked_fill(infinite, 0.0)
    return bool((found - exact).abs().max() <= most * exact.abs().max().clamp(min=1e-3))
