"""An MLP that one kernel computes as a whole: as exact as the others, and chosen by a rule that everybody can
repeat."""

from __future__ import annotations

import contextlib
import functools
from typing import Any
from unittest import mock

import pytest
import torch
from attention_problems import without_plans
from comparing import doubled, run
from hardware import DEVICE, ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mlp import ALONE, Problem, check, small, whole_layers
from tolerance import assert_as_exact_as_eager
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.core import backends, capabilities, plans, proofs
from fastattn.core.capabilities import BACKWARD, CLASSES, FORWARD, WHOLE_WIDTHS
from fastattn.core.mlp.operators import options_of
from fastattn.core.mlp.spec import ALWAYS, AUTO, NEVER, PACKED, MLPSpec, MLPWeights
from fastattn.core.mlp.whole import resolved
from fastattn.ground.checks import ACTIVATIONS
from fastattn.kernels import launch, whole_mlp
from fastattn.kernels.launch import whole_mlp as tables

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"gated": True},
    **{f"packed {order}": {"gated": True, "packed": order} for order in PACKED},
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
NAMES = {"whole_mlp_kernel", "whole_mlp_input_kernel", "whole_mlp_weights_kernel"}


def check_whole(problem: Problem) -> None:
    with whole_layers() as kernels:
        check(problem, "triton")
    assert kernels >= NAMES and not kernels & {"hidden_kernel", "hidden_gradient_kernel"}


@EVERY_FORM
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_every_gradient_are_as_exact_as_eager(form: str, activation: str) -> None:
    sizes = {"tokens": 33, "width": 16, "hidden": 48, "out": 32}
    check_whole(Problem(**FORMS[form], **sizes, activation=activation, save="nothing", dtype=torch.float16))


@pytest.mark.skipif(ON_GPU, reason="there, such lines go to the other kernels")
@settings(max_examples=12)
@given(
    st.builds(
        Problem,
        tokens=st.integers(1, 70),
        width=st.integers(1, 40),
        hidden=st.integers(1, 70),
        out=st.integers(1, 40),
        activation=st.sampled_from(ACTIVATIONS),
        gated=st.booleans(),
        biases=st.booleans(),
        save=st.sampled_from(["auto", "nothing"]),
        chunk=st.sampled_from(["auto", 7]),
        dtype=st.sampled_from([torch.float16, torch.float32]),
        strided=st.booleans(),
        upstream=st.sampled_from(["contiguous", "transposed", "expanded"]),
    )
)
def test_any_shapes_and_strides(problem: Problem) -> None:
    check_whole(problem)


@pytest.mark.skipif(ON_GPU, reason="the interpreter's tiles")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_segments_of_the_tokens_and_layers_too_wide_for_three_sums_at_a_time(gated: bool) -> None:
    """Two segments, the last one shorter; 65 columns are padded to 128, where a gated layer takes two launches."""
    tokens = 32 * whole_mlp.LEAST_STEPS * 2 - 5
    assert whole_mlp.segments_of(tokens, 2, 32, launch.INTERPRETER)[1] == 2
    check_whole(Problem(tokens=tokens, width=65, hidden=40, out=16, gated=gated, save="nothing"))


@pytest.mark.skipif(ON_GPU, reason="the interpreter's tiles")
def test_a_segment_s_sum_may_pass_the_largest_number_of_half_precision() -> None:
    """Each of two segments sums 256 gradients of 300; their signs differ."""
    ones = torch.ones(512, 16, dtype=torch.float16)
    weights = MLPWeights(ones[:16] / 16, ones[0] * 0, None, None, torch.eye(16, dtype=torch.float16))
    dy = torch.cat((300 * ones[:256], -300 * ones[256:]))
    spec = MLPSpec("relu", whole=ALWAYS)
    _, *found = backends.load("mlp", "triton").backward(dy, ones, weights, (), [True] * 5 + [False] * 2, spec)
    assert whole_mlp.segments_of(512, 1, 32, launch.INTERPRETER)[1] == 2
    assert all(torch.equal(t, torch.zeros_like(t)) for t in found if t is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 80, 128])
