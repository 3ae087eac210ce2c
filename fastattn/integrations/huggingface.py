"""attn_implementation="fastattn" for every Hugging Face model that dispatches its attention.

    import fastattn.integrations.huggingface
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")

Importing this registers two functions with transformers under that name. One makes masks: a `Mask` is a few
numbers, the padding, and which sequence each token of a packed row is from. A model passes it on to the other,
which attends.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import output_capturing

from fastattn.core import spread
from fastattn.core.attention.functional import attention
from fastattn.core.attention.varlen import attention_varlen
from fastattn.integrations.huggingface_batching import PagedAttentionCache, attention_of_batch
from fastattn.integrations.huggingface_cache import GrowingCache
from fastattn.integrations.huggingface_decoding import attention_of_one_query, with_sinks
from fastattn.integrations.huggingface_mask import (
    Mask,
    Pattern,
    added,
    declared_pattern,
    fastattn_mask,
    known_pattern,
)
from fastattn.integrations.huggingface_models import (
    NAME,
    Before,
    check_keywords,
    obstacle,
    obstacle_in_code,
    try_against_eager,
)
from fastattn.masks.algebra import Values

__all__ = [
    "NAME", "Before", "GrowingCache", "Mask", "Pattern", "declared_pattern", "fastattn_attention", "fastattn_mask",
    "known_pattern", "obstacle", "obstacle_in_code", "try_against_eager",
]  # fmt: skip


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
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    cache: PagedAttentionCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend, as transformers calls its attention functions.

    Args:
        module: the attention module; its `is_causal` decides if neither a mask nor `is_causal` is given.
        query: (B, Hq, Lq, D); key (B, Hkv, Lk, D); value (B, Hkv, Lk, Dv), heads not repeated.
        attention_mask: what `fastattn_mask` made; or a tensor (B, 1 or Hq, Lq, Lk), bool (True is seen) or added.
        dropout, scaling, softcap: as `fastattn.attention`'s dropout_p, scale and softcap.
        s_aux, sinks: two names of the same argument: (Hq,) the sinks of heads, or (B, Hq, Lq, 1) those of queries.
        position_bias: (1 or B, 1 or Hq, Lq, Lk), added to the scores.
        indices: (B, Lq, n), the only keys that a query may see, in any order.
        block_indices: (B, groups of heads, Lq, n), the only blocks of keys that it may see; -1 is none. The size
            of a block is that of the module's indexer.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,), as transformers passes them for flash-attn: the first token
            of each sequence packed into the batch, and the end. The mask applies, too.
        output_attentions: whether the weights are wanted; the model's own eager attention then computes the call.
        cache: of continuous batching, which then passes cu_seq_lens_k by kind of layer, read_index and
            write_index, too; its lengths say what is seen, not the mask.
        kwargs: keywords that do not change the result (`huggingface_models.HARMLESS`).

    Returns:
        (B, Lq, Hq, Dv), and the weights (B, Hq, Lq, Lk) if they are wanted, else None.

    Raises:
        ValueError: an unknown keyword, which is named; weights of a model without an eager attention; a tensor as
            mask with another number of keys than `key`.
    """
    if isinstance(cache, PagedAttentionCache):
        batch = {
            "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k, "position_bias": position_bias,
            "indices": indices, "block_indices": block_indices, "is_causal": is_causal, "dropout": dropout or None,
            "output_attentions": output_attentions or _collects_weights() or None, **kwargs,
        }  # fmt: skip
        sinks = s_aux if sinks is None else sinks
        out = attention_of_batch(
            module, query, key, value, cache, batch, scale=scaling, softcap=softcap, sinks=sinks
        )
        return out, None
    if cache is not None:
        kwargs["cache"] = cache
    if kwargs:
        check_keywords(module, kwargs)
    wants_weights = output_attentions or _collects_weights()
    if spread.current is not None:
        _check_spread(module, kwargs, attention_mask, wants_weights or cu_seq_lens_q is not None)
        attention_mask = _of_whole_sequence(attention_mask)
    attention_mask = _mask_of(module, query, key, attention_mask, is_causal, indices, block_indices)
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    by_sequence = (
        packed
        and position_bias is None
        and not wants_weights
        and isinstance(attention_mask, Mask)
        and attention_mask.is_of_places
    )
    if packed and not by_sequence:
        attention_mask = _of_boundaries(attention_mask, cu_seq_lens_q, cu_seq_lens_k)
    if wants_weights:
        beside = {"softcap": softcap, "s_aux": s_aux, "sinks": sinks, "position_bias": position_bias}
        return _with_weights(module, query, key, value, attention_mask, dropout, scaling, beside)
    sinks = s_aux if sinks is None else sinks
    by_query = sinks if sinks is not None and sinks.dim() == 4 else None
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if _is_one_query(query, key, attention_mask) and by_query is None and not dropout:
        out = attention_of_one_query(
            query, key, value, attention_mask, position_bias, sinks, scale=scale, softcap=softcap
        )
        return out.contiguous(), None
    key, value, options = _options(query, key, value, attention_mask, position_bias)
    options |= {
        "softcap": softcap, "sinks": sinks if by_query is None else None, "dropout_p": dropout, "scale": scale,
    }  # fmt: skip
    if by_sequence and by_query is not None:
        raise ValueError(
            "cu_seq_lens_q with sinks for each query is not computed: give the packed sequences by position_ids"
        )
    if by_sequence:
        del options["bias"]  # There is none.
        out = _of_sequences(query, key, value, cu_seq_lens_q, cu_seq_lens_k, **options)  # type: ignore[arg-type]
    elif by_query is not None:
        without, lse = attention(query, key, value, return_lse=True, **options)
        out = with_sinks(without, lse, by_query)
    else:
        out = attention(query, key, value, **options)
    return out.transpose(1, 2).contiguous(), None


