"""The tensors inside a model that can be read or replaced while it runs, by name.

    blocks.3.resid_pre         (B, L, d)         the residual stream that block 3 reads
    blocks.3.resid_mid         (B, L, d)         the stream between attention and MLP; none in parallel blocks
    blocks.3.resid_post        (B, L, d)         the stream that it leaves
    blocks.3.attention.hook_q  (B, Hq, L, D)     queries as attention takes them, after norm and rotation
    blocks.3.attention.hook_k  (B, Hkv, L, D)    keys, likewise
    blocks.3.attention.hook_v  (B, Hkv, L, Dv)   values
    blocks.3.attention.hook_z  (B, Hq, L, Dv)    what each head read, before the output layer
    blocks.3.attention.out     (B, L, d)         what attention adds to the stream
    blocks.3.mlp.hook_post     (B, L, neurons)   what the MLP's last layer is given
    blocks.3.mlp.out           (B, L, d)         what the MLP adds to the stream

TransformerLens's names mean the same (`blocks.3.hook_resid_pre`, `blocks.3.attn.hook_q`,
`blocks.3.hook_attn_out`), and so do `layers.3...`, `attention.q` and `mlp.neurons`. Heads stand before positions,
as everywhere in this library. A layer may be counted from the last: `blocks.-1`.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastattn.core.attention.functional import attention
from fastattn.core.attention.sdpa import TOP_LEFT, align
from fastattn.lens.adapters import Adapter
from fastattn.lens.once import Once
from fastattn.nn import MultiheadAttention

STREAM = ("batch", "position", "width")
HEADS = ("batch", "head", "position", "width")
NEURONS = ("batch", "position", "neuron")


class Kind(NamedTuple):
    """Something that every block has: its other names, and its dimensions."""

    aliases: tuple[str, ...]
    axes: tuple[str, ...]


def _of_heads(x: str) -> Kind:
    return Kind((f"attention.{x}", f"attn.hook_{x}", f"attn.{x}"), HEADS)


TENSORS = {
    "resid_pre": Kind(("hook_resid_pre",), STREAM),
    "resid_mid": Kind(("hook_resid_mid",), STREAM),
    "resid_post": Kind(("hook_resid_post",), STREAM),
    "attention.hook_q": _of_heads("q"),
    "attention.hook_k": _of_heads("k"),
    "attention.hook_v": _of_heads("v"),
    "attention.hook_z": _of_heads("z"),
    "attention.out": Kind(("hook_attn_out", "attn_out", "attn.out"), STREAM),
    "mlp.hook_post": Kind(("mlp.neurons", "mlp.post"), NEURONS),
    "mlp.out": Kind(("hook_mlp_out", "mlp_out"), STREAM),
}
Z = "attention.hook_z"
PROJECTED = ("attention.hook_q", "attention.hook_k", "attention.hook_v")


class Name(NamedTuple):
    """One kind in one block."""

    layer: int
    kind: str

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{self.kind}"


class Call(NamedTuple):
    """What attention was asked in one layer: `attention(q, k, v, **options)`; dropout is left out."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def attend(self, **changes: Any) -> Any:
        """`attention`, with another q, k, v or other options where they are given."""
        given = {**self._asdict(), **self.options, **changes}
        given.pop("options")
        return attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def kinds_of(adapter: Adapter) -> dict[str, Kind]:
    """The kinds of tensors that the blocks of a model have."""
    has_mlp = adapter.num_layers > 0 and adapter.part("down", 0) is not None

    def exists(kind: str) -> bool:
        if kind == "resid_mid":
            return has_mlp and not adapter.parallel
        return has_mlp or not kind.startswith("mlp")

    return {kind: about for kind, about in TENSORS.items() if exists(kind)}


