"""What `fastattn look` does, step by step; what its user can mend is found before minutes have passed."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from fastattn.demo import checks
from fastattn.errors import CommandError
from fastattn.lens import adapt
from fastattn.lens.texts import Words, token_of_each_row
from fastattn.looking.page import MOST_TOKENS, make_page
from fastattn.looking.report import make_report
from fastattn.looking.subjects import DEMO_TEXT, Subject, find_subject


def look(options: argparse.Namespace) -> None:
    """Find the model, read the text, ask, and write the page."""
    if not 2 <= options.tokens <= MOST_TOKENS:
        raise CommandError(f"--tokens must be from 2 to {MOST_TOKENS}, got {options.tokens}")
    if options.against is not None and options.target is None:
        raise CommandError("--against needs --target")
    text = _text(options)
    device = checks.pick_device(options.device)
    if not options.out.parent.is_dir():
        raise CommandError(f"--out {options.out}: there is no folder {options.out.parent}")
    subject = find_subject(options.model, device)
    tokens, cut = _tokens(subject, text, options.tokens, device)
    target, against = (_token(name, getattr(options, name), subject) for name in ("target", "against"))
    print(f"{subject.title}: looking at {tokens.shape[1]:,} tokens" + (f" of {cut:,}" if cut else ""), flush=True)
    report = make_report(
        subject.model,
        tokens,
        title=subject.title,
        tokenizer=subject.tokenizer,
        target=target,
        against=against,
        cut=cut,
        say=lambda what: print(f"  {what} ...", flush=True),
    )
    page = make_page(report)
    options.out.write_text(page, encoding="utf-8")
    print(f"{options.out}, {len(page.encode()) / 1e6:.1f} MB: open it in a browser")


def _text(options: argparse.Namespace) -> str:
    if options.text is None and options.model == "demo":
        return DEMO_TEXT
    if options.text is None:
        raise CommandError("--text FILE must say what the model reads")
    return checks.read_text(options.text).decode("utf-8", errors="replace")


def _tokens(subject: Subject, text: str, most: int, device: torch.device) -> tuple[Tensor, int | None]:
    """The first ids (1, L), and of how many if the text has more."""
    ids = subject.tokenizer.encode(text)
    limit = getattr(getattr(subject.model, "config", None), "max_position_embeddings", None)
    most = min(most, limit or most)
    if len(ids) < 2:
        raise CommandError(f"--text must have at least 2 tokens, got {len(ids)}")
    return torch.tensor([ids[:most]], device=device), len(ids) if len(ids) > most else None


def _token(name: str, text: str | None, subject: Subject) -> int | None:
    """The id of a token that was given as text."""
    if text is None:
        return None
    try:
        return int(token_of_each_row(f"--{name}", text, 1, adapt(subject.model), Words(subject.tokenizer)))
    except ValueError as error:
        raise CommandError(str(error)) from None
