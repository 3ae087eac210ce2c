"""What holds beside equality: refusals, determinism, traffic, dropout, meshes, ranks that die."""

from __future__ import annotations

import re
from functools import partial
from typing import Any
from unittest import mock

import groups
import pytest
import torch
import torch.distributed as dist
from cases_attention import two_dimensions
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import fastattn
from fastattn import distributed, masks
from fastattn.distributed import functional

RANKS, LENGTH, HEADS, WIDTH = 4, 512, 4, 8


def heads(length: int = LENGTH, key_heads: int = HEADS, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(batch, h, length, WIDTH) for h in (HEADS, key_heads, key_heads))


def shards(plan: distributed.Layout, *tensors: Tensor) -> list[Tensor]:
    return [distributed.shard(t, plan) for t in tensors]


def every_rank(value: Any) -> list[Any]:
    """The values of all ranks, on all of them."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def wrong_on_rank_1(mesh: DeviceMesh, change: dict[str, Any], words: str) -> None:
    """Rank 1 calls in another way; all ranks get the same error, and can go on."""
    plan = distributed.layout(LENGTH, mesh, causal=True)
    q, k, v = shards(plan, *heads())
    options: dict[str, Any] = {"causal": True, "layout": plan}
    if mesh.get_local_rank() == 1:
        options |= {name: value for name, value in change.items() if name not in ("dtype", "tokens", "layout")}
        q, k, v = (t.to(change.get("dtype", t.dtype))[:, :, change.get("tokens", 0) :] for t in (q, k, v))
        if "layout" in change:
            options["layout"] = distributed.layout(LENGTH, mesh)
    try:
        distributed.attention(q, k, v, **options)
        message = "no error"
    except (TypeError, ValueError) as problem:
        message = str(problem)
    messages = every_rank(message)
    assert len(set(messages)) == 1, messages
    assert re.search(words, message), message


DISAGREEMENTS = {
    "another mask": ({"causal": False}, "same mask, causal and window: rank 0 has .*, rank 1 has"),
    "another scale": ({"scale": 0.5}, "same scale: rank 0 has 0.35.*, rank 1 has 0.5"),
    "another dtype of gradients": (
        {"gradient_dtype": torch.float32},
        "same gradient_dtype: rank 0 has None, rank 1 has torch.float32",
    ),
    "another dtype": (
        {"dtype": torch.bfloat16},
        "same dtype: rank 0 has torch.float32, rank 1 has torch.bfloat16",
    ),
    "another method": ({"method": "gather"}, "same method: rank 0 has auto, rank 1 has gather"),
    "another layout": ({"layout": 0}, "same layout"),
    "too few tokens": (
        {"tokens": 3},
        "rank 1: q must have the 128 tokens that the layout gives this rank, got 125",
    ),
    "an unknown method": ({"method": "fast"}, "rank 1: method must be one of auto, ring"),
    "a wrong window": ({"window": (1, 2, 3)}, "rank 1: window"),
    "a mask of another length": ({"mask": masks.documents([0] * 7)}, "rank 1: .*7"),
    "sinks on one rank": ({"sinks": torch.zeros(HEADS)}, "same sinks: rank 0 has None"),
}


def refused(mesh: DeviceMesh, options: dict[str, Any], words: str) -> None:
    plan = distributed.layout(LENGTH, mesh)
    if "bias" in options:
        options = {**options, "bias": torch.zeros(LENGTH // RANKS, LENGTH)}
    with pytest.raises((TypeError, ValueError), match=words):
        distributed.attention(*shards(plan, *heads(key_heads=1)), layout=plan, **options)


REFUSALS = {
    "gradients in half precision": (
        {"gradient_dtype": torch.float16},
        "gradient_dtype must be None or torch.float32 for q of torch.float32, got torch.float16",
    ),
    "rings x heads on one dimension": ({"method": "ring x heads"}, "for a mesh of two dimensions"),
    "a bias of all rows over heads": ({"method": "heads", "bias": None}, "takes a bias with one row only"),
    "an unknown keyword": ({"attn_mask": None}, "it is called bias="),
    "maxima": ({"return_max": True}, "unexpected keyword argument 'return_max'"),
}


def heads_that_do_not_divide(mesh: DeviceMesh) -> None:
    plan = distributed.layout(LENGTH, mesh)
    q, k, v = (torch.randn(1, 6, LENGTH, WIDTH) for _ in range(3))
    with pytest.raises(ValueError, match="'heads' needs q's heads to be a multiple of the 4 ranks"):
        distributed.attention(*shards(plan, q, k, v), layout=plan, method="heads")
    distributed.attention(*shards(plan, q, k, v), layout=plan)  # "auto" takes another method


def same_bits_in_every_run(mesh: DeviceMesh, method: str) -> None:
    mask = masks.longformer(64, [3, 200])
    plan = distributed.layout(LENGTH, mesh, mask=mask)
    leaves = [t.to(torch.bfloat16).requires_grad_() for t in heads()]
    runs = []
    for _ in range(3):
        out = distributed.attention(*shards(plan, *leaves), layout=plan, mask=mask, method=method)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def drops_what_one_process_drops(mesh: DeviceMesh, options: dict[str, Any], method: str) -> None:
    seen = {n: o for n, o in options.items() if n not in ("alibi_slopes", "bias")}
    mesh = two_dimensions(mesh) if method == "ring x heads" else mesh
    plan = distributed.layout(LENGTH, mesh, **seen, batch=2)
    inputs, dout = heads(batch=2), torch.randn(2, HEADS, LENGTH, WIDTH)
    state = fastattn.dropout_state(2)
    drops = {**options, "dropout_p": 0.4, "dropout_state": state}
    leaves = [t.double().requires_grad_() for t in inputs]
    if "bias" in options:
        drops["bias"] = torch.randn(HEADS, 1, LENGTH).double().requires_grad_()
        leaves.append(drops["bias"])
    expected = fastattn.attention(*leaves[:3], **drops)
    local = distributed.attention(*shards(plan, *leaves[:3]), layout=plan, **drops, method=method)
    actual = distributed.unshard(local, plan)
    found = torch.autograd.grad(actual, leaves, dout.double())
    for t in found[3:]:
        dist.all_reduce(t)
    pairs = zip((actual, *found), (expected, *torch.autograd.grad(expected, leaves, dout.double())), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def draws_one_state_for_all(mesh: DeviceMesh) -> None:
    plan = distributed.layout(LENGTH, two_dimensions(mesh))
    inputs = heads()
    torch.manual_seed(dist.get_rank())
    out = distributed.unshard(distributed.attention(*shards(plan, *inputs), layout=plan, dropout_p=0.4), plan)
    torch.manual_seed(0)
    expected = fastattn.attention(*inputs, dropout_p=0.4)
    torch.testing.assert_close(out, expected)


def never_reads_keys_behind_their_length(mesh: DeviceMesh, method: str) -> None:
    plan = distributed.layout(LENGTH, mesh, causal=True)
    q, k, v = heads()
    clean = [t.clone() for t in (q, k, v)]
    k[:, :, 300:], v[:, :, 300:] = float("nan"), float("nan")
    both = [
        distributed.attention(*shards(plan, *tensors), layout=plan, causal=True, key_lengths=[300], method=method)
        for tensors in ((q, k, v), clean)
    ]
    assert torch.equal(*both)


def traffic(mesh: DeviceMesh, method: str, options: dict[str, Any], key_heads: int = 2) -> None:
    """The bytes that are sent are those of the formula in the documentation."""
    plan = distributed.layout(LENGTH, mesh, **options)
    q, k, v = (t.detach().requires_grad_() for t in shards(plan, *heads(key_heads=key_heads)))
    with distributed.counted() as forward:
        out = distributed.attention(q, k, v, layout=plan, method=method, **options)
    with distributed.counted() as backward:
        out.sum().backward()
    own = (LENGTH // RANKS) * (2 * WIDTH) * 4  # bytes of one head's keys and values of a rank
    if method == "ring":
        dense = masks.window(*window_of(options)).dense(1, 1, LENGTH, LENGTH)[0, 0]
        rank = mesh.get_local_rank()
        others = [plan.positions(i) for i in range(RANKS) if i != rank]
        bounds = [dense[tokens][:, plan.positions(rank)].any(0).nonzero()[:, 0] for tokens in others]
        tokens = sum(int(t[-1]) - int(t[0]) // 8 * 8 + 1 for t in bounds if len(t))
        keys = tokens * key_heads * 2 * WIDTH * 4
        assert forward == distributed.Traffic(keys=keys)
        seen = [dense[plan.positions(rank)][:, tokens].any(0).nonzero()[:, 0] for tokens in others]
        gradients = sum(int(t[-1]) - int(t[0]) // 8 * 8 + 1 for t in seen if len(t)) * key_heads * 2 * WIDTH * 4
        assert backward == distributed.Traffic(keys=keys, gradients=gradients)
        if not options:
            assert keys == gradients == (RANKS - 1) * key_heads * own
    elif method == "gather":
        sent = (RANKS - 1) * key_heads * own
        assert (forward, backward) == (
            distributed.Traffic(keys=sent),
            distributed.Traffic(keys=sent, gradients=sent),
        )
    else:
        sent = (RANKS - 1) * (HEADS + max(key_heads, RANKS)) * own // RANKS
        assert (forward, backward) == (distributed.Traffic(heads=sent), distributed.Traffic(heads=sent))


def gradients_travel_in_float32(mesh: DeviceMesh, method: str) -> None:
    """Twice the bytes, and gradients of several parts are closer to one process's."""
    options = {"causal": True, "alibi_slopes": torch.tensor([0.05, 0.03, 0.01, 0.0])}
    plan = distributed.layout(LENGTH, mesh, causal=True)
    q, k, v = (t.to(torch.bfloat16).requires_grad_() for t in heads())
    dout, errors, sent = torch.randn(1, HEADS, LENGTH, WIDTH), [], []
    whole = fastattn.attention(*(t.float() for t in (q, k, v)), **options)
    exact = torch.autograd.grad(whole, k, dout)[0].float()
    for dtype in (None, torch.float32):
        local = distributed.attention(
            *shards(plan, q, k, v), layout=plan, method=method, gradient_dtype=dtype, **options
        )
        with distributed.counted() as backward:
            gradient = torch.autograd.grad(local.float(), k, distributed.shard(dout, plan))[0]
        errors.append(float((gradient.float() - exact).norm()))
        sent.append(backward.gradients)
    assert sent[1] == 2 * sent[0] > 0
    assert errors[1] < errors[0], errors
    assert len(plan.programs) == 2, "each dtype is prepared for itself"


