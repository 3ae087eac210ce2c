"""Who owns which tokens: chunks of 64 x n tokens, dealt out so that all ranks have the same work."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastattn.distributed.visibility import joined_mask
from fastattn.ground.arguments import flag, integer
from fastattn.ground.checks import Window, check_window
from fastattn.masks import GRANULE, Lowered, Mask
from fastattn.masks.algebra import smaller, visited_by_row
from fastattn.masks.lists import Shape

BALANCED = 1.05  # the work of the heaviest rank, at most so many times the mean


@dataclass(frozen=True, eq=False)
class Layout:
    """Which rank owns which tokens. A rank keeps q, k and v of its tokens, in ascending order.

    length: tokens in the whole sequence.
    ranks: how many ranks share it; for a mesh of two dimensions their product, row by row.
    owners: int64 (length / 64, rounded up), the rank that owns each 64 tokens.
    work: int64, how many granules of 64 x 64 pairs the queries of each 64 tokens visit, over batch and heads.
    mesh: the mesh it was made for; None if it was made for a number of ranks.
    programs: what `attention` has prepared for this layout; a cache.
    """

    length: int
    ranks: int
    owners: Tensor
    work: Tensor
    mesh: DeviceMesh | None = None
    programs: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def _tokens(self) -> list[Tensor]:
        order = self.owners.argsort(stable=True)
        sizes = torch.bincount(self.owners, minlength=self.ranks).tolist()
        within = torch.arange(GRANULE)
        found = []
        for granules in order.split(sizes):
            tokens = (granules[:, None] * GRANULE + within).flatten()
            found.append(tokens[tokens < self.length])
        return found

    def positions(self, rank: int) -> Tensor:
        """The positions of a rank's tokens in the whole sequence, ascending: int64 (n,), on the CPU."""
        return self._tokens[rank]

    @cached_property
    def counts(self) -> list[int]:
        """How many tokens each rank owns."""
        return [len(tokens) for tokens in self._tokens]

    def chunks(self, rank: int) -> list[range]:
        """The contiguous tokens that a rank owns."""
        return [range(int(run[0]), int(run[-1]) + 1) for run in runs(self.positions(rank))]

    @cached_property
    def rank_work(self) -> Tensor:
        """The work of each rank: int64 (ranks,)."""
        return torch.zeros(self.ranks, dtype=torch.int64).index_add_(0, self.owners, self.work)

    @property
    def balance(self) -> float:
        """The work of the heaviest rank over the mean."""
        total = int(self.rank_work.sum())
        return int(self.rank_work.max()) * self.ranks / total if total else 1.0

    def __str__(self) -> str:
        lines = [
            f"{self.length} tokens on {self.ranks} ranks; the heaviest has {self.balance:.3f} x the mean work"
        ]
        shown = range(self.ranks) if self.ranks <= 16 else (*range(8), None, *range(self.ranks - 8, self.ranks))
        mean = max(1.0, float(self.rank_work.sum()) / self.ranks)
        for rank in shown:
            if rank is None:
                lines.append("  ...")
                continue
            chunks = [f"{c.start}-{c.stop - 1}" for c in self.chunks(rank)]
            more = f", ... ({len(chunks)} chunks)" if len(chunks) > 4 else ""
            share = float(self.rank_work[rank]) / mean
            lines.append(f"  rank {rank}: work {share:.3f}, tokens {', '.join(chunks[:4]) or 'none'}{more}")
        return "\n".join(lines)

    def draw(self, path: str | Path) -> None:
        """A picture as a PNG: which rank owns which tokens, and the work of each rank. Needs matplotlib
        (`pip install fastattn[lens]`)."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("drawing a layout needs matplotlib: pip install 'fastattn[lens]'") from error
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        tokens, work = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
        for rank in range(self.ranks):
            bars = [(chunk.start, len(chunk)) for chunk in self.chunks(rank)]
            tokens.broken_barh(bars, (rank - 0.45, 0.9), color=f"C{rank % 10}")
        tokens.set(xlim=(0, max(1, self.length)), ylim=(self.ranks - 0.5, -0.5), xlabel="token", ylabel="rank")
        work.barh(range(self.ranks), self.rank_work.tolist(), 0.9, color="grey")
        work.axvline(float(self.rank_work.sum()) / self.ranks, color="black", linestyle=":")
        work.set(xlabel="granules (dotted: mean)")
        figure.suptitle(f"{self.length} tokens on {self.ranks} ranks, heaviest / mean = {self.balance:.3f}")
        figure.savefig(path, format="png", dpi=120)


def runs(positions: Tensor) -> tuple[Tensor, ...]:
    """Ascending positions, cut where they are not contiguous."""
    if not len(positions):
        return ()
    breaks = ((positions.diff() != 1).nonzero()[:, 0] + 1).tolist()
    return positions.tensor_split(breaks)


def layout(
    length: int,
    mesh: DeviceMesh | int,
    *,
    causal: bool = False,
    window: Window = None,
    key_lengths: Tensor | Sequence[int] | None = None,
    mask: Mask | Lowered | None = None,
    batch: int = 1,
    heads: int = 1,
) -> Layout:
    """Deal a sequence out to the ranks of a mesh so that all of them have the same work under this mask.

    Work is the number of 64 x 64 granules of scores that queries visit. Every rank gets the same number of
    contiguous chunks, as few as bring the heaviest rank to at most 1.05 x the mean work. One chunk a rank is
    enough without a mask or with a sliding window. A causal mask takes two: the first and the last, the second and
    the last but one, and so on. If no such chunks are balanced, the least unbalanced way is taken: 64 queries stay
    on one rank, so those of a global token, which visit all granules, may be more than a rank's share.

    A Python function in the mask is asked about a few pairs of each granule that the rest of the mask leaves open,
    and about all pairs of those in which it hides these.

    Args:
        length: tokens in the whole sequence; each is a query and a key.
        mesh: of one dimension, or of two for the method "ring x heads"; or only a number of ranks, to look at a
            layout.
        causal, window, key_lengths, mask: as `fastattn.attention` takes them, for the whole sequence.
        batch, heads: needed if the mask differs by batch element or head.

    Returns:
        A `Layout`. Print it, or draw it with `.draw("layout.png")`.

    Example:
        >>> layout(1024, 4, causal=True).chunks(1)
        [range(128, 256), range(768, 896)]
    """
    length, ranks = integer("length", length, least=0), _ranks(mesh)
    batch, heads = integer("batch", batch, least=1), integer("heads", heads, least=1)
    left, right = check_window(window)
    right = smaller(right, 0 if flag("causal", causal) else None)
    shape = Shape(batch, heads, length, length, torch.device("cpu"))
    joined = joined_mask(shape, (left, right), mask, key_lengths)
    work = (visited_by_row(joined, shape) if isinstance(joined, Mask) else joined.visited_by_row).cpu()
    return Layout(length, ranks, _dealt(work, ranks), work, mesh if isinstance(mesh, DeviceMesh) else None)


def _ranks(mesh: DeviceMesh | int) -> int:
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim > 2:
            raise ValueError(
                f"mesh must have one dimension, or two for rings x heads, got {mesh.ndim}; take the "
                'part of it that shares the sequence, such as mesh["context"]'
            )
        return mesh.size()
    return integer("mesh", mesh, least=1, what="a DeviceMesh or a number of ranks")


def _dealt(work: Tensor, ranks: int) -> Tensor:
    """The owner of each granule of tokens, from the work of each."""
    granules = len(work)
    if not granules:
        return work.new_zeros(0)
    sums = torch.cat((work.new_zeros(1), work.cumsum(0)))
    mean = int(sums[-1]) / ranks
    best, least = work.new_zeros(granules), float("inf")
    each = 1
    while True:
        count = min(ranks * each, granules)
        bounds = torch.arange(count + 1) * granules // count
        weights = sums[bounds].diff().tolist()
        finest = count == granules
        # At the end, drop the rule that each rank has the same number of chunks.
        for most in (-(-count // ranks), count) if finest else (-(-count // ranks),):
            owners, heaviest = _heaviest_first(weights, ranks, most)
            if heaviest < least:
                best, least = torch.tensor(owners).repeat_interleave(bounds.diff()), heaviest
            if least <= BALANCED * mean:
                return best
        if finest:
            return best
        each *= 2


def _heaviest_first(weights: list[int], ranks: int, most: int) -> tuple[list[int], int]:
    """Give each chunk, the heaviest first, to the rank with the least work that has fewer than `most` chunks. The
    owner of each chunk, ranks numbered by their first chunk; and the work of the heaviest rank."""
    heap = [(0, rank, 0) for rank in range(ranks)]
    owners, heaviest = [0] * len(weights), 0
    for chunk in sorted(range(len(weights)), key=lambda c: -weights[c]):
        load, rank, count = heapq.heappop(heap)
        owners[chunk], load = rank, load + weights[chunk]
        heaviest = max(heaviest, load)
        if count + 1 < most:
            heapq.heappush(heap, (load, rank, count + 1))
    number = {rank: i for i, rank in enumerate(dict.fromkeys(owners))}
    return [number[rank] for rank in owners], heaviest
