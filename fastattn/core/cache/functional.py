"""Attention with a cache, as a function of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn.core import invariance, plans, spread
from fastattn.core.attention.functional import attention, merge_states
from fastattn.core.attention.spec import positive_scale
from fastattn.core.autocast import autocast
from fastattn.core.cache import operators
from fastattn.core.cache.spec import (
    CacheSpec,
    CacheTensors,
    Storage,
    attention_options,
    by_head,
    check_beside_scores,
    check_new,
    check_own_places,
    check_positions,
    check_prefix,
    check_queries,
    check_rotation,
    check_row_numbers,
    check_scales,
    check_table,
    row_numbers,
)
from fastattn.core.capabilities import check_backend
from fastattn.core.heads.functional import prepare_heads
from fastattn.ground.arguments import flag, refuse_keywords
from fastattn.ground.checks import Window


@overload
def attention_with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    *,
    cache_lengths: int | Tensor | Sequence[int],
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ...,
    cache_starts: int | Tensor | Sequence[int] | None = ...,
    block_table: Tensor | None = ...,
    cos: Tensor | None = ...,
    sin: Tensor | None = ...,
    interleaved: bool = ...,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window = ...,
    tree_mask: Tensor | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    value_width: int | None = ...,
    precision: str | None = ...,
    invariant: bool | None = ...,
    return_lse: Literal[False] = ...,
    check: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention_with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    *,
    cache_lengths: int | Tensor | Sequence[int],
    k: Tensor | None = ...,
    v: Tensor | None = ...,
    k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ...,
    cache_starts: int | Tensor | Sequence[int] | None = ...,
    block_table: Tensor | None = ...,
    cos: Tensor | None = ...,
    sin: Tensor | None = ...,
    interleaved: bool = ...,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window = ...,
    tree_mask: Tensor | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    value_width: int | None = ...,
    precision: str | None = ...,
    invariant: bool | None = ...,
    return_lse: Literal[True],
    check: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention_with_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    *,
    cache_lengths: int | Tensor | Sequence[int],
    k: Tensor | None = None,
    v: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    cache_starts: int | Tensor | Sequence[int] | None = None,
    block_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    tree_mask: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    value_width: int | None = None,
    precision: str | None = None,
    invariant: bool | None = None,
    return_lse: bool = False,
    check: bool = False,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries to the keys and values in a cache, for inference: no gradients.

    New keys and values, if given, are first written to the cache, in place. Each row of the batch has a length of
    its own, and only its own keys are read: what lies in the cache behind a row's length may be anything.

    Args:
        q: queries (B, Hq, Lq, D), any Lq; any strides. The last query of a row stands at the row's last key.
        k_cache: (B, Hkv, capacity, D), or pages (pages, Hkv, page, D) with a block_table; in q's dtype, or
            quantised: torch.int8 or torch.float8_e4m3fn. Any strides. Hq is a multiple of Hkv.
        v_cache: the same with a width Dv of its own. None: values are the first `value_width` columns of the keys,
            which are then stored and read once (the absorbed form of DeepSeek's latent attention, 576 and 512).
        cache_lengths: how many tokens each row has before this call: (B,) int32 or int64, or one number.
        k, v: new keys (B, Hkv, new, D) and values, written behind each row's last token. v is None where v_cache
            is.
        k_scale, v_scale: of quantised caches, float32: a number in the cache times its scale is the key or value.
            With shape k_cache.shape[:3], one for each token and head: new tokens bring theirs, which is written
            with them. With shape k_cache.shape[:2], one for each page (or row) and head, which the caller chose:
            positive: new numbers beyond the largest that the dtype holds, times the scale, become that. None for
            caches in q's dtype. v_scale is None where v_cache is.
        cache_starts: (B,), how many of each row's first keys are hidden, as with left padding; or one number.
        block_table: (B, most pages) int32 or int64: token t of a row lies in page block_table[row, t // page].
            Entries that no token of the row needs are not read.
        cos, sin, interleaved: rotary embedding of q and of the new keys at their positions, as `prepare_heads`
            takes it: tables (positions, W/2), or (B, Lq, W/2), a row for each query and new key.
        causal, window: counted from each query's diagonal, which stands at the key of its own position.
        tree_mask: bool (Lq, M) or (B, Lq, M): which of a row's last M keys each query sees, beside causal and
            window. For trees of speculated tokens, M is the number of new tokens.
        scale, softcap, precision: as `attention`'s; a scale is one number. alibi_slopes, sinks: (Hq,) or (B, Hq).
        invariant: whether the bits of a row must depend on that row alone, see `fastattn.invariant`; by default as
            that context or FASTATTN_INVARIANT says.
        value_width: see v_cache; by default D.
        check: have the kernels on a GPU, which then wait, check that lengths and page numbers are within bounds;
            everywhere, that no two rows write to one place. Without it a wrong number gives NaN in its row there,
            and nothing is written for it. On a CPU, and by other backends, numbers are always checked.
        backend: as `attention`'s.

    Returns:
        out (B, Hq, Lq, Dv) in q's dtype, laid out (B, Lq, Hq, Dv); with `return_lse` also the log-sum-exp of each
        row of scores (B, Hq, Lq) in nats, fp32 (fp64 for fp64). A query that sees no key gives 0 and -inf, or the
        sink's score.

    Errors of quantised caches: a number moves by at most scale / 2 in int8, where 127 scales are a token's largest
    magnitude; in fp8 by at most a sixteenth of itself, or scale / 1024 where that is more (448 scales are the
    largest). If keys move by up to dk and values by up to dv, a query's scores and log-sum-exp move by at most
    s = |scale| * sum(|q|) * dk, and its result by at most s * max|v| + dv. With a scale of its own, a token with
    NaN or infinity is NaN throughout; with a page's, NaN stays NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything is written. A
            call that would need a gradient is refused.

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 1, 2, 128, 64)
        >>> q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64)
        >>> attention_with_cache(q, k_cache, v_cache, k=k, v=v, cache_lengths=torch.tensor([5])).shape
        torch.Size([1, 8, 1, 64])

    Source: pages: Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention
    (2023), section 4; keys split over programs: Dao et al., Flash-Decoding (2023); trees: Miao et al., SpecInfer
    (2024), section 4; latent attention: DeepSeek-V2 (2024), section 2.1.
    """
    if unknown:
        refuse_keywords("attention_with_cache", unknown, takes=attention_with_cache)
    if spread.current is not None:
        spread.refuse("attention_with_cache")
    tensors = (
        q, k_cache, v_cache, k, v, k_scale, v_scale, cache_lengths, cache_starts, block_table, alibi_slopes, sinks,
        tree_mask, cos, sin,
    )  # fmt: skip
    options = (
        causal, scale, window, softcap, value_width, precision, return_lse, check, interleaved, backend,
        invariance.wanted() if invariant is None else invariant, cache_starts is None,
    )  # fmt: skip
    described: Sequence[Any] = tensors
    if not isinstance(cache_lengths, Tensor) or not (cache_starts is None or isinstance(cache_starts, Tensor)):
        lengths, starts = (t if isinstance(t, Tensor) else None for t in (cache_lengths, cache_starts))
        described = Given(*tensors)._replace(cache_lengths=lengths, cache_starts=starts)
    plan, key = PLANS.latest(described, options), None
    is_known = plan is not None
    if plan is None:
        key = plans.key(described, options)
        plan = PLANS.find(key)
        if plan is not None:
            PLANS.again(described, options, plan)
    if plan is None:
        given = Given(*tensors)
        if spread.is_dtensor(q):  # which has no key
            return spread.of_dtensors["attention_with_cache"](given, {
                "interleaved": interleaved, "causal": causal, "scale": scale, "window": window, "softcap": softcap,
                "value_width": value_width, "precision": precision, "return_lse": return_lse, "check": check,
                "invariant": invariant, "backend": backend,
            })  # fmt: skip
        plan = CachePlan.of(given.under_autocast(), *options[:-1])
        if key is not None:
            plan = plan.shortened(given)
        PLANS.keep(key, plan)
    if plan.read_only is not None:
        found = plan.read_only(q, k_cache, v_cache, cache_lengths, block_table)
        if found is not None:
            return found if return_lse else found[0]
    given = Given(*tensors)
    watched = key is None and not is_known
    out, lse = plan(given.under_autocast() if watched else given, watched)
    return (out, lse) if plan.return_lse else out


