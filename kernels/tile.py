"""A launch's compile-time choices, as one kernel argument."""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl


class Tile:
    """What is known of a launch at compile time: the sizes of a program's tile, how its products are made.

    A kernel takes it as one constexpr, `tile: tl.constexpr`, and reads `tile.BLOCK_M`. An ordinary class, because
    Triton 3.6 and 3.7 take a tuple apart and hand out bare integers. Equal values make one compiled kernel.
    """

    def __init__(self, **values: Any) -> None:
        self._values = tuple(sorted(values.items()))
        # Triton asks for it at every launch.
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
        """The choices by name, for the host."""
        return dict(self._values)


@functools.lru_cache(maxsize=1024)
def tile_of(**values: Any) -> Tile:
    """The Tile of these choices, made once."""
    return Tile(**values)
