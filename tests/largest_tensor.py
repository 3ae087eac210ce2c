"""The size of the largest tensor that is made within a block: the memory of a computation, counted."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Watches the result of every operator. `elements` and `nbytes` are those of the largest one; `nbytes` counts
    the memory that a view looks into."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return result
