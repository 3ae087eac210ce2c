"""Every public call with every feature, on whatever device is current: forward, backward and forward mode.

Sizes are small and odd; what matters is what is launched. A call that launches nothing says so (`launches`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn import lens, masks
from fastattn.core.statistics.spec import NAMES
from tests.pretended_gpu.tensors import numbered

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Call:
    """One call of the library; `launches`: it has something to compute."""

    name: str
    run: Callable[[], object]
    launches: bool = True


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers on the current GPU; which ones does not matter."""
    return torch.zeros(shape, dtype=dtype, device="cuda")


# ---- attention ----


@dataclass(frozen=True)
class Sizes:
    """Of an attention call; `layout` is how q, k and v lie in memory."""

    batch: int = 2
    heads: int = 4
    key_heads: int = 2
    queries: int = 113
    keys: int = 203
    width: int = 64
    value_width: int | None = None
    dtype: str = "bf16"
    layout: str = "blhd"

    def heads_of(self, heads: int, length: int, width: int) -> Tensor:
        dtype = DTYPES[self.dtype]
        if self.layout == "strided":
            return tensor(self.batch, heads, length, 3, width * 2, dtype=dtype)[:, :, :, 1, ::2]
        if self.layout == "columns":
            return tensor(self.batch, heads, width, length, dtype=dtype).transpose(2, 3)
        if self.layout == "expanded":
            return tensor(1, 1, length, width, dtype=dtype).expand(self.batch, heads, -1, -1)
        if self.layout == "misaligned":
            return tensor(self.batch * length * heads * width + 1, dtype=dtype)[1:].view(
                self.batch, heads, length, width
            )
        return tensor(self.batch, length, heads, width, dtype=dtype).transpose(1, 2)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.heads_of(self.heads, self.queries, self.width),
            self.heads_of(self.key_heads, self.keys, self.width),
            self.heads_of(self.key_heads, self.keys, self.value_width or self.width),
        )

    def scores(self, *, broadcast: str = "", dtype: str | None = None) -> Tensor:
        """A tensor like the scores, of size 1 in the dimensions that `broadcast` names."""
        named = zip("bhqk", (self.batch, self.heads, self.queries, self.keys), strict=True)
        shape = [1 if name in broadcast else size for name, size in named]
        return tensor(*shape, dtype=DTYPES[dtype or self.dtype])


def _learned(t: Tensor) -> Tensor:
    return t.requires_grad_()


