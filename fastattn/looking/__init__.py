"""`fastattn look`: one page about what happens inside a model on one text.

`report` asks the lens, `page` packs the answers into page.html, `subjects` finds the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

DEFAULT_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder with a Hugging Face checkpoint; smollm2, which `make real` fetches; or demo, a small model "
        "that is trained now, in about 20 seconds",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the model reads; the demo has a text")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="where the page goes (%(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=DEFAULT_TOKENS, help="the most to read, up to 4096 (%(default)s)"
    )
    parser.add_argument(
        "--target", help="the token after the end whose logit is taken apart (default: the most probable)"
    )
    parser.add_argument(
        "--against",
        help="the token whose logit is subtracted (default: the second most probable; with --target none)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")


def run(options: argparse.Namespace) -> int:
    """Look, and write the page; returns the exit status. Raises CommandError for what its user can mend."""
    from fastattn.looking.command import look

    look(options)
    return 0
