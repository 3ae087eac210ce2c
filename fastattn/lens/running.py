"""Running a model to ask one question of it: checks of what runs, and hooks that undo themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.lens.adapters import Adapter


class Reached(Exception):
    """Ends a forward: what was asked for has been computed."""

    def __init__(self, value: Tensor) -> None:
        super().__init__("the part that was asked for has been computed")
        self.value = value


class Hooks:
    """Forward hooks that are removed together."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def on_input(self, module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> None:
        """Call `see` with the first argument of each call; what it returns, if anything, takes its place."""

        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            name = None if args else next(iter(kwargs))
            changed = see(args[0] if name is None else kwargs[name])
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: changed})

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> None:
        """Call `see` with the result of each call, or with the first of several; as `on_input`."""

        def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
            several = isinstance(output, tuple | list)
            changed = see(output[0] if several else output)
            if changed is None:
                return None
            return type(output)((changed, *output[1:])) if several else changed

        self.handles.append(module.register_forward_hook(hook))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def hooks() -> Iterator[Hooks]:
    """Hooks that last as long as the block."""
    made = Hooks()
    try:
        yield made
    finally:
        made.remove()


def last_stream(adapter: Adapter, tokens: Tensor, options: dict[str, Any]) -> Tensor:
    """The last residual stream (B, L, d), what the final norm is given. The unembedding is not computed.

    Hooks of the caller's that are on the model see its parts.
    """

    def reach(stream: Tensor) -> None:
        raise Reached(stream)

    with hooks() as hooked, torch.no_grad():
        if adapter.final_norm is not None:
            hooked.on_input(adapter.final_norm, reach)
        else:
            hooked.on_output(adapter.blocks[-1], reach)
        try:
            adapter.model(tokens, **{**_without_cache(adapter.model), **options})
        except Reached as reached:
            return reached.value
    raise ValueError(f"model, a {type(adapter.model).__name__}, did not run its last block on the tokens")


def neuron_activations(adapter: Adapter, layer: int, x: Tensor) -> Tensor:
    """What the neurons of a layer's MLP are (..., neurons), for an input x (..., d) of that MLP.

    The MLP's own code computes them, up to the layer that writes them to the stream.
    """

    def reach(neurons: Tensor) -> None:
        raise Reached(neurons)

    with hooks() as hooked:
        hooked.on_input(adapter.part("down", layer), reach)
        try:
            # In BERT the layer that writes lies outside: the MLP returns its neurons.
            return adapter.part("mlp", layer)(x)
        except Reached as reached:
            return reached.value


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """What tells a Hugging Face model to keep no keys and values for a next token."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes else {}


def check_mlps(adapter: Adapter) -> None:
    """Neurons are read by running an MLP alone.

    Raises:
        ValueError: an MLP is no module of its own: its layers lie in the block, and the activation between them.
    """
    for layer in range(adapter.num_layers):
        if adapter.part("mlp", layer) is not None and adapter.part("mlp", layer) is adapter.part("up", layer):
            raise ValueError(
                f"model must have its MLPs in modules of their own, and in family {adapter.family.name} their "
                "layers lie in the block"
            )


def check_streams(adapter: Adapter) -> None:
    """Streams are read as (B, L, d).

    Raises:
        ValueError: the model's are (L, B, d).
    """
    if adapter.sequence_first:
        raise ValueError("model must have streams (batch, length, width): build its layers with batch_first=True")


def check_model(model: nn.Module) -> None:
    """Dropout would draw anew in every run, and nothing would fit together.

    Raises:
        ValueError: a part of the model is in training mode, and drops.
    """
    for name, module in model.named_modules():
        if module.training and (drop := _dropout(module)):
            raise ValueError(
                f"model must not drop anything, and {name or 'model'}, a {type(module).__name__}, is in training "
                f"mode with {drop}: call model.eval() first"
            )


def _dropout(module: nn.Module) -> str | None:
    """The dropout of a module itself, "p = 0.1"; None if there is none."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return f"p = {module.p}" if module.p > 0 else None
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float) and value > 0:
            return f"{name} = {value}"
    return None
