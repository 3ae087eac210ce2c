"""Launch configurations other than the table's, for the shapes where we are furthest behind.

A candidate differs from the table's row in tile sides, warps or stages. It is put into the table of the worker
that tries it, so what is timed is the public call, launched as it would be with that row. All candidates are
compiled first, by several workers at once; then they are timed one after the other. Nothing is written into
kernels/launch/: the report proposes rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.measuring import measure
from fastattn.measuring.peers import (
    BACKWARD,
    FORWARD,
    TRAINING,
    AttentionProblem,
    MLPProblem,
    Problem,
    problem_from,
)

# A candidate has to win by more than this to be proposed.
WORTHWHILE = 0.03
CANDIDATES = 24
FARTHEST = 3  # steps from the table's row to a candidate
# Always tried, however far from the row: tiles of which two programs fit on one multiprocessor.
SMALL = ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (64, 128, 4, 2), (64, 32, 4, 2))
# Always tried for an MLP: tiles that read the fewest bytes of the L2 cache for each flop; and those of which two
# programs fit on one multiprocessor, so that the epilogue of one overlaps the other's product.
LARGE = ((128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (128, 64, 4, 4))
FUSED = "MLP_FUSED_UP_TO"


def tables_of(problem: Problem, direction: str) -> tuple[str, ...]:
    """The tables in kernels/launch/ whose rows decide this call's speed."""
    if isinstance(problem, AttentionProblem):
        return {FORWARD: ("ATTENTION_FORWARD",), BACKWARD: ("ATTENTION_DKDV", "ATTENTION_DQ")}.get(direction, ())
    forward = "MLP_GATED_FORWARD" if problem.gated else "MLP_FORWARD"
    return {FORWARD: (forward,), TRAINING: ("MLP_BACKWARD",)}.get(direction, ())


def key_of(problem: Problem) -> tuple[int, int]:
    """(bytes, width), by which a row of those tables is found."""
    bytes_ = getattr(torch, problem.dtype).itemsize
    if isinstance(problem, MLPProblem):
        return bytes_, problem.tokens * problem.hidden
    from fastattn.kernels import launch

    return bytes_, launch.tile_width(problem.width)


def rows_of(table: str, family: str) -> tuple[Any, ...]:
    """The family's rows, or those of sm_80 that serve it."""
    from fastattn.kernels import launch

    entries = getattr(launch, table)
    return entries.get(family) or entries["sm_80"]


def current(table: str, family: str, key: tuple[int, int]) -> Any:
    """The row in use: the first whose limits hold this key."""
    return next(row for row in rows_of(table, family) if key[0] <= row.bytes and key[1] <= row.width)


def targets(rows: list[dict[str, Any]], family: str, limit: int) -> list[dict[str, Any]]:
    """Cases to vary, from rows of ours: each table row at the problem where it is furthest behind the best peer,
    the worst `limit` of them; then for each MLP, whether our kernel or the library's product is the faster."""
    worst: dict[tuple[Any, ...], tuple[float, dict[str, Any]]] = {}
    choices = []
    for row in rows:
        ratio = 1.0 if row.get("launched") else row["ratio"]  # a rehearsal has no times
        if not row["peer"].startswith("fastattn") or ratio is None:
            continue
        problem = problem_from(row["problem"])
        key = key_of(problem)
        for table in tables_of(problem, row["direction"]):
            serving = current(table, family, key)
            always = LARGE if isinstance(problem, MLPProblem) else SMALL
            variants = variants_of(table, serving, family, key, always)
            name = (table, *serving)
            if name not in worst or ratio < worst[name][0]:
                target = _target(row, table, family, key, variants)
                worst[name] = (ratio, {**target, "row": (serving.bytes, serving.width)})
        if isinstance(problem, MLPProblem):
            now = fused_now(problem, family)
            choices.append(_target(row, FUSED, family, key, [{"fused": now}, {"fused": not now}]))
    ranked = [target for _, target in sorted(worst.values(), key=lambda entry: entry[0])]
    return ranked[:limit] + choices


def fused_now(problem: MLPProblem, family: str) -> bool:
    """Whether the table sends this width to our kernel."""
    from fastattn.kernels import launch

    limits = launch.MLP_FUSED_UP_TO.get(family) or launch.MLP_FUSED_UP_TO["sm_80"]
    return problem.width <= limits.get(key_of(problem)[0], 0)


def _target(
    row: dict[str, Any], table: str, family: str, key: tuple[int, int], variants: list[dict[str, Any]]
) -> dict[str, Any]:
    for variant in variants:
        fused = "fused" if variant.get("fused") else "library"
        sides = " x ".join(map(str, variant.get("tiling", ())))
        variant["name"] = f"{sides}{' ahead' * variant['ahead']}" if sides else fused
    variants[0]["name"] += " (now)"
    return {
        "kind": "tiling",
        "problem": row["problem"],
        "label": row["label"],
        "direction": row["direction"],
        "peer": "fastattn triton",
        "table": table,
        "family": family,
        "key": key,
        # A row of an MLP's table serves only where the kernel does.
        "fused": True if row["problem"]["family"] == "mlp" else None,
        "variants": variants,
        "seconds": measure.ROUND_SECONDS,
    }