class Given(NamedTuple):
    """The tensors of a call, as they were given."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor | None
    k: Tensor | None
    v: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    cache_lengths: Any  # an integer, or one for each row
    cache_starts: Any  # the same, or None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    tree_mask: Tensor | None
    cos: Tensor | None
    sin: Tensor | None

    def under_autocast(self) -> Given:
        """With queries and new tokens in autocast's dtype. The caches stay as they are, since they are written."""
        q, k, v = autocast(self.q, self.k, self.v)
        return self._replace(q=q, k=k, v=v)

    @property
    def storage(self) -> Storage:
        return Storage(self.k_cache, self.v_cache, self.k_scale, self.v_scale)

    @property
    def new(self) -> int:
        """How many tokens are written."""
        return 0 if self.k is None else self.k.shape[2]

    def refuse_transforms(self) -> None:
        """Refuse gradients, tangents and maps before anything is written."""
        there = [t for t in self if isinstance(t, Tensor)]
        wanted = plans.needs_gradient(*there)
        if not torch.compiler.is_compiling():
            if any(torch._C._functorch.is_batchedtensor(t) for t in there):
                raise ValueError(operators.NO_MAP)
            if forward_ad._current_level >= 0:
                wanted = wanted or any(forward_ad.unpack_dual(t).tangent is not None for t in there)
        if wanted:
            raise ValueError(operators.NO_GRADIENT)

    def converted(self) -> tuple[CacheTensors, Tensor]:
        """What the operators take, and the position of each row's first new token."""
        q = self.q
        before = row_numbers("cache_lengths", self.cache_lengths, q)
        starts = None if self.cache_starts is None else row_numbers("cache_starts", self.cache_starts, q)
        slopes, sinks = by_head(self.alibi_slopes, q), by_head(self.sinks, q)
        table = None if self.block_table is None else self.block_table.to(torch.int32)
        tree = None if self.tree_mask is None else self.tree_mask.expand(q.shape[0], -1, -1)
        return CacheTensors(before + self.new if self.new else before, starts, table, slopes, sinks, tree), before


