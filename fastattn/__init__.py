"""fastattn: fused attention and MLP for PyTorch, exact, drop-in, open to look into."""

import importlib
import sys
from typing import Any

from fastattn import flash_attn, lens, masks, nn
from fastattn.dropout import dropout_mask, dropout_state
from fastattn.functional import (
    attention,
    attention_backward,
    gated_mlp,
    merge_states,
    mlp,
    t5_relative_bias,
)
from fastattn.heads import prepare_heads
from fastattn.norm import layer_norm, rms_norm
from fastattn.patch import patch, unpatch
from fastattn.takeover import sdpa
from fastattn.torch_sdpa import scaled_dot_product_attention
from fastattn.varlen import attention_varlen

if "torch.utils.flop_counter" in sys.modules:
    import fastattn.flops  # noqa: F401

__version__ = "0.1.0"

__all__ = [
    "attention",
    "attention_backward",
    "attention_varlen",
    "dropout_mask",
    "dropout_state",
    "flash_attn",
    "gated_mlp",
    "layer_norm",
    "lens",
    "masks",
    "merge_states",
    "mlp",
    "nn",
    "patch",
    "prepare_heads",
    "rms_norm",
    "scaled_dot_product_attention",
    "sdpa",
    "t5_relative_bias",
    "unpatch",
]

# Imported when they are first asked for.
_LATER = ("integrations",)


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"fastattn.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
