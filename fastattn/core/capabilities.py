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

from fastattn.core import backends, proofs
from fastattn.core.attention import torch_routes
from fastattn.core.attention.spec import NO_TENSORS, ScoreTensors
from fastattn.core.mlp.spec import ALWAYS
from fastattn.core.plans import Plan, backend_asked
from fastattn.core.proofs import CLASSES, Question, architecture, interpreting, size_class
from fastattn.ground import arguments
from fastattn.ground.checks import ACTIVATIONS

FORWARD, BACKWARD, SECOND, TANGENT = "forward", "backward", "second derivative", "forward mode"
DIRECTIONS = (FORWARD, BACKWARD, SECOND, TANGENT)
EVERY_DIRECTION = frozenset(DIRECTIONS)


@dataclass(frozen=True)
class Request:
    """One call, as far as the choice of a backend depends on it."""

    family: str  # "attention", "mlp", "heads", "norm", "loss", "statistics" or "cache"
    spec: Any  # the family's: AttentionSpec, MLPSpec, HeadsSpec, NormSpec, LossSpec, StatisticsSpec or CacheSpec
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
    """One row: what it is called, when a call needs it, and in which directions each backend computes it.

    proof: the kind of call that must be proven on a GPU before the Triton kernels serve it there by default (see
        fastattn.core.proofs); "" if the proofs of other kinds cover it.
    """

    family: str
    name: str
    needed: Callable[[Request], bool]
    triton: frozenset[str] = EVERY_DIRECTION
    portable: frozenset[str] = EVERY_DIRECTION
    reference: frozenset[str] = EVERY_DIRECTION
    proof: str = ""


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
    return not (8 <= q.shape[3] <= 512 and 8 <= v.shape[3] <= 512)


def _is_absorbed(request: Request) -> bool:
    """Whether keys are wider than a tile of the Triton kernels by a little, and values are not."""
    q, _, v = request.tensors
    return 512 < q.shape[3] <= 640 and 8 <= v.shape[3] <= 512


def _wants(*names: str) -> Callable[[Request], bool]:
    return lambda r: not set(names).isdisjoint(r.spec.want)


_FORWARD_ONLY = frozenset({FORWARD})
_BY_KEY = ("received", "max_received", "weighted_received")
_BY_QUERY = ("mass", "entropy", "max_logit", "sum_of_squares", "mean_distance")
_ALL_SCORES = "all that attention does to scores, without dropout"
# The others are checked with these.
_LOSS_PROOFS = {
    "class indices, ignored tokens": "classes",
    "class probabilities": "probabilities",
    "temperature": "temperature",
    "filtered gradients": "filter",
}
_Q, _K, _V = 0, 1, 2
_HEADS, _LENGTH, _WIDTH = 1, 2, 3


def _is_stored_once(request: Request) -> bool:
    """Whether the values of a cache are columns of its keys: the request then has fewer of them than keys have."""
    return request.spec.value_width < request.tensors[_V].shape[3]


def _is_quantised(request: Request) -> bool:
    return request.tensors[_K].dtype != request.dtype


def _has_other_cache_widths(request: Request) -> bool:
    """Whether heads in a cache are wider or narrower than the Triton kernels' tiles."""
    width, value_width = request.tensors[_Q].shape[3], request.spec.value_width
    if _is_stored_once(request):
        return not (8 <= value_width <= 512 and width - value_width <= 128)
    return not (8 <= width <= 256 and 8 <= value_width <= 256)


_ROWS_OF_A_CACHE = "contiguous or in pages of any size, rows of their own lengths"
_WIDEST_INVARIANT = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128, torch.float64: 0}


def _invariance_is_portable(request: Request) -> bool:
    """Whether an invariant call asks for what the Triton kernels do not compute in it."""
    q, _, v = request.tensors
    added = _bias_dtype(request) is not None or request.score_tensors.relative_bias is not None
    return added or max(q.shape[_WIDTH], v.shape[_WIDTH]) > _WIDEST_INVARIANT[request.dtype]


