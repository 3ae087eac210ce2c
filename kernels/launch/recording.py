"""Recordings: what a call did once, done again for other tensors that are alike.

Between a backend's function and the GPU's driver lies Python that takes longer than a GPU takes for small tensors.
What it does follows from the tensors' shapes, strides, dtypes and devices. So the steps of a call are recorded:
PyTorch's operators, those that allocate among them, and launches. Of tensors they hold the numbers only. For the
next tensors that are alike the steps are taken again; a compiled kernel gets addresses.

A call that reads what a tensor holds, or that uses a tensor which neither came with it nor was made by it, has no
recording.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

_aten = torch.ops.aten
_ALLOCATIONS = (_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty, _aten.new_empty_strided)

Tensors = Sequence[torch.Tensor | None]


class _Active(threading.local):
    recorder: Recorder | None = None


_active = _Active()


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **keywords: Any) -> None:
    """Launch `kernel`. Kernels are launched here and nowhere else, so that a recording knows of each launch."""
    recorder = _active.recorder
    if recorder is None:
        kernel[grid](*arguments, **keywords)
    elif isinstance(kernel, InterpretedFunction):
        with _disable_current_modes():  # the interpreter computes with tensors of its own
            kernel[grid](*arguments, **keywords)
        recorder.launched(_Interpreted(kernel, grid, keywords), arguments)
    else:
        compiled = kernel[grid](*arguments, **keywords)
        choices = [keywords[name] for name in kernel.arg_names[len(arguments) :]]
        recorder.launched(compiled[(*grid, 1, 1)[:3]], (*arguments, *choices))


def record(function: Callable[..., Any], tensors: Tensors) -> tuple[Any, Recording | None]:
    """function(*tensors), and its recording; None if it has none. The outcome is a tensor, None or a tuple of
    them."""
    if len({id(t) for t in tensors if t is not None}) < sum(t is not None for t in tensors):
        return function(*tensors), None  # of two that are one, nobody knows which of them a step means
    with Recorder(tensors) as recorder:
        outcome = function(*tensors)
    return outcome, recorder.recording(outcome)


class Recording:
    """The steps of a call, for tensors of the same shapes, strides, dtypes and devices, and of the same alignment
    to 16 bytes: a kernel is compiled for it."""

    def __init__(self, device: torch.device, steps: list[_Step], places: int, outcome: _Filler) -> None:
        self._device, self._steps, self._outcome = device, steps, outcome
        self._empty = [None] * places

    def __call__(self, tensors: Tensors) -> Any:
        """What the recorded function would return for these tensors."""
        if self._device.type == "cuda" and torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                return self._repeat(tensors)
        return self._repeat(tensors)

    def _repeat(self, tensors: Tensors) -> Any:
        made: list[Any] = [*tensors, *self._empty]
        for run, arguments, keywords, first, count, free in self._steps:
            result = run(*arguments(made), **keywords)
            if count == 1:
                made[first] = result[0] if type(result) is list else result
            elif count:
                made[first : first + count] = result
            result = None
            for number in free:
                made[number] = None
        return self._outcome(made)


class Recorder(TorchDispatchMode):
    """Records the steps that are taken inside the block."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self._inputs = len(tensors)
        self._device = next(t.device for t in tensors if t is not None)
        self._tensors: list[
            torch.Tensor | None
        ] = []  # by their numbers; while they are here, no other has their id
        self._aliases: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}
        self._addresses: list[_Address] = []
        self._steps: list[_Step] = []  # with templates in place of fillers
        self._complete = True
        for t in tensors:
            self._add(t, ())

    def __enter__(self) -> Recorder:
        _active.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _active.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        results = result if isinstance(result, (tuple, list)) else (result,)
        # A number, or a copy in the host's memory, may decide what comes next.
        on_device = all(isinstance(t, torch.Tensor) and t.device == self._device for t in results)
        if not on_device or any(isinstance(value, torch.Tensor) for value in tree_leaves(keywords)):
            self._complete = False
        elif function.overloadpacket in _ALLOCATIONS:
            # By a function that parses its arguments in C: a fifth of the operator's time.
            options = {"dtype": result.dtype, "device": result.device}
            self._note(torch.empty_strided, (tuple(result.shape), result.stride()), self._place, options, results)
        elif function.overloadpacket is _aten.detach and self._numbers.get(id(arguments[0]), 0) >= self._inputs:
            # PyTorch detaches what is allocated under a mode; it stays the same tensor for us.
            self._numbers[id(result)] = self._numbers[id(arguments[0])]
            self._aliases.append(result)
        else:
            self._note(function, arguments, self._place, keywords, results)
        return result

    def launched(self, run: Callable[..., Any], arguments: tuple) -> None:
        """To be called after each launch."""
        if isinstance(run, _Interpreted):
            self._note(run, arguments, self._place, {}, ())
        else:
            self._note(run, _plain(arguments), self._address, {}, ())

    def recording(self, outcome: Any) -> Recording | None:
        """The recording, if there is one, of a function that returned `outcome`."""
        try:
            returned = _with_places(outcome, self._place)
        except KeyError:
            return None
        if not self._complete:
            return None
        steps, needed = [], _numbers_in(returned)
        # From the end, without the operators whose results nobody needs: a launch needs a view's address only.
        for step in reversed(self._steps):
            own, used = set(range(step.first, step.first + step.count)), _numbers_in(step.arguments)
            acts = step.count == 0 or (step.run is not torch.empty_strided and step.run._schema.is_mutable)
            if acts or own & needed:
                free = tuple((own | used) - needed)
                steps.append(step._replace(arguments=_filler(step.arguments), free=free))
                needed |= used
        return Recording(self._device, steps[::-1], len(self._tensors) - self._inputs, _filler(returned))

    def _note(
        self, run: Any, arguments: tuple, place: Any, keywords: dict, results: Sequence[torch.Tensor]
    ) -> None:
        if not self._complete:
            return
        try:
            template = _with_places(arguments, place)
        except KeyError:  # a tensor from elsewhere
            self._complete = False
            return
        self._steps.append(_Step(run, template, keywords, len(self._tensors), len(results)))
        sources = [t for t in arguments if isinstance(t, torch.Tensor)]
        for t in results:
            self._add(t, sources)

    def _add(self, t: torch.Tensor | None, sources: Sequence[torch.Tensor]) -> None:
        """Number a tensor. `sources`: those of which an operator made it; it may be a view of one of them."""
        number = len(self._tensors)
        address = _Address(number, 0)
        for source in sources:
            if t is not None and t.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
                base = self._address(source).number
                address = _Address(base, t.data_ptr() - self._tensors[base].data_ptr())
        self._tensors.append(t)
        self._addresses.append(address)
        self._numbers[id(t)] = number

    def _place(self, t: torch.Tensor) -> _Place:
        return _Place(self._numbers[id(t)])

    def _address(self, t: torch.Tensor) -> _Address:
        return self._addresses[self._numbers[id(t)]]


