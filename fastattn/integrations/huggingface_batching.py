"""transformers' continuous batching, `model.generate_batch`, on attention to keys in pages.

transformers keeps keys and values of all requests in one tensor of pages, and packs the new tokens of all requests
into one row. It says for each token where to write it and, for each request, where all its keys lie.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache

from fastattn.core import spread
from fastattn.core.attention.varlen import attention_varlen
from fastattn.integrations.huggingface_models import NAME, check_keywords


def attention_of_batch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedAttentionCache,
    batch: dict[str, Any],
    **options: Any,
) -> Tensor:
    """(1, tokens, Hq, Dv) for query (1, Hq, tokens, D), key (1, Hkv, tokens, D) and value (1, Hkv, tokens, Dv).
    Keys and values are written to the cache first.

    Args:
        module: its `layer_idx` says which layer's pages.
        cache: transformers' own.
        batch: cu_seq_lens_q, and by kind of layer cu_seq_lens_k, which tokens and keys belong to which request;
            write_index and read_index, where the tokens go and where each request's keys lie. Other keywords must
            not change the result.
        options: scale, softcap and sinks, as `attention`'s.

    Raises:
        ValueError: a keyword that would change the result, which is named.
    """
    spread.refuse("continuous batching")
    check_batch(module, batch)
    layer: Any = module.layer_idx
    pages: Any = cache.layer_to_allocator[layer]
    starts_q, starts_k = batch["cu_seq_lens_q"], batch["cu_seq_lens_k"][pages.layer_type]
    read, write = batch["read_index"][pages.index], batch["write_index"][pages.index]
    options |= {"causal": True, "window": None}
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if pages.layer_type == "full_attention" and read.numel():
        pages.update(k, v, layer, read[:0], write)  # Without places to read it only writes.
        k, v = pages.get_cache_for_block_table(layer)
        lengths = starts_k.diff()
        table = _block_table(read, starts_k, lengths, k.shape[1])
        out = attention_varlen(q, k, v, starts_q, None, block_table=table, seqused_k=lengths, **options)
    else:
        if pages.layer_type != "full_attention":
            options["window"] = (pages.sliding_window - 1, None)
        k, v = pages.update(k, v, layer, read, write)
        out = attention_varlen(q, k, v, starts_q, starts_k, **options)
    return out[None]


def check_batch(module: nn.Module, batch: dict[str, Any]) -> None:
    """Raise ValueError for a keyword that would change the result and is not computed."""
    if batch.get("is_causal") is False:
        raise ValueError("is_causal must be True in continuous batching, got False")
    known = (*_BATCH, "is_causal")
    check_keywords(module, {name: value for name, value in batch.items() if name not in known})


_BATCH = ("cu_seq_lens_q", "cu_seq_lens_k", "write_index", "read_index", "logits_indices", "logits_processor_args")


def _block_table(read: Tensor, starts: Tensor, lengths: Tensor, page: int) -> Tensor:
    """The pages of each request, (requests, most pages), from the places of its keys: they fill page after
    page."""
    most = -(-int(lengths.max()) // page)
    first = starts[:-1, None] + page * torch.arange(most, device=read.device)
    return (read[first.clamp(max=len(read) - 1).long()] // page).to(torch.int32)


_switch = ContinuousBatchingManager.switch_to_cb_friendly_attn


@functools.wraps(_switch)
def _switch_others(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """transformers' method refuses every name but its own. It goes on deciding about all names but ours."""
    if model.config._attn_implementation != NAME:
        _switch(self, model, *args, **kwargs)


ContinuousBatchingManager.switch_to_cb_friendly_attn = _switch_others  # type: ignore[method-assign]
