"""One row of the report: a kernel's resources, and a first-order model of its main loops."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from benchmarks.compile_report import caching, disassembly, hazards
from benchmarks.compile_report.compiling import Compiled, catching
from benchmarks.compile_report.disassembly import Instruction, TensorOperation
from benchmarks.compile_report.launches import CacheCall, Call
from benchmarks.compile_report.targets import (
    MOST_TENSOR_MEMORY_COLUMNS,
    REGISTERS,
    RESERVED_SHARED,
    SCHEDULERS,
    SPECIAL_CYCLES,
    Target,
)


@dataclass(frozen=True)
class Loop:
    """A main loop: instructions of one warp, and cycles of an SM that one iteration of the whole program takes."""

    kind: str  # "full tile" or "masked"
    instructions: int
    tensor_cycles: float  # the limit: the source's products at the tensor cores' full rate
    busy_cycles: float  # cycles for which the chosen instructions keep the tensor cores busy
    issue_cycles: float
    special_cycles: float
    loaded_bytes: int = 0  # that an iteration asks of global memory by wide loads

    @property
    def ratio(self) -> float:
        """Issue cycles over tensor-core cycles."""
        return self.issue_cycles / self.tensor_cycles

    @property
    def model(self) -> tuple[float, float]:
        """Share of the tensor-core limit if the units overlap fully, and if they take turns. Not a measurement."""
        cycles = (self.busy_cycles, self.issue_cycles, self.special_cycles)
        return self.tensor_cycles / max(cycles), self.tensor_cycles / sum(cycles)

    def to_json(self) -> dict[str, Any]:
        overlapped, in_turn = self.model
        return {**asdict(self), "ratio": self.ratio, "model_overlapped": overlapped, "model_in_turn": in_turn}


@dataclass(frozen=True)
class Row:
    """One kernel as launched by one call on one target; `error` says why there are no figures."""

    target: str
    call: str
    kernel: str
    tile: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0  # bytes
    shared_limit: int = 0
    tensor_memory: int = 0  # columns
    programs: int = 0
    tensor_operations: tuple[str, ...] = ()
    loops: tuple[Loop, ...] = field(default=())
    serialised: bool = False
    hazards: tuple[str, ...] = ()  # see hazards.py
    needed_bytes: int = 0  # of global memory, once, in an iteration of the full-tile loop; 0 if nobody counted
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.target} {self.call} {self.kernel}"

    @property
    def fits(self) -> bool:
        """Whether the target has the shared and tensor memory that a program asks for."""
        return self.shared <= self.shared_limit and self.tensor_memory <= MOST_TENSOR_MEMORY_COLUMNS

    @property
    def best(self) -> Loop | None:
        """The full-tile loop, if tensor cores work in it."""
        return next((loop for loop in self.loops if loop.kind == FULL), None)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "loops": [loop.to_json() for loop in self.loops]}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Row:
        names = [field.name for field in fields(Loop)]
        loops = tuple(Loop(*(loop[name] for name in names)) for loop in values["loops"])
        lists = {name: tuple(values[name]) for name in ("tensor_operations", "hazards")}
        return Row(**{**values, "loops": loops, **lists})


FULL, MASKED = "full tile", "masked"


def rows_of(call: Call, target: Target, only: str | None = None, cached: bool = True) -> list[Row]:
    """Every kernel that the call launches on the target, each once; only the kernel `only`, if given. `cached`:
    what was read from the same machine code before need not be read again."""
    try:
        with catching(target, only) as caught:
            call.run()
    except Exception as error:
        last = caught[-1].kernel if caught else "nothing"
        message = f"after {last}: {type(error).__name__}: {error}"
        return [Row(target.name, call.name, only or "a kernel", error=message.splitlines()[0])]
    rows = [
        replace(known_row(compiled, target, cached), call=call.name, needed_bytes=needed_bytes(call, compiled))
        for compiled in caught
    ]
    if not (target.compared and getattr(call, "compared", True)):
        rows = [replace(row, loops=()) for row in rows]
    return list({row.name: row for row in rows}.values())


def needed_bytes(call: Call, compiled: Compiled) -> int:
    """Those of keys and values, once, in an iteration of attention with a cache; 0 for other kernels."""
    if compiled.kernel != "cache_attention_kernel" or not isinstance(call, CacheCall):
        return 0
    keys = int(re.match(r"\d+x(\d+),", compiled.tile)[1])
    if call.stored and call.value_dim and keys <= 16:
        # The columns beside the values are 64 bytes a key: four for each thread of 8 warps, which is no wide load.
        return call.value_dim * keys
    return call.token_bytes * keys


def known_row(compiled: Compiled, target: Target, cached: bool) -> Row:
    """`row_of`, from the cache if this kernel was looked at before. To disassemble one takes longer than to launch
    it, and an edit of a launch table leaves most kernels as they are."""
    code = compiled.artefacts["amdgcn" if target.backend == "hip" else "cubin"]
    file = caching.file_of(
        caching.reading_hash(), target, compiled.kernel, compiled.tile, code, compiled.artefacts["ttir"]
    )
    row = caching.read(file) if cached else None
    if row is None:
        row = row_of(compiled, "", target).to_json()
        caching.write(file, row)
    return Row.from_json(row)


def row_of(compiled: Compiled, call: str, target: Target) -> Row:
    found_wrong = hazards.transposed_products(compiled.artefacts["ttir"])
    if target.backend == "hip":
        found = disassembly.amd_resources(compiled.artefacts["amdgcn"])
        registers, spills, loops, serialised = found.registers, found.spills, (), False
        operations = found.matrix_operations
    else:
        registers, stack, instructions = disassembly.disassemble(compiled.artefacts["cubin"])
        # What is on the stack counts, too: a driver takes it for spilled registers, and so does `fastattn prove`.
        spills = max(sum(i.name in ("STL", "LDL") for i in instructions), stack // 4)
        tensor = disassembly.tensor_operations(instructions, compiled.artefacts["ptx"])
        flops = disassembly.loop_flops(compiled.artefacts["ttir"])
        loops = main_loops(instructions, tensor, flops, compiled.warps, target)
        serialised = disassembly.are_serialised(instructions)
        found_wrong += hazards.of_sass(instructions)
        operations = sorted({str(operation) for operation in tensor.values()})
    shared = compiled.metadata.shared
    return Row(
        target.name,
        call,
        compiled.kernel,
        compiled.tile,
        registers,
        spills,
        shared,
        target.shared_limit,
        getattr(compiled.metadata, "tmem_size", None) or 0,
        resident_programs(registers, shared, compiled.warps, target),
        tuple(operations),
        loops,
        serialised,
        tuple(found_wrong),
    )


def main_loops(
    instructions: list[Instruction],
    tensor: dict[int, TensorOperation],
    flops: list[int],
    warps: int,
    target: Target,
) -> tuple[Loop, ...]:
    """The innermost loops with tensor-core work, of `flops` operations each; the one that issues least for its
    work is the loop over full tiles."""
    codes = disassembly.innermost_loops(instructions, set(tensor))
    if tensor and len(codes) != len(flops):
        raise ValueError(f"{len(codes)} loops in the machine code for {len(flops)} in the source")
    loops = [
        Loop(
            MASKED,
            len(code),
            work / target.tensor_flops,
            sum(busy_cycles(tensor[i.address], warps, target) for i in code if i.address in tensor),
            len(code) * warps / SCHEDULERS,
            sum(i.name == "MUFU" for i in code) * SPECIAL_CYCLES * warps / SCHEDULERS,
            disassembly.loaded_bytes(code, warps),
        )
        for code, work in zip(codes, flops, strict=False)
    ]
    least = min((loop.ratio for loop in loops), default=0.0)
    return tuple(replace(loop, kind=FULL) if loop.ratio == least else loop for loop in loops)


def busy_cycles(operation: TensorOperation, warps: int, target: Target) -> float:
    """Cycles of an SM's tensor cores, of all warps' shares of one instruction."""
    return operation.flops(warps) / target.tensor_flops / operation.efficiency(target.name)


def resident_programs(registers: int, shared: int, warps: int, target: Target) -> int:
    """How many programs an SM holds at once, by registers, shared memory and warps."""
    if target.backend == "hip":
        # Four SIMDs of 512 registers a lane, in units of eight, and at most eight waves each.
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(waves // warps, target.shared_memory // max(1, shared))
    # A warp gets registers in units of 256; they are divided among four schedulers.
    warps_by_registers = REGISTERS // max(256, -(-registers * 32 // 256) * 256) // SCHEDULERS * SCHEDULERS
    return min(
        warps_by_registers // warps,
        target.shared_memory // (shared + RESERVED_SHARED),
        target.warps // warps,
        target.programs,
    )
