"""How the keys of other ranks come to this rank's queries, and how their gradients go back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastattn.distributed.computing import parts_of
from fastattn.distributed.exchange import Ranks, Transfer, all_gather, all_to_all
from fastattn.distributed.visibility import Part, Visibility
from fastattn.ground.checks import lse_dtype

Attend = Callable[[Sequence[Part], Tensor, Tensor], None]
Differentiate = Callable[[Sequence[Part], Tensor, Tensor], tuple[Tensor, Tensor]]


class Transport(Protocol):
    """Brings keys and values, k (B, Hkv, n, D) and v (B, Hkv, n, Dv) on each rank, to all who see them."""

    def forward(self, k: Tensor, v: Tensor, attend: Attend) -> None:
        """Call `attend` with all keys that the own queries see, in several parts."""
        ...

    def backward(self, k: Tensor, v: Tensor, differentiate: Differentiate) -> tuple[Tensor, Tensor]:
        """Call `differentiate` for the same keys; the sums over all ranks of what it returns for the own ones."""
        ...


@dataclass(frozen=True)
class Block:
    """What one rank's queries see of another rank's keys. first, stop: the keys that travel."""

    parts: tuple[Part, ...]
    first: int
    stop: int


@dataclass(frozen=True)
class Ring:
    """Keys travel from their owner straight to each rank that sees any of them, in rounds. In a round, a rank
    sends at most one message and receives at most one. The next keys travel while these are computed.

    own: what the own queries see of the own keys; None if nothing.
    rounds: from whom keys come and to whom they go in each round; None for nobody.
    incoming: by source. outgoing: by target, the own keys that it sees, from and to before.
    gradient_dtype: in which gradients of keys and values travel; None for that of the keys.
    """

    ranks: Ranks
    own: Block | None
    rounds: tuple[tuple[int | None, int | None], ...]
    incoming: dict[int, Block]
    outgoing: dict[int, tuple[int, int]]
    gradient_dtype: torch.dtype | None = None

    @staticmethod
    def of(
        ranks: Ranks,
        visibility: Visibility,
        owners: Tensor,
        shards: Sequence[Tensor],
        device: torch.device,
        *,
        by_run: bool,
    ) -> Ring:
        """owners: the rank of each granule of tokens. shards: the positions of each rank's tokens. The rest: as
        `parts_of` takes it."""
        me, needs = ranks.rank, visibility.needs(owners, ranks.size)
        mine, of_mine = visibility.only(queries=shards[me]), visibility.only(keys=shards[me])

        def block(source: int) -> Block | None:
            bounds = mine.bounds(shards[me], shards[source])
            if bounds is None:
                return None
            first, stop = bounds[1].start, bounds[1].stop
            parts = parts_of(mine, shards[me], shards[source][first:stop], device, by_run=by_run)
            return Block(tuple(parts), first, stop)

        sources = [j for j in needs[me].nonzero()[:, 0].tolist() if j != me]
        targets = [i for i in needs[:, me].nonzero()[:, 0].tolist() if i != me]
        incoming, outgoing = {}, {}
        for source in sources:
            found = block(source)
            assert found is not None
            incoming[source] = found
        for target in targets:
            bounds = of_mine.bounds(shards[target], shards[me])
            assert bounds is not None
            outgoing[target] = bounds[1].start, bounds[1].stop
        return Ring(ranks, block(me), rounds(needs, me), incoming, outgoing)

    def forward(self, k: Tensor, v: Tensor, attend: Attend) -> None:
        arriving = self._keys(0, k, v)
        if self.own is not None:
            attend(self.own.parts, *(t[:, :, self.own.first : self.own.stop] for t in (k, v)))
        for i, (source, _) in enumerate(self.rounds):
            message = arriving.wait()
            arriving = self._keys(i + 1, k, v)
            if source is not None:
                attend(self.incoming[source].parts, *self._unpacked(message, source, k, v))

    def backward(self, k: Tensor, v: Tensor, differentiate: Differentiate) -> tuple[Tensor, Tensor]:
        dk, dv = (torch.zeros_like(t, dtype=lse_dtype(t.dtype)) for t in (k, v))
        dtype = self.gradient_dtype or k.dtype
        arriving = self._keys(0, k, v)
        if self.own is not None:
            own = slice(self.own.first, self.own.stop)
            for total, part in zip(
                (dk, dv), differentiate(self.own.parts, k[:, :, own], v[:, :, own]), strict=True
            ):
                total[:, :, own] += part
        returning: tuple[int | None, Transfer] | None = None
        for i, (source, target) in enumerate(self.rounds):
            message = arriving.wait()
            arriving = self._keys(i + 1, k, v)
            gradients = k.new_empty(0, dtype=dtype)
            if source is not None:
                keys = self._unpacked(message, source, k, v)
                gradients = _packed(*differentiate(self.incoming[source].parts, *keys)).to(dtype)
            self._add(returning, dk, dv)
            # The gradients of the keys that went out in this round come back from where the keys went.
            size = 0 if target is None else _size(k, v, *self.outgoing[target])
            returning = target, Transfer(self.ranks, "gradients", source, gradients, target, size)
        self._add(returning, dk, dv)
        return dk, dv

    def _keys(self, i: int, k: Tensor, v: Tensor) -> Transfer:
        """Begin the round i."""
        source, target = self.rounds[i] if i < len(self.rounds) else (None, None)
        message = k.new_empty(0)
        if target is not None:
            first, stop = self.outgoing[target]
            message = _packed(k[:, :, first:stop], v[:, :, first:stop])
        size = 0 if source is None else _size(k, v, self.incoming[source].first, self.incoming[source].stop)
        return Transfer(self.ranks, "keys", target, message, source, size)

    def _unpacked(self, message: Tensor | None, source: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        block = self.incoming[source]
        return _unpacked(message, block.stop - block.first, k, v)

    def _add(self, returning: tuple[int | None, Transfer] | None, dk: Tensor, dv: Tensor) -> None:
        """Wait for gradients that are on their way back, and add them."""
        if returning is None:
            return
        target, transfer = returning
        message = transfer.wait()
        if target is None:
            return
        first, stop = self.outgoing[target]
        for total, part in zip((dk, dv), _unpacked(message, stop - first, dk, dv), strict=True):
            total[:, :, first:stop] += part


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values in one message."""
    return torch.cat((k.flatten(), v.flatten()))


