"""One neuron of a small text model, found by what it writes, and confirmed by taking it out.

Miller and Neo, We Found An Neuron in GPT-2 (2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.demo import checks, text
from fastattn.demo.pictures import EAGER, FUSED, plain
from fastattn.demo.stories.stage import Stage
from fastattn.lens import ablate, neurons
from fastattn.lens.showing import new_figure
from fastattn.nn import TransformerModel

STEPS, WINDOWS, OTHERS = 300, 32, 20
TOKEN = ord(" ")


def tell(stage: Stage) -> dict[str, float]:
    stage.say("""
        A byte-level GPT of two layers learns to read the documentation inside this Python. Each neuron of its
        MLPs writes one fixed vector to the stream, times how active it is. We look for the neuron that adds
        most to the logit of the space where a space comes next, on text that the model has not read, and take
        it out.
    """)
    corpus = text.Corpus.split(checks.read_text(None))
    model = text.make_runs(stage.seed, stage.device, stage.backend)[0].model
    stage.train(model, STEPS, lambda generator: text.loss_of(model, corpus.batch(generator).to(stage.device)))
    windows = corpus.held_out_windows(WINDOWS).to(stage.device)
    tokens, following = windows[:, :-1], windows[:, 1:]
    before = following == TOKEN
    found = neurons(model, TOKEN, tokens, counted=before, top=5)
    best = found.top[0]
    whole = _log_probability(model, tokens, before, None)

    def lost(neuron: tuple[int, int]) -> float:
        return whole - _log_probability(model, tokens, before, neuron)

    losses = {f"L{n.layer}N{n.neuron}": (n.mean or 0.0, lost((n.layer, n.neuron))) for n in found.top}
    others = []
    generator, hidden = stage.generator(2), len(found.congruence[best.layer])
    with stage.screen.progress("ablating others", stage.how_many(OTHERS)) as advance:
        for number in range(stage.how_many(OTHERS)):
            others.append(lost((best.layer, int(torch.randint(hidden, (), generator=generator)))))
            advance(number + 1, "")
    stage.table(
        ("neuron", "adds on average", "lost without it, nats"),
        [
            *((name, f"{mean:+.3f}", f"{loss:.3f}") for name, (mean, loss) in losses.items()),
            (f"{len(others)} others, the most", "", f"{max(others):.3f}"),
        ],
    )
    where = "   ".join(_context(tokens, firing.row, firing.position) for firing in (best.fires or ())[:3])
    first = losses[f"L{best.layer}N{best.neuron}"][1]
    stage.say(f"""
        Neuron {best.neuron} of layer {best.layer} adds most. Without it the space loses {first:.3f} nats of log
        probability where it comes next; of {len(others)} neurons drawn at random none takes more than
        {max(others):.3f}. It adds most after:
    """)
    stage.screen.console.print(f"{where}\n", markup=False)
    stage.picture(_figure(losses, others), "story_neuron")
    return {
        "added": best.mean or 0.0,
        "lost": first,
        "lost without another, at most": max(others),
        "lost without another, on average": sum(others) / len(others),
    }


@torch.no_grad()
def _log_probability(
    model: TransformerModel, tokens: Tensor, before: Tensor, neuron: tuple[int, int] | None
) -> float:
    """The mean log probability of the token where it comes next, with one neuron taken out."""
    if neuron is None:
        logits = model(tokens)
    else:
        with ablate(model, neurons=[neuron]):
            logits = model(tokens)
    return logits.log_softmax(-1)[..., TOKEN][before].mean().item()


def _context(tokens: Tensor, row: int, position: int) -> str:
    """The bytes before a position, and its own."""
    seen = bytes(tokens[row, max(0, position - 11) : position + 1].tolist())
    return repr(seen.decode("utf-8", errors="replace"))


def _figure(losses: dict[str, tuple[float, float]], others: list[float]) -> Any:
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    axes.bar(
        range(len(losses)), [loss for _, loss in losses.values()], color=FUSED, label="found by what they write"
    )
    axes.bar(range(len(losses), len(losses) + len(others)), sorted(others)[::-1], color=EAGER, label="at random")
    axes.set_xticks(range(len(losses)), list(losses), rotation=30, ha="right", fontsize=8)
    axes.set(ylabel="log probability lost, nats")
    axes.set_title("What the space loses where it comes next, without one neuron", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    plain(axes)
    return figure
