"""Which GPU is this, and which tiles does it get: frozen tables, chosen by counting, never at import time.

A row is looked up by architecture family, bytes per element and padded head width. Rows are bounds: the
first row whose bytes and width are at least what is asked for applies. The figures beside the rows come from
the compile report (`python -m benchmarks.compile_report`): spills and shared memory decide what is allowed,
issue cycles over tensor-core cycles which of the allowed ones is taken.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from .tile import Tile, tile_of

# The compiler's own default changes with its version (off from 3.10 on), and the softmax is built of
# multiply-subtracts that round once.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


class Tiling(NamedTuple):
    """The size of a program's tile and the hardware it is given."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def tile(self, **choices: object) -> Tile:
        """The compile-time choices of a launch: the tile's sides and what else the kernel asks for."""
        return tile_of(BLOCK_M=self.block_m, BLOCK_N=self.block_n, **choices)

    def compiler_options(self) -> dict[str, object]:
        """Launch keywords: the compiler's options."""
        return {"num_warps": self.warps, "num_stages": self.stages, **COMPILER_OPTIONS}


class Row(NamedTuple):
    """One line of a table: for elements of up to `bytes` bytes and tiles up to `width` wide."""

    bytes: int
    width: int
    tiling: Tiling


INTERPRETER = "interpreter"

# Compute capability -> the family whose table serves it: same tensor cores, same shared memory.
_FAMILIES = (
    (75, "sm_75"),
    (80, "sm_80"),
    (86, "sm_86"),
    (87, "sm_80"),
    (89, "sm_86"),
    (90, "sm_90"),
    (100, "sm_100"),
    (120, "sm_120"),
)


def family_of(backend: str, arch: int | str) -> str:
    """The table family of a compiler target: ("cuda", 89) -> "sm_86", ("hip", "gfx950") -> "gfx942"."""
    if backend == "hip":
        return "gfx942"
    return [name for least, name in _FAMILIES if least <= max(int(arch), _FAMILIES[0][0])][-1]


@functools.cache
def _family_of_device(device: torch.device) -> str:
    """Asked once for each GPU, with that GPU current: a process may hold two kinds."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        target = driver.active.get_current_target()
    return family_of(target.backend, target.arch)


def interpreted(kernel: object) -> bool:
    """Whether this kernel runs in Triton's interpreter (TRITON_INTERPRET=1 when it was defined)."""
    return isinstance(kernel, InterpretedFunction)


def family(kernel: object, device: torch.device) -> str:
    """The table family that serves `kernel` on `device`, whichever device is current."""
    return INTERPRETER if interpreted(kernel) else _family_of_device(device)


def look_up(table: dict[str, tuple[Row, ...]], family: str, bytes: int, width: int, kind: str = "plain") -> Tiling:
    """The first row of the family's table that is wide enough; families not listed use sm_80's.

    Other kinds than "plain" have rows of their own that come first: "shaped" scores and "intervals" hold more
    registers, "heavy" even more, a tile must not be larger than "listed" granules, and "tf32" and "tf32x3"
    products of float32 run on tensor cores, on every family.
    """
    rows = table.get(family) or table["sm_80"]
    if family != INTERPRETER:
        rows = (*(row for key in _KINDS[kind] for row in table.get(key.format(family), ())), *rows)
    for row in rows:
        if bytes <= row.bytes and width <= row.width:
            return row.tiling
    raise ValueError(f"no launch configuration for {bytes}-byte elements of width {width} on {family}")


def within_granules(tiling: Tiling) -> Tiling:
    """The tiling for masks of 64 x 64 granules: a tile lies within one. Half the rows want half the warps."""
    smaller = tiling.block_m > 64 and tiling.warps == 8
    return Tiling(min(tiling.block_m, 64), min(tiling.block_n, 64), 4 if smaller else tiling.warps, tiling.stages)


_KINDS = {
    "plain": (),
    "shaped": ("{} shaped", "shaped"),
    "heavy": ("{} heavy", "{} shaped", "shaped"),
    "intervals": ("{} intervals", "{} shaped", "shaped"),
    "listed": ("{} listed", "{} shaped", "shaped"),
    "tf32": ("tf32",),
    "tf32x3": ("{} tf32x3", "tf32x3", "tf32"),
}


