"""What can be looked at: the demo's model, SmolLM2, or a checkpoint in a folder; each with its tokenizer."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattn.errors import CommandError
from fastattn.lens import families

SMOLLM2 = "smollm2-135m-instruct"
DEMO_TEXT = "frowzy things plumb; " * 6  # what repeats, and has few letters twice within a period


@dataclass(frozen=True)
class Subject:
    """A model in eval mode, what turns text to its ids and back, and what it is called."""

    title: str
    model: nn.Module
    tokenizer: Any


class Characters:
    """The tokenizer of the demo's model: one of its 64 words a character, called as Hugging Face's are.

    Small letters, digits, space, newline and 25 punctuation marks are themselves; capitals become small, and any
    other character becomes the last word, shown as a replacement mark.
    """

    words = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,;:!?'\"-()[]{}<>/=+*#_&%\N{REPLACEMENT CHARACTER}"
    start = len(words)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        places = (self.words.find(character) for character in text.lower())
        ids = [len(self.words) - 1 if place < 0 else place for place in places]
        return [self.start, *ids] if add_special_tokens else ids

    def decode(self, ids: list[int]) -> str:
        return "".join("<start>" if i == self.start else self.words[i] for i in ids)


def find_subject(name: str, device: torch.device) -> Subject:
    """The model that MODEL names, on the device.

    Raises:
        CommandError: there is none; the sentence says what to do.
    """
    if name == "demo":
        return _demo(device)
    return _checkpoint(find_folder(name), device)


def find_folder(name: str) -> Path:
    """The folder of the checkpoint that MODEL names: smollm2, or a folder.

    Raises:
        CommandError: there is none; the sentence says what to do.
    """
    return _smollm2() if name == "smollm2" else _folder(name)


def _demo(device: torch.device) -> Subject:
    """The demo's induction model, trained now: it goes on with whatever repeats."""
    from fastattn.demo import checks, induction

    checks.require_libraries("rich")
    from fastattn.demo import INDUCTION_STEPS
    from fastattn.demo.screen import Screen
    from fastattn.demo.threads import restored_threads

    training = induction.Training(induction.make_model(0, device))
    with restored_threads(), Screen().progress("training the demo's model", INDUCTION_STEPS) as advance:
        torch.set_num_threads(1)  # its tensors are too small for more
        for done in induction.train(training, INDUCTION_STEPS, INDUCTION_STEPS, seed=0):
            advance(done, "")
    return Subject("The demo's induction model", training.model.eval(), Characters())


def _smollm2() -> Path:
    """Where `make real` puts SmolLM2-135M-Instruct."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fastattn" / "models" / SMOLLM2
    if not folder.is_dir():
        raise CommandError(
            f"{folder} does not exist. `make real` in a checkout of fastattn fetches SmolLM2-135M (600 MB) to it; "
            "or give the folder of any other checkpoint"
        )
    return folder


def _folder(name: str) -> Path:
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"MODEL must be demo, smollm2, or a folder with a Hugging Face checkpoint; {name} has no config.json"
        )
    return folder


def _checkpoint(folder: Path, device: torch.device) -> Subject:
    if importlib.util.find_spec("transformers") is None:
        raise CommandError("a checkpoint needs transformers: pip install 'fastattn[hf]'")
    import transformers

    import fastattn.integrations.huggingface  # noqa: F401  (registers "fastattn")

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    known = [name for family in families() for name in family.models]
    names = [name for name in config.architectures or () if f"transformers.{name}" in known]
    if not names:
        there = ", ".join(name.removeprefix("transformers.") for name in known if name.startswith("transformers."))
        held = " or ".join(config.architectures or ["model without a class"])
        raise CommandError(f"{folder} holds a {held}. The lens knows {there}; fastattn.lens.register adds others")
    kind = getattr(transformers, names[0])
    options = {"attn_implementation": "fastattn", "dtype": torch.float32, "local_files_only": True}
    model = kind.from_pretrained(folder, **options).to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Subject(f"{folder.resolve().name}, {names[0]}", model, tokenizer)
