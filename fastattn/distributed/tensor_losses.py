"""`fastattn.linear_cross_entropy` of DTensors: tokens or classes are shared out, see tensors.py."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor, Replicate

from fastattn.core import spread
from fastattn.core.loss.functional import Asked, computed
from fastattn.core.loss.spec import LossTensors
from fastattn.distributed.loss import Among
from fastattn.distributed.tensors import dims_of, local_part, own_range, rows_of, sharded_dim, split_of
from fastattn.ground.checks import refuse_tangents

CLASSES = "classes"


def linear_cross_entropy(tensors: Any, asked: Asked) -> Any:
    """The loss. A reduced one is one number, the same on all ranks. tensors: LossTensors."""
    x, w, b, target, weight = tensors
    refuse_tangents("linear_cross_entropy of DTensors", {"input": x, "linear_weight": w, "linear_bias": b})
    kinds, mesh = rows_of(x, "input"), x.device_mesh
    split = split_of(x, kinds, {}, (("linear_weight", w), ("linear_bias", b)))
    for dimension in range(mesh.ndim):
        placed = sharded_dim(w, dimension)
        if placed == 0 and kinds[dimension] is None and CLASSES not in kinds:
            kinds[dimension] = CLASSES
        elif placed is not None:
            raise ValueError(
                "linear_weight must be replicated, or sharded by its rows over one dimension of the mesh, which "
                f"does not share out input; got {w.placements} and {x.placements}"
            )
    dims = dims_of([kind for kind in kinds if kind != CLASSES])
    if asked.shift and x.dim() - 2 in dims.values():
        raise ValueError(
            "shift must be False if the tokens of a sequence are shared out, since the next token of a shard's "
            "last one is on another rank: shift the target before you shard it"
        )
    split = split_of(x, kinds, dims, ())
    if CLASSES in kinds:
        split.ranges[CLASSES] = own_range(w, 0)
        _check_classes(w, mesh.size(kinds.index(CLASSES)))
    of_target = dims | ({CLASSES: -1} if target.is_floating_point() else {})
    own = LossTensors(
        # The ranks that share the classes sum up its gradient themselves.
        local_part(x, x.placements),
        split.local("linear_weight", w, {CLASSES: 0}),
        split.local("linear_bias", b, {CLASSES: 0}),
        split.local("target", target, of_target),
        split.local("weight", weight, {CLASSES: 0}),
    )
    shares = [d for d, kind in enumerate(kinds) if kind not in (None, CLASSES)]
    among = Among(
        mesh.get_group(kinds.index(CLASSES)) if CLASSES in kinds else None,
        [mesh.get_group(d) for d in shares],
        shares_classes=CLASSES in kinds,
    )
    results = computed(own, asked, among)
    loss, *beside = results if isinstance(results, tuple) else (results,)
    shape = (*x.shape[:-2], max(x.shape[-2] - 1, 0)) if asked.shift else x.shape[:-1]
    if asked.reduction != "none":
        loss = split.whole(loss, (), {}, CLASSES).redistribute(placements=[Replicate()] * mesh.ndim)
    else:
        loss = split.whole(loss, shape, dims, CLASSES)
    return (loss, *(split.whole(t, shape, dims, CLASSES) for t in beside)) if beside else loss


def _check_classes(w: DTensor, ranks: int) -> None:
    if -(-w.shape[0] // ranks) * (ranks - 1) >= w.shape[0]:
        raise ValueError(f"linear_weight must have classes for each of the {ranks} ranks, got {w.shape[0]} in all")


spread.of_dtensors["linear_cross_entropy"] = linear_cross_entropy
