"""Attention with a mask of block lists, beside dense causal attention and other libraries with the same mask:
forward, and backward where they have one; with visited and ideal granules, and peak memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fastattn
from benchmarks.conftest import DEVICE
from fastattn import masks
from fastattn.core import capabilities
from fastattn.measuring.measure import peak_memory

ON_GPU = DEVICE.type == "cuda"
BATCH, HEADS, WIDTH = (1, 12, 64) if ON_GPU else (1, 2, 64)
LENGTHS = (4096, 16384) if ON_GPU else (1024, 2048, 4096, 8192)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BACKEND = "triton" if ON_GPU and not capabilities.triton_obstacle(DEVICE) else None

MASKS = {
    "bigbird": lambda length: masks.bigbird(),
    "16 documents": lambda length: masks.documents(torch.arange(length) * 16 // length) & masks.causal(),
    "longformer": lambda length: masks.longformer(256, [0, 1]),
    "window as lists": lambda length: masks.from_function(lambda b, h, i, j: (i - j).abs() <= 256),
}
# BigBird at every length, the others at one.
CASES = [(kind, length) for kind in MASKS for length in (LENGTHS if kind == "bigbird" else LENGTHS[1:2])]


@functools.cache
def lowered(kind: str, length: int) -> masks.Lowered:
    return MASKS[kind](length).lower(BATCH, HEADS, length, length, DEVICE)


@functools.lru_cache(maxsize=1)
def dense(kind: str, length: int) -> Tensor:
    return MASKS[kind](length).dense(BATCH, HEADS, length, length, DEVICE)


@functools.lru_cache(maxsize=1)
def block_mask(kind: str, length: int):
    seen = dense(kind, length).expand(BATCH, HEADS, length, length)
    return create_block_mask(lambda b, h, i, j: seen[b, h, i, j], BATCH, HEADS, length, length, device=DEVICE)


def ours(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastattn.attention(q, k, v, mask=lowered(kind, q.shape[2]), backend=BACKEND)


def ours_causal(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastattn.attention(q, k, v, causal=True, backend=BACKEND)


def sdpa_dense_mask(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense(kind, q.shape[2]))


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def flex(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled_flex()(q, k, v, block_mask=block_mask(kind, q.shape[2]))


PEERS: dict[str, Callable[..., Tensor]] = {
    "fastattn": ours,
    "fastattn, dense causal": ours_causal,
    "sdpa, dense mask": sdpa_dense_mask,
    "flex_attention, compiled": flex,
}


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("kind", "length"), CASES)
def test_masked_attention(benchmark, kind: str, length: int, peer: str, direction: str) -> None:
    if peer.startswith("flex") and not ON_GPU:
        pytest.skip("flex_attention has no backward on a CPU, and compiles minutes for a forward")
    q, k, v = (
        torch.randn(BATCH, HEADS, length, WIDTH, device=DEVICE, dtype=DTYPE).requires_grad_() for _ in "qkv"
    )
    function = PEERS[peer]

    def step() -> None:
        with torch.set_grad_enabled(direction == "training"):
            out = function(kind, q, k, v)
        if direction == "training":
            torch.autograd.grad(out.sum(), (q, k, v))
        if ON_GPU:
            torch.cuda.synchronize()

    plan = lowered(kind, length)
    benchmark.group = f"{kind}, {BATCH} x {HEADS} x {length} x {WIDTH} {DTYPE}, {direction}"
    benchmark.extra_info["visited granules"] = plan.visited_granules
    benchmark.extra_info["ideal granules"] = plan.ideal_granules
    benchmark.pedantic(step, rounds=9, warmup_rounds=1)
    benchmark.extra_info["peak MiB"] = peak_memory(step, DEVICE) / 2**20