@EVERY_FORM
def test_every_row_of_the_tables_on_the_device(form: str, width: int, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and width > 64:
        pytest.skip("has no row")
    sizes = {"tokens": 5000, "width": width, "hidden": 4 * width, "out": width}
    check_whole(Problem(**FORMS[form], **sizes, dtype=dtype, activation="gelu", save="nothing"))


# The hidden layer again.


@EVERY_FORM
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_the_backward_s_hidden_layer_has_the_forward_s_bits(
    form: str, activation: str, dtype: torch.dtype
) -> None:
    """A last layer that copies the hidden layer shows the forward's in y. An upstream gradient of ones on a
    diagonal shows the backward's in the last weight's gradient."""
    problem = Problem(**FORMS[form], tokens=32, width=16, hidden=32, out=32, activation=activation, dtype=dtype)
    torch.manual_seed(0)
    x, *weights = problem.inputs()
    weights[-2:] = torch.eye(32, dtype=dtype, device=DEVICE), None
    with whole_layers() as kernels:
        dy = torch.eye(32, dtype=dtype, device=DEVICE)
        y, *gradients = run(functools.partial(problem.ours, backend="triton"), [x, *weights], dy)
    assert kernels == NAMES
    assert torch.equal(gradients[-1], y)


# What is kept, and which gradients are computed.


@pytest.mark.parametrize("save", ["auto", "nothing"])
def test_nothing_is_kept_but_the_arguments(save: str) -> None:
    problem = Problem(tokens=8, width=16, hidden=32, out=16, save=save)
    inputs = [None if t is None else t.requires_grad_() for t in problem.inputs()]
    kept: list[Tensor] = []
    with whole_layers(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        problem.ours(*inputs, backend="triton")
    arguments = {t.data_ptr() for t in inputs if t is not None}
    assert {t.data_ptr() for t in kept} <= arguments


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 4), (1, 3)], ids=str)
def test_each_gradient_alone_is_the_same_as_among_all(wanted: tuple[int, ...], gated: bool) -> None:
    x, w, b, *up, w_out, _ = Problem(tokens=9, width=16, hidden=32, out=16, gated=gated).inputs()
    weights = MLPWeights(w, b, *up, w_out)
    spec, dy = MLPSpec("silu", gated, whole=ALWAYS), torch.randn(9, 16, device=DEVICE)
    triton = backends.load("mlp", "triton")
    every = triton.backward(dy, x, weights, (), [True] * 5 + [False] * 2, spec)
    some = triton.backward(dy, x, weights, (), [n in wanted for n in range(7)], spec)
    for n, (one, other) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(one, other) if n in wanted else one is None


# An operator like any other.


def test_opcheck() -> None:
    _, inputs = small(False)
    options = *options_of(MLPSpec("silu", save="nothing", whole=ALWAYS)), "triton"
    looked_at = ("test_schema", "test_faketensor")
    library.opcheck(torch.ops.fastattn.mlp_forward.default, (*inputs, *ALONE, *options), test_utils=looked_at)
    y, *_ = torch.ops.fastattn.mlp_forward(*(None if t is None else t.detach() for t in inputs), *ALONE, *options)
    arguments = (torch.randn_like(y), *inputs[:6], *ALONE[:3], *(None,) * 4, [True] * 5 + [False] * 2, *options)
    library.opcheck(torch.ops.fastattn.mlp_backward.default, arguments, test_utils=looked_at)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_second_derivatives_are_as_exact_as_eager(gated: bool) -> None:
    torch.manual_seed(0)
    problem, inputs = small(gated, activation="silu")
    inputs = [None if t is None else t.detach() for t in inputs]

    def second(call: Any, tensors: list[Tensor | None]) -> list[Tensor]:
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        wanted = [t for t in leaves if t is not None]
        first = torch.autograd.grad(call(*leaves).square().sum(), wanted, create_graph=True)
        return list(torch.autograd.grad(sum(g.sum() for g in first), wanted))

    with whole_layers() as kernels:
        found = second(functools.partial(problem.ours, backend="triton"), inputs)
    assert kernels == NAMES
    exact, eager = second(problem.definition, doubled(inputs)), second(problem.definition, inputs)
    for a, x, e in zip(found, exact, eager, strict=True):
        assert_as_exact_as_eager(a, x, e, gradient=True)


