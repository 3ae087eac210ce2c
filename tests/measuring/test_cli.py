"""Claims about the commands: what goes wrong ends in one clear sentence, and nothing is imported too early."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastattn import __version__, demo
from fastattn.cli import main
from fastattn.core import capabilities, plans
from fastattn.core.attention import portable as attention_portable
from fastattn.core.mlp.operators import MLPPlan
from fastattn.measuring import doctor

PROSE = b"one word and another word follow. " * 200


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )


def test_without_a_command_it_prints_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("demo", "look", "generate", "doctor", "prove", "bench"))


def test_it_says_its_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0 and capsys.readouterr().out.strip() == f"fastattn {__version__}"


@pytest.mark.parametrize("command", ["demo", "look", "generate", "doctor", "prove", "bench"])
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0 and f"fastattn {command}" in capsys.readouterr().out


def test_importing_the_library_and_its_command_line_loads_no_extra():
    code = (
        "import sys, json, fastattn, fastattn.nn, fastattn.lens, fastattn.demo;"
        "import fastattn.measuring.doctor, fastattn.measuring.prove, fastattn.looking.command;"
        "import fastattn.generating, fastattn.cli;"
        "print(json.dumps([m for m in ('triton', 'rich', 'matplotlib', 'transformers') if m in sys.modules]))"
    )
    assert json.loads(python(code).stdout) == []


def test_python_m_fastattn_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", "--version"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.strip() == f"fastattn {__version__}"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_bytes(PROSE)
    (tmp_path / "short.txt").write_bytes(b"too short")
    return tmp_path


ERRORS = [
    (["--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
    (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
    (["--backend", "abacus"], "backend must be one of triton, portable, reference or None, got 'abacus'"),
    (["--text", "{folder}/absent.txt"], "--text {folder}/absent.txt: No such file or directory"),
    (["--text", "{folder}"], "--text {folder}: Is a directory"),
    (["--text", "{folder}/short.txt"], "the text must have at least 2580 bytes, got 9"),
    (["--output", "{folder}/text.txt"], "--output {folder}/text.txt: File exists"),
    (["--output", "{folder}/text.txt/below"], "--output {folder}/text.txt/below: Not a directory"),
    (["--steps", "0"], "--steps must be at least 1, got 0"),
]


def demo_fails(arguments: list[str], folder, capsys) -> str:
    """The sentence with which the demo ends; it must be alone on stderr, and come before any work."""
    defaults = ["--device", "cpu", "--output", str(folder / "pictures"), "--text", str(folder / "text.txt")]
    assert main(["demo", *defaults, *(argument.format(folder=folder) for argument in arguments)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    line, *more = printed.err.splitlines()
    assert more == [] and line.startswith("fastattn demo: ")
    return line.removeprefix("fastattn demo: ")


@pytest.mark.parametrize(
    ("arguments", "sentence"), ERRORS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_is_wrong_is_said_in_one_sentence(arguments, sentence, files, capsys):
    assert demo_fails(arguments, files, capsys) == sentence.format(folder=files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_to_be_missing(files, capsys):
    sentence = demo_fails(["--device", "cuda"], files, capsys)
    assert sentence == f"--device cuda: PyTorch {torch.__version__} sees no GPU on this machine"


def test_triton_that_cannot_run_is_said_with_the_reason(files, capsys, monkeypatch):
    monkeypatch.setattr(capabilities, "triton_obstacle", lambda device: "Triton is not installed")
    sentence = demo_fails(["--backend", "triton"], files, capsys)
    assert sentence == "backend 'triton' cannot compute this call (forward): Triton is not installed"


def test_a_wrong_backend_in_the_environment_is_said_too(files, capsys, monkeypatch):
    monkeypatch.setenv("FASTATTN_BACKEND", "abacus")
    assert demo_fails([], files, capsys).startswith("FASTATTN_BACKEND must be one of triton, ")


@pytest.mark.parametrize("absent", ["rich", "matplotlib"])
def test_a_missing_extra_is_named_with_its_remedy(absent, files, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == absent else find(name, *rest)
    )
    assert demo_fails([], files, capsys) == f"the demo needs {absent}: pip install 'fastattn[lens]'"


def test_a_full_disk_is_noticed_before_training(files, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    expected = f"--output {files}/pictures: 1.0 MiB free on that disk, the pictures need 4 MiB"
    assert demo_fails([], files, capsys) == expected


@pytest.mark.parametrize(
    ("raised", "status", "sentence"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/a.png"),
            1,
            "No space left on device (/somewhere/a.png)",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"),
            1,
            "CUDA out of memory. Tried to allocate",
        ),
    ],
    ids=["disk", "ctrl-c", "memory"],
)
def test_what_goes_wrong_on_the_way_is_a_sentence_too(raised, status, sentence, capsys, monkeypatch):
    def fail(options):
        raise raised

    monkeypatch.setattr(demo, "run", fail)
    assert main(["demo"]) == status
    assert capsys.readouterr().err == f"fastattn demo: {sentence}\n"


def test_the_doctor_reports_every_feature_and_passes(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and "cpu" in printed
    for feature in capabilities.FEATURES:
        assert f"{feature.family}  " in printed and feature.name in printed
    assert "FAILED" not in printed and printed.count(" ok") >= len(doctor.CASES)


def test_the_doctor_counts_plans_and_fails_if_one_computes_otherwise_than_at_first(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(doctor, "CASES", [case for case in doctor.CASES if case.name == "mlp, gelu"])
    (mlp,) = (p for p in plans.EVERY if p.name == "mlp")
    plans.forget()
    before = mlp.hits
    assert main(["doctor"]) == 0
    assert mlp.hits > before
    assert re.search(rf"mlp +{len(mlp)} +{mlp.hits} +{mlp.misses}\n", capsys.readouterr().out)
    own, calls = MLPPlan.compose, itertools.count()

    def drifting(plan, *tensors):
        (y,) = own(plan, *tensors)
        return (y + 1e-6 * next(calls),)

    monkeypatch.setattr(MLPPlan, "compose", drifting)
    assert main(["doctor"]) == 1
    assert "a second call, by the plan of the first one, gives another result" in capsys.readouterr().out


def test_the_doctor_fails_when_a_backend_computes_wrong(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    right = attention_portable.forward

    def wrong(q, k, v, spec, tensors):
        out, lse = right(q, k, v, spec, tensors)
        return out * (1 + 1e-5), lse

    monkeypatch.setattr(attention_portable, "forward", wrong)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out and "self-tests failed" in printed.err


def test_the_doctor_says_why_another_backend_serves(monkeypatch):
    monkeypatch.setattr(capabilities, "default_backend", lambda *_: "triton")
    monkeypatch.setattr(capabilities, "triton_obstacle", lambda device: None)
    served = {(f.family, f.name): doctor.served_by(f, torch.device("cpu")) for f in capabilities.FEATURES}
    assert served["attention", "float64"] == ("portable", "triton lacks it")
    assert served["attention", "dropout"] == ("portable", "not proven here")
    assert served["attention", "grouped-query heads"] == ("triton, portable", "by what else is in the call")
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    assert doctor.served_by(capabilities.FEATURES[0], torch.device("cpu")) == ("triton", "asked for")
