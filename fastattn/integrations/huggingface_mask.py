"""The masks of attn_implementation="fastattn": a few numbers, the padding and the packed sequences of each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from fastattn import masks
from fastattn.masks.algebra import smaller


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys each query sees, without a tensor of queries x keys. `dense` makes that tensor.

    As in transformers' masks for scaled_dot_product_attention, True is seen. Indexed, repeated, or joined by
    torch.cat to other masks of this kind, it gives the bool tensor. Any other use as a tensor is an error: a model
    whose own code computes with its mask expects the mask of eager attention, which is added to the scores.

    Attributes:
        shape: (batch, 1, queries, keys).
        offset: the key at which query 0 stands.
        causal: a query sees keys up to its own.
        window: how many keys before and after its own it sees; None is all.
        padding: (batch, keys), True is seen; or None.
        key_lengths: (batch,) int32, keys from there on are hidden; or None.
        hidden_first: how many keys the padding hides at the beginning of each row, if it hides no others that a
            query could see; or None.
        documents: (batch, keys) on the CPU, the number of the packed sequence that each token is from: a query
            sees keys of its own sequence; or None. With documents there are as many queries as keys.
        lowered: with documents, the mask without the padding, lowered once for all layers.
        device: the device of the tensor that `dense` makes.
    """

    shape: torch.Size
    device: torch.device
    offset: int = 0
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    padding: Tensor | None = None
    key_lengths: Tensor | None = None
    documents: Tensor | None = None
    lowered: masks.Lowered | None = None
    hidden_first: tuple[int, ...] | None = None

    dtype = torch.bool
    ndim = 4

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> Mask:
        """The same on another device."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, torch.bool):
            raise TypeError(f"to({dtype}): {_NO_TENSOR}")
        moved = {
            name: t.to(device) for name in ("padding", "key_lengths") if (t := getattr(self, name)) is not None
        }
        lowered = None if self.lowered is None else self.lowered.to(device or self.device)
        return replace(self, device=device or self.device, lowered=lowered, **moved)

    @property
    def end(self) -> int:
        """The key from which on no query sees any."""
        return min(self.offset + self.shape[2], self.shape[3]) if self.causal else self.shape[3]

    @property
    def span(self) -> tuple[int, int]:
        """From which key to before which one a single query may see some, but for the padding."""
        left, right = self.window
        right = 0 if self.causal else right
        end = self.shape[3] if right is None else min(self.offset + right + 1, self.shape[3])
        return 0 if left is None else min(max(0, self.offset - left), end), end

    @property
    def bias(self) -> Tensor | None:
        """The padding as `fastattn.attention`'s bias."""
        return None if self.padding is None else self.padding[:, None, None]

    @property
    def is_of_places(self) -> bool:
        """Whether the mask depends only on the distance of the key from the query."""
        return self.padding is None and self.key_lengths is None and self.documents is None

    def options(self, heads: int) -> dict[str, Any]:
        """The mask without the padding, as arguments of `fastattn.attention`."""
        if self.documents is not None:
            return {"mask": self.of_heads(heads)}
        beside = {} if self.key_lengths is None else {"key_lengths": self.key_lengths}
        return {"causal": self.causal, "window": self.window, **beside}

    def of_heads(self, heads: int) -> masks.Lowered:
        """A mask with documents, without the padding, lowered for this many heads."""
        if self.lowered is not None and self.lowered.shape.heads == heads:
            return self.lowered
        assert self.documents is not None
        left, right = self.window
        mask = masks.documents(self.documents) & masks.window(left, 0 if self.causal else right)
        if self.key_lengths is not None:
            mask = mask & masks.key_lengths(self.key_lengths)
        batch, _, queries, keys = self.shape
        return mask.lower(batch, heads, queries, keys, self.device)

    def dense(self) -> Tensor:
        """The bool tensor (batch, 1, queries, keys)."""
        batch, _, queries, keys = self.shape
        key = torch.arange(keys, device=self.device)
        distance = key - torch.arange(queries, device=self.device)[:, None] - self.offset
        seen = torch.ones_like(distance, dtype=torch.bool)
        left, right = self.window
        right = 0 if self.causal else right
        if left is not None:
            seen &= distance >= -left
        if right is not None:
            seen &= distance <= right
        seen = seen.expand(batch, 1, queries, keys)
        if self.padding is not None:
            seen = seen & self.padding[:, None, None]
        if self.key_lengths is not None:
            seen = seen & (key < self.key_lengths[:, None])[:, None, None]
        if self.documents is not None:
            documents = self.documents.to(self.device)
            seen = seen & (documents[:, :, None] == documents[:, None])[:, None]
        return seen

    def contiguous(self) -> Mask:
        return self

    clone = detach = contiguous

    def first_keys(self, keys: int) -> Mask | Tensor:
        """The mask for the first keys only."""
        if self.documents is not None:
            return self.dense()[..., :keys]
        padding = None if self.padding is None else self.padding[:, :keys]
        return replace(self, shape=torch.Size((*self.shape[:3], keys)), padding=padding)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def repeat(self, *sizes: Any) -> Tensor:
        return self.dense().repeat(*sizes)

    def __getattr__(self, name: str) -> Any:
        # Python and torch ask with hasattr, too: an AttributeError answers them.
        raise AttributeError(f"{name}: {_NO_TENSOR}" if hasattr(Tensor, name) else name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.where and isinstance(args[0], cls):
            # As a condition it can only be meant as the bool tensor.
            return function(args[0].dense(), *args[1:], **(kwargs or {}))
        if function is torch.cat and all(isinstance(t, cls) or t.dtype == torch.bool for t in args[0]):
            # The keys of two sequences, side by side (T5Gemma 2).
            parts = [t.dense() if isinstance(t, cls) else t for t in args[0]]
            return function(parts, *args[1:], **(kwargs or {}))
        raise TypeError(f"{getattr(function, '__name__', function)}: {_NO_TENSOR}")


_NO_TENSOR = (
    'the attention mask of attn_implementation="fastattn" is no tensor to compute with. Eager\'s mask is added to '
    "the scores, but this one says which keys are seen: code that adds it would be silently wrong. Use "
    'attn_implementation="eager" for this model, or mask.dense() for the bool tensor (True is seen)'
)


def _refusing(operator: str) -> Callable:
    def refuse(self: Mask, *_: Any) -> NoReturn:
        raise TypeError(f"{operator}: {_NO_TENSOR}")

    return refuse


_OPERATORS = (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift",
    "rshift", "radd", "rsub", "rmul", "rmatmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rand", "ror",
    "rxor", "iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor", "neg", "pos", "abs", "invert", "eq",
    "ne", "lt", "le", "gt", "ge", "bool", "float", "int", "index", "len", "iter", "contains", "array",
    "setitem",
)  # fmt: skip
for _operator in _OPERATORS:
    setattr(Mask, f"__{_operator}__", _refusing(_operator))
Mask.__hash__ = object.__hash__  # type: ignore[method-assign]


def fastattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Mask | Tensor:
    """A `Mask` if the pattern is causal, a window or all keys, with or without padding, in rows of one or of
    several sequences; else the bool tensor.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device: as
            transformers calls its mask functions (masking_utils.sdpa_mask); attention_mask is the padding
            (batch, keys seen so far), True or 1 is seen.
    """
    if isinstance(attention_mask, Mask):
        # It was made before: generate makes it once for all layers.
        return attention_mask
    compiling = torch.compiler.is_compiling()
    pattern = declared_pattern(mask_function, **kwargs) if compiling else known_pattern(mask_function)
    # The offset of a static cache is a tensor. Reading it would break a graph, and a GPU would wait for it. For
    # one query the bool tensor is small.
    unread = isinstance(q_offset, Tensor) and (compiling or (q_length == 1 and q_offset.device.type != "cpu"))
    if pattern is not None and not unread:
        documents = None if pattern.documents is None else pattern.documents.cpu()
        mask = Mask(
            torch.Size((batch_size, 1, q_length, kv_length)), torch.device(device), int(q_offset) - kv_offset,
            pattern.causal, pattern.window, documents=documents,
        )  # fmt: skip
        if attention_mask is not None:
            mask = replace(mask, **_padding(attention_mask, mask, kv_offset))
        if _is_servable(mask) and _has_its_places(pattern):
            return mask if documents is None else replace(mask, lowered=mask.of_heads(_heads(kwargs)))
    offset: Any = q_offset
    dense = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, offset, kv_offset, mask_function, attention_mask,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, device=device,
        use_vmap=kwargs.get("use_vmap", False),
    )  # fmt: skip
    assert dense is not None, "no skip was allowed"
    return dense


