"""Models that "fastattn" cannot serve say so when made, and `patch` leaves them; the others equal eager."""

from __future__ import annotations

import copy

import pytest
import torch
from needs_transformers import transformers
from torch import Tensor, nn

import fastattn
import fastattn.integrations.huggingface
from fastattn.integrations.huggingface_models import difference_from_eager, trial_tolerance

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


OF_IMAGES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
SAM = {"mlp_dim": 32, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1]}
LATE = {
    "a bias added to the mask": (
        "Beit", OF_IMAGES | {"use_relative_position_bias": True}, "use_relative_position_bias",
    ),
    "a shared one": (
        "Beit", OF_IMAGES | {"use_shared_relative_position_bias": True}, "use_shared_relative_position_bias",
    ),
    "convolutions that read the mask": (
        "LasrEncoder", {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}, "its convolutions",
    ),
    "a class for each implementation": ("SamVision", OF_IMAGES | SAM, "chooses a class of attention by that name"),
    "one inside": ("Sam", {"vision_config": OF_IMAGES | SAM}, "chooses a class of attention by that name"),
}  # fmt: skip


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    seen[1, :4] = 0
    return {"input_ids": ids, "attention_mask": seen}


def config_of(name: str, **options):
    return getattr(transformers, f"{name}Config")(**options)


@pytest.mark.parametrize("case", LATE)
def test_what_would_fail_in_the_first_call_is_said_when_the_model_is_made(case: str) -> None:
    name, options, why = LATE[case]
    config = config_of(name, **options)
    kind = getattr(transformers, f"{name}Model", None) or getattr(transformers, name)
    with pytest.raises(ValueError, match=f'cannot use attn_implementation="fastattn": .*{why}'):
        kind._from_config(copy.deepcopy(config), attn_implementation="fastattn")
    if not case.endswith(("implementation", "inside")):  # Those classes were chosen before `patch`.
        model = kind(config)
        assert all(row.now is None and why in row.why for row in fastattn.patch(model, mlp=False).rows)
        with pytest.raises(ValueError, match=why):
            model.set_attn_implementation("fastattn")


def test_beit_without_a_bias_equals_eager() -> None:
    model = transformers.BeitModel(config_of("Beit", **OF_IMAGES)).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)[0]
        model.set_attn_implementation("fastattn")
        torch.testing.assert_close(model(images)[0], expected)


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


ENTRIES = pytest.mark.parametrize("entry", ["attn_implementation", "patch"])
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
          "initializer_range": 0.2}  # fmt: skip
KEYS = {"num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = KEYS | {"head_dim": 8, "sliding_window": 4}
WITH_WEIGHTS = {
    "LlamaForCausalLM": SMALL | KEYS,
    "MistralForCausalLM": SMALL | WINDOW,
    "Gemma2ForCausalLM": SMALL | WINDOW | {"attn_logit_softcapping": 3.0},
    "GptOssForCausalLM": SMALL | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GPT2LMHeadModel": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "OPTForCausalLM": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "ffn_dim": 32, "word_embed_proj_dim": 32, "init_std": 0.2},
    "BertForMaskedLM": SMALL,
    "T5ForConditionalGeneration": {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2,
                                   "num_heads": 4, "decoder_start_token_id": 0},
    "BartForConditionalGeneration": SEQ2SEQ,
}  # fmt: skip


def eager_and_ours(name: str, options: dict, entry: str):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    eager = kind._from_config(kind.config_class(**options | SPECIAL), attn_implementation="eager").eval()
    ours = copy.deepcopy(eager)
    if entry == "patch":
        assert fastattn.patch(ours, mlp=False).rows[0].now == "fastattn"
    else:
        ours.set_attn_implementation("fastattn")
    return eager, ours


@pytest.mark.parametrize("name", WITH_WEIGHTS)
@ENTRIES
def test_attention_weights_that_are_asked_for_are_eagers(name: str, entry: str) -> None:
    models = eager_and_ours(name, WITH_WEIGHTS[name], entry)
    inputs = tokens()
    if models[0].config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    expected, actual = (model(**inputs, output_attentions=True) for model in models)
    kinds = [kind for kind in expected if kind.endswith("attentions")]
    assert any(expected[kind] for kind in kinds)
    for kind in kinds:
        for weights, eagers in zip(actual[kind], expected[kind], strict=True):
            torch.testing.assert_close(weights, eagers, rtol=1e-4, atol=1e-5)


def test_weights_of_packed_sequences_stay_inside_them_and_generation_gives_weights() -> None:
    _, model = eager_and_ours("LlamaForCausalLM", WITH_WEIGHTS["LlamaForCausalLM"], "patch")
    starts = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "use_cache": False, "output_attentions": True}
    weights = model(tokens()["input_ids"], **packed).attentions[0]
    assert not weights[0, :, 5:, :5].any() and not weights[1, :, 8:, :8].any()
    options = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True}
    out = model.generate(**tokens(), output_attentions=True, **options)
    assert [step[0].shape[2:] for step in out.attentions] == [(12, 12), (1, 13), (1, 14)]
    assert torch.equal(out.sequences, model.generate(**tokens(), **options).sequences)


