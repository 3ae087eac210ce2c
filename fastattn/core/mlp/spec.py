"""What is asked of an MLP: validated once, then frozen. Tensors travel beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.core.attention.spec import check_dropout
from fastattn.core.heads.spec import check_eps
from fastattn.core.norm.spec import NormSpec
from fastattn.ground import arguments
from fastattn.ground.checks import (
    check_activation,
    check_beside,
    check_floating,
    check_input,
    check_linear,
    check_same,
    lse_dtype,
    shape_of,
)

SAVES = ("auto", "preactivation", "int8", "nothing")
PACKED = ("gate_up", "up_gate")
NORMS = ("rms", "layer")
RESIDUALS = ("", "x", "apart")
NEVER, AUTO, ALWAYS = "never", "auto", "always"

# chunk="auto" takes as many tokens as let three hidden-wide tensors fit into so many bytes, but not fewer than
# these. Every chunk reads and writes the weight gradients once more, in float32. By bytes and flop, that takes
# 280 / tokens of the backward's time on an H200, and about 40 / tokens on a core of a CPU.
CHUNK_BYTES = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}
FEWEST_TOKENS = {"cuda": 4096, "cpu": 1024}


@dataclass(frozen=True)
class MLPSpec:
    """Which MLP: y = hidden W_out^T + b_out, where hidden = act(x W_in^T + b_in), or in gated form
    act(x W_in^T + b_in) * (x W_up^T + b_up). As a residual branch it reads a norm of x, and y is dropped out and
    added to a residual.

    activation: one of ACTIVATIONS.
    gated: whether the hidden layer has the second factor.
    packed: one of PACKED if one weight (2h, d) holds gate's and up's, in this order; "" if it does not.
    save: one of SAVES, what the forward keeps for the backward.
    chunk: how many tokens are computed at a time; 0 for all.
    match_eager: whether the backward rounds wherever eager PyTorch rounds.
    norm: one of NORMS, or "" for none, and norm_eps: the norm of x that the first products read.
    dropout: the probability of dropping an element of the output; a multiple of 2**-16.
    residual: one of RESIDUALS, what is added to the output: x itself, or a tensor of its own.
    whole: whether one kernel computes the whole layer and keeps nothing but x: NEVER, ALWAYS, or AUTO, where that
        is known to be faster (see `whole.py`).
    """

    activation: str = "gelu"
    gated: bool = False
    packed: str = ""
    save: str = "auto"
    chunk: int = 0
    match_eager: bool = False
    norm: str = ""
    norm_eps: float = 0.0
    dropout: float = 0.0
    residual: str = ""
    whole: str = NEVER

    @property
    def norm_spec(self) -> NormSpec:
        """The norm of x, for the family of norms."""
        return NormSpec(self.norm == "layer", self.norm_eps)

    def halves(self, t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Gate's part and up's of a tensor that holds both: in the packed weight's order, else gate first."""
        first, second = t.tensor_split(2, dim)
        return (second, first) if self.packed == "up_gate" else (first, second)


class MLPWeights(NamedTuple):
    """An MLP's tensors beside x, laid out as torch.nn.Linear's: weights (out, in), biases (out,) or None.

    w_in (h, d), w_up (h, d) or None without a gate, w_out (out, h). If packed, w_in is (2h, d), b_in (2h,), and
    w_up and b_up are None. Of a residual branch, each may be None: norm_weight and norm_bias (d,); the residual
    (T, out), if it is not x; dropout_state (1, 2), as `fastattn.dropout_state(1)` gives it.
    """

    w_in: Tensor
    b_in: Tensor | None
    w_up: Tensor | None
    b_up: Tensor | None
    w_out: Tensor
    b_out: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    residual: Tensor | None = None
    dropout_state: Tensor | None = None


class Options(NamedTuple):
    """The options of a call as the caller gave them."""

    activation: str
    save: str = "auto"
    chunk: int | str = "auto"
    match_eager: bool = False
    packed: str | None = None
    norm: str | None = None
    norm_eps: float | None = None
    dropout_p: float = 0.0
    residual: str = ""


def mlp_spec(x: Tensor, weights: MLPWeights, options: Options) -> MLPSpec:
    """Check x (..., d), w1 (h, d), b1 (h,), w2 (out, h), b2 (out,) and the options."""
    w1, b1, _, _, w2, b2 = weights[:6]
    check_input(x)
    check_linear("w1", w1, "b1", b1, x, "x's width", x.shape[-1])
    check_linear("w2", w2, "b2", b2, x, "w1's rows", w1.shape[0])
    return _spec(x, weights, options, gated=False)


