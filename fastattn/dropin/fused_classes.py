"""Classes made at run time: a module becomes fused when its class is replaced by one of them.

The new class derives from a form, which computes the fused function, and from the module's own class. So the
parameters, hooks and state dict of the module stay the same objects.

What a form computes was found equal to a method of that class, or read in its source. Somebody may replace this
method later, on the class or on one that it derives from. Then the new method computes (see `Fused.is_outdated`).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn


class Fused(nn.Module):
    """A module with one fused method. Its class derives from `form` and from `own`, the class it had before.

    method: the name of the method of `own` that is replaced. extends: other methods that `own` may have.
    tried: the digest of that method (see `digest`), and of those that it may call by super(), as it was tried or
        read.
    code: these methods and their code, if that was so when this class was made.
    """

    form: type[Fused]
    own: type[nn.Module]
    names: Any
    method = "forward"
    extends: frozenset[str] = frozenset()
    keeps_name = False  # whether the new class has the name of `own`
    tried: str
    code: tuple[tuple[Any, ...], list[Any]] | None

    @classmethod
    def is_outdated(cls) -> bool:
        """Whether the method of `own` is no longer the one that was tried, so that it must compute."""
        methods = methods_of(cls.own, cls.method)
        if cls.code is None or methods != cls.code[0]:
            return True
        # Tools that load changed files put new code into old functions. While torch.compile traces, it cannot be
        # read.
        return not torch.compiler.is_compiling() and list(map(_code_of, methods)) != cls.code[1]

    @classmethod
    def forward_for(cls, own: type[nn.Module], names: Any) -> Any:
        """The forward of the new class, if `forward` is what the form replaces; None for that of `own`."""
        return _called_like(own.forward, cls.forward)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle cannot look up a class made at run time by its name, but it can look up what it is made of.
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (self.form, self.own, self.names, self.tried), *reduced[2:]


def clash(module: nn.Module, form: type[Fused]) -> str | None:
    """Why the module cannot become this form: an attribute or method of its own would be hidden, or would hide one
    of the form. None if there is no such attribute."""
    forms = [kind for kind in form.__mro__ if issubclass(kind, Fused)]
    ours = {name for kind in forms for name in (*vars(kind), *inspect.get_annotations(kind))}
    ours = {name for name in ours if not name.startswith("__")} - {form.method, *form.extends}
    theirs = sorted(name for name in ours if hasattr(module, name))
    return f"it has an attribute {theirs[0]}, a name that the fused class needs itself" if theirs else None


_made: dict[tuple[Any, ...], Any] = {}


def fused_class(form: type[Fused], own: type[nn.Module], names: Any, tried: str = "") -> Any:
    """The class for modules of class `own` that are fused by `form`, which finds their parts by `names`. Called
    again with the same arguments, it returns the same class. tried: as `Fused.tried`; by default the methods as
    they are now."""
    methods = methods_of(own, form.method)
    key = (form, own, names, tried or digest(methods))
    made = _made.get(key)
    if made is None or (made.is_outdated() and not tried):
        made = _made[key] = _new_class(*key, methods)
    return made


def _new_class(form: type[Fused], own: type[nn.Module], names: Any, tried: str, methods: tuple[Any, ...]) -> Any:
    code = (methods, list(map(_code_of, methods))) if digest(methods) == tried else None
    members = {
        "form": form, "own": own, "names": names, "tried": tried, "code": code, "__module__": __name__,
        "__doc__": own.__doc__,
    }  # fmt: skip
    if form.method == "forward" and (forward := form.forward_for(own, names)):
        members["forward"] = forward
    made: Any = type(own.__name__ if form.keeps_name else f"Fused{own.__name__}", (form, own), members)
    if "forward" in vars(made) and "forward" not in members:
        # transformers wraps the forward that a new class inherits. It would no longer be looked up in `own`.
        del made.forward
    return made


def methods_of(own: type[nn.Module], method: str) -> tuple[Any, ...]:
    """The method of a class, and of each that it derives from: super() may call them."""
    return tuple(getattr(kind, method, None) for kind in own.__mro__)


def _code_of(function: Any) -> Any:
    """The code of a function, or of the one that it wraps."""
    while (wrapped := getattr(function, "__wrapped__", None)) is not None:
        function = wrapped
    return getattr(function, "__code__", None)


def digest(function: Any) -> str:
    """A text that differs if the code of a function differs, or of what it wraps or encloses. It is the same in
    another process, wherever the file lies, with the same version of Python."""
    told = hashlib.sha256()
    seen: set[int] = set()

    def tell(value: Any) -> None:
        if id(value) in seen:
            return
        if isinstance(value, CodeType):
            told.update(f"{value.co_code!r} {value.co_names} {value.co_varnames} {value.co_freevars}".encode())
            for constant in value.co_consts:
                tell(constant)
        elif isinstance(code := getattr(value, "__code__", None), CodeType):
            seen.add(id(value))
            named = tuple(sorted((value.__kwdefaults__ or {}).items()))
            for part in (code, value.__defaults__, named, getattr(value, "__wrapped__", None)):
                tell(part)
            for cell in value.__closure__ or ():
                try:
                    tell(cell.cell_contents)
                except ValueError:  # not filled yet
                    tell(None)
        elif isinstance(value, tuple | frozenset):
            for part in value if isinstance(value, tuple) else sorted(value, key=repr):
                tell(part)
        else:
            plain = isinstance(value, bool | int | float | str | bytes | type(None))
            told.update(repr(value).encode() if plain else type(value).__qualname__.encode())

    tell(function)
    return told.hexdigest()


def _called_like(own: Any, method: Any) -> Any:
    """The method with the signature of `own`. torch.fx reads the signature to make its inputs."""
    named = FunctionType(
        method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__
    )
    return functools.update_wrapper(named, own)


def _blank(form: type[Fused], own: type[nn.Module], names: Any, tried: str = "") -> nn.Module:
    made = fused_class(form, own, names, tried)
    return made.__new__(made)


class Call(nn.Module):
    """One method of a module, for functional_call, with `kind` as the class of the module. Its hooks are not
    called."""

    kind: type[nn.Module]
    method: Callable

    def __init__(self, module: nn.Module, kind: type[nn.Module], method: Callable) -> None:
        super().__init__()
        self.inner = module
        self.kind, self.method = kind, method

    def forward(self, x: Tensor) -> Any:
        module: Any = self.inner
        was = type(module)
        module.__class__ = self.kind
        try:
            return self.method(module, x)
        finally:
            module.__class__ = was


def agree(actual: Any, expected: Any, units: int) -> bool:
    """Whether two results are equal up to so many units of rounding, relative to the size of each row."""
    if not isinstance(expected, Tensor) or expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    size = expected.abs().amax(-1, keepdim=True)
    return bool(((actual - expected).abs() <= units * torch.finfo(expected.dtype).eps * size).all())
