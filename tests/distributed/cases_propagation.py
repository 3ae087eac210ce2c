"""DTensors that reach the raw operators: computed by the strategies of propagation.py, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import groups
import pytest
import torch
import torch.nn.functional as F
from cases_tensors import BATCH, HEADS, LENGTH, R, all_as, q_alone, two_by_two
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors, Tangents
from fastattn.core.cache.spec import CacheSpec, CacheTensors
from fastattn.core.loss.spec import LossSpec
from fastattn.core.mlp.operators import options_of
from fastattn.core.mlp.spec import MLPSpec, MLPWeights
from fastattn.core.statistics.spec import StatisticsTensors
from fastattn.dropin.takeover import _Operators

B, H, N, D, CLASSES = 4, 4, 12, 8, 7
operators = torch.ops.fastattn


def scores(causal: bool = True, dropout: float = 0.0, **beside: Any) -> tuple:
    """What an operator of attention takes from key_lengths on."""
    return *ScoreTensors(**beside), *AttentionSpec(causal, 0.3, dropout=dropout).options, None


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return operators.attention_forward(q, k, v, *scores(**options))


def attention_max(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return operators.attention_forward_max(q, k, v, *scores())[:2]


def tangent(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dv: Tensor) -> Any:
    out, lse = (t.detach() for t in attention(q, k, v))
    return operators.attention_tangent(q, k, v, out, lse, *Tangents(q=dq, v=dv), *scores())


def norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Any:
    return operators.norm_forward(x, residual, weight, bias, True, 1e-5, 0.0, None)[: 1 + (residual is not None)]


def prepare_heads(x: Tensor, norm_weight: Tensor, head_scale: Tensor, cos: Any = None, sin: Any = None) -> Tensor:
    return operators.prepare_heads(x, norm_weight, cos, sin, None, head_scale, True, 1e-5, False, None)


def mlp(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, **other: Any) -> Tensor:
    tensors = MLPWeights(
        w_in, b_in, other.get("w_up"), other.get("b_up"), w_out, b_out, *(other.get(n) for n in BRANCH)
    )
    norm, residual = "rms" if "norm_weight" in other else "", "apart" if "residual" in other else ""
    spec = MLPSpec(
        "gelu", whole="auto", save=other.get("save", "auto"), chunk=64, norm=norm, norm_eps=1e-5, residual=residual
    )
    return operators.mlp_forward(x, *tensors, *options_of(spec), "portable")[0]


BRANCH = ("norm_weight", "norm_bias", "residual", "dropout_state")


def loss_rows(x: Tensor, w: Tensor, b: Tensor, target: Tensor) -> Tensor:
    return operators.loss_rows(x, w, b, target, None, *LossSpec(classes=CLASSES).options, None)


def loss(x: Tensor, w: Tensor, b: Tensor, target: Tensor, coefficients: Tensor) -> Tensor:
    options = LossSpec(classes=CLASSES).options
    return operators.loss_reduced(x, w, b, target, None, coefficients, [True] * 3, *options, None)[0]


def statistics(q: Tensor, k: Tensor, lse: Tensor) -> list[Tensor]:
    want = ["entropy", "top_keys", "received"]
    asked = StatisticsTensors()
    return operators.attention_statistics(q, k, lse, *asked, want, [0, N, 2, 0, 0], *scores())[::2]


def weights(q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return operators.attention_weights(q, k, lse, rows, columns, None, *scores())


def cache(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, q: Tensor, lengths: Tensor, **scales: Tensor
) -> Any:
    written = [k_cache, v_cache, scales.get("k_scale"), scales.get("v_scale")]
    written = [None if t is None else t.clone() for t in written]
    operators.cache_append(*written, k, v, lengths, None, False, "portable")
    beside = CacheTensors(lengths)
    options = CacheSpec(AttentionSpec(True, 0.3), D).options
    return operators.cache_attention(q, *written, *beside, *options, False, "portable")


@dataclass(frozen=True)
class Computed:
    """The operator of DTensors is that of whole tensors, with its gradients, and so are its placements.

    tensors: shapes of tensors that need a gradient, and tensors that need none. gradients: their placements, by
    default those of the tensors; None for an operator without gradients.
    """

    function: Callable[..., Any]
    tensors: dict[str, Any]
    placements: dict[str, list[Any]]
    result: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, list[Any]] | None = field(default_factory=dict)

    def __call__(self, mesh: DeviceMesh) -> None:
        whole = {
            name: torch.randn(t, dtype=torch.float64) if isinstance(t, tuple) else t
            for name, t in self.tensors.items()
        }
        mesh = two_by_two(mesh) if len(self.result) == 2 else mesh
        everywhere = [R] * mesh.ndim
        placements = {name: self.placements.get(name, everywhere) for name in whole}
        spread = {name: distribute_tensor(t, mesh, placements[name]) for name, t in whole.items()}
        learned = [name for name, t in self.tensors.items() if isinstance(t, tuple) and self.gradients is not None]
        for name in learned:
            whole[name].requires_grad_(), spread[name].requires_grad_()
        expected, actual = (self.function(**given, **self.options) for given in (whole, spread))
        expected, actual = ((t if isinstance(t, tuple | list) else (t,)) for t in (expected, actual))
        for a, e in zip(actual, expected, strict=True):
            assert isinstance(a, DTensor) and list(a.placements) == self.result, a
            torch.testing.assert_close(a.full_tensor(), e.detach())
        if not learned:
            return
        upstream = [torch.randn_like(t) for t in expected]
        wanted = torch.autograd.grad(expected, [whole[name] for name in learned], upstream)
        upstream = [distribute_tensor(t, mesh, everywhere) for t in upstream]
        found = torch.autograd.grad(actual, [spread[name] for name in learned], upstream)
        for name, a, e in zip(learned, found, wanted, strict=True):
            assert list(a.placements) == self.gradients.get(name, placements[name]), (name, a.placements)
            torch.testing.assert_close(a.full_tensor(), e, msg=lambda m, name=name: f"{name}: {m}")


def heads(key_heads: int = H) -> dict[str, tuple[int, ...]]:
    return {"q": (B, H, N, D), "k": (B, key_heads, N, D), "v": (B, key_heads, N, D)}


P = Partial()
BIASED = {"bias": (1, H, 1, N), "sinks": (B, H), "head_scale": (B, H), "relative_bias": (B, H, 7)}
BIASED_BY_HEADS = {"bias": [HEADS], "sinks": [HEADS], "head_scale": [HEADS], "relative_bias": [HEADS]}
MLP = {"x": (6, D), "w_in": (10, D), "b_in": (10,), "w_out": (5, 10), "b_out": (5,)}
HIDDEN = {"w_in": [BATCH], "b_in": [BATCH], "w_out": [HEADS]}
NORM = {"x": (B, 6, D), "weight": (B, D), "bias": (B, D), "residual": (B, 6, D)}
HEADS_BESIDE = {"x": (B, H, N, D), "norm_weight": (B, H, D), "head_scale": (B, H)}
LOSS = {"x": (8, D), "w": (CLASSES, D), "b": (CLASSES,), "target": torch.arange(8) % CLASSES}
BY_TOKENS = {"x": [BATCH], "target": [BATCH]}


def numbers(*shape: int) -> Tensor:
    """The same on all ranks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


