"""fastattn's functions on DTensors: each rank computes its shards, and nothing is gathered.

What each dimension of the mesh may share out:

| function | placements | result |
|---|---|---|
| attention | q, k, v all Shard(0): batch | Shard(0) |
| attention | q, k, v all Shard(1), or q alone with k and v replicated: heads, groups stay whole | Shard(1) |
| attention | q Shard(2), k and v replicated: queries, without a mask or causal | Shard(2) |
| mlp, gated_mlp | x Shard(any but the last), weights replicated | as x |
| mlp, gated_mlp | x replicated; weights and biases of hidden units Shard(0), last weight Shard(1) | Partial |
| layer_norm, rms_norm | x Shard(any but the last), weights replicated | as x |
| prepare_heads | x Shard(0), Shard(1) or Shard(2) | as x |
| linear_cross_entropy | input and target Shard(any but the last): tokens | as input; one number: replicated |
| linear_cross_entropy | linear_weight Shard(0): classes | replicated |
| attention_with_cache | queries, caches and new keys all Shard(0) (no pages) or all Shard(1) | as q |
| lens.attention_statistics, match_mass, gather_weights | q, k and lse all Shard(0) or all Shard(1) | as q |

Or all replicated. Any other placement is refused. Tensors beside the main ones (biases, slopes, lengths) are
replicated, or sharded with what they belong to. A plain tensor stands for the whole one, and must not need a
gradient.

Forward mode works with `forward_ad.make_dual` of DTensors, but for losses; torch.func.jvp computes some of it and
refuses the rest. Gradients of tangents are computed after the `dual_level` is left; tangents of gradients are
refused. PyTorch (2.13) has no rule for an operator with which it makes a dual DTensor; propagation.py gives it
one. Some of PyTorch's own operators, such as x * y, raise its AssertionError for dual DTensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fastattn.core import spread
from fastattn.core.attention.dropout import dropout_state as fresh_dropout_state
from fastattn.core.attention.dropout import state_of_part
from fastattn.core.attention.functional import attention as attention_here
from fastattn.core.attention.spec import attention_spec
from fastattn.core.heads.functional import prepare_heads as prepare_heads_here
from fastattn.core.mlp.functional import gated_mlp as gated_mlp_here
from fastattn.core.mlp.functional import mlp as mlp_here
from fastattn.core.norm.functional import layer_norm as layer_norm_here
from fastattn.core.norm.functional import rms_norm as rms_norm_here
from fastattn.distributed.exchange import broadcast, ranks_of
from fastattn.distributed.visibility import whole_mask
from fastattn.ground.checks import refuse_tangents

BATCH, HEADS, LENGTH, HIDDEN = "batch", "heads", "length", "hidden"


@dataclass(frozen=True)
class Split:
    """What each dimension of a mesh shares out: the name of it, or None for nothing.

    ranges: the first index and the number that this rank has, by name.
    """

    mesh: DeviceMesh
    kinds: tuple[str | None, ...]
    ranges: dict[str, tuple[int, int]]

    def local(self, name: str, t: Any, dims: dict[str, int]) -> Any:
        """This rank's part of a tensor; None and numbers as they are.

        dims: which dimension of the tensor goes with what is shared out. A dimension of size 1 serves all.
        """
        if not isinstance(t, Tensor):
            return t
        dims = {kind: dim % t.dim() for kind, dim in dims.items() if t.shape[dim] > 1}
        if not isinstance(t, DTensor):
            return self._narrowed(name, t, dims)
        if t.device_mesh != self.mesh:
            raise ValueError(f"{name} must be on the mesh {self.mesh}, got one on {t.device_mesh}")
        wanted: list[Placement] = [Shard(dims[kind]) if kind in dims else Replicate() for kind in self.kinds]
        for dimension, (has, want) in enumerate(zip(t.placements, wanted, strict=True)):
            if has not in (want, Replicate()):
                raise ValueError(
                    f"{name} must be {want} or replicated over dimension {dimension} of the mesh, which shares "
                    f"out {self.kinds[dimension] or 'nothing'}, got {has}; redistribute it first"
                )
        gradient = [Partial() if k and not w.is_shard() else w for k, w in zip(self.kinds, wanted, strict=True)]
        # From replicated to sharded nothing is sent.
        return moved(lambda t: local_part(t.redistribute(placements=wanted), gradient), t)

    def _narrowed(self, name: str, t: Tensor, dims: dict[str, int]) -> Tensor:
        if t.requires_grad and torch.is_grad_enabled() and any(self.kinds):
            raise ValueError(
                f"{name} must be a DTensor if it needs a gradient, since each rank has only a part of that; give "
                "distribute_tensor(t, mesh)"
            )
        for kind, dim in dims.items():
            if kind in self.ranges:
                t = t.narrow(dim, *self.ranges[kind])
        return t

    def whole(self, local: Tensor, shape: Sequence[int], dims: dict[str, int], same_for: str = "") -> DTensor:
        """A result as a DTensor of this shape. What is shared out and has no dimension in it is a partial sum.
        same_for: what else is shared out, so that all ranks have the same result."""
        placements: list[Placement] = [
            Replicate() if kind in (None, same_for) else Shard(dims[kind]) if kind in dims else Partial()
            for kind in self.kinds
        ]
        sizes: dict[str, Any] = {
            "shape": torch.Size(shape),
            "stride": torch.empty(tuple(shape), device="meta").stride(),
        }
        return moved(lambda t: DTensor.from_local(t, self.mesh, placements, run_check=False, **sizes), local)


def moved(move: Callable[[Any], Any], t: Tensor) -> Any:
    """move(t), and in forward mode of its tangent, too. torch's moves to local tensors and back know no tangents.

    move: linear.
    """
    if forward_ad._current_level < 0:
        return _without_tangent(move(t))
    primal, tangent = forward_ad.unpack_dual(t)
    arrived = _without_tangent(move(primal))
    if tangent is None:
        return arrived
    if isinstance(tangent, DTensor):
        tangent = tangent.redistribute(placements=t.placements)  # type: ignore[attr-defined]
    return forward_ad.make_dual(arrived, move(tangent))


def _without_tangent(t: Tensor) -> Tensor:
    """A tensor that was moved, as it is. Its gradient must have no tangent, which torch's moves would lose."""
    if not torch.compiler.is_compiling() and t.grad_fn is not None:
        t.grad_fn.register_prehook(_refuse_tangents)
    return t


