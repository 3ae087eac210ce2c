"""On a GPU the portable backend hands calls to PyTorch's fused kernels: which ones, with how few launches, and
only where they compute what the definition says.

A pretended GPU computes on the CPU (routes_program.py), and copies stand in PyTorch's place (torch_stand_ins.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hardware import ON_GPU

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> Iterator[dict]:
    pytest.importorskip("triton")
    if ON_GPU:
        pytest.skip("PyTorch is built for real GPUs here: two drivers would mix")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.attention.routes_program"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


EFFICIENT = ["memory-efficient", "memory-efficient backward"]
FLASH, SEQUENCES, CUDNN = ([name, f"{name} backward"] for name in ("flash", "sequences", "cuDNN"))
NONE: list[str] = []


@pytest.mark.parametrize(
    ("call", "half", "single"),
    [
        ("full", FLASH, EFFICIENT),
        ("causal", FLASH, EFFICIENT),
        ("window", FLASH, EFFICIENT),
        ("key lengths", SEQUENCES, EFFICIENT),
        ("documents", SEQUENCES, EFFICIENT),
        ("boolean mask", EFFICIENT, EFFICIENT),
        ("bias", EFFICIENT, EFFICIENT),
        ("padding bias", EFFICIENT, EFFICIENT),
        ("sinks", FLASH, EFFICIENT),
        ("head scale", FLASH, EFFICIENT),
        ("alibi", EFFICIENT, EFFICIENT),
        ("relative bias", EFFICIENT, EFFICIENT),
        ("random lists", EFFICIENT, EFFICIENT),
        ("bigbird", EFFICIENT, EFFICIENT),
        ("softcap", NONE, NONE),
        ("dropout", ["jiterator"], ["jiterator"]),
    ],
)
def test_a_call_takes_the_fastest_of_pytorch_s_kernels_that_computes_it_exactly(call, half, single, found):
    assert found[f"{call} float16"] == ["", half] and found[f"{call} float32"] == ["", single]


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        ("bias of every head", EFFICIENT),
        ("alibi, larger than the inputs", NONE),
        ("width 20", NONE),
        ("width 320", EFFICIENT),
        ("values 16 wide", EFFICIENT),
        ("other lengths", FLASH),
        ("fewer keys", FLASH),
        ("lse gradient", ["flash"]),
        ("empty entries", SEQUENCES),
        ("empty entries, causal", EFFICIENT),
        ("empty rows", EFFICIENT),
        ("empty rows, clean", EFFICIENT),
        ("both", EFFICIENT),
        ("sinks beside empty entries", SEQUENCES),
        ("sinks", FLASH),
        ("window and key lengths", EFFICIENT),
        ("mask and window", EFFICIENT),
        ("bias with NaN behind a window", EFFICIENT),
        ("bias in float32", EFFICIENT),
        ("bias beside alibi", EFFICIENT),
        ("full documents", SEQUENCES),
        ("documents and key lengths", EFFICIENT),
        ("scales and key lengths", SEQUENCES),
        ("scales and mask", EFFICIENT),
        ("scales and a bias", EFFICIENT),
        ("scales and sinks", FLASH),
        ("lists of each head", EFFICIENT),
        ("lists and key lengths", NONE),  # larger than the inputs
        ("packed", SEQUENCES),
        ("packed, causal", SEQUENCES),
        ("packed, window", SEQUENCES),
        ("packed, window after the diagonal", EFFICIENT),
        ("packed, sinks", SEQUENCES),
        # Where PyTorch prefers it.
        ("full, cuDNN", CUDNN),
        ("causal, cuDNN", CUDNN),
        ("sinks, cuDNN", CUDNN),
        ("window, cuDNN", FLASH),
        # The table without an answer.
        ("key lengths, by another table", EFFICIENT),
    ],
)
def test_what_is_special_about_a_call_decides(call, kernels, found):
    assert found[call] == ["", kernels]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        ("causal", "PyTorch's flash"),
        ("documents", "PyTorch's flash, sequences"),
        ("bias", "PyTorch's memory-efficient"),
        ("head scale", "PyTorch's flash"),
        ("dropout", "steps of PyTorch's"),
    ],
)
def test_a_proof_tells_against_which_of_them_ours_was_timed(direction, call, kernel, found):
    assert found[f"{direction} {call} is timed against"] == kernel


@pytest.mark.parametrize("name", ["bias", "relative bias"])
def test_large_biases_of_float32_are_not_rounded_to_half_precision(name, found):
    error, kernels = found[f"{name}, large"]
    assert error < 1e-4 and kernels == ["memory-efficient"]


def test_a_plain_call_that_was_seen_before_goes_to_flash_attention_without_looking_it_up(found):
    assert found["planned calls look up"] == [True, False, False]
    assert len(found["planned calls are alike"]) == 15 and all(found["planned calls are alike"])


# Operators that compute, of a forward and of a backward, the kernel and the front door included. Key lengths are
# clamped by the front door, biases have rows that see nothing put right, gradients of sinks are sums of their own.
@pytest.mark.parametrize(
    ("call", "forward", "backward"),
    [
        ("full", 1, 1),
        ("causal", 1, 1),
        ("window", 1, 1),
        ("float32", 1, 1),
        ("documents", 2, 2),
        ("key lengths", 4, 3),
        ("boolean mask, clean", 2, 3),
        ("boolean mask", 6, 3),
        ("bias, clean", 1, 5),
        ("bias", 5, 5),
        ("alibi", 4, 5),
        ("random lists", 5, 2),
        ("dropout", 34, 41),
        ("sinks", 6, 10),
        ("relative bias", 11, 22),
    ],
)
def test_few_operators_are_launched_where_pytorch_has_a_kernel(call, forward, backward, found):
    launched = found[f"operators, {call}"]
    assert all(len(names) <= most for names, most in zip(launched, (forward, backward), strict=True)), launched


@pytest.mark.parametrize(
    ("fault", "kernel", "quantity", "instead"),
    [
        ("ignored", "flash attention with a window", "out", EFFICIENT),
        ("log2", "flash attention with a window", "lse", EFFICIENT),
        ("unaligned", "flash attention of causal sequences", "out", EFFICIENT),
        ("unwritten", "flash attention of sequences", "dk", EFFICIENT),
        ("tf32", "memory-efficient attention", "out", NONE),
    ],
)
def test_a_kernel_that_computes_something_else_is_told_of_once_and_not_used(
    fault, kernel, quantity, instead, found
):
    assert found[f"fault {fault}"] == ["", instead]
    (sentence,) = found[f"said {fault}"]
    dtype = "float32" if fault == "tf32" else "float16"
    assert f"{kernel} is not used on cuda:0 in torch.{dtype}: its {quantity} differs" in sentence


def test_an_operator_that_raises_is_not_used(found):
    assert found["fault cudnn"] == ["", FLASH]
    (sentence,) = found["said cudnn"]
    assert "cuDNN attention is not used on cuda:0 in torch.float16: RuntimeError: no plan" in sentence
