"""patch(model, loss=True): Hugging Face's causal models train with their own loss, and without logits."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from needs_transformers import transformers
from torch import nn

import fastattn
from fastattn.dropin import causal_loss

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 71, "pad_token_id": 0,
}  # fmt: skip
# Gemma 2 caps its logits, Granite and Cohere scale them, Phi has a bias.
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=71, bos_token_id=1, eos_token_id=2)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8)
    ),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=3.0)),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.25)),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**{**SIZES, "num_key_value_heads": 4})),
}


def model_and_tokens(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    # Weights of a trained model's size: logits that a cap and a scale change.
    model.get_output_embeddings().weight.data.normal_()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train(), torch.randint(3, 71, (2, 9))


def results(model: nn.Module, **call) -> list[torch.Tensor]:
    loss = model(**call).loss
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [loss.detach(), *(g for g in gradients if g is not None)]


def assert_alike(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """transformers takes its losses in float32, whatever the model's dtype."""
    for ours, theirs in zip(found, expected, strict=True):
        error = torch.linalg.vector_norm(ours.double() - theirs.double())
        assert error <= 16 * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(theirs.double())


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_its_gradients_are_the_model_s_own_and_there_are_no_logits(name: str) -> None:
    model, tokens = model_and_tokens(name)
    labels = tokens.clone()
    labels[0, 2:5] = -100
    seen = torch.ones_like(tokens)
    seen[1, 7:] = 0
    calls = (
        {"labels": labels},
        {"labels": labels, "attention_mask": seen, "num_items_in_batch": 5},
        {"labels": labels, "num_items_in_batch": torch.tensor(5)},
        {"labels": labels, "shift_labels": labels.roll(-1, 1)},
    )
    expected = [results(model, input_ids=tokens, **call) for call in calls]
    report = fastattn.patch(model, attention=False, mlp=False, loss=True, strict=True)
    assert [row.kind for row in report.swapped] == ["loss"]
    for call, theirs in zip(calls, expected, strict=True):
        assert_alike(results(model, input_ids=tokens, **call), theirs)
    with mock.patch.object(causal_loss, "loss_of_logits", side_effect=AssertionError):
        assert model(tokens, labels=labels).logits is None


@pytest.mark.parametrize(
    "call",
    [{}, {"return_dict": False}, {"logits_to_keep": 3}, {"output_router_logits": True}],
    ids=["without labels", "a tuple", "some logits", "an argument that nobody knows"],
)
def test_other_calls_run_the_model_s_own_code(call: dict) -> None:
    model, tokens = model_and_tokens("llama")
    call = call and {**call, "labels": tokens[:, -3:] if "logits_to_keep" in call else tokens}
    expected = model(tokens, **call)
    fastattn.patch(model, attention=False, mlp=False, loss=True)
    with mock.patch.object(causal_loss, "causal_loss", side_effect=AssertionError):
        found = model(tokens, **call)
    pairs = zip(*((r if isinstance(r, tuple) else r.to_tuple())[:2] for r in (found, expected)), strict=True)
    for ours, theirs in pairs:
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs)


def test_patching_draws_no_random_numbers_and_leaves_the_mode_alone() -> None:
    model, _ = model_and_tokens("llama")
    state = torch.get_rng_state()
    fastattn.patch(model, attention=False, mlp=False, loss=True, strict=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_in_eval_mode_there_are_logits() -> None:
    model, tokens = model_and_tokens("llama")
    fastattn.patch(model, attention=False, mlp=False, loss=True)
    assert model.eval()(tokens, labels=tokens).logits.shape == (2, 9, 71)


def test_a_hook_on_the_last_layer_is_obeyed() -> None:
    model, tokens = model_and_tokens("llama")
    model.lm_head.register_forward_hook(lambda module, args, result: result * 2)
    expected = results(model, input_ids=tokens, labels=tokens)
    fastattn.patch(model, attention=False, mlp=False, loss=True, strict=True)
    assert_alike(results(model, input_ids=tokens, labels=tokens), expected)


class OtherLoss(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + 1e-3 * output.logits.square().mean()
        return output


class OtherInput(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        handle = self.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        try:
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)
        finally:
            handle.remove()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OtherLoss(transformers.LlamaConfig(**SIZES)), "another loss of its logits"),
        (lambda: OtherInput(transformers.LlamaConfig(**SIZES)), "reads something else"),
        (
            lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=2)),
            "router",
        ),
        (lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)), "no language model with labels"),
        (
            lambda: transformers.BertForMaskedLM(transformers.BertConfig(**{**SIZES, "num_attention_heads": 4})),
            "not the cross-entropy of the next token",
        ),
    ],
)
def test_models_that_compute_something_else_are_left_with_the_reason(make, reason: str) -> None:
    model = make()
    kind = type(model)
    report = fastattn.patch(model, attention=False, mlp=False, loss=True)
    assert type(model) is kind and reason in report.left[0].why
    with pytest.raises(ValueError, match="strict=True"):
        fastattn.patch(model, attention=False, mlp=False, loss=True, strict=True)


@pytest.mark.parametrize("first", ["loss", "attention", "both"])
def test_loss_and_attention_are_swapped_in_any_order_and_taken_back(first: str) -> None:
    model, tokens = model_and_tokens("llama")
    kind, was = type(model), model.config._attn_implementation
    both = {"mlp": False, "attention": True, "loss": True}
    if first != "both":
        other = "attention" if first == "loss" else "loss"
        fastattn.patch(model, **{**both, other: False})
        again = fastattn.patch(model, **both)
        assert {row.kind: row.why for row in again.left} == {first: "already patched"}
    else:
        fastattn.patch(model, **both)
    assert isinstance(model, causal_loss.FusedCausalLoss) and model.config._attn_implementation == "fastattn"
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(tokens, labels=tokens).loss, model(tokens, labels=tokens).loss)
        fastattn.unpatch(copied)
        assert type(copied) is kind
    fastattn.unpatch(model)
    assert type(model) is kind and model.config._attn_implementation == was
    assert model(tokens, labels=tokens).logits is not None
