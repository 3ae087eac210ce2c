"""What the report shows, as numbers: filled from the lens's own functions, before anything is packed or drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.lens import (
    Attribution,
    LogitLens,
    Neurons,
    adapt,
    attribution,
    head_report,
    logit_lens,
    neurons,
    watch,
)
from fastattn.lens.adapters import Adapter
from fastattn.lens.attribution import check_linear_head
from fastattn.lens.texts import Token, Words, token_of_each_row, token_rows

TOP_KEYS = 8  # keys told for each query of each head
LENS_TOP = 5  # tokens told for each layer and position of the logit lens
LENS_POSITIONS = 128  # the logit lens reads the last so many tokens
SOURCES = 6  # heads whose part in the attribution is told by source token; each is a run of the model
TOP_NEURONS = 20
SCORES = ("induction", "previous_token", "duplicate_token", "first_token", "entropy", "mean_distance")


@dataclass(frozen=True, eq=False)
class Heads:
    """What every head does. Y layers, H heads, L tokens.

    Attributes:
        scores: (Y, H) for each of `SCORES` and "largest_weight", means over queries; NaN where none can have it.
        chance: what a head that attends evenly has of some of the scores.
        lag_profile: (Y, H, 2 L - 1), the weight on the key that stands so many tokens before the query, averaged
            over all queries; lag l at l + L - 1. Sums to 1.
        received: (Y, H, L), the weights that each token gets, summed over the queries.
        keys, weights: (Y, H, L, top), the keys with the largest weights of each query, descending; -1 where it
            sees fewer.
    """

    scores: dict[str, Tensor]
    chance: dict[str, float]
    lag_profile: Tensor
    received: Tensor
    keys: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows of one model on one text.

    Attributes:
        title: what the model is called.
        family: the row of `fastattn.lens.families()` that describes it.
        tokens: (L,) ids.
        words: shows ids as text.
        cut: how many tokens the text had, if it was longer than the report may be; else None.
        heads, lens, attribution, neurons: the answers; None where the model cannot be asked: `missing` says why.
        target: the token that attribution and neurons are about, and the lens at the last position; or None.
        sources: by name of a head ("L3H5"), (L,): what its part of the attribution was read from.
        missing: by section, a sentence.
    """

    title: str
    family: str
    tokens: Tensor
    words: Words
    cut: int | None
    heads: Heads
    target: int | None = None
    lens: LogitLens | None = None
    attribution: Attribution | None = None
    neurons: Neurons | None = None
    sources: dict[str, Tensor] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def make_report(
    model: nn.Module,
    tokens: Tensor,
    *,
    title: str,
    tokenizer: Any = None,
    target: Token | None = None,
    against: Token | None = None,
    cut: int | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Report:
    """Ask everything of a model about one text.

    Args:
        model: any that `adapt` knows, in eval mode if it has dropout.
        tokens: ids (1, L).
        title: what the model is called.
        tokenizer: a Hugging Face tokenizer, to show ids as text.
        target, against: the tokens whose logits after the last position are taken apart; by default the two most
            probable ones. With a target and no `against` it is the target's logit alone.
        cut: how many tokens the text had before it was cut.
        say: is told what is asked next.

    Raises:
        TypeError, ValueError: as the lens's functions raise them.
    """
    adapter, words = adapt(model), Words(tokenizer)
    tokens = token_rows("tokens", tokens, adapter, words)
    say("heads")
    heads = look_at_heads(model, tokens)
    report = Report(title, adapter.family.name, tokens[0], words, cut, heads)
    if obstacle := _obstacle(lambda: adapter.unembedding_weight):
        return replace(report, missing=dict.fromkeys(("lens", "attribution", "neurons"), obstacle))
    say("logit lens")
    if target is None:
        best = logit_lens(model, tokens, 2, positions=-1).tokens[-1, 0, 0]
        target, against = int(best[0]), int(best[1])
    last = token_of_each_row("target", target, 1, adapter, words)
    report = replace(report, target=int(last), lens=_lens(adapter, tokens, last, tokenizer))
    missing = {}
    if obstacle := _obstacle(lambda: check_linear_head(adapter, "attribution")):
        missing["attribution"] = obstacle
    else:
        say("attribution")
        found = attribution(model, tokens, target, against, tokenizer=tokenizer)
        report = replace(report, attribution=found, sources=_sources(found))
    # Without a text it refuses the same models, and runs none.
    if obstacle := _obstacle(lambda: neurons(model, target, top=1, tokenizer=tokenizer)):
        missing["neurons"] = obstacle
    else:
        say("neurons")
        report = replace(report, neurons=neurons(model, target, tokens, top=TOP_NEURONS, tokenizer=tokenizer))
    return replace(report, missing=missing)


def _obstacle(check: Callable[[], object]) -> str | None:
    """The sentence that a check refuses with, or None."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def look_at_heads(model: nn.Module, tokens: Tensor) -> Heads:
    """Every head's scores, lags, received weight and top keys over tokens (1, L)."""
    length = tokens.shape[1]
    known = head_report(model, tokens)
    lags, largest, top = (f"blocks.*.attention.{name}" for name in ("lag_profile", "max_weight", "top_keys"))
    with torch.no_grad(), watch(model, (lags, largest, top), top=min(TOP_KEYS, length)) as seen:
        model(tokens)
    scores = {name: getattr(known, name) for name in SCORES}
    return Heads(
        scores={**scores, "largest_weight": seen[largest][:, 0].mean(-1)},
        chance=known.chance,
        lag_profile=seen[lags][:, 0] / length,
        received=known.received[:, :, 0],
        keys=seen[top].keys[:, 0],
        weights=seen[top].weights[:, 0],
    )


def _lens(adapter: Adapter, tokens: Tensor, last: Tensor, tokenizer: Any) -> LogitLens:
    """The lens over the last tokens. The target of each is the token that comes next in the text."""
    places = slice(max(0, tokens.shape[1] - LENS_POSITIONS), None)
    targets = torch.cat([tokens[:, 1:], last[:, None]], 1)[:, places]
    top = min(LENS_TOP, len(adapter.unembedding_weight))
    return logit_lens(adapter.model, tokens, top, targets, positions=places, tokenizer=tokenizer)


def _sources(found: Attribution) -> dict[str, Tensor]:
    """Of the heads that add or take most, what they were read from (L,), by name."""
    sizes = found.heads[..., 0].abs().flatten()
    sources = {}
    for place in sizes.argsort(descending=True)[:SOURCES].tolist():
        layer, head = divmod(place, found.adapter.num_heads)
        sources[f"L{layer}H{head}"] = found.head_by_source(layer, head)[0]
    return sources
