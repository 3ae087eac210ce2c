"""A GPU run that is cut off: the most important comes first, and what is there is on disk at any time."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import plan, report, run, state
from fastattn.core import proofs
from fastattn.core.proofs import Key, Row

STEPS = ["kernels", "record", "ahead", "ceilings", "attention", "mlp", "features", "small calls", "sweep", "suite"]


@pytest.fixture
def one_run(tmp_path):
    environment = {"device": "G", "date": "2026-01-01", "driver": None}
    planned = replace(plan.real_plan(), device="cpu", processes=1)
    found = run.Run(planned, tmp_path, environment, state.State(tmp_path / "state"))
    found.save()
    found.tests.collect_ahead = lambda: None
    return found


def test_proofs_come_first_then_what_is_timed_and_the_test_suite_last(one_run, monkeypatch):
    began = []

    def noting(name):
        def step(*given):
            # Whatever came before is in the report.
            assert not began or (one_run.folder / "report.md").exists()
            (one_run.folder / "report.md").unlink(missing_ok=True)
            began.append(given[0] if given else name)

        return step

    for name in ("kernels", "record", "ahead", "ceilings", "speed", "sweep", "suite"):
        monkeypatch.setattr(one_run, name, noting(name))
    one_run.go()
    assert began == STEPS
    assert set(run.SHARES) == set(STEPS) and sum(run.SHARES.values()) == pytest.approx(1.0)


def test_the_first_calls_that_are_timed_are_causal_and_of_the_usual_widths():
    first = [case["problem"] for case in plan.attention_cases({})][:8]
    assert all(problem["causal"] for problem in first)
    assert {(problem["width"], problem["length"]) for problem in first} == {
        (width, length) for width in (64, 128) for length in (4096, 16384)
    }
    families = [case["family"] for case in plan.real_plan().features]
    assert set(families[:10]) >= {"norm", "loss", "cache", "heads", "masks"}


def test_a_run_that_is_interrupted_within_the_record_leaves_record_and_report(one_run, monkeypatch):
    key = Key("norm", "forward", "rms", "bfloat16", 1024, proofs.CLASSES[0])

    class CutOff:
        def __init__(self, cases, workers, keep, **limits):
            self.keep, self.one = keep, next(one for one in cases if one["family"] == "norm")

        def go(self):
            self.keep([Row(key, proofs.PROVEN, ratio=1.5)])
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "Prover", CutOff)
    machine = proofs.machine(torch.device("cpu"))
    monkeypatch.setattr(proofs, "machine", lambda device: machine)
    monkeypatch.setattr(one_run, "kernels", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        one_run.go()
    written = json.loads((one_run.folder / "record.json").read_text())
    assert len(written["rows"]) == 1
    one_run.results["interrupted"] = True
    assert one_run.finish().code == 2
    text = (one_run.folder / "report.md").read_text()
    assert text.startswith("**INCOMPLETE") and "1 proven" in text
    # The next call knows what this one proved.
    again = state.State(one_run.state.folder)
    assert any("record" in name for name in again.cases)


def test_the_next_call_goes_on_where_a_section_was_cut_off(one_run, tmp_path):
    cases = [{"label": name, "number": number} for number, name in enumerate("abcd")]
    ran = []

    def rows_of(worker, case, deadline):
        ran.append(case["label"])
        cut_off = case["label"] == "c" and ran.count("c") == 1
        return ([], False) if cut_off else ([{"quantity": case["label"], "verdict": "passed"}], True)

    def call():
        later = run.Run(one_run.plan, tmp_path, {"device": "G", "date": ""}, state.State(tmp_path / "state"))
        later.section("some", "kernels", cases, time.monotonic() + 60, later.crew, rows_of)
        return later.results["sections"][-1], [row["quantity"] for row in later.results["kernels"]]

    section, rows = call()
    assert section["left_out"] == ["c"] and rows == ["a", "b", "d"]
    section, rows = call()
    assert ran == ["a", "b", "c", "d", "c"] and not section["left_out"] and sorted(rows) == ["a", "b", "c", "d"]


def test_the_report_says_how_much_of_what_is_needed_a_token_reads(tmp_path):
    row = {"problem": {"family": "cache"}, "label": "C", "direction": "forward", "note": "", "spread": 0.0}
    ours = {**row, "peer": "fastattn triton", "seconds": 2e-3, "bytes_needed": 2 * 10**9, "ratio": 0.5}
    absent = {**row, "peer": "FlashInfer", "seconds": None, "ratio": None, "note": "cannot be imported"}
    results = {"features": [ours, {**row, "peer": "SDPA", "seconds": 1e-3, "ratio": 1.0}, absent]}
    text = report._tokens({**results, "ceilings": {"copy_tbytes_per_second": 3.0}})
    assert "| C | 2000 | 1907 | 1 | 3.00 | 0.50 | SDPA 0.50 |" in text and "FlashInfer: cannot be" in text
    assert "C | 2000" in report._tokens({**results, "ceilings": {}})
