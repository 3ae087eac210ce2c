"""Attention calls as data: inputs, the exact answer, the eager answer, and ours, forward and backward."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from hardware import DEVICE
from hypothesis import strategies as st
from tolerance import TINY, assert_as_exact_as_eager
from torch import Tensor

import fastattn
from fastattn import masks
from fastattn.core import plans
from fastattn.core.attention import definition as attention_definition
from fastattn.core.attention import torch_flash
from fastattn.core.attention.dropout import state_of_part
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors, check_dropout
from fastattn.ground.checks import lse_dtype

# "tiled" is the portable backend kept from handing over to PyTorch's flash attention.
IMPLEMENTATIONS = ("triton", "portable", "tiled", "reference")


OPTIONS = ("causal", "scale", "window", "softcap", "precision", "invariant")


@dataclass(frozen=True)
class Problem:
    """One call. `layout` is the order in which q, k, v lie in memory: "bhld", "blhd", "packed" (each one of three
    side by side) or "strided"."""

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
    head_scale: bool = False  # of any sign
    bias: tuple[int, int, int, int] | None = None  # 1 where the bias has size 1, else 0
    masked: bool = False  # the bias says which keys are seen
    radius: int | None = None  # of a relative bias
    lists: str = ""  # a key of MASKS, given as block lists
    intervals: bool = False  # documents as sequences of any number of queries and keys, causal
    dropout: float = 0.0
    of_part: bool = False  # dropout draws as for a part of a whole
    precision: str | None = None
    invariant: bool = False

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
        if self.layout == "packed":
            return self._random(self.batch, length, 3, heads, width)[:, :, 1].transpose(1, 2)
        if self.layout == "strided":
            return self._random(self.batch, heads, length, 3, width * 2)[:, :, :, 1, ::2]
        return self._random(self.batch, heads, length, width)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(self.dtype)

    @property
    def spec(self) -> AttentionSpec:
        dropout = check_dropout(self.dropout)
        layout = self.lowered().packed[1] if self.lists else None
        scale = 1.0 if self.head_scale else self.scale or self.width**-0.5
        precision = self.precision or "ieee"
        shared = self.causal, scale, self.window, self.softcap, dropout, precision
        return AttentionSpec(*shared, layout, self.invariant)

    def arguments(self, tensors: ScoreTensors) -> dict[str, object]:
        """The keywords of `fastattn.attention` that stand for this problem and these tensors."""
        options = {name: getattr(self, name) for name in OPTIONS}
        elsewhere = ("mask", "intervals", "head_scale", "sequences")
        options |= {name: t for name, t in tensors._asdict().items() if name not in elsewhere}
        options |= {} if tensors.head_scale is None else {"scale": tensors.head_scale}
        mask = self.lowered() if self.lists or self.intervals else None
        return {**options, "dropout_p": self.dropout, "mask": mask}

    def score_tensors(self) -> ScoreTensors:
        """Key lengths from none to all, slopes as ALiBi's, biases and sinks of the size of scores, some -inf."""
        batch, heads = self.batch, self.heads
        lengths = slopes = bias = relative = sinks = state = None
        if self.lengths:
            lengths = torch.tensor([self.keys * (b + 1) // (batch + 1) for b in range(batch)], device=DEVICE)
        if self.alibi:
            slopes = torch.tensor(
                [0.5 / (h + 1) for h in range(heads)], device=DEVICE, dtype=lse_dtype(self.dtype)
            )
            slopes = slopes.expand(batch, heads)
        if self.bias is not None:
            full = (batch, heads, self.queries, self.keys)
            bias = self._random(*(1 if one else size for one, size in zip(self.bias, full, strict=True)))
            hidden = torch.rand_like(bias, dtype=torch.float32) < 0.2
            bias = ~hidden if self.masked else bias.masked_fill(hidden, float("-inf"))
        if self.radius is not None:
            relative = torch.randn(batch, heads, 2 * self.radius + 1, device=DEVICE)
        if self.sinks:
            sinks = torch.randn(heads, device=DEVICE).expand(batch, heads)
        if self.dropout:
            state = fastattn.dropout_state(batch, DEVICE)
            state = state_of_part(state, head=3, query=70, key=24) if self.of_part else state
        words = self.lowered().packed[0] if self.lists else None
        intervals = self.lowered().intervals.expand(batch, -1, -1) if self.intervals else None
        scales = None
        if self.head_scale:
            scales = (torch.randn(heads, device=DEVICE) * self.width**-0.5).expand(batch, heads)
        sequences = None
        if self.intervals and self.invariant:
            sequences = self.lowered().sequences.expand(batch, -1, -1)
        return ScoreTensors(lengths, slopes, bias, relative, sinks, state, words, intervals, scales, sequences)

    def lowered(self) -> masks.Lowered:
        """The mask for this call, as block lists even where it has a closed form; or as intervals."""
        sizes = (self.batch, self.heads, self.queries, self.keys)
        if not self.intervals:
            return MASKS[self.lists].lower(*sizes, DEVICE, closed_forms=False)
        # The first sequence may have no queries, the third has no keys.
        queries, keys = self.queries // 3, self.keys // 4
        begin_q, begin_k = [0, queries // 8, 2 * queries, 2 * queries + 1], [0, keys, 3 * keys, 3 * keys]
        return masks.packed_sequences([*begin_q, self.queries], [*begin_k, self.keys], True, (40, None)).lower(
            *sizes, DEVICE
        )


# Any mask: some of no pattern, some with rows that see nothing, one whose keys count several times.
MASKS = {
    "documents": masks.from_function(lambda b, h, i, j: (i // 37 == j // 37) & (j <= i)),
    "random": masks.from_function(lambda b, h, i, j: (i * 7 + j * 13 + h * 5 + b) % 11 < 4),
    "sparse": masks.blocks(torch.tensor([[1, 0, 2], [0, 0, 0], [0, 3, 1]]), 64) & ~masks.dilated(5),
    "not causal": ~masks.causal(),
    "bigbird": masks.bigbird(block=16, random=1),
    # From 768 tokens on, the lists of the first row and column are shared out.
    "global": masks.global_tokens([3]) | masks.from_function(lambda b, h, i, j: i // 64 == j // 64),
}


def without_plans():
    """Inside the block every call takes its operator. A plan would not notice what is patched below it."""
    return mock.patch.object(plans, "watched", lambda: True)


@contextmanager
def implementation(name: str):
    """The `backend` argument of an implementation; inside the block that implementation is the one that runs."""
    if name == "tiled":
        with without_plans(), mock.patch.object(torch_flash, "serves", lambda *_: False):
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
    learned = {name: t for name in LEARNED if (t := getattr(tensors, name)) is not None and t.is_floating_point()}
    rows_that_see = sees(problem, tensors)

    def definition(q, k, v, *learned_):
        return attention_definition.attention(
            q, k, v, problem.spec, tensors._replace(**dict(zip(learned, learned_, strict=True)))
        )

    def upstream(dtype):
        # No gradient flows through the lse of rows that see nothing; autograd of the definition would give NaN.
        return dout.to(dtype), None if dlse is None else (dlse * rows_that_see).to(lse_dtype(dtype))

    exact = run([t.double() for t in (*inputs, *learned.values())], upstream(torch.float64), definition)
    eager = run(
        (*inputs, *(t.to(lse_dtype(problem.dtype)) for t in learned.values())), upstream(problem.dtype), definition
    )
    with implementation(name) as backend:

        def ours(q, k, v, *learned_):
            arguments = problem.arguments(tensors._replace(**dict(zip(learned, learned_, strict=True))))
            return fastattn.attention(q, k, v, **arguments, return_lse=True, backend=backend)

        actual = run((*inputs, *learned.values()), (dout, dlse), ours)
    for position, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        # delta is computed from the rounded output and enters every gradient of what is added to the scores,
        # summed over rows that share a value: with the roundings of dout * out, which add up as random numbers do.
        rounded = problem.dtype if position >= 5 else None
        tiny = TINY + (torch.finfo(problem.dtype).eps * float((dout * exact[0]).norm()) if rounded else 0.0)
        if rounded and list(learned)[position - 5] == "head_scale":
            tiny *= problem.width**0.5  # and times the products that are scaled
        assert_as_exact_as_eager(a, x, e.to(a.dtype), gradient=position >= 2, dtype=rounded, tiny=tiny)


LEARNED = ("bias", "relative_bias", "sinks", "head_scale")


def sees(problem: Problem, tensors: ScoreTensors) -> Tensor:
    """Which rows see a key, or a sink; broadcasts to (B, Hq, Lq)."""
    if tensors.sinks is not None:
        return torch.ones((), dtype=torch.bool, device=DEVICE)
    sizes = problem.queries, problem.keys
    seen = attention_definition.visible(*sizes, problem.spec, DEVICE, tensors.key_lengths, tensors.intervals)
    if tensors.bias is not None:
        seen = seen & (tensors.bias if problem.masked else tensors.bias > float("-inf"))
    if problem.lists:
        sizes = (problem.batch, problem.heads, problem.queries, problem.keys)
        seen = seen & masks.decode(problem.lowered().lists, *sizes)[0]
    return seen.any(-1)


# What is drawn for each field of a Problem, unless a test says otherwise.
STRATEGIES = {
    "batch": st.integers(1, 2),
    "key_heads": st.integers(1, 2),
    "queries": st.integers(1, 70),
    "keys": st.integers(1, 70),
    "width": st.integers(8, 40),
    "value_width": st.integers(8, 40),
    "causal": st.booleans(),
    "scale": st.sampled_from([None, 0.05, 0.5]),
    "dtype": st.sampled_from([torch.float16, torch.float32]),
    "layout": st.sampled_from(["bhld", "blhd", "strided"]),
    "lse_gradient": st.booleans(),
    "window": st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40)),
    "softcap": st.sampled_from([0.0, 2.0]),
    "lengths": st.booleans(),
    "alibi": st.booleans(),
    "sinks": st.booleans(),
    "head_scale": st.booleans(),
    "bias": st.none() | st.tuples(*[st.integers(0, 1)] * 4),
    "masked": st.booleans(),
    "radius": st.none() | st.integers(0, 40),
    "dropout": st.sampled_from([0.0, 0.3]),
    "of_part": st.booleans(),
}
ON_SCORES = (
    "softcap",
    "lengths",
    "alibi",
    "sinks",
    "head_scale",
    "bias",
    "masked",
    "radius",
    "dropout",
    "of_part",
)


def strategies_of(*fields: str) -> dict[str, st.SearchStrategy]:
    """The strategies of these fields: keywords for `given` and `st.builds`."""
    return {field: STRATEGIES[field] for field in fields}


problems = st.builds(Problem, **STRATEGIES)
