"""What only the Triton kernels have: tiles, their order, and launch tables."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from attention_problems import Problem, check
from hardware import DEVICE, ON_GPU

triton = pytest.importorskip("triton")

from fastattn.kernels import launch  # noqa: E402
from fastattn.kernels.tiles import heavy_first  # noqa: E402


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16), (32, 32)])
def test_tile_sizes_do_not_change_the_answer(blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "look_up", lambda *_: launch.Tiling(*blocks, 4, 1))
    for queries, keys in ((70, 70), (33, 97), (97, 33)):
        problem = Problem(heads=2, key_heads=1, queries=queries, keys=keys, causal=True, lse_gradient=True)
        check(problem, "triton")


@triton.jit
def record_order(visits, order, tiles, heads, per_section):
    program = triton.language.program_id(0)
    tile, head = heavy_first(program, tiles, heads, per_section, True)
    triton.language.store(order + program, tile)
    triton.language.store(visits + head * tiles + tile, program)


@pytest.mark.parametrize("window", [(None, None), (20, None), (9, 30)])
@pytest.mark.parametrize("first", [frozenset(), frozenset({launch.INTERPRETER})])
def test_masked_keys_may_come_first_or_last(
    first: frozenset, window: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ON_GPU:
        first = frozenset() if not first else frozenset({launch.family(None, torch.device("cuda", 0))})
    monkeypatch.setattr(launch, "MASKED_FIRST", first)
    monkeypatch.setattr(launch, "PLAIN_DQ_RELATIVE", first)
    check(Problem(heads=2, key_heads=1, queries=70, keys=97, window=window, causal=True, sinks=True), "triton")


@pytest.mark.parametrize("heads_per_section", [1, 2, 3, 7])
def test_program_order_visits_every_tile_once_and_heavy_ones_first(heads_per_section: int) -> None:
    tiles, heads = 5, 7
    visits = torch.full((heads, tiles), -1, dtype=torch.int32, device=DEVICE)
    order = torch.full((heads * tiles,), -1, dtype=torch.int32, device=DEVICE)
    record_order[(heads * tiles,)](visits, order, tiles, heads, heads_per_section)
    assert sorted(visits.flatten().tolist()) == list(range(heads * tiles))
    first_section = order[: heads_per_section * tiles].tolist()
    assert first_section == sorted(first_section, reverse=True)


@pytest.mark.parametrize("table", [launch.ATTENTION_FORWARD, launch.ATTENTION_DKDV, launch.ATTENTION_DQ])
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 103, 120, 121])
def test_every_architecture_dtype_and_width_has_a_row(arch: int, table: dict) -> None:
    family = launch.family_of("cuda", arch)
    for element_bytes in (2, 4):
        for width in (16, 32, 64, 128, 256):
            assert launch.look_up(table, family, element_bytes, width).block_m >= 16
    with pytest.raises(ValueError, match="no launch configuration for 8-byte elements"):
        launch.look_up(table, family, 8, 64)


def test_no_function_of_the_kernels_takes_more_than_twelve_arguments() -> None:
    """Values travel in `problem`, compile-time choices in `tile`."""
    longer = [
        f"{file.name}: {node.name}"
        for file in (Path(__file__).parents[2] / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and len(node.args.args) + len(node.args.kwonlyargs) > 12
    ]
    assert longer == []
