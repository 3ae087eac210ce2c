"""How many threads make a small model fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

WORTHWHILE = 0.9  # twice as many threads must bring a step's time down to this factor


@contextmanager
def restored_threads() -> Iterator[None]:
    """Within, the number of threads may be changed; afterwards it is as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_threads(step: Callable[[], None], most: int, repeats: int = 4) -> int:
    """Set and return the number of CPU threads, at most `most`, that makes the step fastest.

    Small tensors gain little from many threads. If other processes compute, too, or if a container has fewer CPUs
    than the machine, threads wait for one another: twice as many may take ten times as long. So the number is
    doubled, from one, only as long as that helps.
    """
    best, fewest_seconds = 1, _mean_seconds(step, 1, repeats)
    while 2 * best <= most:
        taken = _mean_seconds(step, 2 * best, repeats)
        if taken > WORTHWHILE * fewest_seconds:
            break
        best, fewest_seconds = 2 * best, taken
    torch.set_num_threads(best)
    return best


def _mean_seconds(step: Callable[[], None], threads: int, repeats: int) -> float:
    torch.set_num_threads(threads)
    step()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats
