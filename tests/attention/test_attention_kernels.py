"""What only the Triton kernels have: tiles, their order, and launch tables."""

from __future__ import annotations

import ast
import functools
import itertools
from pathlib import Path

import pytest
import torch
from attention_problems import Problem, check
from hardware import DEVICE, ON_GPU
from torch.autograd import forward_ad

import fastattn

triton = pytest.importorskip("triton")

from rows_alone import rows_alone  # noqa: E402

from fastattn.core.attention.spec import AttentionSpec, ScoreTensors  # noqa: E402
from fastattn.kernels import launch  # noqa: E402
from fastattn.kernels.attention.forward import attention_forward_kernel  # noqa: E402
from fastattn.kernels.attention.problem import Call  # noqa: E402
from fastattn.kernels.tiles import heavy_first, unit_of  # noqa: E402


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16), (32, 32)])
def test_tile_sizes_do_not_change_the_answer(blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "look_up", lambda *_: launch.Tiling(*blocks, 4, 1))
    for queries, keys in ((70, 70), (33, 97), (97, 33)):
        problem = Problem(heads=2, key_heads=1, queries=queries, keys=keys, causal=True, lse_gradient=True)
        check(problem, "triton")


def look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = launch.look_up
    monkeypatch.setattr(launch, "look_up", lambda *asked: look_up(*asked)._replace(ahead=True))


@pytest.mark.parametrize(
    "asked",
    [
        {"causal": True},
        {"queries": 20, "keys": 64},  # no tile is masked
        {"queries": 40, "keys": 20, "causal": True},  # rows that see nothing
        {"keys": 70, "window": (9, 30), "lengths": True},
        {"intervals": True},
        {"dtype": torch.float16, "causal": True, "queries": 7, "keys": 200},  # loops are split
        {
            "queries": 20, "causal": True, "window": (30, None), "softcap": 1.5, "alibi": True, "sinks": True,
            "lengths": True, "dropout": 0.2, "bias": (0, 0, 0, 0), "radius": 12,
        },
    ],
    ids=lambda asked: " ".join(asked),
)  # fmt: skip
def test_products_may_be_issued_a_tile_ahead(asked: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    look_ahead(monkeypatch)
    check(Problem(**{"heads": 2, "key_heads": 1, "lse_gradient": True} | asked), "triton")


def test_with_lists_nothing_is_issued_ahead() -> None:
    assert launch.within_granules(launch.Tiling(128, 128, 8, 3, ahead=True)) == launch.Tiling(64, 64, 4, 3)


EVERYTHING: dict = {
    "heads": 2, "key_heads": 1, "queries": 20, "keys": 40, "causal": True, "window": (30, None),
    "softcap": 1.5, "alibi": True, "sinks": True, "lengths": True, "dropout": 0.2, "of_part": True,
    "lse_gradient": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "asked",
    [
        EVERYTHING | {"bias": (0, 0, 0, 0), "radius": 12},
        {"bias": (1, 1, 0, 0), "masked": True},
        {"lists": "random", "queries": 24, "keys": 70},
        {"intervals": True},
        {"head_scale": True, "heads": 4, "key_heads": 2},
        {"dtype": torch.float16, "causal": True, "queries": 7, "keys": 150},  # loops are split
    ],
    ids=lambda asked: " ".join(asked),
)
def test_wide_heads_take_every_option(asked: dict) -> None:
    check(
        Problem(
            **{"heads": 1, "key_heads": 1, "width": 320, "value_width": 512, "queries": 20, "keys": 40} | asked
        ),
        "triton",
    )


@pytest.mark.parametrize(
    ("width", "value_width", "layout"), [(40, 24, "bhld"), (72, 12, "packed"), (10, 30, "blhd")]
)
def test_rows_that_begin_at_no_multiple_of_16_are_read_right(width: int, value_width: int, layout: str) -> None:
    """Their strides are rounded to units, see `tiles.unit_of`."""
    asked = {"batch": 2, "heads": 3, "key_heads": 1, "queries": 5, "keys": 37, "causal": True}
    check(Problem(**asked, width=width, value_width=value_width, layout=layout, lse_gradient=True), "triton")


@pytest.mark.parametrize(("width", "value_width"), [(59, 13), (24, 13), (11, 16)])
@pytest.mark.parametrize("asked", [EVERYTHING, {"head_scale": True}, {"lists": "random"}, {"invariant": True}])
def test_kernels_get_widths_that_are_multiples_of_8(asked, width, value_width, monkeypatch) -> None:
    """Of others the compiler loads one number at a time."""
    seen, tile_width = set(), launch.tile_width
    monkeypatch.setattr(launch, "tile_width", lambda width: seen.add(width) or tile_width(width))
    check(
        Problem(
            **{"heads": 2, "key_heads": 1, "queries": 20, "keys": 37} | asked, width=width, value_width=value_width
        ),
        "triton",
    )
    assert {width + -width % 8, value_width + -value_width % 8} <= seen
    assert all(width % 8 == 0 for width in seen)


@pytest.mark.parametrize("invariant", [False, True])
def test_results_of_padded_heads_lie_as_any_others(invariant: bool) -> None:
    q, k, v = (
        torch.randn(2, length, heads, width, device=DEVICE).transpose(1, 2).requires_grad_()
        for length, heads, width in ((5, 4, 11), (7, 2, 11), (7, 2, 13))
    )
    out = fastattn.attention(q, k, v, invariant=invariant, backend="triton")
    gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    if not invariant:
        with forward_ad.dual_level():
            dual = fastattn.attention(forward_ad.make_dual(q.detach(), q.detach()), k, v, backend="triton")
            gradients += (forward_ad.unpack_dual(dual).tangent,)
    for result, like in zip((out, *gradients), (out, q, k, v, out)[: 4 + (not invariant)], strict=True):
        assert result.shape == like.shape and result.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("strides", "unit"),
    [((16, 32, 0), 1), ((72, 1152, 0), 8), ((0, 48, 40), 8), ((12, 24, 16), 4), ((6, 8, 4), 2), ((3, 8, 8), 1)],
)
def test_a_unit_is_the_largest_power_of_two_below_16_that_divides_all_strides(strides: tuple, unit: int) -> None:
    assert unit_of(*strides).value == unit


