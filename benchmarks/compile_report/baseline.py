"""What fails a build: more spills than are known, too much shared memory, a main loop that issues more than was
committed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import triton

from benchmarks.compile_report.rows import Row
from benchmarks.compile_report.targets import MOST_TENSOR_MEMORY_COLUMNS, TARGETS

COMMITTED = Path(__file__).parent.with_name("compile_baseline.json")
ALLOWED_RISE = 1.03


def ratios(rows: list[Row]) -> dict[str, float]:
    """Name of a loop -> its issue cycles over tensor-core cycles; the worst, of several masked loops."""
    found: dict[str, float] = {}
    for row in rows:
        for loop in row.loops:
            name = f"{row.name} {loop.kind}"
            found[name] = max(found.get(name, 0.0), round(loop.ratio, 3))
    return found


def write(rows: list[Row]) -> None:
    spills = {row.name: row.spills for row in rows if row.spills and TARGETS[row.target].must_not_spill}
    content = {
        "triton": triton.__version__,
        "spills": dict(sorted(spills.items())),
        "issue_over_tensor": dict(sorted(ratios(rows).items())),
    }
    COMMITTED.write_text(json.dumps(content, indent=1) + "\n")


def complaints(rows: list[Row], everything: bool) -> list[str]:
    """What is wrong with the rows, one line each. `everything`: no call was left out, so a row of the committed
    file that is missing is a kernel that is gone."""
    committed = json.loads(COMMITTED.read_text())
    known = committed["spills"]
    found = [complaint for row in rows for complaint in resource_complaints(row, known.get(row.name, 0))]
    if committed["triton"] != triton.__version__:
        # Another compiler makes other loops, so ratios say nothing; spills and memory have to be right with each.
        return found
    return found + ratio_complaints(ratios(rows), committed["issue_over_tensor"], everything)


def resource_complaints(row: Row, known_spills: int = 0) -> list[str]:
    """What is wrong with the row's resources; spills that are committed as known are not."""
    if row.error:
        return [f"{row.name}: {row.error}"]
    found = []
    if row.spills > known_spills and TARGETS[row.target].must_not_spill:
        found.append(f"{row.name}: {row.spills} spilled registers or spill instructions ({row.tile})")
    if row.serialised:
        found.append(f"{row.name}: asynchronous products wait for one another, ptxas C7515 ({row.tile})")
    found += [f"{row.name}: {hazard} ({row.tile})" for hazard in row.hazards]
    # Less, too: then loads are narrow, which takes more instructions.
    if row.best and row.needed_bytes and row.best.loaded_bytes != row.needed_bytes:
        asked = f"asks {row.best.loaded_bytes} bytes of memory by wide loads for {row.needed_bytes}"
        found.append(f"{row.name}: {asked} ({row.tile})")
    if row.shared > row.shared_limit:
        found.append(f"{row.name}: {row.shared} bytes of shared memory of {row.shared_limit} ({row.tile})")
    if row.tensor_memory > MOST_TENSOR_MEMORY_COLUMNS:
        found.append(f"{row.name}: {row.tensor_memory} columns of tensor memory ({row.tile})")
    return found


def ratio_complaints(now: dict[str, float], committed: dict[str, float], everything: bool) -> list[str]:
    found = [
        f"{name}: issue / tensor rose from {committed[name]:.3f} to {ratio:.3f}"
        for name, ratio in now.items()
        if name in committed and ratio > committed[name] * ALLOWED_RISE
    ]
    found += [f"{name}: not in {COMMITTED.name}; run --update" for name in now if name not in committed]
    if everything:
        found += [f"{name}: in {COMMITTED.name} but gone; run --update" for name in committed if name not in now]
    return found


def invariant_beside_plain() -> str:
    """A Markdown table from the committed file: issue over tensor-core cycles of whole tiles, by the kernels of an
    invariant call / by the plain ones, bf16, causal."""
    ratios = json.loads(COMMITTED.read_text())["issue_over_tensor"]
    lines = ["| | forward | dk/dv | dq |", "|---|---|---|---|"]
    for target, width in itertools.product(("sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), (64, 128)):
        call = f"bf16 D={width} causal"
        cells = (
            f"{ratios[f'{target} invariant {call} invariant_{ours}_kernel full tile']:.2f} / "
            f"{ratios[f'{target} attention {call} attention_{plain}_kernel full tile']:.2f}"
            for ours, plain in (("attention", "forward"), ("dkdv", "dkdv"), ("dq", "dq"))
        )
        lines.append(f"| {target}, D={width} | {' | '.join(cells)} |")
    return "\n".join(lines)
