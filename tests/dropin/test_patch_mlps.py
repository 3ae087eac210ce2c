"""fastattn.patch finds an MLP by its parts, leaves with a row what computes more, and fails on no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from patched_models import SIZES, WIDTH, Noisy, anatomy, batch, sequence, transformers
from torch import Tensor, nn

import fastattn
from fastattn.dropin import mlp_forms


# MLPs by their parts, whatever their names. Each class has its widths, and what patch finds.
class Found(nn.Module):
    """A module with layers of these widths, by name."""

    def __init__(self, **widths: tuple[int, int]) -> None:
        super().__init__()
        for name, width in widths.items():
            self.add_module(name, nn.Linear(*width))


class NanoGPT(Found):
    def __init__(self) -> None:
        super().__init__(c_fc=(8, 32), c_proj=(32, 8))
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class MinGPT(Found):
    """An activation of a class of its own; dropout between and after; out of order."""

    def __init__(self) -> None:
        super().__init__(second=(32, 8), first=(8, 32))
        self.drop1, self.act, self.drop2 = nn.Dropout(0.5), NewGELU(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.second(self.drop1(self.act(self.first(x)))))


class Inline(Found):
    def __init__(self) -> None:
        super().__init__(a=(8, 32), b=(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).square())


class FunctionKept(Found):
    def __init__(self) -> None:
        super().__init__(a=(8, 8), b=(8, 8))
        self.act = nn.functional.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.act(self.b(x)))


class SwiGLU(Found):
    def __init__(self) -> None:
        super().__init__(w1=(8, 24), w2=(24, 8), w3=(8, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Packed(Found):
    def __init__(self, gate_first: bool) -> None:
        super().__init__(packed=(8, 48), down=(24, 8))
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.packed(x).chunk(2, -1)[:: 1 if self.gate_first else -1]
        return self.down(nn.functional.gelu(gate) * up)


class Nested(nn.Module):
    """As diffusers has it: the packed layer in a module of its own, all in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(), nn.Dropout(0.0), nn.Linear(24, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class GEGLU(Found):
    def __init__(self) -> None:
        super().__init__(proj=(8, 48))

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.proj(x).chunk(2, -1)
        return up * nn.functional.gelu(gate, approximate="tanh")


class OwnMLPBlock(nn.Sequential):
    """A class that adds nothing but a name, as torchvision's MLPBlock does."""


FOUND: dict[str, tuple[Callable[[], nn.Module], tuple]] = {
    "nanoGPT": (NanoGPT, ("mlp", "gelu")),
    "minGPT": (MinGPT, ("mlp", "gelu_tanh")),
    "written in its code": (Inline, ("mlp", "relu_squared")),
    "a function in an attribute": (FunctionKept, ("mlp", "silu")),
    "SwiGLU": (SwiGLU, ("gated_mlp", "silu")),
    "gate and up packed": (lambda: Packed(True), ("gated_mlp", "gelu")),
    "up and gate packed": (lambda: Packed(False), ("gated_mlp", "gelu")),
    "nested": (Nested, ("gated_mlp", "gelu_tanh")),
    "a sequence by another name": (lambda: OwnMLPBlock(*sequence(nn.ReLU())), ("mlp", "relu")),
}


@pytest.mark.parametrize("zeros", [False, True], ids=["random weights", "zeros last"])
@pytest.mark.parametrize("name", FOUND)
def test_an_mlp_is_found_by_its_parts_whatever_their_names(
    name: str, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, (function, activation) = FOUND[name]
    torch.manual_seed(4)
    model, x, called = make(), torch.randn(2, 5, 8), []
    if zeros:
        for layer in list(model.modules())[1:]:
            if isinstance(layer, nn.Linear) and layer.out_features == 8:
                nn.init.zeros_(layer.weight)
    before = anatomy(model)
    report = fastattn.patch(model, strict=True)

    def noted(name: str, own: Callable) -> Callable:
        return lambda *a, **k: called.append((name, k["activation"])) or own(*a, **k)

    for other in ("mlp", "gated_mlp"):
        monkeypatch.setattr(mlp_forms, other, noted(other, getattr(mlp_forms, other)))
    with torch.no_grad():
        # Weights of another size: what the trial found must be true of them, too.
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))
    for training in (False, True):
        model.train(training)
        torch.manual_seed(5)
        actual = model(x)
        fastattn.unpatch(model)
        torch.manual_seed(5)
        torch.testing.assert_close(actual, model(x), rtol=1e-4, atol=1e-4)
        fastattn.patch(model)
    assert called[0] == (function, activation) and report.rows[0].kind == "mlp"
    fastattn.unpatch(model)
    assert anatomy(model) == before


class Another(Found):
    """Two layers of an MLP's widths whose second begins with zeros, and a formula."""

    def __init__(self, formula: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(fc1=(8, 32), fc2=(32, 8))
        nn.init.zeros_(self.fc2.weight), nn.init.zeros_(self.fc2.bias)
        self.__dict__["_formula"] = (formula,)

    def forward(self, x: Tensor) -> Any:
        return self._formula[0](self, x)


def keeps(self: Any, x: Tensor) -> Tensor:
    self.last = torch.relu(self.fc1(x))
    return self.fc2(self.last)


def in_place(self: Any, x: Tensor) -> Tensor:
    y = self.fc2(torch.relu(self.fc1(x)))
    x.add_(1)
    return y


ANOTHER: dict[str, Callable[[Any, Tensor], Any]] = {
    "another formula for two dimensions": lambda self, x: (
        (1.0 if x.dim() > 2 else 2.0) * self.fc2(torch.relu(self.fc1(x)))
    ),
    "tanh": lambda self, x: self.fc2(torch.tanh(self.fc1(x))),
    "a sigmoid that is almost gelu": lambda self, x: self.fc2((h := self.fc1(x)) * torch.sigmoid(1.702 * h)),
    "a residual": lambda self, x: x + self.fc2(torch.relu(self.fc1(x))),
    "twice": lambda self, x: self.fc2(torch.relu(self.fc1(x))) * 2,
    "a clamp": lambda self, x: self.fc2(torch.relu(self.fc1(x)).clamp(max=40)),
    "a tuple": lambda self, x: (self.fc2(torch.relu(self.fc1(x))),),
    "another dtype": lambda self, x: self.fc2(torch.relu(self.fc1(x))).float().half(),
    "tokens mixed": lambda self, x: self.fc2(torch.relu(self.fc1(x.flip(-2)))),
    "something kept": keeps,
    "its input changed": in_place,
}


@pytest.mark.parametrize("name", ANOTHER)
def test_what_computes_more_than_an_mlp_is_left_with_a_row_even_where_zeros_hide_it(name: str) -> None:
    model = Another(ANOTHER[name])
    before, generator = anatomy(model), torch.get_rng_state()
    (row,) = fastattn.patch(model).rows
    assert row.now is None and row.kind == "mlp"
    assert anatomy(model) == before and torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(ValueError, match="computes more"):
        fastattn.patch(model, strict=True)


class CausalSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x)[:, None].chunk(3, -1)
        return self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


class Eager(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv, self.to_out = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.to_kv(x).chunk(2, -1)
        return self.to_out((self.to_q(x) @ k.mT).softmax(-1) @ v)


class LayerNorm(nn.Module):
    """nanoGPT's: the epsilon is written in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Scale(nn.Module):
    """An RMS norm by what it computes alone, with an offset that weights of zero hide."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.gamma)


class NanoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = LayerNorm(), CausalSelfAttention(), Scale(), NanoGPT()
        self.other, self.ln_3 = Eager(), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x + self.other(self.ln_3(x))


def test_a_report_has_a_row_for_everything_that_looks_like_attention_an_mlp_or_a_norm() -> None:
    model, x = NanoBlock().eval(), torch.randn(2, 5, 8)
    expected = model(x)
    report = fastattn.patch(model, norm=True)
    rows = {row.name: (row.kind, row.now) for row in report.rows}
    assert rows == {
        "attn": ("attention", None), "other": ("attention", None), "mlp": ("mlp", "FusedNanoGPT"),
        "ln_1": ("norm", "FusedLayerNorm"), "ln_2": ("norm", "FusedScale"),
        "ln_3": ("norm", "fastattn.nn.LayerNorm"), "": ("block", "norm, MLP and sum in one call"),
    }  # fmt: skip
    why = {row.name: row.why for row in report.left}
    assert "fastattn.sdpa.activate()" in why["attn"] and "fastattn.attention" in why["other"]
    # Two classes share a name: the report says where each is from.
    was = {row.name: row.was for row in report.rows}
    assert was["ln_1"] == f"{__name__}.LayerNorm" and was["ln_3"].startswith("torch.nn.")
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        model.ln_2.gamma.add_(0.5)
    torch.testing.assert_close(model.ln_2(x), Scale.forward(model.ln_2, x))
    with pytest.raises(ValueError, match="attn: its own code attends"):
        fastattn.patch(NanoBlock(), strict=True)


class EpsilonOfTheDtype(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (8,), 1 + self.gamma)


def test_an_epsilon_that_depends_on_the_dtype_is_not_believed_from_one_dtype() -> None:
    assert not fastattn.patch(EpsilonOfTheDtype(), norm=True).swapped


LEFT_MODELS = {
    "experts": ("MixtralModel", "MixtralConfig", {"num_key_value_heads": 2}, "experts: "),
    "layers in a decoder": (
        "OPTModel",
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
        "fc1 and fc2 ",
    ),
    "quick gelu": ("CLIPTextModel", "CLIPTextConfig", {}, "its own code computes more"),
}


@pytest.mark.parametrize("name", LEFT_MODELS)
def test_mlps_of_hugging_face_that_are_left_have_a_row_and_fail_strict(name: str) -> None:
    model, config, options, why = LEFT_MODELS[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, "pad_token_id": 0, **options}))
    left = fastattn.patch(made).left
    assert left and all(row.kind == "mlp" and why in row.why for row in left)
    fastattn.unpatch(made)
    with pytest.raises(ValueError, match="strict"):
        fastattn.patch(made, strict=True)


def test_packed_and_renamed_mlps_of_hugging_face_are_fused(calls: dict[str, int]) -> None:
    distilbert = {"vocab_size": 64, "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    for model, config, options in (
        ("Phi3Model", "Phi3Config", {**SIZES, "pad_token_id": 0}),
        ("DistilBertModel", "DistilBertConfig", distilbert),
    ):
        torch.manual_seed(1)
        made = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
        expected = made(inputs_embeds=batch())[0]
        fastattn.patch(made, strict=True)
        calls.update(mlp=0)
        torch.testing.assert_close(made(inputs_embeds=batch())[0], expected, rtol=1e-4, atol=1e-5)
        assert calls["mlp"] == 2


FX = {
    "encoder layer": lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0)),
    "sequence": sequence,
    "an MLP": SwiGLU,
    "a block": NanoBlock,
}


@pytest.mark.parametrize("name", FX)
def test_torch_fx_traces_a_patched_model_as_it_did_before(name: str) -> None:
    model, x = FX[name]().eval(), torch.randn(2, 5, 8)
    expected, nodes = model(x), [n.op for n in torch.fx.symbolic_trace(model).graph.nodes]
    fastattn.patch(model, norm=True)
    traced = torch.fx.symbolic_trace(model)
    assert [n.op for n in traced.graph.nodes] == nodes
    torch.testing.assert_close(traced(x), expected)


