"""Launch tables of norms."""

from __future__ import annotations

from .rows import EVERY, INTERPRETER, Row, Tiling

# Norms are bound by memory. A tile has whole rows as far as they fit in registers: 16 elements for each thread
# forward, 8 or 16 backward, where the sums for weight and bias stay in registers, too. Loads and stores of aligned
# tensors have 16 bytes. Beside each row: registers, the most on sm_80 to sm_120 for layer norm in bf16 with
# weight, bias and residual; after a slash in fp32, where compiled (Triton 3.7.1). Nothing spills. Not yet
# measured.
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
NORM_BACKWARD["sm_100"] = (
    *NORM_BACKWARD["sm_80"][:-1],
    Row(2, EVERY, Tiling(1, 4096, 8, 1)),
    Row(4, EVERY, Tiling(1, 4096, 16, 1)),  # 8 warps: 15 spills
)
NORM_BACKWARD["sm_120"] = tuple(
    Row(4, 1024, Tiling(1, 1024, 4, 1)) if row.width == 1024 else row  # 2 rows: 3 spills
    for row in NORM_BACKWARD["sm_80"]
)

# How many programs the rows of a norm's backward are split among: so many that each multiprocessor of the family's
# largest GPU loads 8192 elements of dy and of x at a time. That is 32 KiB in half precision; bandwidth times
# latency of an H100 is some 16. Each program writes a line of partial sums, so more programs would move more
# bytes.
_NORM_ELEMENTS = 8192
_MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "sm_120": 188, "gfx942": 304}


def norm_programs(family: str, tiling: Tiling) -> int:
    """How many programs the rows are split among: the same on all GPUs of a family, so that sums have one
    order."""
    if family == INTERPRETER:
        return 3
    units = _MULTIPROCESSORS.get(family, _MULTIPROCESSORS["sm_80"])
    return units * (_NORM_ELEMENTS // (tiling.block_m * tiling.block_n))
