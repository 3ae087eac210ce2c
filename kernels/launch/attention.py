"""Launch tables of attention."""

from __future__ import annotations

from .rows import INTERPRETER, Row, Tiling

# Odd tiles of unequal sides, so that short sequences reach every loop.
_INTERPRETED = {
    "forward": (Row(8, 1024, Tiling(32, 16, 4, 1, values=256)),),
    "dkdv": (Row(8, 512, Tiling(16, 32, 4, 1)),),
    "dq": (Row(8, 512, Tiling(32, 16, 4, 1)),),
    "bias": (Row(8, 512, Tiling(32, 32, 4, 1)),),
    "tangent": (Row(8, 512, Tiling(32, 16, 4, 1)),),
    "statistics": (Row(8, 512, Tiling(32, 16, 4, 1)),),
}

# The families on which the forward and dq visit masked keys before the others. If the masked loop came second on
# sm_90, ptxas would make every asynchronous product of the kernel wait for the one before (its note C7515).
# Elsewhere the other order takes fewer registers. Where masked keys come first, bounds are compared with keys
# counted from the tile's start. That is also better in dq of plain scores on sm_100 (issue / tensor of the masked
# loop at D = 128: 1.23 -> 1.05), but not in the forward there, nor with shaped scores at D = 256, which would
# spill.
MASKED_FIRST = frozenset({"sm_90", INTERPRETER})
PLAIN_DQ_RELATIVE = MASKED_FIRST | {"sm_100"}

# float32 products are exact: fused multiply-adds, no tensor cores. Registers and shared memory limit their tiles.
_EXACT = {
    "forward": (
        Row(4, 64, Tiling(64, 32, 8, 2)),
        Row(4, 128, Tiling(32, 16, 8, 2)),
        Row(4, 256, Tiling(32, 16, 8, 1)),
        Row(4, 512, Tiling(32, 16, 8, 1)),
    ),
    "dkdv": (
        Row(4, 64, Tiling(32, 32, 4, 1)),
        Row(4, 128, Tiling(16, 32, 8, 1)),
        Row(4, 256, Tiling(16, 16, 8, 1)),
        Row(4, 512, Tiling(16, 16, 8, 1)),
    ),
    "dq": (
        Row(4, 64, Tiling(32, 32, 4, 1)),
        Row(4, 128, Tiling(16, 16, 8, 1)),
        Row(4, 256, Tiling(16, 16, 8, 1)),
        Row(4, 512, Tiling(16, 16, 8, 1)),
    ),
    "tangent": (
        Row(4, 64, Tiling(32, 16, 8, 1)),  # 255 registers, 24 KiB, 1
        Row(4, 128, Tiling(16, 16, 8, 1)),  # 252 registers, 26 KiB, 1
        # D = 256: 278 spills, 16 warps: 1034
    ),
}

# Beside each row, as Triton 3.7.1 compiles it for bf16 of exactly that width (causal or not, whichever is worse):
# registers of a thread, shared memory, programs on a multiprocessor; then issue cycles over tensor-core cycles of
# the loop over full tiles and of that over the causal diagonal. Nothing spills unless noted. Not yet measured. The
# pass that computes delta from out and its gradient is bound by memory.
_DELTA = Row(4, 128, Tiling(64, 64, 8, 3))  # D = 256: 2 spills with Triton 3.6
_WIDE_DELTA = Row(4, 512, Tiling(32, 64, 8, 3))
ATTENTION_DELTA = {
    **{name: (_DELTA, Row(4, 256, Tiling(32, 64, 4, 3)), _WIDE_DELTA) for name in ("sm_80", "sm_100")},
    INTERPRETER: (_DELTA._replace(width=512),),
    **{name: (_DELTA, _WIDE_DELTA) for name in ("sm_86", "sm_90", "sm_120", "gfx942")},
}

ATTENTION_FORWARD = {
    INTERPRETER: _INTERPRETED["forward"],
    "sm_80": (
        Row(2, 64, Tiling(128, 128, 8, 3)),  # 205 registers, 80 KiB, 1; 0.61, 0.80
        Row(2, 128, Tiling(128, 64, 8, 3)),  # 216 registers, 96 KiB, 1; 0.52, 0.61
        Row(2, 256, Tiling(64, 64, 8, 2)),  # 255 registers, 104 KiB, 1; 0.60, 0.67
        Row(2, 512, Tiling(32, 32, 8, 2)),
        *_EXACT["forward"],
    ),
    "sm_86": (
        Row(2, 64, Tiling(128, 64, 8, 3)),  # 199 registers, 48 KiB, 1; 0.35, 0.44
        Row(2, 128, Tiling(128, 64, 8, 3)),  # 220 registers, 96 KiB, 1; 0.26, 0.31
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 168 registers, 34 KiB, 2; 0.39, 0.47
        Row(2, 512, Tiling(32, 32, 8, 2)),
        _EXACT["forward"][0],
        Row(4, 128, Tiling(32, 16, 8, 1)),  # 2 stages: 10 spills
        *_EXACT["forward"][2:],
    ),
    "sm_90": (
        Row(2, 64, Tiling(128, 64, 8, 3, ahead=True)),  # 216 registers, 72 KiB, 1; 1.25, 1.57
        Row(2, 128, Tiling(128, 64, 8, 3, ahead=True)),  # 254 registers, 144 KiB, 1; 0.73, 0.88
        Row(2, 256, Tiling(128, 64, 8, 2)),  # 255 registers, 192 KiB, 1; 0.50, 0.61
        Row(2, 512, Tiling(128, 32, 8, 2, values=256)),
        *_EXACT["forward"],
    ),
    "sm_100": (
        Row(2, 64, Tiling(128, 128, 8, 3)),  # 240 registers, 113 KiB, 1; 1.88, 3.52
        Row(2, 128, Tiling(128, 128, 8, 2)),  # 246 registers, 161 KiB, 1; 1.06, 2.00
        Row(2, 256, Tiling(128, 64, 8, 2)),  # 254 registers, 193 KiB, 1; 1.00, 1.36
        Row(2, 512, Tiling(128, 32, 8, 2, values=256)),
        *_EXACT["forward"],
    ),
    "sm_120": (
        Row(2, 64, Tiling(128, 64, 8, 3)),  # 170 registers, 48 KiB, 1; 0.34, 0.43
        Row(2, 128, Tiling(128, 64, 8, 3)),  # 219 registers, 96 KiB, 1; 0.24, 0.31
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 189 registers, 34 KiB, 2; 0.39, 0.46
        Row(2, 512, Tiling(32, 32, 8, 2)),
        *_EXACT["forward"],
    ),
    "gfx942": (
        Row(2, 64, Tiling(128, 64, 4, 1)),  # 199 registers, 16 KiB, 2
        Row(2, 128, Tiling(128, 32, 4, 1)),  # 202 registers, 32 KiB, 2
        Row(2, 256, Tiling(64, 32, 4, 1)),  # 261 registers, 32 KiB, 1
        Row(2, 512, Tiling(32, 16, 4, 1)),
        *_EXACT["forward"][:3],
        Row(4, 512, Tiling(16, 16, 4, 1)),  # 392 registers; 8 warps: 129 spills
    ),
}

