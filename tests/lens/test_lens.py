"""Claims about the lens: the scores are the definition's, in memory that does not grow as N x N."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import LargestTensor

from fastattn import attention, masks
from fastattn.core.statistics import operators, portable
from fastattn.lens import HeadScores, even_scores, head_scores, model_head_scores
from fastattn.nn import TransformerModel


def problem(batch=2, heads=4, key_heads=2, queries=37, keys=37, width=16, vocabulary=6, dtype=torch.float64):
    q = torch.randn(batch, heads, queries, width, dtype=dtype)
    k = torch.randn(batch, key_heads, keys, width, dtype=dtype)
    return q, k, torch.randint(vocabulary, (batch, keys))


def dense_scores(q, k, tokens, causal, scale, seen=None) -> HeadScores:
    """The definitions, entry by entry over the whole pattern, in float64; `seen` is bool (B or 1, Hq, Lq, Lk)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).double()
    queries, keys = q.shape[2], k.shape[2]
    position = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)[None, :]
    scores = q.double() @ k.mT * scale
    seen = torch.ones_like(scores, dtype=torch.bool) if seen is None else seen.expand(scores.shape)
    seen = seen & (key <= position) if causal else seen
    pattern = torch.softmax(scores.masked_fill(~seen, -math.inf), -1).nan_to_num(0.0)
    own = tokens[:, keys - queries :, None]
    before = torch.cat([torch.full_like(tokens[:, :1], -(10**6)), tokens[:, :-1]], 1)[:, None, :]
    masks = {
        "induction": (before == own) & (key <= position),
        "previous_token": (key == position - 1).expand(len(tokens), -1, -1),
        "duplicate_token": (tokens[:, None, :] == own) & (key < position),
        "first_token": ((key == 0) & (position > 0)).expand(len(tokens), -1, -1),
    }
    found = {}
    for name, mask in masks.items():
        matches = mask[:, None] & seen
        if name == "induction":
            matches = matches & seen.roll(1, -1)
        mass, counted = (pattern * matches).sum(-1), matches.any(-1)
        found[name] = torch.stack([mass[:, h][counted[:, h]].mean() for h in range(q.shape[1])])
    return HeadScores(**found)


