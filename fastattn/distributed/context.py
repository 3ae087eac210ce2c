"""Models whose sequence is spread over ranks: attention becomes distributed, positions are those of the layout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastattn.core import invariance, spread
from fastattn.distributed.dealing import Layout
from fastattn.distributed.exchange import agree, flat_rank, ranks_of
from fastattn.distributed.functional import METHODS, attention
from fastattn.distributed.sharding import mesh_of
from fastattn.ground.arguments import choice, flag
from fastattn.masks import Mask


@contextmanager
def context_parallel(
    mesh: DeviceMesh,
    layout: Layout,
    *,
    method: str = "auto",
    mask: Mask | None = None,
    gradient_dtype: torch.dtype | None = None,
    trust_positions: bool = False,
) -> Iterator[None]:
    """Within the block a model computes this rank's tokens of a sequence that is spread over the ranks of a mesh.

    `fastattn.attention`, `fastattn.scaled_dot_product_attention`, the modules of `fastattn.nn`, Hugging Face
    models with attn_implementation="fastattn" and patched models call `fastattn.distributed.attention`. Rotary and
    learned positions of `fastattn.nn` are those of the layout. Masks, windows and key lengths that are given to a
    model are those of the whole sequence. Everything else in a model must compute each token by itself.

        >>> plan = layout(length, mesh, causal=True)                                        # doctest: +SKIP
        >>> tokens, labels = shard(tokens, plan, 1), shard(next_tokens, plan, 1)            # doctest: +SKIP
        >>> with context_parallel(mesh, plan):                                              # doctest: +SKIP
        ...     loss = cross_entropy(model(tokens).flatten(0, 1), labels.flatten())

    Each rank's gradients of weights are those of its own tokens: sum them over the mesh, as data parallelism does.
    Shift labels before you shard them: the next token of a chunk's last one is on another rank. Hugging Face
    models take such labels as `shift_labels`; a causal loss that would shift by itself is refused. They also need
    `position_ids=shard(positions, plan, 1)`, which are compared with the layout where the model hands them to its
    attention. With activation checkpointing, call backward within the block.

    Args:
        mesh, layout, method, gradient_dtype: as `attention` takes them.
        mask: of the whole sequence, applied beside each layer's own, such as `masks.documents(...)`.
        trust_positions: do not ask for the positions of a Hugging Face model that does not hand them on.

    Raises:
        ValueError: calls that would take a part of the sequence for the whole: F.scaled_dot_product_attention,
            torch.nn.MultiheadAttention, Hugging Face's own attention (flex_attention is not noticed), padding as a
            tensor, caches, cross-attention, statistics of attention.
    """
    outer = spread.current
    if outer is not None:
        raise ValueError("context_parallel must not be entered again within its block")
    mesh = mesh_of(layout, mesh)
    with _refusing_losses_that_shift(), _refusing_attention_of_others(layout.counts[flat_rank(mesh)]):
        spread.current = _Context(
            mesh, layout, method, mask, flag("trust_positions", trust_positions), gradient_dtype
        )
        try:
            yield
        finally:
            spread.current = None


@contextmanager
def _suspended() -> Iterator[None]:
    """Within, attention computes what is here."""
    outer, spread.current = spread.current, None
    try:
        yield
    finally:
        spread.current = outer


class _Context:
    """See `spread.Spread`."""

    def __init__(
        self,
        mesh: DeviceMesh,
        layout: Layout,
        method: str,
        mask: Mask | None,
        trust_positions: bool,
        gradient_dtype: torch.dtype | None,
    ) -> None:
        choice("method", method, METHODS)
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(f"mask must be a value of fastattn.masks, got {type(mask).__name__}")
        self.mesh, self.layout, self.method, self.mask = mesh, layout, method, mask
        self.trust_positions, self.length = trust_positions, layout.length
        self.gradient_dtype = gradient_dtype
        self._own = layout.positions(flat_rank(mesh))
        self._on_device: dict[torch.device, Tensor] = {}
        self._checked: Tensor | None = None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        if options.pop("return_max"):
            raise ValueError("return_max is not computed under fastattn.distributed.context_parallel")
        if invariance.asked(options.pop("invariant")):
            raise ValueError(
                "invariant must be False under fastattn.distributed.context_parallel, which splits keys"
            )
        if self.mask is not None:
            mask = options["mask"]
            if mask is not None and not isinstance(mask, Mask):
                raise ValueError(
                    "mask must not be lowered if context_parallel has one, too: they are combined with &"
                )
            options["mask"] = self.mask if mask is None else mask & self.mask
        with _suspended():
            return attention(
                q, k, v, mesh=self.mesh, layout=self.layout, method=self.method,
                gradient_dtype=self.gradient_dtype, **options,
            )  # fmt: skip

    def positions(self, length: int, device: torch.device) -> Tensor:
        if length != len(self._own):
            self._refuse(
                f"x must have the {len(self._own)} tokens that the layout gives this rank, got {length}: shard "
                "the tokens before you give them to the model"
            )
        if device not in self._on_device:
            self._on_device[device] = self._own.to(device)
        return self._on_device[device]

    def check_positions(self, positions: Tensor | None, model: str) -> None:
        if positions is None:
            if not self.trust_positions:
                self._refuse(
                    f"{model} does not hand its position_ids to its attention, so they cannot be checked: give it "
                    "shard(positions, layout, 1), and say context_parallel(trust_positions=True)"
                )
        elif positions is not self._checked:
            own = self._own.to(positions.device)
            if positions.shape[-1] != len(own) or not torch.equal(positions, own.expand_as(positions)):
                self._refuse(
                    "position_ids must be those of this rank's tokens: give the model "
                    "position_ids=shard(positions, layout, 1), where positions is torch.arange(length)[None]"
                )
            self._checked = positions

    def is_numbered_by_chunk(self, documents: Tensor) -> bool:
        expected = (self._own.diff() != 1).cumsum(0).to(documents.device)
        return torch.equal(documents[..., 1:] - documents[..., :1], expected.expand_as(documents[..., 1:]))

    def _refuse(self, message: str) -> None:
        """Raise on all ranks, if they are about to compare their first call; else here."""
        problem = ValueError(message)
        if not self.layout.programs:
            agree(ranks_of(self.mesh), problem)
        raise problem


@contextmanager
def _refusing_attention_of_others(tokens: int) -> Iterator[None]:
    """Within, PyTorch's attention to `tokens` queries and keys and Hugging Face's other implementations refuse:
    they would take this rank's tokens for the whole sequence."""

    def ask(name: str, queries: int, keys: int) -> None:
        if spread.current is not None and tokens == queries == keys:
            raise ValueError(
                f"{name} would attend to this rank's tokens alone; take fastattn.scaled_dot_product_attention, or "
                "fastattn.patch(model)"
            )

    def refusing(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ask("F.scaled_dot_product_attention", query.shape[-2], key.shape[-2])
        return sdpa(query, key, value, *args, **kwargs)

    def refusing_heads(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        ask("torch.nn.MultiheadAttention", query.shape[0], key.shape[0])
        return heads(query, key, *args, **kwargs)

    def get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        if spread.current is not None and name != "fastattn":
            raise ValueError(
                f"attn_implementation must be 'fastattn' under context_parallel, got {name!r}, which would attend "
                "to this rank's tokens alone: model.set_attn_implementation('fastattn')"
            )
        found: Callable[..., Any] = of_hugging_face(self, name, default)
        return found

    sdpa, heads = F.scaled_dot_product_attention, F.multi_head_attention_forward
    interface: Any = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    of_hugging_face: Any = getattr(interface, "get_interface", None)
    # Encoder layers of torch.nn would go past it in evaluation.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention = refusing  # type: ignore[assignment]
    F.multi_head_attention_forward = refusing_heads
    if of_hugging_face is not None:
        interface.get_interface = get_interface
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.multi_head_attention_forward = sdpa, heads
        torch.backends.mha.set_fastpath_enabled(fast)
        if of_hugging_face is not None:
            interface.get_interface = of_hugging_face


@contextmanager
def _refusing_losses_that_shift() -> Iterator[None]:
    """Within, Hugging Face's causal loss refuses labels that it would shift: it would take the wrong next token at
    the end of each chunk."""
    losses = getattr(sys.modules.get("transformers.loss.loss_utils"), "LOSS_MAPPING", {})
    before = losses.get("ForCausalLM")
    if before is None:
        yield
        return

    def refusing(
        logits: Tensor, labels: Tensor, *args: Any, shift_labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if shift_labels is None:
            raise ValueError(
                "labels are shifted by the model, but the next token of a chunk's last one is on another rank: "
                "give shift_labels=shard(next_tokens, layout, 1), beside the labels"
            )
        causal_loss: Callable[..., Any] = before
        return causal_loss(logits, labels, *args, shift_labels=shift_labels, **kwargs)

    losses["ForCausalLM"] = refusing
    try:
        yield
    finally:
        losses["ForCausalLM"] = before
