"""The flops of the operators, for torch.utils.flop_counter: `import fastattn.flops` registers the formulas.

It is a module of its own, because torch's flop counter imports Triton, which takes a quarter of a second. If the
flop counter is already imported, `import fastattn` imports this module, too.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

# These define the operators.
import fastattn.core.attention.operators
import fastattn.core.loss.operators
import fastattn.core.mlp.operators
import fastattn.core.statistics.operators  # noqa: F401
from fastattn.core.attention.spec import ScoreTensors, Tangents
from fastattn.core.statistics.spec import StatisticsTensors


def visible_scores(
    queries: int, keys: int, left: int | None, right: int | None, rows: tuple[int, int] | None = None
) -> int:
    """How many (query, key) pairs are in a window around the bottom-right diagonal; None is unbounded. Of all
    queries, or of those from `rows[0]` to before `rows[1]`."""
    first, stop = rows or (0, queries)
    count, diagonal = stop - first, keys - queries + first
    stops = count * keys if right is None else _sum_of_clamped(diagonal + right + 1, count, keys)
    starts = 0 if left is None else _sum_of_clamped(diagonal - left, count, keys)
    return stops - starts


def _sum_of_clamped(first: int, count: int, top: int) -> int:
    """The sum of `count` successive integers from `first` on, each clamped to [0, top]."""

    def below(stop: int) -> int:
        stop = max(stop, 0)
        rising = min(stop, top + 1)
        return rising * (rising - 1) // 2 + (stop - rising) * top

    return below(first + count) - below(first)


def attention_flops(
    q: tuple, k: tuple, v: tuple, causal: bool, window: tuple = (None, None), *, backward: bool = False
) -> int:
    """Multiplications and additions of the products over the visible scores, from the shapes of q, k and v.

    Key lengths are values, not shapes, so keys beyond them are counted, too.
    """
    # Forward: q k^T is as wide as q, P v as v. Backward: q k^T, dS k and dS^T q; dout v^T and P^T dout.
    widths = 3 * q[3] + 2 * v[3] if backward else q[3] + v[3]
    left, right = window
    return 2 * q[0] * q[1] * visible_scores(q[2], k[2], left, 0 if causal else right) * widths


_TENSORS = len(ScoreTensors._fields)


@register_flop_formula([torch.ops.fastattn.attention_forward, torch.ops.fastattn.attention_forward_max])
def _forward(q, k, v, *args, out_shape=None, **kwargs) -> int:
    causal, _, left, right, *_ = args[_TENSORS:]
    return attention_flops(q, k, v, causal, (left, right))


@register_flop_formula(torch.ops.fastattn.attention_backward)
def _backward(dout, q, k, v, out, lse, dlse, *args, out_shape=None, **kwargs) -> int:
    causal, _, left, right, *_ = args[2 + _TENSORS :]
    return attention_flops(q, k, v, causal, (left, right), backward=True)


@register_flop_formula(torch.ops.fastattn.attention_tangent)
def _tangent(q, k, v, out, lse, q_tangent, k_tangent, v_tangent, *args, out_shape=None, **kwargs) -> int:
    causal, _, left, right, *_ = args[len(Tangents._fields) - 3 + _TENSORS :]
    forward = attention_flops(q, k, v, causal, (left, right))
    # Beside q k^T and (P * S') v, one product for each of the tangents.
    more = sum(t[3] for t in (q_tangent, k_tangent, v_tangent) if t is not None)
    return forward * (q[3] + v[3] + more) // (q[3] + v[3])


def mlp_flops(x: tuple, w_in: tuple, w_out: tuple, gated: bool, wanted: tuple[bool, ...] | None = None) -> int:
    """Multiplications and additions of the products, from the shapes of x (T, d) and of the weights.

    Of the forward, or of the backward that computes the gradients `wanted`.
    """
    first = 2 * x[0] * w_in[0] * w_in[1] * (2 if gated else 1)  # a packed w_in counts for both
    second = 2 * x[0] * w_out[0] * w_out[1]
    if wanted is None:
        return first + second
    want_x, want_weight, _, want_out, _, *of_norm = wanted
    return first * ((want_x or any(of_norm)) + want_weight) + second * (1 + want_out)


@register_flop_formula(torch.ops.fastattn.mlp_forward)
def _mlp_forward(x, w_in, b_in, w_up, b_up, w_out, *args, out_shape=None, **kwargs) -> int:
    return mlp_flops(x, w_in, w_out, w_up is not None)


@register_flop_formula(torch.ops.fastattn.mlp_backward)
def _mlp_backward(dy, x, w_in, b_in, w_up, b_up, w_out, *args, out_shape=None, **kwargs) -> int:
    _, _, _, kept, _, _, _, wanted, *_ = args
    # Where nothing was kept, the first product is computed again.
    again = 2 * x[0] * w_in[0] * w_in[1] * (1 if w_up is None else 2) if kept is None else 0
    return mlp_flops(x, w_in, w_out, w_up is not None, wanted) + again


@register_flop_formula(torch.ops.fastattn.loss_rows)
def _loss_rows(x, w, *args, out_shape=None, **kwargs) -> int:
    return 2 * x[0] * w[0] * w[1]


@register_flop_formula(torch.ops.fastattn.loss_rows_backward)
def _loss_rows_backward(
    drows, x, w, b, target, class_weight, rows, wanted, *args, out_shape=None, **kwargs
) -> int:
    """The gradients of x and w; that the logits are computed again is not counted, as in attention."""
    return 2 * x[0] * w[0] * w[1] * (wanted[0] + wanted[1])


@register_flop_formula(torch.ops.fastattn.loss_reduced)
def _loss_reduced(x, w, b, target, class_weight, rows, wanted, *args, out_shape=None, **kwargs) -> int:
    return 2 * x[0] * w[0] * w[1] * (1 + wanted[0] + wanted[1])


@register_flop_formula(torch.ops.fastattn.attention_statistics)
def _statistics(q, k, lse, *args, out_shape=None, **kwargs) -> int:
    """Of q k^T over the visible scores of the queries asked for. What is summed over them is no product."""
    _, (first, stop, *_), *scores = args[len(StatisticsTensors._fields) :]
    causal, _, left, right, *_ = scores[_TENSORS:]
    return 2 * q[0] * q[1] * visible_scores(q[2], k[2], left, 0 if causal else right, (first, stop)) * q[3]


@register_flop_formula(torch.ops.fastattn.attention_weights)
def _weights(q, k, lse, rows, *args, out_shape=None, **kwargs) -> int:
    """Of the products of the pairs asked for."""
    return 2 * q[0] * q[1] * rows[0] * q[3]
