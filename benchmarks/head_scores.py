"""The scores of all heads of a GPT-2 by one library, in a process of its own, so that its peak memory is known.

    python -m benchmarks.head_scores fastattn 4096

prints JSON: seconds of each round (processor time), peak of resident memory beside the model, scores. Linux only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYERS, LONGEST = 12, 2**15
SCORES = ("induction", "previous_token", "duplicate_token")
Run = Callable[[Tensor], Tensor]


def gpt2(attention: str, layers: int) -> Any:
    """GPT-2 small's shape with random weights, large enough that heads differ."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=layers, n_positions=LONGEST, initializer_range=0.05, attn_implementation=attention
    )
    return transformers.GPT2LMHeadModel(config).eval()


def tokens_of(length: int) -> Tensor:
    """Twice the same random tokens, (1, length)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(50257, (1, length // 2), generator=generator).repeat(1, 2)


def _fastattn(layers: int) -> Run:
    import fastattn.integrations.huggingface  # noqa: F401  (registers "fastattn")
    from fastattn import lens

    model = gpt2("fastattn", layers)

    def run(tokens: Tensor) -> Tensor:
        report = lens.head_report(model, tokens)
        return torch.stack([getattr(report, name) for name in SCORES])

    return run


def _eager(layers: int) -> Run:
    """The patterns that eager attention returns, and sums over them."""
    # Without the unembedding, which no score needs.
    model = gpt2("eager", layers).transformer

    def run(tokens: Tensor) -> Tensor:
        patterns = model(tokens, output_attentions=True, use_cache=False).attentions
        return scores_of(patterns, tokens)

    return run


def scores_of(patterns: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """SCORES (scores, layers, heads) by their definition, from the patterns (1, heads, L, L) of each layer."""
    masks = torch.cat(matches(tokens))
    counts = masks.any(-1).sum(-1, keepdim=True)
    return torch.stack([torch.einsum("hij,sij->sh", p[0], masks.to(p)) / counts for p in patterns], 1)


def _transformer_lens(layers: int) -> Run:
    """`run_with_cache`, of the patterns alone, and the head detector."""
    from transformer_lens.head_detector import detect_head
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = gpt2("eager", layers)
    bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)
    # There is no tokenizer, and the detector is given tokens.
    bridge.to_tokens = lambda tokens: tokens

    def run(tokens: Tensor) -> Tensor:
        _, cache = bridge.run_with_cache(
            tokens, remove_batch_dim=True, names_filter=lambda name: name.endswith("hook_pattern")
        )
        kinds = ("induction_head", "previous_token_head", "duplicate_token_head")
        # Theirs are means over all queries, ours over those that have such a key.
        counts = [int(mask.any(-1).sum()) for mask in matches(tokens)]
        found = [detect_head(bridge, tokens, kind, cache=cache) for kind in kinds]
        return torch.stack([f * tokens.shape[1] / n for f, n in zip(found, counts, strict=True)])

    return run


def matches(tokens: Tensor) -> list[Tensor]:
    """For each of SCORES which keys count for which queries, bool (B, L, L)."""
    position = torch.arange(tokens.shape[1])
    same = tokens[:, :, None] == tokens[:, None, :]
    earlier = position[None, :] < position[:, None]
    after = torch.nn.functional.pad(same, (1, 0))[..., :-1]
    return [
        after & (position[None, :] <= position[:, None]),
        (position[None, :] == position[:, None] - 1).expand_as(same),
        same & earlier,
    ]


CONTENDERS: dict[str, Callable[[int], Run]] = {
    "fastattn": _fastattn,
    "TransformerLens": _transformer_lens,
    "Hugging Face eager": _eager,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("length", type=int)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with torch.no_grad():
        run = CONTENDERS[options.contender](options.layers)
        run(tokens_of(64))
        tokens, seconds = tokens_of(options.length), []
        before = _start_of_peak()
        for _ in range(options.rounds):
            begin = time.process_time()
            scores = run(tokens)
            seconds.append(time.process_time() - begin)
        print(json.dumps({"seconds": seconds, "peak_bytes": _memory("VmHWM") - before, "scores": scores.tolist()}))


def _start_of_peak() -> int:
    """The bytes resident now, from which on the kernel takes the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