SEEN = {"q": numbers(B, H, N, D), "k": numbers(B, 2, N, D), "lse": torch.full((B, H, N), 9.0)}
CACHES = {
    "k_cache": torch.zeros(B, 2, 9, D), "v_cache": torch.zeros(B, 2, 9, D), "k": numbers(B, 2, 3, D),
    "v": numbers(B, 2, 3, D), "q": numbers(B, H, 3, D), "lengths": torch.tensor([3, 9, 5, 4]).int(),
}  # fmt: skip
QUANTISED = {
    **CACHES,
    **{name: torch.zeros(B, 2, 9, D, dtype=torch.int8) for name in ("k_cache", "v_cache")},
    **{name: torch.zeros(B, 2, 9) for name in ("k_scale", "v_scale")},
}


def placed(tensors: dict[str, Tensor], place: Shard) -> dict[str, list[Any]]:
    """All by batch or by heads."""
    whole = ("rows", "columns", *("lengths",) * place.dim)
    return {name: [place] for name in tensors if name not in whole}


COMPUTED: dict[str, groups.Case] = {
    "attention, replicated": Computed(attention, heads(), {}, [R]),
    "attention, by batch": Computed(attention, heads(2), all_as(BATCH), [BATCH]),
    "attention, by heads": Computed(attention, heads(2), all_as(HEADS), [HEADS]),
    "attention, by heads, whole keys": Computed(
        attention, heads(), q_alone(HEADS), [HEADS], gradients={"k": [HEADS], "v": [HEADS]}
    ),
    "attention, by heads, one key head": Computed(
        attention, heads(1), q_alone(HEADS), [HEADS], gradients={"k": [P], "v": [P]}
    ),
    "attention, by queries": Computed(
        attention, heads(2), q_alone(LENGTH), [LENGTH], {"causal": False}, gradients={"k": [P], "v": [P]}
    ),
    "attention, beside it by heads": Computed(
        attention, {**heads(), **BIASED}, all_as(HEADS) | BIASED_BY_HEADS, [HEADS]
    ),
    "attention, beside it by batch": Computed(
        attention, {**heads(), **BIASED}, all_as(BATCH), [BATCH],
        gradients={"bias": [P], **{name: [BATCH] for name in ("sinks", "head_scale", "relative_bias")}},
    ),
    "attention, key lengths": Computed(
        attention, {**heads(), "key_lengths": torch.tensor([3, 12, 1, 7]).int()}, all_as(BATCH), [BATCH]
    ),
    "attention, maxima": Computed(attention_max, heads(), all_as(HEADS), [HEADS]),
    "attention, tangents": Computed(
        tangent, {**heads(), "dq": (B, H, N, D), "dv": (B, H, N, D)},
        {name: [HEADS] for name in ("q", "k", "v", "dq", "dv")}, [HEADS], gradients=None,
    ),
    "norm, by rows": Computed(
        norm, NORM, {"x": [HEADS], "residual": [HEADS]}, [HEADS], gradients={"weight": [P], "bias": [P]}
    ),
    "norm, by batch": Computed(
        norm, NORM, {"x": [BATCH], "residual": [BATCH]}, [BATCH],
        gradients={"weight": [BATCH], "bias": [BATCH]},
    ),
    "prepare_heads, by heads": Computed(
        prepare_heads, HEADS_BESIDE, {name: [HEADS] for name in HEADS_BESIDE}, [HEADS]
    ),
    "prepare_heads, by length": Computed(
        prepare_heads, HEADS_BESIDE, {"x": [LENGTH]}, [LENGTH],
        gradients={"norm_weight": [P], "head_scale": [P]},
    ),
    "mlp, by tokens": Computed(
        mlp, MLP, {"x": [BATCH]}, [BATCH],
        gradients={name: [P] for name in ("w_in", "b_in", "w_out", "b_out")},
    ),
    "mlp, a branch by tokens": Computed(
        mlp,
        {**MLP, "w_out": (D, 10), "b_out": (D,), "norm_weight": (D,), "residual": (6, D)},
        {"x": [BATCH], "residual": [BATCH]},
        [BATCH],
        gradients={"residual": [R], **{n: [P] for n in ("w_in", "b_in", "w_out", "b_out", "norm_weight")}},
    ),
    "mlp, by hidden units": Computed(mlp, MLP, HIDDEN, [P], gradients={"x": [P], "b_out": [R]}),
    "gated mlp, by hidden units": Computed(
        mlp, {**MLP, "w_up": (10, D), "b_up": (10,)}, {**HIDDEN, "w_up": [BATCH], "b_up": [BATCH]}, [P],
        gradients={"x": [P], "b_out": [R]},
    ),
    "gated mlp, replicated gates sliced by hidden units": Computed(
        mlp, {**MLP, "w_up": (10, D)}, {"w_in": [BATCH]}, [P],
        gradients={"x": [P], "b_out": [R], "b_in": [BATCH], "w_up": [BATCH], "w_out": [HEADS]},
    ),
    "loss of rows, by tokens": Computed(
        loss_rows, LOSS, BY_TOKENS, [HEADS], gradients={"w": [P], "b": [P]}
    ),
    "loss, by tokens": Computed(
        loss, {**LOSS, "coefficients": numbers(3, 8).double()}, BY_TOKENS, [P],
        gradients={"w": [P], "b": [P]},
    ),
    **{
        f"{name}, {word}": Computed(function, tensors, placed(tensors, place), [place], gradients=None)
        for word, place in (("by batch", BATCH), ("by heads", HEADS))
        for name, function, tensors in (
            ("statistics", statistics, SEEN),
            ("weights", weights, {**SEEN, "rows": torch.arange(3), "columns": torch.arange(3)}),
            ("cache", cache, CACHES),
            ("quantised cache", cache, QUANTISED),
        )
    },
}  # fmt: skip


