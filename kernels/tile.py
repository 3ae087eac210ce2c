"""The compile-time choices of a launch as one kernel argument."""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl


class Tile:
    """What is known of a launch at compile time: the size of a program's tile, the precision of its products, ...

    A kernel takes it as one constexpr, `tile: tl.constexpr`, and reads `tile.BLOCK_M`. It is an ordinary class,
    because Triton 3.6 and 3.7 unpack a tuple to bare integers. Tiles with equal values share one compiled kernel.
    """

    def __init__(self, **values: Any) -> None:
        self._values = tuple(sorted(values.items()))
        # Triton takes the repr at every launch.
        self._text = f"Tile({', '.join(f'{name}={value!r}' for name, value in self._values)})"
        for name, value in values.items():
            setattr(self, name, tl.constexpr(value))

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tile) and self._values == other._values

    def __repr__(self) -> str:
        return self._text

    def values(self) -> dict[str, Any]:
        """The choices by name, for use outside of kernels."""
        return dict(self._values)


@functools.lru_cache(maxsize=1024)
def tile_of(**values: Any) -> Tile:
    """The Tile of these choices, cached."""
    return Tile(**values)
