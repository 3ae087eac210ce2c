"""The sections in order, within the deadline; everything found so far is on disk after every case."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import queue
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu import sweep
from benchmarks.gpu.paths import ROOT
from benchmarks.gpu.plan import ABSENT, Case, Plan, dry_plan, real_plan, warm_cases
from benchmarks.gpu.pool import Worker, compare_survivors
from benchmarks.gpu.report import write_report
from benchmarks.gpu.suite import run_suite

# Shares of the time that is left when a section begins; what one does not use goes to those after it.
SHARES = {"proofs": 0.40, "ceilings": 0.04, "attention": 0.30, "mlp": 0.15, "sweep": 0.11}
REPORT_SECONDS = 12.0


class Run:
    """One run: its plan, its folder, its results and its clock."""

    def __init__(self, plan: Plan, folder: Path, environment: dict[str, Any]) -> None:
        self.plan = plan
        self.folder = folder
        self.start = time.monotonic()
        self.end = self.start + plan.total - REPORT_SECONDS
        self.left = dict(SHARES)
        self.offences: dict[str, int] = {}
        self.lock = threading.Lock()
        self.worker = self.new_worker()
        self.crew = [self.new_worker() for _ in range(plan.warmers)]  # compile ahead; idle while anyone is timed
        self.results: dict[str, Any] = {
            "environment": environment,
            "dry_run": plan.device == "cpu",
            "absent": ABSENT,
            "sections": [],
            "suite": {},
            "correctness": [],
            "ceilings": {},
            "speed": [],
            "sweep": [],
            "proposals": [],
        }

    def new_worker(self) -> Worker:
        return Worker(self.plan.device, environment=dict(self.plan.environment))

    def deadline(self, section: str) -> float:
        """When this section must end: its share, of what is left, among the sections still to come."""
        share = self.left[section] / sum(self.left.values())
        del self.left[section]
        now = time.monotonic()
        return now + max(0.0, self.end - now) * share

    def keep(self, name: str, rows: Iterable[Any]) -> None:
        with self.lock:
            self.results[name].extend(rows)
            self.save()

    def save(self) -> None:
        """Replace results.json in one step, so that it is whole whenever the run is cut off."""
        draft = self.folder / "results.json.part"
        draft.write_text(json.dumps(self.results, indent=1))
        draft.replace(self.folder / "results.json")

    def section(self, title: str, cases: list[Case], deadline: float, run: Callable[[Case], None]) -> None:
        """Run the cases in order until the deadline, and note how far that went."""
        begin = time.monotonic()
        reached = 0
        for case in cases:
            if time.monotonic() >= deadline:
                break
            say(f"  {case['label']} {case.get('direction', '')}")
            run(case)
            reached += 1
        left_out = [f"{case['label']} {case.get('direction', '')}".strip() for case in cases[reached:]]
        self.keep("sections", [{
            "title": title, "seconds": round(time.monotonic() - begin, 1), "planned": len(cases),
            "reached": reached, "left_out": left_out,
        }])  # fmt: skip
        say(f"{title}: {reached} of {len(cases)} cases in {time.monotonic() - begin:.0f} s")

    # ---- the sections ----

    def proofs(self) -> None:
        """The test suite, the checks at real sizes, and compiling ahead what will be measured: at the same time,
        because nothing is timed yet."""
        deadline = self.deadline("proofs")
        ahead = warm_cases(self.plan)
        others = [start(self.correctness, deadline), start(self.in_parallel, ahead, deadline, 120.0)]
        self.results["suite"] = run_suite(
            list(self.plan.suite), processes=self.plan.suite_processes, deadline=deadline
        )
        say(f"test suite: {self.results['suite']['counts']} {self.results['suite'].get('note', '')}")
        for thread in others:
            thread.join()

    def correctness(self, deadline: float) -> None:
        worker = self.new_worker()

        def check(case: Case) -> None:
            answer = worker.ask(case, step_limit=2 * self.plan.step_limit, deadline=deadline)
            # Out of time is not wrong; hanging, dying and raising are.
            verdict = answer.note if answer.out_of_time else f"FAILED: {answer.note}"
            rows = answer.rows or [{"quantity": answer.step, "verdict": verdict}]
            self.keep("correctness", [{"label": case["label"], **row} for row in rows])

        self.section("correctness at real sizes", list(self.plan.correctness), deadline, check)
        worker.close()

    def in_parallel(self, cases: Iterable[Case], deadline: float, step_limit: float) -> None:
        """Have the crew do these cases; what they answer does not matter."""
        waiting: queue.Queue[Case] = queue.Queue()
        for case in cases:
            waiting.put(case)

        def work(worker: Worker) -> None:
            while time.monotonic() < deadline:
                try:
                    case = waiting.get_nowait()
                except queue.Empty:
                    return
                worker.ask(case, step_limit=step_limit, deadline=deadline)

        threads = [start(work, worker) for worker in self.crew[: waiting.qsize()]]
        for thread in threads:
            thread.join()

    def ceilings(self) -> None:
        deadline = self.deadline("ceilings")
        answer = self.worker.ask(
            self.plan.ceilings, step_limit=60.0, deadline=max(deadline, time.monotonic() + 20)
        )
        self.results["ceilings"] = answer.rows[0] if answer.rows else {"note": answer.note}
        self.save()
        say(f"ceilings: {self.results['ceilings']}")

    def speed(self, section: str, title: str, cases: tuple[Case, ...]) -> None:
        deadline = self.deadline(section)

        def compare(case: Case) -> None:
            self.keep("speed", compare_survivors(
                self.worker, case, self.offences, step_limit=self.plan.step_limit, deadline=deadline
            ))  # fmt: skip

        self.section(title, list(cases), deadline, compare)

    def sweep(self) -> None:
        """For the shapes furthest behind: compile candidates side by side, then time them one by one."""
        deadline = self.deadline("sweep")
        # The interpreter has a table of its own, so a rehearsal goes through every step too.
        answer = self.worker.ask({"kind": "family"}, step_limit=30.0, deadline=deadline)
        targets: list[Case] = []
        if answer.rows:
            targets = sweep.targets(self.results["speed"], answer.rows[0]["family"], self.plan.sweeps)

        def try_all(target: Case) -> None:
            cases = [{**target, **variant} for variant in target["variants"][: self.plan.candidates]]
            self.in_parallel([{**case, "rounds": 0} for case in cases], deadline, self.plan.step_limit)
            tried = [self.try_one({**case, "rounds": self.plan.rounds}, deadline) for case in cases]
            kept = {key: target[key] for key in ("table", "family", "problem", "label", "direction")}
            self.keep("sweep", [{**kept, "row": target.get("row"), "tried": tried}])
            proposed = sweep.proposal(target, tried)
            self.keep("proposals", [proposed] if proposed else [])

        self.section("sweep of launch configurations", targets, deadline, try_all)

    def try_one(self, case: Case, deadline: float) -> dict[str, Any]:
        answer = self.worker.ask(case, step_limit=self.plan.step_limit, deadline=deadline)
        variant = {key: case[key] for key in ("name", "tiling") if key in case}
        nothing = {"seconds": None, "spread": None, "note": answer.note}
        return {**variant, **(answer.rows[0] if answer.rows else nothing)}

    def go(self) -> None:
        self.save()
        say("1. the test suite, correctness at real sizes, and compiling ahead")
        self.proofs()
        self.ceilings()
        say("2. attention")
        self.speed("attention", "attention against its peers", self.plan.attention)
        say("3. MLP")
        self.speed("mlp", "MLP against its peers", self.plan.mlp)
        say("4. launch configurations")
        self.sweep()

    def finish(self) -> None:
        for worker in (self.worker, *self.crew):
            worker.close()
        self.results["seconds"] = round(time.monotonic() - self.start, 1)
        self.save()
        write_report(self.folder)


def start(function: Callable[..., None], *arguments: Any) -> threading.Thread:
    """A thread that does not keep an interrupted run alive."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def proven(results: dict[str, Any]) -> bool:
    """Whether every test and every check at real sizes passed, as far as they were reached."""
    wrong = [row for row in results["correctness"] if row["verdict"].startswith("FAILED")]
    for row in wrong:
        say(f"{row['label']} {row['quantity']}: {row['verdict']}")
    failures = results["suite"].get("failures", [])
    for failure in failures:
        say(f"failed: {failure['test']}")
    if results["suite"].get("broken"):
        say(results["suite"]["note"])
    return not wrong and not failures and not results["suite"].get("broken")


