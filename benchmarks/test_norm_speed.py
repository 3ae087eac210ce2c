"""Norms against torch's and Hugging Face's, with and without the residual they are added to; time and bytes."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from benchmarks.conftest import DEVICE, ROUNDS, Replay
from fastattn.core import capabilities
from fastattn.measuring import bench, measure
from fastattn.measuring.peers import FORWARD, TRAINING

ROWS, WIDTHS = (16384, (128, 1024, 4096, 16384)) if DEVICE.type == "cuda" else (1024, (128, 1024))
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BACKEND = "triton" if DEVICE.type == "cuda" and not capabilities.triton_obstacle(DEVICE) else None
CASES = ("layer norm", "RMS norm", "RMS norm, residual")
PEERS = ("fastattn", "torch", "Hugging Face")


def results(case: str, peer: str, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """y, and the sum with the residual where there is one."""
    asked = {"eps": 1e-6, "backend": BACKEND} if peer == "fastattn" else {"eps": 1e-6}
    if case == "layer norm":
        if peer == "fastattn":
            return (fastattn.layer_norm(x, weight, weight, **asked),)
        return (F.layer_norm(x, x.shape[-1:], weight, weight, **asked),)
    if peer == "fastattn" and case == "RMS norm, residual":
        return fastattn.rms_norm(x, weight, residual=residual, **asked)
    total = x + residual if case == "RMS norm, residual" else x
    if peer == "fastattn":
        y = fastattn.rms_norm(total, weight, **asked)
    elif peer == "torch":
        y = F.rms_norm(total, x.shape[-1:], weight, **asked)
    else:
        # LlamaRMSNorm's formula.
        wide = total.float()
        y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return (y, total) if case == "RMS norm, residual" else (y,)


def call_of(case: str, peer: str, width: int, direction: str) -> measure.Thunk:
    torch.manual_seed(0)
    x, residual = (torch.randn(ROWS, width, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(2))
    weight = torch.randn(width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    leaves = [x, weight, *([residual] if case == "RMS norm, residual" else [])]
    if direction == FORWARD:
        return torch.no_grad()(functools.partial(results, case, peer, x, residual, weight))
    upstreams = [torch.randn_like(x) for _ in range(2)]

    def step() -> tuple[Tensor, ...]:
        found = results(case, peer, x, residual, weight)
        return torch.autograd.grad(found, leaves, upstreams[: len(found)])

    return step


@functools.cache
def measured(case: str, width: int, direction: str) -> dict[str, tuple[measure.Timing, int]]:
    """Time and peak bytes of each peer, measured in interleaved rounds, once a session."""
    calls = {peer: call_of(case, peer, width, direction) for peer in PEERS if is_a_peer(case, peer)}
    for call in calls.values():
        call()
    peaks = {peer: measure.peak_memory(call, DEVICE) for peer, call in calls.items()}
    timings = measure.measure(calls, DEVICE, rounds=ROUNDS)
    return {peer: (timings[peer], peaks[peer]) for peer in calls}


def is_a_peer(case: str, peer: str) -> bool:
    return peer != "Hugging Face" or case.startswith("RMS")


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", (FORWARD, TRAINING))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_norm(request: pytest.FixtureRequest, case: str, width: int, direction: str, peer: str) -> None:
    if not is_a_peer(case, peer):
        pytest.skip("Hugging Face uses torch's")
    timing, peak = measured(case, width, direction)[peer]
    clock = Replay()
    clock.rounds = list(timing.rounds)
    request.node.add_marker(
        pytest.mark.benchmark(timer=clock, group=f"{direction} {case} {ROWS} x {width} {DTYPE}")
    )
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info.update(peak_mib=round(peak / 2**20, 1), device=bench.headline(DEVICE))
    benchmark.pedantic(clock.step, rounds=len(timing.rounds), iterations=1)
