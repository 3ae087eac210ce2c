"""Which neurons write a token: by their weights, and by what they add to its logit over a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.ground.arguments import integer
from fastattn.ground.checks import lse_dtype
from fastattn.ground.modes import without_autocast
from fastattn.lens.adapters import Adapter, adapt
from fastattn.lens.attribution import check_linear_head, logit_direction
from fastattn.lens.frozen import FrozenNorm
from fastattn.lens.running import check_mlps, check_model, hooks, last_stream, neuron_activations
from fastattn.lens.showing import Shown, bars, finished, new_figure
from fastattn.lens.texts import Token, Words, counted_positions, token_of_each_row, token_rows

TILE_NEURONS = 2**22  # neurons' values held at once: 16 MiB in fp32


class Firing(NamedTuple):
    """Where a neuron adds to the token's logit: row of the batch, position, and how much it adds there."""

    row: int
    position: int
    contribution: float


class Neuron(NamedTuple):
    """A neuron that writes the token; `mean` and `fires` are None without a text."""

    layer: int
    neuron: int
    congruence: float
    mean: float | None
    fires: tuple[Firing, ...] | None


@dataclass(frozen=True, eq=False, repr=False)
class Neurons(Shown):
    """What `neurons` found.

    Attributes:
        top: the neurons that add most, the first adds most.
        congruence: for each layer (neurons,): the dot product of what a neuron writes with the direction that
            reads the token's logit. Empty for a layer without MLP.
        mean: for each layer (neurons,): what a neuron adds to the token's logit, averaged over the text; None
            without a text.
        token: the id.
        tokens: (B, L) the text's ids, or None.
    """

    top: tuple[Neuron, ...]
    congruence: tuple[Tensor, ...]
    mean: tuple[Tensor, ...] | None
    token: int
    tokens: Tensor | None
    words: Words

    def table(self, places: int = 3) -> list[tuple[str, ...]]:
        """One line a neuron, with the places where it adds most."""
        title = f"congruence with {self.words(self.token)}"
        if self.tokens is None:
            return [("neuron", title), *((_name(n), f"{n.congruence:+.3f}") for n in self.top)]
        lines: list[tuple[str, ...]] = [("neuron", title, "adds on average", "adds most after")]
        for n in self.top:
            where = "  ".join(f"{self._context(f)} {f.contribution:+.2f}" for f in (n.fires or ())[:places])
            lines.append((_name(n), f"{n.congruence:+.3f}", f"{n.mean:+.4f}", where))
        return lines

    def plot(self, path: str | Path | None = None) -> Any:
        """Bars of what the neurons add, or of their congruence if there is no text: a matplotlib Figure.

        Args:
            path: where to save it, too.
        """
        figure = new_figure(7, 1 + 0.25 * len(self.top))
        values = [n.congruence if n.mean is None else n.mean for n in self.top]
        what = "Congruence with" if self.mean is None else "Added on average to the logit of"
        bars(figure.subplots(), [_name(n) for n in self.top], values, f"{what} {self.words(self.token)}")
        return finished(figure, path)

    def _context(self, firing: Firing) -> str:
        """The token at which it fires, and two before it."""
        assert self.tokens is not None
        seen = self.tokens[firing.row, max(0, firing.position - 2) : firing.position + 1]
        return self.words.text(seen) if self.words.tokenizer else f"[{firing.row}, {firing.position}]"


def _name(n: Neuron) -> str:
    return f"L{n.layer}N{n.neuron}"


