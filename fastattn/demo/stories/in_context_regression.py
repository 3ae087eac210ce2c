"""A transformer fits a line in its context, and compares with least squares and ridge regression.

Garg et al., What Can Transformers Learn In-Context? (2022); Akyurek et al., What Learning Algorithm Is In-Context
Learning? (2023).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.demo.pictures import EAGER, FUSED, QUIET, plain
from fastattn.demo.stories.stage import Stage
from fastattn.lens.showing import new_figure
from fastattn.nn import MLP, SelfAttention, TransformerBlock

STEPS, DIMENSION, PAIRS, WIDTH, LAYERS, BATCH, EXAM, LOOKS = 2000, 3, 8, 64, 3, 64, 2000, 4
RIDGE = 0.1


class Regressor(nn.Module):
    """Blocks of the GPT-2 family over x_1, y_1, x_2, y_2, ...: at each x it says the y that follows."""

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.read = nn.Linear(DIMENSION + 1, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(2 * PAIRS, WIDTH))
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(
                    SelfAttention(WIDTH, 2, causal=True, backend=backend), MLP(WIDTH, backend=backend)
                )
                for _ in range(LAYERS)
            )
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.answer = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, pairs, dimension), y (B, pairs); what it expects of each y (B, pairs)."""
        pairs = torch.stack([F.pad(x, (0, 1)), F.pad(y[..., None], (DIMENSION, 0))], 2)
        stream = self.blocks(self.read(pairs.flatten(1, 2)) + self.positions)
        return self.answer(self.norm(stream))[:, ::2, 0]


def tell(stage: Stage) -> dict[str, float]:
    stage.say(f"""
        Each text is a small regression: {PAIRS} pairs of a point x in {DIMENSION} dimensions and y = w . x, and
        every text has a w of its own. A GPT of {LAYERS} layers reads the pairs and says each y before it sees
        it. It is never told w, and its weights do not change: what it learns about w, it learns from its
        context. With k pairs seen we compare its squared error with those of least squares and of ridge
        regression on the same k pairs.
    """)
    torch.manual_seed(stage.seed)
    model = Regressor(stage.backend).to(stage.device)

    def loss(generator: torch.Generator) -> Tensor:
        x, y = (t.to(stage.device) for t in problems(generator, BATCH))
        return (model(x, y) - y).square().mean()

    x, y = problems(stage.generator(1), stage.how_many(EXAM, 200))
    errors: dict[str, list[float]] = {}

    def look(step: int) -> None:
        answers = model(x.to(stage.device), y.to(stage.device)).cpu()
        errors[f"step {step}"] = (answers - y).square().mean(0).tolist()

    stage.train(model, STEPS, loss, learning_rate=1e-3, looks=LOOKS, look=look)
    last = list(errors)[-1]
    exact = {"least squares": fitted(x, y, 0.0), f"ridge, {RIDGE}": fitted(x, y, RIDGE)}
    errors |= {name: (answers - y).square().mean(0).tolist() for name, answers in exact.items()}
    stage.table(
        ("error with k pairs seen", *map(str, range(PAIRS))),
        [(name, *(f"{e:.2f}" for e in values)) for name, values in errors.items()],
    )
    final, least = errors[last], errors["least squares"]
    stage.say(f"""
        With nothing seen every method errs by 1, the variance of y. With each pair the error falls, by a third
        for least squares, which knows w exactly after {DIMENSION} pairs. The transformer falls with it, from
        {final[0]:.2f} over {final[1]:.2f} and {final[2]:.2f} to {final[-1]:.2f} with {PAIRS - 1} pairs: it has
        learned to learn, though not to the last digit.
    """)
    stage.picture(_figure(errors, last), "story_in_context_regression")
    gaps = [abs(a - b) for a, b in zip(final[:DIMENSION], least[:DIMENSION], strict=True)]
    return {
        "error with nothing seen": final[0],
        "largest distance to least squares below three pairs": max(gaps),
        "error with three pairs": final[DIMENSION],
        "error with seven pairs": final[-1],
        "least squares with three pairs": least[DIMENSION],
        "largest rise": max(b - a for a, b in itertools.pairwise(final)),
    }


def problems(generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Points x (batch, pairs, dimension) and y (batch, pairs) of variance 1, each row with weights of its own."""
    weights = torch.randn(batch, DIMENSION, 1, generator=generator) / DIMENSION**0.5
    x = torch.randn(batch, PAIRS, DIMENSION, generator=generator)
    return x, (x @ weights)[..., 0]


def fitted(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """What regression on the pairs before each says of its y, (batch, pairs); in float64, the shortest weights."""
    x, y = x.double(), y.double()
    answers = [torch.zeros(len(x), dtype=torch.float64)]
    for k in range(1, x.shape[1]):
        seen, known = x[:, :k], y[:, :k, None]
        if ridge:
            weights = torch.linalg.solve(seen.mT @ seen + ridge * torch.eye(DIMENSION), seen.mT @ known)
        else:
            weights = torch.linalg.pinv(seen) @ known
        answers.append((x[:, k, None] @ weights)[:, 0, 0])
    return torch.stack(answers, 1)


def _figure(errors: dict[str, list[float]], last: str) -> Any:
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for name, values in errors.items():
        if name == last:
            axes.plot(values, "o-", color=FUSED, lw=2, label=f"transformer, {name}")
        elif name.startswith("step"):
            axes.plot(values, color=FUSED, alpha=0.25, label=name)
        else:
            axes.plot(values, "--" if "ridge" in name else "-", color=EAGER, label=name)
    axes.axvline(DIMENSION, color=QUIET, ls=":", lw=1)
    axes.set(xlabel="pairs seen", ylabel="squared error", ylim=(-0.03, 1.4))
    axes.set_title("What is learned within the context, against least squares", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    plain(axes)
    return figure
