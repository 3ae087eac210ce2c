"""Claims about neurons: what they write, what they add over a text, and where."""

from __future__ import annotations

import importlib

import pytest
import torch
from lens_models import LAYERS, PRE_NORM, VOCABULARY, make, text
from test_logit_lens import Tokenizer, fails

from fastattn import lens
from fastattn.lens.running import neuron_activations

WITH_MLP = [name for name in PRE_NORM if name != "own-attention-only"]


@pytest.mark.parametrize("name", WITH_MLP)
def test_what_neurons_add_is_what_attribution_gives_them_at_every_position(name):
    model, tokens = make(name), text(2, 6)
    found = lens.neurons(model, 7, tokens, top=12, places=12)
    everywhere = [lens.attribution(model, tokens, 7, position=p) for p in range(6)]
    for layer in range(LAYERS):
        expected = torch.stack([a.mlp_by_neuron(layer) for a in everywhere], 1)  # (B, L, neurons)
        torch.testing.assert_close(found.mean[layer], expected.mean((0, 1)), atol=1e-6, rtol=1e-6)
        for n in (n for n in found.top if n.layer == layer):
            for at, firing in enumerate(n.fires):
                there = expected[firing.row, firing.position, n.neuron]
                assert abs(float(there) - firing.contribution) < 1e-6
                assert int((expected[..., n.neuron] > firing.contribution + 1e-6).sum()) <= at
            assert len({(f.row, f.position) for f in n.fires}) == len(n.fires) == 12
    means = torch.cat(found.mean)
    assert torch.allclose(torch.tensor([n.mean for n in found.top]).double(), means.topk(12).values)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "pythia", "own-gated"])
def test_congruence_times_activation_and_frozen_scales_is_the_contribution(name):
    """So congruence is what a neuron writes, read by the token's direction behind the gains of the norms."""
    model, tokens = make(name), text(1, 6)
    adapter = lens.adapt(model)
    found = lens.neurons(model, 7)
    assert found.mean is None and found.top[0].fires is None
    assert torch.allclose(
        torch.tensor([n.congruence for n in found.top]).double(), torch.cat(found.congruence).topk(20).values
    )
    with torch.no_grad(), lens.watch(model, "blocks.*.mlp.hook_post") as seen:
        model(tokens)
    by_neuron = lens.attribution(model, tokens, 7).mlp_by_neuron(1)[0]
    scale = by_neuron / (seen["blocks.1.mlp.hook_post"][0, -1] * found.congruence[1])
    torch.testing.assert_close(scale, scale[0].expand(scale.shape), atol=0, rtol=1e-6)
    assert scale[0] > 0 and len(found.congruence) == adapter.num_layers


def test_positions_that_do_not_count_change_nothing():
    model, tokens = make("llama"), text()
    short = lens.neurons(model, 7, tokens[:, :12], top=5)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 12:] = False
    found = lens.neurons(model, 7, tokens, top=5, counted=counted)
    for ours, expected in zip(found.mean, short.mean, strict=True):
        torch.testing.assert_close(ours, expected)
    assert [(n.layer, n.neuron) for n in found.top] == [(n.layer, n.neuron) for n in short.top]
    assert all(f.position < 12 for n in found.top for f in n.fires)


def test_positions_come_in_parts_of_bounded_size(monkeypatch):
    module = importlib.import_module("fastattn.lens.neurons")
    model, tokens = make("own-gated").float(), text(1, 400)
    whole = lens.neurons(model, 7, tokens)
    sizes = []

    def activations(adapter, layer, x):
        sizes.append(len(x))
        return neuron_activations(adapter, layer, x)

    monkeypatch.setattr(module, "neuron_activations", activations)
    monkeypatch.setattr(module, "TILE_NEURONS", 64 * len(whole.congruence[0]))
    found = lens.neurons(model, 7, tokens)
    assert sizes == [64, 64, 64, 64, 64, 64, 16] * LAYERS
    for ours, expected in zip(found.mean, whole.mean, strict=True):
        torch.testing.assert_close(ours, expected)
    assert [n[:2] for n in found.top] == [n[:2] for n in whole.top]


def test_it_prints_where_neurons_fire_and_draws_them():
    model = make("gpt2")
    found = lens.neurons(model, "7", "4 5 6 9", top=3, tokenizer=Tokenizer())
    header, *lines = found.table(places=1)
    assert header[1] == "congruence with '7'" and len(lines) == 3
    first = found.top[0]
    context = found.tokens[0, max(0, first.fires[0].position - 2) : first.fires[0].position + 1].tolist()
    assert lines[0][0] == f"L{first.layer}N{first.neuron}" and repr(" ".join(map(str, context))) in lines[0][3]
    assert len(lens.neurons(model, 7).table()[0]) == 2
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 1


@pytest.mark.parametrize(
    ("name", "call", "says"),
    [
        ("bert", {}, "family BERT has an activation"),
        ("own-attention-only", {}, "model must have an MLP"),
        ("own", {"token": [7, 8]}, "token must be one token id"),
        ("own", {"token": VOCABULARY}, "token must be from 0 to 49"),
        ("own", {"counted": torch.zeros(2, 20, dtype=torch.bool)}, "counted must be bool"),
        ("own", {"counted": torch.ones(2, 19, dtype=torch.bool)}, "counted must be bool"),
        ("own", {"top": 0}, "top must be at least 1"),
    ],
)
def test_bad_calls_are_refused_before_the_model_runs(name, call, says):
    model = make(name)
    lens.adapt(model).blocks[0].register_forward_pre_hook(fails)
    with pytest.raises(ValueError, match=says):
        lens.neurons(model, **{"token": 7, "text_tokens": text(), **call})
