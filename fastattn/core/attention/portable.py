"""The kernels' algorithm in plain PyTorch: tiled, O(N) memory, any device, fp64 too.

Where one of PyTorch's own fused kernels computes the same thing, that does the work (torch_routes). The rest runs
here: tiles of scores, an online softmax forward, recomputed weights backward, in fp32 for half-precision inputs.
Under a mask of lists the tiles are its granules, many at once (see fastattn.core.attention.granules). An invariant
call goes sequence by sequence (see fastattn.core.attention.invariant).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastattn.core.attention import (
    definition,
    granules,
    head_scales,
    invariant,
    tiles,
    torch_flash,
    torch_routes,
    whole_rows,
)
from fastattn.core.attention.spec import AttentionSpec, Gradients, Saved, ScoreTensors, Tangents, Wanted
from fastattn.core.attention.tiles import Scores, product_precision
from fastattn.core.layout import heads_last


def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors, maxima: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if spec.invariant:
        with product_precision(q, spec):
            return invariant.forward(q, k, v, spec, tensors, maxima)
    if tensors.head_scale is not None:
        return head_scales.forward(functools.partial(forward, maxima=maxima), q, k, v, spec, tensors)
    with product_precision(q, spec):
        if maxima is not None:
            return _tiled_forward(q, k, v, spec, tensors, maxima)
        kernel = torch_routes.serving(q, k, v, spec, tensors)
        if kernel is not None:
            out, lse = torch_routes.forward(kernel, q, k, v, spec, tensors)
            return heads_last(out), lse
        if granules.serves(spec, tensors):
            return granules.forward(q, k, v, spec, tensors)
        if whole_rows.serves(q, k, spec, tensors):
            return whole_rows.forward(q, k, v, spec, tensors)
        return _tiled_forward(q, k, v, spec, tensors)


def straight(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, differentiable: bool
) -> torch_flash.Plain | torch_routes.Plain | None:
    """The way of calls without ScoreTensors that need nothing but one operator of PyTorch's; None for others."""
    if spec.invariant:
        return None
    return torch_flash.plain(q, k, v, spec, differentiable) or torch_routes.plain(q, k, v, spec)


def backward(
    dout: Tensor, dlse: Tensor | None, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted
) -> Gradients:
    if spec.invariant:
        with product_precision(saved.q, spec):
            return invariant.backward(dout, dlse, saved, spec, tensors, wanted)
    if tensors.head_scale is not None:
        return head_scales.backward(backward, dout, dlse, saved, spec, tensors, wanted)
    q, k, v = saved[:3]
    with product_precision(q, spec):
        kernel = torch_routes.serving(q, k, v, spec, tensors, wanted, dlse)
        if kernel is not None:
            dout, dlse, finite = _for_rounded_rows(dout, dlse, saved, spec, tensors)
            of = torch_routes.backward(kernel, dout, dlse, saved, spec, tensors, wanted, finite)
            return of._replace(q=heads_last(of.q), k=heads_last(of.k), v=heads_last(of.v))
        if granules.serves(spec, tensors):
            dout, dlse, _ = _for_rounded_rows(dout, dlse, saved, spec, tensors)
            return granules.backward(dout, dlse, saved, spec, tensors, wanted)
        if whole_rows.serves(q, k, spec, tensors):
            dout, dlse, _ = _for_rounded_rows(dout, dlse, saved, spec, tensors)
            return whole_rows.backward(dout, dlse, saved, spec, tensors, wanted)
        return _tiled_backward(dout, dlse, saved, spec, tensors, wanted)


def tangent(saved: Saved, tangents: Tangents, spec: AttentionSpec, tensors: ScoreTensors) -> tuple[Tensor, Tensor]:
    fixed, learned = tiles.learned(tensors)
    dout, dlse = tiles.tangent(spec)(fixed, (*saved, *tangents, *learned))
    return dout, dlse


def _for_rounded_rows(
    dout: Tensor, dlse: Tensor | None, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors
) -> tuple[Tensor, Tensor | None, bool]:
    """What comes from above, divided by what the weights exp(score - lse) of each row add up to: not 1 where the
    log-sum-exp is rounded. Gradients are linear in the weights of a row, and in what comes from above. And whether
    it is known that all log-sum-exps are finite."""
    fixed, learned = tiles.learned(tensors)
    if not tiles.adds_floats(tensors):
        return dout, dlse, False
    rounded, finite = definition.any_rounded(saved.lse)
    if not rounded:
        return dout, dlse, finite
    scores = Scores(saved.q, saved.k, spec, fixed)
    shares = torch.ones_like(saved.lse)
    for rows in scores.rows():
        remainder = scores.remainder(rows, saved.q, saved.k, saved.lse, *learned)
        if remainder is not None:
            shares[:, :, rows] = torch.exp(-remainder)
    return (dout * shares[..., None]).to(dout.dtype), None if dlse is None else dlse * shares, finite


def _tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors, maxima: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    fixed, learned = tiles.learned(tensors)
    return tiles.forward(Scores(q, k, spec, fixed), q, k, v, learned, maxima)


def _tiled_backward(
    dout: Tensor, dlse: Tensor | None, saved: Saved, spec: AttentionSpec, tensors: ScoreTensors, wanted: Wanted
) -> Gradients:
    fixed, learned = tiles.learned(tensors)
    function = tiles.gradients(spec, wanted, tensors.sinks is not None, False)
    found = iter(function(fixed, (dout, *saved, dlse, *learned)))
    dq, dk, dv = next(found), next(found), next(found)
    dbias = next(found) if wanted.bias else None
    drelative_bias = next(found) if wanted.relative_bias else None
    return Gradients(dq, dk, dv, dbias, drelative_bias, next(found, None))
