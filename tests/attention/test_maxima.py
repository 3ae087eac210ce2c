"""The largest score of each row, out of the forward."""

from __future__ import annotations

import pytest
import torch
from attention_problems import Problem
from hardware import DEVICE
from tolerance import assert_as_exact_as_eager
from torch.utils.flop_counter import FlopCounterMode

import fastattn
import fastattn.flops
from fastattn.core.attention import definition
from fastattn.core.attention.spec import ScoreTensors
from fastattn.lens import attention_statistics

PROBLEMS = {
    "causal": Problem(causal=True, queries=50, keys=50, dtype=torch.float16),
    "sinks": Problem(sinks=True, causal=True, queries=50, keys=40),
    "lists": Problem(lists="random", queries=70, keys=90, heads=1, key_heads=1),
    "lists that share rows": Problem(lists="global", queries=70, keys=70, heads=1, key_heads=1),
    "intervals": Problem(intervals=True, queries=50, keys=60, heads=1, key_heads=1),
    "few queries": Problem(queries=3, keys=300, heads=1, key_heads=1),
    "all at once": Problem(
        batch=2, queries=40, keys=50, causal=True, softcap=2.0, lengths=True, alibi=True, sinks=True, dropout=0.2,
        bias=(1, 0, 0, 0), radius=9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "portable", "reference"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_largest_score_comes_with_the_same_output_and_gradients(name: str, backend: str) -> None:
    problem = PROBLEMS[name]
    q, k, v = problem.inputs()
    tensors = problem.score_tensors()
    given = problem.arguments(tensors) | {"backend": backend}
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse, most = fastattn.attention(*leaves, **given, return_lse=True, return_max=True)
    expected_out = fastattn.attention(*leaves, **given)
    assert not most.requires_grad and most.shape == lse.shape and most.dtype == lse.dtype
    exact_tensors = ScoreTensors(*(t.double() if t is not None and t.is_floating_point() else t for t in tensors))
    exact, eager = (
        (
            *definition.attention(*qkv, problem.spec, beside),
            definition.scores_of(
                qkv[0], definition.keys_there(qkv[1], tensors.key_lengths), problem.spec, beside
            ).amax(-1),
        )
        for qkv, beside in (([t.double() for t in (q, k, v)], exact_tensors), ((q, k, v), tensors))
    )
    for ours, x, e in zip((out.detach(), lse.detach(), most), exact, eager, strict=True):
        assert_as_exact_as_eager(ours, x, e.to(ours.dtype))
    ours, theirs = (torch.autograd.grad(t.sum(), leaves) for t in (out, expected_out))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_it_is_the_statistic_and_comes_alone_if_asked_alone() -> None:
    q, k, v = Problem(causal=True, sinks=True).inputs()
    _, most = fastattn.attention(q, k, v, causal=True, return_max=True)
    _, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(most, attention_statistics(q, k, lse, want="max_logit", causal=True).max_logit)
    several = torch.randn(3, 1, 2, 20, 8, device=DEVICE)
    mapped = torch.func.vmap(lambda t: fastattn.attention(t, t, t, return_max=True)[1])(several)
    torch.testing.assert_close(
        mapped, torch.stack([fastattn.attention(t, t, t, return_max=True)[1] for t in several])
    )
    with pytest.raises(TypeError, match="return_max must be a bool, got int"):
        fastattn.attention(q, k, v, return_max=1)


def test_forward_mode_passes_it_by() -> None:
    """out and lse have their tangents; the maxima have none."""
    q, k, v, moved = (torch.randn(1, 2, 12, 8, dtype=torch.float64, device=DEVICE) for _ in range(4))

    def both(q, most):
        found = fastattn.attention(q, k, v, causal=True, return_lse=True, return_max=most)
        return found[:2]

    for ours, theirs in zip(
        torch.func.jvp(lambda q: both(q, True), (q,), (moved,))[1],
        torch.func.jvp(lambda q: both(q, False), (q,), (moved,))[1],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()
    _, none = torch.func.jvp(lambda q: fastattn.attention(q, k, v, return_max=True)[1], (q,), (moved,))
    assert not none.any()
    second = [torch.func.hessian(lambda q, m=most: both(q, m)[0].square().sum())(q) for most in (True, False)]
    torch.testing.assert_close(*second)


def test_it_compiles_where_one_tensor_is_queries_keys_and_values() -> None:
    x = torch.randn(1, 2, 20, 8, requires_grad=True)
    step = torch.compile(lambda x: fastattn.attention(x, x, x, return_max=True), backend="eager", fullgraph=True)
    for ours, theirs in zip(step(x), fastattn.attention(x, x, x, return_max=True), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_compiles_into_one_graph() -> None:
    leaves = [torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(3)]
    step = torch.compile(lambda *t: fastattn.attention(*t, return_max=True), backend="eager", fullgraph=True)
    for ours, theirs in zip(step(*leaves), fastattn.attention(*leaves, return_max=True), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_counts_the_same_operations() -> None:
    q, k, v = Problem(causal=True).inputs()
    with FlopCounterMode(display=False) as plain:
        fastattn.attention(q, k, v, causal=True)
    with FlopCounterMode(display=False) as with_maxima:
        fastattn.attention(q, k, v, causal=True, return_max=True)
    assert plain.get_total_flops() == with_maxima.get_total_flops() > 0
