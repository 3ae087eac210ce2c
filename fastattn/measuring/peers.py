"""What is measured: problems, and all implementations (peers) that can solve them, fastattn included.

A problem knows its inputs, its flops and its definition. A peer is a function `build(problem, device)` that
returns the call to measure, `call(*inputs) -> output`, or raises `Unavailable` with the reason. A call that needs
its inputs in another form has a method `prepare(inputs)`, which runs once and is not timed. Other libraries are
imported only when they are measured.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention import definition as attention_definition
from fastattn.core.attention import functional as attention_functional
from fastattn.core.attention.spec import AttentionSpec
from fastattn.core.mlp import functional as mlp_functional
from fastattn.flops import attention_flops

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"
DIRECTIONS = (FORWARD, BACKWARD, TRAINING)

Call = Callable[..., Any]  # tensors to a tensor
Build = Callable[[Any, torch.device], Call]


class Unavailable(Exception):
    """This peer cannot solve this problem here; the message says why."""


def mlp_flops(tokens: int, width: int, hidden: int, *, gated: bool, direction: str) -> int:
    """Multiplications and additions of the plain matrix products; the backward has two for each forward one."""
    return 2 * tokens * width * hidden * (3 if gated else 2) * {FORWARD: 1, BACKWARD: 2, TRAINING: 3}[direction]


@dataclass(frozen=True)
class AttentionProblem:
    """Self-attention: q (batch, heads, length, width), k and v with `key_heads` heads, or as many as q."""

    batch: int
    heads: int
    length: int
    width: int
    causal: bool = False
    key_heads: int | None = None
    dtype: str = "bfloat16"
    family: ClassVar[str] = "attention"

    @property
    def label(self) -> str:
        grouped = f"/{self.key_heads}" if self.key_heads else ""
        mask = "causal" if self.causal else "full"
        return f"{mask} B{self.batch} H{self.heads}{grouped} L{self.length} D{self.width} {self.dtype}"

    def flops(self, direction: str) -> int:
        """Of the products over visible scores, two forward and five backward, whatever a peer really computes."""
        q = (self.batch, self.heads, self.length, self.width)
        k = (self.batch, self.key_heads or self.heads, self.length, self.width)
        forward = attention_flops(q, k, k, self.causal)
        backward = attention_flops(q, k, k, self.causal, backward=True)
        return {FORWARD: forward, BACKWARD: backward, TRAINING: forward + backward}[direction]

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """q, k, v, laid out (batch, length, heads, width) in memory, as a linear layer writes them."""
        heads = (self.heads, self.key_heads or self.heads, self.key_heads or self.heads)
        sizes = [(self.batch, self.length, h, self.width) for h in heads]
        return tuple(_random(size, self.dtype, device).transpose(1, 2) for size in sizes)

    def sample(self, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> Tensor:
        """The last rows of the first sequence: of `output`, or of the definition in float32."""
        q, k, v = (t[:1] for t in inputs)
        if output is not None:
            return output[:1, :, -SAMPLE:].float()
        spec = AttentionSpec(self.causal, self.width**-0.5)
        return attention_definition.attention(q[:, :, -SAMPLE:].float(), k.float(), v.float(), spec)[0]


@dataclass(frozen=True)
class MLPProblem:
    """act(x W1^T) W2^T, or gated; x (tokens, width)."""

    tokens: int
    width: int
    hidden: int
    gated: bool = False
    dtype: str = "bfloat16"
    family: ClassVar[str] = "mlp"

    @property
    def activation(self) -> str:
        """One that every peer has: the tanh approximation of GELU; if gated SiLU (SwiGLU)."""
        return "silu" if self.gated else "gelu_tanh"

    @property
    def label(self) -> str:
        form = "gated" if self.gated else "plain"
        return f"{form} T{self.tokens} d{self.width} h{self.hidden} {self.dtype}"

    def flops(self, direction: str) -> int:
        return mlp_flops(self.tokens, self.width, self.hidden, gated=self.gated, direction=direction)

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """x, then w1 and w2, or w_gate, w_up and w_down, (out, in), scaled so that outputs are about one."""
        into, out = (self.hidden, self.width), (self.width, self.hidden)
        weights = [into, into, out] if self.gated else [into, out]
        scaled = [_random(size, self.dtype, device) * size[1] ** -0.5 for size in weights]
        return _random((self.tokens, self.width), self.dtype, device), *scaled

    def sample(self, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> Tensor:
        """The first tokens: of `output`, or of the definition in float32."""
        if output is not None:
            return output[:SAMPLE].float()
        x, *weights = inputs
        return _eager_mlp(self)(x[:SAMPLE].float(), *(w.float() for w in weights))


Problem = AttentionProblem | MLPProblem
SAMPLE = 64  # rows of the output that are checked against the definition before anything is timed


def describe(problem: Problem) -> dict[str, Any]:
    """The problem as JSON; `problem_from` reads it back."""
    return {"family": problem.family, **asdict(problem)}


def problem_from(description: dict[str, Any]) -> Problem:
    sizes = dict(description)
    return {"attention": AttentionProblem, "mlp": MLPProblem}[sizes.pop("family")](**sizes)


def _random(size: tuple[int, ...], dtype: str, device: torch.device) -> Tensor:
    return torch.randn(size, device=device, dtype=torch.float32).to(getattr(torch, dtype))


# ---- fastattn ----


def _ours(backend: str) -> Build:
    def build(problem: Problem, device: torch.device) -> Call:
        if isinstance(problem, AttentionProblem):
            return functools.partial(attention_functional.attention, causal=problem.causal, backend=backend)
        options: dict[str, Any] = {"activation": problem.activation, "backend": backend}
        if problem.gated:
            return functools.partial(mlp_functional.gated_mlp, **options)
        return lambda x, w1, w2: mlp_functional.mlp(x, w1, None, w2, None, **options)

    return build


# ---- PyTorch ----


def _eager(problem: Problem, device: torch.device) -> Call:
    """What one writes without a library: every intermediate result is stored."""
    return _eager_attention(problem) if isinstance(problem, AttentionProblem) else _eager_mlp(problem)


def _eager_attention(problem: AttentionProblem) -> Call:
    group = problem.heads // (problem.key_heads or problem.heads)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.mT * problem.width**-0.5
        if problem.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return torch.softmax(scores, -1) @ v

    return call


def _eager_mlp(problem: MLPProblem) -> Call:
    if problem.gated:
        return lambda x, w_gate, w_up, w_down: F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)
    return lambda x, w1, w2: F.linear(F.gelu(F.linear(x, w1), approximate="tanh"), w2)


def _compiled(problem: Problem, device: torch.device) -> Call:
    return _compile(_eager(problem, device))


def _compile(function: Call) -> Call:
    """torch.compile for exactly these sizes, with a backward that can be repeated on one graph."""
    config = importlib.import_module("torch._functorch.config")
    if hasattr(config, "donated_buffer"):
        # Otherwise the backward overwrites what the forward saved, and cannot be timed alone.
        setattr(config, "donated_buffer", False)  # noqa: B010 - not in the module's type
    return torch.compile(function, dynamic=False, fullgraph=True)


def _sdpa(name: str) -> Build:
    """F.scaled_dot_product_attention with only one backend allowed."""

    def build(problem: AttentionProblem, device: torch.device) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = getattr(SDPBackend, name)
        grouped = problem.key_heads is not None

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=grouped)

        return call

    return build


def _flex(problem: AttentionProblem, device: torch.device) -> Call:
    if device.type == "cpu":
        raise Unavailable("flex_attention has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if problem.causal:
        length = problem.length
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
    return _compile(functools.partial(flex_attention, block_mask=mask, enable_gqa=problem.key_heads is not None))


class _PlainGemms(torch.autograd.Function):
    """The matrix products of an MLP and nothing else: no fused MLP with these GEMMs can be faster.

    There is no activation, so the results have no meaning.
    """

    @staticmethod
    def forward(ctx, x, w_down, *w_first):
        hidden = [x @ w.t() for w in w_first]
        ctx.save_for_backward(x, w_down, *w_first, *hidden)
        return hidden[0] @ w_down.t()

    @staticmethod
    def backward(ctx, dy):
        x, w_down, *rest = ctx.saved_tensors
        w_first, hidden = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        dhidden = [dy @ w_down, *hidden[1:]]
        dx = dhidden[0] @ w_first[0]
        for gradient, weight in zip(dhidden[1:], w_first[1:], strict=True):
            dx = torch.addmm(dx, gradient, weight)
        return dx, dy.t() @ hidden[0], *(gradient.t() @ x for gradient in dhidden)


def _plain_gemms(problem: MLPProblem, device: torch.device) -> Call:
    return lambda x, *weights: _PlainGemms.apply(x, weights[-1], *weights[:-1])


# ---- other libraries ----


def _flash_attention_4(problem: AttentionProblem, device: torch.device) -> Call:
    flash = _imported("flash_attn.cute", "flash_attn_func")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash(*(t.transpose(1, 2) for t in (q, k, v)), causal=problem.causal)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return call


def _sage_attention(problem: AttentionProblem, device: torch.device) -> Call:
    """Quantised scores, so less exact; forward only."""
    sage = _imported("sageattention", "sageattn")
    return lambda q, k, v: sage(q, k, v, tensor_layout="HND", is_causal=problem.causal)


class _Quack:
    """If gated, it takes one weight in which the rows of gate and up alternate, as in its checkpoints."""

    def __init__(self, problem: MLPProblem, device: torch.device) -> None:
        self.mlp = _imported("quack.mlp", "mlp_func")
        self.activation = "swiglu" if problem.gated else "gelu_tanh_approx"

    def prepare(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *w_first, w_down = inputs
        return x, torch.stack(w_first, 1).flatten(0, 1), w_down

    def __call__(self, x: Tensor, w_first: Tensor, w_down: Tensor) -> Tensor:
        return self.mlp(x, w_first, w_down, activation=self.activation)


def _liger(problem: MLPProblem, device: torch.device) -> Call:
    name = ("swiglu", "LigerSiLUMulFunction") if problem.gated else ("geglu", "LigerGELUMulFunction")
    multiply = _imported(f"liger_kernel.ops.{name[0]}", name[1])
    if not problem.gated:
        raise Unavailable("Liger fuses gated activations only")
    return lambda x, w_gate, w_up, w_down: F.linear(multiply.apply(F.linear(x, w_gate), F.linear(x, w_up)), w_down)


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{module.split('.')[0]} is not installed") from error
    except Exception as error:  # a broken installation raises anything
        raise Unavailable(f"{module} cannot be imported ({type(error).__name__})") from error


ATTENTION_PEERS: dict[str, Build] = {
    "fastattn triton": _ours("triton"),
    "fastattn portable": _ours("portable"),
    "SDPA cuDNN": _sdpa("CUDNN_ATTENTION"),
    "SDPA flash": _sdpa("FLASH_ATTENTION"),
    "SDPA memory-efficient": _sdpa("EFFICIENT_ATTENTION"),
    "SDPA math": _sdpa("MATH"),
    "flex_attention": _flex,
    "flash-attn 4": _flash_attention_4,
    "SageAttention": _sage_attention,
    "compiled eager": _compiled,
    "eager": _eager,
}
MLP_PEERS: dict[str, Build] = {
    "fastattn triton": _ours("triton"),
    "fastattn portable": _ours("portable"),
    "plain GEMMs": _plain_gemms,
    "compiled eager": _compiled,
    "quack": _Quack,
    "Liger": _liger,
    "eager": _eager,
}
# Not a competitor, but the time of the products alone. Its output has no meaning and is not checked.
FLOORS = frozenset({"plain GEMMs"})
FORWARD_ONLY = frozenset({"SageAttention"})
# The module that each of these peers imports.
GPU_LIBRARIES = {
    "flash-attn 4": "flash_attn",
    "SageAttention": "sageattention",
    "quack": "quack",
    "Liger": "liger_kernel",
}


def peers_of(problem: Problem) -> dict[str, Build]:
    return ATTENTION_PEERS if isinstance(problem, AttentionProblem) else MLP_PEERS


def is_ours(peer: str) -> bool:
    return peer.startswith("fastattn")


def is_rival(peer: str) -> bool:
    """Whether this peer may be "the best peer" that fastattn is compared with."""
    return not is_ours(peer) and peer not in FLOORS