def test_a_checkpoint_autocast_and_a_compiled_call_give_the_plain_call_s_bits() -> None:
    problem = Problem(tokens=9, width=16, hidden=32, out=16, dtype=torch.float16)
    inputs, dy = problem.inputs(), problem.dy()
    call = functools.partial(problem.ours, backend="triton")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")

    def cast(*tensors: Tensor | None) -> Tensor:
        with torch.autocast(DEVICE, torch.float16):
            return call(*tensors)

    with whole_layers() as kernels:
        expected = run(call, inputs, dy)
        ways = [functools.partial(checkpoint, call, use_reentrant=False), compiled, cast]
        for found in [run(way, inputs, dy) for way in ways]:
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        tangent = torch.func.jvp(lambda x: call(x, *inputs[1:]), (inputs[0],), (torch.ones_like(inputs[0]),))[1]
    assert kernels == NAMES
    assert tangent.isfinite().all() and tangent.abs().sum() > 0


# Who is served.


def spec_of(x: Tensor, out: int = 64, hidden: int = 64, backend: str | None = "triton", **asked: Any) -> str:
    """NEVER or ALWAYS, for a call with these tensors."""
    w, w_out = (x.new_empty(shape) for shape in ((hidden, x.shape[1]), (out, hidden)))
    spec = MLPSpec(whole=asked.pop("whole", AUTO), **asked)
    return resolved(x, MLPWeights(w, None, w if spec.gated else None, None, w_out), spec, backend).whole


def test_whole_layers_it_serves_up_to_the_width_of_the_table_whatever_the_number_of_tokens() -> None:
    with whole_layers():
        for tokens in (1, 1000, 100_000):
            assert spec_of(torch.empty(tokens, 128)) == ALWAYS
        assert spec_of(torch.empty(5, 129)) == spec_of(torch.empty(5, 64), out=129) == NEVER
        assert spec_of(torch.empty(0, 64)) == spec_of(torch.empty(5, 64, dtype=torch.float64)) == NEVER
        assert spec_of(torch.empty(5, 64), backend="portable") == NEVER
        assert spec_of(torch.empty(5, 64), backend=None) == NEVER  # nothing is proven
    with mock.patch.dict(tables.WHOLE_MLP_UP_TO, {launch.INTERPRETER: {4: 64}}):
        assert (spec_of(torch.empty(5, 64)), spec_of(torch.empty(5, 65))) == (ALWAYS, NEVER)


@pytest.mark.parametrize("shape", [(16,), (1, 140, 16)], ids=str)
def test_a_new_call_and_a_known_one_are_served_by_their_widths_whatever_the_leading_dimensions(shape) -> None:
    x, w1, w2 = (torch.randn(shape, device=DEVICE) for shape in (shape, (32, 16), (16, 32)))
    plans.forget()
    for _ in range(3):
        with whole_layers() as kernels:
            fastattn.mlp(x, w1, None, w2, None, backend="triton")
        assert kernels == {"whole_mlp_kernel"}


@pytest.mark.parametrize("asked", [{"save": "preactivation"}, {"save": "int8"}, {"match_eager": True}], ids=str)
def test_who_asks_for_something_to_be_kept_or_rounded_gets_that(asked: dict[str, Any]) -> None:
    problem = Problem(tokens=8, width=16, hidden=32, out=16, dtype=torch.float16, **asked)
    inputs, dy = problem.inputs(), problem.dy()
    call = functools.partial(problem.ours, backend="triton")
    expected = run(call, inputs, dy)
    with whole_layers() as kernels:
        found = run(call, inputs, dy)
        with torch.no_grad():
            assert torch.equal(call(*inputs), expected[0])
    assert not kernels & NAMES
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def record(device: torch.device, verdicts: dict[tuple[str, str], str]) -> proofs.Record:
    """Proofs of the whole layer at every width; `verdicts` by direction and size, where they are not proven."""
    rows = {}
    for direction in (FORWARD, BACKWARD):
        for size in CLASSES:
            for width in WHOLE_WIDTHS:
                key = proofs.Key("mlp", direction, "whole", "float32", width, size)
                rows[key] = proofs.Row(key, verdicts.get((direction, size), proofs.PROVEN))
    return proofs.Record(proofs.machine(device), rows=rows)


