"""The compile report: machine code read rightly, and a build that fails where it must."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("rich")

from benchmarks.compile_report import baseline, compiling, disassembly, hazards, rows
from benchmarks.compile_report.launches import CALLS, calls_for
from benchmarks.compile_report.rows import Loop, Row, main_loops, resident_programs
from benchmarks.compile_report.targets import TARGETS, Target
from fastattn.kernels import launch
from tests.pretended_gpu import GPUS

ROOT = Path(__file__).parents[2]

# A loop 0x20-0x70 whose wait (0xb0) stands out of line, inside an outer loop 0x10-0x80; then a smaller one.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                    /* 0x00000a0000017a02 */
        /*0010*/                   IMAD R2, R2, R3, R4 ;                     /* 0x00000a0000017a02 */
        /*0020*/              @!P1 BRA 0xb0 ;                                /* 0x00000a0000017a02 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;     /* 0x00000a0000017a02 */
        /*0040*/                   MUFU.EX2 R9, R9 ;                         /* 0x00000a0000017a02 */
        /*0050*/                   STL [R1+0x4], R9 ;                        /* 0x00000a0000017a02 */
        /*0060*/                   LDL R9, [R1+0x4] ;                        /* 0x00000a0000017a02 */
        /*0070*/               @P0 BRA 0x20 ;                                /* 0x00000a0000017a02 */
        /*0080*/               @P2 BRA 0x10 ;                                /* 0x00000a0000017a02 */
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;     /* 0x00000a0000017a02 */
        /*00a0*/               @P3 BRA 0x90 ;                                /* 0x00000a0000017a02 */
        /*00a8*/                   EXIT ;                                    /* 0x00000a0000017a02 */
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2] ; /* 0x00000a0000017a02 */
        /*00c0*/              @!P1 BRA 0xb0 ;                                /* 0x00000a0000017a02 */
        /*00d0*/                   BRA 0x30 ;                                /* 0x00000a0000017a02 */
"""


def test_loops_are_found_whole_and_only_the_innermost() -> None:
    instructions = disassembly.parse(SASS)
    tensor = disassembly.tensor_operations(instructions, "")
    loops = disassembly.innermost_loops(instructions, set(tensor))
    assert [[i.address for i in loop] for loop in loops] == [
        [0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0xB0, 0xC0, 0xD0],
        [0x90, 0xA0],
    ]


