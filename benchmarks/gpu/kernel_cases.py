"""The proofs that need torch and triton only: each family's kernels, one of each kind first, then every dtype."""

from __future__ import annotations

from collections import Counter

from fastattn.measuring.kinds import (
    CACHE_KINDS,
    INVARIANT_KINDS,
    LATENT_KINDS,
    MASK_KINDS,
    QUANTISED_KINDS,
    SCORE_KINDS,
    Sizes,
)

HALF, SINGLE = ("bfloat16", "float16"), "float32"
WHOLE_ROWS = 8192  # a norm of a wider row reads it in pieces
# Queries, keys, width, value width.
ODD = (
    (113, 203, 80, None),
    (203, 113, 40, None),
    (1023, 1024, 128, None),
    (257, 257, 192, 128),
    (1, 777, 64, None),
    (113, 203, 320, 512),
)
DTYPES = (*HALF, SINGLE)


def kernel_cases() -> list[Sizes]:
    """In the order in which they are proven: one of each kind before the second of any. So every kernel has been
    launched after a sixth of the cases."""
    by_family = [
        *attention(), *masks_and_scores(), *mlps(), *norms(), *heads(), *losses(), *tangents(), *packed(),
        *invariant(), *absorbed(), *statistics(), *many_heads(), *caches(),
    ]  # fmt: skip
    met: Counter[tuple[str, str]] = Counter()

    def rank(sizes: Sizes) -> int:
        met[kind_of(sizes)] += 1
        return met[kind_of(sizes)]

    return sorted(by_family, key=rank)


def kind_of(sizes: Sizes) -> tuple[str, str]:
    """Its family and kind. MLPs in float32 and norms of wide rows launch kernels of their own: each is a kind."""
    if sizes.family == "mlp" and sizes.dtype == SINGLE:
        return sizes.family, SINGLE
    if sizes.family == "norm" and sizes.width > WHOLE_ROWS:
        return sizes.family, "wide rows"
    return sizes.family, sizes.kind


def attention() -> list[Sizes]:
    plain = [
        Sizes("attention", kind, dtype, width=width)
        for dtype in DTYPES
        for width in (128, 64, 256, 512)
        for kind in ("causal", "full")
    ]
    odd = [
        Sizes("attention", "causal", dtype, length=length, keys=keys, width=width, value_width=value_width)
        for dtype in ("bfloat16", "float16")
        for length, keys, width, value_width in ODD
    ]
    return [*plain, *odd]


# Dtypes and widths of heads that have rows of their own, the most used first.
FORMS = (
    ("bfloat16", 128),
    ("bfloat16", 64),
    ("float16", 128),
    ("bfloat16", 256),
    ("float32", 64),
    ("bfloat16", 512),
)


def masks_and_scores() -> list[Sizes]:
    """Every kind where it is used most; then in the dtypes and at the widths that have rows of their own."""
    kinds = [
        *(("masks", kind) for kind in MASK_KINDS),
        *(("scores", kind) for kind in (*SCORE_KINDS, "dropout of a part")),
    ]
    return [Sizes(family, kind, dtype, width=width) for dtype, width in FORMS for family, kind in kinds]


def mlps() -> list[Sizes]:
    kinds = (
        "gelu_tanh biases", "silu gated", "gelu", "relu", "relu_squared", "silu biases", "gelu gated biases",
        "gelu int8", "silu gated int8", "silu gated eager", "gelu layer residual dropout",
        "silu gated rms residual dropout",
    )  # fmt: skip
    regular = [Sizes("mlp", kind, dtype, width=256, hidden=1024) for dtype in DTYPES for kind in kinds]
    odd = [Sizes("mlp", kind, dtype, width=111, hidden=250) for dtype in DTYPES for kind in kinds[:2]]
    whole = [
        Sizes("mlp", f"{kind} whole", dtype, width=width, hidden=hidden)
        for kind in ("gelu_tanh biases", "silu gated", "relu_squared", "gelu gated biases")
        for dtype, width, hidden in (
            ("bfloat16", 128, 512), ("float16", 80, 208), ("bfloat16", 64, 256), ("float32", 64, 80),
        )
    ]  # fmt: skip
    # So many tokens that the norm goes into the first product.
    folded = [
        Sizes("mlp", kind, dtype, batch=1, length=2048, width=256, hidden=512)
        for dtype in HALF
        for kind in ("silu gated rms", "gelu layer biases")
    ]
    return [*regular, *odd, *whole, *folded]


