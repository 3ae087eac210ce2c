"""The operators torch knows: opaque, with fake kernels, autograd and vmap (flop counts: fastattn.flops).

`fastattn::attention_forward`, `fastattn::mlp_forward` and their backwards choose a backend and run it; tracers see
one node each. `Attention` and `MLP` are the thin autograd.Functions the front door calls, because torch.func.grad
cannot see through an operator's registered autograd; both share the same formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from fastattn import backends, capabilities, reference
from fastattn.backends.layout import empty_heads
from fastattn.capabilities import BACKWARD, FORWARD, Request
from fastattn.spec import AttentionSpec, MLPSpec, MLPWeights, ScoreTensors, lse_dtype

_operators = library.Library("fastattn", "DEF")
# What an attention operator takes beside its tensors, in the order of ScoreTensors and AttentionSpec.
_SCORES = (
    "Tensor? key_lengths, Tensor? alibi_slopes, Tensor? sinks, "
    "bool causal, float scale, SymInt? left, SymInt? right, float softcap, str? backend"
)
_operators.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_SCORES}) -> (Tensor, Tensor)")
_operators.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    f"{_SCORES}) -> (Tensor, Tensor, Tensor, Tensor)"
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


def _forward(q, k, v, key_lengths, alibi_slopes, sinks, *options) -> tuple[Tensor, Tensor]:
    spec, backend = _spec(*options)
    tensors = ScoreTensors(key_lengths, alibi_slopes, sinks)
    request = Request("attention", spec, (q, k, v), score_tensors=tensors)
    chosen = capabilities.choose(request, FORWARD, backend)
    return backends.load(chosen).attention_forward(q, k, v, spec, tensors)


def _backward(
    dout, q, k, v, out, lse, dlse, key_lengths, alibi_slopes, sinks, *options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec, backend = _spec(*options)
    tensors = ScoreTensors(key_lengths, alibi_slopes, sinks)
    request = Request("attention", spec, (q, k, v), lse_gradient=dlse is not None, score_tensors=tensors)
    chosen = capabilities.choose(request, BACKWARD, backend)
    dq, dk, dv, dsinks = backends.load(chosen).attention_backward(dout, q, k, v, out, lse, dlse, spec, tensors)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def _spec(
    causal: bool, scale: float, left: int | None, right: int | None, softcap: float, backend: str | None
) -> tuple[AttentionSpec, str | None]:
    """An operator's options, put together again."""
    return AttentionSpec(causal, scale, (left, right), softcap), backend


_operators.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_operators.impl("attention_backward", _backward, "CompositeExplicitAutograd")


@library.register_fake(_FORWARD, lib=_operators)
def _forward_fake(q, k, v, *_):
    batch, heads, queries, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=lse_dtype(q.dtype))
    return empty_heads((batch, heads, queries, v.shape[3]), q), lse


@library.register_fake(_BACKWARD, lib=_operators)
def _backward_fake(dout, q, k, v, out, lse, dlse, key_lengths, alibi_slopes, sinks, *_):
    dsinks = q.new_empty(0) if sinks is None else q.new_empty(sinks.shape, dtype=sinks.dtype)
    return empty_heads(q.shape, q), empty_heads(k.shape, k), empty_heads(v.shape, v), dsinks


class Attention(torch.autograd.Function):
    """(q, k, v, *ScoreTensors, *options) -> (out, lse), both differentiable; by q, k, v and the sinks."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q, k, v, key_lengths, alibi_slopes, sinks, causal, scale, left, right, softcap, backend
    ):  # spelled out, because dynamo cannot trace a forward of *arguments
        return torch.ops.fastattn.attention_forward(
            q, k, v, key_lengths, alibi_slopes, sinks, causal, scale, left, right, softcap, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, key_lengths, alibi_slopes, sinks, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, *output, key_lengths, alibi_slopes, sinks)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv, dsinks = AttentionBackward.apply(dout, q, k, v, out, lse, dlse, *tensors, *ctx.options)
        has_sinks = tensors[-1] is not None
        return dq, dk, dv, None, None, dsinks if has_sinks else None, *(None,) * len(ctx.options)


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
        key_lengths,
        alibi_slopes,
        sinks,
        causal,
        scale,
        left,
        right,
        softcap,
        backend,
    ):
        return torch.ops.fastattn.attention_backward(
            dout, q, k, v, out, lse, dlse, key_lengths, alibi_slopes, sinks, causal, scale, left, right, softcap,
            backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:10])
        ctx.spec, _ = _spec(*inputs[10:])
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx, *second):
        # out and lse count as inputs of their own: what flows into them goes on through Attention.backward.
        dout, q, k, v, out, lse, dlse, key_lengths, alibi_slopes, sinks = ctx.saved_tensors
        optional = [t for t in (dlse, sinks) if t is not None]

        def gradients(dout, q, k, v, out, lse, *optional):
            given = list(optional)
            dlse_given = given.pop(0) if dlse is not None else None
            tensors = ScoreTensors(key_lengths, alibi_slopes, given.pop(0) if sinks is not None else None)
            return reference.attention_backward(dout, q, k, v, out, lse, dlse_given, ctx.spec, tensors)[
                : 3 + has_sinks
            ]

        has_sinks = sinks is not None
        pulled = list(torch.func.vjp(gradients, dout, q, k, v, out, lse, *optional)[1](second[: 3 + has_sinks]))
        of_sinks = pulled.pop() if has_sinks else None
        of_dlse = pulled.pop() if dlse is not None else None
        return *pulled, of_dlse, None, None, of_sinks, *(None,) * (ctx.count - 10)


@library.register_vmap(_FORWARD, lib=_operators)
def _forward_vmap(info: Any, in_dims: tuple, *arguments):
    tensors = _fold(info.batch_size, in_dims[:6], arguments[:6])
    return _unfold(info.batch_size, torch.ops.fastattn.attention_forward(*tensors, *arguments[6:])), (0, 0)


@library.register_vmap(_BACKWARD, lib=_operators)
def _backward_vmap(info: Any, in_dims: tuple, *arguments):
    tensors = _fold(info.batch_size, in_dims[:10], arguments[:10])
    *gradients, dsinks = torch.ops.fastattn.attention_backward(*tensors, *arguments[10:])
    dsinks = (
        _unfold(info.batch_size, (dsinks,))[0] if tensors[-1] is not None else dsinks.expand(info.batch_size, 0)
    )
    return (*_unfold(info.batch_size, tuple(gradients)), dsinks), (0, 0, 0, 0)


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
