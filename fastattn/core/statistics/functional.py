"""Statistics of attention: functions of q, k and the log-sum-exp that attention returned, in O(N) memory.

Public as `fastattn.lens.attention_statistics`, `match_mass` and `gather_weights`.
"""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.core import spread
from fastattn.core.attention.definition import is_rounded
from fastattn.core.attention.functional import scores_asked
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors, check_heads
from fastattn.core.attention.tiles import adds_floats
from fastattn.core.autocast import autocast
from fastattn.core.capabilities import check_backend
from fastattn.core.statistics import operators
from fastattn.core.statistics.labels import Kind, check_kind, check_labels, labels_of, possible
from fastattn.core.statistics.queries import Queries, check_queries
from fastattn.core.statistics.spec import (
    SUMS,
    Matches,
    StatisticsSpec,
    StatisticsTensors,
    TopKeys,
    WeightsAsked,
    check_lse,
    check_query_weights,
    check_thumbnail,
    check_want,
)
from fastattn.ground import arguments
from fastattn.ground.checks import check_beside, check_floating, lse_dtype, shape_of
from fastattn.ground.modes import lasts, without_autocast
from fastattn.masks import Lowered, Mask

# What attention takes that shapes the scores.
_SCORE_OPTIONS = frozenset(inspect.signature(scores_asked).parameters) - {"q", "k"}