def find(pattern: str, adapter: Adapter, kinds: dict[str, Kind]) -> list[Name]:
    """The names that a pattern matches, its segments one by one: `*` is anything but a dot.

    Raises:
        ValueError: it matches none; the error says what there is, the closest first.
    """
    segments = pattern.split(".")
    found = [
        Name(layer, kind)
        for layer in range(adapter.num_layers)
        for kind, about in kinds.items()
        if any(_matches(segments, adapter, layer, name) for name in (kind, *about.aliases))
    ]
    if not found:
        every = [f"blocks.*.{kind}" for kind in kinds]
        every.sort(key=lambda name: -difflib.SequenceMatcher(None, _without_numbers(pattern), name).ratio())
        raise ValueError(
            f"{pattern!r} names nothing in this {type(adapter.model).__name__}, whose blocks are 0 to "
            f"{adapter.num_layers - 1}. There are, the closest first: {', '.join(every)}"
        )
    return found


def _matches(segments: list[str], adapter: Adapter, layer: int, kind: str) -> bool:
    first, *rest = segments
    parts = kind.split(".")
    if first not in ("blocks", "layers") or len(rest) != 1 + len(parts):
        return False
    numbers = (str(layer), str(layer - adapter.num_layers))
    here = any(fnmatch.fnmatchcase(number, rest[0]) for number in numbers)
    return here and all(map(fnmatch.fnmatchcase, parts, rest[1:]))


def _without_numbers(pattern: str) -> str:
    return ".".join("*" if segment.lstrip("-").isdigit() else segment for segment in pattern.split("."))


# ---- what passes there, changed and read ----


class Removable(NamedTuple):
    """What was hooked, until `remove` is called."""

    remove: Callable[[], None]


class _Slot:
    """One place of one module while it is looked at. Changes come first, in the order in which they were made;
    then what the model goes on with is read. So a watch sees the changes, whichever was entered first."""

    def __init__(self) -> None:
        self.changes: list[Callable[[Tensor], Tensor]] = []
        self.reads: list[Callable[[Tensor], None]] = []
        self.handles: list[Any] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        for change in self.changes:
            tensor = change(tensor)
        for read in self.reads:
            read(tensor)
        return tensor

    @property
    def unused(self) -> bool:
        return not self.changes and not self.reads


class _Attention:
    """The calls of one module that attends, while they are looked at."""

    def __init__(self) -> None:
        self.slots = {kind: _Slot() for kind in (*PROJECTED, Z)}
        self.listeners: list[Callable[[Call], None]] = []

    def change(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.slots[kind](tensor) for kind, tensor in zip(PROJECTED, (q, k, v), strict=True))

    def call(self, module: nn.Module, *arguments: Any, **options: Any) -> AbstractContextManager[Any]:
        if not self.listeners:
            return nullcontext()
        from fastattn.integrations.huggingface import attention_of_call

        return self.tell(Call(*attention_of_call(module, *arguments, **options)))

    def tell(self, call: Call) -> Once:
        """Let the listeners have the call; returns the context in which it is computed."""
        with Once() as once:
            for listener in self.listeners:
                listener(call)
        return once

    @property
    def unused(self) -> bool:
        return not self.listeners and all(slot.unused for slot in self.slots.values())


_SLOTS: dict[tuple[int, str], _Slot] = {}
_ATTENTIONS: dict[int, _Attention] = {}


def read(adapter: Adapter, name: Name, function: Callable[[Tensor], None]) -> Removable:
    """Let `function` have the tensor of this name, in every forward."""
    slot, release = _slot(adapter, name)
    return _added(slot.reads, function, release)


def change(
    adapter: Adapter, name: Name, function: Callable[[Tensor], Tensor], *, first: bool = False
) -> Removable:
    """Replace the tensor of this name by what `function` makes of it, in every forward; `first`, before all other
    changes of it.

    Raises:
        ValueError: it can only be read.
    """
    if name.kind == "resid_mid" and adapter.part("between", name.layer) is None:
        raise ValueError(
            f"{name} can be read, and not replaced, in family {adapter.family.name}: replace "
            f"blocks.{name.layer}.attention.out, which is added to resid_pre"
        )
    slot, release = _slot(adapter, name)
    return _added(slot.changes, function, release, first)


