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
from fastattn.backends.layout import empty_heads
from fastattn.capabilities import BACKWARD, FORWARD, Request
from fastattn.spec import AttentionSpec, Gradients, MLPSpec, MLPWeights, ScoreTensors, Wanted, lse_dtype

_operators = library.Library("fastattn", "DEF")
# What an attention operator takes beside its tensors, in the order of ScoreTensors and AttentionSpec.
_SCORES = (
    "Tensor? key_lengths, Tensor? alibi_slopes, Tensor? bias, Tensor? relative_bias, Tensor? sinks, "
    "Tensor? dropout_state, bool causal, float scale, SymInt? left, SymInt? right, float softcap, float dropout, "
    "str precision, str? backend"
)
_GRADIENTS = ", ".join(["Tensor"] * len(Gradients._fields))
_operators.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_SCORES}) -> (Tensor, Tensor)")
_operators.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    f"bool want_bias, bool want_relative_bias, {_SCORES}) -> ({_GRADIENTS})"
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
_MLP_FORWARD, _MLP_BACKWARD = "fastattn::mlp_forward", "fastattn::mlp_backward"


def _forward(q, k, v, *rest) -> tuple[Tensor, Tensor]:
    tensors, spec, backend = _put_together(rest)
    request = Request("attention", spec, (q, k, v), score_tensors=tensors)
    chosen = capabilities.choose(request, FORWARD, backend)
    return backends.load(chosen).attention_forward(q, k, v, spec, tensors)


def _backward(dout, q, k, v, out, lse, dlse, want_bias, want_relative_bias, *rest) -> tuple[Tensor, ...]:
    tensors, spec, backend = _put_together(rest)
    wanted = Wanted(want_bias, want_relative_bias)
    request = Request("attention", spec, (q, k, v), lse_gradient=dlse is not None, score_tensors=tensors)
    chosen = capabilities.choose(request, BACKWARD, backend)
    gradients = backends.load(chosen).attention_backward(dout, q, k, v, out, lse, dlse, spec, tensors, wanted)
    return tuple(q.new_empty(0) if g is None else g for g in gradients)


def _put_together(rest: Sequence) -> tuple[ScoreTensors, AttentionSpec, str | None]:
    """What an operator takes from key_lengths on, as the backends take it."""
    tensors, options = rest[:_COUNT], rest[_COUNT:]
    causal, scale, left, right, softcap, dropout, precision, backend = options
    spec = AttentionSpec(causal, scale, (left, right), softcap, dropout, precision)
    return ScoreTensors(*tensors), spec, backend


_COUNT = len(ScoreTensors._fields)
_BIAS = ScoreTensors._fields.index("bias")
_OPTIONS = 8
_operators.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_operators.impl("attention_backward", _backward, "CompositeExplicitAutograd")


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


class Attention(torch.autograd.Function):
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
        causal,
        scale,
        left,
        right,
        softcap,
        dropout,
        precision,
        backend,
    ):  # spelled out, because dynamo cannot trace a forward of *arguments
        return torch.ops.fastattn.attention_forward(
            q, k, v, key_lengths, alibi_slopes, bias, relative_bias, sinks, dropout_state, causal, scale, left,
            right, softcap, dropout, precision, backend,
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
            *AttentionBackward.apply(
                dout, q, k, v, out, lse, dlse, needed.bias, needed.relative_bias, *tensors, *ctx.options
            )
        )
        beside = ScoreTensors(
            bias=gradients.bias if needed.bias else None,
            relative_bias=gradients.relative_bias if needed.relative_bias else None,
            sinks=gradients.sinks if needed.sinks else None,
        )
        return *gradients[:3], *beside, *(None,) * _OPTIONS


