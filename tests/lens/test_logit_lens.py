"""Claims about the logit lens and the tuned lens: what is streamed is what dense logits say."""

from __future__ import annotations

import importlib
import io

import pytest
import torch
from largest_tensor import LargestTensor
from lens_models import ALL, LAYERS, VOCABULARY, make, text

from fastattn import lens
from fastattn.lens import vocabulary


class Tokenizer:
    """Words are numbers."""

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))


def dense(name, model, tokens):
    """Log probabilities (layers + 1, B, L, vocabulary), from streams that the model itself gives out."""
    adapter = lens.adapt(model)
    with torch.no_grad():
        if name.startswith("own"):
            streams = [model.embed(tokens)]
            for block in model.blocks:
                streams.append(block(streams[-1]))
        else:
            streams = list(model(tokens, output_hidden_states=True).hidden_states)
        logits = [adapter.unembed(stream) for stream in streams[:-1]] + [adapter.logits(tokens)]
    return torch.stack(logits).log_softmax(-1)


@pytest.mark.parametrize("name", ALL)
def test_every_row_says_what_dense_logits_say_and_the_last_is_the_models_own_output(name, monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK", 16)  # several chunks, the last one cut
    monkeypatch.setattr(vocabulary, "TILE_LOGITS", 16 * 3 * (LAYERS + 1))
    model, tokens = make(name), text()
    targets = tokens.roll(-1, 1)
    seen = lens.logit_lens(model, tokens, top=4, targets=targets)
    expected = dense(name, model, tokens)
    close = {"atol": 1e-10, "rtol": 1e-10}
    best, order = expected.topk(4)
    assert torch.equal(seen.tokens, order)
    torch.testing.assert_close(seen.probabilities, best.exp(), **close)
    torch.testing.assert_close(seen.entropy, -(expected.exp() * expected).sum(-1), **close)
    kl = (expected[-1].exp() * (expected[-1] - expected)).sum(-1)
    torch.testing.assert_close(seen.kl, kl, **close)
    wanted = expected.gather(-1, targets.expand(LAYERS + 1, -1, -1)[..., None])
    torch.testing.assert_close(seen.target_probability, wanted[..., 0].exp(), **close)
    assert torch.equal(seen.target_rank, 1 + (expected > wanted).sum(-1))


@pytest.mark.parametrize(
    ("positions", "expected"), [(-1, [19]), (slice(0, 6, 2), [0, 2, 4]), ([3, -2], [3, 18]), (None, range(20))]
)
def test_positions_choose_what_is_read(positions, expected):
    model, tokens = make("llama"), text()
    everything, some = lens.logit_lens(model, tokens), lens.logit_lens(model, tokens, positions=positions)
    assert some.positions.tolist() == list(expected)
    torch.testing.assert_close(some.probabilities, everything.probabilities[:, :, list(expected)])
    assert torch.equal(some.inputs, tokens[:, list(expected)])


def test_logits_of_all_layers_and_positions_are_never_stored():
    model = make("own", vocab_size=20_000, max_length=512).float()
    tokens = text(1, 512)
    with LargestTensor() as largest:
        lens.logit_lens(model, tokens, targets=3)
    assert largest.elements <= vocabulary.TILE_LOGITS < 512 * 20_000


def test_the_model_keeps_its_hooks_its_mode_and_its_gradients():
    model, tokens = make("gpt2"), text()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    lens.logit_lens(model, tokens)
    with pytest.raises(RuntimeError, match="in a block"):
        handle = model.transformer.h[1].register_forward_pre_hook(fails)
        lens.logit_lens(model, tokens)
    handle.remove()
    assert before == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def fails(_module, _args):
    raise RuntimeError("in a block")


def test_models_are_called_with_what_else_they_take():
    model, tokens = make("own"), text()
    cut = lens.logit_lens(model, tokens, window=2)
    with torch.no_grad():
        expected = model(tokens, window=2).softmax(-1).topk(5)[0]
    torch.testing.assert_close(cut.probabilities[-1], expected)


def test_text_goes_in_and_comes_out_where_there_is_a_tokenizer():
    model = make("llama")
    seen = lens.logit_lens(model, "7 8 9", targets="4", tokenizer=Tokenizer())
    assert seen.inputs.tolist() == [[1, 7, 8, 9]]
    by_number = lens.logit_lens(model, seen.inputs, targets=4)
    assert torch.equal(seen.target_rank, by_number.target_rank)
    best = int(seen.tokens[-1, 0, -1, 0])
    assert f"output        '{best}'" in str(seen) and f"output        {best}" in str(by_number)
    pytest.importorskip("matplotlib")
    assert len(seen.plot().axes) == 2


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        ({"targets": "4 5"}, ValueError, "targets must be one token, and '4 5' is 2: '4', '5'"),
        ({"targets": [4, 5, 6]}, ValueError, "one token id, or one for each of the 2 rows"),
        ({"targets": VOCABULARY}, ValueError, "targets must be from 0 to 49"),
        ({"targets": 1.5}, TypeError, "targets must be an integer"),
        ({"targets": torch.zeros(2, 3, dtype=torch.long)}, ValueError, r"must have shape \(2, 20\)"),
        ({"tokens": "4 5", "tokenizer": None}, ValueError, "tokens is text, '4 5': give the tokenizer"),
        ({"tokens": torch.full((1, 3), 50)}, ValueError, "tokens must be from 0 to 49"),
        ({"tokens": torch.zeros(3, dtype=torch.long)}, ValueError, r"shape \(batch, length\)"),
        ({"tokens": torch.zeros(0, 3, dtype=torch.long)}, ValueError, "neither of them 0"),
        ({"tokens": torch.zeros(1, 3)}, TypeError, "must be int64 or int32"),
        ({"top": 51}, ValueError, "top must be at most the vocabulary's size 50"),
        ({"top": 0}, ValueError, "top must be at least 1"),
        ({"positions": 20}, ValueError, "positions must be from -20 to 19"),
        ({"positions": []}, ValueError, "at least one of the 20 positions"),
        ({"tokenizer": 3}, TypeError, "tokenizer must be a Hugging Face tokenizer"),
        ({"tuned": lens.TunedLens(2, 32)}, ValueError, r"weights \(3, 32, 32\) for this model"),
        ({"tuned": lens.TunedLens(3, 32)}, ValueError, "must be torch.float64"),
    ],
)
def test_bad_calls_are_refused_before_the_model_runs(call, error, says):
    model = make("own")
    model.blocks[0].register_forward_pre_hook(fails)
    with pytest.raises(error, match=says):
        lens.logit_lens(model, **{"tokens": text(), "tokenizer": Tokenizer(), **call})


