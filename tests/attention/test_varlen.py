"""Packed sequences, flash-attn's names, BigBird inside attention, set encoders and latent queries."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from attention_problems import run
from hardware import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from tolerance import assert_as_exact_as_eager
from torch import Tensor

import fastattn
from fastattn import flash_attn, masks
from fastattn.measuring.measure import peak_memory
from fastattn.nn import TransformerModel

BACKENDS = ("portable", "reference")

randn, rand, arange = (partial(make, device=DEVICE) for make in (torch.randn, torch.rand, torch.arange))


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def packed_inputs(queries: list[int], keys: list[int], width=16, value_width=16, heads=4, key_heads=2):
    return (
        randn(sum(queries), heads, width),
        randn(sum(keys), key_heads, width),
        randn(sum(keys), key_heads, value_width),
    )


def sequence_by_sequence(q, k, v, *learned, queries, keys, slopes=None, **options) -> tuple[Tensor, Tensor]:
    """The definition: the reference of each sequence alone; out (tokens, H, Dv) and lse (H, tokens)."""
    sinks = learned[0] if learned else None
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], [q.new_zeros(q.shape[1], 0)]
    for s, (q_, k_, v_) in enumerate(zip(q.split(queries), k.split(keys), v.split(keys), strict=True)):
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[s]
        heads_first = (t.transpose(0, 1)[None] for t in (q_, k_, v_))
        out, lse = fastattn.attention(
            *heads_first, **options, sinks=sinks, alibi_slopes=own, return_lse=True, backend="reference"
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def assert_packed_is_each_alone(queries, keys, *, inputs, learned=(), slopes=None, backend, **options) -> None:
    def ours(q, k, v, *learned_):
        sinks = learned_[0] if learned_ else None
        return fastattn.attention_varlen(
            q, k, v, starts(queries), starts(keys), **options, sinks=sinks, alibi_slopes=slopes, return_lse=True,
            backend=backend,
        )  # fmt: skip

    definition = partial(sequence_by_sequence, queries=queries, keys=keys, slopes=slopes, **options)
    upstream = randn(*inputs[0].shape[:2], inputs[2].shape[2]), randn(inputs[0].shape[1::-1])
    upstream = upstream[0].to(inputs[0].dtype), upstream[1]
    given_ = (*inputs, *learned)
    actual = run(given_, upstream, ours)
    eager = run(given_, upstream, definition)
    exact = run([t.double() for t in given_], [t.double() for t in upstream], definition)
    for position, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        assert_as_exact_as_eager(a, x, e, gradient=position >= 2)


# Packed sequences


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_scale_may_be_a_tensor_for_all_heads_or_for_each_as_attentions(shape: tuple, backend: str) -> None:
    queries, keys = [3, 0, 9], [5, 2, 9]
    inputs = (*packed_inputs(queries, keys), rand(shape) + 0.1)
    upstream = randn(12, 4, 16), randn(4, 12)

    def ours(q, k, v, scale):
        options = {"scale": scale, "return_lse": True, "backend": backend}
        return fastattn.attention_varlen(q, k, v, starts(queries), starts(keys), **options)

    def definition(q, k, v, scale):
        return sequence_by_sequence(q, k, v, queries=queries, keys=keys, scale=scale)

    actual, eager = (run(inputs, upstream, f) for f in (ours, definition))
    exact = run([t.double() for t in inputs], [t.double() for t in upstream], definition)
    for position, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        # The gradient of a scale is a sum over all pairs of a head, of terms of the size of a product.
        tiny = 4e-6 * (16.0 if position == 5 else 1.0)
        assert_as_exact_as_eager(a, x, e, gradient=position >= 2, tiny=tiny)


def test_a_scale_of_each_sequence_is_refused_by_name() -> None:
    q, k, v = packed_inputs([3, 4], [3, 4])
    with pytest.raises(ValueError, match=r"scale must have shape \(\) or \(4,\), got \(2, 4\)"):
        fastattn.attention_varlen(q, k, v, starts([3, 4]), starts([3, 4]), scale=rand(2, 4))


BOUNDS = st.none() | st.integers(0, 40)
LENGTHS = st.sampled_from((0, 0, 1, 5, 31, 64, 70))


@given(
    lengths=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=4),
    causal=st.booleans(),
    window=st.tuples(BOUNDS, BOUNDS),
    softcap=st.sampled_from((None, 2.0)),
    with_sinks=st.booleans(),
    alibi=st.sampled_from((None, "heads", "sequences")),
    backend=st.sampled_from(BACKENDS),
)
def test_packed_sequences_are_each_attended_to_alone(
    lengths, causal, window, softcap, with_sinks, alibi, backend
) -> None:
    queries, keys = (list(side) for side in zip(*lengths, strict=True))
    slopes = {None: None, "heads": rand(4), "sequences": rand(len(lengths), 4)}[alibi]
    assert_packed_is_each_alone(
        queries, keys, inputs=packed_inputs(queries, keys, value_width=24), slopes=slopes, backend=backend,
        learned=(randn(4),) if with_sinks else (), causal=causal, window=window, softcap=softcap,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_attend_to_packed_sequences_alone(dtype: torch.dtype) -> None:
    queries, keys = [70, 0, 3, 31], [70, 9, 0, 90]
    inputs = tuple(t.to(dtype) for t in packed_inputs(queries, keys, value_width=24, heads=2, key_heads=1))
    assert_packed_is_each_alone(queries, keys, inputs=inputs, backend="triton", causal=True, window=(50, None))


def test_slopes_of_all_take_one_call_where_queries_and_keys_are_alike(monkeypatch) -> None:
    lengths, calls = [30, 0, 70], []
    q, k, v = packed_inputs(lengths, lengths)
    attention = fastattn.core.attention.varlen.attention
    monkeypatch.setattr(
        fastattn.core.attention.varlen, "attention", lambda *a, **o: calls.append(1) or attention(*a, **o)
    )
    slopes, cu = rand(4), starts(lengths)
    together = fastattn.attention_varlen(q, k, v, cu, cu, alibi_slopes=slopes)
    assert len(calls) == 1
    apart = fastattn.attention_varlen(q, k, v, cu, cu, alibi_slopes=slopes.expand(3, 4))
    assert len(calls) == 4
    torch.testing.assert_close(together, apart)


def test_no_granule_between_sequences_is_computed() -> None:
    lengths = [128, 64, 0, 640]
    lowered = masks.packed_sequences(starts(lengths), starts(lengths)).lower(1, 1, 832, 832)
    assert lowered.visited_granules == 2 * 2 + 1 + 10 * 10 == lowered.ideal_granules


def test_a_long_sequence_beside_short_ones_takes_memory_of_tokens_not_of_padding() -> None:
    queries = keys = [2048] + [8] * 63
    q, k, v = (t.requires_grad_() for t in packed_inputs(queries, keys, heads=1, key_heads=1))
    cu = starts(queries)
    with LargestTensor() as largest:
        fastattn.attention_varlen(q, k, v, cu, cu, causal=True, backend="portable").sum().backward()
    assert largest.nbytes < 64 * 2048 * 16 * 4 / 4, "a quarter of the padded queries"


def test_dropout_of_packed_sequences_is_drawn_again_in_the_backward() -> None:
    queries, keys = [40, 0, 70], [50, 20, 64]
    q, k, v = (t.double() for t in packed_inputs(queries, keys))

    def at(moved: Tensor) -> Tensor:
        torch.manual_seed(1)
        return fastattn.attention_varlen(moved, k, v, starts(queries), starts(keys), dropout_p=0.3).square().sum()

    q.requires_grad_()
    direction, step = torch.randn_like(q), 1e-5
    (gradient,) = torch.autograd.grad(at(q), q)
    slope = (at(q + step * direction) - at(q - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope.detach(), rtol=1e-6, atol=1e-6)


TEN = torch.zeros(10, 4, 16)
ERRORS = {
    "four dimensions": ((TEN[None], TEN, TEN, [0, 10], [0, 10]), {}, ValueError, r"q must have 3 dimensions"),
    "no tensor": ((TEN, 3, TEN, [0, 10], [0, 10]), {}, TypeError, "k must be a torch.Tensor, got int"),
    "other queries": ((TEN, TEN, TEN, [0, 11], [0, 10]), {}, ValueError, "cu_seqlens_q ends with 11, expected 10"),
    "other keys": ((TEN, TEN, TEN, [0, 10], [0, 11]), {}, ValueError, "cu_seqlens_k ends with 11, expected 10"),
    "other counts": (
        (TEN, TEN, TEN, [0, 10], [0, 5, 10]),
        {},
        ValueError,
        "same number of sequences, got 1 and 2",
    ),
    "other sinks": ((TEN, TEN, TEN, [0, 10], [0, 10]), {"sinks": torch.zeros(2)}, ValueError, "sinks must have"),
    "other slopes": (
        (TEN, TEN, TEN, [0, 5, 10], [0, 5, 10]),
        {"alibi_slopes": torch.zeros(3, 4)},
        ValueError,
        r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(3, 4\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_packed_input_is_named(name: str) -> None:
    arguments, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        fastattn.attention_varlen(*arguments, **options)


# flash-attn's names

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
CU = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {CU}, {TAIL}, block_table=None, seqused_k=None, num_splits=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {CU}, {TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_those_of_flash_attn(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == SIGNATURES[name]


SLOPES = torch.tensor([0.5, 0.2, 0.1, 0.0], device=DEVICE)
FLASH_OPTIONS = [
    ({}, {}),
    ({"causal": True, "softmax_scale": 0.3}, {"causal": True, "scale": 0.3}),
    ({"window_size": (7, -1), "deterministic": True}, {"window": (7, None)}),
    ({"window_size": (-1, 0), "softcap": 3.0}, {"window": (None, 0), "softcap": 3.0}),
    ({"window_size": (0, 5), "alibi_slopes": SLOPES}, {"window": (0, 5), "alibi_slopes": SLOPES}),
]


@pytest.mark.parametrize(("theirs", "ours"), FLASH_OPTIONS, ids=lambda options: "-".join(options))
def test_flash_attn_is_attention_of_lengths_before_heads(theirs: dict, ours: dict) -> None:
    q, kv = randn(2, 30, 4, 16), randn(2, 50, 2, 2, 16)
    out, lse = fastattn.attention(*(t.transpose(1, 2) for t in (q, *kv.unbind(2))), **ours, return_lse=True)
    for call in (flash_attn.flash_attn_func, flash_attn.flash_attn_kvpacked_func):
        given_ = (q, *kv.unbind(2)) if call is flash_attn.flash_attn_func else (q, kv)
        assert torch.equal(call(*given_, **theirs), out.transpose(1, 2))
        got, got_lse, dropped = call(*given_, **theirs, return_attn_probs=True)
        assert torch.equal(got, out.transpose(1, 2)) and torch.equal(got_lse, lse) and dropped is None


@pytest.mark.parametrize(("theirs", "ours"), FLASH_OPTIONS, ids=lambda options: "-".join(options))
def test_flash_attn_varlen_is_attention_varlen(theirs: dict, ours: dict) -> None:
    q, kv = randn(60, 4, 16), randn(70, 2, 2, 16)
    cu = torch.tensor([0, 20, 60], dtype=torch.int32), torch.tensor([0, 50, 70], dtype=torch.int32)
    out, lse = fastattn.attention_varlen(q, *kv.unbind(1), *cu, **ours, return_lse=True)
    assert torch.equal(flash_attn.flash_attn_varlen_func(q, *kv.unbind(1), *cu, 40, 50, **theirs), out)
    got, got_lse, dropped = flash_attn.flash_attn_varlen_kvpacked_func(
        q, kv, *cu, 40, 50, **theirs, return_attn_probs=True
    )
    assert torch.equal(got, out) and torch.equal(got_lse, lse) and dropped is None


def test_tensors_of_queries_keys_and_values_have_one_gradient() -> None:
    qkv = randn(2, 30, 3, 4, 16, requires_grad=True)
    cu = torch.tensor([0, 30, 60], dtype=torch.int32)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, 0.0, 0.3, True)
    (dqkv,) = torch.autograd.grad(out.square().sum(), qkv)
    packed = flash_attn.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), cu, 30, 0.0, 0.3, True)
    (dpacked,) = torch.autograd.grad(packed.square().sum(), qkv)
    q, k, v = (t.transpose(1, 2).detach().requires_grad_() for t in qkv.unbind(2))
    expected = fastattn.attention(q, k, v, scale=0.3, causal=True)
    dheads = torch.stack(torch.autograd.grad(expected.square().sum(), (q, k, v)), 2).transpose(1, 3)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    torch.testing.assert_close(packed.view_as(out), out)
    torch.testing.assert_close(dqkv, dheads)
    torch.testing.assert_close(dpacked, dqkv)


FIVE = torch.zeros(1, 10, 2, 4, 16)
FLASH_ERRORS = {
    "window": (
        lambda: flash_attn.flash_attn_func(*(FIVE[:, :, 0],) * 3, window_size=(-2, 0)),
        "window_size must not be below -1",
    ),
    "parts": (lambda: flash_attn.flash_attn_qkvpacked_func(FIVE), r"qkv must have shape .*, 3, .* \(1, 10, 2, 4"),
    "dimensions": (
        lambda: flash_attn.flash_attn_func(TEN, TEN, TEN),
        r"q must have shape \(batch, length, heads,",
    ),
}


@pytest.mark.parametrize("name", FLASH_ERRORS)
def test_what_flash_attn_has_and_we_have_not_is_refused(name: str) -> None:
    call, message = FLASH_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


# BigBird inside attention


def huggingface_attention(length: int, block: int, heads: int, *, training: bool, lengths: list[int]):
    """`transformers`' block-sparse attention as a function of q, k, v (B, H, L, D) to out (B, L, H, D)."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(hidden_size=8 * heads, num_attention_heads=heads, block_size=block)
    layer = BigBirdBlockSparseAttention(config, 4).train(training)
    seen = (arange(length) < torch.tensor(lengths, device=DEVICE)[:, None]).float()
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(seen, block)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        band_, rows, columns, blocks = (t.to(q.dtype) for t in (band, from_mask, to_mask, blocked))
        return layer.bigbird_block_sparse_attention(
            q, k, v, band_, rows, columns, blocks, blocks, heads, 3, q.shape[3], block, block, len(lengths),
            length, length, seed=4, plan_from_length=None, plan_num_rand_blocks=None,
        )[0]  # fmt: skip

    return call