_INVARIANT = "bits of a row that depend on that row alone (invariant)"
_CHUNKS = "more than 16 queries a row"
_LATENT = "values that are columns of the keys (latent attention)"
_QUANTISED = "int8 and fp8 (e4m3) caches, a scale for each token or page of a head"
_CACHE_PROOFS = {
    _ROWS_OF_A_CACHE: "cache",
    _CHUNKS: "chunk",
    _LATENT: "latent",
    _INVARIANT: "invariant",
    _QUANTISED: "quantised",
}
_CACHE_FEATURES: tuple[tuple[str, Callable[[Request], bool], frozenset[str]], ...] = (
    (_ROWS_OF_A_CACHE, lambda r: True, _FORWARD_ONLY),
    (_CHUNKS, lambda r: r.tensors[_Q].shape[_LENGTH] > 16, _FORWARD_ONLY),
    ("new tokens written in place", lambda r: True, _FORWARD_ONLY),
    ("causal, sliding window", lambda r: r.spec.attention.causal, _FORWARD_ONLY),
    ("soft-capped scores", lambda r: r.spec.attention.softcap > 0, _FORWARD_ONLY),
    ("ALiBi slopes, sinks, left padding, masks of trees", lambda r: True, _FORWARD_ONLY),
    (_LATENT, _is_stored_once, _FORWARD_ONLY),
    (_INVARIANT, lambda r: r.spec.attention.invariant, _FORWARD_ONLY),
    (
        "invariant, heads wider than 256 (float32: 128)",
        lambda r: r.spec.attention.invariant and r.tensors[_Q].shape[_WIDTH] > _WIDEST_INVARIANT[r.dtype],
        frozenset(),
    ),
    (_QUANTISED, _is_quantised, _FORWARD_ONLY),
    ("invariant, int8 and fp8 caches", lambda r: r.spec.attention.invariant and _is_quantised(r), frozenset()),
    ("head widths 8 to 256, latent attention up to 640 and 512", lambda r: True, _FORWARD_ONLY),
    ("head widths below 8 or above 256 (latent: 640 and 512)", _has_other_cache_widths, frozenset()),
    ("float16", _is(torch.float16), _FORWARD_ONLY),
    ("bfloat16", _is(torch.bfloat16), _FORWARD_ONLY),
    ("float32", _is(torch.float32), _FORWARD_ONLY),
    ("float64", _is(torch.float64), frozenset()),
)

WHOLE_LAYER = "whole layers up to 128 wide: one kernel (portable: chunks of tokens)"

