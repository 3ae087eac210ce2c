"""transformers' continuous batching with attn_implementation="fastattn": eager's tokens, keys read from pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from needs_transformers import transformers  # noqa: F401
from test_huggingface import VOCABULARY, build
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from fastattn.integrations import huggingface_batching
from fastattn.integrations.huggingface import fastattn_attention

GREEDY = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=VOCABULARY + 1, pad_token_id=0)
# Few tokens a step, so that prompts are read in pieces and requests wait for each other.
SMALL = {"num_blocks": 24, "max_batch_tokens": 16, "page_size": 4}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    some = [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 13, 1, 30, 8)]
    # Two that begin alike share pages.
    return [*some, some[3][:20] + some[0]]


def eager(model: nn.Module) -> list[list[int]]:
    model.set_attn_implementation("eager")
    rows = (torch.tensor([prompt]) for prompt in prompts())
    return [model.generate(row, generation_config=GREEDY)[0, row.shape[1] :].tolist() for row in rows]


def batched(model: nn.Module, implementation: str = "fastattn") -> list[list[int]]:
    model.set_attn_implementation(implementation)
    out = model.generate_batch(
        prompts(), generation_config=GREEDY, continuous_batching_config=ContinuousBatchingConfig(**SMALL)
    )
    return [each.generated_tokens for each in out.values()]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "qwen3", "phi3"])
def test_generate_batch_gives_eagers_tokens(name: str) -> None:
    model = build(name)
    expected = eager(model)
    assert batched(model) == expected


def test_keys_are_read_from_pages_of_several_requests_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    attend = huggingface_batching.attention_varlen

    def watching(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(options)
        return attend(*args, **options)

    monkeypatch.setattr(huggingface_batching, "attention_varlen", watching)
    model = build("llama")
    assert len(batched(model)) == len(prompts())
    tables = [call["block_table"] for call in calls if "block_table" in call]
    assert len(tables) > 0.8 * len(calls) and max(map(len, tables)) > 1


def test_other_implementations_go_on_as_before() -> None:
    model = build("llama")
    expected = eager(model)
    assert batched(model, "sdpa") == expected
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="Implementation flex_attention is not supported for continuous batching"):
        model.generate_batch(prompts(), generation_config=GREEDY)


@pytest.mark.parametrize(
    "keywords, sentence",
    [
        ({"is_causal": False}, "is_causal must be True in continuous batching, got False"),
        ({"position_bias": torch.zeros(1, 1, 3, 3)}, "does not know the keyword position_bias"),
        ({"dropout": 0.1}, "does not know the keyword dropout"),
        ({"block_table": torch.zeros(1, 3, 3)}, "does not know the keyword block_table"),
        ({"output_attentions": True}, "does not know the keyword output_attentions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_continuous_batching_does_not_compute_is_refused_before_the_cache_is_written(
    keywords: dict[str, Any], sentence: str
) -> None:
    q, k, v = (torch.randn(1, heads, 3, 8) for heads in (4, 2, 2))
    cache: Any = object.__new__(huggingface_batching.PagedAttentionCache)
    with pytest.raises(ValueError, match=sentence):
        fastattn_attention(nn.Module(), q, k, v, None, cache=cache, **keywords)
    with pytest.raises(ValueError, match="does not know the keyword cache"):
        fastattn_attention(nn.Module(), q, k, v, None, cache=[cache])
