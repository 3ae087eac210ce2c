"""Compile one kernel with other tiles: the rows of the launch tables were chosen from such lists."""

from __future__ import annotations

import itertools
from typing import NamedTuple
from unittest import mock

from benchmarks.compile_report.launches import AttentionCall, Call, MLPCall
from benchmarks.compile_report.rows import Row, rows_of
from benchmarks.compile_report.targets import TARGETS
from fastattn.kernels import launch


class Subject(NamedTuple):
    """A kernel, the name of its table in kernels/launch/, and the call that launches it."""

    kernel: str
    table: str
    call: Call


def subjects(width: int, dtype: str) -> dict[str, Subject]:
    """What can be swept, for a head dimension or, of an MLP, a model dimension."""
    attention = AttentionCall(dtype, width, True)
    mlp, gated = MLPCall(dtype, width, "gelu", False, True), MLPCall(dtype, width, "silu", True, True)
    return {
        "forward": Subject("attention_forward_kernel", "ATTENTION_FORWARD", attention),
        "dkdv": Subject("attention_dkdv_kernel", "ATTENTION_DKDV", attention),
        "dq": Subject("attention_dq_kernel", "ATTENTION_DQ", attention),
        "mlp": Subject("hidden_kernel", "MLP_FORWARD", mlp),
        "gated_mlp": Subject("hidden_kernel", "MLP_GATED_FORWARD", gated),
        "mlp_backward": Subject("hidden_gradient_kernel", "MLP_BACKWARD", mlp),
    }


def candidates(sides: tuple[int, ...], warps: tuple[int, ...], stages: tuple[int, ...]) -> list[launch.Tiling]:
    """Tiles of at least 16 and at most 128 scores a thread, so that registers are left for the rest."""
    every = itertools.starmap(launch.Tiling, itertools.product(sides, sides, warps, stages))
    return [tile for tile in every if 16 <= tile.block_m * tile.block_n / (32 * tile.warps) <= 128]


class Trial(NamedTuple):
    """One tile, tried on one target."""

    subject: Subject
    target: str
    tile: launch.Tiling

    def rows(self, cached: bool) -> list[Row]:
        look_up = launch.look_up
        swept = getattr(launch, self.subject.table)

        def replaced(table, *ask):
            return self.tile if table is swept else look_up(table, *ask)

        with mock.patch.object(launch, "look_up", replaced):
            return rows_of(self.subject.call, TARGETS[self.target], self.subject.kernel, cached)


def merit(row: Row) -> tuple[bool, bool, float]:
    """Sorts the best first: it fits, spills nothing, and comes nearest to the tensor-core limit if its units take
    turns."""
    return not row.fits or bool(row.error), row.spills > 0, -row.best.model[1] if row.best else 0.0
