"""Caching of tensors from call to call. They are made outside of the caller's modes, so that every call can use
them.

A tensor made under `torch.inference_mode`, a FakeTensorMode, a transform of torch.func or another default device
belongs to that mode. In a cache it would break later calls outside of the mode, or make their results wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

R = TypeVar("R")


@contextmanager
def outside_modes() -> Iterator[None]:
    """Within, torch computes as at the start of a program: no inference mode, no gradients, no dispatch or
    function mode (fake tensors, tracers, default devices), no transform of torch.func.

    The default dtype stays as it is: name the dtype of every floating tensor that is made within.
    """
    if not _any_mode():
        yield
        return
    layers = []
    while torch._C._functorch.peek_interpreter_stack() is not None:
        layers.append(torch._C._functorch.pop_dynamic_layer_stack())
    try:
        with (
            torch._C.DisableTorchFunction(),
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            yield
    finally:
        for layer in reversed(layers):
            torch._C._functorch.push_dynamic_layer_stack(layer)


def reading(method: Callable[..., R]) -> Callable[..., R]:
    """Decorator of a method that reads a mask's values: it runs outside of the caller's modes, and raises
    ValueError if there are no values (fake tensors, the meta device)."""

    @wraps(method)
    def read(self: Any, *args: Any, **kwargs: Any) -> R:
        try:
            with outside_modes():
                return method(self, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, AssertionError) as problem:
            raise ValueError(
                f"{method.__name__} needs the mask's values, which cannot be read (they are fake, meta or in a "
                "torch.func transform)"
            ) from problem

    return read


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Within, no autocast. torch has none for the meta device, and raises when it is turned off there."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _any_mode() -> bool:
    return bool(
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or _len_torch_dispatch_stack_pre_dispatch()
        or torch.is_inference_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class _OfAGraph(Exception):
    """What is made now belongs to the CUDA graph that is captured."""


_read_by_graphs: dict[int, Any] = {}


def capturing() -> bool:
    """Whether the current stream of CUDA is captured into a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def kept(maxsize: int) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorator of a function that makes tensors: it runs outside of the caller's modes, and its last `maxsize`
    results are cached.

    Arguments are hashed. If an argument's `lasts` is False, it holds a tensor of the caller's mode, whose values
    cannot be read outside of it: then the function runs in that mode, and its result is not cached.

    A CUDA graph reads the same memory at each replay. So what it gets from the cache is never freed; and what is
    made while one is captured belongs to the graph, and is not cached.
    """

    def keep(function: Callable[..., R]) -> Callable[..., R]:
        @lru_cache(maxsize=maxsize)
        def made(*arguments: Any) -> R:
            if capturing():
                raise _OfAGraph
            with outside_modes():
                return function(*arguments)

        @wraps(function)
        def kept_or_made(*arguments: Any) -> R:
            if not all(getattr(argument, "lasts", True) for argument in arguments):
                return function(*arguments)
            try:
                found = made(*arguments)
            except _OfAGraph:
                return function(*arguments)
            if capturing():
                _read_by_graphs[id(found)] = found
            return found

        kept_or_made.forget = made.cache_clear  # type: ignore[attr-defined]
        return kept_or_made

    return keep


def lasts(t: Tensor) -> bool:
    """Whether a tensor has values, the same in every mode: neither on the meta device nor fake or traced, nor of a
    torch.func transform."""
    if t.device.type == "meta":
        return False
    return isinstance(t, torch.nn.Parameter) or (
        type(t) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def fake_mode() -> FakeTensorMode | None:
    """The active FakeTensorMode, if any. Its operators take fake tensors only."""
    return next((m for m in reversed(_get_current_dispatch_mode_stack()) if isinstance(m, FakeTensorMode)), None)