def test_weights_of_a_model_without_eager_attention_beside_it_are_an_error_in_words() -> None:
    with pytest.raises(ValueError, match="Module has no eager_attention_forward"):
        attended(output_attentions=True)


@ENTRIES
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_more_keys_than_a_cache_with_a_window_holds_is_refused(entry: str, dtype: torch.dtype) -> None:
    _, model = eager_and_ours("MistralForCausalLM", WITH_WEIGHTS["MistralForCausalLM"], entry)
    ids = tokens()["input_ids"]
    cache = model(ids[:, :7], use_cache=True).past_key_values
    seen = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)
    with pytest.raises(ValueError, match="attention_mask must be for this layer's 8 keys, got one for 12"):
        model(ids[:, 7:], attention_mask=mask[:, :, 7:], past_key_values=cache)


def test_a_mask_of_one_key_holds_for_all() -> None:
    for mask in (torch.zeros(2, 1, 7, 1), torch.ones(2, 1, 7, 1, dtype=torch.bool)):
        torch.testing.assert_close(attended(mask=mask), attended(is_causal=False))


def clip(**options):
    part = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text, vision = part | {"vocab_size": 99}, part | {"image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


def implementations(model) -> dict[str, str]:
    parts = {name: getattr(model.config, name)._attn_implementation for name in model.config.sub_configs}
    return {"": model.config._attn_implementation} | parts


@pytest.mark.parametrize("wanted", ["fastattn", {"": "fastattn"}])
@pytest.mark.parametrize("name", ["Bloom", "Falcon", "MPNet", "NllbMoe"])
def test_setting_it_on_a_model_that_cannot_use_it_raises_and_changes_nothing(name: str, wanted) -> None:
    model = getattr(transformers, f"{name}Model")(config_of(name, **NOT_DISPATCHED[name]))
    before = implementations(model)
    with pytest.raises(ValueError, match=rf"{name}\w* cannot use .*fastattn\.patch"):
        model.set_attn_implementation(wanted)
    assert implementations(model) == before
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("wanted", [
    "fastattn", {"": "fastattn", "encoder": "fastattn"}, {"encoder": "fastattn"}, {"encoder": {"": "fastattn"}},
    {"": "eager", "decoder": "fastattn", "encoder": {"": "fastattn"}},
])  # fmt: skip
def test_setting_it_on_a_part_that_cannot_use_it_raises_and_changes_nothing(wanted) -> None:
    encoder = transformers.MPNetModel(config_of("MPNet", **SMALL))
    decoder = config_of("Bert", **SMALL, is_decoder=True, add_cross_attention=True)
    decoder = transformers.BertLMHeadModel(decoder)
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    before = implementations(model)
    with pytest.raises(ValueError, match=r"MPNet\w* cannot use .*fastattn\.patch"):
        model.set_attn_implementation(wanted)
    assert implementations(model) == before
    model.set_attn_implementation({"decoder": "fastattn"})
    assert implementations(model) == before | {"decoder": "fastattn"}


def test_a_nested_dict_sets_parts_and_a_name_that_is_no_part_is_an_error() -> None:
    model = clip()
    model.set_attn_implementation({"": "eager", "text_config": {"": "fastattn"}, "vision_config": "sdpa"})
    assert implementations(model) == {"": "eager", "text_config": "fastattn", "vision_config": "sdpa"}
    with pytest.raises(ValueError, match="names 'vision', but CLIPConfig has no such part"):
        model.set_attn_implementation({"vision": "fastattn"})


class IsOff(transformers.LlamaForCausalLM):
    """A model whose results are off by so much, but under eager."""

    off = 0.0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * (1 if self.config._attn_implementation == "eager" else 1 + self.off)
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_trial_tells_rounding_from_an_error_in_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = IsOff(config_of("Llama", **SMALL | {"num_hidden_layers": 6}, num_key_value_heads=2)).to(dtype)
    assert difference_from_eager(model) is None
    assert trial_tolerance(model) < 0.1
    model.off = 2 * trial_tolerance(model)
    assert "other results than eager" in (difference_from_eager(model) or "")


def test_what_could_not_be_compared_with_eager_is_said_in_the_report() -> None:
    audio = transformers.ASTModel(transformers.ASTConfig(**VISION, num_mel_bins=16, max_length=24))
    (row,) = fastattn.patch(audio, mlp=False).rows
    assert row.now == "fastattn" and "not compared with eager: it reads input_values" in row.why

    class NeedsMore(transformers.LlamaForCausalLM):
        def forward(self, input_ids, more, **kwargs):
            return super().forward(input_ids, **kwargs)

    (row,) = fastattn.patch(small_llama(NeedsMore), mlp=False).rows
    assert row.now == "fastattn" and "not compared with eager: eager attention raised TypeError" in row.why
    (row,) = fastattn.patch(small_llama(), mlp=False).rows
    assert row.now == "fastattn" and not row.why
    with torch.device("meta"):
        model = small_llama()
    assert all(row.now is None and "meta device" in row.why for row in fastattn.patch(model, mlp=False).rows)


@pytest.mark.parametrize("relative", [False, True])
def test_the_trial_compares_models_of_images_and_leaves_one_that_adds_to_its_mask(relative: bool) -> None:
    config = transformers.BeitConfig(**VISION, image_size=16, patch_size=4, use_relative_position_bias=relative)
    model = transformers.BeitModel._from_config(config, attn_implementation="eager").eval()
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)[0]
    (row,) = fastattn.patch(model, mlp=False).rows
    assert (row.now is None and "adds the bias to the mask" in row.why) if relative else (row.now and not row.why)
    torch.testing.assert_close(model(images)[0], expected, rtol=1e-4, atol=1e-4)


