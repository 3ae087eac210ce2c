"""`fastattn prove`: a kernel serves where it was found right and not slower, and nowhere else.

Triton's interpreter stands in for a GPU. It is slow, so tests say how long calls took where that decides.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from types import SimpleNamespace

import proving_workers
import pytest
import torch
from hardware import ON_GPU

import fastattn
from fastattn.cli import main
from fastattn.core import capabilities, proofs
from fastattn.core.attention.spec import AttentionSpec
from fastattn.core.cache.spec import CacheSpec
from fastattn.core.capabilities import BACKWARD, CLASSES, FORWARD, TANGENT, Request
from fastattn.core.heads.spec import HeadsSpec
from fastattn.core.loss.spec import LossSpec
from fastattn.core.mlp.spec import ALWAYS, NEVER, MLPSpec
from fastattn.core.norm import triton as norm_kernels
from fastattn.core.norm.spec import NormSpec
from fastattn.core.proofs import Key, Question, Record, Row
from fastattn.core.statistics.spec import StatisticsSpec
from fastattn.measuring import checking, doctor, kinds, prove, prove_cases, prove_worker
from fastattn.measuring.kinds import Sizes
from fastattn.measuring.measure import one_line
from fastattn.measuring.paths import ROOT
from fastattn.measuring.pool import Answer, Worker

pytestmark = pytest.mark.skipif(ON_GPU, reason="Triton's interpreter stands in for a GPU")
CPU = torch.device("cpu")
RMS = Request("norm", NormSpec(), (torch.empty(1, 37, 16),))


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(proofs.VARIABLE)
    monkeypatch.setattr(proofs, "_held", [])
    monkeypatch.setattr(proofs, "_told", set())
    proofs.forget()
    yield
    monkeypatch.undo()
    proofs.forget()


class Here:
    """Runs cases in this process, in place of a Worker."""

    def __init__(self, *_: object) -> None:
        self.asked: list[dict] = []

    def ask(self, case, *, step_limit, deadline):
        self.asked.append(case)
        try:
            return Answer(rows=prove_worker.HANDLERS[case["kind"]](case, CPU, lambda step: None))
        except Exception as error:
            return Answer(step="check", note=one_line(error), failed=True)

    def close(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch):
    """RMS norms only. Ours takes as long as `here.ours` says, what serves otherwise takes 1."""
    found = SimpleNamespace(ours=0.5, worker=Here())
    small = prove_cases.small_cases
    only = lambda families: [one for one in small(families) if one["proves"] == "rms"]  # noqa: E731
    monkeypatch.setattr(prove_cases, "small_cases", only)
    monkeypatch.setattr(prove, "Worker", lambda *_: found.worker)
    monkeypatch.setattr(prove_worker, "compare", lambda calls, device: {"triton": found.ours, "portable": 1.0})
    return found


class Right(Here):
    """Finds every kernel right and twice as fast, and computes nothing."""

    def ask(self, case, **limits):
        self.asked.append(case)
        return Answer(rows=proving_workers.HANDLERS[case["kind"]](case, CPU, lambda step: None))


@pytest.fixture
def right(monkeypatch):
    found = SimpleNamespace(worker=Right())
    monkeypatch.setattr(proving_workers, "GOES_WRONG", {})
    monkeypatch.setattr(prove, "Worker", lambda *_: found.worker)
    return found


def verdicts(record: Record) -> set[str]:
    return {row.verdict for row in record.rows.values()}


# ---- what is proven ----


def test_a_kernel_that_is_right_and_not_slower_serves_from_then_on(here, monkeypatch):
    x, calls = torch.randn(37, 16), []
    forward = norm_kernels.forward
    monkeypatch.setattr(norm_kernels, "forward", lambda *given: calls.append(1) or forward(*given))
    before = fastattn.rms_norm(x, torch.ones(16))
    assert not calls
    record = fastattn.prove("cpu", families=["norm"])
    assert verdicts(record) == {proofs.PROVEN} and {row.ratio for row in record.rows.values()} == {2.0}
    assert all(0 <= row.error <= row.allowed for row in record.rows.values())
    assert {row.against for row in record.rows.values()} == {""}  # only attention has several ways
    calls.clear()
    torch.testing.assert_close(fastattn.rms_norm(x, torch.ones(16)), before)
    assert calls
    # Another dtype was not proven, another family neither.
    assert capabilities.choose(dataclasses.replace(RMS, tensors=(RMS.tensors[0].half(),)), FORWARD) == "portable"
    q = torch.empty(1, 2, 8, 16)
    assert capabilities.choose(Request("attention", AttentionSpec(), (q, q, q)), FORWARD) == "portable"


def test_a_slow_kernel_stays_off(here):
    here.ours = 1.01
    record = fastattn.prove("cpu", families="norm")
    assert verdicts(record) == {proofs.SLOWER}
    assert capabilities.choose(RMS, FORWARD) == "portable"
    feature = next(f for f in capabilities.FEATURES if f.proof == "rms")
    assert doctor.served_by(feature, CPU) == ("portable", "0 of 2 proven, 0.99 x")


@pytest.mark.parametrize("fault", ["wrong", "other bits", "nan"])
def test_a_kernel_broken_on_purpose_is_refused(fault, here, monkeypatch, capsys):
    forward, drift = norm_kernels.forward, iter(range(1000))

    def broken(*given):
        y, *rest = forward(*given)
        change = {"wrong": lambda: y * 1.001, "other bits": lambda: y + 1e-7 * next(drift), "nan": lambda: y / 0}
        return (change[fault](), *rest)

    monkeypatch.setattr(norm_kernels, "forward", broken)
    assert main(["prove", "--device", "cpu", "--families", "norm"]) == 1
    rows = proofs.record_of(CPU).rows
    assert {r.verdict for k, r in rows.items() if k.direction == FORWARD} == {proofs.WRONG}
    assert all("result 0 of rms" in r.reason for k, r in rows.items() if (k.direction, k.kind) == (FORWARD, "rms"))
    assert capabilities.choose(RMS, FORWARD) == "portable"
    assert "6 proven" not in capsys.readouterr().out


def test_a_wrong_backward_leaves_the_forward_alone(here, monkeypatch):
    backward = norm_kernels.backward

    def broken(*given):
        dx, *rest = backward(*given)
        return (dx * 1.001, *rest)

    monkeypatch.setattr(norm_kernels, "backward", broken)
    fastattn.prove("cpu", families=["norm"])
    assert capabilities.choose(RMS, FORWARD) == "triton" and capabilities.choose(RMS, BACKWARD) == "portable"


@pytest.fixture
def spilling(here, monkeypatch):
    """RMS norms whose kernels spill as `spilling.of` says: by direction, registers."""
    here.of = {}

    class Spilling(prove_worker.Spilling):
        def step(self, name):
            super().step(name)
            if self.direction in here.of:
                self.launched("norm_kernel", SimpleNamespace(n_spills=here.of[self.direction]))

    monkeypatch.setattr(prove_worker, "Spilling", Spilling)
    return here


def test_a_kernel_that_spills_stays_off_and_the_doctor_says_how_fast_it_is(spilling, capsys):
    spilling.of = {FORWARD: 12, BACKWARD: 12}
    record = fastattn.prove("cpu", families=["norm"])
    assert verdicts(record) == {proofs.SPILLS} and {row.ratio for row in record.rows.values()} == {2.0}
    assert {row.reason for row in record.rows.values()} == {"norm_kernel spills 12 registers; 2 x as fast"}
    assert capabilities.choose(RMS, FORWARD) == "portable"
    doctor.report_proofs(CPU)
    assert "0 of 1 proven, 1 spills" in (said := capsys.readouterr().out)
    assert "norm_kernel spills 12 registers; 2 x as fast" in said


@pytest.mark.parametrize(("off", "on"), [(FORWARD, BACKWARD), (BACKWARD, FORWARD)])
def test_a_kernel_that_spills_is_refused_in_the_direction_that_launches_it_and_serves_in_the_other(
    off, on, spilling
):
    spilling.of = {off: 2}
    record = fastattn.prove("cpu", families=["norm"])
    assert {key.direction for key, row in record.rows.items() if row.verdict == proofs.SPILLS} == {off}
    assert capabilities.choose(RMS, off) == "portable" and capabilities.choose(RMS, on) == "triton"


def test_a_few_spills_can_be_allowed(spilling, capsys):
    spilling.of = {FORWARD: 2, BACKWARD: 3}
    fastattn.prove("cpu", families=["norm"])
    assert main(["prove", "--device", "cpu", "--families", "norm", "--allow-spills", "2"]) == 0
    assert capabilities.choose(RMS, FORWARD) == "triton" and capabilities.choose(RMS, BACKWARD) == "portable"
    row = next(row for key, row in proofs.record_of(CPU).rows.items() if key.direction == FORWARD)
    assert row.reason == "norm_kernel spills 2 registers, which was allowed"
    # What is proven is not proven again.
    asked = len(spilling.worker.asked)
    fastattn.prove("cpu", families=["norm"])
    assert len(spilling.worker.asked) == asked


def test_a_spill_that_is_allowed_does_not_excuse_a_slow_kernel(spilling):
    spilling.of, spilling.ours = {FORWARD: 2}, 3.0
    record = fastattn.prove("cpu", families=["norm"], allow_spills=2)
    assert verdicts(record) == {proofs.SLOWER}


@pytest.mark.parametrize(
    ("first", "name", "found"),
    [(FORWARD, "a_kernel", {FORWARD: (2, "a_kernel"), BACKWARD: (7, "a_kernel")}),
     # The forward's kernel has its verdict in the forward's rows.
     (TANGENT, "attention_forward_kernel", {}),
     (TANGENT, "attention_tangent_kernel", {TANGENT: (2, "attention_tangent_kernel")})],
)  # fmt: skip
def test_spills_count_in_the_direction_that_launches_the_kernel(first, name, found):
    spilling = prove_worker.Spilling(first)
    for more in (0, 2, None):
        spilling.step("ours")
        spilling.launched(name, SimpleNamespace(n_spills=more))
        if first == FORWARD:
            spilling.step("gradients")
            spilling.launched(name, SimpleNamespace(n_spills=7))
    assert spilling.most == found


def test_launches_are_noted_by_name_while_they_are_asked_for(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(jit.JITFunction, "run", lambda kernel, *arguments, **options: SimpleNamespace(n_spills=3))
    kernel, found = SimpleNamespace(__name__="a_kernel"), []
    with prove_worker.launched(lambda name, compiled: found.append((name, prove_worker.spills_of(compiled)))):
        jit.JITFunction.run(kernel, 1, grid=(1,))
    jit.JITFunction.run(kernel, 2, grid=(1,))
    assert found == [("a_kernel", 3)]


def test_a_kernel_that_does_not_compile_stays_off(here, monkeypatch):
    def refusing(*given):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(norm_kernels, "forward", refusing)
    record = fastattn.prove("cpu", families=["norm"])
    assert verdicts(record) == {proofs.NOT_COMPILED}
    assert all("shared memory" in row.reason for row in record.rows.values())


@pytest.mark.slow
def test_a_kernel_that_hangs_or_kills_its_process_ends_alone(monkeypatch):
    limited = lambda *given, **more: Prover(*given, **{**more, "step_limit": 6.0})  # noqa: E731
    Prover = prove.Prover
    monkeypatch.setattr(prove, "Prover", limited)
    cases = [one for one in prove_cases.small_cases() if one["proves"] in ("rms", "rotary", "gated")]
    monkeypatch.setattr(prove, "to_prove", lambda *_: cases)
    record = prove._prove(
        CPU, 100, prove.FAMILIES, worker_of=lambda: Worker("cpu", "tests.proving_workers")
    ).record
    found = {key.family: row for key, row in record.rows.items()}
    assert (found["norm"].verdict, found["norm"].reason) == (proofs.HUNG, "check: hung: no answer within 6 s")
    assert found["heads"].verdict == proofs.WRONG and "process died (exit code 7)" in found["heads"].reason
    assert found["mlp"].verdict == proofs.PROVEN


def test_what_serves_otherwise_may_fail(here, monkeypatch):
    def full(calls, device):
        raise AssertionError("nothing to compare")

    thunk = prove_worker.thunk

    def failing(call, backend, direction):
        if backend == "portable":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return thunk(call, backend, direction)

    monkeypatch.setattr(prove_worker, "compare", full)
    monkeypatch.setattr(prove_worker, "thunk", failing)
    record = fastattn.prove("cpu", families=["norm"])
    assert verdicts(record) == {proofs.PROVEN} and {row.ratio for row in record.rows.values()} == {None}


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_needs_more_memory_than_there_is_gets_no_verdict(backend, here, monkeypatch):
    results, thunk = checking.results_and_gradients, prove_worker.thunk

    def full(call, asked, *rest):
        if asked == backend:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (thunk if rest == (FORWARD,) or rest == (BACKWARD,) else results)(call, asked, *rest)

    monkeypatch.setattr(
        *((prove_worker, "thunk") if backend == "triton" else (checking, "results_and_gradients")), full
    )
    assert not fastattn.prove("cpu", families=["norm"]).rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, proves",
    [("attention", ""), ("attention", "lse gradient"), ("attention", "absorbed"),
     ("forward mode", ""), ("cache", ""), ("cache", "quantised"), ("cache", "latent"),
     ("mlp", ""), ("heads", ""), ("loss", ""), ("loss", "temperature"), ("loss", "filter")],
)  # fmt: skip
def test_the_kernels_of_every_family_pass_in_the_interpreter(family, proves, here, monkeypatch):
    case = next(one for one in prove_cases.cases((family,)) if not proves or one["proves"] == proves)
    one = prove_cases._shrunk(case)
    monkeypatch.setattr(prove, "to_prove", lambda *_: [one])
    record = fastattn.prove("cpu", families=[family])
    assert {row.verdict: row.reason for row in record.rows.values()} == {proofs.PROVEN: ""}


# ---- which calls ----


@pytest.mark.parametrize("one", prove_cases.small_cases(), ids=lambda one: f"{one['family']} {one['proves']}")
def test_every_case_is_about_the_calls_that_its_row_names(one):
    """What dispatch would ask the record for such a call, in each direction, is what the case proves, and decides
    alone."""
    sizes = Sizes(**one["timed"][CLASSES[0]])
    # Only the Triton backend computes a layer as a whole; and autograd derives some of portable's gradients.
    backend = "triton" if one["family"] in ("attention", "mlp") else "portable"
    for wanted in prove_cases.keys(one):
        call = kinds.build(sizes, CPU)
        with prove_worker.asked() as questions:
            prove_worker.thunk(call, backend, wanted.direction)()
        (question,) = {q for q in questions if q.direction == wanted.direction and q.family == wanted.family}
        assert question.key(one["proves"]) == wanted and one["proves"] in question.kinds
        assert one["proves"] == capabilities.TOGETHER or question.deciding == (one["proves"],) or (
            one["family"], one["proves"], question.deciding) == ("heads", "scale", ("norm", "rotary", "scale")
        )  # fmt: skip


def request_of(sizes: Sizes, record: str) -> Request:
    def heads(n: int, length: int, width: int) -> torch.Tensor:
        return torch.empty(sizes.batch, n, length, width, device="meta", dtype=getattr(torch, sizes.dtype))

    q = heads(sizes.heads, sizes.length, sizes.width)
    k = heads(sizes.key_heads, sizes.keys or sizes.length, sizes.width)
    rows = torch.empty(sizes.batch * sizes.length, sizes.width, device="meta", dtype=q.dtype)
    of = {
        "attention": (AttentionSpec(), (q, k, k)),
        "statistics": (StatisticsSpec(AttentionSpec(), (), (0, 0)), (q, k, k)),
        "cache": (CacheSpec(AttentionSpec(), sizes.width), (q, k, k)),
        "loss": (LossSpec(), (rows, torch.empty(sizes.hidden, sizes.width, device="meta"), rows)),
        "mlp": (MLPSpec(whole=ALWAYS if "whole" in sizes.kind else NEVER), (rows,)),
        "norm": (NormSpec(), (rows,)), "heads": (HeadsSpec(), (q,)),
    }  # fmt: skip
    return Request(record, *of[record])


def test_every_case_is_of_the_width_and_sizes_that_it_names():
    for one in prove_cases.cases():
        for size, given in one["timed"].items():
            question = capabilities.question(request_of(Sizes(**given), one["record"]), FORWARD)
            assert question[4:] == (one["dtype"], one["width"], size), one["label"]


def test_every_kind_that_dispatch_asks_about_has_a_case():
    proven = {(one["record"], one["proves"]) for one in prove_cases.cases()}
    asked = {(f.family, f.proof) for f in capabilities.FEATURES if f.proof}
    # Served on request only.
    asked -= {("attention", "invariant"), ("cache", "invariant")}
    assert asked | {("attention", capabilities.TOGETHER)} == proven
    directions = {(one["record"], d) for one in prove_cases.cases() for d in one["directions"]}
    assert {("attention", TANGENT), ("attention", BACKWARD), ("mlp", BACKWARD)} <= directions


def record_with(**found: str) -> Record:
    keys = {kind: Key("attention", FORWARD, kind.replace("_", " "), "float32", 64, "small") for kind in found}
    rows = {key: Row(key, found[kind]) for kind, key in keys.items()}
    return Record(proofs.machine(CPU), rows=rows)


@pytest.mark.parametrize(
    ("kinds_of_call", "found", "serves"),
    [
        (("causal",), {"causal": "proven"}, True),
        (("causal",), {"causal": "slower"}, False),
        (("causal",), {"full": "proven"}, False),
        (("causal", "window"), {"causal": "slower", "window": "proven"}, True),
        (("causal", "window"), {"causal": "proven", "window": "slower"}, False),
        (("causal", "window"), {"causal": "wrong", "window": "proven"}, False),
        (("causal", "window"), {"window": "proven"}, False),
        (("full", "bias", "sinks"), {"full": "slower", "bias": "slower", "sinks": "proven"}, False),
        (
            ("full", "bias", "sinks"),
            {"full": "slower", "bias": "slower", "sinks": "proven", "together": "slower"},
            True,
        ),
        (
            ("full", "bias", "sinks"),
            {"full": "proven", "bias": "slower", "sinks": "slower", "together": "proven"},
            False,
        ),
    ],
)
def test_a_call_is_served_where_all_is_right_and_what_decides_is_not_slower(kinds_of_call, found, serves):
    deciding = tuple(kind for kind in kinds_of_call if kind not in capabilities.BASES) or kinds_of_call
    asked = kinds_of_call + ((capabilities.TOGETHER,) if len(deciding) > 1 else ())
    question = Question("attention", FORWARD, asked, deciding, "float32", 64, "small")
    assert (record_with(**found).obstacle(question) == "") is serves


def test_what_the_kernels_lack_goes_to_the_portable_backend_in_spite_of_a_record(here):
    fastattn.prove("cpu", families=["norm"])
    double = dataclasses.replace(RMS, tensors=(RMS.tensors[0].double(),))
    assert capabilities.choose(double, FORWARD) == "portable" and capabilities.choose(RMS, FORWARD) == "triton"


# ---- files ----


def test_what_is_proven_is_not_proven_again_unless_asked(right):
    fastattn.prove("cpu", families=["norm"])
    asked = len(right.worker.asked)
    proofs.forget()  # another process reads the file
    fastattn.prove("cpu", families=["norm"])
    assert asked == len(right.worker.asked) > 0
    fastattn.prove("cpu", families=["norm"], fresh=True)
    assert len(right.worker.asked) == 2 * asked


def changed(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    proofs.forget()


@pytest.mark.parametrize(
    ("field", "sentence"),
    [("triton", "triton was 3.0.0, is "), ("torch", "torch was 3.0.0, is "),
     ("kernels", "it is about other kernels"), ("fastattn", "fastattn was 3.0.0"),
     ("architecture", "architecture was 3.0.0")],
)  # fmt: skip
def test_a_record_of_another_version_is_ignored_and_the_doctor_says_so(field, sentence, right, capsys):
    fastattn.prove("cpu", families=["norm"])
    (path,) = proofs.folder().glob("*.json")
    changed(path, **{field: "3.0.0"})
    assert proofs.record_of(CPU) is None and capabilities.choose(RMS, FORWARD) == "portable"
    doctor.report_proofs(CPU)
    assert f"{path} is ignored: {sentence}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"format": 1}', '{"format": 99}', "\x00\xff", '{"format": 1, "rows": [{}]}']
)
def test_a_file_that_is_no_record_is_ignored_and_the_doctor_says_so(text, capsys):
    proofs.folder().mkdir(parents=True)
    (proofs.folder() / "a.json").write_bytes(text.encode("latin-1"))
    proofs.forget()
    assert capabilities.choose(RMS, FORWARD) == "portable"
    doctor.report_proofs(CPU)
    assert "a.json is no proof record" in capsys.readouterr().out


def test_a_record_is_read_back_as_it_was_written(right):
    record = fastattn.prove("cpu", families=["norm"])
    proofs.forget()
    assert proofs.record_of(CPU) == record
    (path,) = proofs.folder().glob("*.json")
    assert "proven" in path.read_text() and os.uname().nodename not in path.read_text()


WRITING = """
import pathlib, sys, time, torch
from fastattn.core import proofs
from fastattn.core.proofs import Key, Record, Row
here = pathlib.Path(sys.argv[2])
(here / sys.argv[1]).touch()
while not ((here / "a").exists() and (here / "b").exists()):
    time.sleep(0.001)
