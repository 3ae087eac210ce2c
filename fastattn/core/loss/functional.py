"""The loss as a function of tensors: arguments are checked here once and become a spec."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.core import invariance, spread
from fastattn.core.autocast import autocast, without_autocast
from fastattn.core.capabilities import check_backend
from fastattn.core.loss import definition, operators, portable
from fastattn.core.loss.spec import (
    REDUCTIONS,
    LossSpec,
    LossTensors,
    check_beside_logits,
    check_classes,
    check_coefficient,
    check_tensors,
    loss_spec,
)
from fastattn.core.rows import ROWS_OF_LOSS, few_rows_of_loss, in_rows, rows_at_once
from fastattn.ground import arguments
from fastattn.ground.checks import lse_dtype


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    filter: float | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    shift: bool = False,
    backend: str | None = None,
) -> Any:
    """Cross-entropy of the logits z = input linear_weight^T + linear_bias, which never exist whole.

    Computes what torch.nn.functional.linear_cross_entropy computes for a linear_weight (classes, d).

    Args:
        input: (..., d), any leading dimensions, any strides: the tokens.
        linear_weight: (classes, d), laid out as torch.nn.Linear's.
        target: class indices, integers of shape (...), or class probabilities, floats of shape (..., classes). It
            has no gradient.
        linear_bias: (classes,) or None.
        weight: (classes,), a factor of each class in the loss, or None. It has no gradient.
        reduction: "mean" (over the tokens that count, weighted by the `weight` of their classes), "sum" or "none".
        ignore_index: a token with this class index does not count. None is -100.
        label_smoothing: this part of each target, 0 to 1, is spread evenly over all classes.
        z_loss: this times the square of each token's log-sum-exp is added to its loss. It is not multiplied by
            `weight`, and its mean is over the number of tokens that count.
        softcap: logits are capped, softcap * tanh(z / softcap), as Gemma 2 does; None for no cap.
        temperature: logits are divided by it, after the cap.
        filter: gradients may leave out tiles of tokens and classes whose probabilities are all below this number,
            as Cut Cross-Entropy does; None leaves out nothing. The loss is exact all the same. That gains time
            where most classes are unlikely; with class probabilities or smoothing the kernels leave out nothing.
            Under `fastattn.invariant` nothing is left out, since that depends on the other tokens.
        return_lse: whether to return the log-sum-exp of each token's logits, too, in nats, with gradient.
        return_entropy: whether to return the entropy of each token's softmax, too, in nats, with gradient.
        shift: token i is to predict target i + 1: the last token and the first target are left out.
        backend: as `attention`'s.

    Under `fastattn.invariant` a token's values, and the gradient of its input, have the same bits whatever other
    tokens there are. The backward then computes the logits again.

    Returns:
        The loss; or a tuple of the loss and, in this order, what else is asked for: log-sum-exps, entropies. In
        float32, also for inputs in half precision, where torch rounds the loss to the input's dtype; float64 for
        float64. Without reduction, and without smoothing, z_loss and `weight`, minus the loss is each token's
        log-probability. Tokens that do not count have loss, log-sum-exp and entropy 0. The mean of no tokens is
        NaN.

        A loss that is one number computes its gradients in the forward pass if any is needed, unless the
        log-sum-exps or entropies are returned, or the input is float16, whose gradients may be too small for it
        before a gradient scaler multiplies them. Otherwise the backward computes the logits again.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything runs. On the
        CPU also for class indices that do not exist; on a GPU, which would have to be waited for, the loss is NaN
        then.

    Example:
        >>> tokens, head = torch.randn(2, 5, 64), torch.randn(1000, 64)
        >>> loss = linear_cross_entropy(tokens, head, torch.randint(1000, (2, 5)), shift=True)
        >>> loss.shape
        torch.Size([])

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models (2024), sections 4.1 to 4.3;
    z_loss: Chowdhery et al., PaLM (2022), section 5; smoothing: Szegedy et al. (2015), section 7.
    """
    asked = Asked(
        reduction, ignore_index, label_smoothing, z_loss, softcap, temperature, filter, return_lse, return_entropy,
        shift, backend,
    )  # fmt: skip
    tensors = LossTensors(input, linear_weight, linear_bias, target, weight)
    if spread.is_dtensor(input):
        return spread.of_dtensors["linear_cross_entropy"](tensors, asked)
    return computed(tensors, asked, Alone())


class Asked(NamedTuple):
    """What `linear_cross_entropy` takes beside its tensors."""

    reduction: str
    ignore_index: int | None
    label_smoothing: float
    z_loss: float
    softcap: float | None
    temperature: float
    filter: float | None
    return_lse: bool
    return_entropy: bool
    shift: bool
    backend: str | None

    def checked(self) -> Asked:
        """With what does not become part of a spec checked."""
        arguments.choice("reduction", self.reduction, REDUCTIONS)
        return self._replace(
            return_lse=arguments.flag("return_lse", self.return_lse),
            return_entropy=arguments.flag("return_entropy", self.return_entropy),
            z_loss=check_coefficient("z_loss", self.z_loss),
            shift=arguments.flag("shift", self.shift),
            backend=check_backend(self.backend),
        )


class Alone:
    """This process has all classes and all tokens. See fastattn.distributed.loss for others."""

    shares_classes = False

    def places(self, w: Tensor) -> tuple[int, int]:
        """The first class of this process, and the number of all classes."""
        return 0, w.shape[0]

    def shared(self, x: Tensor) -> Tensor:
        """The tokens, which all that share the classes have."""
        return x

    def merged(self, terms: Terms, rows: Tensor, probabilities: bool) -> tuple[Terms, Tensor]:
        """Terms and rows of all classes."""
        return terms, rows

    def total(self, t: Tensor) -> Tensor:
        """The sum over all tokens."""
        return t.sum()


def computed(tensors: LossTensors, asked: Asked, among: Alone) -> Any:
    """The loss of these tensors, checked, with what else is asked for. A reduced loss is that of this process's
    tokens; a mean is over the tokens of all. among: who has the other classes and tokens."""
    asked = asked.checked()
    x, w, b, target, weight = tensors
    x, w, b = autocast(x, w, b)
    if asked.shift:
        x, target = shifted(x, target)
    check_tensors(LossTensors(x, w, b, target, weight))
    first, classes = among.places(w)
    spec = replace(
        loss_spec(
            target,
            classes,
            ignore_index=asked.ignore_index,
            label_smoothing=asked.label_smoothing,
            softcap=asked.softcap,
            temperature=asked.temperature,
            filter=asked.filter,
            entropy=asked.return_entropy,
        ),
        first=first,
    )
    flat = LossTensors(among.shared(tokens_of(x)), w, b, flat_target(target, spec), weight)
    reduction, backend, extra = asked.reduction, asked.backend, asked.return_lse or asked.return_entropy
    with without_autocast(x.device):
        terms = Terms.of(lse_dtype(x.dtype), flat.target, weight, spec, asked.z_loss, w.shape[0])
        fixed = invariance.wanted()
        if reduction != "none" and not (extra or among.shares_classes or fixed) and _gradients_at_once(flat):
            coefficients = terms.coefficients(reduction, among)
            wanted = [t is not None and t.requires_grad for t in (flat.x, w, b)]
            loss = operators.reduced(*flat, coefficients, wanted, *spec.options, backend)
            return terms.finish(loss, reduction, among)
        rows = (_rows_in_turn if fixed else _rows)(flat, spec, backend)
        terms, rows = among.merged(terms, rows, flat.target.is_floating_point())
        loss = terms.loss(rows, reduction, x.shape[:-1], among)
        beside = [definition.log_sum_exp(rows)] * asked.return_lse + [rows[-1]] * asked.return_entropy
        return (loss, *(t.view(x.shape[:-1]) for t in beside)) if extra else loss


def _rows(tensors: LossTensors, spec: LossSpec, backend: str | None) -> Tensor:
    return operators.rows(*tensors, *spec.options, backend)


def _rows_in_turn(tensors: LossTensors, spec: LossSpec, backend: str | None) -> Tensor:
    """The rows under `fastattn.invariant`: of a fixed number of tokens at a time. Tokens that do not count are not
    left out, since then there would be fewer: they become zeros of the first class."""
    x, target = tensors.x, tensors.target
    if not len(x):
        return _rows(tensors, spec, backend)
    counted = definition.counted(target, spec)
    if not target.is_floating_point():
        x, target = torch.where(counted[:, None], x, 0), torch.where(counted, target, 0)
    # Which tiles a filter leaves out depends on all tokens of a tile.
    beside = replace(spec, ignore_index=-1, filter=0.0, tokens=ROWS_OF_LOSS)

    def part(rows: Sequence[Tensor]) -> Tensor:
        return _rows(tensors._replace(x=rows[0], target=rows[1]), beside, backend).t()

    count = 1 if rows_at_once(x) == 1 else ROWS_OF_LOSS
    whole, left = divmod(len(x), count)
    parts = [count] * whole
    if left:
        few = _few_rows(tensors, spec, backend)
        parts += [count] if left > few else [few]
    return torch.where(counted, in_rows(part, (x, target), parts).t(), 0.0)


def _few_rows(tensors: LossTensors, spec: LossSpec, backend: str | None) -> int:
    """How many tokens may be computed at a time, where they are fewer than ROWS_OF_LOSS."""
    served = backend or os.environ.get("FASTATTN_BACKEND") or "portable"
    # Smoothing multiplies a matrix by a vector, in an order of sums that depends on the number of rows.
    if served != "portable" or tensors.target.is_floating_point() or spec.smoothing:
        return ROWS_OF_LOSS
    classes, width = len(tensors.w), portable.width_of_tiles(tensors._replace(x=tensors.x[:0]), ROWS_OF_LOSS)
    return few_rows_of_loss(tensors.x, tensors.w, sorted({width, classes % width or width}))


def loss_of_logits(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    shift: bool = False,
) -> Tensor:
    """`linear_cross_entropy` of logits (..., classes) that exist: where a last layer does more than its weights
    say. The softcap and the temperature are still to come."""
    arguments.choice("reduction", reduction, REDUCTIONS)
    z_loss = check_coefficient("z_loss", z_loss)
    if arguments.flag("shift", shift):
        logits, target = shifted(logits, target)
    classes = logits.shape[-1]
    check_beside_logits("logits", logits, classes, target, weight)
    spec = loss_spec(
        target,
        classes,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        temperature=temperature,
        filter=None,
        entropy=False,
    )
    flat = flat_target(target, spec)
    with without_autocast(logits.device):
        terms = Terms.of(lse_dtype(logits.dtype), flat, weight, spec, z_loss, classes)
        rows = definition.rows_of_logits(tokens_of(logits), flat, weight, spec)
        return terms.loss(rows, reduction, logits.shape[:-1], Alone())


class Terms(NamedTuple):
    """What a token's loss is made of, beside its row: (T,) each.

    linear: the factor of its log-sum-exp, the sum of its target distribution.
    counted: 1 for a token that counts, else 0.
    square: the factor of the log-sum-exp's square.
    divisor: what a mean is divided by, summed over tokens.
    """

    linear: Tensor
    counted: Tensor
    square: Tensor
    divisor: Tensor

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        target: Tensor,
        class_weight: Tensor | None,
        spec: LossSpec,
        z_loss: float,
        held: int,
    ) -> Terms:
        """Of the `held` classes from spec.first on."""
        weight = None if class_weight is None else class_weight.to(dtype)
        total = float(held) if weight is None else weight.sum()
        if target.is_floating_point():
            # In the target's dtype, so that no copy of it is made.
            own = target.sum(1, dtype=dtype) if weight is None else (target @ weight.to(target.dtype)).to(dtype)
            counted = own.new_ones(own.shape)
            divisor = counted
        else:
            count = target != spec.ignore_index
            counted = count.to(dtype)
            column = target - spec.first
            here = (column >= 0) & (column < held)
            own = counted * here
            own = own if weight is None else own * weight[torch.where(here, column, 0)]
            divisor = own
            # A class that does not exist makes the loss NaN.
            known = (target >= 0) & (target < spec.classes)
            own = torch.where(known, own, torch.where(count, float("nan"), 0.0))
        linear = own * (1 - spec.smoothing) + counted * (total * (spec.smoothing / spec.classes))
        return cls(linear, counted, counted * z_loss, divisor)

    def coefficients(self, reduction: str, among: Alone) -> Tensor:
        """(3, T): see `definition.loss_of_rows`."""
        if reduction != "mean":
            return torch.stack((self.linear, self.counted, self.square))
        divisor, count = among.total(self.divisor), among.total(self.counted)
        parts = torch.stack((self.linear / divisor, self.counted / divisor, self.square / count))
        return torch.where(self.counted != 0, parts, 0.0)

    def loss(self, rows: Tensor, reduction: str, shape: torch.Size, among: Alone) -> Tensor:
        """The loss of these rows; without reduction, in this shape."""
        each = definition.losses_of_rows(rows, self.coefficients(reduction, among))
        each = torch.where(self.counted != 0, each, 0.0)
        return each.view(shape) if reduction == "none" else self.finish(each.sum(), reduction, among)

    def finish(self, loss: Tensor, reduction: str, among: Alone) -> Tensor:
        """A mean of nothing is NaN, as torch's."""
        none = among.total(self.divisor) == 0 if reduction == "mean" else None
        return loss if none is None else torch.where(none, float("nan"), loss)