ATTENTION_DKDV = {
    INTERPRETER: _INTERPRETED["dkdv"],
    "sm_80": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 255 registers, 48 KiB, 1; 0.44, 0.52
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 177 registers, 72 KiB, 1; 0.42, 0.48
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 232 registers, 128 KiB, 1; 0.41, 0.47
        Row(2, 512, Tiling(16, 32, 8, 2)),
        *_EXACT["dkdv"],
    ),
    "sm_86": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 252 registers, 48 KiB, 1; 0.22, 0.26
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 178 registers, 72 KiB, 1; 0.21, 0.24
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 255 registers, 80 KiB, 1; 0.20, 0.25
        Row(2, 512, Tiling(16, 32, 8, 2)),
        *_EXACT["dkdv"][:3],
        Row(4, 512, Tiling(16, 8, 8, 1)),  # 96 KiB; 16 x 16: 128
    ),
    "sm_90": (
        Row(2, 64, Tiling(64, 128, 8, 2, ahead=True)),  # 237 registers, 64 KiB, 1; 0.63, 0.78
        Row(2, 128, Tiling(64, 128, 8, 2)),  # 255 registers, 128 KiB, 1; 0.37, 0.46; ahead: 2 spills
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 207 registers, 128 KiB, 1; 0.82, 1.01
        Row(2, 512, Tiling(16, 32, 8, 2)),
        *_EXACT["dkdv"],
    ),
    "sm_100": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 178 registers, 81 KiB, 1; 1.42, 1.87
        Row(2, 128, Tiling(64, 128, 8, 2)),  # 220 registers, 161 KiB, 1; 0.82, 0.98
        Row(2, 256, Tiling(64, 64, 8, 1)),  # 237 registers, 128 KiB, 1; 1.16, 1.41
        Row(2, 512, Tiling(16, 32, 8, 2)),
        *_EXACT["dkdv"],
    ),
    "sm_120": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 250 registers, 48 KiB, 1; 0.22, 0.26
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 174 registers, 72 KiB, 1; 0.20, 0.23
        Row(2, 256, Tiling(32, 32, 8, 2)),  # 158 registers, 66 KiB, 1; 4 warps: 4 spills
        Row(2, 512, Tiling(16, 32, 8, 2)),
        *_EXACT["dkdv"][:3],
        Row(4, 512, Tiling(16, 8, 8, 1)),  # 96 KiB; 16 x 16: 128
    ),
    "gfx942": (
        Row(2, 64, Tiling(64, 64, 4, 1)),  # 244 registers, 8 KiB, 2
        Row(2, 128, Tiling(32, 32, 4, 1)),  # 248 registers, 8 KiB, 2
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 430 registers, 16 KiB, 1
        Row(2, 512, Tiling(16, 16, 4, 1)),
        *_EXACT["dkdv"][:2],
        Row(4, 256, Tiling(16, 16, 4, 1)),  # 339 registers, 16 KiB, 1
        Row(4, 512, Tiling(16, 16, 4, 1)),  # 298 spills
    ),
}

ATTENTION_DQ = {
    INTERPRETER: _INTERPRETED["dq"],
    "sm_80": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 238 registers, 48 KiB, 1; 0.43, 0.54
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 199 registers, 80 KiB, 1; 0.35, 0.42
        Row(2, 256, Tiling(64, 64, 8, 1)),  # 239 registers, 128 KiB, 1; 0.34, 0.40
        Row(2, 512, Tiling(32, 32, 8, 2)),
        *_EXACT["dq"],
    ),
    "sm_86": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 238 registers, 48 KiB, 1; 0.21, 0.27
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 198 registers, 80 KiB, 1; 0.18, 0.23
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 202 registers, 64 KiB, 1; 0.22, 0.27
        Row(2, 512, Tiling(32, 16, 8, 2)),
        *_EXACT["dq"][:3],
        Row(4, 512, Tiling(8, 16, 8, 1)),  # 96 KiB; 16 x 16: 128
    ),
    "sm_90": (
        Row(2, 64, Tiling(128, 128, 8, 2)),  # 249 registers, 96 KiB, 1; 0.57, 0.87
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 221 registers, 128 KiB, 1; 0.42, 0.55
        Row(2, 256, Tiling(128, 32, 8, 2)),  # 244 registers, 192 KiB, 1; 0.42, 0.52
        Row(2, 512, Tiling(32, 64, 8, 2)),
        *_EXACT["dq"],
    ),
    "sm_100": (
        Row(2, 64, Tiling(128, 128, 8, 2)),  # 238 registers, 113 KiB, 1; 1.10, 1.47
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 148 registers, 145 KiB, 1; 0.86, 1.05
        Row(2, 256, Tiling(128, 64, 8, 1)),  # 244 registers, 192 KiB, 1; 0.66, 0.83
        Row(2, 512, Tiling(32, 64, 8, 2)),
        *_EXACT["dq"],
    ),
    "sm_120": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 226 registers, 48 KiB, 1; 0.21, 0.27
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 196 registers, 80 KiB, 1; 0.17, 0.21
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 208 registers, 64 KiB, 1; 0.21, 0.24
        Row(2, 512, Tiling(32, 16, 8, 2)),
        *_EXACT["dq"][:3],
        Row(4, 512, Tiling(8, 16, 8, 1)),  # 96 KiB; 16 x 16: 128
    ),
    "gfx942": (
        Row(2, 64, Tiling(128, 32, 4, 1)),  # 166 registers, 16 KiB, 3
        Row(2, 128, Tiling(64, 32, 4, 1)),  # 214 registers, 16 KiB, 2
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 374 registers, 16 KiB, 1
        Row(2, 512, Tiling(16, 16, 4, 1)),
        *_EXACT["dq"][:2],
        Row(4, 256, Tiling(16, 16, 4, 1)),  # 327 registers, 16 KiB, 1
        Row(4, 512, Tiling(16, 16, 4, 1)),  # 208 spills
    ),
}