def test_the_trial_lets_a_model_draw_the_same_random_numbers_twice() -> None:
    config = transformers.ViTMAEConfig(**VISION, image_size=16, patch_size=4)
    (row,) = fastattn.patch(transformers.ViTMAEModel(config), mlp=False).rows
    assert row.now == "fastattn" and not row.why


EXPERTS = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8,
           "num_key_value_heads": 2, "initializer_range": 0.3, "num_experts_per_tok": 2}  # fmt: skip
# One passes sinks of each query beside a relative bias, the other blocks of keys for each group of heads.
NAMED = {
    "Inkling2": EXPERTS | {
        "unpadded_vocab_size": 90, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
        "sliding_window_size": 4, "d_rel": 4, "rel_extent": 6, "moe_intermediate_size": 16, "n_routed_experts": 4,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"], "n_layers_per_attn_res_block": 2,
        "log_scaling_n_floor": 4,
    },
    "MiniMaxM3VL": EXPERTS | {
        "intermediate_size": 16, "dense_intermediate_size": 32, "shared_intermediate_size": 16,
        "num_local_experts": 4, "rotary_dim": 4, "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4,
        "index_topk_blocks": 2, "index_local_blocks": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
@ENTRIES
def test_models_that_restrict_or_sink_by_query_equal_eager(name: str, entry: str) -> None:
    models = eager_and_ours(f"{name}ForCausalLM", NAMED[name], entry)
    inputs = tokens()
    (logits, gradients), (expected, expected_gradients) = (
        logits_and_gradients(model, inputs) for model in reversed(models)
    )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for gradient, eagers in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (eagers is None)
        if gradient is not None:
            assert (gradient - eagers).norm() <= 1e-4 * eagers.norm() + 1e-7
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    first, second = (model.generate(**inputs, **options) for model in models)
    assert torch.equal(first, second)


def logits_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()), allow_unused=True)
    return logits.detach(), gradients
