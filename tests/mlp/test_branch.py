"""An MLP as the branch of a transformer layer: norm before it, dropout and residual after it, in one call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from comparing import exact_and_eager, run
from hardware import DEVICE, ON_GPU
from test_mlp import BACKENDS, Problem, implementation
from tolerance import assert_as_exact_as_eager
from torch import Tensor, library
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.ground.checks import lse_dtype
from fastattn.kernels.mlp import folded_norm

STATE = torch.tensor([[2**40 + 7, 3]], device=DEVICE)
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@dataclass(frozen=True)
class Branch(Problem):
    """residual: "x", "apart" or "" for none."""

    width: int = 40
    hidden: int = 24
    out: int = 40
    norm: str | None = None
    affine: bool = True
    residual: str = ""
    dropout: float = 0.0

    def inputs(self) -> list[Tensor | None]:
        """Those of an MLP, then norm_weight, norm_bias and the residual."""
        x, *weights = super().inputs()
        x = 3 * x + 0.5
        of_norm = [torch.randn(self.width, device=DEVICE).to(self.dtype) + 1 for _ in range(2)]
        norm_weight = of_norm[0] if self.norm and self.affine else None
        norm_bias = of_norm[1] if self.norm == "layer" and self.affine else None
        residual = torch.randn(self.tokens, self.out, device=DEVICE).to(self.dtype)
        return [x, *weights, norm_weight, norm_bias, residual if self.residual == "apart" else None]

    def definition(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """The steps one after the other, by PyTorch's functions; the norm rounds once."""
        *weights, norm_weight, norm_bias, residual = tensors
        normalised = x
        if self.norm:
            wide = lse_dtype(x.dtype)
            w, b = (None if t is None else t.to(wide) for t in (norm_weight, norm_bias))
            of = (x.to(wide), (x.shape[-1],), w)
            normalised = (F.layer_norm(*of, b, 1e-3) if self.norm == "layer" else F.rms_norm(*of, 1e-3)).to(
                x.dtype
            )
        y = super().definition(normalised, *weights)
        if self.dropout:
            share = round(self.dropout * 2**16) / 2**16
            y = y * fastattn.dropout_mask(STATE, self.dropout, 1, *y.shape)[0, 0] / (1 - share)
        residual = x if self.residual == "x" else residual
        return y if residual is None else residual + y

    def ours(self, x: Tensor, *tensors: Tensor | None, backend: str | None = None) -> Tensor:
        w_in, b_in, w_up, b_up, w_out, b_out, norm_weight, norm_bias, residual = tensors
        options: dict[str, Any] = {
            "activation": self.activation, "save": self.save, "chunk": self.chunk, "backend": backend,
            "norm": self.norm, "norm_weight": norm_weight, "norm_bias": norm_bias,
            "norm_eps": 1e-3 if self.norm else None, "residual": x if self.residual == "x" else residual,
            "dropout_p": self.dropout, "dropout_state": STATE if self.dropout else None,
        }  # fmt: skip
        if self.gated:
            biases = {"b_gate": b_in, "b_up": b_up, "b_down": b_out}
            return fastattn.gated_mlp(x, w_in, w_up, w_out, packed=self.packed, **biases, **options)
        return fastattn.mlp(x, w_in, b_in, w_out, b_out, **options)


def check(problem: Branch, name: str) -> None:
    """y and every gradient are as exact as eager."""
    torch.manual_seed(0)
    inputs, dy = problem.inputs(), problem.dy()
    exact, eager = exact_and_eager(problem.definition, inputs, dy)
    with implementation(name) as backend:
        actual = run(functools.partial(problem.ours, backend=backend), inputs, dy)
    for i, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        assert_as_exact_as_eager(a, x, e, gradient=i > 0)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"gated": True},
    "packed": {"gated": True, "packed": "up_gate"},
}
BRANCHES: dict[str, dict[str, Any]] = {
    "residual": {"residual": "apart", "out": 34},
    "dropout": {"dropout": 0.3, "upstream": "transposed"},
    "rms": {"norm": "rms", "residual": "x"},
    "rms without weight": {"norm": "rms", "affine": False, "biases": False},
    "layer": {"norm": "layer", "residual": "apart", "dropout": 0.1},
    "whole": {"norm": "layer", "residual": "x", "dropout": 0.3, "upstream": "expanded"},
    "whole, gated, chunks": {
        "norm": "rms", "residual": "x", "dropout": 0.3, "gated": True, "save": "nothing", "chunk": 16,
    },
    "whole, all kept, chunks": {
        "norm": "layer", "residual": "x", "save": "preactivation", "activation": "relu", "chunk": 16,
    },
}  # fmt: skip
EVERY_BRANCH = pytest.mark.parametrize("branch", BRANCHES)


