"""Heads on their way to attention: norm, rotation and scale in one pass, and an operator like any other."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import pytest
import torch
from comparing import check_or_refusal, exact_and_eager, run
from hardware import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import TINY, assert_as_exact_as_eager
from torch import Tensor, library

import fastattn
from fastattn.core import capabilities
from fastattn.kernels import heads as kernels
from fastattn.kernels import launch

BACKENDS = ("triton", "portable", "reference")
LAYOUT = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])


@dataclass(frozen=True)
class Problem:
    """One call. weight: None, "width" (D,) or "heads" (H, D); scale: None, "heads" (H,) or "batch" (B, H).

    offsets: a number, "batch" (B,) of which one is negative, or "rows": angles for every row. upstream: how dy
    lies in memory, "contiguous", "transposed" or "expanded" (zero strides).
    """

    batch: int = 2
    heads: int = 3
    length: int = 21
    width: int = 16
    turned: int = 16
    interleaved: bool = False
    norm: bool = False
    weight: str | None = None
    scale: str | None = None
    offsets: int | str = 0
    dtype: torch.dtype = torch.float32
    strided: bool = False
    upstream: str = "contiguous"

    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        shape = (self.batch, self.heads, self.length, self.width)
        x = torch.randn(shape, device=DEVICE)
        if self.strided:
            x = torch.randn(self.batch, self.length, 2, self.heads, 2 * self.width, device=DEVICE)
            x = x[:, :, 1, :, ::2].transpose(1, 2)
        weights = {None: None, "width": shape[3:], "heads": (self.heads, self.width)}
        scales = {None: None, "heads": (self.heads,), "batch": shape[:2]}
        beside = (
            None if size is None else torch.randn(size, device=DEVICE).to(self.dtype)
            for size in (weights[self.weight], scales[self.scale])
        )
        return x.to(self.dtype), *beside

    def dy(self) -> Tensor:
        shape = (self.batch, self.heads, self.length, self.width)
        if self.upstream == "expanded":
            return torch.ones((), dtype=self.dtype, device=DEVICE).expand(shape)
        dy = torch.randn(shape, device=DEVICE).to(self.dtype)
        return dy.transpose(1, 3).contiguous().transpose(1, 3) if self.upstream == "transposed" else dy

    @functools.cached_property
    def rotation(self) -> dict[str, object]:
        """The keywords of the rotation; its tables also scale, as those of some models do."""
        if not self.turned:
            return {}
        generator = torch.Generator().manual_seed(1)
        rows = (self.batch, self.length) if self.offsets == "rows" else (self.length + 9,)
        angles = 9 * torch.randn(*rows, self.turned // 2, generator=generator).to(DEVICE)
        offsets: object = 0 if self.offsets == "rows" else self.offsets
        if self.offsets == "batch":
            offsets = torch.tensor([9, -5, 4], device=DEVICE)[: self.batch]
        tables = {"cos": 1.2 * angles.cos(), "sin": 1.3 * angles.sin()}
        return {**tables, "interleaved": self.interleaved, "offsets": offsets}

    def ours(self, x, weight=None, scale=None, backend=None) -> Tensor:
        return fastattn.prepare_heads(
            x, norm_weight=weight, norm=self.norm, head_scale=scale, **self.rotation, backend=backend
        )

    def definition(self, x: Tensor, weight: Tensor | None, scale: Tensor | None) -> Tensor:
        """Written in another way than in the library: complex numbers, fp32 at least, one rounding."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.norm or weight is not None:
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        y = y if weight is None else y * weight.to(y.dtype).expand(self.heads, self.width)[:, None]
        y = self.rotated(y) if self.turned else y
        return (y if scale is None else y * scale.to(y.dtype)[..., None, None]).to(x.dtype)

    def rotated(self, y: Tensor) -> Tensor:
        asked = self.rotation
        starts = torch.as_tensor(asked["offsets"], device=DEVICE).expand(self.batch)
        rows = (starts[:, None] + torch.arange(self.length, device=DEVICE)).clamp(min=0)
        turned, rest = y[..., : self.turned], y[..., self.turned :]
        pairs = turned.unflatten(-1, (-1, 2) if self.interleaved else (2, -1))
        a, b = pairs.unbind(-1 if self.interleaved else -2)
        cos, sin = (
            (table if table.dim() == 3 else table[rows])[:, None].to(y) for table in (asked["cos"], asked["sin"])
        )
        product = torch.complex(a, b) * torch.complex(cos, sin)
        both = torch.stack((product.real, product.imag), -1 if self.interleaved else -2)
        return torch.cat((both.flatten(-2), rest), -1)


