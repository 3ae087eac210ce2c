"""fastattn's functions on DTensors: results and gradients of one process, or a refusal."""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import groups
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from cases_ranks import every_rank
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint as recomputed

import fastattn
from fastattn import distributed, masks

R, BATCH, HEADS, LENGTH = Replicate(), Shard(0), Shard(1), Shard(2)
B, H, N, D = 4, 8, 40, 8


@cache
def two_by_two(mesh: DeviceMesh) -> DeviceMesh:
    return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def same(
    mesh: DeviceMesh,
    function: Callable[..., Any],
    tensors: dict[str, tuple[int, ...]],
    placements: dict[str, list[Any]],
    options: dict[str, Any],
    result: list[Any],
    plain: tuple[str, ...] = (),
) -> None:
    """The function of DTensors with these placements is that of whole tensors, with its gradients. plain: tensors
    that are given whole, without a gradient."""
    mesh = two_by_two(mesh) if len(result) == 2 else mesh
    whole = {name: torch.randn(shape, dtype=torch.float64) for name, shape in tensors.items()}
    leaves = {name: t.clone().requires_grad_(name not in plain) for name, t in whole.items()}
    expected = _tuple(function(**leaves, **options))
    upstream = [torch.randn_like(t) for t in expected]
    learned = [name for name in leaves if name not in plain]
    wanted = torch.autograd.grad(expected, [leaves[name] for name in learned], upstream)
    spread: dict[str, Tensor] = {
        name: t
        if name in plain
        else distribute_tensor(t, mesh, placements.get(name, [R] * mesh.ndim)).requires_grad_()
        for name, t in whole.items()
    }
    actual = _tuple(function(**spread, **options))
    assert all(isinstance(t, DTensor) and list(t.placements) == result for t in actual), actual[0].placements
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.full_tensor(), e.detach(), rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(
        actual, [spread[name] for name in learned], [distribute_tensor(t, mesh, [R] * mesh.ndim) for t in upstream]
    )
    for name, a, e in zip(learned, gradients, wanted, strict=True):
        torch.testing.assert_close(
            a.full_tensor(), e, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def same_tangents(mesh: DeviceMesh, case: partial, by_jvp: bool, may_refuse: bool) -> None:
    """The function has the tangents of one process, or refuses them. case: of `same`."""
    function, options, shapes = (case.keywords[name] for name in ("function", "options", "tensors"))
    placements, mesh = case.keywords["placements"], two_by_two(mesh) if len(case.keywords["result"]) == 2 else mesh
    pairs = {name: torch.randn(2, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    plain = case.keywords.get("plain", ())

    def tangents(spread: bool) -> tuple[Tensor, ...]:
        def put(name: str, t: Tensor) -> Tensor:
            placed = placements.get(name, [R] * mesh.ndim)
            return distribute_tensor(t.clone(), mesh, placed) if spread and name not in plain else t.clone()

        primals, moves = ({name: put(name, pair[i]) for name, pair in pairs.items()} for i in (0, 1))
        if by_jvp:
            names = list(primals)
            called: Any = lambda *given: function(**dict(zip(names, given, strict=True)), **options)  # noqa: E731
            return _tuple(torch.func.jvp(called, tuple(primals.values()), tuple(moves.values()))[1])
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(t, moves[name]) for name, t in primals.items()}
            results = _tuple(function(**duals, **options))
            return tuple(forward_ad.unpack_dual(t).tangent for t in results)

    words = (
        "forward mode of DTensors are not computed within|got mixed torch.Tensor and DTensor|must not be given|"
    )
    words += "cannot be shared out|must have R or be replicated"
    try:
        found = tangents(True)
    except (RuntimeError, ValueError) as refusal:
        if may_refuse and re.search(words, str(refusal)):
            return
        raise
    for a, e in zip(found, tangents(False), strict=True):
        torch.testing.assert_close(a.full_tensor(), e, rtol=1e-9, atol=1e-10)


def tangents_and_gradients(mesh: DeviceMesh) -> None:
    """A tangent has the gradient of one process. A gradient's tangent, which torch would lose, is refused."""
    inputs = [torch.randn(B, H, D, D, dtype=torch.float64) for _ in range(2)]
    found = []
    for placed in (None, (BATCH, HEADS)):
        # A tangent that is sharded in another way is moved.
        x, move = (t if placed is None else distribute_tensor(t, mesh, [placed[i]]) for i, t in enumerate(inputs))
        x.requires_grad_()
        before = fastattn.attention(x, x, x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, move)
            tangent = forward_ad.unpack_dual(fastattn.attention(dual, dual, dual, causal=True)).tangent
            if placed is not None:
                with pytest.raises(ValueError, match="gradient must have no tangent"):
                    torch.autograd.grad(fastattn.attention(dual, dual, dual).sum(), x)
                with pytest.raises(ValueError, match="gradient must have no tangent"):
                    torch.autograd.grad(before, x, forward_ad.make_dual(before.detach(), before.detach()))
        (gradient,) = torch.autograd.grad(tangent.square().sum(), x)
        found.append([t if placed is None else t.full_tensor() for t in (tangent.detach(), gradient)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def heads(key_heads: int = H, queries: int = N) -> dict[str, tuple[int, ...]]:
    return {"q": (B, H, queries, D), "k": (B, key_heads, N, D), "v": (B, key_heads, N, D)}


def all_as(*placements: Any) -> dict[str, list[Any]]:
    return {name: list(placements) for name in "qkv"}


def q_alone(*placements: Any) -> dict[str, list[Any]]:
    return {"q": list(placements)}


def _by_batch_and_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q * 7 + k * 13 + h * 5 + b) % 11 < 4


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)


CAUSAL = {"causal": True, "return_lse": True}
ANY = {"mask": masks.from_function(_by_batch_and_head), "return_lse": True}
DOCUMENTS = {
    "mask": masks.documents(torch.arange(B)[:, None] * torch.ones(1, N, dtype=torch.int64) + torch.arange(N) // 9)
}
SLOPES = torch.linspace(0.1, 0.5, H, dtype=torch.float64)
BESIDE = {"bias": (B, H, 1, N), "relative_bias": (H, 9), "sinks": (H,), "scale": (B, H)}
attention = partial(same, function=fastattn.attention)
ATTENTION: dict[str, groups.Case] = {
    "replicated": partial(attention, tensors=heads(), placements={}, options=CAUSAL, result=[R]),
    "by batch": partial(attention, tensors=heads(), placements=all_as(BATCH), options=CAUSAL, result=[BATCH]),
    "by heads": partial(attention, tensors=heads(4), placements=all_as(HEADS), options=CAUSAL, result=[HEADS]),
    "by heads, keys replicated": partial(
        attention, tensors=heads(2), placements=q_alone(HEADS), options=CAUSAL, result=[HEADS]
    ),
    "by heads, one key head": partial(
        attention, tensors=heads(1), placements=q_alone(HEADS), options=CAUSAL, result=[HEADS]
    ),
    "by queries": partial(
        attention, tensors=heads(queries=30), placements=q_alone(LENGTH), options=CAUSAL, result=[LENGTH]
    ),
    "by queries, all keys": partial(
        attention, tensors=heads(4), placements=q_alone(LENGTH), options={}, result=[LENGTH]
    ),
    "by batch and heads": partial(
        attention, tensors=heads(4), placements=all_as(BATCH, HEADS), options=CAUSAL, result=[BATCH, HEADS]
    ),
    "by heads twice": partial(
        attention, tensors=heads(), placements=all_as(HEADS, HEADS), options=CAUSAL, result=[HEADS, HEADS]
    ),
    "any mask by batch and heads": partial(
        attention, tensors=heads(), placements=all_as(BATCH, HEADS), options=ANY, result=[BATCH, HEADS]
    ),
    "documents by batch": partial(
        attention, tensors=heads(), placements=all_as(BATCH), options=DOCUMENTS, result=[BATCH]
    ),
    "all beside it": partial(
        attention,
        tensors={**heads(4), **BESIDE},
        placements=all_as(BATCH, HEADS),
        options={**CAUSAL, "softcap": 3.0, "alibi_slopes": SLOPES, "key_lengths": [3, 17, 0, N]},
        result=[BATCH, HEADS],
    ),
    "sharded beside it": partial(
        attention,
        tensors={**heads(), **BESIDE},
        options=CAUSAL,
        result=[BATCH, HEADS],
        placements=all_as(BATCH, HEADS)
        | {"bias": [BATCH, HEADS], "relative_bias": [R, BATCH], "sinks": [R, BATCH], "scale": [BATCH, HEADS]},
    ),
    "a bias of queries": partial(
        attention,
        tensors={**heads(), "bias": (N, N)},
        placements=q_alone(LENGTH) | {"bias": [BATCH]},
        options=CAUSAL,
        result=[LENGTH],
    ),
    "plain beside it": partial(
        attention,
        tensors={**heads(), "sinks": (H,)},
        placements=all_as(HEADS),
        options=CAUSAL,
        result=[HEADS],
        plain=("sinks",),
    ),
    **{
        f"dropout by {name}": partial(
            attention,
            tensors=heads(key_heads),
            placements=placements,
            result=result,
            options={"dropout_p": 0.4, "dropout_state": torch.tensor([[7, b] for b in range(B)]), **more},
        )
        for name, key_heads, placements, result, more in (
            ("batch", 4, all_as(BATCH), [BATCH], {}),
            ("heads", 4, all_as(HEADS), [HEADS], CAUSAL),
            ("heads of one key head", 1, q_alone(HEADS), [HEADS], {}),
            ("queries", 4, q_alone(LENGTH), [LENGTH], CAUSAL),
            ("batch and heads", 4, all_as(BATCH, HEADS), [BATCH, HEADS], {}),
        )
    },
    "SDPA by heads": partial(
        same,
        function=sdpa,
        tensors=heads(),
        placements=all_as(HEADS),
        options={},
        result=[HEADS],
    ),
}

HIDDEN = {"w1": [BATCH], "b1": [BATCH], "w2": [HEADS], "b2": [R]}
MLP = {"x": (B, 6, 8), "w1": (12, 8), "b1": (12,), "w2": (10, 12), "b2": (10,)}
GATED = {"x": (B, 6, 8), "w_gate": (12, 8), "b_gate": (12,), "w_up": (12, 8), "w_down": (8, 12), "b_down": (8,)}
GATED_HIDDEN = {"w_gate": [BATCH], "b_gate": [BATCH], "w_up": [BATCH], "w_down": [HEADS]}
ANGLES = torch.outer(
    torch.arange(50, dtype=torch.float64), torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)
)
ROTARY = {"cos": ANGLES.cos(), "sin": ANGLES.sin()}
NORM = {"x": (B, 6, 8), "weight": (8,)}
OTHERS: dict[str, groups.Case] = {
    **{
        f"mlp, {name}": partial(
            same, function=fastattn.mlp, tensors=MLP, placements=placements, options={}, result=result
        )
        for name, placements, result in (
            ("rows", {"x": [HEADS]}, [HEADS]),
            ("column then row", HIDDEN, [Partial()]),
            ("rows x hidden", {"x": [BATCH, R]} | {n: [R, *p] for n, p in HIDDEN.items()}, [BATCH, Partial()]),
        )
    },
    "gated_mlp, rows": partial(
        same, function=fastattn.gated_mlp, tensors=GATED, placements={"x": [BATCH]}, options={}, result=[BATCH]
    ),
    "gated_mlp, rows, keeping nothing": partial(
        same,
        function=fastattn.gated_mlp,
        tensors=GATED,
        placements={"x": [BATCH]},
        options={"save": "nothing", "chunk": 2, "match_eager": True},
        result=[BATCH],
    ),
    "gated_mlp, column then row": partial(
        same, function=fastattn.gated_mlp, tensors=GATED, placements=GATED_HIDDEN, options={}, result=[Partial()]
    ),
    "rms_norm by length": partial(
        same, function=fastattn.rms_norm, tensors=NORM, placements={"x": [HEADS]}, options={}, result=[HEADS]
    ),
    "layer_norm by batch, residual": partial(
        same,
        function=fastattn.layer_norm,
        tensors={**NORM, "bias": (8,), "residual": (B, 6, 8)},
        placements={"x": [BATCH], "residual": [BATCH]},
        options={},
        result=[BATCH],
    ),
    "prepare_heads by batch and heads": partial(
        same,
        function=fastattn.prepare_heads,
        tensors={"x": (B, H, N, D), "norm_weight": (H, D), "head_scale": (H,)},
        placements={"x": [BATCH, HEADS]},
        options=ROTARY,
        result=[BATCH, HEADS],
    ),
    "prepare_heads by length": partial(
        same,
        function=fastattn.prepare_heads,
        tensors={"x": (B, H, N, D), "norm_weight": (D,)},
        placements={"x": [LENGTH]},
        options={**ROTARY, "offsets": 2},
        result=[LENGTH],
    ),
}


def second_derivative(mesh: DeviceMesh) -> None:
    """The gradient of a norm of gradients."""
    inputs = [torch.randn(B, H, 12, D, dtype=torch.float64) for _ in range(3)]
    found = []
    for placed in (None, HEADS):
        leaves = [t if placed is None else distribute_tensor(t, mesh, [placed]) for t in inputs]
        leaves = [t.detach().requires_grad_() for t in leaves]
        first = torch.autograd.grad(fastattn.attention(*leaves, causal=True).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([t if placed is None else t.full_tensor() for t in second])
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


def refused(mesh: DeviceMesh, call: Callable[..., Any], words: str) -> None:
    def spread(placement: Any, *shape: int) -> DTensor:
        return distribute_tensor(torch.zeros(shape or (B, H, N, D)), mesh, [placement])

    with pytest.raises((TypeError, ValueError), match=words):
        call(spread)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a sequence whose keys are sharded": (
        lambda s: fastattn.attention(*(s(LENGTH) for _ in range(3)), causal=True),
        "must be sharded together.*distributed.attention",
    ),
    "batch and heads mixed": (
        lambda s: fastattn.attention(s(BATCH), s(HEADS), s(HEADS)),
        "must be sharded together",
    ),
    **{
        f"{name} in an MLP": (
            lambda s, option=option: fastattn.mlp(s(R, B, 8), s(R, 8, 8), None, s(R, 8, 8), None, **option(s)),
            f"{name} must not be given for DTensors",
        )
        for name, option in {
            "norm": lambda s: {"norm": "rms"},
            "residual": lambda s: {"residual": s(R, B, 8)},
            "dropout_p": lambda s: {"dropout_p": 0.1},
        }.items()
    },
    "plain keys": (
        lambda s: fastattn.attention(s(R), torch.zeros(B, H, N, D), s(R)),
        "k must be a DTensor on q's mesh",
    ),
    "heads that do not divide": (
        lambda s: fastattn.attention(*(s(HEADS, B, 6, N, D) for _ in range(3))),
        "6 query heads and 6 key heads cannot",
    ),
    "groups that would be cut": (
        lambda s: fastattn.attention(s(HEADS), s(HEADS, B, 2, N, D), s(HEADS, B, 2, N, D)),
        "each key head stays",
    ),
    "a window over queries": (
        lambda s: fastattn.attention(s(LENGTH), s(R), s(R), window=3),
        "window must not be given",
    ),
    "slopes over queries": (
        lambda s: fastattn.attention(s(LENGTH), s(R), s(R), alibi_slopes=torch.ones(H)),
        "alibi_slopes must not be",
    ),
    "a sharded width": (lambda s: fastattn.rms_norm(s(LENGTH, B, 6, 8)), "any dimension but the last"),
    "hidden units of one weight only": (
        lambda s: fastattn.mlp(s(R, B, 8), s(BATCH, 12, 8), None, s(R, 8, 12), None),
        r"w2 must be .*Shard\(dim=1\)|w2 must be S\(1\)",
    ),
    "a plain weight with a gradient": (
        lambda s: fastattn.rms_norm(s(BATCH, B, 8), torch.ones(8, requires_grad=True)),
        "weight must be a DTensor",
    ),
    "a packed weight": (
        lambda s: fastattn.gated_mlp(s(R, B, 8), s(BATCH, 24, 8), None, s(HEADS, 8, 12), packed="gate_up"),
        "packed must be None for DTensors",
    ),
    "rows and hidden units at once": (
        lambda s: fastattn.mlp(s(BATCH, B, 8), s(BATCH, 12, 8), None, s(HEADS, 8, 12), None),
        "x must be replicated over",
    ),
}

# What torch.func.jvp computes of DTensors.
JVP = {
    "replicated", "by batch", "by heads", "by heads, one key head", "by queries, all keys", "by batch and heads",
    "by heads twice", "sharded beside it", "SDPA by heads", "rms_norm by length",
}  # fmt: skip

CASES: dict[groups.Group, dict[str, groups.Case]] = {
    4: {
        **{f"DTensor attention, {name}": case for name, case in ATTENTION.items()},
        **{f"DTensor {name}": case for name, case in OTHERS.items()},
        **{
            f"DTensor, tangents{', jvp' * by_jvp}, {name}": partial(
                same_tangents, case=case, by_jvp=by_jvp, may_refuse=by_jvp and name not in JVP
            )
            for name, case in (ATTENTION | OTHERS).items()
            for by_jvp in (False, True)
        },
        **{
            f"DTensor, {name}: refused": partial(refused, call=call, words=words)
            for name, (call, words) in REFUSED.items()
        },
    },
}


def tokens(length: int = 32) -> tuple[Tensor, Tensor]:
    text = torch.randint(17, (4, length))
    return text, torch.cat((text[:, 1:], torch.full((4, 1), -100)), 1)


def model(**fields: Any) -> nn.Module:
    torch.manual_seed(1)
    sizes = {
        "vocab_size": 17,
        "embed_dim": 32,
        "num_heads": 8,
        "num_layers": 2,
        "max_length": 256,
        "positions": "rotary",
    }
    return fastattn.nn.TransformerModel(**{**sizes, **fields}).double()


def checkpointed(**fields: Any) -> nn.Module:
    """A model that computes its blocks again in the backward."""
    made = model(**fields)
    for block in made.blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)
    return made


