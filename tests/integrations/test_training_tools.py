"""PEFT, accelerate and DDP do to a model of ours, patched or not, what they do to it without fastattn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from needs_transformers import transformers
from torch import Tensor, nn

import fastattn
import fastattn.integrations.huggingface

IDS = torch.randint(5, 90, (3, 12), generator=torch.Generator().manual_seed(0))
SEEN = torch.ones_like(IDS)
SEEN[1, :4] = SEEN[2, -4:] = 0
SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "bert": (
        "BertForMaskedLM", "BertConfig", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
}  # fmt: skip


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


class Ours(nn.Module):
    """Called as a Hugging Face model is; padding on the left needs a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = fastattn.nn.TransformerModel(
            vocab_size=99, embed_dim=32, num_heads=4, num_layers=2, positions="rotary", mlp="gated", qk_norm=True
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.inner(input_ids),)


def model_of(name: str, implementation: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    if name == "ours":
        return shaken(Ours())
    kind, config, options = CLASSES[name]
    made = getattr(transformers, config)(**SIZES, **options)
    return shaken(getattr(transformers, kind)._from_config(made, attn_implementation=implementation))


Prepare = Callable[[nn.Module], nn.Module]


def in_every_way(name: str, prepare: Prepare) -> dict[str, nn.Module]:
    """The model that a tool prepared: without fastattn, made with it, patched before and patched after."""
    models = {
        way: model_of(name, "fastattn" if way == "made" else "sdpa")
        for way in ("without", "made", "before", "after")
    }
    assert fastattn.patch(models["before"], norm=True).swapped
    models = {way: prepare(model) for way, model in models.items()}
    fastattn.patch(models["after"], norm=True)
    return models


def result(model: nn.Module, gradients: bool = True) -> dict[str, Tensor]:
    """Logits of what is no padding, and every gradient."""
    with torch.set_grad_enabled(gradients):
        logits = model(input_ids=IDS, attention_mask=SEEN)[0][SEEN.bool()]
    if gradients:
        logits.square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def assert_all_equal(models: dict[str, nn.Module], **options: Any) -> None:
    expected = result(models.pop("without"), **options)
    for way, model in models.items():
        actual = result(model, **options)
        assert actual.keys() == expected.keys(), way
        for name, wanted in expected.items():
            torch.testing.assert_close(
                actual[name], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()),
                msg=lambda m, at=(way, name): f"{at}: {m}",
            )  # fmt: skip


ADAPTERS = {
    "lora": {},
    "lora, dora": {"use_dora": True},
    "lora of some": {"target_modules": ["down_proj", "gate_proj", "dense"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", CLASSES)
def test_adapters_of_peft_compute_and_train_as_without_us(name: str, adapter: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"target_modules": "all-linear", "init_lora_weights": False, **ADAPTERS[adapter]}

    def prepare(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, **options))

    assert_all_equal(in_every_way(name, prepare))


def test_adapters_of_peft_on_our_modules_compute_what_they_compute_once_merged() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    parts = ["qkv_proj", "out_proj", "gate", "up", "down"]
    model = peft.get_peft_model(model_of("ours"), peft.LoraConfig(target_modules=parts, init_lora_weights=False))
    adapted = result(model)
    assert len(adapted) == 1 + 2 * 2 * len(parts) and all(g.any() for g in adapted.values())
    torch.testing.assert_close(result(model.merge_and_unload(), False)["logits"], adapted["logits"])


@pytest.mark.parametrize(
    ("name", "where"),
    [("llama", "cpu"), ("llama", "hooks"), ("bert", "disk"), ("bert", "hooks"), ("ours", "cpu"), ("ours", "disk")],
)
def test_offloaded_models_compute_as_without_us(name: str, where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Doubled(accelerate.hooks.ModelHook):  # type: ignore[name-defined, misc]
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output * 2

    def prepare(model: nn.Module) -> nn.Module:
        if where == "cpu":
            return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        if where == "disk":
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
        for part in model.modules():
            if isinstance(part, nn.Linear):
                accelerate.hooks.add_hook_to_module(part, Doubled())
        return model

    ours = {"without": model_of(name), "offloaded": prepare(model_of(name))}
    assert_all_equal(ours if name == "ours" else in_every_way(name, prepare), gradients=False)


WAYS = ("without", "before", "after")


def _train(rank: int, folder: str) -> None:
    """Each way, three steps on this process's rows; the first process leaves what the parameters became."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/start", rank=rank, world_size=2)
    torch.set_num_threads(1)
    rows = slice(rank, rank + 2)
    for way in WAYS:
        model = model_of("llama").train()
        if way == "before":
            fastattn.patch(model, norm=True)
        parallel = nn.parallel.DistributedDataParallel(model)
        if way == "after":
            fastattn.patch(parallel, norm=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            parallel(input_ids=IDS[rows], attention_mask=SEEN[rows]).logits.square().mean().backward()
            optimizer.step()
        if rank == 0:
            torch.save(model.state_dict(), f"{folder}/{way}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_a_patched_model_as_without_us(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train, args=(str(tmp_path),), nprocs=2)
    expected, *others = (torch.load(tmp_path / way) for way in WAYS)
    for found in others:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
