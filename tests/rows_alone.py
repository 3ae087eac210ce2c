"""Products in Triton's interpreter of which each number is a sum of its own, as on tensor cores.

NumPy's products may give a row other bits at another place in a tile, or beside more columns: it depends on the
processor. Tests that compare bits of different tiles need more than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton.runtime import interpreter


@contextmanager
def rows_alone() -> Iterator[None]:
    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot):
        yield


def _dot(_: Any, a: Any, b: Any, d: Any, *others: Any) -> Any:
    left, right = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype)
    products = (left[..., :, None, :] * right.swapaxes(-1, -2)[..., None, :, :]).sum(-1)
    return interpreter.TensorHandle(products + d.data, d.dtype.scalar)
