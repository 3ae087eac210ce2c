"""Attention on whole rows of scores is exact wherever blocks are cut."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from attention_problems import Problem, check, strategies_of
from hardware import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.core.attention import portable as attention_portable
from fastattn.core.attention import tiles, whole_rows

FEATURES = ("softcap", "lengths", "alibi", "sinks", "head_scale", "bias", "masked", "radius", "window", "causal")


@settings(max_examples=80)
@given(
    problem=st.builds(
        Problem,
        batch=st.integers(1, 3),
        heads=st.sampled_from([2, 4]),
        width=st.sampled_from([5, 16]),
        dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
        dropout=st.sampled_from([0.0, 0.1, 0.5]),
        **strategies_of("key_heads", "queries", "keys", "layout", "lse_gradient", *FEATURES),
    ),
    elements=st.sampled_from([300, 2300, 9000, 2**18]),
    rows=st.integers(1, 70),
)
def test_every_feature_is_exact_wherever_blocks_are_cut(problem: Problem, elements: int, rows: int) -> None:
    tile_by_tile = AssertionError("computed tile by tile")
    with (
        mock.patch.multiple(whole_rows, ELEMENTS=elements, MOST_ELEMENTS=max(elements, 4096), ROWS=rows, FEWEST=0),
        mock.patch.object(attention_portable, "Scores", side_effect=tile_by_tile),
        mock.patch.object(tiles, "Scores", side_effect=tile_by_tile),
    ):
        check(problem, "tiled")


@pytest.mark.parametrize("causal", [False, True])
def test_what_lies_behind_the_key_lengths_is_not_read(causal: bool) -> None:
    q, k, v = Problem(batch=3, queries=70, keys=70).inputs()
    lengths = torch.tensor([40, 0, 70], device=DEVICE)
    behind = (torch.arange(70, device=DEVICE) >= lengths[:, None])[:, None, :, None]
    state = fastattn.dropout_state(3, DEVICE)
    results = []
    for spoiled in (0.0, torch.nan, torch.inf):
        leaves = [t.requires_grad_() for t in (q.clone(), *(t.masked_fill(behind, spoiled) for t in (k, v)))]
        out, lse = fastattn.attention(
            *leaves, key_lengths=lengths, causal=causal, dropout_p=0.2, dropout_state=state, return_lse=True,
            backend="portable",
        )  # fmt: skip
        results.append((out, lse, *torch.autograd.grad(out.sin().sum(), leaves)))
    for clean, *others in zip(*results, strict=True):
        assert all(torch.equal(clean, other) for other in others)
