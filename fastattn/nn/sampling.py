"""The next token from logits: the likeliest one, or a draw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.ground import arguments


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; the fields are the arguments of `TransformerModel.generate`.

    Raises:
        ValueError, TypeError: a field out of range; top_k, top_p or min_p without a temperature.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ValueError(f"{name} needs a temperature above 0: at 0 the likeliest token is always taken")

    def _checked(self) -> dict[str, Any]:
        return {
            "temperature": _within("temperature", self.temperature, 0.0, math.inf, "at least 0 and finite"),
            "top_k": None if self.top_k is None else arguments.integer("top_k", self.top_k, least=1),
            "top_p": None if self.top_p is None else _within("top_p", self.top_p, TINY, ABOVE_ONE, BY_PART),
            "min_p": None if self.min_p is None else _within("min_p", self.min_p, 0.0, ABOVE_ONE, FROM_ZERO),
            "repetition_penalty": _within(
                "repetition_penalty", self.repetition_penalty, TINY, math.inf, "above 0 and finite"
            ),
        }

    @property
    def counts_tokens(self) -> bool:
        """Whether it must know which tokens a row has."""
        return self.repetition_penalty != 1

    def next_tokens(self, logits: Tensor, present: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Tokens (B,) from logits (B, vocabulary) and which tokens each row has, bool of the same shape."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if present is not None:
            penalty = self.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(present, penalised, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        # The largest logit is 0 then: no temperature is so small that it becomes infinite.
        logits = logits - logits.amax(-1, keepdim=True)
        smallest = torch.finfo(logits.dtype).tiny
        probabilities = self.kept(logits / max(self.temperature, smallest)).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    def kept(self, logits: Tensor) -> Tensor:
        """The logits, those of tokens that may not be drawn being -inf."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
            # A token is not needed if those before it have the probability already.
            before = probabilities.cumsum(-1) - probabilities
            needed = (before < self.top_p).scatter(-1, order, before < self.top_p)
            logits = logits.masked_fill(~needed, -math.inf)
        if self.min_p is not None:
            probabilities = logits.softmax(-1)
            logits = logits.masked_fill(
                probabilities < self.min_p * probabilities.amax(-1, keepdim=True), -math.inf
            )
        return logits


TINY, ABOVE_ONE = math.ulp(0.0), math.nextafter(1.0, 2.0)
BY_PART, FROM_ZERO = "above 0 and at most 1", "from 0 to 1"


def _within(name: str, value: Any, least: float, below: float, what: str) -> float:
    value = float(arguments.number(name, value))
    if not least <= value < below:
        raise ValueError(f"{name} must be {what}, got {value}")
    return value
