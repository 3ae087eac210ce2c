"""The MLP as PyTorch operators, built like those of attention.

`fastattn::mlp_forward` and its backward choose a backend and run it; tracers see one node each. `MLP` is the thin
autograd.Function that the functional calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, library

from fastattn.core import capabilities, derivatives
from fastattn.core.capabilities import BACKWARD, FORWARD, Request
from fastattn.core.function import Function, register_autograd
from fastattn.core.mapped import one_by_one, unfold
from fastattn.core.mlp import definition
from fastattn.core.mlp.spec import MLPSpec, MLPWeights
from fastattn.core.plans import Plan, needs_gradient

# The options of a spec, as arguments of an operator, in this order.
_OPTIONS = "str activation, str packed, str save, int chunk, bool match_eager"
# What a backend keeps of the hidden layer is up to four tensors; in the operators' results, the others are empty.
_SLOTS = 4

_operators = library.Library("fastattn", "FRAGMENT")
_operators.define(
    "mlp_forward(Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_up, Tensor? b_up, Tensor w_out, Tensor? b_out, "
    f"{_OPTIONS}, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_operators.define(
    "mlp_backward(Tensor dy, Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_up, Tensor? b_up, Tensor w_out, "
    "Tensor? kept_1, Tensor? kept_2, Tensor? kept_3, Tensor? kept_4, bool[] wanted, "
    f"{_OPTIONS}, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_FORWARD, _BACKWARD = "fastattn::mlp_forward", "fastattn::mlp_backward"


def options_of(spec: MLPSpec) -> tuple:
    """The spec's options as arguments of the operators."""
    return spec.activation, spec.packed, spec.save, spec.chunk, spec.match_eager


def _spec(w_up: Tensor | None, options: Sequence[Any]) -> MLPSpec:
    activation, packed, save, chunk, match_eager = options
    return MLPSpec(activation, w_up is not None or bool(packed), packed, save, chunk, match_eager)


