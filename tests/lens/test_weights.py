"""Claims about what the weights say: low-rank answers are those of the dense matrices."""

from __future__ import annotations

import pytest
import torch
from largest_tensor import LargestTensor
from lens_models import HEADS, LAYERS, PRE_NORM, VOCABULARY, WIDTH, make
from torch import nn

from fastattn import lens

CLOSE = {"atol": 1e-6, "rtol": 1e-6}  # the norms of Llama's kind round to float32


def linear(norm):
    """A norm without its scale and bias, as a matrix (d, d) for row vectors."""
    if norm is None:
        return torch.eye(WIDTH, dtype=torch.float64)
    gain = norm.weight.detach()
    gain = 1 + gain if "Gemma" in type(norm).__name__ else gain
    centre = torch.eye(WIDTH) - isinstance(norm, nn.LayerNorm) / WIDTH * torch.ones(WIDTH, WIDTH)
    return centre.double() @ torch.diag(gain)


def dense(model, layer):
    """W_Q, W_K, W_V (H, d, D) and W_O (H, D, d) with the norms around them."""
    adapter = lens.adapt(model)
    with torch.no_grad():
        q, k, v, out, *_ = adapter.projections(layer)
        group = HEADS // adapter.num_kv_heads
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        before, after = (
            linear(adapter.part("attention_norm", layer)),
            linear(adapter.norm_after("attention", layer)),
        )
        return before @ q, before @ k, before @ v, out @ after


def embedding_and_unembedding(model):
    adapter = lens.adapt(model)
    with torch.no_grad():
        embedding = adapter.embeddings[0](torch.arange(VOCABULARY))
        return embedding, adapter.unembedding_weight @ linear(adapter.final_norm).T


@pytest.mark.parametrize("name", PRE_NORM)
def test_copying_scores_are_of_the_eigenvalues_of_the_whole_ov_circuit(name):
    model = make(name)
    scores = lens.copying_scores(model)
    embedding, unembedding = embedding_and_unembedding(model)
    for layer in range(LAYERS):
        _, _, v, out = dense(model, layer)
        for head in range(HEADS):
            circuit = embedding @ v[head] @ out[head] @ unembedding.T  # (V, V)
            eigenvalues = torch.linalg.eigvals(circuit)
            expected = eigenvalues.real.sum() / eigenvalues.abs().sum()
            torch.testing.assert_close(scores[layer, head], expected, atol=1e-5, rtol=1e-5)


def test_a_head_that_copies_scores_1_and_one_that_forbids_scores_minus_1():
    model = make("own-attention-only", tied=True)
    attention = model.blocks[1].attention
    width = attention.head_dim
    with torch.no_grad():
        for norm in (model.final_norm, model.blocks[1].attention_norm):
            norm.weight.fill_(1.0)
        values = attention.qkv_proj.weight[-HEADS * width :].unflatten(0, (HEADS, width))
        attention.out_proj.weight.copy_(values.flatten(0, 1).T)
        attention.out_proj.weight[:, width : 2 * width] *= -1
    scores = lens.copying_scores(model)[1]
    torch.testing.assert_close(scores, torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["q", "k", "v"])
