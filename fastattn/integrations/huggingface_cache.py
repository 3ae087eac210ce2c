"""A cache for transformers' generation that does not copy all keys and values at every step."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, DynamicLayer

from fastattn.integrations.huggingface_models import NAME

LEAST_ROOM = 256


class GrowingCache(DynamicCache):
    """transformers' DynamicCache, with room behind the keys and values of each layer.

    A DynamicCache joins old and new keys by torch.cat, so each token costs a copy of all before it: more than
    attention reads. Here new ones are written behind the old ones; room that is used up grows by a quarter. Layers
    of other kinds (with a window, of linear attention) are as in a DynamicCache.

        model.generate(**inputs, past_key_values=GrowingCache(config=model.config))

    On a CPU `generate` makes its own DynamicCache such a one where the model has attn_implementation="fastattn".
    On a GPU the room could be memory that the model needs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        give_room(self)


def give_room(cache: DynamicCache) -> None:
    """Turn the plain layers of a cache into growing ones."""
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer


class GrowingLayer(DynamicLayer):
    """One layer. `keys` and `values` are the beginnings of larger tensors."""

    rooms: tuple[Room, Room] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if _needs_new_tensors(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        keys, values = self.rooms or (None, None)
        keys = _with_room(keys, self.keys, key_states)
        values = _with_room(values, self.values, value_states)
        self.rooms = (keys, values)
        self.keys, self.values = keys.append(key_states), values.append(value_states)
        return self.keys, self.values


class Room:
    """A tensor (B, H, capacity, D), of which the first `end` tokens are written.

    Tokens are only written behind `end`, so what a view of it shows never changes: a copy of the layer, or one
    that was cropped, takes a new room.
    """

    def __init__(self, old: Tensor, new: Tensor) -> None:
        batch, heads, added, width = new.shape
        self.end = old.shape[-2] if old.dim() == 4 else 0
        capacity = self.end + added + max(LEAST_ROOM, (self.end + added) // 4)
        self.tensor = new.new_empty(batch, heads, capacity, width)
        if self.end:
            self.tensor[:, :, : self.end] = old

    def takes(self, old: Tensor, new: Tensor) -> bool:
        """Whether `old` is all that is written here, and `new` fits behind it."""
        batch, heads, capacity, width = self.tensor.shape
        return (
            old.data_ptr() == self.tensor.data_ptr()
            and old.stride() == self.tensor.stride()
            and old.shape == (batch, heads, self.end, width)
            and new.shape == (batch, heads, new.shape[2], width)
            and self.end + new.shape[2] <= capacity
            and new.dtype == self.tensor.dtype
            and (torch.is_inference_mode_enabled() or not self.tensor.is_inference())
        )

    def append(self, new: Tensor) -> Tensor:
        """All that is written, with these tokens behind."""
        start, self.end = self.end, self.end + new.shape[2]
        self.tensor[:, :, start : self.end] = new
        return self.tensor[:, :, : self.end]


def _with_room(room: Room | None, old: Tensor, new: Tensor) -> Room:
    """A room that holds `old` and takes `new`: this one if it does."""
    return room if room is not None and room.takes(old, new) else Room(old, new)


def _needs_new_tensors(*new: Tensor) -> bool:
    """Whether autograd or a compiler follows the tensors, which must then not be written to."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in new))


_prepare = GenerationMixin._prepare_cache_for_generation


@functools.wraps(_prepare)
def _prepare_with_room(self: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' method, which makes the cache of a call of generate; ours is given room."""
    given = model_kwargs.get("past_key_values")
    result = _prepare(self, generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get("past_key_values")
    ours = self.config._attn_implementation == NAME and self.device.type == "cpu"
    if ours and cache is not given and type(cache) is DynamicCache and not cache.offloading:
        give_room(cache)
    return result


GenerationMixin._prepare_cache_for_generation = _prepare_with_room  # type: ignore[method-assign]
