"""ONE table: which feature each backend computes, in which direction.

Dispatch, `fastattn doctor`, the tests' parametrisation and the page FEATURES.md all read it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn.core import backends
from fastattn.core.attention.spec import NO_TENSORS, ScoreTensors
from fastattn.core.plans import Plan, backend_asked
from fastattn.ground import arguments
from fastattn.ground.checks import ACTIVATIONS

FORWARD, BACKWARD, SECOND, TANGENT = "forward", "backward", "second derivative", "forward mode"
DIRECTIONS = (FORWARD, BACKWARD, SECOND, TANGENT)
EVERY_DIRECTION = frozenset(DIRECTIONS)

# Architectures on which the Triton kernels have been tested and measured. There they are the default; on
# every other GPU they are opt-in (backend="triton") and PyTorch's own kernels serve.
PROVEN: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Request:
    """One call, as far as the choice of a backend depends on it."""

    family: str  # "attention", "mlp", "heads", "norm", "statistics" or "cache"
    spec: Any  # the family's: AttentionSpec, MLPSpec, HeadsSpec, NormSpec, StatisticsSpec or CacheSpec
    tensors: tuple[Tensor, ...]
    lse_gradient: bool = False
    score_tensors: ScoreTensors = NO_TENSORS

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


@dataclass(frozen=True)
class Feature:
    """One row: what it is called, when a call needs it, and in which directions each backend computes it."""

    family: str
    name: str
    needed: Callable[[Request], bool]
    triton: frozenset[str] = EVERY_DIRECTION
    portable: frozenset[str] = EVERY_DIRECTION
    reference: frozenset[str] = EVERY_DIRECTION


def _differ(dimension: int, left: int, right: int) -> Callable[[Request], bool]:
    """Whether two of the call's tensors have different sizes in this dimension."""
    return lambda r: r.tensors[left].shape[dimension] != r.tensors[right].shape[dimension]


def _is(dtype: torch.dtype) -> Callable[[Request], bool]:
    return lambda r: r.dtype == dtype


def _activates(activation: str) -> Callable[[Request], bool]:
    return lambda r: r.spec.activation == activation


def _bias_dtype(request: Request) -> torch.dtype | None:
    return None if request.score_tensors.bias is None else request.score_tensors.bias.dtype


def _has_other_widths(request: Request) -> bool:
    """Whether heads of keys or of values are wider or narrower than the Triton kernels' tiles."""
    q, _, v = request.tensors
    return not (8 <= q.shape[3] <= 256 and 8 <= v.shape[3] <= 256)


def _wants(*names: str) -> Callable[[Request], bool]:
    return lambda r: not set(names).isdisjoint(r.spec.want)


_FORWARD_ONLY = frozenset({FORWARD})
_BY_KEY = ("received", "max_received", "weighted_received")
_BY_QUERY = ("mass", "entropy", "max_logit", "sum_of_squares", "mean_distance")
_Q, _K, _V = 0, 1, 2
_HEADS, _LENGTH, _WIDTH = 1, 2, 3

_CACHE_FEATURES: tuple[tuple[str, Callable[[Request], bool], frozenset[str]], ...] = (
    ("contiguous or in pages of any size, lengths of each row", lambda r: True, frozenset()),
)

