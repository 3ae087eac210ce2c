"""What `fastattn.invariant()` costs: each call with it and without, in interleaved rounds. Below the table: ratios
of the fastest rounds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from benchmarks.conftest import DEVICE, ROUNDS, Replay
from fastattn.measuring import bench, measure

WIDTH, CLASSES = 512, 32000


def attention(tokens: int, trained: bool = False) -> Callable[[], Any]:
    q, k, v = (torch.randn(1, 8, tokens, 64, device=DEVICE, requires_grad=trained) for _ in "qkv")
    if not trained:
        return lambda: fastattn.attention(q, k, v, causal=True)
    dout = torch.randn_like(q)
    return lambda: torch.autograd.grad(fastattn.attention(q, k, v, causal=True), (q, k, v), dout)


def one_token(key_heads: int, keys: int, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    q = torch.randn(1, 8, 1, 64, device=DEVICE, dtype=dtype)
    k, v = torch.randn(2, 1, key_heads, keys, 64, device=DEVICE, dtype=dtype)
    lengths = torch.tensor([keys], device=DEVICE)
    return lambda: fastattn.attention_with_cache(q, k, v, cache_lengths=lengths)


def mlp(tokens: int) -> Callable[[], Any]:
    x, w1 = torch.randn(tokens, WIDTH, device=DEVICE), torch.randn(4 * WIDTH, WIDTH, device=DEVICE)
    return functools.partial(fastattn.mlp, x, w1, None, w1.t().contiguous(), None)


def loss(tokens: int) -> Callable[[], Any]:
    x, w = torch.randn(tokens, WIDTH, device=DEVICE), torch.randn(CLASSES, WIDTH, device=DEVICE)
    return functools.partial(
        fastattn.linear_cross_entropy, x, w, torch.zeros(tokens, dtype=torch.long, device=DEVICE)
    )


CASES: dict[str, Callable[[], Callable[[], Any]]] = {
    "attention, 1k tokens": lambda: attention(1024),
    "attention, 4k tokens": lambda: attention(4096),
    "attention with gradients, 1k tokens": lambda: attention(1024, trained=True),
    "one token, 1k keys, 8 heads on 2": lambda: one_token(2, 1024),
    "one token, 8k keys, 8 heads on 2": lambda: one_token(2, 8192),
    "one token, 1k keys, 8 heads": lambda: one_token(8, 1024),
    "one token, 8k keys, 8 heads": lambda: one_token(8, 8192),
    "one token, 1k keys, 8 heads on 2, bfloat16": lambda: one_token(2, 1024, torch.bfloat16),
    "MLP, one token": lambda: mlp(1),
    "MLP, 1k tokens": lambda: mlp(1024),
    "loss, one token": lambda: loss(1),
    "loss, 1k tokens": lambda: loss(1024),
}


@functools.cache
def measured(name: str) -> dict[str, measure.Timing]:
    torch.manual_seed(0)
    call = CASES[name]()

    def invariant() -> Any:
        with fastattn.invariant():
            return call()

    calls = {"without": call, "invariant": invariant}
    for warm in (*calls.values(), *calls.values()):
        warm()
    return measure.measure(calls, DEVICE, rounds=ROUNDS)


@pytest.mark.parametrize("way", ["without", "invariant"])
@pytest.mark.parametrize("name", CASES)
def test_cost(request: pytest.FixtureRequest, note: Callable[[str], None], name: str, way: str) -> None:
    timings, clock = measured(name), Replay()
    clock.rounds = list(timings[way].rounds)
    request.node.add_marker(pytest.mark.benchmark(timer=clock, group=name))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info["device"] = bench.headline(DEVICE)
    benchmark.pedantic(clock.step, rounds=len(clock.rounds), iterations=1)
    if way == "invariant":
        without, fixed = (min(timings[way].rounds) for way in ("without", "invariant"))
        note(f"{name}: invariant over without {fixed / without:.2f}")
