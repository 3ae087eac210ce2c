"""Linear cross-entropy, forward and backward, against whole logits and torch's chunked option; time and bytes."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import fastattn
from benchmarks.conftest import DEVICE, ROUNDS, Replay
from fastattn.core import capabilities
from fastattn.measuring import bench, measure

# Tokens, width, classes, dtype.
if DEVICE.type == "cuda":
    SIZES = ((4096, 4096, 128256, torch.bfloat16), (8192, 1024, 32768, torch.bfloat16))
else:
    SIZES = ((1024, 512, 32000, torch.float32),)
BACKEND = "triton" if DEVICE.type == "cuda" and not capabilities.triton_obstacle(DEVICE) else None
# "of each token": reduction="none", whose backward computes the logits again.
PEERS = ("fastattn", "fastattn, of each token", "whole logits", "torch chunked")
TRAINED = ("input and weight", "input")


def call_of(peer: str, sizes: tuple[int, int, int, torch.dtype], trained: str) -> measure.Thunk:
    tokens, width, classes, dtype = sizes
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
    w = (torch.randn(classes, width, device=DEVICE) * width**-0.5).to(dtype).requires_grad_(trained != "input")
    target = torch.randint(classes, (tokens,), device=DEVICE)

    def loss() -> torch.Tensor:
        if peer == "whole logits":
            return F.cross_entropy(x @ w.t(), target)
        if peer == "torch chunked":
            return F.linear_cross_entropy(x, w, target, options=torch.nn.LinearCrossEntropyOptions())
        if peer == "fastattn":
            return fastattn.linear_cross_entropy(x, w, target, backend=BACKEND)
        return fastattn.linear_cross_entropy(x, w, target, reduction="none", backend=BACKEND).mean()

    def step() -> None:
        x.grad = w.grad = None
        loss().backward()

    return step


@functools.cache
def measured(sizes: tuple[int, int, int, torch.dtype], trained: str) -> dict[str, tuple[measure.Timing, int]]:
    """Time and peak bytes of each peer, gradients included; measured in interleaved rounds, once a session."""
    calls = {peer: call_of(peer, sizes, trained) for peer in PEERS if is_there(peer)}
    peaks = {}
    for peer, call in calls.items():
        call()
        peaks[peer] = measure.peak_memory(call_of(peer, sizes, trained), DEVICE)
    timings = measure.measure(calls, DEVICE, rounds=ROUNDS)
    return {peer: (timings[peer], peaks[peer]) for peer in calls}


def is_there(peer: str) -> bool:
    return peer != "torch chunked" or hasattr(torch.nn, "LinearCrossEntropyOptions")


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: " x ".join(map(str, sizes[:3])))
def test_loss(request: pytest.FixtureRequest, sizes: tuple, trained: str, peer: str) -> None:
    if not is_there(peer):
        pytest.skip("torch has it since 2.13")
    timing, peak = measured(sizes, trained)[peer]
    clock = Replay()
    clock.rounds = list(timing.rounds)
    request.node.add_marker(pytest.mark.benchmark(timer=clock, group=f"loss, gradient of {trained}, {sizes}"))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info.update({"peak MiB": peak / 2**20, "device": bench.headline(DEVICE)})
    benchmark.pedantic(clock.step, rounds=len(timing.rounds))