def window_of(options: dict[str, Any]) -> tuple[int | None, int | None]:
    return (
        (options.get("window", (None, None))[0], 0)
        if options.get("causal")
        else options.get("window", (None, None))
    )


def batch_and_sequence_share_a_mesh(mesh: DeviceMesh) -> None:
    """Rows of the mesh have batch entries of their own, with masks of their own."""
    both = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    row, context = both["data"].get_local_rank(), both["context"]
    q, k, v = heads(batch=2)
    mask = (masks.causal(), masks.documents(cu_seqlens=[0, 100, LENGTH]))[row]
    plan = distributed.layout(LENGTH, context, mask=mask)
    entry = [t[row : row + 1].double() for t in (q, k, v)]
    out = distributed.unshard(distributed.attention(*shards(plan, *entry), layout=plan, mask=mask), plan)
    torch.testing.assert_close(out, fastattn.attention(*entry, mask=mask))


def shards_and_gradients_go_there_and_back(mesh: DeviceMesh) -> None:
    plan = distributed.layout(333, mesh, causal=True)
    for tensor, dim in ((torch.randn(2, 3, 333, 5), 2), (torch.randn(2, 333, 5), 1), (torch.randn(333), -1)):
        tensor = tensor.requires_grad_()
        whole = distributed.unshard(distributed.shard(tensor, plan, dim), plan, dim)
        assert torch.equal(whole, tensor)
        upstream = torch.randn_like(whole)
        assert torch.equal(torch.autograd.grad(whole, tensor, upstream)[0], upstream)
    labels = torch.arange(333)[None]
    assert torch.equal(distributed.shard(labels, plan, 1)[0], plan.positions(mesh.get_local_rank()))
    with pytest.raises(ValueError, match="tensor must have the layout's 333 tokens in dimension 1, got 7"):
        distributed.shard(torch.zeros(1, 7), plan, 1)


