"""The MLP around its hidden layer, for every backend: products with the weights, a chunk of tokens at a time.

A backend brings the steps that know the hidden layer. Forward and backward take the same chunks, so a hidden layer
that is computed twice comes from the same call on the same numbers and has the same bits.

Sums over several chunks (the gradients of weights and biases) are float32. A chunk's part of a weight gradient is
float32, too, where the library's product can write it (on CUDA); else it is rounded to the dtype first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.core.mlp.spec import MLPSpec, MLPWeights
from fastattn.ground.checks import lse_dtype

Kept = tuple[Tensor, ...]


class Steps(NamedTuple):
    """What a backend computes of T tokens.

    hidden: (x, weights, spec) -> the hidden layer (T, h), and what is kept of it for the backward: () for nothing.
    output: (hidden, x, weights, spec, first, out) -> y (T, out), in `out` if it is given. The rows are the tokens
        from `first` on, by which dropout draws.
    dropped: (dy, weights, spec, first) -> the gradient of what is dropped out.
    normalised: (x, weights, spec) -> the norm of x, and of each row its moments as `norm_gradient` takes them.
    recalled: (x, normalised, weights, kept, spec) -> the hidden layer, or None if `gradient` returns it, and a
        state for `gradient`. `normalised` is x without a norm.
    gradient: (dy, state, weights, want_hidden, want_bias, spec) -> the gradients of the pre-activations, one
        (T, 2h) as `MLPSpec.halves` reads it, or of each first weight its own; their sum over tokens in at least
        float32 or None; the hidden layer or None.
    norm_gradient: (dy, dresidual, (x, norm weight, *moments), spec, wanted) -> through the norm: dx, to which
        dresidual is added, and of its weight and bias, those that are wanted. In and out in the shapes of the
        norm's family, of which the tokens are one group: (1, T, d).
    """

    hidden: Callable[..., tuple[Tensor, Kept]]
    output: Callable[..., Tensor]
    dropped: Callable[..., Tensor]
    normalised: Callable[..., tuple[Tensor, Any]]
    recalled: Callable[..., tuple[Tensor | None, tuple]]
    gradient: Callable[..., tuple[list[Tensor], Tensor | None, Tensor | None]]
    norm_gradient: Callable[..., tuple[Tensor | None, ...]]


def forward(steps: Steps, x: Tensor, weights: MLPWeights, spec: MLPSpec) -> tuple[Tensor, Kept]:
    """y (T, out) and what is kept for the backward."""
    if not 0 < spec.chunk < x.shape[0]:
        hidden, kept = steps.hidden(x, weights, spec)
        return steps.output(hidden, x, weights, spec, 0, None), kept
    y, kept = x.new_empty(x.shape[0], weights.w_out.shape[0]), ()
    for rows in _chunks(x.shape[0], spec.chunk):
        hidden, part = steps.hidden(x[rows], weights, spec)
        steps.output(hidden, x[rows], _of_rows(weights, rows), spec, rows.start, y[rows])
        kept = kept or tuple(t.new_empty(x.shape[0], t.shape[1]) for t in part)
        for whole, t in zip(kept, part, strict=True):
            whole[rows] = t
    return y, kept


def backward(
    steps: Steps, dy: Tensor, x: Tensor, weights: MLPWeights, kept: Kept, wanted: Sequence[bool], spec: MLPSpec
) -> tuple[Tensor | None, ...]:
    """The gradients of x, of w_in above w_up, of b_in before b_up, of w_out, of b_out, of norm_weight and of
    norm_bias; None where not wanted."""
    if not 0 < spec.chunk < x.shape[0]:
        dy, dresidual = _upstream(steps, dy, weights, spec, 0)
        found = _gradients(steps, _product, (dy, dresidual), x, weights, kept, wanted, spec)
        return _in_dtypes(found, x, weights)
    dx = x.new_empty(x.shape) if wanted[0] else None
    sums: dict[str, Tensor] = {}
    add_product = functools.partial(_add_product, sums)
    for rows in _chunks(x.shape[0], spec.chunk):
        part = tuple(t[rows] for t in kept)
        upstream = _upstream(steps, dy[rows], weights, spec, rows.start)
        found = _gradients(steps, add_product, upstream, x[rows], weights, part, wanted, spec)
        dx_part, _, db, _, *beside = found
        if dx is not None and dx_part is not None:
            dx[rows] = dx_part
        for name, t in zip(("b", *_BESIDE), (db, *beside), strict=True):
            if t is not None:
                sums[name] = sums[name] + t if name in sums else t
        del dx_part, found
    return _in_dtypes((dx, *(sums.get(name) for name in ("w", "b", "w_out", *_BESIDE))), x, weights)


_BESIDE = ("b_out", "norm_weight", "norm_bias")


def _of_rows(weights: MLPWeights, rows: slice) -> MLPWeights:
    """The same, with the residual of these tokens."""
    return weights if weights.residual is None else weights._replace(residual=weights.residual[rows])


def _upstream(
    steps: Steps, dy: Tensor, weights: MLPWeights, spec: MLPSpec, first: int
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the last product's result, and what x gets of dy as the residual, if it is the residual."""
    return steps.dropped(dy, weights, spec, first) if spec.dropout else dy, dy if spec.residual == "x" else None


