"""Where families of models keep their parts: one row of names a family, so that the lens works on every family.

A row says under which names a family of models has its embeddings, blocks, attention, MLPs, norms and
unembedding. A new family is a new row, given to `register`. fastattn.lens.adapters reads a model by its row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Family:
    """The names of one family's parts.

    A name is a path of attributes, "attn.c_proj". Names of a block's parts start at the block; those of `blocks`,
    `embeddings`, `embedding_norm` and `final_norm` at the model without its head (`base`); those of `unembedding`,
    `head` and of numbers at the model itself. None, or an attribute that is None, is a part that does not exist.

    Args:
        name: what the family is called in errors.
        models: the classes it describes, "library.Class" (the first word of the class's module, and its name).
            Subclasses count.
        base: where a model with a head keeps the model without; "" if there is no such module.
        blocks: the list of blocks.
        embeddings: modules whose results are summed to the first residual stream.
        embedding_norm: the norm after that sum, if there is one.
        final_norm: the norm before the unembedding; None if the blocks end in a norm (post-norm).
        head: what else lies between the last stream and the unembedding (BERT's transform).
        unembedding: the linear layer that gives the logits. Where it does not exist, `tied` is read.
        tied: the embedding whose table serves as the unembedding.
        attention: the module that attends.
        attention_out: the module whose result attention adds to the stream; by default `attention`.
        q, k, v: the linear layers to queries, keys and values; or q alone, if one layer gives all three.
        interleaved: that one layer gives (q, k, v) head by head (GPT-NeoX), not first all heads of q.
        out: the linear layer from the heads back to the stream.
        mlp: the MLP; None for attention-only blocks.
        mlp_out: the module whose result the MLP adds to the stream; by default `mlp`.
        up, gate, down: the MLP's linear layers; gate is None for an MLP that is not gated. What `down` is given is
            the MLP's neurons.
        attention_norm, mlp_norm: the norms before (pre-norm) or after (post-norm) attention and MLP.
        between: a module whose result is the stream between attention and MLP. Without one that stream can be read
            (as what `mlp_norm` is given), and not replaced.
        norms_after: norms of what attention and MLP add, before it is added (Gemma 3): a pair of names.
        post_norm: stream = norm(stream + what is added), as in BERT; else stream += f(norm(stream)).
        parallel: the flag that says whether attention and MLP read the same stream (GPT-NeoX).
        num_heads, num_kv_heads: the numbers of heads; without the second there are as many key heads as queries.
        logit_cap: the number c in logits = c tanh(logits / c).
        unserved: flags that say that a block has layers which no name here describes (cross-attention).
        hooks: where the module that attends has points to hook for queries, keys and values; None for a Hugging
            Face model, whose attention functions are tapped.
    """

    name: str
    models: tuple[str, ...]
    base: str = ""
    blocks: str
    embeddings: tuple[str, ...]
    embedding_norm: str | None = None
    final_norm: str | None = None
    head: str | None = None
    unembedding: str | None = None
    tied: str | None = None
    attention: str
    attention_out: str | None = None
    q: str
    k: str | None = None
    v: str | None = None
    interleaved: bool = False
    out: str
    mlp: str | None = None
    mlp_out: str | None = None
    up: str | None = None
    gate: str | None = None
    down: str | None = None
    attention_norm: str | None = None
    mlp_norm: str | None = None
    between: str | None = None
    norms_after: tuple[str | None, str | None] = (None, None)
    post_norm: bool = False
    parallel: str | None = None
    num_heads: str = "config.num_attention_heads"
    num_kv_heads: str | None = None
    logit_cap: str | None = None
    unserved: tuple[str, ...] = ()
    hooks: tuple[str, str, str] | None = None


FASTATTN = Family(
    name="fastattn",
    models=("fastattn.TransformerModel",),
    blocks="blocks",
    embeddings=("token_embedding", "position_embedding"),
    final_norm="final_norm",
    unembedding="unembedding",
    tied="token_embedding",
    attention="attention",
    q="attention.qkv_proj",
    out="attention.out_proj",
    attention_norm="attention_norm",
    mlp="mlp", up="mlp.up", gate="mlp.gate", down="mlp.down", mlp_norm="mlp_norm", between="hook_resid_mid",
    num_heads="config.num_heads",
    num_kv_heads="config.num_kv_heads",
    hooks=("attention.hook_q", "attention.hook_k", "attention.hook_v"),
)  # fmt: skip

GPT2 = Family(
    name="GPT-2",
    models=("transformers.GPT2LMHeadModel", "transformers.GPT2Model"),
    base="transformer",
    blocks="h",
    embeddings=("wte", "wpe"),
    final_norm="ln_f",
    unembedding="lm_head",
    attention="attn", q="attn.c_attn", out="attn.c_proj", attention_norm="ln_1",
    mlp="mlp", up="mlp.c_fc", down="mlp.c_proj", mlp_norm="ln_2",
    unserved=("config.add_cross_attention",),
)  # fmt: skip

LLAMA = Family(
    name="Llama",
    models=(
        "transformers.LlamaForCausalLM", "transformers.LlamaModel",
        "transformers.MistralForCausalLM", "transformers.MistralModel",
        "transformers.Qwen2ForCausalLM", "transformers.Qwen2Model",
        "transformers.SmolLM3ForCausalLM", "transformers.SmolLM3Model",
    ),
    base="model",
    blocks="layers",
    embeddings=("embed_tokens",),
    final_norm="norm",
    unembedding="lm_head",
    attention="self_attn",
    q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.o_proj",
    attention_norm="input_layernorm",
    mlp="mlp", up="mlp.up_proj", gate="mlp.gate_proj", down="mlp.down_proj", mlp_norm="post_attention_layernorm",
    num_kv_heads="config.num_key_value_heads",
)  # fmt: skip

QWEN3 = replace(LLAMA, name="Qwen 3", models=("transformers.Qwen3ForCausalLM", "transformers.Qwen3Model"))

GEMMA3 = replace(
    LLAMA,
    name="Gemma 3",
    models=("transformers.Gemma3ForCausalLM", "transformers.Gemma3TextModel"),
    attention_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    norms_after=("post_attention_layernorm", "post_feedforward_layernorm"),
    logit_cap="config.final_logit_softcapping",
)

GPT_NEOX = Family(
    name="GPT-NeoX (Pythia)",
    models=("transformers.GPTNeoXForCausalLM", "transformers.GPTNeoXModel"),
    base="gpt_neox",
    blocks="layers",
    embeddings=("embed_in",),
    final_norm="final_layer_norm",
    unembedding="lm_head",
    attention="attention", q="attention.query_key_value", interleaved=True, out="attention.dense",
    attention_norm="input_layernorm",
    mlp="mlp", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", mlp_norm="post_attention_layernorm",
    parallel="config.use_parallel_residual",
)  # fmt: skip

BERT = Family(
    name="BERT",
    models=("transformers.BertForMaskedLM", "transformers.BertLMHeadModel", "transformers.BertModel"),
    base="bert",
    blocks="encoder.layer",
    embeddings=(
        "embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings",
    ),
    embedding_norm="embeddings.LayerNorm",
    head="cls.predictions.transform",
    unembedding="cls.predictions.decoder",
    attention="attention.self", attention_out="attention.output.dense",
    q="attention.self.query", k="attention.self.key", v="attention.self.value", out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    mlp="intermediate", mlp_out="output.dense", up="intermediate.dense", down="output.dense",
    mlp_norm="output.LayerNorm", between="attention.output.LayerNorm",
    post_norm=True,
    unserved=("config.add_cross_attention",),
)  # fmt: skip

# torch's stack of encoder layers, wherever in a model it is; `_of_torch` says what differs from model to model.
TORCH = Family(
    name="torch.nn.TransformerEncoder",
    models=("torch.TransformerEncoder",),
    blocks="layers",
    embeddings=(),
    final_norm="norm",
    attention="self_attn", q="self_attn", out="self_attn.out_proj", attention_norm="norm1",
    mlp="linear1", mlp_out="linear2", up="linear1", down="linear2", mlp_norm="norm2",
    num_heads="layers.0.self_attn.num_heads",
)  # fmt: skip

_FAMILIES: dict[str, Family] = {
    family.name: family for family in (FASTATTN, GPT2, LLAMA, QWEN3, GEMMA3, GPT_NEOX, BERT, TORCH)
}


def register(family: Family) -> Family:
    """Add a row to the table of families, or replace the one of the same name. Returns it.

    Example:
        >>> llama = next(family for family in families() if family.name == "Llama")
        >>> register(dataclasses.replace(llama, name="Arcee", models=("transformers.ArceeForCausalLM",))).name
        'Arcee'
    """
    if not isinstance(family, Family):
        raise TypeError(f"family must be a fastattn.lens.Family, got {type(family).__name__}")
    _FAMILIES[family.name] = family
    return family


def families() -> tuple[Family, ...]:
    """The rows that exist, in the order in which a model is compared with them."""
    return tuple(_FAMILIES.values())


def family_of(model: nn.Module) -> Family | None:
    """The row of a model's class, the newest first."""
    names = {name_of(kind) for kind in type(model).__mro__}
    return next((family for family in reversed(_FAMILIES.values()) if names.intersection(family.models)), None)


def name_of(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"
