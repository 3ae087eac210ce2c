"""What a method costs before it runs: each rank's computing, sending and waiting, event by event.

The work and the keys that travel are counted from the mask's own granules; the figures of the machine are given.
The steps are those of transports.py and heads.py. It is a model: kernels run at one speed, and links carry nothing
else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.distributed.transports import scheduled
from fastattn.distributed.visibility import Visibility
from fastattn.masks import GRANULE, Lowered

# Products of a backward over those of a forward: five instead of two (FlashAttention-2, Dao 2023, section 3.1).
BACKWARD = 2.5
TRAINING = (1.0, BACKWARD)  # the passes of a step; with activation checkpointing a forward comes twice


@dataclass(frozen=True)
class Machine:
    """A GPU and its links.

    attention: flop a second of attention kernels.
    link, latency: bytes a second that a GPU sends to a GPU of another node, while it receives as many; and the
        seconds of a message without bytes.
    node, node_link, node_latency: how many GPUs a node has, and the same figures within it.
    """

    attention: float
    link: float
    latency: float
    node: int = 1
    node_link: float = float("inf")
    node_latency: float = 0.0

    def seconds(self, senders: Tensor, receivers: Tensor, bytes: Tensor) -> Tensor:
        """How long messages between these ranks take."""
        near = senders // self.node == receivers // self.node
        rate = torch.where(near, self.node_link, self.link)
        return torch.where(near, self.node_latency, self.latency) + bytes / rate


# By data sheets: eight GPUs of the H100's kind in a node, nodes joined by 400 Gb/s for each GPU.
TYPICAL = Machine(450e12, 45e9, 1e-5, 8, 405e9, 3e-6)


@dataclass(frozen=True)
class Sizes:
    """Of a call on the whole sequence: batch, heads of queries and of keys, widths of keys and values, bytes per
    element, and bytes per element of the gradients of keys and values that travel; 0 for the same."""

    batch: int
    heads: int
    key_heads: int
    width: int
    value_width: int
    element: int
    gradient_element: int = 0

    @property
    def key_bytes(self) -> int:
        """Of one token's keys and values, all heads."""
        return self.batch * self.key_heads * (self.width + self.value_width) * self.element

    @property
    def gradient_bytes(self) -> int:
        """Of their gradients, as "ring" and "gather" send them."""
        return self.key_bytes * (self.gradient_element or self.element) // self.element

    def shared_bytes(self, ranks: int) -> tuple[float, float]:
        """Of one token's queries, keys and values, all heads, and of its outputs, where ranks share the heads. If
        there are fewer key heads than ranks, they are repeated."""
        token = self.batch * self.heads * self.element
        keys = self.key_bytes * max(1.0, ranks / self.key_heads)
        return token * self.width + keys, token * self.value_width

    @property
    def granule_flops(self) -> int:
        """Of the two products of one granule of scores, one head, forward."""
        return 2 * GRANULE * GRANULE * (self.width + self.value_width)


class Pairs(NamedTuple):
    """What ranks see of each other: (ranks, ranks), queries by keys. ranks: how many.

    granules: float64, how many granules of scores are visited, over batch and heads.
    tokens: float64, how many keys travel.
    """

    granules: Tensor
    tokens: Tensor

    @property
    def ranks(self) -> int:
        return len(self.granules)

    @property
    def work(self) -> Tensor:
        """Granules of each rank's queries."""
        return self.granules.sum(1)


class Cost(NamedTuple):
    """What one call of attention, forward and backward, costs.

    seconds: until the last rank is done.
    computing: of that, for how long the rank with the most work computes. The rest is waiting.
    sent: bytes that the busiest rank sends.
    memory: bytes that the method holds beside a rank's own tensors, at most.
    """

    seconds: float
    computing: float
    sent: float
    memory: float

    @property
    def exposed(self) -> float:
        """Seconds of communication, or of waiting for slower ranks, that no computation hides."""
        return self.seconds - self.computing