def _in_dtypes(found: Sequence[Tensor | None], x: Tensor, weights: MLPWeights) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of what they are the gradients of."""
    beside = (weights.norm_weight, weights.norm_bias)
    dtypes = [x.dtype] * 5 + [x.dtype if t is None else t.dtype for t in beside]
    return tuple(
        t if t is None or t.dtype is dtype else t.to(dtype) for t, dtype in zip(found, dtypes, strict=True)
    )


def _gradients(
    steps: Steps,
    product: Callable[..., Tensor],
    upstream: tuple[Tensor, Tensor | None],
    x: Tensor,
    weights: MLPWeights,
    kept: Kept,
    wanted: Sequence[bool],
    spec: MLPSpec,
) -> tuple[Tensor | None, ...]:
    """The gradients of a chunk. product: (name, left matrices, right) -> the left^T right, one above the other."""
    dy, dresidual = upstream
    want_x, want_weight, want_bias, want_out, want_out_bias, *want_norm = wanted
    dw_out = None
    source, moments = steps.normalised(x, weights, spec) if spec.norm else (x, ())
    hidden, state = steps.recalled(x, source, weights, kept, spec)
    recalled = hidden is not None
    if want_out and recalled:
        dw_out = product("w_out", [dy], hidden)
    del hidden  # before the gradient, so that three tensors as wide as the hidden layer are the most at a time
    dpres, db, hidden = steps.gradient(dy, state, weights, want_out and not recalled, want_bias, spec)
    if want_out and not recalled:
        dw_out = product("w_out", [dy], hidden)
    del hidden, state
    dw = product("w", dpres, source) if want_weight else None
    del source
    dx: Tensor | None = None
    of_norm: list[Tensor | None] = [None, None]
    if want_x or any(want_norm):
        dx = input_gradient(dpres, weights, spec)
        del dpres
        if spec.norm:
            dresidual = None if dresidual is None else dresidual[None]
            norm_weight = None if weights.norm_weight is None else weights.norm_weight[None]
            saved = x[None], norm_weight, *moments
            found = steps.norm_gradient(dx[None], dresidual, saved, spec, tuple(want_norm))
            dx, *of_norm = (None if t is None else t[0] for t in found)
        elif dresidual is not None:
            dx = dx.add_(dresidual)
    return dx if want_x else None, dw, db, dw_out, column_sum(dy, spec) if want_out_bias else None, *of_norm


def _product(name: str, lefts: list[Tensor], right: Tensor) -> Tensor:
    """left^T right, one above the other."""
    if len(lefts) == 1:
        return lefts[0].t() @ right
    heights = [left.shape[1] for left in lefts]
    out = right.new_empty(sum(heights), right.shape[1])
    for left, part in zip(lefts, out.split(heights), strict=True):
        torch.mm(left.t(), right, out=part)
    return out


def _add_product(sums: dict[str, Tensor], name: str, lefts: list[Tensor], right: Tensor) -> Tensor:
    """The same, added to the sum of this name, in float32 at least."""
    heights, dtype = [left.shape[1] for left in lefts], lse_dtype(right.dtype)
    first = name not in sums
    if first:
        sums[name] = right.new_empty(sum(heights), right.shape[1], dtype=dtype)
    for left, part in zip(lefts, sums[name].split(heights), strict=True):
        if dtype == right.dtype:
            if first:
                torch.mm(left.t(), right, out=part)
            else:
                part.addmm_(left.t(), right)
        elif first:
            part.copy_(_exact_product(left, right, dtype))
        else:
            part += _exact_product(left, right, dtype)
    return sums[name]


def _exact_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left^T right in `dtype`, where the library has such a product; else in right's dtype."""
    if right.is_cuda and torch.version.hip is None:
        return torch.mm(left.t(), right, out_dtype=dtype)
    return left.t() @ right


def pre_count(kept: Kept, spec: MLPSpec) -> int:
    """How many of the tensors that some backend has kept are pre-activations: gate's and up's may lie side by
    side."""
    apart = spec.gated and len(kept) % 2 == 0 and kept[0].dtype != torch.int8
    return 2 if apart else 1


def pre_activations(kept: Kept, spec: MLPSpec) -> tuple[Tensor, Tensor | None]:
    """Gate's (or the only) pre-activation and up's, or their int8 codes, of what some backend has kept."""
    if not spec.gated:
        return kept[0], None
    return (kept[0], kept[1]) if pre_count(kept, spec) == 2 else spec.halves(kept[0], 1)


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def input_gradient(dpres: list[Tensor], weights: MLPWeights, spec: MLPSpec) -> Tensor:
    """dpre W, or dgate Wg + dup Wu: one product if these are the halves of one packed (2h, d) matrix."""
    w_in, w_up = weights.w_in, weights.w_up
    packed = w_in if w_up is None else packed_weight(w_in, w_up)
    if packed is not None and len(dpres) == 1:
        return dpres[0] @ packed
    assert w_up is not None
    dgate, dup = dpres if len(dpres) == 2 else dpres[0].tensor_split(2, 1)
    if spec.match_eager or not dgate.is_cuda:
        # On a CPU as autograd adds them, which computes most calls there (see `portable.is_composed`).
        return dgate @ w_in + dup @ w_up
    return (dgate @ w_in).addmm_(dup, w_up)


def packed_weight(w_gate: Tensor, w_up: Tensor) -> Tensor | None:
    """The (2h, d) matrix whose halves these weights are, also in memory; None if they are not."""
    height, width = w_gate.shape
    follows = w_gate.storage_offset() + height * w_gate.stride(0) == w_up.storage_offset()
    same = w_gate.untyped_storage()._cdata == w_up.untyped_storage()._cdata
    if not (same and follows and w_gate.stride() == w_up.stride()):
        return None
    return w_gate.as_strided((2 * height, width), w_gate.stride())


def column_sum(t: Tensor, spec: MLPSpec) -> Tensor:
    """The sum over tokens, in float32 at least. Eager rounds it to the dtype; so does this, if it is to match
    eager and nothing is added to it."""
    return t.sum(0) if spec.match_eager and not spec.chunk else t.sum(0, dtype=lse_dtype(t.dtype))
