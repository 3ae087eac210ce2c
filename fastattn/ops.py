"""The operators torch knows: opaque, with fake kernels, autograd and vmap (flop counts: fastattn.flops).

`fastattn::attention_forward`, `fastattn::mlp_forward` and their backwards choose a backend and run it; tracers see
one node each. `Attention` and `MLP` are the thin autograd.Functions the front door calls, because torch.func.grad
cannot see through an operator's registered autograd; both share the same formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import backends, capabilities, reference
from fastattn.backends.layout import empty_heads
from fastattn.capabilities import BACKWARD, FORWARD, Request
from fastattn.spec import AttentionSpec, MLPSpec, MLPWeights, lse_dtype

_library = torch.library.Library("fastattn", "DEF")
_library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, str? backend) -> (Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    "bool causal, float scale, str? backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "mlp_forward(Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_up, Tensor? b_up, Tensor w_out, Tensor? b_out, "
    "str activation, bool save, str? backend) -> (Tensor, Tensor)"
)
_library.define(
    "mlp_backward(Tensor dy, Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_up, Tensor? b_up, Tensor w_out, "
    "Tensor saved, bool[] wanted, str activation, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_FORWARD, _BACKWARD = "fastattn::attention_forward", "fastattn::attention_backward"
_MLP_FORWARD, _MLP_BACKWARD = "fastattn::mlp_forward", "fastattn::mlp_backward"


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    spec = AttentionSpec(causal, scale)
    chosen = capabilities.choose(Request("attention", spec, (q, k, v)), FORWARD, backend)
    return backends.load(chosen).attention_forward(q, k, v, spec)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    causal: bool,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = AttentionSpec(causal, scale)
    request = Request("attention", spec, (q, k, v), lse_gradient=dlse is not None)
    chosen = capabilities.choose(request, BACKWARD, backend)
    return backends.load(chosen).attention_backward(dout, q, k, v, out, lse, dlse, spec)


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake(_FORWARD, lib=_library)
def _forward_fake(q, k, v, causal, scale, backend):
    batch, heads, queries, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=lse_dtype(q.dtype))
    return empty_heads((batch, heads, queries, v.shape[3]), q), lse


@torch.library.register_fake(_BACKWARD, lib=_library)
def _backward_fake(dout, q, k, v, out, lse, dlse, causal, scale, backend):
    return empty_heads(q.shape, q), empty_heads(k.shape, k), empty_heads(v.shape, v)


class Attention(torch.autograd.Function):
    """(q, k, v, causal, scale, backend) -> (out, lse), both differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, causal, scale, backend):
        return torch.ops.fastattn.attention_forward(q, k, v, causal, scale, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        return *AttentionBackward.apply(dout, q, k, v, out, lse, dlse, *ctx.options), None, None, None


class AttentionBackward(torch.autograd.Function):
    """The gradients of Attention; differentiable once more, through the reference formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dout, q, k, v, out, lse, dlse, causal, scale, backend):
        return torch.ops.fastattn.attention_backward(dout, q, k, v, out, lse, dlse, causal, scale, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, causal, scale, _backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.spec = AttentionSpec(causal, scale)

    @staticmethod
    def backward(ctx, *second):
        # out and lse count as inputs of their own: what flows into them goes on through Attention.backward.
        *tensors, dlse = ctx.saved_tensors
        given = tensors if dlse is None else [*tensors, dlse]

        def gradients(dout, q, k, v, out, lse, dlse=None):
            return reference.attention_backward(dout, q, k, v, out, lse, dlse, ctx.spec)

        derivatives = torch.func.vjp(gradients, *given)[1](second)
        return *derivatives, *(None,) * (10 - len(derivatives))


@torch.library.register_vmap(_FORWARD, lib=_library)
def _forward_vmap(info: Any, in_dims: tuple, q, k, v, *options):
    tensors = _fold(info.batch_size, in_dims[:3], (q, k, v))
    return _unfold(info.batch_size, torch.ops.fastattn.attention_forward(*tensors, *options)), (0, 0)


@torch.library.register_vmap(_BACKWARD, lib=_library)
def _backward_vmap(info: Any, in_dims: tuple, dout, q, k, v, out, lse, dlse, *options):
    tensors = _fold(info.batch_size, in_dims[:7], (dout, q, k, v, out, lse, dlse))
    return _unfold(info.batch_size, torch.ops.fastattn.attention_backward(*tensors, *options)), (0, 0, 0)


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


_library.impl("mlp_forward", _mlp_forward, "CompositeExplicitAutograd")
_library.impl("mlp_backward", _mlp_backward, "CompositeExplicitAutograd")


@torch.library.register_fake(_MLP_FORWARD, lib=_library)
def _mlp_forward_fake(x, w_in, b_in, w_up, b_up, w_out, b_out, activation, save, backend):
    width = w_in.shape[0] * (1 if w_up is None else 2)
    saved = x.new_empty((x.shape[0], width)) if save else x.new_empty(0)
    return x.new_empty((x.shape[0], w_out.shape[0])), saved


@torch.library.register_fake(_MLP_BACKWARD, lib=_library)
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


@torch.library.register_vmap(_MLP_FORWARD, lib=_library)
def _mlp_forward_vmap(info: Any, in_dims: tuple, x, *rest):
    if any(isinstance(dim, int) for dim in in_dims[1:]):
        return _one_by_one(torch.ops.fastattn.mlp_forward, info.batch_size, in_dims, (x, *rest))
    # One set of weights: the mapped dimension is more tokens.
    x = x.movedim(in_dims[0], 0).flatten(0, 1)
    y, saved = torch.ops.fastattn.mlp_forward(x, *rest)
    saved = _unfold(info.batch_size, (saved,))[0] if saved.dim() == 2 else saved.expand(info.batch_size, 0)
    return (*_unfold(info.batch_size, (y,)), saved), (0, 0)


@torch.library.register_vmap(_MLP_BACKWARD, lib=_library)
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
    torch.library.register_autograd(
        _name,
        _function.backward,
        setup_context=lambda ctx, inputs, output, _function=_function: _function.setup_context(
            ctx, inputs, output
        ),
        lib=_library,
    )
