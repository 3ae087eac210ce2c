"""torch.nn's attention and transformer modules: ours against theirs, by torch's own samples, and beyond."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from hardware import ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_exact_as_eager
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_samples import assert_same, gradients, leaves, module_samples, tensors

import fastattn
from fastattn import masks
from fastattn.nn.torch_layers import COUNTERPARTS, adopt

MHA, LAYER = fastattn.nn.MultiheadAttention, fastattn.nn.TransformerEncoderLayer


def pair(ours: type[nn.Module], *args, dtype=torch.float64, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Our module and torch's, made from the same seed."""
    modules = []
    for cls in (ours, getattr(nn, ours.__name__)):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nested tensors that an encoder cannot use
            modules.append(cls(*args, **kwargs).to(dtype))
    return modules[0], modules[1]


class Operators(TorchDispatchMode):
    """Counts our operators, and notes the size of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.namespace == "fastattn":
            self.ours.append(function._opname)
        self.largest = max([self.largest, *(t.numel() for t in tensors(results))])
        return results


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "cls, count",
    [
        (nn.MultiheadAttention, 64),
        (nn.TransformerEncoderLayer, 35),
        (nn.TransformerDecoderLayer, 67),
        (nn.Transformer, 64),
        (nn.TransformerEncoder, 35),
    ],
)
def test_torchs_samples_give_torchs_parameters_results_and_gradients(cls, count, training):
    samples = module_samples(cls, training)
    assert len(samples) >= count
    for sample in samples:
        constructed, forward = sample.constructor_input, sample.forward_input
        ours, theirs = pair(COUNTERPARTS[cls], *constructed.args, **constructed.kwargs)
        assert isinstance(ours, cls)
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
        ours.train(training), theirs.train(training)
        inputs = leaves(*forward.args, *forward.kwargs.values())
        with Operators() as operators:
            out = ours(*forward.args, **forward.kwargs)
        assert operators.ours
        expected = theirs(*forward.args, **forward.kwargs)
        assert_same(out, expected, [*inputs, *ours.parameters()], [*inputs, *theirs.parameters()])


@st.composite
def calls(draw):
    """A module and a call of it, with every mask form; some key is always seen."""
    flag = st.booleans()
    heads, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 9]))
    build = {name: draw(flag) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    for name in ("kdim", "vdim"):
        build[name] = draw(st.sampled_from([None, None, 5]))
    sizes = [draw(st.integers(1, 4)) for _ in range(3)]
    form = st.sampled_from([None, "bool", "float"])
    options = {"need_weights": draw(flag), "average_attn_weights": draw(flag)}
    inputs = draw(st.sampled_from(["self", "memory", "three"]))
    return heads, width, build, sizes, inputs, draw(flag), draw(form), draw(form), draw(flag), options, draw(flag)


def mask_of(form, *shape):
    if form is None:
        return None
    if form == "float":
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    return hidden


@settings(max_examples=150)
@given(calls())
def test_any_call_of_multihead_attention_gives_torchs_results_and_gradients(call):
    heads, width, build, (batch, queries, keys), inputs, batched, padding, form, each, options, training = call
    embed = heads * width
    kdim, vdim = build["kdim"] or embed, build["vdim"] or embed
    if inputs == "self":
        keys = queries
    ours, theirs = pair(MHA, embed, heads, **build)
    batch = batch if batched else 1

    def sequence(length, width):
        t = torch.randn(batch, length, width, dtype=torch.float64)
        t = t if build["batch_first"] else t.transpose(0, 1)
        return (t if batched else t.reshape(length, width)).detach().requires_grad_()

    query, key, value = sequence(queries, embed), sequence(keys, kdim), sequence(keys, vdim)
    if inputs != "three" and kdim == vdim:
        value = key
        if inputs == "self" and kdim == embed:
            query = key
    given = {
        "key_padding_mask": mask_of(padding, *([batch, keys] if batched else [keys])),
        "attn_mask": mask_of(form, *([batch * heads] if each else []), queries, keys),
    }
    ours.train(training), theirs.train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of masks of two dtypes
        with Operators() as operators:
            out = ours(query, key, value, **given, **options)
        expected = theirs(query, key, value, **given, **options)
    assert operators.ours  # and not left to torch
    wanted = list({id(t): t for t in leaves(query, key, value, *given.values())}.values())
    assert_same(out, expected, [*wanted, *ours.parameters()], [*wanted, *theirs.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_is_as_exact_as_torchs(dtype, need_weights, masked):
    x, dout = torch.randn(2, 33, 64).to(dtype), torch.randn(2, 33, 64)
    hidden = torch.rand(33, 33) < 0.3
    hidden[:, 0] = False

    def run(module, dtype):
        given = x.to(dtype).requires_grad_()
        mask = hidden if masked else None
        out, weights = module.to(dtype)(given, given, given, attn_mask=mask, need_weights=need_weights)
        assert weights is None or weights.dtype == dtype
        (dx,) = torch.autograd.grad(out, given, dout.to(dtype))
        return [out.detach(), dx] + ([weights.detach()] if need_weights else [])

    ours, theirs = pair(MHA, 64, 4, batch_first=True, dtype=dtype)
    actual, eager, exact = run(ours, dtype), run(theirs, dtype), run(copy.deepcopy(theirs), torch.float64)
    for position, (a, x_, e) in enumerate(zip(actual, exact, eager, strict=True)):
        assert_as_exact_as_eager(a, x_, e, gradient=position == 1, tiny=torch.finfo(dtype).eps)


@pytest.mark.skipif(ON_GPU, reason="computes on the CPU, where Triton's interpreter is off")
def test_the_triton_kernels_serve_masks_appended_keys_and_weights():
    ours, theirs = pair(MHA, 32, 2, add_bias_kv=True, dtype=torch.float32)
    ours.backend = "triton"
    x, mask = torch.randn(5, 2, 32, requires_grad=True), torch.randn(4, 5, 5, requires_grad=True)
    padding = torch.zeros(2, 5).masked_fill(
        torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]]), float("-inf")
    )
    masks = {"attn_mask": mask, "key_padding_mask": padding}
    results, found = [], []
    for module in (ours, theirs):
        results.append(module(x, x, x, **masks))
        found.append(gradients(list(results[-1]), [x, mask, *module.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=2e-5)


# What is_causal says.


def causal_mask(length):
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_a_causal_mask_that_is_said_to_be_one_is_not_read(need_weights, padding):
    ours, theirs = pair(MHA, 32, 4, batch_first=True)
    x = torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    options = {"need_weights": need_weights}
    if padding:
        options["key_padding_mask"] = torch.arange(6).expand(2, 6) >= torch.tensor([[6], [4]])
    unread = torch.full((6, 6), float("nan"), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of masks of two dtypes
        out = ours(x, x, x, attn_mask=unread, is_causal=True, **options)
        expected = theirs(x, x, x, attn_mask=causal_mask(6), **options)
    assert_same(out, expected, [x, *ours.parameters()], [x, *theirs.parameters()])


@pytest.mark.parametrize("queries, keys", [(4, 7), (7, 4)])
def test_the_hint_aligns_top_left_as_torch_does(queries, keys):
    ours, theirs = pair(MHA, 32, 4)
    x, y = torch.randn(queries, 2, 32, dtype=torch.float64), torch.randn(keys, 2, 32, dtype=torch.float64)
    masks = {
        "attn_mask": torch.ones(queries, keys, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.arange(keys).expand(2, keys) == torch.tensor([[1], [2]]),
    }
    expected = theirs(x, y, y, **masks)
    torch.testing.assert_close(ours(x, y, y, **masks, is_causal=True), expected)
    torch.testing.assert_close(ours(x, y, y, **masks, is_causal=True, need_weights=False)[0], expected[0])


def test_appended_keys_are_seen_beside_a_causal_mask():
    ours, theirs = pair(MHA, 32, 4, add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(5, 2, 32, dtype=torch.float64)
    expected = theirs(x, x, x, attn_mask=causal_mask(5))
    torch.testing.assert_close(ours(x, x, x, attn_mask=causal_mask(5), is_causal=True), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_hint_without_a_mask_raises_in_torchs_words(training):
    ours, theirs = pair(MHA, 32, 4, batch_first=True)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError) as expected:
        theirs(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError) as raised, torch.no_grad():
        ours.train(training)(x, x, x, is_causal=True)
    assert str(raised.value) == str(expected.value)


# fastattn's masks. They are aligned bottom-right, here as everywhere: on a rectangle, causal() is not is_causal.

BATCH, HEADS = 2, 4
SHARED, EACH = (torch.rand(8, 8, generator=torch.Generator().manual_seed(i)) < 0.6 for i in (0, 1))
MASKS = {
    "causal": lambda queries, keys: masks.causal(),
    "window": lambda queries, keys: masks.window(2, 1),
    "lengths": lambda queries, keys: masks.key_lengths([2, 3]),
    "prefix": lambda queries, keys: masks.causal() | masks.prefix([1, 3]),
    "dense": lambda queries, keys: masks.from_dense(SHARED[:queries, :keys]),
    "of heads": lambda queries, keys: masks.from_dense(
        torch.stack([SHARED, EACH, ~EACH, ~SHARED])[None, :, :queries, :keys]
    ),
    "counted": lambda queries, keys: masks.blocks(
        torch.tensor([[1, 2], [3, 1]])[: -(-queries // 4), : -(-keys // 4)], 4
    ),
}


def as_torchs(mask, queries, keys):
    """A float tensor (N * H, L, S) that says the same to torch's modules."""
    lists = mask.lower(BATCH, HEADS, queries, keys, closed_forms=False).lists
    _, added = masks.decode(lists, BATCH, HEADS, queries, keys)
    return added.double().reshape(BATCH * HEADS, queries, keys)


