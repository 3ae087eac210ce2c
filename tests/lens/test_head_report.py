"""Claims about the report on all heads: its numbers are those of the dense patterns."""

from __future__ import annotations

import pytest
import torch
from lens_models import ALL, HEADS, LAYERS, OWN, make, text

from fastattn import lens
from fastattn.lens.head_report import SCORES


def repeated():
    """Tokens of which the second half repeats the first, and some tokens repeat sooner."""
    tokens = text(2, 12).repeat(1, 2)
    tokens[0, 5] = tokens[0, 2]
    tokens[1, 7] = tokens[1, 6]
    return tokens


def of_patterns(model, tokens, counted, **options):
    """Every number from its definition, on dense patterns (layers, B, heads, L, L)."""
    with torch.no_grad(), lens.watch(model, "blocks.*.attention.pattern") as seen:
        model(tokens, **options)
    patterns = seen["blocks.*.attention.pattern"].double()
    length = tokens.shape[1]
    position = torch.arange(length)
    same = tokens[:, :, None] == tokens[:, None]
    after = torch.cat([torch.zeros_like(same[..., :1]), same[..., :-1]], -1)  # the token before key j is query i's
    earlier = position < position[:, None]
    matches = {
        "induction": after & (earlier | torch.eye(length, dtype=torch.bool)),
        "previous_token": (position == position[:, None] - 1).expand(same.shape),
        "duplicate_token": same & earlier,
        "first_token": ((position == 0) & (position[:, None] > 0)).expand(same.shape),
    }
    found = {}
    for name, match in matches.items():
        mass = (patterns * match[None, :, None]).sum(-1)
        counts = (match.any(-1) & counted)[None, :, None]
        found[name] = (mass * counts).sum((1, 3)) / counts.sum((1, 3))
    counts = counted[None, :, None]
    entropy = -torch.xlogy(patterns, patterns).sum(-1)
    distance = (patterns * (position[:, None] - position)).sum(-1)
    found["entropy"] = (entropy * counts).sum((1, 3)) / counts.sum()
    found["mean_distance"] = (distance * counts).sum((1, 3)) / counts.sum()
    found["received"] = (patterns * counts[..., None]).sum(3).transpose(1, 2)
    return found


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_every_number_is_that_of_the_dense_patterns(name, attention):
    model, tokens = make(name, attention), repeated()
    report = lens.head_report(model, tokens)
    expected = of_patterns(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    for field, value in expected.items():
        torch.testing.assert_close(
            getattr(report, field), value, atol=1e-6, rtol=1e-6, msg=lambda m, f=field: f + m
        )
    assert report.entropy.shape == (LAYERS, HEADS)


@pytest.mark.parametrize("name", OWN)
def test_scores_are_those_of_model_head_scores(name):
    model, tokens = make(name), repeated()
    report, scores = lens.head_report(model, tokens), lens.model_head_scores(model, tokens)
    for field in SCORES:
        torch.testing.assert_close(getattr(report, field), getattr(scores, field), atol=1e-12, rtol=0)
    even = lens.even_scores(tokens)
    assert report.chance == pytest.approx({field: float(getattr(even, field)) for field in SCORES}, abs=1e-6)


def test_padding_counts_nowhere():
    model, tokens = make("llama"), repeated()
    lengths = torch.tensor([24, 15])
    real = torch.arange(24) < lengths[:, None]
    padded = lens.head_report(model, tokens, attention_mask=real.long())
    expected = of_patterns(model, tokens, real, attention_mask=real.long())
    for field, value in expected.items():
        torch.testing.assert_close(getattr(padded, field), value, atol=1e-6, rtol=1e-6)
    assert not padded.received[:, :, 1, 15:].any()
    own = make("own")
    by_lengths = lens.head_report(own, tokens, key_lengths=lengths)
    by_hand = lens.head_report(own, tokens, key_lengths=lengths, counted=real)
    assert torch.equal(by_lengths.entropy, by_hand.entropy) and torch.equal(by_lengths.received, by_hand.received)
    assert not torch.equal(by_lengths.entropy, lens.head_report(own, tokens).entropy)


def test_tokens_that_never_repeat_have_no_induction_score():
    report = lens.head_report(make("own"), torch.arange(20)[None])
    assert report.induction.isnan().all() and not report.previous_token.isnan().any()
    assert len(report.best("induction")) == 5 and "nan" in str(report)


def test_it_names_the_best_heads_prints_and_draws_them():
    report = lens.head_report(make("gpt2"), repeated())
    layer, head, score = report.best("induction")[0]
    assert score == float(report.induction.max()) == float(report.induction[layer, head])
    header, first, *_, chance = report.table()
    assert header[2:6] == ("induction", "previous token", "duplicate token", "first token")
    assert first[:3] == ("induction", f"L{layer}H{head}", f"{score:.2f}") and chance[0] == "by chance"
    with pytest.raises(ValueError, match="score must be one of induction"):
        report.best("copying")
    pytest.importorskip("matplotlib")
    assert len(report.plot().axes) == 12


def test_bad_calls_are_refused_before_the_model_runs():
    with pytest.raises(ValueError, match=r"counted must be bool \(2, 24\)"):
        lens.head_report(make("own"), repeated(), counted=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        lens.head_report(make("own", dropout=0.1).train(), repeated())
    with pytest.raises(ValueError, match="attn_implementation 'sdpa' or 'fastattn'"):
        lens.head_report(make("gpt2", "eager"), repeated())