def our_bigbird(block: int, lengths: list[int], *, training: bool, backend: str = "portable"):
    """The same with fastattn: padded queries give 0, as in transformers."""
    mask = masks.bigbird(block, 3, style="huggingface", seed=4, training=training)
    mask = mask & masks.key_lengths(lengths)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = arange(q.shape[2]) < torch.tensor(lengths, device=DEVICE)[:, None]
        return fastattn.attention(q, k, v, mask=mask, backend=backend).transpose(1, 2) * rows[:, :, None, None]

    return call


def out_and_gradients(call, inputs, upstream: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def assert_bigbird_is_theirs(block: int, lengths: list[int], heads: int, *, training: bool, backend: str) -> None:
    length = max(lengths)
    inputs = tuple(randn(len(lengths), heads, length, 16) for _ in range(3))
    upstream = randn(len(lengths), length, heads, 16)
    theirs = huggingface_attention(length, block, heads, training=training, lengths=lengths)
    exact = out_and_gradients(theirs, [t.double() for t in inputs], upstream.double())
    eager = out_and_gradients(theirs, inputs, upstream)
    actual = out_and_gradients(our_bigbird(block, lengths, training=training, backend=backend), inputs, upstream)
    for position, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        assert_as_exact_as_eager(a, x, e, gradient=position > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shorter", [0, 0.9], ids=["full", "padded"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("length", "block"), [(1024, 64), (320, 16)])
def test_bigbird_in_attention_is_that_of_hugging_face(
    length: int, block: int, training: bool, shorter: float, backend: str
) -> None:
    lengths = [length, int(length * shorter) or length]
    assert_bigbird_is_theirs(block, lengths, 2, training=training, backend=backend)


def test_kernels_compute_the_bigbird_of_hugging_face() -> None:
    assert_bigbird_is_theirs(16, [208], 1, training=False, backend="triton")


def test_kernels_count_whole_granules_as_often_as_the_mask_says() -> None:
    mask = masks.blocks(torch.tensor([[1, 0, 2], [0, 3, 1]]), 64)
    inputs = tuple(randn(1, 1, length, 16) for length in (128, 192, 192))
    kernels, definition = (
        out_and_gradients(partial(fastattn.attention, mask=mask, backend=name), inputs, torch.ones_like(inputs[0]))
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(kernels, definition, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_bigbird_of_4096_tokens_takes_a_twentieth_of_the_memory_of_hugging_face(training: bool) -> None:
    length, heads, device = 4096, 2, torch.device(DEVICE)
    inputs = tuple(randn(1, heads, length, 64) for _ in range(3))
    upstream = randn(1, length, heads, 64)
    theirs = huggingface_attention(length, 64, heads, training=training, lengths=[length])
    mask = masks.bigbird(style="huggingface", seed=4, training=training)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, mask=mask, backend="portable").transpose(1, 2)

    expected = peak_memory(lambda: out_and_gradients(theirs, inputs, upstream), device)
    assert 20 * peak_memory(lambda: out_and_gradients(ours, inputs, upstream), device) < expected
    with LargestTensor() as largest:
        out_and_gradients(ours, inputs, upstream)
    assert largest.nbytes <= inputs[0].nbytes


# Set encoders


def set_encoder(backend: str, positions: str | None = "zero") -> TransformerModel:
    torch.manual_seed(3)
    model = TransformerModel(
        vocab_size=31, embed_dim=32, num_heads=4, num_layers=2, causal=False, positions=positions, backend=backend,
        max_length=None if positions is None else 90,
    )  # fmt: skip
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "position" not in name:
            torch.nn.init.normal_(weight, std=0.3)  # so that attention is far from uniform
    return model.to(DEVICE)


@pytest.mark.parametrize("positions", ["zero", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_set_encoder_is_permutation_equivariant_in_float64(backend: str, positions: str | None) -> None:
    model, order = set_encoder(backend, positions).double(), torch.randperm(90, device=DEVICE)
    x, upstream = (randn(2, 90, width, dtype=torch.float64) for width in (32, 31))
    assert (outputs(model, x)[:, order] - outputs(model, x[:, order])).abs().max() < 1e-12
    dx, dx_of_order = (gradient(model, x[:, o], upstream[:, o]) for o in (arange(90), order))
    assert (dx[:, order] - dx_of_order).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["triton", *BACKENDS])
def test_a_set_encoder_is_permutation_equivariant_up_to_rounding(backend: str) -> None:
    model, order = set_encoder(backend), torch.randperm(90, device=DEVICE)
    x = randn(1, 90, 32)
    exact = outputs(set_encoder("reference").double(), x.double())[:, order]
    eager = outputs(set_encoder("reference"), x[:, order])
    assert_as_exact_as_eager(outputs(model, x[:, order]).detach(), exact.detach(), eager.detach())


def test_a_set_encoder_is_no_longer_equivariant_with_positions() -> None:
    model, order = set_encoder("portable").double(), torch.randperm(90, device=DEVICE)
    tokens = torch.randint(31, (2, 90), device=DEVICE)
    assert (model(tokens)[:, order] - model(tokens[:, order])).abs().max() < 1e-12
    torch.nn.init.normal_(model.position_embedding.weight[:1], std=0.02)
    assert (model(tokens)[:, order] - model(tokens[:, order])).abs().max() > 1e-3


def outputs(model: TransformerModel, x: Tensor) -> Tensor:
    if model.position_embedding is not None:
        x = x + model.position_embedding(arange(x.shape[1]))
    for block in model.blocks:
        x = block(x)
    return model.unembed(x)


def gradient(model: TransformerModel, x: Tensor, upstream: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(outputs(model, x), x, upstream)
    return found


# Latent queries


@pytest.mark.parametrize(("backend", "keys"), [("triton", 150), ("portable", 4000), ("reference", 4000)])
def test_keys_of_latent_queries_split_in_parts_and_merge(backend: str, keys: int) -> None:
    inputs = randn(1, 1, 192, 32), randn(1, 1, keys, 32), randn(1, 1, keys, 96)
    upstream = randn(1, 1, 192, 96), randn(1, 1, 192)
    parts = [keys // 4, 37, keys - keys // 4 - 37]

    def split(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        states = [
            fastattn.attention(q, *part, return_lse=True, backend=backend)
            for part in zip(k.split(parts, 2), v.split(parts, 2), strict=True)
        ]
        out, lse = states[0]
        for state in states[1:]:
            out, lse = fastattn.merge_states(out, lse, *state)
        return out, lse

    whole = partial(fastattn.attention, return_lse=True, backend="reference")
    exact = run([t.double() for t in inputs], [t.double() for t in upstream], whole)
    eager = run(inputs, upstream, whole)
    actual = run(inputs, upstream, split)
    for position, (a, x, e) in enumerate(zip(actual, exact, eager, strict=True)):
        assert_as_exact_as_eager(a, x, e, gradient=position >= 2)
