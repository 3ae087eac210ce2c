"""What was seen inside a model: tensors by name, with the reductions that a name may end in."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.lens.adapters import Adapter
from fastattn.lens.places import Kind, Name, find

_STEP = re.compile(r"\.(mean|(head|at|top)\(([^()]*)\))$")


class Top(NamedTuple):
    """The largest values along the last dimension, descending, and where they stand."""

    values: Tensor
    indices: Tensor


class Step(NamedTuple):
    """One reduction: "mean", "head", "at" or "top", with its number or slice."""

    kind: str
    argument: Any = None

    def __str__(self) -> str:
        if self.kind == "mean":
            return ".mean"
        a = self.argument
        inside = (
            f"{'' if a.start is None else a.start}:{'' if a.stop is None else a.stop}"
            if isinstance(a, slice)
            else a
        )
        return f".{self.kind}({inside})"


class Recording(NamedTuple):
    """What was seen under one name: a tensor, or several of one shape (`Top`, `TopKeys`), and its dimensions."""

    value: Any
    axes: tuple[str, ...]


def split_steps(name: str) -> tuple[str, tuple[Step, ...]]:
    """A name without its reductions, and these, in the order in which they are written.

    Raises:
        ValueError: a number is missing or wrong.
    """
    steps: list[Step] = []
    while match := _STEP.search(name):
        kind, written = match[2] or "mean", match[3]
        argument = None if kind == "mean" else _number(kind, written, name)
        steps.insert(0, Step(kind, argument))
        name = name[: match.start()]
    if "(" in name or ")" in name:
        raise ValueError(f"reductions are .mean, .head(3), .at(-1), .at(2:9) and .top(20), got {name!r}")
    if any(step.kind == "top" for step in steps[:-1]):
        raise ValueError(f"top must be the last reduction, got {''.join(map(str, steps))}")
    return name, tuple(steps)


def _number(kind: str, written: str, name: str) -> Any:
    if re.fullmatch(r"\s*-?\d+\s*", written) and (kind != "top" or int(written) > 0):
        return int(written)
    if kind == "at" and re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*", written):
        start, stop = (int(part) if part.strip() else None for part in written.split(":"))
        return slice(start, stop)
    what = {"at": "a position or a slice such as 2:9", "head": "a head", "top": "a number from 1 up"}[kind]
    raise ValueError(f"{kind}(...) must hold {what}, got {written!r} in {name!r}")


def key_of(name: Name, steps: Sequence[Step]) -> str:
    """What a recording is called."""
    return f"{name}{''.join(map(str, steps))}"


def is_wild(pattern: str) -> bool:
    """Whether there is a wildcard in it."""
    return any(sign in pattern for sign in "*?[")


def reduce(value: Any, axes: tuple[str, ...], steps: Sequence[Step], name: str) -> Recording:
    """A tensor of these axes after the reductions.

    Raises:
        ValueError: it has not the dimension that a reduction is of, or no such place in it.
    """
    for kind, argument in steps:
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is not one tensor, and has no reductions")
        if kind == "top":
            value = Top(*value.topk(min(argument, value.shape[-1]), dim=-1))
            axes = (*axes[:-1], "rank")
            continue
        axis = {"mean": "batch", "at": "position", "head": "head"}[kind]
        if axis not in axes:
            raise ValueError(f"{name} has no dimension of {axis}s to take .{kind} of: it has {', '.join(axes)}")
        dim = axes.index(axis)
        # A copy, or all that it was picked from would stay in memory.
        value = value.mean(dim) if kind == "mean" else pick(value, dim, argument, name).clone()
        if not isinstance(argument, slice):
            axes = (*axes[:dim], *axes[dim + 1 :])
    return Recording(value, axes)


def pick(value: Tensor, dim: int, which: int | slice, name: str) -> Tensor:
    """One entry, or a slice, of a dimension.

    Raises:
        ValueError: there is no such entry.
    """
    size = value.shape[dim]
    if isinstance(which, slice):
        index = range(size)[which]
        if not index:
            raise ValueError(f"{name} has {size} there, and nothing from {which.start} to {which.stop}")
        return value.narrow(dim, index.start, len(index))
    if not -size <= which < size:
        raise ValueError(f"{name} has {size} there, got number {which}")
    return value.select(dim, which)


class Seen(Mapping[str, Any]):
    """What `watch` recorded: a mapping from names to tensors, without gradient, in the model's dtype and device.

    `seen[name]` takes any of the names that `watch` takes. With a wildcard in it, the layers are stacked into one
    tensor (layers, ...). `print(seen)` is a table.
    """

    def __init__(self, adapter: Adapter, kinds: dict[str, Kind]) -> None:
        self._adapter, self._kinds = adapter, kinds
        self._asked: dict[str, Name] = {}
        self._recorded: dict[str, Recording] = {}

    def __getitem__(self, name: str) -> Any:
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        pattern, steps = split_steps(name)
        names = [key_of(found, steps) for found in find(pattern, self._adapter, self._kinds)]
        known = [found for found in names if found in self._asked]
        if not known:
            raise KeyError(f"{name} was not asked for; there are {', '.join(self._asked) or 'none'}")
        missing = [found for found in known if found not in self._recorded]
        if missing:
            raise KeyError(f"{missing[0]} was asked for, and did not run while it was watched")
        values = [self._recorded[found].value for found in known]
        if not is_wild(pattern):
            return values[0]
        if isinstance(values[0], tuple):
            return type(values[0])(*(torch.stack(parts) for parts in zip(*values, strict=True)))
        if len({value.shape for value in values}) > 1:
            raise ValueError(f"the layers of {name} have different shapes: take them one by one")
        return torch.stack(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._recorded)

    def __len__(self) -> int:
        return len(self._recorded)

    def __contains__(self, name: object) -> bool:
        try:
            self[name]  # type: ignore[index]
        except (KeyError, ValueError, TypeError):
            return False
        return True

    def axes(self, name: str) -> tuple[str, ...]:
        """What the dimensions of a recorded tensor are: "batch", "head", "position", "key", "width" and so on."""
        return self._recorded[name].axes

    def to_dict(self) -> dict[str, Any]:
        """The recorded tensors by name."""
        return {name: recording.value for name, recording in self._recorded.items()}

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with a row for each number: name, layer, the dimensions that there are, value. Of the
        largest values (`.top`, top_keys) there are also the places where they stand, as index."""
        try:
            import pandas
        except ImportError as problem:
            raise ImportError("to_pandas needs pandas: pip install pandas") from problem
        frames = []
        for name, (value, axes) in self._recorded.items():
            parts = dict(zip(("value", "index"), _in_order(value), strict=False))
            shape = parts["value"].shape
            places = torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)) if shape else None
            columns: dict[str, Any] = {"name": name, "layer": self._asked[name].layer}
            columns |= {axis: places[:, i].numpy() for i, axis in enumerate(axes)} if places is not None else {}
            columns |= {part: _plain(t).flatten().numpy() for part, t in parts.items()}
            frames.append(pandas.DataFrame(columns, index=range(parts["value"].numel())))
        return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame()

    def plot(self, path: Any = None) -> Any:
        """A matplotlib.figure.Figure with a heat map for each kind of tensor: layers by heads, or by positions if
        it has no heads. Weights are averaged over all other dimensions; of vectors (width, neurons) it is the
        root mean square. With a path it is also saved there."""
        try:
            from matplotlib.figure import Figure
        except ImportError as problem:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from problem
        panels = self._panels()
        if not panels:
            raise ValueError("nothing was recorded, so there is nothing to plot")
        figure = Figure(figsize=(5.5, 1.2 + 3.2 * len(panels)), layout="constrained")
        for axes, (title, (rows, layers, across)) in zip(
            figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
        ):
            image = axes.imshow(rows, aspect="auto", interpolation="nearest")
            axes.set(title=title, ylabel="layer", xlabel=across)
            axes.set_yticks(range(len(layers)), layers)
            figure.colorbar(image, ax=axes)
        if path is not None:
            figure.savefig(path)
        return figure

    def _panels(self) -> dict[str, tuple[Any, list[int], str]]:
        """By kind: numbers (layers, heads or positions), which layers, and what runs across."""
        rows: dict[str, list[tuple[int, Tensor, str]]] = {}
        for name, (value, axes) in self._recorded.items():
            asked = self._asked[name]
            row, across = _row(_plain(_in_order(value)[0]), axes)
            rows.setdefault(f"{asked.kind}{name.removeprefix(str(asked))}", []).append((asked.layer, row, across))
        panels = {}
        for title, of_layers in rows.items():
            longest = max(len(row) for _, row, _ in of_layers)
            padded = [
                torch.nn.functional.pad(row, (0, longest - len(row)), value=float("nan"))
                for _, row, _ in of_layers
            ]
            panels[title] = torch.stack(padded).numpy(), [layer for layer, _, _ in of_layers], of_layers[0][2]
        return panels

    def __repr__(self) -> str:
        return f"<Seen: {len(self._recorded)} of {len(self._asked)} names recorded; print it for a table>"

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            return "\n".join("  ".join(row) for row in self._rows())
        console = Console(file=io.StringIO(), width=110)
        console.print(self.__rich__())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("name", "shape", "dtype", *(("mean", "lowest", "highest")))
        for row in self._rows():
            table.add_row(*row)
        return table

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for name, (value, axes) in self._recorded.items():
            first = _in_order(value)[0]
            shape = (
                " x ".join(f"{size} {axis}" for size, axis in zip(first.shape, axes, strict=True)) or "a number"
            )
            numbers = [f"{n:.4g}" for n in _summary(_plain(first))]
            yield name, shape, str(first.dtype).removeprefix("torch."), *numbers


