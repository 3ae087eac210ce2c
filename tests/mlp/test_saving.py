"""What an MLP keeps for its backward, in how many pieces it computes, and where it rounds."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from attention_problems import without_plans
from comparing import check_or_refusal, exact_and_eager, run
from hardware import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from test_branch import Branch
from test_mlp import BACKENDS, Problem, check
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.core import capabilities, plans
from fastattn.core.mlp import int8, portable
from fastattn.core.mlp.spec import PACKED, MLPSpec, MLPWeights
from fastattn.dropin import mlp_forms
from fastattn.kernels.mlp.forward import hidden_forward
from fastattn.kernels.mlp.problem import Layer

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "squared relu": {"activation": "relu_squared"},
    "gated": {"activation": "silu", "gated": True},
    **{f"packed {order}": {"activation": "silu", "gated": True, "packed": order} for order in PACKED},
}
EXACT = ("auto", "preactivation", "nothing")
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def gradients(problem: Problem, inputs: list[Tensor | None], dy: Tensor, backend: str) -> list[Tensor]:
    """y and every gradient."""
    return run(functools.partial(problem.ours, backend=backend), inputs, dy)


# Exactness.

SAMPLES = {
    **{f"activation {name}": Problem(activation=name) for name in fastattn.ground.checks.ACTIVATIONS},
    "gated": Problem(gated=True),
    "gate and up packed in one weight, in either order": Problem(gated=True, packed="up_gate"),
    "keeping 8 bits a number for the backward": Problem(save="int8", hidden=200),
    "keeping nothing but x for the backward": Problem(save="nothing"),
    "chunks of tokens": Problem(chunk=7),
    "rounding wherever eager rounds": Problem(match_eager=True, dtype=torch.float16),
    "RMS norm or layer norm of its input, with gradient": Branch(norm="layer", tokens=9),
    "dropout of its output": Branch(dropout=0.1, tokens=9),
    "residual added in the same pass, with gradient": Branch(residual="x", tokens=9),
    capabilities.WHOLE_LAYER: Problem(save="nothing"),
    f"{capabilities.WHOLE_LAYER}, gated": Problem(save="nothing", gated=True),
    "biases, or none": Problem(biases=False),
    "any widths": Problem(width=1, hidden=131, out=7),
    "float16": Problem(dtype=torch.float16),
    "bfloat16": Problem(dtype=torch.bfloat16),
    "float32, IEEE products": Problem(),
    "float64": Problem(dtype=torch.float64),
}
ROWS = [f.name for f in capabilities.FEATURES if f.family == "mlp"]


@EVERY_BACKEND
@pytest.mark.parametrize("feature", ROWS)
def test_every_feature_of_the_table_is_exact(feature: str, backend: str) -> None:
    problem = SAMPLES[feature]
    checking = check_int8 if problem.save == "int8" else check
    if backend == "triton" and feature.startswith(capabilities.WHOLE_LAYER):
        checking = lambda problem, _: check(problem, "whole")  # noqa: E731
    check_or_refusal(checking, problem, backend, "float64" if problem.dtype == torch.float64 else None)


@pytest.mark.parametrize("chunk", ["auto", 7])
@pytest.mark.parametrize("save", EXACT)
@EVERY_FORM
@EVERY_BACKEND
def test_whatever_is_kept_results_are_as_exact_as_eager(backend: str, form: str, save: str, chunk) -> None:
    check(Problem(**FORMS[form], tokens=20, width=21, hidden=33, save=save, chunk=chunk), backend)


def test_sums_over_very_many_chunks_lose_nothing_in_half_precision() -> None:
    """Rounded to float16 after each of 200 chunks, the weights' gradients would be many times worse than
    eager's."""
    problem = Problem(tokens=200, chunk=1, dtype=torch.float16, upstream="expanded", activation="silu")
    check(problem, "portable")


@pytest.mark.parametrize("save", ["preactivation", "nothing"])
@EVERY_FORM
@EVERY_BACKEND
def test_a_pre_activation_computed_again_has_the_forward_s_bits(backend: str, form: str, save: str) -> None:
    """Each chunk is computed from the same numbers by the same call, kept or not, so every result is equal."""
    sizes = {"tokens": 20, "width": 20, "hidden": 33, "out": 20}
    problem = Problem(**FORMS[form], **sizes, dtype=torch.float16, chunk=8, save=save)
    inputs, dy = problem.inputs(), problem.dy()
    expected = gradients(dataclasses.replace(problem, save="auto"), inputs, dy, backend)
    for a, b in zip(gradients(problem, inputs, dy, backend), expected, strict=True):
        assert torch.equal(a, b)


