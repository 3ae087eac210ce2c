"""`fastattn prove`: test and time every kernel on this machine's GPU, and let those serve that earn it.

What most programs call comes first. Some processes compile ahead (fastattn.measuring.ahead). Others compare a
kernel with float64 by the tests' rule, in three runs bit for bit, then time it against what would serve otherwise:
PyTorch's own kernels, or the portable tiles. The verdicts go into a proof record (fastattn.core.proofs), which
decides what serves from then on.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import queue
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from fastattn.core import capabilities, proofs
from fastattn.core.proofs import Record, Row
from fastattn.errors import CommandError
from fastattn.measuring import prove_cases, tables
from fastattn.measuring.ahead import Ahead, Asker, compilers_for
from fastattn.measuring.pool import Answer, Worker
from fastattn.measuring.prove_cases import FAMILIES, Case

BUDGET = 120.0
# The longest step: one check, compiling included, or one timing.
STEP_LIMIT = 60.0
SIDE_BY_SIDE = 4  # cases that are checked at a time: one alone leaves a GPU idle between its launches
BATCHES = 3  # of cases, that are checked before they are timed
RECENT = 20  # cases by which the rest is estimated
HANDLERS = "fastattn.measuring.prove_tilings"


class Prover:
    """Proves cases, and hands over the rows of each as they come.

    Args:
        cases: in the order in which they are proven.
        workers: processes that check and time, a case each at a time. Whoever made them closes them.
        keep: is called with the rows of each case.
        compilers: processes that compile ahead.
        step_limit: seconds after which a step counts as hung.
        on_step: is called after each case with what it was and what it cost, and the number of cases done.
        allow_spills: so many registers may a kernel spill and serve.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        workers: Sequence[Asker],
        keep: Callable[[list[Row]], None],
        *,
        deadline: float,
        compilers: Sequence[Asker] = (),
        step_limit: float = STEP_LIMIT,
        on_step: Callable[[str, int], None] = lambda label, done: None,
        allow_spills: int = 0,
    ) -> None:
        self.cases, self.workers, self.keep = cases, workers, keep
        self.limits = {"step_limit": step_limit, "deadline": deadline}
        self.ahead = Ahead(cases, compilers, deadline=deadline)
        self.on_step = on_step
        self.allow_spills = allow_spills
        self.done: list[Case] = []
        self.right: dict[str, list[dict[str, Any]]] = {}  # tilings by the label of a case, see prove_tilings

    def go(self) -> None:
        """Until all is proven or the deadline: some cases are checked, as many at a time as there are workers;
        then they are timed one by one, while nothing else is checked or compiled ahead."""
        waiting = deque(self.cases)
        with self.ahead:
            while waiting and time.monotonic() < self.limits["deadline"]:
                checked = self._next_checked(waiting)
                with self.ahead.quiet():
                    for place, one, answer, waited, seconds in checked:
                        self.keep(self._rows(self.workers[place], one, answer, waited, seconds))

    def _next_checked(self, waiting: deque[Case]) -> list[tuple[int, Case, Answer, float, float]]:
        """The next cases, checked. With compilers those of several batches: before something is timed, these end
        what they are compiling, and idle. Not so many that too little time would be left for them."""
        begin = time.monotonic()
        left = self.limits["deadline"] - begin
        checked: list[tuple[int, Case, Answer, float, float]] = []
        for _ in range(BATCHES if self.ahead.compilers else 1):
            if not waiting or time.monotonic() - begin > left / 3:
                break
            batch = [waiting.popleft() for _ in range(min(len(self.workers), len(waiting)))]
            waited = self.ahead.wait(batch) / len(batch)
            checked += [
                (place, one, answer, waited, seconds) for place, one, answer, seconds in self._checked(batch)
            ]
        return checked

    def _checked(self, batch: list[Case]) -> list[tuple[int, Case, Answer, float]]:
        """The cases that were reached, each with its worker's place, what came out, and how long it took."""
        found: dict[int, tuple[int, Case, Answer, float]] = {}

        def check(place: int, one: Case) -> None:
            begin = time.monotonic()
            case = {**one, "kind": "check", "allow_spills": self.allow_spills}
            answer = self.workers[place].ask(case, **self.limits)
            found[place] = place, one, answer, time.monotonic() - begin

        # Threads that do not keep an interrupted run alive.
        threads = [threading.Thread(target=check, args=asked, daemon=True) for asked in enumerate(batch)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        checked = [found[place] for place in sorted(found)]
        self._try_tilings(
            [{**one, "directions": right} for _, one, answer, _ in checked if (right := _to_tile(one, answer))]
        )
        return checked

    def _try_tilings(self, cases: list[Case]) -> None:
        """Find out which tilings beside the launch tables' are right for these cases in their directions, by all
        workers side by side. One that is wrong, hangs, spills or does not compile is left out; so is what no time
        is left for."""
        waiting: queue.SimpleQueue[tuple[Case, dict[str, Any]]] = queue.SimpleQueue()
        for one in cases:
            self.right[one["label"]] = []
            for candidate in self.workers[0].ask({**one, "kind": "candidates"}, **self.limits).rows:
                waiting.put((one, candidate))

        def go_on(worker: Asker) -> None:
            while time.monotonic() < self.limits["deadline"]:
                try:
                    one, candidate = waiting.get_nowait()
                except queue.Empty:
                    return
                asked = {**one, "kind": "try", "try": candidate, "allow_spills": self.allow_spills}
                answer = worker.ask(asked, **self.limits)
                if answer.rows and answer.rows[0]["verdict"] is None:
                    self.right[one["label"]].append(candidate)

        threads = [threading.Thread(target=go_on, args=(worker,), daemon=True) for worker in self.workers]
        for thread in threads if cases else ():
            thread.start()
        for thread in threads if cases else ():
            thread.join()

    def _chosen(self, worker: Asker, one: Case) -> list[dict[str, Any]]:
        """The fastest tilings of a case, by direction and size, where it has some to choose from."""
        right = self.right.get(one["label"])
        return worker.ask({**one, "kind": "choose", "right": right}, **self.limits).rows if right else []

    def _rows(self, worker: Asker, one: Case, checked: Answer, waited: float, check_seconds: float) -> list[Row]:
        """The rows of a case, timed if it is right, even if it spills; none if the time was over."""
        begin = time.monotonic()
        if checked.out_of_time:
            return []
        if "OutOfMemoryError" in checked.note:  # it says nothing about the kernel
            self.done.append(one)
            return []
        rows = verdict_rows(one, checked)
        if any(row["verdict"] in TIMED for row in rows.values()):
            asked = {**one, "kind": "time", "chosen": self._chosen(worker, one)}
            timed = worker.ask(asked, **self.limits)
            if timed.out_of_time:
                return []
            skipped = {(row["direction"], row["size"]) for row in timed.rows if row.get("skipped")}
            keys = [key for key in prove_cases.keys(one) if (key.direction, key.size) not in skipped]
            found = [judged(one, rows, key, timed) for key in keys]
        else:
            found = [judged(one, rows, key, None) for key in prove_cases.keys(one)]
        self.done.append(one)
        times = f"{check_seconds:.1f} s to check, {time.monotonic() - begin:.1f} s to time"
        if self.ahead.compilers:
            times = f"waited {waited:.1f} s for compilers, {times}"
        self.on_step(f"{one['label']} ({times})", len(self.done))
        return found


def _to_tile(one: Case, answer: Answer) -> list[str]:
    """The directions of a case in which tilings are chosen: where the tables' kernels are right. Those that spill
    do not serve, whatever else is found."""
    if answer.out_of_time or not one.get("tiled"):
        return []
    return [name for name, row in verdict_rows(one, answer).items() if row["verdict"] is None]


def verdict_rows(one: Case, answer: Answer) -> dict[str, dict[str, Any]]:
    """By direction, what the checks found. If they were not run to their end, the same for all directions."""
    if not answer.went_wrong:
        return {row["direction"]: row for row in answer.rows}
    lost = {
        "verdict": verdict_of(answer),
        "error": None,
        "allowed": None,
        "reason": f"{answer.step}: {answer.note}",
    }
    return {direction: {"direction": direction, **lost} for direction in one["directions"]}


def verdict_of(answer: Answer) -> str:
    """Of a case that went wrong."""
    if answer.note.startswith("hung"):
        return proofs.HUNG
    return proofs.NOT_COMPILED if answer.failed and "process died" not in answer.note else proofs.WRONG


TIMED = (None, proofs.SPILLS)  # verdicts of checks


def judged(one: Case, rows: dict[str, dict[str, Any]], key: proofs.Key, timed: Answer | None) -> Row:
    """One row of the record: right and not slower is proven. What spills is not, however fast it is."""
    row = rows[key.direction]
    about: dict[str, Any] = {"error": row["error"], "allowed": row["allowed"]}
    if row["verdict"] not in TIMED or timed is None:
        return Row(key, row["verdict"], reason=row["reason"], **about)
    if timed.went_wrong:
        return Row(key, verdict_of(timed), reason=f"{timed.step}: {timed.note}", **about)
    time_of = next(t for t in timed.rows if (t["direction"], t["size"]) == (key.direction, key.size))
    ratio = time_of["ratio"]
    about |= {name: time_of[name] for name in ("against", "tilings_width") if name in time_of}
    about["tilings"] = proofs.tilings_of(time_of)
    if row["verdict"] == proofs.SPILLS:
        speed = "" if ratio is None else f"; {ratio:.2g} x as fast"
        return Row(key, proofs.SPILLS, ratio=ratio, reason=f"{row['reason']}{speed}", **about)
    if ratio is None or ratio >= 1:
        allowed = f"{row['reason']}, which was allowed" if row["reason"] else ""
        return Row(key, proofs.PROVEN, ratio=ratio, reason=time_of["reason"] or allowed, **about)
    return Row(key, proofs.SLOWER, ratio=ratio, reason="what serves otherwise is faster", **about)


# ---- the function ----


def prove(
    device: torch.device | str | None = None,
    budget_s: float = BUDGET,
    families: Iterable[str] | None = None,
    *,
    fresh: bool = False,
    allow_spills: int = 0,
) -> Record:
    """Test and time the kernels on a GPU; from then on those serve there that are right and not slower.

    What an earlier call has proven is not proven again. The record is written into the user's cache folder after
    each kind of call, so nothing is lost if the call is interrupted. If it cannot be written, it counts in this
    process only, and the log says so.

    Args:
        device: the GPU, by default the current one. With TRITON_INTERPRET=1 "cpu" tries it all without one.
        budget_s: seconds after which no further kernel is begun.
        families: some of attention, masks, scores, forward mode, cache, mlp, norm, heads, loss, statistics; by
            default all.
        fresh: prove everything again.
        allow_spills: of the kernels that this call proves, one that spills more registers to memory than this does
            not serve, however fast it is. What an earlier call allowed stays proven, but for `fresh`.

    Returns: the record, `record.rows` by key.

    Raises:
        ValueError: the device cannot run the kernels, a family is unknown, the budget is not positive, or
            allow_spills is negative.
    """
    asked = device_of(device), budget_s, checked_families(families)
    return _prove(*asked, fresh=fresh, allow_spills=allow_spills).record


def _prove(
    device: torch.device,
    budget_s: float,
    families: tuple[str, ...],
    *,
    fresh: bool = False,
    allow_spills: int = 0,
    worker_of: Callable[[], Asker] | None = None,
    on_step: Callable[[str, int, int], None] = lambda label, done, of: None,
) -> Keeper:
    if not budget_s > 0:
        raise ValueError(f"budget_s must be positive, got {budget_s}")
    if allow_spills < 0:
        raise ValueError(f"allow_spills must not be negative, got {allow_spills}")
    deadline = time.monotonic() + budget_s
    known = None if fresh else proofs.record_of(device)
    cases = to_prove(device, families, known, allow_spills)
    keeper = Keeper(device, known)
    compilers = [Worker(str(device), HANDLERS) for _ in range(compilers_for(device))]
    workers = [worker_of() if worker_of else Worker(str(device), HANDLERS) for _ in range(SIDE_BY_SIDE)]
    prover = Prover(
        cases,
        workers,
        keeper,
        deadline=deadline,
        compilers=compilers,
        on_step=lambda label, done: on_step(label, done, len(cases)),
        allow_spills=allow_spills,
    )
    try:
        prover.go()
    finally:
        for process in (*workers, *compilers):
            process.close()
    return keeper


def device_of(device: torch.device | str | None) -> torch.device:
    """The device with its index, if the kernels can run on it."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cuda, cuda:N or cpu, got {device!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {found}: PyTorch {torch.__version__} sees no GPU on this machine")
    obstacle = capabilities.triton_obstacle(found)
    if obstacle:
        raise ValueError(f"nothing can be proven on {found}: {obstacle}")
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def checked_families(families: Iterable[str] | None) -> tuple[str, ...]:
    chosen = FAMILIES if families is None else tuple([families] if isinstance(families, str) else families)
    for family in chosen:
        if family not in FAMILIES:
            raise ValueError(f"families must be some of {', '.join(FAMILIES)}, got {family!r}")
    return chosen


def to_prove(
    device: torch.device, families: tuple[str, ...], known: Record | None, allow_spills: int = 0
) -> list[Case]:
    """The cases of these families that have no rows yet; where spills are allowed, also those that spill."""
    found = (prove_cases.cases if device.type == "cuda" else prove_cases.small_cases)(families)
    rows = {} if known is None else known.rows
    done = {key for key, row in rows.items() if not (allow_spills and row.verdict == proofs.SPILLS)}
    return [one for one in found if not all(key in done for key in prove_cases.keys(one))]


class Keeper:
    """Collects rows, and writes them; what cannot be written counts in this process only."""

    def __init__(self, device: torch.device, known: Record | None) -> None:
        today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        self.record = Record(proofs.machine(device), driver(device), today, {} if known is None else known.rows)
        self.problem: OSError | None = None

    def __call__(self, rows: list[Row]) -> None:
        if not rows:
            return
        new = Record(self.record.machine, self.record.driver, self.record.date, {row.key: row for row in rows})
        self.record = self.record.joined(new)
        try:
            proofs.keep(new)
        except OSError as problem:
            if self.problem is None:
                proofs.log.warning(
                    "the proof record cannot be written, it counts in this process only: %s", problem
                )
            self.problem = problem
            proofs.hold(new)


def driver(device: torch.device) -> str | None:
    """The version of the GPU's driver, if it can be found out."""
    if device.type != "cuda" or torch.version.hip:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0].strip() if said.strip() else None


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="cuda, cuda:N, or cpu with TRITON_INTERPRET=1; by default the current GPU"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help="begin nothing after this time (default: 120)",
    )
    parser.add_argument("--families", nargs="+", metavar="FAMILY", help=f"some of {', '.join(FAMILIES)}")
    parser.add_argument("--fresh", action="store_true", help="prove again what an earlier run has proven")
    parser.add_argument(
        "--allow-spills",
        type=int,
        default=0,
        metavar="N",
        help="let kernels serve that spill up to N registers to memory, if they are faster (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="print the record as JSON and nothing else")


def run(options: argparse.Namespace) -> int:
    """Prove, and print what serves; 1 if a kernel is wrong, hangs or does not compile, or the disk refuses."""
    try:
        device, families = device_of(options.device), checked_families(options.families)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if not options.budget > 0:
        raise CommandError(f"--budget must be positive, got {options.budget:g}")
    if options.allow_spills < 0:
        raise CommandError(f"--allow-spills must not be negative, got {options.allow_spills}")
    interrupted, problem = False, None
    with progress(quiet=options.json) as on_step:
        try:
            asked = device, options.budget, families
            keeper = _prove(*asked, fresh=options.fresh, allow_spills=options.allow_spills, on_step=on_step)
            record, problem = keeper.record, keeper.problem
        except KeyboardInterrupt:
            interrupted = True
            record = proofs.record_of(device) or Record(proofs.machine(device))
    if options.json:
        print(json.dumps(record.as_json(), indent=1))
    else:
        left = to_prove(device, families, record)
        print_record(record, len(left))
    if interrupted:
        print("fastattn prove: interrupted; what was proven so far is kept", file=sys.stderr)
        return 130
    bad = [row for row in record.rows.values() if row.verdict not in (proofs.PROVEN, proofs.SLOWER, proofs.SPILLS)]
    return 1 if bad or problem else 0


def print_record(record: Record, left: int) -> None:
    title = f"proofs on {record.machine.gpu}: how many times as fast as what would serve otherwise"
    tables.show(title, tables.record_rows(record))
    if chosen := tables.tiling_rows(record):
        tables.show(tables.CHOSEN, chosen)
    counts = Counter(row.verdict for row in record.rows.values())
    said = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())) or "nothing yet"
    print(f"{said}.")
    if left:
        print(f"{left} kinds of calls are not yet proven; `fastattn prove` goes on with them.")


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with an estimate of what is left on a terminal, else a line for each kind of call."""
    if quiet:
        yield lambda label, done, of: None
        return
    bar = _bar() if sys.stderr.isatty() else None
    if bar is not None:
        with bar:
            task = bar.add_task("starting", total=None)
            yield lambda label, done, of: bar.update(task, description=label, completed=done, total=of)
        return
    # When the last cases ended: the first ones wait for compilers, so they say nothing about those to come.
    ends = deque([time.monotonic()], maxlen=RECENT + 1)

    def say(label: str, done: int, of: int) -> None:
        ends.append(time.monotonic())
        each = (ends[-1] - ends[0]) / (len(ends) - 1)
        print(
            f"{done} of {of}, about {each * (of - done) / 60:.0f} min left: {label}", file=sys.stderr, flush=True
        )

    yield say


def _bar() -> Any:
    """rich's, if it is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
