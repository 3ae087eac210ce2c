"""Rows of many calls and targets: a pool of processes, and a cache keyed by everything they depend on."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from benchmarks.compile_report import caching
from benchmarks.compile_report.launches import Call
from benchmarks.compile_report.rows import Row, rows_of
from benchmarks.compile_report.targets import TARGETS


class Job(NamedTuple):
    """One call on one target."""

    call: Call
    target: str

    def rows(self, cached: bool) -> list[Row]:
        return rows_of(self.call, TARGETS[self.target], cached=cached)


class Task(Protocol):
    """A Job, or anything like it: its repr names everything its rows depend on, beside the sources."""

    @property
    def target(self) -> str: ...

    def rows(self, cached: bool) -> list[Row]: ...


def cache_file(task: Task) -> Path:
    return caching.file_of(caching.source_hash(), repr(task))


def rows_of_task(task: Task, cached: bool) -> list[Row]:
    return task.rows(cached)


def collect(tasks: Sequence[Task], workers: int, cached: bool, progress: Callable[[], None]) -> list[Row]:
    """The tasks' rows in the tasks' order; from the cache where it has them."""
    kept = {task: caching.read(cache_file(task)) for task in tasks if cached}
    found = {task: [Row.from_json(row) for row in rows] for task, rows in kept.items() if rows is not None}
    for _ in found:
        progress()
    todo = sorted((task for task in tasks if task not in found), key=slow_compiler, reverse=True)
    # A forked process would share Triton's state with this one.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for task, rows in zip(todo, pool.map(functools.partial(rows_of_task, cached=cached), todo), strict=True):
            found[task] = rows
            if not any(row.error for row in rows):
                caching.write(cache_file(task), [row.to_json() for row in rows])
            progress()
    return [row for task in tasks for row in found[task]]


def slow_compiler(task: Task) -> bool:
    """Start AMD targets first: they compile ten times slower and would finish last."""
    return TARGETS[task.target].backend == "hip"
