"""torch.nn.MultiheadAttention with the same arguments, parameters and results, on the fused attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.core.attention.dropout import dropout_state
from fastattn.core.attention.sdpa import TOP_LEFT, attend, dtype_obstacle, mask_alone, refusal_of_mask, warn_once
from fastattn.core.capabilities import check_backend
from fastattn.core.intact import is_replaced
from fastattn.core.rows import linear, rows_of_layers
from fastattn.masks import Lowered, Mask
from fastattn.nn.weights import Weighting, head_weights, joined, mask_as_bias, mean_weights


class _Masks(NamedTuple):
    """The masks of a call as `fastattn.attention` takes them.

    bias: the tensors among them, as one.
    mask: attn_mask, if it is a value of fastattn.masks.
    causal: whether a causal mask, aligned top-left, replaces attn_mask.
    """

    bias: Tensor | None = None
    mask: Mask | Lowered | None = None
    causal: bool = False


class _Inputs(NamedTuple):
    """The tensors of a call, and its masks."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    attn_mask: Tensor | Mask | Lowered | None


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: the same arguments, parameters, state dict and results, in O(L) memory.

    Attention is fused in training and in eval mode. Averaged weights are computed one head at a time: no L x S
    tensor is kept but the result (N, L, S). What torch refuses raises torch's error. What only torch can compute
    (inputs of different dtypes) is computed by torch, with a warning the first time.

    What differs:
        A row that sees no key gives 0, with weights 0; torch gives NaN.
        Dropout draws other numbers, seeded by torch's generator; the weights returned are those that were used.
        With is_causal=True attn_mask is never read. (torch reads it if there is a key_padding_mask, or if weights
        are needed.) Without attn_mask it raises, in eval mode too.
        Nested tensors work in training too.
        TorchScript cannot compile it.
        attn_mask may be a value of fastattn.masks; no L x S tensor is made of it, unless weights are needed.
        The output projection is called as a module, so its hooks run; torch only reads its weight.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch's.
        backend: "triton", "portable", "reference", or None for the best that fits.

    Example:
        >>> attention = MultiheadAttention(32, 4, batch_first=True)
        >>> x = torch.randn(2, 10, 32)
        >>> out, weights = attention(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 10, 10]))
    """

    backend: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.backend = check_backend(backend)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | Mask | Lowered | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query to key and value.

        Args:
            query (N, L, E), key (N, S, kdim), value (N, S, vdim) with batch_first, else (L, N, E) and so on; or
                unbatched (L, E), (S, kdim), (S, vdim); or one nested tensor (N, lengths, E) for all three.
            key_padding_mask: (N, S) or (S,); bool, True is hidden, or float, added to the scores.
            attn_mask: (L, S) or (N * num_heads, L, S); likewise, with gradient if float. Or a value of
                fastattn.masks, or what its `lower` returned for N, num_heads, L and S (N is 1 if unbatched); such
                a mask says which keys are seen, and is aligned bottom-right.
            need_weights: also return the weights, after dropout; differentiable.
            average_attn_weights: return their mean over heads, (N, L, S), rather than (N, num_heads, L, S).
            is_causal: attn_mask is the causal mask, aligned top-left. Not together with a value of fastattn.masks.

        Returns:
            The output, shaped as query, and the weights or None.

        Raises:
            ValueError: a value of fastattn.masks for another shape, or in a call that cannot take one.
        """
        check_mask("key_padding_mask", key_padding_mask, "attn_mask", attn_mask)
        check_mask("attn_mask", attn_mask)
        if isinstance(attn_mask, Mask | Lowered):
            mask_alone("attn_mask", attn_mask, "is_causal", is_causal)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        obstacle = self._obstacle(_Inputs(query, key, value, key_padding_mask, attn_mask))
        if obstacle:
            if isinstance(attn_mask, Mask | Lowered):
                raise ValueError(refusal_of_mask("attn_mask", obstacle))
            results = super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            warn_once(f"MultiheadAttention: {obstacle}; PyTorch's own module computes it")
            return results
        if query.is_nested:
            return self._nested(query, need_weights, average_attn_weights)
        unbatched = query.dim() == 2
        q, k, v = (self._heads(t) for t in self._project(query, key, value))
        masks = self._masks(q, k, key_padding_mask, attn_mask, is_causal)
        k, v = self._appended(k, v)
        average = average_attn_weights if need_weights else None
        z, weights = self._attend(q, k, v, masks, average=average)
        if unbatched:
            return self._out(z[0].transpose(0, 1)), None if weights is None else weights[0]
        return self._out(z.transpose(1, 2) if self.batch_first else z.permute(2, 0, 1, 3)), weights

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: _Masks = _Masks(),  # noqa: B008 (immutable)
        *,
        key_lengths: Tensor | None = None,
        average: bool | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output of each head (N, H, L, D), and the weights: their mean over heads if `average`, those of each
        head if False, none if None."""
        dropout_p = self.dropout if self.training else 0.0
        state = dropout_state(q.shape[0], q.device) if 0 < dropout_p < 1 else None
        scale = self.head_dim**-0.5
        bias, mask, causal = masks
        z, lse = attend(
            q, k, v, bias=bias, key_lengths=key_lengths, mask=mask, causal=TOP_LEFT if causal else None,
            scale=scale, dropout_p=dropout_p, dropout_state=state, backend=self.backend,
        )  # fmt: skip
        if average is None:
            return z, None
        if mask is not None:
            bias = joined(bias, mask_as_bias(mask, q, k))
        if key_lengths is not None:
            keys = torch.arange(k.shape[2], device=k.device)
            bias = (keys < key_lengths[:, None])[:, None, None]
        weighting = Weighting(scale, causal, dropout_p, state)
        weights = (mean_weights if average else head_weights)(q, k, lse, bias, weighting)
        if dropout_p == 1:
            weights = weights * 0.0
        # torch's softmax gives float32 under autocast on CUDA, and the dtype of the scores everywhere else.
        keep_float32 = q.device.type == "cuda" and torch.is_autocast_enabled("cuda")
        return z, weights if keep_float32 else weights.to(q.dtype)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (..., E) each. Inputs that are the same tensor share one matrix product."""
        bias = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.chunk(3)
            return (
                linear(query, self.q_proj_weight, q_bias),
                linear(key, self.k_proj_weight, k_bias),
                linear(value, self.v_proj_weight, v_bias),
            )
        weight = self.in_proj_weight
        if query is key and key is value:
            return linear(query, weight, bias).chunk(3, -1)
        sizes = [self.embed_dim, 2 * self.embed_dim] if key is value else [self.embed_dim] * 3
        inputs = (query, key) if key is value else (query, key, value)
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        first, *others = (linear(t, w, b) for t, w, b in zip(inputs, weight.split(sizes), biases, strict=True))
        return first, *(others[0].chunk(2, -1) if key is value else others)

    def _heads(self, t: Tensor) -> Tensor:
        """A projection (N, L, E), (L, N, E) or (L, E) seen as (N, H, L, D), without a copy."""
        heads = t.unflatten(-1, (self.num_heads, self.head_dim))
        if t.dim() == 2:
            return heads.transpose(0, 1)[None]
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _out(self, z: Tensor) -> Tensor:
        """The output projection of (..., H, D)."""
        return rows_of_layers(self.out_proj, z.flatten(-2))

    def _appended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, with the module's learned key and value (add_bias_kv) and zeros (add_zero_attn)
        appended."""
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((t, b.to(t.dtype).view(1, self.num_heads, 1, -1).expand(t.shape[0], -1, -1, -1)), 2)
                for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        return k, v

    def _masks(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | Mask | Lowered | None,
        is_causal: bool,
    ) -> _Masks:
        """The masks of a call; k holds the keys before the module appends any.

        attn_mask and key_padding_mask are combined to one L x S tensor only if both must be read.
        """
        appended = (self.bias_k is not None) + self.add_zero_attn
        # Every query sees the appended keys, so the mask as a whole is not causal.
        causal = is_causal and not appended
        bias, mask = None, None
        if isinstance(attn_mask, Mask | Lowered):
            # Appended keys would shift the diagonal of a value of fastattn.masks.
            bias, mask = (mask_as_bias(attn_mask, q, k), None) if appended else (None, attn_mask)
        elif attn_mask is not None and not causal:
            each = attn_mask.dim() == 3
            bias = _shown(attn_mask.unflatten(0, (-1, self.num_heads)) if each else attn_mask[None, None])
        if key_padding_mask is not None:
            padding = key_padding_mask.reshape(q.shape[0], 1, 1, key_padding_mask.shape[-1])
            bias = joined(bias, _shown(padding))
        if bias is not None and appended:
            # Appended keys are seen: True in a bool mask, 0 in one that is added.
            bias = F.pad(bias, (0, appended), value=float(bias.dtype == torch.bool))
        return _Masks(bias, mask, causal)

    def _nested(self, x: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
        """Self-attention of a nested tensor: padded, with key lengths so that the padding is not computed."""
        lengths = x._nested_tensor_size()[:, 0]
        padded = x.to_padded_tensor(0.0)
        key_lengths = lengths.to(padded.device)
        q, k, v = (self._heads(t) for t in self._project(padded, padded, padded))
        z, weights = self._attend(q, k, v, key_lengths=key_lengths, average=average if need_weights else None)
        out = self._out(z.transpose(1, 2))
        if weights is not None:
            rows = torch.arange(weights.shape[-2], device=weights.device) < key_lengths[:, None]
            weights = weights * (rows[:, :, None] if average else rows[:, None, :, None])
        return torch.nested.as_nested_tensor([o[:n] for o, n in zip(out, lengths.tolist(), strict=True)]), weights

    def _obstacle(self, inputs: _Inputs) -> str | None:
        """Why this call is left to torch, which computes it or raises; None if it is computed here."""
        if is_replaced(nn.MultiheadAttention):
            return "torch.nn.MultiheadAttention has another forward now"
        tensors = inputs[:3]
        # The bias is among them: for some layouts torch accepts a bias of another dtype.
        projected = tensors if self.in_proj_bias is None else (*tensors, self.in_proj_bias)
        if unserved := dtype_obstacle(*projected):
            return unserved
        if not 0 <= self.dropout <= 1:
            return f"dropout is {self.dropout}"
        fits = self._nested_fits if any(t.is_nested for t in tensors) else self._fits
        return None if fits(inputs) else "the inputs do not fit together"

    def _fits(self, inputs: _Inputs) -> bool:
        """Whether ranks and sizes are what torch requires."""
        query, key, value, key_padding_mask, attn_mask = inputs
        tensors = (query, key, value)
        if {t.dim() for t in tensors} not in ({2}, {3}) or (self.bias_k is None) != (self.bias_v is None):
            return False
        if tuple(t.shape[-1] for t in tensors) != (self.embed_dim, self.kdim, self.vdim):
            return False
        batched = query.dim() == 3
        length, batch = (1, 0) if self.batch_first and batched else (0, 1)
        batches = tuple(t.shape[batch] if batched else 1 for t in tensors)
        queries, keys = query.shape[length], key.shape[length]
        if any(size != batches[0] for size in batches) or value.shape[length] != keys:
            return False
        padding = (batches[0], keys) if batched else (keys,)
        each = ((queries, keys), (batches[0] * self.num_heads, queries, keys))
        return (key_padding_mask is None or tuple(key_padding_mask.shape) == padding) and (
            attn_mask is None or isinstance(attn_mask, Mask | Lowered) or tuple(attn_mask.shape) in each
        )

    def _nested_fits(self, inputs: _Inputs) -> bool:
        """Whether this is self-attention of a nested tensor, in the form that torch's fast path takes."""
        query, key, value, key_padding_mask, attn_mask = inputs
        same = query is key and key is value and self._qkv_same_embed_dim
        plain = self.batch_first and self.bias_k is None and self.bias_v is None and not self.add_zero_attn
        unmasked = key_padding_mask is None and attn_mask is None
        return same and plain and unmasked and query.layout == torch.strided and query.size(-1) == self.embed_dim


def _shown(mask: Tensor) -> Tensor:
    """torch's mask as a bias of `fastattn.attention`. In torch True hides a key, here it shows it."""
    return ~mask if mask.dtype == torch.bool else mask


def check_mask(name: str, mask: Any, other_name: str = "", other: Any = None) -> None:
    """Raise or warn about a mask's dtype as torch does, but without torch's float copy of the mask. A value of
    fastattn.masks has no dtype to check."""
    if isinstance(mask, Mask | Lowered):
        if name.endswith("key_padding_mask"):
            raise TypeError(
                f"{name} must be a tensor, got a value of fastattn.masks: give it as {other_name}, joined to what "
                "else hides keys with &"
            )
        return
    if isinstance(other, Mask | Lowered):
        other = None
    if mask is not None:
        F._canonical_mask(
            mask.new_empty(0), name, F._none_or_dtype(other), other_name, torch.float32, other is not None
        )
