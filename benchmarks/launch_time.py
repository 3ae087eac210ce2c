"""What lies between a public function and the GPU's driver: python -m benchmarks.launch_time

The driver only pretends (tests/pretended_gpu): it takes a launch and returns. So what is timed is the Python and
C++ of PyTorch, Triton and fastattn. Times are ratios to Triton's own launch of a kernel with twelve plain
arguments, fastest of interleaved rounds. A call goes three ways: by the operators, by a plan, by its recording.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
os.environ["FASTATTN_BACKEND"] = "triton"

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastattn
from fastattn.core import capabilities, plans
from fastattn.measuring import measure
from tests.pretended_gpu import GPUS, obstacle, pretended_driver

LENGTH, HEADS, WIDTH, HIDDEN = 8, 2, 16, 32
ROUNDS, SECONDS = 49, 0.002


@triton.jit
def twelve_arguments_kernel(x, y, z, a, b, c, d, e, f, g, h, i):
    tl.store(x + a, tl.load(y + b) + tl.load(z + c) + d + e + f + g + h + i)


def cases() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    heads = [torch.randn(1, LENGTH, HEADS, WIDTH, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    x, weight = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((1, LENGTH, WIDTH), (WIDTH,)))
    return {
        "attention": (lambda q, k, v: fastattn.attention(q, k, v, causal=True), heads),
        "rms_norm": (lambda x, w: fastattn.rms_norm(x, w, eps=1e-6), [x, weight]),
        "prepare_heads": (lambda q: fastattn.prepare_heads(q, norm=True), heads[:1]),
    }


def bare_launch() -> Callable[[], Any]:
    x, y, z = (torch.randn(64) for _ in range(3))
    return lambda: twelve_arguments_kernel[(1,)](x, y, z, 17, 18, 19, 20, 21, 22, 23, 24, 25)


def timed(function: Callable[..., Any], tensors: list[Tensor], training: bool) -> Callable[[], Any]:
    if not training:
        return lambda: function(*tensors)
    leaves = [t.detach().requires_grad_() for t in tensors]
    upstream = torch.ones_like(function(*tensors))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


@contextlib.contextmanager
def three_ways() -> Iterator[list[str]]:
    """Inside the block calls go the way that stands in the list, on tensors in the host's memory."""
    way = [WAYS[-1]]
    watched, repeat = plans.watched, plans.Repeats.__call__

    def repeated(self: plans.Repeats, plan: Any, function: Callable[..., Any], tensors: Any, *kind: Any) -> Any:
        return function(*tensors) if way[0] == "plan" else repeat(self, plan, function, tensors, *kind)

    with contextlib.ExitStack() as stack:
        for owner, name, other in (
            (plans, "watched", lambda: way[0] == "operators" or watched()),
            (plans.Repeats, "__call__", repeated),
            (plans, "_is_interpreted", lambda _: False),
            (capabilities, "triton_obstacle", lambda _: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, other))
        yield way


WAYS = ("operators", "plan", "recording")
BARE = "twelve arguments"


def ratios(
    function: Callable[..., Any], tensors: list[Tensor], training: bool, way: list[str]
) -> dict[str, float]:
    """The time of each way over that of a bare launch."""
    call = timed(function, tensors, training)

    def going(name: str) -> Callable[[], Any]:
        def run() -> None:
            way[0] = name
            call()

        return run

    calls = {BARE: bare_launch(), **{name: going(name) for name in WAYS}}
    for _ in range(3):  # a recording is made of the second call
        for run in calls.values():
            run()
    timings = measure.measure(calls, torch.device("cpu"), rounds=ROUNDS, seconds=SECONDS)
    fastest = {name: min(timing.rounds) for name, timing in timings.items()}
    return {name: fastest[name] / fastest[BARE] for name in WAYS}


def main() -> int:
    console = Console()
    if reason := obstacle():
        console.print(f"no GPU can be pretended: {reason}")
        return 1
    torch.set_num_threads(1)
    table = Table("call", "direction", *WAYS, title="x the time of a bare launch with twelve arguments")
    with pretended_driver(GPUS["H100"]) as driver, three_ways() as way:
        driver.allow_host_memory()
        for name, (function, tensors) in cases().items():
            for training in (False, True):
                found = ratios(function, tensors, training, way)
                direction = "forward, backward" if training else "forward"
                table.add_row(name, direction, *(f"{found[each]:.1f}" for each in WAYS))
    console.print(table, f"torch {torch.__version__}, Triton {triton.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