# ---- attention with shaped scores ---- A window's left side, a soft cap or slopes need more registers. These rows
# come before those above, which would spill with any of them, or with all (compile report, Triton 3.7.1). Rows
# that would not are repeated here.
ATTENTION_FORWARD |= {
    "sm_80 shaped": (
        Row(2, 64, Tiling(128, 64, 8, 3)),  # 128 x 128: 4 spills
        Row(2, 128, Tiling(64, 64, 4, 3)),  # 128 x 64: 4 to 31
    ),
    "sm_90 shaped": (
        Row(2, 64, Tiling(128, 128, 8, 3)),
        Row(2, 128, Tiling(128, 64, 8, 3)),  # 128 x 128: 2 to 10
        Row(2, 256, Tiling(128, 16, 8, 2)),  # 128 x 64: 2 to 6, 128 x 32: 4
    ),
    "sm_100 shaped": (
        Row(2, 128, Tiling(128, 128, 8, 2)),
        Row(2, 256, Tiling(128, 32, 8, 2)),  # 128 x 64: 70
    ),
}
ATTENTION_DKDV |= {
    "sm_80 shaped": (Row(2, 64, Tiling(32, 128, 8, 2)),),  # 64 x 128: 2 with all, 64 x 64: 4
    "sm_80 intervals": (Row(2, 64, Tiling(64, 128, 8, 2)),),
    "sm_90 shaped": (
        Row(2, 64, Tiling(64, 128, 8, 2)),
        Row(2, 128, Tiling(32, 64, 8, 2)),  # 64 x 128: 2 to 7, 64 x 64: 4
    ),
    "sm_100 shaped": (
        Row(2, 128, Tiling(64, 128, 8, 2)),
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 64 x 64: 4 to 70
    ),
}
ATTENTION_DQ |= {
    "sm_90 shaped": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 128 x 128: 2
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 128 x 64: 10
    ),
    "sm_100 shaped": (Row(2, 64, Tiling(64, 128, 8, 2)),),  # 128 x 128: 15 to 154, 128 x 64: 4
}

# Intervals need registers for two bounds of each row.
ATTENTION_FORWARD["sm_80 intervals"] = (
    *ATTENTION_FORWARD["sm_80 shaped"],
    Row(2, 256, Tiling(64, 32, 8, 2)),  # 64 x 64: 2
)
ATTENTION_DQ["sm_100 intervals"] = (
    *ATTENTION_DQ["sm_100 shaped"],
    Row(2, 128, Tiling(128, 64, 8, 2)),
    Row(2, 256, Tiling(128, 32, 8, 1)),  # 128 x 64: 27
)

# A bias needs a pointer for each score, and dropout computes its random numbers in registers: even smaller tiles.
ATTENTION_FORWARD |= {
    "sm_80 heavy": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(64, 32, 4, 2)),  # 64 x 64: 256 bytes of stack
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 64 x 64: 8
        Row(4, 64, Tiling(32, 32, 4, 2)),  # 64 x 32: 4
    ),
    "sm_90 heavy": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 64 x 64: 360
    ),
    "sm_100 heavy": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(64, 32, 8, 2)),  # 128 x 64: 856, 128 x 32: 38 spills
        Row(2, 256, Tiling(64, 32, 8, 2)),  # 128 x 32: 376, 128 x 16: 15
    ),
}
ATTENTION_DKDV |= {
    "sm_80 heavy": (
        Row(2, 128, Tiling(64, 32, 8, 2)),  # D = 64: 64 x 128 245 to 477, 64 x 64 190 to 368; D = 128: 64 x 64 9
    ),
    "sm_90 heavy": (
        Row(2, 64, Tiling(64, 64, 8, 2)),  # 64 x 128: 6
        Row(4, 64, Tiling(16, 32, 4, 1)),  # 32 x 32: 7
    ),
    "sm_100 heavy": (
        Row(2, 64, Tiling(64, 128, 8, 2)),
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 64 x 128: 30
        Row(2, 256, Tiling(32, 32, 8, 1)),  # 64 x 32: 2
    ),
}
ATTENTION_DQ |= {
    "sm_80 heavy": (
        Row(2, 64, Tiling(128, 32, 8, 2)),  # 128 x 64: 6, 64 x 64: 8
        Row(2, 128, Tiling(64, 32, 4, 2)),  # 128 x 32: 6
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 64 x 64: 6
    ),
    "sm_90 heavy": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(128, 32, 8, 2)),
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 128 x 32: 8 bytes of stack, 128 x 16: 208
    ),
    "sm_100 heavy": (
        Row(2, 128, Tiling(64, 128, 8, 2)),  # D = 128: 128 x 64 45
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 128 x 64: 230 to 271
    ),
}

# Block lists, where the rows above, cut to granules, would spill.
ATTENTION_FORWARD |= {
    "sm_100 listed": (
        Row(2, 64, Tiling(64, 64, 4, 3)),  # 2 stages: 4
        Row(2, 128, Tiling(64, 64, 4, 2)),
        Row(2, 256, Tiling(64, 32, 8, 2)),  # 4 warps: 17
    ),
}
ATTENTION_DKDV |= {
    "sm_80 listed": (Row(2, 64, Tiling(64, 32, 8, 2)),),  # 64 x 64: 11 to 17
    "sm_90 listed": (
        *ATTENTION_DKDV["sm_90 shaped"],
        Row(4, 64, Tiling(32, 32, 4, 1)),
        Row(4, 128, Tiling(16, 16, 8, 1)),  # 16 x 32: 4
    ),
    "sm_100 listed": (*ATTENTION_DKDV["sm_100 shaped"], Row(4, 64, Tiling(16, 32, 4, 1))),  # 32 x 32: 11
}
ATTENTION_DQ |= {
    "sm_80 listed": (Row(2, 64, Tiling(64, 32, 4, 2)),),  # 64 x 64: 7
    "sm_90 listed": (
        *ATTENTION_DQ["sm_90 shaped"],
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 64 x 32: 38
    ),
    "sm_100 listed": (
        Row(2, 64, Tiling(64, 64, 8, 2)),
        Row(2, 128, Tiling(64, 64, 4, 2)),
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 64 x 64: 245
    ),
}

# sm_86 and sm_120: 99 KiB of shared memory limit these tiles before registers do. Where sm_120 has no rows of its
# own, it uses sm_86's.
ATTENTION_FORWARD |= {
    "sm_86 shaped": (
        Row(2, 64, Tiling(128, 64, 8, 3)),
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 3 stages: 8 to 11 spills
    ),
    "sm_86 intervals": (
        Row(2, 64, Tiling(128, 64, 8, 3)),
        Row(2, 128, Tiling(64, 64, 4, 3)),  # 128 x 64: 26
    ),
    "sm_86 heavy": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 3 stages: 112 KiB
        # 128 x 64: 128 KiB with 3 stages, 203 spills with 2; 64 x 64: 3, 64 x 32: 2 with a relative bias.
        Row(2, 128, Tiling(32, 32, 4, 2)),
        Row(4, 64, Tiling(32, 32, 4, 2)),  # 64 x 32: 4
    ),
    "sm_86 listed": (
        Row(2, 64, Tiling(64, 64, 4, 3)),
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 4 warps: 13
        Row(4, 64, Tiling(32, 32, 4, 2)),  # 64 x 32: 6
    ),
}
ATTENTION_DKDV["sm_86 shaped"] = (
    Row(2, 64, Tiling(64, 128, 8, 2)),
    Row(2, 128, Tiling(64, 64, 8, 2)),
    Row(2, 256, Tiling(32, 32, 8, 2)),  # 4 warps: 5
)
ATTENTION_DKDV["sm_86 heavy"] = (
    Row(2, 128, Tiling(64, 32, 8, 2)),  # D = 64: 64 x 128 228, 64 x 64 217; D = 128: 64 x 64 4
    Row(2, 256, Tiling(32, 32, 8, 2)),  # 4 warps: 9
)
ATTENTION_DQ |= {
    "sm_86 heavy": (Row(2, 128, Tiling(128, 32, 8, 2)),),  # D = 64: 128 x 64 36
    "sm_86 listed": (Row(2, 64, Tiling(64, 64, 8, 2)),),  # 4 warps: 5
}
for _table in (ATTENTION_FORWARD, ATTENTION_DKDV, ATTENTION_DQ):
    _table |= {key.replace("86", "120"): rows for key, rows in _table.items() if key.startswith("sm_86 ")}
ATTENTION_FORWARD |= {
    "sm_120 heavy": (
        Row(2, 64, Tiling(64, 64, 8, 2)),  # 128 x 64: 5
        Row(2, 128, Tiling(32, 32, 4, 2)),  # 64 x 64: 11, 64 x 32: 4
    ),
    "sm_120 intervals": (
        Row(2, 64, Tiling(128, 64, 8, 3)),
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 4 warps: 53
    ),
    "sm_120 listed": (Row(2, 128, Tiling(64, 64, 8, 2)),),  # D = 64, 4 warps: 24
}
ATTENTION_DKDV["sm_120 shaped"] = (Row(2, 64, Tiling(64, 32, 8, 2)),)  # 64 x 128: 9
ATTENTION_DQ["sm_120 heavy"] = (
    Row(2, 64, Tiling(128, 32, 8, 2)),
    Row(2, 128, Tiling(64, 64, 8, 2)),  # 128 x 32: 14
)

# Kinds of heads wider than 256. With 99 KiB, a relative bias fits beside smaller tiles only.
_SMALL = ("sm_86", "sm_120")
ATTENTION_FORWARD |= {
    **{f"{name} wide heavy": (Row(2, 512, Tiling(32, 16, 8, 2)),) for name in _SMALL},  # 32 x 32: 100 to 102 KiB
    "sm_90 wide heavy": (Row(2, 512, Tiling(128, 16, 8, 2, values=256)),),  # 128 x 32: 67 spills
    "sm_100 wide shaped": (Row(2, 512, Tiling(128, 16, 8, 2, values=256)),),  # 128 x 32: 37
    "sm_100 wide intervals": (Row(2, 512, Tiling(128, 32, 8, 2, values=256)),),
    "sm_100 wide heavy": (Row(2, 512, Tiling(64, 32, 8, 2, values=256)),),  # 128 x 32: 48 to 578, 128 x 16: 74
    "sm_100 wide listed": (Row(2, 512, Tiling(32, 64, 8, 1)),),  # in two passes 64 x 32 with 4 warps: 42
    # In one pass: two of 64 x 32 spill 62, of 64 x 16 2. 2 stages: 7.
    "sm_90 wide listed": (Row(2, 512, Tiling(32, 64, 8, 1)),),
}
ATTENTION_DKDV |= {
    **{f"{name} wide heavy": (Row(2, 512, Tiling(16, 16, 8, 2)),) for name in _SMALL},  # 16 x 32: 99.2 KiB
}
ATTENTION_DQ |= {
    "sm_80 wide heavy": (Row(2, 512, Tiling(32, 32, 8, 2)), Row(4, 512, Tiling(8, 16, 8, 1))),  # 16 x 16: 2
    # 32 x 64: 4 to 44
    **{f"{name} wide shaped": (Row(2, 512, Tiling(32, 32, 8, 2)),) for name in ("sm_90", "sm_100")},
    "sm_90 wide intervals": (Row(2, 512, Tiling(32, 64, 8, 2)),),
    "sm_90 wide listed": (Row(2, 512, Tiling(32, 64, 8, 2)),),
}

