"""The tests run kernels in Triton's interpreter without its idle work: see quick_interpreter.py."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from hardware import ON_GPU

import fastattn

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(ON_GPU, reason="kernels are compiled")


def results() -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 50, 16).requires_grad_().unbind()
    out = fastattn.attention(q, k, v, causal=True, dropout_p=0.1, backend="triton")
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


def test_its_results_have_the_bits_of_tritons_own() -> None:
    replace = interpreter._patch_lang.replace
    with mock.patch.object(interpreter._patch_lang, "replace", side_effect=replace) as replaced:
        quick = results()
    builder = interpreter.interpreter_builder
    with (
        mock.patch.object(interpreter, "_patch_lang", side_effect=replace) as replaced_each_time,
        mock.patch.object(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True)),
    ):
        plain = results()
    assert 0 < replaced.call_count < replaced_each_time.call_count / 50
    assert all(map(torch.equal, quick, plain))


def test_nothing_stays_replaced_after_a_launch_that_fails() -> None:
    from triton import language

    plain = language.load
    with mock.patch.object(interpreter.interpreter_builder, "create_masked_store", side_effect=ZeroDivisionError):
        with pytest.raises(Exception, match="ZeroDivisionError"):
            results()
        assert language.load is plain and not interpreter._patch_lang.done
