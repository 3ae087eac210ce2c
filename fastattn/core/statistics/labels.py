"""Matches by label: what a query looks for, and what a key has, as integers that the sweep compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.ground import arguments
from fastattn.ground.checks import shape_of

KINDS = ("induction", "duplicate", "previous", "first")
Kind = str | Callable[[Tensor], tuple[Tensor, Tensor]]
# A key at any place matches.
ANYWHERE = -(2**30)


def check_are_labels(labels: Tensor) -> None:
    """Raise unless these are integers with two dimensions; the keys that they belong to need not be known yet."""
    arguments.tensor("labels", labels)
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.dim() != 2:
        raise ValueError(f"labels must have shape (batch, keys), got {shape_of(labels)}")


def check_labels(labels: Tensor, q: Tensor, k: Tensor) -> None:
    """Integers (B, Lk), one for each key; the queries are those of the last Lq positions."""
    check_are_labels(labels)
    expected = (k.shape[0], k.shape[2])
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels must have shape {expected}, one for each key, got {shape_of(labels)}")
    if labels.device != q.device:
        raise ValueError(f"labels must be on q's device {q.device}, got {labels.device}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q must not be longer than k, {k.shape[2]}, to have labels; got {q.shape[2]}")


def check_kind(name: str, kind: Kind) -> None:
    if not callable(kind) and kind not in KINDS:
        raise ValueError(f"{name} must be one of {', '.join(KINDS)} or a function of labels, got {kind!r}")


def labels_of(labels: Tensor, queries: int, kinds: Sequence[Kind]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """What queries want, int32 (kinds, B, Lq), what keys offer, int32 (kinds, B, Lk), a distance for each kind.

    A key matches a query if it offers what the query wants, and stands at least this distance before the query's
    diagonal."""
    found, before = [], []
    batch, keys = labels.shape
    labels = labels.long()
    place = torch.arange(keys, device=labels.device).expand(batch, keys)
    for kind in kinds:
        if kind == "previous":
            wanted, offered, distance = place - 1, place, 1
        elif kind == "first":
            wanted, offered, distance = torch.zeros_like(place), place, 1
        elif kind == "duplicate":
            wanted, offered, distance = *_ranks(labels, labels), 1
        elif kind == "induction":
            wanted, offered = _ranks(labels, labels)
            # No token stands before the first.
            offered, distance = torch.cat((torch.full_like(offered[:, :1], -1), offered[:, :-1]), 1), 0
        else:
            assert callable(kind)
            wanted, offered, distance = *_ranks(*_checked_labels(kind, labels)), ANYWHERE
        found.append((wanted[:, keys - queries :], offered))
        before.append(distance)
    own, others = (torch.stack(ts).to(torch.int32).contiguous() for ts in zip(*found, strict=True))
    return own, others, tuple(before)


def _checked_labels(kind: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What a function of labels returns."""
    returned = kind(labels)
    expected = f"two tensors of integers {tuple(labels.shape)}, what queries want and what keys offer"
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise TypeError(f"kind's function must return {expected}; got {type(returned).__name__}")
    for t in returned:
        if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(
                f"kind's function must return {expected}; got {type(t).__name__} {getattr(t, 'dtype', '')}"
            )
        if t.shape != labels.shape:
            raise ValueError(f"kind's function must return {expected}; got one of shape {shape_of(t)}")
    return returned[0].long(), returned[1].long()


def _ranks(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The values of two tensors as numbers from 0, equal where the values are equal: these fit into 32 bits."""
    values, order = torch.cat((first.flatten(), second.flatten())).sort()
    steps = torch.cat((values.new_zeros(min(1, len(values))), (values.diff() != 0).long())).cumsum(0)
    ranks = torch.empty_like(steps).scatter_(0, order, steps)
    return ranks[: first.numel()].view(first.shape), ranks[first.numel() :].view(second.shape)


def possible(wanted: Tensor, offered: Tensor, before: int, keys: int) -> Tensor:
    """Whether any key matches each query, bool (B, Lq). The first key that offers what it wants decides."""
    batch, queries = wanted.shape
    place = torch.arange(keys, device=offered.device).expand(batch, keys)
    # Ranks, and positions, are below the number of labels; -1 counts as the one beyond.
    numbers = max(2 * batch * keys, keys) + 1
    owner = torch.arange(batch, device=offered.device)[:, None] * numbers
    first = torch.full((batch * numbers,), keys, device=offered.device)
    first.scatter_reduce_(0, (owner + offered % numbers).flatten(), place.flatten(), "amin")
    diagonal = torch.arange(keys - queries, keys, device=offered.device)
    found = first[(owner + wanted % numbers).flatten()].view(batch, queries)
    return (found < keys) & (found <= diagonal - before)
