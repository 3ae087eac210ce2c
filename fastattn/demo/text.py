"""Act one: a byte-level GPT learns to read, fused and eager side by side."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.demo.eager import eager_twin
from fastattn.errors import CommandError
from fastattn.measuring.measure import peak_memory, synchronize
from fastattn.nn import TransformerModel

CONTEXT, BATCH = 128, 8
LEARNING_RATE, WARMUP, CLIP = 3e-3, 100, 1.0
HELD_OUT = 0.1


@dataclass(frozen=True)
class Corpus:
    """Bytes as int64 tensors; the end of the text is held out."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def split(cls, text: bytes) -> Corpus:
        least = math.ceil(2 * (CONTEXT + 1) / HELD_OUT)
        if len(text) < least:
            raise CommandError(f"the text must have at least {least} bytes, got {len(text)}")
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        border = len(data) - int(len(data) * HELD_OUT)
        return cls(data[:border], data[border:])

    def batch(self, generator: torch.Generator) -> Tensor:
        """Random windows of the training text, (BATCH, CONTEXT + 1)."""
        starts = torch.randint(len(self.train) - CONTEXT, (BATCH, 1), generator=generator)
        return self.train[starts + torch.arange(CONTEXT + 1)]

    def held_out_windows(self, most: int) -> Tensor:
        """The held-out text cut into windows, (n, CONTEXT + 1)."""
        return self.held_out.unfold(0, CONTEXT + 1, CONTEXT)[:most]

    def passage(self) -> Tensor:
        """The held-out window (CONTEXT,) with the most letters: prose, if there is any."""
        windows = self.held_out.unfold(0, CONTEXT, CONTEXT)
        lower = windows | 0x20  # ASCII's capitals and small letters differ in this bit
        letters = ((lower >= ord("a")) & (lower <= ord("z"))).sum(1)
        return windows[letters.argmax()]


@dataclass
class Run:
    """One of the two models in training, with its losses and times."""

    name: str
    model: TransformerModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # bits per byte of each training step
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, bits per byte)
    seconds: list[float] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """The median, without the first steps, which warm up."""
        return statistics.median(self.seconds[3:] or self.seconds)


Runs = tuple[Run, Run]  # fused, eager


def make_runs(seed: int, device: torch.device, backend: str | None) -> Runs:
    """The fused model and its eager twin, from the same seed."""
    torch.manual_seed(seed)
    fused = TransformerModel(
        vocab_size=256,
        embed_dim=128,
        num_heads=4,
        num_layers=2,
        positions="rotary",
        backend=backend,
    ).to(device)
    return _run("fastattn", fused), _run("eager", eager_twin(fused))


def _run(name: str, model: TransformerModel) -> Run:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    return Run(name, model, optimizer)


def train(
    runs: Runs, corpus: Corpus, steps: int, every: int, seed: int, held_out_windows: int = 400
) -> Iterator[int]:
    """Train both on the same batches, step by step in turn; yields the number of steps done, 0 first.

    Held-out text is read before the first step, after each `every` and after the last.
    """
    generator = torch.Generator().manual_seed(seed)
    windows = corpus.held_out_windows(held_out_windows)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            for run in runs:
                run.held_out.append((step, bits_per_byte(run.model, windows)))
        yield step
        if step < steps:
            batch = corpus.batch(generator).to(next(runs[0].model.parameters()).device)
            # In alternating order, so that neither model always finds the caches warm.
            for run in runs if step % 2 == 0 else reversed(runs):
                _train_step(run, batch, _schedule(step, steps))


def _schedule(step: int, steps: int) -> float:
    """Learning rate: a linear warm-up, then a cosine down to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * cosine)


def _train_step(run: Run, batch: Tensor, learning_rate: float) -> None:
    start = time.perf_counter()
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.optimizer.zero_grad()
    loss = loss_of(run.model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
    run.optimizer.step()
    run.losses.append(loss.item() / math.log(2))
    synchronize(batch.device)
    run.seconds.append(time.perf_counter() - start)


def loss_of(model: TransformerModel, batch: Tensor) -> Tensor:
    """Mean loss in nats of predicting each next byte."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: TransformerModel, windows: Tensor) -> float:
    """Mean over all bytes of the windows (n, CONTEXT + 1)."""
    device = next(model.parameters()).device
    losses = [loss_of(model, part.to(device)).item() * len(part) for part in windows.split(64)]
    return sum(losses) / len(windows) / math.log(2)


def largest_difference(runs: Runs) -> float:
    """The largest difference between the two curves of training losses, in bits per byte."""
    return max(abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True))


@torch.no_grad()
def sample(
    model: TransformerModel, prompt: Tensor, length: int, seed: int, temperature: float = 0.7
) -> Iterator[int]:
    """Bytes that the model writes after the prompt, one by one."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    text = prompt.clone()
    for _ in range(length):
        logits = model(text[None, -CONTEXT:].to(device))[0, -1]
        choice = torch.multinomial(torch.softmax(logits.float().cpu() / temperature, -1), 1, generator=generator)
        text = torch.cat([text, choice])
        yield int(choice)


@dataclass(frozen=True)
class Cost:
    """One training step of both models on one sequence of this length; None where memory ran out."""

    length: int
    seconds: tuple[float | None, float | None]
    peak_bytes: tuple[int | None, int | None]


def cost_lengths(device: torch.device, quick: bool) -> tuple[int, ...]:
    longest = 512 if quick else 2048 if device.type == "cpu" else 8192
    return tuple(longest // part for part in (8, 4, 2, 1))


def measure_cost(runs: Runs, corpus: Corpus, length: int, repeats: int = 2) -> Cost:
    """The cost of forward and backward on one sequence: the fastest of a few, and the peak of allocated bytes."""
    device = next(runs[0].model.parameters()).device
    text = torch.cat([corpus.held_out, corpus.train])
    batch = text.repeat(math.ceil((length + 1) / len(text)))[None, : length + 1].to(device)
    for run in runs:
        run.model.zero_grad()
    results = [_cost_of_one(functools.partial(_gradient, run.model, batch), device, repeats) for run in runs]
    return Cost(length, tuple(r[0] for r in results), tuple(r[1] for r in results))  # type: ignore[arg-type]


def practice_step(run: Run, corpus: Corpus) -> Callable[[], None]:
    """The computation of a training step without the update, to be timed."""
    batch = corpus.batch(torch.Generator().manual_seed(0)).to(next(run.model.parameters()).device)
    return functools.partial(_gradient, run.model, batch)


def _gradient(model: TransformerModel, batch: Tensor) -> None:
    """Forward and backward. The gradients are freed, so that each call starts from the same state."""
    loss_of(model, batch).backward()
    model.zero_grad()


def _cost_of_one(
    call: Callable[[], None], device: torch.device, repeats: int
) -> tuple[float, int] | tuple[None, None]:
    try:
        call()
        taken = []
        for _ in range(repeats):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            taken.append(time.perf_counter() - start)
        return min(taken), peak_memory(call, device)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, None
