"""Modules: equal to eager twins and to GPT-2, well behaved in training, open to hooks, clear about errors."""

from __future__ import annotations

import copy
import functools
import io
import operator
import pickle
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_exact_as_eager
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import masks
from fastattn.ground.checks import check_window
from fastattn.nn import (
    MLP,
    CrossAttention,
    GatedMLP,
    Rotary,
    SelfAttention,
    TransformerBlock,
    TransformerConfig,
    TransformerModel,
)

SMALL = {"vocab_size": 31, "embed_dim": 32, "num_heads": 4, "num_layers": 2, "max_length": 20}

VARIANTS = {
    "gpt2": {},
    "attention only, rotary": {"mlp": None, "positions": "rotary"},
    "attention only, no neurons": {"hidden_dim": 0, "positions": "zero"},
    "encoder": {"causal": False, "activation": "gelu"},
    "encoder without positions": {"causal": False, "positions": None, "max_length": None},
    "llama": {
        "positions": "rotary",
        "num_kv_heads": 2,
        "mlp": "gated",
        "norm": "rms",
        "bias": False,
        "tied": False,
        "hidden_dim": 40,
    },
    "qwen 3": {"positions": "rotary", "num_kv_heads": 2, "qk_norm": True},
    "normed without positions": {"qk_norm": True, "positions": None},
    "partial rotary, wide heads": {"positions": "rotary", "head_dim": 12, "rotary_width": 6, "rotary_base": 50.0},
}

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
}


# The eager twins: the same weights, plain torch.


def eager_rotation(x, width, base):
    """Rotary as multiplication by unit complex numbers; x (B, H, L, D)."""
    half = width // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) * 2 / width)
    angles = torch.outer(torch.arange(x.shape[2], dtype=torch.float64), frequencies)
    turned = torch.complex(x[..., :half], x[..., half:width]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., width:]], -1)


def eager_weighted_values(q, k, v, causal):
    """softmax(q k^T / sqrt(D)) v with an L x L matrix, the heads side by side again."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores + torch.full_like(scores[0, 0], float("-inf")).triu(1)
    z = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    return z.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def eager_self_attention(module, x):
    def heads(rows):
        bias = None if module.qkv_proj.bias is None else module.qkv_proj.bias[rows]
        projected = F.linear(x, module.qkv_proj.weight[rows], bias)
        return projected.view(*x.shape[:2], -1, module.head_dim).transpose(1, 2)

    queries, keys = module.num_heads * module.head_dim, module.num_kv_heads * module.head_dim
    q, k = heads(slice(0, queries)), heads(slice(queries, queries + keys))
    v = heads(slice(queries + keys, queries + 2 * keys))
    if module.q_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    if module.rotary is not None:
        q, k = (eager_rotation(t, module.rotary.width, module.rotary.base) for t in (q, k))
    return module.out_proj(eager_weighted_values(q, k, v, module.causal))


def eager_mlp(module, x):
    activation = ACTIVATIONS[module.activation]
    if isinstance(module, GatedMLP):
        return module.down(activation(module.gate(x)) * module.up(x))
    return module.down(activation(module.up(x)))


def eager_transformer(model, tokens):
    x = model.token_embedding.weight[tokens]
    if model.config.positions in ("learned", "zero"):
        x = x + model.position_embedding.weight[: tokens.shape[1]]
    for block in model.blocks:
        x = x + eager_self_attention(block.attention, block.attention_norm(x))
        if block.mlp is not None:
            x = x + eager_mlp(block.mlp, block.mlp_norm(x))
    table = model.token_embedding if model.config.tied else model.unembedding
    return model.final_norm(x) @ table.weight.mT


def shaken(module, std=0.3):
    """The module with every parameter off its initial value, so that a result without one of them is another."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def small_model(dtype=torch.float64, **fields):
    return shaken(TransformerModel(**{**SMALL, **fields}, dtype=dtype))


