"""What the GPU run times: every rival computes what the definition says, and every call is judged and timed."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch

from benchmarks.gpu import cache_rivals, features
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


# ---- rivals of a cache ----

CACHE = {"dtype": "float32", "batch": 3, "heads": 4, "key_heads": 2, "length": 1, "keys": 80, "width": 16}


def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class PagedDecode:
    """As flashinfer.BatchDecodeWithPagedKVCacheWrapper takes its arguments; each row alone, by its pages."""

    def __init__(self, workspace, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False):
        assert workspace.dtype == torch.uint8 and workspace.numel() == 128 * 2**20
        assert kv_layout == "HND"

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, q_data_type,
        kv_data_type=None,
    ):  # fmt: skip
        assert {t.dtype for t in (indptr, indices, last_page_len)} == {torch.int32}
        assert len(indptr) == len(last_page_len) + 1 and indptr[-1] == len(indices)
        assert (last_page_len > 0).all() and (last_page_len <= page_size).all()
        assert (num_qo_heads, num_kv_heads, head_dim) == (4, 2, 16)
        assert q_data_type == kv_data_type == torch.float32
        self.pages = [indices[begin:end].long() for begin, end in itertools.pairwise(indptr)]
        self.lengths = [
            (len(pages) - 1) * page_size + last
            for pages, last in zip(self.pages, last_page_len.tolist(), strict=True)
        ]

    def run(self, q, paged_kv_cache):
        assert q.shape == (3, 4, 16)
        rows = []
        for row, pages, length in zip(q, self.pages, self.lengths, strict=True):
            k, v = (t[pages].transpose(0, 1).flatten(1, 2)[:, :length] for t in paged_kv_cache)
            rows.append(attend(row[None, :, None], k[None], v[None])[0, :, 0])
        return torch.stack(rows)


def single_decode_with_kv_cache(q, k, v, kv_layout="NHD", pos_encoding_mode="NONE", use_tensor_cores=False):
    """As flashinfer's."""
    assert kv_layout == "HND" and q.shape == (4, 16) and use_tensor_cores
    return attend(q[None, :, None], k[None], v[None])[0, :, 0]


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, page_table=None, causal=False):
    """As flash-attn 3's, of which version 2 has no `page_table`."""
    assert causal and cache_seqlens.dtype == torch.int32
    rows = []
    for number, length in enumerate(cache_seqlens.tolist()):
        if page_table is None:
            k, v = (t[number, :length].transpose(0, 1) for t in (k_cache, v_cache))
        else:
            pages = page_table[number].long()
            k, v = (t[pages].flatten(0, 1)[:length].transpose(0, 1) for t in (k_cache, v_cache))
        rows.append(attend(q[number].transpose(0, 1)[None], k[None], v[None])[0].transpose(0, 1))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "batch", "measured"),
    [
        ("contiguous", 3, {"SDPA", "flex_attention", "flash-attn 2", "flash-attn 3"}),
        ("contiguous", 1, {"SDPA", "flex_attention", "flash-attn 2", "flash-attn 3", "FlashInfer"}),
        ("pages", 3, {"SDPA of copied pages", "FlashInfer", "FlashInfer (tensor cores)", "flash-attn 3"}),
        ("int8 pages", 3, set()),
    ],
)
def test_each_library_is_called_on_a_cache_in_its_own_layout(kind, batch, measured, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    functions = {
        "flashinfer": {
            "BatchDecodeWithPagedKVCacheWrapper": PagedDecode,
            "single_decode_with_kv_cache": single_decode_with_kv_cache,
        },
        "flash_attn": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
        "flash_attn_interface": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
    }
    for module, named in functions.items():
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        for name, function in named.items():
            setattr(sys.modules[module], name, function)
    sizes = Sizes("cache", kind, **{**CACHE, "batch": batch})
    call = kinds.build(sizes, CPU)
    expected = features._first(call, "reference", *call.tensors)
    found = set()
    for name, build in features.rivals(sizes, CPU).items():
        try:
            rival = build()
            given = rival(*call.tensors)
        except (Unavailable, RuntimeError):  # cuDNN is on GPUs only
            continue
        found.add(name)
        torch.testing.assert_close(given, expected, msg=lambda text, n=name: f"{n}: {text}")
    assert found == measured


def test_a_library_that_is_absent_says_so():
    sizes = Sizes("cache", "pages", **CACHE)
    with pytest.raises(Unavailable, match="BatchDecodeWithPagedKVCacheWrapper cannot be imported"):
        features.rivals(sizes, CPU)["FlashInfer"]()


@pytest.mark.parametrize(("kind", "bytes_each"), [("pages", 8), ("int8 pages", 2), ("latent pages", 4)])
def test_needed_are_the_keys_and_values_of_each_row_once(kind, bytes_each):
    sizes = Sizes("cache", kind, **CACHE)
    tokens = 80 + 67 + 54  # from all keys to half of them
    assert cache_rivals.bytes_needed(sizes) == tokens * 2 * 16 * bytes_each
