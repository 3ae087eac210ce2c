"""What is timed beside plain attention and MLPs: masks, scores, packed sequences, norms, heads, losses; small
calls.

A rival is another implementation: it takes the tensors of the call (see kinds) and returns what our call returns
first. Its output is compared with the definition before it is timed. A yardstick computes something else:
statistics are timed beside one forward of attention.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import cache_rivals
from benchmarks.gpu.cache_rivals import imported
from fastattn.measuring import kinds, measure
from fastattn.measuring.kinds import Sizes
from fastattn.measuring.measure import one_line
from fastattn.measuring.peers import BACKWARD, FORWARD, TRAINING, Unavailable

OURS = "fastattn triton"
Rival = Callable[..., Tensor]
Notify = Callable[[str], None]
ONE_FORWARD = "one forward"
YARDSTICKS = (ONE_FORWARD,)


# ---- other implementations ----


def rivals(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], Rival]]:
    """By name, functions that build a rival. They raise Unavailable where a library or a feature is missing."""
    if sizes.family in ("attention", "masks", "scores", "invariant"):
        return _attention_rivals(sizes, device)
    if sizes.family == "varlen":
        return {
            "torch varlen_attn": lambda: _torch_varlen(sizes, device),
            "flash-attn 4": lambda: _flash_attention_4_varlen(sizes, device),
            "eager": lambda: _eager_varlen(sizes),
        }
    if sizes.family == "statistics":
        return {
            ONE_FORWARD: lambda: _one_forward(sizes, device),
            "eager": lambda: _eager_entropy(sizes, device),
        }
    if sizes.family == "loss":
        return _loss_rivals(sizes, device)
    if sizes.family == "cache":
        return cache_rivals.rivals(sizes, device)
    eager = {"norm": _eager_norm, "heads": _eager_heads, "mlp": _eager_mlp}[sizes.family]
    found = {
        "eager": lambda: eager(sizes, device),
        "compiled eager": lambda: torch.compile(eager(sizes, device), dynamic=False),
    }
    if "whole" in sizes.kind.split():
        call = kinds.build(sizes, device)
        found |= {kinds.HIDDEN_STORED: lambda: functools.partial(_first, call, kinds.HIDDEN_STORED)}
    return found


def _attention_rivals(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], Rival]]:
    found: dict[str, Callable[[], Rival]] = {}
    for name, backend in (("flash", "FLASH_ATTENTION"), ("cuDNN", "CUDNN_ATTENTION"),
                          ("memory-efficient", "EFFICIENT_ATTENTION")):  # fmt: skip
        found[f"SDPA {name}"] = functools.partial(_sdpa, sizes, device, backend)
    found["flex_attention"] = lambda: _flex(sizes, device)
    found["flash-attn 4"] = lambda: _flash_attention_4(sizes)
    found["eager"] = lambda: _eager_attention(sizes, device)
    return found


def _dense_mask(sizes: Sizes, device: torch.device, options: dict[str, Any]) -> Tensor | None:
    """The mask as SDPA takes it; None where `is_causal` or no mask at all is enough."""
    if "key_lengths" in options:
        return torch.arange(sizes.length, device=device) < options["key_lengths"][:, None, None, None]
    if "window" in options:
        i, j = torch.arange(sizes.length, device=device)[:, None], torch.arange(sizes.length, device=device)
        return (j <= i) & (i - j <= options["window"][0])
    if "mask" in options:
        return options["mask"].dense(sizes.batch, sizes.heads, sizes.length, sizes.length, device)
    bias = options.get("bias")
    return bias if bias is not None and bias.dtype == torch.bool else None


def _sdpa(sizes: Sizes, device: torch.device, backend: str) -> Rival:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if set(kinds.options(sizes, device)) & {"softcap", "alibi_slopes", "sinks", "relative_bias", "scale"}:
        raise Unavailable("has no such argument")
    torch.manual_seed(0)
    options = kinds.options(sizes, device)
    mask = _dense_mask(sizes, device, options)
    causal = bool(options.get("causal")) and mask is None
    chosen = getattr(SDPBackend, backend)

    def call(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        seen = bias[0].expand(sizes.batch, sizes.heads, sizes.length, -1) if bias else mask
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=causal, dropout_p=options.get("dropout_p", 0.0), enable_gqa=True
            )

    return call


def _flex(sizes: Sizes, device: torch.device) -> Rival:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    options = kinds.options(sizes, device)
    if "dropout_p" in options:
        raise Unavailable("has no dropout")
    for name, argument in (("sinks", "sinks"), ("scale of each head", "scale")):
        if argument in options:
            raise Unavailable(f"has no {name}")
    torch.manual_seed(0)
    options = kinds.options(sizes, device)
    dense, slopes, length = _dense_mask(sizes, device, options), options.get("alibi_slopes"), sizes.length
    block_mask = None
    if dense is not None:
        seen = dense.expand(sizes.batch, sizes.heads, length, length)
        shape = (sizes.batch if seen.stride(0) else None, sizes.heads if seen.stride(1) else None)
        block_mask = create_block_mask(lambda b, h, i, j: seen[b, h, i, j], *shape, length, length, device=device)
    elif options.get("causal"):
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)

    def call(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if "softcap" in options:
                s = options["softcap"] * torch.tanh(s / options["softcap"])
            if slopes is not None:
                s = s - slopes[h] * (i - j)
            if learned and sizes.kind == "bias":
                s = s + learned[0][0, h, i, j]
            if learned and sizes.kind == "padding bias":
                s = s + learned[0][b, 0, 0, j]
            if learned and sizes.kind == "relative bias":
                s = s + learned[0][h, (j - i).clamp(-128, 128) + 128]
            return s

        return flex_attention(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=True)

    return torch.compile(call, dynamic=False)


def _flash_attention_4(sizes: Sizes) -> Rival:
    flash = imported("flash_attn.cute", "flash_attn_func")
    asked: dict[str, Any] = {
        "full": {}, "causal": {"causal": True}, "softcap": {"causal": True, "softcap": 30.0},
        "window": {"window_size": (sizes.length // 8, 0)},
    }.get(sizes.kind)  # fmt: skip
    if asked is None:
        raise Unavailable("not compared for this kind")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash(*(t.transpose(1, 2) for t in (q, k, v)), **asked)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return call


def _eager_attention(sizes: Sizes, device: torch.device) -> Rival:
    """What one writes without a library; every intermediate result is stored."""
    torch.manual_seed(0)
    options = kinds.options(sizes, device)
    mask = _dense_mask(sizes, device, options)
    if mask is None and options.get("causal"):
        mask = torch.ones(sizes.length, sizes.length, dtype=torch.bool, device=device).tril()
    distance = torch.arange(sizes.length, device=device) - torch.arange(sizes.length, device=device)[:, None]
    if sizes.kind == "everything":
        raise Unavailable("nobody writes this by hand")

    def call(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(sizes.heads // sizes.key_heads, 1) for t in (k, v))
        scale = options["scale"][:, None, None] if "scale" in options else sizes.width**-0.5
        scores = (q @ k.mT * scale).to(q.dtype)
        if "softcap" in options:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        if "alibi_slopes" in options:
            scores = scores + (options["alibi_slopes"][:, None, None] * distance).to(q.dtype)
        if learned and sizes.kind in ("bias", "padding bias"):
            scores = scores + learned[0]
        if learned and sizes.kind == "relative bias":
            scores = scores + learned[0][:, distance.clamp(-128, 128) + 128].to(q.dtype)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if learned and sizes.kind == "sinks":
            sink = learned[0].to(q.dtype)[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink), -1)
        weights = torch.softmax(scores, -1)[..., : sizes.length]
        return F.dropout(weights, options.get("dropout_p", 0.0)) @ v

    return call


def _one_forward(sizes: Sizes, device: torch.device) -> Rival:
    """Attention itself, of the same scores."""
    attention = kinds.attention_call(_attention_of(sizes), device)
    return functools.partial(_first, attention, "triton")


def _eager_entropy(sizes: Sizes, device: torch.device) -> Rival:
    """The whole pattern first; then what each query's entropy and each key's weight are."""
    if sizes.kind != "causal: entropy received":
        raise Unavailable("not compared for this kind")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.repeat_interleave(sizes.heads // sizes.key_heads, 1).mT).float() * sizes.width**-0.5
        seen = torch.ones(sizes.length, sizes.length, dtype=torch.bool, device=device).tril()
        logs = torch.log_softmax(scores.masked_fill(~seen, float("-inf")), -1)
        weights = logs.exp()
        entropy = -(weights * logs.masked_fill(~seen, 0.0)).sum(-1)
        weights.sum(2)
        return entropy

    return call


def _attention_of(sizes: Sizes) -> Sizes:
    """The attention whose statistics are asked for."""
    return dataclasses.replace(sizes, family="attention", kind=sizes.kind.partition(": ")[0])


def _torch_varlen(sizes: Sizes, device: torch.device) -> Rival:
    varlen = imported("torch.nn.attention.varlen", "varlen_attn")
    starts = kinds.starts_of(sizes).to(device)
    longest = int(starts.diff().max())
    causal = sizes.kind == "causal"
    group = sizes.heads // sizes.key_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
        asked = {"window_size": (-1, 0)} if causal else {}
        return varlen(q, k, v, starts, starts, longest, longest, **asked)

    return call


def _flash_attention_4_varlen(sizes: Sizes, device: torch.device) -> Rival:
    flash = imported("flash_attn.cute", "flash_attn_varlen_func")
    starts = kinds.starts_of(sizes).to(device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=sizes.kind == "causal")
        return result[0] if isinstance(result, tuple) else result

    return call


def _eager_varlen(sizes: Sizes) -> Rival:
    """A loop over the sequences, each with SDPA's default."""
    starts = kinds.starts_of(sizes).tolist()

    def call(*tensors: Tensor) -> Tensor:
        parts = []
        for begin, end in itertools.pairwise(starts):
            q, k, v = (t[begin:end].transpose(0, 1)[None] for t in tensors)
            causal = sizes.kind == "causal"
            part = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True) if end > begin else q
            parts.append(part[0].transpose(0, 1))
        return torch.cat(parts)

    return call


