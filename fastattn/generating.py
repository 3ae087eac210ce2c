"""`fastattn generate`: a model goes on with a text, and what it says appears word by word."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from fastattn.errors import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder with a Hugging Face checkpoint of a causal language model; smollm2, which `make real` "
        "fetches; or demo, a small model that is trained now, in about 20 seconds",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the model goes on with")
    parser.add_argument("--tokens", type=int, default=100, help="the most to generate (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token, above draws (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, help="draw from the likeliest tokens with this probability together"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")


def run(options: argparse.Namespace) -> int:
    """Generate, and print; returns the exit status. Raises CommandError for what its user can mend."""
    from fastattn.demo.checks import pick_device
    from fastattn.nn.sampling import Sampling

    drawing = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    try:
        Sampling(**drawing)
    except ValueError as problem:
        raise CommandError(f"--{str(problem).replace('top_', 'top-')}") from problem
    if options.tokens < 1:
        raise CommandError(f"--tokens must be at least 1, got {options.tokens}")
    if not -(2**63) <= options.seed < 2**64:
        raise CommandError(f"--seed must have at most 64 bits, got {options.seed}")
    if not options.prompt:
        raise CommandError("--prompt must have at least one character")
    device = pick_device(options.device)
    if options.model == "demo":
        _from_the_demo(options, drawing, device)
    else:
        _from_a_checkpoint(options, drawing, device)
    print()
    return 0


def show(text: str) -> None:
    print(text, end="", flush=True)


def _from_the_demo(options: argparse.Namespace, drawing: dict[str, Any], device: torch.device) -> None:
    from fastattn.looking.subjects import find_subject

    subject = find_subject("demo", device)
    model: Any = subject.model
    tokens = torch.tensor([subject.tokenizer.encode(options.prompt)], device=device)
    longest = model.config.max_length
    room = options.tokens if longest is None else min(options.tokens, longest + 1 - tokens.shape[1])
    if room < 1:
        raise CommandError(f"--prompt must have at most {longest - 1} characters for the demo's model")
    model.generate(
        tokens, room, **drawing, seed=options.seed, stream=lambda new: show(subject.tokenizer.decode(new.tolist()))
    )


def _from_a_checkpoint(options: argparse.Namespace, drawing: dict[str, Any], device: torch.device) -> None:
    from fastattn.looking.subjects import find_folder

    folder = find_folder(options.model)
    if importlib.util.find_spec("transformers") is None:
        raise CommandError("a checkpoint needs transformers: pip install 'fastattn[hf]'")
    import transformers

    from fastattn.integrations.huggingface import GrowingCache

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="fastattn", dtype="auto", local_files_only=True
        )
    except ValueError as problem:
        # transformers lists every class that it knows, a hundred lines: the first says what is wrong.
        raise CommandError(f"{folder}: {str(problem).splitlines()[0]}") from problem
    model = model.to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(device)
    asked = {name: value for name, value in drawing.items() if value is not None} if options.temperature else {}
    cache = {}
    if model._supports_default_dynamic_cache() and not model.config.is_encoder_decoder:
        cache["past_key_values"] = GrowingCache(config=model.config.get_text_config(decoder=True))
    torch.manual_seed(options.seed)
    model.generate(
        **inputs, **asked, **cache, do_sample=options.temperature > 0, max_new_tokens=options.tokens,
        streamer=_streamer(transformers)(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )  # fmt: skip


def _streamer(transformers: Any) -> Callable:
    """transformers' streamer, which prints whole words; the line's end is printed by `run`."""

    class Streamer(transformers.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    return Streamer