def norms() -> list[Sizes]:
    kinds = ("rms", "layer", "rms residual", "layer residual")
    widths = (128, 1024, 4096, 111, 16384, 40000)
    return [
        Sizes("norm", kind, dtype, length=150, width=width)
        for width in widths
        for dtype in DTYPES
        for kind in kinds
    ]


def heads() -> list[Sizes]:
    kinds = ("norm rotary scale", "rotary", "norm", "norm interleaved")
    return [
        Sizes("heads", kind, dtype, width=width)
        for width in (128, 64, 80, 512)
        for dtype in DTYPES
        for kind in kinds
    ]


def losses() -> list[Sizes]:
    kinds = (
        "classes mean", "classes bias weights", "classes softcap smoothing entropy",
        "probabilities smoothing bias", "classes filter mean",
    )  # fmt: skip
    forms = ((256, 1000), (111, 2111))
    return [
        Sizes("loss", kind, dtype, width=width, hidden=classes)
        for width, classes in forms
        for dtype in DTYPES
        for kind in kinds
    ]


def tangents() -> list[Sizes]:
    kinds = ("causal", "full", "sinks", "bias", "bigbird", "dropout")
    forms = (("bfloat16", 64), ("bfloat16", 128), ("float32", 64), ("bfloat16", 512))
    return [Sizes("tangent", kind, dtype, width=width) for dtype, width in forms for kind in kinds]


def packed() -> list[Sizes]:
    return [
        Sizes("varlen", kind, dtype, batch=1, length=1600, width=width)
        for dtype, width in (("bfloat16", 128), ("bfloat16", 64), ("float16", 64), ("float32", 64))
        for kind in ("causal", "full")
    ]


def invariant() -> list[Sizes]:
    """Calls in which the bits of a row depend on that row alone: few queries, of which the keys are split, and
    many, by turns."""
    forms = (("bfloat16", 128), ("bfloat16", 64), ("float16", 128), ("bfloat16", 256), ("float32", 64))
    return [
        Sizes("invariant", kind, dtype, length=(5, 333)[(n + m) % 2], keys=1104, width=width)
        for n, (dtype, width) in enumerate(forms)
        for m, kind in enumerate(INVARIANT_KINDS)
    ]


def absorbed() -> list[Sizes]:
    """Queries and keys wider than a tile: those of latent attention, and a few columns more than a tile has."""
    return [
        Sizes("absorbed", kind, dtype, length=300, width=width, value_width=value_width, key_heads=1)
        for dtype in DTYPES
        for width, value_width in ((576, 512), (520, 40))
        for kind in ("causal", "full", "everything", "bigbird")
    ]


def statistics() -> list[Sizes]:
    """All that have a kernel, at once: the kinds that have rows or loops of their own; then two alone, whose tiles
    differ."""
    kinds = ("causal", "full", "window", "documents", "bigbird", "key lengths", "softcap", "sinks", "bias")
    every = [Sizes("statistics", kind, dtype, width=width) for dtype, width in FORMS for kind in kinds]
    alone = [Sizes("statistics", "causal: mass entropy", "bfloat16", width=width) for width in (64, 128, 256)]
    return [*every, *alone]


def many_heads() -> list[Sizes]:
    """More heads than a launch's second dimension has room for, as windows of images have."""
    many = {"batch": 8200, "heads": 8, "key_heads": 8, "length": 49, "width": 32}
    return [Sizes("attention", "full", **many), Sizes("scores", "bias", **many)]


def caches() -> list[Sizes]:
    """A query, a few, and a chunk of a prompt, by turns: each kind has each of them in every dtype and at every
    width. At a few queries keys are split over programs."""
    return [
        Sizes("cache", kind, dtype, batch=3, heads=8, length=(1, 5, 70)[(n + m + i) % 3], keys=1100, width=width)
        for n, dtype in enumerate(DTYPES)
        for m, width in enumerate((128, 64, 256))
        for i, kind in enumerate((*CACHE_KINDS, *QUANTISED_KINDS, *LATENT_KINDS))
    ]
