"""Machine code to numbers: NVIDIA's SASS as instructions, loops and tensor-core work; AMD's metadata."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


class Instruction(NamedTuple):
    """One line of SASS: its address, guard ("@!P0" or ""), opcode with suffixes, and operands."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def branch_target(self) -> int | None:
        # Loops on sm_80 may leave by a guarded CALL that does not return.
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name in ("BRA", "CALL") else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether control may pass to the next instruction."""
        if self.guard:
            return True
        if self.name == "BRA":
            return not self.operands.startswith("0x")
        return self.name not in ("EXIT", "RET")


class TensorOperation(NamedTuple):
    """What one tensor-core instruction multiplies, and how many warps issue it together (0: one for all)."""

    shape: tuple[int, int, int]
    kind: str
    warps: int

    def flops(self, warps: int) -> int:
        """Floating-point operations of a program of that many warps for one such instruction in its code."""
        m, n, k = self.shape
        return 2 * m * n * k * (warps // self.warps if self.warps else 1)

    def efficiency(self, target: str) -> float:
        """The share of the tensor cores' full rate that this instruction can reach.

        TF32: half. Hopper's old instruction: 0.63 (Luo et al. 2024, arXiv:2402.13499, table of mma). Blackwell's
        on 64 rows: half, as its datapath is 128 rows wide (our assumption).
        """
        if self.kind == "TF32" or (self.kind == "UTCHMMA" and self.shape[0] == 64):
            return 0.5
        return 0.63 if self.kind == "HMMA" and target == "sm_90" else 1.0

    def __str__(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.shape))}"


def disassemble(cubin: bytes) -> tuple[int, int, list[Instruction]]:
    """Registers and bytes of the stack of a thread, and the instructions, of a cubin that holds one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return registers, stack, parse(text)


_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)


def parse(sass: str) -> list[Instruction]:
    return [Instruction(int(at, 16), guard or "", code, rest) for at, guard, code, rest in _LINE.findall(sass)]


def tensor_operations(instructions: list[Instruction], ptx: str) -> dict[int, TensorOperation]:
    """Address -> what the tensor-core instruction there does."""
    found = {}
    for instruction in instructions:
        if instruction.name == "HMMA":
            m, n, k = re.search(r"\.(16)(8)(\d+)\.", instruction.opcode).groups()
            kind = "TF32" if "TF32" in instruction.opcode else "HMMA"
            found[instruction.address] = TensorOperation((int(m), int(n), int(k)), kind, 1)
        elif instruction.name == "HGMMA":
            shape = re.search(r"\.(\d+)x(\d+)x(\d+)\.", instruction.opcode).groups()
            found[instruction.address] = TensorOperation(tuple(map(int, shape)), "HGMMA", 4)
    fifth = [i.address for i in instructions if i.name == "UTCHMMA"]
    shapes = fifth_generation_shapes(ptx) if fifth else []
    if len(shapes) != len(fifth):
        raise ValueError(f"{len(fifth)} UTCHMMA instructions, but {len(shapes)} tcgen05.mma in the PTX")
    return found | {at: TensorOperation(shape, "UTCHMMA", 0) for at, shape in zip(fifth, shapes, strict=True)}


