"""fastattn.patch on Hugging Face's BigBird: sparse and full, padded, decoding, and back again."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from patched_models import transformers
from torch import Tensor, nn

import fastattn


def bigbird(kind: str = "BigBirdModel", **options: Any) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.BigBirdConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, vocab_size=50,
        block_size=16, num_random_blocks=2, max_position_embeddings=256, hidden_dropout_prob=0.0,
        **{"attention_probs_dropout_prob": 0.0, "eos_token_id": None, **options},
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def bigbird_step(model: nn.Module, length: int, padded: bool = True, **options: Any) -> list[Tensor]:
    """The model's first output, where it counts, and all gradients."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (2, length), generator=generator)
    seen = (torch.arange(length) < torch.tensor([[length], [length * 3 // 4 if padded else length]])).long()
    out = model(tokens, attention_mask=seen if padded else None, use_cache=False, **options)[0][seen.bool()]
    weights = [w for w in model.parameters() if w.requires_grad]
    loss = (out * torch.cos(3 * torch.arange(out.numel()).view(out.shape))).sum()
    return [out.detach(), *torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)]


SPARSE, FULL = "FusedBigBirdBlockSparseAttention", "FusedBigBirdSelfAttention"
# Which attention a model has, how long its input is, and what computes it when patched, before and after.
BIGBIRDS = {
    "sparse": ({}, 208, SPARSE, SPARSE),
    "switched": ({}, 40, SPARSE, FULL),
    "full": ({"attention_type": "original_full"}, 40, FULL, FULL),
    "causal": ({"attention_type": "original_full", "is_decoder": True}, 40, FULL, FULL),
}


def kinds(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", BIGBIRDS)
def test_a_bigbird_computes_the_same_padded_and_is_restored(name: str, training: bool) -> None:
    options, length, before, after = BIGBIRDS[name]
    theirs = bigbird("BigBirdModel", **options).train(training)
    ours = copy.deepcopy(theirs)
    weights = list(ours.parameters())
    report = fastattn.patch(ours, mlp=False, strict=True)
    assert [row.now for row in report.rows] == [before] * 2
    for padded in (True, False):
        for a, e in zip(bigbird_step(ours, length, padded), bigbird_step(theirs, length, padded), strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=2e-5 * max(1.0, float(e.abs().max())))
    # Short inputs have switched the model.
    assert [type(layer.attention.self).__name__ for layer in ours.encoder.layer] == [after] * 2
    assert all(a is b for a, b in zip(weights, ours.parameters(), strict=True))
    again = fastattn.patch(ours, mlp=False)
    assert [row.why for row in again.rows] == ["already patched"] * 2
    fastattn.unpatch(ours)
    assert kinds(ours) == kinds(theirs)
    assert [sorted(module.__dict__) for module in ours.modules()] == [
        sorted(module.__dict__) for module in theirs.modules()
    ]


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
def test_a_bigbird_reads_its_padding_once_and_gives_no_bias_where_lengths_say_it(padding: str) -> None:
    from fastattn.dropin import bigbird as fused

    place = torch.arange(208)
    seen = {"none": place >= 0, "right": place < 150, "left": place >= 30, "holes": place % 7 > 0}[padding]
    seen = torch.stack((seen, place >= 0)).long()
    theirs = bigbird().eval()
    ours = copy.deepcopy(theirs)
    fastattn.patch(ours, mlp=False, strict=True)
    tokens = torch.randint(0, 50, (2, 208))
    with (
        mock.patch.object(fused, "attention", wraps=fused.attention) as calls,
        mock.patch.object(fused, "_lengths", wraps=fused._lengths) as reads,
    ):
        with torch.inference_mode():
            ours(tokens, attention_mask=seen)
        reads.reset_mock(), calls.reset_mock()
        out = ours(tokens, attention_mask=seen)[0]
    beside = {"none": set(), "right": {"key_lengths"}}.get(padding, {"bias"})
    assert [set(call.kwargs) - {"mask", "scale"} for call in calls.call_args_list] == [beside] * 2
    assert reads.call_count == 1
    out.sum().backward()  # what was read in inference mode serves training
    where = seen.bool()
    torch.testing.assert_close(out[where], theirs(tokens, attention_mask=seen)[0][where], rtol=0, atol=1e-4)


def test_a_bigbird_decoder_attends_across_and_generates_the_same_with_its_cache(calls: dict[str, int]) -> None:
    options = {"attention_type": "original_full", "is_decoder": True}
    prompt = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    seen = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    other = {"encoder_hidden_states": torch.randn(2, 7, 32),
             "encoder_attention_mask": (torch.arange(7) < torch.tensor([[7], [3]])).long()}  # fmt: skip
    theirs = bigbird("BigBirdForCausalLM", add_cross_attention=True, **options).eval()
    ours = copy.deepcopy(theirs)
    assert len(fastattn.patch(ours, mlp=False, strict=True).swapped) == 4
    for more in ({}, other):
        for a, e in zip(bigbird_step(ours, 30, **more), bigbird_step(theirs, 30, **more), strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=2e-5 * max(1.0, float(e.abs().max())))
        generate = {"attention_mask": seen, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **more}
        before = calls["attention"]
        assert torch.equal(ours.generate(prompt, **generate), theirs.generate(prompt, **generate))
        # The prompt; steps of one token go to PyTorch's kernel, past the host time of `attention`.
        assert calls["attention"] - before == (4 if more else 2)


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_a_bigbird_asked_for_its_weights_gives_them(attention_type: str) -> None:
    theirs = bigbird(attention_type=attention_type).eval()
    ours = copy.deepcopy(theirs)
    fastattn.patch(ours, mlp=False)
    tokens = torch.randint(0, 50, (1, 208))
    by_argument = [model(tokens, output_attentions=True).attentions for model in (ours, theirs)]
    ours.config.output_attentions = theirs.config.output_attentions = True
    for a, e in (by_argument, [model(tokens).attentions for model in (ours, theirs)]):
        assert len(a) == len(e) == 2
        torch.testing.assert_close(a, e)


def test_a_full_bigbird_drops_weights_in_training_by_torchs_generator() -> None:
    model = bigbird(attention_type="original_full", attention_probs_dropout_prob=0.5).train()
    fastattn.patch(model, mlp=False)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(bigbird_step(model, 40)[0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    model.eval()
    assert torch.equal(bigbird_step(model, 40)[0], bigbird_step(model, 40)[0])