def on_device(tensor: torch.Tensor):
    """A context in which launches go to the tensor's device, not to the current one."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def tile_width(width: int) -> int:
    """The power of two a tile's inner side is padded to; tensor cores take no less than 16."""
    return max(16, triton.next_power_of_2(width))


# Keys and values (or queries and their gradients) of the heads in flight should stay in the L2 cache; the
# smallest cache of the families served here is 6 MiB on sm_86, 40 MiB and more on sm_80 to sm_100.
L2_BUDGET = 16 * 2**20


def heads_per_section(left: torch.Tensor, right: torch.Tensor, heads: int) -> int:
    """How many heads' tiles to interleave: as many as have both operands in the L2 cache together."""
    row_bytes = (left.shape[3] + right.shape[3]) * left.element_size()
    return min(max(1, heads), max(1, L2_BUDGET // max(1, left.shape[2] * row_bytes)))


# Shares of a walk have at least so many tiles: the part of one of n tiles of 64 keys, written and read again in
# float32, costs 2 / n of what it loads of 2-byte keys and values.
LEAST_STEPS = 4

# Whose programs a launch is to occupy in the interpreter.
INTERPRETED_PROCESSORS = 3


@functools.cache
def _processors_of_device(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(family: str, device: torch.device) -> int:
    """How many programs run side by side, at least: the GPU's multiprocessors. None is known of a device that is
    not there."""
    if family == INTERPRETER:
        return INTERPRETED_PROCESSORS
    return _processors_of_device(device.index) if device.type == "cuda" else 1


def splits(programs: int, steps: int, processors: int) -> int:
    """Into how many shares to cut walks of up to `steps` tiles, so that `programs` of them keep the GPU busy."""
    return max(1, min(processors // max(1, programs), steps // LEAST_STEPS))


# Odd tiles of unequal sides, so that short sequences reach every loop.
_INTERPRETED = {
    "forward": (Row(8, 256, Tiling(32, 16, 4, 1)),),
    "dkdv": (Row(8, 256, Tiling(16, 32, 4, 1)),),
    "dq": (Row(8, 256, Tiling(32, 16, 4, 1)),),
    "bias": (Row(8, 256, Tiling(32, 32, 4, 1)),),
    "tangent": (Row(8, 256, Tiling(32, 16, 4, 1)),),
}

# Where the forward and dq walk the masked keys before the others. On sm_90, if the masked loop came second, ptxas
# would make every asynchronous product of the kernel wait for the one before (its note C7515). Elsewhere the other
# order takes fewer registers. Where they come first, bounds are also compared with keys counted from the tile's
# start; so they are in dq of plain scores on sm_100 (issue / tensor of the masked loop at D = 128: 1.23 -> 1.05),
# but not in the forward there, nor with shaped scores at D = 256, which would spill.
MASKED_FIRST = frozenset({"sm_90", INTERPRETER})
PLAIN_DQ_RELATIVE = MASKED_FIRST | {"sm_100"}

# float32 products are exact: fused multiply-adds, no tensor cores. Registers and shared memory bound their tiles.
_EXACT = {
    "forward": (
        Row(4, 64, Tiling(64, 32, 8, 2)),
        Row(4, 128, Tiling(32, 16, 8, 2)),
        Row(4, 256, Tiling(32, 16, 8, 1)),
    ),
    "dkdv": (
        Row(4, 64, Tiling(32, 32, 4, 1)),
        Row(4, 128, Tiling(16, 32, 8, 1)),
        Row(4, 256, Tiling(16, 16, 8, 1)),
    ),
    "dq": (
        Row(4, 64, Tiling(32, 32, 4, 1)),
        Row(4, 128, Tiling(16, 16, 8, 1)),
        Row(4, 256, Tiling(16, 16, 8, 1)),
    ),
    "tangent": (
        Row(4, 64, Tiling(32, 16, 8, 1)),  # 255 registers, 24 KiB, 1
        Row(4, 128, Tiling(16, 16, 8, 1)),  # 252 registers, 26 KiB, 1
        Row(4, 256, Tiling(16, 16, 8, 1)),  # 255 registers, 50 KiB, 1; 278 spills, 16 warps: 1034
    ),
}

# Beside each row, as Triton 3.7.1 compiles it for bf16 of just that width (the worse of causal and not, where they
# differ): registers a thread, shared memory, programs a multiprocessor; then issue over tensor-core cycles of the
# full-tile loop and of the causal diagonal's. Nothing spills unless said. Not yet measured.
# The pass that makes delta of out and its gradient: bounded by memory.
ATTENTION_DELTA = Tiling(64, 64, 8, 3)

ATTENTION_FORWARD = {
    INTERPRETER: _INTERPRETED["forward"],
    "sm_80": (
        Row(2, 64, Tiling(128, 128, 8, 3)),  # 205 registers, 80 KiB, 1; 0.61, 0.80
        Row(2, 128, Tiling(128, 64, 8, 3)),  # 216 registers, 96 KiB, 1; 0.52, 0.61
        Row(2, 256, Tiling(64, 64, 8, 2)),  # 255 registers, 104 KiB, 1; 0.60, 0.67
        *_EXACT["forward"],
    ),
    "sm_86": (
        Row(2, 64, Tiling(128, 64, 8, 3)),  # 199 registers, 48 KiB, 1; 0.35, 0.44
        Row(2, 128, Tiling(128, 64, 8, 3)),  # 220 registers, 96 KiB, 1; 0.26, 0.31
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 168 registers, 34 KiB, 2; 0.39, 0.47
        *_EXACT["forward"],
    ),
    "sm_90": (
        Row(2, 64, Tiling(128, 128, 8, 3)),  # 228 registers, 112 KiB, 1; 0.95, 1.30
        Row(2, 128, Tiling(128, 128, 8, 2)),  # 250 registers, 160 KiB, 1; 0.54, 0.75
        Row(2, 256, Tiling(128, 64, 8, 2)),  # 255 registers, 192 KiB, 1; 0.50, 0.61
        *_EXACT["forward"],
    ),
    "sm_100": (
        Row(2, 64, Tiling(128, 128, 8, 3)),  # 240 registers, 113 KiB, 1; 1.88, 3.52
        Row(2, 128, Tiling(128, 128, 8, 2)),  # 246 registers, 161 KiB, 1; 1.06, 2.00
        Row(2, 256, Tiling(128, 64, 8, 2)),  # 254 registers, 193 KiB, 1; 1.00, 1.36
        *_EXACT["forward"],
    ),
    "sm_120": (
        Row(2, 64, Tiling(128, 64, 8, 3)),  # 170 registers, 48 KiB, 1; 0.34, 0.43
        Row(2, 128, Tiling(128, 64, 8, 3)),  # 219 registers, 96 KiB, 1; 0.24, 0.31
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 189 registers, 34 KiB, 2; 0.39, 0.46
        *_EXACT["forward"],
    ),
    "gfx942": (
        Row(2, 64, Tiling(128, 64, 4, 1)),  # 199 registers, 16 KiB, 2
        Row(2, 128, Tiling(128, 32, 4, 1)),  # 202 registers, 32 KiB, 2
        Row(2, 256, Tiling(64, 32, 4, 1)),  # 261 registers, 32 KiB, 1
        *_EXACT["forward"],
    ),
}

ATTENTION_DKDV = {
    INTERPRETER: _INTERPRETED["dkdv"],
    "sm_80": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 255 registers, 48 KiB, 1; 0.44, 0.52
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 177 registers, 72 KiB, 1; 0.42, 0.48
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 232 registers, 128 KiB, 1; 0.41, 0.47
        *_EXACT["dkdv"],
    ),
    "sm_86": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 252 registers, 48 KiB, 1; 0.22, 0.26
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 178 registers, 72 KiB, 1; 0.21, 0.24
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 255 registers, 80 KiB, 1; 0.20, 0.25
        *_EXACT["dkdv"],
    ),
    "sm_90": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 239 registers, 64 KiB, 1; 0.63, 0.78
        Row(2, 128, Tiling(64, 128, 8, 2)),  # 255 registers, 128 KiB, 1; 0.37, 0.46
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 207 registers, 128 KiB, 1; 0.82, 1.01
        *_EXACT["dkdv"],
    ),
    "sm_100": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 178 registers, 81 KiB, 1; 1.42, 1.87
        Row(2, 128, Tiling(64, 128, 8, 2)),  # 220 registers, 161 KiB, 1; 0.82, 0.98
        Row(2, 256, Tiling(64, 64, 8, 1)),  # 237 registers, 128 KiB, 1; 1.16, 1.41
        *_EXACT["dkdv"],
    ),
    "sm_120": (
        Row(2, 64, Tiling(64, 128, 8, 2)),  # 250 registers, 48 KiB, 1; 0.22, 0.26
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 174 registers, 72 KiB, 1; 0.20, 0.23
        Row(2, 256, Tiling(32, 32, 8, 2)),  # 158 registers, 66 KiB, 1; 4 warps: 4 spills
        *_EXACT["dkdv"],
    ),
    "gfx942": (
        Row(2, 64, Tiling(64, 64, 4, 1)),  # 244 registers, 8 KiB, 2
        Row(2, 128, Tiling(32, 32, 4, 1)),  # 248 registers, 8 KiB, 2
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 430 registers, 16 KiB, 1
        *_EXACT["dkdv"][:2],
        Row(4, 256, Tiling(16, 16, 4, 1)),  # 339 registers, 16 KiB, 1
    ),
}

ATTENTION_DQ = {
    INTERPRETER: _INTERPRETED["dq"],
    "sm_80": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 238 registers, 48 KiB, 1; 0.43, 0.54
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 199 registers, 80 KiB, 1; 0.35, 0.42
        Row(2, 256, Tiling(64, 64, 8, 1)),  # 239 registers, 128 KiB, 1; 0.34, 0.40
        *_EXACT["dq"],
    ),
    "sm_86": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 238 registers, 48 KiB, 1; 0.21, 0.27
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 198 registers, 80 KiB, 1; 0.18, 0.23
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 202 registers, 64 KiB, 1; 0.22, 0.27
        *_EXACT["dq"],
    ),
    "sm_90": (
        Row(2, 64, Tiling(128, 128, 8, 2)),  # 249 registers, 96 KiB, 1; 0.57, 0.87
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 221 registers, 128 KiB, 1; 0.42, 0.55
        Row(2, 256, Tiling(128, 32, 8, 2)),  # 244 registers, 192 KiB, 1; 0.42, 0.52
        *_EXACT["dq"],
    ),
    "sm_100": (
        Row(2, 64, Tiling(128, 128, 8, 2)),  # 238 registers, 113 KiB, 1; 1.10, 1.47
        Row(2, 128, Tiling(128, 64, 8, 2)),  # 148 registers, 145 KiB, 1; 0.86, 1.05
        Row(2, 256, Tiling(128, 64, 8, 1)),  # 244 registers, 192 KiB, 1; 0.66, 0.83
        *_EXACT["dq"],
    ),
    "sm_120": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 226 registers, 48 KiB, 1; 0.21, 0.27
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 196 registers, 80 KiB, 1; 0.17, 0.21
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 208 registers, 64 KiB, 1; 0.21, 0.24
        *_EXACT["dq"],
    ),
    "gfx942": (
        Row(2, 64, Tiling(128, 32, 4, 1)),  # 166 registers, 16 KiB, 3
        Row(2, 128, Tiling(64, 32, 4, 1)),  # 214 registers, 16 KiB, 2
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 374 registers, 16 KiB, 1
        *_EXACT["dq"][:2],
        Row(4, 256, Tiling(16, 16, 4, 1)),  # 327 registers, 16 KiB, 1
    ),
}


