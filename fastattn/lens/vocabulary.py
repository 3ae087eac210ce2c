"""Reading streams against a whole vocabulary, chunk by chunk: the logits of all of it are never stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ground.checks import lse_dtype
from fastattn.ground.modes import without_autocast
from fastattn.lens.adapters import Adapter

CHUNK = 4096  # tokens of the vocabulary at once
TILE_LOGITS = 2**22  # logits held at once, over layers and positions: 16 MiB in fp32


class Reading(NamedTuple):
    """What logits say, without them: for states (S, N, d), the last of the S being the model's own.

    tokens, probabilities (S, N, top); entropy, kl (S, N) in nats; rank, probability (S, N) of a target, or None.
    """

    tokens: Tensor
    probabilities: Tensor
    entropy: Tensor
    kl: Tensor
    rank: Tensor | None
    probability: Tensor | None


class Unembedding(NamedTuple):
    """From a normed state to logits: weight (V, d), bias (V,) or None, soft cap or None."""

    weight: Tensor
    bias: Tensor | None
    cap: float | None

    @classmethod
    def of(cls, adapter: Adapter) -> Unembedding:
        return cls(adapter.unembedding_weight, adapter.unembedding_bias, adapter.logit_cap)

    def chunk(self, states: Tensor, first: int) -> Tensor:
        """Logits (..., at most CHUNK) of the tokens from `first` on."""
        span = slice(first, first + CHUNK)
        return self.capped(F.linear(states, self.weight[span], None if self.bias is None else self.bias[span]))

    def of_tokens(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The logit (S, N) of one token (N,) for each state (S, N, d)."""
        logits = (states.to(lse_dtype(states.dtype)) * self.weight[tokens]).sum(-1)
        return self.capped(logits if self.bias is None else logits + self.bias[tokens])

    def capped(self, logits: Tensor) -> Tensor:
        logits = logits.to(lse_dtype(logits.dtype))
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def rows_at_once(states: int, vocabulary: int) -> int:
    """How many positions fill a tile of logits."""
    return max(1, TILE_LOGITS // (states * min(vocabulary, CHUNK)))


def read(states: Tensor, unembedding: Unembedding, top: int, targets: Tensor | None) -> Reading:
    """One sweep over the vocabulary, for as many positions as `rows_at_once` says.

    Args:
        states: (S, N, d), normed; the last of the S is the model's own output.
        top: how many of the most probable tokens to keep.
        targets: (N,) token ids, or None.
    """
    sums = _Sums(states.shape[:2], lse_dtype(states.dtype), states.device)
    best = states.new_zeros(*states.shape[:2], 0, dtype=sums.largest.dtype)
    best_tokens = torch.zeros_like(best, dtype=torch.int64)
    wanted = None if targets is None else unembedding.of_tokens(states, targets)
    rank = None if wanted is None else torch.ones_like(wanted, dtype=torch.int64)
    for first in range(0, unembedding.weight.shape[0], CHUNK):
        logits = unembedding.chunk(states, first)
        with without_autocast(logits.device):
            sums.add(logits)
        values, tokens = logits.topk(min(top, logits.shape[-1]), dim=-1)
        best, best_tokens = torch.cat([best, values], -1), torch.cat([best_tokens, tokens + first], -1)
        best, order = best.topk(min(top, best.shape[-1]), dim=-1)
        best_tokens = best_tokens.gather(-1, order)
        if wanted is not None and rank is not None and targets is not None:
            above = logits > wanted[..., None]
            # The target itself does not stand above itself, whatever the rounding of its two products.
            own = torch.arange(first, first + logits.shape[-1], device=logits.device) == targets[:, None]
            rank += (above & ~own).sum(-1)
    lse = sums.lse()
    return Reading(
        tokens=best_tokens,
        probabilities=torch.exp(best - lse[..., None]),
        entropy=sums.entropy(),
        kl=sums.kl_from_last(),
        rank=rank,
        probability=None if wanted is None else torch.exp(wanted - lse),
    )


class _Sums:
    """Sums over the vocabulary so far, relative to the largest logit so far (online softmax)."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.largest = torch.full(shape, float("-inf"), dtype=dtype, device=device)
        self.total = torch.zeros(shape, dtype=dtype, device=device)  # of exp(logit - largest)
        self.weighted = torch.zeros_like(self.total)  # of exp(logit - largest) logit
        self.by_last = torch.zeros_like(self.total)  # of the last state's exp(logit - largest) times each's logit

    def add(self, logits: Tensor) -> None:
        largest = torch.maximum(self.largest, logits.amax(-1))
        rescale = torch.exp(self.largest - largest)
        weights = torch.exp(logits - largest[..., None])
        self.total = self.total * rescale + weights.sum(-1)
        self.weighted = self.weighted * rescale + (weights * logits).sum(-1)
        self.by_last = self.by_last * rescale[-1] + torch.einsum("nv,snv->sn", weights[-1], logits)
        self.largest = largest

    def lse(self) -> Tensor:
        return self.largest + self.total.log()

    def entropy(self) -> Tensor:
        return (self.lse() - self.weighted / self.total).clamp(min=0)

    def kl_from_last(self) -> Tensor:
        """KL(last || each): sum_v p_last (log p_last - log p_each)."""
        expected = self.by_last / self.total[-1]
        lse = self.lse()
        return ((expected[-1] - lse[-1]) - (expected - lse)).clamp(min=0)
