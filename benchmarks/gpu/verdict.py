"""What a run may claim: its exit code, its first line, and which kernels are proven.

Exit code 0: everything that was asked was run, and passed. 1: something failed. 2: nothing failed, but something
that was asked was not run to its end; the first line says what.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from benchmarks.gpu.shards import KERNEL_TESTS, OTHER

PASSED, FAILED, INCOMPLETE = 0, 1, 2
MOST_NAMED = 6


class Verdict(NamedTuple):
    """`failures` and `missing` hold one sentence for each."""

    code: int
    line: str
    failures: list[str]
    missing: list[str]


def verdict_of(results: dict[str, Any]) -> Verdict:
    failures, missing = failures_of(results), missing_of(results)
    code = FAILED if failures else INCOMPLETE if missing else PASSED
    said = []
    if failures:
        said.append(f"FAILED: {_some(failures)}.")
    if missing:
        said.append(f"INCOMPLETE: {_some(missing)}.")
    only = results.get("only")
    asked = f"Everything asked ({', '.join(only)}) was" if only else "Everything was"
    return Verdict(code, " ".join(said) or f"PASSED: {asked} run and passed.", failures, missing)


def failures_of(results: dict[str, Any]) -> list[str]:
    """Tests that failed, results that are wrong, and calls of ours that raised."""
    found = [f"test {failure['test']}" for failure in results["suite"].get("failures", [])]
    found += [f"test {name}" for name in results["suite"].get("more_failures", [])]
    for row in (*results["kernels"], *results["correctness"]):
        if row["verdict"].startswith("FAILED"):
            found.append(f"{row['label']}, {row['quantity']}")
    found += [f"{row['label']}, {row['direction']}: {row['note']}" for row in _ours(results) if row.get("failed")]
    found += _of_record(results, "wrong", "not compiled")
    found += _of_sanitizer(results, "FAILED")
    return list(dict.fromkeys(found))


def missing_of(results: dict[str, Any]) -> list[str]:
    """Everything that was asked and not run to its end."""
    found = list(results["suite"].get("missing", [])) if results["suite"] else ["the test suite did not run"]
    if results.get("interrupted"):
        found.append("the run was interrupted")
    for section in results["sections"]:
        left = len(section["left_out"])
        if left:
            found.append(f"{section['title']}: {left} of {section['planned']} cases not run")
    planned = {section["title"] for section in results["sections"]}
    found += [f"{title}: not begun" for title in results["planned"] if title not in planned]
    unfinished = [row for row in (*results["kernels"], *results["correctness"]) if _unfinished(row["verdict"])]
    found += [f"{row['label']}: {row['verdict']}" for row in unfinished]
    found += _of_record(results, "hung")
    found += _of_sanitizer(results, "not finished", "not run", "no time")
    found += [
        f"{row['label']}, {row['direction']}: {row['note']}"
        for row in _ours(results)
        if not row["seconds"] and not row.get("failed") and not row.get("launched")
    ]
    return list(dict.fromkeys(found))


def _of_record(results: dict[str, Any], *verdicts: str) -> list[str]:
    """Kinds of calls with such a verdict in the proof record, whatever their sizes."""
    rows = [row for row in results.get("record", ()) if row["verdict"] in verdicts]
    return [f"{r['family']} {r['direction']}, {r['kind']} {r['dtype']} {r['width']}: {r['reason']}" for r in rows]


def _of_sanitizer(results: dict[str, Any], *verdicts: str) -> list[str]:
    """compute-sanitizer's tools with such verdicts. That it is not installed is no fault, and is told."""
    rows = results.get("sanitizer", ())
    return [f"compute-sanitizer, {r['tool']}: {r['verdict']}" for r in rows if r["verdict"].startswith(verdicts)]


def is_final(verdict: str) -> bool:
    """Whether the next call need not run it again."""
    return verdict == "passed" or verdict.startswith("FAILED")


def _unfinished(verdict: str) -> bool:
    return verdict not in ("passed", "launched") and not verdict.startswith("FAILED")


def _ours(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = (*results["speed"], *results["features"], *results["small_calls"])
    return [row for row in rows if row["peer"].startswith("fastattn")]


def proven(results: dict[str, Any]) -> bool:
    """Whether the kernels are proven on this device: every kernel case and every kernel test ran, and passed.
    Tests of other things, as of a library that is too old there, have no say.

    Never in a rehearsal, and never of a selection.
    """
    if results["dry_run"] or results.get("only") or not results["kernels"]:
        return False
    families = results["suite"].get("families", {})
    tests_passed = all(_all_passed(families.get(family, {})) for family in set(KERNEL_TESTS.values()))
    kernel_section = [s for s in results["sections"] if s["title"] == "kernels"]
    cases_complete = bool(kernel_section) and not any(s["left_out"] for s in kernel_section)
    rows = (*results["kernels"], *results["correctness"])
    return tests_passed and cases_complete and all(row["verdict"] == "passed" for row in rows)


def _all_passed(counts: dict[str, int]) -> bool:
    """Some passed, and no outcome but passing and skipping for a reason that is not a missing library."""
    return counts.get("passed", 0) > 0 and not set(counts) - {"passed", "skipped"}


def proofs(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a family, kind, dtype and width: "proven", "failed", "incomplete" or "rehearsed"."""
    rows = defaultdict(list)
    for row in results["kernels"]:
        sizes = row["sizes"]
        rows[sizes["family"], sizes["kind"], sizes["dtype"], sizes["width"]].append(row["verdict"])
    names = ("family", "kind", "dtype", "width")
    return [{**dict(zip(names, key, strict=True)), "state": _state(verdicts)} for key, verdicts in rows.items()]


def _state(verdicts: list[str]) -> str:
    if any(verdict.startswith("FAILED") for verdict in verdicts):
        return "failed"
    if any(_unfinished(verdict) for verdict in verdicts):
        return "incomplete"
    return "rehearsed" if "launched" in verdicts else "proven"


def families_asked(only: list[str] | None) -> list[str]:
    return only or [*dict.fromkeys(KERNEL_TESTS.values()), OTHER]


def _some(sentences: list[str]) -> str:
    more = len(sentences) - MOST_NAMED
    return "; ".join(sentences[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
