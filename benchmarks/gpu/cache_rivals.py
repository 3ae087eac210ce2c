"""Other implementations of attention to a cache, each called as its documentation says: one query a row and more.

FlashInfer (docs.flashinfer.ai, "flashinfer.decode"): pages as pairs of (pages, heads, page, width) in the layout
"HND", and the pages of all rows one after another, with where each row's begin. Its `plan` reads the lengths on
the host; as in a model, where one plan serves all layers, it is not timed.

flash-attn 2 and 3 (`flash_attn_with_kvcache`): (batch, tokens, heads, width). Version 2 takes pages of multiples
of 256 tokens only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.measuring import kinds
from fastattn.measuring.kinds import PAGE, Sizes
from fastattn.measuring.peers import Unavailable

Rival = Callable[..., Tensor]
# The modules that these peers import.
LIBRARIES = {
    "FlashInfer": "flashinfer",
    "FlashInfer (tensor cores)": "flashinfer",
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
}
WORKSPACE_BYTES = 128 * 2**20  # what FlashInfer's documentation takes
FLASH_ATTENTION_2_PAGE = 256


def rivals(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], Rival]]:
    """By name, functions that build a rival; of caches that are quantised or latent there is none."""
    if sizes.kind == "contiguous":
        return {
            "SDPA": lambda: _sdpa(sizes, device),
            "SDPA cuDNN": lambda: _sdpa_cudnn(sizes, device),
            "flex_attention": lambda: _flex(sizes, device),
            "flash-attn 2": lambda: _flash_attention("flash_attn", sizes, device),
            "flash-attn 3": lambda: _flash_attention("flash_attn_interface", sizes, device),
            "FlashInfer": lambda: _flashinfer_of_one_row(sizes),
        }
    if sizes.kind == "pages":
        return {
            "SDPA of copied pages": lambda: _sdpa_of_copied_pages(sizes, device),
            "FlashInfer": lambda: _flashinfer(sizes, device, tensor_cores=False),
            "FlashInfer (tensor cores)": lambda: _flashinfer(sizes, device, tensor_cores=True),
            "flash-attn 2": lambda: _flash_attention("flash_attn", sizes, device),
            "flash-attn 3": lambda: _flash_attention("flash_attn_interface", sizes, device),
        }
    return {}


def bytes_needed(sizes: Sizes) -> int:
    """What has to be read of a cache of this kind: each row's keys and values, once, without their scales."""
    widths = sizes.width if "latent" in sizes.kind else 2 * sizes.width
    stored = 1 if {"int8", "fp8"} & set(sizes.kind.split()) else getattr(torch, sizes.dtype).itemsize
    return int(kinds.lengths_of(sizes, torch.device("cpu")).sum()) * sizes.key_heads * widths * stored


def _seen(sizes: Sizes, device: torch.device) -> Tensor:
    """Which tokens of the capacity belong to each row: bool (B, 1, 1, capacity)."""
    lengths = kinds.lengths_of(sizes, device)
    return torch.arange(sizes.keys or sizes.length, device=device) < lengths[:, None, None, None]


def _sdpa(sizes: Sizes, device: torch.device) -> Rival:
    """All rows at the capacity, those behind their length hidden by a mask."""
    seen = _seen(sizes, device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    return call


def _sdpa_of_copied_pages(sizes: Sizes, device: torch.device) -> Rival:
    """What PyTorch does without a kernel for pages: each row's pages are put one after another first."""
    table = kinds.table_of(sizes, device).long()
    seen = _seen(sizes, device)[..., : table.shape[1] * PAGE]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t[table].transpose(1, 2).flatten(2, 3) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    return call


def _sdpa_cudnn(sizes: Sizes, device: torch.device) -> Rival:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    call = _sdpa(sizes, device)

    def by_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return call(q, k, v)

    return by_cudnn


def _flex(sizes: Sizes, device: torch.device) -> Rival:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths, capacity = kinds.lengths_of(sizes, device), sizes.keys or sizes.length
    mask = create_block_mask(
        lambda b, h, i, j: j < lengths[b], sizes.batch, None, sizes.length, capacity, device=device
    )

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    return torch.compile(call, dynamic=False)


def _flash_attention(module: str, sizes: Sizes, device: torch.device) -> Rival:
    flash = imported(module, "flash_attn_with_kvcache")
    asked: dict[str, Any] = {"cache_seqlens": kinds.lengths_of(sizes, device)}
    if sizes.kind == "pages":
        if module == "flash_attn":
            raise Unavailable(f"takes pages of multiples of {FLASH_ATTENTION_2_PAGE} tokens")
        asked["page_table"] = kinds.table_of(sizes, device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash(*(t.transpose(1, 2) for t in (q, k, v)), causal=True, **asked)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return call


def _flashinfer_of_one_row(sizes: Sizes) -> Rival:
    decode = imported("flashinfer", "single_decode_with_kv_cache")
    if sizes.batch > 1 or sizes.length > 1:
        raise Unavailable("takes one query of one row without pages")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cores = sizes.heads > sizes.key_heads  # "faster for large group size"
        return decode(q[0, :, 0], k[0], v[0], kv_layout="HND", use_tensor_cores=cores)[None, :, None]

    return call


def _flashinfer(sizes: Sizes, device: torch.device, tensor_cores: bool) -> Rival:
    wrapper = imported("flashinfer", "BatchDecodeWithPagedKVCacheWrapper")
    if sizes.length > 1:
        raise Unavailable("decodes one query a row")
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    decode = wrapper(workspace, "HND", use_tensor_cores=tensor_cores)
    table = kinds.table_of(sizes, device)
    lengths = kinds.lengths_of(sizes, device).clamp(max=table.shape[1] * PAGE)
    used = (lengths + PAGE - 1) // PAGE
    there = torch.arange(table.shape[1], device=device) < used[:, None]
    starts = F.pad(used.cumsum(0), (1, 0)).int()
    decode.plan(
        starts, table[there], (lengths - (used - 1) * PAGE).int(), sizes.heads, sizes.key_heads, sizes.width, PAGE,
        q_data_type=getattr(torch, sizes.dtype), kv_data_type=getattr(torch, sizes.dtype),
    )  # fmt: skip
    return lambda q, k, v: decode.run(q[:, :, 0], (k, v))[:, :, None]


def imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{module}.{name} cannot be imported") from error