@EVERY_BRANCH
@pytest.mark.parametrize("name", ["triton", "library", "portable", "reference"])
def test_a_branch_is_as_exact_as_its_steps(name: str, branch: str) -> None:
    check(Branch(**BRANCHES[branch]), name)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("name", ["triton", "portable"])
def test_half_precision(name: str, norm: str) -> None:
    dtype = torch.float16 if name == "triton" and not ON_GPU else torch.bfloat16
    check(Branch(norm=norm, residual="x", dropout=0.2, dtype=dtype), name)


@pytest.mark.parametrize(
    ("form", "norm"), [("plain", "layer"), ("gated", "rms"), ("packed", "layer")], ids=lambda name: name
)
def test_a_norm_in_the_first_product_is_as_exact_as_one_before_it(form: str, norm: str, monkeypatch) -> None:
    """In bfloat16. The interpreter computes that wrongly: there it is tried in float16, with weights near one."""
    monkeypatch.setattr(folded_norm, "FOLDED", (torch.bfloat16, torch.float16))
    written = mock.Mock(wraps=folded_norm.norm_forward)
    monkeypatch.setattr(folded_norm, "norm_forward", written)
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    problem = Branch(
        **FORMS[form], norm=norm, residual="x", tokens=64, width=20, hidden=8, out=20, dtype=dtype, save="nothing"
    )
    check(problem, "triton")
    written.assert_called_once()  # in the backward


# A norm's weight in even columns and in odd ones, and the size of the layer's weights. Small weights meet large
# numbers. The products of both would lose digits in float16, have two bits at 2^-22, or be too large at 2^17.
NORM_WEIGHTS = {
    "from 1e-2 to 1e2": (1e-2, 1e2, 2**-3),
    "small": (2**-12, 2**-12, 2**-8),
    "large": (2**-3, 2**12, 2**5),
}


@pytest.mark.parametrize("dtype", [torch.float16, *[torch.bfloat16] * ON_GPU])
@pytest.mark.parametrize("size", NORM_WEIGHTS)
def test_a_norm_s_weight_of_any_size_costs_no_digits(size: str, dtype: torch.dtype) -> None:
    problem = Branch(
        norm="rms", biases=False, activation="relu", tokens=64, width=16, hidden=8, out=16, dtype=dtype
    )
    x, w_in, *_, w_out, _, norm_weight, _, _ = problem.inputs()
    even, odd, of_layer = NORM_WEIGHTS[size]
    norm_weight[::2], norm_weight[1::2] = even, odd
    x[:, ::2] *= (odd / even) ** 0.5  # both kinds of columns count alike
    x[:, 1::2] *= (even / odd) ** 0.5
    w_in, w_out = w_in * of_layer, w_out * min(1 / (of_layer * even), 2**10)
    tensors = (x, w_in, None, None, None, w_out, None, norm_weight, None, None)
    y = problem.ours(*tensors, backend="triton")
    exact = problem.definition(*(None if t is None else t.double() for t in tensors))
    assert_as_exact_as_eager(y, exact, problem.definition(*tensors))


@EVERY_BACKEND
def test_eight_bits_a_number_change_gradients_by_a_percent_and_no_result(backend: str) -> None:
    problem = Branch(norm="rms", residual="x", dropout=0.2, hidden=140, tokens=24, chunk=16)
    inputs, dy = problem.inputs(), problem.dy()
    whole, eighth = (
        run(functools.partial(dataclasses.replace(problem, save=save).ours, backend=backend), inputs, dy)
        for save in ("nothing", "int8")
    )
    # The kernels compute what they quantise by the library's product, which sums in another order.
    torch.testing.assert_close(eighth[0], whole[0], rtol=1e-5, atol=1e-5)
    for a, e in zip(eighth[1:], whole[1:], strict=True):
        assert (a - e).norm() <= 0.02 * e.norm()


# Dropout.


