"""Checks of arguments. Each error names the argument, its value and what was expected.

A number may be Python's, NumPy's or a tensor without dimensions. A bool is not a number, nor a number a bool.
"""

from __future__ import annotations

import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def integer(name: str, value: Any, *, least: int | None = None, what: str = "an integer") -> int:
    """The argument as an int, at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        plain = _plain(name, value, what)
        if not isinstance(plain, int | torch.SymInt) or isinstance(plain, bool):
            raise TypeError(f"{name} must be {what}, got {_kind(value)}")
        value = plain
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def number(name: str, value: Any, *, what: str = "a number") -> float:
    """The argument as a real number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        plain = _plain(name, value, what)
        if not isinstance(plain, numbers.Real | torch.SymInt | torch.SymFloat) or isinstance(plain, bool):
            raise TypeError(f"{name} must be {what}, got {_kind(value)}")
        value = plain if isinstance(plain, torch.SymInt | torch.SymFloat) else float(plain)
    if value != value:
        raise ValueError(f"{name} must be {what}, got NaN")
    return value


def flag(name: str, value: Any, *, what: str = "a bool") -> bool:
    """The argument as a bool."""
    if isinstance(value, bool):
        return value
    plain = _plain(name, value, what)
    if not isinstance(plain, bool):
        raise TypeError(f"{name} must be {what}, got {_kind(value)}")
    return plain


def choice(name: str, value: Any, choices: Sequence[str], *, or_none: bool = False) -> None:
    """Raise unless the argument is one of these words."""
    if value is None and or_none:
        return
    expected = f"{name} must be one of {', '.join(choices)}{' or None' if or_none else ''}"
    if not isinstance(value, str):
        raise TypeError(f"{expected}, got {_kind(value)}")
    if value not in choices:
        raise ValueError(f"{expected}, got {value!r}")


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """The two elements of the argument: a tuple, a list, a tensor (2,) or an array (2,)."""
    if not isinstance(value, tuple | list) and getattr(value, "shape", None) == (2,):
        return value[0], value[1]
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a pair (left, right), got {_kind(value)}")
    if len(value) != 2:
        raise TypeError(f"{name} must be a pair (left, right), got {value!r}")
    return value[0], value[1]


def tensor(name: str, value: Any, *, or_none: bool = False) -> None:
    """Raise unless the argument is a dense tensor: not sparse, not nested, of no other layout."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor{' or None' if or_none else ''}, got {_kind(value)}")
    if value.layout != torch.strided or value.is_nested:
        _refuse_layout(name, value)
    if type(value).__name__ == "MaskedTensor":
        raise TypeError(f"{name} must be a plain tensor, got a MaskedTensor; hide keys with mask= or bias=")


def device(name: str, value: Any) -> torch.device:
    """The argument, a device, its name or its number, as a device."""
    if not isinstance(value, torch.device | str | int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a torch.device or its name, got {_kind(value)}")
    try:
        return torch.device(value)
    except RuntimeError as problem:
        raise ValueError(f"{name} must be a torch.device or its name, got {value!r}") from problem


def floating_dtype(name: str, value: Any) -> torch.dtype:
    """The argument as a floating dtype."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, got {_kind(value)}")
    if not value.is_floating_point:
        raise ValueError(f"{name} must be a floating dtype, got {value}")
    return value


def integers(name: str, values: Any, *, on: torch.device | None = None) -> Tensor:
    """The argument, a tensor, an array of integers or a sequence of integers, as a tensor."""
    if isinstance(values, Tensor):
        tensor(name, values)
        return values
    if hasattr(values, "__array_interface__"):  # numpy's, which need not be installed
        values = torch.as_tensor(values, device="cpu")
        if values.dtype in (torch.uint8, torch.int8, torch.int16):
            values = values.to(torch.int64)
        return values if on is None else values.to(on)
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | dict):
        raise TypeError(f"{name} must be a tensor or a sequence of integers, got {_kind(values)}")
    what = "a tensor or a sequence of integers"
    return torch.tensor([integer(name, v, what=what) for v in values], dtype=torch.int64, device=on or "cpu")


