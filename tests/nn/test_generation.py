"""Generation: a cache changes no token, draws follow their definition, refusals come before anything runs."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastattn.nn import DecodingCache, Rotary, SelfAttention, TransformerModel
from fastattn.nn.sampling import Sampling

VOCABULARY = 37


def lively(**fields):
    """A model in float64 whose next token depends on all that it reads."""
    sizes = {"vocab_size": VOCABULARY, "embed_dim": 32, "num_heads": 4, "num_layers": 2, "max_length": 40}
    model = TransformerModel(**{**sizes, "tied": False, **fields}, dtype=torch.float64).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@torch.no_grad()
def greedy(model, prompt, count):
    """What the model says, asked for all tokens of one row again and again."""
    row = prompt
    for _ in range(count):
        row = torch.cat([row, model(row[None])[0, -1:].argmax(-1)])
    return row


CONFIGS = st.fixed_dictionaries(
    {
        "positions": st.sampled_from(["learned", "zero", "rotary", None]),
        "num_kv_heads": st.sampled_from([None, 1, 2]),
        "window": st.sampled_from([None, 3, (5, 0), (0, None)]),
        "qk_norm": st.booleans(),
        "mlp": st.sampled_from(["plain", "gated", None]),
        "norm": st.sampled_from(["layer", "rms"]),
        "tied": st.booleans(),
        "head_dim": st.sampled_from([None, 12]),
    }
)


@settings(max_examples=40)
@given(CONFIGS, st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 12), st.randoms())
def test_generate_says_what_the_model_says_row_by_row(config, lengths, count, random):
    torch.manual_seed(random.randrange(2**31))
    model = lively(**config)
    tokens = torch.randint(VOCABULARY, (len(lengths), 12))
    out = model.generate(tokens, count, key_lengths=lengths)
    for row, length, found, total in zip(tokens, lengths, out.tokens, out.lengths, strict=True):
        assert found[:total].equal(greedy(model, row[:length], count))
        assert not found[total:].any()


def test_a_partial_rotation_and_a_prompt_as_long_as_the_model_allows():
    model = lively(positions="rotary", head_dim=12, rotary_width=6)
    tokens = torch.randint(VOCABULARY, (2, 39), dtype=torch.int32)
    out = model.generate(tokens, 2)
    assert out.tokens.dtype == torch.int32
    for row, found in zip(tokens, out.tokens, strict=True):
        assert found.equal(greedy(model, row, 2).int())
    with pytest.raises(ValueError, match="max_new_tokens must be at most 2 for a prompt of 39 tokens"):
        model.generate(tokens, 3)


def test_draws_with_a_cache_are_the_draws_without():
    model = lively(positions="rotary")
    tokens, drawn = torch.randint(VOCABULARY, (3, 7)), []
    for use_cache in (True, False):
        drawn.append(
            model.generate(
                tokens, 20, key_lengths=[7, 1, 4], temperature=1.5, top_k=20, top_p=0.9, min_p=0.01,
                repetition_penalty=1.2, seed=5, use_cache=use_cache,
            )
        )  # fmt: skip
    assert drawn[0].tokens.equal(drawn[1].tokens)
    assert not drawn[0].tokens.equal(model.generate(tokens, 20, key_lengths=[7, 1, 4]).tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3}, {"top_k": 1000}, {"top_p": 0.7}, {"top_p": 1e-9}, {"top_p": 1}, {"min_p": 0.2}, {"min_p": 1},
        {"top_k": 9, "top_p": 0.6, "min_p": 0.15},
    ],
    ids=str,
)  # fmt: skip
def test_tokens_that_may_be_drawn_are_those_of_transformers(options):
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    theirs = {
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    logits = 2 * torch.randn(50, VOCABULARY, dtype=torch.float64)
    expected = logits
    for name, value in options.items():
        expected = theirs[name](value)(None, expected)
    assert Sampling(temperature=1, **options).kept(logits).equal(expected)


def test_draws_are_as_frequent_as_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, -1)
    drawn = Sampling(temperature=0.5).next_tokens(logits, None, torch.Generator().manual_seed(0))
    frequency = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(frequency, (logits[0] / 0.5).softmax(0), atol=0.015, rtol=0)


def test_the_smallest_temperature_takes_the_likeliest_token():
    logits = 5 * torch.randn(20, VOCABULARY)
    for temperature in (1e-30, 1e-300, 5e-324):
        assert Sampling(temperature=temperature).next_tokens(logits, None, None).equal(logits.argmax(-1))


def test_a_repetition_penalty_makes_tokens_of_the_row_less_likely_and_padding_does_not_count():
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    model = lively()
    tokens, lengths = torch.randint(VOCABULARY, (2, 9)), [4, 9]
    out = model.generate(tokens, 15, key_lengths=lengths, repetition_penalty=1.7)
    processor = logits_process.RepetitionPenaltyLogitsProcessor(1.7)
    for row, length, found in zip(tokens, lengths, out.tokens, strict=True):
        row = row[:length]
        for _ in range(15):
            scores = processor(row[None], model(row[None])[:, -1])
            row = torch.cat([row, scores.argmax(-1)])
        assert found[: len(row)].equal(row)


def test_rows_end_with_a_stop_and_leave_the_others_alone():
    model = lively()
    tokens = torch.randint(VOCABULARY, (3, 6))
    free, streamed = model.generate(tokens, 12).tokens, []
    first, second = int(free[0, 8]), free[1, 9:11].tolist()
    out = model.generate(tokens, 12, stop=[first, second], stream=streamed.append)
    for b in range(3):
        new = free[b, 6:].tolist()
        ends = [n for n in range(1, 13) if new[n - 1] == first or (n > 1 and new[n - 2 : n] == second)]
        length = 6 + (ends[0] if ends else 12)
        assert out.lengths[b] == length and out.tokens[b, :length].equal(free[b, :length])
        assert not out.tokens[b, length:].any()
        told = torch.stack(streamed)[:, b].tolist()
        assert told == new[: length - 6] + [-1] * (len(streamed) - length + 6)
    assert int(out.lengths.min()) < 18
    # A sequence that begins in the prompt is no stop.
    spanning = [int(tokens[0, -1]), int(free[0, 6])]
    assert model.generate(tokens[:1], 1, stop=[spanning]).lengths.tolist() == [7]
    assert model.generate(tokens, 12, stop=range(VOCABULARY)).lengths.tolist() == [7, 7, 7]


def test_without_rows_or_new_tokens_prompts_come_back():
    model = lively()
    tokens = torch.randint(VOCABULARY, (2, 5))
    assert model.generate(tokens, 0).tokens.equal(tokens)
    assert model.generate(tokens[:0], 4).tokens.shape[0] == 0


def test_the_cache_reads_each_token_once():
    model, seen = lively(), []
    mlp = model.blocks[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: seen.append(x.shape[1]) or forward(x)
    model.generate(torch.randint(VOCABULARY, (2, 5)), 4)
    assert seen == [5, 1, 1, 1]


@contextlib.contextmanager
def nothing_may_run(model):
    """Within it the model's first layer cannot be called."""
    weight = model.token_embedding.weight
    model.token_embedding.weight = None
    yield
    model.token_embedding.weight = weight


