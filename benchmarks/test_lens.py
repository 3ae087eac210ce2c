"""The time of statistics of attention beside one forward of the same attention: `pytest benchmarks/test_lens.py`.

On a CPU run it with one thread (OMP_NUM_THREADS=1): the sweep is a row of small operations.
"""

from __future__ import annotations

import pytest
import torch

import fastattn
from benchmarks.conftest import DEVICE
from fastattn.lens import attention_statistics

# GPT-2 small's heads.
BATCH, HEADS, WIDTH = 1, 12, 64
LENGTHS = (1024, 2048, 4096)
BY_QUERY = ("entropy", "max_logit", "max_weight", "sum_of_squares", "mean_distance", "mass")
BY_KEY = ("received", "max_received", "weighted_received")
ASKED = {
    "forward": (),
    "entropy": ("entropy",),
    "received": ("received",),
    "all by query": BY_QUERY,
    "all by query and by key": BY_QUERY + BY_KEY,
    "induction": ("match_mass",),
    "lag profile": ("lag_profile",),
    "thumbnail": ("thumbnail",),
    "top keys": ("top_keys",),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("length", LENGTHS)
def test_cost(benchmark, length: int, asked: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, length, WIDTH, device=DEVICE) for _ in range(3))
    _, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    labels = torch.arange(length, device=DEVICE)[None] % 50

    def step() -> None:
        if ASKED[asked]:
            attention_statistics(q, k, lse, want=ASKED[asked], labels=labels, query_weights=lse, causal=True)
        else:
            fastattn.attention(q, k, v, causal=True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"statistics, {BATCH} x {HEADS} x {length} x {WIDTH} float32, causal"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