def auto_prices_the_gradients_that_travel(mesh: DeviceMesh) -> None:
    for dtype, element in ((None, 2), (torch.float32, 4)):
        plan = distributed.layout(LENGTH, mesh)
        q, k, v = (t.bfloat16() for t in shards(plan, *heads()))
        with mock.patch.object(functional, "predict", wraps=functional.predict) as predict:
            distributed.attention(q, k, v, layout=plan, gradient_dtype=dtype)
        assert {call.args[2].gradient_element for call in predict.call_args_list} == {element}


def pairs_that_see_nothing_send_nothing(mesh: DeviceMesh) -> None:
    quarter = LENGTH // RANKS
    mask = masks.documents(cu_seqlens=[0, quarter, 2 * quarter, 3 * quarter, LENGTH])
    plan = distributed.layout(LENGTH, mesh, mask=mask)
    with distributed.counted() as sent:
        out = distributed.attention(*shards(plan, *heads()), layout=plan, mask=mask, method="ring")
    assert sent.total == 0 and torch.isfinite(out).all()


def new_shapes_are_prepared_once(mesh: DeviceMesh) -> None:
    plan = distributed.layout(LENGTH, mesh, causal=True)
    for _ in range(2):
        distributed.attention(*shards(plan, *heads()), layout=plan, causal=True)
        distributed.attention(*shards(plan, *heads(batch=2)), layout=plan, causal=True)
    assert len(plan.programs) == 2


