"""Each option of scores and weights computes what its authors' code computes; dropout drops what it should."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_problems import IMPLEMENTATIONS, Problem, check, implementation
from hardware import DEVICE, ON_GPU
from tolerance import assert_as_exact_as_eager
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.core.attention import head_scales
from fastattn.core.attention.dropout import philox, state_of_part
from fastattn.core.attention.spec import check_precision

FUSED = ("triton", "portable")


def same(ours, theirs, **tolerance) -> None:
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, **{"rtol": 1e-4, "atol": 2e-5, **tolerance})


def out_and_gradients(function, leaves, weight):
    out = function(*leaves)
    return out, *torch.autograd.grad((out * weight).sum(), leaves)


def leaves_of(problem: Problem, *shapes: tuple[int, ...]):
    torch.manual_seed(0)
    beside = (torch.randn(shape, device=DEVICE) for shape in shapes)
    return [t.detach().requires_grad_() for t in (*problem.inputs(), *beside)]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("shape", [(2, 4, 33, 47), (1, 4, 33, 47), (2, 1, 1, 47), (33, 47), (47,), (4, 1, 1)])
def test_bias_and_its_gradient_equal_scaled_dot_product_attention(shape: tuple, name: str) -> None:
    problem = Problem(batch=2, heads=4, key_heads=4, queries=33, keys=47)
    leaves = leaves_of(problem, shape)
    weight = torch.randn(2, 4, 33, 16, device=DEVICE)
    with implementation(name) as backend:
        ours = out_and_gradients(
            lambda q, k, v, bias: fastattn.attention(q, k, v, bias=bias, backend=backend), leaves, weight
        )
    theirs = out_and_gradients(
        lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, attn_mask=bias), leaves, weight
    )
    same(ours, theirs)


@pytest.mark.parametrize("name", FUSED)
def test_boolean_masks_mean_what_they_mean_to_scaled_dot_product_attention(name: str) -> None:
    problem = Problem(batch=2, heads=4, key_heads=4, queries=33, keys=47)
    leaves = leaves_of(problem)
    mask = torch.rand(2, 1, 33, 47, device=DEVICE) < 0.6
    weight = torch.randn(2, 4, 33, 16, device=DEVICE)
    with implementation(name) as backend:
        ours = out_and_gradients(lambda *t: fastattn.attention(*t, bias=mask, backend=backend), leaves, weight)
    same(ours, out_and_gradients(lambda *t: F.scaled_dot_product_attention(*t, attn_mask=mask), leaves, weight))


@pytest.mark.parametrize("name", ["portable", "tiled", "reference"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
def test_rows_of_the_lowest_numbers_are_eagers_in_result_and_gradients(
    low: float, relative: bool, name: str
) -> None:
    q, k, v = (t.requires_grad_() for t in Problem(queries=6, keys=6).inputs())
    added = torch.zeros(6, 6, device=DEVICE)
    added[0], added[1, :4] = low, low
    by_distance = torch.zeros(2, 3, device=DEVICE)
    if relative:
        added, by_distance = torch.zeros_like(added), torch.full_like(by_distance, low)
    with implementation(name) as backend:
        out = fastattn.attention(q, k, v, bias=added, relative_bias=by_distance, backend=backend)
    expected = torch.softmax(q @ k.mT / 4 + added + by_distance[0, 0], -1) @ v
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(t.sin().sum(), (q, k, v)) for t in (out, expected))
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("behind", [torch.nan, torch.inf, -torch.inf])
def test_a_bias_may_be_anything_behind_the_diagonal(behind: float, name: str) -> None:
    q, k, v = (t.requires_grad_() for t in Problem(queries=9, keys=9).inputs())
    bias = torch.zeros(9, 9, device=DEVICE).masked_fill(torch.ones(9, 9, device=DEVICE).triu(1) > 0, behind)
    with implementation(name) as backend:
        out = fastattn.attention(q, k, v, bias=bias, causal=True, backend=backend)
        expected = fastattn.attention(q, k, v, causal=True, backend=backend)
    ours, theirs = (torch.autograd.grad(t.sin().sum(), (q, k, v)) for t in (out, expected))
    for a, e in zip((out, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_rows_whose_bias_hides_all_give_zero_and_no_nan(masked: bool, name: str) -> None:
    q, k, v = leaves_of(Problem(queries=40, keys=40))
    bias = torch.zeros(40, 40, device=DEVICE).masked_fill(
        torch.arange(40, device=DEVICE)[:, None] < 20, -torch.inf
    )
    given = bias == 0 if masked else bias.requires_grad_()
    with implementation(name) as backend:
        out, lse = fastattn.attention(q, k, v, bias=given, return_lse=True, backend=backend)
        leaves = (q, k, v) if masked else (q, k, v, bias)
        gradients = torch.autograd.grad(out.square().sum() + lse[:, :, 20:].sum(), leaves)
    assert not out[:, :, :20].any() and (lse[:, :, :20] == -torch.inf).all()
    assert all(torch.isfinite(g).all() for g in gradients) and not gradients[0][:, :, :20].any()


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("case", ["softcap", "alibi", "window", "relative"])
def test_equal_to_flex_attention(case: str, name: str) -> None:
    inputs = Problem(batch=2, heads=4, key_heads=2, queries=40, keys=40).inputs()
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05], device=DEVICE)
    values = torch.randn(4, 21, device=DEVICE)
    options, score_mod = {
        "softcap": ({"softcap": 3.0}, lambda s, b, h, i, j: 3.0 * torch.tanh(s / 3.0)),
        "alibi": ({"alibi_slopes": slopes}, lambda s, b, h, i, j: s - slopes[h] * (i - j).abs()),
        "window": (
            {"window": (5, 9)},
            lambda s, b, h, i, j: torch.where((j >= i - 5) & (j <= i + 9), s, -torch.inf),
        ),
        "relative": (
            {"relative_bias": values},
            lambda s, b, h, i, j: s + values[h, (j - i).clamp(-10, 10) + 10],
        ),
    }[case]
    with implementation(name) as backend:
        out, lse = fastattn.attention(*inputs, **options, return_lse=True, backend=backend)
    # On a CPU flex_attention has no backward; ours is compared with the definition's.
    theirs = flex_attention(*inputs, score_mod=score_mod, enable_gqa=True, return_lse=True)
    same((out, lse), theirs)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5s_relative_bias_and_the_gradient_of_its_table(bidirectional: bool, name: str) -> None:
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = modeling.T5Config(d_model=64, d_kv=16, num_heads=4, relative_attention_num_buckets=16)
    config.relative_attention_max_distance = 40
    config.is_decoder = not bidirectional
    theirs = modeling.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).to(DEVICE)
    q, k, v = leaves_of(Problem(heads=4, key_heads=4, queries=100, keys=100))
    table = theirs.relative_attention_bias.weight
    bias = theirs.compute_bias(100, 100)
    if not bidirectional:
        bias = bias + torch.full((100, 100), -torch.inf, device=DEVICE).triu(1)
    expected = torch.softmax(q @ k.mT + bias, -1) @ v
    expected = (expected, *torch.autograd.grad(expected.sin().sum(), (q, k, v, table)))
    with implementation(name) as backend:
        relative = fastattn.t5_relative_bias(table, max_distance=40, bidirectional=bidirectional)
        out = fastattn.attention(
            q, k, v, relative_bias=relative, scale=1.0, causal=not bidirectional, backend=backend
        )
    same((out, *torch.autograd.grad(out.sin().sum(), (q, k, v, table))), expected, atol=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_sinks_equal_gpt_oss(name: str) -> None:
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v, sinks = leaves_of(Problem(heads=4, key_heads=2, queries=40, keys=40), (4,))
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks, module.training = 2, sinks, False
    mask = torch.full((40, 40), -torch.inf, device=DEVICE).triu(1)[None, None]

    def theirs(q, k, v, sinks):
        return modeling.eager_attention_forward(module, q, k, v, mask, scaling=0.25)[0].transpose(1, 2)

    weight = torch.randn(1, 4, 40, 16, device=DEVICE)
    with implementation(name) as backend:
        ours = out_and_gradients(
            lambda q, k, v, sinks: fastattn.attention(q, k, v, sinks=sinks, causal=True, backend=backend),
            [q, k, v, sinks],
            weight,
        )
    same(ours, out_and_gradients(theirs, [q, k, v, sinks], weight))


@pytest.mark.parametrize("name", FUSED)
def test_soft_cap_in_a_window_equals_gemma_2(name: str) -> None:
    modeling = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    leaves = leaves_of(Problem(heads=4, key_heads=2, queries=40, keys=40))
    module = torch.nn.Module()
    module.num_key_value_groups, module.head_dim, module.training = 2, 16, False
    distance = torch.arange(40, device=DEVICE)[:, None] - torch.arange(40, device=DEVICE)
    mask = torch.zeros(40, 40, device=DEVICE).masked_fill((distance < 0) | (distance >= 12), -torch.inf)[
        None, None
    ]

    def theirs(q, k, v):
        return modeling.eager_attention_forward(module, q, k, v, mask, scaling=0.25, softcap=2.0)[0].transpose(
            1, 2
        )

    weight = torch.randn(1, 4, 40, 16, device=DEVICE)
    with implementation(name) as backend:
        ours = out_and_gradients(
            lambda *t: fastattn.attention(*t, softcap=2.0, causal=True, window=(11, 0), backend=backend),
            leaves,
            weight,
        )
    same(ours, out_and_gradients(theirs, leaves, weight))


# ---- dropout ----


@pytest.mark.parametrize(
    ("counter", "seed", "rounds", "words"),
    [
        ((0, 0, 0, 0), 0, 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0, 0, 0, 0), 0, 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, -1, 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_words_its_authors_published(counter, seed, rounds, words) -> None:
    given = philox(tuple(torch.tensor(c) for c in counter), torch.tensor(seed), rounds)
    assert tuple(int(w) for w in given) == words


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_as_many_weights_are_dropped_as_asked_wherever_one_looks(dropout_p: float) -> None:
    torch.manual_seed(1)
    kept = fastattn.dropout_mask(fastattn.dropout_state(4), dropout_p, 8, 96, 136).double()
    deviation = (dropout_p * (1 - dropout_p)) ** 0.5
    for dimensions in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        mean = kept.mean(dimensions)
        count = kept.numel() / mean.numel()
        assert ((mean - (1 - dropout_p)).abs() < 5 * deviation / count**0.5).all(), dimensions
    centred = (kept - kept.mean()) / deviation
    for dimension in range(4):
        # Neighbours in any direction are drawn independently.
        neighbours = (centred * centred.roll(1, dimension)).mean()
        assert neighbours.abs() < 5 / kept.numel() ** 0.5, dimension


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_mask_that_was_drawn_is_the_mask_that_is_told(name: str) -> None:
    # With a unit matrix as values the output is the weights: those that are dropped are zero.
    q, k, _ = Problem(batch=2, heads=3, key_heads=3, queries=37, keys=61, width=16).inputs()
    v = torch.eye(61, device=DEVICE).expand(2, 3, 61, 61)
    torch.manual_seed(3)
    with implementation(name) as backend:
        out = fastattn.attention(q, k, v, dropout_p=0.4, backend=backend)
    torch.manual_seed(3)
    told = fastattn.dropout_mask(fastattn.dropout_state(2, DEVICE), 0.4, 3, 37, 61)
    assert torch.equal(out != 0, told)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_part_drops_what_the_whole_drops_there(name: str) -> None:
    state = torch.tensor([[2**62 + 5, 2**33 + 7], [-9, 3]], device=DEVICE)
    whole = fastattn.dropout_mask(state, 0.4, 7, 190, 120)
    q, k, _ = Problem(batch=2, heads=3, key_heads=3, queries=37, keys=61, width=16).inputs()
    v = torch.eye(61, device=DEVICE).expand(2, 3, 61, 61)
    part = state_of_part(state_of_part(state, head=3, key=8), head=1, query=150, key=40)
    with implementation(name) as backend:
        out = fastattn.attention(q, k, v, dropout_p=0.4, dropout_state=part, backend=backend)
    assert torch.equal(out != 0, whole[:, 4:, 150:187, 48:109])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_belongs_to_a_head_is_that_of_the_part_s_own_head(name: str) -> None:
    """Not that of the head of the whole by which dropout draws."""
    of_heads = {"head_scale": True, "alibi": True, "sinks": True, "bias": (1, 1, 0, 0)}
    check(Problem(heads=2, queries=20, keys=24, dropout=0.3, of_part=True, **of_heads), name)


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16)])
def test_no_tiling_changes_what_is_dropped(blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("fastattn.kernels.launch")
    q, k, v = leaves_of(Problem(queries=70, keys=70))
    state = fastattn.dropout_state(1, DEVICE)

    def run():
        out = fastattn.attention(q, k, v, dropout_p=0.3, dropout_state=state, causal=True, backend="triton")
        return out, *torch.autograd.grad(out.sin().sum(), (q, k, v))

    expected = run()
    monkeypatch.setattr(launch, "look_up", lambda *_: launch.Tiling(*blocks, 4, 1))
    same(run(), expected, rtol=1e-5, atol=1e-5)


def test_dropout_follows_torchs_generator_and_checkpointing_draws_the_same_again() -> None:
    q, k, v = leaves_of(Problem(causal=True))

    def function(q, k, v):
        return fastattn.attention(q, k, v, causal=True, dropout_p=0.5).sin().sum()

    torch.manual_seed(5)
    expected = torch.autograd.grad(function(q, k, v), (q, k, v))
    assert not torch.equal(torch.autograd.grad(function(q, k, v), (q, k, v))[0], expected[0])
    torch.manual_seed(5)
    ours = torch.autograd.grad(checkpoint(function, q, k, v, use_reentrant=False), (q, k, v))
    same(ours, expected, rtol=0, atol=0)


def test_dropped_out_samples_of_a_vmap_draw_as_its_randomness_says() -> None:
    q, k, v = (torch.stack([t] * 3) for t in Problem().inputs())

    def function(q, k, v):
        return fastattn.attention(q, k, v, dropout_p=0.5)

    same_numbers = torch.func.vmap(function, randomness="same")(q, k, v)
    assert torch.equal(same_numbers[0], same_numbers[1])
    different = torch.func.vmap(function, randomness="different")(q, k, v)
    assert not torch.equal(different[0], different[1])


def test_a_dropout_of_zero_draws_nothing() -> None:
    q, k, v = Problem().inputs()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    out = fastattn.attention(q, k, v, dropout_p=0.0)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(out, fastattn.attention(q, k, v))


# ---- float32 ----


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="the interpreter's products are exact whatever is asked")
@pytest.mark.parametrize(("precision", "bound"), [("ieee", 1e-5), ("tf32x3", 1e-5), ("tf32", 2e-2)])
def test_products_are_as_precise_as_asked(precision: str, bound: float) -> None:
    leaves = leaves_of(Problem(heads=4, key_heads=2, queries=300, keys=300, width=64, value_width=64))
    weight = torch.randn(1, 4, 300, 64, device=DEVICE)
    ours = out_and_gradients(
        lambda *t: fastattn.attention(*t, precision=precision, backend="triton"), leaves, weight
    )
    exact = out_and_gradients(
        lambda *t: fastattn.attention(*t, backend="reference"), [t.double() for t in leaves], weight.double()
    )
    for a, e in zip(ours, exact, strict=True):
        assert (a.double() - e).abs().max() < bound * e.abs().max()


def test_the_default_precision_is_torchs_own() -> None:
    class OnCuda:
        dtype, device = torch.float32, torch.device("cuda")

    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(setting)
            assert check_precision(None, OnCuda) == expected
            assert check_precision("tf32x3", OnCuda) == "tf32x3"
    finally:
        torch.set_float32_matmul_precision(before)
    OnCuda.dtype = torch.bfloat16
    assert check_precision("tf32", OnCuda) == "ieee"


def arguments(**changes):
    given = {name: torch.zeros(2, 4, 10, 16) for name in ("q", "k", "v")}
    return {**given, **changes}


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        (arguments(bias=torch.zeros(3, 10)), ValueError, r"bias must broadcast to .* got \(3, 10\)"),
        (arguments(bias=torch.zeros(1, 2, 4, 10, 10)), ValueError, "bias must broadcast"),
        (arguments(bias=torch.zeros(10, 10).int()), TypeError, "bias must be float16.* got torch.int32"),
        (arguments(relative_bias=torch.zeros(4, 6)), ValueError, r"relative_bias must have shape \(4, 2 R \+ 1\)"),
        (arguments(relative_bias=torch.zeros(3, 5)), ValueError, r"got \(3, 5\)"),
        (arguments(dropout_p=1.0), ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
        (arguments(dropout_p="0.1"), TypeError, "dropout_p must be a number, got str"),
        (
            arguments(dropout_p=0.1, dropout_state=torch.zeros(3, 2).long()),
            ValueError,
            r"must have shape \(2, 2\) or \(2, 5\)",
        ),
        (arguments(dropout_p=0.1, dropout_state=torch.zeros(2, 2)), TypeError, "dropout_state must be int64"),
        (arguments(precision="fp8"), ValueError, "precision must be one of ieee, tf32x3, tf32 or None, got 'fp8'"),
    ],
)
def test_bad_input_is_named(given: dict, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        fastattn.attention(**given)


def test_a_table_that_is_none_of_t5s_is_named() -> None:
    with pytest.raises(ValueError, match=r"table must have shape \(buckets, heads\), got \(8,\)"):
        fastattn.t5_relative_bias(torch.zeros(8))
    with pytest.raises(ValueError, match="max_distance must be more than 8"):
        fastattn.t5_relative_bias(torch.zeros(32, 4), max_distance=8)


@pytest.fixture(params=[*IMPLEMENTATIONS, "halves"])
def scaling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation; "halves" is what the portable backend does on CUDA."""
    if request.param != "halves":
        return request.param
    monkeypatch.setattr(head_scales, "_in_halves", lambda *_: True)
    return "portable"


