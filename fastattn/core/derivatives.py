"""Derivatives of any differentiable function in both modes, differentiable again in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastattn.core.function import Function


def push_through(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Forward mode: the tangents of the function's results."""
    which = [i for i, t in enumerate(tangents) if t is not None]
    count = len(inputs)

    def moved(*given: Tensor | None) -> Sequence[Tensor]:
        results, back = pull_back(function, given[:count], which)
        return torch.func.vjp(back, [torch.zeros_like(r) for r in results])[1](given[count:])[0]

    return _Any.apply(moved, *inputs, *(tangents[i] for i in which))


def pull_through(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor],
    which: Sequence[int] | None = None,
) -> tuple[Tensor | None, ...]:
    """Reverse mode: a gradient for each input, None for one that is None or not among `which` (by default all)."""
    which = [i for i, t in enumerate(inputs) if t is not None] if which is None else which
    _, back = pull_back(function, inputs, which)
    found = dict(zip(which, back(list(cotangents)), strict=True))
    return tuple(found.get(i) for i in range(len(inputs)))


def pull_back(function: Callable, inputs: Sequence[Tensor | None], which: Sequence[int]) -> tuple:
    """torch.func.vjp by these of the inputs."""

    def of(*varied: Tensor) -> list[Tensor]:
        given = list(inputs)
        for i, t in zip(which, varied, strict=True):
            given[i] = t
        return list(function(*given))

    return torch.func.vjp(of, *(inputs[i] for i in which))


class _Any(Function):
    """(function, *inputs) -> its results; a Function, because what jvp computes has no tangents itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function, *inputs):
        return tuple(function(*inputs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        inputs = ctx.saved_tensors
        which = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        return None, *pull_through(ctx.function, inputs, cotangents, which)

    @staticmethod
    def jvp(ctx, _, *tangents):
        return push_through(ctx.function, ctx.saved_tensors, tangents)
