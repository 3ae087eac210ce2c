"""No kernel touches what it was not given, uses what nobody wrote, or depends on the order of its programs.

Shown by `sanitizers.sanitized` in the interpreter: it finds each of these faults in a kernel that has it, and none
in ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from attention_problems import Problem, problems
from hardware import DEVICE, ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from sanitizers import ORDERS, Finding, sanitized
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn import kernels, lens, masks
from fastattn.kernels import cache as cache_kernels
from fastattn.kernels import invariant as invariant_kernels
from fastattn.kernels import launch, whole_mlp
from fastattn.kernels.launch.whole_mlp import WHOLE_MLP_UP_TO
from fastattn.kernels.mlp import folded_norm

pytestmark = pytest.mark.skipif(
    ON_GPU, reason="checks kernels in Triton's interpreter; on a GPU: compute-sanitizer"
)

BACKEND = "triton"


# What it finds.


@triton.jit
def copy_kernel(x, y, size, gap, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at * gap, mask=at < size, other=0.0), mask=at < size)


@triton.jit
def copy_without_mask_kernel(x, y, size, gap, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at * gap), mask=at < size)


@triton.jit
def store_without_mask_kernel(x, y, size, gap, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at * gap, mask=at < size, other=0.0))


@triton.jit
def one_sum_kernel(x, y, size, gap, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y, tl.load(y) + tl.sum(tl.load(x + at * gap, mask=at < size, other=0.0), 0))


@triton.jit
def neighbour_kernel(x, y, size, gap, BLOCK: tl.constexpr):
    """The last program reads what the one before it writes."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(y + at - BLOCK, mask=(at >= BLOCK) & (at < size), other=0.0)
    tl.store(y + at, tl.load(x + at * gap, mask=at < size, other=0.0) + before, mask=at < size)


def launched(kernel, order: str = "given", gap: int = 1) -> Tensor:
    x, y = torch.arange(20.0 * gap)[::gap], torch.empty(20)
    with sanitized(order):
        kernel[(3,)](x, y, 20, gap, BLOCK=8)
    return y


@pytest.mark.parametrize("gap", [1, 3])
def test_a_sound_kernel_passes_in_every_order(gap: int) -> None:
    for order in ORDERS:
        assert torch.equal(launched(copy_kernel, order, gap), torch.arange(20.0 * gap)[::gap])


@pytest.mark.parametrize(
    "kernel, words",
    [
        (copy_without_mask_kernel, r"program \(2, 0, 0\) of \(3, 1, 1\), loads element 20 .* shape \(20,\)"),
        (store_without_mask_kernel, r"program \(2, 0, 0\) of \(3, 1, 1\), stores element 20 .* \(20,\)"),
        (one_sum_kernel, r"programs 0 and 1 both store to element 0"),
        (neighbour_kernel, r"program 1 loads what program 0 stores, element 0"),
    ],
)  # fmt: skip
def test_each_fault_is_found_and_named(kernel, words: str) -> None:
    with pytest.raises(Finding, match=words):
        launched(kernel)


def test_the_gap_between_the_elements_of_a_view_belongs_to_nobody() -> None:
    x, y = torch.arange(60.0)[::3], torch.empty(20)
    with pytest.raises(Finding, match=r"loads element 1 .* shape \(20,\) and strides \(3,\)"), sanitized():
        copy_kernel[(3,)](x, y, 20, 1, BLOCK=8)


