"""MLP and gated MLP against eager, compiled eager and their plain matrix products."""

from __future__ import annotations

import pytest

from benchmarks.conftest import DEVICE
from fastattn.measuring.bench import usable_peers
from fastattn.measuring.peers import FORWARD, TRAINING, MLPProblem

if DEVICE.type == "cuda":
    PROBLEMS = [
        MLPProblem(16384, width, 8 * width // 3 // 64 * 64 if gated else 4 * width, gated)
        for width in (256, 1024, 4096)
        for gated in (False, True)
    ]
else:
    PROBLEMS = [MLPProblem(256, 128, 320 if gated else 512, gated, "float32") for gated in (False, True)]


@pytest.mark.parametrize("peer", usable_peers(PROBLEMS[0], DEVICE, compiled=True))
@pytest.mark.parametrize("direction", (FORWARD, TRAINING))
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.label)
def test_mlp(report, problem, direction, peer):
    report(problem, direction, peer)
