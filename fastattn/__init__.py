"""fastattn: fused attention and MLP for PyTorch, exact, drop-in, open to look into."""

import sys

from fastattn import lens, nn
from fastattn.functional import attention, attention_backward, gated_mlp, merge_states, mlp
from fastattn.heads import prepare_heads

if "torch.utils.flop_counter" in sys.modules:
    import fastattn.flops  # noqa: F401

__version__ = "0.1.0"

__all__ = [
    "attention",
    "attention_backward",
    "gated_mlp",
    "lens",
    "merge_states",
    "mlp",
    "nn",
    "prepare_heads",
]
