"""What a model believes after each layer: the logit lens, and the tuned lens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.ground.arguments import integer
from fastattn.ground.checks import lse_dtype
from fastattn.lens.adapters import Adapter, adapt
from fastattn.lens.running import Hooks, check_model, check_streams, hooks, last_stream
from fastattn.lens.showing import Shown, finished, new_figure, plain_labels
from fastattn.lens.texts import Token, Words, position_of, token_of_each_row, token_rows
from fastattn.lens.vocabulary import TILE_LOGITS, Reading, Unembedding, read, rows_at_once

Positions = int | slice | Sequence[int] | None


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Shown):
    """What `logit_lens` found. S = layers + 1: row l is the stream before layer l, the last the model's output.

    Attributes:
        tokens: (S, B, L, top) the most probable tokens, the most probable first.
        probabilities: (S, B, L, top) of those tokens.
        entropy: (S, B, L) of the whole distribution, nats.
        kl: (S, B, L) KL(model's own output || row), nats: 0 in the last row.
        target_rank: (S, B, L), 1 is the most probable token; None without targets.
        target_probability: (S, B, L), or None.
        inputs: (B, L) the token at each position that was read.
        positions: (L,) where in the text these are.
    """

    tokens: Tensor
    probabilities: Tensor
    entropy: Tensor
    kl: Tensor
    target_rank: Tensor | None
    target_probability: Tensor | None
    inputs: Tensor
    positions: Tensor
    words: Words

    def table(self, position: int = -1, row: int = 0) -> list[tuple[str, ...]]:
        """One line a layer, for one position of one row of the batch: by default the last of the first."""
        target = () if self.target_rank is None else ("target's rank", "probability")
        lines: list[tuple[str, ...]] = [("before layer", "most probable", "entropy", "KL", *target)]
        last = len(self.tokens) - 1
        for i in range(last + 1):
            best = "  ".join(
                f"{self.words(token)} {float(p):.2f}"
                for token, p in zip(
                    self.tokens[i, row, position], self.probabilities[i, row, position], strict=True
                )
            )
            line = [str(i) if i < last else "output", best]
            line += [f"{float(t[i, row, position]):.2f}" for t in (self.entropy, self.kl)]
            if self.target_rank is not None and self.target_probability is not None:
                line += [str(int(self.target_rank[i, row, position]))]
                line += [f"{float(self.target_probability[i, row, position]):.4f}"]
            lines.append(tuple(line))
        return lines

    def plot(self, path: str | Path | None = None, *, row: int = 0) -> Any:
        """The most probable token of every layer and position, coloured by its probability: a matplotlib Figure.

        Args:
            path: where to save it, too.
            row: which row of the batch.
        """
        layers, _, length, _ = self.tokens.shape
        figure = new_figure(1.5 + 0.9 * length, 1 + 0.24 * layers)
        axes = figure.subplots()
        best = self.probabilities[:, row, :, 0].tolist()
        image = axes.imshow(best, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="Blues")
        for i in range(layers):
            for j in range(length):
                (text,) = plain_labels([self.words(self.tokens[i, row, j, 0]).strip("'")])
                color = "white" if best[i][j] > 0.6 else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
        axes.set_xticks(
            range(length), plain_labels([self.words(t) for t in self.inputs[row]]), rotation=40, ha="right"
        )
        axes.set_yticks(range(layers), [*map(str, range(layers - 1)), "output"], fontsize=7)
        axes.set_ylabel("before layer")
        axes.set_title("The most probable next token after each layer", loc="left", fontsize=10)
        figure.colorbar(image, ax=axes, label="probability", shrink=0.8)
        return finished(figure, path)


def logit_lens(
    model: nn.Module,
    tokens: str | Tensor,
    top: int = 5,
    targets: Token | None = None,
    *,
    positions: Positions = None,
    tuned: TunedLens | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> LogitLens:
    """What the model would say after each layer: final norm and unembedding, read from each residual stream.

    Logits are made chunk by chunk of the vocabulary, for some positions at a time, and never stored. The streams
    are: memory is O(layers x B x L x d).

    Args:
        model: any that `adapt` knows and that has an unembedding, in eval mode if it has dropout.
        tokens: ids (B, L), or text if there is a tokenizer.
        top: how many of the most probable tokens to return.
        targets: a token whose rank and probability to return: an id, its text, one for each row (B,), or one for
            each position that is read, (B, L).
        positions: which positions to read: a number, a slice or several numbers; None for all.
        tuned: a `TunedLens`, whose maps each stream goes through first.
        tokenizer: a Hugging Face tokenizer: takes text, and prints tokens as text.
        options: what the model is called with beside the tokens.

    Returns:
        A `LogitLens`: print it, or `.plot()` it.

    Raises:
        TypeError, ValueError: before the model runs; for a target of several tokens, say.

    Example:
        >>> sizes = {"vocab_size": 50, "embed_dim": 32, "num_heads": 4, "num_layers": 3, "max_length": 64}
        >>> model = fastattn.nn.TransformerModel(**sizes)
        >>> logit_lens(model, torch.randint(50, (2, 16)), top=3).tokens.shape
        torch.Size([4, 2, 16, 3])

    Source: nostalgebraist, interpreting GPT: the logit lens (2020); Belrose et al., Eliciting Latent Predictions
    from Transformers with the Tuned Lens (2023), section 2.
    """
    adapter, words = adapt(model), Words(tokenizer)
    unembedding = Unembedding.of(adapter)
    top = integer("top", top, least=1)
    if top > len(unembedding.weight):
        raise ValueError(f"top must be at most the vocabulary's size {len(unembedding.weight)}, got {top}")
    tokens = token_rows("tokens", tokens, adapter, words)
    places = _places(positions, tokens.shape[1]).to(tokens.device)
    wanted = None
    if targets is not None:
        shape = (tokens.shape[0], len(places))
        wanted = token_of_each_row("targets", targets, shape[0], adapter, words, length=shape[1])
        wanted = (wanted if wanted.dim() == 2 else wanted[:, None]).expand(shape).flatten()
    if tuned is not None:
        tuned.check_fits(adapter)
    check_streams(adapter)
    check_model(model)
    with torch.no_grad():
        streams = _streams(adapter, tokens, places, options)
        reading = _read(adapter, unembedding, streams, tuned, top, wanted)
    shaped = [None if t is None else t.unflatten(1, streams.shape[1:3]) for t in reading]
    return LogitLens(*shaped, tokens[:, places], places, words)  # type: ignore[arg-type, call-arg]


def _places(positions: Positions, length: int) -> Tensor:
    """The positions that are read, checked, as indices."""
    if positions is None or isinstance(positions, slice):
        chosen = list(range(length))[positions or slice(None)]
    else:
        several = positions if isinstance(positions, Sequence) else [positions]
        chosen = [position_of("positions", position, length) for position in several]
    if not chosen:
        raise ValueError(f"positions must name at least one of the {length} positions, got {positions}")
    return torch.tensor(chosen)


def _streams(adapter: Adapter, tokens: Tensor, places: Tensor, options: dict[str, Any]) -> Tensor:
    """The residual streams (layers + 1, B, L, d) at these positions: before each layer, and after the last."""
    seen: list[Tensor] = []
    with hooks() as hooked:
        _see_streams(hooked, adapter, lambda stream: seen.append(stream[:, places]))
        last = last_stream(adapter, tokens, options)
    return torch.stack([*seen, last[:, places]])


def _see_streams(hooked: Hooks, adapter: Adapter, see: Any) -> None:
    for block in adapter.blocks:
        hooked.on_input(block, see)


def _read(
    adapter: Adapter,
    unembedding: Unembedding,
    streams: Tensor,
    tuned: TunedLens | None,
    top: int,
    targets: Tensor | None,
) -> Reading:
    """The reading of streams (S, B, L, d), as (S, B L, ...)."""
    rows = streams.flatten(1, 2)
    step = rows_at_once(len(rows), len(unembedding.weight))
    readings = []
    for first in range(0, rows.shape[1], step):
        some = rows[:, first : first + step]
        states = normed(adapter, some if tuned is None else tuned(some))
        readings.append(read(states, unembedding, top, None if targets is None else targets[first : first + step]))
    joined = [None if t[0] is None else torch.cat(t, 1) for t in zip(*readings, strict=True)]
    return Reading(*joined)  # type: ignore[arg-type]


def normed(adapter: Adapter, stream: Tensor) -> Tensor:
    """What the unembedding is given for a stream (..., d)."""
    for module in (adapter.final_norm, adapter.head):
        stream = stream if module is None else module(stream)
    return stream


class TunedLens(nn.Module):
    """An affine map for each layer, from its stream to the last: what the layer believes, in the last one's terms.

    Row l of the streams becomes h + h W_l^T + b_l; the last row, the model's own output, stays as it is. New maps
    are zero: that is the logit lens. `fit` trains them.

    Args:
        num_layers, width: of the model. `TunedLens.of(model)` reads them.

    Parameters: weight (layers, d, d), bias (layers, d).

    Example:
        >>> tuned = TunedLens.of(model)
        >>> tuned.fit(model, batches)
        >>> tuned.save("lens.pt")
        >>> logit_lens(model, tokens, tuned=TunedLens.load("lens.pt"))

    Source: Belrose et al., Eliciting Latent Predictions from Transformers with the Tuned Lens (2023), section 3.
    """

    def __init__(
        self, num_layers: int, width: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        num_layers, width = integer("num_layers", num_layers, least=1), integer("width", width, least=1)
        self.weight = nn.Parameter(torch.zeros(num_layers, width, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_layers, width, device=device, dtype=dtype))

    @classmethod
    def of(cls, model: nn.Module) -> TunedLens:
        """Maps for this model that have not been trained, on its device and in its dtype."""
        adapter = adapt(model)
        table = adapter.unembedding_weight
        return cls(adapter.num_layers, table.shape[1], device=table.device, dtype=table.dtype)

    def forward(self, streams: Tensor) -> Tensor:
        """The streams (layers + 1, N, d) as the last layer would have them; same shape."""
        moved = streams[:-1] + torch.baddbmm(self.bias[:, None], streams[:-1], self.weight.mT)
        return torch.cat([moved, streams[-1:]])

    def check_fits(self, adapter: Adapter) -> None:
        """The maps are for a model of this size.

        Raises:
            ValueError: they are not.
        """
        table = adapter.unembedding_weight
        needed = (adapter.num_layers, table.shape[1], table.shape[1])
        if self.weight.shape != needed:
            raise ValueError(f"tuned must have weights {needed} for this model, got {tuple(self.weight.shape)}")
        if (self.weight.dtype, self.weight.device) != (table.dtype, table.device):
            raise ValueError(
                f"tuned must be {table.dtype} on {table.device} as the model is, got {self.weight.dtype} on "
                f"{self.weight.device}: move it with .to()"
            )

    def fit(self, model: nn.Module, batches: Iterable[Tensor], *, learning_rate: float = 1e-3) -> Tensor:
        """Train the maps to bring each layer's reading close to the model's own output, by KL(output || reading).

        The model is not changed. Logits are made for some positions at a time.

        Args:
            model: the model, in eval mode if it has dropout.
            batches: token ids (B, L), one step of Adam's a batch.
            learning_rate: of Adam.

        Returns:
            (steps, layers) the mean KL of each layer before each step, nats.
        """
        adapter = adapt(model)
        self.check_fits(adapter)
        check_streams(adapter)
        check_model(model)
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        losses = []
        for tokens in batches:
            tokens = token_rows("batches", tokens, adapter, Words())
            with torch.no_grad():
                everywhere = torch.arange(tokens.shape[1], device=tokens.device)
                streams = _streams(adapter, tokens, everywhere, {}).flatten(1, 2)
            losses.append(self._set_gradients(adapter, streams))
            optimizer.step()
        if not losses:
            raise ValueError("batches must hold at least one batch of token ids, got none")
        return torch.stack(losses)

    def _set_gradients(self, adapter: Adapter, streams: Tensor) -> Tensor:
        """Set the gradients of the mean KL of streams (layers + 1, N, d); returns the KL of each layer."""
        unembedding = Unembedding.of(adapter)
        step = max(1, TILE_LOGITS // (2 * len(unembedding.weight)))
        losses = torch.zeros(len(self.weight), dtype=lse_dtype(streams.dtype), device=streams.device)

        def log_probabilities(stream: Tensor) -> Tensor:
            logits = F.linear(normed(adapter, stream), unembedding.weight, unembedding.bias)
            return unembedding.capped(logits).log_softmax(-1)

        for parameter in (self.weight, self.bias):
            parameter.grad = torch.zeros_like(parameter)
        for first in range(0, streams.shape[1], step):
            rows = streams[:, first : first + step]
            with torch.no_grad():
                output = log_probabilities(rows[-1])
            for layer, stream in enumerate(rows[:-1]):
                weight, bias = (p[layer].detach().requires_grad_() for p in (self.weight, self.bias))
                with torch.enable_grad():
                    read = log_probabilities(stream + F.linear(stream, weight, bias))
                    kl = F.kl_div(read, output, log_target=True, reduction="sum") / streams.shape[1]
                for parameter, part in zip(
                    (self.weight, self.bias), torch.autograd.grad(kl, (weight, bias)), strict=True
                ):
                    parameter.grad[layer] += part  # type: ignore[index]
                losses[layer] += kl.detach()
        return losses

    def save(self, path: str | Path) -> None:
        """Write the maps to a file."""
        torch.save(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | Path, *, device: Any = None) -> TunedLens:
        """The maps that `save` wrote, on this device; by default the CPU."""
        state = torch.load(path, map_location="cpu" if device is None else device, weights_only=True)
        weight = state.get("weight")
        if set(state) != {"weight", "bias"} or weight.dim() != 3:
            raise ValueError(f"path must be a file that TunedLens.save wrote, got one with {', '.join(state)}")
        tuned = cls(*weight.shape[:2], device=weight.device, dtype=weight.dtype)
        tuned.load_state_dict(state)
        return tuned
