"""Make every call of calls.py on pretended GPUs; say which failed.

python -m tests.pretended_gpu --gpu H100              every call on an H100
python -m tests.pretended_gpu --each-on-one           every call on one of the four, by turns
python -m tests.pretended_gpu --only "D=128" --gpu A100
python -m tests.pretended_gpu --until ttir            the compiler stops after its front end
python -m tests.pretended_gpu --until cubin           kernels are assembled: one that spills registers is a failure
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

# Before Triton is imported: kernels must be compiled, not interpreted, and the calls must reach them.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["FASTATTN_BACKEND"] = "triton"

import torch
import triton

from fastattn.measuring.prove_worker import launched, spills_of
from tests.pretended_gpu import GPUS, STAGES, Driver, obstacle, pretended_gpus
from tests.pretended_gpu.calls import Call, all_calls
from tests.pretended_gpu.known_spills import KNOWN
from tests.pretended_gpu.tensors import planned

FOUR = ("H100", "A100", "RTX 4090", "B200")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.pretended_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="append", choices=list(GPUS), help="repeatable; default: those four")
    parser.add_argument("--each-on-one", action="store_true", help="every call on one of the GPUs, by turns")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="only the I-th of N shares of the calls")
    parser.add_argument("--only", default="", metavar="TEXT", help="calls named so")
    parser.add_argument("--until", choices=STAGES, default="ptx", help="the last stage of the compiler to run")
    asked = parser.parse_args(words)
    if reason := obstacle():
        print(f"no GPU can be pretended: {reason}")
        return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started = time.monotonic()
    gpus = asked.gpu or FOUR
    share, shares = map(int, asked.share.split("/"))
    jobs = [
        (number, call)
        for number, call in enumerate(all_calls())
        if asked.only in call.name and number % shares == share - 1
    ]
    failures = 0
    spilling = Spilling()
    with (
        pretended_gpus(*(GPUS[name] for name in gpus), until=asked.until) as driver,
        launched(spilling.note),
    ):
        for number, call in jobs:
            for device, gpu in enumerate(gpus):
                if asked.each_on_one and (number // shares) % len(gpus) != device:
                    continue
                driver.set_device(device)
                complaints = [complaint_of(call, driver), *spilling.complaints(gpu, call.name)]
                for complaint in filter(None, complaints):
                    failures += 1
                    print(f"{gpu}: {call.name}: {complaint}", flush=True)
        launches = driver.launches()
    seconds = time.monotonic() - started
    summary = f"{len(jobs)} calls, {launches} launches, {failures} failures, {seconds:.0f} s"
    print(f"Triton {triton.__version__}: {summary}")
    return 1 if failures or not jobs else 0


class Spilling:
    """The kernels of a call that spill, and are not known to."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def note(self, kernel: str, compiled: Any) -> None:
        if count := spills_of(compiled):
            self.found[kernel] = max(count, self.found.get(kernel, 0))

    def complaints(self, gpu: str, call: str) -> list[str]:
        found, self.found = self.found, {}
        return [
            f"{kernel} spills {count} registers"
            for kernel, count in found.items()
            if not any(known.covers(gpu, call, kernel, count) for known in KNOWN)
        ]


def complaint_of(call: Call, driver: Driver) -> str:
    """What went wrong, in one line; "" if nothing did. The call goes by its operators, by a new plan, by a plan
    that is recorded, and by the recording: each launches as often."""
    launches = []
    for way in (nullcontext, planned, planned, planned):
        before = driver.launches()
        try:
            with way():
                call.run()
        except Exception as error:
            if os.environ.get("PRETENDED_GPU_TRACEBACK"):
                traceback.print_exc()
            return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
        launches.append(driver.launches() - before)
    if call.launches and 0 in launches:
        return "nothing was launched"
    return "" if len(set(launches)) == 1 else f"launches by four ways: {launches}"


if __name__ == "__main__":
    sys.exit(main())