def say(text: str) -> None:
    print(text.rstrip(), flush=True)


def results_folder(plan: Plan, device: str) -> Path:
    """FASTATTN_RESULTS, or benchmarks/results/<device>-<date>; a rehearsal goes to a temporary folder."""
    named = os.environ.get("FASTATTN_RESULTS")
    if named:
        folder = Path(named)
    elif plan.device == "cpu":
        folder = Path(tempfile.mkdtemp(prefix="fastattn-dry-run-"))
    else:
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        day = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        folder = ROOT / "benchmarks" / "results" / f"{slug}-{day}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="every part on the CPU with tiny sizes")
    parser.add_argument("--report", metavar="FOLDER", help="only write report.md again from its results.json")
    options = parser.parse_args(arguments)
    if options.report:
        write_report(Path(options.report))
        return 0
    import torch

    from benchmarks.gpu.environment import describe_environment

    if not options.dry_run and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: PyTorch sees no GPU on this machine; --dry-run rehearses on the CPU", file=sys.stderr
        )
        return 1
    plan = dry_plan() if options.dry_run else real_plan()
    environment = describe_environment(plan.device)
    run = Run(plan, results_folder(plan, environment["device"]), environment)
    # A run that is ended from outside still writes its report.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        run.go()
    except KeyboardInterrupt:
        run.results["interrupted"] = True
    finally:
        run.finish()
    say(f"results in {run.folder}")
    return 0 if proven(run.results) else 1


if __name__ == "__main__":
    sys.exit(main())
