"""What looks like attention or a norm in other people's models, so that a report can name what was not swapped."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from torch import nn

ATTENDS = re.compile(r"attention|attn", re.I)
NORMS = re.compile(r"norm", re.I)
# Norms that are not over the last dimension, and other words that contain "norm".
OTHER_NORMS = re.compile(r"batch|group|instance|spectral|weight_?norm|normal|response", re.I)
QUERIES = re.compile(r"^(to_?|w_?|attn_?)?(q|query|queries)(_?(proj|lin|linear|net|dense|a_proj|b_proj))?$", re.I)
KEYS = re.compile(r"^(to_?|w_?|attn_?)?(k|v|kv|key|value|keys|values)(_?(proj|lin|linear|net|dense))?$", re.I)
PACKED = re.compile(r"qkv|^c_attn$|^in_proj$|^query_key_value$|^W?pack$", re.I)
COMPUTES = re.compile(
    r"softmax|einsum|baddbmm|bmm\(|matmul|flash_attn|flex_attention|memory_efficient_attention| @ "
)
TORCHS = re.compile(r"scaled_dot_product_attention\(")


@functools.cache
def source_of(kind: Any) -> str:
    try:
        return inspect.getsource(kind)
    except Exception:
        # A class made at run time or typed at a prompt has no source file.
        return ""


def attends(module: nn.Module) -> str | None:
    """Advice for a module whose own code seems to compute attention; None if it does not seem so."""
    kind: Any = type(module)
    if kind.__module__.startswith(("torch.", "fastattn.")):
        return None
    if "A_log" in module._parameters:
        return None  # A state-space model (Mamba): its in_proj does not compute queries.
    code, parts = source_of(kind), [name for name, _ in module.named_children()]
    projects = any(map(QUERIES.match, parts)) and any(map(KEYS.match, parts))
    projects = projects or any(map(PACKED.search, parts))
    if TORCHS.search(code):
        return "its own code attends; fastattn.sdpa.activate() serves the scaled_dot_product_attention it calls"
    if projects or (ATTENDS.search(kind.__name__) and (not code or COMPUTES.search(code))):
        return "its own code attends; call fastattn.attention in it"
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether it has the name of a norm over the last dimension, and no modules inside."""
    name = type(module).__name__
    known = NORMS.search(name) and not OTHER_NORMS.search(name)
    return bool(known) and not any(True for _ in module.children())


def may_be_norm(module: nn.Module) -> bool:
    """Whether it has the parts of a norm, whatever its name: a weight, maybe a bias, and nothing else."""
    if type(module).__module__.startswith(("torch.", "fastattn.")) or any(True for _ in module.children()):
        return False
    weights = [t for t in module._parameters.values() if t is not None]
    return len(weights) in (1, 2) and all(t.dim() == 1 and t.shape == weights[0].shape for t in weights)
