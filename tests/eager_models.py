"""Small models of fastattn.nn and their eager twins: the same weights, plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastattn.nn import (
    GatedMLP,
    TransformerModel,
)

SMALL = {"vocab_size": 31, "embed_dim": 32, "num_heads": 4, "num_layers": 2, "max_length": 20}

VARIANTS = {
    "gpt2": {},
    "attention only, rotary": {"mlp": None, "positions": "rotary"},
    "attention only, no neurons": {"hidden_dim": 0, "positions": "zero"},
    "encoder": {"causal": False, "activation": "gelu"},
    "encoder without positions": {"causal": False, "positions": None, "max_length": None},
    "llama": {
        "positions": "rotary",
        "num_kv_heads": 2,
        "mlp": "gated",
        "norm": "rms",
        "bias": False,
        "tied": False,
        "hidden_dim": 40,
    },
    "qwen 3": {"positions": "rotary", "num_kv_heads": 2, "qk_norm": True},
    "normed without positions": {"qk_norm": True, "positions": None},
    "partial rotary, wide heads": {"positions": "rotary", "head_dim": 12, "rotary_width": 6, "rotary_base": 50.0},
}

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
}


# The eager twins: the same weights, plain torch.


def eager_rotation(x, width, base):
    """Rotary as multiplication by unit complex numbers; x (B, H, L, D)."""
    half = width // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) * 2 / width)
    angles = torch.outer(torch.arange(x.shape[2], dtype=torch.float64), frequencies)
    turned = torch.complex(x[..., :half], x[..., half:width]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., width:]], -1)


def eager_weighted_values(q, k, v, causal):
    """softmax(q k^T / sqrt(D)) v with an L x L matrix, the heads side by side again."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores + torch.full_like(scores[0, 0], float("-inf")).triu(1)
    z = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    return z.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def eager_self_attention(module, x):
    def heads(rows):
        bias = None if module.qkv_proj.bias is None else module.qkv_proj.bias[rows]
        projected = F.linear(x, module.qkv_proj.weight[rows], bias)
        return projected.view(*x.shape[:2], -1, module.head_dim).transpose(1, 2)

    queries, keys = module.num_heads * module.head_dim, module.num_kv_heads * module.head_dim
    q, k = heads(slice(0, queries)), heads(slice(queries, queries + keys))
    v = heads(slice(queries + keys, queries + 2 * keys))
    if module.q_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    if module.rotary is not None:
        q, k = (eager_rotation(t, module.rotary.width, module.rotary.base) for t in (q, k))
    return module.out_proj(eager_weighted_values(q, k, v, module.causal))


def eager_mlp(module, x):
    activation = ACTIVATIONS[module.activation]
    if isinstance(module, GatedMLP):
        return module.down(activation(module.gate(x)) * module.up(x))
    return module.down(activation(module.up(x)))


def eager_transformer(model, tokens):
    x = model.token_embedding.weight[tokens]
    if model.config.positions in ("learned", "zero"):
        x = x + model.position_embedding.weight[: tokens.shape[1]]
    for block in model.blocks:
        x = x + eager_self_attention(block.attention, block.attention_norm(x))
        if block.mlp is not None:
            x = x + eager_mlp(block.mlp, block.mlp_norm(x))
    table = model.token_embedding if model.config.tied else model.unembedding
    return model.final_norm(x) @ table.weight.mT


def shaken(module, std=0.3):
    """The module with every parameter off its initial value, so that a result without one of them is another."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def small_model(dtype=torch.float64, **fields):
    return shaken(TransformerModel(**{**SMALL, **fields}, dtype=dtype))


def some_tokens(batch=2, length=13, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def next_token_loss(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model, tokens, forward=None):
    """Gradients of the next-token loss, by parameter name."""
    logits = (model if forward is None else forward)(tokens)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(next_token_loss(logits, tokens), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def assert_equal_to(expected, actual, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, atol=tolerance * expected.abs().max().item(), rtol=0)
