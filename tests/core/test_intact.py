"""fastattn.core.intact: the weights of a part may be used without calling it only while a call would do
no more than its class does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fastattn.core.intact import alteration


class Adapted(nn.Linear):
    pass


class Packed(Tensor):
    pass


def with_weight(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight, requires_grad=False)


def as_plain_attribute(linear: nn.Linear) -> None:
    """The weight becomes a plain tensor, as in hypernetworks and flattened parameters."""
    weight = linear.weight.detach().as_subclass(Packed)
    del linear.weight
    linear.weight = weight


def forward_of_accelerate(linear: nn.Linear) -> None:
    linear.forward = functools.partial(nn.Linear.forward, linear)


ALTERATIONS: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "another class": (lambda m: setattr(m, "__class__", Adapted), "is of class Adapted"),
    "parametrised": (parametrizations.weight_norm, "is of class ParametrizedLinear"),
    "forward replaced": (forward_of_accelerate, "has another forward"),
    "forward hook": (lambda m: m.register_forward_hook(lambda *_: None), "has a forward hook"),
    "forward hook with keywords": (
        lambda m: m.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True),
        "has a forward hook",
    ),
    "forward pre-hook": (lambda m: m.register_forward_pre_hook(lambda *_: None), "has a forward hook"),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "has a forward hook"),
    "backward hook": (lambda m: m.register_full_backward_hook(lambda *_: None), "has a backward hook"),
    "backward pre-hook": (lambda m: m.register_full_backward_pre_hook(lambda *_: None), "has a backward hook"),
    "tensor subclass": (lambda m: with_weight(m, m.weight.detach().as_subclass(Packed)), "weight of type Packed"),
    "no parameter": (as_plain_attribute, "a weight of type Packed"),
    "sparse": (lambda m: with_weight(m, m.weight.detach().to_sparse()), "a weight with layout torch.sparse_coo"),
    "offloaded": (lambda m: m.to("meta"), "a weight on meta, where the input is on cpu"),
    "another dtype": (lambda m: m.to(torch.bfloat16), "a weight of torch.bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALTERATIONS)
def test_what_makes_a_linear_more_than_its_class_is_named(name: str) -> None:
    alter, reason = ALTERATIONS[name]
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    assert alteration(linear, nn.Linear, x) is None
    alter(linear)
    assert reason in (alteration(linear, nn.Linear, x) or "nothing")


def test_global_hooks_and_a_forward_replaced_on_the_class_count_while_they_are_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = nn.Linear(4, 4)
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: None):
        assert "hooks" in (alteration(linear, nn.Linear) or "")
    assert alteration(linear, (nn.Linear, nn.GELU)) is None
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert "another forward" in (alteration(linear, nn.Linear) or "")


def test_a_device_that_autocast_does_not_know_is_no_error() -> None:
    linear, x = nn.Linear(4, 4, device="meta"), torch.empty(2, 4, device="meta", dtype=torch.float16)
    assert "weight of torch.float32" in (alteration(linear, nn.Linear, x) or "")


def test_autocast_converts_dtypes_so_that_they_are_no_reason_there() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert alteration(nn.Linear(4, 4), nn.Linear, torch.randn(2, 4, dtype=torch.bfloat16)) is None


class Guarded(nn.Module):
    """1 more if its part may be read, else 100 more."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + (1 if alteration(self.part, nn.Linear, x) is None else 100)


def test_torch_compile_traces_the_guard_and_notices_a_forward_that_is_replaced_later() -> None:
    torch._dynamo.reset()
    model, x = Guarded(), torch.zeros(4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(x)[0] == 1
    forward_of_accelerate(model.part)
    assert compiled(x)[0] == 100
    del model.part.forward
    assert compiled(x)[0] == 1


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_counts_as_plain(strict: bool) -> None:
    x = torch.zeros(2, 4)
    assert torch.export.export(Guarded(), (x,), strict=strict).module()(x)[0, 0] == 1


def test_proxies_of_torch_fx_are_no_plain_input() -> None:
    assert torch.fx.symbolic_trace(Guarded())(torch.zeros(4))[0] == 100


def test_a_part_that_is_called_with_more_than_a_plain_tensor_is_called() -> None:
    class Noted(torch.Tensor):
        pass

    assert alteration(nn.Linear(2, 2), nn.Linear, torch.ones(2)) is None
    assert alteration(nn.Linear(2, 2), nn.Linear, torch.ones(2).as_subclass(Noted)) == "is called with a Noted"
