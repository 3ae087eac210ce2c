"""Recordings: a call that was seen twice is repeated step by step, and nothing but the time shows it.

Triton's interpreter shows that the steps compute the same; on pretended GPUs (tests/pretended_gpu) they launch
compiled kernels.
"""

from __future__ import annotations

import ast
import gc
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from attention_problems import without_plans
from hardware import DEVICE, ON_GPU
from plan_calls import CALLS, UNKEPT, Call, results
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
import fastattn.kernels
from fastattn.core import plans
from fastattn.kernels.launch.recording import Recording, record

# Calls that take no kernel: of other backends.
OTHERS = {"reference", "layer norm, ours"}
EVERY_CALL = pytest.mark.parametrize("name", [name for name in CALLS if name not in UNKEPT | OTHERS])


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """Plans are kept for the interpreter, too, which they are not otherwise."""
    plans.forget()
    with mock.patch.object(plans, "_is_interpreted", lambda *_: False):
        yield
    plans.forget()


@pytest.fixture
def repeated() -> Iterator[list[Recording]]:
    """The recordings that were repeated."""
    seen: list[Recording] = []
    whole = Recording.__call__

    def repeat(recording: Recording, tensors):
        seen.append(recording)
        return whole(recording, tensors)

    with mock.patch.object(Recording, "__call__", repeat):
        yield seen


def on_kernels(name: str) -> Call:
    return replace(CALLS[name], options={**CALLS[name].options, "backend": "triton"})


@pytest.mark.parametrize("order", [0, 1])
@EVERY_CALL
def test_a_recording_gives_the_same_bits_and_the_same_layout(name: str, order: int, repeated: list) -> None:
    call = on_kernels(name)
    while not repeated:
        results(call, *call.inputs(), order)
    repeated.clear()
    inputs = call.inputs()  # other values than those that were recorded
    found = results(call, *inputs, order)
    assert repeated
    with without_plans():
        expected = results(call, *inputs, order)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


def test_a_call_is_recorded_when_it_comes_again(repeated: list) -> None:
    call = on_kernels("attention")
    for count in (0, 0, 1, 2):
        results(call, *call.inputs())
        assert len(repeated) == count


@pytest.mark.skipif(ON_GPU, reason="an allocator of a GPU aligns everything")
def test_tensors_that_are_aligned_otherwise_have_a_recording_of_their_own(repeated: list) -> None:
    """Triton compiles a kernel for addresses that are multiples of 16, and one for others."""
    flat = torch.randn(3, 1 + 2 * 4 * 8 * 16)
    lie_well, lie_badly = (flat[:, at : at + 2 * 4 * 8 * 16].view(3, 2, 4, 8, 16).unbind() for at in (0, 1))
    if lie_well[0].data_ptr() % 16:
        lie_well, lie_badly = lie_badly, lie_well
    assert lie_well[0].data_ptr() % 16 == 0 != lie_badly[0].data_ptr() % 16
    q, k, v = (t.clone() for t in lie_well)
    for tensors in [(q, k, v)] * 3 + [(lie_badly[0], k, v)] * 2:
        fastattn.attention(*tensors, backend="triton")
    assert len(repeated) == 1
    fastattn.attention(lie_badly[0], k, v, backend="triton")
    assert len(repeated) == 2 and repeated[0] is not repeated[1]


def test_a_tensor_that_comes_twice_is_not_recorded_but_may_be_repeated(repeated: list) -> None:
    x, y, z = (torch.randn(1, 2, 8, 16, device=DEVICE) for _ in range(3))
    call = lambda *tensors: fastattn.attention(*tensors, causal=True, backend="triton")  # noqa: E731
    for _ in range(3):
        call(x, x, x)
    assert not repeated
    plans.forget()
    for _ in range(3):
        call(x, y, z)
    with without_plans():
        expected = call(x, x, x)
    before = len(repeated)
    assert torch.equal(call(x, x, x), expected) and len(repeated) == before + 1


# What a recording holds, by functions that are no kernels.


def repeats(function, *made) -> bool:
    """Whether the function has a recording; then that it gives the same for other tensors."""
    _, recording = record(function, [torch.randn(shape) for shape in made])
    if recording is not None:
        others = [torch.randn(shape) for shape in made]
        assert torch.equal(recording(others), function(*others))
    return recording is not None


ELSEWHERE = torch.randn(3)


@pytest.mark.parametrize(
    ("function", "recorded"),
    [
        pytest.param(lambda x: (x.t() @ x)[1:].sum(0), True, id="operators and views"),
        pytest.param(lambda x: torch.empty_like(x).copy_(x).mul_(2), True, id="in place"),
        pytest.param(lambda x: torch.zeros(4, 3).t()[1].add_(x[0, 0]), True, id="in place, of a view"),
        pytest.param(lambda x: torch.cat(x.split(1)[::-1]), True, id="several results"),
        pytest.param(lambda x: x.split(4)[0] + 1, True, id="a list of one result"),
        pytest.param(lambda x: x, True, id="nothing"),
        pytest.param(lambda x: x * 2 if x.sum() > 0 else x, False, id="reads a value"),
        pytest.param(lambda x: x + ELSEWHERE, False, id="a tensor from elsewhere"),
        pytest.param(lambda x: ELSEWHERE, False, id="returns a tensor from elsewhere"),
        pytest.param(lambda x: torch.add(x, 1, out=torch.empty(4, 3)), False, id="a tensor as a keyword"),
    ],
)
def test_steps_are_recorded_that_any_values_would_take(function, recorded: bool) -> None:
    assert repeats(function, (4, 3)) == recorded


def test_a_recording_keeps_no_tensor_alive() -> None:
    x = torch.randn(4, 3)
    outcome, recording = record(lambda t: t.t() @ t, [x])
    dead = weakref.ref(x), weakref.ref(outcome)
    del x, outcome
    gc.collect()
    assert recording is not None and not any(ref() is not None for ref in dead)


def test_a_recording_lets_go_of_what_no_later_step_needs() -> None:
    """A backward in chunks holds one chunk's intermediate results, and so does its recording."""

    def in_chunks(x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(64, 64)
        for chunk in x.split(64):
            total += chunk.t() @ chunk
        return total

    def most_alive(function, x: torch.Tensor) -> int:
        alive: set[int] = set()
        most = 0

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal most
                made = func(*args, **(kwargs or {}))
                if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes() == 64 * 64 * 4:
                    storage = made.untyped_storage()._cdata
                    alive.add(storage)
                    weakref.finalize(made, alive.discard, storage)
                    most = max(most, len(alive))
                return made

        with Counting():
            function(x)
        return most

    x = torch.randn(640, 64)
    _, recording = record(in_chunks, [x])
    assert recording is not None and torch.equal(recording([x]), in_chunks(x))
    assert most_alive(lambda t: recording([t]), x) <= most_alive(in_chunks, x)


def test_two_threads_record_what_is_theirs() -> None:
    x = torch.randn(64, 64)
    wrong: list[object] = []

    def work(factor: float) -> None:
        for _ in range(50):
            _, recording = record(lambda t: t * factor, [x])
            if recording is None or not torch.equal(recording([x]), x * factor):
                wrong.append(factor)

    threads = [threading.Thread(target=work, args=(f,)) for f in (2.0, 3.0)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_kernels_are_launched_by_one_function_only() -> None:
    """A launch that a recording does not see would be missing when it is repeated."""
    for path in Path(fastattn.kernels.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert path.name == "recording.py", f"{path.name}, line {node.lineno}"
