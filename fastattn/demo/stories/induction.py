"""Induction heads form in a phase change, and need two layers: the control with one layer fails.

Olsson et al., In-context Learning and Induction Heads (2022).
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.demo import induction
from fastattn.demo.pictures import EAGER, FUSED, QUIET, plain
from fastattn.demo.stories.stage import Stage, percent
from fastattn.lens.showing import new_figure

STEPS = 400


def tell(stage: Stage) -> dict[str, float]:
    stage.say("""
        Sequences of random tokens repeat, each with a period of its own. The second time round every token can
        be foretold: find where the present token stood before, and read what followed it there. A head that
        does this is an induction head. It needs to know of each place which token stood before it, and a head
        of a layer below must have written that there. So two layers can do it, and one cannot.
    """)
    trained = {layers: _train(stage, layers) for layers in (2, 1)}
    stage.table(
        ("step", "two layers: accuracy", "induction", "previous token", "one layer: accuracy", "induction"),
        [
            (
                str(two.step),
                percent(two.accuracy),
                f"{float(two.scores.induction.max()):.2f}",
                f"{float(two.scores.previous_token.max()):.2f}",
                percent(one.accuracy),
                f"{float(one.scores.induction.max()):.2f}",
            )
            for two, one in list(zip(trained[2].looks, trained[1].looks, strict=True))[::2]
        ],
    )
    two, one = trained[2].looks[-1], trained[1].looks[-1]
    change = induction.phase_change(trained[2].looks)
    if change is not None:
        stage.say(f"""
            With two layers most of the loss on repeats is lost between steps {change[0]} and {change[1]}. In
            those steps a head of layer 0 turns to the token before, and heads of layer 1 use what it writes.
        """)
    stage.say(f"""
        In the end the two layers foretell {percent(two.accuracy)} of the repeated tokens, the one layer
        {percent(one.accuracy)}. Scores are the best head's mean attention weight: 1 is all of it.
    """)
    stage.picture(_figure(trained), "story_induction")
    return {
        "accuracy": two.accuracy,
        "induction in layer 1": float(two.scores.induction[1].max()),
        "induction in layer 0": float(two.scores.induction[0].max()),
        "previous token in layer 0": float(two.scores.previous_token[0].max()),
        "steps of the phase change": float("nan") if change is None else change[1] - change[0],
        "accuracy of one layer": one.accuracy,
        "induction of one layer": float(one.scores.induction.max()),
    }


def _train(stage: Stage, layers: int) -> induction.Training:
    torch.set_num_threads(1)
    training = induction.Training(induction.make_model(stage.seed, stage.device, stage.backend, layers))
    steps = stage.steps or stage.how_many(STEPS)
    with stage.screen.progress(f"training {layers} layer{'s' * (layers > 1)}", steps) as advance:
        for done in induction.train(training, steps, max(1, steps // 20), stage.seed):
            advance(done, f"accuracy {percent(training.looks[-1].accuracy)}")
    return training


def _figure(trained: dict[int, induction.Training]) -> Any:
    figure = new_figure(8, 6)
    accuracy, scores = figure.subplots(2, 1, sharex=True)
    for layers, color, name in ((2, FUSED, "two layers"), (1, EAGER, "one layer")):
        looks = trained[layers].looks
        steps = [look.step for look in looks]
        accuracy.plot(steps, [look.accuracy for look in looks], color=color, lw=2, label=name)
        induced = [float(look.scores.induction.max()) for look in looks]
        scores.plot(steps, induced, color=color, lw=2, label=f"{name}, induction")
    looks = trained[2].looks
    previous = [float(look.scores.previous_token.max()) for look in looks]
    scores.plot(
        [look.step for look in looks], previous, color=FUSED, ls=":", lw=2, label="two layers, previous token"
    )
    accuracy.set(ylabel="accuracy on repeated tokens", ylim=(-0.02, 1.02))
    accuracy.set_title("Two layers learn to copy all at once, one layer does not", loc="left", fontsize=10)
    scores.set(xlabel="step", ylabel="best head's score", ylim=(-0.02, 1.02))
    change = induction.phase_change(looks)
    for axes in (accuracy, scores):
        plain(axes)
        axes.legend(frameon=False, loc="upper left", fontsize=9)
        if change is not None:
            axes.axvspan(*change, color=QUIET, alpha=0.15, lw=0)
    return figure
