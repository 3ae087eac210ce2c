"""What `fastattn prove` proves: for each kind of call, dtype and width, what is checked and what is timed.

A case proves one kind (see fastattn.core.capabilities.question) in one dtype at one width, in a few directions.
Its checks are compared with float64; they reach each tile that such calls take, odd sizes included. One call of
each size is timed. Cases are plain data, because they travel to other processes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastattn.core.capabilities import (
    ALONE,
    BACKWARD,
    CLASSES,
    FORWARD,
    TANGENT,
    TOGETHER,
    WHOLE_WIDTHS,
    WIDTHS,
)
from fastattn.core.proofs import Key
from fastattn.ground.checks import ACTIVATIONS
from fastattn.measuring.kinds import CACHE_KINDS, LATENT_KINDS, LSE, QUANTISED_KINDS, Sizes

# What is asked of us by name; each runs in a process of its own.
FAMILIES = ("attention", "masks", "scores", "forward mode", "cache", "mlp", "norm", "heads", "loss", "statistics")
DTYPES = ("bfloat16", "float16", "float32")
# Kinds of proofs, and the calls of fastattn.measuring.kinds that are of it; the first one is timed.
MASKS = {
    "key lengths": ("key lengths",),
    "boolean mask": ("boolean mask",),
    "window": ("window",),
    "documents": ("documents",),
    "lists": ("bigbird", "random lists"),
}
SCORES = {
    "bias": ("bias", "padding bias"),
    "dropout": ("dropout", "dropout of a part"),
    "alibi": ("alibi",),
    "relative bias": ("relative bias",),
    "softcap": ("softcap",),
    "sinks": ("sinks",),
    "head scale": ("head scale",),
    TOGETHER: ("everything",),
}
TANGENTS: dict[str, tuple[str, ...]] = {
    "causal": ("causal",),
    "full": ("full",),
    "bias": ("bias",),
    "sinks": ("sinks",),
    "lists": ("bigbird",),
}
STATISTICS = ("causal", "full", "window", "documents", "bigbird", "key lengths", "softcap", "sinks", "bias")
# A width of each class of heads that is no power of two.
ODD = {64: 40, 128: 80, 256: 192, 512: 320}
# Classes that kernels reach; where they do not, dispatch knows that without a proof.
HEAD_WIDTHS = (128, 64, 256, 512)
CACHE_WIDTHS = HEAD_WIDTHS[:3]
SINGLE_TANGENT = 128  # the widest heads with a tangent in float32

FEW = 3  # checks of a case in the interpreter

HALF = DTYPES[:2]
# What most programs call, in half precision: by family, kinds and widths.
COMMON: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "attention": (("causal", "full"), (128, 64)),
    "masks": (("key lengths",), (128, 64)),
    "cache": (("cache",), (128, 64)),
    "mlp": (("gelu_tanh", "gelu", "gated"), (1024, 2048, 4096)),
    "norm": (("rms", "layer"), (1024, 4096)),
    "heads": (("rotary",), (128, 64)),
    "loss": (("classes",), (1024, 2048, 4096)),
}

Case = dict[str, Any]


def case(
    family: str,
    proves: str,
    checks: list[Sizes],
    timed: dict[str, Sizes],
    directions: tuple[str, ...],
    width: int,
    tiled: bool = False,
) -> Case:
    """One case: `width` is the class, the dtype that of the checks. `tiled`: other tilings than the launch tables'
    are tried, and the fastest serve."""
    record = "attention" if family in ("masks", "scores", "forward mode") else family
    dtype = checks[0].dtype
    return {
        "family": family, "proves": proves, "record": record, "dtype": dtype, "width": width,
        "directions": list(directions), "checks": [sizes.as_json() for sizes in checks],
        "timed": {size: sizes.as_json() for size, sizes in timed.items()},
        "label": f"{family}: {proves} {dtype} {width}", "tiled": tiled,
    }  # fmt: skip


def keys(case: Case) -> list[Key]:
    """The rows of the record that a case gives, in the order of its directions."""
    about = case["proves"], case["dtype"], case["width"]
    return [Key(case["record"], d, *about, size) for d in case["directions"] for size in case["timed"]]


def cases(families: tuple[str, ...] = FAMILIES) -> list[Case]:
    """For a GPU, in the order in which they are proven: see `in_order`."""
    made = {
        "attention": plain, "masks": masks, "scores": scores, "forward mode": tangents, "mlp": mlps, "norm": norms,
        "heads": heads, "cache": caches, "loss": losses, "statistics": statistics,
    }  # fmt: skip
    return in_order(one for family in families for one in made[family]())


def in_order(found: Iterable[Case]) -> list[Case]:
    """What most programs call comes first, then the rest; in both, one of each kind before the second of any."""
    met: Counter[tuple[bool, str, str]] = Counter()

    def rank(one: Case) -> tuple[bool, int]:
        kind = is_common(one), one["family"], one["proves"]
        met[kind] += 1
        return not is_common(one), met[kind]

    return sorted(found, key=rank)


def is_common(one: Case) -> bool:
    """Whether most programs call this kind, in this dtype at this width."""
    kinds, widths = COMMON.get(one["family"], ((), ()))
    return one["proves"] in kinds and one["dtype"] in HALF and one["width"] in widths


def small_cases(families: tuple[str, ...] = FAMILIES) -> list[Case]:
    """For Triton's interpreter: every kind once, in float32, with the smallest calls that reach every loop. No
    other tilings are tried."""
    found: dict[tuple[str, str], Case] = {}
    for one in cases(families):
        if (one["family"], one["proves"]) not in found:
            found[one["family"], one["proves"]] = _shrunk(one)
    return list(found.values())


def _shrunk(one: Case) -> Case:
    length, is_absorbed = {"norm": 9, "heads": 20}.get(one["family"], 40), one["proves"] == "absorbed"

    def small(sizes: dict[str, Any]) -> Sizes:
        lengths: dict[str, Any] = {
            "length": min(length, sizes["length"]),
            "keys": 56 if sizes["keys"] else None,
            # What is proven of keys wider than a tile needs such keys.
            "width": sizes["width"] if is_absorbed else 16,
            "value_width": 16 if is_absorbed else None,
        }
        return dataclasses.replace(
            Sizes(**sizes), dtype="float32", batch=1, heads=2, key_heads=1, hidden=24, **lengths
        )

    timed = {CLASSES[0]: small(one["timed"][CLASSES[0]])}
    first, *others = one["checks"]
    checks = [small(first), *(small(s) for s in others if s["kind"] != one["proves"])][:FEW]
    width = WHOLE_WIDTHS[0] if one["proves"] in ALONE else WIDTHS[one["record"]][-1 if is_absorbed else 0]
    return case(one["family"], one["proves"], checks, timed, tuple(one["directions"]), width)


# ---- attention ----

BOTH = (FORWARD, BACKWARD)
# What is trained most: there other tilings are tried.
TILED_DTYPES, TILED_WIDTHS = ("bfloat16",), (128, 64)
CHECKED: dict[str, Any] = {"batch": 1, "heads": 4, "key_heads": 2, "length": 2047}


def _timed_attention(family: str, kind: str, dtype: str, width: int) -> dict[str, Sizes]:
    heads = max(2, 2048 // width)
    lengths = dict(zip(CLASSES, ((2, 256), (1, 2048), (1, 8192)), strict=True))
    return {
        size: Sizes(family, kind, dtype, batch, heads, heads, length, width=width)
        for size, (batch, length) in lengths.items()
    }


def plain() -> list[Case]:
    found = []
    for dtype in DTYPES:
        for width in HEAD_WIDTHS:
            for kind in ("causal", "full"):
                about: dict[str, Any] = {"family": "attention", "kind": kind, "dtype": dtype}
                checks = [
                    Sizes(**about, **CHECKED, width=width),
                    Sizes(**about, length=113, keys=203, width=ODD[width]),
                    Sizes(**about, length=1, keys=777, width=width),
                ]
                if width == 256:
                    checks.append(Sizes(**about, length=257, width=192, value_width=128))
                timed = _timed_attention("attention", kind, dtype, width)
                tiled = dtype in TILED_DTYPES and width in TILED_WIDTHS
                found.append(case("attention", kind, checks, timed, BOTH, width, tiled))
            found.append(lse_gradient(dtype, width))
    return found + [absorbed(dtype) for dtype in DTYPES]


def lse_gradient(dtype: str, width: int) -> Case:
    """A backward in which the log-sum-exp has a gradient, too. PyTorch's kernels have none: they run twice."""
    kinds = [f"{kind}{LSE}" for kind in ("causal", "full")]
    checks = [Sizes("attention", kind, dtype, length=333, width=width) for kind in kinds]
    timed = _timed_attention("attention", kinds[0], dtype, width)
    return case("attention", "lse gradient", checks, timed, (BACKWARD,), width)