def attention_statistics(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    v: Tensor | None = None,
    *,
    want: str | Iterable[str] = ("entropy",),
    queries: slice | Tensor | Sequence[int] | None = None,
    top: int = 8,
    within: Mask | Sequence[Mask] | None = None,
    labels: Tensor | None = None,
    match: Kind | Sequence[Kind] = "induction",
    query_weights: Tensor | None = None,
    output: Tensor | None = None,
    thumbnail: int | tuple[int, int] = 64,
    backend: str | None = None,
    **given: Any,
) -> Any:
    """What the pattern of each head looks like, without the pattern: sums and maxima over
    P_ij = exp(s_ij - lse_i), the weight of key j for query i, in one sweep over tiles of the scores.

    The scores s are attention's: scaled, capped, biased, in nats. A key that is hidden weighs 0. A sink is no key:
    its weight is missing in every sum. A query that sees no key has 0 everywhere, and max_logit -inf.

    Args:
        q, k: as `fastattn.attention` took them, (B, Hq, Lq, D) and (B, Hkv, Lk, D).
        lse: the log-sum-exps (B, Hq, Lq) that it returned (`return_lse=True`).
        v: values (B, Hkv, Lk, Dv), for value_norm and received_value_norm.
        want: names; each is a field of the result, shaped (B, Hq, queries) if by query, (B, Hq, Lk) if by key.
            By query i:

            - entropy: -sum_j P_ij log P_ij, in nats;
            - max_logit: the largest score of a key; max_weight: its weight;
            - sum_of_squares: sum_j P_ij^2, 1 over how many keys share the weight;
            - mean_distance: sum_j P_ij (diagonal - j), in keys; the diagonal of query i is key i + Lk - Lq;
            - top_keys: the `top` keys with the largest weights, `.keys` and `.weights` (B, Hq, queries, top);
            - mass: the weight inside the mask `within`, or on all keys: 1, less the sink's;
            - value_norm: sum_j P_ij ||v_j|| (with `output`, ||v_j W||);
            - match_mass: the weight on keys that match the query's label, see `match_mass`.

            By key j, over the queries asked for:

            - received: sum_i P_ij; max_received: max_i P_ij;
            - weighted_received: sum_i g_i P_ij, with g = `query_weights`;
            - received_value_norm: sum_i P_ij ||v_j||.

            Of the whole:

            - lag_profile: (B, Hq, Lq + Lk - 1), sum_i P_(i, diagonal - l) for the lags l from -(Lq - 1) up to
              Lk - 1: lag l stands at l + Lq - 1;
            - thumbnail: (B, Hq, rows, columns), the pattern in small: the weight that the queries of a row have on
              the keys of a column, on average. Rows add up to 1.
        queries: a slice or indices; other queries count nowhere. `slice(-w, None)` is the last w.
        top: how many keys top_keys has.
        within: one mask of fastattn.masks, or several: then mass is (masks, B, Hq, queries).
        labels: integers (B, Lk) for match_mass, token ids say.
        match: one of the kinds of `match_mass`, or several: then match_mass is (kinds, B, Hq, queries).
        query_weights: broadcasts to (B, Hq, queries).
        output: (Hq, Dv, E), what each head's values are multiplied by on the way to the stream.
        thumbnail: (rows, columns), or one number for both.
        backend: as attention's.
        given: whatever else attention was given (causal, scale, window, mask, bias, ...). The same, or the weights
            are not the ones that it used.
            Packed sequences (`attention_varlen`) are one batch entry: q.transpose(0, 1)[None] and so on, lse[None]
            and mask=masks.packed_sequences(cu_seqlens_q, cu_seqlens_k, causal).

    Returns:
        A named tuple with a field for each of `want`, in that order; fp32 (fp64 for fp64 inputs), no gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected. Weights of a query that add up
            to more than 1 raise, too: then lse belongs to other scores.

    Example:
        >>> q, k, v = (torch.randn(1, 4, 128, 64) for _ in range(3))
        >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
        >>> seen = attention_statistics(q, k, lse, want=("entropy", "received"), causal=True)
        >>> seen.entropy.shape, seen.received.shape
        (torch.Size([1, 4, 128]), torch.Size([1, 4, 128]))

    Source: entropy: Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse (2023);
    received: Zhang et al., H2O (2023), over the last queries: Li et al., SnapKV (2024); value norms: Kobayashi et
    al., Attention is Not Only a Weight (2020).
    """
    if spread.is_dtensor(q):
        asked_for = {
            "v": v, "want": want, "queries": queries, "top": top, "within": within, "labels": labels,
            "match": match, "query_weights": query_weights, "output": output, "thumbnail": thumbnail,
            "backend": backend,
        }  # fmt: skip
        return spread.of_dtensors["statistics"](
            attention_statistics, {"q": q, "k": k, "lse": lse}, asked_for, given
        )
    names = check_want(want)
    kinds = (match,) if isinstance(match, str) or callable(match) else tuple(match)
    call = _call("attention_statistics", q, k, lse, backend, given)
    chosen = check_queries(queries, q.shape[2])
    picked = Queries(chosen, q.shape[2])
    sums = _sums_for(names)
    asked, extra = _asked(call, names, picked, kinds, labels, query_weights, v, output, thumbnail)
    spec = StatisticsSpec(
        call.spec,
        tuple(name for name in SUMS if name in sums),
        picked.rows,
        arguments.integer("top", top, least=1) if "top_keys" in sums else 0,
        extra.thumbnail,
        extra.before,
    )
    with torch.no_grad(), without_autocast(q.device):
        asked = asked._replace(remainder=_remainder(call))
        found = operators.statistics(
            call.q, call.k, picked.only(call.lse), asked, spec, call.tensors, call.backend
        )
        if "mass" in found:
            _check_masses(found["mass"], call)
        if "mass" in names and within is not None:
            found["mass"] = _masses_within(call, asked.remainder, picked, within, given)
        return _fields(
            names, found, call.lse, asked, picked, single_kind=isinstance(match, str) or callable(match)
        )


