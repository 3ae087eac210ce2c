"""ONE table: which feature each backend computes, in which direction.

Dispatch, the README's table and the tests' parametrisation all read it. `python -m fastattn.capabilities`
prints it as Markdown.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn import backends
from fastattn.spec import AttentionSpec

FORWARD, BACKWARD, SECOND = "forward", "backward", "second derivative"
EVERYWHERE = {FORWARD, BACKWARD, SECOND}

# Architectures on which the Triton kernels have been tested and measured. There they are the default; on every
# other GPU they are opt-in (backend="triton") and PyTorch's own kernels serve.
PROVEN: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Request:
    """One call, as far as the choice of a backend depends on it."""

    family: str  # "attention"
    spec: AttentionSpec
    tensors: tuple[Tensor, ...]
    lse_gradient: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


@dataclass(frozen=True)
class Feature:
    """One row: what it is called, when a call needs it, and who computes it in which direction.

    test: the test that fails when the feature is broken.
    """

    family: str
    name: str
    needed: Callable[[Request], bool]
    test: str
    triton: frozenset[str] = field(default_factory=frozenset)
    portable: frozenset[str] = field(default_factory=frozenset)
    reference: frozenset[str] = field(default_factory=frozenset)


def _row(
    family: str, name: str, needed: Callable[[Request], bool], test: str, **directions: set[str]
) -> Feature:
    everywhere = {name: frozenset(EVERYWHERE) for name in backends.NAMES}
    return Feature(
        family, name, needed, test, **{**everywhere, **{k: frozenset(v) for k, v in directions.items()}}
    )


def _shapes(r: Request) -> tuple[torch.Size, torch.Size, torch.Size]:
    q, k, v = r.tensors[:3]
    return q.shape, k.shape, v.shape


FEATURES: tuple[Feature, ...] = (
    _row("attention", "full (bidirectional)", lambda r: not r.spec.causal, "test_forward"),
    _row("attention", "causal, bottom-right aligned", lambda r: r.spec.causal, "test_forward"),
    _row("attention", "queries and keys of different length", lambda r: _shapes(r)[0][2] != _shapes(r)[1][2], "test_forward"),
    _row("attention", "grouped-query heads", lambda r: _shapes(r)[0][1] != _shapes(r)[1][1], "test_backward"),
    _row("attention", "head widths 8 to 256", lambda r: True, "test_head_widths"),
    _row("attention", "value width of its own", lambda r: _shapes(r)[0][3] != _shapes(r)[2][3], "test_head_widths"),
    _row("attention", "float16", lambda r: r.dtype == torch.float16, "test_forward"),
    _row("attention", "bfloat16", lambda r: r.dtype == torch.bfloat16, "test_bfloat16"),
    _row("attention", "float32, IEEE products", lambda r: r.dtype == torch.float32, "test_forward"),
    _row("attention", "float64", lambda r: r.dtype == torch.float64, "test_gradcheck", triton=set()),
    _row("attention", "gradient of the log-sum-exp", lambda r: r.lse_gradient, "test_backward"),
)  # fmt: skip


def choose(request: Request, direction: str, backend: str | None = None) -> str:
    """The backend that serves this call: the one asked for by argument or by FASTATTN_BACKEND, else the default.

    Raises ValueError, naming the missing feature, if the one asked for cannot.
    """
    asked = backend or os.environ.get("FASTATTN_BACKEND") or None
    if asked is None:
        preferred = default_backend(request.device)
        return preferred if not missing(request, direction, preferred) else "portable"
    if asked not in backends.NAMES:
        source = "backend" if backend else "FASTATTN_BACKEND"
        raise ValueError(f"{source} must be one of {', '.join(backends.NAMES)}, got {asked!r}")
    lacking = missing(request, direction, asked)
    if lacking:
        raise ValueError(f"backend {asked!r} cannot compute this call ({direction}): {'; '.join(lacking)}")
    return asked


def missing(request: Request, direction: str, backend: str) -> list[str]:
    """What the backend lacks for this call; empty if it can serve."""
    lacking = []
    if backend == "triton":
        obstacle = triton_obstacle(request.device)
        lacking += [obstacle] if obstacle else []
    for feature in FEATURES:
        if (
            feature.family == request.family
            and direction not in getattr(feature, backend)
            and feature.needed(request)
        ):
            lacking.append(f"no {feature.name}")
    return lacking


def default_backend(device: torch.device) -> str:
    """Triton where its kernels are proven, else portable."""
    if device.type == "cuda" and architecture(device.index) in PROVEN and not triton_obstacle(device):
        return "triton"
    return "portable"


def architecture(index: int | None) -> str:
    """ "sm_90" and the like, or AMD's name."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on tensors of this device, in words; None if they can."""
    if not _triton_installed():
        return "Triton is not installed (pip install 'fastattn[triton]')"
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    return f"the Triton kernels need a GPU, the tensors are on {device.type} (TRITON_INTERPRET=1 runs them slowly)"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def markdown() -> str:
    """The table as the README shows it; a tick stands for every direction."""
    lines = ["| | feature | Triton | portable |", "|---|---|---|---|"]
    for feature in FEATURES:
        cells = (_cell(feature.triton), _cell(feature.portable))
        lines.append(f"| {feature.family} | {feature.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(directions: frozenset[str]) -> str:
    if directions == EVERYWHERE:
        return "✓"
    return ", ".join(d for d in (FORWARD, BACKWARD, SECOND) if d in directions) or "—"


if __name__ == "__main__":
    print(markdown())
