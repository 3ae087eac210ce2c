"""The time of each option of attention beside plain attention's, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from benchmarks.conftest import DEVICE
from fastattn.core import capabilities

BATCH, HEADS, LENGTH, WIDTH = (4, 16, 4096, 128) if DEVICE.type == "cuda" else (1, 4, 1024, 64)
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BACKEND = "triton" if DEVICE.type == "cuda" and not capabilities.triton_obstacle(DEVICE) else None


def random(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype or DTYPE)


def learned(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return random(*shape, dtype=dtype).requires_grad_()


# The arguments of each call, beside causal.
FEATURES: dict[str, Callable[[], dict]] = {
    # The loss takes lse too: PyTorch's flash attention has no gradient for it, so our own backward runs.
    "plain": lambda: {},
    "window": lambda: {"window": (LENGTH // 8, None)},
    "key lengths": lambda: {"key_lengths": torch.full((BATCH,), LENGTH * 3 // 4, device=DEVICE)},
    "soft cap": lambda: {"softcap": 30.0},
    "ALiBi": lambda: {"alibi_slopes": torch.rand(HEADS, device=DEVICE)},
    "sinks": lambda: {"sinks": learned(HEADS, dtype=torch.float32)},
    "bias": lambda: {"bias": random(1, HEADS, LENGTH, LENGTH)},
    "bias, learned": lambda: {"bias": learned(1, HEADS, LENGTH, LENGTH)},
    "boolean mask": lambda: {"bias": random(1, 1, LENGTH, LENGTH) > 0},
    "relative bias, learned": lambda: {"relative_bias": learned(HEADS, 257, dtype=torch.float32)},
    "dropout": lambda: {"dropout_p": 0.1},
    "scale of each head": lambda: {"scale": learned(HEADS, dtype=torch.float32)},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_cost(benchmark, feature: str) -> None:
    q, k, v = (learned(BATCH, HEADS, LENGTH, WIDTH) for _ in range(3))
    arguments = FEATURES[feature]()
    leaves = [q, k, v, *(t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad)]

    def step() -> None:
        out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True, backend=BACKEND, **arguments)
        torch.autograd.grad(out.sum() + lse.sum(), leaves)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"cost, {BATCH} x {HEADS} x {LENGTH} x {WIDTH} {DTYPE}, forward and backward"
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
