"""Norms over the last dimension: one pass each way, with the residual's sum, and operators like any other."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from comparing import check_or_refusal, doubled, run
from hardware import DEVICE, ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import TINY, assert_as_exact_as_eager
from torch import Tensor, library, nn
from torch_samples import assert_same, leaves, module_samples

import fastattn
from fastattn.core import capabilities
from fastattn.core.norm import portable as norm_portable
from fastattn.kernels import launch
from fastattn.kernels import norm as kernels

BACKENDS = ("triton", "portable", "reference")
NORM = pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])


@dataclass(frozen=True)
class Problem:
    """One call. layout: how x and the residual lie in memory, "contiguous", "strided" (every other row and column
    of a larger tensor), "transposed" (columns far apart) or "expanded" (one row for all). upstream: how the
    gradients do, "contiguous", "transposed" or "expanded" (zero strides). beside: the dtype of weight and bias,
    None for x's.
    """

    shape: tuple[int, ...] = (2, 7)
    width: int = 40
    centred: bool = False
    weight: bool = False
    bias: bool = False
    offset: float = 0.0
    residual: bool = False
    eps: float = 1e-5
    mean: float = 0.0
    dtype: torch.dtype = torch.float32
    beside: torch.dtype | None = None
    layout: str = "contiguous"
    upstream: str = "contiguous"

    def rows(self) -> Tensor:
        size = (*self.shape, self.width)
        if self.layout == "strided":
            larger = torch.randn(*self.shape[:-1], 2 * self.shape[-1], 2 * self.width, device=DEVICE)
            rows = larger[..., ::2, ::2]
        elif self.layout == "transposed":
            rows = torch.randn(size, device=DEVICE).transpose(0, -1).contiguous().transpose(0, -1)
        elif self.layout == "expanded":
            rows = torch.randn(self.width, device=DEVICE).expand(size)
        else:
            rows = torch.randn(size, device=DEVICE)
        return (rows + self.mean).to(self.dtype) if self.layout != "expanded" else rows.to(self.dtype)

    def inputs(self) -> list[Tensor | None]:
        """x, residual, weight, bias."""
        beside = (
            torch.randn(self.width, device=DEVICE).to(self.beside or self.dtype) if there else None
            for there in (self.weight, self.bias)
        )
        return [self.rows(), self.rows() if self.residual else None, *beside]

    def upstreams(self) -> list[Tensor]:
        """Gradients of y and, with a residual, of the sum."""
        size, found = (*self.shape, self.width), []
        for _ in range(1 + self.residual):
            dy = torch.randn(size, device=DEVICE).to(self.dtype)
            if self.upstream == "transposed":
                dy = dy.transpose(0, -1).contiguous().transpose(0, -1)
            found.append(dy.flatten()[:1].expand(size) if self.upstream == "expanded" and dy.numel() else dy)
        return found

    def ours(self, x, residual=None, weight=None, bias=None, backend=None):
        asked = {"eps": self.eps, "residual": residual, "backend": backend}
        if self.centred:
            results = fastattn.layer_norm(x, weight, bias, **asked)
        else:
            results = fastattn.rms_norm(x, weight, weight_offset=self.offset, **asked)
        return results if self.residual else (results,)

    def definition(self, x, residual=None, weight=None, bias=None):
        """In fp32 at least, rounded once; of the sum as it was rounded."""
        total = x if residual is None else x + residual
        y = total.to(torch.promote_types(x.dtype, torch.float32))
        if self.centred:
            y = y - y.mean(-1, keepdim=True)
        y = y / (y.square().mean(-1, keepdim=True) + self.eps).sqrt()
        y = y if weight is None else y * (weight.to(y.dtype) + self.offset)
        y = (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)
        return (y,) if residual is None else (y, total)

    def roundings(self, inputs: list[Tensor | None], upstreams: list[Tensor]) -> list[float]:
        """For each result and gradient a few fp32 roundings of its largest terms: these may cancel."""
        x, _, weight, _ = inputs
        if x.numel() == 0:
            return [0.0] * (1 + 2 * self.residual + 1 + self.weight + self.bias)
        spread = x - x.mean(-1, keepdim=True) if self.centred else x
        inverse = (spread.square().mean(-1) + self.eps).rsqrt()
        normalised = (x.abs().amax(-1) * inverse).max().item()
        by_weight = 1.0 if weight is None else (weight + self.offset).abs().max().item()
        dy, rows = upstreams[0].abs().max().item(), x.numel() / self.width
        of_y, of_x = normalised * by_weight, inverse.max().item() * dy * by_weight * max(1.0, normalised)
        beside = [dy * normalised * rows**0.5] * self.weight + [dy * rows**0.5] * self.bias
        terms = [of_y, *[1.0] * self.residual, of_x, *[of_x] * self.residual, *beside]
        return [4 * torch.finfo(torch.float32).eps * term for term in terms]


def check(problem: Problem, backend: str | None) -> None:
    """Ours against float64, by the error of the eager computation in the same dtype."""
    torch.manual_seed(0)
    inputs, upstreams = problem.inputs(), problem.upstreams()
    exact_inputs = doubled(inputs)
    if problem.residual and problem.dtype != torch.float64:
        # The sum is rounded before it is normalised: the oracle starts from the rounded sum, too.
        exact_inputs[0], exact_inputs[1] = (inputs[0] + inputs[1]).double(), torch.zeros_like(exact_inputs[1])
    exact = run(problem.definition, exact_inputs, doubled(upstreams))
    eager = run(problem.definition, inputs, upstreams)
    actual = run(functools.partial(problem.ours, backend=backend), inputs, upstreams)
    allowed = problem.roundings(exact_inputs, upstreams)
    for i, (a, x, e, tiny) in enumerate(zip(actual, exact, eager, allowed, strict=True)):
        assert_as_exact_as_eager(a, x, e, gradient=i > problem.residual, tiny=TINY + tiny)


EVERYTHING = {"weight": True, "residual": True, "mean": 1.0}
LAYER = {**EVERYTHING, "centred": True, "bias": True}

# Exactness: a sample for every row of the capability table.
SAMPLES = {
    "RMS norm": Problem(**EVERYTHING),
    "layer norm": Problem(**LAYER),
    "weight and bias, or none, with gradient": Problem(centred=True, bias=True),
    "weight kept less one": Problem(weight=True, offset=1.0),
    "residual added in the same pass, with gradient": Problem(residual=True),
    "any widths": Problem(**LAYER, shape=(3,), width=1030),
    "float16": Problem(**LAYER, dtype=torch.float16),
    "bfloat16": Problem(**LAYER, dtype=torch.bfloat16),
    "float32": Problem(**LAYER),
    "float64": Problem(**LAYER, dtype=torch.float64),
}
ROWS = [f.name for f in capabilities.FEATURES if f.family == "norm"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", ROWS)
def test_every_feature_of_the_table_is_exact(feature: str, backend: str) -> None:
    problem = SAMPLES[feature]
    check_or_refusal(check, problem, backend, "float64" if problem.dtype == torch.float64 else None)


@settings(max_examples=60)
@given(
    st.builds(
        Problem,
        shape=st.sampled_from([(1,), (13,), (2, 3), (2, 1, 5), (0, 3)]),
        width=st.integers(1, 100),
        centred=st.booleans(),
        weight=st.booleans(),
        bias=st.booleans(),
        offset=st.sampled_from([0.0, 1.0]),
        residual=st.booleans(),
        eps=st.sampled_from([1e-6, 1e-2]),
        mean=st.sampled_from([0.0, 3.0]),
        dtype=st.sampled_from([torch.float16, torch.float32]),
        beside=st.sampled_from([None, torch.float16, torch.float32]),
        layout=st.sampled_from(["contiguous", "strided", "transposed", "expanded"]),
        upstream=st.sampled_from(["contiguous", "transposed", "expanded"]),
    ).map(lambda p: dataclasses.replace(p, bias=p.bias and p.centred, offset=0.0 if p.centred else p.offset)),
    st.sampled_from(["triton", "portable", None]),
)
def test_any_widths_strides_and_options(problem: Problem, backend: str | None) -> None:
    check(problem, backend)


@pytest.mark.gpu
@NORM
@pytest.mark.parametrize("width", [row.width for row in launch.NORM_BACKWARD["sm_80"][:-1]] + [111, 1536, 40000])
def test_bfloat16_on_the_device_in_every_row_of_the_table(width: int, centred: bool) -> None:
    check(Problem(shape=(1000,), width=width, **{**LAYER, "centred": centred, "bias": centred},
                  dtype=torch.bfloat16), "triton")  # fmt: skip


@NORM
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_give_the_bias_and_finite_gradients(centred: bool, backend: str) -> None:
    bias = torch.randn(5, device=DEVICE) if centred else None
    x, weight = torch.zeros(3, 5, device=DEVICE), torch.ones(5, device=DEVICE)
    y, *gradients = run(Problem(centred=centred).ours, [x, None, weight, bias], [torch.ones_like(x)])
    assert torch.equal(y, x if bias is None else bias.expand(3, 5))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_far_from_zero_cancels_no_variance(backend: str) -> None:
    """1e4 against a deviation of 1: the mean of squares less the square of the mean would have no digits left."""
    for width in (30, 500):
        x = (1e4 + torch.randn(4, width, device=DEVICE)).requires_grad_()
        y = fastattn.layer_norm(x, eps=1e-6, backend=backend)
        exact = F.layer_norm(x.double(), (width,), eps=1e-6)
        assert (y - exact).abs().max() < 4e-3  # a few roundings of the mean itself, 1e4 * 2**-23


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_sum_is_the_rounded_one_and_is_what_is_normalised(dtype: torch.dtype, backend: str) -> None:
    x, residual = (torch.randn(5, 70, device=DEVICE).to(dtype) for _ in range(2))
    y, total = fastattn.rms_norm(x, residual=residual, eps=1e-6, backend=backend)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, fastattn.rms_norm(x + residual, eps=1e-6, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_either_result_alone_has_its_gradient(backend: str) -> None:
    x, residual = (torch.randn(5, 70, device=DEVICE, requires_grad=True) for _ in range(2))
    y, total = fastattn.layer_norm(x, residual=residual, backend=backend)
    dy = torch.randn_like(y)
    past = torch.autograd.grad(total, (x, residual), dy, retain_graph=True)
    assert all(torch.equal(g, dy) for g in past)
    through = torch.autograd.grad(y, (x, residual), dy)
    expected = torch.autograd.grad(F.layer_norm(x + residual, (70,)), x, dy)[0]
    for g in through:
        torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-5)


@NORM
def test_the_same_inputs_give_the_same_bits(centred: bool) -> None:
    problem = Problem(shape=(21,), **{**LAYER, "centred": centred, "bias": centred})
    inputs, upstreams = problem.inputs(), problem.upstreams()
    call = functools.partial(problem.ours, backend="triton")
    once, again = (run(call, inputs, upstreams) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@NORM
@pytest.mark.parametrize("residual", [False, True])
def test_the_backward_keeps_what_was_normalised_and_numbers_a_row(centred: bool, residual: bool) -> None:
    problem = Problem(shape=(90,), centred=centred, weight=True, residual=residual)
    x, added, weight, _ = (None if t is None else t.requires_grad_() for t in problem.inputs())
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        results = problem.ours(x, added, weight, backend="triton")
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.numel()}
    rows = results[-1] if residual else x
    assert kept.pop(rows.untyped_storage().data_ptr()) and kept.pop(weight.data_ptr())
    assert sorted(kept.values()) == [90 * 4] * (1 + centred)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_needs_no_gradient_gets_none(backend: str) -> None:
    x, weight, bias = torch.randn(6, 50, device=DEVICE), torch.randn(50, device=DEVICE), torch.randn(50)
    bias = bias.to(DEVICE)
    for chosen in ((x,), (weight,), (bias,), (x, bias)):
        for t in (x, weight, bias):
            t.requires_grad_(any(t is c for c in chosen))
        y = fastattn.layer_norm(x, weight, bias, backend=backend)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, chosen, dy)
        expected = torch.autograd.grad(F.layer_norm(x, (50,), weight, bias), chosen, dy)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_pass_32_bits_within_themselves_are_copied() -> None:
    far = torch.empty_strided((1, 4, 2**16), (0, 1, 2**15 + 1), device="meta")
    assert kernels.rows_of(far).column == 1


def test_programs_that_share_the_rows_are_the_same_on_every_gpu_of_a_family() -> None:
    for tile in (row.tiling for row in launch.NORM_BACKWARD["sm_80"]):
        assert launch.norm_programs("sm_90", tile) * tile.block_m * tile.block_n == 132 * 8192


# What torch computes.


@pytest.mark.skipif(ON_GPU, reason="about the CPU")
@NORM
def test_where_nothing_is_gained_torchs_own_function_computes(
    centred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(centred=centred, weight=True)
    x, _, weight, _ = problem.inputs()
    called: list[int] = []
    own = norm_portable.forward
    monkeypatch.setattr(norm_portable, "forward", lambda *given: called.append(1) or own(*given))
    theirs = (F.layer_norm if centred else F.rms_norm)(x, (40,), weight, eps=1e-5)
    assert torch.equal(problem.ours(x, None, weight)[0], theirs) and not called
    # An operator of ours serves where it is asked for, where torch has none, and for large RMS norms.
    problem.ours(x, None, weight, backend="portable")
    fastattn.rms_norm(x, residual=x)
    fastattn.rms_norm(x.half())
    x = torch.zeros(2**19 // 40 + 1, 40)
    problem.ours(x, None, weight)
    assert len(called) == 3 + (not centred)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_the_epsilon_that_is_not_given_is_torchs(dtype: torch.dtype) -> None:
    x = torch.randn(3, 8, device=DEVICE).to(dtype) * (1e-8 if dtype == torch.float64 else 3e-4)
    expected = F.rms_norm(x, (8,))
    for y in (fastattn.rms_norm(x, backend="portable"), fastattn.nn.RMSNorm(8, backend="portable").to(x)(x)):
        torch.testing.assert_close(y, expected)


MODULES = {nn.LayerNorm: fastattn.nn.LayerNorm, nn.RMSNorm: fastattn.nn.RMSNorm}


@pytest.mark.parametrize("backend", [None, "portable"])
@pytest.mark.parametrize("cls", MODULES)
def test_torchs_samples_give_torchs_parameters_results_and_gradients(cls, backend) -> None:
    samples = module_samples(cls, training=True)
    assert len(samples) >= 5
    for sample in samples:
        constructed, forward = sample.constructor_input, sample.forward_input
        ours, theirs = (c(*constructed.args, **constructed.kwargs).double() for c in (MODULES[cls], cls))
        ours.backend = backend
        assert isinstance(ours, cls) and list(ours.state_dict()) == list(theirs.state_dict())
        with torch.no_grad():
            for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
                ours_p.copy_(theirs_p.normal_())
        inputs = leaves(*forward.args)
        assert_same(
            ours(*forward.args), theirs(*forward.args), [*inputs, *ours.parameters()],
            [*inputs, *theirs.parameters()],
        )  # fmt: skip


def test_modules_copy_and_pickle_and_leave_to_torch_what_is_torchs() -> None:
    for norm in (fastattn.nn.LayerNorm((3, 4), bias=False), fastattn.nn.RMSNorm((3, 4), backend="reference")):
        x = torch.randn(2, 3, 4)
        for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert twin.backend == norm.backend and torch.equal(twin(x), norm(x))
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm(x[..., :3])
    zero = fastattn.nn.LayerNorm(4, eps=0.0, backend="triton")
    assert torch.equal(zero(x), nn.LayerNorm(4, eps=0.0)(x))
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    assert fastattn.nn.LayerNorm(4)(nested).is_nested


# The operators.


@NORM
@pytest.mark.parametrize("residual", [False, True])
def test_derivatives_of_first_and_second_order_and_forward_mode(centred: bool, residual: bool) -> None:
    problem = Problem(
        shape=(4,), width=5, centred=centred, weight=True, bias=centred, offset=0.0 if centred else 1.0,
        residual=residual, dtype=torch.float64, mean=1.0,
    )  # fmt: skip
    inputs = [t.requires_grad_() for t in problem.inputs() if t is not None]

    def function(x, *rest):
        left = list(rest)
        added = left.pop(0) if residual else None
        return problem.ours(x, added, *left, backend="portable")

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_opcheck(backend: str) -> None:
    x, added = (torch.randn(2, 3, 40, device=DEVICE, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(2, 40, device=DEVICE, requires_grad=True) for _ in range(2))
    for centred, beside in ((False, (None,) * 3), (True, (added, weight, bias))):
        options = (centred, 1e-6, 0.0, backend)
        library.opcheck(torch.ops.fastattn.norm_forward.default, (x, *beside, *options))
        _, total, *moments = (t.detach() for t in torch.ops.fastattn.norm_forward(x, *beside, *options))
        given = (torch.randn_like(x), added, total if centred else x.detach(), beside[1], *moments)
        wanted = (beside[1] is not None, beside[2] is not None)
        library.opcheck(torch.ops.fastattn.norm_backward.default, (*given, *wanted, *options))


@pytest.mark.parametrize("backend", BACKENDS)
@NORM
def test_func_grad_vmap_and_their_compositions_equal_autograd(centred: bool, backend: str) -> None:
    problem = Problem(shape=(3,), width=9, centred=centred, weight=True, bias=centred, residual=True)
    given = [t for t in problem.inputs() if t is not None]

    def loss(*inputs):
        y, total = problem.ours(*inputs, backend=backend)
        return (y.sin() + total.square()).sum()

    def expected(*inputs):
        wanted = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(loss(*wanted), wanted)

    gradients = torch.func.grad(loss, argnums=tuple(range(len(given))))
    for mapped in range(len(given)):
        several = torch.stack([given[mapped], -given[mapped], 2 * given[mapped]], 1)
        dims = tuple(1 if i == mapped else None for i in range(len(given)))
        found = torch.func.vmap(gradients, dims)(*(several if i == mapped else t for i, t in enumerate(given)))
        for k in range(3):
            inputs = [several[:, k] if i == mapped else t for i, t in enumerate(given)]
            for ours, theirs in zip(found, expected(*inputs), strict=True):
                torch.testing.assert_close(ours[k], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backend", "dynamic"), [("triton", False), ("portable", True)])
def test_compiles_without_a_graph_break_and_gives_the_same(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    problem = Problem(**LAYER)

    def function(x, residual, weight, bias):
        y, total = fastattn.layer_norm(x * 2, weight, bias, residual=residual, backend=backend)
        return y + 1, total * 3

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 11):
        case = dataclasses.replace(problem, shape=(rows,))
        inputs, upstreams = case.inputs(), case.upstreams()
        ours, expected = (run(f, inputs, upstreams) for f in (compiled, function))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


# Bad input.

X, WEIGHT = torch.zeros(2, 8, device=DEVICE), torch.zeros(8, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastattn.rms_norm([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: fastattn.rms_norm(X.long()), TypeError, "x must be float16, .* got torch.int64"),
        (lambda: fastattn.rms_norm(X[0, 0]), ValueError, r"x must have at least one dimension, .* got \(\)"),
        (lambda: fastattn.layer_norm(X[:, :0]), ValueError, r"last dimension of at least 1, got \(2, 0\)"),
        (lambda: fastattn.rms_norm(X, X), ValueError, r"weight must have shape \(8,\), got \(2, 8\)"),
        (lambda: fastattn.rms_norm(X, WEIGHT.long()), TypeError, "weight must be float16, .* got torch.int64"),
        (lambda: fastattn.rms_norm(X, 1.0), TypeError, "weight must be a torch.Tensor, got float"),
        (lambda: fastattn.layer_norm(X, bias=WEIGHT[1:]), ValueError, r"bias must have shape \(8,\), got \(7,\)"),
        (lambda: fastattn.layer_norm(X, WEIGHT.to("meta")), ValueError, "weight must be on x's device .* meta"),
        (lambda: fastattn.layer_norm(X, residual=X[0]), ValueError, r"residual must have x's shape \(2, 8\)"),
        (lambda: fastattn.layer_norm(X, residual=X.half()), TypeError, "residual must have x's dtype .*float32"),
        (lambda: fastattn.rms_norm(X, eps="1e-6"), TypeError, "eps must be a number, got str"),
        (lambda: fastattn.layer_norm(X, eps=0.0), ValueError, "eps must be finite and at least 1.2e-38, got 0.0"),
        (lambda: fastattn.rms_norm(X, weight_offset=None), TypeError, "weight_offset must be a number, got None"),
        (lambda: fastattn.rms_norm(X, backend="cuda"), ValueError, "backend must be one of .* got 'cuda'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
