"""The MLP as PyTorch operators, built like those of attention.

`fastattn::mlp_forward` and its backward choose a backend and run it; tracers see one node each. `MLP` is the thin
autograd.Function that the functional calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from fastattn.core import backends, capabilities, derivatives
from fastattn.core.capabilities import BACKWARD, FORWARD, Request
from fastattn.core.function import Function, register_autograd
from fastattn.core.mapped import one_by_one, unfold
from fastattn.core.mlp import definition
from fastattn.core.mlp.spec import MLPSpec, MLPWeights
from fastattn.core.plans import Plan, needs_gradient

_operators = library.Library("fastattn", "FRAGMENT")
_operators.define(
    "mlp_forward(Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_up, Tensor? b_up, Tensor w_out, Tensor? b_out, "
    "str activation, bool save, str? backend) -> (Tensor, Tensor)"
)
_operators.define(
    "mlp_backward(Tensor dy, Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_up, Tensor? b_up, Tensor w_out, "
    "Tensor saved, bool[] wanted, str activation, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_FORWARD, _BACKWARD = "fastattn::mlp_forward", "fastattn::mlp_backward"


def _forward(x, w_in, b_in, w_up, b_up, w_out, b_out, activation, save, backend) -> tuple[Tensor, Tensor]:
    spec = MLPSpec(activation, gated=w_up is not None)
    chosen = capabilities.choose(Request("mlp", spec, (x,)), FORWARD, backend)
    weights = MLPWeights(w_in, b_in, w_up, b_up, w_out, b_out)
    y, saved = backends.load("mlp", chosen).forward(x, weights, spec, save)
    return y, x.new_empty(0) if saved is None else saved


def _backward(dy, x, w_in, b_in, w_up, b_up, w_out, saved, wanted, activation, backend) -> tuple[Tensor, ...]:
    spec = MLPSpec(activation, gated=w_up is not None)
    chosen = capabilities.choose(Request("mlp", spec, (x,)), BACKWARD, backend)
    weights = MLPWeights(w_in, b_in, w_up, b_up, w_out)
    gradients = backends.load("mlp", chosen).backward(dy, x, weights, saved, wanted, spec)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


_operators.impl("mlp_forward", _forward, "CompositeExplicitAutograd")
_operators.impl("mlp_backward", _backward, "CompositeExplicitAutograd")


@library.register_fake(_FORWARD, lib=_operators)
def _forward_fake(x, w_in, b_in, w_up, b_up, w_out, b_out, activation, save, backend):
    width = w_in.shape[0] * (1 if w_up is None else 2)
    saved = x.new_empty((x.shape[0], width)) if save else x.new_empty(0)
    return x.new_empty((x.shape[0], w_out.shape[0])), saved


@library.register_fake(_BACKWARD, lib=_operators)
def _backward_fake(dy, x, w_in, b_in, w_up, b_up, w_out, saved, wanted, activation, backend):
    rows = w_in.shape[0] * (1 if w_up is None else 2)
    shapes = (x.shape, (rows, w_in.shape[1]), (rows,), w_out.shape, (w_out.shape[0],))
    return tuple(x.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


class MLP(Function):
    """(x, w_in, b_in, w_up, b_up, w_out, b_out, activation, save, backend) -> y, saved (see backends.py)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w_in, b_in, w_up, b_up, w_out, b_out, activation, save, backend):
        return torch.ops.fastattn.mlp_forward(x, w_in, b_in, w_up, b_up, w_out, b_out, activation, save, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _b_out, activation, save, backend = inputs
        _, saved = output
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)
        ctx.save, ctx.options = save, (activation, backend)

    @staticmethod
    def backward(ctx, dy, _dsaved):
        if dy is None:
            return (None,) * 10
        *tensors, saved = ctx.saved_tensors
        if not ctx.save:
            activation, backend = ctx.options
            _, saved = torch.ops.fastattn.mlp_forward(*tensors, None, activation, True, backend)
        wanted = _wanted(ctx.needs_input_grad)
        gradients = mlp_backward(dy, *tensors, saved, wanted, *ctx.options)
        return *_by_argument(gradients, ctx.needs_input_grad, tensors[1].shape[0]), None, None, None


def _wanted(needed: Sequence[bool]) -> tuple[bool, ...]:
    """Which gradients the backward computes, by which of MLP's arguments need one."""
    x, w_in, b_in, w_up, b_up, w_out, b_out = needed[:7]
    return x, w_in or w_up, b_in or b_up, w_out, b_out


def _by_argument(gradients: Sequence, needed: Sequence[bool], rows: int) -> list[Tensor | None]:
    """What the backward computed, by MLP's tensors; w_in has so many rows."""
    dx, dw, db, dw_out, db_out = gradients
    first, rest = slice(rows), slice(rows, None)
    parts = ((dx, ...), (dw, first), (db, first), (dw, rest), (db, rest), (dw_out, ...), (db_out, ...))
    return [
        None if not need else t if part is ... else t[part] for (t, part), need in zip(parts, needed, strict=False)
    ]


