"""Attention computes its definition, forward and backward, as exactly as eager PyTorch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from attention_problems import IMPLEMENTATIONS, Problem, check, implementation, problems, run
from hardware import DEVICE, ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from tolerance import assert_as_exact_as_eager
from torch._dynamo.testing import CompileCounter

import fastattn
from fastattn import masks
from fastattn.core import capabilities
from fastattn.core.attention import definition as attention_definition
from fastattn.core.attention.spec import AttentionSpec, Saved, Wanted

# One call for each row of the capability table; a row without one fails the test below.
SAMPLES = {
    "full (bidirectional)": Problem(queries=50, keys=50),
    "causal, aligned bottom-right": Problem(causal=True, queries=67, keys=67),
    "sliding window, left and right": Problem(window=(20, 7), queries=60, keys=75),
    "documents, packed sequences (intervals)": Problem(intervals=True, batch=2, heads=4, queries=90, keys=70),
    "any mask (block lists)": Problem(lists="random", batch=2, heads=4, queries=90, keys=150),
    "key lengths": Problem(batch=3, lengths=True, queries=50, keys=50),
    "soft-capped scores": Problem(softcap=1.5, queries=40, keys=40),
    "ALiBi slopes": Problem(alibi=True, queries=40, keys=56, heads=3, key_heads=1),
    "additive bias, with gradient": Problem(bias=(0, 0, 0, 0), queries=40, keys=52, batch=2),
    "boolean mask": Problem(bias=(0, 1, 0, 0), masked=True, queries=40, keys=52, batch=2),
    "relative position bias (T5), with gradient": Problem(radius=12, queries=70, keys=85, heads=3, key_heads=1),
    "dropout": Problem(dropout=0.2, queries=50, keys=70, batch=2),
    "attention sinks, with gradient": Problem(sinks=True, queries=40, keys=24, causal=True),
    "scale of each head, with gradient": Problem(head_scale=True, heads=6, key_heads=2, queries=40, keys=50),
    "lengths of their own for queries and keys": Problem(causal=True, queries=37, keys=90),
    "grouped-query heads": Problem(heads=6, key_heads=2, causal=True, queries=40, keys=40),
    "head widths 8 to 512": Problem(width=40, value_width=40, heads=1, key_heads=1),
    "queries and keys of 513 to 640 columns, values of 8 to 512 (DeepSeek's absorbed form)": Problem(
        width=520, value_width=24, heads=2, key_heads=1, causal=True
    ),
    "head widths below 8 or above 512": Problem(width=520, value_width=5, heads=1, key_heads=1),
    "a width of their own for values": Problem(width=24, value_width=56, heads=1, key_heads=1),
    "float16": Problem(dtype=torch.float16, causal=True, queries=70, keys=70),
    "bfloat16": Problem(dtype=torch.bfloat16, causal=True, queries=70, keys=70),
    "float32, IEEE products": Problem(dtype=torch.float32, queries=33, keys=65),
    "float32 heads wider than 128": Problem(heads=1, key_heads=1, queries=20, keys=20, width=144, value_width=8),
    "float32, tf32 and tf32x3 products": Problem(precision="tf32x3", queries=33, keys=65),
    "float64": Problem(dtype=torch.float64, queries=33, keys=65),
    "gradient of the log-sum-exp": Problem(lse_gradient=True, causal=True, queries=50, keys=50),
    "bits of a row that depend on that row alone (invariant)": Problem(
        invariant=True, intervals=True, batch=2, heads=4, queries=90, keys=70
    ),
    "invariant beside a bias, or with heads wider than 256 (float32: 128)": Problem(
        invariant=True, bias=(0, 0, 0, 0), queries=40, keys=52
    ),
}
ROWS = [f.name for f in capabilities.FEATURES if f.family == "attention"]


def request_of(problem: Problem) -> capabilities.Request:
    tensors = problem.score_tensors()
    return capabilities.Request("attention", problem.spec, problem.inputs(), problem.lse_gradient, tensors)


@pytest.mark.parametrize("feature", ROWS)
def test_the_sample_of_a_feature_asks_for_it(feature: str) -> None:
    (row,) = (f for f in capabilities.FEATURES if (f.family, f.name) == ("attention", feature))
    assert row.needed(request_of(SAMPLES[feature]))


def skip_if_refused(problem: Problem, name: str) -> None:
    backend = "portable" if name == "tiled" else name
    request = request_of(problem)
    if refused := capabilities.missing(request, capabilities.BACKWARD, backend):
        pytest.skip("; ".join(refused))
    if name == "triton" and problem.dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter computes bfloat16 wrongly")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("feature", ROWS)
def test_every_feature_of_the_table_is_exact(feature: str, name: str) -> None:
    skip_if_refused(SAMPLES[feature], name)
    check(SAMPLES[feature], name)


@pytest.mark.parametrize("name", ["triton", "portable"])
def test_an_invariant_call_is_exact_in_all_that_shapes_scores(name: str) -> None:
    shaped = {"softcap": 1.5, "alibi": True, "sinks": True, "head_scale": True, "window": (20, 7), "lengths": True}
    check(Problem(invariant=True, heads=3, key_heads=1, queries=45, keys=52, lse_gradient=True, **shaped), name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(113, 203), (203, 113), (1, 77), (77, 1), (32, 16), (31, 33)])
def test_lengths_that_fit_no_tile(queries: int, keys: int, causal: bool, name: str) -> None:
    check(Problem(heads=1, key_heads=1, queries=queries, keys=keys, causal=causal, lse_gradient=True), name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS if ON_GPU else IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_of_many_tiles(causal: bool, name: str) -> None:
    check(Problem(heads=1, key_heads=1, queries=1023, keys=1024, causal=causal), name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("width", "value_width"),
    [(8, 8), (59, 59), (80, 96), (111, 111), (192, 128), (64, 256), (256, 8), (257, 257), (512, 256), (320, 512)],
)
def test_head_widths(width: int, value_width: int, name: str) -> None:
    check(
        Problem(heads=1, key_heads=1, queries=35, keys=35, width=width, value_width=value_width, causal=True), name
    )


@pytest.mark.parametrize("name", ["portable", "tiled", "reference"])
@pytest.mark.parametrize(("width", "value_width"), [(1, 1), (3, 7), (5, 300), (320, 320), (512, 512), (513, 2)])
def test_heads_narrower_and_wider_than_the_kernels_tiles(width: int, value_width: int, name: str) -> None:
    check(
        Problem(
            heads=2, key_heads=1, queries=35, keys=40, width=width, value_width=value_width, causal=True,
            lse_gradient=True,
        ),
        name,
    )  # fmt: skip


@pytest.mark.parametrize(("width", "value_width"), [(7, 8), (8, 7), (641, 8), (8, 513)])
def test_the_triton_kernels_refuse_such_heads_and_say_so(width: int, value_width: int) -> None:
    q, v = torch.zeros(1, 1, 4, width, device=DEVICE), torch.zeros(1, 1, 4, value_width, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"backend 'triton' cannot compute .* no head widths below 8 or above 512"
    ):
        fastattn.attention(q, q, v, backend="triton")
    assert fastattn.attention(q, q, v).shape == v.shape


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 80, 128, 256, 512])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiles_of_the_gpu(dtype: torch.dtype, causal: bool, width: int) -> None:
    problem = Problem(
        batch=2, heads=4, key_heads=2, queries=613, keys=777, width=width, value_width=width,
        causal=causal, dtype=dtype, lse_gradient=True,
    )  # fmt: skip
    check(problem, "triton")


@pytest.mark.parametrize("name", ["triton", "portable", "tiled"])
@settings(max_examples=12)
@given(problem=problems, group=st.integers(1, 3))
def test_any_shape_stride_dtype_and_head_count(problem: Problem, group: int, name: str) -> None:
    check(replace(problem, heads=problem.key_heads * group), name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_scores_of_ten_thousand_neither_overflow_nor_lose_the_maximum(name: str) -> None:
    problem = Problem(scale=1.0, causal=True, heads=1, key_heads=1)
    q, k, v = problem.inputs()
    q, k = q * 50, k * 50
    scores = q.double() @ k.double().mT
    assert scores.abs().max() > 1e4
    dout = torch.randn_like(v)
    exact = run(
        [t.double() for t in (q, k, v)],
        (dout.double(), None),
        lambda *t: attention_definition.attention(*t, problem.spec),
    )
    eager = run((q, k, v), (dout, None), lambda *t: attention_definition.attention(*t, problem.spec))
    with implementation(name) as backend:
        options = {"causal": True, "scale": 1.0, "return_lse": True, "backend": backend}
        actual = run((q, k, v), (dout, None), lambda *t: fastattn.attention(*t, **options))
    for a, x, e in zip(actual[:2], exact, eager, strict=False):
        assert_as_exact_as_eager(a, x, e)
    # The weights are recomputed from an lse kept in fp32, which at 1e4 is exact to 5e-4.
    rounding = torch.finfo(torch.float32).eps * scores.abs().max()
    for a, x, size in zip(actual[2:], exact[2:], (k.abs().max(), q.abs().max(), 1.0), strict=True):
        assert (a.double() - x).abs().max() < 4 * rounding * size


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_may_be_negative_or_zero(scale: float, name: str) -> None:
    q, k, v = (t.requires_grad_() for t in Problem().inputs())
    with implementation(name) as backend:
        out = fastattn.attention(q, k, v, scale=scale, backend=backend)
    weights = torch.softmax(q.double() @ k.double().mT * scale, -1)
    exact = weights @ v.double()
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)
    ours = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.autograd.grad(exact.sum(), (q, k, v))
    for a, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-5)
    with implementation(name) as backend:
        o, lse = fastattn.attention(q, k, v, scale=scale, return_lse=True, backend=backend)
        driven = fastattn.attention_backward(torch.ones_like(o), q, k, v, o, lse, scale=scale, backend=backend)
    for a, e in zip(driven, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_that_see_nothing_give_zero_output_and_zero_gradients(name: str) -> None:
    q, k, v = (t.requires_grad_() for t in Problem(queries=50, keys=20, causal=True).inputs())
    with implementation(name) as backend:
        out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True, backend=backend)
        # Where lse is -inf, merging with another empty part may send a gradient of NaN.
        dlse = torch.where(torch.isinf(lse), torch.nan, 1.0)
        gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), dlse))
    blind = slice(0, 30)
    assert torch.equal(out[:, :, blind], torch.zeros_like(out[:, :, blind]))
    assert (lse[:, :, blind] == float("-inf")).all()
    assert torch.isfinite(lse[:, :, 30:]).all()
    assert torch.equal(gradients[0][:, :, blind], torch.zeros_like(q[:, :, blind]))
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty_inputs(empty: str, causal: bool, name: str) -> None:
    problem = replace(Problem(causal=causal), **{empty: 0})
    q, k, v = (t.requires_grad_() for t in problem.inputs())
    with implementation(name) as backend:
        out, lse = fastattn.attention(q, k, v, causal=causal, return_lse=True, backend=backend)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == (problem.batch, 2, problem.queries, 16)
    assert not out.any() and (lse == float("-inf")).all()
    for t, g in zip((q, k, v), gradients, strict=True):
        assert g.shape == t.shape and not g.any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("upstream", ["expanded", "transposed", "every other"])
def test_upstream_gradients_of_any_stride(upstream: str, name: str) -> None:
    q, k, v = (t.requires_grad_() for t in Problem(causal=True).inputs())
    shape = (1, 2, 48, 16)
    dout = {
        "expanded": torch.full((), 0.5, device=DEVICE).expand(shape),
        "transposed": torch.randn(16, 48, 2, 1, device=DEVICE).permute(3, 2, 1, 0),
        "every other": torch.randn(1, 2, 96, 32, device=DEVICE)[:, :, ::2, ::2],
    }[upstream]
    with implementation(name) as backend:
        out = fastattn.attention(q, k, v, causal=True, backend=backend)
        ours = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        contiguous = torch.autograd.grad(out, (q, k, v), dout.contiguous())
    for a, b in zip(ours, contiguous, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["triton", "portable", "tiled"])
def test_same_inputs_give_the_same_bits(name: str) -> None:
    problem = Problem(batch=2, heads=4, key_heads=2, queries=90, keys=90, causal=True, dtype=torch.float16)
    inputs = problem.inputs()
    dout = torch.randn(2, 4, 90, 16, device=DEVICE).half()
    with implementation(name) as backend:
        first, second = (_out_and_gradients(inputs, dout, causal=True, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _out_and_gradients(inputs, dout, **options):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = fastattn.attention(*leaves, **options)
    return out, *torch.autograd.grad(out, leaves, dout)


def test_the_tiled_backend_stores_nothing_that_grows_with_the_square_of_the_length() -> None:
    from fastattn.core.attention import portable as attention_portable
    from fastattn.core.attention import tiles

    problem = Problem(heads=1, key_heads=1, queries=4096, keys=4096, width=32, value_width=32, causal=True)
    q, k, v = problem.inputs()
    with LargestTensor() as seen:
        out, lse = attention_portable._tiled_forward(q, k, v, problem.spec, problem.score_tensors())
        attention_portable._tiled_backward(
            torch.ones_like(out), None, Saved(q, k, v, out, lse), problem.spec, problem.score_tensors(), Wanted()
        )
    assert seen.elements <= max(tiles.QUERY_TILE * tiles.KEY_TILE, 4096 * 32)


@pytest.mark.parametrize("name", ["triton", "portable"])
def test_merged_parts_equal_the_whole(name: str) -> None:
    problem = Problem(queries=40, keys=90)
    q, k, v = (t.requires_grad_() for t in problem.inputs())
    with implementation(name) as backend:
        parts = [
            fastattn.attention(q, k[:, :, s], v[:, :, s], return_lse=True, backend=backend)
            for s in (slice(0, 33), slice(33, 90))
        ]
        out, lse = fastattn.merge_states(*parts[0], *parts[1])
        merged = (out, lse, *torch.autograd.grad((out.sum() + lse.sin().sum()), (q, k, v)))
    exact_inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact_out, exact_lse = attention_definition.attention(*exact_inputs, problem.spec)
    exact = (exact_out, exact_lse, *torch.autograd.grad(exact_out.sum() + exact_lse.sin().sum(), exact_inputs))
    eager_out, eager_lse = attention_definition.attention(q, k, v, problem.spec)
    eager = (eager_out, eager_lse, *torch.autograd.grad(eager_out.sum() + eager_lse.sin().sum(), (q, k, v)))
    for a, x, e in zip(merged, exact, eager, strict=True):
        assert_as_exact_as_eager(a.detach(), x.detach(), e.detach())


def test_merging_two_empty_parts_stays_empty_and_sends_no_nan() -> None:
    out = torch.zeros(1, 1, 3, 8, requires_grad=True)
    lse = torch.full((1, 1, 3), float("-inf"), requires_grad=True)
    merged, merged_lse = fastattn.merge_states(out, lse, out, lse)
    gradients = torch.autograd.grad(merged.sum(), (out, lse))
    assert not merged.any() and (merged_lse == float("-inf")).all()
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_backward_of_a_part_is_exact_with_the_merged_state(name: str) -> None:
    problem = Problem(queries=40, keys=90)
    q, k, v = problem.inputs()
    out, lse = attention_definition.attention(q, k, v, problem.spec)
    dout = torch.randn_like(out)
    with implementation(name) as backend:
        parts = [
            fastattn.attention_backward(dout, q, k[:, :, s], v[:, :, s], out, lse, backend=backend)
            for s in (slice(0, 33), slice(33, 90))
        ]
    exact = run(
        [t.double() for t in (q, k, v)],
        (dout.double(), None),
        lambda *t: attention_definition.attention(*t, problem.spec),
    )
    dq, dk, dv = exact[2:]
    torch.testing.assert_close((parts[0][0] + parts[1][0]).double(), dq, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]], 2).double(), dk, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([parts[0][2], parts[1][2]], 2).double(), dv, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("queries", "given", "same"),
    [
        (64, {"causal": True, "window": (63, None)}, {"causal": True}),
        (64, {"window": (63, 0)}, {"causal": True}),
        (64, {"mask": masks.causal() & masks.window(63)}, {"causal": True}),
        (5, {"window": (63, 4)}, {}),
        (1, {"causal": True}, {}),
    ],
)
def test_a_window_that_hides_nothing_changes_no_bit(queries: int, given: dict, same: dict, name: str) -> None:
    q, k, v = Problem(queries=queries, keys=64).inputs()
    dout = torch.randn(1, 2, queries, 16, device=DEVICE)
    with implementation(name) as backend:
        results = (_out_and_gradients((q, k, v), dout, **options, backend=backend) for options in (given, same))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bounds_that_hide_nothing_are_left_out_and_no_others() -> None:
    sides = [None, *range(7)]
    for queries, keys, left, right in itertools.product(range(1, 6), range(1, 6), sides, sides):
        given = AttentionSpec(window=(left, right))
        least = given.at(queries, keys)
        seen = attention_definition.visible(queries, keys, given)
        assert torch.equal(attention_definition.visible(queries, keys, least), seen)
        for side in ("left", "right"):
            if getattr(least, side) is not None:
                without = AttentionSpec(window=(None, least.right) if side == "left" else (least.left, None))
                assert not attention_definition.visible(queries, keys, without).equal(seen)


class Windowed(torch.nn.Module):
    def __init__(self, causal: bool, window: tuple) -> None:
        super().__init__()
        self.options = {"causal": causal, "window": window}

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, k, v, **self.options)


@pytest.mark.parametrize(("causal", "window"), [(False, (5, 0)), (False, (5, 7)), (True, (5, None))])
def test_one_exported_program_serves_lengths_on_both_sides_of_a_window(causal: bool, window: tuple) -> None:
    module = Windowed(causal, window)
    dims = {name: {2: torch.export.Dim(name, min=2, max=512)} for name in ("queries", "keys")}
    shapes = (dims["queries"], dims["keys"], dims["keys"])
    exported = torch.export.export(module, Problem(queries=11, keys=13).inputs(), dynamic_shapes=shapes).module()
    for queries, keys in ((3, 4), (11, 13), (100, 90), (5, 300)):
        inputs = Problem(queries=queries, keys=keys).inputs()
        torch.testing.assert_close(exported(*inputs), module(*inputs))


def test_a_compiled_window_is_compiled_once_for_all_lengths() -> None:
    counter = CompileCounter()
    compiled = torch.compile(Windowed(False, (5, 3)), backend=counter, dynamic=True, fullgraph=True)
    for queries, keys in ((3, 4), (100, 90), (6, 6), (4, 6), (5, 300)):
        q, k, v = Problem(queries=queries, keys=keys).inputs()
        compiled(q.requires_grad_(), k, v).sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("bound", [39, 40, 2**200, 2**31 - 1, 2**63 - 1])
def test_a_window_wider_than_everything_hides_nothing(bound: int, name: str) -> None:
    q, k, v = Problem(queries=20, keys=40).inputs()
    with implementation(name) as backend:
        wide = fastattn.attention(q, k, v, window=(bound, bound), backend=backend)
        torch.testing.assert_close(wide, fastattn.attention(q, k, v, backend=backend))


@pytest.mark.parametrize("name", ["triton", "portable"])
def test_keys_that_no_query_of_a_tile_sees_are_not_read(name: str) -> None:
    q, k, v = Problem(heads=1, key_heads=1, queries=32, keys=1024).inputs()
    lengths = torch.tensor([768], device=DEVICE)
    options = {"causal": True, "window": (300, None), "key_lengths": lengths}
    spoiled = torch.ones(1024, dtype=torch.bool, device=DEVICE)
    spoiled[512:768] = False  # seen, or in one tile of at most 256 with seen ones

    def spoil(t):
        return t.masked_fill(spoiled[:, None], torch.nan)

    with implementation(name) as backend:
        leaves = [t.requires_grad_() for t in (q, spoil(k), spoil(v))]
        out = fastattn.attention(*leaves, **options, backend=backend)
        dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
        clean = fastattn.attention(q, k, v, **options, backend=backend)
    assert torch.equal(out, clean) and torch.isfinite(out).all() and torch.isfinite(dq).all()
    assert not dk[:, :, 768:].any() and not dv[:, :, 768:].any() and not dk[:, :, :512].any()


def tensors(**changes) -> dict[str, object]:
    given_ = {name: torch.zeros(2, 4, 10, 16) for name in ("q", "k", "v")}
    return {**given_, **changes}


def beside_lengths(key_lengths) -> dict[str, object]:
    """Key lengths beside a mask that amounts to key lengths itself."""
    return tensors(key_lengths=key_lengths, mask=masks.key_lengths([5, 6]))


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (tensors(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
        (tensors(k=torch.zeros(4, 10, 16)), ValueError, r"k must have 4 dimensions .* got \(4, 10, 16\)"),
        (tensors(q=torch.zeros(2, 4, 10, 16, dtype=torch.int64)), TypeError, "q must be float16.* got torch.int"),
        (tensors(v=torch.zeros(2, 4, 10, 16).half()), TypeError, "v must have q's dtype .*32, got .*16"),
        (tensors(k=torch.zeros(2, 4, 10, 16, device="meta")), ValueError, "k must be on q's device cpu, got meta"),
        (tensors(k=torch.zeros(3, 4, 10, 16)), ValueError, "k must have q's batch size 2, got 3"),
        (tensors(v=torch.zeros(2, 4, 11, 16)), ValueError, r"v must have k's heads and length .* got \(4, 11\)"),
        (tensors(q=torch.zeros(2, 6, 10, 16)), ValueError, "q's heads must be a multiple of k's heads 4, got 6"),
        (tensors(q=torch.zeros(2, 4, 10, 32)), ValueError, "k must have q's head width 32, got 16"),
        (tensors(v=torch.zeros(2, 4, 10, 0)), ValueError, "v's head width must be at least 1, got 0"),
        (tensors(causal=1), TypeError, "causal must be a bool, got int"),
        (tensors(scale="big"), TypeError, "scale must be a number or None, got str"),
        (tensors(scale=float("nan")), ValueError, "scale must be a number or None, got NaN"),
        (tensors(window=(3, 0, 0)), TypeError, r"window must be a pair \(left, right\), got \(3, 0, 0\)"),
        (tensors(window=(1.5, None)), TypeError, "window must be an integer or None, or a pair .*, got float"),
        (tensors(window=(-1, 0)), ValueError, "window must not be negative, .* got -1"),
        (tensors(softcap=-2.0), ValueError, "softcap must be positive and finite, .* got -2.0"),
        (tensors(softcap="30"), TypeError, "softcap must be a number or None, got str"),
        (tensors(key_lengths=[3.0]), TypeError, "key_lengths must be .* a sequence of integers, got fl"),
        (tensors(key_lengths=torch.zeros(3).int()), ValueError, r"key_lengths must have shape \(2,\), got \(3,\)"),
        (tensors(key_lengths=torch.zeros(2)), TypeError, "key_lengths must be int32 or int64, got torch.float32"),
        (beside_lengths(3), TypeError, "key_lengths must be a tensor or a sequence of integers, got int"),
        (beside_lengths(torch.zeros(3).int()), ValueError, r"key_lengths must have shape \(2,\), got \(3,\)"),
        (beside_lengths(torch.zeros(2)), TypeError, "key_lengths must be int32 or int64, got torch.float32"),
        (beside_lengths(torch.zeros(2).int().to("meta")), ValueError, "key_lengths must be on q's device"),
        (tensors(sinks=torch.zeros(3)), ValueError, r"sinks must have shape \(4,\) or \(2, 4\), got \(3,\)"),
        (tensors(alibi_slopes=torch.ones(4, requires_grad=True)), ValueError, "alibi_slopes must not require"),
        (tensors(backend="cuda"), ValueError, "backend must be one of triton, portable, .* got 'cuda'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments: dict, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        fastattn.attention(**arguments)


def test_attention_backward_checks_what_it_is_given() -> None:
    q = torch.zeros(1, 2, 10, 16)
    out, lse = fastattn.attention(q, q, q, return_lse=True)
    with pytest.raises(ValueError, match=r"dout must have shape \(1, 2, 10, 16\), got \(1, 2, 10, 8\)"):
        fastattn.attention_backward(out[..., :8], q, q, q, out, lse)
    with pytest.raises(TypeError, match=r"lse must be torch\.float32, got torch\.float64"):
        fastattn.attention_backward(out, q, q, q, out, lse.double())
    with pytest.raises(ValueError, match="out_b must have shape"):
        fastattn.merge_states(out, lse, out[:, :, :5], lse)
