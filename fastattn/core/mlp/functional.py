"""MLPs as functions of tensors: arguments are checked here once and become a spec."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.core import invariance, plans, spread
from fastattn.core.attention.dropout import dropout_state as fresh_dropout_state
from fastattn.core.autocast import autocast
from fastattn.core.capabilities import check_backend
from fastattn.core.mlp import definition, operators
from fastattn.core.mlp.spec import MLPSpec, MLPWeights, Options, gated_mlp_spec, mlp_spec
from fastattn.core.norm.functional import layer_norm, rms_norm
from fastattn.core.rows import in_rows, sizes_of_parts
from fastattn.ground import arguments


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
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(x W1^T + b1) W2^T + b2, fused, keeping as little for the backward as the caller likes.

    With `norm`, `residual` and `dropout_p` it is the branch of a transformer layer, in one call:
    residual + dropout(mlp(norm(x))).

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
            eager PyTorch keeps, the pre-activation and the hidden layer. With "auto" and "nothing", layers up to
            128 wide in half precision are computed by one Triton kernel where it is known to be faster. Their
            hidden layer never leaves the chip, nothing of it is kept, and `chunk` has no effect.
        chunk: how many tokens are computed at a time. In the backward no more than three tensors (chunk, h) exist
            beside what is kept, and gradients of weights are summed in float32. "auto": all tokens, if `save` is
            "auto" or "preactivation"; else as many as keep these three within 256 MiB on a GPU or 32 MiB on a CPU,
            but at least 4096 or 1024.
        match_eager: round wherever eager PyTorch rounds, in the backward, too. By default the backward may round
            less often in half precision, which is more exact.
        norm: what of x the first layer reads: "rms" for its RMS norm, "layer" for its layer norm, None for x
            itself. The result of the norm is not kept for the backward.
        norm_weight, norm_bias: (d,), any floating dtype, or None for 1 and 0. An RMS norm has no bias.
        norm_eps: None for what torch takes: 1e-5 in a layer norm, else the epsilon of float32.
        residual: (..., out), the result's shape and dtype; is added to the result. It may be x.
        dropout_p: the probability of dropping an element of the MLP's result, before the residual is added;
            rounded to 16 bits. The others are multiplied by 1 / (1 - dropout_p). Nothing is stored: the backward
            draws the same numbers again.
        dropout_state: (1, 2) int64, as `dropout_state(1)` gives it, which draws one by default. Of T tokens,
            `dropout_mask(state, dropout_p, 1, T, out)` shows what is dropped.
        backend: as `attention`'s.

    Returns:
        (..., out) in the inputs' dtype; under autocast, a residual is added in its own. The pre-activation and the
        hidden layer are rounded to that dtype, as eager PyTorch rounds them; sums are in fp32, or fp64 for fp64
        inputs.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything runs.

    Example:
        >>> x, w1, w2 = torch.randn(2, 10, 64), torch.randn(256, 64), torch.randn(64, 256)
        >>> mlp(x, w1, None, w2, None).shape
        torch.Size([2, 10, 64])
        >>> mlp(x, w1, None, w2, None, norm="layer", residual=x, dropout_p=0.1).shape
        torch.Size([2, 10, 64])

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.3; Hendrycks and Gimpel, GELU (2016).
    """
    weights = w1, b1, None, None, w2, b2, norm_weight, norm_bias, residual, dropout_state
    options = activation, save, chunk, match_eager, None, norm, norm_eps, dropout_p
    return _of_form(PLAIN, x, weights, options, backend)


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
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
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
        norm, norm_weight, norm_bias, norm_eps, residual, dropout_p, dropout_state: as `mlp`'s.
        backend: as `attention`'s.

    Returns:
        (..., out) in the inputs' dtype; act(gate) is rounded to that dtype before the product with up.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything runs.

    Source: Shazeer, GLU Variants Improve Transformer (2020), section 2.
    """
    weights = w_gate, b_gate, w_up, b_up, w_down, b_down, norm_weight, norm_bias, residual, dropout_state
    options = activation, save, chunk, match_eager, packed, norm, norm_eps, dropout_p
    return _of_form(GATED, x, weights, options, backend)


class Form(NamedTuple):
    """What `mlp` and `gated_mlp` have each of their own. of_dtensor: (x, weights, other arguments) -> the result
    for DTensors."""

    name: str
    make_spec: Callable[[Tensor, MLPWeights, Options], MLPSpec]
    known: plans.Plans[operators.MLPPlan]
    of_dtensor: Callable[[Tensor, MLPWeights, dict[str, Any]], Tensor]


def _plain_of_dtensor(x: Tensor, weights: MLPWeights, asked: dict[str, Any]) -> Tensor:
    del asked["packed"]
    w1, b1, _, _, w2, b2 = weights[:6]
    return spread.of_dtensors["mlp"](x, w1, b1, w2, b2, asked)


def _gated_of_dtensor(x: Tensor, weights: MLPWeights, asked: dict[str, Any]) -> Tensor:
    w_gate, b_gate, w_up, b_up, w_down, b_down = weights[:6]
    biases = {"b_gate": b_gate, "b_up": b_up, "b_down": b_down}
    return spread.of_dtensors["gated_mlp"](x, w_gate, w_up, w_down, {**biases, **asked})


PLAIN = Form("mlp", mlp_spec, plans.Plans("mlp"), _plain_of_dtensor)
GATED = Form("gated_mlp", gated_mlp_spec, plans.Plans("gated_mlp"), _gated_of_dtensor)


def _of_form(
    form: Form, x: Tensor, weights: Sequence[Any], options: tuple[Any, ...], backend: str | None
) -> Tensor:
    """The MLP of the tensors of an MLPWeights and of Options, without the kind of residual."""
    adds, residual = "", weights[8]
    if residual is not None:
        adds = "x" if residual is x else "apart"
        if adds == "x":
            weights = *weights[:8], None, weights[9]
    if invariance.wanted():
        return _by_rows(form, x, MLPWeights(*weights), Options(*options)._replace(residual=adds), backend)
    tensors, asked = (x, *weights), (*options, adds, backend)
    plan = form.known.latest(tensors, asked)
    if plan is not None:
        return _planned(plan, x, weights)
    key = plans.key(tensors, asked)
    plan = form.known.find(key)
    if plan is not None:
        form.known.again(tensors, asked, plan)
        return _planned(plan, x, weights)
    given = Options(*options)._replace(residual=adds)
    if spread.is_dtensor(x):
        _refuse_spread_branch(given)
        names = "activation", "packed", "save", "chunk", "match_eager"
        named = {**{name: getattr(given, name) for name in names}, "backend": backend}
        return form.of_dtensor(x, MLPWeights(*weights), named)
    return _first(form, x, MLPWeights(*weights), given, check_backend(backend), key)


def _by_rows(form: Form, x: Tensor, weights: MLPWeights, options: Options, backend: str | None) -> Tensor:
    """The MLP under `fastattn.invariant`, of a fixed number of rows at a time."""
    check_backend(backend)
    if spread.is_dtensor(x):
        raise ValueError("invariant must be False for DTensors, whose products are split over ranks")
    cast, *rest = autocast(x, *weights[:6])
    given = weights.residual
    residual = given.to(cast.dtype) if isinstance(given, Tensor) else given
    checked = weights._replace(residual=residual, **dict(zip(MLPWeights._fields, rest, strict=False)))
    spec = form.make_spec(cast, checked, options)
    if spec.dropout:
        raise ValueError(
            f"dropout_p must be 0 where a call is invariant, got {options.dropout_p}: the random numbers of a row "
            "depend on its place in the batch"
        )
    by_rows = tuple(options._replace(chunk="auto")[:-1])

    def function(x: Tensor, residual: Tensor | None) -> Tensor:
        return _of_form(form, x, weights._replace(residual=residual, dropout_state=None), by_rows, backend)

    if not math.prod(x.shape[:-1]):
        with invariance.invariant(False):
            return function(x, x if options.residual == "x" else given)
    served = backend or os.environ.get("FASTATTN_BACKEND") or "portable"
    products = [w for w in (checked.w_in, checked.w_up, checked.w_out) if w is not None]
    sizes = sizes_of_parts(_tokens(cast), weights.w_out.shape[1], products if served == "portable" else ())
    if options.residual == "x":
        y = in_rows(lambda rows: function(rows[0], rows[0]), (_tokens(x),), sizes)
    elif given is None:
        y = in_rows(lambda rows: function(rows[0], None), (_tokens(x),), sizes)
    else:
        y = in_rows(lambda rows: function(rows[0], rows[1]), (_tokens(x), _tokens(given)), sizes)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _planned(plan: operators.MLPPlan, x: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
    """The MLP of a call that was checked before."""
    if plan.spec.dropout and weights[-1] is None:
        weights = *weights[:-1], fresh_dropout_state(1, x.device)
    if x.dim() == 2:
        return plans.run(plan, x, *weights)[0]
    if (residual := weights[-2]) is not None:
        weights = *weights[:-2], _tokens(residual), weights[-1]
    (y,) = plans.run(plan, _tokens(x), *weights)
    shape = (*x.shape[:-1], y.shape[-1])
    # A layer returns this sum: FSDP2 wants it to be no view, because an operation in place would lose its hook.
    return torch.ops.aten._unsafe_view.default(y, shape) if plan.spec.residual else y.view(shape)


def _first(
    form: Form, x: Tensor, weights: MLPWeights, options: Options, backend: str | None, key: plans.Key | None
) -> Tensor:
    """The MLP of a call that has no plan; it gets one if it has a key."""
    if key is None:
        return _unplanned(form, x, weights, options, backend)
    spec = form.make_spec(x, weights, options)
    if not spec.dropout:
        weights = weights._replace(dropout_state=None)
    plan = operators.MLPPlan.of(_tokens(x), weights, spec, backend)
    form.known.keep(key, plan)
    return _planned(plan, x, weights)


def _unplanned(form: Form, x: Tensor, weights: MLPWeights, options: Options, backend: str | None) -> Tensor:
    """Autocast casts what goes into the products. It leaves the norm and the sum with the residual to their own
    dtypes, so that these are steps of their own then."""
    branch = options.norm or options.dropout_p or options.residual
    if branch and isinstance(x, Tensor) and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return _step_by_step(form, x, weights, options, backend)
    x, *rest = autocast(x, *weights[:6])
    weights = weights._replace(**dict(zip(MLPWeights._fields, rest, strict=False)))
    return _mlp(x, weights, form.make_spec(x, weights, options), backend)


def _step_by_step(form: Form, x: Tensor, weights: MLPWeights, options: Options, backend: str | None) -> Tensor:
    """A residual branch under autocast, norm, MLP, dropout and sum each for itself."""
    residual = x if options.residual == "x" else weights.residual
    if residual is not None:
        arguments.tensor("residual", residual, or_none=True)
    cast, *rest = autocast(x, *weights[:6])
    alike = None if residual is None else cast.new_empty((), device=residual.device).expand(residual.shape)
    checked = weights._replace(residual=alike, **dict(zip(MLPWeights._fields, rest, strict=False)))
    spec = form.make_spec(cast, checked, options)
    if options.norm == "rms":
        x = rms_norm(x, weights.norm_weight, eps=spec.norm_eps, backend=backend)
    elif options.norm == "layer":
        x = layer_norm(x, weights.norm_weight, weights.norm_bias, eps=spec.norm_eps, backend=backend)
    (x,) = autocast(x)
    y = _mlp(x, MLPWeights(*rest), replace(spec, norm="", norm_eps=0.0, dropout=0.0, residual=""), backend)
    if spec.dropout:
        state = weights.dropout_state
        state = fresh_dropout_state(1, x.device) if state is None else state
        y = definition.dropped(_tokens(y), state, spec.dropout).view(y.shape)
    return y if residual is None else residual + y


def _refuse_spread_branch(options: Options) -> None:
    for name, asked in (("norm", options.norm), ("residual", options.residual), ("dropout_p", options.dropout_p)):
        if asked:
            raise ValueError(
                f"{name} must not be given for DTensors: norm, dropout and sum are steps of their own"
            )


def _mlp(x: Tensor, weights: MLPWeights, spec: MLPSpec, backend: str | None) -> Tensor:
    """Flatten x's leading dimensions to tokens, and keep something for a backward only if there may be one."""
    wanted = any(t is not None and t.requires_grad for t in (x, *weights))
    # Under torch.func a wrapped tensor may not show that an outer transform wants its gradient.
    if not (torch.is_grad_enabled() and (wanted or torch._C._are_functorch_transforms_active())):
        spec = replace(spec, save="nothing")
    state, residual = weights.dropout_state if spec.dropout else None, weights.residual
    if spec.dropout and state is None:
        state = fresh_dropout_state(1, x.device)
    residual = None if residual is None else _tokens(residual)
    weights = weights._replace(residual=residual, dropout_state=state)
    y, *_ = operators.mlp(_tokens(x), *weights, *operators.options_of(spec), backend)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
