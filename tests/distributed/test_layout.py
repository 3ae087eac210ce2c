"""Layouts: every token has one owner, and ranks have the same work."""

from __future__ import annotations

import matplotlib.image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import distributed, masks
from fastattn.distributed.transports import rounds, scheduled
from fastattn.distributed.visibility import Visibility, whole_mask

MILLION = 2**20
DOCUMENTS = [0, 3, 50_000, 50_100, 300_000, 300_700, 900_000, MILLION]
BALANCED = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 4096},
    "documents": {"causal": True, "mask": masks.documents(cu_seqlens=DOCUMENTS)},
    "prefix": {"mask": masks.causal() | masks.prefix(70_000)},
}


@pytest.mark.parametrize("ranks", [1, 3, 8, 1024])
@pytest.mark.parametrize("name", BALANCED)
def test_no_rank_has_more_than_a_twentieth_above_the_mean_work_of_a_million_tokens(name: str, ranks: int) -> None:
    plan = distributed.layout(MILLION, ranks, **BALANCED[name])
    assert plan.balance <= 1.05
    assert max(plan.counts) - min(plan.counts) <= 64 * 16, "tokens are shared equally, too"


def test_a_causal_mask_is_dealt_in_zigzag_and_others_in_one_chunk_a_rank() -> None:
    zigzag = distributed.layout(1024, 4, causal=True)
    assert [zigzag.chunks(rank) for rank in range(4)] == [
        [range(0, 128), range(896, 1024)],
        [range(128, 256), range(768, 896)],
        [range(256, 384), range(640, 768)],
        [range(384, 640)],
    ]
    for options in ({}, {"window": 64}):
        assert [len(distributed.layout(65536, 4, **options).chunks(rank)) for rank in range(4)] == [1] * 4


def test_work_is_what_the_kernels_visit() -> None:
    mask = masks.longformer(128, [5, 700])
    plan = distributed.layout(1000, 4, mask=mask, batch=2, heads=3)
    assert int(plan.rank_work.sum()) == mask.lower(2, 3, 1000, 1000).visited_granules