def test_memory_that_nobody_wrote_is_not_a_number() -> None:
    with sanitized():
        assert torch.empty(4).isnan().all() and torch.empty(4, dtype=torch.int32).eq(2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


# Ours.


def forward_and_backward(call: Callable[..., object], inputs: Sequence[Tensor]) -> list[Tensor]:
    """All that `call` returns, and the gradient of each input that has one; upstream gradients are drawn."""
    torch.manual_seed(1)
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    results = call(*leaves)
    outs = [t for t in (results if isinstance(results, tuple) else (results,)) if t.requires_grad]
    upstream = [torch.randn(t.shape, device=DEVICE).to(t.dtype) for t in outs]
    learned = [t for t in leaves if t.requires_grad]
    return [*outs, *torch.autograd.grad(outs, learned, upstream)]


def attention(problem: Problem) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = problem.score_tensors()
    names = [n for n, t in tensors._asdict().items() if n in ("bias", "relative_bias", "sinks") and t is not None]

    def call(q: Tensor, k: Tensor, v: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        given = problem.arguments(tensors._replace(**dict(zip(names, beside, strict=True))))
        return fastattn.attention(q, k, v, **given, return_lse=True, backend=BACKEND)

    return forward_and_backward(call, [*problem.inputs(), *(getattr(tensors, n) for n in names)])


def absorbed() -> list[Tensor]:
    """Keys of more than one tile's columns, which have no backward."""
    torch.manual_seed(0)
    q, k, v = Problem(1, 2, 1, queries=20, keys=37, width=521, value_width=24, layout="strided").inputs()
    with torch.no_grad():
        return list(fastattn.attention(q, k, v, causal=True, return_lse=True, backend=BACKEND))


def attention_tangent(problem: Problem) -> list[Tensor]:
    torch.manual_seed(0)
    given = problem.arguments(problem.score_tensors())
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.randn(t.shape).to(t.dtype)) for t in problem.inputs()]
        results = fastattn.attention(*duals, **given, return_lse=True, backend=BACKEND)
        return [part for t in results for part in forward_ad.unpack_dual(t)]


def statistics(problem: Problem) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = problem.inputs()
    given = problem.arguments(problem.score_tensors())
    _, lse = fastattn.attention(q, k, v, **given, return_lse=True, backend="reference")
    found = lens.attention_statistics(
        q, k, lse, v, want=("entropy", "max_logit", "mean_distance", "value_norm", "match_mass", "received",
        "max_received", "weighted_received", "lag_profile"), labels=torch.randint(5, k.shape[::2]),
        match=("induction", "previous"), query_weights=torch.ones_like(lse), backend=BACKEND, **given,
    )  # fmt: skip
    return [t for t in found if t is not None]


def norms_in_products() -> list[Tensor]:
    """In bfloat16 on GPUs; here in float32, because the interpreter computes bfloat16 wrongly."""
    with mock.patch.object(folded_norm, "FOLDED", (torch.float32,)):
        found = mlp(50, 43, 11, gated=False, strided=False, inference=True, norm="layer")
        return found + mlp(50, 21, 11, gated=True, strided=True, inference=True, norm="rms")


def mlp(
    tokens: int, width: int, hidden: int, *, gated: bool, strided: bool, inference: bool = False, **asked: Any
) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(width, tokens).t() if strided else torch.randn(tokens, width)
    names = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down") if gated else ("w1", "b1", "w2", "b2")
    sizes = {"b_down": (width,), "b2": (width,), "w_down": (width, hidden), "w2": (width, hidden)}
    sizes |= dict.fromkeys(("b_gate", "b_up", "b1"), (hidden,))
    weights = [torch.randn(sizes.get(name, (hidden, width))) / width**0.5 for name in names]
    function = fastattn.gated_mlp if gated else fastattn.mlp

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return function(x, **dict(zip(names, weights, strict=True)), **asked, backend=BACKEND)

    if inference:
        with torch.no_grad():
            return [call(x, *weights)]
    return forward_and_backward(call, [x, *weights])


def norm(rows: int, width: int, *, centred: bool, strided: bool) -> list[Tensor]:
    torch.manual_seed(0)
    x, residual = (
        torch.randn(2, rows, 2 * width)[..., ::2] if strided else torch.randn(2, rows, width) for _ in "xr"
    )
    names = ("weight", "bias") if centred else ("weight",)

    def call(x: Tensor, residual: Tensor, *affine: Tensor) -> tuple[Tensor, Tensor]:
        function = fastattn.layer_norm if centred else fastattn.rms_norm
        return function(x, residual=residual, **dict(zip(names, affine, strict=True)), backend=BACKEND)

    return forward_and_backward(call, [x, residual, *(torch.randn(width) for _ in names)])