def match_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    labels: Tensor,
    *,
    kind: Kind = "induction",
    queries: slice | Tensor | Sequence[int] | None = None,
    backend: str | None = None,
    **given: Any,
) -> Matches:
    """The weight of each query on the keys that match it. The queries are those of the last Lq positions.

    Args:
        q, k, lse, queries, backend, given: as `attention_statistics`'.
        labels: integers (B, Lk), the tokens say.
        kind: which keys j match query i, at position p = i + Lk - Lq:

            - "induction": labels[j - 1] == labels[p], 0 < j <= p: what came after this token before;
            - "duplicate": labels[j] == labels[p], j < p: where this token was before;
            - "previous": j == p - 1;
            - "first": j == 0, for p > 0;
            - a function of labels, returning two tensors of integers (B, Lk), `wanted` and `offered`: those with
              offered[j] == wanted[p], anywhere.

    Returns:
        mass (B, Hq, queries), and possible (B, queries): whether there is such a key, seen or not.

    Example:
        >>> q, k, v = (torch.randn(1, 4, 128, 64) for _ in range(3))
        >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
        >>> tokens = torch.randint(50, (1, 128))
        >>> match_mass(q, k, lse, tokens, kind="induction", causal=True).mass.shape
        torch.Size([1, 4, 128])

    Source: Olsson et al., In-context Learning and Induction Heads (2022), for induction and previous; Wang et al.,
    Interpretability in the Wild (2022), for duplicate.
    """
    if spread.is_dtensor(q):
        asked_for = {"labels": labels, "kind": kind, "queries": queries, "backend": backend}
        return spread.of_dtensors["statistics"](match_mass, {"q": q, "k": k, "lse": lse}, asked_for, given)
    check_kind("kind", kind)
    call = _call("match_mass", q, k, lse, backend, given)
    check_labels(labels, q, k)
    picked = Queries(check_queries(queries, q.shape[2]), q.shape[2])
    own, others, before = labels_of(labels, q.shape[2], (kind,))
    if kind in ("previous", "first"):
        mass = _mass_of_one_key(call, 0 if kind == "first" else None)
    else:
        spec = StatisticsSpec(call.spec, ("mass", "match_mass"), picked.rows, before=before)
        with torch.no_grad(), without_autocast(q.device):
            asked = StatisticsTensors(query_labels=own, key_labels=others, remainder=_remainder(call))
            lse = picked.only(call.lse)
            found = operators.statistics(call.q, call.k, lse, asked, spec, call.tensors, call.backend)
            _check_masses(found["mass"], call)
            mass = found["match_mass"][0]
    return Matches(picked.of(mass), picked.of(possible(own[0], others[0], before[0], k.shape[2])))


def gather_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    rows: int | slice | Tensor | Sequence[int],
    columns: int | slice | Tensor | Sequence[int],
    *,
    backend: str | None = None,
    **given: Any,
) -> Tensor:
    """Single weights P_ij = exp(s_ij - lse_i), exactly, or a window of the pattern.

    Args:
        q, k, lse, backend, given: as `attention_statistics`'.
        rows, columns: which queries and keys, negative ones counted from the end. Two tensors of integers
            broadcast, as in indexing: (n,) and (n,) are n pairs. Where one is a slice, all of the one meet all of
            the other: `gather_weights(q, k, lse, slice(0, 16), slice(0, 16))` is a window of 16 x 16.

    Returns:
        (B, Hq, *shape), fp32 (fp64 for fp64 inputs), without gradient; 0 where a key is hidden. Memory and time go
        with the number of pairs: the tiles of 128 x 64 scores that have one are computed.

    Example:
        >>> q, k, v = (torch.randn(1, 4, 128, 64) for _ in range(3))
        >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
        >>> gather_weights(q, k, lse, torch.arange(1, 128), torch.arange(127), causal=True).shape  # previous token
        torch.Size([1, 4, 127])
    """
    if spread.is_dtensor(q):
        asked_for = {"rows": rows, "columns": columns, "backend": backend}
        return spread.of_dtensors["statistics"](gather_weights, {"q": q, "k": k, "lse": lse}, asked_for, given)
    call = _call("gather_weights", q, k, lse, backend, given)
    row, column = _pairs(rows, columns, q, k)
    with torch.no_grad(), without_autocast(q.device):
        i, j = (t.flatten().to(q.device) for t in (row, column))
        found = _weights(call, i, j)
        _check_masses(found, call, call.lse[:, :, i])
        return found.reshape(*found.shape[:2], *row.shape)


class _Call(NamedTuple):
    """The scores that are looked at: what `attention` was given, checked."""

    q: Tensor
    k: Tensor
    lse: Tensor
    spec: AttentionSpec
    tensors: ScoreTensors
    backend: str | None