def test_the_loop_that_issues_least_is_the_full_tile_loop() -> None:
    instructions = disassembly.parse(SASS)
    tensor = disassembly.tensor_operations(instructions, "")
    issued = 2 * 16 * 8 * 16 * 8
    # The second loop issues every product twice.
    masked, full = main_loops(instructions, tensor, [issued, issued // 2], 8, TARGETS["sm_80"])
    assert masked == Loop("masked", 9, issued / 2048, issued / 2048, 9 * 8 / 4, 8 * 8 / 4)
    assert full == Loop("full tile", 2, issued / 4096, issued / 2048, 2 * 8 / 4, 0)


def test_bytes_that_are_asked_of_memory_are_those_of_wide_loads_of_every_thread() -> None:
    codes = ("LDG.E.128.CONSTANT", "LDGSTS.E.BYPASS.LTC128B.128", "LDG.E.64", "LDG.E", "LDG.E.U8", "LDS.128")
    lines = [disassembly.Instruction(16 * n, "", code, "") for n, code in enumerate((*codes, "STG.E.128"))]
    assert disassembly.loaded_bytes(lines, 4) == (16 + 16 + 8) * 32 * 4


def test_loops_that_do_not_match_the_source_are_an_error() -> None:
    instructions = disassembly.parse(SASS)
    tensor = disassembly.tensor_operations(instructions, "")
    with pytest.raises(ValueError, match="2 loops in the machine code for 1 in the source"):
        main_loops(instructions, tensor, [4096], 8, TARGETS["sm_80"])


@pytest.mark.parametrize(("waits", "serialised"), [(1, False), (2, True)])
def test_asynchronous_products_that_wait_for_one_another_are_noticed(waits: int, serialised: bool) -> None:
    lines = ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0"] * 2 + [
        "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    ] * waits
    sass = "".join(f"        /*{16 * n:04x}*/     {line} ;  /* 0x0 */\n" for n, line in enumerate(lines))
    assert disassembly.are_serialised(disassembly.parse(sass)) == serialised


def code(*lines: str) -> list[disassembly.Instruction]:
    """SASS of these instructions; an address in them is 16 times a line's number."""
    return disassembly.parse(
        "".join(f"        /*{16 * n:04x}*/     {line} ;  /* 0x0 */\n" for n, line in enumerate(lines))
    )


PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR12], R24"


@pytest.mark.parametrize(
    ("lines", "lost"),
    [
        # Written before the wait: by one register, by the second half of two, by a load of four, by a product.
        ((f"{PRODUCT}, gsb0", "MUFU.EX2 R5, R100"), "MUFU writes R5"),
        ((f"{PRODUCT}, gsb0", "IMAD.WIDE R6, R100, R101, R102"), "IMAD writes R6, R7"),
        ((f"{PRODUCT}, gsb0", "LDS.128 R4, [R100]"), "LDS writes R4, R5, R6, R7"),
        ((f"{PRODUCT}, gsb0", "SHFL.BFLY PT, R7, R100, 0x1, 0x1f"), "SHFL writes R7"),
        ((PRODUCT, "HGMMA.64x16x16.F32.BF16 R0, gdesc[UR12], R0, gsb0"), "HGMMA writes R4, R5, R6, R7"),
        # The wait is for all but the last group: the first may be written, the last not.
        ((f"{PRODUCT}, gsb0", PRODUCT.replace("R4", "R8") + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1",
          "MUFU.EX2 R4, R4", "MUFU.EX2 R9, R9"), "MUFU writes R9"),
        # In a loop: what its end leaves in flight, its beginning overwrites.
        (("MUFU.EX2 R4, R100", f"{PRODUCT}, gsb0", "@P0 BRA 0x0", "EXIT"), "MUFU writes R4"),
        # As it should be.
        ((f"{PRODUCT}, gsb0", "MUFU.EX2 R8, R4", "STG.E [R4.64], R100", "WARPGROUP.DEPBAR.LE gsb0, 0x0",
          "MUFU.EX2 R4, R100"), ""),
        (("MUFU.EX2 R4, R100", f"{PRODUCT}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "@P0 BRA 0x0", "EXIT"), ""),
        (("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0", "MUFU.EX2 R4, R100"), ""),
    ],
)  # fmt: skip
def test_registers_of_products_in_flight_must_not_be_written(lines: tuple[str, ...], lost: str) -> None:
    found = hazards.overwritten_fragments(code(*lines))
    assert [sentence.split(", which")[0] for sentence in found] == [lost] * bool(lost)


@pytest.mark.parametrize(
    ("lines", "places"),
    [
        (("DEPBAR.LE SB0, 0x1", "LDGSTS.E.BYPASS.128 [R4], [R6.64]"), ["0x10"]),
        (("WARPGROUP.DEPBAR.LE gsb0, 0x0", "LDGSTS.E.BYPASS.128 [R4], [R6.64]"), ["0x10"]),
        (("DEPBAR.LE SB0, 0x1", "BAR.SYNC.DEFER_BLOCKING 0x0", "LDGSTS.E.BYPASS.128 [R4], [R6.64]"), []),
        (("DEPBAR.LE SB5, 0x1", "LDGSTS.E.BYPASS.128 [R4], [R6.64]"), []),
        # One way around the barrier is enough, and so is the loop's way back.
        (("DEPBAR.LE SB0, 0x1", "@P0 BRA 0x30", "BAR.SYNC 0x0", "LDGSTS.E.128 [R4], [R6.64]"), ["0x30"]),
        (("LDGSTS.E.128 [R4], [R6.64]", "BAR.SYNC 0x0", "DEPBAR.LE SB0, 0x1", "@P0 BRA 0x0", "EXIT"), ["0x0"]),
    ],
)
def test_a_copy_after_a_wait_needs_a_barrier(lines: tuple[str, ...], places: list[str]) -> None:
    found = hazards.copies_without_barrier(code(*lines))
    assert [sentence.split(" at ")[1] for sentence in found] == places


TURNED = """
  %s = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<16x64xbf16> * tensor<64x16xbf16> -> tensor<16x16xf32> loc(#1)
  %x:2 = scf.for %i = %0 to %n step %1 iter_args(%y = %s, %p = %q) -> (tensor<16x16xf32>, i32)  : i32 {
    %k = tt.load %p : tensor<16x16x!tt.ptr<bf16>> loc(#2)
    %h = arith.truncf WHAT : tensor<16x16xf32> to tensor<16x16xbf16> loc(#2)
    %t = tt.trans %h {order = array<i32: 1, 0>} : tensor<16x16xbf16> -> tensor<16x16xbf16> loc(#2)
    %u = tt.dot %k, %t, %d, inputPrecision = ieee : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32> loc(#3)
    scf.yield %u, %p : tensor<16x16xf32>, i32 loc(#4)
  } loc(#5)
"""  # noqa: E501


@pytest.mark.parametrize(("operand", "wrong"), [("%y", 1), ("%s", 1), ("%k", 0)])
def test_a_product_must_not_take_a_transposed_product(operand: str, wrong: int) -> None:
    assert len(hazards.transposed_products(TURNED.replace("WHAT", operand))) == wrong


TTIR = """
module {
  tt.func public @kernel(%q: !tt.ptr<bf16> loc("q")) attributes {noinline = false} {
    %s = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<16x64xbf16> * tensor<64x16xbf16> -> tensor<16x16xf32> loc(#1)
    %x = scf.for %i = %0 to %n step %1 iter_args(%y = %z) -> (tensor<16x16xf32>)  : i32 {
      %p = scf.if %t -> (i32) {
        scf.yield %0 : i32 loc(#2)
      } else {
        scf.yield %1 : i32 loc(#2)
      } loc(#2)
      %u = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<16x64xbf16> * tensor<64x32xbf16> -> tensor<16x32xf32> loc(#3)
      %w = tt.dot %u, %d, %e, inputPrecision = ieee : tensor<16x32xbf16> * tensor<32x8xbf16> -> tensor<16x8xf32> loc(#3)
      scf.yield %w : tensor<16x8xf32> loc(#4)
    } {tt.num_stages = 2 : i32} loc(#5)
    scf.for %i = %0 to %n step %1  : i32 {
      tt.store %q, %x : tensor<16x16x!tt.ptr<f32>> loc(#6)
    } loc(#6)
    tt.return loc(#7)
  } loc(#8)
} loc(#9)
"""  # noqa: E501


def test_the_work_of_a_loop_is_what_the_source_asks_for() -> None:
    assert disassembly.loop_flops(TTIR) == [2 * 16 * 64 * 32 + 2 * 16 * 32 * 8]


@pytest.mark.parametrize(
    ("line", "ptx", "shape", "flops"),
    [
        ("HMMA.16816.F32 R4, R8, R12, R4", "", (16, 8, 16), 8 * 4096),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", "", (16, 8, 8), 8 * 2048),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT, gsb0", "", (64, 128, 16), 2 * 2 * 64 * 128 * 16),
        (
            "UTCHMMA tmem[UR4], gdesc[UR8], tmem[UR11], tmem[UR50], idesc[UR51], !UPT",
            "mov.b32 %r7, 136314896;\n"
            "tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], [ %r2 + 0 ], %rd5, %r7, %p6;",
            (128, 128, 16),
            2 * 128 * 128 * 16,
        ),
    ],
)
def test_tensor_core_shapes_of_every_generation(line: str, ptx: str, shape: tuple, flops: int) -> None:
    instructions = disassembly.parse(f"        /*0000*/                   {line} ;   /* 0x0 */")
    operation = disassembly.tensor_operations(instructions, ptx)[0x0]
    assert operation.shape == shape
    assert operation.flops(warps=8) == flops


def test_a_shape_that_cannot_be_known_is_an_error_not_a_guess() -> None:
    instructions = disassembly.parse("        /*0000*/     UTCHMMA gdesc[UR8], gdesc[UR6], tmem[UR1] ;  /* 0x0 */")
    with pytest.raises(ValueError, match=r"1 UTCHMMA instructions, but 0 tcgen05\.mma"):
        disassembly.tensor_operations(instructions, "")


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 255, 0, 8, 1),
        ("sm_90", 168, 0, 4, 3),
        ("sm_90", 64, 100 * 1024, 4, 2),
        ("sm_80", 32, 0, 1, 32),
        ("sm_86", 32, 0, 4, 12),
        ("gfx942", 128, 32 * 1024, 4, 2),
        ("gfx942", 256, 1024, 8, 1),
    ],
)
def test_programs_that_fit_a_multiprocessor(
    target: str, registers: int, shared: int, warps: int, programs: int
) -> None:
    assert resident_programs(registers, shared, warps, TARGETS[target]) == programs


