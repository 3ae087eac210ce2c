"""MLPs found by their parts: two or three linear layers and an activation, whatever their names.

Names prove nothing. The module's own code is run on inputs of several sizes and ranks, in training and in eval
mode, and its results must equal those of the fused function. It runs with random weights, because zeros, with
which some layers are initialised, would agree with everything; and in float64, where two activations differ by far
more than rounding.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastattn.dropin import mlp_forms
from fastattn.dropin.fused_classes import Call, agree, fused_class
from fastattn.dropin.likeness import source_of
from fastattn.dropin.mlp_forms import (
    Form,
    FusedForward,
    FusedSequential,
    Names,
    Parts,
    activation_name,
    is_linear_like,
)
from fastattn.ground.checks import ACTIVATIONS

# Functional dropout in a module's code.
DROPS = re.compile(r"(?<!self\.)\b(feature_)?(alpha_)?dropout\(")

# Widths of the layers in a trial of a module that works with any widths: all different.
SMALL = {"in": 6, "hidden": 10, "out": 8}

UNITS = 256  # of rounding, by which the results of two ways to compute an MLP may differ


def known_form(module: nn.Module) -> tuple[type[Form], Names] | None:
    """The known form and names that fit this module; None if none do."""
    for form, names in mlp_forms.KNOWN:
        if hasattr(module, form.method) and names.read(module) is not None:
            return form, names
    return None


def candidates(module: nn.Module) -> list[Names]:
    """Every way in which the module may be one MLP: all its weights are in two or three linear layers."""
    parts = [(name, part) for name, part in module.named_modules() if name]
    layers = [(name, part) for name, part in parts if is_linear_like(part)]
    inside = tuple(f"{name}." for name, _ in layers)
    rest = [(name, part) for name, part in parts if not is_linear_like(part) and not name.startswith(inside)]
    if len(layers) not in (2, 3) or module._parameters or any(part._parameters for _, part in rest):
        return []
    if any(isinstance(part, nn.Sequential) and mlp_forms.runs(part) for _, part in rest):
        return []
    leaves = [(name, part) for name, part in rest if not any(True for _ in part.children())]
    dropouts = tuple(name for name, part in leaves if isinstance(part, nn.Dropout | nn.Identity))
    activations = [(name, part) for name, part in leaves if name not in dropouts]
    activations += [(key, value) for key, value in vars(module).items() if _is_function(value)]
    if len(activations) > 1:
        return []
    around = tuple(name for name, part in rest if any(True for _ in part.children()))
    names = [Names(first, last, dropouts=dropouts, around=around, packed=p) for first, last, p in _orders(layers)]
    return [full for one in names for full in _with_activations(one, activations)]


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type | nn.Module)


def _orders(layers: list[tuple[str, Any]]) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Which layers may be first (gate, then up) and which last, by their widths."""
    for order in permutations(layers):
        (*first, (last, end)) = order
        names, widths = tuple(name for name, _ in first), [_widths(layer) for _, layer in first]
        hidden = _widths(end)[0]
        if all(width[1] == hidden and width[0] == widths[0][0] for width in widths):
            yield names, last, ""
        elif len(first) == 1 and widths[0][1] == 2 * hidden:
            yield names, last, "gate_up"
            yield names, last, "up_gate"


