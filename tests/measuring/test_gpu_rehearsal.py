"""The GPU run, rehearsed: launched on a pretended GPU from its first section to its last, report included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import rehearsal
from fastattn.measuring.paths import ROOT


def rehearse(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The tests' own setting for Triton's interpreter would keep kernels from being compiled.
    hidden = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"FASTATTN_RESULTS": str(folder)}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--state", str(folder / "state"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def _skip_where_no_gpu_can_be_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        if reason := rehearsal.obstacle():
            pytest.skip(f"no GPU can be pretended: {reason}")


@pytest.mark.slow
def test_everything_about_heads_is_launched_and_the_report_says_that_it_was_a_rehearsal(tmp_path):
    done = rehearse(tmp_path, "--only", "heads")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["kernels"] and {row["verdict"] for row in results["kernels"]} == {"launched"}
    assert results["features"] and all(row["launched"] for row in results["features"])
    assert all(section["reached"] == section["planned"] for section in results["sections"])
    assert results["compilations"]["compiled"] + results["compilations"]["from_cache"] > 0
    assert not results["record"] and not (tmp_path / "record.json").exists()
    assert {s["title"]: s["reached"] for s in results["sections"]}["proof record"] == 3
    assert not results["proven"] and {proof["state"] for proof in results["proofs"]} == {"rehearsed"}
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("**PASSED") and "A rehearsal on a pretended GPU" in text
    for secret in (str(ROOT), str(tmp_path), os.uname().nodename):
        assert secret not in text and secret not in json.dumps(results)


@pytest.mark.slow
def test_a_launch_that_a_gpu_refuses_fails_the_rehearsal(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(REFUSING)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        done = rehearse(tmp_path, "--only", "heads")
    assert done.returncode == 1, done.stdout + done.stderr
    assert (tmp_path / "report.md").read_text().startswith("**FAILED: heads:")


# Every launch asks for more programs in its second dimension than a GPU allows.
REFUSING = """
import sys
if "fastattn.measuring.worker" in sys.orig_argv:
    import triton.runtime.jit as jit
    run = jit.JITFunction.run
    def too_many(self, *arguments, grid, **options):
        return run(self, *arguments, grid=(1, 65536, 1), **options)
    jit.JITFunction.run = too_many
"""
