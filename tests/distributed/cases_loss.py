"""The loss of classes that are spread over ranks equals that of one process, and so do its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import groups
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fastattn
from fastattn import distributed

TOKENS, WIDTH, CLASSES = 12, 8, 29
# Classes of each rank: different numbers of them.
BOUNDS = {2: (0, 18, CLASSES), 4: (0, 3, 4, 20, CLASSES)}
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum, z-loss": {"reduction": "sum", "z_loss": 0.1},
    "tokens, log-sum-exps and entropies": {"reduction": "none", "return_lse": True, "return_entropy": True},
    "smoothing and cap": {"label_smoothing": 0.2, "softcap": 2.0, "temperature": 0.5},
    "smoothing and entropies": {"label_smoothing": 0.2, "return_entropy": True},
    "shift": {"shift": True},
}


def sharded(mesh: DeviceMesh, options: dict[str, Any], target: str, weighted: bool) -> None:
    rank, bounds = dist.get_rank(), BOUNDS[dist.get_world_size()]
    here = slice(bounds[rank], bounds[rank + 1])
    x, w, b = torch.randn(2, TOKENS, WIDTH), torch.randn(CLASSES, WIDTH), torch.randn(CLASSES)
    b[20:] = float("-inf") if target == "ruled out" else b[20:]
    x, w, b = (t.double().requires_grad_() for t in (x, w, b))
    weight = torch.rand(CLASSES).double() if weighted else None
    classes = torch.randint(20 if target == "ruled out" else CLASSES, (2, TOKENS))
    classes[:, ::4] = -100
    chances = torch.rand(2, TOKENS, CLASSES).double().softmax(-1)
    probabilities = target == "probabilities"
    expected = fastattn.linear_cross_entropy(
        x, w, chances if probabilities else classes, linear_bias=b, weight=weight, **options
    )
    own = [t.detach()[here].requires_grad_() for t in (w, b)]
    shared = x.detach().requires_grad_()
    found = distributed.linear_cross_entropy(
        shared,
        own[0],
        chances[..., here] if probabilities else classes,
        linear_bias=own[1],
        weight=None if weight is None else weight[here],
        backend=("portable", "reference")[len(options) % 2],
        **options,
    )
    found, expected = ((t if isinstance(t, tuple) else (t,)) for t in (found, expected))
    ones = [torch.rand_like(t) for t in expected]
    dx, dw, db = torch.autograd.grad(expected, (x, w, b), ones)
    gradients = torch.autograd.grad(found, (shared, *own), ones)
    for ours, theirs in zip((*found, *gradients), (*expected, dx, dw[here], db[here]), strict=True):
        torch.testing.assert_close(ours, theirs)


def classes_that_do_not_exist(mesh: DeviceMesh) -> None:
    rank, bounds = dist.get_rank(), BOUNDS[dist.get_world_size()]
    w = torch.randn(bounds[rank + 1] - bounds[rank], WIDTH)
    with pytest.raises(ValueError, match=rf"target must be a class from 0 to {CLASSES - 1}.*got 29 at position 2"):
        distributed.linear_cross_entropy(torch.randn(3, WIDTH), w, torch.tensor([0, 28, 29]))


SHARDED = {
    "tied": {},
    "untied": {"tied": False, "norm": "rms", "mlp": "gated"},
    "an unembedding sharded alone": {"tied": False},
    "little kept": {"dropout": 0.0},
}


def fsdp_of_a_model(mesh: DeviceMesh, name: str) -> None:
    """FSDP2 of a model that computes its own loss: each rank has some rows, and gradients are their mean."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 29, "embed_dim": 16, "num_heads": 2, "num_layers": 2, "max_length": 12}
    whole = fastattn.nn.TransformerModel(**sizes, **SHARDED[name]).double()
    text = torch.randint(29, (2 * mesh.size(), 12))
    sharded = copy.deepcopy(whole)
    if name == "little kept":
        for block in sharded.blocks:
            block.mlp.save = "nothing"
    for part in (*sharded.blocks, *([sharded.unembedding] if name.startswith("an unembedding") else [])):
        fully_shard(part, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    expected = whole(text, labels=text)
    expected.backward()
    loss = sharded(text[mesh.get_local_rank() :: mesh.size()], labels=text[mesh.get_local_rank() :: mesh.size()])
    loss.backward()
    mean = loss.detach() / mesh.size()
    dist.all_reduce(mean, group=mesh.get_group())
    torch.testing.assert_close(mean, expected.detach())
    for (key, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=key)


def made(ranks: int) -> dict[str, groups.Case]:
    cases: dict[str, Callable[[DeviceMesh], None]] = {
        f"loss, {target}, {name}{', weights' if weighted else ''}": partial(
            sharded, options=options, target=target, weighted=weighted
        )
        for target, names in (
            ("classes", tuple(OPTIONS)),
            ("probabilities", ("mean", "smoothing and cap", "smoothing and entropies")),
            ("ruled out", ("mean", "tokens, log-sum-exps and entropies")),
        )
        for name, options in OPTIONS.items()
        if name in names
        for weighted in (False, True)
    }
    if ranks == 2:
        cases |= {f"loss of a model under FSDP2, {name}": partial(fsdp_of_a_model, name=name) for name in SHARDED}
    return {**cases, "loss, classes that do not exist": classes_that_do_not_exist}


CASES = {ranks: made(ranks) for ranks in BOUNDS}
