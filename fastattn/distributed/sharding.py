"""Tensors of the whole sequence to the tokens of each rank, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastattn.distributed.dealing import Layout
from fastattn.distributed.exchange import all_gather, flat_rank, ranks_of
from fastattn.distributed.transports import places
from fastattn.ground import arguments
from fastattn.ground.checks import refuse_tangents


def shard(tensor: Tensor, layout: Layout, dim: int = 2, *, mesh: DeviceMesh | None = None) -> Tensor:
    """This rank's tokens of a tensor that all ranks have.

    Args:
        tensor: q, k, v (B, H, N, D) with dim 2, hidden states (B, N, W), or tokens, positions and labels (B, N),
            with dim 1; any tensor with a dimension of the whole sequence.
        layout: who owns which tokens.
        dim: the dimension of tokens.
        mesh: as `attention` takes it; by default the mesh that the layout was made for.

    Returns:
        The same with n tokens, in ascending order of their positions. The gradient of the whole tensor is gathered
        from all ranks, so it is that of one process.
    """
    dim, mesh = _checked(tensor, layout, dim, mesh)
    if tensor.shape[dim] != layout.length:
        raise ValueError(
            f"tensor must have the layout's {layout.length} tokens in dimension {dim}, got {tensor.shape[dim]}"
        )
    return _Shard.apply(tensor, layout, dim, mesh)


def unshard(tensor: Tensor, layout: Layout, dim: int = 2, *, mesh: DeviceMesh | None = None) -> Tensor:
    """The whole tensor, on all ranks, from the tokens that each of them has; the inverse of `shard`.

    Its gradient is this rank's part of the whole one, as if all ranks computed the same loss from the same tensor.
    """
    dim, mesh = _checked(tensor, layout, dim, mesh)
    count = layout.counts[flat_rank(mesh)]
    if tensor.shape[dim] != count:
        raise ValueError(
            f"tensor must have this rank's {count} tokens in dimension {dim}, got {tensor.shape[dim]}"
        )
    return _Unshard.apply(tensor, layout, dim, mesh)


def _checked(tensor: Tensor, layout: Layout, dim: int, mesh: DeviceMesh | None) -> tuple[int, DeviceMesh]:
    arguments.tensor("tensor", tensor)
    refuse_tangents("fastattn.distributed.shard or unshard", {"tensor": tensor})
    mesh = mesh_of(layout, mesh)
    dim = arguments.integer("dim", dim)
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dim must name one of the tensor's {tensor.dim()} dimensions, got {dim}")
    return dim % tensor.dim(), mesh


def mesh_of(layout: Layout, mesh: DeviceMesh | None) -> DeviceMesh:
    """The mesh of a call, checked against its layout."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be what fastattn.distributed.layout returned, got {type(layout).__name__}")
    mesh = layout.mesh if mesh is None else mesh
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh, got {type(mesh).__name__}")
    if mesh.size() != layout.ranks or mesh.ndim > 2:
        raise ValueError(
            f"mesh must have the {layout.ranks} ranks of the layout in one or two dimensions, got "
            f"{mesh.size()} in {mesh.ndim}"
        )
    return mesh


def _own(tensor: Tensor, layout: Layout, dim: int, mesh: DeviceMesh) -> Tensor:
    return tensor.index_select(dim, layout.positions(flat_rank(mesh)).to(tensor.device))


def _whole(tensor: Tensor, layout: Layout, dim: int, mesh: DeviceMesh) -> Tensor:
    longest = max(layout.counts)
    tensor = tensor.movedim(dim, 0)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    for ranks in reversed(ranks_of(mesh)):
        padded = all_gather(ranks, padded).flatten(0, 1)
    shards = [layout.positions(rank) for rank in range(layout.ranks)]
    return padded.index_select(0, places(shards, longest).to(tensor.device)).movedim(0, dim)


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, layout: Layout, dim: int, mesh: DeviceMesh) -> Tensor:
        ctx.way = layout, dim, mesh
        return _own(tensor, layout, dim, mesh)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return _Unshard.apply(gradient, *ctx.way), None, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, layout: Layout, dim: int, mesh: DeviceMesh) -> Tensor:
        ctx.way = layout, dim, mesh
        return _whole(tensor, layout, dim, mesh)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return _Shard.apply(gradient, *ctx.way), None, None, None
