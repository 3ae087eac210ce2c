"""Which Hugging Face models compute the same with attn_implementation="fastattn", and why another does not.

Importing this wraps the method by which transformers' models check an attn_implementation
(`PreTrainedModel.get_correct_attn_implementation`): a model that cannot use "fastattn" says so when it is made.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

NAME = "fastattn"

# Keywords that `fastattn_attention` computes with.
SERVED = frozenset({
    "attention_mask", "dropout", "scaling", "is_causal", "softcap", "s_aux", "sinks", "position_bias",
    "cu_seq_lens_q", "cu_seq_lens_k", "indices", "block_indices", "output_attentions",
})  # fmt: skip

# Keywords that change nothing in an attention function, by the reason. That eager attention reads none of them is
# tested with all of transformers' modelling code.
_HARMLESS_BECAUSE = {
    "given by position as well": ("query", "key", "value"),
    "the mask says the same": (
        "sliding_window", "attention_chunk_size", "encoder_attention_mask", "decoder_attention_mask",
        "padding_mask", "merged_attention_mask", "mask", "prompt_mask", "prompt_cross_attn_mask",
        "text_cross_attn_mask", "vision_cross_attn_mask", "query_length",
    ),
    "cu_seq_lens_q and cu_seq_lens_k say the same": ("max_length_q", "max_length_k"),
    "applied to query and key before; the mask says which tokens are packed together": (
        "position_ids", "decoder_position_ids", "position_embeddings", "spatial_position_embeddings",
        "relative_position_embeddings", "query_position_embeddings", "object_queries_position_embeddings",
        "vision_pos_encoding", "query_pos", "freqs_ci", "image_position_ids", "video_position_ids",
    ),
    "of the convolutions, recurrences or deformable samplings beside attention": (
        "seq_idx", "cache_params", "padding_cache", "conv_mask", "conv_attention_mask", "sub_sampled_lengths",
        "reference_points", "spatial_shapes", "spatial_shapes_list", "level_start_index", "is_first", "t_cond",
    ),
    "a hint to another kernel that changes no result": ("deterministic", "kernel_options"),
    "the model splits its sequences by it before it attends": ("cu_seqlens", "max_seqlen", "grid_thw"),
    "query, key and value were computed from it": (
        "hidden_state", "hidden_states", "key_hidden_states", "value_hidden_states", "key_value_states",
        "encoder_hidden_states", "encoder_outputs", "token_hidden_states", "global_hidden_states",
        "shared_kv_states", "text_features", "vision_feats", "vision_features", "prompt_feats",
        "past_key_values", "past_key_value", "use_cache", "cache_position",
    ),
    "an input or an option of the whole model": (
        "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels", "num_items_in_batch",
        "output_hidden_states", "output_router_logits", "return_dict", "layer_idx", "logits_to_keep",
        "token_type_ids", "mm_token_type_ids", "mm_encoder_outputs", "interpolate_pos_encoding", "pixel_values",
        "pixel_values_videos", "pixel_mask", "image_sizes", "image_grid_thw", "video_grid_thw", "image_embeds",
        "image_embeds_position_mask", "flattened_patches", "num_frames_per_video", "input_features",
        "input_features_mask", "feature_attention_mask", "audio_feature_lengths", "chunk_sample_lengths",
        "audio_input_ids", "audio_input_ids_mask", "use_audio_in_video", "video_second_per_grid",
        "protein_input_ids", "protein_attention_mask", "pair_attention_mask",
    ),
}  # fmt: skip
HARMLESS = {name: reason for reason, names in _HARMLESS_BECAUSE.items() for name in names}

# Keywords that change the result and are not computed, each with what to do.
REFUSED = {
    "cache": 'continuous batching keeps keys in pages: use attn_implementation="sdpa" there',
    "head_mask": 'a factor for each head is not computed: use attn_implementation="eager"',
} | dict.fromkeys(
    ("band_mask", "from_mask", "to_mask", "from_blocked_mask", "to_blocked_mask"),
    "BigBird's sparse attention: fastattn.patch swaps BigBird's own modules",
)


def check_keywords(module: Any, keywords: dict[str, Any]) -> None:
    """Raise a ValueError for keywords that could change the result and are not computed with."""
    for name, value in keywords.items():
        if value is None or name in HARMLESS:
            continue
        hint = REFUSED.get(name, f'use attn_implementation="eager", or leave {name} out if nothing needs it')
        raise ValueError(
            f'attn_implementation="fastattn" does not know the keyword {name}, which {type(module).__name__} '
            f"passes to its attention: {hint}"
        )


def keywords_passed(source: str) -> set[str]:
    """The keywords that this modelling code itself passes to attention functions."""
    return {
        keyword.arg
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and is_attention_interface(call.func)
        for keyword in call.keywords
        if keyword.arg is not None
    }


def is_attention_interface(function: ast.expr) -> bool:
    """Whether an expression that is called names what `ALL_ATTENTION_FUNCTIONS.get_interface` gave."""
    return ast.unparse(function).rsplit(".", 1)[-1] in ("attention_interface", "attention_fn")


def obstacle(model: Any) -> str | None:
    """Why `patch` is not to set this model's attention to "fastattn"; None if it can be."""
    if model.config._attn_implementation == NAME:
        return 'attn_implementation is "fastattn" already'
    if model.config.output_attentions:
        return "config.output_attentions asks for weights, which are never computed"
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for kind in dict.fromkeys(type(part) for part in parts):
        if reason := obstacle_of_class(kind):  # type: ignore[arg-type]
            return reason
    if not any("ALL_ATTENTION_FUNCTIONS" in _source(type(part).__module__) for part in model.modules()):
        return f"nothing in {type(model).__name__} attends through transformers' attention interface"
    return difference_from_eager(model)


