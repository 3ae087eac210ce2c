"""All-to-all over heads: each rank gets all tokens of some heads, and gives them back.

Source: Jacobs et al., DeepSpeed Ulysses (2023), section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.distributed.exchange import Ranks, all_to_all


@dataclass(frozen=True)
class Heads:
    """An exchange of heads for tokens between some ranks.

    place: int64 (N,), where each token lies among the shards of these ranks, each padded to the longest.
    tokens: how many the own shard has.
    """

    ranks: Ranks
    place: Tensor
    longest: int
    tokens: int

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(B, H, n, width) on each rank becomes (B, H / ranks, N, width), differentiable. One message for all."""
        return _ToHeads.apply(self, *tensors)

    def to_tokens(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The other way round, differentiable."""
        return _ToTokens.apply(self, *tensors)

    def gather_tokens(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        size, longest = self.ranks.size, self.longest
        blocks = []
        for t in tensors:
            padded = F.pad(t, (0, 0, 0, longest - t.shape[2]))
            blocks.append(padded.unflatten(1, (size, -1)).movedim(1, 0))
        arrived = self._exchanged(blocks)
        return tuple(t.movedim(0, 2).flatten(2, 3).index_select(2, self.place) for t in arrived)

    def scatter_tokens(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        size, longest = self.ranks.size, self.longest
        blocks = []
        for t in tensors:
            padded = t.new_zeros(*t.shape[:2], size * longest, t.shape[3]).index_copy_(2, self.place, t)
            blocks.append(padded.unflatten(2, (size, longest)).movedim(2, 0))
        arrived = self._exchanged(blocks)
        return tuple(t.movedim(0, 1).flatten(1, 2)[:, :, : self.tokens] for t in arrived)

    def _exchanged(self, blocks: list[Tensor]) -> list[Tensor]:
        """Block r of each tensor goes to rank r."""
        arrived = all_to_all(self.ranks, torch.cat([t.flatten(1) for t in blocks], 1), "heads")
        split = arrived.split([t[0].numel() for t in blocks], 1)
        return [part.reshape(block.shape) for part, block in zip(split, blocks, strict=True)]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Heads, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.heads = heads
        return heads.gather_tokens(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        return None, *ctx.heads.to_tokens(*gradients)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Heads, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.heads = heads
        return heads.scatter_tokens(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        return None, *ctx.heads.to_heads(*gradients)
