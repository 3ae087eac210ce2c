"""Where a fact is kept: spoil the subject, put one clean state back, and see whether the answer returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.ground.arguments import integer, number
from fastattn.ground.checks import lse_dtype
from fastattn.ground.modes import without_autocast
from fastattn.lens.adapters import Adapter, adapt
from fastattn.lens.places import Name, change, kinds_of, read
from fastattn.lens.running import check_model, last_stream
from fastattn.lens.showing import Shown, finished, new_figure, plain_labels
from fastattn.lens.texts import Token, Words, position_of, token_of_each_row, token_rows

Subject = str | int | slice | Sequence[int]
STREAM, ATTENTION, MLP = "resid_post", "attention.out", "mlp.out"
TITLES = {STREAM: "residual stream", ATTENTION: "attention", MLP: "MLP"}
_COLORS = {STREAM: "Purples", ATTENTION: "Reds", MLP: "Greens"}


@dataclass(frozen=True, eq=False, repr=False)
class CausalTrace(Shown):
    """What `causal_trace` found. All numbers are probabilities of the target, averaged over the samples of noise.

    Attributes:
        restored: (layers, L) for each kind, "resid_post", "attention.out" and, if there are MLPs, "mlp.out": the
            probability with the subject noised and this state clean again. Row l is the window around layer l.
        clean: the probability without noise.
        noised: the probability with the subject noised, and nothing restored.
        noise: (samples, subject tokens, d), what was added to the first stream.
        subject: positions of the subject's tokens.
        target: the id.
        position: where the target is predicted.
        window: how many layers of attention or MLPs were restored together.
        tokens: (1, L) the ids.
    """

    restored: dict[str, Tensor]
    clean: float
    noised: float
    noise: Tensor
    subject: tuple[int, ...]
    target: int
    position: int
    window: int
    tokens: Tensor
    words: Words

    @property
    def effects(self) -> dict[str, Tensor]:
        """(layers, L) for each kind: the indirect effect, by how much the probability rises above `noised`."""
        return {kind: values - self.noised for kind, values in self.restored.items()}

    def best(self, kind: str, top: int = 5) -> list[tuple[int, int, float]]:
        """The states of one kind with the largest effects: (layer, position, effect), the largest first.

        Raises:
            ValueError: there is no such kind.
        """
        if kind not in self.restored:
            raise ValueError(f"kind must be one of {', '.join(self.restored)}, got {kind!r}")
        effects = self.effects[kind]
        values, places = effects.flatten().topk(min(top, effects.numel()))
        length = effects.shape[1]
        return [
            (i // length, i % length, value) for value, i in zip(values.tolist(), places.tolist(), strict=True)
        ]

    def table(self, top: int = 3) -> list[tuple[str, ...]]:
        """The states that bring back most of the answer, for each kind."""
        lines: list[tuple[str, ...]] = [
            ("restored", "layer", "token", f"probability of {self.words(self.target)}")
        ]
        lines += [("everything", "", "", f"{self.clean:.4f}"), ("nothing", "", "", f"{self.noised:.4f}")]
        for kind, restored in self.restored.items():
            for layer, position, _ in self.best(kind, top):
                probability = f"{float(restored[layer, position]):.4f}"
                lines.append((TITLES[kind], str(layer), self._label(position), probability))
        return lines

    def plot(self, path: str | Path | None = None) -> Any:
        """A heat map of positions by layers for each kind, as in figure 1 of the paper: a matplotlib Figure.

        Args:
            path: where to save it, too.
        """
        layers, length = next(iter(self.restored.values())).shape
        figure = new_figure(len(self.restored) * (2.4 + 0.09 * layers), 1.6 + 0.24 * length)
        every_axes = figure.subplots(1, len(self.restored), sharey=True, squeeze=False)[0]
        for (kind, restored), axes in zip(self.restored.items(), every_axes, strict=True):
            bounds = {"vmin": self.noised, "vmax": max(self.clean, float(restored.max()))}
            image = axes.imshow(restored.T.tolist(), aspect="auto", cmap=_COLORS[kind], **bounds)
            figure.colorbar(image, ax=axes, shrink=0.8)
            together = f", {self.window} layers together" if kind != STREAM and self.window > 1 else ""
            axes.set_title(f"Restored: {TITLES[kind]}{together}", loc="left", fontsize=9)
            axes.set(xlabel="layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
        labels = plain_labels([self._label(position) for position in range(length)])
        every_axes[0].set_yticks(range(length), labels, fontsize=8)
        figure.suptitle(plain_labels([f"Probability of {self.words(self.target)} (* noised)"])[0], fontsize=10)
        return finished(figure, path)

    def _label(self, position: int) -> str:
        return f"{self.words(self.tokens[0, position])}{'*' if position in self.subject else ''}"


def causal_trace(
    model: nn.Module,
    clean: str | Tensor,
    *,
    subject: Subject,
    target: Token | None = None,
    position: int = -1,
    noise: float = 3.0,
    samples: int = 10,
    window: int | None = None,
    kinds: Sequence[str] | None = None,
    rows: int = 64,
    tokenizer: Any = None,
    **options: Any,
) -> CausalTrace:
    """Where a fact is kept: the states that bring the answer back, when the subject cannot be read.

    Normal noise is added to the first stream at the subject's tokens, so that the model does not know whom the
    text is about. Then one state of the clean run is put back, at one position and in one layer: the stream that
    the layer leaves, or what attention or MLPs of a few layers around it add. If the answer's probability rises,
    what the answer needs passes there. All positions and samples of a layer are one batch; every state meets the
    same noise. No logits but those at `position` are made.

    Args:
        model: any that `adapt` knows and that has an unembedding, in eval mode if it has dropout.
        clean: the prompt, ids (1, L), or text if there is a tokenizer.
        subject: the tokens to noise: their positions, a slice of them, or the part of the text that they spell.
        target: the token whose probability is followed, an id or its text. By default the one that the model
            thinks most probable.
        position: the position whose next token it is; the last by default.
        noise: the standard deviation of what is added, as a multiple of that of the first stream's numbers at the
            subject's tokens.
        samples: how many draws of the noise are averaged. They come from a generator of their own: the same call
            gives the same numbers.
        window: how many layers of attention or MLPs are restored together, centred; by default a fifth of them.
        kinds: which of "resid_post", "attention.out" and "mlp.out" to restore; by default all that there are.
        rows: at most so many rows run in one batch.
        tokenizer: a Hugging Face tokenizer: takes text, and prints tokens as text.
        options: what the model is called with beside the tokens. Tensors of one row are expanded to the batch.

    Returns:
        A `CausalTrace`: print it, `.plot()` it, ask it for the `.best("mlp.out")`.

    Raises:
        TypeError, ValueError: before anything is noised: several prompts, a subject that is not in the text.

    Example:
        >>> sizes = {"vocab_size": 50, "embed_dim": 32, "num_heads": 4, "num_layers": 3, "max_length": 64}
        >>> model = fastattn.nn.TransformerModel(**sizes)
        >>> found = causal_trace(model, torch.randint(50, (1, 8)), subject=slice(1, 3), target=7)
        >>> found.effects["mlp.out"].shape
        torch.Size([3, 8])

    Source: Meng et al., Locating and Editing Factual Associations in GPT (2022), section 2 and appendix B.
    """
    adapter, words = adapt(model), Words(tokenizer)
    adapter.unembedding_weight  # noqa: B018  (raises where there is none)
    tokens = token_rows("clean", clean, adapter, words)
    if len(tokens) != 1:
        raise ValueError(f"clean must be one prompt of shape (1, length), got {tuple(tokens.shape)}")
    if isinstance(subject, str):
        places = _spelled(subject, tokens[0].tolist(), words)
    else:
        places = _subject_positions(subject, tokens.shape[1])
    at = position_of("position", position, tokens.shape[1])
    samples, rows = integer("samples", samples, least=1), integer("rows", rows, least=1)
    if not 0 <= number("noise", noise) < math.inf:
        raise ValueError(f"noise must be finite and at least 0, got {noise}")
    default = max(1, round(adapter.num_layers / 5))
    window = default if window is None else integer("window", window, least=1)
    kinds = _checked_kinds(kinds, adapter)
    wanted = None if target is None else int(token_of_each_row("target", target, 1, adapter, words)[0])
    check_model(model)
    tracer = _Tracer(adapter, tokens, at, options, rows)
    # An inference tensor could not be used outside.
    with torch.inference_mode(False), torch.no_grad():
        states, logits = tracer.clean_run(kinds)
        wanted = int(logits.argmax()) if wanted is None else wanted
        added = _drawn(states[Name(0, "resid_pre")][0, list(places)], noise, samples)
        chance = partial(tracer.probabilities, added, places, wanted)
        restored = {
            kind: torch.stack(
                [chance(_window(states, kind, layer, window, adapter)) for layer in range(adapter.num_layers)]
            )
            for kind in kinds
        }
        noised = float(chance({}).mean())
    return CausalTrace(
        restored=restored,
        clean=float(_probability(logits, wanted)),
        noised=noised,
        noise=added,
        subject=places,
        target=wanted,
        position=at,
        window=window,
        tokens=tokens,
        words=words,
    )


class _Tracer:
    """Runs of one prompt, many rows at once."""

    def __init__(self, adapter: Adapter, tokens: Tensor, at: int, options: dict[str, Any], rows: int) -> None:
        self.adapter, self.tokens, self.at, self.options, self.rows = adapter, tokens, at, options, rows

    def clean_run(self, kinds: Sequence[str]) -> tuple[dict[Name, Tensor], Tensor]:
        """The states (1, L, d) by name, the first stream among them, and the logits (vocabulary,)."""
        names = [Name(layer, kind) for kind in kinds for layer in range(self.adapter.num_layers)]
        states: dict[Name, Tensor] = {}
        with ExitStack() as stack:
            for name in (Name(0, "resid_pre"), *names):
                stack.callback(read(self.adapter, name, partial(states.__setitem__, name)).remove)
            logits = self._logits(1)
        return states, logits[0]

    def probabilities(
        self, noise: Tensor, subject: tuple[int, ...], target: int, clean: dict[Name, Tensor]
    ) -> Tensor:
        """The target's mean probability over the samples (L,), if these states are restored at each position.

        If there is nothing to restore: of each sample.
        """
        count, length = len(noise), self.tokens.shape[1]
        sample = torch.arange(count) if not clean else torch.arange(count).repeat(length)
        restored = torch.arange(length).repeat_interleave(count)
        found = []
        for some, positions in zip(sample.split(self.rows), restored.split(self.rows), strict=False):
            found.append(self._run(noise[some.to(noise.device)], subject, target, clean, positions[: len(some)]))
        every = torch.cat(found)
        return every if not clean else every.unflatten(0, (length, count)).mean(1)

    def _run(
        self, noise: Tensor, subject: tuple[int, ...], target: int, clean: dict[Name, Tensor], positions: Tensor
    ) -> Tensor:
        """The target's probability (rows,) with noise (rows, subject, d), one position of each row restored."""
        with ExitStack() as stack:
            first = Name(0, "resid_pre")
            stack.callback(change(self.adapter, first, partial(_noised, noise, subject), first=True).remove)
            for name, state in clean.items():
                stack.callback(change(self.adapter, name, partial(_restored, state, positions)).remove)
            return _probability(self._logits(len(noise)), target)

    def _logits(self, rows: int) -> Tensor:
        """The logits at the position (rows, vocabulary)."""
        options = {name: _expanded(value, rows) for name, value in self.options.items()}
        stream = last_stream(self.adapter, self.tokens.expand(rows, -1), options)
        return self.adapter.unembed(stream[:, self.at])