@functools.cache
def obstacle_of_class(kind: Any) -> str | None:
    """Why a class of models cannot use "fastattn", as far as its code tells; None if nothing speaks against it."""
    name, source = kind.__name__, _source(kind.__module__)
    if not kind._can_set_attn_implementation():
        return f"the code of {name} does not dispatch its attention"
    dispatches = "ALL_ATTENTION_FUNCTIONS" in source
    vouched = kind._supports_sdpa or kind._supports_flex_attn or kind._supports_attention_backend
    if dispatches and not vouched and kind.__module__ not in COMPARED_BY_US:
        return (
            f"transformers supports no attention but eager's for {name} (_supports_sdpa, _supports_flex_attn and "
            "_supports_attention_backend are False): its own code may read the mask, too"
        )
    if dispatches:
        for keyword in sorted(keywords_passed(source) - SERVED - HARMLESS.keys()):
            why = REFUSED.get(keyword, "what it means is not known here")
            return f"the code of {name} passes the keyword {keyword} to its attention: {why}"
    return None


# Modules of transformers whose classes vouch for nothing but eager attention, and that agree with it in our tests.
COMPARED_BY_US = frozenset({"transformers.models.inkling2.modeling_inkling2"})


@functools.cache
def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


def _that_refuses(check: Callable) -> Callable:
    """transformers' check of an attn_implementation, and before it ours."""

    @functools.wraps(check)
    def get_correct_attn_implementation(
        self: Any, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if requested_attention == NAME and (reason := obstacle_of_class(type(self))):  # type: ignore[arg-type]
            raise ValueError(
                f'{type(self).__name__} cannot use attn_implementation="fastattn": {reason}. Make it with '
                'attn_implementation="eager"; fastattn.patch(model) then swaps what can be swapped, and says what '
                "it leaves"
            )
        return check(self, requested_attention, *args, **kwargs)

    get_correct_attn_implementation.refuses = NAME  # type: ignore[attr-defined]
    return get_correct_attn_implementation


if not hasattr(PreTrainedModel.get_correct_attn_implementation, "refuses"):
    PreTrainedModel.get_correct_attn_implementation = _that_refuses(  # type: ignore[method-assign]
        PreTrainedModel.get_correct_attn_implementation
    )


@dataclass(frozen=True)
class Before:
    """The attention implementations of a model's configurations, to be restored; of a copy's too.

    Unpickling a patched model imports this class, and with it registers "fastattn".
    """

    implementations: tuple[str | None, ...]

    @classmethod
    def of(cls, model: Any) -> Before:
        return cls(tuple(config._attn_implementation_internal for config in _configurations(model)))

    def restore(self, model: Any) -> None:
        for config, implementation in zip(_configurations(model), self.implementations, strict=True):
            config._attn_implementation_internal = implementation


def _configurations(model: Any) -> list[Any]:
    """Every configuration object in the model, each once, always in the same order."""
    waiting: list[Any] = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop(0)
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


LEFT, TOKENS = 3, 8  # The second row of the trial begins with so many padded tokens.


def difference_from_eager(model: Any) -> str | None:
    """Run a model that reads tokens once with "eager" and once with "fastattn", on two short rows, one of them
    padded; say so if the results differ. None for a model that agrees, or that cannot be tried like this.

    In eval mode, without gradients and autocast, with the hooks off; parameters, buffers, attributes, the
    implementations and torch's random numbers are afterwards what they were before.
    """
    parameters = list(model.parameters())
    plain = parameters and all(
        type(p) in (Tensor, torch.nn.Parameter) and p.device.type != "meta" for p in parameters
    )
    if not plain or len({p.device for p in parameters}) > 1 or model.main_input_name != "input_ids":
        return None
    device, was = parameters[0].device, Before.of(model)
    ids = torch.arange(5, 5 + 2 * TOKENS).view(2, TOKENS).to(device)
    seen = torch.ones_like(ids)
    seen[1, :LEFT] = 0
    inputs = {"input_ids": ids, "attention_mask": seen}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, :4].contiguous()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            with _untouched(model):
                _set(model, "eager")
                expected = _rows(model, inputs)
        except Exception:
            return None  # It is not called like this, not by eager either.
        finally:
            was.restore(model)
        try:
            with _untouched(model):
                _set(model, NAME)
                actual = _rows(model, inputs)
        except Exception as error:
            return f"tried on an input, it raised {type(error).__name__}: {error}"
        finally:
            was.restore(model)
    return None if _agree(actual, expected, seen.bool()) else "tried on an input, it gave other results than eager"


