"""What a process does for `fastattn prove`: compile a piece of a case ahead, check a case, time it. See
prove_cases for what a case is, and ahead for who compiles.

`check` returns a row for each direction: {direction, verdict, error, allowed, reason}, with verdict None where the
kernel is right. `time` returns a row for each direction and size: {direction, size, ratio, reason, against}; one
that is `skipped` needs more memory than there is.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastattn.core import capabilities, plans, proofs
from fastattn.core.attention import torch_routes
from fastattn.core.capabilities import BACKWARD, FORWARD, TANGENT
from fastattn.core.proofs import Question
from fastattn.measuring import checking, kinds
from fastattn.measuring.ahead import compiling_only, memory_limit
from fastattn.measuring.kinds import Sizes
from fastattn.measuring.measure import one_line, synchronize
from fastattn.measuring.prove_cases import Case

Rows = list[dict[str, Any]]
Notify = Callable[[str], None]
OURS, OTHERWISE = "triton", "portable"
# A round of calls lasts this long, or is one call; there are fewer rounds where one call takes very long.
ROUND_SECONDS, MOST_CALLS = 0.01, 100
LONGEST = 1.5
FORWARDS = ("attention_forward_kernel",)
# After FEW_ROUNDS a ratio beyond CLEAR in every round is clear; after ROUNDS one that is not NEAR 1 is decided.
FEW_ROUNDS, ROUNDS, MOST_ROUNDS = 2, 5, 11
CLEAR, NEAR = 1.5, 0.05


# ---- compiled ----


def compile_piece(piece: Case, device: torch.device, notify: Notify) -> Rows:
    """Make the calls of a piece as its check or its timing makes them, and launch nothing. Returns how many
    kernels this process compiled, or found in the cache."""
    sizes = Sizes(**piece["sizes"])
    notify(f"compile {sizes.label}")
    with (
        compiling_only(Path(piece["claims"])) as compiled,
        memory_limit(device, piece["memory"]),
        contextlib.suppress(Exception),  # the check or the timing meets the same error and reports it
    ):
        call = kinds.build(sizes, device)
        with _tables_only():
            compile_calls(call, sizes, piece["timed"])
    leave(device)
    return [{"kernels": len(compiled)}]


def compile_calls(call: kinds.Call, sizes: Sizes, timed: list[str]) -> None:
    """Make a call as its check makes it, or, if directions are `timed`, as their timing does."""
    # Each call is the first of its plan: the second would be recorded, and there are no launches to record.
    plans.forget()
    if not timed:
        checking.results_and_gradients(call, OURS, call.tensors, sizes)
    for direction in timed:
        plans.forget()
        thunk(call, OURS, direction)()


# ---- right ----


def check(case: Case, device: torch.device, notify: Notify) -> Rows:
    """All checks against float64, in three runs; and whether a compiled kernel spills more registers than
    case["allow_spills"], 0 by default."""
    worst: dict[str, dict[str, Any]] = {}
    spilling = Spilling(_direction("result", case))
    with _tables_only():
        for given in case["checks"]:
            sizes = Sizes(**given)
            notify(f"check {sizes.label}")
            plans.forget()
            with launched(spilling.launched):
                rows = checking.check_kernel(sizes, device, spilling.step)
            for row in rows:
                direction = _direction(row["quantity"], case)
                if direction in case["directions"]:
                    _keep_worst(worst, direction, row, sizes)
    leave(device)
    for direction, row in worst.items():
        count, kernel = spilling.most.get(direction, (0, ""))
        if count and row["verdict"] is None:
            verdict = None if count <= case.get("allow_spills", 0) else proofs.SPILLS
            row |= {"verdict": verdict, "reason": f"{kernel} spills {count} registers"}
    return list(worst.values())


def _direction(quantity: str, case: Case) -> str:
    if case["directions"] == [TANGENT]:
        return TANGENT
    return FORWARD if quantity.startswith("result") else BACKWARD


def _keep_worst(worst: dict[str, dict[str, Any]], direction: str, row: dict[str, Any], sizes: Sizes) -> None:
    """The error that is largest beside what is allowed, and the first thing that is wrong."""
    wrong = row["verdict"] != "passed"
    error, allowed = (value if math.isfinite(value) else None for value in (row["max_error"], row["allowed"]))
    new = {"direction": direction, "error": error, "allowed": allowed, "verdict": None, "reason": ""}
    if wrong:
        reason = f"{row['quantity']} of {sizes.label}: {row['verdict'].removeprefix('FAILED: ')}"
        new |= {"verdict": proofs.WRONG, "reason": reason}
    old = worst.setdefault(direction, new)
    if old["verdict"] is None and (wrong or _share(new) > _share(old)):
        worst[direction] = new


def _share(row: dict[str, Any]) -> float:
    """How much of the allowed error there is."""
    return (row["error"] or 0.0) / (row["allowed"] or 1.0)


@contextlib.contextmanager
def launched(note: Callable[[str, Any], None]) -> Iterator[None]:
    """Inside, `note` is called with the name of each kernel that is launched and the compiled kernel; not in
    Triton's interpreter, nor where a recording is repeated."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def noting(kernel: Any, *arguments: Any, **options: Any) -> Any:
        compiled = run(kernel, *arguments, **options)
        note(kernel.__name__, compiled)
        return compiled

    JITFunction.run = noting
    try:
        yield
    finally:
        JITFunction.run = run