# int8.


@settings(max_examples=60)
@given(st.integers(0, 5), st.integers(0, 300), st.booleans(), st.integers(-20, 20))
def test_int8_is_within_a_254th_of_the_largest_of_its_block_and_keeps_signs(rows, width, keep_sign, power) -> None:
    t = torch.randn(rows, width) * 2.0**power
    codes, scales = int8.empty(t, width, 1)
    int8.quantised(t, keep_sign, codes, scales)
    back = int8.restored(codes, scales, torch.float32)
    for start in range(0, width, int8.BLOCK):
        part, found = t[:, start : start + int8.BLOCK], back[:, start : start + int8.BLOCK]
        largest = part.abs().amax(1, keepdim=True)
        assert ((found - part).abs() <= largest / (127 if keep_sign else 254) * (1 + 1e-5)).all()
    if keep_sign:
        assert torch.equal(back > 0, t > 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@EVERY_BACKEND
def test_a_block_of_int8_with_a_number_that_is_not_finite_becomes_nan(backend: str, bad: float) -> None:
    t = torch.ones(2, 256, device=DEVICE)
    t[1, 200] = bad
    codes, scales = quantised_by(backend, t)
    back = int8.restored(codes, scales, torch.float32)
    assert back[1, 128:].isnan().all() and torch.equal(back[0], t[0]) and torch.equal(back[1, :128], t[1, :128])


def quantised_by(backend: str, t: Tensor) -> tuple[Tensor, ...]:
    """The int8 codes and scales of a pre-activation t: of an MLP whose first layer is the identity."""
    one = torch.eye(t.shape[1], device=DEVICE)
    if backend == "portable":
        codes, scales = int8.empty(t, t.shape[1], 1)
        int8.quantised(t, False, codes, scales)
        return codes, scales
    _, kept = hidden_forward(t.nan_to_num(posinf=0, neginf=0, nan=0) @ one, layer_of(t, one), "int8")
    if not t.isfinite().all():
        bias = t[1] - t[1].nan_to_num(posinf=0, neginf=0, nan=0)
        first = Layer([(one, torch.where(t[1].isfinite(), 0.0, bias))], "", "silu", t.shape[1])
        rows = torch.ones_like(t)
        kept = tuple(
            torch.cat((good[:1], bad[1:]))
            for good, bad in zip(kept, hidden_forward(rows, first, "int8")[1], strict=True)
        )
    return kept


def layer_of(t: Tensor, weight: Tensor) -> Layer:
    return Layer([(weight, None)], "", "silu", t.shape[1])


def test_the_kernel_quantises_as_the_portable_backend_does() -> None:
    t = torch.randn(20, 300, device=DEVICE)
    for ours, theirs in zip(quantised_by("triton", t), quantised_by("portable", t), strict=True):
        # A number in the middle between two codes may be rounded to either.
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=1e-6, atol=1.0 if ours.dtype == torch.int8 else 0
        )


def check_int8(problem: Problem, backend: str) -> None:
    """y is exact, and the relative error of the gradients is what `mlp`'s docstring says."""
    torch.manual_seed(0)
    inputs, dy = problem.inputs(), problem.dy()
    exact, _ = exact_and_eager(problem.definition, inputs, dy)
    actual = gradients(problem, inputs, dy, backend)
    plain = gradients(dataclasses.replace(problem, save="preactivation"), inputs, dy, backend)
    torch.testing.assert_close(actual[0], plain[0])
    for a, x in zip(actual[1:], exact[1:], strict=True):
        assert (a.double() - x).norm() <= 0.01 * x.norm()


@EVERY_FORM
@EVERY_BACKEND
def test_gradients_from_int8_are_within_one_percent(backend: str, form: str) -> None:
    check_int8(Problem(**FORMS[form], hidden=150, save="int8", chunk=16), backend)