for n in range(40):
    key = Key("norm", "forward", f"{sys.argv[1]} {n}", "float32", 64, "small")
    proofs.keep(Record(proofs.machine(torch.device("cpu")), rows={key: Row(key, "proven", 1.5)}))
"""


def test_two_processes_prove_at_once_and_nothing_is_lost(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITING, name, str(tmp_path)]) for name in ("a", "b")]
    while any(writer.poll() is None for writer in writers):
        for path in proofs.folder().glob("*.json"):
            proofs.read(path)  # never half of one
        time.sleep(0.005)
    assert [writer.returncode for writer in writers] == [0, 0]
    proofs.forget()
    found = {key.kind for key in proofs.record_of(CPU).rows}
    assert found == {f"{name} {n}" for name in "ab" for n in range(40)}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_where_the_disk_is_full_the_proofs_count_in_this_process_and_the_log_says_so(
    call, right, monkeypatch, caplog
):
    fastattn.prove("cpu", families=["heads"])
    (path,) = proofs.folder().glob("*.json")
    before = path.read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    fastattn.prove("cpu", families=["norm"])
    assert capabilities.choose(RMS, FORWARD) == "triton"
    (message,) = (record.getMessage() for record in caplog.records)
    assert "cannot be written" in message and "No space left" in message
    assert path.read_text() == before and not list(path.parent.glob(".*.part"))


def test_a_cache_folder_that_cannot_be_written_is_told_of(right, monkeypatch, tmp_path, caplog, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["prove", "--device", "cpu", "--families", "norm"]) == 1
    assert capabilities.choose(RMS, FORWARD) == "triton"
    assert "cannot be written" in caplog.text and "Not a directory" in caplog.text


class Interrupted(Right):
    def ask(self, case, **limits):
        if case["kind"] == "time" and case["proves"] == "layer":
            raise KeyboardInterrupt
        return super().ask(case, **limits)


def test_ctrl_c_keeps_what_is_proven_so_far(right, capsys):
    right.worker = Interrupted()
    assert main(["prove", "--device", "cpu", "--families", "norm"]) == 130
    assert "interrupted; what was proven so far is kept" in capsys.readouterr().err
    proofs.forget()
    assert {key.kind for key in proofs.record_of(CPU).rows} == {"rms"}
    right.worker = Right()
    assert {key.kind for key in fastattn.prove("cpu", families=["norm"]).rows} == {"rms", "layer", "residual"}
    assert {case["proves"] for case in right.worker.asked} == {"layer", "residual"}


def test_no_case_is_begun_when_the_time_is_over(right):
    assert not fastattn.prove("cpu", 1e-9, ["norm"]).rows and not right.worker.asked


# ---- who reads them ----


def test_a_named_file_or_folder_is_read_instead(right, monkeypatch, tmp_path):
    fastattn.prove("cpu", families=["norm"])
    (path,) = proofs.folder().glob("*.json")
    for asked, serving in (("off", "portable"), (str(tmp_path), "portable"), (str(path), "triton"),
                           (str(path.parent), "triton")):  # fmt: skip
        monkeypatch.setenv(proofs.VARIABLE, asked)
        proofs.forget()
        assert capabilities.choose(RMS, FORWARD) == serving, asked
    monkeypatch.setenv(proofs.VARIABLE, str(tmp_path / "absent.json"))
    proofs.forget()
    assert capabilities.choose(RMS, FORWARD) == "portable"
    assert any("absent.json is no proof record" in sentence for sentence in proofs.ignored(CPU))


def test_on_a_cpu_no_record_is_looked_for(monkeypatch):
    def read(*_):
        raise AssertionError("a file was read")

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(proofs, "files", read)
    fastattn.rms_norm(torch.randn(3, 16), torch.ones(16))


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA X100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return torch.device("cuda", 0)


def test_the_first_call_on_a_gpu_without_a_record_says_so_once(a_gpu, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, "fastattn"):
        for index in (0, 0, 1):
            assert capabilities.default_backend(torch.device("cuda", index)) == "portable"
    (record,) = caplog.records
    assert "not proven on this NVIDIA X100" in record.getMessage()
    assert "`fastattn prove`" in record.getMessage() and "two minutes" in record.getMessage()


def test_where_proofs_are_off_nothing_is_said(a_gpu, caplog, monkeypatch):
    monkeypatch.setenv(proofs.VARIABLE, "off")
    assert capabilities.default_backend(a_gpu) == "portable" and not caplog.records


def test_a_gpu_serves_what_a_record_of_one_of_its_name_proves(a_gpu):
    half = torch.empty(1, 37, 16, dtype=torch.bfloat16, device="meta")
    request = SimpleNamespace(**vars(RMS), dtype=half.dtype, device=a_gpu)
    request.tensors = (half,)
    keys = {d: capabilities.question(request, d).key("rms") for d in (FORWARD, BACKWARD)}
    rows = {keys[FORWARD]: Row(keys[FORWARD], "proven", 1.5), keys[BACKWARD]: Row(keys[BACKWARD], "slower", 0.5)}
    proofs.keep(Record(proofs.machine(a_gpu), rows=rows))
    assert capabilities.choose(request, FORWARD) == "triton"
    assert capabilities.choose(request, BACKWARD) == "portable"
    assert capabilities.default_backend(a_gpu, "norm") == "triton"
    assert capabilities.default_backend(a_gpu, "mlp") == "portable"
    feature = next(f for f in capabilities.FEATURES if f.proof == "rms")
    assert doctor.served_by(feature, a_gpu) == ("triton, portable", "1 of 2 proven, 0.5 to 1.5 x")


def test_the_records_that_we_ship_can_be_read():
    paths = list(proofs.SHIPPED.glob("*.json"))
    assert paths
    for path in paths:
        record = proofs.read(path)
        assert path.name == proofs.file_name(record.machine) and record.rows


def test_a_record_names_the_version_of_the_source_installed_or_not(monkeypatch):
    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert proofs.machine(CPU).fastattn == fastattn.__version__
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert written is not None and written[1] == fastattn.__version__


# ---- the command ----


def test_the_record_is_printed_as_json_and_nothing_else(right, capsys):
    assert main(["prove", "--device", "cpu", "--families", "norm", "--json"]) == 0
    printed = capsys.readouterr()
    assert Record.of(json.loads(printed.out)) == proofs.record_of(CPU) and printed.err == ""


def test_the_doctor_shows_the_record_as_a_table(right, capsys):
    fastattn.prove("cpu", families=["norm"])
    doctor.report_proofs(CPU)
    printed = capsys.readouterr().out
    assert "norm    forward    residual  1 of 1 proven, 2 x" in printed
    assert proofs.record_of(CPU).date in printed
    feature = next(f for f in capabilities.FEATURES if f.proof == "rms")
    assert doctor.served_by(feature, CPU) == ("triton", "2 of 2 proven, 2 x")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--families", "abacus"], "families must be some of attention, masks, "),
        (["--device", "abacus"], "device must be cuda, cuda:N or cpu, got 'abacus'"),
        (["--device", "cuda"], "sees no GPU on this machine"),
        (["--device", "cpu", "--budget", "0"], "--budget must be positive, got 0"),
        (["--device", "cpu", "--allow-spills", "-1"], "--allow-spills must not be negative, got -1"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(words, sentence, capsys):
    assert main(["prove", *words]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and sentence in printed.err and printed.err.count("\n") == 1


def test_without_a_gpu_or_the_interpreter_nothing_can_be_proven(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="nothing can be proven on cpu: the Triton kernels need a GPU"):
        fastattn.prove()


# ---- a GPU that is not there ----

ON_A_PRETENDED_GPU = """
import warnings; warnings.simplefilter("ignore")
import torch, fastattn
from fastattn.core import capabilities, proofs
from fastattn.core.norm.spec import NormSpec
from fastattn.core.proofs import Record, Row
from tests.pretended_gpu import GPUS, pretended_gpus

with pretended_gpus(GPUS["H100"]) as driver:
    x, weight = (torch.zeros(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((37, 128), (128,)))
    device = x.device
    fastattn.rms_norm(x, weight)
    assert driver.launches() == 0
    request = capabilities.Request("norm", NormSpec(), (x[None],))
    key = capabilities.question(request, "forward").key("rms")
    proofs.keep(Record(proofs.machine(device), rows={key: Row(key, "proven", 1.5)}))
    fastattn.rms_norm(x, weight)
    assert driver.launches() == 1
    fastattn.layer_norm(x, weight)
    fastattn.rms_norm(x.float(), weight.float())
    assert driver.launches() == 1
print(proofs.record_of(device).machine.gpu)
"""


@pytest.mark.slow
def test_on_a_gpu_our_kernels_are_launched_once_they_are_proven_and_not_before():
    pytest.importorskip("triton")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ON_A_PRETENDED_GPU]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "H100\n" and "not proven on this H100" in done.stderr
