"""Self- and cross-attention: linear projections around the fused `fastattn.attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastattn.core import spread
from fastattn.core.attention.functional import attention
from fastattn.core.capabilities import check_backend
from fastattn.core.heads.functional import prepare_heads
from fastattn.core.intact import alteration
from fastattn.core.rows import rows_of_layers
from fastattn.ground.arguments import flag, integer
from fastattn.ground.checks import Window, check_window
from fastattn.masks import Lowered, Mask
from fastattn.masks.algebra import smaller
from fastattn.nn.checks import check_stream, factory_options
from fastattn.nn.decoding_cache import LayerCache
from fastattn.nn.rotary import Rotary

QK_NORM_EPS = 1e-6

UNBOUNDED = (None, None)


class _Attention(nn.Module):
    """What self- and cross-attention share: the layout of the heads, the call of attention, the hook points."""

    out_proj: nn.Linear
    window: tuple[int | None, int | None] = UNBOUNDED  # for modules pickled before there was a window

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        causal: bool,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = _sizes(embed_dim, num_heads)
        self.num_kv_heads, self.head_dim = head_layout(self.embed_dim, self.num_heads, num_kv_heads, head_dim)
        self.causal = flag("causal", causal)
        self.backend = check_backend(backend)
        # Identities to put forward hooks on: queries, keys, values, and the output of each head, all of shape
        # (B, heads, L, head_dim). A hook reads the tensor, and replaces it by returning another.
        self.hook_q = nn.Identity()
        self.hook_k = nn.Identity()
        self.hook_v = nn.Identity()
        self.hook_z = nn.Identity()

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, heads * head_dim) seen as (B, heads, L, head_dim), without a copy."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: Mask | Lowered | None = None,
        window: Window = None,
        key_lengths: torch.Tensor | Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Attention of q, k, v as `project` returns them, then the output projection: (B, L, embed_dim)."""
        z = attention(q, k, v, **self.options(mask=mask, window=window, key_lengths=key_lengths))
        return rows_of_layers(self.out_proj, self.hook_z(z).transpose(1, 2).flatten(2))

    def options(
        self,
        *,
        mask: Mask | Lowered | None = None,
        window: Window = None,
        key_lengths: torch.Tensor | Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """The keywords for `fastattn.attention`. The window is where the module's own and the call's overlap."""
        return {
            "causal": self.causal,
            "window": narrower(self.window, window),
            "mask": mask,
            "key_lengths": key_lengths,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        window = "" if self.window == UNBOUNDED else f", window={self.window}"
        return f"{heads}, causal={self.causal}{window}, backend={self.backend!r}"


class SelfAttention(_Attention):
    """Multi-head self-attention of a sequence, (B, L, embed_dim) -> (B, L, embed_dim).

    `forward(x)` is `attend(*project(x))`: one projection to queries, keys and values, fused attention
    without an L x L matrix, and the output projection. To compute something else from the heads, call
    `project`; to read or replace tensors in place, hook `hook_q`, `hook_k`, `hook_v` or `hook_z`.

    A call may hide further keys, by a mask, a window and the lengths of a padded batch. They add to the causal
    mask and window of the module: a query sees a key if none of them hides it.

    Args:
        embed_dim: width of the sequence.
        num_heads: query heads.
        num_kv_heads: key and value heads, each serving num_heads / num_kv_heads query heads in order;
            None for as many as query heads.
        head_dim: width of a head; None for embed_dim / num_heads.
        bias: whether the projections have biases.
        causal: whether position i attends to positions <= i only.
        window: (left, right), how many positions before and after its own each one attends to, or one number
            for both; None is unbounded.
        rotary: the rotation of queries and keys by position; True for one over the whole head width.
        qk_norm: whether each query and key is divided by its root mean square and multiplied by a weight, before
            the rotation, as in Qwen 3 and Gemma 3.
        backend: "triton", "portable", "reference", or None for the best that fits.

    Parameters: qkv_proj, whose rows are the query heads, then the key heads, then the value heads, as
    GPT-2's; out_proj; with qk_norm also q_norm and k_norm, whose weights (head_dim,) all heads share.

    Raises:
        ValueError, TypeError: sizes that do not fit together, or x of another shape.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        causal: bool = False,
        window: Window = None,
        rotary: Rotary | bool | None = None,
        qk_norm: bool = False,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, causal, backend)
        self.window = narrower(UNBOUNDED, window)
        factory = {"bias": flag("bias", bias), **factory_options(device, dtype)}
        self.rotary = rotary_for(self.head_dim, rotary)
        # These modules hold the weights. The norm itself is fused with the rotation, see `_prepared`.
        qk_norm = flag("qk_norm", qk_norm)
        self.q_norm = self._norm_of_heads(device, dtype) if qk_norm else None
        self.k_norm = self._norm_of_heads(device, dtype) if qk_norm else None
        all_heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(self.embed_dim, all_heads * self.head_dim, **factory)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, self.embed_dim, **factory)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of x (B, L, embed_dim), after norm and rotation.

        Returns:
            q (B, num_heads, L, head_dim), k and v (B, num_kv_heads, L, head_dim): views of one tensor
            if there is neither norm nor rotation.
        """
        return self._projected(x)

    def _projected(
        self, x: torch.Tensor, cache: LayerCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`project`; with a cache, x follows the tokens that it holds."""
        check_stream("x", x, self.embed_dim)
        qkv = self.heads(rows_of_layers(self.qkv_proj, x))
        if self.rotary is None and self.q_norm is None and self.k_norm is None:
            q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        else:
            # Queries and keys are rotated by the same angles: one call for both.
            qk, v = qkv.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
            q, k = self._prepared(qk, cache)
        return self.hook_q(q), self.hook_k(k), self.hook_v(v)

    def _norm_of_heads(self, device: Any, dtype: torch.dtype | None) -> Any:
        return nn.RMSNorm(self.head_dim, eps=QK_NORM_EPS, device=device, dtype=dtype)

    def _prepared(self, qk: torch.Tensor, cache: LayerCache | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise and rotate the queries and keys in qk (B, all their heads, L, head_dim), in one fused pass.
        Norms and a rotation that a user has changed (see `alteration`) are called as modules instead."""
        heads = [self.num_heads, self.num_kv_heads]
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        # Whatever took the place of a norm may have no eps: ask for its class first.
        fused_norms = len(norms) == 2 and all(map(_is_plain_norm, norms)) and norms[0].eps == norms[1].eps
        if norms and not fused_norms:
            parts = zip((self.q_norm, self.k_norm), qk.split(heads, dim=1), strict=True)
            qk = torch.cat([t if norm is None else norm(t).to(t.dtype) for norm, t in parts], dim=1)
        options: dict[str, Any] = {}
        if fused_norms:
            weights = zip(norms, heads, strict=True)
            options["norm_weight"] = torch.cat([norm.weight.expand(count, -1) for norm, count in weights])
            options["eps"] = norms[0].eps
        rotary = self.rotary
        altered = None if rotary is None else alteration(rotary, Rotary, qk)
        if altered and cache is not None:
            raise ValueError(f"cache must be None for this model: its rotary {altered}")
        if rotary is not None and not altered:
            options |= _rotation(rotary, qk) if cache is None else cache.rotation(rotary, qk)
            rotary = None
        qk = prepare_heads(qk, **options, backend=self.backend) if options else qk
        q, k = qk.split(heads, dim=1)
        return (q, k) if rotary is None else (rotary(q), rotary(k))

    def forward(
        self,
        x: torch.Tensor,
        *,
        mask: Mask | Lowered | None = None,
        window: Window = None,
        key_lengths: torch.Tensor | Sequence[int] | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """Attend from x (B, L, embed_dim) to itself; same shape.

        Args:
            mask: a value of fastattn.masks, or what its `lower` returned for B, num_heads, L, L and x's device. A
                lowered mask must lie within the module's own causal mask and window, else a ValueError: combine
                them with & before lowering.
            window: as the module's own.
            key_lengths: (B,) integers, the length of each sequence. Positions from there on are padding: no query
                sees them, and their rows of the result have no meaning.
            cache: keys and values of earlier tokens, one of `DecodingCache.layers`. x attends to them, too, and
                its own are added. For inference with a causal module; without mask and key_lengths.
        """
        if cache is None:
            return self.attend(*self.project(x), mask=mask, window=window, key_lengths=key_lengths)
        for name, value in (("mask", mask), ("key_lengths", key_lengths)):
            if value is not None:
                raise ValueError(f"{name} must be None with a cache, got {type(value).__name__}")
        if not self.causal:
            raise ValueError("cache must be None for a module with causal=False: its tokens see later ones")
        options = self.options(window=window)
        z = cache.attend(*self._projected(x, cache), window=options["window"], backend=self.backend)
        return rows_of_layers(self.out_proj, self.hook_z(z).transpose(1, 2).flatten(2))


def _rotation(rotary: Rotary, qk: torch.Tensor) -> dict[str, Any]:
    """A rotation as `prepare_heads` takes it."""
    cos, sin = rotary.tables(qk)
    return {"cos": cos, "sin": sin}


def _is_plain_norm(norm: nn.Module) -> bool:
    """Whether the fused pass may compute this norm, so that the module need not be called."""
    return not alteration(norm, nn.RMSNorm) and norm.weight is not None and norm.eps is not None


class CrossAttention(_Attention):
    """Attention from a sequence to a context: (B, Lq, embed_dim), (B, Lk, context_dim) -> (B, Lq, embed_dim).

    Queries come from the sequence, keys and values from the context, of any other length and width: an
    encoder's output in an encoder-decoder, or a long input read by a few latent queries.

    Args:
        embed_dim: width of the sequence.
        num_heads: query heads.
        context_dim: width of the context; None for embed_dim.
        num_kv_heads, head_dim, bias, backend: as for `SelfAttention`.

    Parameters: q_proj; kv_proj, whose rows are the key heads, then the value heads; out_proj.

    Raises:
        ValueError, TypeError: sizes that do not fit together, or x or context of another shape.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, False, backend)
        factory = {"bias": flag("bias", bias), **factory_options(device, dtype)}
        context_dim = self.embed_dim if context_dim is None else context_dim
        self.context_dim = integer("context_dim", context_dim, least=1)
        self.q_proj = nn.Linear(self.embed_dim, self.num_heads * self.head_dim, **factory)
        self.kv_proj = nn.Linear(self.context_dim, 2 * self.num_kv_heads * self.head_dim, **factory)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, self.embed_dim, **factory)

    def project(self, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of x (B, Lq, embed_dim), keys and values of context (B, Lk, context_dim).

        Returns:
            q (B, num_heads, Lq, head_dim), k and v (B, num_kv_heads, Lk, head_dim).
        """
        spread.refuse("cross-attention")
        check_stream("x", x, self.embed_dim)
        check_stream("context", context, self.context_dim)
        if x.shape[0] != context.shape[0]:
            raise ValueError(f"context must have the batch size of x, {x.shape[0]}; got {tuple(context.shape)}")
        k, v = self.heads(rows_of_layers(self.kv_proj, context)).chunk(2, dim=1)
        return self.hook_q(self.heads(rows_of_layers(self.q_proj, x))), self.hook_k(k), self.hook_v(v)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        *,
        mask: Mask | Lowered | None = None,
        window: Window = None,
        key_lengths: torch.Tensor | Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Attend from x (B, Lq, embed_dim) to context (B, Lk, context_dim); shaped as x.

        Args:
            mask: a value of fastattn.masks, or what its `lower` returned for B, num_heads, Lq, Lk and x's device.
            window: (left, right), how many keys before and after the diagonal are seen, on which query i
                stands at key i + Lk - Lq; None is unbounded.
            key_lengths: (B,) integers, the length of each context. Rows from there on are padding.
        """
        return self.attend(*self.project(x, context), mask=mask, window=window, key_lengths=key_lengths)


def asked_for(**options: Any) -> dict[str, Any]:
    """The options that are not None. A layer that knows none of them can still be called if none is used."""
    return {name: value for name, value in options.items() if value is not None}


def narrower(window: tuple[int | None, int | None], other: Window) -> tuple[int | None, int | None]:
    """The overlap of two windows."""
    left, right = check_window(other)
    return smaller(window[0], left), smaller(window[1], right)


def head_layout(embed_dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """The number of key and value heads and the width of a head, checked.

    Raises:
        ValueError, TypeError: sizes that are not positive integers, or do not divide.
    """
    embed_dim, num_heads = _sizes(embed_dim, num_heads)
    if head_dim is None:
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads unless head_dim is given; "
                f"got embed_dim {embed_dim}, num_heads {num_heads}"
            )
        head_dim = embed_dim // num_heads
    head_dim = integer("head_dim", head_dim, least=1)
    num_kv_heads = num_heads if num_kv_heads is None else integer("num_kv_heads", num_kv_heads, least=1)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads; got num_heads {num_heads}, num_kv_heads {num_kv_heads}"
        )
    return num_kv_heads, head_dim


def _sizes(embed_dim: Any, num_heads: Any) -> tuple[int, int]:
    return integer("embed_dim", embed_dim, least=1), integer("num_heads", num_heads, least=1)


def rotary_for(head_dim: int, rotary: Rotary | bool | None) -> Rotary | None:
    """The rotation for the argument `rotary`, checked against the width of a head."""
    if rotary is None:
        return None
    if not isinstance(rotary, Rotary):
        return Rotary(head_dim) if flag("rotary", rotary, what="a fastattn.nn.Rotary or a bool") else None
    if rotary.width > head_dim:
        raise ValueError(f"rotary must rotate at most head_dim = {head_dim} components, got width {rotary.width}")
    return rotary
