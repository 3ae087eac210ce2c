"""A plan for torch's `parallelize_module`: heads and hidden units of a model over the ranks of a mesh."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from fastattn.core.heads.functional import prepare_heads
from fastattn.core.intact import alteration
from fastattn.core.loss.functional import linear_cross_entropy
from fastattn.core.mlp.functional import gated_mlp, mlp
from fastattn.ground import arguments
from fastattn.ground.checks import Window
from fastattn.masks import Lowered, Mask
from fastattn.nn.attention import SelfAttention
from fastattn.nn.checks import check_stream, check_tokens
from fastattn.nn.mlp import MLP, GatedMLP
from fastattn.nn.rotary import Rotary
from fastattn.nn.transformer_model import TransformerModel

# Linear layers of Hugging Face's decoders, by name: those that make heads or hidden units, those that read them.
INTO = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
OUT_OF = ("o_proj", "down_proj")
# Layers that make queries, keys and values, or gate and up, in one product. A plain cut would mix them.
PACKED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv", "in_proj", "gate_up_proj")


def tensor_parallel_plan(model: nn.Module, *, vocabulary: bool = False) -> dict[str, ParallelStyle]:
    """A plan for `torch.distributed.tensor.parallel.parallelize_module(model, mesh, plan)`.

        >>> parallelize_module(model, mesh["tensor"], tensor_parallel_plan(model))          # doctest: +SKIP

    Each rank computes some heads of every attention and some hidden units of every MLP, and one sum over the ranks
    follows each of them. All else is replicated. Do this before FSDP2's `fully_shard`, on another dimension of the
    mesh.

    - `fastattn.nn`: `SelfAttention`, whose qkv_proj becomes q_proj, k_proj and v_proj (so that the state dict of a
      model does not depend on the number of ranks), `MLP` and `GatedMLP`, which stay fused.
    - Hugging Face models with layers named q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj, such
      as Llama's and Qwen's; patched ones call those layers one by one.
    - Hugging Face's GPT-2, whose packed weights (d, 3 d) become (d, 3, d), so that each rank has the columns of
      its heads and the state dict does not depend on the number of ranks.

    The number of key heads must be a multiple of the ranks. In `fastattn.nn` it may also divide the ranks: then
    keys and values are replicated.

    Args:
        vocabulary: each rank also has some rows of the token embedding and of the unembedding, which stay tied if
            they were. `fastattn.nn.TransformerModel` then computes its loss from them without gathering anything;
            logits, if asked for, are gathered.

    Raises:
        ValueError: the model has none of these layers, or others that pack several weights in one.
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        kind, last = type(module), name.rpartition(".")[2]
        if any(name.startswith(f"{known}.") and isinstance(style, _WHOLE) for known, style in plan.items()):
            continue  # a part of what a style handles as a whole
        if kind is SelfAttention:
            plan[name] = HeadsParallel()
        elif kind in (MLP, GatedMLP):
            plan[name] = HiddenParallel()
        elif kind.__name__ in ("GPT2Attention", "GPT2MLP"):
            plan[name] = GPT2Parallel()
        elif last in PACKED:
            raise ValueError(
                f"{name} packs several weights in one, which tensor_parallel_plan knows for fastattn.nn and for "
                "Hugging Face's GPT-2 only"
            )
        elif isinstance(module, nn.Linear) and last in INTO:
            plan[name] = ColwiseOfHeads(_head_dim(model, name))
        elif isinstance(module, nn.Linear) and last in OUT_OF:
            plan[name] = RowwiseParallel()
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has no layers that tensor_parallel_plan knows: fastattn.nn's SelfAttention, "
            f"MLP and GatedMLP, GPT-2's, or Linear layers named {', '.join((*INTO, *OUT_OF))}"
        )
    return {**plan, "": VocabularyParallel()} if arguments.flag("vocabulary", vocabulary) else plan


def _head_dim(model: nn.Module, name: str) -> int:
    """The width of the heads that a layer makes; 1 if it makes hidden units."""
    parent, _, last = name.rpartition(".")
    return (
        int(getattr(model.get_submodule(parent), "head_dim", 1)) if last in ("q_proj", "k_proj", "v_proj") else 1
    )


