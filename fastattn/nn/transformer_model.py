"""The pre-norm residual block and the GPT-2 family of models built from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastattn.core import spread
from fastattn.core.intact import alteration
from fastattn.core.loss.functional import linear_cross_entropy, loss_of_logits
from fastattn.core.rows import linear, rows_of_layers
from fastattn.ground import arguments
from fastattn.ground.checks import Window
from fastattn.masks import Lowered, Mask
from fastattn.nn.attention import CrossAttention, SelfAttention, asked_for
from fastattn.nn.checks import (
    check_dropout,
    check_not_negative,
    check_stream,
    check_tokens,
    factory_options,
)
from fastattn.nn.config import GPT2_STD, NORMS, TransformerConfig
from fastattn.nn.decoding_cache import DecodingCache, LayerCache
from fastattn.nn.generation import Generation, generate
from fastattn.nn.gpt2 import copy_gpt2, gpt2_config, gpt2_state
from fastattn.nn.mlp import MLP, GatedMLP
from fastattn.nn.residual import residual_step


class TransformerBlock(nn.Module):
    """Layers that each read the normalised residual stream and add to it; the shape (B, L, embed_dim) stays.

    x += attention(norm(x)); then x += cross_attention(norm(x), context) if there is one; then
    x += mlp(norm(x)) if there is one.

    Args:
        attention: the self-attention.
        mlp: the MLP, or None for an attention-only block.
        cross_attention: for the decoder of an encoder-decoder; makes `context` an argument of forward.
        norm: "layer" or "rms", with `norm_eps` and, for "layer", `bias`.
        dropout: probability of dropping an element of what a layer adds.

    Hooks: `hook_resid_pre`, `hook_resid_mid` (before the MLP, if there is one) and `hook_resid_post` see
    the stream (B, L, embed_dim); a forward hook on one reads it, or replaces it by returning a tensor.

    Raises:
        ValueError, TypeError: parts of different width, an unknown norm, x of another shape, or a context
            missing or in excess.
    """

    def __init__(
        self,
        attention: SelfAttention,
        mlp: MLP | GatedMLP | None = None,
        *,
        cross_attention: CrossAttention | None = None,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        bias: bool = True,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("attention", attention), ("mlp", mlp), ("cross_attention", cross_attention)):
            _check_part(name, part, or_none=name != "attention")
        self.embed_dim = attention.embed_dim
        arguments.choice("norm", norm, NORMS)
        norm_eps, bias = check_not_negative("norm_eps", norm_eps), arguments.flag("bias", bias)
        factory = factory_options(device, dtype)
        for name, part in (("mlp", mlp), ("cross_attention", cross_attention)):
            if part is not None and part.embed_dim != self.embed_dim:
                raise ValueError(
                    f"{name} must have the embed_dim of attention, {self.embed_dim}; got {part.embed_dim}"
                )

        def norm_before(part: nn.Module | None) -> Any:
            if part is None:
                return None
            return make_norm(norm, self.embed_dim, norm_eps, bias=bias, **factory)

        self.hook_resid_pre = nn.Identity()
        self.attention_norm = norm_before(attention)
        self.attention = attention
        self.cross_attention_norm = norm_before(cross_attention)
        self.cross_attention = cross_attention
        self.hook_resid_mid: Any = None if mlp is None else nn.Identity()
        self.mlp_norm = norm_before(mlp)
        self.mlp = mlp
        self.hook_resid_post = nn.Identity()
        self.dropout = nn.Dropout(check_dropout(dropout))

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        mask: Mask | Lowered | None = None,
        window: Window = None,
        key_lengths: torch.Tensor | Sequence[int] | None = None,
        context_mask: Mask | Lowered | None = None,
        context_key_lengths: torch.Tensor | Sequence[int] | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """x (B, L, embed_dim), context (B, Lk, context_dim) for the cross-attention; shaped as x.

        Args:
            mask, window, key_lengths, cache: as for `SelfAttention`.
            context_mask, context_key_lengths: as the mask and key_lengths of `CrossAttention`.
        """
        check_stream("x", x, self.embed_dim)
        seen = asked_for(mask=mask, window=window, key_lengths=key_lengths, cache=cache)
        seen_of_context = asked_for(mask=context_mask, key_lengths=context_key_lengths)
        self._check_context(context, seen_of_context)
        x = self.hook_resid_pre(x)
        x = x + self.dropout(self.attention(self.attention_norm(x), **seen))
        if self.cross_attention is not None:
            read = self._read_context(self.cross_attention_norm(x), context, seen_of_context)
            x = x + self.dropout(read)
        if self.mlp is not None:
            x = self.hook_resid_mid(x)
            x = residual_step(x, self.mlp_norm, self.mlp, self.dropout)
        return self.hook_resid_post(x)

    def _read_context(self, x: torch.Tensor, context: Any, seen: dict[str, Any]) -> torch.Tensor:
        """Call the cross-attention. Where its errors speak of `mask`, this block's argument is `context_mask`:
        they are raised again with that name."""
        assert self.cross_attention is not None
        try:
            return self.cross_attention(x, context, **seen)
        except (TypeError, ValueError) as problem:
            name = str(problem).partition(" ")[0]
            if name not in seen:
                raise
            raise (TypeError if isinstance(problem, TypeError) else ValueError)(f"context_{problem}") from problem

    def _check_context(self, context: torch.Tensor | None, seen_of_context: dict[str, Any]) -> None:
        if self.cross_attention is None and seen_of_context:
            name = f"context_{next(iter(seen_of_context))}"
            raise ValueError(f"{name} must be None for a block without cross_attention")
        if self.cross_attention is None and context is not None:
            raise ValueError("context must be None for a block without cross_attention, got a tensor")
        if self.cross_attention is not None and context is None:
            raise ValueError("context must be a tensor for a block with cross_attention, got None")


class TransformerModel(nn.Module):
    """A language model of the GPT-2 family: tokens (B, L) -> logits (B, L, vocab_size).

    A token embedding, positions, blocks that add to the residual stream, a final norm, an unembedding.
    `TransformerConfig` has the arguments: decoder or encoder, with MLPs or attention-only, and so on.

        >>> model = TransformerModel(vocab_size=256, embed_dim=64, num_heads=4, num_layers=2, max_length=128)
        >>> model(torch.randint(256, (2, 128))).shape
        torch.Size([2, 128, 256])

    To look inside, register forward hooks on submodules: `model.blocks[i].hook_resid_post`,
    `model.blocks[i].attention.hook_q` and their siblings, or on any layer.

    Args:
        config: the configuration. Its fields may also be given as keywords, alone or to override some of config's.

    Parameters are initialised as GPT-2's: weights normal with standard deviation 0.02, those that write to
    the residual stream divided by sqrt(2 num_layers), the token embedding's as configured, biases zero.
    """

    def __init__(
        self,
        config: TransformerConfig | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if config is None:
            config = TransformerConfig(**fields)
        elif not isinstance(config, TransformerConfig):
            raise TypeError(f"config must be a TransformerConfig, got {type(config).__name__}")
        elif fields:
            config = dataclasses.replace(config, **fields)
        self.config = config
        factory = factory_options(device, dtype)
        self.token_embedding = nn.Embedding(config.vocab_size, config.embed_dim, **factory)
        self.position_embedding = None
        if config.positions in ("learned", "zero") and config.max_length is not None:
            self.position_embedding = nn.Embedding(config.max_length, config.embed_dim, **factory)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(make_block(config, **factory) for _ in range(config.num_layers))
        self.final_norm = make_norm(config.norm, config.embed_dim, config.norm_eps, bias=config.bias, **factory)
        self.unembedding = None
        if not config.tied:
            self.unembedding = nn.Linear(config.embed_dim, config.vocab_size, bias=False, **factory)
        self.reset_parameters()

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        mask: Mask | Lowered | None = None,
        window: Window = None,
        key_lengths: torch.Tensor | Sequence[int] | None = None,
        cache: DecodingCache | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, L, vocab_size) for tokens (B, L), int64 or int32; with labels the loss, one number.

        Args:
            labels: (B, L), class indices. A decoder predicts from token i label i + 1, so that `labels=tokens`
                trains it; an encoder predicts from token i label i. The loss is their mean cross-entropy, without
                those that are -100, by `fastattn.linear_cross_entropy`: no logits exist.
            mask, window, key_lengths: hide keys in every layer, beside the model's own causal mask and window, as
                for `SelfAttention`. Padded batch: `key_lengths=lengths`. Several documents in a row:
                `mask=fastattn.masks.documents(ids)`.
            cache: keys and values of earlier tokens. The given tokens follow them and are added; with
                `key_lengths`, the first key_lengths[b] of row b. The logits are those of each row's last token,
                (B, 1, vocab_size). For inference; see `generate`.

        Raises:
            ValueError, TypeError: tokens of another rank or dtype, or longer than max_length; a mask, a window,
                lengths or labels that do not fit them; labels beside a cache.
        """
        if labels is not None and cache is not None:
            raise ValueError("labels must be None with a cache, which is for inference")
        seen = asked_for(mask=mask, window=window, key_lengths=key_lengths)
        if cache is not None:
            return self._forward_with_cache(tokens, cache, **seen)
        x = self.embed(tokens)
        if labels is not None:
            self._check_labels(labels, tokens)
        for block in self.blocks:
            x = block(x, **seen)
        return self.unembed(x) if labels is None else self._loss(x, labels)

    def _check_labels(self, labels: Any, tokens: torch.Tensor) -> None:
        arguments.tensor("labels", labels, or_none=True)
        spread.refuse("a loss of labels")
        if labels.is_floating_point() or labels.shape != tokens.shape:
            shape, dtype = tuple(tokens.shape), labels.dtype
            raise ValueError(f"labels must be integers of shape {shape}, got {tuple(labels.shape)}, {dtype}")

    def _loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the labels, from the residual stream after the last block."""
        shift = self.config.causal
        if self.unembedding is not None:
            plain = not alteration(self.unembedding, nn.Linear, x)
        else:
            plain = type(self.token_embedding) is nn.Embedding and self.token_embedding.weight.device == x.device
        if not plain:
            return loss_of_logits(self.unembed(x), labels, shift=shift)
        weight = self.unembedding_weight
        return linear_cross_entropy(self.final_norm(x), weight, labels, shift=shift, backend=self.config.backend)

    def _forward_with_cache(self, tokens: torch.Tensor, cache: DecodingCache, **seen: Any) -> torch.Tensor:
        """The logits (B, 1, vocab_size) of each row's last token, after the tokens that the cache holds."""
        if not isinstance(cache, DecodingCache):
            raise TypeError(f"cache must be a DecodingCache or None, got {type(cache).__name__}")
        check_tokens(tokens, self.config.max_length)
        counts = cache.counts(tokens, **seen)
        x = self.embed(tokens, cache.positions(tokens))
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, cache=layer)
        cache.lengths += counts
        last = (counts - 1).to(x.device).long()[:, None, None].expand(-1, 1, x.shape[2])
        return self.unembed(x.gather(1, last))

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The residual stream (B, L, embed_dim) that the first block reads, from tokens (B, L) at positions
        (B, L), by default 0 to L - 1."""
        check_tokens(tokens, self.config.max_length)
        return self._with_positions(self.token_embedding(tokens), positions)

    def _with_positions(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """The embeddings of tokens (B, L, embed_dim), and those of their positions, if they are learned."""
        if self.position_embedding is not None:
            if positions is None:
                positions = spread.positions(x.shape[1], x.device)
            x = x + self.position_embedding(positions)
        return self.dropout(x)

    def unembed(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab_size) of a residual stream (..., embed_dim): final norm, then unembedding."""
        x = self.final_norm(x)
        if self.unembedding is not None:
            return rows_of_layers(self.unembedding, x)
        if type(self.token_embedding) is not nn.Embedding or self.token_embedding.weight.device != x.device:
            # An adapter or a wrapper, or its weight is elsewhere until it is called: ask it for every token.
            return linear(x, self.token_embedding(torch.arange(self.config.vocab_size, device=x.device)))
        return linear(x, self.token_embedding.weight)

    @property
    def unembedding_weight(self) -> torch.Tensor:
        """The unembedding matrix (vocab_size, embed_dim); the token embedding's weight if tied."""
        return self.token_embedding.weight if self.unembedding is None else self.unembedding.weight

    def generate(
        self,
        tokens: torch.Tensor,
        max_new_tokens: int,
        *,
        key_lengths: torch.Tensor | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: int | Sequence[int | Sequence[int]] | None = None,
        seed: int | None = None,
        stream: Callable[[torch.Tensor], Any] | None = None,
        use_cache: bool = True,
        cache_dtype: torch.dtype | None = None,
    ) -> Generation:
        """Continue prompts, a token at a time; keys and values of earlier tokens are kept in a cache.

        Args:
            tokens: the prompts (B, L), int64 or int32, at least one token each.
            max_new_tokens: how many tokens a row may get.
            key_lengths: (B,) integers, the length of each prompt; what follows is padding. None: all are L long.
            temperature: 0 takes the likeliest token. Above, a token is drawn from softmax(logits / temperature).
            top_k: draw from the k likeliest tokens only.
            top_p: draw from the likeliest tokens only: as few as have at least this probability together.
            min_p: draw only from tokens with at least this part of the likeliest token's probability.
                Of top_k, top_p and min_p, each applies to what the one before has left. They need a temperature.
            repetition_penalty: logits of tokens that are in the row, prompt included, are divided by it if they
                are positive, else multiplied by it; 1 changes nothing.
            stop: a row ends with one of these tokens, or with one of these sequences of new tokens.
            seed: of the draws; None draws from torch's generator.
            stream: called after each step with the new tokens (B,) int64; -1 for rows that have ended.
            use_cache: False computes all tokens again at each step. That is slow, and serves what a cache cannot.
            cache_dtype: torch.int8 or torch.float8_e4m3fn quantise keys and values in the cache, which takes less
                memory; logits then differ a little, see `fastattn.attention_with_cache`. None keeps them as they
                are.

        Returns:
            tokens (B, longest), each row's prompt and its new tokens behind it, then zeros; lengths (B,) int64.

        Raises:
            ValueError, TypeError: before anything runs: an argument out of range; prompts that would outgrow
                max_length; a model in training mode that drops; an encoder; with a cache, modules that are not
                fastattn's, and forward hooks, which may count on whole sequences.

        Example:
            >>> model = TransformerModel(vocab_size=256, embed_dim=64, num_heads=4, num_layers=2, max_length=128)
            >>> model.generate(torch.randint(256, (2, 8)), 20, temperature=0.8, top_p=0.95).tokens.shape
            torch.Size([2, 28])

        Source: top_p: Holtzman et al., The Curious Case of Neural Text Degeneration (2020), section 3.1;
        repetition_penalty: Keskar et al., CTRL (2019), section 4.1; min_p: Nguyen et al., Turning Up the Heat
        (2024), section 3.
        """
        return generate(
            self, tokens, max_new_tokens, key_lengths=key_lengths, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, stop=stop, seed=seed, stream=stream,
            use_cache=use_cache, cache_dtype=cache_dtype,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Initialise all parameters as said above, drawing from torch's generator."""
        residual_std = GPT2_STD / (2 * self.config.num_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes_to_stream = name.endswith((".out_proj", ".down"))
                nn.init.normal_(module.weight, std=residual_std if writes_to_stream else GPT2_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
        nn.init.normal_(self.token_embedding.weight, std=self.config.embedding_std)
        if self.position_embedding is not None:
            zero = self.config.positions == "zero"
            nn.init.normal_(self.position_embedding.weight, std=0.0 if zero else GPT2_STD)

    @classmethod
    def from_gpt2(
        cls,
        source: nn.Module | Mapping[str, torch.Tensor],
        *,
        num_heads: int | None = None,
        config: Any = None,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> TransformerModel:
        """A model with the weights of a GPT-2 checkpoint laid out as Hugging Face's, copied.

        Args:
            source: a `transformers` GPT2LMHeadModel or GPT2Model, or a state dict of one.
            num_heads: if neither `config` nor the source says it.
            config: the checkpoint's configuration, an object or a mapping such as a parsed config.json;
                None for the source's own. Without any, GPT-2's activation and epsilon are taken.
            backend: as for `TransformerConfig`.
            device, dtype: None for those of the checkpoint's token embedding.

        The model is tied unless the checkpoint has an unembedding that differs from its embedding. It has
        no dropout, whatever the checkpoint was trained with.

        Raises:
            ValueError: keys missing, unexpected or of another shape, each named; a configuration that
                this model cannot follow.
        """
        state = gpt2_state(source)
        theirs = getattr(source, "config", None) if config is None else config
        embedding = state["wte.weight"]
        # The meta device skips the random initialisation: the checkpoint fills every parameter.
        model = cls(gpt2_config(state, theirs, num_heads, backend), device="meta", dtype=dtype or embedding.dtype)
        model = model.to_empty(device=embedding.device if device is None else device)
        copy_gpt2(model, model.config, state)
        return model


def _check_part(name: str, part: Any, *, or_none: bool) -> None:
    """Raise unless `part` is a module with an integer `embed_dim`, or may be and is None."""
    if part is None and or_none:
        return
    if not isinstance(part, nn.Module) or not isinstance(getattr(part, "embed_dim", None), int):
        kind = "a torch.nn.Module with an embed_dim" + (" or None" if or_none else "")
        raise TypeError(f"{name} must be {kind}, got {type(part).__name__}")


def make_block(config: TransformerConfig, **factory: Any) -> TransformerBlock:
    """One block of the model that `config` describes; `factory` is its device and dtype."""
    attention = SelfAttention(
        config.embed_dim,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        bias=config.bias,
        causal=config.causal,
        window=config.window,
        rotary=config.rotary(),
        qk_norm=config.qk_norm,
        backend=config.backend,
        **factory,
    )
    return TransformerBlock(
        attention,
        make_mlp(config, **factory),
        norm=config.norm,
        norm_eps=config.norm_eps,
        bias=config.bias,
        dropout=config.dropout,
        **factory,
    )


def make_mlp(config: TransformerConfig, **factory: Any) -> MLP | GatedMLP | None:
    """One MLP of the model that `config` describes, None if it has none."""
    if config.attention_only:
        return None
    kind, activation = (GatedMLP, "silu") if config.mlp == "gated" else (MLP, "gelu_tanh")
    return kind(
        config.embed_dim,
        config.hidden_dim,
        activation=config.activation or activation,
        bias=config.bias,
        backend=config.backend,
        **factory,
    )


def make_norm(kind: str, width: int, eps: float, *, bias: bool = True, **factory: Any) -> nn.Module:
    """torch's LayerNorm ("layer") or RMSNorm ("rms", never a bias) over the last dimension."""
    if kind == "rms":
        return nn.RMSNorm(width, eps=eps, **factory)
    return nn.LayerNorm(width, eps=eps, bias=bias, **factory)
