"""transformers' generate with attn_implementation="fastattn" gives eager's tokens: any cache, any method."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from needs_transformers import transformers  # noqa: F401
from test_huggingface import VOCABULARY, build, prompt
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from fastattn.core import spread
from fastattn.integrations.huggingface import GrowingCache, fastattn_attention
from fastattn.integrations.huggingface_cache import GrowingLayer
from fastattn.nn import TransformerModel

FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "gemma3", "gpt_oss", "qwen3"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def generated(model: nn.Module, implementation: str, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    return model.generate(**inputs, **{**GREEDY, **options})


def other(name: str, seed: int) -> nn.Module:
    """A model of the same family that says something else: a bad assistant."""
    model = build(name)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


METHODS = {
    "a static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams, a static cache": {"num_beams": 2, "cache_implementation": "static"},
    "draws": {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    "a repetition penalty": {"repetition_penalty": 1.5},
    "prefill in chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_generates_eagers_tokens(name: str, method: str) -> None:
    model, tokens = build(name), []
    for implementation in ("eager", "fastattn"):
        torch.manual_seed(4)
        tokens.append(generated(model, implementation, prompt(name), **METHODS[method]))
    assert tokens[1].equal(tokens[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_assistant_changes_no_token(name: str) -> None:
    model, inputs = build(name), {k: v[2:] for k, v in prompt(name).items()}
    expected = generated(model, "eager", inputs, max_new_tokens=14)
    assistant = other(name, 5)
    assistant.set_attn_implementation("fastattn")
    assert generated(model, "fastattn", inputs, max_new_tokens=14, assistant_model=assistant).equal(expected)
    looked_up = generated(model, "fastattn", inputs, max_new_tokens=14, prompt_lookup_num_tokens=3)
    assert looked_up.equal(expected)


@pytest.mark.parametrize("kind", [DynamicCache, GrowingCache])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prefix_is_read_once_for_many_prompts(name: str, kind: Any) -> None:
    model = build(name)
    tokens = prompt(name)["input_ids"][2:]
    model.set_attn_implementation("fastattn")
    cache = kind(config=model.config)
    with torch.no_grad():
        model(tokens[:, :9], past_key_values=cache)
    for seed in range(3):
        end = torch.randint(1, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(seed))
        whole = torch.cat([tokens[:, :9], end], 1)
        found = generated(model, "fastattn", {"input_ids": whole}, past_key_values=copy.deepcopy(cache))
        assert found.equal(generated(model, "eager", {"input_ids": whole}))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_step_with_a_static_cache_compiles_as_one_graph(name: str) -> None:
    model, tokens = build(name), prompt(name)["input_ids"]
    logits = []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        step = model.forward
        if implementation == "fastattn":
            torch.compiler.reset()
            step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        cache = StaticCache(config=model.config, max_cache_len=20)
        with torch.no_grad():
            model(tokens[:, :9], past_key_values=cache)
            logits.append([step(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(9, 12)])
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_growing_cache_changes_no_token(name: str, options: dict[str, Any]) -> None:
    model, inputs = build(name), prompt(name)
    inputs = {k: v[2:] for k, v in inputs.items()} if "prompt_lookup_num_tokens" in options else inputs
    options = {**options, "max_new_tokens": 12}
    expected = generated(model, "eager", inputs, **options)
    cache = GrowingCache(config=model.config)
    assert generated(model, "fastattn", inputs, **options, past_key_values=cache).equal(expected)


def test_generate_gives_its_own_cache_room_under_our_name_only() -> None:
    model, inputs = build("llama"), prompt("llama")
    model.set_attn_implementation("eager")
    plain = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert {type(layer) for layer in plain.past_key_values.layers} == {DynamicLayer}
    model.set_attn_implementation("fastattn")
    ours = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert {type(layer) for layer in ours.past_key_values.layers} == {GrowingLayer}
    assert ours.sequences.equal(plain.sequences)
    given = DynamicCache(config=model.config)
    model.generate(**inputs, **GREEDY, past_key_values=given)
    assert {type(layer) for layer in given.layers} == {DynamicLayer}


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, count, 8, generator=torch.Generator().manual_seed(seed))


def test_a_growing_cache_holds_what_a_dynamic_one_holds_and_rarely_moves_it() -> None:
    growing, dynamic, places = GrowingCache(), DynamicCache(), set()
    for step in range(600):
        new = rows(1 + step % 3, step)
        keys, values = growing.update(new, -new, 0)
        expected = dynamic.update(new, -new, 0)
        places.add(keys.data_ptr())
        assert (keys.shape, values.shape) == (expected[0].shape, expected[1].shape)
        if step == 300:
            for cache in (growing, dynamic):
                cache.crop(-5)
    assert keys.equal(expected[0]) and values.equal(expected[1])
    assert len(places) < 12


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-2),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.reset(),
        lambda layer: None,
    ],
)
def test_what_was_taken_from_a_growing_cache_never_changes(change: Any) -> None:
    cache, plain = GrowingCache(), DynamicCache()
    for c in (cache, plain):
        c.update(rows(5), rows(5, 1), 0)
    fork, taken = copy.copy(cache.layers[0]), cache.layers[0].keys
    as_it_was = taken.clone()
    for c in (cache, plain):
        change(c.layers[0])
    batch = 2 if plain.layers[0].keys is None else plain.layers[0].keys.shape[0]
    new = rows(3, 2).repeat(batch // 2, 1, 1, 1)
    for ours, theirs in zip(cache.update(new, new, 0), plain.update(new, new, 0), strict=True):
        assert ours.equal(theirs)
    forked, _ = fork.update(rows(2, 3), rows(2, 3))
    assert forked.equal(torch.cat([as_it_was, rows(2, 3)], 2))
    assert taken.equal(as_it_was)


def test_a_growing_cache_made_in_inference_mode_serves_outside_and_gradients_pass_through() -> None:
    cache = GrowingCache()
    with torch.inference_mode():
        cache.update(rows(5), rows(5), 0)
    keys, _ = cache.update(rows(1, 1), rows(1, 1), 0)
    assert keys.equal(torch.cat([rows(5), rows(1, 1)], 2))
    new = rows(2, 2).requires_grad_()
    cache = GrowingCache()
    cache.update(rows(5), rows(5), 0)
    keys, values = cache.update(new, new, 0)
    (keys * values).sum().backward()
    torch.testing.assert_close(new.grad, 2 * new.detach())


def test_a_query_whose_row_goes_on_on_other_ranks_is_not_taken_for_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spread:
        length = 4

        def check_positions(self, *_: Any) -> None:
            pass

        def attention(self, q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
            return torch.full_like(q, 7.0)

    monkeypatch.setattr(spread, "current", Spread())
    q, k, v = (torch.randn(1, heads, 1, 8) for heads in (4, 2, 2))
    out, _ = fastattn_attention(nn.Module(), q, k, v, None)
    assert (out == 7).all()
    model = TransformerModel(vocab_size=9, embed_dim=16, num_heads=2, num_layers=1, max_length=8)
    with pytest.raises(ValueError, match="generate is not computed under"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 2)