@EVERY_BACKEND
def test_dropout_depends_on_the_state_and_the_token_alone(backend: str) -> None:
    """Whatever the chunks, also where x has more dimensions."""
    problem = Branch(dropout=0.4, residual="apart")
    x, *rest = problem.inputs()
    whole = problem.ours(x, *rest, backend=backend)
    residual = rest.pop()
    chunked = Branch(dropout=0.4, chunk=16).ours(x, *rest, None, backend=backend) + residual
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    folded = problem.ours(x.view(2, 20, 40), *rest, residual.view(2, 20, 40), backend=backend)
    assert torch.equal(folded.view(40, 40), whole)


def test_the_state_is_drawn_from_torch_s_generator_in_every_call() -> None:
    x, w, down = (torch.randn(size, device=DEVICE) for size in ((6, 8), (12, 8), (8, 12)))

    def call() -> Tensor:
        return fastattn.mlp(x, w, None, down, None, dropout_p=0.5)

    torch.manual_seed(5)
    first, second = call(), call()
    torch.manual_seed(5)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)


# As any other operator.


def small(branch: str, dtype: torch.dtype = torch.float64) -> tuple[Branch, list[Tensor | None]]:
    changes = {"tokens": 5, "width": 6, "hidden": 7, **BRANCHES[branch], "dtype": dtype, "upstream": "contiguous"}
    changes = {**changes, "out": 6, "chunk": 2 if "chunk" in changes else "auto"}
    problem = Branch(**changes)
    return problem, [None if t is None else t.requires_grad_() for t in problem.inputs()]


def filled(function: Callable[..., Tensor], inputs: list[Tensor | None]) -> Callable[..., Tensor]:
    """`function` of the inputs that are there."""

    def call(*present: Tensor) -> Tensor:
        rest = iter(present)
        return function(*(None if t is None else next(rest) for t in inputs))

    return call


@EVERY_BRANCH
def test_second_derivatives_and_forward_mode_are_those_of_its_steps(branch: str) -> None:
    problem, inputs = small(branch)
    present = [t for t in inputs if t is not None]
    functions = [
        filled(f, inputs) for f in (functools.partial(problem.ours, backend="portable"), problem.definition)
    ]
    tangents = tuple(torch.randn_like(t) for t in present)
    detached = tuple(t.detach() for t in present)
    for a, e in zip(*(torch.func.jvp(f, detached, tangents) for f in functions), strict=True):
        torch.testing.assert_close(a, e)
    seconds = []
    for f in functions:
        grads = torch.autograd.grad(f(*present).square().sum(), present, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in grads), present))
    for a, e in zip(*seconds, strict=True):
        torch.testing.assert_close(a, e)


def test_opcheck() -> None:
    """Of the forward and of the backward, by what they are called with."""
    problem, inputs = small("whole, gated, chunks", torch.float32)
    called: list[tuple] = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (forward, backward):
                called.append((function, args))
            return function(*args, **(kwargs or {}))

    forward, backward = (getattr(torch.ops.fastattn, f"mlp_{name}").default for name in ("forward", "backward"))
    with Note():
        y = problem.ours(*inputs, backend="portable")
        torch.autograd.grad(y.sum(), [t for t in inputs if t is not None])
    assert [function for function, _ in called] == [forward, backward]
    for function, arguments in called:
        library.opcheck(function, arguments)


# In the interpreter a call takes seconds: the branch with every option stands for the others.
ON_BACKENDS = pytest.mark.parametrize(
    ("branch", "backend"),
    [("whole, gated, chunks", "triton"), *((branch, "portable") for branch in BRANCHES)],
)


