"""Launch tables of MLPs that one kernel computes."""

from __future__ import annotations

from .rows import INTERPRETER, Row, Tiling

# A row's width is that of the input or of the output, padded, whichever is wider. A step has block_m tokens and
# block_n hidden elements. Beside each row: the most registers of any activation, shared memory, programs on a
# multiprocessor, and issue cycles over tensor cycles of its loop with GELU. Nothing spills. Compiled by Triton
# 3.7.1 from the launchers, with aligned bf16 or fp32 tensors; not yet measured. On sm_90 asynchronous products
# have at least 64 rows, tokens or hidden elements. All three kernels use these instructions, so that the
# backward's hidden layer is summed as the forward's is.
#
# Wider layers have no rows. At d = 256 a backward would take 7 products, where one that stores its hidden layer
# takes 5 and is no longer bound by memory; and three sums 256 wide leave no registers for the rest. IEEE float32
# sums of 128 columns spill, too.
_SINGLE = Tiling(32, 32, 8, 1)
_INTERPRETED = (Row(4, 128, Tiling(32, 32, 4, 1)),)

FORWARD = {
    INTERPRETER: _INTERPRETED,
    "sm_80": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 128 registers, 32 KiB, 2; 1.44
        Row(2, 128, Tiling(64, 64, 4, 2)),  # 168, 56 KiB, 2; 0.83
        Row(4, 64, _SINGLE),  # 178, 20 KiB, 1
    ),
    "sm_86": (
        Row(2, 64, Tiling(64, 64, 4, 2)),  # 132, 24 KiB, 3; 0.74
        Row(2, 128, Tiling(64, 32, 4, 2)),  # 128, 36 KiB, 2; 0.45
        Row(4, 64, _SINGLE),  # 178, 20 KiB, 1
    ),
    "sm_90": (
        Row(2, 64, Tiling(64, 64, 4, 3)),  # 96, 56 KiB, 4; 2.72
        Row(2, 128, Tiling(64, 64, 4, 2)),  # 168, 80 KiB, 2; 1.41
        Row(4, 64, _SINGLE),  # 174, 20 KiB, 1
    ),
    "sm_100": (
        Row(2, 64, Tiling(128, 32, 4, 2)),  # 120, 32 KiB, 4; 5.73
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 124, 96 KiB, 2; 2.97
        Row(4, 64, _SINGLE),  # 182, 20 KiB, 1
    ),
    "gfx942": (Row(2, 128, Tiling(32, 32, 4, 1)),),  # 126, 8 KiB
}
GATED_FORWARD = {
    INTERPRETER: _INTERPRETED,
    "sm_80": (
        Row(2, 64, Tiling(64, 64, 4, 2)),  # 183, 32 KiB, 2; 1.18
        Row(2, 128, Tiling(64, 32, 4, 2)),  # 168, 44 KiB, 3; 0.71. 128 x 64: 20 spills
        Row(4, 64, _SINGLE),  # 212, 20 KiB, 1; 4 warps: 168 spills
    ),
    "sm_86": (
        Row(2, 64, Tiling(64, 32, 4, 2)),  # 138, 20 KiB, 3; 0.64
        Row(2, 128, Tiling(64, 32, 4, 2)),  # 165, 44 KiB, 2; 0.35
        Row(4, 64, _SINGLE),  # 208, 20 KiB, 1
    ),
    "sm_90": (
        Row(2, 64, Tiling(64, 64, 4, 2)),  # 166, 56 KiB, 3; 2.13
        Row(2, 128, Tiling(64, 64, 4, 2)),  # 255, 112 KiB, 2; 1.15
        Row(4, 64, _SINGLE),  # 203, 20 KiB, 1
    ),
    "sm_100": (
        Row(2, 64, Tiling(128, 32, 4, 2)),  # 193, 40 KiB, 2; 4.54. 128 x 64: 2 spills with SiLU
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 168, 128 KiB, 1; 2.39
        Row(4, 64, _SINGLE),  # 203, 20 KiB, 1
    ),
    "gfx942": (Row(2, 128, Tiling(32, 32, 4, 1)),),  # 152, 8 KiB
}
INPUT = {
    INTERPRETER: _INTERPRETED,
    "sm_80": (
        Row(2, 64, Tiling(64, 32, 4, 2)),  # 166, 22 KiB, 3; 1.35
        Row(2, 128, Tiling(64, 32, 4, 1)),  # 168, 42 KiB, 3; 0.91. 2 stages: 8 spills
        Row(4, 64, _SINGLE),  # 190, 32 KiB, 1; 4 warps: 147 spills
    ),
    "sm_86": (
        Row(2, 64, Tiling(64, 32, 4, 1)),  # 164, 22 KiB, 3; 0.66
        Row(2, 128, Tiling(64, 32, 4, 1)),  # 175, 42 KiB, 2; 0.46
        Row(4, 64, _SINGLE),  # 167, 32 KiB, 1
    ),
    "sm_90": (
        Row(2, 64, Tiling(64, 64, 4, 2)),  # 127, 48 KiB, 4; 2.23
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 174, 128 KiB, 1; 1.18
        Row(4, 64, _SINGLE),  # 167, 32 KiB, 1
    ),
    "sm_100": (
        Row(2, 64, Tiling(128, 32, 4, 2)),  # 152, 52 KiB, 3; 4.62. 128 x 64: 67 spills
        Row(2, 128, Tiling(128, 32, 4, 2)),  # 176, 104 KiB, 2; 2.43
        Row(4, 64, _SINGLE),  # 165, 32 KiB, 1
    ),
    "gfx942": (Row(2, 128, Tiling(32, 32, 4, 1)),),  # 214, 8 KiB
}
GATED_INPUT = {
    INTERPRETER: _INTERPRETED,
    "sm_80": (
        Row(2, 64, Tiling(64, 32, 4, 2)),  # 244, 22 KiB, 2; 1.13
        Row(2, 128, Tiling(32, 32, 4, 1)),  # 230, 26 KiB, 2; 0.88. 64 x 32: 44 spills
        Row(4, 64, _SINGLE),  # 219, 40 KiB, 1
    ),
    "sm_86": (
        Row(2, 64, Tiling(32, 32, 4, 1)),  # 127, 14 KiB, 4; 0.63
        Row(2, 128, Tiling(32, 32, 4, 1)),  # 224, 26 KiB, 2; 0.44
        Row(4, 64, _SINGLE),  # 219, 40 KiB, 1
    ),
    "sm_90": (
        Row(2, 64, Tiling(64, 64, 4, 2)),  # 235, 64 KiB, 2; 1.90
        Row(2, 128, Tiling(64, 32, 4, 2)),  # 182, 80 KiB, 2; 1.13. 64 x 64: 4 spills
        Row(4, 64, _SINGLE),  # 215, 40 KiB, 1
    ),
    "sm_100": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 224, 88 KiB, 1; 3.93
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 200, 120 KiB, 1; 2.53. 128 x 64: 11 spills
        Row(4, 64, _SINGLE),  # 213, 40 KiB, 1
    ),
    "gfx942": (Row(2, 128, Tiling(32, 32, 4, 1)),),  # 246, 8 KiB
}
WEIGHTS = {
    INTERPRETER: _INTERPRETED,
    "sm_80": (
        Row(2, 64, Tiling(32, 64, 4, 2)),  # 185, 24 KiB, 2; 1.09
        Row(2, 128, Tiling(32, 32, 4, 2)),  # 195, 34 KiB, 2; 0.84. 32 x 64: 9 spills
        Row(4, 64, _SINGLE),  # 80, 36 KiB, 3
    ),
    "sm_86": (
        Row(2, 64, Tiling(32, 64, 4, 2)),  # 179, 24 KiB, 2; 0.54
        Row(2, 128, Tiling(32, 32, 4, 2)),  # 198, 34 KiB, 2; 0.43
        Row(4, 64, _SINGLE),  # 113, 36 KiB, 2
    ),
    "sm_90": (
        Row(2, 64, Tiling(32, 64, 4, 2)),  # 156, 32 KiB, 3; 2.02
        Row(2, 128, Tiling(32, 128, 8, 2)),  # 227, 96 KiB, 1; 1.10. 64 x 128: 16 spills
        Row(4, 64, Tiling(32, 32, 4, 1)),  # 223, 36 KiB, 2; 8 warps: 12 spills
    ),
    "sm_100": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 152, 81 KiB, 1; 3.80
        Row(2, 128, Tiling(64, 128, 8, 2)),  # 174, 161 KiB, 1; 2.01
        Row(4, 64, _SINGLE),  # 84, 36 KiB, 2
    ),
    "gfx942": (Row(2, 128, Tiling(32, 32, 4, 1)),),  # 228, 8 KiB
}
GATED_WEIGHTS = {
    INTERPRETER: _INTERPRETED,
    "sm_80": (
        Row(2, 64, Tiling(32, 32, 4, 2)),  # 193, 22 KiB, 2; 1.32
        Row(2, 128, Tiling(32, 32, 4, 2)),  # 168, 42 KiB, 3; 0.89
        Row(4, 64, _SINGLE),  # 128, 44 KiB, 2
    ),
    "sm_86": (
        Row(2, 64, Tiling(32, 32, 4, 2)),  # 173, 22 KiB, 2; 0.67
        Row(2, 128, Tiling(32, 32, 4, 1)),  # 2 stages: 6 spills
        Row(4, 64, _SINGLE),  # 168, 44 KiB, 1
    ),
    "sm_90": (
        Row(2, 64, Tiling(32, 64, 4, 2)),  # 235, 40 KiB, 2; 1.82
        Row(2, 128, Tiling(32, 128, 8, 2)),  # 243, 128 KiB, 1; 1.12
        Row(4, 64, _SINGLE),  # 165, 44 KiB, 1; 4 warps: 31 spills
    ),
    "sm_100": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 232, 97 KiB, 1; 3.59
        Row(2, 128, Tiling(64, 128, 8, 2)),  # 228, 177 KiB, 1; 2.16
        Row(4, 64, _SINGLE),  # 222, 44 KiB, 1
    ),
    "gfx942": (
        Row(2, 64, Tiling(32, 32, 8, 1)),  # 255, 4 KiB; 4 warps: 3 spills
        Row(2, 128, Tiling(32, 32, 4, 1)),
    ),
}
for _table in (FORWARD, GATED_FORWARD, INPUT, GATED_INPUT, WEIGHTS, GATED_WEIGHTS):
    _table["sm_120"] = _table["sm_86"]  # the same tensor cores and shared memory, and as many registers
