"""Launch tables of MLPs."""

from __future__ import annotations

from .rows import EVERY, INTERPRETER, Row, Tiling

# The MLP. A row's width is the number of elements of the hidden layer (tokens x h). If the next row's tiles would
# not fill every multiprocessor, smaller tiles spread the work better. Beside each row: the most registers of any
# activation, with the gated kernel's after a slash where both use one table; shared memory; and programs on a
# multiprocessor. Nothing spills. Compiled by Triton 3.7.1 from the launchers, with aligned bf16 or fp32 tensors;
# not yet measured. IEEE float32 products use no tensor cores: only registers limit their tiles.
MLP_FORWARD = {
    INTERPRETER: (Row(4, EVERY, Tiling(32, 32, 4, 1)),),
    "sm_80": (
        Row(2, 108 * 128 * 128, Tiling(64, 64, 4, 4)),  # 108 registers, 48 KiB, 3
        Row(2, EVERY, Tiling(128, 128, 8, 4)),  # 139, 96 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 80, 16 KiB, 3
    ),
    "sm_86": (
        Row(2, 84 * 128 * 128, Tiling(64, 64, 4, 3)),  # 108, 32 KiB, 3
        Row(2, EVERY, Tiling(128, 128, 8, 3)),  # 139, 64 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 80, 16 KiB, 3
    ),
    # At full tensor-core rate a 128 x 128 tile reads 64 bytes from the L2 cache in each clock on each
    # multiprocessor, a 128 x 256 tile 43; the cache delivers some 30. Two programs with the smaller tile fit on a
    # multiprocessor, so that the epilogue of one overlaps the products of the other; with the larger tile nothing
    # overlaps the epilogue.
    "sm_90": (
        Row(2, 132 * 128 * 128, Tiling(64, 64, 4, 3)),  # 64, 48 KiB, 4
        Row(2, 264 * 128 * 256, Tiling(128, 128, 8, 3)),  # 119, 96 KiB, 2
        Row(2, EVERY, Tiling(128, 256, 8, 3)),  # 231, 144 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 80, 16 KiB, 3
    ),
    # Accumulators are in tensor memory.
    "sm_100": (
        Row(2, 148 * 128 * 128, Tiling(64, 64, 4, 3)),  # 64, 48 KiB, 4
        Row(2, 296 * 128 * 256, Tiling(128, 128, 8, 3)),  # 66, 96 KiB, 2
        Row(2, EVERY, Tiling(128, 256, 8, 3)),  # 110, 144 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 84, 16 KiB, 2
    ),
    "sm_120": (
        Row(2, 170 * 128 * 128, Tiling(64, 64, 4, 3)),  # 103, 32 KiB, 3
        Row(2, EVERY, Tiling(128, 128, 8, 3)),  # 174, 64 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 1)),  # 80, 16 KiB, 3; 2 stages spill
    ),
    "gfx942": (
        Row(2, 304 * 128 * 128, Tiling(64, 64, 4, 2)),  # 94, 16 KiB
        Row(2, EVERY, Tiling(128, 128, 8, 2)),  # 116, 64 KiB
        Row(4, EVERY, Tiling(64, 64, 4, 2)),  # 96, 16 KiB
    ),
}

# Two accumulators: half the columns where they are in registers (128 x 128 spills on sm_80).
MLP_GATED_FORWARD = {
    INTERPRETER: (Row(4, EVERY, Tiling(32, 32, 4, 1)),),
    "sm_80": (
        Row(2, 108 * 128 * 64, Tiling(64, 64, 4, 4)),  # 142, 72 KiB, 2
        Row(2, EVERY, Tiling(128, 64, 8, 4)),  # 154, 96 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 128, 24 KiB, 2
    ),
    "sm_86": (
        Row(2, 84 * 128 * 64, Tiling(64, 64, 4, 3)),  # 152, 48 KiB, 2
        Row(2, EVERY, Tiling(128, 64, 8, 3)),  # 154, 64 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 128, 24 KiB, 2
    ),
    "sm_90": (
        Row(2, 132 * 128 * 128, Tiling(64, 64, 4, 3)),  # 118, 72 KiB, 3
        Row(2, EVERY, Tiling(128, 128, 8, 3)),  # 191, 144 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 128, 24 KiB, 2
    ),
    "sm_100": (
        Row(2, 148 * 128 * 128, Tiling(64, 64, 4, 3)),  # 127, 72 KiB, 3
        Row(2, EVERY, Tiling(128, 128, 8, 3)),  # 74, 144 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 112, 24 KiB, 2
    ),
    "sm_120": (
        Row(2, 170 * 128 * 64, Tiling(64, 64, 4, 3)),  # 148, 48 KiB, 2
        Row(2, EVERY, Tiling(128, 64, 8, 3)),  # 176, 64 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 1)),  # 232, 16 KiB, 1
    ),
    "gfx942": (
        Row(2, 304 * 128 * 64, Tiling(64, 64, 4, 2)),  # 134, 24 KiB
        Row(2, EVERY, Tiling(128, 128, 8, 2)),  # 168, 64 KiB
        Row(4, EVERY, Tiling(64, 64, 4, 2)),  # 152, 24 KiB
    ),
}

