"""Attention over ranks equals attention in one process: every mask, every method, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import groups
import pytest
import torch
import torch.distributed as dist
from tolerance import TINY, assert_as_exact_as_eager
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import fastattn
from fastattn import distributed, masks

LENGTH = 333  # five granules and a rest


def _by_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q * 7 + k * 13 + h * 5 + b) % 11 < 4


def _lower_triangle(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (q // 100 == k // 100)


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (70, 3)},
    "causal window": {"causal": True, "window": 50},
    "documents": {"mask": masks.documents(cu_seqlens=[0, 20, 150, 210, LENGTH])},
    "causal documents": {"mask": masks.documents(cu_seqlens=[0, 20, 150, 210, LENGTH]), "causal": True},
    "prefix": {"mask": masks.causal() | masks.prefix([40, 100])},
    "key lengths in the mask": {"mask": masks.causal() & masks.key_lengths([300, 130])},
    "random by head": {"mask": masks.from_function(_by_head)},
    "function": {"mask": masks.from_function(_lower_triangle)},
    "global tokens": {"mask": masks.longformer(64, [3, 200])},
    "bigbird": {"mask": masks.bigbird(block=16, random=1)},
    "after the diagonal": {"mask": ~masks.causal()},
    "counted blocks": {"mask": masks.blocks(torch.tensor([[1, 0, 2], [0, 0, 0], [0, 3, 1]]), 128)},
    "nothing": {"mask": masks.key_lengths([0])},
}


@dataclass(frozen=True)
class Problem:
    """One call: `options` are those of attention, `tensors` names what is made beside q, k and v."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    length: int = LENGTH
    heads: int = 4
    key_heads: int = 4
    widths: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32

    def inputs(self) -> dict[str, Tensor]:
        """q, k, v and the learned tensors, of the whole sequence."""
        length, heads = self.length, self.heads
        shapes = {
            "q": (2, heads, length, self.widths[0]),
            "k": (2, self.key_heads, length, self.widths[0]),
            "v": (2, self.key_heads, length, self.widths[1]),
            "bias": (heads, length, length),
            "one row": (heads, 1, length),
            "relative_bias": (heads, 2 * 90 + 1),
            "sinks": (heads,),
            "scale": (heads,),
        }
        made = {name: torch.randn(shapes[name]).to(self.dtype) for name in ("q", "k", "v", *self.tensors)}
        return {"bias" if name == "one row" else name: t for name, t in made.items()}

    def __call__(self, mesh: DeviceMesh) -> None:
        check(self, mesh)


SHARDED = {"q", "k", "v"}


def check(problem: Problem, mesh: DeviceMesh) -> None:
    """The whole output and all gradients, on rank 0, by the tolerance rule."""
    mesh = two_dimensions(mesh) if problem.method == "ring x heads" else mesh
    inputs, options = problem.inputs(), problem.options
    dout = torch.randn(*inputs["q"].shape[:3], problem.widths[1]).to(problem.dtype)
    dlse = torch.randn(inputs["q"].shape[:3])
    seen = {name: options[name] for name in ("causal", "window", "mask", "key_lengths") if name in options}
    plan = distributed.layout(problem.length, mesh, **seen, batch=2, heads=problem.heads)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    local = {
        name: distributed.shard(t, plan) if name in SHARDED or (name == "bias" and t.shape[1] > 1) else t
        for name, t in leaves.items()
    }
    if "bias" in local and inputs["bias"].shape[1] > 1:
        local["bias"] = distributed.shard(leaves["bias"], plan, 1)
    out, lse = distributed.attention(
        **local, mesh=mesh, layout=plan, method=problem.method, **options, return_lse=True
    )
    whole = distributed.unshard(out, plan), distributed.unshard(lse, plan)
    reaches = torch.isfinite(whole[1])
    gradients = torch.autograd.grad(whole, list(leaves.values()), (dout, dlse * reaches))
    shared = [
        replicated(g) if name not in SHARDED and not (name == "bias" and g.shape[1] > 1) else g
        for name, g in zip(leaves, gradients, strict=True)
    ]
    if dist.get_rank() == 0:
        actual = (*(t.detach() for t in whole), *shared)
        upstream = dout, dlse * reaches
        exact, eager = (one_process(inputs, options, upstream, dtype) for dtype in (torch.float64, problem.dtype))
        for i, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
            beside = i >= 5
            tiny = TINY + (torch.finfo(a.dtype).eps * float((dout * exact[0]).norm()) * 4 if beside else 0.0)
            assert_as_exact_as_eager(a, x, e.to(a.dtype), gradient=i >= 2, tiny=tiny)


