"""Looking inside: `pytest benchmarks/test_lens.py`.

Statistics of attention beside one forward of the same attention; and all head scores of a model by fastattn, by
TransformerLens and from the patterns that eager attention returns, each in a process of its own.

On a CPU run it with one thread (OMP_NUM_THREADS=1): the sweep is a row of small operations.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real_models import smollm2

import fastattn
from benchmarks import head_scores
from benchmarks.conftest import DEVICE, Replay
from fastattn import lens
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


NEEDS = {"fastattn": "transformers", "TransformerLens": "transformer_lens", "Hugging Face eager": "transformers"}


@pytest.mark.parametrize("contender", head_scores.CONTENDERS)
@pytest.mark.parametrize("length", LENGTHS)
def test_head_scores(
    request: pytest.FixtureRequest, note: Callable[[str], None], length: int, contender: str
) -> None:
    """Equal numbers first; then the processor time, and the peak of memory beside the model."""
    _check_memory(contender, length)
    ours, found = _head_scores("fastattn", length), _head_scores(contender, length)
    torch.testing.assert_close(
        torch.tensor(found["scores"]), torch.tensor(ours["scores"]), atol=2e-6, rtol=2e-4, check_dtype=False
    )
    _hand_over(request, note, found, f"all head scores, GPT-2 small, {length} tokens", contender)


def test_head_scores_at_32_thousand_tokens(request: pytest.FixtureRequest, note: Callable[[str], None]) -> None:
    """One layer, because twelve take a quarter of an hour. One pattern of one layer would take 52 GB."""
    pytest.importorskip("transformers")
    found = _head_scores("fastattn", 2**15, layers=1)
    _hand_over(request, note, found, "all head scores, one layer of GPT-2 small, 32768 tokens", "fastattn")


@torch.no_grad()
def test_head_scores_of_smollm2_are_those_of_its_dense_patterns() -> None:
    tokens = head_scores.tokens_of(512) % 49152
    report = lens.head_report(smollm2("fastattn")[0], tokens)
    patterns = smollm2("eager")[0].model(tokens, output_attentions=True, use_cache=False).attentions
    expected = head_scores.scores_of(patterns, tokens)
    found = torch.stack([getattr(report, name) for name in head_scores.SCORES])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-3)


def _check_memory(contender: str, length: int) -> None:
    """Skip what is not installed, and what would not fit."""
    pytest.importorskip(NEEDS[contender], reason=f"{NEEDS[contender]} is not installed")
    if contender == "fastattn":
        return
    needed = 1.25 * head_scores.LAYERS * HEADS * length**2 * 4
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if free < needed:
        pytest.skip(
            f"the patterns of {length} tokens need {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
        )


@functools.cache
def _head_scores(contender: str, length: int, layers: int = head_scores.LAYERS) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.head_scores", contender, str(length)]
    # From 4,096 tokens on a round takes half a minute and more.
    options = ["--layers", str(layers), "--rounds", "3" if length < 4096 else "1"]
    root = Path(__file__).parents[1]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=root)
    if done.returncode:
        pytest.fail(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def _hand_over(
    request: pytest.FixtureRequest, note: Callable[[str], None], found: dict[str, Any], group: str, name: str
) -> None:
    """Hand what was measured to pytest-benchmark, which has no column for memory."""
    clock = Replay()
    clock.rounds = list(found["seconds"])
    request.node.add_marker(pytest.mark.benchmark(timer=clock, group=group))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info["peak_bytes"] = found["peak_bytes"]
    note(f"{group}: {name} {min(found['seconds']):.1f} s, {found['peak_bytes'] / 2**20:,.0f} MiB")
    benchmark.pedantic(clock.step, rounds=len(found["seconds"]), iterations=1)
