"""Checks before minutes of training begin. Each error is one sentence."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from fastattn.core.attention.functional import attention
from fastattn.errors import CommandError

PICTURE_BYTES = 4 * 2**20  # more than all pictures take


def require_libraries(*names: str) -> None:
    """Raise if one of these libraries is missing: rich and matplotlib are extras, not dependencies."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise CommandError(f"the demo needs {' and '.join(absent)}: pip install 'fastattn[lens]'")


def pick_device(name: str | None) -> torch.device:
    """The named device; by default the GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CommandError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device {name}: PyTorch {torch.__version__} sees no GPU on this machine")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPU(s), counted from 0")
    return device


def check_backend(device: torch.device, backend: str | None) -> None:
    """Make a small call, which raises if the backend cannot compute on this device."""
    q = torch.zeros(1, 1, 8, 16, device=device, requires_grad=True)
    try:
        attention(q, q, q, causal=True, backend=backend).sum().backward()
    except ValueError as error:
        raise CommandError(str(error)) from None


def read_text(path: Path | None) -> bytes:
    """The bytes of the file; by default the English documentation that every CPython contains."""
    if path is None:
        try:
            from pydoc_data import topics
        except ImportError:
            raise CommandError(
                "this Python comes without pydoc_data, the default text: give --text FILE"
            ) from None
        return "\n".join(topics.topics.values()).encode()
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"--text {path}: {error.strerror or error}") from None


def prepare_folder(path: Path) -> Path:
    """Create the folder for pictures, and check that files can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(os.urandom(4096))
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise CommandError(f"--output {path}: {error.strerror or error}") from None
    if free < PICTURE_BYTES:
        raise CommandError(f"--output {path}: {free / 2**20:.1f} MiB free on that disk, the pictures need 4 MiB")
    return path
