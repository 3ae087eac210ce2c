"""torch.autograd.Function with less overhead in each call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import library


class Function(torch.autograd.Function):
    """An autograd.Function that reads the signature of its forward once. `apply` asks for it at every call, and to
    inspect a function of twenty arguments takes longer than a small attention on a CPU."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


def saves_for_forward(count: int) -> Callable[[type[Function]], type[Function]]:
    """Decorator of a Function: its first `count` inputs are saved for its jvp, beside what its base saves."""

    def with_saving(function: type[Function]) -> type[Function]:
        inherited = function.setup_context

        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            inherited(ctx, inputs, output)
            ctx.save_for_forward(*inputs[:count])

        function.setup_context = staticmethod(setup_context)  # type: ignore[method-assign,assignment]
        return function

    return with_saving


def register_autograd(name: str, function: type[Function], operators: library.Library) -> None:
    """Give the operator the Function's gradient, for tracers, which see the operator and not the Function."""

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        function.setup_context(ctx, inputs, output)

    library.register_autograd(name, function.backward, setup_context=setup_context, lib=operators)
