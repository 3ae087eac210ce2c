"""The sections in order, within the budget; after every case all results so far are on disk."""

from __future__ import annotations

import functools
import json
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import compilations, sanitizer, sweep, verdict
from benchmarks.gpu.plan import ABSENT, Case, Plan, warm_cases
from benchmarks.gpu.pool import compare_survivors, failed_row
from benchmarks.gpu.report import write_report
from benchmarks.gpu.state import State
from benchmarks.gpu.suite import Suite
from fastattn.core import proofs
from fastattn.core.proofs import Record, Row
from fastattn.measuring import prove_cases
from fastattn.measuring.pool import Answer, Worker
from fastattn.measuring.prove import SIDE_BY_SIDE, Prover

# Each section's share of the time that is left when it begins; time it does not use goes to those after it.
# The test suite comes last: its odd shapes take several compilations a test, and the sections before have proven
# the same kernels in fewer.
SHARES = {
    "kernels": 0.20, "record": 0.32, "ahead": 0.10, "ceilings": 0.02, "attention": 0.11, "mlp": 0.05,
    "features": 0.10, "small calls": 0.02, "sweep": 0.02, "suite": 0.06,
}  # fmt: skip
REPORT_SECONDS = 12.0
DEAREST = 5  # cases whose cost is told
# Where each section's rows are kept in results.json; these sections are timed, so nothing else runs beside them.
SPEED = {"attention": "speed", "mlp": "speed", "features": "features", "small calls": "small_calls"}
REAL_SIZES = "correctness at real sizes"
SWEEP = "launch configurations"
RECORD = "proof record"

Rows = list[dict[str, Any]]


