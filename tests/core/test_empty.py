"""Nothing in, nothing out: no batch entries, heads, tokens or keys, beside every feature, in every derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from attention_problems import IMPLEMENTATIONS, implementation
from hardware import DEVICE, ON_GPU
from torch import Tensor

import fastattn
from fastattn import masks

SIZES = {"batch": 2, "heads": 2, "queries": 5, "keys": 7}
FEATURES = {
    "nothing": lambda b, h, i, j: {},
    "causal": lambda b, h, i, j: {"causal": True},
    "window": lambda b, h, i, j: {"window": (2, 1)},
    "key lengths": lambda b, h, i, j: {"key_lengths": torch.zeros(b, dtype=torch.int64, device=DEVICE)},
    "soft cap": lambda b, h, i, j: {"softcap": 2.0},
    "slopes": lambda b, h, i, j: {"alibi_slopes": torch.ones(h, device=DEVICE)},
    "bias": lambda b, h, i, j: {"bias": torch.ones(b, h, i, j, device=DEVICE, requires_grad=True)},
    "bias for all": lambda b, h, i, j: {"bias": torch.ones(1, 1, 1, j, device=DEVICE, requires_grad=True)},
    "bool bias": lambda b, h, i, j: {"bias": torch.ones(b, 1, i, j, device=DEVICE) > 0},
    "relative bias": lambda b, h, i, j: {"relative_bias": torch.ones(h, 5, device=DEVICE, requires_grad=True)},
    "sinks": lambda b, h, i, j: {"sinks": torch.ones(h, device=DEVICE, requires_grad=True)},
    "dropout": lambda b, h, i, j: {"dropout_p": 0.5},
    "scales": lambda b, h, i, j: {"scale": torch.ones(h, device=DEVICE, requires_grad=True)},
    "lists": lambda b, h, i, j: {"mask": masks.dilated(2)},
    "lists and a bias": lambda b, h, i, j: {"mask": masks.dilated(2), "bias": torch.ones(i, j, device=DEVICE)},
    "intervals": lambda b, h, i, j: {"mask": masks.packed_sequences([0, i // 2, i], [0, j // 2, j])},
    "a mask of lengths": lambda b, h, i, j: {"mask": masks.key_lengths(torch.zeros(b, dtype=torch.int64))},
}  # fmt: skip


def finite(t: Tensor) -> bool:
    return bool(torch.isfinite(t).all())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("empty", SIZES)
@pytest.mark.filterwarnings("error", "ignore:`torch.jit.script`:DeprecationWarning")
def test_of_nothing_every_derivative_is_nothing(empty: str, feature: str, name: str) -> None:
    batch, heads, queries, keys = (0 if size == empty else number for size, number in SIZES.items())
    given = FEATURES[feature](batch, heads, queries, keys)
    learned = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
    q = torch.randn(batch, heads, queries, 8, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(batch, heads, keys, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    with implementation(name) as backend:

        def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = fastattn.attention(q, k, v, **given, return_lse=True, backend=backend)
            return out, lse.masked_fill(lse.isinf(), 0.0)

        out, lse = call(q, k, v)
        assert out.shape == q.shape and lse.shape == q.shape[:3] and not out.any()
        gradients = torch.autograd.grad((out.sum(), lse.sum()), (q, k, v, *learned), create_graph=True)
        assert [g.shape for g in gradients] == [t.shape for t in (q, k, v, *learned)]
        second = torch.autograd.grad(
            sum(g.square().sum() for g in gradients), (q, k, v, *learned), allow_unused=True
        )
        inputs = tuple(t.detach() for t in (q, k, v))
        moved = torch.func.jvp(call, inputs, tuple(torch.ones_like(t) for t in inputs))[1]
        if feature != "dropout" and (name != "triton" or ON_GPU):
            mapped = torch.vmap(call)(*(t[None].repeat(3, 1, 1, 1, 1) for t in inputs))
            assert mapped[0].shape == (3, *out.shape)
            assert torch.vmap(call)(*(t[None][:0] for t in inputs))[0].shape == (0, *out.shape)
    assert all(finite(t) for t in (*gradients, *second, *moved) if t is not None)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


W, UP, DOWN = (normal(8), normal(16, 8), normal(6, 16))
FUNCTIONS: dict[str, tuple[Callable, Callable, Sequence[Tensor]]] = {
    "mlp": (
        lambda x, up, b, down, backend: fastattn.mlp(x, up, b, down, None, backend=backend),
        lambda x, up, b, down: F.linear(F.gelu(F.linear(x, up, b)), down), (UP, normal(16), DOWN),
    ),
    "gated mlp": (
        lambda *a, backend: fastattn.gated_mlp(*a, backend=backend), gated, (UP, UP + 1, DOWN),
    ),
    "rms norm": (
        lambda x, w, backend: fastattn.rms_norm(x, w, backend=backend), lambda x, w: F.rms_norm(x, (8,), w), (W,),
    ),
    "layer norm": (
        lambda x, w, b, backend: fastattn.layer_norm(x, w, b, backend=backend),
        lambda x, w, b: F.layer_norm(x, (8,), w, b), (W, W + 1),
    ),
}  # fmt: skip
SHAPES = [(0, 8), (2, 0, 8), (0, 3, 8)]


def every_derivative(call: Callable, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The result, its gradients, second derivatives and tangent, and what torch.func makes of it."""
    learned = tuple(t.clone().requires_grad_() for t in inputs)
    out = call(*learned)
    gradients = torch.autograd.grad(out.square().sum(), learned, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), learned, allow_unused=True)
    fixed = tuple(t.detach() for t in inputs)
    moved = torch.func.jvp(call, fixed, tuple(torch.ones_like(t) for t in fixed))[1]
    mapped = torch.vmap(call)(*(t[None].repeat(3, *[1] * t.dim()) for t in fixed))
    none = torch.vmap(call)(*(t[None][:0] for t in fixed))
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(second, learned, strict=True)]
    again = torch.func.grad(lambda *a: call(*a).sum(), (0, 1))(*fixed)
    return [out, *gradients, *filled, moved, mapped, none, *again]


