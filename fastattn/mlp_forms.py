"""MLPs in other people's modules, known by their parts, computed by the fused functions.

A module becomes fused by its class alone: the new class derives from a form here and from the module's own class,
so its parameters, hooks and state dict stay the same objects. What a form cannot serve in a call (hooks on a layer
inside, dropout in training, weights that are not plain tensors) the module's own code computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.functional import gated_mlp, mlp
from fastattn.fused_classes import Fused, fused_class
from fastattn.spec import ACTIVATIONS, FLOATING

HUGGINGFACE = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
    "ReLUSquaredActivation": "relu_squared",
}
TORCH: dict[Any, str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
}


def activation_name(activation: Any) -> str | None:
    """What `fastattn.mlp` calls this module or function; None if it is another one."""
    if not isinstance(activation, nn.Module):
        return TORCH.get(activation)
    kind = type(activation)
    if kind is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if kind.__module__ == "transformers.activations":
        return HUGGINGFACE.get(kind.__name__)
    return TORCH.get(kind)


class Parts(NamedTuple):
    """One MLP: one layer or two (gate and up), an activation, maybe dropout, and a last layer.

    around: the modules that contain these, which are not called either.
    """

    first: tuple[nn.Module, ...]
    activation: Any
    dropout: nn.Module | None
    last: nn.Module
    around: tuple[nn.Module, ...] = ()

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        return (*self.first, self.last)


def obstacle(parts: Parts, x: Tensor | None = None) -> str | None:
    """Why the module's own code must compute this MLP; None if the fused function can, as things are now."""
    bypassed = [*parts.layers, *parts.around]
    for layer in parts.layers:
        if reason := _layer_obstacle(layer):
            return reason
    if activation_name(parts.activation) is None:
        return f"the activation {_name(parts.activation)} is not one of {', '.join(ACTIVATIONS)}"
    if type(parts.dropout) not in (type(None), nn.Dropout, nn.Identity):
        return f"{_name(parts.dropout)} between its layers"
    if len({layer.weight.dtype for layer in parts.layers}) > 1:
        return "its layers have dtypes of their own"
    if isinstance(parts.activation, nn.Module):
        bypassed.append(parts.activation)
    if parts.dropout is not None:
        bypassed.append(parts.dropout)
    for module in bypassed:
        if _is_watched(module):
            return f"there are hooks on the {_name(module)} inside"
    if not torch.compiler.is_compiling() and nn.modules.module._has_any_global_hook():
        return "hooks are set on all modules"
    if x is not None and (x.is_nested or x.dtype not in FLOATING):
        return "the input is not a plain tensor"
    return dropout_obstacle(parts)


def dropout_obstacle(parts: Parts) -> str | None:
    """Why it cannot be fused at present, in training, if its dropout is all that speaks against it."""
    dropout = parts.dropout
    if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
        return f"dropout {dropout.p:g} between its layers, in training"
    return None


def _layer_obstacle(layer: nn.Module) -> str | None:
    kind = type(layer)
    if kind is not nn.Linear and not _is_conv1d(layer):
        return f"{_name(layer)} is not torch.nn.Linear"
    for weight in (layer.weight, layer.bias):
        if weight is None:
            continue
        if type(weight) not in (Tensor, nn.Parameter) or weight.layout != torch.strided:
            return f"its weights are of type {type(weight).__name__}"
        if weight.device.type == "meta":
            return "its weights are on the meta device, without values"
        if weight.dtype not in FLOATING:
            return f"its weights are {weight.dtype}"
    return None


