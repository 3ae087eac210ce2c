"""Change what happens inside a model while it runs: ablate, scale, cut, patch, steer.

Each is a context manager. They compose: within one another their changes are made in the order in which they were
entered, and every `watch` sees the result. Leaving the block, by an exception too, undoes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.ground.arguments import choice, integer, number, tensor
from fastattn.lens.adapters import Adapter, adapt
from fastattn.lens.edits import Edit, Put, Replaced, edited
from fastattn.lens.places import Name, change, find, kinds_of
from fastattn.lens.running import check_model
from fastattn.lens.seen import Step, split_steps
from fastattn.lens.watching import watch
from fastattn.masks import Mask

Pairs = Iterable[tuple[int, int]]
Inputs = Tensor | Mapping[str, Any]
WAYS = ("zero", "mean", "resample")


@contextmanager
def ablate(
    model: nn.Module,
    *,
    heads: Pairs = (),
    mlps: Iterable[int] = (),
    neurons: Pairs = (),
    by: str = "zero",
    source: Inputs | None = None,
) -> Iterator[None]:
    """Take parts of a model out: what they would have said is replaced.

    Args:
        model: a model that `adapt` knows, in eval mode.
        heads: pairs (layer, head); what such a head reads (hook_z) is replaced.
        mlps: layers; what such an MLP adds to the stream is replaced.
        neurons: pairs (layer, neuron); its activation (mlp.hook_post) is replaced.
        by: "zero"; "mean", the mean over batch and positions, padding included; or "resample", what another input
            gives at the same place.
        source: for "mean" and "resample", the other input: tokens (B, L), or a mapping of the model's arguments.
            It is run once, here. Without one, "mean" is over the call's own batch and positions, and "resample"
            takes the neighbour in the batch.

    Raises:
        ValueError, TypeError: no such head, layer or neuron; dropout that is active; before anything runs. In the
            forward: a source of another shape, or a batch of one to resample from.

    Example:
        >>> with ablate(model, heads=[(5, 1), (6, 9)], by="mean"):
        ...     logits = model(tokens)

    Source: Michel et al., Are Sixteen Heads Really Better than One? (2019), zero; Wang et al., Interpretability in
    the Wild (2022), section 3, mean; Chan et al., Causal Scrubbing (2022), resample.
    """
    adapter = _adapter(model)
    choice("by", by, WAYS)
    if source is not None and by == "zero":
        raise ValueError("source must be None for by='zero', which needs none")
    parts = _parts(adapter, heads, mlps, neurons)
    others: Mapping[str, Any] = {}
    if source is not None:
        with torch.no_grad(), watch(model, [str(name) for name in parts]) as others:
            _run(adapter, source)
    with ExitStack() as stack:
        for name, indices in parts.items():
            other = others[str(name)] if source is not None else None
            replaced = Replaced(name, indices, by, other)
            stack.callback(change(adapter, name, replaced).remove)
        yield


@contextmanager
def scale_heads(model: nn.Module, gates: Tensor | None = None) -> Iterator[Tensor]:
    """Multiply what each head reads by a gate, and learn from the gate's gradient how much the head matters.

    The gradient of a gate is the sum of z dz over positions and width, which is the delta that attention's
    backward computes anyway: no pass is added.

    Args:
        model: a model that `adapt` knows, in eval mode.
        gates: (layers, heads), with or without gradient; ones with gradient by default.

    Yields:
        The gates. After a backward, `gates.grad` (layers, heads) is the gradient of the loss.

    Example:
        >>> with scale_heads(model) as gates:
        ...     loss(model(tokens)).backward()
        >>> importance = gates.grad.abs()

    Source: Michel et al., Are Sixteen Heads Really Better than One? (2019), equation 2.
    """
    adapter = _adapter(model)
    shape = (adapter.num_layers, adapter.num_heads)
    if gates is None:
        weight = adapter.part("out", 0).weight
        gates = torch.ones(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
    tensor("gates", gates)
    if tuple(gates.shape) != shape:
        raise ValueError(f"gates must have shape (layers, heads) = {shape}, got {tuple(gates.shape)}")

    def scaled(gate: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: z * gate[:, None, None].to(z.dtype)

    with ExitStack() as stack:
        for layer, gate in enumerate(gates):
            stack.callback(change(adapter, Name(layer, "attention.hook_z"), scaled(gate)).remove)
        yield gates


@contextmanager
def knock_out(model: nn.Module, heads: Pairs, edges: Mask) -> Iterator[None]:
    """Cut edges of attention: these heads do not see the keys that `edges` shows, whatever else they see.

    Only the heads named are computed again. A query that then sees nothing reads 0.

    Args:
        model: a model that `adapt` knows, in eval mode; a Hugging Face model with attn_implementation "fastattn"
            or "sdpa".
        heads: pairs (layer, head).
        edges: a value of fastattn.masks, not lowered: what is cut.

    Raises:
        ValueError, TypeError: no such head, no such mask, dropout that is active. In the forward: a model that was
            given a lowered mask, or packed sequences.

    Example:
        >>> no_previous = masks.window(1, 0) & ~masks.window(0, 0)  # the key before each query
        >>> with knock_out(model, [(3, 7)], no_previous):
        ...     logits = model(tokens)

    Source: Geva et al., Dissecting Recall of Factual Associations in Auto-Regressive Language Models (2023),
    section 5.
    """
    adapter = _adapter(model)
    if not isinstance(edges, Mask):
        raise TypeError(f"edges must be a value of fastattn.masks, not lowered; got {type(edges).__name__}")
    of_layers = _by_layer(adapter, heads)
    edits = {layer: [Edit(head, cut=edges) for head in of_layer] for layer, of_layer in of_layers.items()}
    with edited(adapter, edits):
        yield


@contextmanager
def patch_pattern(model: nn.Module, heads: Pairs, donor: Mapping[str, Any]) -> Iterator[None]:
    """Let heads look where they looked in another run, and read there what is there now.

    No pattern is stored: the head attends with the queries and keys of the other run, `attention(q, k, v_here)`.

    Args:
        model: as `knock_out`'s.
        heads: pairs (layer, head).
        donor: what `watch` recorded of the other run: hook_q and hook_k of these layers, of the same shape.

    Raises:
        ValueError, TypeError: as `knock_out`; or q or k of a layer is not in donor. In the forward: they have
            another shape.

    Example:
        >>> with watch(model, "blocks.3.attention.hook_[qk]") as donor:
        ...     model(other)
        >>> with patch_pattern(model, [(3, 7)], donor):
        ...     logits = model(tokens)

    Source: Wang et al., Interpretability in the Wild (2022), section 3: patching the pattern of a head.
    """
    adapter = _adapter(model)
    of_layers = _by_layer(adapter, heads)
    edits = {}
    for layer, of_layer in of_layers.items():
        names = [f"blocks.{layer}.attention.hook_{x}" for x in "qk"]
        if missing := [name for name in names if name not in donor]:
            raise ValueError(f"donor must hold {' and '.join(names)}, and has no {missing[0]}")
        queries_and_keys = donor[names[0]], donor[names[1]]
        edits[layer] = [Edit(head, donor=queries_and_keys) for head in of_layer]
    with edited(adapter, edits):
        yield


@contextmanager
def patch_activations(model: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Replace tensors inside a model by those of another run.

    Args:
        model: a model that `adapt` knows, in eval mode.
        values: tensors by name, such as `watch` gave them, and as it names them: "blocks.3.resid_post",
            "blocks.3.attention.hook_z.head(2)", "blocks.3.mlp.out.at(5)". What a name selects is replaced, the
            rest stays. A value broadcasts to what is replaced.

    Raises:
        ValueError, TypeError: a name that means nothing or cannot be replaced. In the forward: a shape that does
            not fit.

    Example:
        >>> with watch(model, "blocks.3.resid_post.at(5)") as clean:
        ...     model(tokens)
        >>> with patch_activations(model, clean):
        ...     logits = model(corrupted)

    Source: Vig et al., Investigating Gender Bias in Language Models Using Causal Mediation Analysis (2020); Meng
    et al., Locating and Editing Factual Associations in GPT (2022), section 2.
    """
    adapter = _adapter(model)
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a mapping from names to tensors, got {type(values).__name__}")
    with ExitStack() as stack:
        for key in values:
            name, steps = _one_place(adapter, key)
            tensor(key, values[key])
            stack.callback(change(adapter, name, Put(name, steps, values[key])).remove)
        yield


