"""MLPs in other people's modules, recognised by their parts and computed by the fused functions.

A module becomes fused when its class is replaced: the new class derives from a form in this file and from the
module's own class, so its parameters, hooks and state dict stay the same objects. A call that the form cannot
compute (hooks on a layer inside, dropout in training, weights that are not plain tensors) runs the module's own
code.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.core.intact import alteration
from fastattn.core.mlp.functional import gated_mlp, mlp
from fastattn.core.mlp.spec import MLPSpec
from fastattn.dropin.fused_classes import Fused
from fastattn.ground.checks import ACTIVATIONS, FLOATING
from fastattn.nn.residual import NormReader, branch_of, read_norm

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
    """The name of this module or function in `fastattn.mlp`; None if it has none there."""
    if not isinstance(activation, nn.Module):
        return TORCH.get(activation) if isinstance(activation, Hashable) else None
    kind = type(activation)
    if kind is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if kind.__module__ == "transformers.activations":
        return HUGGINGFACE.get(kind.__name__)
    return TORCH.get(kind)


class Parts(NamedTuple):
    """One MLP: one layer or two (gate and up), an activation, maybe dropout, and a last layer.

    activation: the module or function; or the activation's name, if the module's own code computes it. dropouts:
    what is called between the layers. around: the modules that contain these; they are not called either. packed:
    "gate_up" or "up_gate" if the first layer computes both, in this order.
    """

    first: tuple[Any, ...]
    activation: Any
    dropouts: tuple[Any, ...]
    last: Any
    around: tuple[Any, ...] = ()
    packed: str = ""

    @property
    def layers(self) -> tuple[Any, ...]:
        return (*self.first, self.last)


def obstacle(parts: Parts, x: Tensor | None = None) -> str | None:
    """Why the module's own code must compute this MLP at present; None if the fused function can."""
    for layer in parts.layers:
        if reason := _layer_obstacle(layer, x):
            return reason
    if (activation := parts.activation) not in ACTIVATIONS and activation_name(activation) is None:
        return f"the activation {_name(activation)} is not one of {', '.join(ACTIVATIONS)}"
    for dropout in parts.dropouts:
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"{_name(dropout)} between its layers"
    if len({layer.weight.dtype for layer in parts.layers}) > 1:
        return "its layers have different dtypes"
    for module in (activation, *parts.dropouts, *parts.around):
        if isinstance(module, nn.Module) and (reason := alteration(module, type(module))):
            return f"the {_name(module)} inside {reason}"
    if x is not None and (x.is_nested or x.dtype not in FLOATING or torch._C._get_tracing_state()):
        return "the input is not a plain tensor, or torch.jit traces it"
    return dropout_obstacle(parts)


def dropout_obstacle(parts: Parts) -> str | None:
    """Why its dropout forbids fusing in training; None if it does not, or if the module is in eval mode."""
    for dropout in parts.dropouts:
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            return f"dropout {dropout.p:g} between its layers, in training"
    return None


def _layer_obstacle(layer: Any, x: Tensor | None) -> str | None:
    kind = type(layer)
    if kind is not nn.Linear and not _is_conv1d(layer):
        return f"{_name(layer)} is not torch.nn.Linear"
    if reason := alteration(layer, kind, x):
        return f"the {_name(layer)} inside {reason}"
    if x is None and layer.weight.device.type == "meta":
        return "its weights are on the meta device, without values"
    if layer.weight.dtype not in FLOATING:
        return f"its weights are {layer.weight.dtype}"
    return None


