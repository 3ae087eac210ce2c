"""Comparisons of several peers, of which some may hang or kill their process."""

from __future__ import annotations

import time
from typing import Any

from fastattn.measuring.paths import clean
from fastattn.measuring.pool import Worker

# A peer that hung or died this many times is not run again.
PATIENCE = 2


def compare_survivors(
    worker: Worker, case: dict[str, Any], offences: dict[str, int], *, step_limit: float, deadline: float
) -> list[dict[str, Any]]:
    """Run a case of several peers. After a peer that hangs or kills the worker it is run again without that peer,
    and the peer's row says so."""
    rows: list[dict[str, Any]] = []
    peers = [peer for peer in case["peers"] if offences.get(peer, 0) < PATIENCE]
    rows += [
        failed_row(case, peer, "given up after it hung or died before")
        for peer in case["peers"]
        if peer not in peers
    ]
    while peers:
        answer = worker.ask({**case, "peers": peers}, step_limit=step_limit, deadline=deadline)
        if not answer.went_wrong:
            return rows + [{**row, "note": clean(row["note"])} for row in answer.rows]
        if answer.step not in peers or time.monotonic() >= deadline:
            failed = {"failed": answer.failed}
            return rows + [failed_row(case, peer, answer.note) | failed for peer in peers]
        offences[answer.step] = offences.get(answer.step, 0) + 1
        rows.append({**failed_row(case, answer.step, answer.note), "failed": answer.failed})
        peers.remove(answer.step)
    return rows


def failed_row(case: dict[str, Any], peer: str, note: str) -> dict[str, Any]:
    """A row like measure.as_json's, for a peer without a time."""
    nothing = dict.fromkeys(("seconds", "spread", "tflops", "peak_bytes", "error", "ratio"))
    return {
        "problem": case["problem"] if "problem" in case else case["sizes"],
        "label": case["label"],
        "direction": case["direction"],
        "peer": peer,
        **nothing,
        "rounds": [],
        "note": note,
    }