LENGTHS = torch.tensor([37, 11])
SHOWN = {
    "window": ({"window": (5, 3)}, masks.window(5, 3)),
    "padding": ({"key_lengths": LENGTHS}, masks.key_lengths(LENGTHS)),
    "padding in the mask": ({"mask": masks.key_lengths(LENGTHS)}, masks.key_lengths(LENGTHS)),
    "documents": ({"mask": masks.documents([0] * 20 + [1] * 17)}, masks.documents([0] * 20 + [1] * 17)),
    "by head": (
        {"mask": masks.from_function(lambda b, h, q, k: (k + h) % 3 > 0), "window": (9, None)},
        masks.from_function(lambda b, h, q, k: (k + h) % 3 > 0) & masks.window(9),
    ),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", SHOWN)
def test_hidden_keys_have_no_weight_and_padding_is_not_averaged_over(kind, causal):
    shown, mask = SHOWN[kind]
    q, k, tokens = problem()
    _, lse = attention(q, k, k, causal=causal, return_lse=True, **shown)
    seen = mask.dense(2, 4, 37, 37)
    if kind.startswith("padding"):
        seen = seen & (torch.arange(37)[:, None] < LENGTHS[:, None, None, None])
        q[1, :, 11:] = k[1, :, 11:] = math.nan
        lse[1, :, 11:] = math.nan
    actual = head_scores(q, k, lse, tokens, **shown)
    expected = dense_scores(q.nan_to_num(), k.nan_to_num(), tokens, causal, 0.25, seen)
    for name, one, other in zip(HeadScores._fields, actual, expected, strict=True):
        torch.testing.assert_close(
            one, other, atol=1e-12, rtol=1e-12, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def scores_of(q, k, tokens, causal, scale=None) -> HeadScores:
    _, lse = attention(q, k, k, causal=causal, scale=scale, return_lse=True)
    return head_scores(q, k, lse, tokens, scale=scale)


@given(
    queries=st.integers(1, 40),
    more_keys=st.integers(0, 40),
    groups=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    causal=st.booleans(),
    vocabulary=st.sampled_from([1, 3, 50]),
    scale=st.sampled_from([None, 1.7, -0.3]),
)
def test_scores_are_the_dense_definition(queries, more_keys, groups, causal, vocabulary, scale):
    heads, key_heads = groups
    q, k, tokens = problem(1, heads, key_heads, queries, queries + more_keys, vocabulary=vocabulary)
    ours = scores_of(q, k, tokens, causal, scale)
    exact = dense_scores(q, k, tokens, causal, 16**-0.5 if scale is None else scale)
    for name, actual, expected in zip(HeadScores._fields, ours, exact, strict=True):
        torch.testing.assert_close(
            actual, expected, atol=1e-12, rtol=1e-12, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_scores_stay_near_float64(dtype):
    q, k, tokens = problem(queries=300, keys=700, dtype=dtype)
    for actual, expected in zip(
        scores_of(q, k, tokens, True), dense_scores(q, k, tokens, True, 0.25), strict=True
    ):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-4)


def test_hand_made_heads_score_one_on_what_they_do():
    # Two copies of 0 1 2 3: keys and queries say where a head looks.
    tokens = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    code = 30 * torch.eye(8, dtype=torch.float64)
    looks_at = {
        "induction": [0, 0, 0, 0, 1, 2, 3, 4],
        "previous_token": [0, 0, 1, 2, 3, 4, 5, 6],
        "duplicate_token": [0, 1, 2, 3, 0, 1, 2, 3],
        "first_token": [0] * 8,
    }
    for name, keys in looks_at.items():
        scores = scores_of(code[keys][None, None], code[None, None], tokens, True, scale=1.0)
        assert getattr(scores, name).item() == pytest.approx(1, abs=1e-9), name


def test_without_repeats_induction_and_duplicate_scores_are_not_numbers():
    q, k, _ = problem(batch=1)
    scores = scores_of(q, k, torch.arange(37)[None], True)
    assert scores.induction.isnan().all() and scores.duplicate_token.isnan().all()
    assert scores.previous_token.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_even_scores_are_those_of_a_head_whose_scores_are_all_equal(causal):
    tokens = torch.randint(6, (3, 50))
    nothing = torch.zeros(3, 1, 50, 8)
    for even, expected in zip(
        even_scores(tokens, causal=causal), dense_scores(nothing, nothing, tokens, causal, 1.0), strict=True
    ):
        torch.testing.assert_close(even.double(), expected[0], atol=1e-6, rtol=1e-6)


def test_no_tensor_is_larger_than_a_tile_at_eight_thousand_tokens(monkeypatch):
    # A mode of PyTorch's does not look inside of an operator.
    monkeypatch.setattr(torch.ops.fastattn, "attention_statistics", operators._statistics)
    length, heads = 8192, 2
    q, k, tokens = problem(1, heads, 1, length, length, width=8, dtype=torch.float32)
    _, lse = attention(q, k, k, causal=True, return_lse=True)
    with LargestTensor() as watched:
        scores = head_scores(q, k, lse, tokens)
    assert all(score.isfinite().all() for score in scores)
    assert watched.elements <= 2 * portable.ELEMENTS < heads * length**2 / 50


def small_model(**fields) -> TransformerModel:
    return TransformerModel(
        **{"vocab_size": 9, "embed_dim": 32, "num_heads": 4, "num_layers": 3, "positions": "rotary", **fields}
    ).double()


@pytest.mark.parametrize(
    "fields", [{"mlp": None}, {"num_kv_heads": 2, "mlp": None}, {"causal": False, "mlp": None}]
)
def test_a_models_scores_are_those_of_its_queries_and_keys(fields):
    model, tokens = small_model(**fields), torch.randint(9, (2, 30))
    scores = model_head_scores(model, tokens)
    assert scores.induction.shape == (3, 4)
    stream = model.embed(tokens)
    for layer, block in enumerate(model.blocks):
        q, k, _ = block.attention.project(block.attention_norm(stream))
        expected = dense_scores(q, k, tokens, model.config.causal, 8**-0.5)
        for actual, wanted in zip(scores, expected, strict=True):
            torch.testing.assert_close(actual[layer], wanted, atol=1e-12, rtol=1e-12)
        stream = block(stream)


@pytest.mark.parametrize("fields", [{}, {"causal": False}, {"window": 6}])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_has_the_scores_of_its_sequences(side, fields):
    model, tokens = small_model(**fields), torch.randint(9, (2, 30))
    whole = slice(0, 18) if side == "right" else slice(12, 30)
    is_token = torch.zeros(2, 30, dtype=torch.bool)
    is_token[:, whole] = True
    padding = masks.from_function(lambda b, h, q, k: is_token[b, q] & is_token[b, k])
    padded = model_head_scores(
        model, tokens, **({"key_lengths": [18, 18]} if side == "right" else {"mask": padding})
    )
    expected = model_head_scores(model, tokens[:, whole])
    for name, actual, wanted in zip(HeadScores._fields, padded, expected, strict=True):
        if side == "left" and name == "first_token":
            assert actual.isnan().all()  # Padding stands at position 0, and nobody sees it.
        else:
            torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=1e-12, equal_nan=True)


def test_looking_leaves_no_hook_and_no_gradient_behind():
    model = small_model(mlp=None)
    model_head_scores(model, torch.randint(9, (1, 12)))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError):
        model_head_scores(model, torch.randint(9, (12,)))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda q, k, lse, t: (q, k, lse[..., :-1], t), ValueError, r"lse must have shape \(2, 4, 37\), got"),
        (lambda q, k, lse, t: (q, k, lse.float(), t), TypeError, "lse must be torch.float64"),
        (lambda q, k, lse, t: (q, k, lse, t.float()), TypeError, "tokens must be integers, got torch.float32"),
        (
            lambda q, k, lse, t: (q, k, lse, t[:, 1:]),
            ValueError,
            r"tokens must have shape \(2, 37\), got \(2, 36\)",
        ),
        (
            lambda q, k, lse, t: (q, k[:, :, 1:], lse, t[:, 1:]),
            ValueError,
            "q must not be longer than k, 36; got 37",
        ),
        (lambda q, k, lse, t: (q, k[..., 1:], lse, t), ValueError, "k must have q's head width 16, got 15"),
    ],
)
def test_bad_arguments_are_named(change, kind, message):
    q, k, tokens = problem()
    _, lse = attention(q, k, k, return_lse=True)
    with pytest.raises(kind, match=message):
        head_scores(*change(q, k, lse, tokens))


def test_a_lowered_mask_is_refused_in_words():
    q, k, tokens = problem()
    mask = masks.causal().lower(2, 4, 37, 37)
    _, lse = attention(q, k, k, mask=mask, return_lse=True)
    with pytest.raises(TypeError, match=r"mask must be a value of fastattn\.masks that is not lowered"):
        head_scores(q, k, lse, tokens, mask=mask)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="model must contain"):
        model_head_scores(torch.nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.long))
