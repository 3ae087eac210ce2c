"""Prove and measure every kernel on this machine's GPU; `--dry-run` rehearses all of it without one.

Exit code 0: everything asked was run, and passed. 1: something failed. 2: something asked was not run to its end.
The first line of report.md says which.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import write_report
from benchmarks.gpu.shards import KERNEL_TESTS, OTHER
from benchmarks.gpu.verdict import INCOMPLETE
from fastattn.measuring.paths import ROOT

FAMILIES = (*dict.fromkeys(KERNEL_TESTS.values()), OTHER)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def results_folder(rehearsal: bool, device: str) -> Path:
    """FASTATTN_RESULTS, or benchmarks/results/<device>-<date>; a rehearsal goes to a temporary folder."""
    named = os.environ.get("FASTATTN_RESULTS")
    if named:
        folder = Path(named)
    elif rehearsal:
        folder = Path(tempfile.mkdtemp(prefix="fastattn-dry-run-"))
    else:
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        day = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        folder = ROOT / "benchmarks" / "results" / f"{slug}-{day}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="launch everything on a pretended GPU, compute nothing"
    )
    parser.add_argument(
        "--until",
        choices=("ttir", "ptx"),
        default="ptx",
        help="with --dry-run: the last stage of the compiler, by default ptx; ttir is quick, and checks no sizes",
    )
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="how long this call may take")
    parser.add_argument(
        "--fresh", action="store_true", help="run everything again, also what earlier calls finished"
    )
    parser.add_argument("--state", type=Path, default=ROOT / ".gpu-run", help="where finished cases are kept")
    parser.add_argument(
        "--report", metavar="FOLDER", help="only write report.md again, from results.json in FOLDER"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = read_arguments(arguments)
    if options.report:
        write_report(Path(options.report))
        return 0
    import torch

    # Imported here, because --report works without torch.
    from benchmarks.gpu import rehearsal, state
    from benchmarks.gpu.environment import describe_environment
    from benchmarks.gpu.plan import dry_plan, real_plan
    from benchmarks.gpu.run import Run, say

    if options.dry_run:
        if reason := rehearsal.obstacle():
            print(f"benchmarks.gpu: no rehearsal: {reason}", file=sys.stderr)
            return INCOMPLETE
    elif not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no GPU here; --dry-run rehearses without one", file=sys.stderr)
        return INCOMPLETE
    plan = dry_plan(options.until) if options.dry_run else real_plan()
    plan = replace(plan, budget=options.budget or plan.budget)
    environment = describe_environment(plan.device)
    kept = state.State(options.state / state.identity(environment), fresh=options.fresh or plan.rehearsal)
    run = Run(plan, results_folder(plan.rehearsal, environment["device"]), environment, kept, options.only)
    # A run that is ended from outside still writes its report.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        run.go()
    except KeyboardInterrupt:
        run.results["interrupted"] = True
    finally:
        verdict = run.finish()
    say(f"{verdict.line}\nresults in {run.folder}")
    return verdict.code


if __name__ == "__main__":
    sys.exit(main())
