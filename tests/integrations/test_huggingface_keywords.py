"""No keyword reaches an attention function without being served, known to be harmless, or refused."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from huggingface_calls import keywords_that_reach_attention
from needs_transformers import transformers
from transformers.utils.generic import TransformersKwargs

from fastattn.integrations import huggingface_models
from fastattn.integrations.huggingface import fastattn_attention
from fastattn.integrations.huggingface_models import HARMLESS, REFUSED, SERVED

MODELLING = [
    (path.parent.name, path.read_text())
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
]


@pytest.mark.slow
def test_every_keyword_that_transformers_passes_is_classified() -> None:
    known = SERVED | HARMLESS.keys() | REFUSED.keys()
    unknown: dict[str, list[str]] = {}
    for model, source in MODELLING:
        if "attention_interface" in source:
            for keyword in keywords_that_reach_attention(source) - known:
                unknown.setdefault(keyword, []).append(model)
    for keyword in TransformersKwargs.__annotations__.keys() - known:
        unknown.setdefault(keyword, []).append("every model")
    assert not unknown, "read what these do in the attention of these models, and add them to a table"


def test_eager_attention_reads_no_keyword_that_is_not_served() -> None:
    for model, source in MODELLING:
        for text in re.findall(r"^def eager_attention.*?(?=^\S(?<!\)))", source, re.MULTILINE | re.DOTALL):
            (function,) = ast.parse(text).body
            names = {a.arg.removesuffix("_states") for a in (*function.args.args, *function.args.kwonlyargs)}
            # The window of ModernBERT's decoder is in its mask as well.
            assert names <= SERVED | {"module", "query", "key", "value", "sliding_window"}, model
            assert not any(isinstance(n, ast.Name) and n.id == "kwargs" for n in ast.walk(function)), model


def test_the_three_tables_share_no_keyword_and_what_is_served_is_a_parameter() -> None:
    assert not SERVED & HARMLESS.keys() and not SERVED & REFUSED.keys() and not HARMLESS.keys() & REFUSED.keys()
    assert not SERVED - inspect.signature(fastattn_attention).parameters.keys()
    assert all(" " in reason for reason in (HARMLESS | REFUSED).values())


@pytest.mark.parametrize("keyword", ["surprise", *REFUSED])
def test_an_unknown_keyword_is_an_error_that_names_it_and_the_module_unless_it_is_none(keyword: str) -> None:
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    module = torch.nn.Bilinear(1, 1, 1)
    with pytest.raises(ValueError, match=f"keyword {keyword}, which Bilinear"):
        fastattn_attention(module, q, k, v, None, **{keyword: torch.ones(1)})
    fastattn_attention(module, q, k, v, None, **{keyword: None})


def test_a_model_whose_code_passes_an_unknown_keyword_is_refused_when_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                      intermediate_size=8)  # fmt: skip
    source = inspect.getsource(transformers.models.llama.modeling_llama)
    surprising = source.replace("scaling=self.scaling,", "scaling=self.scaling, surprise=hidden_states,")
    assert surprising != source
    huggingface_models.obstacle_of_class.cache_clear()
    monkeypatch.setattr(huggingface_models, "_source", lambda _: surprising)
    try:
        with pytest.raises(ValueError, match="passes the keyword surprise"):
            transformers.LlamaForCausalLM._from_config(config, attn_implementation="fastattn")
    finally:
        huggingface_models.obstacle_of_class.cache_clear()
