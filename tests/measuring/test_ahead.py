"""Compiling ahead: what one process has compiled, the check and the timing of another find in the cache."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

from benchmarks.gpu import compilations, rehearsal
from fastattn.measuring import ahead, prove_cases
from fastattn.measuring.ahead import Ahead
from fastattn.measuring.pool import Answer, Worker
from fastattn.measuring.prove import Prover


def case(label: str, checks: int = 1) -> dict:
    sizes = {"kind": "rms"}
    return {"label": label, "checks": [sizes] * checks, "timed": {"small": sizes}, "directions": ["forward"]}


class Compiler:
    """Notes what it is asked, and takes until it is let go."""

    def __init__(self, free: bool = True) -> None:
        self.asked: list[dict] = []
        self.free = threading.Event()
        self.closed = False
        if free:
            self.free.set()

    def ask(self, piece, *, step_limit, deadline):
        self.asked.append(piece)
        self.free.wait(20)
        return Answer(rows=[])

    def close(self):
        self.closed = True
        self.free.set()


def test_every_piece_is_compiled_once_in_the_order_of_the_cases():
    compilers = [Compiler(), Compiler()]
    cases = [case("a", 2), case("b"), case("c")]
    with Ahead(cases, compilers, deadline=time.monotonic() + 20) as compiling:
        compiling.wait(cases)
    asked = sorted(piece["label"] for compiler in compilers for piece in compiler.asked)
    assert asked == ["a", "a", "a", "b", "b", "c", "c"]
    assert [piece["label"] for piece in compilers[0].asked] == sorted(p["label"] for p in compilers[0].asked)
    assert not any(compiler.closed for compiler in compilers)


def test_a_case_waits_for_its_own_pieces_only():
    held = Compiler(free=False)
    with Ahead([case("a", 0), case("b", 0)], [held], deadline=time.monotonic() + 20) as compiling:
        assert compiling.left == {"a": 1, "b": 1}
        threading.Timer(0.05, held.free.set).start()
        compiling.wait([case("a")])
        assert held.asked[0]["label"] == "a"


def test_nothing_is_begun_while_something_is_timed():
    compiler = Compiler()
    cases = [case("a"), case("b")]
    compiling = Ahead(cases, [compiler], deadline=time.monotonic() + 20)
    with contextlib.ExitStack() as stack:
        with compiling.quiet():
            stack.enter_context(compiling)
            time.sleep(0.05)
            assert not compiler.asked
        compiling.wait(cases)
        assert len(compiler.asked) == 4


def test_what_is_timed_waits_for_what_is_compiled():
    compiler = Compiler(free=False)
    with Ahead([case("a")], [compiler], deadline=time.monotonic() + 20) as compiling:
        while not compiler.asked:
            time.sleep(0.01)
        threading.Timer(0.05, compiler.free.set).start()
        with compiling.quiet():
            assert compiler.free.is_set() and not compiling.busy and len(compiler.asked) == 1


def test_what_is_timed_waits_until_the_deadline_only():
    stuck = Compiler(free=False)
    with Ahead([case("a")], [stuck], deadline=time.monotonic() + 0.2) as compiling:
        while not stuck.asked:
            time.sleep(0.01)
        with compiling.quiet():
            assert compiling.busy and time.monotonic() >= compiling.deadline


def test_a_compiler_that_does_not_end_is_ended_with_the_cases():
    stuck = Compiler(free=False)
    with Ahead([case("a"), case("b")], [stuck], deadline=time.monotonic() + 20):
        while not stuck.asked:
            time.sleep(0.01)
    assert stuck.closed and len(stuck.asked) == 1


def test_without_compilers_nobody_waits():
    with Ahead([case("a")], [], deadline=time.monotonic() + 20) as compiling:
        assert not compiling.left and not compiling.threads
        compiling.wait([case("a")])


def test_compilers_leave_cores_and_memory_to_the_others(monkeypatch):
    def compilers(cores: int, gib: int) -> int:
        monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda _: range(cores), raising=False)
        properties = type("Properties", (), {"total_memory": gib * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        return ahead.compilers_for(torch.device("cuda", 0))

    assert [compilers(*machine) for machine in ((16, 140), (2, 16), (4, 16), (16, 24))] == [14, 0, 2, 4]
    assert ahead.compilers_for(torch.device("cpu")) == 0


# ---- the keys of the cache ----


def small_cases() -> list[dict]:
    """Cases of kernels that are compiled quickly, with small calls."""
    found = []
    for family, proves in (("norm", "rms"), ("heads", "rotary")):
        whole = next(one for one in prove_cases.cases((family,)) if one["proves"] == proves)
        small = [{**sizes, "length": 5, "batch": 1} for sizes in whole["checks"]]
        timed = {"small": {**whole["timed"]["small"], "length": 3}}
        found.append({**whole, "checks": small, "timed": timed})
    return found


@pytest.mark.slow
def test_the_check_and_the_timing_compile_nothing_that_was_compiled_ahead(tmp_path, monkeypatch):
    """By signature, alignment, constants, warps and target: on a pretended GPU, through the real handlers."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if reason := rehearsal.obstacle():
        pytest.skip(f"no GPU can be pretended: {reason}")
    log = tmp_path / "compilations"
    environment = {compilations.VARIABLE: str(log), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    workers = [Worker("pretended", "benchmarks.gpu.cases", environment) for _ in range(3)]
    limits = {"step_limit": 300.0, "deadline": time.monotonic() + 600}
    cases = small_cases()
    try:
        with Ahead(cases, workers[:2], deadline=limits["deadline"]) as compiling:
            compiling.wait(cases)
        before = compilations.summarize(log)
        assert before["compiled"] == before["different"] > 4  # no kernel twice, by two processes
        for one in cases:
            # What serves otherwise is timed last. Where it has no CPU code, the pretended GPU cannot compute it.
            for kind in ("check", "time"):
                workers[2].ask({**one, "kind": kind}, **limits)
        after = compilations.summarize(log)
        assert after["compiled"] == before["compiled"] and after["from_cache"] >= before["compiled"]
    finally:
        for worker in workers:
            worker.close()


# ---- what is checked and what is timed ----


class Proving:
    """Finds everything right and as fast; a check takes `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.asked: list[str] = []
        self.seconds = seconds

    def ask(self, one, *, step_limit, deadline):
        self.asked.append(one["kind"])
        time.sleep(self.seconds if one["kind"] == "check" else 0.0)
        about = {"error": None, "allowed": None, "verdict": None, "reason": "", "ratio": 1.0}
        return Answer([{"direction": k.direction, "size": k.size, **about} for k in prove_cases.keys(one)])


@pytest.mark.parametrize(
    ("compilers", "seconds", "expected"),
    [
        (1, 0.0, ["check"] * 3 + ["time"] * 3 + ["check", "time"]),
        (0, 0.0, ["check", "time"] * 4),
        (1, 4.0, ["check", "time"]),  # more would leave the timing too little of the ten seconds
    ],
)
def test_compilers_are_stopped_for_several_cases_at_once(compilers, seconds, expected):
    worker, kept = Proving(seconds), []
    cases = [one for one in prove_cases.cases(("norm",)) if not one["tiled"]][:4]
    prover = Prover(
        cases,
        [worker],
        kept.extend,
        deadline=time.monotonic() + 10,
        compilers=[Compiler() for _ in range(compilers)],
    )
    prover.go()
    assert worker.asked[: len(expected)] == expected
    assert seconds or {row.verdict for row in kept} == {"proven"}
