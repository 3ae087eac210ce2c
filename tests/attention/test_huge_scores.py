"""Scores as huge, or scales as small, as numbers go.

Masks of the lowest finite numbers, as eager models build them; products, biases and scales that overflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from attention_problems import IMPLEMENTATIONS, implementation
from hardware import DEVICE
from tolerance import assert_as_exact_as_eager
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn import masks
from fastattn.kernels import launch

LOWEST = torch.finfo(torch.float32).min


@dataclass
class Case:
    """A bias `rows` that is `low` in some rows for all keys, in others for some. `options` are given to
    `attention`; `sinks`, `added` and `keep` are what they do to the scores and weights beside it."""

    low: float
    queries: int = 20
    keys: int = 20
    rows: Tensor = field(init=False)
    options: dict = field(default_factory=dict)
    sinks: Tensor | None = None
    added: Tensor | float = 0.0
    keep: Tensor | float = 1.0

    def __post_init__(self) -> None:
        self.rows = torch.zeros(self.queries, self.keys, device=DEVICE)
        self.rows[0], self.rows[1, :4], self.rows[2:6, ::2] = self.low, self.low, self.low

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).float() * q.shape[3] ** -0.5 + self.added + self.rows
        if self.sinks is not None:
            scores = torch.cat((scores, self.sinks[:, None, None].expand(1, -1, len(self.rows), 1)), -1)
        weights = torch.softmax(scores, -1)[..., : k.shape[2]] * self.keep
        return weights.to(v.dtype) @ v


def relative(low: float) -> Case:
    case = Case(low)
    case.rows = torch.full_like(case.rows, low)
    case.options = {"relative_bias": torch.full((2, 3), low, device=DEVICE)}
    return case


def with_sinks(low: float) -> Case:
    case = Case(low, sinks=torch.full((2,), low, device=DEVICE))
    case.options = {"bias": case.rows, "sinks": case.sinks}
    return case


def with_slopes(low: float) -> Case:
    case = Case(low)
    slopes, i = torch.tensor([0.5, 0.25], device=DEVICE), torch.arange(20, device=DEVICE)
    case.added = -slopes[:, None, None] * (i - i[:, None]).abs()
    case.options = {"bias": case.rows, "alibi_slopes": slopes}
    return case


def with_lists(low: float) -> Case:
    case = Case(low, 70, 70)
    mask = masks.dilated(2)
    case.added = torch.where(mask.dense(1, 2, 70, 70, DEVICE), 0.0, -torch.inf)
    case.options = {"bias": case.rows, "mask": mask.lower(1, 2, 70, 70, DEVICE, closed_forms=False)}
    return case


def with_dropout(low: float) -> Case:
    case, state = Case(low), fastattn.dropout_state(1, DEVICE)
    case.keep = fastattn.dropout_mask(state, 0.25, 2, 20, 20) / 0.75
    case.options = {"bias": case.rows, "dropout_p": 0.25, "dropout_state": state}
    return case


def with_splits(low: float) -> Case:
    case = Case(low, 10, 300)
    case.options = {"bias": case.rows}
    return case


def alone(low: float) -> Case:
    case = Case(low)
    case.options = {"bias": case.rows}
    return case


def results(function, inputs: list[Tensor], tangents: list[Tensor], weight: Tensor) -> list[Tensor]:
    """out, its gradients, those of their squares, and its tangent."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    first = torch.autograd.grad((out * weight).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)
    with forward_ad.dual_level():
        moved = function(*(forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)))
        tangent = forward_ad.unpack_dual(moved).tangent
    return [t.detach() for t in (out, *first, *second, tangent)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("low", [-1e9, LOWEST])
@pytest.mark.parametrize(
    "make",
    [alone, relative, with_sinks, with_slopes, with_lists, with_dropout, with_splits],
    ids=lambda f: f.__name__,
)
def test_rows_of_the_lowest_numbers_are_eagers_in_every_derivative(
    make, low: float, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.float16 and (make is not alone or low != LOWEST):
        pytest.skip("one kind in half precision is enough")
    if make is with_splits and (low == LOWEST or name != "triton"):
        pytest.skip("only kernels split loops; where all is rounded away, splits are alike")
    torch.manual_seed(0)
    case = make(low)
    queries, keys = case.rows.shape
    inputs = [torch.randn(1, 2, length, 16, device=DEVICE).to(dtype) for length in (queries, keys, keys)]
    tangents = [torch.randn_like(t) for t in inputs]
    weight = torch.randn(1, 2, queries, 16, device=DEVICE).to(dtype)
    if make is with_splits:
        monkeypatch.setattr(launch, "INTERPRETED_PROCESSORS", 12)

    # float32 defines the scores: at -1e9 it rounds them to multiples of 64.
    exact = results(case.eager, *([t.float() for t in ts] for ts in (inputs, tangents)), weight.float())
    eager = results(case.eager, inputs, tangents, weight)
    with implementation(name) as backend:
        actual = results(
            lambda *t: fastattn.attention(*t, backend=backend, **case.options), inputs, tangents, weight
        )
    for position, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        tiny = 4e-6 if position < 4 or position == 7 else 2e-6 * float(x.abs().max())
        if dtype == torch.float16:
            # Gradients of gradients are sums over all rows of terms of their own size.
            tiny += torch.finfo(dtype).eps * float(x.abs().max())
        assert_as_exact_as_eager(a, x.double(), e.to(a.dtype), gradient=position > 0, tiny=tiny)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_sums_that_overflow_to_minus_infinity_hide_as_in_float32(name: str) -> None:
    q, k, v = (torch.randn(1, 2, 20, 16, device=DEVICE) for _ in range(3))
    lowest = torch.full((20, 20), LOWEST, device=DEVICE)
    with implementation(name) as backend:
        hidden, lse = fastattn.attention(
            q, k, v, bias=lowest, relative_bias=lowest[:2, :5], return_lse=True, backend=backend
        )
        # The slope leaves the key on the diagonal alone.
        own = fastattn.attention(q, k, v, bias=lowest, alibi_slopes=lowest[0, :2] / -10, backend=backend)
    assert not hidden.any() and (lse == -torch.inf).all()
    torch.testing.assert_close(own, v)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1e-45, 1e-60, -1e-60])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"bias": torch.zeros(20, device=DEVICE)}])