def in_a_transform(mesh: DeviceMesh) -> None:
    """torch.func hides DTensors from fastattn.attention, so that they reach its operators."""
    whole = [torch.randn(B, H, N, D, dtype=torch.float64) for _ in range(3)]
    spread = [distribute_tensor(t, mesh, [HEADS]) for t in whole]

    def loss(*tensors: Tensor) -> Tensor:
        return fastattn.attention(*tensors, causal=True).square().sum()

    found, expected = (torch.func.grad(loss, (0, 1, 2))(*tensors) for tensors in (spread, whole))
    for a, e in zip(found, expected, strict=True):
        assert list(a.placements) == [HEADS]
        torch.testing.assert_close(a.full_tensor(), e)
    with pytest.raises(
        ValueError, match="second derivatives and forward mode of DTensors are not computed within"
    ):
        torch.func.grad(lambda *t: torch.func.grad(loss)(*t).square().sum())(*spread)


def traced(mesh: DeviceMesh) -> None:
    """Graphs of the function and of its operator; the compiler sees one graph, without a break."""
    whole = [torch.randn(B, H, N, D, dtype=torch.float64) for _ in range(3)]
    spread = [distribute_tensor(t, mesh, [HEADS]).requires_grad_() for t in whole]
    calls = (lambda *t: fastattn.attention(*t, causal=True), lambda *t: attention(*t)[0])
    for call in calls:
        expected = call(*spread)
        upstream = torch.ones_like(expected)
        wanted = torch.autograd.grad(expected, spread, upstream)
        graph = make_fx(call)(*(t.detach() for t in spread))
        torch.testing.assert_close(graph(*spread).full_tensor(), expected.full_tensor())
        out = torch.compile(call, backend="aot_eager", fullgraph=True)(*spread)
        assert out.placements == expected.placements
        for a, e in zip((out, *torch.autograd.grad(out, spread, upstream)), (expected, *wanted), strict=True):
            torch.testing.assert_close(a.full_tensor(), e.full_tensor())


