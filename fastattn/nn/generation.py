"""Text from a model, a token at a time: `TransformerModel.generate`."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.core import spread
from fastattn.core.intact import alteration
from fastattn.ground import arguments
from fastattn.nn.attention import SelfAttention
from fastattn.nn.checks import check_tokens
from fastattn.nn.decoding_cache import DecodingCache, quantised_dtype, row_lengths
from fastattn.nn.rotary import Rotary
from fastattn.nn.sampling import Sampling


class Generation(NamedTuple):
    """What `generate` returns.

    tokens: (B, longest), each row's prompt and behind it its new tokens, then zeros.
    lengths: (B,) int64, how many tokens each row has.
    """

    tokens: Tensor
    lengths: Tensor


@torch.no_grad()
def generate(
    model: Any,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    key_lengths: Tensor | Sequence[int] | None,
    stop: int | Sequence[int | Sequence[int]] | None,
    seed: int | None,
    stream: Callable[[Tensor], Any] | None,
    use_cache: bool,
    cache_dtype: torch.dtype | None,
    **sampling: Any,
) -> Generation:
    """`TransformerModel.generate`, which explains the arguments."""
    spread.refuse("generate")
    choice, stops = Sampling(**sampling), _stops(stop)
    if stream is not None and not callable(stream):
        raise TypeError(f"stream must be a function or None, got {type(stream).__name__}")
    cached = arguments.flag("use_cache", use_cache)
    if quantised_dtype("cache_dtype", cache_dtype) is not None and not cached:
        raise ValueError(f"cache_dtype must be None without a cache, got {cache_dtype}")
    _check_model(model, cached)
    rows = _rows_of(model, tokens, key_lengths, max_new_tokens)
    generator = _generator(seed, tokens)
    next_logits = _with_cache(model, rows, cache_dtype) if cached else _anew(model, rows)
    for _ in range(rows.room if len(tokens) else 0):
        logits = next_logits()
        present = rows.present(logits.shape[1]) if choice.repetition_penalty != 1 else None
        rows.append(choice.next_tokens(logits, present, generator), stops)
        if stream is not None:
            stream(rows.newest)
        if stops and bool(rows.ended.all()):
            break
    return rows.result()


class _Rows:
    """The rows so far.

    Attributes:
        tokens: (B, most), each row's tokens, then zeros.
        lengths: (B,) int64, how many tokens each row has; prompts, how many it had at the beginning.
        room: how many tokens a row may get.
        ended: (B,) bool.
        newest: (B,) int64, the tokens of the last step; -1 in rows that had ended before.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor, room: int) -> None:
        self.prompts, self.lengths, self.room = lengths, lengths.clone(), room
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        self.tokens = nn.functional.pad(tokens * inside, (0, room))
        self.ended = torch.zeros_like(lengths, dtype=torch.bool)
        self.newest = torch.full_like(lengths, -1)

    @property
    def given(self) -> Tensor:
        """The prompts (B, L)."""
        return self.tokens[:, : self.tokens.shape[1] - self.room]

    def present(self, vocabulary: int) -> Tensor:
        """Which tokens each row has, bool (B, vocabulary)."""
        counts = torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]
        found = counts.new_zeros(len(counts), vocabulary + 1)
        return found.scatter_(1, torch.where(counts, self.tokens, vocabulary).long(), True)[:, :vocabulary]

    def append(self, new: Tensor, stops: list[Tensor]) -> None:
        """Add a token to each row that has not ended, and end those that now end with one of `stops`."""
        new, going = new.to(self.tokens.device), ~self.ended
        self.newest = torch.where(going, new, -1)
        added = torch.where(going, new, 0).to(self.tokens.dtype)
        self.tokens.scatter_(1, self.lengths[:, None], added[:, None])
        self.lengths = self.lengths + going
        for sequence in stops:
            self.ended = self.ended | self._end_with(sequence.to(new.device))

    def _end_with(self, sequence: Tensor) -> Tensor:
        """Which rows' new tokens end with this sequence, bool (B,)."""
        places = self.lengths[:, None] + torch.arange(-len(sequence), 0, device=sequence.device)
        equal = (self.tokens.gather(1, places.clamp(min=0)) == sequence).all(1)
        return equal & (self.lengths - self.prompts >= len(sequence))

    def result(self) -> Generation:
        longest = int(self.lengths.max()) if len(self.lengths) else self.tokens.shape[1]
        return Generation(self.tokens[:, :longest].clone(), self.lengths)


def _with_cache(model: Any, rows: _Rows, dtype: torch.dtype | None) -> Callable[[], Tensor]:
    """The logits (B, vocabulary) of the next tokens: the prompts are read at once, then one token at a time."""
    batch, most = rows.tokens.shape
    cache = DecodingCache(batch, most, len(model.blocks), rows.tokens.device, dtype)
    steps = itertools.count()

    def next_logits() -> Tensor:
        if next(steps) == 0:
            return model(rows.given, key_lengths=rows.prompts, cache=cache)[:, 0]
        return model(rows.tokens.gather(1, rows.lengths[:, None] - 1), cache=cache)[:, 0]

    return next_logits


