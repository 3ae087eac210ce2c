"""One rank's share of attention: its queries on some keys, forward and backward, with what was merged so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.core.attention.dropout import state_of_part
from fastattn.core.attention.functional import attention, attention_backward, merge_states
from fastattn.distributed.dealing import runs
from fastattn.distributed.visibility import Part, Visibility
from fastattn.ground.checks import lse_dtype


class Learned(NamedTuple):
    """Tensors beside q, k and v that have gradients, or None.

    bias: (B or 1, Hq or 1, n or 1, N or 1), n the rank's queries and N all keys.
    relative_bias (B, Hq, 2 R + 1), sinks (B, Hq), head_scale (B, Hq): in the log-sum-exp's dtype.
    """

    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    sinks: Tensor | None = None
    head_scale: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """What else `fastattn.attention` takes, the same for all parts.

    alibi_slopes (B, Hq), key_lengths (B,) and dropout_state (B, 2 or 5) of the whole sequence: tensors or None.
    """

    scale: float
    softcap: float
    dropout_p: float
    precision: str | None
    backend: str | None
    alibi_slopes: Tensor | None
    key_lengths: Tensor | None
    dropout_state: Tensor | None


def parts_of(
    visibility: Visibility,
    queries: Tensor,
    keys: Tensor,
    device: torch.device,
    *,
    by_run: bool = False,
) -> list[Part]:
    """The calls of attention that compute these queries on these keys.

    by_run: a call takes contiguous queries and keys only, because what it computes depends on positions.
    """
    if not by_run:
        part = visibility.part(queries, keys, device)
        return [] if part is None else [part]
    found, row = [], 0
    for query_run in runs(queries):
        column = 0
        for key_run in runs(keys):
            part = visibility.part(query_run, key_run, device)
            if part is not None:
                moved = _moved(part.rows, row), _moved(part.columns, column)
                found.append(replace(part, rows=moved[0], columns=moved[1]))
            column += len(key_run)
        row += len(query_run)
    return found


def _moved(indices: slice, by: int) -> slice:
    return slice(indices.start + by, indices.stop + by)


class Share:
    """One rank's queries, and what is computed of them: the output and log-sum-exp so far, or the gradients."""

    def __init__(self, q: Tensor, value_width: int, options: Options, learned: Learned) -> None:
        self.q, self.options, self.learned = q, options, learned
        self.dtype = lse_dtype(q.dtype)
        # A sink is a key without a value: the state before any key.
        self.out = q.new_zeros((*q.shape[:3], value_width), dtype=self.dtype)
        self.lse = q.new_full(q.shape[:3], float("-inf"), dtype=self.dtype)
        if learned.sinks is not None:
            self.lse.copy_(learned.sinks[..., None])

    def attend(self, parts: Sequence[Part], k: Tensor, v: Tensor) -> None:
        """Merge the attention to these keys into the state. Columns of the parts are those of k and v."""
        for part in parts:
            rows = (slice(None), slice(None), part.rows)
            q, k_part, v_part = self.q[rows], k[:, :, part.columns], v[:, :, part.columns]
            out, lse = attention(q, k_part, v_part, **self._keywords(part, q, k_part), return_lse=True)
            self.out[rows], self.lse[rows] = merge_states(self.out[rows], self.lse[rows], out.to(self.dtype), lse)

    def _keywords(self, part: Part, q: Tensor, k: Tensor) -> dict[str, Any]:
        options, learned = self.options, self.learned
        lengths = options.key_lengths
        if lengths is not None:
            lengths = torch.searchsorted(part.key_positions, lengths.long())
        state = options.dropout_state
        if state is not None:
            state = state_of_part(state, query=part.first_query, key=part.first_key)
        table = None
        if learned.relative_bias is not None or options.alibi_slopes is not None:
            table = distance_table(learned.relative_bias, options.alibi_slopes, *self._distances(part, q, k))
        return {
            "scale": options.scale if learned.head_scale is None else learned.head_scale,
            "softcap": options.softcap,
            "precision": options.precision,
            "backend": options.backend,
            "dropout_p": options.dropout_p,
            "dropout_state": state,
            "mask": part.mask,
            "key_lengths": lengths,
            "bias": None if learned.bias is None else _bias_of(learned.bias, part),
            "relative_bias": table,
        }

    @staticmethod
    def _distances(part: Part, q: Tensor, k: Tensor) -> tuple[int, int]:
        """The shift of a call, and the largest distance from the diagonal in it."""
        assert part.shift is not None
        return part.shift, max(q.shape[2], k.shape[2]) - 1


