"""Every architecture of transformers that a small configuration can build equals eager, or is refused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from needs_transformers import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

import fastattn
import fastattn.integrations.huggingface

LARGEST = 4_000_000
SMALL: dict[str, Any] = {
    name: value
    for value, names in {
        99: "vocab_size vocab_size_per_layer_input",
        64: "max_position_embeddings n_positions n_ctx",
        48: "intermediate_size hidden_dim ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner d_inner "
            "intermediate_size_mlp",
        32: "hidden_size n_embd d_model dim word_embed_proj_dim embedding_size encoder_hidden_dim",
        16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank mamba_d_head "
            "mamba_head_dim global_head_dim index_head_dim",
        8: "head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_state ssm_state_size state_size "
           "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input query_pre_attn_scalar",
        5: "sliding_window attention_chunk_size",
        4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
           "num_local_experts num_experts n_routed_experts moe_num_experts rotary_dim mamba_n_heads "
           "mamba_num_heads mamba_d_conv conv_kernel mamba_chunk_size chunk_size linear_num_value_heads "
           "index_n_heads index_topk "
           "attention_window num_codebooks",
        2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
           "num_encoder_layers num_key_value_heads num_experts_per_tok moe_k mamba_expand expand "
           "linear_num_key_heads num_global_key_value_heads eos_token_id",
        1: "n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups n_groups bos_token_id",
        0.0: "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout",
    }.items()
    for name in names.split()
}  # fmt: skip
SMALL["pad_token_id"] = 0
# Attention with latent keys has as many heads of keys as of queries.
LATENT = ("axk1", "axk2", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "deepseek_v32",
          "deepseek_v3", "mistral4")  # fmt: skip
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zaya": {"num_experts_per_tok": 1},
    **{name: {"num_key_value_heads": 4} for name in LATENT},
    **{name: {"num_hidden_layers": 4} for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
}


def small_config(kind: type, options: dict[str, Any]) -> Any:
    names = set(inspect.signature(kind.__init__).parameters).union(
        *(getattr(c, "__annotations__", {}) for c in kind.__mro__)
    )
    renamed = getattr(kind, "attribute_map", {})
    given = {k: v for k, v in SMALL.items() if k in names and renamed.get(k) not in SMALL}
    return kind(**given | options)


def small_model(model_type: str) -> nn.Module:
    """In eval mode with eager attention, its weights large enough that masks show."""
    config = small_config(CONFIG_MAPPING[model_type], EXTRA.get(model_type, {}))
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    kind = getattr(transformers, name if isinstance(name, str) else name[0])
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
    return model


IDS = torch.randint(5, 90, (3, 12), generator=torch.Generator().manual_seed(0))
SEEN = torch.ones_like(IDS)
SEEN[1, :4] = SEEN[2, -4:] = 0


def result(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a row without padding, one padded on the left, one on the right, and every gradient."""
    model.zero_grad()
    inputs = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    out = model(input_ids=IDS, attention_mask=SEEN, **inputs)[0]
    out = out[SEEN.bool()] if out.shape[:2] == SEEN.shape else out
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_a_causal_architecture_equals_eager_or_is_refused(model_type: str) -> None:
    try:
        model = small_model(model_type)
        logits, gradients = result(model)
    except Exception as error:
        pytest.skip(f"no small generic configuration: {error}")
    rows = [row for row in fastattn.patch(model, mlp=False).rows if row.kind == "attention"]
    if not any(row.now for row in rows):
        assert all(row.why for row in rows)
        if rows and "does not dispatch" in rows[0].why:
            with pytest.raises(ValueError, match=r"fastattn\.patch"):
                type(model)._from_config(model.config, attn_implementation="fastattn")
        return
    actual, actual_gradients = result(model)
    assert (actual - logits).abs().max() <= 1e-4 * logits.abs().max()
    largest = max(g.abs().max() for g in gradients.values())
    assert gradients.keys() == actual_gradients.keys()
    for name, gradient in gradients.items():
        error = (actual_gradients[name] - gradient).abs().max()
        assert error <= 2e-3 * gradient.abs().max() + 1e-6 * largest, name