def test_a_scale_of_each_head_is_as_exact_in_half_precision_as_a_number(scaling: str) -> None:
    torch.manual_seed(0)
    # Large scores, so that the weights tell of every rounding; a scale with many digits.
    q, k, v, dout = (torch.randn(1, 4, 64, 32, device=DEVICE).half() for _ in range(4))
    number = 0.7377

    def results(dtype: torch.dtype, scale: float | torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = fastattn.attention(*leaves, scale=scale, backend=backend)
        return out, *torch.autograd.grad(out, leaves, dout.to(dtype))

    exact = results(torch.float64, number, "reference")
    with implementation(scaling) as backend:
        ours = results(torch.float16, torch.full((4,), number, device=DEVICE), backend)
        by_number = results(torch.float16, number, backend)
    for a, n, x in zip(ours, by_number, exact, strict=True):
        errors = [(t.double() - x).abs().mean() for t in (a, n)]
        assert errors[0] <= 1.1 * errors[1]


def test_scales_of_zero_and_below_are_exact_and_have_gradients(scaling: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 33, 16, device=DEVICE).half() for heads in (4, 2, 2)]
    scales = torch.tensor([[0.3, -0.4, 0.0, 1.1], [1e-45, 2.0, -0.7, 0.0]], device=DEVICE)
    weight = torch.randn(2, 4, 33, 16, device=DEVICE).half()

    def results(function, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        learned = scales.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        out = function(*leaves, learned)
        return out, *torch.autograd.grad((out * weight.to(dtype)).sum(), (*leaves, learned))

    def eager(q, k, v, scale):
        scores = (q @ k.repeat_interleave(2, 1).mT).to(scale.dtype) * scale[:, :, None, None]
        return torch.softmax(scores, -1).to(q.dtype) @ v.repeat_interleave(2, 1)

    with implementation(scaling) as backend:
        actual = results(lambda *t: fastattn.attention(*t[:3], scale=t[3], backend=backend), torch.float16)
    exact, expected = results(eager, torch.float64), results(eager, torch.float16)
    for position, (a, x, e) in enumerate(zip(actual, exact, expected, strict=True)):
        tiny = 1e-5
        if position == 4:
            # delta is made of the rounded output. Its errors add up over rows, times products of sqrt(width).
            tiny += 4 * torch.finfo(torch.float16).eps * float((weight * exact[0]).norm())
        assert_as_exact_as_eager(a, x, e, gradient=position > 0, tiny=tiny, dtype=torch.float16)


def test_the_explicit_backward_takes_scales_and_returns_their_gradient() -> None:
    q, k, v, dout = (torch.randn(1, 2, 20, 16, device=DEVICE, requires_grad=True) for _ in range(4))
    scale = torch.tensor([0.3, -0.2], device=DEVICE, requires_grad=True)
    out, lse = fastattn.attention(q, k, v, scale=scale, return_lse=True)
    expected = torch.autograd.grad(out, (q, k, v, scale), dout)
    ours = fastattn.attention_backward(*(t.detach() for t in (dout, q, k, v, out, lse)), scale=scale.detach())
    for a, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, e.expand_as(a))
