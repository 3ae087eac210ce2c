"""What a story is told with: a screen, a folder for pictures, a seed, and one training loop for all."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fastattn.demo import checks
from fastattn.demo.screen import Screen
from fastattn.demo.threads import restored_threads
from fastattn.errors import CommandError
from fastattn.lens import watch
from fastattn.nn import TransformerModel

LEARNING_RATE, WARMUP, CLIP = 3e-3, 50, 1.0
QUICK_STEPS = 6


@dataclass
class Stage:
    """The settings of a story, and what it shows itself with."""

    output: Path
    device: torch.device
    backend: str | None = None
    seed: int = 0
    steps: int | None = None
    quick: bool = False
    screen: Screen = field(default_factory=Screen)

    @classmethod
    def prepare(cls, options: argparse.Namespace) -> Stage:
        """Everything that can go wrong is tried now, not after the training."""
        if options.steps is not None and options.steps < 1:
            raise CommandError(f"--steps must be at least 1, got {options.steps}")
        if options.text is not None:
            raise CommandError("--text is read by the demo without --story: stories make their own texts")
        device = checks.pick_device(options.device)
        checks.check_backend(device, options.backend)
        output = checks.prepare_folder(options.output)
        return cls(output, device, options.backend, options.seed, options.steps, options.quick)

    @contextmanager
    def open(self, name: str, sentence: str) -> Iterator[None]:
        """A headline before the story, and how long it took after it."""
        start = time.perf_counter()
        self.screen.act(name)
        self.say(sentence)
        if self.quick:
            self.say(
                "This is a quick run of a few steps: what is said of the outcome holds for the whole training."
            )
        with restored_threads():
            yield
        self.say(f"Done in {time.perf_counter() - start:.0f} s.")

    def say(self, text: str = "") -> None:
        """A paragraph in rich's markup, wrapped at the terminal's width, not where the source breaks it."""
        self.screen.say(" ".join(text.split()))
        self.screen.say()

    def table(self, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        """Lines of words and figures, the first column to the left."""
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for i, heading in enumerate(header):
            table.add_column(heading, justify="right" if i else "left")
        for line in lines:
            table.add_row(*(Text(cell) for cell in line))  # Text: brackets in a token are no markup
        self.screen.console.print(table)
        self.screen.say()

    def picture(self, figure: Any, name: str) -> Path:
        """Save a figure in the output folder, and say where."""
        path = self.output / f"{name}.png"
        figure.savefig(path, dpi=150)
        self.say(f"picture: {path}")
        return path

    def how_many(self, usual: int, quick: int = QUICK_STEPS) -> int:
        """A number of steps or samples: the usual one, few under --quick."""
        return quick if self.quick else usual

    def generator(self, offset: int = 0) -> torch.Generator:
        """Fresh, from the story's seed."""
        return torch.Generator().manual_seed(self.seed + offset)

    def train(
        self,
        model: nn.Module,
        steps: int,
        loss_of: Callable[[torch.Generator], Tensor],
        *,
        task: str = "training",
        learning_rate: float = LEARNING_RATE,
        looks: int = 1,
        look: Callable[[int], None] | None = None,
    ) -> None:
        """Train with AdamW, a linear warm-up and clipped gradients.

        Args:
            loss_of: the loss of a batch that it draws from the generator.
            looks: how often `look` is called with the number of steps done, evenly, beside step 0 and the last.
        """
        # One thread: these models are small, and the figures should not depend on the machine's cores.
        torch.set_num_threads(1)
        steps = self.steps if self.steps is not None else self.how_many(steps)
        generator = self.generator()
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), fused=True)
        every = max(1, steps // looks)
        note = ""
        with self.screen.progress(task, steps) as advance:
            for step in range(steps + 1):
                if look is not None and (step % every == 0 or step == steps):
                    with torch.no_grad():
                        look(step)
                advance(step, note)
                if step < steps:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate * min(1.0, (step + 1) / WARMUP)
                    optimizer.zero_grad()
                    loss = loss_of(generator)
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                    optimizer.step()
                    note = f"loss {loss.item():.3f}"


def percent(value: float) -> str:
    return f"{value:.0%}"


@torch.no_grad()
def lag_profiles(model: TransformerModel, tokens: Tensor) -> Tensor:
    """(layers, heads, L): the share of a head's attention, over all queries, that is on the token l back."""
    length = tokens.shape[1]
    with watch(model, "blocks.*.attention.lag_profile") as seen:
        model(tokens)
    profiles = torch.stack([seen[f"blocks.{i}.attention.lag_profile"] for i in range(len(model.blocks))])
    # Lag l stands at l + length - 1; the negative ones are of keys after the query.
    return profiles[..., length - 1 :].mean(1).float().cpu() / length
