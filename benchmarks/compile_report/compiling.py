"""Compile, for any target and without a device, exactly what a public launcher would launch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.compile_report.targets import TARGETS, Target
from fastattn.kernels import launch


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled: the launch's tile, and Triton's artefacts and metadata."""

    kernel: str
    tile: str
    warps: int
    artefacts: dict[str, Any]
    metadata: Any


class TargetOnly:
    """A Triton driver that only tells which target is current; it cannot load or launch a kernel."""

    def __init__(self, target: Target):
        self.target = target

    def get_current_target(self):
        return self.target.compiler_target

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels per device number; each target is a device of its own.
        return list(TARGETS).index(self.target.name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def catching(target: Target, only: str | None = None) -> Iterator[list[Compiled]]:
    """Inside, kernels are compiled for `target` and put on the list, not launched; only the kernel `only`, if
    given.

    The driver stays in place afterwards: without a GPU there is no other, and the process does nothing else.
    """
    caught: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **keywords):
        if only not in (None, kernel.__name__):
            return None
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **keywords)
        warps = compiled.metadata.num_warps
        caught.append(Compiled(kernel.__name__, tile_of(keywords), warps, compiled.asm, compiled.metadata))
        return compiled

    driver.set_active(TargetOnly(target))
    launch._family_of_device.cache_clear()
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "processors", lambda family, device: target.processors),
    ):
        yield caught


def tile_of(keywords: dict[str, Any]) -> str:
    """ "128x64, 8 warps, 2 stages", from a launch's keywords."""
    constants = {**keywords["tile"].values(), **keywords} if "tile" in keywords else keywords
    sides = [str(constants[side]) for side in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if side in constants]
    parts = ["x".join(sides)]
    parts += [f"{keywords[name]} {word}" for name, word in _HARDWARE.items() if name in keywords]
    return ", ".join(part for part in parts if part)


_HARDWARE = {"num_warps": "warps", "num_stages": "stages"}
