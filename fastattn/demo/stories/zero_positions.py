"""A set becomes a sequence: positions that start at zero, and are learned.

Without positions an encoder is equivariant: permute the tokens, and the results are permuted alike (Lee et al.,
Set Transformer, 2019). Learned positions that start at zero leave it so until training needs the order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.demo.pictures import EAGER, FUSED, plain
from fastattn.demo.stories.stage import Stage, percent
from fastattn.lens.showing import new_figure
from fastattn.nn import TransformerModel

STEPS, LOOKS, LENGTH, VOCABULARY, BATCH, EXAM = 400, 16, 8, 16, 64, 256


def tell(stage: Stage) -> dict[str, float]:
    stage.say(f"""
        An encoder without positions sees a set: nothing tells it which token stands where. Here the positions
        are vectors that are learned, and all start at zero. The task needs order: at each of {LENGTH} places,
        name the token that stands one place before (before the first stands the last). We permute the tokens
        and compare: if the results are permuted alike, the model sees a set.
    """)
    torch.manual_seed(stage.seed)
    model = TransformerModel(
        vocab_size=VOCABULARY,
        embed_dim=64,
        num_heads=4,
        num_layers=2,
        max_length=LENGTH,
        positions="zero",
        causal=False,
        tied=False,
        embedding_std=0.3,
        backend=stage.backend,
    ).to(stage.device)
    exam = _batch(stage.generator(1), EXAM).to(stage.device)
    order = torch.randperm(LENGTH, generator=stage.generator(1)).to(stage.device)
    looks: list[tuple[int, float, float, float]] = []

    def look(step: int) -> None:
        logits, permuted = model(exam), model(exam[:, order])
        right = (logits.argmax(-1) == exam.roll(1, 1)).float().mean().item()
        change = ((permuted - logits[:, order]).norm() / logits.norm()).item()
        assert model.position_embedding is not None
        looks.append((step, right, change, model.position_embedding.weight.norm().item()))

    def loss(generator: torch.Generator) -> Tensor:
        tokens = _batch(generator, BATCH).to(stage.device)
        return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())

    stage.train(model, STEPS, loss, looks=LOOKS, look=look)
    stage.table(
        ("step", "accuracy", "change when permuted", "length of all positions"),
        [(str(step), percent(right), f"{change:.1e}", f"{size:.2f}") for step, right, change, size in looks[::2]],
    )
    first, last = looks[0], looks[-1]
    stage.say(f"""
        Before training a permutation changes the results by {first[2]:.0e} of their size, which is rounding: a
        set. After it, by {last[2]:.1f}: a sequence, and {percent(last[1])} of the answers are right. A set
        cannot do better than to guess among the tokens that it sees. The zeros do not last: the gradient of
        each position differs, since what is asked there differs.
    """)
    stage.picture(_figure(looks), "story_zero_positions")
    return {
        "change before": first[2],
        "positions before": first[3],
        "accuracy before": first[1],
        "change after": last[2],
        "positions after": last[3],
        "accuracy after": last[1],
    }


def _batch(generator: torch.Generator, batch: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, LENGTH), generator=generator)


def _figure(looks: list[tuple[int, float, float, float]]) -> Any:
    figure = new_figure(8, 5)
    accuracy, change = figure.subplots(2, 1, sharex=True)
    steps = [look[0] for look in looks]
    accuracy.plot(steps, [look[1] for look in looks], "o-", ms=3, color=FUSED)
    accuracy.set(ylabel="accuracy", ylim=(-0.02, 1.02))
    accuracy.set_title("Naming the token before: from guessing to knowing", loc="left", fontsize=10)
    change.plot(steps, [look[2] for look in looks], "o-", ms=3, color=EAGER)
    change.set(xlabel="step", ylabel="change, relative", yscale="log")
    change.set_title("How much a permutation changes: from rounding to all", loc="left", fontsize=10)
    for axes in (accuracy, change):
        plain(axes)
    return figure
