"""Calls of every family and kind, as plain data: what the proofs check and the measurements time.

A `Sizes` names a call. `build` makes its tensors and a function `call(backend, *tensors)`; with the backend
"reference" that function is the definition, so checks and measurements need nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn import lens, masks
from fastattn.core.mlp import operators
from fastattn.core.mlp.spec import ALWAYS, NEVER, MLPWeights, Options, gated_mlp_spec, mlp_spec
from fastattn.core.statistics.spec import NAMES

MASK_KINDS = ("window", "documents", "bigbird", "prefix", "random lists", "key lengths", "boolean mask")
SCORE_KINDS = (
    "softcap", "alibi", "sinks", "bias", "padding bias", "relative bias", "head scale", "dropout", "everything",
)  # fmt: skip
LSE = " lse gradient"  # behind a kind of attention: the log-sum-exp is added to out, and so has a gradient
INVARIANT_KINDS = ("causal", "full", "documents", "alibi", "sinks", "pages")
WITHOUT_GRADIENT = ("tangent", "statistics", "cache", "absorbed")
HIDDEN_STORED = "hidden layer stored"  # in place of a backend: the Triton kernels of other MLPs
CACHE_KINDS = ("contiguous", "pages", "shaped pages")
LATENT_KINDS = ("latent pages", "latent contiguous", "latent shaped pages")
QUANTISED_KINDS = ("int8 pages", "fp8 pages", "fp8 contiguous by-page", "int8 shaped pages by-page")
PAGE = 16  # tokens of a cache's page
# Arguments that have a gradient, beside q, k and v.
LEARNED = ("bias", "relative_bias", "sinks")


@dataclass(frozen=True)
class Sizes:
    """A call: attention of `heads` on `key_heads`; an MLP, norm or heads of batch * length rows `width` wide."""

    family: str  # one of BUILDERS
    kind: str
    dtype: str = "bfloat16"
    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    length: int = 333
    keys: int | None = None
    width: int = 64
    value_width: int | None = None
    hidden: int = 0

    @property
    def label(self) -> str:
        heads = f"{self.heads}/{self.key_heads}"
        lengths = f"{self.length}" if self.keys is None else f"{self.length} x {self.keys}"
        width = f"{self.width}" if self.value_width is None else f"{self.width}/{self.value_width}"
        if self.family == "mlp":
            return f"{self.kind} T{self.batch * self.length} d{width} h{self.hidden} {self.dtype}"
        if self.family == "loss":
            return f"{self.kind} T{self.batch * self.length} d{width} V{self.hidden} {self.dtype}"
        if self.family == "norm":
            return f"{self.kind} {self.batch * self.length} x {width} {self.dtype}"
        return f"{self.kind} B{self.batch} H{heads} L{lengths} D{width} {self.dtype}"

    @property
    def has_gradient(self) -> bool:
        """Whether the tensors of the call have one: a cache has none."""
        return self.family not in WITHOUT_GRADIENT and (self.family, self.kind) != ("invariant", "pages")

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Call:
    """`function(backend, *tensors)` returns one tensor or several; each of `tensors` has a gradient, if
    `Sizes.has_gradient`. otherwise: what would serve without the kernel, beside the portable backend, by
    names that the function takes like a backend's. flowing: so many of its results have a gradient where it is
    used."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    otherwise: tuple[str, ...] = ()
    flowing: int = 1


def build(sizes: Sizes, device: torch.device) -> Call:
    """The call; each time with the same tensors."""
    torch.manual_seed(0)
    return BUILDERS[sizes.family](sizes, device)