def _heads(options: dict[str, Any]) -> int:
    """The number of query heads in the configuration, else 1. Layers with another number lower the mask again."""
    return getattr(options.get("config"), "num_attention_heads", None) or 1


def _is_servable(mask: Mask) -> bool:
    """Whether `fastattn.attention` can align the mask so: there the last query stands at the last key."""
    _, _, queries, keys = mask.shape
    if mask.documents is not None:
        return mask.offset == 0 and queries == keys and mask.documents.shape == (mask.shape[0], keys)
    if not mask.causal and mask.window == (None, None):
        return True
    beyond = keys - queries - mask.offset
    # Keys after the last query (of a static cache, not yet written) are cut off if no query sees them.
    return beyond == 0 or (mask.causal and beyond > 0)


class Pattern(NamedTuple):
    """What a mask function of transformers shows, without the padding.

    causal, window: as `Mask`'s.
    documents: (batch, tokens), which of the sequences in a row each token is from; or None.
    positions: (batch, tokens), which causal and window compare; None for the token's index in the row.
    """

    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    documents: Tensor | None = None
    positions: Tensor | None = None


def _has_its_places(pattern: Pattern) -> bool:
    """Whether tokens of one sequence are as far apart in the row as their positions say.

    That holds where transformers itself finds the sequences by their positions, but not for every mask function.
    """
    if pattern.positions is None:
        return True
    if pattern.documents is None or pattern.documents.shape != pattern.positions.shape:
        return False
    step = pattern.documents.diff(dim=-1)
    return bool(((step > 0) | ((step == 0) & (pattern.positions.diff(dim=-1) == 1))).all())