class AttentionBackward(torch.autograd.Function):
    """The gradients of Attention; differentiable once more, through the reference formula."""

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
        causal,
        scale,
        left,
        right,
        softcap,
        dropout,
        precision,
        backend,
    ):
        return torch.ops.fastattn.attention_backward(
            dout, q, k, v, out, lse, dlse, want_bias, want_relative_bias, key_lengths, alibi_slopes, bias,
            relative_bias, sinks, dropout_state, causal, scale, left, right, softcap, dropout, precision, backend,
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
        *main, key_lengths, alibi_slopes, bias, relative_bias, sinks, dropout_state = ctx.saved_tensors
        given = {"dlse": main.pop(), "bias": bias, "relative_bias": relative_bias, "sinks": sinks}
        names = [name for name, t in given.items() if t is not None and t.is_floating_point()]
        there = (True, True, True, *ctx.wanted, sinks is not None)
        which = [i for i, is_there in enumerate(there) if is_there and second[i] is not None]
        if not which:
            return (None,) * (9 + _COUNT + _OPTIONS)

        def gradients(*tensors):
            known = {**given, **dict(zip(names, tensors[6:], strict=True))}
            beside = ScoreTensors(
                key_lengths, alibi_slopes, known["bias"], known["relative_bias"], known["sinks"], dropout_state
            )
            every = reference.attention_backward(*tensors[:6], known["dlse"], ctx.spec, beside, ctx.wanted)
            return [every[i] for i in which]

        pulled = torch.func.vjp(gradients, *main, *(given[name] for name in names))[1]([second[i] for i in which])
        of = dict(zip(names, pulled[6:], strict=True))
        beside = ScoreTensors(bias=of.get("bias"), relative_bias=of.get("relative_bias"), sinks=of.get("sinks"))
        return *pulled[:6], of.get("dlse"), None, None, *beside, *(None,) * _OPTIONS


@library.register_vmap(_FORWARD, lib=_operators)
def _forward_vmap(info: Any, in_dims: tuple, *arguments):
    count = 3 + _COUNT
    if _shared(in_dims, arguments, 0, 3 + _BIAS):
        return _one_by_one(torch.ops.fastattn.attention_forward, info.batch_size, in_dims, arguments)
    tensors = _fold(info.batch_size, in_dims[:count], arguments[:count])
    return _unfold(info.batch_size, torch.ops.fastattn.attention_forward(*tensors, *arguments[count:])), (0, 0)


@library.register_vmap(_BACKWARD, lib=_operators)
def _backward_vmap(info: Any, in_dims: tuple, *arguments):
    count = 9 + _COUNT
    if _shared(in_dims, arguments, 1, 9 + _BIAS):
        return _one_by_one(torch.ops.fastattn.attention_backward, info.batch_size, in_dims, arguments)
    folded = _fold(info.batch_size, (*in_dims[:7], *in_dims[9:count]), (*arguments[:7], *arguments[9:count]))
    gradients = torch.ops.fastattn.attention_backward(
        *folded[:7], *arguments[7:9], *folded[7:], *arguments[count:]
    )
    unfolded = (
        _unfold(info.batch_size, (g,))[0] if g.dim() > 1 else g.expand(info.batch_size, 0) for g in gradients
    )
    return tuple(unfolded), (0,) * len(gradients)


def _shared(in_dims: tuple, arguments: tuple, q: int, bias: int) -> bool:
    """Whether one bias serves a batch of several: then samples cannot become a larger batch."""
    if arguments[bias] is None:
        return False
    of_q, of_bias = (arguments[i].shape[0 if in_dims[i] is None or in_dims[i] > 0 else 1] for i in (q, bias))
    return of_q != of_bias


def _fold(size: int, dims: tuple, tensors: tuple) -> list[Tensor | None]:
    """Merge the mapped dimension of each tensor, or a broadcast one, into its batch dimension."""
    folded = []
    for dim, t in zip(dims, tensors, strict=True):
        if t is not None:
            t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            t = t.flatten(0, 1)
        folded.append(t)
    return folded


def _unfold(size: int, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.unflatten(0, (size, t.shape[0] // size)) for t in results)


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


class MLP(torch.autograd.Function):
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
        dx, dw, db, dw_out, db_out = MLPBackward.apply(dy, *tensors, saved, wanted, *ctx.options)
        rows = tensors[1].shape[0]
        gradients = (dx, dw[:rows], db[:rows], dw[rows:], db[rows:], dw_out, db_out)
        needed = ctx.needs_input_grad[:7]
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None


class MLPBackward(torch.autograd.Function):
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
            dy, x, *weights = (filled.get(i) for i in range(len(tensors)))
            spec = MLPSpec(ctx.activation, gated=weights[2] is not None)
            every = reference.mlp_backward(dy, x, MLPWeights(*weights), spec)
            return [g for g, want in zip(every, ctx.wanted, strict=True) if want]

        pulled = [g for g, want in zip(second, ctx.wanted, strict=True) if want]
        derivatives = torch.func.vjp(gradients, *(tensors[i] for i in present))[1](pulled)
        filled = dict(zip(present, derivatives, strict=True))
        return *(filled.get(i) for i in range(len(tensors))), None, None, None, None


@library.register_vmap(_MLP_FORWARD, lib=_operators)
def _mlp_forward_vmap(info: Any, in_dims: tuple, x, *rest):
    if any(isinstance(dim, int) for dim in in_dims[1:]):
        return _one_by_one(torch.ops.fastattn.mlp_forward, info.batch_size, in_dims, (x, *rest))
    # One set of weights: the mapped dimension is more tokens.
    x = x.movedim(in_dims[0], 0).flatten(0, 1)
    y, saved = torch.ops.fastattn.mlp_forward(x, *rest)
    saved = _unfold(info.batch_size, (saved,))[0] if saved.dim() == 2 else saved.expand(info.batch_size, 0)
    return (*_unfold(info.batch_size, (y,)), saved), (0, 0)


@library.register_vmap(_MLP_BACKWARD, lib=_operators)
def _mlp_backward_vmap(info: Any, in_dims: tuple, *arguments):
    return _one_by_one(torch.ops.fastattn.mlp_backward, info.batch_size, in_dims, arguments)


def _one_by_one(operator: Any, size: int, in_dims: tuple, arguments: tuple):
    """One call for each index of the mapped dimension: samples have weights, or weight gradients, of their own."""
    results = []
    for i in range(size):
        chosen = (
            a.select(dim, i) if isinstance(dim, int) else a for dim, a in zip(in_dims, arguments, strict=True)
        )
        results.append(operator(*chosen))
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])


for _name, _function in (
    (_FORWARD, Attention),
    (_BACKWARD, AttentionBackward),
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
