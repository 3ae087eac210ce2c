"""Linear cross-entropy of classes that are spread over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn.core.loss.functional import Alone, Asked, Terms, computed
from fastattn.core.loss.spec import LossTensors
from fastattn.ground.checks import lse_dtype, refuse_tangents


@torch.compiler.disable
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    return_lse: bool = False,
    return_entropy: bool = False,
    shift: bool = False,
    backend: str | None = None,
) -> Any:
    """`fastattn.linear_cross_entropy` where each rank holds some of the classes: its rows of the weight.

    The classes of rank 0 come first, then those of rank 1, and so on; ranks may hold different numbers of them.
    All ranks have the same input, compute the same loss and must all call its backward. A rank sends a few numbers
    for each token in the forward, and the gradient of the input in the backward. It has one derivative.

    Args:
        input: (..., d), the same on all ranks.
        linear_weight, linear_bias, weight: (classes here, d), (classes here,), (classes here,): of this rank's
            classes.
        target: class indices among all classes, the same on all ranks; or probabilities (..., classes here).
        group: the ranks; None for all.
        reduction, ignore_index, label_smoothing, z_loss, softcap, temperature, return_lse, return_entropy, shift,
            backend: as `fastattn.linear_cross_entropy`'s.

    Returns, Raises: as `fastattn.linear_cross_entropy`. The gradient of the input is that of the whole loss, on
    each rank; the gradients of weight and bias are those of this rank's classes.

    Source: Shoeybi et al., Megatron-LM (2019), section 3.
    """
    asked = Asked(
        reduction, ignore_index, label_smoothing, z_loss, softcap, temperature, None, return_lse, return_entropy,
        shift, backend,
    )  # fmt: skip
    learned = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias, "target": target}
    refuse_tangents("fastattn.distributed.linear_cross_entropy", learned)
    return computed(LossTensors(input, linear_weight, linear_bias, target, weight), asked, Among(group))


class Among(Alone):
    """The ranks that share the classes, and those that share the tokens; None for no others.

    classes: the group whose ranks hold the classes, in their order. tokens: groups, over each of which the tokens
    are shared out.
    """

    def __init__(
        self, classes: Any, tokens: Sequence[dist.ProcessGroup] = (), shares_classes: bool = True
    ) -> None:
        self.classes, self.tokens, self.shares_classes = classes, tokens, shares_classes

    def places(self, w: Tensor) -> tuple[int, int]:
        if not self.shares_classes:
            return super().places(w)
        held = torch.tensor([w.shape[0]], device=w.device)
        found = [torch.empty_like(held) for _ in range(dist.get_world_size(self.classes))]
        dist.all_gather(found, held, group=self.classes)
        counts = torch.cat(found).tolist()
        return sum(counts[: dist.get_rank(self.classes)]), sum(counts)

    def shared(self, x: Tensor) -> Tensor:
        return _Shared.apply(x, self.classes) if self.shares_classes else x

    def merged(self, terms: Terms, rows: Tensor, probabilities: bool) -> tuple[Terms, Tensor]:
        return _merged(terms, rows, probabilities, self.classes) if self.shares_classes else (terms, rows)

    def total(self, t: Tensor) -> Tensor:
        total = t.detach().sum()  # of targets and of weights of classes, which have no gradient
        for group in self.tokens:
            dist.all_reduce(total, group=group)
        return total


def _merged(
    terms: Terms, rows: Tensor, probabilities: bool, group: dist.ProcessGroup | None
) -> tuple[Terms, Tensor]:
    """Terms and rows of all classes, from those of each rank."""
    gathered = _Gathered.apply(torch.cat((rows, torch.stack((terms.linear, terms.divisor)))), group)
    log_totals, picked, largest, *entropies, linear, divisor = gathered.unbind(1)
    top = largest.detach().amax(0)
    lowered = largest.detach() - torch.where(top == float("-inf"), 0.0, top)
    logs = lowered + log_totals
    log_total = torch.logsumexp(logs, 0)
    # Where a rank gives no weight to its logits, they may all be -inf.
    total = (picked + torch.where(linear == 0, 0.0, linear * lowered)).sum(0)
    found = [log_total, total, top]
    if entropies:
        gone = logs == float("-inf")
        log_share = (logs - log_total).masked_fill(gone, 0.0)
        share = log_share.exp().masked_fill(gone, 0.0)
        found.append((share * (entropies[0].masked_fill(gone, 0.0) - log_share)).sum(0))
    counted = terms.counted != 0
    summed = terms._replace(linear=linear.sum(0), divisor=terms.divisor if probabilities else divisor.sum(0))
    return summed, torch.where(counted, torch.stack(found), 0.0)


class _Shared(torch.autograd.Function):
    """x, which all ranks have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        total = dx.to(lse_dtype(dx.dtype), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(dx.dtype), None


class _Gathered(torch.autograd.Function):
    """The tensor of each rank, one above the other. All ranks compute the same of them, so that the gradient of a
    rank's own tensor is complete there."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.rank = dist.get_rank(group)
        found = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, t.contiguous(), group=group)
        return torch.stack(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.rank], None
