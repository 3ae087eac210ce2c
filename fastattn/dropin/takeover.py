"""`fastattn.sdpa.activate()`: every call of F.scaled_dot_product_attention in the process uses our attention.

It goes through PyTorch's own registry of flash attention implementations, in which ours is called "fastattn".
While it is active, it replaces the operators for flash attention. PyTorch calls these on a GPU in half precision
without a mask, and on a CPU without dropout, masked or not.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
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
# Older versions of PyTorch have only parts of the registry.
_RESTORES = hasattr(registry, "restore_flash_attention_impl")


class Takeover:
    """The switch `fastattn.sdpa`: activate(), deactivate(), active, and `with fastattn.sdpa(): ...`.

    It acts on the whole process, as PyTorch's registry does. Switch it between training steps, not between a
    forward and its backward, which must use the same implementation.

    Example:
        >>> with fastattn.sdpa():
        ...     out = model(x)  # every F.scaled_dot_product_attention that PyTorch gives to flash attention
    """

    def __init__(self) -> None:
        self._backend: str | None = None

    @property
    def active(self) -> bool:
        """Whether PyTorch's flash attention is ours now."""
        return _RESTORES and registry.current_flash_attention_impl() == NAME

    def activate(self, backend: str | None = None) -> None:
        """Replace the flash attention that PyTorch uses by ours; `backend` as `fastattn.attention`'s."""
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
    """Replaces PyTorch's flash attention operators by ours, until `remove` is called."""

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
            # Inside of our own call the portable backend may call PyTorch's flash attention: it gets the original.
            if getattr(self.here, "inside", False) or not _served(arguments):
                return original.call_boxed(keyset, *arguments, **options)
            self.here.inside = True
            try:
                # Autograd and autocast have been applied above these operators.
                with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
                    return ours(*arguments, **options)
            finally:
                self.here.inside = False

        with warnings.catch_warnings():
            # PyTorch warns that a kernel is replaced, which is intended.
            warnings.simplefilter("ignore")
            self.installed.impl(name, choose, key, with_keyset=True)

    def forward_on_cpu(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
        attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        causal = TOP_LEFT if is_causal else None
        out, lse = attend(q, k, v, bias=attn_mask, causal=causal, scale=scale, backend=self.backend)
        return _as_like(out, q), lse.mT.contiguous().mT

    def backward_on_cpu(
        self, *arguments: Any, attn_mask: Tensor | None = None, scale: float | None = None
    ) -> tuple[Tensor, ...]:
        """As the operator is called: with the six tensors of `_backward`, dropout_p and is_causal."""
        *tensors, _dropout_p, is_causal = arguments
        return self._backward(tensors, TOP_LEFT if is_causal else None, scale, attn_mask)

    def forward_on_gpu(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The backward gets the seed of the random numbers in two 64-bit words, where PyTorch's has its own."""
        words = dropout_state(1, q.device)[0] if dropout_p else q.new_zeros(2, dtype=torch.int64)
        out, lse = attend(
            q, k, v, causal=BOTTOM_RIGHT if is_causal else None, scale=scale, dropout_p=dropout_p,
            dropout_state=_state(words, q) if dropout_p else None, backend=self.backend,
        )  # fmt: skip
        unused = q.new_zeros((), dtype=torch.uint64)
        seed = words.view(torch.uint64)
        lengths = (q.shape[2], k.shape[2])
        return _as_like(out, q), lse.contiguous(), None, None, *lengths, seed, unused, q.new_empty(0)

    def backward_on_gpu(self, *arguments: Any, scale: float | None = None) -> tuple[Tensor, ...]:
        """As the operator is called: with the six tensors of `_backward`, cum_seq_q, cum_seq_k, max_q, max_k,
        dropout_p, is_causal, philox_seed and philox_offset."""
        tensors, (dropout_p, is_causal, seed, _offset) = arguments[:6], arguments[10:]
        state = _state(seed.view(torch.int64), tensors[1]) if dropout_p else None
        causal = BOTTOM_RIGHT if is_causal else None
        return self._backward(tensors, causal, scale, dropout_p=dropout_p, state=state)

    def _backward(
        self,
        tensors: Sequence[Tensor],
        causal: str | None,
        scale: float | None,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        state: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """dq, dk and dv from the tensors dout, q, k, v, out, lse. A mask that comes this way wants no gradient."""
        dout, q, k, v, out, lse = tensors
        if dropout_p == 1:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        seen_k, seen_v, bias, aligned = align(q, k, v, bias, causal)
        spec = attention_spec(
            q, seen_k, seen_v, causal=aligned.get("causal", False), scale=scale,
            window=aligned.get("window", (None, None)), dropout_p=dropout_p,
        )  # fmt: skip
        scaled_q, positive = positive_scale(q, spec)
        beside = score_tensors(q, seen_k, bias=bias, dropout_state=state)
        dq, dk, dv, *_ = torch.ops.fastattn.attention_backward(
            dout, scaled_q, seen_k, seen_v, out, lse, None, False, False, *beside,
            *positive.options, self.backend,
        )  # fmt: skip
        if scaled_q is not q:
            dq = dq * (-1.0 if scale < 0 else 0.0)
        unseen = k.shape[2] - seen_k.shape[2]
        dk, dv = (F.pad(t, (0, 0, 0, unseen)) if unseen else t for t in (dk, dv))
        return tuple(_heads_last(t) for t in (dq, dk, dv))


def _served(arguments: tuple[Any, ...]) -> bool:
    """Whether our operators take tensors of this dtype and width."""
    return arguments[0].dtype in FLOATING and arguments[0].shape[-1] > 0


def _state(words: Tensor, q: Tensor) -> Tensor:
    """The dropout state of each batch entry, from the seed in the first word."""
    return torch.stack((words[0].expand(q.shape[0]), torch.arange(q.shape[0], device=q.device)), 1)


def _as_like(out: Tensor, query: Tensor) -> Tensor:
    """`out` in the memory layout of the queries, which PyTorch's operators give it."""
    like = torch.empty_like(query)
    return out if out.stride() == like.stride() else like.copy_(out)


def _heads_last(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


sdpa = Takeover()
