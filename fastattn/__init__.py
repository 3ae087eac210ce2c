"""fastattn: fused attention and MLP for PyTorch, exact, drop-in, open to look into."""

import functools
import importlib
import sys
from typing import Any

from fastattn import flash_attn, lens, masks, nn
from fastattn.core import spread
from fastattn.core.attention.dropout import dropout_mask, dropout_state
from fastattn.core.attention.functional import attention, attention_backward, merge_states, t5_relative_bias
from fastattn.core.attention.sdpa import scaled_dot_product_attention
from fastattn.core.attention.varlen import attention_varlen
from fastattn.core.cache.functional import attention_with_cache, attention_with_shared_prefix
from fastattn.core.heads.functional import prepare_heads
from fastattn.core.invariance import invariant
from fastattn.core.loss.functional import linear_cross_entropy
from fastattn.core.mlp.functional import gated_mlp, mlp
from fastattn.core.norm.functional import layer_norm, rms_norm
from fastattn.core.rows import by_rows
from fastattn.dropin.patch import patch, unpatch
from fastattn.dropin.takeover import sdpa
from fastattn.ground.version import VERSION

if "torch.utils.flop_counter" in sys.modules:
    import fastattn.flops  # noqa: F401

spread.enter_dtensors = functools.partial(importlib.import_module, "fastattn.distributed")
if "torch.distributed.tensor" in sys.modules:
    spread.enter_dtensors()

__version__ = VERSION

__all__ = [
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_with_cache",
    "attention_with_shared_prefix",
    "by_rows",
    "dropout_mask",
    "dropout_state",
    "flash_attn",
    "gated_mlp",
    "invariant",
    "layer_norm",
    "lens",
    "linear_cross_entropy",
    "masks",
    "merge_states",
    "mlp",
    "nn",
    "patch",
    "prepare_heads",
    "prove",
    "rms_norm",
    "scaled_dot_product_attention",
    "sdpa",
    "t5_relative_bias",
    "unpatch",
]

# Imported when they are first asked for: a module, and the name in it, "" for the module itself.
_LATER = {
    "distributed": ("fastattn.distributed", ""),
    "integrations": ("fastattn.integrations", ""),
    "kv_cache": ("fastattn.kv_cache", ""),
    "prove": ("fastattn.measuring.prove", "prove"),
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        module, within = _LATER[name]
        found = importlib.import_module(module)
        return getattr(found, within) if within else found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
