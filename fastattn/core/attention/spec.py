"""What is asked of attention: validated once, then frozen.

Everything below the functional trusts a spec. Tensors travel beside it, never in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.core import invariance
from fastattn.ground import arguments
from fastattn.ground.checks import (
    Window,
    check_beside,
    check_floating,
    check_same,
    check_window,
    lse_dtype,
    shape_of,
    window_that_hides,
)

PRECISIONS = ("ieee", "tf32x3", "tf32")


@dataclass(frozen=True)
class AttentionSpec:
    """Which attention: out = softmax(cap(scale * q k^T) + mask) v; `ScoreTensors` has the tensors that take part.

    Query i stands on the diagonal at key i + Lk - Lq (bottom-right alignment).

    causal: queries see keys up to the diagonal.
    scale: the multiplier of the scores; positive.
    window: how many keys before and after the diagonal are seen; None for all.
    softcap: scores s become softcap * tanh(s / softcap); 0 for no cap.
    dropout: the probability of dropping a weight; a multiple of 2**-16, see dropout.py.
    precision: of float32 products, one of PRECISIONS.
    mask: the layout of ScoreTensors.mask, see fastattn.masks.lists.packed; None without a mask.
    invariant: the bits of a row depend on that row alone, see fastattn.core.invariance.
    """

    causal: bool = False
    scale: float = 1.0
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    dropout: float = 0.0
    precision: str = "ieee"
    mask: tuple[int, ...] | None = None
    invariant: bool = False

    @property
    def left(self) -> int | None:
        """How many keys before the diagonal are seen; None for all."""
        return self.window[0]

    @property
    def right(self) -> int | None:
        """How many keys after the diagonal are seen, none if causal; None for all."""
        return 0 if self.causal else self.window[1]

    def at(self, queries: int, keys: int) -> AttentionSpec:
        """The same for this many queries and keys, without bounds that hide no key there."""
        bounds = self.left, self.right
        left, right = window_that_hides(bounds, queries, keys)
        if (left, right) == bounds:
            return self
        return replace(self, causal=right == 0, window=(left, None if right == 0 else right))

    @property
    def options(
        self,
    ) -> tuple[bool, float, int | None, int | None, float, float, str, tuple[int, ...] | None, bool]:
        """As an operator takes them: causal, scale, window to the left and right, softcap, dropout, precision, the
        mask's layout and invariant."""
        scores = self.causal, self.scale, *self.window, self.softcap, self.dropout, self.precision
        return *scores, self.mask, self.invariant


class ScoreTensors(NamedTuple):
    """Tensors that change the scores, each with a batch dimension; None for those that are not given.

    key_lengths: (B,) int32; keys from there on are not seen.
    alibi_slopes: (B, Hq) fp32; the score falls by the slope for each key of distance from the diagonal.
    bias: (B or 1, Hq or 1, Lq or 1, Lk or 1); added to the scores, or, if bool, says which keys are seen.
    relative_bias: (B, Hq, 2 R + 1) in the log-sum-exp's dtype; added by distance from the diagonal, see
        `relative_index`.
    sinks: (B, Hq) in the log-sum-exp's dtype; one more score in each row, which takes weight and has no value.
    dropout_state: (B, 2 or 5) int64, seed and offset of each batch entry's random numbers, and where the tensors
        begin in a whole, see dropout.py.
    mask: 1-D int64, block lists as fastattn.masks.lists.packed makes them; one for the whole batch.
    intervals: (B, 2, Lq + Lk) int32, the first key that each query sees and the one after the last, then the first
        query that sees each key and the one after the last. There is no window beside them.
    head_scale: (B, Hq) in the log-sum-exp's dtype, of any sign; multiplies the scores, beside the spec's scale.
    sequences: (B, n, 4) int32, for an invariant call whose batch entries hold several sequences: first query,
        queries, first key and keys of each. The intervals say that no query sees a key of another one.
    """

    key_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout_state: Tensor | None = None
    mask: Tensor | None = None
    intervals: Tensor | None = None
    head_scale: Tensor | None = None
    sequences: Tensor | None = None