# In 64 x 32 tiles layers 80 wide spill 2 registers.
FORWARD["sm_120"] = tuple(
    Row(2, 128, Tiling(64, 64, 4, 2)) if (row.bytes, row.width) == (2, 128) else row for row in FORWARD["sm_86"]
)

TABLES = {
    "forward": FORWARD,
    "gated forward": GATED_FORWARD,
    "input": INPUT,
    "gated input": GATED_INPUT,
    "weights": WEIGHTS,
    "gated weights": GATED_WEIGHTS,
}

# Up to this padded width one program holds the three sums of a gated layer's weight gradients.
GATED_AT_ONCE = 64

# Up to which width of the input and the output these kernels serve, by bytes per element; without an entry never.
# Counted for h = 4 d, forward and backward, in bf16, with everything at its peak rate: each kernel takes as long
# as its products, its issue slots or its bytes, whichever take longest. How many times as fast as a path that
# stores the hidden layer and keeps nothing, then as one that keeps the pre-activation:
#              d = 64          d = 128         d = 256
#   sm_80      3.0, 2.9        1.9, 1.8        0.9, 0.9        (A100, 1555 GB/s)
#   sm_86      1.4, 1.4        0.9, 0.8                        (GeForce: 71 TFLOP/s, 936 GB/s)
#   sm_90      1.7, 1.6        1.6, 1.5        0.8, 0.7        (H200)
#   sm_100     1.4, 1.1        1.3, 1.1                        (B200)
# In float32 the products alone take longer than the bytes. To be replaced by measurements.
WHOLE_MLP_UP_TO = {
    INTERPRETER: {},
    "sm_80": {2: 128},
    "sm_86": {2: 64},
    "sm_120": {2: 64},
    "gfx942": {2: 128},
}

# The tokens are split among so many programs as the family's largest GPU has multiprocessors.
_MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "sm_120": 188, "gfx942": 304}


def segment_programs(family: str) -> int:
    """How many programs the weights' gradients are split among: the same on all GPUs of a family."""
    return 6 if family == INTERPRETER else _MULTIPROCESSORS.get(family, _MULTIPROCESSORS["sm_80"])