# What attention takes beside q, k and v. With requires_grad: a gradient is asked, and a tangent in forward mode.
FEATURES: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "full": lambda s: {},
    "causal": lambda s: {"causal": True},
    "window": lambda s: {"window": (40, 7)},
    "window to the left": lambda s: {"causal": True, "window": (40, None)},
    "key lengths": lambda s: {"key_lengths": torch.arange(s.batch, device="cuda") * 50},
    "soft cap": lambda s: {"softcap": 30.0},
    "slopes": lambda s: {"alibi_slopes": tensor(s.heads)},
    "slopes of each batch": lambda s: {"alibi_slopes": tensor(s.batch, s.heads)},
    "sinks": lambda s: {"sinks": _learned(tensor(s.heads))},
    "bias": lambda s: {"bias": _learned(s.scores())},
    "bias in float32": lambda s: {"bias": _learned(s.scores(dtype="fp32"))},
    "bias that lies by columns": lambda s: {
        "bias": _learned(s.scores().transpose(2, 3).contiguous().transpose(2, 3))
    },
    "bias for all of a row": lambda s: {"bias": _learned(s.scores(broadcast="bhq"))},
    "bias for each head": lambda s: {"bias": _learned(s.scores(broadcast="bqk"))},
    "bias for each query": lambda s: {"bias": _learned(s.scores(broadcast="k"))},
    "bias without gradient": lambda s: {"bias": s.scores(broadcast="b")},
    "one bias": lambda s: {"bias": _learned(s.scores(broadcast="bhqk"))},
    "bool mask": lambda s: {"bias": s.scores() == 0},
    "padding as bool mask": lambda s: {"bias": s.scores(broadcast="hq") == 0},
    "relative bias": lambda s: {"relative_bias": _learned(tensor(s.heads, 65))},
    "dropout": lambda s: {"dropout_p": 0.1},
    "dropout of a part": lambda s: {"dropout_p": 0.1, "dropout_state": tensor(s.batch, 5).long()},
    "lists": lambda s: {"mask": masks.from_function(lambda b, h, i, j: (i * 7 + j * 13 + h) % 11 < 4)},
    "lists that share rows": lambda s: {
        "mask": masks.global_tokens([3]) | masks.from_function(lambda b, h, i, j: i // 64 == j // 64)
    },
    "lists that count": lambda s: {"mask": masks.bigbird(block=16, random=1)},
    "documents": lambda s: {"mask": masks.documents(torch.arange(s.keys, device="cuda")[None] // 40)},
    "sequences": lambda s: {"mask": masks.packed_sequences([0, 30, s.queries], [0, 60, s.keys], True)},
    "scale for each head": lambda s: {"scale": _learned(tensor(s.heads))},
    "negative scale": lambda s: {"scale": -0.5},
}
# Features whose masks need as many queries as keys.
SQUARE = ("lists that count", "documents")
TOGETHER = (
    "window",
    "key lengths",
    "soft cap",
    "slopes",
    "sinks",
    "scale for each head",
    "bias",
    "relative bias",
    "dropout",
)


def features(sizes: Sizes, *names: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name in names:
        given |= FEATURES[name](sizes)
    return given


def forward(sizes: Sizes, *names: str) -> None:
    """Without gradients."""
    fastattn.attention(*sizes.qkv(), **features(sizes, *names), return_lse=True)


def backward(sizes: Sizes, *names: str, lse: bool = False, summed: bool = False) -> None:
    """With gradients of every input; `summed`: the upstream gradient is one number, expanded, as that of a sum
    is."""
    given = features(sizes, *names)
    q, k, v = (t.detach().requires_grad_() for t in sizes.qkv())
    out, row_lse = fastattn.attention(q, k, v, **given, return_lse=True)
    results = [out, row_lse] if lse else [out]
    leaves = [q, k, v, *(t for t in given.values() if isinstance(t, Tensor) and t.requires_grad)]
    if summed:
        torch.autograd.grad(out.sum(), leaves)
    else:
        torch.autograd.grad(results, leaves, [torch.ones_like(t) for t in results])


def forward_mode(sizes: Sizes, *names: str, moved: str = "qkv", beside: bool = True) -> None:
    """With tangents of those of q, k and v that `moved` names and, if `beside`, of all that is learned."""
    given = features(sizes, *names)
    with forward_ad.dual_level():

        def dual(t: Tensor) -> Tensor:
            return forward_ad.make_dual(t.detach(), torch.ones_like(t))

        inputs = [dual(t) if name in moved else t for name, t in zip("qkv", sizes.qkv(), strict=True)]
        for name, value in given.items():
            if isinstance(value, Tensor) and value.requires_grad:
                given[name] = dual(value) if beside else value.detach()
        fastattn.attention(*inputs, **given, return_lse=True)


def attention_calls() -> Iterator[Call]:
    plain, long = Sizes(), Sizes(queries=1024, keys=1024)

    def of(title: str, function: Callable, *arguments: Any, launches: bool = True, **keywords: Any) -> Call:
        return Call(f"attention, {title}", lambda: function(*arguments, **keywords), launches)

    for name in FEATURES:
        sizes = Sizes(queries=203) if name in SQUARE else long if name == "lists that share rows" else plain
        yield of(f"{name}, backward", backward, sizes, name)
        yield of(f"{name}, forward mode", forward_mode, sizes, name)
    for dtype, width in itertools.product(DTYPES, (8, 40, 64, 80, 128, 256, 512)):
        sizes = Sizes(width=width, dtype=dtype)
        yield of(f"{dtype} D={width}, backward", backward, sizes, "causal", lse=True)
        if dtype != "fp32" or width <= 128:
            yield of(f"{dtype} D={width}, forward mode", forward_mode, sizes, "causal")
    for dtype, width in itertools.product(("bf16", "fp32"), (64, 128, 256)):
        sizes = Sizes(width=width, dtype=dtype, queries=203)
        for name in ("window", "bias", "bool mask", "relative bias", "dropout", "lists", "documents"):
            if (dtype, width) != ("bf16", 64):
                yield of(f"{dtype} D={width} {name}, backward", backward, sizes, name)
        if dtype == "bf16":
            yield of(f"D={width}, together, backward", backward, sizes, *TOGETHER, lse=True)
            yield of(f"D={width}, together, forward mode", forward_mode, sizes, *TOGETHER)
    wide = Sizes(width=320, value_width=512, queries=203)
    for name in ("bias", "relative bias", "lists", "documents"):
        yield of(f"D=320 and 512, {name}, backward", backward, wide, name)
    yield of("D=320 and 512, together, backward", backward, wide, *TOGETHER, lse=True)
    yield of("D=320 and 512, together, forward mode", forward_mode, wide, *TOGETHER)
    for precision, width in itertools.product(("tf32", "tf32x3", "ieee"), (64, 128, 256)):
        sizes = Sizes(width=width, dtype="fp32")
        yield of(f"{precision} D={width}", _with_precision, sizes, precision)
    yield of("widths 192 and 128", backward, Sizes(width=192, value_width=128), "causal")
    yield of("widths 24 and 111", backward, Sizes(width=24, value_width=111))
    for layout in ("strided", "columns", "expanded", "misaligned"):
        sizes = Sizes(layout=layout)
        yield of(f"{layout}, backward", backward, sizes, "bias", summed=True)
        if layout != "expanded":  # torch takes no expanded tensor as one with a tangent
            yield of(f"{layout}, forward mode", forward_mode, sizes, "bias")
    yield of("summed loss", backward, plain, "causal", summed=True)
    # Forward mode: of any of its tangents, any may be missing.
    for count in range(4):
        for moved in itertools.combinations("qkv", count):
            for name in ("full", "sinks", "bias", "relative bias", "scale for each head"):
                if moved or name != "full":
                    chosen = "".join(moved)
                    title = f"{name}, tangents of {chosen or 'nothing else'}"
                    yield of(title, forward_mode, plain, name, moved=chosen, launches=True)
    yield of("no tangents beside q's", forward_mode, plain, *TOGETHER, moved="q", beside=False)
    # Walks that several programs share: few queries, many keys.
    for name in ("full", "key lengths", "bias", "sinks"):
        yield of(f"one query, {name}, forward", forward, Sizes(batch=1, queries=1, keys=5000), name)
    yield of("few queries, backward", backward, Sizes(batch=1, queries=7, keys=3000), lse=True)
    yield of("few queries, scales", backward, Sizes(batch=1, queries=7, keys=3000), "scale for each head", "bias")
    yield of("few keys, backward", backward, Sizes(batch=1, queries=3000, keys=7), lse=True)
    # More batch entries times heads than a grid has in y and z.
    many = Sizes(batch=8209, heads=8, key_heads=8, queries=5, keys=5, width=16)
    for name in ("full", "bias for each head", "relative bias"):
        yield of(f"65,672 heads, {name}, backward", backward, many, name)
    yield of("65,672 heads, forward mode", forward_mode, many)
    yield of(
        "65,672 heads, lists that share rows",
        backward,
        Sizes(batch=65672, heads=1, key_heads=1, queries=770, keys=770, width=8, layout="expanded"),
        "lists that share rows",
    )
    for what in ("batch", "queries", "keys"):
        empty = {what: 0}
        for name in ("full", *TOGETHER, "lists"):
            sizes = Sizes(**empty)
            # Without keys there is a result: zeros, and the sinks' log-sum-exp.
            yield of(f"no {what}, {name}, backward", backward, sizes, name, launches=what == "keys")
            yield of(f"no {what}, {name}, forward mode", forward_mode, sizes, name, launches=what == "keys")


def absorbed_calls() -> Iterator[Call]:
    """Of queries and keys wider than a tile, which have no backward."""

    def of(title: str, sizes: Sizes, *names: str) -> Call:
        return Call(f"attention, {title}, forward", lambda: forward(sizes, *names))

    for dtype, width in itertools.product(DTYPES, (576, 520, 577)):
        yield of(f"{dtype} D={width} and 512", Sizes(width=width, value_width=512, dtype=dtype), "causal")
    square = Sizes(width=576, value_width=512, queries=203)
    for name in ("bias", "relative bias", "lists", "documents"):
        yield of(f"D=576 and 512, {name}", square, name)
    yield of("D=576 and 512, together", square, *TOGETHER)


def _with_precision(sizes: Sizes, precision: str) -> None:
    q, k, v = (t.detach().requires_grad_() for t in sizes.qkv())
    fastattn.attention(q, k, v, precision=precision, causal=True).backward(torch.ones_like(q))


# ---- statistics of attention ----


def with_maxima(sizes: Sizes, *names: str) -> None:
    fastattn.attention(*sizes.qkv(), **features(sizes, *names), return_max=True)


KERNELS_FOR = tuple(name for name in NAMES if name != "top_keys")


def statistics(sizes: Sizes, *names: str, want: tuple[str, ...] = KERNELS_FOR, **asked: Any) -> None:
    q, k, v = sizes.qkv()
    lse = tensor(sizes.batch, sizes.heads, sizes.queries)
    if "match_mass" in want:
        asked |= {"labels": torch.zeros(sizes.batch, sizes.keys, dtype=torch.int64, device="cuda")}
        asked |= {"match": ("induction", "duplicate", "previous")}
    if "weighted_received" in want:
        asked["query_weights"] = tensor(1)
    lens.attention_statistics(q, k, lse, v, want=want, **asked, **features(sizes, *names))


def statistics_calls() -> Iterator[Call]:
    def of(title: str, *arguments: Any, launches: bool = True, **keywords: Any) -> Call:
        return Call(f"statistics, {title}", lambda: statistics(*arguments, **keywords), launches)

    for name in FEATURES:
        if not name.startswith("dropout"):
            yield of(name, Sizes(queries=203 if name in SQUARE else 113, keys=203), name)
    together = tuple(name for name in TOGETHER if name != "dropout")
    for dtype, width in itertools.product(DTYPES, (8, 40, 64, 128, 256, 512)):
        yield of(f"{dtype} D={width}", Sizes(width=width, dtype=dtype), "causal")
        yield of(f"{dtype} D={width}, together", Sizes(width=width, dtype=dtype), *together)
    for name in KERNELS_FOR:
        yield of(f"{name} alone", Sizes(), "causal", want=(name,))
    for width in (64, 256):
        yield of(f"tf32 D={width}", Sizes(width=width, dtype="fp32"), "causal", precision="tf32")
        yield of(f"tf32x3 D={width}", Sizes(width=width, dtype="fp32"), "causal", precision="tf32x3")
    for layout in ("strided", "columns", "misaligned"):
        yield of(layout, Sizes(layout=layout), "causal")
    for name in ("causal", "sinks", "lists that share rows"):
        sizes = Sizes(queries=1024, keys=1024) if "share" in name else Sizes()
        yield Call(f"attention, {name}, largest scores", lambda n=name, s=sizes: with_maxima(s, n))
    yield of("a thumbnail of 128 columns", Sizes(), want=("thumbnail",), thumbnail=128)
    yield of("one query and key", Sizes(queries=1, keys=1))
    yield of("the last queries", Sizes(), "causal", queries=slice(-16, None))
    yield of("no keys", Sizes(queries=0, keys=0), launches=False)


# ---- losses ----


def loss(
    *, dtype: str = "bf16", probabilities: bool = False, bias: bool = False, tokens: int = 77, **options: Any
):
    """Forward, and backward of one number and of one for each token."""
    kind, classes = DTYPES[dtype], 300
    x, w = tensor(tokens, 128, dtype=kind).requires_grad_(), tensor(classes, 128, dtype=kind).requires_grad_()
    index = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    target = tensor(tokens, classes, dtype=kind) if probabilities else index
    options |= {"linear_bias": tensor(classes, dtype=kind).requires_grad_()} if bias else {}
    for more in ({}, {"reduction": "none", "return_lse": True, "return_entropy": True}):
        results = fastattn.linear_cross_entropy(x, w, target, **options, **more)
        torch.autograd.backward(results, [torch.ones_like(t) for t in results] if more else None)


def loss_calls() -> Iterator[Call]:
    def of(title: str, **options: Any) -> Call:
        return Call(f"linear_cross_entropy, {title}", lambda: loss(**options), options.get("tokens") != 0)

    for dtype in DTYPES:
        yield of(dtype, dtype=dtype)
    for probabilities in (False, True):
        title = "probabilities" if probabilities else "classes"
        for name, value in (("softcap", 5.0), ("temperature", 0.5), ("label_smoothing", 0.1), ("z_loss", 0.1)):
            yield of(f"{title}, {name}", probabilities=probabilities, **{name: value})
        yield of(
            f"{title}, all together", probabilities=probabilities, bias=True, softcap=5.0, label_smoothing=0.1
        )
    yield of("a bias", bias=True)
    yield of("filtered", bias=True, filter=1e-3)
    yield of("no tokens", tokens=0)


# ---- MLPs ----


def mlp(
    activation: str,
    biases: str,
    *,
    gated: bool,
    dtype: str,
    tokens: int = 77,
    d: int = 192,
    h: int = 256,
    **asked: Any,
):
    """Forward in inference and in training, and backward; `biases` names those that are there."""
    kind = DTYPES[dtype]
    x, first = tensor(tokens, d, dtype=kind), tensor(h, d, dtype=kind)
    second = tensor(d, h, dtype=kind)
    asked |= {name: tensor(d, dtype=kind) for name in ("norm_weight", "norm_bias") if name in asked}
    if "residual" in asked:
        asked["residual"] = x if asked["residual"] == "x" else tensor(tokens, d, dtype=kind)
    widths = {"b_gate": h, "b_up": h, "b_down": d} if gated else {"b1": h, "b2": d}
    given = {name: tensor(width, dtype=kind) if name in biases.split() else None for name, width in widths.items()}
    if gated:
        given |= {"w_gate": first, "w_up": first.clone(), "w_down": second}
        if "packed" in asked:
            given |= {"w_gate": tensor(2 * h, d, dtype=kind), "b_gate": tensor(2 * h, dtype=kind), "w_up": None}
    else:
        given |= {"w1": first, "w2": second}
    function = functools.partial(fastattn.gated_mlp if gated else fastattn.mlp, activation=activation, **asked)
    function(x, **given)
    leaves = [t.requires_grad_() for t in (x, *given.values()) if t is not None]
    torch.autograd.grad(function(x, **given).sum(), leaves)


# Arguments of a residual branch: tensors are made where True stands.
BRANCHES: dict[str, dict[str, Any]] = {
    "norm before it": {"norm": "layer", "norm_weight": True, "norm_bias": True, "residual": "x"},
    "norm in the first product": {"norm": "layer", "norm_weight": True, "residual": "apart", "tokens": 2100},
    "rms in the first product": {"norm": "rms", "norm_weight": True, "save": "nothing", "tokens": 2100},
    "dropout": {"residual": "x", "dropout_p": 0.1},
    "dropout of chunks": {"dropout_p": 0.1, "save": "nothing", "chunk": 40},
    "by the library": {"norm": "rms", "residual": "x", "dropout_p": 0.1, "d": 64, "h": 5008},
}


def mlp_calls() -> Iterator[Call]:
    def of(title: str, *arguments: Any, **keywords: Any) -> Call:
        kind = "gated_mlp" if keywords["gated"] else "mlp"
        return Call(f"{kind}, {title}", lambda: mlp(*arguments, **keywords), keywords.get("tokens") != 0)

    for gated in (False, True):
        names = ("b_gate", "b_up", "b_down") if gated else ("b1", "b2")
        for activation in fastattn.ground.checks.ACTIVATIONS:
            yield of(activation, activation, " ".join(names), gated=gated, dtype="bf16")
        for count in range(len(names)):
            for chosen in itertools.combinations(names, count):
                title = f"biases: {' '.join(chosen) or 'none'}"
                yield of(title, "silu" if gated else "gelu", " ".join(chosen), gated=gated, dtype="bf16")
        for dtype in DTYPES:
            yield of(dtype, "gelu", "", gated=gated, dtype=dtype)
        yield of("odd widths", "gelu", " ".join(names), gated=gated, dtype="bf16", d=111, h=203)
        for save in ("preactivation", "int8", "nothing"):
            yield of(save, "silu", " ".join(names), gated=gated, dtype="bf16", save=save, chunk=40)
        yield of("rounding as eager", "silu", " ".join(names), gated=gated, dtype="bf16", match_eager=True)
        for d in (64, 128):
            yield of(f"whole, {d} wide", "gelu", " ".join(names), gated=gated, dtype="bf16", d=d)
        yield of("whole, many tokens", "silu", "", gated=gated, dtype="fp16", d=80, h=208, tokens=40000)
        for title, branch in BRANCHES.items():
            yield of(f"branch: {title}", "silu", " ".join(names), gated=gated, dtype="bf16", **branch)
    for order in ("gate_up", "up_gate"):
        yield of(f"packed {order}", "silu", "b_gate b_down", gated=True, dtype="bf16", packed=order)
        yield of(f"whole, packed {order}", "silu", "b_gate", gated=True, dtype="bf16", d=64, packed=order)
        yield of("wide", "gelu", "", gated=gated, dtype="bf16", d=8192, h=256)
        yield of("many tokens", "gelu", "", gated=gated, dtype="bf16", tokens=40000)
        yield of("no tokens", "gelu", "", gated=gated, dtype="bf16", tokens=0)


# ---- heads and norms ----


def heads(
    *, dtype: str = "bf16", width: int = 64, turned: int = 0, interleaved: bool = False, norm: bool = False,
    weight: str = "", offsets: bool = False, scale: str = "", batch: int = 2, table: str = "fp32",
) -> None:  # fmt: skip
    """prepare_heads, forward and backward; `weight` and `scale` name the dimensions that they have."""
    sizes = {"b": batch, "h": 4, "d": width}
    x = tensor(batch, 77, 4, width, dtype=DTYPES[dtype]).transpose(1, 2).detach().requires_grad_()
    given: dict[str, Any] = {"norm": norm, "interleaved": interleaved}
    if turned:
        given["cos"] = given["sin"] = tensor(200, turned // 2, dtype=DTYPES[table])
    if offsets:
        given["offsets"] = torch.zeros(batch, dtype=torch.int64, device="cuda")
    if weight:
        given["norm_weight"] = _learned(tensor(*(sizes[name] for name in weight)))
    if scale:
        given["head_scale"] = _learned(tensor(*(sizes[name] for name in scale)))
    y = fastattn.prepare_heads(x, **given)
    learned = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.grad(y.sum(), [x, *learned])


def heads_calls() -> Iterator[Call]:
    def of(title: str, **keywords: Any) -> Call:
        return Call(f"prepare_heads, {title}", lambda: heads(**keywords), keywords.get("batch") != 0)

    yield of("rotation", turned=64)
    yield of("part of a rotation, interleaved", turned=32, interleaved=True)
    yield of("rotation in half precision, with offsets", turned=64, table="bf16", offsets=True)
    yield of("norm", norm=True)
    yield of("norm and weight", norm=True, weight="d")
    yield of("norm and weights of each head", norm=True, weight="hd")
    yield of("scale", scale="h")
    yield of("scale of each batch entry", scale="bh")
    yield of("nothing in the batch", batch=0, turned=64, norm=True, weight="d")
    everything = {"turned": 32, "norm": True, "weight": "d", "offsets": True, "scale": "h"}
    for dtype, width in itertools.product(DTYPES, (40, 64, 111, 128, 256, 512)):
        yield of(f"all, {dtype} D={width}", dtype=dtype, width=width, **everything)


def norm(
    *, dtype: str = "bf16", width: int = 256, centred: bool = True, weight: bool = True, bias: bool = True,
    residual: bool = False, rows: int = 77, offset: float = 0.0,
) -> None:  # fmt: skip
    kind = DTYPES[dtype]
    x = tensor(2, rows, width, dtype=kind).requires_grad_()
    given: dict[str, Any] = {}
    if weight:
        given["weight"] = _learned(tensor(width, dtype=kind))
    if bias and centred:
        given["bias"] = _learned(tensor(width, dtype=kind))
    if residual:
        given["residual"] = _learned(tensor(2, rows, width, dtype=kind))
    if not centred:
        given["weight_offset"] = offset
    results = (fastattn.layer_norm if centred else fastattn.rms_norm)(x, **given)
    total = sum(t.sum() for t in results) if residual else results.sum()
    learned = [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.grad(total, [x, *learned])


def norm_calls() -> Iterator[Call]:
    def of(title: str, **keywords: Any) -> Call:
        return Call(f"norm, {title}", lambda: norm(**keywords), keywords.get("rows") != 0)

    for centred, *there in itertools.product((True, False), repeat=4):
        parts = dict(zip(("weight", "bias", "residual"), there, strict=True))
        if centred or not parts["bias"]:
            title = " ".join(name for name, is_there in parts.items() if is_there) or "nothing"
            yield of(f"{'layer' if centred else 'RMS'} norm with {title}", centred=centred, **parts)
    for dtype, width in itertools.product(DTYPES, (64, 111, 1024, 4096, 9000, 20000)):
        yield of(f"{dtype} W={width}", dtype=dtype, width=width)
    yield of("weight kept less one", centred=False, offset=1.0)
    yield of("no rows", rows=0)
    yield of("many rows", rows=70000, width=64)


# ---- everything else that is public ----


@dataclass
class _Module:
    """A module of ours by name, its arguments, and what it is called with."""

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: Callable[[], tuple] = field(default=lambda: (tensor(2, 50, 128, dtype=torch.bfloat16),))

    def made(self) -> torch.nn.Module:
        module = self.make()
        # Parameters one by one: Module.to keeps the class of a parameter's data, which is ours here.
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                on_gpu = parameter.detach().to(numbered(torch.device("cuda")), torch.bfloat16).requires_grad_()
                owner.register_parameter(name, torch.nn.Parameter(on_gpu))
        return module

    def run(self) -> None:
        out = self.made()(*self.inputs())
        (out[0] if isinstance(out, tuple) else out).float().sum().backward()


def cache(
    *, dtype: str = "bf16", width: int = 128, value_width: int | None = None, queries: int = 1,
    page: int | None = 16, capacity: int = 1024, shaped: bool = False, latent: int | None = None, batch: int = 2,
    stored: torch.dtype | None = None, by_page: bool = False,
) -> None:  # fmt: skip
    """attention_with_cache with new tokens; `latent`: values are so many columns of the keys; `stored`: the dtype
    of a quantised cache."""
    kind, heads = DTYPES[dtype], 1 if latent else 2
    pages, length = (batch, capacity) if page is None else (batch * (capacity // page), page)
    keys = tensor(pages, heads, length, width, dtype=kind)
    values = None if latent else tensor(pages, heads, length, value_width or width, dtype=kind)
    q = tensor(batch, queries, 8, width, dtype=kind).transpose(1, 2)
    new = [None if t is None else tensor(batch, queries, heads, t.shape[3], dtype=kind).transpose(1, 2)
           for t in (keys, values)]  # fmt: skip
    given: dict[str, Any] = {"k": new[0], "v": new[1], "value_width": latent}
    if stored is not None:
        keys, values = (None if t is None else t.to(stored) for t in (keys, values))
        scale = tensor(*keys.shape[: 2 if by_page else 3], dtype=torch.float32)
        given |= {"k_scale": scale, "v_scale": None if latent else scale}
    if page is not None:
        given["block_table"] = torch.zeros(batch, capacity // page, dtype=torch.int32, device="cuda")
    if shaped:
        given |= {"window": (100, None), "softcap": 5.0, "alibi_slopes": tensor(8), "sinks": tensor(8)}
        given |= {"cache_starts": torch.zeros(batch, dtype=torch.int32, device="cuda")}
        given |= {"tree_mask": tensor(queries, queries) == 0}
        # The kernel of rotations takes heads up to 256.
        given |= {} if latent else {"cos": tensor(2048, 16), "sin": tensor(2048, 16)}
    lengths = torch.zeros(batch, dtype=torch.int64, device="cuda")
    fastattn.attention_with_cache(q, keys, values, cache_lengths=lengths, return_lse=True, **given)


def invariant_calls() -> Iterator[Call]:
    def of(
        title: str,
        *,
        width: int = 128,
        dtype: str = "bf16",
        length: int = 300,
        by_head: Sequence[str] = (),
        **given: Any,
    ) -> Call:
        def call() -> None:
            q, k = (tensor(2, length, heads, width, dtype=DTYPES[dtype]).transpose(1, 2) for heads in (4, 2))
            beside = {name: tensor(4) for name in by_head}
            k.requires_grad_()
            out, lse = fastattn.attention(q, k, k, return_lse=True, invariant=True, **beside, **given)
            torch.autograd.grad((out, lse), k, (out, lse))

        return Call(f"invariant, {title}", call)

    def cached(queries: int) -> None:
        q = tensor(2, queries, 4, 128, dtype=torch.bfloat16).transpose(1, 2)
        pages = tensor(256, 2, 16, 128, dtype=torch.bfloat16)
        table = torch.zeros(2, 128, dtype=torch.int32, device="cuda")
        lengths = torch.zeros(2, dtype=torch.int32, device="cuda")
        fastattn.attention_with_cache(q, pages, pages, cache_lengths=lengths, block_table=table, invariant=True)

    for dtype, width in itertools.product(DTYPES, (64, 128, 256)):
        if (dtype, width) != ("fp32", 256):
            yield of(f"{dtype} D={width}", dtype=dtype, width=width, causal=True)
    ids = torch.arange(300) // 100
    yield of("packed", mask=masks.documents(ids) & masks.causal())
    yield of("all", width=80, by_head=("alibi_slopes", "sinks", "scale"), window=(100, 3), softcap=5.0)
    yield of("few queries", length=8, causal=True)
    for queries in (1, 100):
        yield Call(f"invariant, from a cache, {queries} queries", functools.partial(cached, queries))


QUANTISED: dict[str, dict[str, Any]] = {
    "cache": {},
    "cache, float16": {"dtype": "fp16"},
    "cache, float32": {"dtype": "fp32"},
    "cache, a scale a page, all": {"by_page": True, "shaped": True},
    "cache, latent": {"width": 576, "latent": 512},
    "cache, contiguous, a scale a row": {"page": None, "by_page": True, "width": 80},
}


def cache_calls() -> Iterator[Call]:
    def of(title: str, **keywords: Any) -> Call:
        return Call(f"attention_with_cache, {title}", lambda: cache(**keywords), keywords.get("batch") != 0)

    for dtype, width, queries in itertools.product(DTYPES, (64, 128, 256), (1, 100)):
        yield of(f"{dtype} D={width}, {queries} queries", dtype=dtype, width=width, queries=queries)
        yield of(
            f"{dtype} D={width}, {queries} queries, all", dtype=dtype, width=width, queries=queries, shaped=True
        )
    for queries in (1, 8):
        yield of(f"latent, {queries} queries", width=576, latent=512, queries=queries)
        yield of(f"latent, {queries} queries, all", width=576, latent=512, queries=queries, shaped=True)
    yield of("contiguous", page=None)
    yield of("contiguous, all", page=None, shaped=True, queries=3)
    for stored, (kind, dtype) in itertools.product((torch.int8, torch.float8_e4m3fn), QUANTISED.items()):
        title = f"{str(stored).removeprefix('torch.')} {kind}"
        yield of(title, stored=stored, **dtype)
        yield of(f"{title}, 100 queries", stored=stored, queries=100, **dtype)
    yield of("short", page=None, capacity=200)
    yield of("pages of 10, odd widths", page=10, capacity=1000, width=80, value_width=40)
    yield of("nothing in the batch", batch=0)


def other_calls() -> Iterator[Call]:
    half = torch.bfloat16
    q = lambda *shape: tensor(*shape, dtype=half)  # noqa: E731

    def varlen(**given: Any) -> None:
        starts = torch.tensor([0, 5, 40, 40, 77], dtype=torch.int32, device="cuda")
        t = q(77, 4, 64).requires_grad_()
        k = q(77, 2, 64).requires_grad_()
        torch.autograd.grad(fastattn.attention_varlen(t, k, k, starts, starts, **given).sum(), [t, k])

    def sdpa(**given: Any) -> None:
        t = q(2, 4, 50, 64).requires_grad_()
        fastattn.scaled_dot_product_attention(t, t, t, **given).sum().backward()

    def explicit_backward() -> None:
        sizes = Sizes()
        inputs = sizes.qkv()
        out, lse = fastattn.attention(*inputs, causal=True, return_lse=True)
        fastattn.attention_backward(out, *inputs, out, lse, causal=True)

    def second_derivative() -> None:
        t = Sizes(dtype="fp32").qkv()
        leaves = [x.detach().requires_grad_() for x in t]
        out = fastattn.attention(*leaves, causal=True)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def mapped() -> None:
        t = q(3, 2, 4, 50, 64)
        torch.func.vmap(lambda x: fastattn.attention(x, x, x, causal=True))(t)

    yield Call("attention_varlen", varlen)
    yield Call("attention_varlen, causal and window", lambda: varlen(causal=True, window=(10, None)))
    yield Call("attention_varlen, sinks and slopes", lambda: varlen(sinks=tensor(4), alibi_slopes=tensor(4)))
    yield Call("attention_varlen, dropout", lambda: varlen(dropout_p=0.1))
    yield Call("scaled_dot_product_attention", lambda: sdpa(is_causal=True))
    yield Call("scaled_dot_product_attention, mask", lambda: sdpa(attn_mask=q(1, 1, 50, 50) == 0))
    yield Call("scaled_dot_product_attention, bias", lambda: sdpa(attn_mask=q(50, 50)))
    yield Call("attention_backward", explicit_backward)
    yield Call("second derivative", second_derivative)
    yield Call("vmap", mapped)


def flash_calls() -> Iterator[Call]:
    """The functions of fastattn.flash_attn."""
    half = {"dtype": torch.bfloat16}
    starts = torch.tensor([0, 5, 40, 40, 77], dtype=torch.int32)

    def run(name: str, *shapes: tuple[int, ...], varlen: int = 0, **given: Any) -> None:
        from fastattn import flash_attn

        inputs = [tensor(*shape, **half).requires_grad_() for shape in shapes]
        lengths = [starts.to(numbered(torch.device("cuda")))] * varlen + [37] * varlen
        getattr(flash_attn, name)(*inputs, *lengths, **given).sum().backward()

    def cached(page: int, **given: Any) -> None:
        from fastattn import flash_attn

        cache = tensor(2 * 256 // page, page, 2, 64, **half)
        table = {"block_table": torch.zeros(2, 256 // page, dtype=torch.int32, device="cuda")}
        lengths = torch.zeros(2, dtype=torch.int32, device="cuda")
        new = tensor(2, 3, 2, 64, **half)
        flash_attn.flash_attn_with_kvcache(
            tensor(2, 3, 4, 64, **half), cache, cache.clone(), new, new, cache_seqlens=lengths, causal=True,
            **(table if page < 256 else {}), **given,
        )  # fmt: skip

    packed = (77, 4, 64)
    for name, shapes, varlen in (
        ("flash_attn_func", ((2, 50, 4, 64),) * 3, 0),
        ("flash_attn_qkvpacked_func", ((2, 50, 3, 4, 64),), 0),
        ("flash_attn_kvpacked_func", ((2, 50, 4, 64), (2, 50, 2, 2, 64)), 0),
        ("flash_attn_varlen_func", (packed,) * 3, 2),
        ("flash_attn_varlen_qkvpacked_func", ((77, 3, 4, 64),), 1),
        ("flash_attn_varlen_kvpacked_func", (packed, (77, 2, 2, 64)), 2),
    ):
        yield Call(name, functools.partial(run, name, *shapes, varlen=varlen, causal=True))
    yield Call(
        "flash_attn_func, window",
        functools.partial(run, "flash_attn_func", *((2, 50, 4, 64),) * 3, window_size=(10, 0), softcap=5.0),
    )
    yield Call("flash_attn_with_kvcache", functools.partial(cached, 256))
    yield Call("flash_attn_with_kvcache, pages", functools.partial(cached, 16, window_size=(10, 0)))


def more_cache_calls() -> Iterator[Call]:
    """Shared prefixes, and the objects of fastattn.kv_cache."""
    half = torch.bfloat16

    def prefix(shared: torch.dtype = half) -> None:
        q, cache = tensor(2, 4, 3, 64, dtype=half), tensor(2, 2, 128, 64, dtype=half)
        common = tensor(2, 300, 64).to(shared)
        scale = None if shared == half else tensor(2, 300)
        fastattn.attention_with_shared_prefix(
            q, common, common, cache, cache, cache_lengths=torch.zeros(2, dtype=torch.int32, device="cuda"),
            k_prefix_scale=scale, v_prefix_scale=scale,
        )  # fmt: skip

    def sequences(paged: bool, **given: Any) -> None:
        from fastattn.kv_cache import KVCache, PagedKVCache

        about = {"heads": 2, "width": 64, "dtype": half, "device": numbered(torch.device("cuda")), **given}
        cache = PagedKVCache(32, 16, **about) if paged else KVCache(4, 128, **about)
        rows = cache.add(2)
        q, new = tensor(2, 4, 3, 64, dtype=half), tensor(2, 2, 3, 64, dtype=half)
        cache.extend(rows, 3)
        cache.attention(q, rows, k=new, v=new)
        cache.append(rows, new, new)
        cache.attention(q, [*rows, *cache.fork(rows[0])][:2])

    yield Call("attention_with_shared_prefix", prefix)
    yield Call("attention_with_shared_prefix, int8", functools.partial(prefix, torch.int8))
    for name, paged in (("KVCache", False), ("PagedKVCache", True)):
        yield Call(name, functools.partial(sequences, paged))


def module_calls() -> Iterator[Call]:
    nn, half = fastattn.nn, torch.bfloat16
    x = lambda: tensor(2, 50, 128, dtype=half)  # noqa: E731
    tokens = lambda: torch.zeros(2, 50, dtype=torch.int64, device="cuda")  # noqa: E731
    config = {"vocab_size": 100, "embed_dim": 128, "num_heads": 4, "num_layers": 1, "max_length": 64}
    torch_layer = (128, 4, 256, 0.1)
    for module in (
        _Module("nn.SelfAttention", lambda: nn.SelfAttention(128, 4, causal=True)),
        _Module("nn.CrossAttention", lambda: nn.CrossAttention(128, 4), lambda: (x(), x())),
        _Module("nn.MLP", lambda: nn.MLP(128, 256)),
        _Module("nn.GatedMLP", lambda: nn.GatedMLP(128, 256)),
        _Module("nn.RMSNorm", lambda: nn.RMSNorm(128)),
        _Module("nn.LayerNorm", lambda: nn.LayerNorm(128)),
        _Module(
            "nn.LinearCrossEntropyLoss",
            lambda: nn.LinearCrossEntropyLoss(128, 300),
            lambda: (x().view(100, 128), tokens().view(100)),
        ),
        _Module(
            "nn.MultiheadAttention", lambda: nn.MultiheadAttention(128, 4, batch_first=True), lambda: (x(),) * 3
        ),
        _Module("nn.TransformerBlock", lambda: nn.TransformerBlock(nn.SelfAttention(128, 4), nn.MLP(128, 256))),
        _Module(
            "nn.TransformerEncoder",
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(*torch_layer, batch_first=True), 1),
        ),
        _Module(
            "nn.TransformerDecoder",
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(*torch_layer, batch_first=True), 1),
            lambda: (x(), x()),
        ),
        _Module(
            "nn.Transformer",
            lambda: nn.Transformer(128, 4, 1, 1, 256, batch_first=True),
            lambda: (x(), x()),
        ),
        _Module("nn.TransformerModel", lambda: nn.TransformerModel(**config), lambda: (tokens(),)),
    ):
        yield Call(module.name, module.run)

    def generate() -> None:
        model = _Module("", lambda: nn.TransformerModel(**config)).made()
        model.generate(tokens()[:, :9], 3)

    yield Call("nn.TransformerModel.generate", generate)


def lens_calls() -> Iterator[Call]:
    """Functions of fastattn.lens beside attention_statistics; those of whole models are made of these."""

    def of(title: str, function: Callable[..., object]) -> Call:
        def call() -> None:
            sizes = Sizes(queries=203)
            q, k, _ = sizes.qkv()
            function(q, k, tensor(sizes.batch, sizes.heads, sizes.queries))

        return Call(f"lens.{title}", call)

    labels = lambda: torch.zeros(2, 203, dtype=torch.int64, device="cuda")  # noqa: E731
    yield of("match_mass", lambda q, k, lse: lens.match_mass(q, k, lse, labels(), causal=True))
    yield of("head_scores", lambda q, k, lse: lens.head_scores(q, k, lse, labels()))

    def of_a_model(function: Callable[..., object]) -> None:
        config = {"vocab_size": 100, "embed_dim": 128, "num_heads": 4, "num_layers": 1, "max_length": 64}
        function(_Module("", lambda: fastattn.nn.TransformerModel(**config)).made(), labels()[:, :50])

    def watch(model: torch.nn.Module, tokens: Tensor) -> None:
        with lens.watch(model, ("blocks.*.attention.entropy", "blocks.*.attention.received")), torch.no_grad():
            model(tokens)

    for name, function in (("model_head_scores", lens.model_head_scores), ("watch", watch)):
        yield Call(f"lens.{name}", functools.partial(of_a_model, function))


def all_calls() -> list[Call]:
    return [
        *attention_calls(),
        *statistics_calls(),
        *mlp_calls(),
        *loss_calls(),
        *heads_calls(),
        *norm_calls(),
        *cache_calls(),
        *invariant_calls(),
        *other_calls(),
        *absorbed_calls(),
        *flash_calls(),
        *more_cache_calls(),
        *module_calls(),
        *lens_calls(),
    ]