def listen(adapter: Adapter, layer: int, function: Callable[[Call], None]) -> Removable:
    """Let `function` have the `Call` of a layer's attention, before it is computed, in every forward. If it asks
    for that attention itself, it is computed once."""
    state, release = _attention(adapter, layer)
    return _added(state.listeners, function, release)


def _added(to: list, function: Any, release: Callable[[], None], first: bool = False) -> Removable:
    to.insert(0 if first else len(to), function)

    def remove() -> None:
        if function in to:
            to.remove(function)
            release()

    return Removable(remove)


def _attention(adapter: Adapter, layer: int) -> tuple[_Attention, Callable[[], None]]:
    """The state of an attention that is tapped, and what releases it."""
    module = adapter.part("attention", layer)
    tap: Callable[[Any, Any], None]
    if adapter.family.hooks is not None:
        tap, untap = partial(_tap_own, adapter, layer), _untap_own
    elif isinstance(module, nn.MultiheadAttention):
        tap, untap = _tap_torch, _untap_torch
    else:
        from fastattn.integrations import huggingface_taps

        tap, untap = huggingface_taps.tap, huggingface_taps.untap
    if (state := _ATTENTIONS.get(id(module))) is None:
        state = _Attention()
        tap(module, state)
        _ATTENTIONS[id(module)] = state

    def release() -> None:
        if state.unused and _ATTENTIONS.pop(id(module), None) is not None:
            untap(module)

    return state, release


class _OwnForward:
    """The forward of an attention of ours while it is listened to. Its call is what the forward is given, and then
    q, k and v, which are hooked in this order."""

    def __init__(self, adapter: Adapter, layer: int, module: Any, state: _Attention) -> None:
        self.module, self.state = module, state
        self.parts: dict[str, Any] = {}
        self.own = module.__dict__.get("forward")  # accelerate puts one there, too
        self.original = module.forward
        names = {x: Name(layer, f"attention.hook_{x}") for x in "qk"}
        self.handles = [read(adapter, name, partial(self.parts.__setitem__, x)) for x, name in names.items()]
        self.handles.append(read(adapter, Name(layer, "attention.hook_v"), self.hear))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.parts["options"] = {n: o for n, o in options.items() if n in ("mask", "window", "key_lengths")}
        with ExitStack() as self.stack:
            return self.original(*arguments, **options)

    def hear(self, v: Tensor) -> None:
        parts = self.parts
        call = Call(parts.pop("q"), parts.pop("k"), v, self.module.options(**parts.pop("options")))
        self.stack.enter_context(self.state.tell(call))


def _tap_own(adapter: Adapter, layer: int, module: nn.Module, state: _Attention) -> None:
    module.__dict__["forward"] = _OwnForward(adapter, layer, module, state)


def _untap_own(module: nn.Module) -> None:
    forward = module.__dict__.pop("forward")
    for handle in forward.handles:
        handle.remove()
    if forward.own is not None:
        module.__dict__["forward"] = forward.own


