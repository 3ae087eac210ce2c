"""Copies of PyTorch's fused operators for GPUs that compute on a CPU, for calls on a pretended GPU.

Each checks what the real one asks for, and returns what the real one may: anything, in rows that see nothing, in
memory that nobody computes, and behind the last row. `FAULTS` names what they shall do wrong.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastattn.core.attention import (
    torch_cudnn,
    torch_dense,
    torch_dropout,
    torch_efficient,
    torch_fused,
    torch_varlen,
)
from fastattn.core.attention.dropout import philox
from fastattn.core.layout import heads_last
from fastattn.measuring import kinds
from tests.pretended_gpu import tensors

CALLS: list[str] = []
FAULTS: set[str] = set()
LAUNCHES: list[tuple[str, int]] = []  # under `counting`: the name, and the bytes that go through memory
INSIDE: list[str] = []
FUSED = "fused step"  # one of torch_fused's
NAN, INF = math.nan, math.inf


def scores(q, k, scale, added=None, causal=False, window=(-1, -1)) -> Tensor:
    """Aligned top-left if causal; a window is aligned bottom-right. fp64 of float32, else fp32."""
    dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
    if "tf32" in FAULTS and q.dtype == torch.float32:
        q, k = q.bfloat16(), k.bfloat16()
    s = q.to(dtype) @ k.to(dtype).mT * scale
    s = s if added is None else s + added.to(dtype)
    i, j = torch.arange(s.shape[-2], device=q.device)[:, None], torch.arange(s.shape[-1], device=q.device)
    hidden = (j > i) if causal else torch.zeros_like(j > i)
    i = i + s.shape[-1] - s.shape[-2]
    hidden = hidden | (j < i - window[0]) if window[0] >= 0 else hidden
    hidden = hidden | (j > i + window[1]) if window[1] >= 0 else hidden
    return s.masked_fill(hidden, -INF)


def forward_of(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """NaN in rows that see nothing."""
    return (torch.softmax(s, -1) @ v.to(s.dtype)).to(v.dtype), s.logsumexp(-1).float()


def backward_of(s, dout, q, k, v, out, lse, scale) -> list[Tensor]:
    """Gradients of q, k, v and the scores, a key head for each query head."""
    dtype = s.dtype
    p = (s - lse[..., None]).exp()
    dout, out, q_, k_, v_ = (t.to(dtype) for t in (dout, out, q, k, v))
    dp = dout @ v_.mT
    delta = ((p * dp) if "own delta" in FAULTS else (dout * out)).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    return [t.to(q.dtype) for t in (ds @ k_ * scale, ds.mT @ q_ * scale, p.mT @ dout, ds)]


def every_head(q: Tensor, *others: Tensor) -> list[Tensor]:
    return [t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in others]


def of_groups(gradients: list[Tensor], k: Tensor) -> list[Tensor]:
    dq, *rest = gradients
    return [dq, *(t.unflatten(-3, (k.shape[-3], -1)).sum(-3).to(k.dtype) for t in rest[:2])]


def check(*heads: Tensor, added: Tensor | None = None, grouped: bool = False) -> None:
    for t in heads:
        step = 16 // t.element_size()
        assert t.stride(-1) == 1 and all(s % step == 0 for s in t.stride()[:-1]) and t.dtype == heads[0].dtype
    assert grouped or len({t.shape[1] for t in heads}) == 1, "it knows no groups"
    if added is not None:
        assert added.dtype == heads[0].dtype and added.shape == (*heads[0].shape[:3], heads[1].shape[2])
        assert added.stride(-1) == 1 and all(s % 16 == 0 for s in added.stride()[:-1]), added.stride()


# ---- memory-efficient ----


def efficient(q, k, v, added, log, dropout, causal, *, scale):
    CALLS.append("memory-efficient")
    check(q, k, v, added=added)
    out, lse = forward_of(scores(q, k, scale, added, causal), v)
    out = out.nan_to_num() if "clean" in FAULTS else out
    behind = lse.new_full((*lse.shape[:2], -lse.shape[2] % 32), NAN)
    return heads_last(out), torch.cat((lse, behind), -1), None, None


def efficient_backward(dout, q, k, v, added, out, lse, seed, offset, dropout, wanted, causal, *, scale):
    CALLS.append("memory-efficient backward")
    check(q, k, v, dout, out, added=added)
    rows = q.shape[2]
    assert lse.shape[2] % 32 == 0 and bool((lse[..., rows:] == INF).all())
    assert bool(lse[..., :rows].isfinite().all())
    *found, ds = backward_of(scores(q, k, scale, added, causal), dout, q, k, v, out, lse[..., :rows], scale)
    return *map(heads_last, found), ds if wanted[3] else None


# ---- flash and cuDNN ----


def flash(q, k, v, dropout, causal, *, scale):
    CALLS.append("flash")
    check(q, k, v, grouped=True)
    assert q.dtype != torch.float32 and (not causal or q.shape[2] == k.shape[2])
    out, lse = forward_of(scores(q, *every_head(q, k), scale, causal=causal), *every_head(q, v))
    return heads_last(out), lse, None, None


def flash_backward(dout, q, k, v, out, lse, cq, ck, mq, mk, dropout, causal, seed, offset, *, scale):
    CALLS.append("flash backward")
    wide_k, wide_v = every_head(q, k, v)
    s = scores(q, wide_k, scale, causal=causal)
    return [heads_last(t) for t in of_groups(backward_of(s, dout, q, wide_k, wide_v, out, lse, scale), k)]


def cudnn(q, k, v, added, log, dropout, causal, debug, *, scale):
    assert added is None and log
    out, lse, *_ = flash(q, k, v, dropout, causal, scale=scale)
    CALLS[-1] = "cuDNN"
    if "cudnn" in FAULTS:
        raise RuntimeError("no plan")
    return out, lse[..., None], None, None, 0, 0, None, None, None


def cudnn_backward(dout, q, k, v, out, lse, seed, offset, added, cq, ck, mq, mk, dropout, causal, *, scale):
    assert lse.dim() == 4 and added is None
    found = flash_backward(
        dout, q, k, v, out, lse[..., 0], cq, ck, mq, mk, dropout, causal, seed, offset, scale=scale
    )
    CALLS[-1] = "cuDNN backward"
    return found


def windowed(q, k, v, cq, ck, mq, mk, dropout, causal, debug, *, scale, window_size_left, window_size_right):
    CALLS.append("flash")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    window = (-1, -1) if "ignored" in FAULTS else (window_size_left, window_size_right)
    out, lse = forward_of(scores(q, *every_head(q, k), scale, window=window), *every_head(q, v))
    empty = lse == -INF
    out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, INF)
    return heads_last(out).transpose(1, 2), lse / math.log(2) if "log2" in FAULTS else lse, None, None, None


def windowed_backward(
    dout, q, k, v, out, lse, cq, ck, mq, mk, dropout, causal, seed, offset, *, scale, window_size_left,
    window_size_right,
):  # fmt: skip
    CALLS.append("flash backward")
    assert not bool((lse == -INF).any())
    dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    wide_k, wide_v = every_head(q, k, v)
    s = scores(q, wide_k, scale, window=(window_size_left, window_size_right))
    found = of_groups(backward_of(s, dout, q, wide_k, wide_v, out, lse, scale), k)
    return [heads_last(t).transpose(1, 2) for t in found]


# ---- flash of sequences: (tokens, heads, width) ----


def sequences(q, k, v, cq, ck, longest, used=None) -> Iterator[tuple[slice, slice]]:
    assert q.dim() == k.dim() == v.dim() == 3 and all(t.stride(-1) == 1 for t in (q, k, v))
    assert cq.dtype == ck.dtype == torch.int32 and cq.shape == ck.shape and cq.stride() == ck.stride() == (1,)
    ends = [pairwise(t.cpu().tolist()) for t in (cq, ck)]
    counts = [None] * (len(cq) - 1) if used is None else used.cpu().tolist()
    assert used is None or (used.dtype == torch.int32 and used.is_contiguous())
    for (a, b), (c, d), count in zip(*ends, counts, strict=True):
        assert 0 <= b - a <= longest[0] and 0 <= d - c <= longest[1]
        yield slice(a, b), slice(c, d if count is None else c + count)
    assert (b, d) == (len(q), len(k)), "it computes nothing behind the last sequence"


def varlen(
    q, k, v, cq, ck, mq, mk, dropout, causal, debug, *, scale, window_size_left, window_size_right, seqused_k
):
    CALLS.append("sequences")
    check(q, k, v, grouped=True)
    out, lse = torch.full_like(q, NAN), q.new_full((q.shape[1], len(q)), NAN, dtype=torch.float32)
    for rows, columns in sequences(q, k, v, cq, ck, (mq, mk), seqused_k):
        a, b, c = (t.transpose(0, 1) for t in (q[rows], k[columns], v[columns]))
        if "unaligned" in FAULTS:
            s = scores(a, *every_head(a, b), scale, causal=window_size_right == 0)
        else:
            s = scores(a, *every_head(a, b), scale, window=(window_size_left, window_size_right))
        part, sums = forward_of(s, *every_head(a, c))
        out[rows] = part.masked_fill((sums == -INF)[..., None], 0.0).transpose(0, 1)
        lse[:, rows] = sums.masked_fill(sums == -INF, INF)
    return out, lse, None, None, None


def varlen_backward(
    dout, q, k, v, out, lse, cq, ck, mq, mk, dropout, causal, seed, offset, *, scale, window_size_left,
    window_size_right,
):  # fmt: skip
    CALLS.append("sequences backward")
    assert lse.shape == (q.shape[1], len(q)) and lse.is_contiguous() and not bool((lse == -INF).any())
    gradients = [torch.full_like(t, NAN) for t in (q, k, v)]
    for rows, columns in sequences(q, k, v, cq, ck, (mq, mk)):
        a, b, c, da, o = (t.transpose(0, 1) for t in (q[rows], k[columns], v[columns], dout[rows], out[rows]))
        wide_k, wide_v = every_head(a, b, c)
        s = scores(a, wide_k, scale, window=(window_size_left, window_size_right))
        found = of_groups(backward_of(s, da, a, wide_k, wide_v, o, lse[:, rows], scale), b)
        for total, part, place in zip(gradients, found, (rows, columns, columns), strict=True):
            total[place] = part.transpose(0, 1)
    if "unwritten" in FAULTS:
        gradients[1] = torch.where(gradients[1] == 0, NAN, gradients[1])
    return gradients


# ---- dropout's random numbers ----


def jiterator(query, key, head, offset, low, high, *, threshold):
    """On a GPU it takes tensors of this dtype only."""
    CALLS.append("jiterator")
    tensors_given = query, key, head, offset, low, high
    assert all(t.dtype == torch.float64 and t.device.type == "cuda" for t in tensors_given)
    query, key, head, offset, low, high = (t.long() for t in tensors_given)
    words = torch.broadcast_tensors(*philox((key // 8, query, head, offset), low | high << 32))
    place = (key % 8).expand_as(words[0])
    halves = [(w >> shift) & 0xFFFF for w in words for shift in (0, 16)]
    number = torch.stack(halves, -1).gather(-1, place[..., None])[..., 0]
    return (number >= int(threshold)).double()


def fused(step):
    """A step of torch_fused as PyTorch's jiterator would compute it, its results laid out as the first input lies
    in memory."""

    def run(*given):
        CALLS.append(FUSED)
        assert len(given) <= 8 and all(t.device.type == "cuda" for t in given)
        if "nvrtc" in FAULTS:
            raise RuntimeError("no nvrtc")
        found = step.plain(*given)
        like = given[0].expand(found[0].shape)
        laid = [torch.empty_like(like, dtype=torch.float32).copy_(t) for t in found]
        return laid[0] if step.results == 1 else laid

    return inside(run)


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """Inside the block LAUNCHES gets every operator that computes something; the copies here count as one. Views
    compute nothing: what they return lies in the memory that they are given."""
    LAUNCHES.clear()
    run = tensors._run

    def noting(operator, arguments, keywords):
        result = run(operator, arguments, keywords)
        given = {_memory(t) for t in tree_leaves((arguments, keywords)) if isinstance(t, Tensor)}
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        name = operator._schema.name.removeprefix("aten::")
        computes = operator._schema.is_mutable or any(_memory(t) not in given for t in results)
        if operator.namespace == "aten" and computes and "empty" not in name and not INSIDE:
            LAUNCHES.append((name, traffic(arguments, keywords, result)))
        return result

    with mock.patch.object(tensors, "_run", noting):
        yield


def traffic(*values: object) -> int:
    """Bytes of all tensors in there, each read or written once; of one that repeats itself, what is in memory."""
    found = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    sizes = ([n for n, stride in zip(t.shape, t.stride(), strict=True) if stride] for t in found)
    return sum(math.prod(size) * t.element_size() for size, t in zip(sizes, found, strict=True))


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def inside(function):
    """Operators within count as one."""

    @functools.wraps(function)
    def run(*arguments, **keywords):
        INSIDE.append(function.__name__)
        try:
            result = function(*arguments, **keywords)
            LAUNCHES.append((CALLS[-1], traffic(arguments, keywords, result)))
            return result
        finally:
            INSIDE.pop()

    return run


def launched(call: kinds.Call, of_lse: bool = False) -> list[list[tuple[str, int]]]:
    """Operators that compute, of a forward and of a backward; of the second call, which has nothing to try.
    of_lse: whether the log-sum-exp has a gradient, too."""
    leaves = [t.detach().requires_grad_() for t in call.tensors]
    for _ in range(2):
        with counting():
            out, lse = call.function("portable", *leaves)
        forward = list(LAUNCHES)
        # As a gradient comes from a linear layer.
        upstream = torch.ones_like(out.transpose(1, 2)).transpose(1, 2)
        ends, above = ([out, lse], [upstream, torch.ones_like(lse)]) if of_lse else ([out], [upstream])
        with counting():
            torch.autograd.grad(ends, leaves, above)
    return [forward, list(LAUNCHES)]


def times_touched(found: list[list[tuple[str, int]]], call: kinds.Call) -> list[float]:
    """Of what was launched in a forward and in a backward, the bytes over those that each must touch once: q, k,
    v, out and lse, and in a backward dout and the gradients, too."""
    q, k, v = call.tensors[:3]
    rows = math.prod(q.shape[:3])
    of_lse = 4 * rows
    forward = traffic(q, k, v) + rows * v.shape[3] * v.element_size() + of_lse
    least = forward, 2 * forward - of_lse
    return [sum(size for _, size in each) / bytes_ for each, bytes_ in zip(found, least, strict=True)]


@contextlib.contextmanager
def operators(prefers_cudnn: bool) -> Iterator[None]:
    """Inside the block these stand in PyTorch's place."""
    with (
        mock.patch.object(torch.version, "cuda", "12.8"),
        mock.patch.multiple(
            torch_efficient, _efficient=inside(efficient), _efficient_backward=inside(efficient_backward)
        ),
        mock.patch.multiple(
            torch_dense, _flash=inside(flash), _flash_backward=inside(flash_backward), _windowed=inside(windowed),
            _windowed_backward=inside(windowed_backward),
        ),
        mock.patch.object(torch_dropout, "_compiled", lambda: inside(jiterator)),
        mock.patch.object(torch_fused, "_compiled", fused),
        mock.patch.multiple(torch_varlen, _flash=inside(varlen), _flash_backward=inside(varlen_backward)),
        mock.patch.multiple(
            torch_cudnn, _cudnn=inside(cudnn), _cudnn_backward=inside(cudnn_backward),
            _choice=lambda *_, **__: torch_cudnn.CHOSEN if prefers_cudnn else 1,
        ),
    ):  # fmt: skip
        yield
