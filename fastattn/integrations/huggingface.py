"""attn_implementation="fastattn" for every Hugging Face model that dispatches its attention.

    import fastattn.integrations.huggingface
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")

Importing this registers two functions with transformers under that name: one makes masks, one attends. What the
first makes is a `Mask`, a few numbers, the padding and which sequence each token of a packed row is from, which a
model hands on to the second.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface

from fastattn import masks
from fastattn.functional import attention
from fastattn.masks.algebra import Values, smaller
from fastattn.modes import kept
from fastattn.varlen import attention_varlen

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
        documents: (batch, keys) on the CPU, a number for each sequence packed into a row: a query sees keys of its
            own; or None. There are then as many queries as keys.
        lowered: with documents, all but the padding as `fastattn.attention` takes it, for all layers.
        device: where the tensor would be.
    """

    shape: torch.Size
    device: torch.device
    offset: int = 0
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    padding: Tensor | None = None
    key_lengths: Tensor | None = None
    documents: Tensor | None = None
    lowered: masks.Lowered | None = None

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
        lowered = None if self.lowered is None else self.lowered.to(device or self.device)
        return replace(self, device=device or self.device, lowered=lowered, **moved)

    @property
    def end(self) -> int:
        """Keys from there on are seen by none."""
        return min(self.offset + self.shape[2], self.shape[3]) if self.causal else self.shape[3]

    @property
    def bias(self) -> Tensor | None:
        """The padding as `fastattn.attention`'s bias."""
        return None if self.padding is None else self.padding[:, None, None]

    @property
    def is_of_places(self) -> bool:
        """Whether nothing matters but how far the key is from the query."""
        return self.padding is None and self.key_lengths is None and self.documents is None

    def options(self, heads: int) -> dict[str, Any]:
        """All but the padding, as `fastattn.attention`'s arguments."""
        if self.documents is not None:
            return {"mask": self.of_heads(heads)}
        beside = {} if self.key_lengths is None else {"key_lengths": self.key_lengths}
        return {"causal": self.causal, "window": self.window, **beside}

    def of_heads(self, heads: int) -> masks.Lowered:
        """Of a mask with documents, all but the padding, for so many heads."""
        if self.lowered is not None and self.lowered.shape.heads == heads:
            return self.lowered
        assert self.documents is not None
        left, right = self.window
        mask = masks.documents(self.documents) & masks.window(left, 0 if self.causal else right)
        if self.key_lengths is not None:
            mask = mask & masks.key_lengths(self.key_lengths)
        batch, _, queries, keys = self.shape
        return mask.lower(batch, heads, queries, keys, self.device)

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
        if self.documents is not None:
            documents = self.documents.to(self.device)
            seen = seen & (documents[:, :, None] == documents[:, None])[:, None]
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
    """A `Mask` where the pattern is causal, a window or all, with or without padding, in rows of one or of several
    sequences; else the bool tensor.

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
        documents = None if pattern.documents is None else pattern.documents.cpu()
        mask = Mask(
            torch.Size((batch_size, 1, q_length, kv_length)), torch.device(device), int(q_offset) - kv_offset,
            pattern.causal, pattern.window, *_padding(attention_mask, kv_length, kv_offset), documents,
        )  # fmt: skip
        if _is_servable(mask) and _has_its_places(pattern):
            return mask if documents is None else replace(mask, lowered=mask.of_heads(_heads(kwargs)))
    offset: Any = q_offset
    dense = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, offset, kv_offset, mask_function, attention_mask,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, device=device,
        use_vmap=kwargs.get("use_vmap", False),
    )  # fmt: skip
    assert dense is not None, "no skip was allowed"
    return dense


def _heads(options: dict[str, Any]) -> int:
    """The model's query heads, as far as its configuration tells; layers with others lower a mask again."""
    return getattr(options.get("config"), "num_attention_heads", None) or 1


def _is_servable(mask: Mask) -> bool:
    """Whether `fastattn.attention` has this alignment: there the last query stands at the last key."""
    _, _, queries, keys = mask.shape
    if mask.documents is not None:
        return mask.offset == 0 and queries == keys and mask.documents.shape == (mask.shape[0], keys)
    if not mask.causal and mask.window == (None, None):
        return True
    beyond = keys - queries - mask.offset
    # Keys after the last query (of a static cache, not yet written) are cut off where nothing sees them.
    return beyond == 0 or (mask.causal and beyond > 0)


class Pattern(NamedTuple):
    """What a mask function of transformers shows, without the padding.

    causal, window: as `Mask`'s.
    documents: (batch, tokens), which of the sequences in a row each token is from; or None.
    positions: (batch, tokens), by which causal and window go, if not by the token's place in the row; or None.
    """

    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    documents: Tensor | None = None
    positions: Tensor | None = None


def _has_its_places(pattern: Pattern) -> bool:
    """Whether tokens of one sequence are as far apart in the row as their positions say.

    transformers finds the sequences by their positions, so they are; a mask function of other origin may differ.
    """
    if pattern.positions is None:
        return True
    if pattern.documents is None or pattern.documents.shape != pattern.positions.shape:
        return False
    step = pattern.documents.diff(dim=-1)
    return bool(((step > 0) | ((step == 0) & (pattern.positions.diff(dim=-1) == 1))).all())