FEATURES: tuple[Feature, ...] = (
    Feature("attention", "full (bidirectional)", lambda r: not r.spec.causal, proof="full"),
    Feature("attention", "causal, aligned bottom-right", lambda r: r.spec.causal, proof="causal"),
    Feature(
        "attention", "sliding window, left and right", lambda r: r.spec.window != (None, None), proof="window"
    ),
    Feature(
        "attention",
        "documents, packed sequences (intervals)",
        lambda r: r.score_tensors.intervals is not None,
        proof="documents",
    ),
    Feature("attention", "any mask (block lists)", lambda r: r.spec.mask is not None, proof="lists"),
    Feature("attention", "key lengths", lambda r: r.score_tensors.key_lengths is not None, proof="key lengths"),
    Feature("attention", "soft-capped scores", lambda r: r.spec.softcap > 0, proof="softcap"),
    Feature("attention", "ALiBi slopes", lambda r: r.score_tensors.alibi_slopes is not None, proof="alibi"),
    Feature(
        "attention",
        "additive bias, with gradient",
        lambda r: _bias_dtype(r) not in (None, torch.bool),
        proof="bias",
    ),
    Feature("attention", "boolean mask", lambda r: _bias_dtype(r) == torch.bool, proof="boolean mask"),
    Feature(
        "attention",
        "relative position bias (T5), with gradient",
        lambda r: r.score_tensors.relative_bias is not None,
        proof="relative bias",
    ),
    Feature("attention", "dropout", lambda r: r.spec.dropout > 0, proof="dropout"),
    Feature(
        "attention", "attention sinks, with gradient", lambda r: r.score_tensors.sinks is not None, proof="sinks"
    ),
    Feature(
        "attention",
        "scale of each head, with gradient",
        lambda r: r.score_tensors.head_scale is not None,
        proof="head scale",
    ),
    Feature("attention", "lengths of their own for queries and keys", _differ(_LENGTH, _Q, _K)),
    Feature("attention", "grouped-query heads", _differ(_HEADS, _Q, _K)),
    Feature("attention", "head widths 8 to 512", lambda r: not _has_other_widths(r)),
    Feature(
        "attention",
        "queries and keys of 513 to 640 columns, values of 8 to 512 (DeepSeek's absorbed form)",
        _is_absorbed,
        triton=_FORWARD_ONLY,
        proof="absorbed",
    ),
    Feature(
        "attention",
        "head widths below 8 or above 512",
        lambda r: _has_other_widths(r) and not _is_absorbed(r),
        triton=frozenset(),
    ),
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
    Feature("attention", "gradient of the log-sum-exp", lambda r: r.lse_gradient, proof="lse gradient"),
    Feature(
        "attention",
        _INVARIANT,
        lambda r: r.spec.invariant,
        reference=EVERY_DIRECTION - {FORWARD, BACKWARD},
        proof="invariant",
    ),
    Feature(
        "attention",
        "invariant beside a bias, or with heads wider than 256 (float32: 128)",
        lambda r: r.spec.invariant and _invariance_is_portable(r),
        triton=EVERY_DIRECTION - {FORWARD, BACKWARD},
        reference=EVERY_DIRECTION - {FORWARD, BACKWARD},
    ),
    *(Feature("mlp", f"activation {name}", _activates(name), proof=name) for name in ACTIVATIONS),
    Feature("mlp", "gated", lambda r: r.spec.gated, proof="gated"),
    Feature("mlp", "gate and up packed in one weight, in either order", lambda r: bool(r.spec.packed)),
    Feature("mlp", "keeping 8 bits a number for the backward", lambda r: r.spec.save == "int8", proof="int8"),
    Feature("mlp", "keeping nothing but x for the backward", lambda r: r.spec.save == "nothing"),
    Feature("mlp", "chunks of tokens", lambda r: r.spec.chunk > 0),
    Feature("mlp", "rounding wherever eager rounds", lambda r: r.spec.match_eager, proof="eager"),
    Feature(
        "mlp", "RMS norm or layer norm of its input, with gradient", lambda r: bool(r.spec.norm), proof="norm"
    ),
    Feature("mlp", "dropout of its output", lambda r: r.spec.dropout > 0, proof="dropout"),
    Feature(
        "mlp", "residual added in the same pass, with gradient", lambda r: bool(r.spec.residual), proof="residual"
    ),
    Feature("mlp", WHOLE_LAYER, lambda r: r.spec.whole == ALWAYS and not r.spec.gated, proof="whole"),
    Feature(
        "mlp", f"{WHOLE_LAYER}, gated", lambda r: r.spec.whole == ALWAYS and r.spec.gated, proof="whole gated"
    ),
    Feature("mlp", "biases, or none", lambda r: True),
    Feature("mlp", "any widths", lambda r: True),
    Feature("mlp", "float16", _is(torch.float16)),
    Feature("mlp", "bfloat16", _is(torch.bfloat16)),
    Feature("mlp", "float32, IEEE products", _is(torch.float32)),
    Feature("mlp", "float64", _is(torch.float64), triton=frozenset()),
    Feature("heads", "RMS norm of heads, with gradient", lambda r: r.spec.norm, proof="norm"),
    Feature(
        "heads", "rotary, half and interleaved, partial, offsets", lambda r: r.spec.turned > 0, proof="rotary"
    ),
    Feature("heads", "per-head scale, with gradient", lambda r: r.spec.scaled, proof="scale"),
    Feature("heads", "head widths 1 to 512", lambda r: True),
    Feature("heads", "head widths above 512", lambda r: r.tensors[0].shape[3] > 512, triton=frozenset()),
    Feature("heads", "float16", _is(torch.float16)),
    Feature("heads", "bfloat16", _is(torch.bfloat16)),
    Feature("heads", "float32", _is(torch.float32)),
    Feature("heads", "float64", _is(torch.float64), triton=frozenset()),
    Feature("norm", "RMS norm", lambda r: not r.spec.centred, proof="rms"),
    Feature("norm", "layer norm", lambda r: r.spec.centred, proof="layer"),
    Feature("norm", "weight and bias, or none, with gradient", lambda r: True),
    Feature("norm", "weight kept less one", lambda r: r.spec.weight_offset != 0),
    Feature("norm", "residual added in the same pass, with gradient", lambda r: r.spec.added, proof="residual"),
    Feature("norm", "any widths", lambda r: True),
    Feature("norm", "float16", _is(torch.float16)),
    Feature("norm", "bfloat16", _is(torch.bfloat16)),
    Feature("norm", "float32", _is(torch.float32)),
    Feature("norm", "float64", _is(torch.float64), triton=frozenset()),
    *(
        Feature(
            "loss",
            name,
            needed,
            triton=frozenset() if name == "float64" else EVERY_DIRECTION,
            proof=_LOSS_PROOFS.get(name, ""),
        )
        for name, needed in (
            ("class indices, ignored tokens", lambda r: not r.tensors[2].is_floating_point()),
            ("class probabilities", lambda r: r.tensors[2].is_floating_point()),
            ("label smoothing", lambda r: r.spec.smoothing > 0),
            ("weights of classes, biases, or none", lambda r: True),
            ("soft-capped logits", lambda r: r.spec.softcap > 0),
            ("temperature", lambda r: r.spec.temperature != 1),
            ("log-sum-exp, with gradient (z-loss)", lambda r: True),
            ("entropy, with gradient", lambda r: r.spec.entropy),
            ("filtered gradients", lambda r: r.spec.filter > 0),
            ("any widths, any number of classes", lambda r: True),
            ("float16", _is(torch.float16)),
            ("bfloat16", _is(torch.bfloat16)),
            ("float32, IEEE products", _is(torch.float32)),
            ("float64", _is(torch.float64)),
        )
    ),
    *(
        Feature(
            "statistics",
            name,
            needed,
            triton,
            portable=_FORWARD_ONLY,
            reference=_FORWARD_ONLY,
            proof="statistics" if name == _ALL_SCORES else "",
        )
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
            (_ALL_SCORES, lambda r: True, _FORWARD_ONLY),
            ("head widths 8 to 512", lambda r: not _has_other_widths(r), _FORWARD_ONLY),
            ("head widths below 8 or above 512", _has_other_widths, frozenset()),
            ("float16", _is(torch.float16), _FORWARD_ONLY),
            ("bfloat16", _is(torch.bfloat16), _FORWARD_ONLY),
            ("float32", _is(torch.float32), _FORWARD_ONLY),
            ("float64", _is(torch.float64), frozenset()),
        )
    ),
    *(
        Feature(
            "cache",
            name,
            needed,
            triton,
            portable=_FORWARD_ONLY,
            reference=frozenset() if "invariant" in name else _FORWARD_ONLY,
            proof=_CACHE_PROOFS.get(name, ""),
        )
        for name, needed, triton in _CACHE_FEATURES
    ),
)


