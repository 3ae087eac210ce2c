"""What interventions do: tensors that are replaced, and heads that attend otherwise than their model does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.lens.adapters import Adapter
from fastattn.lens.places import Call, Name, change, listen
from fastattn.lens.seen import Step, pick
from fastattn.masks import Lowered, Mask


class Replaced:
    """Heads, neurons or a whole tensor, replaced by nothing, a mean or another's."""

    def __init__(self, name: Name, indices: list[int] | None, by: str, other: Tensor | None) -> None:
        self.name, self.indices, self.by, self.other = name, indices, by, other
        self.dim = 1 if name.kind == "attention.hook_z" else -1

    def __call__(self, value: Tensor) -> Tensor:
        new = self._new(value)
        if self.indices is None:
            return new
        chosen = torch.zeros(value.shape[self.dim], dtype=torch.bool)
        chosen[self.indices] = True
        shape = (-1, 1, 1) if self.dim == 1 else (-1,)
        return torch.where(chosen.to(value.device).view(shape), new, value)

    def _new(self, value: Tensor) -> Tensor:
        if self.by == "zero":
            return torch.zeros_like(value)
        other = value if self.other is None else self.other.to(value.dtype)
        if self.by == "mean":
            positions = 2 if self.dim == 1 else 1
            return other.mean((0, positions), keepdim=True).expand_as(value)
        if self.other is None:
            if len(value) < 2:
                raise ValueError(
                    "by='resample' without a source takes the neighbour in the batch, and this has one"
                )
            return other.roll(1, 0)
        if other.shape != value.shape:
            raise ValueError(
                f"source gives {self.name} of shape {tuple(other.shape)}, and the model is at {tuple(value.shape)}"
            )
        return other


class Put:
    """A part of a tensor, replaced by a value or with it added."""

    def __init__(self, name: Name, steps: Sequence[Step], value: Tensor, adds: bool = False) -> None:
        self.name, self.steps, self.value, self.adds = name, steps, value, adds

    def __call__(self, tensor: Tensor) -> Tensor:
        index: list[Any] = [slice(None)] * tensor.dim()
        dims = {"head": 1, "at": tensor.dim() - 2}
        for kind, argument in self.steps:
            pick(tensor, dims[kind], argument, str(self.name))
            index[dims[kind]] = argument
        part, value = tensor[tuple(index)], self.value.to(tensor)
        try:
            value = value.expand_as(part)
        except RuntimeError as problem:
            what = "added to" if self.adds else "put in the place of"
            raise ValueError(
                f"what is {what} {self.name}{''.join(map(str, self.steps))} must fit {tuple(part.shape)}, got "
                f"{tuple(value.shape)}"
            ) from problem
        result = tensor.clone()
        result[tuple(index)] = part + value if self.adds else value
        return result


class Edit(NamedTuple):
    """How one head attends otherwise: keys that it does not see, or another run's queries and keys."""

    head: int
    cut: Mask | None = None
    donor: tuple[Tensor, Tensor] | None = None


class _EditedAttention:
    """The heads of one layer that attend otherwise, all edits of a head together."""

    def __init__(self, adapter: Adapter, layer: int) -> None:
        self.layer = layer
        self.edits: list[Edit] = []
        self.call: Call | None = None
        z = Name(layer, "attention.hook_z")
        # Before all other changes of what the heads read: those hold for the edited heads, too.
        self.handles = [listen(adapter, layer, self._hear), change(adapter, z, self._attend, first=True)]

    def _hear(self, call: Call) -> None:
        self.call = call

    def _attend(self, z: Tensor) -> Tensor:
        call, self.call = self.call, None
        assert call is not None
        # Heads with the same edits attend together.
        groups: dict[tuple[int, ...], list[int]] = {}
        for head in sorted({edit.head for edit in self.edits}):
            parts = [part for edit in self.edits if edit.head == head for part in edit[1:] if part is not None]
            groups.setdefault(tuple(map(id, parts)), []).append(head)
        z = z.clone()
        for heads in groups.values():
            edits = [edit for edit in self.edits if edit.head == heads[0]]
            z[:, heads] = self._attended(call, edits)[:, heads]
        return z

    def _attended(self, call: Call, edits: list[Edit]) -> Tensor:
        """What attention reads with these edits: all cuts, and the last donor."""
        changes: dict[str, Any] = {}
        cuts = [edit.cut for edit in edits if edit.cut is not None]
        donors = [edit.donor for edit in edits if edit.donor is not None]
        if donors:
            for name, own, other in zip("qk", (call.q, call.k), donors[-1], strict=True):
                if other.shape != own.shape:
                    raise ValueError(
                        f"donor's {name} of block {self.layer} has shape {tuple(other.shape)}, and the model's "
                        f"has {tuple(own.shape)}"
                    )
                changes[name] = other.to(own)
        if cuts:
            mask = call.options.get("mask")
            if isinstance(mask, Lowered):
                raise ValueError(
                    "edges cannot be cut from a mask that is lowered, nor from packed sequences: give the model "
                    "the mask itself, or a padded batch"
                )
            for cut in cuts:
                mask = ~cut if mask is None else mask & ~cut
            changes["mask"] = mask
        return call.attend(**changes)


_EDITED: dict[int, _EditedAttention] = {}


@contextmanager
def edited(adapter: Adapter, edits: dict[int, list[Edit]]) -> Iterator[None]:
    """Heads that attend otherwise, within the block."""
    with ExitStack() as stack:
        for layer, of_layer in edits.items():
            key = id(adapter.part("attention", layer))
            if key not in _EDITED:
                _EDITED[key] = _EditedAttention(adapter, layer)
            _EDITED[key].edits += of_layer
            stack.callback(_without, key, of_layer)
        yield


def _without(key: int, edits: list[Edit]) -> None:
    edited = _EDITED[key]
    gone = {id(edit) for edit in edits}
    edited.edits = [edit for edit in edited.edits if id(edit) not in gone]
    if not edited.edits:
        del _EDITED[key]
        for handle in edited.handles:
            handle.remove()
