"""What each attention head does: four scores, in O(N) memory, from the log-sum-exp that the fused pass saves.

They are statistics of attention (fastattn.core.statistics): the weight on matching keys, averaged over the queries
that see one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.core.attention.functional import attention
from fastattn.core.attention.spec import attention_spec, check_key_lengths
from fastattn.core.statistics.functional import attention_statistics
from fastattn.core.statistics.spec import check_lse
from fastattn.ground.arguments import flag, tensor
from fastattn.ground.checks import Window, check_window
from fastattn.ground.modes import without_autocast
from fastattn.lens.running import check_model
from fastattn.masks import Mask
from fastattn.masks import window as window_mask
from fastattn.masks.lists import Shape
from fastattn.masks.lowering import Positions
from fastattn.nn import SelfAttention
from fastattn.nn.attention import asked_for


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
    attention_spec(q, k, k, causal=False, scale=scale)
    check_lse(lse, q)
    _check_tokens(tokens, q, k)
    shown = _Shown.of(q, k, window, mask, key_lengths)
    with without_autocast(q.device):
        follows = shown if shown.mask is None else shown._replace(mask=shown.mask & _KeyBefore(shown.mask))
        found = _mean_masses(q, k, lse, tokens, ("induction",), scale, follows)
        found += _mean_masses(q, k, lse, tokens, ("previous", "duplicate", "first"), scale, shown)
        return HeadScores(*found)


class _Shown(NamedTuple):
    """Which keys the queries see: a mask, and how many positions of each batch element are no padding."""

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
        return cls(mask, lengths)


@dataclass(frozen=True)
class _KeyBefore(Mask):
    """The keys whose predecessor a mask shows."""

    mask: Mask

    def sees(self, at: Positions) -> Tensor:
        return self.mask.sees(at._replace(key=(at.key - 1).clamp(min=0))) & (at.key > 0)


def _mean_masses(
    q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, kinds: Sequence[str], scale: float | None, shown: _Shown
) -> list[Tensor]:
    """Of each kind of match the weight on such keys, averaged over the queries that see one: (Hq,)."""
    # All kinds are of keys at or before the query: the rest need not be looked at.
    options: dict[str, Any] = {"want": "match_mass", "labels": tokens.long(), "match": kinds, "causal": True}
    options |= {"mask": shown.mask, "key_lengths": shown.lengths}
    mass = attention_statistics(q, k, lse, scale=scale, **options).match_mass
    # A head without scores gives all keys that it sees the same weight, so it gives matches some if it sees any.
    heads = 1 if shown.mask is None else q.shape[1]
    nothing = q.new_zeros(len(q), heads, 1, 1)
    even = torch.full((len(q), heads, q.shape[2]), 30.0, dtype=lse.dtype, device=lse.device)
    # Of the least width that the kernels take.
    there = attention_statistics(
        nothing.expand(-1, -1, q.shape[2], 8), nothing.expand(-1, -1, k.shape[2], 8), even, **options
    ).match_mass
    counted = there > 0
    if shown.lengths is not None:
        position = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        counted = counted & (position < shown.lengths[:, None, None])
    # Padding may hold NaN.
    counted = counted.expand(mass.shape)
    return list(mass.masked_fill(~counted, 0.0).sum((1, 3)) / counted.sum((1, 3)))


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
            all with the same number of heads, read the stream of those tokens; in eval mode if it has dropout.
        tokens: token ids (B, L).
        mask, window, key_lengths: what the model is called with beside the tokens, if anything. Positions from
            key_lengths on (right padding), and positions that see no key, are not averaged over. For padding on
            the left, with a bool tensor `is_token` (B, L), the mask is
            `fastattn.masks.from_function(lambda b, h, q, k: is_token[b, q] & is_token[b, k])`.

    Returns:
        Four tensors (layers, heads), layers in the order in which they ran.

    Raises:
        ValueError: the model has no such layer, or drops.

    Example:
        >>> sizes = {"vocab_size": 64, "embed_dim": 64, "num_heads": 4, "num_layers": 2}
        >>> model = fastattn.nn.TransformerModel(**sizes, positions=None)
        >>> model_head_scores(model, torch.randint(64, (1, 32))).previous_token.shape
        torch.Size([2, 4])
    """
    check_model(model)
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
