"""What is asked of attention with a cache: validated once, then frozen. Tensors travel beside the spec.

A cache holds pages of keys and of values, (pages, Hkv, page, width). A block table (B, most pages) lists the pages
of each row; token t of row b lies in page table[b, t // page], at t % page. A contiguous cache (B, Hkv, capacity,
D) has one page of the whole capacity for each row, and needs no table.

A quantised cache holds int8 or float8_e4m3fn, and float32 scales beside them: a number that is stored, times its
scale, is the key or value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.core import invariance
from fastattn.core.attention.spec import AttentionSpec, check_precision, check_scale, check_softcap
from fastattn.ground import arguments
from fastattn.ground.checks import (
    Window,
    check_beside,
    check_floating,
    check_same,
    check_window,
    lse_dtype,
    shape_of,
)

INT8, FP8 = torch.int8, torch.float8_e4m3fn
# The largest number that a quantised cache stores, by dtype.
LARGEST = {INT8: 127.0, FP8: 448.0}


@dataclass(frozen=True)
class CacheSpec:
    """Which attention with a cache. Query i of a row with n keys stands on the diagonal at key i + n - Lq.

    attention: what is done to the scores; without dropout and mask.
    value_width: Dv. Without a cache of values they are the first Dv columns of the keys.
    """

    attention: AttentionSpec
    value_width: int

    @property
    def options(self) -> tuple[int, bool, float, int | None, int | None, float, str, bool]:
        """As an operator takes them: value width, causal, scale, left and right window, softcap, precision,
        invariant."""
        spec = self.attention
        return (
            self.value_width,
            spec.causal,
            spec.scale,
            *spec.window,
            spec.softcap,
            spec.precision,
            spec.invariant,
        )


def spec_of(options: Sequence) -> CacheSpec:
    """The inverse of `CacheSpec.options`."""
    value_width, causal, scale, left, right, softcap, precision, invariant = options
    spec = AttentionSpec(causal, scale, (left, right), softcap, 0.0, precision, invariant=invariant)
    return CacheSpec(spec, value_width)


class CacheTensors(NamedTuple):
    """What attention takes beside q and the keys and values; None for what is not given.

    lengths: (B,) int32, how many keys each row has.
    starts: (B,) int32; keys before are not seen.
    block_table: (B, most pages) int32.
    alibi_slopes, sinks: (B, Hq) in the log-sum-exp's dtype.
    tree_mask: (B, Lq, M) bool, which of a row's last M keys each query sees.
    """

    lengths: Tensor
    starts: Tensor | None = None
    block_table: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    tree_mask: Tensor | None = None


class Storage(NamedTuple):
    """A cache: keys (pages, Hkv, page, D), values (pages, Hkv, page, Dv) or None where they are columns of the
    keys. A quantised one has scales of both, fp32: (pages, Hkv, page), one for each token and head, written with
    the tokens; or (pages, Hkv), one for each page and head, which stay as they are."""

    keys: Tensor
    values: Tensor | None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def page(self) -> int:
        """How many tokens a page holds."""
        return self.keys.shape[2]

    @property
    def is_quantised(self) -> bool:
        return self.k_scale is not None

    def of_heads(self, heads: slice) -> Storage:
        """Of these key heads alone."""
        if heads.start == 0 and heads.stop >= self.keys.shape[1]:
            return self
        values, k_scale, v_scale = (None if t is None else t[:, heads] for t in self[1:])
        return Storage(self.keys[:, heads], values, k_scale, v_scale)


def capacity_of(keys: Tensor, block_table: Tensor | None) -> int:
    """How many tokens a row may have."""
    return keys.shape[2] * (1 if block_table is None else block_table.shape[1])


def check_queries(q: Tensor, storage: Storage, value_width: int | None) -> int:
    """Check q against the caches; the width of values."""
    keys, values = storage.keys, storage.values
    for name, t in (("q", q), ("k_cache", keys), *((("v_cache", values),) if values is not None else ())):
        arguments.tensor(name, t)
        if t.dim() != 4:
            what = "(batch, heads, length, width)" if name == "q" else "(batch or pages, heads, length, width)"
            raise ValueError(f"{name} must have shape {what}, got {shape_of(t)}")
    check_floating("q", q)
    if keys.dtype in LARGEST:
        check_beside("k_cache", keys, q, None)
    elif not keys.is_floating_point():
        raise TypeError(
            "k_cache must be float16, bfloat16, float32 or float64, or quantised: int8 or float8_e4m3fn; got "
            f"{keys.dtype}"
        )
    else:
        check_same("k_cache", keys, "q", q)
    if values is not None:
        check_same("v_cache", values, "k_cache", keys)
    heads, width = keys.shape[1], keys.shape[3]
    if q.shape[3] != width or width == 0:
        raise ValueError(f"q must have k_cache's head width {width}, at least 1; got {q.shape[3]}")
    if q.shape[1] % heads if heads else q.shape[1]:
        raise ValueError(f"q's heads must be a multiple of k_cache's heads {heads}, got {q.shape[1]}")
    if values is None:
        return _check_value_width(value_width, width)
    if value_width is not None:
        raise ValueError("value_width must be None unless v_cache is None: values are then columns of the keys")
    if values.shape[:3] != keys.shape[:3] or values.shape[3] == 0:
        raise ValueError(
            f"v_cache must have k_cache's shape {shape_of(keys)}, but for a width of its own, at least 1; "
            f"got {shape_of(values)}"
        )
    return values.shape[3]


def _check_value_width(value_width: int | None, width: int) -> int:
    if value_width is None:
        return width
    value_width = arguments.integer("value_width", value_width, least=1, what="an integer or None")
    if value_width > width:
        raise ValueError(f"value_width must be at most k_cache's width {width}, got {value_width}")
    return value_width


def check_scales(storage: Storage) -> None:
    """Check the scales against the caches that they belong to: both are there for quantised ones, none for
    others."""
    for kind, cache, scale in (
        ("k", storage.keys, storage.k_scale),
        ("v", storage.values, storage.v_scale),
    ):
        _check_scale(f"{kind}_scale", scale, f"{kind}_cache", cache)
    _check_alike("", storage.k_scale, storage.v_scale)


def _check_scale(name: str, scale: Tensor | None, cache_name: str, cache: Tensor | None) -> None:
    """A scale for each number of all but the last dimension of a quantised cache, or of all but the last two."""
    if cache is None or cache.dtype not in LARGEST:
        if scale is not None:
            where = f"where {cache_name} is None" if cache is None else f"beside a {cache_name} of {cache.dtype}"
            raise ValueError(f"{name} must be None {where}, got a tensor")
        return
    if scale is None:
        raise ValueError(f"{name} must be given for a {cache_name} of {cache.dtype}, got None")
    shape = shape_of(cache)
    check_beside(name, scale, cache, (shape[:-1], shape[:-2]), of=cache_name)
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {scale.dtype}")


def _check_alike(of: str, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    if k_scale is not None and v_scale is not None and k_scale.dim() != v_scale.dim():
        raise ValueError(f"v_{of}scale must have k_{of}scale's {k_scale.dim()} dimensions, got {v_scale.dim()}")


def check_new(q: Tensor, storage: Storage, k: Tensor | None, v: Tensor | None) -> None:
    """Check the new keys and values against the cache that they go to."""
    if k is None:
        if v is not None:
            raise ValueError("v must come with k, got v alone")
        return
    if (v is None) != (storage.values is None):
        raise ValueError(
            "k must come with v, got k alone"
            if v is None
            else "v must be None where v_cache is None, got a tensor"
        )
    for name, t, cache in (("k", k, storage.keys), ("v", v, storage.values)):
        if t is None or cache is None:
            continue
        arguments.tensor(name, t)
        if t.dim() != 4 or (t.shape[0], t.shape[1], t.shape[3]) != (q.shape[0], cache.shape[1], cache.shape[3]):
            shape = f"({q.shape[0]}, {cache.shape[1]}, new tokens, {cache.shape[3]})"
            raise ValueError(f"{name} must have shape {shape}, got {shape_of(t)}")
        # What is quantised has q's dtype before.
        check_same(name, t, *(("q", q) if cache.dtype in LARGEST else (f"{name}_cache", cache)))
        if cache.numel() and any(n > 1 and step == 0 for n, step in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(
                f"{name}_cache must have a place of its own for each number where new tokens are written, but it "
                f"is expanded: its strides are {tuple(cache.stride())}"
            )
    if v is not None and v.shape[2] != k.shape[2]:
        raise ValueError(f"v must have as many new tokens as k, {k.shape[2]}; got {v.shape[2]}")


def check_own_places(storage: Storage) -> None:
    """Raise if new values would be written over new keys. Shapes and strides do not tell: it is asked in every
    call that writes."""
    keys, values = storage.keys, storage.values
    plain = type(keys) is type(values) is Tensor and not torch.compiler.is_compiling()
    if values is keys or (values is not None and plain and keys.data_ptr() == values.data_ptr() != 0):
        raise ValueError(
            "v_cache must be another tensor than k_cache where new tokens are written, or None: values are then "
            "columns of the keys"
        )


def check_prefix(q: Tensor, own: Storage, prefix: Storage) -> None:
    """Check the keys and values that all rows share, (Hkv, prefix, width), against q and the caches."""
    if own.values is None:
        raise ValueError("v_cache must be a tensor beside a prefix, got None")
    check_queries(q, own, None)
    for kind, t, cache, scale in (
        ("k", prefix.keys, own.keys, prefix.k_scale),
        ("v", prefix.values, own.values, prefix.v_scale),
    ):
        name = f"{kind}_prefix"
        arguments.tensor(name, t)
        assert t is not None
        if t.dim() != 3 or (t.shape[0], t.shape[2]) != (cache.shape[1], cache.shape[3]):
            raise ValueError(
                f"{name} must have shape ({cache.shape[1]}, prefix, {cache.shape[3]}), got {shape_of(t)}"
            )
        if t.dtype in LARGEST:
            check_beside(name, t, q, None)
        else:
            check_same(name, t, "q", q)
        _check_scale(f"{name}_scale", scale, name, t)
    values = prefix.values
    assert values is not None
    check_same("v_prefix", values, "k_prefix", prefix.keys)
    _check_alike("prefix_", prefix.k_scale, prefix.v_scale)
    if values.shape[1] != prefix.keys.shape[1]:
        raise ValueError(f"v_prefix must have k_prefix's length {prefix.keys.shape[1]}, got {values.shape[1]}")


def check_table(q: Tensor, storage: Storage, block_table: Tensor | None) -> None:
    batch, pages = q.shape[0], storage.keys.shape[0]
    if block_table is None:
        if pages != batch:
            raise ValueError(
                f"k_cache must have q's batch size {batch}, or a block_table must list its pages; got {pages}"
            )
        return
    check_beside("block_table", block_table, q, None)
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ValueError(f"block_table must have shape ({batch}, most pages), got {shape_of(block_table)}")
    _check_integers("block_table", block_table)
    if storage.page == 0:
        raise ValueError("k_cache's pages must hold at least one token, got 0")


def check_row_numbers(name: str, values: object, q: Tensor) -> None:
    """Check one integer for each row, or one for all, if it is a tensor; `row_numbers` checks others."""
    if isinstance(values, Tensor):
        arguments.tensor(name, values)
        check_beside(name, values, q, ((q.shape[0],), ()))
        _check_integers(name, values)


def row_numbers(name: str, values: int | Tensor | Sequence[int], q: Tensor) -> Tensor:
    """One integer for each row, (B,) int32; a single number stands for all rows."""
    if not isinstance(values, Tensor):
        # A compiler that traces an int cannot ask it for attributes.
        number = isinstance(values, int)
        if not number and (isinstance(values, Sequence) or hasattr(values, "__array_interface__")):
            values = arguments.integers(name, values, on=q.device)
            check_row_numbers(name, values, q)
        else:
            what = "an integer, a tensor or a sequence of integers"
            # No row of a cache is longer than 32 bits tell.
            values = min(max(arguments.integer(name, values, what=what), -1), 2**31 - 1)
            return torch.full((q.shape[0],), values, dtype=torch.int32, device=q.device)
    values = values if values.dtype == torch.int32 else values.clamp(-1, 2**31 - 1).to(torch.int32)
    return values if values.dim() else values.expand(q.shape[0])


def _check_integers(name: str, t: Tensor) -> None:
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {t.dtype}")


def check_beside_scores(
    q: Tensor, alibi_slopes: Tensor | None, sinks: Tensor | None, tree_mask: Tensor | None
) -> None:
    """Check the tensors that shape the scores."""
    batch, heads, queries, _ = q.shape
    for name, t in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if t is not None:
            check_beside(name, t, q, ((heads,), (batch, heads)))
            check_floating(name, t)
    if tree_mask is None:
        return
    check_beside("tree_mask", tree_mask, q, None)
    if tree_mask.dtype != torch.bool:
        raise TypeError(f"tree_mask must be bool (True is seen), got {tree_mask.dtype}")
    if tree_mask.dim() not in (2, 3) or shape_of(tree_mask)[:-1] not in ((queries,), (batch, queries)):
        raise ValueError(
            f"tree_mask must have shape ({queries}, M) or ({batch}, {queries}, M), got {shape_of(tree_mask)}"
        )


def by_head(t: Tensor | None, q: Tensor) -> Tensor | None:
    """(Hq,) or (B, Hq) as (B, Hq), in the log-sum-exp's dtype."""
    return None if t is None else t.to(lse_dtype(q.dtype)).expand(q.shape[:2])


