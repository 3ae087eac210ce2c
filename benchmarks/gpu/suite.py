"""The test suite on the device: shards of it in processes of their own, and what came out.

Outcomes of a test: passed, failed, skipped; and those that leave the suite incomplete: hung, killed, not run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu import shards
from benchmarks.gpu.state import State
from fastattn.measuring.paths import ROOT, clean, python_path
from fastattn.measuring.pool import CRASHES

# Enough of a failure to see the assertion and hypothesis's example.
MOST_LINES, MOST_FAILURES = 60, 40
STEP_SECONDS = 150.0  # without any outcome: one test compiles some ten kernels
FINAL = ("passed", "failed", "skipped")
LACKING = re.compile(r"could not import|is not installed", re.IGNORECASE)

Event = dict[str, Any]


class Suite:
    """One run of the tests that `arguments` select (pytest's arguments).

    Args:
        families: only these; None for all.
        state: outcomes of earlier calls, which are not asked again; new ones are kept there.
        root: the checkout, by which tests are named.
        deadline: of time.monotonic(); then every process is ended.
        step_seconds: a process without an outcome for so long is ended, and its test counts as hung.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        processes: int,
        deadline: float,
        state: State,
        families: Iterable[str] | None = None,
        step_seconds: float = STEP_SECONDS,
        say: Callable[[str], None] = lambda text: None,
        environment: dict[str, str] | None = None,
        root: Path = ROOT,
    ) -> None:
        self.arguments, self.processes, self.deadline = arguments, processes, deadline
        self.state, self.families, self.step_seconds, self.say = state, families, step_seconds, say
        self.environment, self.root = {} if environment is None else environment, root
        self.waiting: deque[list[str]] = deque()
        self.asked: list[str] = []
        self.unreadable: list[Event] = []
        self.notes: list[str] = []
        self.lock = threading.Lock()
        self.collecting: threading.Thread | None = None

    def collect_ahead(self) -> None:
        """Find the tests in a thread, while something else runs: that takes half a minute."""
        if importlib.util.find_spec("pytest") is not None:
            self.collecting = threading.Thread(target=self._collect, daemon=True)
            self.collecting.start()

    def run(self, deadline: float | None = None) -> dict[str, Any]:
        """The summary. Never raises for what a test or its process does."""
        start = time.monotonic()
        self.deadline = self.deadline if deadline is None else deadline
        if self.collecting is None:
            self.collect_ahead()
        if self.collecting is None:
            self.notes.append("pytest is not installed: no test of the suite was run")
        else:
            self.collecting.join()
            self._run_shards()
        return {**self._summary(), "seconds": round(time.monotonic() - start, 1)}

    def _run_shards(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            todo = [test for test in self.asked if self._outcome(test) not in FINAL]
            taken = {test: event["seconds"] for test, event in self.state.tests.items() if "seconds" in event}
            self.waiting.extend(shards.cut(todo, taken))
            self.say(f"  {len(self.asked)} tests, {len(todo)} of them to run, in {len(self.waiting)} shards")
            crew = [threading.Thread(target=self._work, args=(Path(folder),)) for _ in range(self.processes)]
            for thread in crew:
                thread.start()
            for thread in crew:
                thread.join()

    def _collect(self) -> None:
        command = ["--collect-only", "--continue-on-collection-errors", *self.arguments]
        with tempfile.TemporaryDirectory() as folder:
            process = Process(command, Path(folder) / "collected", self.environment, self.root)
            code = process.wait(self.deadline, self.step_seconds, lambda event: None)
        events = process.events
        self.asked = shards.in_order((e["test"] for e in events if e["outcome"] == "found"), self.families)
        self.unreadable = [e for e in events if e["outcome"] == "unreadable" and self._wanted(e["test"])]
        # Files that are skipped as a whole, because the library they test is missing.
        for event in events:
            if event["outcome"] == "skipped" and self._wanted(event["test"]):
                self.asked.append(event["test"])
                self.state.keep_test(event)
        if not any(event["outcome"] in ("found", "skipped", "unreadable") for event in events):
            how = f"exit code {code}" if isinstance(code, int) else code
            self.notes.append(clean(f"no test was collected ({how}): {process.last_words()}"))

    def _wanted(self, test: str) -> bool:
        return bool(shards.in_order([test], self.families))

    def _work(self, folder: Path) -> None:
        while time.monotonic() < self.deadline:
            with self.lock:
                if not self.waiting:
                    return
                shard = self.waiting.popleft()
                number = len(list(folder.iterdir()))
                record = folder / f"{number}"
                record.touch()
            process = Process(shard, record, self.environment, self.root)
            ended = process.wait(self.deadline, self.step_seconds, self._note)
            self._settle(shard, process, ended)

    def _note(self, event: Event) -> None:
        """Keep one outcome; a test that failed stays failed, also when its teardown passes."""
        with self.lock:
            if event["outcome"] in FINAL and self._outcome(event["test"]) != "failed":
                self.state.keep_test(event)
                if event["outcome"] == "failed":
                    self.say(f"  failed: {event['test']}")

    def _settle(self, shard: list[str], process: Process, ended: int | str) -> None:
        """A process ended: judge the test that it was running, and put the tests after that one back in front."""
        left = [test for test in shard if self._outcome(test) not in FINAL]
        if not left or ended == "cut off":
            return
        culprit = process.under_way()
        words = process.last_words()
        if culprit in left:
            with self.lock:
                self.state.keep_test({"test": culprit, "seconds": 0.0, **verdict_on(ended, words)})
            left.remove(culprit)
        elif len(left) == len(shard):
            # No test began, so another process would end the same.
            with self.lock:
                self.notes.append(clean(f"{shard[0]} and {len(shard) - 1} more could not start: {words}"))
            return
        if left:
            with self.lock:
                self.waiting.appendleft(left)

    def _outcome(self, test: str) -> str:
        return self.state.tests.get(test, {}).get("outcome", "not run")

    def _summary(self) -> dict[str, Any]:
        with self.lock:
            events = [self.state.tests.get(test, {"test": test, "outcome": "not run"}) for test in self.asked]
        failures = [event for event in events if event["outcome"] == "failed"]
        skips = Counter(clean(event["text"]) for event in events if event["outcome"] == "skipped")
        return {
            "counts": dict(Counter(event["outcome"] for event in events)),
            "families": _by_family([*events, *self.unreadable]),
            "failures": [
                {"test": clean(e["test"]), "text": _shortened(e["text"])} for e in failures[:MOST_FAILURES]
            ],
            "more_failures": [clean(event["test"]) for event in failures[MOST_FAILURES:]],
            "skipped": dict(skips),
            "unfinished": [clean(e["test"]) for e in events if e["outcome"] in ("hung", "killed")],
            "missing": self._missing(events, skips),
        }

    def _missing(self, events: list[Event], skips: Counter[str]) -> list[str]:
        """A sentence for everything that makes the suite incomplete; empty if it is complete."""
        missing = list(self.notes)
        unreadable: dict[str, list[str]] = {}  # many files may lack the same library, or the same version of it
        for event in self.unreadable:
            last = clean(event["text"]).strip().splitlines() or [""]
            unreadable.setdefault(last[-1].strip(), []).append(event["test"])
        missing += [f"{', '.join(files)} could not be read: {error}" for error, files in unreadable.items()]
        counts = Counter(event["outcome"] for event in events)
        for outcome, words in (("not run", "not run"), ("hung", "hung"), ("killed", "killed from outside")):
            if counts[outcome]:
                missing.append(f"{counts[outcome]} of {len(events)} tests {words}")
        missing += [f"{n} tests skipped: {text}" for text, n in skips.items() if LACKING.search(text)]
        return missing


def verdict_on(ended: int | str, words: str) -> Event:
    """The outcome of the test that a process was running when it ended: `ended` is its exit code, or why it was
    ended."""
    if ended == "hung":
        return {"outcome": "hung", "text": "no answer in time"}
    if isinstance(ended, int) and ended < 0 and -ended not in CRASHES:
        return {"outcome": "killed", "text": f"its process was killed by {signal.Signals(-ended).name}"}
    how = signal.Signals(-ended).name if isinstance(ended, int) and ended < 0 else f"exit code {ended}"
    return {"outcome": "failed", "text": f"its process ended with {how}: {words}"}


class Process:
    """pytest with these arguments, its outcomes read while it runs."""

    def __init__(self, arguments: list[str], record: Path, environment: dict[str, str], root: Path) -> None:
        self.record, self.events, self.read = record, [], 0
        self.log = record.with_suffix(".log").open("w+")
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **environment, "PYTHONPATH": python_path()}
        environment |= {"FASTATTN_TEST_RECORD": str(record)}
        environment.pop("PYTEST_XDIST_WORKER", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "--rootdir", str(root), "-p", "benchmarks.gpu.recorder",
             "-p", "no:cacheprovider",
             *arguments],
            cwd=root, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait(self, deadline: float, step_seconds: float, note: Callable[[Event], None]) -> int | str:
        """Its exit code; "cut off" if the deadline came first, "hung" if nothing happened for too long."""
        heard = time.monotonic()
        try:
            while True:
                code = self.process.poll()
                news = self._news()
                for event in news:
                    note(event)
                now = time.monotonic()
                heard = now if news else heard
                if code is not None:
                    return code
                if now >= deadline:
                    return "cut off"
                if now - heard > step_seconds:
                    return "hung"
                time.sleep(0.1)
        finally:
            self._end()

    def _news(self) -> list[Event]:
        """The whole lines that were added to the record."""
        if not self.record.exists():
            return []
        with self.record.open() as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self.read += len(whole.encode())
        found = [json.loads(line) for line in whole.splitlines()]
        self.events += found
        return found

    def _end(self) -> None:
        """Ends its children, too: one that hangs in a kernel would share the device with what is timed later."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)

    def under_way(self) -> str | None:
        """The test that began and did not end."""
        begun = [event["test"] for event in self.events if event["outcome"] == "started"]
        ended = {event["test"] for event in self.events if event["outcome"] != "started"}
        return begun[-1] if begun and begun[-1] not in ended else None

    def last_words(self) -> str:
        self.log.seek(0)
        lines = [line for line in self.log.read().strip().splitlines() if line.strip()]
        return " ".join(lines[-3:])[:300]


def _by_family(events: list[Event]) -> dict[str, dict[str, int]]:
    """Counts of outcomes for each family; a skip because a library is missing counts as "lacking", a file that
    could not be read as "unreadable"."""
    families: dict[str, Counter[str]] = {}
    for event in events:
        lacking = event["outcome"] == "skipped" and LACKING.search(event["text"])
        counts = families.setdefault(shards.family_of(event["test"]), Counter())
        counts["lacking" if lacking else event["outcome"]] += 1
    return {family: dict(counts) for family, counts in families.items()}


def _shortened(text: str) -> str:
    lines = clean(text).splitlines()
    if len(lines) <= MOST_LINES:
        return "\n".join(lines)
    return "\n".join([*lines[:10], "[...]", *lines[10 - MOST_LINES :]])
