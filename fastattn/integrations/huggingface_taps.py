"""What flows into the attention of a Hugging Face model, read or replaced on its way.

transformers looks up its attention functions by name, "sdpa" or "fastattn", and hands each the module that calls.
While something is tapped, the functions in its table are wrapped; without taps it is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastattn.integrations.huggingface import NAME

NAMES = ("sdpa", NAME)


class Tap(Protocol):
    """What is done with a call: `change` gives the q, k, v to go on with; `call` sees what attention is asked, and
    returns the context in which it is computed."""

    def change(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]: ...

    def call(self, module: nn.Module, *arguments: Any, **options: Any) -> AbstractContextManager[Any]: ...


_TAPS: dict[int, Tap] = {}


def check_tappable(module: Any) -> None:
    """Raise ValueError if the attention of this module does not go through transformers' table."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name is None:
        raise ValueError(
            f"queries, keys and values of a {type(module).__name__} cannot be seen: it is none of transformers' "
            "modules, and its fastattn.lens.Family names no hooks"
        )
    if name not in NAMES:
        raise ValueError(
            f"the model must have attn_implementation {' or '.join(map(repr, NAMES))} for its queries, keys, "
            f"values and weights to be seen, got {name!r}: call model.set_attn_implementation({NAME!r})"
        )


def tap(module: nn.Module, tap: Tap) -> None:
    """Let `tap` see, and change, the calls of this module.

    Raises:
        ValueError: its attention does not go through transformers' table.
    """
    check_tappable(module)
    if not _TAPS:
        for name in NAMES:
            ALL_ATTENTION_FUNCTIONS[name] = _tapped(ALL_ATTENTION_FUNCTIONS[name])
    _TAPS[id(module)] = tap


def untap(module: nn.Module) -> None:
    """Take back what `tap` did."""
    _TAPS.pop(id(module), None)
    if not _TAPS:
        for name in NAMES:
            wrapper = ALL_ATTENTION_FUNCTIONS[name]
            del ALL_ATTENTION_FUNCTIONS[name]
            # Somebody had put one in this table alone.
            if ALL_ATTENTION_FUNCTIONS.get(name) is not wrapper.original:
                ALL_ATTENTION_FUNCTIONS[name] = wrapper.original


def _tapped(original: Callable) -> Any:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
    ) -> Any:
        tap = _TAPS.get(id(module))
        if tap is None:
            return original(module, query, key, value, *arguments, **options)
        query, key, value = tap.change(query, key, value)
        with tap.call(module, query, key, value, *arguments, **options):
            return original(module, query, key, value, *arguments, **options)

    attend.original = original  # type: ignore[attr-defined]
    return attend
