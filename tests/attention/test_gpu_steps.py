"""On a GPU the portable backend takes few large steps, and they are exact wherever they are cut.

A pretended GPU computes on the CPU, and every operator it is asked for is counted. A process of its own, because
Triton's interpreter is on in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hardware import ON_GPU

ROOT = Path(__file__).parents[2]
# Operators of a forward and of a backward of 1,024 tokens, views left out: about as many as there were when this
# was written. Tile by tile it took three to ten times as many.
MOST = {
    "dropout": (210, 220),
    "documents": (260, 280),
    "bigbird": (130, 150),
    "random lists": (130, 150),
    "everything": (270, 310),
}
MOST_OF_OTHERS = 65, 80

PROGRAM = """
import json, warnings; warnings.simplefilter("ignore")
import torch
from unittest import mock
from fastattn.core import plans
from fastattn.core.attention import granules, whole_rows
from fastattn.measuring import checking, kinds, tolerance
from fastattn.measuring.kinds import MASK_KINDS, SCORE_KINDS, Sizes
from tests.pretended_gpu import GPUS, pretended_gpus, tensors

VIEWS = {"view", "expand", "slice", "select", "transpose", "unsqueeze", "squeeze", "alias", "detach", "t",
         "permute", "as_strided", "unfold", "split", "unbind", "flatten", "unflatten", "empty", "empty_strided",
         "empty_like",
         "new_empty", "_unsafe_view", "reshape", "split_with_sizes", "lift_fresh", "_reshape_alias", "mT"}
run, counted = tensors._run, []

def counting(operator, arguments, keywords):
    name = operator._schema.name.removeprefix("aten::")
    if operator.namespace == "aten" and name not in VIEWS:
        counted.append(name)
    return run(operator, arguments, keywords)

tensors._run = counting

def wrong(call, sizes):
    "What is wrong of the portable backend; None if nothing is."
    computed, double = checking.results_and_gradients, tuple(t.double() for t in call.tensors)
    ours, eager = (computed(call, backend, call.tensors, sizes) for backend in ("portable", "reference"))
    exact = computed(call, "reference", double, sizes)
    for name, theirs in exact.items():
        about = {"gradient": name[0] == "d", "tiny": 1e-5}
        judged = tolerance.judge(ours[name], theirs, eager[name].to(ours[name].dtype), **about)
        if judged.wrong:
            return f"{name}: {judged.wrong}"

found = {}
with mock.patch.object(torch.version, "cuda", None), pretended_gpus(GPUS["H100"]):
    device = torch.device("cuda", 0)
    for family, kind in [("masks", k) for k in MASK_KINDS] + [("scores", k) for k in SCORE_KINDS]:
        cut = []
        for elements in (2**9, 2**12, 2**14):
            limits = {"GPU_ELEMENTS": elements, "GPU_ROWS": 48, "GPU_CAUSAL_ROWS": 32}
            with mock.patch.multiple(whole_rows, **limits), mock.patch.object(granules, "GPU_ELEMENTS", 2**14):
                plans.forget()
                sizes = Sizes(family, kind, "float32", batch=3, length=100, width=24)
                cut.append(wrong(kinds.build(sizes, device), sizes))
        sizes = Sizes(family, kind, "float32", batch=1, heads=4, length=1024, width=16)
        call = kinds.build(sizes, device)
        leaves = [t.detach().requires_grad_() for t in call.tensors]
        counted.clear()
        out = call.function("portable", *leaves)[0]
        forward = len(counted)
        counted.clear()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        found[kind] = [cut, forward, len(counted)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> Iterator[dict]:
    pytest.importorskip("triton")
    if ON_GPU:
        pytest.skip("PyTorch is built for real GPUs here: two drivers would mix")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_feature_is_exact_wherever_steps_on_a_gpu_are_cut(found: dict) -> None:
    assert {kind: cut for kind, (cut, *_) in found.items() if any(cut)} == {}


@pytest.mark.slow
def test_a_gpu_is_given_few_large_steps(found: dict) -> None:
    most = {kind: MOST.get(kind, MOST_OF_OTHERS) for kind in found}
    over = {k: (forward, backward) for k, (_, forward, backward) in found.items()
            if forward > most[k][0] or backward > most[k][1]}  # fmt: skip
    assert over == {}