@contextmanager
def steer(model: nn.Module, name: str, vector: Tensor, *, scale: float = 1.0) -> Iterator[None]:
    """Add a vector inside a model.

    Args:
        model: a model that `adapt` knows.
        name: where, as for `watch`: "blocks.8.resid_post", or "blocks.8.resid_post.at(-1)" for one position alone.
            A wildcard steers several layers.
        vector: broadcasts to what the name selects; (d,) for a stream.
        scale: by what it is multiplied.

    Example:
        >>> with steer(model, "blocks.8.resid_post", love - hate, scale=4.0):
        ...     logits = model(tokens)

    Source: Turner et al., Steering Language Models With Activation Engineering (2023).
    """
    adapter = _adapter(model)
    tensor("vector", vector)
    added = vector * number("scale", scale)
    with ExitStack() as stack:
        for one, steps in _places(adapter, name):
            stack.callback(change(adapter, one, Put(one, steps, added, adds=True)).remove)
        yield


@torch.no_grad()
def path_patch(model: nn.Module, inputs: Inputs, donor: Inputs, *, sender: str, receiver: str) -> Tensor:
    """The logits if one component, and it alone, hears another as it speaks in another run.

    The direct path from sender to receiver through the stream is patched: the sender says what it says on `donor`,
    everything between says what it says on `inputs`, and so the receiver is computed; the rest of the model then
    runs on `inputs` with that receiver. Four forwards, batched as the inputs are.

    Args:
        model: a model that `adapt` knows, in eval mode.
        inputs, donor: tokens (B, L), or mappings of the model's arguments; of one shape.
        sender: a place that adds to the stream: "blocks.3.attention.hook_z.head(7)", "blocks.3.attention.out",
            "blocks.3.mlp.out", "blocks.3.mlp.hook_post", or "blocks.0.resid_pre" for the embedding.
        receiver: a later place that reads it: "blocks.9.attention.hook_q.head(6)" (or hook_k, hook_v, hook_z,
            out), "blocks.9.mlp.out", or "logits".

    Returns:
        (B, L, vocabulary), to compare with the model's logits on `inputs`.

    Raises:
        ValueError, TypeError: places that mean nothing, several places, or a receiver that does not come after the
            sender.

    Source: Wang et al., Interpretability in the Wild (2022), section 3.1 and appendix B; Goldowsky-Dill et al.,
    Localizing Model Behavior with Path Patching (2023).
    """
    adapter = _adapter(model)
    name = _one_place(adapter, sender)[0]
    hears = None if receiver == "logits" else _one_place(adapter, receiver)
    _check_order(adapter, name, sender, None if hears is None else hears[0], receiver)
    adds = [f"blocks.*.{kind}" for kind in ("attention.out", "mlp.out") if kind in kinds_of(adapter)]
    with watch(model, adds) as own:
        _run(adapter, inputs)
    with watch(model, sender) as said:
        _run(adapter, donor)
    components = {_component(name)} | ({_component(hears[0])} if hears else set())
    frozen = {key: value for key, value in own.items() if _component(_parsed(key)) not in components}
    with patch_activations(model, frozen), patch_activations(model, dict(said)), ExitStack() as stack:
        heard = None if hears is None else stack.enter_context(watch(model, receiver))
        logits = _run(adapter, inputs)
    if heard is None:
        return logits
    with patch_activations(model, dict(heard)):
        return _run(adapter, inputs)


