"""The time of one token from a cache: equal rows, rows of 1/8 to all of the context, pages; beside PyTorch's own
attention to the same full rows. Below the table: times over PyTorch's, and over what the memory would take."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fastattn
from benchmarks.conftest import DEVICE, ROUNDS, Replay
from fastattn.core import capabilities
from fastattn.measuring import bench, measure

ON_GPU = DEVICE.type == "cuda"
HEADS, KEY_HEADS, WIDTH, PAGE = (32, 8, 128, 16) if ON_GPU else (8, 2, 64, 16)
DTYPES = (torch.bfloat16,) if ON_GPU else (torch.float32, torch.bfloat16)
BACKEND = "triton" if ON_GPU and not capabilities.triton_obstacle(DEVICE) else None
MOST = 2**32 if ON_GPU else 2**27  # elements of keys
CASES = [
    (batch, length, dtype)
    for dtype in DTYPES
    for batch in (1, 8, 64)
    for length in (1024, 8192, 32768)
    if batch * KEY_HEADS * length * WIDTH <= MOST
]
PEERS = ("SDPA", "equal rows", "ragged rows", "pages")


def calls(batch: int, length: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    q = torch.randn(batch, HEADS, 1, WIDTH, device=DEVICE, dtype=dtype)
    k, v = torch.randn(2, batch, KEY_HEADS, length, WIDTH, device=DEVICE, dtype=dtype)
    full = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    parts = torch.linspace(1 / 8, 1, batch, device=DEVICE) if batch > 1 else torch.ones(1, device=DEVICE)
    table = torch.randperm(batch * length // PAGE, device=DEVICE).view(batch, -1).int()
    pages = []
    for cache in (k, v):
        pool = torch.empty(batch * length // PAGE, KEY_HEADS, PAGE, WIDTH, device=DEVICE, dtype=dtype)
        pool[table.long()] = cache.unflatten(2, (-1, PAGE)).transpose(1, 2)
        pages.append(pool)
    ours = functools.partial(fastattn.attention_with_cache, q, backend=BACKEND)
    return {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "equal rows": lambda: ours(k, v, cache_lengths=full),
        "ragged rows": lambda: ours(k, v, cache_lengths=(full * parts).int()),
        "pages": lambda: ours(*pages, cache_lengths=full, block_table=table),
    }


@functools.cache
def measured(batch: int, length: int, dtype: torch.dtype) -> dict[str, measure.Timing]:
    """Each peer, measured in interleaved rounds."""
    found = calls(batch, length, dtype)
    for call in found.values():
        call()
    return measure.measure(found, DEVICE, rounds=ROUNDS)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("batch", "length", "dtype"), CASES, ids=str)
def test_one_token(
    request: pytest.FixtureRequest,
    note: Callable[[str], None],
    batch: int,
    length: int,
    dtype: torch.dtype,
    peer: str,
) -> None:
    timings = measured(batch, length, dtype)
    clock = Replay()
    clock.rounds = list(timings[peer].rounds)
    title = f"B{batch} H{HEADS}/{KEY_HEADS} {length} keys D{WIDTH} {dtype}"
    request.node.add_marker(pytest.mark.benchmark(timer=clock, group=title))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info["device"] = bench.headline(DEVICE)
    benchmark.pedantic(clock.step, rounds=len(timings[peer].rounds), iterations=1)
    if peer == PEERS[-1]:
        fastest = {name: min(timing.rounds) for name, timing in timings.items()}
        ratios = ", ".join(f"{name} {fastest[name] / fastest['SDPA']:.2f}" for name in PEERS[1:])
        read = 2 * batch * KEY_HEADS * length * WIDTH * dtype.itemsize
        note(f"{title}: over SDPA: {ratios}; equal rows read {read / fastest['equal rows'] / 1e9:.1f} GB/s")
