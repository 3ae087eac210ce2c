"""Settings of every test: reproducible, one thread a worker, GPU tests skipped where there is none."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from hardware import DEVICE, ON_GPU
from without_hypothesis import stand_in

stand_in()  # before any test module imports it

# What this user has proven on this machine must not decide what a test computes with.
os.environ["FASTATTN_PROOFS"] = "off"

from hypothesis import settings  # noqa: E402

# Reproducible, and without a deadline: the interpreter is slow and the first launch compiles.
settings.register_profile("fastattn", deadline=None, derandomize=True, database=None)
settings.load_profile("fastattn")

if not ON_GPU and find_spec("triton"):
    import quick_interpreter

    quick_interpreter.quicken()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        # Not item.keywords: those hold the names of folders, too, and a checkout may lie in one named gpu.
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return DEVICE