class Gradients:
    """The gradients of a rank's queries and learned tensors, summed over the parts of the keys."""

    def __init__(self, share: Share, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> None:
        """out, lse: the merged ones."""
        self.share, self.dout, self.out, self.lse, self.dlse = share, dout, out, lse, dlse
        self.q = torch.zeros_like(share.q, dtype=share.dtype)
        learned = share.learned
        self.learned = Learned(*(_sum_for(t) for t in learned))
        if learned.sinks is not None:
            self.learned = self.learned._replace(sinks=self._of_sinks(learned.sinks))

    def _of_sinks(self, sinks: Tensor) -> Tensor:
        """A sink has weight exp(sink - lse) and no value, so its gradient is that weight times dlse - delta."""
        delta = (self.dout.to(self.share.dtype) * self.out.to(self.share.dtype)).sum(-1)
        weight = torch.exp(sinks[..., None] - self.lse).masked_fill(self.lse == float("-inf"), 0.0)
        return (weight * ((0 if self.dlse is None else self.dlse) - delta)).sum(-1)

    def of_keys(self, parts: Sequence[Part], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add what comes from these keys, and return their own gradients, in the log-sum-exp's dtype."""
        dk, dv = (torch.zeros_like(t, dtype=self.share.dtype) for t in (k, v))
        for part in parts:
            rows, columns = (slice(None), slice(None), part.rows), (slice(None), slice(None), part.columns)
            q, dout, out, lse = (t[rows] for t in (self.share.q, self.dout, self.out, self.lse))
            dlse = None if self.dlse is None else self.dlse[rows]
            k_part, v_part = k[columns], v[columns]
            keywords = self.share._keywords(part, q, k_part)
            dq, dk_part, dv_part, *beside = attention_backward(
                dout, q, k_part, v_part, out, lse, dlse=dlse, **keywords
            )
            self.q[rows] += dq
            dk[columns] += dk_part
            dv[columns] += dv_part
            self._add(part, q, k_part, keywords, beside)
        return dk, dv

    def _add(self, part: Part, q: Tensor, k: Tensor, keywords: dict[str, Any], beside: list[Tensor]) -> None:
        """Add the gradients of the learned tensors, which come in this order."""
        own: Any = self.learned
        given = self.share.learned
        if given.bias is not None and given.bias.is_floating_point():
            _add_bias(own.bias, beside.pop(0), part)
        if keywords["relative_bias"] is not None:
            of_table = beside.pop(0)
            if given.relative_bias is not None:
                own.relative_bias.add_(
                    of_relative_bias(of_table, given.relative_bias, *self.share._distances(part, q, k))
                )
        if given.head_scale is not None:
            own.head_scale.add_(beside.pop(0))


def _sum_for(t: Tensor | None) -> Tensor | None:
    """Zeros in which the gradient of a tensor is summed; None if it has none."""
    if t is None or not t.is_floating_point():
        return None
    return torch.zeros(t.shape, dtype=lse_dtype(t.dtype), device=t.device)


def _bias_of(bias: Tensor, part: Part) -> Tensor:
    """The bias of a part's queries and keys."""
    if bias.shape[2] > 1:
        bias = bias[:, :, part.rows]
    if bias.shape[3] > 1:
        bias = bias.index_select(3, part.key_positions)
    return bias


def _add_bias(total: Tensor | None, gradient: Tensor, part: Part) -> None:
    assert total is not None
    if total.shape[2] > 1:
        total = total[:, :, part.rows]
    gradient = gradient.to(total.dtype)
    if total.shape[3] > 1:
        total.index_add_(3, part.key_positions, gradient)  # each position once, so the order is fixed
    else:
        total.add_(gradient)


def distance_table(relative_bias: Tensor | None, slopes: Tensor | None, shift: int, radius: int) -> Tensor:
    """What is added to scores at the distances -radius to radius of a call: (B, Hq, 2 radius + 1)."""
    terms = []
    if relative_bias is not None:
        terms.append(_clamped(relative_bias, shift - radius, 2 * radius + 1))
    if slopes is not None:
        distance = torch.arange(shift - radius, shift + radius + 1, device=slopes.device)
        terms.append(-slopes[..., None] * distance.abs())
    return sum(terms[1:], terms[0])


def _clamped(table: Tensor, first: int, count: int) -> Tensor:
    """The values of a table at `count` distances from `first` on; distances beyond it take its first or its last
    value. The gradient of an expanded value is a sum in a fixed order, unlike that of an index."""
    width = table.shape[-1]
    begin = first + width // 2
    before = min(max(-begin, 0), count)
    after = min(max(begin + count - width, 0), count)
    inside = table[..., max(begin, 0) : max(begin, 0) + count - before - after]
    sides = (table[..., i : i + 1].expand(*table.shape[:-1], n) for i, n in ((0, before), (width - 1, after)))
    head, tail = sides
    return torch.cat((head, inside, tail), -1)


def of_relative_bias(gradient: Tensor, relative_bias: Tensor, shift: int, radius: int) -> Tensor:
    """The gradient of a relative bias, from that of a call's table."""
    with torch.enable_grad():
        leaf = relative_bias.detach().requires_grad_()
        table = _clamped(leaf, shift - radius, 2 * radius + 1)
        return torch.autograd.grad(table, leaf, gradient.to(table.dtype))[0]
