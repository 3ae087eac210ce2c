"""What is asked of a loss: validated once, then frozen. Tensors travel beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ground import arguments
from fastattn.ground.checks import check_beside, check_floating, check_same, shape_of

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossSpec:
    """Which values of each token are computed from its logits z = softcap(x W^T + b) / temperature.

    smoothing: the part of the target that is spread evenly over the classes.
    softcap: raw logits are capped smoothly at plus or minus this, cap * tanh(raw / cap); 0 for no cap.
    temperature: the logits are divided by it.
    filter: tiles whose probabilities are all below it may be left out of the gradients; 0 to leave out none.
    ignore_index: a token with this target does not count: its values are 0, and so are its gradients.
    first: which class the first row of the weight is: not 0 where a process holds a part of the classes.
    classes: how many classes there are in all.
    entropy: whether the entropy of the softmax is asked for.
    tokens: tiles are sized as for so many tokens, where there are fewer.
    """

    smoothing: float = 0.0
    softcap: float = 0.0
    temperature: float = 1.0
    filter: float = 0.0
    ignore_index: int = -100
    first: int = 0
    classes: int = 0
    entropy: bool = False
    tokens: int = 0

    @property
    def options(self) -> tuple[list[float], list[int]]:
        """The arguments of an operator beside its tensors: fractions and integers."""
        fractions = [self.smoothing, self.softcap, self.temperature, self.filter]
        return fractions, [self.ignore_index, self.first, self.classes, int(self.entropy), self.tokens]

    @classmethod
    def of(cls, fractions: list[float], integers: list[int]) -> LossSpec:
        """The spec of these `options`."""
        smoothing, softcap, temperature, filter = fractions
        ignore_index, first, classes, entropy, tokens = integers
        return cls(smoothing, softcap, temperature, filter, ignore_index, first, classes, bool(entropy), tokens)


class LossTensors(NamedTuple):
    """The tensors of a loss over T tokens and V classes (of all classes, those that this process holds).

    x (T, d); w (V, d); b (V,) or None; target: integers (T,), or probabilities (T, V); class_weight (V,) or None.
    """

    x: Tensor
    w: Tensor
    b: Tensor | None
    target: Tensor
    class_weight: Tensor | None


def loss_spec(
    target: Tensor,
    classes: int,
    *,
    ignore_index: int | None,
    label_smoothing: float,
    softcap: float | None,
    temperature: float,
    filter: float | None,
    entropy: bool,
) -> LossSpec:
    """Check the options of `linear_cross_entropy`."""
    ignore_index = arguments.integer("ignore_index", -100 if ignore_index is None else ignore_index)
    if target.is_floating_point() and ignore_index != -100:
        raise ValueError(f"ignore_index needs a target of class indices; the target has dtype {target.dtype}")
    smoothing = arguments.number("label_smoothing", label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {smoothing}")
    return LossSpec(
        smoothing=float(smoothing),
        softcap=0.0 if softcap is None else _positive("softcap", softcap, "a positive number or None"),
        temperature=_positive("temperature", temperature, "a positive number"),
        filter=0.0 if filter is None else _positive("filter", filter, "a positive number or None"),
        ignore_index=ignore_index,
        classes=classes,
        entropy=entropy,
    )


def check_coefficient(name: str, value: float) -> float:
    """A factor of a term of the loss, at least 0."""
    value = float(arguments.number(name, value))
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return value


def check_classes(target: Tensor, ignore_index: int, classes: int) -> None:
    """Raise for a class index that does not exist, with its position. Only on the CPU: a GPU would have to be
    waited for; there the loss of such a token is NaN."""
    if target.is_floating_point() or target.device.type != "cpu":
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        position = wrong.nonzero()[0].tolist()
        where = f" at position {position[0] if len(position) == 1 else tuple(position)}" if position else ""
        value = target[tuple(position)].item()
        raise ValueError(
            f"target must be a class from 0 to {classes - 1}, or ignore_index ({ignore_index}); got {value}{where}"
        )


def _positive(name: str, value: float, what: str) -> float:
    value = float(arguments.number(name, value, what=what))
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be {what}, got {value}")
    return value


def check_tensors(tensors: LossTensors) -> None:
    """Check the tensors of `linear_cross_entropy`; x and target have any leading dimensions here."""
    x, w, b, target, class_weight = tensors
    arguments.tensor("input", x)
    if x.dim() == 0:
        raise ValueError("input must have at least one dimension, (..., width), got ()")
    check_floating("input", x)
    arguments.tensor("linear_weight", w)
    if w.dim() != 2 or w.shape[1] != x.shape[-1]:
        more = "; torch.nn.functional.linear_cross_entropy computes losses of K dimensions" if w.dim() > 2 else ""
        raise ValueError(f"linear_weight must have shape (classes, {x.shape[-1]}), got {shape_of(w)}{more}")
    check_same("linear_weight", w, "input", x)
    if w.shape[0] == 0:
        raise ValueError("linear_weight must have at least one row (a class), got 0")
    if b is not None:
        check_beside("linear_bias", b, x, ((w.shape[0],),), "input")
        check_same("linear_bias", b, "input", x)
    check_beside_logits("input", x, w.shape[0], target, class_weight)


def check_beside_logits(name: str, x: Tensor, classes: int, target: Tensor, class_weight: Tensor | None) -> None:
    """Check target and weight against x (..., anything), the argument of that name."""
    arguments.tensor("target", target)
    rows = shape_of(x)[:-1]
    if target.is_floating_point():
        check_beside("target", target, x, ((*rows, classes),), name)
        _check_constant("target", target)
    elif target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"target must hold class indices (integers) or probabilities (floats), got {target.dtype}")
    else:
        check_beside("target", target, x, (rows,), name)
    if class_weight is not None:
        check_beside("weight", class_weight, x, ((classes,),), name)
        check_floating("weight", class_weight)
        _check_constant("weight", class_weight)


def _check_constant(name: str, t: Tensor) -> None:
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient: the loss computes none for it; detach it")
