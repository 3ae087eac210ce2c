"""Under `invariant` the bits of a token in MLPs, losses and models do not depend on the other tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hardware import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_exact_as_eager
from torch import Tensor

import fastattn
from fastattn import nn
from fastattn.core import invariance, rows
from fastattn.core.loss import functional as loss_functional
from fastattn.nn.decoding_cache import DecodingCache

NAN = float("nan")
Function = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Layer:
    """Of these widths; `make` takes them to a function of tokens (T, width)."""

    kind: str = "gated"
    width: int = 24
    hidden: int = 40
    dtype: torch.dtype = torch.float32
    backend: str = "portable"
    seed: int = 0

    def drawn(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + sum(shape))
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE, self.dtype)

    def tokens(self, count: int) -> Tensor:
        return 3 * self.drawn(count, self.width)

    @property
    def function(self) -> Function:
        up, gate, down = (self.drawn(self.hidden, self.width), self.drawn(self.hidden, self.width),
                          self.drawn(self.width, self.hidden))  # fmt: skip
        bias = self.drawn(self.hidden)
        if self.kind == "linear":
            return lambda x: (fastattn.by_rows(lambda part: F.linear(part, up, bias), x),)
        if self.kind == "mlp":
            given: dict[str, Any] = {"activation": "gelu_tanh", "save": "int8", "backend": self.backend}
            return lambda x: (fastattn.mlp(x, up, bias, down, None, **given),)
        if self.kind == "branch":
            given = {"norm": "rms", "save": "nothing", "backend": self.backend}
            return lambda x: (fastattn.mlp(x, up, bias, down, None, residual=x, **given),)
        if self.kind == "gated":
            return lambda x: (fastattn.gated_mlp(x, gate, up, down, residual=2 * x, backend=self.backend),)
        return self.loss

    def loss(self, x: Tensor) -> Sequence[Tensor]:
        """A token's class is the largest of its first elements; some do not count. NaN is class 0."""
        weight = self.drawn(self.hidden, self.width)
        target = x[:, : min(self.width, self.hidden)].detach().nan_to_num().argmax(1)
        target = torch.where(target == 1, -100, target)
        given: dict[str, Any] = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.1, "reduction": "none"}
        return fastattn.linear_cross_entropy(
            x, weight, target, return_lse=True, return_entropy=True, backend=self.backend, **given
        )


KINDS = ("linear", "mlp", "branch", "gated", "loss")
LAYERS = st.builds(
    Layer,
    kind=st.sampled_from(KINDS),
    width=st.sampled_from((5, 8, 24, 33, 64)),
    hidden=st.sampled_from((6, 16, 40, 77, 301)),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 100),
)


def computed(function: Function, x: Tensor, upstream: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """Results, and the gradient of x from these."""
    x = x.clone().requires_grad_()
    with fastattn.invariant():
        results = function(x)
    (dx,) = torch.autograd.grad(
        results, x, [torch.ones_like(t) for t in results] if upstream is None else upstream
    )
    return *results, dx


def check_alone(layer: Layer, count: int, first: int, stop: int) -> None:
    x, function = layer.tokens(count), layer.function
    with torch.no_grad():
        upstream = [torch.sin(torch.arange(t.numel()).to(t)).view(t.shape) for t in function(x)]
    together = computed(function, x, upstream)
    alone = computed(function, x[first:stop], [t[first:stop] for t in upstream])
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        assert torch.equal(a[first:stop], b), f"result {i} differs by {(a[first:stop] - b).abs().max()}"


@settings(max_examples=60)
@given(LAYERS, st.sampled_from((1, 2, 5, 12, 31, 32, 33, 70, 150, 300)), st.data())
def test_a_token_has_the_bits_of_one_alone(layer: Layer, count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, count - 1))
    check_alone(layer, count, first, data.draw(st.integers(first + 1, count)))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_token_in_kernels_has_the_bits_of_one_alone(kind: str) -> None:
    small = mock.patch.multiple(rows, ROWS_ON_CPU=16)
    with small, mock.patch.object(loss_functional, "ROWS_OF_LOSS", 16):
        check_alone(Layer(kind, 16, 24, backend="triton"), 18, 15, 17)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU always takes as many rows")
