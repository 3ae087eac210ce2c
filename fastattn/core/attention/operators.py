"""Attention as PyTorch operators, with fake kernels, autograd and vmap. fastattn.flops counts their operations.

`fastattn::attention_forward`, its backward and its tangent choose a backend and run it; tracers see one node each.
`Attention` is the thin autograd.Function that the functional calls, because torch.func.grad cannot see through an
operator's registered autograd; both share the same formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library

from fastattn.core import backends, capabilities
from fastattn.core.attention import derivatives, tiles
from fastattn.core.attention.spec import (
    NO_TENSORS,
    SCORES,
    AttentionSpec,
    Gradients,
    Saved,
    ScoreTensors,
    Tangents,
    Wanted,
    put_together,
)
from fastattn.core.capabilities import BACKWARD, FORWARD, TANGENT, Request
from fastattn.core.function import Function, register_autograd
from fastattn.core.layout import empty_heads
from fastattn.core.mapped import fold, one_by_one, shares_batch, unfold
from fastattn.core.plans import Plan, backend_asked, needs_gradient
from fastattn.ground.checks import lse_dtype

_operators = library.Library("fastattn", "FRAGMENT")
_GRADIENTS = ", ".join(["Tensor"] * len(Gradients._fields))
_operators.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {SCORES}) -> (Tensor, Tensor)")
_operators.define(f"attention_forward_max(Tensor q, Tensor k, Tensor v, {SCORES}) -> (Tensor, Tensor, Tensor)")
_operators.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    f"bool want_bias, bool want_relative_bias, {SCORES}) -> ({_GRADIENTS})"
)
_TANGENTS = ", ".join(f"Tensor? {name}_tangent" for name in Tangents._fields)
_operators.define(
    f"attention_tangent(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TANGENTS}, {SCORES}) "
    "-> (Tensor, Tensor)"
)
_FORWARD, _BACKWARD = "fastattn::attention_forward", "fastattn::attention_backward"
_FORWARD_MAX = "fastattn::attention_forward_max"
_TANGENT = "fastattn::attention_tangent"


def _forward(q, k, v, *rest) -> tuple[Tensor, Tensor]:
    tensors, spec, backend = put_together(rest)
    spec = spec.at(q.shape[2], k.shape[2])
    request = Request("attention", spec, (q, k, v), score_tensors=tensors)
    chosen = capabilities.choose(request, FORWARD, backend)
    return backends.load("attention", chosen).forward(q, k, v, spec, tensors)


def _forward_max(q, k, v, *rest) -> tuple[Tensor, Tensor, Tensor]:
    tensors, spec, backend = put_together(rest)
    spec = spec.at(q.shape[2], k.shape[2])
    request = Request("attention", spec, (q, k, v), score_tensors=tensors)
    if spec.invariant and backend is None and not backend_asked():
        backend = "portable"
    chosen = capabilities.choose(request, FORWARD, backend)
    maxima = q.new_full(q.shape[:3], float("-inf"), dtype=lse_dtype(q.dtype))
    out, lse = backends.load("attention", chosen).forward(q, k, v, spec, tensors, maxima)
    return out, lse, maxima


def _backward(dout, q, k, v, out, lse, dlse, want_bias, want_relative_bias, *rest) -> tuple[Tensor, ...]:
    tensors, spec, backend = put_together(rest)
    spec = spec.at(q.shape[2], k.shape[2])
    wanted = Wanted(want_bias, want_relative_bias)
    request = Request("attention", spec, (q, k, v), lse_gradient=dlse is not None, score_tensors=tensors)
    chosen = capabilities.choose(request, BACKWARD, backend)
    gradients = backends.load("attention", chosen).backward(
        dout, dlse, Saved(q, k, v, out, lse), spec, tensors, wanted
    )
    return tuple(q.new_empty(0) if g is None else g for g in gradients)


def _tangent(q, k, v, out, lse, *rest) -> tuple[Tensor, Tensor]:
    tangents = Tangents(*rest[: len(Tangents._fields)])
    tensors, spec, backend = put_together(rest[len(tangents) :])
    spec = spec.at(q.shape[2], k.shape[2])
    request = Request("attention", spec, (q, k, v), score_tensors=tensors)
    chosen = capabilities.choose(request, TANGENT, backend)
    return backends.load("attention", chosen).tangent(Saved(q, k, v, out, lse), tangents, spec, tensors)


_COUNT = len(ScoreTensors._fields)
_BIAS = ScoreTensors._fields.index("bias")
_OPTIONS = len(AttentionSpec().options) + 1  # and the backend
_operators.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_operators.impl("attention_forward_max", _forward_max, "CompositeExplicitAutograd")
_operators.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_operators.impl("attention_tangent", _tangent, "CompositeExplicitAutograd")


@library.register_fake(_FORWARD, lib=_operators)
def _forward_fake(q, k, v, *_):
    batch, heads, queries, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=lse_dtype(q.dtype))
    return empty_heads((batch, heads, queries, v.shape[3]), q), lse


@library.register_fake(_FORWARD_MAX, lib=_operators)
def _forward_max_fake(q, k, v, *_):
    out, lse = _forward_fake(q, k, v)
    return out, lse, torch.empty_like(lse)


@library.register_fake(_BACKWARD, lib=_operators)
def _backward_fake(dout, q, k, v, out, lse, dlse, want_bias, want_relative_bias, *rest):
    tensors = ScoreTensors(*rest[:_COUNT])
    heads = (empty_heads(t.shape, t) for t in (q, k, v))
    beside = (
        (tensors.bias, want_bias),
        (tensors.relative_bias, want_relative_bias),
        (tensors.sinks, tensors.sinks is not None),
        (tensors.head_scale, tensors.head_scale is not None),
    )
    return *heads, *(q.new_empty(t.shape, dtype=t.dtype) if want else q.new_empty(0) for t, want in beside)


@library.register_fake(_TANGENT, lib=_operators)
def _tangent_fake(q, k, v, out, lse, *_):
    return empty_heads(out.shape, out), torch.empty_like(lse, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    """What the backward of attention needs."""
    q, k, v, *rest = inputs
    ctx.options = rest[_COUNT:]
    ctx.save_for_backward(q, k, v, *output, *rest[:_COUNT])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse) -> tuple:
    """The gradients of attention by its arguments."""
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    needed = ScoreTensors(*ctx.needs_input_grad[3 : 3 + _COUNT])
    gradients = Gradients(
        *attention_backward(
            dout, q, k, v, out, lse, dlse, needed.bias, needed.relative_bias, *tensors, *ctx.options
        )
    )
    return *gradients[:3], *_beside(gradients, needed), *(None,) * _OPTIONS


def _beside(gradients: Gradients, needed: ScoreTensors) -> ScoreTensors:
    """The gradients of ScoreTensors, of those that are needed."""
    return ScoreTensors(
        bias=gradients.bias if needed.bias else None,
        relative_bias=gradients.relative_bias if needed.relative_bias else None,
        sinks=gradients.sinks if needed.sinks else None,
        head_scale=gradients.head_scale if needed.head_scale else None,
    )


class Attention(Function):
    """(q, k, v, *ScoreTensors, *options) -> (out, lse), both differentiable; by q, k, v and tiles.LEARNED."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q, k, v, key_lengths, alibi_slopes, bias, relative_bias, sinks, dropout_state, mask, intervals, head_scale,
        sequences, causal, scale, left, right, softcap, dropout, precision, mask_layout, invariant, backend,
    ):  # fmt: skip
        # Arguments of forwards are spelled out, because torch.compile cannot trace a forward of *arguments.
        return torch.ops.fastattn.attention_forward(
            q, k, v, key_lengths, alibi_slopes, bias, relative_bias, sinks, dropout_state, mask, intervals,
            head_scale, sequences, causal, scale, left, right, softcap, dropout, precision, mask_layout, invariant,
            backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx, dout, dlse):
        return _gradients(ctx, dout, dlse)


