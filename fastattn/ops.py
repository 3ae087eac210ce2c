"""The operators torch knows: opaque, with fake kernels, autograd and vmap (flop counts: fastattn.flops).

`fastattn::attention_forward` and `fastattn::attention_backward` choose a backend and run it; tracers see one
node each. `Attention` is the thin autograd.Function the front door calls, because torch.func.grad cannot
see through an operator's registered autograd; both share the same formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import backends, capabilities, reference
from fastattn.backends.layout import empty_heads
from fastattn.capabilities import BACKWARD, FORWARD, Request
from fastattn.spec import AttentionSpec, lse_dtype

_library = torch.library.Library("fastattn", "DEF")
_library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, str? backend) -> (Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    "bool causal, float scale, str? backend) -> (Tensor, Tensor, Tensor)"
)
_FORWARD, _BACKWARD = "fastattn::attention_forward", "fastattn::attention_backward"


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


for _name, _function in ((_FORWARD, Attention), (_BACKWARD, AttentionBackward)):
    torch.library.register_autograd(
        _name,
        _function.backward,
        setup_context=lambda ctx, inputs, output, _function=_function: _function.setup_context(
            ctx, inputs, output
        ),
        lib=_library,
    )


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
