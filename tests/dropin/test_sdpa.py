"""scaled_dot_product_attention: torch's function by its own samples, and beyond; and the takeover of it."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from hardware import ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_exact_as_eager
from torch import library
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    register_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch_samples import assert_same, gradients, leaves, sdpa_samples

import fastattn
from fastattn import masks
from fastattn.core.attention import sdpa as torch_sdpa
from fastattn.dropin import takeover

ours, theirs = fastattn.scaled_dot_product_attention, F.scaled_dot_product_attention


def qkv(*, leading=(2, 4), queries=5, keys=9, width=16, value_width=None, dtype=torch.float64):
    shapes = ((queries, width), (keys, width), (keys, value_width or width))
    return [torch.randn(*leading, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_torchs_samples_give_torchs_results_and_gradients():
    samples = sdpa_samples(dropout=False)
    assert len(samples) >= 13
    for sample in samples:
        inputs = leaves(sample.input, *sample.args, *sample.kwargs.values())
        arguments = (sample.input, *sample.args)
        assert_same(ours(*arguments, **sample.kwargs), theirs(*arguments, **sample.kwargs), inputs, inputs)


def test_torchs_samples_with_dropout_drop_what_the_generator_says():
    samples = sdpa_samples(dropout=True)
    assert len(samples) >= 12
    for sample in samples:
        (key, value), p = sample.args, sample.kwargs["dropout_p"]
        torch.manual_seed(3)
        out = ours(sample.input, key, value, **sample.kwargs)
        scores = sample.input @ key.mT * key.shape[-1] ** -0.5
        if sample.kwargs["is_causal"]:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
        *leading, queries, keys = scores.shape
        *batches, heads = leading if len(leading) > 1 else (*leading, 1)
        torch.manual_seed(3)
        state = fastattn.dropout_state(torch.Size(batches).numel())
        keep = fastattn.dropout_mask(state, p, heads, queries, keys).view(scores.shape)
        torch.testing.assert_close(out, scores.softmax(-1) * keep / (1 - p) @ value)


@st.composite
def calls(draw):
    """Shapes and options that torch takes, and most of them at once."""
    size = st.integers(1, 7)
    leading = draw(st.lists(st.integers(1, 3), max_size=4))
    group = draw(st.sampled_from([1, 2, 3]))
    gqa = bool(leading) and group > 1
    width, value_width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    queries, keys = draw(size), draw(size)
    heads = [leading[-1] * group] if gqa else leading[-1:]
    scores = [*leading[:-1], *heads, queries, keys]
    mask = draw(st.sampled_from([None, "causal", "bool", "float"]))
    shape = [1 if draw(st.booleans()) else n for n in scores][draw(st.integers(0, len(leading))) :]
    shared = not gqa and draw(st.booleans())  # one set of keys for the whole batch
    scale = draw(st.sampled_from([None, 0.3]))
    return (
        (leading[:-1] + heads, queries, width),
        (leading, keys, width, value_width),
        mask,
        shape,
        shared,
        gqa,
        scale,
    )


@settings(max_examples=120)
@given(calls())
def test_any_shape_and_mask_that_torch_takes_gives_torchs_results_and_gradients(call):
    (q_leading, queries, width), (leading, keys, _, value_width), mask, mask_shape, shared, gqa, scale = call
    key_leading = leading[1:] if shared else leading
    query = torch.randn(*q_leading, queries, width, dtype=torch.float64, requires_grad=True)
    key = torch.randn(*key_leading, keys, width, dtype=torch.float64, requires_grad=True)
    value = torch.randn(*key_leading, keys, value_width, dtype=torch.float64, requires_grad=True)
    options = {"is_causal": mask == "causal", "scale": scale, "enable_gqa": gqa}
    if mask == "bool":
        options["attn_mask"] = torch.rand(mask_shape) < 0.7
        options["attn_mask"][..., 0] = True
    elif mask == "float":
        options["attn_mask"] = torch.randn(mask_shape, dtype=torch.float64, requires_grad=True)
    inputs = leaves(query, key, value, *options.values())
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("error")  # nothing is left to torch
        out = ours(query, key, value, **options)
        assert_same(out, theirs(query, key, value, **options), inputs, inputs)


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"leading": (0,)},
        {"leading": (0, 4)},
        {"leading": (2, 0, 4)},
        {"queries": 0},
        {"queries": 0, "leading": ()},
        {"keys": 0},
        {"keys": 0, "leading": (3,)},
    ],
    ids=str,
)
def test_nothing_to_attend_from_or_to_gives_what_torch_gives(sizes, mask):
    inputs = query, key, _ = qkv(**sizes)
    attn_mask = None if mask is None else torch.ones(*query.shape[:-1], key.shape[-2], dtype=mask)
    assert_same(ours(*inputs, attn_mask), theirs(*inputs, attn_mask), inputs, inputs)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3, 4)], ids=str)
def test_results_of_other_than_four_dimensions_are_contiguous_as_torchs(leading, masked):
    inputs = qkv(leading=leading)
    attn_mask = torch.rand(*leading, 5, 9) < 0.7 if masked else None
    assert theirs(*inputs, attn_mask).is_contiguous()
    assert ours(*inputs, attn_mask).is_contiguous()


def test_results_of_four_dimensions_have_their_heads_joined_without_a_copy():
    out = ours(*qkv(leading=(2, 4)))
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", ["plain", "causal", "bool mask", "float mask"])
def test_half_precision_is_as_exact_as_torchs_formula(dtype, option):
    inputs = qkv(queries=33, keys=47, dtype=dtype)
    masks = {"bool mask": torch.rand(2, 1, 33, 47) < 0.7, "float mask": torch.randn(33, 47).to(dtype)}
    mask, dout = masks.get(option), torch.randn(2, 4, 33, 16)

    def run(function, dtype):
        given = [t.detach().to(dtype).requires_grad_() for t in inputs]
        its_mask = mask.to(dtype) if option == "float mask" else mask
        out = function(*given, attn_mask=its_mask, is_causal=option == "causal")
        return [out.detach(), *torch.autograd.grad(out, given, dout.to(dtype))]

    actual = run(ours, dtype)
    with sdpa_kernel(SDPBackend.MATH):
        exact, eager = run(theirs, torch.float64), run(theirs, dtype)
    for position, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        # The gradients are made of the rounded output.
        assert_as_exact_as_eager(a, x, e, gradient=position > 0, tiny=torch.finfo(dtype).eps)


def test_rows_that_see_nothing_give_zero_output_and_zero_gradients():
    q, k, v = qkv()
    seen = torch.ones(5, 9, dtype=torch.bool)
    seen[2] = False
    out = ours(q, k, v, seen)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert out[:, :, 2].eq(0).all() and dq[:, :, 2].eq(0).all() and out.isfinite().all() and dq.isfinite().all()


def test_dropping_everything_gives_zero_output_and_zero_gradients():
    q, k, v = qkv()
    out = ours(q, k, v, dropout_p=1.0)
    assert not out.any() and not torch.autograd.grad(out.sum(), q)[0].any()


@pytest.mark.parametrize("bias, queries, keys", [(causal_upper_left, 5, 9), (causal_lower_right, 5, 9)])
def test_torchs_causal_biases_are_known_by_their_alignment(bias, queries, keys):
    inputs = qkv(queries=queries, keys=keys)
    assert_same(ours(*inputs, bias(queries, keys)), theirs(*inputs, bias(queries, keys)), inputs, inputs)


@pytest.mark.parametrize("queries, keys", [(6, 6), (5, 9), (9, 5)])
@pytest.mark.parametrize("leading", [(), (4,), (2, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("lowered", [False, True], ids=["mask", "lowered"])
def test_fastattns_masks_serve_at_their_own_alignment(queries, keys, leading, lowered):
    inputs = query, key, value = qkv(leading=leading, queries=queries, keys=keys)
    # torch takes a single leading dimension for the batch.
    batches, heads = (leading[:-1], leading[-1]) if len(leading) > 1 else (leading, 1)
    batch = torch.Size(batches).numel()
    seen = torch.rand(heads, queries, keys) < 0.6
    for mask in (masks.causal(), masks.window(2, 1), masks.from_dense(seen) | masks.window(0, 0)):
        given = mask.lower(batch, heads, queries, keys) if lowered else mask
        dense = mask.dense(batch, heads, queries, keys)
        out = ours(query, key, value, given)
        assert_same(out, ours(query, key, value, dense[0] if len(leading) > 1 else dense[0, 0]), inputs, inputs)
    if queries <= keys:
        bottom_right = ours(query, key, value, causal_lower_right(queries, keys))
        torch.testing.assert_close(ours(query, key, value, masks.causal()), bottom_right)
    if queries == keys:
        torch.testing.assert_close(ours(query, key, value, is_causal=True), bottom_right)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: ours(q, k, v, masks.causal(), is_causal=True), "is_causal must be False .* attn_mask"),
        (lambda q, k, v: ours(q, k, v, masks.causal(), dropout_p=2.0), "attn_mask .* PyTorch .* dropout_p is 2"),
        (lambda q, k, v: ours(q, k, v, masks.causal().lower(2, 4, 3, 3)), "mask was lowered for .* 3 queries"),
    ],
)
def test_fastattns_masks_that_cannot_stand_here_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*qkv())


def test_autocast_casts_as_it_does_for_torch():
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(q, k.half(), v), theirs(q, k.half(), v)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


def test_compiles_into_one_graph():
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    inputs = qkv()
    assert_same(compiled(*inputs, is_causal=True), theirs(*inputs, is_causal=True), inputs, inputs)


def plain(**changes):
    return {"query": torch.randn(2, 3, 8), "key": torch.randn(2, 5, 8), "value": torch.randn(2, 5, 8), **changes}


@pytest.mark.parametrize(
    "arguments",
    [
        plain(attn_mask=torch.ones(3, 5, dtype=torch.bool), is_causal=True),
        plain(key=torch.randn(2, 5, 8).double()),
        plain(query=torch.randn(8)),
        plain(key=torch.randn(2, 5, 7)),
        plain(value=torch.randn(2, 4, 8)),
        plain(key=torch.randn(3, 5, 8)),
        plain(attn_mask=torch.ones(3, 4)),
        plain(attn_mask=torch.ones(3, 5, dtype=torch.int64)),
        plain(dropout_p=1.5),
        plain(key=torch.randn(3, 5, 8), value=torch.randn(3, 5, 8), enable_gqa=True),
        plain(query=None),
        plain(query=torch.ones(2, 3, 8, dtype=torch.int64)),
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(arguments):
    inputs = [arguments.pop(name) for name in ("query", "key", "value")]
    with pytest.raises(Exception) as expected:
        theirs(*inputs, **arguments)
    with pytest.raises(type(expected.value)) as raised:
        ours(*inputs, **arguments)
    assert str(raised.value) == str(expected.value)


def test_what_only_torch_has_it_computes_and_a_warning_says_so_once(monkeypatch):
    monkeypatch.setattr(torch_sdpa, "_said", set())
    inputs = qkv()
    inputs[:2] = (t[..., :0] for t in inputs[:2])
    with pytest.warns(UserWarning, match="head width is 0; PyTorch's own function computes it"):
        out = ours(*inputs)
    assert torch.equal(out, theirs(*inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(*inputs)


@pytest.mark.parametrize("width", [1, 7, 320, 512])
def test_heads_of_any_width_are_ours(width):
    inputs = qkv(width=width)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(ours(*inputs, is_causal=True), theirs(*inputs, is_causal=True), inputs, inputs)


# The takeover.


def operators_run(function) -> dict[str, int]:
    """How often each operator ran within a call, those inside other operators too."""
    with torch.autograd.profiler.profile() as events:
        function()
    return {event.key: event.count for event in events.key_averages()}


CALLS = {
    "plain": {},
    "causal, not square": {"is_causal": True},
    "boolean mask": {"attn_mask": torch.rand(5, 9) < 0.7},
    "float mask": {"attn_mask": torch.randn(2, 1, 5, 9)},
    "negative scale": {"scale": -0.3},
    "grouped heads": {"enable_gqa": True},
}


@pytest.fixture
def inputs():
    return qkv(dtype=torch.float32)


def step(inputs, call) -> list[torch.Tensor]:
    """Output and gradients of torch's own function."""
    q, k, v = inputs
    if "enable_gqa" in call:
        k, v = k[:, :2], v[:, :2]
    out = theirs(q, k, v, **call)
    return [out, *gradients([out], inputs)]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("backend", [None, "reference"])
