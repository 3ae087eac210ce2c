"""Linear cross-entropy: torch's results by name, as exact as eager, without its logits, and an operator like any
other."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from comparing import check_or_refusal, doubled
from hardware import DEVICE, ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_exact_as_eager
from torch import Tensor, library
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastattn
import fastattn.flops
from fastattn.core import capabilities
from fastattn.core.loss import definition, operators, portable
from fastattn.core.loss.spec import LossSpec, LossTensors
from fastattn.kernels import loss as kernels
from fastattn.measuring.measure import peak_memory

BACKENDS = ("triton", "portable", "reference")
OURS = pytest.mark.parametrize("backend", ["triton", "portable"])
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Problem:
    """One call. target: "classes", some of which are ignored, "all ignored" or "probabilities". returns: whether
    log-sum-exps and entropies are asked for, too. scale: of the input, and so of the logits."""

    tokens: int = 37
    width: int = 24
    classes: int = 131
    target: str = "classes"
    bias: bool = True
    weighted: bool = True
    reduction: str = "mean"
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0
    returns: bool = False
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    strided: bool = False

    def inputs(self) -> list[Tensor | None]:
        """x, w and b."""
        tensors = [
            self._random(self.tokens, self.width) * self.scale,
            self._random(self.classes, self.width) / max(1, self.width) ** 0.5,
            self._random(1, self.classes)[0] if self.bias else None,
        ]
        return [None if t is None else t.to(self.dtype) for t in tensors]

    def _random(self, rows: int, columns: int) -> Tensor:
        if self.strided:
            return torch.randn(columns, rows, 2, device=DEVICE)[:, :, 1].t()
        return torch.randn(rows, columns, device=DEVICE)

    @functools.cache  # noqa: B019
    def beside(self) -> tuple[Tensor, Tensor | None]:
        """The target and the classes' weights."""
        generator = torch.Generator(DEVICE).manual_seed(1)
        weight = torch.rand(self.classes, generator=generator, device=DEVICE) + 0.1 if self.weighted else None
        if self.target == "probabilities":
            target = torch.rand(self.tokens, self.classes, generator=generator, device=DEVICE).softmax(1)
            return target.to(self.dtype), weight
        target = torch.randint(self.classes, (self.tokens,), generator=generator, device=DEVICE)
        target[:: 1 if self.target == "all ignored" else 5] = -100
        return target, weight

    def ours(self, x: Tensor, w: Tensor, b: Tensor | None = None, *, backend: str | None = None, **more) -> Any:
        target, weight = self.beside()
        options = {
            "reduction": self.reduction,
            "label_smoothing": self.smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "temperature": self.temperature,
            "return_lse": self.returns,
            "return_entropy": self.returns,
            "weight": weight,
            "backend": backend,
        }
        return fastattn.linear_cross_entropy(x, w, target, linear_bias=b, **{**options, **more})

    def eager(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        """By torch's own functions of whole logits, in x's dtype; results in float32 at least, as ours are."""
        target, weight = self.beside()
        if target.is_floating_point():
            target = target.to(x.dtype)
        z = F.linear(x, w, b)
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        z = z / self.temperature
        weight = None if weight is None else weight.to(x.dtype)
        loss = F.cross_entropy(z, target, weight, reduction=self.reduction, label_smoothing=self.smoothing)
        counted = torch.ones_like(z[:, 0]) if target.is_floating_point() else (target != -100).to(z.dtype)
        lse = torch.logsumexp(z, 1) * counted
        if self.z_loss:
            squares = self.z_loss * lse.square()
            if self.reduction != "none":
                squares = squares.sum() / (counted.sum() if self.reduction == "mean" else 1)
            loss = loss + squares
        found = [loss]
        if self.returns:
            log_p = F.log_softmax(z, 1)
            found += [lse, -(log_p.exp() * log_p).sum(1) * counted]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return tuple(t.to(wide) for t in found) if self.returns else loss.to(wide)


def run(call: Any, inputs: list[Tensor | None]) -> list[Tensor]:
    """The results of a call, then the gradients of a fixed random combination of them."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    results = call(*leaves)
    results = list(results) if isinstance(results, tuple) else [results]
    torch.manual_seed(2)
    upstream = [torch.rand(r.shape).to(r) + 0.5 for r in results]
    gradients = torch.autograd.grad(results, [t for t in leaves if t is not None], upstream)
    return [*(r.detach() for r in results), *gradients]


def check(problem: Problem, backend: str) -> None:
    """Ours against float64, by the error of eager PyTorch in the same dtype."""
    torch.manual_seed(0)
    inputs = problem.inputs()
    actual = run(functools.partial(problem.ours, backend=backend), inputs)
    exact, eager = run(problem.eager, doubled(inputs)), run(problem.eager, inputs)
    results = 3 if problem.returns else 1
    for i, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        if x.isnan().all():
            assert a.isnan().all()
        else:
            assert_as_exact_as_eager(a, x, e, gradient=i >= results, dtype=problem.dtype)


def small(dtype: torch.dtype = torch.float32, **changes) -> tuple[Problem, list[Tensor]]:
    """A problem and its inputs as leaves."""
    torch.manual_seed(0)
    problem = Problem(**{"tokens": 5, "width": 6, "classes": 9, "dtype": dtype, **changes})
    return problem, [t.requires_grad_() for t in problem.inputs() if t is not None]


# Exactness.


@OURS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", ["classes", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_losses_and_gradients_are_as_exact_as_eager(smoothing, target, reduction, backend) -> None:
    check(Problem(smoothing=smoothing, target=target, reduction=reduction), backend)


@OURS
@pytest.mark.parametrize("target", ["classes", "probabilities"])
@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"temperature": 0.7},
        {"z_loss": 0.01, "weighted": False},
        {"softcap": 3.0, "temperature": 1.5, "z_loss": 0.1, "smoothing": 0.2},
        {"bias": False, "weighted": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_is_as_exact_as_eager(options, returns, target, backend) -> None:
    check(Problem(**options, returns=returns, target=target, reduction="none" if returns else "mean"), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_dtypes(reduction, dtype, backend) -> None:
    missing = "float64" if dtype == torch.float64 else None
    check_or_refusal(check, Problem(dtype=dtype, reduction=reduction), backend, missing)


SAMPLES = {
    "class indices, ignored tokens": Problem(),
    "class probabilities": Problem(target="probabilities"),
    "label smoothing": Problem(smoothing=0.1),
    "weights of classes, biases, or none": Problem(bias=False),
    "soft-capped logits": Problem(softcap=2.0),
    "temperature": Problem(temperature=0.5),
    "log-sum-exp, with gradient (z-loss)": Problem(z_loss=0.1),
    "entropy, with gradient": Problem(returns=True),
    "filtered gradients": Problem(),
    "any widths, any number of classes": Problem(width=7, classes=1),
    "float16": Problem(dtype=torch.float16),
    "bfloat16": Problem(dtype=torch.bfloat16),
    "float32, IEEE products": Problem(),
    "float64": Problem(dtype=torch.float64),
}
ROWS = [f.name for f in capabilities.FEATURES if f.family == "loss"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", ROWS)
def test_every_feature_of_the_table_is_exact(feature: str, backend: str) -> None:
    problem = SAMPLES[feature]
    check_or_refusal(check, problem, backend, "float64" if problem.dtype == torch.float64 else None)


@settings(max_examples=20)
@given(
    st.builds(
        Problem,
        tokens=st.integers(1, 70),
        width=st.integers(1, 40),
        classes=st.integers(1, 150),
        target=st.sampled_from(["classes", "probabilities"]),
        bias=st.booleans(),
        weighted=st.booleans(),
        reduction=st.sampled_from(REDUCTIONS),
        smoothing=st.sampled_from([0.0, 0.3]),
        z_loss=st.sampled_from([0.0, 0.1]),
        softcap=st.sampled_from([None, 1.0]),
        temperature=st.sampled_from([1.0, 2.0]),
        returns=st.booleans(),
        scale=st.sampled_from([0.1, 1.0, 5.0]),
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        strided=st.booleans(),
    ),
    st.sampled_from(("triton", "portable")),
    st.sampled_from([2**10, 2**21]),
)
def test_any_shapes_strides_and_options(problem: Problem, backend: str, tile: int) -> None:
    if problem.dtype == torch.bfloat16:
        backend = "portable"  # the interpreter computes bfloat16 wrongly
    with mock.patch.object(portable, "TILE_ON_CPU", tile), mock.patch.object(portable, "LEAST_CLASSES", 4):
        check(problem, backend)


@OURS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token_that_counts_gives_what_torch_gives_and_zero_gradients(reduction: str, backend: str) -> None:
    for problem in (Problem(target="all ignored", reduction=reduction), Problem(tokens=0, reduction=reduction)):
        x, w, b = (t.requires_grad_() for t in problem.inputs())
        loss = problem.ours(x, w, b, backend=backend)
        torch.testing.assert_close(loss, problem.eager(x, w, b), equal_nan=True)
        for gradient in torch.autograd.grad(loss.sum(), (x, w, b)):
            assert not gradient.any()


@OURS
@pytest.mark.parametrize("scale", [1e4, -0.0])
@pytest.mark.parametrize("returns", [False, True])
def test_huge_logits_and_negative_zeros(scale: float, returns: bool, backend: str) -> None:
    check(Problem(scale=scale, bias=False, returns=returns), backend)


@OURS
@pytest.mark.parametrize("returns", [False, True])
def test_classes_that_a_bias_of_minus_infinity_rules_out(returns: bool, backend: str) -> None:
    """More than a tile of them, the first ones, so that a running maximum starts at -inf."""
    problem = Problem(classes=500, weighted=False, returns=returns)
    x, w, b = problem.inputs()
    b[:300] = float("-inf")
    target = torch.randint(300, 500, (problem.tokens,), device=DEVICE)
    with (
        mock.patch.object(Problem, "beside", lambda self: (target, None)),
        mock.patch.object(portable, "TILE_ON_CPU", 1),
    ):
        actual = run(functools.partial(problem.ours, backend=backend), [x, w, b])
        if returns:
            assert all(t.isfinite().all() for t in actual)
            problem, actual = (
                replace(problem, returns=False),
                run(
                    functools.partial(problem.ours, backend=backend, return_lse=False, return_entropy=False),
                    [x, w, b],
                ),
            )
        exact, eager = run(problem.eager, doubled([x, w, b])), run(problem.eager, [x, w, b])
    for a, x, e in zip(actual, exact, eager, strict=True):
        assert_as_exact_as_eager(a, x, e)


@OURS
def test_nan_comes_through(backend: str) -> None:
    x, w = torch.zeros(3, 4, device=DEVICE), torch.zeros(7, 4, device=DEVICE)
    x[1, 1] = float("nan")
    target = torch.zeros(3, dtype=torch.long, device=DEVICE)
    loss = fastattn.linear_cross_entropy(x, w, target, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]


# By torch's names.


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it since 2.13")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", ["classes", "probabilities"])
def test_torch_s_function_gives_the_same_by_the_same_names(target, smoothing, reduction) -> None:
    problem = Problem(target=target)
    x, w, b = problem.inputs()
    beside = dict(zip(("target", "weight"), problem.beside(), strict=True))
    options = {
        "linear_bias": b,
        "reduction": reduction,
        "label_smoothing": smoothing,
        "ignore_index": None,
        **beside,
    }
    ours = fastattn.linear_cross_entropy(input=x, linear_weight=w, **options)
    torch.testing.assert_close(ours, F.linear_cross_entropy(input=x, linear_weight=w, **options))


def test_one_token_without_a_batch_and_any_leading_dimensions() -> None:
    x, w = torch.randn(2, 3, 8, device=DEVICE), torch.randn(11, 8, device=DEVICE)
    target = torch.randint(11, (2, 3), device=DEVICE)
    loss, lse, entropy = fastattn.linear_cross_entropy(
        x, w, target, reduction="none", return_lse=True, return_entropy=True
    )
    assert loss.shape == lse.shape == entropy.shape == (2, 3)
    alone = fastattn.linear_cross_entropy(x[1, 2], w, target[1, 2], reduction="none")
    assert alone.shape == ()
    torch.testing.assert_close(alone, loss[1, 2])
    torch.testing.assert_close(lse, torch.logsumexp(x @ w.t(), -1))
    torch.testing.assert_close(-loss, F.log_softmax(x @ w.t(), -1).gather(-1, target[..., None])[..., 0])


@pytest.mark.parametrize("probabilities", [False, True])
def test_shift_predicts_the_next_token(probabilities: bool) -> None:
    x, w = torch.randn(2, 5, 8, device=DEVICE), torch.randn(11, 8, device=DEVICE)
    target = torch.randint(11, (2, 5), device=DEVICE)
    target = F.one_hot(target, 11).float() if probabilities else target
    shifted = fastattn.linear_cross_entropy(x, w, target, shift=True, reduction="none")
    assert torch.equal(shifted, fastattn.linear_cross_entropy(x[:, :-1], w, target[:, 1:], reduction="none"))
    for length in (0, 1):
        empty = fastattn.linear_cross_entropy(x[:, :length], w, target[:, :length], shift=True, reduction="none")
        assert empty.shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_class_indices_of_any_integer_dtype(dtype: torch.dtype) -> None:
    x, w = torch.randn(5, 8, device=DEVICE), torch.randn(11, 8, device=DEVICE)
    target = torch.randint(11, (5,), device=DEVICE)
    expected = fastattn.linear_cross_entropy(x, w, target)
    assert torch.equal(fastattn.linear_cross_entropy(x, w, target.to(dtype)), expected)


# What is kept, and what is left out.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", [False, True])
def test_beside_gradients_memory_is_a_small_part_of_the_logits(reduction: str, frozen: bool) -> None:
    problem = Problem(tokens=512, width=64, classes=20_000, bias=False, weighted=False, reduction=reduction)
    x, w, _ = problem.inputs()
    x, w = x.requires_grad_(), w.requires_grad_(not frozen)

    def call() -> None:
        x.grad = w.grad = None
        problem.ours(x, w).mean().backward()

    gradients = x.nbytes + (0 if frozen else w.nbytes)
    logits = 4 * problem.tokens * problem.classes
    assert peak_memory(call, torch.device(DEVICE)) < gradients + logits / (5 if frozen else 10)


def test_the_gradients_are_computed_once_and_handed_over() -> None:
    problem, inputs = small(reduction="mean")
    with mock.patch.object(portable, "backward", wraps=portable.backward) as backward:
        problem.ours(*inputs).backward()
        problem.ours(*inputs).mul(3.0).backward()
    assert not backward.called
    expected = torch.autograd.grad(problem.eager(*inputs), inputs)
    for leaf, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_a_graph_can_be_used_again_with_retain_graph(factor: float, reduction: str) -> None:
    problem, inputs = small(reduction=reduction)
    loss = problem.ours(*inputs).sum() * factor
    expected = torch.autograd.grad(problem.eager(*inputs).sum() * factor, inputs)
    for times in (1, 2, 3):
        loss.backward(retain_graph=times < 3)
        for leaf, gradient in zip(inputs, expected, strict=True):
            torch.testing.assert_close(leaf.grad, times * gradient)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@OURS
@pytest.mark.parametrize("returns", [False, True])
def test_frozen_inputs_cost_no_product_and_get_no_gradient(returns: bool, backend: str) -> None:
    problem, inputs = small(returns=returns)
    leaves = inputs
    expected = run(functools.partial(problem.ours, backend=backend), inputs)[-3:]
    one = 2 * 5 * 6 * 9
    for i in range(3):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(leaves)]
        with FlopCounterMode(display=False) as counter:
            results = problem.ours(*alone, backend=backend)
            results = results if returns else (results,)
            torch.manual_seed(2)
            (gradient,) = torch.autograd.grad(
                results, alone[i], [torch.rand(r.shape).to(r) + 0.5 for r in results]
            )
        torch.testing.assert_close(gradient, expected[i])
        assert counter.get_total_flops() == one * (1 if i == 2 else 2)


@OURS
def test_the_same_inputs_give_the_same_bits(backend: str) -> None:
    problem = Problem(returns=True, smoothing=0.1)
    inputs = problem.inputs()
    once, again = (run(functools.partial(problem.ours, backend=backend), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_filter_changes_gradients_by_no_more_than_it_says_and_no_loss(reduction: str) -> None:
    problem, inputs = small(classes=512, tokens=40, reduction=reduction, scale=4.0, weighted=False)
    eps = 2**-12
    with mock.patch.object(portable, "TILE_ON_CPU", 1):
        exact = run(functools.partial(problem.ours, backend="portable"), inputs)
        near = run(functools.partial(problem.ours, backend="portable", filter=eps), inputs)
        nearly = run(functools.partial(problem.ours, backend="portable", filter=1e-30), inputs)
        nothing = run(functools.partial(problem.ours, backend="portable", filter=2.0), inputs)
    assert torch.equal(exact[0], near[0])
    for a, b in zip(exact, nearly, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    # The gradient of the bias is the sum over tokens of the logits' gradients.
    assert (exact[3] - near[3]).abs().max() <= 1.5 * eps * (1 if reduction == "mean" else problem.tokens)
    # A filter above 1 leaves nothing but the targets.
    target, _ = problem.beside()
    assert (nothing[3] <= 0).all() and nothing[3].count_nonzero() == target[target >= 0].unique().numel()


# Tiles of the kernels in the interpreter, and those in whose classes the probability and the target of tokens lie.
TOKENS, CLASSES, GROUPS, USED = 32, 64, 5, [0, 4]


def grouped(dtype: torch.dtype, **options: Any) -> tuple[Any, list[Tensor]]:
    """A loss by the kernels, and its inputs: of tokens in groups, each with its own classes."""
    torch.manual_seed(0)
    x, w = (torch.randn(size, 24, device=DEVICE) for size in (len(USED) * TOKENS, GROUPS * CLASSES))
    groups = torch.tensor(USED, device=DEVICE).repeat_interleave(TOKENS)
    eye = torch.eye(GROUPS, device=DEVICE)
    x[:, :GROUPS], w[:, :GROUPS], w[:, GROUPS:] = (
        12 * eye[groups],
        eye.repeat_interleave(CLASSES, 0),
        0.3 * w[:, 5:],
    )
    target = CLASSES * groups + torch.randint(CLASSES, groups.shape, device=DEVICE)
    target[1::4] = -100

    def loss(x: Tensor, w: Tensor, b: Tensor, filter: float | None = None) -> Any:
        return fastattn.linear_cross_entropy(
            x, w, target, linear_bias=b, reduction="sum", backend="triton", filter=filter, **options
        )

    return loss, [t.to(dtype) for t in (x, w, torch.zeros(len(w), device=DEVICE))]


FILTERED: dict[str, dict[str, Any]] = {"plain": {}, "entropy and cap": {"return_entropy": True, "softcap": 20.0}}


@pytest.mark.parametrize(
    ("options", "dtype"), [("plain", torch.float16), ("entropy and cap", torch.float32)], ids=str
)
def test_the_kernels_leave_out_tiles_below_the_filter(options: str, dtype: torch.dtype, monkeypatch) -> None:
    loss, inputs = grouped(dtype, **FILTERED[options])
    monkeypatch.setattr(kernels, "CHUNK", 1)  # 256 classes at a time
    flags: list[Tensor] = []
    own = kernels.kept_product
    monkeypatch.setattr(kernels, "kept_product", lambda *a, **k: (flags.append(a[2]), own(*a, **k))[1])
    exact = run(loss, inputs)
    assert not flags
    near = run(functools.partial(loss, filter=1e-3), inputs)
    if not ON_GPU:
        expected = torch.eye(GROUPS, dtype=torch.int32)[USED]
        assert torch.equal(torch.cat(flags[::2], 1), expected) and torch.equal(
            torch.cat(flags[1::2]), expected.t()
        )
    results = len(exact) - 3
    assert all(torch.equal(a, e) for a, e in zip(exact[:results], near[:results], strict=True))
    # Of a token, the probabilities that are left out sum to less than 0.003.
    most, rounding = 0.003 * (2 if options == "plain" else 20), 4 * torch.finfo(dtype).eps
    for a, e in zip(near[results:], exact[results:], strict=True):
        assert (a - e).abs().max() <= most + rounding * e.abs().max()


def test_a_filter_above_1_keeps_the_tiles_of_targets_and_a_nan() -> None:
    loss, inputs = grouped(torch.float32)
    call = functools.partial(loss, filter=2.0)
    found = run(call, inputs)[2].abs().sum(1).view(GROUPS, CLASSES).count_nonzero(1)
    assert (found[USED] == CLASSES).all() and (ON_GPU or found.count_nonzero() == len(USED))
    inputs[0][3, 0] = float("nan")
    assert run(call, inputs)[2].isnan().any(1).all()


# The operators.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"returns": True, "smoothing": 0.2},
        {"target": "probabilities"},
        {"reduction": "none", "softcap": 2.0, "z_loss": 0.1},
    ],
    ids=str,
)
def test_gradcheck_and_gradgradcheck(options: dict) -> None:
    problem, inputs = small(torch.float64, **options)
    function = functools.partial(problem.ours, backend="portable")
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("chunk", [1, 64])
def test_second_derivatives_and_forward_mode_some_tokens_at_a_time_equal_eager_s(chunk: int) -> None:
    problem, inputs = small(torch.float64, returns=True, softcap=2.0)

    def second(call):
        first = torch.autograd.grad([r.sum() for r in call(*inputs)], inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    def tangent(call):
        primals = tuple(t.detach() for t in inputs)
        return torch.func.jvp(call, primals, tuple(t.cos() for t in primals))[1]

    slices = [slice(i, i + chunk) for i in range(0, 5, chunk)]
    with mock.patch.object(operators, "_chunks", lambda x, w: slices):
        for of in (second, tangent):
            for ours, theirs in zip(of(problem.ours), of(problem.eager), strict=True):
                torch.testing.assert_close(ours, theirs)


@OURS
@pytest.mark.parametrize("returns", [False, True])
def test_opcheck(returns: bool, backend: str) -> None:
    problem, inputs = small(returns=returns)
    target, weight = problem.beside()
    spec = LossSpec(smoothing=0.1, classes=9, entropy=returns)
    tensors = (*inputs, target, weight)
    library.opcheck(torch.ops.fastattn.loss_rows.default, (*tensors, *spec.options, backend))
    constant = [t.detach() for t in inputs]
    rows = torch.ops.fastattn.loss_rows(*constant, target, weight, *spec.options, backend)
    for wanted in ([True] * 3, [False, True, False]):
        arguments = (torch.randn_like(rows), *tensors, rows, wanted, *spec.options, backend)
        library.opcheck(torch.ops.fastattn.loss_rows_backward.default, arguments)
    if not returns:
        coefficients = torch.rand(3, 5, device=DEVICE)
        # AOT autograd cannot mark some of an operator's results as constant: its own gradients are.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        arguments = (*tensors, coefficients, [True] * 3, *spec.options, backend)
        library.opcheck(torch.ops.fastattn.loss_reduced.default, arguments, test_utils=tests)


@OURS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_func_grad_and_vmap_equal_autograd(reduction: str, backend: str) -> None:
    problem, (x, w, b) = small(reduction=reduction)
    problem.beside()  # makes random numbers, which vmap does not allow
    x, w, b = x.detach(), w.detach(), b.detach()
    xs = torch.stack([x, -x, 2 * x], 1)

    def loss(x, w, b):
        return problem.ours(x, w, b, backend=backend).sum()

    gradients = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (1, None, None))(xs, w, b)
    for i in range(3):
        leaves = [t.clone().requires_grad_() for t in (xs[:, i], w, b)]
        for ours, theirs in zip(gradients, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(ours[i], theirs)
    values = torch.func.vmap(loss, (1, None, None))(xs, w, b)
    torch.testing.assert_close(values, torch.stack([loss(xs[:, i], w, b) for i in range(3)]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_transform_that_asks_for_a_gradient_of_the_target_is_refused(reduction: str) -> None:
    x, w = torch.randn(5, 6, device=DEVICE), torch.randn(9, 6, device=DEVICE)
    target = torch.rand(5, 9, device=DEVICE).softmax(1)

    def loss(target):
        return fastattn.linear_cross_entropy(x, w, target, reduction=reduction).sum()

    with pytest.raises(ValueError, match="target must not require a gradient"):
        torch.func.grad(loss)(target)
    with pytest.raises(ValueError, match="the loss has no gradient of target"):
        torch.func.jvp(loss, (target,), (target,))


@pytest.mark.parametrize(("backend", "dynamic"), [("triton", False), ("portable", True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break_and_gives_the_same(reduction: str, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    problem = Problem(reduction=reduction, smoothing=0.1, z_loss=0.1)

    def function(x, w, b, target):
        options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1, "backend": backend}
        return fastattn.linear_cross_entropy(x * 2, w, target, linear_bias=b, **options) * 3

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (12, 33):
        x, w, b = problem.inputs()
        target = problem.beside()[0][:tokens]
        for ours, expected in zip(
            run(lambda *t, target=target: compiled(*t, target), [x[:tokens], w, b]),
            run(lambda *t, target=target: function(*t, target), [x[:tokens], w, b]),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs_own(reduction: str) -> None:
    problem, inputs = small(reduction=reduction)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = problem.ours(*inputs)
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss.sum(), inputs))
    assert torch.equal(loss, problem.ours(*(t.detach().bfloat16() for t in inputs)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing_recomputes_and_gives_the_same(reduction: str) -> None:
    problem, inputs = small(reduction=reduction)
    expected = torch.autograd.grad(problem.ours(*inputs).sum(), inputs)
    names = ("loss_rows", "loss_reduced")
    saved = [getattr(torch.ops.fastattn, name).default for name in names]

    def policy(ctx, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operator in saved else CheckpointPolicy.PREFER_RECOMPUTE

    for options in ({}, {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}):
        loss = checkpoint(problem.ours, *inputs, use_reentrant=False, **options).sum()
        for ours, theirs in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_gradients_of_half_precision_do_not_vanish_before_a_gradient_scaler_multiplies_them() -> None:
    problem, inputs = small(torch.float16, tokens=64, weighted=False)
    scale = 2.0**16
    ours = torch.autograd.grad(problem.ours(*inputs) * 2**-14 * scale, inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    for a, e in zip(ours, torch.autograd.grad(problem.eager(*exact) * 2**-14 * scale, exact), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=5e-3, atol=5e-3)


def test_a_loss_in_float32_for_inputs_in_half_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        problem, inputs = small(dtype, returns=True)
        assert {t.dtype for t in problem.ours(*inputs)} == {torch.float32}


# The module.


@pytest.mark.parametrize("bias", [False, True])
def test_the_module_has_torch_s_state_dict_and_results(bias: bool) -> None:
    options = {"bias": bias, "label_smoothing": 0.1, "weight": torch.rand(11), "reduction": "sum"}
    ours = fastattn.nn.LinearCrossEntropyLoss(8, 11, **options)
    x, target = torch.randn(5, 8), torch.randint(11, (5,))
    expected = F.cross_entropy(ours.linear(x), target, ours.weight, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(ours(x, target), expected)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(8, 11, **options)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(theirs(x, target), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_hook_on_the_module_s_linear_layer_is_obeyed(reduction: str) -> None:
    ours = fastattn.nn.LinearCrossEntropyLoss(8, 11, softcap=2.0, z_loss=0.1, shift=True, reduction=reduction)
    x, target = torch.randn(2, 5, 8), torch.randint(11, (2, 5))
    plain = ours(x, target)
    handle = ours.linear.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(ours(x, target), plain)
    handle.remove()
    ours.linear.register_forward_hook(lambda module, args, result: result * 2)
    expected = fastattn.linear_cross_entropy(
        x, ours.linear.weight * 2, target, softcap=2.0, z_loss=0.1, shift=True, reduction=reduction
    )
    torch.testing.assert_close(ours(x, target), expected)


# Bad input.

X, W, T = torch.zeros(3, 8), torch.zeros(5, 8), torch.tensor([0, 4, 2])


def call(*, input=X, linear_weight=W, target=T, **options) -> Any:
    return fastattn.linear_cross_entropy(input, linear_weight, target, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a torch.Tensor, got list"),
        ({"input": X.long()}, TypeError, "input must be float16, .* got torch.int64"),
        ({"linear_weight": W.t()}, ValueError, r"linear_weight must have shape \(classes, 8\), got \(8, 5\)"),
        ({"linear_weight": W[:, None]}, ValueError, r"linear_weight must have .* losses of K dimensions"),
        ({"linear_weight": W.double()}, TypeError, "linear_weight must have input's dtype torch.float32, got"),
        ({"linear_weight": W[:0]}, ValueError, r"linear_weight must have at least one row \(a class\), got 0"),
        ({"linear_bias": X[0]}, ValueError, r"linear_bias must have shape \(5,\), got \(8,\)"),
        ({"target": T[:2]}, ValueError, r"target must have shape \(3,\), got \(2,\)"),
        ({"target": X}, ValueError, r"target must have shape \(3, 5\), got \(3, 8\)"),
        ({"target": T.bool()}, TypeError, "target must hold class indices .* got torch.bool"),
        (
            {"target": T + 1},
            ValueError,
            r"target must be a class from 0 to 4, or ignore_index \(-100\); got 5 at position 1",
        ),
        ({"target": T - 1}, ValueError, "got -1 at position 0"),
        ({"target": torch.rand(3, 5).requires_grad_()}, ValueError, "target must not require a gradient"),
        (
            {"target": torch.rand(3, 5), "ignore_index": 3},
            ValueError,
            "ignore_index needs a target of class indices",
        ),
        ({"weight": X[0]}, ValueError, r"weight must have shape \(5,\), got \(8,\)"),
        ({"weight": torch.ones(5).requires_grad_()}, ValueError, "weight must not require a gradient"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be between 0 and 1, got -0.1"),
        ({"reduction": "median"}, ValueError, "reduction must be one of mean, sum, none, got 'median'"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number, got 0.0"),
        ({"softcap": -1.0}, ValueError, "softcap must be a positive number or None, got -1.0"),
        ({"filter": 0}, ValueError, "filter must be a positive number or None, got 0.0"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0 and finite, got -1.0"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got float"),
        ({"shift": True}, ValueError, r"target must have shape \(2,\)|shift needs"),
        ({"return_lse": 1}, TypeError, "return_lse must be a bool, got int"),
        ({"backend": "fast"}, ValueError, "backend must be one of .*, got 'fast'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    if "shift" in arguments:
        arguments = {**arguments, "target": T[:2]}
    with pytest.raises(error, match=message):
        call(**arguments)


def test_a_class_that_does_not_exist_is_named_with_its_position_also_by_the_operator() -> None:
    target = torch.tensor([[0, 1], [2, 7]])
    with pytest.raises(ValueError, match=r"got 7 at position \(1, 1\)"):
        fastattn.linear_cross_entropy(torch.zeros(2, 2, 8), W, target)
    with pytest.raises(ValueError, match="got 7 at position 3"):
        torch.ops.fastattn.loss_rows(
            torch.zeros(4, 8), W, None, target.flatten(), None, *LossSpec(classes=5).options, None
        )


@pytest.mark.parametrize("returns", [False, True])
def test_where_nobody_reads_the_target_a_class_that_does_not_exist_gives_nan(returns: bool) -> None:
    """As on a GPU. Neither another token's loss nor its gradient changes."""
    problem, (x, w, b) = small(reduction="none", returns=returns, weighted=False)
    target = torch.tensor([0, 9, -1, -100, 8], device=DEVICE)
    with (
        mock.patch.object(Problem, "beside", lambda self: (target, None)),
        mock.patch("fastattn.core.loss.functional.check_classes"),
        mock.patch.object(operators, "check_classes"),
    ):
        loss = problem.ours(x, w, b)
    loss = loss[0] if returns else loss
    assert loss.isnan().tolist() == [False, True, True, False, False]


def test_rows_of_the_definition_are_what_the_portable_backend_computes() -> None:
    problem, (x, w, b) = small(torch.float64, tokens=7)
    tensors = LossTensors(x.detach(), w.detach(), b.detach(), *problem.beside())
    spec = LossSpec(smoothing=0.1, classes=9, entropy=True)
    torch.testing.assert_close(portable.forward(tensors, spec), definition.rows(tensors, spec))