def fifth_generation_shapes(ptx: str) -> list[tuple[int, int, int]]:
    """The shapes of a kernel's tcgen05.mma, in order: they stand in a descriptor, not in the instruction's name
    (PTX ISA, "Instruction descriptor": bits 17 to 22 hold N / 8, bits 24 to 28 hold M / 16)."""
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx))
    shapes = []
    # [accumulator], a matrix in shared memory or [in tensor memory], one in shared memory, descriptor
    for register in re.findall(r"tcgen05\.mma\.\S+\s+\[[^\]]*\],\s*(?:\[[^\]]*\]|\S+),\s*\S+,\s*(%r\d+),", ptx):
        descriptor = int(constants[register])
        shapes.append(((descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8, 16))
    return shapes


def innermost_loops(instructions: list[Instruction], addresses: set[int]) -> list[list[Instruction]]:
    """The loops that hold some of the addresses, without those that hold a smaller such loop, in code order.

    These are natural loops of the control-flow graph: a wait that the assembler moved elsewhere in the code counts
    in the loop that runs it.
    """
    blocks = basic_blocks(instructions)
    loops = [
        (body, [i for number in sorted(body) for i in blocks[number]])
        for body in natural_loops(successors(blocks))
    ]
    loops = [(body, code) for body, code in loops if any(i.address in addresses for i in code)]
    inner = [code for body, code in loops if not any(other < body for other, _ in loops)]
    return sorted(inner, key=lambda code: code[0].address)


def basic_blocks(instructions: list[Instruction]) -> list[list[Instruction]]:
    targets = {i.branch_target for i in instructions}
    blocks: list[list[Instruction]] = [[]]
    for instruction in instructions:
        previous = blocks[-1][-1] if blocks[-1] else None
        ends = previous is not None and (previous.branch_target is not None or not previous.falls_through)
        if previous is not None and (ends or instruction.address in targets):
            blocks.append([])
        blocks[-1].append(instruction)
    return blocks


def successors(blocks: list[list[Instruction]]) -> list[list[int]]:
    starts = {block[0].address: number for number, block in enumerate(blocks)}
    edges = []
    for number, block in enumerate(blocks):
        last = block[-1]
        out = [starts[last.branch_target]] if last.branch_target in starts else []
        if last.falls_through and number + 1 < len(blocks):
            out.append(number + 1)
        edges.append(out)
    return edges


def natural_loops(edges: list[list[int]]) -> list[frozenset[int]]:
    """Bodies of the graph's natural loops, one a header (Aho, Lam, Sethi, Ullman 2006, section 9.6.6)."""
    before: list[list[int]] = [[] for _ in edges]
    for node, out in enumerate(edges):
        for other in out:
            before[other].append(node)
    dominators = dominator_sets(before)
    bodies: dict[int, set[int]] = {}
    for tail, out in enumerate(edges):
        for head in out:
            if dominators[tail] >> head & 1:
                bodies.setdefault(head, {head}).update(reaching(tail, head, before))
    return [frozenset(body) for body in bodies.values()]


def dominator_sets(before: list[list[int]]) -> list[int]:
    """For each node the set, as bits, of nodes on every path to it from node 0; 0 for unreachable nodes."""
    everything = (1 << len(before)) - 1
    dominators = [1] + [everything] * (len(before) - 1)
    changed = True
    while changed:
        changed = False
        for node in range(1, len(before)):
            common = functools.reduce(int.__and__, (dominators[b] for b in before[node]), everything)
            new = common | 1 << node
            changed |= new != dominators[node]
            dominators[node] = new
    return [0 if node and not before[node] else bits for node, bits in enumerate(dominators)]


def reaching(tail: int, head: int, before: list[list[int]]) -> set[int]:
    """The nodes from which `tail` is reached without passing `head`."""
    seen, todo = {head}, [tail]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += before[node]
    return seen


def loaded_bytes(instructions: list[Instruction], warps: int) -> int:
    """What the threads of a program ask of global memory, by loads of 8 bytes or more, where each of these
    instructions runs once. Narrower loads are of single numbers, which neighbours share."""
    widths = [re.search(r"\.(128|64)(?:\.|$)", i.opcode) for i in instructions if i.name in ("LDG", "LDGSTS")]
    return 32 * warps * sum(int(found[1]) // 8 for found in widths if found)


def are_serialised(instructions: list[Instruction]) -> bool:
    """Whether the assembler makes every asynchronous product of sm_90 wait for the one before. It does so in a
    whole kernel, without an error, where it cannot prove that no instruction uses an accumulator meanwhile
    (C7515)."""
    products = sum(i.name == "HGMMA" for i in instructions)
    waits = sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in instructions)
    return 0 < products <= waits


def loop_flops(ttir: str) -> list[int]:
    """For each innermost loop of a kernel with matrix products, in order, the floating-point operations of those
    products: as the source has them, read from Triton's own representation, whatever instructions they become."""
    found: list[int] = []
    opened: list[list[int] | None] = []  # the regions around a line; for loops, the operations within
    for line in map(str.strip, ttir.splitlines()):
        if line.startswith("}") and opened:
            inner = opened.pop()
            found += [sum(inner)] if inner else []
        shapes = re.search(r"= tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", line)
        if shapes:
            m, k, n = map(int, shapes.groups())
            loop = next((region for region in reversed(opened) if region is not None), [])
            loop.append(2 * m * n * k)
        if line.split(" loc(")[0].endswith("{"):
            opened.append([] if "scf.for" in line else None)
    return found


class AMDResources(NamedTuple):
    """Of one code object: vector registers a lane, spilled registers, and the MFMA instructions present."""

    registers: int
    spills: int
    matrix_operations: list[str]


def amd_resources(assembly: str) -> AMDResources:
    """Read the metadata that ends a kernel's assembly, the text of its code object."""
    lines = re.findall(r"^\s+(?:- )?\.(\w+): +(\d+)$", assembly, re.MULTILINE)
    field = {name: int(value) for name, value in lines}
    return AMDResources(
        field["vgpr_count"],
        field["vgpr_spill_count"] + field["sgpr_spill_count"],
        sorted(set(re.findall(r"\bv_mfma_\w+", assembly))),
    )