NO_TENSORS = ScoreTensors()
# What an attention operator takes beside its tensors, in the order of ScoreTensors and AttentionSpec.
SCORES = (
    "Tensor? key_lengths, Tensor? alibi_slopes, Tensor? bias, Tensor? relative_bias, Tensor? sinks, "
    "Tensor? dropout_state, Tensor? mask, Tensor? intervals, Tensor? head_scale, Tensor? sequences, bool causal, "
    "float scale, SymInt? left, SymInt? right, float softcap, float dropout, str precision, int[]? mask_layout, "
    "bool invariant, str? backend"
)


def put_together(rest: Sequence) -> tuple[ScoreTensors, AttentionSpec, str | None]:
    """What an operator takes from key_lengths on, as the backends take it."""
    count = len(ScoreTensors._fields)
    tensors, options = rest[:count], rest[count:]
    causal, scale, left, right, softcap, dropout, precision, layout, invariant, backend = options
    layout = None if layout is None else tuple(layout)
    spec = AttentionSpec(causal, scale, (left, right), softcap, dropout, precision, layout, invariant)
    return ScoreTensors(*tensors), spec, backend


class Saved(NamedTuple):
    """What the derivatives take from a forward: its inputs, its output and its log-sum-exp."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """The gradients of what went into attention; None for what was not given or not wanted."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    sinks: Tensor | None = None
    head_scale: Tensor | None = None


class Tangents(NamedTuple):
    """The tangents of what goes into attention, of the same shapes; None is zero."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    sinks: Tensor | None = None
    head_scale: Tensor | None = None


class Wanted(NamedTuple):
    """Which of the gradients that take a pass of their own are wanted."""

    bias: bool = False
    relative_bias: bool = False


def attention_spec(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: Window = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    precision: str | None = None,
    invariant: bool | None = None,
) -> AttentionSpec:
    """Check q, k, v and the options against each other; the default scale is 1/sqrt(D), the default precision
    PyTorch's own for float32 products.

    A caller may give a scale of zero or below, but a spec may not have one: see `positive_scale`. The window is
    not cut to the lengths here, because a tracer may know no number for them: see `AttentionSpec.at`.
    """
    check_heads(q=q, k=k, v=v)
    left, right = check_window(window)
    dropout_p, invariant = check_dropout(dropout_p), invariance.asked(invariant)
    if invariant and dropout_p:
        raise ValueError(
            f"dropout_p must be 0 where a call is invariant, got {dropout_p}: the random numbers of a row depend "
            "on its place in the batch"
        )
    return AttentionSpec(
        arguments.flag("causal", causal),
        1.0 / math.sqrt(q.shape[3]) if scale is None else check_scale(scale),
        (_bounded(left), _bounded(right)),
        check_softcap(softcap),
        dropout_p,
        check_precision(precision, q),
        invariant=invariant,
    )


def check_scale(scale: float, name: str = "scale") -> float:
    scale = float(arguments.number(name, scale, what="a number or None"))
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{name} must be finite, got {scale}")
    return scale


def check_scales(scale: Tensor, q: Tensor) -> Tensor:
    """A scale for all heads or for each, (), (Hq,) or (B, Hq)."""
    check_beside("scale", scale, q, ((), (q.shape[1],), tuple(q.shape[:2])))
    check_floating("scale", scale)
    return scale


def check_softcap(softcap: float | None) -> float:
    """The cap; 0 for none."""
    softcap = 0.0 if softcap is None else float(arguments.number("softcap", softcap, what="a number or None"))
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None or 0 for no cap; got {softcap}")
    return softcap


def check_dropout(dropout_p: float) -> float:
    """The probability, rounded to the steps of 2**-16 that the random numbers have."""
    dropout_p = arguments.number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    # Rounding must not turn a small probability into 0, nor one below 1 into 1.
    steps = min(max(round(dropout_p * 2**16), int(dropout_p > 0)), 2**16 - 1)
    return steps / 2**16


def check_precision(precision: str | None, q: Tensor) -> str:
    """The precision of float32 products, by default PyTorch's global setting; "ieee" for other dtypes."""
    if precision is not None:
        arguments.choice("precision", precision, PRECISIONS, or_none=True)
    if q.dtype != torch.float32 or q.device.type != "cuda":
        return "ieee"
    return precision or ("tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee")


