"""The table of PyTorch's kernels: what it says holds on the meta device, where PyTorch's own shape functions take
the place of a GPU, and where sequences lie is found from intervals."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn import masks
from fastattn.core.attention import torch_efficient, torch_routes, torch_trial, torch_varlen
from fastattn.core.attention.spec import AttentionSpec, Saved, ScoreTensors, Wanted
from fastattn.core.attention.torch_routes import KERNELS, ROWS, Call, candidates, example, obstacles
from fastattn.measuring import doctor

HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_has_an_example_that_asks_it_and_an_answer_for_each_kernel(row):
    assert row.asked(example(row)) and len(row.answers) == len(KERNELS)


def tensors_of(call: Call) -> tuple[tuple[Tensor, ...], ScoreTensors]:
    """q, k, v and ScoreTensors on the meta device that make this call."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    (batch, heads, key_heads), (queries, keys), (width, value_width) = call.heads, call.lengths, call.widths
    shapes = ((heads, queries, width), (key_heads, keys, width), (key_heads, keys, value_width))
    inputs = tuple(empty(batch, *shape, dtype=call.dtype) for shape in shapes)
    of = {
        "key_lengths": lambda: empty(batch, dtype=torch.int32),
        "intervals": lambda: empty(batch, 2, queries + keys, dtype=torch.int32),
        "alibi_slopes": lambda: empty(heads).expand(batch, heads),
        "relative_bias": lambda: empty(heads, 33).expand(batch, heads, 33),
        "sinks": lambda: empty(heads).expand(batch, heads),
        "bias": lambda: empty(*call.bias[0], dtype=call.bias[1]),
        "mask": lambda: empty(64, dtype=torch.int64),
        "dropout_state": lambda: empty(batch, 2, dtype=torch.int64),
        "head_scale": lambda: empty(heads).expand(batch, heads),
    }
    return inputs, ScoreTensors(**{name: of[name]() for name in call.given})


def smaller(call: Call) -> Call:
    bias = None if call.bias is None else ((*call.bias[0][:2], 70, 70), call.bias[1])
    return call._replace(lengths=(70, 70), bias=bias)


CALLS = [
    *(smaller(example(row, dtype)) for row in ROWS for dtype in DTYPES),
    *(smaller(example(ROWS[1], dtype))._replace(heads=(2, 8, 2)) for dtype in DTYPES),
    *(smaller(example(ROWS[2]))._replace(lengths=lengths) for lengths in ((70, 90), (90, 70))),
    example(ROWS[0])._replace(widths=(64, 32)),
    *(smaller(example(row))._replace(widths=(59, 20)) for row in ROWS),
    example(ROWS[0])._replace(widths=(576, 512)),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(map(str, (*sorted(call.given), call.dtype))))
def test_a_kernel_that_the_table_names_takes_the_call(call):
    """Its operators take what our code hands them, and return what that expects, by PyTorch's shape functions."""
    (q, k, v), tensors = tensors_of(call)
    assert Call.of(q, k, v, call.spec, tensors, call.wanted if call.backward else None, call.lse_gradient) == call
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    found = torch_varlen.Sequences(ends, ends, call.lengths, False)
    with (
        mock.patch.object(torch_varlen, "_documents", lambda *_: found),
        mock.patch.object(torch_efficient, "_of_lists", lambda *_: torch.empty(70, 80, device="meta")[..., :70]),
        mock.patch.object(torch_trial, "capturing", lambda: True),
    ):
        for kernel in candidates(call, HOPPER):
            out, lse = torch_routes.forward(kernel.module, q, k, v, call.spec, tensors)
            assert (out.shape, out.dtype) == ((*q.shape[:3], v.shape[3]), q.dtype)
            assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32) and lse.is_contiguous()
            saved, wanted = Saved(q, k, v, out, lse), Wanted(*(n in call.given for n in Wanted._fields))
            dlse = lse if call.lse_gradient else None
            gradients = torch_routes.backward(kernel.module, out, dlse, saved, call.spec, tensors, wanted)
            inputs = q, k, v, tensors.bias, tensors.relative_bias, tensors.sinks
            for gradient, of in zip(gradients, inputs, strict=False):
                assert (gradient is None) == (of is None)
                assert of is None or (gradient.shape, gradient.dtype) == (of.shape, of.dtype)


