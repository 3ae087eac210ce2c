"""Invariant attention on a CPU by PyTorch's flash attention, for rows that see the first keys of their sequence.

The keys that a row sees before its last tile of them are one call, and those in the last tile are another, padded
to a whole tile and masked. Both are merged by their log-sum-exps. So the sizes of a row's products follow from how
many keys it sees alone, but for the number of rows. A trial shows whether this CPU gives a row the same bits among
few rows and among many.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.core.attention.spec import AttentionSpec, ScoreTensors
from fastattn.core.autocast import without_autocast
from fastattn.ground.modes import outside_modes

TILE = 256
# A CPU's products of fewer rows have another order of sums. The operator takes 32 rows or a multiple of that at a
# time: what remains of a multiple of 4 is 4 at least.
ROWS = 4
# So many queries or fewer are computed with those of the other heads that share their key head.
FEW_QUERIES = 16
# PyTorch computes functions of each element by vectors, on a CPU. Fewer elements it computes with other last bits.
VECTORS = 64
# A tensor's rows are read where they lie if they begin on multiples of so many bytes.
ALIGNED = 64

_flash = torch._scaled_dot_product_flash_attention_for_cpu


class Run(NamedTuple):
    """Neighbouring queries of a sequence that see as many tiles of keys. tiles: how many before the last one; -1
    for queries that see nothing; None for those that do not see the first key."""

    rows: slice
    tiles: int | None


def serves(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Whether rows of this call may be computed here. It depends on nothing that a batch or a chunk changes."""
    if q.device.type != "cpu" or q.shape[3] != v.shape[3] or spec.softcap or k.shape[1] == 0:
        return False
    if q.dtype not in (torch.float32, torch.float64):  # PyTorch's takes ten times as long in half precision
        return False
    if any(getattr(tensors, name) is not None for name in _SHAPING):
        return False
    if tensors.bias is not None and tensors.bias.dtype != torch.bool:
        return False
    return _agrees(q.shape[3], q.dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())


_SHAPING = ("alibi_slopes", "relative_bias", "sinks", "head_scale", "mask", "dropout_state")


def runs(queries: int, keys: int, shift: int, spec: AttentionSpec) -> Iterator[Run]:
    """Those of a sequence whose query i stands at key i + shift."""
    left, right, i = spec.left, spec.right, 0
    # The first query that does not see the first key.
    end = queries if left is None else min(queries, max(0, left - shift + 1))
    while i < end:
        stop = keys if right is None else min(i + shift + right + 1, keys)
        tiles = (stop - 1) // TILE if stop > 0 else -1
        j = end
        if right is not None and keys > (tiles + 1) * TILE:
            j = min(end, (tiles + 1) * TILE - shift - right)
        yield Run(slice(i, j), tiles)
        i = j
    if end < queries:
        yield Run(slice(end, queries), None)


