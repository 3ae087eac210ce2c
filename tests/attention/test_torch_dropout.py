"""The C++ function that draws dropout's random numbers on a GPU, compiled for this machine: the same bits."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn.core.attention import torch_dropout
from fastattn.core.attention.dropout import KeepMasks, dropout_mask, state_of_part
from fastattn.core.attention.spec import check_dropout
from fastattn.core.attention.torch_dropout import CODE, FusedKeepMasks

MAIN = """
extern "C" void run(double** inputs, double threshold, double* out, long count) {
  for (long i = 0; i < count; ++i)
    out[i] = keep_weight<double>(
        inputs[0][i], inputs[1][i], inputs[2][i], inputs[3][i], inputs[4][i], inputs[5][i], threshold);
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The function as PyTorch's jiterator would call it."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("dropout")
    (folder / "keep.cpp").write_text(CODE + MAIN)
    library = folder / "keep.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", str(folder / "keep.cpp"), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).run
    function.argtypes = ctypes.c_void_p, ctypes.c_double, ctypes.c_void_p, ctypes.c_long
    function.restype = None

    def call(*tensors: Tensor, threshold: float) -> Tensor:
        there = [t.contiguous() for t in torch.broadcast_tensors(*tensors)]
        assert all(t.dtype == torch.float64 for t in there) and len(there) == 6
        out = torch.empty_like(there[0])
        pointers = (ctypes.c_void_p * 6)(*(t.data_ptr() for t in there))
        function(ctypes.addressof(pointers), threshold, out.data_ptr(), out.numel())
        return out

    with mock.patch.object(torch_dropout, "_compiled", lambda: call):
        yield call


@given(
    st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.floats(0.0, 0.999),
    st.integers(0, 30), st.integers(0, 30), st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_each_block_has_the_bits_of_the_definition(compiled, seed, offset, dropout_p, row, column, of_part):
    dropout_p = check_dropout(dropout_p)
    state, sizes = torch.tensor([[seed, offset], [offset, seed]]), (3, 40, 45)
    state = state_of_part(state, 5, 2**24, 2**20) if of_part else state
    masks = FusedKeepMasks(state, sizes, dropout_p)
    place = slice(0, 2), slice(1, 3), slice(row, 40), slice(column, 45)
    expected = dropout_mask(state, dropout_p, *sizes)[:, 1:3, row:, column:]
    found = masks.of(*place)
    assert torch.equal(found.bool(), expected)


def test_pytorch_can_read_the_code():
    parsed = torch.cuda.jiterator._CodeParser(CODE)
    assert parsed.function_name == "keep_weight" and parsed.function_params.count("T ") == 7


def test_it_serves_where_its_bits_are_right_and_else_the_log_says_why_not(compiled, caplog, monkeypatch):
    device = torch.device("cpu")
    assert torch_dropout._agrees(device)

    def wrong(*tensors: Tensor, threshold: float) -> Tensor:
        return compiled(*tensors, threshold=threshold + 1000)

    def broken(*tensors: Tensor, threshold: float) -> Tensor:
        raise RuntimeError("nvrtc: no such file")

    for function, words in ((wrong, "its bits differ"), (broken, "RuntimeError: nvrtc: no such file")):
        caplog.clear()
        with mock.patch.object(torch_dropout, "_compiled", lambda: function):  # noqa: B023
            assert not torch_dropout._agrees(device)
        assert f"jiterator is not used for dropout on cpu: {words}" in caplog.text
    gpu = torch.device("cuda", 0)
    assert torch_dropout.masks_of(gpu) is KeepMasks  # in a build of PyTorch without GPUs
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for known, kind in ((True, FusedKeepMasks), (False, KeepMasks)):
        with mock.patch.dict(torch_dropout._known, {gpu: known}):
            assert torch_dropout.masks_of(gpu) is kind
    assert torch_dropout.masks_of(device) is KeepMasks