def test_within_the_takeover_torchs_function_is_ours_and_after_it_what_it_was(call, backend, inputs):
    before = step(inputs, call)
    with fastattn.sdpa(backend):
        within = step(inputs, call)
        ran = operators_run(lambda: step(inputs, call))
    assert ran["fastattn::attention_forward"] == ran["fastattn::attention_backward"] == 1
    torch.testing.assert_close(within, before)
    assert [t.stride() for t in within] == [t.stride() for t in before]
    after = step(inputs, call)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not any("fastattn" in name for name in operators_run(lambda: step(inputs, call)))


@pytest.mark.skipif(ON_GPU, reason="computes on the CPU, where Triton's interpreter is off")
def test_the_triton_kernels_serve_the_takeover():
    inputs = qkv(leading=(1, 2), dtype=torch.float32)
    expected = step(inputs, {"is_causal": True})
    with fastattn.sdpa("triton"):
        torch.testing.assert_close(step(inputs, {"is_causal": True}), expected, rtol=1e-4, atol=1e-5)


def test_importing_takes_nothing_over_and_the_switch_says_where_it_stands():
    assert not fastattn.sdpa.active and "not active" in repr(fastattn.sdpa)
    fastattn.sdpa.activate()
    try:
        assert fastattn.sdpa.active and current_flash_attention_impl() == "fastattn"
    finally:
        fastattn.sdpa.deactivate()
    assert not fastattn.sdpa.active
    fastattn.sdpa.deactivate()  # nothing to do
    with pytest.raises(ValueError, match="backend must be one of triton"):
        fastattn.sdpa.activate("cuda")


