"""What a process of `fastattn prove` does where kernels hang, die or are right, for tests without a GPU."""

from __future__ import annotations

import os
import time

from fastattn.core.proofs import Key
from fastattn.measuring import prove_cases

GOES_WRONG = {"norm": lambda: time.sleep(600), "heads": lambda: os._exit(7)}


def check(case, device, notify):
    notify("check")
    GOES_WRONG.get(case["family"], lambda: None)()
    right = {"error": 1e-7, "allowed": 1e-6, "verdict": None, "reason": ""}
    return [{"direction": direction, **right} for direction in case["directions"]]


def time_case(case, device, notify):
    keys: list[Key] = prove_cases.keys(case)
    return [{"direction": key.direction, "size": key.size, "ratio": 2.0, "reason": ""} for key in keys]


def no_candidates(case, device, notify):
    return []


HANDLERS = {"check": check, "time": time_case, "candidates": no_candidates}
