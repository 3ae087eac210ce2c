"""Claims about the lens's questions on models of torch.nn's encoder layers: answered, or refused in words."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_torch_models import HEADS, LAYERS, make, text

from fastattn import lens
from fastattn.lens import family_table


def patterns(model, tokens):
    with torch.no_grad(), lens.watch(model, "blocks.*.attention.pattern") as seen:
        model(tokens)
    return seen["blocks.*.attention.pattern"]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_rollout_and_the_head_report_answer(batch_first, norm_first):
    model, tokens = make(batch_first, norm_first), text()
    seen = patterns(model, tokens)
    row = torch.eye(20, dtype=torch.float64)[-1].expand(2, -1)
    for layer in reversed(range(LAYERS)):
        row = (row + torch.einsum("bi,bij->bj", row, seen[layer].mean(1))) / 2
    torch.testing.assert_close(lens.rollout(model, tokens).sources, row, atol=1e-12, rtol=1e-12)
    report = lens.head_report(model, tokens)
    previous = seen.diagonal(-1, 3, 4).mean((1, 3))
    torch.testing.assert_close(report.previous_token, previous, atol=1e-12, rtol=1e-12)
    entropy = -torch.xlogy(seen, seen).sum(-1).mean((1, 3))
    torch.testing.assert_close(report.entropy, entropy, atol=1e-10, rtol=1e-10)
    assert report.received.shape == (LAYERS, HEADS, 2, 20)


def registered(monkeypatch, model):
    """A row for the whole model, with its embedding and its head."""
    monkeypatch.setattr(family_table, "_FAMILIES", dict(family_table._FAMILIES))
    row = dataclasses.replace(
        family_table.TORCH, name="mine", models=("test_torch_models.Model",), blocks="encoder.layers",
        embeddings=("embedding",), final_norm="encoder.norm", unembedding="head",
        num_heads="encoder.layers.0.self_attn.num_heads",
    )  # fmt: skip
    lens.register(row)
    return model


def test_a_row_with_embedding_and_head_gives_the_logit_lens_and_the_weights(monkeypatch):
    model, tokens = registered(monkeypatch, make()), text()
    seen = lens.logit_lens(model, tokens)
    with torch.no_grad():
        best, order = model(tokens).softmax(-1).topk(5)
    assert torch.equal(seen.tokens[-1], order)
    torch.testing.assert_close(seen.probabilities[-1], best)
    assert lens.copying_scores(model).shape == (LAYERS, HEADS)


def test_what_cannot_be_answered_is_refused(monkeypatch):
    for ask in (lens.attribution, lens.logit_lens):
        with pytest.raises(ValueError, match="so it gives no logits"):
            ask(make(), text(), 3)
    model = registered(monkeypatch, make())
    for ask in (lambda: lens.attribution(model, text(), 7), lambda: lens.neurons(model, 7, text())):
        with pytest.raises(ValueError, match="must have its MLPs in modules of their own, and in family mine"):
            ask()
    with pytest.raises(ValueError, match="build its layers with batch_first=True"):
        lens.logit_lens(make(batch_first=False), text())
    with pytest.raises(ValueError, match=r"call\s+fastattn.patch\(model\) first"):
        lens.rollout(make(patched=False), text())
