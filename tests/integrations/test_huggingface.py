"""Hugging Face models with attn_implementation="fastattn" give the logits, gradients and tokens of "eager"."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs_transformers import transformers
from torch import Tensor, nn
from transformers import masking_utils

import fastattn
from fastattn import integrations, masks
from fastattn.integrations import huggingface
from fastattn.integrations.huggingface import Mask, fastattn_mask
from fastattn.masks import Lowered

VOCABULARY, LENGTH, WINDOW = 64, 14, 5
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0, "eos_token_id": None}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
SEQ2SEQ = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": None}

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] who where built the old stone bridge in a small town of north was it by two "
    "masons and farmer after long war river . ? , near market"
)


def tiny(model: str, config: str, **options) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


MODELS = {
    "gpt2": tiny("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2,
                 n_head=4, eos_token_id=None),
    "llama": tiny("LlamaForCausalLM", "LlamaConfig", **DECODER),
    "mistral": tiny("MistralForCausalLM", "MistralConfig", **DECODER, sliding_window=WINDOW),
    "gemma2": tiny("Gemma2ForCausalLM", "Gemma2Config", **DECODER, **ALTERNATING, attn_logit_softcapping=1.5,
                   query_pre_attn_scalar=4),
    "gemma3": tiny("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER, **ALTERNATING, query_pre_attn_scalar=4),
    "gpt_oss": tiny("GptOssForCausalLM", "GptOssConfig", **DECODER, **ALTERNATING, num_local_experts=4,
                    num_experts_per_tok=2),
    "qwen3": tiny("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=8),
    "phi3": tiny("Phi3ForCausalLM", "Phi3Config", **DECODER, sliding_window=WINDOW),
    "olmo2": tiny("Olmo2ForCausalLM", "Olmo2Config", **DECODER),
    "olmo3": tiny("Olmo3ForCausalLM", "Olmo3Config", **DECODER, sliding_window=WINDOW,
                  layer_types=ALTERNATING["layer_types"]),
    "cohere2": tiny("Cohere2ForCausalLM", "Cohere2Config", **DECODER, **ALTERNATING),
    "gpt_neox": tiny("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES, intermediate_size=48, eos_token_id=None),
    "opt": tiny("OPTForCausalLM", "OPTConfig", **SIZES, ffn_dim=48, word_embed_proj_dim=32, eos_token_id=None,
                max_position_embeddings=32),
    "mixtral": tiny("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=4, sliding_window=WINDOW),
    "llama4": tiny("Llama4ForCausalLM", "Llama4TextConfig", **DECODER, head_dim=8, num_local_experts=2,
                   intermediate_size_mlp=48, attention_chunk_size=WINDOW, no_rope_layers=[1, 0]),
    "bert": tiny("BertForMaskedLM", "BertConfig", **SIZES, intermediate_size=48, max_position_embeddings=32),
    "reader": tiny("BertForQuestionAnswering", "BertConfig", **{**SIZES, "vocab_size": len(WORDS.split())},
                   intermediate_size=48, max_position_embeddings=32),
    "modernbert": tiny("ModernBertForMaskedLM", "ModernBertConfig", **SIZES, intermediate_size=48, pad_token_id=0,
                       local_attention=6, layer_types=["sliding_attention", "full_attention"]),
    "vit": tiny("ViTForImageClassification", "ViTConfig", hidden_size=32, num_hidden_layers=2,
                num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=2),
    "bart": tiny("BartForConditionalGeneration", "BartConfig", vocab_size=VOCABULARY, d_model=32, encoder_layers=2,
                 decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                 decoder_ffn_dim=48, max_position_embeddings=32, bos_token_id=1, forced_eos_token_id=None,
                 **SEQ2SEQ),
    "t5": tiny("T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48,
               num_layers=2, num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=12,
               **SEQ2SEQ),
    "whisper": tiny("WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCABULARY, num_mel_bins=8,
                    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=16,
                    max_target_positions=32, bos_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
                    **SEQ2SEQ),
    # Wide heads, of one layer (Gemma 4), or with values of another width (DeepSeek).
    "gpt2, one head of 512": tiny("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_positions=32,
                                  n_embd=512, n_layer=1, n_head=1, eos_token_id=None),
    "gemma4": tiny("Gemma4ForCausalLM", "Gemma4TextConfig", **DECODER | ALTERNATING | {"head_dim": 16},
                   global_head_dim=512, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8,
                   num_kv_shared_layers=0),
    "deepseek": tiny("DeepseekV3ForCausalLM", "DeepseekV3Config", **DECODER | {"num_key_value_heads": 4},
                     qk_nope_head_dim=256, qk_rope_head_dim=64, v_head_dim=40, q_lora_rank=16, kv_lora_rank=16,
                     first_k_dense_replace=2),
}  # fmt: skip
GENERATING = [
    "gpt2",
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "qwen3",
    "llama4",
    "bart",
    "t5",
    "whisper",
]
PADDED = [name for name in MODELS if name != "vit"]


def build(name: str, implementation: str = "eager") -> nn.Module:
    """The model with weights large enough that masks, caps, sinks and biases show."""
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    model.set_attn_implementation(implementation)
    return model


def inputs_of(name: str, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of three, and which positions of the result count."""
    seen = torch.ones(3, LENGTH, dtype=torch.long)
    if padding == "right":
        seen[0, LENGTH - 3 :] = 0
        seen[1, LENGTH - 8 :] = 0
    elif padding == "left":
        seen[0, :3] = 0
        seen[1, :8] = 0
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, VOCABULARY, (3, LENGTH), generator=generator)
    mask = {} if padding == "none" else {"attention_mask": seen}
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}, torch.ones(3, dtype=torch.bool)
    if name in ("t5", "bart"):
        decoder = {f"decoder_{key}": value for key, value in {"input_ids": ids.flip(1), **mask}.items()}
        return {"input_ids": ids, **mask, **decoder}, seen.bool()
    if name == "whisper":
        features = torch.randn(3, 8, 32, generator=generator)
        decoder = {f"decoder_{key}": value for key, value in {"input_ids": ids, **mask}.items()}
        return {"input_features": features, **decoder}, seen.bool()
    return {"input_ids": ids, **mask}, seen.bool()


