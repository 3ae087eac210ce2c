"""What earlier calls of the same run have finished, so that the next call goes on where they were cut off.

State belongs to one set of sources, one device and one set of versions. Any other starts from nothing, in another
folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from fastattn.measuring.paths import ROOT

SOURCES = ("fastattn", "kernels", "tests", "benchmarks")
# What the results depend on, of the environment.
DEPENDS_ON = ("device", "driver", "cuda", "rocm", "torch", "triton", "python")


def identity(environment: dict[str, Any]) -> str:
    """A hash of the sources and of what runs them."""
    digest = hashlib.sha256(repr([environment.get(name) for name in DEPENDS_ON]).encode())
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


class State:
    """Two files of JSON lines: outcomes of tests, and rows of cases."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.tests = {line["test"]: line for line in self._read("tests.jsonl")}
        self.cases = {line["case"]: line["rows"] for line in self._read("cases.jsonl")}

    def keep_test(self, event: dict[str, Any]) -> None:
        self.tests[event["test"]] = event
        self._append("tests.jsonl", event)

    def keep_case(self, case: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        name = json.dumps(case, sort_keys=True)
        self.cases[name] = rows
        self._append("cases.jsonl", {"case": name, "rows": rows})

    def rows_of(self, case: dict[str, Any]) -> list[dict[str, Any]] | None:
        """What the case gave in an earlier call; None if it did not end."""
        return self.cases.get(json.dumps(case, sort_keys=True))

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self, name: str) -> list[dict[str, Any]]:
        """Every whole line: the last one may have been cut off with the machine."""
        path, found = self.folder / name, []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found
