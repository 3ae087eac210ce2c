"""Modules around the fused functions: attention, MLPs, and the transformers built from them."""

from fastattn.nn.attention import CrossAttention, SelfAttention
from fastattn.nn.config import TransformerConfig
from fastattn.nn.decoding_cache import DecodingCache
from fastattn.nn.generation import Generation
from fastattn.nn.loss import LinearCrossEntropyLoss
from fastattn.nn.mlp import MLP, GatedMLP
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.rotary import Rotary
from fastattn.nn.torch_attention import MultiheadAttention
from fastattn.nn.torch_layers import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fastattn.nn.transformer_model import TransformerBlock, TransformerModel

__all__ = [
    "MLP",
    "CrossAttention",
    "DecodingCache",
    "GatedMLP",
    "Generation",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "Rotary",
    "SelfAttention",
    "Transformer",
    "TransformerBlock",
    "TransformerConfig",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "TransformerModel",
]
