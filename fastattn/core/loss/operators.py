"""The loss as PyTorch operators, built like those of attention.

`fastattn::loss_rows` gives the values of each token, `loss_rows_backward` their gradients. `loss_reduced` is one
number with all its gradients at once. Each chooses a backend and runs it; tracers see one node. `rows` and
`reduced` are what the functional calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from fastattn.core import backends, capabilities, derivatives
from fastattn.core.autocast import without_autocast
from fastattn.core.capabilities import BACKWARD, FORWARD, Request
from fastattn.core.function import Function, register_autograd
from fastattn.core.loss import definition
from fastattn.core.loss.spec import LossSpec, LossTensors, check_classes
from fastattn.core.mapped import one_by_one
from fastattn.ground.checks import lse_dtype

_operators = library.Library("fastattn", "FRAGMENT")
_TENSORS = "Tensor x, Tensor w, Tensor? b, Tensor target, Tensor? class_weight"
_OPTIONS = "float[] fractions, SymInt[] integers, str? backend"
_operators.define(f"loss_rows({_TENSORS}, {_OPTIONS}) -> Tensor")
_operators.define(
    f"loss_rows_backward(Tensor drows, {_TENSORS}, Tensor rows, bool[] wanted, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)"
)
_operators.define(
    f"loss_reduced({_TENSORS}, Tensor coefficients, bool[] wanted, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_ROWS, _BACKWARD, _REDUCED = "fastattn::loss_rows", "fastattn::loss_rows_backward", "fastattn::loss_reduced"


def _backend(tensors: LossTensors, spec: LossSpec, direction: str, backend: str | None) -> Any:
    request = Request("loss", spec, (tensors.x, tensors.w, tensors.target))
    return backends.load("loss", capabilities.choose(request, direction, backend))


def _or_empty(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def _rows(x, w, b, target, class_weight, fractions, integers, backend) -> Tensor:
    spec, tensors = LossSpec.of(fractions, integers), LossTensors(x, w, b, target, class_weight)
    check_classes(target, spec.ignore_index, spec.classes)
    with without_autocast(x.device):
        return _backend(tensors, spec, FORWARD, backend).forward(tensors, spec)


def _rows_backward(
    drows, x, w, b, target, class_weight, rows, wanted, fractions, integers, backend
) -> tuple[Tensor, ...]:
    spec, tensors = LossSpec.of(fractions, integers), LossTensors(x, w, b, target, class_weight)
    with without_autocast(x.device):
        gradients = _backend(tensors, spec, BACKWARD, backend).backward(drows, tensors, rows, wanted, spec)
    return _or_empty(gradients, x)


def _reduced(
    x, w, b, target, class_weight, coefficients, wanted, fractions, integers, backend
) -> tuple[Tensor, ...]:
    spec, tensors = LossSpec.of(fractions, integers), LossTensors(x, w, b, target, class_weight)
    check_classes(target, spec.ignore_index, spec.classes)
    with without_autocast(x.device):
        results = _backend(tensors, spec, BACKWARD, backend).reduced(tensors, coefficients, wanted, spec)
    return _or_empty(results, x)


_operators.impl("loss_rows", _rows, "CompositeExplicitAutograd")
_operators.impl("loss_rows_backward", _rows_backward, "CompositeExplicitAutograd")
_operators.impl("loss_reduced", _reduced, "CompositeExplicitAutograd")


@library.register_fake(_ROWS, lib=_operators)
def _rows_fake(x, w, b, target, class_weight, fractions, integers, backend):
    return x.new_empty((4 if integers[3] else 3, x.shape[0]), dtype=lse_dtype(x.dtype))


def _gradients_fake(x: Tensor, w: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    shapes = zip((x.shape, w.shape, w.shape[:1]), wanted, strict=True)
    return tuple(x.new_empty(shape if want else 0) for shape, want in shapes)


@library.register_fake(_BACKWARD, lib=_operators)
def _rows_backward_fake(drows, x, w, b, target, class_weight, rows, wanted, *_):
    return _gradients_fake(x, w, wanted)


@library.register_fake(_REDUCED, lib=_operators)
def _reduced_fake(x, w, b, target, class_weight, coefficients, wanted, *_):
    return x.new_empty((), dtype=lse_dtype(x.dtype)), *_gradients_fake(x, w, wanted)


class Rows(Function):
    """(x, w, b, target, class_weight, *options) -> rows (see definition.py)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, b, target, class_weight, fractions, integers, backend):
        return torch.ops.fastattn.loss_rows(x, w, b, target, class_weight, fractions, integers, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, fractions, integers, backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output)
        ctx.options = fractions, integers, backend

    @staticmethod
    def backward(ctx, drows):
        if drows is None:
            return (None,) * 8
        *tensors, rows = ctx.saved_tensors
        needed = ctx.needs_input_grad[:5]
        _refuse(needed)
        wanted = list(needed[:3])
        gradients = rows_backward(drows, *tensors, rows, wanted, *ctx.options)
        found = (g if want else None for g, want in zip(gradients, wanted, strict=True))
        return *found, None, None, None, None, None