def choose(request: Request, direction: str, backend: str | None = None) -> str:
    """The backend for this call: the one that the argument or FASTATTN_BACKEND names, else the default.

    Raises ValueError, naming the missing feature, if the named backend cannot compute the call.
    """
    asked = backend or os.environ.get("FASTATTN_BACKEND") or None
    if asked is None:
        return _default(request, direction)
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


def _default(request: Request, direction: str) -> str:
    """Triton where its kernels are proven for such a call, else portable."""
    device = request.device
    if default_backend(device, request.family) == "portable" or missing(request, direction, "triton"):
        return "portable"
    return "triton" if backends.proven_for(device, question(request, direction)) else "portable"


def default_backend(device: torch.device, family: str | None = None) -> str:
    """ "triton" if a proof record lets its kernels serve some calls (of this family) on this device, else
    "portable"."""
    if not (device.type == "cuda" or (device.type == "cpu" and interpreting())) or triton_obstacle(device):
        return "portable"
    return "triton" if backends.proven(device, family) else "portable"


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


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


# ---- what must be proven ----

# Kinds that decide only where a call is of no other kind.
BASES = frozenset({"full", "causal", "rms", "layer", "classes", "probabilities", "cache", *ACTIVATIONS})
# Kinds that are proven for all the others together: an MLP's whole layer.
ALONE = frozenset({"whole", "whole gated"})
# The kind of calls of several kinds beside a base.
TOGETHER = "together"
# Classes of widths, named by the largest; wider ones belong to the last. Attention, heads: as the launch tables.
_HEAD_WIDTHS = (64, 128, 256, 512)
WIDTHS = {
    "attention": _HEAD_WIDTHS,
    "statistics": _HEAD_WIDTHS,
    "heads": _HEAD_WIDTHS,
    "cache": _HEAD_WIDTHS,
    "loss": (1024, 2048, 4096, 8192),
    "mlp": (1024, 2048, 4096, 8192),
    "norm": (1024, 4096, 16384, 32768),
}
WHOLE_WIDTHS = (64, 128)  # of whole layers


