"""What a worker does for a case, by the case's kind. Each returns rows of plain data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import compilations, correctness, features, rehearsal, sweep
from fastattn.measuring import checking, kinds, measure, prove_tilings
from fastattn.measuring.peers import FORWARD, TRAINING, MLPProblem, problem_from

Case = dict[str, Any]
Rows = list[dict[str, Any]]
Notify = Callable[[str], None]
EVERYTHING = (FORWARD, TRAINING)  # the directions in which all is compiled


@contextlib.contextmanager
def context(device: str) -> Iterator[torch.device]:
    """What a worker runs within: `device` is cpu, cuda or pretended."""
    compilations.listen()
    with rehearsal.pretended() if device == "pretended" else contextlib.nullcontext():
        yield torch.device("cuda:0" if device == "pretended" else device)


def compare_peers(case: Case, device: torch.device, notify: Notify) -> Rows:
    """Every peer at one problem in one direction."""
    rows = measure.compare_peers(
        problem_from(case["problem"]),
        case["direction"],
        case["peers"],
        device,
        rounds=case["rounds"],
        seconds=case["seconds"],
        notify=notify,
    )
    return [measure.as_json(row) for row in rows]


def warm(case: Case, device: torch.device, notify: Notify) -> Rows:
    """Compile what a later case will launch, into the caches on disk; nothing is timed and no row is returned."""
    if "sizes" in case:
        return _warm_call(case, device, notify)
    problem = problem_from(case["problem"])
    torch.compiler.reset()
    inputs = problem.inputs(device)
    for peer in case["peers"]:
        notify(peer)
        with contextlib.suppress(Exception):  # the measurement meets the same error and reports it
            contender = measure.Contender.of(problem, peer, inputs)
            for direction in EVERYTHING:
                contender.direct(direction)[0]()
    return []


def _warm_call(case: Case, device: torch.device, notify: Notify) -> Rows:
    call = kinds.build(kinds.Sizes(**case["sizes"]), device)
    rivals = features.rivals(kinds.Sizes(**case["sizes"]), device)
    builders = {features.OURS: lambda: lambda *tensors: call.function("triton", *tensors), **rivals}
    for peer in case["peers"]:
        notify(peer)
        with contextlib.suppress(Exception):  # the measurement meets the same error and reports it
            rival = builders[peer]()
            for direction in EVERYTHING:
                features.direct(rival, call.tensors, direction)()
    return []


def check_kernel(case: Case, device: torch.device, notify: Notify) -> Rows:
    return checking.check_kernel(kinds.Sizes(**case["sizes"]), device, notify)


def ceilings(case: Case, device: torch.device, notify: Notify) -> Rows:
    """The device's copy bandwidth and matrix rate on random data, measured like everything else."""
    side, numbers = case["side"], case["bytes"] // 4
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    timings = measure.measure(
        {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b)},
        device,
        rounds=case["rounds"],
        seconds=case["seconds"],
        notify=notify,
    )
    copy, matmul = timings["copy"], timings["matmul"]
    return [
        {
            # Each byte is read once and written once.
            "copy_tbytes_per_second": 2 * source.nbytes / copy.median / 1e12,
            "copy_spread": copy.spread,
            "copy_bytes": source.nbytes,
            "matmul_tflops": 2 * side**3 / matmul.median / 1e12,
            "matmul_spread": matmul.spread,
            "matmul_side": side,
        }
    ]


def check_attention(case: Case, device: torch.device, notify: Notify) -> Rows:
    return correctness.check_attention(case["sizes"], case["backend"], device, notify)


def check_mlp(case: Case, device: torch.device, notify: Notify) -> Rows:
    problem = problem_from(case["problem"])
    assert isinstance(problem, MLPProblem)
    return correctness.check_mlp(problem, case["backend"], device, notify)


def try_tiling(case: Case, device: torch.device, notify: Notify) -> Rows:
    return sweep.try_tiling(case, device, notify)


def family(case: Case, device: torch.device, notify: Notify) -> Rows:
    """Which family's table serves this device."""
    from fastattn.kernels import launch
    from fastattn.kernels.attention import forward

    with launch.on_device(torch.empty(0, device=device)):
        return [{"family": launch.family(forward.attention_forward_kernel, device)}]


HANDLERS: dict[str, Callable[[Case, torch.device, Notify], Rows]] = {
    "peers": compare_peers,
    "warm": warm,
    "kernel": check_kernel,
    "feature": features.compare,
    "small call": features.compare,
    "launch": rehearsal.launch,
    "ceilings": ceilings,
    "check attention": check_attention,
    "check mlp": check_mlp,
    "family": family,
    "tiling": try_tiling,
    **prove_tilings.HANDLERS,
}
