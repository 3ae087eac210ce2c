"""torch.nn's transformer layers and stacks, with the same arguments, parameters and results, on our attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.core.attention.sdpa import mask_alone
from fastattn.core.intact import is_replaced
from fastattn.core.rows import rows_of_layers
from fastattn.masks import Lowered, Mask
from fastattn.nn.torch_attention import MultiheadAttention, check_mask


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: the same arguments, parameters, state dict and results.

    Its attention is a `fastattn.nn.MultiheadAttention`, in training and in eval mode. (torch's layer does not call
    its attention in eval mode, but one operator for the whole layer.) Rows that see no key are never NaN. Under
    autocast on a CPU the result has the dtype that torch's has: half precision where torch would run that
    operator, else float32.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype: as torch's.
        backend: the attention's.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        adopt(self, backend)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | Mask | Lowered | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src (N, L, E), (L, N, E) or (L, E), or nested; masks and hint as `fastattn.nn.MultiheadAttention`'s."""
        if is_replaced(nn.TransformerEncoderLayer):  # somebody has put another forward into torch's class
            masks: dict[str, Any] = {"src_mask": src_mask, "src_key_padding_mask": src_key_padding_mask}
            return super().forward(src, **masks, is_causal=is_causal)
        check_mask("src_key_padding_mask", src_key_padding_mask, "src_mask", src_mask)
        check_mask("src_mask", src_mask)
        block: Any = self._sa_block  # torch's annotation allows only tensors
        attend = functools.partial(
            block, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal
        )
        if self.norm_first:
            between = src + attend(self.norm1(src))
            out = self._ff_step(between, self.norm2)
        else:
            between = self.norm1(src + attend(src))
            out = self.norm2(self._ff_step(between, None))
        if torch.is_autocast_enabled("cpu") and out.dtype == torch.float32 and _torch_fuses(self, src):
            return out.to(torch.get_autocast_dtype("cpu"))
        return out

    def _ff_block(self, x: Tensor) -> Tensor:
        return rows_of_layers(super()._ff_block, x, self.linear1.out_features)

    def _ff_step(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """x and what the feed-forward block makes of it, or of its norm."""
        return x + self._ff_block(x if norm is None else norm(x))


def _torch_fuses(layer: nn.TransformerEncoderLayer, src: Tensor) -> bool:
    """Whether torch's layer would run its operator for inference, whose result has autocast's dtype on a CPU."""
    attention, parameters = layer.self_attn, list(layer.parameters())
    return (
        torch.backends.mha.get_fastpath_enabled()
        and src.device.type == "cpu"
        and src.dim() == 3
        and not layer.training
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
        and not torch.is_autocast_enabled("cuda")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (src, *parameters)))
        and not any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())
        and not torch.overrides.has_torch_function((src, *parameters))
    )


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer: the same arguments, parameters, state dict and results.

    Both of its attentions are `fastattn.nn.MultiheadAttention`. Rows that see no key are never NaN.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype: as torch's.
        backend: the attentions'.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        adopt(self, backend)

    def _ff_block(self, x: Tensor) -> Tensor:
        return rows_of_layers(super()._ff_block, x, self.linear1.out_features)


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder: the same arguments, parameters, state dict and results.

    Its layers are copies of encoder_layer, as in torch; copies of a torch.nn.TransformerEncoderLayer are converted
    to ours.

    Args:
        encoder_layer, num_layers, norm, enable_nested_tensor, mask_check: as torch's.
        backend: of the attentions in layers that are converted.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor, mask_check)
        adopt(self.layers, backend)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | Mask | Lowered | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As torch's; mask may be what `fastattn.nn.MultiheadAttention` takes."""
        if not isinstance(mask, Mask | Lowered):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        mask_alone("mask", mask, "is_causal", bool(is_causal))
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(nn.TransformerDecoder):
    """torch.nn.TransformerDecoder: the same arguments, parameters, state dict and results.

    Its layers are copies of decoder_layer, as in torch; copies of a torch.nn.TransformerDecoderLayer are converted
    to ours.

    Args:
        decoder_layer, num_layers, norm: as torch's.
        backend: of the attentions in layers that are converted.
    """

    def __init__(
        self,
        decoder_layer: nn.TransformerDecoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(decoder_layer, num_layers, norm)
        adopt(self.layers, backend)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | Mask | Lowered | None = None,
        memory_mask: Tensor | Mask | Lowered | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch's; tgt_mask and memory_mask may be what `fastattn.nn.MultiheadAttention` takes."""
        if isinstance(tgt_mask, Mask | Lowered):
            # With None torch would compare the mask with a causal tensor.
            tgt_is_causal = bool(tgt_is_causal)
        masks: dict[str, Any] = {"tgt_mask": tgt_mask, "memory_mask": memory_mask}
        return super().forward(
            tgt,
            memory,
            **masks,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )


class Transformer(nn.Transformer):
    """torch.nn.Transformer: the same arguments, parameters, state dict and results, with our encoder and decoder.

    A custom_encoder or custom_decoder stays as it is. (The GPT-2 family is `fastattn.nn.TransformerModel`.)

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation,
            custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype: as
            torch's.
        backend: the attentions'.

    Example:
        >>> model = Transformer(d_model=32, nhead=4, dim_feedforward=64, batch_first=True)
        >>> model(torch.randn(2, 10, 32), torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any = None,
        custom_decoder: Any = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation,
            custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip
        for part, custom in ((self.encoder, custom_encoder), (self.decoder, custom_decoder)):
            if custom is None:
                adopt(part, backend)


COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Transformer: Transformer,
}


def adopt(module: nn.Module, backend: str | None = None) -> None:
    """Turn `module` and every module in it that is of one of torch's own classes into its counterpart, in place.

    Only the class changes: parameters, buffers, hooks and their order stay the same objects.
    """
    for part in module.modules():
        counterpart = COUNTERPARTS.get(type(part))
        if counterpart is not None:
            part.__class__ = counterpart
            if isinstance(part, MultiheadAttention):
                part.backend = backend
