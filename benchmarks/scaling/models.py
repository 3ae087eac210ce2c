"""Shapes of language models, and what a training step of one computes and holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A decoder with grouped heads and gated MLPs; its embedding and unembedding are two tables."""

    layers: int
    width: int
    heads: int
    key_heads: int
    head_width: int
    hidden: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.key_heads)
        return attention + 3 * self.width * self.hidden

    @property
    def weights(self) -> int:
        return self.layers * self.layer_weights + 2 * self.width * self.vocabulary

    @property
    def products(self) -> int:
        """Weights that every token is multiplied by: all but the embedding."""
        return self.weights - self.width * self.vocabulary

    @property
    def layer_values(self) -> int:
        """Values a token and layer keeps for the backward: the inputs of both norms and of all products, queries,
        keys, values and the two parts of the MLP."""
        heads = self.head_width * (2 * self.heads + 2 * self.key_heads)
        return 4 * self.width + heads + 3 * self.hidden


# By their published configurations.
MODELS = {
    "llama-1b": Model(16, 2048, 32, 8, 64, 8192, 128256),
    "llama-8b": Model(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-70b": Model(80, 8192, 64, 8, 128, 28672, 128256),
    "llama-405b": Model(126, 16384, 128, 8, 128, 53248, 128256),
}
