"""torch.nn.functional.scaled_dot_product_attention with the same arguments and results, on the fused attention.

`attend` is used by fastattn.nn's counterparts of torch.nn, and by the takeover of torch's own operators, too.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core import plans
from fastattn.core.attention.functional import attention
from fastattn.core.attention.spec import check_scale
from fastattn.core.capabilities import check_backend
from fastattn.ground.arguments import flag, number, tensor
from fastattn.ground.checks import FLOATING
from fastattn.masks import Lowered, Mask

TOP_LEFT, BOTTOM_RIGHT = "top-left", "bottom-right"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | Mask | Lowered | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: the same arguments, the same result, no L x S tensor.

    What torch refuses raises torch's error. What only torch can compute (nested tensors, other dtypes) is computed
    by torch, with a warning the first time.

    Args:
        query: (..., Hq, L, E); any leading dimensions, or none; those of query, key and value broadcast.
        key, value: (..., H, S, E) and (..., H, S, Ev).
        attn_mask: broadcasts to (..., Hq, L, S). Bool: True is seen. Float: added to the scores, with gradient. Or
            a torch.nn.attention.bias.CausalBias. Or a value of fastattn.masks, or what its `lower` returned: its
            batch is all leading dimensions before the heads. It keeps its own alignment, bottom-right: if L != S,
            `masks.causal()` and is_causal are different masks.
        dropout_p: the probability of dropping a weight, rounded to 16 bits; seeded by torch's generator, but the
            numbers drawn are not torch's.
        is_causal: query i sees keys up to key i (aligned top-left, unlike `fastattn.attention`'s).
        scale: multiplier of the scores; 1/sqrt(E) by default.
        enable_gqa: each head of key and value serves Hq / H query heads in order.
        backend: as `fastattn.attention`'s.

    Returns:
        (..., Hq, L, Ev) in query's dtype. A row that sees no key gives 0. With four dimensions it is laid out
        (B, L, Hq, Ev) in memory, so that heads are joined without a copy; otherwise it is contiguous.

    Raises:
        ValueError: a value of fastattn.masks together with is_causal=True, for another shape, or with inputs that
            only torch takes.

    Example:
        >>> q, k, v = (torch.randn(2, 4, 10, 16) for _ in range(3))
        >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 4, 10, 16])
    """
    call = plans.key((query, key, value, attn_mask), (dropout_p, is_causal, scale, enable_gqa, backend))
    if PLANS.find(call):
        return attention(
            query, key, value, causal=is_causal, scale=query.shape[3] ** -0.5 if scale is None else scale,
            bias=attn_mask, dropout_p=dropout_p, backend=backend,  # type: ignore[arg-type]
        )  # fmt: skip
    is_causal, enable_gqa = flag("is_causal", is_causal), flag("enable_gqa", enable_gqa)
    dropout_p, backend = number("dropout_p", dropout_p), check_backend(backend)
    scale = None if scale is None else check_scale(scale)
    _check_mask(attn_mask, query)
    ours = None
    if isinstance(attn_mask, Mask | Lowered):
        ours = mask_alone("attn_mask", attn_mask, "is_causal", is_causal)
        attn_mask = None
    mask, causal = attn_mask, TOP_LEFT if is_causal else None
    # A torch.nn.attention.bias.CausalBias, recognised by its attribute: importing the class would import dynamo.
    variant = getattr(attn_mask, "variant", None)
    if variant is not None and not is_causal:
        mask, causal = None, BOTTOM_RIGHT if variant.name == "LOWER_RIGHT" else TOP_LEFT
    obstacle = _obstacle(query, key, value, mask, dropout_p, causal, enable_gqa)
    if obstacle:
        if ours is not None:
            raise ValueError(refusal_of_mask("attn_mask", obstacle))
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        warn_once(f"scaled_dot_product_attention: {obstacle}; PyTorch's own function computes it")
        return out
    leading, q, k, v, bias = _four_dimensions(query, key, value, mask, enable_gqa)
    unchanged = all(a is b for a, b in ((q, query), (k, key), (v, value), (bias, attn_mask)))
    if unchanged and (not is_causal or query.shape[2] == key.shape[2]) and dropout_p != 1:
        PLANS.keep(call, True)
    out, _ = attend(
        q, k, v, bias=bias, mask=ours, causal=causal, dropout_p=dropout_p, scale=scale, backend=backend
    )
    shape = (*leading, *out.shape[2:])
    return out if out.shape == shape else _with_shape(out, shape)


