"""Attention over a sequence that is spread over the ranks of a mesh."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from fastattn.core.attention.dropout import dropout_state as fresh_dropout_state
from fastattn.core.attention.dropout import state_of_part
from fastattn.core.attention.functional import attention as attention_here
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors, attention_spec, check_bias, score_tensors
from fastattn.core.autocast import autocast
from fastattn.core.capabilities import check_backend
from fastattn.distributed.computing import Gradients, Learned, Options, Share
from fastattn.distributed.dealing import Layout
from fastattn.distributed.exchange import Ranks, agree, broadcast, flat_rank, ranks_of
from fastattn.distributed.heads import Heads
from fastattn.distributed.prediction import TYPICAL, Sizes, pairs, predict
from fastattn.distributed.sharding import mesh_of
from fastattn.distributed.transports import Gather, Ring, Transport, places
from fastattn.distributed.visibility import Visibility, whole_mask
from fastattn.ground.arguments import choice, flag, refuse_keywords
from fastattn.ground.checks import Window, lse_dtype, refuse_tangents
from fastattn.masks import Lowered, Mask

METHODS = ("auto", "ring", "gather", "heads", "ring x heads")
MOST_PROGRAMS = 64  # kept for one layout


@torch.compiler.disable
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout,
    mesh: DeviceMesh | None = None,
    method: str = "auto",
    causal: bool = False,
    scale: float | Tensor | None = None,
    window: Window = None,
    key_lengths: Tensor | Sequence[int] | None = None,
    mask: Mask | Lowered | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
    precision: str | None = None,
    return_lse: bool = False,
    gradient_dtype: torch.dtype | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastattn.attention` over a whole sequence, of which each rank has some tokens. All ranks call it together.

    Args:
        q: this rank's queries (B, Hq, n, D), as `shard` gives them: n tokens of the sequence's N.
        k, v: its keys (B, Hkv, n, D) and values (B, Hkv, n, Dv), of the same tokens.
        layout: who owns which tokens, from `fastattn.distributed.layout`. It is balanced for the mask it was made
            with, and right for any.
        mesh: the ranks, by default the layout's mesh: one dimension, or two (rings, heads) for "ring x heads".
        method: how keys reach the queries.
            "ring": from rank to rank in rounds, while the keys of the round before are computed. Ranks that see
            nothing of each other exchange nothing.
            "gather": all keys to all ranks at once.
            "heads": each rank computes all tokens of some heads. Hq must be a multiple of the ranks, and Hkv a
            multiple or a divisor of them.
            "ring x heads": heads over the second dimension of the mesh, rings over the first.
            "auto": what is predicted to be the fastest on GPUs of the H100's kind, eight in a node; see
                fastattn.distributed.prediction.
        causal, window, mask, key_lengths: as `fastattn.attention` takes them, for the whole sequence (N queries, N
            keys), the same on all ranks.
        bias: (..., n or 1, N or 1), the rows of this rank's queries, the columns of all keys. Only a bias with one
            row works with heads.
        scale, alibi_slopes, relative_bias, softcap, sinks, precision, backend: as `fastattn.attention` takes them,
            the same on all ranks.
        dropout_p, dropout_state: as `fastattn.attention` takes them. What is dropped depends on positions in the
            whole sequence, so it does not depend on the number of ranks. Without a state, rank 0 draws one.
        gradient_dtype: in which the gradients of keys and values travel between ranks with "ring" and "gather":
            None for that of q, or torch.float32, which sends twice the bytes. They are summed in float32 either
            way; it saves a rounding where one rank computes several parts of the keys of another, as it does with
            dropout, ALiBi and relative biases.

    Returns:
        out (B, Hq, n, Dv); with `return_lse` also lse (B, Hq, n) in nats, differentiable. Gradients of q, k and v
        are those of one process, and the same bits in every run. Gradients of what all ranks share (biases with
        one row, sinks, scales) are the part of this rank's queries, like those of a model's weights: sum them over
        the ranks. There are no second derivatives, and no forward mode.

    Raises:
        TypeError, ValueError: the same on all ranks, before anything is sent, if ranks disagree or one of them has
            a wrong argument. This is checked at the first call with a layout and a kind of arguments.
        RuntimeError: another rank died, or did not call.

    Source: Liu et al., Ring Attention (2023); Jacobs et al., DeepSpeed Ulysses (2023); Fang and Zhao, USP (2024).
    """
    if unknown:
        refuse_keywords("fastattn.distributed.attention", unknown)
    mesh = mesh_of(layout, mesh)
    options: dict[str, Any] = {
        "causal": causal, "scale": scale, "window": window, "softcap": softcap, "dropout_p": dropout_p,
        "precision": precision, "backend": backend,
    }  # fmt: skip
    beside: dict[str, Any] = {
        "key_lengths": key_lengths, "alibi_slopes": alibi_slopes, "relative_bias": relative_bias, "sinks": sinks,
        "dropout_state": dropout_state,
    }  # fmt: skip
    try:
        choice("method", method, METHODS)
        return_lse = flag("return_lse", return_lse)
        learned = {"bias": bias, "relative_bias": relative_bias, "sinks": sinks, "scale": scale}
        refuse_tangents("fastattn.distributed.attention", {"q": q, "k": k, "v": v, **learned})
        q, k, v = autocast(q, k, v)
        call = _call(q, k, v, layout, mesh, mask, bias, options, beside)
        _check_gradient_dtype(gradient_dtype, call.q.dtype)
        call = call._replace(return_lse=return_lse, gradient_dtype=gradient_dtype)
        program: Any = layout.programs.get(call.key(method))
        visibility = None if program is not None else _visibility(call, layout, mask)
    except (TypeError, ValueError) as problem:
        if layout.programs:
            raise
        agree(ranks_of(mesh), problem)
        raise
    if visibility is not None:
        program = _agreed_program(call, method, visibility)
    if call.spec.dropout and call.tensors.dropout_state is None:
        state = broadcast(ranks_of(mesh), fresh_dropout_state(q.shape[0], q.device))
        call = call._replace(tensors=call.tensors._replace(dropout_state=state))
    out, lse = program(call)
    return out if lse is None or not return_lse else (out, lse)