def _widths(layer: Any) -> tuple[int, int]:
    """In and out."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return layer.weight.shape[0], layer.weight.shape[1]


def _with_activations(names: Names, found: list[tuple[str, Any]]) -> Iterator[Names]:
    """The activation that the module holds; or else each one that its code may compute."""
    if found and activation_name(found[0][1]) is not None:
        yield replace(names, activation=found[0][0])
        return
    for known in ACTIVATIONS:
        if not found:
            yield replace(names, computes=known)
        elif not isinstance(found[0][1], nn.Module):
            yield replace(names, computes=known, activation=found[0][0], custom=found[0][1])
        elif _has_nothing_of_its_own(found[0][1]):
            yield replace(names, computes=known, activation=found[0][0], custom=type(found[0][1]))


def _has_nothing_of_its_own(module: nn.Module) -> bool:
    """Whether its class alone determines what it computes: the instance holds no number or function."""
    return set(vars(module)) <= set(vars(nn.Module())) and not module._buffers


def found_way(module: nn.Module, form: type[Form], ways: list[Names]) -> Names | None:
    """The first of these ways in which the module computes just this MLP; None if it does not."""
    # Functional dropout does nothing at a rate of 0, but the rate may change later.
    drops = any(DROPS.search(source_of(kind)) for kind in type(module).__mro__ if kind not in nn.Module.__mro__)
    in_both_modes = [] if drops else ways
    found = next((names for names in in_both_modes if is_this_mlp(module, form, names)), None)
    if found is None:
        in_eval = (replace(names, only_in_eval=True) for names in ways)
        found = next((names for names in in_eval if is_this_mlp(module, form, names)), None)
    if found is None or form is not FusedForward:
        return found
    after = _after_the_last(module, found)
    return replace(found, after=after, dropouts=tuple(d for d in found.dropouts if d not in after))


def is_this_mlp(module: nn.Module, form: type[Form], names: Names) -> bool:
    """Whether the module's own code computes the same as the form; see the top of this file."""
    # In float64, which the Triton kernels do not compute, whatever FASTATTN_BACKEND says.
    fused = fused_class(form, type(module), names)
    if fused.is_outdated():  # a method that is another object each time: nobody could tell whether it is replaced
        return False
    made = type("Tried", (fused,), {"named_backend": "portable"})
    small = form is FusedForward and _trial(module, form, made, names, SMALL)
    return small or _trial(module, form, made, names, None)


def _trial(
    module: nn.Module, form: type[Form], made: type[nn.Module], names: Names, widths: dict[str, int] | None
) -> bool:
    own, ours = getattr(type(module), form.method), getattr(made, form.method)
    try:
        state, width = _random_state(module, names, widths)
        inputs = list(_inputs(width, next(iter(state.values())).device))
        for training in (False,) if names.only_in_eval else (True, False):
            # A large layer is slow: it is tried on one input in each mode.
            for x in inputs if widths or names.only_in_eval else inputs[:1] if training else inputs[1:]:
                with _quiet(module, names, training, widths):
                    before = _attributes(module)
                    own_input = x.clone()
                    expected = functional_call(Call(module, type(module), own), state, (own_input,))
                    if _attributes(module) != before or not torch.equal(own_input, x):
                        return False  # It changes itself or its input, which others may read.
                    actual = functional_call(Call(module, made, ours), state, (x.clone(),))
                if not agree(actual, expected, UNITS):
                    return False
    except Exception:
        # It cannot be called like an MLP.
        return False
    return True


def _random_state(module: nn.Module, names: Names, widths: dict[str, int] | None) -> tuple[dict[str, Tensor], int]:
    """Random values for the parameters of the MLP's modules, and the width of its input."""
    parts = names.read(module)
    assert parts is not None
    used = {id(part) for root in (*parts.layers, *parts.around) for part in root.modules()}
    numbers, state = _numbers(parts.last.weight.device), {}
    for name, part in module.named_modules():
        for key, value in part._parameters.items() if id(part) in used else ():
            if value is None:
                continue
            shape = tuple(value.shape)
            if widths is not None:
                out, inner = _trial_shape(parts, part, widths)
                transposed = mlp_forms._is_conv1d(part)
                shape = (out,) if key == "bias" else (inner, out) if transposed else (out, inner)
            path = ".".join(filter(None, ("inner", name, key)))
            # Scaled so that hidden values are about 1, where activations differ most.
            state[path] = numbers(shape) / (1.0 if len(shape) == 1 else min(shape) ** 0.5)
    return state, _widths(parts.first[0])[0] if widths is None else widths["in"]


