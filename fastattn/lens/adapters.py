"""A model's parts, which `adapt(model)` reads by the row of its family (fastattn.lens.family_table)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.ground.arguments import integer
from fastattn.lens.family_table import TORCH, Family, families, family_of, name_of

# The parts of a block at which something is read or replaced.
_PLACES = ("attention", "attention_out", "out", "mlp", "mlp_out", "down", "mlp_norm", "between")


def adapt(model: nn.Module) -> Adapter:
    """The parts of a model, by the row of its family.

    Raises:
        TypeError: model is no module, or was compiled (its parts would be read, and never run).
        ValueError: no row describes it, or a part that its row names is missing; both are said.

    Example:
        >>> sizes = {"vocab_size": 9, "embed_dim": 8, "num_heads": 2, "num_layers": 3, "max_length": 4}
        >>> model = fastattn.nn.TransformerModel(**sizes)
        >>> adapt(model).num_layers
        3
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
        raise TypeError(
            "model must not be compiled: compiled code does not run the hooks that look inside. "
            "Give the model as it was before torch.compile"
        )
    if (family := family_of(model)) is not None:
        return Adapter(model, family if family is not TORCH else _of_torch(model, ""))
    # A wrapper, such as that of DDP or PEFT, has a model that is known inside.
    inner = next((name for name, module in model.named_modules() if name and family_of(module) is not None), None)
    if inner is not None and not isinstance(_get(model, inner), nn.TransformerEncoder):
        raise ValueError(
            f"no family describes model, a {name_of(type(model))}, but {name_of(type(_get(model, inner)))} is "
            f"known: give model.{inner}"
        )
    if (path := _only_encoder(model)) is not None:
        return Adapter(model, _of_torch(model, path))
    rows = ", ".join(f"{family.name} ({', '.join(family.models)})" for family in families())
    raise ValueError(
        f"no family describes model, a {name_of(type(model))}. There are: {rows}. To add one, write a "
        f"fastattn.lens.Family with models=({name_of(type(model))!r},) that names the model's parts (blocks, "
        "embeddings, attention, q, out, final_norm, unembedding, ...), and give it to fastattn.lens.register"
    )


def _only_encoder(model: nn.Module) -> str | None:
    """Where in a model a torch.nn.TransformerEncoder is; None if there is none.

    Raises:
        ValueError: there are several stacks of torch's, decoders among them.
    """
    stacks = [
        name for name, m in model.named_modules() if isinstance(m, nn.TransformerEncoder | nn.TransformerDecoder)
    ]
    if len(stacks) > 1:
        raise ValueError(
            f"model has several stacks of layers, {', '.join(stacks)}: give the encoder that is meant"
        )
    found = isinstance(_get(model, stacks[0]), nn.TransformerEncoder) if stacks else False
    return stacks[0] if found else None


def _of_torch(model: nn.Module, path: str) -> Family:
    """The row of torch's encoder at a path: its layers norm before or after, as they were built."""
    layer = _get(model, f"{path}.layers.0" if path else "layers.0")
    post_norm = not getattr(layer, "norm_first", True)
    heads = f"{path}.{TORCH.num_heads}" if path else TORCH.num_heads
    return replace(
        TORCH, base=path, num_heads=heads, post_norm=post_norm, between="norm1" if post_norm else None,
        final_norm=None if _get(model, f"{path}.norm" if path else "norm") is None else "norm",
    )  # fmt: skip