def _refuse(needed: Sequence[bool]) -> None:
    """Raise where a transform asks for a gradient that there is none of."""
    for name, need in zip(("target", "weight"), needed[3:], strict=True):
        if need:
            raise ValueError(
                f"the loss has no gradient of {name}: detach it, or leave it out of the differentiation"
            )


class RowsBackward(Function):
    """The gradients of Rows; differentiable once more, through the definition.

    No gradient flows into `rows`: the formula starts from x and w, from which they were computed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(drows, x, w, b, target, class_weight, rows, wanted, fractions, integers, backend):
        return torch.ops.fastattn.loss_rows_backward(
            drows, x, w, b, target, class_weight, rows, wanted, fractions, integers, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _rows, wanted, fractions, integers, _backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.wanted, ctx.spec = wanted, (fractions, integers)

    @staticmethod
    def backward(ctx, *second):
        drows, x, w, b, target, class_weight = ctx.saved_tensors
        parts = []
        for some in _chunks(x, w):
            cotangents = [
                g[some] if i == 0 else g
                for i, (g, want) in enumerate(zip(second, ctx.wanted, strict=True))
                if want
            ]
            tensors = (drows[:, some], x[some], w, b, target[some], class_weight)
            parts.append(
                derivatives.pull_through(_formula(ctx, target[some], class_weight), tensors[:4], cotangents)
            )
        of_drows, of_x, of_w, of_b = zip(*parts, strict=True)
        bias = None if b is None else sum(of_b[1:], of_b[0])
        found = torch.cat(of_drows, 1), torch.cat(of_x), sum(of_w[1:], of_w[0]), bias
        return *found, *(None,) * 7


def _chunks(x: Tensor, w: Tensor) -> list[slice]:
    """The tokens in slices, so that the logits of a slice are no larger than x and w together; at least 64
    tokens."""
    step = max(64, (x.numel() + w.numel()) // max(1, w.shape[0]))
    return [slice(start, start + step) for start in range(0, max(1, x.shape[0]), step)]


def _formula(ctx: Any, target: Tensor, class_weight: Tensor | None) -> Callable[..., list[Tensor]]:
    """The gradients that are wanted, by the definition, of (drows, x, w, b)."""
    spec = LossSpec.of(*ctx.spec)

    def gradients(drows: Tensor, x: Tensor, w: Tensor, b: Tensor | None) -> list[Tensor]:
        every = definition.row_gradients(drows, LossTensors(x, w, b, target, class_weight), spec)
        return [g for g, want in zip(every, ctx.wanted, strict=True) if want]

    return gradients


class DualRows(Rows):
    """Rows, with forward mode, through the definition. torch.compile cannot trace it."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        Rows.setup_context(ctx, inputs, output)
        # The same tensors as Rows saves for the backward: torch.func.vmap keeps one list of their mapped
        # dimensions.
        ctx.save_for_forward(*inputs[:5], output)

    @staticmethod
    def jvp(ctx, dx, dw, db, dtarget, dweight, *_):
        _refuse([False, False, False, dtarget is not None, dweight is not None])
        x, w, b, target, class_weight, rows = ctx.saved_tensors
        spec = LossSpec.of(*ctx.options[:2])
        if dx is None and dw is None and db is None:
            return torch.zeros_like(rows)
        pushed = []
        for some in _chunks(x, w):

            def of(x: Tensor, w: Tensor, b: Tensor | None, some: slice = some) -> list[Tensor]:
                return [definition.rows(LossTensors(x, w, b, target[some], class_weight), spec)]

            tangents = (None if dx is None else dx[some], dw, db)
            pushed += derivatives.push_through(of, (x[some], w, b), tangents)
        return torch.cat(pushed, 1)