class _Place(NamedTuple):
    """A tensor, by its number."""

    number: int


class _Address(NamedTuple):
    """Where a tensor begins: at so many bytes behind the beginning of the numbered one, whose memory it shares."""

    number: int
    offset: int


_Filler = Callable[[list[Any]], Any]


class _Step(NamedTuple):
    """An operator or a launch. Its arguments are made of the tensors that are there already; its results get the
    numbers from `first` on, `count` of them (a launch: 0). `free`: which tensors no later step needs."""

    run: Any
    arguments: Any
    keywords: dict[str, Any]
    first: int
    count: int
    free: tuple[int, ...] = ()


class _Interpreted(NamedTuple):
    """A launch in Triton's interpreter, which takes tensors. It is never fast, but shows that recordings are
    right."""

    kernel: Any
    grid: tuple[int, ...]
    keywords: dict[str, Any]

    def __call__(self, *arguments: Any) -> None:
        self.kernel[self.grid](*arguments, **self.keywords)


def _with_places(value: Any, place: Callable[[torch.Tensor], Any]) -> Any:
    """`value` with what `place` says of them instead of tensors. KeyError: it does not know one."""
    if isinstance(value, torch.Tensor):
        return place(value)
    if not isinstance(value, (tuple, list)):
        return value
    parts = [_with_places(part, place) for part in value]
    return value._make(parts) if hasattr(value, "_make") else type(value)(parts)


def _plain(value: Any) -> Any:
    """`value` with tuples instead of named ones, which take longer to make."""
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _numbers_in(template: Any) -> set[int]:
    """The numbers of the tensors in a template."""
    if isinstance(template, (_Place, _Address)):
        return {template.number}
    return set().union(*map(_numbers_in, template)) if isinstance(template, (tuple, list)) else set()


def _filler(template: Any) -> _Filler:
    """A function that puts tensors, or their addresses, where the template has their numbers: one expression,
    since nested functions take as long as everything else in a repeated launch."""
    constants: dict[str, Any] = {}
    return eval(f"lambda made: {_expression(template, constants)}", constants)


def _expression(template: Any, constants: dict[str, Any]) -> str:
    if isinstance(template, _Place):
        return f"made[{template.number}]"
    if isinstance(template, _Address):
        return f"made[{template.number}].data_ptr() + {template.offset}"
    if not _numbers_in(template):
        return _named(template, constants)
    parts = ", ".join(_expression(part, constants) for part in template)
    if isinstance(template, list):
        return f"[{parts}]"
    return f"({parts},)" if type(template) is tuple else f"{_named(type(template), constants)}({parts})"


def _named(constant: Any, constants: dict[str, Any]) -> str:
    name = f"constant_{len(constants)}"
    constants[name] = constant
    return name
