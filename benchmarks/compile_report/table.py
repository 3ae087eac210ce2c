"""The report as a table."""

from __future__ import annotations

from rich import box
from rich.table import Table

from benchmarks.compile_report.rows import Loop, Row

COLUMNS = (
    "kernel",
    "tile",
    "regs",
    "spills",
    "shared KiB",
    "per SM",
    "tensor instructions",
    "loop",
    "instr./warp",
    "tensor",
    "tensor busy",
    "issue",
    "exp2",
    "issue/tensor",
    "model: % of limit",
    "bytes / needed",
)
_TEXT_COLUMNS = ("kernel", "tile", "tensor instructions", "loop")


def table_of(title: str, rows: list[Row]) -> Table:
    """One line for each main loop; cycles are those of one program on one SM."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in _TEXT_COLUMNS else "right", overflow="fold")
    for row in rows:
        if row.error:
            table.add_row(row.kernel, row.error)
            continue
        lines = [loop_cells(loop, row.needed_bytes) for loop in row.loops] or [()]
        table.add_row(*kernel_cells(row), *lines[0])
        for line in lines[1:]:
            table.add_row(*[""] * len(kernel_cells(row)), *line)
    return table


def kernel_cells(row: Row) -> tuple[str, ...]:
    return (
        row.kernel.removesuffix("_kernel"),
        row.tile,
        str(row.registers),
        str(row.spills),
        f"{row.shared / 1024:.0f} of {row.shared_limit / 1024:.0f}",
        str(row.programs),
        "\n".join([*row.tensor_operations, *["one at a time"] * row.serialised]),
    )


def loop_cells(loop: Loop, needed_bytes: int) -> tuple[str, ...]:
    overlapped, in_turn = loop.model
    return (
        loop.kind,
        str(loop.instructions),
        f"{loop.tensor_cycles:.0f}",
        f"{loop.busy_cycles:.0f}",
        f"{loop.issue_cycles:.0f}",
        f"{loop.special_cycles:.0f}",
        f"{loop.ratio:.2f}",
        f"{100 * overlapped:.0f} to {100 * in_turn:.0f}",
        f"{loop.loaded_bytes / needed_bytes:.2f}" if needed_bytes else "",
    )
