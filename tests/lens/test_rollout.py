"""Claims about rollout: a row of the product of all layers' patterns, without a pattern."""

from __future__ import annotations

import pytest
import torch
from largest_tensor import LargestTensor
from lens_models import ALL, LAYERS, make, text

from fastattn import lens
from fastattn.lens.rollout import _through_attention
from fastattn.lens.sources import Watched


def dense(model, tokens, query, **options):
    """Row `query` of the product of (mean over heads of the pattern + I) / 2, layers from the top down."""
    with torch.no_grad(), lens.watch(model, "blocks.*.attention.pattern") as seen:
        model(tokens, **options)
    row = torch.eye(tokens.shape[1], dtype=torch.float64)[query].expand(len(tokens), -1)
    rows = [row]
    for layer in reversed(range(LAYERS)):
        pattern = seen[f"blocks.{layer}.attention.pattern"].double().mean(1)
        row = torch.einsum("bi,bij->bj", row, (pattern + torch.eye(tokens.shape[1])) / 2)
        rows.append(row)
    return torch.stack(rows[::-1])


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_rollout_is_a_row_of_the_product_of_dense_patterns(name, attention):
    model, tokens = make(name, attention), text()
    found = lens.rollout(model, tokens, query=13)
    torch.testing.assert_close(found.by_layer, dense(model, tokens, 13), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(found.sources.sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-7, rtol=0)
    assert torch.equal(found.sources, found.by_layer[0]) and found.by_layer[-1, :, 13].eq(1).all()


def test_windows_and_padding_count():
    model, tokens = make("own"), text()
    found = lens.rollout(model, tokens, window=3)
    torch.testing.assert_close(found.by_layer, dense(model, tokens, -1, window=3), atol=1e-9, rtol=1e-9)
    assert not found.sources[:, : 19 - 3 * LAYERS].any()
    model = make("bert")
    padded = torch.ones_like(tokens)
    padded[:, 15:] = 0
    found = lens.rollout(model, tokens, query=2, attention_mask=padded)
    assert not found.sources[:, 15:].any() and found.sources[:, :15].all()


def test_half_precision_keeps_small_weights():
    model, tokens = make("llama"), text(1, 120)
    expected = lens.rollout(model, tokens).sources.float()
    found = lens.rollout(model.half(), tokens).sources
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0.05)
    # What reaches a long text's tokens is below the smallest number of float16, 6e-8.
    layer = Watched()
    layer.values = torch.ones(1, 2, 2, 16, dtype=torch.float16, requires_grad=True)
    layer.heads_out = layer.values.repeat_interleave(2, 1)  # every position attends to itself
    reach = torch.tensor([[1e-9, 2e-9]])
    through = _through_attention(layer, reach)
    torch.testing.assert_close(through, reach, atol=0, rtol=1e-3)


def test_no_matrix_of_all_positions_is_made():
    model, tokens = make("own", max_length=3000).float(), text(1, 3000)
    with LargestTensor() as largest:
        lens.rollout(model, tokens)
    assert largest.nbytes < 4 * 3000 * 3000 / 4  # a quarter of such a matrix in float32


def test_it_works_under_inference_mode_and_without_a_head():
    model, tokens = make("llama"), text()
    with torch.inference_mode():
        found = lens.rollout(model, tokens)
    assert torch.equal(found.sources, lens.rollout(model.model, tokens).sources)
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_it_prints_and_draws_itself():
    found = lens.rollout(make("gpt2"), text())
    header, *lines = found.table(top=4)
    assert header[2] == "reaches position 19" and len(lines) == 4
    assert float(lines[0][2]) == float(f"{float(found.sources[0].max()):.3g}")
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 2


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="query must be from -20 to 19"):
        lens.rollout(make("own"), text(), query=20)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        lens.rollout(make("own", dropout=0.1).train(), text())
