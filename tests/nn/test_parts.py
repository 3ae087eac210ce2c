"""The parts of a module may be hooked, replaced, adapted, quantised and wrapped: what is there is called."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from eager_models import (
    SMALL,
    VARIANTS,
    assert_equal_to,
    eager_mlp,
    eager_self_attention,
    next_token_loss,
    normal,
    shaken,
    small_model,
    some_tokens,
)
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastattn.nn import (
    MLP,
    CrossAttention,
    GatedMLP,
    SelfAttention,
    TransformerModel,
)

# Looking inside.


def test_attention_is_projection_then_attending():
    module = shaken(SelfAttention(32, 4, num_kv_heads=2, causal=True, rotary=True, dtype=torch.float64))
    x = normal(2, 6, 32)
    q, k, v = module.project(x)
    assert q.shape == (2, 4, 6, 8)
    assert k.shape == v.shape == (2, 2, 6, 8)
    assert torch.equal(module.attend(q, k, v), module(x))


def test_projected_heads_are_views_of_one_tensor():
    q, k, v = SelfAttention(32, 4).project(normal(2, 6, 32, dtype=torch.float32))
    assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1


def test_hooks_read_what_flows_through_the_model():
    model, tokens, seen = small_model(), some_tokens(), {}
    for name, module in model.named_modules():
        if "hook_" in name:
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
    logits = model(tokens)
    attention = model.blocks[1].attention
    q, k, v = attention.project(model.blocks[1].attention_norm(seen["blocks.0.hook_resid_post"]))
    for name, expected in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(seen[f"blocks.1.attention.hook_{name}"], expected)
    mid = seen["blocks.1.hook_resid_mid"]
    written = attention.out_proj(seen["blocks.1.attention.hook_z"].transpose(1, 2).flatten(2))
    assert_equal_to(seen["blocks.1.hook_resid_pre"] + written, mid)
    assert torch.equal(model.unembed(seen["blocks.1.hook_resid_post"]), logits)


HOOKS = [f"attention.hook_{name}" for name in "qkvz"] + [f"hook_resid_{name}" for name in ("pre", "mid", "post")]


@pytest.mark.parametrize("point", HOOKS)
def test_a_hook_replaces_what_flows_by_returning_a_tensor(point):
    model, tokens = small_model(), some_tokens()
    logits = model(tokens)
    hook = model.blocks[1].get_submodule(point).register_forward_hook(lambda _, inputs, output: output * 0)
    assert (model(tokens) - logits).abs().max() > 1e-3
    hook.remove()
    assert torch.equal(model(tokens), logits)


# Parts that are not what they were built as.


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter around it, as PEFT has it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


class Louder(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def louder(owner, name):
    part = getattr(owner, name)
    part.__class__ = Louder


def adapted(owner, name):
    setattr(owner, name, Adapted(getattr(owner, name)))


def replaced(owner, name):
    part = getattr(owner, name)
    forward = part.forward
    part.forward = lambda x: forward(x) * 2


def offloaded(owner, name):
    """The weights lie elsewhere, and a hook brings them for the call."""
    part = getattr(owner, name)
    kept = {n: nn.Parameter(p.detach().clone()) for n, p in part.named_parameters()}
    part.to("meta")

    def bring(part, _):
        for n, p in kept.items():
            part._parameters[n] = p

    part.register_forward_pre_hook(bring)


def quantised(owner, name):
    made = torch.ao.quantization.quantize_dynamic(nn.Sequential(getattr(owner, name)), {nn.Linear}, torch.qint8)
    setattr(owner, name, made[0])


ALTERATIONS = {
    "adapter": adapted,
    "subclass": louder,
    "forward of its own": replaced,
    "forward hook": lambda owner, name: getattr(owner, name).register_forward_hook(lambda m, i, o: o * 2),
    "pre-hook": lambda owner, name: getattr(owner, name).register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "offloading": offloaded,
    "pruning": lambda owner, name: prune.random_unstructured(getattr(owner, name), "weight", 0.5),
    "weight norm": lambda owner, name: parametrizations.weight_norm(getattr(owner, name)),
    "spectral norm": lambda owner, name: parametrizations.spectral_norm(getattr(owner, name).eval()),
    "orthogonal": lambda owner, name: parametrizations.orthogonal(getattr(owner, name)),
    "quantisation": quantised,
}
PARTS = [(MLP, "up"), (MLP, "down"), (GatedMLP, "gate"), (GatedMLP, "up"), (GatedMLP, "down")]
QUANTISERS = pytest.mark.filterwarnings("ignore:.*(quantization|quantized|TypedStorage)")


@QUANTISERS
@pytest.mark.parametrize(
    ("kind", "name", "alteration", "compiled"),
    [(*part, alteration, False) for part in PARTS for alteration in ALTERATIONS]
    + [(MLP, "down", alteration, True) for alteration in ("adapter", "forward hook", "pruning", "weight norm")],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_an_mlp_calls_its_parts_where_one_is_not_what_it_was_built_as(kind, name, alteration, compiled):
    dtype = torch.float32 if alteration == "quantisation" else torch.float64
    module, x = shaken(kind(24, 16, activation="silu", dtype=dtype)), normal(3, 24, dtype=dtype)
    before = module(x)
    ALTERATIONS[alteration](module, name)
    run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    out, expected = run(x), eager_mlp(module, x)
    assert_equal_to(expected, out, 1e-6 if dtype == torch.float32 else 1e-12)
    if alteration not in ("offloading", "weight norm"):
        with torch.no_grad():
            if alteration == "adapter":
                nn.init.normal_(getattr(module, name).b.weight)
        assert (module(x) - before).abs().max() > 1e-4
    trained = [p for p in module.parameters() if p.requires_grad and not p.is_meta]
    for actual, wanted in zip(
        *(
            torch.autograd.grad(y.square().sum(), trained, allow_unused=True)
            for y in (run(x), eager_mlp(module, x))
        ),
        strict=True,
    ):
        if wanted is not None:
            assert_equal_to(wanted, actual, 1e-6 if dtype == torch.float32 else 1e-11)


def test_adapters_on_an_mlp_of_a_model_train():
    model, tokens = TransformerModel(**SMALL), some_tokens()
    for block in model.blocks:
        for name in ("up", "down"):
            adapted(block.mlp, name)
    adapters = {n: p for n, p in model.named_parameters() if n.endswith((".a.weight", ".b.weight"))}
    for p in adapters.values():
        nn.init.normal_(p)
    found = torch.autograd.grad(next_token_loss(model(tokens), tokens), list(adapters.values()))
    assert len(found) == 8 and all(g.abs().max() > 0 for g in found)


def observations(module, call):
    """What every sort of hook is told during a forward and a backward, as (sort, shapes or sums)."""
    told = []

    def note(sort):
        def hook(_, *tensors):
            flat = [t for group in tensors for t in (group if isinstance(group, tuple) else (group,))]
            told.append((sort, [t.detach().clone() for t in flat if isinstance(t, torch.Tensor)]))

        return hook

    handles = [
        module.register_forward_pre_hook(note("pre")),
        module.register_forward_hook(note("forward")),
        module.register_full_backward_pre_hook(note("backward pre")),
        module.register_full_backward_hook(note("backward")),
    ]
    call().square().sum().backward()
    for handle in handles:
        handle.remove()
    return told


@pytest.mark.parametrize(
    ("make", "points", "eagerly"),
    [
        (lambda: MLP(24, 16), ("up", "down"), eager_mlp),
        (lambda: GatedMLP(24, 16), ("gate", "up", "down"), eager_mlp),
        (
            lambda: SelfAttention(24, 2, rotary=True, qk_norm=True),
            ("q_norm", "k_norm", "qkv_proj", "out_proj", "rotary", "hook_q", "hook_k", "hook_v", "hook_z"),
            None,
        ),
        (lambda: CrossAttention(24, 2), ("q_proj", "kv_proj", "out_proj"), None),
    ],
)
def test_every_sort_of_hook_fires_on_every_point_with_what_flows_there(make, points, eagerly):
    module = shaken(make()).double()
    x = normal(2, 5, 24).requires_grad_()
    inputs = (x, x) if isinstance(module, CrossAttention) else (x,)
    for point in points:
        told = observations(module.get_submodule(point), lambda: module(*inputs))
        times = 2 if point == "rotary" else 1
        assert sorted(sort for sort, _ in told) == sorted(["pre", "forward", "backward pre", "backward"] * times)
        if eagerly is not None:
            expected = observations(module.get_submodule(point), lambda: eagerly(module, *inputs))
            for (sort, ours), (_, theirs) in zip(told, expected, strict=True):
                torch.testing.assert_close(ours, theirs, msg=lambda m, sort=sort: f"{sort}: {m}")


def test_hooks_on_all_modules_fire_in_the_parts():
    module, seen = MLP(24, 16), set()
    with nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m)):
        module(normal(2, 24, dtype=torch.float32))
    assert seen == {module, module.up, module.down}


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
@pytest.mark.parametrize("alteration", ["forward of its own", "forward hook", "another epsilon", "another norm"])
def test_attention_calls_its_norms_where_one_is_not_what_it_was_built_as(name, alteration):
    module = shaken(SelfAttention(32, 4, num_kv_heads=2, rotary=True, qk_norm=True, dtype=torch.float64))
    x = normal(2, 6, 32)
    before = module(x)
    if alteration == "another epsilon":
        getattr(module, name).eps = 0.5
    elif alteration == "another norm":
        setattr(module, name, nn.RMSNorm(8, elementwise_affine=False, dtype=torch.float64))
    else:
        ALTERATIONS[alteration](module, name)
    out = module(x)
    assert_equal_to(eager_self_attention(module, x), out)
    assert (out - before).abs().max() > 1e-4


def test_a_rotation_that_was_changed_is_called():
    module, x = SelfAttention(32, 4, causal=True, rotary=True, dtype=torch.float64), normal(2, 6, 32)
    module.rotary.register_forward_hook(lambda m, i, o: i[0])
    still = SelfAttention(32, 4, causal=True, dtype=torch.float64)
    still.load_state_dict(module.state_dict())
    assert_equal_to(still(x), module(x))


def test_an_unembedding_of_its_own_is_called():
    model = small_model(tied=False)
    before = model(some_tokens())
    model.unembedding.register_forward_hook(lambda m, i, o: o * 2)
    assert torch.equal(model(some_tokens()), before * 2)


class Wrapped(nn.Module):
    """As adapters put a part into a module of theirs, without its attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **options):
        return self.inner(*args, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_of_a_model_may_be_put_into_a_wrapper(variant):
    whole = small_model(**VARIANTS[variant])
    expected = whole(some_tokens())
    for name, part in whole.named_modules():
        if name and not isinstance(part, nn.ModuleList):
            model, (holder, _, leaf) = copy.deepcopy(whole), name.rpartition(".")
            model.get_submodule(holder)._modules[leaf] = Wrapped(model.get_submodule(name))
            torch.testing.assert_close(model(some_tokens()), expected, msg=lambda m, name=name: f"{name}: {m}")


def test_a_tied_unembedding_asks_an_embedding_whose_weight_is_elsewhere_until_it_is_called():
    model = small_model(tied=True)
    expected = model(some_tokens())
    table = model.token_embedding.weight.detach().clone()
    model.token_embedding.to("meta")
    model.token_embedding.forward = lambda tokens: F.embedding(tokens, table)
    torch.testing.assert_close(model(some_tokens()), expected)
