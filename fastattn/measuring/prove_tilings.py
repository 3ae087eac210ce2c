"""What a process does for a case of `fastattn prove` whose tilings are chosen on the spot.

`candidates` names the tilings that may be faster than the launch tables': rows {table, tiling}. `compile_tiling`
compiles one of them ahead. `try_tiling` checks one, the case's `try`, as the tables' are checked: a row {verdict,
reason}, verdict None where it is right. `choose` times the case's `right`, all that are right, beside the tables'.
It returns a row {direction, size, tilings, width} for each direction and size: the fastest tiling for each table,
where that is not the table's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastattn.core import proofs
from fastattn.core.attention.tilings import TABLES, numbers_of, tiling_of, trying
from fastattn.kernels import launch
from fastattn.measuring import checking, kinds, prove_worker
from fastattn.measuring.ahead import compiling_only, memory_limit
from fastattn.measuring.kinds import Sizes
from fastattn.measuring.prove_cases import Case

Rows = list[dict[str, Any]]
Notify = Callable[[str], None]
# Another tiling has to be faster than the table's by this factor.
WORTHWHILE = 1.02
ROUNDS, WARM_UP = 5, 3
# The kernels that go by the tables.
KERNELS = {
    "ATTENTION_FORWARD": "attention_forward_kernel",
    "ATTENTION_DKDV": "attention_dkdv_kernel",
    "ATTENTION_DQ": "attention_dq_kernel",
}


def candidates(case: Case, device: torch.device, notify: Notify) -> Rows:
    notify("candidates")
    family, element_bytes = launch.family(_any_kernel(), device), getattr(torch, case["dtype"]).itemsize
    return [
        {"table": table, "tiling": numbers_of(tiling)}
        for direction in case["directions"]
        for table in TABLES[direction]
        for tiling in launch.candidates(table, family, element_bytes, case["width"])
    ]


def _any_kernel() -> object:
    from fastattn.kernels.attention.forward import attention_forward_kernel

    return attention_forward_kernel


def _head_width(case: Case) -> int:
    """The width of heads that tilings are chosen for: that of the timed calls."""
    return next(iter(case["timed"].values()))["width"]


def compile_tiling(piece: Case, device: torch.device, notify: Notify) -> Rows:
    """What `try_tiling` and `choose` launch with the candidate of this number, if there is one; launch nothing."""
    case = piece["of"]
    for one in candidates(case, device, notify)[piece["number"] : piece["number"] + 1]:
        with (
            compiling_only(Path(piece["claims"])),
            memory_limit(device, piece["memory"]),
            contextlib.suppress(Exception),  # the try meets the same error
            trying({one["table"]: tiling_of(one["tiling"])}),
        ):
            for sizes in checks_of(case, device):
                notify(f"compile {one['table']} {one['tiling']} for {sizes.label}")
                prove_worker.compile_calls(kinds.build(sizes, device), sizes, [])
            for size in _sizes(case):
                sizes = Sizes(**case["timed"][size])
                prove_worker.compile_calls(kinds.build(sizes, device), sizes, case["directions"])
    prove_worker.leave(device)
    return []


def try_tiling(case: Case, device: torch.device, notify: Notify) -> Rows:
    table, numbers = case["try"]["table"], case["try"]["tiling"]
    verdict, reason, spilled = None, "", [0]

    def note(name: str, compiled: Any) -> None:
        if name == KERNELS[table]:
            spilled.append(prove_worker.spills_of(compiled))

    with trying({table: tiling_of(numbers)}), prove_worker.launched(note):
        for sizes in checks_of(case, device):
            notify(f"try {table} {numbers} with {sizes.label}")
            for row in checking.check_kernel(sizes, device, lambda step: None):
                if row["verdict"] != "passed":
                    verdict, reason = proofs.WRONG, f"{row['quantity']} of {sizes.label}: {row['verdict']}"
    prove_worker.leave(device)
    if verdict is None and max(spilled) > case.get("allow_spills", 0):
        verdict, reason = proofs.SPILLS, f"{KERNELS[table]} spills {max(spilled)} registers"
    return [{"verdict": verdict, "reason": reason}]


def checks_of(case: Case, device: torch.device) -> Iterator[Sizes]:
    """Calls of heads as wide as those that are timed, and so many that no loop is split: those go by the tables.
    Triton compiles another kernel for lengths that are multiples of 16."""
    first = Sizes(**case["checks"][0])
    batch, heads, key_heads, lengths = (2, 16, 8, (1087, 1024)) if device.type == "cuda" else (1, 2, 2, (20,))
    for length in lengths:
        yield dataclasses.replace(
            first, batch=batch, heads=heads, key_heads=key_heads, length=length, width=_head_width(case)
        )


def _sizes(case: Case) -> list[str]:
    """The sizes of calls for which tilings are chosen: those that are bound by the GPU."""
    return [size for size in case["timed"] if size != proofs.CLASSES[0]] or list(case["timed"])


def choose(case: Case, device: torch.device, notify: Notify) -> Rows:
    found: Rows = []
    for size in _sizes(case):
        for direction in case["directions"]:
            notify(f"choose {direction} {size}")
            tilings: dict[str, proofs.Tiling] = {}
            for table in TABLES[direction]:
                right = [one["tiling"] for one in case["right"] if one["table"] == table]
                fastest = _fastest(table, right, Sizes(**case["timed"][size]), direction, device)
                tilings |= {table: fastest} if fastest else {}
            found.append({"direction": direction, "size": size, "tilings": tilings, "width": _head_width(case)})
            prove_worker.leave(device)
    return found


def _fastest(
    table: str, right: list[proofs.Tiling], sizes: Sizes, direction: str, device: torch.device
) -> proofs.Tiling | None:
    """The fastest of the right tilings; None if it is the table's own, or there is not enough memory."""
    if not right:
        return None
    try:
        own, *others = seconds_of([{}, *({table: tiling_of(one)} for one in right)], sizes, direction, device)
    except torch.OutOfMemoryError:
        return None
    least = min(others)
    return right[others.index(least)] if own / least >= WORTHWHILE else None


def seconds_of(
    variants: list[dict[str, launch.Tiling]], sizes: Sizes, direction: str, device: torch.device
) -> list[float]:
    """Seconds of a call with each variant of tilings: the median of a few interleaved rounds."""
    call, thunks = kinds.build(sizes, device), []
    for variant in variants:
        with trying(variant):
            # A backward is bound to the plan of its forward, and with it to these tilings.
            thunks.append(prove_worker.thunk(call, prove_worker.OURS, direction))
            once = prove_worker.seconds_a_call(thunks[-1], WARM_UP, device)
    count = max(1, min(prove_worker.MOST_CALLS, math.ceil(prove_worker.ROUND_SECONDS / max(once, 1e-9))))
    taken: list[list[float]] = [[] for _ in variants]
    for number in range(ROUNDS):
        order = range(len(variants)) if number % 2 == 0 else reversed(range(len(variants)))
        for i in order:
            with trying(variants[i]):
                prove_worker.seconds_a_call(thunks[i], WARM_UP, device)
                taken[i].append(prove_worker.seconds_a_call(thunks[i], count, device))
    return [statistics.median(seconds) for seconds in taken]


HANDLERS: dict[str, Callable[[Case, torch.device, Notify], Rows]] = {
    **prove_worker.HANDLERS,
    "compile tiling": compile_tiling,
    "candidates": candidates,
    "try": try_tiling,
    "choose": choose,
}