def test_a_scale_that_underflows_gives_the_mean_of_what_is_seen(scale: float, options: dict, name: str) -> None:
    q, k, v = (torch.randn(1, 2, 20, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    with implementation(name) as backend:
        out = fastattn.attention(q, k, v, scale=scale, causal=True, backend=backend, **options)
    mean = v.cumsum(2) / torch.arange(1, 21, device=DEVICE)[:, None]
    torch.testing.assert_close(out, mean)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e15), (torch.float16, 3e4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"bias": torch.zeros(20, device=DEVICE)},
        {"mask": masks.documents(torch.zeros(1, 20, dtype=torch.int64))},
        {"mask": masks.from_dense(torch.ones(20, 20, dtype=torch.bool))},
    ],
    ids=["plain", "causal", "bias", "intervals", "lists"],
)
def test_scores_as_huge_as_1e30_pick_the_largest(
    options: dict, dtype: torch.dtype, size: float, name: str
) -> None:
    if name == "reference" and dtype == torch.float16:
        pytest.skip("the products overflow in half precision, as they do in eager")
    torch.manual_seed(0)
    # Multiples of a power of two: their products add up without rounding, in a forward and a backward alike.
    unit = 2.0 ** math.floor(math.log2(size / 1000))
    q, k = (torch.randint(-1000, 1001, (1, 2, 20, 16), device=DEVICE) * unit for _ in range(2))
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, torch.randn(1, 2, 20, 16, device=DEVICE)))
    with implementation(name) as backend:
        out = fastattn.attention(q, k, v, backend=backend, **options)
    scores = q.double() @ k.double().mT
    if "causal" in options:
        scores = scores.masked_fill(torch.ones(20, 20, device=DEVICE).triu(1) > 0, -torch.inf)
    weights = torch.nn.functional.one_hot(scores.argmax(-1), 20).double()
    torch.testing.assert_close(out.double(), weights @ v.double())
    dq, dk, dv = torch.autograd.grad(out.float().sum(), (q, k, v))
    torch.testing.assert_close(dv.double(), weights.sum(2)[..., None].expand_as(dv), rtol=1e-6, atol=1e-6)
    # Exactly nothing flows into the scores; what is left is the rounding of dP - delta, times q or k.
    assert max(dq.abs().max(), dk.abs().max()) <= 16 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"window": (25, 0)}, {"dropout_p": 0.1}])
def test_a_bias_of_a_key_reaches_only_the_rows_that_see_the_key(options: dict, value: float, name: str) -> None:
    q, k, v = (torch.randn(1, 2, 40, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    if "dropout_p" in options:
        options = {**options, "dropout_state": fastattn.dropout_state(1, DEVICE)}
    bias = torch.zeros(1, 1, 1, 40, device=DEVICE)
    bias[..., 30] = value
    with implementation(name) as backend:
        out = fastattn.attention(q, k, v, bias=bias, causal=True, backend=backend, **options)
        expected = fastattn.attention(q, k, v, causal=True, backend=backend, **options)
    torch.testing.assert_close(out[:, :, :30], expected[:, :, :30])
    assert out[:, :, 30:].isnan().all()
    ours, theirs = (torch.autograd.grad(t[:, :, :30].sum(), q)[0] for t in (out, expected))
    torch.testing.assert_close(ours[:, :, :30], theirs[:, :, :30])