def _is_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that stores its weight transposed."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _is_watched(module: nn.Module) -> bool:
    """Whether calling this module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _name(thing: Any) -> str:
    return type(thing).__name__ if isinstance(thing, nn.Module) else getattr(thing, "__name__", repr(thing))


def fused(parts: Parts, x: Tensor) -> Tensor:
    """The MLP of these parts, (..., d) to (..., out)."""
    (*first, (w2, b2)) = [_weights(layer) for layer in parts.layers]
    activation = activation_name(parts.activation)
    assert activation is not None
    if len(first) == 1:
        return mlp(x, *first[0], w2, b2, activation=activation)
    (w_gate, b_gate), (w_up, b_up) = first
    return gated_mlp(x, w_gate, w_up, w2, activation=activation, b_gate=b_gate, b_up=b_up, b_down=b2)


def _weights(layer: Any) -> tuple[Tensor, Tensor | None]:
    return (layer.weight.t() if _is_conv1d(layer) else layer.weight), layer.bias


@dataclass(frozen=True)
class Names:
    """Where a kind of module has its parts: attribute names, with dots for parts of parts."""

    first: tuple[str, ...]
    last: str
    activation: str
    dropout: str | None = None
    after: str | None = None
    around: tuple[str, ...] = ()

    def read(self, module: nn.Module) -> Parts | None:
        """The module's parts; None if it has others."""
        found = [_get(module, name) for name in (*self.first, self.last)]
        activation = _get(module, self.activation)
        if not all(is_linear_like(layer) for layer in found) or not callable(activation):
            return None
        if self.after and not isinstance(_get(module, self.after), nn.Module):
            return None
        dropout = _get(module, self.dropout) if self.dropout else None
        if self.dropout and not isinstance(dropout, nn.Module):
            return None
        around = tuple(_get(module, name) for name in self.around)
        return Parts(tuple(found[:-1]), activation, dropout, found[-1], around)


def _get(module: Any, name: str) -> Any:
    for step in name.split("."):
        module = getattr(module, step, None)
    return module


def is_linear_like(module: Any) -> bool:
    """Whether it is a linear layer of any library, quantised ones among them."""
    return isinstance(module, nn.Module) and (
        (hasattr(module, "in_features") and hasattr(module, "out_features")) or _is_conv1d(module)
    )


class Form(Fused):
    """A module whose MLP is fused."""

    names: Names
    method = "forward"

    def mlp_parts(self) -> list[Parts]:
        """The MLPs in this module that are fused."""
        parts = self.names.read(self)
        return [] if parts is None else [parts]

    def _fused(self, x: Tensor) -> Tensor | None:
        """The MLP's result, or None if the module's own code must compute it."""
        parts = self.names.read(self)
        return None if parts is None or obstacle(parts, x) else fused(parts, x)

    def _after(self, y: Tensor) -> Tensor:
        return _get(self, self.names.after)(y) if self.names.after else y


