"""A process that runs cases: JSON lines in on stdin, JSON lines out on a pipe of its own.

Usage: python -m fastattn.measuring.worker PIPE DEVICE HANDLERS. HANDLERS is a module with a dictionary HANDLERS: a
function for each kind of case. If it has a function `context(DEVICE)`, the process runs within that context, which
gives the torch device. Before each step the process sends the name of that step, so that the parent knows which
step hangs. After an error that leaves the device unusable (an illegal address poisons the whole CUDA context) it
says so and ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fastattn.measuring.measure import one_line, synchronize


class Lost(Exception):
    """The device no longer answers."""


class Session:
    """The pipe to the parent, and which step is under way."""

    def __init__(self, pipe: int, device: torch.device) -> None:
        self.stream = os.fdopen(pipe, "w")
        self.device = device
        self.step = "start"

    def send(self, **message: Any) -> None:
        self.stream.write(json.dumps(message) + "\n")
        self.stream.flush()

    def notify(self, step: str) -> None:
        """The step before must be over, on the device too; this one begins."""
        self.check()
        self.step = step
        self.send(step=step)

    def check(self) -> None:
        try:
            synchronize(self.device)
        except RuntimeError as error:
            raise Lost(one_line(error)) from error

    def run(self, handler: Any, case: dict[str, Any]) -> None:
        """One case, whatever happens in it; ends the process if the device is lost."""
        self.step = "start"
        try:
            rows = handler(case, self.device, self.notify)
            self.check()
        except Exception as error:
            note = one_line(error)
            try:
                self.check()
            except Lost as lost:
                self.send(lost=self.step, note=str(lost))
                os._exit(1)
            self.send(failed=self.step, note=note)
        else:
            self.leave()
            self.send(rows=rows)

    def leave(self) -> None:
        """Give back the memory of the GPU that other processes need."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def on(device: str) -> Iterator[torch.device]:
    """The context of modules that have none of their own."""
    yield torch.device(device)


def main() -> None:
    pipe, name, module = sys.argv[1:]
    handlers = importlib.import_module(module)
    with getattr(handlers, "context", on)(name) as device:
        session = Session(int(pipe), device)
        session.send(ready=True)
        for line in sys.stdin:
            case = json.loads(line)
            session.run(handlers.HANDLERS[case["kind"]], case)


if __name__ == "__main__":
    main()
