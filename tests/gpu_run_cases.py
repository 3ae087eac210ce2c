"""Cases that go wrong, for the tests of the GPU run's workers."""

from __future__ import annotations

import os
import time


def obedient(case, device, notify):
    notify("working")
    return [{"answer": case["question"] * 2}]


def raising(case, device, notify):
    notify("about to raise")
    raise ValueError("no such shape")


def hanging(case, device, notify):
    notify("about to hang")
    time.sleep(600)


def dying(case, device, notify):
    notify("about to die")
    os.write(2, b"segmentation fault, say\n")
    os._exit(7)


def several(case, device, notify):
    """Like the comparison of peers, of which one hangs and one kills the process."""
    for peer in case["peers"]:
        notify(peer)
        if peer == "hangs":
            time.sleep(600)
        if peer == "dies":
            os._exit(1)
    return [{"peer": peer, "seconds": 1.0, "note": ""} for peer in case["peers"]]


HANDLERS = {f.__name__: f for f in (obedient, raising, hanging, dying, several)}