def _every_gradient(ctx: Any, tensors: Sequence[Any]) -> list[Tensor]:
    drows, x, w, b, target, class_weight = tensors
    return _formula(ctx, target, class_weight)(drows, x, w, b)


DualRowsBackward = derivatives.with_forward_mode(RowsBackward, _every_gradient, 6)


class Reduced(Function):
    """(x, w, b, target, class_weight, coefficients, wanted, *options) -> the loss, and its gradients where they
    are wanted: the backward multiplies them."""

    @staticmethod
    def forward(x, w, b, target, class_weight, coefficients, wanted, fractions, integers, backend):
        return torch.ops.fastattn.loss_reduced(
            x, w, b, target, class_weight, coefficients, wanted, fractions, integers, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, wanted, fractions, integers, backend = inputs
        _, *gradients = output
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *gradients)
        ctx.wanted, ctx.options = wanted, (fractions, integers, backend)

    @staticmethod
    def backward(ctx, dloss, *_):
        none = (None,) * 7
        if dloss is None:
            return None, None, None, *none
        *tensors, coefficients, dx, dw, db = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = rows(*tensors, *ctx.options)
            drows = dloss * definition.gradient_of_rows(found, coefficients)
            gradients = rows_backward(drows, *tensors, found, list(ctx.wanted), *ctx.options)
        else:
            gradients = _multiplied((dx, dw, db), dloss)
        return *(g if want else None for g, want in zip(gradients, ctx.wanted, strict=True)), *none


# torch knows in a backward whether its graph is kept (retain_graph) since 2.5.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _multiplied(gradients: Sequence[Tensor], dloss: Tensor) -> list[Tensor]:
    """The gradients times dloss: in place where nobody can ask for them again, which needs no memory."""
    plain = type(dloss) is Tensor and all(type(g) is Tensor for g in gradients)
    if torch.compiler.is_compiling() or not plain or _graph_is_kept():
        return [g * dloss.to(g.dtype) for g in gradients]
    # On a GPU, to look at the number would wait for it.
    if dloss.device.type == "cpu" and dloss == 1:
        return list(gradients)
    return [g.mul_(dloss) for g in gradients]


def rows(*arguments) -> Tensor:
    """The rows, differentiable; takes Rows' arguments."""
    return (Rows if torch.compiler.is_compiling() else DualRows).apply(*arguments)


def rows_backward(*arguments) -> tuple[Tensor, ...]:
    """The gradients of the rows, differentiable; takes RowsBackward's arguments."""
    return (RowsBackward if torch.compiler.is_compiling() else DualRowsBackward).apply(*arguments)


def reduced(*arguments) -> Tensor:
    """One number, differentiable; takes Reduced's arguments."""
    return Reduced.apply(*arguments)[0]


def _one_by_one(operator: Callable) -> Callable:
    def rule(info: Any, in_dims: tuple, *arguments):
        in_dims = tuple(dim if isinstance(a, Tensor) else None for dim, a in zip(in_dims, arguments, strict=True))
        several = lambda *a: r if isinstance(r := operator(*a), tuple) else (r,)  # noqa: E731
        results, dims = one_by_one(several, info.batch_size, in_dims, arguments)
        return (results, dims) if len(results) > 1 else (results[0], dims[0])

    return rule


for _name, _operator in (
    (_ROWS, torch.ops.fastattn.loss_rows),
    (_BACKWARD, torch.ops.fastattn.loss_rows_backward),
    (_REDUCED, torch.ops.fastattn.loss_reduced),
):
    library.register_vmap(_name, _one_by_one(_operator), lib=_operators)

for _name, _function in ((_ROWS, Rows), (_BACKWARD, RowsBackward), (_REDUCED, Reduced)):
    register_autograd(_name, _function, _operators)
