"""The table decides: what it refuses is an error that says why, what it allows is what the README shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hardware import DEVICE, ON_GPU

import fastattn
from fastattn.core import capabilities
from fastattn.core.attention.spec import AttentionSpec
from fastattn.core.capabilities import FORWARD, Request


def request_for(dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Request:
    q = torch.empty(1, 2, 8, 16, dtype=dtype, device=device)
    return Request("attention", AttentionSpec(), (q, q, q))


def test_an_impossible_choice_names_the_missing_feature() -> None:
    q = torch.zeros(1, 2, 8, 16, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot compute this call \(forward\): no float64"):
        fastattn.attention(q, q, q, backend="triton")


def test_the_environment_variable_chooses_and_the_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    assert capabilities.choose(request_for(), FORWARD) == "reference"
    assert capabilities.choose(request_for(), FORWARD, "portable") == "portable"
    monkeypatch.setenv("FASTATTN_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"FASTATTN_BACKEND must be one of .*, got 'fast'"):
        capabilities.choose(request_for(), FORWARD)


@pytest.mark.skipif(ON_GPU, reason="about machines without one")
def test_without_triton_or_its_interpreter_the_obstacle_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="the Triton kernels need a GPU, the tensors are on cpu"):
        capabilities.choose(request_for(), FORWARD, "triton")
    monkeypatch.setattr(capabilities, "_triton_installed", lambda: False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        capabilities.choose(request_for(), FORWARD, "triton")


def test_the_page_of_features_is_the_table() -> None:
    page = (Path(__file__).parents[2] / "FEATURES.md").read_text()
    assert page == capabilities.markdown(), "write it anew: fastattn doctor --features > FEATURES.md"


def test_the_readme_s_example_runs() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    exec(readme.split("```python\n")[1].split("```")[0], {})


def test_gpus_too_old_for_the_kernels_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert capabilities.triton_obstacle(gpu) == "the Triton kernels need sm_80 or newer, the tensors are on sm_75"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert capabilities.triton_obstacle(gpu) is None


def test_importing_fastattn_imports_neither_triton_nor_the_demo_s_libraries() -> None:
    names = ("triton", "rich", "matplotlib", "torch._dynamo")
    code = f"import sys, fastattn; print([m for m in {names} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