def some_tokens(batch=2, length=13, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def next_token_loss(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model, tokens, forward=None):
    """Gradients of the next-token loss, by parameter name."""
    logits = (model if forward is None else forward)(tokens)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(next_token_loss(logits, tokens), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def assert_equal_to(expected, actual, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


# What modules compute.


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_transformer_and_its_gradients_equal_the_eager_twin(variant, backend):
    model, tokens = small_model(backend=backend, **variant), some_tokens()
    assert_equal_to(eager_transformer(model, tokens), model(tokens))
    expected = gradients(model, tokens, lambda tokens: eager_transformer(model, tokens))
    for name, gradient in gradients(model, tokens).items():
        assert expected[name].abs().max() > 0, name
        assert_equal_to(expected[name], gradient)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [MLP, GatedMLP])
def test_mlps_equal_their_eager_twins_for_any_leading_dimensions(kind, activation):
    module = shaken(kind(24, 56, activation=activation, bias=True, dtype=torch.float64))
    for shape in [(24,), (5, 24), (2, 3, 5, 24)]:
        x = normal(*shape)
        assert_equal_to(eager_mlp(module, x), module(x))


@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_cross_attention_reads_a_context_of_other_length_and_width(num_kv_heads):
    module = CrossAttention(32, 4, context_dim=20, num_kv_heads=num_kv_heads, dtype=torch.float64)
    shaken(module)
    x, context = normal(2, 3, 32), normal(2, 17, 20)
    q = module.q_proj(x).view(2, 3, 4, 8).transpose(1, 2)
    k, v = module.kv_proj(context).view(2, 17, 2, num_kv_heads, 8).permute(2, 0, 3, 1, 4)
    expected = module.out_proj(eager_weighted_values(q, k, v, causal=False))
    assert_equal_to(expected, module(x, context))


def test_decoder_block_reads_its_context_between_attention_and_mlp():
    attention = SelfAttention(32, 4, causal=True, dtype=torch.float64)
    cross_attention = CrossAttention(32, 4, context_dim=20, dtype=torch.float64)
    mlp = GatedMLP(32, dtype=torch.float64)
    block = TransformerBlock(attention, mlp, cross_attention=cross_attention, norm="rms", dtype=torch.float64)
    shaken(block)
    x, context = normal(2, 6, 32), normal(2, 9, 20)
    expected = x + attention(block.attention_norm(x))
    expected = expected + cross_attention(block.cross_attention_norm(expected), context)
    expected = expected + mlp(block.mlp_norm(expected))
    assert_equal_to(expected, block(x, context))


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens_give_no_logits(variant, shape):
    model = small_model(**VARIANTS[variant])
    logits = model(torch.zeros(shape, dtype=torch.int64))
    assert logits.shape == (*shape, SMALL["vocab_size"])
    logits.sum().backward()
    assert not model.blocks[0].attention.qkv_proj.weight.grad.any()


# Hugging Face's GPT-2.


def gpt2(heads=True, **sizes):
    transformers = pytest.importorskip("transformers")
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


# Positions and causality.


def test_zero_positions_leave_a_set_encoder_permutation_equivariant():
    model = small_model(causal=False, positions="zero")
    torch.nn.init.zeros_(model.position_embedding.weight)
    tokens, order = some_tokens(), torch.randperm(13, generator=torch.Generator().manual_seed(2))
    assert_equal_to(model(tokens)[:, order], model(tokens[:, order]))
    torch.nn.init.normal_(model.position_embedding.weight)
    assert (model(tokens)[:, order] - model(tokens[:, order])).abs().max() > 0.1


def test_zero_positions_start_at_zero_and_receive_gradients():
    model = TransformerModel(**SMALL, positions="zero")
    assert not model.position_embedding.weight.any()
    gradient = gradients(model, some_tokens())["position_embedding.weight"]
    assert (gradient[:12].abs().amax(1) > 0).all()
    assert not gradient[13:].any()


@pytest.mark.parametrize("positions", ["learned", "rotary", None])
def test_a_causal_model_does_not_see_the_future(positions):
    model, tokens = small_model(positions=positions), some_tokens()
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SMALL["vocab_size"]
    before, after = model(tokens), model(changed)
    assert_equal_to(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-3


def test_rotary_scores_depend_on_distance_only():
    rotary, q, k = Rotary(16), normal(1, 2, 5, 20), normal(1, 2, 7, 20)
    here = rotary(q, offset=3) @ rotary(k).mT
    far = rotary(q, offset=1_000_003) @ rotary(k, offset=1_000_000).mT
    assert_equal_to(here, far, 1e-9)
    assert torch.equal(rotary(q)[..., 16:], q[..., 16:])
    assert_equal_to(rotary(k)[:, :, 4:], rotary(k[:, :, 4:], offset=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_is_exact_to_the_last_place_far_out_and_in_a_half_precision_model(dtype):
    rotary = Rotary(16).to(dtype)
    x = normal(1, 1, 3, 16, dtype=dtype)
    exact = rotary(x.double(), offset=200_000)
    assert (rotary(x, offset=200_000) - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


# Initialisation.


def test_weights_start_as_gpt2s():
    torch.manual_seed(0)
    model = TransformerModel(
        vocab_size=200, embed_dim=96, num_heads=4, num_layers=8, max_length=100, embedding_std=1.0
    )
    for name, parameter in model.named_parameters():
        if name == "token_embedding.weight":
            expected = 1.0
        elif name.endswith(("out_proj.weight", "down.weight")):
            expected = 0.02 / 4
        elif name.endswith("bias"):
            expected = 0.0
        elif "norm" in name:
            assert (parameter == 1).all()
            continue
        else:
            expected = 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_without_bias_nothing_has_one():
    for mlp in ("plain", "gated", None):
        model = TransformerModel(**SMALL, mlp=mlp, bias=False)
        assert not [name for name, _ in model.named_parameters() if "bias" in name]


def test_a_model_made_on_the_meta_device_starts_as_one_made_here():
    model = TransformerModel(**SMALL, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    twin = TransformerModel(**SMALL)
    for either in (model, twin):
        torch.manual_seed(5)
        either.reset_parameters()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# Training.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_labels_give_the_loss_of_the_logits_and_its_gradients(causal, tied):
    model, tokens = small_model(causal=causal, tied=tied), some_tokens()
    labels = tokens.clone()
    labels[0, 3:6] = -100
    logits = model(tokens)
    pair = (logits[:, :-1], labels[:, 1:]) if causal else (logits, labels)
    expected = F.cross_entropy(*(t.flatten(0, 1) for t in pair))
    with mock.patch.object(model, "unembed", side_effect=AssertionError("there are no logits")):
        loss = model(tokens, labels=labels)
    assert_equal_to(loss, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(t, [*model.parameters()]) for t in (loss, expected)), strict=True
    ):
        assert_equal_to(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_a_loss_obeys_what_was_put_in_the_unembedding_s_place(tied):
    model, tokens = small_model(tied=tied), some_tokens()

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x):
            return self.inner(x) * 2

    part = "token_embedding" if tied else "unembedding"
    setattr(model, part, Doubled(getattr(model, part)))
    expected = next_token_loss(model(tokens), tokens)
    assert_equal_to(model(tokens, labels=tokens), expected)


def test_labels_that_do_not_fit_are_refused():
    model, tokens = small_model(), some_tokens()
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(2, 13\), got \(2, 12\)"):
        model(tokens, labels=tokens[:, 1:])
    with pytest.raises(ValueError, match="labels must be integers"):
        model(tokens, labels=tokens.double())
    with pytest.raises(ValueError, match="target must be a class from 0 to"):
        model(tokens, labels=tokens + 10**6)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_one_step_of_training_lowers_the_loss(variant):
    torch.manual_seed(0)
    model, tokens = TransformerModel(**{**SMALL, **variant}), some_tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = next_token_loss(model(tokens), tokens)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("variant", ["gpt2", "llama", "attention only, rotary"])
def test_compiled_without_a_graph_break_it_computes_the_same(variant):
    model, tokens = small_model(torch.float32, **VARIANTS[variant]), some_tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal_to(model(tokens), compiled(tokens), 1e-6)
    expected = gradients(model, tokens)
    for name, gradient in gradients(model, tokens, compiled).items():
        assert_equal_to(expected[name], gradient, 1e-5)


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_under_autocast_it_computes_in_bfloat16_and_keeps_float32_gradients(variant):
    model, tokens = small_model(torch.float32, **VARIANTS[variant]), some_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
        found = gradients(model, tokens)
    assert logits.dtype == torch.bfloat16
    assert_equal_to(model(tokens), logits.float(), 0.05)
    for name, expected in gradients(model, tokens).items():
        assert found[name].dtype == torch.float32
        if "qkv_proj.bias" not in name:  # its keys' part is rounding error alone
            assert torch.cosine_similarity(found[name].flatten(), expected.flatten(), 0) > 0.99, name


def test_checkpointed_blocks_give_the_same_bits():
    model, tokens = small_model(torch.float32, dropout=0.2), some_tokens()

    def run(wrap):
        torch.manual_seed(3)

        def forward(tokens):
            x = model.embed(tokens)
            for block in model.blocks:
                x = wrap(block, x)
            return model.unembed(x)

        return gradients(model, tokens, forward)

    expected = run(lambda block, x: block(x))
    found = run(lambda block, x: checkpoint(block, x, use_reentrant=False))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_dropout_drops_embeddings_and_what_layers_add_in_training_alone():
    model, tokens, stream = small_model(dropout=0.5), some_tokens(), []
    for point in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post"):
        model.blocks[0].get_submodule(point).register_forward_hook(lambda _, inputs, output: stream.append(output))
    model(tokens)
    before, between, after = stream
    for added in (before, between - before, after - between):
        assert (added == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)
    assert_equal_to(eager_transformer(model, tokens), model.eval()(tokens))


def copied_by_state_dict(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = TransformerModel(model.config, dtype=torch.float64)
    twin.load_state_dict(torch.load(file))
    return twin


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), copied_by_state_dict]
)
def test_copies_compute_the_same_and_are_independent(variant, copied):
    model, tokens = small_model(**variant), some_tokens()
    twin, expected = copied(model), model(tokens)
    torch.nn.init.zeros_(model.token_embedding.weight)
    assert torch.equal(twin(tokens), expected)
    assert twin.config == model.config


# Looking inside.


def test_attention_is_projection_then_attending():
    module = shaken(SelfAttention(32, 4, num_kv_heads=2, causal=True, rotary=True, dtype=torch.float64))
    x = normal(2, 6, 32)
    q, k, v = module.project(x)
    assert q.shape == (2, 4, 6, 8)
    assert k.shape == v.shape == (2, 2, 6, 8)
    assert torch.equal(module.attend(q, k, v), module(x))


def test_projected_heads_are_views_of_one_tensor():
    q, k, v = SelfAttention(32, 4).project(normal(2, 6, 32, dtype=torch.float32))
    assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1


def test_hooks_read_what_flows_through_the_model():
    model, tokens, seen = small_model(), some_tokens(), {}
    for name, module in model.named_modules():
        if "hook_" in name:
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
    logits = model(tokens)
    attention = model.blocks[1].attention
    q, k, v = attention.project(model.blocks[1].attention_norm(seen["blocks.0.hook_resid_post"]))
    for name, expected in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(seen[f"blocks.1.attention.hook_{name}"], expected)
    mid = seen["blocks.1.hook_resid_mid"]
    written = attention.out_proj(seen["blocks.1.attention.hook_z"].transpose(1, 2).flatten(2))
    assert_equal_to(seen["blocks.1.hook_resid_pre"] + written, mid)
    assert torch.equal(model.unembed(seen["blocks.1.hook_resid_post"]), logits)


HOOKS = [f"attention.hook_{name}" for name in "qkvz"] + [f"hook_resid_{name}" for name in ("pre", "mid", "post")]


@pytest.mark.parametrize("point", HOOKS)
def test_a_hook_replaces_what_flows_by_returning_a_tensor(point):
    model, tokens = small_model(), some_tokens()
    logits = model(tokens)
    hook = model.blocks[1].get_submodule(point).register_forward_hook(lambda _, inputs, output: output * 0)
    assert (model(tokens) - logits).abs().max() > 1e-3
    hook.remove()
    assert torch.equal(model(tokens), logits)


# What is seen: a call's mask, window and lengths join what the module was built with.


def eager_seen(module, x, seen):
    """Self-attention by torch's own function over the pairs that are seen, bool (B or 1, 1, L, L)."""
    q, k, v = module.project(x)
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    z = F.scaled_dot_product_attention(q, k, v, seen)
    return module.out_proj(z.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("own", [(None, None), (3, 1)], ids=str)
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"window": (2, None)},
        {"window": 3},
        {"key_lengths": [9, 4]},
        {"key_lengths": torch.tensor([9, 4])},
        {"mask": masks.dilated(2)},
        {"mask": masks.documents([0, 0, 0, 1, 1, 1, 1, 2, 2]), "window": (4, 2)},
        {"mask": masks.dilated(2) | masks.global_tokens([0]), "key_lengths": torch.tensor([9, 4])},
    ],
    ids=lambda call: ", ".join(call) or "nothing",
)
def test_what_a_call_shows_joins_what_the_module_was_built_with(causal, own, call):
    module = SelfAttention(32, 4, num_kv_heads=2, causal=causal, window=own, rotary=True, dtype=torch.float64)
    x = normal(2, 9, 32).requires_grad_()
    parts = [masks.window(*own), masks.window(*check_window(call.get("window"))), call.get("mask", masks.window())]
    parts += [masks.causal()] if causal else []
    parts += [masks.key_lengths(call["key_lengths"])] if "key_lengths" in call else []
    seen = functools.reduce(operator.and_, parts).dense(2, 1, 9, 9)
    expected, out = eager_seen(module, x, seen), module(x, **call)
    assert_equal_to(expected, out)
    wanted = [x, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (expected, out)), strict=True):
        assert_equal_to(a, b, 1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_a_padded_batch_gives_what_its_sequences_give_alone(causal):
    model, tokens, lengths = small_model(causal=causal, window=(5, None)), some_tokens(3), [13, 1, 6]
    logits = model(tokens, key_lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        assert_equal_to(model(tokens[row : row + 1, :length]), logits[row : row + 1, :length])


def test_documents_in_one_row_give_what_each_gives_alone():
    model, tokens = small_model(positions="rotary"), some_tokens(1)
    logits = model(tokens, mask=masks.documents(cu_seqlens=[0, 4, 13]))
    alone = [model(tokens[:, :4]), model(tokens[:, 4:])]
    assert_equal_to(torch.cat(alone, 1), logits)


def test_a_block_passes_each_attention_what_it_sees():
    cross = CrossAttention(32, 4, dtype=torch.float64)
    block = TransformerBlock(SelfAttention(32, 4, dtype=torch.float64), cross_attention=cross, dtype=torch.float64)
    x, context, lengths = normal(2, 6, 32), normal(2, 9, 32), torch.tensor([2, 7])
    expected = [
        block(x[i : i + 1], context[i : i + 1, :n], mask=masks.window(1, 1))
        for i, n in enumerate(lengths.tolist())
    ]
    out = block(x, context, mask=masks.window(1, 1), context_key_lengths=lengths)
    assert_equal_to(torch.cat(expected), out)
    shown = block(x, context, mask=masks.window(1, 1), context_mask=masks.key_lengths(lengths))
    assert torch.equal(shown, out)
    assert_equal_to(
        out, checkpoint(block, x, context, use_reentrant=False, window=(1, 1), context_key_lengths=lengths)
    )


def test_a_window_of_the_configuration_is_every_layers_and_survives_json_and_copies():
    config = TransformerConfig(**SMALL, window=[4, None])
    assert config.window == (4, None) and hash(config)
    model = TransformerModel(config, dtype=torch.float64)
    plain = TransformerModel(TransformerConfig(**SMALL), dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    tokens = some_tokens()
    assert_equal_to(plain(tokens, window=(4, None)), model(tokens))
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))
    assert "window=(4, None)" in repr(model) and "window" not in repr(plain)


def test_compiled_it_takes_lengths_and_a_lowered_mask_within_its_own():
    model, tokens, lengths = small_model(torch.float32), some_tokens(), torch.tensor([13, 5])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal_to(model(tokens, key_lengths=lengths), compiled(tokens, key_lengths=lengths), 1e-6)
    for mask in (masks.causal() & masks.documents([0] * 6 + [1] * 7), masks.dilated(2) & masks.causal()):
        lowered = mask.lower(2, 4, 13, 13)
        expected = model(tokens, mask=mask)
        assert_equal_to(expected, model(tokens, mask=lowered), 1e-6)
        assert_equal_to(expected, compiled(tokens, mask=lowered), 1e-6)


# Parts that are not what they were built as.


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter around it, as PEFT has it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


class Louder(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def louder(owner, name):
    part = getattr(owner, name)
    part.__class__ = Louder


def adapted(owner, name):
    setattr(owner, name, Adapted(getattr(owner, name)))


def replaced(owner, name):
    part = getattr(owner, name)
    forward = part.forward
    part.forward = lambda x: forward(x) * 2


def offloaded(owner, name):
    """The weights lie elsewhere, and a hook brings them for the call."""
    part = getattr(owner, name)
    kept = {n: nn.Parameter(p.detach().clone()) for n, p in part.named_parameters()}
    part.to("meta")

    def bring(part, _):
        for n, p in kept.items():
            part._parameters[n] = p

    part.register_forward_pre_hook(bring)


def quantised(owner, name):
    made = torch.ao.quantization.quantize_dynamic(nn.Sequential(getattr(owner, name)), {nn.Linear}, torch.qint8)
    setattr(owner, name, made[0])


ALTERATIONS = {
    "adapter": adapted,
    "subclass": louder,
    "forward of its own": replaced,
    "forward hook": lambda owner, name: getattr(owner, name).register_forward_hook(lambda m, i, o: o * 2),
    "pre-hook": lambda owner, name: getattr(owner, name).register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "offloading": offloaded,
    "pruning": lambda owner, name: prune.random_unstructured(getattr(owner, name), "weight", 0.5),
    "weight norm": lambda owner, name: parametrizations.weight_norm(getattr(owner, name)),
    "spectral norm": lambda owner, name: parametrizations.spectral_norm(getattr(owner, name).eval()),
    "orthogonal": lambda owner, name: parametrizations.orthogonal(getattr(owner, name)),
    "quantisation": quantised,
}
PARTS = [(MLP, "up"), (MLP, "down"), (GatedMLP, "gate"), (GatedMLP, "up"), (GatedMLP, "down")]
QUANTISERS = pytest.mark.filterwarnings("ignore:.*(quantization|quantized|TypedStorage)")


@QUANTISERS
@pytest.mark.parametrize(
    ("kind", "name", "alteration", "compiled"),
    [(*part, alteration, False) for part in PARTS for alteration in ALTERATIONS]
    + [(MLP, "down", alteration, True) for alteration in ("adapter", "forward hook", "pruning", "weight norm")],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_an_mlp_calls_its_parts_where_one_is_not_what_it_was_built_as(kind, name, alteration, compiled):
    dtype = torch.float32 if alteration == "quantisation" else torch.float64
    module, x = shaken(kind(24, 16, activation="silu", dtype=dtype)), normal(3, 24, dtype=dtype)
    before = module(x)
    ALTERATIONS[alteration](module, name)
    run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    out, expected = run(x), eager_mlp(module, x)
    assert_equal_to(expected, out, 1e-6 if dtype == torch.float32 else 1e-12)
    if alteration not in ("offloading", "weight norm"):
        with torch.no_grad():
            if alteration == "adapter":
                nn.init.normal_(getattr(module, name).b.weight)
        assert (module(x) - before).abs().max() > 1e-4
    trained = [p for p in module.parameters() if p.requires_grad and not p.is_meta]
    for actual, wanted in zip(
        *(
            torch.autograd.grad(y.square().sum(), trained, allow_unused=True)
            for y in (run(x), eager_mlp(module, x))
        ),
        strict=True,
    ):
        if wanted is not None:
            assert_equal_to(wanted, actual, 1e-6 if dtype == torch.float32 else 1e-11)


def test_adapters_on_an_mlp_of_a_model_train():
    model, tokens = TransformerModel(**SMALL), some_tokens()
    for block in model.blocks:
        for name in ("up", "down"):
            adapted(block.mlp, name)
    adapters = {n: p for n, p in model.named_parameters() if n.endswith((".a.weight", ".b.weight"))}
    for p in adapters.values():
        nn.init.normal_(p)
    found = torch.autograd.grad(next_token_loss(model(tokens), tokens), list(adapters.values()))
    assert len(found) == 8 and all(g.abs().max() > 0 for g in found)


def observations(module, call):
    """What every sort of hook is told during a forward and a backward, as (sort, shapes or sums)."""
    told = []

    def note(sort):
        def hook(_, *tensors):
            flat = [t for group in tensors for t in (group if isinstance(group, tuple) else (group,))]
            told.append((sort, [t.detach().clone() for t in flat if isinstance(t, torch.Tensor)]))

        return hook

    handles = [
        module.register_forward_pre_hook(note("pre")),
        module.register_forward_hook(note("forward")),
        module.register_full_backward_pre_hook(note("backward pre")),
        module.register_full_backward_hook(note("backward")),
    ]
    call().square().sum().backward()
    for handle in handles:
        handle.remove()
    return told


@pytest.mark.parametrize(
    ("make", "points", "eagerly"),
    [
        (lambda: MLP(24, 16), ("up", "down"), eager_mlp),
        (lambda: GatedMLP(24, 16), ("gate", "up", "down"), eager_mlp),
        (
            lambda: SelfAttention(24, 2, rotary=True, qk_norm=True),
            ("q_norm", "k_norm", "qkv_proj", "out_proj", "rotary", "hook_q", "hook_k", "hook_v", "hook_z"),
            None,
        ),
        (lambda: CrossAttention(24, 2), ("q_proj", "kv_proj", "out_proj"), None),
    ],
)
def test_every_sort_of_hook_fires_on_every_point_with_what_flows_there(make, points, eagerly):
    module = shaken(make()).double()
    x = normal(2, 5, 24).requires_grad_()
    inputs = (x, x) if isinstance(module, CrossAttention) else (x,)
    for point in points:
        told = observations(module.get_submodule(point), lambda: module(*inputs))
        times = 2 if point == "rotary" else 1
        assert sorted(sort for sort, _ in told) == sorted(["pre", "forward", "backward pre", "backward"] * times)
        if eagerly is not None:
            expected = observations(module.get_submodule(point), lambda: eagerly(module, *inputs))
            for (sort, ours), (_, theirs) in zip(told, expected, strict=True):
                torch.testing.assert_close(ours, theirs, msg=lambda m, sort=sort: f"{sort}: {m}")


def test_hooks_on_all_modules_fire_in_the_parts():
    module, seen = MLP(24, 16), set()
    with nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m)):
        module(normal(2, 24, dtype=torch.float32))
    assert seen == {module, module.up, module.down}


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
@pytest.mark.parametrize("alteration", ["forward of its own", "forward hook", "another epsilon", "another norm"])
def test_attention_calls_its_norms_where_one_is_not_what_it_was_built_as(name, alteration):
    module = shaken(SelfAttention(32, 4, num_kv_heads=2, rotary=True, qk_norm=True, dtype=torch.float64))
    x = normal(2, 6, 32)
    before = module(x)
    if alteration == "another epsilon":
        getattr(module, name).eps = 0.5
    elif alteration == "another norm":
        setattr(module, name, nn.RMSNorm(8, elementwise_affine=False, dtype=torch.float64))
    else:
        ALTERATIONS[alteration](module, name)
    out = module(x)
    assert_equal_to(eager_self_attention(module, x), out)
    assert (out - before).abs().max() > 1e-4


def test_a_rotation_that_was_changed_is_called():
    module, x = SelfAttention(32, 4, causal=True, rotary=True, dtype=torch.float64), normal(2, 6, 32)
    module.rotary.register_forward_hook(lambda m, i, o: i[0])
    still = SelfAttention(32, 4, causal=True, dtype=torch.float64)
    still.load_state_dict(module.state_dict())
    assert_equal_to(still(x), module(x))


def test_an_unembedding_of_its_own_is_called():
    model = small_model(tied=False)
    before = model(some_tokens())
    model.unembedding.register_forward_hook(lambda m, i, o: o * 2)
    assert torch.equal(model(some_tokens()), before * 2)


class Wrapped(nn.Module):
    """As adapters put a part into a module of theirs, without its attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **options):
        return self.inner(*args, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_of_a_model_may_be_put_into_a_wrapper(variant):
    whole = small_model(**VARIANTS[variant])
    expected = whole(some_tokens())
    for name, part in whole.named_modules():
        if name and not isinstance(part, nn.ModuleList):
            model, (holder, _, leaf) = copy.deepcopy(whole), name.rpartition(".")
            model.get_submodule(holder)._modules[leaf] = Wrapped(model.get_submodule(name))
            torch.testing.assert_close(model(some_tokens()), expected, msg=lambda m, name=name: f"{name}: {m}")


def test_a_tied_unembedding_asks_an_embedding_whose_weight_is_elsewhere_until_it_is_called():
    model = small_model(tied=True)
    expected = model(some_tokens())
    table = model.token_embedding.weight.detach().clone()
    model.token_embedding.to("meta")
    model.token_embedding.forward = lambda tokens: F.embedding(tokens, table)
    torch.testing.assert_close(model(some_tokens()), expected)


# As other tools meet modules: every kind of them, called on a sequence (B, L, 32) of any batch and length.


class OnItself(nn.Module):
    """A module that takes a sequence and a context, or three, given one sequence for all."""

    def __init__(self, module, inputs):
        super().__init__()
        self.module, self.inputs = module, inputs

    def forward(self, x):
        out = self.module(*[x] * self.inputs)
        return out[0] if isinstance(out, tuple) else out


KINDS = {
    "MLP": lambda: MLP(32),
    "GatedMLP": lambda: GatedMLP(32),
    "SelfAttention": lambda: SelfAttention(32, 4, causal=True),
    "SelfAttention with all": lambda: SelfAttention(32, 4, window=(4, 1), rotary=True, qk_norm=True),
    "CrossAttention": lambda: OnItself(CrossAttention(32, 4), 2),
    "TransformerBlock": lambda: TransformerBlock(SelfAttention(32, 4, causal=True), MLP(32)),
    "MultiheadAttention": lambda: OnItself(fastattn.nn.MultiheadAttention(32, 4, batch_first=True), 3),
    "TransformerEncoderLayer": lambda: fastattn.nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True),
    "TransformerDecoderLayer": lambda: OnItself(
        fastattn.nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True), 2
    ),
    "Transformer": lambda: OnItself(fastattn.nn.Transformer(32, 4, 1, 1, 64, 0.0, batch_first=True), 2),
    "RMSNorm": lambda: fastattn.nn.RMSNorm(32),
    "LayerNorm": lambda: fastattn.nn.LayerNorm(32),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_traced_and_exported_it_serves_other_batches_and_lengths(kind):
    module, x, other = kind().eval(), torch.randn(2, 8, 32), torch.randn(3, 11, 32)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    dynamic = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    exported = torch.export.export(module, (x,), dynamic_shapes=(dynamic,)).module()
    for made in (traced, exported):
        torch.testing.assert_close(made(other), module(other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_causal_model_is_traced_and_exported_for_other_batches_and_lengths():
    model = small_model(torch.float32, window=(6, None)).eval()
    tokens, other = some_tokens(2, 8), some_tokens(3, 13)
    traced = torch.jit.trace(model, (tokens,), check_trace=False)
    dynamic = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=20)}
    exported = torch.export.export(model, (tokens,), dynamic_shapes=(dynamic,)).module()
    for made in (traced, exported):
        torch.testing.assert_close(made(other), model(other))


def test_made_on_the_meta_device_it_runs_there(kind):
    with torch.device("meta"):
        module, x = kind(), torch.randn(2, 8, 32)
        assert all(p.is_meta for p in module.parameters())
        assert module(x).is_meta and module(x).shape == x.shape


def test_under_another_default_dtype_it_is_made_and_computes_in_it(kind):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module = kind()
        assert {p.dtype for p in module.parameters()} == {torch.float64}
        assert module(torch.randn(2, 8, 32)).dtype == torch.float64
        attention = fastattn.nn.MultiheadAttention(32, 4, batch_first=True)
        x = torch.randn(2, 8, 32)
        out, weights = attention(x, x, x, attn_mask=masks.dilated(2))
        assert out.dtype == weights.dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_it_trains_after_it_ran_in_inference_mode(kind):
    module, x = kind(), torch.randn(2, 8, 32)
    with torch.inference_mode():
        module(x)
    module(x).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    model, tokens, mask = small_model(), some_tokens(), masks.dilated(2) | masks.window(1, 1)
    with torch.inference_mode():
        model(tokens, mask=mask)
    model(tokens, mask=mask).sum().backward()


def test_under_autocast_on_a_cpu_it_has_the_dtype_of_torchs_modules():
    halves = {"MLP", "GatedMLP", "SelfAttention", "SelfAttention with all", "CrossAttention", "MultiheadAttention"}
    for name, make in KINDS.items():
        with torch.autocast("cpu", torch.bfloat16):
            dtype = make()(torch.randn(2, 8, 32)).dtype
        assert dtype == (torch.bfloat16 if name in halves else torch.float32), name


# Bad input.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SelfAttention(30, 4), ValueError, "embed_dim must be a multiple .* embed_dim 30, num_heads 4"),
        (lambda: SelfAttention(32, 4, window=(1,)), (TypeError, ValueError), "window"),
        (lambda: TransformerConfig(**SMALL, window=(-1, 0)), ValueError, "window"),
        (lambda: SelfAttention(32, 0), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: SelfAttention(32.0, 4), TypeError, "embed_dim must be an integer, got float"),
        (lambda: SelfAttention(16, 4, head_dim=0), ValueError, "head_dim must be at least 1, got 0"),
        (lambda: SelfAttention(32, 4, num_kv_heads=3), ValueError, "num_heads 4, num_kv_heads 3"),
        (lambda: SelfAttention(32, 4, rotary=Rotary(16)), ValueError, "at most head_dim = 8 .* got width 16"),
        (lambda: SelfAttention(32, 4, rotary="half"), TypeError, "rotary must be a .*Rotary or a bool, got str"),
        (lambda: CrossAttention(32, 4, context_dim=0), ValueError, "context_dim must be at least 1, got 0"),
        (lambda: Rotary(7), ValueError, "width must be even.* got 7"),
        (lambda: MLP(8, activation="mish"), ValueError, "activation must be one of .*gelu.* got 'mish'"),
        (lambda: GatedMLP(8, 0), ValueError, "hidden_dim must be at least 1, got 0"),
        (lambda: TransformerBlock(SelfAttention(32, 4), MLP(24)), ValueError, "mlp must have .* 32; got 24"),
        (lambda: TransformerBlock(SelfAttention(32, 4), norm="batch"), ValueError, "norm must be .* got 'batch'"),
        (
            lambda: TransformerModel(**{**SMALL, "positions": "sine"}),
            ValueError,
            "positions must be .* got 'sine'",
        ),
        (lambda: TransformerModel(**{**SMALL, "max_length": None}), ValueError, "max_length must be given"),
        (lambda: TransformerModel(**SMALL, rotary_width=4), ValueError, "rotary_width must be None .* got 4"),
        (lambda: TransformerModel(**SMALL, dropout=1.0), ValueError, "dropout must be .* got 1.0"),
        (lambda: TransformerModel(**SMALL, mlp="wide"), ValueError, "mlp must be one of .* got 'wide'"),
        (lambda: TransformerModel(**SMALL, layers=3), TypeError, "layers"),
        (lambda: TransformerModel({"vocab_size": 3}), TypeError, "config must be a TransformerConfig, got dict"),
        (
            lambda: TransformerModel.from_gpt2("gpt2"),
            TypeError,
            "source must be a module or a state dict, got str",
        ),
    ],
)
def test_modules_that_cannot_be_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


ATTENTION = SelfAttention(32, 4)
CROSS_ATTENTION = CrossAttention(32, 4, context_dim=20)
MODEL = TransformerModel(TransformerConfig(**SMALL))
SMALL_X = torch.zeros(2, 6, 32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ATTENTION(normal(6, 32)), ValueError, r"x must .* \(batch, length, 32\), got \(6, 32\)"),
        (lambda: ATTENTION.project(normal(2, 6, 30)), ValueError, r"x must .* got \(2, 6, 30\)"),
        (lambda: CROSS_ATTENTION(normal(2, 6, 32), normal(2, 6, 32)), ValueError, "context must .* 20"),
        (lambda: CROSS_ATTENTION(normal(2, 6, 32), normal(3, 6, 20)), ValueError, "context must .* batch size"),
        (lambda: ATTENTION(SMALL_X, key_lengths=torch.ones(3).long()), ValueError, r"key_lengths .* \(2,\)"),
        (lambda: ATTENTION(SMALL_X, mask=masks.causal().lower(2, 4, 5, 5)), ValueError, "mask was lowered for"),
        (lambda: ATTENTION(SMALL_X, window=(1, 2, 3)), (TypeError, ValueError), "window"),
        (lambda: MODEL(torch.zeros(1, 5).long(), mask=1), TypeError, "mask must be a value of fastattn.masks"),
        (
            lambda: SelfAttention(32, 4, causal=True)(SMALL_X, mask=masks.dilated(2).lower(2, 4, 6, 6)),
            ValueError,
            "mask must lie within causal and window",
        ),
        (
            lambda: MODEL.blocks[0](SMALL_X, context_key_lengths=torch.ones(2).long()),
            ValueError,
            "context_key_lengths must be None for a block without cross_attention",
        ),
        (lambda: MLP(8)(normal(4, 7)), ValueError, r"x must have shape \(..., 8\), got \(4, 7\)"),
        (lambda: Rotary(16)(normal(1, 2, 3, 8)), ValueError, "x must have shape .*at least 16"),
        (lambda: MODEL.blocks[0](normal(6, 32)), ValueError, r"x must .* got \(6, 32\)"),
        (lambda: MODEL.blocks[0](normal(2, 6, 32), normal(2, 6, 32)), ValueError, "context must be None"),
        (
            lambda: TransformerBlock(ATTENTION, cross_attention=CROSS_ATTENTION)(normal(2, 6, 32)),
            ValueError,
            "context must be a tensor",
        ),
        (lambda: MODEL(torch.zeros(5, dtype=torch.int64)), ValueError, r"tokens must have .* got \(5,\)"),
        (lambda: MODEL(torch.zeros(1, 21, dtype=torch.int64)), ValueError, r"max_length = 20 .*\(1, 21\)"),
        (lambda: MODEL(torch.zeros(1, 5)), TypeError, "tokens must be int64 or int32, got torch.float32"),
        (lambda: MODEL([[1, 2]]), TypeError, "tokens must be a torch.Tensor, got list"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