class Projections(NamedTuple):
    """The weights of one attention layer by head; biases are None where there are none.

    q (Hq, d, D), k (Hkv, d, D), v (Hkv, d, Dv), out (Hq, Dv, d): a row vector x (d,) becomes x @ q[h] + q_bias[h].
    q_bias (Hq, D), k_bias (Hkv, D), v_bias (Hkv, Dv), out_bias (d,).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    out_bias: Tensor | None


class Adapter:
    """A model's parts, by the names of its family.

    Modules of layer i: `blocks[i]`, and `part("mlp_norm", i)` for any name of a block's parts in `Family`.

    Attributes:
        model, family: the model and the row.
        base: the model without its head.
        blocks: the list of blocks.
        num_layers, num_heads, num_kv_heads: sizes.
        embeddings, embedding_norm, final_norm, head, unembedding: modules, or None.
        embedding_names: where the embeddings lie, as the row says.
        logit_cap: the soft cap of the logits, or None.
        parallel: whether attention and MLP of a block read the same stream.
        post_norm: whether norms come after the sums (BERT).
        sequence_first: whether streams are (L, B, d) in the model, as torch's without batch_first.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        self.base: nn.Module = _get(model, family.base) or model
        for flag in family.unserved:
            if _get(model, flag):
                raise ValueError(
                    f"family {family.name} does not describe a model with {flag}, got a {type(model).__name__}"
                )
        self.blocks: Sequence[Any] = self._needed("blocks", self.base, family.blocks)
        self.embedding_names = tuple(name for name in family.embeddings if _get(self.base, name) is not None)
        self.embeddings = tuple(_get(self.base, name) for name in self.embedding_names)
        if family.embeddings and not self.embeddings:
            raise ValueError(self._missing("embeddings", family.embeddings[0]))
        self.embedding_norm = _get(self.base, family.embedding_norm)
        self.final_norm = self._needed("final_norm", self.base, family.final_norm)
        self.head = _get(model, family.head)
        self.unembedding = _get(model, family.unembedding)
        self.num_layers = len(self.blocks)
        self.num_heads = integer("num_heads", self._needed("num_heads", model, family.num_heads), least=1)
        self.num_kv_heads = _get(model, family.num_kv_heads) or self.num_heads
        cap = _get(model, family.logit_cap)
        self.logit_cap = None if cap is None else float(cap)
        self.parallel = bool(_get(model, family.parallel))
        self.post_norm = family.post_norm
        # As torch's modules are without batch_first: (L, B, d).
        self.sequence_first = self.num_layers > 0 and not getattr(self.part("attention", 0), "batch_first", True)
        for layer in range(self.num_layers):
            for part in ("attention", "q", "out"):
                self._needed(f"{part} of block {layer}", self.blocks[layer], getattr(family, part))
        self._refuse_shared()

    def __repr__(self) -> str:
        sizes = f"{self.num_layers} layers, {self.num_heads} heads"
        return f"<{type(self).__name__} of a {type(self.model).__name__}: family {self.family.name}, {sizes}>"

    def part(self, name: str, layer: int) -> Any:
        """The module of this name (a field of `Family`) in block `layer`; None if the block has none."""
        found = getattr(self.family, name)
        if name in ("attention_out", "mlp_out") and found is None:
            found = getattr(self.family, name.removesuffix("_out"))
        return _get(self.blocks[self.layer(layer)], found)

    def hook(self, name: str, layer: int) -> Any:
        """The point to hook for "q", "k" or "v" of block `layer`; None where attention functions are tapped."""
        hooks = self.family.hooks
        return None if hooks is None else _get(self.blocks[self.layer(layer)], hooks["qkv".index(name)])

    def norm_after(self, name: str, layer: int) -> Any:
        """The norm of what "attention" or "mlp" of block `layer` adds, before it is added; or None."""
        return _get(self.blocks[self.layer(layer)], self.family.norms_after[("attention", "mlp").index(name)])

    def layer(self, layer: int) -> int:
        """The number of a layer, checked; negative ones count from the last."""
        layer = integer("layer", layer)
        if not -self.num_layers <= layer < self.num_layers:
            raise ValueError(f"layer must be from 0 to {self.num_layers - 1}, got {layer}")
        return layer % self.num_layers

    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """The model's logits (B, L, vocabulary) for its own arguments, from one forward."""
        self._check_head()
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """The model's logits, or the last stream of a model without a head, for its own arguments."""
        result = self.model(*args, **kwargs)
        if isinstance(result, Tensor):
            return result
        return result.logits if hasattr(result, "logits") else result.last_hidden_state

    def unembed(self, stream: Tensor) -> Tensor:
        """Logits (..., vocabulary) of a residual stream (..., d): final norm, head, unembedding, soft cap."""
        self._check_head()
        for module in (self.final_norm, self.head):
            stream = stream if module is None else module(stream)
        if self.unembedding is None:
            logits = F.linear(stream, self.unembedding_weight)
        else:
            logits = self.unembedding(stream)
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)

    @property
    def unembedding_weight(self) -> Tensor:
        """(vocabulary, d): the row of a token, times the normed stream, is its logit before bias and soft cap."""
        self._check_head()
        if self.unembedding is None:
            return _get(self.base, self.family.tied).weight
        return weight_and_bias(self.unembedding)[0]

    @property
    def unembedding_bias(self) -> Tensor | None:
        """(vocabulary,), or None."""
        self._check_head()
        return None if self.unembedding is None else weight_and_bias(self.unembedding)[1]

    def projections(self, layer: int) -> Projections:
        """The weights of a layer's queries, keys, values and outputs by head; views where the layout allows."""
        out, out_bias = weight_and_bias(self.part("out", layer))
        layers = [self.part(name, layer) for name in "qkv"]
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if layers[1] is None:
            rows, biases = self._packed(*weight_and_bias(layers[0]), heads)
        else:
            pairs = [weight_and_bias(module) for module in layers]
            rows = [weight.unflatten(0, (count, -1)) for (weight, _), count in zip(pairs, heads, strict=True)]
            biases = [
                None if bias is None else bias.view(count, -1)
                for (_, bias), count in zip(pairs, heads, strict=True)
            ]
        q, k, v = (weight.mT for weight in rows)
        q_bias, k_bias, v_bias = biases
        out = out.mT.unflatten(0, (self.num_heads, -1))
        return Projections(q, k, v, out, q_bias, k_bias, v_bias, out_bias)

    def _packed(
        self, weight: Tensor, bias: Tensor | None, heads: tuple[int, int, int]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Rows (heads, D, d) and biases (heads, D) of q, k and v from one layer that gives all three."""
        by_head = weight.unflatten(0, (sum(heads), -1))
        bias_by_head = None if bias is None else bias.view(sum(heads), -1)
        if self.family.interleaved:
            rows = [by_head[i::3] for i in range(3)]
            return rows, [None if bias_by_head is None else bias_by_head[i::3] for i in range(3)]
        biases = [None] * 3 if bias_by_head is None else list(bias_by_head.split(list(heads)))
        return list(by_head.split(list(heads))), biases

    def neuron_outputs(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """What each neuron of a layer's MLP writes to the stream, (neurons, d), and the bias (d,) or None.

        Raises:
            ValueError: the block has no MLP.
        """
        down = self.part("down", layer)
        if down is None:
            raise ValueError(f"block {layer} has no MLP")
        weight, bias = weight_and_bias(down)
        return weight.mT, bias

    def _refuse_shared(self) -> None:
        """Raise if two blocks share a module: what passes there could not be told apart."""
        paths = ("", *(getattr(self.family, part) or "" for part in _PLACES))
        for path in dict.fromkeys(paths):
            of_block: dict[int, int] = {}
            for layer, block in enumerate(self.blocks):
                module = _get(block, path) if path else block
                if module is not None and (first := of_block.setdefault(id(module), layer)) != layer:
                    raise ValueError(
                        f"blocks {first} and {layer} share {path or 'all'} of their modules, so that what passes "
                        "in one cannot be told from what passes in the other: such models are not served"
                    )

    def _check_head(self) -> None:
        if self.unembedding is None and (self.family.tied is None or _get(self.base, self.family.tied) is None):
            wanted = self.family.unembedding or "unembedding that its family names"
            raise ValueError(
                f"model has no {wanted}, so it gives no logits: give one of {', '.join(self.family.models)} that "
                f"has one, or register a family that names it; got a {type(self.model).__name__}"
            )

    def _needed(self, part: str, start: nn.Module, name: str | None) -> Any:
        found = _get(start, name)
        if found is None and name is not None:
            raise ValueError(self._missing(part, name))
        return found

    def _missing(self, part: str, name: str) -> str:
        return (
            f"family {self.family.name} says that {part} is at {name}, and this {type(self.model).__name__} has "
            "nothing there: give fastattn.lens.register a Family that names where it is"
        )


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The weight (out, in) and the bias of a linear layer, or of transformers' Conv1D.

    Raises:
        TypeError: the layer is of another class, such as one of LoRA or of a quantisation, whose weight alone does
            not say what it computes.
    """
    if type(layer) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return layer.weight, layer.bias
    if isinstance(layer, nn.MultiheadAttention) and layer._qkv_same_embed_dim:
        return layer.in_proj_weight, layer.in_proj_bias
    if type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils":
        return layer.weight.mT, layer.bias
    raise TypeError(
        f"the weight of a torch.nn.Linear is needed, got a {type(layer).__name__}: merge adapters such as "
        "LoRA, and load the model without quantisation"
    )


def _get(start: Any, name: str | None) -> Any:
    """What lies at a path of attributes; None if something on the way is not there."""
    if not name:
        return None
    for step in name.split("."):
        start = getattr(start, step, None)
    return start
