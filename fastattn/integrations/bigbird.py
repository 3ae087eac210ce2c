"""`transformers`' block-sparse BigBird attention through `fastattn.attention`; `fastattn.patch` puts it in."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

from fastattn import masks
from fastattn.functional import attention
from fastattn.integrations.huggingface import widened


class FusedBigBirdBlockSparseAttention(BigBirdBlockSparseAttention):
    """The same keys, as often as there, in training and in eval mode; weights are left to transformers' code."""

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
        if kwargs.get("output_attentions") or from_mask is None or to_mask is None:
            return super().forward(
                hidden_states, band_mask, from_mask, to_mask, from_blocked_mask, to_blocked_mask, **kwargs
            )
        heads, width = self.num_attention_heads, self.attention_head_size
        q, k, v = (
            widened(linear(hidden_states).unflatten(-1, (heads, width)).transpose(1, 2))
            for linear in (self.query, self.key, self.value)
        )
        mask = masks.bigbird(
            self.block_size, self.num_random_blocks, style="huggingface", seed=self.seed or 0,
            training=self.training, max_positions=self.max_seqlen,
        )  # fmt: skip
        out = attention(q, k, v, mask=mask, bias=to_mask.bool(), scale=width**-0.5)
        # Padded queries give 0, as there.
        return (out[..., :width] * from_mask).transpose(1, 2).flatten(2), None
