"""Attention as a function of tensors: arguments are checked here once and become a spec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastattn.core import invariance, plans, spread
from fastattn.core.attention import operators
from fastattn.core.attention.dropout import dropout_state as fresh_dropout_state
from fastattn.core.attention.spec import (
    AttentionSpec,
    Gradients,
    ScoreTensors,
    attention_spec,
    check_gradients,
    check_key_lengths,
    positive_scale,
    score_tensors,
    with_batch,
)
from fastattn.core.autocast import autocast
from fastattn.core.capabilities import check_backend
from fastattn.ground.arguments import flag, integer, refuse_keywords, tensor
from fastattn.ground.checks import Window, check_floating, check_same
from fastattn.masks import Lowered, Mask
from fastattn.masks import window as window_mask
from fastattn.masks.algebra import smaller


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | Tensor | None = ...,
    window: Window = ...,
    key_lengths: Tensor | Sequence[int] | None = ...,
    mask: Mask | Lowered | None = ...,
    bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_state: Tensor | None = ...,
    precision: str | None = ...,
    invariant: bool | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | Tensor | None = ...,
    window: Window = ...,
    key_lengths: Tensor | Sequence[int] | None = ...,
    mask: Mask | Lowered | None = ...,
    bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    relative_bias: Tensor | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_state: Tensor | None = ...,
    precision: str | None = ...,
    invariant: bool | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_max: Literal[True],
    return_lse: bool = ...,
    **given: Any,
) -> tuple[Tensor, ...]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | Tensor | None = None,
    window: Window = None,
    key_lengths: Tensor | Sequence[int] | None = None,
    mask: Mask | Lowered | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
    precision: str | None = None,
    invariant: bool | None = None,
    return_lse: bool = False,
    return_max: bool = False,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(scale q k^T) v, fused: no N x N tensor is ever stored, forward or backward.

    Query i stands on the diagonal at key i + Lk - Lq (bottom-right alignment: the queries are the last positions
    of a longer sequence).

    Args:
        q: queries (B, Hq, Lq, D); any strides. D and Dv may be any width from 1
            up; the Triton kernels compute 8 to 512, and queries and keys of up to 640 without gradients.
        k: keys (B, Hkv, Lk, D); query head h reads key head h // (Hq / Hkv).
        v: values (B, Hkv, Lk, Dv).
        causal: queries see keys up to the diagonal.
        scale: multiplier of the scores; 1/sqrt(D) by default. Or a tensor (), (Hq,) or (B, Hq), one for all or
            for each head, with gradient.
        window: (left, right), how many keys before and after the diagonal are seen; None is unbounded. A number n
            is (n, n), with causal (n, 0); a query sees n keys on each side beside its own. Tiles in which no query
            sees a key are not computed.
        key_lengths: (B,) integers, a tensor or a sequence; keys from there on are not seen (right padding). The
            diagonal stays. k, v and a bias are not read there: they may be NaN, as in a cache that was never
            written. But keys before that which a mask, a window or a bias hides are read. A NaN in such a key
            reaches every query in the tiles that are computed with it, since 0 x NaN is NaN.
        mask: which keys each query sees, a value of fastattn.masks or what its `lower` returned. A key must be
            within causal, window and key_lengths, too. Blocks of 64 x 64 that no query may see are not computed,
            and keys behind a `masks.key_lengths` in the mask are not read.
        bias: added to the scores; broadcasts to (B, Hq, Lq, Lk), any float dtype, with gradient, which is summed
            over broadcast dimensions. -inf hides a key. Or a bool tensor, in which True shows a key, as in
            scaled_dot_product_attention.
        alibi_slopes: (Hq,) or (B, Hq); scores fall by the slope for each key of distance from the diagonal. No
            gradient.
        relative_bias: (Hq, 2 R + 1) or (B, Hq, 2 R + 1), added to the scores by distance: key j of query i takes
            value j - (i + Lk - Lq) + R, clamped to the first and the last. With gradient. `t5_relative_bias`
            makes it from T5's table.
        softcap: scaled scores s become softcap * tanh(s / softcap), before any bias; None or 0 for no cap.
        sinks: (Hq,) or (B, Hq), in nats; one more score in each row of the head, which takes weight and has no
            value. With gradient.
        dropout_p: the probability of dropping a weight, rounded to 16 bits; the others are multiplied by
            1 / (1 - dropout_p). The backward draws the same numbers again, so nothing is stored.
        dropout_state: (B, 2) int64, seed and offset of each batch entry's random numbers; by default
            `dropout_state` draws one from torch's generator. `dropout_mask` shows what it drops. For a part of a
            whole, (B, 5): the same, and at which head, which query and which eight keys of the whole q, k and v
            begin; what is dropped is then the same as in the whole.
        precision: of float32 products on a GPU: "ieee", "tf32x3" (three tf32 products, nearly as
            exact) or "tf32"; by default what torch.backends.cuda.matmul allows. A backend may be more
            exact than that.
        invariant: whether the bits of a row must depend on that row alone, see `fastattn.invariant`; by default as
            that context or FASTATTN_INVARIANT says.
        return_lse: also return the log-sum-exp of each row of scores, the sink included; differentiable.
        return_max: also return the largest score of each row, as it goes into the softmax: scaled, capped, biased.
            A sink is no key. Without gradient. On a GPU the kernel has it anyway; the portable backend computes
            all of its own tiles for it.
        backend: "triton", "portable" or "reference"; by default the capability table chooses, or the
            environment variable FASTATTN_BACKEND.

    Returns:
        out (B, Hq, Lq, Dv) in the inputs' dtype, laid out (B, Lq, Hq, Dv) in memory; with `return_lse` also
        lse (B, Hq, Lq) in nats, fp32 (fp64 for fp64 inputs). A row that sees no key gives 0 and -inf, or the
        sink's score. With `return_max` the maxima (B, Hq, Lq) come last, like lse; -inf for a row without keys.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything runs.

    Example:
        >>> q, k, v = (torch.randn(1, 4, 128, 64) for _ in range(3))
        >>> attention(q, k, v, causal=True, window=(31, None)).shape
        torch.Size([1, 4, 128, 64])

    Source: Dao, FlashAttention-2 (2023), algorithms 1 and 2; windows: Beltagy et al., Longformer (2020); ALiBi:
    Press et al., Train Short, Test Long (2022); soft cap: Gemma 2 (2024), section 2; sinks: Xiao et al., Efficient
    Streaming Language Models with Attention Sinks (2024), section 3.3, learned as in gpt-oss (2025); relative
    bias: Raffel et al., Exploring the Limits of Transfer Learning (2020), section 2.1.
    """
    if unknown:
        refuse_keywords("attention", unknown)
    if spread.current is not None and not spread.is_dtensor(q):
        return spread.current.attention(q, k, v, {
            "causal": causal, "scale": scale, "window": window, "key_lengths": key_lengths, "mask": mask,
            "bias": bias, "alibi_slopes": alibi_slopes, "relative_bias": relative_bias, "softcap": softcap,
            "sinks": sinks, "dropout_p": dropout_p, "dropout_state": dropout_state, "precision": precision,
            "invariant": invariant, "return_lse": return_lse, "return_max": return_max, "backend": backend,
        })  # fmt: skip
    scales = scale if isinstance(scale, Tensor) else None
    beside = key_lengths, alibi_slopes, bias, relative_bias, sinks, dropout_state, None, None, scales, None
    options = (
        causal, scale if scales is None else None, window, softcap, dropout_p, precision, return_lse, return_max,
        mask, backend, invariance.wanted() if invariant is None else invariant,
    )  # fmt: skip
    key = plans.key((q, k, v, *beside), options)
    plan = PLANS.find(key)
    if plan is not None:
        return plan(q, k, v, beside)
    if spread.is_dtensor(q):
        return spread.of_dtensors["attention"](q, k, v, {
            "causal": causal, "scale": scale, "window": window, "key_lengths": key_lengths, "mask": mask,
            "bias": bias, "alibi_slopes": alibi_slopes, "relative_bias": relative_bias, "softcap": softcap,
            "sinks": sinks, "dropout_p": dropout_p, "dropout_state": dropout_state, "precision": precision,
            "invariant": invariant, "return_lse": return_lse, "return_max": return_max, "backend": backend,
        })  # fmt: skip
    return_lse, backend = flag("return_lse", return_lse), check_backend(backend)
    q, k, v = autocast(q, k, v)
    number, head_scale = _scales(scale)
    spec = attention_spec(
        q, k, v, causal=causal, scale=number, window=window, softcap=softcap, dropout_p=dropout_p,
        precision=precision, invariant=invariant,
    )  # fmt: skip
    if spec.dropout and dropout_state is None:
        dropout_state = fresh_dropout_state(q.shape[0], q.device)
    spec, key_lengths, masked = with_mask(q, k, spec, key_lengths, mask)
    tensors = score_tensors(
        q, k, key_lengths=key_lengths, alibi_slopes=alibi_slopes, bias=bias, relative_bias=relative_bias,
        sinks=sinks, dropout_state=dropout_state, drops=spec.dropout > 0, head_scale=head_scale,
    )._replace(**masked)  # fmt: skip
    scaled_q, spec = positive_scale(q, spec)
    if return_max is not False and flag("return_max", return_max):
        out, lse, maxima = operators.attention_max(scaled_q, k, v, *tensors, *spec.options, backend)
        return (out, lse, maxima) if return_lse else (out, maxima)
    if key is None:
        out, lse = operators.attention(scaled_q, k, v, *tensors, *spec.options, backend)
        return (out, lse) if return_lse else out
    made = operators.AttentionPlan.of((scaled_q, k, v), tensors, spec, backend)
    alone = all(t is None for t in tensors)
    if scaled_q is q:
        PLANS.keep(key, PlannedCall(made, alone, return_lse))
    out, lse = plans.run(made, scaled_q, k, v, *(() if alone else tensors))
    return (out, lse.contiguous()) if return_lse else out


