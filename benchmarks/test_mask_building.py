"""The time to build a mask's lists, beside flex_attention's block mask: `pytest benchmarks/test_mask_building.py`.

Each reports the bytes it leaves, the largest tensor it made on the way, and visited / ideal: granules the kernels
visit over what the seen pairs fill. flex_attention's builder looks at every pair, so it stops at 8192 on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.conftest import DEVICE
from fastattn import masks
from fastattn.masks import algebra
from tests.largest_tensor import LargestTensor

LENGTHS = (8192, 131072)
FLEX_LENGTHS = (8192,) if DEVICE.type == "cpu" else (8192, 32768)


class Case(NamedTuple):
    """A kind of mask at a length, as our mask and as a mask_mod."""

    name: str
    ours: Callable[[int], masks.Mask]
    theirs: Callable[[int], Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] | None


def documents(length: int) -> Tensor:
    """The document of each token: sorted, 128 tokens on average."""
    cuts = torch.randint(0, length, (length // 128,), generator=torch.Generator().manual_seed(0)).sort().values
    return torch.bucketize(torch.arange(length), cuts, right=True).to(DEVICE)


def document_mod(length: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    ids = documents(length)
    return lambda b, h, q, k: (ids[q] == ids[k]) & (k <= q)


def global_mod(length: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return lambda b, h, q, k: ((q - k).abs() <= 256) | (k < 64) | (q < 64)


CASES = (
    Case("causal", lambda n: masks.causal(), lambda n: lambda b, h, q, k: k <= q),
    Case(
        "sliding window",
        lambda n: masks.causal() & masks.window(512),
        lambda n: lambda b, h, q, k: (k <= q) & (q - k <= 512),
    ),
    Case("documents", lambda n: masks.causal() & masks.documents(documents(n)), document_mod),
    Case("longformer", lambda n: masks.longformer(512, range(64)), global_mod),
    Case("bigbird", lambda n: masks.bigbird(), None),
)


@pytest.mark.parametrize("builder", ("fastattn", "flex_attention"))
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_building(benchmark, case: Case, length: int, builder: str) -> None:
    if builder == "flex_attention" and case.theirs is None:
        pytest.skip("flex_attention has no such mask")
    if builder == "flex_attention" and length not in FLEX_LENGTHS:
        pytest.skip("flex_attention would evaluate every pair")
    benchmark.group = f"{case.name}, {length} tokens"

    if builder == "fastattn":
        mask = case.ours(length)

        def build():
            algebra._lower.forget()
            lowered = mask.lower(1, 1, length, length, DEVICE, closed_forms=False)
            synchronise()
            return lowered
    else:
        mask_mod = case.theirs(length)

        def build():
            block_mask = create_block_mask(mask_mod, None, None, length, length, device=DEVICE, BLOCK_SIZE=128)
            synchronise()
            return block_mask

    with LargestTensor() as largest:
        built = build()
    benchmark.extra_info["largest tensor, MB"] = largest.nbytes / 1e6
    benchmark.extra_info["left, MB"] = sum(t.nbytes for t in tensors_of(built)) / 1e6
    if builder == "fastattn":
        benchmark.extra_info["visited / ideal"] = built.visited_granules / built.ideal_granules
    benchmark.pedantic(build, rounds=3, iterations=1)


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def tensors_of(built) -> list[Tensor]:
    parts = built.lists if hasattr(built, "lists") else built.as_tuple()
    return [t for t in parts if isinstance(t, Tensor)]