LATENT_WIDTHS = {"width": 576, "value_width": 512}  # of keys and values, in models; their class is that of 512


def absorbed(dtype: str) -> Case:
    """The prefill of latent attention in its absorbed form, where all query heads have the same keys."""
    about: dict[str, Any] = {"family": "absorbed", "dtype": dtype, "key_heads": 1, **LATENT_WIDTHS}
    checks = [
        Sizes(kind="causal", **about, batch=1, length=1023),
        Sizes(kind="full", **about, length=113, keys=203),
        Sizes(kind="causal", **about, length=1, keys=777),
        Sizes(kind="causal", **{**about, "width": 520, "value_width": 40}, length=77),
        *(Sizes(kind=kind, **about, length=300) for kind in ("everything", "bigbird", "documents")),
    ]
    lengths = zip(CLASSES, (128, 1024, 4096), strict=True)
    timed = {size: Sizes(kind="causal", **about, batch=1, heads=16, length=length) for size, length in lengths}
    return case("attention", "absorbed", checks, timed, (FORWARD,), 512)


def _attention_kinds(
    family: str, called: str, kinds: dict[str, tuple[str, ...]], directions: tuple[str, ...]
) -> list[Case]:
    found = []
    for dtype in DTYPES:
        for width in HEAD_WIDTHS:
            if family == "forward mode" and dtype == "float32" and width > SINGLE_TANGENT:
                continue
            for proves, calls in kinds.items():
                checks = [Sizes(called, kind, dtype, **CHECKED, width=width) for kind in calls]
                timed = _timed_attention(called, calls[0], dtype, width)
                found.append(case(family, proves, checks, timed, directions, width))
    return found


