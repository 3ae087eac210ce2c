"""Claims about attribution: the parts are what the model adds, and they sum to its own logits."""

from __future__ import annotations

import importlib

import pytest
import torch
from lens_models import ALL, HEADS, LAYERS, LIKE_LLAMA, PRE_NORM, WIDTH, make, text
from torch import nn

import fastattn
from fastattn import lens
from fastattn.lens import family_table

EXACT = {"atol": 1e-12, "rtol": 1e-12}
FP32_NORMS = ("llama", *LIKE_LLAMA, "qwen3", "gemma3")  # their norms round to float32, whatever the model's dtype


def logits(model, tokens, **options):
    """The model's own logits (B, L, vocabulary), before a soft cap."""
    adapter = lens.adapt(model)
    with torch.no_grad():
        made = adapter.logits(tokens, **options)
    return made if adapter.logit_cap is None else adapter.logit_cap * torch.atanh(made / adapter.logit_cap)


def rounding(name, found):
    """What the sum may be off by: the rounding of the model's norms."""
    size = torch.stack(list(found.components.values())).abs().sum(0).max()
    return float(4 * torch.finfo(torch.float32 if name in FP32_NORMS else torch.float64).eps * size)


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", [*PRE_NORM, *LIKE_LLAMA])
def test_the_parts_sum_to_the_models_own_logit_difference(name, attention):
    model, tokens = make(name, attention), text()
    position, target, against = 11, torch.tensor([7, 9]), 8
    found = lens.attribution(model, tokens, target, against, position=position)
    own = logits(model, tokens)[:, position]
    expected = own.gather(1, target[:, None])[:, 0] - own[:, against]
    torch.testing.assert_close(found.total, expected, atol=1e-12, rtol=1e-9)
    assert (sum(found.components.values()) - expected).abs().max() < rounding(name, found)
    alone = lens.attribution(model, tokens, target, position=position)
    over_mean = own.gather(1, target[:, None])[:, 0] - own.mean(-1)
    torch.testing.assert_close(alone.total, over_mean, atol=1e-12, rtol=1e-9)
    assert (sum(alone.components.values()) - alone.total).abs().max() < rounding(name, alone)
    assert found.heads.shape == (LAYERS, HEADS, 2)


@pytest.mark.parametrize("name", [name for name in PRE_NORM if name not in FP32_NORMS])
def test_a_heads_and_an_mlps_part_is_what_the_logit_loses_without_it_in_the_last_layer(name):
    """Parts of the last layer only: nothing reads them but the final norm, whose scale is kept by hand."""
    model, tokens = make(name), text(1)
    adapter = lens.adapt(model)
    found = lens.attribution(model, tokens, 7, 8)
    layer, head = LAYERS - 1, 2
    with torch.no_grad():
        streams, seen = [], {}
        handles = [
            adapter.part("out", layer).register_forward_pre_hook(lambda _m, args: seen.update(z=args[0])),
            adapter.final_norm.register_forward_pre_hook(lambda _m, args: streams.append(args[0])),
        ]
        adapter.logits(tokens)
        for handle in handles:
            handle.remove()
        weights = adapter.projections(layer)
        written = seen["z"][0, -1].unflatten(-1, (HEADS, -1))[head] @ weights.out[head]
        norm = adapter.final_norm
        stream = streams[0][0, -1]
        if isinstance(norm, nn.LayerNorm):
            core = (written - written.mean()) / (stream.var(unbiased=False) + norm.eps).sqrt()
        else:
            core = written / (stream.square().mean() + norm.eps).sqrt()
        direction = adapter.unembedding_weight[7] - adapter.unembedding_weight[8]
        expected = (core * norm.weight) @ direction
    torch.testing.assert_close(found.components[f"L{layer}H{head}"][0], expected, **EXACT)


def dense_patterns(model, tokens):
    with torch.no_grad():
        return model(tokens, output_attentions=True).attentions


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", [*PRE_NORM, *LIKE_LLAMA])
def test_a_heads_part_by_source_and_an_mlps_by_neuron_sum_to_their_components(name, attention):
    model, tokens = make(name, attention), text()
    found = lens.attribution(model, tokens, 7, 8, position=11)
    for layer in range(LAYERS):
        for head in range(HEADS):
            by_source = found.head_by_source(layer, head)
            torch.testing.assert_close(by_source.sum(-1), found.components[f"L{layer}H{head}"], **EXACT)
            assert name == "own-encoder" or not by_source[:, 12:].any()
        if f"L{layer} mlp" in found.components:
            by_neuron = found.mlp_by_neuron(layer)
            torch.testing.assert_close(by_neuron.sum(-1), found.components[f"L{layer} mlp"], **EXACT)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "pythia"])