class Call(NamedTuple):
    """One call, checked: what this rank computes with."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    mesh: DeviceMesh
    spec: AttentionSpec
    mask: Mask | Lowered | None
    tensors: ScoreTensors
    backend: str | None
    return_lse: bool
    gradient_dtype: torch.dtype | None = None

    @property
    def by_distance(self) -> bool:
        """Whether scores depend on the distance of a key."""
        return self.tensors.alibi_slopes is not None or self.tensors.relative_bias is not None

    def key(self, method: str) -> tuple:
        """What decides how a call is computed, and what all ranks must agree about."""
        beside = tuple(None if t is None else (t.dtype, t.dim()) for t in self.tensors)
        tokens = tuple((*t.shape[:2], t.shape[3]) for t in (self.q, self.k, self.v))
        mesh = self.mesh.shape if self.mesh is not self.layout.mesh else None
        dtypes = self.q.dtype, self.gradient_dtype
        return method, mesh, tokens, dtypes, self.q.device, self.spec, self.mask, beside, self.backend


Program = Callable[[Call], tuple[Tensor, Tensor | None]]


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    mesh: DeviceMesh,
    mask: Mask | Lowered | None,
    bias: Tensor | None,
    options: dict[str, Any],
    beside: dict[str, Any],
) -> Call:
    backend, scale = check_backend(options.pop("backend")), options["scale"]
    by_head = scale if isinstance(scale, Tensor) else None
    spec = attention_spec(q, k, v, **{**options, "scale": scale if by_head is None else 1.0})
    if spec.invariant:
        raise ValueError("invariant must be False where a sequence is spread over ranks: its keys are split there")
    count = layout.counts[flat_rank(mesh)]
    for name, t in (("q", q), ("k", k)):
        if t.shape[2] != count:
            raise ValueError(
                f"{name} must have the {count} tokens that the layout gives this rank, got {t.shape[2]}"
            )
    # The tensors beside q, k and v belong to the whole sequence: stand-ins without memory have its shape.
    whole_q, whole_k = (t.new_empty(1).expand(*t.shape[:2], layout.length, t.shape[3]) for t in (q, k))
    tensors = score_tensors(whole_q, whole_k, **beside, drops=spec.dropout > 0, head_scale=by_head)
    if bias is not None:
        check_bias(bias, q, whole_k)
        tensors = tensors._replace(bias=bias[(None,) * (4 - bias.dim())])
    return Call(q, k, v, layout, mesh, spec, mask, tensors, backend, False)


def _check_gradient_dtype(dtype: torch.dtype | None, of_inputs: torch.dtype) -> None:
    allowed = (None, of_inputs, lse_dtype(of_inputs))
    if dtype not in allowed:
        words = " or ".join(map(str, dict.fromkeys(allowed)))
        raise ValueError(f"gradient_dtype must be {words} for q of {of_inputs}, got {dtype!r}")


def _visibility(call: Call, layout: Layout, mask: Mask | Lowered | None) -> Visibility:
    shape = (*call.q.shape[:2], layout.length, layout.length, call.q.device)
    return Visibility(whole_mask(shape, (call.spec.left, call.spec.right), mask))


def _agreed_program(call: Call, method: str, visibility: Visibility) -> Program:
    """Make sure that all ranks compute the same, then prepare it."""
    layout, dimensions = call.layout, ranks_of(call.mesh)
    chosen = method
    problem: Exception | None = None
    try:
        chosen = _chosen(method, call, visibility)
    except ValueError as refused:
        problem = refused
    agree(dimensions, _description(call, method, visibility) if problem is None else problem)
    while len(layout.programs) >= MOST_PROGRAMS:
        layout.programs.pop(next(iter(layout.programs)))
    program = layout.programs[call.key(method)] = _program(call, chosen, visibility, dimensions)
    return program


def _description(call: Call, method: str, visibility: Visibility) -> dict[str, Any]:
    """What all ranks must agree about, in plain values."""
    described: dict[str, Any] = {"method": method, "layout": _digest(call.layout.owners, call.layout.length)}
    for name, t in (("q", call.q), ("k", call.k), ("v", call.v)):
        described[f"shape of {name} (batch, heads, width)"] = (*t.shape[:2], t.shape[3])
    described["dtype"], described["gradient_dtype"] = str(call.q.dtype), str(call.gradient_dtype)
    for name in ("scale", "softcap", "dropout", "precision"):
        described[name] = getattr(call.spec, name)
    for name, t in call.tensors._asdict().items():
        described[name] = None if t is None else str(t.dtype)
    lowered = visibility.lowered
    packed = None if lowered.packed is None else lowered.packed[0]
    seen = _digest(lowered.left, lowered.right, lowered.key_lengths, lowered.intervals, packed)
    shown = repr(call.mask) if isinstance(call.mask, Mask) else "None" if call.mask is None else "a lowered mask"
    described["mask, causal and window"] = Shown(seen, f"{shown}, window ({lowered.left}, {lowered.right})")
    described["backend"] = call.backend
    return described


class Shown(NamedTuple):
    """A digest to compare, and what to show instead of it: the same mask may have another name on another rank."""

    digest: str
    words: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shown) and self.digest == other.digest

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"{self.words} (digest {self.digest})"


def _digest(*values: Any) -> str:
    found = hashlib.blake2b(digest_size=8)
    for value in values:
        found.update(value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return found.hexdigest()


def _chosen(method: str, call: Call, visibility: Visibility) -> str:
    """The method, "auto" replaced. Raise ValueError if it cannot compute the call."""
    size, two = call.mesh.size(), call.mesh.ndim == 2
    if method == "auto":
        method = "ring x heads" if two else _fastest(call, visibility)
    if two != (method == "ring x heads"):
        raise ValueError(
            f'method must be "ring x heads" for a mesh of two dimensions, and only for one; got {method!r} for '
            f"{call.mesh.ndim}"
        )
    if "heads" in method:
        lacking = _obstacle_to_heads(call, call.mesh.size(1) if two else size)
        if lacking:
            raise ValueError(f"method {method!r} {lacking}")
    return method


def _fastest(call: Call, visibility: Visibility) -> str:
    """What is predicted to take the least time on a usual machine."""
    ranks = call.mesh.size()
    sizes = Sizes(
        call.q.shape[0], call.q.shape[1], call.k.shape[1], call.q.shape[3], call.v.shape[3],
        call.q.element_size(), (call.gradient_dtype or call.q.dtype).itemsize,
    )  # fmt: skip
    seen, tokens = pairs(visibility, call.layout.owners, ranks), call.layout.length / ranks
    methods = ["ring", "gather"] if _obstacle_to_heads(call, ranks) else ["ring", "gather", "heads"]
    return min(methods, key=lambda method: predict(method, seen, sizes, TYPICAL, tokens).seconds)


def _obstacle_to_heads(call: Call, ranks: int) -> str:
    """Why heads cannot be shared out to so many ranks; empty if they can."""
    query_heads, key_heads = call.q.shape[1], call.k.shape[1]
    if query_heads % ranks or (key_heads % ranks and ranks % key_heads):
        return (
            f"needs q's heads to be a multiple of the {ranks} ranks that share them, and k's heads a multiple or "
            f"a divisor; got {query_heads} and {key_heads}"
        )
    if call.tensors.bias is not None and call.tensors.bias.shape[2] > 1:
        return (
            'takes a bias with one row only, since a rank has the rows of its own tokens; take "ring" or "gather"'
        )
    return ""


def _program(call: Call, method: str, visibility: Visibility, dimensions: Sequence[Ranks]) -> Program:
    layout, device = call.layout, call.q.device
    by_run = call.by_distance or call.spec.dropout > 0
    shards = [layout.positions(rank) for rank in range(layout.ranks)]
    if method == "gather":
        gather = Gather.of(dimensions[0], visibility, shards, device, by_run=by_run)
        return Spread(replace(gather, gradient_dtype=call.gradient_dtype))
    if method == "ring":
        ring_of_all = Ring.of(dimensions[0], visibility, layout.owners, shards, device, by_run=by_run)
        return Spread(replace(ring_of_all, gradient_dtype=call.gradient_dtype))
    ring, sharing = (None, dimensions[0]) if method == "heads" else dimensions
    first = 0 if ring is None else ring.rank * sharing.size
    own = shards[first : first + sharing.size]
    longest = max(map(len, own))
    exchange = Heads(sharing, places(own, longest).to(device), longest, len(own[sharing.rank]))
    each = call.q.shape[1] // sharing.size
    heads = slice(sharing.rank * each, (sharing.rank + 1) * each)
    visibility = visibility.of_heads(heads)
    inner: Program
    if ring is None:
        inner = Whole(visibility.lowered.to(device))
    else:
        rows = [shards[i : i + sharing.size] for i in range(0, len(shards), sharing.size)]
        joined = [torch.cat(row).sort().values for row in rows]
        owners = layout.owners // sharing.size
        own_ring = Ring.of(ring, visibility, owners, joined, device, by_run=by_run)
        inner = Spread(replace(own_ring, gradient_dtype=call.gradient_dtype))
    return SharedHeads(exchange, heads, inner)


@dataclass(frozen=True)
class Whole:
    """The whole sequence is here."""

    mask: Lowered

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        spec, tensors = call.spec, call.tensors
        return attention_here(
            call.q, call.k, call.v, mask=self.mask, softcap=spec.softcap, precision=spec.precision,
            scale=spec.scale if tensors.head_scale is None else tensors.head_scale, backend=call.backend,
            key_lengths=tensors.key_lengths, alibi_slopes=tensors.alibi_slopes, bias=tensors.bias,
            relative_bias=tensors.relative_bias, sinks=tensors.sinks, dropout_p=spec.dropout,
            dropout_state=tensors.dropout_state, return_lse=True,
        )  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Queries stay, keys travel."""

    transport: Transport

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        tensors, spec = call.tensors, call.spec
        options = Options(
            spec.scale, spec.softcap, spec.dropout, spec.precision, call.backend, tensors.alibi_slopes,
            tensors.key_lengths, tensors.dropout_state,
        )  # fmt: skip
        learned = Learned(tensors.bias, tensors.relative_bias, tensors.sinks, tensors.head_scale)
        return _SpreadAttention.apply(self.transport, options, call.q, call.k, call.v, *learned)