class MLPBackward(Function):
    """The gradients of MLP; differentiable once more, through the reference formula.

    No gradient flows into `saved`: the formula starts from x and the weights, from which it was computed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, x, w_in, b_in, w_up, b_up, w_out, saved, wanted, activation, backend):
        return torch.ops.fastattn.mlp_backward(
            dy, x, w_in, b_in, w_up, b_up, w_out, saved, wanted, activation, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _saved, wanted, activation, _backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.wanted, ctx.activation = wanted, activation

    @staticmethod
    def backward(ctx, *second):
        cotangents = [g for g, want in zip(second, ctx.wanted, strict=True) if want]
        found = derivatives.pull_through(lambda *t: _gradients(ctx, t), ctx.saved_tensors, cotangents)
        return *found, None, None, None, None


def _gradients(ctx, tensors: Sequence) -> list[Tensor]:
    """The gradients that are wanted, by the reference formula."""
    dy, x, *weights = tensors
    spec = MLPSpec(ctx.activation, gated=weights[2] is not None)
    every = definition.mlp_backward(dy, x, MLPWeights(*weights), spec)
    return [g for g, want in zip(every, ctx.wanted, strict=True) if want]


class DualMLP(MLP):
    """MLP, with forward mode, through the reference formula."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        MLP.setup_context(ctx, inputs, output)
        # The same tensors as MLP saves for the backward: torch.func.vmap keeps one list of their mapped
        # dimensions.
        ctx.save_for_forward(*inputs[:6], output[1])

    @staticmethod
    def jvp(ctx, *tangents):
        *tensors, _saved = ctx.saved_tensors
        x, *_, w_out = tensors

        def y(x, *weights):
            return [definition.mlp(x, MLPWeights(*weights), MLPSpec(ctx.options[0], weights[2] is not None))]

        dy = x.new_zeros((x.shape[0], w_out.shape[0]))
        if any(t is not None for t in tangents[:6]):
            (dy,) = derivatives.push_through(y, tensors, tangents[:6])
        return dy if tangents[6] is None else dy + tangents[6], None


DualMLPBackward = derivatives.with_forward_mode(MLPBackward, _gradients, 7)


class MLPPlan(Plan):
    """Takes x and the MLPWeights."""

    family = "mlp"

    @classmethod
    def of(cls, x: Tensor, weights: MLPWeights, spec: MLPSpec, backend: str | None) -> MLPPlan:
        module = capabilities.module(Request("mlp", spec, (x,)), FORWARD, backend)
        return cls(spec, backend, needs_gradient(x, *weights), module)

    def forward(self, x, *weights):
        y, saved = self.module.forward(x, MLPWeights(*weights), self.spec, self.differentiable)
        return (y,), (x, *weights[:-1], saved) if self.differentiable else ()

    def gradients(self, saved, cotangents, needed, direct):
        (dy,), (*tensors, saved) = cotangents, saved
        if dy is None:
            return (None,) * 7
        wanted = _wanted(needed)
        if direct:
            x, *weights = tensors
            module = capabilities.backward_module(self, (x,))
            gradients = module.backward(dy, x, MLPWeights(*weights), saved, wanted, self.spec)
        else:
            gradients = mlp_backward(dy, *tensors, saved, wanted, self.spec.activation, self.backend)
        return _by_argument(gradients, needed, tensors[1].shape[0])


def mlp(*arguments) -> tuple[Tensor, Tensor]:
    """y and saved, differentiable; takes MLP's arguments."""
    return (MLP if torch.compiler.is_compiling() else DualMLP).apply(*arguments)


def mlp_backward(*arguments) -> tuple[Tensor, ...]:
    """The gradients, differentiable; takes MLPBackward's arguments."""
    return (MLPBackward if torch.compiler.is_compiling() else DualMLPBackward).apply(*arguments)


@library.register_vmap(_FORWARD, lib=_operators)
def _forward_vmap(info: Any, in_dims: tuple, x, *rest):
    if not info.batch_size or any(isinstance(dim, int) for dim in in_dims[1:]):
        return one_by_one(torch.ops.fastattn.mlp_forward, info.batch_size, in_dims, (x, *rest))
    # All samples share their weights: they are more tokens of one call.
    x = x.movedim(in_dims[0], 0).flatten(0, 1)
    y, saved = torch.ops.fastattn.mlp_forward(x, *rest)
    saved = unfold(info.batch_size, (saved,))[0] if saved.dim() == 2 else saved.expand(info.batch_size, 0)
    return (*unfold(info.batch_size, (y,)), saved), (0, 0)


@library.register_vmap(_BACKWARD, lib=_operators)
def _backward_vmap(info: Any, in_dims: tuple, *arguments):
    return one_by_one(torch.ops.fastattn.mlp_backward, info.batch_size, in_dims, arguments)


for _name, _function in ((_FORWARD, MLP), (_BACKWARD, MLPBackward)):
    register_autograd(_name, _function, _operators)
