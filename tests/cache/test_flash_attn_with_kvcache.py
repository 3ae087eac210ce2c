"""flash-attn's `flash_attn_with_kvcache`, and keys in pages of packed sequences, by what flash-attn documents."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hardware import DEVICE
from torch import Tensor

import fastattn
from fastattn.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

T = torch.tensor
LENGTHS = T([5, 0, 21], dtype=torch.int32, device=DEVICE)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def test_arguments_are_those_of_flash_attn() -> None:
    parameters = inspect.signature(flash_attn_with_kvcache).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False, "
        # Two of flash-attn 3's.
        "k_descale=None, v_descale=None"
    )


class Inputs(NamedTuple):
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None = None
    v: Tensor | None = None


def inputs(queries: int = 2, new: int = 2, rows: int = 3) -> Inputs:
    torch.manual_seed(0)
    caches = randn(rows, 24, 2, 16), randn(rows, 24, 2, 16)
    fresh = (randn(3, new, 2, 16), randn(3, new, 2, 16)) if new else ()
    return Inputs(randn(3, queries, 4, 16), *caches, *fresh)


def turned(x: Tensor, positions: list[int], cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (L, H, D), its rows at these positions, pair by pair as flash-attn's rotary embedding says."""
    half, x = cos.shape[1], x.clone()
    for row, at in enumerate(positions):
        for pair in range(half):
            i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
            a, b = x[row, :, i].clone(), x[row, :, j].clone()
            x[row, :, i] = a * cos[at, pair] - b * sin[at, pair]
            x[row, :, j] = b * cos[at, pair] + a * sin[at, pair]
    return x


