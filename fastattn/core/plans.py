"""Plans: what a call comes to, cached by what the call is.

A call is checked, becomes a spec and gets a backend. On small tensors that takes longer than the computation. So
the outcome is cached as a plan: the spec and the functions that compute it, never a tensor. Its key is all that
decides: shapes, strides, dtypes, devices and requires_grad of the tensors, the other arguments, the grad mode and
FASTATTN_BACKEND. The values of tensors decide nothing. Where a check or a conversion reads them, every call does.

A plan goes past the operator and its autograd.Function. Where somebody must see these (see `watched`), a call has
no key and takes the operator. Both ways give the same bits, but for the second derivatives of composed calls.
"""

from __future__ import annotations

import functools
import importlib
import operator
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn.core.function import Function

P = TypeVar("P")
Key = tuple[tuple[type, ...], tuple[Any, ...]]  # the types of the options, then all the rest

# Plans of one function with options of the same types; beyond that the oldest is dropped.
MOST = 1024
# An argument of another type has no place in a key: it may hold a tensor, or change.
_PLAIN = frozenset((bool, int, float, str, type(None), tuple))
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_STRIDED = torch.strided

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_jit_tracer = torch._C._get_tracing_state
_profiler_enabled = torch.autograd._profiler_enabled
_autocast_enabled = torch._C._is_any_autocast_enabled
_grad_enabled = torch.is_grad_enabled
# Without this function of torch, nothing is known of hooks: as if there were some.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


# torch.compile's check in C++ that tensors are like those for which it was made: in types, dispatch keys, shapes,
# strides, dtypes, devices and requires_grad. None where torch has no such class.
try:
    _Guards: Any = importlib.import_module("torch._C._dynamo.guards").TensorGuards
except (ImportError, AttributeError):
    _Guards = None

_is_there: Any = functools.partial(operator.is_not, None)

# `os.environ.get` raises and catches an error where a variable is not set, which takes longer than a key.
_environment: Any = getattr(os.environ, "_data", None)
_BACKEND: Any = os.environ.encodekey("FASTATTN_BACKEND")  # type: ignore[attr-defined]


def backend_asked() -> Hashable:
    """The value of FASTATTN_BACKEND, as the environment holds it."""
    return os.environ.get("FASTATTN_BACKEND") if _environment is None else _environment.get(_BACKEND)


def watched() -> bool:
    """Whether somebody must see the operators of a call, or acts on them: a compiler, an exporter or a tracer, a
    transform of torch.func, forward mode, a mode of torch dispatch or torch function (fake tensors, flop counting,
    a default device), autocast, the profiler."""
    return (
        _is_compiling()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transforms()
        or forward_ad._current_level >= 0
        or _jit_tracer() is not None
        or _profiler_enabled()
        or _autocast_enabled()
    )


def _is_plain(t: Any) -> bool:
    """Whether this is a dense tensor with values of its own. An operator turns others into such tensors: negated
    views, which torch makes of complex numbers, and the zeros of its derivatives; or knows their shapes only."""
    return type(t) in _TENSORS and t.layout is _STRIDED and not (t.is_meta or t.is_neg() or t._is_zerotensor())


