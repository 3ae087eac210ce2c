"""Launch tables of norms."""

from __future__ import annotations

from .rows import EVERY, INTERPRETER, Row, Tiling

# Norms of rows: bounded by memory. A tile is whole rows as far as registers go, 16 elements a thread forward and 8
# or 16 backward, whose sums for weight and bias stay in registers. Loads and stores of aligned tensors are 16
# bytes. Beside each row: registers, the most of sm_80 to sm_120 for layer norm in bf16 with weight, bias and
# residual; after the slash in fp32, where compiled (Triton 3.7.1). Nothing spills but 3 on sm_120 at W=1024
# backward. Not yet measured.
NORM_FORWARD = {
    INTERPRETER: (Row(4, EVERY, Tiling(4, 32, 4, 1)),),
    "sm_80": (
        Row(4, 64, Tiling(32, 64, 4, 1)),  # 48
        Row(4, 128, Tiling(16, 128, 4, 1)),  # 48 / 56
        Row(4, 256, Tiling(8, 256, 4, 1)),  # 48
        Row(4, 512, Tiling(4, 512, 4, 1)),  # 48
        Row(4, 1024, Tiling(2, 1024, 4, 1)),  # 40 / 56
        Row(4, 2048, Tiling(1, 2048, 4, 1)),  # 48
        Row(4, 4096, Tiling(1, 4096, 8, 1)),  # 43
        Row(4, 8192, Tiling(1, 8192, 8, 1)),  # 80 / 104
        Row(4, 16384, Tiling(1, 16384, 16, 1)),  # 99
        Row(4, EVERY, Tiling(1, 8192, 8, 1)),  # 116 / 140
    ),
}
NORM_BACKWARD = {
    INTERPRETER: (Row(4, EVERY, Tiling(4, 32, 4, 1)),),
    "sm_80": (
        Row(4, 64, Tiling(32, 64, 8, 1)),  # 64
        Row(4, 128, Tiling(16, 128, 8, 1)),  # 64 / 64; of odd widths 128
        Row(4, 256, Tiling(8, 256, 8, 1)),  # 77
        Row(4, 512, Tiling(4, 512, 8, 1)),  # 80
        Row(4, 1024, Tiling(2, 1024, 8, 1)),  # 77 / 80; 4 rows: 5 spills on sm_100
        Row(4, 2048, Tiling(2, 2048, 8, 1)),  # 128; 1 row: 4 spills on sm_100
        Row(4, 4096, Tiling(1, 4096, 8, 1)),  # 86
        Row(4, 8192, Tiling(1, 8192, 16, 1)),  # 86 / 108
        # The sums of wider rows would not fit: they take a pass of their own, of 60 / 74 registers.
        Row(4, EVERY, Tiling(1, 4096, 8, 1)),  # 100 / 170
    ),
}

# How many programs share out the rows of a norm's backward: as many as have 8192 elements of dy, and of x, in
# flight on every multiprocessor of the family's largest GPU: 32 KiB in half precision, where an H100's bandwidth
# times latency is some 16. Each leaves a line of partial sums, so that more of them move more bytes.
_NORM_ELEMENTS = 8192
_MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "sm_120": 188, "gfx942": 304}


def norm_programs(family: str, tiling: Tiling) -> int:
    """How many programs share out the rows: the same on every GPU of a family, as the order of sums is."""
    if family == INTERPRETER:
        return 3
    units = _MULTIPROCESSORS.get(family, _MULTIPROCESSORS["sm_80"])
    return units * (_NORM_ELEMENTS // (tiling.block_m * tiling.block_n))
