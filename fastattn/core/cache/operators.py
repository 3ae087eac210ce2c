"""A cache as PyTorch operators: one writes to it, one attends to it. With fake kernels, without gradient.

`fastattn::cache_append` says that it mutates the caches, so that compilers keep it where it is and copy nothing.
Both check, before anything is written, what only values tell. The kernels on a GPU do so only if `check`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor, library

from fastattn.core import backends, capabilities
from fastattn.core.cache.spec import (
    CacheSpec,
    CacheTensors,
    Storage,
    check_page_scales,
    check_slots,
    check_values,
    spec_of,
)
from fastattn.core.capabilities import FORWARD, Request
from fastattn.core.layout import empty_heads
from fastattn.ground.checks import lse_dtype

_operators = library.Library("fastattn", "FRAGMENT")
_operators.define(
    "cache_append(Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor k, "
    "Tensor? v, Tensor lengths, Tensor? block_table, bool check, str backend) -> ()"
)
_operators.define(
    "cache_attention(Tensor q, Tensor k_cache, Tensor? v_cache, Tensor? k_scale, Tensor? v_scale, Tensor lengths, "
    "Tensor? starts, Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, Tensor? tree_mask, "
    "SymInt value_width, bool causal, float scale, SymInt? left, SymInt? right, float softcap, str precision, "
    "bool invariant, bool check, str backend) -> (Tensor, Tensor)"
)
_APPEND, _ATTENTION = "fastattn::cache_append", "fastattn::cache_attention"
_CACHES, _COUNT = len(Storage._fields), len(CacheTensors._fields)


def chosen(q: Tensor, storage: Storage, spec: CacheSpec, backend: str | None) -> str:
    """The backend of a call."""
    values = storage.keys if storage.values is None else storage.values
    return capabilities.choose(Request("cache", spec, (q, storage.keys, values)), FORWARD, backend)


def one_token(q: Tensor, storage: Storage, spec: CacheSpec, backend: str) -> Any:
    """A shorter way of calls that have no CacheTensors beside lengths and a table; None if there is none."""
    shorter = getattr(backends.load("cache", backend), "OneToken", None)
    return None if shorter is None else shorter.of(q, storage, spec)


def _reads_values(t: Tensor, backend: str) -> bool:
    """Whether the call waits for values anyway. The kernels on a GPU do not: there a wrong number gives NaN."""
    return t.device.type == "cpu" or backend != "triton"


def append(
    storage: Storage, k: Tensor, v: Tensor | None, tensors: CacheTensors, check: bool, backend: str
) -> None:
    """Write new keys and values to the ends of their rows; `tensors.lengths` count them."""
    if check or _reads_values(k, backend):
        check_values(storage.keys, tensors, k.shape[2])
        check_page_scales(storage, tensors, k.shape[2])
    if check:
        check_slots(storage.keys, tensors, k.shape[2])
    if k.numel():
        backends.load("cache", backend).append(storage, k, v, tensors)


def attend(
    q: Tensor, storage: Storage, spec: CacheSpec, tensors: CacheTensors, check: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """out and the log-sum-exp."""
    if check or _reads_values(q, backend):
        check_values(storage.keys, tensors)
    return backends.load("cache", backend).forward(q, storage, spec, tensors)


def _append(*given) -> None:
    k, v, lengths, block_table, check, backend = given[_CACHES:]
    append(Storage(*given[:_CACHES]), k, v, CacheTensors(lengths, None, block_table), check, backend)


def _attention(q, *rest) -> tuple[Tensor, Tensor]:
    storage, tensors, spec, check, backend = _taken_apart(rest)
    return attend(q, storage, spec, tensors, check, backend)


def _taken_apart(rest: Sequence) -> tuple[Storage, CacheTensors, CacheSpec, bool, str]:
    """What the operator takes from k_cache on."""
    *options, check, backend = rest[_CACHES + _COUNT :]
    tensors = CacheTensors(*rest[_CACHES : _CACHES + _COUNT])
    return Storage(*rest[:_CACHES]), tensors, spec_of(options), check, backend


_operators.impl("cache_append", _append, "CompositeExplicitAutograd")
_operators.impl("cache_attention", _attention, "CompositeExplicitAutograd")


@library.register_fake(_APPEND, lib=_operators)
def _append_fake(*_) -> None:
    return None


@library.register_fake(_ATTENTION, lib=_operators)
def _attention_fake(q, *rest):
    _, _, spec, _, _ = _taken_apart(rest)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    return empty_heads((*q.shape[:3], spec.value_width), q), lse


NO_GRADIENT = (
    "attention_with_cache computes no gradients, but one is asked for: call it within torch.no_grad() or "
    "torch.inference_mode(), or give it tensors that require none"
)
NO_MAP = "attention_with_cache cannot be mapped by torch.func.vmap: give it a larger batch"


def _refuse_vmap(*_: Any) -> NoReturn:
    raise ValueError(NO_MAP)


def _refuse_gradient(*_: Any) -> NoReturn:
    raise ValueError(NO_GRADIENT)


library.register_vmap(_APPEND, _refuse_vmap, lib=_operators)
library.register_vmap(_ATTENTION, _refuse_vmap, lib=_operators)
library.register_autograd(_ATTENTION, _refuse_gradient, lib=_operators)
