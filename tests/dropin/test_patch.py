"""fastattn.patch: a model computes the same, keeps its parameters, hooks and classes, and can be taken back."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from patched_models import (
    COPIES,
    FUSED,
    MODELS,
    SIZES,
    WIDTH,
    Doubled,
    PackedLinear,
    PackedWeight,
    Residual,
    anatomy,
    assert_same,
    batch,
    build,
    on_meta,
    replaced,
    report_of_nothing,
    sequence,
    step,
    transformers,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.dropin.mlp_forms import activation_name


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


def with_packed_weight() -> nn.Module:
    model = sequence()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(PackedWeight))
    return model


def hooked() -> nn.Module:
    model = sequence()
    model[2].register_forward_pre_hook(lambda *_: None)
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


def test_a_hugging_face_model_without_attention_has_no_row_for_attention() -> None:
    from needs_transformers import transformers

    vision = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    state = transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    for model in (transformers.ResNetModel(vision), transformers.MambaModel(state)):
        assert [row for row in fastattn.patch(model).rows if row.kind == "attention"] == []