def runs_of(bounds: Tensor) -> Iterator[Run]:
    """Those of a sequence whose queries see the keys within bounds (2, queries)."""
    tiles = ((bounds[1] + (TILE - 1)) // TILE - 1).masked_fill(bounds[0] > 0, -2)
    numbers: list[int] = tiles.masked_fill(bounds[0] >= bounds[1], -1).tolist()
    first = 0
    for number, group in itertools.groupby(numbers):
        last = first + len(list(group))
        yield Run(slice(first, last), None if number == -2 else number)
        first = last


def aligned(t: Tensor) -> Tensor:
    """Rows (batch, heads, length, width), where they lie if each begins on a multiple of ALIGNED bytes; else in a
    copy, in which each head does."""
    size, (batch, heads, length, width) = t.element_size(), t.shape
    distances = (stride * size % ALIGNED for n, stride in zip(t.shape[:3], t.stride(), strict=False) if n > 1)
    if t.stride(3) == 1 and t.data_ptr() % ALIGNED == 0 and not any(distances):
        return t
    copy = t.new_empty((batch, heads, -(-length // ALIGNED) * ALIGNED, width))[:, :, :length]
    return copy.copy_(t)


def of_run(
    q: Tensor, k: Tensor, v: Tensor, tiles: int, stops: Tensor | int, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse of the queries of a run, q (1, Hq, rows, D), all of them; k and v: `aligned`, of the sequence.
    stops: before which key each sees all, (rows,), or one number for all."""
    (_, heads, count, width), key_heads = q.shape, k.shape[1]
    by_group = count <= FEW_QUERIES
    group = heads // key_heads
    rows = q.reshape(key_heads, 1, group * count, width) if by_group else q.reshape(key_heads, group, count, width)
    missing = -rows.shape[2] % ROWS
    rows = F.pad(rows, (0, 0, 0, missing)) if missing else aligned(rows)
    k, v = (t[0][:, None].expand(-1, rows.shape[1], -1, -1) for t in (k, v))
    first = tiles * TILE
    mask = _mask(stops, first, k, group if by_group else 1, missing)
    last_k, last_v = (_whole_tile(t[:, :, first : first + TILE]) for t in (k, v))
    out, lse = _flash(rows, last_k, last_v, attn_mask=mask, scale=scale)
    if tiles:
        before = _flash(rows, k[:, :, :first], v[:, :, :first], scale=scale)
        out, lse = _merged(*before, out, lse)
    if missing:
        out, lse = out[:, :, :-missing], lse[:, :, :-missing]
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _mask(stops: Tensor | int, first: int, k: Tensor, group: int, missing: int) -> Tensor | None:
    """What is added to the scores of the tile that begins at key `first`; None if all see all of it."""
    if isinstance(stops, int):
        if stops >= first + TILE:
            return None
        mask = k.new_zeros(TILE)
        mask[stops - first :] = float("-inf")
        return mask[None, None, None]
    hidden = torch.arange(first, first + TILE) >= stops[:, None]
    mask = k.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    mask = mask.repeat(group, 1) if group > 1 else mask
    return (F.pad(mask, (0, 0, 0, missing)) if missing else mask)[None, None]


def _whole_tile(t: Tensor) -> Tensor:
    missing = TILE - t.shape[2]
    return F.pad(t, (0, 0, 0, missing)) if missing else t


def _merged(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts of the rows. A product and a sum by themselves round alike with vectors and without."""
    shape, size = lse.shape, lse.numel()
    missing = -size % VECTORS
    lse, more_lse = (F.pad(t.reshape(-1), (0, missing)) if missing else t.reshape(-1) for t in (lse, more_lse))
    weight = torch.sigmoid(more_lse - lse)[:size].view(shape)[..., None]
    out = (out * (1.0 - weight)).add_(more.mul_(weight))
    return out, torch.logaddexp(lse, more_lse)[:size].view(shape)


@functools.lru_cache(maxsize=256)
def _agrees(width: int, dtype: torch.dtype, threads: int, precision: str) -> bool:
    """Whether this CPU gives a row the same bits among few rows and among many, in any place, with a mask that
    hides nothing and without, for keys that lie one after another or with those of other heads between them: tried
    once with random numbers, since the order of sums depends on sizes alone."""
    generator = torch.Generator().manual_seed(0)
    with outside_modes(), torch.no_grad(), without_autocast(torch.device("cpu")):
        q, k, v = (
            torch.randn(1, 2, n, width, generator=generator, dtype=dtype) for n in (800, 3 * TILE, 3 * TILE)
        )
        apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
        for keys in (TILE, 3 * TILE):
            every, every_lse = _flash(q, k[:, :, :keys], v[:, :, :keys])
            mask = q.new_zeros(1, 1, 1, keys)
            for first, count in _TRIED:
                rows = q[:, :, first : first + count].contiguous()
                ways: tuple[tuple[Tensor, Tensor, Tensor | None], ...] = (
                    (k, v, None), (apart[0], apart[1], None), (k, v, mask),
                )  # fmt: skip
                for key, value, beside in ways:
                    out, lse = _flash(rows, key[:, :, :keys], value[:, :, :keys], attn_mask=beside)
                    here = slice(first, first + count)
                    if not (torch.equal(out, every[:, :, here]) and torch.equal(lse, every_lse[:, :, here])):
                        return False
    return True


# The first row and the number of rows of trials: what the operator takes at a time, and remains of it.
_TRIED = ((0, 4), (5, 4), (37, 8), (3, 12), (0, 28), (100, 32), (1, 36), (0, 196), (9, 256), (200, 260))
