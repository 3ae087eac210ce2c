"""MLPs as functions of tensors: arguments are checked here once and become a spec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastattn.core import plans, spread
from fastattn.core.autocast import autocast
from fastattn.core.capabilities import check_backend
from fastattn.core.mlp import operators
from fastattn.core.mlp.spec import MLPSpec, MLPWeights, Options, gated_mlp_spec, mlp_spec


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    save: str = "auto",
    chunk: int | str = "auto",
    match_eager: bool = False,
    backend: str | None = None,
) -> Tensor:
    """act(x W1^T + b1) W2^T + b2, fused, keeping as little for the backward as the caller likes.

    Args:
        x: (..., d); any leading dimensions, any strides.
        w1: (h, d), laid out as torch.nn.Linear's weight.
        b1: (h,) or None.
        w2: (out, h).
        b2: (out,) or None.
        activation: "gelu" (by erf), "gelu_tanh" (GPT-2's), "relu", "relu_squared" or "silu".
        save: what is kept of the hidden layer for the backward, beside x.
            "preactivation": x W1^T + b1, in the inputs' dtype; of the ReLUs their output. The hidden layer is
            computed again.
            "int8": the same in 8 bits a number, with a float32 scale for each block of 128. The gradients then
            have a relative error of about 0.5 percent of x and 0.7 percent of W2 (GELU, normal numbers); y has
            none. "nothing": the pre-activation is computed again, by one more product, with the same bits.
            "auto" (default): what is fastest: "preactivation" in the Triton kernels; in the portable backend what
            eager PyTorch keeps, the pre-activation and the hidden layer.
        chunk: how many tokens are computed at a time. In the backward no more than three tensors (chunk, h) exist
            beside what is kept, and gradients of weights are summed in float32. "auto": all tokens, if `save` is
            "auto" or "preactivation"; else as many as keep these three within 256 MiB on a GPU or 32 MiB on a CPU,
            but at least 4096 or 1024.
        match_eager: round wherever eager PyTorch rounds, in the backward, too. By default the backward rounds less
            often in half precision, which is more exact.
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
    key = plans.key((x, w1, b1, w2, b2), (activation, save, chunk, match_eager, backend))
    plan = MLP_PLANS.find(key)
    if plan is not None:
        return _planned(plan, x, (w1, b1, None, None, w2, b2))
    if isinstance(x, spread.DTENSORS):
        return spread.of_dtensors["mlp"](x, w1, b1, w2, b2, {
            "activation": activation, "save": save, "chunk": chunk, "match_eager": match_eager, "backend": backend,
        })  # fmt: skip
    backend = check_backend(backend)
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    weights = MLPWeights(w1, b1, None, None, w2, b2)
    spec = mlp_spec(x, weights, Options(activation, save, chunk, match_eager))
    if key is None:
        return _mlp(x, weights, spec, backend)
    plan = operators.MLPPlan.of(x, weights, spec, backend)
    MLP_PLANS.keep(key, plan)
    return _planned(plan, x, weights)


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    *,
    activation: str = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    packed: str | None = None,
    save: str = "auto",
    chunk: int | str = "auto",
    match_eager: bool = False,
    backend: str | None = None,
) -> Tensor:
    """(act(x Wg^T + bg) * (x Wu^T + bu)) Wd^T + bd, fused, keeping as little for the backward as the caller likes.

    Args:
        x: (..., d); any leading dimensions, any strides.
        w_gate, w_up: (h, d).
        w_down: (out, h).
        activation: as `mlp`'s; "silu" makes it SwiGLU, "gelu" and "gelu_tanh" GEGLU, "relu" ReGLU.
        b_gate, b_up, b_down: (h,), (h,) and (out,), or None.
        packed: "gate_up" or "up_gate" if w_gate (2h, d) holds both weights in this order, and b_gate (2h,) both
            biases; then w_up and b_up are None. One product computes both, and one their gradient; nothing is
            copied.
        save, chunk, match_eager: as `mlp`'s. What is kept are gate and up. With save="int8" the gradients have a
            relative error of about 1 percent (SiLU, normal numbers). With save="auto" the portable backend
            also keeps act(gate) and the hidden layer, as eager PyTorch does. A chunk's tensors are (chunk, 2h).
        backend: as `attention`'s.

    Returns:
        (..., out) in the inputs' dtype; act(gate) is rounded to that dtype before the product with up.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything runs.

    Source: Shazeer, GLU Variants Improve Transformer (2020), section 2.
    """
    tensors = x, w_gate, b_gate, w_up, b_up, w_down, b_down
    key = plans.key(tensors, (activation, packed, save, chunk, match_eager, backend))
    plan = GATED_PLANS.find(key)
    if plan is not None:
        return _planned(plan, x, tensors[1:])
    if isinstance(x, spread.DTENSORS):
        return spread.of_dtensors["gated_mlp"](x, w_gate, w_up, w_down, {
            "b_gate": b_gate, "b_up": b_up, "b_down": b_down, "activation": activation, "packed": packed,
            "save": save, "chunk": chunk, "match_eager": match_eager, "backend": backend,
        })  # fmt: skip
    backend = check_backend(backend)
    x, *rest = autocast(*tensors)
    weights = MLPWeights(*rest)
    spec = gated_mlp_spec(x, weights, Options(activation, save, chunk, match_eager, packed))
    if key is None:
        return _mlp(x, weights, spec, backend)
    plan = operators.MLPPlan.of(x, weights, spec, backend)
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


def _mlp(x: Tensor, weights: MLPWeights, spec: MLPSpec, backend: str | None) -> Tensor:
    """Flatten x's leading dimensions to tokens, and keep something for a backward only if there may be one."""
    wanted = any(t is not None and t.requires_grad for t in (x, *weights))
    # Under torch.func a wrapped tensor may not show that an outer transform wants its gradient.
    if not (torch.is_grad_enabled() and (wanted or torch._C._are_functorch_transforms_active())):
        spec = replace(spec, save="nothing")
    y, *_ = operators.mlp(_tokens(x), *weights, *operators.options_of(spec), backend)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