def test_a_heads_part_by_source_is_weight_times_what_the_value_says_in_dense_patterns(name):
    model, tokens = make(name, "eager"), text()
    found = lens.attribution(make_like(model, "fastattn"), tokens, 7, 8, position=11)
    patterns = dense_patterns(model, tokens)
    adapter = lens.adapt(model)
    for layer, head in ((0, 1), (1, 3)):
        weights = adapter.projections(layer)
        seen = {}
        handle = adapter.part("attention", layer).register_forward_pre_hook(
            lambda _m, args, kwargs, seen=seen: seen.update(x=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        with torch.no_grad():
            model(tokens)
            handle.remove()
            kv = head * adapter.num_kv_heads // HEADS
            values = seen["x"] @ weights.v[kv] + (0 if weights.v_bias is None else weights.v_bias[kv])
            says = values @ weights.out[head] @ found._state.to_heads[layer][..., None]
        expected = patterns[layer][:, head, 11] * says[..., 0]
        torch.testing.assert_close(found.head_by_source(layer, head), expected, atol=1e-7, rtol=1e-6)


def make_like(model, attention):
    """The same weights under another attention."""
    copy = type(model)(model.config).double().eval()
    copy.load_state_dict(model.state_dict())
    copy.set_attn_implementation(attention)
    return copy


def test_patched_models_and_half_precision_sum_as_well():
    model, tokens = make("llama", "sdpa"), text()
    expected = lens.attribution(model, tokens, 7, 8)
    fastattn.patch(model, norm=True)
    patched = lens.attribution(model, tokens, 7, 8)
    for name, value in expected.components.items():
        torch.testing.assert_close(patched.components[name], value, atol=1e-5, rtol=1e-5)
    # Patched norms compute in float64, so that the sum is exact in it.
    assert (sum(patched.components.values()) - patched.total).abs().max() < rounding("patched", patched)
    half = lens.attribution(model.bfloat16(), tokens, 7, 8)
    assert half.total.dtype == torch.float32
    torch.testing.assert_close(half.total, expected.total.float(), atol=0.2, rtol=0.1)


def test_what_the_model_is_called_with_beside_the_tokens_counts():
    model, tokens = make("own"), text()
    found = lens.attribution(model, tokens, 7, window=3)
    own = logits(model, tokens, window=3)[:, -1]
    torch.testing.assert_close(found.total, own[:, 7] - own.mean(-1), **EXACT)
    by_source = found.head_by_source(1, 2)
    assert not by_source[:, :16].any() and by_source[:, 16:].all()


def test_it_works_under_inference_mode_and_leaves_gradients_and_hooks_alone():
    model, tokens = make("gpt2"), text()
    expected = lens.attribution(model, tokens, 7)
    with torch.inference_mode():
        found = lens.attribution(model, tokens, 7)
        by_source = found.head_by_source(1, 2)
    assert torch.equal(by_source, expected.head_by_source(1, 2))
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_post_norm_blocks_sum_through_their_frozen_norms(monkeypatch):
    from needs_transformers import transformers

    monkeypatch.setattr(family_table, "_FAMILIES", dict(family_table._FAMILIES))
    lens.register(
        lens.Family(
            name="GPT-1", models=("transformers.OpenAIGPTLMHeadModel",), base="transformer", blocks="h",
            embeddings=("tokens_embed", "positions_embed"), unembedding="lm_head",
            attention="attn", q="attn.c_attn", out="attn.c_proj", attention_norm="ln_1",
            mlp="mlp", up="mlp.c_fc", down="mlp.c_proj", mlp_norm="ln_2", post_norm=True,
        )
    )  # fmt: skip
    config = transformers.OpenAIGPTConfig(vocab_size=50, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    model = transformers.OpenAIGPTLMHeadModel(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    found = lens.attribution(model, text(), 7, 8)
    own = logits(model, text())[:, -1]
    torch.testing.assert_close(found.total, own[:, 7] - own[:, 8], **EXACT)
    torch.testing.assert_close(sum(found.components.values()), found.total, **EXACT)
    assert {"L0 attention norm bias", "L2 mlp norm bias"} < set(found.components)


def test_logits_that_are_no_sum_are_refused():
    with pytest.raises(ValueError, match=r"family BERT has an activation .* \(cls.predictions.transform\)"):
        lens.attribution(make("bert"), text(), 7)


def test_a_model_that_does_more_than_its_family_says_is_refused():
    model = make("llama")
    model.model.layers[1].register_forward_hook(lambda _m, _args, out: out * 1.01)
    with pytest.raises(ValueError, match=r"the parts that family Llama names sum to .* does not describe"):
        lens.attribution(model, text(), 7)


def fails(_module, _args):
    raise RuntimeError("in a block")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"target": [7, 8, 9]}, "target must be one token id, or one for each of the 2 rows"),
        ({"target": 50}, "target must be from 0 to 49"),
        ({"target": " Paris"}, "target is text, ' Paris': give the tokenizer"),
        ({"against": [8, 7]}, "against must be another token than target, got 7 twice"),
        ({"position": 20}, "position must be from -20 to 19"),
    ],
)
def test_bad_calls_are_refused_before_the_model_runs(call, says):
    model = make("own")
    model.blocks[0].register_forward_pre_hook(fails)
    with pytest.raises(ValueError, match=says):
        lens.attribution(model, **{"tokens": text(), "target": 7, **call})