def key(tensors: Sequence[Any], options: tuple[Any, ...]) -> Key | None:
    """The key of a call with these tensors (or None) and other arguments; None if it must take the operator."""
    if watched():
        return None
    kinds = tuple(map(type, options))
    if tuple in kinds:
        kinds += tuple(type(element) for option in options if type(option) is tuple for element in option)
    parts: list[Any] = [options, _grad_enabled(), backend_asked()]
    # torch raises for shapes of nested tensors, and for tf32 where it was set in two ways.
    try:
        for t in tensors:
            if t is None:
                parts.append(None)
            # As `_is_plain`, whose call for each tensor would take a fifth of the time of a key.
            elif not (
                type(t) in _TENSORS
                and t.layout is _STRIDED
                and not (t.is_meta or t.is_neg() or t._is_zerotensor())
            ):
                return None
            else:
                parts += (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
        if tensors[0] is not None and tensors[0].is_cuda:
            parts.append(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:
        return None
    return kinds, tuple(parts)


def _is_interpreted(rest: tuple[Any, ...]) -> bool:
    """Whether Triton's interpreter may be asked to compute this: a variable that no key holds switches it on and
    off, and it is slow anyway."""
    options, _, asked, *_ = rest
    return (asked is not None or "triton" in options) and torch.device("cpu") in rest


class _Latest(Generic[P]):
    """What a call with a key and a plan was, without its tensors."""

    def __init__(self, tensors: Sequence[Any], options: tuple[Any, ...], plan: P) -> None:
        self.plan, self.options, self.kinds = plan, options, tuple(map(type, options))
        self.grad, self.asked = _grad_enabled(), backend_asked()
        self.present = operator.itemgetter(*(i for i, t in enumerate(tensors) if t is not None))
        self.absent = operator.itemgetter(*(i for i, t in enumerate(tensors) if t is None))
        present = self.present(tensors)
        self.check = _Guards(
            *present,
            dynamic_dims_sizes=[list(t.shape) for t in present],
            dynamic_dims_strides=[list(t.stride()) for t in present],
        ).check

    def is_alike(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> bool:
        """Whether a call that nobody watches has the same key."""
        return (
            self.check(*self.present(tensors))
            and not any(map(_is_there, self.absent(tensors)))
            and tuple(map(type, options)) == self.kinds  # 1, 1.0 and True are equal
            and options == self.options
            and _grad_enabled() is self.grad
            and backend_asked() == self.asked
        )


class Plans(Generic[P]):
    """The plans of one function."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hits = self.misses = 0  # calls that found a plan, and that had to make one; threads may lose a count
        # By the types of the options, then by the rest: 1 and 1.0 and True are equal, but True is no number.
        self._plans: dict[tuple[type, ...], dict[tuple[Any, ...], P]] = {}
        self._lock = threading.Lock()
        self._latest: _Latest[P] | None = None
        self._found: P | None = None
        EVERY.append(self)

    def __len__(self) -> int:
        return sum(map(len, self._plans.values()))

    def find(self, key: Key | None) -> P | None:
        """The plan of a call; None if there is none."""
        if key is None:
            return None
        kinds, rest = key
        # What is of types that have no place in a key is not hashed: nothing is found by its types.
        alike = self._plans.get(kinds)
        plan = None if alike is None else alike.get(rest)
        if plan is None:
            self.misses += 1
        else:
            self.hits += 1
        return plan

    def latest(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> P | None:
        """The plan of the call that comes again and again, without a key, if this is the same; else None.

        Around a computation of a CPU a key takes three times as long as in a hot loop: it reads five attributes of
        each tensor. This is for functions whose calls there last less than a millisecond.
        """
        if watched():  # first: a compiler must not read what changes from call to call
            return None
        latest = self._latest
        if latest is None or not latest.is_alike(tensors, options):
            return None
        self.hits += 1
        return latest.plan

    def again(self, tensors: Sequence[Any], options: tuple[Any, ...], plan: P) -> None:
        """A plan was found by its key. If it is the same as the time before, `latest` will know its calls."""
        # A tensor that is given twice is never the same to torch's check: do not make it again in each call.
        known = self._latest is not None and self._latest.plan is plan
        if self._found is plan and not known and tensors[0].is_cpu and _Guards is not None:
            absent = sum(t is None for t in tensors)  # `itemgetter` gives a tuple of two and more
            if 2 <= absent <= len(tensors) - 2:
                self._latest = _Latest(tensors, options, plan)
        self._found = plan

    def keep(self, key: Key | None, plan: P) -> None:
        """Cache the plan of a call that was found right, if its arguments have a place in a key."""
        if key is None or not _PLAIN.issuperset(key[0]):
            return
        kinds, rest = key
        if _is_interpreted(rest):
            return
        with self._lock:
            alike = self._plans.setdefault(kinds, {})
            if len(alike) >= MOST:
                del alike[next(iter(alike))]
            alike[rest] = plan

    def forget(self) -> None:
        with self._lock:
            self._plans.clear()
            self._latest = self._found = None


EVERY: list[Plans] = []


def forget() -> None:
    """Drop all plans: for whoever changes which backend computes what."""
    for plans in EVERY:
        plans.forget()


@dataclass(frozen=True)
class Plan:
    """How a call is computed. Each family derives its own.

    spec: the family's.
    backend: the one that the caller named.
    differentiable: whether a derivative may be asked for.
    module: the backend that computes the forward.
    composed: whether operations of torch, which autograd differentiates by itself, give the bits of `forward` and
        `gradients` and keep no more. Autograd's own backward takes less time than a Function in Python.
    asked: FASTATTN_BACKEND when the plan was made.
    chosen: the backends of the backward, see `fastattn.core.capabilities.backward_module`.
    repeats: what was recorded of earlier calls; repeatable: whether any is ever recorded.
    """

    spec: Any
    backend: str | None
    differentiable: bool
    module: ModuleType
    composed: bool = False
    asked: Hashable = field(default_factory=backend_asked)
    chosen: dict[Hashable, ModuleType] = field(default_factory=dict)
    repeats: Repeats = field(default_factory=lambda: Repeats(), compare=False)
    repeatable: bool = field(init=False, compare=False)
    family: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "repeatable", hasattr(self.module, "record"))

    def forward(self, *tensors: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """The results, and what the gradients need: the same as the family's autograd.Function saves, because
        activation checkpointing may run a call one way and repeat it the other way."""
        raise NotImplementedError

    def compose(self, *tensors: Any) -> tuple[Tensor, ...]:
        """The results of a plan that is `composed`, by those operations."""
        raise NotImplementedError

    def gradients(
        self, saved: Sequence[Any], cotangents: Sequence[Any], needed: Sequence[bool], direct: bool
    ) -> Sequence[Tensor | None]:
        """The gradient of each tensor that `forward` took. direct: by the backend itself; else by the operator,
        which can be differentiated again."""
        raise NotImplementedError


class Repeats:
    """Recordings of a plan's calls, by which later ones are repeated without the Python in between.

    They are made by a backend that has a function `record`: that of the Triton kernels. A recording is for tensors
    that lie equally far behind a multiple of 16 bytes, and for what else a call depends on beyond the plan's key.
    The first call of a kind is not recorded, since there may be no second one.
    """

    MOST = 32  # kinds of calls; those beyond are not recorded

    def __init__(self) -> None:
        self._recordings: dict[Hashable, Any] = {}

    def __call__(self, plan: Plan, function: Callable[..., Any], tensors: Sequence[Any], *kind: Hashable) -> Any:
        """function(*tensors)."""
        record = getattr(plan.module, "record", None)
        if record is None:
            return function(*tensors)
        key = (*kind, *[None if t is None else t.data_ptr() % 16 for t in tensors])
        known = self._recordings.get(key, self)
        if known is self or known is False:
            if known is self and len(self._recordings) < self.MOST:
                self._recordings[key] = None
            return function(*tensors)
        if known is None:
            outcome, recording = record(function, tensors)
            self._recordings[key] = recording or False
            return outcome
        return known(tensors)


def run(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The results of a plan, differentiable."""
    if not plan.differentiable:
        return _forward(plan, tensors)[0]
    # Activation checkpointing hooks what is saved, and may repeat a call as the operator: both ways save the same.
    if plan.composed and _saved_tensors_hooks(False) is None:
        return plan.compose(*tensors)
    return Planned.apply(plan, *tensors)


def _forward(plan: Plan, tensors: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    # Around a computation of a CPU Python's code is out of the caches: each step less is worth ten of a hot loop.
    return plan.repeats(plan, plan.forward, tensors, "forward") if plan.repeatable else plan.forward(*tensors)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these tensors."""
    return _grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Planned(Function):
    """A plan with its gradient, where nobody watches: it takes no part in vmap, forward mode or compilation."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        results, saved = _forward(plan, tensors)
        ctx.plan = plan
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, saved, needed = ctx.plan, ctx.saved_tensors, ctx.needs_input_grad[1:]
        direct = not _grad_enabled() and not watched()
        for t in cotangents:
            direct = direct and (t is None or _is_plain(t))
        if not (direct and plan.repeatable):
            return None, *plan.gradients(saved, cotangents, needed, direct)

        def gradients(*tensors: Any) -> Sequence[Tensor | None]:
            return plan.gradients(tensors[: len(saved)], tensors[len(saved) :], needed, direct)

        alike = [None if t is None else (t.shape, t.stride(), t.dtype) for t in cotangents]
        return None, *plan.repeats(plan, gradients, (*saved, *cotangents), needed, backend_asked(), *alike)