def variants_of(
    table: str, serving: Any, family: str, key: tuple[int, int], always: tuple[tuple[int, int, int, int], ...]
) -> list[dict[str, Any]]:
    """Tilings to try: the row in use, those that `fastattn prove` chooses from, then `candidates`."""
    from fastattn.kernels import launch

    chosen_from = (serving.tiling, *launch.candidates(table, family, *key))
    pairs = [(tuple(tiling[:4]), tiling.ahead) for tiling in chosen_from]
    pairs += [(tiling, False) for tiling in candidates(tuple(serving.tiling[:4]), CANDIDATES, always)]
    return [{"tiling": tiling, "ahead": ahead} for tiling, ahead in list(dict.fromkeys(pairs))[:CANDIDATES]]


def candidates(
    tiling: tuple[int, int, int, int], limit: int, always: tuple[tuple[int, int, int, int], ...] = SMALL
) -> list[tuple[int, int, int, int]]:
    """The current tiling first, then those that are always tried, then those up to three steps away, near ones
    first; at most `limit`."""
    sides = tuple(sorted({16, 32, 64, 128, 256, *tiling[:2]}))
    warps, stages = (2, 4, 8), (1, 2, 3, 4)
    choices = (sides, sides, warps, stages)
    here = [choice.index(value) for choice, value in zip(choices, tiling, strict=True)]
    found = []
    for m in range(len(sides)):
        for n in range(len(sides)):
            for w in range(len(warps)):
                for s in range(len(stages)):
                    distance = sum(abs(a - b) for a, b in zip((m, n, w, s), here, strict=True))
                    fits = 2**11 <= sides[m] * sides[n] <= 2**15
                    if distance == 0 or (distance <= FARTHEST and fits):
                        found.append((distance, (sides[m], sides[n], warps[w], stages[s])))
    (_, now), *near = sorted(found)
    return list(dict.fromkeys((now, *always, *(candidate for _, candidate in near))))[:limit]


@contextlib.contextmanager
def launched_with(case: dict[str, Any]) -> Iterator[None]:
    """The tables as the case wants them: `tiling` in the row that serves; MLPs `fused` or not, if it says so."""
    from fastattn.core.attention.tilings import trying
    from fastattn.kernels import launch

    family, changed = case["family"], {}
    if case.get("tiling"):
        key = tuple(case["key"])
        rows, mine = rows_of(case["table"], family), current(case["table"], family, key)
        tiling = launch.Tiling(*case["tiling"], values=mine.tiling.values, ahead=case.get("ahead", False))
        replaced = tuple(row._replace(tiling=tiling) if row is mine else row for row in rows)
        changed[case["table"]] = {**getattr(launch, case["table"]), family: replaced}
    if case.get("fused") is not None:
        limit = launch.EVERY if case["fused"] else 0
        changed["MLP_FUSED_UP_TO"] = {**launch.MLP_FUSED_UP_TO, family: {case["key"][0]: limit}}
    originals = {name: getattr(launch, name) for name in changed}
    try:
        for name, table in changed.items():
            setattr(launch, name, table)
        # No recording of another variant's launches is repeated, and no record's tilings serve.
        with trying({}):
            yield
    finally:
        for name, table in originals.items():
            setattr(launch, name, table)


def try_tiling(case: dict[str, Any], device: torch.device, notify: Callable[[str], None]) -> list[dict[str, Any]]:
    """Time the problem launched as the case says; `rounds` 0 only compiles. Raises if the results differ."""
    problem = problem_from(case["problem"])
    torch.manual_seed(0)
    inputs = problem.inputs(device)
    notify(case["label"])
    expected = results(problem, case, inputs)()
    with launched_with(case):
        call = results(problem, case, inputs)
        for ours, theirs in zip(call(), expected, strict=True):
            error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            if not error < measure.WRONG:
                raise ArithmeticError(f"wrong: differs from the current row's result by {error:.2g}")
        if not case["rounds"]:
            return []
        timing = measure.measure({"": call}, device, rounds=case["rounds"], seconds=case["seconds"])[""]
    return [{"seconds": timing.median, "spread": timing.spread}]


def results(
    problem: Problem, case: dict[str, Any], inputs: tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """The call to time; its results as a tuple. The same upstream gradient each time."""
    torch.manual_seed(1)
    call, _ = measure.prepare(problem, case["direction"], case["peer"], inputs)
    return (lambda: (call(),)) if case["direction"] == FORWARD else call


def proposal(target: dict[str, Any], tried: list[dict[str, Any]]) -> str | None:
    """A row for the table with its reason, if one of the tried was clearly faster than the current (the first)."""
    if not tried or tried[0].get("seconds") is None:
        return None
    now = tried[0]["seconds"]
    best = min((t for t in tried if t.get("seconds")), key=lambda t: t["seconds"])
    gain = 1 - best["seconds"] / now
    if gain < max(WORTHWHILE, best["spread"], tried[0]["spread"]):
        return None
    change = f"{best['seconds'] * 1e3:.3f} ms, was {now * 1e3:.3f} ({-gain:.0%})"
    problem = f"{target['direction']} {target['label']}"
    where = f"{target['table']}[{target['family']!r}]"
    if "tiling" not in best:
        return f"{where}: {best['name']},  # {change}: {problem}"
    tiling = ", ".join(map(str, best["tiling"])) + ", ahead=True" * best.get("ahead", False)
    return f"{where}: Row({target['row'][0]}, {target['row'][1]}, Tiling({tiling})),  # {change}: {problem}"