def row(**changes: object) -> Row:
    full = Loop("full tile", 500, 2048.0, 2048.0, 1000.0, 512.0, 1000)
    loops = (full, Loop("masked", 700, 2048.0, 2048.0, 1400.0, 512.0))
    given = {"registers": 200, "shared": 1024, "shared_limit": 2048, "programs": 1, "loops": loops} | changes
    return Row("sm_90", "attention bf16 D=128 causal", "attention_forward_kernel", "128x128", **given)


def test_the_model_is_bounded_by_the_busiest_unit_and_by_their_sum() -> None:
    overlapped, in_turn = Loop("full tile", 1, 100.0, 125.0, 200.0, 50.0).model
    assert (overlapped, in_turn) == (0.5, 100 / 375)


def test_a_sound_row_has_nothing_to_complain_about() -> None:
    assert baseline.resource_complaints(row()) == []
    now = baseline.ratios([row()])
    assert baseline.ratio_complaints(now, now, everything=True) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"spills": 4}, "4 spilled registers or spill instructions"),
        ({"shared": 4096}, "4096 bytes of shared memory of 2048"),
        ({"tensor_memory": 640}, "640 columns of tensor memory"),
        ({"serialised": True}, "asynchronous products wait for one another"),
        ({"hazards": ("LDGSTS after a wait without a barrier at 0x40",)}, "LDGSTS after a wait without a barrier"),
        ({"needed_bytes": 700}, "asks 1000 bytes of memory by wide loads for 700"),
        ({"error": "CompilationError"}, "CompilationError"),
    ],
)
def test_what_does_not_fit_fails_naming_the_row(changes: dict, complaint: str) -> None:
    (found,) = baseline.resource_complaints(row(**changes))
    assert found.startswith("sm_90 attention bf16 D=128 causal attention_forward_kernel: ")
    assert complaint in found


