"""`fastattn prove` keeps the tilings that were right and fastest on the spot; they serve plain calls."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from hardware import ON_GPU

import fastattn
from fastattn.core import proofs
from fastattn.core.attention import tilings
from fastattn.core.attention.spec import NO_TENSORS, AttentionSpec
from fastattn.core.proofs import Key, Record, Row
from fastattn.kernels import launch
from fastattn.measuring import checking, doctor, prove, prove_cases, prove_tilings, prove_worker
from fastattn.measuring.ahead import MOST_TILINGS
from fastattn.measuring.measure import one_line
from fastattn.measuring.pool import Answer

pytestmark = pytest.mark.skipif(ON_GPU, reason="Triton's interpreter stands in for a GPU")
CPU = torch.device("cpu")
AHEAD = launch.Tiling(32, 16, 4, 1, ahead=True)
OTHER = launch.Tiling(16, 16, 4, 1)
IMPOSSIBLE = launch.Tiling(24, 16, 4, 1)  # no power of two
TABLES = ("ATTENTION_FORWARD", "ATTENTION_DKDV", "ATTENTION_DQ")


class Here:
    """Runs cases in this process, in place of a Worker."""

    def ask(self, case, **limits):
        try:
            return Answer(rows=prove_tilings.HANDLERS[case["kind"]](case, CPU, lambda step: None))
        except Exception as error:
            return Answer(step=case["kind"], note=one_line(error), failed=True)

    def close(self) -> None:
        pass


def passes(*_) -> list[dict]:
    right = {"max_error": 0.0, "allowed": 1.0, "verdict": "passed"}
    return [{"quantity": quantity, **right} for quantity in ("result 0", "dq")]


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Causal attention only, small, in float32. `here.seconds` says how long a call takes, by its tiling; the
    table's takes 1. What serves otherwise takes 2."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(proofs.VARIABLE)
    monkeypatch.setattr(proofs, "_held", [])
    proofs.forget()
    found = SimpleNamespace(seconds={}, candidates=(AHEAD, OTHER))
    small = [one for one in prove_cases.small_cases(("attention",)) if one["proves"] == "causal"]
    cases = [{**one, "tiled": True, "checks": one["checks"][:1]} for one in small]
    monkeypatch.setattr(prove_cases, "small_cases", lambda families: cases)
    monkeypatch.setattr(prove, "Worker", lambda *_: Here())
    monkeypatch.setattr(launch, "candidates", lambda *_: found.candidates)
    monkeypatch.setattr(checking, "check_kernel", passes)
    monkeypatch.setattr(prove_worker, "compare", lambda calls, device: {"triton": 1.0, "portable": 2.0})

    def seconds_of(variants, *_):
        return [1.0 if not one else found.seconds.get(*one.values(), 1.0) for one in variants]

    monkeypatch.setattr(prove_tilings, "seconds_of", seconds_of)
    yield found
    monkeypatch.undo()
    proofs.forget()


def launched(monkeypatch, call) -> dict[str, launch.Tiling]:
    """The tilings of the launches within, by kernel."""
    start, found = launch.start, {}

    def watched(kernel, grid, *arguments, **keywords):
        tile = keywords["tile"].values()
        if "AHEAD" in tile:
            sides = tile["BLOCK_M"], tile["BLOCK_N"], keywords["num_warps"], keywords["num_stages"]
            found[kernel.__name__] = launch.Tiling(*sides, ahead=tile["AHEAD"])
        return start(kernel, grid, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "start", watched)
        call()
    return found


def train(width: int = 16, backend: str | None = None, **asked):
    def call() -> None:
        q, k, v = (torch.randn(1, 2, 40, width, requires_grad=True) for _ in "qkv")
        fastattn.attention(q, k, v, **asked, backend=backend).sum().backward()

    return call


def test_the_fastest_tilings_are_kept_and_serve_plain_calls_of_that_kind_and_width(here, monkeypatch):
    here.seconds = {AHEAD: 0.5, OTHER: 0.7}
    record = fastattn.prove("cpu", families=["attention"])
    assert {row.verdict for row in record.rows.values()} == {proofs.PROVEN}
    kept = {key.direction: row.tilings for key, row in record.rows.items()}
    numbers = tilings.numbers_of(AHEAD)
    assert kept["forward"] == {TABLES[0]: numbers}
    assert kept["backward"] == dict.fromkeys(TABLES[1:], numbers)
    serving = launched(monkeypatch, train(causal=True))
    assert set(serving.values()) == {AHEAD} and len(serving) == 3
    # By name, too. Other kinds, widths and features go by the tables.
    assert set(launched(monkeypatch, train(causal=True, backend="triton")).values()) == {AHEAD}
    for others in ({"width": 24, "causal": True}, {"causal": False}, {"causal": True, "softcap": 2.0}):
        assert AHEAD not in launched(monkeypatch, train(backend="triton", **others)).values()


@pytest.mark.parametrize("seconds", [{}, {AHEAD: 0.99}], ids=["as fast", "hardly faster"])
def test_a_tiling_that_is_not_clearly_faster_leaves_the_table_in_place(seconds, here):
    here.seconds = seconds
    record = fastattn.prove("cpu", families=["attention"])
    assert {row.verdict for row in record.rows.values()} == {proofs.PROVEN}
    assert not any(row.tilings for row in record.rows.values())


def test_tilings_that_are_wrong_or_do_not_compile_are_not_chosen(here, monkeypatch):
    def broken(*asked):
        tried = (tilings._tried or {}).values()
        if IMPOSSIBLE in tried:
            raise RuntimeError("out of resource: shared memory")
        rows = passes()
        if OTHER in tried:
            rows[-1]["verdict"] = "FAILED: broken on purpose"
        return rows

    monkeypatch.setattr(checking, "check_kernel", broken)
    here.candidates, here.seconds = (OTHER, IMPOSSIBLE), {OTHER: 0.1, IMPOSSIBLE: 0.1}
    record = fastattn.prove("cpu", families=["attention"])
    assert {row.verdict for row in record.rows.values()} == {proofs.PROVEN}
    assert not any(row.tilings for row in record.rows.values())


def test_no_tiling_is_tried_in_a_direction_whose_table_s_kernel_spills(here, monkeypatch):
    check, tried = prove_worker.check, []
    monkeypatch.setitem(prove_tilings.HANDLERS, "try", lambda case, *_: tried.append(case["try"]["table"]) or [])

    def spilling(*asked):
        rows = check(*asked)
        return [{**row, "verdict": proofs.SPILLS if row["direction"] == "forward" else None} for row in rows]

    monkeypatch.setitem(prove_tilings.HANDLERS, "check", spilling)
    fastattn.prove("cpu", families=["attention"])
    assert set(tried) == set(TABLES[1:])


def test_the_doctor_shows_the_tilings_that_were_chosen_and_a_file_holds_them_as_they_are(here, capsys):
    here.seconds = {AHEAD: 0.5}
    record = fastattn.prove("cpu", families=["attention"])
    proofs.forget()
    assert proofs.record_of(CPU).rows == record.rows
    doctor.report_proofs(CPU)
    said = " ".join(capsys.readouterr().out.split())
    for direction, kernel in (("forward", "forward"), ("backward", "dkdv"), ("backward", "dq")):
        row = f"{direction} causal float32 16 small {kernel} 32 x 16, 4 warps, 1 stage, products ahead"
        assert row in said


def test_a_tiling_is_checked_in_launches_of_its_own(monkeypatch):
    one = next(one for one in prove_cases.small_cases(("attention",)) if one["proves"] == "causal")
    one = {
        **one,
        "checks": [{**one["checks"][0], "length": 20}],
        "timed": {"small": {**one["timed"]["small"], "length": 20}},
    }
    asked = {**one, "try": {"table": "ATTENTION_DQ", "tiling": tilings.numbers_of(AHEAD)}}
    rows = []
    serving = launched(monkeypatch, lambda: rows.extend(prove_tilings.try_tiling(asked, CPU, lambda step: None)))
    assert rows == [{"verdict": None, "reason": ""}]
    assert [kernel for kernel, tiling in serving.items() if tiling == AHEAD] == ["attention_dq_kernel"]


@pytest.mark.parametrize(
    "kernel, verdict", [("attention_dq_kernel", proofs.SPILLS), ("attention_dkdv_kernel", None)]
)
def test_a_tiling_with_which_its_own_kernel_spills_is_not_right(kernel, verdict, monkeypatch):
    @contextlib.contextmanager
    def launching(note):
        yield note(kernel, SimpleNamespace(n_spills=2))

    monkeypatch.setattr(prove_worker, "launched", launching)
    monkeypatch.setattr(prove_worker, "spills_of", lambda compiled: compiled.n_spills)
    monkeypatch.setattr(checking, "check_kernel", passes)
    one = next(iter(prove_cases.small_cases(("attention",))))
    asked = {**one, "try": {"table": "ATTENTION_DQ", "tiling": tilings.numbers_of(AHEAD)}}
    (row,) = prove_tilings.try_tiling(asked, CPU, lambda step: None)
    assert row["verdict"] == verdict


def test_each_variant_is_timed_with_its_own_tilings(monkeypatch):
    one = next(one for one in prove_cases.small_cases(("attention",)) if one["proves"] == "causal")
    sizes = prove_worker.Sizes(**{**one["timed"]["small"], "length": 20, "key_heads": 2})
    seen = []
    monkeypatch.setattr(prove_tilings, "ROUNDS", 2)
    monkeypatch.setattr(prove_tilings, "WARM_UP", 1)

    def seconds_a_call(call, count, device):
        (tiling,) = launched(monkeypatch, call).values()
        seen.append(tiling)
        return 2.0

    monkeypatch.setattr(prove_worker, "seconds_a_call", seconds_a_call)
    variants = [{}, {"ATTENTION_FORWARD": AHEAD}]
    prove_tilings.seconds_of(variants, sizes, "forward", CPU)
    own = launch.look_up(launch.ATTENTION_FORWARD, launch.INTERPRETER, 4, 16)
    own = own._replace(values=launch.EVERY)
    assert seen == [own, AHEAD] + [own] * 2 + [AHEAD] * 4 + [own] * 2


Q = torch.empty(2, 4, 1024, 64, dtype=torch.bfloat16, device="meta")
CAUSAL = AttentionSpec(causal=True)
LENGTHS = NO_TENSORS._replace(key_lengths=torch.empty(2, dtype=torch.int32))


@pytest.mark.parametrize(
    "shape, spec, tensors, direction, serves",
    [
        (Q, CAUSAL, NO_TENSORS, "forward", True),
        (Q, CAUSAL, NO_TENSORS, "backward", False),  # the record has a row about the forward only
        (Q, AttentionSpec(), NO_TENSORS, "forward", False),
        (Q, AttentionSpec(causal=True, window=(9, None)), NO_TENSORS, "forward", False),
        (Q, AttentionSpec(causal=True, softcap=2.0), NO_TENSORS, "forward", False),
        (Q, AttentionSpec(causal=True, dropout=0.5), NO_TENSORS, "forward", False),
        (Q, CAUSAL, LENGTHS, "forward", False),
        (Q.half(), CAUSAL, NO_TENSORS, "forward", False),
        (Q[..., :40], CAUSAL, NO_TENSORS, "forward", False),
        (Q[:1, :, :9], CAUSAL, NO_TENSORS, "forward", False),  # a small call
    ],
)
def test_a_kept_tiling_serves_what_its_row_is_about(shape, spec, tensors, direction, serves, monkeypatch):
    key = Key("attention", "forward", "causal", "bfloat16", 64, "medium")
    row = Row(key, proofs.PROVEN, tilings={TABLES[0]: tilings.numbers_of(AHEAD)}, tilings_width=64)
    record = Record(proofs.machine(CPU), rows={key: row})
    monkeypatch.setattr(proofs, "record_of", lambda device: record)
    found = tilings.chosen(shape, shape, shape, spec, tensors, direction)
    assert found == ({TABLES[0]: AHEAD} if serves else {})
    narrow_values = tilings.chosen(shape, shape, shape[..., :16], spec, tensors, direction)
    assert narrow_values == {}


@pytest.mark.parametrize(
    "numbers", [[32, 16, 4], [32, 16, 4, 0, True], [32, 16, 4, 1, 1], "ahead", [32.0, 16, 4, 1, True]]
)
def test_a_record_with_a_tiling_that_is_none_is_refused(numbers):
    key = Key("attention", "forward", "causal", "bfloat16", 64, "medium")
    row = Row(key, proofs.PROVEN, tilings={TABLES[0]: tilings.numbers_of(AHEAD)}, tilings_width=64)
    text = json.dumps(row.as_json())
    assert Row.of(json.loads(text)) == row
    with pytest.raises((ValueError, TypeError)):
        Row.of({**json.loads(text), "tilings": {TABLES[0]: numbers}})


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("width", prove_cases.TILED_WIDTHS)
def test_there_are_candidates_beside_the_tables_rows_for_what_is_trained_most(family, width):
    for name in TABLES:
        own = launch.look_up(getattr(launch, name), family, 2, width)
        found = launch.candidates(name, family, 2, width)
        assert found and own not in found and len(set(found)) == len(found)
    assert sum(len(launch.candidates(name, family, 2, width)) for name in TABLES) <= MOST_TILINGS
    assert not launch.candidates(TABLES[0], family, 4, width)