def refused(mesh: DeviceMesh, call: Callable[..., Any], words: str) -> None:
    def spread(placement: Any, *shape: int) -> DTensor:
        return distribute_tensor(torch.zeros(shape or (B, H, N, D)), mesh, [placement])

    with pytest.raises(RuntimeError, match=words):
        call(spread)


def weights_of(s: Callable[..., DTensor], *placements: Any) -> dict[str, DTensor]:
    shapes = ((10, D), (10,), (5, 10), (5,))
    names = ("w_in", "b_in", "w_out", "b_out")
    return {name: s(p, *shape) for name, p, shape in zip(names, placements, shapes, strict=True)}


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a sequence whose keys are sharded": (
        lambda s: attention(s(R), s(LENGTH), s(LENGTH)), r"k must have R.* got S\(2\).*distributed.attention"
    ),
    "queries under causal, after queries under no mask": (
        lambda s: [attention(s(LENGTH), s(R), s(R), causal=causal) for causal in (False, True)],
        "causal must not be given to an operator",
    ),
    "heads that do not divide": (
        lambda s: attention(*(s(HEADS, B, 3, N, D) for _ in range(3))), "3 query heads and 3 key heads cannot"
    ),
    "dropout over heads": (
        lambda s: attention(*(s(HEADS),) * 3, dropout=0.5, dropout_state=s(R, B, 2).long()), "dropout must not be"
    ),
    "widths": (lambda s: attention(s(Shard(3)), s(R), s(R)), r"on a q with S\(3\)"),
    "partial sums": (lambda s: attention(partial_sum(s(R)), s(R), s(R)), r"q must have R.* got P"),
    "a sharded norm": (
        lambda s: norm(s(LENGTH, B, 6, D), s(R, B, D), s(R, B, D)), "fastattn.rms_norm and layer_norm take x"
    ),
    "positions": (
        lambda s: prepare_heads(s(LENGTH), s(R, B, H, D), s(R, B, H), s(R, B, N, 4), s(R, B, N, 4)),
        "cos must not be given to an operator that shares out positions",
    ),
    "a gate of another sharding": (
        lambda s: mlp(s(R, 6, D), **weights_of(s, BATCH, BATCH, HEADS, R), w_up=s(HEADS, 10, D)),
        r"w_up must have S\(0\) or be replicated.* got S\(1\)",
    ),
    "a residual by hidden units": (
        lambda s: mlp(s(R, 6, D), **weights_of(s, BATCH, BATCH, HEADS, R), residual=s(R, 6, 5)),
        "norm and residual must not be given",
    ),
    "kept in int8 by hidden units": (
        lambda s: mlp(s(R, 6, D), **weights_of(s, BATCH, BATCH, HEADS, R), save="int8"), 'save="int8" must not be'
    ),
    "hidden units of the last weight only": (
        lambda s: mlp(s(R, 6, D), **weights_of(s, R, R, HEADS, R)), r"w_out must have R"
    ),
    "classes": (
        lambda s: loss_rows(s(R, 8, D), s(BATCH, CLASSES, D), s(R, CLASSES), s(R, 8).long()),
        r"w must have R.* got S\(0\).*linear_weight sharded by its rows",
    ),
    "a whole cache of sharded keys": (
        lambda s: operators.cache_append(
            s(R), s(R), None, None, s(BATCH), s(BATCH), s(R, B).int(), None, False, "portable"
        ),
        r"k must have R.* got S\(0\)",
    ),
    "pages of sharded rows": (
        lambda s: operators.cache_append(
            *(s(BATCH),) * 2, None, None, *(s(BATCH),) * 2, s(BATCH, B).int(), s(R, B, 1).int(), False, "portable"
        ),
        "block_table must not be given to an operator that shares out the batch",
    ),
}  # fmt: skip


