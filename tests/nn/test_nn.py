"""Modules: equal to eager twins, well behaved in training, shown what a mask shows, clear about errors."""

from __future__ import annotations

import copy
import functools
import io
import operator
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from eager_models import (
    ACTIVATIONS,
    SMALL,
    VARIANTS,
    assert_equal_to,
    eager_mlp,
    eager_transformer,
    eager_weighted_values,
    gradients,
    next_token_loss,
    normal,
    shaken,
    small_model,
    some_tokens,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

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
