"""Launch tables of attention whose bits depend on each row alone."""

from __future__ import annotations

from .rows import INTERPRETER, Row, Tiling

# The softmax begins anew at every multiple of SPLIT keys of a sequence, counted from its first. Where a key head
# has few rows, each split is a program of its own. What a split gives is written and read again in float32: at
# most an eighth of the bytes of 1024 keys and values of a head of 128.
SPLIT = 1024
# The most rows of a key head, queries times query heads that share it, for which keys are split over programs.
SPLIT_ROWS = 64

# One row for every call of a layer: whatever its mask and lengths, and whether it has one query or thousands, so
# that a row meets the same products in every call. A layer's soft cap, slopes and scales of heads are the same in
# all of them, and may have rows of their own: "shaped". Beside each row, as Triton 3.7.1 compiles it, of packed
# sequences unless noted: registers, shared memory; issue over tensor-core cycles of a whole tile. Nothing spills,
# from a cache in pages neither. Not yet measured.
_EXACT = Row(4, 64, Tiling(32, 16, 8, 1)), Row(4, 128, Tiling(32, 16, 8, 1))  # at D = 256 every tile spills
INVARIANT = {
    INTERPRETER: (Row(8, 256, Tiling(32, 16, 4, 1)),),
    "sm_80": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 234, 48 KiB; 0.68. 128 x 128: 46 spills
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 255, 96 KiB; 0.48
        Row(2, 256, Tiling(32, 64, 8, 1)),
        *_EXACT,
    ),
    "sm_80 shaped": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 128 x 64: 12
    ),
    "sm_90": (
        Row(2, 64, Tiling(128, 128, 8, 2)),  # 255, 80 KiB; 0.90
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 236, 96 KiB; 0.70. 128 x 128: 14 from a cache
        Row(2, 256, Tiling(32, 64, 8, 1)),
        _EXACT[0],
        Row(4, 128, Tiling(32, 16, 4, 1)),  # 8 warps: 9 with everything
    ),
    "sm_90 shaped": (Row(2, 64, Tiling(128, 64, 8, 2)),),  # 128 x 128: none, but 255 registers
    "sm_100": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 205, 48 KiB; 2.44. 128 x 128: 16; in 1 stage none, 1.83
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 240, 96 KiB; 1.45. 128 x 128: 136; in 1 stage none, 1.05
        Row(2, 256, Tiling(32, 64, 8, 1)),
        Row(4, 64, Tiling(16, 16, 8, 1)),  # 32 x 16: 2 spills
        _EXACT[1],
    ),
    "sm_100 shaped": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 128 x 64: 15
    ),
    "sm_120": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 209, 48 KiB; 0.33
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 232, 96 KiB; 0.29. 128 x 64: 44
        Row(2, 256, Tiling(32, 64, 8, 2)),
        _EXACT[1],
    ),
}
INVARIANT["sm_86"] = (*INVARIANT["sm_80"][:-1], Row(4, 128, Tiling(32, 16, 4, 1)))
INVARIANT["sm_86 shaped"] = INVARIANT["sm_80 shaped"]

