"""Which Hugging Face models compute the same with attn_implementation="fastattn", and why others do not.

Importing this wraps the method with which transformers checks an attn_implementation
(`PreTrainedModel.get_correct_attn_implementation`): making a model that cannot use "fastattn" is an error.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

NAME = "fastattn"

# Keywords that `fastattn_attention` computes with.
SERVED = frozenset({
    "attention_mask", "dropout", "scaling", "is_causal", "softcap", "s_aux", "sinks", "position_bias",
    "cu_seq_lens_q", "cu_seq_lens_k", "indices", "block_indices", "output_attentions",
})  # fmt: skip

# Keywords that change no result of an attention function, sorted by the reason. A test checks with all of
# transformers' modelling code that eager attention reads none of them.
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
        "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels", "shift_labels",
        "num_items_in_batch",
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

# Keywords that change the result and are not supported, each with advice.
REFUSED = {
    "cache": "it is served for model.generate_batch, which passes transformers' PagedAttentionCache, and not here",
    "head_mask": 'a factor for each head is not computed: use attn_implementation="eager"',
} | dict.fromkeys(
    ("band_mask", "from_mask", "to_mask", "from_blocked_mask", "to_blocked_mask"),
    "BigBird's sparse attention: fastattn.patch swaps BigBird's own modules",
)


def check_keywords(module: Any, keywords: dict[str, Any]) -> None:
    """Raise ValueError for a keyword that could change the result and is not supported."""
    for name, value in keywords.items():
        if value is None or name in HARMLESS:
            continue
        hint = REFUSED.get(name, f'use attn_implementation="eager", or leave {name} out if nothing needs it')
        raise ValueError(
            f'attn_implementation="fastattn" does not know the keyword {name}, which {type(module).__name__} '
            f"passes to its attention: {hint}"
        )


def keywords_passed(source: str) -> set[str]:
    """The keywords that this modelling code passes to attention functions by name."""
    return {
        keyword.arg
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and is_attention_interface(call.func)
        for keyword in call.keywords
        if keyword.arg is not None
    }


def is_attention_interface(function: ast.expr) -> bool:
    """Whether a called expression is the result of `ALL_ATTENTION_FUNCTIONS.get_interface`, by its usual names."""
    return ast.unparse(function).rsplit(".", 1)[-1] in ("attention_interface", "attention_fn")


def obstacle(model: Any) -> str | None:
    """Why `patch` must not set this model's attention to "fastattn"; None if it may."""
    return obstacle_in_code(model) or difference_from_eager(model)


def obstacle_in_code(model: Any) -> str | None:
    """As `obstacle`, but only from the model's configuration and code, without a trial."""
    if model.config._attn_implementation == NAME:
        return 'attn_implementation is "fastattn" already'
    if model.config.output_attentions:
        return "config.output_attentions asks for weights in every call, which only eager attention computes"
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        if reason := _obstacle_of_part(part):
            return reason
    if not any("ALL_ATTENTION_FUNCTIONS" in _source(type(part).__module__) for part in model.modules()):
        return f"nothing in {type(model).__name__} attends through transformers' attention interface"
    return None


@functools.cache
def obstacle_of_class(kind: Any) -> str | None:
    """Why a class of models cannot use "fastattn", judged by its code; None if it can."""
    name, source = kind.__name__, _source(kind.__module__)
    if reason := READS_THE_MASK.get(kind.__module__):
        return f"the code of {name} computes with the mask outside of attention, too: {reason}"
    if not kind._can_set_attn_implementation():
        return f"the code of {name} does not dispatch its attention"
    dispatches = "ALL_ATTENTION_FUNCTIONS" in source
    vouched = kind._supports_sdpa or kind._supports_flex_attn or kind._supports_attention_backend
    if dispatches and not vouched and kind.__module__ not in COMPARED_BY_US:
        return (
            f"transformers supports only eager attention for {name} (_supports_sdpa, _supports_flex_attn and "
            "_supports_attention_backend are False): its own code may read the mask, too"
        )
    if dispatches:
        for keyword in sorted(keywords_passed(source) - SERVED - HARMLESS.keys()):
            why = REFUSED.get(keyword, "what it means is not known here")
            return f"the code of {name} passes the keyword {keyword} to its attention: {why}"
    return None


# Modules of transformers whose classes declare support for eager attention only, but equal it with "fastattn" in
# our tests (logits, gradients and generation of whole models:
# test_models_that_restrict_or_sink_by_query_equal_eager).
COMPARED_BY_US = frozenset({"transformers.models.inkling2.modeling_inkling2"})


# Modules of transformers in which other layers than attention compute with the mask that transformers made.
READS_THE_MASK = {"transformers.models.lasr.modeling_lasr": "its convolutions leave out what it hides"}
# Options of a configuration with which a model adds something to the mask before it attends.
ADDS_TO_THE_MASK = {
    "transformers.models.beit.modeling_beit": ("use_relative_position_bias", "use_shared_relative_position_bias"),
}
# A choice among classes of attention by the name of the implementation, when a model is made.
_CHOOSES_A_CLASS = re.compile(r"_CLASSES\[[\w.]*attn_implementation\]")


