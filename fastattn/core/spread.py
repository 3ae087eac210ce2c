"""Whether the sequence of every call is spread over ranks: `fastattn.distributed.context_parallel` says so here.

Functions that know what to do then ask `current`. Those that would take a part of the sequence for the whole call
`refuse`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Spread(Protocol):
    """A sequence of which this rank has some tokens.

    length: tokens in the whole sequence.
    """

    length: int

    def attention(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        """`fastattn.attention` of the whole sequence, for this rank's tokens."""
        ...

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Where this rank's tokens stand in the whole sequence: int64 (length,)."""
        ...

    def check_positions(self, positions: Tensor | None, model: str) -> None:
        """Raise unless a model was given these positions, (n,) or (B, n)."""
        ...

    def is_numbered_by_chunk(self, documents: Tensor) -> bool:
        """Whether these numbers of tokens (B, n) change exactly where this rank's chunks end."""
        ...


current: Spread | None = None
# The class of DTensors, and what computes them, by function: fastattn.distributed enters them when it is imported.
DTENSORS: tuple[type, ...] = ()
of_dtensors: dict[str, Callable[..., Any]] = {}
# Imports what enters them; the top of the package gives it, since this floor knows of none above.
enter_dtensors: Callable[[], object] | None = None


def positions(length: int, device: torch.device) -> Tensor:
    """The positions of a sequence of this many tokens; those of this rank's tokens if the sequence is spread."""
    return torch.arange(length, device=device) if current is None else current.positions(length, device)


def whole_length(length: int) -> int:
    """How many tokens the whole sequence has."""
    return length if current is None else current.length


def refuse(what: str) -> None:
    """Raise ValueError if the sequence is spread over ranks: `what` would take a part for the whole."""
    if current is not None:
        raise ValueError(f"{what} is not computed under fastattn.distributed.context_parallel")


def is_dtensor(t: Any) -> bool:
    """Whether this is a DTensor. The first one imports what computes them, since a program may import fastattn
    before it imports torch.distributed.tensor."""
    if DTENSORS:
        return isinstance(t, DTENSORS)
    return type(t).__name__ == "DTensor" and enter_dtensors is not None and bool(enter_dtensors())


def refuse_dtensors(tensors: Iterable[Any]) -> None:
    """Raise ValueError if one of these is a DTensor, in a transform of torch.func or not."""
    if any(isinstance(_innermost(t), DTENSORS) for t in tensors if isinstance(t, Tensor)):
        raise ValueError(
            "second derivatives and forward mode of DTensors are not computed within torch.func, nor from "
            "operators that are called directly; take torch.autograd.grad(..., create_graph=True) or "
            "torch.autograd.forward_ad of fastattn's functions"
        )


def _innermost(t: Tensor) -> Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t