class ColwiseOfHeads(ColwiseParallel):
    """torch's ColwiseParallel of a Linear layer, by whole heads."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        rows = module.out_features
        if rows % (self.head_dim * device_mesh.size()):  # type: ignore[operator]
            raise ValueError(
                f"the {rows} rows of {module} must be a multiple of {device_mesh.size()} ranks x {self.head_dim}, "
                "so that no head is cut"
            )
        return super()._apply(module, device_mesh)


class HeadsParallel(ParallelStyle):
    """A `fastattn.nn.SelfAttention` of which each rank computes some heads. Plain tensors go in and come out."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not SelfAttention:
            raise TypeError(f"module must be a fastattn.nn.SelfAttention, got {type(module).__name__}")
        ranks = device_mesh.size()
        heads, key_heads = module.num_heads, module.num_kv_heads
        if heads % ranks or (key_heads % ranks and ranks % key_heads):
            raise ValueError(
                f"num_heads must be a multiple of the {ranks} ranks, and num_kv_heads a multiple or a divisor; "
                f"got {heads} and {key_heads}"
            )
        changed = [
            f"{name} {reason}"
            for name, part, kind in (
                ("rotary", module.rotary, Rotary), ("q_norm", module.q_norm, nn.RMSNorm),
                ("k_norm", module.k_norm, nn.RMSNorm), ("qkv_proj", module.qkv_proj, nn.Linear),
            )
            if part is not None and (reason := alteration(part, kind))
        ]  # fmt: skip
        if changed:
            raise ValueError(f"module must be as it was built; its {', '.join(changed)}")
        names = ("q_proj", "k_proj", "v_proj")
        rows = [count * module.head_dim for count in (heads, key_heads, key_heads)]
        for name, layer in zip(names, _cut(module.qkv_proj, rows), strict=True):
            shared = name == "q_proj" or key_heads % ranks == 0
            _distribute(layer, device_mesh, Shard(0) if shared else Replicate())
            module.register_module(name, layer)
        del module.qkv_proj
        _distribute(module.out_proj, device_mesh, Shard(1))
        for norm in (module.q_norm, module.k_norm):
            if norm is not None:
                _distribute(norm, device_mesh, Replicate())
        module.__class__ = _SelfAttentionOfHeads
        return module


class _SelfAttentionOfHeads(SelfAttention):
    """SelfAttention on DTensors, with a projection each for queries, keys and values."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        check_stream("x", x, self.embed_dim)
        q, k, v = (self.heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (self._prepared_alone(t, norm) for t, norm in ((q, self.q_norm), (k, self.k_norm)))
        return self.hook_q(q), self.hook_k(k), self.hook_v(v)

    def _prepared_alone(self, t: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """Normalise and rotate queries, or keys."""
        options: dict[str, Any] = {}
        if norm is not None:
            options |= {"norm_weight": norm.weight, "eps": norm.eps}
        if self.rotary is not None:
            options["cos"], options["sin"] = self.rotary.tables(t)
        return prepare_heads(t, **options, backend=self.backend) if options else t

    @torch.compiler.disable  # Its views of DTensors are no outputs of a graph.
    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | Lowered | None = None,
        window: Window = None,
        key_lengths: Any = None,
        cache: Any = None,
    ) -> Tensor:
        if cache is not None:
            raise ValueError("cache must be None: generation is not computed over several ranks")
        spread_x = _entered(x, self)
        return _left(self.attend(*self.project(spread_x), mask=mask, window=window, key_lengths=key_lengths))


class HiddenParallel(ParallelStyle):
    """A `fastattn.nn.MLP` or `GatedMLP` of which each rank computes some hidden units, fused. Plain tensors go in
    and come out."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MLP | GatedMLP) or type(module) not in (MLP, GatedMLP):
            raise TypeError(f"module must be a fastattn.nn.MLP or GatedMLP, got {type(module).__name__}")
        if module.hidden_dim % device_mesh.size():
            raise ValueError(
                f"hidden_dim must be a multiple of the {device_mesh.size()} ranks, got {module.hidden_dim}"
            )
        _distribute(module.up, device_mesh, Shard(0))
        if isinstance(module, GatedMLP):
            _distribute(module.gate, device_mesh, Shard(0))
        _distribute(module.down, device_mesh, Shard(1))
        module.__class__ = _GatedMLPOfUnits if isinstance(module, GatedMLP) else _MLPOfUnits
        return module


class _MLPOfUnits(MLP):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        up, down, x = self.up, self.down, _entered(x, self)
        y = mlp(
            x, up.weight, up.bias, down.weight, down.bias, activation=self.activation, save=self.save,
            chunk=self.chunk, backend=self.backend,
        )  # fmt: skip
        return _left(y)


class _GatedMLPOfUnits(GatedMLP):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        gate, up, down, x = self.gate, self.up, self.down, _entered(x, self)
        y = gated_mlp(
            x, gate.weight, up.weight, down.weight, activation=self.activation, b_gate=gate.bias, b_up=up.bias,
            b_down=down.bias, save=self.save, chunk=self.chunk, backend=self.backend,
        )  # fmt: skip
        return _left(y)


