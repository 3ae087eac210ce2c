"""The MLP, gated and not: as exact as eager, nothing saved but what is said, and an operator like any other."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from attention_problems import without_plans
from comparing import exact_and_eager, run
from hardware import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_exact_as_eager
from torch import Tensor, library
from torch.utils.flop_counter import FlopCounterMode

import fastattn
import fastattn.flops
from fastattn.core import plans
from fastattn.core.mlp import chunks
from fastattn.core.mlp import definition as mlp_definition
from fastattn.core.mlp import portable as mlp_portable
from fastattn.core.mlp.operators import options_of
from fastattn.core.mlp.spec import PACKED, SAVES, MLPSpec, MLPWeights
from fastattn.ground.checks import ACTIVATIONS
from fastattn.kernels import launch
from fastattn.kernels.launch import whole_mlp as launch_whole
from fastattn.kernels.launch.mlp import MLP_GRADIENT_FUSED_UP_TO
from fastattn.kernels.mlp.backward import GradientTask, hidden_backward
from fastattn.kernels.mlp.forward import hidden_forward
from fastattn.kernels.mlp.problem import Layer, Size
from fastattn.kernels.mlp.products import aligned, is_fused
from fastattn.kernels.tiles import matrix

# "library" is the Triton backend with the library's products and an elementwise kernel after them.
IMPLEMENTATIONS = ("triton", "library", "portable", "reference")
BACKENDS = ("triton", "portable")
ALONE = (None,) * 4  # the operator's tensors of a residual branch, where there is none
GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


@dataclass(frozen=True)
class Problem:
    """One call: x (tokens, width) through a layer of `hidden` neurons to y (tokens, out).

    upstream: how dy lies in memory, "contiguous", "transposed" or "expanded" (zero strides).
    """

    tokens: int = 40
    width: int = 45
    hidden: int = 50
    out: int = 34
    activation: str = "gelu"
    gated: bool = False
    biases: bool = True
    dtype: torch.dtype = torch.float32
    strided: bool = False
    upstream: str = "contiguous"
    packed: str | None = None
    save: str = "auto"
    chunk: int | str = "auto"
    match_eager: bool = False

    def inputs(self) -> list[Tensor | None]:
        """x, w_in, b_in, w_up, b_up, w_out, b_out, scaled so that every layer is of order one. If packed, w_in and
        b_in hold both."""
        x = self._random(self.tokens, self.width)
        w_in, w_up = (self._random(self.hidden, self.width) / max(1, self.width) ** 0.5 for _ in range(2))
        w_out = self._random(self.out, self.hidden) / max(1, self.hidden) ** 0.5
        b_in, b_up, b_out = (
            self._random(1, n)[0] if self.biases else None for n in (self.hidden,) * 2 + (self.out,)
        )
        if self.packed:
            w_in, b_in = torch.cat((w_in, w_up)), torch.cat((b_in, b_up)) if self.biases else None
        apart = self.gated and not self.packed
        tensors = [x, w_in, b_in, w_up if apart else None, b_up if apart else None, w_out, b_out]
        return [None if t is None else t.to(self.dtype) for t in tensors]

    def _random(self, rows: int, columns: int) -> Tensor:
        if self.strided:
            return torch.randn(columns, rows, 2, device=DEVICE)[:, :, 1].t()
        return torch.randn(rows, columns, device=DEVICE)

    def dy(self) -> Tensor:
        if self.upstream == "expanded":
            return torch.ones((), dtype=self.dtype, device=DEVICE).expand(self.tokens, self.out)
        dy = torch.randn(self.out, self.tokens, device=DEVICE).to(self.dtype).t()
        return dy if self.upstream == "transposed" else dy.contiguous()

    def definition(self, x: Tensor, *weights: Tensor | None) -> Tensor:
        spec = MLPSpec(self.activation, self.gated, self.packed or "")
        return mlp_definition.mlp(x, MLPWeights(*weights), spec)

    def ours(self, x: Tensor, *weights: Tensor | None, backend: str | None = None) -> Tensor:
        w_in, b_in, w_up, b_up, w_out, b_out = weights
        options = {"activation": self.activation, "save": self.save, "chunk": self.chunk, "backend": backend}
        options["match_eager"] = self.match_eager
        if self.gated:
            options["packed"] = self.packed
            return fastattn.gated_mlp(x, w_in, w_up, w_out, b_gate=b_in, b_up=b_up, b_down=b_out, **options)
        return fastattn.mlp(x, w_in, b_in, w_out, b_out, **options)


@contextlib.contextmanager
def whole_layers() -> Iterator[set[str]]:
    """Calls of the Triton backend are computed whole at every width that has rows; the names of their kernels."""
    limits = {family: {2: 128, 4: 128} for family in (launch.INTERPRETER, "sm_80", "sm_90")}
    kernels: set[str] = set()
    start = launch.start

    def noting(kernel: Any, *arguments: Any, **keywords: Any) -> None:
        kernels.add(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)
        start(kernel, *arguments, **keywords)

    plans.forget()
    with (
        mock.patch.dict(launch_whole.WHOLE_MLP_UP_TO, limits),
        mock.patch.object(launch, "start", noting),
    ):
        yield kernels
    plans.forget()


@contextlib.contextmanager
def implementation(name: str):
    """The `backend` argument of an implementation; inside the block that implementation is the one that runs."""
    if name == "library":
        with mock.patch.dict(launch.MLP_FUSED_UP_TO, {family: {} for family in launch.MLP_FUSED_UP_TO}):
            yield "triton"
    elif name == "whole":
        with whole_layers():
            yield "triton"
    else:
        yield name


def check(problem: Problem, name: str) -> None:
    """Ours against float64, by the error of the eager computation in the same dtype."""
    torch.manual_seed(0)
    inputs, dy = problem.inputs(), problem.dy()
    exact, eager = exact_and_eager(problem.definition, inputs, dy)
    with implementation(name) as backend:
        actual = run(functools.partial(problem.ours, backend=backend), inputs, dy)
    for i, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        assert_as_exact_as_eager(a, x, e, gradient=i > 0)


def small(gated: bool, dtype: torch.dtype = torch.float32, **changes) -> tuple[Problem, list[Tensor]]:
    """A problem and its inputs as leaves that want gradients; no input is None but w_up and b_up."""
    problem = Problem(tokens=5, width=6, hidden=7, out=4, gated=gated, dtype=dtype, **changes)
    return problem, [None if t is None else t.requires_grad_() for t in problem.inputs()]


# Exactness.


@GATED
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_output_and_every_gradient_are_as_exact_as_eager(name: str, activation: str, gated: bool) -> None:
    check(Problem(activation=activation, gated=gated), name)


@GATED
@pytest.mark.parametrize("upstream", ["transposed", "expanded"])
@pytest.mark.parametrize("name", ["triton", "library", "portable"])
def test_half_precision_without_biases_and_upstream_gradients_of_any_strides(name, upstream, gated) -> None:
    check(Problem(dtype=torch.float16, biases=False, gated=gated, upstream=upstream, activation="silu"), name)


@GATED
def test_bfloat16(gated: bool) -> None:
    check(Problem(dtype=torch.bfloat16, gated=gated), "portable")


@pytest.mark.gpu
@GATED
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["triton", "library"])
@pytest.mark.parametrize(("tokens", "hidden"), [(333, 1008), (1024, 4096), (8192, 3072)])
def test_bfloat16_on_the_device_in_every_row_of_the_tables(tokens, hidden, name, activation, gated) -> None:
    sizes = {"tokens": tokens, "hidden": hidden, "width": 768, "out": 768}
    check(Problem(**sizes, activation=activation, gated=gated, dtype=torch.bfloat16), name)


@settings(max_examples=15)
@given(
    st.builds(
        Problem,
        tokens=st.integers(0, 70),
        width=st.integers(1, 70),
        hidden=st.integers(1, 70),
        out=st.integers(1, 70),
        activation=st.sampled_from(ACTIVATIONS),
        gated=st.booleans(),
        biases=st.booleans(),
        save=st.sampled_from(["auto", "preactivation", "nothing"]),
        chunk=st.sampled_from(["auto", 1, 7, 32]),
        match_eager=st.booleans(),
        dtype=st.sampled_from([torch.float16, torch.float32]),
        strided=st.booleans(),
        upstream=st.sampled_from(["contiguous", "transposed", "expanded"]),
    ),
    st.sampled_from(["triton", "library", "portable"]),
)
def test_any_shapes_strides_and_options(problem: Problem, name: str) -> None:
    check(problem, name)


@GATED
@pytest.mark.parametrize("empty", ["tokens", "width", "hidden", "out"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_empty_sides_give_what_a_sum_over_nothing_gives(name: str, empty: str, gated: bool) -> None:
    check(Problem(**{"tokens": 5, "width": 6, "hidden": 7, "out": 4, empty: 0}, gated=gated), name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["triton", "portable"])
def test_an_activation_alone_is_as_exact_as_eager_far_into_its_tails(name: str, activation: str) -> None:
    """One neuron of weight one: what is left is the activation and its slope, at 257 points."""
    problem = Problem(tokens=257, width=1, hidden=1, out=1, activation=activation, biases=False)
    x = torch.linspace(-10, 10, 257, device=DEVICE)[:, None]
    inputs, dy = [x, one := torch.ones(1, 1, device=DEVICE), None, None, None, one, None], torch.ones_like(x)
    exact, eager = exact_and_eager(problem.definition, inputs, dy)
    actual = run(functools.partial(problem.ours, backend=name), inputs, dy)
    for i in (0, 1):
        assert_as_exact_as_eager(actual[i], exact[i], eager[i], gradient=i > 0, tiny=0.0)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "relu_squared"])
def test_the_largest_numbers_give_no_nan(activation: str) -> None:
    x = torch.tensor([[-3e38], [-1e20], [-50.0], [0.0], [50.0], [1e20], [3e38]], device=DEVICE, requires_grad=True)
    one = torch.ones(1, 1, device=DEVICE)
    y = fastattn.mlp(x, one, None, one, None, activation=activation, backend="triton")
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x.relu(), rtol=1e-6, atol=1e-6)
    middle = 0.0 if activation == "relu" else 0.5
    torch.testing.assert_close(slope, torch.tensor([[0.0], [0], [0], [middle], [1], [1], [1]], device=DEVICE))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_nan_comes_through(activation: str) -> None:
    x, one = torch.full((1, 1), float("nan"), device=DEVICE), torch.ones(1, 1, device=DEVICE)
    assert fastattn.mlp(x, one, None, one, None, activation=activation, backend="triton").isnan().all()


# What is saved, what is recomputed.


def layer(problem: Problem, w_in, b_in, w_up, b_up) -> Layer:
    linears = [(w_in, b_in), (w_up, b_up)][: 1 + (w_up is not None)]
    return Layer(linears, problem.packed or "", problem.activation, problem.hidden)


@pytest.mark.parametrize(
    "problem",
    [Problem(activation=a, gated=g, dtype=torch.float16) for a in ACTIVATIONS for g in (False, True)]
    + [Problem(activation="silu", gated=True, packed=order, dtype=torch.float16) for order in PACKED],
    ids=lambda p: f"{p.activation} {p.packed or ('gated' if p.gated else 'plain')}",
)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "library"])
def test_the_hidden_layer_recomputed_in_the_backward_has_the_forward_s_bits(fused: bool, problem: Problem) -> None:
    x, *first, w_out, _ = problem.inputs()
    first = layer(problem, *first)
    hidden, kept = hidden_forward(x, first, "preactivation", fused)
    dy = torch.randn(x.shape[0], w_out.shape[0], device=DEVICE).half()
    state = (*first.halves(kept[0], 1), None, None)
    again, _, _ = hidden_backward(dy, w_out, state, first, GradientTask(), fused)
    assert torch.equal(hidden, again)
    unsaved, nothing = hidden_forward(x, first, "nothing", fused)
    assert torch.equal(hidden, unsaved) and nothing == ()
    # ReLU's backward needs the sign of its output alone: no second store.
    assert (kept[0] is hidden) == (problem.activation == "relu" and not problem.gated)
    if problem.activation == "relu_squared" and not problem.gated:
        assert torch.equal(kept[0].square(), hidden)


@GATED
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "library"])
def test_every_step_is_rounded_as_eager_rounds_it(fused: bool, gated: bool) -> None:
    """Sums of three products of eighths are exact, so only the roundings of the steps are left to differ."""
    problem = Problem(width=3, dtype=torch.float16, activation="relu_squared", gated=gated)
    x, w_in, b_in, w_up, b_up, *_ = (None if t is None else (t * 8).round() / 8 for t in problem.inputs())
    first = layer(problem, w_in, b_in, w_up, b_up)
    hidden, (kept,) = hidden_forward(x, first, "preactivation", fused)
    pre = [torch.nn.functional.linear(x, *linear) for linear in first.linears]
    assert torch.equal(kept, torch.cat(pre, 1) if gated else pre[0].relu())
    active = mlp_definition.activate(pre[0], problem.activation)
    assert torch.equal(hidden, active * pre[1] if gated else active)


def kept_bytes(problem: Problem, backend: str) -> int:
    """The bytes that autograd keeps beside the inputs."""
    inputs = [None if t is None else t.requires_grad_() for t in problem.inputs()]
    theirs = {t.data_ptr() for t in inputs if t is not None}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        problem.ours(*inputs, backend=backend)
    return sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", ["auto", 16])
@pytest.mark.parametrize(
    ("form", "save", "numbers"),
    [
        ({"activation": "gelu"}, "preactivation", 1),
        ({"activation": "relu"}, "preactivation", 1),
        ({"activation": "relu_squared"}, "auto", 1),
        ({"activation": "silu", "gated": True}, "preactivation", 2),
        ({"activation": "silu", "gated": True, "packed": "gate_up"}, "preactivation", 2),
        ({"activation": "gelu"}, "nothing", 0),
        ({"activation": "silu", "gated": True}, "nothing", 0),
    ],
)
def test_beside_the_inputs_only_what_was_asked_for_is_kept(form, save, numbers, chunk, backend) -> None:
    problem = Problem(**form, save=save, chunk=chunk, dtype=torch.float16)
    assert kept_bytes(problem, backend) == numbers * problem.tokens * problem.hidden * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("gated", "packed"), [(False, None), (True, None), (True, "up_gate")])
def test_int8_keeps_a_byte_a_number_and_four_for_each_block_of_128(gated, packed, backend) -> None:
    problem = Problem(hidden=300, gated=gated, packed=packed, save="int8", activation="silu", dtype=torch.float16)
    assert kept_bytes(problem, backend) == (1 + gated) * problem.tokens * (300 + 4 * 3)


def test_by_default_the_portable_backend_keeps_what_eager_keeps_and_the_kernels_the_pre_activation() -> None:
    for gated, eager in ((False, 2), (True, 4)):
        problem = Problem(gated=gated, activation="silu")
        one = problem.tokens * problem.hidden * 4
        assert kept_bytes(problem, "portable") == eager * one
        assert kept_bytes(problem, "triton") == (1 + gated) * one


@pytest.mark.parametrize(("grad_enabled", "expected"), [(True, True), (False, False)])
def test_nothing_is_saved_where_no_gradient_is_wanted(grad_enabled: bool, expected: bool) -> None:
    problem, inputs = small(False)
    with mock.patch.object(mlp_portable, "forward", wraps=mlp_portable.forward) as forward, without_plans():
        with torch.set_grad_enabled(grad_enabled):
            problem.ours(*inputs, backend="portable")
        problem.ours(*(None if t is None else t.detach() for t in inputs), backend="portable")
    saves = [call.args[2].save for call in forward.call_args_list]
    assert saves == ["auto" if expected else "nothing", "nothing"]


@GATED
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_inputs_cost_no_product_and_get_no_gradient(backend: str, gated: bool) -> None:
    problem, inputs = small(gated)
    y = problem.ours(*inputs, backend=backend)
    leaves = [t for t in inputs if t is not None]
    expected = torch.autograd.grad(y.sum(), leaves)
    for i, leaf in enumerate(leaves):
        alone = [None if t is None else t.detach() for t in inputs]
        alone[[t is leaf for t in inputs].index(True)] = leaf
        with FlopCounterMode(display=False) as counter:
            (gradient,) = torch.autograd.grad(problem.ours(*alone, backend=backend).sum(), leaf)
        assert torch.equal(gradient, expected[i])
        first = 2 * 5 * 6 * 7 * (1 + gated)
        second = 2 * 5 * 7 * 4
        # Forward, then dh, and one product for a weight or for x.
        beyond = first if leaf is inputs[0] or leaf.shape == (7, 6) else second if leaf.shape == (4, 7) else 0
        assert counter.get_total_flops() == first + 2 * second + beyond


@GATED
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_inputs_give_the_same_bits(backend: str, gated: bool) -> None:
    problem = Problem(gated=gated)
    inputs, dy = problem.inputs(), problem.dy()
    once, again = (run(functools.partial(problem.ours, backend=backend), inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# The choice between our product and the library's.


@pytest.mark.parametrize(
    ("family", "dtype", "width", "fused"),
    [
        ("sm_90", torch.bfloat16, 2048, True),
        ("sm_90", torch.bfloat16, 2064, False),
        ("sm_90", torch.bfloat16, 1000, False),  # not a multiple of 16
        ("sm_90", torch.float32, 64, False),
        ("sm_86", torch.float16, 4096, True),
        (launch.INTERPRETER, torch.float32, 9999, True),
    ],
)
def test_narrow_products_are_fused_and_wide_ones_go_to_the_library(
    family, dtype, width, fused, monkeypatch
) -> None:
    monkeypatch.setattr(launch, "family", lambda kernel, device: family)
    x, w = torch.empty(5, width, dtype=dtype, device="meta"), torch.empty(64, width, dtype=dtype, device="meta")
    assert is_fused(None, Size(5, width, 64), (x, w), None) == fused


@pytest.mark.parametrize(("family", "at_most"), [("sm_90", 512), ("sm_80", 4096), ("sm_100", 1024)])
def test_on_hopper_the_gradient_s_product_goes_to_the_library_sooner(
    family: str, at_most: int, monkeypatch
) -> None:
    monkeypatch.setattr(launch, "family", lambda kernel, device: family)
    for width in (at_most, at_most + 16):
        size, half = Size(5, width, 64), {"dtype": torch.bfloat16, "device": "meta"}
        operands = torch.empty(5, width, **half), torch.empty(64, width, **half)
        assert is_fused(None, size, operands, None, MLP_GRADIENT_FUSED_UP_TO) == (width == at_most)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (lambda t: t, True),
        (lambda t: t.t(), True),
        (lambda t: t[:, 16:48], True),
        (lambda t: t[:, 8:40], False),  # starts between two lines
        (lambda t: t[:, :40], False),
        (lambda t: t[:, ::2], False),
        (lambda t: t[:1, :1].expand(64, 64), False),
    ],
)
def test_only_matrices_that_are_loaded_in_whole_lines_are_fused(view, expected: bool) -> None:
    assert aligned(view(torch.empty(64, 64))) == expected


def test_halves_of_one_packed_weight_need_one_product_for_the_input_s_gradient() -> None:
    packed = torch.randn(14, 6, device=DEVICE)
    gate, up = packed.chunk(2)
    dpre = torch.randn(5, 14, device=DEVICE)
    assert torch.equal(chunks.packed_weight(gate, up), packed)
    for other in (up.clone(), gate, packed[6:13]):
        assert chunks.packed_weight(gate, other) is None
    spec, down = MLPSpec("silu", gated=True), torch.zeros(4, 7, device=DEVICE)
    for w_gate in (gate, gate.clone()):
        weights = MLPWeights(w_gate, None, up, None, down)
        torch.testing.assert_close(chunks.input_gradient([dpre], weights, spec), dpre @ packed)


def test_offsets_that_pass_32_bits_within_a_tile_are_avoided_by_a_copy() -> None:
    far = torch.empty_strided((256, 4), (2**24, 1), device="meta")
    assert matrix(far)[1:3] == (4, 1)
    near = torch.empty_strided((256, 4), (2**22, 1), device="meta")
    assert matrix(near)[1:3] == (2**22, 1)


# The operators.


@GATED
@pytest.mark.parametrize(
    ("backend", "activation"), [*(("portable", activation) for activation in ACTIVATIONS), ("reference", "silu")]
)
def test_gradcheck_and_gradgradcheck(backend: str, activation: str, gated: bool) -> None:
    problem, inputs = small(gated, torch.float64, activation=activation)
    present = [t for t in inputs if t is not None]

    def function(*given):
        filled = iter(given)
        return problem.ours(*(None if t is None else next(filled) for t in inputs), backend=backend)

    assert torch.autograd.gradcheck(function, present)
    assert torch.autograd.gradgradcheck(function, present)


@GATED
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, gated: bool) -> None:
    _, inputs = small(gated)
    forward = torch.ops.fastattn.mlp_forward
    for save in SAVES:
        options = *options_of(MLPSpec("silu", save=save, chunk=3)), backend
        library.opcheck(forward.default, (*inputs, *ALONE, *options))
        y, *slots = (t.detach() for t in forward(*inputs, *ALONE, *options))
        kept = [t if t.dim() == 2 else None for t in slots]
        for wanted in ([True] * 5, [False, True, False, True, False]):
            beside = *ALONE[:3], *kept, [*wanted, False, False]
            arguments = (torch.randn_like(y), *inputs[:6], *beside, *options)
            library.opcheck(torch.ops.fastattn.mlp_backward.default, arguments)


def test_an_operator_call_that_saved_nothing_can_be_differentiated_all_the_same() -> None:
    problem, inputs = small(True)
    options = options_of(MLPSpec("gelu", save="nothing"))
    y, *_ = torch.ops.fastattn.mlp_forward(*inputs, *ALONE, *options, "portable")
    leaves = [t for t in inputs if t is not None]
    expected = torch.autograd.grad(problem.ours(*inputs).sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True))


@GATED
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_func_grad_vmap_and_their_compositions_equal_autograd(backend: str, gated: bool) -> None:
    problem, inputs = small(gated)
    x, *weights = [None if t is None else t.detach() for t in inputs]
    xs = torch.stack([x, -x, x * 2], dim=1)  # mapped over dimension 1
    each = [None if t is None else torch.stack([t, t.flip(0)]) for t in weights]

    def loss(x, *weights):
        return problem.ours(x, *weights, backend=backend).square().sum()

    def expected(x, *weights):
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *weights)]
        return torch.autograd.grad(loss(*leaves), [t for t in leaves if t is not None])

    indices = tuple(i for i, t in enumerate(inputs) if t is not None)
    in_dims = (1, *(None,) * len(weights))
    shared = torch.func.vmap(torch.func.grad(loss, argnums=indices), in_dims)(xs, *weights)
    ensemble = torch.func.vmap(
        torch.func.grad(loss, argnums=indices), (None, *(0 if t is not None else None for t in each))
    )(x, *each)
    outside = torch.func.grad(lambda xs: torch.func.vmap(loss, in_dims)(xs, *weights).sum())(xs)
    for i in range(3):
        for ours, theirs in zip(shared, expected(xs[:, i], *weights), strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outside[:, i], expected(xs[:, i], *weights)[0], rtol=1e-4, atol=1e-5)
    for i in range(2):
        theirs = expected(x, *(None if t is None else t[i] for t in each))
        for ours, their in zip(ensemble, theirs, strict=True):
            torch.testing.assert_close(ours[i], their, rtol=1e-4, atol=1e-5)


@GATED
def test_vmap_of_the_operator_itself_over_any_dimension(gated: bool) -> None:
    problem, inputs = small(gated, activation="silu")
    x, *weights = (None if t is None else t.detach() for t in inputs)
    xs = torch.stack([x, -x, x * 2], dim=1)
    options = *ALONE, *options_of(MLPSpec("silu", save="preactivation")), "portable"
    ys, *kept = torch.func.vmap(lambda x: torch.ops.fastattn.mlp_forward(x, *weights, *options), in_dims=1)(xs)
    for i in range(3):
        torch.testing.assert_close(ys[i], problem.ours(xs[:, i], *weights))
    assert [t.shape for t in kept if t.dim() == 3] == [(3, 5, 7)] * (1 + gated)


@pytest.mark.parametrize("gated", [False, True])
def test_forward_mode_equals_the_definitions(gated: bool) -> None:
    problem, inputs = small(gated)
    primals = [t.detach() for t in inputs if t is not None]
    given = [t is not None for t in inputs]

    def of(function):
        def call(*present):
            rest = iter(present)
            return function(*(next(rest) if there else None for there in given))

        return torch.func.jvp(call, tuple(primals), tuple(torch.ones_like(t) for t in primals))

    for ours, exact in zip(of(problem.ours), of(problem.definition), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize(
    ("backend", "gated", "dynamic"),
    [("triton", False, True), ("triton", True, False), ("portable", False, False), ("portable", True, True)],
)
def test_compiles_without_a_graph_break_and_gives_the_same(backend: str, gated: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    problem = Problem(gated=gated)

    def function(x, *weights):
        return problem.ours(x * 2, *weights, backend=backend) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (12, 33):
        inputs, dy = problem.inputs(), torch.randn(tokens, problem.out, device=DEVICE)
        inputs[0] = inputs[0][:tokens]
        for ours, expected in zip(run(compiled, inputs, dy), run(function, inputs, dy), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@GATED
def test_autocast_lowers_to_its_dtype_and_returns_gradients_in_the_inputs_own(gated: bool) -> None:
    problem, inputs = small(gated)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = problem.ours(*inputs)
        double = problem.ours(*(None if t is None else t.double() for t in inputs))
    assert y.dtype == torch.bfloat16 and double.dtype == torch.float64
    leaves = [t for t in inputs if t is not None]
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), leaves))
    assert torch.equal(y, problem.ours(*(None if t is None else t.detach().bfloat16() for t in inputs)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (3, 0, 2)])
def test_any_leading_dimensions(leading: tuple[int, ...], backend: str) -> None:
    problem, (_, *weights) = small(False)
    x = torch.randn(*leading, 6, device=DEVICE, requires_grad=True)
    y = problem.ours(x, *weights, backend=backend)
    assert y.shape == (*leading, 4)
    torch.testing.assert_close(y, problem.definition(x, *weights))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_the_graph_can_be_used_twice_with_retain_graph() -> None:
    problem, inputs = small(True)
    leaves, y = [t for t in inputs if t is not None], problem.ours(*inputs, backend="triton")
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y.sum(), leaves), strict=True))


# Bad input.

X, W1, B1, W2, B2 = (torch.zeros(size, device=DEVICE) for size in ((3, 8), (16, 8), (16,), (8, 16), (8,)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastattn.mlp([1.0], W1, B1, W2, B2), TypeError, "x must be a torch.Tensor, got list"),
        (
            lambda: fastattn.mlp(X[0, 0], W1, B1, W2, B2),
            ValueError,
            r"x must have at least one dimension.* got \(\)",
        ),
        (lambda: fastattn.mlp(X.long(), W1, B1, W2, B2), TypeError, "x must be float16, .* got torch.int64"),
        (lambda: fastattn.mlp(X, W1.T, B1, W2, B2), ValueError, r"w1 must have shape \(out, 8\) .* got \(8, 16\)"),
        (lambda: fastattn.mlp(X, W1[0], B1, W2, B2), ValueError, r"w1 must have shape \(out, 8\) .* got \(8,\)"),
        (lambda: fastattn.mlp(X, W1, B2, W2, B2), ValueError, r"b1 must have shape \(16,\) .* got \(8,\)"),
        (lambda: fastattn.mlp(X, W1, 0.0, W2, B2), TypeError, "b1 must be a torch.Tensor or None, got float"),
        (lambda: fastattn.mlp(X, W1, B1, W1, B2), ValueError, r"w2 must have shape \(out, 16\) .* got \(16, 8\)"),
        (lambda: fastattn.mlp(X, W1, B1, W2, B1), ValueError, r"b2 must have shape \(8,\) .* got \(16,\)"),
        (lambda: fastattn.mlp(X, W1, B1, W2.double(), B2), TypeError, "w2 must have x's dtype torch.float32, got"),
        (lambda: fastattn.mlp(X, W1, B1.to("meta"), W2, B2), ValueError, "b1 must be on x's device .*, got meta"),
        (
            lambda: fastattn.mlp(X, W1, B1, W2, B2, activation="swish"),
            ValueError,
            "activation must be one of gelu, gelu_tanh, relu, relu_squared, silu, got 'swish'",
        ),
        (
            lambda: fastattn.mlp(X, W1, B1, W2, B2, backend="cuda"),
            ValueError,
            "backend must be one of .* got 'cuda'",
        ),
        (
            lambda: fastattn.gated_mlp(X, W1, W1[:9], W2),
            ValueError,
            r"w_up must have w_gate's shape \(16, 8\), got",
        ),
        (lambda: fastattn.gated_mlp(X, W1, W1, W1), ValueError, r"w_down must have shape \(out, 16\)"),
        (lambda: fastattn.gated_mlp(X, W1, None, W2), TypeError, "w_up must be a torch.Tensor, got NoneType"),
        (lambda: fastattn.gated_mlp(X, W1, W1, W2, b_up=B2), ValueError, r"b_up must have shape \(16,\)"),
        (
            lambda: fastattn.mlp(*(t.double() for t in (X, W1, B1, W2, B2)), backend="triton"),
            ValueError,
            r"backend 'triton' cannot compute this call \(forward\): no float64",
        ),
    ],
)
def test_bad_input_is_refused_in_words(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
