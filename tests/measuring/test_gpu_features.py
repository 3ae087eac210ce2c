"""What the GPU run times: every rival computes what the definition says, and every call is judged and timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import features
from fastattn.measuring import checking, kinds, prove_worker
from fastattn.measuring.kinds import MASK_KINDS, SCORE_KINDS, Sizes
from fastattn.measuring.peers import DIRECTIONS, FORWARD, Unavailable

CPU = torch.device("cpu")
SMALL = {"dtype": "float32", "batch": 2, "heads": 4, "key_heads": 2, "length": 64, "width": 16}
CALLS = [
    *(Sizes("attention", kind, **SMALL) for kind in ("full", "causal")),
    *(Sizes("masks", kind, **SMALL) for kind in MASK_KINDS),
    *(Sizes("scores", kind, **SMALL) for kind in SCORE_KINDS if kind != "everything"),
    *(Sizes("varlen", kind, **{**SMALL, "batch": 1}) for kind in ("full", "causal")),
    *(Sizes("norm", kind, **SMALL) for kind in ("rms", "layer", "rms residual", "layer residual")),
    *(Sizes("heads", kind, **SMALL) for kind in ("norm rotary scale", "rotary", "norm")),
    Sizes("statistics", "causal: entropy received", **SMALL),
    *(Sizes("mlp", kind, **SMALL, hidden=32) for kind in ("gelu whole", "silu gated whole")),
]


def every_rival(sizes: Sizes) -> dict:
    """Those that run on a CPU; of SDPA, the backend that does."""
    found = dict(features.rivals(sizes, CPU))
    if sizes.family in ("attention", "masks", "scores"):
        found = {name: build for name, build in found.items() if not name.startswith("SDPA")}
        found["SDPA"] = lambda: features._sdpa(sizes, CPU, "MATH")
    others = ("torch varlen_attn", "flash-attn 4", *features.YARDSTICKS)
    return {name: build for name, build in found.items() if name not in others}


@pytest.mark.parametrize("sizes", CALLS, ids=lambda sizes: f"{sizes.family} {sizes.kind}")
def test_every_rival_computes_what_the_definition_says(sizes, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    call = kinds.build(sizes, CPU)
    expected = features._first(call, "reference", *call.tensors)
    measured = 0
    for name, build in every_rival(sizes).items():
        try:
            rival = build()
        except Unavailable:
            continue
        with torch.no_grad():
            error = features.relative_error(rival(*call.tensors), expected, sizes, name)
        assert error < (0.05 if sizes.kind == "dropout" else 1e-4), name
        measured += 1
    assert measured >= 1


@pytest.mark.parametrize("kind", ["feature", "small call"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_call_is_timed_against_its_rivals_in_every_direction(kind, direction, monkeypatch):
    monkeypatch.setattr(features, "OURS", "eager")
    sizes = Sizes("norm", "rms residual", **SMALL)
    case = features.case_of(sizes, direction, kind, ["compiled eager"], rounds=2, seconds=0.0, calls=2)
    rows = features.compare({**case, "peers": ["eager"]}, CPU, lambda step: None)
    assert (
        [row["peer"] for row in rows] == ["eager"] and rows[0]["seconds"] > 0 and rows[0]["label"] == case["label"]
    )


def test_a_rival_that_is_wrong_is_not_timed_and_ours_counts_as_failed(monkeypatch):
    monkeypatch.setattr(features, "rivals", lambda *_: {"eager": lambda: lambda x, weight: x * 0})
    monkeypatch.setattr(features, "OURS", "fastattn portable")
    monkeypatch.setattr(features, "_first", lambda call, backend, *tensors: tensors[0] * (backend == "reference"))
    sizes = Sizes("norm", "rms", **SMALL)
    case = features.case_of(sizes, FORWARD, "feature", [], rounds=1, seconds=0.0)
    rows = {row["peer"]: row for row in features.compare(case, CPU, lambda step: None)}
    assert all(row["seconds"] is None and row["note"].startswith("wrong") for row in rows.values())
    assert rows["fastattn portable"]["failed"] and not rows["eager"]["failed"]


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes("attention", "causal", **SMALL),
        Sizes("masks", "bigbird", **SMALL),
        Sizes("scores", "sinks", **SMALL),
        Sizes("mlp", "silu gated", "float32", batch=1, length=20, width=16, hidden=24),
        Sizes("norm", "layer residual", **SMALL),
        Sizes("heads", "norm rotary scale", **SMALL),
        Sizes("tangent", "causal", **SMALL),
        Sizes("varlen", "causal", **{**SMALL, "batch": 1}),
        Sizes("statistics", "causal: max_logit entropy received lag_profile", **SMALL),
    ],
    ids=lambda sizes: sizes.family,
)
def test_a_plain_case_passes_and_a_wrong_kernel_fails_it(sizes, monkeypatch):
    small = {"length": 40} if sizes.family not in ("mlp", "varlen") else {}
    sizes = Sizes(**{**sizes.as_json(), **small})
    rows = checking.check_kernel(sizes, CPU, lambda step: None)
    assert rows and all(row["verdict"] == "passed" for row in rows), rows
    results = checking.results_and_gradients

    def slightly_wrong(call, backend, *more):
        found = results(call, backend, *more)
        return {name: t * 1.01 for name, t in found.items()} if backend == "triton" else found

    monkeypatch.setattr(checking, "results_and_gradients", slightly_wrong)
    rows = checking.check_kernel(sizes, CPU, lambda step: None)
    assert all(row["verdict"].startswith("FAILED") for row in rows)


def test_each_run_of_a_check_begins_in_the_forward_s_direction(monkeypatch):
    """Also those that go by a plan and by a recording: spills are counted by direction."""
    spilling, seen, results = prove_worker.Spilling("forward"), [], checking.results_and_gradients

    def noted(*given):
        seen.append(spilling.direction)
        found = results(*given)
        seen.append(spilling.direction)
        return found

    monkeypatch.setattr(checking, "results_and_gradients", noted)
    checking.check_kernel(Sizes("norm", "rms", **{**SMALL, "length": 40}), CPU, spilling.step)
    assert seen[:6] == ["forward", "backward"] * 3


@pytest.mark.parametrize("kind", ["gelu int8", "silu gated eager"])
def test_an_mlp_that_keeps_8_bits_or_rounds_as_eager_passes_and_one_that_is_a_tenth_off_fails(kind, monkeypatch):
    sizes = Sizes("mlp", kind, "float32", batch=1, length=20, width=16, hidden=150)
    rows = checking.check_kernel(sizes, CPU, lambda step: None)
    assert all(row["verdict"] == "passed" for row in rows), rows
    results = checking.results_and_gradients

    def wrong(call, backend, *more):
        found = results(call, backend, *more)
        return {name: t * 1.1 for name, t in found.items()} if backend == "triton" else found

    monkeypatch.setattr(checking, "results_and_gradients", wrong)
    rows = checking.check_kernel(sizes, CPU, lambda step: None)
    assert all(row["verdict"].startswith("FAILED") for row in rows)