def test_a_few_rows_and_many_take_parts_of_their_own_if_a_trial_allows_it() -> None:
    weights = [torch.ones(64, 64)]
    with mock.patch.object(rows, "_same_bits", lambda *_: True):
        for count, sizes in ((1, [4]), (5, [8]), (17, [32]), (40, [32, 8]), (555, [256, 256, 32, 16])):
            assert rows.sizes_of_parts(torch.ones(count, 64), 64, weights) == sizes
        assert rows.sizes_of_parts(torch.ones(1, 64), 64) == [32]  # of unknown products
        assert rows.sizes_of_parts(torch.ones(1, 64), 64, [weights[0].t()[:, ::2]]) == [32]
    with mock.patch.object(rows, "_same_bits", lambda *_: False):
        assert rows.sizes_of_parts(torch.ones(257, 64), 64, weights) == [32] * 9


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU always takes as many rows")
@pytest.mark.parametrize("classes", [1000, 2048 + 1280, 5003])
def test_few_tokens_of_a_loss_are_fewer_rows_with_the_bits_of_many(classes: int) -> None:
    x, w, target = torch.randn(300, 64), torch.randn(classes, 64), torch.randint(classes, (300,))
    assert rows.few_rows_of_loss(x, w, [min(classes, 2048), classes % 2048]) == 64

    def loss(tokens: slice) -> tuple[torch.Tensor, ...]:
        mine = x[tokens].clone().requires_grad_()
        with fastattn.invariant():
            found = fastattn.linear_cross_entropy(mine, w, target[tokens], reduction="none", return_entropy=True)
        return *found, *torch.autograd.grad(sum(t.sum() for t in found), mine)

    whole = loss(slice(300))
    for tokens in (slice(1), slice(7, 71), slice(230, 300), slice(299, 300)):
        assert all(torch.equal(few, every[tokens]) for few, every in zip(loss(tokens), whole, strict=True))
    with mock.patch.object(rows, "_same_bits", lambda *_: False):
        assert rows.few_rows_of_loss(x, w, [classes]) == rows.ROWS_OF_LOSS


