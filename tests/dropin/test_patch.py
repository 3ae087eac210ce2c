"""fastattn.patch: a model computes the same, keeps its parameters, hooks and classes, and can be taken back."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from tolerance import assert_as_exact_as_eager
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.core.norm.operators import NormPlan
from fastattn.dropin import mlp_forms
from fastattn.dropin.mlp_forms import activation_name

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH = 64, 32
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48}  # fmt: skip


class Residual(nn.Module):
    """A user's block: MLPs in sequences, one of them with two in a row and things between."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Dropout(dropout), nn.Linear(48, WIDTH))
        self.two = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40, bias=False), nn.SiLU(), nn.Linear(40, WIDTH),
            nn.Dropout(0.0), nn.Linear(WIDTH, 24), nn.GELU("tanh"),
            nn.Linear(24, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.two(x)


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(WIDTH, 4, 2, 2, 48, dropout=0.0, activation="gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.flip(1), tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(x, x[:, :3], x[:, :3])
        return out + weights.sum(-1, keepdim=True)


class Logits(nn.Module):
    """A Hugging Face model as a function of embeddings."""

    def __init__(self, model: str, config: str, **options: Any) -> None:
        super().__init__()
        self.inner = getattr(transformers, model)(getattr(transformers, config)(**options))
        self.decoder = self.inner.config.is_encoder_decoder

    def forward(self, x: Tensor) -> Tensor:
        decoder = {"decoder_inputs_embeds": x.flip(1)} if self.decoder else {}
        return self.inner(inputs_embeds=x, **decoder)[0]


T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "sequences": Residual,
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=True, norm_first=True), 2,
        enable_nested_tensor=False,
    ),
    "encoder and decoder": Seq2Seq,
    "cross-attention": Cross,
    "gpt2": lambda: Logits("GPT2Model", "GPT2Config", vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH,
                           n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama": lambda: Logits("LlamaModel", "LlamaConfig", **SIZES, num_key_value_heads=2),
    "gemma3": lambda: Logits("Gemma3TextModel", "Gemma3TextConfig", **SIZES, head_dim=8, sliding_window=4),
    "bert": lambda: Logits("BertModel", "BertConfig", **SIZES, hidden_dropout_prob=0.0,
                           attention_probs_dropout_prob=0.0),
    "vit": lambda: nn.Sequential(transformers.ViTModel(transformers.ViTConfig(
        **{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=8, patch_size=2)).layers[0].mlp),
    "t5": lambda: Logits("T5Model", "T5Config", **T5, dropout_rate=0.0),
    "gated t5": lambda: Logits("T5Model", "T5Config", **T5, dropout_rate=0.0, feed_forward_proj="gated-gelu"),
}  # fmt: skip
# How many MLPs and attentions one forward of each must hand to the fused functions.
FUSED = {"sequences": (3, 0), "encoder": (2, 2), "encoder and decoder": (4, 6), "cross-attention": (0, 1),
         "gpt2": (2, 2), "llama": (2, 2), "gemma3": (2, 2), "bert": (2, 2), "vit": (1, 0), "t5": (4, 6),
         "gated t5": (4, 6)}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch() -> Tensor:
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2))


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    out = model(x)
    reached = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(out.float().sin().sum(), [x, *reached], allow_unused=True)
    return out.detach(), [g for g in gradients if g is not None]