def gated_mlp_spec(x: Tensor, weights: MLPWeights, options: Options) -> MLPSpec:
    """Check x (..., d), w_gate and w_up (h, d), w_down (out, h), their biases and the options."""
    w_gate, b_gate, w_up, b_up, w_down, b_down = weights[:6]
    arguments.choice("packed", options.packed, PACKED, or_none=True)
    check_input(x)
    check_linear("w_gate", w_gate, "b_gate", b_gate, x, "x's width", x.shape[-1])
    if options.packed is not None:
        _check_packed(weights, options.packed)
        check_linear("w_down", w_down, "b_down", b_down, x, "half of w_gate's rows", w_gate.shape[0] // 2)
        return _spec(x, weights, options, gated=True)
    arguments.tensor("w_up", w_up)
    assert w_up is not None
    check_linear("w_up", w_up, "b_up", b_up, x, "x's width", x.shape[-1])
    if w_up.shape[0] != w_gate.shape[0]:
        raise ValueError(f"w_up must have w_gate's shape {shape_of(w_gate)}, got {shape_of(w_up)}")
    check_linear("w_down", w_down, "b_down", b_down, x, "w_gate's rows", w_gate.shape[0])
    return _spec(x, weights, options, gated=True)


def _check_packed(weights: MLPWeights, packed: str) -> None:
    for name, t, holder in (("w_up", weights.w_up, "w_gate"), ("b_up", weights.b_up, "b_gate")):
        if t is not None:
            raise ValueError(
                f"{name} must be None if packed={packed!r}, because {holder} holds both; got a tensor"
            )
    if weights.w_in.shape[0] % 2:
        raise ValueError(
            f"w_gate must have an even number of rows if packed={packed!r}, got shape {shape_of(weights.w_in)}"
        )


def _spec(x: Tensor, weights: MLPWeights, options: Options, gated: bool) -> MLPSpec:
    activation, save, chunk, match_eager, packed, *_ = options
    check_activation(activation)
    arguments.choice("save", save, SAVES)
    match_eager = arguments.flag("match_eager", match_eager)
    size = checked_chunk(chunk)
    if isinstance(size, str):
        size = automatic_chunk(x.is_cuda, weights.w_out.shape[1], x.element_size(), save)
    eps = _check_norm(x, weights, options)
    dropout = _check_branch(x, weights, options)
    norm = options.norm or ""
    # What one kernel does not do: a norm, dropout, a residual; and keeping or rounding as the caller asks for.
    beside = norm or dropout or options.residual or match_eager or save not in ("auto", "nothing")
    return MLPSpec(
        activation, gated, packed or "", save, size, match_eager, norm, eps, dropout, options.residual,
        NEVER if beside else AUTO,
    )  # fmt: skip


def _check_norm(x: Tensor, weights: MLPWeights, options: Options) -> float:
    """Check what is given of a norm; its epsilon, 0 without a norm."""
    arguments.choice("norm", options.norm, NORMS, or_none=True)
    beside = (("norm_weight", weights.norm_weight), ("norm_bias", weights.norm_bias))
    if options.norm is None:
        for name, value in (*beside, ("norm_eps", options.norm_eps)):
            if value is not None:
                raise ValueError(f'{name} must be None without a norm; norm="rms" or norm="layer" asks for one')
        return 0.0
    if options.norm == "rms" and weights.norm_bias is not None:
        raise ValueError('norm_bias must be None if norm="rms", which has no bias; got a tensor')
    for name, t in beside:
        if t is not None:
            check_beside(name, t, x, None, "x")
            check_floating(name, t)
            if t.dim() != 1 or t.shape[0] != x.shape[-1]:
                raise ValueError(f"{name} must have shape ({x.shape[-1]},), got {shape_of(t)}")
    if x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1 for a norm, got {shape_of(x)}")
    if options.norm_eps is None:
        return 1e-5 if options.norm == "layer" else torch.finfo(lse_dtype(x.dtype)).eps
    return check_eps(options.norm_eps, "norm_eps")


def _check_branch(x: Tensor, weights: MLPWeights, options: Options) -> float:
    """Check the residual and the state of random numbers; the probability of dropping."""
    residual, state = weights.residual, weights.dropout_state
    residual = x if options.residual == "x" and residual is None else residual
    if residual is not None:
        check_beside("residual", residual, x, None, "x")
        check_same("residual", residual, "x", x)
        shape = (*x.shape[:-1], weights.w_out.shape[0])
        if residual.dim() != len(shape) or any(a != b for a, b in zip(residual.shape, shape, strict=True)):
            raise ValueError(f"residual must have the result's shape {shape}, got {shape_of(residual)}")
    if state is not None:
        check_beside("dropout_state", state, x, ((1, 2),), "x")
        if state.dtype != torch.int64:
            raise TypeError(f"dropout_state must be int64, got {state.dtype}")
    return check_dropout(options.dropout_p)


def checked_chunk(chunk: int | str) -> int | str:
    """The argument `chunk`: "auto", or a number of tokens."""
    if isinstance(chunk, str):
        if chunk != "auto":
            raise ValueError(f'chunk must be "auto" or a number of tokens, got {chunk!r}')
        return chunk
    return arguments.integer("chunk", chunk, least=1, what='"auto" or a number of tokens')


def automatic_chunk(on_gpu: bool, hidden: int, itemsize: int, save: str) -> int:
    """How many tokens at a time; 0 for all, where the forward keeps tensors of all tokens anyway, at full size."""
    if save in ("auto", "preactivation"):
        return 0
    device = "cuda" if on_gpu else "cpu"
    tokens = CHUNK_BYTES[device] // max(1, 3 * hidden * itemsize)
    return max(FEWEST_TOKENS[device], tokens // 256 * 256)