def one_process(inputs, options, upstream, dtype) -> tuple[Tensor, ...]:
    leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
    out, lse = fastattn.attention(**leaves, **options, return_lse=True, backend="reference")
    dout, dlse = upstream
    gradients = torch.autograd.grad((out, lse), list(leaves.values()), (dout.to(dtype), dlse.to(lse.dtype)))
    return out.detach(), lse.detach(), *gradients


def replicated(gradient: Tensor) -> Tensor:
    """The sum over ranks, as for the weights of a model."""
    gradient = gradient.contiguous()
    dist.all_reduce(gradient)
    return gradient


def two_dimensions(mesh: DeviceMesh) -> DeviceMesh:
    return _two_dimensions(mesh.size())


@cache
def _two_dimensions(size: int) -> DeviceMesh:
    return dist.init_device_mesh("cpu", (size // 2, 2))


def _cases(methods: tuple[str, ...]) -> dict[str, Problem]:
    found = {}
    for method in methods:
        for name, options in MASKS.items():
            found[f"{method}, {name}"] = Problem(method, options)
        alibi = {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01]), "causal": True}
        found |= {
            f"{method}, ALiBi": Problem(method, alibi),
            f"{method}, ALiBi both ways": Problem(method, {**alibi, "causal": False}),
            f"{method}, relative bias": Problem(method, {"causal": True}, ("relative_bias",)),
            f"{method}, sinks": Problem(method, {"window": (40, 0)}, ("sinks",)),
            f"{method}, sinks where nothing is seen": Problem(
                method, {"mask": masks.key_lengths([0, 40])}, ("sinks",)
            ),
            f"{method}, scale of each head": Problem(method, {"causal": True}, ("scale",)),
            f"{method}, soft cap": Problem(method, {"causal": True, "softcap": 2.0}),
            f"{method}, negative scale": Problem(method, {"causal": True, "scale": -0.3}),
            f"{method}, bias of one row": Problem(method, {"causal": True}, ("one row",)),
            f"{method}, key lengths": Problem(method, {"causal": True, "key_lengths": [70, 301]}),
            f"{method}, grouped heads": Problem(method, {"causal": True}, key_heads=2, widths=(16, 24)),
            f"{method}, one key head": Problem(method, {"window": (90, 0)}, key_heads=1),
            f"{method}, one granule for all": Problem(method, {"causal": True}, length=40),
            f"{method}, 130 tokens": Problem(method, {"causal": True}, ("sinks",), length=130),
            f"{method}, float64": Problem(method, {"causal": True}, dtype=torch.float64),
            f"{method}, bfloat16": Problem(method, {"causal": True}, dtype=torch.bfloat16),
        }
        if "heads" not in method:
            found[f"{method}, bias"] = Problem(method, {"causal": True}, ("bias",))
    return found


FEW = ("causal", "documents", "function", "global tokens", "relative bias", "sinks", "bias", "130 tokens")
CASES = {
    2: {f"ring, {name}": _cases(("ring",))[f"ring, {name}"] for name in FEW},
    4: _cases(("ring", "gather", "heads", "ring x heads")),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, str]]:
    return {}


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, cases in CASES.items() for name in cases])
def test_ranks_together_compute_what_one_process_computes(ranks: int, name: str, outcomes) -> None:
    if ranks not in outcomes:
        outcomes[ranks] = groups.run(CASES[ranks], ranks)
    assert not outcomes[ranks][name], outcomes[ranks][name]
