"""Claims about real weights: with them, too, the model on fastattn is the model."""

from __future__ import annotations

import pytest
import torch
from real_models import minilm, smollm2

import fastattn

pytestmark = pytest.mark.real


@torch.no_grad()
def test_smollm2_knows_where_the_eiffel_tower_is_and_says_the_same_as_eager():
    model, tokenizer = smollm2("eager")
    tokens = tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt").input_ids
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    eager, expected = model(tokens).logits, model.generate(tokens, **asked)
    assert tokenizer.decode(expected[0, tokens.shape[1] :]).startswith(" Paris, France.")
    exact = model.double()(tokens).logits
    allowed = 2 * (eager - exact).abs().max() + 1e-5
    for attention in ("fastattn", "sdpa"):
        model = smollm2(attention)[0]
        assert (model(tokens).logits - exact).abs().max() <= allowed
        assert model.generate(tokens, **asked).equal(expected)
    fastattn.patch(model, norm=True)
    assert (model(tokens).logits - exact).abs().max() <= allowed
    assert model.generate(tokens, **asked).equal(expected)


@torch.no_grad()
def test_minilm_finds_the_sentence_that_means_the_same():
    model, tokenizer = minilm()
    sentences = ["A cat sat on the mat.", "The kitten rested on a rug.", "Interest rates rose again this year."]
    given = tokenizer(sentences, return_tensors="pt", padding=True)
    weights = given.attention_mask[..., None].float()
    means = (model(**given).last_hidden_state * weights).sum(1) / weights.sum(1)
    likeness = torch.nn.functional.normalize(means, dim=-1) @ torch.nn.functional.normalize(means, dim=-1).T
    assert likeness[0, 1] > 0.5 > 0.3 > likeness[0, 2]
    eager = minilm("eager")[0]
    torch.testing.assert_close(
        model(**given).last_hidden_state[weights[..., 0] > 0],
        eager(**given).last_hidden_state[weights[..., 0] > 0],
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip
