"""Who wrote a token: its logit as an exact sum over embeddings, heads, MLPs and biases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.ground.arguments import integer
from fastattn.ground.checks import lse_dtype
from fastattn.ground.modes import without_autocast
from fastattn.lens.adapters import Adapter, adapt
from fastattn.lens.frozen import FrozenNorm
from fastattn.lens.places import Name, Z, read
from fastattn.lens.running import check_mlps, check_model, check_streams, hooks, last_stream, neuron_activations
from fastattn.lens.showing import Shown, bars, finished, heat, new_figure
from fastattn.lens.sources import attention_of_layer
from fastattn.lens.texts import Token, Words, position_of, token_of_each_row, token_rows


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Shown):
    """What `attribution` found. Numbers are logits, one for each row of the batch.

    Attributes:
        total: (B,) logit of the target, less that of the token it is held against, or the mean of all; before a
            soft cap, if there is one.
        components: what each part of the model adds to it, (B,) each, by name: "embedding.wte", "L3H5" (head 5 of
            layer 3), "L3 attention bias", "L3 mlp", "L3 mlp bias", "final norm bias", "unembedding bias". They
            sum to `total`, to rounding.
        tokens: (B, L) the ids.
        position: where the logit stands.
        target, against: (B,) ids; against is None for the mean of the vocabulary.
    """

    total: Tensor
    components: dict[str, Tensor]
    tokens: Tensor
    position: int
    target: Tensor
    against: Tensor | None
    words: Words
    adapter: Adapter = field(repr=False)
    _state: _State = field(repr=False)

    @property
    def heads(self) -> Tensor:
        """(layers, heads, B): what each head adds."""
        layers, heads = range(self.adapter.num_layers), range(self.adapter.num_heads)
        return torch.stack([torch.stack([self.components[f"L{i}H{h}"] for h in heads]) for i in layers])

    def head_by_source(self, layer: int, head: int) -> Tensor:
        """(B, L): what a head adds, by the token that it was read from. Sums to the head's component.

        With P the head's pattern, i the position, u the direction that is read: P_ij (v_j . W_O u). As out_i is
        the sum of P_ij v_j, P_ij is what the backward of attention gives to v_j: one backward of one layer, in
        O(L) memory, of the attention that the model has (of Hugging Face's "fastattn" or "sdpa"). The model runs
        again, up to that layer.
        """
        layer = self.adapter.layer(layer)
        head = _index("head", head, self.adapter.num_heads)
        with without_autocast(self.tokens.device):
            out = self.adapter.projections(layer).out[head].to(self.total.dtype)
            direction = self._state.to_heads[layer] @ out.mT

        attention = attention_of_layer(self.adapter, layer, self.tokens, self._state.options)
        upstream = torch.zeros_like(attention.heads_out)
        upstream[:, head, self.position] = direction.to(upstream.dtype)
        values, wide = attention.values.detach(), self.total.dtype
        shares = (values.to(wide) * attention.pulled(upstream).to(wide)).sum((1, -1))
        self._check_same_model(f"L{layer}H{head}", shares, values.dtype)
        return shares

    def _check_same_model(self, name: str, shares: Tensor, dtype: torch.dtype) -> None:
        """The model ran again: it must have computed the same."""
        error = (shares.sum(-1) - self.components[name]).abs()
        if (error > 32 * _eps(dtype, shares.device) * shares.abs().sum(-1)).any():
            raise ValueError(
                f"the model must be as it was: {name} added {self.components[name].tolist()}, and when it ran "
                f"again {shares.sum(-1).tolist()}. Its weights, its hooks or autocast have changed"
            )

    def mlp_by_neuron(self, layer: int) -> Tensor:
        """(B, neurons): what each neuron of a layer's MLP adds. Sums to the MLP's component.

        Raises:
            ValueError: the layer has no MLP.
        """
        layer = self.adapter.layer(layer)
        if layer not in self._state.neurons:
            raise ValueError(f"block {layer} has no MLP")
        return self._state.neurons[layer]

    def table(self, top: int = 15, row: int = 0) -> list[tuple[str, ...]]:
        """The components that add or take most in one row of the batch, the largest first, then the rest."""
        ordered = self._ordered(row)
        lines: list[tuple[str, ...]] = [("component", "adds to " + self._title(row))]
        lines += [(name, f"{value:+.4f}") for name, value in ordered[:top]]
        if rest := ordered[top:]:
            lines.append((f"{len(rest)} others", f"{sum(value for _, value in rest):+.4f}"))
        return [*lines, ("total", f"{float(self.total[row]):+.4f}")]

    def plot(self, path: str | Path | None = None, *, top: int = 20, row: int = 0) -> Any:
        """Bars of the largest components beside a map of all heads: a matplotlib Figure.

        Args:
            path: where to save it, too.
            top: how many bars.
            row: which row of the batch.
        """
        ordered = self._ordered(row)[:top]
        figure = new_figure(10, 1 + 0.25 * max(len(ordered), 10))
        left, right = figure.subplots(1, 2)
        total = f"{float(self.total[row]):+.3f}"
        bars(left, [name for name, _ in ordered], [v for _, v in ordered], f"{self._title(row)} = {total}")
        heads = self.heads[..., row]
        most = float(heads.abs().max()) or 1.0
        heat(figure, right, heads.tolist(), "Heads", cmap="RdBu_r", vmin=-most, vmax=most)
        right.set(xlabel="head", ylabel="layer")
        return finished(figure, path)

    def _ordered(self, row: int) -> list[tuple[str, float]]:
        values = [(name, float(value[row])) for name, value in self.components.items()]
        return sorted(values, key=lambda pair: -abs(pair[1]))

    def _title(self, row: int) -> str:
        against = "mean" if self.against is None else self.words(self.against[row])
        return f"logit {self.words(self.target[row])} - {against}"


@dataclass(frozen=True, eq=False)
class _State:
    """What the questions after the sum need."""

    options: dict[str, Any]
    to_heads: dict[int, Tensor]  # the direction (B, d) that reads what a layer's `out` gives
    neurons: dict[int, Tensor]  # (B, neurons), what each neuron adds


def attribution(
    model: nn.Module,
    tokens: str | Tensor,
    target: Token,
    against: Token | None = None,
    *,
    position: int = -1,
    tokenizer: Any = None,
    **options: Any,
) -> Attribution:
    """The logit of a token, or the difference of two, as a sum of what every part of the model adds. It is exact.

    The residual stream is a sum, and the logit is linear in it once the scale of the final norm is kept as it is:
    so each part's share is a dot product with one direction. Norms of what a part adds (Gemma 3) and norms of the
    stream (post-norm blocks) are kept at their scale, too. No logits but those asked for are made.

    Args:
        model: any that `adapt` knows, with an unembedding, and in eval mode if it has dropout. A model with an
            activation before the unembedding (BERT) is refused: its logits are no sum.
        tokens: ids (B, L), or text if there is a tokenizer.
        target: the token whose logit it is: an id, one for each row (B,), or text.
        against: a token whose logit is subtracted; None for the mean logit of the vocabulary, since what all
            logits share changes no probability.
        position: the position whose next token it is; the last by default.
        tokenizer: a Hugging Face tokenizer: takes text, and prints tokens as text.
        options: what the model is called with beside the tokens.

    Returns:
        An `Attribution`, whose `components` sum to `total`. Ask it for `head_by_source(layer, head)` and
        `mlp_by_neuron(layer)`.

    Raises:
        TypeError, ValueError: before the model runs; and after it, if the parts do not sum to the model's own
            logit: then the model does something that its family does not describe.

    Example:
        >>> sizes = {"vocab_size": 50, "embed_dim": 32, "num_heads": 4, "num_layers": 3, "max_length": 64}
        >>> model = fastattn.nn.TransformerModel(**sizes)
        >>> found = attribution(model, torch.randint(50, (1, 16)), target=7, against=8)
        >>> torch.allclose(sum(found.components.values()), found.total, atol=1e-5)
        True

    Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), "The residual stream"; Wang et
    al., Interpretability in the Wild (2022), section 3, which names it direct logit attribution.
    """
    adapter, words = adapt(model), Words(tokenizer)
    check_linear_head(adapter, "attribution")
    check_mlps(adapter)
    tokens = token_rows("tokens", tokens, adapter, words)
    place = position_of("position", position, tokens.shape[1])
    wanted = token_of_each_row("target", target, len(tokens), adapter, words)
    other = None if against is None else token_of_each_row("against", against, len(tokens), adapter, words)
    if other is not None and bool((wanted == other).any()):
        raise ValueError(f"against must be another token than target, got {int(wanted[wanted == other][0])} twice")
    check_model(model)
    with torch.no_grad():
        seen, state = _seen(adapter, tokens, place, options)
        with without_autocast(tokens.device):
            parts = _Parts(adapter, seen)
            direction, bias = logit_direction(adapter, wanted, other)
            parts.read(direction, bias)
            total = parts.dot(state, direction) + bias
    parts.check(total, state.dtype)
    components = dict(reversed(parts.components.items()))
    kept = _State(options, parts.to_heads, parts.neurons)
    return Attribution(total, components, tokens, place, wanted, other, words, adapter, kept)


def check_linear_head(adapter: Adapter, what: str) -> None:
    """The logits must be linear in the last stream, but for the scale of a norm.

    Raises:
        ValueError: they are not, or there are none.
    """
    if adapter.head is not None:
        raise ValueError(
            f"{what} needs logits that are a sum over the model's parts, and family {adapter.family.name} has an "
            f"activation between the last stream and the unembedding ({adapter.family.head})"
        )
    adapter.unembedding_weight  # noqa: B018  (raises where there is none)
    check_streams(adapter)


def _seen(adapter: Adapter, tokens: Tensor, place: int, options: dict[str, Any]) -> tuple[dict[Any, Any], Tensor]:
    """What the parts make of the tokens at one position, by part, and what the unembedding is given there (B, d).

    Embeddings are tensors (B, d), heads (B, Hq, Dv), MLPs the activations of their neurons (B, neurons), norms
    pairs of a `FrozenNorm` and 1 / scale (B,).
    """
    seen: dict[Any, Any] = {}

    def keep(key: Any, dim: int = 1) -> Any:
        def see(t: Tensor) -> None:
            t = t if t.dim() > 2 else t[None]  # positions may come without a batch
            at = t.select(dim, place).clone()  # a view would keep all positions
            seen[key] = at.expand(len(tokens), *at.shape[1:])

        return see

    with hooks() as hooked, ExitStack() as stack:
        for i, module in enumerate(adapter.embeddings):
            hooked.on_output(module, keep(("embedding", i)))
        for key, norm in _norms(adapter):
            if norm is not adapter.final_norm:  # what that is given ends the run
                hooked.on_input(norm, keep(key))
        for layer in range(adapter.num_layers):
            stack.callback(read(adapter, Name(layer, Z), keep(("heads", layer), dim=2)).remove)
            if adapter.part("mlp", layer) is not None:
                hooked.on_input(adapter.part("mlp", layer), keep(("mlp", layer)))
        state = seen["final norm"] = last_stream(adapter, tokens, options)[:, place]
    if adapter.final_norm is None:
        del seen["final norm"]
    for key, norm in _norms(adapter):
        x, frozen, normed = seen[key], FrozenNorm.of(norm, seen[key]), norm(seen[key])
        seen[key] = frozen, frozen.inverse_scale(x, normed)
        state = normed if norm is adapter.final_norm else state
    for layer in range(adapter.num_layers):
        if ("mlp", layer) in seen:
            seen["mlp", layer] = neuron_activations(adapter, layer, seen["mlp", layer])
    return seen, state


def _norms(adapter: Adapter) -> Iterator[tuple[Any, nn.Module]]:
    """The norms that what a part adds goes through, by their names in `components`."""
    named: list[tuple[str, Any]] = [("final norm", adapter.final_norm), ("embedding norm", adapter.embedding_norm)]
    for layer in range(adapter.num_layers):
        for part in ("attention", "mlp"):
            named.append((f"L{layer} {part} norm after", adapter.norm_after(part, layer)))
            if adapter.post_norm:
                named.append((f"L{layer} {part} norm", adapter.part(f"{part}_norm", layer)))
    yield from ((name, norm) for name, norm in named if norm is not None)


def logit_direction(adapter: Adapter, target: Tensor, against: Tensor | None) -> tuple[Tensor, Tensor]:
    """What reads a logit, less another or the mean of all, from the normed stream: (B, d), and its bias (B,)."""
    wide = lse_dtype(adapter.unembedding_weight.dtype)

    def difference(table: Tensor) -> Tensor:
        other = table.mean(0, dtype=wide) if against is None else table[against].to(wide)
        return table[target].to(wide) - other

    direction, bias = difference(adapter.unembedding_weight), adapter.unembedding_bias
    return direction, direction.new_zeros(len(direction)) if bias is None else difference(bias)


class _Parts:
    """The sum, taken apart from the unembedding down: one direction, which each norm on the way changes."""

    def __init__(self, adapter: Adapter, seen: dict[Any, Any]) -> None:
        self.adapter, self.seen = adapter, seen
        self.components: dict[str, Tensor] = {}
        self.to_heads: dict[int, Tensor] = {}
        self.neurons: dict[int, Tensor] = {}

    def read(self, direction: Tensor, bias: Tensor) -> None:
        if self.adapter.unembedding_bias is not None:
            self.components["unembedding bias"] = bias
        direction = self.through("final norm", direction)
        for layer in reversed(range(self.adapter.num_layers)):
            direction = self.through(f"L{layer} mlp norm", direction)
            if self.adapter.part("mlp", layer) is not None:
                self.add_mlp(layer, self.through(f"L{layer} mlp norm after", direction))
            direction = self.through(f"L{layer} attention norm", direction)
            self.add_heads(layer, self.through(f"L{layer} attention norm after", direction))
        direction = self.through("embedding norm", direction)
        for i, name in reversed(list(enumerate(self.adapter.embedding_names))):
            self.components[f"embedding.{name.rpartition('.')[2]}"] = self.dot(
                self.seen["embedding", i], direction
            )

    def through(self, name: str, direction: Tensor) -> Tensor:
        """The direction before a norm of frozen scale, whose bias becomes a component."""
        if name not in self.seen:
            return direction
        frozen, inverse_scale = self.seen[name]
        if bool(frozen.bias.any()):
            self.components[f"{name} bias"] = direction @ frozen.bias
        return frozen.before(direction) * inverse_scale[:, None]

    def add_heads(self, layer: int, direction: Tensor) -> None:
        weights = self.adapter.projections(layer)
        self.to_heads[layer] = direction
        if weights.out_bias is not None:
            self.components[f"L{layer} attention bias"] = self.dot(weights.out_bias, direction)
        outputs = self.seen["heads", layer].to(direction.dtype)
        read = torch.einsum("hed,bd->bhe", weights.out.to(direction.dtype), direction)
        for head in reversed(range(self.adapter.num_heads)):
            self.components[f"L{layer}H{head}"] = self.dot(outputs[:, head], read[:, head])

    def add_mlp(self, layer: int, direction: Tensor) -> None:
        rows, bias = self.adapter.neuron_outputs(layer)
        if bias is not None:
            self.components[f"L{layer} mlp bias"] = self.dot(bias, direction)
        active = self.seen["mlp", layer].to(direction.dtype)
        self.neurons[layer] = active * (direction @ rows.to(direction.dtype).mT)
        self.components[f"L{layer} mlp"] = self.neurons[layer].sum(-1)

    def dot(self, x: Tensor, direction: Tensor) -> Tensor:
        return (x.to(direction.dtype) * direction).sum(-1)

    def check(self, total: Tensor, dtype: torch.dtype) -> None:
        """The parts must sum to the logit, to the rounding of the model's dtype."""
        values = torch.stack(list(self.components.values()))
        error = (values.sum(0) - total).abs()
        allowed = 32 * _eps(dtype, total.device) * values.abs().sum(0)
        if not (error <= allowed).all():
            raise ValueError(
                f"the parts that family {self.adapter.family.name} names sum to {values.sum(0).tolist()}, and the "
                f"model's own logit is {total.tolist()}: this {type(self.adapter.model).__name__} computes "
                "something that its family does not describe, or hooks change what its parts give"
            )


def _eps(dtype: torch.dtype, device: torch.device) -> float:
    """The relative rounding of what a model in this dtype computes."""
    # Norms of Llama's kind compute in float32 even for float64; autocast computes in less than the stream has.
    dtypes = [dtype, torch.float32]
    if torch.is_autocast_enabled(device.type):
        dtypes.append(torch.get_autocast_dtype(device.type))
    return max(torch.finfo(t).eps for t in dtypes)


def _index(name: str, value: int, count: int) -> int:
    value = integer(name, value)
    if not -count <= value < count:
        raise ValueError(f"{name} must be from 0 to {count - 1}, got {value}")
    return value % count
