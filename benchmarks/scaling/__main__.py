"""Predict a training step: python -m benchmarks.scaling --model llama-70b --tokens 1M --gpus 8..4096 --link ib400

Every GPU holds a share of one sequence and of all weights. The mask's granules are counted as they are dealt out;
the figures of the machine come from a file (h100.json beside this one); `fastattn.distributed.prediction` goes
through the events of attention on every rank. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.scaling.models import MODELS
from benchmarks.scaling.steps import Step, Training, cluster
from fastattn import masks

H100 = Path(__file__).with_name("h100.json")
UNITS = {"k": 2**10, "m": 2**20}


def tokens(text: str) -> int:
    unit = UNITS.get(text[-1:].lower())
    return positive(text if unit is None else str(int(float(text[:-1]) * unit)))


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def gpus(text: str) -> list[int]:
    """8..64: 8, 16, 32, 64. 8,12: those."""
    if ".." not in text:
        return [positive(part) for part in text.split(",")]
    first, last = map(positive, text.split(".."))
    if last < first:
        raise argparse.ArgumentTypeError(f"must go up, got {text}")
    return [first * 2**i for i in range((last // first).bit_length())]


def mask(text: str, length: int) -> dict:
    """causal, full, window:SIZE, documents:SIZE (all of one length, causal)."""
    kind, _, size = text.partition(":")
    if text in ("causal", "full"):
        return {"causal": text == "causal"}
    if size and kind == "window":
        return {"causal": True, "window": (tokens(size) - 1, 0)}
    if size and kind == "documents":
        ends = [*range(0, length, tokens(size)), length]
        return {"causal": True, "mask": masks.documents(cu_seqlens=ends)}
    raise ValueError(f"--mask must be causal, full, window:SIZE or documents:SIZE, got {text!r}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    made.add_argument("--model", choices=list(MODELS), default="llama-8b")
    made.add_argument("--tokens", type=tokens, default=tokens("128k"), help="of one sequence: 131072, 128k, 1M")
    made.add_argument("--gpus", type=gpus, default=gpus("8..64"), help="8..64 or 8,16,24")
    made.add_argument("--mask", default="causal", help="causal, full, window:4k, documents:16k")
    made.add_argument("--link", default="ib400", help="between nodes: a name in the machine's file")
    made.add_argument("--machine", type=Path, default=H100, help="figures of the GPU and its links, JSON")
    made.add_argument("--no-checkpoint", action="store_true", help="keep what a layer needs for its backward")
    made.add_argument(
        "--float32-gradients", action="store_true", help="gradients of keys and values travel in float32"
    )
    made.add_argument("--json", type=Path, help="write the figures to this file")
    made.add_argument("--plot", type=Path, help="draw tokens a second and GPU into this PNG")
    return made


def main(words: Sequence[str] | None = None) -> int:
    made = parser()
    asked, console = made.parse_args(words), Console()
    try:
        shown = mask(asked.mask, asked.tokens)
        where = cluster(asked.machine, asked.link)
    except (argparse.ArgumentTypeError, KeyError, OSError, TypeError, ValueError) as problem:
        made.error(str(problem) if not isinstance(problem, KeyError) else f"--machine has no figure {problem}")
    training = Training(
        MODELS[asked.model], asked.tokens, shown, not asked.no_checkpoint, 4 if asked.float32_gradients else 2
    )
    title = f"{asked.model}, {asked.tokens} tokens, {asked.mask}, {asked.link}: predicted"
    found: list[Step] = []
    for count in track(asked.gpus, "predicting", console=console, transient=True):
        found += training.steps(count, where)
    console.print(table(found, asked.tokens, title))
    if asked.json:
        asked.json.write_text(json.dumps([dataclasses.asdict(step) for step in found], indent=1) + "\n")
    if asked.plot:
        draw(found, asked.tokens, title, asked.plot)
    return 0


def best(steps: list[Step]) -> Step:
    """The fastest that fits into memory; if none does, the one that needs the least."""
    fitting = [step for step in steps if step.fits]
    return min(fitting, key=lambda s: s.seconds) if fitting else min(steps, key=lambda s: s.memory)


def table(steps: list[Step], length: int, title: str) -> Table:
    made = Table(
        "GPUs", "method", "s a step", "of it attention", "waiting", "GiB", "tokens / s / GPU",
        title=title, caption="*: the best; !: more memory than a GPU has; waiting: for messages or slower GPUs",
    )  # fmt: skip
    made.columns[1].no_wrap = True
    for count in dict.fromkeys(step.gpus for step in steps):
        here = [step for step in steps if step.gpus == count]
        chosen = best(here)
        for step in here:
            made.add_row(
                str(count), f"{step.method}{' *' if step is chosen else ''}", f"{step.seconds:.3g}",
                f"{step.attention / step.seconds:.0%}", f"{step.exposed / step.seconds:.1%}",
                f"{step.memory / 2**30:.1f}{'' if step.fits else '!'}", _rate(length / step.seconds / count),
                style="bold" if step is chosen else "",
            )  # fmt: skip
        made.add_section()
    return made


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def draw(steps: list[Step], length: int, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(_kind(step) for step in steps):
        line = [step for step in steps if _kind(step) == kind]
        rates = [length / step.seconds / step.gpus for step in line]
        (drawn,) = axes.plot([step.gpus for step in line], rates, label=kind, alpha=0.7)
        for step, rate in zip(line, rates, strict=True):
            full = drawn.get_color() if step.fits else "white"
            axes.plot(step.gpus, rate, marker="o", color=drawn.get_color(), markerfacecolor=full)
    counts = list(dict.fromkeys(step.gpus for step in steps))
    axes.set(xlabel="GPUs (hollow: more memory than a GPU has)", ylabel="tokens a second and GPU", title=title)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_ylim(0)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def _kind(step: Step) -> str:
    return "ring x heads" if " x " in step.method else step.method


if __name__ == "__main__":
    sys.exit(main())
