"""What the compiler makes of every kernel we ship, for GPUs that this machine need not have."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The report compiles; it must not be run under Triton's interpreter, which compiles nothing.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from rich.console import Console
from rich.progress import Progress

from benchmarks.compile_report import baseline, collecting, sweep
from benchmarks.compile_report.collecting import Job
from benchmarks.compile_report.launches import calls_for
from benchmarks.compile_report.rows import Row
from benchmarks.compile_report.table import table_of
from benchmarks.compile_report.targets import TARGETS


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.compile_report", description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="repeatable; default: all")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only calls whose name contains TEXT, as 'bf16 D=128'"
    )
    parser.add_argument(
        "--share", default="1/1", metavar="I/N", help="the I-th of N shares of the calls, another on each target"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one a core")
    parser.add_argument("--no-cache", action="store_true", help="do not read results of earlier runs")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail on spills, memory and ratios that rose")
    action.add_argument("--update", action="store_true", help=f"rewrite {baseline.COMMITTED.name}")
    action.add_argument("--sweep", metavar="KERNEL", choices=list(sweep.subjects(64, "bf16")), help="try tiles")
    action.add_argument(
        "--invariant", action="store_true", help="print the committed ratios of invariant calls beside plain ones"
    )
    swept = parser.add_argument_group("with --sweep")
    swept.add_argument("--width", type=int, default=128, help="head dimension, or an MLP's model dimension")
    swept.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    swept.add_argument("--sides", type=int, nargs="+", default=(32, 64, 128), help="of tiles")
    swept.add_argument("--warps", type=int, nargs="+", default=(4, 8))
    swept.add_argument("--stages", type=int, nargs="+", default=(2, 3))
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    asked = arguments(words)
    if asked.invariant:
        print(baseline.invariant_beside_plain())
        return 0
    targets = asked.target or list(TARGETS)
    # A pipe or a log has no width of its own: take one that holds the table.
    console = Console(width=None if sys.stdout.isatty() else 200)
    share, shares = map(int, asked.share.split("/"))
    is_part = bool(asked.target or asked.only or shares > 1)
    if asked.update and is_part:
        console.print("--update rewrites the whole file: it cannot be combined with --target, --only or --share")
        return 2
    started = time.monotonic()
    if asked.sweep:
        rows = swept_rows(asked, targets)
    else:
        jobs = [
            Job(call, target)
            for shift, target in enumerate(targets)
            for number, call in enumerate(calls_for(TARGETS[target]), shift)
            if asked.only in call.name and number % shares == share - 1
        ]
        rows = with_progress(jobs, asked)
    show(rows, console)
    console.print(f"{len(rows)} kernels in {time.monotonic() - started:.0f} s")
    if asked.json:
        asked.json.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    if asked.update:
        baseline.write(rows)
    if asked.check:
        return check(rows, not is_part, console)
    return 0


def swept_rows(asked: argparse.Namespace, targets: list[str]) -> list[Row]:
    subject = sweep.subjects(asked.width, asked.dtype)[asked.sweep]
    tiles = sweep.candidates(tuple(asked.sides), tuple(asked.warps), tuple(asked.stages))
    rows = with_progress([sweep.Trial(subject, target, tile) for target in targets for tile in tiles], asked)
    return sorted(rows, key=lambda row: (targets.index(row.target), sweep.merit(row)))


def with_progress(jobs: list, asked: argparse.Namespace) -> list[Row]:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compiling", total=len(jobs))
        return collecting.collect(jobs, asked.jobs, not asked.no_cache, lambda: bar.advance(task))


def show(rows: list[Row], console: Console) -> None:
    """A table for each target and call."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.target, row.call), []).append(row)
    for (target, call), group in groups.items():
        console.print(table_of(f"{target}, {call}", group))


def check(rows: list[Row], everything: bool, console: Console) -> int:
    for complaint in (complaints := baseline.complaints(rows, everything)):
        console.print(f"[red]{complaint}", soft_wrap=True)
    committed = json.loads(baseline.COMMITTED.read_text())["triton"]
    if committed != triton.__version__:
        console.print(f"ratios not compared: committed with Triton {committed}, this is {triton.__version__}")
    console.print(f"{len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
