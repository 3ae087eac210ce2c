"""What each attention head does: four scores, in O(N) memory, from the log-sum-exp the fused pass saves.

The pattern of a head is P_ij = exp(s_ij - lse_i) where query i sees key j and 0 elsewhere, so any sum over it can
be taken tile by tile, without ever storing it. All four sums run over keys at or before the query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.core.attention.functional import attention
from fastattn.core.attention.spec import attention_spec, check_key_lengths
from fastattn.core.statistics.spec import check_lse
from fastattn.ground.arguments import flag, tensor
from fastattn.ground.checks import Window, check_window
from fastattn.ground.modes import without_autocast
from fastattn.masks import Mask
from fastattn.masks import window as window_mask
from fastattn.masks.lists import Shape
from fastattn.masks.lowering import Positions
from fastattn.nn import SelfAttention
from fastattn.nn.attention import asked_for

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


def head_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    tokens: Tensor,
    *,
    scale: float | None = None,
    window: Window = None,
    mask: Mask | None = None,
    key_lengths: Tensor | Sequence[int] | None = None,
) -> HeadScores:
    """Scores of each head of one layer, averaged over the batch and over the positions that see such a key.

    With P_ij the weight of key j for query i and t the tokens:

    - induction (prefix matching): sum over j <= i of P_ij [t_(j-1) = t_i], what followed this token before. Key
      j - 1 must be seen, too: the first token of a document follows nothing;
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
        window, mask, key_lengths: as attention took them; a key that one of them hides has weight 0. Positions
            from key_lengths on are padding, and are not averaged over. A mask must not be lowered.

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
    check_lse(lse, q)
    _check_tokens(tokens, q, k)
    shown = _Shown.of(q, k, window, mask, key_lengths)
    with torch.no_grad(), without_autocast(q.device):
        # Seen by key head: (B, Hkv, group, Lq, ...), so that grouped heads need no copy of k.
        q = q.unflatten(1, (k.shape[1], -1))
        # A row that sees no key has lse -inf. With +inf its weights are 0: -inf minus -inf is NaN.
        lse = lse.masked_fill(lse == float("-inf"), float("inf")).unflatten(1, (k.shape[1], -1))
        position = torch.arange(k.shape[2], device=q.device)[k.shape[2] - q.shape[3] :, None]
        first = torch.zeros_like(position)
        one_before = (position - 1).clamp(min=0)
        previous = _weights_of_one_key(q, _one_before_each_query(k, q.shape[3]), lse, spec.scale)
        sink = _weights_of_one_key(q, k[:, :, :1], lse, spec.scale)
        induction, duplicate, may_induce, may_repeat = _masses_of_matching_keys(
            q, k, lse, tokens, spec.scale, shown
        )
        return HeadScores(
            induction=_mean(induction, may_induce),
            previous_token=_mean_of_one_key(previous, shown.times(position, one_before), position),
            duplicate_token=_mean(duplicate, may_repeat),
            first_token=_mean_of_one_key(sink, shown.times(position, first), position),
        )


class _Shown(NamedTuple):
    """Which keys the queries see, and which queries are padding."""

    shape: Shape
    key_heads: int
    mask: Mask | None
    lengths: Tensor | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, window: Window, mask: Mask | None, key_lengths: Any) -> _Shown:
        shape = Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(
                f"mask must be a value of fastattn.masks that is not lowered, got {type(mask).__name__}"
            )
        if mask is not None:
            mask.check(shape)
        if (sides := check_window(window)) != (None, None):
            mask = window_mask(*sides) if mask is None else mask & window_mask(*sides)
        lengths = None if key_lengths is None else check_key_lengths(key_lengths, q, k)
        if mask is not None and (ends := mask.key_ends(q.device)) is not None:
            ends = ends.clamp(max=k.shape[2]).expand(q.shape[0])
            lengths = ends if lengths is None else torch.minimum(lengths, ends)
        return cls(shape, k.shape[1], mask, lengths)

    def times(self, positions: Tensor, keys: Tensor) -> Tensor:
        """How often keys count for the queries at these positions: 0 where they are hidden, and for padding.

        From integers that broadcast to (M, N), to such as broadcast to (B, Hkv, group, M, N).
        """
        shape, device = self.shape, keys.device
        batch = torch.arange(shape.batch, device=device).view(-1, 1, 1, 1)
        times = torch.ones(1, 1, 1, 1, dtype=torch.int64, device=device)
        if self.lengths is not None:
            times = (torch.maximum(positions, keys) < self.lengths[batch]).long()
        if self.mask is not None:
            head = torch.arange(shape.heads, device=device).view(-1, 1, 1)
            at = Positions(shape, batch, head, positions - shape.offset, keys)
            times = times * self.mask.sees(at) * self.mask.counts(at)
        if times.shape[1] == 1:
            return times.unsqueeze(2)
        return times.unflatten(1, (self.key_heads, -1))


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


