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


def test_a_word_of_two_tokens_is_refused_with_its_pieces(smollm2):
    model, tokenizer = smollm2
    with pytest.raises(ValueError, match=r"target must be one token, and ' Eiffel' is 2: ' E', 'iffel'"):
        lens.attribution(model, FACT, " Eiffel", tokenizer=tokenizer)