# ---- attention with shaped scores ----
# A window's left side, a soft cap or slopes hold more registers: these rows come before those above, where with
# any of them, or all, those would spill (compile report, Triton 3.7.1). Repeated are the rows that would not.
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

# Intervals hold two bounds a row.
ATTENTION_FORWARD["sm_80 intervals"] = (
    *ATTENTION_FORWARD["sm_80 shaped"],
    Row(2, 256, Tiling(64, 32, 8, 2)),  # 64 x 64: 2
)
ATTENTION_DQ["sm_100 intervals"] = (
    *ATTENTION_DQ["sm_100 shaped"],
    Row(2, 128, Tiling(128, 64, 8, 2)),
    Row(2, 256, Tiling(128, 32, 8, 1)),  # 128 x 64: 27
)

# Biases bring a pointer for each score, dropout makes its random numbers in registers: smaller tiles still.
ATTENTION_FORWARD |= {
    "sm_80 heavy": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(64, 32, 4, 2)),  # 64 x 64: 256 bytes of stack
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 64 x 64: 8
    ),
    "sm_90 heavy": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 64 x 64: 360
    ),
    "sm_100 heavy": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(64, 32, 8, 2)),  # 128 x 64: 856, 128 x 32: 38 spills
        Row(2, 256, Tiling(128, 16, 8, 2)),  # 128 x 32: 376
    ),
}
ATTENTION_DKDV |= {
    "sm_80 heavy": (
        Row(2, 128, Tiling(64, 32, 8, 2)),  # D = 64: 64 x 128 245 to 477, 64 x 64 190 to 368; D = 128: 64 x 64 9
    ),
    "sm_90 heavy": (Row(2, 64, Tiling(64, 64, 8, 2)),),  # 64 x 128: 6
    "sm_100 heavy": (
        Row(2, 64, Tiling(64, 128, 8, 2)),
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 64 x 128: 30
        Row(2, 256, Tiling(32, 32, 8, 1)),  # 64 x 32: 2
    ),
}
ATTENTION_DQ |= {
    "sm_80 heavy": (
        Row(2, 128, Tiling(128, 32, 8, 2)),  # D = 64: 128 x 64 6, 64 x 64 8
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 64 x 64: 6
    ),
    "sm_90 heavy": (
        Row(2, 64, Tiling(128, 64, 8, 2)),
        Row(2, 128, Tiling(128, 32, 8, 2)),
        Row(2, 256, Tiling(32, 32, 4, 1)),  # 128 x 32: 8 bytes of stack, 128 x 16: 208
    ),
    "sm_100 heavy": (
        Row(2, 64, Tiling(64, 128, 8, 2)),
        Row(2, 128, Tiling(128, 64, 8, 2)),
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 128 x 64: 230 to 271
    ),
}