def partial_sum(t: DTensor) -> DTensor:
    return DTensor.from_local(t.to_local(), t.device_mesh, [P])


def torchs_context_parallel_on_a_cpu(mesh: DeviceMesh) -> None:
    q, k, v = (numbers(1, 2, 8 * N, D) for _ in range(3))
    with (
        fastattn.sdpa(),
        context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2] * 3),
        pytest.raises(RuntimeError, match=r"Take fastattn\.distributed\.context_parallel"),
    ):
        F.scaled_dot_product_attention(q, k, v, is_causal=True)


def torchs_ring_over_our_operators(mesh: DeviceMesh) -> None:
    """On GPUs torch's context_parallel calls the operators that fastattn.sdpa replaces. Here its ring calls what
    they are replaced by."""
    whole = numbers(4, 1, 2, 8 * N, D).unbind()
    before = ring._cp_options.enable_load_balance
    ours, group = _Operators(), mesh.get_group()
    try:
        for causal, balanced in ((True, False), (True, True), (False, False)):
            ring._cp_options.enable_load_balance = balanced
            rank, halves = mesh.get_local_rank(), torch.arange(8 * N).view(4, -1)
            own = (halves[[rank, 3 - rank]] if balanced else halves[2 * rank : 2 * rank + 2]).flatten()
            q, k, v, dout = (t[:, :, own] for t in whole)
            options = {"dropout_p": 0.0, "return_debug_mask": False, "scale": None}
            out, lse, *_ = ring._templated_ring_attention(
                group, 2, ours.forward_on_gpu, q, k, v, is_causal=causal, **options
            )
            found = ring._templated_ring_attention_backward(
                group, 2, partial(_backward, ours), dout, "grad_out", q, k, v, out, lse, causal
            )
            leaves = [t.clone().requires_grad_() for t in whole[:3]]
            expected = F.scaled_dot_product_attention(*leaves, is_causal=causal)
            wanted = (expected, *torch.autograd.grad(expected, leaves, whole[3]))
            for a, e in zip((out, *found), wanted, strict=False):
                torch.testing.assert_close(a, e[:, :, own])
    finally:
        ours.remove()
        ring._cp_options.enable_load_balance = before


