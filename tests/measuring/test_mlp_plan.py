"""`fastattn doctor --mlp` says what is true of the calls it speaks of."""

from __future__ import annotations

import re

import pytest
import torch
from hardware import DEVICE, ON_GPU
from torch import Tensor

import fastattn
from fastattn.cli import main
from fastattn.core import proofs
from fastattn.core.capabilities import BACKWARD, CLASSES, FORWARD
from fastattn.core.mlp.spec import SAVES
from fastattn.core.proofs import Key
from fastattn.measuring import mlp_plan

TOKENS, WIDTH, HIDDEN = 24, 16, 200


def bytes_kept(save: str, gated: bool) -> int:
    """What autograd keeps of a call, x included, weights not."""
    torch.manual_seed(0)
    x, down = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(WIDTH, HIDDEN)
    into = [torch.randn(HIDDEN, WIDTH) for _ in range(2)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        if gated:
            fastattn.gated_mlp(x, *into, down, save=save)
        else:
            fastattn.mlp(x, into[0], None, down, None, save=save)
    weights = {t.data_ptr() for t in (*into, down)}
    return sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in weights)


@pytest.mark.skipif(ON_GPU, reason="compares with calls on the CPU")
@pytest.mark.parametrize("gated", [False, True])
def test_the_bytes_of_each_save_are_those_that_autograd_keeps(gated: bool) -> None:
    rows = mlp_plan.kept_rows(TOKENS, WIDTH, HIDDEN, torch.float32, torch.device(DEVICE), gated)
    assert [row[0] for row in rows] == list(SAVES)
    for save, _, per_token, *_ in rows:
        assert float(per_token) * TOKENS == pytest.approx(bytes_kept(save, gated), rel=1e-5), save


def test_the_report_names_the_backend_the_least_time_and_every_save(capsys) -> None:
    assert main(["doctor", "--mlp", "24", "16", "200", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "MLP, gelu: 24 x 16 -> 200 -> 16, bfloat16" in printed and "gated MLP, silu" in printed
    assert printed.count("portable" if not ON_GPU else "PyTorch") >= 4
    assert len(re.findall(r"least time, forward(?: and backward)? +[\d.e+-]+ ms +[\d.e+-]+ GFLOP", printed)) == 4
    for save in SAVES:
        assert len(re.findall(rf"^  {save} ", printed, re.M)) == 2


def test_one_kernel_for_the_whole_layer_is_named_where_it_serves_and_why_not_elsewhere(monkeypatch) -> None:
    device = torch.device(DEVICE)
    about = (TOKENS, 64, 256, torch.float32, device, False)
    assert mlp_plan.served(*about)[-1][1:] == ("no", "only in half precision")
    half = TOKENS, 64, 256, torch.float16, device, False
    assert mlp_plan.served(*half)[-1][1:] == ("no", "not proven to be faster at every number of tokens")
    assert mlp_plan.served(TOKENS, 129, 256, torch.float16, device, False)[-1][1:] == ("no", "only up to 128 wide")
    keys = [Key("mlp", d, "whole", "float32", 64, size) for d in (FORWARD, BACKWARD) for size in CLASSES]
    proven = proofs.Record(proofs.machine(device), rows={key: proofs.Row(key, proofs.PROVEN) for key in keys})
    monkeypatch.setattr(proofs, "record_of", lambda device: proven)
    forward, backward, whole = mlp_plan.served(*about)
    assert (
        forward[1:] == backward[1:] == ("triton", "the hidden layer never leaves the chip") and whole[1] == "yes"
    )
    x_alone = 4 * 64
    kept = {row[0]: (float(row[2]), row[4]) for row in mlp_plan.kept_rows(*about)}
    assert kept["auto"] == kept["nothing"] == (x_alone, "at most 0 KiB")
    assert kept["preactivation"][0] > x_alone


def test_the_least_time_is_that_of_the_products_at_the_rate_that_was_timed() -> None:
    (forward, both) = mlp_plan.floors(100, 10, 20, False, 1e6)
    assert forward[1:] == ("80 ms", "8e-05 GFLOP") and both[1:] == ("240 ms", "0.00024 GFLOP")
    (gated, _) = mlp_plan.floors(100, 10, 20, True, 1e6)
    assert gated[1] == "120 ms"


def test_a_size_below_one_is_refused_by_its_name(capsys) -> None:
    assert main(["doctor", "--mlp", "8", "0", "8"]) == 2
    assert capsys.readouterr().out == "fastattn doctor: WIDTH must be at least 1, got 0\n"
