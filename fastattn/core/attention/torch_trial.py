"""Whether operators of PyTorch's compute on this GPU what we take them to compute, tried once, on a small problem.

The operators below F.scaled_dot_product_attention have no documentation, and differ by GPU and by version of
PyTorch. One that gives something else than the definition, or raises, is not used in this process, and the log
says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.core.attention import definition
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Wanted
from fastattn.ground.modes import outside_modes

Forward = Callable[..., tuple[Tensor, Tensor]]  # of q, k, v, spec, tensors
Backward = Callable[..., tuple[Any, ...]]  # of dout, saved, spec, tensors, wanted
# Batch, heads, key heads, tokens, width.
SIZES = 2, 4, 2, 70, 32
# Of the largest value: far above rounding in half precision, and far below what a wrong mask or unit makes.
CLOSE = 0.03

log = logging.getLogger("fastattn")
_known: dict[tuple[Any, ...], bool] = {}


def agrees(
    name: str,
    like: Tensor,
    forward: Forward,
    backward: Backward,
    problem: Callable[[Tensor], tuple[AttentionSpec, ScoreTensors]],
) -> bool:
    """Whether they compute the problem as the definition does, in the dtype and on the device of `like`.

    problem: makes the spec and the tensors beside q, k, v, for a q.
    """
    key = (name, like.device, like.dtype, torch.are_deterministic_algorithms_enabled())
    if key not in _known:
        if torch.cuda.is_current_stream_capturing():
            return False  # the comparison would wait for the device, which a graph cannot
        _known[key] = _tried(name, like, forward, backward, problem)
    return _known[key]


def _tried(name: str, like: Tensor, forward: Forward, backward: Backward, problem: Callable) -> bool:
    with outside_modes(), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        try:
            wrong = _difference(like, forward, backward, problem)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    if wrong:
        log.warning("PyTorch's %s is not used on %s in %s: %s", name, like.device, like.dtype, wrong)
    return not wrong


def _difference(like: Tensor, forward: Forward, backward: Backward, problem: Callable) -> str:
    """What differs from the definition in float32; "" if nothing does."""
    batch, heads, key_heads, tokens, width = SIZES
    q, dout, k, v = (
        _values(n, like, batch, h, tokens, width) for n, h in enumerate((heads, heads, *[key_heads] * 2))
    )
    spec, tensors = problem(q)
    wanted = Wanted(bias=tensors.bias is not None and tensors.bias.dtype != torch.bool)
    out, lse = forward(q, k, v, spec, tensors)
    ours = backward(dout, Saved(q, k, v, out, lse), spec, tensors, wanted)
    exact = _exact(dout, q, k, v, spec, tensors, wanted)
    for quantity, a, b in zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out, lse, *ours), exact, strict=False):
        if b is not None and not _close(a, b):
            return f"its {quantity} differs from the definition"
    return ""


def _exact(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, spec: Any, tensors: ScoreTensors, wanted: Wanted
) -> tuple:
    q, k, v, dout = (t.float() for t in (q, k, v, dout))
    bias = tensors.bias
    tensors = tensors._replace(bias=bias.float() if wanted.bias and bias is not None else bias)
    out, lse = definition.attention(q, k, v, spec, tensors)
    gradients: Gradients = definition.attention_backward(
        dout, None, Saved(q, k, v, out, lse), spec, tensors, wanted
    )
    return out, lse, *gradients[:4]


def _values(seed: int, like: Tensor, *shape: int) -> Tensor:
    """Numbers that look random, without the caller's generator."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device=like.device)
    return ((count * (1.3 + 0.17 * seed)).sin() * 2).view(shape).to(like.dtype)


def _close(found: Tensor, exact: Tensor) -> bool:
    infinite = torch.isinf(exact)
    if found.shape != exact.shape or not torch.equal(torch.isinf(found), infinite):
        return False
    found, exact = found.float().masked_fill(infinite, 0.0), exact.masked_fill(infinite, 0.0)
    return bool((found - exact).abs().max() <= CLOSE * exact.abs().max().clamp(min=1e-3))
