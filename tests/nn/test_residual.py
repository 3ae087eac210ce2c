"""The step x + dropout(mlp(norm(x))): one call where that pays, and separate steps where somebody looks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from attention_problems import without_plans
from comparing import run
from hardware import DEVICE
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastattn
from fastattn.core.mlp import functional
from fastattn.nn import MLP, GatedMLP, SelfAttention, TransformerBlock
from fastattn.nn.residual import residual_step

X = torch.randn(3, 5, 16, device=DEVICE)
NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(16),
    "layer without bias": lambda: nn.LayerNorm(16, bias=False),
    "rms": lambda: nn.RMSNorm(16, eps=1e-6),
    "rms, torch's epsilon": lambda: fastattn.nn.RMSNorm(16),
    "without weight": lambda: nn.LayerNorm(16, elementwise_affine=False),
}


def parts(norm: str = "layer", gated: bool = False, **options: Any) -> tuple[nn.Module, nn.Module, nn.Dropout]:
    """norm, MLP and dropout, with weights that are not those of a fresh norm."""
    torch.manual_seed(0)
    made = NORMS[norm](), (GatedMLP if gated else MLP)(16, 24, **{"save": "nothing", **options}), nn.Dropout(0.5)
    for t in made[0].parameters():
        nn.init.normal_(t)
    return made[0].to(DEVICE), made[1].to(DEVICE), made[2].eval()


def steps(x: Tensor, norm: nn.Module, mlp: nn.Module, dropout: nn.Module) -> Tensor:
    return x + dropout(mlp(norm(x)))


def calls_of_branches(step: Callable[[], Any]) -> list[bool]:
    """Of each call of an MLP in the step, whether it computes the whole branch."""
    with mock.patch.object(functional, "_first", wraps=functional._first) as first, without_plans():
        step()
    return [call.args[3].residual == "x" for call in first.call_args_list]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("norm", NORMS)
def test_one_call_gives_what_the_steps_give(norm: str, gated: bool) -> None:
    modules = parts(norm, gated)
    weights = [t for m in modules for t in m.parameters()]
    dy = torch.randn_like(X)
    found = []
    for function in (residual_step, steps):
        x = X.clone().requires_grad_()
        y = function(x, *modules)
        found.append([y, *torch.autograd.grad(y, (x, *weights), dy)])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    assert calls_of_branches(lambda: residual_step(X, *modules)) == [True]


@pytest.mark.parametrize(
    ("options", "branch"),
    [({"save": "auto"}, False), ({"save": "auto", "backend": "triton"}, True), ({"save": "int8"}, True)],
    ids=["by default on a CPU", "kernels", "little memory"],
)
def test_one_call_computes_the_step_where_that_pays(options: dict[str, Any], branch: bool) -> None:
    if options == {"save": "auto"} and DEVICE != "cpu":
        pytest.skip("the proof record decides")
    assert calls_of_branches(lambda: residual_step(X, *parts(**options))) == [branch]


class Marked(MLP):
    """A class of a user's."""


def _hook(module: nn.Module, seen: list) -> None:
    module.register_forward_hook(lambda *_: seen.append(module))


def _replaced(module: nn.Module, seen: list) -> None:
    own = module.forward
    module.forward = lambda *a: (seen.append(module), own(*a))[1]  # type: ignore[method-assign]


