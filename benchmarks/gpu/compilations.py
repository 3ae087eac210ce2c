"""How many kernels were compiled, and for how long: every process of a run appends to one file.

Compiling is what a run on a new machine spends most of its time on, so the report says how much it was.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "FASTATTN_COMPILATIONS"  # the file's name, in the environment of each process


def listen() -> None:
    """Have Triton report each compilation of this process; nothing happens where nobody asked."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    try:
        from triton import knobs
    except ImportError:
        return

    def note(*, src: Any, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        stages = sum(taken for _, taken in times.lowering_stages)
        seconds = (times.ir_initialization + stages + times.store_results) / 1e6
        line = {"kernel": src.name, "hash": metadata.get("hash"), "seconds": seconds, "cached": cache_hit}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    knobs.compilation.listener = note


def summarize(path: Path) -> dict[str, Any]:
    """Compilations, how many of them were different kernels, their seconds, and what the cache on disk saved."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    compiled = [line for line in lines if not line["cached"]]
    return {
        "compiled": len(compiled),
        "different": len({line["hash"] for line in compiled}),
        "seconds": round(sum(line["seconds"] for line in compiled), 1),
        "from_cache": len(lines) - len(compiled),
    }