def _bounded(side: int | None) -> int | None:
    """A bound that an operator can take; one beyond all lengths is None."""
    return None if side is None or side >= 2**31 else side


def score_tensors(
    q: Tensor,
    k: Tensor,
    *,
    key_lengths: Tensor | Sequence[int] | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_state: Tensor | None = None,
    drops: bool = True,
    head_scale: Tensor | None = None,
) -> ScoreTensors:
    """Check the tensors that change the scores, and give each of them a batch dimension.

    The values of key_lengths are not read here: on a GPU that would wait for the device. Lengths beyond Lk count
    as Lk, negative ones as 0.
    """
    batch, heads = q.shape[:2]
    if key_lengths is not None:
        key_lengths = _key_lengths(key_lengths, q)
    if alibi_slopes is not None:
        check_beside("alibi_slopes", alibi_slopes, q, ((heads,), (batch, heads)))
        check_floating("alibi_slopes", alibi_slopes)
        if alibi_slopes.requires_grad:
            raise ValueError(
                "alibi_slopes must not require a gradient, because none is computed for them; detach them"
            )
    if bias is not None:
        check_bias(bias, q, k)
    if relative_bias is not None:
        check_beside("relative_bias", relative_bias, q, None)
        check_floating("relative_bias", relative_bias)
        width = relative_bias.shape[-1] if relative_bias.dim() else 0
        if tuple(relative_bias.shape) not in ((heads, width), (batch, heads, width)) or width % 2 == 0:
            raise ValueError(
                f"relative_bias must have shape ({heads}, 2 R + 1) or ({batch}, {heads}, 2 R + 1), "
                f"got {shape_of(relative_bias)}"
            )
    if sinks is not None:
        check_beside("sinks", sinks, q, ((heads,), (batch, heads)))
        check_floating("sinks", sinks)
    if dropout_state is not None:
        check_beside("dropout_state", dropout_state, q, ((batch, 2), (batch, 5)))
        if dropout_state.dtype != torch.int64:
            raise TypeError(f"dropout_state must be int64, got {dropout_state.dtype}")
        dropout_state = dropout_state if drops else None
    if head_scale is not None:
        check_scales(head_scale, q)
    given = ScoreTensors(
        key_lengths, alibi_slopes, bias, relative_bias, sinks, dropout_state, head_scale=head_scale
    )
    return with_batch(q, k, given)


def with_batch(q: Tensor, k: Tensor, given: ScoreTensors) -> ScoreTensors:
    """Checked tensors as ScoreTensors describes them: with a batch dimension, in their dtypes."""
    batch, heads = q.shape[:2]
    dtype = lse_dtype(q.dtype)

    def by_head(t: Tensor | None, *width: int) -> Tensor | None:
        return None if t is None else t.to(dtype).expand(batch, heads, *width)

    lengths, bias, relative_bias = given.key_lengths, given.bias, given.relative_bias
    return given._replace(
        key_lengths=None if lengths is None else _within(lengths, k),
        alibi_slopes=by_head(given.alibi_slopes),
        bias=None if bias is None else bias[(None,) * (4 - bias.dim())],
        relative_bias=None if relative_bias is None else by_head(relative_bias, relative_bias.shape[-1]),
        sinks=by_head(given.sinks),
        head_scale=by_head(given.head_scale),
    )


