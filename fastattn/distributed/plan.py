"""A plan for torch's `parallelize_module`: heads and hidden units of a model over the ranks of a mesh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from fastattn.core.heads.functional import prepare_heads
from fastattn.core.intact import alteration
from fastattn.core.mlp.functional import gated_mlp, mlp
from fastattn.ground.checks import Window
from fastattn.masks import Lowered, Mask
from fastattn.nn.attention import SelfAttention
from fastattn.nn.checks import check_stream
from fastattn.nn.mlp import MLP, GatedMLP
from fastattn.nn.rotary import Rotary

# Linear layers of Hugging Face's decoders, by name: those that make heads or hidden units, those that read them.
INTO = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
OUT_OF = ("o_proj", "down_proj")


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """A plan for `torch.distributed.tensor.parallel.parallelize_module(model, mesh, plan)`.

        >>> parallelize_module(model, mesh["tensor"], tensor_parallel_plan(model))          # doctest: +SKIP

    Each rank computes some heads of every attention and some hidden units of every MLP, and one sum over the ranks
    follows each of them. All else is replicated. Do this before FSDP2's `fully_shard`, on another dimension of the
    mesh.

    - `fastattn.nn`: `SelfAttention`, whose qkv_proj becomes q_proj, k_proj and v_proj (so that the state dict of a
      model does not depend on the number of ranks), `MLP` and `GatedMLP`, which stay fused.
    - Hugging Face models with layers named q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj, such
      as Llama's and Qwen's; patched ones call those layers one by one.

    The number of key heads must be a multiple of the ranks. In `fastattn.nn` it may also divide the ranks: then
    keys and values are replicated.

    Raises:
        ValueError: the model has none of these layers, or is computed in another way (GPT-2's packed projections).
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        kind, last = type(module), name.rpartition(".")[2]
        if kind is SelfAttention:
            plan[name] = HeadsParallel()
        elif kind in (MLP, GatedMLP):
            plan[name] = HiddenParallel()
        elif isinstance(module, nn.Linear) and last in INTO:
            plan[name] = ColwiseParallel()
        elif isinstance(module, nn.Linear) and last in OUT_OF:
            plan[name] = RowwiseParallel()
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has no layers that tensor_parallel_plan knows: fastattn.nn's SelfAttention, "
            f"MLP and GatedMLP, or Linear layers named {', '.join((*INTO, *OUT_OF))}"
        )
    return plan


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
    for name, parameter in list(layer.named_parameters(recurse=False)):
        whole = name == "bias" and placement == Shard(1)
        spread = distribute_tensor(parameter.detach(), mesh, [Replicate() if whole else placement])
        layer.register_parameter(name, nn.Parameter(spread, parameter.requires_grad))


def _entered(x: Tensor, module: nn.Module) -> DTensor:
    """A plain x, the same on all ranks, as a DTensor."""
    mesh = next(p.device_mesh for p in module.parameters() if isinstance(p, DTensor))
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def _left(y: Tensor) -> Tensor:
    """A result as a plain tensor, the same on all ranks."""
    assert isinstance(y, DTensor)
    return y.redistribute(placements=[Replicate()]).to_local()
