"""Modules around the fused functions: attention, MLPs, and the transformers built from them."""

from fastattn.nn.attention import CrossAttention, SelfAttention
from fastattn.nn.config import TransformerConfig
from fastattn.nn.mlp import MLP, GatedMLP
from fastattn.nn.rotary import Rotary
from fastattn.nn.transformer_model import TransformerBlock, TransformerModel

__all__ = [
    "MLP",
    "CrossAttention",
    "GatedMLP",
    "Rotary",
    "SelfAttention",
    "TransformerBlock",
    "TransformerConfig",
    "TransformerModel",
]