# Masks of lists, where those above, cut to granules, spill.
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

# sm_86 and sm_120: 99 KiB of shared memory bound these tiles before registers do. Where sm_120 has no rows of its
# own, it takes sm_86's.
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
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 128 x 64: 128 KiB with 3 stages, 203 spills with 2
    ),
    "sm_86 listed": (
        Row(2, 64, Tiling(64, 64, 4, 3)),
        Row(2, 128, Tiling(64, 64, 8, 2)),  # 4 warps: 13
    ),
}
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
        Row(2, 128, Tiling(64, 32, 4, 2)),  # 64 x 64: 11
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

# Gradients of biases: square tiles, two products, and a sum that stays in registers.
_BIAS_EXACT = (Row(4, 64, Tiling(32, 32, 4, 1)), Row(4, 256, Tiling(16, 16, 4, 1)))
ATTENTION_BIAS = {
    INTERPRETER: _INTERPRETED["bias"],
    "sm_80": (
        Row(2, 128, Tiling(32, 32, 4, 1)),  # 64 x 64: 8 to 384 bytes of stack
        Row(2, 256, Tiling(16, 16, 4, 1)),  # 32 x 32: 8 to 360
        *_BIAS_EXACT,
    ),
    "sm_90": (
        Row(2, 64, Tiling(64, 64, 4, 2)),
        Row(2, 128, Tiling(64, 64, 8, 1)),
        Row(2, 256, Tiling(16, 16, 4, 1)),  # 32 x 32: 296
        *_BIAS_EXACT,
    ),
}
ATTENTION_BIAS["sm_100"] = ATTENTION_BIAS["sm_90"]