def _filled(kept: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    return *kept, *(x.new_empty(0) for _ in range(_SLOTS - len(kept)))


def _forward(x, w_in, b_in, w_up, b_up, w_out, b_out, *rest) -> tuple[Tensor, ...]:
    *options, backend = rest
    spec = _spec(w_up, options)
    chosen = capabilities.module(Request("mlp", spec, (x,)), FORWARD, backend)
    y, kept = chosen.forward(x, MLPWeights(w_in, b_in, w_up, b_up, w_out, b_out), spec)
    return y, *_filled(kept, x)


def _backward(dy, x, w_in, b_in, w_up, b_up, w_out, *rest) -> tuple[Tensor, ...]:
    kept, (wanted, *options, backend) = rest[:_SLOTS], rest[_SLOTS:]
    spec = _spec(w_up, options)
    chosen = capabilities.module(Request("mlp", spec, (x,)), BACKWARD, backend)
    weights = MLPWeights(w_in, b_in, w_up, b_up, w_out)
    gradients = chosen.backward(dy, x, weights, tuple(t for t in kept if t is not None), wanted, spec)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


_operators.impl("mlp_forward", _forward, "CompositeExplicitAutograd")
_operators.impl("mlp_backward", _backward, "CompositeExplicitAutograd")


@library.register_fake(_FORWARD, lib=_operators)
def _forward_fake(x, w_in, b_in, w_up, b_up, w_out, b_out, *rest):
    *options, backend = rest
    spec = _spec(w_up, options)
    chosen = capabilities.module(Request("mlp", spec, (x,)), FORWARD, backend)
    kept = chosen.kept_empty(x, MLPWeights(w_in, b_in, w_up, b_up, w_out), spec)
    return x.new_empty((x.shape[0], w_out.shape[0])), *_filled(kept, x)


@library.register_fake(_BACKWARD, lib=_operators)
def _backward_fake(dy, x, w_in, b_in, w_up, b_up, w_out, *rest):
    wanted = rest[_SLOTS]
    rows = w_in.shape[0] * (1 if w_up is None else 2)
    shapes = (x.shape, (rows, w_in.shape[1]), (rows,), w_out.shape, (w_out.shape[0],))
    return tuple(x.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


class MLP(Function):
    """(x, w_in, b_in, w_up, b_up, w_out, b_out, the options of a spec, backend) -> y, and in four slots what is
    kept (see backends.py)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w_in, b_in, w_up, b_up, w_out, b_out, activation, packed, save, chunk, match_eager, backend):
        return torch.ops.fastattn.mlp_forward(
            x, w_in, b_in, w_up, b_up, w_out, b_out, activation, packed, save, chunk, match_eager, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *slots = output
        ctx.mark_non_differentiable(*slots)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], *_in_use(slots))
        ctx.options = inputs[7:]

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 13
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
        wanted = _wanted(ctx.needs_input_grad)
        gradients = mlp_backward(dy, *saved[:6], *_slots(saved[6:]), wanted, *ctx.options)
        return *_by_argument(gradients, ctx.needs_input_grad, saved[1].shape[0]), *(None,) * 6


def _in_use(slots: Sequence[Tensor]) -> list[Tensor]:
    """What was kept; an empty slot has one dimension."""
    return [t for t in slots if t.dim() == 2]


def _slots(kept: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return *kept, *(None,) * (_SLOTS - len(kept))


def _wanted(needed: Sequence[bool]) -> tuple[bool, ...]:
    """Which gradients the backward computes, by which of MLP's arguments need one."""
    x, w_in, b_in, w_up, b_up, w_out, b_out = needed[:7]
    return x, w_in or w_up, b_in or b_up, w_out, b_out


def _by_argument(gradients: Sequence, needed: Sequence[bool], rows: int) -> tuple[Tensor | None, ...]:
    """What the backward computed, by MLP's tensors; w_in has so many rows."""
    dx, dw, db, dw_out, db_out = gradients
    dw_up = db_up = None
    if needed[3] or (dw is not None and dw.shape[0] != rows):
        dw, dw_up = dw[:rows], dw[rows:]
    if needed[4] or (db is not None and db.shape[0] != rows):
        db, db_up = db[:rows], db[rows:]
    found = (dx, dw, db, dw_up, db_up, dw_out, db_out)
    return tuple(t if need else None for t, need in zip(found, needed, strict=False))


class MLPBackward(Function):
    """The gradients of MLP; differentiable once more, through the reference formula.

    No gradient flows into what was kept: the formula starts from x and the weights, from which it was computed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dy, x, w_in, b_in, w_up, b_up, w_out, kept_1, kept_2, kept_3, kept_4,
        wanted, activation, packed, save, chunk, match_eager, backend,
    ):  # fmt: skip
        return torch.ops.fastattn.mlp_backward(
            dy, x, w_in, b_in, w_up, b_up, w_out, kept_1, kept_2, kept_3, kept_4,
            wanted, activation, packed, save, chunk, match_eager, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        ctx.wanted, *ctx.options, _backend = inputs[7 + _SLOTS :]

    @staticmethod
    def backward(ctx, *second):
        cotangents = [g for g, want in zip(second, ctx.wanted, strict=True) if want]
        found = derivatives.pull_through(lambda *t: _gradients(ctx, t), ctx.saved_tensors, cotangents)
        return *found, *(None,) * (_SLOTS + 7)


def _gradients(ctx, tensors: Sequence) -> list[Tensor]:
    """The gradients that are wanted, by the reference formula."""
    dy, x, *weights = tensors
    every = definition.mlp_backward(dy, x, MLPWeights(*weights), _spec(weights[2], ctx.options))
    return [g for g, want in zip(every, ctx.wanted, strict=True) if want]


class DualMLP(MLP):
    """MLP, with forward mode, through the reference formula."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        MLP.setup_context(ctx, inputs, output)
        # The same tensors as MLP saves for the backward: torch.func.vmap keeps one list of their mapped
        # dimensions.
        ctx.save_for_forward(*inputs[:6], *_in_use(output[1:]))

    @staticmethod
    def jvp(ctx, *tangents):
        x, *weights = tensors = ctx.saved_tensors[:6]
        spec = _spec(weights[2], ctx.options[:-1])

        def y(x, *weights):
            return [definition.mlp(x, MLPWeights(*weights), spec)]

        dy = x.new_zeros((x.shape[0], weights[-1].shape[0]))
        if any(t is not None for t in tangents[:6]):
            (dy,) = derivatives.push_through(y, tensors, tangents[:6])
        return dy if tangents[6] is None else dy + tangents[6], *(None,) * _SLOTS


DualMLPBackward = derivatives.with_forward_mode(MLPBackward, _gradients, 7)


class MLPPlan(Plan):
    """Takes x and the MLPWeights."""

    family = "mlp"

    @classmethod
    def of(cls, x: Tensor, weights: MLPWeights, spec: MLPSpec, backend: str | None) -> MLPPlan:
        differentiable = needs_gradient(x, *weights)
        spec = spec if differentiable else replace(spec, save="nothing")
        return cls(
            spec, backend, differentiable, capabilities.module(Request("mlp", spec, (x,)), FORWARD, backend)
        )

    def forward(self, x, *weights):
        y, kept = self.module.forward(x, MLPWeights(*weights), self.spec)
        return (y,), (x, *weights[:-1], *kept) if self.differentiable else ()

    def gradients(self, saved, cotangents, needed, direct):
        (dy,), (x, *weights), kept = cotangents, saved[:6], saved[6:]
        if dy is None:
            return (None,) * 7
        wanted = _wanted(needed)
        if direct:
            module = capabilities.backward_module(self, (x,))
            gradients = module.backward(dy, x, MLPWeights(*weights), kept, wanted, self.spec)
        else:
            gradients = mlp_backward(dy, x, *weights, *_slots(kept), wanted, *options_of(self.spec), self.backend)
        return _by_argument(gradients, needed, weights[0].shape[0])


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
    y, *slots = torch.ops.fastattn.mlp_forward(x, *rest)
    kept = unfold(info.batch_size, _in_use(slots))
    empty = [t.expand(info.batch_size, 0) for t in slots[len(kept) :]]
    return (*unfold(info.batch_size, (y,)), *kept, *empty), (0,) * (1 + _SLOTS)


@library.register_vmap(_BACKWARD, lib=_operators)
def _backward_vmap(info: Any, in_dims: tuple, *arguments):
    return one_by_one(torch.ops.fastattn.mlp_backward, info.batch_size, in_dims, arguments)


for _name, _function in ((_FORWARD, MLP), (_BACKWARD, MLPBackward)):
    register_autograd(_name, _function, _operators)
