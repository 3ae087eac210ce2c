"""Small random models of every family that the lens knows, in float64 and eval mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastattn.nn import TransformerModel

VOCABULARY, LAYERS, HEADS, WIDTH = 50, 3, 4, 32

OWN = {
    "own": {"max_length": 64},
    "own-gated": {"positions": "rotary", "mlp": "gated", "norm": "rms", "num_kv_heads": 2, "tied": False},
    "own-attention-only": {"positions": "rotary", "mlp": None, "qk_norm": True, "head_dim": 16},
    "own-encoder": {"max_length": 64, "causal": False, "bias": False},
}
HUGGING_FACE = {
    "gpt2": ("GPT2", "LMHeadModel", {}),
    "llama": ("Llama", "ForCausalLM", {"num_key_value_heads": 2, "attention_bias": True}),
    "qwen2": ("Qwen2", "ForCausalLM", {"num_key_value_heads": 2}),
    "mistral": ("Mistral", "ForCausalLM", {"num_key_value_heads": 2, "sliding_window": 8}),
    "smollm3": ("SmolLM3", "ForCausalLM", {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]}),
    "qwen3": ("Qwen3", "ForCausalLM", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3", "ForCausalLM", {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8,
                                         "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0}),
    "pythia": ("GPTNeoX", "ForCausalLM", {"rotary_pct": 0.25}),
    "pythia-sequential": ("GPTNeoX", "ForCausalLM", {"use_parallel_residual": False}),
    "bert": ("Bert", "ForMaskedLM", {}),
}  # fmt: skip
LIKE_LLAMA = ["qwen2", "mistral", "smollm3"]
ALL = [name for name in (*OWN, *HUGGING_FACE) if name not in LIKE_LLAMA]
PRE_NORM = [name for name in ALL if name != "bert"]


def make(name: str, attention: str = "fastattn", **fields: Any) -> nn.Module:
    """A model of this name, with random weights everywhere: biases and norms, too."""
    if name in OWN:
        sizes = {"vocab_size": VOCABULARY, "embed_dim": WIDTH, "num_heads": HEADS, "num_layers": LAYERS}
        model: Any = TransformerModel(**{**sizes, **OWN[name], **fields})
    else:
        from needs_transformers import transformers

        import fastattn.integrations.huggingface  # noqa: F401  (registers "fastattn")

        family, head, more = HUGGING_FACE[name]
        config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=LAYERS,
            intermediate_size=48, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            attn_implementation=attention, **{**more, **fields},
        )  # fmt: skip
        model = getattr(transformers, f"{family}{head}")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.dim() == 1 else 0.2)
            parameter.copy_(parameter + noise)
    return model.double().eval()


def text(batch: int = 2, length: int = 20) -> torch.Tensor:
    """Token ids, none of them a pad."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))
