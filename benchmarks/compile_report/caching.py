"""Results of earlier runs, by a hash of everything that they depend on."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"


def folder() -> Path:
    """$XDG_CACHE_HOME/fastattn/compile_report, by default below ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastattn" / "compile_report"


def file_of(*parts: object) -> Path:
    """Where the result is kept that depends on these, and on nothing else."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return folder() / f"{digest.hexdigest()[:32]}.json"


def hash_of(files: Iterable[Path]) -> str:
    """A hash of these sources, without comments, and of the compilers' versions."""
    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for file in sorted(files):
        digest.update(ast.dump(ast.parse(file.read_text())).encode())
    return digest.hexdigest()


@functools.cache
def reading_hash() -> str:
    """A hash of what reads a kernel's machine code."""
    return hash_of(HERE / f"{name}.py" for name in ("disassembly", "hazards", "rows", "targets"))


@functools.cache
def source_hash() -> str:
    """A hash of the kernels, their launchers and this report."""
    return hash_of([*KERNELS.rglob("*.py"), *HERE.glob("*.py")])


def read(file: Path) -> Any:
    """What `write` wrote there; None if nothing did."""
    return json.loads(file.read_text()) if file.exists() else None


def write(file: Path, content: Any) -> None:
    """Through a second file, so that a reader never sees half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(content))
    partial.replace(file)
