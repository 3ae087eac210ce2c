"""A call, the definition and eager PyTorch on the same inputs, for the families whose calls map rows to rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hardware import ON_GPU
from torch import Tensor


def run(call: Callable[..., Any], inputs: Sequence[Tensor | None], upstream: Any) -> list[Tensor]:
    """The result, or the results, of `call(*inputs)`, then the gradient of every input that is not None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    results = call(*leaves)
    gradients = torch.autograd.grad(results, [t for t in leaves if t is not None], upstream)
    return [*(r.detach() for r in ([results] if isinstance(results, Tensor) else results)), *gradients]


def doubled(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same in float64."""
    return [None if t is None else t.double() for t in tensors]


def exact_and_eager(
    definition: Callable[..., Any], inputs: Sequence[Tensor | None], dy: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """`run` of the definition in float64, and in the dtype of the inputs."""
    return run(definition, doubled(inputs), dy.double()), run(definition, inputs, dy)


def check_or_refusal(check: Callable[[Any, str], None], problem: Any, backend: str, missing: str | None) -> None:
    """`check(problem, backend)`; where the Triton backend lacks the feature `missing`, the error that names it."""
    if backend == "triton" and missing is not None:
        with pytest.raises(ValueError, match=rf"backend 'triton' cannot compute this call .*: no {missing}"):
            check(problem, backend)
        return
    if backend == "triton" and problem.dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    check(problem, backend)
