"""The norms as PyTorch operators, built like those of attention.

`fastattn::norm_forward` and `norm_backward` choose a backend and run it; tracers see one node each. `norm` is what
the functional calls. x is (B, R, W) everywhere, weight and bias are (B, W), moments (B, R).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, library

from fastattn.core import backends, capabilities, derivatives
from fastattn.core.capabilities import BACKWARD, FORWARD, Request
from fastattn.core.function import Function, register_autograd
from fastattn.core.mapped import fold, of_none, unfold
from fastattn.core.norm import definition
from fastattn.core.norm.spec import NormSpec, Saved
from fastattn.core.plans import Plan, needs_gradient
from fastattn.ground.checks import lse_dtype

_operators = library.Library("fastattn", "FRAGMENT")
_OPTIONS = "bool centred, float eps, float weight_offset, str? backend"
_operators.define(
    f"norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_operators.define(
    "norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor? weight, Tensor mean, Tensor inverse, "
    f"bool want_weight, bool want_bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
_FORWARD, _BACKWARD = "fastattn::norm_forward", "fastattn::norm_backward"


def _forward(x, residual, weight, bias, centred, eps, weight_offset, backend) -> tuple[Tensor, ...]:
    spec = NormSpec(centred, eps, weight_offset, residual is not None)
    chosen = capabilities.choose(Request("norm", spec, (x,)), FORWARD, backend)
    results = backends.load("norm", chosen).forward(x, residual, weight, bias, spec)
    return tuple(x.new_empty(0) if t is None else t for t in results)


def _backward(
    dy, dtotal, x, weight, mean, inverse, want_weight, want_bias, centred, eps, weight_offset, backend
) -> tuple[Tensor, ...]:
    spec = NormSpec(centred, eps, weight_offset, dtotal is not None)
    chosen = capabilities.choose(Request("norm", spec, (x,)), BACKWARD, backend)
    saved = Saved(x, weight, mean if spec.centred else None, inverse)
    gradients = backends.load("norm", chosen).backward(dy, dtotal, saved, spec, (want_weight, want_bias))
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


_operators.impl("norm_forward", _forward, "CompositeExplicitAutograd")
_operators.impl("norm_backward", _backward, "CompositeExplicitAutograd")


@library.register_fake(_FORWARD, lib=_operators)
def _forward_fake(x, residual, weight, bias, centred, *_):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    inverse = x.new_empty(x.shape[:2], dtype=lse_dtype(x.dtype))
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    return y, total, torch.empty_like(inverse) if centred else x.new_empty(0), inverse


@library.register_fake(_BACKWARD, lib=_operators)
def _backward_fake(dy, dtotal, x, weight, mean, inverse, want_weight, want_bias, *_):
    lines = x.new_empty((x.shape[0], x.shape[2]), dtype=lse_dtype(x.dtype))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, *(torch.empty_like(lines) if wanted else x.new_empty(0) for wanted in (want_weight, want_bias))


class Norm(Function):
    """(x, residual, weight, bias, *options) -> (y, x + residual, mean, inverse deviation). The first two are
    differentiable; a result that does not exist is an empty tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, residual, weight, bias, centred, eps, weight_offset, backend):
        return torch.ops.fastattn.norm_forward(x, residual, weight, bias, centred, eps, weight_offset, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, *ctx.options = inputs
        _, total, *moments = output
        ctx.mark_non_differentiable(*moments, *([total] if residual is None else []))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else total, weight, bias, *moments)

    @staticmethod
    def backward(ctx, dy, dtotal, _mean, _inverse):
        x, weight, bias, *moments = ctx.saved_tensors
        none = (None,) * len(ctx.options)
        if dy is None:
            return dtotal, dtotal, None, None, *none
        _, added, want_weight, want_bias = ctx.needs_input_grad[:4]
        dx, dweight, dbias = norm_backward(dy, dtotal, x, weight, *moments, want_weight, want_bias, *ctx.options)
        return (
            dx,
            dx if added else None,
            dweight.to(weight.dtype) if want_weight else None,
            dbias.to(bias.dtype) if want_bias else None,
            *none,
        )


