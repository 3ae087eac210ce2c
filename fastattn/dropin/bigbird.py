"""`transformers`' BigBird attention, sparse and full, computed by `fastattn.attention`. `fastattn.patch` swaps it
in. A forward that somebody puts into transformers' class after this file is imported computes instead."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.big_bird.modeling_big_bird import (
    BigBirdAttention,
    BigBirdBlockSparseAttention,
    BigBirdSelfAttention,
)

from fastattn import masks
from fastattn.core.attention.functional import attention
from fastattn.core.intact import FORWARDS, is_replaced
from fastattn.dropin.swapping import swap
from fastattn.integrations.huggingface import fastattn_attention


class FusedBigBirdBlockSparseAttention(BigBirdBlockSparseAttention):
    """Sees the same keys, as many times, in training and in eval mode. Calls for weights run transformers'
    code."""

    def forward(
        self,
        hidden_states: Tensor,
        band_mask: Tensor | None = None,
        from_mask: Tensor | None = None,
        to_mask: Tensor | None = None,
        from_blocked_mask: Tensor | None = None,
        to_blocked_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers calls it: hidden_states (B, L, E), from_mask (B, 1, L, 1), to_mask (B, 1, 1, L)."""
        own = kwargs.get("output_attentions") or is_replaced(BigBirdBlockSparseAttention)
        if own or from_mask is None or to_mask is None:
            return super().forward(
                hidden_states, band_mask, from_mask, to_mask, from_blocked_mask, to_blocked_mask, **kwargs
            )
        width = self.attention_head_size
        q, k, v = (_heads(self, name, hidden_states) for name in ("query", "key", "value"))
        mask = masks.bigbird(
            self.block_size, self.num_random_blocks, style="huggingface", seed=self.seed or 0,
            training=self.training, max_positions=self.max_seqlen,
        )  # fmt: skip
        padding = _padding(kwargs.get("uncast_to_mask", to_mask))
        out = attention(q, k, v, mask=mask, scale=width**-0.5, **padding)
        # Padded queries give 0, as in transformers.
        return (out * from_mask).transpose(1, 2).flatten(2), None


class FusedBigBirdSelfAttention(BigBirdSelfAttention):
    """Full attention of encoders and decoders, with their caches. Calls for weights run transformers' code."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers calls it: hidden_states (B, L, E), masks (B, 1, L, keys) that are added, or None."""
        if kwargs.get("output_attentions") or is_replaced(BigBirdSelfAttention):
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values,
                **kwargs,
            )  # fmt: skip
        crosses, states, mask = False, hidden_states, attention_mask
        if encoder_hidden_states is not None:
            crosses, states, mask = True, encoder_hidden_states, encoder_attention_mask
        if crosses and past_key_values is not None and past_key_values.get_seq_length(self.layer_idx) > 0:
            # The encoder's keys and values, cached at the first token.
            k, v = past_key_values.layers[self.layer_idx].keys, past_key_values.layers[self.layer_idx].values
        else:
            k, v = (_heads(self, name, states) for name in ("key", "value"))
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)
        out, _ = fastattn_attention(
            self, _heads(self, "query", hidden_states), k, v, mask, is_causal=False,
            dropout=self.dropout.p if self.training else 0.0, scaling=self.attention_head_size**-0.5,
        )  # fmt: skip
        return out.flatten(2), None


class FusedBigBirdAttention(BigBirdAttention):
    """Stays fused when transformers replaces the module that computes it: short inputs switch a block-sparse model
    to full attention."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As transformers calls it. The configuration may ask for weights, too."""
        if self.config.output_attentions:
            kwargs["output_attentions"] = True
        if isinstance(self.self, FusedBigBirdBlockSparseAttention) and "to_mask" in kwargs:
            # transformers casts the mask anew for each layer. The uncast tensor is the same for all layers, so its
            # values are read only once.
            kwargs["uncast_to_mask"] = kwargs["to_mask"]
        return super().forward(*args, **kwargs)

    def set_attention_type(self, value: str, layer_idx: int | None = None) -> None:
        """As transformers calls it: value is "block_sparse" or "original_full"."""
        super().set_attention_type(value, layer_idx)
        if fused := FUSED.get(type(self.self)):
            swap(self.self, fused)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BigBirdBlockSparseAttention: FusedBigBirdBlockSparseAttention,
    BigBirdSelfAttention: FusedBigBirdSelfAttention,
}
FORWARDS.update({kind: kind.forward for kind in FUSED})


def _heads(module: Any, projection: str, states: Tensor) -> Tensor:
    """The queries, keys or values of states (B, L, E), as (B, H, L, D)."""
    heads = getattr(module, projection)(states)
    return heads.unflatten(-1, (module.num_attention_heads, module.attention_head_size)).transpose(1, 2)


def _padding(to_mask: Tensor) -> dict[str, Any]:
    """The padding mask (B, 1, 1, L), not 0 where a key is seen, as arguments of `fastattn.attention`: none if
    there is no padding, lengths if it is on the right, else a bias."""
    if type(to_mask) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return {"bias": to_mask.bool()}  # a tracer cannot read values
    lengths = _read(to_mask)
    if lengths is None:
        return {"bias": to_mask.bool()}
    if all(length == to_mask.shape[3] for length in lengths):
        return {}
    return {"key_lengths": torch.tensor(lengths, dtype=torch.int32, device=to_mask.device)}


# The last padding that was read: the tensor, its version, and its lengths. A model gives all its layers the same
# tensor, and reading it waits for the GPU. Numbers are kept, not a tensor: that would belong to the mode
# (inference, a functional transform) in which it was made.
_last_read: tuple[weakref.ref[Tensor], int, list[int] | None] | None = None


def _read(to_mask: Tensor) -> list[int] | None:
    """How many keys each batch element sees if the rest is padding on the right; None if it is elsewhere."""
    global _last_read
    if to_mask.is_inference():
        return _lengths(to_mask)  # inference tensors have no version counter
    last, version = _last_read, to_mask._version
    if last is None or last[0]() is not to_mask or last[1] != version:
        last = _last_read = (weakref.ref(to_mask), version, _lengths(to_mask))
    return last[2]


def _lengths(to_mask: Tensor) -> list[int] | None:
    seen = to_mask[:, 0, 0].bool()
    lengths = seen.sum(-1)
    on_the_right = (seen == (torch.arange(seen.shape[1], device=seen.device) < lengths[:, None])).all()
    *found, right = torch.cat((lengths, on_the_right[None].long())).tolist()
    return found if right else None