FEATURES: tuple[Feature, ...] = (
    Feature("attention", "full (bidirectional)", lambda r: not r.spec.causal),
    Feature("attention", "causal, aligned bottom-right", lambda r: r.spec.causal),
    Feature("attention", "sliding window, left and right", lambda r: r.spec.window != (None, None)),
    Feature(
        "attention",
        "documents, packed sequences (intervals)",
        lambda r: r.score_tensors.intervals is not None,
    ),
    Feature("attention", "any mask (block lists)", lambda r: r.spec.mask is not None),
    Feature("attention", "key lengths", lambda r: r.score_tensors.key_lengths is not None),
    Feature("attention", "soft-capped scores", lambda r: r.spec.softcap > 0),
    Feature("attention", "ALiBi slopes", lambda r: r.score_tensors.alibi_slopes is not None),
    Feature("attention", "additive bias, with gradient", lambda r: _bias_dtype(r) not in (None, torch.bool)),
    Feature("attention", "boolean mask", lambda r: _bias_dtype(r) == torch.bool),
    Feature(
        "attention",
        "relative position bias (T5), with gradient",
        lambda r: r.score_tensors.relative_bias is not None,
    ),
    Feature("attention", "dropout", lambda r: r.spec.dropout > 0),
    Feature("attention", "attention sinks, with gradient", lambda r: r.score_tensors.sinks is not None),
    Feature("attention", "scale of each head, with gradient", lambda r: r.score_tensors.head_scale is not None),
    Feature("attention", "lengths of their own for queries and keys", _differ(_LENGTH, _Q, _K)),
    Feature("attention", "grouped-query heads", _differ(_HEADS, _Q, _K)),
    Feature("attention", "head widths 8 to 256", lambda r: not _has_other_widths(r)),
    Feature("attention", "head widths below 8 or above 256", _has_other_widths, triton=frozenset()),
    Feature("attention", "a width of their own for values", _differ(_WIDTH, _Q, _V)),
    Feature("attention", "float16", _is(torch.float16)),
    Feature("attention", "bfloat16", _is(torch.bfloat16)),
    Feature("attention", "float32, IEEE products", _is(torch.float32)),
    Feature(
        "attention",
        "float32 heads wider than 128",
        lambda r: r.dtype == torch.float32 and max(r.tensors[_Q].shape[3], r.tensors[_V].shape[3]) > 128,
        triton=EVERY_DIRECTION - {TANGENT},
    ),
    Feature("attention", "float32, tf32 and tf32x3 products", lambda r: r.spec.precision != "ieee"),
    Feature("attention", "float64", _is(torch.float64), triton=frozenset()),
    Feature("attention", "gradient of the log-sum-exp", lambda r: r.lse_gradient),
    *(Feature("mlp", f"activation {name}", _activates(name)) for name in ACTIVATIONS),
    Feature("mlp", "gated", lambda r: r.spec.gated),
    Feature("mlp", "biases, or none", lambda r: True),
    Feature("mlp", "any widths", lambda r: True),
    Feature("mlp", "float16", _is(torch.float16)),
    Feature("mlp", "bfloat16", _is(torch.bfloat16)),
    Feature("mlp", "float32, IEEE products", _is(torch.float32)),
    Feature("mlp", "float64", _is(torch.float64), triton=frozenset()),
    Feature("heads", "RMS norm of heads, with gradient", lambda r: r.spec.norm),
    Feature("heads", "rotary, half and interleaved, partial, offsets", lambda r: r.spec.turned > 0),
    Feature("heads", "per-head scale, with gradient", lambda r: r.spec.scaled),
    Feature("heads", "head widths 1 to 256", lambda r: True),
    Feature("heads", "head widths above 256", lambda r: r.tensors[0].shape[3] > 256, triton=frozenset()),
    Feature("heads", "float16", _is(torch.float16)),
    Feature("heads", "bfloat16", _is(torch.bfloat16)),
    Feature("heads", "float32", _is(torch.float32)),
    Feature("heads", "float64", _is(torch.float64), triton=frozenset()),
    Feature("norm", "RMS norm", lambda r: not r.spec.centred),
    Feature("norm", "layer norm", lambda r: r.spec.centred),
    Feature("norm", "weight and bias, or none, with gradient", lambda r: True),
    Feature("norm", "weight kept less one", lambda r: r.spec.weight_offset != 0),
    Feature("norm", "residual added in the same pass, with gradient", lambda r: r.spec.added),
    Feature("norm", "any widths", lambda r: True),
    Feature("norm", "float16", _is(torch.float16)),
    Feature("norm", "bfloat16", _is(torch.bfloat16)),
    Feature("norm", "float32", _is(torch.float32)),
    Feature("norm", "float64", _is(torch.float64), triton=frozenset()),
    *(
        Feature("statistics", name, needed, triton, portable=_FORWARD_ONLY, reference=_FORWARD_ONLY)
        for name, needed, triton in (
            (
                "by query: entropy, largest logit and weight, distance, mass in a mask",
                _wants(*_BY_QUERY),
                _FORWARD_ONLY,
            ),
            ("by query: value norms", _wants("value_norm"), _FORWARD_ONLY),
            ("by query: weight on matching labels", _wants("match_mass"), _FORWARD_ONLY),
            ("by query: top keys", _wants("top_keys"), frozenset()),
            ("by key: received, weighted, largest", _wants(*_BY_KEY), _FORWARD_ONLY),
            ("by lag", _wants("lag_profile"), _FORWARD_ONLY),
            ("thumbnail, up to 128 columns", _wants("thumbnail"), _FORWARD_ONLY),
            ("thumbnail of more columns", lambda r: r.spec.thumbnail[1] > 128, frozenset()),
            ("single weights and windows", _wants("gather"), _FORWARD_ONLY),
            ("all that attention does to scores, without dropout", lambda r: True, _FORWARD_ONLY),
            ("head widths 8 to 256", lambda r: not _has_other_widths(r), _FORWARD_ONLY),
            ("head widths below 8 or above 256", _has_other_widths, frozenset()),
            ("float16", _is(torch.float16), _FORWARD_ONLY),
            ("bfloat16", _is(torch.bfloat16), _FORWARD_ONLY),
            ("float32", _is(torch.float32), _FORWARD_ONLY),
            ("float64", _is(torch.float64), frozenset()),
        )
    ),
    *(
        Feature("cache", name, needed, triton, portable=_FORWARD_ONLY, reference=_FORWARD_ONLY)
        for name, needed, triton in _CACHE_FEATURES
    ),
)