def test_torchs_module_runs_on_ours_within_the_takeover():
    module, x = torch.nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 5, 32)
    expected = module(x, x, x, need_weights=False)[0]
    with fastattn.sdpa():
        ran = operators_run(lambda: module(x, x, x, need_weights=False))
        torch.testing.assert_close(module(x, x, x, need_weights=False)[0], expected)
    assert ran["fastattn::attention_forward"] == 1


def test_our_own_function_does_not_go_in_circles_within_the_takeover(inputs):
    expected = ours(*inputs)
    with fastattn.sdpa():
        torch.testing.assert_close(ours(*inputs), expected)


def test_the_block_restores_what_was_active_before_it_even_when_it_fails(inputs):
    class Other:
        def remove(self):
            pass

    register_flash_attention_impl("other", register_fn=Other)
    activate_flash_attention_impl("other")
    try:
        with pytest.raises(KeyError), fastattn.sdpa():
            raise KeyError
        assert current_flash_attention_impl() == "other"
        fastattn.sdpa.deactivate()  # not ours to take away
        assert current_flash_attention_impl() == "other"
    finally:
        restore_flash_attention_impl()
    with fastattn.sdpa("reference"):
        with fastattn.sdpa("portable"):
            pass
        ran = operators_run(lambda: theirs(*inputs))
        assert ran["aten::_scaled_dot_product_flash_attention_for_cpu"] == 1  # portable would call it once more
    assert not fastattn.sdpa.active


