"""Layers whose code computes h + dropout(mlp(norm(h))): one call of the fused MLP where the kernels serve."""

from __future__ import annotations

import copy
import functools
import pickle
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hardware import DEVICE
from needs_transformers import transformers
from torch import Tensor, nn

import fastattn
from fastattn.dropin import mlp_forms
from fastattn.dropin.blocks import FusedBlock

WIDTH = 16
SIZES = {"vocab_size": 24, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
GPT2 = {"vocab_size": 24, "n_positions": 16, "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_inner": 20,
        "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
T5 = {"vocab_size": 24, "d_model": WIDTH, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", SIZES),
    "GPT-2": ("GPT2LMHeadModel", {**GPT2, **NO_DROPOUT}),
    "Gemma, whose norms store their weights minus one": (
        "GemmaForCausalLM", {**SIZES, "head_dim": 8, "num_key_value_heads": 2},
    ),
    "Phi-3, gate and up in one weight": ("Phi3ForCausalLM", SIZES),
    "T5's encoder": ("T5EncoderModel", {**T5, "dropout_rate": 0.0}),
}  # fmt: skip
TOKENS = torch.tensor([[1, 5, 7, 3], [1, 2, 9, 11]], device=DEVICE)


def build(name: str, **changes: Any) -> Any:
    kind, options = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**{**options, **changes}))
    with torch.no_grad():
        for t in model.parameters():
            t.add_(0.1 * torch.randn_like(t))
    return model.to(DEVICE)


def patched(model: nn.Module) -> nn.Module:
    """The model with its MLPs and blocks patched; its attention stays its own."""
    report = fastattn.patch(model, attention=False)
    assert [row.kind for row in report.swapped] == ["mlp", "block"], str(report)
    return model


def step(model: nn.Module) -> list[Tensor]:
    y = model(TOKENS)[0]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [p for p in model.parameters() if p.requires_grad])]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(found, expected, strict=True):
        assert (a - e).abs().max() <= 3e-5 * e.abs().max() + 1e-6


