"""The last linear layer and the cross-entropy of its logits as one module, as torch.nn.LinearCrossEntropyLoss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.core.capabilities import check_backend
from fastattn.core.intact import alteration
from fastattn.core.loss.functional import linear_cross_entropy, loss_of_logits
from fastattn.core.loss.spec import REDUCTIONS, check_coefficient, loss_spec
from fastattn.ground.arguments import choice, flag, integer, tensor
from fastattn.ground.checks import check_floating
from fastattn.nn.checks import check_width, factory_options


class LinearCrossEntropyLoss(nn.Module):
    """Cross-entropy of logits that never exist whole: the arguments, parameters, state dict and results of
    torch.nn.LinearCrossEntropyLoss (torch 2.13) for one dimension of classes, and the options of
    `fastattn.linear_cross_entropy`.

    Args:
        in_features: width of the input.
        num_classes: number of classes.
        bias: whether the linear layer has a bias.
        device, dtype: of the linear layer.
        reduction, weight, ignore_index, label_smoothing, z_loss, softcap, temperature, shift, backend: as
            `fastattn.linear_cross_entropy`'s.

    Parameters: linear, a torch.nn.Linear. Buffer: weight, or None.

    Raises:
        ValueError, TypeError: as `fastattn.linear_cross_entropy`, when it is called.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        shift: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, least=1)
        self.num_classes = integer("num_classes", num_classes, least=1)
        choice("reduction", reduction, REDUCTIONS)
        loss_spec(
            torch.empty(0, dtype=torch.int64), self.num_classes, ignore_index=ignore_index,
            label_smoothing=label_smoothing, softcap=softcap, temperature=temperature, filter=None, entropy=False,
        )  # fmt: skip
        check_coefficient("z_loss", z_loss)
        flag("shift", shift)
        if weight is not None:
            tensor("weight", weight, or_none=True)
            check_floating("weight", weight)
            if weight.shape != (self.num_classes,):
                raise ValueError(f"weight must have shape ({self.num_classes},), got {tuple(weight.shape)}")
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.z_loss, self.softcap, self.temperature = z_loss, softcap, temperature
        self.shift, self.backend = shift, check_backend(backend)
        self.register_buffer("weight", weight)
        options = factory_options(device, dtype)
        self.linear = nn.Linear(self.in_features, self.num_classes, bias=flag("bias", bias), **options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input (..., in_features), target (...) or (..., num_classes): see `fastattn.linear_cross_entropy`."""
        check_width("input", input, self.in_features)
        options: dict[str, Any] = {
            "weight": self.weight,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "temperature": self.temperature,
            "shift": self.shift,
        }
        if alteration(self.linear, nn.Linear, input):
            return loss_of_logits(self.linear(input), target, **options)
        bias, backend = self.linear.bias, self.backend
        return linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=bias, backend=backend, **options
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, backend={self.backend!r}"
