"""The demo's pictures, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fastattn.demo.induction import Look, phase_change
from fastattn.demo.screen import SCORE_NAMES, rows_of, score_text
from fastattn.demo.text import Cost, Runs
from fastattn.lens import HeadScores

FUSED, EAGER, QUIET = "#1f5fbf", "#e07b00", "#8a8f98"
LINES: tuple[dict[str, Any], ...] = (
    {"color": FUSED, "lw": 3.2, "alpha": 0.55},
    {"color": EAGER, "lw": 1.3, "ls": (0, (4, 2))},
)


def text_training(runs: Runs, difference: float, costs: list[Cost], path: Path) -> Path:
    """Loss curves of both models, and what a step costs them by length."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    losses, times, memory = figure.subplots(1, 3, width_ratios=(1.7, 1, 1))
    _losses(losses, runs, difference)
    lengths = [cost.length for cost in costs]
    _cost(times, lengths, [cost.seconds for cost in costs], "seconds for one training step")
    in_mebibytes = [tuple(None if b is None else b / 2**20 for b in cost.peak_bytes) for cost in costs]
    _cost(memory, lengths, in_mebibytes, "peak memory of one training step, MiB")
    return _save(figure, path)


def _losses(axes: Axes, runs: Runs, difference: float) -> None:
    for run, line in zip(runs, LINES, strict=True):
        axes.plot(range(len(run.losses)), run.losses, label=f"{run.name}, training", **line)
    for run, line, marker, size in zip(runs, LINES, "os", (9, 4.5), strict=True):
        axes.plot(
            *zip(*run.held_out, strict=True), marker, color=line["color"], ms=size, label=f"{run.name}, held out"
        )
    axes.set(xlabel="step", ylabel="bits per byte")
    _logarithmic(axes)
    axes.set_title(f"The two training curves differ by at most {difference:.0e} bits", loc="left", fontsize=10)
    axes.legend(frameon=False, ncols=2, loc="upper right", fontsize=9)
    plain(axes)


def _cost(axes: Axes, lengths: list[int], values: list[tuple], title: str) -> None:
    for index, (name, color) in enumerate((("fastattn", FUSED), ("eager", EAGER))):
        known = [
            (length, pair[index]) for length, pair in zip(lengths, values, strict=True) if pair[index] is not None
        ]
        if not known:
            continue
        axes.plot(*zip(*known, strict=True), "o-", color=color, ms=4, label=name)
    axes.set_xscale("log", base=2)
    _logarithmic(axes)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens in the sequence")
    axes.set_title(title, loc="left", fontsize=10)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    plain(axes)


def induction_training(looks: list[Look], path: Path) -> Path:
    """The loss through the phase change, and the heads whose scores rise at the same time."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, scores = figure.subplots(2, 1, sharex=True)
    steps = [look.step for look in looks]
    losses.plot(steps, [look.first_loss for look in looks], color=QUIET, label="tokens seen for the first time")
    losses.plot(steps, [look.repeat_loss for look in looks], color=FUSED, lw=2, label="repeated tokens")
    losses.set(ylabel="loss, nats", ylim=(0, None))
    losses.set_title("Two layers of attention learn to copy, all at once", loc="left", fontsize=10)
    losses.legend(frameon=False, loc="lower left", fontsize=9)
    for layer, color in ((0, EAGER), (1, FUSED)):
        for name, style in (("induction", "-"), ("previous_token", ":")):
            best = [float(getattr(look.scores, name)[layer].max()) for look in looks]
            label = f"layer {layer}, {name.replace('_', ' ')}"
            scores.plot(steps, best, color=color, ls=style, lw=2, label=label)
    scores.set(xlabel="step", ylabel="best head's score", ylim=(-0.02, 1.02))
    scores.set_title("A previous-token head below, induction heads above", loc="left", fontsize=10)
    scores.legend(frameon=False, loc="upper left", fontsize=9)
    change = phase_change(looks)
    for axes in (losses, scores):
        plain(axes)
        if change:
            axes.axvspan(*change, color=QUIET, alpha=0.15, lw=0)
    return _save(figure, path)


def head_scores(models: dict[str, tuple[HeadScores, HeadScores]], path: Path) -> Path:
    """A heat map for each model, from its scores and those of even attention: a row for each head."""
    rows = 1 + max(scores.induction.numel() for scores, _ in models.values())
    figure = Figure(figsize=(5.2 * len(models), 1.6 + 0.34 * rows), layout="constrained")
    every_axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, (title, (scores, even)) in zip(every_axes, models.items(), strict=True):
        _heat_map(axes, title, scores, even)
    figure.colorbar(every_axes[0].images[0], ax=figure.axes, shrink=0.6, label="score").outline.set_visible(False)
    return _save(figure, path)


def _heat_map(axes: Axes, title: str, scores: HeadScores, even: HeadScores) -> None:
    layers, heads = scores.induction.shape
    rows = [*rows_of(scores), ("chance", [float(score) for score in even])]
    values = [entries for _, entries in rows]
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, entries in enumerate(values):
        for column, value in enumerate(entries):
            ink = "white" if value > 0.6 else "black"
            axes.text(column, row, score_text(value), ha="center", va="center", color=ink, fontsize=8)
    for layer in range(1, layers + 1):
        axes.axhline(layer * heads - 0.5, color="white", lw=3)
    axes.set_xticks(range(len(SCORE_NAMES)), [name.replace(" ", "\n") for name in SCORE_NAMES])
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylabel("layer.head")
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with round numbers written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def plain(axes: Axes) -> None:
    """Two spines and a quiet grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
