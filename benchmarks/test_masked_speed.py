"""Attention under a mask of block lists against dense causal attention and what else can say the mask, forward and
backward where they have one; with visited and ideal granules."""

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
from fastattn import capabilities, masks

ON_GPU = DEVICE.type == "cuda"
BATCH, HEADS, LENGTH, WIDTH = (1, 12, 16384, 64) if ON_GPU else (1, 2, 2048, 64)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BACKEND = "triton" if ON_GPU and not capabilities.triton_obstacle(DEVICE) else None

MASKS = {
    "bigbird": masks.bigbird(),
    "16 documents": masks.documents(torch.arange(LENGTH) * 16 // LENGTH) & masks.causal(),
    "longformer": masks.longformer(256, [0, 1]),
    "window as lists": masks.from_function(lambda b, h, i, j: (i - j).abs() <= 256),
}


@functools.cache
def lowered(kind: str) -> masks.Lowered:
    return MASKS[kind].lower(BATCH, HEADS, LENGTH, LENGTH, DEVICE)


@functools.cache
def dense(kind: str) -> Tensor:
    return MASKS[kind].dense(BATCH, HEADS, LENGTH, LENGTH, DEVICE)


@functools.cache
def block_mask(kind: str):
    seen = dense(kind).expand(BATCH, HEADS, LENGTH, LENGTH)
    return create_block_mask(lambda b, h, i, j: seen[b, h, i, j], BATCH, HEADS, LENGTH, LENGTH, device=DEVICE)


def ours(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastattn.attention(q, k, v, mask=lowered(kind), backend=BACKEND)


def ours_causal(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastattn.attention(q, k, v, causal=True, backend=BACKEND)


def sdpa_dense_mask(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense(kind))


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def flex(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled_flex()(q, k, v, block_mask=block_mask(kind))


PEERS: dict[str, Callable[..., Tensor]] = {
    "fastattn": ours,
    "fastattn, dense causal": ours_causal,
    "sdpa, dense mask": sdpa_dense_mask,
    "flex_attention, compiled": flex,
}


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("kind", MASKS)
def test_masked_attention(benchmark, kind: str, peer: str, direction: str) -> None:
    if peer.startswith("flex") and not ON_GPU:
        pytest.skip("flex_attention has no backward on a CPU, and compiles minutes for a forward")
    q, k, v = (
        torch.randn(BATCH, HEADS, LENGTH, WIDTH, device=DEVICE, dtype=DTYPE).requires_grad_() for _ in "qkv"
    )
    function = PEERS[peer]

    def step() -> None:
        out = function(kind, q, k, v)
        if direction == "training":
            torch.autograd.grad(out.sum(), (q, k, v))
        if ON_GPU:
            torch.cuda.synchronize()

    plan = lowered(kind)
    benchmark.group = f"{kind}, {BATCH} x {HEADS} x {LENGTH} x {WIDTH} {DTYPE}, {direction}"
    benchmark.extra_info["visited granules"] = plan.visited_granules
    benchmark.extra_info["ideal granules"] = plan.ideal_granules
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
