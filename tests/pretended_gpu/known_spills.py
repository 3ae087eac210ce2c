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
    Known("linear_cross_entropy, classes", "logits_kernel", 4, "label smoothing, with 3.6.0 alone", ("A100",)),
    # A few registers of calls that few make, as counted with 3.6.0.
    *(
        Known(calls, kernel, most, "seen with 3.6.0", (gpu,))
        for gpu, calls, kernel, most in (
            ("H100", "attention, D=320 .* together, forward mode", "attention_tangent_kernel", 12),
            ("H100", "attention, fp32 D=256 documents", "attention_dkdv_kernel", 6),
            ("H100", "attention, fp32 D=256 (bias|bool mask)", "attention_forward_kernel", 8),
            ("H100", "attention, fp32 D=128 relative bias", "attention_dq_kernel", 4),
            ("H100", "attention_with_cache, .*16 D=128, 1 queries, all", "cache_attention_kernel", 6),
            ("H100", "attention, tf32 D=64", "attention_dkdv_kernel", 2),
            ("A100", "attention_with_cache, fp32 D=256, 100 queries", "cache_attention_kernel", 2),
            ("A100", "attention, bf16 D=40, backward", "attention_dkdv_kernel", 2),
            ("A100", "attention, fp32 .* relative bias", "attention_(forward|dkdv|remainder)_kernel", 4),
            ("A100", "attention, relative bias, backward", "diagonal_sums_kernel", 2),
        )
    ),
    Known("attention, fp32 D=5(20|77)", "attention_forward_kernel", 14, "widths that nobody has"),
    Known("prepare_heads, all, fp32 D=111", "heads_gradient_kernel", 2, "a width that nobody has"),
    Known("", "", 64, "their rows were counted with Triton 3.7.1 only, not with 3.6.0", ("RTX 4090", "B200")),
)