def _inside(function: Callable) -> dict[str, Any]:
    """What a mask function of transformers holds, by name."""
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


# transformers' mask functions with a parameter are closures: known by their code.
_AND = masking_utils.and_masks().__code__
_LEFT = masking_utils.sliding_window_overlay(1).__code__
_BOTH = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_PACKED = masking_utils.packed_sequence_mask_function(torch.empty(0)).__code__
_BY_POSITION = masking_utils.remap_positions_for_packed_sequence(_inside, torch.empty(0)).__code__


def known_pattern(function: Callable) -> Pattern | None:
    """What one of transformers' mask functions shows; None for all other functions."""
    if function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Pattern()
    code = getattr(function, "__code__", None)
    if code is _LEFT:
        # The window counts the query's own key.
        return Pattern(window=(_inside(function)["sliding_window"] - 1, None))
    if code is _BOTH:
        size = _inside(function)["sliding_window"]
        return Pattern(window=(size, size))
    if code is _PACKED:
        return Pattern(documents=_inside(function)["packed_sequence_mask"])
    if code is _BY_POSITION:
        held = _inside(function)
        inner = known_pattern(held["mask_function"])
        simple = inner is not None and inner.documents is None and inner.positions is None
        return inner._replace(positions=held["position_ids"]) if inner is not None and simple else None
    if code is _AND:
        together: Pattern | None = Pattern()
        for part in _inside(function)["mask_functions"]:
            together = _both(together, known_pattern(part))
        return together
    return None


def declared_pattern(
    function: Callable,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Pattern | None:
    """As `known_pattern`, from the arguments beside the function: dynamo does not look into closures.

    transformers allows its skips where nothing but local_size (a window, or the size of chunks) shapes the mask.
    """
    if function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        return known_pattern(function)
    if use_vmap or local_size is None or local_size == getattr(config, "attention_chunk_size", None):
        return None
    if allow_is_causal_skip:
        return Pattern(causal=True, window=(local_size - 1, None))
    return Pattern(window=(local_size, local_size)) if allow_is_bidirectional_skip else None


def _both(first: Pattern | None, second: Pattern | None) -> Pattern | None:
    """What both let through; None if that is not one pattern."""
    if first is None or second is None:
        return None
    tensors = []
    for one, other in ((first.documents, second.documents), (first.positions, second.positions)):
        if one is not None and other is not None and one is not other:
            return None
        tensors.append(other if one is None else one)
    left, right = (smaller(a, b) for a, b in zip(first.window, second.window, strict=True))
    return Pattern(first.causal or second.causal, (left, right), *tensors)


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
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
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
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,), as transformers passes on for flash-attn: where each of the
            sequences packed into the batch begins, and the end. A mask that hides more than what is before or
            after the query goes first, as it does there.

    Returns:
        (B, Lq, Hq, Dv), and None for the weights, which are never computed.
    """
    if kwargs.get("output_attentions"):
        warnings.warn('attn_implementation="fastattn" computes no attention weights: use "eager"', stacklevel=2)
    keys = key.shape[2]
    if attention_mask is not None and attention_mask.shape[-1] > keys:
        attention_mask = attention_mask[..., :keys]
    if attention_mask is None:
        attention_mask = _own_mask(module, query, keys, is_causal)
    end = keys
    if isinstance(attention_mask, Mask):
        options, bias, end = attention_mask.options(query.shape[1]), attention_mask.bias, attention_mask.end
    else:
        options, bias = {}, attention_mask
    bias = _added(bias, position_bias)
    if end < keys:
        key, value = key[:, :, :end], value[:, :, :end]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., :end]
    options |= {
        "softcap": softcap, "sinks": s_aux, "dropout_p": dropout,
        "scale": query.shape[3] ** -0.5 if scaling is None else scaling,
    }  # fmt: skip
    of_places = bias is None and isinstance(attention_mask, Mask) and attention_mask.is_of_places
    if of_places and cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        out = _of_sequences(query, key, value, cu_seq_lens_q, cu_seq_lens_k, **options)
    else:
        out = attention(query, key, value, bias=bias, **options)
    return out.transpose(1, 2).contiguous(), None


def _own_mask(module: nn.Module, query: Tensor, keys: int, is_causal: bool | None) -> Mask:
    """The mask of a call without one: causal or all."""
    queries = query.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and queries > 1
    # Keys after the last query are those of an empty static cache: not written yet.
    offset = min(0, keys - queries) if causal else keys - queries
    return Mask(torch.Size((query.shape[0], 1, queries, keys)), query.device, offset, causal)


@torch.compiler.disable  # What it reads and builds is no matter of a graph.
def _of_sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, **options: Any
) -> Tensor:
    """`attention` of each of the sequences that lie one after another in the batch."""
    queries, keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    starts_q, starts_k = (_read(Values(cu_seq_lens)) for cu_seq_lens in (cu_seq_lens_q, cu_seq_lens_k))
    out = attention_varlen(queries, keys, values, starts_q, starts_k, **options)
    return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


@kept(4)
def _read(starts: Values) -> Tensor:
    """On the CPU, where they are needed: on a GPU the first layer waits for them, the others do not."""
    return starts.tensor.cpu()


def _added(mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """A mask and a bias as one bias."""
    if mask is None or position_bias is None:
        return position_bias if mask is None else mask
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask


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
    return None