@pytest.mark.parametrize("asked", [{"causal": True}, {"sinks": True, "bias": (0, 0, 0, 0)}, {"lists": "random"}])
@pytest.mark.parametrize("queries", [5, 20])  # of 5 the loops are split
def test_values_in_several_passes_give_the_same_bits(
    queries: int, asked: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(heads=1, key_heads=1, queries=queries, keys=150, value_width=40, **asked)
    torch.manual_seed(0)
    inputs, options = problem.inputs(), problem.arguments(problem.score_tensors())
    found: list = []
    for values in (launch.EVERY, 16):
        row = launch.Tiling(32, 16, 4, 1, values)
        monkeypatch.setattr(launch, "look_up", lambda *_, row=row: row)
        with rows_alone():
            found.append(fastattn.attention(*inputs, **options, return_lse=True, backend="triton"))
    (out, lse), (out_of_passes, lse_of_passes) = found
    assert out_of_passes.equal(out) and lse_of_passes.equal(lse)


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


TABLES = [name for name in launch.__all__ if name.startswith("ATTENTION_")]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 103, 120, 121, "gfx942"])
def test_every_architecture_dtype_width_and_kind_has_a_row(arch: int | str, name: str) -> None:
    family, table = launch.family_of("hip" if isinstance(arch, str) else "cuda", arch), getattr(launch, name)
    for element_bytes, width in itertools.product((2, 4), (16, 32, 64, 128, 256, 512)):
        kinds = ("plain", "shaped", "heavy", "crowded", "intervals", "listed")
        kinds += ("tf32", "tf32x3") * (element_bytes == 4 and width < 512)
        for kind, variants in itertools.product(
            kinds, ((), ("few", "odd", "uneven"), ("few",), ("odd", "uneven"), ("uneven",))
        ):
            if name == "ATTENTION_TANGENT" and element_bytes == 4 and width > 128:
                continue  # refused, see the capability table
            tiling = launch.look_up(table, family, element_bytes, width, kind, variants)
            assert min(tiling[:2]) >= (16 if element_bytes == 2 else 8)
            # A tile this wide has few rows: more would fill shared memory, or registers, on every GPU.
            wide = width == 512 and name != "ATTENTION_DELTA"
            assert not wide or tiling.block_m * tiling.block_n <= 4096, (kind, element_bytes)
    with pytest.raises(ValueError, match="no launch configuration for 8-byte elements"):
        launch.look_up(table, family, 8, 64)


