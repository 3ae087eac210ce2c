"""Claims about real weights: with them, too, the model on fastattn is the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from real_models import minilm, smollm2

import fastattn
from fastattn import lens

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


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_goes_on_as_eager_does_after_prompts_of_5_to_1000_tokens():
    from fastattn.integrations.huggingface import GrowingCache

    model, tokenizer = smollm2("eager")
    text = Path(fastattn.attention.__code__.co_filename).read_text() * 3
    tokens = tokenizer(text, return_tensors="pt").input_ids
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for i in range(9):
        length = round(5 * 200 ** (i / 8))
        prompt = tokens[:, 7 * i : 7 * i + length]
        assert prompt.shape[1] == length
        model.set_attn_implementation("eager")
        expected = model.generate(prompt, **asked)
        model.set_attn_implementation("fastattn")
        cache = GrowingCache(config=model.config) if i % 2 else None
        assert model.generate(prompt, **asked, past_key_values=cache).equal(expected)


@torch.no_grad()
def test_smollm2_continues_a_padded_batch_as_it_continues_each_prompt_alone():
    model, tokenizer = smollm2()
    prompts = ["The Eiffel Tower is located in the city of", "Water boils at", "One, two, three,"]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.eos_token_id, "eos_token_id": None}
    together = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **asked)[:, -8:]
    for prompt, found in zip(prompts, together, strict=True):
        assert model.generate(**tokenizer(prompt, return_tensors="pt"), **asked)[0, -8:].equal(found)


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


@torch.no_grad()
def test_the_patterns_of_smollm2_are_those_of_eager_and_its_induction_heads_matter():
    tokens = torch.randint(100, 40_000, (1, 40), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.ones(1, 1, dtype=torch.long), tokens, tokens], 1)
    dense = smollm2("eager")[0](tokens, output_attentions=True).attentions
    model = smollm2()[0]
    with lens.watch(model, "blocks.*.attention.pattern") as seen:
        logits = model(tokens).logits
    patterns = seen["blocks.*.attention.pattern"][:, 0]
    torch.testing.assert_close(patterns, torch.stack(dense)[:, 0], atol=1e-4, rtol=1e-3)
    # On the second copy an induction head looks at what followed this token in the first.
    at = torch.arange(41, 81)
    scores = patterns[:, :, at, at - 39].mean(-1)
    heads = [divmod(int(i), 9) for i in scores.flatten().topk(5).indices]
    others = [divmod(int(i), 9) for i in scores.flatten().topk(5, largest=False).indices]
    assert scores.max() > 0.8

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[0, 41:80], tokens[0, 42:81])

    losses = []
    for ablated in (heads, others):
        with lens.ablate(model, heads=ablated):
            losses.append(loss(model(tokens).logits))
    assert losses[0] - loss(logits) > 10 * abs(losses[1] - loss(logits))