@pytest.mark.parametrize("name", FX)
def test_torch_export_and_jit_trace_take_a_patched_model(name: str) -> None:
    model, x = FX[name]().eval().requires_grad_(False), torch.randn(2, 5, 8)
    expected = model(x)
    fastattn.patch(model, norm=True)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, (x,), check_trace=False)(x), expected)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_under_autocast_on_a_cpu_gives_the_dtype_of_torchs(
    norm_first: bool, dtype: torch.dtype, gradients: bool, training: bool
) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    layer.train(training)
    x = torch.randn(2, 5, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
        expected = layer(x).dtype
        fastattn.patch(layer, norm=True)
        assert layer(x).dtype == expected


class Grumpy(nn.Module):
    """Raises whenever it is asked for anything."""

    @property
    def in_features(self) -> int:
        raise RuntimeError("not now")

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name) if name != "_modules" else AttributeError(name)


class AnyName(nn.Module):
    """Has every attribute there is."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def shared_layers() -> nn.Module:
    model = sequence()
    model[2] = model[0]
    return nn.ModuleList([model, model, Another(ANOTHER["tanh"])])


ODD: dict[str, Callable[[], nn.Module]] = {
    "properties that raise": Grumpy,
    "any attribute": AnyName,
    "lazy": lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(8)),
    "scripted": lambda: torch.jit.script(sequence()),
    "traced": lambda: torch.fx.symbolic_trace(sequence()),
    "no parameters": lambda: nn.Sequential(nn.ReLU(), nn.Identity(), nn.Flatten()),
    "empty": nn.Module,
    "shared": shared_layers,
    "sequence of none": lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(), nn.Linear(8, 8)),
    "embedding bags": lambda: nn.ModuleList([nn.EmbeddingBag(4, 4), nn.LSTM(4, 4), nn.Bilinear(2, 2, 2)]),
}


@pytest.mark.parametrize("name", ODD)
def test_patch_raises_on_no_model(name: str) -> None:
    model = nn.ModuleDict({"odd": ODD[name]()})
    fastattn.patch(model, norm=True)
    fastattn.unpatch(model)


class FunctionalDropout(Found):
    """Dropout by torch's function, between the layers and after them; its rate is an attribute."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(up=(8, 32), down=(32, 8))
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(nn.functional.gelu(self.up(x)), self.p, self.training)
        return nn.functional.dropout(self.down(x), self.p, training=self.training)


@pytest.mark.parametrize("p", [0.5, 0.0])
def test_an_mlp_with_functional_dropout_is_fused_in_eval_mode_only(p: float, calls: dict[str, int]) -> None:
    model, x = nn.Sequential(nn.LayerNorm(8), FunctionalDropout(p)), torch.randn(4, 8)
    expected = model.eval()(x)
    report = fastattn.patch(model)
    row = next(row for row in report.rows if row.kind == "mlp")
    assert "in eval mode; in training its own code computes it" in row.why and row.now
    before = calls["mlp"]
    torch.testing.assert_close(model(x), expected)
    assert calls["mlp"] == before + 1
    model[1].train()
    model[1].p = 0.5
    dropped = [(model[1](torch.ones(64, 8)) == 0).float().mean() for _ in range(2)]
    assert all(0.3 < share < 0.7 for share in dropped)


def test_an_mlp_with_a_formula_of_its_own_in_training_is_fused_in_eval_mode_only(calls: dict[str, int]) -> None:
    model, x = Noisy().eval(), torch.randn(4, next(Noisy().parameters()).shape[1])
    expected = model(x)
    (row,) = fastattn.patch(model).rows
    assert "in training its own code computes it" in row.why
    before = calls["mlp"]
    torch.testing.assert_close(model(x), expected)
    assert calls["mlp"] == before + 1
    model.train()
    assert not torch.equal(model(x), model(x))
    assert calls["mlp"] == before + 1
