"""Attention over the ranks of a torch.distributed mesh.

What a rank sends in a forward, in elements. There are P ranks; n is the largest number of tokens of a rank, about
N / P. Hq and Hkv are the heads of queries and keys, D and Dv the widths of keys and values.

| method | sent |
|---|---|
| "ring" | Hkv (D + Dv) for each own token and each rank that sees it: (P - 1) n Hkv (D + Dv) if all see all |
| "gather" | (P - 1) n Hkv (D + Dv) |
| "heads" | (P - 1) / P n (Hq + max(Hkv, P)) (D + Dv), and (P - 1) / P n Hq for the log-sum-exp if asked |
| "ring x heads" | "heads" over the second dimension, then "ring" over the first with the heads of the rank |

To a rank that sees some keys, "ring" sends those from the first to the last that it sees, from a multiple of 8 on.
In the backward, "ring" and "gather" send the keys again, and as many elements of gradients, in the dtype of the
keys or in float32, as `gradient_dtype` says. "heads" sends what it received. Gradients are summed where they
arrive, in float32 and in a fixed order. `counted()` measures what is sent.
"""

from fastattn.distributed import (  # noqa: F401  (from now on, DTensors are computed)
    propagation,
    tensor_caches,
    tensor_losses,
    tensor_statistics,
    tensors,
)
from fastattn.distributed.context import context_parallel
from fastattn.distributed.dealing import Layout, layout
from fastattn.distributed.exchange import Traffic, counted
from fastattn.distributed.functional import attention
from fastattn.distributed.loss import linear_cross_entropy
from fastattn.distributed.plan import HeadsParallel, HiddenParallel, tensor_parallel_plan
from fastattn.distributed.sharding import shard, unshard

__all__ = [
    "HeadsParallel", "HiddenParallel", "Layout", "Traffic", "attention", "context_parallel", "counted", "layout",
    "linear_cross_entropy", "shard", "tensor_parallel_plan", "unshard",
]  # fmt: skip
