"""Tensors that say they lie on a GPU, without one: data in the CPU's memory, operators computed there.

A CPU build of PyTorch cannot make a tensor on "cuda". A mode sees every operator, factories included; where a GPU
is named, the operator runs on the CPU and its results are marked with the GPU. The address that a kernel gets
names the GPU in its highest byte, so that the driver refuses a tensor that was left in the host's memory or on
another GPU. Torch's C++ code sees plain CPU tensors: autograd, forward mode, views and storages are the real ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastattn.core import plans

# What GPUs compute and CPUs do not: products of half precision that are not rounded.
_ONLY_ON_GPUS = {torch.ops.aten.mm.dtype: lambda a, b, dtype: torch.mm(a.to(dtype), b.to(dtype))}
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class GpuTensor(torch.Tensor):
    """A CPU tensor that answers questions about its device as if it lay on a GPU."""

    on: torch.device
    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor, on: torch.device) -> GpuTensor:
        self = torch.Tensor._make_subclass(cls, host, host.requires_grad)
        self.on = numbered(on)
        self.host = host
        return self

    # The constructor marks what is there already; it makes nothing.
    def __init__(self, *_: object) -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:
        return self.on

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return self.on.index

    def cpu(self) -> torch.Tensor:
        return self.host.clone()

    def to(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **keywords)
        if device is not None and device.type == "cpu":
            return self.cpu().to(dtype or self.dtype)
        return super().to(*arguments, **keywords)

    def __format__(self, form: str) -> str:
        return format(self.host, form)

    def data_ptr(self) -> int:
        return self.host.data_ptr() + ((self.on.index + 1) << 56) if self.numel() else 0

    def __repr__(self, **_: object) -> str:
        return f"GpuTensor({tuple(self.shape)}, {self.dtype}, {self.on})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments=(), keywords=None):
        return _run(operator, arguments, keywords or {})


def numbered(device: torch.device) -> torch.device:
    """ "cuda" is the current GPU. `Tensor.to` wants the number: its C++ code would ask a driver of its own."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


class OnGpu(TorchDispatchMode):
    """Inside the block "cuda" is a device."""

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        return _run(operator, arguments, keywords or {})


@contextlib.contextmanager
def planned(modes: int = 1) -> Iterator[None]:
    """Inside the block calls take plans (fastattn.core.plans), as on a real GPU: neither the tensors nor the mode
    of a pretended one count as somebody who must see the operators. `modes`: that one, and others that do not."""
    with (
        mock.patch.object(plans, "_TENSORS", plans._TENSORS | {GpuTensor}),
        mock.patch.object(plans, "_dispatch_modes", lambda: torch._C._len_torch_dispatch_stack() - modes),
    ):
        yield


def _run(operator: Any, arguments: tuple, keywords: dict) -> Any:
    if operator.namespace == "fastattn":
        # An operator of ours: its own code runs, and what that calls comes here again.
        with OnGpu():
            return operator.redispatch(_CPU, *arguments, **keywords)
    owners: dict[int, GpuTensor] = {}
    named: list[torch.device] = []

    def to_host(value: object) -> object:
        if isinstance(value, GpuTensor):
            owners[id(value.host)] = value
            return value.host
        if isinstance(value, torch.device) and value.type == "cuda":
            named.append(value)
            return torch.device("cpu")
        return value

    arguments, keywords = tree_map(to_host, (arguments, keywords))
    results = _ONLY_ON_GPUS.get(operator, operator)(*arguments, **keywords)
    # Where a GPU is named, or else where the tensors are; numbers may be anywhere. "cpu" is no name: C++ code says
    # so of tensors that are here, as when autograd casts a gradient.
    tensors = sorted(owners.values(), key=lambda t: t.dim() == 0)
    if not named and not tensors:
        return results
    return tree_map(functools.partial(_marked, owners, named[0] if named else tensors[0].on), results)


def _marked(owners: dict[int, GpuTensor], on: torch.device, value: object) -> object:
    """A result as a tensor on the GPU; what an operator changed in place stays the tensor that it was."""
    if not isinstance(value, torch.Tensor) or isinstance(value, GpuTensor):
        return value
    return owners[id(value)] if id(value) in owners else GpuTensor(value, on)


def made_on_host(factory: Any) -> Any:
    """torch.tensor or torch.as_tensor, making on the CPU first: their C++ code would ask for a real GPU."""

    @functools.wraps(factory)
    def make(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **keywords: Any) -> torch.Tensor:
        made = factory(data, dtype=dtype, **keywords)
        return made if device is None else made.to(numbered(torch.device(device)))

    return make
