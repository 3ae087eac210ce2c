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
        ("alibi, distances not kept", EFFICIENT),
        ("relative bias, distances not kept", EFFICIENT),
        # Padded with zeros.
        ("key lengths, widths 20 float16", SEQUENCES),
        ("key lengths, widths 20 float32", EFFICIENT),
        *((f"full, widths {widths} float16", FLASH) for widths in ("20", "59 and 33", "3 and 40")),
        *((f"full, widths {widths} float32", EFFICIENT) for widths in ("20", "59 and 33", "3 and 40")),
        ("width 320", EFFICIENT),
        ("values 16 wide", FLASH),
        ("other lengths", FLASH),
        ("fewer keys", FLASH),
        ("lse gradient", FLASH),
        *((f"lse gradient, {name}", FLASH) for name in ("causal", "large", "small", "window", "sinks", "scale")),
        ("lse gradient, sequences", SEQUENCES),
        *((f"lse gradient, {name}", EFFICIENT) for name in ("mask", "bias", "relative bias")),
        ("lse gradient, widths", FLASH),
        ("lse gradient, cuDNN", CUDNN),
        ("empty entries", SEQUENCES),
        ("empty entries, causal", SEQUENCES),
        ("empty entries, causal, other lengths", SEQUENCES),
        ("empty entries, causal, fewer keys", SEQUENCES),
        ("empty entries, later keys", SEQUENCES),
        ("lse gradient, key lengths, causal", SEQUENCES),
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


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("elements", [2**12, 2**13])
@pytest.mark.parametrize("kind", ["softcap", "dropout", "everything"])
def test_fused_steps_are_exact_wherever_blocks_are_cut(kind, elements, dtype, found):
    wrong, kernels = found[f"{kind} in blocks of {elements} {dtype}"]
    fused = ["fused step"]
    assert wrong == "" and kernels == (fused if kind == "softcap" else [*fused, "jiterator"])


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


MOST = 3
# Why some take more than that. Key lengths are clamped by the front door. Rows that see nothing are given 0 and
# -inf by PyTorch's memory-efficient kernel; of a version that leaves anything there, they are found and put right.
_UNDEFINED = "rows that see nothing are found in what is added, and put right in out and lse"
_TWO_CALLS = "flash attention aligns a causal mask to the last key: two calls, and their sums"
_SECOND = "a second backward for the log-sum-exp, what it is given, and the sums of both"
_SINKS = "terms of the gradient and their sum, and autograd's sum over the batch that shares the sinks"
_SCALES = (
    "q times its scale is two numbers in half precision, so k stands there twice, and flash attention takes v, "
    "out and dout of its width; the gradient of the scales is a sum of products"
)
_SINGLE = "all is computed in float32, since half precision rounds the bias: converted before and after"
_DISTANCES = (
    "sums along diagonals without atomics, of which those at both ends are joined; autograd's sum over the batch"
)
_WIDTHS = "every tensor is padded to the width that the kernel takes, and results are cut"
_STEPS = "PyTorch has no kernel: steps, each through all scores of a block"


# Operators that compute, of a forward and of a backward, the kernel and the front door included; and the bytes
# that go through memory, as a multiple of touching once what must be. The same for larger sizes:
# python -m benchmarks.route_counts
@pytest.mark.parametrize(
    ("call", "forward", "backward", "bytes_forward", "bytes_backward", "reason"),
    [
        ("full", 1, 1, 1.0, 1.0, ""),
        ("causal", 1, 1, 1.0, 1.0, ""),
        ("window", 1, 1, 1.0, 1.0, ""),
        ("float32", 1, 1, 1.0, 1.0, ""),
        ("documents", 2, 2, 1.1, 1.1, ""),
        ("key lengths", 3, 3, 1.1, 1.1, ""),
        ("key lengths, causal", 7, 5, 2.8, 2.8, _TWO_CALLS),
        ("boolean mask, clean", 2, 3, 1.1, 1.1, ""),
        ("boolean mask", 6, 3, 1.7, 1.1, _UNDEFINED),
        ("bias, clean", 1, 3, 1.1, 1.6, ""),
        ("bias", 5, 3, 1.7, 1.6, _UNDEFINED),
        ("alibi", 2, 2, 1.3, 1.2, ""),
        ("random lists, clean", 1, 2, 1.1, 1.1, ""),
        ("random lists", 5, 2, 1.6, 1.1, _UNDEFINED),
        ("width 20", 5, 9, 3.3, 3.3, _WIDTHS),
        ("sinks", 3, 4, 1.6, 1.8, _SINKS),
        ("causal lse gradient", 1, 4, 1.0, 2.8, _SECOND),
        ("head scale", 5, 11, 4.8, 5.8, _SCALES),
        ("relative bias, float32", 6, 10, 1.8, 2.7, f"{_UNDEFINED}; {_DISTANCES}"),
        ("relative bias, clean", 4, 12, 5.3, 8.2, f"{_SINGLE}; {_DISTANCES}"),
        ("dropout", 20, 30, 25.5, 24.5, _STEPS),
        ("softcap", 14, 22, 19.5, 18.9, _STEPS),
    ],
)
def test_few_operators_touch_memory_few_times_where_pytorch_has_a_kernel(
    call, forward, backward, bytes_forward, bytes_backward, reason, found
):
    *launched, of_forward, of_backward = found[f"operators, {call}"]
    assert all(len(names) <= most for names, most in zip(launched, (forward, backward), strict=True)), launched
    assert of_forward <= bytes_forward + 0.01 and of_backward <= bytes_backward + 0.01
    assert reason or max(forward, backward) <= MOST


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        ("sinks, no compiler", FLASH),
        ("lse gradient, no compiler torch.float16", FLASH),
        ("lse gradient, no compiler torch.float32", EFFICIENT),
    ],
)
def test_steps_that_cannot_be_compiled_are_done_by_operators(call, kernels, found):
    assert found[call] == ["", kernels]
    assert all("jiterator is not used for the" in line and "no nvrtc" in line for line in found["said nvrtc"])
    assert len(found["said nvrtc"]) == 4


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


def test_a_backward_that_does_not_read_the_output_gets_no_gradient_of_the_log_sum_exp(found):
    assert found["fault own delta"] == ["", ["flash"]]
    flash, efficient = found["said own delta"]
    assert "flash attention with a gradient of the log-sum-exp is not used on cuda:0 in torch.float16" in flash
    assert "memory-efficient attention with a gradient" in efficient and "its dq differs" in efficient


def test_an_operator_that_raises_is_not_used(found):
    assert found["fault cudnn"] == ["", FLASH]
    (sentence,) = found["said cudnn"]
    assert "cuDNN attention is not used on cuda:0 in torch.float16: RuntimeError: no plan" in sentence
