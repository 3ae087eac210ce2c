"""Every model that calls F.scaled_dot_product_attention on ours, by one call: `fastattn.sdpa.activate()`.

It goes through PyTorch's own registry of flash attention implementations, where ours has the name "fastattn".
While it is active, those operators are ours to which PyTorch's selector routes its flash calls: on a GPU the ones
in half precision without a mask, on a CPU the ones without dropout, masked or not.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn import attention as registry

from fastattn.core import backends
from fastattn.core.attention.dropout import dropout_state
from fastattn.core.attention.sdpa import BOTTOM_RIGHT, TOP_LEFT, align, attend
from fastattn.core.attention.spec import attention_spec, positive_scale, score_tensors
from fastattn.ground.checks import FLOATING

NAME = "fastattn"
# The registry came into PyTorch in pieces.
_RESTORES = hasattr(registry, "restore_flash_attention_impl")


class Takeover:
    """The switch `fastattn.sdpa`: activate(), deactivate(), active, and `with fastattn.sdpa(): ...`.

    It is global to the process, as PyTorch's registry is. Switch between training steps, not between a forward
    and its backward: each must come from the same implementation.

    Example:
        >>> with fastattn.sdpa():
        ...     out = model(x)  # every F.scaled_dot_product_attention that PyTorch gives to flash attention
    """

    def __init__(self) -> None:
        self._backend: str | None = None

    @property
    def active(self) -> bool:
        """Whether PyTorch's flash attention is ours at present."""
        return _RESTORES and registry.current_flash_attention_impl() == NAME

    def activate(self, backend: str | None = None) -> None:
        """Put ours in the place of whatever flash attention PyTorch uses; `backend` as `fastattn.attention`'s."""
        if not _RESTORES:
            raise RuntimeError(f"fastattn.sdpa needs a PyTorch that can restore its own, got {torch.__version__}")
        if backend is not None and backend not in backends.NAMES:
            raise ValueError(f"backend must be one of {', '.join(backends.NAMES)} or None, got {backend!r}")
        self._backend = backend
        registry.register_flash_attention_impl(NAME, register_fn=partial(_Operators, backend))
        registry.activate_flash_attention_impl(NAME)

    def deactivate(self) -> None:
        """Restore PyTorch's own flash attention, if ours is active."""
        if self.active:
            registry.restore_flash_attention_impl()

    @contextmanager
    def __call__(self, backend: str | None = None) -> Iterator[None]:
        """Activate within a block; after it, what was active before is active again."""
        was_ours, backend_before = self.active, self._backend
        before = registry.current_flash_attention_impl() if _RESTORES else None
        self.activate(backend)
        try:
            yield
        finally:
            self.deactivate()
            if was_ours:
                self.activate(backend_before)
            elif before is not None:
                registry.activate_flash_attention_impl(before)

    def __repr__(self) -> str:
        return f"<fastattn.sdpa, {'active' if self.active else 'not active'}>"


