"""What each attention head does: four scores, in O(N) memory, from the log-sum-exp the fused pass saves.

The pattern of a head is P_ij = exp(s_ij - lse_i), so any sum over it can be taken tile by tile, without ever
storing it. All four sums run over keys at or before the query; whatever else the mask hides is in lse already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastattn.core.arguments import flag, tensor
from fastattn.core.attention.functional import attention
from fastattn.core.attention.spec import attention_spec
from fastattn.core.checks import lse_dtype
from fastattn.core.modes import without_autocast
from fastattn.nn import SelfAttention

KEY_TILE = 512
TILE_SCORES = 2**21  # scores held at once, over batch and heads: 8 MiB in fp32


class HeadScores(NamedTuple):
    """How strongly heads attend in four known ways, each from 0 to 1; NaN where no position could.

    Shaped (heads,) for one layer, (layers, heads) for a model.
    """

    induction: Tensor
    previous_token: Tensor
    duplicate_token: Tensor
    first_token: Tensor


def head_scores(q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, *, scale: float | None = None) -> HeadScores:
    """Scores of each head of one layer, averaged over the batch and over the positions that have such a key.

    With P_ij the weight of key j for query i and t the tokens:

    - induction (prefix matching): sum over j <= i of P_ij [t_(j-1) = t_i], what followed this token before;
    - previous token: P_(i,i-1);
    - duplicate token: sum over j < i of P_ij [t_j = t_i], where this token stood before;
    - first token: P_(i,0), for i > 0.

    Args:
        q: queries (B, Hq, Lq, D), as attention took them.
        k: keys (B, Hkv, Lk, D), Lq <= Lk; the queries are those of the last Lq positions.
        lse: log-sum-exps (B, Hq, Lq) in nats, as `fastattn.attention(..., return_lse=True)` gives them, causal
            or not.
        tokens: token ids of the keys (B, Lk), integers.
        scale: multiplier of the scores; 1/sqrt(D) by default.

    Returns:
        Four tensors (Hq,), fp32 (fp64 for fp64 inputs), without gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> tokens = torch.randint(50, (1, 128))
        >>> q, k, v = (torch.randn(1, 4, 128, 64) for _ in range(3))
        >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
        >>> head_scores(q, k, lse, tokens).induction.shape
        torch.Size([4])

    Source: Olsson et al., In-context Learning and Induction Heads (2022), for induction and previous token;
    Wang et al., Interpretability in the Wild (2022), for duplicate token.
    """
    spec = attention_spec(q, k, k, causal=False, scale=scale)
    _check_lse(lse, q)
    _check_tokens(tokens, q, k)
    with torch.no_grad(), without_autocast(q.device):
        # Seen by key head: (B, Hkv, group, Lq, ...), so that grouped heads need no copy of k.
        q = q.unflatten(1, (k.shape[1], -1))
        lse = lse.unflatten(1, (k.shape[1], -1))
        first = max(1, k.shape[2] - q.shape[3]) - (k.shape[2] - q.shape[3])  # the first query with a key before it
        previous = _weights_of_one_key(q, _one_before_each_query(k, q.shape[3]), lse, spec.scale)
        sink = _weights_of_one_key(q, k[:, :, :1], lse, spec.scale)
        induction, duplicate, may_induce, may_repeat = _masses_of_matching_keys(q, k, lse, tokens, spec.scale)
        return HeadScores(
            induction=_mean(induction, may_induce),
            previous_token=previous[..., first:].mean((0, 3)).flatten(),
            duplicate_token=_mean(duplicate, may_repeat),
            first_token=sink[..., first:].mean((0, 3)).flatten(),
        )


def even_scores(tokens: Tensor, *, causal: bool = True) -> HeadScores:
    """What a head scores on these tokens (B, L) if it attends evenly to all it sees: the level of chance.

    Returns four tensors (), fp32. Text that repeats a few tokens gives even such a head high scores.
    """
    tensor("tokens", tokens)
    if tokens.dim() != 2:
        raise ValueError(f"tokens must have shape (batch, length), got {tuple(tokens.shape)}")
    causal = flag("causal", causal)
    batch, length = tokens.shape
    every = torch.arange(1, length + 1, device=tokens.device)
    lse = (every if causal else torch.full_like(every, length)).to(torch.float32).log().expand(batch, 1, length)
    nothing = lse.new_zeros(batch, 1, length, 1)
    return HeadScores(*(score[0] for score in head_scores(nothing, nothing, lse, tokens)))


def model_head_scores(model: nn.Module, tokens: Tensor) -> HeadScores:
    """The scores of every head of a model, from one forward over the tokens.

    Args:
        model: a `fastattn.nn.TransformerModel`, or any module that takes tokens and whose `SelfAttention` layers,
            all with the same number of heads, read the stream of those tokens. It runs as it is: put it in eval
            mode if it has dropout.
        tokens: token ids (B, L).

    Returns:
        Four tensors (layers, heads), layers in the order in which they ran.

    Example:
        >>> sizes = {"vocab_size": 64, "embed_dim": 64, "num_heads": 4, "num_layers": 2}
        >>> model = fastattn.nn.TransformerModel(**sizes, positions=None)
        >>> model_head_scores(model, torch.randint(64, (1, 32))).previous_token.shape
        torch.Size([2, 4])
    """
    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    if not layers:
        raise ValueError(f"model must contain fastattn.nn.SelfAttention, got a {type(model).__name__} without")
    scores: list[HeadScores] = []
    handles = [handle for layer in layers for handle in _observe(layer, tokens, scores)]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return HeadScores(*(torch.stack(layer_scores) for layer_scores in zip(*scores, strict=True)))


def _observe(layer: SelfAttention, tokens: Tensor, scores: list[HeadScores]) -> list:
    """Hooks that append the layer's scores once it has run, from q, k, v as its attention took them."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    def score(_module, _inputs, options, _output) -> None:
        q, k, v = (seen.pop(name) for name in "qkv")
        shown = {name: value for name, value in options.items() if name in ("mask", "window", "key_lengths")}
        _, lse = attention(q, k, v, **layer.options(**shown), return_lse=True)
        scores.append(head_scores(q, k, lse, tokens))

    points = {"q": layer.hook_q, "k": layer.hook_k, "v": layer.hook_v}
    handles = [point.register_forward_hook(keep(name)) for name, point in points.items()]
    return [*handles, layer.register_forward_hook(score, with_kwargs=True)]