# Gradients of biases: square tiles, two products, and a sum in registers.
_BIAS_EXACT = (Row(4, 64, Tiling(32, 32, 4, 1)), Row(4, 512, Tiling(16, 16, 4, 1)))
ATTENTION_BIAS = {
    INTERPRETER: _INTERPRETED["bias"],
    "sm_80": (
        Row(2, 128, Tiling(32, 32, 4, 1)),  # 64 x 64: 8 to 384 bytes of stack
        Row(2, 256, Tiling(16, 16, 4, 1)),  # 32 x 32: 8 to 360
        Row(2, 512, Tiling(32, 32, 8, 1)),
        *_BIAS_EXACT,
    ),
    "sm_90": (
        Row(2, 64, Tiling(64, 64, 4, 2)),
        Row(2, 128, Tiling(64, 64, 8, 1)),
        Row(2, 256, Tiling(16, 16, 4, 1)),  # 32 x 32: 296
        Row(2, 512, Tiling(64, 64, 8, 1)),  # 32 x 32: 25
        *_BIAS_EXACT,
    ),
}
ATTENTION_BIAS |= {
    "sm_86": (
        Row(2, 128, Tiling(32, 32, 4, 1)),
        Row(2, 512, Tiling(16, 16, 4, 1)),  # 32 x 32 at D = 512: 16 with a relative bias
        *_BIAS_EXACT,
    ),
    "sm_100": ATTENTION_BIAS["sm_90"],
    "sm_100 listed": (
        Row(2, 64, Tiling(64, 64, 4, 2)),
        Row(2, 128, Tiling(32, 32, 4, 2)),  # 64 x 64: 6 in a lag profile
    ),
    "sm_120": (
        Row(2, 128, Tiling(32, 32, 4, 1)),
        Row(2, 256, Tiling(16, 16, 4, 2)),  # 1 stage: 4 in a lag profile
        Row(2, 512, Tiling(32, 32, 8, 1)),
        Row(4, 64, Tiling(32, 32, 4, 1)),
        Row(4, 512, Tiling(16, 16, 8, 1)),  # 4 warps: 2 in a lag profile
    ),
}

# float32 on tensor cores: fragments of 32 bits, and for tf32x3 those of three products.
ATTENTION_FORWARD |= {
    "tf32": (Row(4, 64, Tiling(64, 32, 4, 2)), Row(4, 256, Tiling(32, 16, 4, 1))),
    "tf32x3": (Row(4, 64, Tiling(32, 32, 4, 1)), Row(4, 128, Tiling(16, 16, 4, 1))),  # 64 x 32, 32 x 16: 6 to 14
    "sm_90 tf32x3": (Row(4, 64, Tiling(64, 16, 4, 1)),),  # 32 x 32: 6
}
ATTENTION_DKDV |= {
    "tf32": (Row(4, 64, Tiling(32, 32, 4, 1)), Row(4, 256, Tiling(16, 16, 4, 1))),
    # Still 2 spills at D = 128; 16 x 16 with 4 warps: 19, with 8: 8 to 16, 16 x 32: 42.
    "sm_120 tf32x3": (Row(4, 64, Tiling(32, 32, 4, 1)), Row(4, 128, Tiling(32, 16, 8, 1))),
}
ATTENTION_DQ |= {
    "tf32": (Row(4, 64, Tiling(32, 32, 4, 1)), Row(4, 256, Tiling(16, 16, 4, 1))),
    "tf32x3": (Row(4, 64, Tiling(32, 16, 4, 1)),),  # 32 x 32: 16
    # Still 2 spills at D = 128; 16 x 16 with 4 warps: 9, with 8 twice the instructions.
    "sm_120 tf32x3": (Row(4, 64, Tiling(32, 16, 4, 1)), Row(4, 128, Tiling(16, 32, 8, 1))),
}

# Forward mode: the forward's loops, with five products instead of two, and twice as many tiles in registers.
ATTENTION_TANGENT = {
    INTERPRETER: _INTERPRETED["tangent"],
    "sm_80": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 233 registers, 64 KiB, 1; 0.38, 0.46
        Row(2, 128, Tiling(64, 32, 4, 2)),  # 243 registers, 68 KiB, 2; 0.40, 0.45
        Row(2, 256, Tiling(64, 16, 8, 2)),  # 255 registers, 98 KiB, 1; 0.98, 1.06
        Row(2, 512, Tiling(16, 32, 8, 2)),
        *_EXACT["tangent"],
    ),
    "sm_90": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 237 registers, 96 KiB, 1; 0.71, 0.58
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 247 registers, 128 KiB, 1; 0.55, 0.48
        Row(2, 256, Tiling(32, 16, 8, 2)),  # 164 registers, 65 KiB, 1; 2.40, 2.15; 64 x 16: 184 spills
        Row(2, 512, Tiling(16, 32, 8, 2)),
        *_EXACT["tangent"],
    ),
    "sm_100": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 234 registers, 97 KiB, 1; 1.49, 1.84
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 214 registers, 129 KiB, 1; 1.39, 1.55
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 225 registers, 80 KiB, 1; 1.48, 1.78
        Row(2, 512, Tiling(16, 32, 8, 2)),
        *_EXACT["tangent"],
    ),
    "sm_120": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(64, 32, 4, 2)),
        Row(2, 256, Tiling(32, 16, 8, 2)),  # 64 x 16: 12
        Row(2, 512, Tiling(16, 16, 8, 2)),
        Row(4, 64, Tiling(32, 16, 8, 1)),
        Row(4, 128, Tiling(16, 16, 8, 2)),  # 1 stage: 6
    ),
    "sm_100 listed": (Row(2, 128, Tiling(64, 32, 8, 2)),),  # 32 x 16: 2
    "sm_120 shaped": (Row(2, 64, Tiling(64, 16, 8, 2)), Row(2, 128, Tiling(64, 32, 8, 2))),  # 32 x 16: 7 to 8
    # With everything at once: window, soft cap, slopes, biases and their tangents, sinks, lengths and dropout.
    "shaped": (
        Row(2, 64, Tiling(64, 16, 8, 2)),  # 64 x 32: 4 to 146 spills
        Row(2, 128, Tiling(32, 16, 8, 2)),  # 64 x 16: 4 to 81
        Row(2, 512, Tiling(16, 16, 8, 2)),  # 32 x 16 at D = 256: 55 to 140; 16 x 32 at D = 512: 2
    ),
}
# Tiles as wide as 512 where 16 x 32, which takes 161 KiB, does not fit. On sm_86 64 x 16 spills 2 at D = 256.
ATTENTION_TANGENT |= {
    name: tuple(row._replace(tiling=own.get(row[:2], row.tiling)) for row in ATTENTION_TANGENT["sm_80"])
    for name, own in (
        ("sm_86", {(2, 256): Tiling(32, 16, 8, 2), (2, 512): Tiling(16, 16, 8, 2)}),
        ("gfx942", {(2, 512): Tiling(16, 16, 4, 1)}),
    )
}
# Padded tiles, as of D = 80: 64 x 32 with 4 warps spills 2 to 7 with Triton 3.6.0, with 8 warps 4;
# on sm_120 5 with 3.7.1.
ATTENTION_TANGENT |= {
    f"{name} plain uneven": (Row(2, 64, Tiling(128, 64, 8, 2)), Row(2, 128, Tiling(32, 32, 4, 2)))
    for name in ("sm_80", "sm_86", "sm_120")
}
ATTENTION_TANGENT["gfx942 wide shaped"] = (Row(2, 512, Tiling(16, 16, 4, 1)),)  # 10 spills, 8 warps: 109