class Run:
    """One call: its plan, its folder, what earlier calls left, its results and its clock."""

    def __init__(
        self, plan: Plan, folder: Path, environment: dict[str, Any], state: State, only: list[str] | None = None
    ) -> None:
        self.families = verdict.families_asked(only)
        self.plan = plan.of(self.families)
        self.only = only
        self.folder, self.state = folder, state
        self.start = time.monotonic()
        self.end = self.start + plan.budget - REPORT_SECONDS
        self.left = dict(SHARES)
        self.offences: dict[str, int] = {}
        self.lock = threading.Lock()
        self.compilations = state.folder / "compilations.jsonl"
        self.worker = self.new_worker()
        self.crew = [self.new_worker() for _ in range(plan.processes)]  # idle while something is timed
        self.tests = Suite(
            list(plan.suite), processes=plan.processes, deadline=self.end, state=state, say=say,
            families=self.families if only else None,
            environment={compilations.VARIABLE: str(self.compilations)},
        )  # fmt: skip
        self.results: dict[str, Any] = {
            "environment": environment, "dry_run": plan.rehearsal, "only": only, "absent": ABSENT,
            "planned": self.planned(), "sections": [], "suite": {}, "sanitizer": [], "kernels": [],
            "correctness": [], "record": [],
            "ceilings": {}, "speed": [], "features": [], "small_calls": [], "sweep": [], "proposals": [],
        }  # fmt: skip

    def new_worker(self) -> Worker:
        environment = {**dict(self.plan.environment), compilations.VARIABLE: str(self.compilations)}
        return Worker(self.plan.device, "benchmarks.gpu.cases", environment)

    def planned(self) -> list[str]:
        """The titles of all sections that have cases."""
        cases = {"kernels": self.plan.kernels, REAL_SIZES: self.plan.correctness, RECORD: self.plan.record}
        cases |= self.timed()
        return [*(title for title, some in cases.items() if some), SWEEP]

    def timed(self) -> dict[str, tuple[Case, ...]]:
        plan = self.plan
        return dict(zip(SPEED, (plan.attention, plan.mlp, plan.features, plan.small_calls), strict=True))

    # ---- the clock and the files ----

    def deadline(self, section: str) -> float:
        """When this section must end: its share of the time left, among the sections still to come."""
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

    # ---- cases ----

    def section(
        self,
        title: str,
        name: str,
        cases: Iterable[Case],
        deadline: float,
        workers: list[Worker],
        rows_of: Callable[[Worker, Case, float], tuple[Rows, bool]],
    ) -> None:
        """Run the cases in order, by these workers side by side, until the deadline; rows go to results[name].

        `rows_of` gives a case's rows, and whether it ran to its end: then the next call does not run it again.
        """
        begin, cases = time.monotonic(), list(cases)
        reached: set[int] = set()
        costs: dict[str, float] = {}
        waiting: queue.Queue[tuple[int, Case]] = queue.Queue()
        for number, case in enumerate(cases):
            known = self.state.rows_of(case)
            if known is None:
                waiting.put((number, case))
            else:
                self.keep(name, known)
                reached.add(number)

        def work(worker: Worker) -> None:
            while time.monotonic() < deadline:
                try:
                    number, case = waiting.get_nowait()
                except queue.Empty:
                    return
                asked = time.monotonic()
                rows, ended = rows_of(worker, case, deadline)
                costs[f"{case['label']} {case.get('direction', '')}".strip()] = time.monotonic() - asked
                if ended:
                    with self.lock:
                        self.state.keep_case(case, rows)
                if rows:
                    reached.add(number)
                self.keep(name, rows)

        run_threads(work, workers[: max(1, waiting.qsize())])
        left_out = [case["label"] for number, case in enumerate(cases) if number not in reached]
        seconds = time.monotonic() - begin
        self.keep("sections", [{
            "title": title, "seconds": round(seconds, 1), "planned": len(cases),
            "reached": len(reached), "left_out": left_out, "costs": summary_of(costs),
        }])  # fmt: skip
        say(f"{title}: {len(reached)} of {len(cases)} cases in {seconds:.0f} s{cost_of(costs)}")

    def ask(self, worker: Worker, case: Case, deadline: float, step_limit: float | None = None) -> Answer:
        """In a rehearsal the case is only launched."""
        if self.plan.rehearsal:
            case = {"kind": "launch", "of": case}
        return worker.ask(case, step_limit=step_limit or self.plan.step_limit, deadline=deadline)

    def proof(self, worker: Worker, case: Case, deadline: float) -> tuple[Rows, bool]:
        answer = self.ask(worker, case, deadline, 2 * self.plan.step_limit)
        if answer.out_of_time:
            return [], False
        about = {"label": case["label"]} | ({"sizes": case["sizes"]} if "sizes" in case else {})
        if answer.went_wrong:
            note = f"FAILED: {answer.note}" if answer.failed else answer.note
            say(f"  {case['label']}: {answer.step}: {note}")
            return [{**about, "quantity": answer.step, "verdict": note}], answer.failed
        rows = [{"quantity": "launch", "verdict": "launched"}] if self.plan.rehearsal else answer.rows
        for row in rows:
            if row["verdict"].startswith("FAILED"):
                say(f"  {case['label']} {row['quantity']}: {row['verdict']}")
        return [{**about, **row} for row in rows], True

    def time_peers(self, worker: Worker, case: Case, deadline: float) -> tuple[Rows, bool]:
        say(f"  {case['label']} {case['direction']}")
        if self.plan.rehearsal:
            answer = self.ask(worker, case, deadline)
            if answer.out_of_time:
                return [], False
            row = failed_row(case, "fastattn triton", answer.note)
            return [{**row, "launched": not answer.went_wrong, "failed": answer.failed}], not answer.went_wrong
        limits = {"step_limit": self.plan.step_limit, "deadline": deadline}
        rows = compare_survivors(worker, case, self.offences, **limits)
        ours = [row for row in rows if row["peer"].startswith("fastattn")]
        if time.monotonic() >= deadline and not any(row["seconds"] for row in ours):
            return [], False
        return rows, all(row["seconds"] or row.get("failed") for row in ours)

    # ---- the sections ----

    def kernels(self) -> None:
        """Every family's kernels, all workers at once."""
        deadline = self.deadline("kernels")
        self.section("kernels", "kernels", self.plan.kernels, deadline, self.crew, self.proof)

    def ahead(self) -> None:
        """The checks at real sizes; beside them, compiling what will be timed."""
        deadline = self.deadline("ahead")
        checking = len(self.crew) if self.plan.rehearsal else max(1, len(self.crew) // 4)
        checks = (REAL_SIZES, "correctness", self.plan.correctness, deadline, self.crew[:checking], self.proof)
        others = [start(self.section, *checks)]
        if not self.plan.rehearsal:
            others.append(start(self.warm, deadline, self.crew[checking:]))
        for thread in others:
            thread.join()

    def suite(self) -> None:
        """The tests, and beside them a few calls under compute-sanitizer."""
        deadline = self.deadline("suite")
        others = [] if self.plan.rehearsal else [start(self.sanitize, deadline)]
        self.results["suite"] = self.tests.run(deadline)
        say(f"test suite: {self.results['suite']['counts']} in {self.results['suite']['seconds']:.0f} s")
        for thread in others:
            thread.join()

    def record(self) -> None:
        """What `fastattn prove` does, and the record that it would write: record.json in the folder."""
        begin, deadline = time.monotonic(), self.deadline("record")
        known = {case["label"]: self.state.rows_of({**case, "kind": "record"}) for case in self.plan.record}
        left = [case for case in self.plan.record if known[case["label"]] is None]
        self.keep("record", (row for rows in known.values() for row in rows or ()))
        by_key = {key: case for case in left for key in prove_cases.keys(case)}

        def keep(rows: list[Row]) -> None:
            # A rehearsal launches only: it tells of what went wrong, and proves nothing.
            plain = [row.as_json() for row in rows if not (self.plan.rehearsal and row.verdict == proofs.PROVEN)]
            if plain:
                self.state.keep_case({**by_key[rows[0].key], "kind": "record"}, plain)
                self.keep("record", plain)
            if plain and not self.plan.rehearsal:
                self.write_record()

        # Half of a small crew compiles ahead, and most of a large one.
        provers = max(1, min(SIDE_BY_SIDE, len(self.crew) // 2))
        workers = [Rehearsed(worker) if self.plan.rehearsal else worker for worker in self.crew[:provers]]
        prover = Prover(
            left, workers, keep, deadline=deadline, step_limit=self.plan.step_limit, compilers=self.crew[provers:],
            on_step=lambda label, done: say(f"  {done} of {len(left)}: {label}"),
        )  # fmt: skip
        prover.go()
        done = {case["label"] for case in prover.done} | {label for label, rows in known.items() if rows}
        left_out = [case["label"] for case in self.plan.record if case["label"] not in done]
        seconds = time.monotonic() - begin
        self.keep("sections", [{
            "title": RECORD, "seconds": round(seconds, 1), "planned": len(self.plan.record),
            "reached": len(done), "left_out": left_out,
        }])  # fmt: skip
        say(f"{RECORD}: {len(done)} of {len(self.plan.record)} kinds of calls in {seconds:.0f} s")
        if not self.plan.rehearsal:
            self.write_record()

    def write_record(self) -> None:
        """record.json, after each kind of call: a run may be killed at any time."""
        rows = [Row.of(row) for row in self.results["record"]]
        where = self.results["environment"]
        machine = proofs.machine(torch.device("cuda", 0))
        record = Record(machine, where["driver"], where["date"], {row.key: row for row in rows})
        proofs.write(self.folder / "record.json", record)

    def warm(self, deadline: float, workers: list[Worker]) -> None:
        """Compile what will be timed; the answers are not used."""
        waiting: queue.Queue[Case] = queue.Queue()
        for case in warm_cases(self.plan):
            waiting.put(case)

        def work(worker: Worker) -> None:
            while time.monotonic() < deadline and not waiting.empty():
                worker.ask(waiting.get(), step_limit=120.0, deadline=deadline)

        run_threads(work, workers)

    def sanitize(self, deadline: float) -> None:
        """compute-sanitizer, if it is installed, over a small selection; what an earlier call finished is kept."""
        cases = {tool: {"kind": "sanitizer", "label": tool} for tool in sanitizer.TOOLS}
        known = {tool: self.state.rows_of(case) for tool, case in cases.items()}
        self.keep("sanitizer", (row for rows in known.values() for row in rows or ()))
        for row in sanitizer.checks([tool for tool in cases if known[tool] is None], deadline):
            if verdict.is_final(row["verdict"]):
                with self.lock:
                    self.state.keep_case(cases[row["tool"]], [row])
            self.keep("sanitizer", [row])
            say(f"compute-sanitizer, {row['tool']}: {row['verdict']}")

    def ceilings(self) -> None:
        deadline = max(self.deadline("ceilings"), time.monotonic() + 20)
        if not self.plan.rehearsal:
            answer = self.worker.ask(self.plan.ceilings, step_limit=60.0, deadline=deadline)
            self.results["ceilings"] = answer.rows[0] if answer.rows else {"note": answer.note}

    def speed(self, section: str, cases: tuple[Case, ...]) -> None:
        deadline = self.deadline(section)
        if cases:
            workers = self.crew if self.plan.rehearsal else [self.worker]
            self.section(section, SPEED[section], cases, deadline, workers, self.time_peers)

    def sweep(self) -> None:
        """For the shapes furthest behind: compile candidates side by side, then time them one by one."""
        deadline = self.deadline("sweep")
        answer = self.worker.ask({"kind": "family"}, step_limit=60.0, deadline=deadline)
        targets: list[Case] = []
        if answer.rows:
            targets = sweep.targets(self.results["speed"], answer.rows[0]["family"], self.plan.sweeps)
        self.section(SWEEP, "sweep", targets, deadline, [self.worker], self.try_all)
        self.results["proposals"] = [row["proposal"] for row in self.results["sweep"] if row["proposal"]]

    def try_all(self, worker: Worker, target: Case, deadline: float) -> tuple[Rows, bool]:
        say(f"  {target['table']} at {target['label']}")
        cases = [{**target, **variant} for variant in target["variants"][: self.plan.candidates]]
        waiting: queue.Queue[Case] = queue.Queue()
        for case in cases:
            waiting.put({**case, "rounds": 0})

        def compile_one(helper: Worker) -> None:
            while time.monotonic() < deadline and not waiting.empty():
                self.ask(helper, waiting.get(), deadline)

        run_threads(compile_one, self.crew)
        tried = [self.try_one(worker, {**case, "rounds": self.plan.rounds}, deadline) for case in cases]
        if time.monotonic() >= deadline and not any(one["seconds"] for one in tried):
            return [], False
        kept = {key: target[key] for key in ("table", "family", "problem", "label", "direction")}
        proposal = sweep.proposal(target, tried)
        return [{**kept, "row": target.get("row"), "tried": tried, "proposal": proposal}], True

    def try_one(self, worker: Worker, case: Case, deadline: float) -> dict[str, Any]:
        answer = self.ask(worker, case, deadline)
        variant = {key: case[key] for key in ("name", "tiling", "ahead") if key in case}
        nothing = {"seconds": None, "spread": None, "note": answer.note}
        return {**variant, **nothing, **(answer.rows[0] if answer.rows else {})}

    def go(self) -> None:
        self.save()
        self.tests.collect_ahead()
        steps: list[Callable[[], None]] = [self.kernels, self.record, self.ahead, self.ceilings]
        steps += [functools.partial(self.speed, section, cases) for section, cases in self.timed().items()]
        for step in (*steps, self.sweep, self.suite):
            step()
            # A run that is killed keeps what it has.
            write_report(self.folder, plots=False)

    def finish(self) -> verdict.Verdict:
        """Close the workers, judge, and write the report."""
        for worker in (self.worker, *self.crew):
            worker.close()
        said = verdict.verdict_of(self.results)
        self.results |= {
            "seconds": round(time.monotonic() - self.start, 1),
            "compilations": compilations.summarize(self.compilations),
            "verdict": said._asdict(),
            "proven": verdict.proven(self.results),
            "proofs": verdict.proofs(self.results),
        }
        self.save()
        write_report(self.folder)
        return said


class Rehearsed:
    """A process that only launches what it would check and time. Tilings are chosen as ever, by times that mean
    nothing."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def ask(self, case: Case, *, step_limit: float, deadline: float) -> Answer:
        chooses = case["kind"] in ("candidates", "choose")
        asked = case if chooses else {"kind": "launch", "of": case}
        answer = self.worker.ask(asked, step_limit=step_limit, deadline=deadline)
        if answer.went_wrong or chooses:
            return answer
        if case["kind"] == "try":
            return Answer([{"verdict": None, "reason": ""}])
        nothing = {"error": None, "allowed": None, "ratio": None, "verdict": None, "reason": "launched"}
        return Answer([{"direction": k.direction, "size": k.size, **nothing} for k in prove_cases.keys(case)])

    def close(self) -> None:
        self.worker.close()


def summary_of(costs: dict[str, float]) -> dict[str, float]:
    """The most expensive cases and the median, in seconds of one worker; what is left is estimated by them."""
    if not costs:
        return {}
    dearest = sorted(costs, key=costs.__getitem__, reverse=True)[:DEAREST]
    return {"median": round(statistics.median(costs.values()), 2), **{c: round(costs[c], 1) for c in dearest}}


def cost_of(costs: dict[str, float]) -> str:
    """The same in words; "" if there are none."""
    median, *dearest = [f"{name} {seconds:g} s" for name, seconds in summary_of(costs).items()] or [""]
    return f" ({median} a case; most: {', '.join(dearest)})" if median else ""


def run_threads(function: Callable[[Worker], None], workers: Iterable[Worker]) -> None:
    threads = [start(function, worker) for worker in workers]
    for thread in threads:
        thread.join()


def start(function: Callable[..., None], *arguments: Any) -> threading.Thread:
    """A thread that does not keep an interrupted run alive."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def say(text: str) -> None:
    print(text.rstrip(), flush=True)