def result(model: nn.Module, inputs: dict[str, Tensor], counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits where they count, and the gradients of a loss on them with respect to every parameter."""
    dtype = next(model.parameters()).dtype
    cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    model.zero_grad()
    logits = model(**cast).logits[counts]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * weights.to(dtype)).sum().div(counts.sum()).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def cases() -> list:
    return [(name, padding) for name in MODELS if name != "reader" for padding in ("none", "left", "right")
            if padding == "none" or name in PADDED]  # fmt: skip


def assert_same_but_for_rounding(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """In float32, after two layers and back; eager itself is no oracle in float64 (its softmax is in float32)."""
    error, size = (actual - expected).abs().max(), expected.abs().max()
    assert error <= 3e-5 * size + 1e-6, f"{what}: error {error:.1e} at size {size:.1e}"


def assert_same_results(ours: tuple[Tensor, dict], expected: tuple[Tensor, dict]) -> None:
    assert_same_but_for_rounding(ours[0], expected[0], "logits")
    assert ours[1].keys() == expected[1].keys()
    for parameter, gradient in ours[1].items():
        assert_same_but_for_rounding(gradient, expected[1][parameter], parameter)


@pytest.mark.parametrize(("name", "padding"), cases())
def test_logits_and_every_gradient_are_eagers(name: str, padding: str) -> None:
    inputs, counts = inputs_of(name, padding)
    model = build(name)
    eager = result(model, inputs, counts)
    model.set_attn_implementation("fastattn")
    ours = result(model, inputs, counts)
    if name == "t5":
        # Its scores are not scaled down, so that both results round more: each is compared with float64.
        exact = result(model.double(), inputs, counts)
        assert_same_results(eager, exact)
        assert_same_results(ours, exact)
    else:
        assert_same_results(ours, eager)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_wide_heads_run_on_the_kernels_where_these_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = inputs_of("gemma4", "none")[0]["input_ids"][:1]
    model = build("gemma4")
    with torch.no_grad():
        eager = model(ids).logits
        model.set_attn_implementation("fastattn")
        monkeypatch.setenv("FASTATTN_BACKEND", "triton")  # an error if the kernels could not compute a layer
        assert_same_but_for_rounding(model(ids).logits, eager)


LENGTHS = (6, 1, 7)
PACKED = ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "phi3", "cohere2"]


def packed_inputs(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """Two rows of three sequences each, one after another, of other lengths in each row."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(1, VOCABULARY, (2, LENGTH), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in (LENGTHS, LENGTHS[::-1])])
    # With a cache, transformers does not look for packed sequences.
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if model.config.model_type == "gpt_oss":
        # Its code does not look for them either, but takes masks.
        arguments = {"config": model.config, "inputs_embeds": torch.zeros(2, LENGTH, 32), "attention_mask": None,
                     "past_key_values": None, "position_ids": positions}  # fmt: skip
        inputs["attention_mask"] = {
            "full_attention": masking_utils.create_causal_mask(**arguments),
            "sliding_attention": masking_utils.create_sliding_window_causal_mask(**arguments),
        }
    return inputs, torch.ones(2, LENGTH).bool()


@pytest.fixture
def no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> list[Lowered]:
    """During the test a mask of queries x keys is an error; the list holds what each layer's attention gets."""
    seen, attend = [], huggingface.attention

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dense mask was made")

    def watch(*tensors: Tensor, mask: Lowered | None = None, bias: Tensor | None = None, **options) -> Tensor:
        assert bias is None or bias.shape[-2] == 1
        seen.append(mask)
        return attend(*tensors, mask=mask, bias=bias, **options)

    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)
    monkeypatch.setattr(Mask, "dense", refuse)
    monkeypatch.setattr(huggingface, "attention", watch)
    return seen


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_give_eagers_results_without_a_dense_mask(
    name: str, request: pytest.FixtureRequest
) -> None:
    model = build(name)
    inputs, counts = packed_inputs(model)
    eager = result(model, inputs, counts)
    alone = torch.cat([model(part).logits[0] for part in inputs["input_ids"][:1].split(LENGTHS, 1)])
    model.set_attn_implementation("fastattn")
    given_to_layers = request.getfixturevalue("no_dense_mask")
    ours = result(model, *packed_inputs(model))
    assert_same_results(ours, eager)
    assert_same_but_for_rounding(ours[0][:LENGTH], alone)
    # Lowered once for all layers of a kind.
    kinds = len(set(getattr(model.config, "layer_types", ["full_attention"])))
    assert len(given_to_layers) == 2 and len({id(mask) for mask in given_to_layers}) == kinds
    assert all(isinstance(mask, Lowered) for mask in given_to_layers)