def check(problem: Problem, backend: str) -> None:
    """Ours against float64, by the error of the eager computation in the same dtype."""
    torch.manual_seed(0)
    inputs, dy = problem.inputs(), problem.dy()
    exact, eager = exact_and_eager(problem.definition, inputs, dy)
    actual = run(functools.partial(problem.ours, backend=backend), inputs, dy)
    for i, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        # Weights and scales sum over rows: each of the terms may have been rounded once.
        terms = (dy.double().abs() * exact[0].abs()).sum().item() / max(1, x.numel()) if i > 1 else 0.0
        assert_as_exact_as_eager(a, x, e, gradient=i > 0, tiny=TINY + torch.finfo(torch.float32).eps * terms)


EVERYTHING = {"weight": "heads", "scale": "batch", "offsets": "batch"}

# Exactness: a sample for every row of the capability table.
SAMPLES = {
    "RMS norm of heads, with gradient": Problem(weight="width", turned=0, width=11),
    "rotary, half and interleaved, partial, offsets": Problem(turned=10, offsets="batch"),
    "per-head scale, with gradient": Problem(scale="heads", turned=0),
    "head widths 1 to 512": Problem(width=512, turned=512, length=5, **EVERYTHING),
    "head widths above 512": Problem(width=520, turned=520, length=5, **EVERYTHING),
    "float16": Problem(dtype=torch.float16, **EVERYTHING),
    "bfloat16": Problem(dtype=torch.bfloat16, **EVERYTHING),
    "float32": Problem(**EVERYTHING),
    "float64": Problem(dtype=torch.float64, **EVERYTHING),
}
ROWS = [f.name for f in capabilities.FEATURES if f.family == "heads"]


@pytest.mark.parametrize("backend", BACKENDS)
@LAYOUT
@pytest.mark.parametrize("feature", ROWS)
def test_every_feature_of_the_table_is_exact(feature: str, interleaved: bool, backend: str) -> None:
    problem = dataclasses.replace(SAMPLES[feature], interleaved=interleaved)
    missing = feature if problem.width > 512 or problem.dtype == torch.float64 else None
    check_or_refusal(check, problem, backend, missing)