def test_spills_are_forgiven_where_they_are_not_promised_away() -> None:
    assert baseline.resource_complaints(dataclasses.replace(row(spills=4), target="gfx942")) == []
    assert baseline.resource_complaints(dataclasses.replace(row(spills=4), target="sm_120"))


def test_a_row_is_read_once_for_each_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read: list[str] = []

    def look(compiled: compiling.Compiled, call: str, target: Target) -> Row:
        read.append(compiled.artefacts["cubin"])
        return row()

    monkeypatch.setattr(rows, "row_of", look)
    target = TARGETS["sm_90"]
    for code, tile, cached in (("a", "64", True), ("a", "64", True), ("b", "64", True), ("a", "64", False)):
        compiled = compiling.Compiled("kernel", tile, 4, {"cubin": code, "ttir": ""}, None)
        assert rows.known_row(compiled, target, cached) == row()
    assert read == ["a", "b", "a"]


@pytest.mark.parametrize(("rise", "fails"), [(1.029, False), (1.031, True), (0.5, False)])
def test_a_loop_that_issues_three_percent_more_fails(rise: float, fails: bool) -> None:
    committed = {"a full tile": 1.0, "b masked": 1.0}
    found = baseline.ratio_complaints({"a full tile": rise, "b masked": 1.0}, committed, everything=True)
    assert [line.startswith("a full tile: ") for line in found] == [True] * fails


