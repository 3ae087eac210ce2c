"""How many threads a small model deserves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

WORTHWHILE = 0.9  # a step must get down to this share of its time to justify twice the threads


@contextmanager
def restored_threads() -> Iterator[None]:
    """Whatever is settled within, afterwards all is as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_threads(step: Callable[[], None], most: int, repeats: int = 4) -> int:
    """Set and return the number of CPU threads, at most `most`, that makes the step fastest.

    Small tensors gain little from many threads, and where others compute too, or a container grants fewer CPUs
    than the machine has, threads wait for one another: then twice as many can take ten times as long. So the
    number is doubled, from one, only as long as that pays.
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
