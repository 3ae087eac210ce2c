"""The measurements: counted right, compared right, and never ended by what is measured."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastattn.core.attention import definition as attention_definition
from fastattn.core.attention.spec import AttentionSpec
from fastattn.measuring import bench, measure, peers
from fastattn.measuring.measure import Row, Timing
from fastattn.measuring.peers import BACKWARD, FORWARD, TRAINING, AttentionProblem, MLPProblem

CPU = torch.device("cpu")
ATTENTION = AttentionProblem(1, 2, 32, 16, True, None, "float32")
MLP = MLPProblem(16, 8, 24, False, "float32")
GATED = MLPProblem(16, 8, 24, True, "float32")


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("causal", (False, True))
def test_attention_flops_count_the_visible_scores_and_nothing_else(causal):
    problem = AttentionProblem(2, 3, 7, 16, causal)
    seen = int(attention_definition.visible(7, 7, AttentionSpec(causal)).sum())
    product = 2 * 2 * 3 * seen * 16  # a multiplication and an addition each
    assert [problem.flops(d) / product for d in (FORWARD, BACKWARD, TRAINING)] == [2, 5, 7]


@pytest.mark.parametrize("direction", (FORWARD, TRAINING))
@pytest.mark.parametrize("causal", (False, True))
def test_attention_flops_are_those_our_operators_report(direction, causal):
    problem = AttentionProblem(2, 4, 24, 16, causal, 2, "float32")
    inputs = problem.inputs(CPU)
    call, _ = measure.prepare(problem, direction, "fastattn portable", inputs)
    assert counted(call) == problem.flops(direction)


@pytest.mark.parametrize("direction", (FORWARD, BACKWARD, TRAINING))
@pytest.mark.parametrize("peer", ("eager", "plain GEMMs"))
@pytest.mark.parametrize("problem", (MLP, GATED), ids=lambda p: p.label)
def test_mlp_flops_are_those_of_the_plain_products(problem, peer, direction):
    call, _ = measure.prepare(problem, direction, peer, problem.inputs(CPU))
    assert counted(call) == problem.flops(direction)


@pytest.mark.parametrize("problem", (ATTENTION, MLP, GATED), ids=lambda p: p.label)
def test_a_problem_survives_json(problem):
    assert peers.problem_from(json.loads(json.dumps(peers.describe(problem)))) == problem


def test_median_and_spread_of_the_rounds():
    timing = Timing((4.0, 1.0, 2.0, 3.0, 100.0))
    assert timing.median == 3.0
    assert timing.spread == pytest.approx((4.0 - 2.0) / 3.0)
    assert Timing((2.0,)).spread == 0.0


def test_the_best_peer_is_the_fastest_rival_not_ourselves_and_not_the_floor():
    seconds = {"fastattn triton": 2.0, "plain GEMMs": 1.0, "eager": 8.0, "compiled eager": 4.0}
    rows = [Row(MLP, FORWARD, peer, Timing((s,))) for peer, s in seconds.items()]
    rows.append(Row(MLP, FORWARD, "quack", note="is not installed"))
    measure.add_ratios(rows)
    assert [row.ratio for row in rows] == [2.0, 4.0, 0.5, 1.0, None]
    assert rows[0].tflops == MLP.flops(FORWARD) / 2.0 / 1e12


def test_rounds_are_interleaved_and_their_order_alternates():
    log = []
    calls = {name: lambda name=name: (log.append(name), time.sleep(0.001)) for name in "ab"}
    timings = measure.measure(calls, CPU, rounds=4, seconds=0.0)
    assert "".join(log) == "ab" + "ab" + "ba" + "ab" + "ba"  # once to choose the repeats, then four rounds
    assert all(len(timing.rounds) == 4 and 0.001 < timing.median < 1 for timing in timings.values())


def test_a_short_call_is_repeated_until_the_round_is_long_enough():
    calls = []
    measure.measure({"a": lambda: (calls.append(0), time.sleep(0.002))}, CPU, rounds=1, seconds=0.01)
    assert 1 + 2 <= len(calls) <= 1 + 5


@pytest.mark.parametrize("problem", (ATTENTION, MLP, GATED), ids=lambda p: p.label)
def test_every_peer_solves_the_same_problem(problem):
    names = bench.usable_peers(problem, CPU, compiled=False)
    for row in measure.compare_peers(problem, TRAINING, names, CPU, rounds=1, seconds=0.0):
        assert row.timing and row.peak_bytes, row.note
        assert row.error is None if row.peer in peers.FLOORS else row.error < 1e-5


def flash_attn_func(q, k, v, causal):
    """As flash-attn 4: (batch, length, heads, width), and the log-sum-exp beside the output."""
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal)
    return out.transpose(1, 2), None


def sageattn(q, k, v, tensor_layout, is_causal):
    assert tensor_layout == "HND"
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def mlp_func(x, w1, w2, activation):
    """As quack: gated, gate's and up's rows alternate in one weight."""
    pre = F.linear(x, w1)
    if activation == "gelu_tanh_approx":
        return F.linear(F.gelu(pre, approximate="tanh"), w2)
    assert activation == "swiglu"
    return F.linear(F.silu(pre[:, ::2]) * pre[:, 1::2], w2)


class LigerSiLUMulFunction:
    @staticmethod
    def apply(gate, up):
        return F.silu(gate) * up


@pytest.mark.parametrize(
    "peer, module, stand_in, problem",
    (
        ("flash-attn 4", "flash_attn.cute", flash_attn_func, ATTENTION),
        ("SageAttention", "sageattention", sageattn, ATTENTION),
        ("quack", "quack.mlp", mlp_func, MLP),
        ("quack", "quack.mlp", mlp_func, GATED),
        ("Liger", "liger_kernel.ops.swiglu", LigerSiLUMulFunction, GATED),
    ),
)
def test_other_libraries_are_called_in_their_own_layout(peer, module, stand_in, problem, monkeypatch):
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    setattr(sys.modules[module], stand_in.__name__, stand_in)
    for direction in (FORWARD, TRAINING):
        (row,) = measure.compare_peers(problem, direction, [peer], CPU, rounds=1, seconds=0.0)
        if direction == FORWARD or peer not in peers.FORWARD_ONLY:
            assert row.timing and row.error < 1e-5, row.note
        else:
            assert row.note == "computes no gradient"


def test_a_library_that_is_not_there_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    (row,) = measure.compare_peers(ATTENTION, FORWARD, ["SageAttention"], CPU, rounds=1, seconds=0.0)
    assert row.note == "sageattention is not installed"


def test_a_peer_that_fails_is_a_row_that_says_so(monkeypatch):
    def broken(problem, device):
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setitem(peers.ATTENTION_PEERS, "broken", broken)
    monkeypatch.setitem(peers.ATTENTION_PEERS, "wrong", lambda *_: lambda q, k, v: v + q)
    rows = measure.compare_peers(ATTENTION, FORWARD, ["broken", "wrong", "eager"], CPU, rounds=1, seconds=0.0)
    assert rows[0].note == "RuntimeError: no such kernel" and rows[0].timing is None
    assert rows[1].note.startswith("wrong: relative error") and rows[1].timing is None
    assert rows[2].ratio == 1.0


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(256, 1024)
    for buffers, call in (
        (1, lambda: x + 1),
        (2, lambda: (x + 1) + 1),
        (2, lambda: ((x + 1) + 1) + 1),
        (3, lambda: [x + 1, x + 2, x + 3]),
    ):
        assert measure.peak_memory(call, CPU) == pytest.approx(buffers * x.nbytes, rel=1e-3)


def test_on_a_gpu_the_events_tell_the_time_and_launches_are_held_back(monkeypatch):
    """The device's clock, faked: it ticks a second a call; each pause and each call is noted in order."""
    log, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    def call():
        log.append("call")
        now[0] += 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(cycles))
    device = torch.device("cuda")
    assert measure.seconds_a_call(call, 3, device, pause=1e-3) == 1.0
    assert log == ["wait", measure.CYCLES_A_SECOND * 1e-3, "call", "call", "call", "wait"]
    assert measure.measure({"a": call}, device, rounds=3)["a"] == Timing((1.0, 1.0, 1.0))


