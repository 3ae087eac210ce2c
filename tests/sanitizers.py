"""What compute-sanitizer finds on a GPU, found in Triton's interpreter: every address is checked.

Inside `sanitized()` each launch of an interpreted kernel is watched:

- memory: an address that is loaded or stored must belong to an element of a tensor that the launch was given. The
  gaps between the rows of a strided view belong to none. (Guard pages around each tensor would find less: they do
  not see an access that lands in another tensor, or in a gap.)
- initialisation: memory that `torch.empty` hands out holds NaN, and the largest number where it holds integers.
- races: no two programs of a launch store to one address, and none loads what another one stores. Nothing orders
  the programs of a launch, and no kernel here uses atomics.

`order` is the order in which the programs of a launch run: results must not depend on it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

ORDERS = ("given", "reversed", "shuffled", "last axis first")


class Finding(AssertionError):
    """A kernel touched what it must not; the message names the kernel, the program and the place."""


@dataclass
class Watch:
    """What happened inside `sanitized()`: the names of the kernels that ran, and a number of checked addresses."""

    kernels: set[str] = field(default_factory=set)
    addresses: int = 0


@contextmanager
def sanitized(order: str = "given", seed: int = 0) -> Iterator[Watch]:
    """Watch every launch in the block; raises a `Finding` at the first fault, before memory is touched.

    Args:
        order: one of `ORDERS`.
        seed: of the shuffled order.
    """
    watch = Watch()
    shuffler = random.Random(seed)
    execute = interpreter.GridExecutor.__call__
    builder = interpreter.interpreter_builder

    def launch(executor: Any, *arguments: Any, **keywords: Any) -> None:
        watched = _Launch(executor.fn.__name__, tree_leaves((arguments, keywords)), order, shuffler, watch)
        with ExitStack() as patches:
            for name in ("create_masked_load", "create_masked_store", "set_grid_idx"):
                patches.enter_context(mock.patch.object(builder, name, getattr(watched, name)))
            execute(executor, *arguments, **keywords)
        watched.finish()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch))
        # A Finding as it is, not wrapped in the interpreter's own error.
        stack.enter_context(mock.patch.object(triton.knobs.compilation, "front_end_debugging", True))
        stack.enter_context(_filled_memory())
        yield watch


@contextmanager
def _filled_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # in this mode PyTorch fills what it hands out
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Launch:
    """One launch: which bytes belong to its tensors, and which program touched which."""

    def __init__(self, kernel: str, leaves: list[Any], order: str, shuffler: random.Random, watch: Watch) -> None:
        self.kernel, self.order, self.shuffler, self.watch = kernel, order, shuffler, watch
        watch.kernels.add(kernel)
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()]
        self.allowed = _merged([_bytes_of(t) for t in self.tensors])
        self.program = (0, 0, 0)
        self.places: dict[tuple[int, int, int], tuple[int, int, int]] | None = None
        self.loaded: list[tuple[int, np.ndarray]] = []
        self.stored: list[tuple[int, np.ndarray]] = []
        self.builder = interpreter.interpreter_builder
        self.load, self.store = self.builder.create_masked_load, self.builder.create_masked_store
        self.set_place = self.builder.set_grid_idx

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        if self.places is None:
            given = [tuple(map(int, place)) for place in np.ndindex(*self.builder.grid_dim)]
            self.places = dict(zip(given, self._in_order(given), strict=True))
        self.program = self.places[x, y, z]
        self.set_place(*self.program)

    def _in_order(self, given: list[Any]) -> list[Any]:
        if self.order == "shuffled":
            return self.shuffler.sample(given, len(given))
        if self.order == "last axis first":
            return sorted(given, key=lambda place: place[::-1])
        return given[::-1] if self.order == "reversed" else given

    def create_masked_load(self, ptrs: Any, mask: Any, *rest: Any) -> Any:
        self._check("loads", ptrs, mask, self.loaded)
        return self.load(ptrs, mask, *rest)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self._check("stores", ptrs, mask, self.stored)
        return self.store(ptrs, value, mask, *rest)

    def _check(self, verb: str, ptrs: Any, mask: Any, record: list[tuple[int, np.ndarray]]) -> None:
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)].astype(np.int64).ravel()
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        self.watch.addresses += len(addresses)
        for address in (addresses, addresses + size - 1):
            outside = ~_among(address, self.allowed)
            if outside.any():
                raise Finding(f"{self._where()} {verb} {self._place(int(address[outside][0]))}")
        if verb == "stores" and len(np.unique(addresses)) < len(addresses):
            raise Finding(f"{self._where()} stores twice to one address in one instruction")
        number = int(np.ravel_multi_index(self.program, self.builder.grid_dim))
        record.append((number, np.unique(addresses)))

    def finish(self) -> None:
        """Compare the programs with each other, when all have run."""
        stored, by = _flat(self.stored)
        order = np.lexsort((by, stored))
        stored, by = stored[order], by[order]
        twice = (stored[1:] == stored[:-1]) & (by[1:] != by[:-1])
        if twice.any():
            i = int(twice.argmax())
            raise Finding(
                f"{self.kernel}: programs {by[i]} and {by[i + 1]} both store to {self._place(int(stored[i]))}"
            )
        loaded, reader = _flat(self.loaded)
        if not len(stored) or not len(loaded):
            return
        at = np.minimum(np.searchsorted(stored, loaded), len(stored) - 1)
        raced = (stored[at] == loaded) & (by[at] != reader)
        if raced.any():
            i = int(raced.argmax())
            raise Finding(
                f"{self.kernel}: program {reader[i]} loads what program {by[at[i]]} stores, "
                f"{self._place(int(loaded[i]))}"
            )

    def _where(self) -> str:
        return f"{self.kernel}, program {self.program} of {self.builder.grid_dim},"

    def _place(self, address: int) -> str:
        """The tensor that lies nearest, and where the address lies in it or beside it."""

        def distance(t: Tensor) -> int:
            first, last = _ends(t)
            return max(first - address, address - last, 0)

        nearest = min(self.tensors, key=distance, default=None)
        if nearest is None:
            return f"address {address}, and no tensor was given"
        elements = (address - nearest.data_ptr()) // nearest.element_size()
        shape, strides = tuple(nearest.shape), nearest.stride()
        return f"element {elements} from the start of a tensor of shape {shape} and strides {strides}"


def _ends(t: Tensor) -> tuple[int, int]:
    """Addresses of the first and the last byte."""
    reach = [(size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    low = sum(r for r in reach if r < 0) * t.element_size()
    high = (sum(r for r in reach if r > 0) + 1) * t.element_size()
    return t.data_ptr() + low, t.data_ptr() + high - 1


def _bytes_of(t: Tensor) -> np.ndarray:
    """The addresses of all bytes of all elements, as intervals (n, 2), ends included."""
    offsets = np.zeros((), dtype=np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride if stride else offsets[..., None]
    first = np.unique(offsets) * t.element_size() + t.data_ptr()
    return np.stack([first, first + t.element_size() - 1], 1)


def _merged(parts: list[np.ndarray]) -> np.ndarray:
    """Intervals of many tensors, in order, those that touch joined: (n, 2)."""
    if not parts:
        return np.empty((0, 2), dtype=np.int64)
    spans = np.concatenate(parts)
    spans = spans[np.lexsort((spans[:, 1], spans[:, 0]))]
    reach = np.maximum.accumulate(spans[:, 1])
    begins = np.concatenate([[True], spans[1:, 0] > reach[:-1] + 1])
    ends = np.concatenate([begins[1:], [True]])
    return np.stack([spans[begins, 0], reach[ends]], 1)


def _among(addresses: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Which addresses lie in one of the intervals."""
    if not len(spans):
        return np.zeros(len(addresses), dtype=bool)
    at = np.searchsorted(spans[:, 0], addresses, side="right") - 1
    return (at >= 0) & (addresses <= spans[np.maximum(at, 0), 1])


def _flat(record: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All addresses of a record, and the program of each."""
    if not record:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    owners = np.concatenate([np.full(len(addresses), program) for program, addresses in record])
    return np.concatenate([addresses for _, addresses in record]), owners