def test_rows_that_come_or_go_ask_for_an_update() -> None:
    (come,) = baseline.ratio_complaints({"new": 1.0}, {}, everything=True)
    (gone,) = baseline.ratio_complaints({}, {"old": 1.0}, everything=True)
    assert come.startswith("new: ") and gone.startswith("old: ")
    assert baseline.ratio_complaints({}, {"old": 1.0}, everything=False) == []


def test_the_table_of_invariant_calls_is_that_of_the_committed_file() -> None:
    readme = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()
    assert baseline.invariant_beside_plain() in readme


def test_rows_survive_the_cache() -> None:
    assert Row.from_json(json.loads(json.dumps(row().to_json()))) == row()


def run(*words: str, cache: Path) -> subprocess.CompletedProcess[str]:
    # The interpreter that the tests run under must not reach the report: it compiles nothing.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_one_call_end_to_end(tmp_path: Path) -> None:
    """Compiles the launchers' own kernels for a GPU that is not there, and again from the cache."""
    words = [
        "-m",
        "benchmarks.compile_report",
        "--target",
        "sm_90",
        "--only",
        "attention bf16 D=64 full padding as bias",
        "--check",
    ]
    for _ in range(2):
        done = run(*words, "--json", str(tmp_path / "rows.json"), cache=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = {row["kernel"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
        assert {name for name, row in rows.items() if row["loops"]} == {
            "attention_forward_kernel",
            "attention_dkdv_kernel",
            "attention_dq_kernel",
            "bias_gradient_kernel",
            "attention_remainder_kernel",
        }
        assert {loop["kind"] for loop in rows["attention_forward_kernel"]["loops"]} == {"full tile", "masked"}
        assert all(row["registers"] > 0 and row["spills"] == 0 for row in rows.values())


EVERY_LOOP_ASKED_FOR = """
from benchmarks.compile_report.compiling import catching
from benchmarks.compile_report.launches import CALLS, AttentionCall, UnevenCall
from benchmarks.compile_report.targets import TARGETS
from triton.runtime.jit import JITFunction

for target in (TARGETS["sm_86"], TARGETS["sm_90"]):  # the fewest processors, and the most used
    asked, widths, run = set(), set(), JITFunction.run
    def noted(kernel, *arguments, **keywords):
        for problem in arguments:
            if type(problem).__name__ == "Problem":
                asked.add((kernel.__name__, "split" if problem.splits else "whole"))
                length = problem.shape.queries
                asked.add((kernel.__name__, "even" if length % 16 == 0 else "uneven"))
                widths.add(keywords["tile"].values()["HEAD_DIM"])
    with catching(target, only="none of them"):
        JITFunction.run = noted
        for call in CALLS:
            if type(call) in (AttentionCall, UnevenCall) and call.head_dim <= 160:
                call.run()
    print(target.name, *sorted(f"{name}:{how}" for name, how in asked), *sorted(widths))
    JITFunction.run = run
"""


def test_loops_that_programs_split_odd_lengths_and_padded_tiles_are_in_the_report(tmp_path: Path) -> None:
    """A spill of theirs was seen first on a GPU: on a meta tensor there were no processors to keep busy."""
    done = run("-c", "import os; del os.environ['TRITON_INTERPRET']\n" + EVERY_LOOP_ASKED_FOR, cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = ("attention_forward_kernel", "attention_dkdv_kernel", "attention_dq_kernel")
    wanted = {f"{name}:{how}" for name in kernels for how in ("split", "whole", "even", "uneven")}
    for line in done.stdout.splitlines():
        # Some widths of each class: with rows that begin at multiples of 16 elements, and of 8.
        assert (wanted | {"40", "72", "80", "96", "136", "160"}) <= set(line.split()), line


LOADS = """
import re
from benchmarks.compile_report.compiling import catching
from benchmarks.compile_report.launches import AttentionCall
from benchmarks.compile_report.targets import TARGETS
from fastattn.kernels import launch

launch.look_up = lambda *asked: launch.Tiling(32, 32, 4, 2)
for name in ("attention_forward_kernel", "attention_dkdv_kernel"):  # whose pointers move from tile to tile
    with catching(TARGETS["sm_90"], name) as caught:
        AttentionCall("bf16", 72, True).run()
    ptx = caught[0].artefacts["ptx"]
    copies, loads = re.findall("cp.async.*?, 0x(.*?),", ptx), re.findall("ld.global.*?[.]b16 ", ptx)
    print(name, *sorted(set(copies)), len(loads))
"""


def test_every_call_is_asked_of_every_nvidia_gpu_that_has_rows_and_of_every_pretended_one() -> None:
    """The README's claim that none spills, or needs too much shared memory, is no larger than what was asked."""
    nvidia = [target for target in TARGETS.values() if target.backend == "cuda"]
    assert all(calls_for(target) == CALLS and target.must_not_spill for target in nvidia)
    served = {name for least, name in launch._FAMILIES if least >= 80}
    assert served == {launch.family_of("cuda", target.arch) for target in nvidia}
    assert {10 * gpu.major + gpu.minor for gpu in GPUS.values()} <= {target.arch for target in nvidia}


def test_heads_of_a_multiple_of_8_are_loaded_16_bytes_at_a_time(tmp_path: Path) -> None:
    """One number at a time took several times the instructions, and smaller tiles, since Triton tells its compiler
    of multiples of 16 only."""
    done = run("-c", "import os; del os.environ['TRITON_INTERPRET']\n" + LOADS, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    # Copies of 16 bytes, of 4 (row values), and loads of 2.
    assert done.stdout.splitlines() == ["attention_forward_kernel 10 0", "attention_dkdv_kernel 10 4 0"]


EVERY_ROW_ASKED_FOR = """
import importlib, pkgutil
from benchmarks.compile_report.compiling import catching
from benchmarks.compile_report.launches import CALLS, WholeMLPCall, calls_for
from benchmarks.compile_report.targets import TARGETS, Target
from fastattn.kernels import launch
from fastattn.kernels.launch.rows import Row

look_up, served, anywhere = launch.look_up, set(), set()
def record(table, *ask):
    tiling = look_up(table, *ask)
    served.add((id(table), id(tiling)))
    return tiling
launch.look_up = record

def is_table(value):
    return isinstance(value, dict) and value and all(
        isinstance(rows, tuple) and rows and isinstance(rows[0], Row) for rows in value.values())

tables = {}
for module in pkgutil.iter_modules(launch.__path__, f"{launch.__name__}."):
    for name, value in vars(importlib.import_module(module.name)).items():
        nested = value.values() if name == "TABLES" else [value]
        tables |= {id(one): (name, one) for one in nested if not name.startswith("_") and is_table(one)}
print(len(tables))
for target in TARGETS.values():
    served.clear()
    with catching(target, only="none of them"):
        for call in CALLS:
            if call in calls_for(target) or not isinstance(call, WholeMLPCall):
                call.run()
    anywhere |= served
    for name, table in tables.values():
        if name.startswith(("CACHE", "QUANTISED")) and target.backend == "hip":
            continue  # caches are not asked on AMD
        for row in table.get(launch.family_of(target.backend, target.arch), table.get("sm_80", ())):
            if (id(table), id(row.tiling)) not in served:
                print(target.name, name, row)
# Rows of a kind, as "shaped" ones, serve any target, and each serves one.
for name, table in tables.values():
    for kind, rows in table.items():
        for row in rows:
            if kind != launch.INTERPRETER and (id(table), id(row.tiling)) not in anywhere:
                print(name, kind, row)
"""


def test_every_row_of_every_launch_table_is_in_the_report(tmp_path: Path) -> None:
    done = run("-c", "import os; del os.environ['TRITON_INTERPRET']\n" + EVERY_ROW_ASKED_FOR, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    tables, *unasked = done.stdout.splitlines()
    assert int(tables) > 20 and not unasked, unasked
