"""Spills of calls that few make, which are left: where, at most how many registers, and why."""

from __future__ import annotations

import re
from typing import NamedTuple


class Known(NamedTuple):
    """`calls` and `kernel` are regular expressions, that match from the beginning; no GPUs are all of them."""

    calls: str
    kernel: str
    most: int
    reason: str
    gpus: tuple[str, ...] = ()

    def covers(self, gpu: str, call: str, kernel: str, count: int) -> bool:
        here = not self.gpus or gpu in self.gpus
        matches = re.match(self.calls, call) and re.match(self.kernel, kernel)
        return here and bool(matches) and count <= self.most


KNOWN: tuple[Known, ...] = (
    Known("linear_cross_entropy, classes, label_smoothing", "logits_kernel", 4, "with 3.6.0 alone", ("A100",)),
    Known("", "", 64, "their rows were counted with Triton 3.7.1 only, not with 3.6.0", ("RTX 4090", "B200")),
)
