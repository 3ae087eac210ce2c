"""transformers' generation on a real model: python -m benchmarks.batched_generation

SmolLM2-135M-Instruct (`make real` fetches it) goes on with prompts of many lengths by `model.generate_batch`,
which batches continuously, or with one after another by `model.generate`, with attention by PyTorch and by
fastattn. Both must give the same tokens. Rounds alternate, and the fastest of each is compared, in the time of the
processor.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests import real_models


def prompts_of(tokenizer: Any, shortest: int, longest: int, count: int) -> list[list[int]]:
    """Texts of `count` lengths, each a little longer than the one before by the same factor."""
    tokens = tokenizer(Path(__file__).parents[1].joinpath("README.md").read_text()).input_ids
    growth = (longest / shortest) ** (1 / max(1, count - 1))
    return [tokens[7 * i :][: round(shortest * growth**i)] for i in range(count)]


def seconds(model: Any, implementation: str, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
    """The processor's time, and the new tokens."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model.set_attn_implementation(implementation)
    needed = sum(len(prompt) + new for prompt in prompts)
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(
        num_blocks=needed // 16 + 2 * len(prompts), page_size=16, max_batch_tokens=512
    )
    start = time.process_time()
    found = model.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=pages, progress_bar=False
    )
    return time.process_time() - start, [each.generated_tokens for each in found.values()]


def seconds_one_by_one(
    model: Any, implementation: str, prompts: list[list[int]], new: int
) -> tuple[float, list[list[int]]]:
    """The same by `generate`."""
    model.set_attn_implementation(implementation)
    asked = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    start = time.process_time()
    with torch.no_grad():
        found = [model.generate(torch.tensor([prompt]), **asked)[0, len(prompt) :] for prompt in prompts]
    return time.process_time() - start, [each.tolist() for each in found]


CALLS = {"generate_batch": seconds, "generate": seconds_one_by_one}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", choices=CALLS, default="generate_batch", help="of transformers (generate_batch)")
    parser.add_argument("--against", choices=("sdpa", "eager"), default="sdpa", help="attention by PyTorch (sdpa)")
    parser.add_argument("--lengths", type=int, nargs=2, default=(64, 512), help="of prompts, in tokens (64 512)")
    parser.add_argument("--prompts", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--new", type=int, nargs="+", default=[1, 33], help="tokens after each prompt (1 33)")
    parser.add_argument("--rounds", type=int, default=3, help="of each (default 3)")
    arguments = parser.parse_args()
    console = Console()
    if not real_models.SMOLLM2.exists():
        console.print(f"{real_models.SMOLLM2} does not exist; `make real` fetches it")
        return 1
    torch.set_num_threads(1)
    # It complains of a missing psutil in every call.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    model, tokenizer = real_models.smollm2()
    prompts = prompts_of(tokenizer, *arguments.lengths, arguments.prompts)
    against, (shortest, longest) = arguments.against, arguments.lengths
    title = f"{arguments.call}, {arguments.prompts} prompts of {shortest} to {longest} tokens"
    table = Table("new tokens", against, "fastattn", "ratio", title=f"{title}, seconds of a processor")
    for new in arguments.new:
        fastest = dict.fromkeys((against, "fastattn"), float("inf"))
        tokens = {}
        for _ in range(arguments.rounds):
            for name in fastest:
                taken, tokens[name] = CALLS[arguments.call](model, name, prompts, new)
                fastest[name] = min(fastest[name], taken)
        if tokens[against] != tokens["fastattn"]:
            console.print(f"with {new} new tokens the two give different ones")
            return 1
        theirs, ours = fastest.values()
        table.add_row(str(new), f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
