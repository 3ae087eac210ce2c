"""Messages between the ranks of one group. What is sent is counted here: see `Traffic`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


@dataclass
class Traffic:
    """How many bytes this rank has sent to other ranks within a `counted()` block, by kind of message."""

    keys: int = 0
    gradients: int = 0
    heads: int = 0

    @property
    def total(self) -> int:
        return self.keys + self.gradients + self.heads


_counters: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the bytes that this rank sends to other ranks within the block."""
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters.remove(traffic)


def _count(kind: str, size: int) -> None:
    for traffic in _counters:
        setattr(traffic, kind, getattr(traffic, kind) + size)


@dataclass(frozen=True)
class Ranks:
    """The ranks of one dimension of a mesh. rank: the own one."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @staticmethod
    def of(mesh: DeviceMesh, dimension: int) -> Ranks:
        return Ranks(mesh.get_group(dimension), mesh.get_local_rank(dimension), mesh.size(dimension))


def ranks_of(mesh: DeviceMesh) -> list[Ranks]:
    """The ranks of each dimension of a mesh."""
    return [Ranks.of(mesh, dimension) for dimension in range(mesh.ndim)]


def flat_rank(mesh: DeviceMesh) -> int:
    """The number of this rank in its mesh, row by row."""
    number = 0
    for ranks in ranks_of(mesh):
        number = number * ranks.size + ranks.rank
    return number


def broadcast(dimensions: Sequence[Ranks], t: Tensor) -> Tensor:
    """What the first rank of all dimensions has in t, in place."""
    for ranks in reversed(dimensions):
        dist.broadcast(t, group=ranks.group, group_src=0)
    return t


class Transfer:
    """A message to one rank and a message from another, under way. Both may be missing."""

    def __init__(
        self, ranks: Ranks, kind: str, target: int | None, message: Tensor | None, source: int | None, size: int
    ) -> None:
        """size: elements to receive, of the message's dtype."""
        self.ranks, self.source, self.target, self.message = ranks, source, target, message
        self.received = None
        operations = []
        if target is not None and message is not None:
            operations.append(dist.P2POp(dist.isend, message, group=ranks.group, group_peer=target))
            _count(kind, message.nbytes)
        if source is not None:
            assert message is not None
            self.received = message.new_empty(size)
            operations.append(dist.P2POp(dist.irecv, self.received, group=ranks.group, group_peer=source))
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor | None:
        """What has arrived."""
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as problem:
            partners = [
                f"{word} rank {partner}"
                for word, partner in (("from", self.source), ("to", self.target))
                if partner is not None
            ]
            raise RuntimeError(
                f"rank {self.ranks.rank} could not exchange keys {' and '.join(partners)}: that rank may have "
                "died, or it computes something else"
            ) from problem
        return self.received


def all_gather(ranks: Ranks, message: Tensor, kind: str = "keys") -> Tensor:
    """The messages of all ranks, of the same shape: (ranks, *message.shape)."""
    flat = message.flatten()
    gathered = flat.new_empty(ranks.size * flat.numel())
    _count(kind, flat.nbytes * (ranks.size - 1))
    # torch 2.13 has given the function another name.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    _named(ranks, lambda: collective(gathered, flat, group=ranks.group))
    return gathered.view(ranks.size, *message.shape)


def all_to_all(ranks: Ranks, messages: Tensor, kind: str) -> Tensor:
    """Message r goes to rank r; row r of the result came from rank r."""
    messages = messages.contiguous()
    arrived = torch.empty_like(messages)
    _count(kind, messages.nbytes // ranks.size * (ranks.size - 1))
    _named(ranks, lambda: dist.all_to_all_single(arrived, messages, group=ranks.group))
    return arrived


def _named(ranks: Ranks, collective: Any) -> None:
    try:
        collective()
    except RuntimeError as problem:
        silent = _silent(ranks)
        who = f"rank {silent[0]}" if len(silent) == 1 else f"one of the ranks {', '.join(map(str, silent))}"
        raise RuntimeError(
            f"rank {ranks.rank} could not exchange with the {ranks.size - 1} other ranks of its group: {who} may "
            "have died, or computes something else"
        ) from problem


PATIENCE = timedelta(seconds=5)
_failures: Counter[Any] = Counter()


def _silent(ranks: Ranks) -> list[int]:
    """The ranks of a group that do not say within a few seconds that this exchange failed for them, too. Each rank
    on which it failed calls this and says so in the store of the group."""
    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    number = _failures[ranks.group]
    _failures[ranks.group] += 1
    try:
        store = ranks.group.get_group_store()
        words = {rank: f"fastattn, failure {number} on rank {rank}" for rank in range(ranks.size)}
        store.set(words[ranks.rank], "")
        with suppress(RuntimeError):
            store.wait([words[rank] for rank in others], PATIENCE)
        return [rank for rank in others if not store.check([words[rank]])] or others
    except RuntimeError:  # the store has gone with the rank that kept it
        return others


def agree(dimensions: Sequence[Ranks], mine: dict[str, Any] | Exception) -> None:
    """Raise the same error on all ranks if one of them failed, or if they differ in any of these values.

    mine: what this rank is about to compute, by name, plain values; or why it cannot.
    """
    answers: list[Any] = [mine]
    for ranks in reversed(dimensions):
        gathered: list[Any] = [None] * ranks.size
        try:
            dist.all_gather_object(gathered, answers, group=ranks.group)
        except RuntimeError as lost:
            raise RuntimeError(
                f"rank {ranks.rank} prepared a call that is new to its layout, but not all of the "
                f"{ranks.size - 1} other ranks did: one may have died, or called with other arguments"
            ) from lost
        answers = [answer for part in gathered for answer in part]
    for rank, answer in enumerate(answers):
        if isinstance(answer, Exception):
            raise type(answer)(f"rank {rank}: {answer}")
    for name in answers[0]:
        for rank, answer in enumerate(answers):
            if answer.get(name) != answers[0][name]:
                raise ValueError(
                    f"all ranks must be called with the same {name}: rank 0 has {answers[0][name]}, "
                    f"rank {rank} has {answer.get(name)}"
                )
