"""Reading GPT-2 checkpoints laid out as Hugging Face's, without `transformers`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fastattn.nn.config import TransformerConfig

ACTIVATION_NAMES = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}

# The causal mask, which old checkpoints contain.
BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

LAYER_NAMES = {
    "attention_norm": "ln_1",
    "attention.qkv_proj": "attn.c_attn",
    "attention.out_proj": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


class Entry(NamedTuple):
    """The name of a parameter in the checkpoint, and whether it is stored as (in, out) instead of (out, in)."""

    name: str
    transposed: bool = False


def gpt2_state(source: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by names without the `transformer.` prefix, mask buffers left out.

    Raises:
        TypeError: source is neither a module nor a mapping.
        ValueError: there is no wte.weight or wpe.weight, so this is no GPT-2.
    """
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise TypeError(f"source must be a module or a state dict, got {type(source).__name__}")
    state = {name.removeprefix("transformer."): tensor for name, tensor in source.items()}
    state = {name: tensor for name, tensor in state.items() if not BUFFER.fullmatch(name)}
    missing = [name for name in ("wte.weight", "wpe.weight") if name not in state]
    if missing:
        raise ValueError(f"source must be a GPT-2 checkpoint, but has no {', '.join(missing)}")
    return state


def gpt2_config(
    state: Mapping[str, torch.Tensor], theirs: Any, num_heads: int | None, backend: str | None
) -> TransformerConfig:
    """Our configuration for a checkpoint: sizes from its tensors, the rest from its own configuration.

    Raises:
        ValueError: the number of heads is not known, or `theirs` has a setting that this model lacks.
    """

    def setting(name: str, default: Any) -> Any:
        return theirs.get(name, default) if isinstance(theirs, Mapping) else getattr(theirs, name, default)

    num_heads = setting("n_head", None) if num_heads is None else num_heads
    if num_heads is None:
        raise ValueError("num_heads must be given, because neither config nor source contains it; got None")
    activation = setting("activation_function", "gelu_new")
    if activation not in ACTIVATION_NAMES:
        raise ValueError(f"activation_function must be one of {sorted(ACTIVATION_NAMES)}, got {activation!r}")
    for name, needed in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if setting(name, needed) != needed:
            raise ValueError(f"{name} must be {needed}, got {setting(name, needed)}")
    layers = {int(name.split(".")[1]) for name in state if re.match(r"h\.\d+\.", name)}
    vocab_size, embed_dim = state["wte.weight"].shape
    hidden = state.get("h.0.mlp.c_fc.weight")
    unembedding = state.get("lm_head.weight")
    return TransformerConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_layers=setting("n_layer", max(layers, default=-1) + 1),
        max_length=state["wpe.weight"].shape[0],
        hidden_dim=None if hidden is None else hidden.shape[-1],
        activation=ACTIVATION_NAMES[activation],
        norm_eps=setting("layer_norm_epsilon", 1e-5),
        tied=unembedding is None or torch.equal(unembedding, state["wte.weight"]),
        backend=backend,
    )


def gpt2_entries(config: TransformerConfig) -> dict[str, Entry]:
    """The checkpoint entry of each of the model's parameters."""
    entries = {
        "token_embedding.weight": Entry("wte.weight"),
        "position_embedding.weight": Entry("wpe.weight"),
        "final_norm.weight": Entry("ln_f.weight"),
        "final_norm.bias": Entry("ln_f.bias"),
    }
    if not config.tied:
        entries["unembedding.weight"] = Entry("lm_head.weight")
    for layer in range(config.num_layers):
        for ours, theirs in LAYER_NAMES.items():
            is_linear = not ours.endswith("norm")
            entries[f"blocks.{layer}.{ours}.weight"] = Entry(f"h.{layer}.{theirs}.weight", is_linear)
            entries[f"blocks.{layer}.{ours}.bias"] = Entry(f"h.{layer}.{theirs}.bias")
    return entries


@torch.no_grad()
def copy_gpt2(model: nn.Module, config: TransformerConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Fill a `TransformerModel` of this configuration from a checkpoint as `gpt2_state` gives it.

    Raises:
        ValueError: keys missing, unexpected or of another shape, each named.
    """
    entries = gpt2_entries(config)
    names = {entry.name for entry in entries.values()}
    missing = sorted(names - state.keys())
    # A tied unembedding is the token embedding again.
    unexpected = sorted(state.keys() - names - {"lm_head.weight"})
    if missing or unexpected:
        raise ValueError(f"source must hold exactly GPT-2's keys; missing: {missing}, unexpected: {unexpected}")
    for ours, parameter in model.named_parameters():
        entry = entries[ours]
        tensor = state[entry.name].t() if entry.transposed else state[entry.name]
        if tensor.shape != parameter.shape:
            expected = tuple(parameter.t().shape if entry.transposed else parameter.shape)
            got = tuple(state[entry.name].shape)
            raise ValueError(f"source's {entry.name} must have shape {expected}, got {got}")
        parameter.copy_(tensor)
