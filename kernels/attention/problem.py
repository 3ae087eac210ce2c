"""What an attention kernel is asked for: a call's values in one argument, its compile-time choices in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton

from .. import launch
from ..tile import Tile, tile_of
from ..tiles import WIDEST_TILE, Shape, shape_of
from .loops import Lists, Window, window_of
from .scores import Dropout, Scores, dropout_of, scores_of

MOST_ROWS = 128  # that a tile has
# In place of a number that a kernel does not read. Triton compiles a kernel again for 1 and for multiples of 16.
SOME = 3


class Problem(NamedTuple):
    """The values that every program of a launch reads: sizes, which scores are seen, what is done to them, over
    how many programs each loop is split (None: over one), and how many heads take turns (see
    tiles.heavy_first)."""

    shape: Shape
    window: Window
    lists: Lists
    scores: Scores
    dropout: Dropout | None
    splits: int | None
    heads_per_section: int
    last: None = None  # as in `Scores`: a tuple of tuples must end in a constant


class Call:
    """What the launches of one call have in common. To be made where the tensors' device is current.

    `spec` has the options of a call (causal, scale, left, right, softcap, dropout, precision), `tensors` what
    shapes the scores, None for what is not asked: key_lengths (B,) int32 in [0, Lk]; alibi_slopes, sinks and
    head_scale (B, Hq) fp32; bias (B or 1, Hq or 1, Lq or 1, Lk or 1), float or bool; relative_bias
    (B, Hq, 2 R + 1) fp32; dropout_state (B, 2 or 5) int64; intervals (B, 2, Lq + Lk) int32, see loops.Window.
    `lists` are BlockLists or None. Widths are multiples of 8: the launch tables know no others.
    """

    def __init__(
        self,
        kernel: object,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spec: Any,
        tensors: Any,
        lists: Any,
        tilings: Mapping[str, launch.Tiling] | None = None,
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.spec, self.tensors, self.lists, self.tilings = spec, tensors, lists, tilings or {}
        self.family = launch.family(kernel, q.device)
        self.processors = launch.processors(self.family, q.device)
        self.width, self.value_width = (launch.tile_width(t.shape[3]) for t in (q, v))
        # Tensor cores' fragments of float32 do not fit beside tiles wider than 256 (tf32: 48 spills at D = 512).
        precision = spec.precision if self.widest <= 256 else "ieee"
        self.precision = products(precision, q.element_size(), self.widest)
        self.shape = shape_of(q, k)._replace(batches=SOME)
        self.window = window_of(spec.left, spec.right, spec.right == 0, tensors.key_lengths, tensors.intervals)
        self.dropout = dropout_of(tensors.dropout_state, spec.dropout)

    @property
    def rest(self) -> int:
        """How many columns of queries and keys lie behind the widest tile. The forward keeps them in a second
        one."""
        return max(0, self.q.shape[3] - WIDEST_TILE)

    @property
    def rest_width(self) -> int:
        """The width of their tile; 0 if there are none."""
        return launch.tile_width(self.rest) if self.rest else 0

    @property
    def widest(self) -> int:
        return max(self.width, self.value_width)

    @property
    def kind(self) -> str:
        """Which of a table's rows its launches need, see `launch.look_up`."""
        if self.precision != "ieee":
            return self.precision
        tensors = self.tensors
        heavy = sum(t is not None for t in (tensors.bias, tensors.relative_bias, tensors.dropout_state))
        if heavy:
            return "heavy" if heavy == 1 else "crowded"
        if self.lists is not None:
            return "listed"
        if tensors.intervals is not None:
            return "intervals"
        shaped = any(t is not None for t in (self.spec.left, tensors.alibi_slopes, tensors.head_scale))
        return "shaped" if shaped or self.spec.softcap else "plain"

    @property
    def variants(self) -> tuple[str, ...]:
        """What makes its kernels others than the most used ones, see `launch.look_up`.

        few: there are so few programs that they may split their loops. odd: lengths are no multiples of 16.
        uneven: they are odd, or tiles of values are padded, and with them sums.
        """
        batch, heads, queries, _ = self.q.shape
        key_heads, keys, value_width = self.v.shape[1:]
        programs = batch * min(heads * triton.cdiv(queries, MOST_ROWS), key_heads * triton.cdiv(keys, MOST_ROWS))
        odd = queries % 16 or keys % 16
        found = {
            "few": 2 * programs <= self.processors,
            "odd": odd,
            "uneven": odd or value_width != self.value_width,
        }
        return tuple(name for name, holds in found.items() if holds)

    @property
    def in_nats(self) -> bool:
        """Whether scores are in nats, see `scores.is_in_nats`."""
        bias, relative_bias = self.tensors.bias, self.tensors.relative_bias
        return relative_bias is not None or (bias is not None and bias.dtype != torch.bool)

    def tiling(self, table: dict) -> launch.Tiling:
        """The table's row for this call, or the tiling that was given in its place. Lists and split loops go
        by the table."""
        size, variants = self.q.element_size(), self.variants
        if self.lists is None and "few" not in variants:
            for name, tiling in self.tilings.items():
                if table is getattr(launch, name):
                    return tiling
        row = launch.look_up(table, self.family, size, self.widest, self.kind, variants)
        return row if self.lists is None else launch.within_granules(row)

    def tile(self, tiling: launch.Tiling, relative: bool | None = None, **choices: int) -> Tile:
        """The compile-time choices of a launch, and more `choices` of a kernel's own. `relative`: bounds are
        compared with keys that are counted from the tile's start; None is as launch.MASKED_FIRST says."""
        masked_first = self.family in launch.MASKED_FIRST
        return tile_of(
            HEAD_DIM=min(self.q.shape[3], WIDEST_TILE),
            VALUE_DIM=self.v.shape[3],
            WIDTH=min(self.width, WIDEST_TILE),
            VALUE_WIDTH=self.value_width,
            BLOCK_M=tiling.block_m,
            BLOCK_N=tiling.block_n,
            PRECISION=self.precision,
            MASKED_FIRST=masked_first,
            RELATIVE=masked_first if relative is None else relative,
            **choices,
        )

    def scores(self, sinks: bool = False) -> Scores:
        """What is done to the scores; with the sinks where a kernel reads them."""
        tensors, multiplicity = self.tensors, self.lists is not None and self.lists.full_counts is not None
        return scores_of(
            self.spec.scale, self.spec.softcap or None, tensors.alibi_slopes, tensors.bias, tensors.relative_bias,
            tensors.sinks if sinks else None, multiplicity, tensors.head_scale,
        )  # fmt: skip

    def problem(
        self,
        lists: Lists,
        splits: int | None = None,
        heads_per_section: int = 1,
        sinks: bool = False,
        batches: bool = False,
    ) -> Problem:
        """The values of a launch that goes by these lists. `batches`: the kernel reads how many batch entries
        there are, as all do that store partial results."""
        shape = self.shape
        if batches or splits is not None or lists.full is not None:
            shape = shape._replace(batches=self.q.shape[0])
        return Problem(shape, self.window, lists, self.scores(sinks), self.dropout, splits, heads_per_section)


def products(precision: str, element_size: int, width: int) -> str:
    """tl.dot's input precision. IEEE where the fragments of tf32x3's three products do not fit in registers."""
    return "ieee" if element_size < 4 or (precision == "tf32x3" and width > 128) else precision


def empty_heads(batch: int, heads: int, rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """An empty (batch, heads, rows, width) tensor laid out (batch, rows, heads, width), so that merging the
    heads for the next linear layer costs no copy."""
    strides = rows * heads * width, width, heads * width, 1
    return torch.empty_strided((batch, heads, rows, width), strides, dtype=like.dtype, device=like.device)
