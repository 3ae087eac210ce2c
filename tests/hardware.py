"""Where the tests run: on a GPU the Triton kernels run on it, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

if not ON_GPU:
    # Triton decides when a kernel is defined: before any test module imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")