def pairs(visibility: Visibility, owners: Tensor, ranks: int) -> Pairs:
    """Count the mask's granules by the rank of their queries and of their keys.

    owners: int64, the rank that owns each 64 tokens.
    """
    rows, first, stop, uses = _ranges(visibility, visibility.lowered.key_lengths)
    width = len(owners) + 1
    # How many granules of each rank lie before a granule: a range of granules is a difference of two such rows.
    before = torch.zeros(width, ranks, dtype=torch.int32)
    before[torch.arange(1, width), owners] = 1
    before = before.cumsum(0, dtype=torch.int32)
    granules = torch.zeros(ranks, ranks, dtype=torch.float64)
    for part in torch.arange(len(rows)).split(2048):
        visits = (before[stop[part]] - before[first[part]]) * uses[part, None]
        granules.index_add_(0, owners[rows[part]], visits)
    # Keys behind their row's length travel, since all rows travel together.
    rows, first, stop, _ = _ranges(visibility, None)
    ends = torch.zeros(ranks * width, dtype=torch.int32)
    one = torch.ones(len(rows), dtype=torch.int32)
    ends.index_add_(0, owners[rows] * width + first, one)
    ends.index_add_(0, owners[rows] * width + stop, -one)
    visited = ends.view(ranks, width).cumsum(1)[:, :-1] > 0
    # Those from the first to the last that is seen travel, in the order in which their owner keeps them.
    place = before[torch.arange(len(owners)), owners]
    index, none = owners.expand(ranks, -1), len(owners)
    least = torch.full((ranks, ranks), none, dtype=torch.int32)
    least.scatter_reduce_(1, index, torch.where(visited, place, none), "amin")
    most = torch.full((ranks, ranks), -1, dtype=torch.int32)
    most.scatter_reduce_(1, index, torch.where(visited, place, -1), "amax")
    tokens = (most - least + 1).clamp(min=0).double() * GRANULE
    return Pairs(granules, tokens)