@pytest.mark.parametrize(
    ("queries", "keys", "width", "heads", "variants"),
    [
        (4096, 4096, 128, 16, ()),
        (4096, 4096, (192, 128), 16, ()),  # sums are as wide as values
        (4096, 4096, 96, 16, ("uneven",)),
        (4096, 4095, 128, 16, ("odd", "uneven")),
        (4096, 4096, 72, 16, ("uneven",)),
        (2048, 2048, 128, 4, ("few",)),
        (4096, 128, 128, 4, ("few",)),  # few keys: their gradients have few programs
        (1, 4096, 128, 16, ("few", "odd", "uneven")),
    ],
)
def test_the_variant_of_a_kernel_is_known_from_its_shapes(queries, keys, width, heads, variants, monkeypatch):
    """They choose its row: variants need more registers, which must not make the most used kernels slower."""
    monkeypatch.setattr(launch, "processors", lambda family, device: 132)
    width, value_width = width if isinstance(width, tuple) else (width, width)
    q, k = (torch.empty(1, n, length, width) for n, length in ((heads, queries), (heads // 2, keys)))
    v = torch.empty(1, heads // 2, keys, value_width)
    call = Call(attention_forward_kernel, q, k, v, AttentionSpec(), ScoreTensors(), None)
    assert call.variants == variants


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        (("bias",), "heavy"), (("relative_bias",), "heavy"), (("dropout_state",), "heavy"),
        (("bias", "dropout_state"), "crowded"), (("bias", "relative_bias", "dropout_state"), "crowded"),
    ],
)  # fmt: skip
def test_several_heavy_features_at_once_are_a_kind_of_their_own(asked, kind):
    q = torch.empty(1, 2, 16, 16)
    tensors = ScoreTensors(**{name: torch.empty(1, 2, 16, 16) for name in asked})
    assert Call(attention_forward_kernel, q, q, q, AttentionSpec(dropout=0.5), tensors, None).kind == kind


def test_rows_of_a_variant_come_first_and_those_of_its_kind_before_others():
    plain, few, odd = (launch.Row(2, 64, launch.Tiling(size, 16, 4, 1)) for size in (128, 64, 32))
    table = {"sm_80": (plain,), "sm_80 plain few": (few,), "odd": (odd,)}
    ask = functools.partial(launch.look_up, table, "sm_80", 2, 64)
    assert ask("plain") == ask("shaped", ("few",)) == plain.tiling
    assert ask("plain", ("few",)) == few.tiling
    assert ask("plain", ("odd", "few")) == ask("shaped", ("odd",)) == odd.tiling


def test_no_function_of_the_kernels_takes_more_than_twelve_arguments() -> None:
    """Values travel in `problem`, compile-time choices in `tile`."""
    longer = [
        f"{file.name}: {node.name}"
        for file in (Path(__file__).parents[2] / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and len(node.args.args) + len(node.args.kwonlyargs) > 12
    ]
    assert longer == []