def _check_spread(module: nn.Module, kwargs: dict[str, Any], mask: Mask | Tensor | None, beside: bool) -> None:
    """Raise ValueError for a call on a part of the sequence that would take it for the whole."""
    assert spread.current is not None
    spread.current.check_positions(kwargs.get("position_ids"), type(module).__name__)
    if beside:
        spread.refuse("a call with output_attentions or cu_seq_lens")
    if isinstance(mask, Mask) and (mask.padding is not None or mask.key_lengths is not None):
        spread.refuse("padding in an attention_mask (give context_parallel mask=masks.key_lengths(...) instead)")
    if isinstance(mask, Tensor):
        spread.refuse("an attention_mask that is a tensor (give context_parallel mask= instead)")


def _of_whole_sequence(mask: Mask | Tensor | None) -> Mask | Tensor | None:
    """The mask of a call on this rank's tokens. Where positions jump, transformers sees the next of several packed
    sequences: it takes the rank's chunks for sequences."""
    if not isinstance(mask, Mask) or mask.documents is None:
        return mask
    assert spread.current is not None
    if not spread.current.is_numbered_by_chunk(mask.documents):
        spread.refuse("a row of packed sequences (give context_parallel mask=masks.documents(ids) instead)")
    return replace(mask, documents=None, lowered=None)


def attention_of_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """A call of one of transformers' attention functions as q, k, v and options of `fastattn.attention`, which
    then computes the same, without dropout.

    Raises:
        ValueError: for what `fastattn.attention` does not take: sinks of each query, keys by indices.
    """
    kwargs.pop("dropout", None)
    check_keywords(module, kwargs)
    attention_mask = _mask_of(module, query, key, attention_mask, is_causal)
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        attention_mask = _of_boundaries(attention_mask, cu_seq_lens_q, cu_seq_lens_k)
    sinks = s_aux if sinks is None else sinks
    if sinks is not None and sinks.dim() == 4:
        raise ValueError("sinks must be one for each head, got one for each query")
    key, value, options = _options(query, key, value, attention_mask, position_bias)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return query, key, value, {**options, "softcap": softcap, "sinks": sinks, "scale": scale}