class PlannedCall(NamedTuple):
    """A call of `attention` that was checked before, with other tensors.

    alone: whether there are no tensors beside q, k and v.
    """

    plan: operators.AttentionPlan
    alone: bool
    return_lse: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, beside: tuple) -> Tensor | tuple[Tensor, ...]:
        """beside: the arguments of ScoreTensors as they were given."""
        if self.alone:
            out, lse = plans.run(self.plan, q, k, v)
        else:
            given = ScoreTensors(*beside)
            if not self.plan.spec.dropout:
                given = given._replace(dropout_state=None)
            elif given.dropout_state is None:
                given = given._replace(dropout_state=fresh_dropout_state(q.shape[0], q.device))
            out, lse = plans.run(self.plan, q, k, v, *with_batch(q, k, given))
        return (out, lse.contiguous()) if self.return_lse else out


PLANS: plans.Plans[PlannedCall] = plans.Plans("attention")


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    causal: bool = False,
    scale: float | Tensor | None = None,
    window: Window = None,
    key_lengths: Tensor | Sequence[int] | None = None,
    mask: Mask | Lowered | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
    precision: str | None = None,
    invariant: bool | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> tuple[Tensor, ...]:
    """The gradients (dq, dk, dv) of `attention`, then those of bias, relative_bias, sinks and a scale of each head
    as far as they are given, with a batch dimension. For callers who run the backward themselves (ring attention,
    split keys).

    Args:
        dout: gradient of out (B, Hq, Lq, Dv); any strides, zero included.
        out, lse: as returned by `attention`, or merged by `merge_states` from parts of the keys. With the merged
            out and lse the gradients of each part are exact.
        dlse: gradient of lse (B, Hq, Lq), or None.
        q, k, v and the others: the arguments of `attention`.
    """
    if unknown:
        refuse_keywords("attention_backward", unknown)
    backend = check_backend(backend)
    if isinstance(scale, Tensor) and scale.dim() == 0:
        scale = scale.item()
    number, head_scale = _scales(scale)
    spec = attention_spec(
        q, k, v, causal=causal, scale=number, window=window, softcap=softcap, dropout_p=dropout_p,
        precision=precision, invariant=invariant,
    )  # fmt: skip
    if spec.dropout and dropout_state is None:
        raise ValueError(
            "dropout_state must be the one that attention was called with if there is a dropout_p; got None"
        )
    spec, key_lengths, masked = with_mask(q, k, spec, key_lengths, mask)
    tensors = score_tensors(
        q, k, key_lengths=key_lengths, alibi_slopes=alibi_slopes, bias=bias, relative_bias=relative_bias,
        sinks=sinks, dropout_state=dropout_state, drops=spec.dropout > 0, head_scale=head_scale,
    )._replace(**masked)  # fmt: skip
    check_gradients(q, v, dout=dout, out=out, lse=lse, dlse=dlse)
    scaled_q, positive = positive_scale(q, spec)
    wanted = (tensors.bias is not None and tensors.bias.is_floating_point(), tensors.relative_bias is not None)
    gradients = Gradients(
        *operators.attention_backward(
            dout, scaled_q, k, v, out, lse, dlse, *wanted, *tensors, *positive.options, backend
        )
    )
    if scaled_q is not q:
        gradients = gradients._replace(q=gradients.q * (-1.0 if spec.scale < 0 else 0.0))
    exist = (True, True, True, *wanted, sinks is not None, head_scale is not None)
    return tuple(g for g, exists in zip(gradients, exist, strict=True) if g is not None and exists)