def _weights_of_one_key(q: Tensor, keys: Tensor, lse: Tensor, scale: float) -> Tensor:
    """P of one listed key for each query, without a sweep: q (B, Hkv, G, Lq, D), keys (B, Hkv, Lq or 1, D)."""
    q, keys = q.to(lse.dtype), keys[:, :, None].to(lse.dtype)
    return torch.exp((q * keys).sum(-1) * scale - lse)


def _one_before_each_query(k: Tensor, queries: int) -> Tensor:
    """Key i - 1 for each query i (B, Hkv, Lq, D); for position 0, which has none, any key."""
    start = k.shape[2] - queries
    return k[:, :, start - 1 : -1] if start else k.roll(1, dims=2)


def _masses_of_matching_keys(
    q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight on keys after, and on keys with, an earlier copy of the query's token; and which queries have such.

    One tiled sweep. Returns two (B, Hkv, G, Lq) and two bool (B, Lq).
    """
    batch, queries, keys = q.shape[0], q.shape[3], k.shape[2]
    induction, duplicate = torch.zeros_like(lse), torch.zeros_like(lse)
    may_induce = torch.zeros(batch, queries, dtype=torch.bool, device=q.device)
    may_repeat = torch.zeros_like(may_induce)
    positions = torch.arange(keys, device=q.device)
    before = tokens.roll(1, dims=1)  # the token before each key; position 0 has none
    for rows in _spans(queries, _query_tile(lse, keys)):
        query_positions = positions[keys - queries :][rows][:, None]
        query_tokens = tokens[:, keys - queries :][:, rows, None]
        for columns in _spans(keys - queries + rows.stop, KEY_TILE):
            scores = q[..., rows, :].to(lse.dtype) @ k[:, :, None, columns].to(lse.dtype).mT * scale
            hidden = positions[columns] > query_positions
            weights = torch.exp(scores.masked_fill(hidden, float("-inf")) - lse[..., rows, None])
            follows = (before[:, None, columns] == query_tokens) & ~hidden & (positions[columns] > 0)
            repeats = (tokens[:, None, columns] == query_tokens) & (positions[columns] < query_positions)
            induction[..., rows] += _mass(weights, follows)
            duplicate[..., rows] += _mass(weights, repeats)
            may_induce[:, rows] |= follows.any(-1)
            may_repeat[:, rows] |= repeats.any(-1)
    return induction, duplicate, may_induce, may_repeat


def _mass(weights: Tensor, matches: Tensor) -> Tensor:
    """Weights (B, Hkv, G, M, N) on the matching keys (B, M, N), summed over keys."""
    return torch.einsum("bhgmn,bmn->bhgm", weights, matches.to(weights.dtype))


def _mean(mass: Tensor, counted: Tensor) -> Tensor:
    """Mean of (B, Hkv, G, Lq) over the counted (B, Lq), per head."""
    counted = counted[:, None, None].to(mass.dtype)
    return ((mass * counted).sum((0, 3)) / counted.sum()).flatten()


def _query_tile(lse: Tensor, keys: int) -> int:
    """As many queries as keep the scores of a tile within bounds."""
    rows_at_once = lse.shape[0] * lse.shape[1] * lse.shape[2]
    return max(1, TILE_SCORES // max(1, rows_at_once * min(keys, KEY_TILE)))


def _spans(stop: int, step: int) -> Iterator[slice]:
    for first in range(0, stop, step):
        yield slice(first, min(first + step, stop))


def _check_lse(lse: Tensor, q: Tensor) -> None:
    tensor("lse", lse)
    if lse.dtype != lse_dtype(q.dtype):
        raise TypeError(f"lse must be {lse_dtype(q.dtype)} for q of {q.dtype}, got {lse.dtype}")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must have shape {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    if lse.device != q.device:
        raise ValueError(f"lse must be on q's device {q.device}, got {lse.device}")


def _check_tokens(tokens: Tensor, q: Tensor, k: Tensor) -> None:
    tensor("tokens", tokens)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"tokens must have shape {(k.shape[0], k.shape[2])}, got {tuple(tokens.shape)}")
    if tokens.device != q.device:
        raise ValueError(f"tokens must be on q's device {q.device}, got {tokens.device}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q must not be longer than k, {k.shape[2]}; got {q.shape[2]}")