@pytest.mark.parametrize("queries, keys", [(6, 6), (4, 7), (7, 4)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "build", [{"batch_first": True}, {}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str
)
@pytest.mark.parametrize("lowered", [False, True], ids=["mask", "lowered"])
def test_fastattns_masks_serve_multihead_attention_with_all_that_stands_beside_them(
    mask, queries, keys, build, lowered
):
    module = MHA(8 * HEADS, HEADS, dtype=torch.float64, **build)
    inputs = [torch.randn(BATCH, n, 32, dtype=torch.float64, requires_grad=True) for n in (queries, keys)]
    query, key = inputs if module.batch_first else [t.transpose(0, 1) for t in inputs]
    mask = MASKS[mask](queries, keys)
    given = mask.lower(BATCH, HEADS, queries, keys) if lowered else mask
    for padding in (None, torch.arange(keys).expand(2, -1) == torch.tensor([[1], [2]])):
        added = None if padding is None else torch.zeros(BATCH, keys).double().masked_fill(padding, float("-inf"))
        for options in ({}, {"average_attn_weights": False}, {"need_weights": False}):
            out = module(query, key, key, padding, attn_mask=given, **options)
            expected = module(query, key, key, added, attn_mask=as_torchs(mask, queries, keys), **options)
            wanted = [*inputs, *module.parameters()]
            assert_same(out, expected, wanted, wanted)


def test_a_causal_mask_of_fastattns_is_torchs_hint_on_a_square_and_bottom_right_on_a_rectangle():
    module = MHA(32, HEADS, batch_first=True, dtype=torch.float64)
    x, y = torch.randn(BATCH, 4, 32, dtype=torch.float64), torch.randn(BATCH, 7, 32, dtype=torch.float64)
    hint = {"attn_mask": causal_mask(4), "is_causal": True}
    torch.testing.assert_close(module(x, x, x, attn_mask=masks.causal()), module(x, x, x, **hint))
    bottom_right = torch.ones(4, 7, dtype=torch.bool).triu(4)
    out = module(x, y, y, attn_mask=masks.causal())
    torch.testing.assert_close(out, module(x, y, y, attn_mask=bottom_right))
    unbatched = module(x[0], y[0], y[0], attn_mask=masks.causal())
    torch.testing.assert_close(unbatched, tuple(t[0] for t in out))


@pytest.mark.parametrize("training", [True, False])
def test_fastattns_masks_serve_every_mask_of_torchs_layers_and_stacks(training):
    queries, keys = 5, 7
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    model = fastattn.nn.Transformer(32, HEADS, 2, 2, 64, **options).train(training)
    source, target = (torch.randn(BATCH, n, 32, dtype=torch.float64, requires_grad=True) for n in (keys, queries))
    ours = {"src_mask": masks.window(2, 2), "tgt_mask": masks.causal(), "memory_mask": masks.window(1, 3)}
    theirs = {
        name: as_torchs(mask, *{"s": (keys, keys), "t": (queries, queries), "m": (queries, keys)}[name[0]])
        for name, mask in ours.items()
    }
    padding = torch.arange(keys).expand(2, -1) >= torch.tensor([[7], [5]])
    added = torch.zeros(BATCH, keys).double().masked_fill(padding, float("-inf"))
    out = model(source, target, **ours, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    expected = model(source, target, **theirs, src_key_padding_mask=added, memory_key_padding_mask=added)
    wanted = [source, target, *model.parameters()]
    assert_same(out, expected, wanted, wanted)
    lowered = ours["src_mask"].lower(BATCH, HEADS, keys, keys)
    torch.testing.assert_close(model.encoder(source, lowered), model.encoder(source, theirs["src_mask"]))
    layer = model.encoder.layers[0]
    torch.testing.assert_close(layer(source, lowered), layer(source, theirs["src_mask"]))


def test_fastattns_masks_serve_modules_that_patch_swapped_and_compiled_ones():
    layer = nn.TransformerEncoderLayer(32, HEADS, 64, 0.0, batch_first=True)
    fastattn.patch(layer)
    x, mask = torch.randn(BATCH, 6, 32), masks.causal() & masks.dilated(2)
    expected = layer(x, as_torchs(mask, 6, 6).float())
    torch.testing.assert_close(layer(x, mask), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask.lower(BATCH, HEADS, 6, 6)), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attn_mask": masks.causal(), "is_causal": True}, ValueError, "is_causal must be False .* attn_mask"),
        (
            {"key_padding_mask": masks.key_lengths([3, 4])},
            TypeError,
            "key_padding_mask must be a tensor.*attn_mask",
        ),
        ({"attn_mask": masks.causal().lower(2, 4, 5, 5)}, ValueError, "mask was lowered for .* 5 queries"),
        ({"attn_mask": masks.key_lengths([3, 4, 5])}, ValueError, "3"),
    ],
)
def test_fastattns_masks_that_cannot_stand_here_are_refused(options, error, message):
    x = torch.randn(2, 6, 32)
    with pytest.raises(error, match=message):
        MHA(32, 4, batch_first=True)(x, x, x, **options)


def test_an_encoder_refuses_the_hint_beside_a_fastattn_mask():
    encoder = fastattn.nn.TransformerEncoder(LAYER(32, 4, 64, batch_first=True), 1)
    with pytest.raises(ValueError, match="is_causal must be False"):
        encoder(torch.randn(2, 6, 32), masks.causal(), is_causal=True)


# Weights.


@pytest.mark.parametrize("dropout", [0.25, 1.0])
def test_the_weights_returned_are_those_that_were_used(dropout):
    module = MHA(32, 4, dropout=dropout, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    torch.manual_seed(2)
    out, each = module(x, x, x, average_attn_weights=False)
    torch.manual_seed(2)
    again, average = module(x, x, x)
    _, _, v = (module._heads(t) for t in module._project(x, x, x))
    torch.testing.assert_close(module._out((each @ v).transpose(1, 2)), out)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(average, each.mean(1))
    assert each.eq(0).double().mean() == pytest.approx(dropout, abs=0.02)
    kept = module.eval()(x, x, x, average_attn_weights=False)[1] / (1 - dropout)
    torch.testing.assert_close(each[each > 0], kept[each > 0])


def test_averaged_weights_and_their_gradients_make_no_tensor_of_all_heads():
    length, heads = 1024, 8
    module = MHA(8 * heads, heads, batch_first=True)
    x = torch.randn(1, length, 8 * heads, requires_grad=True)
    with Operators() as operators:
        out, weights = module(x, x, x)
        torch.autograd.grad([out, weights], x, [torch.randn_like(out), torch.randn_like(weights)])
    assert operators.largest <= length * length < heads * length * length


@pytest.mark.parametrize("average", [True, False])
def test_weights_have_derivatives_in_both_modes_and_second_ones(average):
    module = MHA(4, 2, dtype=torch.float64)
    x = torch.randn(3, 1, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(x, mask):
        return module(x, x, x, attn_mask=mask, average_attn_weights=average)

    assert torch.autograd.gradcheck(call, (x, mask), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, mask))


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_empty_batch_gives_torchs_empty_results(batch_first):
    ours, theirs = pair(MHA, 32, 4, batch_first=batch_first)
    query, key = (torch.randn(0, n, 32, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    inputs = [t if batch_first else t.transpose(0, 1) for t in (query, key)]
    masks = {"key_padding_mask": torch.zeros(0, 7).bool(), "attn_mask": torch.zeros(0, 5, 7).bool()}
    out, expected = (module(*inputs, inputs[1], **masks) for module in (ours, theirs))
    assert_same(out, expected, [query, key, *ours.parameters()], [query, key, *theirs.parameters()])


@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_that_see_nothing_give_zero_not_nan(need_weights):
    module = MHA(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32, requires_grad=True)
    hidden = torch.tensor([[False] * 5, [True] * 5])
    out, weights = module(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
    torch.testing.assert_close(out[1], module.out_proj.bias.expand(5, 32))
    assert weights is None or not weights[1].any()
    loss = out.square().sum() + (0.0 if weights is None else weights.square().sum())
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [x, *module.parameters()]))


# Layers and stacks.


def test_layers_run_on_ours_in_eval_mode_too_where_torch_runs_past_its_attention():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = fastattn.nn.TransformerEncoder(layer, 3, backend="reference").eval()
    theirs = nn.TransformerEncoder(layer, 3).eval()
    theirs.load_state_dict(encoder.state_dict())
    x, hidden = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False, False, False, True, True]])
    with torch.no_grad(), Operators() as operators:
        out = encoder(x, src_key_padding_mask=hidden)
    assert operators.ours == ["attention_forward"] * 3
    with torch.no_grad():
        torch.testing.assert_close(out, theirs(x, src_key_padding_mask=hidden))
    assert all(layer.self_attn.backend == "reference" for layer in encoder.layers)
    assert type(layer) is nn.TransformerEncoderLayer