def scores_asked(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    scale: float | Tensor | None = None,
    window: Window = None,
    key_lengths: Tensor | Sequence[int] | None = None,
    mask: Mask | Lowered | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, AttentionSpec, ScoreTensors]:
    """What `attention`'s arguments ask of the scores alone, for those who look at them (fastattn.lens): q with the
    sign of the scale in it, the spec and the tensors."""
    number, head_scale = _scales(scale)
    spec = attention_spec(
        q, k, k, causal=causal, scale=number, window=window, softcap=softcap, precision=precision, invariant=False
    )
    spec, key_lengths, masked = with_mask(q, k, spec, key_lengths, mask)
    tensors = score_tensors(
        q, k, key_lengths=key_lengths, alibi_slopes=alibi_slopes, bias=bias, relative_bias=relative_bias,
        sinks=sinks, head_scale=head_scale,
    )._replace(**masked)  # fmt: skip
    return *positive_scale(q, spec), tensors


def _scales(scale: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """A scale as a spec takes it, and as ScoreTensors does."""
    return (1.0, scale) if isinstance(scale, Tensor) else (scale, None)


class _Masked(NamedTuple):
    """The spec and the key lengths of a call once its mask is applied, and the ScoreTensors that come from the
    mask."""

    spec: AttentionSpec
    key_lengths: Tensor | Sequence[int] | None
    tensors: dict[str, Tensor | None]


def with_mask(
    q: Tensor,
    k: Tensor,
    spec: AttentionSpec,
    key_lengths: Tensor | Sequence[int] | None,
    mask: Mask | Lowered | None,
) -> _Masked:
    """Apply the mask of a call: it becomes numbers in the spec, intervals or lists."""
    if mask is None:
        return _Masked(spec, key_lengths, {})
    if not isinstance(mask, Mask | Lowered):
        raise TypeError(
            f"mask must be a value of fastattn.masks, lowered or not, got {type(mask).__name__}{_other_mask(mask)}"
        )
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    if isinstance(mask, Mask) and torch.compiler.is_compiling():
        raise ValueError("mask must be lowered before torch.compile: give mask.lower(B, Hq, Lq, Lk, device)")
    lowered = mask.lower(*shape) if isinstance(mask, Mask) else mask
    lowered.check(*shape)
    bounds = spec.left, spec.right
    if not lowered.is_window and bounds != (None, None):
        if isinstance(mask, Mask):
            lowered = (mask & window_mask(*bounds)).lower(*shape)
        elif not mask.is_within(*bounds):
            raise ValueError(
                "mask must lie within causal and window if it is lowered; combine them with & before you lower it"
            )
        bounds = None, None
    if lowered.key_lengths is not None:
        lengths = lowered.key_lengths
        key_lengths = (
            lengths if key_lengths is None else torch.minimum(check_key_lengths(key_lengths, q, k), lengths)
        )
    if lowered.packed is not None:
        if spec.invariant:
            raise ValueError(
                "an invariant call takes masks that become numbers or intervals (causal, window, key lengths, "
                f"prefix, documents, packed sequences), but {mask!r} becomes block lists; give it as a bool bias, "
                "bias=mask.dense(B, Hq, Lq, Lk, device)"
            )
        words, layout = lowered.packed
        return _Masked(replace(spec, causal=False, window=bounds, mask=layout), key_lengths, {"mask": words})
    left, right = (smaller(a, b) for a, b in zip(bounds, (lowered.left, lowered.right), strict=True))
    window = left, None if right == 0 else right
    intervals = None if lowered.intervals is None else lowered.intervals.expand(q.shape[0], -1, -1)
    tensors = {"intervals": intervals}
    if spec.invariant and lowered.sequences is not None:
        tensors["sequences"] = lowered.sequences.expand(q.shape[0], -1, -1)
    return _Masked(replace(spec, causal=right == 0, window=window), key_lengths, tensors)


def _other_mask(mask: object) -> str:
    """Advice for a mask of another library."""
    if isinstance(mask, Tensor):
        return "; a tensor is given as bias= (bool, True is seen, or float, added) or as masks.from_dense(tensor)"
    if type(mask).__name__ == "BlockMask":
        return "; give its mask_mod as masks.from_function(mask_mod)"
    return ""


def t5_relative_bias(table: Tensor, *, max_distance: int = 128, bidirectional: bool = True) -> Tensor:
    """T5's relative position bias, as `attention(relative_bias=)` takes it: (Hq, 2 max_distance + 1).

    Args:
        table: (buckets, Hq), `relative_attention_bias.weight`; differentiable.
        max_distance: farther keys share the last bucket.
        bidirectional: half of the buckets are for keys after the diagonal (encoders); else those take bucket 0.

    Source: Raffel et al., Exploring the Limits of Transfer Learning (2020), section 2.1: half of the buckets hold
    one distance each, the others grow logarithmically.
    """
    tensor("table", table)
    check_floating("table", table)
    max_distance, bidirectional = integer("max_distance", max_distance), flag("bidirectional", bidirectional)
    if table.dim() != 2 or table.shape[0] < (4 if bidirectional else 2):
        raise ValueError(f"table must have shape (buckets, heads), got {tuple(table.shape)}")
    buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
    exact = buckets // 2
    if max_distance <= exact:
        raise ValueError(
            f"max_distance must be more than {exact}, since nearer keys have a bucket each; got {max_distance}"
        )
    distance = torch.arange(-max_distance, max_distance + 1, device=table.device)
    behind = -distance.clamp(max=0) if not bidirectional else distance.abs()
    # In float32, as in training: rounding decides on which side of an integer a boundary falls.
    far = torch.log(behind.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    bucket = torch.where(behind < exact, behind, (exact + far.long()).clamp(max=buckets - 1))
    if bidirectional:
        bucket = bucket + buckets * (distance > 0)
    return table[bucket].t()


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each.

    Args:
        out_a, out_b: outputs (..., Lq, Dv).
        lse_a, lse_b: their log-sum-exps (..., Lq) in nats. A sink belongs to one of the parts.

    Returns:
        out and lse of one call over both sets; differentiable. Rows that saw nothing in either stay 0 and -inf.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018), section 3.1.
    """
    for name, out, lse in (("a", out_a, lse_a), ("b", out_b, lse_b)):
        for argument, t in ((f"out_{name}", out), (f"lse_{name}", lse)):
            tensor(argument, t)
            check_floating(argument, t)
        if out.shape != out_a.shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"out_{name} must have shape {tuple(out_a.shape)} and lse_{name} {tuple(out_a.shape[:-1])}, "
                f"got {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    check_same("out_b", out_b, "out_a", out_a)
    check_same("lse_b", lse_b, "lse_a", lse_a)
    # Use 0 as the pivot where both are -inf: -inf minus -inf would be NaN, also in the gradient.
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.masked_fill(top == float("-inf"), 0.0)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    out = (weight_a / safe)[..., None] * out_a + (weight_b / safe)[..., None] * out_b
    lse = (top + torch.log(safe)).masked_fill(empty, float("-inf"))
    return out.to(out_a.dtype), lse