class GPT2Parallel(ParallelStyle):
    """Hugging Face's GPT2Attention, of which each rank computes some heads, or GPT2MLP, of which it computes some
    hidden units. Plain tensors go in and come out."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        part: Any = module
        ranks, heads = device_mesh.size(), hasattr(module, "c_attn")
        into, units = (part.c_attn, part.num_heads) if heads else (part.c_fc, part.c_fc.nf)
        if heads and hasattr(module, "q_attn"):
            raise ValueError("module must be without cross-attention, which tensor_parallel_plan does not know")
        if units % ranks:
            word = "heads" if heads else "hidden units"
            raise ValueError(
                f"the {units} {word} of {type(module).__name__} must be a multiple of the {ranks} ranks"
            )
        for layer in (into, part.c_proj):
            if type(layer).__name__ != "Conv1D" or (layer._forward_hooks or layer._forward_pre_hooks):
                raise ValueError(f"module must be as it was built; it has {layer}")
        packed = 3 if heads else 1
        into.weight = nn.Parameter(into.weight.detach().unflatten(1, (packed, -1)), into.weight.requires_grad)
        into.bias = nn.Parameter(into.bias.detach().unflatten(0, (packed, -1)), into.bias.requires_grad)
        _distribute_each(into, device_mesh, weight=Shard(2), bias=Shard(1))
        _distribute_each(part.c_proj, device_mesh, weight=Shard(0), bias=Replicate())
        kind: Any = type(into)
        into.__class__, part.c_proj.__class__ = _columns_of(kind), _rows_of(kind)
        if heads:
            part.split_size //= ranks
            part.num_heads //= ranks
        return module


@cache
def _columns_of(kind: Any) -> Any:
    """Hugging Face's Conv1D with columns of its own on each rank."""

    class ConvOfColumns(kind):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            weight, bias = (t.to_local().flatten(-2) for t in (self.weight, self.bias))
            return _entered(x, self).to_local(grad_placements=[Partial()]) @ weight + bias

    return ConvOfColumns


@cache
def _rows_of(kind: Any) -> Any:
    """Hugging Face's Conv1D with rows of its own on each rank."""

    class ConvOfRows(kind):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            mesh = self.weight.device_mesh
            y = DTensor.from_local(x @ self.weight.to_local(), mesh, [Partial()], run_check=False)
            return _left(y) + _left(self.bias)

    return ConvOfRows


class VocabularyParallel(ParallelStyle):
    """A model of which each rank has some rows of the token embedding and of the unembedding."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, TransformerModel):
            if type(module) is not TransformerModel:
                raise TypeError(f"module must be a fastattn.nn.TransformerModel, got {type(module).__name__}")
            for layer in (module.token_embedding, module.unembedding):
                if layer is not None:
                    _distribute(layer, device_mesh, Shard(0))
            module.__class__ = _TransformerOfVocabulary
            return module
        model: Any = module
        if not hasattr(model, "get_input_embeddings"):
            raise TypeError(
                "vocabulary needs a fastattn.nn.TransformerModel or a Hugging Face model, got "
                f"{type(module).__name__}"
            )
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head is not None and head.weight is embedding.weight
        parallelize_module(embedding, device_mesh, RowwiseParallel(input_layouts=Replicate()))
        if head is not None:
            parallelize_module(head, device_mesh, ColwiseParallel(output_layouts=Replicate()))
        if tied:
            head.weight = embedding.weight
        return module


class _TransformerOfVocabulary(TransformerModel):
    @torch.compiler.disable
    def embed(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        check_tokens(tokens, self.config.max_length)
        weight = self.token_embedding.weight
        x = _left(F.embedding(_entered(tokens, self.token_embedding), weight))
        return self._with_positions(x, positions)

    @torch.compiler.disable
    def unembed(self, x: Tensor) -> Tensor:
        return _left(F.linear(_entered(self.final_norm(x), self.token_embedding), self.unembedding_weight))

    @torch.compiler.disable
    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        x = _entered(self.final_norm(x), self.token_embedding)
        shift, weight = self.config.causal, self.unembedding_weight
        return _left(linear_cross_entropy(x, weight, labels, shift=shift, backend=self.config.backend))


def _cut(layer: nn.Linear, rows: list[int]) -> list[nn.Linear]:
    """One layer for each of these numbers of rows of its weight."""
    biases = [None] * len(rows) if layer.bias is None else layer.bias.detach().split(rows)
    cut = []
    for weight, bias in zip(layer.weight.detach().split(rows), biases, strict=True):
        part = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        part.weight = nn.Parameter(weight.clone(), layer.weight.requires_grad)
        if bias is not None:
            part.bias = nn.Parameter(bias.clone(), layer.bias.requires_grad)
        cut.append(part)
    return cut


def _distribute(layer: nn.Module, mesh: DeviceMesh, placement: Any) -> None:
    """Make DTensors of a layer's parameters. A bias of rows is sharded with them."""
    _distribute_each(layer, mesh, weight=placement, bias=Replicate() if placement == Shard(1) else placement)


def _distribute_each(layer: nn.Module, mesh: DeviceMesh, **placements: Any) -> None:
    """Make DTensors of a layer's parameters. placements: by name."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        spread = distribute_tensor(parameter.detach(), mesh, [placements[name]])
        layer.register_parameter(name, nn.Parameter(spread, parameter.requires_grad))


# Styles that handle a module with all that is in it.
_WHOLE = (HeadsParallel, HiddenParallel, GPT2Parallel)


def _entered(x: Tensor, module: nn.Module) -> DTensor:
    """A plain x, the same on all ranks, as a DTensor."""
    mesh = next(p.device_mesh for p in module.parameters() if isinstance(p, DTensor))
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def _left(y: Tensor) -> Tensor:
    """A result as a plain tensor, the same on all ranks."""
    assert isinstance(y, DTensor)
    return y.redistribute(placements=[Replicate()]).to_local()