def _call(function: str, q: Tensor, k: Tensor, lse: Tensor, backend: str | None, given: dict[str, Any]) -> _Call:
    """Check what attention was given."""
    spread.refuse(function)
    dropout = given.get("dropout_p", 0.0)
    if not isinstance(dropout, int | float) or dropout:
        raise ValueError(f"dropout_p must be 0: statistics are of the weights before dropout; got {dropout!r}")
    # What attention takes and what changes no weight.
    other = ("dropout_p", "dropout_state", "invariant")
    options = {name: value for name, value in given.items() if name not in other}
    if unknown := [name for name in options if name not in _SCORE_OPTIONS]:
        arguments.refuse_keywords(function, unknown)
    backend = check_backend(backend)
    q, k = autocast(q, k)
    check_heads(q=q, k=k, v=k)
    check_lse(lse, q)
    options = {name: t.detach() if isinstance(t, Tensor) else t for name, t in options.items()}
    with torch.no_grad():
        q, spec, tensors = scores_asked(q.detach(), k.detach(), **options)
    return _Call(q, k.detach(), lse.detach(), spec, tensors, backend)


def _remainder(call: _Call) -> Tensor | None:
    """What the log-sum-exps lost by rounding (B, Hq, Lq), in nats; None if that is nothing.

    Where a bias puts all keys of a row at -1e9 or at the lowest finite number, float32 rounds the log-sum-exp to
    the maximum, and the weights exp(s - lse) of n equal scores add up to n. The remainder is log n."""
    if not adds_floats(call.tensors):
        return None
    sinks, rounded = call.tensors.sinks, is_rounded(call.lse)
    # A tracer has nothing to read.
    if not torch.compiler.is_compiling() and lasts(rounded) and not bool(rounded.any()):
        return None
    lse = call.lse.masked_fill(~rounded, float("inf"))
    spec = StatisticsSpec(call.spec, ("mass",), (0, call.q.shape[2]))
    mass = operators.statistics(call.q, call.k, lse, StatisticsTensors(), spec, call.tensors, call.backend)["mass"]
    _check_masses(mass, call)
    if sinks is not None:
        mass = mass + torch.exp(sinks[..., None] - lse)
    return mass.masked_fill(~rounded | (mass == 0.0), 1.0).log()


def _weights(call: _Call, rows: Tensor, columns: Tensor) -> Tensor:
    """The weights of the pairs (rows[n], columns[n]), (B, Hq, n)."""
    pairs = WeightsAsked(rows, columns, _remainder(call))
    return operators.weights(call.q, call.k, call.lse, pairs, call.spec, call.tensors, call.backend)


class _Extra(NamedTuple):
    """Fields of the spec that the thumbnail and the matches need."""

    thumbnail: tuple[int, int]
    before: tuple[int, ...]


def _sums_for(names: Sequence[str]) -> set[str]:
    """The sums from which all of these follow, and what the weights of each row add up to, which is checked."""
    sums = {name for name in names if name in SUMS}
    if "max_weight" in names:
        sums.add("max_logit")
    if "received_value_norm" in names:
        sums.add("received")
    return sums | {"mass"}


def _asked(
    call: _Call,
    names: Sequence[str],
    picked: Queries,
    kinds: Sequence[Kind],
    labels: Tensor | None,
    query_weights: Tensor | None,
    v: Tensor | None,
    output: Tensor | None,
    thumbnail: int | tuple[int, int],
) -> tuple[StatisticsTensors, _Extra]:
    """The tensors that statistics take beside attention's; what is needed and not given is an error."""
    q, k = call.q, call.k
    asked, extra = StatisticsTensors(), _Extra((0, 0), ())
    with torch.no_grad():
        if "match_mass" in names:
            labels = _needed("labels", labels, "match_mass")
            for kind in kinds:
                check_kind("match", kind)
            check_labels(labels, q, k)
            own, others, before = labels_of(labels, q.shape[2], kinds)
            asked, extra = asked._replace(query_labels=own, key_labels=others), extra._replace(before=before)
        if "weighted_received" in names:
            weights = _needed("query_weights", query_weights, "weighted_received")
            weights = check_query_weights(weights, q, picked.count)
            asked = asked._replace(query_weights=picked.spread(weights, 0.0))
        if "value_norm" in names or "received_value_norm" in names:
            asked = asked._replace(value_norms=_value_norms(_needed("v", v, "value_norm"), output, call))
        if "thumbnail" in names:
            rows, columns = check_thumbnail(thumbnail)
            # The n-th of the queries asked for, in the order in which q has them, is in row n * rows // count.
            number = torch.arange(picked.count, device=q.device) * rows // max(picked.count, 1)
            ordered = (
                Queries(picked.chosen.sort().values, picked.length)
                if isinstance(picked.chosen, Tensor)
                else picked
            )
            asked = asked._replace(row_bins=ordered.spread(number.to(torch.int32), 0))
            extra = extra._replace(thumbnail=(rows, columns))
    return asked, extra


