"""Which tiles a kernel takes on which GPU: fixed tables, chosen by counting instructions, looked up at a launch.

A row is looked up by architecture family, bytes per element and padded head width. Rows are bounds: the first row
whose bytes and width are at least those of the call applies. The figures beside the rows come from the compile
report (`python -m benchmarks.compile_report`). Tilings that spill, or that need too much shared memory, are ruled
out; of the others the one with the fewest issue cycles per tensor-core cycle is taken.
"""

from __future__ import annotations

import functools

import torch
import triton
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from .attention import (
    ATTENTION_BIAS,
    ATTENTION_DELTA,
    ATTENTION_DKDV,
    ATTENTION_DQ,
    ATTENTION_FORWARD,
    ATTENTION_STATISTICS,
    ATTENTION_TANGENT,
    MASKED_FIRST,
    PLAIN_DQ_RELATIVE,
    candidates,
)
from .heads import HEADS_ELEMENTWISE
from .mlp import MLP_BACKWARD, MLP_ELEMENTWISE, MLP_FORWARD, MLP_FUSED_UP_TO, MLP_GATED_FORWARD
from .norm import NORM_BACKWARD, NORM_FORWARD, norm_programs
from .recording import start
from .rows import COMPILER_OPTIONS, EVERY, INTERPRETER, Row, Tiling

# The tables, by the name that the kernels ask for.
__all__ = [
    "ATTENTION_BIAS",
    "ATTENTION_DELTA",
    "ATTENTION_DKDV",
    "ATTENTION_DQ",
    "ATTENTION_FORWARD",
    "ATTENTION_STATISTICS",
    "ATTENTION_TANGENT",
    "COMPILER_OPTIONS",
    "EVERY",
    "HEADS_ELEMENTWISE",
    "INTERPRETER",
    "MASKED_FIRST",
    "MLP_BACKWARD",
    "MLP_ELEMENTWISE",
    "MLP_FORWARD",
    "MLP_FUSED_UP_TO",
    "MLP_GATED_FORWARD",
    "NORM_BACKWARD",
    "NORM_FORWARD",
    "PLAIN_DQ_RELATIVE",
    "Row",
    "Tiling",
    "candidates",
    "norm_programs",
    "start",
]

# Compute capability -> the family whose table it uses, with the same tensor cores and shared memory.
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
    """Computed once for each GPU, with that GPU as the current one: a process may have GPUs of two kinds."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        target = driver.active.get_current_target()
    return family_of(target.backend, target.arch)


def interpreted(kernel: object) -> bool:
    """Whether this kernel runs in Triton's interpreter (TRITON_INTERPRET=1 when it was defined)."""
    return isinstance(kernel, InterpretedFunction)


def family(kernel: object, device: torch.device) -> str:
    """The table family that serves `kernel` on `device`, whichever device is current."""
    return INTERPRETER if interpreted(kernel) else _family_of_device(device)


def look_up(
    table: dict[str, tuple[Row, ...]],
    family: str,
    bytes: int,
    width: int,
    kind: str = "plain",
    variants: tuple[str, ...] = (),
) -> Tiling:
    """The first row of the family's table that is wide enough; families not listed use sm_80's.

    Kinds other than "plain" have rows of their own, which come first: "shaped" scores and "intervals" need more
    registers, "heavy" ones even more, several heavy ones at once are "crowded", a tile for "listed" granules must
    not be larger than these, and "tf32" and "tf32x3" products of float32 run on tensor cores on every family. The
    kinds' rows for tiles wider than 256 are those of "sm_90 wide shaped" and so on.

    Variants of a call are other kernels of the same kind, which may need more registers. Their rows come before
    all others: those of "sm_90 plain few", then "sm_90 few", then "few".
    """
    rows = table.get(family) or table["sm_80"]
    if family != INTERPRETER:
        own = family if width <= 256 else f"{family} wide"
        keys = [key for v in variants for key in (f"{own} {kind} {v}", f"{own} {v}", v)]
        keys += [key.format(own) for key in _KINDS[kind]]
        rows = (*(row for key in keys for row in table.get(key, ())), *rows)
    for row in rows:
        if bytes <= row.bytes and width <= row.width:
            return row.tiling
    raise ValueError(f"no launch configuration for {bytes}-byte elements of width {width} on {family}")


def within_granules(tiling: Tiling) -> Tiling:
    """The tiling for masks of 64 x 64 granules: a tile lies within one granule. Half the rows need half the
    warps. Loops over lists do not look ahead."""
    warps = 4 if tiling.block_m > 64 and tiling.warps == 8 else tiling.warps
    return tiling._replace(
        block_m=min(tiling.block_m, 64), block_n=min(tiling.block_n, 64), warps=warps, ahead=False
    )


_KINDS = {
    "plain": (),
    "shaped": ("{} shaped", "shaped"),
    "heavy": ("{} heavy", "{} shaped", "shaped"),
    "crowded": ("{} crowded", "crowded", "{} heavy", "{} shaped", "shaped"),
    "intervals": ("{} intervals", "{} shaped", "shaped"),
    "listed": ("{} listed", "{} shaped", "shaped"),
    "tf32": ("tf32",),
    "tf32x3": ("{} tf32x3", "tf32x3", "tf32"),
}


def on_device(tensor: torch.Tensor):
    """A context in which launches go to the tensor's device, not to the current one."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def tile_width(width: int) -> int:
    """The power of two to which a tile's inner side is padded; tensor cores need at least 16."""
    return max(16, triton.next_power_of_2(width))


# Keys and values (or queries and their gradients) of the heads that are computed at a time should stay in the L2
# cache. The smallest one of the families here is 6 MiB on sm_86; sm_80 to sm_100 have 40 MiB and more.
L2_BUDGET = 16 * 2**20


def heads_per_section(left: torch.Tensor, right: torch.Tensor, heads: int) -> int:
    """How many heads to interleave: as many as fit into the L2 cache with both operands.

    If that is more than one, then an odd number, and more than there are rather than 1: Triton compiles a kernel
    again for an integer that is 1 or a multiple of 16, and here gains nothing by it.
    """
    row_bytes = (left.shape[3] + right.shape[3]) * left.element_size()
    fitting = L2_BUDGET // max(1, left.shape[2] * row_bytes)
    return 1 if fitting <= 1 else max(3, min(heads, fitting) | 1)


# The least number of tiles in a split. The partial result of a split of n tiles of 64 keys is written and read
# again in float32; that costs 2 / n of the bytes of the keys and values that the split loads.
LEAST_STEPS = 4

# Number of processors that the interpreter pretends to have.
INTERPRETED_PROCESSORS = 3


@functools.cache
def _processors_of_device(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(family: str, device: torch.device) -> int:
    """The number of the GPU's multiprocessors: at least so many programs run side by side. 1 if there is no
    GPU."""
    if family == INTERPRETER:
        return INTERPRETED_PROCESSORS
    return _processors_of_device(device.index) if device.type == "cuda" else 1


def splits(programs: int, steps: int, processors: int) -> int:
    """How many splits to cut loops of up to `steps` tiles into, so that `programs` of them keep the GPU busy."""
    return max(1, min(processors // max(1, programs), steps // LEAST_STEPS))
