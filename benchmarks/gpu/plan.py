"""The cases, the most important first: a deadline cuts off the end of a list.

A `Plan` is the run's or, for --dry-run, that of its rehearsal on a pretended GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.gpu import cache_rivals, features, rehearsal, sweep
from benchmarks.gpu.kernel_cases import kernel_cases
from fastattn.measuring import prove_cases
from fastattn.measuring.kinds import Sizes
from fastattn.measuring.peers import (
    BACKWARD,
    FORWARD,
    GPU_LIBRARIES,
    TRAINING,
    AttentionProblem,
    MLPProblem,
    Problem,
    describe,
)

Case = dict[str, Any]

# Only installed libraries are compared; the report lists the others once.
LIBRARIES = {**GPU_LIBRARIES, **cache_rivals.LIBRARIES}
ABSENT = [peer for peer, module in LIBRARIES.items() if importlib.util.find_spec(module) is None]
ATTENTION_RIVALS = [
    peer
    for peer in ("SDPA cuDNN", "SDPA flash", "SDPA memory-efficient", "flash-attn 4", "SageAttention")
    if peer not in ABSENT
]
MLP_RIVALS = [peer for peer in ("plain GEMMs", "compiled eager", "eager", "quack", "Liger") if peer not in ABSENT]
# flex_attention compiles for seconds at each problem, so it is timed at a few only.
FLEX_LENGTHS, FLEX_WIDTHS = (4096, 16384), (64, 128)
TOKENS = 16384
BUILT = ("FlashInfer", "FlashInfer (tensor cores)")  # built by the compiler for C++ when first called


@dataclass(frozen=True)
class Plan:
    """Everything that differs between the run and its rehearsal. Times in seconds."""

    device: str  # cuda, or pretended
    budget: float
    step_limit: float
    suite: tuple[str, ...]
    processes: int
    kernels: tuple[Case, ...]
    record: tuple[Case, ...]
    correctness: tuple[Case, ...]
    ceilings: Case
    attention: tuple[Case, ...]
    mlp: tuple[Case, ...]
    features: tuple[Case, ...]
    small_calls: tuple[Case, ...]
    candidates: int
    sweeps: int
    rounds: int
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def rehearsal(self) -> bool:
        return self.device == "pretended"

    def of(self, families: list[str]) -> Plan:
        """Only the cases of these families."""

        def chosen(cases: tuple[Case, ...]) -> tuple[Case, ...]:
            # What the tests call tangents, users call forward mode.
            named = [*families, *(["forward mode"] if "tangent" in families else [])]
            return tuple(case for case in cases if case["family"] in named)

        lists = ("kernels", "record", "correctness", "attention", "mlp", "features", "small_calls")
        return replace(self, **{name: chosen(getattr(self, name)) for name in lists})


BUDGET = 540.0  # a machine may be lent in commands of ten minutes


def real_plan() -> Plan:
    """One GPU, nine minutes a call."""
    timing = {"rounds": 7, "seconds": 0.01}
    return Plan(
        device="cuda",
        budget=BUDGET,
        step_limit=60.0,
        suite=("tests",),
        processes=max(1, min(16, os.cpu_count() or 1)),
        kernels=tuple(kernel_case(sizes) for sizes in kernel_cases()),
        record=tuple(prove_cases.cases()),
        correctness=tuple(correctness_cases()),
        ceilings={"kind": "ceilings", "side": 8192, "bytes": 2**31, "rounds": 9, "seconds": 0.02},
        attention=tuple(attention_cases(timing)),
        mlp=tuple(mlp_cases(timing)),
        features=tuple(features.cases(timing, ABSENT)),
        small_calls=tuple(features.small_calls({"rounds": 7, "calls": 200}, ABSENT)),
        candidates=sweep.CANDIDATES,
        sweeps=6,
        rounds=7,
        # Several workers compile at once: a pool of a few processes each is enough.
        environment=(("TORCHINDUCTOR_COMPILE_THREADS", "4"), ("TRITON_INTERPRET", "0"), ("OMP_NUM_THREADS", "1")),
    )


def dry_plan(until: str = "ptx") -> Plan:
    """The same cases, launched on a pretended GPU: of the proofs one of each kind, of the test suite one quick
    file; tilings are tried of one call. (tests/test_pretended_gpu.py launches every dtype and width.) `until`: the
    compiler's last stage."""
    real = real_plan()
    one_of_each = {(case["family"], case["sizes"]["kind"]): case for case in reversed(real.kernels)}
    one_row = {(case["family"], case["proves"]): case for case in reversed(real.record)}
    return replace(
        real,
        kernels=tuple(reversed(one_of_each.values())),
        record=tuple(
            {**case, "checks": case["checks"][:1], "tiled": case["tiled"] and case["proves"] == "causal"}
            for case in reversed(one_row.values())
        ),
        device="pretended",
        budget=3600.0,  # shares of it are far more than any section takes, on a busy machine too
        step_limit=300.0,
        suite=("tests/core/test_capabilities.py",),
        processes=max(1, min(16, os.cpu_count() or 1)),
        candidates=2,
        sweeps=2,
        environment=(*real.environment, (rehearsal.UNTIL, until)),
    )


def kernel_case(sizes: Sizes) -> Case:
    return {"kind": "kernel", "family": sizes.family, "label": f"{sizes.family}: {sizes.label}",
            "sizes": sizes.as_json()}  # fmt: skip