def test_heads_wider_than_ours_stay_torchs_within_the_takeover():
    inputs = qkv(width=300, dtype=torch.float32)
    expected = step(inputs, {})
    with fastattn.sdpa():
        assert all(torch.equal(a, b) for a, b in zip(step(inputs, {}), expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_within_the_takeover_a_gpus_flash_calls_are_ours(dropout_p):
    inputs = [t.detach().cuda().requires_grad_() for t in qkv(queries=65, keys=65, width=64, dtype=torch.float16)]
    torch.manual_seed(5)
    expected = fastattn.attention(*inputs, causal=True, dropout_p=dropout_p)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), fastattn.sdpa():
        torch.manual_seed(5)
        out = theirs(*inputs, is_causal=True, dropout_p=dropout_p)
        assert_same(out, expected, inputs, inputs)
        ran = operators_run(lambda: theirs(*inputs, is_causal=True, dropout_p=dropout_p).sum().backward())
    assert ran["fastattn::attention_forward"] == ran["fastattn::attention_backward"] == 1


@pytest.fixture
def gpu_operators_on_cpu():
    """The operators that we give to GPUs, registered on the CPU, where PyTorch has none of this name."""
    installed, operators = library.Library("aten", "IMPL"), takeover._Operators("reference")
    name = "_scaled_dot_product_flash_attention"
    installed.impl(name, operators.forward_on_gpu, "CPU")
    installed.impl(f"{name}_backward", operators.backward_on_gpu, "CPU")
    yield getattr(torch.ops.aten, name)
    installed._destroy()
    operators.remove()


@pytest.mark.parametrize("causal, dropout_p", [(False, 0.0), (True, 0.4)])
def test_the_operators_of_the_gpu_hand_their_random_numbers_to_the_backward(
    causal, dropout_p, gpu_operators_on_cpu
):
    inputs = qkv(queries=6, keys=9)
    torch.manual_seed(5)
    out, lse, *_ = gpu_operators_on_cpu(*inputs, dropout_p, causal, scale=0.3)
    torch.manual_seed(5)
    expected, expected_lse = fastattn.attention(
        *inputs, causal=causal, dropout_p=dropout_p, scale=0.3, return_lse=True, backend="reference"
    )
    assert_same(out, expected, inputs, inputs)
    torch.testing.assert_close(lse, expected_lse)