def _unpacked(message: Tensor | None, length: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    assert message is not None
    shapes = [(*t.shape[:2], length, t.shape[3]) for t in (k, v)]
    keys, values = message.split([torch.Size(shape).numel() for shape in shapes])
    return keys.view(shapes[0]), values.view(shapes[1])


def _size(k: Tensor, v: Tensor, first: int, stop: int) -> int:
    return k.shape[0] * k.shape[1] * (stop - first) * (k.shape[3] + v.shape[3])


def rounds(needs: Tensor, me: int) -> tuple[tuple[int | None, int | None], ...]:
    """From whom rank `me` receives and to whom it sends in each round.

    needs: bool (ranks, ranks), [i, j] whether rank i sees keys of rank j. Each pair takes the first round in which
    its sender does not yet send and its receiver does not yet receive; nearest neighbours come first. If all need
    all, these are the ranks - 1 rounds of a ring.
    """
    size = len(needs)
    if (needs | torch.eye(size, dtype=torch.bool)).all():
        return tuple(((me - distance) % size, (me + distance) % size) for distance in range(1, size))
    sources: dict[int, int] = {}
    targets: dict[int, int] = {}
    count = 0
    for number, receiver, sender in scheduled(needs):
        count = max(count, number + 1)
        if receiver == me:
            sources[number] = sender
        if sender == me:
            targets[number] = receiver
    return tuple((sources.get(i), targets.get(i)) for i in range(count))


def scheduled(needs: Tensor) -> Iterator[tuple[int, int, int]]:
    """The round, the receiver and the sender of each message; see `rounds`."""
    size, pairs = len(needs), needs.tolist()
    sending, receiving = [0] * size, [0] * size  # the rounds that are taken, as bits
    for distance in range(1, size):
        for receiver in range(size):
            sender = (receiver - distance) % size
            if pairs[receiver][sender]:
                taken = sending[sender] | receiving[receiver]
                free = ~taken & (taken + 1)
                sending[sender] |= free
                receiving[receiver] |= free
                yield free.bit_length() - 1, receiver, sender


@dataclass(frozen=True)
class Gather:
    """All keys come to every rank at once. Their gradients go back at once, too, and are summed in the order of
    ranks.

    place: int64 (N,), where each position lies among the shards of all ranks, each padded to the longest.
    gradient_dtype: as Ring's.
    """

    ranks: Ranks
    parts: tuple[Part, ...]
    place: Tensor
    longest: int
    gradient_dtype: torch.dtype | None = None

    @staticmethod
    def of(
        ranks: Ranks,
        visibility: Visibility,
        shards: Sequence[Tensor],
        device: torch.device,
        *,
        by_run: bool,
    ) -> Gather:
        every = torch.arange(visibility.shape.keys)
        parts = parts_of(visibility, shards[ranks.rank], every, device, by_run=by_run)
        longest = max(map(len, shards))
        return Gather(ranks, tuple(parts), places(shards, longest).to(device), longest)

    def forward(self, k: Tensor, v: Tensor, attend: Attend) -> None:
        attend(self.parts, *self._all(k, v))

    def backward(self, k: Tensor, v: Tensor, differentiate: Differentiate) -> tuple[Tensor, Tensor]:
        both = torch.cat(differentiate(self.parts, *self._all(k, v)), -1).to(self.gradient_dtype or k.dtype)
        padded = both.new_zeros(*both.shape[:2], self.ranks.size * self.longest, both.shape[3])
        padded.index_copy_(2, self.place, both)
        messages = padded.unflatten(2, (self.ranks.size, self.longest)).movedim(2, 0)
        arrived = all_to_all(self.ranks, messages, "gradients")
        total = arrived[0].to(lse_dtype(k.dtype))
        for part in arrived[1:]:
            total = total + part
        dk, dv = total[:, :, : k.shape[2]].split((k.shape[3], v.shape[3]), -1)
        return dk, dv

    def _all(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of the whole sequence."""
        both = torch.nn.functional.pad(torch.cat((k, v), -1), (0, 0, 0, self.longest - k.shape[2]))
        gathered = all_gather(self.ranks, both).movedim(0, 2).flatten(2, 3)
        keys, values = gathered.index_select(2, self.place).split((k.shape[3], v.shape[3]), -1)
        return keys, values


def places(shards: Sequence[Tensor], longest: int) -> Tensor:
    """Where each position of these shards, in ascending order, lies if the shards are put one after another, each
    padded to `longest`."""
    lies = torch.cat([torch.arange(len(shard)) + rank * longest for rank, shard in enumerate(shards)])
    return lies[torch.cat(list(shards)).argsort()]
