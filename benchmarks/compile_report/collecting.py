"""Rows of many calls and targets: a pool of processes, and a cache keyed by everything they depend on."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import triton

from benchmarks.compile_report.launches import Call
from benchmarks.compile_report.rows import Row, rows_of
from benchmarks.compile_report.targets import TARGETS

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"


class Job(NamedTuple):
    """One call on one target."""

    call: Call
    target: str

    def rows(self) -> list[Row]:
        return rows_of(self.call, TARGETS[self.target])


class Task(Protocol):
    """A Job, or anything like it: its repr names everything its rows depend on, beside the sources."""

    @property
    def target(self) -> str: ...

    def rows(self) -> list[Row]: ...


def cache_file(task: Task) -> Path:
    key = hashlib.sha256(f"{source_hash()} {task!r}".encode()).hexdigest()
    return cache_folder() / f"{key[:32]}.json"


def rows_of_task(task: Task) -> list[Row]:
    return task.rows()


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastattn/compile_report, by default below ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastattn" / "compile_report"


@functools.cache
def source_hash() -> str:
    """A hash of the kernels, their launchers and this report, without comments, and of the compilers' versions."""
    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for file in sorted([*KERNELS.rglob("*.py"), *HERE.glob("*.py")]):
        digest.update(ast.dump(ast.parse(file.read_text())).encode())
    return digest.hexdigest()


def collect(tasks: Sequence[Task], workers: int, cached: bool, progress: Callable[[], None]) -> list[Row]:
    """The tasks' rows in the tasks' order; from the cache where it has them."""
    found = {task: read(cache_file(task)) for task in tasks if cached and cache_file(task).exists()}
    for _ in found:
        progress()
    todo = sorted((task for task in tasks if task not in found), key=slow_compiler, reverse=True)
    # A forked process would share Triton's state with this one.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for task, rows in zip(todo, pool.map(rows_of_task, todo), strict=True):
            found[task] = rows
            if not any(row.error for row in rows):
                write(cache_file(task), rows)
            progress()
    return [row for task in tasks for row in found[task]]


def slow_compiler(task: Task) -> bool:
    """Start AMD targets first: they compile ten times slower and would finish last."""
    return TARGETS[task.target].backend == "hip"


def read(file: Path) -> list[Row]:
    return [Row.from_json(values) for values in json.loads(file.read_text())]


def write(file: Path, rows: list[Row]) -> None:
    """Through a second file, so that a reader never sees half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([row.to_json() for row in rows]))
    partial.replace(file)
