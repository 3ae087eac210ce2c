"""What got faster and slower between two result folders: `python -m benchmarks.compare BEFORE AFTER`.

A change counts when it is outside the noise band of the pair: the larger of 2% and both runs' spreads (the
interquartile range over the median, of interleaved rounds) added up. Rivals are compared too: they did not
change, so a change of their times is a change of the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fastattn.measuring.bench import plain_table

LEAST_BAND = 0.02


class Change(NamedTuple):
    """One measurement in both folders; `change` is the time after over the time before, less one."""

    name: str
    ours: bool
    before: float
    after: float
    band: float

    @property
    def change(self) -> float:
        return self.after / self.before - 1

    @property
    def matters(self) -> bool:
        # In logarithms, so that twice as fast is as large a change as half as fast.
        return abs(math.log(self.after / self.before)) > math.log1p(self.band)


def load(folder: str) -> dict[str, Any]:
    """results.json of a folder, or of a path to the file itself."""
    path = Path(folder)
    return json.loads((path / "results.json" if path.is_dir() else path).read_text())


def measurements(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by name: the problem, the direction and the peer."""
    return {
        f"{row['problem']['family']} {row['direction']} {row['label']}: {row['peer']}": row
        for row in results["speed"]
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every measurement that has a time in both."""
    old, new = measurements(before), measurements(after)
    return [
        Change(
            name,
            row["peer"].startswith("fastattn"),
            old[name]["seconds"],
            row["seconds"],
            max(LEAST_BAND, old[name]["spread"] + row["spread"]),
        )
        for name, row in new.items()
        if name in old and old[name]["seconds"] and row["seconds"]
    ]


def report(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The lines to print."""
    lines = _differing_environment(before["environment"], after["environment"])
    found = changes(before, after)
    if not found:
        return [*lines, "Nothing was measured in both."]
    rivals = [c.after / c.before for c in found if not c.ours]
    if rivals:
        lines.append(
            f"The rivals' times changed by {statistics.median(rivals) - 1:+.1%} (median of {len(rivals)})."
        )
    for title, chosen in (
        (
            "Ours, slower",
            sorted((c for c in found if c.ours and c.matters and c.change > 0), key=lambda c: -c.change),
        ),
        (
            "Ours, faster",
            sorted((c for c in found if c.ours and c.matters and c.change < 0), key=lambda c: c.change),
        ),
        ("Rivals outside the band", [c for c in found if not c.ours and c.matters]),
    ):
        if chosen:
            table = [
                (
                    c.name,
                    f"{c.before * 1e3:.4g} ms",
                    f"{c.after * 1e3:.4g} ms",
                    f"{c.change:+.1%}",
                    f"{c.band:.1%}",
                )
                for c in chosen
            ]
            lines += ["", title, *plain_table(("", "before", "after", "change", "noise"), table)]
    quiet = sum(c.ours and not c.matters for c in found)
    lines += ["", f"Ours, within the noise: {quiet} of {sum(c.ours for c in found)}."]
    return [*lines, *_measured_once(before, after), *_proofs(before, after)]


def _differing_environment(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs in device and versions, the device first: across devices a comparison says little."""
    keys = [k for k in {**before, **after} if k not in ("date",) and before.get(k) != after.get(k)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def _measured_once(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Measurements of one folder that the other lacks, with its reason if it has one."""
    lines = []
    old, new = measurements(before), measurements(after)
    for title, one, other in (("Measured before only", old, new), ("Measured after only", new, old)):
        lost = [name for name, row in one.items() if row["seconds"] and not other.get(name, {}).get("seconds")]
        if lost:
            reasons = [f"  {name}: {other.get(name, {}).get('note') or 'not reached'}" for name in lost]
            lines += ["", f"{title}:", *reasons]
    return lines


def _proofs(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Tests and checks whose outcome changed."""

    def failing(results: dict[str, Any]) -> set[str]:
        tests = {failure["test"] for failure in results["suite"].get("failures", [])}
        checks = {
            f"{r['label']} {r['quantity']}" for r in results["correctness"] if r["verdict"].startswith("FAILED")
        }
        return tests | checks

    old, new = failing(before), failing(after)
    lines = []
    for title, names in (("Fails now", new - old), ("Failed before, not now", old - new)):
        if names:
            lines += ["", f"{title}:", *(f"  {name}" for name in sorted(names))]
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", help="a result folder of the GPU run, or its results.json")
    parser.add_argument("after", help="another")
    options = parser.parse_args(arguments)
    try:
        before, after = load(options.before), load(options.after)
    except (OSError, json.JSONDecodeError) as error:
        print(f"benchmarks.compare: cannot read {getattr(error, 'filename', None) or 'results.json'}: {error}",
              file=sys.stderr)  # fmt: skip
        return 1
    print("\n".join(report(before, after)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