def test_the_error_of_int8_is_that_of_the_docstring() -> None:
    """0.5 percent of dx and 0.7 percent of dW2, GELU, of normal numbers; 30 percent more or less."""
    problem = Problem(tokens=256, width=256, hidden=1024, out=256, biases=False, save="int8")
    inputs, dy = problem.inputs(), problem.dy()
    exact, _ = exact_and_eager(problem.definition, inputs, dy)
    actual = gradients(problem, inputs, dy, "portable")
    dx, dw2 = ((actual[i].double() - exact[i]).norm() / exact[i].norm() for i in (1, 3))
    assert 0.7 < dx / 0.005 < 1.3 and 0.7 < dw2 / 0.007 < 1.3, (dx, dw2)


# Memory.


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside occupy at a time. Views count as a part of theirs."""

    def __init__(self, *given: Tensor | None) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {t.untyped_storage().data_ptr() for t in given if t is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            key, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
            if size and key not in self.known:
                self.known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(t, self._forget, key, size)
        return result

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("save", ["nothing", "int8"])
@EVERY_FORM
def test_a_chunked_backward_has_three_tensors_as_wide_as_the_hidden_layer(form, save, monkeypatch) -> None:
    monkeypatch.setattr(int8, "AT_A_TIME", 1024)
    chunk, width, hidden = 64, 8, 512
    problem = Problem(**FORMS[form], tokens=512, width=width, hidden=hidden, out=width, biases=False)
    x, *rest = problem.inputs()
    weights = MLPWeights(*rest)
    spec = MLPSpec(problem.activation, problem.gated, problem.packed or "", save, chunk)
    y, kept = portable.forward(x, weights, spec)
    dy = torch.randn_like(y)
    with Peak(x, dy, *rest, *kept) as peak:
        found = portable.backward(dy, x, weights, kept, (True, True, False, True, False, False, False), spec)
    three = 3 * chunk * hidden * 4 * (2 if problem.gated else 1)
    gradients = sum(t.nbytes for t in found if t is not None)
    assert gradients < peak.most <= three + gradients + 0.1 * three, (peak.most, three, gradients)


# Packed weights.


@pytest.mark.parametrize("order", PACKED)
@pytest.mark.parametrize("save", ["auto", "preactivation", "nothing"])
@EVERY_BACKEND
def test_a_packed_weight_gives_what_its_halves_give(backend: str, save: str, order: str) -> None:
    packed = Problem(gated=True, packed=order, activation="silu", save=save)
    x, w, b, _, _, w_out, b_out = packed.inputs()
    halves = [t.chunk(2) for t in (w, b)]
    (w_gate, w_up), (b_gate, b_up) = halves if order == "gate_up" else [pair[::-1] for pair in halves]
    dy = packed.dy()
    y, dx, dw, db, *rest = gradients(packed, [x, w, b, None, None, w_out, b_out], dy, backend)
    apart = dataclasses.replace(packed, packed=None)
    found = gradients(apart, [x, w_gate, b_gate, w_up, b_up, w_out, b_out], dy, backend)
    y_apart, dx_apart, dw_gate, db_gate, dw_up, db_up, *rest_apart = found
    pairs = ((dw_gate, dw_up), (db_gate, db_up)) if order == "gate_up" else ((dw_up, dw_gate), (db_up, db_gate))
    together = [y_apart, dx_apart, *(torch.cat(pair) for pair in pairs), *rest_apart]
    for a, e in zip([y, dx, dw, db, *rest], together, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


class Copies(TorchDispatchMode):
    """Notes the operators that copy, with the number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("cat", "copy_", "clone", "_to_copy", "stack"):
            self.found.append((func.name(), result.numel()))
        return result


@pytest.mark.parametrize("order", PACKED)
@pytest.mark.parametrize("save", ["auto", "preactivation", "nothing"])
def test_a_packed_weight_and_its_gradient_are_never_copied(save: str, order: str) -> None:
    problem = Problem(gated=True, packed=order, activation="silu")
    x, *rest = problem.inputs()
    weights, spec = MLPWeights(*rest), MLPSpec("silu", True, order, save)
    with Copies() as copies:
        y, kept = portable.forward(x, weights, spec)
        _, dw, *_ = portable.backward(torch.randn_like(y), x, weights, kept, (True,) * 5 + (False,) * 2, spec)
    assert dw.is_contiguous() and dw.shape == weights.w_in.shape
    assert not [found for found in copies.found if found[1] > 2 * problem.hidden], copies.found


