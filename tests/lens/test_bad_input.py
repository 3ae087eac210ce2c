"""What cannot be answered is refused in words, by every question of the lens, before the model runs."""

from __future__ import annotations

import pytest
import torch
from lens_models import make, text

import fastattn
from fastattn import lens


class Numbers:
    """A tokenizer whose words are numbers."""

    def encode(self, string, add_special_tokens=True):
        return [int(word) for word in string.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))


QUESTIONS = {
    "head_report": lambda model, **more: lens.head_report(model, text(), **more),
    "model_head_scores": lambda model, **more: lens.model_head_scores(model, text(), **more),
    "logit_lens": lambda model, **more: lens.logit_lens(model, text(), **more),
    "attribution": lambda model, **more: lens.attribution(model, text(), **{"target": 7, **more}),
    "neurons": lambda model, **more: lens.neurons(model, **{"token": 7, "text_tokens": text(), **more}),
    "virtual_weights": lambda model, **more: lens.virtual_weights(model, **{"token": 7, **more}),
    "causal_trace": lambda model, **more: lens.causal_trace(model, text(1), **{"subject": [3], **more}),
    "rollout": lambda model, **more: lens.rollout(model, text(), **more),
    "TunedLens.fit": lambda model, **more: lens.TunedLens(3, 32, dtype=torch.float64).fit(model, [text()], **more),
    "path_patch": lambda model, **more: lens.path_patch(
        model, text(), text(), **{"sender": "blocks.0.mlp.out", "receiver": "logits", **more}
    ),
}
CHANGES = {
    "ablate": lambda model, **more: lens.ablate(model, heads=[(0, 1)], by="mean", source=text(), **more),
    "scale_heads": lens.scale_heads,
    "knock_out": lambda model, **more: lens.knock_out(model, [(0, 1)], fastattn.masks.window(1), **more),
    "patch_activations": lambda model, name="blocks.0.resid_post": lens.patch_activations(
        model, {name: torch.zeros(32)}
    ),
    "steer": lambda model, name="blocks.0.resid_post": lens.steer(model, name, torch.zeros(32)),
}
RUN = [name for name in QUESTIONS if name != "virtual_weights"]


def never_runs(model):
    def runs(*_):
        raise AssertionError("the model ran")

    model.token_embedding.register_forward_pre_hook(runs)
    return model


@pytest.mark.parametrize("question", [*RUN, *CHANGES])
def test_a_model_that_drops_is_refused(question):
    model = never_runs(make("own", dropout=0.1).train())
    with pytest.raises(ValueError, match=r"in training mode with .* = 0.1: call model.eval\(\) first"):
        if question in QUESTIONS:
            QUESTIONS[question](model)
        else:
            with CHANGES[question](model):
                pass


@pytest.mark.parametrize(
    ("question", "argument"),
    [
        ("logit_lens", "targets"), ("attribution", "target"), ("attribution", "against"), ("neurons", "token"),
        ("neurons", "against"), ("virtual_weights", "token"), ("causal_trace", "target"),
    ],
)  # fmt: skip
def test_a_target_of_several_tokens_is_refused(question, argument):
    with pytest.raises(ValueError, match=f"{argument} must be one token, and '4 5' is 2: '4', '5'"):
        QUESTIONS[question](never_runs(make("own")), tokenizer=Numbers(), **{argument: "4 5"})


@pytest.mark.parametrize(
    "look",
    [
        lambda model, name: lens.watch(model, name),
        CHANGES["patch_activations"],
        CHANGES["steer"],
        lambda model, name: QUESTIONS["path_patch"](model, sender=name),
        lambda model, name: QUESTIONS["path_patch"](model, receiver=name),
    ],
)
def test_a_name_that_matches_nothing_is_told_what_there_is(look):
    says = r"'blocks.0.attn.hook_zz' names nothing.*whose blocks are 0 to 2.*closest first: blocks\.\*\.attention"
    with pytest.raises(ValueError, match=says), look(never_runs(make("own")), name="blocks.0.attn.hook_zz"):
        pass


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        (torch.zeros(2, 20), TypeError, r"labels must be integers, got torch.float32"),
        (torch.zeros(20, dtype=torch.int64), ValueError, r"labels must have shape \(batch, keys\), got \(20,\)"),
        ([1, 2], TypeError, "labels must be a torch.Tensor, got list"),
    ],
)
def test_labels_that_are_none_are_refused_before_they_are_watched(labels, error, says):
    model = make("own")
    with pytest.raises(error, match=says), lens.watch(model, "blocks.0.attention.induction", labels=labels):
        raise AssertionError("it was entered")


def test_labels_of_another_length_are_refused_where_attention_is_seen():
    model = make("own")
    says = r"labels must have shape \(2, 20\), one for each key, got \(2, 19\)"
    with (
        lens.watch(model, "blocks.0.attention.induction", labels=text(2, 19)),
        pytest.raises(ValueError, match=says),
    ):
        model(text())
