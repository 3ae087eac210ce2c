"""A method that somebody replaces on a class, after `patch` has swapped modules of it, computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hardware import DEVICE
from torch import Tensor, nn

import fastattn
from fastattn.dropin.fused_classes import Fused, digest

WIDTH = 16


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class CallsItsBase(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OwnActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class WithActivation(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.activation, self.dropout = OwnActivation(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.activation(self.up(x))))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(WIDTH)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = Norm(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm(x))
        return x


class Derived(Block):
    pass


class Sequence(nn.Sequential):
    pass


def sequence() -> nn.Module:
    return Sequence(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 20, dropout=0.0, batch_first=True)


def halved(self: Any, x: Tensor) -> Tensor:
    return 0.5 * x


# Of what is patched: how to make it, whose method is replaced, and its name.
REPLACED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "an MLP": (MLP, MLP, "forward"),
    "an MLP's base": (CallsItsBase, MLP, "forward"),
    "an activation in an MLP": (WithActivation, OwnActivation, "forward"),
    "dropout in an MLP": (WithActivation, nn.Dropout, "forward"),
    "a sequence": (sequence, nn.Sequential, "forward"),
    "torch's layer": (encoder_layer, nn.TransformerEncoderLayer, "_ff_block"),
    "a norm": (Norm, Norm, "forward"),
    "a norm in a block": (Block, Norm, "forward"),
    "an MLP in a block": (Block, MLP, "forward"),
    "a block": (Block, Block, "forward"),
    "a block's base": (Derived, Block, "forward"),
}


def patched(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = make().to(DEVICE).eval()
    report = fastattn.patch(module, norm=isinstance(module, Norm))
    assert report.swapped, str(report)
    return module


def unpatched(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().to(DEVICE).eval()


def as_it_is(module: nn.Module) -> nn.Module:
    return module


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [as_it_is, copy.deepcopy, pickled])
@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("backend", ["triton", None])
def test_a_method_that_is_replaced_later_computes(
    backend: str | None, what: str, copied: Any, monkeypatch
) -> None:
    if backend:
        monkeypatch.setenv("FASTATTN_BACKEND", backend)
    make, kind, method = REPLACED[what]
    x = torch.randn(2, 5, WIDTH, device=DEVICE)
    module = patched(make)
    as_before = module(x) if copied is as_it_is else None  # a copy may be made before the first call
    with monkeypatch.context() as replaced:
        replaced.setattr(kind, method, halved)
        expected = unpatched(make)(x)
        torch.testing.assert_close(copied(module)(x), expected, rtol=1e-4, atol=1e-5)
    if as_before is not None:
        assert torch.equal(module(x), as_before) and not torch.allclose(expected, as_before)


@pytest.mark.parametrize("what", ["an MLP", "a block", "a norm"])
def test_new_code_in_the_old_function_computes(what: str, monkeypatch) -> None:
    """As tools do that load changed files into a running program."""
    make, kind, method = REPLACED[what]
    module, x = patched(make), torch.randn(2, 5, WIDTH, device=DEVICE)
    function = getattr(kind, method)
    monkeypatch.setattr(function, "__code__", halved.__code__)
    assert torch.equal(module(x), 0.5 * x)


def test_compiled_code_is_compiled_again(monkeypatch) -> None:
    torch._dynamo.reset()
    module, x = patched(MLP), torch.randn(2, 5, WIDTH, device=DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), unpatched(MLP)(x), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(MLP, "forward", halved)
    assert torch.equal(compiled(x), 0.5 * x)


def test_a_method_that_is_replaced_on_the_instance_computes() -> None:
    for name in ("mlp", "norm", ""):
        block, x = patched(Block), torch.randn(2, 5, WIDTH, device=DEVICE)
        expected: Any = unpatched(Block)
        for one in (block, expected):
            part = one.get_submodule(name)
            part.forward = lambda x: 0.5 * x
        torch.testing.assert_close(block(x), expected(x), rtol=1e-4, atol=1e-5)
    layer, own = patched(encoder_layer), unpatched(encoder_layer)
    layer._ff_block = own._ff_block = lambda x: 0.5 * x
    torch.testing.assert_close(layer(x), own(x), rtol=1e-4, atol=1e-5)


def test_a_method_that_a_model_of_hugging_face_gets_later_computes(monkeypatch) -> None:
    import needs_transformers  # noqa: F401
    from transformers.models.bert.modeling_bert import BertConfig, BertLayer, BertModel

    config = BertConfig(vocab_size=24, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=20)  # fmt: skip
    own = BertModel(config).to(DEVICE).eval()
    twin = copy.deepcopy(own)
    assert fastattn.patch(twin).swapped
    tokens = torch.tensor([[1, 5, 7]], device=DEVICE)
    for method, new in (("forward", lambda self, x, *rest, **more: 0.5 * x), ("feed_forward_chunk", halved)):
        with monkeypatch.context() as replaced:
            replaced.setattr(BertLayer, method, new)
            torch.testing.assert_close(twin(tokens)[0], own(tokens)[0], rtol=1e-4, atol=1e-5)


def quartered(self: Any, x: Tensor, *rest: Any, **more: Any) -> Any:
    return (x / 4, None) if isinstance(self, nn.MultiheadAttention) else x / 4


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: nn.LayerNorm(WIDTH), 1),
        (lambda: nn.RMSNorm(WIDTH), 1),
        (lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True), 3),
        (encoder_layer, 1),
        (lambda: nn.TransformerDecoderLayer(WIDTH, 2, 20, batch_first=True), 2),
    ],
)
@pytest.mark.filterwarnings("ignore:MultiheadAttention")
def test_a_forward_that_torch_s_class_gets_later_computes(make: Any, inputs: int, monkeypatch) -> None:
    module, own = (make().to(DEVICE).eval() for _ in range(2))
    own.load_state_dict(module.state_dict())
    assert fastattn.patch(module, norm=True).swapped
    xs = [torch.randn(2, 5, WIDTH, device=DEVICE) for _ in range(inputs)]
    monkeypatch.setattr(type(own), "forward", quartered)
    found, expected = module(*xs), own(*xs)
    assert torch.equal(*((t[0] if isinstance(t, tuple) else t) for t in (found, expected)))


# What a digest tells.


def enclosing(inner: Any) -> Any:
    def outer(self: Any, x: Tensor) -> Tensor:
        return inner(self, x)

    return outer


def doubled(self: Any, x: Tensor) -> Tensor:
    return 2 * x


def named(function: Any, name: str) -> Any:
    function.__name__ = name
    return function


def test_a_digest_tells_functions_apart_by_what_they_do() -> None:
    texts = [digest(f) for f in (halved, doubled, enclosing(halved), enclosing(doubled), MLP.forward)]
    assert len(set(texts)) == len(texts)
    assert digest(enclosing(halved)) == digest(named(enclosing(halved), "other")) == texts[2]


# Names that both a module and a fused class have.


class WithNames(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.names = ["up", "down"]


class WithMethod(MLP):
    def _after(self, x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        return self._after(x) if self.training else super().forward(x)


@pytest.mark.parametrize(("kind", "name"), [(WithNames, "names"), (WithMethod, "_after")])
def test_a_module_with_an_attribute_of_a_fused_class_is_left(kind: type[nn.Module], name: str) -> None:
    module = unpatched(kind)
    (row,) = fastattn.patch(module).rows
    assert type(module) is kind and not isinstance(module, Fused)
    assert f"it has an attribute {name}, a name that the fused class needs" in row.why