def llama() -> nn.Module:
    import transformers

    importlib.import_module("fastattn.integrations.huggingface")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "fastattn"
    return transformers.LlamaForCausalLM(config).double()


def gpt2() -> nn.Module:
    import transformers

    importlib.import_module("fastattn.integrations.huggingface")
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=17, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
    )  # fmt: skip
    config._attn_implementation = "fastattn"
    return transformers.GPT2LMHeadModel(config).double()


def patched(make: Callable[[], nn.Module] = llama) -> nn.Module:
    made = make()
    fastattn.patch(made)
    return made


def loss_of(network: nn.Module, text: Tensor, targets: Tensor, **options: Any) -> Tensor:
    out = network(text, **options)
    logits = out if isinstance(out, Tensor) else out.logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)


def _whole_gradient(p: Tensor) -> Tensor:
    return p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad


def tensor_parallel(
    mesh: DeviceMesh, make: Callable[[], nn.Module], options: dict[str, Any], vocabulary: bool = False
) -> None:
    """Loss, gradients and one step of Adam are those of one process."""
    text, targets = tokens()
    whole, spread = make(), make()
    parallelize_module(spread, mesh, distributed.tensor_parallel_plan(spread, vocabulary=vocabulary))
    if vocabulary:
        embedded = next(p for name, p in spread.named_parameters() if "wte" in name or "token_embedding" in name)
        assert list(embedded.placements) == [BATCH]
    losses = []
    for network in (whole, spread):
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, foreach=False)
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(network, text, targets, **options)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[2:], losses[:2], rtol=1e-9, atol=1e-9)
    names = dict(whole.named_parameters())
    for name, p in spread.named_parameters():
        if name in names:
            gradient = _whole_gradient(p).reshape(names[name].shape)  # GPT-2's packed weights have another one
            torch.testing.assert_close(gradient, names[name].grad, rtol=1e-7, atol=1e-9, msg=name)
    assert ("lm_head.weight" in dict(spread.named_parameters())) == ("lm_head.weight" in names), "tied or not"


