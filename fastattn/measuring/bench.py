"""`fastattn bench`: a short comparison with other implementations on this machine, printed as tables.

It measures with measure.py, as the suites in benchmarks/ do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fastattn.measuring import peers
from fastattn.measuring.measure import Notify, Row, as_json, compare_peers
from fastattn.measuring.peers import AttentionProblem, MLPProblem, Problem, is_ours

# The spread from which the machine counts as busy. With nothing else to do, rounds differ by a few percent.
BUSY = 0.2

HEADINGS = ("", "time", "spread", "TFLOP/s", "peak memory", "x best peer")


def cells(row: Row) -> tuple[str, ...]:
    """The cells of a printed row."""
    memory = "" if row.peak_bytes is None else _bytes(row.peak_bytes)
    if row.timing is None:
        return (row.peer, row.note, "", "", memory, "")
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    rate = f"{row.tflops:.3g}"
    return (row.peer, _seconds(row.timing.median), f"{row.timing.spread:.0%}", rate, memory, ratio)


def _seconds(value: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def print_rows(rows: list[Row], stream: Any = None) -> None:
    """Print the table of a problem: in colour on a terminal, else (or without rich) as aligned plain text."""
    stream = stream or sys.stdout
    title = f"{rows[0].problem.family} {rows[0].direction}: {rows[0].problem.label}"
    measured = [(row.timing.median, cells(row)) for row in rows if row.timing]
    table = [line for _, line in sorted(measured)]
    if not (stream.isatty() and _print_rich(title, table)):
        print(f"\n{title}", file=stream)
        for line in plain_table(HEADINGS, table):
            print(line, file=stream)
    for row in rows:
        if not row.timing:
            print(f"  {row.peer}: {row.note}", file=stream)


def plain_table(headings: tuple[str, ...], table: list[tuple[str, ...]]) -> list[str]:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(len(line[i]) for line in (headings, *table)) for i in range(len(headings))]
    lines = [headings, tuple("-" * width for width in widths), *table]
    aligned = []
    for first, *others in lines:
        padded = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        aligned.append("  ".join((first.ljust(widths[0]), *padded)).rstrip())
    return aligned


def _print_rich(title: str, table: list[tuple[str, ...]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    view = Table(title=title, title_justify="left")
    for position, heading in enumerate(HEADINGS):
        view.add_column(heading, justify="left" if position == 0 else "right")
    for line in table:
        view.add_row(*line, style="bold green" if is_ours(line[0]) else None)
    Console().print(view)
    return True


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastattn bench`."""
    parser.add_argument("family", nargs="?", choices=("attention", "mlp", "all"), default="all")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1; by default a GPU if there is one")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="bfloat16; CPU float32")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: 2048 and 8192; CPU 512)")
    parser.add_argument("--width", type=int, default=None, help="head width, default 128; CPU 64")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="include torch.compile; off by default on a CPU (minutes)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")


def run(options: argparse.Namespace) -> int:
    """`fastattn bench`: print a table for each problem. Returns 0, or 1 if nothing of fastattn could be
    measured."""
    try:
        device = pick_device(options.device)
        check_options(options)
    except OSError as error:
        return complain(f"cannot write {options.json}: {error.strerror}")
    except (RuntimeError, ValueError) as error:
        return complain(str(error))
    print(headline(device))
    compiled = device.type == "cuda" if options.compile is None else options.compile
    rows: list[Row] = []
    for problem in short_problems(options, device):
        asked = usable_peers(problem, device, compiled)
        for direction in (peers.FORWARD, peers.TRAINING):
            with _progress(f"{problem.family} {direction} {problem.label}") as notify:
                measured = compare_peers(problem, direction, asked, device, rounds=options.rounds, notify=notify)
            print_rows([row for row in measured if row.timing or "not installed" not in row.note])
            rows += measured
    print(_epilogue(compiled))
    spreads = [row.timing.spread for row in rows if row.timing]
    if spreads and statistics.median(spreads) > BUSY:
        print("The spreads are large: this machine is busy. Differences smaller than the spreads mean nothing.")
    if options.json:
        with open(options.json, "w") as file:
            json.dump([as_json(row) for row in rows], file, indent=1)
    return 0 if any(row.timing and is_ours(row.peer) for row in rows) else 1


def complain(sentence: str) -> int:
    print(f"fastattn bench: {sentence}", file=sys.stderr)
    return 1


def check_options(options: argparse.Namespace) -> None:
    """Raise for wrong options before anything is measured, not after a minute."""
    for name in ("rounds", "length", "width"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if options.json:
        open(options.json, "a").close()


def pick_device(name: str | None) -> torch.device:
    """The named device; without a name the GPU, or the CPU. ValueError if there is no such device."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU on this machine")
    return device


def short_problems(options: argparse.Namespace, device: torch.device) -> list[Problem]:
    """A few sizes: realistic ones on a GPU, small ones on a CPU, which show that everything works and little
    more."""
    small = device.type == "cpu"
    dtype = options.dtype or ("float32" if small else "bfloat16")
    width = options.width or (64 if small else 128)
    lengths = [options.length] if options.length else ([512] if small else [2048, 8192])
    tokens, heads = (512, 4) if small else (16384, 2048 // width or 1)
    attention = [
        AttentionProblem(max(1, tokens // length), heads, length, width, causal, None, dtype)
        for length in lengths
        for causal in (True, False)
    ]
    widths = (256,) if small else (512, 2048)
    mlp = [
        MLPProblem(tokens, d, (8 * d // 3 + 63) // 64 * 64 if gated else 4 * d, gated, dtype)
        for d in widths
        for gated in (False, True)
    ]
    chosen: dict[str, list[Problem]] = {"attention": [*attention], "mlp": [*mlp], "all": [*attention, *mlp]}
    return chosen[options.family]


def headline(device: torch.device) -> str:
    """The device and versions, and on a CPU what the figures show."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return (
        f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}. Small sizes: they show that "
        "everything runs and how memory grows.\nfastattn's Triton kernels are for GPUs; here its portable backend "
        "computes."
    )


def _epilogue(compiled: bool) -> str:
    text = """
time: median of interleaved rounds; spread: interquartile range over median; TFLOP/s: products over visible
scores only; peak memory: allocated beyond the inputs; x best peer: time of the fastest other over this one's."""
    return text if compiled else text + "\ntorch.compile was left out; --compile includes it."


def usable_peers(problem: Problem, device: torch.device, compiled: bool) -> list[str]:
    """The peers that can be measured on this device."""
    left_out = set() if compiled else {"compiled eager", "flex_attention"}
    if device.type == "cpu":
        left_out |= {
            "fastattn triton",
            "SDPA cuDNN",
            "SDPA memory-efficient",
            "flex_attention",
            *peers.GPU_LIBRARIES,
        }
    return [name for name in peers.peers_of(problem) if name not in left_out]


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Notify]:
    """A line on the terminal that shows what is being measured; it is erased at the end."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    clear = "\r\x1b[2K"
    yield lambda step: print(f"{clear}{what}: {step}", end="", file=sys.stderr, flush=True)
    print(clear, end="", file=sys.stderr, flush=True)