def _refuse_tangents(gradients: tuple[Tensor, ...]) -> None:
    refuse_tangents("the backward of a function of DTensors", {"the gradient": gradients[0]})


class _Summed(torch.autograd.Function):
    """A DTensor as it is. Its gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, t: DTensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> Tensor:
        summed = [Replicate() if p.is_partial() else p for p in gradient.placements]
        return gradient.redistribute(placements=summed)


def local_part(t: DTensor, gradient: Sequence[Placement]) -> Tensor:
    """This rank's part. gradient: the placements of its gradient; that of a parameter is summed at once, since
    optimizers read it."""
    if t.is_leaf and t.requires_grad and any(p.is_partial() for p in gradient):
        t = _Summed.apply(t)
    return moved(lambda t: t.to_local(grad_placements=gradient), t)


def split_of(
    main: DTensor, kinds: Sequence[str | None], dims: dict[str, int], others: Sequence[tuple[str, Any]]
) -> Split:
    """kinds: what each dimension of main's mesh shares out. dims: by name, the dimension of `main`."""
    for name, t in others:
        if isinstance(t, Tensor) and not isinstance(t, DTensor):
            raise TypeError(f"{name} must be a DTensor, since x is one; give distribute_tensor({name}, mesh)")
        if isinstance(t, DTensor) and t.device_mesh != main.device_mesh:
            raise ValueError(f"{name} must be on the mesh {main.device_mesh}, got one on {t.device_mesh}")
    ranges = {kind: own_range(main, dim) for kind, dim in dims.items() if kind in kinds}
    return Split(main.device_mesh, tuple(kinds), ranges)