def expected(given: Inputs, rows: list[int], options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """out, the log-sum-exp and the cache of keys, row by row by flash-attn's words."""
    outs, lses, k_cache = [], [], given.k_cache.clone()
    v_cache, left, right = given.v_cache.clone(), *options.get("window_size", (-1, -1))
    for b, row in enumerate(rows):
        length, q = int(LENGTHS[b]), given.q[b]
        if given.k is not None:
            new = given.k.shape[1]
            k = given.k[b]
            if "rotary_cos" in options:
                how = options["rotary_cos"], options["rotary_sin"], options.get("rotary_interleaved", True)
                k = turned(k, list(range(length, length + new)), *how)
                moves = options.get("causal") or (left, right) != (-1, -1)
                q = turned(q, [length + i * bool(moves) for i in range(len(q))], *how)
            k_cache[row, length : length + new], v_cache[row, length : length + new] = k, given.v[b]
            length += new
        begin = int(options["cache_leftpad"][b]) if "cache_leftpad" in options else 0
        out, lse = fastattn.attention(
            q.transpose(0, 1)[None], k_cache[row, begin:length].transpose(0, 1)[None],
            v_cache[row, begin:length].transpose(0, 1)[None], causal=options.get("causal", False),
            window=(None if left < 0 else left, None if right < 0 else right), softcap=options.get("softcap", 0.0),
            scale=options.get("softmax_scale"), alibi_slopes=options.get("alibi_slopes"), return_lse=True,
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.stack(outs), torch.stack(lses), k_cache


ANGLES = torch.rand(24, 6, device=DEVICE) * 6
ROTARY = {"rotary_cos": ANGLES.cos(), "rotary_sin": ANGLES.sin()}
OPTIONS = {
    "nothing": (inputs(), {}),
    "causal": (inputs(), {"causal": True, "softmax_scale": 0.3, "num_splits": 3}),
    "window": (inputs(), {"window_size": (4, 0), "softcap": 3.0}),
    "no new tokens": (inputs(new=0), {"causal": True}),
    "ALiBi": (inputs(new=1), {"alibi_slopes": torch.rand(4, device=DEVICE)}),
    "left padding": (inputs(), {"cache_leftpad": T([2, 0, 20], dtype=torch.int32, device=DEVICE), "causal": True}),
    "rotary": (inputs(), ROTARY | {"causal": True}),
    "rotary, halves": (inputs(), ROTARY | {"causal": True, "rotary_interleaved": False}),
    "rotary, all queries at one position": (inputs(queries=3, new=1), ROTARY),
    "rotary, fewer new tokens than queries": (inputs(queries=2, new=1), ROTARY | {"causal": True}),
    "rotary, window": (inputs(queries=2, new=1), ROTARY | {"window_size": (4, 4)}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_does_what_flash_attn_documents(name: str) -> None:
    given, options = OPTIONS[name]
    out, lse, keys = expected(given, [0, 1, 2], options)
    k_cache, v_cache = given.k_cache.clone(), given.v_cache.clone()
    call = given._replace(k_cache=k_cache, v_cache=v_cache)._asdict() | options
    found, found_lse = flash_attn_with_kvcache(**call, cache_seqlens=LENGTHS, return_softmax_lse=True)
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(found_lse, lse)
    torch.testing.assert_close(k_cache, keys)


def test_rows_of_the_cache_are_chosen_by_number() -> None:
    given = inputs(rows=5)
    out, lse, keys = expected(given, [4, 0, 2], {"causal": True})
    found, found_lse = flash_attn_with_kvcache(
        **given._asdict(),
        cache_seqlens=LENGTHS,
        cache_batch_idx=T([4, 0, 2]),
        causal=True,
        return_softmax_lse=True,
    )
    torch.testing.assert_close((found, found_lse, given.k_cache), (out, lse, keys))


def test_pages_are_read_and_written_through_the_table() -> None:
    given = inputs()
    out, _, keys = expected(given, [0, 1, 2], ROTARY | {"causal": True})
    table = torch.randperm(13)[:12].view(3, 4)
    pages = []
    for cache in (given.k_cache, given.v_cache):
        pool = torch.full((13, 6, 2, 16), float("nan"))
        pool[table] = cache.unflatten(1, (4, 6))
        pages.append(pool)
    found = flash_attn_with_kvcache(
        given.q, *pages, given.k, given.v, **ROTARY, cache_seqlens=LENGTHS, block_table=table, causal=True
    )
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(pages[0][table].flatten(1, 2), keys)


def test_without_lengths_the_cache_is_full() -> None:
    given = inputs(new=0)
    found = flash_attn_with_kvcache(*given[:3], causal=True)
    out = fastattn.attention(*(t.transpose(1, 2) for t in given[:3]), causal=True).transpose(1, 2)
    torch.testing.assert_close(found, out)


@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_descales_are_what_a_quantised_cache_is_multiplied_by(dtype: torch.dtype, new: int) -> None:
    given = inputs(new=new)
    scales = {f"{name}_descale": torch.rand(3, 2, device=DEVICE) + 0.5 for name in "kv"}
    stored = [(t * 9).round().to(dtype) for t in (given.k_cache, given.v_cache)]
    if new:
        # New tokens that the cache holds exactly.
        fresh = [t.sign() * scale[:, None, :, None] for t, scale in zip(given[3:], scales.values(), strict=True)]
        given = given._replace(k=fresh[0], v=fresh[1])
    found = flash_attn_with_kvcache(given.q, *stored, *given[3:], cache_seqlens=LENGTHS, causal=True, **scales)
    there = [t.float() * s[:, None, :, None] for t, s in zip(stored, scales.values(), strict=True)]
    read = flash_attn_with_kvcache(given.q, *there, cache_seqlens=LENGTHS + new, causal=True)
    torch.testing.assert_close(found, read)
    if new:
        torch.testing.assert_close(there[0][2, 21:23], given.k[2])


GIVEN = inputs()
SCALE = torch.ones(3, 2)
ERRORS = (
    ({"cache_seqlens": None}, "cache_seqlens must be given where there are new tokens or pages"),
    ({"cache_seqlens": 23}, "cache_seqlens must be at most 22 with 2 new tokens, got 23"),
    ({"cache_leftpad": T([1, 2])}, r"cache_leftpad must have shape \(3,\)"),
    ({"cache_batch_idx": T([0, 1, 9])}, "cache_batch_idx must list pages from 0 to 2 .* got 9"),
    ({"cache_batch_idx": T([1, 2])}, r"cache_batch_idx must have shape \(3,\)"),
    ({"cache_batch_idx": T([0, 1, 2]), "block_table": T([[0], [1], [2]])}, "cache_batch_idx must be None beside"),
    ({"k": None, "v": None, **ROTARY}, "rotary_cos must be None where there are no new tokens"),
    ({"rotary_cos": ANGLES}, "rotary_cos and rotary_sin must come together"),
    ({"rotary_cos": ANGLES[:22], "rotary_sin": ANGLES[:22], "cache_seqlens": 21}, "rotary_cos must have a row"),
    ({"k": GIVEN.k.clone().requires_grad_()}, "flash_attn_with_kvcache computes no gradients"),
    ({"k": GIVEN.k[0]}, r"k must have shape \(batch, length, heads, width\)"),
    ({"num_splits": -1}, "num_splits must be at least 0"),
    ({"softmax_scale": float("inf")}, "softmax_scale must be finite"),
    ({"k_descale": SCALE}, "k_descale must be None beside a k_cache of torch.float32"),
    ({"k_cache": GIVEN.k_cache.char(), "v_cache": GIVEN.v_cache.char()}, "k_descale must be given for"),
    ({"k_descale": SCALE[0]}, r"k_descale must have shape \(3, 2\), got \(2,\)"),
    ({"v_descale": SCALE, "block_table": T([[0], [1], [2]])}, "v_descale must be None beside a block_table"),
    ({"v_descale": SCALE, "cache_batch_idx": T([0, 1, 2])}, "beside a block_table or cache_batch_idx"),
)  # fmt: skip


@pytest.mark.parametrize("changed, words", ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_errors_name_flash_attn_s_arguments_and_leave_the_cache(changed: dict, words: str) -> None:
    k_cache = GIVEN.k_cache.clone()
    given = GIVEN._replace(k_cache=k_cache)._asdict() | {"cache_seqlens": LENGTHS} | changed
    with pytest.raises(ValueError, match=words):
        flash_attn_with_kvcache(**given)
    assert torch.equal(k_cache, GIVEN.k_cache)


def test_a_compiled_step_is_one_graph() -> None:
    given, other = inputs(), inputs()
    step = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = step(*given, **ROTARY, cache_seqlens=LENGTHS, causal=True)
    torch.testing.assert_close(
        found, flash_attn_with_kvcache(*other, **ROTARY, cache_seqlens=LENGTHS, causal=True)
    )
    torch.testing.assert_close(given.k_cache, other.k_cache)


# ---- packed sequences ----

COUNTS, KEYS = [3, 1, 0, 1, 3], [7, 9, 4, 1, 2]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


SLOPES = torch.rand(5, 4)
PACKED = (
    {"causal": True},
    {"window": (3, 1)},
    {"alibi_slopes": SLOPES, "softcap": 2.0},
    {"sinks": torch.randn(4)},
)


@pytest.mark.parametrize("options", PACKED, ids=lambda options: "-".join(options))
def test_packed_sequences_with_keys_in_pages_are_those_with_packed_keys(options: dict[str, Any]) -> None:
    q, k, v = torch.randn(sum(COUNTS), 4, 16), torch.randn(sum(KEYS), 2, 16), torch.randn(sum(KEYS), 2, 8)
    cu = cumulative(COUNTS), cumulative(KEYS)
    table = torch.randperm(20)[:15].view(5, 3)
    pages = [torch.full((20, 4, 2, w), float("nan")) for w in (16, 8)]
    for pool, packed in zip(pages, (k, v), strict=True):
        for row, part in enumerate(packed.split(KEYS)):
            for t, token in enumerate(part):
                pool[table[row, t // 4], t % 4] = token
    out, lse = fastattn.attention_varlen(q, k, v, *cu, **options, return_lse=True)
    for cu_k, used in ((cu[1], None), (None, torch.tensor(KEYS))):
        found, found_lse = fastattn.attention_varlen(
            q, *pages, cu[0], cu_k, seqused_k=used, block_table=table, **options, return_lse=True
        )
        torch.testing.assert_close(found, out)
        torch.testing.assert_close(found_lse, lse)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("options", PACKED[1:3], ids=lambda options: "-".join(options))
def test_sequences_of_one_length_give_what_they_give_before_tokens_that_belong_to_none(
    options: dict[str, Any], count: int
) -> None:
    pages, table = torch.randn(2, 20, 4, 2, 16), torch.randperm(20)[:15].view(5, 3)
    q, cu = torch.randn(5 * count, 4, 16), torch.arange(6) * count
    results = [
        fastattn.attention_varlen(
            tokens, *pages, cu, None, seqused_k=torch.tensor(KEYS), block_table=table, **options, return_lse=True
        )
        for tokens in (q, torch.cat((q, torch.randn(1, 4, 16))))
    ]
    (out, lse), (more, more_lse) = results
    assert torch.equal(out, more[:-1]) and torch.equal(lse, more_lse[:, :-1])
    assert out.is_contiguous() and lse.is_contiguous()


@pytest.mark.parametrize("options", PACKED, ids=lambda options: "-".join(options))
def test_room_behind_the_keys_of_a_sequence_is_not_seen(options: dict[str, Any]) -> None:
    q, k, v = torch.randn(sum(COUNTS), 4, 16), torch.randn(sum(KEYS), 2, 16), torch.randn(sum(KEYS), 2, 8)
    k.requires_grad_()
    room = [n + 3 for n in KEYS]
    wide = [
        torch.cat([F.pad(part, (0, 0, 0, 0, 0, 3), value=float("nan")) for part in t.split(KEYS)]) for t in (k, v)
    ]
    out = fastattn.attention_varlen(q, k, v, cumulative(COUNTS), cumulative(KEYS), **options)
    found = fastattn.attention_varlen(
        q, *wide, cumulative(COUNTS), cumulative(room), seqused_k=torch.tensor(KEYS), num_splits=1, **options
    )
    torch.testing.assert_close(found, out)
    gradients = [torch.autograd.grad(t.square().sum(), k)[0] for t in (found, out)]
    torch.testing.assert_close(*gradients)


def test_torch_s_request_for_the_log_sum_exp_is_understood() -> None:
    class AuxRequest(NamedTuple):
        lse: bool = False

    q, cu = torch.randn(5, 2, 8), torch.tensor([0, 2, 5])
    out, lse = fastattn.attention_varlen(q, q, q, cu, cu, return_aux=AuxRequest(True))
    assert out.shape == (5, 2, 8) and lse.shape == (2, 5)
    assert isinstance(fastattn.attention_varlen(q, q, q, cu, cu, return_aux=AuxRequest()), Tensor)
    with pytest.raises(TypeError, match="return_aux must be None or have a field lse"):
        fastattn.attention_varlen(q, q, q, cu, cu, return_aux=True)


def varlen(**changed: Any) -> Tensor:
    q, pages, cu = torch.randn(5, 2, 8), torch.randn(4, 4, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    given: dict[str, Any] = {
        "q": q, "k": pages, "v": pages, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 3,
        "max_seqlen_k": 3, "block_table": torch.tensor([[0, 1], [2, 3]]),
    }  # fmt: skip
    return flash_attn_varlen_func(**(given | changed))


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"dropout_p": 0.1}, "dropout_p must be 0 beside block_table"),
        ({"cu_seqlens_k": None}, "cu_seqlens_k or seqused_k must tell"),
        ({"cu_seqlens_k": T([0, 2, 12])}, "lengths in cu_seqlens_k must be at most 8, got 10"),
        ({"seqused_k": T([2, 10])}, "lengths in seqused_k must be at most 8, got 10"),
        ({"cu_seqlens_k": T([0, 2])}, "cu_seqlens_k must have a row for each of the 2 sequences"),
        ({"cu_seqlens_q": T([0, 2, 6])}, "cu_seqlens_q ends with 6, expected at most 5"),
        ({"block_table": T([[0, 1]])}, "block_table must have a row for each of the 2 sequences"),
        ({"block_table": T([[0, 1], [9, 3]])}, "block_table must list pages from 0 to 3"),
        ({"seqused_k": T([1])}, "seqused_k must have a row for each of the 2 sequences"),
        ({"k": torch.randn(4, 2, 8)}, r"k must have shape \(pages, page, heads, width\)"),
        ({"block_table": None, "k": torch.randn(5, 2, 8), "v": torch.randn(5, 2, 8), "seqused_k": T([3, 1])},
         "seqused_k must have a length for each of the 2 sequences, from 0 to the room"),
        ({"q": torch.randn(5, 2, 8, requires_grad=True)}, "attention_varlen computes no gradients"),
    ],
)  # fmt: skip
def test_bad_pages_of_packed_sequences_are_named(changed: dict, words: str) -> None:
    assert varlen().shape == (5, 2, 8)
    with pytest.raises(ValueError, match=words):
        varlen(**changed)