def loss_of_the_model(mesh: DeviceMesh, tied: bool) -> None:
    """The loss that a TransformerModel computes from its classes, and no gathered logits."""
    text, _ = tokens()
    whole, spread = model(tied=tied), model(tied=tied)
    parallelize_module(spread, mesh, distributed.tensor_parallel_plan(spread, vocabulary=True))
    losses = [network(text, labels=text) for network in (whole, spread)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    names = dict(whole.named_parameters())
    for name, p in spread.named_parameters():
        if name in names:
            torch.testing.assert_close(_whole_gradient(p), names[name].grad, rtol=1e-7, atol=1e-9, msg=name)


def plans_that_are_refused(mesh: DeviceMesh) -> None:
    layer = nn.Module()
    layer.qkv_proj, layer.o_proj = nn.Linear(8, 24), nn.Linear(8, 8)
    with pytest.raises(ValueError, match="qkv_proj packs several weights in one"):
        distributed.tensor_parallel_plan(layer)
    layer = nn.Module()
    layer.head_dim, layer.k_proj = 8, nn.Linear(8, 24)
    with pytest.raises(ValueError, match=r"the 24 rows of Linear.* must be a multiple of 2 ranks x 8"):
        parallelize_module(layer, mesh, distributed.tensor_parallel_plan(layer))
    with pytest.raises(TypeError, match="vocabulary needs a"):
        block = model().blocks[0]
        parallelize_module(block, mesh, distributed.tensor_parallel_plan(block, vocabulary=True))


def two_dimensions(mesh: DeviceMesh, make: Callable[[], nn.Module]) -> None:
    """FSDP2 over data, heads, hidden units and vocabulary over tensor."""
    square = two_by_two(mesh)
    text, targets = tokens()
    whole, spread = make(), make()
    expected = loss_of(whole, text, targets)
    expected.backward()
    parallelize_module(spread, square["tensor"], distributed.tensor_parallel_plan(spread, vocabulary=True))
    for block in spread.blocks:
        fully_shard(block, mesh=square["data"])
    fully_shard(spread, mesh=square["data"])
    rows = slice(square["data"].get_local_rank(), None, 2)
    loss_of(spread, text[rows], targets[rows]).backward()
    names = dict(whole.named_parameters())
    for name, p in spread.named_parameters():
        if name in names:
            # FSDP takes the mean over data, we take the sum of losses.
            torch.testing.assert_close(_whole_gradient(p) * 2, names[name].grad, rtol=1e-7, atol=1e-9, msg=name)


def three_dimensions(mesh: DeviceMesh) -> None:
    """FSDP2 over data, a sequence over context, heads and hidden units over tensor."""
    size = mesh.size()
    cube = dist.init_device_mesh("cpu", (size // 4, 2, 2), mesh_dim_names=("data", "context", "tensor"))
    length = 256
    text, targets = tokens(length)
    mask = masks.documents(cu_seqlens=[0, 100, length])
    whole, spread = model(), model()
    expected = loss_of(whole, text, targets, mask=mask)
    expected.backward()
    parallelize_module(spread, cube["tensor"], distributed.tensor_parallel_plan(spread))
    for block in spread.blocks:
        fully_shard(block, mesh=cube["data"])
    fully_shard(spread, mesh=cube["data"])
    plan = distributed.layout(length, cube["context"], causal=True, mask=mask)
    rows = slice(cube["data"].get_local_rank(), None, cube["data"].size())
    own = [distributed.shard(t[rows], plan, 1) for t in (text, targets)]
    with distributed.context_parallel(cube["context"], plan):
        loss = loss_of(spread, *own, mask=mask)
        loss.backward()
    loss = loss.detach()
    for name in ("data", "context"):
        dist.all_reduce(loss, group=cube[name].get_group())
    torch.testing.assert_close(loss, expected.detach())
    names = dict(whole.named_parameters())
    for name, p in spread.named_parameters():
        if name in names:
            gradient = _whole_gradient(p).clone()
            dist.all_reduce(gradient, group=cube["context"].get_group())
            # FSDP takes the mean over data, we take the sum of losses.
            torch.testing.assert_close(
                gradient * cube["data"].size(), names[name].grad, rtol=1e-7, atol=1e-9, msg=name
            )


def checkpoints_move_between_meshes(mesh: DeviceMesh) -> None:
    """What four ranks saved, two and two load."""
    text, targets = tokens()
    first, second = model(), model(num_kv_heads=8)
    parallelize_module(first, mesh, distributed.tensor_parallel_plan(first))
    with torch.no_grad():
        for p in first.parameters():
            p.mul_(1.1)
    folder = every_rank(tempfile.mkdtemp() if mesh.get_local_rank() == 0 else None)[0]
    checkpoint.save({"model": first.state_dict()}, checkpoint_id=folder)
    parallelize_module(second, two_by_two(mesh)["tensor"], distributed.tensor_parallel_plan(second))
    state = {"model": second.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    second.load_state_dict(state["model"])
    torch.testing.assert_close(loss_of(second, text, targets), loss_of(first, text, targets))


CASES[4] |= {
    "DTensor, second derivative": second_derivative,
    "DTensor, tangents and gradients": tangents_and_gradients,
    "tensor parallel, TransformerModel": partial(tensor_parallel, make=model, options={}),
    "tensor parallel, grouped heads, norms of heads, a mask by head": partial(
        tensor_parallel,
        make=partial(model, num_kv_heads=2, qk_norm=True, mlp="gated", bias=True),
        options={"mask": masks.from_function(_by_batch_and_head) | masks.window(0, 0)},
    ),
    "tensor parallel, activation checkpointing": partial(tensor_parallel, make=checkpointed, options={}),
    "FSDP and tensor parallel, activation checkpointing": partial(two_dimensions, make=checkpointed),
    "FSDP, context and tensor parallel": three_dimensions,
    "checkpoints move between meshes": checkpoints_move_between_meshes,
}


def compiled_tensor_parallel(mesh: DeviceMesh) -> None:
    network, (text, targets) = model(), tokens()
    parallelize_module(network, mesh, distributed.tensor_parallel_plan(network))
    gradients = []
    for called in (network, torch.compile(network, backend="aot_eager")):
        network.zero_grad()
        loss_of(called, text, targets).backward()
        gradients.append([_whole_gradient(p) for p in network.parameters()])
    torch.testing.assert_close(*gradients)


def forward_mode_that_is_refused(mesh: DeviceMesh) -> None:
    sinks, plan = torch.randn(H), distributed.layout(N, mesh)
    with forward_ad.dual_level():
        x, weight = (distribute_tensor(torch.randn(n, D), mesh) for n in (6, 3))
        with pytest.raises(ValueError, match="input must have no tangent, because linear_cross_entropy of DT"):
            target = distribute_tensor(torch.arange(6) % 3, mesh)
            fastattn.linear_cross_entropy(forward_ad.make_dual(x, x), weight, target)
        own = distributed.shard(torch.randn(B, H, N, D), plan)
        with pytest.raises(ValueError, match=r"v must have no tangent, because fastattn\.distributed\.attention"):
            distributed.attention(own, own, forward_ad.make_dual(own, own), layout=plan)
        with pytest.raises(ValueError, match="tensor must have no tangent"):
            distributed.shard(forward_ad.make_dual(sinks, sinks), distributed.layout(H, mesh), 0)
        with pytest.raises(ValueError, match=r"linear_weight must have no tangent"):
            weight = torch.randn(3, D)
            distributed.linear_cross_entropy(
                torch.randn(5, D), forward_ad.make_dual(weight, weight), torch.arange(5)
            )


CASES[2] = {
    "forward mode is refused": forward_mode_that_is_refused,
    "tensor parallel, Llama": partial(tensor_parallel, make=llama, options={}),
    "tensor parallel, GPT-2 and its vocabulary": partial(tensor_parallel, make=gpt2, options={}, vocabulary=True),
    "tensor parallel, patched GPT-2": partial(tensor_parallel, make=partial(patched, gpt2), options={}),
    **{
        f"tensor parallel, vocabulary, tied: {tied}": partial(loss_of_the_model, tied=tied)
        for tied in (True, False)
    },
    "tensor parallel, logits of a vocabulary": partial(tensor_parallel, make=model, options={}, vocabulary=True),
    "tensor parallel, refused": plans_that_are_refused,
}
CASES["slow"] = {
    "tensor parallel, compiled": compiled_tensor_parallel,
    "tensor parallel, patched Llama": partial(tensor_parallel, make=patched, options={}),
}
CASES[8] = {"FSDP, context and tensor parallel": three_dimensions}