def _anew(model: Any, rows: _Rows) -> Callable[[], Tensor]:
    """The same, computing all tokens again in each step."""

    def next_logits() -> Tensor:
        longest = int(rows.lengths.max())
        # Layers that know no key_lengths serve rows of one length.
        padded = {"key_lengths": rows.lengths} if int(rows.lengths.min()) < longest else {}
        logits = model(rows.tokens[:, :longest], **padded)
        return logits[torch.arange(len(logits), device=logits.device), (rows.lengths - 1).to(logits.device)]

    return next_logits


def _stops(stop: int | Sequence[int | Sequence[int]] | None) -> list[Tensor]:
    """The sequences of tokens that end a row."""
    if stop is None:
        return []
    given = stop if isinstance(stop, Iterable) and not isinstance(stop, str | bytes) else [stop]
    sequences: list[list[Any]] = [list(each) if isinstance(each, list | tuple) else [each] for each in given]
    if not all(sequences):
        raise ValueError("stop must have no empty sequence of tokens, got one")
    return [torch.tensor([arguments.integer("stop", t, least=0, what=_STOP) for t in each]) for each in sequences]


_STOP = "a token, or tokens and sequences of them"


def _generator(seed: int | None, tokens: Tensor) -> torch.Generator | None:
    if seed is None:
        return None
    seed = arguments.integer("seed", seed, what="an integer or None")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must have at most 64 bits, got {seed}")
    return torch.Generator(tokens.device).manual_seed(seed)


def _rows_of(model: Any, tokens: Tensor, key_lengths: Any, max_new_tokens: int) -> _Rows:
    """The prompts, checked, with room for the new tokens."""
    check_tokens(tokens, model.config.max_length)
    if tokens.shape[1] == 0:
        raise ValueError(f"tokens must have at least one token in each row, got {tuple(tokens.shape)}")
    room = arguments.integer("max_new_tokens", max_new_tokens, least=0)
    lengths = row_lengths(tokens, key_lengths)
    most = model.config.max_length
    if most is not None and len(lengths):
        # The last new token is not read, so it needs no position.
        longest = int(lengths.max())
        if longest + room > most + 1:
            raise ValueError(
                f"max_new_tokens must be at most {most + 1 - longest} for a prompt of {longest} tokens and "
                f"max_length = {most}, got {room}"
            )
    rows = _Rows(tokens, lengths, room)
    if type(model.token_embedding) is nn.Embedding and tokens.device.type == "cpu" and tokens.numel():
        least, greatest = (int(t) for t in rows.given.aminmax())
        last = model.token_embedding.num_embeddings - 1
        if least < 0 or greatest > last:
            raise ValueError(f"tokens must be from 0 to {last}, got {least if least < 0 else greatest}")
    return rows


def _check_model(model: Any, cached: bool) -> None:
    """Raise if the model draws, is no decoder, or, with a cache, has parts that one cannot serve."""
    for name, part in model.named_modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            raise ValueError(f"model must be in eval mode, or {name} drops elements: call model.eval() first")
        if getattr(part, "causal", True) is not True:
            raise ValueError(f"model must be a decoder, but {name} has causal=False: its tokens see later ones")
    obstacle = _obstacle(model) if cached else None
    if obstacle is not None:
        raise ValueError(f"use_cache must be False for this model: {obstacle}")


def _obstacle(model: Any) -> str | None:
    """Why a cache cannot serve the model; None if it can."""
    takers = [("it", model, "forward"), ("it", model, "embed")]
    for place, block in enumerate(model.blocks):
        attention = getattr(block, "attention", None)
        takers += [(f"blocks.{place}", block, "forward"), (f"blocks.{place}.attention", attention, "forward")]
        if not isinstance(attention, SelfAttention):
            return f"blocks.{place}.attention is no fastattn.nn.SelfAttention"
        for method in ("project", "attend"):
            if getattr(attention, method).__func__ is not getattr(SelfAttention, method):
                return f"blocks.{place}.attention has a method {method} of its own"
    for name, part, method in takers:
        if not {"cache", "positions"} & set(inspect.signature(getattr(part, method)).parameters):
            return f"{name} has a method {method} of its own, which knows no cache"
    for name, part in model.named_modules():
        if isinstance(part, Rotary) and (reason := alteration(part, Rotary)):
            return f"{name} {reason}"
        if any(
            not _is_torchs(hook) for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        ):
            return f"{name or 'it'} has a forward hook, which would see new tokens only instead of whole sequences"
    return None


def _is_torchs(hook: Any) -> bool:
    """Whether PyTorch has set the hook, to prepare weights."""
    return str(getattr(hook, "__module__", "")).startswith("torch.")