def check_rotation(q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
    """Check the tables of the rotation, for queries and new keys at once."""
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError(f"cos and sin must come together, got {'sin' if cos is None else 'cos'} alone")
        return
    batch, _, queries, width = q.shape
    for name, t in (("cos", cos), ("sin", sin)):
        check_beside(name, t, q, None)
        check_floating(name, t)
        whole = t.dim() == 3 and t.shape[0] in (1, batch) and t.shape[1] == queries
        if not (t.dim() == 2 or whole) or not 1 <= t.shape[-1] <= width // 2:
            raise ValueError(
                f"{name} must have shape (positions, pairs) or ({batch}, {queries}, pairs), with 1 to "
                f"{width // 2} pairs for q's width {width}; got {shape_of(t)}"
            )
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {shape_of(cos)}, got {shape_of(sin)}")
    if cos.dim() == 3 and k is not None and k.shape[2] != queries:
        raise ValueError(
            f"cos must have shape (positions, pairs) where q and k differ in length, {queries} and {k.shape[2]}; "
            f"got {shape_of(cos)}"
        )


def check_positions(cos: Tensor, lengths: Tensor) -> None:
    """Raise if a row is longer than the table of the rotation. Only on a CPU, and not while a compiler traces:
    elsewhere such positions give NaN."""
    if torch.compiler.is_compiling() or type(lengths) is not Tensor or lengths.device.type != "cpu":
        return
    if torch._C._are_functorch_transforms_active() or not lengths.numel():
        return
    longest = int(lengths.max())
    if longest > cos.shape[0]:
        raise ValueError(
            f"cos must have a row for every position, {longest} for these lengths; got {cos.shape[0]}"
        )


def attention_options(
    q: Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: Window,
    softcap: float | None,
    precision: str | None,
    invariant: bool | None = None,
) -> AttentionSpec:
    """The options of the scores, as `fastattn.attention` has them."""
    left, right = (None if side is None or side >= 2**31 - 1 else side for side in check_window(window))
    return AttentionSpec(
        arguments.flag("causal", causal),
        1.0 / math.sqrt(q.shape[3]) if scale is None else check_scale(scale),
        (left, right),
        check_softcap(softcap),
        0.0,
        check_precision(precision, q),
        invariant=invariance.asked(invariant),
    )


def check_values(keys: Tensor, tensors: CacheTensors, new: int = 0) -> None:
    """Raise unless every row's length fits its capacity and the pages that it uses exist. `tensors.lengths` count
    the `new` tokens. Reads values: on a GPU it waits for them."""
    lengths, table, capacity = tensors.lengths, tensors.block_table, capacity_of(keys, tensors.block_table)
    values = lengths.tolist()
    if not values:
        return
    if min(values) < new:
        raise ValueError(f"cache_lengths must not be negative, got {min(values) - new}")
    if new > capacity:
        raise ValueError(f"k must have at most the cache's capacity of {capacity} new tokens, got {new}")
    if max(values) > capacity:
        more = f" with {new} new tokens" if new else ""
        raise ValueError(f"cache_lengths must be at most {capacity - new}{more}, got {max(values) - new}")
    if table is None:
        return
    used = torch.arange(table.shape[1], device=table.device) * keys.shape[2] < lengths[:, None]
    wrong = used & ((table < 0) | (table >= keys.shape[0]))
    if bool(wrong.any()):
        row, place = (int(n) for n in wrong.nonzero()[0])
        raise ValueError(
            f"block_table must list pages from 0 to {keys.shape[0] - 1} for all tokens of a row, "
            f"got {int(table[row, place])} at [{row}, {place}]"
        )


def check_page_scales(storage: Storage, tensors: CacheTensors, new: int) -> None:
    """Raise if the scale of a page that new tokens go to is not positive. Reads values."""
    for name, scale in (("k_scale", storage.k_scale), ("v_scale", storage.v_scale)):
        if scale is not None and scale.dim() == 2:
            written = scale[slots_of(storage.keys, tensors, new)[0]]
            if not bool((written > 0).all()):
                raise ValueError(f"{name} must be positive for pages that are written, got {float(written.min())}")


def check_slots(keys: Tensor, tensors: CacheTensors, new: int) -> None:
    """Raise if two of the new tokens go to the same place."""
    rows, columns = slots_of(keys, tensors, new)
    places = (rows.long() * keys.shape[2] + columns).flatten()
    if places.unique().numel() < places.numel():
        raise ValueError("block_table must not give two rows the same page to write to, but it does")


def slots_of(keys: Tensor, tensors: CacheTensors, new: int) -> tuple[Tensor, Tensor]:
    """Where the last `new` tokens of each row lie: pages and places within them, (B, new) each."""
    positions = (tensors.lengths - new)[:, None] + torch.arange(new, device=keys.device)
    if tensors.block_table is None:
        return torch.arange(len(positions), device=keys.device)[:, None].expand_as(positions), positions
    entries = positions // keys.shape[2]
    return torch.take_along_dim(tensors.block_table, entries.long(), 1), positions % keys.shape[2]
