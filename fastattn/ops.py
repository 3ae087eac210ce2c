"""The operators torch knows: opaque, with fake kernels, autograd and vmap (flop counts: fastattn.flops).

`fastattn::attention_forward`, `fastattn::mlp_forward` and their backwards choose a backend and run it; tracers see
one node each. `Attention` and `MLP` are the thin autograd.Functions the front door calls, because torch.func.grad
cannot see through an operator's registered autograd; both share the same formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from fastattn import backends, capabilities, reference
from fastattn.autograd import Function
from fastattn.backends import derivatives, tiles
from fastattn.backends.layout import empty_heads
from fastattn.backends.mapped import fold, one_by_one, shares_batch, unfold
from fastattn.capabilities import BACKWARD, FORWARD, TANGENT, Request
from fastattn.spec import AttentionSpec, Gradients, MLPSpec, MLPWeights, ScoreTensors, Tangents, Wanted, lse_dtype

_operators = library.Library("fastattn", "DEF")
# What an attention operator takes beside its tensors, in the order of ScoreTensors and AttentionSpec.
_SCORES = (
    "Tensor? key_lengths, Tensor? alibi_slopes, Tensor? bias, Tensor? relative_bias, Tensor? sinks, "
    "Tensor? dropout_state, Tensor? mask, Tensor? intervals, bool causal, float scale, SymInt? left, "
    "SymInt? right, float softcap, float dropout, str precision, int[]? mask_layout, str? backend"
)
_GRADIENTS = ", ".join(["Tensor"] * len(Gradients._fields))
_operators.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_SCORES}) -> (Tensor, Tensor)")
_operators.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    f"bool want_bias, bool want_relative_bias, {_SCORES}) -> ({_GRADIENTS})"
)
_TANGENTS = ", ".join(f"Tensor? {name}_tangent" for name in Tangents._fields)
_operators.define(
    f"attention_tangent(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TANGENTS}, {_SCORES}) "
    "-> (Tensor, Tensor)"
)
_operators.define(
    "mlp_forward(Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_up, Tensor? b_up, Tensor w_out, Tensor? b_out, "
    "str activation, bool save, str? backend) -> (Tensor, Tensor)"
)
_operators.define(
    "mlp_backward(Tensor dy, Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_up, Tensor? b_up, Tensor w_out, "
    "Tensor saved, bool[] wanted, str activation, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_FORWARD, _BACKWARD = "fastattn::attention_forward", "fastattn::attention_backward"
_TANGENT = "fastattn::attention_tangent"
_MLP_FORWARD, _MLP_BACKWARD = "fastattn::mlp_forward", "fastattn::mlp_backward"


def _forward(q, k, v, *rest) -> tuple[Tensor, Tensor]:
    tensors, spec, backend = _put_together(rest)
    spec = spec.at(q.shape[2], k.shape[2])
    request = Request("attention", spec, (q, k, v), score_tensors=tensors)
    chosen = capabilities.choose(request, FORWARD, backend)
    return backends.load(chosen).attention_forward(q, k, v, spec, tensors)


def _backward(dout, q, k, v, out, lse, dlse, want_bias, want_relative_bias, *rest) -> tuple[Tensor, ...]:
    tensors, spec, backend = _put_together(rest)
    spec = spec.at(q.shape[2], k.shape[2])
    wanted = Wanted(want_bias, want_relative_bias)
    request = Request("attention", spec, (q, k, v), lse_gradient=dlse is not None, score_tensors=tensors)
    chosen = capabilities.choose(request, BACKWARD, backend)
    gradients = backends.load(chosen).attention_backward(dout, q, k, v, out, lse, dlse, spec, tensors, wanted)
    return tuple(q.new_empty(0) if g is None else g for g in gradients)


def _tangent(q, k, v, out, lse, *rest) -> tuple[Tensor, Tensor]:
    tangents = Tangents(*rest[: len(Tangents._fields)])
    tensors, spec, backend = _put_together(rest[len(tangents) :])
    spec = spec.at(q.shape[2], k.shape[2])
    request = Request("attention", spec, (q, k, v), score_tensors=tensors)
    chosen = capabilities.choose(request, TANGENT, backend)
    return backends.load(chosen).attention_tangent(q, k, v, out, lse, tangents, spec, tensors)


def _put_together(rest: Sequence) -> tuple[ScoreTensors, AttentionSpec, str | None]:
    """What an operator takes from key_lengths on, as the backends take it."""
    tensors, options = rest[:_COUNT], rest[_COUNT:]
    causal, scale, left, right, softcap, dropout, precision, layout, backend = options
    layout = None if layout is None else tuple(layout)
    spec = AttentionSpec(causal, scale, (left, right), softcap, dropout, precision, layout)
    return ScoreTensors(*tensors), spec, backend


_COUNT = len(ScoreTensors._fields)
_BIAS = ScoreTensors._fields.index("bias")
_OPTIONS = len(AttentionSpec().options) + 1  # and the backend
_operators.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_operators.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_operators.impl("attention_tangent", _tangent, "CompositeExplicitAutograd")


@library.register_fake(_FORWARD, lib=_operators)
def _forward_fake(q, k, v, *_):
    batch, heads, queries, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=lse_dtype(q.dtype))
    return empty_heads((batch, heads, queries, v.shape[3]), q), lse


@library.register_fake(_BACKWARD, lib=_operators)
def _backward_fake(dout, q, k, v, out, lse, dlse, want_bias, want_relative_bias, *rest):
    tensors = ScoreTensors(*rest[:_COUNT])
    heads = (empty_heads(t.shape, t) for t in (q, k, v))
    beside = (
        (tensors.bias, want_bias),
        (tensors.relative_bias, want_relative_bias),
        (tensors.sinks, tensors.sinks is not None),
    )
    return *heads, *(q.new_empty(t.shape, dtype=t.dtype) if want else q.new_empty(0) for t, want in beside)


@library.register_fake(_TANGENT, lib=_operators)
def _tangent_fake(q, k, v, out, lse, *_):
    return empty_heads(out.shape, out), torch.empty_like(lse, memory_format=torch.contiguous_format)


class Attention(Function):
    """(q, k, v, *ScoreTensors, *options) -> (out, lse), both differentiable; by q, k, v, biases and sinks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q,
        k,
        v,
        key_lengths,
        alibi_slopes,
        bias,
        relative_bias,
        sinks,
        dropout_state,
        mask,
        intervals,
        causal,
        scale,
        left,
        right,
        softcap,
        dropout,
        precision,
        mask_layout,
        backend,
    ):  # spelled out, because dynamo cannot trace a forward of *arguments
        return torch.ops.fastattn.attention_forward(
            q, k, v, key_lengths, alibi_slopes, bias, relative_bias, sinks, dropout_state, mask, intervals, causal,
            scale, left, right, softcap, dropout, precision, mask_layout, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, *rest = inputs
        ctx.options = rest[_COUNT:]
        ctx.save_for_backward(q, k, v, *output, *rest[:_COUNT])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        needed = ScoreTensors(*ctx.needs_input_grad[3 : 3 + _COUNT])
        gradients = Gradients(
            *attention_backward(
                dout, q, k, v, out, lse, dlse, needed.bias, needed.relative_bias, *tensors, *ctx.options
            )
        )
        beside = ScoreTensors(
            bias=gradients.bias if needed.bias else None,
            relative_bias=gradients.relative_bias if needed.relative_bias else None,
            sinks=gradients.sinks if needed.sinks else None,
        )
        return *gradients[:3], *beside, *(None,) * _OPTIONS


class AttentionBackward(Function):
    """The gradients of Attention; differentiable again, tile by tile."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dlse,
        want_bias,
        want_relative_bias,
        key_lengths,
        alibi_slopes,
        bias,
        relative_bias,
        sinks,
        dropout_state,
        mask,
        intervals,
        causal,
        scale,
        left,
        right,
        softcap,
        dropout,
        precision,
        mask_layout,
        backend,
    ):
        return torch.ops.fastattn.attention_backward(
            dout, q, k, v, out, lse, dlse, want_bias, want_relative_bias, key_lengths, alibi_slopes, bias,
            relative_bias, sinks, dropout_state, mask, intervals, causal, scale, left, right, softcap, dropout,
            precision, mask_layout, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7], *inputs[9 : 9 + _COUNT])
        ctx.wanted = Wanted(*inputs[7:9])
        _, ctx.spec, _ = _put_together(inputs[9:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *second):
        # out and lse count as inputs of their own: what flows into them goes on through Attention.backward.
        needed = ScoreTensors(*ctx.needs_input_grad[9 : 9 + _COUNT])
        flags = (*ctx.needs_input_grad[:7], needed.bias, needed.relative_bias, needed.sinks)
        function, there, fixed, inputs = _sum_of_gradients(ctx)
        cotangents = [s for s, is_there in zip(second, there, strict=True) if is_there]
        *main, bias, relative_bias, sinks = derivatives.pull(function, fixed, inputs, cotangents, flags)
        beside = ScoreTensors(bias=bias, relative_bias=relative_bias, sinks=sinks)
        return *main, None, None, *beside, *(None,) * _OPTIONS


def _sum_of_gradients(ctx):
    """What AttentionBackward computes, as a sum over tiles: the sum, which of its gradients are there, and what it
    takes."""
    main, tensors = ctx.saved_tensors[:7], ScoreTensors(*ctx.saved_tensors[7:])
    fixed, learned = tiles.learned(tensors)
    there = (True, True, True, *ctx.wanted, tensors.sinks is not None)
    return tiles.gradients(ctx.spec, ctx.wanted, there[-1]), there, fixed, (*main, *learned)


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
        _, ctx.spec, _ = _put_together(inputs[5 + _MOVED :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *second):
        fixed, inputs = _of_tangent(ctx.saved_tensors)
        needed = ScoreTensors(*ctx.needs_input_grad[5 + _MOVED : 5 + _MOVED + _COUNT])
        flags = (*ctx.needs_input_grad[: 5 + _MOVED], needed.bias, needed.relative_bias, needed.sinks)
        pulled = derivatives.pull(tiles.tangent(ctx.spec), fixed, inputs, second, flags)
        *main, bias, relative_bias, sinks = pulled
        beside = ScoreTensors(bias=bias, relative_bias=relative_bias, sinks=sinks)
        return *main, *beside, *(None,) * _OPTIONS

    @staticmethod
    def jvp(ctx, *tangents):
        fixed, inputs = _of_tangent(ctx.saved_tensors)
        moved = ScoreTensors(*tangents[5 + _MOVED : 5 + _MOVED + _COUNT])
        tangents = (*tangents[: 5 + _MOVED], moved.bias, moved.relative_bias, moved.sinks)
        return derivatives.push(tiles.tangent(ctx.spec), fixed, inputs, tangents)


_MOVED = len(Tangents._fields)


def _of_tangent(saved: Sequence) -> tuple[ScoreTensors, tuple]:
    """What AttentionTangent saved, as its sum over tiles takes it."""
    fixed, learned = tiles.learned(ScoreTensors(*saved[5 + _MOVED :]))
    return fixed, (*saved[: 5 + _MOVED], *learned)


# Dynamo refuses a Function with a jvp, so that there are two of each: one for it, one for everything else.


class DualAttention(Attention):
    """Attention, with forward mode."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        Attention.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3], *output, *inputs[3 : 3 + _COUNT])

    @staticmethod
    def jvp(ctx, q, k, v, *rest):
        saved, moved = ctx.saved_tensors, ScoreTensors(*rest[:_COUNT])
        tangents = Tangents(q, k, v, moved.bias, moved.relative_bias, moved.sinks)
        return AttentionTangent.apply(*saved[:5], *tangents, *saved[5:], *ctx.options)


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
        tangents = (*tangents[:7], moved.bias, moved.relative_bias, moved.sinks)
        pushed = iter(derivatives.push(function, fixed, inputs, tangents))
        return tuple(next(pushed) if is_there else inputs[0].new_empty(0) for is_there in there)


def attention(*arguments) -> tuple[Tensor, Tensor]:
    """Attention's arguments to (out, lse), differentiable."""
    if not torch.compiler.is_compiling():
        return DualAttention.apply(*arguments)
    q, k, v, *rest = arguments
    # Dynamo refuses a tensor that is given to a Function twice, as in attention(x, x, x).
    k = k.view_as(k) if k is q else k
    v = v.view_as(v) if v is q or v is arguments[1] else v
    return Attention.apply(q, k, v, *rest)


def attention_backward(*arguments) -> tuple[Tensor, ...]:
    """AttentionBackward's arguments to `Gradients`, differentiable; empty ones stand for what is not there."""
    return (AttentionBackward if torch.compiler.is_compiling() else DualAttentionBackward).apply(*arguments)


@library.register_vmap(_FORWARD, lib=_operators)
def _forward_vmap(info: Any, in_dims: tuple, *arguments):
    operator, count = torch.ops.fastattn.attention_forward, 3 + _COUNT
    if shares_batch(in_dims, arguments, 0, (3 + _BIAS,)):
        return one_by_one(operator, info.batch_size, in_dims, arguments)
    tensors = fold(info.batch_size, in_dims[:count], arguments[:count])
    return unfold(info.batch_size, operator(*tensors, *arguments[count:])), (0, 0)


@library.register_vmap(_BACKWARD, lib=_operators)
def _backward_vmap(info: Any, in_dims: tuple, *arguments):
    operator, count = torch.ops.fastattn.attention_backward, 9 + _COUNT
    if shares_batch(in_dims, arguments, 1, (9 + _BIAS,)):
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
    if shares_batch(in_dims, arguments, 0, biases):
        return one_by_one(operator, info.batch_size, in_dims, arguments)
    tensors = fold(info.batch_size, in_dims[:count], arguments[:count])
    return unfold(info.batch_size, operator(*tensors, *arguments[count:])), (0, 0)


def _mlp_forward(x, w_in, b_in, w_up, b_up, w_out, b_out, activation, save, backend) -> tuple[Tensor, Tensor]:
    spec = MLPSpec(activation, gated=w_up is not None)
    chosen = capabilities.choose(Request("mlp", spec, (x,)), FORWARD, backend)
    weights = MLPWeights(w_in, b_in, w_up, b_up, w_out, b_out)
    return backends.load(chosen).mlp_forward(x, weights, spec, save)


def _mlp_backward(dy, x, w_in, b_in, w_up, b_up, w_out, saved, wanted, activation, backend) -> tuple[Tensor, ...]:
    spec = MLPSpec(activation, gated=w_up is not None)
    chosen = capabilities.choose(Request("mlp", spec, (x,)), BACKWARD, backend)
    weights = MLPWeights(w_in, b_in, w_up, b_up, w_out)
    gradients = backends.load(chosen).mlp_backward(dy, x, weights, saved, wanted, spec)
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


_operators.impl("mlp_forward", _mlp_forward, "CompositeExplicitAutograd")
_operators.impl("mlp_backward", _mlp_backward, "CompositeExplicitAutograd")


@library.register_fake(_MLP_FORWARD, lib=_operators)
def _mlp_forward_fake(x, w_in, b_in, w_up, b_up, w_out, b_out, activation, save, backend):
    width = w_in.shape[0] * (1 if w_up is None else 2)
    saved = x.new_empty((x.shape[0], width)) if save else x.new_empty(0)
    return x.new_empty((x.shape[0], w_out.shape[0])), saved


@library.register_fake(_MLP_BACKWARD, lib=_operators)
def _mlp_backward_fake(dy, x, w_in, b_in, w_up, b_up, w_out, saved, wanted, activation, backend):
    rows = w_in.shape[0] * (1 if w_up is None else 2)
    shapes = (x.shape, (rows, w_in.shape[1]), (rows,), w_out.shape, (w_out.shape[0],))
    return tuple(x.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


class MLP(Function):
    """(x, w_in, b_in, w_up, b_up, w_out, b_out, activation, save, backend) -> y, what was saved."""

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
        x, w_in, b_in, w_up, b_up, w_out, b_out = ctx.needs_input_grad[:7]
        wanted = (x, w_in or w_up, b_in or b_up, w_out, b_out)
        dx, dw, db, dw_out, db_out = mlp_backward(dy, *tensors, saved, wanted, *ctx.options)
        rows = tensors[1].shape[0]
        gradients = (dx, dw[:rows], db[:rows], dw[rows:], db[rows:], dw_out, db_out)
        needed = ctx.needs_input_grad[:7]
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None


class MLPBackward(Function):
    """The gradients of MLP; differentiable once more, through the reference formula.

    `saved` is a means to compute them: their dependence on the inputs goes through x and the weights.
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
        tensors = ctx.saved_tensors
        present = [i for i, t in enumerate(tensors) if t is not None]

        def gradients(*given):
            filled = dict(zip(present, given, strict=True))
            return _mlp_gradients(ctx, [filled.get(i) for i in range(len(tensors))])

        pulled = [g for g, want in zip(second, ctx.wanted, strict=True) if want]
        derivatives = torch.func.vjp(gradients, *(tensors[i] for i in present))[1](pulled)
        filled = dict(zip(present, derivatives, strict=True))
        return *(filled.get(i) for i in range(len(tensors))), None, None, None, None


def _mlp_gradients(ctx, tensors: Sequence) -> list[Tensor]:
    """The gradients wanted, by the reference formula."""
    dy, x, *weights = tensors
    spec = MLPSpec(ctx.activation, gated=weights[2] is not None)
    every = reference.mlp_backward(dy, x, MLPWeights(*weights), spec)
    return [g for g, want in zip(every, ctx.wanted, strict=True) if want]


class DualMLP(MLP):
    """MLP, with forward mode, through the reference formula."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        MLP.setup_context(ctx, inputs, output)
        # What MLP saves for the backward: torch.func.vmap keeps one list of mapped dimensions for both.
        ctx.save_for_forward(*inputs[:6], output[1])

    @staticmethod
    def jvp(ctx, *tangents):
        *tensors, _saved = ctx.saved_tensors
        x, *_, w_out = tensors

        def y(x, *weights):
            return [reference.mlp(x, MLPWeights(*weights), MLPSpec(ctx.options[0], weights[2] is not None))]

        moved = x.new_zeros((x.shape[0], w_out.shape[0]))
        if any(t is not None for t in tangents[:6]):
            (moved,) = derivatives.push_through(y, tensors, tangents[:6])
        return moved if tangents[6] is None else moved + tangents[6], None


class DualMLPBackward(MLPBackward):
    """MLPBackward, with forward mode."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        MLPBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:7])

    @staticmethod
    def jvp(ctx, *tangents):
        def gradients(*given):
            return _mlp_gradients(ctx, given)

        inputs = ctx.saved_tensors
        moved = iter(derivatives.push_through(gradients, inputs, tangents[:7]))
        return tuple(next(moved) if want else inputs[0].new_empty(0) for want in ctx.wanted)


def mlp(*arguments) -> tuple[Tensor, Tensor]:
    """MLP's arguments to y and what was saved, differentiable."""
    return (MLP if torch.compiler.is_compiling() else DualMLP).apply(*arguments)


def mlp_backward(*arguments) -> tuple[Tensor, ...]:
    """MLPBackward's arguments to the gradients, differentiable."""
    return (MLPBackward if torch.compiler.is_compiling() else DualMLPBackward).apply(*arguments)


@library.register_vmap(_MLP_FORWARD, lib=_operators)
def _mlp_forward_vmap(info: Any, in_dims: tuple, x, *rest):
    if any(isinstance(dim, int) for dim in in_dims[1:]):
        return one_by_one(torch.ops.fastattn.mlp_forward, info.batch_size, in_dims, (x, *rest))
    # One set of weights: the mapped dimension is more tokens.
    x = x.movedim(in_dims[0], 0).flatten(0, 1)
    y, saved = torch.ops.fastattn.mlp_forward(x, *rest)
    saved = unfold(info.batch_size, (saved,))[0] if saved.dim() == 2 else saved.expand(info.batch_size, 0)
    return (*unfold(info.batch_size, (y,)), saved), (0, 0)


@library.register_vmap(_MLP_BACKWARD, lib=_operators)
def _mlp_backward_vmap(info: Any, in_dims: tuple, *arguments):
    return one_by_one(torch.ops.fastattn.mlp_backward, info.batch_size, in_dims, arguments)


for _name, _function in (
    (_FORWARD, Attention),
    (_BACKWARD, AttentionBackward),
    (_TANGENT, AttentionTangent),
    (_MLP_FORWARD, MLP),
    (_MLP_BACKWARD, MLPBackward),
):
    library.register_autograd(
        _name,
        _function.backward,
        setup_context=lambda ctx, inputs, output, _function=_function: _function.setup_context(
            ctx, inputs, output
        ),
        lib=_operators,
    )