def _ranges(visibility: Visibility, key_lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranges of granules that are visited: their row, the first, the one after the last, and by how many pairs of
    batch element and head."""
    lowered, shape = visibility.lowered, visibility.shape
    if lowered.lists is not None:
        rows, columns = visibility.cells
        return rows, columns, columns + 1, _uses(lowered)
    start, stop = visibility.intervals
    if key_lengths is not None:
        stop = torch.minimum(stop, key_lengths[:, None])
    size = -(-shape.queries // GRANULE)
    rest = size * GRANULE - shape.queries
    sees = stop > start
    first = torch.where(sees, start, shape.keys).expand_as(sees)
    first = torch.nn.functional.pad(first, (0, rest), value=shape.keys).unflatten(1, (size, GRANULE)).amin(2)
    last = torch.nn.functional.pad(torch.where(sees, stop, 0), (0, rest)).unflatten(1, (size, GRANULE)).amax(2)
    rows = torch.arange(size).expand(len(stop), -1)
    found = last > first
    first, last = first // GRANULE, -(-last // GRANULE)
    uses = torch.full((int(found.sum()),), shape.batch * shape.heads // len(stop), dtype=torch.float64)
    return rows[found], first[found], last[found], uses


def _uses(lowered: Lowered) -> Tensor:
    """How many pairs of batch element and head use each of the cells that `Visibility.cells` has."""
    lists, shape = lowered.lists, lowered.shape
    assert lists is not None
    patterns = lists.pattern.expand(shape.batch, shape.heads).flatten()
    uses = torch.bincount(patterns, minlength=len(lists.full_offsets)).double()
    each = (offsets.diff().sum(1).long() for offsets in (lists.full_offsets, lists.partial_offsets))
    return torch.cat([uses.repeat_interleave(count) for count in each])


def predict(
    method: str,
    seen: Pairs,
    sizes: Sizes,
    machine: Machine,
    tokens: float,
    *,
    rings: int = 1,
    passes: Sequence[float] = TRAINING,
) -> Cost:
    """The cost of one call.

    seen: of the ranks that share the sequence.
    tokens: of a rank.
    rings: for "ring x heads", how many ranks a ring has; neighbouring ranks share heads.
    passes: a forward is 1.0, a backward BACKWARD.
    """
    if method == "ring":
        return ring(seen, sizes, machine, tokens, passes)
    if method == "gather":
        return gather(seen, sizes, machine, tokens, passes)
    if method == "heads":
        return heads(seen, sizes, machine, tokens, passes)
    return ring_of_heads(seen, sizes, machine, tokens, rings, passes)


def ring(seen: Pairs, sizes: Sizes, machine: Machine, tokens: float, passes: Sequence[float]) -> Cost:
    """Rounds of messages straight from a key's owner, each while the keys before are computed."""
    ranks, every = seen.ranks, torch.arange(seen.ranks)
    seconds = seen.granules * (sizes.granule_flops / machine.attention)
    sources = _sources(seen)
    key_bytes, gradient_bytes = seen.tokens * sizes.key_bytes, seen.tokens * sizes.gradient_bytes
    clock = _Clock(ranks)
    for factor in passes:
        clock.meet()
        arriving = clock.now.clone()
        clock.compute(seconds[every, every] * factor)
        returned = torch.zeros(ranks, dtype=torch.float64)
        for source in sources:
            got = source >= 0
            sender = torch.where(got, source, every)
            # The message begins when both have posted it and the links are free, and is waited for by both.
            took = torch.where(got, machine.seconds(sender, every, key_bytes[every, sender]), 0.0)
            begun = torch.maximum(arriving, arriving[sender])
            clock.wait(torch.where(got, begun + took, 0.0), sender, got)
            arriving = clock.now.clone()
            clock.compute(torch.where(got, seconds[every, sender] * factor, 0.0))
            if factor == BACKWARD:
                clock.now = torch.maximum(clock.now, returned)
                # Gradients of the keys go back; they are waited for a round later.
                took = torch.where(got, machine.seconds(every, sender, gradient_bytes[every, sender]), 0.0)
                done = torch.maximum(clock.now, clock.now[sender]) + took
                returned = torch.zeros_like(returned).scatter_reduce_(0, sender, done * got, "amax")
                returned = torch.maximum(returned, done * got)
        clock.now = torch.maximum(clock.now, returned)
    sent = key_bytes.sum(0) - key_bytes[every, every]
    back = gradient_bytes.sum(1) - gradient_bytes[every, every]
    # Two messages of keys and two of gradients under way, and the sums of the own gradients in float32.
    together = key_bytes + gradient_bytes
    largest = float((together - together.diag().diag()).max())
    sent = len(passes) * sent + passes.count(BACKWARD) * back
    return clock.cost(float(sent.max()), 2 * largest + tokens * sizes.key_bytes * 4 / sizes.element)


def _sources(seen: Pairs) -> list[Tensor]:
    """From whom each rank receives in each round; -1 for nobody."""
    needs, every = seen.tokens > 0, torch.arange(seen.ranks)
    if (needs | torch.eye(seen.ranks, dtype=torch.bool)).all():
        return [(every - distance) % seen.ranks for distance in range(1, seen.ranks)]
    found: list[list[int]] = []
    for number, receiver, sender in scheduled(needs):
        while number >= len(found):
            found.append([-1] * seen.ranks)
        found[number][receiver] = sender
    return [torch.tensor(sources) for sources in found]


class _Clock:
    """The time on each rank, and for how long it computed."""

    def __init__(self, ranks: int) -> None:
        self.now = torch.zeros(ranks, dtype=torch.float64)
        self.computed = torch.zeros(ranks, dtype=torch.float64)

    def compute(self, seconds: Tensor) -> None:
        self.now += seconds
        self.computed += seconds

    def wait(self, arrived: Tensor, sender: Tensor, got: Tensor) -> None:
        """Until the messages are there, and until those that were sent are."""
        gone = torch.zeros_like(arrived).scatter_reduce_(0, sender, arrived * got, "amax")
        self.now = torch.maximum(self.now, torch.maximum(arrived, gone))

    def meet(self) -> None:
        """A collective: nobody goes on before the last one is there."""
        self.now.fill_(float(self.now.max()))

    def cost(self, sent: float, memory: float) -> Cost:
        return Cost(float(self.now.max()), float(self.computed.max()), sent, memory)


def gather(seen: Pairs, sizes: Sizes, machine: Machine, tokens: float, passes: Sequence[float]) -> Cost:
    """All keys come to all ranks, then all is computed; their gradients go back the same way."""
    ranks, back = seen.ranks, passes.count(BACKWARD)
    clock = _Clock(ranks)
    for factor in passes:
        clock.meet()
        clock.now += exchange(ranks, tokens * sizes.key_bytes, machine)
        clock.compute(seen.work * (sizes.granule_flops / machine.attention * factor))
    clock.meet()
    clock.now += back * exchange(ranks, tokens * sizes.gradient_bytes, machine)
    each = len(passes) * sizes.key_bytes + back * sizes.gradient_bytes
    # The gathered keys, once more in order, and both gradients, padded.
    held = 2 * sizes.key_bytes + 2 * bool(back) * sizes.gradient_bytes
    return clock.cost((ranks - 1) * tokens * each, ranks * tokens * held)


def heads(seen: Pairs, sizes: Sizes, machine: Machine, tokens: float, passes: Sequence[float]) -> Cost:
    """Each rank gets all tokens of some heads: queries, keys and values there, outputs back."""
    ranks = seen.ranks
    there, back = sizes.shared_bytes(ranks)
    seconds = float(seen.work.sum()) / ranks * sizes.granule_flops / machine.attention
    clock = _Clock(ranks)
    for factor in passes:
        clock.now += exchange(ranks, tokens * there / ranks, machine)
        clock.compute(torch.tensor(seconds * factor))
        clock.now += exchange(ranks, tokens * back / ranks, machine)
    part = tokens * (there + back) / ranks
    return clock.cost(len(passes) * (ranks - 1) * part, 2 * ranks * part)


def exchange(ranks: int, bytes: float, machine: Machine) -> float:
    """Seconds in which each rank sends so many bytes to each other one, one after the other."""
    every = torch.arange(ranks)
    return float(machine.seconds(every[:1], every[1:], torch.tensor(float(bytes))).sum())


def ring_of_heads(
    seen: Pairs, sizes: Sizes, machine: Machine, tokens: float, rings: int, passes: Sequence[float]
) -> Cost:
    """Neighbouring ranks share the heads, and their tokens together go round a ring."""
    sharing = seen.ranks // rings
    there, back = (tokens * size / sharing for size in sizes.shared_bytes(sharing))
    part, exchanged = there + back, exchange(sharing, there, machine) + exchange(sharing, back, machine)
    own_keys = max(1, sizes.key_heads // sharing)
    inner = replace(sizes, heads=sizes.heads // sharing, key_heads=own_keys)
    granules, keys = (t.view(rings, sharing, rings, sharing) for t in seen)
    # A ring's ranks lie in different nodes if those that share heads fill a node.
    spread = replace(machine, node=max(1, machine.node // sharing))
    joined = Pairs(granules.sum((1, 3)) / sharing, keys.amax(1).sum(2))
    around = ring(joined, inner, spread, tokens * sharing, passes)
    return Cost(
        around.seconds + len(passes) * exchanged,
        around.computing,
        around.sent + len(passes) * (sharing - 1) * part,
        max(around.memory, 2 * sharing * part),
    )