BESIDE_LENGTHS = ("cache_starts", "alibi_slopes", "sinks", "tree_mask")


class CachePlan(NamedTuple):
    """A call that was checked: what does not depend on the values of its tensors.

    factor: by which queries are multiplied, so that the spec's scale can be positive; None for 1.
    backend: the one that computes it.
    one_token: a shorter way, see `operators.one_token`, or None; read_only: the same, where nothing is written or
        rotated first.
    """

    spec: CacheSpec
    factor: float | None
    interleaved: bool
    return_lse: bool
    check: bool
    backend: str
    one_token: Any = None
    read_only: Any = None

    @classmethod
    def of(
        cls, given: Given, causal: Any, scale: Any, window: Any, softcap: Any, value_width: Any, precision: Any,
        return_lse: Any, check: Any, interleaved: Any, backend: Any, invariant: Any,
    ) -> CachePlan:  # fmt: skip
        q, storage = given.q, given.storage
        width = check_queries(q, storage, value_width)
        check_scales(storage)
        check_new(q, storage, given.k, given.v)
        check_table(q, storage, given.block_table)
        check_row_numbers("cache_lengths", given.cache_lengths, q)
        check_row_numbers("cache_starts", given.cache_starts, q)
        check_beside_scores(q, given.alibi_slopes, given.sinks, given.tree_mask)
        check_rotation(q, given.k, given.cos, given.sin)
        scores = attention_options(
            q, causal=causal, scale=scale, window=window, softcap=softcap, precision=precision,
            invariant=invariant,
        )  # fmt: skip
        given.refuse_transforms()
        factor = None if scores.scale > 0 else -1.0 if scores.scale < 0 else 0.0
        _, positive = positive_scale(q[:0], scores)
        spec, backend = CacheSpec(positive, width), check_backend(backend)
        return cls(
            spec, factor, flag("interleaved", interleaved), flag("return_lse", return_lse), flag("check", check),
            operators.chosen(q, storage, spec, backend),
        )  # fmt: skip

    def shortened(self, given: Given) -> CachePlan:
        """For repeated calls. With `one_token` where the call has nothing beside lengths and a table."""
        if self.factor is not None or any(getattr(given, name) is not None for name in BESIDE_LENGTHS):
            return self
        shorter = operators.one_token(given.q, given.storage, self.spec, self.backend)
        only = given.k is None and given.cos is None
        return self._replace(one_token=shorter, read_only=shorter if only else None)

    def __call__(self, given: Given, watched: bool) -> tuple[Tensor, Tensor]:
        """watched: somebody must see the operators."""
        storage = given.storage
        tensors, before = given.converted()
        q, k = self.rotated(given, tensors, before)
        q = q if self.factor is None else q * self.factor
        if k is not None:
            check_own_places(storage)
        if not watched:
            if k is not None:
                operators.append(storage, k, given.v, tensors, self.check, self.backend)
            found = None
            if self.one_token is not None:
                found = self.one_token(q, storage.keys, storage.values, tensors.lengths, tensors.block_table)
            return found or operators.attend(q, storage, self.spec, tensors, self.check, self.backend)
        if k is not None:
            torch.ops.fastattn.cache_append(
                *storage, k, given.v, tensors.lengths, tensors.block_table, self.check, self.backend
            )
        return torch.ops.fastattn.cache_attention(
            q, *storage, *tensors, *self.spec.options, self.check, self.backend
        )

    def rotated(self, given: Given, tensors: CacheTensors, before: Tensor) -> tuple[Tensor, Tensor | None]:
        """The queries and the new keys, turned as their positions say."""
        q, k, cos, sin = given.q, given.k, given.cos, given.sin
        if cos is None or sin is None:
            return q, k
        tables: dict[str, Any] = {"cos": cos, "sin": sin, "interleaved": self.interleaved}
        if cos.dim() == 3:
            return prepare_heads(q, **tables), None if k is None else prepare_heads(k, **tables)
        check_positions(cos, tensors.lengths)
        q = prepare_heads(q, offsets=tensors.lengths - q.shape[2], **tables)
        return q, None if k is None else prepare_heads(k, offsets=before, **tables)


