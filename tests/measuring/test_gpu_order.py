"""In which order a GPU run proves: minutes on a GPU are rare, so what most programs call comes first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks.gpu import rehearsal
from benchmarks.gpu.kernel_cases import kernel_cases, kind_of
from fastattn.measuring import prove_cases, prove_worker
from fastattn.measuring.paths import ROOT


def assert_in_rounds(kinds: list) -> None:
    """One of each before the second of any."""
    met: Counter = Counter()
    rounds = [met.update([kind]) or met[kind] for kind in kinds]
    assert rounds == sorted(rounds)


def test_what_most_programs_call_is_proven_first_and_one_of_each_kind_before_the_second_of_any():
    cases = prove_cases.cases()
    common = [one for one in cases if prove_cases.is_common(one)]
    assert cases[: len(common)] == common
    assert_in_rounds([(one["family"], one["proves"]) for one in common])
    kinds = {(one["family"], one["proves"]) for one in common}
    assert {kind for family, (some, _) in prove_cases.COMMON.items() for kind in some} == {k for _, k in kinds}
    for family, kind in kinds:
        forms = {
            (one["dtype"], one["width"]) for one in common if (one["family"], one["proves"]) == (family, kind)
        }
        assert {dtype for dtype, _ in forms} == {"bfloat16", "float16"} and len({width for _, width in forms}) > 1
    # Of the rest each kind comes soon: none waits for another's every width.
    met: dict = {}
    for place, one in enumerate(cases):
        met.setdefault((one["family"], one["proves"]), place)
    assert max(met.values()) < len(common) + len(met)


def test_the_plain_cases_have_one_of_each_kind_before_the_second_of_any():
    kinds = [kind_of(sizes) for sizes in kernel_cases()]
    assert_in_rounds(kinds)
    assert len(set(kinds)) < len(kinds) / 6


# Prints the names of the kernels that the first of the plain cases launch; nothing is compiled.
NAMES = """
import sys, tempfile, pathlib
import torch
from triton.runtime.jit import JITFunction
from benchmarks.gpu import rehearsal
from benchmarks.gpu.kernel_cases import kernel_cases, kind_of
from fastattn.core import plans
from fastattn.measuring.ahead import compiling_only

names = set()
JITFunction._do_compile = lambda kernel, *_: names.add(kernel.fn.__name__)
plans.Repeats.MOST = 0  # what is not compiled cannot be recorded
cases = kernel_cases()
first = cases[: len(set(map(kind_of, cases)))]
with rehearsal.pretended(), tempfile.TemporaryDirectory() as folder, compiling_only(pathlib.Path(folder)):
    for sizes in first:
        for step in rehearsal._call({"sizes": sizes.as_json()}, torch.device("cuda", 0)):
            step()
print(*names)
"""


@pytest.mark.slow
def test_after_one_case_of_each_kind_every_kernel_was_launched(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if reason := rehearsal.obstacle():
        pytest.skip(f"no GPU can be pretended: {reason}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", NAMES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sources = [path.read_text() for path in (ROOT / "kernels").rglob("*.py")]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    assert set(done.stdout.split()) == kernels


# ---- how often something is timed ----


def rounds_of(ours: float, *others: float, monkeypatch) -> int:
    """How many rounds are timed, if each call always takes so long."""
    seconds = {"triton": ours, **{f"other {number}": taken for number, taken in enumerate(others)}}
    asked: Counter = Counter()

    def taken(name, count, device):
        asked[name] += 1
        return seconds[name]

    monkeypatch.setattr(prove_worker, "seconds_a_call", taken)
    found = prove_worker.compare({name: name for name in seconds}, "cpu")  # type: ignore[arg-type, dict-item]
    assert found == seconds and len(set(asked.values())) == 1
    return asked["triton"] - 1  # the first call tells how many to repeat


@pytest.mark.parametrize(
    ("ours", "others", "rounds"),
    [
        (1.0, (3.0,), prove_worker.FEW_ROUNDS),
        (3.0, (1.0,), prove_worker.FEW_ROUNDS),
        (1.0, (3.0, 1.2), prove_worker.ROUNDS),  # far ahead of one only
        (3.0, (1.0, 3.0), prove_worker.FEW_ROUNDS),  # behind one is behind
        (1.0, (1.2,), prove_worker.ROUNDS),
        (1.0, (0.99,), prove_worker.MOST_ROUNDS),
        (1.0, (9.0, 1.01), prove_worker.MOST_ROUNDS),
    ],
)
def test_a_clear_ratio_takes_few_rounds_and_a_near_tie_many(ours, others, rounds, monkeypatch):
    scale = 1e-3  # so that the time allowed suffices for all rounds
    assert rounds_of(ours * scale, *(o * scale for o in others), monkeypatch=monkeypatch) == rounds


def test_one_slow_round_among_few_decides_nothing():
    times = {"triton": [1.0, 4.0], "portable": [3.0, 3.0]}
    assert not prove_worker.decided(times)