class FusedForward(Form):
    """A module that is an MLP, maybe with dropout after it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = None if args or kwargs else self._fused(x)
        if y is None:
            return super().forward(x, *args, **kwargs)
        return self._after(y)


class FusedFeedForward(Form):
    """One of torch's transformer layers."""

    method = "_ff_block"

    def _ff_block(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        return super()._ff_block(x) if y is None else self._after(y)  # type: ignore[misc]


class FusedChunk(Form):
    """A BERT layer, whose MLP is spread over two modules with the norm in the second."""

    method = "feed_forward_chunk"

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        y = self._fused(attention_output)
        if y is None:
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        output: Any = self.output
        return output.LayerNorm(self._after(y) + attention_output)


class FusedSequential(Form):
    """An nn.Sequential with Linear, activation, maybe Dropout, Linear among its modules, once or more often."""

    def forward(self, x: Any) -> Any:
        modules, i = list(self._modules.values()), 0
        while i < len(modules):
            run = run_at(modules, i)
            if run is not None and isinstance(x, Tensor) and obstacle(run, x) is None:
                x, i = fused(run, x), i + length_of(run)
            else:
                x, i = modules[i](x), i + 1  # type: ignore[misc]
        return x

    def mlp_parts(self) -> list[Parts]:
        return runs(self)


def run_at(modules: list, i: int) -> Parts | None:
    """The MLP that begins with module i."""
    between = modules[i + 1 : i + 3]
    if len(modules) < i + 3 or not is_linear_like(modules[i]) or not isinstance(between[0], nn.Module):
        return None
    dropout = None
    if isinstance(between[1], nn.Dropout | nn.Identity):
        dropout = between[1]
    last = i + (2 if dropout is None else 3)
    activation = between[0]
    plain = not any(True for _ in activation.children()) and not is_linear_like(activation)
    # A norm or a dropout between two layers is no activation that could be asked for.
    if not plain or isinstance(activation, nn.Dropout | nn.Identity | nn.Flatten | nn.LayerNorm):
        return None
    if len(modules) <= last or not is_linear_like(modules[last]):
        return None
    return Parts((modules[i],), activation, dropout, modules[last])


def length_of(run: Parts) -> int:
    return 3 if run.dropout is None else 4


def runs(module: nn.Module) -> list[Parts]:
    """The MLPs in a sequence, none overlapping another."""
    modules, i, found = list(module._modules.values()), 0, []
    while i < len(modules):
        run = run_at(modules, i)
        if run is not None and obstacle(run) in (None, dropout_obstacle(run)):
            found.append(run)
            i += length_of(run)
        else:
            i += 1
    return found


# Known by their attributes, and then only believed if the numbers agree: see `is_this_mlp`.
KNOWN: tuple[tuple[type[Form], Names], ...] = (
    (FusedForward, Names(("gate_proj", "up_proj"), "down_proj", "act_fn")),
    (FusedForward, Names(("wi_0", "wi_1"), "wo", "act", dropout="dropout")),
    (FusedForward, Names(("wi",), "wo", "act", dropout="dropout")),
    (FusedForward, Names(("c_fc",), "c_proj", "act", after="dropout")),
    (FusedForward, Names(("fc1",), "fc2", "activation_fn")),
    (FusedFeedForward, Names(("linear1",), "linear2", "activation", dropout="dropout", after="dropout3")),
    (FusedFeedForward, Names(("linear1",), "linear2", "activation", dropout="dropout", after="dropout2")),
    (
        FusedChunk,
        Names(
            ("intermediate.dense",), "output.dense", "intermediate.intermediate_act_fn", after="output.dropout",
            around=("intermediate", "output"),
        ),
    ),
)  # fmt: skip


def form_of(module: nn.Module) -> tuple[type[Form], Names] | None:
    """The form whose parts this module has; None if it has none."""
    if isinstance(module, nn.Sequential):
        return FusedSequential, SEQUENTIAL
    for form, names in KNOWN:
        if hasattr(module, form.method) and names.read(module) is not None:
            return form, names
    return None


SEQUENTIAL = Names((), "", "")


@torch.no_grad()
def is_this_mlp(module: nn.Module, form: type[Form], names: Names) -> bool:
    """Whether the module's own code computes what the form would, on an input, in training and in eval mode."""
    made = fused_class(form, type(module), names)
    parts = names.read(module)
    assert parts is not None
    weight = _weights(parts.first[0])[0]
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(device=weight.device, dtype=weight.dtype)
    own, ours = getattr(type(module), form.method), getattr(made, form.method)
    was, before = [(part, part.training) for part in module.modules()], type(module)
    devices = [weight.device] if weight.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.autocast(weight.device.type, enabled=False):
            for training in (True, False):
                for part, _ in was:
                    part.training = training and not isinstance(part, nn.Dropout)
                expected = own(module, x)
                module.__class__ = made
                actual = ours(module, x)
                module.__class__ = before
                if not _agree(actual, expected):
                    return False
    except Exception:
        # Whatever it computes, it is not called like an MLP.
        return False
    finally:
        module.__class__ = before
        for part, mode in was:
            part.training = mode
    return True


def _agree(actual: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    size = expected.abs().max()
    return bool((actual - expected).abs().max() <= 32 * torch.finfo(expected.dtype).eps * size)
