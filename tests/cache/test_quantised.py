"""A quantised cache: attention is that of the numbers it stands for, within stated bounds of those given.

What it stands for is worked out here from the bytes and scales in the cache, in float64.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from comparing import check_or_refusal
from hardware import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from test_attention_with_cache import BACKENDS, PROBLEMS, Cache, Problem, problems, rotated
from tolerance import assert_as_exact_as_eager
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import attention_with_cache
from fastattn.core import plans
from fastattn.core.attention.spec import AttentionSpec
from fastattn.core.cache import portable
from fastattn.core.cache.spec import CacheSpec, CacheTensors, Storage
from fastattn.kernels import cache as kernels

INT8, FP8 = torch.int8, torch.float8_e4m3fn
FORMS = tuple(itertools.product((INT8, FP8), (False, True)))


@dataclass(frozen=True)
class Quantised(Problem):
    """A call with a quantised cache: its dtype, and whether a page has one scale or each token its own."""

    stored_dtype: torch.dtype = INT8
    by_page: bool = False

    @staticmethod
    def of(problem: Problem, stored_dtype: torch.dtype, by_page: bool) -> Quantised:
        return Quantised(**vars(problem), stored_dtype=stored_dtype, by_page=by_page)


class QuantisedCache(Cache):
    """A cache of any bytes. Behind the rows' tokens, scales of tokens are NaN."""

    def __init__(self, problem: Quantised) -> None:
        super().__init__(problem)
        written = self.caches[0].isfinite().all(-1)  # (pages, heads, page)
        self.caches = [None if t is None else any_bytes(t, problem.stored_dtype) for t in self.caches]
        self.scales = [None if t is None else self.any_scales(written) for t in self.caches]

    def any_scales(self, written: Tensor) -> Tensor:
        largest = 3.0 / (127.0 if self.problem.stored_dtype == INT8 else 448.0)
        scales = (torch.rand(written.shape, device=DEVICE) + 0.1) * largest
        if self.problem.layout == "tokens first":
            scales = scales.transpose(1, 2).contiguous().transpose(1, 2)
        return scales[:, :, 0] if self.problem.by_page else scales.masked_fill_(~written, float("nan"))

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"k_scale": self.scales[0], "v_scale": self.scales[1]}

    def places(self, row: int, first: int, stop: int) -> list[tuple[int, int]]:
        page = self.problem.page or self.problem.capacity
        return [(int(self.table[row, t // page]), t % page) for t in range(first, stop)]

    def meant(self, which: int, row: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys (0) or values (1) of a row as the cache has them now, float64 (1, heads, tokens, width), and their
        scales (1, heads, tokens, 1)."""
        places = self.places(row, first, stop)
        codes, scale = self.caches[which], self.scales[which]
        numbers = torch.stack([codes[page, :, at].double() for page, at in places], 1)[None]
        scale = torch.stack([scale[page] if scale.dim() == 2 else scale[page, :, at] for page, at in places], 1)
        return numbers * scale[None, ..., None].double(), scale[None, ..., None].double()

    def tokens(self, row: int, arguments: dict[str, Any]) -> list[Tensor]:
        p, length = self.problem, self.problem.lengths[row] + self.problem.new
        if not length:
            return [torch.zeros(1, p.key_heads, 0, w, device=DEVICE).double() for w in (p.width, p.value_width)]
        k = self.meant(0, row, 0, length)[0]
        return [k, k[..., : p.value_width] if p.absorbed else self.meant(1, row, 0, length)[0]]


def any_bytes(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Random bytes that are numbers, laid out as `like`."""
    least, beyond = (-127, 128) if dtype == INT8 else (-128, 127)
    codes = torch.empty_like(like, dtype=torch.int8)
    codes.copy_(torch.randint(least, beyond, like.shape, dtype=torch.int8))
    if dtype == FP8:
        codes[codes == -1] = 0  # 0xFF is not a number, and neither is 0x7F
    return codes.view(dtype)


def allowed(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """How far the docstring lets a quantised number lie from x."""
    return scale / 2 if dtype == INT8 else torch.maximum(x.abs() / 16, scale / 1024)


def check(problem: Quantised, backend: str) -> None:
    torch.manual_seed(0)
    cache = QuantisedCache(problem)
    given = cache.arguments()
    everything = [t for t in (*cache.caches, *cache.scales) if t is not None]
    before = [as_bytes(t).clone() for t in everything]
    out, lse = attention_with_cache(cache.q, *cache.caches, **given, return_lse=True, backend=backend)
    exact, eager = cache.expected(torch.float64, given), cache.expected(problem.dtype, given)
    for found, right, plain in zip((out, lse), exact, eager, strict=True):
        assert_as_exact_as_eager(found, right, plain)
    check_new_tokens(cache, given)
    # Nothing but the new tokens and their scales was touched.
    for now, old in zip(everything, before, strict=True):
        for row, length in enumerate(problem.lengths if now.dim() > 2 else ()):
            for page, at in cache.places(row, length, length + problem.new):
                old[page, :, at] = as_bytes(now)[page, :, at]
        assert torch.equal(as_bytes(now), old)


def as_bytes(t: Tensor) -> Tensor:
    return t.view(torch.int8 if t.dtype.itemsize == 1 else torch.int32)


def check_new_tokens(cache: QuantisedCache, given: dict[str, Any]) -> None:
    """They lie within the bounds, and a token's scale makes its largest number the largest there is."""
    p = cache.problem
    largest = 127.0 if p.stored_dtype == INT8 else 448.0
    for row, length in enumerate(p.lengths if p.new else ()):
        for which, new in enumerate(cache.new):
            if new is None:
                continue
            new = new[row : row + 1]
            x = (rotated(new, length, given) if which == 0 else new).double()
            meant, scale = cache.meant(which, row, length, length + p.new)
            x = x.clamp(-largest * scale, largest * scale) if p.by_page else x
            rounding = 4 * torch.finfo(p.dtype).eps * x.abs()  # of the rotation
            assert bool(((meant - x).abs() <= allowed(x, scale, p.stored_dtype) * 1.0001 + rounding).all())
            if not p.by_page:
                torch.testing.assert_close(scale[..., 0], x.abs().amax(-1) / largest, rtol=2e-3, atol=1e-30)


CASES = {
    f"{name}, {str(dtype)[6:]}, {'page' if by_page else 'token'}": Quantised.of(problem, dtype, by_page)
    for (name, problem), (dtype, by_page) in zip(PROBLEMS.items(), itertools.cycle(FORMS), strict=False)
}
# Kernels differ in fewer ways: a scale, how it is decoded, float16, pages, tails of keys.
IN_KERNELS = {
    f"{name}, {str(dtype)[6:]}, {'page' if by_page else 'token'}": Quantised.of(PROBLEMS[name], dtype, by_page)
    for name, forms in {
        "one query, pages": FORMS,
        "everything": ((FP8, False), (INT8, True)),
        "half precision": ((FP8, False), (INT8, True)),
        "absorbed, a chunk": ((FP8, True), (INT8, False)),
        "pages of tokens first": ((FP8, False),),
        "starts, one query, pages": ((INT8, False),),
        "negative scale": ((INT8, False),),
        "values of their own width": ((FP8, True),),
    }.items()
    for dtype, by_page in forms
}


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_attention_to_what_the_cache_stands_for(name: str, backend: str) -> None:
    check(CASES[name], backend)


@pytest.mark.parametrize("name", IN_KERNELS)
def test_the_kernels_attend_to_what_the_cache_stands_for(name: str) -> None:
    check(IN_KERNELS[name], "triton")


def test_the_kernels_take_no_float64() -> None:
    check_or_refusal(check, Quantised.of(PROBLEMS["float64"], INT8, False), "triton", "float64")


def test_invariant_calls_read_quantised_caches_too_but_not_in_the_kernels() -> None:
    problem = Quantised.of(PROBLEMS["one query, pages"], FP8, False)
    cache = QuantisedCache(problem)
    asked = cache.arguments() | {"invariant": True}
    found, (exact, _) = attention_with_cache(cache.q, *cache.caches, **asked), cache.expected(torch.float64, asked)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"cannot compute this call .*: no invariant, int8 and fp8 caches"):
        attention_with_cache(cache.q, *cache.caches, **asked, backend="triton")


def test_keys_that_are_split_over_programs_are_merged_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SPLIT", 16)
    check(Quantised.of(PROBLEMS["a chunk"], FP8, False), "triton")


@pytest.mark.parametrize("by_page", [False, True])
def test_parts_that_are_dequantised_one_by_one_are_merged_exactly(
    by_page: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portable, "COPIED", 16 * 2 * 16)
    for problem in (
        Problem(),
        Problem(page=16),
        Problem(new=5, alibi=True, sinks=True),
        Problem(starts=(2, 0, 20)),
    ):
        check(Quantised.of(problem, INT8, by_page), "portable")


@given(problems(), st.sampled_from(FORMS))
def test_any_call_is_attention_to_what_the_cache_stands_for(problem: Problem, form: tuple) -> None:
    check(Quantised.of(problem, *form), "portable")


# ---- the numbers themselves ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("by_page", [False, True])
def test_every_byte_is_the_number_that_its_dtype_says(dtype: torch.dtype, by_page: bool, backend: str) -> None:
    """Of a row of one token, attention is the value."""
    codes = torch.arange(256).to(torch.uint8).view(dtype).view(16, 1, 1, 16).to(DEVICE)
    numbers = codes.double().masked_fill(codes.view(torch.int8) == -128, float("nan") if by_page else -128.0)
    numbers = codes.double() if dtype == FP8 else numbers
    scale = torch.full((16, 1) if by_page else (16, 1, 1), 0.375, device=DEVICE)
    keys = torch.zeros(codes.shape, device=DEVICE).to(dtype)
    out = attention_with_cache(
        torch.zeros(16, 1, 1, 16, device=DEVICE), keys, codes, k_scale=scale, v_scale=scale, cache_lengths=1,
        backend=backend,
    )  # fmt: skip
    expected = (numbers * 0.375).view(16, 1, 1, 16)
    # A token's scale tells of NaN, so that its bytes need not.
    known = expected.isfinite() if not by_page else torch.ones_like(expected, dtype=torch.bool)
    known &= ~((codes.view(torch.int8) == -128) & (dtype == INT8) & (not by_page))
    torch.testing.assert_close(out.double()[known], expected[known], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_every_number_becomes_the_nearest_byte(dtype: torch.dtype, backend: str) -> None:
    """All of float16, ties and subnormal numbers included, and NaN. PyTorch's own conversion is right."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).view(1, 1, 512, 128)
    largest = 127.0 if dtype == INT8 else 448.0
    right = x.float().clamp(-largest, largest)
    right = right.round().nan_to_num(nan=-128.0).to(INT8) if dtype == INT8 else right.to(FP8)
    cache = torch.zeros(x.shape).to(DEVICE, dtype)
    scale = torch.ones(1, 1, device=DEVICE)
    attention_with_cache(
        x[:, :, :0].to(DEVICE), cache, None, k=x.to(DEVICE), k_scale=scale, cache_lengths=0, value_width=16,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(cache.cpu().float(), right.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype, by_page", FORMS)
def test_every_backend_writes_the_same_bytes(dtype: torch.dtype, by_page: bool) -> None:
    """Zeros, tiny numbers, huge ones, NaN and infinity among them."""
    torch.manual_seed(0)
    k = torch.randn(1, 2, 9, 24, device=DEVICE) * torch.tensor([1, 1e-3, 1e30, 1e-38, 1e-44, 0, 1, 1, 1e-41])[
        :, None
    ].to(DEVICE)
    k[0, 0, 6, 3], k[0, 1, 7, 5], k[0, 0, 7, 2] = float("nan"), float("inf"), float("-inf")
    written = []
    for backend in BACKENDS:
        cache = torch.zeros(1, 2, 16, 24, device=DEVICE).to(dtype)
        scale = torch.full(cache.shape[: 2 if by_page else 3], 0.01, device=DEVICE)
        attention_with_cache(
            k[:, :, :0], cache, None, k=k, k_scale=scale, cache_lengths=2, value_width=8, backend=backend
        )
        written.append((cache.float() * (scale[..., None] if not by_page else 1.0), scale))
    for codes, scale in written:
        torch.testing.assert_close(codes, written[0][0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(scale, written[0][1], rtol=0, atol=0, equal_nan=True)
    numbers = written[0][0][0, :, 2:11]
    if by_page:
        assert bool(numbers[0, 6, 3].isnan()) == (dtype == FP8) and numbers[1, 7, 5] == (
            127 if dtype == INT8 else 448
        )
    else:
        assert bool(numbers[0, 6].isnan().all()) and bool(numbers[1, 7].isnan().any())
        assert bool(numbers[:, [0, 1, 2, 5]].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, by_page", FORMS)
@pytest.mark.parametrize("wrong", ["a key", "a value"])
def test_what_is_not_a_number_stays_that_and_harms_no_other_head(
    wrong: str, dtype: torch.dtype, by_page: bool, backend: str
) -> None:
    k, v = torch.randn(2, 1, 2, 3, 16, device=DEVICE)
    caches = [torch.zeros(1, 2, 16, 16, device=DEVICE).to(dtype) for _ in "kv"]
    scales = [torch.full((1, 2) if by_page else (1, 2, 16), 0.1, device=DEVICE) for _ in "kv"]
    (k if wrong == "a key" else v)[0, 1, 1, 2] = float("nan")
    out = attention_with_cache(
        torch.randn(1, 2, 3, 16, device=DEVICE), *caches, k=k, v=v, k_scale=scales[0], v_scale=scales[1],
        cache_lengths=0, backend=backend,
    )  # fmt: skip
    assert not out[0, 0].isnan().any() and out[0, 1, 2].isnan().any()


@given(
    st.sampled_from([INT8, FP8]), st.integers(1, 40), st.floats(0.01, 3.0), st.sampled_from([0.0, 2.0]),
    st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_attention_moves_no_further_than_stated(
    dtype: torch.dtype, length: int, size: float, softcap: float, sinks: bool, seed: int
) -> None:
    """Away from what it is without quantisation: by s * max|v| + dv, the log-sum-exp by s."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, length, 16, dtype=torch.float64)
    k *= size
    caches = [torch.zeros(1, 2, length, 16).to(dtype) for _ in "kv"]
    scales = torch.zeros(2, 1, 2, length)
    options = {"softcap": softcap, "sinks": torch.randn(2).double() if sinks else None, "return_lse": True}
    out, lse = attention_with_cache(
        q, *caches, k=k, v=v, k_scale=scales[0], v_scale=scales[1], cache_lengths=0, **options
    )
    expected, expected_lse = fastattn.attention(q, k, v, causal=True, **options)
    dk, dv = (
        allowed(x, scale[..., None].double(), dtype).amax((2, 3)) for x, scale in zip((k, v), scales, strict=True)
    )
    s = 16**-0.5 * q.abs().sum(-1).amax(-1) * dk
    bound = s * v.abs().amax((2, 3)) + dv
    assert bool(((out - expected).abs().amax((2, 3)) <= bound * 1.0001).all())
    assert bool(((lse - expected_lse).abs().amax(2) <= s * 1.0001).all())


# ---- beside it ----


@pytest.mark.parametrize("backend", ["portable", "triton"])
@pytest.mark.parametrize("queries", [1, 3])
def test_the_bits_of_a_row_depend_on_that_row_alone(
    queries: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SPLIT", 16)
    monkeypatch.setattr(portable, "COPIED", 16 * 2 * 16)
    lengths = torch.tensor([40, 40, 3, 33], dtype=torch.int32, device=DEVICE)
    q = torch.randn(4, 4, queries, 16, device=DEVICE)
    codes = [any_bytes(torch.empty(4, 2, 48, 16, device=DEVICE), FP8) for _ in "kv"]
    scales = torch.rand(2, 4, 2, 48, device=DEVICE) * 0.01
    together = attention_with_cache(
        q, *codes, k_scale=scales[0], v_scale=scales[1], cache_lengths=lengths, backend=backend
    )
    for b in range(4):
        end = int(lengths[b])
        k, v = (t[b : b + 1, :, :end] for t in codes)
        k_scale, v_scale = (t[b : b + 1, :, :end] for t in scales)
        alone = attention_with_cache(
            q[b : b + 1], k, v, k_scale=k_scale, v_scale=v_scale, cache_lengths=end, backend=backend
        )
        assert torch.equal(alone[0], together[b]), b


@pytest.mark.parametrize("queries", [1, 3])
def test_no_more_than_a_part_of_a_cache_is_dequantised_at_a_time(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, Tensor) and t.is_floating_point() and t.dtype.itemsize > 1:
                    self.numel = max(self.numel, t.untyped_storage().nbytes() // t.itemsize)
            return out

    monkeypatch.setattr(portable, "COPIED", 2048)
    keys = torch.zeros(4, 4, 512, 16, dtype=INT8)
    scale = torch.zeros(4, 4, 1)[:, :, 0]
    # Else the mode would see one operator, not what it calls.
    with mock.patch.object(plans, "watched", return_value=False), Largest() as largest:
        attention_with_cache(
            torch.randn(4, 4, queries, 16), keys, keys, k_scale=scale, v_scale=scale, cache_lengths=512,
            backend="portable",
        )  # fmt: skip
    assert 0 < largest.numel <= (2048 if queries == 1 else 512 * 16)


def call(**changed: Any) -> Tensor:
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16)
    cache, scale = torch.full((2, 6, 2, 16, 16), 7, dtype=INT8), torch.full((2, 6, 2, 16), 5.0)
    asked: dict[str, Any] = {
        "q": q, "k_cache": cache[0], "v_cache": cache[1], "k": k, "v": v, "cache_lengths": torch.tensor([1, 20]),
        "block_table": torch.tensor([[0, 5], [3, 1]]), "k_scale": scale[0], "v_scale": scale[1],
    }  # fmt: skip
    asked |= changed
    try:
        return attention_with_cache(**asked)
    except BaseException:
        assert bool((cache == 7).all()) and bool((scale == 5.0).all()), "the cache was touched"
        raise


FLOATS = torch.zeros(6, 2, 16, 16)
WRONG = (
    ({"k_scale": None}, ValueError, r"k_scale must be given for a k_cache of torch.int8, got None"),
    ({"v_scale": None}, ValueError, r"v_scale must be given for a v_cache of torch.int8, got None"),
    ({"k_scale": torch.zeros(6, 2, 16).double()}, TypeError, r"k_scale must be float32, got torch.float64"),
    ({"k_scale": torch.zeros(6, 2, 15)}, ValueError, r"k_scale must have shape \(6, 2, 16\) or \(6, 2\), got"),
    ({"k_scale": 0.5}, TypeError, r"k_scale must be a torch.Tensor, got float"),
    ({"v_scale": torch.zeros(6, 2)}, ValueError, r"v_scale must have k_scale's 3 dimensions, got 2"),
    ({"v_cache": torch.zeros(6, 2, 16, 16).to(FP8)}, TypeError, r"v_cache must have k_cache's dtype torch.int8"),
    ({"v_cache": FLOATS, "k_cache": FLOATS}, ValueError, r"k_scale must be None beside a k_cache of torch.f"),
    ({"v_cache": None, "v": None}, ValueError, r"v_scale must be None where v_cache is None, got a tensor"),
    ({"k": torch.randn(2, 2, 3, 16).half()}, TypeError, r"k must have q's dtype torch.float32, got torch.float16"),
    ({"k_cache": torch.zeros(6, 2, 16, 16, dtype=torch.uint8)}, TypeError,
     r"k_cache must be float16, bfloat16, .* or quantised: int8 or float8_e4m3fn; got torch.uint8"),
    ({"k_scale": torch.eye(6)[:, :2], "v_scale": torch.ones(6, 2)}, ValueError,
     r"k_scale must be positive for pages that are written, got 0.0"),
    ({"k_descale": torch.zeros(2, 2)}, TypeError, r"'k_descale'; it is called k_scale= here"),
    ({"cache_lengths": torch.tensor([1, 30])}, ValueError, r"cache_lengths must be at most 29"),
    ({"k_scale": torch.zeros(6, 2, 16, requires_grad=True)}, ValueError, r"computes no gradients"),
)  # fmt: skip


@pytest.mark.parametrize("changed, kind, words", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_bad_input_is_refused_and_the_cache_is_not_touched(changed: dict, kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        call(**changed)


def test_the_call_that_the_refusals_change_is_right() -> None:
    assert call().shape == (2, 4, 3, 16)


def test_the_operators_pass_pytorch_s_own_checks() -> None:
    cache, scale = torch.zeros(2, 5, 2, 16, 8, dtype=INT8), torch.ones(2, 5, 2, 16)
    k = torch.randn(2, 2, 3, 8)
    table, lengths = torch.tensor([[0, 4], [2, 1]]).int(), torch.tensor([4, 20]).int()
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    library.opcheck(
        torch.ops.fastattn.cache_append,
        (*cache, *scale, k, k, lengths, table, False, "portable"),
        test_utils=tests,
    )
    library.opcheck(
        torch.ops.fastattn.cache_attention,
        (torch.randn(2, 4, 3, 8), *cache, *scale, lengths, None, table, None, None, None, 8, True, 0.3, None, None,
         0.0, "ieee", False, False, "portable"), test_utils=tests,
    )  # fmt: skip


def test_a_compiled_decoding_step_writes_in_place_and_gives_the_same() -> None:
    def step(q: Tensor, k: Tensor, cache: Tensor, scale: Tensor, lengths: Tensor) -> Tensor:
        return attention_with_cache(
            q, cache[0], cache[1], k=k, v=k, k_scale=scale[0], v_scale=scale[1], cache_lengths=lengths
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    one, other = ((torch.zeros(2, 2, 2, 16, 8, dtype=INT8), torch.zeros(2, 2, 2, 16)) for _ in range(2))
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    with torch.no_grad():
        for _ in range(2):
            q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8)
            torch.testing.assert_close(compiled(q, k, *other, lengths), step(q, k, *one, lengths))
            lengths = lengths + 1
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and bool(one[0].any())


def test_under_autocast_new_tokens_are_quantised_in_autocast_s_dtype() -> None:
    cache, scale = torch.zeros(1, 2, 16, 16, dtype=INT8), torch.zeros(1, 2, 16)
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_with_cache(
            q, cache, cache.clone(), k=k, v=k, k_scale=scale, v_scale=scale.clone(), cache_lengths=3
        )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(scale[:, :, 3], k[:, :, 0].bfloat16().float().abs().amax(-1) / 127)


def test_a_kernel_reads_no_scale_behind_a_row_and_says_what_a_gpu_cannot_refuse() -> None:
    """A page that does not exist makes its row NaN, and nothing is written for it; a scale that is not positive
    makes what is written NaN."""
    table = torch.tensor([[0, 1], [3, 9]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([20, 20], dtype=torch.int32, device=DEVICE)
    codes = any_bytes(torch.empty(5, 2, 16, 16, device=DEVICE), INT8)
    scale = torch.rand(5, 2, 16, device=DEVICE)
    scale[1, :, 4:] = float("nan")
    storage = Storage(codes, codes.clone(), scale, scale.clone())
    before = [t.clone() for t in storage]
    k = torch.randn(2, 2, 2, 16, device=DEVICE)
    tensors = CacheTensors(lengths, block_table=table)
    kernels.cache_append(storage, k, k, tensors)
    for now, old in zip(storage, before, strict=True):
        changed = (now != old).view(5, 2, 16, -1).any(-1).any(1) & ~now.view(5, 2, 16, -1).float().isnan().any(
            -1
        ).any(1)
        assert {tuple(at) for at in changed.nonzero().tolist()} <= {(1, 2), (1, 3)}
    q = torch.randn(2, 4, 1, 16, device=DEVICE)
    out, _ = kernels.cache_attention(q, storage, CacheSpec(AttentionSpec(True, 0.3), 16), tensors)
    assert bool(out[0].isfinite().all()) and bool(out[1].isnan().all())
    by_page = Storage(codes, None, torch.zeros(5, 2, device=DEVICE))
    kernels.cache_append(by_page, k, None, tensors)
    assert bool((codes[1, :, 2:4] == -128).all())


def test_the_problems_cover_every_form() -> None:
    every = {(p.stored_dtype, p.by_page) for p in CASES.values()}
    assert every == set(FORMS) == {(p.stored_dtype, p.by_page) for p in IN_KERNELS.values()}
    assert dataclasses.fields(Quantised)[-1].name == "by_page"
