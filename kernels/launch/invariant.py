"""Launch tables of attention whose bits depend on each row alone."""

from __future__ import annotations

from .rows import INTERPRETER, Row, Tiling

# The softmax begins anew at every multiple of SPLIT keys of a sequence, counted from its first. Where a key head
# has few rows, each split is a program of its own. What a split gives is written and read again in float32: at
# most an eighth of the bytes of 1024 keys and values of a head of 128.
SPLIT = 1024
# The most rows of a key head, queries times query heads that share it, for which keys are split over programs.
SPLIT_ROWS = 64

# One row for every call of a dtype and width: whatever its mask, and whether it has one query or thousands, so
# that a row meets the same products in every call of a layer. Beside each row, as Triton 3.7.1 compiles it with
# every option of the scores and for packed sequences: registers, shared memory. Nothing spills. Not yet measured.
INVARIANT = {
    INTERPRETER: (Row(8, 256, Tiling(32, 16, 4, 1)),),
    "sm_80": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 240, 32 KiB
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 255, 56 KiB; 128 x 64: 145 spills
        Row(2, 256, Tiling(32, 64, 8, 1)),  # 255, 52 KiB
        Row(4, 64, Tiling(32, 16, 8, 1)),  # 128, 14 KiB; 32 x 32: 8 spills
        Row(4, 128, Tiling(32, 16, 8, 1)),  # 108, 32 KiB; at D = 256 every tile spills
    ),
    "sm_90": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 192, 48 KiB; 128 x 128: 26 spills
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 255, 96 KiB
        Row(2, 256, Tiling(32, 64, 8, 1)),  # 221, 52 KiB; 2 stages: 8 spills; 64 x 64 and 128 x 32: 160 and more
        Row(4, 64, Tiling(32, 16, 8, 1)),
        Row(4, 128, Tiling(32, 16, 8, 1)),
    ),
    "sm_100": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 225, 48 KiB
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 244, 81 KiB
        Row(2, 256, Tiling(32, 64, 8, 1)),  # 220, 52 KiB; 2 stages: 4 spills
        Row(4, 64, Tiling(16, 16, 8, 1)),  # 32 x 16: 2 spills
        Row(4, 128, Tiling(32, 16, 8, 1)),  # 107; 16 x 16: 11 spills
    ),
    "sm_120": (
        Row(2, 64, Tiling(64, 64, 8, 2)),
        Row(2, 128, Tiling(32, 32, 8, 2)),  # 32 x 64: 6 spills from a cache in pages
        Row(2, 256, Tiling(32, 64, 8, 2)),
        Row(4, 128, Tiling(32, 16, 8, 1)),
    ),
}

# The backward's: dk and dv of block_n keys, a tile of block_m packed rows after the other; dq of block_m rows, a
# tile of block_n keys after the other. One row for every call of a dtype and width, as above. "shaped": with a
# soft cap, slopes or scales of heads. Beside each row: registers, shared memory; issue over tensor-core cycles of
# a whole tile.
_EXACT_DKDV = Row(4, 64, Tiling(16, 32, 8, 1)), Row(4, 128, Tiling(16, 16, 8, 1))
_EXACT_DQ = Row(4, 64, Tiling(32, 16, 8, 1)), Row(4, 128, Tiling(16, 16, 8, 1))
_SMALL_DKDV = (  # at most 99 KiB of shared memory
    Row(2, 128, Tiling(32, 64, 8, 2)),
    Row(2, 256, Tiling(32, 32, 8, 1)),
    *_EXACT_DKDV,
)
INVARIANT_DKDV = {
    INTERPRETER: (Row(8, 256, Tiling(32, 32, 4, 1)),),
    "sm_80": (
        Row(2, 128, Tiling(64, 64, 8, 2)),  # D = 128: 188, 72 KiB; 0.61. D = 64: 245, 32 KiB; 1.06
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 206, 128 KiB; 1.04 shaped
        *_EXACT_DKDV,
    ),
    "sm_80 shaped": (Row(2, 128, Tiling(32, 64, 8, 2)),),  # 64 x 64: 2 spills at D = 64, 6 at D = 128
    "sm_86": _SMALL_DKDV,
    "sm_90": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 241, 65 KiB
        Row(2, 128, Tiling(32, 128, 8, 2)),  # 247, 96 KiB; 0.71. 64 x 64: 1.24, 64 x 128: 47 spills
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 178, 128 KiB; 2.10 shaped
        *_EXACT_DKDV,
    ),
    "sm_90 shaped": (
        Row(2, 64, Tiling(64, 128, 8, 2)),
        Row(2, 128, Tiling(32, 64, 8, 2)),  # 212, 64 KiB; 4.19. 64 x 64: 60 spills
    ),
    "sm_100": (
        Row(2, 64, Tiling(32, 64, 8, 2)),
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 187, 130 KiB; 32 x 64: 8 spills
        *_SMALL_DKDV[1:],
    ),
    "sm_120": _SMALL_DKDV,
}
_SMALL_DQ = Row(2, 64, Tiling(64, 64, 8, 2)), Row(2, 128, Tiling(32, 64, 8, 2)), Row(2, 256, Tiling(32, 32, 8, 1))
INVARIANT_DQ = {
    INTERPRETER: (Row(8, 256, Tiling(32, 32, 4, 1)),),
    "sm_80": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 255, 48 KiB; 0.45
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 255, 72 KiB; 0.43
        Row(2, 256, Tiling(32, 32, 8, 1)),
        *_EXACT_DQ,
    ),
    "sm_90": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 201, 64 KiB
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 233, 128 KiB; 0.41
        Row(2, 256, Tiling(32, 32, 8, 1)),  # 208, 64 KiB; 2.59 shaped. 64 x 32: 313 spills
        *_EXACT_DQ,
    ),
    "sm_90 shaped": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 234, 96 KiB; 3.15. 128 x 64: 12 spills
    ),
    "sm_100": (*_SMALL_DQ, *_EXACT_DQ),
    "sm_120": (*_SMALL_DQ, *_EXACT_DQ),
}
# Rows of a head that are added up at a time, for the gradients of sinks and scales of heads.
SUM_ROWS = 128


def merge_warps(tiling: Tiling) -> int:
    """Warps of the kernel that merges splits, whose tiles have as many rows. With 64 rows 4 warps would spill on
    sm_90, with 32 rows 8 on sm_100."""
    return 4 if tiling.block_m <= 32 else 8
