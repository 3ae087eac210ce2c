"""Hugging Face's causal language models whose loss, in training, never sees its logits. `fastattn.patch(model,
loss=True)` swaps it in.

A call in training mode with labels computes the base model, and from its last hidden states the loss by
`fastattn.linear_cross_entropy`; `logits` of the output is None. Every other call runs the model's own code.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastattn.core.intact import alteration
from fastattn.core.loss.functional import linear_cross_entropy, loss_of_logits
from fastattn.dropin.fused_classes import Fused
from fastattn.integrations import huggingface_models

# Arguments of a call that is fused. A call with another one may ask for something that this file does not know.
BASE = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache",
    "cache_position", "token_type_ids", "output_attentions", "output_hidden_states",
)  # fmt: skip
LOSS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index")
UNSET = (None, False)
TRIAL_SHAPE = 2, 9


class Names(NamedTuple):
    """The positional parameters of the model's own forward, and what it does to its logits: a cap, then a division
    by the temperature."""

    parameters: tuple[str, ...]
    softcap: float | None
    temperature: float


class FusedCausalLoss(Fused):
    """A causal language model; `names` are its Names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = _arguments(self, args, kwargs) if self.training and not self.is_outdated() else None
        return super().forward(*args, **kwargs) if given is None else causal_loss(self, given)


def causal_loss(model: Any, given: dict[str, Any]) -> Any:
    """The output of a call with labels, without logits."""
    base = model.base_model(**{name: t for name, t in given.items() if name not in LOSS})
    loss = _loss(model, base.last_hidden_state, given)
    return CausalLMOutputWithPast(
        loss=loss,  # type: ignore[arg-type]
        past_key_values=base.past_key_values,
        hidden_states=base.hidden_states,
        attentions=base.attentions,
    )


def _loss(model: Any, x: Tensor, given: dict[str, Any]) -> Tensor:
    """As transformers' ForCausalLMLoss, in float32: the mean over the tokens that count, or their sum over
    `num_items_in_batch`."""
    count, shifted = given.get("num_items_in_batch"), given.get("shift_labels")
    options: dict[str, Any] = {
        "ignore_index": given.get("ignore_index", -100),
        "reduction": "mean" if count is None else "sum",
        "softcap": model.names.softcap,
        "temperature": model.names.temperature,
        "shift": shifted is None,
    }
    target = (given["labels"] if shifted is None else shifted).to(x.device).view(x.shape[:-1])
    head = model.get_output_embeddings()
    if alteration(head, nn.Linear, x):
        loss = loss_of_logits(head(x), target, **options)
    else:
        loss = linear_cross_entropy(x, head.weight, target, linear_bias=head.bias, **options)
    loss = loss.float()
    return loss if count is None else loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def _arguments(model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by name; None if the model's own code must run."""
    if len(args) > len(model.names.parameters):
        return None
    given = {**dict(zip(model.names.parameters, args, strict=False)), **kwargs}
    # logits_to_keep=0 keeps all; return_dict=True is what is returned anyway.
    keep, as_dict = given.pop("logits_to_keep", 0), given.pop("return_dict", None)
    others = [name for name, t in given.items() if name not in (*BASE, *LOSS) and not _is_unset(t)]
    given = {name: t for name, t in given.items() if name in (*BASE, *LOSS) and t is not None}
    plain = isinstance(keep, int) and keep == 0 and (as_dict or (as_dict is None and _returns_dict(model)))
    fits = plain and not others and isinstance(given.get("labels"), Tensor)
    return given if fits and model.loss_function is ForCausalLMLoss else None


def _is_unset(value: Any) -> bool:
    return any(value is unset for unset in UNSET)


def _returns_dict(model: Any) -> bool:
    return bool(getattr(model.config, "return_dict", True))


def names_of(model: Any) -> Names:
    """By the names that transformers' configurations have for it. The trial shows whether that is all."""
    config, own = model.config, inspect.signature(type(model).forward).parameters.values()
    cap, scale = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)
    temperature = getattr(config, "logits_scaling", None) or (1 / scale if scale else 1.0)
    positional = tuple(p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self")
    return Names(positional, None if cap is None else float(cap), float(temperature))


def obstacle(model: Any) -> str | None:
    """Why the loss of this model is left to its own code; None if it can be computed without logits."""
    parameters = inspect.signature(type(model).forward).parameters
    if "labels" not in parameters or getattr(model, "base_model", model) is model:
        return "it is no language model with labels around a base model"
    if model.loss_function is not ForCausalLMLoss:
        return "its loss is not the cross-entropy of the next token"
    if "output_router_logits" in parameters:
        return "its loss may have a term for its router"
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        return "its last layer is not one torch.nn.Linear"
    return huggingface_models.not_tried(model)


def trial(model: Any) -> str | None:
    """How the fused loss differs from the model's own on random tokens; None if it does not.

    The model's own code gets large random logits instead of its last layer's, so that a cap or a scale shows; and
    the last layer's input must be what the base model returns.
    """
    device = model.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
        return _trial(model, device)


def _trial(model: Any, device: torch.device) -> str | None:
    head, names = model.get_output_embeddings(), names_of(model)
    tokens = torch.randint(model.config.vocab_size, TRIAL_SHAPE, device=device)
    labels = tokens.clone()
    labels[0, :3] = -100
    logits = 20 * torch.randn(*TRIAL_SHAPE, head.weight.shape[0], device=device)
    seen: list[Tensor] = []

    def replace(_module: nn.Module, args: tuple, result: Tensor) -> Tensor:
        seen.append(args[0])
        return logits.to(result.dtype)

    with huggingface_models.untouched(model):
        handle = head.register_forward_hook(replace)
        try:
            own = model(input_ids=tokens, labels=labels, use_cache=False).loss
        finally:
            handle.remove()
        x = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    asked: dict[str, Any] = {"softcap": names.softcap, "temperature": names.temperature, "shift": True}
    ours = loss_of_logits(logits.to(x.dtype), labels, **asked)
    eps = max(torch.finfo(t.dtype).eps for t in (x, own))
    if len(seen) != 1 or seen[0].shape != x.shape or not torch.allclose(seen[0], x, rtol=64 * eps, atol=64 * eps):
        return "its last layer reads something else than what its base model returns"
    if not torch.allclose(ours.float(), own.float(), rtol=64 * eps):
        return "its own code computes another loss of its logits"
    return None
