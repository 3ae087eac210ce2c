"""What a GPU run may claim: it passes only if everything asked was run and passed, however it was cut short."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import compilations, report, shards, suite, verdict
from benchmarks.gpu.kernel_cases import kernel_cases
from benchmarks.gpu.state import State
from benchmarks.gpu.suite import Suite
from fastattn.measuring.kinds import BUILDERS, MASK_KINDS, SCORE_KINDS
from fastattn.measuring.paths import ROOT

FAMILIES = tuple(dict.fromkeys(shards.KERNEL_TESTS.values()))


# ---- the suite, cut short in every way ----


def run(folder: Path, *arguments: str, seconds: float = 100.0, **given) -> dict:
    given = {"processes": 1, "state": State(folder / "state"), "root": folder, **given}
    return Suite([*arguments], deadline=time.monotonic() + seconds, **given).run()


def test_file(folder: Path, text: str, name: str = "test_some") -> str:
    path = folder / f"{name}.py"
    path.write_text(text)
    return str(path)


test_file.__test__ = False  # it makes one


def results_of(summary: dict) -> dict:
    """A run in which all else was run and passed."""
    row = {"label": "L", "quantity": "dq", "verdict": "passed"}
    sizes = {"family": "attention", "kind": "full", "dtype": "bfloat16", "width": 64}
    families = summary.get("families") or {}
    passed = {family: {"passed": 3} for family in FAMILIES}
    return {
        "suite": {**summary, "families": {**passed, **families}},
        "kernels": [{**row, "sizes": sizes}],
        "correctness": [row],
        "planned": ["kernels"],
        "sections": [{"title": "kernels", "planned": 1, "reached": 1, "left_out": [], "seconds": 1.0}],
        "speed": [], "features": [], "small_calls": [], "dry_run": False, "only": None,
    }  # fmt: skip


def code(summary: dict) -> int:
    return verdict.verdict_of(results_of(summary)).code


def test_a_suite_that_ran_and_passed_is_complete(tmp_path):
    found = run(tmp_path, test_file(tmp_path, "def test_a(): pass\ndef test_b(): pass\n"))
    assert found["counts"] == {"passed": 2} and found["missing"] == []
    assert code(found) == verdict.PASSED and verdict.proven(results_of(found))


def test_without_pytest_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = run(tmp_path, "tests")
    assert found["missing"] == ["pytest is not installed: no test of the suite was run"]
    assert code(found) == verdict.INCOMPLETE


def test_a_suite_cut_off_before_its_first_test_is_incomplete(tmp_path):
    endless = test_file(tmp_path, "import time\ntime.sleep(60)\ndef test_a(): pass\n")
    found = run(tmp_path, endless, seconds=2.0)
    assert found["counts"] == {} and found["missing"][0].startswith("no test was collected (cut off)")
    assert code(found) == verdict.INCOMPLETE


def test_a_suite_cut_off_in_a_test_counts_the_rest_as_not_run_and_the_next_call_runs_it(tmp_path):
    slow = "import pathlib, time\ndef test_a(): pass\ndef test_b(): time.sleep(0 if GO.exists() else 60)\n"
    path = test_file(
        tmp_path, f"{slow}def test_c(): pass\n".replace("GO", f"pathlib.Path({str(tmp_path / 'go')!r})")
    )
    found = run(tmp_path, path, seconds=25.0)
    assert found["counts"] == {"passed": 1, "not run": 2} and found["missing"] == ["2 of 3 tests not run"]
    assert code(found) == verdict.INCOMPLETE
    (tmp_path / "go").touch()
    asked: list[str] = []
    found = run(tmp_path, path, say=asked.append)
    assert found["counts"] == {"passed": 3} and code(found) == verdict.PASSED
    assert "2 of them to run" in asked[0]


@pytest.mark.parametrize(("signal", "outcome", "expected"), [("SIGKILL", "killed", 2), ("SIGSEGV", "failed", 1)])
def test_a_test_that_loses_its_process_does_not_take_the_others_along(tmp_path, signal, outcome, expected):
    dying = f"import os, signal\ndef test_b(): os.kill(os.getpid(), signal.{signal})\n"
    found = run(tmp_path, test_file(tmp_path, f"def test_a(): pass\n{dying}def test_c(): pass\n"))
    assert found["counts"] == {"passed": 2, outcome: 1}
    assert code(found) == expected and not verdict.proven(results_of(found) | {"kernels": []})


def test_a_test_that_hangs_ends_alone_and_leaves_the_suite_incomplete(tmp_path):
    path = test_file(tmp_path, "import time\ndef test_a(): time.sleep(60)\ndef test_b(): pass\n")
    found = run(tmp_path, path, step_seconds=15.0)
    assert found["counts"] == {"hung": 1, "passed": 1} and found["missing"] == ["1 of 2 tests hung"]
    assert code(found) == verdict.INCOMPLETE


def test_a_file_that_cannot_be_imported_leaves_the_suite_incomplete(tmp_path):
    good = test_file(tmp_path, "def test_a(): pass\n")
    broken = [test_file(tmp_path, "import no_such_library\n", name) for name in ("test_broken", "test_mlp")]
    found = run(tmp_path, good, *broken)
    assert found["counts"] == {"passed": 1}
    (sentence,) = found["missing"]  # one for all that lack the same
    assert all(name in sentence for name in ("test_broken", "test_mlp", "No module named 'no_such_library'"))
    assert found["families"] == {"modules": {"passed": 1, "unreadable": 1}, "mlp": {"unreadable": 1}}
    assert code(found) == verdict.INCOMPLETE


def test_a_process_that_cannot_start_its_tests_is_told_of(tmp_path):
    path = test_file(tmp_path, "import os\nif 'FIRST' not in os.environ: os._exit(3)\ndef test_a(): pass\n")
    # Collected with the variable, then run without it.
    environment = {"FIRST": "1"}
    asked = Suite([path], processes=1, deadline=time.monotonic() + 60, state=State(tmp_path / "s"),
                  root=tmp_path, environment=environment, say=lambda text: environment.clear())  # fmt: skip
    found = asked.run()
    assert found["counts"] == {"not run": 1} and "could not start" in found["missing"][0]


HIDDEN = """import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *more: None if name.partition(".")[0] in {names} else find(name, *more)
"""
PROPERTIES = """import pytest
from without_hypothesis import stand_in
stand_in()
from hypothesis import given, settings, strategies as st
@pytest.mark.parametrize("n", [1, 2])
@settings(max_examples=3)
@given(x=st.integers(0, 3).filter(bool) | st.none())
def test_property(n, x): assert False
def test_example(): pass
"""


def test_without_hypothesis_its_tests_are_named_as_unproven_and_the_others_run(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(HIDDEN.format(names={"hypothesis"}))
    path = [str(tmp_path), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest")
    found = run(tmp_path, test_file(tmp_path, PROPERTIES))
    assert found["counts"] == {"passed": 1, "skipped": 2}
    assert found["missing"] == ["2 tests skipped: Skipped: hypothesis is not installed"]
    assert code(found) == verdict.INCOMPLETE


def test_the_plain_cases_need_neither_pytest_nor_hypothesis():
    script = "import sys, benchmarks.gpu.cases\nprint(*{'pytest', 'hypothesis', 'matplotlib'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# ---- the verdict ----


def changed(**more) -> dict:
    complete = {"counts": {"passed": 3}, "failures": [], "missing": [], "families": {}}
    return {**results_of(complete), **more}


def left_out(title: str) -> dict:
    sections = results_of({})["sections"]
    return {"sections": [*sections, {"title": title, "planned": 9, "reached": 2, "left_out": ["x"] * 7}]}


ROW = {"label": "L", "quantity": "dq", "sizes": {"family": "mlp", "kind": "k", "dtype": "d", "width": 8}}
PROOF = {"family": "mlp", "direction": "forward", "kind": "gated", "dtype": "float16", "width": 1024,
         "size": "small", "ratio": 0.5, "reason": "why"}  # fmt: skip
OURS = {"label": "L", "direction": "forward", "peer": "fastattn triton", "seconds": None, "note": "why"}


@pytest.mark.parametrize(
    ("results", "expected", "sentence"),
    [
        (changed(), verdict.PASSED, "PASSED"),
        (changed(suite={}), verdict.INCOMPLETE, "the test suite did not run"),
        (changed(interrupted=True), verdict.INCOMPLETE, "the run was interrupted"),
        (changed(**left_out("features")), verdict.INCOMPLETE, "features: 7 of 9 cases not run"),
        (changed(planned=["kernels", "mlp"]), verdict.INCOMPLETE, "mlp: not begun"),
        (changed(kernels=[{**ROW, "verdict": "hung: no answer within 90 s"}]), verdict.INCOMPLETE, "L: hung"),
        (changed(kernels=[{**ROW, "verdict": "FAILED: error 3"}]), verdict.FAILED, "L, dq"),
        (changed(correctness=[{**ROW, "verdict": "FAILED: NaN"}]), verdict.FAILED, "L, dq"),
        (changed(record=[{**PROOF, "verdict": "wrong"}]), verdict.FAILED, "mlp forward, gated float16 1024: why"),
        (changed(record=[{**PROOF, "verdict": "not compiled"}]), verdict.FAILED, "gated float16 1024: why"),
        (changed(record=[{**PROOF, "verdict": "hung"}]), verdict.INCOMPLETE, "gated float16 1024: why"),
        (changed(record=[{**PROOF, "verdict": "slower"}]), verdict.PASSED, "PASSED"),
        (changed(speed=[OURS]), verdict.INCOMPLETE, "L, forward: why"),
        (changed(features=[{**OURS, "failed": True}]), verdict.FAILED, "L, forward: why"),
        (changed(speed=[{**OURS, "peer": "eager"}]), verdict.PASSED, "PASSED"),
    ],
)
def test_the_exit_code_and_the_first_line_say_what_is_missing(tmp_path, results, expected, sentence):
    said = verdict.verdict_of(results)
    assert said.code == expected and sentence in said.line
    written = {
        **results,
        "environment": {"device": "G", "date": "D"},
        "ceilings": {},
        "sweep": [],
        "proposals": [],
    }
    written["sections"] = [{"seconds": 0.0, **section} for section in written["sections"]]
    written["suite"] = {"counts": {}, "failures": [], **written["suite"]} if written["suite"] else {}
    written |= {"speed": [], "features": [], "verdict": said._asdict(), "proven": False, "proofs": []}
    (tmp_path / "results.json").write_text(json.dumps(written))
    report.write_report(tmp_path)
    assert sentence in (tmp_path / "report.md").read_text().splitlines()[0]


def with_tests(family: str, **counts: int) -> dict:
    return {"suite": {**changed()["suite"], "families": {**changed()["suite"]["families"], family: counts}}}


@pytest.mark.parametrize(
    "difference",
    [
        {"suite": {}},
        {"only": ["mlp"]},
        {"dry_run": True},
        {"kernels": []},
        {"kernels": [{**ROW, "verdict": "launched"}]},
        left_out("kernels") | {"sections": left_out("kernels")["sections"][1:]},
        with_tests("scores"),
        with_tests("scores", passed=5, lacking=1),
        with_tests("scores", passed=5, hung=1),
        with_tests("mlp", passed=5, unreadable=1),
    ],
)
def test_kernels_are_proven_only_by_a_complete_run(difference):
    assert verdict.proven(changed())
    assert verdict.proven(changed(**with_tests("scores", passed=5, skipped=1)))
    assert verdict.proven(changed(**with_tests("modules", unreadable=7)))
    assert not verdict.proven(changed(**difference))


def test_a_proof_is_recorded_for_each_family_kind_and_dtype():
    results = changed(kernels=[{**ROW, "verdict": v} for v in ("passed", "passed")])
    assert verdict.proofs(results) == [{"family": "mlp", "kind": "k", "dtype": "d", "width": 8, "state": "proven"}]
    results["kernels"].append({**ROW, "verdict": "FAILED: no"})
    assert verdict.proofs(results)[0]["state"] == "failed"


# ---- order and shards ----


def test_kernels_come_first_in_shards_that_keep_the_cases_of_a_function_together():
    tests = [f"tests/x/test_nn.py::test_{n}" for n in range(3)]
    tests += [f"tests/{name}.py::test_a[{n}]" for name in reversed(shards.KERNEL_TESTS) for n in range(4)]
    ordered = shards.in_order([*tests, "tests/test_cli.py::test_x"])
    assert len(ordered) == len(tests) and ordered[0].startswith("tests/test_attention.py")
    assert ordered[-1].startswith("tests/x/test_nn.py")
    cut = shards.cut(ordered)
    assert [test for shard in cut for test in shard] == ordered
    for shard in cut:
        assert sum(shards.KERNEL_SECONDS if "nn" not in t else 0.5 for t in shard) <= shards.SHARD_SECONDS
    whole = [{t.partition("[")[0] for t in shard} for shard in cut]
    assert all(len(set.intersection(a, b)) == 0 for a, b in itertools.pairwise(whole))
    assert shards.in_order(tests, ["mlp"]) == [t for t in tests if "test_mlp" in t]


def test_a_long_test_function_is_shared_out():
    tests = [f"tests/test_mlp.py::test_a[{n}]" for n in range(100)]
    assert len(shards.cut(tests)) == 100 * shards.KERNEL_SECONDS // shards.SHARD_SECONDS + 1
    assert len(shards.cut(tests, dict.fromkeys(tests, 0.01))) == 1


def test_the_files_that_the_order_names_are_there():
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(shards.KERNEL_TESTS) <= files
    assert not set(shards.KERNEL_TESTS) & shards.NOT_ON_A_GPU
    assert suite.LACKING.search("could not import 'transformers': No module named 'transformers'")


def test_the_plain_cases_reach_every_family_kind_and_dtype():
    cases = kernel_cases()
    assert {case.family for case in cases} == set(BUILDERS) == set(FAMILIES)
    for dtype in ("bfloat16", "float16", "float32"):
        kinds = {case.kind for case in cases if case.dtype == dtype}
        assert {"causal", "full", *MASK_KINDS, *SCORE_KINDS} <= kinds
    assert any(case.batch * case.heads > 65535 for case in cases)


def test_compilations_are_counted(tmp_path):
    lines = [
        {"kernel": "k", "hash": h, "seconds": 2.0, "cached": c}
        for h, c in (("a", False), ("a", False), ("b", True))
    ]
    (tmp_path / "c").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compilations.summarize(tmp_path / "c")
    assert found == {"compiled": 2, "different": 1, "seconds": 4.0, "from_cache": 1}


def test_a_state_cut_off_in_the_middle_of_a_line_is_read_as_far_as_it_goes(tmp_path):
    state = State(tmp_path)
    state.keep_case({"kind": "a"}, [{"verdict": "passed"}])
    with (tmp_path / "cases.jsonl").open("a") as file:
        file.write('{"case": "half')
    again = State(tmp_path)
    assert again.rows_of({"kind": "a"}) == [{"verdict": "passed"}] and again.rows_of({"kind": "b"}) is None
    assert State(tmp_path, fresh=True).rows_of({"kind": "a"}) is None


def test_tests_are_found_while_something_else_runs(tmp_path):
    path = test_file(tmp_path, "def test_a(): pass\n")
    about = {"processes": 1, "state": State(tmp_path / "s"), "root": tmp_path}
    suite = Suite([path], deadline=time.monotonic() + 60, **about)
    suite.collect_ahead()
    suite.collecting.join()
    assert len(suite.asked) == 1
    assert suite.run(time.monotonic() + 60)["counts"] == {"passed": 1} and len(suite.asked) == 1
