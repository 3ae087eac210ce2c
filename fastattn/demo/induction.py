"""Act two: a two-layer attention-only model in which induction heads form, and a look at its heads.

A sequence is a random period, repeated over and over. To continue it, a head must find where the present token
stood before and read what followed: induction. That takes two layers: the head needs a previous-token head below
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.lens import HeadScores, model_head_scores
from fastattn.nn import TransformerModel

VOCABULARY, LENGTH, BATCH = 64, 48, 64
START = VOCABULARY  # the token before each sequence
PERIODS = (8, 24)
LEARNING_RATE, WARMUP, CLIP = 3e-3, 50, 1.0


def make_model(
    seed: int, device: torch.device, backend: str | None = None, layers: int = 2, **fields: Any
) -> TransformerModel:
    """Attention only, rotary positions; `fields` are those of a TransformerConfig that should differ."""
    torch.manual_seed(seed)
    usual = {"positions": "rotary", "mlp": None, "embedding_std": 1.0, "tied": False}
    sizes = {"vocab_size": VOCABULARY + 1, "embed_dim": 64, "num_heads": 4, "num_layers": layers}
    return TransformerModel(**{**sizes, **usual, **fields}, backend=backend).to(device)


def repeated_sequences(generator: torch.Generator, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Tokens (batch, 1 + LENGTH) and the period of each row (batch, 1).

    Each row has its own period: with a fixed one the model would learn the distance, not the content.
    """
    period = torch.randint(PERIODS[0], PERIODS[1] + 1, (batch, 1), generator=generator)
    words = torch.randint(VOCABULARY, (batch, PERIODS[1]), generator=generator)
    body = words.gather(1, torch.arange(LENGTH) % period)
    return F.pad(body, (1, 0), value=START), period


@dataclass(frozen=True)
class Look:
    """The losses and the head scores of the model at one step."""

    step: int
    first_loss: float  # nats, on tokens that cannot be predicted
    repeat_loss: float  # nats, on tokens that were seen one period ago
    accuracy: float  # on the latter
    scores: HeadScores  # each (layers, heads), on the CPU


@dataclass
class Training:
    """A model in training, its losses and the looks inside, in order."""

    model: TransformerModel
    losses: list[float] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)


def train(training: Training, steps: int, every: int, seed: int) -> Iterator[int]:
    """Train on fresh sequences, with a look inside after each `every` steps; yields the number of steps done, 0
    first."""
    model = training.model
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    exam = repeated_sequences(torch.Generator().manual_seed(seed + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            training.looks.append(look(model, step, *exam))
        yield step
        if step < steps:
            tokens = repeated_sequences(generator)[0].to(device)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            training.losses.append(loss.item())


@torch.no_grad()
def look(model: TransformerModel, step: int, tokens: Tensor, period: Tensor) -> Look:
    device = next(model.parameters()).device
    logits = model(tokens[:, :-1].to(device)).float().cpu()
    targets = tokens[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    # Target i of a row is word i. From word `period` + 1 on, the word before it has been seen with its successor.
    foretold = torch.arange(LENGTH) > period
    unseen = torch.arange(LENGTH) < period
    scores = model_head_scores(model, tokens.to(device))
    return Look(
        step=step,
        first_loss=losses[unseen].mean().item(),
        repeat_loss=losses[foretold].mean().item(),
        accuracy=(logits.argmax(-1) == targets)[foretold].float().mean().item(),
        scores=HeadScores(*(score.float().cpu() for score in scores)),
    )


def phase_change(looks: list[Look]) -> tuple[int, int] | None:
    """The steps between which the loss on repeats fell from nine tenths to one tenth of the way to its lowest
    value.

    None if it did not fall to half.
    """
    first, lowest = looks[0].repeat_loss, min(look.repeat_loss for look in looks)
    if lowest > 0.5 * first:
        return None
    high, low = lowest + 0.9 * (first - lowest), lowest + 0.1 * (first - lowest)
    begin = next(look.step for look in looks if look.repeat_loss < high)
    end = next(look.step for look in looks if look.repeat_loss < low)
    return begin, end
