"""Launch tables of attention whose bits depend on each row alone."""

from __future__ import annotations

from .rows import INTERPRETER, Row, Tiling

# The softmax begins anew at every multiple of SPLIT keys of a sequence, counted from its first. Where a key head
# has few rows, each split is a program of its own. What a split gives is written and read again in float32: at
# most an eighth of the bytes of 1024 keys and values of a head of 128.
SPLIT = 1024
# The most rows of a key head, queries times query heads that share it, for which keys are split over programs.
SPLIT_ROWS = 64

# One row for every call of a dtype and width: whatever it asks for, and whether it has one query or thousands.
# Beside each row, as Triton 3.7.1 compiles it with every option of the scores: registers, shared memory. Nothing
# spills. Not yet measured.
INVARIANT = {
    INTERPRETER: (Row(8, 256, Tiling(32, 16, 4, 1)),),
    "sm_80": (
        Row(2, 64, Tiling(64, 64, 8, 2)),  # 206, 24 KiB; 128 x 64: 8 spills
        Row(2, 128, Tiling(32, 64, 8, 2)),  # 174, 44 KiB; 64 x 64: 2 spills
        Row(2, 256, Tiling(32, 64, 8, 2)),  # 255, 84 KiB
        Row(4, 64, Tiling(32, 16, 8, 1)),  # 128, 14 KiB; 32 x 32: 8 spills
        Row(4, 128, Tiling(32, 16, 8, 1)),  # 108, 32 KiB; at D = 256 every tile spills
    ),
    "sm_90": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 192, 48 KiB
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 213, 80 KiB; 128 x 64: 12 spills
        Row(2, 256, Tiling(32, 64, 8, 2)),  # 194, 84 KiB
        Row(4, 64, Tiling(32, 16, 8, 1)),
        Row(4, 128, Tiling(32, 16, 8, 1)),
    ),
    "sm_100": (
        Row(2, 64, Tiling(64, 64, 8, 2)),
        Row(2, 128, Tiling(32, 32, 8, 2)),  # 32 x 64: 7 spills from a cache in pages
        Row(2, 256, Tiling(32, 64, 8, 2)),
        Row(4, 128, Tiling(16, 16, 8, 1)),  # D = 64: 32 x 16 2 spills
    ),
    "sm_120": (
        Row(2, 64, Tiling(64, 64, 8, 2)),
        Row(2, 128, Tiling(32, 32, 8, 2)),  # 32 x 64: 6 spills from a cache in pages
        Row(2, 256, Tiling(32, 64, 8, 2)),
        Row(4, 128, Tiling(32, 16, 8, 1)),
    ),
}


def merge_warps(tiling: Tiling) -> int:
    """Warps of the kernel that merges splits, whose tiles have as many rows. With 64 rows 4 warps would spill on
    sm_90, with 32 rows 8 on sm_100."""
    return 4 if tiling.block_m <= 32 else 8
