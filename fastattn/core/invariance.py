"""Whether the bits of a row's result are to depend on that row alone: `fastattn.invariant`.

Sums in floating point depend on their order. By default it follows from the shape of a call, so that a sequence
gives other last bits in a packed batch than alone. An invariant call takes tiles of one size, cut from each
sequence's own beginning, and adds them in a fixed order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fastattn.ground.arguments import flag

wanted: bool = os.environ.get("FASTATTN_INVARIANT", "") not in ("", "0")


def asked(argument: bool | None) -> bool:
    """What a call's argument `invariant` asks for; None is what the context says."""
    return wanted if argument is None else flag("invariant", argument)


@contextmanager
def invariant(enabled: bool = True) -> Iterator[None]:
    """Within it, the bits of a row of attention depend on that row alone, forward and backward.

    A sequence then gives the same bits alone and in a batch, packed (`attention_varlen`, `masks.documents`,
    `masks.packed_sequences`) and padded (key_lengths; cache_starts), its queries computed at once, in chunks or
    one by one from a cache (`attention_with_cache`), in pages or not. The gradients of a sequence are the same
    packed and alone. A NaN in one sequence of a packed batch reaches no other. A model in training then has the
    probabilities that it had when it generated.

    It holds for finite keys and values, on one device, with one backend, one version of PyTorch and one number of
    threads. Norms and `prepare_heads` have it always. Products with weights do not: the bits of a row of
    `torch.nn.Linear`, of an MLP or of a loss may depend on how many rows there are.

    Dropout and masks of block lists are refused. Second derivatives and forward mode are computed as always.

    It holds for the whole process until the context ends. The argument `invariant` of a function comes first, then
    this context, then the environment variable FASTATTN_INVARIANT=1, which is read when fastattn is imported.

    Args:
        enabled: False switches it off.

    Example:
        >>> q, k, v = (torch.randn(1, 4, 100, 64) for _ in range(3))
        >>> with fastattn.invariant():
        ...     whole = fastattn.attention(q, k, v, causal=True)
        ...     chunk = fastattn.attention(q[:, :, 60:70], k[:, :, :70], v[:, :, :70], causal=True)
        >>> torch.equal(whole[:, :, 60:70], chunk)
        True
    """
    global wanted
    before, wanted = wanted, flag("enabled", enabled)
    try:
        yield
    finally:
        wanted = before
