"""Device, driver, versions and commit: what a figure depends on. No host names, no paths."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch

from fastattn.measuring.paths import ROOT


def describe_environment(device: str) -> dict[str, Any]:
    """What results.json says about where it was made."""
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        "device": gpu.name if gpu else f"{device} GPU",
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in ("triton", "numpy", "flash-attn-4", "sageattention",
                                                     "quack-kernels", "liger-kernel", "flash-attn",
                                                     "flashinfer-python")},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }  # fmt: skip


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0].strip() if said else None


def commit() -> str:
    """The checkout's commit, marked if files differ from it; FASTATTN_COMMIT where there is no repository."""
    head = _output("git", "rev-parse", "HEAD")
    if not head:
        return os.environ.get("FASTATTN_COMMIT", "unknown")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return head.strip() + (" with uncommitted changes" if changed else "")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