def random(sizes: Sizes, device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(shape, device=device).to(dtype or getattr(torch, sizes.dtype))


# ---- attention ----


def heads_of(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a linear layer leaves them: (batch, length, heads, width) in memory."""
    keys = sizes.keys or sizes.length
    shapes = (
        (sizes.length, sizes.heads, sizes.width),
        (keys, sizes.key_heads, sizes.width),
        (keys, sizes.key_heads, sizes.value_width or sizes.width),
    )
    q, k, v = (random(sizes, device, sizes.batch, *shape).transpose(1, 2) for shape in shapes)
    return q, k, v


def options(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """What attention of this kind is called with, beside q, k and v."""
    batch, heads, length = sizes.batch, sizes.heads, sizes.length
    keys = sizes.keys or length
    positions = torch.arange(max(length, keys))
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "full": lambda: {},
        "causal": lambda: {"causal": True},
        "window": lambda: {"causal": True, "window": (keys // 8, None)},
        "documents": lambda: {"mask": masks.documents(positions[:keys] * 8 // keys) & masks.causal()},
        "bigbird": lambda: {"mask": masks.bigbird(block=64 if keys >= 1024 else 16)},
        "prefix": lambda: {"mask": masks.prefix(keys // 4)},
        "random lists": lambda: {"mask": masks.from_dense(scattered(length, keys))},
        "key lengths": lambda: {"key_lengths": lengths_of(sizes, device)},
        "key lengths, causal": lambda: {"causal": True, "key_lengths": lengths_of(sizes, device)},
        "boolean mask": lambda: {"bias": torch.rand(1, 1, length, keys, device=device) < 0.8},
        "softcap": lambda: {"causal": True, "softcap": 30.0},
        "alibi": lambda: {"causal": True, "alibi_slopes": slopes_of(sizes, device)},
        "sinks": lambda: {"causal": True, "sinks": torch.randn(heads, device=device)},
        "bias": lambda: {"bias": random(sizes, device, 1, heads, length, keys)},
        "padding bias": lambda: {"bias": random(sizes, device, batch, 1, 1, keys)},
        "relative bias": lambda: {"relative_bias": torch.randn(heads, 257, device=device)},
        "head scale": lambda: {"causal": True, "scale": torch.rand(heads, device=device) * sizes.width**-0.5},
        "dropout": lambda: {
            "causal": True, "dropout_p": 0.125, "dropout_state": fastattn.dropout_state(batch, device)
        },
        "dropout of a part": lambda: {
            "causal": True, "dropout_p": 0.125,
            "dropout_state": torch.tensor([[7, 0, 3, length, 9]] * batch, device=device),
        },
    }  # fmt: skip
    if sizes.kind == "everything":
        together = ("window", "key lengths", "softcap", "alibi", "sinks", "relative bias", "bias", "dropout")
        return {name: value for kind in together for name, value in made[kind]().items()}
    return made[sizes.kind.removesuffix(LSE)]()


def scattered(queries: int, keys: int) -> Tensor:
    """A mask that no formula of masks describes: bool (queries, keys)."""
    return (torch.arange(queries)[:, None] * 7 + torch.arange(keys) * 13) % 11 < 4


def lengths_of(sizes: Sizes, device: torch.device) -> Tensor:
    """From a half of the keys to all of them."""
    keys, batch = sizes.keys or sizes.length, sizes.batch
    return torch.tensor([keys - keys * b // (2 * batch) for b in range(batch)], dtype=torch.int32, device=device)


def slopes_of(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.tensor([2.0 ** (-8 * (h + 1) / sizes.heads) for h in range(sizes.heads)], device=device)


def attention_call(sizes: Sizes, device: torch.device) -> Call:
    arguments = options(sizes, device)
    learned = {n: t for n in LEARNED if (t := arguments.get(n)) is not None and t.is_floating_point()}
    arguments = {name: value for name, value in arguments.items() if name not in learned}
    if "mask" in arguments:
        keys = sizes.keys or sizes.length
        arguments["mask"] = arguments["mask"].lower(sizes.batch, sizes.heads, sizes.length, keys, device)

    def function(backend: str, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        asked = {**arguments, **dict(zip(learned, others, strict=True))}
        out, lse = fastattn.attention(q, k, v, **asked, return_lse=True, backend=backend)
        return (out + lse[..., None].to(out.dtype) if sizes.kind.endswith(LSE) else out), lse

    return Call(function, (*heads_of(sizes, device), *learned.values()), ("q", "k", "v", *learned))


def invariant_call(sizes: Sizes, device: torch.device) -> Call:
    """`fastattn.invariant()`, which the definition need not be told; `kind` is "pages", or one of attention's."""
    base = (cache_call if sizes.kind == "pages" else attention_call)(sizes, device)

    def function(backend: str, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        with contextlib.nullcontext() if backend == "reference" else fastattn.invariant():
            return base.function(backend, *tensors)

    return dataclasses.replace(base, function=function)


def tangent_call(sizes: Sizes, device: torch.device) -> Call:
    """Forward mode: the derivative of out along one direction of q, k and v."""
    base = attention_call(sizes, device)
    directions = tuple(torch.randn_like(t) for t in base.tensors)

    def function(backend: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            pairs = zip(tensors, directions, strict=True)
            duals = [forward_ad.make_dual(t.detach(), direction.to(t.dtype)) for t, direction in pairs]
            return tuple(forward_ad.unpack_dual(base.function(backend, *duals)[0]))

    return Call(function, base.tensors, base.names)


def statistics_call(sizes: Sizes, device: torch.device) -> Call:
    """`kind` is attention's, and behind a colon the statistics wanted; without one all that have a kernel. The
    log-sum-exps are those of a forward on the same backend, computed once for each dtype."""
    kind, _, names = sizes.kind.partition(": ")
    attention = dataclasses.replace(sizes, kind=kind)
    torch.manual_seed(0)
    arguments = options(attention, device)
    forward = attention_call(attention, device)
    batch, keys = sizes.batch, sizes.keys or sizes.length
    if "mask" in arguments:
        arguments["mask"] = arguments["mask"].lower(batch, sizes.heads, sizes.length, keys, device)
    learned = tuple(name for name in forward.names if name in LEARNED)
    labels = torch.randint(50, (batch, keys), device=device)
    weights = torch.rand(batch, sizes.heads, sizes.length, device=device)
    want = tuple(names.split()) or tuple(name for name in NAMES if name != "top_keys")
    known: dict[Any, Tensor] = {}

    def function(backend: str, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        key = (backend, q.dtype)
        if key not in known:
            with torch.no_grad():
                known[key] = forward.function(backend, q, k, v, *others)[1]
        asked = {**arguments, **dict(zip(learned, others, strict=True))}
        found = lens.attention_statistics(
            q, k, known[key], v, want=want, labels=labels, query_weights=weights, backend=backend, **asked
        )
        return tuple(found)

    return Call(function, forward.tensors, forward.names)


def varlen_call(sizes: Sizes, device: torch.device) -> Call:
    """Packed sequences of unequal lengths, one of them empty; `kind` is full or causal."""
    starts = starts_of(sizes).to(device)
    shapes = ((sizes.length, n, sizes.width) for n in (sizes.heads, sizes.key_heads, sizes.key_heads))

    def function(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = sizes.kind == "causal"
        return fastattn.attention_varlen(q, k, v, starts, starts, causal=causal, backend=backend)

    return Call(function, tuple(random(sizes, device, *shape) for shape in shapes), ("q", "k", "v"))


def starts_of(sizes: Sizes) -> Tensor:
    fractions = (0, 1, 1, 3, 6, 10, 16)
    return torch.tensor([sizes.length * n // 16 for n in fractions], dtype=torch.int32)


def cache_call(sizes: Sizes, device: torch.device) -> Call:
    """`length` queries for each of rows of half to all of `keys` keys; `kind` is one of CACHE_KINDS, LATENT_KINDS
    and QUANTISED_KINDS. Pages have PAGE tokens, and lie in any order. Latent values are the first eight ninths of
    the keys' columns."""
    words = sizes.kind.split()
    q, k, v = heads_of(sizes, device)
    k, v = k.contiguous(), v.contiguous()
    arguments: dict[str, Any] = {"cache_lengths": lengths_of(sizes, device)}
    if "pages" in words:
        table = arguments["block_table"] = table_of(sizes, device)
        pages = table.shape[1]
        # The first tokens of each row, as pages: (pages, heads, PAGE, width).
        order = table.flatten().long().argsort()
        k, v = (
            t[:, :, : PAGE * pages].unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1)[order]
            for t in (k, v)
        )
        arguments["cache_lengths"] = arguments["cache_lengths"].clamp(max=PAGE * pages)
    if "shaped" in words:
        arguments |= {"softcap": 30.0, "alibi_slopes": slopes_of(sizes, device), "window": (k.shape[2] * 4, None)}
        arguments |= {"sinks": torch.randn(sizes.heads, device=device)}
    if "int8" in words or "fp8" in words:
        return _quantised_cache_call(sizes, q, (k, v), arguments)
    latent = "latent" in words
    if latent:
        arguments["value_width"] = sizes.width * 8 // 9

    def function(backend: str, q: Tensor, k: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return fastattn.attention_with_cache(q, k, v, **arguments, return_lse=True, backend=backend)

    return Call(
        function, (q, k) if latent else (q, k, v), ("q", "k_cache") if latent else ("q", "k_cache", "v_cache")
    )


def table_of(sizes: Sizes, device: torch.device) -> Tensor:
    """Which pages each row has, int32 (B, pages of a row); each time the same."""
    pages = (sizes.keys or sizes.length) // PAGE
    table = torch.randperm(sizes.batch * pages, generator=torch.Generator().manual_seed(0))
    return table.view(sizes.batch, pages).int().to(device)


def _quantised_cache_call(
    sizes: Sizes, q: Tensor, caches: tuple[Tensor, Tensor], arguments: dict[str, Any]
) -> Call:
    """New tokens are quantised and written first, to the same places in every call."""
    words = sizes.kind.split()
    dtype, device = torch.int8 if "int8" in words else torch.float8_e4m3fn, q.device
    stored = [(t.float() * 40).clamp(-127, 127).to(dtype) for t in caches]
    scales = [torch.rand(t.shape[: 2 if "by-page" in words else 3], device=device) * 0.02 + 0.01 for t in stored]
    arguments["cache_lengths"] = (arguments["cache_lengths"] - sizes.length).clamp(min=0)
    new = [random(sizes, device, sizes.batch, sizes.key_heads, sizes.length, sizes.width) for _ in "kv"]

    def function(backend: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.attention_with_cache(
            q,
            *stored,
            k=k,
            v=v,
            k_scale=scales[0],
            v_scale=scales[1],
            **arguments,
            return_lse=True,
            backend=backend,
        )

    return Call(function, (q, *new), ("q", "k", "v"))


# ---- the others ----


def mlp_call(sizes: Sizes, device: torch.device) -> Call:
    """`kind` is an activation, then where they are "gated", "biases", "int8" or "nothing" (what is saved), "eager"
    (`match_eager`), and of a residual branch "rms" or "layer" (its norm), "residual" (x itself) and "dropout";
    "whole": the Triton backend computes it in one kernel."""
    activation, *more = sizes.kind.split()
    gated, biases = "gated" in more, "biases" in more
    into, out = (sizes.hidden, sizes.width), (sizes.width, sizes.hidden)

    def weight(*shape: int) -> Tensor:
        return random(sizes, device, *shape) * shape[-1] ** -0.5

    firsts = ["gate", "up"] if gated else ["1"]
    tensors = {"x": random(sizes, device, sizes.batch * sizes.length, sizes.width)}
    tensors |= {f"w_{name}": weight(*into) for name in firsts} | {"w_down": weight(*out)}
    if biases:
        tensors |= {f"b_{name}": random(sizes, device, sizes.hidden) for name in firsts}
        tensors |= {"b_down": random(sizes, device, sizes.width)}
    norm = next((word for word in ("rms", "layer") if word in more), None)
    if norm:
        tensors |= {"norm_weight": random(sizes, device, sizes.width)}
    if norm == "layer":
        tensors |= {"norm_bias": random(sizes, device, sizes.width)}
    save = next((word for word in ("int8", "nothing") if word in more), "auto")
    state = torch.tensor([[7, 0]], device=device) if "dropout" in more else None
    names = tuple(tensors)

    def function(backend: str, *values: Tensor) -> Tensor:
        t = dict(zip(names, values, strict=True))
        asked: dict[str, Any] = {"activation": activation, "backend": backend, "match_eager": "eager" in more}
        asked |= {"save": save, "norm": norm, "norm_eps": 1e-6 if norm else None}
        asked |= {name: t[name] for name in ("norm_weight", "norm_bias") if name in t}
        asked |= {"residual": t["x"]} if "residual" in more else {}
        asked |= {"dropout_p": 0.1, "dropout_state": state} if "dropout" in more else {}
        if gated:
            asked |= {name: t[name] for name in ("b_gate", "b_up", "b_down") if name in t}
            return fastattn.gated_mlp(t["x"], t["w_gate"], t["w_up"], t["w_down"], **asked)
        return fastattn.mlp(t["x"], t["w_1"], t.get("b_1"), t["w_down"], t.get("b_down"), **asked)

    def keeping(backend: str, *values: Tensor) -> Tensor:
        """The call with a gradient to come: without one, nothing is kept."""
        with torch.enable_grad():
            x, *rest = values
            return function(backend, x if x.requires_grad else x.detach().requires_grad_(), *rest)

    if "whole" in more:
        whole = functools.partial(_whole_mlp, names, activation, gated)
        return Call(whole, tuple(tensors.values()), names, (HIDDEN_STORED,))
    return Call(keeping if save != "auto" else function, tuple(tensors.values()), names)


def _whole_mlp(names: tuple[str, ...], activation: str, gated: bool, backend: str, *values: Tensor) -> Tensor:
    """An MLP that the Triton backend computes in one kernel; as HIDDEN_STORED, it stores the hidden layer."""
    t = dict(zip(names, values, strict=True))
    first = "gate" if gated else "1"
    weights = MLPWeights(
        t[f"w_{first}"], t.get(f"b_{first}"), t.get("w_up"), t.get("b_up"), t["w_down"], t.get("b_down")
    )
    options = Options(activation, "auto" if backend == HIDDEN_STORED else "nothing")
    spec = (gated_mlp_spec if gated else mlp_spec)(t["x"], weights, options)
    spec = dataclasses.replace(spec, whole=ALWAYS if backend == "triton" else NEVER)
    asked = "triton" if backend == HIDDEN_STORED else backend
    return operators.mlp(t["x"], *weights, *operators.options_of(spec), asked)[0]


def norm_call(sizes: Sizes, device: torch.device) -> Call:
    """`kind` is "rms" or "layer", then "residual" where one is added, "offset" where the weight is kept less 1."""
    form, *more = sizes.kind.split()
    x = random(sizes, device, sizes.batch, sizes.length, sizes.width)
    tensors = {"x": x, "weight": random(sizes, device, sizes.width)}
    tensors |= {"bias": random(sizes, device, sizes.width)} if form == "layer" else {}
    tensors |= {"residual": torch.randn_like(x)} if "residual" in more else {}
    names = tuple(tensors)
    norm: Any = {"rms": fastattn.rms_norm, "layer": fastattn.layer_norm}[form]

    def function(backend: str, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        offset = {"weight_offset": 1.0} if "offset" in more else {}
        return norm(**dict(zip(names, values, strict=True)), **offset, eps=1e-6, backend=backend)

    # The sum with the residual goes on to what comes next.
    return Call(function, tuple(tensors.values()), names, flowing=2 if "residual" in more else 1)


def heads_call(sizes: Sizes, device: torch.device) -> Call:
    """`kind` is some of "norm", "rotary" or "interleaved", and "scale"."""
    steps = sizes.kind.split()
    x = random(sizes, device, sizes.batch, sizes.length, sizes.heads, sizes.width).transpose(1, 2)
    tensors = {"x": x}
    tensors |= {"norm_weight": torch.randn(sizes.width, device=device)} if "norm" in steps else {}
    tensors |= {"head_scale": torch.randn(sizes.heads, device=device)} if "scale" in steps else {}
    names, fixed = tuple(tensors), dict[str, Any]()
    if "rotary" in steps or "interleaved" in steps:
        cos, sin = angles_of(sizes, device)
        fixed = {"cos": cos, "sin": sin, "interleaved": "interleaved" in steps}

    def function(backend: str, *values: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(names, values, strict=True))
        return fastattn.prepare_heads(**given, **fixed, backend=backend)

    return Call(function, tuple(tensors.values()), names)


def loss_call(sizes: Sizes, device: torch.device) -> Call:
    """`kind` is "classes", a tenth of them ignored, or "probabilities", and options. `hidden` is the number of
    classes."""
    form, *steps = sizes.kind.split()
    x = random(sizes, device, sizes.batch * sizes.length, sizes.width)
    w = random(sizes, device, sizes.hidden, sizes.width) * sizes.width**-0.5
    fixed: dict[str, Any] = {"target": classes_of(sizes, device)}
    if form == "probabilities":
        fixed["target"] = random(sizes, device, len(x), sizes.hidden, dtype=torch.float32).softmax(1).to(x.dtype)
    fixed |= {"softcap": 5.0} if "softcap" in steps else {}
    fixed |= {"temperature": 0.7} if "temperature" in steps else {}
    fixed |= {"filter": 1e-7} if "filter" in steps else {}
    fixed |= {"label_smoothing": 0.1} if "smoothing" in steps else {}
    fixed |= {"return_entropy": True, "return_lse": True} if "entropy" in steps else {}
    fixed |= {"weight": torch.rand(sizes.hidden, device=device)} if "weights" in steps else {}
    fixed |= {"reduction": "mean" if "mean" in steps else "none"}
    names = ("input", "linear_weight", *(("linear_bias",) if "bias" in steps else ()))
    tensors = (x, w, *((random(sizes, device, sizes.hidden),) if "bias" in steps else ()))

    def function(backend: str, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        return fastattn.linear_cross_entropy(**dict(zip(names, values, strict=True)), **fixed, backend=backend)

    return Call(function, tensors, names)


def classes_of(sizes: Sizes, device: torch.device) -> Tensor:
    target = torch.arange(sizes.batch * sizes.length, device=device) * 7919 % sizes.hidden
    target[::10] = -100
    return target


def angles_of(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    half = sizes.width // 2
    angles = torch.outer(torch.arange(float(sizes.length)), 10_000 ** (-torch.arange(half) / half))
    return angles.cos().to(device), angles.sin().to(device)


BUILDERS: dict[str, Callable[[Sizes, torch.device], Call]] = {
    "attention": attention_call,
    "masks": attention_call,
    "scores": attention_call,
    "invariant": invariant_call,
    "absorbed": attention_call,  # keys wider than 512, which have no backward
    "varlen": varlen_call,
    "tangent": tangent_call,
    "statistics": statistics_call,
    "cache": cache_call,
    "mlp": mlp_call,
    "norm": norm_call,
    "heads": heads_call,
    "loss": loss_call,
}
