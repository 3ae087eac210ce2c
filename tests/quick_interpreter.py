"""Triton's interpreter without its idle work: a third of the time, and the same results.

- It replaces the functions of triton.language by its own when a kernel is launched, and then again in each call of
  a function of the kernel: some 2,000 times in a launch. Here it does so once in a launch.
- It computes for each sum and product of integers whether it overflows, and then does not look at the result.
- It looks up which type of NumPy's each of its types is, again and again; here once for each.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from triton import language
from triton.runtime import interpreter

_LANGUAGES = (language, language.core)


def quicken() -> None:
    """For the rest of the process."""
    interpreter._patch_lang = _Replaced(interpreter._patch_lang)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)


def _by_name(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of a type of Triton's. Not all of them can be hashed; their names say what they are."""
    known: dict[str, Any] = {}

    def of(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = function(dtype)
        return known[dtype.name]

    return of


class _Replaced:
    """Triton's `_patch_lang`, which replaces the functions of those modules of triton.language that `fn` can see;
    here once in a launch. The outermost call, that of the launch, restores them."""

    def __init__(self, replace: Any) -> None:
        self.replace = replace
        self.seen = functools.cache(_languages_seen_by)
        self.done: set[Any] = set()

    def __call__(self, fn: Any) -> Any:
        outermost = not self.done
        if self.seen(fn) <= self.done:
            return None
        scope = self.replace(fn)
        self.done |= self.seen(fn)
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (self.done.clear(), restore())
        return scope


def _languages_seen_by(fn: Any) -> frozenset[Any]:
    return frozenset(value for value in fn.__globals__.values() if inspect.ismodule(value) and value in _LANGUAGES)
