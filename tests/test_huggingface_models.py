"""Models that "fastattn" cannot serve say so when made, and `patch` leaves them; the others equal eager."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastattn

transformers = pytest.importorskip("transformers")

import fastattn.integrations.huggingface  # noqa: E402
from fastattn.integrations.huggingface_models import difference_from_eager  # noqa: E402

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 32, "initializer_range": 0.2}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
          "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "n_routed_experts": 4,
          "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "index_n_heads": 4, "index_head_dim": 32,
          "index_topk": 4}  # fmt: skip
SEQ2SEQ = {"vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip

NOT_DISPATCHED = {
    "Bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 1, "n_head": 2},
    "MPNet": SMALL,
    "Falcon": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "BigBird": SMALL,
    "XLNet": {"vocab_size": 99, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32},
    "BigBirdPegasus": SEQ2SEQ,
    "NllbMoe": SEQ2SEQ,
}


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    seen[1, :4] = 0
    return {"input_ids": ids, "attention_mask": seen}


def config_of(name: str, **options):
    return getattr(transformers, f"{name}Config")(**options)


@pytest.mark.parametrize("name", NOT_DISPATCHED)
def test_a_model_that_cannot_use_it_says_so_when_it_is_made_and_is_left_by_patch(name: str) -> None:
    kind, config = getattr(transformers, f"{name}Model"), config_of(name, **NOT_DISPATCHED[name])
    with pytest.raises(ValueError, match=f'{name}Model cannot use attn_implementation="fastattn".*fastattn.patch'):
        kind._from_config(copy.deepcopy(config), attn_implementation="fastattn")
    if name == "BigBird":
        return  # Its own modules are swapped.
    model = kind(config).eval()
    inputs = (
        tokens() if config.is_encoder_decoder is False else tokens() | {"decoder_input_ids": tokens()["input_ids"]}
    )
    with torch.no_grad():
        expected = model(**inputs)[0]
        (row,) = fastattn.patch(model, mlp=False).rows
        assert row.now is None and name in row.why
        assert torch.equal(model(**inputs)[0], expected)


def test_a_sub_model_that_cannot_use_it_is_named_and_can_be_left_out() -> None:
    parts = [config_of("Bert", **SMALL), config_of("Bloom", **NOT_DISPATCHED["Bloom"])]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    with pytest.raises(ValueError, match="Bloom"):
        transformers.AutoModel.from_config(copy.deepcopy(config).decoder, attn_implementation="fastattn")
    model = transformers.BertModel._from_config(
        copy.deepcopy(config).encoder, attn_implementation={"": "fastattn"}
    )
    assert model.config._attn_implementation == "fastattn"


def test_a_model_loaded_from_disk_is_checked_too(tmp_path) -> None:
    transformers.BloomModel(config_of("Bloom", **NOT_DISPATCHED["Bloom"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not dispatch its attention"):
        transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="fastattn")


@pytest.mark.parametrize("name", ["DeepseekV32", "GlmMoeDsa"])
@pytest.mark.parametrize("entry", ["attn_implementation", "patch"])
def test_sparse_attention_keeps_the_keys_that_its_indexer_chose(name: str, entry: str) -> None:
    torch.manual_seed(0)
    config = config_of(name, **SMALL | {"hidden_size": 64}, **LATENT)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    inputs = tokens()
    seen = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[seen]
    if entry == "patch":
        assert fastattn.patch(model, mlp=False).rows[0].now == "fastattn"
    else:
        model.set_attn_implementation("fastattn")
    torch.testing.assert_close(model(**inputs).logits[seen], expected, rtol=1e-4, atol=1e-4)


def attended(**options) -> Tensor:
    q, k, v = (torch.randn(2, 4, n, 8, generator=torch.Generator().manual_seed(n)) for n in (7, 9, 9))
    module = nn.Module()
    module.indexer = nn.Module()
    module.indexer.block_size = 4
    out, _ = transformers.AttentionInterface()["fastattn"](module, q, k, v, options.pop("mask", None), **options)
    return out


def test_blocks_of_keys_that_are_kept_are_a_mask_for_each_group_of_heads() -> None:
    blocks = torch.tensor([[0, 2], [1, -1]]).view(1, 2, 1, 2).expand(2, 2, 7, 2)
    seen = torch.zeros(2, 4, 7, 9, dtype=torch.bool)
    seen[:, :2, :, :4] = seen[:, :2, :, 8:] = seen[:, 2:, :, 4:8] = True
    torch.testing.assert_close(attended(block_indices=blocks, is_causal=False), attended(mask=seen))
    added = torch.zeros(2, 1, 7, 9)
    torch.testing.assert_close(attended(block_indices=blocks, mask=added), attended(mask=seen))


def test_a_sink_of_each_query_takes_its_share_as_the_sinks_of_heads_do() -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    of_queries = sinks.view(1, 4, 1, 1).expand(2, 4, 7, 1).clone().requires_grad_()
    expected = attended(s_aux=sinks)
    torch.testing.assert_close(attended(sinks=of_queries), expected)
    torch.testing.assert_close(attended(sinks=sinks), expected)
    attended(sinks=of_queries).sum().backward()
    assert of_queries.grad is not None and of_queries.grad.isfinite().all() and of_queries.grad.any()


class ReadsItsMask(transformers.LlamaForCausalLM):
    """A model whose own code also computes with the mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs):
        out = super().forward(input_ids, attention_mask=attention_mask, **kwargs)
        mode = self.config._attn_implementation
        out.logits = out.logits * (1.0 if mode == "eager" else 1.5)
        return out


def small_llama(kind: type = transformers.LlamaForCausalLM):
    torch.manual_seed(0)
    return kind(config_of("Llama", **SMALL, num_key_value_heads=2))


def test_patch_tries_a_model_and_leaves_one_that_gives_other_results() -> None:
    model = small_llama(ReadsItsMask)
    (row,) = fastattn.patch(model, mlp=False).rows
    assert row.now is None and "other results than eager" in row.why
    assert model.config._attn_implementation == "sdpa"


def test_the_trial_changes_neither_model_nor_random_numbers_and_runs_no_hooks() -> None:
    model = small_llama().train()
    model.model.register_buffer("counter", torch.zeros(1))
    calls = []
    model.model.norm.register_forward_hook(lambda *_: calls.append("hook"))
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    assert difference_from_eager(model) is None
    assert not calls and model.training and model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(parameter.grad is None for parameter in model.parameters())
    model(**tokens())
    assert calls == ["hook"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_is_validated_in_inference_mode_and_then_trained(packed: bool) -> None:
    model = small_llama()
    model.set_attn_implementation("fastattn")
    inputs = {"input_ids": tokens()["input_ids"], "use_cache": False}
    if packed:
        starts = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    else:
        inputs["position_ids"] = torch.arange(12).remainder(5).expand(2, -1)
    with torch.inference_mode():
        validated = model(**inputs).logits.clone()
    trained = model(**inputs).logits
    trained.sum().backward()
    torch.testing.assert_close(trained.detach(), validated)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_results_under_autocast_have_the_dtype_of_torchs(implementation: str) -> None:
    model = small_llama()
    with torch.autocast("cpu", torch.bfloat16):
        model.set_attn_implementation(implementation)
        expected = model(**tokens())[0]
        model.set_attn_implementation("fastattn")
        actual = model(**tokens())[0]
    assert actual.dtype == expected.dtype
    seen = tokens()["attention_mask"].bool()
    assert (actual - expected)[seen].norm() < 0.05 * expected[seen].norm()
