"""What a call costs before anything is computed: tiny tensors, beside the calls of PyTorch's that they stand for.

Short rounds, both calls in each of them: on a busy machine the fastest round is the one that nobody disturbed.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from benchmarks.conftest import DEVICE, Replay
from fastattn.measuring import bench, measure
from fastattn.measuring.peers import FORWARD, TRAINING

LENGTH, HEADS, WIDTH, HIDDEN = 8, 2, 16, 32
ROUNDS, SECONDS = 99, 0.002


def heads() -> Tensor:
    """(1, heads, length, width), laid out as a linear layer writes it."""
    return random(1, LENGTH, HEADS, WIDTH).transpose(1, 2)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def eager_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def eager_gated_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def eager_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return fastattn.prepare_heads(x, cos=cos, sin=sin)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastattn.attention(q, k, v, causal=True)


causal_sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=True)
our_sdpa = functools.partial(fastattn.scaled_dot_product_attention, is_causal=True)

WIDE, NARROW = (HIDDEN, WIDTH), (WIDTH, HIDDEN)
# For each case our function, PyTorch's, and how to make their inputs; those without gradient come last.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[], list[Tensor]], int]] = {
    "attention": (causal, causal_sdpa, lambda: [heads(), heads(), heads()], 0),
    "scaled_dot_product_attention": (our_sdpa, causal_sdpa, lambda: [heads(), heads(), heads()], 0),
    "mlp": (
        fastattn.mlp, eager_mlp,
        lambda: [random(1, LENGTH, WIDTH), random(*WIDE), random(HIDDEN), random(*NARROW), random(WIDTH)], 0,
    ),
    "gated_mlp": (
        fastattn.gated_mlp, eager_gated_mlp,
        lambda: [random(1, LENGTH, WIDTH), random(*WIDE), random(*WIDE), random(*NARROW)], 0,
    ),
    "rms_norm": (
        lambda x, w: fastattn.rms_norm(x, w, eps=1e-6), lambda x, w: F.rms_norm(x, (WIDTH,), w, 1e-6),
        lambda: [random(1, LENGTH, WIDTH), random(WIDTH)], 0,
    ),
    "prepare_heads": (
        rotary, eager_rotary, lambda: [heads(), random(LENGTH, WIDTH // 2), random(LENGTH, WIDTH // 2)], 2,
    ),
}  # fmt: skip
PEERS = ("fastattn", "PyTorch")


@functools.cache
def measured(name: str, direction: str) -> dict[str, measure.Timing]:
    """Both in interleaved rounds, once a session."""
    ours, theirs, make, fixed = CASES[name]
    inputs = make()
    leaves = [t.detach().requires_grad_() for t in inputs[: len(inputs) - fixed]]
    rest = inputs[len(leaves) :]
    upstream = torch.randn_like(ours(*inputs))

    def thunk(function: Callable[..., Tensor]) -> Callable[[], Any]:
        if direction == TRAINING:
            return lambda: torch.autograd.grad(function(*leaves, *rest), leaves, upstream)

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward

    calls = {"fastattn": thunk(ours), "PyTorch": thunk(theirs)}
    for call in calls.values():
        call()
    return measure.measure(calls, DEVICE, rounds=ROUNDS, seconds=SECONDS)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", (FORWARD, TRAINING))
@pytest.mark.parametrize("name", CASES)
def test_host_time(request: pytest.FixtureRequest, name: str, direction: str, peer: str) -> None:
    timings = measured(name, direction)
    medians, fastest = (
        figure(timings["fastattn"].rounds) / figure(timings["PyTorch"].rounds)
        for figure in (statistics.median, min)
    )
    clock = Replay()
    clock.rounds = list(timings[peer].rounds)
    group = f"{direction}, {name}: x PyTorch's time: {medians:.2f} (medians), {fastest:.2f} (fastest rounds)"
    request.node.add_marker(pytest.mark.benchmark(timer=clock, group=group))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info.update(
        medians=round(medians, 2), fastest=round(fastest, 2), device=bench.headline(DEVICE)
    )
    benchmark.pedantic(clock.step, rounds=len(timings[peer].rounds), iterations=1)
