"""The two acts of the demo: what is done in which order, and the text about it."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastattn.core import capabilities
from fastattn.demo import (
    DEFAULT_STEPS,
    INDUCTION_STEPS,
    QUICK_INDUCTION_STEPS,
    QUICK_STEPS,
    checks,
    induction,
    text,
)
from fastattn.demo.screen import Screen, progress_note, readable, seconds
from fastattn.demo.threads import settle_threads
from fastattn.errors import CommandError
from fastattn.lens import HeadScores, even_scores, model_head_scores
from fastattn.nn import TransformerModel

Scores = tuple[HeadScores, HeadScores]  # of a model's heads, and of even attention


@dataclass
class Demo:
    """The settings, and the two acts."""

    corpus: text.Corpus
    source: str
    output: Path
    device: torch.device
    backend: str | None
    seed: int
    steps: int
    induction_steps: int
    quick: bool
    screen: Screen = field(default_factory=Screen)

    @classmethod
    def prepare(cls, options: argparse.Namespace) -> Demo:
        """Check now everything that could go wrong after minutes of training."""
        steps = options.steps if options.steps is not None else QUICK_STEPS if options.quick else DEFAULT_STEPS
        if steps < 1:
            raise CommandError(f"--steps must be at least 1, got {steps}")
        device = checks.pick_device(options.device)
        checks.check_backend(device, options.backend)
        return cls(
            corpus=text.Corpus.split(checks.read_text(options.text)),
            source=str(options.text or "pydoc_data.topics, the documentation inside this Python"),
            output=checks.prepare_folder(options.output),
            device=device,
            backend=options.backend,
            seed=options.seed,
            steps=steps,
            induction_steps=QUICK_INDUCTION_STEPS if options.quick else INDUCTION_STEPS,
            quick=options.quick,
        )

    # ---- act one ----

    def real_text(self) -> tuple[text.Runs, list[text.Cost]]:
        self.screen.act("Real text: a byte-level GPT, fused beside eager")
        runs = text.make_runs(self.seed, self.device, self.backend)
        if self.device.type == "cpu":
            settle_threads(text.practice_step(runs[0], self.corpus), most=torch.get_num_threads())
        self._introduce(runs[0].model)
        self._train_text(runs)
        self._write_sample(runs[0].model)
        return runs, self._compare_costs(runs)

    def _introduce(self, model: TransformerModel) -> None:
        read, held_out = len(self.corpus.train), len(self.corpus.held_out)
        config, parameters = model.config, sum(p.numel() for p in model.parameters())
        backend = self.backend or os.environ.get("FASTATTN_BACKEND") or capabilities.default_backend(self.device)
        threads = torch.get_num_threads()
        where = f"cpu, {threads} thread{'s' * (threads > 1)}" if self.device.type == "cpu" else str(self.device)
        self.screen.say(
            f"text      {self.source}\n"
            f"          {read:,} bytes to learn from, {held_out:,} held out\n"
            f"fastattn  {config.num_layers} layers of fused attention and MLP, width {config.embed_dim}, "
            f"{parameters / 1e6:.2f} M parameters\n"
            f"eager     the same weights under PyTorch's matmul, softmax and linear layers\n"
            f"device    {where}, backend {backend}; {text.BATCH} x {text.CONTEXT} bytes a step\n"
        )

    def _train_text(self, runs: text.Runs) -> None:
        every = max(1, self.steps // 5)
        self.screen.say("[dim]  step   held-out bits per byte[/dim]\n[dim]         fastattn    eager[/dim]")
        with self.screen.progress("training both", self.steps) as advance:
            windows = 20 if self.quick else 400
            for done in text.train(runs, self.corpus, self.steps, every, self.seed, windows):
                advance(done, progress_note(runs))
                if runs[0].held_out[-1][0] == done:
                    values = "".join(f"{run.held_out[-1][1]:9.4f}" for run in runs)
                    self.screen.say(f"{done:6} {values}")
        self.screen.say(
            f"\nThe two training curves differ by at most {text.largest_difference(runs):.0e} bits: rounding.\n"
            f"A step took {seconds(runs[0].step_seconds)} fused, {seconds(runs[1].step_seconds)} eager.\n"
        )

    def _write_sample(self, model: TransformerModel) -> None:
        start = self.corpus.passage()
        length = 40 if self.quick else 320
        written = bytearray()
        with self.screen.progress("writing", length) as advance:
            for byte in text.sample(model, start, length, self.seed):
                written.append(byte)
                advance(len(written), "")
        self.screen.sample(bytes(start.tolist()), bytes(written))

    def _compare_costs(self, runs: text.Runs) -> list[text.Cost]:
        self.screen.say("\nOne training step, forward and backward, on one longer sequence:\n")
        lengths = text.cost_lengths(self.device, self.quick)
        costs: list[text.Cost] = []
        with self.screen.progress("measuring", len(lengths)) as advance:
            for length in lengths:
                advance(len(costs), f"{length:,} tokens")
                costs.append(text.measure_cost(runs, self.corpus, length))
        self.screen.costs(costs)
        counter = "profiler" if self.device.type == "cpu" else "allocator"
        self.screen.say(f"[dim]Peak memory: bytes allocated in the step, not yet freed (by PyTorch's {counter}).")
        return costs

    # ---- act two ----

    def looking_inside(self, text_model: TransformerModel) -> tuple[induction.Training, dict[str, Scores]]:
        self.screen.act("Looking inside: induction heads form")
        self.screen.say(
            "Two layers of attention read random tokens that repeat with an unknown period.\n"
            "To foretell them, a head must find where this token stood before, and read on.\n"
        )
        training = induction.Training(induction.make_model(self.seed, self.device, self.backend))
        self._train_induction(training)
        return training, self._show_scores(training, text_model)

    def _train_induction(self, training: induction.Training) -> None:
        shown = max(1, self.induction_steps // 10)
        self.screen.say(
            "[dim]  step   loss on   accuracy   best induction   best previous-token[/dim]\n"
            "[dim]         repeats              head             head[/dim]"
        )
        with self.screen.progress("training", self.induction_steps) as advance:
            for done in induction.train(training, self.induction_steps, max(1, shown // 4), self.seed):
                last = training.looks[-1]
                advance(done, f"loss on repeats {last.repeat_loss:.2f}")
                if done % shown == 0:
                    best = last.scores.induction.max(), last.scores.previous_token.max()
                    self.screen.say(
                        f"{done:6} {last.repeat_loss:9.2f} {last.accuracy:10.0%} {best[0]:12.2f} {best[1]:16.2f}"
                    )
        change = induction.phase_change(training.looks)
        if change:
            self.screen.say(
                f"\nBetween steps {change[0]} and {change[1]} the loss fell: "
                "heads below found the token before,\nand heads above learned to use it."
            )

    def _show_scores(self, training: induction.Training, text_model: TransformerModel) -> dict[str, Scores]:
        """Show the scores of each head: of this model on repeated tokens, of the text model on a held-out
        passage."""
        exam = induction.repeated_sequences(torch.Generator().manual_seed(self.seed + 1))[0]
        passage = self.corpus.passage()[None]
        found = model_head_scores(text_model, passage.to(self.device))
        found = HeadScores(*(score.float().cpu() for score in found))
        models = {
            "induction model, repeated random tokens": (training.looks[-1].scores, even_scores(exam)),
            "text model, a held-out passage": (found, even_scores(passage)),
        }
        self.screen.say("\nWhere each head attends, summed in O(N) memory from the saved log-sum-exp:\n")
        for title, (scores, even) in models.items():
            self.screen.heads(title, scores, even)
            self.screen.say()
        opening = " ".join(readable(bytes(passage[0].tolist())).split())
        self.screen.say(f"[dim]The passage: {opening[:60]}...")
        return models

    # ---- pictures ----

    def pictures(
        self, runs: text.Runs, costs: list[text.Cost], looks: list[induction.Look], scores: dict[str, Scores]
    ) -> None:
        from fastattn.demo import pictures

        self.screen.act("Pictures")
        difference, folder = text.largest_difference(runs), self.output
        for path in (
            pictures.text_training(runs, difference, costs, folder / "text_training.png"),
            pictures.induction_training(looks, folder / "induction.png"),
            pictures.head_scores(scores, folder / "head_scores.png"),
        ):
            self.screen.say(str(path))
