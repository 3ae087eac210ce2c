"""Attention against eager, compiled eager and each backend of scaled_dot_product_attention."""

from __future__ import annotations

import pytest

from benchmarks.conftest import DEVICE
from fastattn.measuring.bench import usable_peers
from fastattn.measuring.peers import FORWARD, TRAINING, AttentionProblem

# Constant tokens; on a CPU small sizes, in the dtype it computes in.
if DEVICE.type == "cuda":
    PROBLEMS = [
        AttentionProblem(16384 // length, 2048 // width, length, width, causal)
        for width in (64, 128)
        for length in (1024, 4096, 16384)
        for causal in (True, False)
    ]
else:
    PROBLEMS = [AttentionProblem(512 // length, 2, length, 64, True, None, "float32") for length in (128, 512)]


@pytest.mark.parametrize("peer", usable_peers(PROBLEMS[0], DEVICE, compiled=True))
@pytest.mark.parametrize("direction", (FORWARD, TRAINING))
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.label)
def test_attention(report, problem, direction, peer):
    report(problem, direction, peer)