@ON_BACKENDS
def test_checkpointing_a_graph_used_twice_and_the_third_call_give_the_same_bits(backend: str, branch: str) -> None:
    problem, inputs = small(branch, torch.float32)
    present = [t for t in inputs if t is not None]
    function = filled(functools.partial(problem.ours, backend=backend), inputs)
    y = function(*present)
    expected = [y.detach(), *torch.autograd.grad(y.sum(), present, retain_graph=True)]
    again = [y.detach(), *torch.autograd.grad(y.sum(), present)]
    calls = [again, *([None] * 2)]
    for i in (1, 2):
        y = function(*present) if i == 1 else checkpoint(function, *present, use_reentrant=False)
        calls[i] = [y.detach(), *torch.autograd.grad(y.sum(), present)]
    for found in calls:
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("branch", "backend"),
    [("whole, gated, chunks", "triton"), *((branch, None) for branch in ("whole", "residual", "rms"))],
)
def test_compiles_in_one_graph(branch: str, backend: str | None) -> None:
    torch._dynamo.reset()
    problem, inputs = small(branch, torch.float32)
    present = [t for t in inputs if t is not None]
    function = filled(functools.partial(problem.ours, backend=backend), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    dy = torch.randn(5, 6, device=DEVICE)
    for a, e in zip(run(compiled, present, dy), run(function, present, dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@EVERY_BRANCH
def test_vmap_of_gradients_equals_one_by_one(branch: str) -> None:
    problem, inputs = small(branch, torch.float32)
    x, *rest = (t.detach() for t in inputs if t is not None)
    function = filled(functools.partial(problem.ours, backend="portable"), inputs)
    xs = torch.stack((x, -x, 2 * x))
    gradient = torch.func.grad(lambda x, *rest: function(x, *rest).square().sum(), argnums=(0, 1))
    found = torch.func.vmap(gradient, (0, *(None,) * len(rest)))(xs, *rest)
    for i in range(3):
        for a, e in zip(found, gradient(xs[i], *rest), strict=True):
            torch.testing.assert_close(a[i], e, rtol=1e-4, atol=1e-5)


@EVERY_BRANCH
def test_under_autocast_norm_and_residual_keep_their_dtype(branch: str) -> None:
    """As its steps: only what goes into the products is cast."""
    problem, inputs = small(branch, torch.float32)
    present = [t for t in inputs if t is not None]
    with torch.autocast(DEVICE, torch.bfloat16):
        found, expected = (
            filled(f, inputs)(*present)
            for f in (functools.partial(problem.ours, backend="portable"), problem.definition)
        )
    assert found.dtype == (torch.float32 if problem.residual else torch.bfloat16)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
    gradients = torch.autograd.grad(found.float().sum(), present)
    assert all(g.dtype == torch.float32 for g in gradients)


# Memory.


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@EVERY_BACKEND
def test_neither_the_norm_s_result_nor_a_dropout_mask_is_kept(backend: str, norm: str | None) -> None:
    problem = Branch(norm=norm, residual="x", dropout=0.1, save="nothing", tokens=64, width=48, out=48)
    inputs = [None if t is None else t.requires_grad_() for t in problem.inputs()]
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.shape[:1] == (64,):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(note, lambda t: t):
        problem.ours(*inputs, backend=backend)
    assert kept == {inputs[0].untyped_storage().data_ptr(): inputs[0].untyped_storage().nbytes()}


# Bad input.

X, W, DOWN, LINE = (torch.zeros(size, device=DEVICE) for size in ((3, 8), (16, 8), (8, 16), (8,)))
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "norm": ({"norm": "batch"}, ValueError, "norm must be one of rms, layer or None, got 'batch'"),
    "weight alone": ({"norm_weight": LINE}, ValueError, 'norm_weight must be None without a norm; norm="rms"'),
    "eps alone": ({"norm_eps": 1e-5}, ValueError, "norm_eps must be None without a norm"),
    "bias of rms": ({"norm": "rms", "norm_bias": LINE}, ValueError, 'norm_bias must be None if norm="rms"'),
    "width": (
        {"norm": "rms", "norm_weight": LINE[:7]}, ValueError, r"norm_weight must have shape \(8,\), got \(7,\)",
    ),
    "eps": ({"norm": "rms", "norm_eps": -1.0}, ValueError, "norm_eps must be finite and at least"),
    "residual": ({"residual": X[:2]}, ValueError, r"residual must have the result's shape \(3, 8\), got \(2, 8\)"),
    "no tensor": ({"residual": "x"}, TypeError, "residual must be a torch.Tensor"),
    "dtype": (
        {"residual": X.double()}, TypeError, "residual must have x's dtype torch.float32, got torch.float64",
    ),
    "p": ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
    "state": (
        {"dropout_p": 0.1, "dropout_state": STATE[0]}, ValueError,
        r"dropout_state must have shape \(1, 2\), got \(2,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_bad_input_is_refused_in_words(name: str, autocast: bool) -> None:
    asked, error, message = BAD[name]
    if autocast and name == "dtype":
        return  # the sum has the wider dtype
    for call in (
        lambda: fastattn.mlp(X, W, None, DOWN, None, **asked),
        lambda: fastattn.gated_mlp(X, W, W, DOWN, **asked),
    ):
        with pytest.raises(error, match=message), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            call()