# ---- what is asked for ----


def _adapter(model: nn.Module) -> Adapter:
    """The model's parts; dropout that is active is refused, since no two runs could be compared."""
    adapter = adapt(model)
    check_model(model)
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "model must not checkpoint its gradients, since its backward would compute again what was changed, "
            "unchanged: call model.gradient_checkpointing_disable()"
        )
    return adapter


def _run(adapter: Adapter, inputs: Inputs) -> Tensor:
    """One forward."""
    if isinstance(inputs, Mapping):
        return adapter.run(**inputs)
    tensor("inputs", inputs)
    return adapter.run(inputs)


def _parts(adapter: Adapter, heads: Pairs, mlps: Iterable[int], neurons: Pairs) -> dict[Name, list[int] | None]:
    """Which tensors are meant, and which heads or neurons of them; None is all of it."""
    parts: dict[Name, Any] = {
        Name(layer, "attention.hook_z"): of_layer for layer, of_layer in _by_layer(adapter, heads).items()
    }
    for layer in mlps:
        parts[Name(_with_mlp(adapter, layer), "mlp.out")] = None
    for layer, neuron in _pairs("neurons", neurons):
        layer = _with_mlp(adapter, layer)
        count = len(adapter.neuron_outputs(layer)[0])
        if not 0 <= integer("neuron", neuron) < count:
            raise ValueError(f"neurons must be pairs (layer, neuron) with a neuron below {count}, got {neuron}")
        parts.setdefault(Name(layer, "mlp.hook_post"), []).append(neuron)
    if not parts:
        raise ValueError("heads, mlps or neurons must name what is to be ablated, got none")
    return parts