def _is_conv1d(layer: Any) -> bool:
    """transformers' Conv1D: a linear layer that stores its weight transposed."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _name(thing: Any) -> str:
    return type(thing).__name__ if isinstance(thing, nn.Module) else getattr(thing, "__name__", repr(thing))


def fused(parts: Parts, x: Tensor, **options: Any) -> Tensor:
    """Compute the MLP of these parts: (..., d) to (..., out). options: other arguments of `fastattn.mlp`."""
    (*first, (w2, b2)) = [weights(layer) for layer in parts.layers]
    asked = {"activation": _activation(parts), **options}
    if parts.packed:
        ((w, b),) = first
        return gated_mlp(x, w, None, w2, b_gate=b, b_down=b2, packed=parts.packed, **asked)
    if len(first) == 1:
        return mlp(x, *first[0], w2, b2, **asked)
    (w_gate, b_gate), (w_up, b_up) = first
    return gated_mlp(x, w_gate, w_up, w2, b_gate=b_gate, b_up=b_up, b_down=b2, **asked)


def _activation(parts: Parts) -> str:
    name = parts.activation if parts.activation in ACTIVATIONS else activation_name(parts.activation)
    assert name is not None
    return name


def weights(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The layer's weight (out, in) and bias."""
    return (layer.weight.t() if _is_conv1d(layer) else layer.weight), layer.bias


@dataclass(frozen=True)
class Names:
    """Where a kind of module has its parts: attribute names, with dots for parts of parts.

    computes: the name of the activation, found by trying; "" if the module or function `activation` is a known
    one. custom: the class of module, or the function, for which this was found; None if it is written in the
    module's
        code.
    only_in_eval: whether its own code computes something else in training, such as torch.nn.functional.dropout.
    """

    first: tuple[str, ...]
    last: str
    activation: str = ""
    dropouts: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    packed: str = ""
    computes: str = ""
    custom: Any = None
    only_in_eval: bool = False

    def read(self, module: nn.Module) -> Parts | None:
        """The module's parts; None if it has others."""
        first, last = [_get(module, name) for name in self.first], _get(module, self.last)
        dropouts, after, around = (
            tuple(_get(module, name) for name in names) for names in (self.dropouts, self.after, self.around)
        )
        if not all(is_linear_like(layer) for layer in (*first, last)):
            return None
        if not all(isinstance(part, nn.Module) for part in (*dropouts, *after, *around)):
            return None
        activation: Any = self.computes
        if self.activation:
            found = _get(module, self.activation)
            if not callable(found) or (
                self.computes and found is not self.custom and type(found) is not self.custom
            ):
                return None
            around = (*around, found) if self.computes and isinstance(found, nn.Module) else around
            activation = self.computes or found
        return Parts(tuple(first), activation, dropouts, last, around, self.packed)


def _get(module: Any, name: str) -> Any:
    for step in name.split("."):
        module = getattr(module, step, None)
    return module


def is_linear_like(module: Any) -> bool:
    """Whether it is a linear layer of any library, also a quantised one."""
    return isinstance(module, nn.Module) and (
        (hasattr(module, "in_features") and hasattr(module, "out_features")) or _is_conv1d(module)
    )


class Form(Fused):
    """A module whose MLP is fused. named_backend: as `fastattn.mlp`'s argument `backend`."""

    names: Names
    named_backend: str | None = None

    def mlp_parts(self) -> list[Parts]:
        """The MLPs in this module that are fused."""
        parts = self.names.read(self)
        return [] if parts is None else [parts]

    def _parts(self, x: Tensor) -> Parts | None:
        """The MLP's parts, or None if the module's own code must compute it."""
        if self.is_outdated():
            return None
        # Its code may read the training flag of any of its parts.
        if self.names.only_in_eval and any(part.training for part in self.modules()):
            return None
        parts = self.names.read(self)
        return None if parts is None or obstacle(parts, x) else parts

    def _fused(self, x: Tensor) -> Tensor | None:
        """The MLP's result, or None if the module's own code must compute it."""
        parts = self._parts(x)
        return None if parts is None else fused(parts, x, backend=self.named_backend)

    def _added(
        self,
        x: Tensor,
        norm: nn.Module | None = None,
        dropout: nn.Module | None = None,
        reader: NormReader = read_norm,
    ) -> Tensor | None:
        """x + dropout(the MLP of x, or of its norm) in one call; None if these are to be steps of their own.

        norm, dropout, reader: as of `branch_of`; dropout beside those in this module.
        """
        after = [*(_get(self, name) for name in self.names.after), dropout]
        dropouts = [part for part in after if part is not None and alteration(part, nn.Identity)]
        own = self.method in self.__dict__  # somebody has replaced it on this instance
        parts = None if own or len(dropouts) > 1 else self._parts(x)
        if parts is None:
            return None
        spec = MLPSpec(_activation(parts), bool(parts.packed) or len(parts.first) == 2)
        last = dropouts[0] if dropouts else None
        branch = branch_of(x, spec, norm=norm, dropout=last, reader=reader, backend=self.named_backend)
        if branch is None:
            return None
        return fused(parts, x, backend=self.named_backend, **branch)

    def _after(self, y: Tensor) -> Tensor:
        for name in self.names.after:
            y = _get(self, name)(y)
        return y


