"""The whole test suite on the device: counts, and every failure with its inputs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.paths import ROOT, clean, python_path

# Enough of a failure to see the assertion and hypothesis's example.
MOST_LINES, MOST_FAILURES = 60, 40


def run_suite(arguments: list[str], *, processes: int, deadline: float) -> dict[str, Any]:
    """Run pytest with these arguments until it ends or until `deadline` (of time.monotonic)."""
    if importlib.util.find_spec("pytest") is None:
        return {"note": "pytest is not installed here", "counts": {}, "failures": [], "complete": False}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.recorder", "-p", "no:cacheprovider"]
    if processes > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(processes), "--dist", "worksteal"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        environment = {**os.environ, "PYTHONPATH": python_path(), "FASTATTN_TEST_RECORD": str(record)}
        with (Path(folder) / "output").open("w+") as output:
            process = subprocess.Popen(
                [*command, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            code = _wait(process, deadline)
            output.seek(0)
            said = output.read()
        events = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    result = summarize(events)
    result["seconds"] = time.monotonic() - start
    # 0: all passed, 1: some failed; anything else means that not everything ran.
    result["complete"] = code in (0, 1)
    result["broken"] = code not in (0, 1, None)
    if code is None:
        result["note"] = f"stopped after {result['seconds']:.0f} s, when its time was up"
    elif code not in (0, 1):
        result["note"] = clean("\n".join(said.strip().splitlines()[-15:]))
    return result


def _wait(process: subprocess.Popen, deadline: float) -> int | None:
    """The exit code, or None if the process had to be ended. Its children end too: one that hangs in a kernel
    would share the device with everything that is timed later."""
    code = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    return code


def summarize(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of outcomes, the failures, the reasons for skips, and the tests that never ended."""
    final: dict[str, dict[str, Any]] = {}
    for event in events:
        known = final.get(event["test"])
        # A failure outlives what comes after it: a teardown, or the note that the process crashed.
        if known is None or known["outcome"] != "failed":
            final[event["test"]] = event
    failures = [e for e in final.values() if e["outcome"] == "failed"]
    return {
        "counts": dict(
            Counter("unfinished" if e["outcome"] == "started" else e["outcome"] for e in final.values())
        ),
        "failures": [{"test": clean(e["test"]), "text": _shortened(e["text"])} for e in failures[:MOST_FAILURES]],
        "more_failures": [clean(e["test"]) for e in failures[MOST_FAILURES:]],
        "unfinished": [clean(e["test"]) for e in final.values() if e["outcome"] == "started"],
        "skipped": dict(Counter(clean(e["text"]) for e in final.values() if e["outcome"] == "skipped")),
    }


def _shortened(text: str) -> str:
    lines = clean(text).splitlines()
    if len(lines) <= MOST_LINES:
        return "\n".join(lines)
    return "\n".join([*lines[:10], "[...]", *lines[10 - MOST_LINES :]])
