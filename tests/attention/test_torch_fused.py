"""The C++ functions of steps around PyTorch's kernels, compiled for this machine, against PyTorch's operators."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastattn.core.attention import torch_fused
from fastattn.core.attention.torch_fused import PARTS, SHARE, SINK_GRADIENT, STEPS, Step

CPU = torch.device("cpu")
NAMES = [step.name for step in STEPS]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Callable[[Step], Callable[..., list[Tensor]]]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")

    def make(step: Step) -> Callable[..., list[Tensor]]:
        """The function as PyTorch's jiterator would call it."""
        parsed = torch.cuda.jiterator._CodeParser(step.code)
        count = parsed.function_params.count("T ")
        given = ", ".join(f"inputs[{i}][i]" for i in range(count))
        results = ", ".join(f"results[{i}][i]" for i in range(step.results))
        call = f"{parsed.function_name}<float>({given}"
        body = f"results[0][i] = {call})" if step.results == 1 else f"{call}, {results})"
        loop = f"for (long i = 0; i < count; ++i) {body};"
        main = f'extern "C" void run(float** inputs, float** results, long count) {{ {loop} }}'
        folder = tmp_path_factory.mktemp("fused")
        (folder / "step.cpp").write_text(f"#include <cmath>\n{step.code}\n{main}\n")
        command = [compiler, "-O1", "-shared", "-fPIC", str(folder / "step.cpp"), "-o", str(folder / "step.so")]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(folder / "step.so")).run
        function.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long
        function.restype = None

        def run(*tensors: Tensor) -> list[Tensor]:
            there = [t.float().contiguous() for t in torch.broadcast_tensors(*tensors)]
            assert len(there) == count
            found = [torch.empty_like(there[0]) for _ in range(step.results)]
            addresses = [(ctypes.c_void_p * len(ts))(*(t.data_ptr() for t in ts)) for ts in (there, found)]
            function(*map(ctypes.addressof, addresses), there[0].numel())
            return found

        return run

    return make


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_a_compiled_step_gives_what_the_operators_give_and_serves(step, compiled, caplog):
    with mock.patch.object(torch_fused, "_compiled", compiled):
        assert torch_fused._agrees(step, CPU), caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_parts_of_a_gradient_are_rounded_to_even_and_lose_nothing_of_account(dtype, compiled):
    torch.manual_seed(0)
    gradient = torch.randint(-(2**31), 2**31 - 1, (50000,)).int().view(torch.float32)
    gradient = torch.cat((gradient[gradient.abs() < 6e4 * 4096], torch.tensor([65520.0 * 4096, 1e-45, 0.0, -3.0])))
    minus = torch.tensor((*torch_fused.minus(dtype), 0, 0), dtype=dtype)
    rows = (
        torch.zeros(len(gradient), 2),
        gradient[:, None],
        torch.zeros(len(gradient), 1),
        minus.view(torch.float32),
    )
    found, expected = (f(*rows)[0].contiguous().view(dtype) for f in (compiled(PARTS[dtype]), PARTS[dtype].plain))
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    normal = (gradient.abs() > 1e-3) & (gradient.abs() < 1e8)
    sums = (found.double() * minus.double()).sum(1)[normal]
    assert (sums / -gradient[normal].double() - 1).abs().max() < 2**-14


def test_sinks_of_huge_scores_and_rows_that_see_nothing(compiled):
    """float32 rounds what a number of 1e9 and a one are together."""
    inf = float("inf")
    lse, sink = torch.tensor([[1e9, -inf, -inf, 1e9, 3.0], [1e9, -inf, 2.0, 0.0, -inf]])
    share, total = compiled(SHARE)(lse, sink)
    assert share.tolist() == [0.5, 0.0, 0.0, 1.0, 1.0] and total.tolist() == [1e9, -inf, 2.0, 1e9, 3.0]
    ones = torch.ones(5)
    (terms,) = compiled(SINK_GRADIENT)(ones, 2 * ones, lse, sink, torch.full((5,), float("nan")), 0 * ones)
    assert terms.tolist() == pytest.approx([-2.0, 0.0, 0.0, 0.0, 0.0])


def test_it_serves_where_it_is_right_and_else_the_log_says_why_not(compiled, caplog, monkeypatch):
    def wrong(step: Step) -> Callable[..., list[Tensor]]:
        return lambda *tensors: [t + 1 for t in compiled(step)(*tensors)]

    def broken(step: Step) -> Callable[..., list[Tensor]]:
        raise RuntimeError("nvrtc: no such file")

    for make, words in ((wrong, "its results differ"), (broken, "RuntimeError: nvrtc: no such file")):
        caplog.clear()
        with mock.patch.object(torch_fused, "_compiled", make):
            assert not torch_fused._agrees(SHARE, CPU)
        assert f"jiterator is not used for the share of keys beside a sink on cpu: {words}" in caplog.text
    gpu = torch.device("cuda", 0)
    assert not torch_fused.serves(SHARE, gpu)  # in a build of PyTorch without GPUs
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for known in (True, False):
        with mock.patch.dict(torch_fused._known, {(SHARE.name, gpu): known}):
            assert torch_fused.serves(SHARE, gpu) is known
    assert not torch_fused.serves(SHARE, CPU)
