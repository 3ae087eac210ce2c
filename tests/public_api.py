"""The public names of fastattn and their signatures, one a line: what users may rely on.

`python tests/public_api.py` writes them to tests/public_api.txt. Commit the file with a change that adds to it or
breaks it, so that the change is seen in review.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = (
    "fastattn",
    "fastattn.masks",
    "fastattn.nn",
    "fastattn.lens",
    "fastattn.flash_attn",
    "fastattn.kv_cache",
    "fastattn.integrations.huggingface",
    "fastattn.distributed",
)
LISTED = Path(__file__).with_name("public_api.txt")


def lines() -> list[str]:
    """A line for every public name of every public module."""
    return [line for module in MODULES for line in _of_module(module)]


def _of_module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    for short in sorted(getattr(module, "__all__", None) or _defined_in(module)):
        thing = getattr(module, short)
        if inspect.isclass(thing):
            yield f"{name}.{short}{_signature(thing)}"
            yield from _of_class(f"{name}.{short}", thing)
        elif inspect.isfunction(thing):
            yield f"{name}.{short}{_signature(thing)}"
        elif inspect.ismodule(thing):
            yield f"{name}.{short}"
        else:
            yield f"{name}.{short}: {type(thing).__name__}"


def _defined_in(module: Any) -> list[str]:
    """The public functions and classes that a module without __all__ defines itself."""
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    ]


def _of_class(name: str, kind: type) -> Iterator[str]:
    """Its public methods and properties, those of fastattn's own classes it derives from among them."""
    members: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("fastattn"):
            members |= vars(base)
    for short, member in sorted(members.items()):
        if short.startswith("_") and short != "__call__":
            continue
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if inspect.isfunction(member):
            yield f"{name}.{short}{_signature(member)}"
        elif isinstance(member, property):
            yield f"{name}.{short}: property"


def _signature(thing: Any) -> str:
    """Names, kinds and defaults of its parameters; how annotations print depends on Python's version."""
    try:
        signature = inspect.signature(thing)
    except ValueError:  # A class without a constructor of its own.
        return "(...)"
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    # A function as a default prints its address, which is another one in each process.
    return re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", text)


if __name__ == "__main__":
    LISTED.write_text("\n".join(lines()) + "\n")