def _parametrised(module: Any, seen: list) -> None:
    class Note(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            seen.append(module)
            return 2 * t

    parametrize.register_parametrization(module, "weight", Note())
    seen.clear()


WATCHED: dict[str, Callable[[tuple[Any, Any, Any]], tuple[Any, Callable]]] = {
    "a hook on the norm": lambda m: (m[0], _hook),
    "a hook on the MLP": lambda m: (m[1], _hook),
    "a hook on a layer": lambda m: (m[1].down, _hook),
    "a hook on the dropout": lambda m: (m[2], _hook),
    "a norm's forward replaced": lambda m: (m[0], _replaced),
    "an MLP's forward replaced": lambda m: (m[1], _replaced),
    "a parametrised norm": lambda m: (m[0], _parametrised),
    "a parametrised layer": lambda m: (m[1].up, _parametrised),
}


@pytest.mark.parametrize("what", WATCHED)
def test_whoever_looks_sees_what_the_steps_show(what: str) -> None:
    modules, seen = parts(), []
    module, watch = WATCHED[what](modules)
    watch(module, seen)
    y = residual_step(X, *modules)
    assert seen and all(one is module for one in seen)
    torch.testing.assert_close(y, steps(X, *modules))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_forward_that_torch_s_norm_gets_later_computes_in_our_norms_too(kind: Any, monkeypatch) -> None:
    _, *rest = parts()
    norm = fastattn.nn.LayerNorm(16) if kind is nn.LayerNorm else fastattn.nn.RMSNorm(16)
    norm.to(DEVICE)
    monkeypatch.setattr(kind, "forward", lambda self, x: 0.5 * x)
    torch.testing.assert_close(residual_step(X, norm, *rest), X + rest[0](0.5 * X))


def test_modules_of_other_classes_are_called() -> None:
    norm, mlp, _ = parts()
    mlp.__class__ = Marked
    with mock.patch.object(Marked, "forward", autospec=True, side_effect=lambda self, x: 0 * x) as forward:
        residual_step(X, norm, mlp, nn.Dropout(0.0))
    forward.assert_called_once()
    feature = nn.AlphaDropout(0.5)
    norm, mlp, _ = parts()
    torch.manual_seed(1)
    found = residual_step(X, norm, mlp, feature)
    torch.manual_seed(1)
    assert torch.equal(found, steps(X, norm, mlp, feature))


def test_dropout_drops_in_training_only() -> None:
    norm, mlp, dropout = parts()
    whole = residual_step(X, norm, mlp, dropout) - X
    dropout.train()
    torch.manual_seed(2)
    dropped = residual_step(X, norm, mlp, dropout) - X
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], rtol=1e-4, atol=1e-5)
    dropout.p = 1.0
    assert torch.equal(residual_step(X, norm, mlp, dropout), X)


def test_a_block_takes_the_step_and_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    blocks = [TransformerBlock(SelfAttention(16, 2), MLP(16, 24), norm="rms").to(DEVICE)]
    blocks.append(copy.deepcopy(blocks[0]))
    blocks[1].mlp.save = "nothing"
    assert not any(block(X)._is_view() for block in blocks)
    assert [calls_of_branches(lambda block=block: block(X)) for block in blocks] == [[False], [True]]
    compiled = torch.compile(blocks[1], fullgraph=True, backend="aot_eager")
    dy = torch.randn_like(X)
    expected = run(blocks[0], [X], dy)
    for found in (run(blocks[1], [X], dy), run(compiled, [X], dy)):
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


# Patched models.


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_patched_encoder_layer_computes_its_feed_forward_step_in_one_call(norm_first: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, activation="gelu", norm_first=norm_first, batch_first=True)
    layer = layer.to(DEVICE).eval()
    expected = layer(X)
    fastattn.patch(layer)
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    assert calls_of_branches(lambda: torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-5)) == [
        True
    ]
    seen: list[Any] = []
    _hook(layer.dropout2, seen)
    assert calls_of_branches(lambda: torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-5)) == [
        False
    ]
    assert seen == [layer.dropout2]


def test_a_patched_bert_layer_adds_its_residual_in_the_same_call(monkeypatch) -> None:
    from needs_transformers import transformers

    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1
    )
    torch.manual_seed(0)
    layer = transformers.models.bert.modeling_bert.BertLayer(config).to(DEVICE).eval()
    expected = layer.feed_forward_chunk(X)
    fastattn.patch(layer, attention=False)
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    found: list[Tensor] = []
    assert calls_of_branches(lambda: found.append(layer.feed_forward_chunk(X))) == [True]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
