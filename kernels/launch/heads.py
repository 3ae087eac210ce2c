"""Launch tables of what happens to heads before attention."""

from __future__ import annotations

from .rows import INTERPRETER, Row, Tiling

# The preparation of heads is bound by memory. A tiling is rows by heads, which share the rows' angles; 16 elements
# for each thread in tiles of 4,096. Loads and stores of aligned tensors have 16 bytes. Beside each row: registers,
# forward / backward, the most on sm_80 to sm_120 with norm, weight, rotation and scale. Nothing spills; with 4
# warps the same tiles took up to 128 / 188 and spilled 2 on sm_100 at D=256 (Triton 3.7.1). Not yet measured.
HEADS_ELEMENTWISE = {
    INTERPRETER: (Row(4, 512, Tiling(16, 2, 4, 1)),),
    "sm_80": (
        Row(4, 64, Tiling(64, 4, 8, 1)),  # 64 / 110
        Row(4, 128, Tiling(32, 4, 8, 1)),  # 64 / 120
        Row(4, 256, Tiling(16, 4, 8, 1)),  # 64 / 107
        Row(4, 512, Tiling(8, 4, 8, 1)),
    ),
}
