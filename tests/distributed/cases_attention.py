"""Attention over ranks equals attention in one process: every mask, every method, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

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


ALIBI = {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])}
CAUSAL = {"causal": True}
TOGETHER = {
    **CAUSAL, **ALIBI, "softcap": 3.0, "key_lengths": [70, 301], "mask": masks.from_function(_lower_triangle)
}  # fmt: skip
PROBLEMS: dict[str, dict[str, Any]] = {
    **{name: {"options": options} for name, options in MASKS.items()},
    "ALiBi": {"options": {**ALIBI, **CAUSAL}},
    "ALiBi both ways": {"options": ALIBI},
    "relative bias": {"options": CAUSAL, "tensors": ("relative_bias",)},
    "sinks": {"options": {"window": (40, 0)}, "tensors": ("sinks",)},
    "sinks where nothing is seen": {"options": {"mask": masks.key_lengths([0, 40])}, "tensors": ("sinks",)},
    "scale of each head": {"options": CAUSAL, "tensors": ("scale",)},
    "soft cap": {"options": {**CAUSAL, "softcap": 2.0}},
    "negative scale": {"options": {**CAUSAL, "scale": -0.3}},
    "bias": {"options": CAUSAL, "tensors": ("bias",)},
    "bias of one row": {"options": CAUSAL, "tensors": ("one row",)},
    "key lengths": {"options": {**CAUSAL, "key_lengths": [70, 301]}},
    "all together": {"options": TOGETHER, "tensors": ("one row", "relative_bias", "sinks", "scale")},
    "grouped heads": {"options": CAUSAL, "key_heads": 2, "widths": (16, 24)},
    "one key head": {"options": {"window": (90, 0)}, "key_heads": 1},
    "one granule for all": {"options": CAUSAL, "length": 40},
    "130 tokens": {"options": CAUSAL, "tensors": ("sinks",), "length": 130},
    "float64": {"options": CAUSAL, "dtype": torch.float64},
    "bfloat16": {"options": CAUSAL, "dtype": torch.bfloat16},
}
# Every mask with every method of one dimension; beside them what the methods treat in ways of their own.
NOT_MASKS = ("all together", "grouped heads", "one key head", "one granule for all", "bfloat16")
WITH = {
    "ring": tuple(PROBLEMS),
    "gather": (*MASKS, *NOT_MASKS, "bias"),
    "heads": (*MASKS, *NOT_MASKS),
    "ring x heads": ("causal", "causal window", "causal documents", "random by head", "bigbird", *NOT_MASKS),
}
ON_TWO = ("causal", "documents", "function", "global tokens", "all together", "bias", "130 tokens")
CASES = {
    2: {f"ring, {name}": Problem("ring", **PROBLEMS[name]) for name in ON_TWO},
    4: {
        f"{method}, {name}": Problem(method, **PROBLEMS[name]) for method, names in WITH.items() for name in names
    },
}