def model_head_scores(
    model: nn.Module,
    tokens: Tensor,
    *,
    mask: Mask | None = None,
    window: Window = None,
    key_lengths: Tensor | Sequence[int] | None = None,
) -> HeadScores:
    """The scores of every head of a model, from one forward over the tokens.

    Args:
        model: a `fastattn.nn.TransformerModel`, or any module that takes tokens and whose `SelfAttention` layers,
            all with the same number of heads, read the stream of those tokens. It runs as it is: put it in eval
            mode if it has dropout.
        tokens: token ids (B, L).
        mask, window, key_lengths: what the model is called with beside the tokens, if anything. Positions from
            key_lengths on (right padding), and positions that see no key, are not averaged over. For padding on
            the left, with a bool tensor `is_token` (B, L), the mask is
            `fastattn.masks.from_function(lambda b, h, q, k: is_token[b, q] & is_token[b, k])`.

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
            model(tokens, **asked_for(mask=mask, window=window, key_lengths=key_lengths))
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
        asked = {name: value for name, value in options.items() if name in ("mask", "window", "key_lengths")}
        given = layer.options(**asked)
        _, lse = attention(q, k, v, **given, return_lse=True)
        shown = {name: given[name] for name in ("mask", "window", "key_lengths")}
        scores.append(head_scores(q, k, lse, tokens, **shown))

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
    q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, scale: float, shown: _Shown
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight on keys after, and on keys with, an earlier copy of the query's token; and which queries see such.

    One tiled sweep. Returns four (B, Hkv, G, Lq), the last two bool.
    """
    queries, keys = q.shape[3], k.shape[2]
    induction, duplicate = torch.zeros_like(lse), torch.zeros_like(lse)
    may_induce = torch.zeros_like(lse, dtype=torch.bool)
    may_repeat = torch.zeros_like(may_induce)
    positions = torch.arange(keys, device=q.device)
    before = tokens.roll(1, dims=1)  # the token before each key; position 0 has none
    for rows in _spans(queries, _query_tile(lse, keys)):
        query_positions = positions[keys - queries :][rows][:, None]
        query_tokens = tokens[:, keys - queries :][:, None, None, rows, None]
        for columns in _spans(keys - queries + rows.stop, KEY_TILE):
            scores = q[..., rows, :].to(lse.dtype) @ k[:, :, None, columns].to(lse.dtype).mT * scale
            times = shown.times(query_positions, positions[columns])
            hidden = (times == 0) | (positions[columns] > query_positions)
            weights = torch.exp(scores.masked_fill(hidden, float("-inf")) - lse[..., rows, None]) * times
            follows = (before[:, None, None, None, columns] == query_tokens) & ~hidden & (positions[columns] > 0)
            follows = follows & (shown.times(query_positions, (positions[columns] - 1).clamp(min=0)) > 0)
            repeats = tokens[:, None, None, None, columns] == query_tokens
            repeats = repeats & ~hidden & (positions[columns] < query_positions)
            induction[..., rows] += (weights * follows).sum(-1)
            duplicate[..., rows] += (weights * repeats).sum(-1)
            may_induce[..., rows] |= follows.any(-1)
            may_repeat[..., rows] |= repeats.any(-1)
    return induction, duplicate, may_induce, may_repeat


def _mean(mass: Tensor, counted: Tensor) -> Tensor:
    """Mean of (B, Hkv, G, Lq) over the counted, for each head."""
    # Padding may hold NaN.
    return (mass.masked_fill(~counted, 0.0).sum((0, 3)) / counted.sum((0, 3))).flatten()


def _mean_of_one_key(weights: Tensor, times: Tensor, position: Tensor) -> Tensor:
    """Mean of the weights (B, Hkv, G, Lq) of one key before each query, over the queries that see it."""
    times = (times * (position > 0))[..., 0].expand(weights.shape)
    return _mean(weights * times, times > 0)


def _query_tile(lse: Tensor, keys: int) -> int:
    """As many queries as keep the scores of a tile within bounds."""
    rows_at_once = lse.shape[0] * lse.shape[1] * lse.shape[2]
    return max(1, TILE_SCORES // max(1, rows_at_once * min(keys, KEY_TILE)))


def _spans(stop: int, step: int) -> Iterator[slice]:
    for first in range(0, stop, step):
        yield slice(first, min(first + step, stop))


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