def _tap_torch(module: nn.Module, state: _Attention) -> None:
    """Let `state` see what goes into attention and out of it, in a MultiheadAttention of ours."""
    if not isinstance(module, MultiheadAttention):
        raise ValueError(
            "queries, keys, values and weights of a torch.nn.MultiheadAttention cannot be seen: call "
            "fastattn.patch(model) first"
        )
    original = module._attend

    def attend(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        q, k, v = state.change(q, k, v)
        listened = bool(state.listeners)
        with state.tell(_call_of_torch(module, q, k, v, *arguments, **options)) if listened else nullcontext():
            z, weights = original(q, k, v, *arguments, **options)
        return state.slots[Z](z), weights

    module.__dict__["_attend"] = attend


def _untap_torch(module: nn.Module) -> None:
    del module.__dict__["_attend"]


def _call_of_torch(
    module: MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, seen: Any = (None, None, False), **options: Any
) -> Call:
    """What a MultiheadAttention of ours asks of attention; keyword arguments as its `_attend` has them."""
    bias, mask, causal = seen
    k, v, bias, aligned = align(q, k, v, bias, TOP_LEFT if causal else None)
    beside = {"key_lengths": options.get("key_lengths"), "backend": module.backend, "scale": module.head_dim**-0.5}
    return Call(q, k, v, {**aligned, **beside, "bias": bias, "mask": mask})


def _slot(adapter: Adapter, name: Name) -> tuple[_Slot, Callable[[], None]]:
    """The slot of a tensor, and what releases it once it is unused."""
    tapped = adapter.family.hooks is None
    of_torch = isinstance(adapter.part("attention", name.layer), nn.MultiheadAttention)
    if tapped and (name.kind in PROJECTED or (name.kind == Z and of_torch)):
        state, release = _attention(adapter, name.layer)
        return state.slots[name.kind], release
    module, side = _where(adapter, name)
    heads = adapter.num_heads if name.kind == Z else None
    key = (id(module), side)
    if (slot := _SLOTS.get(key)) is None:
        slot = _SLOTS[key] = _Slot()
        slot.handles.append(_hook(module, side, slot, heads, adapter.sequence_first))

    def release_slot() -> None:
        if slot.unused and _SLOTS.pop(key, None) is not None:
            for handle in slot.handles:
                handle.remove()

    return slot, release_slot


def _where(adapter: Adapter, name: Name) -> tuple[Any, str]:
    """The module at which a tensor passes, and whether as its "input" or as its "output"."""
    layer, kind = name
    if kind in PROJECTED:
        assert adapter.family.hooks is not None
        return adapter.hook("qkv"[PROJECTED.index(kind)], layer), "output"
    if kind == "resid_mid" and adapter.part("between", layer) is not None:
        return adapter.part("between", layer), "output"
    part, side = {
        "resid_pre": ("", "input"),
        "resid_mid": ("mlp_norm", "input"),
        "resid_post": ("", "output"),
        "attention.hook_z": ("out", "input"),
        "attention.out": ("attention_out", "output"),
        "mlp.hook_post": ("down", "input"),
        "mlp.out": ("mlp_out", "output"),
    }[kind]
    return (adapter.part(part, layer) if part else adapter.blocks[layer]), side


def _hook(module: nn.Module, side: str, slot: _Slot, heads: int | None, sequence_first: bool) -> Any:
    """Pass what a module is given, or gives, through a slot."""

    def through(tensor: Tensor) -> Tensor:
        if tensor.is_nested or tensor.dim() < 3:
            got = "a nested tensor" if tensor.is_nested else f"shape {tuple(tensor.shape)}"
            raise ValueError(
                f"a model must be given batches of one length to be looked into, and a {type(module).__name__} "
                f"has {got} (of torch.nn.TransformerEncoder: build it with enable_nested_tensor=False)"
            )
        if sequence_first:
            batched = tensor.transpose(0, 1)
            result = slot(batched)
            return tensor if result is batched else result.transpose(0, 1)
        if heads is None:
            return slot(tensor)
        by_head = tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
        result = slot(by_head)
        return tensor if result is by_head else result.transpose(1, 2).flatten(2)

    def before(_module: nn.Module, inputs: tuple, options: dict[str, Any]) -> Any:
        if inputs:
            result = through(inputs[0])
            return None if result is inputs[0] else ((result, *inputs[1:]), options)
        result = through(options["hidden_states"])
        return None if result is options["hidden_states"] else ((), {**options, "hidden_states": result})

    def after(_module: nn.Module, _inputs: tuple, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        result = through(first)
        if result is first:
            return None
        return (result, *output[1:]) if isinstance(output, tuple) else result

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)