@pytest.mark.parametrize(("name", "fields"), [("own", {"dropout": 0.1}), ("llama", {"attention_dropout": 0.1})])
def test_models_that_drop_are_refused_until_they_are_in_eval_mode(name, fields):
    model = make(name, **fields)
    lens.logit_lens(model, text())
    with pytest.raises(ValueError, match=r"in training mode with .* = 0.1: call model.eval\(\) first"):
        lens.logit_lens(model.train(), text())
    lens.logit_lens(make(name).train(), text())


def test_a_tuned_lens_begins_as_the_logit_lens_and_training_brings_every_layer_closer(tmp_path):
    model = make("llama")
    tuned, held_out = lens.TunedLens.of(model), text(4, 30)
    plain = lens.logit_lens(model, held_out)
    torch.testing.assert_close(lens.logit_lens(model, held_out, tuned=tuned).kl, plain.kl)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, VOCABULARY, (8, 30), generator=generator) for _ in range(60)]
    losses = tuned.fit(model, batches, learning_rate=1e-2)
    assert losses.shape == (60, LAYERS) and (losses[-1] < losses[0]).all()
    tuned.save(tmp_path / "lens.pt")
    loaded = lens.TunedLens.load(tmp_path / "lens.pt")
    better = lens.logit_lens(model, held_out, tuned=loaded)
    assert (better.kl[:-1].mean((1, 2)) < 0.7 * plain.kl[:-1].mean((1, 2))).all()
    assert torch.equal(better.tokens[-1], plain.tokens[-1])
    assert all(p.grad is None for p in model.parameters())


def test_a_step_of_the_tuned_lens_is_that_of_dense_autograd(monkeypatch):
    module = importlib.import_module("fastattn.lens.logit_lens")
    monkeypatch.setattr(module, "TILE_LOGITS", 2 * VOCABULARY * 7)  # positions come in several parts
    model, tokens = make("gpt2"), text()
    tuned = lens.TunedLens.of(model)
    torch.nn.init.normal_(tuned.weight, std=0.1)
    adapter = lens.adapt(model)
    streams = torch.stack(model(tokens, output_hidden_states=True).hidden_states[:-1]).flatten(1, 2).detach()
    output = adapter.logits(tokens).flatten(0, 1).log_softmax(-1).detach()
    moved = streams + torch.einsum("lnd,led->lne", streams, tuned.weight) + tuned.bias[:, None]
    kl = (output.exp() * (output - adapter.unembed(moved).log_softmax(-1))).sum(-1).mean(-1)
    expected = torch.autograd.grad(kl.sum(), (tuned.weight, tuned.bias))
    losses = tuned.fit(model, [tokens], learning_rate=0.0)
    torch.testing.assert_close(losses[0], kl.detach(), atol=1e-10, rtol=1e-8)
    for parameter, gradient in zip((tuned.weight, tuned.bias), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-10, rtol=1e-8)


def test_training_a_tuned_lens_never_stores_the_logits_of_all_positions():
    model = make("own", vocab_size=20_000, max_length=512).float()
    tuned = lens.TunedLens.of(model)
    with LargestTensor() as largest:
        tuned.fit(model, [text(1, 512)])
    assert largest.elements <= vocabulary.TILE_LOGITS < 512 * 20_000


def test_a_file_that_holds_no_tuned_lens_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"a file that TunedLens.save wrote"):
        lens.TunedLens.load(tmp_path / "other.pt")


def test_rich_prints_the_same_table_and_takes_brackets_for_text():
    console = pytest.importorskip("rich.console").Console(width=200, record=True, file=io.StringIO())

    class Brackets(Tokenizer):
        def decode(self, ids):
            return f"[red]{ids[0]}"

    seen = lens.logit_lens(make("own"), text(), top=1, tokenizer=Brackets())
    console.print(seen)
    printed = console.export_text()
    assert all(cell in printed for line in seen.table() for cell in line)
    assert printed.count("[red]") == LAYERS + 1