def _set(model: Any, implementation: str) -> None:
    for config in _configurations(model):
        config._attn_implementation_internal = implementation


def _rows(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    return (out[0] if not isinstance(out, Tensor) else out).float()


def _agree(actual: Tensor, expected: Tensor, seen: Tensor) -> bool:
    if actual.shape != expected.shape or not expected.isfinite().any():
        return actual.shape == expected.shape
    if expected.shape[:2] == seen.shape:
        actual, expected = actual[seen], expected[seen]
    return bool((actual - expected).norm() <= 1e-3 * expected.norm())


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Within, the model is in eval mode and runs no hooks; afterwards every module is as it was."""
    saved = []
    for module in model.modules():
        state, held = module.__dict__, ("_parameters", "_buffers", "_modules")
        copies = {name: dict(state[name]) for name in held}
        buffers = {name: None if t is None else t.clone() for name, t in state["_buffers"].items()}
        saved.append((module, dict(state), copies, buffers))
        state["training"] = False
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            state[name] = type(state[name])()
    try:
        yield
    finally:
        for module, state, copies, buffers in saved:
            module.__dict__.clear()
            module.__dict__.update(state)
            for name, was in copies.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(was)
            for name, value in buffers.items():
                if value is not None:
                    module._buffers[name].copy_(value)
