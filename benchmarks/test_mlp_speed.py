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
    PROBLEMS = [
        MLPProblem(tokens, width, hidden, gated, "float32")
        for tokens, width, plain, narrower in (
            (256, 128, 512, 320),
            (512, 256, 1024, 704),
            (2048, 512, 2048, 1408),
        )
        for gated, hidden in ((False, plain), (True, narrower))
    ]


@pytest.mark.parametrize("peer", usable_peers(PROBLEMS[0], DEVICE, compiled=True))
@pytest.mark.parametrize("direction", (FORWARD, TRAINING))
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.label)
def test_mlp(report, problem, direction, peer):
    report(problem, direction, peer)
