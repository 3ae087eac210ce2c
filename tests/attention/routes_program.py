"""Calls on a pretended GPU, by PyTorch's kernels: what is wrong of each, which kernels computed it, and how many
operators it took. Prints JSON. A process of its own, see test_gpu_routes."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace
from functools import partial
from unittest import mock

import torch

import fastattn
from fastattn import masks
from fastattn.core import capabilities, plans
from fastattn.core.attention import torch_efficient, torch_fused, torch_routes, torch_trial, whole_rows
from fastattn.measuring import checking, kinds, prove_worker, tolerance
from fastattn.measuring.kinds import Sizes
from tests.attention import torch_stand_ins
from tests.attention.torch_stand_ins import CALLS, FAULTS
from tests.pretended_gpu import GPUS, pretended_gpus
from tests.pretended_gpu.tensors import planned

warnings.simplefilter("ignore")
ABOUT = {"dtype": "float16", "batch": 2, "length": 100, "width": 32}
TINY = {"float16": 1e-3, "float32": 1e-6}

found: dict[str, object] = {}
said: list[str] = []


def wrong(call: kinds.Call, sizes: Sizes, tiny: float | None = None) -> str:
    computed, double = checking.results_and_gradients, tuple(t.double() for t in call.tensors)
    ours, eager = (computed(call, backend, call.tensors, sizes) for backend in ("portable", "reference"))
    for name, exact in computed(call, "reference", double, sizes).items():
        judged = tolerance.judge(
            ours[name], exact, eager[name].to(ours[name].dtype), gradient=name[0] == "d",
            tiny=tiny or TINY[sizes.dtype], dtype=getattr(torch, sizes.dtype),
        )  # fmt: skip
        if judged.wrong:
            return f"{name}: {judged.wrong}"
    return ""


def tried(family: str, kind: str, **other) -> list:
    sizes = Sizes(family, kind, **{**ABOUT, **other})
    plans.forget()
    CALLS.clear()
    return [wrong(kinds.build(sizes, device), sizes), called()]


def called() -> list[str]:
    """Which kernels were, but for the steps around them."""
    return sorted(set(CALLS) - {torch_stand_ins.FUSED})


def compared(inputs: tuple, learned: str = "", **options) -> list:
    """Portable against the definition, by the tests' rule; `learned` is an option that has a gradient, `of_lse`
    says how large that of the log-sum-exp is, NaN in rows that see nothing, and `alone` that out has none."""
    of_lse, alone = options.pop("of_lse", 0.0), options.pop("alone", False)
    lse = fastattn.attention(*inputs, **options, return_lse=True, backend="reference")[1]
    given = [*inputs, options.pop(learned)] if learned else [*inputs]

    def results(backend: str, tensors: list) -> tuple:
        leaves = [t.detach().requires_grad_() for t in tensors]
        beside = {**options, **({learned: leaves[3]} if learned else {})}
        out, lse = fastattn.attention(*leaves[:3], **beside, return_lse=True, backend=backend)
        above = [(out, upstream.to(out.dtype)), (lse, upstream_lse.to(lse.dtype))]
        above = above[1:] if alone else above if of_lse else above[:1]
        return out, lse, *torch.autograd.grad([a for a, _ in above], leaves, [b for _, b in above])

    torch.manual_seed(1)
    upstream = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], device=device)
    upstream_lse = (torch.randn(lse.shape, device=device) * of_lse).masked_fill(lse.isinf(), float("nan"))
    CALLS.clear()
    ours = results("portable", given)
    taken = called()
    eager, exact = results("reference", given), results("reference", [t.double() for t in given])
    differ = []
    for name, a, e, x in zip(("out", "lse", "dq", "dk", "dv", "dbeside"), ours, eager, exact, strict=False):
        seen = x.isfinite()
        about = {"gradient": name[0] == "d", "tiny": TINY["float16"] * (of_lse or 1.0), "dtype": torch.float16}
        if name == "dbeside":
            # A sum over all rows of roundings of dout * out, which add up as random numbers do.
            about["tiny"] += (
                torch.finfo(torch.float16).eps
                * float((upstream * exact[0]).norm().cpu())
                * (32**0.5 if learned == "scale" else 1.0)
            )
        judged = tolerance.judge(*(t[seen].cpu() for t in (a, x, e.to(a.dtype))), **about)
        if judged.wrong or not torch.equal(a.isfinite(), seen):
            differ.append(f"{name}: {judged.wrong}")
    return [" ".join(differ), taken]


def count(family: str, kind: str, **other) -> list[list]:
    """Of a forward and of a backward the operators, and how often they touch what must be touched once."""
    sizes = Sizes(family, kind, **{**ABOUT, "length": 128, "batch": 8, "width": 64, "heads": 2, **other})
    of_lse = kind.endswith(kinds.LSE)
    call = kinds.build(replace(sizes, kind=kind.removesuffix(kinds.LSE)), device)
    launched = torch_stand_ins.launched(call, of_lse)
    names = [[name for name, _ in each] for each in launched]
    return [*names, *torch_stand_ins.times_touched(launched, call)]


class Hearing(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger("fastattn").addHandler(Hearing())
with pretended_gpus(GPUS["H100"]), torch_stand_ins.operators(prefers_cudnn=False):
    device = torch.device("cuda", 0)
    kinds_tried = {
        "attention": ("full", "causal"),
        "masks": ("key lengths", "boolean mask", "window", "documents", "random lists", "bigbird"),
        "scores": ("bias", "padding bias", "softcap", "alibi", "relative bias", "sinks", "dropout", "head scale"),
    }
    for family, several in kinds_tried.items():
        for kind in several:
            for dtype in ("float16", "float32"):
                found[f"{kind} {dtype}"] = tried(family, kind, dtype=dtype)
    with mock.patch.object(torch_efficient, "MOST_KEPT", 0):
        for kind in ("alibi", "relative bias"):
            found[f"{kind}, distances not kept"] = tried("scores", kind)
    # Steps, cut into blocks of some rows and heads.
    for elements in (2**12, 2**13):
        cut = {"GPU_ELEMENTS": elements, "GPU_ROWS": 48, "GPU_CAUSAL_ROWS": 32}
        with mock.patch.multiple(whole_rows, **cut):
            for kind in ("softcap", "dropout", "everything"):
                for dtype in ("float16", "float32"):
                    sizes = Sizes("scores", kind, dtype, 3, length=70, width=24)
                    plans.forget()
                    CALLS.clear()
                    # As small as where steps are not fused, see test_gpu_steps.
                    failed = wrong(kinds.build(sizes, device), sizes, max(1e-5, TINY[dtype]))
                    found[f"{kind} in blocks of {elements} {dtype}"] = [failed, sorted(set(CALLS))]
    found["bias of every head"] = tried("scores", "bias", batch=5)
    found["alibi, larger than the inputs"] = tried("scores", "alibi", batch=1, width=8)
    for name, widths in (("20", (20, 20)), ("59 and 33", (59, 33)), ("3 and 40", (3, 40))):
        width = {"width": widths[0], "value_width": widths[1]}
        for kind in ("key lengths", "full") if name == "20" else ("full",):
            for dtype in ("float16", "float32"):
                family = "attention" if kind == "full" else "masks"
                found[f"{kind}, widths {name} {dtype}"] = tried(family, kind, dtype=dtype, **width)
    found["width 320"] = tried("attention", "causal", width=320, length=40)
    found["values 16 wide"] = tried("attention", "full", value_width=16)
    found["other lengths"] = tried("attention", "causal", keys=130)
    found["fewer keys"] = tried("attention", "causal", keys=70)
    found["lse gradient"] = tried("attention", f"causal{kinds.LSE}")

    # Rows that see nothing, NaN behind the lengths, left padding beside a causal mask.
    q, k, v = kinds.heads_of(Sizes("masks", "full", **ABOUT), device)
    lengths = torch.tensor([0, 77], device=device)
    padding = (torch.arange(100, device=device) >= torch.tensor([3, 100], device=device)[:, None])[:, None, None]
    behind = (torch.arange(100, device=device) >= lengths[:, None])[:, None, :, None]
    spoiled = [t.masked_fill(behind, float("nan")) for t in (k, v)]
    sinks = torch.tensor([0.5, -1.0, 3.0, -float("inf")], device=device)
    bias32 = torch.randn(1, 4, 100, 100, device=device)
    place = torch.arange(100, device=device)
    spoiled_bias = bias32.half().masked_fill(place > place[:, None], float("nan"))
    packed = torch.tensor([0, 13, 13, 40, 100], device=device)
    uneven = torch.tensor([0, 20, 25, 25, 100], device=device)
    of_heads = masks.from_dense((torch.arange(4 * 100 * 100) * 7 % 11 < 4).view(1, 4, 100, 100))
    scales = torch.tensor([0.2, -0.1, 0.3, 0.05], device=device)
    sequences = partial(masks.packed_sequences, packed, uneven)
    documents = masks.documents(torch.arange(100) // 30)
    one = [t[:1] for t in (q, k, v)]
    found |= {
        "empty entries": compared((q, *spoiled), key_lengths=lengths),
        "empty entries, causal": compared((q, *spoiled), key_lengths=lengths, causal=True),
        "empty entries, causal, other lengths": compared(
            (q[:, :, :70], *spoiled), key_lengths=lengths, causal=True
        ),
        "empty entries, causal, fewer keys": compared(
            (q, *(t[:, :, :80] for t in spoiled)), key_lengths=lengths, causal=True
        ),
        "empty entries, later keys": compared((q, *spoiled), key_lengths=lengths, window=(None, 4)),
        "lse gradient, key lengths, causal": compared(
            (q, *spoiled), "sinks", key_lengths=lengths, causal=True, sinks=sinks.clamp(min=-2.0), of_lse=1.0
        ),
        "empty rows": compared((q, k, v), bias=padding, causal=True),
        "both": compared((q, *spoiled), bias=padding, key_lengths=lengths, causal=True),
        "sinks beside empty entries": compared((q, *spoiled), "sinks", key_lengths=lengths,
                                               sinks=sinks.clamp(min=-2.0)),
        "sinks": compared((q, k, v), "sinks", sinks=sinks, causal=True),
        "window and key lengths": compared((q, *spoiled), key_lengths=lengths, window=(20, 3)),
        "mask and window": compared((q, k, v), bias=torch.rand(100, 100, device=device) < 0.5, window=(20, 3)),
        "bias with NaN behind a window": compared((q, k, v), bias=spoiled_bias, causal=True, window=(60, 0)),
        "bias in float32": compared((q, k, v), "bias", bias=bias32),
        "bias beside alibi": compared((q, k, v), bias=bias32.half(), alibi_slopes=sinks.abs().clamp(max=1.0)),
        "full documents": compared((q, k, v), mask=documents),
        "documents and key lengths": compared((q, *spoiled), mask=documents, key_lengths=lengths),
        "scales and key lengths": compared((q, *spoiled), "scale", scale=scales, key_lengths=lengths),
        "scales and mask": compared((q, k, v), "scale", scale=scales, bias=padding, causal=True),
        "scales and a bias": compared((q, k, v), "scale", scale=scales, bias=bias32),
        "scales and sinks": compared((q, k, v), "scale", scale=scales, sinks=sinks, causal=True),
        "lists of each head": compared((q, k, v), mask=of_heads),
        "lists and key lengths": compared((q, *spoiled), mask=of_heads, key_lengths=lengths),
        **{
            f"lse gradient, {name}": compared((q, k, v), learned, of_lse=of_lse, **options)
            for name, of_lse, learned, options in (
                ("causal", 1.0, "", {"causal": True}),
                ("large", 1e5, "", {}),
                ("small", 1e-3, "", {"causal": True, "alone": True}),
                ("window", 1.0, "", {"window": (20, 3)}),
                ("sequences", 1.0, "", {"key_lengths": lengths}),
                ("sinks", 1.0, "sinks", {"sinks": sinks, "causal": True}),
                ("scale", 1.0, "scale", {"scale": scales, "causal": True}),
                ("mask", 1.0, "", {"bias": padding, "causal": True}),
                ("bias", 1.0, "bias", {"bias": bias32.half(), "causal": True}),
                ("relative bias", 1.0, "relative_bias", {"relative_bias": bias32[0, :, 0, :99]}),
            )
        },
        "lse gradient, widths": compared((q[..., :19], k[..., :19], v[..., :3]), of_lse=1.0),
        "packed": compared(one, mask=sequences()),
        "packed, causal": compared(one, mask=sequences(causal=True)),
        "packed, window": compared(one, mask=sequences(causal=True, window=(9, None))),
        "packed, window after the diagonal": compared(one, mask=sequences(window=(9, 3))),
        "packed, sinks": compared(one, mask=sequences(), sinks=sinks),
    }  # fmt: skip

    for name, added in (("relative bias", torch.randn(4, 257, device=device) * 40), ("bias", bias32 * 40)):
        CALLS.clear()
        options = {name.replace(" ", "_"): added, "return_lse": True}
        _, lse = fastattn.attention(q, k, v, **options, backend="portable")
        taken = called()
        _, exact = fastattn.attention(*(t.double() for t in (q, k, v)), **options, backend="reference")
        found[f"{name}, large"] = [float((lse - exact).abs().max().cpu()), taken]

    with planned():
        calls = []
        for _ in range(3):
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            with mock.patch.object(torch_routes, "serving", wraps=torch_routes.serving) as serving:
                results = fastattn.attention(*leaves, causal=True, return_lse=True)
                gradients = torch.autograd.grad(results[0].float().sin().sum(), leaves)
            calls.append([serving.called, *results, *gradients])
    found["planned calls look up"] = [called for called, *_ in calls]
    pairs = [pair for one in calls for pair in zip(one[1:], calls[0][1:], strict=True)]
    found["planned calls are alike"] = [torch.equal(a, b) for a, b in pairs]

    for kind in ("causal", "documents", "bias", "dropout", "head scale"):
        family = {"causal": "attention", "documents": "masks"}.get(kind, "scores")
        call = kinds.build(Sizes(family, kind, **{**ABOUT, "batch": 4}), device)
        for direction in (capabilities.FORWARD, capabilities.BACKWARD):
            plans.forget()
            with prove_worker.routes() as taken:
                prove_worker.thunk(call, prove_worker.OTHERWISE, direction)()
            found[f"{direction} {kind} is timed against"] = taken[-1]

    for family, kind in (
        ("attention", "causal"), ("attention", "full"), ("masks", "window"), ("masks", "key lengths"),
        ("masks", "documents"), ("masks", "boolean mask"), ("scores", "bias"), ("scores", "sinks"),
        ("attention", f"causal{kinds.LSE}"), ("masks", "key lengths, causal"), ("scores", "softcap"),
        ("scores", "alibi"), ("scores", "relative bias"), ("masks", "random lists"), ("scores", "dropout"),
        ("scores", "head scale"),
    ):  # fmt: skip
        found[f"operators, {kind}"] = count(family, kind)
    found["operators, relative bias, float32"] = count("scores", "relative bias", dtype="float32")
    found["operators, float32"] = count("attention", "causal", dtype="float32")
    found["operators, width 20"] = count("attention", "causal", width=20)

    FAULTS.add("clean")
    torch_trial._known.clear()
    for kind in ("boolean mask", "random lists", "bias", "relative bias"):
        family = "scores" if kind.endswith("bias") else "masks"
        found[f"operators, {kind}, clean"] = count(family, kind)
    found["empty rows, clean"] = compared((q, k, v), bias=padding, causal=True)
    FAULTS.clear()

    rows = [replace(row, answers=(torch_routes.No("no"),) * 3 + row.answers[3:]) for row in torch_routes.ROWS]
    with mock.patch.object(torch_routes, "ROWS", rows):
        torch_routes.candidates.cache_clear()
        found["key lengths, by another table"] = tried("masks", "key lengths")
    torch_routes.candidates.cache_clear()

    # Operators that compute something else.
    for fault, call in (
        ("ignored", ("masks", "window")), ("log2", ("masks", "window")), ("unaligned", ("masks", "documents")),
        ("unwritten", ("masks", "key lengths")), ("tf32", ("attention", "causal")),
        ("own delta", ("attention", f"causal{kinds.LSE}")),
    ):  # fmt: skip
        dtype = "float32" if fault == "tf32" else "float16"
        FAULTS.add(fault)
        torch_trial._known.clear()
        said.clear()
        failed = tried(*call, dtype=dtype)
        found[f"fault {fault}"] = [failed[0], tried(*call, dtype=dtype)[1]]
        found[f"said {fault}"] = list(said)
        FAULTS.clear()

    FAULTS.add("nvrtc")
    torch_fused._known.clear()
    torch_trial._known.clear()
    said.clear()
    found["sinks, no compiler"] = tried("scores", "sinks")
    for dtype in (torch.float16, torch.float32):
        inputs = [t.to(dtype) for t in (q, k, v)]
        found[f"lse gradient, no compiler {dtype}"] = compared(inputs, "sinks", sinks=sinks, of_lse=1.0)
    found["said nvrtc"] = list(said)
    FAULTS.clear()
    torch_fused._known.clear()

with pretended_gpus(GPUS["B200"]), torch_stand_ins.operators(prefers_cudnn=True):
    torch_trial._known.clear()
    device = torch.device("cuda", 0)
    for kind in ("full", "causal"):
        found[f"{kind}, cuDNN"] = tried("attention", kind)
    found["sinks, cuDNN"] = tried("scores", "sinks")
    found["lse gradient, cuDNN"] = tried("attention", f"causal{kinds.LSE}")
    found["window, cuDNN"] = tried("masks", "window")
    FAULTS.add("cudnn")
    torch_trial._known.clear()
    said.clear()
    found["fault cudnn"] = [tried("attention", "causal")[0], tried("attention", "causal")[1]]
    found["said cudnn"] = list(said)
print(json.dumps(found))