def test_a_transformer_detects_causal_masks_as_torchs_does():
    ours, theirs = pair(fastattn.nn.Transformer, 32, 4, 1, 1, 64, dropout=0.0, batch_first=True)
    source, target = (torch.randn(2, n, 32, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    out, expected = (m(source, target, tgt_mask=causal_mask(5)) for m in (ours, theirs))
    assert_same(out, expected, [source, target, *ours.parameters()], [source, target, *theirs.parameters()])
    assert all(type(m) not in COUNTERPARTS for m in ours.modules())


def test_custom_parts_of_a_transformer_stay_as_they_are():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)
    model = fastattn.nn.Transformer(32, 4, 1, 1, 64, custom_encoder=encoder, batch_first=True)
    assert model.encoder is encoder and type(encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder.layers[0]) is fastattn.nn.TransformerDecoderLayer


def test_adopting_changes_nothing_but_the_class_and_leaves_derived_classes():
    class Derived(nn.TransformerEncoderLayer):
        def forward(self, src, **_):
            return src

    model = nn.ModuleList([nn.TransformerDecoderLayer(32, 4, 64), Derived(32, 4, 64)])
    parameters = list(model.parameters())
    adopt(model, "reference")
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert type(model[0].multihead_attn) is MHA and model[0].multihead_attn.backend == "reference"
    assert type(model[1]) is Derived


def test_modules_are_copied_pickled_and_saved():
    model = LAYER(32, 4, 64, backend="reference").eval()
    x = torch.randn(5, 2, 32)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)
    for other in others:
        assert type(other) is LAYER and other.self_attn.backend == "reference"
        assert torch.equal(other(x), model(x))


