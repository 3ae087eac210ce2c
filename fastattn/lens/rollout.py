"""Attention rollout: which tokens reach a position through all layers, by the averages of the heads alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.ground.checks import lse_dtype
from fastattn.lens.adapters import adapt
from fastattn.lens.running import check_model, last_stream
from fastattn.lens.showing import Shown, finished, heat, new_figure, plain_labels
from fastattn.lens.sources import Watched, watched_values
from fastattn.lens.texts import Words, position_of, token_rows


@dataclass(frozen=True, eq=False, repr=False)
class Rollout(Shown):
    """What `rollout` found.

    Attributes:
        sources: (B, L) how much of the query's last stream comes from each token, by rollout; each row sums to 1
            (less what sinks take).
        by_layer: (layers + 1, B, L) the same for the stream before each layer: row 0 is `sources`, the last row is
            1 at the query.
        tokens: (B, L) the ids.
        query: the position.
    """

    sources: Tensor
    by_layer: Tensor
    tokens: Tensor
    query: int
    words: Words

    def table(self, top: int = 10, row: int = 0) -> list[tuple[str, ...]]:
        """The tokens that reach the query most in one row of the batch."""
        values, places = self.sources[row].topk(min(top, self.sources.shape[1]))
        lines = [
            (str(place), self.words(self.tokens[row, place]), f"{value:.3g}")
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
        ]
        return [("position", "token", f"reaches position {self.query}"), *lines]

    def plot(self, path: str | Path | None = None, *, row: int = 0) -> Any:
        """How the query's sources spread from the top layer down: a matplotlib Figure.

        Args:
            path: where to save it, too.
            row: which row of the batch.
        """
        layers, _, length = self.by_layer.shape
        figure = new_figure(min(2 + 0.45 * length, 16), 1.5 + 0.2 * layers)
        axes = figure.subplots()
        heat(
            figure,
            axes,
            self.by_layer[:, row].tolist(),
            f"What reaches position {self.query}",
            cmap="Blues",
            vmin=0,
        )
        axes.set_ylabel("before layer")
        if length <= 64:
            labels = plain_labels([self.words(token) for token in self.tokens[row]])
            axes.set_xticks(range(length), labels, rotation=60, ha="right", fontsize=8)
        return finished(figure, path)


def rollout(
    model: nn.Module, tokens: str | Tensor, query: int = -1, *, tokenizer: Any = None, **options: Any
) -> Rollout:
    """How much each token reaches one position through all layers, in O(layers x B x L x d) memory.

    Attention rollout multiplies (P + I) / 2 of all layers, P the mean of the heads' patterns. For one query only a
    row of that product is needed: from the top layer down, r becomes (r + r P) / 2. And r P, a weighted column sum
    of the pattern, is what the backward of attention gives to the values, in O(L) memory, under whatever mask or
    bias the model has.

    Args:
        model: any that `adapt` knows, with or without a head, of Hugging Face's those with attn_implementation
            "fastattn" or "sdpa"; in eval mode if it has dropout.
        tokens: ids (B, L), or text if there is a tokenizer.
        query: the position; the last by default.
        tokenizer: a Hugging Face tokenizer: takes text, and prints tokens as text.
        options: what the model is called with beside the tokens.

    Returns:
        A `Rollout`: fp32 (fp64 for a model in fp64).

    Raises:
        TypeError, ValueError: before the model runs.

    Example:
        >>> sizes = {"vocab_size": 50, "embed_dim": 32, "num_heads": 4, "num_layers": 3, "max_length": 64}
        >>> model = fastattn.nn.TransformerModel(**sizes)
        >>> rollout(model, torch.randint(50, (1, 16))).sources.shape
        torch.Size([1, 16])

    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers (2020), section 3.
    """
    adapter, words = adapt(model), Words(tokenizer)
    tokens = token_rows("tokens", tokens, adapter, words)
    place = position_of("query", query, tokens.shape[1])
    check_model(model)
    with watched_values(adapter, range(adapter.num_layers)) as watched:
        last_stream(adapter, tokens, options)
        wide = lse_dtype(watched[0].heads_out.dtype)
        reach = torch.zeros(tokens.shape, dtype=wide, device=tokens.device)
        reach[:, place] = 1.0
        rows = [reach]
        for layer in reversed(range(adapter.num_layers)):
            reach = (reach + _through_attention(watched.pop(layer), reach)) / 2
            rows.append(reach)
    by_layer = torch.stack(rows[::-1])
    return Rollout(by_layer[0], by_layer, tokens, place, words)


def _through_attention(attention: Watched, reach: Tensor) -> Tensor:
    """sum_i reach_i P_ij (B, L), P the mean of the heads' patterns."""
    # Half precision keeps small weights when the largest is 1.
    largest = reach.amax(-1, keepdim=True)
    upstream = torch.zeros_like(attention.heads_out)
    # Every component of a value is weighted alike: one of them tells.
    upstream[..., 0] = (reach / largest)[:, None].to(upstream.dtype)
    column_sums = attention.pulled(upstream)[..., 0].to(reach.dtype).sum(1)
    return column_sums * largest / attention.heads_out.shape[1]