def test_heads_and_layers_that_are_not_there_are_refused():
    found = lens.attribution(make("own-attention-only"), text(), 7)
    for ask, says in (
        (lambda: found.head_by_source(3, 0), "layer must be from 0 to 2"),
        (lambda: found.head_by_source(0, 4), "head must be from 0 to 3"),
        (lambda: found.mlp_by_neuron(1), "block 1 has no MLP"),
    ):
        with pytest.raises(ValueError, match=says):
            ask()


def test_it_prints_the_largest_parts_and_the_rest_and_draws_them():
    found = lens.attribution(make("gpt2"), text(), 7, 8)
    header, *lines, others, total = found.table(top=3)
    assert header == ("component", "adds to logit 7 - 8") and len(lines) == 3
    assert others[0] == f"{len(found.components) - 3} others"
    shown = sum(float(value) for _, value in [*lines, others])
    assert abs(shown - float(total[1])) < 3e-4
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 3


@pytest.mark.parametrize("name", ALL)
def test_a_frozen_norm_is_the_norm(name):
    from fastattn.lens.frozen import FrozenNorm

    adapter = lens.adapt(make(name))
    x = 3 * torch.randn(7, WIDTH, dtype=torch.float64) + 1
    for norm in (adapter.final_norm, adapter.part("mlp_norm", 1), adapter.norm_after("attention", 1)):
        if norm is not None:
            frozen = FrozenNorm.of(norm, x)
            normed = norm(x).detach()
            again = frozen.gain * frozen.centre(x) * frozen.inverse_scale(x, normed)[:, None] + frozen.bias
            torch.testing.assert_close(again, normed.to(again.dtype), atol=1e-6, rtol=1e-6)
            assert frozen.centred == isinstance(norm, nn.LayerNorm)


def test_what_is_no_norm_is_not_taken_apart():
    from fastattn.lens.frozen import FrozenNorm

    x = torch.randn(7, WIDTH)
    for module in (nn.Tanh(), nn.GroupNorm(4, WIDTH), nn.Softmax(-1)):
        with pytest.raises(ValueError, match="a layer norm or an RMS norm"):
            FrozenNorm.of(module, x).inverse_scale(x, module(x).detach())


@pytest.mark.parametrize("name", ["own", "gpt2", "llama", "gemma3", "pythia"])
def test_autocast_is_the_models_own_and_the_sum_is_made_without_it(name):
    model, tokens = make(name).float(), text()
    exact = lens.attribution(model, tokens, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = lens.attribution(model, tokens, 7, 8)
        by_source = found.head_by_source(1, 2)
    assert found.total.dtype == torch.float32
    size = torch.stack(list(exact.components.values())).abs().sum(0).max()
    torch.testing.assert_close(sum(found.components.values()), found.total, atol=float(size) * 2**-6, rtol=0)
    torch.testing.assert_close(found.total, exact.total, atol=float(size) * 2**-4, rtol=0)
    torch.testing.assert_close(by_source.sum(-1), found.components["L1H2"], atol=float(size) * 2**-6, rtol=0)


def test_a_model_that_has_changed_since_is_not_asked_for_sources():
    model = make("llama")
    found = lens.attribution(model, text(), 7, 8)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match="the model must be as it was: L1H2 added"):
        found.head_by_source(1, 2)


def test_interventions_count():
    """Attribution within an ablation: the head adds nothing, the others what they add to the changed model."""
    model, tokens = make("llama"), text()
    with lens.ablate(model, heads=[(1, 2)]):
        found = lens.attribution(model, tokens, 7, 8)
        own = logits(model, tokens)[:, -1]
    assert not found.components["L1H2"].any() and found.components["L1H1"].all()
    torch.testing.assert_close(found.total, own[:, 7] - own[:, 8], atol=1e-12, rtol=1e-9)


def test_models_without_values_are_refused():
    with pytest.raises(ValueError, match="its embedding is on the meta device"):
        lens.attribution(make("own").to("meta"), text(), 7)


def test_nothing_of_other_positions_is_kept():
    module = importlib.import_module("fastattn.lens.attribution")
    model, tokens = make("gemma3"), text(2, 100)
    seen, state = module._seen(lens.adapt(model), tokens, 50, {})
    tensors = [t for value in seen.values() for t in (value if isinstance(value, tuple) else [value])]
    for t in [state, *(t for t in tensors if isinstance(t, torch.Tensor))]:
        assert t.untyped_storage().nbytes() <= t.numel() * t.element_size()
