"""Compiling ahead: processes compile what later cases of `fastattn prove` launch, while a GPU checks earlier ones.

A kernel takes about a second to compile, and a kind of call has up to forty; a GPU needs a few seconds for its
checks and timings. A compiler makes the same calls in the same way and launches nothing. So the check and the
timing find their kernels in Triton's cache on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fastattn.measuring.pool import Answer

Case = dict[str, Any]

# A compiler compiles a handful of kernels for a piece, beside others on the same cores.
PIECE_LIMIT = 240.0
# The most tilings of a case that are compiled ahead.
MOST_TILINGS = 16
# The part of a GPU's memory that all compilers have together, and what each needs: a context, and some tensors.
MEMORY_PART, MEMORY_EACH = 0.4, 2**31
# Cores that are left to what is checked and timed; with fewer than LEAST_CORES there is no use in compilers.
CORES_LEFT, LEAST_CORES = 2, 4


class Asker(Protocol):
    """What runs cases: a Worker, or something in its place."""

    def ask(self, case: dict[str, Any], *, step_limit: float, deadline: float) -> Answer: ...

    def close(self) -> None: ...


# ---- the parent's side ----


def compilers_for(device: torch.device) -> int:
    """How many processes should compile for this device."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type != "cuda" or cores < LEAST_CORES:
        return 0
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(cores - CORES_LEFT, int(MEMORY_PART * memory) // MEMORY_EACH))


def pieces_of(one: Case) -> Iterator[Case]:
    """What is compiled for a case, each piece by one process: its checks, what is timed, and the tilings that are
    tried. Only the compilers know how many there are."""
    for sizes in one["checks"]:
        yield {"kind": "compile", "label": one["label"], "sizes": sizes, "timed": []}
    for sizes in one["timed"].values():
        yield {"kind": "compile", "label": one["label"], "sizes": sizes, "timed": one["directions"]}
    for number in range(MOST_TILINGS if one.get("tiled") else 0):
        yield {"kind": "compile tiling", "label": one["label"], "of": one, "number": number}


class Ahead:
    """Compiles the kernels of cases, in the order of these, by several processes side by side.

    Args:
        compilers: the processes. Without any, nothing is compiled and nobody waits.
    """

    def __init__(self, cases: Sequence[Case], compilers: Sequence[Asker], *, deadline: float) -> None:
        self.compilers, self.deadline = list(compilers), deadline
        self.pieces = deque(piece for one in cases for piece in pieces_of(one)) if compilers else deque()
        self.left = Counter(piece["label"] for piece in self.pieces)
        self.changed = threading.Condition()
        self.gate = threading.Lock()
        self.busy: dict[int, Asker] = {}
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> Ahead:
        self.claims = tempfile.TemporaryDirectory(prefix="fastattn-claims-")
        # Threads that do not keep an interrupted run alive.
        for number in range(len(self.compilers)):
            self.threads.append(threading.Thread(target=self._work, args=(number,), daemon=True))
            self.threads[-1].start()
        return self

    def __exit__(self, *error: Any) -> None:
        """End what is under way. A compiler that is idle is left as it is."""
        with self.gate:
            self.pieces.clear()
        for thread in self.threads:
            while thread.is_alive():  # it may be about to ask
                for compiler in list(self.busy.values()):
                    compiler.close()
                thread.join(0.2)
        self.claims.cleanup()

    def wait(self, cases: Sequence[Case]) -> float:
        """Until all of these cases are compiled, or the time is over. Returns how many seconds that took."""
        begin = time.monotonic()
        labels = [one["label"] for one in cases]
        with self.changed:
            self.changed.wait_for(
                lambda: not any(self.left[label] for label in labels),
                timeout=max(0.0, self.deadline - begin),
            )
        return time.monotonic() - begin

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Within, nothing is compiled, since that takes cores, and makes tensors on the GPU that is timed. Pieces
        that are under way are ended first; no other is begun."""
        with self.gate:
            with self.changed:
                self.changed.wait_for(lambda: not self.busy, timeout=max(0.0, self.deadline - time.monotonic()))
            yield

    def _work(self, number: int) -> None:
        compiler = self.compilers[number]
        part = MEMORY_PART / len(self.compilers)
        while True:
            with self.gate:
                if not self.pieces or time.monotonic() >= self.deadline:
                    break
                piece = {**self.pieces.popleft(), "claims": self.claims.name, "memory": part}
                self.busy[number] = compiler
            try:
                compiler.ask(piece, step_limit=PIECE_LIMIT, deadline=self.deadline)
            finally:  # whatever happened: nobody may wait for this piece for ever
                with self.changed:
                    self.busy.pop(number)
                    self.left[piece["label"]] -= 1
                    self.changed.notify_all()


# ---- the compiler's side ----


@contextlib.contextmanager
def compiling_only(claims: Path) -> Iterator[list[str]]:
    """Inside, kernels are compiled and not launched. Each is compiled by the process that claims it first, by a
    file in the folder `claims`; the names of this process's are put on the list."""
    from triton.runtime.jit import JITFunction

    run, compile_one = JITFunction.run, JITFunction._do_compile
    compiled: list[str] = []

    def only_compile(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *arguments, grid=grid, warmup=True, **options)

    def compile_once(kernel: Any, key: Any, *rest: Any) -> Any:
        name = hashlib.sha256(f"{kernel.fn.__module__}.{kernel.fn.__qualname__} {key}".encode()).hexdigest()
        try:
            (claims / name).touch(exist_ok=False)
        except FileExistsError:
            return None
        compiled.append(kernel.fn.__name__)
        return compile_one(kernel, key, *rest)

    JITFunction.run, JITFunction._do_compile = only_compile, compile_once
    try:
        yield compiled
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile_one


@contextlib.contextmanager
def memory_limit(device: torch.device, part: float) -> Iterator[None]:
    """Inside, this process may have that part of the GPU's memory."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        yield
        return
    torch.cuda.set_per_process_memory_fraction(part, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