class OwnProjection(SelfAttention):
    def project(self, x):
        return super().project(x)


class OwnForward(SelfAttention):
    def forward(self, x):
        return super().forward(x)


class SlowRotary(Rotary):
    def forward(self, x, offset=0):
        return super().forward(x, offset)


def with_hook(model, name="blocks.0.attention.hook_z"):
    model.get_submodule(name).register_forward_hook(lambda module, given, out: out)


def with_class(kind):
    def change(model):
        model.blocks[1].attention.__class__ = kind

    return change


def with_rotary(model):
    model.blocks[1].attention.rotary.__class__ = SlowRotary


@pytest.mark.parametrize(
    "change, expected",
    [
        (with_hook, "blocks.0.attention.hook_z has a forward hook"),
        (lambda model: with_hook(model, "blocks.1.mlp"), "blocks.1.mlp has a forward hook"),
        (with_class(OwnProjection), "blocks.1.attention has a method project of its own"),
        (with_class(OwnForward), "blocks.1.attention has a method forward of its own"),
        (with_rotary, "blocks.1.attention.rotary is of class SlowRotary"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused_before_anything_runs_and_served_without(change, expected):
    model = lively(positions="rotary")
    tokens = torch.randint(VOCABULARY, (2, 5))
    as_it_was = model.generate(tokens, 4).tokens
    change(model)
    with nothing_may_run(model), pytest.raises(ValueError, match=f"use_cache must be False .*: {expected}"):
        model.generate(tokens, 4)
    assert model.generate(tokens, 4, use_cache=False).tokens.equal(as_it_was)


def test_hooks_by_which_pytorch_prepares_weights_are_served():
    model = lively()
    nn.utils.weight_norm(model.blocks[0].mlp.up)
    tokens = torch.randint(VOCABULARY, (1, 5))
    assert model.generate(tokens, 4).tokens[0].equal(greedy(model, tokens[0], 4))


@pytest.mark.parametrize(
    "options, kind, expected",
    [
        ({"temperature": -1}, ValueError, "temperature must be at least 0 and finite, got -1"),
        ({"temperature": float("inf")}, ValueError, "temperature must be at least 0"),
        ({"top_p": 0.9}, ValueError, "top_p needs a temperature above 0"),
        ({"temperature": 1, "top_p": 0}, ValueError, "top_p must be above 0 and at most 1, got 0"),
        ({"temperature": 1, "top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"temperature": 1, "min_p": 1.5}, ValueError, "min_p must be from 0 to 1, got 1.5"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be above 0 and finite"),
        ({"stop": "x"}, TypeError, "stop must be a token, or tokens and sequences of them, got str"),
        ({"stop": [[]]}, ValueError, "stop must have no empty sequence"),
        ({"stream": 3}, TypeError, "stream must be a function or None, got int"),
        ({"tokens": torch.tensor([[0, VOCABULARY]] * 2)}, ValueError, "tokens must be from 0"),
        ({"tokens": torch.tensor([[0, -1]] * 2)}, ValueError, "tokens must be from 0 to .*, got -1"),
        ({"seed": 2**64}, ValueError, "seed must have at most 64 bits, got 18446744073709551616"),
        ({"seed": 0.5}, TypeError, "seed must be an integer or None"),
        ({"key_lengths": [5, 6]}, ValueError, r"key_lengths must be from 1 to tokens' length 5, got \[5, 6\]"),
        ({"key_lengths": [0, 5]}, ValueError, "key_lengths must be from 1"),
        ({"key_lengths": [5]}, ValueError, "key_lengths must be 2 integers"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0"),
        ({"max_new_tokens": 37}, ValueError, "max_new_tokens must be at most 36 for a prompt of 5 tokens"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.long)}, ValueError, "tokens must have at least one token"),
        ({"tokens": torch.zeros(2, 5)}, TypeError, "tokens must be int64 or int32"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_runs(options, kind, expected):
    model = lively()
    asked = {"tokens": torch.zeros(2, 5, dtype=torch.long), "max_new_tokens": 3, **options}
    with nothing_may_run(model), pytest.raises(kind, match=expected):
        model.generate(**asked)


def test_encoders_and_models_that_drop_do_not_generate():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"model must be a decoder, but blocks\.0.attention has causal=False"):
        lively(causal=False).generate(tokens, 2)
    dropping = lively(dropout=0.1)
    dropping.generate(tokens, 2)
    with pytest.raises(ValueError, match="model must be in eval mode, or dropout drops elements"):
        dropping.train().generate(tokens, 2)


def test_a_layer_with_a_cache_takes_no_mask_and_an_encoder_no_cache():
    cache = DecodingCache(1, 8, 1, torch.device("cpu"))
    x = torch.randn(1, 3, 32)
    with pytest.raises(ValueError, match="key_lengths must be None with a cache, got list"):
        SelfAttention(32, 4, causal=True)(x, key_lengths=[2], cache=cache.layers[0])
    with pytest.raises(ValueError, match="cache must be None for a module with causal=False"):
        SelfAttention(32, 4)(x, cache=cache.layers[0])
    with pytest.raises(ValueError, match="window must be None with a cache, got 3"):
        lively(num_layers=1)(torch.zeros(1, 3, dtype=torch.long), window=3, cache=cache)


@pytest.mark.parametrize("dtype, error", [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.1)])
def test_a_quantised_cache_holds_bytes_and_gives_nearly_the_same_logits(dtype, error):
    torch.manual_seed(0)
    model, tokens, lengths = lively(positions="rotary", num_kv_heads=2), torch.randint(VOCABULARY, (2, 10)), [9, 5]
    caches = [DecodingCache(2, 12, 2, "cpu", kind) for kind in (None, dtype)]
    with torch.no_grad():
        for cache in caches:
            model(tokens[:, :9], key_lengths=lengths, cache=cache)
        exact, found = (model(tokens[:, 9:], cache=cache) for cache in caches)
    assert 0 < (found - exact).norm() < error * exact.norm()
    assert {t.dtype for layer in caches[1].layers for t in (layer.keys, layer.values)} == {dtype}
    together = model.generate(tokens[:, :9], 3, key_lengths=lengths, cache_dtype=dtype).tokens
    for row, length in zip(tokens, lengths, strict=True):
        alone = model.generate(row[None, :length], 3, cache_dtype=dtype).tokens[0]
        assert any(line[: length + 3].equal(alone) for line in together)


def test_a_cache_dtype_is_one_that_quantises_and_needs_a_cache():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(
        TypeError, match=r"cache_dtype must be torch.int8, torch.float8_e4m3fn or None, got torch.f"
    ):
        lively().generate(tokens, 2, cache_dtype=torch.half)
    with pytest.raises(ValueError, match=r"cache_dtype must be None without a cache, got torch.int8"):
        lively().generate(tokens, 2, cache_dtype=torch.int8, use_cache=False)
    with pytest.raises(TypeError, match=r"dtype must be torch.int8, torch.float8_e4m3fn or None, got 'int8'"):
        DecodingCache(1, 8, 1, "cpu", "int8")
