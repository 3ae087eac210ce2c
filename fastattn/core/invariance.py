"""Whether the bits of a row's result are to depend on that row alone: `fastattn.invariant`.

Sums in floating point depend on their order. By default it follows from the shape of a call, so that a sequence
gives other last bits in a packed batch than alone. An invariant call of attention takes tiles of fixed sizes (on a
CPU of several, or PyTorch's flash attention, if these give equal bits), cut from each sequence's own beginning,
and adds them in a fixed order. An invariant product with weights takes a fixed number of rows at a time, see
fastattn.core.rows.
"""

from __future__ import annotations

import bisect
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastattn.ground.arguments import flag

_ENVIRONMENT: bool = os.environ.get("FASTATTN_INVARIANT", "") not in ("", "0")
_KEY, _RECORD_KEY = "fastattn.invariant", "fastattn.invariant.record"
_used = False  # whether anybody entered the context: until then there is nothing to inherit, and calls do not look
# Changes of a thread's setting that are remembered: an MLP makes two, and a long forward has thousands.
_MOST = 2**16

_backward_run = torch._C._current_graph_task_id  # -1 outside of a backward


class _Thread(threading.local):
    """What this thread's context says, None outside of any, and within which run of autograd it was entered.
    torch.compile reads and guards it, which it cannot do with a contextvars.ContextVar."""

    wanted: bool | None = None
    run: int = -1


class _Record:
    """What a thread's setting was when it made a node of autograd, by the node's sequence number."""

    def __init__(self) -> None:
        self.begins, self.settings = [0], [_ENVIRONMENT]

    def change(self, setting: bool) -> None:
        number = torch._C._autograd._get_sequence_nr()  # of the next node
        if self.begins[-1] == number:
            self.settings[-1] = setting
        elif self.settings[-1] != setting:
            self.begins.append(number)
            self.settings.append(setting)
            if len(self.begins) > 2 * _MOST:
                del self.begins[:-_MOST], self.settings[:-_MOST]

    def at(self, number: int) -> bool | None:
        place = bisect.bisect_right(self.begins, number) - 1
        return None if place < 0 else self.settings[place]


_thread = _Thread()


def wanted() -> bool:
    """What the context of this thread says; outside of one, the environment variable. Within a backward, where
    activation checkpointing calls functions again, what it said in the forward."""
    if not _used:
        return _ENVIRONMENT
    if not torch.compiler.is_compiling() and _backward_run() not in (-1, _thread.run):
        found = _in_the_forward()
        if found is not None:
            return found
    found = _thread.wanted
    return _inherited() if found is None else found


def _inherited() -> bool:
    """On a GPU autograd computes on a thread of its own, where activation checkpointing calls functions again. It
    takes from the thread that called it what torch stashes for it."""
    if torch.compiler.is_compiling() or not torch._C._is_key_in_tls(_KEY):
        return _ENVIRONMENT
    return torch._C._get_obj_in_tls(_KEY)


def _in_the_forward() -> bool | None:
    """The setting with which the node was made that autograd computes; None if that is not known."""
    node = torch._C._current_autograd_node()
    if node is None or not torch._C._is_key_in_tls(_RECORD_KEY):
        return None
    return torch._C._get_obj_in_tls(_RECORD_KEY).at(node._sequence_nr())


def _set(own: bool | None, inherited: bool, run: int) -> None:
    """What this thread's context says, and what a thread of autograd inherits from it."""
    global _used
    _thread.wanted, _thread.run, _used = own, run, True
    if not torch.compiler.is_compiling():
        torch._C._stash_obj_in_tls(_KEY, inherited)
        if not torch._C._is_key_in_tls(_RECORD_KEY):
            torch._C._stash_obj_in_tls(_RECORD_KEY, _Record())
        if _backward_run() == -1:
            torch._C._get_obj_in_tls(_RECORD_KEY).change(inherited)


def asked(argument: bool | None) -> bool:
    """What a call's argument `invariant` asks for; None is what the context says."""
    return wanted() if argument is None else flag("invariant", argument)


@contextmanager
def invariant(enabled: bool = True) -> Iterator[None]:
    """Within it, the bits of a row depend on that row alone, in attention, MLPs and losses, forward and backward.

    A sequence then gives the same bits alone and in a batch, packed (`attention_varlen`, `masks.documents`,
    `masks.packed_sequences`) and padded (key_lengths; cache_starts), its queries computed at once, in chunks or
    one by one from a cache (`attention_with_cache`), in pages or not. The gradients of a sequence's queries, keys
    and values are the same packed and alone. A NaN in one sequence of a packed batch reaches no other. A model in
    training then has the probabilities that it had when it generated.

    `mlp`, `gated_mlp`, `linear_cross_entropy` and the modules of fastattn.nn compute a fixed number of rows at a
    time: a token's result, and the gradient of its input, do not depend on how many others there are. Norms and
    `prepare_heads` have it always. Other layers have it through `fastattn.by_rows(layer, x)`. A gradient of a
    weight, and a mean over tokens, is a sum over all tokens of a call, and so depends on them.

    It holds for finite keys and values, on one device, with one backend, one version of PyTorch and one number of
    threads, not under torch.func.vmap. Dropout and masks of block lists are refused. Second derivatives and
    forward mode of attention are computed as always. On a GPU it assumes that a product of one size, in one
    library or compiled kernel, adds the terms of every row in one order.

    It holds for the calls of this thread until the context ends; tasks of asyncio on one thread share it. Other
    threads have contexts of their own. What activation checkpointing computes again in a backward has the setting
    of its forward, also where the context has ended by then, if one thread called both. The argument `invariant`
    of a function comes first, then this context, then the environment variable FASTATTN_INVARIANT=1, which is read
    when fastattn is imported.

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
    enabled = flag("enabled", enabled)
    own, inherited, run = _thread.wanted, wanted(), _thread.run
    _set(enabled, enabled, -1 if torch.compiler.is_compiling() else _backward_run())
    try:
        yield
    finally:
        _set(own, inherited, run)
