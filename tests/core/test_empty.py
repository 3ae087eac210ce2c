"""Nothing in, nothing out: no batch entries, heads, queries or keys, beside every feature, in every derivative."""

from __future__ import annotations

import pytest
import torch
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
    assert all(finite(t) for t in (*gradients, *second, *moved) if t is not None)