def question(request: Request, direction: str) -> Question:
    """What must be proven before the Triton kernels serve this call by default."""
    kinds = [f.proof for f in FEATURES if f.family == request.family and f.proof and f.needed(request)]
    whole = not ALONE.isdisjoint(kinds)
    kinds = [kind for kind in kinds if kind in ALONE] if whole else kinds
    deciding = tuple(kind for kind in kinds if kind not in BASES) or tuple(kinds)
    if request.family == "attention" and len(set(kinds) - BASES) > 1:
        kinds.append(TOGETHER)
    width, size = _width_and_size(request)
    widths = WHOLE_WIDTHS if whole else WIDTHS[request.family]
    return Question(
        request.family,
        direction,
        tuple(kinds),
        deciding,
        _dtype(request),
        next((bound for bound in widths if width <= bound), widths[-1]),
        size_class(request.family, size),
    )


def proven_at_every_size(request: Request) -> bool:
    """Whether the record lets the Triton kernels serve such calls of every size, forward and backward."""
    record = proofs.record_of(request.device)
    if record is None:
        return False
    asked = (question(request, direction) for direction in (FORWARD, BACKWARD))
    return not any(record.obstacle(one._replace(size=size)) for one in asked for size in CLASSES)


def _width_and_size(request: Request) -> tuple[int, int]:
    x = request.tensors[0]
    if request.family == "loss":
        return x.shape[1], x.shape[0] * request.tensors[1].shape[0]
    if request.family == "cache":
        q, keys, _ = request.tensors
        room = keys.shape[0] * keys.shape[2]
        return max(q.shape[3], request.spec.value_width), q.shape[1] * q.shape[2] * room
    if request.family not in ("attention", "statistics"):
        return x.shape[-1], x.numel() // max(1, x.shape[-1]) if request.family == "mlp" else x.numel()
    q, k, v = request.tensors
    return max(q.shape[3], v.shape[3]), q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def _dtype(request: Request) -> str:
    """The dtype, and the precision of its products if that is not its own."""
    name = str(request.dtype).removeprefix("torch.")
    if request.family == "attention":
        precision = request.spec.precision
    elif request.family in ("statistics", "cache"):
        precision = request.spec.attention.precision
    else:
        fast = (
            request.family in ("mlp", "loss") and request.dtype == torch.float32 and request.device.type == "cuda"
        )
        precision = "tf32" if fast and torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return name if precision == "ieee" else f"{name} {precision}"


PAGE = """# What computes what

Three backends compute every function of fastattn. On a GPU the kernels serve what a proof record
(`fastattn prove`) found right and not slower there; portable serves the rest. `backend=` or the environment
variable FASTATTN_BACKEND chooses by hand, and a backend that cannot compute a call refuses it in words.

- **triton**: the kernels.
- **portable**: the same algorithm in plain PyTorch, in tiles or rows, on any device, in O(N) memory. Where one of
  PyTorch's own fused kernels computes the same, that does the work: on a CPU flash attention, on NVIDIA GPUs those
  in the table at the end of this page.
- **reference**: the definition, N x N memory, for debugging. It computes everything.

A tick means all four directions: forward, backward, second derivative and forward mode (`torch.func.jvp`). Second
derivatives of attention are computed tile by tile in PyTorch for every backend, in O(N) memory. Those of MLPs and
norms go through their definitions; those of losses, too, some tokens at a time.

`fastattn doctor --features` prints this page; `fastattn doctor` prints what serves on your machine, and why.
"""


ROUTES = """## PyTorch's kernels on NVIDIA GPUs

Where the Triton kernels are not proven, the portable backend hands attention to the first of these kernels, from
left to right, that can do everything that is asked. cuDNN serves only where PyTorch itself would pick it. A kernel
is tried on a small problem first. One that does not compute what the definition says is not used, and the log says
so. What none computes takes a few large steps.

"""


def markdown() -> str:
    """The page FEATURES.md: a table for each family. A tick stands for every direction."""
    sections = [PAGE]
    for family in dict.fromkeys(feature.family for feature in FEATURES):
        rows = [f"| {f.name} | {_cell(f.triton)} | {_cell(f.portable)} |" for f in FEATURES if f.family == family]
        sections.append(
            "\n".join((f"## {family}\n", "| feature | Triton | portable |", "|---|---|---|", *rows, ""))
        )
    return "\n".join((*sections, ROUTES + torch_routes.markdown() + "\n"))


def _cell(directions: frozenset[str]) -> str:
    if directions == EVERY_DIRECTION:
        return "✓"
    return ", ".join(d for d in DIRECTIONS if d in directions) or "—"
