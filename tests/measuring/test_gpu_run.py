"""The GPU run: nothing that fails or hangs ends it, and what it proposes follows from what it measured."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import compare
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, plan, recorder, report, sweep, verdict
from benchmarks.gpu.pool import compare_survivors
from fastattn.core import plans
from fastattn.core.attention.spec import AttentionSpec
from fastattn.measuring.checking import judge
from fastattn.measuring.paths import ROOT, clean
from fastattn.measuring.peers import BACKWARD, FORWARD, TRAINING, AttentionProblem, MLPProblem
from fastattn.measuring.pool import Worker


@pytest.fixture(scope="module")
def worker():
    worker = Worker("cpu", handlers="tests.gpu_run_cases")
    yield worker
    worker.close()


def ask(worker, kind, *, step_limit=60.0, **case):
    return worker.ask({"kind": kind, **case}, step_limit=step_limit, deadline=time.monotonic() + 100)


def test_a_case_that_raises_says_so_and_the_worker_goes_on(worker):
    answer = ask(worker, "raising")
    assert (answer.step, answer.note) == ("about to raise", "ValueError: no such shape")
    process = worker.process
    assert ask(worker, "obedient", question=21).rows == [{"answer": 42}]
    assert worker.process is process


def test_a_case_that_hangs_or_dies_says_so_and_the_next_one_runs(worker):
    answer = ask(worker, "hanging", step_limit=3.0)
    assert answer.step == "about to hang" and answer.note.startswith("hung: no answer within 3")
    answer = ask(worker, "dying")
    assert answer.step == "about to die"
    assert answer.note == "the process died (exit code 7) segmentation fault, say"
    assert ask(worker, "obedient", question=1).rows == [{"answer": 2}]


def test_the_section_ends_at_its_deadline_whatever_the_case_does(worker):
    ask(worker, "obedient", question=1)
    begin = time.monotonic()
    answer = worker.ask({"kind": "hanging"}, step_limit=60.0, deadline=begin + 0.5)
    assert time.monotonic() - begin < 10
    assert answer.note == "stopped at the section's end" and answer.out_of_time


def test_the_peers_beside_one_that_hangs_or_dies_are_measured_all_the_same(worker):
    case = {"kind": "several", "problem": {}, "label": "L", "direction": FORWARD}
    offences: dict[str, int] = {}
    limits = {"step_limit": 2.0, "deadline": time.monotonic() + 100}
    ask(worker, "obedient", question=1)
    rows = compare_survivors(worker, {**case, "peers": ["a", "hangs", "b", "dies"]}, offences, **limits)
    assert {row["peer"]: row["seconds"] for row in rows} == {"a": 1.0, "b": 1.0, "hangs": None, "dies": None}
    notes = {row["peer"]: row["note"] for row in rows}
    assert notes["hangs"].startswith("hung") and notes["dies"].startswith("the process died")
    assert offences == {"hangs": 1, "dies": 1}
    # Twice is enough: then it is not asked, and costs no time.
    rows = compare_survivors(worker, {**case, "peers": ["a", "hangs"]}, {"hangs": 2}, **limits)
    assert [row["note"] for row in rows] == ["given up after it hung or died before", ""]


def test_a_machine_without_a_gpu_is_told_so_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == verdict.INCOMPLETE
    assert capsys.readouterr().err.count("\n") == 1


def test_the_sliced_definition_is_the_definition():
    generator = torch.Generator().manual_seed(0)

    def random(heads, length):
        return torch.randn(1, heads, length, 8, generator=generator, dtype=torch.float64)

    for queries, keys, causal in ((37, 37, True), (37, 20, True), (20, 37, True), (20, 37, False)):
        q, dout, k, v = random(2, queries), random(2, queries), random(1, keys), random(1, keys)
        spec = AttentionSpec(causal, 0.3)
        whole = correctness.in_slices(q, k, v, dout, spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(correctness, "SLICE_BYTES", 5 * 2 * keys * 8)  # five rows at a time
            for sliced, one in zip(correctness.in_slices(q, k, v, dout, spec), whole, strict=True):
                torch.testing.assert_close(sliced, one, rtol=1e-12, atol=1e-12)


def test_a_wrong_result_is_judged_wrong():
    exact = torch.randn(64, 64, dtype=torch.float64)
    eager = exact.float()
    assert judge("dq", eager, exact, eager)["verdict"] == "passed"
    assert judge("dq", eager * 1.001, exact, eager)["verdict"].startswith("FAILED")
    assert judge("dq", eager * float("nan"), exact, eager)["verdict"].startswith("FAILED")


def test_the_recorder_notes_a_failure_with_its_inputs(tmp_path, monkeypatch):
    record = tmp_path / "record"
    monkeypatch.setattr(recorder, "_path", str(record))

    class Report:
        when, outcome, nodeid, duration, longrepr = "call", "failed", "test_x[L4097]", 0.5, object()
        longreprtext, sections = (
            "assert 1 == 2",
            [("Captured stdout call", "inputs: L=4097"), ("Captured log", "no")],
        )

    recorder.pytest_runtest_logreport(Report())
    assert json.loads(record.read_text())["text"] == "assert 1 == 2\ninputs: L=4097"


def test_results_name_no_folders():
    assert clean("/usr/lib/python3/site-packages/torch/nn.py:3: in f") == "nn.py:3: in f"
    assert clean(f'File "{ROOT}/kernels/tiles.py", line 3') == 'File "kernels/tiles.py", line 3'
    assert (
        clean("see https://pytorch.org/docs/stable, 3/4 of it") == "see https://pytorch.org/docs/stable, 3/4 of it"
    )


def test_the_plan_asks_for_the_important_things_first_and_for_everything_in_the_end():
    real = plan.real_plan()
    assert real.budget <= 540
    lengths = [case["problem"]["length"] for case in real.attention]
    assert set(lengths[:4]) == {4096} and {min(lengths), max(lengths)} == {512, 32768}
    assert {case["problem"]["width"] for case in real.attention} == {64, 128, 256}
    assert {case["direction"] for case in real.attention} == {FORWARD, BACKWARD}
    for case in real.attention:
        problem = case["problem"]
        tokens = problem["batch"] * problem["length"]
        assert tokens == max(plan.TOKENS, problem["length"]) and problem["heads"] * problem["width"] == 2048
    assert {case["problem"]["width"] for case in real.mlp} == {256, 512, 1024, 2048, 4096, 8192}
    assert {case["direction"] for case in real.mlp} == {FORWARD, TRAINING}
    sizes = [case["sizes"] for case in real.correctness if "sizes" in case]
    assert {4096, 32768} <= {s["queries"] for s in sizes} and any(s["queries"] != s["keys"] for s in sizes)


@pytest.mark.parametrize("family", ("sm_80", "sm_90", "sm_100"))
def test_the_sweep_begins_with_the_row_in_the_table_and_what_prove_chooses_from(family):
    from fastattn.kernels import launch

    row = {"peer": "fastattn triton", "ratio": 0.5, "direction": BACKWARD}
    problem = AttentionProblem(1, 16, 4096, 128, True)
    rows = [{**row, "problem": {"family": "attention", **vars(problem)}, "label": "L"}]
    found = sweep.targets(rows, family, 6)
    assert [target["table"] for target in found] == ["ATTENTION_DKDV", "ATTENTION_DQ"]
    for target in found:
        tried = [(*variant["tiling"], variant["ahead"]) for variant in target["variants"]]
        own = sweep.current(target["table"], family, (2, 128)).tiling
        chosen_from = launch.candidates(target["table"], family, 2, 128)
        assert tried[: 1 + len(chosen_from)] == [(*tiling[:4], tiling.ahead) for tiling in (own, *chosen_from)]
        assert len(set(tried)) == len(tried) == sweep.CANDIDATES
        assert set(sweep.SMALL) <= {one[:4] for one in tried}


def test_an_mlp_s_sweep_tries_the_tiles_of_large_products():
    row = {"peer": "fastattn triton", "ratio": 0.5, "label": "L"}
    problem = {"family": "mlp", **vars(MLPProblem(16384, 1024, 4096))}
    rows = [{**row, "direction": direction, "problem": problem} for direction in (FORWARD, TRAINING)]
    tables = {t["table"]: t["variants"] for t in sweep.targets(rows, "sm_90", 6)}
    for table in ("MLP_FORWARD", "MLP_BACKWARD"):
        assert set(sweep.LARGE) <= {variant["tiling"] for variant in tables[table]}


def test_the_furthest_behind_is_swept_first_and_each_row_once():
    def row(width, length, ratio):
        problem = {"family": "attention", **vars(AttentionProblem(1, 2, length, width, True))}
        return {
            "peer": "fastattn triton",
            "ratio": ratio,
            "direction": FORWARD,
            "problem": problem,
            "label": str(length),
        }

    rows = [row(64, 1024, 0.9), row(128, 1024, 0.7), row(128, 2048, 0.6), row(256, 1024, None)]
    assert len(sweep.targets(rows, "sm_90", 1)) == 1
    found = sweep.targets(rows, "sm_90", 6)
    assert [(t["row"][1], t["label"]) for t in found] == [(128, "2048"), (64, "1024")]


def test_an_mlp_is_tried_both_fused_and_with_the_library():
    row = {"peer": "fastattn triton", "ratio": 0.5, "direction": FORWARD, "label": "L"}
    for width, now in ((256, "fused (now)"), (1 << 20, "library (now)")):
        problem = {"family": "mlp", **vars(MLPProblem(16384, width, 1024))}
        first, second = sweep.targets([{**row, "problem": problem}], "sm_80", 0)[0]["variants"]
        assert first["name"] == now and second["fused"] is not first["fused"]


def test_the_table_in_use_is_replaced_while_trying_and_put_back(monkeypatch):
    from fastattn.kernels import launch

    before = launch.ATTENTION_FORWARD
    case = {"table": "ATTENTION_FORWARD", "family": "sm_90", "key": (2, 128), "tiling": (64, 32, 4, 3)}
    forgotten = []
    monkeypatch.setattr(plans, "forget", lambda: forgotten.append(1))
    with sweep.launched_with({**case, "ahead": True}):
        assert forgotten  # a recording of another tiling's launches would be repeated
        assert launch.look_up(launch.ATTENTION_FORWARD, "sm_90", 2, 128).ahead
    with sweep.launched_with(case):
        assert not launch.look_up(launch.ATTENTION_FORWARD, "sm_90", 2, 128).ahead
        assert launch.look_up(launch.ATTENTION_FORWARD, "sm_90", 2, 128)[:4] == (64, 32, 4, 3)
        assert launch.look_up(launch.ATTENTION_FORWARD, "sm_90", 2, 64) == launch.look_up(before, "sm_90", 2, 64)
    assert launch.ATTENTION_FORWARD is before


def test_a_row_is_proposed_only_if_it_wins_by_more_than_the_noise():
    target = {"table": "ATTENTION_DQ", "family": "sm_90", "row": (2, 128), "direction": BACKWARD, "label": "L"}

    def tried(*seconds, spread=0.01):
        return [
            {"name": "", "tiling": (64, 64, 4, n), "seconds": s, "spread": spread} for n, s in enumerate(seconds)
        ]

    assert sweep.proposal(target, tried(1.0, 0.99)) is None
    assert sweep.proposal(target, tried(1.0, 0.9, spread=0.2)) is None
    ahead = [{**one, "ahead": True} for one in tried(1.0, 0.9)]
    assert "Row(2, 128, Tiling(64, 64, 4, 1, ahead=True))" in sweep.proposal(target, ahead)
    assert sweep.proposal(target, tried(1.0, None, 0.9)).startswith(
        "ATTENTION_DQ['sm_90']: Row(2, 128, Tiling(64, 64, 4, 2)),  # 900.000 ms, was 1000.000 (-10%)"
    )


# ---- comparing two runs ----


def results_with(seconds: dict[str, float | None], spread=0.01, **more):
    problem = {"family": "mlp", **vars(MLPProblem(8, 8, 8))}
    rows = [
        {
            "problem": problem,
            "label": "L",
            "direction": FORWARD,
            "peer": p,
            "seconds": s,
            "spread": spread,
            "note": "",
        }
        for p, s in seconds.items()
    ]
    return {"environment": {"device": "G"}, "speed": rows, "suite": {}, "correctness": [], **more}


def test_a_change_counts_when_it_is_outside_the_noise_band():
    before = results_with({"fastattn triton": 1.0, "eager": 2.0})
    for after, outside in ((1.015, False), (1.05, True), (0.985, False), (0.95, True)):
        found = compare.changes(before, results_with({"fastattn triton": after, "eager": 2.0}))
        assert [change.matters for change in found] == [outside, False]
    noisy = compare.changes(before, results_with({"fastattn triton": 1.05, "eager": 2.0}, spread=0.1))
    assert not noisy[0].matters


def test_the_comparison_tells_what_got_faster_slower_and_lost(tmp_path, capsys):
    before = results_with({"fastattn triton": 1.0, "eager": 2.0, "Liger": 1.0}, suite={"failures": []})
    after = results_with(
        {"fastattn triton": 0.5, "eager": 2.2, "Liger": None}, suite={"failures": [{"test": "t1"}]}
    )
    after["environment"] = {"device": "H"}
    for name, results in (("a", before), ("b", after)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "device: G -> H" in said and "-50.0%" in said and "rivals' times changed by +10.0%" in said
    assert said.index("Ours, faster") < said.index("Rivals outside") < said.index("Measured before only")
    assert "Fails now:\n  t1" in said
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 1


def test_a_report_is_written_of_whatever_there_is(tmp_path):
    names = ("sections", "kernels", "correctness", "speed", "features", "small_calls", "sweep", "proposals")
    lists = {name: [] for name in names}
    where = {"device": "G", "date": "D"}
    nothing = {"environment": where, "dry_run": False, "suite": {}, "ceilings": {}, **lists}
    (tmp_path / "results.json").write_text(json.dumps(nothing))
    report.write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("**INCOMPLETE") and text.count("Not reached.") == 7