@pytest.mark.parametrize("bad", [None, (FORWARD, "small"), (BACKWARD, "large")], ids=str)
@pytest.mark.parametrize("verdict", [proofs.SLOWER, proofs.WRONG])
def test_by_default_it_serves_where_every_size_is_proven_in_both_directions(bad, verdict: str) -> None:
    """So forward and backward never part, and a batch gets the same bits as its parts."""
    device = torch.device(DEVICE)
    made = record(device, {} if bad is None else {bad: verdict})
    with mock.patch.object(proofs, "record_of", lambda device: made):
        plans.forget()
        found = {spec_of(torch.empty(t, 64, device=DEVICE), backend=None) for t in (1, 1000, 100_000)}
        assert found == {ALWAYS if bad is None else NEVER}
        # Proofs of gated layers are others, and so are those of an output that is wider than x.
        assert spec_of(torch.empty(9, 64, device=DEVICE), backend=None, gated=True) == NEVER
        assert spec_of(torch.empty(9, 64, device=DEVICE), out=128, backend=None) == NEVER
    plans.forget()


# Proofs of the kernels that store the hidden layer, which forward and backward have each for itself.


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("backward", "by"),
    [(proofs.PROVEN, "triton"), (proofs.SLOWER, "portable"), (proofs.WRONG, "portable"), ("", "portable")],
)
def test_a_backward_that_is_slower_leaves_the_forward_to_the_kernels(backward: str, by: str, gated: bool) -> None:
    """In the first call, in one with a plan, and in one that is an operator."""
    problem = Problem(tokens=9, width=16, hidden=24, out=16, gated=gated)
    inputs, dy = problem.inputs(), problem.dy()
    spec = MLPSpec(problem.activation, gated)
    rows = {}
    for direction, verdict in ((FORWARD, proofs.PROVEN), (BACKWARD, backward)):
        asked = capabilities.question(capabilities.Request("mlp", spec, (inputs[0],)), direction)
        rows |= {asked.key(kind): proofs.Row(asked.key(kind), verdict) for kind in asked.kinds if verdict}
    made = proofs.Record(proofs.machine(torch.device(DEVICE)), rows=rows)
    expected = run(functools.partial(problem.ours, backend="portable"), inputs, dy)
    served: list[tuple[str, str]] = []
    with contextlib.ExitStack() as stack:
        for name in ("triton", "portable"):
            module = backends.load("mlp", name)
            for direction in (FORWARD, BACKWARD):
                noted = functools.partial(_noted, served, (name, direction), getattr(module, direction))
                stack.enter_context(mock.patch.object(module, direction, noted))
        stack.enter_context(mock.patch.object(proofs, "record_of", lambda device: made))
        plans.forget()
        for _ in range(2):
            found = run(problem.ours, inputs, dy)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), without_plans():
            run(problem.ours, inputs, dy)
        assert served == [("triton", FORWARD), (by, BACKWARD)] * 3
        made = None
        plans.forget()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            run(problem.ours, inputs, dy)
        assert set(served[6:]) == {("portable", FORWARD), ("portable", BACKWARD)}
    plans.forget()
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def _noted(served: list, entry: tuple[str, str], function: Any, *arguments: Any) -> Any:
    served.append(entry)
    return function(*arguments)


def test_a_proof_of_the_whole_layer_asks_for_no_other() -> None:
    request = capabilities.Request("mlp", MLPSpec("silu", whole=ALWAYS), (torch.empty(9, 65),))
    asked = capabilities.question(request, FORWARD)
    assert (asked.kinds, asked.deciding, asked.width) == (("whole",), ("whole",), 128)
