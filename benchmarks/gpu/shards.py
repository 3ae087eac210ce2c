"""Which tests run on a GPU, in which order, and how they are cut into shards, one process each."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import PurePosixPath

# Test files of the kernels, the most important first, and the family that each is about.
KERNEL_TESTS = {
    "test_attention": "attention",
    "test_attention_kernels": "attention",
    "test_masked_attention": "masks",
    "test_scores": "scores",
    "test_attention_with_cache": "cache",
    "test_loss": "loss",
    "test_mlp": "mlp",
    "test_norm": "norm",
    "test_heads": "heads",
    "test_derivatives": "tangent",
    "test_varlen": "varlen",
    "test_invariant": "invariant",
    "test_absorbed": "absorbed",
    "test_statistics": "statistics",
}
# Files that compute nothing on a GPU: they run on machines without one, at every commit.
NOT_ON_A_GPU = frozenset(
    {
        "test_bench",
        "test_cli",
        "test_compile_report",
        "test_demo",
        "test_gpu_run",
        "test_gpu_verdict",
        "test_packaging",
        "test_pretended_gpu",
    }
)
OTHER = "modules"  # the family of all other test files: what is built on the kernels

# Seconds a test of these files is expected to take, compiling included; others take OTHER_SECONDS.
KERNEL_SECONDS, OTHER_SECONDS = 2.0, 0.5
SHARD_SECONDS = 25.0  # long against the start of a process, short against a run


def stem(test: str) -> str:
    """The name of a test's file, wherever it lies: "tests/x/test_mlp.py::test_y[1]" -> "test_mlp"."""
    return PurePosixPath(test.partition("::")[0]).stem


def family_of(test: str) -> str:
    return KERNEL_TESTS.get(stem(test), OTHER)


def in_order(tests: Iterable[str], families: Iterable[str] | None = None) -> list[str]:
    """The tests to run, those of kernels first; of these families only, if any are named."""
    wanted = [t for t in tests if stem(t) not in NOT_ON_A_GPU]
    if families is not None:
        wanted = [t for t in wanted if family_of(t) in set(families)]
    ranks = {name: rank for rank, name in enumerate(KERNEL_TESTS)}
    return sorted(wanted, key=lambda t: ranks.get(stem(t), len(ranks)))


def cut(tests: list[str], seconds: dict[str, float] | None = None) -> list[list[str]]:
    """Shards of about SHARD_SECONDS, in the order of the tests. `seconds` is what tests took before.

    The cases of one test function stay together where they fit: they share kernels, which are then compiled once.
    """
    known = seconds or {}

    def cost(test: str) -> float:
        default = KERNEL_SECONDS if stem(test) in KERNEL_TESTS else OTHER_SECONDS
        return known.get(test, default)

    shards: list[list[str]] = []
    filled = SHARD_SECONDS
    for _, group in groupby(tests, key=lambda test: test.partition("[")[0]):
        cases = list(group)
        if filled + sum(map(cost, cases)) > SHARD_SECONDS:
            shards.append([])
            filled = 0.0
        for case in cases:
            if shards[-1] and filled + cost(case) > SHARD_SECONDS:
                shards.append([])
                filled = 0.0
            shards[-1].append(case)
            filled += cost(case)
    return shards