class AttentionMax(Attention):
    """Attention, and the largest score of each row, which has no gradient."""

    @staticmethod
    def forward(
        q, k, v, key_lengths, alibi_slopes, bias, relative_bias, sinks, dropout_state, mask, intervals, head_scale,
        sequences, causal, scale, left, right, softcap, dropout, precision, mask_layout, invariant, backend,
    ):  # fmt: skip
        return torch.ops.fastattn.attention_forward_max(
            q, k, v, key_lengths, alibi_slopes, bias, relative_bias, sinks, dropout_state, mask, intervals,
            head_scale, sequences, causal, scale, left, right, softcap, dropout, precision, mask_layout, invariant,
            backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output[:2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx, dout, dlse, _dmaxima):
        return _gradients(ctx, dout, dlse)


class AttentionBackward(Function):
    """The gradients of Attention; differentiable again, tile by tile."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dout, q, k, v, out, lse, dlse, want_bias, want_relative_bias, key_lengths, alibi_slopes, bias,
        relative_bias, sinks, dropout_state, mask, intervals, head_scale, sequences, causal, scale, left, right,
        softcap, dropout, precision, mask_layout, invariant, backend,
    ):  # fmt: skip
        return torch.ops.fastattn.attention_backward(
            dout, q, k, v, out, lse, dlse, want_bias, want_relative_bias, key_lengths, alibi_slopes, bias,
            relative_bias, sinks, dropout_state, mask, intervals, head_scale, sequences, causal, scale, left,
            right, softcap, dropout, precision, mask_layout, invariant, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7], *inputs[9 : 9 + _COUNT])
        ctx.wanted = Wanted(*inputs[7:9])
        _, ctx.spec, _ = put_together(inputs[9:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *second):
        # out and lse are inputs here. Their gradients flow on through Attention.backward.
        needed = ScoreTensors(*ctx.needs_input_grad[9 : 9 + _COUNT])
        flags = (*ctx.needs_input_grad[:7], *_learned(needed))
        function, there, fixed, inputs = _sum_of_gradients(ctx)
        cotangents = [s for s, is_there in zip(second, there, strict=True) if is_there]
        pulled = derivatives.pull(function, fixed, inputs, cotangents, flags)
        main, beside = pulled[:7], _score_tensors(pulled[7:])
        return *main, None, None, *beside, *(None,) * _OPTIONS


def _sum_of_gradients(ctx):
    """AttentionBackward as a sum over tiles: the function, which of the gradients exist, the fixed tensors and the
    inputs."""
    main, tensors = ctx.saved_tensors[:7], ScoreTensors(*ctx.saved_tensors[7:])
    fixed, learned = tiles.learned(tensors)
    sinks, head_scale = tensors.sinks is not None, tensors.head_scale is not None
    there = (True, True, True, *ctx.wanted, sinks, head_scale)
    return tiles.gradients(ctx.spec, ctx.wanted, sinks, head_scale), there, fixed, (*main, *learned)


def _learned(values: ScoreTensors) -> tuple:
    """Of one value for each of ScoreTensors, those of the ones that have a gradient."""
    return tuple(getattr(values, name) for name in tiles.LEARNED)


def _score_tensors(learned: Sequence) -> ScoreTensors:
    """The other way round."""
    return ScoreTensors(**dict(zip(tiles.LEARNED, learned, strict=True)))


class AttentionTangent(Function):
    """(q, k, v, out, lse, *Tangents, *ScoreTensors, *options) -> the tangents of Attention's out and lse;
    differentiable, tile by tile."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return torch.ops.fastattn.attention_tangent(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors = inputs[: 5 + _MOVED + _COUNT]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        _, ctx.spec, _ = put_together(inputs[5 + _MOVED :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *second):
        fixed, inputs = _of_tangent(ctx.saved_tensors)
        needed = ScoreTensors(*ctx.needs_input_grad[5 + _MOVED : 5 + _MOVED + _COUNT])
        flags = (*ctx.needs_input_grad[: 5 + _MOVED], *_learned(needed))
        pulled = derivatives.pull(tiles.tangent(ctx.spec), fixed, inputs, second, flags)
        main, beside = pulled[: 5 + _MOVED], _score_tensors(pulled[5 + _MOVED :])
        return *main, *beside, *(None,) * _OPTIONS

    @staticmethod
    def jvp(ctx, *tangents):
        fixed, inputs = _of_tangent(ctx.saved_tensors)
        moved = ScoreTensors(*tangents[5 + _MOVED : 5 + _MOVED + _COUNT])
        tangents = (*tangents[: 5 + _MOVED], *_learned(moved))
        return derivatives.push(tiles.tangent(ctx.spec), fixed, inputs, tangents)


_MOVED = len(Tangents._fields)


def _of_tangent(saved: Sequence) -> tuple[ScoreTensors, tuple]:
    """The fixed tensors and the inputs of AttentionTangent's sum over tiles, from what it saved."""
    fixed, learned = tiles.learned(ScoreTensors(*saved[5 + _MOVED :]))
    return fixed, (*saved[: 5 + _MOVED], *learned)


class DualAttention(Attention):
    """Attention, with forward mode."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        Attention.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3], *output, *inputs[3 : 3 + _COUNT])

    @staticmethod
    def jvp(ctx, q, k, v, *rest):
        saved, moved = ctx.saved_tensors, ScoreTensors(*rest[:_COUNT])
        tangents = Tangents(q, k, v, *_learned(moved))
        return AttentionTangent.apply(*saved[:5], *tangents, *saved[5:], *ctx.options)


class DualAttentionMax(AttentionMax):
    """AttentionMax, with forward mode for out and lse."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        DualAttention.setup_context(ctx, inputs, output[:2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def jvp(ctx, *tangents):
        return *DualAttention.jvp(ctx, *tangents), None


class DualAttentionBackward(AttentionBackward):
    """AttentionBackward, with forward mode."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        AttentionBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:7], *inputs[9 : 9 + _COUNT])

    @staticmethod
    def jvp(ctx, *tangents):
        function, there, fixed, inputs = _sum_of_gradients(ctx)
        moved = ScoreTensors(*tangents[9 : 9 + _COUNT])
        tangents = (*tangents[:7], *_learned(moved))
        pushed = iter(derivatives.push(function, fixed, inputs, tangents))
        return tuple(next(pushed) if is_there else inputs[0].new_empty(0) for is_there in there)


def attention(*arguments) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable; takes Attention's arguments."""
    if not torch.compiler.is_compiling():
        return DualAttention.apply(*arguments)
    return Attention.apply(*_each_once(*arguments))


def attention_max(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, maxima), the first two differentiable; takes Attention's arguments."""
    if not torch.compiler.is_compiling():
        return DualAttentionMax.apply(*arguments)
    return AttentionMax.apply(*_each_once(*arguments))


def _each_once(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple:
    """torch.compile refuses a Function that gets the same tensor twice, as in attention(x, x, x)."""
    return q, k.view_as(k) if k is q else k, v.view_as(v) if v is q or v is k else v, *rest


def attention_backward(*arguments) -> tuple[Tensor, ...]:
    """The gradients, differentiable; takes AttentionBackward's arguments. A gradient that does not exist is
    empty."""
    return (AttentionBackward if torch.compiler.is_compiling() else DualAttentionBackward).apply(*arguments)


@dataclass(frozen=True)
class AttentionPlan(Plan):
    """Takes q, k, v and, unless there are none, the ScoreTensors. The spec is that at the call's lengths.

    straight: the backend's shorter way, if it has one for this call.
    """

    family = "attention"
    straight: Any = None

    @classmethod
    def of(
        cls, inputs: tuple[Tensor, Tensor, Tensor], tensors: ScoreTensors, spec: AttentionSpec, backend: str | None
    ) -> AttentionPlan:
        q, k, v = inputs
        spec = spec.at(q.shape[2], k.shape[2])
        module = capabilities.module(Request("attention", spec, inputs, score_tensors=tensors), FORWARD, backend)
        shorter = getattr(module, "straight", None) if all(t is None for t in tensors) else None
        differentiable = needs_gradient(*inputs, *tensors)
        straight = None if shorter is None else shorter(q, k, v, spec, differentiable)
        return cls(spec, backend, differentiable, module, straight=straight)

    def forward(self, q, k, v, *tensors):
        if self.straight is not None:
            out, lse = self.straight.forward(q, k, v)
            lse = lse.contiguous() if self.differentiable else lse
        else:
            out, lse = self.module.forward(q, k, v, self.spec, ScoreTensors(*tensors) if tensors else NO_TENSORS)
        return (out, lse), (q, k, v, out, lse, *tensors)

    def gradients(self, saved, cotangents, needed, direct):
        dout, dlse = cotangents
        dout = torch.zeros_like(saved[3]) if dout is None else dout
        # Where the backend is the forward's, its shorter way goes back, too.
        if direct and dlse is None and self.straight is not None and self.asked == backend_asked():
            return self.straight.backward(dout, *saved)
        tensors, needed = (ScoreTensors(*beside) if beside else NO_TENSORS for beside in (saved[5:], needed[3:]))
        wanted = Wanted(bool(needed.bias), bool(needed.relative_bias))
        if direct:
            beside = {"lse_gradient": dlse is not None, "score_tensors": tensors}
            module = capabilities.backward_module(self, tuple(saved[:3]), **beside)
            gradients = module.backward(dout, dlse, Saved(*saved[:5]), self.spec, tensors, wanted)
        else:
            options = *tensors, *self.spec.options, self.backend
            gradients = Gradients(*attention_backward(dout, *saved[:5], dlse, *wanted, *options))
        return *gradients[:3], *(_beside(gradients, needed) if len(saved) > 5 else ())


@library.register_vmap(_FORWARD, lib=_operators)
def _forward_vmap(info: Any, in_dims: tuple, *arguments):
    return _mapped_forward(torch.ops.fastattn.attention_forward, info, in_dims, arguments)


@library.register_vmap(_FORWARD_MAX, lib=_operators)
def _forward_max_vmap(info: Any, in_dims: tuple, *arguments):
    return _mapped_forward(torch.ops.fastattn.attention_forward_max, info, in_dims, arguments)


def _mapped_forward(operator: Any, info: Any, in_dims: tuple, arguments: tuple):
    count = 3 + _COUNT
    if not info.batch_size or shares_batch(in_dims, arguments, 0, (3 + _BIAS,)):
        return one_by_one(operator, info.batch_size, in_dims, arguments)
    results = unfold(
        info.batch_size, operator(*fold(info.batch_size, in_dims[:count], arguments[:count]), *arguments[count:])
    )
    return results, (0,) * len(results)


@library.register_vmap(_BACKWARD, lib=_operators)
def _backward_vmap(info: Any, in_dims: tuple, *arguments):
    operator, count = torch.ops.fastattn.attention_backward, 9 + _COUNT
    if not info.batch_size or shares_batch(in_dims, arguments, 1, (9 + _BIAS,)):
        return one_by_one(operator, info.batch_size, in_dims, arguments)
    folded = fold(info.batch_size, (*in_dims[:7], *in_dims[9:count]), (*arguments[:7], *arguments[9:count]))
    gradients = operator(*folded[:7], *arguments[7:9], *folded[7:], *arguments[count:])
    unfolded = (
        unfold(info.batch_size, (g,))[0] if g.dim() > 1 else g.expand(info.batch_size, 0) for g in gradients
    )
    return tuple(unfolded), (0,) * len(gradients)


@library.register_vmap(_TANGENT, lib=_operators)
def _tangent_vmap(info: Any, in_dims: tuple, *arguments):
    operator, count = torch.ops.fastattn.attention_tangent, 5 + _MOVED + _COUNT
    biases = 5 + Tangents._fields.index("bias"), 5 + _MOVED + _BIAS
    if not info.batch_size or shares_batch(in_dims, arguments, 0, biases):
        return one_by_one(operator, info.batch_size, in_dims, arguments)
    tensors = fold(info.batch_size, in_dims[:count], arguments[:count])
    return unfold(info.batch_size, operator(*tensors, *arguments[count:])), (0, 0)


for _name, _function in (
    (_FORWARD, Attention),
    (_FORWARD_MAX, AttentionMax),
    (_BACKWARD, AttentionBackward),
    (_TANGENT, AttentionTangent),
):
    register_autograd(_name, _function, _operators)