def test_packed_chunks_become_a_tensor_and_give_eagers_results() -> None:
    model = build("llama4")
    eager = result(model, *packed_inputs(model))
    model.set_attn_implementation("fastattn")
    assert_same_results(result(model, *packed_inputs(model)), eager)


def test_the_mask_of_packed_sequences_grows_with_the_tokens_not_with_their_square() -> None:
    sizes = []
    for length in (2048, 4096):
        positions = torch.arange(length)[None] % 100
        config = transformers.MistralConfig(num_attention_heads=4, sliding_window=64)
        config._attn_implementation_internal = "fastattn"
        mask = masking_utils.create_sliding_window_causal_mask(
            config=config, inputs_embeds=torch.empty(1, length, 8), attention_mask=None, past_key_values=None,
            position_ids=positions,
        )  # fmt: skip
        assert isinstance(mask, Mask) and mask.lowered.shape[:4] == (1, 4, length, length)
        held = torch.utils._pytree.tree_leaves([mask.documents, *vars(mask.lowered).values()])
        sizes.append(sum(t.nbytes for t in held if isinstance(t, Tensor)))
    assert sizes[1] < 2.2 * sizes[0] and sizes[1] < 4096**2 / 8


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "modernbert"])
def test_the_boundaries_that_flash_attn_is_given_are_kept(name: str, request: pytest.FixtureRequest) -> None:
    features = [{"input_ids": list(range(n, 2 * n))} for n in LENGTHS]
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(features)
    del batch["labels"]
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} < batch.keys()
    model = build(name)
    weights = torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(3)).split(LENGTHS)
    parts = [model(torch.tensor([f["input_ids"]])).logits[0] for f in features]
    (sum((part * w).sum() for part, w in zip(parts, weights, strict=True)) / LENGTH).backward()
    alone = torch.cat(parts).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.set_attn_implementation("fastattn")
    request.getfixturevalue("no_dense_mask")
    # With a cache transformers looks for no packed sequences, and it never does so for encoders.
    assert_same_results(result(model, dict(batch), torch.ones(1, LENGTH).bool()), alone)


