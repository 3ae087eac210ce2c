"""Whole models before and after `fastattn.patch`: inference and a training step, time and peak memory."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from benchmarks.conftest import DEVICE, ROUNDS, Replay
from fastattn.measuring import bench, measure
from fastattn.measuring.peers import FORWARD, TRAINING

ON_GPU = DEVICE.type == "cuda"
WIDTH, LAYERS, HEADS = (1024, 12, 16) if ON_GPU else (128, 2, 4)
BATCH, LENGTH = (4, 2048) if ON_GPU else (2, 512)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
LENGTHS = (LENGTH,) if ON_GPU else (128, 512, 2048)


class Encoder(nn.Module):
    """The plainest stack of torch.nn, as a model of Hugging Face's is called."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True
        )
        self.inner = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, inputs_embeds: Tensor) -> tuple[Tensor]:
        return (self.inner(inputs_embeds),)


def build(name: str, length: int) -> nn.Module:
    """Random weights; as its users have it: with its dropout, and with PyTorch's fused attention ("sdpa") where a
    model of Hugging Face's has it."""
    if name == "torch encoder":
        return Encoder()
    transformers = pytest.importorskip("transformers")
    model, config, options = SIZES_OF[name]
    sizes = {
        "vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH, "max_position_embeddings": length, "use_cache": False,
    }  # fmt: skip
    made = getattr(transformers, config)(**sizes | options(length))
    return getattr(transformers, model)(made)


PATCH = 4  # pixels, so that small images have many tokens
GROUPED = {"num_key_value_heads": HEADS // 4}
# For each model its class, its configuration's, and what it has of its own at a length.
SIZES_OF: dict[str, tuple[str, str, Callable[[int], dict[str, Any]]]] = {
    "gpt2": ("GPT2Model", "GPT2Config", lambda length: {"bos_token_id": None, "eos_token_id": None}),
    "llama": (
        "LlamaModel", "LlamaConfig", lambda length: GROUPED | {"intermediate_size": 8 * WIDTH // 3 // 64 * 64},
    ),
    "bert": ("BertModel", "BertConfig", lambda length: {}),
    "t5": ("T5EncoderModel", "T5Config", lambda length: {"d_kv": WIDTH // HEADS, "d_ff": 4 * WIDTH}),
    "vit": (
        "ViTModel", "ViTConfig", lambda length: {"image_size": PATCH * round(length**0.5), "patch_size": PATCH},
    ),
    "modernbert": ("ModernBertModel", "ModernBertConfig", lambda length: {"pad_token_id": 0}),
    "gemma": (
        "Gemma3TextModel", "Gemma3TextConfig",
        lambda length: GROUPED | {"head_dim": WIDTH // HEADS, "sliding_window": 64},
    ),
}  # fmt: skip


def inputs_of(model: nn.Module, length: int) -> dict[str, Tensor]:
    """Embeddings of as many tokens as ever; of a model of images, images."""
    batch = max(1, BATCH * LENGTH // length)
    if getattr(model, "main_input_name", "") == "pixel_values":
        side: Any = model.config.image_size
        return {"pixel_values": torch.randn(batch, 3, side, side, device=DEVICE, dtype=DTYPE)}
    return {"inputs_embeds": torch.randn(batch, length, WIDTH, device=DEVICE, dtype=DTYPE)}


def call_of(model: nn.Module, inputs: dict[str, Tensor], direction: str) -> measure.Thunk:
    if direction == FORWARD:
        model.eval()

        def forward() -> Tensor:
            with torch.no_grad():
                return model(**inputs)[0]

        return forward
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(model(**inputs)[0].square().mean(), parameters, allow_unused=True)


@functools.cache
def measured(name: str, direction: str, length: int) -> dict[str, tuple[measure.Timing, int]]:
    """Both models in interleaved rounds, once a session: time and peak bytes of each."""
    torch.manual_seed(0)
    before = build(name, length).to(DEVICE, DTYPE)
    after = copy.deepcopy(before)
    assert fastattn.patch(after).swapped
    inputs = inputs_of(before, length)
    calls = {peer: call_of(m, inputs, direction) for peer, m in (("before", before), ("after", after))}
    for call in calls.values():
        call()
    peaks = {peer: measure.peak_memory(call, DEVICE) for peer, call in calls.items()}
    timings = measure.measure(calls, DEVICE, rounds=ROUNDS)
    return {peer: (timings[peer], peaks[peer]) for peer in calls}


@pytest.mark.parametrize("peer", ["before", "after"])
@pytest.mark.parametrize("direction", (FORWARD, TRAINING))
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["torch encoder", *SIZES_OF])
def test_patched_model(request: pytest.FixtureRequest, name: str, length: int, direction: str, peer: str) -> None:
    timing, peak = measured(name, direction, length)[peer]
    clock = Replay()
    clock.rounds = list(timing.rounds)
    request.node.add_marker(pytest.mark.benchmark(timer=clock, group=f"{direction} {name} at {length} tokens"))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info.update(peak_mib=round(peak / 2**20, 1), device=bench.headline(DEVICE))
    benchmark.pedantic(clock.step, rounds=len(timing.rounds), iterations=1)
