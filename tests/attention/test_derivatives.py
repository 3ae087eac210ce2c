"""Derivatives beyond the first, and forward mode: exact, of any order, in both modes, in O(N) memory."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from attention_problems import IMPLEMENTATIONS, LEARNED, Problem, implementation, problems, sees
from hardware import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from tolerance import assert_as_exact_as_eager
from torch.func import grad, jacfwd, jvp, vmap

import fastattn
from fastattn.core.attention import definition as attention_definition
from fastattn.core.attention import tiles
from fastattn.core.attention.spec import ScoreTensors, Wanted
from fastattn.core.mlp import definition as mlp_definition
from fastattn.core.mlp.spec import MLPSpec, MLPWeights


def small(**changes):
    """Inputs in fp64 for derivatives by finite differences."""
    problem = Problem(
        **{"heads": 2, "key_heads": 1, "queries": 4, "keys": 6, "width": 8, "value_width": 9, **changes}
    )
    return [t.requires_grad_() for t in problem.inputs()]


@pytest.mark.parametrize("name", ["portable", "tiled", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_and_gradgradcheck(causal: bool, name: str) -> None:
    inputs = small(dtype=torch.float64)
    with implementation(name) as backend:
        function = functools.partial(fastattn.attention, causal=causal, return_lse=True, backend=backend)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", ["tiled", "reference"])
def test_gradcheck_and_gradgradcheck_of_everything_done_to_the_scores(name: str) -> None:
    learned = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in ((2,), (2, 1, 4, 6), (2, 5))]
    inputs = [*small(dtype=torch.float64, batch=2), *(t.requires_grad_() for t in learned)]
    lengths, slopes = torch.tensor([3, 6], device=DEVICE), torch.tensor([0.5, 0.1], device=DEVICE)
    state = fastattn.dropout_state(2, DEVICE)
    with implementation(name) as backend:

        def function(q, k, v, sinks, bias, relative_bias):
            return fastattn.attention(
                q, k, v, window=(2, 1), softcap=1.5, key_lengths=lengths, alibi_slopes=slopes, sinks=sinks,
                bias=bias, relative_bias=relative_bias, dropout_p=0.2, dropout_state=state, return_lse=True,
                backend=backend,
            )  # fmt: skip

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_gradgradcheck_where_rows_see_nothing() -> None:
    inputs = small(dtype=torch.float64, queries=6, keys=4)

    def function(q, k, v):
        return fastattn.attention(q, k, v, causal=True)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivative_through_a_merged_state() -> None:
    inputs = small(dtype=torch.float64)

    def function(q, k, v):
        first = fastattn.attention(q, k[:, :, :3], v[:, :, :3], return_lse=True)
        second = fastattn.attention(q, k[:, :, 3:], v[:, :, 3:], return_lse=True)
        out, lse = fastattn.merge_states(*first, *second)
        return fastattn.attention_backward(torch.ones_like(out), q, k, v, out, lse)

    assert torch.autograd.gradcheck(function, inputs)


def test_grad_of_grad_equals_double_backward_of_the_definition() -> None:
    problem = Problem(queries=12, keys=12, causal=True, dtype=torch.float64)
    q, k, v = problem.inputs()

    def penalty(attention, q):
        return torch.func.grad(lambda q: attention(q).sin().sum())(q).square().sum()

    ours = torch.func.grad(lambda q: penalty(lambda q: fastattn.attention(q, k, v, causal=True), q))(q)
    exact = torch.func.grad(
        lambda q: penalty(lambda q: attention_definition.attention(q, k, v, problem.spec)[0], q)
    )(q)
    torch.testing.assert_close(ours, exact)


EVERYTHING = Problem(
    batch=2, heads=4, queries=7, keys=9, width=8, value_width=10, window=(4, 3), softcap=1.5, lengths=True,
    alibi=True, sinks=True, bias=(1, 0, 0, 0), radius=3, dropout=0.25, head_scale=True, dtype=torch.float64,
)  # fmt: skip
UNSHAPED = replace(EVERYTHING, window=(None, None))
SEES_NOTHING = Problem(queries=9, keys=5, causal=True, dtype=torch.float64)


class Call:
    """A problem's inputs and directions, and two functions of them, ours and the definition, to (out, lse); the
    lse of rows that see nothing counts as 0."""

    def __init__(self, problem: Problem, backend: str | None = None):
        torch.manual_seed(0)
        self.problem, self.backend, self.tensors = problem, backend, problem.score_tensors()
        if problem.dtype == torch.float64 and problem.alibi:
            self.tensors = self.tensors._replace(alibi_slopes=self.tensors.alibi_slopes.double())
        self.learned = [
            n for n in LEARNED if (t := getattr(self.tensors, n)) is not None and t.is_floating_point()
        ]
        self.sees = sees(problem, self.tensors)
        self.inputs = (*problem.inputs(), *(getattr(self.tensors, name).contiguous() for name in self.learned))
        if problem.dtype == torch.float64:
            self.inputs = tuple(t.double() for t in self.inputs)
        self.directions = tuple(torch.randn_like(t) for t in self.inputs)

    def given(self, learned):
        return {**self.tensors._asdict(), **dict(zip(self.learned, learned, strict=True))}

    def ours(self, q, k, v, *learned):
        given = self.problem.arguments(ScoreTensors(**self.given(learned)))
        out, lse = fastattn.attention(q, k, v, return_lse=True, backend=self.backend, **given)
        return out, torch.where(self.sees, lse, 0.0)

    def definition(self, q, k, v, *learned):
        tensors = self.tensors._replace(**self.given(learned))
        out, lse = attention_definition.attention(q, k, v, self.problem.spec, tensors)
        return out, torch.where(self.sees, lse, 0.0)


def every(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def loss(function):
    return lambda *inputs: sum(t.sin().sum() for t in function(*inputs))


TRANSFORMS = {
    "forward": lambda f, x, d: jvp(f, x, d),
    "forward over reverse": lambda f, x, d: jvp(grad(loss(f), every(len(x))), x, d),
    "reverse over forward": lambda f, x, d: grad(lambda *x: loss(lambda *x: jvp(f, x, d)[1])(*x), every(len(x)))(
        *x
    ),
    "reverse over forward, by the direction": lambda f, x, d: grad(
        lambda *d: loss(lambda *d: jvp(f, x, d)[1])(*d), every(len(x))
    )(*d),
    "forward over forward": lambda f, x, d: jvp(lambda *x: jvp(f, x, d), x, d),
    "reverse over reverse": lambda f, x, d: grad(lambda *x: loss(grad(loss(f), every(len(x))))(*x), every(len(x)))(
        *x
    ),
    "forward over forward over reverse": lambda f, x, d: jvp(
        lambda *x: jvp(grad(loss(f), every(len(x))), x, d), x, d
    ),
    "reverse over reverse over reverse": lambda f, x, d: grad(
        loss(grad(lambda *x: loss(grad(loss(f), every(len(x))))(*x), every(len(x)))), every(len(x))
    )(*x),
}


@pytest.mark.parametrize("name", ["tiled", "reference"])
@pytest.mark.parametrize(
    "problem",
    [
        EVERYTHING,
        replace(EVERYTHING, masked=True),
        SEES_NOTHING,
        replace(UNSHAPED, intervals=True),
        replace(UNSHAPED, lists="random"),
    ],
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_composition_of_modes_equals_the_definition(transform: str, problem: Problem, name: str) -> None:
    with implementation(name) as backend:
        call = Call(problem, backend)
        ours, exact = (
            TRANSFORMS[transform](f, call.inputs, call.directions) for f in (call.ours, call.definition)
        )
    for a, x in zip(torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(exact), strict=True):
        torch.testing.assert_close(a, torch.nan_to_num(x, nan=0.0), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "relative_bias", "sinks", "head_scale"])
def test_a_tangent_may_be_of_one_input_alone(which: str) -> None:
    for name in ("triton", "tiled", "reference"):
        dtype = torch.float32 if name == "triton" else torch.float64
        with implementation(name) as backend:
            call = Call(replace(EVERYTHING, dtype=dtype), backend)
            i = ["q", "k", "v", *call.learned].index(which)

            def of_one(function, t, i=i, call=call):
                return function(*call.inputs[:i], t, *call.inputs[i + 1 :])

            ours, exact = (
                jvp(functools.partial(of_one, f), call.inputs[i : i + 1], call.directions[i : i + 1])[1]
                for f in (call.ours, call.definition)
            )
        for a, x in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, x, rtol=1e-4, atol=1e-5 if name == "triton" else 1e-10)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=5)
@given(problem=problems, group=st.integers(1, 3))
def test_tangents_are_as_exact_as_eager(problem: Problem, group: int, name: str) -> None:
    check_tangents(replace(problem, heads=problem.key_heads * group), name)


@pytest.mark.parametrize("name", ["triton", "portable"])
@pytest.mark.parametrize("kind", ["intervals", "not causal", "bigbird", "global"])
def test_tangents_through_a_mask_are_as_exact_as_eager(kind: str, name: str) -> None:
    mask = {"intervals": True} if kind == "intervals" else {"lists": kind}
    check_tangents(Problem(key_heads=1, queries=130, keys=130, lengths=True, sinks=True, **mask), name)


@pytest.mark.parametrize("name", ["triton", "portable"])
def test_tangents_of_wide_heads_are_as_exact_as_eager(name: str) -> None:
    size = {"queries": 20, "keys": 40, "width": 320, "value_width": 512, "dtype": torch.float16}
    check_tangents(Problem(key_heads=1, causal=True, softcap=1.5, sinks=True, **size), name)


def check_tangents(problem: Problem, name: str) -> None:
    with implementation(name) as backend:
        call = Call(problem, backend)
        _, ours = jvp(call.ours, call.inputs, call.directions)
    inputs, directions = ([t.double() for t in ts] for ts in (call.inputs, call.directions))
    _, exact = jvp(call.definition, tuple(inputs), tuple(directions))
    _, eager = jvp(call.definition, call.inputs, call.directions)
    for a, x, e in zip(ours, exact, eager, strict=True):
        # The tangent contains the rounded out times the tangent of lse: allow for that rounding.
        x, e = torch.nan_to_num(x, nan=0.0), torch.nan_to_num(e, nan=0.0)
        assert_as_exact_as_eager(a, x, e.to(a.dtype), gradient=True, dtype=problem.dtype, tiny=2e-5)


def test_dual_tensors_carry_tangents_and_second_derivatives() -> None:
    call = Call(EVERYTHING)
    leaves = [t.detach().requires_grad_() for t in call.inputs]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(leaves, call.directions, strict=True)]
        out, lse = call.ours(*duals)
        moved = [forward_ad.unpack_dual(t).tangent for t in (out, lse)]
        gradients = torch.autograd.grad(loss(lambda *_: (out, lse))(), leaves, create_graph=True)
        product = [forward_ad.unpack_dual(g).tangent for g in gradients]
        backward = torch.autograd.grad(loss(lambda *_: moved)(), leaves)
    for transform, ours in (
        ("forward", moved),
        ("forward over reverse", product),
        ("reverse over forward", backward),
    ):
        exact = TRANSFORMS[transform](call.definition, call.inputs, call.directions)
        for a, x in zip(ours, exact if transform == "reverse over forward" else exact[1], strict=True):
            torch.testing.assert_close(a, x)


@pytest.mark.parametrize("shared_bias", [False, True])
def test_vmap_over_derivatives_equals_one_at_a_time(shared_bias: bool) -> None:
    call = Call(EVERYTHING)
    factors = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=DEVICE)
    at = call.learned.index("bias") + 3

    def derivatives(factor):
        inputs = list(call.inputs)
        inputs[0] = inputs[0] * factor
        if not shared_bias:
            inputs[at] = inputs[at] * factor
        moved = jvp(call.ours, tuple(inputs), call.directions)[1]
        product = jvp(grad(loss(call.ours), every(len(inputs))), tuple(inputs), call.directions)[1]
        second = grad(lambda q: loss(grad(loss(call.ours), (0, at)))(q, *inputs[1:]))(inputs[0])
        return *moved, *product, second

    mapped = vmap(derivatives)(factors)
    for i, factor in enumerate(factors):
        for a, x in zip(mapped, derivatives(factor), strict=True):
            torch.testing.assert_close(a[i], x)


def test_jacfwd_equals_the_jacobian_of_the_definition() -> None:
    call = Call(replace(EVERYTHING, queries=2, batch=1))

    def of_q(function):
        return lambda q: function(q, *call.inputs[1:])

    ours, exact = (jacfwd(of_q(f))(call.inputs[0]) for f in (call.ours, call.definition))
    for a, x in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, x)


@pytest.mark.parametrize("name", ["triton", "portable"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_step_on_a_gradient_penalty_is_as_exact_as_eager(dtype: torch.dtype, name: str) -> None:
    call = Call(Problem(queries=40, keys=40, causal=True, dtype=dtype), name)

    def step(function, inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out, _ = function(*leaves)
        slopes = torch.autograd.grad(out.sum(), leaves[:2], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in slopes), leaves)

    exact = step(call.definition, [t.double() for t in call.inputs])
    eager, ours = step(call.definition, call.inputs), step(call.ours, call.inputs)
    for a, x, e in zip(ours, exact, eager, strict=True):
        assert_as_exact_as_eager(a, x, e, gradient=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("gated", [False, True])
def test_every_composition_of_modes_equals_the_definition_of_the_mlp(gated: bool, transform: str) -> None:
    inputs = [torch.randn(s, dtype=torch.float64, device=DEVICE) for s in ((2, 3, 8), (12, 8), (12, 8), (8, 12))]
    directions = [torch.randn_like(t) for t in inputs]

    def ours(x, w1, w2, w3):
        if gated:
            return (fastattn.gated_mlp(x, w1, w2, w3, backend="portable"),)
        return (fastattn.mlp(x, w1, None, w3, None, backend="portable"),)

    def definition(x, w1, w2, w3):
        weights = MLPWeights(w1, None, w2 if gated else None, None, w3, None)
        spec = MLPSpec("silu" if gated else "gelu", gated)
        return (mlp_definition.mlp(x.flatten(0, 1), weights, spec).unflatten(0, x.shape[:2]),)

    results = (TRANSFORMS[transform](f, tuple(inputs), tuple(directions)) for f in (ours, definition))
    for a, x in zip(*map(torch.utils._pytree.tree_leaves, results), strict=True):
        torch.testing.assert_close(a, x)


@pytest.mark.parametrize(
    "transform", ["forward", "forward over reverse", "reverse over forward", "reverse over reverse"]
)
def test_no_derivative_stores_what_grows_with_the_square_of_the_length(transform: str) -> None:
    problem = Problem(
        heads=1, key_heads=1, queries=2048, keys=2048, width=8, value_width=8, window=(600, 0), radius=4
    )
    with implementation("tiled") as backend, LargestTensor() as seen:
        call = Call(problem, backend)
        # The rows that see something are found by the test and do not count: give it them before.
        call.sees = torch.ones((), dtype=torch.bool, device=DEVICE)
        seen.elements = 0
        TRANSFORMS[transform](call.ours, call.inputs, call.directions)
    assert seen.elements <= 2 * tiles.QUERY_TILE * tiles.KEY_TILE


def test_a_broadcast_bias_s_second_derivative_takes_no_more_memory_than_the_bias() -> None:
    problem = Problem(heads=1, key_heads=1, queries=1024, keys=1024, width=8, value_width=8, bias=(1, 1, 1, 0))
    with implementation("tiled") as backend, LargestTensor() as seen:
        call = Call(problem, backend)
        call.sees, seen.elements = torch.ones((), dtype=torch.bool, device=DEVICE), 0
        grad(lambda *x: loss(grad(loss(call.ours), every(4)))(*x), every(4))(*call.inputs)
    assert seen.elements <= 2 * tiles.QUERY_TILE * tiles.KEY_TILE


def test_tiles_that_a_window_hides_are_not_visited() -> None:
    visited = []

    def function(tile, *parts):
        visited.append((tile.rows.start, tile.columns.start))
        return (torch.zeros_like(parts[1]),)

    problem = Problem(heads=1, key_heads=1, queries=2048, keys=2048, width=8, causal=True, window=(100, None))
    q, k, _ = problem.inputs()
    inputs = {"dout": q, "q": q, "k": k, "v": k, "out": q, "lse": torch.zeros(q.shape[:3])}
    whole = tiles.gradients(problem.spec, Wanted(), False, False)
    replace(whole, function=function, outputs=(1,))(
        tiles.learned(problem.score_tensors())[0], tuple(map(inputs.get, whole.names))
    )
    assert len(visited) == sum(
        len(range(max(0, row - 100), row + tiles.QUERY_TILE, tiles.KEY_TILE))
        for row in range(0, 2048, tiles.QUERY_TILE)
    )