def spills_of(compiled: Any) -> int:
    """How many registers a compiled kernel that was launched spills to memory."""
    return getattr(compiled, "n_spills", None) or 0


class Spilling:
    """By direction, the kernel that spills most of those that a check launches: how many registers, and its name.

    `step` is told the steps of `checking.check_kernel`. What comes before the gradients is of the direction
    `first`. Forward mode launches the forward's kernel, too, which has a verdict of its own.
    """

    def __init__(self, first: str) -> None:
        self.first = self.direction = first
        self.most: dict[str, tuple[int, str]] = {}

    def step(self, name: str) -> None:
        if name == "ours":
            self.direction = self.first
        elif name == "gradients":
            self.direction = BACKWARD

    def launched(self, name: str, compiled: Any) -> None:
        if self.first != TANGENT or name not in FORWARDS:
            most = self.most.get(self.direction, (0, ""))
            self.most[self.direction] = max(most, (spills_of(compiled), name))


# ---- fast ----


def time_case(case: Case, device: torch.device, notify: Notify) -> Rows:
    """Ours against what would serve otherwise, at each size, host time included; with the tilings that were chosen
    for it, if any."""
    found: Rows = []
    for size, given in case["timed"].items():
        sizes = Sizes(**given)
        for direction in case["directions"]:
            notify(f"time {direction} {sizes.label}")
            about = {"direction": direction, "size": size}
            chosen = next((row for row in case.get("chosen", ()) if about.items() <= row.items()), None)
            with _tables_only() if chosen is None else _with_tilings(chosen["tilings"]):
                found.append({**about, **_compared(case, size, sizes, direction, device)})
            if chosen and chosen["tilings"]:
                found[-1] |= {"tilings": chosen["tilings"], "tilings_width": chosen["width"]}
            leave(device)
    return found


def _tables_only() -> contextlib.AbstractContextManager[None]:
    """Inside, attention goes by the launch tables, whatever an older record says."""
    return _with_tilings({})


def _with_tilings(tilings: dict[str, proofs.Tiling]) -> contextlib.AbstractContextManager[None]:
    # Imported here: the command line reads this module where Triton may be absent.
    from fastattn.core.attention.tilings import tiling_of, trying

    return trying({table: tiling_of(numbers) for table, numbers in tilings.items()})