@settings(max_examples=40)
@given(
    st.integers(1, 40).flatmap(
        lambda width: st.builds(
            Problem,
            batch=st.integers(0, 3),
            heads=st.integers(0, 3),
            length=st.integers(0, 35),
            width=st.just(width),
            turned=st.integers(0, width // 2).map(lambda pairs: 2 * pairs),
            interleaved=st.booleans(),
            norm=st.booleans(),
            weight=st.sampled_from([None, "width", "heads"]),
            scale=st.sampled_from([None, "heads", "batch"]),
            offsets=st.sampled_from([0, 7, "batch", "rows"]),
            dtype=st.sampled_from([torch.float16, torch.float32]),
            strided=st.booleans(),
            upstream=st.sampled_from(["contiguous", "transposed", "expanded"]),
        )
    ),
    st.sampled_from(["triton", "portable"]),
)
def test_any_shapes_strides_and_options(problem: Problem, backend: str) -> None:
    check(problem, backend)


@pytest.mark.gpu
@LAYOUT
@pytest.mark.parametrize(("width", "turned"), [(64, 64), (128, 128), (256, 256), (512, 512), (80, 32), (111, 50)])
def test_bfloat16_on_the_device_in_every_row_of_the_table(width: int, turned: int, interleaved: bool) -> None:
    sizes = {"heads": 9, "length": 1000, "width": width, "turned": turned, "interleaved": interleaved}
    check(Problem(**sizes, **EVERYTHING, dtype=torch.bfloat16), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["batch", "heads", "length"])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(empty: str, backend: str) -> None:
    check(Problem(**{empty: 0}, weight="width", scale=None if empty == "heads" else "heads"), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_scales_every_head_and_nothing_asked_for_is_a_copy(backend: str) -> None:
    x = Problem().inputs()[0]
    y = fastattn.prepare_heads(x, backend=backend)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    assert torch.equal(fastattn.prepare_heads(x, head_scale=0.5, backend=backend), x / 2)


@pytest.mark.parametrize("backend", BACKENDS)
@LAYOUT
def test_components_that_do_not_turn_pass_untouched_whatever_they_are(interleaved: bool, backend: str) -> None:
    problem = Problem(turned=10, interleaved=interleaved)
    x = problem.inputs()[0]
    x[:, :, ::2, 10] = float("inf")
    y = problem.ours(x, backend=backend)
    assert torch.equal(y[..., 10:], x[..., 10:]) and y[..., :10].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_merge_their_heads_without_a_copy(backend: str) -> None:
    x = Problem().inputs()[0].requires_grad_()
    for problem in (Problem(), Problem(turned=0, norm=True)):
        y = problem.ours(x, backend=backend)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert y.transpose(1, 2).is_contiguous()
        assert torch.ops.fastattn.prepare_heads_backward(
            y, x, *(None,) * 5, True, 1e-6, False, backend
        )[0].transpose(1, 2).is_contiguous()  # fmt: skip
        assert dx.shape == x.shape


def test_the_same_inputs_give_the_same_bits() -> None:
    problem = Problem(length=40, **EVERYTHING)
    inputs, dy = problem.inputs(), problem.dy()
    once, again = (run(functools.partial(problem.ours, backend="triton"), inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_the_backward_keeps_nothing_but_its_inputs() -> None:
    problem = Problem(**EVERYTHING)
    x, weight, scale = (t.requires_grad_() for t in problem.inputs())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        problem.ours(x, weight, scale)
    assert all(t is x or t.untyped_storage().nbytes() < x.untyped_storage().nbytes() for t in saved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_beyond_the_table_that_nobody_could_check_give_nan_in_their_rows_alone(backend: str) -> None:
    x, cos = torch.randn(2, 3, 6, 8, device=DEVICE), torch.ones(8, 4, device=DEVICE).expand(2, 8, 4)
    offsets = torch.tensor([2, 5], dtype=torch.int32, device=DEVICE)
    arguments = (x, None, cos, cos, offsets, None, True, 1e-6, False, backend)
    for rows in (
        torch.ops.fastattn.prepare_heads(*arguments),
        torch.ops.fastattn.prepare_heads_backward(x, *arguments)[0],
    ):
        missing = rows.isnan().all(-1)
        assert torch.equal(missing, rows.isnan().any(-1))
        assert not missing[0].any() and missing[1].sum(-1).tolist() == [3, 3, 3]


def test_offsets_that_pass_32_bits_within_a_tile_are_avoided_by_a_copy() -> None:
    far = torch.empty_strided((1, 1, 256, 4), (0, 0, 2**24, 1), device="meta")
    assert kernels.tensor4(far).row == 4


def test_every_width_has_a_row_of_the_table() -> None:
    for table in launch.HEADS_ELEMENTWISE.values():
        assert (table[-1].bytes, table[-1].width) == (4, 512)


# What others compute.


def angles(positions: int, pairs: int) -> tuple[Tensor, Tensor]:
    phases = torch.outer(torch.arange(positions).float(), 10_000 ** (-torch.arange(pairs) / pairs)).to(DEVICE)
    return phases.cos(), phases.sin()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_layout_is_llama_s(backend: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 4, 7, 32, device=DEVICE), torch.randn(2, 2, 7, 32, device=DEVICE)
    cos, sin = angles(40, 16)
    positions = torch.tensor([[3], [30]], device=DEVICE) + torch.arange(7, device=DEVICE)
    theirs = llama.apply_rotary_pos_emb(q, k, *(torch.cat((t, t), -1)[positions] for t in (cos, sin)))
    for x, expected in zip((q, k), theirs, strict=True):
        by_offset = fastattn.prepare_heads(x, cos=cos, sin=sin, offsets=positions[:, 0], backend=backend)
        by_row = fastattn.prepare_heads(x, cos=cos[positions], sin=sin[positions], backend=backend)
        torch.testing.assert_close(by_offset, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(by_offset, by_row)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_layout_is_gptj_s_partial_width_too(backend: str) -> None:
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x = torch.randn(2, 4, 7, 32, device=DEVICE)
    sin, cos = gptj.create_sinusoidal_positions(9, 24).to(DEVICE).chunk(2, -1)
    turned = gptj.apply_rotary_pos_emb(x.transpose(1, 2)[..., :24], sin[None, 2:], cos[None, 2:]).transpose(1, 2)
    ours = fastattn.prepare_heads(x, cos=cos, sin=sin, interleaved=True, offsets=2, backend=backend)
    torch.testing.assert_close(ours, torch.cat((turned, x[..., 24:]), -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("model", "name"), [("qwen3", "Qwen3RMSNorm"), ("gemma3", "Gemma3RMSNorm")])
def test_norm_of_queries_and_keys_is_qwen_s_and_gemma_s(model: str, name: str, backend: str) -> None:
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    norm = getattr(module, name)(32, eps=1e-5).to(DEVICE)
    torch.nn.init.normal_(norm.weight)
    # Gemma's weights are kept less one.
    weight = norm.weight + 1 if model == "gemma3" else norm.weight
    x = torch.randn(2, 4, 7, 32, device=DEVICE, requires_grad=True)
    ours = fastattn.prepare_heads(x, norm_weight=weight, eps=1e-5, backend=backend)
    dy, leaves = torch.randn_like(ours), (x, norm.weight)
    torch.testing.assert_close(ours, norm(x), rtol=1e-5, atol=1e-6)
    for a, e in zip(torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(norm(x), leaves, dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


# The operators.


def small(dtype: torch.dtype = torch.float32, **changes) -> tuple[Problem, list[Tensor]]:
    """A problem and its inputs as leaves that want gradients."""
    sizes = {"length": 4, "width": 7, "turned": 4, **EVERYTHING}
    problem = Problem(**{**sizes, "dtype": dtype, **changes})
    return problem, [t.requires_grad_() for t in problem.inputs() if t is not None]


@LAYOUT
@pytest.mark.parametrize("changes", [{}, {"norm": True, "weight": None}, {"weight": None}, {"scale": None}])
def test_derivatives_of_first_and_second_order_and_forward_mode(changes: dict, interleaved: bool) -> None:
    problem, inputs = small(torch.float64, interleaved=interleaved, **changes)

    def function(x, *beside):
        left = list(beside)
        weight = left.pop(0) if problem.weight else None
        return problem.ours(x, weight, *left)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_opcheck(backend: str) -> None:
    options = (True, 1e-6, True, backend)
    x = torch.randn(2, 3, 5, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(2, 3, 8, device=DEVICE, requires_grad=True)
    scale = torch.randn(2, 3, device=DEVICE, requires_grad=True)
    cos = torch.randn(2, 5, 4, device=DEVICE)
    offsets = torch.tensor([-1, 0], dtype=torch.int32, device=DEVICE)
    for beside in ((None,) * 5, (weight, cos, cos, offsets, scale)):
        library.opcheck(torch.ops.fastattn.prepare_heads.default, (x, *beside, *options))
        dy = torch.randn_like(x)
        library.opcheck(torch.ops.fastattn.prepare_heads_backward.default, (dy, x, *beside, *options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_vmap_and_their_compositions_equal_autograd(backend: str) -> None:
    problem, (x, weight, scale) = small()
    x, weight, scale = x.detach(), weight.detach(), scale.detach()
    assert problem.rotation  # made outside of vmap, which draws no random numbers

    def loss(x, weight, scale):
        return problem.ours(x, weight, scale, backend=backend).sin().sum()

    def expected(*inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(loss(*leaves), leaves)

    gradients = torch.func.grad(loss, argnums=(0, 1, 2))
    xs, weights = torch.stack([x, -x, 2 * x], 2), torch.stack([weight, weight.flip(0)])
    over_x = torch.func.vmap(gradients, (2, None, None))(xs, weight, scale)
    over_weight = torch.func.vmap(gradients, (None, 0, None))(x, weights, scale)
    for i in range(3):
        for ours, theirs in zip(over_x, expected(xs[:, :, i], weight, scale), strict=True):
            torch.testing.assert_close(ours[i], theirs)
    for i in range(2):
        for ours, theirs in zip(over_weight, expected(x, weights[i], scale), strict=True):
            torch.testing.assert_close(ours[i], theirs)
    without = torch.func.vmap(
        lambda x: torch.func.grad(lambda x: fastattn.prepare_heads(x, norm=True).sum())(x), 2
    )
    assert without(xs).shape == (3, *x.shape)


def test_forward_mode_equals_the_definition_s() -> None:
    problem, (x, weight, scale) = small(torch.float64)
    inputs, tangents = [t.detach() for t in (x, weight, scale)], [torch.randn_like(t) for t in (x, weight, scale)]
    ours = torch.func.jvp(problem.ours, tuple(inputs), tuple(tangents))
    exact = torch.func.jvp(problem.definition, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(ours, exact)
    (alone,) = torch.func.jvp(lambda w: problem.ours(inputs[0], w), (inputs[1],), (tangents[1],))[1:]
    (theirs,) = torch.func.jvp(lambda w: problem.definition(inputs[0], w, None), (inputs[1],), (tangents[1],))[1:]
    torch.testing.assert_close(alone, theirs)


@pytest.mark.parametrize(("backend", "dynamic"), [("triton", False), ("portable", True)])
def test_compiles_without_a_graph_break_and_gives_the_same(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    problem = Problem(**EVERYTHING)
    asked = problem.rotation

    def function(x, weight, scale):
        y = fastattn.prepare_heads(x * 2, norm_weight=weight, head_scale=scale, **asked, backend=backend)
        return y.transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (12, 21):
        x, *beside = problem.inputs()
        inputs, dy = (x[:, :, :length], *beside), torch.randn(2, length, 48, device=DEVICE)
        for ours, expected in zip(run(compiled, inputs, dy), run(function, inputs, dy), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


# Bad input.

X, COS, WEIGHT = (torch.zeros(size, device=DEVICE) for size in ((2, 3, 5, 8), (9, 4), (8,)))
prepare = functools.partial(fastattn.prepare_heads, X)
turned = functools.partial(fastattn.prepare_heads, X, cos=COS, sin=COS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastattn.prepare_heads([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: fastattn.prepare_heads(X[0]), ValueError, r"x must have shape \(batch, .* got \(3, 5, 8\)"),
        (lambda: fastattn.prepare_heads(X[..., :0]), ValueError, r"width not 0; got \(2, 3, 5, 0\)"),
        (lambda: fastattn.prepare_heads(X.long()), TypeError, "x must be float16, .* got torch.int64"),
        (lambda: prepare(norm=1), TypeError, "norm must be a bool, got int"),
        (lambda: turned(interleaved=None), TypeError, "interleaved must be a bool, got NoneType"),
        (lambda: prepare(norm_weight=X), ValueError, r"norm_weight must have shape \(8,\) or \(3, 8\), got"),
        (lambda: prepare(norm_weight=WEIGHT.long()), TypeError, "norm_weight must be float16, .* got torch.int64"),
        (lambda: prepare(norm_weight=WEIGHT.to("meta")), ValueError, "norm_weight must be on x's device .* meta"),
        (lambda: prepare(norm=True, eps="1e-6"), TypeError, "eps must be a number, got str"),
        (lambda: prepare(norm=True, eps=0.0), ValueError, "eps must be finite and at least 1.2e-38, got 0.0"),
        (lambda: prepare(cos=COS), ValueError, "cos and sin must come together, got cos alone"),
        (lambda: prepare(cos=COS, sin=[1]), TypeError, "sin must be a torch.Tensor or None, got list"),
        (lambda: prepare(cos=COS, sin=COS[:8]), ValueError, r"sin must have cos's shape \(9, 4\), got \(8, 4\)"),
        (lambda: prepare(cos=X[0, 0], sin=X[0, 0]), ValueError, r"cos must have shape \(positions, .* \(5, 8\)"),
        (lambda: prepare(cos=X[:, 0, :4], sin=COS), ValueError, r"cos must have .* \(2, 5, pairs\).* got \(2, 4"),
        (
            lambda: prepare(cos=COS, sin=COS.clone().requires_grad_()),
            ValueError,
            "sin must not require a gradient, because none is computed for it; detach it",
        ),
        (lambda: prepare(cos=COS, sin=COS.to("meta")), ValueError, "sin must be on x's device .*, got meta"),
        (lambda: turned(offsets=5), ValueError, "offsets must be between 0 and 4, for 5 rows .* 9 of cos; got 5"),
        (lambda: turned(offsets=-1), ValueError, "offsets must be between 0 and 4, .* got -1"),
        (lambda: turned(offsets=1.0), TypeError, "offsets must be an int or a tensor of them, got float"),
        (lambda: turned(offsets=torch.zeros(3)), ValueError, r"offsets must have shape \(2,\), got \(3,\)"),
        (
            lambda: turned(offsets=torch.zeros(2, device=DEVICE)),
            TypeError,
            "offsets must be int32 or int64, got torch.float32",
        ),
        (
            lambda: fastattn.prepare_heads(X.cpu(), cos=COS.cpu(), sin=COS.cpu(), offsets=torch.tensor([0, 5])),
            ValueError,
            "offsets must be at most 4, for 5 rows of x and 9 of cos; got 5",
        ),
        (lambda: prepare(offsets=1), ValueError, "offsets must be 0 where there are no cos and sin"),
        (
            lambda: prepare(cos=X[:, 0, :, :4], sin=X[:, 0, :, :4], offsets=1),
            ValueError,
            "offsets must be 0 where cos and sin have a row for every row of x",
        ),
        (
            lambda: prepare(head_scale=WEIGHT),
            ValueError,
            r"head_scale must have shape \(\) or \(3,\) or \(2, 3\), got",
        ),
        (lambda: prepare(head_scale=True), TypeError, "head_scale must be a number or a torch.Tensor, got bool"),
        (lambda: prepare(backend="cuda"), ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_bad_input_is_refused_in_words(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