def _obstacle_of_part(model: Any) -> str | None:
    """Why a model, with its configuration, cannot use "fastattn", as far as its code tells."""
    if reason := obstacle_of_class(type(model)):  # type: ignore[arg-type]
        return reason
    for option in ADDS_TO_THE_MASK.get(type(model).__module__, ()):
        if getattr(model.config, option, False):
            return f"with {option}=True, its code adds the bias to the mask, which is no tensor"
    return None


def _obstacle_when_made(model: Any) -> str | None:
    """As `_obstacle_of_part`, for a model that is being made."""
    if reason := _obstacle_of_part(model):
        return reason
    if _CHOOSES_A_CLASS.search(_source(type(model).__module__)):
        return f"the code of {type(model).__name__} chooses a class of attention by that name, and has none for it"
    return None


@functools.cache
def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


def _that_refuses(check: Callable) -> Callable:
    """transformers' check of an attn_implementation, after a check of ours."""

    @functools.wraps(check)
    def get_correct_attn_implementation(
        self: Any, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        if requested_attention == NAME:
            reason = _obstacle_when_made(self) if is_init_check else _obstacle_of_part(self)
            if reason:
                raise ValueError(_refusal(self, reason))
        return check(self, requested_attention, is_init_check)

    get_correct_attn_implementation.refuses = NAME  # type: ignore[attr-defined]
    return get_correct_attn_implementation


def _that_sets_all_or_raises(change: Callable) -> Callable:
    """transformers' `set_attn_implementation`. It only logs if a model cannot use an implementation; for
    "fastattn" that is an error, and nothing is changed.
    """

    @functools.wraps(change)
    def set_attn_implementation(self: Any, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        if not _names_ours(attn_implementation):
            return change(self, attn_implementation, *args, **kwargs)
        before = Before.of(self)
        try:
            change(self, attn_implementation, *args, **kwargs)
            _check_what_was_set(self, attn_implementation)
        except Exception:
            before.restore(self)
            raise

    return set_attn_implementation


def _names_ours(attn_implementation: Any) -> bool:
    if isinstance(attn_implementation, dict):
        return any(_names_ours(value) for value in attn_implementation.values())
    return attn_implementation == NAME


def _requests(config: Any, wanted: Any, found: dict[int, Any]) -> dict[int, Any]:
    """The implementation requested for each configuration, by its id, as transformers reads a nested dict."""
    own = wanted.get("") if isinstance(wanted, dict) else wanted
    found[id(config)] = own
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            _requests(part, wanted.get(name) if isinstance(wanted, dict) else wanted, found)
    return found


def _check_what_was_set(model: Any, wanted: str | dict) -> None:
    """Raise if a part of the model cannot use "fastattn" as requested, or if a key of `wanted` names no part."""
    if isinstance(wanted, dict):
        _check_names(model.config, wanted)
    requests = _requests(model.config, wanted, {})
    default = requests[id(model.config)]
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or requests.get(id(part.config), default) != NAME:
            continue
        if reason := _obstacle_of_part(part):
            raise ValueError(_refusal(part, reason))


def _check_names(config: Any, wanted: dict) -> None:
    known = ["", *config.sub_configs]
    for name, value in wanted.items():
        if name not in known and _names_ours(value):
            raise ValueError(
                f"attn_implementation names {name!r}, but {type(config).__name__} has no such part: it has "
                f"{', '.join(map(repr, known))}"
            )
        if isinstance(value, dict) and getattr(config, name, None) is not None:
            _check_names(getattr(config, name), value)


def _refusal(model: Any, reason: str) -> str:
    return (
        f'{type(model).__name__} cannot use attn_implementation="fastattn": {reason}. Make it with '
        'attn_implementation="eager"; fastattn.patch(model) then swaps what can be swapped, and says what it '
        "leaves"
    )


if not hasattr(PreTrainedModel.get_correct_attn_implementation, "refuses"):
    PreTrainedModel.get_correct_attn_implementation = _that_refuses(  # type: ignore[method-assign]
        PreTrainedModel.get_correct_attn_implementation
    )
    PreTrainedModel.set_attn_implementation = _that_sets_all_or_raises(  # type: ignore[method-assign]
        PreTrainedModel.set_attn_implementation
    )


@dataclass(frozen=True)
class Before:
    """The attention implementations of a model's configurations, to restore them in it or in a copy of it.

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
    """Every configuration object in the model once, always in the same order."""
    waiting: list[Any] = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop(0)
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


LEFT, TOKENS = 3, 8  # Padded tokens at the beginning of the trial's second row, and tokens of a row.


def not_tried(model: Any) -> str | None:
    """Why a model cannot be tried; None if it can."""
    parameters = list(model.parameters())
    if not parameters:
        return "it has no parameters"
    if any(p.device.type == "meta" for p in parameters):
        return "it has weights on the meta device"
    if odd := {type(p).__name__ for p in parameters} - {"Tensor", "Parameter"}:
        return f"it has weights that are no plain tensors ({', '.join(sorted(odd))})"
    if len({p.device for p in parameters}) > 1:
        return "its weights are on several devices"
    if model.main_input_name != "input_ids" and not (
        model.main_input_name == "pixel_values" and isinstance(getattr(model.config, "image_size", None), int)
    ):
        return f"it reads {model.main_input_name}, and the trial's input is tokens or images of one size"
    return None


def _trial_inputs(model: Any, seen: Tensor) -> dict[str, Tensor]:
    """Two rows of tokens, one of them padded; or two images."""
    if model.main_input_name == "pixel_values":
        size, first = model.config.image_size, next(model.parameters())
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, getattr(model.config, "num_channels", 3), size, size, generator=generator)
        return {"pixel_values": images.to(first.device, first.dtype)}
    ids = torch.arange(5, 5 + seen.numel()).view(seen.shape).to(seen.device)
    inputs = {"input_ids": ids, "attention_mask": seen}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, :4].contiguous()
    return inputs


class Trial(NamedTuple):
    """The result of trying a model.

    Attributes:
        differs: how "fastattn" differs from "eager"; None if nothing was found.
        untried: why the model was not compared; None if it was.
    """

    differs: str | None = None
    untried: str | None = None


def try_against_eager(model: Any) -> Trial:
    """Run a model once with "eager" and once with "fastattn", on two short rows of tokens, one of them padded, or
    on two images.

    It runs in eval mode, without gradients, autocast and hooks. Afterwards the model's parameters, buffers,
    attributes and implementations and torch's random generator are as before.
    """
    if untried := not_tried(model):
        return Trial(untried=untried)
    device, was = next(model.parameters()).device, Before.of(model)
    seen = torch.ones(2, TOKENS, dtype=torch.long, device=device)
    seen[1, :LEFT] = 0
    inputs = _trial_inputs(model, seen)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            with untouched(model):
                _set(model, "eager")
                expected = _rows(model, inputs)
        except Exception as error:
            return Trial(untried=f"eager attention raised {type(error).__name__} on the trial's input")
        finally:
            was.restore(model)
        try:
            with untouched(model):
                _set(model, NAME)
                actual = _rows(model, inputs)
        except Exception as error:
            return Trial(f"tried on an input, it raised {type(error).__name__}: {error}")
        finally:
            was.restore(model)
    if not expected.isfinite().any():
        return Trial(untried="eager attention gave no finite result on the trial's input")
    if _agree(actual, expected, seen.bool(), trial_tolerance(model)):
        return Trial()
    return Trial("tried on an input, it gave other results than eager")


def difference_from_eager(model: Any) -> str | None:
    """How a model with "fastattn" differs from "eager" on the trial's input; None if it does not, or is not
    tried."""
    return try_against_eager(model).differs


def _set(model: Any, implementation: str) -> None:
    for config in _configurations(model):
        config._attn_implementation_internal = implementation


def _rows(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # Some models draw in eval mode, too: ViTMAE chooses its patches at random.
    out = model(**inputs)
    return (out[0] if not isinstance(out, Tensor) else out).float()


# The relative difference that rounding may cause, in units of the eps of the dtype times the root of the number of
# layers. Measured on Llama, GPT-2 and Mixtral with 2 to 64 layers, on a CPU: at most 3.1 in float32, where another
# machine sums in another order; in half precision at most 1.2, and up to 6.9 where experts are chosen anew.
UNITS = {torch.float16: 4, torch.bfloat16: 4}
UNITS_OF_FLOAT32 = 32


def trial_tolerance(model: Any) -> float:
    """The largest relative difference that rounding explains, for the coarsest dtype of the model's weights."""
    dtypes = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    # Eager attention takes its softmax in float32 even where the rest is float64.
    dtype = max(dtypes | {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)
    eps = torch.finfo(dtype).eps
    on_cuda = any(p.device.type == "cuda" for p in model.parameters())
    if dtype == torch.float32 and on_cuda and torch.get_float32_matmul_precision() != "highest":
        eps = 2.0**-10  # Products in TF32.
    layers = sum(type(module).__name__.endswith("Attention") for module in model.modules())
    return float(UNITS.get(dtype, UNITS_OF_FLOAT32) * eps * max(layers, 1) ** 0.5)


def _agree(actual: Tensor, expected: Tensor, seen: Tensor, tolerance: float) -> bool:
    if actual.shape != expected.shape:
        return False
    if expected.shape[:2] == seen.shape and expected.dim() == 3:
        actual, expected = actual[seen], expected[seen]
    # In float64, eager's lowest mask value is -inf to its softmax in float32: padded rows are NaN there.
    finite = expected.isfinite()
    actual, expected = actual[finite], expected[finite]
    return bool((actual - expected).norm() <= tolerance * expected.norm())


@contextmanager
def untouched(model: Any) -> Iterator[None]:
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
