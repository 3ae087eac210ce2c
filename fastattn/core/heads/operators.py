"""The preparation of heads as PyTorch operators, built like those of attention.

`fastattn::prepare_heads` and its backward choose a backend and run it; tracers see one node each. `PrepareHeads`
is the thin autograd.Function that the functional calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from fastattn.core import backends, capabilities, derivatives
from fastattn.core.capabilities import BACKWARD, FORWARD, Request
from fastattn.core.function import Function, register_autograd, saves_for_forward
from fastattn.core.heads import definition
from fastattn.core.heads.spec import HeadsSpec, HeadTensors
from fastattn.core.layout import empty_heads
from fastattn.core.mapped import fold, of_none, unfold
from fastattn.core.plans import Plan, needs_gradient

_operators = library.Library("fastattn", "FRAGMENT")
_BESIDE = (
    "Tensor x, Tensor? norm_weight, Tensor? cos, Tensor? sin, Tensor? offsets, Tensor? head_scale, "
    "bool norm, float eps, bool interleaved, str? backend"
)
_operators.define(f"prepare_heads({_BESIDE}) -> Tensor")
_operators.define(f"prepare_heads_backward(Tensor dy, {_BESIDE}) -> (Tensor, Tensor, Tensor)")
_FORWARD, _BACKWARD = "fastattn::prepare_heads", "fastattn::prepare_heads_backward"


def _spec(tensors: HeadTensors, norm: bool, eps: float, interleaved: bool) -> HeadsSpec:
    """The spec of an operator's tensors and options."""
    turned = 0 if tensors.cos is None else 2 * tensors.cos.shape[2]
    return HeadsSpec(norm, eps, turned, interleaved, tensors.head_scale is not None)


def _forward(x, norm_weight, cos, sin, offsets, head_scale, norm, eps, interleaved, backend) -> Tensor:
    tensors = HeadTensors(norm_weight, cos, sin, offsets, head_scale)
    spec = _spec(tensors, norm, eps, interleaved)
    chosen = capabilities.choose(Request("heads", spec, (x,)), FORWARD, backend)
    return backends.load("heads", chosen).forward(x, spec, tensors)


