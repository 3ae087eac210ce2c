"""The backends: modules with the same functions, chosen by fastattn.capabilities.

attention_forward(q, k, v, spec) -> out, lse
attention_backward(dout, q, k, v, out, lse, dlse, spec) -> dq, dk, dv
"""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("triton", "portable", "reference")


def load(name: str) -> ModuleType:
    """The backend's module; Triton is imported here, when first asked for, and nowhere else."""
    return importlib.import_module(f"fastattn.backends.{name}")
