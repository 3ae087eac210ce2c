"""The MLP as PyTorch operators, built like those of attention.

`fastattn::mlp_forward` and its backward choose a backend and run it; tracers see one node each. `MLP` is the thin
autograd.Function that the functional calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from fastattn.core.mlp.whole import resolved
from fastattn.core.plans import Plan, needs_gradient

# The options of a spec, as arguments of an operator, in this order.
_OPTIONS = (
    "str activation, str packed, str save, int chunk, bool match_eager, str norm, float norm_eps, float dropout, "
    "str residual_kind, str whole"
)
# What a backend keeps of the hidden layer is up to four tensors; in the operators' results, the others are empty.
_SLOTS = 4
_WEIGHTS = len(MLPWeights._fields)

_operators = library.Library("fastattn", "FRAGMENT")
_operators.define(
    "mlp_forward(Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_up, Tensor? b_up, Tensor w_out, Tensor? b_out, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, Tensor? dropout_state, "
    f"{_OPTIONS}, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_operators.define(
    "mlp_backward(Tensor dy, Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_up, Tensor? b_up, Tensor w_out, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? dropout_state, "
    "Tensor? kept_1, Tensor? kept_2, Tensor? kept_3, Tensor? kept_4, bool[] wanted, "
    f"{_OPTIONS}, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_FORWARD, _BACKWARD = "fastattn::mlp_forward", "fastattn::mlp_backward"


def options_of(spec: MLPSpec) -> tuple:
    """The spec's options as arguments of the operators."""
    return (
        spec.activation, spec.packed, spec.save, spec.chunk, spec.match_eager, spec.norm, spec.norm_eps,
        spec.dropout, spec.residual, spec.whole,
    )  # fmt: skip


def _spec(w_up: Tensor | None, options: Sequence[Any]) -> MLPSpec:
    activation, packed, *rest = options
    return MLPSpec(activation, w_up is not None or bool(packed), packed, *rest)


