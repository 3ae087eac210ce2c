"""Launch tables of the loss."""

from __future__ import annotations

from .rows import EVERY, INTERPRETER, Row, Tiling

# The tiles of logits, for both kernels: an MLP's product with epilogues of their own. "heavy": an entropy beside
# smoothing or probabilities. Beside each row the most registers of the kernels, of the logits and after a slash of
# their gradients, with bias, weights, cap and all; shared memory. Nothing spills. Compiled by Triton 3.7.1 for
# sm_80 and sm_90, with aligned bf16 or fp32 tensors; the other families' rows are the MLP's; not yet measured.
LOSS = {
    INTERPRETER: (Row(4, EVERY, Tiling(32, 64, 4, 1)),),
    "sm_80": (
        Row(2, EVERY, Tiling(128, 128, 8, 4)),  # 238 / 177, 96 KiB
        Row(4, EVERY, Tiling(64, 64, 4, 2)),  # 164 / 164, 16 KiB; 8 warps: 7 spills on sm_90
    ),
    "sm_80 heavy": (Row(2, EVERY, Tiling(128, 64, 8, 4)),),  # 128 columns: 255 registers, 16 spills
    "sm_86": (
        Row(2, EVERY, Tiling(128, 128, 8, 3)),
        Row(4, EVERY, Tiling(64, 64, 4, 2)),
    ),
    "sm_86 heavy": (Row(2, EVERY, Tiling(128, 64, 8, 3)),),
    "sm_90": (
        Row(2, EVERY, Tiling(128, 128, 8, 3)),  # 173 / 158, 96 KiB
        Row(4, EVERY, Tiling(64, 64, 4, 2)),  # 156 / 128, 16 KiB
    ),
    "sm_120": (
        Row(2, EVERY, Tiling(128, 128, 8, 3)),
        Row(4, EVERY, Tiling(64, 64, 4, 1)),
    ),
    # Probabilities whose rows do not begin at multiples of 16: narrow loads. 128 columns: 2 to 10 with Triton 3.6.
    "unaligned": (Row(2, EVERY, Tiling(128, 64, 8, 3)),),
    "sm_120 heavy": (Row(2, EVERY, Tiling(128, 64, 8, 3)),),
    "gfx942": (
        Row(2, EVERY, Tiling(128, 128, 8, 2)),
        Row(4, EVERY, Tiling(64, 64, 4, 2)),
    ),
}

# The products of a filtered gradient. Rows are as many as the table above has of tokens or of classes, 64 or 128.
KEPT_PRODUCT = {
    INTERPRETER: (Row(4, EVERY, Tiling(32, 32, 4, 1)),),
    "sm_80": (
        Row(2, EVERY, Tiling(128, 128, 8, 3)),
        Row(4, EVERY, Tiling(64, 64, 8, 2)),
    ),
}