class FusedForward(Form):
    """A module that is an MLP, maybe with dropout after it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        y = self._fused(args[0]) if alone else None
        return super().forward(*args, **kwargs) if y is None else self._after(y)


class FusedFeedForward(Form):
    """A transformer layer of torch, whose MLP is in one method."""

    method = "_ff_block"
    extends = frozenset(("_ff_step",))

    def _ff_block(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        return super()._ff_block(x) if y is None else self._after(y)  # type: ignore[misc]

    def _ff_step(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """A part of the layers in fastattn.nn."""
        total = self._added(x, norm)
        return super()._ff_step(x, norm) if total is None else total  # type: ignore[misc]


class FusedChunk(Form):
    """A BERT layer, whose MLP is spread over two modules with the norm in the second."""

    method = "feed_forward_chunk"

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        output: Any = self.output
        total = self._added(attention_output)
        if total is not None:
            return output.LayerNorm(total)
        y = self._fused(attention_output)
        if y is None:
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        return output.LayerNorm(self._after(y) + attention_output)


class FusedSequential(Form):
    """An nn.Sequential that contains Linear, activation, maybe Dropout, Linear, once or several times."""

    def forward(self, input: Any) -> Any:
        if self.is_outdated():
            return super().forward(input)
        x, modules, i = input, list(self._modules.values()), 0
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
    """The MLP that begins with module i; None if none does."""
    if len(modules) < i + 3 or not is_linear_like(modules[i]):
        return None
    activation, following = modules[i + 1 : i + 3]
    if not looks_like_activation(activation):
        return None
    dropouts = (following,) if isinstance(following, nn.Dropout | nn.Identity) else ()
    last = i + 2 + len(dropouts)
    if len(modules) <= last or not is_linear_like(modules[last]):
        return None
    return Parts((modules[i],), activation, dropouts, modules[last])


def looks_like_activation(module: Any) -> bool:
    """Whether it may be an activation: it has no modules inside, and is no norm, dropout or layer."""
    others = (nn.Dropout, nn.Identity, nn.Flatten, nn.LayerNorm)
    plain = isinstance(module, nn.Module) and not any(True for _ in module.children())
    return plain and not isinstance(module, others) and not is_linear_like(module)


def length_of(run: Parts) -> int:
    return 3 + len(run.dropouts)


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


# Modules that do more than their MLP, and where it is. They are swapped only if the results agree.
KNOWN: tuple[tuple[type[Form], Names], ...] = (
    (FusedFeedForward, Names(("linear1",), "linear2", "activation", ("dropout",), ("dropout3",))),
    (FusedFeedForward, Names(("linear1",), "linear2", "activation", ("dropout",), ("dropout2",))),
    (
        FusedChunk,
        Names(
            ("intermediate.dense",), "output.dense", "intermediate.intermediate_act_fn", after=("output.dropout",),
            around=("intermediate", "output"),
        ),
    ),
)  # fmt: skip
SEQUENTIAL = Names((), "")