@pytest.mark.skipif(DEVICE != "cpu", reason="it is about a CPU's products")
def test_the_trial_sees_products_with_another_order_of_sums() -> None:
    """A matrix times a vector has one."""
    assert not rows._same_bits(1, 32, 256, 512, torch.float32, 0, "")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_no_thread_is_left_a_remainder_of_its_vectors(threads: int) -> None:
    """PyTorch computes it with other last bits, so that a token's bits would depend on its place."""
    with mock.patch.object(torch, "get_num_threads", lambda: threads):
        for hidden in (1, 64, 100, 2112, 4096, 11008):
            count = rows.rows_at_once(torch.zeros(1, 64), hidden)
            elements = count * hidden
            each = -(-elements // min(threads, -(-elements // 32768)))
            assert count == 1 or all(min(each, elements - begin) % 64 == 0 for begin in range(0, elements, each))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_one_token_reaches_no_other(kind: str) -> None:
    layer = Layer(kind)
    x = layer.tokens(70)
    healthy = torch.arange(70, device=DEVICE) != 33
    expected = computed(layer.function, x)
    x[33] = NAN
    for found, clean in zip(computed(layer.function, x), expected, strict=True):
        assert torch.equal(found[healthy], clean[healthy])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_exact_as_without(kind: str) -> None:
    layer, double = Layer(kind), Layer(kind, dtype=torch.float64)
    x = layer.tokens(70)
    with torch.no_grad():
        eager, precise = layer.function(x), double.function(x.double())
        with fastattn.invariant():
            found = layer.function(x)
    for a, b, c in zip(found, precise, eager, strict=True):
        assert_as_exact_as_eager(a, b, c)


def test_without_it_single_tokens_have_other_bits() -> None:
    """So that the tests above see something."""
    layer = Layer("linear", 64, 301)
    x = layer.tokens(70)
    assert not torch.equal(layer.function(x)[0][5:6], layer.function(x[5:6])[0])


def test_gradients_that_reach_a_layer_have_one_layout() -> None:
    """A product with a transposed matrix may have another order of sums."""
    layers, layouts = torch.nn.Linear(64, 64, device=DEVICE), []

    def watched(x: Tensor) -> Tensor:
        y = layers(x)
        y.register_hook(lambda gradient: layouts.append((gradient.shape, gradient.stride())))
        return y

    upstream = torch.randn(64, 64, device=DEVICE)
    for above in (upstream, upstream.t(), upstream[:1].expand(64, 64)):
        computed(lambda x: (fastattn.by_rows(watched, x),), torch.randn(64, 64, device=DEVICE), [above])
    assert len(set(layouts)) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_begin_between_vectors_have_the_bits_of_one_alone(kind: str, dtype: torch.dtype) -> None:
    """There a CPU's products have another order of sums in each place."""
    for token in range(8, 12):
        check_alone(Layer(kind, 33, 77, dtype), 40, token, token + 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "rms", "mlp": "gated", "positions": "rotary", "num_kv_heads": 1, "qk_norm": True, "tied": False},
    ],
    ids=["gpt", "llama"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_same_logits_alone_padded_and_with_a_cache(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "embed_dim": 64, "num_heads": 2, "num_layers": 2, "max_length": 80}
    model = nn.TransformerModel(**sizes, **options, device=DEVICE, dtype=dtype).eval()
    lengths, read = (80, 17, 40), (76, 9, 33)
    texts = [torch.randint(97, (1, length), device=DEVICE) for length in lengths]
    batch = torch.cat([F.pad(text, (0, 80 - text.shape[1])) for text in texts])
    with torch.no_grad(), fastattn.invariant():
        alone = [model(text) for text in texts]
        padded = model(batch, key_lengths=torch.tensor(lengths))
        cache = DecodingCache(3, 80, 2, batch.device, None)
        steps = [model(batch[:, :76], key_lengths=torch.tensor(read), cache=cache)]
        for step in range(4):
            tokens = [text[0, read[i] + step : read[i] + step + 1] for i, text in enumerate(texts)]
            steps.append(model(torch.stack(tokens), cache=cache))
    for i, logits in enumerate(alone):
        assert torch.equal(padded[i : i + 1, : lengths[i]], logits)
        for step, found in enumerate(steps):
            assert torch.equal(found[i : i + 1], logits[:, read[i] + step - 1 : read[i] + step])


def test_training_meets_the_probabilities_that_it_generated_with() -> None:
    """The loss of each token, of a batch, is that of the logits that sampling saw."""
    torch.manual_seed(0)
    model = nn.TransformerModel(vocab_size=50, embed_dim=32, num_heads=2, num_layers=1, max_length=40, tied=False)
    model = model.to(DEVICE).eval()
    prompts = torch.randint(50, (3, 5), device=DEVICE)
    with torch.no_grad(), fastattn.invariant():
        texts = model.generate(prompts, 20, temperature=1.0, seed=1).tokens
        streams = [[model.final_norm(s) for s in _streams(model, text)] for text in (texts, texts[1:2])]
        weight = model.unembedding_weight
        both = [
            fastattn.linear_cross_entropy(s[-1], weight, text, reduction="none", shift=True)
            for s, text in zip(streams, (texts, texts[1:2]), strict=True)
        ]
    assert torch.equal(both[0][1:2], both[1])


def _streams(model: nn.TransformerModel, tokens: Tensor) -> list[Tensor]:
    x = model.embed(tokens)
    return [x := block(x) for block in model.blocks]


@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_layers_have_the_bits_of_one_sequence(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 48, 0.0, batch_first=batch_first, device=DEVICE)
    x = torch.randn(3, 20, 32, device=DEVICE)
    with fastattn.invariant():
        whole, alone = (layer(t if batch_first else t.transpose(0, 1)) for t in (x, x[1:2]))
    assert torch.equal(whole[1:2] if batch_first else whole[:, 1:2], alone)


def test_threads_have_contexts_of_their_own() -> None:
    seen: dict[str, bool] = {}
    inside, done = threading.Event(), threading.Event()

    def served_invariantly() -> None:
        with fastattn.invariant():
            inside.set()
            done.wait()
            seen["inside"] = invariance.wanted()

    thread = threading.Thread(target=served_invariantly)
    thread.start()
    inside.wait()
    seen["outside"] = invariance.wanted()
    done.set()
    thread.join()
    assert seen == {"inside": True, "outside": False}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backward", [None, False, True])
@pytest.mark.parametrize("forward", [False, True])
def test_what_checkpointing_computes_again_has_the_setting_of_its_forward(
    forward: bool, backward: bool | None, reentrant: bool, compiled: bool
) -> None:
    """backward: what the context around the backward says; None outside of any."""
    if compiled and reentrant:
        pytest.skip("torch.compile takes checkpoints without reentrance only")
    layer, seen = Layer(), []
    up, down = layer.drawn(40, 24), layer.drawn(24, 40)

    def block(x: Tensor) -> Tensor:
        seen.append(invariance.wanted())
        with fastattn.invariant(False):
            seen.append(invariance.wanted())
        heads = fastattn.mlp(x, up, None, down, None).view(1, -1, 2, 12).transpose(1, 2)
        return fastattn.attention(heads, heads, heads, causal=True)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)

    x = layer.tokens(40).requires_grad_()
    with fastattn.invariant(forward):
        expected = torch.autograd.grad(block(x).sum(), x)[0]
        seen.clear()
        y = (torch.compile(checkpointed, backend="eager") if compiled else checkpointed)(x)
    with nullcontext() if backward is None else fastattn.invariant(backward):
        y.sum().backward()
    assert seen == [forward, False] * 2
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("hidden", [40, 2048])
def test_a_compiled_call_follows_the_context(hidden: int) -> None:
    layer = Layer()
    up, down, x = layer.drawn(hidden, 24), layer.drawn(24, hidden), layer.tokens(40)

    def call(x: Tensor) -> Tensor:
        return fastattn.mlp(x, up, None, down, None) + 2 * invariance.wanted()

    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=False)
    for asked in (False, True, False):
        with fastattn.invariant(asked):
            assert torch.equal(compiled(x), call(x))