def _needed(argument: str, value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"{argument} must be given for {name}, got None")
    return value


def _value_norms(v: Tensor, output: Tensor | None, call: _Call) -> Tensor:
    """||v_j W_h|| for each query head h, (B, Hq, Lk); W is the identity if there is none."""
    (v,) = autocast(v)
    check_heads(q=call.q, k=call.k, v=v)
    heads, work = call.q.shape[1], lse_dtype(v.dtype)
    v = v.detach().to(work)
    every = heads // max(v.shape[1], 1)
    if output is None:
        norms = v.norm(dim=-1).repeat_interleave(every, 1)
    else:
        check_beside("output", output, call.q, None)
        check_floating("output", output)
        if output.dim() != 3 or tuple(output.shape[:2]) != (heads, v.shape[3]):
            raise ValueError(f"output must have shape ({heads}, {v.shape[3]}, width), got {shape_of(output)}")
        output = output.detach().to(work)
        # In the Gram matrix of W the width of the stream is gone.
        gram = output @ output.mT
        values = v.repeat_interleave(every, 1)
        norms = ((values @ gram) * values).sum(-1).clamp(min=0.0).sqrt()
    lengths = call.tensors.key_lengths
    if lengths is not None:
        # What lies behind the length may be anything.
        there = torch.arange(v.shape[2], device=v.device) < lengths[:, None]
        norms = torch.where(there[:, None], norms, 0.0)
    return norms


def _mass_of_one_key(call: _Call, key: int | None) -> Tensor:
    """The weight of one key, or of the one before it, for each query (B, Hq, Lq); 0 for position 0."""
    queries, keys = call.q.shape[2], call.k.shape[2]
    rows = torch.arange(queries, device=call.q.device)
    place = rows + (keys - queries)
    columns = (place - 1).clamp(min=0) if key is None else torch.full_like(place, key)
    with torch.no_grad(), without_autocast(call.q.device):
        found = _weights(call, rows, columns)
        _check_masses(found, call)
        return found.masked_fill(place == 0, 0.0)


def _masses_within(
    call: _Call,
    remainder: Tensor | None,
    picked: Queries,
    within: Mask | Sequence[Mask],
    given: dict[str, Any],
) -> Tensor:
    """The weight inside masks: what rows add up to where both attention's mask and this one show a key. The
    remainder is attention's, which is of all keys that it sees."""
    several = [within] if isinstance(within, Mask) else list(within)
    if isinstance(given.get("mask"), Lowered):
        raise ValueError("mask is lowered: give the mask itself, so that it can be joined with within")
    masses = []
    for mask in several:
        if not isinstance(mask, Mask):
            raise TypeError(f"within must be a mask of fastattn.masks or several, got {type(mask).__name__}")
        if mask.repeats:
            raise ValueError(f"within must be a mask whose keys count once, got {mask!r}")
        joined = mask if given.get("mask") is None else given["mask"] & mask
        # call.q has the sign of a scale in it that is one number.
        scale = call.spec.scale if call.tensors.head_scale is None else call.tensors.head_scale
        options = {**given, "mask": joined, "scale": scale}
        inside = _call("attention_statistics", call.q, call.k, call.lse, call.backend, options)
        spec = StatisticsSpec(inside.spec, ("mass",), picked.rows)
        lse = picked.only(call.lse)
        asked = StatisticsTensors(remainder=remainder)
        found = operators.statistics(inside.q, inside.k, lse, asked, spec, inside.tensors, inside.backend)
        masses.append(found["mass"])
    return masses[0] if isinstance(within, Mask) else torch.stack(masses)