def masks() -> list[Case]:
    return _attention_kinds("masks", "masks", MASKS, BOTH)


def scores() -> list[Case]:
    return _attention_kinds("scores", "scores", SCORES, BOTH)


def tangents() -> list[Case]:
    return _attention_kinds("forward mode", "tangent", TANGENTS, (TANGENT,))


def statistics() -> list[Case]:
    found = []
    for dtype in DTYPES:
        for width in HEAD_WIDTHS:
            checks = [Sizes("statistics", kind, dtype, length=777, width=width) for kind in STATISTICS]
            timed = _timed_attention("statistics", "causal: entropy received", dtype, width)
            found.append(case("statistics", "statistics", checks, timed, (FORWARD,), width))
    return found


# Kinds of proofs of caches: the calls that are of it, the one that is timed, and how many queries are checked.
CACHES: dict[str, tuple[tuple[str, ...], str, tuple[int, ...]]] = {
    "cache": (CACHE_KINDS, "pages", (1, 5)),
    "chunk": (CACHE_KINDS, "pages", (70,)),
    "quantised": (QUANTISED_KINDS, "int8 pages", (1, 5, 70)),
    "latent": (LATENT_KINDS, "latent pages", (1, 5, 70)),
}


def caches() -> list[Case]:
    """One query and a few, of which the keys are split over programs; and chunks of a prompt."""
    found = []
    for dtype in DTYPES:
        for width in CACHE_WIDTHS:
            found += [_cache(proves, dtype, width) for proves in ("cache", "chunk", "quantised")]
        found.append(_cache("latent", dtype, LATENT_WIDTHS["width"]))
    return found


def _cache(proves: str, dtype: str, width: int) -> Case:
    kinds, timed_kind, lengths = CACHES[proves]
    about: dict[str, Any] = {"family": "cache", "dtype": dtype, "width": width}
    few, many = (1, 1) if proves == "latent" else (2, 8)  # key heads
    checks = [
        Sizes(kind=kind, **about, batch=3, heads=8, key_heads=few, length=n, keys=1104)
        for n in lengths
        for kind in kinds
    ]
    rooms = ((1, 96), (1, 2048), (2, 8192)) if proves == "chunk" else ((1, 1024), (8, 8192), (64, 8192))
    length = 70 if proves == "chunk" else 1
    timed = {
        size: Sizes(kind=timed_kind, **about, batch=batch, heads=32, key_heads=many, length=length, keys=keys)
        for size, (batch, keys) in zip(CLASSES, rooms, strict=True)
    }
    return case("cache", proves, checks, timed, (FORWARD,), min(width, WIDTHS["cache"][-1]))


# ---- the others ----


def mlps() -> list[Case]:
    """Three numbers of elements in the hidden layer: each has a tile of its own."""
    found = []
    for dtype in DTYPES:
        for width in WIDTHS["mlp"]:
            alone = [a for a in ACTIVATIONS if a != "gelu_tanh"]
            for kind in (
                "gelu_tanh biases", "silu gated", "gelu int8", "gelu eager", "gelu layer biases", "gelu residual",
                "gelu dropout", *alone,
            ):  # fmt: skip
                decides = {"gated": "gated", "int8": "int8", "eager": "eager", "layer": "norm",
                           "residual": "residual", "dropout": "dropout"}  # fmt: skip
                proves = next((decides[word] for word in kind.split() if word in decides), kind.split()[0])
                about: dict[str, Any] = {"family": "mlp", "kind": kind, "dtype": dtype, "batch": 1}
                tiles = ((128, 1024), (1024, 4096), (4096, 4096))
                checks = [Sizes(**about, length=rows, width=width, hidden=hidden) for rows, hidden in tiles]
                checks.append(Sizes(**about, length=77, width=width - 9, hidden=250))
                if proves == "norm":  # also in the first product, where there are more tokens than weights repay
                    both = ((sizes, dataclasses.replace(sizes, kind="silu gated rms")) for sizes in checks)
                    checks = [sizes for pair in both for sizes in pair]
                    folded: dict[str, Any] = {"length": 8192, "hidden": 512}
                    checks += [dataclasses.replace(sizes, **folded) for sizes in checks[:2]]
                hidden = 8 * width // 3 // 128 * 128 if proves == "gated" else 4 * width
                timed = {
                    size: Sizes(**about, length=rows, width=width, hidden=hidden)
                    for size, rows in zip(CLASSES, (128, 2048, 16384), strict=True)
                }
                found.append(case("mlp", proves, checks, timed, BOTH, width))
    return found + whole_layers()


