"""Statistics of attention of DTensors: batch or heads are shared out, see tensors.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from fastattn.core import spread
from fastattn.core.attention.spec import attention_spec
from fastattn.core.statistics.spec import Matches, TopKeys
from fastattn.distributed.tensors import (
    BATCH,
    HEADS,
    Split,
    key_heads_of,
    local_keys,
    local_part,
    own_mask,
    score_tensors_of,
    sharded_dim,
    split_of,
)
from fastattn.distributed.visibility import whole_mask
from fastattn.masks import Lowered, Mask

_PLACED = {(None, None, None): None, (0, 0, 0): BATCH, (1, 1, 1): HEADS, (1, None, 1): HEADS}
_SCORE_TENSORS = ("key_lengths", "dropout_state", "bias", "alibi_slopes", "relative_bias", "sinks", "scale")


def statistics(
    function: Callable[..., Any], main: dict[str, Any], own: dict[str, Any], given: dict[str, Any]
) -> Any:
    """attention_statistics, match_mass or gather_weights of these q, k and lse, of this rank's heads.

    own: the function's other arguments. given: what attention was given.
    """
    q, k, lse = main["q"], main["k"], main["lse"]
    for name, t in main.items():
        if not isinstance(t, DTensor) or t.device_mesh != q.device_mesh:
            raise TypeError(f"{name} must be a DTensor on q's mesh, since q is one; got {type(t).__name__}")
    kinds = []
    for dimension in range(q.device_mesh.ndim):
        found = tuple(sharded_dim(t, dimension) for t in main.values())
        if found not in _PLACED:
            raise ValueError(
                "q, k and lse must be sharded together, all by batch or all by heads (k may be replicated), or be "
                f"replicated; got {', '.join(str(t.placements) for t in main.values())}"
            )
        kinds.append(_PLACED[found])
    split = split_of(q, kinds, {BATCH: 0, HEADS: 1}, ())
    keys = key_heads_of(q, k, kinds, split)
    local = {
        "q": local_part(q, q.placements), "k": local_keys(k, kinds, keys), "lse": local_part(lse, lse.placements)
    }  # fmt: skip
    options = dict.fromkeys(_SCORE_TENSORS) | given
    local |= {n: t for n, t in {**given, **score_tensors_of(split, q, options, 0.0)}.items() if n in given}
    spec = attention_spec(
        q, k, k, causal=given.get("causal", False), scale=None, window=given.get("window"), dropout_p=0.0
    )
    within, mask = own.get("within"), given.get("mask")
    if within is None:
        local |= own_mask(split, q, k, (spec.left, spec.right), mask)
    else:
        for name, each in (("within", within), ("mask", mask)):
            _check_same_for_all(name, each, q, k)
    results = function(**local, **_own(split, own, k, keys))
    if isinstance(results, Matches):
        return Matches(_whole(split, "mass", results.mass, q), _whole(split, "possible", results.possible, q))
    if isinstance(results, Tensor):
        # (B, Hq, ...), whatever the shape of the pairs.
        return split.whole(results, (*q.shape[:2], *results.shape[2:]), {BATCH: 0, HEADS: 1})
    return type(results)(*(_whole(split, name, t, q) for name, t in results._asdict().items()))


def _own(split: Split, own: dict[str, Any], k: DTensor, keys: tuple[int, int] | None) -> dict[str, Any]:
    """This rank's parts of a function's other arguments."""
    found = dict(own)
    if (v := own.get("v")) is not None:
        if not isinstance(v, DTensor) or v.placements != k.placements:
            raise ValueError(
                f"v must be a DTensor, sharded as k: {k.placements}; got {getattr(v, 'placements', v)}"
            )
        found["v"] = local_keys(v, split.kinds, keys)
    if (labels := own.get("labels")) is not None:
        found["labels"] = split.local("labels", labels, {BATCH: 0})
    if (weights := own.get("query_weights")) is not None:
        dims = {kind: dim for kind, dim in ((BATCH, -3), (HEADS, -2)) if weights.dim() >= -dim}
        found["query_weights"] = split.local("query_weights", weights, dims)
    if (output := own.get("output")) is not None:
        found["output"] = split.local("output", output, {HEADS: 0})
    return found


def _whole(split: Split, name: str, t: Any, q: DTensor) -> Any:
    """A field of a result as a DTensor."""
    if isinstance(t, TopKeys):
        return TopKeys(*(_whole(split, "top_keys", each, q) for each in t))
    if name == "possible":
        return split.whole(t, (q.shape[0], *t.shape[1:]), {BATCH: 0}, HEADS)
    # Several masks or kinds of matches come before batch and heads.
    first = 1 if name in ("mass", "match_mass") and t.dim() == 4 else 0
    return split.whole(
        t, (*t.shape[:first], *q.shape[:2], *t.shape[first + 2 :]), {BATCH: first, HEADS: first + 1}
    )


def _check_same_for_all(name: str, masks: Any, q: DTensor, k: DTensor) -> None:
    """Raise ValueError for masks that differ by batch element or head. They are joined later, and only a joined
    mask could be cut."""
    each: Sequence[Any] = masks if isinstance(masks, list | tuple) else (masks,)
    for mask in each:
        if isinstance(mask, Mask) and not isinstance(mask, Lowered):
            lowered = whole_mask((*q.shape[:2], q.shape[2], k.shape[2], q.device), (None, None), mask)
            patterns = (1, 1) if lowered.lists is None else tuple(lowered.lists.pattern.shape)
            of_rows = (lowered.intervals, lowered.key_lengths)
            if patterns != (1, 1) or any(t is not None and t.shape[0] > 1 for t in of_rows):
                raise ValueError(
                    f"{name} must be the same for all batch elements and heads if DTensors are asked for the mass "
                    "within a mask"
                )


spread.of_dtensors["statistics"] = statistics