def leave(device: torch.device) -> None:
    """Give back the memory that other families' processes need."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _compared(case: Case, size: str, sizes: Sizes, direction: str, device: torch.device) -> dict[str, Any]:
    plans.forget()
    call = kinds.build(sizes, device)
    try:
        with asked() as questions:
            ours = thunk(call, OURS, direction)
            ours()
    except torch.OutOfMemoryError as error:
        return {"ratio": None, "reason": one_line(error), "skipped": True}
    must_be_about(case, size, direction, questions)
    try:
        with routes() as taken:
            others = {name: thunk(call, name, direction) for name in (OTHERWISE, *call.otherwise)}
            for other in others.values():
                other()
    except torch.OutOfMemoryError as error:
        return {"ratio": None, "reason": f"what would serve otherwise fails: {one_line(error)}"}
    seconds = compare({OURS: ours, **others}, device)
    fastest = min(others, key=lambda name: seconds[name])
    # That of the backward is the last one.
    against = fastest if call.otherwise else taken[-1] if taken else ""
    return {"ratio": seconds[fastest] / seconds[OURS], "reason": "", "against": against}


@contextlib.contextmanager
def asked() -> Iterator[list[Question]]:
    """What the calls within would ask the record, if they named no backend."""
    choose, found = capabilities.choose, []

    def noting(request: capabilities.Request, direction: str, backend: str | None = None) -> str:
        found.append(capabilities.question(request, direction))
        return choose(request, direction, backend)

    capabilities.choose = noting
    try:
        yield found
    finally:
        capabilities.choose = choose


@contextlib.contextmanager
def routes() -> Iterator[list[str]]:
    """Which of PyTorch's kernels compute the attention of portable within, in order."""
    serving, found = torch_routes.serving, []

    def noting(*arguments: Any, **keywords: Any) -> ModuleType | None:
        module = serving(*arguments, **keywords)
        found.append(torch_routes.name_of(module))
        return module

    torch_routes.serving = noting
    try:
        yield found
    finally:
        torch_routes.serving = serving


def must_be_about(case: Case, size: str, direction: str, questions: list[Question]) -> None:
    """Raise unless the timed call is what its row of the record says."""
    wanted = proofs.Key(case["record"], direction, case["proves"], case["dtype"], case["width"], size)
    if not any(case["proves"] in q.kinds and q.key(case["proves"]) == wanted for q in questions):
        raise ArithmeticError(f"the call is not of the kind {proofs.describe(wanted)}: {questions}")


def thunk(call: kinds.Call, backend: str, direction: str) -> Callable[[], Any]:
    """The call to time in this direction."""
    if direction != BACKWARD:
        return torch.no_grad()(lambda: call.function(backend, *call.tensors))
    leaves = [t.detach().requires_grad_() for t in call.tensors]
    result = call.function(backend, *leaves)
    outputs = result[: call.flowing] if isinstance(result, tuple) else (result,)
    upstream = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def compare(calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Seconds of a call, the median of a few interleaved rounds, by the wall clock: what a program waits for, the
    launches included. There are few rounds where ours is far ahead of the others or far behind, and many where it
    is near the fastest."""
    once = {name: seconds_a_call(call, 1, device) for name, call in calls.items()}
    counts = {n: max(1, min(MOST_CALLS, math.ceil(ROUND_SECONDS / max(s, 1e-9)))) for n, s in once.items()}
    allowed = max(1, int(LONGEST / max(sum(once.values()), 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(min(MOST_ROUNDS, allowed)):
        for name in calls if number % 2 == 0 else reversed(list(calls)):
            taken[name].append(seconds_a_call(calls[name], counts[name], device))
        if decided(taken):
            break
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def decided(taken: dict[str, list[float]]) -> bool:
    """Whether further rounds would change nothing about which is faster, ours or the fastest of the others."""
    ours, others = taken[OURS], [seconds for name, seconds in taken.items() if name != OURS]
    rounds = len(ours)
    ahead = all(max(ours) * CLEAR < min(seconds) for seconds in others)
    behind = any(max(seconds) * CLEAR < min(ours) for seconds in others)
    if ahead or behind:
        return rounds >= FEW_ROUNDS
    ratio = min(map(statistics.median, others)) / statistics.median(ours)
    return rounds >= ROUNDS and abs(ratio - 1) > NEAR


def seconds_a_call(call: Callable[[], Any], count: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / count


HANDLERS: dict[str, Callable[[Case, torch.device, Notify], Rows]] = {
    "compile": compile_piece,
    "check": check,
    "time": time_case,
}