def _backward(
    dy, x, norm_weight, cos, sin, offsets, head_scale, norm, eps, interleaved, backend
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = HeadTensors(norm_weight, cos, sin, offsets, head_scale)
    spec = _spec(tensors, norm, eps, interleaved)
    chosen = capabilities.choose(Request("heads", spec, (x,)), BACKWARD, backend)
    dx, dweight, dscale = backends.load("heads", chosen).backward(dy, x, spec, tensors)
    nothing = x.new_empty(0)
    return dx, nothing if dweight is None else dweight, nothing.clone() if dscale is None else dscale


_operators.impl("prepare_heads", _forward, "CompositeExplicitAutograd")
_operators.impl("prepare_heads_backward", _backward, "CompositeExplicitAutograd")


@library.register_fake(_FORWARD, lib=_operators)
def _forward_fake(x, *_):
    return empty_heads(x.shape, x)


@library.register_fake(_BACKWARD, lib=_operators)
def _backward_fake(dy, x, norm_weight, cos, sin, offsets, head_scale, *_):
    beside = (
        x.new_empty(0) if t is None else x.new_empty(t.shape, dtype=t.dtype) for t in (norm_weight, head_scale)
    )
    return empty_heads(x.shape, x), *beside


class PrepareHeads(Function):
    """(x, *HeadTensors, *options) -> y, differentiable by x, norm_weight and head_scale."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, norm_weight, cos, sin, offsets, head_scale, norm, eps, interleaved, backend):
        return torch.ops.fastattn.prepare_heads(
            x, norm_weight, cos, sin, offsets, head_scale, norm, eps, interleaved, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:]

    @staticmethod
    def backward(ctx, dy):
        x, *tensors = ctx.saved_tensors
        dx, dweight, dscale = PrepareHeadsBackward.apply(dy, x, *tensors, *ctx.options)
        norm_weight, _, _, _, head_scale = tensors
        return (
            dx,
            None if norm_weight is None else dweight,
            None,
            None,
            None,
            None if head_scale is None else dscale,
            *(None,) * len(ctx.options),
        )


@saves_for_forward(6)
class PrepareHeadsEagerly(PrepareHeads):
    """PrepareHeads with forward mode, which torch.compile cannot trace. The tangent is computed in plain
    PyTorch."""

    @staticmethod
    def jvp(ctx, dx, dweight, _cos, _sin, _offsets, dscale, *_options):
        x, *rest = ctx.saved_tensors
        tensors = HeadTensors(*rest)
        spec = _spec(tensors, *ctx.options[:3])
        return definition.prepare_heads_tangent(x, dx, dweight, dscale, spec, tensors)


class HeadsPlan(Plan):
    """Takes x and the HeadTensors."""

    family = "heads"

    @classmethod
    def of(cls, x: Tensor, tensors: HeadTensors, spec: HeadsSpec, backend: str | None) -> HeadsPlan:
        module = capabilities.module(Request("heads", spec, (x,)), FORWARD, backend)
        return cls(spec, backend, needs_gradient(x, *tensors), module)

    def forward(self, x, *tensors):
        return (self.module.forward(x, self.spec, HeadTensors(*tensors)),), (x, *tensors)

    def gradients(self, saved, cotangents, needed, direct):
        (dy,), (x, *tensors) = cotangents, saved
        if dy is None:
            return (None,) * 6
        if direct:
            module = capabilities.backward_module(self, (x,))
            dx, dweight, dscale = module.backward(dy, x, self.spec, HeadTensors(*tensors))
        else:
            options = *self.spec.options, self.backend
            dx, dweight, dscale = PrepareHeadsBackward.apply(dy, x, *tensors, *options)
        return dx, dweight if needed[1] else None, None, None, None, dscale if needed[5] else None


class PrepareHeadsBackward(Function):
    """The gradients of PrepareHeads; differentiable once more, through the reference formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, x, norm_weight, cos, sin, offsets, head_scale, norm, eps, interleaved, backend):
        return torch.ops.fastattn.prepare_heads_backward(
            dy, x, norm_weight, cos, sin, offsets, head_scale, norm, eps, interleaved, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        ctx.options = inputs[7:]

    @staticmethod
    def backward(ctx, *second):
        def gradients(dy, x, *rest):
            tensors = HeadTensors(*rest)
            found = definition.prepare_heads_backward(dy, x, _spec(tensors, *ctx.options[:3]), tensors)
            return [g for g in found if g is not None]

        inputs, learned = ctx.saved_tensors, (2, 6)  # norm_weight and head_scale
        there = [i for i in learned if inputs[i] is not None]
        cotangents = [second[0], *(g for i, g in zip(learned, second[1:], strict=True) if i in there)]
        found = derivatives.pull_through(gradients, inputs, cotangents, (0, 1, *there))
        return *found, *(None,) * len(ctx.options)


@library.register_vmap(_FORWARD, lib=_operators)
def _forward_vmap(info: Any, in_dims: tuple, *arguments):
    if not info.batch_size:
        (nothing,), _ = of_none(lambda *one: (torch.ops.fastattn.prepare_heads(*one),), in_dims, arguments)
        return nothing, 0
    tensors = fold(info.batch_size, in_dims[:6], arguments[:6])
    y = torch.ops.fastattn.prepare_heads(*tensors, *arguments[6:])
    return unfold(info.batch_size, (y,))[0], 0


@library.register_vmap(_BACKWARD, lib=_operators)
def _backward_vmap(info: Any, in_dims: tuple, *arguments):
    if not info.batch_size:
        return of_none(torch.ops.fastattn.prepare_heads_backward, in_dims, arguments)
    tensors = fold(info.batch_size, in_dims[:7], arguments[:7])
    gradients = torch.ops.fastattn.prepare_heads_backward(*tensors, *arguments[7:])
    # A gradient that does not exist is an empty tensor without a batch.
    return tuple(
        unfold(info.batch_size, (g,))[0] if g.dim() > 1 else g.expand(info.batch_size, 0) for g in gradients
    ), (0, 0, 0)


for _name, _function in ((_FORWARD, PrepareHeads), (_BACKWARD, PrepareHeadsBackward)):
    register_autograd(_name, _function, _operators)