def _eager_norm(sizes: Sizes, device: torch.device) -> Rival:
    form = sizes.kind.split()[0]

    def call(x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        others_left = list(others)
        bias = others_left.pop(0) if form == "layer" else None
        total = x + others_left[0] if others_left else x
        if form == "layer":
            return F.layer_norm(total, total.shape[-1:], weight, bias, 1e-6)
        return F.rms_norm(total, total.shape[-1:], weight, 1e-6)

    return call


def _eager_mlp(sizes: Sizes, device: torch.device) -> Rival:
    activation, *steps = sizes.kind.split()
    act: Callable[[Tensor], Tensor] = {"gelu": F.gelu, "silu": F.silu}[activation]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        left, normalised = list(weights), x
        firsts = [left.pop(0) for _ in range(1 + ("gated" in steps))]
        down = left.pop(0)
        if "layer" in steps:
            normalised = F.layer_norm(x, x.shape[-1:], *left, 1e-6)
        elif "rms" in steps:
            normalised = F.rms_norm(x, x.shape[-1:], *left, 1e-6)
        hidden, *up = (F.linear(normalised, w) for w in firsts)
        y = F.linear(act(hidden) * up[0] if up else act(hidden), down)
        y = F.dropout(y, 0.1) if "dropout" in steps else y
        return x + y if "residual" in steps else y

    return call


def _eager_heads(sizes: Sizes, device: torch.device) -> Rival:
    """As models write it: norm, then x cos + rotate_half(x) sin."""
    steps = sizes.kind.split()
    cos, sin = (torch.cat((t, t), -1).to(getattr(torch, sizes.dtype)) for t in kinds.angles_of(sizes, device))

    def call(x: Tensor, *others: Tensor) -> Tensor:
        left = list(others)
        y = F.rms_norm(x, x.shape[-1:], left.pop(0).to(x.dtype), 1e-6) if "norm" in steps else x
        if "rotary" in steps:
            first, second = y.chunk(2, -1)
            y = y * cos + torch.cat((-second, first), -1) * sin
        return y * left[0].to(y.dtype)[:, None, None] if left else y

    return call


def _loss_rivals(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], Rival]]:
    """Of the mean over classes."""
    target = kinds.classes_of(sizes, device)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((x @ w.t()).float(), target)

    def torch_chunked() -> Rival:
        options = imported("torch.nn", "LinearCrossEntropyOptions")(allow_retain_graph=True)
        function = imported("torch.nn.functional", "linear_cross_entropy")
        return lambda x, w: function(x, w, target, options=options)

    def liger() -> Rival:
        function = imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        return lambda x, w: function(x, w, target)

    def quack() -> Rival:
        function = imported("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
        return lambda x, w: function(x, w, target, ignore_index=-100)

    def cut_cross_entropy() -> Rival:
        function = imported("cut_cross_entropy", "linear_cross_entropy")
        return lambda x, w: function(x, w, target)

    return {
        "eager": lambda: eager,
        "compiled eager": lambda: torch.compile(eager, dynamic=False),
        "torch chunked": torch_chunked,
        "Liger": liger,
        "quack": quack,
        "Cut Cross-Entropy": cut_cross_entropy,
    }


# ---- timing ----


def compare(case: dict[str, Any], device: torch.device, notify: Notify) -> list[dict[str, Any]]:
    """A row for each peer at one call in one direction: its time, or a note why there is none."""
    sizes = Sizes(**case["sizes"])
    torch.compiler.reset()
    call = kinds.build(sizes, device)
    ours = functools.partial(_first, call, "triton")
    builders: dict[str, Callable[[], Rival]] = {OURS: lambda: ours, **rivals(sizes, device)}
    with torch.no_grad():
        notify("definition")
        expected = _first(call, "reference", *call.tensors).float()
    thunks: dict[str, Callable[[], Any]] = {}
    rows = {}
    for peer in case["peers"]:
        notify(peer)
        rows[peer] = _row(case, sizes, peer)
        try:
            rival = builders[peer]()  # once: it may compile
            thunk = direct(rival, call.tensors, case["direction"])
            if peer not in YARDSTICKS:
                with torch.no_grad():
                    error = relative_error(rival(*call.tensors).float(), expected, sizes, peer)
                rows[peer]["error"] = error
                if not error < measure.WRONG:
                    raise ArithmeticError(f"wrong: relative error {error:.2g}")
            thunk()
            thunks[peer] = thunk
        except Exception as problem:
            rows[peer] |= {"note": one_line(problem), "failed": peer == OURS}
            problem.__traceback__ = None
    del expected
    clock = wall_clock if case["kind"] == "small call" else device_clock
    for peer, timing in clock(thunks, device, case, notify).items():
        rows[peer] |= {"seconds": timing.median, "spread": timing.spread, "rounds": list(timing.rounds)}
    _add_ratios(list(rows.values()))
    return list(rows.values())


def relative_error(found: Tensor, expected: Tensor, sizes: Sizes, peer: str) -> float:
    """Distance from the definition. Other libraries drop other weights than ours, so with dropout only norms are
    compared."""
    if "dropout" in sizes.kind.split() and peer != OURS:
        return float((found.norm() - expected.norm()).abs() / expected.norm())
    return float((found - expected).norm() / expected.norm())


def _first(call: kinds.Call, backend: str, *tensors: Tensor) -> Tensor:
    result = call.function(backend, *tensors)
    return result[0] if isinstance(result, tuple) else result


def direct(function: Rival, tensors: tuple[Tensor, ...], direction: str) -> Callable[[], Any]:
    """The call to time in this direction, as fastattn.measuring.measure makes it."""
    if direction == FORWARD:
        return torch.no_grad()(functools.partial(function, *tensors))
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    upstream = torch.randn_like(output)
    if direction == BACKWARD:
        return lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def device_clock(
    thunks: dict[str, Callable[[], Any]], device: torch.device, case: dict[str, Any], notify: Notify
) -> dict[str, measure.Timing]:
    return measure.measure(thunks, device, rounds=case["rounds"], seconds=case["seconds"], notify=notify)


def wall_clock(
    thunks: dict[str, Callable[[], Any]], device: torch.device, case: dict[str, Any], notify: Notify
) -> dict[str, measure.Timing]:
    """Seconds for a call, by the wall clock over many calls: small calls take longer on the CPU than on the
    GPU."""
    taken: dict[str, list[float]] = {peer: [] for peer in thunks}
    for number in range(case["rounds"]):
        for peer in thunks if number % 2 == 0 else reversed(list(thunks)):
            notify(peer)
            measure.synchronize(device)
            start = time.perf_counter()
            for _ in range(case["calls"]):
                thunks[peer]()
            measure.synchronize(device)
            taken[peer].append((time.perf_counter() - start) / case["calls"])
    return {peer: measure.Timing(tuple(rounds)) for peer, rounds in taken.items()}


def _row(case: dict[str, Any], sizes: Sizes, peer: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("seconds", "spread", "error", "ratio"))
    needed = {"bytes_needed": cache_rivals.bytes_needed(sizes)} if sizes.family == "cache" else {}
    return {
        **needed,
        "problem": {"family": sizes.family, **sizes.as_json()},
        "label": case["label"],
        "direction": case["direction"],
        "peer": peer,
        **nothing,
        "rounds": [],
        "note": "",
    }


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    times = [row["seconds"] for row in rows if row["seconds"] and row["peer"] != OURS]
    for row in rows:
        row["ratio"] = min(times) / row["seconds"] if times and row["seconds"] else None


# ---- the cases ----


# Rows and keys of a cache, of which the time of one token is taken; the most telling first.
TOKEN_SIZES = (
    (1, 8192), (8, 8192), (64, 8192), (1, 32768), (64, 1024), (1, 1024), (8, 32768), (8, 1024), (64, 32768),
)  # fmt: skip


def cases(timing: dict[str, Any], absent: list[str]) -> list[dict[str, Any]]:
    """Every kind once at sizes common in training and inference, one of each family in turn, so that a short run
    has some of each."""
    groups = [norms(), losses(), tokens(), heads(), *attentions(), *mlps()]
    in_turn = [one for row in itertools.zip_longest(*groups) for one in row if one is not None]
    found = []
    for sizes in in_turn:
        gradient = TRAINING if sizes.family in ("norm", "heads", "loss", "mlp") else BACKWARD
        directions = (FORWARD, gradient) if sizes.has_gradient else (FORWARD,)
        found += [case_of(sizes, d, "feature", absent, **timing) for d in directions]
    return found


def attentions() -> list[list[Sizes]]:
    many = {"batch": 2, "heads": 16, "key_heads": 4, "length": 4096, "width": 128}
    return [
        [Sizes("masks", kind, **many) for kind in kinds.MASK_KINDS if kind != "random lists"],
        [Sizes("scores", kind, **many) for kind in kinds.SCORE_KINDS if kind != "everything"],
        [Sizes("varlen", kind, **{**many, "batch": 1, "length": 16384}) for kind in ("causal", "full")],
        [Sizes("statistics", kind, **many) for kind in ("causal: entropy received", "causal", "bigbird")],
        [Sizes("invariant", "causal", **many)],
    ]


def mlps() -> list[list[Sizes]]:
    whole = (("gelu whole", 128, 512), ("gelu whole", 64, 256), ("silu gated whole", 128, 336))
    branches = (
        ("gelu layer residual dropout", 4096),
        ("silu gated rms residual", 2816),
        ("gelu int8", 4096),
        ("gelu nothing", 4096),
        ("silu gated int8", 2816),
        ("silu gated nothing", 2816),
    )
    return [
        [Sizes("mlp", k, batch=1, length=8192, width=1024, hidden=hidden) for k, hidden in branches],
        [Sizes("mlp", k, batch=1, length=65536, width=width, hidden=hidden) for k, width, hidden in whole],
    ]


def norms() -> list[Sizes]:
    kinds_ = ("rms residual", "layer")
    return [Sizes("norm", kind, length=8192, width=width) for width in (4096, 1024) for kind in kinds_]


def heads() -> list[Sizes]:
    return [Sizes("heads", kind, length=4096, heads=32, width=128) for kind in ("norm rotary", "rotary")]


def losses() -> list[Sizes]:
    return [
        Sizes("loss", kind, batch=1, length=length, width=width, hidden=classes)
        for kind, length, width, classes in (
            ("classes mean", 4096, 4096, 128256),
            ("classes filter mean", 4096, 4096, 128256),
            ("classes mean", 8192, 1024, 32768),
        )
    ]


def tokens() -> list[Sizes]:
    """One token for each row of a cache; quantised ones at a few sizes."""
    plain, quantised = ("pages", "contiguous"), ("int8 pages", "fp8 pages")
    asked = [*itertools.product(TOKEN_SIZES, plain), *itertools.product(TOKEN_SIZES[:3], quantised)]
    return [
        Sizes("cache", kind, batch=batch, heads=32, key_heads=8, length=1, keys=keys, width=128)
        for (batch, keys), kind in asked
    ]


def small_calls(timing: dict[str, Any], absent: list[str]) -> list[dict[str, Any]]:
    """Calls so short that most of their time is Python and the launch."""
    small = {"batch": 1, "heads": 8, "key_heads": 8, "length": 128, "width": 64}
    found = []
    for sizes in (
        Sizes("attention", "causal", **small),
        Sizes("masks", "key lengths", **small),
        Sizes("scores", "bias", **small),
        Sizes("norm", "rms", batch=1, length=128, width=1024),
        Sizes("heads", "rotary", **small),
        Sizes("cache", "pages", **{**small, "key_heads": 2, "length": 1, "keys": 1024}),
    ):
        directions = (FORWARD, TRAINING) if sizes.has_gradient else (FORWARD,)
        found += [case_of(sizes, d, "small call", absent, **timing) for d in directions]
    return found


def case_of(sizes: Sizes, direction: str, kind: str, absent: list[str], **timing: Any) -> dict[str, Any]:
    peers = [OURS, *(peer for peer in rivals(sizes, torch.device("cpu")) if peer not in absent)]
    if kind == "small call":
        peers = [peer for peer in peers if peer not in ("flex_attention", "compiled eager")]
    return {
        "kind": kind, "family": sizes.family, "label": f"{sizes.family}: {sizes.label}", "direction": direction,
        "sizes": sizes.as_json(), "peers": peers, **timing,
    }  # fmt: skip