def _mask_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Mask | Tensor | None,
    is_causal: bool | None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
) -> Mask | Tensor:
    """The mask of a call, for its keys, with all that hides some of them."""
    keys = key.shape[2]
    if mask is not None and mask.shape[-1] != keys:
        mask = _of_these_keys(mask, keys)
    if mask is None:
        mask = _own_mask(module, query, keys, is_causal)
    for shown in (_shown(indices, keys), _shown_blocks(module, block_indices, query.shape[1], keys)):
        mask = mask if shown is None else _restricted(mask, shown)
    return mask


def _is_one_query(query: Tensor, key: Tensor, mask: Mask | Tensor) -> bool:
    """Whether each row has one query, and a mask that says which keys it sees."""
    if spread.current is not None or spread.is_dtensor(query):
        return False  # The row has other queries, on other ranks.
    if query.shape[2] != 1 or not query.shape[0] or query.shape[1] % key.shape[1]:
        return False
    return mask.documents is None if isinstance(mask, Mask) else mask.dim() == 4


def _options(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | Tensor, position_bias: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The keys and values that are seen, and the mask and the bias as `fastattn.attention` takes them."""
    options: dict[str, Any] = {}
    bias, end = mask, key.shape[2]
    if isinstance(mask, Mask):
        options, bias, end = mask.options(query.shape[1]), mask.bias, mask.end  # type: ignore[assignment]
    bias = added(bias, position_bias)  # type: ignore[arg-type,assignment]
    if end < key.shape[2]:
        key, value = key[:, :, :end], value[:, :, :end]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., :end]
    return key, value, {**options, "bias": bias}


def _of_these_keys(mask: Mask | Tensor, keys: int) -> Mask | Tensor:
    """A mask for this many keys. A mask of one key is broadcast, as tensors are, and a longer `Mask` is cut.

    A longer tensor is an error, as in eager attention: a cache with a window has dropped the first keys.
    """
    if mask.shape[-1] == 1:
        return mask.dense() if isinstance(mask, Mask) else mask
    if isinstance(mask, Mask) and mask.shape[-1] > keys:
        return mask.first_keys(keys)
    raise ValueError(f"attention_mask must be for this layer's {keys} keys, got one for {mask.shape[-1]}")


def _collects_weights() -> bool:
    """Whether the model collects its layers' weights. Not every model passes output_attentions on to them."""
    collected = output_capturing._active_collector.get()
    return collected is not None and any(name.endswith("attentions") for name in collected)


def _with_weights(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor,
    dropout: float,
    scaling: float | None,
    beside: dict[str, Tensor | float | None],
) -> tuple[Tensor, Tensor]:
    """The output of the model's eager attention, and its weights."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(
            f'output_attentions asks for weights, which attn_implementation="fastattn" does not compute, and '
            f'{type(module).__name__} has no eager_attention_forward beside it: use attn_implementation="eager"'
        )
    seen = mask.dense() if isinstance(mask, Mask) else mask
    if seen.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        seen = torch.zeros(seen.shape, dtype=query.dtype, device=seen.device).masked_fill(~seen, lowest)
    options = {name: option for name, option in beside.items() if option is not None}
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    return eager(module, query, key, value, seen, dropout=dropout, scaling=scaling, **options)


def _shown(indices: Tensor | None, keys: int) -> Tensor | None:
    """A bool mask (B, 1, Lq, Lk) that shows the keys with these indices (B, Lq, n)."""
    if indices is None:
        return None
    shown = torch.zeros(*indices.shape[:-1], keys + 1, dtype=torch.bool, device=indices.device)
    # -1 and indices beyond the last key stand for no key.
    inside = torch.where((indices >= 0) & (indices < keys), indices, keys).long()
    return shown.scatter(-1, inside, True)[:, None, :, :keys]


def _shown_blocks(module: Any, block_indices: Tensor | None, heads: int, keys: int) -> Tensor | None:
    """A bool mask (B, Hq, Lq, Lk) that shows the blocks of keys with these indices (B, groups of heads, Lq, n)."""
    if block_indices is None:
        return None
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"block_indices needs {type(module).__name__}.indexer.block_size, the size of a block of keys"
        )
    groups = block_indices.shape[1]
    blocks = -(-keys // size)
    shown = torch.cat([_shown(row, blocks) for row in block_indices.unbind(1)], 1)  # type: ignore[misc]
    return shown.repeat_interleave(size, -1)[..., :keys].repeat_interleave(heads // groups, 1)


def _restricted(mask: Mask | Tensor, shown: Tensor) -> Tensor:
    """The mask, hiding also the keys that `shown` hides."""
    seen = mask.dense() if isinstance(mask, Mask) else mask
    return seen & shown if seen.dtype == torch.bool else seen.masked_fill(~shown, float("-inf"))


@torch.compiler.disable  # It reads the boundaries.
def _of_boundaries(mask: Mask | Tensor, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor) -> Mask | Tensor:
    """The mask, hiding also the keys of other packed sequences."""
    batch, _, queries, keys = mask.shape
    sequences = []
    for name, starts, length in (
        ("q", _read(Values(cu_seq_lens_q)), queries),
        ("k", _read(Values(cu_seq_lens_k)), keys),
    ):
        if starts[-1] != batch * length and not (batch == 1 and starts[-1] <= length):
            if isinstance(mask, Mask) and _is_of_the_padding(mask, starts):
                return mask
            raise ValueError(
                f"cu_seq_lens_{name} must end at the {batch} x {length} tokens of the batch if there is an "
                f"attention mask, got {starts[-1]}"
            )
        tokens = torch.arange(batch * length)
        sequences.append(
            torch.searchsorted(torch.tensor(starts), tokens, right=True).view(batch, length).to(mask.device)
        )
    same = (sequences[0][:, :, None] == sequences[1][:, None])[:, None]
    return _restricted(mask, same)


def _is_of_the_padding(mask: Mask, starts: tuple[int, ...]) -> bool:
    """Whether these boundaries are those of the rows of a padded batch, the padding left out."""
    if mask.padding is not None:
        lengths = mask.padding.sum(-1)
    elif mask.key_lengths is not None:
        lengths = mask.key_lengths
    else:
        return False
    return starts == (0, *lengths.cumsum(0).tolist())


def _own_mask(module: nn.Module, query: Tensor, keys: int, is_causal: bool | None) -> Mask:
    """The mask of a call without one: causal, or every key."""
    queries = query.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and queries > 1
    # Keys after the last query belong to an empty static cache and are not written yet.
    offset = min(0, keys - queries) if causal else keys - queries
    return Mask(torch.Size((query.shape[0], 1, queries, keys)), query.device, offset, causal)


@torch.compiler.disable  # It reads values and builds a mask, which is no part of a graph.
def _of_sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, **options: Any
) -> Tensor:
    """`attention` within each of the sequences that lie one after another in the batch."""
    queries, keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    starts_q, starts_k = (
        torch.tensor(_read(Values(cu_seq_lens)), dtype=torch.int32, device="cpu")
        for cu_seq_lens in (cu_seq_lens_q, cu_seq_lens_k)
    )
    out = attention_varlen(queries, keys, values, starts_q, starts_k, **options)
    return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


@functools.lru_cache(maxsize=4)
def _read(starts: Values) -> tuple[int, ...]:
    """The boundaries as numbers. On a GPU the first layer waits for the device, later layers do not.

    Numbers are cached, not a tensor: that would belong to the mode in which it was made (inference, fake tensors).
    """
    return tuple(starts.tensor.tolist())


AttentionInterface.register(NAME, fastattn_attention)
AttentionMaskInterface.register(NAME, fastattn_mask)
# So that unpickling a patched model imports this module, which registers "fastattn".
Before.__module__ = __name__
