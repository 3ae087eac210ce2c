"""How we measure: all peers in one process, in interleaved rounds.

Each round times every peer once, in alternating order, so that a drifting clock affects all of them. A figure is
the median over rounds; its spread is the interquartile range over the median. On a GPU the device's time is taken
between two events. The launches wait in the queue behind a pause, so that the time of the CPU does not count. On a
CPU it is wall-clock time, or what CLOCK_ON_CPU tells. Each peer's output is compared with the definition first.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.measuring.peers import (
    BACKWARD,
    FLOORS,
    FORWARD,
    FORWARD_ONLY,
    TRAINING,
    Problem,
    Unavailable,
    describe,
    is_rival,
    peers_of,
)

Thunk = Callable[[], Any]
Notify = Callable[[str], None]

# Calls are repeated within a round until it lasts this long, and at most so often.
ROUND_SECONDS, MOST_REPEATS = 0.02, 200


@dataclass(frozen=True)
class Timing:
    """Seconds a call took, one figure for each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median; 0 for a single round."""
        if len(self.rounds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return (high - low) / self.median


@dataclass
class Row:
    """One peer at one problem. `error` is the relative distance of the sampled output from the definition."""

    problem: Problem
    direction: str
    peer: str
    timing: Timing | None = None
    peak_bytes: int | None = None
    error: float | None = None
    note: str = ""
    ratio: float | None = None

    @property
    def tflops(self) -> float | None:
        """Useful operations per second, in 10^12. Masked scores do not count, even if a peer computes them."""
        return self.problem.flops(self.direction) / self.timing.median / 1e12 if self.timing else None


# ---- the clock ----

# time.process_time on a machine that others use, too.
CLOCK_ON_CPU: Callable[[], float] = time.perf_counter


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(call: Thunk, count: int, device: torch.device, pause: float = 0.0) -> float:
    """The time of one of `count` calls in a row. On a GPU its queue is paused for `pause` seconds while they are
    launched."""
    if device.type != "cuda":
        clock = CLOCK_ON_CPU
        start = clock()
        for _ in range(count):
            call()
        return (clock() - start) / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    if pause:
        torch.cuda._sleep(int(pause * CYCLES_A_SECOND))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / count


def _launch_seconds(call: Thunk, device: torch.device) -> float:
    """The CPU's time to launch one call on an idle GPU; 0 if the device is the CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return taken


CYCLES_A_SECOND = 2e9  # about any GPU's boost clock; a slower clock only makes the pause longer
LONGEST_PAUSE = 0.05


def measure(
    calls: dict[str, Thunk],
    device: torch.device,
    *,
    rounds: int = 7,
    seconds: float = ROUND_SECONDS,
    notify: Notify = lambda step: None,
) -> dict[str, Timing]:
    """Time warm calls in interleaved rounds. `notify` is called with each name before its call."""
    plan = {}
    for name, call in calls.items():
        notify(name)
        once = seconds_a_call(call, 1, device)
        count = max(1, min(MOST_REPEATS, math.ceil(seconds / max(once, 1e-9))))
        plan[name] = (count, min(LONGEST_PAUSE, 1.5 * count * _launch_seconds(call, device)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with _no_garbage_collection():
        for number in range(rounds):
            order = list(calls) if number % 2 == 0 else list(reversed(calls))
            for name in order:
                notify(name)
                count, pause = plan[name]
                taken[name].append(seconds_a_call(calls[name], count, device, pause))
    return {name: Timing(tuple(figures)) for name, figures in taken.items()}


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# ---- memory ----


def peak_memory(call: Thunk, device: torch.device) -> int:
    """The peak of allocated bytes during the call, beyond those allocated before; results included."""
    if device.type != "cuda":
        return _peak_of_allocations(call)
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_allocations(call: Thunk) -> int:
    """torch has no memory statistics for CPUs, but its profiler sees each allocation and release."""
    from torch.profiler import ProfilerActivity, profile

    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    present = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        present += change
        peak = max(peak, present)
    return peak


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keeps the profiler's log lines out of our tables."""
    asked = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = asked or "99"
    try:
        yield
    finally:
        if asked is None:
            del os.environ["KINETO_LOG_LEVEL"]


# ---- one problem, all peers ----


@dataclass(frozen=True)
class Contender:
    """A peer, built for one problem. It is built once, because building may compile."""

    peer: str
    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, problem: Problem, peer: str, inputs: tuple[Tensor, ...]) -> Contender:
        """Raises Unavailable, or what the peer raises."""
        call = peers_of(problem)[peer](problem, inputs[0].device)
        return cls(peer, call, getattr(call, "prepare", lambda unchanged: unchanged)(inputs))

    def direct(self, direction: str) -> tuple[Thunk, Tensor]:
        """The call to measure in this direction, and the peer's output."""
        if direction != FORWARD and self.peer in FORWARD_ONLY:
            raise Unavailable("computes no gradient")
        return _thunk(direction, self.call, self.inputs)


def prepare(problem: Problem, direction: str, peer: str, inputs: tuple[Tensor, ...]) -> tuple[Thunk, Tensor]:
    """The call to measure, and the peer's output. Raises Unavailable, or what the peer raises."""
    return Contender.of(problem, peer, inputs).direct(direction)


def _thunk(direction: str, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Thunk, Tensor]:
    if direction == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return call(*inputs)

        return forward, forward()
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = call(*leaves)
    upstream = torch.randn(output.shape, device=output.device, dtype=torch.float32).to(output.dtype)
    if direction == BACKWARD:
        return lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True), output.detach()
    return lambda: torch.autograd.grad(call(*leaves), leaves, upstream), output.detach()