def _in_order(value: Any) -> tuple[Tensor, ...]:
    """A recorded value as tensors, what was measured first: TopKeys holds the keys before the weights."""
    if isinstance(value, Tensor):
        return (value,)
    return (value.weights, value.keys) if hasattr(value, "weights") else tuple(value)


def _plain(value: Tensor) -> Tensor:
    """As numbers that numpy has, on the CPU."""
    return value.float().cpu() if value.dtype in (torch.bfloat16, torch.float16) else value.cpu()


def _summary(value: Tensor) -> tuple[float, float, float]:
    if not value.numel():
        return float("nan"), float("nan"), float("nan")
    value = value.double()
    return float(value.mean()), float(value.min()), float(value.max())


def _row(value: Tensor, axes: tuple[str, ...]) -> tuple[Tensor, str]:
    """A vector by head, or by position, or by whatever dimension is left; and by what it is."""
    value = value.double()
    vectors = [i for i, axis in enumerate(axes) if axis in ("width", "neuron")]
    across = next((axis for axis in ("head", "position", "key", "rank", *axes) if axis in axes), None)
    if vectors and across != axes[vectors[0]]:
        value = value.square()
    if across is None:
        return value.reshape(1), ""
    others = [i for i, axis in enumerate(axes) if axis != across]
    value = value.mean(others) if others else value
    return (value.sqrt() if vectors and across != axes[vectors[0]] else value), across