SPREAD = ("ring", "gather", "heads")
CASES: dict[int, dict[str, groups.Case]] = {RANKS: {
    **{
        f"all ranks refuse {name}": partial(wrong_on_rank_1, change=change, words=words)
        for name, (change, words) in DISAGREEMENTS.items()
    },
    **{f"{name} is refused": partial(refused, options=o, words=w) for name, (o, w) in REFUSALS.items()},
    "heads that do not divide": heads_that_do_not_divide,
    **{f"same bits in every run, {m}": partial(same_bits_in_every_run, method=m) for m in SPREAD},
    **{
        f"drops what one process drops, {method}, {name}": partial(
            drops_what_one_process_drops, options=o, method=method
        )
        for method in ("ring", "gather", "heads", "ring x heads")
        for name, o in {
            "full": {},
            "causal": {"causal": True, "key_lengths": [300, LENGTH]},
            "lists": {"mask": masks.longformer(64, [3, 200]), "bias": None},
            "ALiBi": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.3, 0.1, 0.0])},
        }.items()
    },
    "ranks draw one dropout state": draws_one_state_for_all,
    **{
        f"NaN behind a key length, {method}": partial(never_reads_keys_behind_their_length, method=method)
        for method in SPREAD
    },
    **{
        f"traffic of {method}, {options or 'full'}": partial(traffic, method=method, options=options)
        for method, options in (
            ("ring", {}), ("ring", {"causal": True}), ("ring", {"causal": True, "window": (100, None)}),
            ("gather", {}), ("heads", {}),
        )
    },
    **{
        f"gradients in float32, {method}": partial(gradients_travel_in_float32, method=method)
        for method in ("ring", "gather")
    },
    "batch x sequence": batch_and_sequence_share_a_mesh,
    "shard and unshard": shards_and_gradients_go_there_and_back,
    "pairs that see nothing": pairs_that_see_nothing_send_nothing,
    "prepared once": new_shapes_are_prepared_once,
    "auto prices the gradients": auto_prices_the_gradients_that_travel,
}}  # fmt: skip