def first(call: Call, capability: tuple[int, int] = HOPPER) -> str:
    return next((kernel.name for kernel in candidates(call, capability)), "")


def plain(dtype: torch.dtype = torch.float16, **changed) -> Call:
    return example(ROWS[0], dtype)._replace(**changed)


def biased(*shape: int) -> Call:
    return plain(lengths=shape[2:], given=frozenset({"bias"}), bias=(shape, torch.float16))


ALIBI = {"given": frozenset({"alibi_slopes"}), "shared": frozenset({"alibi_slopes"})}


@pytest.mark.parametrize(
    ("call", "capability", "kernel", "why_not"),
    [
        (plain(), HOPPER, "cuDNN", ""),
        (plain(torch.float32), HOPPER, "memory-efficient", ""),
        (plain(torch.float64), HOPPER, "", "float64"),
        (plain(torch.bfloat16), TURING, "", "it needs sm_80 for bfloat16"),
        (plain(), TURING, "memory-efficient", ""),
        (plain(widths=(64, 32)), HOPPER, "cuDNN", ""),
        (plain(widths=(20, 20)), HOPPER, "flash", ""),
        (plain(widths=(250, 7)), HOPPER, "flash", ""),
        (plain(widths=(257, 7)), HOPPER, "memory-efficient", ""),
        (plain(torch.float32, widths=(1, 3)), HOPPER, "memory-efficient", ""),
        (plain(widths=(512, 512)), HOPPER, "memory-efficient", ""),
        (plain(lengths=(0, 1024)), HOPPER, "", "nothing is to be computed"),
        (plain(spec=AttentionSpec(causal=True), lengths=(5, 9)), AMPERE, "flash", ""),
        (plain(heads=(40_000, 1, 1), given=frozenset({"key_lengths"})), HOPPER, "memory-efficient", ""),
        (plain(heads=(70_000, 1, 1)), HOPPER, "", "more than 65535"),
        (biased(8, 8, 2**14, 2**14), HOPPER, "", "2**31"),
        (biased(8, 1, 2**14, 2**14), HOPPER, "memory-efficient", ""),
        (biased(1, 1, 2**10, 2**10)._replace(wanted=Wanted(bias=True)), HOPPER, "", "made for every head"),
        (plain(**ALIBI), HOPPER, "memory-efficient", ""),
        (plain(**{**ALIBI, "shared": frozenset()}), HOPPER, "", "larger than the inputs"),
        (plain(**ALIBI, heads=(1, 8, 8)), HOPPER, "", "larger than the inputs"),
        (plain(spec=AttentionSpec(causal=True), given=frozenset({"key_lengths"})), HOPPER, "flash, sequences", ""),
        (plain(spec=AttentionSpec(causal=True), given=frozenset({"key_lengths"}), heads=(30_000, 8, 8)), HOPPER,
         "memory-efficient", ""),
        (plain(spec=AttentionSpec(causal=True), given=frozenset({"intervals"}), lengths=(64, 64)), HOPPER,
         "memory-efficient", ""),
        (plain(spec=AttentionSpec(window=(9, 0)), given=frozenset({"key_lengths"}), heads=(1, 8, 8)), HOPPER,
         "memory-efficient", ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_which_kernel_computes_a_call_and_why_none_does(call, capability, kernel, why_not):
    assert first(call, capability) == kernel
    assert kernel or why_not in obstacles(call, capability)["memory-efficient"]


def test_what_no_kernel_does_is_refused_by_all_and_stays_refused_beside_others():
    refused = [row for row in ROWS if all(isinstance(answer, torch_routes.No) for answer in row.answers)]
    assert {row.name for row in refused} >= {"dropout", "soft cap"}
    for row in refused:
        for other in ROWS:
            both = dict(other.example) | dict(row.example)
            both["given"] = dict(row.example).get("given", frozenset()) | dict(other.example).get(
                "given", frozenset()
            )
            assert first(example(other)._replace(**both)) == ""


def test_what_is_not_in_the_table_is_refused():
    call = plain(given=frozenset({"sequences"}))
    assert first(call) == "" and set(obstacles(call, HOPPER).values()) == {"sequences: not in the table"}
    # A new field of the spec needs a row, or a word here why every kernel computes it: the scale is an argument of
    # all of them, and none is less precise than was asked.
    asked = {"causal", "window", "softcap", "dropout", "mask", "invariant"}
    assert {field.name for field in fields(AttentionSpec)} == asked | {"scale", "precision"}


def test_the_doctor_prints_what_serves_on_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    doctor.report_routes(torch.device("cuda", 0))
    lines = {line[2:35].strip(): line.split("  ") for line in capsys.readouterr().out.splitlines()}
    assert "cuDNN or flash" in lines["full"] and "flash, sequences" in lines["key lengths"]
    assert lines["soft cap"][-1].strip() == "none of PyTorch's has one but flex_attention, which must be compiled"


# ---- sequences ----

FULL, CAUSAL, WINDOWED = SEQUENCES = torch_varlen.FULL, torch_varlen.CAUSAL, torch_varlen.WINDOWED


def seen_of(ends: tuple[Tensor, Tensor], batch: int, queries: int, keys: int, kind: str, left: int) -> Tensor:
    """Which keys queries see in these sequences, bool (B, Lq, Lk), by the definition of cu_seqlens."""
    seen = torch.zeros(batch * queries, batch * keys, dtype=torch.bool)
    for (a, b), (c, d) in zip(*(pairwise(t.tolist()) for t in ends), strict=True):
        diagonal, j = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)
        seen[a:b, c:d] = True if kind == FULL else j <= diagonal
        seen[a:b, c:d] &= (j >= diagonal - left) if kind == WINDOWED else True
    entries = seen.unflatten(0, (batch, queries)).unflatten(2, (batch, keys))
    assert not entries[~torch.eye(batch, dtype=torch.bool)[:, None].expand(-1, queries, -1)].any()
    return entries.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


@given(st.data(), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.sampled_from(SEQUENCES))
@settings(max_examples=300, deadline=None)
def test_sequences_found_from_intervals_show_exactly_these(data, batch, queries, keys, kind):
    bound = st.integers(0, keys)
    start, stop = (
        torch.tensor(data.draw(st.lists(st.lists(bound, min_size=queries, max_size=queries), min_size=batch,
                                        max_size=batch)))
        for _ in range(2)
    )  # fmt: skip
    ends, key = torch_varlen._ends(start, stop, keys, kind), torch.arange(keys)
    if ends is not None:
        left = int((stop - start).amax()) - 1
        seen = (start[..., None] <= key) & (key < stop[..., None])
        assert torch.equal(seen_of(ends, batch, queries, keys, kind, left), seen)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6),
    st.sampled_from(SEQUENCES),
    st.integers(0, 6),
)
@settings(max_examples=300, deadline=None)
def test_packed_sequences_are_found(lengths, kind, left):
    counts = [torch.tensor([0, *n]).cumsum(0) for n in zip(*lengths, strict=True)]
    queries, keys = (int(c[-1]) for c in counts)
    window = (left, None) if kind == WINDOWED else None
    mask = masks.packed_sequences(*counts, causal=kind != FULL, window=window)
    lowered = mask.lower(1, 1, queries, keys, torch.device("cpu"))
    if queries and keys and lowered.intervals is not None:
        start, stop = lowered.intervals[:, :, :queries].long().unbind(1)
        assert any(torch_varlen._ends(start, stop, keys, other) is not None for other in (kind, FULL, CAUSAL))


def test_windows_after_the_diagonal_are_no_sequences():
    starts = torch.tensor([0, 40, 100])
    mask = masks.packed_sequences(starts, starts, window=(9, 3))
    start, stop = mask.lower(1, 1, 100, 100, torch.device("cpu")).intervals[:, :, :100].long().unbind(1)
    assert all(torch_varlen._ends(start, stop, 100, kind) is None for kind in SEQUENCES)


# ---- sinks, which are added to any kernel: on a CPU there is one ----


def test_a_sink_takes_its_share_after_the_kernel():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 33, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sinks = torch.tensor([0.3, -2.0, 5.0, -float("inf")], dtype=torch.float64, requires_grad=True)
    results = []
    seen = torch.rand(33, 33) < 0.5
    seen[3] = False
    for backend in ("portable", "reference"):
        with mock.patch.object(torch_routes, "forward", wraps=torch_routes.forward) as forward:
            out, lse = fastattn.attention(*inputs, sinks=sinks, bias=seen, return_lse=True, backend=backend)
        assert forward.called == (backend == "portable")
        results.append((out, lse, *torch.autograd.grad(out.sin().sum(), (*inputs, sinks))))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