def neurons(
    model: nn.Module,
    token: Token,
    text_tokens: str | Tensor | None = None,
    *,
    against: Token | None = None,
    top: int = 20,
    places: int = 5,
    counted: Tensor | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Neurons:
    """Which neurons write a token: their congruence with it; over a text, what they add to its logit, and where.

    A neuron n that is a_n at a position writes a_n w_n to the stream. Of this the token's logit reads
    a_n w_n . u / scale, u the token's row of the unembedding, less the mean of all rows, behind the final norm's
    gain (and the gain of a norm of what the MLP adds), the norms' scales as they are at that position. w_n . u is
    its congruence. Over all neurons of a layer that sums to what `attribution` gives its MLP.

    Neurons are computed for some positions at a time, by the MLP's own code, and summed up: no (B L x neurons)
    is stored. The model runs twice: the first run tells the scales.

    Args:
        model: any that `adapt` knows, with an unembedding; in eval mode if it has dropout. Models whose logits are
            no sum (BERT's head, post-norm blocks) are refused.
        token: an id, or text.
        text_tokens: ids (B, L), or text: over which the neurons are measured. None for congruence alone.
        against: a token whose logit is subtracted; None for the mean logit of the vocabulary.
        top: how many neurons to return: those of the largest mean, or congruence if there is no text.
        places: how many positions to tell for each, those where it adds most.
        counted: (B, L) bool, which positions count: to ask who writes the token where it comes next, those before
            it. By default those that attention_mask (B, L) or key_lengths, if they are among the options, do not
            call padding.
        tokenizer: a Hugging Face tokenizer: takes text, and prints tokens as text.
        options: what the model is called with beside the tokens.

    Returns:
        A `Neurons`: print it, or `.plot()` it.

    Raises:
        TypeError, ValueError: before the model runs.

    Example:
        >>> sizes = {"vocab_size": 50, "embed_dim": 32, "num_heads": 4, "num_layers": 3, "max_length": 64}
        >>> model = fastattn.nn.TransformerModel(**sizes)
        >>> len(neurons(model, 7, torch.randint(50, (1, 16)), top=4).top)
        4

    Source: Miller and Neo, We Found An Neuron in GPT-2 (2023), for congruence; Geva et al., Transformer
    Feed-Forward Layers Build Predictions by Promoting Concepts in the Vocabulary Space (2022), section 3.
    """
    adapter, words = adapt(model), Words(tokenizer)
    check_linear_head(adapter, "neurons")
    check_mlps(adapter)
    _check_blocks(adapter)
    top, places = integer("top", top, least=1), integer("places", places, least=1)
    wanted = token_of_each_row("token", token, 1, adapter, words)
    other = None if against is None else token_of_each_row("against", against, 1, adapter, words)
    tokens = None
    if text_tokens is not None:
        tokens = token_rows("text_tokens", text_tokens, adapter, words)
        counted = counted_positions(counted, tokens, options)
        check_model(model)
    with torch.no_grad():
        congruence = _congruence(adapter, wanted, other)
        if tokens is None:
            chosen = [Neuron(layer, n, c, None, None) for layer, n, c in _largest(congruence, top)]
            return Neurons(tuple(chosen), congruence, None, int(wanted), None, words)
        assert counted is not None
        found = _measured(adapter, tokens, options, congruence, counted, places)
    chosen = []
    for layer, n, mean in _largest(found.means(), top):
        fires = found.firings(layer, n, tokens.shape[1])
        chosen.append(Neuron(layer, n, float(congruence[layer][n]), mean, fires))
    return Neurons(tuple(chosen), congruence, found.means(), int(wanted), tokens, words)


def _check_blocks(adapter: Adapter) -> None:
    if adapter.post_norm:
        raise ValueError(
            f"neurons needs blocks that add to one stream, and family {adapter.family.name} norms the stream in "
            "every block"
        )
    if adapter.num_layers == 0 or all(adapter.part("mlp", i) is None for i in range(adapter.num_layers)):
        raise ValueError("model must have an MLP, and none of its blocks does")


def _congruence(adapter: Adapter, token: Tensor, against: Tensor | None) -> tuple[Tensor, ...]:
    """For each layer (neurons,), or none: w_n . u."""
    table = adapter.unembedding_weight
    with without_autocast(table.device):
        direction = logit_direction(adapter, token, against)[0][0]
        if adapter.final_norm is not None:
            direction = FrozenNorm.of(adapter.final_norm, table[0]).before(direction)
        found = []
        for layer in range(adapter.num_layers):
            if adapter.part("mlp", layer) is None:
                found.append(table.new_zeros(0, dtype=lse_dtype(table.dtype)))
                continue
            rows, _ = adapter.neuron_outputs(layer)
            reads, norm = direction, adapter.norm_after("mlp", layer)
            if norm is not None:
                reads = FrozenNorm.of(norm, rows[0]).before(direction)
            wide = lse_dtype(rows.dtype)
            found.append(rows.to(wide) @ reads.to(wide))
    return tuple(found)


def _largest(by_layer: tuple[Tensor, ...], top: int) -> list[tuple[int, int, float]]:
    """(layer, neuron, value) of the largest values, descending."""
    sizes = [len(values) for values in by_layer]
    values, places = torch.cat(list(by_layer)).topk(min(top, sum(sizes)))
    found = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        layer = 0
        while place >= sizes[layer]:
            place -= sizes[layer]
            layer += 1
        found.append((layer, place, value))
    return found


class _Measured:
    """Sums over the text, and the positions where each neuron adds most."""

    def __init__(self, congruence: tuple[Tensor, ...], counted: Tensor, places: int) -> None:
        self.congruence, self.counted, self.places = congruence, counted.flatten(), places
        self.sums = [torch.zeros_like(values) for values in congruence]
        self.best = [values.new_zeros(0, len(values)) for values in congruence]
        self.where = [torch.zeros(best.shape, dtype=torch.int64, device=best.device) for best in self.best]

    def add(self, layer: int, first: int, activations: Tensor, scales: Tensor) -> None:
        """Neurons (N, neurons) of the N positions from `first` on, and what scales them (N,)."""
        rows = torch.arange(first, first + len(activations), device=activations.device)
        rows = rows[self.counted[first : first + len(activations)]]
        values = activations.to(scales.dtype) * self.congruence[layer] * scales[:, None]
        values = values[rows - first]
        self.sums[layer] += values.sum(0)
        best = torch.cat([self.best[layer], values])
        where = torch.cat([self.where[layer], rows[:, None].expand(values.shape)])
        self.best[layer], order = best.topk(min(self.places, len(best)), dim=0)
        self.where[layer] = where.gather(0, order)

    def means(self) -> tuple[Tensor, ...]:
        return tuple(total / self.counted.sum() for total in self.sums)

    def firings(self, layer: int, neuron: int, length: int) -> tuple[Firing, ...]:
        best, where = self.best[layer][:, neuron].tolist(), self.where[layer][:, neuron].tolist()
        return tuple(Firing(at // length, at % length, value) for value, at in zip(best, where, strict=True))


def _measured(
    adapter: Adapter,
    tokens: Tensor,
    options: dict[str, Any],
    congruence: tuple[Tensor, ...],
    counted: Tensor,
    places: int,
) -> _Measured:
    scales = _scales(adapter, tokens, options)
    found = _Measured(congruence, counted, places)
    busy = False

    def measure(layer: int) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            nonlocal busy
            if busy:  # the MLP runs again, below
                return
            busy = True
            x = x.flatten(0, -2)
            step = max(1, TILE_NEURONS // len(congruence[layer]))
            for first in range(0, len(x), step):
                active = neuron_activations(adapter, layer, x[first : first + step])
                with without_autocast(x.device):
                    found.add(layer, first, active, scales[layer][first : first + step])
            busy = False

        return see

    with hooks() as hooked:
        for layer in range(adapter.num_layers):
            if adapter.part("mlp", layer) is not None:
                hooked.on_input(adapter.part("mlp", layer), measure(layer))
        last_stream(adapter, tokens, options)
    return found


def _scales(adapter: Adapter, tokens: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """For each layer, what the norms behind its MLP multiply by at each position, gains aside: (B L,)."""
    after: dict[int, Tensor] = {}
    given: dict[int, Tensor] = {}

    def note(layer: int, norm: nn.Module) -> Callable[[Tensor], None]:
        def see(normed: Tensor) -> None:
            x = given.pop(layer)
            after[layer] = FrozenNorm.of(norm.forward, x).inverse_scale(x, normed)

        return see

    with hooks() as hooked:
        for layer in range(adapter.num_layers):
            norm = adapter.norm_after("mlp", layer)
            if norm is not None:
                hooked.on_input(norm, lambda x, layer=layer: given.update({layer: x}))  # type: ignore[misc]
                hooked.on_output(norm, note(layer, norm))
        stream = last_stream(adapter, tokens, options)
    final = torch.ones(tokens.shape, dtype=lse_dtype(stream.dtype), device=stream.device)
    if adapter.final_norm is not None:
        final = FrozenNorm.of(adapter.final_norm, stream).inverse_scale(stream, adapter.final_norm(stream))
    return [(final * after.get(layer, 1.0)).flatten() for layer in range(adapter.num_layers)]
