"""Claims about looking into models built from torch.nn's encoder layers, once they are patched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn import lens, masks
from fastattn.lens import places

CLOSE = {"atol": 1e-12, "rtol": 1e-12}
HEADS, WIDTH, LAYERS = 4, 32, 3
EVERYTHING = ["blocks.*.resid_*", "blocks.*.attention.*", "blocks.*.mlp.*", "blocks.*.attention.pattern"]


class Model(nn.Module):
    """A language model as people write them with torch.nn alone."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 48, batch_first=batch_first, norm_first=norm_first, activation="gelu"
        )
        norm = nn.LayerNorm(WIDTH) if norm_first else None
        self.embedding = nn.Embedding(50, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, norm, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, tokens: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=torch.float64)
        x = self.embedding(tokens)
        x = x if self.encoder.layers[0].self_attn.batch_first else x.transpose(0, 1)
        x = self.encoder(x, mask, padding, is_causal=True)
        return self.head(x if self.encoder.layers[0].self_attn.batch_first else x.transpose(0, 1))


def make(batch_first=True, norm_first=True, patched=True) -> Model:
    torch.manual_seed(0)
    model = Model(batch_first, norm_first).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if patched:
        fastattn.patch(model, norm=True)
    return model


def text(length=20):
    return torch.randint(50, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_what_is_recorded_is_what_the_model_computes_with(batch_first, norm_first):
    model, tokens = make(batch_first, norm_first), text()
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[1, 15:] = True
    with torch.no_grad(), lens.watch(model, EVERYTHING) as seen:
        watched = model(tokens, padding)
    with torch.no_grad():
        torch.testing.assert_close(watched, model(tokens, padding), **CLOSE)
    adapter = lens.adapt(model)
    assert adapter.post_norm is not norm_first and adapter.num_heads == HEADS
    for layer, block in enumerate(model.encoder.layers):
        get = {name.split(".", 2)[2]: value for name, value in seen.items() if name.startswith(f"blocks.{layer}.")}
        pre, mid, post = (get[f"resid_{x}"] for x in ("pre", "mid", "post"))
        added, written = get["attention.out"], get["mlp.out"]
        assert pre.shape == (2, 20, WIDTH)
        x = block.norm1(pre) if norm_first else pre
        weights = adapter.projections(layer)
        for name, weight, bias in zip("qkv", weights[:3], weights[4:7], strict=True):
            expected = torch.einsum("bld,hde->bhle", x, weight) + bias[:, None]
            torch.testing.assert_close(get[f"attention.hook_{name}"], expected, **CLOSE)
        v, z, pattern = (get[f"attention.{x}"] for x in ("hook_v", "hook_z", "pattern"))
        torch.testing.assert_close(pattern @ v, z, **CLOSE)
        assert pattern.triu(1).abs().max() == 0 == pattern[1, ..., 15:].abs().max()
        torch.testing.assert_close(
            torch.einsum("bhle,hed->bld", z, weights.out) + weights.out_bias, added, **CLOSE
        )
        rows, bias = adapter.neuron_outputs(layer)
        torch.testing.assert_close(get["mlp.hook_post"] @ rows + bias, written, **CLOSE)
        torch.testing.assert_close(mid, pre + added if norm_first else block.norm1(pre + added), **CLOSE)
        torch.testing.assert_close(post, mid + written if norm_first else block.norm2(mid + written), **CLOSE)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_statistics_and_interventions_reach_them(batch_first, norm_first):
    model, tokens = make(batch_first, norm_first), text()
    names = [f"blocks.1.attention.{x}" for x in ("entropy", "pattern", "hook_z", "hook_v")]
    with torch.no_grad(), lens.watch(model, names) as own:
        logits = model(tokens)
    entropy, pattern, z, v = (own[name] for name in names)
    torch.testing.assert_close(entropy, -torch.special.xlogy(pattern, pattern).sum(-1), atol=1e-9, rtol=1e-9)
    previous = masks.window(1, 0) & ~masks.window(0, 0)
    with torch.no_grad(), lens.knock_out(model, [(1, 2)], previous), lens.watch(model, names[2]) as seen:
        model(tokens)
    left = pattern.masked_fill(previous.dense(1, 1, 20, 20), 0)
    expected = (left / left.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(seen[names[2]][:, 2], expected[:, 2], **CLOSE)
    torch.testing.assert_close(seen[names[2]][:, :2], z[:, :2], **CLOSE)
    place, vector = "blocks.1.resid_pre", torch.randn(WIDTH).double()
    with torch.no_grad(), lens.steer(model, f"{place}.at(3)", vector), lens.watch(model, place) as steered:
        assert not torch.allclose(model(tokens), logits)
    with torch.no_grad(), lens.watch(model, place) as before:
        assert model(tokens).equal(logits)
    torch.testing.assert_close(
        steered[place] - before[place], F.pad(vector.expand(2, 1, -1), (0, 0, 3, 16)), **CLOSE
    )
    assert not places._ATTENTIONS and not places._SLOTS
    assert not any("_attend" in vars(layer.self_attn) for layer in model.encoder.layers)


def test_before_they_are_patched_streams_can_be_seen_and_attention_cannot():
    model, tokens = make(patched=False), text()
    with torch.no_grad(), lens.watch(model, "blocks.0.resid_post") as seen:
        logits = model(tokens)
    with (
        pytest.raises(ValueError, match=r"cannot be seen: call fastattn.patch\(model\) first"),
        lens.watch(model, "blocks.0.attention.hook_q"),
    ):
        pass
    fastattn.patch(model)
    with torch.no_grad(), lens.watch(model, ["blocks.0.resid_post", "blocks.0.attn.z"]) as patched:
        torch.testing.assert_close(model(tokens), logits, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(patched["blocks.0.resid_post"], seen["blocks.0.resid_post"], atol=1e-10, rtol=1e-10)


def test_what_has_no_streams_of_one_length_or_several_stacks_is_refused():
    with pytest.raises(ValueError, match="several stacks of layers, encoder, decoder"):
        lens.watch(nn.Transformer(WIDTH, HEADS, 1, 1, 48), "blocks.0.resid_pre").__enter__()
    encoder = fastattn.nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True), 1
    ).eval()
    x, padding = torch.randn(2, 5, WIDTH), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with (
        pytest.raises(ValueError, match="has a nested tensor"),
        lens.watch(encoder, "blocks.0.resid_pre"),
        torch.no_grad(),
    ):
        encoder(x, src_key_padding_mask=padding)
    with (
        pytest.raises(ValueError, match=r"has shape \(5, 32\)"),
        lens.watch(encoder, "blocks.0.resid_pre"),
        torch.no_grad(),
    ):
        encoder(x[0])
    with pytest.raises(ValueError, match="model has no unembedding that its family names"):
        lens.adapt(encoder).logits(x)
