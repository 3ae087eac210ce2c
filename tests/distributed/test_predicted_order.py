"""Predictions against runs: processes with links and kernels that are slowed to known figures."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import groups
import pytest
import torch
import torch.distributed as dist

from fastattn import distributed
from fastattn.distributed import computing, exchange, functional, heads, transports
from fastattn.distributed.prediction import BACKWARD, TRAINING, Machine, Sizes, pairs, predict
from fastattn.distributed.visibility import Visibility, whole_mask

GRANULES = 16
LENGTH = GRANULES * 64
METHODS = ("ring", "gather", "heads")
# So slow that what the processes really compute and send takes no time beside it.
MACHINE = Machine(attention=4e8, link=4e6, latency=1e-3)
# Query heads, key heads, and what is seen. Heads that are shared, keys that are few, and keys that nobody needs.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "full": (8, 8, {}),
    "few key heads": (16, 1, {"causal": True}),
    "window": (8, 8, {"causal": True, "window": (63, 0)}),
}
# Methods whose predicted times are nearer than this are not told apart.
APART = 1.4


def sizes(case: str) -> Sizes:
    query_heads, key_heads, _ = CASES[case]
    return Sizes(batch=1, heads=query_heads, key_heads=key_heads, width=8, value_width=8, element=4)


def predicted(case: str, ranks: int) -> dict[str, float]:
    query_heads, _, seen = CASES[case]
    plan = distributed.layout(LENGTH, ranks, heads=query_heads, **seen)
    left, right = seen.get("window", (None, 0 if seen.get("causal") else None))
    lowered = whole_mask((1, query_heads, LENGTH, LENGTH, "cpu"), (left, right), None)
    counted = pairs(Visibility(lowered), plan.owners, ranks)
    return {
        method: predict(method, counted, sizes(case), MACHINE, LENGTH / ranks, passes=TRAINING).seconds
        for method in METHODS
        if method != "heads" or query_heads % ranks == 0
    }


class Bucket:
    """A link that carries so many bytes a second, one message after the other."""

    def __init__(self) -> None:
        self.free = 0.0

    def begin(self, size: int, messages: int = 1) -> float:
        """When messages of `size` bytes each, sent now, will have arrived."""
        now = time.perf_counter()
        self.free = max(now, self.free) + messages * (MACHINE.latency + size / MACHINE.link)
        return self.free


def until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


@contextmanager
def slowed(case: str) -> Iterator[None]:
    """Within the block messages and kernels take the time that MACHINE says."""
    bucket, begin, wait = Bucket(), exchange.Transfer.__init__, exchange.Transfer.wait
    all_gather, all_to_all = exchange.all_gather, exchange.all_to_all

    def transfer(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        self.due = 0.0 if self.received is None else bucket.begin(self.received.nbytes)

    def arrived(self: Any) -> Any:
        message = wait(self)
        until(self.due)
        return message

    def gathered(ranks: Any, message: Any, *rest: Any) -> Any:
        result = all_gather(ranks, message, *rest)
        until(bucket.begin(message.nbytes, ranks.size - 1))
        return result

    def exchanged(ranks: Any, messages: Any, *rest: Any) -> Any:
        result = all_to_all(ranks, messages, *rest)
        until(bucket.begin(messages.nbytes // ranks.size, ranks.size - 1))
        return result

    with ExitStack() as stack:
        patch = lambda owner, name, value: stack.enter_context(mock.patch.object(owner, name, value))  # noqa: E731
        patch(exchange.Transfer, "__init__", transfer)
        patch(exchange.Transfer, "wait", arrived)
        patch(transports, "all_gather", gathered)
        patch(transports, "all_to_all", exchanged)
        patch(heads, "all_to_all", exchanged)
        patch(computing.Share, "attend", working(computing.Share.attend, case, 1.0))
        patch(computing.Gradients, "of_keys", working(computing.Gradients.of_keys, case, BACKWARD))
        patch(functional, "attention_here", whole(functional.attention_here, case))
        yield


def working(function: Callable[..., Any], case: str, passes: float) -> Callable[..., Any]:
    """The function on parts, in as much time as its granules take."""

    def run(self: Any, parts: Any, k: Any, v: Any) -> Any:
        begun = time.perf_counter()
        result = function(self, parts, k, v)
        visited = 0
        for part in parts:
            rows, columns = (s.stop - s.start for s in (part.rows, part.columns))
            every = rows * columns // 64**2 * CASES[case][0]
            visited += every if part.mask is None else part.mask.visited_granules
        until(begun + visited * sizes(case).granule_flops / MACHINE.attention * passes)
        return result

    return run


def whole(function: Callable[..., Any], case: str) -> Callable[..., Any]:
    """Attention to the whole sequence, and its backward, in as much time as its granules take."""

    def run(q: Any, k: Any, v: Any, *, mask: Any, **rest: Any) -> Any:
        begun = time.perf_counter()
        seconds = mask.visited_granules * sizes(case).granule_flops / MACHINE.attention
        out, lse = function(q, k, v, mask=mask, **rest)
        until(begun + seconds)
        out.register_hook(lambda _: time.sleep(seconds * BACKWARD))
        return out, lse

    return run


def measured(ranks: int) -> dict[str, dict[str, float]]:
    """Seconds of a forward and backward, for each case and method."""
    with tempfile.TemporaryDirectory() as folder:
        groups.start(_worker, (ranks, folder), ranks)
        return json.loads((Path(folder) / "seconds").read_text())


def _worker(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    mesh = dist.init_device_mesh("cpu", (ranks,))
    found: dict[str, dict[str, float]] = {}
    for case, (query_heads, key_heads, seen) in CASES.items():
        plan = distributed.layout(LENGTH, mesh, heads=query_heads, **seen)
        shapes = (query_heads, key_heads, key_heads)
        q, k, v = (torch.randn(1, h, plan.counts[rank], 8, requires_grad=True) for h in shapes)

        def step(method: str) -> None:
            out = distributed.attention(q, k, v, mesh=mesh, layout=plan, method=method, **seen)  # noqa: B023
            out.sum().backward()

        for method in predicted(case, ranks):
            step(method)  # makes the plan
            seconds = found.setdefault(case, {})
            for _ in range(2):  # the faster one: a busy machine delays one of them
                with slowed(case):
                    dist.barrier()
                    begun = time.perf_counter()
                    step(method)
                    dist.barrier()
                seconds[method] = min(seconds.get(method, math.inf), time.perf_counter() - begun)
    if rank == 0:
        (Path(folder) / "seconds").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])  # 8 pass, too, and take two minutes on two cores
def test_methods_come_in_the_predicted_order(ranks: int) -> None:
    found = measured(ranks)
    told_apart = 0
    for case in CASES:
        expected = predicted(case, ranks)
        for a in expected:
            for b in expected:
                if expected[b] > APART * expected[a]:
                    told_apart += 1
                    assert found[case][a] < found[case][b], (case, a, b, expected, found[case])
    assert told_apart