# Where eager rounds.


def eager(problem: Problem, x: Tensor, w_in, b_in, w_up, b_up, w_out, b_out) -> Tensor:
    """What one writes by hand: torch's own functions, one by one."""
    activations: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu, "silu": F.silu, "relu": F.relu, "relu_squared": lambda t: F.relu(t).square(),
    }  # fmt: skip
    first = F.linear(x, w_in, b_in)
    up = None if w_up is None else F.linear(x, w_up, b_up)
    if problem.packed:
        first, up = first.chunk(2, 1) if problem.packed == "gate_up" else first.chunk(2, 1)[::-1]
    hidden = activations[problem.activation](first)
    return F.linear(hidden if up is None else hidden * up, w_out, b_out)


@pytest.mark.parametrize("save", ["auto", "preactivation", "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EVERY_FORM
def test_the_portable_backend_matches_eager_to_the_last_bit(form: str, dtype: torch.dtype, save: str) -> None:
    problem = Problem(
        **FORMS[form], tokens=48, width=64, hidden=96, out=64, dtype=dtype, save=save, match_eager=True
    )
    inputs, dy = problem.inputs(), problem.dy()
    expected = run(functools.partial(eager, problem), inputs, dy)
    for a, e in zip(gradients(problem, inputs, dy, "portable"), expected, strict=True):
        assert torch.equal(a, e), f"{(a != e).sum()} of {a.numel()} elements differ"


def kept_bytes(function: Callable[[], Tensor], inputs: list[Tensor | None]) -> int:
    """Of what the forward saves beside its inputs; each tensor once."""
    given = {t.untyped_storage().data_ptr() for t in inputs if t is not None}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = function()
    assert y.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@EVERY_FORM
def test_autograd_s_own_backward_has_the_bits_of_the_operator_and_keeps_no_more(
    form: str, dtype: torch.dtype, monkeypatch
) -> None:
    """Most calls on a CPU are made of torch's operations. Within a checkpoint they are the operator."""
    problem = Problem(**FORMS[form], tokens=48, width=64, hidden=96, out=64, dtype=dtype)
    inputs, dy = [None if t is None else t.requires_grad_() for t in problem.inputs()], problem.dy()
    function = functools.partial(problem.ours, *inputs, backend="portable")
    found = gradients(problem, inputs, dy, "portable")
    with without_plans():
        expected = gradients(problem, inputs, dy, "portable")
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
    composed = form != "squared relu"
    assert type(function().grad_fn).__name__ == ("AddmmBackward0" if composed else "PlannedBackward")
    keeps = kept_bytes(function, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "_saved_tensors_hooks", lambda _: None)
        assert kept_bytes(function, inputs) <= keeps
    y = checkpoint(function, use_reentrant=False)
    found = torch.autograd.grad(y, [t for t in inputs if t is not None], dy)
    assert all(torch.equal(a, e) for a, e in zip(found, expected[1:], strict=True))


@EVERY_FORM
def test_the_kernels_match_eager_in_all_but_few_elements(form: str) -> None:
    """In float16 the order of a sum decides some roundings; without match_eager ten times as many differ."""
    problem = Problem(**FORMS[form], tokens=32, width=64, hidden=64, out=32, dtype=torch.float16, match_eager=True)
    inputs, dy = problem.inputs(), problem.dy()
    expected = run(functools.partial(eager, problem), inputs, dy)
    for a, e in zip(gradients(problem, inputs, dy, "triton"), expected, strict=True):
        assert (a != e).sum() <= 0.05 * a.numel(), f"{(a != e).sum()} of {a.numel()} elements differ"


# As any other operator.

OPTIONS = {
    "preactivation": {"save": "preactivation"},
    "int8": {"save": "int8"},
    "nothing": {"save": "nothing", "chunk": 2},
    "packed": {"save": "nothing", "gated": True, "packed": "up_gate"},
    "eager": {"match_eager": True},
}
EVERY_OPTION = pytest.mark.parametrize("option", OPTIONS)


def asked(option: str, dtype: torch.dtype = torch.float32, tokens: int = 5) -> tuple[Problem, list[Tensor | None]]:
    problem = Problem(tokens=tokens, width=6, hidden=7, out=4, activation="silu", dtype=dtype, **OPTIONS[option])
    return problem, [None if t is None else t.requires_grad_() for t in problem.inputs()]


def filled(
    problem: Problem, inputs: list[Tensor | None], backend: str | None = "portable"
) -> Callable[..., Tensor]:
    """`problem.ours` of the inputs that are there."""

    def call(*present: Tensor) -> Tensor:
        rest = iter(present)
        return problem.ours(*(None if t is None else next(rest) for t in inputs), backend=backend)

    return call


@EVERY_OPTION
def test_second_derivatives_and_forward_mode(option: str) -> None:
    problem, inputs = asked(option, torch.float64)
    present = [t for t in inputs if t is not None]
    function = filled(problem, inputs)
    if option != "int8":  # numbers in 8 bits have a slope of their own
        assert torch.autograd.gradcheck(function, present)
        assert torch.autograd.gradgradcheck(function, present)
    plain = filled(Problem(activation="silu", gated=problem.gated, packed=problem.packed), inputs)
    tangents = tuple(torch.ones_like(t) for t in present)
    detached = tuple(t.detach() for t in present)
    for a, e in zip(*(torch.func.jvp(f, detached, tangents) for f in (function, plain)), strict=True):
        torch.testing.assert_close(a, e)
    seconds = []
    for f in (function, plain):
        grads = torch.autograd.grad(f(*present).square().sum(), present, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in grads), present))
    for a, e in zip(*seconds, strict=True):
        assert (a - e).norm() <= (0.02 if option == "int8" else 1e-9) * e.norm()


