"""Claims about the table of families: what a row names is what the model computes with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lens_models import ALL, HEADS, LAYERS, LIKE_LLAMA, PRE_NORM, WIDTH, make, text
from torch import nn

from fastattn import lens
from fastattn.lens import family_table


def run(model, tokens, watched):
    """The logits, and what each of the watched modules gave."""
    gave = {}

    def keep(name):
        def hook(_module, _inputs, output):
            gave[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    try:
        with torch.no_grad():
            logits = lens.adapt(model).logits(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return logits, gave


def embeddings_of(adapter):
    return {f"embedding {i}": module for i, module in enumerate(adapter.embeddings)}


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", [*PRE_NORM, *LIKE_LLAMA])
def test_embedding_and_all_that_attention_and_mlps_add_give_the_models_logits(name, attention):
    model = make(name, attention)
    adapter = lens.adapt(model)
    assert (adapter.num_layers, adapter.num_heads) == (LAYERS, HEADS)
    parts = [(part, layer) for part in ("attention_out", "mlp_out") for layer in range(LAYERS)]
    watched = {key: module for key in parts if (module := adapter.part(*key)) is not None}
    assert len(watched) == (LAYERS if adapter.family.mlp and adapter.part("mlp", 0) is None else 2 * LAYERS)
    logits, gave = run(model, text(), {**watched, **embeddings_of(adapter)})
    stream = sum(gave.values())
    torch.testing.assert_close(adapter.unembed(stream), logits, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in ALL if name not in PRE_NORM])
def test_post_norm_blocks_norm_the_sum_of_stream_and_what_is_added(name):
    model = make(name)
    adapter = lens.adapt(model)
    assert adapter.post_norm
    parts = {(p, i): adapter.part(p, i) for p in ("attention_out", "mlp_out") for i in range(LAYERS)}
    logits, gave = run(model, text(), {**parts, **embeddings_of(adapter)})
    stream = adapter.embedding_norm(sum(gave[name] for name in embeddings_of(adapter)))
    for layer in range(LAYERS):
        stream = adapter.part("attention_norm", layer)(stream + gave["attention_out", layer])
        stream = adapter.part("mlp_norm", layer)(stream + gave["mlp_out", layer])
    torch.testing.assert_close(adapter.unembed(stream), logits, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_weights_by_head_and_by_neuron_are_the_layers_own(name):
    model = make(name)
    adapter = lens.adapt(model)
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    for layer in range(LAYERS):
        weights = adapter.projections(layer)
        q, k, v = (
            torch.einsum("ld,hde->hle", x, weight) + (0 if bias is None else bias[:, None])
            for weight, bias in zip(weights[:3], weights[4:7], strict=True)
        )
        theirs = projected(adapter, layer, x)
        for ours, expected in zip((q, k, v), theirs, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
        assert weights.k.shape[0] == weights.v.shape[0] == adapter.num_kv_heads
        out = torch.einsum("hle,hed->ld", q, weights.out) + (0 if weights.out_bias is None else weights.out_bias)
        joined = q.transpose(0, 1).flatten(1)
        torch.testing.assert_close(out, adapter.part("out", layer)(joined), atol=1e-12, rtol=1e-12)
        if adapter.part("mlp", layer) is not None:
            rows, bias = adapter.neuron_outputs(layer)
            hidden = torch.randn(7, len(rows), dtype=torch.float64)
            written = hidden @ rows + (0 if bias is None else bias)
            torch.testing.assert_close(written, adapter.part("down", layer)(hidden), atol=1e-12, rtol=1e-12)


def projected(adapter, layer, x):
    """Queries, keys and values (heads, L, D) before norm and rotation, as each family's own code cuts them."""
    heads, kv_heads = adapter.num_heads, adapter.num_kv_heads
    name = adapter.family.name
    if name == "fastattn":
        attention = adapter.part("attention", layer)
        return attention.heads(attention.qkv_proj(x)[None])[0].split([heads, kv_heads, kv_heads])
    if name == "GPT-2":
        return [t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in adapter.part("q", layer)(x).chunk(3, -1)]
    if name.startswith("GPT-NeoX"):
        return adapter.part("q", layer)(x).unflatten(-1, (heads, -1)).transpose(0, 1).chunk(3, -1)
    return [
        adapter.part(part, layer)(x).unflatten(-1, (count, -1)).transpose(0, 1)
        for part, count in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
    ]


@pytest.mark.parametrize(("name", "base"), [("llama", "model"), ("gpt2", "transformer"), ("bert", "bert")])
def test_a_model_without_head_has_parts_but_no_logits(name, base):
    model = make(name)
    adapter = lens.adapt(getattr(model, base))
    assert adapter.blocks is lens.adapt(model).blocks
    for ask in (adapter.unembed, adapter.logits):
        with pytest.raises(ValueError, match="gives no logits"):
            ask(text())


def test_a_wrapped_model_is_pointed_to():
    wrapper = nn.Module()
    wrapper.module = make("llama")
    with pytest.raises(ValueError, match=r"but transformers.LlamaForCausalLM is known: give model.module$"):
        lens.adapt(wrapper)


def test_a_model_without_a_row_is_told_which_rows_there_are_and_how_to_add_one():
    with pytest.raises(ValueError, match=r"torch.Linear.*Llama \(transformers.LlamaForCausalLM.*lens.register"):
        lens.adapt(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got int"):
        lens.adapt(3)


def test_a_row_that_names_what_is_not_there_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(family_table, "_FAMILIES", dict(family_table._FAMILIES))
    lens.register(dataclasses.replace(family_table.FASTATTN, name="wrong", out="attention.output"))
    with pytest.raises(ValueError, match=r"family wrong says that out of block 0 is at attention.output"):
        lens.adapt(make("own"))
    lens.register(dataclasses.replace(family_table.FASTATTN, name="wrong", blocks="layers"))
    with pytest.raises(ValueError, match="says that blocks is at layers"):
        lens.adapt(make("own"))


def test_a_registered_family_serves_its_models_and_their_subclasses(monkeypatch):
    class Renamed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model
            self.config = model.config

    class Derived(Renamed):
        pass

    monkeypatch.setattr(family_table, "_FAMILIES", dict(family_table._FAMILIES))
    library = __name__.split(".")[0]
    lens.register(
        dataclasses.replace(family_table.FASTATTN, name="mine", models=(f"{library}.Renamed",), base="inner")
    )
    assert lens.adapt(Derived(make("own"))).num_layers == LAYERS


def test_models_with_layers_that_no_row_names_are_refused():
    with pytest.raises(ValueError, match=r"does not describe a model with config.add_cross_attention"):
        lens.adapt(make("gpt2", add_cross_attention=True))


def test_blocks_that_share_a_module_are_refused():
    model = make("own")
    model.blocks[2] = model.blocks[0]
    with pytest.raises(ValueError, match="blocks 0 and 2 share all of their modules"):
        lens.adapt(model)
    model = make("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match="blocks 0 and 1 share mlp of their modules"):
        lens.adapt(model)


def test_compiled_models_and_altered_layers_are_refused():
    model = make("own")
    with pytest.raises(TypeError, match="must not be compiled"):
        lens.adapt(torch.compile(model))
    model.blocks[1].compile()
    with pytest.raises(TypeError, match="must not be compiled"):
        lens.adapt(model)

    class LoRA(nn.Linear):
        pass

    model = make("own")
    model.blocks[0].attention.out_proj.__class__ = LoRA
    with pytest.raises(TypeError, match="got a LoRA: merge adapters"):
        lens.adapt(model).projections(0)
