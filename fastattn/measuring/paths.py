"""The folder that fastattn is imported from, and texts without any trace of this machine."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

# The checkout; where fastattn is installed, the folder of packages.
ROOT = Path(__file__).resolve().parents[2]


def python_path() -> str:
    """That folder first, so that another process imports the same fastattn."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


_DIRECTORIES = re.compile(r"(?<![\w.:/])/(?:[^\s/:'\"()\[\]<>,]+/)+")


def clean(text: str) -> str:
    """Text without this machine's name and folders: of a path stays what comes after that folder, or its end."""
    text = text.replace(f"{ROOT}/", "").replace(str(ROOT), "")
    text = _DIRECTORIES.sub("", text)
    return re.sub(rf"\b{re.escape(socket.gethostname())}\b", "host", text)
