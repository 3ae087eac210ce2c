"""compute-sanitizer in the GPU run: what it finds fails the run, and a machine without it says so."""

from __future__ import annotations

import stat
import time

import pytest

from benchmarks.gpu import report, sanitizer, verdict
from fastattn.measuring import checking, kinds

FAKES = {
    "passes": "exit 0",
    "finds": "echo ========= COMPUTE-SANITIZER; echo ========= Invalid __global__ read of size 2 bytes; exit 86",
    "cannot run": "echo ========= Error: Device not supported; exit 1",
    "hangs": "sleep 60 & wait",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a program of that name in a folder of CUDA's; it keeps its arguments in `asked`."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(sanitizer, "LEAST_SECONDS", 0.5)

    def install(fake: str) -> None:
        path = tmp_path / "cuda" / "bin" / sanitizer.NAME
        path.parent.mkdir(parents=True)
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n{FAKES[fake]}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return install


def rows_of(seconds: float = 30.0, tools=("memcheck",)) -> list[dict]:
    return list(sanitizer.checks(tools, time.monotonic() + seconds))


@pytest.mark.parametrize(
    ("fake", "said", "fails", "misses"),
    [
        ("passes", "passed", 0, 0),
        ("finds", "FAILED: Invalid __global__ read of size 2 bytes", 1, 0),
        ("cannot run", "not run (exit code 1): Error: Device not supported", 0, 1),
    ],
)
def test_what_it_finds_fails_the_run_and_what_it_cannot_do_is_missing(fake, said, fails, misses, installed):
    installed(fake)
    (row,) = rows_of()
    assert (row["tool"], row["verdict"]) == ("memcheck", said)
    assert len(verdict._of_sanitizer({"sanitizer": [row]}, "FAILED")) == fails
    assert len(verdict._of_sanitizer({"sanitizer": [row]}, "not finished", "not run", "no time")) == misses
    assert said.replace("|", "") in report._sanitizer([row])
    assert verdict.is_final(said) is (misses == 0)


def test_every_tool_is_asked_about_the_same_calls(installed, tmp_path):
    installed("passes")
    assert {row["verdict"] for row in rows_of(tools=sanitizer.TOOLS)} == {"passed"}
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[:2] for line in asked] == [["--tool", tool] for tool in sanitizer.TOOLS]
    assert all(line.endswith("-m benchmarks.gpu.sanitizer") for line in asked)


def test_one_that_hangs_is_ended_with_what_it_started(installed):
    installed("hangs")
    begin = time.monotonic()
    first, second = rows_of(1.4, ("memcheck", "racecheck"))
    assert first["verdict"] == second["verdict"] == "not finished within 1 s" and time.monotonic() - begin < 30
    assert rows_of(0.1)[0]["verdict"] == "no time was left"


def test_a_machine_without_it_says_so_and_fails_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sanitizer, "program", lambda: None)
    rows = rows_of(tools=sanitizer.TOOLS)
    assert {row["verdict"] for row in rows} == {"compute-sanitizer is not installed"}
    assert verdict._of_sanitizer({"sanitizer": rows}, "FAILED", "not finished", "not run", "no time") == []


def test_the_calls_that_are_checked_are_of_every_family_and_run_our_kernels(monkeypatch, capsys):
    made = []
    note = lambda call, backend, tensors, sizes: made.append((sizes.family, backend))  # noqa: E731
    monkeypatch.setattr(checking, "results_and_gradients", note)
    sanitizer.make_calls("cpu")
    assert {family for family, _ in made} >= set(kinds.BUILDERS) - {"varlen", "statistics"}
    assert {backend for _, backend in made} == {"triton"}
    assert capsys.readouterr().out == f"{len(made)} calls were made\n"
