"""What the weights say alone, without any text: which heads copy, which read from which, what a token writes.

Norms count by their gain and centring; their scale, which depends on the text, is left out. So are rotations, and
norms of queries and keys. Products of a head's two matrices have the rank of a head: they are kept as two factors,
and every number here comes out of (D, D) products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastattn.ground.arguments import choice, integer
from fastattn.ground.checks import lse_dtype
from fastattn.ground.modes import without_autocast
from fastattn.lens.adapters import Adapter, adapt
from fastattn.lens.attribution import check_linear_head
from fastattn.lens.frozen import FrozenNorm
from fastattn.lens.showing import Shown
from fastattn.lens.texts import Token, Words, token_of_each_row
from fastattn.lens.vocabulary import CHUNK

F = TypeVar("F", bound=Callable[..., Any])


def _exactly(function: F) -> F:
    """Without gradients, and without autocast: weights are read in the precision that they have."""

    @functools.wraps(function)
    def exact(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), without_autocast(adapt(model).part("out", 0).weight.device):
            return function(model, *args, **kwargs)

    return exact  # type: ignore[return-value]


@_exactly
def copying_scores(model: nn.Module) -> Tensor:
    """How much each head writes the tokens that it reads: (layers, heads), from -1 to 1; 1 is all copying.

    A head's OV circuit W_E W_V W_O W_U says how it changes the logit of each token by each token that it attends
    to. Positive eigenvalues mean that tokens raise their own logit: the score is sum(lambda) / sum(|lambda|). The
    circuit is (V, V) and has the rank of a head: its eigenvalues are those of W_O W_U W_E W_V, which is (Dv, Dv).

    Args:
        model: any that `adapt` knows, with an unembedding that reads the stream (not BERT's).

    Returns:
        (layers, heads), fp32 or fp64, on the model's device.

    Raises:
        TypeError, ValueError: the model has no such unembedding, or blocks that norm the stream.

    Example:
        >>> sizes = {"vocab_size": 50, "embed_dim": 32, "num_heads": 4, "num_layers": 3}
        >>> copying_scores(fastattn.nn.TransformerModel(**sizes)).shape
        torch.Size([3, 4])

    Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), "Summarizing OV/QK Matrices".
    """
    adapter = _adapted(model, "copying_scores", unembeds=True)
    through = _unembedding_times_embedding(adapter)
    scores = []
    for layer in range(adapter.num_layers):
        factors = _factors(adapter, layer)
        circuit = factors.out @ through @ factors.v
        # A general eigenproblem: few accelerators solve it.
        eigenvalues = torch.linalg.eigvals(circuit.cpu().double())
        scores.append(eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1))
    return torch.stack(scores).to(through.dtype).to(through.device)


@_exactly
def composition(model: nn.Module, kind: str = "k") -> Tensor:
    """How much each head reads of what each earlier head writes: (layers, heads, layers, heads), [from, to].

    With W_OV = W_V W_O of the first head and W_QK = W_Q W_K^T of the second, as maps of row vectors, the score is
    the Frobenius norm of their product over the product of their norms: ||W_OV W_QK|| for "q", ||W_OV W_QK^T|| for
    "k", ||W_OV W_OV|| for "v". Random weights give about 1 / sqrt(d), d the width of the stream. Norms come from
    (D, D) products of the heads' factors: nothing (d, d) is made.

    Args:
        model: any that `adapt` knows, with blocks that add to one stream.
        kind: "q", "k" or "v": through which of the second head's inputs.

    Returns:
        (layers, heads, layers, heads), fp32 or fp64; NaN where the second head does not lie behind the first.

    Raises:
        TypeError, ValueError: another kind, or a model whose blocks norm the stream.

    Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), "Composition".
    """
    choice("kind", kind, ("q", "k", "v"))
    adapter = _adapted(model, "composition")
    layers = [_factors(adapter, layer) for layer in range(adapter.num_layers)]
    shape = (adapter.num_layers, adapter.num_heads) * 2
    scores = layers[0].v.new_full(shape, float("nan"))
    # ||A X B^T|| is ||R_A X R_B^T||, R from A = Q R: a head's factors shrink to (D, D).
    written = [(_r(f.v), f.out, (_r(f.v) @ _r(f.out.mT).mT).norm(dim=(-2, -1))) for f in layers]
    read = [_read_by(f, kind) for f in layers]
    for i, (left, out, size) in enumerate(written):
        for j in range(i + 1, adapter.num_layers):
            into, right, size_of_second = read[j]
            middle = torch.einsum("aed,bdf->abef", out, into)
            norms = (left[:, None] @ middle @ right.mT).norm(dim=(-2, -1))
            scores[i, :, j] = norms / (size[:, None] * size_of_second)
    return scores


@dataclass(frozen=True, eq=False, repr=False)
class VirtualWeights(Shown):
    """What `virtual_weights` found, for T tokens.

    Attributes:
        promoted, suppressed: (T, top) the tokens whose logits rise and fall most.
        rises, falls: (T, top) by how much, up to the scales of the norms.
        tokens: (T,) the tokens that are read.
        heads: the path, (layer, head) pairs.
    """

    promoted: Tensor
    rises: Tensor
    suppressed: Tensor
    falls: Tensor
    tokens: Tensor
    heads: tuple[tuple[int, int], ...]
    words: Words

    def table(self) -> list[tuple[str, ...]]:
        """One line a token."""

        def best(tokens: Tensor, values: Tensor) -> str:
            pairs = zip(tokens, values.tolist(), strict=True)
            return "  ".join(f"{self.words(token)} {value:+.2f}" for token, value in pairs)

        way = " > ".join(f"L{layer}H{head}" for layer, head in self.heads) or "embedding"
        lines: list[tuple[str, ...]] = [(f"token, by {way}", "promotes", "suppresses")]
        for i, token in enumerate(self.tokens):
            up, down = best(self.promoted[i], self.rises[i]), best(self.suppressed[i], self.falls[i])
            lines.append((self.words(token), up, down))
        return lines


@_exactly
def virtual_weights(
    model: nn.Module,
    token: Token,
    heads: Sequence[tuple[int, int]] = (),
    *,
    top: int = 10,
    tokenizer: Any = None,
) -> VirtualWeights:
    """Which logits a token's embedding changes, straight or through the OV circuits of heads, one behind another.

    Without heads that is the direct path W_E W_U, which holds bigrams; with one head its OV circuit, what it
    writes when it attends to the token; with several a virtual attention head. The (V, V) matrix is never made: a
    token's row goes through the factors, and over the vocabulary in chunks.

    Args:
        model: any that `adapt` knows, with an unembedding that reads the stream (not BERT's).
        token: an id, several, or text of one token.
        heads: (layer, head) pairs, the first is read first; layers ascend.
        top: how many tokens to return.
        tokenizer: a Hugging Face tokenizer: takes text, and prints tokens as text.

    Returns:
        A `VirtualWeights`: print it.

    Raises:
        TypeError, ValueError: heads that are not there or do not follow each other.

    Example:
        >>> sizes = {"vocab_size": 50, "embed_dim": 32, "num_heads": 4, "num_layers": 3}
        >>> virtual_weights(fastattn.nn.TransformerModel(**sizes), 7, [(0, 1), (2, 3)], top=4).promoted.shape
        torch.Size([1, 4])

    Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), "Virtual Weights and the
    Residual Stream as a Communication Channel", "Virtual Attention Heads".
    """
    adapter, words = _adapted(model, "virtual_weights", unembeds=True), Words(tokenizer)
    count = 1 if isinstance(token, str | int) or getattr(token, "shape", None) == () else len(token)
    tokens = token_of_each_row("token", token, count, adapter, words)
    way = _checked_way(heads, adapter)
    vocabulary = len(adapter.unembedding_weight)
    top = integer("top", top, least=1)
    if top > vocabulary:
        raise ValueError(f"top must be at most the vocabulary's size {vocabulary}, got {top}")
    x = _embedded(adapter, tokens)
    for layer, head in way:
        factors = _factors(adapter, layer)
        x = x @ factors.v[head] @ factors.out[head]
    best = [(x.new_zeros(len(x), 0), tokens.new_zeros(len(x), 0))] * 2
    for first in range(0, vocabulary, CHUNK):
        logits = x @ _unembedded(adapter, slice(first, first + CHUNK)).mT
        ids = torch.arange(first, first + logits.shape[1], device=logits.device).expand(logits.shape)
        best = [_keep(*kept, sign * logits, ids, top) for kept, sign in zip(best, (1, -1), strict=True)]
    (rises, promoted), (falls, suppressed) = best
    return VirtualWeights(promoted, rises, suppressed, -falls, tokens, way, words)


def _keep(values: Tensor, ids: Tensor, more: Tensor, more_ids: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The largest of both."""
    values, ids = torch.cat([values, more], -1), torch.cat([ids, more_ids], -1)
    values, order = values.topk(min(top, values.shape[-1]), dim=-1)
    return values, ids.gather(-1, order)


