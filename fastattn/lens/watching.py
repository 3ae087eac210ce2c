"""Watch what happens inside a model while it runs: `with watch(model, "blocks.*.out") as seen: model(tokens)`."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.core.statistics.functional import attention_statistics
from fastattn.ground.arguments import integer, tensor
from fastattn.lens.adapters import Adapter, adapt
from fastattn.lens.places import Call, Kind, Name, find, kinds_of, listen, read

PATTERN_LIMIT = 2**24  # weights of one pattern, over batch and heads: 64 MiB in fp32

_BY_QUERY, _BY_KEY = ("batch", "head", "position"), ("batch", "head", "key")
# Statistics of attention, as `attention_statistics` names them, by their axes.
STATISTICS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("entropy", "max_logit", "max_weight", "sum_of_squares", "mean_distance", "mass", "value_norm"), _BY_QUERY
    ),
    "top_keys": (*_BY_QUERY, "rank"),
    **dict.fromkeys(("received", "max_received", "received_value_norm"), _BY_KEY),
    "lag_profile": ("batch", "head", "lag"),
    "thumbnail": ("batch", "head", "row", "column"),
}
# Weight on the keys whose labels match the query's, as `match_mass` names the kinds.
MATCHES = ("induction", "duplicate", "previous", "first")
PATTERN_AXES = ("batch", "head", "position", "key")

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


def _key(name: Name, steps: Sequence[Step]) -> str:
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
        names = [_key(found, steps) for found in find(pattern, self._adapter, self._kinds)]
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


@contextmanager
def watch(
    model: nn.Module,
    names: str | Sequence[str],
    *,
    labels: Tensor | None = None,
    top: int = 8,
    pattern_limit: int = PATTERN_LIMIT,
) -> Iterator[Seen]:
    """Record tensors inside a model while it runs, and statistics of its attention.

    Names, with wildcards (`*` is anything but a dot, `[0-3]` one of these):

    - `blocks.3.resid_pre`, `.resid_mid`, `.resid_post`: the residual stream (B, L, d);
    - `blocks.3.attention.hook_q`, `.hook_k`, `.hook_v`, `.hook_z`: (B, heads, L, D), queries, keys and values as
      attention takes them and what the heads read; `.out`: what attention adds to the stream;
    - `blocks.3.mlp.hook_post` or `.neurons`: (B, L, neurons), what the MLP's last layer is given; `.out`;
    - `blocks.3.attention.entropy` and the other statistics of `attention_statistics`, in O(L) memory: by query
      (B, Hq, L) entropy, max_logit, max_weight, sum_of_squares, mean_distance, mass, value_norm, top_keys; by key
      (B, Hq, L) received, max_received, received_value_norm; lag_profile and thumbnail. They are of the weights
      before dropout;
    - with `labels`, `.induction`, `.duplicate`, `.previous` and `.first`: the weight on such keys (B, Hq, L), as
      `match_mass` defines them;
    - `blocks.3.attention.pattern`: the weights (B, Hq, Lq, Lk) themselves, up to `pattern_limit` of them.

    A wildcard at the end of a name means tensors; statistics and patterns must be named.

    Names of TransformerLens are known, too (`blocks.3.attn.hook_q`, `blocks.3.hook_resid_post`).

    Reductions at the end of a name are made on the way, so that only their result is kept: `.mean` over the batch,
    `.head(3)`, `.at(-1)` or `.at(2:9)` of the positions, `.top(20)` along the last dimension (values and indices).

    Each forward within the block replaces what the one before it recorded. Nothing else is kept, and nothing is
    left in the model after the block. A model whose neurons are watched computes its MLPs layer by
    layer, not fused.

    Args:
        model: a model that `adapt` knows: one of this library's, or one of Hugging Face's with attn_implementation
            "fastattn" or "sdpa", patched by `fastattn.patch` or not; or one with a torch.nn.TransformerEncoder in
            it, patched. It must not be compiled.
        names: one or several.
        labels: integers (B, Lk), the token ids say.
        top: how many keys top_keys has.
        pattern_limit: how many weights one pattern may have.

    Yields:
        `Seen`, a mapping from names to tensors.

    Raises:
        ValueError: a name that means nothing in this model (the error says what there is), statistics of a Hugging
            Face model that attends in another way, or, in the forward, a pattern above the limit.

    Example:
        >>> sizes = {"vocab_size": 64, "embed_dim": 64, "num_heads": 4, "num_layers": 2}
        >>> model = fastattn.nn.TransformerModel(**sizes, positions="rotary")
        >>> with watch(model, ["blocks.*.resid_post", "blocks.1.attention.hook_z.at(-1)"]) as seen:
        ...     logits = model(torch.randint(64, (1, 32)))
        >>> seen["blocks.*.resid_post"].shape
        torch.Size([2, 1, 32, 64])

    Source: names and what they mean: Nanda and Bloom, TransformerLens (2022).
    """
    adapter = adapt(model)
    pattern_limit, top = integer("pattern_limit", pattern_limit, least=0), integer("top", top, least=1)
    if labels is not None:
        tensor("labels", labels)
    kinds = _kinds(adapter)
    seen = Seen(adapter, kinds)
    asked = _asked(names, adapter, kinds)
    if labels is None and (needed := [str(n) for n, _ in asked.values() if _statistic(n) in MATCHES]):
        raise ValueError(f"labels must be given for {needed[0]}: integers (B, Lk), such as token ids; got None")
    seen._asked = {key: name for key, (name, _) in asked.items()}
    with ExitStack() as stack:
        of_layers: dict[int, list[tuple[Name, tuple[Step, ...]]]] = {}
        for name, steps in asked.values():
            if _statistic(name) is None:
                handle = read(adapter, name, _recorder(seen, name, steps))
                stack.callback(handle.remove)
            else:
                of_layers.setdefault(name.layer, []).append((name, steps))
        for layer, wanted in of_layers.items():
            observer = _Observer(seen, wanted, labels, top, pattern_limit)
            stack.callback(listen(adapter, layer, observer).remove)
        yield seen


def _kinds(adapter: Adapter) -> dict[str, Kind]:
    """All that can be asked for."""
    statistics = {**STATISTICS, **dict.fromkeys(MATCHES, _BY_QUERY), "pattern": PATTERN_AXES}
    return {
        **kinds_of(adapter),
        **{f"attention.{name}": Kind((f"attn.{name}",), axes) for name, axes in statistics.items()},
        "attention.pattern": Kind(("attn.pattern", "attention.hook_pattern", "attn.hook_pattern"), PATTERN_AXES),
    }


def _statistic(name: Name) -> str | None:
    """Which statistic of attention this is; None for a tensor."""
    part = name.kind.removeprefix("attention.")
    return part if part in STATISTICS or part in MATCHES or part == "pattern" else None


def _asked(names: Any, adapter: Adapter, kinds: dict[str, Kind]) -> dict[str, tuple[Name, tuple[Step, ...]]]:
    """Every name that is meant, with its reductions, by what it is called in `Seen`."""
    names = [names] if isinstance(names, str) else list(names)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be one or several strings, got {names!r}")
    asked: dict[str, tuple[Name, tuple[Step, ...]]] = {}
    for name in names:
        pattern, steps = split_steps(name)
        # A wildcard at the end means tensors: the rest costs a computation of its own, and is named.
        tensors_only = is_wild(pattern.rpartition(".")[2])
        found = [n for n in find(pattern, adapter, kinds) if not (tensors_only and _statistic(n))]
        if not found:
            raise ValueError(
                f"{name!r} matches statistics alone: name each of them, without a wildcard at the end"
            )
        for one in found:
            _check_steps(one, steps, adapter, kinds)
            asked[_key(one, steps)] = one, steps
    return asked


def _check_steps(name: Name, steps: tuple[Step, ...], adapter: Adapter, kinds: dict[str, Kind]) -> None:
    """Raise for a reduction that this cannot have, before anything runs."""
    axes = kinds[name.kind].axes
    heads = adapter.num_kv_heads if name.kind in ("attention.hook_k", "attention.hook_v") else adapter.num_heads
    if steps and name.kind == "attention.top_keys":
        raise ValueError(f"{name} is not one tensor, and has no reductions")
    shape = [heads if axis == "head" else 1 for axis in axes]
    rehearsed = [step._replace(argument=0) if step.kind == "at" else step for step in steps]
    reduce(torch.empty(shape, device="cpu"), axes, rehearsed, str(name))


def _recorder(seen: Seen, name: Name, steps: tuple[Step, ...]) -> Any:
    axes, key = seen._kinds[name.kind].axes, _key(name, steps)

    def record(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach()
        with torch.no_grad():
            seen._recorded[key] = reduce(value, axes, steps, str(name))

    return record


class _Observer:
    """What is asked of one layer's attention, computed from its call: all statistics together, in one go."""

    def __init__(
        self,
        seen: Seen,
        wanted: list[tuple[Name, tuple[Step, ...]]],
        labels: Tensor | None,
        top: int,
        pattern_limit: int,
    ) -> None:
        self.records = [(_statistic(name), _recorder(seen, name, steps)) for name, steps in wanted]
        self.layer = wanted[0][0].layer
        self.labels, self.top, self.pattern_limit = labels, top, pattern_limit

    @torch.no_grad()
    def __call__(self, call: Call) -> None:
        call = Call(call.q.detach(), call.k.detach(), call.v.detach(), call.options)
        names = {name for name, _ in self.records}
        found: dict[Any, Any] = {}
        if "pattern" in names:
            found["pattern"] = self._pattern(call)
        if names - {"pattern"}:
            found |= self._statistics(call, names)
        for name, record in self.records:
            record(found[name])

    def _pattern(self, call: Call) -> Tensor:
        """The weights: what attention reads where each key's value is its own unit vector."""
        batch, heads, queries, keys = (*call.q.shape[:3], call.k.shape[2])
        if (count := batch * heads * queries * keys) > self.pattern_limit:
            raise ValueError(
                f"the pattern of block {self.layer} has {batch} x {heads} x {queries} x {keys} = {count:,} "
                f"weights, above pattern_limit={self.pattern_limit:,}. Statistics answer most questions in O(L) "
                f"memory: "
                f"{', '.join(('attention.' + name) for name in (*STATISTICS, *MATCHES))}"
            )
        unit = torch.eye(keys, dtype=call.v.dtype, device=call.v.device)
        # Values as wide as there are keys are more than the kernels compute: the backend is free.
        return call.attend(v=unit.expand(batch, call.k.shape[1], keys, keys), backend=None)

    def _statistics(self, call: Call, names: set[str | None]) -> dict[str, Any]:
        matches = [kind for kind in MATCHES if kind in names]
        want = [name for name in STATISTICS if name in names] + (["match_mass"] if matches else [])
        _, lse = call.attend(return_lse=True)
        asked: dict[str, Any] = {"labels": self.labels, "match": matches} if matches else {}
        result = attention_statistics(
            call.q, call.k, lse, call.v, want=want, top=self.top, **asked, **call.options
        )._asdict()
        if matches:
            mass = result.pop("match_mass")
            result |= dict(zip(matches, getattr(mass, "mass", mass), strict=True))
        return result
