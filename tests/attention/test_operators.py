"""The attention operators do what PyTorch expects of an operator: every transform, tracer and context."""

from __future__ import annotations

import functools

import pytest
import torch
from attention_problems import IMPLEMENTATIONS, Problem, implementation, run
from hardware import DEVICE
from torch import library
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastattn
import fastattn.flops
from fastattn import masks
from fastattn.core.attention import definition as attention_definition
from fastattn.core.attention import torch_dense
from fastattn.core.attention.spec import AttentionSpec, Saved, ScoreTensors, Tangents

BACKENDS = ("triton", "portable")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in Problem(heads=4, key_heads=2, queries=20, keys=24).inputs())
    tensors = ScoreTensors(
        key_lengths=torch.tensor([17], device=DEVICE),
        alibi_slopes=torch.rand(1, 4, device=DEVICE),
        bias=torch.randn(1, 1, 20, 24, device=DEVICE, requires_grad=True),
        relative_bias=torch.randn(1, 4, 9, device=DEVICE, requires_grad=True),
        sinks=torch.randn(1, 4, device=DEVICE, requires_grad=True),
        dropout_state=fastattn.dropout_state(1, DEVICE),
        head_scale=torch.rand(1, 4, device=DEVICE, requires_grad=True),
    )
    documents = masks.packed_sequences([0, 9, 20], [0, 13, 24], True).lower(1, 4, 20, 24, DEVICE)
    plain = *ScoreTensors(), *AttentionSpec(True, 0.25).options
    intervals = *ScoreTensors(intervals=documents.intervals), *AttentionSpec(scale=0.25).options
    options = *tensors, *AttentionSpec(True, 0.25, (9, None), 3.0, 0.25).options
    for beside in (plain, intervals, options):
        arguments = (q, k, v, *beside, backend)
        library.opcheck(torch.ops.fastattn.attention_forward.default, arguments)
    out, lse = (t.detach() for t in torch.ops.fastattn.attention_forward(*arguments))
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), q, k, v, out, lse, dlse, True, True, *options, backend)
        library.opcheck(torch.ops.fastattn.attention_backward.default, arguments)
    moved = (torch.randn_like(t) for t in (q, k, v, *options[2:5], tensors.head_scale))
    arguments = (q, k, v, out, lse, *moved, *options, backend)
    library.opcheck(torch.ops.fastattn.attention_tangent.default, arguments)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_func_grad_vmap_and_their_compositions_equal_autograd(name: str) -> None:
    inputs = [
        torch.stack([t] * 3) * torch.randn(3, 1, 1, 1, 1, device=DEVICE) for t in Problem(queries=20).inputs()
    ]
    with implementation(name) as backend:

        def loss(q, k, v):
            options = {"key_lengths": torch.tensor([18], device=DEVICE), "sinks": torch.zeros(2, device=DEVICE)}
            out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True, backend=backend, **options)
            return out.square().sum() + lse.sum()

        per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*inputs)
        # Keys and values shared by the batch of queries: dimensions that are not mapped, or not the first.
        q, k, v = inputs[0], inputs[1][0], inputs[2][0]
        shared = torch.func.vmap(torch.func.grad(loss), in_dims=(2, None, None))(q.movedim(0, 2), k, v)
        for i in range(3):
            leaves = [t[i].detach().requires_grad_() for t in inputs]
            for ours, expected in zip(per_sample, torch.autograd.grad(loss(*leaves), leaves), strict=True):
                torch.testing.assert_close(ours[i], expected, rtol=1e-4, atol=1e-5)
            leaves = [q[i].detach().requires_grad_(), k, v]
            torch.testing.assert_close(
                shared[i], torch.autograd.grad(loss(*leaves), leaves[0])[0], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break_and_gives_the_same(dynamic: bool, backend: str) -> None:
    torch._dynamo.reset()

    def function(q, k, v):
        out, lse = fastattn.attention(q * 2, k, v, causal=True, return_lse=True, backend=backend)
        return out.transpose(1, 2).flatten(2) + 1, lse

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for queries in (20, 33):
        problem = Problem(queries=queries, keys=queries, heads=4, key_heads=2)
        inputs, upstream = problem.inputs(), (torch.randn(1, queries, 64, device=DEVICE), None)
        for ours, expected in zip(run(inputs, upstream, compiled), run(inputs, upstream, function), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_one_tensor_may_be_queries_keys_and_values_of_a_compiled_call() -> None:
    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    compiled = torch.compile(lambda x: fastattn.attention(x, x, x), backend="aot_eager", fullgraph=True)
    (ours,), (expected,) = (
        torch.autograd.grad(attend(x).sum(), x) for attend in (compiled, lambda x: fastattn.attention(x, x, x))
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_to_its_dtype_and_returns_gradients_in_the_inputs_own(dtype: torch.dtype) -> None:
    q, k, v = (t.requires_grad_() for t in Problem(causal=True).inputs())
    with torch.autocast(DEVICE, dtype):
        out = fastattn.attention(q, k.to(dtype), v, causal=True)
        double = fastattn.attention(q.double(), k.double(), v.double())
    assert out.dtype == dtype and double.dtype == torch.float64
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (q, k, v)))
    low = [t.detach().to(dtype) for t in (q, k, v)]
    assert torch.equal(out, fastattn.attention(*low, causal=True))


def test_selective_checkpointing_sees_one_operator_and_need_not_run_it_again() -> None:
    ran = []
    forward = torch.ops.fastattn.attention_forward.default

    def policy(context, operator, *args, **kwargs):
        if operator is forward:
            ran.append(context.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def function(q, k, v):
        return fastattn.attention(q.sin(), k, v, causal=True).sum()

    q, k, v = (t.requires_grad_() for t in Problem().inputs())
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    ours = torch.autograd.grad(checkpoint(function, q, k, v, use_reentrant=False, context_fn=contexts), (q, k, v))
    assert ran.count(False) == 1
    for a, e in zip(ours, torch.autograd.grad(function(q, k, v), (q, k, v)), strict=True):
        assert torch.equal(a, e)


def test_double_use_of_the_graph_with_retain_graph() -> None:
    q, k, v = (t.requires_grad_() for t in Problem().inputs())
    out = fastattn.attention(q, k, v)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("queries", "keys"), [(32, 32), (16, 48), (48, 16)])
@pytest.mark.parametrize("window", [(None, None), (7, None), (7, 3), (None, 20)])
@pytest.mark.parametrize("causal", [False, True])
def test_flops_are_counted_over_the_visible_scores(causal: bool, window: tuple, queries: int, keys: int) -> None:
    problem = Problem(
        queries=queries, keys=keys, width=16, value_width=24, causal=causal, window=window, heads=4, key_heads=2
    )
    q, k, v = (t.requires_grad_() for t in problem.inputs())
    seen = int(attention_definition.visible(queries, keys, problem.spec).sum())
    with FlopCounterMode(display=False) as forward:
        out = fastattn.attention(q, k, v, causal=causal, window=window)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    with FlopCounterMode(display=False) as tangent:
        lse = torch.zeros(out.shape[:3], device=DEVICE)
        beside = *Tangents(q, k), *ScoreTensors(), *problem.spec.options, None
        torch.ops.fastattn.attention_tangent(q, k, v, out, lse, *beside)
    assert tangent.get_total_flops() == 2 * 4 * seen * (3 * 16 + 24)
    assert forward.get_total_flops() == 2 * 4 * seen * (16 + 24)
    assert backward.get_total_flops() == 2 * 4 * seen * (3 * 16 + 2 * 24)


def test_outputs_merge_their_heads_without_a_copy() -> None:
    for backend in ("triton", "portable", "reference"):
        out = fastattn.attention(*Problem(queries=20).inputs(), backend=backend)
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("causal", [False, True])
def test_the_flash_attention_torch_has_for_cuda_takes_our_arguments(causal: bool) -> None:
    # On the meta device shapes are computed as on CUDA; the numbers are checked wherever there is a GPU.
    q = torch.empty(2, 4, 64, 32, dtype=torch.bfloat16, device="meta").transpose(2, 3).contiguous().transpose(2, 3)
    k = torch.empty(2, 2, 64, 32, dtype=torch.bfloat16, device="meta")
    spec = AttentionSpec(causal, 0.1)
    out, lse = torch_dense.forward(q, k, k, spec)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    gradients = torch_dense.backward(out[:, :, :1].expand(q.shape), Saved(q, k, k, out, lse), spec)
    assert [g.shape for g in gradients[:3]] == [q.shape, k.shape, k.shape]