def own_range(t: DTensor, dim: int) -> tuple[int, int]:
    """The first index and the number that this rank has of a dimension, cut as torch.chunk cuts it."""
    first, count = 0, t.shape[dim]
    for dimension in range(t.device_mesh.ndim):
        if sharded_dim(t, dimension) == dim:
            each = -(-count // t.device_mesh.size(dimension))
            begin = min(each * t.device_mesh.get_local_rank(dimension), count)
            first, count = first + begin, min(each, count - begin)
    return first, count


def sharded_dim(t: DTensor, dimension: int) -> int | str | None:
    """The tensor's dimension that a dimension of the mesh shares out, None if replicated, else the placement."""
    placement = t.placements[dimension]
    if type(placement) is Shard:
        return placement.dim % t.dim()
    return None if isinstance(placement, Replicate) else str(placement)


_ATTENTION = {
    (None, None, None): None,
    (0, 0, 0): BATCH,
    (1, 1, 1): HEADS,
    (1, None, None): HEADS,
    (2, None, None): LENGTH,
}


def attention(q: DTensor, k: DTensor, v: DTensor, options: dict[str, Any]) -> Any:
    """`fastattn.attention`; options are its keywords."""
    for name, t in (("k", k), ("v", v)):
        if not isinstance(t, DTensor) or t.device_mesh != q.device_mesh:
            raise TypeError(f"{name} must be a DTensor on q's mesh, since q is one; got {type(t).__name__}")
    spec = attention_spec(
        q, k, v, causal=options["causal"], scale=None, window=options["window"], dropout_p=options["dropout_p"],
        invariant=options["invariant"],
    )  # fmt: skip
    kinds = []
    for dimension in range(q.device_mesh.ndim):
        found = tuple(sharded_dim(t, dimension) for t in (q, k, v))
        if found not in _ATTENTION:
            raise ValueError(
                "q, k and v must be sharded together: all by batch, all by heads, q alone by heads or by length "
                f"with k and v replicated, or all replicated; got {q.placements}, {k.placements}, {v.placements}. "
                "A sequence whose keys are sharded is computed by fastattn.distributed.attention"
            )
        kinds.append(_ATTENTION[found])
    split = split_of(q, kinds, {BATCH: 0, HEADS: 1, LENGTH: 2}, ())
    keys = key_heads_of(q, k, kinds, split)
    _check_positions(kinds, spec, options)
    local_q = local_part(q, q.placements)
    local_k, local_v = (local_keys(t, kinds, keys) for t in (k, v))
    if LENGTH in kinds and spec.causal:
        # The last query of the shard stands at the last key.
        start, count = split.ranges[LENGTH]
        end = max(start + count + k.shape[2] - q.shape[2], 0)
        local_k, local_v = local_k[:, :, :end], local_v[:, :, :end]
        if options["bias"] is not None and options["bias"].shape[-1] > 1:
            options["bias"] = options["bias"][..., :end]
    local = {**options, **score_tensors_of(split, q, options, spec.dropout)}
    local |= own_mask(split, q, k, (spec.left, spec.right), options["mask"])
    results = attention_here(local_q, local_k, local_v, **local)
    out, *rows = results if isinstance(results, tuple) else (results,)
    whole = split.whole(out, (*q.shape[:3], v.shape[3]), {BATCH: 0, HEADS: 1, LENGTH: 2})
    if not rows:
        return whole
    return whole, *(split.whole(t, q.shape[:3], {BATCH: 0, HEADS: 1, LENGTH: 2}) for t in rows)


def own_mask(split: Split, q: DTensor, k: DTensor, bounds: tuple[int | None, int | None], mask: Any) -> dict:
    """This rank's part of a mask, with the window of these bounds in it, as `attention` takes it."""
    if mask is None:
        return {}
    lengths = spread.whole_length(q.shape[2]), spread.whole_length(k.shape[2])
    lowered = whole_mask((*q.shape[:2], *lengths, q.device), bounds, mask)
    own = lowered.part(split.ranges.get(BATCH), split.ranges.get(HEADS)).to(q.device)
    return {"mask": own, "causal": False, "window": None}


def key_heads_of(q: DTensor, k: DTensor, kinds: Sequence[str | None], split: Split) -> tuple[int, int] | None:
    """The first and the number of the key heads that this rank's query heads read; None for all that it has."""
    if HEADS not in kinds:
        return None
    ranks, group = _ranks_of(kinds, q.device_mesh, HEADS), q.shape[1] // max(1, k.shape[1])
    sharing_keys = 1
    for dimension in range(len(kinds)):
        sharing_keys *= q.device_mesh.size(dimension) if sharded_dim(k, dimension) == 1 else 1
    # Only what is the same on all ranks decides, so that all of them raise.
    count = q.shape[1] // ranks
    whole_groups, in_one_group = count % group == 0, count > 0 and group % count == 0
    sharded = sharing_keys > 1
    fits = whole_groups and sharing_keys == ranks if sharded else whole_groups or in_one_group
    if not fits or q.shape[1] % ranks:
        raise ValueError(
            f"{q.shape[1]} query heads and {k.shape[1]} key heads cannot be shared out over "
            f"{ranks} ranks so that each key head stays with its queries; "
            "replicate k and v, or take fewer ranks"
        )
    return None if sharded else (split.ranges[HEADS][0] // group, max(1, count // group))


def _ranks_of(kinds: Sequence[str | None], mesh: DeviceMesh, kind: str) -> int:
    count = 1
    for dimension, found in enumerate(kinds):
        count *= mesh.size(dimension) if found == kind else 1
    return count


def local_keys(t: DTensor, kinds: Sequence[str | None], heads: tuple[int, int] | None) -> Tensor:
    """This rank's keys. Where they are replicated and queries are not, their gradient is a part of a sum."""
    gradient = [
        Partial() if kind in (HEADS, LENGTH) and isinstance(placement, Replicate) else placement
        for kind, placement in zip(kinds, t.placements, strict=True)
    ]
    local = local_part(t, gradient)
    return local if heads is None else local.narrow(1, *heads)


def _check_positions(kinds: Sequence[str | None], spec: Any, options: dict[str, Any]) -> None:
    """Raise ValueError for what depends on positions that a shard counts in another way."""
    if LENGTH in kinds:
        spread.refuse("a DTensor q that is sharded by length")
        asked = {"window": spec.window != (None, None)}
        asked |= {name: options[name] is not None for name in ("mask", "alibi_slopes", "relative_bias")}
        for name, given in asked.items():
            if given:
                raise ValueError(
                    f"{name} must not be given if q is sharded by length, since a shard counts positions from 0; "
                    "take fastattn.distributed.attention"
                )


def score_tensors_of(split: Split, q: DTensor, options: dict[str, Any], dropout: float) -> dict[str, Any]:
    """This rank's parts of the tensors beside q, k and v."""
    state, bias = options["dropout_state"], options["bias"]
    if dropout and state is None:
        state = broadcast(ranks_of(split.mesh), fresh_dropout_state(q.shape[0], q.device))
    lengths = options["key_lengths"]
    if lengths is not None and not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, device=q.device)
    found = {
        "key_lengths": split.local("key_lengths", lengths, {BATCH: 0}),
        "dropout_state": split.local("dropout_state", state, {BATCH: 0}),
    }
    if dropout:
        # A shard draws what the whole tensor draws at its place.
        head, query = (split.ranges.get(kind, (0, 0))[0] for kind in (HEADS, LENGTH))
        found["dropout_state"] = state_of_part(found["dropout_state"], head, query)
    if bias is not None:
        dims = {kind: dim for kind, dim in ((BATCH, -4), (HEADS, -3), (LENGTH, -2)) if bias.dim() >= -dim}
        found["bias"] = split.local("bias", bias, dims)
    for name, last in (("alibi_slopes", -1), ("relative_bias", -2), ("sinks", -1), ("scale", -1)):
        t = options[name]
        if isinstance(t, Tensor) and t.dim():
            dims = {HEADS: last, **({BATCH: 0} if t.dim() > -last else {})}
            found[name] = split.local(name, t, dims)
        elif isinstance(t, Tensor):
            found[name] = split.local(name, t, {})
    return found


def rows_of(x: DTensor, name: str = "x") -> list[str | None]:
    """What each dimension of x's mesh shares out, if it shares out any dimension but the last."""
    kinds: list[str | None] = []
    for dimension in range(x.device_mesh.ndim):
        dim = sharded_dim(x, dimension)
        if isinstance(dim, str) or dim == x.dim() - 1:
            raise ValueError(
                f"{name} must be replicated, or sharded by any dimension but the last, got {x.placements}"
            )
        kinds.append(None if dim is None else f"dimension {dim}")
    return kinds


def dims_of(kinds: Sequence[str | None]) -> dict[str, int]:
    return {kind: int(kind.removeprefix("dimension ")) for kind in kinds if kind and kind != HIDDEN}


def mlp(x: DTensor, w1: Any, b1: Any, w2: Any, b2: Any, options: dict[str, Any]) -> DTensor:
    """`fastattn.mlp`."""
    return _mlp(x, {"w1": w1, "b1": b1}, ("w2", w2), ("b2", b2), lambda x, i, w, b: mlp_here(
        x, i["w1"], i["b1"], w, b, **options
    ))  # fmt: skip


def gated_mlp(x: DTensor, w_gate: Any, w_up: Any, w_down: Any, options: dict[str, Any]) -> DTensor:
    """`fastattn.gated_mlp`."""
    if options["packed"] is not None:
        raise ValueError(
            "packed must be None for DTensors, because a shard of a packed weight holds no pairs of gate and up, "
            f"got {options['packed']!r}"
        )
    rest = {name: value for name, value in options.items() if not name.startswith("b_")}
    into = {"w_gate": w_gate, "w_up": w_up, "b_gate": options["b_gate"], "b_up": options["b_up"]}
    return _mlp(x, into, ("w_down", w_down), ("b_down", options["b_down"]), lambda x, i, w, b: gated_mlp_here(
        x, i["w_gate"], i["w_up"], w, b_gate=i["b_gate"], b_up=i["b_up"], b_down=b, **rest
    ))  # fmt: skip


def _mlp(
    x: DTensor, into: dict[str, Any], out: tuple[str, Any], bias: tuple[str, Any], compute: Callable[..., Tensor]
) -> DTensor:
    """into: weights and biases whose rows are hidden units. out: the weight whose columns they are."""
    kinds, name, weight = rows_of(x), *out
    first = next(iter(into.values()))
    for dimension in range(x.device_mesh.ndim):
        if isinstance(first, DTensor) and sharded_dim(first, dimension) == 0:
            if kinds[dimension] is not None:
                raise ValueError(
                    f"x must be replicated over dimension {dimension} of the mesh, which shares out hidden units, "
                    f"got {x.placements[dimension]}"
                )
            kinds[dimension] = HIDDEN
    main, dims = x, dims_of(kinds)
    split = split_of(main, kinds, dims, [*into.items(), out, bias])
    parts = {name: _exactly(split, name, t, {HIDDEN: 0}) for name, t in into.items()}
    local_weight = _exactly(split, name, weight, {HIDDEN: 1})
    local_bias = split.local(*bias, {})
    if local_bias is not None and any(
        kind == HIDDEN and x.device_mesh.get_local_rank(d) for d, kind in enumerate(kinds)
    ):
        local_bias = local_bias * 0  # the results are summed: one rank adds the bias
    y = compute(split.local("x", x, dims), parts, local_weight, local_bias)
    return split.whole(y, (*x.shape[:-1], weight.shape[0]), dims)


def _exactly(split: Split, name: str, t: Any, dims: dict[str, int]) -> Any:
    """This rank's part of a weight. It must be sharded where hidden units are. If a whole one were sliced, every
    rank would hold all of it unnoticed."""
    if isinstance(t, DTensor):
        for dimension, kind in enumerate(split.kinds):
            if kind == HIDDEN and t.placements[dimension] != Shard(dims[HIDDEN]):
                raise ValueError(
                    f"{name} must be {Shard(dims[HIDDEN])} over dimension {dimension} of the mesh, which shares "
                    f"out hidden units, got {t.placements[dimension]}"
                )
    return split.local(name, t, dims)


def norm(which: str, x: DTensor, tensors: dict[str, Any], residual: Any, options: dict[str, Any]) -> Any:
    """`fastattn.rms_norm` or `fastattn.layer_norm`; tensors: weight and bias."""
    kinds = rows_of(x)
    dims = dims_of(kinds)
    split = split_of(x, kinds, dims, [*tensors.items(), ("residual", residual)])
    if residual is not None and tuple(residual.placements) != tuple(x.placements):
        raise ValueError(f"residual must be sharded as x, {x.placements}, got {residual.placements}")
    function: Any = {"rms_norm": rms_norm_here, "layer_norm": layer_norm_here}[which]
    own = {name: split.local(name, t, {}) for name, t in tensors.items()}
    results = function(
        split.local("x", x, dims), **own, residual=split.local("residual", residual, dims), **options
    )
    if residual is None:
        return split.whole(results, x.shape, dims)
    return tuple(split.whole(t, x.shape, dims) for t in results)


def prepare_heads(x: DTensor, options: dict[str, Any]) -> DTensor:
    """`fastattn.prepare_heads`."""
    names: dict[int | None, str | None] = {None: None, 0: BATCH, 1: HEADS, 2: LENGTH}
    found = [sharded_dim(x, dimension) for dimension in range(x.device_mesh.ndim)]
    if any(isinstance(dim, str) or dim == 3 for dim in found):
        raise ValueError(f"x must be replicated, or sharded by batch, heads or length, got {x.placements}")
    kinds = [names[dim] for dim in found]  # type: ignore[index]
    dims = {BATCH: 0, HEADS: 1, LENGTH: 2}
    split = split_of(x, kinds, dims, ())
    own, weight, scale = dict(options), options["norm_weight"], options["head_scale"]
    own["norm_weight"] = split.local("norm_weight", weight, {HEADS: 0} if _has_dims(weight, 2) else {})
    own["head_scale"] = split.local(
        "head_scale", scale, {HEADS: -1, BATCH: 0} if _has_dims(scale, 2) else {HEADS: -1}
    )
    by_row = _has_dims(options["cos"], 3)
    for name in ("cos", "sin"):
        own[name] = split.local(name, options[name], {BATCH: 0, LENGTH: 1} if by_row else {})
    own["offsets"] = split.local("offsets", options["offsets"], {BATCH: 0})
    if LENGTH in kinds and not by_row:
        own["offsets"] = own["offsets"] + split.ranges[LENGTH][0]
    return split.whole(prepare_heads_here(split.local("x", x, dims), **own), x.shape, dims)


def _has_dims(t: Any, count: int) -> bool:
    return isinstance(t, Tensor) and t.dim() == count


spread.DTENSORS = (DTensor,)
spread.of_dtensors |= {
    "attention": attention, "mlp": mlp, "gated_mlp": gated_mlp, "norm": norm, "prepare_heads": prepare_heads
}  # fmt: skip
