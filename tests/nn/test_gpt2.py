"""TransformerModel.from_gpt2: GPT-2's logits from GPT-2's weights, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from eager_models import assert_equal_to, gradients, shaken, some_tokens
from tolerance import assert_as_exact_as_eager

from fastattn.nn import (
    TransformerModel,
)

# Hugging Face's GPT-2.


def gpt2(heads=True, **sizes):
    from needs_transformers import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, attn_implementation="eager")
    kind = transformers.GPT2LMHeadModel if heads else transformers.GPT2Model
    return shaken(kind(config).eval(), std=0.02)


GPT2_SIZES = {
    "small": {"vocab_size": 97, "n_positions": 40, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 80},
    "gpt2's widths": {"n_layer": 2, "vocab_size": 5003},
}


@pytest.mark.parametrize("sizes", GPT2_SIZES.values(), ids=GPT2_SIZES.keys())
def test_gpt2_checkpoint_gives_gpt2s_logits_and_gradients_to_float32_accuracy(sizes):
    theirs = gpt2(**sizes)
    ours = TransformerModel.from_gpt2(theirs)
    tokens = some_tokens(length=33, vocab_size=theirs.config.vocab_size)
    with torch.no_grad():
        logits, eager = ours(tokens), theirs(tokens).logits
    grads = gradients(ours, tokens)
    eager_grads = gradients(theirs, tokens, lambda tokens: theirs(tokens).logits)
    theirs.double()
    assert_as_exact_as_eager(logits, theirs(tokens).logits.detach(), eager)
    exact_grads = gradients(theirs, tokens, lambda tokens: theirs(tokens).logits)
    # The gradients are renamed and transposed as the weights are.
    heads = theirs.config.n_head
    eager_grads, exact_grads = (
        dict(TransformerModel.from_gpt2(found, num_heads=heads).named_parameters())
        for found in (eager_grads, exact_grads)
    )
    assert grads.keys() == exact_grads.keys()
    for name, gradient in grads.items():
        assert_as_exact_as_eager(gradient, exact_grads[name].detach(), eager_grads[name].detach(), gradient=True)


def test_gpt2_loads_from_any_form_of_its_state_dict():
    model = gpt2(**GPT2_SIZES["small"])
    tokens = some_tokens()
    expected = TransformerModel.from_gpt2(model)(tokens)
    prefixed = model.state_dict()
    bare = model.transformer.state_dict()
    old = {**bare, "h.0.attn.bias": torch.ones(1, 1, 40, 40), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    config = model.config.to_dict()
    for state in (prefixed, bare, old):
        torch.testing.assert_close(
            TransformerModel.from_gpt2(state, config=config)(tokens), expected, atol=0, rtol=0
        )
    loaded = TransformerModel.from_gpt2(gpt2(heads=False, **GPT2_SIZES["small"]))
    assert loaded.config.tied
    torch.testing.assert_close(loaded(tokens), expected, atol=0, rtol=0)


def test_loaded_gpt2_owns_its_weights_and_keeps_an_unembedding_of_its_own():
    theirs = gpt2(**GPT2_SIZES["small"], tie_word_embeddings=False, activation_function="relu")
    theirs.lm_head.weight.data.normal_()
    ours = TransformerModel.from_gpt2(theirs, dtype=torch.float64)
    expected = copy.deepcopy(theirs).double()(some_tokens()).logits
    assert not ours.config.tied
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert_equal_to(expected, ours(some_tokens()))


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "h.1.mlp.c_fc.bias"), r"missing: \['h.1.mlp.c_fc.bias'\]"),
        (lambda state: without(state, "wpe.weight"), "no wpe.weight"),
        (lambda state: {**state, "h.0.ln_cross.weight": state["wte.weight"]}, "h.0.ln_cross.weight"),
        (
            lambda state: {**state, "h.1.attn.c_attn.weight": state["h.1.attn.c_proj.weight"]},
            r"h.1.attn.c_attn.weight must have shape \(48, 144\), got \(48, 48\)",
        ),
    ],
)
def test_a_checkpoint_that_is_not_gpt2s_is_refused_by_the_names_of_its_keys(change, message):
    state = gpt2(heads=False, **GPT2_SIZES["small"]).state_dict()
    with pytest.raises(ValueError, match=message):
        TransformerModel.from_gpt2(change(state), num_heads=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "num_heads must be given"),
        ({"n_head": 4, "activation_function": "mish"}, "activation_function must be one of .* got 'mish'"),
        ({"n_head": 4, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_head": 4, "n_layer": 4}, "missing: .*h.3.ln_1"),
    ],
)
def test_a_gpt2_configuration_that_cannot_be_followed_is_refused(config, message):
    state = gpt2(heads=False, **GPT2_SIZES["small"]).state_dict()
    with pytest.raises(ValueError, match=message):
        TransformerModel.from_gpt2(state, config=config)


def test_the_library_does_not_import_transformers():
    code = "import sys, fastattn.nn; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
