"""The rows of launch tables."""

from __future__ import annotations

from typing import NamedTuple

from ..tile import Tile, tile_of

INTERPRETER = "interpreter"
EVERY = 2**63 - 1  # the width of a row for all widths
# Triton's own default differs by version (off from 3.10 on), but the softmax needs multiply-subtracts that round
# once.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


class Tiling(NamedTuple):
    """The size of a program's tile and the hardware it is given."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    # The most columns of v in a launch of attention's forward. Wider values take several passes, each of which
    # computes the weights again.
    values: int = EVERY
    # In attention's forward and dq: products of the next tile are issued before the softmax of this one. In dk/dv:
    # the exponentials may run beside a product.
    ahead: bool = False

    def tile(self, **choices: object) -> Tile:
        """The compile-time choices of a launch: the tile's sides and what else the kernel asks for."""
        return tile_of(BLOCK_M=self.block_m, BLOCK_N=self.block_n, **choices)

    def compiler_options(self) -> dict[str, object]:
        """Launch keywords: the compiler's options."""
        return {"num_warps": self.warps, "num_stages": self.stages, **COMPILER_OPTIONS}


class Row(NamedTuple):
    """One line of a table: for elements of up to `bytes` bytes and tiles up to `width` wide."""

    bytes: int
    width: int
    tiling: Tiling
