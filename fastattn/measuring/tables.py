"""Tables on the terminal, and what a proof record says in words."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable

from fastattn.core.capabilities import CLASSES
from fastattn.core.proofs import PROVEN, SLOWER, Record, Row, Tiling

Cells = tuple[str, ...]


def print_table(title: str, rows: Iterable[Cells]) -> None:
    """Plain text: columns as wide as their widest cell, two spaces apart."""
    rows = list(rows)
    columns = max(len(row) for row in rows)
    full = [row + ("",) * (columns - len(row)) for row in rows]
    widths = [max(len(row[column]) for row in full) for column in range(columns)]
    print(title)
    for row in full:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"  {line}".rstrip())
    print()


def show(title: str, rows: list[Cells]) -> None:
    """On a terminal with rich's help, if it is installed; else as plain text. The first row holds the headings."""
    if not sys.stdout.isatty():
        return print_table(title, rows)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return print_table(title, rows)
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
    return None


# ---- records ----


def record_rows(record: Record) -> list[Cells]:
    """A row for each family, direction and kind; a column for each size, over all dtypes and widths."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for key, row in record.rows.items():
        groups.setdefault((key.family, key.direction, key.kind), []).append(row)
    lines: list[Cells] = [("family", "direction", "kind", *CLASSES, "against", "why not")]
    for names, rows in sorted(groups.items(), key=lambda group: group[0][0]):
        cells = (summary([row for row in rows if row.key.size == size]) for size in CLASSES)
        against = dict.fromkeys(row.against for row in rows if row.against)
        lines.append((*names, *cells, ", ".join(against), why_not(rows)))
    return lines


CHOSEN = "tilings that `fastattn prove` chose: faster here than those of the launch tables, which serve all others"


def tiling_rows(record: Record) -> list[Cells]:
    """A row for each tiling that a record chose; none without any. Of slower kernels they serve on request."""
    lines: list[Cells] = [
        (*key[1:4], str(row.tilings_width), key.size, table.removeprefix("ATTENTION_").lower(), _said(tiling))
        for key, row in sorted(record.rows.items())
        if row.verdict in (PROVEN, SLOWER)
        for table, tiling in row.tilings.items()
    ]
    return [("direction", "kind", "dtype", "width", "size", "kernel", "tiling"), *lines] if lines else []


def _said(tiling: Tiling) -> str:
    queries, keys, warps, stages, ahead = tiling
    rest = f"{stages} stage{'s' * (stages != 1)}{', products ahead' if ahead else ''}"
    return f"{queries} x {keys}, {warps} warps, {rest}"


def summary(rows: list[Row]) -> str:
    """Of rows about one kind of call: how many are proven, and how fast they are; "" without rows."""
    if not rows:
        return ""
    right = [row for row in rows if row.verdict in (PROVEN, SLOWER)]
    ratios = sorted(row.ratio for row in right if row.ratio is not None)
    speed = f", {_range(ratios)} x" if ratios else ""
    others = Counter(row.verdict for row in rows if row.verdict not in (PROVEN, SLOWER))
    bad = "".join(f", {n} {verdict}" for verdict, n in sorted(others.items()))
    return f"{sum(row.verdict == PROVEN for row in rows)} of {len(rows)} proven{speed}{bad}"


def _range(ratios: list[float]) -> str:
    low, high = f"{ratios[0]:.2g}", f"{ratios[-1]:.2g}"
    return low if low == high else f"{low} to {high}"


def why_not(rows: list[Row]) -> str:
    """The first reason that is not about speed."""
    return next((row.reason for row in rows if row.verdict not in (PROVEN, SLOWER) and row.reason), "")
