"""The parent's side of a worker: send a case, wait no longer than allowed, start a new process after a loss."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from fastattn.measuring.paths import ROOT, clean, python_path

# Signals by which a process ends through its own fault; others come from outside, as when memory runs out.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
START_LIMIT = 120.0  # importing torch and making a CUDA context, on a busy machine


@dataclass
class Answer:
    """The rows of a case; or the step at which it went wrong (`step`), and why (`note`)."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    step: str = ""
    note: str = ""
    out_of_time: bool = False  # the section ended, through no fault of the case
    failed: bool = False  # it raised, crashed its process or lost the device; not so if it hung or was killed

    @property
    def went_wrong(self) -> bool:
        return bool(self.note)


class Worker:
    """A process that is started when first asked and stays until it hangs, dies or is closed.

    Args:
        device: what the module's `context` takes; without one "cuda", "cuda:1" or "cpu".
        handlers: the module whose HANDLERS serve the cases.
        environment: variables on top of this process's own.
    """

    def __init__(
        self,
        device: str,
        handlers: str,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.device = device
        self.handlers = handlers
        self.environment = environment or {}
        self.process: subprocess.Popen | None = None
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.log: Any = None

    def ask(self, case: dict[str, Any], *, step_limit: float, deadline: float) -> Answer:
        """Run a case. It is given up when a step takes longer than `step_limit` seconds, or at `deadline`
        (of time.monotonic)."""
        if time.monotonic() >= deadline:
            return Answer(step="start", note="not reached", out_of_time=True)
        if not self._start(deadline):
            return Answer(step="start", note="the worker did not start")
        assert self.process and self.process.stdin
        step, rows = "start", None
        try:
            self.process.stdin.write(json.dumps(case) + "\n")
            self.process.stdin.flush()
        except OSError:
            return self._lost(step)
        while rows is None:
            limit = min(step_limit, deadline - time.monotonic())
            try:
                message = self.messages.get(timeout=max(0.0, limit))
            except queue.Empty:
                self.close()
                if limit == step_limit:
                    return Answer(step=step, note=f"hung: no answer within {limit:.0f} s")
                return Answer(step=step, note="stopped at the section's end", out_of_time=True)
            if message is None:
                return self._lost(step)
            if "lost" in message:
                self.close()
                note = f"the device was lost: {clean(message['note'])}"
                return Answer(step=message["lost"], note=note, failed=True)
            if "failed" in message:
                return Answer(step=message["failed"], note=clean(message["note"]), failed=True)
            step = message.get("step", step)
            rows = message.get("rows")
        return Answer(rows=rows)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self.process is None:
            return
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)  # a driver can hold on to a process whose kernel does not end
        self.process = None
        self.log.close()

    def _start(self, deadline: float) -> bool:
        if self.process is not None:
            return True
        reading, writing = os.pipe()
        # What libraries print goes to a file that vanishes; its end is quoted if the process dies.
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastattn.measuring.worker", str(writing), self.device, self.handlers],
            stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, text=True, pass_fds=(writing,), cwd=ROOT,
            env={**os.environ, "PYTHONPATH": python_path(), **self.environment},
        )  # fmt: skip
        os.close(writing)
        self.messages = queue.Queue()
        threading.Thread(target=_forward_lines, args=(reading, self.messages), daemon=True).start()
        try:
            limit = min(START_LIMIT, deadline - time.monotonic())
            ready = self.messages.get(timeout=max(0.0, limit))
        except queue.Empty:
            ready = None
        if ready is None:
            self.close()
        return ready is not None

    def _lost(self, step: str) -> Answer:
        if self.process is None:  # closed by the end of the run, while this case was under way
            return Answer(step=step, note="stopped at the run's end", out_of_time=True)
        code = self.process.wait()
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or [""])[-1]
        self.close()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        note = clean(f"the process died ({how}) {last}".strip())[:200]
        return Answer(step=step, note=note, failed=code > 0 or -code in CRASHES)


def _forward_lines(pipe: int, messages: queue.Queue) -> None:
    """Each line of the pipe as a message; None when it ends."""
    with os.fdopen(pipe) as stream:
        for line in stream:
            messages.put(json.loads(line))
    messages.put(None)