def whole_layers() -> list[Case]:
    """MLPs that one kernel computes, with every activation. In float32 they take longer by counting."""
    found = []
    for dtype in HALF:
        for width in WHOLE_WIDTHS:
            for proves, form in (("whole", "whole"), ("whole gated", "gated whole")):
                about: dict[str, Any] = {"family": "mlp", "dtype": dtype, "batch": 1}
                kinds = [f"{activation} {form}" for activation in ACTIVATIONS]
                checks = [Sizes(kind=kind, **about, length=5000, width=width, hidden=4 * width) for kind in kinds]
                odd: dict[str, Any] = {"length": 77, "width": width - 16, "hidden": 208}
                checks.append(Sizes(kind=f"gelu {form} biases", **about, **odd))
                hidden = 8 * width // 3 // 16 * 16 if proves == "whole gated" else 4 * width
                timed = {
                    size: Sizes(kind=kinds[0], **about, length=rows, width=width, hidden=hidden)
                    for size, rows in zip(CLASSES, (128, 4096, 65536), strict=True)
                }
                found.append(case("mlp", proves, checks, timed, BOTH, width))
    return found


def norms() -> list[Case]:
    kinds = {"rms": ("rms", "rms offset"), "layer": ("layer",), "residual": ("rms residual", "layer residual")}
    found = []
    for dtype in DTYPES:
        for width in WIDTHS["norm"]:
            for proves, calls in kinds.items():
                about: dict[str, Any] = {"family": "norm", "dtype": dtype, "batch": 1}
                checks = [
                    Sizes(kind=kind, **about, length=rows, width=wide)
                    for kind in calls
                    for rows, wide in ((1500, width), (37, width - 17))
                ]
                timed = {
                    size: Sizes(kind=calls[0], **about, length=elements // width, width=width)
                    for size, elements in zip(CLASSES, (2**18, 2**23, 2**27), strict=True)
                }
                found.append(case("norm", proves, checks, timed, BOTH, width))
    return found


def heads() -> list[Case]:
    kinds = {"rotary": ("rotary", "norm interleaved"), "norm": ("norm",), "scale": ("norm rotary scale",)}
    found = []
    for dtype in DTYPES:
        for width in HEAD_WIDTHS:
            for proves, calls in kinds.items():
                about: dict[str, Any] = {"family": "heads", "dtype": dtype}
                checks = [
                    Sizes(kind=kind, **about, length=333, width=w) for kind in calls for w in (width, ODD[width])
                ]
                timed = {
                    size: Sizes(
                        kind=calls[0], **about, batch=1, heads=16, length=elements // (16 * width), width=width
                    )
                    for size, elements in zip(CLASSES, (2**18, 2**23, 2**26), strict=True)
                }
                found.append(case("heads", proves, checks, timed, BOTH, width))
    return found


def losses() -> list[Case]:
    """The check's classes are cut by every tile, one of them in the middle."""
    kinds = {
        "classes": ("classes mean", "classes bias weights", "classes softcap smoothing entropy"),
        "probabilities": ("probabilities mean", "probabilities smoothing bias"),
        "temperature": ("classes temperature mean", "probabilities temperature softcap"),
        # The kernels leave nothing out, so that they are checked like the others.
        "filter": ("classes filter mean",),
    }
    found = []
    for dtype in DTYPES:
        for width in WIDTHS["loss"]:
            for proves, calls in kinds.items():
                about: dict[str, Any] = {"family": "loss", "dtype": dtype, "batch": 1}
                checks = [
                    Sizes(kind=kind, **about, length=rows, width=wide, hidden=classes)
                    for kind in calls
                    for rows, wide, classes in ((333, width, 2111), (1024, width - 9, 8192))
                ]
                sizes = ((128, 32768), (2048, 32768), (8192, 32768 if proves == "probabilities" else 65536))
                timed = {
                    size: Sizes(kind=calls[0], **about, length=rows, width=width, hidden=classes)
                    for size, (rows, classes) in zip(CLASSES, sizes, strict=True)
                }
                found.append(case("loss", proves, checks, timed, BOTH, width))
    return found
