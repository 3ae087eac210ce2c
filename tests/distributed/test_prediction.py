"""Predictions: counted from the mask, and equal to a formula wherever there is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastattn import masks
from fastattn.distributed import Layout, layout
from fastattn.distributed.prediction import BACKWARD, Machine, Pairs, Sizes, pairs, predict
from fastattn.distributed.visibility import Visibility, whole_mask

LENGTH, BATCH, HEADS = 1000, 2, 4
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (130, 0)},
    "documents": {"mask": masks.documents(cu_seqlens=[0, 20, 150, 610, LENGTH])},
    "key lengths": {"mask": masks.causal() & masks.key_lengths([900, 130])},
    "lists": {"mask": masks.longformer(64, [3, 200])},
    "lists by head": {"mask": masks.from_function(lambda b, h, q, k: (k <= q) & (k // 64 % 4 == h))},
}
SIZES = Sizes(batch=BATCH, heads=HEADS, key_heads=2, width=16, value_width=32, element=2)
# Links without a time, and kernels without a time.
AT_ONCE = Machine(attention=1e12, link=float("inf"), latency=0.0)
ONLY_LINKS = Machine(attention=float("inf"), link=1e9, latency=1e-5)


def visibility_of(name: str) -> Visibility:
    options = MASKS[name]
    left, right = options.get("window", (None, 0 if options.get("causal") else None))
    return Visibility(whole_mask((BATCH, HEADS, LENGTH, LENGTH, "cpu"), (left, right), options.get("mask")))


def counted(name: str, ranks: int) -> tuple[Pairs, Layout]:
    plan = layout(LENGTH, ranks, batch=BATCH, heads=HEADS, **MASKS[name])
    return pairs(visibility_of(name), plan.owners, ranks), plan


@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("name", MASKS)
def test_granules_are_those_of_the_layout_and_keys_those_that_ranks_need(name: str, ranks: int) -> None:
    seen, plan = counted(name, ranks)
    assert seen.work.tolist() == plan.rank_work.tolist()
    needs = visibility_of(name).needs(plan.owners, ranks)
    assert torch.equal(seen.tokens > 0, needs)
    assert not ((seen.granules > 0) & ~needs).any()
    assert name == "key lengths" or torch.equal(seen.granules > 0, needs)


def tokens_of(ranks: int) -> float:
    return LENGTH / ranks


@pytest.mark.parametrize("method", ["ring", "gather", "heads"])
@pytest.mark.parametrize("name", ["causal", "lists"])
def test_without_the_time_of_links_only_computing_is_left(name: str, method: str) -> None:
    seen, _ = counted(name, 4)
    cost = predict(method, seen, SIZES, AT_ONCE, tokens_of(4))
    work = seen.work.mean() if method == "heads" else seen.work.max()
    flops = float(work) * 2 * 64 * 64 * (16 + 32) * (1 + BACKWARD)
    assert cost.computing == pytest.approx(flops / 1e12)
    # Ranks of a ring wait for each other in each round, where the work of rounds differs.
    assert cost.seconds == pytest.approx(cost.computing) or method == "ring"


@pytest.mark.parametrize("wider", [1, 2])
def test_without_the_time_of_kernels_each_method_takes_its_messages_one_after_another(wider: int) -> None:
    """wider: how many times as many bytes an element of the gradients has."""
    ranks, n = 4, 256
    sizes = dataclasses.replace(SIZES, gradient_element=wider * SIZES.element)
    every = Pairs(torch.ones(ranks, ranks).double(), torch.full((ranks, ranks), float(n)).double())
    key, query = BATCH * 2 * (16 + 32) * 2, BATCH * HEADS * (16 + 32) * 2
    message, gradient = 1e-5 + n * key / 1e9, 1e-5 + wider * n * key / 1e9
    # Forward and backward bring the keys. In the backward gradients leave a round later, one after another.
    expected = {
        "ring": ranks * message + (ranks - 1) * gradient,
        "gather": (ranks - 1) * (2 * message + gradient),
        "heads": 2 * (ranks - 1) * (2e-5 + n * (query + 2 * key) / ranks / 1e9),
    }
    sent = {
        "ring": (2 + wider) * (ranks - 1) * n * key,
        "gather": (2 + wider) * (ranks - 1) * n * key,
        "heads": 2 * (ranks - 1) * n * (query + 2 * key) / ranks,
    }
    for method, seconds in expected.items():
        cost = predict(method, every, sizes, ONLY_LINKS, n)
        assert cost.seconds == pytest.approx(seconds), method
        assert cost.sent == pytest.approx(sent[method]), method


def test_a_ring_hides_its_messages_behind_computation() -> None:
    seen, _ = counted("causal", 4)
    for link, hidden in ((1e12, True), (1e6, False)):
        machine = Machine(attention=1e11, link=link, latency=0.0)
        ring, gather = (predict(method, seen, SIZES, machine, tokens_of(4)) for method in ("ring", "gather"))
        assert (ring.exposed < 0.2 * ring.computing) == hidden
        assert ring.seconds < gather.seconds


def test_messages_within_a_node_take_its_own_links() -> None:
    ranks, n = 4, 256
    every = Pairs(torch.ones(ranks, ranks).double(), torch.full((ranks, ranks), float(n)).double())
    far = predict("gather", every, SIZES, ONLY_LINKS, n).seconds
    near = dataclasses.replace(ONLY_LINKS, node=2, node_link=1e15, node_latency=0.0)
    assert predict("gather", every, SIZES, near, n).seconds == pytest.approx(far * 2 / 3, rel=1e-3)


def test_sharing_heads_in_a_node_and_going_round_between_nodes_sends_less_between_nodes() -> None:
    ranks, n = 4, 256
    every = Pairs(torch.ones(ranks, ranks).double(), torch.full((ranks, ranks), float(n)).double())
    machine = dataclasses.replace(ONLY_LINKS, node=2, node_link=1e15, node_latency=0.0)
    both = predict("ring x heads", every, SIZES, machine, n, rings=2)
    # One message of the ring: the keys of two ranks, for half of the heads.
    assert both.seconds == pytest.approx(3 * (1e-5 + 2 * n * SIZES.key_bytes / 2 / 1e9), rel=1e-3)
    assert both.seconds < predict("ring", every, SIZES, machine, n).seconds
