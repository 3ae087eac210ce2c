"""What a small model believes after each layer, read from its residual stream by its own unembedding.

nostalgebraist, interpreting GPT: the logit lens (2020).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.demo.induction import LENGTH, START, VOCABULARY, make_model, repeated_sequences
from fastattn.demo.pictures import EAGER, FUSED, plain
from fastattn.demo.stories.stage import Stage
from fastattn.lens import logit_lens
from fastattn.lens.showing import new_figure

STEPS, PERIOD, ROWS = 400, 16, 64


def tell(stage: Stage) -> dict[str, float]:
    stage.say("""
        The residual stream has the same width in every layer, so the final norm and the unembedding can read it
        anywhere, not only at the end. We train two layers of attention on random tokens that repeat, and ask
        after each layer which token would come next: on the first copy, which nothing foretells, and on the
        second, which induction foretells.
    """)
    model = make_model(stage.seed, stage.device, stage.backend)

    def loss(generator: torch.Generator) -> Tensor:
        tokens = repeated_sequences(generator)[0].to(stage.device)
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    stage.train(model, STEPS, loss)
    words = torch.randint(VOCABULARY, (ROWS, PERIOD), generator=stage.generator(1))
    tokens = F.pad(words[:, torch.arange(LENGTH) % PERIOD], (1, 0), value=START).to(stage.device)
    seen = logit_lens(model, tokens[:, :-1], 1, tokens[:, 1:])
    assert seen.target_probability is not None and seen.target_rank is not None
    # Target i is word i. The word after the first of the second copy is the first that induction foretells.
    places = {"first copy": slice(0, PERIOD), "second copy": slice(PERIOD + 1, 2 * PERIOD)}
    probability = {name: seen.target_probability[:, :, at].mean((1, 2)).tolist() for name, at in places.items()}
    rank = {name: seen.target_rank[:, :, at].float().mean((1, 2)).tolist() for name, at in places.items()}
    kl = seen.kl[:, :, places["second copy"]].mean((1, 2)).tolist()
    rows = ("embedding", "layer 0", "layer 1")
    stage.table(
        (
            "read from",
            *(f"{name}: {what}" for name in places for what in ("probability", "mean rank")),
            "KL, nats",
        ),
        [
            (row, *(f(name) for name in places for f in (_two(probability, i), _one(rank, i))), f"{kl[i]:.2f}")
            for i, row in enumerate(rows)
        ],
    )
    stage.say(f"""
        On the second copy the right token has a probability of {probability["second copy"][1]:.2f} after layer
        0 and of {probability["second copy"][2]:.2f} after layer 1. Layer 0 only writes at each place which
        token stood before: no answer can be read there yet. Layer 1 finds it and writes it. On the first copy
        there is nothing to find, and no layer knows better than chance, {1 / VOCABULARY:.2f}. KL is how far a
        reading is from the model's own output on the second copy.
    """)
    stage.picture(_figure(seen.target_probability.mean(1).cpu(), rows), "story_logit_lens")
    return {
        "second copy, before the last layer": probability["second copy"][1],
        "second copy, output": probability["second copy"][2],
        "first copy, output": probability["first copy"][2],
        "mean rank, output": rank["second copy"][2],
        "KL before the last layer": kl[1],
    }


def _two(values: dict[str, list[float]], row: int) -> Any:
    return lambda name: f"{values[name][row]:.2f}"


def _one(values: dict[str, list[float]], row: int) -> Any:
    return lambda name: f"{values[name][row]:.1f}"


def _figure(probability: Tensor, rows: tuple[str, ...]) -> Any:
    """Probability of the right token (3, L) by position."""
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    for values, row, style in zip(probability.tolist(), rows, (":", "--", "-"), strict=True):
        axes.plot(values, style, color=FUSED if style == "-" else EAGER, label=row)
    for border in range(PERIOD, LENGTH, PERIOD):
        axes.axvline(border, color="black", lw=0.6)
    axes.set(xlabel="position of the token that is foretold", ylabel="probability of the right token")
    axes.set_ylim(-0.02, 1.02)
    axes.set_title("Only the last layer knows what comes, from the second copy on", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    plain(axes)
    return figure