def test_on_a_gpu_peak_memory_is_the_allocators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    assert measure.peak_memory(lambda: None, torch.device("cuda")) == 250


def test_the_table_is_plain_when_it_is_not_a_terminal():
    rows = [
        Row(ATTENTION, FORWARD, "eager", Timing((2e-3,)), 3 * 2**20),
        Row(ATTENTION, FORWARD, "fastattn portable", Timing((1e-3,)), 2048),
        Row(ATTENTION, FORWARD, "SDPA cuDNN", note="no viable backend"),
    ]
    measure.add_ratios(rows)
    stream = io.StringIO()
    bench.print_rows(rows, stream)
    lines = stream.getvalue().splitlines()
    assert lines[1] == f"attention forward: {ATTENTION.label}"
    assert lines[4].startswith("fastattn portable") and lines[4].endswith("2.00")
    assert "3 MiB" in lines[5] and lines[5].endswith("1.00")
    assert lines[6] == "  SDPA cuDNN: no viable backend"


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(arguments))


def test_the_command_prints_a_table_and_writes_its_rows(tmp_path, capsys):
    target = tmp_path / "rows.json"
    assert command("attention", "--length", "32", "--device", "cpu", "--rounds", "1", "--json", str(target)) == 0
    printed = capsys.readouterr().out
    assert "Small sizes" in printed and "x best peer" in printed and "fastattn portable" in printed
    rows = json.loads(target.read_text())
    assert {row["direction"] for row in rows} == {FORWARD, TRAINING}
    assert all(row["seconds"] > 0 and row["tflops"] > 0 for row in rows)


@pytest.mark.parametrize(
    "arguments, complaint",
    (
        (("--device", "cuda"), "no GPU"),
        (("--device", "meta"), "must be cpu or cuda"),
        (("--device", "nonsense"), "nonsense"),
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--json", "/nowhere/rows.json"), "cannot write /nowhere/rows.json"),
    ),
)
def test_the_command_ends_in_one_sentence_when_it_cannot_run(arguments, complaint, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(*arguments) == 1
    complaints = capsys.readouterr().err.strip().splitlines()
    assert len(complaints) == 1 and complaint in complaints[0]
