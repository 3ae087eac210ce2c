"""The same model with attention and MLP in eager PyTorch, for comparison."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn import MLP, Rotary, SelfAttention, TransformerModel


class _Eager(nn.Module):
    """Computes with the parameters of another layer."""

    def __init__(self, layer: SelfAttention | MLP) -> None:
        super().__init__()
        self.layer: Any = layer
        self.embed_dim = layer.embed_dim


class EagerAttention(_Eager):
    """Textbook attention with the parameters of a SelfAttention: every N x N pattern is a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        qkv = layer.heads(layer.qkv_proj(x))
        q, k, v = qkv.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
        if layer.rotary is not None:
            q, k = rotated(q, layer.rotary), rotated(k, layer.rotary)
        scores = q @ k.mT * q.shape[3] ** -0.5
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(1)
        pattern = scores.masked_fill(later, float("-inf")).softmax(-1)
        return layer.out_proj((pattern @ v).transpose(1, 2).flatten(2))


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of x (B, H, L, D), half layout."""
    half = rotary.width // 2
    cos, sin = rotary.tables(x)
    first, second, rest = x.split([half, half, x.shape[3] - rotary.width], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1).to(x.dtype)


class EagerMLP(_Eager):
    """nn.Linear, F.gelu, nn.Linear with the parameters of an MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.down(F.gelu(self.layer.up(x), approximate="tanh"))


def eager_twin(model: TransformerModel) -> TransformerModel:
    """A copy with the same weights, in which nothing is fused."""
    twin = copy.deepcopy(model)
    blocks: Any = twin.blocks
    for block in blocks:
        block.attention = EagerAttention(block.attention)
        block.mlp = EagerMLP(block.mlp)
    return twin