@dataclass(frozen=True)
class SharedHeads:
    """Each rank computes all tokens, or those of its ring's place, of some heads."""

    exchange: Heads
    heads: slice
    inner: Program

    def __call__(self, call: Call) -> tuple[Tensor, Tensor | None]:
        size, k, v, heads = self.exchange.ranks.size, call.k, call.v, self.heads
        if k.shape[1] < size:
            k, v = (t.repeat_interleave(size // t.shape[1], 1) for t in (k, v))
        q, k, v = self.exchange.to_heads(call.q, k, v)

        def own(t: Tensor | None) -> Tensor | None:
            return t if t is None or t.shape[1] == 1 else t[:, heads]

        tensors, state = call.tensors, call.tensors.dropout_state
        tensors = tensors._replace(
            dropout_state=None if state is None else state_of_part(state, head=heads.start),
            alibi_slopes=own(tensors.alibi_slopes), bias=own(tensors.bias), sinks=own(tensors.sinks),
            relative_bias=own(tensors.relative_bias), head_scale=own(tensors.head_scale),
        )  # fmt: skip
        out, lse = self.inner(call._replace(q=q, k=k, v=v, tensors=tensors))
        (out,) = self.exchange.to_tokens(out)
        if lse is None or not call.return_lse:
            return out, None
        (lse,) = self.exchange.to_tokens(lse[..., None])
        return out, lse[..., 0]


class _SpreadAttention(torch.autograd.Function):
    """(q, k, v, *Learned) -> (out, lse), both differentiable once."""

    @staticmethod
    def forward(ctx: Any, transport: Transport, options: Options, q: Tensor, k: Tensor, v: Tensor, *learned: Any):
        share = Share(q, v.shape[3], options, Learned(*learned))
        transport.forward(k, v, share.attend)
        out = share.out.to(q.dtype)
        ctx.transport, ctx.options = transport, options
        # The empty tensor tells activation checkpointing that this is not attention in one process, which it would
        # recompute outside of context_parallel.
        ctx.save_for_backward(q, k, v, out, share.lse, *learned, q.new_empty(0))
        ctx.set_materialize_grads(False)
        return out, share.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
        q, k, v, out, lse, *learned, _ = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        share = Share(q, v.shape[3], ctx.options, Learned(*learned))
        gradients = Gradients(share, dout, out, lse, dlse)
        dk, dv = ctx.transport.backward(k, v, gradients.of_keys)
        beside = (None if g is None else g.to(t.dtype) for g, t in zip(gradients.learned, learned, strict=True))
        return None, None, gradients.q.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *beside