def _numbers(device: torch.device) -> Callable[[tuple[int, ...]], Tensor]:
    """Normal numbers of any shape. Some thousands are drawn and then repeated, because layers may be large."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    drawn, start = torch.randn(10007, generator=generator, dtype=dtype).to(device), 0

    def take(shape: tuple[int, ...]) -> Tensor:
        nonlocal start
        size, start = torch.Size(shape).numel(), start + 1009
        return drawn.roll(-start).repeat(-(-size // len(drawn)))[:size].reshape(shape)

    return take


def _inputs(width: int, device: torch.device) -> Iterator[Tensor]:
    """Inputs of three and of two dimensions, with rows from small to so large that a clamp would show."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    x = torch.randn(2, 4, width, generator=generator, dtype=dtype).to(device)
    sizes = torch.tensor([1e-2, 1.0, 3.0, 300.0], dtype=dtype, device=device)
    yield x * sizes[:, None]
    yield x[0] * sizes[:, None]


@contextlib.contextmanager
def _quiet(module: nn.Module, names: Names, training: bool, widths: dict[str, int] | None) -> Iterator[None]:
    """Within, the module is in this mode, without dropout, gradients and autocast. Afterwards its attributes and
    the user's random generator are as before."""
    was = [(part, dict(vars(part))) for part in module.modules()]
    device = next(module.parameters()).device
    parts = names.read(module)
    assert parts is not None
    try:
        for part, _ in was:
            part.training = training and not isinstance(part, nn.Dropout)
            if widths is not None and mlp_forms._is_conv1d(part):
                # transformers' Conv1D reads its width from an attribute.
                vars(part)["nf"] = _trial_shape(parts, part, widths)[0]
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
            torch.no_grad(),
        ):
            yield
    finally:
        for part, attributes in was:
            for key in set(vars(part)) - set(attributes):
                del vars(part)[key]
            vars(part).update(attributes)


def _trial_shape(parts: Parts, layer: nn.Module, widths: dict[str, int]) -> tuple[int, int]:
    """The output and input width of a layer in a trial with these widths."""
    if layer is not parts.last:
        return widths["hidden"] * (2 if parts.packed else 1), widths["in"]
    as_wide = _widths(parts.last)[1] == _widths(parts.first[0])[0]
    return widths["in" if as_wide else "out"], widths["hidden"]


def _attributes(module: nn.Module) -> list[dict[str, int]]:
    """The identities of the attributes of the module and its parts."""
    return [{key: id(value) for key, value in vars(part).items()} for part in module.modules()]


def _after_the_last(module: nn.Module, names: Names) -> tuple[str, ...]:
    """The dropouts that are applied to the last layer's result, in the order of the calls."""
    if not names.dropouts:
        return ()
    state, width = _random_state(module, names, None)
    end: list[Any] = []
    called: list[str] = []
    parts = names.read(module)
    assert parts is not None

    def note(name: str) -> Callable:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            if end and args[0] is end[-1]:
                called.append(name)
                end.append(out)

        return hook

    handles = [parts.last.register_forward_hook(lambda *a: end.append(a[2]))]
    handles += [module.get_submodule(name).register_forward_hook(note(name)) for name in names.dropouts]
    try:
        with _quiet(module, names, False, None):
            x = next(_inputs(width, next(iter(state.values())).device))
            functional_call(Call(module, type(module), type(module).forward), state, (x,))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(called)


def why_left(module: nn.Module) -> str | None:
    """Why a module that looks like an MLP was not swapped; None if it does not look like one."""
    stacked = [p for p in module._parameters.values() if p is not None and p.dim() == 3 and min(p.shape) > 1]
    if len(stacked) >= 2 or (stacked and "expert" in type(module).__name__.lower()):
        return "experts: the weights of several MLPs lie in one tensor, and its own code sends each token to some"
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict | FusedSequential):
        return None
    layers = [(name, part) for name, part in module.named_children() if is_linear_like(part)]
    if not layers:  # BERT and its like have one layer in each of two modules.
        found = [(name, mlp_forms._get(module, name)) for name in ("intermediate.dense", "output.dense")]
        layers = [(name, part) for name, part in found if is_linear_like(part)]
    for (first, a), (last, b) in permutations(layers, 2):
        (width, hidden), (inner, out) = _widths(a), _widths(b)
        if hidden in (inner, 2 * inner) and width == out and hidden > width:
            return f"{first} and {last} look like an MLP's, but its own code computes more, or something else"
    return None
