"""A trap: the model copies what repeats, and no head scores as an induction head.

Two texts are read in turn, a word of one, a word of the other, and each repeats with a period of its own. The word
that foretells the next one is not the present word, but the one before it. So the circuit stands one token further
apart than the induction score asks for, and the score does not see it. The lag profile does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.demo.induction import START, VOCABULARY, make_model
from fastattn.demo.pictures import FUSED, QUIET, plain
from fastattn.demo.stories.stage import Stage, lag_profiles, percent
from fastattn.lens import head_report
from fastattn.lens.showing import new_figure

LENGTH, PERIODS, EXAM, STEPS, BATCH = 64, (4, 12), (9, 11), 900, 64


def tell(stage: Stage) -> dict[str, float]:
    stage.say(f"""
        A model of two layers reads two texts of random words in turn: a word of the first, a word of the second,
        and so on. Each text repeats, with a period of its own. Once a text repeats, its next word can be foretold.
        Then we look for the heads that do it, where the first text repeats after {EXAM[0]} words and the second
        after {EXAM[1]}.
    """)
    model = make_model(stage.seed, stage.device, stage.backend, tied=True, embedding_std=0.02)

    def loss(generator: torch.Generator) -> Tensor:
        tokens = _two_texts(_periods(generator), generator).to(stage.device)
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    stage.train(model, STEPS, loss)
    tokens = _two_texts(torch.tensor(EXAM).expand(BATCH, 2), stage.generator(1)).to(stage.device)
    known = _accuracy(model, tokens)
    report = head_report(model, tokens)
    induction, chance = float(report.induction.max()), report.chance["induction"]
    profile = lag_profiles(model, tokens)[1].mean(0)[: LENGTH // 2]
    # The word to read stands one text's period back, and a period of n words is 2n tokens of the two texts.
    expected = [2 * period - 1 for period in EXAM]
    found = sorted(profile.topk(2).indices.tolist())
    stage.table(
        ("what", "measured"),
        [
            ("accuracy on words that repeat", percent(known)),
            ("best induction score of any head", f"{induction:.2f}"),
            ("induction score of a head that attends evenly", f"{chance:.2f}"),
            ("tokens back where layer 1 looks most", f"{found[0]} and {found[1]}"),
            ("tokens back where the next words can be read", f"{expected[0]} and {expected[1]}"),
        ],
    )
    stage.say(f"""
        The model foretells {percent(known)} of the words, but no head has an induction score above
        {induction:.2f}. The score is the weight on tokens whose predecessor equals the present token. Here the
        predecessor belongs to the other text. The lag profile asks no such question: it is the weight at each
        distance, and layer 1 looks {found[0]} and {found[1]} tokens back, which is where the next words
        stand. So a low score says that one circuit is absent, and not that none is there: look at the lag
        profile too.
    """)
    stage.picture(_figure(profile, expected), "story_displaced_circuit")
    return {
        "accuracy": known,
        "induction": induction,
        "induction by chance": chance,
        "first lag": found[0],
        "second lag": found[1],
        "first lag expected": expected[0],
        "second lag expected": expected[1],
    }


def _periods(generator: torch.Generator) -> Tensor:
    """Two different ones, in words, for each row of a batch: (BATCH, 2)."""
    choices = PERIODS[1] - PERIODS[0] + 1
    return PERIODS[0] + torch.rand(BATCH, choices, generator=generator).argsort(1)[:, :2]


def _two_texts(periods: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens (B, 1 + LENGTH): a start, then words of the two texts in turn."""
    words = torch.randint(VOCABULARY, (len(periods), 2, PERIODS[1]), generator=generator)
    body = words.gather(2, torch.arange(LENGTH // 2) % periods[:, :, None])
    return F.pad(body.transpose(1, 2).flatten(1), (1, 0), value=START)


@torch.no_grad()
def _accuracy(model: torch.nn.Module, tokens: Tensor) -> float:
    """On the words that can be foretold: in each text from the second word of its second copy on."""
    right = model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
    return right[:, 2 * max(EXAM) + 2 :].float().mean().item()


def _figure(profile: Tensor, expected: list[int]) -> Any:
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    axes.plot(profile.tolist(), "o-", ms=3, color=FUSED)
    for lag in expected:
        axes.axvline(lag, color=QUIET, ls=":", lw=1)
    axes.set(xlabel="tokens back", ylabel="share of the attention")
    axes.set_title("Where layer 1 looks (dotted: where the next words can be read)", loc="left", fontsize=10)
    plain(axes)
    return figure