def _causal_within_100(b, h, q, k):
    return (k <= q) & (q // 100 == k // 100)


ANY_MASK = st.sampled_from(
    [
        masks.causal(),
        masks.window(30, 10),
        masks.causal() | masks.prefix([90, 3]),
        masks.key_lengths([200, 0]) & masks.window(100, 0),
        masks.from_function(_causal_within_100),
        masks.longformer(64, [70]),
        ~masks.causal(),
        masks.bigbird(block=32, random=1),
        masks.dilated(70),
    ]
)


@settings(max_examples=60)
@given(length=st.integers(0, 700), ranks=st.integers(1, 9), mask=ANY_MASK)
def test_tokens_are_dealt_out_once_and_ranks_need_exactly_what_they_see(length: int, ranks: int, mask) -> None:
    if length <= 70:
        mask = masks.causal()
    plan = distributed.layout(length, ranks, mask=mask, batch=2)
    tokens = [plan.positions(rank) for rank in range(ranks)]
    assert torch.cat(tokens).sort()[0].tolist() == list(range(length))
    assert all((t.diff() > 0).all() for t in tokens)
    if not length:
        return
    dense = mask.dense(2, 1, length, length).any(1).any(0)
    visibility = Visibility(whole_mask((2, 1, length, length, "cpu"), (None, None), mask))
    needs = visibility.needs(plan.owners, ranks)
    for i in range(ranks):
        for j in range(ranks):
            part = visibility.part(tokens[i], tokens[j])
            sees = bool(dense[tokens[i]][:, tokens[j]].any())
            assert needs[i, j] == sees == (part is not None)


@settings(max_examples=60)
@given(length=st.integers(65, 400), ranks=st.integers(1, 4), mask=ANY_MASK)
def test_a_part_shows_its_queries_what_the_whole_mask_shows_them(length: int, ranks: int, mask) -> None:
    length = max(length, 71)
    plan = distributed.layout(length, ranks, mask=mask, batch=2)
    visibility = Visibility(whole_mask((2, 1, length, length, "cpu"), (None, None), mask))
    dense = mask.dense(2, 1, length, length).expand(2, 1, -1, -1)
    shown = torch.zeros_like(dense)
    for i in range(ranks):
        for j in range(ranks):
            queries, keys = plan.positions(i), plan.positions(j)
            part = visibility.only(queries=queries).part(queries, keys)
            bounds = visibility.only(keys=keys).bounds(queries, keys)
            assert bounds == visibility.bounds(queries, keys) == (part and (part.rows, part.columns))
            if part is not None:
                rows, columns = queries[part.rows], keys[part.columns]
                assert torch.equal(part.key_positions, columns)
                shown[:, :, rows[:, None], columns] = _seen(part.mask, len(rows), len(columns))
    assert torch.equal(shown, dense)


def _seen(lowered, queries: int, keys: int) -> torch.Tensor:
    """What a lowered mask shows, (2, 1, queries, keys)."""
    if lowered is None:
        return torch.ones(2, 1, queries, keys, dtype=torch.bool)
    if lowered.lists is not None:
        return masks.decode(lowered.lists, 2, 1, queries, keys)[0]
    key, query = torch.arange(keys), torch.arange(queries)[:, None] + keys - queries
    seen = torch.ones(2, queries, keys, dtype=torch.bool)
    if lowered.intervals is not None:
        start, stop = lowered.intervals[:, :, :queries, None].unbind(1)
        seen = seen & (start <= key) & (key < stop)
    seen = seen if lowered.left is None else seen & (key >= query - lowered.left)
    seen = seen if lowered.right is None else seen & (key <= query + lowered.right)
    seen = seen if lowered.key_lengths is None else seen & (key < lowered.key_lengths[:, None, None])
    return seen[:, None]


@given(pairs=st.lists(st.booleans(), min_size=49, max_size=49), ranks=st.integers(1, 7))
def test_in_each_round_a_rank_sends_once_and_receives_once(pairs: list[bool], ranks: int) -> None:
    needs = torch.tensor(pairs).view(7, 7)[:ranks, :ranks]
    every = [rounds(needs, rank) for rank in range(ranks)]
    assert len({len(own) for own in every}) == 1
    sent = set()
    for i in range(len(every[0])):
        for receiver in range(ranks):
            sender = every[receiver][i][0]
            if sender is not None:
                assert every[sender][i][1] == receiver
                sent.add((receiver, sender))
        targets = [own[i][1] for own in every if own[i][1] is not None]
        assert len(targets) == sum(own[i][0] is not None for own in every)
    assert sent == {(i, j) for i in range(ranks) for j in range(ranks) if i != j and needs[i, j]}


def test_if_all_see_all_the_rounds_are_those_of_a_ring() -> None:
    needs = torch.ones(8, 8, dtype=torch.bool).fill_diagonal_(False)
    assert rounds(needs, 3) == tuple(((3 - i) % 8, (3 + i) % 8) for i in range(1, 8))
    assert list(scheduled(needs)) == [(i - 1, to, (to - i) % 8) for i in range(1, 8) for to in range(8)]


def test_a_layout_is_printed_and_drawn(tmp_path) -> None:
    plan = distributed.layout(1000, 4, causal=True)
    assert str(plan).splitlines()[1] == "  rank 0: work 1.000, tokens 0-127, 896-999"
    plan.draw(tmp_path / "layout.png")
    assert matplotlib.image.imread(tmp_path / "layout.png").std() > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1, 2), "length must be at least 0"),
        ((64, 0), "mesh must be at least 1"),
        ((64, "cp"), "mesh must be a DeviceMesh or a number of ranks"),
    ],
)
def test_wrong_arguments_are_named(arguments, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        distributed.layout(*arguments)