def tokens_of(x: Tensor) -> Tensor:
    """The leading dimensions as one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def flat_target(target: Tensor, spec: LossSpec) -> Tensor:
    """The target of T tokens, (T,) in int64 or (T, classes). Class indices are checked, where they can be read."""
    if target.is_floating_point():
        return tokens_of(target)
    if target.device.type == "cpu" and _has_values(target):
        check_classes(target, spec.ignore_index, spec.classes)
    return target.reshape(-1).to(torch.int64)


def _has_values(t: Tensor) -> bool:
    """Whether the values can be read here; else the operator checks them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or type(t) is not Tensor
    )


def shifted(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens but the last, and all targets but the first."""
    arguments.tensor("input", x)
    arguments.tensor("target", target)
    spread.refuse("shift=True")
    if x.dim() < 2 or target.shape[: x.dim() - 1] != x.shape[:-1]:
        raise ValueError(
            "shift needs an input (..., length, d) and a target (..., length), "
            f"got {tuple(x.shape)} and {tuple(target.shape)}"
        )
    length = x.dim() - 2
    last = max(x.shape[length] - 1, 0)
    return x.narrow(length, 0, last), target.narrow(length, min(1, target.shape[length]), last)


def _gradients_at_once(tensors: LossTensors) -> bool:
    """Whether the forward computes the gradients, too: where some are needed, and nobody differentiates
    otherwise."""
    return (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors[:3])
        and tensors.x.dtype != torch.float16
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )
