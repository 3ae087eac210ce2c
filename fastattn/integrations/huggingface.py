"""attn_implementation="fastattn" for every Hugging Face model that dispatches its attention.

    import fastattn.integrations.huggingface
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")

Importing this registers two functions with transformers under that name: one makes masks, one attends. What the
first makes is a `Mask`, a few numbers and the padding, which a model hands on to the second.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface

from fastattn.functional import attention
from fastattn.spec import MAX_HEAD_DIM, MIN_HEAD_DIM

NAME = "fastattn"


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys each query sees, without a tensor of queries x keys; where a tensor is needed, it becomes one.

    As transformers' masks for scaled_dot_product_attention it stands for a bool tensor (batch, 1, queries, keys),
    True is seen: indexed, or given to a function of torch's, it behaves as that tensor.

    Attributes:
        shape: (batch, 1, queries, keys).
        offset: the key at which query 0 stands.
        causal: a query sees keys up to its own.
        window: how many keys before and after its own it sees; None is all.
        padding: (batch, keys), True is seen; or None.
        key_lengths: (batch,) int32, keys from there on are hidden; or None.
        device: where the tensor would be.
    """

    shape: torch.Size
    device: torch.device
    offset: int = 0
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    padding: Tensor | None = None
    key_lengths: Tensor | None = None

    dtype = torch.bool
    ndim = 4

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> Mask | Tensor:
        """Elsewhere: another Mask; in another dtype: the tensor."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, torch.bool):
            return self.dense().to(*args, **kwargs)
        moved = {
            name: t.to(device) for name in ("padding", "key_lengths") if (t := getattr(self, name)) is not None
        }
        return replace(self, device=device or self.device, **moved)

    def dense(self) -> Tensor:
        """The bool tensor (batch, 1, queries, keys)."""
        batch, _, queries, keys = self.shape
        key = torch.arange(keys, device=self.device)
        distance = key - torch.arange(queries, device=self.device)[:, None] - self.offset
        seen = torch.ones_like(distance, dtype=torch.bool)
        left, right = self.window
        right = 0 if self.causal else right
        if left is not None:
            seen &= distance >= -left
        if right is not None:
            seen &= distance <= right
        seen = seen.expand(batch, 1, queries, keys)
        if self.padding is not None:
            seen = seen & self.padding[:, None, None]
        if self.key_lengths is not None:
            seen = seen & (key < self.key_lengths[:, None])[:, None, None]
        return seen

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return function(*args, **kwargs)


def fastattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Mask | Tensor:
    """A `Mask` where the pattern is causal, a window or all, with or without padding; else the bool tensor.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device: as
            transformers calls its mask functions (masking_utils.sdpa_mask); attention_mask is the padding
            (batch, keys seen so far), True or 1 is seen.
    """
    if isinstance(attention_mask, Mask):
        # It was made before, as generate does for all the layers at once.
        return attention_mask
    compiling = torch.compiler.is_compiling()
    pattern = declared_pattern(mask_function, **kwargs) if compiling else known_pattern(mask_function)
    # The offset of a static cache is a tensor: reading it would break a graph, and for one query the row is small.
    unread = isinstance(q_offset, Tensor) and (q_length == 1 or compiling)
    if pattern is not None and not unread:
        mask = Mask(
            torch.Size((batch_size, 1, q_length, kv_length)), torch.device(device), int(q_offset) - kv_offset,
            *pattern, *_padding(attention_mask, kv_length, kv_offset),
        )  # fmt: skip
        if _is_servable(mask):
            return mask
    offset: Any = q_offset
    dense = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, offset, kv_offset, mask_function, attention_mask,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, device=device,
        use_vmap=kwargs.get("use_vmap", False),
    )  # fmt: skip
    assert dense is not None, "no skip was allowed"
    return dense


def _is_servable(mask: Mask) -> bool:
    """Whether `fastattn.attention` has this alignment: there the last query stands at the last key."""
    if not mask.causal and mask.window == (None, None):
        return True
    beyond = mask.shape[3] - mask.shape[2] - mask.offset
    # Keys after the last query (of a static cache, not yet written) are cut off where nothing sees them.
    return beyond == 0 or (mask.causal and beyond > 0)


def _inside(function: Callable) -> tuple[Any, ...]:
    """What a mask function of transformers holds."""
    return tuple(cell.cell_contents for cell in function.__closure__ or ())


# transformers' mask functions with a parameter are closures: known by their code.
_AND = masking_utils.and_masks().__code__
_LEFT = masking_utils.sliding_window_overlay(1).__code__
_BOTH = masking_utils.sliding_window_bidirectional_overlay(1).__code__


def known_pattern(function: Callable) -> tuple[bool, tuple[int | None, int | None]] | None:
    """causal and window of one of transformers' mask functions; None for all other functions."""
    if function is masking_utils.causal_mask_function:
        return True, (None, None)
    if function is masking_utils.bidirectional_mask_function:
        return False, (None, None)
    code = getattr(function, "__code__", None)
    if code is _LEFT:
        (size,) = _inside(function)
        # The window counts the query's own key.
        return False, (size - 1, None)
    if code is _BOTH:
        (size,) = _inside(function)
        return False, (size, size)
    if code is _AND:
        (parts,) = _inside(function)
        return _both([known_pattern(part) for part in parts])
    return None