def assert_same(actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert len(actual[1]) == len(expected[1])
    for a, e in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert (a - e).abs().max() <= 3e-5 * e.abs().max() + 1e-6


def anatomy(model: nn.Module) -> list:
    """All that `unpatch` must restore: classes, what instances hold, parameters, implementations."""
    return [
        (name, type(module), sorted(module.__dict__), [id(p) for p in module.parameters()],
         getattr(getattr(module, "config", None), "_attn_implementation", None))
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the fused functions were called, counted in the modules that call them."""
    counts = {"mlp": 0, "attention": 0}

    def counted(kind: str, function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[kind] += 1
            return function(*arguments, **options)

        return call

    from fastattn.core.attention import sdpa as torch_sdpa
    from fastattn.integrations import huggingface

    monkeypatch.setattr(mlp_forms, "mlp", counted("mlp", mlp_forms.mlp))
    monkeypatch.setattr(mlp_forms, "gated_mlp", counted("mlp", mlp_forms.gated_mlp))
    for place in (torch_sdpa, huggingface):
        monkeypatch.setattr(place, "attention", counted("attention", place.attention))
    return counts


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_computes_the_same_by_the_fused_functions(
    name: str, training: bool, calls: dict[str, int]
) -> None:
    model = build(name).train(training)
    expected = step(model, batch())
    report = fastattn.patch(model)
    assert not report.left, str(report)
    calls.update(mlp=0, attention=0)
    assert_same(step(model, batch()), expected)
    assert (calls["mlp"], calls["attention"]) == FUSED[name]


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_exactly(name: str) -> None:
    model = build(name)
    before, expected = anatomy(model), step(model, batch())
    fastattn.patch(model)
    assert anatomy(model) != before
    fastattn.unpatch(model)
    assert anatomy(model) == before
    again = step(model, batch())
    assert all(torch.equal(a, e) for a, e in zip((again[0], *again[1]), (expected[0], *expected[1]), strict=True))
    fastattn.unpatch(model)
    assert anatomy(model) == before


def test_a_patch_ends_with_its_block_errors_or_not() -> None:
    model = build("encoder")
    before = anatomy(model)
    with pytest.raises(KeyError), fastattn.patch(model) as report:
        assert report.swapped and anatomy(model) != before
        raise KeyError
    assert anatomy(model) == before


@pytest.mark.parametrize("name", ["sequences", "encoder", "llama"])
def test_parameters_optimisers_and_state_dicts_go_on(name: str) -> None:
    def train(model: nn.Module, patch_at: int | None) -> list[Tensor]:
        optimiser, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
        for i in range(4):
            if i == patch_at:
                keys, objects = list(model.state_dict()), [id(p) for p in model.parameters()]
                fastattn.patch(model)
                assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == objects
                model.load_state_dict(model.state_dict())
            loss = model(batch()).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        return losses

    torch.testing.assert_close(train(build(name), 2), train(build(name), None), rtol=1e-5, atol=1e-6)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", ["sequences", "encoder", "llama"])
def test_copies_are_patched_too_and_unpatch_on_their_own(name: str, way: str) -> None:
    model = build(name)
    before = [row[:3] for row in anatomy(model)]
    expected = step(model, batch())
    fastattn.patch(model)
    twin = COPIES[way](model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert_same(step(twin, batch()), expected)
    fastattn.unpatch(twin)
    assert [row[:3] for row in anatomy(twin)] == before
    assert all(row.why == "already patched" for row in fastattn.patch(model).rows)


def test_a_pickled_model_of_hugging_face_finds_its_attention_in_another_process(tmp_path) -> None:
    model = transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1, eos_token_id=None)
    )
    fastattn.patch(model)
    torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); m(torch.arange(5)[None]); "
        "print(m.config._attn_implementation, type(m.h[0].mlp).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.stdout.split() == ["fastattn", "FusedGPT2MLP"], done.stderr


@pytest.mark.parametrize("name", ["sequences", "encoder", "gpt2"])
def test_a_patched_model_compiles_whole(name: str) -> None:
    model = build(name).eval()
    expected = step(model, batch())
    fastattn.patch(model)
    assert_same(step(torch.compile(model, fullgraph=True, backend="aot_eager"), batch()), expected)


def test_a_model_compiled_before_is_compiled_anew() -> None:
    model = build("sequences")
    compiled = torch.compile(model, backend="aot_eager")
    expected = step(compiled, batch())
    fastattn.patch(compiled)
    assert type(model.one).__name__ == "FusedSequential"
    assert_same(step(compiled, batch()), expected)


@pytest.mark.parametrize("name", ["sequences", "encoder", "llama"])
def test_autocast_gives_what_it_gave(name: str) -> None:
    model = build(name)
    exact = step(model, batch())[0]
    with torch.autocast("cpu", torch.bfloat16):
        eager = step(model, batch())[0]
        fastattn.patch(model)
        ours = step(model, batch())[0]
    assert ours.dtype == eager.dtype
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_checkpoints_give_the_same_gradients() -> None:
    model = build("encoder")
    fastattn.patch(model)
    expected = step(model, batch())
    actual = step(Checkpointed(model), batch())
    assert all(torch.equal(a, e) for a, e in zip(actual[1], expected[1], strict=True))


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_a_patched_model_can_be_sharded() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    def shard(model: nn.Module) -> None:
        for part in (*getattr(model, "layers", model.children()), model):
            fully_shard(part, mesh=mesh)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for name in ("encoder", "sequences"):
            model = build(name)
            expected = step(model, batch())[0]
            fastattn.patch(model)
            shard(model)
            out = model(batch())
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            out.sum().backward()
            assert all(p.grad is not None for p in model.parameters())
            with pytest.raises(RuntimeError, match="changed after patch"):
                fastattn.unpatch(model)
            later = build(name)
            shard(later)
            report = fastattn.patch(later)
            assert report.left and not report.swapped
    finally:
        dist.destroy_process_group()


def test_hooks_on_the_modules_and_inside_them_are_called() -> None:
    model, seen = build("sequences"), []
    expected = step(model, batch())
    model.one.register_forward_hook(lambda *_: seen.append("one"))
    fastattn.patch(model)
    handle = model.one[0].register_forward_hook(lambda *_: seen.append("inside"))
    assert_same(step(model, batch()), expected)
    assert seen == ["inside", "one"]
    handle.remove()
    seen.clear()
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module))):
        assert_same(step(model, batch()), expected)
    assert seen.count(nn.Linear) == 7


def test_dropout_inside_is_left_to_pytorch_in_training_and_fused_in_eval_mode(calls: dict[str, int]) -> None:
    model = Residual(dropout=0.5)
    torch.manual_seed(3)
    expected = model(batch())
    report = fastattn.patch(model)
    (note,) = [row.why for row in report.rows if row.name == "one"]
    assert note == "in eval mode; in training PyTorch computes it: dropout 0.5 inside"
    calls.update(mlp=0)
    torch.manual_seed(3)
    torch.testing.assert_close(model(batch()), expected)
    assert calls["mlp"] == 2
    model.eval()(batch())
    assert calls["mlp"] == 5


def test_padded_batches_that_torch_makes_nested_give_the_same() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    hidden = torch.arange(7) >= torch.tensor([[7], [4]])
    with torch.no_grad():
        expected = model(batch(), src_key_padding_mask=hidden)
        fastattn.patch(model)
        actual = model(batch(), src_key_padding_mask=hidden)
    torch.testing.assert_close(actual[~hidden], expected[~hidden], rtol=1e-4, atol=1e-5)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *arguments: Any, **options: Any) -> Any:
        return super().forward(*arguments, **options)


class OwnSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Doubled(nn.Module):
    """The names of a gated MLP, and another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Noisy(Doubled):
    """A gated MLP in eval mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y + torch.randn_like(y) if self.training else y


class PackedLinear(nn.Linear):
    """Derived from Linear with another formula, like the quantised layers of other libraries."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class PackedWeight(Tensor):
    pass


def sequence(*middle: nn.Module, first: nn.Module | None = None, **options: Any) -> nn.Sequential:
    return nn.Sequential(first or nn.Linear(8, 8, **options), *(middle or [nn.GELU()]), nn.Linear(8, 8, **options))


def with_packed_weight() -> nn.Module:
    model = sequence()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(PackedWeight))
    return model


def hooked() -> nn.Module:
    model = sequence()
    model[2].register_forward_pre_hook(lambda *_: None)
    return model


def replaced(model: nn.Module) -> nn.Module:
    model.forward = model.forward
    return model


def patched(model: nn.Module) -> nn.Module:
    fastattn.patch(model)
    return model


def quantised() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(sequence(nn.ReLU()), {nn.Linear})


def hugging_face(kind: str, **options: Any) -> nn.Module:
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SIZES, **options))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def own_bigbird() -> nn.Module:
    from transformers.models.big_bird import modeling_big_bird

    class OwnBigBirdAttention(modeling_big_bird.BigBirdSelfAttention):
        """A derived class: its code may be another."""

    return OwnBigBirdAttention(transformers.BigBirdConfig(**SIZES))


LEFT = {
    "patched before, an MLP": (lambda: patched(sequence()), "already patched"),
    "patched before, attention": (lambda: patched(nn.MultiheadAttention(8, 1)), "already patched"),
    "patched before, Hugging Face": (lambda: patched(hugging_face("Llama")), "already patched"),
    "fastattn's own": (lambda: fastattn.nn.MultiheadAttention(8, 1), "fastattn's own"),
    "meta MLP": (lambda: on_meta(sequence), "meta device"),
    "meta attention": (lambda: on_meta(lambda: nn.MultiheadAttention(8, 1)), "meta device"),
    "meta Hugging Face": (lambda: on_meta(lambda: hugging_face("Llama")), "meta device"),
    "quantised": (quantised, "Linear is not torch.nn.Linear"),
    "quantised by inheritance": (lambda: sequence(first=PackedLinear(8, 8)), "PackedLinear is not"),
    "quantised weight": (with_packed_weight, "a weight of type PackedWeight"),
    "parametrised": (
        lambda: sequence(first=nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
        "ParametrizedLinear is not torch.nn.Linear",
    ),
    "complex weights": (lambda: sequence().to(torch.complex64), "torch.complex64"),
    "attention subclass": (lambda: OwnAttention(8, 1), "OwnAttention is a subclass"),
    "sequence subclass": (lambda: OwnSequential(*sequence()), "OwnSequential is a subclass"),
    "forward replaced, MLP": (lambda: replaced(sequence()), "forward was replaced"),
    "forward replaced, inside": (lambda: sequence(first=replaced(nn.Linear(8, 8))), "another forward"),
    "forward replaced, attention": (lambda: replaced(nn.MultiheadAttention(8, 1)), "forward was replaced"),
    "hooks inside": (hooked, "the Linear inside has a forward hook"),
    "unknown activation": (lambda: sequence(nn.Tanh()), "activation Tanh is not one of gelu"),
    "another dropout": (lambda: sequence(nn.ReLU(), nn.FeatureAlphaDropout(0.1)), None),
    "layers in two dtypes": (lambda: sequence(first=nn.Linear(8, 8).double()), "dtypes"),
    "another formula": (Doubled, "computes more than this MLP, or something else"),
    "Hugging Face without dispatch": (lambda: hugging_face("BigBird").embeddings, None),
    "BigBird subclass": (own_bigbird, "OwnBigBirdAttention is a subclass"),
    "BigBird on meta": (lambda: on_meta(lambda: hugging_face("BigBird").encoder), "meta device"),
    "weights asked for": (
        lambda: hugging_face("Llama", attn_implementation="eager", output_attentions=True), "asks for weights"
    ),
}  # fmt: skip


def report_of_nothing(model: nn.Module, patch: Callable) -> Any:
    """The report of a patch that must swap nothing and change nothing."""
    before = anatomy(model)
    report = patch(model)
    assert anatomy(model) == before
    assert not report.swapped
    return report


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_swapped_is_left_and_the_report_says_why(name: str) -> None:
    make, why = LEFT[name]
    model = make()
    mlp = "Llama" not in repr(type(model)) and "BigBird" not in repr(type(model))
    report = report_of_nothing(model, functools.partial(fastattn.patch, mlp=mlp))
    if why is None:
        assert not report.rows
    else:
        assert why in report.left[0].why
        assert "left" in str(report) and report.left[0].why in str(report)


def test_strict_raises_with_every_reason_and_changes_nothing() -> None:
    model = nn.ModuleList([sequence(), sequence(nn.Tanh()), OwnAttention(8, 1), nn.MultiheadAttention(8, 1)])
    fastattn.patch(model[3])
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"(?s)2: OwnAttention.*3: already.*1: the activation Tanh"):
        fastattn.patch(model, strict=True)
    assert anatomy(model) == before
    llama = nn.ModuleList([hugging_face("Llama"), sequence(nn.Tanh())])
    before = anatomy(llama)
    with pytest.raises(ValueError, match="Tanh"):
        fastattn.patch(llama, strict=True)
    assert anatomy(llama) == before
    fastattn.patch(sequence(), strict=True)


def test_only_what_is_asked_for_is_swapped() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 1), sequence(), nn.LayerNorm(8)])
    assert [row.kind for row in fastattn.patch(model, mlp=False).rows] == ["attention"]
    fastattn.unpatch(model)
    assert [row.kind for row in fastattn.patch(model, attention=False).rows] == ["mlp"]
    fastattn.unpatch(model)
    (norm,) = fastattn.patch(model, attention=False, mlp=False, norm=True).rows
    assert (norm.kind, norm.now) == ("norm", "fastattn.nn.LayerNorm")
    with pytest.raises(TypeError, match="model must be"):
        fastattn.patch(torch.relu)


def test_no_class_is_changed_and_no_other_model() -> None:
    other, bystander = build("llama"), build("encoder")
    before = anatomy(other), anatomy(bystander)
    fastattn.patch(build("llama"))
    fastattn.patch(build("encoder"))
    assert (anatomy(other), anatomy(bystander)) == before


def test_the_report_is_a_table_with_like_modules_in_one_line() -> None:
    report = fastattn.patch(nn.ModuleList([sequence(), sequence(), sequence(nn.Tanh())]))
    assert str(report).splitlines()[1].split() == ["*", "x", "2", "mlp", "Sequential", "FusedSequential"]
    assert str(fastattn.patch(nn.Linear(2, 2))).startswith("Nothing in this model")
    rich = pytest.importorskip("rich.console")
    console = rich.Console(record=True, width=200, file=io.StringIO())
    console.print(report)
    assert "FusedSequential" in console.export_text() and "activation Tanh" in report.left[0].why


