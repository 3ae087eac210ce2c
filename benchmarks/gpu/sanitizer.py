"""A small selection of kernels under compute-sanitizer (NVIDIA), where that program is installed.

It checks on the GPU what tests/sanitizers.py checks in Triton's interpreter: addresses, values that nobody wrote,
races in shared memory, barriers. As a program of its own (`python -m benchmarks.gpu.sanitizer`) this file makes
the calls that are checked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastattn.measuring.kinds import Sizes
from fastattn.measuring.paths import ROOT

NAME = "compute-sanitizer"
NOT_INSTALLED = f"{NAME} is not installed"
# The most telling first.
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # the exit code that we ask for where it finds an error
LEAST_SECONDS = 10.0  # a process needs more to begin
MOST_LINES = 3

# Odd sizes: whatever passes the end of a tensor does so here. The second splits loops over programs.
CALLS = (
    Sizes("attention", "causal", length=113, keys=203, width=40),
    Sizes("attention", "full", batch=1, length=7, keys=777, width=128),
    Sizes("masks", "bigbird", length=113, keys=113),
    Sizes("scores", "everything", length=65, keys=113, width=80),
    Sizes("tangent", "causal", length=65),
    Sizes("cache", "pages", length=1, keys=1104),
    Sizes("invariant", "causal", length=65),
    Sizes("absorbed", "causal", length=65, width=520, value_width=24),
    Sizes("mlp", "silu gated", batch=1, length=77, width=111, hidden=200),
    Sizes("norm", "rms", batch=1, length=37, width=111),
    Sizes("heads", "rotary", length=33, width=80),
    Sizes("loss", "classes mean", batch=1, length=77, width=111, hidden=300),
)


def program() -> str | None:
    """Where it lies: on the PATH, or in a folder of CUDA's."""
    if found := shutil.which(NAME):
        return found
    roots = [Path(root) for name in ("CUDA_HOME", "CUDA_PATH") if (root := os.environ.get(name))]
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    for root in roots:
        for folder in (root / "bin", root / NAME):
            if os.access(folder / NAME, os.X_OK) and (folder / NAME).is_file():
                return str(folder / NAME)
    return None


def checks(tools: Sequence[str], deadline: float) -> Iterator[dict[str, Any]]:
    """A row for each tool: its verdict is "passed", "FAILED: what it found", or why it has none."""
    found = program()
    for number, tool in enumerate(tools):
        if found is None:
            yield {"tool": tool, "verdict": NOT_INSTALLED, "seconds": 0.0}
            continue
        begin = time.monotonic()
        limit = (deadline - begin) / (len(tools) - number)
        verdict = checked(found, tool, limit) if limit >= LEAST_SECONDS else "no time was left"
        yield {"tool": tool, "verdict": verdict, "seconds": round(time.monotonic() - begin, 1)}


def checked(found: str, tool: str, limit: float) -> str:
    command = [found, "--tool", tool, "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "benchmarks.gpu.sanitizer"]
    # Without PyTorch's cache each tensor is an allocation of its own, whose end is known.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # With what it has started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"not finished within {limit:.0f} s"
    lines = [line.strip("= ") for line in said.splitlines() if line.strip("= ")]
    if process.returncode == 0:
        return "passed"
    if process.returncode == FOUND:
        return f"FAILED: {'; '.join(line for line in lines if 'COMPUTE-SANITIZER' not in line)[:300]}"
    return f"not run (exit code {process.returncode}): {'; '.join(lines[-MOST_LINES:])[:300]}"


def make_calls(device: str) -> None:
    """Forward, and the gradients of everything, of each call."""
    import torch

    from fastattn.measuring import checking, kinds

    for sizes in CALLS:
        call = kinds.build(sizes, torch.device(device))
        checking.results_and_gradients(call, "triton", call.tensors, sizes)
    print(f"{len(CALLS)} calls were made")


if __name__ == "__main__":
    make_calls("cuda")
