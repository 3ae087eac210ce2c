"""Caches of keys and values for generation: `from fastattn.kv_cache import KVCache, PagedKVCache`.

    cache = PagedKVCache(pages=1000, page=16, heads=8, width=128, layers=32, dtype=torch.bfloat16, device="cuda")
    (prompt,) = cache.add()
    cache.extend([prompt], 20)                    # room for 20 tokens, in all layers
    for layer in range(32):
        out = cache.attention(q, [prompt], k=k, v=v, layer=layer)
    beams = [prompt, *cache.fork(prompt, 3)]      # they share all pages until one of them writes

Which pages a sequence has is kept on the host: no call reads a value from the device.

There is no plug-in for vLLM or SGLang. One would keep the engine's scheduler, block table and lengths, and in each
layer call `fastattn.attention_with_cache(q, k_cache, v_cache, k=k, v=v, cache_lengths=, block_table=)` where all
rows have as many new tokens, or `fastattn.attention_varlen(q, k_cache, v_cache, ..., block_table=, seqused_k=)`
for a packed batch. The second takes pages as these engines have them, (pages, page, heads, width); the first takes
their `.transpose(1, 2)`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.core.cache.functional import attention_with_cache
from fastattn.core.cache.spec import LARGEST
from fastattn.ground import arguments
from fastattn.ground.checks import FLOATING, check_same


class OutOfPages(RuntimeError):
    """A cache has fewer free pages than a call needs. The call changed nothing."""


class PagedKVCache:
    """Keys and values of sequences, in pages that sequences may share.

    A sequence is a number that `add` or `fork` gives. A page belongs to every sequence that lists it. Where a
    sequence grows into a page that others have, too, `extend` gives it a copy first (copy on write).

    Args:
        pages: how many pages there are in each layer.
        page: how many tokens a page holds.
        heads: of keys and values.
        width: of keys; `value_width` of values, by default the same.
        layers: each has its own keys and values; the pages of a sequence have the same numbers in all of them.
        capacity: the most tokens of one sequence; by default as many as all pages hold.
        dtype, device: of the caches. torch.int8 and torch.float8_e4m3fn quantise: a token of a head takes a byte a
            number and one float32 scale. `attention_with_cache` says how far that moves results.
        k_scale, v_scale: of quantised caches: a number or (heads,), positive. Then pages have these scales, and
            tokens none. Numbers beyond 127 scales in int8, or 448 in fp8, become that.

    keys[layer] is (pages, heads, page, width), values[layer] (pages, heads, page, value_width); k_scales[layer]
    and v_scales[layer] are (pages, heads, page), (pages, heads) or None.

    Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention (2023),
    sections 4.3 and 4.4.
    """

    def __init__(
        self,
        pages: int,
        page: int,
        heads: int,
        width: int,
        *,
        layers: int = 1,
        value_width: int | None = None,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | int = "cpu",
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
    ) -> None:
        sizes = {"pages": pages, "page": page, "heads": heads, "width": width, "layers": layers}
        sizes = {name: arguments.integer(name, size, least=1) for name, size in sizes.items()}
        value_width = sizes["width"] if value_width is None else value_width
        value_width = arguments.integer("value_width", value_width, least=1, what="an integer or None")
        most = sizes["pages"] * sizes["page"]
        capacity = most if capacity is None else capacity
        self.capacity = arguments.integer("capacity", capacity, least=1, what="an integer or None")
        self.page = sizes["page"]
        dtype, device = _stored_dtype(dtype), arguments.device("device", device)
        shape = sizes["pages"], sizes["heads"], self.page
        # Zeros, since what a cache holds behind a sequence must not be read, but may be looked at.
        self.keys, self.values = (
            [torch.zeros(*shape, w, dtype=dtype, device=device) for _ in range(sizes["layers"])]
            for w in (sizes["width"], value_width)
        )
        if (k_scale is None) != (v_scale is None):
            raise ValueError(
                f"k_scale and v_scale must come together, got {'k' if v_scale is None else 'v'}_scale alone"
            )
        self.k_scales, self.v_scales = (
            [_scales(name, scale, self.keys[0]) for _ in range(sizes["layers"])]
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        )
        self._free = list(range(sizes["pages"]))[::-1]
        self._owners: Counter[int] = Counter()  # of each page
        self._pages: dict[int, list[int]] = {}  # of each sequence
        self._lengths: dict[int, int] = {}
        self._next = 0
        self._last: tuple[tuple[int, ...], tuple[Tensor, Tensor]] | None = None

    @property
    def free_pages(self) -> int:
        """How many pages belong to no sequence."""
        return len(self._free)

    @property
    def sequences(self) -> list[int]:
        """The sequences there are, in the order in which they were made."""
        return list(self._lengths)

    def length(self, sequence: int) -> int:
        """How many tokens a sequence has."""
        return self._lengths[self._known(sequence)]

    def add(self, count: int = 1) -> list[int]:
        """New sequences without tokens."""
        return [self._new([], 0) for _ in range(arguments.integer("count", count, least=0))]

    def fork(self, sequence: int, count: int = 1) -> list[int]:
        """New sequences with the tokens of this one, for beams or for a prompt that many share. No page is copied
        now."""
        sequence, count = self._known(sequence), arguments.integer("count", count, least=0)
        pages = self._pages[sequence]
        self._owners.update({page: count for page in pages})
        return [self._new(list(pages), self._lengths[sequence]) for _ in range(count)]

    def extend(self, sequences: Iterable[int], tokens: int) -> None:
        """Make room for so many more tokens of each sequence, in all layers. `attention` or `write` fills it.

        Raises OutOfPages, and changes nothing, if there are too few pages.
        """
        chosen, tokens = self._chosen(sequences), arguments.integer("tokens", tokens, least=0)
        longest = max((self._lengths[s] for s in chosen), default=0)
        if longest + tokens > self.capacity:
            raise ValueError(
                f"tokens must leave each sequence within the capacity of {self.capacity}, got {tokens} more for "
                f"one of {longest}"
            )
        if not tokens:
            return
        self._check_room(chosen, tokens)
        self._last = None
        for sequence in chosen:
            pages, length = self._pages[sequence], self._lengths[sequence]
            if length % self.page and self._owners[pages[-1]] > 1:
                self._make_own(pages)
            while len(pages) * self.page < length + tokens:
                pages.append(self._taken())
            self._lengths[sequence] = length + tokens

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence from this length on, as where speculation was rejected."""
        sequence = self._known(sequence)
        length = arguments.integer("length", length, least=0)
        if length > self._lengths[sequence]:
            raise ValueError(f"length must be at most the sequence's, {self._lengths[sequence]}; got {length}")
        pages, kept = self._pages[sequence], -(-length // self.page)
        self._last = None
        self._release(pages[kept:])
        del pages[kept:]
        self._lengths[sequence] = length

    def free(self, sequences: int | Iterable[int]) -> None:
        """Forget sequences. Their numbers are not given again."""
        # A number may be NumPy's.
        chosen = self._chosen(sequences if isinstance(sequences, Iterable) else [sequences])
        self._last = None
        for sequence in chosen:
            self._release(self._pages.pop(sequence))
            del self._lengths[sequence]

    def block_table(self, sequences: Iterable[int]) -> Tensor:
        """The pages of these sequences as `attention_with_cache(block_table=)` takes them."""
        return self._on_device(self._chosen(sequences))[0]

    def lengths(self, sequences: Iterable[int]) -> Tensor:
        """(sequences,) int32 on the caches' device."""
        return self._on_device(self._chosen(sequences))[1]

    def attention(
        self,
        q: Tensor,
        sequences: Iterable[int],
        *,
        k: Tensor | None = None,
        v: Tensor | None = None,
        layer: int = 0,
        **options: Any,
    ) -> Any:
        """`fastattn.attention_with_cache` of q (sequences, Hq, Lq, D) and these sequences. k and v (sequences,
        heads, new, width) are written to their last tokens first, for which `extend` made room.

        options: the others of `attention_with_cache`, but for cache_lengths, block_table and scales.
        """
        chosen, layer = self._chosen(sequences), self._layer(layer)
        for name in ("cache_lengths", "block_table", "k_scale", "v_scale"):
            if name in options:
                raise TypeError(f"attention() takes no {name}: the cache knows it")
        if k is not None:
            _check_four("k", k)
        new = 0 if k is None else k.shape[2]
        shortest = min((self._lengths[s] for s in chosen), default=new)
        if new > shortest:
            raise ValueError(f"k must have at most as many tokens as each sequence, {shortest}; got {new}")
        if new:
            self._check_own(chosen, new)
        table, lengths = self._on_device(chosen)
        return attention_with_cache(
            q, self.keys[layer], self.values[layer], k=k, v=v, cache_lengths=lengths - new if new else lengths,
            block_table=self._table_or_none(chosen, table), k_scale=self.k_scales[layer],
            v_scale=self.v_scales[layer], **options,
        )  # fmt: skip

    def write(self, sequences: Iterable[int], k: Tensor, v: Tensor, *, layer: int = 0) -> None:
        """Write k and v (sequences, heads, new, width) to the last tokens of these sequences."""
        _check_four("k", k)
        cache = self.keys[self._layer(layer)]
        if cache.dtype not in LARGEST:
            check_same("k", k, "the cache", cache)
        self.attention(k[:, :, :0], sequences, k=k, v=v, layer=layer)

    def append(self, sequences: Iterable[int], k: Tensor, v: Tensor) -> None:
        """`extend` and `write`, in a cache of one layer."""
        if len(self.keys) > 1:
            raise ValueError(
                f"append is for a cache of one layer, this one has {len(self.keys)}: extend, then write"
            )
        chosen = self._chosen(sequences)
        _check_four("k", k)
        before = [self._lengths[s] for s in chosen]
        self.extend(chosen, k.shape[2])
        try:
            self.write(chosen, k, v)
        except BaseException:
            for sequence, length in zip(chosen, before, strict=True):
                self.truncate(sequence, length)
            raise

    def _new(self, pages: list[int], length: int) -> int:
        sequence, self._next = self._next, self._next + 1
        self._pages[sequence], self._lengths[sequence] = pages, length
        return sequence

    def _known(self, sequence: Any) -> int:
        sequence = arguments.integer("sequence", sequence)
        if sequence not in self._lengths:
            raise ValueError(f"sequence must be one of the cache's, {self.sequences}; got {sequence}")
        return sequence

    def _chosen(self, sequences: Iterable[int]) -> tuple[int, ...]:
        if isinstance(sequences, str | bytes) or not isinstance(sequences, Iterable):
            raise TypeError(f"sequences must be a list of numbers of sequences, got {type(sequences).__name__}")
        chosen = tuple(map(self._known, sequences))
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"sequences must not name one twice, got {list(chosen)}")
        return chosen

    def _layer(self, layer: int) -> int:
        layer = arguments.integer("layer", layer, least=0)
        if layer >= len(self.keys):
            raise ValueError(f"layer must be below {len(self.keys)}, got {layer}")
        return layer

    def _check_room(self, chosen: Sequence[int], tokens: int) -> None:
        """Raise unless there are enough pages, those for copies among them."""
        needed, owners = 0, dict(self._owners)
        for sequence in chosen:
            pages, length = self._pages[sequence], self._lengths[sequence]
            if length % self.page and owners[pages[-1]] > 1:
                # The last owner of a page writes to it and copies nothing.
                owners[pages[-1]] -= 1
                needed += 1
            needed += -(-(length + tokens) // self.page) - len(pages)
        if needed > len(self._free):
            raise OutOfPages(
                f"the cache has {len(self._free)} free pages, but {needed} are needed; free or truncate "
                "sequences, or make a cache of more pages"
            )

    def _check_own(self, chosen: Sequence[int], new: int) -> None:
        """Raise if one of the last `new` tokens of a sequence lies in a page that others have, too."""
        for sequence in chosen:
            first = (self._lengths[sequence] - new) // self.page
            if any(self._owners[page] > 1 for page in self._pages[sequence][first:]):
                raise ValueError(
                    f"k must go to tokens of its sequence alone, but others share the last {new} of sequence "
                    f"{sequence}: fork it after they are written, and extend it again"
                )

    def _taken(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _make_own(self, pages: list[int]) -> None:
        """A copy of the last of these pages, in its place."""
        shared, own = pages[-1], self._taken()
        for cache in (*self.keys, *self.values, *self.k_scales, *self.v_scales):
            if cache is not None:
                cache[own].copy_(cache[shared])
        self._owners[shared] -= 1
        pages[-1] = own

    def _release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._owners[page] -= 1
            if not self._owners[page]:
                del self._owners[page]
                self._free.append(page)

    def _on_device(self, chosen: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Table and lengths; the same tensors for all layers of a step."""
        if self._last is None or self._last[0] != chosen:
            # As wide as the capacity needs, so that shapes, and launches, do not change from step to step.
            width, device = -(-self.capacity // self.page), self.keys[0].device
            rows = [self._pages[s] + [0] * (width - len(self._pages[s])) for s in chosen]
            table = torch.tensor(rows, dtype=torch.int32, device=device).view(len(chosen), width)
            lengths = torch.tensor([self._lengths[s] for s in chosen], dtype=torch.int32, device=device)
            self._last = chosen, (table, lengths)
        return self._last[1]

    def _table_or_none(self, chosen: tuple[int, ...], table: Tensor) -> Tensor | None:
        return table


def _check_four(name: str, t: Any) -> None:
    """Raise unless it is a tensor of new tokens."""
    arguments.tensor(name, t)
    if t.dim() != 4:
        raise ValueError(f"{name} must have shape (sequences, heads, new, width), got {tuple(t.shape)}")


def _stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a cache may hold."""
    if isinstance(dtype, torch.dtype) and (dtype in LARGEST or dtype in FLOATING):
        return dtype
    raise TypeError(f"dtype must be float16, bfloat16, float32, float64, int8 or float8_e4m3fn, got {dtype!r}")


def _scales(name: str, scale: float | Tensor | None, keys: Tensor) -> Tensor | None:
    """The scales of one layer. Those of tokens come with them."""
    pages, heads, page, _ = keys.shape
    if keys.dtype not in LARGEST:
        if scale is not None:
            raise ValueError(f"{name} must be None for a cache of {keys.dtype}, got {scale!r}")
        return None
    if scale is None:
        return torch.zeros(pages, heads, page, device=keys.device)
    what = f"{name} must be positive and finite, one number or {heads} for the heads; got {scale!r}"
    try:
        values = torch.as_tensor(scale, dtype=torch.float32, device=keys.device)
    except (TypeError, ValueError) as problem:
        raise TypeError(what) from problem
    if tuple(values.shape) not in ((), (heads,)) or not bool(((values > 0) & (values < math.inf)).all()):
        raise ValueError(what)
    return values.expand(pages, heads).contiguous()


class KVCache(PagedKVCache):
    """Keys and values of up to `rows` sequences, each with room for `capacity` tokens that lie one after another.

    A PagedKVCache whose pages hold a whole sequence: `fork` copies a row when one of both writes, and needs a free
    one. The rows of a new cache are its sequences 0, 1, ... from `add`.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        heads: int,
        width: int,
        *,
        layers: int = 1,
        value_width: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | int = "cpu",
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
    ) -> None:
        rows, capacity = arguments.integer("rows", rows, least=1), arguments.integer("capacity", capacity, least=1)
        super().__init__(
            rows, capacity, heads, width, layers=layers, value_width=value_width, capacity=capacity, dtype=dtype,
            device=device, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip

    def _table_or_none(self, chosen: tuple[int, ...], table: Tensor) -> Tensor | None:
        """None where the rows of the call are those of the cache, so that keys are read where they lie."""
        rows = [self._pages[s][0] if self._pages[s] else -1 for s in chosen]
        return None if rows == list(range(len(self.keys[0]))) else table