def _saved(x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    """What the backward takes of x and an MLPWeights: all but b_out and the residual."""
    return x, *weights[:5], *weights[6:8], weights[9]


def _weights(saved: Sequence) -> MLPWeights:
    """The weights among what `_saved` gave, without x."""
    w_in, b_in, w_up, b_up, w_out, norm_weight, norm_bias, state = saved[: _SAVED - 1]
    return MLPWeights(w_in, b_in, w_up, b_up, w_out, None, norm_weight, norm_bias, None, state)


_SAVED = 9


def _filled(kept: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    return *kept, *(x.new_empty(0) for _ in range(_SLOTS - len(kept)))


def _forward(x, *arguments) -> tuple[Tensor, ...]:
    weights, (*options, backend) = MLPWeights(*arguments[:_WEIGHTS]), arguments[_WEIGHTS:]
    spec = resolved(x, weights, _spec(weights.w_up, options), backend)
    chosen = capabilities.module(Request("mlp", spec, (x,)), FORWARD, backend)
    y, kept = chosen.forward(x, weights, spec)
    return y, *_filled(kept, x)


def _backward(dy, x, *arguments) -> tuple[Tensor, ...]:
    weights, rest = _weights(arguments), arguments[_SAVED - 1 :]
    kept, (wanted, *options, backend) = rest[:_SLOTS], rest[_SLOTS:]
    spec = resolved(x, weights, _spec(weights.w_up, options), backend)
    chosen = capabilities.module(Request("mlp", spec, (x,)), BACKWARD, backend)
    gradients = chosen.backward(dy, x, weights, tuple(t for t in kept if t is not None), wanted, spec)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


_operators.impl("mlp_forward", _forward, "CompositeExplicitAutograd")
_operators.impl("mlp_backward", _backward, "CompositeExplicitAutograd")


@library.register_fake(_FORWARD, lib=_operators)
def _forward_fake(x, *arguments):
    weights, (*options, backend) = MLPWeights(*arguments[:_WEIGHTS]), arguments[_WEIGHTS:]
    spec = resolved(x, weights, _spec(weights.w_up, options), backend)
    chosen = capabilities.module(Request("mlp", spec, (x,)), FORWARD, backend)
    kept = chosen.kept_empty(x, weights, spec)
    return x.new_empty((x.shape[0], weights.w_out.shape[0])), *_filled(kept, x)


@library.register_fake(_BACKWARD, lib=_operators)
def _backward_fake(dy, x, *arguments):
    weights, wanted = _weights(arguments), arguments[_SAVED - 1 + _SLOTS]
    w_in, w_out = weights.w_in, weights.w_out
    rows, width = w_in.shape[0] * (1 if weights.w_up is None else 2), w_in.shape[1:]
    like = (x, x, x, x, x, weights.norm_weight, weights.norm_bias)
    shapes = (x.shape, (rows, *width), (rows,), w_out.shape, (w_out.shape[0],), width, width)
    return tuple(
        (x if t is None else t).new_empty(shape if want else 0)
        for t, shape, want in zip(like, shapes, wanted, strict=True)
    )


class MLP(Function):
    """(x, the tensors of an MLPWeights, the options of a spec, backend) -> y, and in four slots what is kept (see
    backends.py)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x, w_in, b_in, w_up, b_up, w_out, b_out, norm_weight, norm_bias, residual, dropout_state,
        activation, packed, save, chunk, match_eager, norm, norm_eps, dropout, residual_kind, whole,
        backend,
    ):  # fmt: skip
        return torch.ops.fastattn.mlp_forward(
            x, w_in, b_in, w_up, b_up, w_out, b_out, norm_weight, norm_bias, residual, dropout_state,
            activation, packed, save, chunk, match_eager, norm, norm_eps, dropout, residual_kind, whole,
            backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *slots = output
        ctx.mark_non_differentiable(*slots)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*_saved(*inputs[: 1 + _WEIGHTS]), *_in_use(slots))
        ctx.options = inputs[1 + _WEIGHTS :]

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * (1 + _WEIGHTS + len(ctx.options))
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
        found = _found(
            ctx.needs_input_grad,
            dy,
            saved[1].shape[0],
            lambda wanted: mlp_backward(dy, *saved[:_SAVED], *_slots(saved[_SAVED:]), wanted, *ctx.options),
        )
        return *found, *(None,) * len(ctx.options)


def _in_use(slots: Sequence[Tensor]) -> list[Tensor]:
    """What was kept; an empty slot has one dimension."""
    return [t for t in slots if t.dim() == 2]


def _slots(kept: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return *kept, *(None,) * (_SLOTS - len(kept))


def _wanted(needed: Sequence[bool]) -> tuple[bool, ...]:
    """Which gradients the backward computes, by which of MLP's arguments need one."""
    x, w_in, b_in, w_up, b_up, w_out, b_out, norm_weight, norm_bias = needed[:9]
    return x, w_in or w_up, b_in or b_up, w_out, b_out, norm_weight, norm_bias


def _found(
    needed: Sequence[bool], dy: Tensor, rows: int, compute: Callable[[tuple[bool, ...]], Sequence]
) -> tuple[Tensor | None, ...]:
    """The gradient of each of MLP's tensors that needs one. compute: which are wanted -> what the backward
    computes. The residual's is dy."""
    wanted = _wanted(needed)
    found = _by_argument(compute(wanted) if any(wanted) else (None,) * len(wanted), needed, rows)
    return *found, dy if needed[9] else None, None


def _by_argument(gradients: Sequence, needed: Sequence[bool], rows: int) -> tuple[Tensor | None, ...]:
    """What the backward computed, by MLP's tensors up to norm_bias; w_in has so many rows."""
    dx, dw, db, dw_out, db_out, *of_norm = gradients
    dw_up = db_up = None
    if dw is not None and dw.shape[0] == 2 * rows:
        # By views that DTensor computes on shards; it would gather a slice.
        dw, dw_up = dw.unflatten(0, (2, rows)).unbind()
    if db is not None and db.shape[0] == 2 * rows:
        db, db_up = db.unflatten(0, (2, rows)).unbind()
    found = (dx, dw, db, dw_up, db_up, dw_out, db_out, *of_norm)
    return tuple(t if need else None for t, need in zip(found, needed, strict=False))


class MLPBackward(Function):
    """The gradients of MLP; differentiable once more, through the reference formula.

    No gradient flows into what was kept: the formula starts from x and the weights, from which it was computed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dy, x, w_in, b_in, w_up, b_up, w_out, norm_weight, norm_bias, dropout_state, kept_1, kept_2, kept_3,
        kept_4, wanted, activation, packed, save, chunk, match_eager, norm, norm_eps, dropout, residual_kind,
        whole, backend,
    ):  # fmt: skip
        return torch.ops.fastattn.mlp_backward(
            dy, x, w_in, b_in, w_up, b_up, w_out, norm_weight, norm_bias, dropout_state, kept_1, kept_2, kept_3,
            kept_4, wanted, activation, packed, save, chunk, match_eager, norm, norm_eps, dropout, residual_kind,
            whole, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: 1 + _SAVED])
        ctx.wanted, *ctx.options, _backend = inputs[1 + _SAVED + _SLOTS :]

    @staticmethod
    def backward(ctx, *second):
        cotangents = [g for g, want in zip(second, ctx.wanted, strict=True) if want]
        saved = ctx.saved_tensors
        which = [i for i, t in enumerate(saved) if t is not None and t.is_floating_point()]
        found = derivatives.pull_through(lambda *t: _gradients(ctx, t), saved, cotangents, which)
        return *found, *(None,) * (_SLOTS + 2 + len(ctx.options))


def _gradients(ctx, tensors: Sequence) -> list[Any]:
    """The gradients that are wanted, by the reference formula."""
    dy, x, *rest = tensors
    weights = _weights(rest)
    every = definition.mlp_backward(dy, x, weights, _spec(weights.w_up, ctx.options))
    return [g for g, want in zip(every, ctx.wanted, strict=True) if want]


class DualMLP(MLP):
    """MLP, with forward mode, through the reference formula."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        MLP.setup_context(ctx, inputs, output)
        # The same tensors as MLP saves for the backward: torch.func.vmap keeps one list of their mapped
        # dimensions.
        ctx.save_for_forward(*_saved(*inputs[: 1 + _WEIGHTS]), *_in_use(output[1:]))

    @staticmethod
    def jvp(ctx, *tangents):
        x, *rest = tensors = ctx.saved_tensors[:_SAVED]
        weights = _weights(rest)
        spec = _spec(weights.w_up, ctx.options[:-1])

        def y(x, *rest):
            return [definition.mlp(x, _weights(rest), spec)]

        dy = x.new_zeros((x.shape[0], weights.w_out.shape[0]))
        moved = _saved(*tangents[: 1 + _WEIGHTS])
        if any(t is not None for t in moved):
            (dy,) = derivatives.push_through(y, tensors, moved)
        db_out, dresidual = tangents[6], tangents[9]
        if db_out is not None and spec.dropout:
            db_out = definition.dropped(db_out.expand(dy.shape), weights.dropout_state, spec.dropout)
        for more in (db_out, dresidual):
            dy = dy if more is None else dy + more
        return dy, *(None,) * _SLOTS


DualMLPBackward = derivatives.with_forward_mode(MLPBackward, _gradients, 1 + _SAVED)


class MLPPlan(Plan):
    """Takes x and the MLPWeights."""

    family = "mlp"

    @classmethod
    def of(cls, x: Tensor, weights: MLPWeights, spec: MLPSpec, backend: str | None) -> MLPPlan:
        differentiable = needs_gradient(x, *weights)
        spec = resolved(x, weights, spec if differentiable else replace(spec, save="nothing"), backend)
        module = capabilities.module(Request("mlp", spec, (x,)), FORWARD, backend)
        composed = differentiable and getattr(module, "is_composed", lambda *_: False)(x, spec)
        return cls(spec, backend, differentiable, module, composed)

    def compose(self, x, *weights):
        return (definition.mlp(x, MLPWeights(*weights), self.spec),)

    def forward(self, x, *weights):
        y, kept = self.module.forward(x, MLPWeights(*weights), self.spec)
        return (y,), (*_saved(x, *weights), *kept) if self.differentiable else ()

    def gradients(self, saved, cotangents, needed, direct):
        (dy,), (x, *rest), kept = cotangents, saved[:_SAVED], saved[_SAVED:]
        if dy is None:
            return (None,) * (1 + _WEIGHTS)

        def compute(wanted):
            if not direct:
                options = wanted, *options_of(self.spec), self.backend
                return mlp_backward(dy, x, *rest, *_slots(kept), *options)
            module = capabilities.backward_module(self, (x,))
            return module.backward(dy, x, _weights(rest), kept, wanted, self.spec)

        return _found(needed, dy, rest[0].shape[0], compute)


def mlp(*arguments) -> tuple[Tensor, Tensor]:
    """y and saved, differentiable; takes MLP's arguments."""
    return (MLP if torch.compiler.is_compiling() else DualMLP).apply(*arguments)


def mlp_backward(*arguments) -> tuple[Tensor, ...]:
    """The gradients, differentiable; takes MLPBackward's arguments."""
    return (MLPBackward if torch.compiler.is_compiling() else DualMLPBackward).apply(*arguments)


@library.register_vmap(_FORWARD, lib=_operators)
def _forward_vmap(info: Any, in_dims: tuple, x, *rest):
    # All samples share a residual and random numbers, which belong to the tokens of one sample.
    by_token = any(t is not None for t in rest[_WEIGHTS - 2 : _WEIGHTS])
    if not info.batch_size or by_token or any(isinstance(dim, int) for dim in in_dims[1:]):
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
