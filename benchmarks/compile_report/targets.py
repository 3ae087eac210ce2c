"""The GPUs the report compiles for: what a program may use there, and how fast the units are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True)
class Target:
    """Limits and rates of one architecture, per streaming multiprocessor (AMD: compute unit) and clock.

    Sources: CUDA C++ Programming Guide, "Compute Capabilities", for the limits; the vendors' architecture
    papers for `tensor_flops`, dense fp16 or bf16 products summed in fp32. sm_86, sm_89 and sm_120 stand for
    the professional cards: the consumer cards of the same architecture have half the rate.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes a program may ask for
    shared_memory: int  # bytes there are
    warps: int
    programs: int
    tensor_flops: int
    processors: int  # there are: launches with fewer programs split their loops
    must_not_spill: bool = False
    compared: bool = True  # whether loops are compared with the committed ones

    @property
    def compiler_target(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp_size)


def _nvidia(
    arch: int,
    shared_limit: int,
    shared_memory: int,
    warps: int,
    programs: int,
    tensor_flops: int,
    processors: int,
) -> Target:
    return Target(
        f"sm_{arch}", "cuda", arch, 32, shared_limit * KIB, shared_memory * KIB,
        warps, programs, tensor_flops, processors, must_not_spill=True,
    )  # fmt: skip


TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, 163, 164, 64, 32, 2048, 108),
        _nvidia(86, 99, 100, 48, 16, 1024, 84),
        # Its instructions and its rows are sm_86's, and so are its loops.
        replace(_nvidia(89, 99, 100, 48, 24, 1024, 128), compared=False),
        _nvidia(90, 227, 228, 64, 32, 4096, 132),
        _nvidia(100, 227, 228, 64, 32, 8192, 148),
        _nvidia(120, 99, 100, 48, 24, 1024, 170),
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB, 64 * KIB, 32, 32, 2048, 304),
    )
}

# Every architecture above has them: four schedulers that each issue one warp instruction a clock, and sixteen
# special-function lanes, four a scheduler, so that a warp's exp2 keeps them for eight clocks.
SCHEDULERS = 4
SPECIAL_CYCLES = 8
REGISTERS = 65536
MOST_TENSOR_MEMORY_COLUMNS = 512
# What CUDA keeps of shared memory for itself, for each resident program.
RESERVED_SHARED = KIB
