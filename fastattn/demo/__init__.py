"""`fastattn demo`: trains a transformer built from the library's modules, and then shows what is inside it.

Only the standard library and torch are imported until the demo runs: rich and matplotlib are extras.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

DEFAULT_STEPS, QUICK_STEPS = 500, 10
INDUCTION_STEPS, QUICK_INDUCTION_STEPS = 400, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--story", metavar="NAME", help="tell one of the stories of --list instead, each within three CPU minutes"
    )
    parser.add_argument("--list", action="store_true", help="name the stories, and do nothing else")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what to read (default: the documentation inside this Python)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("fastattn-demo"), metavar="DIR", help="where pictures go (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, help=f"training steps of the text model ({DEFAULT_STEPS}), or of a story"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and samples (%(default)s)")
    parser.add_argument(
        "--backend", help="triton, portable or reference (default: what the capability table chooses)"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")


def run(options: argparse.Namespace) -> int:
    """Run both acts, or one story; returns the exit status. CommandError: a problem that the user can solve."""
    from fastattn.demo import checks, stories

    if options.list:
        print(stories.listing())
        return 0
    checks.require_libraries("rich", "matplotlib")
    if options.story is not None:
        return stories.run(options)
    from fastattn.demo.acts import Demo
    from fastattn.demo.threads import restored_threads

    started = time.perf_counter()
    demo = Demo.prepare(options)
    with restored_threads():
        runs, costs = demo.real_text()
        training, scores = demo.looking_inside(runs[0].model)
    demo.pictures(runs, costs, training.looks, scores)
    demo.screen.say(f"\nDone in {time.perf_counter() - started:.0f} s.")
    return 0
