"""MLPs as functions of tensors: arguments are checked here once and become a spec."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.core import plans, spread
from fastattn.core.autocast import autocast
from fastattn.core.capabilities import check_backend
from fastattn.core.mlp import operators
from fastattn.core.mlp.spec import MLPWeights, gated_mlp_spec, mlp_spec


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    backend: str | None = None,
) -> Tensor:
    """act(x W1^T + b1) W2^T + b2, fused. Only x and the pre-activation are kept for the backward.

    Args:
        x: (..., d); any leading dimensions, any strides.
        w1: (h, d), laid out as torch.nn.Linear's weight.
        b1: (h,) or None.
        w2: (out, h).
        b2: (out,) or None.
        activation: "gelu" (by erf), "gelu_tanh" (GPT-2's), "relu", "relu_squared" or "silu".
        backend: as `attention`'s.

    Returns:
        (..., out) in the inputs' dtype. The pre-activation and the hidden layer are rounded to that dtype, as
        eager PyTorch rounds them; sums are in fp32, or fp64 for fp64 inputs.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything runs.

    Example:
        >>> x, w1, w2 = torch.randn(2, 10, 64), torch.randn(256, 64), torch.randn(64, 256)
        >>> mlp(x, w1, None, w2, None).shape
        torch.Size([2, 10, 64])

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.3; Hendrycks and Gimpel, GELU (2016).
    """
    key = plans.key((x, w1, b1, w2, b2), (activation, backend))
    plan = MLP_PLANS.find(key)
    if plan is not None:
        return _planned(plan, x, (w1, b1, None, None, w2, b2))
    if isinstance(x, spread.DTENSORS):
        return spread.of_dtensors["mlp"](x, w1, b1, w2, b2, {"activation": activation, "backend": backend})
    backend = check_backend(backend)
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    spec = mlp_spec(x, w1, b1, w2, b2, activation=activation)
    weights = MLPWeights(w1, b1, None, None, w2, b2)
    if key is None:
        return _mlp(x, weights, spec.activation, backend)
    plan = operators.MLPPlan.of(x, weights, spec, backend)
    MLP_PLANS.keep(key, plan)
    return _planned(plan, x, weights)


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """(act(x Wg^T + bg) * (x Wu^T + bu)) Wd^T + bd, fused. Only x, gate and up are kept for the backward.

    Args:
        x: (..., d); any leading dimensions, any strides.
        w_gate, w_up: (h, d); may be the halves of one packed (2h, d) weight, `packed.chunk(2)`.
        w_down: (out, h).
        activation: as `mlp`'s; "silu" makes it SwiGLU, "gelu" and "gelu_tanh" GEGLU, "relu" ReGLU.
        b_gate, b_up, b_down: (h,), (h,) and (out,), or None.
        backend: as `attention`'s.

    Returns:
        (..., out) in the inputs' dtype; act(gate) is rounded to that dtype before the product with up.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything runs.

    Source: Shazeer, GLU Variants Improve Transformer (2020), section 2.
    """
    tensors = x, w_gate, b_gate, w_up, b_up, w_down, b_down
    key = plans.key(tensors, (activation, backend))
    plan = GATED_PLANS.find(key)
    if plan is not None:
        return _planned(plan, x, tensors[1:])
    if isinstance(x, spread.DTENSORS):
        return spread.of_dtensors["gated_mlp"](x, w_gate, w_up, w_down, {
            "b_gate": b_gate, "b_up": b_up, "b_down": b_down, "activation": activation, "backend": backend,
        })  # fmt: skip
    backend = check_backend(backend)
    x, *weights = autocast(*tensors)
    spec = gated_mlp_spec(x, *weights, activation=activation)
    if key is None:
        return _mlp(x, MLPWeights(*weights), spec.activation, backend)
    plan = operators.MLPPlan.of(x, MLPWeights(*weights), spec, backend)
    GATED_PLANS.keep(key, plan)
    return _planned(plan, x, weights)


MLP_PLANS: plans.Plans[operators.MLPPlan] = plans.Plans("mlp")
GATED_PLANS: plans.Plans[operators.MLPPlan] = plans.Plans("gated_mlp")


def _planned(plan: operators.MLPPlan, x: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
    """The MLP of a call that was checked before."""
    if x.dim() == 2:
        return plans.run(plan, x, *weights)[0]
    (y,) = plans.run(plan, _tokens(x), *weights)
    return y.view(*x.shape[:-1], y.shape[-1])


def _mlp(x: Tensor, weights: MLPWeights, activation: str, backend: str | None) -> Tensor:
    """Flatten x's leading dimensions to tokens, and save for a backward only if there may be one."""
    wanted = any(t is not None and t.requires_grad for t in (x, *weights))
    # Under torch.func a wrapped tensor may not show that an outer transform wants its gradient.
    save = torch.is_grad_enabled() and (wanted or torch._C._are_functorch_transforms_active())
    y, _ = operators.mlp(_tokens(x), *weights, activation, save, backend)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
