"""Launch tables of attention with a cache."""

from __future__ import annotations

from .rows import INTERPRETER, Row, Tiling

# Where each key head has few rows, keys are split over programs at multiples of SPLIT, counted from a row's first
# key. So the order of sums depends on the row alone, not on what else is in the batch. A split writes its result
# in float32 and the merge reads it again: below 3% of the bytes of 512 keys and values of a head of 128.
SPLIT = 512
# The most rows of a key head, queries times query heads that share it, for which keys are split. More rows fill a
# GPU without it.
SPLIT_ROWS = 64

# Up to 16 rows of a key head: bound by memory. Rows by keys. Beside each row, as Triton 3.7.1 compiles it on sm_80
# and sm_90 for a cache in pages of 16 (the worse of both): registers, shared memory. Nothing spills. Not yet
# measured.
CACHE_FEW_ROWS = {
    INTERPRETER: (Row(8, 1024, Tiling(16, 16, 4, 1)),),
    "sm_80": (
        Row(2, 64, Tiling(16, 128, 4, 2)),  # 112, 38 KiB
        Row(2, 128, Tiling(16, 128, 4, 2)),  # 140, 72 KiB; 16 x 64 issues 2.6 times as much for each key
        Row(2, 256, Tiling(16, 64, 4, 2)),  # 212, 75 KiB
        Row(2, 512, Tiling(16, 32, 8, 2)),
        Row(4, 64, Tiling(16, 32, 8, 2)),  # 66, 23 KiB
        Row(4, 128, Tiling(16, 32, 8, 2)),  # 64, 43 KiB; 4 warps: 8 to 388 spills
        Row(4, 256, Tiling(16, 16, 8, 1)),  # 77, 34 KiB
        Row(4, 512, Tiling(16, 16, 8, 1)),
    ),
    # Windows, slopes, soft caps and masks of trees need more registers.
    "shaped": (
        Row(2, 128, Tiling(16, 64, 4, 3)),  # 255, 41 KiB; 2 stages: 10 spills
        Row(2, 256, Tiling(16, 32, 4, 2)),  # 255, 43 KiB; 16 x 64: 138 to 181
        Row(2, 512, Tiling(16, 16, 8, 1)),  # 173, 50 KiB
        Row(4, 512, Tiling(16, 16, 8, 1)),  # 105, 34 KiB; 16 x 32 at D = 128: 4
    ),
}
# More rows, as in a chunk of a prompt.
CACHE_ROWS = {
    INTERPRETER: (Row(8, 1024, Tiling(32, 16, 4, 1)),),
    "sm_80": (
        Row(2, 64, Tiling(64, 64, 4, 2)),  # 255, 41 KiB
        Row(2, 128, Tiling(64, 32, 4, 2)),  # 242, 49 KiB; 64 x 64: 16
        Row(2, 256, Tiling(32, 32, 4, 2)),  # 238, 51 KiB
        Row(2, 512, Tiling(32, 32, 8, 2)),  # 223, 75 KiB for keys of 576 that hold the values
        Row(4, 64, Tiling(32, 32, 8, 1)),  # 72, 21 KiB
        Row(4, 128, Tiling(32, 16, 8, 1)),  # 87, 27 KiB
        Row(4, 256, Tiling(16, 16, 8, 1)),  # 96, 34 KiB
        Row(4, 512, Tiling(16, 16, 8, 1)),
    ),
    "shaped": (
        Row(2, 64, Tiling(32, 64, 4, 2)),  # 255, 29 KiB; 64 x 64: 16
        Row(2, 128, Tiling(32, 32, 4, 2)),  # 255, 29 KiB; 64 x 32: 28 to 257
        Row(2, 256, Tiling(16, 32, 4, 2)),  # 255, 43 KiB; 32 x 32: 18 to 46
        Row(2, 512, Tiling(16, 16, 8, 1)),  # 173, 50 KiB
        Row(4, 512, Tiling(16, 16, 8, 1)),  # 105, 34 KiB
    ),
}
# sm_86 and sm_120, where the rows above would spill.
CACHE_FEW_ROWS |= {
    "sm_120": (
        Row(2, 64, Tiling(16, 128, 4, 2)),
        Row(2, 128, Tiling(16, 64, 4, 2)),  # 16 x 128: 5
        Row(2, 256, Tiling(16, 32, 4, 2)),  # 16 x 64: 2
        *CACHE_FEW_ROWS["sm_80"][3:],
    ),
    "sm_86 shaped": (
        Row(2, 64, Tiling(16, 64, 4, 3)),
        Row(2, 128, Tiling(16, 64, 8, 2)),  # 4 warps: 17
    ),
    "sm_120 shaped": (
        Row(2, 64, Tiling(16, 64, 4, 3)),  # 16 x 32: 5
        Row(2, 128, Tiling(16, 32, 4, 2)),  # 16 x 64: 56
        Row(2, 256, Tiling(16, 16, 4, 2)),  # 16 x 32: 4
    ),
}
CACHE_ROWS["sm_120 shaped"] = (
    Row(2, 64, Tiling(32, 32, 4, 2)),  # 32 x 64: 2
    Row(2, 128, Tiling(32, 32, 4, 2)),
    Row(2, 256, Tiling(16, 16, 8, 1)),  # 16 x 32: 2, 16 x 16 with 4 warps: 6
)
# The same for quantised caches, whose conversion needs registers: as compiled for fp8, and for int8.
QUANTISED_FEW_ROWS = {
    INTERPRETER: CACHE_FEW_ROWS[INTERPRETER],
    # fp8 is converted by its bits.
    "sm_80": (
        Row(2, 64, Tiling(16, 128, 4, 2)),
        Row(2, 128, Tiling(16, 64, 4, 3)),
        Row(2, 256, Tiling(16, 32, 4, 2)),
        Row(2, 512, Tiling(16, 32, 8, 2)),
        Row(4, 64, Tiling(16, 32, 8, 2)),
        Row(4, 512, Tiling(16, 16, 8, 1)),
    ),
    "sm_90": (
        Row(2, 128, Tiling(16, 128, 4, 2)),
        Row(2, 256, Tiling(16, 32, 4, 2)),
        Row(2, 512, Tiling(16, 32, 8, 2)),
        Row(4, 64, Tiling(16, 32, 8, 2)),
        Row(4, 512, Tiling(16, 16, 8, 1)),
    ),
    "shaped": (
        Row(2, 64, Tiling(16, 64, 4, 2)),
        Row(2, 256, Tiling(16, 32, 4, 2)),
        Row(2, 512, Tiling(16, 16, 8, 1)),
        Row(4, 512, Tiling(16, 16, 8, 1)),
    ),
}
QUANTISED_FEW_ROWS |= {
    "sm_100": QUANTISED_FEW_ROWS["sm_90"],
    "sm_86 shaped": (
        Row(2, 64, Tiling(16, 64, 4, 2)),
        Row(2, 128, Tiling(16, 32, 4, 2)),
        Row(2, 256, Tiling(16, 16, 8, 1)),  # 16 x 32: 4 spills
    ),
}
QUANTISED_FEW_ROWS["sm_120"] = (
    Row(2, 64, Tiling(16, 128, 4, 2)),
    Row(2, 128, Tiling(16, 64, 4, 2)),  # 3 stages: 8 spills
    *QUANTISED_FEW_ROWS["sm_80"][2:],
)
QUANTISED_FEW_ROWS["sm_120 shaped"] = (
    Row(2, 64, Tiling(16, 64, 4, 2)),
    Row(2, 256, Tiling(16, 16, 8, 1)),  # 16 x 32: 34 spills at D = 128
)
QUANTISED_ROWS = {
    INTERPRETER: CACHE_ROWS[INTERPRETER],
    "sm_80": (
        Row(2, 64, Tiling(64, 64, 4, 2)),
        Row(2, 128, Tiling(64, 32, 4, 2)),
        Row(2, 256, Tiling(32, 32, 4, 2)),
        Row(2, 512, Tiling(32, 32, 8, 2)),
        Row(4, 64, Tiling(32, 32, 8, 1)),
        Row(4, 128, Tiling(32, 16, 8, 1)),
        Row(4, 512, Tiling(16, 16, 8, 1)),
    ),
    "shaped": (
        Row(2, 64, Tiling(32, 64, 4, 2)),
        Row(2, 128, Tiling(16, 32, 4, 2)),
        Row(2, 512, Tiling(16, 16, 8, 1)),
        Row(4, 512, Tiling(16, 16, 8, 1)),
    ),
}
QUANTISED_ROWS |= {
    "sm_86": (
        Row(2, 64, Tiling(32, 64, 4, 2)),
        Row(2, 128, Tiling(32, 32, 4, 2)),  # 64 x 32: 6 spills
        *QUANTISED_ROWS["sm_80"][2:],
    ),
    "sm_90": (
        # In 2 stages, copies would follow a wait without a barrier.
        Row(2, 64, Tiling(64, 64, 4, 1)),
        Row(2, 128, Tiling(64, 32, 4, 1)),
        *QUANTISED_ROWS["sm_80"][2:],
    ),
    "sm_100": (
        Row(2, 64, Tiling(64, 64, 4, 2)),
        Row(2, 128, Tiling(64, 32, 4, 2)),
        Row(2, 256, Tiling(16, 32, 4, 2)),  # 32 x 32: 5 spills
        Row(2, 512, Tiling(16, 32, 8, 2)),  # 32 x 32: 22
        *QUANTISED_ROWS["sm_80"][4:],
    ),
}
QUANTISED_ROWS |= {
    "sm_120": (
        *QUANTISED_ROWS["sm_86"][:3],
        Row(2, 512, Tiling(16, 32, 8, 2)),  # 32 x 32: 11 spills
        *QUANTISED_ROWS["sm_86"][4:],
    ),
    "sm_120 shaped": (
        Row(2, 64, Tiling(32, 32, 4, 2)),  # 32 x 64: 13 spills
        Row(2, 128, Tiling(16, 16, 8, 1)),
    ),
}
# Tokens that one program writes, and rows that one merges.
CACHE_APPEND = Tiling(16, 16, 4, 1)