# One product, and sums over its tile by query or by key. Where a thumbnail is asked for, its product in float32
# takes most of the registers.
_STATISTICS_EXACT = (
    Row(4, 64, Tiling(32, 32, 4, 1)),
    Row(4, 128, Tiling(32, 16, 8, 1)),
    Row(4, 256, Tiling(16, 16, 8, 2)),  # 1 stage: 8 on sm_90, 32 x 16: 3 on sm_86
    Row(4, 512, Tiling(16, 16, 4, 1)),  # 8 warps: 5 on sm_80
)
_STATISTICS_HEAVY = (Row(2, 128, Tiling(32, 32, 8, 1)),)  # 64 x 32: 79 to 122 spills on sm_90
ATTENTION_STATISTICS = {
    INTERPRETER: _INTERPRETED["statistics"],
    "sm_80": (
        Row(2, 128, Tiling(64, 64, 8, 2)),
        Row(2, 256, Tiling(32, 32, 4, 1)),
        Row(2, 512, Tiling(32, 16, 4, 1)),  # 32 x 32: 129 to 315 spills
        *_STATISTICS_EXACT,
    ),
    "sm_100": (
        Row(2, 128, Tiling(32, 32, 8, 1)),  # 64 x 64: 357 to 381
        Row(2, 256, Tiling(32, 32, 4, 1)),
        Row(2, 512, Tiling(32, 16, 4, 1)),  # 32 x 32: 129 to 315 spills
        *_STATISTICS_EXACT[:2],
        Row(4, 256, Tiling(16, 16, 8, 1)),  # 2 stages: 11
        Row(4, 512, Tiling(16, 16, 4, 1)),
    ),
    "sm_80 intervals": (Row(2, 64, Tiling(32, 32, 8, 1)),),  # 64 x 32: 4
    "sm_80 shaped": (Row(2, 128, Tiling(64, 32, 8, 2)),),  # 1 stage: 12
    "sm_100 shaped": (
        Row(2, 128, Tiling(64, 32, 8, 1)),
        Row(2, 256, Tiling(32, 16, 4, 2)),  # 1 stage: 2 to 4
    ),
    **{f"{name} heavy": _STATISTICS_HEAVY for name in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")},
    "shaped": (
        Row(2, 128, Tiling(64, 32, 8, 1)),
        Row(2, 256, Tiling(32, 16, 4, 1)),
        Row(2, 512, Tiling(32, 16, 8, 2)),  # 4 warps: 3 to 5
    ),
    "sm_100 wide shaped": (Row(2, 512, Tiling(16, 16, 8, 1)),),  # 32 x 16: 5 and 11
    "tf32": (Row(4, 128, Tiling(32, 16, 8, 1)), Row(4, 256, Tiling(16, 16, 8, 1))),  # 32 x 16: 3 on sm_86
}

# Everything at once: window, soft cap, slopes, sinks, lengths, biases and dropout. Few calls are so, hence one
# small tile for all families but where a row was counted. Compiled by Triton 3.6.0 for sm_80 and sm_90.
ATTENTION_FORWARD |= {
    "sm_80 crowded": (
        Row(2, 64, Tiling(64, 64, 8, 2)),  # 128 x 64: 2 spills
        Row(2, 128, Tiling(32, 32, 8, 2)),  # 64 x 32 with 4 warps: 69 with Triton 3.7.1
    ),
    "sm_90 crowded": (
        Row(2, 64, Tiling(64, 64, 8, 2)),  # 128 x 64: 16
        Row(2, 128, Tiling(64, 32, 8, 2)),  # 128 x 32: 10 with Triton 3.7.1
        Row(2, 256, Tiling(32, 32, 8, 1)),  # 128 x 16: 24 with Triton 3.7.1
    ),
    "sm_90 wide crowded": (Row(2, 512, Tiling(32, 16, 8, 2)),),  # 128 x 16: 16; 64 x 16: 24 with Triton 3.7.1
    "sm_100 wide crowded": (Row(2, 512, Tiling(32, 16, 8, 2)),),
    **{
        f"{name} crowded": (Row(2, 128, Tiling(32, 32, 8, 2)), Row(2, 256, Tiling(32, 32, 8, 1)))
        for name in ("sm_86", "sm_100", "sm_120")
    },
}
ATTENTION_DKDV |= {
    # On sm_90 64 x 64 at D = 64: 26, 32 x 64 at D = 128: 12; on sm_80 64 x 32 at D = 256: 4.
    "crowded": (
        Row(2, 128, Tiling(32, 32, 8, 2)),
        Row(2, 256, Tiling(32, 32, 8, 1)),
        Row(2, 512, Tiling(16, 16, 8, 2)),  # 16 x 32: 4 on sm_90, 8 on sm_80
    ),
}
ATTENTION_DQ |= {
    # On sm_90 at D = 64 128 x 64: 32, 64 x 64: 14; on sm_80 at D = 128 64 x 32 with 4 warps: 8.
    "crowded": (Row(2, 128, Tiling(64, 32, 8, 2)), Row(2, 256, Tiling(32, 32, 8, 1))),
    # 32 x 32: 4 on sm_90, 2 on sm_80; 16 x 16: 4 on sm_100. At odd lengths.
    **{f"{name} wide crowded": (Row(2, 512, Tiling(16, 32, 8, 2)),) for name in ("sm_80", "sm_90", "sm_100")},
    **{f"{name} wide crowded": (Row(2, 512, Tiling(16, 16, 8, 2)),) for name in _SMALL},
}
ATTENTION_BIAS |= {
    "crowded": (
        Row(2, 128, Tiling(32, 32, 8, 1)),  # on sm_90 64 x 64 at D = 64: 26; on sm_80 4 warps: 2
        Row(2, 512, Tiling(16, 16, 8, 1)),  # on sm_80 4 warps: 2, 32 x 32: 4
    ),
}

# ---- variants of a call, see `look_up` ----
# The kernels above, which need more registers here. Compiled with Triton 3.6.0, the oldest that we serve. Rows
# that need no other tile are repeated here, because rows are bounds.
ATTENTION_FORWARD |= {
    # Loops that programs split. 128 x 128 at D = 128: 2 spills with Triton 3.6; 128 x 64 at D = 160: 2.
    "sm_90 plain few": (
        Row(2, 64, Tiling(128, 128, 8, 3)),
        Row(2, 128, Tiling(128, 64, 8, 3)),
        Row(2, 256, Tiling(128, 32, 8, 2)),
    ),
    "sm_100 plain few": (
        Row(2, 64, Tiling(128, 128, 8, 3)),
        Row(2, 128, Tiling(128, 64, 8, 3)),  # 128 x 128: 73 to 76
        Row(2, 256, Tiling(128, 32, 8, 2)),  # 128 x 64: 54 to 58
    ),
    "sm_100 shaped uneven": (Row(2, 128, Tiling(128, 64, 8, 3)),),  # 128 x 128 at D = 128: 38
    "sm_100 wide plain few": (Row(2, 512, Tiling(128, 16, 8, 2, values=256)),),  # 128 x 32: 11 to 17
    # On sm_90 128 x 16 at D = 320: 12; on sm_100 64 x 32: 14.
    **{f"{n} wide heavy uneven": (Row(2, 512, Tiling(64, 16, 8, 2, values=256)),) for n in ("sm_90", "sm_100")},
    "sm_100 plain uneven": (
        Row(2, 64, Tiling(128, 128, 8, 3)),
        Row(2, 128, Tiling(128, 128, 8, 2)),
        Row(2, 256, Tiling(128, 32, 8, 2)),  # 128 x 64 at D = 160: 7
    ),
    "sm_120 heavy uneven": (
        *ATTENTION_FORWARD["sm_120 heavy"],
        Row(2, 256, Tiling(32, 32, 8, 2)),  # 4 warps: 2 to 8; 1 stage: 2
    ),
    "sm_80 intervals uneven": (
        Row(2, 64, Tiling(128, 64, 8, 3)),
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 4 warps: 2
    ),
}
ATTENTION_DKDV |= {
    # Padded tiles, as of D = 136.
    "sm_86 plain uneven": (
        Row(2, 64, Tiling(64, 128, 8, 2)),
        Row(2, 128, Tiling(64, 64, 8, 2)),
        Row(2, 256, Tiling(32, 32, 8, 1)),  # 4 warps: 5, 2 stages: 12 to 14 in full attention
    ),
    "sm_120 plain uneven": (
        Row(2, 64, Tiling(32, 128, 8, 2)),  # 64 x 128 at D = 40: 6
        Row(2, 128, Tiling(64, 64, 8, 2)),
    ),
    "sm_100 plain uneven": (
        Row(2, 128, Tiling(64, 128, 8, 2)),
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 64 x 64: 43
    ),
    # 64 x 32 in 2 stages at D = 128: 2 on sm_80, 4 on sm_120.
    **{
        f"{name} heavy uneven": (Row(2, 64, Tiling(64, 32, 8, 2)), Row(2, 128, Tiling(64, 32, 8, 1)))
        for name in ("sm_80", "sm_120")
    },
    **{f"{name} wide heavy uneven": (Row(2, 512, Tiling(16, 16, 8, 1)),) for name in _SMALL},  # 2 stages: 2
    "sm_120 crowded uneven": (
        Row(2, 128, Tiling(32, 32, 8, 2)),
        Row(2, 256, Tiling(16, 32, 8, 2)),  # 32 x 32: 8
    ),
    "sm_90 listed uneven": (Row(2, 64, Tiling(64, 32, 8, 2)), *ATTENTION_DKDV["sm_90 listed"][1:]),  # 64 x 64: 2
    "sm_90 heavy uneven": (
        Row(2, 64, Tiling(64, 64, 8, 2)),
        Row(2, 128, Tiling(32, 64, 8, 2)),
        Row(2, 256, Tiling(32, 32, 8, 1)),  # 64 x 32: 2 to 4
    ),
}
ATTENTION_DQ |= {
    "sm_80 heavy uneven": (
        Row(2, 64, Tiling(128, 32, 8, 2)),
        Row(2, 128, Tiling(64, 32, 8, 2)),  # 4 warps: 2
        Row(2, 256, Tiling(32, 32, 8, 1)),  # 64 x 32: 2
    ),
    "sm_86 heavy uneven": (
        Row(2, 64, Tiling(128, 32, 8, 2)),
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 128 x 32: 8 on sm_89; 64 x 32 with 4 warps: 4
    ),
    **{f"{name} listed uneven": (Row(2, 128, Tiling(64, 64, 8, 2)),) for name in _SMALL},  # 64 x 32, 4 warps: 4
    "sm_120 heavy uneven": (
        *ATTENTION_DQ["sm_120 heavy"],
        Row(2, 256, Tiling(32, 32, 8, 1)),  # 4 warps: 8
    ),
    "sm_100 wide heavy uneven": (Row(2, 512, Tiling(32, 16, 8, 2)),),  # 32 x 32: 2
    "sm_100 shaped uneven": ATTENTION_DQ["sm_100 intervals"],  # 128 x 64 at D = 256: 48
    # 32 x 64: 6 to 10, in 1 stage 8 to 26 with Triton 3.7.1. Plain calls of even lengths keep 32 x 64: it spills
    # 2 to 4 with Triton 3.6.0 alone, and 32 x 32 takes 1.5 times as many instructions.
    **{f"sm_90 wide {kind} uneven": (Row(2, 512, Tiling(32, 32, 8, 2)),) for kind in ("intervals", "listed")},
    **{f"{name} wide plain odd": (Row(2, 512, Tiling(32, 32, 8, 2)),) for name in ("sm_90", "sm_100")},
}
ATTENTION_BIAS |= {
    "sm_90 heavy uneven": (
        Row(2, 64, Tiling(64, 64, 4, 2)),
        Row(2, 128, Tiling(64, 64, 8, 1)),
        Row(2, 256, Tiling(16, 16, 8, 1)),  # 4 warps: 2
    ),
    "sm_80 heavy uneven": (Row(2, 128, Tiling(32, 32, 8, 1)),),  # 4 warps: 2
}

# ---- queries and keys wider than 512, in the forward alone ----
# The absorbed form of DeepSeek's latent attention has keys of 576 and values of 512. Beside the tiles: issue
# cycles over tensor-core cycles of one pass over full tiles. Each pass computes all scores: two passes take 1.5
# times as many tensor-core cycles as one.
_WIDER = {
    "sm_80": Tiling(32, 32, 8, 2),  # 0.89; 64 x 64 in two passes 0.51, without a second stage
    "sm_86": Tiling(32, 16, 8, 2),  # 32 x 32: 106 KiB
    "sm_90": Tiling(128, 16, 8, 2, values=256),  # 1.01; 32 x 32 in one pass: 1.85; one of 64 x 32: 48 spills
    "sm_100": Tiling(64, 64, 8, 1, values=256),  # 1.50; 32 x 32 in one pass: 3.59; two of 128 x 32: 195 spills
    "sm_120": Tiling(32, 16, 8, 2),  # 16 x 32: 4 spills
    "gfx942": Tiling(32, 16, 4, 1),  # 36 for a crowded call
}
for _name, _tiling in _WIDER.items():
    _exact = Row(4, 1024, Tiling(16, 16, 4 if _name == "gfx942" else 8, 1))  # 32 x 16: 20 for a crowded call
    ATTENTION_FORWARD[_name] = (*ATTENTION_FORWARD[_name], Row(2, 1024, _tiling), _exact)
for _name, _tiling in {
    "sm_90 wide listed": Tiling(32, 32, 8, 2),  # two passes of 64 x 16 with 4 warps: 47
    "sm_90 wide crowded": Tiling(16, 32, 8, 2),  # 128 x 16: 12; 32 x 32: 8
    "sm_100 wide shaped": Tiling(32, 32, 8, 2),  # two passes of 64 x 64: 87 to 209
    "sm_100 wide crowded": Tiling(16, 32, 8, 2),  # 32 x 32: 7
}.items():
    ATTENTION_FORWARD[_name] = (*ATTENTION_FORWARD[_name], Row(2, 1024, _tiling))

# Tilings that may be faster than the tables' in plain calls, in two bytes, of heads as wide as the tile. None
# spills with Triton 3.7.1, nor with 3.6.0 on sm_80 and sm_90, but for those that are noted. A proof run on a GPU
# times them and keeps the fastest.
_CANDIDATES: dict[str, dict[tuple[str, int], tuple[Tiling, ...]]] = {
    "ATTENTION_FORWARD": {
        ("sm_80", 64): (
            Tiling(128, 64, 8, 3, ahead=True),
            Tiling(128, 64, 4, 3),
            Tiling(64, 64, 4, 3, ahead=True),
        ),
        ("sm_80", 128): (
            Tiling(64, 64, 4, 3),
            Tiling(128, 32, 8, 3, ahead=True),
            Tiling(64, 64, 4, 2, ahead=True),
        ),
        ("sm_90", 64): (
            Tiling(128, 128, 8, 3),
            Tiling(128, 128, 8, 3, ahead=True),
            Tiling(64, 64, 4, 3, ahead=True),
            Tiling(128, 64, 4, 3),
        ),
        ("sm_90", 128): (
            Tiling(128, 128, 8, 2),
            Tiling(128, 64, 8, 3),
            Tiling(128, 64, 8, 2, ahead=True),
            Tiling(64, 64, 4, 2),
            Tiling(64, 64, 4, 2, ahead=True),
        ),
        # In full attention the first spills 5 with Triton 3.7.1.
        ("sm_100", 64): (Tiling(128, 64, 8, 3, ahead=True), Tiling(128, 64, 4, 3)),
        ("sm_100", 128): (Tiling(128, 64, 8, 3, ahead=True), Tiling(128, 64, 8, 3)),
    },
    "ATTENTION_DKDV": {
        ("sm_80", 64): (Tiling(64, 64, 4, 2),),  # causal with Triton 3.6.0: 6
        ("sm_80", 128): (Tiling(32, 64, 4, 2), Tiling(64, 64, 8, 3)),
        ("sm_90", 64): (
            Tiling(64, 128, 8, 2),
            Tiling(64, 128, 8, 3, ahead=True),
            Tiling(64, 64, 4, 3, ahead=True),
        ),
        # In full attention the first spills 2 with Triton 3.7.1, the others 2 with 3.6.0.
        ("sm_90", 128): (
            Tiling(64, 128, 8, 2, ahead=True),
            Tiling(64, 128, 8, 3, ahead=True),
            Tiling(64, 128, 8, 3),
        ),
        ("sm_100", 64): (Tiling(64, 64, 4, 3),),
        ("sm_100", 128): (Tiling(64, 128, 8, 3),),
    },
    "ATTENTION_DQ": {
        ("sm_80", 64): (Tiling(64, 64, 4, 2), Tiling(128, 64, 8, 2, ahead=True)),
        ("sm_80", 128): (Tiling(64, 32, 4, 2), Tiling(64, 32, 4, 2, ahead=True)),
        ("sm_90", 64): (Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2, ahead=True), Tiling(64, 64, 4, 3)),
        ("sm_90", 128): (Tiling(128, 64, 8, 3), Tiling(64, 64, 4, 2)),
        ("sm_100", 64): (Tiling(128, 64, 8, 2),),
        ("sm_100", 128): (Tiling(128, 64, 8, 3),),
    },
}
_INTERPRETED_CANDIDATES = (Tiling(32, 16, 4, 1, ahead=True), Tiling(16, 32, 4, 1))


def candidates(table: str, family: str, bytes: int, width: int) -> tuple[Tiling, ...]:
    """The tilings to try beside that of the table with this name, for plain calls of heads of exactly this
    width."""
    if family == INTERPRETER:
        return _INTERPRETED_CANDIDATES
    return _CANDIDATES.get(table, {}).get((family, width), ()) if bytes == 2 else ()
