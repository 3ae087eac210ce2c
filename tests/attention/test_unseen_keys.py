"""What lies behind a batch entry's key length, or behind the last sequence, may be anything: it is never read."""

from __future__ import annotations

import pytest
import torch
from attention_problems import IMPLEMENTATIONS, implementation
from hardware import DEVICE, ON_GPU
from torch import Tensor

import fastattn
from fastattn import masks

QUERIES, KEYS = 8, 40
LENGTHS = torch.tensor([0, 37, 18])
BEHIND = (torch.arange(KEYS) >= LENGTHS[:, None]).to(DEVICE)
LISTS = masks.from_function(lambda b, h, i, j: (i * 7 + j * 13) % 11 < 6)
SEQUENCES = masks.packed_sequences([0, 3, 8], [0, 15, 40])
OF_LENGTHS = masks.key_lengths(LENGTHS)

# How the lengths are given, and what stands beside them.
GIVEN = {
    "lengths": {},
    "causal": {"causal": True},
    "window": {"window": (15, 2)},
    "soft cap and slopes": {"softcap": 2.0, "alibi_slopes": torch.tensor([0.1, 0.2], device=DEVICE)},
    "biases and sinks": {"bias": True, "relative_bias": torch.ones(2, 9, device=DEVICE).cumsum(1),
                         "sinks": torch.ones(2, device=DEVICE)},
    "dropout": {"dropout_p": 0.3, "dropout_state": torch.arange(6, device=DEVICE).view(3, 2)},
    "lists": {"mask": LISTS},
    "lists and a bias": {"mask": LISTS, "bias": True},
    "intervals": {"mask": SEQUENCES},
    "a mask": {"mask": OF_LENGTHS},
    "a mask, causal": {"mask": OF_LENGTHS & masks.causal()},
    "a mask, lists": {"mask": LISTS & OF_LENGTHS},
    "a mask, intervals": {"mask": OF_LENGTHS & SEQUENCES},
    "either of two masks": {"mask": LISTS & OF_LENGTHS | masks.window(3) & OF_LENGTHS},
}  # fmt: skip


def call_of(name: str, backend: str):
    given = {key: value for key, value in GIVEN[name].items() if key != "bias"}
    if not name.startswith(("a mask", "either")):
        given["key_lengths"] = LENGTHS.to(DEVICE)

    def call(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        options = {**given, "bias": bias[0]} if bias else given
        out, lse = fastattn.attention(q, k, v, **options, return_lse=True, backend=backend)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    return call


def tensors_like(tensors, spoil: float | None) -> list[Tensor]:
    """Random tensors of these shapes, filled behind the lengths where a dimension is one of keys."""
    random = [torch.randn(t.shape, device=t.device) for t in tensors]
    if spoil is None:
        return random
    return [
        t.masked_fill(BEHIND[:, None, :, None], spoil) if t.shape[2] == KEYS else
        t.masked_fill(BEHIND[:, None, None, :], spoil) if t.shape[3] == KEYS else t
        for t in random
    ]  # fmt: skip


def inputs_of(name: str, spoil: float | None) -> list[Tensor]:
    shapes = [(3, 2, QUERIES, 8), (3, 1, KEYS, 8), (3, 1, KEYS, 8)]
    shapes += [(3, 2, QUERIES, KEYS)] if "bias" in GIVEN[name] else []
    return tensors_like([torch.empty(shape, device=DEVICE) for shape in shapes], spoil)


def derivatives(name: str, backend: str, spoil: float | None, orders: tuple[str, ...]) -> list[Tensor]:
    """Results, gradients, and as asked second derivatives and tangents, of the same random numbers each time."""
    torch.manual_seed(0)
    call, inputs = call_of(name, backend), [t.requires_grad_() for t in inputs_of(name, spoil)]
    results = call(*inputs)
    upstream = [torch.randn_like(t) for t in results]
    gradients = torch.autograd.grad(results, inputs, upstream, create_graph="second" in orders)
    found = [*results, *gradients]
    if "second" in orders:
        found += torch.autograd.grad(gradients, inputs, tensors_like(gradients, spoil))
    if "forward" in orders:
        found += torch.func.jvp(call, tuple(t.detach() for t in inputs), tuple(tensors_like(inputs, spoil)))[1]
    return [t.detach() for t in found]


# In the interpreter, which is slow, those that differ in their kernels.
KERNELS = ("causal", "biases and sinks", "dropout", "a mask, intervals", "lists and a bias")


@pytest.mark.parametrize(
    ("given", "name", "spoil"),
    [
        (given, name, spoil)
        for given in GIVEN
        for name, spoil in (*((name, torch.nan) for name in IMPLEMENTATIONS), ("tiled", torch.inf))
        if name != "triton" or ON_GPU or given in KERNELS
    ],
)
def test_what_lies_behind_the_lengths_changes_nothing(given: str, name: str, spoil: float) -> None:
    # Second derivatives are the tiles', whatever the backend.
    orders = ("second", "forward") if name in ("tiled", "reference") else ("forward",) if name == "triton" else ()
    with implementation(name) as backend:
        expected = derivatives(given, backend, None, orders)
        found = derivatives(given, backend, spoil, orders)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)
        if a.shape[2:] == (KEYS, 8):
            assert not a.masked_select(BEHIND[:, None, :, None]).any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("slopes", [None, torch.ones(2, 2, device=DEVICE)])
def test_tokens_behind_the_last_sequence_change_nothing(slopes: Tensor | None, name: str) -> None:
    starts = torch.tensor([0, 5, 12]), torch.tensor([0, 20, 31])
    sizes = (12, 31, 31)
    q, k, v = (torch.randn(size, 2, 8, device=DEVICE) for size in sizes)
    dout = torch.randn(12, 2, 8, device=DEVICE)

    def results(behind: int) -> list[Tensor]:
        fill = torch.full((behind, 2, 8), torch.nan, device=DEVICE)
        leaves = [torch.cat((t, fill)).requires_grad_() for t in (q, k, v)]
        with implementation(name) as backend:
            options = {"causal": True, "alibi_slopes": slopes, "return_lse": True, "backend": backend}
            out, lse = fastattn.attention_varlen(*leaves, *starts, **options)
        return [out, lse.t(), *torch.autograd.grad(out, leaves, torch.cat((dout, fill)))]

    for clean, found in zip(results(0), results(7), strict=True):
        torch.testing.assert_close(found[: len(clean)], clean)
        behind = found[len(clean) :]
        assert len(behind) == 7
        assert torch.equal(behind, torch.full_like(behind, -torch.inf if behind.dim() == 2 else 0.0))