def peers_case(problem: Problem, direction: str, peers: list[str], timing: dict[str, Any]) -> Case:
    return {
        "kind": "peers",
        "family": problem.family,
        "problem": describe(problem),
        "label": problem.label,
        "direction": direction,
        "peers": peers,
        **timing,
    }


def attention_cases(timing: dict[str, Any]) -> list[Case]:
    """Constant tokens and constant heads x width; first the lengths and widths that are trained most, causal."""
    cases = []
    common, others = (4096, 16384), (1024, 2048, 8192, 512, 32768)
    groups = [(common, (128, 64), (True,)), (common, (128, 64), (False,)), (common, (256,), (True, False))]
    for lengths, widths, masks in (*groups, (others, (128, 64, 256), (True, False))):
        for length, width, causal in itertools.product(lengths, widths, masks):
            problem = AttentionProblem(max(1, TOKENS // length), 2048 // width, length, width, causal)
            rivals = list(ATTENTION_RIVALS)
            if length in FLEX_LENGTHS and width in FLEX_WIDTHS:
                rivals.append("flex_attention")
            for direction in (FORWARD, BACKWARD):
                cases.append(peers_case(problem, direction, ["fastattn triton", *rivals], timing))
    return cases


def mlp_cases(timing: dict[str, Any]) -> list[Case]:
    """Widths 256 to 8192, hidden 4 d, or 8/3 d gated (rounded to 128); fewer tokens where a product is large."""
    cases = []
    for widths in ((1024, 4096, 256), (512, 2048, 8192)):
        for width in widths:
            for gated in (False, True):
                hidden = (8 * width // 3 + 127) // 128 * 128 if gated else 4 * width
                problem = MLPProblem(min(TOKENS, TOKENS * 4096 // width), width, hidden, gated)
                for direction in (FORWARD, TRAINING):
                    cases.append(peers_case(problem, direction, ["fastattn triton", *MLP_RIVALS], timing))
    return cases


def attention_check(
    batch: int,
    heads: int,
    key_heads: int,
    queries: int,
    keys: int,
    width: int,
    causal: bool,
    dtype: str,
    backend: str,
) -> Case:
    sizes = {
        "batch": batch,
        "heads": heads,
        "key_heads": key_heads,
        "queries": queries,
        "keys": keys,
        "width": width,
        "causal": causal,
        "dtype": dtype,
    }
    mask = "causal" if causal else "full"
    label = f"{mask} B{batch} H{heads}/{key_heads} {queries} x {keys} D{width} {dtype}"
    kind = {"kind": "check attention", "family": "attention"}
    return {**kind, "label": label, "sizes": sizes, "backend": backend}


def mlp_check(problem: MLPProblem, backend: str) -> Case:
    kind = {"kind": "check mlp", "family": "mlp"}
    return {**kind, "label": problem.label, "problem": describe(problem), "backend": backend}


def correctness_cases() -> list[Case]:
    """4k to 32k; every width, both masks, grouped heads, odd lengths, and queries and keys of different
    lengths."""
    attention = [
        (1, 4, 4, 4096, 4096, 128, True, "bfloat16"), (1, 4, 4, 4096, 4096, 64, True, "bfloat16"),
        (1, 2, 2, 4096, 4096, 256, True, "bfloat16"), (1, 2, 2, 32768, 32768, 128, True, "bfloat16"),
        (1, 4, 2, 8192, 8192, 128, False, "bfloat16"), (1, 4, 1, 4001, 5003, 80, True, "bfloat16"),
        (1, 2, 2, 16384, 16384, 64, False, "float16"), (1, 2, 2, 5003, 4001, 128, True, "float16"),
        (2, 2, 2, 4096, 4096, 128, True, "float32"), (1, 2, 2, 16384, 16384, 256, False, "bfloat16"),
        (1, 2, 1, 32768, 32768, 64, True, "float16"), (1, 2, 2, 8191, 8193, 40, False, "bfloat16"),
    ]  # fmt: skip
    mlps = [(8192, 256, 1024), (8192, 1024, 4096), (4096, 4096, 16384)]
    cases = [attention_check(*sizes, backend="triton") for sizes in attention]
    checks = [mlp_check(MLPProblem(*sizes, gated), "triton") for sizes in mlps for gated in (False, True)]
    # Alternating, so that neither is lost if time runs out.
    return cases[:4] + checks[:4] + cases[4:] + checks[4:]


def warm_cases(plan: Plan) -> list[Case]:
    """One case for each thing that compiles differently: kernels see lengths only through how many heads share
    the cache, and torch.compile sees every size."""
    chosen: dict[Any, Case] = {}
    for case in (*plan.attention, *plan.mlp):
        problem = case["problem"]
        peers = [p for p in case["peers"] if p.startswith("fastattn") or p in ("flex_attention", "compiled eager")]
        if problem["family"] == "attention":
            alike = (problem["width"], problem["causal"], min(3, max(0, problem["length"] // 8192)))
            key = tuple(problem.values()) if "flex_attention" in peers else alike
        else:
            key = tuple(problem.values())
        if key not in chosen:
            chosen[key] = {"kind": "warm", "label": case["label"], "problem": problem, "peers": peers}
    for case in (*plan.features, *plan.small_calls):
        peers = [p for p in case["peers"] if p in (features.OURS, "flex_attention", "compiled eager", *BUILT)]
        chosen.setdefault(case["label"], {**case, "kind": "warm", "peers": peers})
    return list(chosen.values())