# Nested tensors.


def nested(*lengths, width=32):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        return torch.nested.nested_tensor([torch.randn(n, width, dtype=torch.float64) for n in lengths])


@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_nested_tensors_give_torchs_results(options):
    ours, theirs = (m.eval() for m in pair(MHA, 32, 4, batch_first=True))
    x = nested(3, 5)
    with torch.no_grad():
        (out, weights), (expected, expected_weights) = ours(x, x, x, **options), theirs(x, x, x, **options)
    torch.testing.assert_close(out.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("norm_first", [True, False])
def test_nested_tensors_pass_a_layer_in_eval_mode_and_in_training(norm_first):
    ours, theirs = pair(LAYER, 32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    x = nested(3, 5)
    with torch.no_grad():
        expected = theirs.eval()(x).to_padded_tensor(0.0)
        torch.testing.assert_close(ours.eval()(x).to_padded_tensor(0.0), expected)
    padded = x.to_padded_tensor(0.0)
    hidden = torch.arange(5).expand(2, 5) >= torch.tensor([[3], [5]])
    out = ours.train()(x).to_padded_tensor(0.0)
    expected = theirs.train()(padded, src_key_padding_mask=hidden).masked_fill(hidden[..., None], 0.0)
    assert_same(out, expected, list(ours.parameters()), list(theirs.parameters()))


# Errors, warnings, and what is left to torch.

X, Y = torch.randn(5, 2, 32), torch.randn(7, 2, 32)
BAD_CALLS = {
    "one dimension": {"query": torch.randn(32)},
    "ranks that differ": {"key": torch.randn(7, 32)},
    "width": {"query": torch.randn(5, 2, 31)},
    "lengths of key and value": {"value": torch.randn(6, 2, 32)},
    "attn_mask's size": {"attn_mask": torch.zeros(5, 6)},
    "attn_mask's batch": {"attn_mask": torch.zeros(7, 5, 7)},
    "attn_mask's rank": {"attn_mask": torch.zeros(1, 1, 5, 7)},
    "attn_mask's dtype": {"attn_mask": torch.zeros(5, 7, dtype=torch.int64)},
    "key_padding_mask's size": {"key_padding_mask": torch.zeros(2, 6, dtype=torch.bool)},
    "key_padding_mask's batch": {"key_padding_mask": torch.zeros(3, 7, dtype=torch.bool)},
    "key_padding_mask's rank": {"key_padding_mask": torch.zeros(7, dtype=torch.bool)},
    "key_padding_mask's dtype": {"key_padding_mask": torch.zeros(2, 7, dtype=torch.int32)},
    "query's dtype": {"query": X.double()},
    "integers": {"query": torch.ones(5, 2, 32, dtype=torch.int64)},
    "nested with masks": {
        "query": nested(3, 5), "key": nested(3, 5), "value": nested(3, 5),
        "key_padding_mask": torch.zeros(2, 5, dtype=torch.bool),
    },
    "nested memory": {"query": nested(3, 5), "key": nested(3, 5), "value": nested(3, 5)},
}  # fmt: skip


@pytest.mark.parametrize("changes", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_what_torch_refuses_is_refused_in_its_words(changes):
    ours, theirs = pair(MHA, 32, 4, dtype=torch.float32)
    arguments = {"query": X, "key": Y, "value": Y, **changes}
    with pytest.raises(Exception) as expected:
        theirs(**arguments)
    with pytest.raises(type(expected.value)) as raised:
        ours(**arguments)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("ours", [MHA, LAYER])
def test_masks_of_two_dtypes_bring_torchs_warning(ours):
    ours, theirs = pair(ours, 32, 4)
    x = torch.randn(5, 2, 32, dtype=torch.float64)
    names = ("key_padding_mask", "attn_mask") if isinstance(ours, MHA) else ("src_key_padding_mask", "src_mask")
    masks = dict(zip(names, (torch.zeros(2, 5, dtype=torch.bool), torch.zeros(5, 5).double()), strict=True))
    texts = []
    for module in (ours, theirs):
        with pytest.warns(UserWarning, match="deprecated") as caught:
            module(*[x] * (3 if isinstance(ours, MHA) else 1), **masks)
        texts.append(str(caught[0].message))
    assert texts[0] == texts[1]


def test_a_bias_of_another_dtype_is_left_to_torch():
    ours, theirs = pair(MHA, 32, 4, batch_first=True)
    for module in (ours, theirs):
        module.in_proj_bias = nn.Parameter(torch.linspace(-1, 1, 96).half())
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch computes it
        torch.testing.assert_close(ours(x, x, x), theirs(x, x, x), rtol=0, atol=0)


@pytest.mark.parametrize(("width", "heads"), [(5, 5), (512, 1)])
def test_heads_of_any_width_are_ours(width, heads):
    ours, theirs = pair(MHA, width, heads)
    x = torch.randn(3, 1, width, dtype=torch.float64)
    with warnings.catch_warnings(), Operators() as operators:
        warnings.simplefilter("error")
        out = ours(x, x, x)
    assert operators.ours
    torch.testing.assert_close(out, theirs(x, x, x))


def test_what_is_left_to_torch_a_warning_says_once(monkeypatch):
    monkeypatch.setattr(fastattn.core.attention.sdpa, "_said", set())
    ours, _ = pair(MHA, 32, 4, batch_first=True)
    ours.in_proj_bias = nn.Parameter(torch.zeros(96).half())
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with pytest.warns(UserWarning, match="the dtypes differ; PyTorch's own module computes it"):
        ours(x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(x, x, x)


# Autocast, compilation, transforms.


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_gives_torchs_dtypes(need_weights):
    ours, theirs = pair(MHA, 32, 4, dtype=torch.float32)
    x = torch.randn(5, 2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = (tensors(m(x, x, x, need_weights=need_weights)) for m in (ours, theirs))
    assert [t.dtype for t in out] == [t.dtype for t in expected]
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.02)


def test_a_decoder_layer_and_averaged_weights_compile_into_one_graph():
    layer = fastattn.nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0)
    x, memory = torch.randn(5, 2, 32, requires_grad=True), torch.randn(7, 2, 32)

    def call(x):
        return layer(x, memory), layer.self_attn(x, x, x)[1]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), call(x), [x, *layer.parameters()], [x, *layer.parameters()])


def test_gradients_per_sample_come_of_vmap():
    module = MHA(16, 2, batch_first=True, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    xs = torch.randn(3, 1, 5, 16, dtype=torch.float64)

    def loss(parameters, x):
        return sum(r.square().sum() for r in torch.func.functional_call(module, parameters, (x, x, x)))

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, xs)
    one_by_one = [torch.func.grad(loss)(parameters, x) for x in xs]
    for name, gradient in per_sample.items():
        torch.testing.assert_close(gradient, torch.stack([each[name] for each in one_by_one]))
