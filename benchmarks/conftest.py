"""The speed suites: `pytest benchmarks`. All peers at one problem are measured together, then reported one by
one."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable

import pytest
import torch

from fastattn.measuring import bench, measure
from fastattn.measuring.peers import Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 7
_measured: list[list[measure.Row]] = []


def pytest_configure(config: pytest.Config) -> None:
    """`--benchmark-timer` is the clock of calls on a CPU."""
    measure.CLOCK_ON_CPU = pkgutil.resolve_name(config.getoption("benchmark_timer"))


@functools.cache
def measured(problem: Problem, direction: str) -> dict[str, measure.Row]:
    """All peers at this problem, in interleaved rounds; once a session."""
    peers = bench.usable_peers(problem, DEVICE, compiled=True)
    rows = measure.compare_peers(problem, direction, peers, DEVICE, rounds=ROUNDS)
    _measured.append(rows)
    return {row.peer: row for row in rows}


class Replay:
    """A clock that shows the rounds already measured, since pytest-benchmark itself cannot interleave.

    pytest-benchmark times `step`: each call moves the clock on by one measured round.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.rounds: list[float] = []

    def __call__(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += self.rounds.pop(0)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Problem, str, str], None]:
    """Hand a peer's measurement to pytest-benchmark, or skip with the reason there is none."""

    def hand_over(problem: Problem, direction: str, peer: str) -> None:
        row = measured(problem, direction)[peer]
        if row.timing is None:
            pytest.skip(row.note)
        clock = Replay()
        clock.rounds = list(row.timing.rounds)
        # The fixture reads its timer from the test's marker, so it is asked for only now.
        request.node.add_marker(pytest.mark.benchmark(timer=clock, group=f"{direction} {problem.label}"))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info.update({k: v for k, v in measure.as_json(row).items() if k != "rounds"})
        benchmark.extra_info["device"] = bench.headline(DEVICE)
        benchmark.pedantic(clock.step, rounds=len(row.timing.rounds), iterations=1)

    return hand_over


_notes: list[str] = []


@pytest.fixture
def note() -> Callable[[str], None]:
    """A line below pytest-benchmark's table."""
    return _notes.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """pytest-benchmark's own table shows times only: TFLOP/s, memory and ratios go below it."""
    if _measured or _notes:
        terminalreporter.write_line("")
        terminalreporter.write_line(bench.headline(DEVICE))
    for line in _notes:
        terminalreporter.write_line(line)
    for rows in _measured:
        bench.print_rows(rows, terminalreporter)