def _check_masses(mass: Tensor, call: _Call, lse: Tensor | None = None) -> None:
    """A ValueError if weights add up to more than 1, as they cannot with their own log-sum-exp."""
    if torch.compiler.is_compiling() or not lasts(mass) or not mass.numel():
        return
    lse = call.lse if lse is None else lse
    # Products of rounded inputs, and the rounding of log-sum-exps far from 0: an error e of one makes its row add
    # up to exp(e).
    coarse = call.q.dtype in (torch.float16, torch.bfloat16) or call.spec.precision != "ieee"
    slack = (2e-2 if coarse else 1e-3) + torch.expm1(8 * torch.finfo(lse.dtype).eps * lse.abs())
    if bool((mass > 1.0 + slack).any()):
        raise ValueError(
            "lse must be of these scores: with it the weights exp(score - lse) of a query add up to "
            f"{float(mass.max()):.4g}, more than 1. Give the lse that attention returned for the same q, k, mask "
            "and options"
        )


def _fields(
    names: Sequence[str],
    found: dict[str, Tensor],
    lse: Tensor,
    asked: StatisticsTensors,
    picked: Queries,
    single_kind: bool,
) -> Any:
    """The result, field by field."""
    fields: dict[str, Any] = {}
    for name in names:
        if name == "max_weight":
            # A query that saw nothing has -inf less -inf.
            log = found["max_logit"] - lse
            log = log if asked.remainder is None else log - asked.remainder
            fields[name] = picked.of(torch.exp(log).masked_fill(found["max_logit"] == float("-inf"), 0.0))
        elif name == "top_keys":
            fields[name] = TopKeys(picked.of(found["top_key_numbers"], 2), picked.of(found["top_keys"], 2))
        elif name == "received_value_norm":
            assert asked.value_norms is not None
            fields[name] = found["received"] * asked.value_norms
        elif name == "thumbnail":
            assert asked.row_bins is not None
            ones = picked.spread(lse.new_ones(picked.count), 0.0)
            counts = lse.new_zeros(found[name].shape[2]).index_add_(0, asked.row_bins.long(), ones)
            fields[name] = found[name] / counts.clamp(min=1.0)[:, None]
        elif name == "match_mass":
            fields[name] = picked.of(found[name][0] if single_kind else found[name])
        elif name in ("received", "max_received", "weighted_received", "lag_profile"):
            fields[name] = found[name]
        else:
            fields[name] = picked.of(found[name])
    return _named(tuple(names))(**fields)


@functools.cache
def _named(names: tuple[str, ...]) -> Any:
    return namedtuple("AttentionStatistics", names)


def _pairs(rows: Any, columns: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pairs, int64 of one shape, counted from 0."""
    found = []
    for name, value, length in (("rows", rows, q.shape[2]), ("columns", columns, k.shape[2])):
        if isinstance(value, slice):
            found.append(torch.tensor(range(length)[value], dtype=torch.int64))
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            value = torch.tensor(value)
        indices = arguments.integers(name, value)
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be integers or a slice, got {indices.dtype}")
        indices = indices.to("cpu", torch.int64)
        if indices.numel() and not -length <= int(indices.min()) <= int(indices.max()) < length:
            raise ValueError(
                f"{name} must be from {-length} to {length - 1}, got {int(indices.min())} to {int(indices.max())}"
            )
        found.append(indices % max(length, 1))
    row, column = found
    if isinstance(rows, slice) or isinstance(columns, slice):
        row, column = row[(...,) + (None,) * column.dim()], column
    try:
        row, column = torch.broadcast_tensors(row, column)
    except RuntimeError as problem:
        raise ValueError(
            f"rows and columns must broadcast against each other, got {shape_of(row)} and {shape_of(column)}"
        ) from problem
    return row, column