def test_boundaries_may_run_through_a_batch_and_hold_beside_every_mask() -> None:
    q, k, v = (torch.randn(2, 2, 7, 8) for _ in range(3))
    starts = torch.tensor([0, 3, 7, 12, 14], dtype=torch.int32)
    boundaries = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    attend, module = transformers.AttentionInterface()["fastattn"], nn.Module()
    out, _ = attend(module, q, k, v, None, **boundaries)
    alone = [attend(module, q[i : i + 1, :, a:b], k[i : i + 1, :, a:b], v[i : i + 1, :, a:b], None)[0]
             for i, a, b in ((0, 0, 3), (0, 3, 7), (1, 0, 5), (1, 5, 7))]  # fmt: skip
    torch.testing.assert_close(out.flatten(0, 1), torch.cat([part[0] for part in alone]))
    same = (
        torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)),
        torch.block_diag(torch.ones(5, 5), torch.ones(2, 2)),
    )
    for padding in ([0] + 6 * [1], 6 * [1] + [0]):
        padded = fastattn_mask(2, 7, 7, attention_mask=torch.tensor([padding, 7 * [1]]))
        both = padded.dense() & torch.stack(same)[:, None].bool()
        added = torch.zeros(2, 1, 7, 7).masked_fill(~padded.dense(), -torch.inf)
        for mask in (padded, padded.dense(), added):
            torch.testing.assert_close(
                attend(module, q, k, v, mask, **boundaries)[0], attend(module, q, k, v, both)[0]
            )
    # Boundaries between the rows' own tokens say what the padding says.
    tokens = dict.fromkeys(boundaries, torch.tensor([0, 6, 13]))
    torch.testing.assert_close(*(attend(module, q, k, v, padded, **more)[0] for more in ({}, tokens)))
    with pytest.raises(ValueError, match="cu_seq_lens_q must end at the 2 x 7 tokens"):
        attend(module, q, k, v, padded, **dict.fromkeys(boundaries, torch.tensor([0, 5, 13])))
    with pytest.raises(ValueError, match="cu_seqlens_q ends with 14, expected 7"):
        attend(module, q[:1], k[:1], v[:1], None, **boundaries)


def prompt(name: str) -> dict[str, Tensor]:
    inputs, _ = inputs_of(name, "left")
    return {k: v for k, v in inputs.items() if not k.startswith("decoder_")}


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_cache_gives_the_same_tokens(name: str) -> None:
    model = build(name)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(**prompt(name), **options)
    model.set_attn_implementation("fastattn")
    assert torch.equal(model.generate(**prompt(name), **options), eager)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss", "whisper"])