# What other libraries call the arguments of `attention`.
_ELSEWHERE = {
    "attn_mask": "bias= (a bool tensor, True is seen, or a float tensor that is added) or mask= (fastattn.masks)",
    "attn_bias": "bias= (a tensor) or mask= (fastattn.masks)",
    "attention_mask": "bias= (a tensor), key_lengths= (padding) or mask= (fastattn.masks)",
    "key_padding_mask": "key_lengths= (right padding) or bias= (a bool tensor, True is seen)",
    "block_mask": "mask= (fastattn.masks)",
    "mask_mod": "mask= (fastattn.masks.from_function)",
    "score_mod": "bias=, relative_bias=, alibi_slopes= or softcap=",
    "is_causal": "causal=",
    "dropout": "dropout_p=",
    "p": "dropout_p=",
    "softmax_scale": "scale=",
    "scaling": "scale=",
    "sm_scale": "scale=",
    "window_size": "window=",
    "sliding_window": "window=",
    "local_window_size": "window=",
    "logits_soft_cap": "softcap=",
    "attn_logits_soft_cap": "softcap=",
    "soft_cap": "softcap=",
    "return_attn_probs": "return_lse= (weights are never computed)",
    "need_weights": "return_lse= (weights are never computed)",
    "s_aux": "sinks=",
    "seqlens_k": "key_lengths=",
    "cache_seqlens": "key_lengths=",
    "k_descale": "k_scale=",
    "v_descale": "v_scale=",
    "query": "q",
    "key": "k",
    "value": "v",
}


def refuse_keywords(
    function: str, unknown: Iterable[str], served: str = "", takes: Callable | None = None
) -> NoReturn:
    """Raise TypeError for a keyword that a function does not have, with our name for it if there is one.

    served: text at the end of the message.
    takes: the function, where it lacks some of the arguments of `fastattn.attention`: names that it does not have
        are no help.
    """
    name = next(iter(unknown))
    if name == "enable_gqa":
        raise TypeError(f"{function}() takes no enable_gqa: k and v with fewer heads than q are always grouped")
    ours = _ELSEWHERE.get(name)
    if ours is not None and takes is not None:
        ours = ours if set(re.findall(r"(\w+)=", ours)) <= set(inspect.signature(takes).parameters) else None
    hint = "" if ours is None else f"; it is called {ours} here"
    raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}{served}")


def in_other_words(message: str, names: Mapping[str, str]) -> str:
    """A message with the names that the arguments have in the function that was called."""
    return re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], message)


def _plain(name: str, value: Any, what: str) -> Any:
    """NumPy's numbers and tensors without dimensions as Python's numbers; anything else as it is."""
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return value
    if not isinstance(value, Tensor):
        return value.item()
    tangent = forward_ad.unpack_dual(value).tangent
    if value.requires_grad or tangent is not None or torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise TypeError(
            f"{name} must be {what}: a tensor is read as a number, so it cannot have a gradient or be in a "
            "torch.func transform; detach it"
        )
    try:
        return value.item()
    except (RuntimeError, NotImplementedError) as problem:
        if torch.compiler.is_compiling():
            raise
        raise TypeError(
            f"{name} must be {what}, got a tensor whose value cannot be read ({value.device})"
        ) from problem


def _refuse_layout(name: str, value: Tensor) -> NoReturn:
    if value.is_nested:
        raise TypeError(
            f"{name} must be a plain tensor, got a nested one (layout {value.layout}); sequences of different "
            "lengths are computed by fastattn.attention_varlen, packed one after another"
        )
    raise TypeError(f"{name} must be a dense tensor (torch.strided), got one of layout {value.layout}")


def _kind(value: Any) -> str:
    """The name of the type, with shape and dtype if it is a tensor."""
    kind = type(value).__name__
    if isinstance(value, Tensor) and not value.is_nested:
        return f"a {kind} of shape {tuple(value.shape)}, {value.dtype}"
    return kind