class _Operators:
    """Our kernels in PyTorch's flash operators, until `remove` is called."""

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend
        self.here = threading.local()
        self.installed = library.Library("aten", "IMPL")
        name = "_scaled_dot_product_flash_attention"
        self._replace(f"{name}_for_cpu", "CPU", self.forward_on_cpu)
        self._replace(f"{name}_for_cpu_backward", "CPU", self.backward_on_cpu)
        if torch.backends.cuda.is_built():
            self._replace(name, "CUDA", self.forward_on_gpu)
            self._replace(f"{name}_backward", "CUDA", self.backward_on_gpu)

    def remove(self) -> None:
        self.installed._destroy()

    def _replace(self, name: str, key: str, ours: Any) -> None:
        original = library.get_kernel(f"aten::{name}", key)

        def choose(keyset: Any, *arguments: Any, **options: Any) -> Any:
            # The portable backend calls these operators itself, for what PyTorch's flash attention computes well.
            if getattr(self.here, "inside", False) or not _served(arguments):
                return original.call_boxed(keyset, *arguments, **options)
            self.here.inside = True
            try:
                # Autograd and autocast are above these operators, and have done their part.
                with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
                    return ours(*arguments, **options)
            finally:
                self.here.inside = False

        with warnings.catch_warnings():
            # That a kernel is replaced is the purpose.
            warnings.simplefilter("ignore")
            self.installed.impl(name, choose, key, with_keyset=True)

    def forward_on_cpu(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = attend(
            query, key, value, bias=attn_mask, causal=TOP_LEFT if is_causal else None, scale=scale,
            backend=self.backend,
        )  # fmt: skip
        return _as_like(out, query), lse.mT.contiguous().mT

    def backward_on_cpu(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, ...]:
        causal = TOP_LEFT if is_causal else None
        return self._backward(grad_out, query, key, value, out, lse, causal, scale, attn_mask)

    def forward_on_gpu(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        """The seed of the random numbers is handed to the backward as PyTorch's is, in two 64-bit words."""
        words = dropout_state(1, query.device)[0] if dropout_p else query.new_zeros(2, dtype=torch.int64)
        out, lse = attend(
            query, key, value, causal=BOTTOM_RIGHT if is_causal else None, scale=scale, dropout_p=dropout_p,
            dropout_state=_state(words, query) if dropout_p else None, backend=self.backend,
        )  # fmt: skip
        unused = query.new_zeros((), dtype=torch.uint64)
        lengths = (query.shape[2], key.shape[2])
        seed = words.view(torch.uint64)
        return _as_like(out, query), lse.contiguous(), None, None, *lengths, seed, unused, query.new_empty(0)

    def backward_on_gpu(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Tensor,
        philox_offset: Tensor,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, ...]:
        causal = BOTTOM_RIGHT if is_causal else None
        state = _state(philox_seed.view(torch.int64), query) if dropout_p else None
        return self._backward(grad_out, query, key, value, out, lse, causal, scale, None, dropout_p, state)

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: str | None,
        scale: float | None,
        bias: Tensor | None,
        dropout_p: float = 0.0,
        state: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """dq, dk and dv; masks that come this way want no gradient."""
        if dropout_p == 1:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        seen_k, seen_v, bias, aligned = align(q, k, v, bias, causal)
        spec = attention_spec(
            q, seen_k, seen_v, causal=aligned.get("causal", False), scale=scale,
            window=aligned.get("window", (None, None)), dropout_p=dropout_p,
        )  # fmt: skip
        scaled_q, positive = positive_scale(q, spec)
        tensors = score_tensors(q, seen_k, bias=bias, dropout_state=state)
        dq, dk, dv, *_ = torch.ops.fastattn.attention_backward(
            dout, scaled_q, seen_k, seen_v, out, lse, None, False, False, *tensors,
            *positive.options, self.backend,
        )  # fmt: skip
        if scaled_q is not q:
            dq = dq * (-1.0 if scale < 0 else 0.0)
        unseen = k.shape[2] - seen_k.shape[2]
        dk, dv = (F.pad(t, (0, 0, 0, unseen)) if unseen else t for t in (dk, dv))
        return tuple(_heads_last(t) for t in (dq, dk, dv))


def _served(arguments: tuple[Any, ...]) -> bool:
    """Whether the tensors of a call have dtypes and widths of ours."""
    return arguments[0].dtype in FLOATING and arguments[0].shape[-1] > 0


def _state(words: Tensor, q: Tensor) -> Tensor:
    """The state of each batch entry, of a seed in the first word."""
    return torch.stack((words[0].expand(q.shape[0]), torch.arange(q.shape[0], device=q.device)), 1)


def _as_like(out: Tensor, query: Tensor) -> Tensor:
    """`out` laid out as PyTorch's operators lay it out: as the queries."""
    like = torch.empty_like(query)
    return out if out.stride() == like.stride() else like.copy_(out)


def _heads_last(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


sdpa = Takeover()