class DualNorm(Norm):
    """Norm, with forward mode through the reference formula. torch.compile cannot trace it."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        Norm.setup_context(ctx, inputs, output)
        # The same tensors as Norm saves for the backward: torch.func.vmap keeps one list of their mapped
        # dimensions.
        residual = inputs[1]
        ctx.save_for_forward(inputs[0] if residual is None else output[1], *inputs[2:4], *output[2:])
        ctx.added = residual is not None

    @staticmethod
    def jvp(ctx, dx, dresidual, dweight, dbias, *_options):
        inputs = ctx.saved_tensors[:3]
        terms = [t for t in (dx, dresidual) if t is not None]
        dtotal = sum(terms[1:], terms[0]) if terms else None
        spec = NormSpec(*ctx.options[:3])

        def y(x, weight, bias):
            return [definition.norm(x, None, weight, bias, spec)[0]]

        tangents = (dtotal, dweight, dbias)
        dy = torch.zeros_like(inputs[0])
        if any(t is not None for t in tangents):
            (dy,) = derivatives.push_through(y, inputs, tangents)
        return dy, dtotal if ctx.added else None, None, None


class NormBackward(Function):
    """The gradients of Norm; differentiable once more, through the reference formula.

    No gradient flows into the moments: the formula starts from x, from which they were computed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dy, dtotal, x, weight, mean, inverse, want_weight, want_bias, centred, eps, weight_offset, backend
    ):
        return torch.ops.fastattn.norm_backward(
            dy, dtotal, x, weight, mean, inverse, want_weight, want_bias, centred, eps, weight_offset, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, dtotal, x, weight, _mean, _inverse, want_weight, want_bias, *options, _backend = inputs
        ctx.save_for_backward(dy, dtotal, x, weight)
        ctx.wanted, ctx.spec = (True, want_weight, want_bias), NormSpec(*options)

    @staticmethod
    def backward(ctx, *second):
        cotangents = [g for g, want in zip(second, ctx.wanted, strict=True) if want]
        found = derivatives.pull_through(lambda *t: _gradients(ctx, t), ctx.saved_tensors, cotangents)
        return *found, *(None,) * 8


def _gradients(ctx, tensors: Sequence) -> list[Tensor]:
    """The gradients that are wanted, by the reference formula."""
    dy, dtotal, x, weight = tensors
    every = definition.norm_backward(dy, dtotal, x, weight, ctx.spec)
    return [g for g, want in zip(every, ctx.wanted, strict=True) if want]


DualNormBackward = derivatives.with_forward_mode(NormBackward, _gradients, 4)


class NormPlan(Plan):
    """Takes x, residual, weight and bias; gives y and, with a residual, x + residual."""

    family = "norm"

    @classmethod
    def of(cls, tensors: tuple[Tensor | None, ...], spec: NormSpec, backend: str | None) -> NormPlan:
        module = capabilities.module(Request("norm", spec, tensors[:1]), FORWARD, backend)  # type: ignore[arg-type]
        return cls(spec, backend, needs_gradient(*tensors), module)

    def forward(self, x, residual, weight, bias):
        y, total, mean, inverse = self.module.forward(x, residual, weight, bias, self.spec)
        saved = x if total is None else total, weight, bias, x.new_empty(0) if mean is None else mean, inverse
        return (y,) if total is None else (y, total), saved

    def gradients(self, saved, cotangents, needed, direct):
        x, weight, bias, mean, inverse = saved
        dy, dtotal = cotangents if len(cotangents) == 2 else (*cotangents, None)
        if dy is None:
            return dtotal, dtotal, None, None
        wanted = tuple(needed[2:])
        if direct:
            added = dtotal is not None
            spec = self.spec if added == self.spec.added else replace(self.spec, added=added)
            module = capabilities.backward_module(self, (x,))
            kept = Saved(x, weight, mean if spec.centred else None, inverse)
            dx, dweight, dbias = module.backward(dy, dtotal, kept, spec, wanted)
        else:
            options = *wanted, *self.spec.options, self.backend
            dx, dweight, dbias = norm_backward(dy, dtotal, x, weight, mean, inverse, *options)
        return (
            dx,
            dx if needed[1] else None,
            dweight.to(weight.dtype) if wanted[0] else None,
            dbias.to(bias.dtype) if wanted[1] else None,
        )


def norm(*arguments) -> tuple[Tensor, ...]:
    """Norm's results, differentiable; takes its arguments."""
    if (
        not torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    ):
        return torch.ops.fastattn.norm_forward(*arguments)
    return (Norm if torch.compiler.is_compiling() else DualNorm).apply(*arguments)


def norm_backward(*arguments) -> tuple[Tensor, ...]:
    """The gradients, differentiable; takes NormBackward's arguments."""
    return (NormBackward if torch.compiler.is_compiling() else DualNormBackward).apply(*arguments)


def _unfold(size: int, results: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Results with their mapped dimension. One that does not exist is an empty tensor without a batch."""
    unfolded = (unfold(size, (t,))[0] if t.dim() > 1 else t.expand(size, 0) for t in results)
    return tuple(unfolded), (0,) * len(results)


def _vmap_rule(operator: Callable, count: int) -> Callable:
    """The rule for vmap of an operator whose first `count` arguments are tensors."""

    def rule(info: Any, in_dims: tuple, *arguments):
        if not info.batch_size:
            return of_none(operator, in_dims, arguments)
        tensors = fold(info.batch_size, in_dims[:count], arguments[:count])
        return _unfold(info.batch_size, operator(*tensors, *arguments[count:]))

    return rule


library.register_vmap(_FORWARD, _vmap_rule(torch.ops.fastattn.norm_forward, 4), lib=_operators)
library.register_vmap(_BACKWARD, _vmap_rule(torch.ops.fastattn.norm_backward, 6), lib=_operators)

for _name, _function in ((_FORWARD, Norm), (_BACKWARD, NormBackward)):
    register_autograd(_name, _function, _operators)