def _backward(ours: Any, **given: Any) -> tuple[Tensor, ...]:
    """As torch's dispatcher calls it."""
    tensors = (given[name] for name in ("grad_out", "query", "key", "value", "out", "logsumexp"))
    seed = torch.zeros(2, dtype=torch.uint64)
    return ours.backward_on_gpu(*tensors, None, None, 0, 0, 0.0, given["is_causal"], seed, None)


def gate_and_up_by_both_dimensions(mesh: DeviceMesh) -> None:
    placements = {"w_in": [BATCH] * 2, "w_up": [BATCH] * 2, "w_out": [HEADS] * 2}
    tensors = {
        name: distribute_tensor(torch.zeros(shape), two_by_two(mesh), placements.get(name, [R] * 2))
        for name, shape in {**MLP, "w_in": (12, D), "b_in": (12,), "w_up": (12, D), "w_out": (5, 12)}.items()
    }
    with pytest.raises(RuntimeError, match="w_up with a gradient, over two dimensions of the mesh, must not be"):
        tensors["w_up"].requires_grad_()
        torch.autograd.grad(mlp(**tensors).sum(), tensors["w_up"])


ON_TWO_DIMENSIONS: dict[str, groups.Case] = {
    "attention": Computed(
        attention, {**heads(2), "sinks": (B, H)}, all_as(BATCH, HEADS) | {"sinks": [BATCH, HEADS]}, [BATCH, HEADS]
    ),
    "attention, heads twice": Computed(attention, heads(), all_as(HEADS, HEADS), [HEADS, HEADS]),
    "attention, batch and queries": Computed(
        attention,
        heads(2),
        {"q": [BATCH, LENGTH], "k": [BATCH, R], "v": [BATCH, R]},
        [BATCH, LENGTH],
        {"causal": False},
        {"k": [BATCH, P], "v": [BATCH, P]},
    ),
    "mlp": Computed(
        mlp,
        {**MLP, "x": (6, D)},
        {"x": [BATCH, R], "w_in": [R, BATCH], "b_in": [R, BATCH], "w_out": [R, HEADS]},
        [BATCH, P],
        gradients={
            "x": [BATCH, P], "w_in": [P, BATCH], "b_in": [P, BATCH], "w_out": [P, HEADS], "b_out": [P, R]
        },
    ),
    "gated mlp": Computed(
        mlp,
        {**MLP, "w_up": (10, D)},
        {"x": [BATCH, R], "w_in": [R, BATCH], "w_up": [R, BATCH]},
        [BATCH, P],
        gradients={
            "x": [BATCH, P], "w_in": [P, BATCH], "w_up": [P, BATCH], "b_in": [P, BATCH], "w_out": [P, HEADS],
            "b_out": [P, R],
        },
    ),
}  # fmt: skip
CASES: dict[groups.Group, dict[str, groups.Case]] = {
    2: {
        **{f"operator on DTensors: {name}": run for name, run in COMPUTED.items()},
        **{
            f"operator on DTensors: {name} refused": partial(refused, call=call, words=words)
            for name, (call, words) in REFUSED.items()
        },
        "operators on DTensors within torch.func": in_a_transform,
        "operators on DTensors, traced and compiled": traced,
        "torch's context_parallel on a CPU": torchs_context_parallel_on_a_cpu,
        "torch's ring over our operators": torchs_ring_over_our_operators,
    },
    4: {
        **{f"operator on a mesh of two dimensions: {name}": run for name, run in ON_TWO_DIMENSIONS.items()},
        "operator on a mesh of two dimensions: gate and up by both": gate_and_up_by_both_dimensions,
    },
}