# The backward's: dk and dv of block_n keys, a tile of block_m queries after the other; dq of block_m packed rows,
# a tile of block_n keys after the other. One row for every call of a layer, as above.
_EXACT_DKDV = Row(4, 64, Tiling(16, 32, 8, 1)), Row(4, 128, Tiling(16, 16, 8, 1))
_EXACT_DQ = Row(4, 64, Tiling(32, 16, 8, 1)), Row(4, 128, Tiling(16, 16, 8, 1))
_SMALL_DKDV = (  # at most 99 KiB of shared memory
    Row(2, 64, Tiling(64, 128, 8, 2)),  # sm_86: 254, 48 KiB; 0.22
    Row(2, 128, Tiling(64, 64, 8, 2)),  # sm_86: 172, 72 KiB; 0.21
    Row(2, 256, Tiling(32, 32, 8, 1)),
    *_EXACT_DKDV,
)
INVARIANT_DKDV = {
    INTERPRETER: (Row(8, 256, Tiling(32, 32, 4, 1)),),
    "sm_80": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 255, 48 KiB; 0.44
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 172, 72 KiB; 0.41
        Row(2, 256, Tiling(64, 32, 8, 1)),
        *_EXACT_DKDV,
    ),
    "sm_80 shaped": (
        Row(2, 64, Tiling(32, 128, 8, 2)),  # 64 x 128: 14 spills with Triton 3.6
        Row(2, 128, Tiling(64, 64, 8, 2)),
    ),
    "sm_86": _SMALL_DKDV,
    "sm_90": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 220, 64 KiB; 0.63
        Row(2, 128, Tiling(64, 128, 8, 2)),  # 255, 128 KiB; 0.37
        Row(2, 256, Tiling(64, 32, 8, 1)),
        *_EXACT_DKDV,
    ),
    "sm_100": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 181, 81 KiB; 1.43
        Row(2, 128, Tiling(64, 128, 8, 2)),  # 229, 161 KiB; 0.83
        *_SMALL_DKDV[2:],
    ),
    "sm_90 shaped": (
        Row(2, 64, Tiling(64, 128, 8, 2)),
        Row(2, 128, Tiling(32, 128, 8, 2)),  # 64 x 128: 18 spills with Triton 3.6
    ),
    "sm_120": _SMALL_DKDV,
}
_WIDE_DQ = (Row(2, 256, Tiling(32, 32, 8, 1)), *_EXACT_DQ)
_SMALL_DQ = (
    Row(2, 64, Tiling(128, 64, 8, 2)),  # sm_120: 228, 48 KiB; 0.22
    Row(2, 128, Tiling(128, 32, 8, 2)),  # sm_120: 194, 80 KiB; 0.18
    *_WIDE_DQ,
)
INVARIANT_DQ = {
    INTERPRETER: (Row(8, 256, Tiling(32, 32, 4, 1)),),
    "sm_80": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 237, 48 KiB; 0.45
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 255, 96 KiB; 0.33
        *_WIDE_DQ,
    ),
    "sm_80 shaped": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 128 x 64: 32 spills
    ),
    "sm_86": (*_SMALL_DQ[:3], Row(4, 64, Tiling(16, 16, 8, 1)), _EXACT_DQ[1]),  # 32 x 16: 10 spills
    "sm_90": (
        Row(2, 64, Tiling(128, 128, 8, 2)),  # 232, 96 KiB; 0.55
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 239, 128 KiB; 0.40
        *_WIDE_DQ,
    ),
    "sm_90 shaped": (Row(2, 64, Tiling(128, 64, 8, 2)),),  # 128 x 128: 34 spills
    "sm_100": (
        Row(2, 64, Tiling(128, 128, 8, 2)),  # 190, 113 KiB; 1.09
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 128, 145 KiB; 0.83
        _WIDE_DQ[0],
        Row(4, 64, Tiling(32, 32, 8, 1)),  # 32 x 16: 8 spills
        _EXACT_DQ[1],
    ),
    "sm_100 shaped": (Row(2, 64, Tiling(128, 64, 8, 2)),),  # 128 x 128: 284 spills
    "sm_120": (*_SMALL_DQ[:3], Row(4, 64, Tiling(32, 32, 8, 1)), _EXACT_DQ[1]),  # 32 x 16: 8 spills
}
# The families on which a thread of the forward and dq has neighbouring columns of a row. There masks are words of
# bits.
MASKS_OF_BITS = frozenset({"sm_100"})

# Rows of a head that are added up at a time, for the gradients of sinks and scales of heads.
SUM_ROWS = 128


def merge_warps(tiling: Tiling) -> int:
    """Warps of the kernel that merges splits, whose tiles have as many rows. With 64 rows 4 warps would spill on
    sm_90, with 32 rows 8 on sm_100."""
    return 4 if tiling.block_m <= 32 else 8