FORMULAS = {
    "gelu": lambda x: nn.functional.gelu(x),
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x) ** 2,
    "silu": nn.functional.silu,
}


def test_activations_of_hugging_face_are_known_by_what_they_compute() -> None:
    x = torch.linspace(-12, 12, 481, dtype=torch.float64)
    for name in transformers.activations.ACT2CLS:
        if name == "xielu":
            continue
        activation = transformers.activations.ACT2FN[name].double()
        y = activation(x)
        same = {known for known, formula in FORMULAS.items() if (formula(x) - y).abs().max() < 1e-12}
        ours = activation_name(activation)
        assert ours is None or same == {ours}, name
        assert ours is not None or not same, name


def bigbird(kind: str = "BigBirdModel", **options: Any) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.BigBirdConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, vocab_size=50,
        block_size=16, num_random_blocks=2, max_position_embeddings=256, hidden_dropout_prob=0.0,
        **{"attention_probs_dropout_prob": 0.0, "eos_token_id": None, **options},
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def bigbird_step(model: nn.Module, length: int, padded: bool = True, **options: Any) -> list[Tensor]:
    """The model's first output, where it counts, and all gradients."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (2, length), generator=generator)
    seen = (torch.arange(length) < torch.tensor([[length], [length * 3 // 4 if padded else length]])).long()
    out = model(tokens, attention_mask=seen if padded else None, use_cache=False, **options)[0][seen.bool()]
    weights = [w for w in model.parameters() if w.requires_grad]
    loss = (out * torch.cos(3 * torch.arange(out.numel()).view(out.shape))).sum()
    return [out.detach(), *torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)]


SPARSE, FULL = "FusedBigBirdBlockSparseAttention", "FusedBigBirdSelfAttention"
# Which attention a model has, how long its input is, and what computes it when patched, before and after.
BIGBIRDS = {
    "sparse": ({}, 208, SPARSE, SPARSE),
    "switched": ({}, 40, SPARSE, FULL),
    "full": ({"attention_type": "original_full"}, 40, FULL, FULL),
    "causal": ({"attention_type": "original_full", "is_decoder": True}, 40, FULL, FULL),
}


def kinds(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", BIGBIRDS)
def test_a_bigbird_computes_the_same_padded_and_is_restored(name: str, training: bool) -> None:
    options, length, before, after = BIGBIRDS[name]
    theirs = bigbird("BigBirdModel", **options).train(training)
    ours = copy.deepcopy(theirs)
    weights = list(ours.parameters())
    report = fastattn.patch(ours, mlp=False, strict=True)
    assert [row.now for row in report.rows] == [before] * 2
    for padded in (True, False):
        for a, e in zip(bigbird_step(ours, length, padded), bigbird_step(theirs, length, padded), strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=2e-5 * max(1.0, float(e.abs().max())))
    # Short inputs have switched the model.
    assert [type(layer.attention.self).__name__ for layer in ours.encoder.layer] == [after] * 2
    assert all(a is b for a, b in zip(weights, ours.parameters(), strict=True))
    again = fastattn.patch(ours, mlp=False)
    assert [row.why for row in again.rows] == ["already patched"] * 2
    fastattn.unpatch(ours)
    assert kinds(ours) == kinds(theirs)
    assert [sorted(module.__dict__) for module in ours.modules()] == [
        sorted(module.__dict__) for module in theirs.modules()
    ]


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
def test_a_bigbird_reads_its_padding_once_and_gives_no_bias_where_lengths_say_it(padding: str) -> None:
    from fastattn.dropin import bigbird as fused

    place = torch.arange(208)
    seen = {"none": place >= 0, "right": place < 150, "left": place >= 30, "holes": place % 7 > 0}[padding]
    seen = torch.stack((seen, place >= 0)).long()
    theirs = bigbird().eval()
    ours = copy.deepcopy(theirs)
    fastattn.patch(ours, mlp=False, strict=True)
    tokens = torch.randint(0, 50, (2, 208))
    with (
        mock.patch.object(fused, "attention", wraps=fused.attention) as calls,
        mock.patch.object(fused, "_lengths", wraps=fused._lengths) as reads,
    ):
        with torch.inference_mode():
            ours(tokens, attention_mask=seen)
        reads.reset_mock(), calls.reset_mock()
        out = ours(tokens, attention_mask=seen)[0]
    beside = {"none": set(), "right": {"key_lengths"}}.get(padding, {"bias"})
    assert [set(call.kwargs) - {"mask", "scale"} for call in calls.call_args_list] == [beside] * 2
    assert reads.call_count == 1
    out.sum().backward()  # what was read in inference mode serves training
    where = seen.bool()
    torch.testing.assert_close(out[where], theirs(tokens, attention_mask=seen)[0][where], rtol=0, atol=1e-4)


def test_a_bigbird_decoder_attends_across_and_generates_the_same_with_its_cache(calls: dict[str, int]) -> None:
    options = {"attention_type": "original_full", "is_decoder": True}
    prompt = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    seen = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    other = {"encoder_hidden_states": torch.randn(2, 7, 32),
             "encoder_attention_mask": (torch.arange(7) < torch.tensor([[7], [3]])).long()}  # fmt: skip
    theirs = bigbird("BigBirdForCausalLM", add_cross_attention=True, **options).eval()
    ours = copy.deepcopy(theirs)
    assert len(fastattn.patch(ours, mlp=False, strict=True).swapped) == 4
    for more in ({}, other):
        for a, e in zip(bigbird_step(ours, 30, **more), bigbird_step(theirs, 30, **more), strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=2e-5 * max(1.0, float(e.abs().max())))
        generate = {"attention_mask": seen, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **more}
        before = calls["attention"]
        assert torch.equal(ours.generate(prompt, **generate), theirs.generate(prompt, **generate))
        # The prompt; steps of one token go to PyTorch's kernel, past the host time of `attention`.
        assert calls["attention"] - before == (4 if more else 2)


@pytest.mark.parametrize("attention_type", ["block_sparse", "original_full"])
def test_a_bigbird_asked_for_its_weights_gives_them(attention_type: str) -> None:
    theirs = bigbird(attention_type=attention_type).eval()
    ours = copy.deepcopy(theirs)
    fastattn.patch(ours, mlp=False)
    tokens = torch.randint(0, 50, (1, 208))
    by_argument = [model(tokens, output_attentions=True).attentions for model in (ours, theirs)]
    ours.config.output_attentions = theirs.config.output_attentions = True
    for a, e in (by_argument, [model(tokens).attentions for model in (ours, theirs)]):
        assert len(a) == len(e) == 2
        torch.testing.assert_close(a, e)


def test_a_full_bigbird_drops_weights_in_training_by_torchs_generator() -> None:
    model = bigbird(attention_type="original_full", attention_probs_dropout_prob=0.5).train()
    fastattn.patch(model, mlp=False)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(bigbird_step(model, 40)[0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    model.eval()
    assert torch.equal(bigbird_step(model, 40)[0], bigbird_step(model, 40)[0])


# Norms. How many each model has; they compute alone, by the kernels.
NORMS = {"sequences": 1, "encoder": 4, "encoder and decoder": 12, "gpt2": 5, "llama": 5, "gemma3": 13, "bert": 5,
         "t5": 12}  # fmt: skip


def patch_norms(model: nn.Module, **options: Any) -> Any:
    return fastattn.patch(model, attention=False, mlp=False, norm=True, **options)


@pytest.mark.parametrize("name", NORMS)
def test_norms_compute_the_same_by_the_fused_functions_and_are_restored(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    before, expected = anatomy(model), step(model, batch())
    report = patch_norms(model, strict=True)
    assert [row.kind for row in report.swapped] == ["norm"] * NORMS[name]
    counted = []
    own = NormPlan.forward
    monkeypatch.setattr(NormPlan, "forward", lambda *a: counted.append(1) or own(*a))
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    assert_same(step(model, batch()), expected)
    assert len(counted) == NORMS[name]
    monkeypatch.setenv("FASTATTN_BACKEND", "")
    assert_same(step(model, batch()), expected)
    fastattn.unpatch(model)
    assert anatomy(model) == before


def norm_of(model: str, kind: str) -> nn.Module:
    norm = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), kind)(48)
    nn.init.normal_(norm.weight)
    return norm


KNOWN_NORMS = {
    ("llama", "LlamaRMSNorm"): (False, 0.0),
    ("mistral", "MistralRMSNorm"): (False, 0.0),
    ("qwen3", "Qwen3RMSNorm"): (False, 0.0),
    ("gpt_oss", "GptOssRMSNorm"): (False, 0.0),
    ("t5", "T5LayerNorm"): (False, 0.0),
    ("gemma2", "Gemma2RMSNorm"): (False, 1.0),
    ("gemma3", "Gemma3RMSNorm"): (False, 1.0),
    ("cohere", "CohereLayerNorm"): (True, 0.0),
}


@pytest.mark.parametrize("kind", KNOWN_NORMS, ids=lambda kind: kind[1])
def test_norms_of_hugging_face_are_known_by_what_they_compute(kind: tuple[str, str]) -> None:
    norm = norm_of(*kind)
    assert patch_norms(norm).rows[0].now == f"Fused{kind[1]}"
    assert (norm.names.centred, norm.names.weight_offset) == KNOWN_NORMS[kind]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KNOWN_NORMS, ids=lambda kind: kind[1])
def test_patched_norms_are_as_exact_in_half_precision_as_they_were(
    kind: tuple[str, str], dtype: torch.dtype
) -> None:
    norm, x, dy = norm_of(*kind).to(dtype), torch.randn(9, 48).to(dtype), torch.randn(9, 48).to(dtype)

    def run(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.detach().to(dtype).requires_grad_()
        out = module(leaf)
        assert out.dtype == dtype
        return [out.detach(), *torch.autograd.grad(out, [leaf, module.weight], dy.to(dtype))]

    eager = run(norm, dtype)
    precise = copy.deepcopy(norm).double()
    # They compute in float32 whatever they are given.
    patch_norms(precise), patch_norms(norm)
    exact = run(precise, torch.float64)
    for i, (a, x_, e) in enumerate(zip(run(norm, dtype), exact, eager, strict=True)):
        assert_as_exact_as_eager(a, x_, e, gradient=i > 0)


def test_a_norm_of_another_dtype_than_its_input_keeps_its_own_ways() -> None:
    norm, x = norm_of("llama", "LlamaRMSNorm"), torch.randn(3, 48, dtype=torch.bfloat16)
    expected = norm(x)
    patch_norms(norm)
    assert norm(x).dtype == torch.float32 and torch.equal(norm(x), expected)


class SquaredRMSNorm(nn.Module):
    """The name and the parts of an RMS norm, and another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class TimidRMSNorm(SquaredRMSNorm):
    """A norm, but not with the epsilon it names."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1.2 * self.eps).sqrt() * self.weight


class GatedRMSNorm(SquaredRMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return nn.functional.silu(gate) * super().forward(x)


class ClampedLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


def with_packed_norm() -> nn.Module:
    norm = nn.LayerNorm(8)
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(PackedWeight))
    return norm


LEFT_NORMS = {
    "patched before": (lambda: patch_norms(nn.LayerNorm(8)).model, "already patched"),
    "patched before, Hugging Face": (lambda: patch_norms(norm_of("t5", "T5LayerNorm")).model, "already patched"),
    "fastattn's own": (lambda: fastattn.nn.RMSNorm(8), "fastattn's own"),
    "meta": (lambda: on_meta(lambda: nn.RMSNorm(8)), "meta device"),
    "meta Hugging Face": (lambda: on_meta(lambda: norm_of("llama", "LlamaRMSNorm")), "meta device"),
    "subclass": (lambda: ClampedLayerNorm(8), "ClampedLayerNorm is a subclass with code of its own"),
    "parametrised": (
        lambda: nn.utils.parametrizations.weight_norm(nn.LayerNorm(8), dim=None),
        "ParametrizedLayerNorm is a subclass",
    ),
    "forward replaced": (lambda: replaced(nn.LayerNorm(8)), "forward was replaced"),
    "forward replaced, Hugging Face": (lambda: replaced(norm_of("t5", "T5LayerNorm")), "forward was replaced"),
    "packed weight": (with_packed_norm, "weights are of type PackedWeight"),
    "another formula": (SquaredRMSNorm, "its own code computes another norm"),
    "another epsilon": (TimidRMSNorm, "its own code computes another norm"),
    "another argument": (GatedRMSNorm, "its own code computes another norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_NORMS)
def test_norms_that_cannot_be_swapped_are_left_and_the_report_says_why(name: str) -> None:
    make, why = LEFT_NORMS[name]
    assert why in report_of_nothing(make(), patch_norms).left[0].why


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_patched_norms_unpatch_on_their_own(way: str) -> None:
    model = build("llama")
    before = [row[:3] for row in anatomy(model)]
    expected = step(model, batch())
    patch_norms(model)
    twin = COPIES[way](model)
    assert_same(step(twin, batch()), expected)
    fastattn.unpatch(twin)
    assert [row[:3] for row in anatomy(twin)] == before


@pytest.mark.parametrize("dynamic", [False, True])
def test_patched_norms_compile_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(norm_of("llama", "LlamaRMSNorm"), nn.LayerNorm(48))
    x = torch.randn(3, 48)
    expected = step(model, x)
    patch_norms(model, strict=True)
    assert_same(step(torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic), x), expected)


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
        "ln_3": ("norm", "fastattn.nn.LayerNorm"),
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


def test_a_hugging_face_model_without_attention_has_no_row_for_attention() -> None:
    transformers = pytest.importorskip("transformers")
    vision = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    state = transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    for model in (transformers.ResNetModel(vision), transformers.MambaModel(state)):
        assert [row for row in fastattn.patch(model).rows if row.kind == "attention"] == []
