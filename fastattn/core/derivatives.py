"""Derivatives of any differentiable function in both modes, differentiable again in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.core import spread
from fastattn.core.function import Function, saves_for_forward


def push_through(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Forward mode: the tangents of the function's results."""
    spread.refuse_dtensors(inputs)
    which = [i for i, t in enumerate(tangents) if t is not None]
    count = len(inputs)

    def pushed(*arguments: Tensor | None) -> Sequence[Tensor]:
        # The pull-back is linear in the cotangents: pulling it back pushes forward.
        results, back = pull_back(function, arguments[:count], which)
        return torch.func.vjp(back, [torch.zeros_like(r) for r in results])[1](arguments[count:])[0]

    return _Any.apply(pushed, *inputs, *(tangents[i] for i in which))


def pull_through(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor],
    which: Sequence[int] | None = None,
) -> tuple[Tensor | None, ...]:
    """Reverse mode: a gradient for each input, None for one that is None or not among `which` (by default all)."""
    spread.refuse_dtensors(inputs)
    which = [i for i, t in enumerate(inputs) if t is not None] if which is None else which
    _, back = pull_back(function, inputs, which)
    found = dict(zip(which, back(list(cotangents)), strict=True))
    return tuple(found.get(i) for i in range(len(inputs)))


def pull_back(function: Callable, inputs: Sequence[Tensor | None], which: Sequence[int]) -> tuple:
    """torch.func.vjp with respect to these of the inputs."""

    def of_varied(*varied: Tensor) -> list[Tensor]:
        arguments = list(inputs)
        for i, t in zip(which, varied, strict=True):
            arguments[i] = t
        return list(function(*arguments))

    return torch.func.vjp(of_varied, *(inputs[i] for i in which))


def with_forward_mode(
    backward: type[Function], gradients: Callable[[Any, Sequence[Tensor | None]], Sequence[Tensor]], count: int
) -> type[Function]:
    """The Function `backward`, which computes gradients, with forward mode. torch.compile refuses a Function that
    has a jvp, and takes `backward` itself.

    gradients: (ctx, tensors) to those gradients that `ctx.wanted` marks, by a differentiable formula.
    count: how many inputs, from the first on, are the tensors of that formula.
    """

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        pushed = iter(push_through(lambda *t: gradients(ctx, t), inputs, tangents[:count]))
        return tuple(next(pushed) if want else inputs[0].new_empty(0) for want in ctx.wanted)

    dual = type(f"Dual{backward.__name__}", (backward,), {"jvp": staticmethod(jvp)})
    return saves_for_forward(count)(dual)


class _Any(Function):
    """(function, *inputs) -> its results. A Function of its own, because torch does not track tangents of what is
    computed within a jvp."""

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
