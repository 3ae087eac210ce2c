"""The keys and values of the tokens that a decoder has read, so that it need not read them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.core import spread
from fastattn.core.cache.functional import attention_with_cache
from fastattn.core.cache.spec import LARGEST
from fastattn.ground import arguments
from fastattn.ground.checks import Window
from fastattn.nn.rotary import Rotary


class DecodingCache:
    """Keys and values of all layers of a model, for rows of different lengths.

    Lengths are on the device, so that a step of the model reads nothing from it. `fastattn.kv_cache` has caches
    for schedulers of requests, which keep lengths on the host. Both call `fastattn.attention_with_cache`.

    Args:
        batch: rows.
        capacity: how many tokens a row may have.
        num_layers: of the model.
        device: of the tokens.
        dtype: torch.int8 or torch.float8_e4m3fn quantise keys and values, each token of a head with a scale of its
            own, see `fastattn.attention_with_cache`. None keeps them as they are.

    Attributes:
        lengths: (B,) int32, how many tokens each row holds.
        layers: a `LayerCache` for each layer.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        num_layers: int,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
    ) -> None:
        batch = arguments.integer("batch", batch, least=0)
        num_layers = arguments.integer("num_layers", num_layers, least=0)
        self.capacity = arguments.integer("capacity", capacity, least=0)
        device = arguments.device("device", device)
        self.dtype = quantised_dtype("dtype", dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.layers = [LayerCache(self) for _ in range(num_layers)]
        self._rotations: dict[tuple, tuple[Tensor, Tensor]] = {}

    def positions(self, tokens: Tensor) -> Tensor:
        """The positions (B, L) of new tokens."""
        return self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)

    def counts(self, tokens: Tensor, key_lengths: Tensor | Sequence[int] | None = None, **seen: Any) -> Tensor:
        """How many of the new tokens (B, L) of each row are none of the padding, (B,) int32."""
        for name, value in seen.items():
            raise ValueError(f"{name} must be None with a cache, got {value!r}")
        if tokens.shape[0] != len(self.lengths):
            raise ValueError(f"tokens must have the cache's {len(self.lengths)} rows, got {tuple(tokens.shape)}")
        return row_lengths(tokens, key_lengths).to(torch.int32)

    def rotation(self, rotary: Rotary, heads: Tensor) -> dict[str, Any]:
        """The rotation of new queries or keys as `prepare_heads` takes it. Layers share the tables."""
        key = (rotary.width, rotary.base, heads.device, heads.dtype)
        if key not in self._rotations:
            self._rotations[key] = rotary.tables(heads, length=self.capacity)
        cos, sin = self._rotations[key]
        return {"cos": cos, "sin": sin, "offsets": self.lengths.to(heads.device)}


class LayerCache:
    """Keys and values of one layer, (B, heads, capacity, width). The first call decides on heads, width, dtype."""

    def __init__(self, cache: DecodingCache) -> None:
        self.cache = cache
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None

    def rotation(self, rotary: Rotary, heads: Tensor) -> dict[str, Any]:
        return self.cache.rotation(rotary, heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: Window, backend: str | None) -> Tensor:
        """Add k and v, and attend from q to all keys up to its own position."""
        spread.refuse("a cache")
        keys, values = self.keys, self.values
        if keys is None or values is None:
            keys, values = self._make(k, v)
        return attention_with_cache(
            q, keys, values, k=k, v=v, cache_lengths=self.cache.lengths.to(q.device), window=window,
            k_scale=self.k_scale, v_scale=self.v_scale, backend=backend,
        )  # fmt: skip

    def _make(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values. Not filled: what lies behind a row's length is never read."""
        dtype, capacity = self.cache.dtype, self.cache.capacity
        keys, values = (
            t.new_empty((t.shape[0], t.shape[1], capacity, t.shape[3]), dtype=dtype or t.dtype) for t in (k, v)
        )
        self.keys, self.values = keys, values
        if dtype is not None:
            shape = k.shape[0], k.shape[1], capacity
            self.k_scale, self.v_scale = (k.new_empty(shape, dtype=torch.float32) for _ in "kv")
        return keys, values


def quantised_dtype(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """The argument, checked: the dtype of a quantised cache, or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in LARGEST):
        raise TypeError(f"{name} must be torch.int8, torch.float8_e4m3fn or None, got {dtype!r}")
    return dtype


def row_lengths(tokens: Tensor, key_lengths: Tensor | Sequence[int] | None) -> Tensor:
    """The length of each row of tokens (B, L) without its padding, (B,) int64, from 1 to L."""
    batch, longest = tokens.shape
    if key_lengths is None:
        return torch.full((batch,), longest, device=tokens.device)
    lengths = arguments.integers("key_lengths", key_lengths, on=tokens.device)
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"key_lengths must be {batch} integers, one for each row of tokens; got shape {tuple(lengths.shape)}, "
            f"{lengths.dtype}"
        )
    lengths = lengths.to(tokens.device, torch.int64)
    if batch and (int(lengths.min()) < 1 or int(lengths.max()) > longest):
        raise ValueError(f"key_lengths must be from 1 to tokens' length {longest}, got {lengths.tolist()}")
    return lengths
