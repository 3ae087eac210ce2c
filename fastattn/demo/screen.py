"""What the demo prints: progress on a terminal, plain lines if the output is piped."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fastattn.demo.text import Cost, Runs
from fastattn.lens import HeadScores

SCORE_NAMES = ("induction", "previous token", "duplicate token", "first token")
STRONG = 0.4  # the least score after which a head is named


class Screen:
    """A rich console, with a method for each thing that the demo prints."""

    def __init__(self) -> None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets question marks
        self.console = Console(highlight=False)

    def act(self, title: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{title}", align="left", style="dim")

    def say(self, text: str = "") -> None:
        """A paragraph, in rich's markup."""
        self.console.print(text)

    @contextmanager
    def progress(self, task: str, total: int, note: str = "") -> Iterator[Any]:
        """A progress bar with a note; yields advance(done, note). Shows nothing if the output is not a
        terminal."""
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        with bar:
            number = bar.add_task(task, total=total, note=note)
            yield lambda done, note: bar.update(number, completed=done, note=note)

    def sample(self, prompt: bytes, written: bytes) -> None:
        for title, text in (("held-out text", prompt), ("how the model goes on", written)):
            panel = Panel(Text(readable(text)), title=title, title_align="left", border_style="dim", width=80)
            self.console.print(panel)

    def costs(self, costs: list[Cost]) -> None:
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for heading in (
            "\ntokens",
            "time\nfastattn",
            "\neager",
            "\nratio",
            "peak memory\nfastattn",
            "\neager",
            "\nratio",
        ):
            table.add_column(heading, justify="right")
        for cost in costs:
            times = (*map(seconds, cost.seconds), ratio(*cost.seconds))
            memory = (*map(mebibytes, cost.peak_bytes), ratio(*cost.peak_bytes))
            table.add_row(f"{cost.length:,}", *times, *memory)
        self.console.print(table)

    def heads(self, title: str, scores: HeadScores, even: HeadScores) -> None:
        """A row for each head; scores (layers, heads), and what even attention scores, ()."""
        table = Table(
            title=title, title_justify="left", title_style="", box=None, pad_edge=False, header_style="dim"
        )
        table.add_column("\nlayer.head")
        for name in SCORE_NAMES:
            table.add_column(name.replace(" ", "\n") if " " in name else f"\n{name}", justify="right")
        table.add_column("")
        chance = [float(score) for score in even]
        for head, values in rows_of(scores):
            cells = (Text(score_text(value), style=_shade(value)) for value in values)
            table.add_row(head, *cells, name_of(values, chance))
        table.add_row("chance", *map(score_text, chance), "", style="dim")
        self.console.print(table)


def rows_of(scores: HeadScores) -> list[tuple[str, list[float]]]:
    """A name and four values for each head, in order."""
    layers, heads = scores.induction.shape
    return [
        (f"{layer}.{head}", [float(score[layer, head]) for score in scores])
        for layer in range(layers)
        for head in range(heads)
    ]


def name_of(values: list[float], chance: list[float]) -> str:
    """The name of a head after its highest score, if that is high and well above chance; else ""."""
    named = [
        (value, name)
        for value, even, name in zip(values, chance, SCORE_NAMES, strict=True)
        if value >= max(STRONG, 2 * even)
    ]
    return f"{max(named)[1]} head" if named else ""


def score_text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _shade(value: float) -> str:
    return "bold green" if value >= STRONG else "" if value >= STRONG / 2 else "dim"


def readable(text: bytes) -> str:
    """Bytes as text for a terminal. Invalid bytes and control characters become a replacement character."""
    characters = text.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in characters)


def progress_note(runs: Runs) -> str:
    """The latest losses, shown beside the bar."""
    return "  ".join(f"{run.name} {run.losses[-1]:.2f}" for run in runs if run.losses) + " bits/byte"


def seconds(value: float | None) -> str:
    if value is None:
        return "out of memory"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def mebibytes(value: int | None) -> str:
    return "out of memory" if value is None else f"{value / 2**20:,.0f} MiB"


def ratio(fused: float | None, eager: float | None) -> str:
    return "" if fused is None or eager is None else f"{eager / fused:.1f}"
