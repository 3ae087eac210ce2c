"""A trap: a head scores as an induction head, and has learned a distance.

Where all sequences repeat with one period, the token to read always stands at the same distance. Learned positions
let a head of the first layer look there, whatever the tokens are. The induction score cannot tell the difference.
Sequences of another period can.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.demo.induction import LENGTH, START, VOCABULARY, make_model
from fastattn.demo.pictures import EAGER, FUSED, plain
from fastattn.demo.stories.stage import Stage, lag_profiles, percent
from fastattn.lens import HeadReport, head_report
from fastattn.lens.showing import new_figure
from fastattn.nn import TransformerModel

PERIOD, OTHER, STEPS, BATCH = 16, 11, 250, 64


def tell(stage: Stage) -> dict[str, float]:
    stage.say(f"""
        A model of two layers reads random tokens that repeat, all with the same period, {PERIOD}. Then we ask
        which head does induction, on sequences of that period and on others of period {OTHER}.
    """)
    model = make_model(
        stage.seed, stage.device, stage.backend, positions="learned", max_length=LENGTH + 1, embedding_std=0.02
    )

    def loss(generator: torch.Generator) -> Tensor:
        tokens = repeated(generator, PERIOD).to(stage.device)
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    stage.train(model, STEPS, loss)
    exams = {period: repeated(stage.generator(1), period).to(stage.device) for period in (PERIOD, OTHER)}
    reports = {period: head_report(model, tokens) for period, tokens in exams.items()}
    accuracies = {period: accuracy(model, tokens, period) for period, tokens in exams.items()}
    stage.table(
        ("best head's score", f"period {PERIOD}, as learned", f"period {OTHER}, new"),
        [
            ("induction, layer 0", *(f"{_best(reports[p], 'induction', 0):.2f}" for p in exams)),
            ("induction, layer 1", *(f"{_best(reports[p], 'induction', 1):.2f}" for p in exams)),
            ("previous token, layer 0", *(f"{_best(reports[p], 'previous_token', 0):.2f}" for p in exams)),
            ("accuracy on repeated tokens", *(percent(accuracies[p]) for p in exams)),
        ],
    )
    layer, head, _ = max((h for h in reports[PERIOD].best("induction", 8) if h[0] == 0), key=lambda h: h[2])
    profiles = {period: lag_profiles(model, tokens)[layer, head] for period, tokens in exams.items()}
    # Within half of the text: two periods back stands the same token again.
    lags = {period: int(profile[: LENGTH // 2].argmax()) for period, profile in profiles.items()}
    stage.say(f"""
        Head {head} of layer 0 has a high induction score. But a true induction head stands above a previous-
        token head, and there is none. The lag profile shows what it does: it looks back {lags[PERIOD]} tokens
        where the period is {PERIOD}, and {lags[OTHER]} tokens where the period is {OTHER}. It has learned a
        distance, and does not compare tokens. With another period it fails. So take a score as evidence only on
        texts where a shortcut fails: draw the period anew for each sequence.
    """)
    stage.picture(_figure(profiles, f"layer 0, head {head}"), "story_positional_shortcut")
    return {
        "induction in layer 0": _best(reports[PERIOD], "induction", 0),
        "previous token in layer 0": _best(reports[PERIOD], "previous_token", 0),
        "accuracy": accuracies[PERIOD],
        "lag": lags[PERIOD],
        "induction in layer 0, other period": _best(reports[OTHER], "induction", 0),
        "accuracy, other period": accuracies[OTHER],
        "lag, other period": lags[OTHER],
    }


def repeated(generator: torch.Generator, period: int, batch: int = BATCH) -> Tensor:
    """Tokens (batch, 1 + LENGTH): a start, then random words that repeat with this period."""
    words = torch.randint(VOCABULARY, (batch, period), generator=generator)
    return F.pad(words[:, torch.arange(LENGTH) % period], (1, 0), value=START)


@torch.no_grad()
def accuracy(model: TransformerModel, tokens: Tensor, period: int) -> float:
    """On the tokens that can be foretold, from the second of the second copy on."""
    right = model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
    return right[:, period + 1 :].float().mean().item()


def _best(report: HeadReport, score: str, layer: int) -> float:
    return float(getattr(report, score)[layer].max())


def _figure(profiles: dict[int, Tensor], name: str) -> Any:
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    for (period, profile), color in zip(profiles.items(), (FUSED, EAGER), strict=True):
        axes.plot(profile[: LENGTH // 2 + 8].tolist(), "o-", ms=3, color=color, label=f"period {period}")
        axes.axvline(period - 1, color=color, ls=":", lw=1)
    axes.set(xlabel="tokens back", ylabel="share of the attention")
    axes.set_title(f"Where {name} looks (dotted: where induction would look)", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    plain(axes)
    return figure
