"""Attention calls as data: inputs, the exact answer, the eager answer, and ours, forward and backward."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from hardware import DEVICE
from tolerance import assert_as_exact_as_eager
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.backends import torch_flash
from fastattn.spec import AttentionSpec, ScoreTensors, lse_dtype

# "tiled" is the portable backend kept from handing over to PyTorch's flash attention.
IMPLEMENTATIONS = ("triton", "portable", "tiled", "reference")


@dataclass(frozen=True)
class Problem:
    """One call. `layout` is the order in which q, k, v lie in memory: "bhld", "blhd" or "strided"."""

    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    queries: int = 48
    keys: int = 48
    width: int = 16
    value_width: int = 16
    causal: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "bhld"
    lse_gradient: bool = False
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    lengths: bool = False
    alibi: bool = False
    sinks: bool = False

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        sizes = (
            (self.heads, self.queries, self.width),
            (self.key_heads, self.keys, self.width),
            (self.key_heads, self.keys, self.value_width),
        )
        q, k, v = (self._tensor(*size) for size in sizes)
        return q, k, v

    def _tensor(self, heads: int, length: int, width: int) -> Tensor:
        if self.layout == "blhd":
            return self._random(self.batch, length, heads, width).transpose(1, 2)
        if self.layout == "strided":
            return self._random(self.batch, heads, length, 3, width * 2)[:, :, :, 1, ::2]
        return self._random(self.batch, heads, length, width)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(self.dtype)

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.causal, self.scale or self.width**-0.5, self.window, self.softcap)

    @property
    def options(self) -> dict[str, object]:
        """What `fastattn.attention` is called with, beside tensors."""
        return {"causal": self.causal, "scale": self.scale, "window": self.window, "softcap": self.softcap}

    def score_tensors(self) -> ScoreTensors:
        """Key lengths from none to all, slopes as ALiBi's, sinks of the size of scores."""
        lengths = slopes = sinks = None
        if self.lengths:
            lengths = torch.tensor(
                [self.keys * (b + 1) // (self.batch + 1) for b in range(self.batch)], device=DEVICE
            )
        if self.alibi:
            slopes = torch.tensor([0.5 / (h + 1) for h in range(self.heads)], device=DEVICE)
        if self.sinks:
            sinks = torch.randn(self.heads, device=DEVICE)
        return ScoreTensors(lengths, slopes, sinks)


@contextmanager
def implementation(name: str):
    """The backend argument that selects an implementation, within which it is the one that runs."""
    if name == "tiled":
        with mock.patch.object(torch_flash, "serves", lambda *_: False):
            yield "portable"
    else:
        yield name


def run(inputs, upstream, call) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv (and the gradients of further inputs) of `call(q, k, v, ...) -> out, lse`. dlse is None
    or nothing flows into lse."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, lse = call(*leaves)
    dout, dlse = upstream
    outputs, gradients = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    return out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, gradients)


def check(problem: Problem, name: str) -> None:
    """Ours against float64, by the error of the eager computation in the same dtype."""
    torch.manual_seed(0)
    inputs = problem.inputs()
    dout = torch.randn(problem.batch, problem.heads, problem.queries, problem.value_width, device=DEVICE)
    dlse = torch.randn(problem.batch, problem.heads, problem.queries, device=DEVICE)
    dout, dlse = dout.to(problem.dtype), dlse if problem.lse_gradient else None
    tensors = problem.score_tensors()
    sinks = () if tensors.sinks is None else (tensors.sinks.to(lse_dtype(problem.dtype)),)

    def definition(q, k, v, *sinks):
        beside = (
            None if t is None else t.expand(problem.batch, problem.heads) for t in (tensors.alibi_slopes, *sinks)
        )
        slopes, sink = (*beside, None)[:2]
        return reference.attention(q, k, v, problem.spec, ScoreTensors(tensors.key_lengths, slopes, sink))

    exact_upstream = (dout.double(), None if dlse is None else _finite_rows(dlse.double(), problem))
    eager_upstream = (dout, None if dlse is None else _finite_rows(dlse, problem))
    exact = run([t.double() for t in (*inputs, *sinks)], exact_upstream, definition)
    eager = run((*inputs, *sinks), eager_upstream, definition)
    with implementation(name) as backend:

        def ours(q, k, v, sinks=None):
            return fastattn.attention(
                q, k, v, **problem.options, key_lengths=tensors.key_lengths, alibi_slopes=tensors.alibi_slopes,
                sinks=sinks, return_lse=True, backend=backend,
            )  # fmt: skip

        actual = run((*inputs, *sinks), (dout, dlse), ours)
    for position, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        # delta is made of the rounded output, and it is all that a sink's gradient is made of.
        rounded = problem.dtype if position == 5 else None
        assert_as_exact_as_eager(a, x, e, gradient=position >= 2, dtype=rounded)


def _finite_rows(dlse: Tensor, problem: Problem) -> Tensor:
    """No gradient flows through the lse of rows that see nothing; autograd of the definition would give NaN."""
    if problem.sinks:
        return dlse
    lengths = problem.score_tensors().key_lengths
    sees = reference.visible(problem.queries, problem.keys, problem.spec, dlse.device, lengths).any(-1)
    return dlse * sees