# The gradient of the hidden layer: one accumulator, gated or not, and a longer epilogue.
MLP_BACKWARD = {
    INTERPRETER: (Row(4, EVERY, Tiling(32, 32, 4, 1)),),
    "sm_80": (
        Row(2, 108 * 128 * 128, Tiling(64, 64, 4, 4)),  # 128 / 128, 48 KiB, 3
        Row(2, EVERY, Tiling(128, 128, 8, 4)),  # 161 / 179, 96 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 79 / 77, 16 KiB, 3
    ),
    "sm_86": (
        Row(2, 84 * 128 * 128, Tiling(64, 64, 4, 3)),  # 101 / 104, 32 KiB, 3
        Row(2, EVERY, Tiling(128, 128, 8, 3)),  # 173 / 177, 64 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 80 / 79, 16 KiB, 3
    ),
    "sm_90": (
        Row(2, 132 * 128 * 128, Tiling(64, 64, 4, 3)),  # 72 / 96, 48 KiB, 4
        Row(2, EVERY, Tiling(128, 128, 8, 3)),  # 128 / 178, 96 KiB, 2 / 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 64 / 64, 16 KiB, 4
    ),
    "sm_100": (
        Row(2, 148 * 128 * 128, Tiling(64, 64, 4, 3)),  # 93 / 128, 48 KiB, 4
        Row(2, EVERY, Tiling(128, 128, 8, 3)),  # 82 / 142, 96 KiB, 2 / 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 76 / 78, 16 KiB, 3
    ),
    "sm_120": (
        Row(2, 170 * 128 * 128, Tiling(64, 64, 4, 3)),  # 102 / 103, 32 KiB, 3
        Row(2, EVERY, Tiling(128, 128, 8, 3)),  # 166 / 178, 64 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 1)),  # 80 / 80, 16 KiB, 3
    ),
    "gfx942": (
        Row(2, 304 * 128 * 128, Tiling(64, 64, 4, 2)),  # 104 / 104, 16 KiB
        Row(2, EVERY, Tiling(128, 128, 8, 2)),  # 122 / 122, 64 KiB
        Row(4, EVERY, Tiling(64, 64, 4, 2)),  # 107 / 107, 16 KiB
    ),
}

# The pass over the hidden layer after a library's product is bound by memory: whole 128-byte lines, and few
# registers, so that many programs run at a time. Registers on any family: forward 48, backward 80, gated backward
# 126 at most.
MLP_ELEMENTWISE = {
    INTERPRETER: (Row(4, EVERY, Tiling(32, 32, 4, 1)),),
    "sm_80": (Row(4, EVERY, Tiling(64, 64, 8, 1)),),
}

# The same pass where it quantises: a tile is as wide as a block of numbers with one scale, 128.
MLP_QUANTISE = {
    INTERPRETER: (Row(4, EVERY, Tiling(16, 128, 4, 1)),),
    "sm_80": (Row(4, EVERY, Tiling(32, 128, 8, 1)),),
}

# Up to which summed width d our product with its epilogue is used, rather than the library's product and that
# pass, by bytes per element; without an entry never. The pass moves 4 bytes for each hidden element, the product
# takes 2 d flop. With R flop/s and B bytes/s, our product may be 2 R / (B d) slower than the library's: 350 / d
# percent on an H200 (700 TFLOP/s, 4 TB/s), 260 / d on an A100. On sm_80, sm_86 and sm_120, where the library has
# no instructions that a kernel with pointers lacks, ours is assumed to be within 7 percent of it; on sm_90 (no
# TMA, no specialised warps) within 17, on sm_100 and gfx942 within 35 and 20: assumptions, to be replaced by
# measurements. In float32 without tensor cores the pass costs only 60 / d percent, less than ours would lose.
MLP_FUSED_UP_TO = {
    INTERPRETER: {2: EVERY, 4: EVERY},
    "sm_80": {2: 4096},
    "sm_90": {2: 2048},
    "sm_100": {2: 1024},
    "gfx942": {2: 1024},
}

# The same of the hidden layer's gradient, where that is less. Measured on an H200 with 16384 tokens of width 1024:
# the backward took 1.06 of the time of eager PyTorch's, that of a gated MLP 1.19 of compiled eager's, where the
# forward took 0.96 and 0.99 (benchmarks/results). Of width 512 it saves at most twice as much as of 1024: assumed.
MLP_GRADIENT_FUSED_UP_TO = {"sm_90": {2: 512}}