@pytest.fixture
def branches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each call of an MLP, whether it computes the sum with the residual. The kernels serve."""
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    seen: list[bool] = []
    for name in ("mlp", "gated_mlp"):
        own = getattr(mlp_forms, name)

        def noted(x: Tensor, *rest: Any, own: Any = own, **options: Any) -> Tensor:
            if x.dtype != torch.float64:  # in which patch tries what a module computes
                seen.append(options.get("residual") is x)
            return own(x, *rest, **options)

        monkeypatch.setattr(mlp_forms, name, noted)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_where_the_kernels_serve_the_sum_is_one_call_with_the_same_gradients(name: str, branches: list) -> None:
    model = build(name)
    expected = step(model)
    assert_same(step(patched(model)), expected)
    assert branches == [True]


def test_elsewhere_a_layer_runs_its_own_code() -> None:
    model, patched_model = build("Llama"), patched(build("Llama"))
    fastattn.patch(model, attention=False)
    fastattn.unpatch(model)
    for block in model.model.layers:  # of which the MLPs alone are patched
        fastattn.patch(block.mlp)
    found, expected = step(patched_model), step(model)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


# Whoever looks at a module sees what the separate steps show.

WATCHED: dict[str, Callable[[Any], nn.Module]] = {
    "the norm": lambda block: block.post_attention_layernorm,
    "the MLP": lambda block: block.mlp,
    "a layer of the MLP": lambda block: block.mlp.down_proj,
}


@pytest.mark.parametrize("what", WATCHED)
def test_a_module_with_a_hook_is_called(what: str, branches: list) -> None:
    model = patched(build("Llama"))
    seen: list[Any] = []
    WATCHED[what](model.model.layers[0]).register_forward_hook(lambda *a: seen.append(a))
    step(model)
    assert len(seen) == 1 and True not in branches


def test_a_norm_or_an_mlp_put_in_later_is_called(branches: list) -> None:
    for name in ("post_attention_layernorm", "mlp"):
        model = patched(build("Llama"))
        setattr(model.model.layers[0], name, nn.Identity())
        expected = build("Llama")
        setattr(expected.model.layers[0], name, nn.Identity())
        assert_same([model(TOKENS)[0]], [expected(TOKENS)[0]])
    assert True not in branches


def test_code_that_replaces_a_class_s_forward_is_seen(monkeypatch, branches: list) -> None:
    fastattn.patch(OneLine())
    monkeypatch.setattr(OneLine, "forward", doubled_sum)
    block, x = OneLine().to(DEVICE), torch.randn(5, WIDTH, device=DEVICE)
    expected = block(x)
    fastattn.patch(block)
    assert_same([block(x)], [expected])
    assert branches == [True]


def test_hooks_of_the_layer_itself_stay() -> None:
    model, seen = patched(build("Llama")), []
    model.model.layers[0].register_forward_hook(lambda *a: seen.append(a))
    step(model)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("name", "dropout"), [("GPT-2", "mlp.dropout"), ("Phi-3, gate and up in one weight", "resid_mlp_dropout")]
)
def test_dropout_in_the_mlp_or_in_the_layer_is_drawn_in_the_call(name: str, dropout: str, branches: list) -> None:
    model = patched(build(name)).train()
    (block,) = [part for part in model.modules() if isinstance(part, FusedBlock)]
    block.get_submodule(dropout).p = 0.9
    x = torch.randn(5, WIDTH, device=DEVICE)
    added = block._in_one_call(x) - x
    assert branches == [True] and 0 < (added != 0).float().mean() < 0.3


def test_two_dropouts_after_an_mlp_stay_steps(branches: list) -> None:
    block: Any = patched(build("GPT-2")).transformer.h[0]
    assert block.mlp._added(torch.randn(3, WIDTH, device=DEVICE), dropout=nn.Dropout(0.1)) is None


# What is done with models.


def test_checkpointed_layers_compute_the_same(branches: list) -> None:
    model = patched(build("Llama")).train()
    expected = step(model)
    assert branches == [True]
    model.gradient_checkpointing_enable()
    found = step(model)
    assert branches == [True] * 3  # the layer's forward is computed twice
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def test_generation_with_a_cache_gives_the_same_tokens(branches: list) -> None:
    model = build("Llama").eval()
    asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(TOKENS[:1], **asked)
    assert torch.equal(patched(model).generate(TOKENS[:1], **asked), expected)
    assert branches == [True] * 3


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_and_what_is_taken_back(copied: Callable, branches: list) -> None:
    model = build("Llama")
    kinds, expected = [type(m) for m in model.modules()], step(model)
    twin = copied(patched(model))
    assert_same(step(twin), expected)
    assert branches == [True]
    assert {row.why for row in fastattn.patch(twin, attention=False).rows} == {"already patched"}
    for taken in (twin, model):
        fastattn.unpatch(taken)
        assert [type(m) for m in taken.modules()] == kinds
        assert all(torch.equal(a, e) for a, e in zip(step(taken), expected, strict=True))


@pytest.mark.parametrize(("name", "norms_first"), [("Llama", True), ("GPT-2", False), ("Llama", False)])
def test_patched_norms_are_read_in_the_call_too(name: str, norms_first: bool, branches: list) -> None:
    model = build(name)
    expected = step(model)
    for asked in ({"mlp": not norms_first, "norm": True}, {"mlp": True}):
        fastattn.patch(model, attention=False, **asked)
    assert_same(step(model), expected)
    assert branches == [True]


def test_tools_find_a_layer_by_the_name_of_its_class() -> None:
    model = patched(build("Llama"))
    (block,) = model.model.layers
    assert isinstance(block, FusedBlock) and type(block).__name__ == "LlamaDecoderLayer"
    assert type(block).__name__ in model._no_split_modules


# Which code is understood.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential()
        self.mlp = OwnMLP()
        self.drop = nn.Dropout(0.0)


class OwnMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class OneLine(Block):
    def forward(self, x):
        x = x + self.drop(self.mlp(self.norm(x)))
        return x


def doubled_sum(self, x):
    x = x + self.mlp(self.norm(x))
    return 2 * x


class InSteps(Block):
    def forward(self, x):
        shortcut = x
        y = self.norm(x)
        y = self.mlp(y)
        y = self.drop(y)
        x = y + shortcut
        return self.other(x)


class WithoutNorm(Block):
    def forward(self, x, scale=2.0, *, more: float = 1.0):
        h = scale * x
        h = h + self.mlp(h)
        return more * h


class ReadsTheNormLater(Block):
    def forward(self, x):
        y = self.norm(x)
        x = x + self.mlp(y)
        return x + y


class ReadsAnother(Block):
    def forward(self, x):
        y = self.other(x)
        x = x + self.mlp(self.norm(y))
        return x


class NormAfter(Block):
    def forward(self, x):
        x = x + self.other(self.mlp(self.norm(x)))
        return x


class Halved(Block):
    def forward(self, x):
        x = x + 0.5 * self.mlp(self.norm(x))
        return x


class InAnIf(Block):
    def forward(self, x):
        if self.training:
            x = x + self.mlp(self.norm(x))
        return x


class InALoop(Block):
    def forward(self, x):
        for _ in range(2):
            x = x + self.mlp(self.norm(x))
        return x


class CallsItsBase(OneLine):
    def forward(self, x):
        x = super().forward(x)
        x = x + self.mlp(self.norm(x))
        return x


def doubled(forward: Any) -> Any:
    def twice(self, x):
        return 2 * forward(self, x)

    return twice


class Decorated(Block):
    @doubled
    def forward(self, x):
        x = x + self.mlp(self.norm(x))
        return x


def named_alike(forward: Any) -> Any:
    @functools.wraps(forward)
    def call(self, x):
        return 2 * forward(self, x)

    return call


class DecoratedByWraps(Block):
    @named_alike
    def forward(self, x):
        x = x + self.mlp(self.norm(x))
        return x


class AsksBetween(Block):
    def forward(self, x):
        shortcut = x
        y = self.norm(x)
        _ = self.other(y).mul_(2)
        y = self.mlp(y)
        x = shortcut + y
        return x


class ChangesTheShortcutLater(Block):
    def forward(self, x):
        shortcut = x
        y = self.norm(x)
        x = shortcut + self.mlp(y)
        shortcut *= 2
        return x


class DeletesTheNormLater(Block):
    def forward(self, x):
        y = self.norm(x)
        x = x + self.mlp(y)
        del y
        return x


class ReadsTheNormInTheSameLine(Block):
    def forward(self, x):
        y = 3 * x
        z = y
        y = self.norm(x)
        x = x + self.mlp(y); z = y  # fmt: skip # noqa: E702
        return x + z


class ReadsTheNormInAFunction(Block):
    def forward(self, x):
        y = 3 * x
        later = lambda: y  # noqa: E731
        y = self.norm(x)
        x = x + self.mlp(y)
        return x + later()


class OverSeveralLines(Block):
    def forward(self, x):
        y = self.norm(x)
        x = (
            x
            + self.mlp(y)
        )  # fmt: skip
        return x


class NormByAMethod(Block):
    def scaled(self, x):
        return 2 * x

    def forward(self, x):
        x = x + self.mlp(self.scaled(x))
        return x


class NoSource(Block):
    exec("def forward(self, x):\n    x = x + self.mlp(self.norm(x))\n    return x")


@pytest.mark.parametrize("kind", [OneLine, InSteps, WithoutNorm, OverSeveralLines])
def test_code_that_is_such_a_sum(kind: type[nn.Module], branches: list) -> None:
    torch.manual_seed(0)
    block, x = kind().to(DEVICE), torch.randn(5, WIDTH, device=DEVICE)
    expected = block(x)
    assert [row.kind for row in fastattn.patch(block).rows] == ["mlp", "block"]
    assert_same([block(x)], [expected])
    assert branches == [True]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (ReadsTheNormLater, "reads y later"),
        (ReadsAnother, "more than a norm"),
        (NormAfter, "LayerNorm comes after"),
        (ChangesTheShortcutLater, "reads shortcut later"),
        (DeletesTheNormLater, "reads y later"),
        (ReadsTheNormInTheSameLine, "reads y later"),
        (ReadsTheNormInAFunction, "reads y later"),
        (NormByAMethod, "scaled is no module"),
        *((kind, "is not h") for kind in (Halved, InAnIf, InALoop, AsksBetween)),
        *((kind, "cannot be read") for kind in (CallsItsBase, Decorated, DecoratedByWraps, NoSource)),
    ],
)
def test_other_code_is_left_as_it_is_and_the_report_says_why(kind: Any, why: str, branches: list) -> None:
    torch.manual_seed(0)
    block, x = kind().to(DEVICE), torch.randn(5, WIDTH, device=DEVICE)
    expected = block(x.clone())
    (row,) = fastattn.patch(block, strict=True).rows
    assert (row.kind, type(block)) == ("mlp", kind) and why in row.why
    assert_same([block(x)], [expected])
    assert True not in branches


def test_layers_that_share_an_mlp_are_patched_or_left() -> None:
    model = nn.Sequential(OneLine(), NormAfter(), NormAfter()).to(DEVICE)
    model[1].mlp = model[2].mlp = model[0].mlp
    x = torch.randn(5, WIDTH, device=DEVICE)
    expected = model(x)
    assert [row.kind for row in fastattn.patch(model).rows] == ["mlp", "block"]
    assert_same([model(x)], [expected])


def test_a_class_derived_from_a_layer_of_hugging_face_is_such_a_sum(branches: list) -> None:
    from transformers.models.llama import modeling_llama

    class Own(modeling_llama.LlamaDecoderLayer):
        pass

    model = build("Llama")
    layer = model.model.layers[0]
    expected = step(model)
    layer.__class__ = Own
    assert_same(step(patched(model)), expected)
    assert branches == [True]


def test_compiles_in_one_graph_by_its_own_code(branches: list) -> None:
    torch._dynamo.reset()
    block, x = InSteps().to(DEVICE), torch.randn(5, WIDTH, device=DEVICE)
    expected = block(x)
    fastattn.patch(block)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert_same([compiled(x)], [expected])
    assert branches == [False]


def test_an_error_names_the_line_of_the_layer_s_own_code() -> None:
    block = WithoutNorm()
    fastattn.patch(block)
    assert isinstance(block, FusedBlock)
    with pytest.raises(TypeError) as raised:
        block("no tensor", scale=None)
    frame = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert frame.filename == __file__ and frame.line == "h = scale * x"