def nested_config(kind: type, depth: int = 0) -> Any:
    """A small configuration whose parts are small, too."""
    parts = {}
    for name, part in getattr(kind, "sub_configs", {}).items():
        if part.__name__ == "AutoConfig":
            part = type(getattr(kind(), name))
        if part is not type(None) and depth < 3:
            parts[name] = nested_config(part, depth + 1).to_dict()
    try:
        return small_config(kind, parts | SMALL_IMAGES)
    except TypeError:
        return small_config(kind, parts)


SMALL_IMAGES = {"image_size": 32, "patch_size": 4, "num_mel_bins": 16}
LENGTHS = torch.tensor([16, 12])


def generic_inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """What models of this main input may take, with padding where there can be any."""
    size, name = getattr(model.config, "image_size", 32), model.main_input_name
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *(size, size) if isinstance(size, int) else size, generator=generator)
    tokens = {"input_ids": IDS[:2], "attention_mask": SEEN[:2]}
    if name == "pixel_values":
        yield {name: images}
        yield {name: images[:, None].repeat(1, 4, 1, 1, 1)}
        yield {name: images} | tokens
        patches = {
            name: torch.randn(2, 16, 48),
            "pixel_attention_mask": (torch.arange(16) < LENGTHS[:, None]).long(),
        }
        yield patches | {"spatial_shapes": torch.tensor([[4, 4], [3, 4]])}
        return
    if name in ("input_values", "input_features"):
        for width in (16, 80, 128):
            yield {
                name: torch.randn(2, 50, width),
                "attention_mask": (torch.arange(50) < 2 * LENGTHS[:, None]).long(),
            }
        yield {name: torch.randn(2, 2000), "attention_mask": (torch.arange(2000) < 100 * LENGTHS[:, None]).long()}
        yield {name: torch.randn(2, 2000)}
        return
    yield tokens | {"decoder_input_ids": IDS[:2, :5]} if model.config.is_encoder_decoder else tokens
    yield tokens | {"bbox": torch.zeros(2, 12, 4, dtype=torch.long)}
    yield tokens | {"pixel_values": images}


def first_result(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        out = model(**inputs)[0]
    assert isinstance(out, Tensor)
    of_tokens = "input_ids" in inputs and out.shape[:2] == inputs["attention_mask"].shape
    return out[inputs["attention_mask"].bool()] if of_tokens else out


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_MAPPING_NAMES)
def test_what_cannot_be_served_is_said_when_the_model_is_made_and_the_rest_equals_torchs(
    model_type: str,
) -> None:
    """Equal to one of the two: in padded rows, which some models pool, eager attends evenly and "sdpa" does as we
    do, but "sdpa" knows no soft cap and no sinks."""
    try:
        names = MODEL_MAPPING_NAMES[model_type]
        kind = getattr(transformers, names if isinstance(names, str) else names[0])
        config = nested_config(CONFIG_MAPPING[model_type])
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
        assert size <= LARGEST
        torch.manual_seed(0)
        model = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
        given = next(inputs for inputs in generic_inputs(model) if attempt(model, inputs) is not None)
    except (Exception, StopIteration) as error:
        pytest.skip(f"no small generic configuration or input: {error}")
    try:
        ours = kind._from_config(copy.deepcopy(config), attn_implementation="fastattn").eval()
    except ValueError as error:
        assert 'cannot use attn_implementation="fastattn"' in str(error)
        return
    ours.load_state_dict(model.state_dict())
    actual, errors = first_result(ours, given), []
    for implementation in ("eager", "sdpa"):
        model.config._attn_implementation = implementation
        try:
            expected = first_result(model, given)
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
            return
        except (Exception, AssertionError) as error:
            errors.append(str(error))
    raise AssertionError(errors)


def attempt(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor | None:
    try:
        return first_result(model, inputs)
    except Exception:
        return None
