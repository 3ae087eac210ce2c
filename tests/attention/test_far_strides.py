"""Tensors that kernels take may lie in memory in any way: rows and columns gigabytes apart, repeated, or dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.core.mlp.spec import MLPWeights

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="virtual memory of a CPU; the kernels run in the interpreter"
)


def far(t: Tensor, dim: int) -> Tensor:
    """The same values, with the neighbours of one dimension so far apart that 32-bit offsets over a few of them
    would overflow. The memory between them is never touched."""
    order = [dim, *(d for d in range(t.dim()) if d != dim)]
    dense = t.permute(order)
    step = 2**31 // max(1, t.shape[dim] - 1) + 2**16
    memory = torch.empty(step * (t.shape[dim] - 1) + dense[0].numel(), dtype=t.dtype)
    strides = (step, *dense[0].contiguous().stride())
    placed = memory.as_strided(dense.shape, strides).copy_(dense)
    return placed.permute([order.index(d) for d in range(t.dim())])


def repeated(t: Tensor, dim: int) -> Tensor:
    """The first slice in the place of every other, with a stride of 0."""
    return t.narrow(dim, 0, 1).expand(t.shape)


class Call:
    """A function of tensors by name."""

    def __init__(self, function: Callable, **tensors: Tensor) -> None:
        self.function, self.tensors = function, tensors

    def results(self, **changed: Tensor) -> list[Tensor]:
        given = {**self.tensors, **changed}
        with torch.no_grad():
            found = self.function(**given)
        return [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]


def attention_call(kind: str) -> Call:
    q, k, v = torch.randn(2, 1, 6, 8), torch.randn(2, 1, 7, 8), torch.randn(2, 1, 7, 8)
    beside = {
        "bias": torch.randn(2, 1, 6, 7), "alibi_slopes": torch.rand(2, 1), "relative_bias": torch.randn(2, 1, 9),
        "sinks": torch.randn(2, 1), "key_lengths": torch.tensor([7, 5]),
        "dropout_state": torch.arange(4).view(2, 2),
    }  # fmt: skip

    def attend(q, k, v, **beside):
        return fastattn.attention(q, k, v, **beside, dropout_p=0.2, return_lse=True, backend="triton")

    if kind == "forward":
        return Call(attend, q=q, k=k, v=v, **beside)
    if kind == "backward":
        out, lse = attend(q, k, v, **beside)

        def backward(dout, q, k, v, out, lse, dlse, **beside):
            return fastattn.attention_backward(
                dout, q, k, v, out, lse, dlse=dlse, dropout_p=0.2, **beside, backend="triton"
            )

        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        return Call(backward, dout=dout, q=q, k=k, v=v, out=out, lse=lse, dlse=dlse, **beside)

    moving = {"q": q, "k": k, "v": v} | {name: beside[name] for name in ("bias", "relative_bias", "sinks")}

    def tangent(**moved):
        return torch.func.jvp(
            lambda *t: attend(**(beside | dict(zip(moving, t, strict=True)))), tuple(moving.values()),
            tuple(moved[name] for name in moving),
        )[1]  # fmt: skip

    return Call(tangent, **{name: torch.randn_like(t) for name, t in moving.items()})


def bool_bias_call() -> Call:
    q, bias = torch.randn(1, 2, 6, 8), torch.rand(1, 2, 6, 6) < 0.7
    return Call(lambda bias: fastattn.attention(q, q, q, bias=bias, backend="triton"), bias=bias)


def heads_call(backward: bool) -> Call:
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(6, 3)
    tensors = {"norm_weight": torch.randn(3, 8), "cos": angles.cos(), "sin": angles.sin(),
               "offsets": torch.tensor([0, 1]), "head_scale": torch.rand(2, 3)}  # fmt: skip

    def prepare(x, **tensors):
        return fastattn.prepare_heads(x, **tensors, backend="triton")

    if not backward:
        return Call(prepare, x=x, **tensors)

    def gradients(dy, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(prepare(x, **tensors), x, dy)

    return Call(gradients, dy=torch.randn_like(x), x=x)


def norm_call(backward: bool) -> Call:
    x, residual, weight, bias = torch.randn(4, 10), torch.randn(4, 10), torch.randn(10), torch.randn(10)

    def norm(x, residual, weight, bias):
        return fastattn.layer_norm(x, weight, bias, residual=residual, backend="triton")

    if not backward:
        return Call(norm, x=x, residual=residual, weight=weight, bias=bias)

    def gradients(dy, x, weight):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            y, _ = norm(leaves[0], residual, leaves[1], bias)
            return torch.autograd.grad(y, leaves, dy)

    return Call(gradients, dy=torch.randn_like(x), x=x, weight=weight)


def mlp_call(backward: bool) -> Call:
    x = torch.randn(5, 6)
    weights = MLPWeights(torch.randn(7, 6), torch.randn(7), torch.randn(7, 6), torch.randn(7), torch.randn(4, 7))
    given = {name: t for name, t in weights._asdict().items() if t is not None}

    def gated(x, w_in, b_in, w_up, b_up, w_out):
        return fastattn.gated_mlp(x, w_in, w_up, w_out, b_gate=b_in, b_up=b_up, backend="triton")

    if not backward:
        return Call(gated, x=x, **given)

    def gradients(dy, **given):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in given.values()]
            return torch.autograd.grad(gated(*leaves), leaves, dy)

    return Call(gradients, dy=torch.randn(5, 4), x=x, **given)


CALLS = {
    **{
        f"attention, {kind}": lambda kind=kind: attention_call(kind) for kind in ("forward", "backward", "tangent")
    },
    "attention, bool bias": bool_bias_call,
    **{
        f"{name}, {'backward' if backward else 'forward'}": lambda make=make, backward=backward: make(backward)
        for name, make in (("heads", heads_call), ("norm", norm_call), ("mlp", mlp_call))
        for backward in (False, True)
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_no_layout_changes_a_result(name: str) -> None:
    torch.manual_seed(0)
    call = CALLS[name]()
    plain = call.results()
    for dim in (-1, -2):
        apart = {tensor: far(t, dim % t.dim()) for tensor, t in call.tensors.items() if t.dim() >= -dim}
        for a, e in zip(call.results(**apart), plain, strict=True):
            torch.testing.assert_close(a, e)
        once = {tensor: repeated(t, dim % t.dim()) for tensor, t in call.tensors.items() if t.dim() >= -dim}
        dense = {tensor: t.clone(memory_format=torch.contiguous_format) for tensor, t in once.items()}
        for a, e in zip(call.results(**once), call.results(**dense), strict=True):
            torch.testing.assert_close(a, e)