def check_key_lengths(key_lengths: Tensor | Sequence[int], q: Tensor, k: Tensor) -> Tensor:
    """Lengths (B,) as int32 from 0 to Lk."""
    return _within(_key_lengths(key_lengths, q), k)


def _key_lengths(key_lengths: Tensor | Sequence[int], q: Tensor) -> Tensor:
    """Lengths (B,), checked, as a tensor."""
    if not isinstance(key_lengths, Tensor):
        key_lengths = arguments.integers("key_lengths", key_lengths, on=q.device)
    check_beside("key_lengths", key_lengths, q, ((q.shape[0],),))
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_lengths must be int32 or int64, got {key_lengths.dtype}")
    return key_lengths


def _within(key_lengths: Tensor, k: Tensor) -> Tensor:
    return key_lengths.clamp(0, k.shape[2]).to(torch.int32)


def check_bias(bias: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise unless the bias broadcasts to (B, Hq, Lq, Lk)."""
    check_beside("bias", bias, q, None)
    if bias.dtype != torch.bool:
        check_floating("bias", bias)
    full = (*q.shape[:3], k.shape[2])
    if bias.dim() > 4 or any(b not in (1, f) for b, f in zip(bias.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"bias must broadcast to (batch, heads, Lq, Lk) = {full}, got {shape_of(bias)}")


def positive_scale(q: Tensor, spec: AttentionSpec) -> tuple[Tensor, AttentionSpec]:
    """q and the spec for the same scores with a positive scale: the sign (or the zero) moves into q.

    The kernels take the maximum of the unscaled scores, so the scale must preserve their order. One too small for
    the dtype of the scores becomes the smallest one: as 0 it would make NaN of what is hidden.
    """
    smallest = torch.finfo(lse_dtype(q.dtype)).tiny
    if spec.scale >= smallest:
        return q, spec
    scale = max(abs(spec.scale), smallest) if spec.scale else 1.0
    if spec.scale <= 0:
        q = q * (-1.0 if spec.scale < 0 else 0.0)
    return q, replace(spec, scale=scale)


def check_heads(*, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv): ranks, dtypes, devices and sizes agree."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        arguments.tensor(name, t)
        if t.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, width), got {shape_of(t)}")
        check_floating(name, t)
        check_same(name, t, "q", q)
    for name, t in (("k", k), ("v", v)):
        if t.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch size {q.shape[0]}, got {t.shape[0]}")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(f"v must have k's heads and length {tuple(k.shape[1:3])}, got {tuple(v.shape[1:3])}")
    if q.shape[1] % k.shape[1] != 0 if k.shape[1] else q.shape[1] != 0:
        raise ValueError(f"q's heads must be a multiple of k's heads {k.shape[1]}, got {q.shape[1]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's head width {q.shape[3]}, got {k.shape[3]}")
    for name, t in (("q", q), ("v", v)):
        if t.shape[3] == 0:
            raise ValueError(f"{name}'s head width must be at least 1, got 0")


def check_gradients(q: Tensor, v: Tensor, *, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> None:
    """Raise unless the arguments of `attention_backward` have the shapes of what `attention` returned."""
    rows = q.shape[:3]
    for name, t in (("dout", dout), ("out", out)):
        arguments.tensor(name, t)
        if t.shape != (*rows, v.shape[3]):
            raise ValueError(f"{name} must have shape {(*rows, v.shape[3])}, got {shape_of(t)}")
        check_same(name, t, "q", q)
    for name, values in (("lse", lse),) if dlse is None else (("lse", lse), ("dlse", dlse)):
        arguments.tensor(name, values)
        if values.shape != rows:
            raise ValueError(f"{name} must have shape {tuple(rows)}, got {shape_of(values)}")
        if values.dtype != lse_dtype(q.dtype):
            raise TypeError(f"{name} must be {lse_dtype(q.dtype)}, got {values.dtype}")
        if values.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {values.device}")
