"""Errors that compilers have made on Hopper before, searched for in our compiled kernels.

- ptxas (12.9) gave a register that an asynchronous product still reads to another value before the product's wait.
- Triton before 3.7.1 computed a product of a transposed product wrongly.
- An asynchronous copy after a wait needs a barrier between them: a wait holds for one warp, or one warp group,
  and others may still read the buffer that the copy fills.

Each scan returns a sentence for every place it finds, and none for a correct kernel.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Hashable, Iterator

from benchmarks.compile_report.disassembly import Instruction, basic_blocks, successors

# A fragment of 64 x 16 halves (64 x 8 tf32) over a warp group's 128 threads.
FRAGMENT_REGISTERS = 4
# Groups of products in flight that are told apart.
MOST_GROUPS = 8


def of_sass(instructions: list[Instruction]) -> list[str]:
    """What is wrong with a kernel's machine code."""
    return [*overwritten_fragments(instructions), *copies_without_barrier(instructions)]


def along_every_path(
    instructions: list[Instruction],
    start: Hashable,
    step: Callable[[Hashable, Instruction], tuple[Hashable, str]],
) -> list[str]:
    """Walk the control-flow graph with a state that `step` changes; its complaints, in order of addresses."""
    blocks = basic_blocks(instructions)
    edges = successors(blocks)
    found: dict[int, str] = {}
    todo, seen = [(0, start)], {(0, start)}
    while todo:
        number, state = todo.pop()
        for instruction in blocks[number]:
            state, complaint = step(state, instruction)
            if complaint:
                found[instruction.address] = f"{complaint} at {instruction.address:#x}"
        for following in edges[number]:
            if (following, state) not in seen:
                seen.add((following, state))
                todo.append((following, state))
    return [found[address] for address in sorted(found)]


# ---- registers that an asynchronous product reads ----


def overwritten_fragments(instructions: list[Instruction]) -> list[str]:
    """Registers that are an operand of a product in flight, written before the wait for it.

    Products in flight are kept in groups; a product that carries gsb0 closes one, and WARPGROUP.DEPBAR.LE gsb0, n
    waits until only the last n are in flight.
    """

    def step(groups: tuple[frozenset[int], ...], instruction: Instruction):
        # The last group is open: it takes products until one of them closes it.
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            closed, most = groups[:-1], int(instruction.operands.split(",")[1], 16)
            return (*closed[max(0, len(closed) - most) :], groups[-1]), ""
        written = destinations(instruction)
        lost = written & frozenset().union(*groups)
        complaint = ""
        if lost:
            names = ", ".join(f"R{number}" for number in sorted(lost))
            complaint = f"{instruction.name} writes {names}, which a product in flight reads,"
        if instruction.name == "HGMMA":
            groups = (*groups[:-1], groups[-1] | fragment(instruction))
            if "gsb0" in instruction.operands:
                groups = (*groups, frozenset())
            if len(groups) > MOST_GROUPS:  # a loop without a wait would go on for ever
                groups = (groups[0] | groups[1], *groups[2:])
        return groups, complaint

    return along_every_path(instructions, (frozenset(),), step)


def fragment(product: Instruction) -> frozenset[int]:
    """The registers of an HGMMA's left operand; none where it is in shared memory."""
    found = re.match(r"R\d+, R(\d+)\b", product.operands)
    return _registers(int(found[1]), FRAGMENT_REGISTERS) if found else frozenset()


# Instructions whose first register is read.
_READ_ONLY = frozenset(
    (
        "ST",
        "STG",
        "STS",
        "STL",
        "STSM",
        "RED",
        "R2UR",
        "LDGSTS",
        "BAR",
        "MEMBAR",
        "DEPBAR",
        "SYNCS",
        "BRA",
        "EXIT",
        "RET",
    )
)


def destinations(instruction: Instruction) -> frozenset[int]:
    """The registers that an instruction writes."""
    if instruction.name in _READ_ONLY:
        return frozenset()
    # Predicates may come first: SHFL.BFLY PT, R5, ...
    found = re.match(r"(?:!?U?P[T\d]+,\s*)*R(\d+)\b", instruction.operands)
    if not found:
        return frozenset()
    return _registers(int(found[1]), _width(instruction))