def _expanded(value: Any, rows: int) -> Any:
    """An option of one row, for all rows."""
    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1:
        return value.expand(rows, *value.shape[1:])
    return value


def _noised(noise: Tensor, subject: tuple[int, ...], stream: Tensor) -> Tensor:
    result = stream.clone()
    result[:, list(subject)] += noise.to(stream)
    return result


def _restored(clean: Tensor, positions: Tensor, state: Tensor) -> Tensor:
    """The state (rows, L, d), in each row clean again at one position."""
    result, positions = state.clone(), positions.to(state.device)
    result[torch.arange(len(state), device=state.device), positions] = clean[0, positions].to(state.dtype)
    return result


def _window(
    states: dict[Name, Tensor], kind: str, layer: int, window: int, adapter: Adapter
) -> dict[Name, Tensor]:
    """The states that are restored together around a layer: of the stream, one."""
    first, last = layer, layer + 1
    if kind != STREAM:
        first = max(0, layer - window // 2)
        last = min(adapter.num_layers, layer - window // 2 + window)
    return {Name(i, kind): states[Name(i, kind)] for i in range(first, last)}


def _drawn(stream: Tensor, multiple: float, samples: int) -> Tensor:
    """Noise (samples, subject tokens, d) for the first stream at the subject (subject tokens, d)."""
    wide = lse_dtype(stream.dtype)
    drawn = torch.randn(samples, *stream.shape, dtype=wide, generator=torch.Generator().manual_seed(0))
    return multiple * stream.to(wide).std() * drawn.to(stream.device)


def _probability(logits: Tensor, target: int) -> Tensor:
    """Of the target, (...), from logits (..., vocabulary)."""
    with without_autocast(logits.device):
        return logits.to(lse_dtype(logits.dtype)).softmax(-1)[..., target]


def _checked_kinds(kinds: Sequence[str] | None, adapter: Adapter) -> tuple[str, ...]:
    there = [kind for kind in TITLES if kind in kinds_of(adapter)]
    chosen = there if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
    if wrong := [kind for kind in chosen if kind not in there]:
        raise ValueError(f"kinds must be among {', '.join(there)} in this model, got {wrong[0]!r}")
    if not chosen:
        raise ValueError(f"kinds must name at least one of {', '.join(there)}, got none")
    return tuple(dict.fromkeys(chosen))


def _subject_positions(subject: int | slice | Sequence[int], length: int) -> tuple[int, ...]:
    """The positions of the subject, checked."""
    if isinstance(subject, slice):
        found = list(range(length))[subject]
    else:
        several = subject if isinstance(subject, Sequence) else [subject]
        found = [position_of("subject", place, length) for place in several]
    if not found:
        raise ValueError(f"subject must name at least one of the {length} positions, got {subject}")
    return tuple(sorted(set(found)))


def _spelled(subject: str, ids: list[int], words: Words) -> tuple[int, ...]:
    """The tokens that spell a part of the text: those that hold any of its characters."""
    if words.tokenizer is None:
        raise ValueError(f"subject is text, {subject!r}: give the tokenizer that turns it to ids, tokenizer=")
    decode: Callable[[list[int]], str] = words.tokenizer.decode
    text = decode(ids)
    times = text.count(subject) if subject else 0
    if times != 1:
        raise ValueError(
            f"subject must stand once in the text, and {subject!r} stands {times} times in {text!r}. Its "
            "positions can be given instead"
        )
    begin = text.index(subject)
    ends = [0, *(len(decode(ids[: i + 1])) for i in range(len(ids)))]
    return tuple(i for i in range(len(ids)) if ends[i] < begin + len(subject) and ends[i + 1] > begin)