def declared_pattern(
    function: Callable,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> tuple[bool, tuple[int | None, int | None]] | None:
    """As `known_pattern`, from the arguments beside the function: dynamo does not look into closures.

    transformers allows its skips where nothing but local_size (a window, or the size of chunks) shapes the mask.
    """
    if function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        return known_pattern(function)
    if use_vmap or local_size is None or local_size == getattr(config, "attention_chunk_size", None):
        return None
    if allow_is_causal_skip:
        return True, (local_size - 1, None)
    return (False, (local_size, local_size)) if allow_is_bidirectional_skip else None


def _both(patterns: list) -> tuple[bool, tuple[int | None, int | None]] | None:
    """What all of the patterns let through."""
    if None in patterns:
        return None
    sides = zip(*(window for _, window in patterns), strict=True)
    left, right = (min((s for s in side if s is not None), default=None) for side in sides)
    return any(causal for causal, _ in patterns), (left, right)


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> tuple[Tensor | None, Tensor | None]:
    """The padding of these keys (batch, keys), and key lengths where they say the same.

    Its values are read, once a forward, as transformers reads them for scaled_dot_product_attention: no padding
    need cost nothing, and padding on the right hides whole tiles. Not while compiling.
    """
    if attention_mask is None:
        return None, None
    # The keys of a static cache that are not written yet.
    unwritten = max(0, kv_offset + kv_length - attention_mask.shape[-1])
    padding = F.pad(attention_mask.bool(), (0, unwritten))[:, kv_offset : kv_offset + kv_length]
    if torch.compiler.is_compiling():
        return padding, None
    lengths = padding.sum(-1, dtype=torch.int32)
    on_the_right = padding == (torch.arange(kv_length, device=padding.device) < lengths[:, None])
    none, only_right = torch.stack((padding.all(), on_the_right.all())).tolist()
    if none:
        return None, None
    return (None, lengths) if only_right else (padding, None)


def fastattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers calls its attention functions.

    Args:
        module: the attention module; its `is_causal` counts where neither mask nor `is_causal` is given.
        query: (B, Hq, Lq, D); key (B, Hkv, Lk, D); value (B, Hkv, Lk, Dv), heads not repeated.
        attention_mask: what `fastattn_mask` made; or a tensor (B, 1 or Hq, Lq, Lk), bool (True is seen) or added.
        dropout, scaling, softcap: as `fastattn.attention`'s dropout_p, scale and softcap.
        s_aux: (Hq,), the sinks.
        position_bias: (1 or B, Hq, Lq, Lk), added to the scores.

    Returns:
        (B, Lq, Hq, Dv), and None for the weights, which are never computed.
    """
    if kwargs.get("output_attentions"):
        warnings.warn('attn_implementation="fastattn" computes no attention weights: use "eager"', stacklevel=2)
    queries, keys, width = query.shape[2], key.shape[2], value.shape[3]
    if attention_mask is not None and attention_mask.shape[-1] > keys:
        attention_mask = attention_mask[..., :keys]
    options: dict[str, Any] = {}
    bias: Tensor | None = None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # Without a mask, keys after the last query are those of an empty static cache: not written yet.
        end = queries if causal and 1 < queries < keys else keys
        options["causal"] = causal and queries > 1
    elif isinstance(attention_mask, Mask):
        mask = attention_mask
        end = mask.offset + queries if mask.causal else keys
        options |= {"causal": mask.causal, "window": mask.window, "key_lengths": mask.key_lengths}
        bias = None if mask.padding is None else mask.padding[:, None, None]
    else:
        end, bias = keys, attention_mask
    bias = _added(bias, position_bias)
    if end < keys:
        key, value = key[:, :, :end], value[:, :, :end]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., :end]
    out = attention(
        *(widened(t) for t in (query, key, value)), bias=bias, softcap=softcap, sinks=s_aux, dropout_p=dropout,
        scale=query.shape[3] ** -0.5 if scaling is None else scaling, **options,
    )  # fmt: skip
    return out[..., :width].transpose(1, 2).contiguous(), None


def _added(mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """A mask and a bias as one bias."""
    if mask is None or position_bias is None:
        return position_bias if mask is None else mask
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask


def widened(t: Tensor) -> Tensor:
    """Heads of at least the width that `attention` has: zeros at their end change no score."""
    return F.pad(t, (0, MIN_HEAD_DIM - t.shape[3])) if t.shape[3] < MIN_HEAD_DIM else t


AttentionInterface.register(NAME, fastattn_attention)
AttentionMaskInterface.register(NAME, fastattn_mask)


@dataclass(frozen=True)
class Before:
    """The attention implementations of a model's configurations, to be restored; of a copy's too.

    That its class stands here makes unpickling a patched model register "fastattn".
    """

    implementations: tuple[str | None, ...]

    @classmethod
    def of(cls, model: Any) -> Before:
        return cls(tuple(config._attn_implementation_internal for config in _configurations(model)))

    def restore(self, model: Any) -> None:
        for config, implementation in zip(_configurations(model), self.implementations, strict=True):
            config._attn_implementation_internal = implementation


def _configurations(model: Any) -> list[Any]:
    """Every configuration object in the model, each once, always in the same order."""
    waiting: list[Any] = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop(0)
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


def obstacle(model: Any) -> str | None:
    """Why this model's attention is not to be set to "fastattn"; None if it can be."""
    if model.config._attn_implementation == NAME:
        return 'attn_implementation is "fastattn" already'
    if not model._can_set_attn_implementation():
        return f"the code of {type(model).__name__} does not dispatch its attention"
    if model.config.output_attentions:
        return "config.output_attentions asks for weights, which are never computed"
    widths = [getattr(config, "head_dim", None) or 0 for config in _configurations(model)]
    if max(widths) > MAX_HEAD_DIM:
        return f"its heads are wider than {MAX_HEAD_DIM}"
    return None