@EVERY_OPTION
@EVERY_BACKEND
def test_autocast_checkpointing_and_a_graph_used_twice(backend: str, option: str) -> None:
    problem, inputs = asked(option, tokens=9)
    present = [t for t in inputs if t is not None]
    function = filled(problem, inputs, backend)
    y = function(*present)
    expected = torch.autograd.grad(y.sum(), present, retain_graph=True)
    again = torch.autograd.grad(y.sum(), present)
    repeated = checkpoint(function, *present, use_reentrant=False)
    for found in (again, torch.autograd.grad(repeated.sum(), present)):
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
    if backend == "portable":
        with torch.autocast(DEVICE, torch.bfloat16):
            lower = function(*present)
        assert lower.dtype == torch.bfloat16
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(lower.float().sum(), present))


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@EVERY_OPTION
def test_compiles_in_one_graph_for_any_number_of_tokens_and_gives_the_same(
    option: str, backend: str | None
) -> None:
    torch._dynamo.reset()
    for tokens in (5, 9):
        problem, inputs = asked(option, tokens=tokens)
        present = [t for t in inputs if t is not None]
        function = filled(problem, inputs, backend)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        dy = torch.randn(tokens, 4, device=DEVICE)
        for a, e in zip(run(compiled, present, dy), run(function, present, dy), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@EVERY_OPTION
def test_vmap_of_gradients_equals_one_by_one(option: str) -> None:
    problem, inputs = asked(option)
    x, *weights = (t.detach() for t in inputs if t is not None)
    function = filled(problem, inputs)
    xs = torch.stack((x, -x, 2 * x))
    gradient = torch.func.grad(lambda x, *weights: function(x, *weights).square().sum(), argnums=(0, 1))
    found = torch.func.vmap(gradient, (0, *(None,) * len(weights)))(xs, *weights)
    for i in range(3):
        for a, e in zip(found, gradient(xs[i], *weights), strict=True):
            torch.testing.assert_close(a[i], e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "gated", "packed gate_up"])
def test_a_product_that_is_computed_again_counts_as_flop(form: str) -> None:
    problem = Problem(**FORMS[form])
    inputs = [None if t is None else t.requires_grad_() for t in problem.inputs()]
    counts = []
    for save in ("preactivation", "nothing"):
        with FlopCounterMode(display=False) as counter:
            dataclasses.replace(problem, save=save).ours(*inputs, backend="portable").sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * problem.tokens * problem.width * problem.hidden * (1 + problem.gated)


# Modules.