def _inside(function: Callable) -> dict[str, Any]:
    """The variables in the closure of a mask function, by name."""
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


# transformers' mask functions with a parameter are closures, and are recognised by their code.
_AND = masking_utils.and_masks().__code__
_LEFT = masking_utils.sliding_window_overlay(1).__code__
_BOTH = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_PACKED = masking_utils.packed_sequence_mask_function(torch.empty(0)).__code__
_BY_POSITION = masking_utils.remap_positions_for_packed_sequence(_inside, torch.empty(0)).__code__


def known_pattern(function: Callable) -> Pattern | None:
    """What one of transformers' mask functions shows; None for all other functions."""
    if function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Pattern()
    code = getattr(function, "__code__", None)
    if code is _LEFT:
        # transformers' window includes the query's own key.
        return Pattern(window=(_inside(function)["sliding_window"] - 1, None))
    if code is _BOTH:
        size = _inside(function)["sliding_window"]
        return Pattern(window=(size, size))
    if code is _PACKED:
        return Pattern(documents=_inside(function)["packed_sequence_mask"])
    if code is _BY_POSITION:
        held = _inside(function)
        inner = known_pattern(held["mask_function"])
        simple = inner is not None and inner.documents is None and inner.positions is None
        return inner._replace(positions=held["position_ids"]) if inner is not None and simple else None
    if code is _AND:
        together: Pattern | None = Pattern()
        for part in _inside(function)["mask_functions"]:
            together = _both(together, known_pattern(part))
        return together
    return None


def declared_pattern(
    function: Callable,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Pattern | None:
    """As `known_pattern`, from the other arguments of a mask call: torch.compile cannot look into closures.

    transformers allows its skips if the mask depends on nothing but local_size (a window, or the size of chunks).
    """
    if function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        return known_pattern(function)
    if use_vmap or local_size is None or local_size == getattr(config, "attention_chunk_size", None):
        return None
    if allow_is_causal_skip:
        return Pattern(causal=True, window=(local_size - 1, None))
    return Pattern(window=(local_size, local_size)) if allow_is_bidirectional_skip else None


def _both(first: Pattern | None, second: Pattern | None) -> Pattern | None:
    """The pattern of keys that both show; None if it is no pattern."""
    if first is None or second is None:
        return None
    tensors = []
    for one, other in ((first.documents, second.documents), (first.positions, second.positions)):
        if one is not None and other is not None and one is not other:
            return None
        tensors.append(other if one is None else one)
    left, right = (smaller(a, b) for a, b in zip(first.window, second.window, strict=True))
    return Pattern(first.causal or second.causal, (left, right), *tensors)


def _padding(attention_mask: Tensor, mask: Mask, kv_offset: int) -> dict[str, Any]:
    """The fields of the mask for a padding (batch, keys seen so far): none of them where it hides nothing.

    Its values are read once in a forward, as transformers does for scaled_dot_product_attention, but not while
    compiling. So a batch without padding needs no mask, and padding on the right lets whole tiles be skipped.
    """
    queries, keys = mask.shape[2:]
    # The keys of a static cache that are not written yet.
    unwritten = max(0, kv_offset + keys - attention_mask.shape[-1])
    padding = F.pad(attention_mask.bool(), (0, unwritten))[:, kv_offset : kv_offset + keys]
    if torch.compiler.is_compiling():
        return {"padding": padding}
    seen = padding[:, : mask.end]
    key = torch.arange(keys, device=padding.device)
    lengths = padding.sum(-1, dtype=torch.int32)
    on_the_right = padding == (key < lengths[:, None])
    none, only_right = torch.stack((seen.all(), on_the_right.all())).tolist()
    if none:
        return {}
    if only_right:
        return {"key_lengths": lengths}
    if queries == 1 and padding.device.type == "cpu":
        hidden = mask.end - seen.sum(-1)
        if bool((seen == (key[: mask.end] >= hidden[:, None])).all()):
            return {"padding": padding, "hidden_first": tuple(hidden.tolist())}
    return {"padding": padding}


def added(mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """A mask and a bias as one bias."""
    if mask is None or position_bias is None:
        return position_bias if mask is None else mask
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask
