"""A call of each public function that has plans, on small tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hardware import DEVICE
from torch import Tensor

import fastattn
from fastattn import masks


@dataclass(frozen=True)
class Call:
    """A public function on fresh tensors of these shapes; heads are laid out as a linear layer writes them."""

    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    beside: Callable[[], dict[str, Tensor]] = dict  # further tensors, by keyword; those of floats have a gradient

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Tensor]]:
        tensors = [
            torch.randn(s[0], s[2], s[1], s[3]).transpose(1, 2) if len(s) == 4 else torch.randn(s)
            for s in self.shapes
        ]
        beside = {name: t if not t.is_floating_point() else t.to(dtype) for name, t in self.beside().items()}
        return [t.to(DEVICE, dtype) for t in tensors], {name: t.to(DEVICE) for name, t in beside.items()}

    def __call__(self, tensors: list[Tensor], beside: dict[str, Tensor]) -> tuple[Tensor, ...]:
        results = self.function(*tensors, **beside, **self.options)
        return results if isinstance(results, tuple) else (results,)


HEADS = ((2, 4, 9, 16), (2, 2, 11, 16), (2, 2, 11, 16))
SQUARE = ((2, 4, 9, 12),) * 3  # 12 ** -0.5 and 1 / sqrt(12) are two numbers
ROWS, WEIGHTS = (2, 5, 12), ((20, 12), (20,), (8, 20), (8,))
TABLES = {"cos": torch.randn(9, 8), "sin": torch.randn(9, 8)}
ATTENTION = fastattn.attention
CALLS = {
    "attention": Call(ATTENTION, HEADS),
    "causal, lse": Call(ATTENTION, SQUARE, {"causal": True, "return_lse": True}),
    "window, soft cap": Call(ATTENTION, HEADS, {"window": (3, None), "softcap": 20.0, "scale": 0.3}),
    "negative scale": Call(ATTENTION, HEADS, {"scale": -0.3}),
    "key lengths": Call(ATTENTION, HEADS, beside=lambda: {"key_lengths": torch.tensor([11, 4])}),
    "float bias": Call(ATTENTION, HEADS, beside=lambda: {"bias": torch.randn(4, 9, 11)}),
    "bool bias": Call(ATTENTION, HEADS, beside=lambda: {"bias": torch.rand(2, 1, 9, 11) < 0.7}),
    "relative bias": Call(ATTENTION, HEADS, beside=lambda: {"relative_bias": torch.randn(4, 7)}),
    "sinks": Call(ATTENTION, HEADS, {"causal": True}, lambda: {"sinks": torch.randn(4)}),
    "scales": Call(ATTENTION, HEADS, beside=lambda: {"scale": torch.rand(4)}),
    "dropout": Call(
        ATTENTION, HEADS, {"dropout_p": 0.3}, lambda: {"dropout_state": torch.tensor([[5, 0], [5, 1]])}
    ),
    "mask": Call(ATTENTION, HEADS, {"mask": masks.causal() | masks.global_tokens([0])}),
    "reference": Call(ATTENTION, HEADS, {"causal": True, "backend": "reference"}),
    "sdpa": Call(fastattn.scaled_dot_product_attention, SQUARE, {"is_causal": True}),
    "sdpa, groups": Call(fastattn.scaled_dot_product_attention, HEADS, {"enable_gqa": True}),
    "sdpa, mask": Call(
        fastattn.scaled_dot_product_attention, SQUARE, beside=lambda: {"attn_mask": torch.randn(1, 4, 9, 9)}
    ),
    "mlp": Call(fastattn.mlp, (ROWS, *WEIGHTS)),
    "mlp of relu, rows": Call(fastattn.mlp, ((5, 12), *WEIGHTS), {"activation": "relu"}),
    "gated mlp": Call(fastattn.gated_mlp, (ROWS, (20, 12), (20, 12), (8, 20))),
    "rms norm": Call(fastattn.rms_norm, (ROWS, (12,)), {"eps": 1e-6}),
    "rms norm, residual": Call(
        fastattn.rms_norm, (ROWS, (12,)), {"weight_offset": 1.0}, lambda: {"residual": torch.randn(ROWS)}
    ),
    "layer norm, ours": Call(fastattn.layer_norm, (ROWS, (12,), (12,)), {"backend": "portable"}),
    "heads": Call(fastattn.prepare_heads, (HEADS[0],), {**TABLES, "norm": True, "head_scale": 2.0}),
    "heads, weights": Call(
        fastattn.prepare_heads, (HEADS[0],),
        beside=lambda: {"norm_weight": torch.randn(16), "head_scale": torch.rand(4)},
    ),
    "heads, offsets": Call(
        fastattn.prepare_heads, (HEADS[0],), {"cos": torch.randn(20, 8), "sin": torch.randn(20, 8)},
        lambda: {"offsets": torch.tensor([3, 7])},
    ),
}  # fmt: skip
# Not all calls have a plan that is cached.
UNKEPT = {"negative scale", "mask", "heads, offsets"}


def results(call: Call, tensors: list[Tensor], beside: dict[str, Tensor], order: int = 0) -> list[Tensor]:
    """What the call returns; with gradients for order 1; with second derivatives for order 2."""
    if not order:
        return list(call(tensors, beside))
    leaves = [t.detach().requires_grad_() for t in tensors]
    given = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in beside.items()}
    every = [*leaves, *(t for t in given.values() if t.requires_grad)]
    found = list(call(leaves, given))
    gradients = torch.autograd.grad(sum((t * t).sum() for t in found), every, create_graph=order == 2)
    found += gradients
    if order == 2:
        found += torch.autograd.grad(
            sum(g.square().sum() for g in gradients), every, allow_unused=True, materialize_grads=True
        )
    return [t.detach() for t in found]