def relative_error(problem: Problem, inputs: tuple[Tensor, ...], output: Tensor) -> float:
    """The distance of the sampled rows from the definition, relative to its size."""
    with torch.no_grad():
        exact = problem.sample(inputs)
        return float((problem.sample(inputs, output) - exact).norm() / exact.norm())


# A relative error far above rounding in any dtype, and above that of quantised attention.
WRONG = 0.1


def compare_peers(
    problem: Problem,
    direction: str,
    peers: list[str],
    device: torch.device,
    *,
    rounds: int = 7,
    seconds: float = ROUND_SECONDS,
    notify: Notify = lambda step: None,
) -> list[Row]:
    """A row for each peer: measured, or with a note why not. An error in a peer is not raised."""
    torch.manual_seed(0)
    torch.compiler.reset()  # otherwise dynamo would stop recompiling after a few problems
    inputs = problem.inputs(device)
    rows = {peer: Row(problem, direction, peer) for peer in peers}
    calls: dict[str, Thunk] = {}
    for peer, row in rows.items():
        notify(peer)
        try:
            contender = Contender.of(problem, peer, inputs)
            call, output = contender.direct(direction)
            if peer not in FLOORS:
                row.error = relative_error(problem, inputs, output)
                if not row.error < WRONG:
                    raise ArithmeticError(f"wrong: relative error {row.error:.2g}")
            del output
            # The first call of a backward compiles; peak memory is that of a whole step.
            call()
            whole = call if direction != BACKWARD else contender.direct(TRAINING)[0]
            row.peak_bytes = peak_memory(whole, device)
            calls[peer] = call
        except Exception as error:
            row.note = one_line(error)
            _forget(error)
    for peer, timing in measure(calls, device, rounds=rounds, seconds=seconds, notify=notify).items():
        rows[peer].timing = timing
    add_ratios(list(rows.values()))
    return list(rows.values())


def one_line(error: BaseException) -> str:
    """An exception as a cell of a table."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if isinstance(error, Unavailable | ArithmeticError) else f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= 160 else text[:157] + "..."


def _forget(error: BaseException) -> None:
    """Release the tensors that the frames of a failed call hold."""
    error.__traceback__ = None
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def add_ratios(rows: list[Row]) -> None:
    """How many times as fast as the best peer each row of one problem is; above 1 is faster."""
    rivals = [row.timing.median for row in rows if row.timing and is_rival(row.peer)]
    for row in rows:
        row.ratio = min(rivals) / row.timing.median if rivals and row.timing else None


def as_json(row: Row) -> dict[str, Any]:
    """A row as plain data. Times are in seconds, one for each round."""
    return {
        "problem": describe(row.problem),
        "label": row.problem.label,
        "direction": row.direction,
        "peer": row.peer,
        "seconds": row.timing.median if row.timing else None,
        "spread": row.timing.spread if row.timing else None,
        "rounds": list(row.timing.rounds) if row.timing else [],
        "tflops": row.tflops,
        "peak_bytes": row.peak_bytes,
        "error": row.error,
        "ratio": row.ratio,
        "note": row.note,
    }
