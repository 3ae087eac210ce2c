"""On a GPU the portable backend hands calls to PyTorch's fused kernels: which ones, with what, and only where they
compute what the definition says.

A pretended GPU computes on the CPU. In place of PyTorch's operators stand copies that check what the real ones ask
for, and return what the real ones may: anything, in rows that see nothing and behind the last row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hardware import ON_GPU

from fastattn.core.attention import torch_efficient, torch_flash
from fastattn.core.attention.spec import AttentionSpec, Saved, ScoreTensors, Wanted

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, logging, math, warnings; warnings.simplefilter("ignore")
import torch, fastattn
from unittest import mock
from fastattn.core import plans
from fastattn.core.attention import torch_efficient, torch_flash, torch_trial
from fastattn.measuring import checking, kinds, tolerance
from fastattn.measuring.kinds import Sizes
from tests.pretended_gpu import GPUS, pretended_gpus

calls = []

def scores(q, k, scale, added=None, causal=False, window=(-1, -1)):
    s = q.float() @ k.float().mT * scale
    s = s if added is None else s + added.float()
    i, j = torch.arange(s.shape[2], device=q.device)[:, None], torch.arange(s.shape[3], device=q.device)
    hidden = (j > i) if causal else torch.zeros_like(j > i)
    hidden = hidden | (j < i - window[0]) if window[0] >= 0 else hidden
    hidden = hidden | (j > i + window[1]) if window[1] >= 0 else hidden
    return s.masked_fill(hidden, float("-inf"))

def forward_of(s, v):
    lse = s.logsumexp(-1)
    return (torch.softmax(s, -1) @ v.float()).to(v.dtype), lse  # NaN in rows that see nothing

def backward_of(s, dout, q, k, v, out, lse, scale):
    p = (s - lse[..., None]).exp()
    ds = p * (dout.float() @ v.float().mT - (dout.float() * out.float()).sum(-1, keepdim=True))
    dtype = q.dtype
    return [t.to(dtype) for t in (ds @ k.float() * scale, ds.mT @ q.float() * scale, p.mT @ dout.float(), ds)]

def check(*heads, added=None):
    for t in heads:
        assert t.stride(-1) == 1 and all(s % 8 == 0 for s in t.stride()[:-1]) and t.dtype == heads[0].dtype
    assert len({t.shape[1] for t in heads}) == 1, "it knows no groups"
    if added is not None:
        assert added.dtype == heads[0].dtype and added.shape == (*heads[0].shape[:3], heads[1].shape[2])
        assert added.stride(-1) == 1 and all(s % 16 == 0 for s in added.stride()[:-1]), added.stride()

def efficient(q, k, v, added, log, dropout, causal, *, scale):
    calls.append("efficient")
    check(q, k, v, added=added)
    out, lse = forward_of(scores(q, k, scale, added, causal), v)
    behind = lse.new_full((*lse.shape[:2], -lse.shape[2] % 32), float("nan"))
    return out, torch.cat((lse, behind), -1), None, None

def efficient_backward(dout, q, k, v, added, out, lse, seed, offset, dropout, wanted, causal, *, scale):
    calls.append("efficient backward")
    check(q, k, v, dout, out, added=added)
    assert lse.shape[2] % 32 == 0 and bool((lse[..., q.shape[2]:] == float("inf")).all())
    assert bool(lse[..., :q.shape[2]].isfinite().all())
    *found, ds = backward_of(scores(q, k, scale, added, causal), dout, q, k, v, out, lse[..., :q.shape[2]], scale)
    return *found, ds if wanted[3] else None

def flash(q, k, v, *rest, scale, window_size_left, window_size_right):
    calls.append("flash")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    window = window_size_left, window_size_right
    out, lse = forward_of(scores(q, k, scale, window=(-1, -1) if "ignored" in faults else window), v)
    return out.transpose(1, 2), lse / math.log(2) if "log2" in faults else lse, None, None, None

def flash_backward(dout, q, k, v, out, lse, *rest, scale, window_size_left, window_size_right):
    calls.append("flash backward")
    dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    keys, group = k.shape[1], q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = scores(q, k, scale, window=(window_size_left, window_size_right))
    dq, dk, dv, _ = backward_of(s, dout, q, k, v, out, lse, scale)
    dk, dv = (t.unflatten(1, (keys, group)).sum(2) for t in (dk, dv))
    return [t.transpose(1, 2) for t in (dq, dk, dv)]

def wrong(call, sizes):
    computed, double = checking.results_and_gradients, tuple(t.double() for t in call.tensors)
    ours, eager = (computed(call, backend, call.tensors, sizes) for backend in ("portable", "reference"))
    for name, exact in computed(call, "reference", double, sizes).items():
        judged = tolerance.judge(ours[name], exact, eager[name].to(ours[name].dtype), gradient=name[0] == "d",
                                 tiny=1e-3, dtype=torch.float16)
        if judged.wrong:
            return f"{name}: {judged.wrong}"
    return ""

def tried(sizes):
    plans.forget()
    calls.clear()
    return [wrong(kinds.build(sizes, device), sizes), sorted(set(calls))]

found, faults, said = {}, set(), []
hearing = logging.Handler()
hearing.emit = lambda record: said.append(record.getMessage())
logging.getLogger("fastattn").addHandler(hearing)
patches = {"_efficient": efficient, "_efficient_backward": efficient_backward}
with (pretended_gpus(GPUS["H100"]), mock.patch.object(torch.version, "cuda", "12.8"),
      mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
      mock.patch.multiple(torch_efficient, **patches),
      mock.patch.multiple(torch_flash, _windowed_forward=flash, _windowed_backward=flash_backward)):
    device = torch.device("cuda", 0)
    about = {"dtype": "float16", "batch": 2, "length": 100, "width": 24}
    for family, kind in (("masks", "key lengths"), ("masks", "boolean mask"), ("masks", "window"),
                         ("scores", "bias"), ("scores", "padding bias"), ("scores", "softcap"),
                         ("scores", "alibi")):
        found[kind] = tried(Sizes(family, kind, **about))
    found["bias of every head"] = tried(Sizes("scores", "bias", **{**about, "batch": 5}))
    found["width 20"] = tried(Sizes("masks", "key lengths", **{**about, "width": 20}))
    found["float32"] = tried(Sizes("masks", "key lengths", **{**about, "dtype": "float32"}))

    # Rows that see nothing, NaN behind the lengths, left padding beside a causal mask.
    q, k, v = kinds.heads_of(Sizes("masks", "full", **about), device)
    lengths = torch.tensor([0, 77], device=device)
    padding = (torch.arange(100, device=device) >= torch.tensor([3, 100], device=device)[:, None])[:, None, None]
    behind = (torch.arange(100, device=device) >= lengths[:, None])[:, None, :, None]
    spoiled = [t.masked_fill(behind, float("nan")) for t in (k, v)]
    problems = {"empty entries": ((q, *spoiled), {"key_lengths": lengths}),
                "empty rows": ((q, k, v), {"bias": padding, "causal": True}),
                "both": ((q, *spoiled), {"bias": padding, "key_lengths": lengths, "causal": True})}
    for name, (inputs, options) in problems.items():
        calls.clear()
        leaves, results = [t.detach().requires_grad_() for t in inputs], []
        for backend in ("portable", "reference"):
            out, lse = fastattn.attention(*leaves, **options, return_lse=True, backend=backend)
            results.append((out, lse, *torch.autograd.grad(out.sin().sum(), leaves)))
        close = all(torch.allclose(a.float(), b.float(), atol=0.02, equal_nan=False) for a, b in zip(*results))
        found[name] = ["" if close else "differs", sorted(set(calls))]

    # Operators that compute something else.
    torch_trial._known.clear()
    for fault in ("ignored", "log2"):
        faults.add(fault)
        torch_trial._known.clear()
        said.clear()
        failed = tried(Sizes("masks", "window", **about))
        found[f"window, {fault}"] = [failed[0], tried(Sizes("masks", "window", **about))[1]]
        found[f"said, {fault}"] = list(said)
        faults.clear()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> Iterator[dict]:
    pytest.importorskip("triton")
    if ON_GPU:
        pytest.skip("PyTorch is built for real GPUs here: two drivers would mix")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


EFFICIENT, FLASH = ["efficient", "efficient backward"], ["flash", "flash backward"]


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        ("key lengths", EFFICIENT),
        ("boolean mask", EFFICIENT),
        ("padding bias", ["efficient"]),  # its gradient would be as large as the scores
        ("bias", EFFICIENT),
        ("bias of every head", ["efficient"]),
        ("window", FLASH),
        ("empty entries", EFFICIENT),
        ("empty rows", EFFICIENT),
        ("both", EFFICIENT),
        ("softcap", []),
        ("alibi", []),
        ("width 20", []),
        ("float32", []),
        # Refused after a trial, and computed by the loop.
        ("window, ignored", []),
        ("window, log2", []),
    ],
)
def test_a_call_takes_pytorch_s_kernels_where_these_compute_it_exactly(call, kernels, found):
    assert found[call] == ["", kernels]


@pytest.mark.parametrize(("fault", "quantity"), [("ignored", "out"), ("log2", "lse")])
def test_a_kernel_that_computes_something_else_is_told_of_once(fault, quantity, found):
    (sentence,) = found[f"said, {fault}"]
    assert (
        f"flash attention with a window is not used on cuda:0 in torch.float16: its {quantity} differs" in sentence
    )


@pytest.mark.parametrize("bias", [None, (2, 4, 70, 70), (1, 1, 1, 70)])
def test_the_operators_take_what_they_are_given(bias):
    """PyTorch's own shape functions, on the meta device: arguments, shapes and strides."""
    q, k = (torch.empty(2, heads, 70, 32, dtype=torch.float16, device="meta") for heads in (4, 2))
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    tensors = ScoreTensors(lengths, bias=None if bias is None else torch.empty(bias, dtype=q.dtype, device="meta"))
    spec, wanted = AttentionSpec(causal=True), Wanted(bias=bias is not None)
    out, lse = torch_efficient.forward(q, k, k, spec, tensors)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    gradients = torch_efficient.backward(out, Saved(q, k, k, out, lse), spec, tensors, wanted)
    wished = (q.shape, k.shape, k.shape, None if bias is None else torch.Size(bias))
    assert tuple(None if t is None else t.shape for t in gradients) == wished
    spec = AttentionSpec(window=(5, 3))
    out, lse = torch_flash.forward(q, k, k, spec)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    gradients = torch_flash.backward(out, Saved(q, k, k, out, lse), spec)
    assert tuple(t.shape for t in gradients) == (q.shape, k.shape, k.shape)