def choose(request: Request, direction: str, backend: str | None = None) -> str:
    """The backend for this call: the one that the argument or FASTATTN_BACKEND names, else the default.

    Raises ValueError, naming the missing feature, if the named backend cannot compute the call.
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


def module(request: Request, direction: str, backend: str | None = None) -> ModuleType:
    """The chosen backend's module."""
    return backends.load(request.family, choose(request, direction, backend))


def backward_module(plan: Plan, inputs: tuple[Tensor, ...], **beside: Any) -> ModuleType:
    """The backend of a plan's backward, chosen once for each value of FASTATTN_BACKEND. inputs, beside: of the
    Request."""
    asked = backend_asked(), beside.get("lse_gradient")
    found = plan.chosen.get(asked)
    if found is None:
        request = Request(plan.family, plan.spec, inputs, **beside)
        found = plan.chosen[asked] = module(request, BACKWARD, plan.backend)
    return found


def check_backend(backend: str | None) -> str | None:
    """The argument `backend`, checked: the name of a backend, or None."""
    if backend is not None and not (isinstance(backend, str) and backend in backends.NAMES):
        arguments.choice("backend", backend, backends.NAMES, or_none=True)
    return backend


def missing(request: Request, direction: str, backend: str) -> list[str]:
    """What the backend lacks for this call; empty if it can compute it."""
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
    """Triton where its kernels are proven (see `PROVEN`), else portable."""
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
    if device.type == "cuda":
        return _too_old(device)
    if device.type == "cpu" and interpreting():
        return None
    slowly = "TRITON_INTERPRET=1 runs them on a CPU, slowly"
    return f"the Triton kernels need a GPU, the tensors are on {device.type} ({slowly})"


def _too_old(device: torch.device) -> str | None:
    """Why no launch configuration fits this NVIDIA GPU; None if one does."""
    if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    return f"the Triton kernels need sm_80 or newer, the tensors are on {architecture(device.index)}"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


PAGE = """# What computes what

Three backends compute every function of fastattn. One table chooses for each call; `backend=` or the environment
variable FASTATTN_BACKEND chooses by hand, and a backend that cannot compute a call refuses it in words.

- **triton**: the kernels.
- **portable**: the same algorithm in plain PyTorch, tile by tile, on any device, in O(N) memory. Where PyTorch's
  own flash attention computes the same, that does the work.
- **reference**: the definition, N x N memory, for debugging. It computes everything.

A tick means all four directions: forward, backward, second derivative and forward mode (`torch.func.jvp`). Second
derivatives of attention are computed tile by tile in PyTorch for every backend, in O(N) memory. Those of MLPs and
norms go through their definitions.

`fastattn doctor --features` prints this page; `fastattn doctor` prints what serves on your machine, and why.
"""


def markdown() -> str:
    """The page FEATURES.md: a table for each family. A tick stands for every direction."""
    sections = [PAGE]
    for family in dict.fromkeys(feature.family for feature in FEATURES):
        rows = [f"| {f.name} | {_cell(f.triton)} | {_cell(f.portable)} |" for f in FEATURES if f.family == family]
        sections.append(
            "\n".join((f"## {family}\n", "| feature | Triton | portable |", "|---|---|---|", *rows, ""))
        )
    return "\n".join(sections)


def _cell(directions: frozenset[str]) -> str:
    if directions == EVERY_DIRECTION:
        return "✓"
    return ", ".join(d for d in DIRECTIONS if d in directions) or "—"
