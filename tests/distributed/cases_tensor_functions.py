"""The loss, the cache and statistics of DTensors: those of whole tensors, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import groups
import pytest
import torch
from cases_propagation import numbers
from cases_tensors import BATCH, HEADS, LENGTH, B, D, H, N, R, same, two_by_two
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

import fastattn
from fastattn import lens, masks

CLASSES = 22
LOSS = {"input": (B, 6, D), "linear_weight": (CLASSES, D), "linear_bias": (CLASSES,)}
TARGET = torch.arange(B * 6).view(B, 6) % CLASSES
TARGET[1, 2:5] = -100
CHANCES = numbers(B, 6, CLASSES).double().softmax(-1)
BY_CLASSES = {"linear_weight": [BATCH], "linear_bias": [BATCH]}
TOKENS_AND_CLASSES = {"input": [BATCH, R], **{name: [R, BATCH] for name in BY_CLASSES}}
WEIGHTS = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)


def loss(options: dict[str, Any], target: Tensor = TARGET) -> Callable[..., Any]:
    def of(**tensors: Tensor) -> Any:
        return fastattn.linear_cross_entropy(**tensors, target=target, **options)

    return of


ALL = {"reduction": "none", "return_lse": True, "return_entropy": True, "z_loss": 0.1, "softcap": 3.0}
SUMMED = {"weight": WEIGHTS, "z_loss": 0.1, "label_smoothing": 0.2}
LOSSES = {
    "by tokens": ({"input": [BATCH]}, {}, [R]),
    "by tokens of a sequence": ({"input": [HEADS]}, SUMMED, [R]),
    "by tokens, a sum": ({"input": [BATCH]}, {"reduction": "sum", "shift": True}, [R]),
    "by tokens, each": ({"input": [BATCH]}, ALL, [BATCH]),
    "by classes": (BY_CLASSES, SUMMED, [R]),
    "by classes, each": (BY_CLASSES, ALL, [R]),
    "by tokens and classes": (TOKENS_AND_CLASSES, SUMMED, [R, R]),
    "by tokens and classes, each": (TOKENS_AND_CLASSES, ALL, [BATCH, R]),
}


def cache(mesh: DeviceMesh, placed: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """What is written and what is read; all calls of one cache, one after another."""
    lengths, shape = torch.tensor([0, 5, 3, 9]), (B, H, 16, D)
    names = ("k_cache", "v_cache", *(("k_scale", "v_scale") if dtype == torch.int8 else ()))
    whole = [torch.zeros(shape, dtype=dtype) if "cache" in name else torch.zeros(shape[:3]) for name in names]
    spread = [distribute_tensor(t.clone(), mesh, [placed]) for t in whole]
    for step in range(2):
        new = [torch.randn(B, H, 3, D) for _ in range(3)]
        q, k, v = (distribute_tensor(t, mesh, [placed]) for t in new)
        given = {"cache_lengths": lengths + 3 * step, "return_lse": True, **options}
        caches, parts = dict(zip(names, whole, strict=True)), dict(zip(names, spread, strict=True))
        expected = fastattn.attention_with_cache(new[0], k=new[1], v=new[2], **caches, **given)
        found = fastattn.attention_with_cache(q, k=k, v=v, **parts, **given)
        for a, e in zip((*found, *spread), (*expected, *whole), strict=True):
            assert isinstance(a, DTensor) and list(a.placements) == [placed]
            torch.testing.assert_close(a.full_tensor(), e)


ANGLES = torch.outer(torch.arange(20.0), torch.tensor([1.0, 0.3, 0.1, 0.01]))
BESIDE = {
    "alibi_slopes": torch.linspace(0.1, 0.5, H), "sinks": torch.linspace(-1, 1, H), "cache_starts": [0, 2, 1, 0],
    "cos": ANGLES.cos(), "sin": ANGLES.sin(), "tree_mask": torch.ones(B, 3, 3, dtype=torch.bool).tril(),
}  # fmt: skip
WANT = (
    "entropy", "max_weight", "top_keys", "mass", "value_norm", "match_mass", "received", "weighted_received",
    "received_value_norm", "lag_profile", "thumbnail",
)  # fmt: skip


def _by_batch_and_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((q * 7 + k * 13 + h * 5 + b) % 11 < 9)


def _same(kind: str, actual: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        for name, a, e in zip(expected._fields, actual, expected, strict=True):
            _same(f"{kind}, {name}", a, e)
    else:
        assert isinstance(actual, DTensor), kind
        torch.testing.assert_close(actual.full_tensor(), expected, msg=lambda m: f"{kind}: {m}")


def statistics(mesh: DeviceMesh, placed: list[Any], key_heads: int, **given: Any) -> None:
    mesh = two_by_two(mesh) if len(placed) == 2 else mesh
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, N, D), torch.randn(B, key_heads, N, D), torch.randn(B, key_heads, N, D)
    lse = fastattn.attention(q, k, v, **given, return_lse=True)[1]
    labels = torch.arange(B * N).view(B, N) % 5
    own = {
        "want": WANT, "labels": labels, "match": ("induction", "duplicate"), "query_weights": torch.rand(B, 1, 9),
        "output": torch.randn(H, D, 3), "thumbnail": 4, "queries": slice(-9, None),
    }  # fmt: skip
    of_keys = placed if key_heads > 1 else [R if p == HEADS else p for p in placed]
    spread = [distribute_tensor(t, mesh, p) for t, p in ((q, placed), (k, of_keys), (lse, placed), (v, of_keys))]
    if "mask" not in given:
        own["within"] = [masks.window(3, 0), masks.causal()]
    for function, options in (
        (lens.attention_statistics, own),
        (lens.match_mass, {"labels": labels}),
        (lens.gather_weights, {"rows": slice(2, 5), "columns": [0, 3]}),
    ):
        count = 4 if function is lens.attention_statistics else 3
        expected, found = (function(*t[:count], **options, **given) for t in ((q, k, lse, v), spread))
        _same(function.__name__, found, expected)


STATISTICS = {
    "by batch": ([BATCH], 4, {"causal": True, "key_lengths": [N, 40, 37, 39], "sinks": torch.zeros(H)}),
    "by heads": ([HEADS], 4, {"causal": True, "alibi_slopes": torch.linspace(0.1, 0.5, H)}),
    "by heads, one key head": ([HEADS], 1, {"bias": numbers(H, 1, N)}),
    "by batch and heads": ([BATCH, HEADS], 4, {"mask": masks.from_function(_by_batch_and_head)}),
}


def refused(mesh: DeviceMesh, call: Callable[..., Any], words: str) -> None:
    def spread(placement: Any, *shape: int) -> DTensor:
        return distribute_tensor(torch.zeros(shape or (B, H, N, D)), mesh, [placement])

    with pytest.raises((TypeError, ValueError), match=words):
        call(spread)


def _with_cache(s: Callable[..., DTensor], q: Any, caches: Any, new: Any, **options: Any) -> Any:
    written = [s(caches), s(caches)] if caches else [torch.zeros(B, H, N, D)] * 2
    return fastattn.attention_with_cache(s(q), *written, k=s(new), v=s(new), cache_lengths=0, **options)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a sequence that would be shifted": (
        lambda s: fastattn.linear_cross_entropy(s(HEADS, B, 8, D), s(R, CLASSES, D), TARGET, shift=True),
        "shift must be False if the tokens of a sequence are shared out",
    ),
    "tokens and classes over one dimension": (
        lambda s: fastattn.linear_cross_entropy(s(BATCH, B, D), s(BATCH, CLASSES, D), TARGET[:, 0]),
        "linear_weight must be replicated, or sharded by its rows",
    ),
    "fewer classes than ranks": (
        lambda s: fastattn.linear_cross_entropy(s(R, B, D), s(BATCH, 3, D), TARGET[:, 0]),
        "linear_weight must have classes for each of the 4 ranks, got 3",
    ),
    "a plain weight of classes": (
        lambda s: fastattn.linear_cross_entropy(s(R, B, D), torch.zeros(CLASSES, D), TARGET[:, 0]),
        "linear_weight must be a DTensor",
    ),
    "a whole cache for sharded heads": (
        lambda s: _with_cache(s, HEADS, R, R), "must all be sharded by batch, all by heads, or all be replicated"
    ),
    "a plain cache": (lambda s: _with_cache(s, R, None, R), "k_cache must be a DTensor on q's mesh"),
    "pages of sharded rows": (
        lambda s: _with_cache(s, BATCH, BATCH, BATCH, block_table=torch.zeros(B, 1).int()),
        "block_table must be None",
    ),
    "a shared prefix": (
        lambda s: fastattn.attention_with_shared_prefix(
            *(s(R),) * 5, cache_lengths=0
        ), "attention_with_shared_prefix does not take DTensors",
    ),
    "statistics of sharded queries": (
        lambda s: lens.attention_statistics(s(LENGTH), s(R), s(LENGTH, B, H, N)),
        "q, k and lse must be sharded together",
    ),
    "a mass within a mask by head": (
        lambda s: lens.attention_statistics(
            s(HEADS), s(HEADS), s(HEADS, B, H, N), want="mass", within=masks.from_function(_by_batch_and_head)
        ),
        "within must be the same for all batch elements and heads",
    ),
}  # fmt: skip
CASES: dict[groups.Group, dict[str, groups.Case]] = {
    4: {
        **{
            f"DTensor loss {name}": partial(
                same, function=loss(options), tensors=LOSS, placements=placements, options={}, result=result
            )
            for name, (placements, options, result) in LOSSES.items()
        },
        "DTensor loss of probabilities by classes": partial(
            same, function=loss({}, CHANCES), tensors=LOSS, placements=BY_CLASSES, options={}, result=[R]
        ),
        "DTensor cache by batch": partial(cache, placed=BATCH, **BESIDE),
        "DTensor cache by heads": partial(cache, placed=HEADS, **BESIDE),
        "DTensor int8 cache by batch": partial(cache, placed=BATCH, dtype=torch.int8),
        "DTensor int8 cache by heads": partial(cache, placed=HEADS, dtype=torch.int8),
        **{
            f"DTensor statistics {name}": partial(statistics, placed=placed, key_heads=key_heads, **given)
            for name, (placed, key_heads, given) in STATISTICS.items()
        },
        **{
            f"DTensor, {name}: refused": partial(refused, call=call, words=words)
            for name, (call, words) in REFUSED.items()
        },
    },
}