def _width(instruction: Instruction) -> int:
    """How many registers it writes, one after the other."""
    opcode = instruction.opcode
    if instruction.name == "HGMMA":
        rows, columns, _ = re.search(r"\.(\d+)x(\d+)x(\d+)\.", opcode).groups()
        return int(rows) * int(columns) // 128
    if instruction.name == "LDSM":
        last = opcode.split(".")[-1]
        return int(last) if last.isdigit() else 1
    if instruction.name == "HMMA" or ".128" in opcode:
        return 4
    return 2 if ".64" in opcode or ".WIDE" in opcode or instruction.name in ("DADD", "DMUL", "DFMA") else 1


def _registers(first: int, count: int) -> frozenset[int]:
    return frozenset(range(first, first + count))


# ---- asynchronous copies ----


def copies_without_barrier(instructions: list[Instruction]) -> list[str]:
    """Asynchronous copies that follow a wait, for copies or for products, with no barrier between."""

    def step(waited: bool, instruction: Instruction):
        if instruction.name == "BAR":
            return False, ""
        if instruction.opcode.startswith("WARPGROUP.DEPBAR") or _waits_for_copies(instruction):
            return True, ""
        late = waited and instruction.name == "LDGSTS"
        return waited, "LDGSTS after a wait without a barrier" if late else ""

    return along_every_path(instructions, False, step)


def _waits_for_copies(instruction: Instruction) -> bool:
    return instruction.name == "DEPBAR" and instruction.operands.startswith("SB0")


# ---- products of transposed products ----


def transposed_products(ttir: str) -> list[str]:
    """Products that take a transposed product, or anything made of one, as an operand, in Triton's own
    representation."""
    lines = [line.split(" loc(")[0].strip() for line in ttir.splitlines()]
    operations = list(_operations(lines))
    products: set[str] = set()  # and what is made of them
    turned: set[str] = set()
    before = -1
    # Until nothing changes: loops carry values back to lines above.
    while before != len(products) + len(turned):
        before = len(products) + len(turned)
        for results, operator, operands in operations:
            if operator == "tt.load":  # a loaded value is not made of a product, even where its address is
                continue
            if operator == "tt.dot" or products.intersection(operands):
                products |= results
            if turned.intersection(operands) or (operator == "tt.trans" and products.intersection(operands)):
                turned |= results
    return [
        f"a product takes a transposed product: {', '.join(results)} = tt.dot {', '.join(operands[:2])}"
        for results, operator, operands in operations
        if operator == "tt.dot" and turned.intersection(operands[:2])
    ]


_NAME = re.compile(r"%\w+(?:#\d+)?")


def _operations(lines: list[str]) -> Iterator[tuple[set[str], str, list[str]]]:
    """(results, operator, operands) of each line. Every value gets a unique name, since two regions may both have
    a %x. The values that a region yields become the results of its loop or branch, one by one; a value that a loop
    carries comes from its initial value, too."""
    numbers = itertools.count()
    scopes: list[dict[str, str]] = [{}]
    regions: list[tuple[list[str], list[str]]] = []  # the results of a loop or branch, and what it carries

    def define(name: str) -> str:
        scopes[-1][name] = f"{name}@{next(numbers)}"
        return scopes[-1][name]

    def find(name: str) -> str:
        return next((scope[name] for scope in reversed(scopes) if name in scope), name)

    for line in lines:
        left, found, right = line.partition(" = ")
        body, named = (right, left) if found and left.startswith("%") else (line, "")
        operands = [find(name) for name in _NAME.findall(body)]
        if body.startswith("scf.yield"):
            results, carried = regions[-1]
            for i, operand in enumerate(operands):
                yield {*results[i : i + 1], *carried[i : i + 1]}, "yield", [operand]
            continue
        if line.startswith("}"):
            if not regions:  # a function's, whose first line is cut short by a loc(
                continue
            scopes.pop()
            region = regions.pop()
            if line.endswith("{"):  # } else {
                scopes.append({})
                regions.append(region)
            continue
        results = [define(name) for name in _results(named)]
        carried = []
        if line.endswith("{"):
            pairs = re.findall(r"(%\w+) = (%\w+(?:#\d+)?)", body.partition("iter_args(")[2])
            begins = [find(outer) for _, outer in pairs]
            scopes.append({})
            carried = [define(inner) for inner, _ in pairs]
            regions.append((results, carried))
            for i, outer in enumerate(begins):
                yield {*results[i : i + 1], carried[i]}, "carry", [outer]
        if not carried:
            yield set(results), body.split(" ")[0], operands


def _results(named: str) -> Iterator[str]:
    """%x, %y, or %x#0, %x#1 for %x:2."""
    for name in filter(None, named.split(", ")):
        first, several, count = name.strip().partition(":")
        yield from (f"{first}#{i}" for i in range(int(count))) if several else (first,)