@pytest.mark.parametrize("name", PRE_NORM)
def test_composition_is_the_ratio_of_norms_of_the_dense_products(name, kind):
    model = make(name)
    scores = lens.composition(model, kind)
    assert scores.shape == (LAYERS, HEADS, LAYERS, HEADS)
    layers = [dense(model, layer) for layer in range(LAYERS)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        _, _, v, out = layers[i]
        q2, k2, v2, out2 = layers[j]
        first = v @ out
        second = {"q": q2 @ k2.mT, "k": k2 @ q2.mT, "v": v2 @ out2}[kind]
        product = first[:, None] @ second
        expected = product.norm(dim=(2, 3)) / (first.norm(dim=(1, 2))[:, None] * second.norm(dim=(1, 2)))
        torch.testing.assert_close(scores[i, :, j], expected, **CLOSE)
    assert scores[1, :, :2].isnan().all() and not scores[1, :, 2].isnan().any()


def test_a_head_that_reads_only_what_another_writes_scores_highest():
    model = make("own-attention-only", norm="rms", head_dim=4)
    with torch.no_grad():
        written = model.blocks[0].attention.out_proj.weight[:, : model.blocks[0].attention.head_dim]  # head 0
        keys = model.blocks[2].attention.qkv_proj.weight.unflatten(0, (3 * HEADS, -1))[HEADS + 3]
        keys.copy_(written.T)
        model.blocks[2].attention_norm.weight.fill_(1.0)
    scores = lens.composition(model, "k")
    assert scores[:, :, 2, 3].nan_to_num().argmax() == 0
    assert scores[0, 0, 2, 3] > 2 * scores[0, 1:, 2].max()


def test_no_matrix_of_the_streams_width_is_made_for_composition():
    width, head = 512, 8
    model = make("own-attention-only", embed_dim=width, head_dim=head)
    with LargestTensor() as largest:
        lens.composition(model, "q")
    weights = 3 * HEADS * head * width
    assert largest.elements <= weights < HEADS * width * width


@pytest.mark.parametrize("name", PRE_NORM)
def test_virtual_weights_are_a_row_of_the_dense_product(name, monkeypatch):
    from fastattn.lens import weights

    monkeypatch.setattr(weights, "CHUNK", 16)
    model = make(name)
    embedding, unembedding = embedding_and_unembedding(model)
    (_, _, v0, out0), (_, _, v2, out2) = dense(model, 0), dense(model, 2)
    for heads, between in (
        ((), torch.eye(WIDTH, dtype=torch.float64)),
        (((0, 3),), v0[3] @ out0[3]),
        (((0, 3), (-1, 1)), v0[3] @ out0[3] @ v2[1] @ out2[1]),
    ):
        found = lens.virtual_weights(model, [7, 9], heads, top=5)
        expected = (embedding @ between @ unembedding.T)[[7, 9]]
        torch.testing.assert_close(found.rises, expected.topk(5).values, **CLOSE)
        torch.testing.assert_close(found.falls, expected.topk(5, largest=False).values, **CLOSE)
        assert torch.equal(found.promoted, expected.topk(5).indices)
        assert torch.equal(found.suppressed, expected.topk(5, largest=False).indices)


def test_virtual_weights_print_their_path():
    header, line = lens.virtual_weights(make("own"), 7, [(0, 1), (2, 3)], top=2).table()
    assert header[0] == "token, by L0H1 > L2H3" and line[0] == "7"


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: lens.composition(m, "z"), ValueError, "kind must be one of q, k, v"),
        (lambda m: lens.virtual_weights(m, 7, [(2, 0), (1, 0)]), ValueError, "layer 1 behind layer 2"),
        (lambda m: lens.virtual_weights(m, 7, [(0, 4)]), ValueError, "head must be from 0 to 3"),
        (lambda m: lens.virtual_weights(m, 7, [0]), TypeError, r"\(layer, head\) pairs"),
        (lambda m: lens.virtual_weights(m, 7, top=51), ValueError, "vocabulary's size 50"),
        (lambda m: lens.virtual_weights(m, 50), ValueError, "token must be from 0 to 49"),
        (lambda m: lens.copying_scores(make("bert")), ValueError, "family BERT has an activation"),
        (lambda m: lens.composition(make("bert")), ValueError, "norms the stream in every block"),
    ],
)
def test_bad_calls_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call(make("own"))


def test_autocast_does_not_round_weights():
    model = make("llama").float()
    exact = lens.copying_scores(model), lens.composition(model), lens.virtual_weights(model, 7, [(1, 2)]).rises
    with torch.autocast("cpu", torch.bfloat16):
        found = lens.copying_scores(model), lens.composition(model), lens.virtual_weights(model, 7, [(1, 2)]).rises
    for ours, expected in zip(found, exact, strict=True):
        assert torch.equal(ours.nan_to_num(), expected.nan_to_num())
