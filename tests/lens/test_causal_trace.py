"""Claims about causal tracing: each number is what the model says with this noise and this state restored."""

from __future__ import annotations

import pytest
import torch
from lens_models import ALL, LAYERS, WIDTH, make, text

from fastattn import lens
from fastattn.lens import places

SUBJECT, TARGET = (2, 3), 7
CLOSE = {"atol": 1e-12, "rtol": 1e-9}


def trace(model, tokens, **options):
    return lens.causal_trace(model, tokens, **{"subject": SUBJECT, "target": TARGET, "samples": 3, **options})


@torch.no_grad()
def by_hand(model, tokens, noise, clean, restored, at=-1):
    """The target's mean probability, one run for each sample, with these (name, position) restored."""
    found = []
    for sample in noise:
        values = {f"{name}.at({position})": clean[name][:, position] for name, position in restored}
        with (
            lens.steer(model, f"blocks.0.resid_pre.at({SUBJECT[0]}:{SUBJECT[1] + 1})", sample),
            lens.patch_activations(model, values),
        ):
            found.append(lens.adapt(model).logits(tokens)[0, at].softmax(-1)[TARGET])
    return torch.stack(found).mean()


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_every_entry_is_a_run_with_noise_and_this_window_of_states_restored(name, attention):
    model, tokens = make(name, attention), text(1, 7)
    found = trace(model, tokens, window=2)
    kinds = ["resid_post", "attention.out"] + ["mlp.out"] * (name != "own-attention-only")
    assert list(found.restored) == kinds and found.noise.shape == (3, 2, WIDTH)
    with torch.no_grad(), lens.watch(model, [f"blocks.*.{kind}" for kind in kinds]) as clean:
        logits = lens.adapt(model).logits(tokens)
    assert found.clean == pytest.approx(float(logits[0, -1].softmax(-1)[TARGET]), rel=1e-9)
    assert found.noised == pytest.approx(float(by_hand(model, tokens, found.noise, clean, [])), rel=1e-9)
    for kind in kinds:
        assert found.restored[kind].shape == (LAYERS, 7)
        for layer, position in [(0, 3), (1, 2), (LAYERS - 1, 6), (1, 0)]:
            together = range(max(0, layer - 1), layer + 1) if kind != "resid_post" else [layer]
            names = [(f"blocks.{i}.{kind}", position) for i in together]
            expected = by_hand(model, tokens, found.noise, clean, names)
            torch.testing.assert_close(found.restored[kind][layer, position], expected, **CLOSE)
    assert found.effects["resid_post"].abs().max() > 1e-4
    assert not places._SLOTS and not places._ATTENTIONS


def test_what_cannot_matter_has_no_effect_and_the_last_state_is_the_answer():
    model, tokens = make("own"), text(1, 7)
    found = trace(model, tokens)
    before_the_subject = [effects[:, : SUBJECT[0]] for effects in found.effects.values()]
    torch.testing.assert_close(torch.cat(before_the_subject), torch.zeros(3 * LAYERS, 2).double(), **CLOSE)
    assert float(found.restored["resid_post"][-1, -1]) == pytest.approx(found.clean, rel=1e-9)
    quiet = trace(model, tokens, noise=0)
    for restored in quiet.restored.values():
        torch.testing.assert_close(restored, torch.full_like(restored, quiet.clean), **CLOSE)


def test_batches_of_any_size_give_the_same_and_padding_is_passed_on():
    model, tokens = make("llama"), text(1, 7)
    found = trace(model, tokens, position=4).restored
    padded = torch.cat([tokens[:, :5], torch.zeros(1, 2, dtype=torch.int64)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    others = [trace(model, tokens, position=4, rows=rows).restored for rows in (1, 4)]
    others.append(trace(model, padded, position=4, attention_mask=mask).restored)
    for other in others:
        for kind, values in found.items():
            torch.testing.assert_close(other[kind][:, :5], values[:, :5], **CLOSE)


def test_the_noise_is_a_multiple_of_the_deviation_of_the_first_stream_at_the_subject():
    model, tokens = make("gemma3"), text(1, 7)
    with torch.no_grad(), lens.watch(model, "blocks.0.resid_pre") as seen:
        model(tokens)
    deviation = seen["blocks.0.resid_pre"][0, list(SUBJECT)].std()
    noise = trace(model, tokens, noise=2.0, samples=200).noise
    assert float(noise.std()) == pytest.approx(2 * float(deviation), rel=0.05)


class Letters:
    """A tokenizer of pairs of letters."""

    def encode(self, text, add_special_tokens=False):
        return [3 + ord(text[i]) % 40 for i in range(0, len(text), 2)]

    def decode(self, ids):
        return "".join(f"{i:02d}" for i in ids)


def test_a_subject_is_positions_a_slice_or_a_part_of_the_text():
    model, tokens = make("own"), torch.tensor([[10, 21, 32, 43, 49]])
    expected = trace(model, tokens, subject=[1, 2])
    for subject in (slice(1, 3), [-4, 2], "13", "2132"):
        found = trace(model, tokens, subject=subject, tokenizer=Letters())
        assert found.subject == (1, 2) and found.noised == expected.noised
    assert trace(model, tokens, subject=-1).subject == (4,)
    assert trace(model, tokens, subject=1, target=None).target == int(model(tokens)[0, -1].argmax())


def test_it_prints_draws_and_names_its_best_states():
    found = trace(make("gpt2"), text(1, 7))
    layer, position, effect = found.best("resid_post")[0]
    assert (
        effect == float(found.effects["resid_post"].max()) == float(found.effects["resid_post"][layer, position])
    )
    assert len(found.table(top=2)) == 3 + 3 * 2 and "*" in str(found)
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 6
    with pytest.raises(ValueError, match=r"kind must be one of resid_post, .*got 'mlp'"):
        found.best("mlp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subject": 9}, "subject must be from -7 to 6"),
        ({"subject": []}, "subject must name at least one of the 7 positions"),
        ({"subject": "Paris"}, "subject is text, 'Paris': give the tokenizer"),
        (
            {"subject": "99", "tokenizer": Letters()},
            "subject must stand once in the text, and '99' stands 0 times",
        ),
        ({"noise": -1.0}, "noise must be finite and at least 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"kinds": ["mlp"]}, "kinds must be among resid_post, attention.out, mlp.out in this model, got 'mlp'"),
        ({"target": 50}, "target must be from 0 to 49"),
    ],
)
def test_bad_calls_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trace(make("own"), text(1, 7), **options)


def test_several_prompts_dropout_and_a_model_without_a_head_are_refused():
    with pytest.raises(ValueError, match=r"clean must be one prompt of shape \(1, length\), got \(2, 20\)"):
        trace(make("own"), text())
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        trace(make("own", dropout=0.1).train(), text(1, 7))
    with pytest.raises(ValueError, match="gives no logits"):
        trace(make("llama").model, text(1, 7))


def test_it_works_under_inference_mode_and_leaves_no_graph():
    model, tokens = make("own"), text(1, 7)
    with torch.inference_mode():
        found = trace(model, tokens)
    assert found.noised == trace(model, tokens).noised
    assert not any(t.requires_grad or t.is_inference() for t in (*found.restored.values(), found.noise))
