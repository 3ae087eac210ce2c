"""Tilings that `fastattn prove` found faster on this GPU than those of the launch tables, for plain attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from fastattn.core import plans, proofs
from fastattn.core.attention.spec import AttentionSpec, ScoreTensors
from fastattn.kernels.launch import Tiling

# The launch tables whose rows decide how fast a direction is.
TABLES = {"forward": ("ATTENTION_FORWARD",), "backward": ("ATTENTION_DKDV", "ATTENTION_DQ")}

_tried: Mapping[str, Tiling] | None = None


def tiling_of(numbers: proofs.Tiling) -> Tiling:
    """From what a proof record says."""
    block_m, block_n, warps, stages, ahead = numbers
    return Tiling(block_m, block_n, warps, stages, ahead=ahead)


def numbers_of(tiling: Tiling) -> proofs.Tiling:
    """As a proof record says it."""
    return tiling.block_m, tiling.block_n, tiling.warps, tiling.stages, tiling.ahead


def chosen(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: ScoreTensors, direction: str
) -> Mapping[str, Tiling]:
    """By the names of launch tables, what serves such a call in place of their rows."""
    if _tried is not None:
        return _tried
    record = proofs.record_of(q.device)
    if record is None or not _is_plain(spec, tensors):
        return {}
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    about = "causal" if spec.causal else "full", str(q.dtype).removeprefix("torch.")
    row = record.tiled.get((direction, *about, q.shape[3], proofs.size_class("attention", scores)))
    if row is None or q.shape[3] != v.shape[3]:
        return {}
    return {table: tiling_of(numbers) for table, numbers in row.tilings.items()}


def _is_plain(spec: AttentionSpec, tensors: ScoreTensors) -> bool:
    """Whether a call is causal or full, and nothing else."""
    shaped = spec.window != (None, None) or spec.softcap or spec.dropout or spec.mask is not None
    return not shaped and spec.precision == "ieee" and all(t is None for t in tensors)


@contextlib.contextmanager
def trying(tilings: Mapping[str, Tiling]) -> Iterator[None]:
    """Inside, these serve in place of the tables' rows, in every call of attention, whatever the record says."""
    global _tried
    before, _tried = _tried, tilings
    plans.forget()
    try:
        yield
    finally:
        _tried = before
        plans.forget()
