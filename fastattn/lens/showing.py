"""How answers show themselves: a table on print, and a picture. rich and matplotlib are imported when needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKED, QUIET = "#1f5fbf", "#8a8f98"


class Shown:
    """An answer that prints as a table: `table()` gives its header and its lines."""

    def table(self) -> list[tuple[str, ...]]:
        raise NotImplementedError

    def __str__(self) -> str:
        lines = self.table()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        return "\n".join(padded)

    __repr__ = __str__

    def __rich__(self) -> Any:
        """The same as a table of rich's, for rich.print(answer)."""
        from rich.table import Table
        from rich.text import Text

        header, *lines = self.table()
        table = Table(*header)
        for line in lines:
            # Text: brackets in a token are no markup.
            table.add_row(*(Text(cell) for cell in line))
        return table


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib's, drawn without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'fastattn[lens]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def finished(figure: Any, path: str | Path | None) -> Any:
    """The figure, saved if there is a path."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def bars(axes: Any, names: Sequence[str], values: Sequence[float], title: str) -> None:
    """Horizontal bars, the first on top."""
    colors = [MARKED if value >= 0 else QUIET for value in values]
    axes.barh(range(len(names)), values, color=colors)
    axes.set_yticks(range(len(names)), _plain(names), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)


def heat(figure: Any, axes: Any, values: Any, title: str, **options: Any) -> None:
    """A matrix (rows, columns) as colours; row 0 at the bottom, as layers lie."""
    image = axes.imshow(values, origin="lower", aspect="auto", interpolation="nearest", **options)
    axes.set_title(title, loc="left", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _plain(names: Sequence[str]) -> list[str]:
    """A dollar sign in a token is no formula."""
    return [name.replace("$", r"\$") for name in names]


plain_labels = _plain