# float32 on tensor cores: fragments of 32 bits, and of three products for tf32x3.
ATTENTION_FORWARD |= {
    "tf32": (Row(4, 64, Tiling(64, 32, 4, 2)), Row(4, 256, Tiling(32, 16, 4, 1))),
    "tf32x3": (Row(4, 64, Tiling(32, 32, 4, 1)), Row(4, 128, Tiling(16, 16, 4, 1))),  # 64 x 32, 32 x 16: 6 to 14
    "sm_90 tf32x3": (Row(4, 64, Tiling(64, 16, 4, 1)),),  # 32 x 32: 6
}
ATTENTION_DKDV["tf32"] = (Row(4, 64, Tiling(32, 32, 4, 1)), Row(4, 256, Tiling(16, 16, 4, 1)))
ATTENTION_DQ |= {
    "tf32": (Row(4, 64, Tiling(32, 32, 4, 1)), Row(4, 256, Tiling(16, 16, 4, 1))),
    "tf32x3": (Row(4, 64, Tiling(32, 16, 4, 1)),),  # 32 x 32: 16
}

# Forward mode: the forward's walk with five products to its two, and twice the tiles.
ATTENTION_TANGENT = {
    INTERPRETER: _INTERPRETED["tangent"],
    "sm_80": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 233 registers, 64 KiB, 1; 0.38, 0.46
        Row(2, 128, Tiling(64, 32, 4, 2)),  # 243 registers, 68 KiB, 2; 0.40, 0.45
        Row(2, 256, Tiling(64, 16, 8, 2)),  # 255 registers, 98 KiB, 1; 0.98, 1.06
        *_EXACT["tangent"],
    ),
    "sm_90": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 237 registers, 96 KiB, 1; 0.71, 0.58
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 247 registers, 128 KiB, 1; 0.55, 0.48
        Row(2, 256, Tiling(32, 16, 8, 2)),  # 164 registers, 65 KiB, 1; 2.40, 2.15; 64 x 16: 184 spills
        *_EXACT["tangent"],
    ),
    "sm_100": (
        Row(2, 64, Tiling(128, 64, 8, 2)),  # 234 registers, 97 KiB, 1; 1.49, 1.84
        Row(2, 128, Tiling(128, 32, 8, 2)),  # 214 registers, 129 KiB, 1; 1.39, 1.55
        Row(2, 256, Tiling(64, 32, 8, 1)),  # 225 registers, 80 KiB, 1; 1.48, 1.78
        *_EXACT["tangent"],
    ),
    "sm_100 listed": (Row(2, 128, Tiling(64, 32, 8, 2)),),  # 32 x 16: 2
    "sm_120 shaped": (Row(2, 64, Tiling(64, 16, 8, 2)), Row(2, 128, Tiling(64, 32, 8, 2))),  # 32 x 16: 7 to 8
    # With everything at once: window, soft cap, slopes, biases and their tangents, sinks, lengths and dropout.
    "shaped": (
        Row(2, 64, Tiling(64, 16, 8, 2)),  # 64 x 32: 4 to 146 spills
        Row(2, 128, Tiling(32, 16, 8, 2)),  # 64 x 16: 4 to 81
        Row(2, 256, Tiling(16, 16, 8, 2)),  # 32 x 16: 55 to 140
    ),
}

