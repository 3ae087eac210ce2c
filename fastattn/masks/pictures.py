"""Masks as block pictures: which granules are full, partial and empty."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastattn.masks.lists import GRANULE, BlockLists, Lowered
from fastattn.masks.lowering import EMPTY, FULL, PARTIAL

CHARACTERS = {EMPTY: "·", PARTIAL: "▒", FULL: "█"}
COLOURS = ("#f4f4f0", "#e3a857", "#2a5a8c")


def text(title: str, lowered: Lowered, at: tuple[int, int], width: int) -> str:
    """The picture of batch element and head `at`, at most `width` characters wide, under a caption."""
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    states = granule_states(lowered, at)
    step = max(1, -(-states.shape[1] // width))
    lines = ["".join(CHARACTERS[state] for state in row) for row in _pooled(states, step).tolist()]
    scale = f"one character = {step * GRANULE} x {step * GRANULE} pairs"
    legend = ", ".join(
        f"{CHARACTERS[s]} {name}" for s, name in ((FULL, "full"), (PARTIAL, "partial"), (EMPTY, "empty"))
    )
    return "\n".join([title, _caption(lowered), f"{scale}: {legend}", *lines])


def png(path: str | Path, title: str, lowered: Lowered, at: tuple[int, int]) -> None:
    """The picture of batch element and head `at`, as a file."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing a mask as PNG needs matplotlib: pip install 'fastattn[lens]'") from error
    shape, states = lowered.shape, granule_states(lowered, at)
    figure = Figure(figsize=(6, 6.6), layout="constrained")
    axes = figure.add_subplot()
    extent = (0, states.shape[1] * GRANULE, states.shape[0] * GRANULE, 0)
    axes.imshow(
        states.numpy(), cmap=ListedColormap(COLOURS), vmin=EMPTY, vmax=FULL, extent=extent, interpolation="none"
    )
    axes.set(xlim=(0, shape.keys), ylim=(shape.queries, 0), xlabel="key", ylabel="query")
    axes.set_title(f"{title}\n{_caption(lowered)}", fontsize=9, wrap=True)
    names = zip(COLOURS, ("empty", "partial", "full"), strict=True)
    handles = [Patch(facecolor=colour, edgecolor="grey", label=name) for colour, name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, format="png", dpi=150)


def granule_states(lowered: Lowered, at: tuple[int, int]) -> Tensor:
    """EMPTY, PARTIAL or FULL of each granule, int8 (R, C), of batch element and head `at`."""
    lists, shape = lowered.lists, lowered.shape
    assert lists is not None
    for name, index, size in (("batch", at[0], shape.batch), ("head", at[1], shape.heads)):
        if not 0 <= index < size:
            raise ValueError(f"at must name a {name} from 0 to {size - 1}, got {index}")
    pattern = int(lists.pattern.expand(shape.batch, shape.heads)[at])
    states = torch.full((shape.rows, shape.columns), EMPTY, dtype=torch.int8)
    for state, (rows, columns) in (
        (FULL, _cells(lists, pattern, "full")),
        (PARTIAL, _cells(lists, pattern, "partial")),
    ):
        states[rows.cpu(), columns.cpu()] = state
    return states


def _cells(lists: BlockLists, pattern: int, kind: str) -> tuple[Tensor, Tensor]:
    """The rows and columns of one kind of entries."""
    offsets = getattr(lists, f"{kind}_offsets")[pattern].long()
    rows = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())
    return rows, getattr(lists, f"{kind}_columns")[int(offsets[0]) : int(offsets[-1])].long()


def _pooled(states: Tensor, step: int) -> Tensor:
    """step x step granules as one: full or empty only if all are."""
    rows, columns = (torch.arange(n) // step for n in states.shape)
    cell = (rows[:, None] * -(-states.shape[1] // step) + columns).flatten()
    height, width = (-(-n // step) for n in states.shape)
    least = torch.full((height * width,), FULL, dtype=torch.int8).scatter_reduce_(
        0, cell, states.flatten(), "amin"
    )
    most = torch.full((height * width,), EMPTY, dtype=torch.int8).scatter_reduce_(
        0, cell, states.flatten(), "amax"
    )
    return torch.where(least == most, least, PARTIAL).view(height, width)


def _caption(lowered: Lowered) -> str:
    shape, visited = lowered.shape, lowered.visited_granules
    total = shape.batch * shape.heads * shape.queries * shape.keys
    density = lowered.visible / total if total else 0.0
    ratio = f", visited / ideal {visited / lowered.ideal_granules:.2f}" if lowered.visible else ""
    return f"{shape.queries} queries x {shape.keys} keys, density {density:.2%}{ratio}"