def test_generation_with_a_static_cache_gives_the_same_tokens(name: str) -> None:
    model = build(name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(**prompt(name), **options)
    model.set_attn_implementation("fastattn")
    assert torch.equal(model.generate(**prompt(name), **options, cache_implementation="static"), eager)


def test_beams_and_prompts_in_pieces_give_the_same_tokens() -> None:
    model = build("mistral")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    eager = model.generate(**prompt("mistral"), **options)
    model.set_attn_implementation("fastattn")
    assert torch.equal(model.generate(**prompt("mistral"), **options), eager)
    whole = model(prompt("mistral")["input_ids"]).logits
    cache, pieces = None, []
    for piece in prompt("mistral")["input_ids"].split((4, 7, 3), 1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache, _ = out.past_key_values, pieces.append(out.logits)
    assert_same_but_for_rounding(torch.cat(pieces, 1), whole)


PATTERNS = {
    "causal": lambda window: masking_utils.causal_mask_function,
    "all": lambda window: masking_utils.bidirectional_mask_function,
    "causal window": masking_utils.sliding_window_causal_mask_function,
    "window": masking_utils.sliding_window_bidirectional_mask_function,
    "left window": masking_utils.sliding_window_overlay,
    "window in a window": lambda window: masking_utils.and_masks(
        masking_utils.sliding_window_causal_mask_function(window), masking_utils.sliding_window_overlay(3)
    ),
    "chunks": lambda window: masking_utils.chunked_causal_mask_function(window, torch.zeros(2, dtype=torch.long)),
}


@given(
    st.sampled_from(sorted(PATTERNS)), st.integers(1, 9), st.integers(0, 9), st.integers(0, 4), st.integers(1, 12),
    st.sampled_from(["none", "left", "right", "both", "short"]), st.booleans(),
)  # fmt: skip
def test_a_mask_shows_what_transformers_own_mask_shows_and_attends_so(
    pattern: str, queries: int, before: int, beyond: int, window: int, padding: str, offset_as_tensor: bool
) -> None:
    first = before // 2
    keys = queries + before - first + beyond
    seen = None
    if padding != "none":
        seen = torch.ones(2, first + keys - (beyond if padding == "short" else 0), dtype=torch.bool)
        seen[0, : 2 if padding in ("left", "both") else 0] = False
        seen[1, 2 if padding in ("right", "both") else keys + first :] = False
    arguments = {
        "batch_size": 2, "q_length": queries, "kv_length": keys, "kv_offset": first, "attention_mask": seen,
        "q_offset": torch.tensor(before) if offset_as_tensor else before,
        "mask_function": PATTERNS[pattern](window),
    }  # fmt: skip
    expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    mask = fastattn_mask(**arguments)
    dense = mask.dense() if isinstance(mask, Mask) else mask
    assert torch.equal(dense, expected)
    aligned = beyond == 0 or pattern in ("causal", "causal window", "window in a window", "all")
    compact = pattern != "chunks" and aligned
    assert isinstance(mask, Mask) == compact
    q, k, v = (torch.randn(2, heads, n, 8) for heads, n in ((6, queries), (2, keys), (2, keys)))
    out, _ = transformers.AttentionInterface()["fastattn"](nn.Module(), q, k, v, mask)
    k, v = (t.repeat_interleave(3, 1) for t in (k, v))
    scores = (q @ k.mT * 8**-0.5).masked_fill(~expected, float("-inf"))
    torch.testing.assert_close(out.transpose(1, 2), scores.softmax(-1).nan_to_num(0.0) @ v, rtol=0, atol=1e-5)


@settings(max_examples=60)
@given(
    st.integers(1, 9), st.sampled_from([None, 3]),
    st.sampled_from(["none", "left", "alike", "both", "float", "by head"]), st.booleans(),
    st.sampled_from([None, 1, 6]), st.sampled_from([None, 0.7]), st.sampled_from([1, 2, 6]),
)  # fmt: skip
def test_one_query_in_each_row_attends_with_everything_that_a_model_may_ask_for(
    keys: int,
    window: int | None,
    padding: str,
    sinks: bool,
    biases: int | None,
    softcap: float | None,
    groups: int,
) -> None:
    q, k, v = (torch.randn(2, heads, n, 8) for heads, n in ((6, 1), (groups, keys), (groups, keys)))
    function = PATTERNS["causal window" if window else "causal"](window)
    seen = torch.ones(2, keys, dtype=torch.bool)
    seen[0, : {"none": 0}.get(padding, keys // 2)] = False
    seen[1, : keys // 2 if padding == "alike" else 0] = False
    seen[1, keys - 1 :] = padding != "both"
    arguments = {
        "batch_size": 2,
        "q_length": 1,
        "kv_length": keys,
        "q_offset": keys - 1,
        "mask_function": function,
    }
    shown = masking_utils.sdpa_mask(**arguments, attention_mask=seen, allow_is_causal_skip=False)
    mask = fastattn_mask(**arguments, attention_mask=seen)
    if padding == "by head":
        mask = shown = shown & (torch.rand(1, 6, 1, keys) < 0.7)
    elif padding == "float":
        mask = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    bias = None if biases is None else torch.randn(1, biases, 1, keys)
    sink = torch.randn(6) if sinks else None
    beside = {"position_bias": bias, "sinks": sink, "softcap": softcap, "scaling": 0.6}
    out, _ = transformers.AttentionInterface()["fastattn"](nn.Module(), q, k, v, mask, **beside)
    k, v = (t.repeat_interleave(6 // groups, 1) for t in (k, v))
    scores = 0.6 * q @ k.mT
    scores = (softcap * (scores / softcap).tanh() if softcap else scores) + (0 if bias is None else bias)
    scores = scores.masked_fill(~shown, float("-inf"))
    sink = torch.full((6,), float("-inf")) if sink is None else sink
    weights = torch.cat([scores, sink.view(1, 6, 1, 1).expand(2, -1, -1, -1)], -1).softmax(-1)[..., :-1]
    some = (weights.nan_to_num(0.0) @ v).transpose(1, 2)
    # Rows that see nothing have no meaning where a mask is added.
    meant = shown.any(-1).expand(2, 6, 1).transpose(1, 2) | torch.tensor(padding != "float")
    torch.testing.assert_close(out[meant], some[meant], rtol=0, atol=1e-5)


def packed(ids: Tensor, positions: Tensor, pattern: Callable) -> dict[str, tuple[Callable, bool]]:
    """Mask functions of packed rows, and whether they become a `Mask`."""
    sequences = masking_utils.packed_sequence_mask_function(ids)
    by_position = masking_utils.remap_positions_for_packed_sequence(pattern, positions)
    as_transformers, both = masking_utils.packed_sequence_compatibility_function, masking_utils.and_masks
    return {
        "transformers": (as_transformers(pattern, positions, ids), True),
        "by place": (both(pattern, sequences), True),
        "more than once": (both(both(sequences, by_position), sequences, PATTERNS["left window"](2)), True),
        "sequences in any order": (both(pattern, masking_utils.packed_sequence_mask_function(ids % 2)), True),
        "not in its place": (as_transformers(pattern, positions, ids % 2), False),
        "positions alone": (by_position, False),
        "other sequences": (both(masking_utils.packed_sequence_mask_function(ids // 2), sequences), False),
        "either": (masking_utils.or_masks(sequences, by_position), False),
    }  # fmt: skip


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", sorted(packed(torch.zeros(1, 1), torch.zeros(1, 1), PATTERNS["all"](1))))
@settings(max_examples=6)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=3, max_size=4), min_size=2, max_size=2),
    st.sampled_from(["causal", "all", "causal window", "window", "left window"]), st.integers(1, 8),
)  # fmt: skip
def test_a_mask_of_packed_rows_shows_what_transformers_own_mask_shows_and_attends_so(
    kind: str, padding: str, rows: list[list[int]], pattern: str, window: int
) -> None:
    keys = min(map(sum, rows))
    ids = torch.stack([torch.repeat_interleave(torch.tensor(row))[:keys] for row in rows])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row])[:keys] for row in rows])
    function, compact = packed(ids, positions, PATTERNS[pattern](window))[kind]
    seen = None if padding == "none" else torch.ones(2, keys, dtype=torch.bool)
    if seen is not None:
        seen[1, slice(2) if padding == "left" else slice(-2, None)] = False
    arguments = {"batch_size": 2, "q_length": keys, "kv_length": keys, "mask_function": function,
                 "attention_mask": seen}  # fmt: skip
    expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    mask = fastattn_mask(**arguments, config=transformers.LlamaConfig(num_attention_heads=2))
    assert isinstance(mask, Mask) or not compact
    assert torch.equal(mask.dense() if isinstance(mask, Mask) else mask, expected)
    for heads in (2, 4):
        q, k, v = (torch.randn(2, n, keys, 8) for n in (heads, 2, 2))
        out, _ = transformers.AttentionInterface()["fastattn"](nn.Module(), q, k, v, mask)
        exact = masks.from_dense(expected.expand(2, heads, -1, -1))
        torch.testing.assert_close(out.transpose(1, 2), fastattn.attention(q, k, v, mask=exact), rtol=0, atol=1e-5)


WRONG_FOR_THIS_MASK = {
    "added to scores": lambda mask: torch.zeros(1, 1, 6, 6) + mask,
    "added in place": lambda mask: torch.zeros(1, 1, 6, 6).add_(mask),
    "subtracted": lambda mask: 1.0 - mask,
    "multiplied": lambda mask: mask * -1e9,
    "compared": lambda mask: mask == 0,
    "ordered": lambda mask: mask < 0,
    "inverted": lambda mask: ~mask,
    "and": lambda mask: mask & torch.ones(6, 6, dtype=torch.bool),
    "negated": lambda mask: mask.logical_not(),
    "filled": lambda mask: mask.masked_fill(mask, 0.0),
    "filled by it": lambda mask: torch.zeros(1, 1, 6, 6).masked_fill(mask, 0.0),
    "floats": lambda mask: mask.to(torch.float32),
    "float": lambda mask: mask.float(),
    "bool": lambda mask: bool(mask),
    "indexing by it": lambda mask: torch.zeros(1, 1, 6, 6)[mask],
    "joined to floats": lambda mask: torch.cat([mask, torch.zeros(1, 1, 6, 6)], -1),
    "written": lambda mask: mask.__setitem__(0, True),
}


@pytest.mark.parametrize("use", WRONG_FOR_THIS_MASK)
def test_a_mask_refuses_to_be_computed_with(use: str) -> None:
    mask = fastattn_mask(1, 6, 6)
    with pytest.raises((TypeError, AttributeError), match="no tensor to compute with"):
        WRONG_FOR_THIS_MASK[use](mask)


def test_a_mask_is_small_and_whoever_needs_a_tensor_gets_one() -> None:
    seen = torch.ones(2, 4096, dtype=torch.bool)
    seen[0, :7] = False
    mask = fastattn_mask(2, 4096, 4096, attention_mask=seen)
    assert sum(t.numel() for t in vars(mask).values() if isinstance(t, Tensor)) <= seen.numel()
    assert mask.shape == (2, 1, 4096, 4096)
    assert mask.dim() == mask.ndim == 4 and mask.dtype == torch.bool and mask.size(-1) == 4096

    mask = fastattn_mask(2, 6, 6, attention_mask=seen[:, :6], mask_function=PATTERNS["causal window"](3))
    dense = mask.dense()
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu"), mask.to(torch.bool)):
        assert isinstance(other, Mask) and torch.equal(other.dense(), dense)
    assert torch.equal(mask[:, :, :, :3], dense[..., :3])
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(dense, 0.0, -1.0))
    assert torch.equal(torch.cat([mask, dense, mask], dim=-1), torch.cat([dense] * 3, -1))
    assert torch.equal(mask.repeat(1, 2, 1, 1), dense.repeat(1, 2, 1, 1))
    assert fastattn_mask(2, 6, 6, attention_mask=mask) is mask

    mask = fastattn_mask(
        1, 6, 6, mask_function=packed(torch.arange(6)[None] // 4, seen, PATTERNS["all"](1))["by place"][0]
    )
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert torch.equal(other.dense(), mask.dense()) and other.lowered.shape == mask.lowered.shape


def test_a_mask_function_of_the_users_own_becomes_a_tensor() -> None:
    model = build("llama")
    arguments = {"config": model.config, "inputs_embeds": torch.zeros(2, 9, 32), "attention_mask": None,
                 "past_key_values": None, "or_mask_function": lambda b, h, q, k: (q < 4) & (k < 4)}  # fmt: skip
    model.set_attn_implementation("sdpa")
    expected = masking_utils.create_causal_mask(**arguments)
    model.set_attn_implementation("fastattn")
    mask = masking_utils.create_causal_mask(**arguments)
    assert torch.equal(mask, expected)
    ids = torch.randint(1, VOCABULARY, (2, 9))
    ours = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    assert_same_but_for_rounding(ours, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_four_dimensional_mask_of_the_users_own_is_taken(dtype: torch.dtype) -> None:
    mask = torch.rand(2, 1, 9, 9) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    if dtype != torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    ids = torch.randint(1, VOCABULARY, (2, 9))
    model = build("llama", "sdpa")
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("fastattn")
    assert_same_but_for_rounding(model(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_compiled_model_gives_the_same(padding: str) -> None:
    inputs, counts = inputs_of("mistral", padding)
    model = build("mistral", "fastattn")
    expected = model(**inputs).logits[counts]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_but_for_rounding(compiled(**inputs, use_cache=False).logits[counts], expected)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    inputs, counts = inputs_of("mistral", "left")
    model = build("mistral", "fastattn").train()
    plain = result(model, inputs, counts)[1]
    model.gradient_checkpointing_enable()
    for parameter, gradient in result(model, inputs, counts)[1].items():
        assert torch.equal(gradient, plain[parameter]), parameter


def test_dropout_is_drawn_from_torchs_generator_in_training_alone() -> None:
    inputs, _ = inputs_of("llama", "left")
    model = build("llama", "fastattn")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    without = model(**inputs).logits
    model.train()
    torch.manual_seed(5)
    first = model(**inputs).logits
    assert not torch.allclose(first, without, atol=1e-2)
    assert not torch.equal(model(**inputs).logits, first)
    torch.manual_seed(5)
    assert torch.equal(model(**inputs).logits, first)


CONTEXT = (
    "the old stone bridge near the market was built by two masons and a farmer in a small town of the north , \
after a long war by the river ."
)


def answers(model: nn.Module, tokenizer, questions: list[str]) -> list[tuple[int, int, float]]:
    """Extractive question answering as readers do it: overlapping windows of the context, padded to one batch, the
    best span of all windows."""
    best = []
    for question in questions:
        windows = tokenizer(
            question, CONTEXT, truncation="only_second", max_length=20, stride=6, padding="longest",
            return_overflowing_tokens=True, return_offsets_mapping=True, return_tensors="pt",
        )  # fmt: skip
        offsets = windows.pop("offset_mapping")
        windows.pop("overflow_to_sample_mapping")
        context = torch.tensor([[s == 1 for s in windows.sequence_ids(i)] for i in range(len(offsets))])
        with torch.no_grad():
            out = model(**windows)
        start, end = (t.masked_fill(~context, float("-inf")) for t in (out.start_logits, out.end_logits))
        spans = (start[:, :, None] + end[:, None, :]).triu().masked_fill(torch.ones(20, 20).tril(-1).bool(), -1e9)
        window, place = divmod(int(spans.argmax()), spans.shape[1] * spans.shape[2])
        first, last = divmod(place, spans.shape[2])
        best.append((int(offsets[window, first, 0]), int(offsets[window, last, 1]), float(spans.max())))
    return best


def test_a_reader_gives_the_same_answers() -> None:
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS.split())})
    model = build("reader")
    questions = ["who built the bridge ?", "where was it ?", "was it in the north after the war ?"]
    eager = answers(model, tokenizer, questions)
    model.set_attn_implementation("fastattn")
    for (start, end, score), (eager_start, eager_end, eager_score) in zip(
        answers(model, tokenizer, questions), eager, strict=True
    ):
        assert CONTEXT[start:end] == CONTEXT[eager_start:eager_end] != ""
        assert abs(score - eager_score) < 1e-4


@pytest.mark.parametrize(
    ("found", "serves"), [("5.17.1", False), ("4.57.0", False), ("5.23.0.dev0", True), ("6.0rc1", True)]
)
def test_older_transformers_are_refused_in_words(found, serves, monkeypatch):
    monkeypatch.setattr(integrations.metadata, "version", lambda name: found)
    if serves:
        return integrations._check_transformers()
    with pytest.raises(ImportError, match=f"needs transformers 5.23 or newer, but {found} is installed"):
        integrations._check_transformers()