def test_what_cannot_hold_is_refused() -> None:
    layer = Layer()
    x, w = layer.tokens(4), layer.drawn(24, 24)
    with fastattn.invariant():
        with pytest.raises(ValueError, match=r"dropout_p must be 0 where a call is invariant, got 0\.5"):
            fastattn.mlp(x, w, None, w, None, dropout_p=0.5)
        with pytest.raises(ValueError, match=r"w1 must have shape \(out, 20\)"):
            fastattn.mlp(x[:, :20], w, None, w, None)
        with pytest.raises(ValueError, match=r"residual must have the result's shape \(4, 24\), got \(3, 24\)"):
            fastattn.mlp(x, w, None, w, None, residual=x[:3])
        assert fastattn.mlp(x[:0], w, None, w, None).shape == (0, 24)
        assert fastattn.by_rows(torch.nn.Linear(24, 3, device=DEVICE), x[:0]).shape == (0, 3)
    with pytest.raises(ValueError, match="x must have at least one dimension"):
        fastattn.by_rows(torch.nn.Linear(24, 3), torch.tensor(1.0))


def test_a_filter_leaves_out_nothing_since_that_depends_on_the_other_tokens() -> None:
    torch.manual_seed(0)
    # The first token finds all classes unlikely, the others do not.
    x, weight = torch.randn(40, 16) * torch.tensor([0.1] + [3.0] * 39)[:, None], torch.randn(5000, 16)
    target = torch.randint(5000, (40,))

    def gradient(count: int) -> Tensor:
        tokens = x[:count].clone().requires_grad_()
        with fastattn.invariant():
            losses = fastattn.linear_cross_entropy(tokens, weight, target[:count], filter=5e-3, reduction="none")
        return torch.autograd.grad(losses.sum(), tokens)[0]

    assert torch.equal(gradient(40)[:1], gradient(1))