PLANS: plans.Plans[CachePlan] = plans.Plans("attention_with_cache")


def attention_with_shared_prefix(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: int | Tensor | Sequence[int],
    k: Tensor | None = None,
    v: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_prefix_scale: Tensor | None = None,
    v_prefix_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    precision: str | None = None,
    return_lse: bool = False,
    check: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_with_cache` of rows that all begin with the same tokens, as after one system prompt. The prefix
    is read once for the whole batch, then its part is merged with each row's own by their log-sum-exps.

    Args:
        k_prefix, v_prefix: keys (Hkv, prefix, D) and values (Hkv, prefix, Dv) of the shared tokens, in q's dtype
            or quantised. Every query sees all of them.
        k_prefix_scale, v_prefix_scale: of a quantised prefix, float32: (Hkv, prefix), one for each head and token,
            or (Hkv,).
        q, k_cache, v_cache, cache_lengths, k, v, k_scale, v_scale, block_table and the others: as
            `attention_with_cache`'s, of the tokens behind the prefix. q and k are already rotated: a row's own
            tokens have positions from `prefix` on.

    Returns:
        out (B, Hq, Lq, Dv), and with `return_lse` the log-sum-exp (B, Hq, Lq), over the prefix and the row's own
        keys.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected, before anything is written.

    Source: Juravsky et al., Hydragen (2024), section 3.1; merging: Milakov and Gimelshein (2018), section 3.1.
    """
    return_lse = flag("return_lse", return_lse)
    if spread.is_dtensor(q):
        raise TypeError(
            "attention_with_shared_prefix does not take DTensors; give it what each rank has, .to_local()"
        )
    if invariance.wanted():
        raise ValueError(
            "attention_with_shared_prefix is not invariant, since it merges two results: call "
            "attention_with_cache, with the pages of the prefix in every row's block_table"
        )
    prefix = Storage(k_prefix, v_prefix, k_prefix_scale, v_prefix_scale)
    check_prefix(q, Storage(k_cache, v_cache), prefix)
    if plans.needs_gradient(q, k_prefix, v_prefix):
        raise ValueError(operators.NO_GRADIENT.replace("cache", "shared_prefix", 1))
    # The query heads of a group, and the queries of all rows, become queries of one row.
    (batch, heads, queries, _), key_heads = q.shape, k_prefix.shape[0]
    packed = q.unflatten(1, (key_heads, heads // max(key_heads, 1))).movedim(0, 2).flatten(1, 3)[None]
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "precision": precision, "backend": backend}
    if prefix.is_quantised:
        k_scales, v_scales = (None if t is None else t[None] for t in prefix[2:])
        shared = attention_with_cache(
            packed, k_prefix[None], v_prefix[None], k_scale=k_scales, v_scale=v_scales,
            cache_lengths=k_prefix.shape[1], causal=False, return_lse=True, **options,
        )  # fmt: skip
    else:
        shared = attention(packed, k_prefix[None], v_prefix[None], return_lse=True, **options)
    # After the other part, so that nothing is written if that is refused.
    out, lse = attention_with_cache(
        q, k_cache, v_cache, cache_lengths=cache_lengths, k=k, v=v, k_scale=k_scale, v_scale=v_scale,
        block_table=block_table, causal=causal, sinks=sinks, check=check, return_lse=True, **options,
    )  # fmt: skip
    shape = heads // max(key_heads, 1), batch, queries
    shared_out, shared_lse = (t[0].unflatten(1, shape).movedim(2, 0).flatten(1, 2) for t in shared)
    out, lse = merge_states(shared_out, shared_lse, out, lse)
    return (out, lse) if return_lse else out