@pytest.mark.parametrize("kind", [fastattn.nn.MLP, fastattn.nn.GatedMLP])
def test_modules_keep_what_they_are_asked_to(kind: Any) -> None:
    torch.manual_seed(0)
    module = kind(16, 24, save="nothing", chunk=3)
    assert "save='nothing', chunk=3" in repr(module) and "save" not in repr(kind(16, 24))
    x = torch.randn(2, 5, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
    assert all(t.shape != (10, 24) for t in kept)
    other = kind(16, 24)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(y, other(x))
    with pytest.raises(ValueError, match="save must be one of auto, preactivation, int8, nothing, got 'all'"):
        kind(16, save="all")


# Bad input.

X, W, PACKED_W, DOWN = (torch.zeros(size, device=DEVICE) for size in ((3, 8), (16, 8), (32, 8), (8, 16)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fastattn.mlp(X, W, None, DOWN, None, save="all"),
            ValueError,
            "save must be one of auto, .*'all'",
        ),
        (
            lambda: fastattn.mlp(X, W, None, DOWN, None, chunk=0),
            ValueError,
            "chunk must be at least 1, got 0",
        ),
        (
            lambda: fastattn.mlp(X, W, None, DOWN, None, chunk="small"),
            ValueError,
            "chunk must be \"auto\" or a number of tokens, got 'small'",
        ),
        (
            lambda: fastattn.mlp(X, W, None, DOWN, None, chunk=2.5),
            TypeError,
            'chunk must be "auto" or a number of tokens, got float',
        ),
        (
            lambda: fastattn.mlp(X, W, None, DOWN, None, match_eager=1),
            TypeError,
            "match_eager must be a bool, got int",
        ),
        (
            lambda: fastattn.gated_mlp(X, PACKED_W, None, DOWN, packed="both"),
            ValueError,
            "packed must be one of gate_up, up_gate or None, got 'both'",
        ),
        (
            lambda: fastattn.gated_mlp(X, PACKED_W, W, DOWN, packed="gate_up"),
            ValueError,
            "w_up must be None if packed='gate_up', because w_gate holds both; got a tensor",
        ),
        (
            lambda: fastattn.gated_mlp(X, PACKED_W[:31], None, DOWN, packed="gate_up"),
            ValueError,
            r"w_gate must have an even number of rows if packed='gate_up', got shape \(31, 8\)",
        ),
        (
            lambda: fastattn.gated_mlp(X, W, None, DOWN, packed="gate_up"),
            ValueError,
            r"w_down must have shape \(out, 8\) \(half of w_gate's rows\), got \(8, 16\)",
        ),
    ],
)
def test_bad_input_is_refused_in_words(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


# Hugging Face's modules.

MODULES = {
    "LlamaMLP": ("llama", "LlamaConfig", {"hidden_act": "silu"}),
    "GemmaMLP": ("gemma", "GemmaConfig", {"hidden_act": "gelu_pytorch_tanh"}),
    "Phi3MLP": ("phi3", "Phi3Config", {"hidden_act": "silu", "pad_token_id": 0}),
    "GPT2MLP": ("gpt2", "GPT2Config", {"resid_pdrop": 0.0}),
    "T5DenseGatedActDense": ("t5", "T5Config", {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}),
}


@pytest.mark.parametrize("name", MODULES)
def test_hugging_face_s_modules_keep_their_results_and_gradients_when_patched(name: str) -> None:
    from needs_transformers import transformers

    family, config_name, options = MODULES[name]
    sizes = {"d_model": 32, "d_ff": 48} if family == "t5" else {"hidden_size": 32, "intermediate_size": 48}
    config = getattr(transformers, config_name)(**sizes, **options)
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    module = kind(48, config) if family == "gpt2" else kind(config)
    x = torch.randn(2, 9, 32)

    def results() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        return [y, *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])]

    expected = results()
    (row,) = fastattn.patch(module).rows
    assert row.now is not None, row.why
    with mock.patch.object(mlp_forms, "gated_mlp", wraps=fastattn.gated_mlp) as gated:
        for a, e in zip(results(), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    # Phi-3's one weight for gate and up is taken as it lies.
    asked = [call.kwargs.get("packed") for call in gated.call_args_list]
    assert asked == ([] if name == "GPT2MLP" else ["gate_up" if name == "Phi3MLP" else None])
