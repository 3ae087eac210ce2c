"""torch.autograd.Function, with less around each call."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class Function(torch.autograd.Function):
    """One whose forward's signature is read once: `apply` asks for it at every call, and reading it
    off a function of twenty arguments takes longer on a CPU than a small attention does."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


def register_autograd(name: str, function: type[Function], operators: torch.library.Library) -> None:
    """The operator's gradient is the Function's, for tracers that meet the operator itself."""

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        function.setup_context(ctx, inputs, output)

    torch.library.register_autograd(name, function.backward, setup_context=setup_context, lib=operators)
