"""Tokens as users give them, text or ids, checked; and ids as tables and pictures show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.ground.arguments import integer, integers, tensor
from fastattn.lens.adapters import Adapter

Token = int | str | Sequence[int] | Tensor


class Words:
    """Shows token ids: as text if there is a tokenizer, else as numbers."""

    def __init__(self, tokenizer: Any = None) -> None:
        for method in ("encode", "decode"):
            if tokenizer is not None and not callable(getattr(tokenizer, method, None)):
                raise TypeError(
                    f"tokenizer must be a Hugging Face tokenizer, with encode and decode; got a "
                    f"{type(tokenizer).__name__} without {method}"
                )
        self.tokenizer = tokenizer

    def __call__(self, token: int | Tensor) -> str:
        return str(int(token)) if self.tokenizer is None else repr(self.tokenizer.decode([int(token)]))

    def text(self, tokens: Tensor) -> str:
        """Several tokens in a row."""
        ids = tokens.tolist()
        return " ".join(map(str, ids)) if self.tokenizer is None else repr(self.tokenizer.decode(ids))

    def encode(self, name: str, text: str, *, special: bool) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(f"{name} is text, {text!r}: give the tokenizer that turns it to ids, tokenizer=")
        return list(self.tokenizer.encode(text, add_special_tokens=special))


def token_rows(name: str, tokens: str | Tensor, adapter: Adapter, words: Words) -> Tensor:
    """The ids (B, L) of a text or of a tensor of ids, on the model's device.

    Raises:
        TypeError, ValueError: tokens that are no integers, of another rank, empty or not in the vocabulary.
    """
    table = adapter.embeddings[0].weight if adapter.embeddings else next(adapter.model.parameters())
    if table.device.type == "meta":
        raise ValueError(
            "model must hold its weights, and its embedding is on the meta device: offloaded, or not loaded yet"
        )
    if isinstance(tokens, str):
        tokens = torch.tensor([words.encode(name, tokens, special=True)], dtype=torch.int64, device=table.device)
    tensor(name, tokens)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {tokens.dtype}")
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"{name} must have shape (batch, length), neither of them 0; got {tuple(tokens.shape)}")
    if tokens.device != table.device:
        raise ValueError(f"{name} must be on the model's device {table.device}, got {tokens.device}")
    if adapter.embeddings:
        _check_in_vocabulary(name, tokens, table.shape[0])
    return tokens


def token_of_each_row(
    name: str, token: Token, rows: int, adapter: Adapter, words: Words, *, length: int | None = None
) -> Tensor:
    """One token id for each of the rows (B,), from one for all or one for each; or (B, `length`) ids.

    Raises:
        TypeError, ValueError: a token that is not one, or is not in the vocabulary.
    """
    weight = adapter.unembedding_weight
    if isinstance(token, str):
        ids = words.encode(name, token, special=False)
        if len(ids) != 1:
            pieces = ", ".join(words(i) for i in ids)
            raise ValueError(f"{name} must be one token, and {token!r} is {len(ids)}: {pieces}")
        token = ids
    if not isinstance(token, Tensor):
        listed = token if isinstance(token, Sequence) else [token]
        token = torch.tensor([integer(name, i) for i in listed], dtype=torch.int64)
    tensor(name, token)
    if token.is_floating_point() or token.is_complex() or token.dtype == torch.bool:
        raise TypeError(f"{name} must be token ids, integers; got {token.dtype}")
    token = token.to(weight.device, torch.int64)
    _check_in_vocabulary(name, token, weight.shape[0])
    if length is not None and token.dim() == 2:
        if token.shape != (rows, length):
            raise ValueError(f"{name} must have shape {(rows, length)}, got {tuple(token.shape)}")
        return token
    if token.dim() > 1 or token.numel() not in (1, rows):
        raise ValueError(
            f"{name} must be one token id, or one for each of the {rows} rows of tokens; got shape "
            f"{tuple(token.shape)}. A word of several tokens cannot be asked for: take its first"
        )
    return token.reshape(-1).expand(rows)


def _check_in_vocabulary(name: str, ids: Tensor, size: int) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        wrong = ids[(ids < 0) | (ids >= size)].flatten()[0]
        raise ValueError(f"{name} must be from 0 to {size - 1}, the ids of the model's vocabulary; got {wrong}")


def position_of(name: str, position: int, length: int) -> int:
    """A position of the text; negative ones count from the end."""
    position = integer(name, position)
    if not -length <= position < length:
        raise ValueError(f"{name} must be from {-length} to {length - 1} for {length} tokens, got {position}")
    return position % length


def counted_positions(counted: Tensor | None, tokens: Tensor, options: dict[str, Any]) -> Tensor:
    """Which positions (B, L) count: those asked for; else all that the model is not told to be padding.

    Raises:
        TypeError, ValueError: a tensor of another shape or dtype, or one that counts nothing.
    """
    if counted is None:
        counted = torch.ones_like(tokens, dtype=torch.bool)
        padding, lengths = options.get("attention_mask"), options.get("key_lengths")
        if isinstance(padding, Tensor) and padding.shape == tokens.shape:
            counted &= padding.bool()
        if lengths is not None:
            lengths = integers("key_lengths", lengths, on=tokens.device).to(tokens.device)
            counted &= torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    tensor("counted", counted)
    if counted.dtype != torch.bool or counted.shape != tokens.shape or not counted.any():
        raise ValueError(
            f"counted must be bool {tuple(tokens.shape)}, true somewhere; got {counted.dtype} of shape "
            f"{tuple(counted.shape)}, {int(counted.sum())} of them true"
        )
    return counted.to(tokens.device)
