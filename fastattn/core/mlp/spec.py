"""What is asked of an MLP: validated once, then frozen. Tensors travel beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fastattn.ground import arguments
from fastattn.ground.checks import check_activation, check_input, check_linear, shape_of

SAVES = ("auto", "preactivation", "int8", "nothing")
PACKED = ("gate_up", "up_gate")

# chunk="auto" takes as many tokens as let three hidden-wide tensors fit into so many bytes, but not fewer than
# these. Every chunk reads and writes the weight gradients once more, in float32. By bytes and flop, that takes
# 280 / tokens of the backward's time on an H200, and about 40 / tokens on a core of a CPU.
CHUNK_BYTES = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}
FEWEST_TOKENS = {"cuda": 4096, "cpu": 1024}


@dataclass(frozen=True)
class MLPSpec:
    """Which MLP: y = hidden W_out^T + b_out, where hidden = act(x W_in^T + b_in), or in gated form
    act(x W_in^T + b_in) * (x W_up^T + b_up).

    activation: one of ACTIVATIONS.
    gated: whether the hidden layer has the second factor.
    packed: one of PACKED if one weight (2h, d) holds gate's and up's, in this order; "" if it does not.
    save: one of SAVES, what the forward keeps for the backward.
    chunk: how many tokens are computed at a time; 0 for all.
    match_eager: whether the backward rounds wherever eager PyTorch rounds.
    """

    activation: str = "gelu"
    gated: bool = False
    packed: str = ""
    save: str = "auto"
    chunk: int = 0
    match_eager: bool = False

    def halves(self, t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Gate's part and up's of a tensor that holds both: in the packed weight's order, else gate first."""
        first, second = t.tensor_split(2, dim)
        return (second, first) if self.packed == "up_gate" else (first, second)


class MLPWeights(NamedTuple):
    """An MLP's tensors, laid out as torch.nn.Linear's: weights (out, in), biases (out,) or None.

    w_in (h, d), w_up (h, d) or None without a gate, w_out (out, h). If packed, w_in is (2h, d), b_in (2h,), and
    w_up and b_up are None.
    """

    w_in: Tensor
    b_in: Tensor | None
    w_up: Tensor | None
    b_up: Tensor | None
    w_out: Tensor
    b_out: Tensor | None = None


class Options(NamedTuple):
    """The options of a call as the caller gave them."""

    activation: str
    save: str = "auto"
    chunk: int | str = "auto"
    match_eager: bool = False
    packed: str | None = None


def mlp_spec(x: Tensor, weights: MLPWeights, options: Options) -> MLPSpec:
    """Check x (..., d), w1 (h, d), b1 (h,), w2 (out, h), b2 (out,) and the options."""
    w1, b1, _, _, w2, b2 = weights
    check_input(x)
    check_linear("w1", w1, "b1", b1, x, "x's width", x.shape[-1])
    check_linear("w2", w2, "b2", b2, x, "w1's rows", w1.shape[0])
    return _spec(x, w2, options, gated=False)


def gated_mlp_spec(x: Tensor, weights: MLPWeights, options: Options) -> MLPSpec:
    """Check x (..., d), w_gate and w_up (h, d), w_down (out, h), their biases and the options."""
    w_gate, b_gate, w_up, b_up, w_down, b_down = weights
    arguments.choice("packed", options.packed, PACKED, or_none=True)
    check_input(x)
    check_linear("w_gate", w_gate, "b_gate", b_gate, x, "x's width", x.shape[-1])
    if options.packed is not None:
        _check_packed(weights, options.packed)
        check_linear("w_down", w_down, "b_down", b_down, x, "half of w_gate's rows", w_gate.shape[0] // 2)
        return _spec(x, w_down, options, gated=True)
    arguments.tensor("w_up", w_up)
    assert w_up is not None
    check_linear("w_up", w_up, "b_up", b_up, x, "x's width", x.shape[-1])
    if w_up.shape[0] != w_gate.shape[0]:
        raise ValueError(f"w_up must have w_gate's shape {shape_of(w_gate)}, got {shape_of(w_up)}")
    check_linear("w_down", w_down, "b_down", b_down, x, "w_gate's rows", w_gate.shape[0])
    return _spec(x, w_down, options, gated=True)


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


def _spec(x: Tensor, w_out: Tensor, options: Options, gated: bool) -> MLPSpec:
    activation, save, chunk, match_eager, packed = options
    check_activation(activation)
    arguments.choice("save", save, SAVES)
    match_eager = arguments.flag("match_eager", match_eager)
    size = checked_chunk(chunk)
    if isinstance(size, str):
        size = automatic_chunk(x.is_cuda, w_out.shape[1], x.element_size(), save)
    return MLPSpec(activation, gated, packed or "", save, size, match_eager)


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