def heads(length: int, width: int, *, interleaved: bool, strided: bool) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, length, 3, width).transpose(1, 2) if strided else torch.randn(2, 3, length, width)
    cos, sin = torch.randn(2, length, width // 4)

    def call(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return fastattn.prepare_heads(
            x, cos=cos, sin=sin, norm_weight=weight, head_scale=scale, interleaved=interleaved, backend=BACKEND
        )

    return forward_and_backward(call, [x, torch.randn(width), torch.randn(3)])


def loss(
    tokens: int, width: int, classes: int, *, probabilities: bool, strided: bool, filtered: bool = False
) -> list[Tensor]:
    """With every option; filtered, without those that forbid to leave out classes. Some tokens are ignored."""
    torch.manual_seed(0)
    x = torch.randn(width, tokens).t() if strided else torch.randn(tokens, width)
    target = torch.randint(classes, (tokens,))
    target[::3] = -100
    given = {"target": torch.rand(tokens, classes) if probabilities else target, "weight": torch.rand(classes)}
    given |= {"label_smoothing": 0.1, "softcap": 2.0, "temperature": 0.5, "z_loss": 0.1, "reduction": "none"}
    given |= {"label_smoothing": 0.0, "filter": 1.0} if filtered else {}

    def call(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        more = {"return_lse": True, "return_entropy": True, "backend": BACKEND}
        return fastattn.linear_cross_entropy(x, w, linear_bias=b, **given, **more)

    return forward_and_backward(call, [x, torch.randn(classes, width), torch.randn(classes)])


def invariant(*, packed: bool) -> list[Tensor]:
    """Sequences whose keys fill several splits, which one program merges; behind a padded one lies NaN."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 20, 24), torch.randn(2, 1, 20, 24), torch.randn(2, 1, 20, 40)
    given: dict[str, object] = {"sinks": torch.randn(2), "softcap": 3.0, "scale": torch.rand(2)}
    if packed:
        given |= {"mask": masks.documents(torch.tensor([[0] * 17 + [1] * 3, [0] * 9 + [1] * 11])) & masks.causal()}
    else:
        k[1, :, 13:], v[1, :, 13:] = float("nan"), float("nan")
        given |= {"key_lengths": torch.tensor([20, 13]), "window": (9, 4), "alibi_slopes": torch.rand(2)}
    scale = given.pop("scale", None)
    learned = [t for t in (given.get("sinks"), scale) if isinstance(t, torch.Tensor)]

    def call(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        by_head = dict(zip(("sinks", "scale"), t[3:], strict=False))
        options = given | by_head | {"return_lse": True, "invariant": True, "backend": BACKEND}
        return fastattn.attention(*t[:3], **options)  # type: ignore[call-overload]

    with mock.patch.multiple(invariant_kernels, SPLIT=16, SPLIT_ROWS=0 if packed else 64):
        return forward_and_backward(call, [q, k, v, *learned])


def cache(queries: int, *, page: int | None, shaped: bool, absorbed: bool = False) -> list[Tensor]:
    """Rows of which the longest has its keys split over three programs; behind the rows lies NaN."""
    torch.manual_seed(0)
    lengths = torch.tensor([43, 0, 21], dtype=torch.int32)
    q, new = torch.randn(3, 4, queries, 24), torch.randn(3, 2, queries, 24)
    table, used = None, lengths
    if page is not None:
        table = torch.randperm(20)[:18].view(3, 6).int()
        keys, values = torch.full((20, 2, page, 24), float("nan")), torch.full((20, 2, page, 24), float("nan"))
        # Behind the last page that a row needs, its table holds anything.
        table = table.masked_fill(torch.arange(6) * page >= (lengths + queries)[:, None], 10**9)
    else:
        keys, values = (torch.full((3, 2, 2 * 50, 24), float("nan"))[:, :, ::2] for _ in "kv")
    for row, length in enumerate(used.tolist()):
        for t in range(length):
            at = (row, t) if table is None else (int(table[row, t // page]), t % page)
            keys[at[0], :, at[1]], values[at[0], :, at[1]] = torch.randn(2, 2, 24)
    given = {
        "window": (30, None), "softcap": 3.0, "alibi_slopes": torch.rand(4), "sinks": torch.randn(4),
        "cache_starts": torch.tensor([2, 0, 22]), "tree_mask": torch.rand(queries, queries) < 0.5,
    }  # fmt: skip
    with mock.patch.object(cache_kernels, "SPLIT", 16):
        out, lse = fastattn.attention_with_cache(
            q, keys, None if absorbed else values, k=new, v=None if absorbed else new, cache_lengths=lengths,
            block_table=table, value_width=16 if absorbed else None, return_lse=True, backend=BACKEND,
            **(given if shaped else {}),
        )  # fmt: skip
    return [out, lse.nan_to_num(neginf=-1.0), keys.nan_to_num(), values.nan_to_num()]


def quantised_cache(dtype: torch.dtype, *, page: int | None, by_page: bool) -> list[Tensor]:
    """New tokens are quantised and written. Behind the rows lie scales that are NaN."""
    torch.manual_seed(0)
    lengths, end, stored = torch.tensor([20, 0], dtype=torch.int32), 30, (2, 1, 30, 24)
    q, new = torch.randn(2, 2, 2, 24), torch.randn(2, 1, 2, 24)
    scales = [torch.rand(2, 1) + 0.1 if by_page else torch.rand(2, 1, end) + 0.1 for _ in "kv"]
    for scale in () if by_page else scales:
        scale.masked_fill_(torch.arange(end) >= lengths[:, None, None], float("nan"))
    table = None
    if page is not None:  # one head: pages of a row are its tokens in order
        stored = (2 * end // page, 1, page, 24)
        table = torch.arange(stored[0]).view(2, -1).int()
        table = table.masked_fill(torch.arange(table.shape[1]) * page >= (lengths + 2)[:, None], 10**9)
        scales = [scale.view(stored[:3]) for scale in scales]
    codes = [torch.randint(-9, 9, stored, dtype=torch.int8).to(dtype) for _ in "kv"]
    with mock.patch.object(cache_kernels, "SPLIT", 16):
        out = fastattn.attention_with_cache(
            q, *codes, k=new, v=new, k_scale=scales[0], v_scale=scales[1], cache_lengths=lengths,
            block_table=table, backend=BACKEND,
        )  # fmt: skip
    return [out, *(t.float() for t in codes), *(t.nan_to_num() for t in scales)]


def by_library(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """With PyTorch's matrix products, and our kernels between them, as for wide MLPs."""
    with mock.patch.dict(launch.MLP_FUSED_UP_TO, {family: {} for family in launch.MLP_FUSED_UP_TO}):
        return call()


def as_a_whole(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """With the kernels that compute an MLP as a whole, in segments of one step."""
    limits = mock.patch.dict(WHOLE_MLP_UP_TO, {launch.INTERPRETER: {4: 128}})
    with limits, mock.patch.object(whole_mlp, "LEAST_STEPS", 1):
        return call()


def a_tile_ahead(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """With products issued a tile ahead, as some rows of the launch tables have it."""
    look_up = launch.look_up
    with mock.patch.object(launch, "look_up", lambda *asked: look_up(*asked)._replace(ahead=True)):
        return call()


def check(call: Callable[[], list[Tensor]], *orders: str) -> set[str]:
    """Sound, no NaN out of unwritten memory, and the same bits in every order; the kernels that ran."""
    expected = call()
    for seed, order in enumerate(orders or ("shuffled",)):
        with sanitized(order, seed) as watch:
            found = call()
        for t, first in zip(found, expected, strict=True):
            assert not t.isnan().any() and torch.equal(t, first), order
    assert watch.addresses > 0 or not expected[0].numel()
    return watch.kernels


PLAIN = Problem(queries=37, keys=53, causal=True, key_heads=1, lse_gradient=True)
EVERYTHING = Problem(
    queries=37, keys=53, window=(20, 9), lengths=True, alibi=True, sinks=True, bias=(0, 0, 0, 0), radius=9,
    softcap=2.0, dropout=0.3, of_part=True,
)  # fmt: skip
BOTH_WAYS = {"attention_forward_kernel", "attention_delta_kernel", "attention_dkdv_kernel", "attention_dq_kernel"}
WITH_BIAS = BOTH_WAYS | {"attention_remainder_kernel", "bias_gradient_kernel"}
# A call, and the kernels that it runs.
INVARIANT_BACKWARD = {
    "attention_delta_kernel",
    "invariant_dkdv_kernel",
    "invariant_dq_kernel",
    "row_sum_kernel",
}
CALLS = {
    "attention": (partial(attention, PLAIN), BOTH_WAYS),
    "attention of strided heads": (
        partial(attention, Problem(queries=37, keys=53, width=24, layout="strided")),
        BOTH_WAYS,
    ),
    "attention, every score feature": (partial(attention, EVERYTHING), WITH_BIAS | {"diagonal_sums_kernel"}),
    "attention of wide heads with a bias": (
        partial(attention, Problem(1, 1, 1, queries=20, keys=37, width=290, value_width=320, bias=(0, 0, 0, 0))),
        WITH_BIAS,
    ),
    "attention of keys wider than a tile": (absorbed, {"attention_forward_kernel"}),
    "attention of one query, split over keys": (
        partial(attention, Problem(heads=1, key_heads=1, queries=1, keys=700)),
        BOTH_WAYS | {"merge_kernel"},
    ),
    "attention, products a tile ahead": (
        partial(
            a_tile_ahead, partial(attention, Problem(1, 1, 1, queries=37, keys=90, window=(60, 9), lengths=True))
        ),
        BOTH_WAYS,
    ),
    "attention, sequences": (partial(attention, Problem(intervals=True, queries=70, keys=70)), BOTH_WAYS),
    "attention, forward mode": (
        partial(attention_tangent, Problem(queries=37, keys=53, sinks=True, causal=True)),
        {"attention_forward_kernel", "attention_tangent_kernel"},
    ),
    "statistics": (
        partial(statistics, Problem(queries=37, keys=53, causal=True)),
        {"query_statistics_kernel", "key_statistics_kernel", "lag_profile_kernel"},
    ),
    "mlp": (
        partial(mlp, 33, 21, 45, gated=False, strided=True),
        {"hidden_kernel", "hidden_gradient_kernel"},
    ),
    "gated mlp": (
        partial(mlp, 33, 21, 45, gated=True, strided=False),
        {"hidden_kernel", "hidden_gradient_kernel"},
    ),
    "mlp with the library's products": (
        partial(by_library, partial(mlp, 33, 32, 48, gated=False, strided=False)),
        {"activation_kernel", "activation_gradient_kernel"},
    ),
    "mlp in int8": (
        partial(mlp, 33, 16, 140, gated=False, strided=False, save="int8", chunk=20),
        {"activation_kernel", "hidden_gradient_kernel"},
    ),
    "gated mlp that keeps nothing": (
        partial(mlp, 33, 21, 45, gated=True, strided=False, save="nothing", chunk=20),
        {"hidden_kernel", "hidden_gradient_kernel"},
    ),
    "whole mlp": (
        partial(as_a_whole, partial(mlp, 70, 21, 45, gated=False, strided=True)),
        {"whole_mlp_kernel", "whole_mlp_input_kernel", "whole_mlp_weights_kernel"},
    ),
    "whole gated mlp": (
        partial(as_a_whole, partial(mlp, 70, 21, 45, gated=True, strided=False)),
        {"whole_mlp_kernel", "whole_mlp_input_kernel", "whole_mlp_weights_kernel"},
    ),
    "branch of an mlp": (
        partial(mlp, 20, 21, 24, gated=False, strided=True, norm="layer", dropout_p=0.2),
        {
            "norm_kernel",
            "hidden_kernel",
            "output_kernel",
            "output_pass_kernel",
            "hidden_gradient_kernel",
            "norm_gradient_kernel",
        },
    ),
    "branch of an mlp with the library's products": (
        partial(by_library, partial(mlp, 33, 32, 48, gated=True, strided=False, norm="rms", dropout_p=0.2)),
        {
            "norm_kernel",
            "activation_kernel",
            "output_pass_kernel",
            "activation_gradient_kernel",
            "norm_gradient_kernel",
        },
    ),
    "norms in the first product": (norms_in_products, {"moments_kernel", "hidden_kernel"}),
    "layer norm": (partial(norm, 33, 21, centred=True, strided=True), {"norm_kernel", "norm_gradient_kernel"}),
    "wide RMS norm": (
        partial(norm, 33, 43, centred=False, strided=False),
        {"norm_kernel", "norm_gradient_kernel", "norm_sums_kernel"},
    ),
    "loss": (
        partial(loss, 33, 21, 70, probabilities=False, strided=True),
        {"logits_kernel", "logit_gradient_kernel"},
    ),
    "filtered loss": (
        partial(loss, 33, 21, 70, probabilities=False, strided=True, filtered=True),
        {"logits_kernel", "logit_gradient_kernel", "kept_product_kernel"},
    ),
    "loss of probabilities": (
        partial(loss, 33, 32, 45, probabilities=True, strided=False),
        {"logits_kernel", "logit_gradient_kernel"},
    ),
    "heads": (
        partial(heads, 21, 24, interleaved=False, strided=True),
        {"heads_kernel", "heads_gradient_kernel"},
    ),
    "invariant, packed": (partial(invariant, packed=True), {"invariant_attention_kernel", *INVARIANT_BACKWARD}),
    "invariant, padded": (
        partial(invariant, packed=False),
        {"invariant_attention_kernel", "invariant_merge_kernel", *INVARIANT_BACKWARD},
    ),
    "a cache in pages": (
        partial(cache, 2, page=10, shaped=False),
        {"cache_append_kernel", "cache_attention_kernel", "cache_merge_kernel"},
    ),
    "a cache, every score feature": (
        partial(cache, 5, page=None, shaped=True),
        {"cache_append_kernel", "cache_attention_kernel", "cache_merge_kernel"},
    ),
    "an int8 cache in pages": (
        partial(quantised_cache, torch.int8, page=10, by_page=False),
        {"cache_append_kernel", "cache_attention_kernel", "cache_merge_kernel"},
    ),
    "an fp8 cache, a scale a row": (
        partial(quantised_cache, torch.float8_e4m3fn, page=None, by_page=True),
        {"cache_append_kernel", "cache_attention_kernel", "cache_merge_kernel"},
    ),
    "a chunk, values in the keys": (
        partial(cache, 7, page=10, shaped=True, absorbed=True),
        {"cache_append_kernel", "cache_attention_kernel", "cache_merge_kernel"},
    ),
    "interleaved heads": (
        partial(heads, 21, 24, interleaved=True, strided=False),
        {"heads_kernel", "heads_gradient_kernel"},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_touches_its_tensors_only_and_gives_the_same_bits_in_every_order(name: str) -> None:
    call, kernels_of_it = CALLS[name]
    assert check(call, "shuffled", "reversed") == kernels_of_it


def test_the_calls_above_run_every_kernel_there_is() -> None:
    files = [file for folder in kernels.__path__ for file in Path(folder).rglob("*.py")]
    there = {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    assert there == set().union(*(kernels_of_it for _, kernels_of_it in CALLS.values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        Problem(heads=1, key_heads=1, queries=770, keys=770, lists="global"),
        Problem(heads=1, key_heads=1, queries=130, keys=130, lists="random"),
        Problem(heads=1, key_heads=1, queries=130, keys=130, lists="bigbird"),
        Problem(bias=(1, 1, 1, 1)),
        Problem(queries=5, keys=70, scale=3e6, bias=(0, 0, 0, 0)),
        Problem(queries=0),
        Problem(keys=0, sinks=True),
    ],
    ids=["rows that share lists", "lists", "keys that count", "one bias", "huge scores", "no queries", "no keys"],
)
def test_rarer_calls_of_attention_are_sound(problem: Problem) -> None:
    check(partial(attention, problem))
    if 0 < problem.queries <= problem.keys:
        check(partial(statistics, problem))


DRAWN = settings(max_examples=5)


@pytest.mark.slow
@DRAWN
@given(problem=problems)
def test_attention_of_any_kind_is_sound(problem: Problem) -> None:
    check(partial(attention, problem))


@pytest.mark.slow
@DRAWN
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.booleans())
def test_mlps_of_any_size_are_sound(tokens: int, width: int, hidden: int, gated: bool, strided: bool) -> None:
    check(partial(mlp, tokens, width, hidden, gated=gated, strided=strided))


@pytest.mark.slow
@DRAWN
@given(st.integers(1, 40), st.integers(1, 80), st.booleans(), st.booleans())
def test_norms_of_any_size_are_sound(rows: int, width: int, centred: bool, strided: bool) -> None:
    check(partial(norm, rows, width, centred=centred, strided=strided))


@pytest.mark.slow
@DRAWN
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 140), st.booleans(), st.booleans())
def test_losses_of_any_size_are_sound(
    tokens: int, width: int, classes: int, probabilities: bool, strided: bool
) -> None:
    check(partial(loss, tokens, width, classes, probabilities=probabilities, strided=strided))


@pytest.mark.slow
@DRAWN
@given(st.integers(1, 70), st.integers(2, 30), st.booleans(), st.booleans())
def test_heads_of_any_size_are_sound(length: int, quarter: int, interleaved: bool, strided: bool) -> None:
    check(partial(heads, length, 4 * quarter, interleaved=interleaved, strided=strided))