# The MLP. A row's width counts the elements of the hidden layer (tokens x h): below what fills every
# multiprocessor with the next row's tiles, smaller tiles share the work out better. Beside each row: the most
# registers any activation takes, gated kernels after the slash where one table serves both; shared memory; and
# programs a multiprocessor. Nothing spills. Compiled by Triton 3.7.1 from the launchers, aligned bf16 or fp32
# tensors; not yet measured. IEEE float32 products have no tensor cores to feed: registers alone bound their tiles.
EVERY = 2**63 - 1

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
    # At full tensor-core rate a 128 x 128 tile asks the L2 cache for 64 bytes a clock and multiprocessor, a
    # 128 x 256 tile for 43; it gives some 30. The smaller tile goes twice on a multiprocessor, so that one's
    # epilogue hides behind the other's products; the larger pays for its own.
    "sm_90": (
        Row(2, 132 * 128 * 128, Tiling(64, 64, 4, 3)),  # 64, 48 KiB, 4
        Row(2, 264 * 128 * 256, Tiling(128, 128, 8, 3)),  # 119, 96 KiB, 2
        Row(2, EVERY, Tiling(128, 256, 8, 3)),  # 231, 144 KiB, 1
        Row(4, EVERY, Tiling(64, 64, 8, 2)),  # 80, 16 KiB, 3
    ),
    # Accumulators lie in tensor memory.
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