def _checked_way(heads: Any, adapter: Adapter) -> tuple[tuple[int, int], ...]:
    way: list[tuple[int, int]] = []
    for pair in heads:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"heads must be (layer, head) pairs, got {pair!r}")
        layer, head = adapter.layer(pair[0]), integer("head", pair[1])
        if not 0 <= head < adapter.num_heads:
            raise ValueError(f"head must be from 0 to {adapter.num_heads - 1}, got {head}")
        if way and layer <= way[-1][0]:
            raise ValueError(f"heads must lie in ascending layers, got layer {layer} behind layer {way[-1][0]}")
        way.append((layer, head))
    return tuple(way)


class _Factors(NamedTuple):
    """A layer's weights by query head, with the gains of the norms around: q, k, v (H, d, D), out (H, Dv, d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


def _factors(adapter: Adapter, layer: int) -> _Factors:
    weights = adapter.projections(layer)
    wide = lse_dtype(weights.q.dtype)
    group = adapter.num_heads // adapter.num_kv_heads
    norm, after = adapter.part("attention_norm", layer), adapter.norm_after("attention", layer)

    def behind_norm(weight: Tensor) -> Tensor:
        if norm is None:
            return weight.to(wide)
        return FrozenNorm.of(norm, weight.mT[0]).before(weight.mT.to(wide)).mT

    q, k, v = (behind_norm(weight) for weight in weights[:3])
    out = weights.out.to(wide)
    if after is not None:
        out = FrozenNorm.of(after, weights.out[0]).after(out)
    return _Factors(q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0), out)


def _r(matrix: Tensor) -> Tensor:
    """R of the matrix Q R (H, rows, columns): the same norms, with as few rows as columns."""
    return torch.linalg.qr(matrix, mode="r").R


def _read_by(factors: _Factors, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """What a head reads through (H, d, D), R of the other factor, and the norm of their product (H,)."""
    into = {"q": factors.q, "k": factors.k, "v": factors.v}[kind]
    other = {"q": factors.k, "k": factors.q, "v": factors.out.mT}[kind]
    right = _r(other)
    return into, right, (_r(into) @ right.mT).norm(dim=(-2, -1))


def _embedded(adapter: Adapter, tokens: Tensor) -> Tensor:
    """What the embedding writes for tokens (T,): (T, d)."""
    rows = adapter.embeddings[0](tokens)
    rows = rows if adapter.embedding_norm is None else adapter.embedding_norm(rows)
    return rows.to(lse_dtype(rows.dtype))


def _unembedded(adapter: Adapter, span: slice) -> Tensor:
    """The directions (T, d) in the last stream that read these tokens' logits."""
    rows = adapter.unembedding_weight[span]
    wide = rows.to(lse_dtype(rows.dtype))
    return wide if adapter.final_norm is None else FrozenNorm.of(adapter.final_norm, rows).before(wide)


def _unembedding_times_embedding(adapter: Adapter) -> Tensor:
    """W_U W_E, (d, d), summed over the vocabulary in chunks."""
    vocabulary, embedded = len(adapter.unembedding_weight), adapter.embeddings[0].weight.shape[0]
    if vocabulary != embedded:
        raise ValueError(f"model must have one vocabulary, got {embedded} embeddings and {vocabulary} logits")
    total: Tensor | float = 0.0
    for first in range(0, vocabulary, CHUNK):
        tokens = torch.arange(first, min(first + CHUNK, vocabulary), device=adapter.unembedding_weight.device)
        total = total + _unembedded(adapter, slice(first, first + CHUNK)).mT @ _embedded(adapter, tokens)
    assert isinstance(total, Tensor)
    return total


def _adapted(model: nn.Module, what: str, *, unembeds: bool = False) -> Adapter:
    adapter = adapt(model)
    if unembeds:
        check_linear_head(adapter, what)
    if adapter.post_norm:
        raise ValueError(
            f"{what} needs blocks that add to one stream, and family {adapter.family.name} norms the stream in "
            "every block"
        )
    return adapter