def _with_shape(out: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The result for other leading dimensions than batch and heads, contiguous unless it has four dimensions."""
    out = out.reshape(shape)
    return out if out.dim() == 4 else out.contiguous()


# Whether a call is one of `attention` with other names for its arguments.
PLANS: plans.Plans[bool] = plans.Plans("scaled_dot_product_attention")


def _check_mask(attn_mask: Any, query: Any) -> None:
    """Raise unless attn_mask is a plain tensor on query's device. torch's own error would not name attn_mask."""
    if attn_mask is None or isinstance(attn_mask, Mask | Lowered):
        return
    tensor("attn_mask", attn_mask, or_none=True)
    # A CausalBias holds no values and is on no device.
    if isinstance(query, Tensor) and attn_mask.device != query.device and not hasattr(attn_mask, "variant"):
        raise ValueError(f"attn_mask must be on query's device {query.device}, got {attn_mask.device}")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    mask: Mask | Lowered | None = None,
    causal: str | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastattn.attention` with what torch's callers need: dropout_p may be 1, and a causal mask is aligned
    TOP_LEFT or BOTTOM_RIGHT (not together with `mask`). Returns out and lse."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v, bias, aligned = align(q, k, v, bias, causal)
    nothing_is_left = dropout_p == 1
    out, lse = attention(
        q, k, v, **aligned, scale=scale, bias=bias, key_lengths=key_lengths, mask=mask,
        dropout_p=0.0 if nothing_is_left else dropout_p, dropout_state=dropout_state, return_lse=True,
        backend=backend,
    )  # fmt: skip
    return out * 0.0 if nothing_is_left else out, lse


def mask_alone(name: str, mask: Mask | Lowered, hint: str, is_causal: bool) -> Mask | Lowered:
    """The mask, a value of fastattn.masks. Raise if torch's flag `hint` is set, too, because the two may be
    aligned differently."""
    if is_causal:
        raise ValueError(
            f"{hint} must be False if {name} is a value of fastattn.masks: combine that with masks.causal() by & "
            f"instead; got {hint}=True"
        )
    return mask


def refusal_of_mask(name: str, obstacle: str) -> str:
    """The error of a call that only torch can compute, with a value of fastattn.masks."""
    return f"{name} must be a tensor or None where PyTorch computes the call: {obstacle}; got a fastattn mask"


def align(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: str | None
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """A causal mask of either alignment in `fastattn.attention`'s terms: the keys, values and bias to call it
    with, and its options."""
    queries, keys = q.shape[2], k.shape[2]
    if causal != TOP_LEFT or queries == keys:
        return k, v, bias, {"causal": causal is not None}
    if queries > keys:
        # Aligned bottom-right, query i stands at key i - (queries - keys): the window shows so many keys more.
        return k, v, bias, {"window": (None, queries - keys)}
    # No query sees the keys behind the last query. Without them the mask is square.
    if bias is not None and bias.shape[-1] > 1:
        bias = bias[..., :queries]
    return k[:, :, :queries], v[:, :, :queries], bias, {"causal": True}


def _obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    causal: str | None,
    enable_gqa: bool,
) -> str | None:
    """Why this call is left to torch, which computes it or raises; None if it is computed here."""
    tensors = (query, key, value)
    if not all(isinstance(t, Tensor) for t in tensors) or any(t.is_nested for t in tensors):
        return "the inputs are not plain tensors"
    if unserved := dtype_obstacle(query, key, value):
        return unserved
    if min(t.dim() for t in tensors) < (3 if enable_gqa else 2) or len({t.device for t in tensors}) > 1:
        return "the inputs do not fit together"
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        return "the head width is 0"
    if not 0 <= dropout_p <= 1:
        return f"dropout_p is {dropout_p}"
    scores = _shape_of_scores(query, key, value, enable_gqa)
    if scores is None:
        return "the inputs do not fit together"
    if mask is not None and (causal or mask.is_nested or not _fits(mask, scores)):
        return "attn_mask does not fit"
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask is {mask.dtype}"
    return None


def dtype_obstacle(*tensors: Tensor) -> str | None:
    """Why tensors of these dtypes are left to torch; None if they are not. Autocast converts different dtypes."""
    dtypes = {t.dtype for t in tensors}
    if not dtypes <= set(FLOATING):
        return f"the dtype is {tensors[0].dtype}"
    device = tensors[0].device.type
    if len(dtypes) > 1 and (device == "meta" or not torch.is_autocast_enabled(device)):
        return "the dtypes differ"
    return None


def _shape_of_scores(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...] | None:
    """(..., Hq, L, S), or None if the inputs do not fit together."""
    if key.shape[-1] != query.shape[-1] or value.shape[-2] != key.shape[-2]:
        return None
    beside = -3 if enable_gqa else -2
    heads: tuple[int, ...] = ()
    if enable_gqa:
        groups = key.shape[-3]
        if value.shape[-3] != groups or groups == 0 or query.shape[-3] % groups:
            return None
        heads = (query.shape[-3],)
    try:
        leading = torch.broadcast_shapes(*(t.shape[:beside] for t in (query, key, value)))
    except RuntimeError:
        return None
    return (*leading, *heads, query.shape[-2], key.shape[-2])


def _fits(mask: Tensor, scores: tuple[int, ...]) -> bool:
    """Whether the mask broadcasts to the scores."""
    return mask.dim() <= len(scores) and all(
        m in (1, s) for m, s in zip(mask.shape[::-1], scores[::-1], strict=False)
    )


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor, Tensor | None]:
    """The leading dimensions of the result, and the inputs as (batch, heads, length, width)."""
    scores = _shape_of_scores(query, key, value, enable_gqa)
    assert scores is not None
    leading = scores[:-2]
    # One leading dimension is a batch of single heads, whose result is contiguous and which may be empty.
    single_heads = len(leading) == 1 and not enable_gqa
    batches = leading if single_heads else leading[:-1]
    batch = math.prod(batches)

    def folded(t: Tensor) -> Tensor:
        heads = t.shape[-3:-2] if enable_gqa else leading[len(batches) :]
        shape = (batch, math.prod(heads), *t.shape[-2:])
        # torch refuses a sparse tensor.
        return (
            t
            if t.shape == shape and t.layout == torch.strided
            else t.expand(*batches, *heads, *t.shape[-2:]).reshape(shape)
        )

    if single_heads and mask is not None and mask.dim() == 3:
        mask = mask[:, None]
    elif mask is not None and mask.dim() > 3 and mask.shape[:-3] != (batch,):
        mask = mask.expand(*batches, *mask.shape[-3:]).reshape(batch, *mask.shape[-3:])
    return leading, folded(query), folded(key), folded(value), mask


_said: set[str] = set()


def warn_once(message: str) -> None:
    """Warn at the line that called the public function, once in a process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)