@pytest.mark.parametrize("implemented", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_no_tokens_every_derivative_is_torchs(name: str, shape: tuple[int, ...], implemented: str) -> None:
    ours, eager, weights = FUNCTIONS[name]
    inputs = (normal(*shape), *weights)
    with implementation(implemented) as backend:
        found = every_derivative(lambda *a: ours(*a, backend=backend), inputs)
    torch.testing.assert_close(found, every_derivative(eager, inputs))


@pytest.mark.parametrize("implemented", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)])
@pytest.mark.parametrize("kind", ["norm", "rotation", "scale"])
def test_heads_of_nothing_are_prepared(kind: str, shape: tuple[int, ...], implemented: str) -> None:
    _, heads, length, _ = shape
    angles = normal(length, 4)
    given = {"norm": normal(heads, 8), "rotation": normal(1), "scale": normal(heads)}[kind]

    def call(x: Tensor, t: Tensor) -> Tensor:
        if kind == "rotation":
            return fastattn.prepare_heads(x, cos=angles, sin=angles, backend=backend) * t
        option = {"norm": "norm_weight", "scale": "head_scale"}[kind]
        return fastattn.prepare_heads(x, **{option: t}, backend=backend)

    with implementation(implemented) as backend:
        out, dx, dt, *_ = found = every_derivative(call, (normal(*shape), given))
    assert out.shape == dx.shape == shape and dt.shape == given.shape and all(finite(t) for t in found)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("queries", "keys", "behind"),
    [([], [], 0), ([0], [0], 0), ([0, 3], [2, 0], 0), ([], [], 3), ([2, 0, 1], [2, 4, 1], 2)],
)
@pytest.mark.parametrize("options", [{"causal": True, "softcap": 2.0}, {"sinks": torch.ones(2, device=DEVICE)}])
def test_sequences_of_nothing_are_as_attention_of_each(
    name: str, queries: list[int], keys: list[int], behind: int, options: dict
) -> None:
    starts_q, starts_k = (torch.tensor([0, *n], device=DEVICE).cumsum(0).int() for n in (queries, keys))
    q, k, v = (normal(sum(n) + behind, 2, 8).requires_grad_() for n in (queries, keys, keys))
    parts = zip(*(t.split([*n, behind]) for t, n in ((q, queries), (k, keys), (v, keys))), strict=True)
    with implementation(name) as backend:
        out = fastattn.attention_varlen(q, k, v, starts_q, starts_k, backend=backend, **options)
        each = [
            fastattn.attention(*(t.transpose(0, 1)[None] for t in part), backend=backend, **options)[0]
            for part in parts
        ]
        expected = torch.cat([*(t.transpose(0, 1) for t in each[:-1]), 0.0 * q[sum(queries) :]])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        weight = torch.randn_like(out)
        found = torch.autograd.grad((out * weight).sum(), (q, k, v), materialize_grads=True)
        wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v), materialize_grads=True)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_flash_attns_functions_of_nothing_give_nothing(shape: tuple[int, ...]) -> None:
    batch, length, *_ = shape
    q = normal(*shape).requires_grad_()
    starts = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * length
    flat = q.flatten(0, 1)
    outs = [
        fastattn.flash_attn.flash_attn_func(q, q, q, causal=True),
        fastattn.flash_attn.flash_attn_qkvpacked_func(torch.stack([q, q, q], 2)),
        fastattn.flash_attn.flash_attn_kvpacked_func(q, torch.stack([q, q], 2), dropout_p=0.1),
        fastattn.flash_attn.flash_attn_varlen_func(flat, flat, flat, starts, starts, length, length).view(shape),
    ]
    for out in outs:
        (gradient,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
        assert out.shape == gradient.shape == shape


@pytest.mark.parametrize("shape", [(0, 3, 32), (2, 0, 32)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "sizes", "inputs"),
    [
        ("MultiheadAttention", (32, 4), 3),
        ("TransformerEncoderLayer", (32, 4, 16, 0.0), 1),
        ("TransformerDecoderLayer", (32, 4, 16, 0.0), 2),
        ("LayerNorm", (32,), 1),
    ],
)
def test_torchs_modules_of_nothing_give_what_torchs_give(
    name: str, sizes: tuple, inputs: int, training: bool, shape: tuple[int, ...]
) -> None:
    options = {} if name == "LayerNorm" else {"batch_first": True}
    found = []
    for library in (fastattn.nn, torch.nn):
        torch.manual_seed(0)
        module = getattr(library, name)(*sizes, **options).to(DEVICE).train(training)
        x = torch.zeros(shape, device=DEVICE, requires_grad=True)
        out = module(*[x] * inputs)
        out = out[0] if isinstance(out, tuple) else out
        out.sum().backward()
        found.append([out, x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(found[0], found[1])
