"""A stand-in for hypothesis where it is not installed: its tests are skipped, all others of their files run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SKIPPED = "hypothesis is not installed"


class _Anything:
    """A strategy, or a function that makes one: whatever is done with it gives one again."""

    def __call__(self, *arguments: Any, **keywords: Any) -> _Anything:
        return self

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __or__(self, other: Any) -> _Anything:
        return self


class _Settings:
    """`settings`: a decorator that changes nothing, and profiles that are not kept."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __call__(self, test: Callable) -> Callable:
        return test

    register_profile = load_profile = staticmethod(lambda *arguments, **keywords: None)


def _given(*strategies: Any, **named: Any) -> Callable[[Callable], Callable]:
    """A test that skips itself, with the parameters that are not drawn, so that pytest.mark.parametrize fits."""
    import functools
    import inspect

    import pytest

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def skipped(*arguments: Any, **keywords: Any) -> None:
            pytest.skip(SKIPPED)

        parameters = list(inspect.signature(test).parameters.values())
        kept = [p for p in parameters[: len(parameters) - len(strategies)] if p.name not in named]
        skipped.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
        return skipped

    return decorate


def stand_in() -> None:
    """Make `import hypothesis` work where it is not installed."""
    if "hypothesis" in sys.modules or importlib.util.find_spec("hypothesis") is not None:
        return
    module, strategies = ModuleType("hypothesis"), ModuleType("hypothesis.strategies")
    anything = _Anything()
    for name in ("assume", "example", "note", "event", "target"):
        setattr(module, name, lambda *arguments, **keywords: lambda test: test)
    module.__dict__.update(given=_given, settings=_Settings, strategies=strategies)
    for each in (module, strategies):
        each.__getattr__ = anything.__getattr__  # type: ignore[method-assign]
        each.__spec__ = ModuleSpec(each.__name__, None)
    sys.modules |= {"hypothesis": module, "hypothesis.strategies": strategies}
