"""The lens and the model it looks into compute one attention between them, to the same bits."""

from __future__ import annotations

import pytest
import torch
from lens_models import ALL, LAYERS, make, text
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import fastattn
from fastattn import lens
from fastattn.lens.once import Once


class Count(TorchDispatchMode):
    """How many attentions are computed."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.fastattn.attention_forward.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_is_watched_attends_once_a_layer(name):
    model, tokens = make(name), text()
    run = lens.adapt(model).run
    expected = run(tokens)
    names = ["blocks.*.attention.entropy", "blocks.*.attention.received"]
    with Count() as count, lens.watch(model, names[0]) as one, lens.watch(model, names[1]) as other:
        result = run(tokens)
    assert count.number == LAYERS and torch.equal(result, expected) and len(one) == len(other) == LAYERS
    with Count() as count:
        lens.head_report(model, tokens)
    assert count.number == LAYERS


@pytest.mark.parametrize("name", ["own", "llama"])
def test_gradients_are_those_of_the_model_that_is_not_watched(name):
    model, tokens = make(name), text()
    run = lens.adapt(model).run

    def gradients():
        return torch.autograd.grad(run(tokens).square().sum(), list(model.parameters()))

    expected = gradients()
    with lens.watch(model, "blocks.*.attention.entropy") as seen:
        found = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not seen["blocks.*.attention.entropy"].requires_grad


def test_only_the_same_attention_is_computed_once():
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    lengths = torch.tensor([17])

    def computed(second) -> int:
        with Count() as count, Once():
            fastattn.attention(q, k, v, key_lengths=lengths)
            second()
        return count.number

    assert computed(lambda: fastattn.attention(q, k, v, key_lengths=[17])) == 1
    assert computed(lambda: fastattn.attention(q, k, v, key_lengths=[16])) == 2
    assert computed(lambda: fastattn.attention(q, k, v, key_lengths=lengths, scale=0.3)) == 2
    assert computed(lambda: fastattn.attention(q.mT.contiguous().mT, k, v, key_lengths=lengths)) == 2

    def changed():
        q.mul_(1.0)
        fastattn.attention(q, k, v, key_lengths=lengths)

    assert computed(changed) == 2
    with Once():
        first, second = (fastattn.attention(q, k, v) for _ in range(2))
        with torch.inference_mode():
            third, fourth = (fastattn.attention(q, k, v) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(third, fourth)


@pytest.mark.parametrize("name", ["own", "llama"])
def test_a_forward_that_fails_leaves_nothing_behind(name):
    model = make(name)
    out = lens.adapt(model).part("out", 1)

    def fails(*_):
        raise KeyboardInterrupt

    handle = out.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt), lens.watch(model, "blocks.*.attention.entropy"):
        lens.adapt(model).run(text())
    handle.remove()
    assert not _get_current_dispatch_mode_stack()
