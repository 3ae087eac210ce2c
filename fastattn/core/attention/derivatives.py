"""Derivatives of sums over tiles, of any order and in both modes, in O(N) memory. Every backend uses them.

The derivative of a sum over tiles is the sum of the derivatives of its tiles: again a sum over tiles, whose
function is torch.func.vjp of the first one's. Second derivatives are the derivatives of the gradients' sum,
reverse over forward mode those of the tangent's sum, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.core import spread
from fastattn.core.attention.spec import ScoreTensors
from fastattn.core.attention.tiles import Tile, TileSum
from fastattn.core.derivatives import pull_back
from fastattn.core.function import Function
from fastattn.core.mapped import fold, of_none, one_by_one, shares_batch, unfold

_FIXED = ("key_lengths", "alibi_slopes", "bias", "dropout_state", "mask", "intervals")


def pull(
    function: TileSum,
    tensors: ScoreTensors,
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Reverse mode: the gradient by each of the inputs, None where it is not needed. A cotangent that is None is
    zero."""
    outputs = [i for i, c in enumerate(cotangents) if c is not None]
    which = [i for i, (t, need) in enumerate(zip(inputs, needed, strict=True)) if need and t is not None]
    result: list[Tensor | None] = [None] * len(inputs)
    if outputs and which:
        flowing = (cotangents[i] for i in outputs)
        found = apply(_pulled(function, outputs, which), tensors, (*inputs, *flowing))
        for i, g in zip(which, found, strict=True):
            result[i] = g
    return result


def push(
    function: TileSum,
    tensors: ScoreTensors,
    inputs: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Forward mode: the tangent of each of the results. A tangent that is None is zero.

    The pull-back is linear in the cotangents, so pulling it back once more pushes forward. (torch.func.jvp of the
    tile cannot be used: it fails where dual tensors are already in use.)
    """
    which = [i for i, t in enumerate(tangents) if t is not None]
    outputs = range(len(function.outputs))
    cotangents = [torch.zeros_like(t) for i in function.outputs if (t := inputs[i]) is not None]
    at = [len(inputs) + i for i in outputs]
    pushed = _pulled(_pulled(function, outputs, which), range(len(which)), at)
    return apply(pushed, tensors, (*inputs, *cotangents, *(tangents[i] for i in which)))


def _pulled(function: TileSum, outputs: Sequence[int], which: Sequence[int]) -> TileSum:
    """The sum that takes the inputs and the cotangents of these outputs to the gradients by these inputs."""
    count = len(function.falls)

    def pulled(tile: Tile, *parts: Tensor | None) -> Sequence[Tensor]:
        inputs, cotangents = parts[:count], parts[count:]

        def chosen(*arguments: Tensor | None) -> list[Tensor]:
            results = function.function(tile, *arguments)
            return [results[i] for i in outputs]

        return pull_back(chosen, inputs, which)[1](list(cotangents))

    falls = (*function.falls, *(function.falls[function.outputs[i]] for i in outputs))
    return TileSum(pulled, function.names, falls, tuple(which), function.spec)


def apply(function: TileSum, tensors: ScoreTensors, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The sum, differentiable by its inputs."""
    spread.refuse_dtensors(inputs)
    return _Differentiable.apply(function, *(getattr(tensors, name) for name in _FIXED), *inputs)


class _Differentiable(Function):
    """(TileSum, *tensors without gradient, *inputs) -> results."""

    @staticmethod
    def forward(function, *arguments):
        fixed, inputs = arguments[: len(_FIXED)], arguments[len(_FIXED) :]
        return function(_score_tensors(fixed), inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        fixed, inputs = ctx.saved_tensors[: len(_FIXED)], ctx.saved_tensors[len(_FIXED) :]
        needed = ctx.needs_input_grad[1 + len(_FIXED) :]
        gradients = pull(ctx.function, _score_tensors(fixed), inputs, cotangents, needed)
        return None, *(None,) * len(_FIXED), *gradients

    @staticmethod
    def jvp(ctx, _, *tangents):
        fixed, inputs = ctx.saved_tensors[: len(_FIXED)], ctx.saved_tensors[len(_FIXED) :]
        return push(ctx.function, _score_tensors(fixed), inputs, tangents[len(_FIXED) :])

    @staticmethod
    def vmap(info: Any, in_dims, function, *arguments):
        dims, size = in_dims[1:], info.batch_size
        inputs = arguments[len(_FIXED) :]
        if not size:
            return of_none(lambda *one: _Differentiable.apply(function, *one), dims, arguments)
        biases = [len(_FIXED) + i for i, t in enumerate(inputs) if function.falls[i] == "scores"]
        if shares_batch(dims, arguments, len(_FIXED), (_FIXED.index("bias"), *biases)):
            return one_by_one(lambda *chosen: _Differentiable.apply(function, *chosen), size, dims, arguments)
        return unfold(size, _Differentiable.apply(function, *fold(size, dims, arguments))), (0,) * len(
            function.outputs
        )


def _score_tensors(fixed: Sequence[Tensor | None]) -> ScoreTensors:
    return ScoreTensors(**dict(zip(_FIXED, fixed, strict=True)))