def _with_mlp(adapter: Adapter, layer: int) -> int:
    layer = adapter.layer(layer)
    if adapter.part("down", layer) is None:
        raise ValueError(f"block {layer} has no MLP")
    return layer


def _by_layer(adapter: Adapter, heads: Pairs) -> dict[int, list[int]]:
    """Pairs (layer, head), checked, as heads by layer."""
    of_layers: dict[int, list[int]] = {}
    for layer, head in _pairs("heads", heads):
        head, layer = integer("head", head), adapter.layer(layer)
        if not -adapter.num_heads <= head < adapter.num_heads:
            raise ValueError(
                f"heads must be pairs (layer, head) with a head below {adapter.num_heads}, got {head}"
            )
        of_layers.setdefault(layer, []).append(head % adapter.num_heads)
    return of_layers


def _pairs(name: str, pairs: Any) -> list[tuple[int, int]]:
    what = f"{name} must be pairs such as [(3, 7), (4, 0)]"
    if not isinstance(pairs, Iterable):
        raise TypeError(f"{what}, got {type(pairs).__name__}")
    pairs = list(pairs)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"{what}, got {pair!r} in it")
    return pairs


def _places(adapter: Adapter, name: str) -> list[tuple[Name, tuple[Step, ...]]]:
    """The tensors that a name means, with the part of them."""
    if not isinstance(name, str):
        raise TypeError(f"a name must be a string, got {type(name).__name__}")
    pattern, steps = split_steps(name)
    if wrong := [step for step in steps if step.kind not in ("head", "at")]:
        raise ValueError(
            f"{wrong[0]} selects nothing that could be replaced, in {name!r}: .head(3) and .at(-1) do"
        )
    kinds = kinds_of(adapter)
    found = find(pattern, adapter, kinds)
    for one in found:
        if any(step.kind == "head" for step in steps) and "head" not in kinds[one.kind].axes:
            raise ValueError(f"{one} has no heads, got {name!r}")
    return [(one, steps) for one in found]


def _one_place(adapter: Adapter, name: str) -> tuple[Name, tuple[Step, ...]]:
    places = _places(adapter, name)
    if len(places) > 1:
        raise ValueError(f"{name!r} means {len(places)} places, such as {places[0][0]}: name one")
    return places[0]


def _parsed(name: str) -> Name:
    _, layer, kind = name.split(".", 2)
    return Name(int(layer), kind)


def _component(name: Name) -> Name:
    """The attention or the MLP that a place belongs to."""
    return Name(name.layer, name.kind.partition(".")[0])


# In which order a block computes.
_RANKS = {
    "resid_pre": 0,
    **dict.fromkeys(("attention.hook_q", "attention.hook_k", "attention.hook_v"), 1),
    "attention.hook_z": 2, "attention.out": 3, "resid_mid": 4, "mlp.hook_post": 5, "mlp.out": 6, "resid_post": 7,
}  # fmt: skip


def _check_order(
    adapter: Adapter, sender: Name, sender_name: str, receiver: Name | None, receiver_name: str
) -> None:
    senders = ("attention.hook_z", "attention.out", "mlp.hook_post", "mlp.out")
    if sender.kind not in senders and sender != Name(0, "resid_pre"):
        raise ValueError(
            f"sender must be what adds to the stream ({', '.join(senders)}, or blocks.0.resid_pre), "
            f"got {sender_name!r}"
        )
    if receiver is None:
        return
    written = {"attention": 3, "mlp": 6, "resid_pre": 0}[sender.kind.partition(".")[0]]
    beside = adapter.parallel and receiver.kind.startswith("mlp") and sender.kind.startswith("attention")
    after = (receiver.layer, _RANKS[receiver.kind]) > (sender.layer, written)
    if not after or (receiver.layer == sender.layer and beside):
        raise ValueError(
            f"receiver must read after the sender has written, got {receiver_name!r} after {sender_name!r}"
        )