# Two accumulators: half the columns where they lie in registers (128 x 128 spills on sm_80).
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

# The pass over the hidden layer after a library's product: bounded by memory, so whole 128-byte lines and few
# registers, that many programs are in flight. Forward 48, backward 80, gated backward 126 at most, any family.
MLP_ELEMENTWISE = {
    INTERPRETER: (Row(4, EVERY, Tiling(32, 32, 4, 1)),),
    "sm_80": (Row(4, EVERY, Tiling(64, 64, 8, 1)),),
}

# Up to which summed width our product, epilogue included, is taken over the library's product and that pass,
# by bytes per element; no entry, never. The pass moves 4 bytes a hidden element against 2 d flop of the product:
# with R flop/s and B bytes/s that buys our product a slack of 2 R / (B d) against the library's, 350 / d percent
# on an H200 (700 TFLOP/s, 4 TB/s), 260 / d on an A100. Where the library has no instructions that a kernel fed
# by pointers lacks (sm_80, sm_86, sm_120) ours is assumed to come within 7 percent of it, on sm_90 (no TMA, no
# specialised warps) within 17, on sm_100 and gfx942 within 35 and 20: assumptions to be replaced by measurements.
# float32 without tensor cores gains 60 / d percent, less than any slack worth the name.
MLP_FUSED_UP_TO = {
    INTERPRETER: {2: EVERY, 4: EVERY},
    "sm_80": {2: 4096},
    "sm_90": {2: 2048},
    "sm_100": {2: 1024},
    "gfx942": {2: 1024},
}

# Heads on their way to attention: bounded by memory. Rows of a tile by heads that take their turn with its angles;
# 16 elements a thread in tiles of 4,096. Loads and stores of aligned tensors are 16 bytes. Beside each row:
# registers forward / backward, the most of sm_80 to sm_120 with norm, weight, rotation and scale. Nothing spills;
# the same tiles on 4 warps took up to 128 / 188 and spilled 2 on sm_100 at D=256 (Triton 3.7.1). Not yet measured.
HEADS_ELEMENTWISE = {
    INTERPRETER: (Row(4, 256, Tiling(16, 2, 4, 1)),),
    "sm_80": (
        Row(4, 64, Tiling(64, 4, 8, 1)),  # 64 / 110
        Row(4, 128, Tiling(32, 4, 8, 1)),  # 64 / 120
        Row(4, 256, Tiling(16, 4, 8, 1)),  # 64 / 107
    ),
}

# Norms of rows: bounded by memory. A tile is whole rows as far as registers go, 16 elements a thread forward and 8
# or 16 backward, whose sums for weight and bias stay in registers. Loads and stores of aligned tensors are 16
# bytes. Beside each row: registers, the most of sm_80 to sm_120 for layer norm in bf16 with weight, bias and
# residual; after the slash in fp32, where compiled (Triton 3.7.1). Nothing spills but 3 on sm_120 at W=1024
# backward. Not yet measured.
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

# How many programs share out the rows of a norm's backward: as many as have 8192 elements of dy, and of x, in
# flight on every multiprocessor of the family's largest GPU: 32 KiB in half precision, where an H100's bandwidth
# times latency is some 16. Each leaves a line of partial sums, so that more of them move more bytes.
_NORM_ELEMENTS = 8192
_MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "sm_120": 188, "gfx942": 304}


def norm_programs(family: str, tiling: Tiling) -> int:
    """How many programs share out the rows: the same on every GPU of a family, as the order of sums is."""
    if family == INTERPRETER:
        return 3
    units = _MULTIPROCESSORS.get(family, _MULTIPROCESSORS["sm_80"])
    return units * (_NORM_ELEMENTS // (tiling.block_m * tiling.block_n))
