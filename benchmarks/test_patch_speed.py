"""Whole models before and after `fastattn.patch`: inference and a training step, time and peak memory."""

from __future__ import annotations

import copy
import functools

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
MODELS = ["torch encoder", "gpt2", "llama", "bert"]


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


def build(name: str) -> nn.Module:
    """Random weights; as its users have it, which for Hugging Face's is PyTorch's fused attention ("sdpa")."""
    if name == "torch encoder":
        return Encoder()
    transformers = pytest.importorskip("transformers")
    if name == "gpt2":
        return transformers.GPT2Model(
            transformers.GPT2Config(
                vocab_size=64, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    if name == "llama":
        hidden = 8 * WIDTH // 3 // 64 * 64
        return transformers.LlamaModel(
            transformers.LlamaConfig(
                **sizes, intermediate_size=hidden, num_key_value_heads=HEADS // 4, use_cache=False
            )
        )
    return transformers.BertModel(
        transformers.BertConfig(
            **sizes, intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def call_of(model: nn.Module, x: Tensor, direction: str) -> measure.Thunk:
    if direction == FORWARD:
        model.eval()

        def forward() -> Tensor:
            with torch.no_grad():
                return model(inputs_embeds=x)[0]

        return forward
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(model(inputs_embeds=x)[0].square().mean(), parameters, allow_unused=True)


@functools.cache
def measured(name: str, direction: str) -> dict[str, tuple[measure.Timing, int]]:
    """Both models in interleaved rounds, once a session: time and peak bytes of each."""
    torch.manual_seed(0)
    before = build(name).to(DEVICE, DTYPE)
    after = copy.deepcopy(before)
    assert fastattn.patch(after, strict=True).swapped
    x = torch.randn(BATCH, LENGTH, WIDTH, device=DEVICE, dtype=DTYPE)
    calls = {peer: call_of(m, x, direction) for peer, m in (("before", before), ("after", after))}
    for call in calls.values():
        call()
    peaks = {peer: measure.peak_memory(call, DEVICE) for peer, call in calls.items()}
    timings = measure.measure(calls, DEVICE, rounds=ROUNDS)
    return {peer: (timings[peer], peaks[peer]) for peer in calls}


@pytest.mark.parametrize("peer", ["before", "after"])
@pytest.mark.parametrize("direction", (FORWARD, TRAINING))
@pytest.mark.parametrize("name", MODELS)
def test_patched_model(request: pytest.FixtureRequest, name: str, direction: str, peer: str) -> None:
    timing, peak = measured(name, direction)[peer]
    clock = Replay()
    clock.rounds = list(timing.rounds)
    request.node.add_marker(pytest.mark.benchmark(timer=clock, group=f"{direction} {name} {BATCH} x {LENGTH}"))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info.update(peak_mib=round(peak / 2**20, 1), device=bench.headline(DEVICE))
    benchmark.pedantic(clock.step, rounds=len(timing.rounds), iterations=1)
