"""Which head does what: known kinds of attention, its spread and its reach, for every head in one run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.core.statistics.functional import attention_statistics, match_mass
from fastattn.core.statistics.labels import KINDS
from fastattn.ground.modes import without_autocast
from fastattn.lens.adapters import adapt
from fastattn.lens.places import Call, listen
from fastattn.lens.running import check_model, last_stream
from fastattn.lens.showing import Shown, finished, heat, new_figure
from fastattn.lens.texts import Words, counted_positions, token_rows

SCORES = ("induction", "previous_token", "duplicate_token", "first_token")


@dataclass(frozen=True, eq=False, repr=False)
class HeadReport(Shown):
    """What `head_report` found. Scores are mean weights, from 0 to 1; NaN where no position could.

    Attributes:
        induction: (layers, heads) weight on what followed this token before (prefix matching).
        previous_token: (layers, heads) weight on the token before.
        duplicate_token: (layers, heads) weight on where this token stood before.
        first_token: (layers, heads) weight on position 0, the sink.
        entropy: (layers, heads) of a query's weights, nats.
        mean_distance: (layers, heads) how many tokens back the head looks, on average.
        received: (layers, heads, B, L) the weight that each token is given, summed over the queries.
        chance: what a head that attends evenly to all tokens so far has of the four scores.
        tokens: (B, L) the ids.
    """

    induction: Tensor
    previous_token: Tensor
    duplicate_token: Tensor
    first_token: Tensor
    entropy: Tensor
    mean_distance: Tensor
    received: Tensor
    chance: dict[str, float]
    tokens: Tensor
    words: Words

    def best(self, score: str, top: int = 5) -> list[tuple[int, int, float]]:
        """The heads with the largest of one score: (layer, head, score), the largest first.

        Raises:
            ValueError: there is no such score.
        """
        if score not in (*SCORES, "entropy", "mean_distance"):
            raise ValueError(f"score must be one of {', '.join(SCORES)}, entropy or mean_distance; got {score!r}")
        values = getattr(self, score)
        best, places = values.nan_to_num(float("-inf")).flatten().topk(min(top, values.numel()))
        heads = values.shape[1]
        return [(i // heads, i % heads, value) for value, i in zip(best.tolist(), places.tolist(), strict=True)]

    def table(self, top: int = 3) -> list[tuple[str, ...]]:
        """For each of the four scores the heads that have most of it, with all their numbers."""
        header = ("what", "head", *(name.replace("_", " ") for name in SCORES), "entropy", "distance")
        lines: list[tuple[str, ...]] = [header]
        for score in SCORES:
            for layer, head, _ in self.best(score, top):
                numbers = [f"{float(getattr(self, name)[layer, head]):.2f}" for name in (*SCORES, "entropy")]
                distance = f"{float(self.mean_distance[layer, head]):.1f}"
                lines.append((score.replace("_", " "), f"L{layer}H{head}", *numbers, distance))
        return [*lines, ("by chance", "", *(f"{self.chance[name]:.2f}" for name in SCORES), "", "")]

    def plot(self, path: str | Path | None = None) -> Any:
        """A map of all heads for each score, for entropy and for distance: a matplotlib Figure.

        Args:
            path: where to save it, too.
        """
        layers, heads = self.entropy.shape
        figure = new_figure(3 * (1.5 + 0.12 * heads), 2 * (1.2 + 0.12 * layers))
        axes = figure.subplots(2, 3, sharex=True, sharey=True).flatten()
        for name, ax in zip((*SCORES, "entropy", "mean_distance"), axes, strict=True):
            bounds = {"vmin": 0, "vmax": 1} if name in SCORES else {"vmin": 0}
            heat(figure, ax, getattr(self, name).tolist(), name.replace("_", " "), cmap="viridis", **bounds)
        figure.supxlabel("head")
        figure.supylabel("layer")
        return finished(figure, path)


def head_report(
    model: nn.Module,
    tokens: str | Tensor,
    *,
    counted: Tensor | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> HeadReport:
    """What each head of a model attends to, from one run over the tokens, in O(L) memory a head.

    Tokens that repeat tell most: twice the same random tokens show the induction heads. Induction and duplicate
    are averaged over the queries whose token stood in the text before, previous and first over all but the first
    query, entropy and distance over all. A head whose window ends before the key in question scores 0 there.

    Args:
        model: any that `adapt` knows, of Hugging Face's those with attn_implementation "fastattn" or "sdpa"; in
            eval mode if it has dropout.
        tokens: ids (B, L), or text if there is a tokenizer.
        counted: (B, L) bool, which queries count. By default those that attention_mask (B, L) or key_lengths, if
            they are among the options, do not call padding.
        tokenizer: a Hugging Face tokenizer: takes text.
        options: what the model is called with beside the tokens.

    Returns:
        A `HeadReport`: print it, `.plot()` it, ask it for the `.best("induction")`.

    Raises:
        TypeError, ValueError: before the model runs.

    Example:
        >>> sizes = {"vocab_size": 50, "embed_dim": 32, "num_heads": 4, "num_layers": 3, "max_length": 64}
        >>> model = fastattn.nn.TransformerModel(**sizes)
        >>> head_report(model, torch.randint(50, (1, 16)).repeat(1, 2)).induction.shape
        torch.Size([3, 4])

    Source: Olsson et al., In-context Learning and Induction Heads (2022), for induction and previous token; Wang
    et al., Interpretability in the Wild (2022), for duplicate token; Xiao et al., Efficient Streaming Language
    Models with Attention Sinks (2023), for the first token.
    """
    adapter, words = adapt(model), Words(tokenizer)
    tokens = token_rows("tokens", tokens, adapter, words)
    counted = counted_positions(counted, tokens, options)
    check_model(model)
    found: dict[int, list[Tensor]] = {}
    with torch.no_grad(), ExitStack() as stack:
        possible, even = _by_chance(tokens)
        counts = possible & counted
        for layer in range(adapter.num_layers):
            see = _measure(found, layer, tokens, counted, counts)
            stack.callback(listen(adapter, layer, see).remove)
        last_stream(adapter, tokens, options)
    columns = [torch.stack(values) for values in zip(*(found[i] for i in sorted(found)), strict=True)]
    scores, entropy, distance, received = columns
    chance = dict(zip(SCORES, _mean(even, counts).tolist(), strict=True))
    by_score = dict(zip(SCORES, scores.unbind(1), strict=True))
    return HeadReport(
        **by_score,
        entropy=entropy,
        mean_distance=distance,
        received=received.transpose(1, 2),
        chance=chance,
        tokens=tokens,
        words=words,
    )


def _measure(
    found: dict[int, list[Tensor]], layer: int, tokens: Tensor, counted: Tensor, counts: Tensor
) -> Callable[[Call], None]:
    """Sees a layer's attention; keeps scores (4, heads), entropy and distance (heads,), received (B, heads, L)."""

    def see(call: Call) -> None:
        _, lse = call.attend(return_lse=True)
        seen = attention_statistics(
            call.q,
            call.k,
            lse,
            want=("entropy", "mean_distance", "weighted_received", "match_mass"),
            labels=tokens,
            match=KINDS_IN_ORDER,
            query_weights=counted[:, None].to(lse.dtype),
            **call.options,
        )
        with without_autocast(lse.device):
            found[layer] = [
                _mean(seen.match_mass, counts[:, :, None]),
                _mean(seen.entropy[None], counted[None, :, None])[0],
                _mean(seen.mean_distance[None], counted[None, :, None])[0],
                seen.weighted_received,
            ]

    return see


# As `SCORES`.
KINDS_IN_ORDER = tuple(sorted(KINDS, key=("induction", "previous", "duplicate", "first").index))


def _by_chance(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For each score, which queries have such a key, bool (4, B, L), and the weight of an even head on it."""
    batch, length = tokens.shape
    nothing = torch.zeros(batch, 1, length, 1, device=tokens.device)
    lse = torch.arange(1, length + 1, device=tokens.device).float().log().expand(batch, 1, length)
    found = [match_mass(nothing, nothing, lse, tokens, kind=kind, causal=True) for kind in KINDS_IN_ORDER]
    return torch.stack([m.possible for m in found]), torch.stack([m.mass[:, 0] for m in found])


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of (scores, B, ..., L) over batch and positions that count, (scores, ...); NaN where none does."""
    total = values.masked_fill(~counts, 0.0).sum((1, -1))
    number = counts.sum((1, -1)).to(values.dtype)
    return total / number
