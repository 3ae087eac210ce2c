"""What the lens finds in a model that people know: SmolLM2-135M on a fact."""

from __future__ import annotations

import pytest
import real_models
import torch

from fastattn import lens

pytestmark = pytest.mark.real

FACT = "The Eiffel Tower is located in the city of"


@pytest.fixture(scope="module")
def smollm2():
    return real_models.smollm2()


def test_paris_is_far_from_the_top_at_two_thirds_and_first_in_the_last_layers(smollm2):
    model, tokenizer = smollm2
    seen = lens.logit_lens(model, FACT, targets=" Paris", positions=-1, tokenizer=tokenizer)
    rank = seen.target_rank[:, 0, 0]
    assert rank[20] > 1000 and rank[25] < 50 and rank[28:].eq(1).all()
    tokens = torch.tensor([tokenizer.encode(FACT)])
    with torch.no_grad():
        best, order = model(tokens).logits[0, -1].softmax(-1).topk(5)
    assert torch.equal(seen.tokens[-1, 0, 0], order)
    torch.testing.assert_close(seen.probabilities[-1, 0, 0], best)


def test_paris_over_rome_is_a_sum_over_parts_and_heads_read_it_from_the_sentence(smollm2):
    model, tokenizer = smollm2
    found = lens.attribution(model, FACT, " Paris", " Rome", tokenizer=tokenizer)
    tokens = torch.tensor([tokenizer.encode(FACT)])
    with torch.no_grad():
        own = model(tokens).logits[0, -1]
    paris, rome = (tokenizer.encode(word)[0] for word in (" Paris", " Rome"))
    size = torch.stack(list(found.components.values())).abs().sum()
    allowed = 8 * torch.finfo(torch.float32).eps * size
    assert (found.total - (own[paris] - own[rome])).abs() < allowed
    assert (sum(found.components.values()) - found.total).abs() < allowed
    layer, head = divmod(int(found.heads[..., 0].argmax()), lens.adapt(model).num_heads)
    by_source = found.head_by_source(layer, head)
    assert (by_source.sum() - found.components[f"L{layer}H{head}"]).abs() < allowed
    assert (found.mlp_by_neuron(24).sum() - found.components["L24 mlp"]).abs() < allowed


def test_the_weights_show_that_induction_heads_read_keys_from_the_previous_token_head(smollm2):
    model, tokenizer = smollm2
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(100, 40_000, (1, 60), generator=generator)
    tokens = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), once, once], 1)
    report = lens.head_report(model, tokens)
    layer, head, score = report.best("previous_token")[0]
    assert score > 0.8 > 0.1 > report.chance["previous_token"]
    by_keys = lens.composition(model, "k")
    for at, which, score in report.best("induction", top=4):
        assert score > 0.5 > 0.1 > report.chance["induction"] and at > layer
        assert by_keys[layer, head, at, which] > 3 * by_keys.nanmedian()


def test_neurons_that_write_an_are_those_whose_loss_makes_it_less_likely(smollm2):
    model, tokenizer = smollm2
    text = (
        "She ate an apple and an orange, then saw an elephant. It was an honour to be an actor in an old theatre."
    )
    tokens = torch.tensor([tokenizer.encode(text)])
    an = tokenizer.encode(" an")[0]
    before = tokens.roll(-1, 1) == an
    found = lens.neurons(model, " an", tokens, counted=before, top=30, tokenizer=tokenizer)

    def log_probability_without(chosen):
        def drop(layer):
            columns = [n for at, n in chosen if at == layer]
            return lambda _module, args: (args[0].index_fill(-1, torch.tensor(columns), 0.0),)

        adapter = lens.adapt(model)
        handles = [
            adapter.part("down", layer).register_forward_pre_hook(drop(layer))
            for layer in {at for at, _ in chosen}
        ]
        with torch.no_grad():
            logits = model(tokens).logits
        for handle in handles:
            handle.remove()
        return float(logits.log_softmax(-1)[..., an][before].mean())

    whole = log_probability_without([])
    lost = whole - log_probability_without([n[:2] for n in found.top])
    generator = torch.Generator().manual_seed(0)
    others = [(n.layer, int(torch.randint(1536, (), generator=generator))) for n in found.top]
    assert lost > 0.5 and lost > 5 * abs(whole - log_probability_without(others))


def test_a_word_of_two_tokens_is_refused_with_its_pieces(smollm2):
    model, tokenizer = smollm2
    with pytest.raises(ValueError, match=r"target must be one token, and ' Eiffel' is 2: ' E', 'iffel'"):
        lens.attribution(model, FACT, " Eiffel", tokenizer=tokenizer)
